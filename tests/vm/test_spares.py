# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Spares that come and go on a real kernel, under a verifying load, and one that is pulled out."""

from __future__ import annotations

import random

import pytest

from tests.lab import Disk, Machine
from tests.parameters import short_form
from tests.vm.guest import Guest

NAME = "guarded"
CHUNK_SECTORS = 128


def test_spares_change_under_a_verifying_load(lab: Machine) -> None:
    guest = Guest(lab)
    size = 96 << 20
    lab.attach(Disk("large", size=size))
    paths = [lab.attach(Disk(f"change{index}", size="64M")).path for index in range(3)]
    total = size // 512 // CHUNK_SECTORS
    chunks = sorted(random.Random(5).sample(range(total), 150))
    result = guest.call(
        "change_spares", name=NAME, main=guest.path("large"), spares=paths, chunks=chunks
    )
    done = result["done"]
    assert result["failures"] == {}
    assert result["check"][0] == 0, result["check"][1]
    assert result["always_loaded"]
    assert result["lost"] == []
    assert [done[step].get("lost") for step in done] == [[]] * 6
    assert done["remap"]["moved"] == 150
    assert done["add"]["actions"] == ["format_spare", "activate_spare", "add_spare"]
    emptied = ["drain_spare", "remove_spare", "wipe_metadata", "deactivate_spare"]
    assert done["drain"]["actions"] == emptied
    assert (done["drain"]["moved"], done["drain"]["spares"]) == (150, [1])
    assert (done["return"]["moved"], done["return"]["staying"]) == (75, [])
    assert done["replace"]["actions"] == [*done["add"]["actions"], *emptied]
    assert (done["replace"]["moved"], done["replace"]["spares"]) == (75, [0])
    assert done["remap again"]["moved"] == 75
    for step in ("add", "drain", "replace"):
        assert done[step]["again"] == [], step
    assert result["chunks"] == chunks
    pauses = [done[step]["pause_seconds"] for step in ("remap", "return", "remap again")]
    print("pauses in s:", pauses)


@pytest.mark.soak
def test_reading_a_large_table_costs_no_more_memory_than_the_table(lab: Machine) -> None:
    lab.attach(Disk("large", size="96M"))
    result = Guest(lab).call("large_table", main=lab.disk("large").path, lines=20_000)
    assert result["same"]
    # A line takes 250 bytes as a Python object, and 100 in the library, for each of two buffers.
    assert result["more_bytes"] < 20_000 * 1000


@pytest.mark.parametrize(
    ("present", "moving"),
    short_form([(1_000, 100), (10_000, 1_000)], always=[(1_000, 100)]),
)
def test_many_chunks_move_in_one_commit_on_a_target_with_many(
    lab: Machine, present: int, moving: int
) -> None:
    lab.attach(Disk("large", size="128M"))
    spare = lab.attach(Disk("wide", size="96M")).path
    result = Guest(lab).call(
        "many_remaps",
        name=NAME,
        main=lab.disk("large").path,
        spare=spare,
        present=present,
        moving=moving,
    )
    assert result["wrong"] == []
    for done in result["done"]:
        counted = {key: done[key] for key in ("moved", "commits", "freezes", "swaps", "lost")}
        assert counted == {"moved": moving, "commits": 1, "freezes": 1, "swaps": 1, "lost": []}
        print("seconds in all, of salvage, of pause:", done["seconds"])
    print(f"peak memory {result['peak_bytes'] >> 20} MiB")


@pytest.mark.core
def test_a_spare_that_is_pulled_out(lab: Machine) -> None:
    guest = Guest(lab)
    paths = [lab.attach(Disk(f"pull{index}", size="64M")).path for index in range(2)]
    given = {
        "name": NAME,
        "main": guest.path("main"),
        "spares": paths,
        "chunks": [3, 4, 9],
        "fresh": 20,
        "seed": 11,
        "sectors": 40 * CHUNK_SECTORS,
    }
    guest.call("lose_spare", phase="begin", **given)
    lab.detach("pull0")
    result = guest.call("lose_spare", phase="end", **given)
    assert result["wrong"] == []
    assert result["degraded"]
    (lost,) = result["lost_spares"]
    assert (lost["index"], lost["path"], lost["chunks"]) == (0, None, 3)
    assert lost["unavailable"] == [{"start": 384, "count": 256}, {"start": 1152, "count": 128}]
    assert result["spare_of_fresh"] == 1
    assert result["actions"] == ["discard_chunks", "remove_spare", "deactivate_spare"]
    assert result["after"] == [False, lost["unavailable"], [1]]
