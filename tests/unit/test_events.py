# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The events' fields and the arithmetic of ranges."""

from __future__ import annotations

import uuid

from hypothesis import given
from hypothesis import strategies as st

from dm_remap import events
from dm_remap.events import (
    Draft,
    Origin,
    complete,
    intersect_ranges,
    local_origin,
    rfc3339,
    split_draft,
    subtract_ranges,
)
from dm_remap.extents import merge_sectors

ORIGIN = Origin("db1", uuid.UUID(int=7), "boot-a")
RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=6)


def points(ranges):
    return {sector for start, count in ranges for sector in range(start, start + count)}


@given(RANGES, RANGES)
def test_subtraction_leaves_exactly_the_sectors_outside_the_holes(ranges, holes):
    left = subtract_ranges(ranges, holes)
    assert points(left) == points(ranges) - points(holes)
    assert left == list(merge_sectors(left))


@given(RANGES, st.tuples(st.integers(0, 60), st.integers(1, 40)))
def test_intersection_keeps_exactly_the_sectors_inside(ranges, window):
    found = intersect_ranges(merge_sectors(ranges), window)
    assert points(found) == points(ranges) & points([window])
    assert found == list(merge_sectors(found))


def test_an_event_is_flat_and_complete():
    draft = Draft(events.SECTOR_ERROR, "text", "data", "sdb", "read", ((8, 2),), ((0, 16),), 61, 3)
    event = complete(draft, ORIGIN, 42, 1_700_000_000_123_456_789)
    assert event == {
        "schema": 1,
        "uuid": event["uuid"],
        "sequence": 42,
        "time": "2023-11-14T22:13:20.123456Z",
        "host": "db1",
        "target": "data",
        "device": "sdb",
        "type": "sector_error",
        "severity": "error",
        "operation": "read",
        "sectors": [[8, 2]],
        "suspect": [[0, 16]],
        "errno": 61,
        "requests": 3,
        "merged": 0,
        "generation": 0,
        "message": "text",
    }


def test_the_uuid_depends_on_host_boot_device_sequence_and_time_only():
    draft = Draft(events.SECTOR_ERROR, "text", device="sdb")

    def made(draft=draft, origin=ORIGIN, sequence=1, time_ns=5):
        return complete(draft, origin, sequence, time_ns)["uuid"]

    assert made() == made(Draft(events.BLIND, "other", device="sdb"))
    different = {
        made(),
        made(sequence=2),
        made(time_ns=6),
        made(draft=Draft(events.SECTOR_ERROR, "text", device="sdc")),
        made(origin=Origin("db1", uuid.UUID(int=7), "boot-b")),
        made(origin=Origin("db1", uuid.UUID(int=8), "boot-a")),
    }
    assert len(different) == 6


def test_times_before_the_first_microsecond_are_not_rounded_up():
    assert rfc3339(999_999_999) == "1970-01-01T00:00:00.999999Z"


def test_a_long_list_becomes_several_events_that_lose_no_range():
    ranges = tuple((number * 16, 8) for number in range(1200))
    parts = split_draft(Draft(events.SECTOR_ERROR, "text", sectors=ranges, merged=4), limit=512)
    assert [len(part.sectors) for part in parts] == [512, 512, 176]
    assert tuple(item for part in parts for item in part.sectors) == ranges
    assert [part.merged for part in parts] == [4, 0, 0]


def test_the_machine_id_does_not_leave_the_host(tmp_path):
    (tmp_path / "machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    (tmp_path / "boot_id").write_text("b-1\n")
    origin = local_origin("db1", str(tmp_path / "machine-id"), str(tmp_path / "boot_id"))
    assert origin.boot_id == "b-1"
    assert "0123456789abcdef" not in origin.host_id.hex


def test_one_thing_has_no_plural():
    found = [events.counted(number, "entry", "entries") for number in (0, 1, 2)]
    assert found == ["0 entries", "1 entry", "2 entries"]
    assert events.counted(2, "sector") == "2 sectors"


def entry(start):
    return {"start": start, "count": 1, "kind": "file", "path": f"/srv/{start}"}


def test_files_are_told_where_they_are_known_and_counted_beyond_the_limit():
    few = complete(Draft(events.SECTOR_ERROR, "text", files=[entry(1)]), ORIGIN, 1, 0)
    assert few["files"] == [entry(1)]
    assert few["message"] == "text"
    many = Draft(events.SECTOR_ERROR, "text", files=[entry(start) for start in range(66)])
    event = complete(many, ORIGIN, 1, 0)
    assert event["files"] == [entry(start) for start in range(64)]
    assert event["message"] == "text; 2 more files left out"
    assert "files" not in complete(Draft(events.SECTOR_ERROR, "text"), ORIGIN, 1, 0)


@given(st.sets(st.integers(0, 400)), st.integers(1, 7))
def test_each_file_is_told_once_when_a_list_becomes_several_events(starts, limit):
    ranges = tuple((start, 3) for start in range(10, 310, 6))
    files = [entry(start) for start in sorted(starts)]
    draft = Draft(events.SECTOR_ERROR, "text", sectors=ranges, files=files)
    parts = split_draft(draft, limit=limit)
    assert [item for part in parts for item in part.files] == files
    for part in parts[1:]:
        assert all(item["start"] >= part.sectors[0][0] for item in part.files)
