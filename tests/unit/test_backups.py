# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The host's backups of metadata, and what they tell of a target."""

from __future__ import annotations

import itertools
import os
import uuid
from pathlib import Path

import pytest

from dm_remap.backups import KEPT, Backups
from dm_remap.format import Extent, Invalid, geometry_of
from dm_remap.inventory import kept_of
from dm_remap.pool import State
from tests.unit.copy_scene import TARGET, after, first


def file_of(backups: Backups, generation: int) -> Path:
    return Path(backups.folder, str(TARGET), f"{generation:020d}.slot")


@pytest.fixture
def backups(tmp_path):
    return Backups(str(tmp_path / "backup"))


def test_the_newest_generations_are_kept_and_read_back(backups):
    metadata = first(2)
    for _unused in range(KEPT + 3):
        backups.keep(metadata)
        metadata = after(metadata)
    newest = KEPT + 3
    assert backups.generations(TARGET) == list(range(newest, newest - KEPT, -1))
    for generation in backups.generations(TARGET):
        assert backups.read(TARGET, generation) == after(first(2), generation - 1)
    assert backups.newest(TARGET) == after(first(2), newest - 1)
    assert oct(os.stat(file_of(backups, newest).parent).st_mode & 0o777) == "0o700"


def test_nothing_is_known_of_another_target(backups):
    backups.keep(first())
    other = uuid.UUID(int=6)
    assert (backups.generations(other), backups.newest(other)) == ([], None)
    with pytest.raises(FileNotFoundError):
        backups.read(other, 1)


def test_the_first_spare_that_there_is_stands_for_the_target(backups):
    metadata = first(2)
    metadata = first(2, config={**metadata.config, "spares": [None, metadata.config["spares"][1]]})
    backups.keep(metadata)
    assert backups.newest(TARGET) == metadata


@pytest.mark.parametrize("damage", ["flipped", "short", "empty"])
def test_a_damaged_backup_is_passed_over_for_the_one_before(backups, damage):
    backups.keep(first())
    backups.keep(after(first()))
    path = file_of(backups, 2)
    raw = bytearray(path.read_bytes())
    raw[4100 if damage == "flipped" else 0] ^= 1
    path.write_bytes({"flipped": raw, "short": raw[:4000], "empty": b""}[damage])
    with pytest.raises(Invalid):
        backups.read(TARGET, 2)
    assert backups.newest(TARGET) == first()


def test_what_is_no_backup_is_ignored(backups):
    backups.keep(first())
    for name in ("00000000000000000009.slot.new", "x.slot", "7"):
        file_of(backups, 1).with_name(name).touch()
    assert backups.generations(TARGET) == [1]


def test_only_spares_that_are_there_count_as_room():
    """Each set of active spares, of which the first is full and the second empty."""
    metadata = first(2)
    geometry = geometry_of(metadata, 0)
    places = [chunk for chunk in range(geometry.chunks) if geometry.holds(chunk)]
    extents = tuple(Extent(logical, 1, 0, chunk) for logical, chunk in enumerate(places))
    metadata = first(2, extents=extents)
    found = {
        active: kept_of(metadata, active)
        for size in range(3)
        for active in itertools.combinations(range(2), size)
    }
    assert {active: kept.room for active, kept in found.items()} == {
        (): State.FULL,
        (0,): State.FULL,
        (1,): State.OK,
        (0, 1): State.OK,
    }
    assert {kept.generation for kept in found.values()} == {1}
    assert [bool(kept.warning) for kept in found.values()] == [True, True, False, False]
