# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Arbitrary bytes on a spare: never a wrong configuration, never a surprise, always a diagnosis."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dm_remap import copies, discovery
from dm_remap import format as fmt
from tests.unit.fuzz_scene import (
    SEALED,
    USED,
    Piece,
    check_slot,
    copy_of,
    examine,
    generations,
    packed,
    pieces_of,
    seeds,
)

ROOT = Path(__file__).resolve().parents[2]
RUNS = 50_000
SEEDS = seeds()
BASE = generations()["base"]


@pytest.mark.parametrize("name", SEEDS)
def test_a_seed_is_valid_and_holds(name: str) -> None:
    pieces = list(pieces_of(SEEDS[name]))
    assert packed(pieces) == SEEDS[name]
    assert all(check_slot(piece.raw, piece.sector) in generations().values() for piece in pieces)
    examine(SEEDS[name])


def test_random_changes_hold() -> None:
    chance = random.Random(7)
    for name in sorted(SEEDS):
        for _unused in range(8):
            changed = bytearray(SEEDS[name])
            for _change in range(chance.randrange(1, 9)):
                changed[chance.randrange(len(changed))] = chance.randrange(256)
            examine(bytes(changed))


def flipped(piece: Piece, offset: int) -> Piece:
    data = bytearray(piece.data)
    data[offset] ^= 1
    return replace(piece, data=bytes(data))


def trusting_header(raw: bytes) -> int:
    offset = fmt.header_offsets()["header_crc"]
    return int.from_bytes(raw[offset : offset + 4], "little")


def no_others(_found: Any) -> list[Any]:
    return []


@pytest.mark.parametrize(
    ("where", "name", "broken", "given"),
    [
        (fmt, "_header_crc", trusting_header, [flipped(copy_of(BASE, 1, flags=0), 33)]),
        (copies, "_is_copy_of", lambda *_all: True, [flipped(copy_of(BASE, 1, flags=0), 300)]),
        (fmt, "_sections", lambda _body: {}, [copy_of(BASE, 1)]),
        (discovery, "_others", no_others, [Piece(2, 0, fmt.MAGIC)]),
        (fmt, "_check_header", lambda *_all: None, [replace(copy_of(BASE, 1), place=2)]),
    ],
    ids=["header's checksum", "twin", "structure", "untold", "place"],
)
def test_a_reader_that_does_not_check_is_found(
    monkeypatch: pytest.MonkeyPatch,
    where: Any,
    name: str,
    broken: Callable[..., object],
    given: list[Piece],
) -> None:
    examine(packed(given))
    monkeypatch.setattr(where, name, broken)
    with pytest.raises((AssertionError, KeyError)):
        examine(packed(given))


def test_a_sealed_change_gets_past_the_checksums() -> None:
    # The first byte of the configuration.
    changed = flipped(copy_of(BASE, 1, flags=SEALED), USED + 8)
    with pytest.raises(fmt.Invalid) as caught:
        fmt.unpack_slot(replace(changed, flags=0).raw, changed.sector)
    assert caught.value.diagnosis is fmt.Diagnosis.DATA_CHECKSUM
    with pytest.raises(fmt.Invalid) as caught:
        fmt.unpack_slot(changed.raw, changed.sector)
    assert caught.value.diagnosis is fmt.Diagnosis.STRUCTURE


@pytest.mark.soak
@pytest.mark.skipif(not find_spec("atheris"), reason="atheris is not there for this processor")
@pytest.mark.parametrize("seed", range(1, 5))
def test_fuzzing_finds_nothing(tmp_path: Path, seed: int) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, data in SEEDS.items():
        (corpus / name).write_bytes(data)
    command = [sys.executable, "-m", "tests.unit.fuzz_metadata", f"-seed={seed}", f"-runs={RUNS}"]
    command += ["-max_len=16384", f"-artifact_prefix={tmp_path}/", str(corpus)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    assert f"Done {RUNS} runs" in said
