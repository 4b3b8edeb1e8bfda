# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Leaving the kernel target dm-remap-v4 on a real kernel, also where processes die on the way."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from tests import old_spare
from tests.lab import Disk, Machine
from tests.old_spare import Entry, Old
from tests.vm.guest import Guest

NAME = "guarded"
SEED, OLD_SEED = 11, 12
# The pattern covers this much of main, and with it all chunks that the entries touch.
FILLED_SECTORS = 8192
MAIN_SECTORS, OLD_SECTORS = 131072, 16384
CHUNK_SECTORS = 128
CREATION = [
    "format_spare",
    "activate_spare",
    "migrate_chunks",
    "verify_migration",
    "create_target",
]
# A sector, two of one chunk, one at the end of a chunk, one whose place is in the old metadata, and
# two that share a place.
SECTORS = {1000: 4096, 2048: 4104, 2056: 1280, 4088: 16376, 5000: 8, 6000: 6000, 7000: 6000}
LOST = {5000, 6000, 7000}


def pattern(seed: int, sector: int) -> bytes:
    """What the programs write; tests/vm/programs/scene.py has the same."""
    return struct.pack("<QQ", seed + 1, sector) * 32


def make_old_spare(image: Path, places: dict[int, int]) -> None:
    entries = [Entry(sector, place) for sector, place in SECTORS.items()]
    with open(image, "wb") as file:
        file.truncate(OLD_SECTORS * 512)

        def put(sector: int, data: bytes) -> None:
            file.seek(sector * 512)
            file.write(data)

        # What is left of other times; nothing of it may be shown.
        for sector in range(1280, OLD_SECTORS):
            put(sector, pattern(OLD_SEED + 1, sector))
        for sector, place in places.items():
            put(place, pattern(OLD_SEED, sector))
        old_spare.write(put, Old(MAIN_SECTORS, OLD_SECTORS, entries).pack())


def run(
    lab: Machine, folder: Path, kill_after: list[str], block: int = 512, unit: int | None = None
) -> dict[str, Any]:
    span = (unit or block) // 512
    places = {
        sector + offset: place + offset
        for sector, place in SECTORS.items()
        if sector not in LOST
        for offset in range(span)
    }
    lost = sorted(sector + offset for sector in LOST for offset in range(span))
    image = folder / "old.img"
    make_old_spare(image, places)
    old = lab.attach(Disk("oldspare", image=str(image), size=OLD_SECTORS * 512, block=block))
    suffix = "4k" if block == 4096 else ""
    guest = Guest(lab)
    result: dict[str, Any] = guest.call(
        "migrate",
        name=NAME,
        main=guest.path("main" + suffix),
        spare=guest.path("spare" + suffix),
        old=old.path,
        seed=SEED,
        old_seed=OLD_SEED,
        sectors=FILLED_SECTORS,
        places=places,
        lost=lost,
        unit=unit,
        kill_after=kill_after,
    )
    assert "kernel dm-remap-v4 spare" in result["as_spare"]
    assert result["killed_after"] == kill_after
    assert result["wrong"] == []
    assert result["unchanged"], "main or the old spare was written to"
    assert result["lost"] == lost
    assert result["chunks"] == sorted({sector // CHUNK_SECTORS for sector in SECTORS})
    assert result["generation"] == 2
    assert result["done"]["unread"] == []
    assert result["again"] == []
    return result


def test_a_kernel_target_is_left_without_losing_a_sector(lab: Machine, tmp_path: Path) -> None:
    result = run(lab, tmp_path, [])
    assert result["done"]["actions"] == CREATION
    assert "4 remapped sectors of" in result["done"]["message"]
    assert any("3 sectors of main cannot be saved" in text for text in result["done"]["warnings"])


@pytest.mark.soak
def test_larger_units_and_blocks_are_migrated_whole(lab: Machine, tmp_path: Path) -> None:
    assert run(lab, tmp_path, [], block=4096)["done"]["actions"] == CREATION


@pytest.mark.soak
def test_a_migration_that_was_killed_goes_on_with_the_same_task(
    lab: Machine, tmp_path: Path
) -> None:
    steps = ["activate_spare", "data_flushed", "migrate_chunks"]
    result = run(lab, tmp_path, steps, unit=4096)
    assert result["done"]["actions"][-5:] == CREATION
    assert "wipe_spare" in result["done"]["actions"]
    assert "remove_remains" in result["done"]["actions"]
