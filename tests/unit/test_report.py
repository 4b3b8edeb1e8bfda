# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What users are told: plain data that JSON can carry, with the right numbers."""

from __future__ import annotations

import json
import os
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from dm_remap.files import Owner
from dm_remap.format import Diagnosis, Extent, LostRange, geometry_of
from dm_remap.moved import RemappedChunk, RemapReport
from dm_remap.plan import Plan
from dm_remap.plan_remap import plan_remap
from dm_remap.planner import plan_present
from dm_remap.report import (
    describe_owner,
    describe_remap,
    describe_target,
    diff_of,
    event_files,
    printable,
    sector_ranges,
    unknown_owners,
)
from tests.unit.test_planner import (
    MAIN_SECTORS,
    REQUEST,
    active,
    blank,
    created,
    seen_active,
    with_fault,
)
from tests.unit.test_replacement import under_way


def test_a_target() -> None:
    metadata = created(Extent(3, 2, 0, 0), Extent(9, 1, 1, 4), lost=(LostRange(390, 2),))
    described = describe_target(active(metadata))
    assert json.loads(json.dumps(described)) == described
    assert described["name"] == "data"
    assert described["device"] == "/dev/mapper/data"
    assert described["uuid"] == str(metadata.target_uuid)
    assert described["generation"] == 2
    assert described["sectors"] == MAIN_SECTORS
    assert described["chunk_size"] == 65536
    assert described["remapped_chunks"] == 3
    assert described["lost"] == [{"start": 390, "count": 2}]
    assert described["interrupted"] is False
    assert described["main"]["path"] == "/dev/main"
    assert described["main"]["serial"] == "serial-0"
    assert described["table"][:2] == ["0 384 linear main 0", "384 256 linear spare0 0"]
    assert described["warnings"] == []


def test_spares_and_their_room() -> None:
    metadata = created(Extent(3, 2, 0, 0))
    first, second = describe_target(active(metadata))["spares"]
    usable = geometry_of(metadata, 0).usable_chunks
    assert (first["chunks"], first["free_chunks"]) == (usable, usable - 2)
    assert (second["chunks"], second["free_chunks"]) == (usable, usable)
    assert (first["path"], first["index"], first["serial"]) == ("/dev/spare0", 0, "serial-16")
    assert second["uuid"] == metadata.config["spares"][1]["uuid"]
    assert not first["copies_damaged"]
    assert not first["stale"]


def test_the_room_of_the_pool() -> None:
    metadata = created(Extent(3, 2, 0, 0), Extent(9, 1, 1, 4))
    first, second = (spare["uuid"] for spare in metadata.config["spares"])
    sick = replace(
        metadata, health={"spares": {first: {"score": 7}, second: {"bad_chunks": [4, 5, 6]}}}
    )
    sick.config["thresholds"] = {"warn": 1, "critical": 100}
    described = describe_target(active(sick))
    assert json.loads(json.dumps(described)) == described
    usable = geometry_of(metadata, 0).usable_chunks
    reserved = len(geometry_of(metadata, 0).reserved_chunks)
    assert described["allocation"] == "first_fit"
    assert described["thresholds"] == {"warn": 1, "critical": 100}
    assert described["pool"] == {
        "state": "warn",
        "filled_percent": round(500 / (2 * usable), 1),
        "chunks": 2 * usable,
        "free_chunks": 2 * usable - 5,
        "used_chunks": 3,
        "bad_chunks": 2,
        "reserved_chunks": 2 * reserved,
    }
    keys = ("score", "free_chunks", "used_chunks", "bad_chunks", "reserved_chunks")
    assert [tuple(spare[key] for key in keys) for spare in described["spares"]] == [
        (7.0, usable - 2, 2, 0, reserved),
        (100.0, usable - 3, 1, 2, reserved),
    ]
    (warning,) = described["warnings"]
    assert warning.startswith("data: the spares are filled to")


def test_damage_and_interruption_are_told() -> None:
    described = describe_target(with_fault(active(frozen=True), Diagnosis.UNREADABLE))
    assert described["interrupted"] is True
    assert [spare["copies_damaged"] for spare in described["spares"]] == [False, True]
    assert "copy 3 of the metadata is unreadable" in described["warnings"][0]


def test_a_remap() -> None:
    chunk = RemappedChunk(
        chunk=3,
        start=384,
        count=128,
        spare=0,
        spare_chunk=7,
        recovered_first_read=120,
        recovered_on_retry=5,
        lost=[(390, 2), (392, 1)],
    )
    plan = Plan("data", after={"generation": 4})
    report = RemapReport(plan, [chunk], salvage_seconds=0.123456, pause_seconds=0.01, seconds=0.2)
    described = describe_remap(report)
    assert json.loads(json.dumps(described)) == described
    assert described["generation"] == 4
    assert described["recovered"] == 125
    assert described["lost"] == [{"start": 390, "count": 3}]
    assert described["chunks"][0]["lost"] == [{"start": 390, "count": 3}]
    assert described["chunks"][0]["spare_chunk"] == 7
    assert described["salvage_seconds"] == 0.1235


def test_ranges_are_sorted_and_joined() -> None:
    assert sector_ranges([(9, 1), (0, 4), (2, 4)]) == [
        {"start": 0, "count": 6},
        {"start": 9, "count": 1},
    ]
    assert sector_ranges([]) == []


def test_a_creation_shows_everything_as_new() -> None:
    configuration, table = diff_of(plan_present(REQUEST, blank()))
    assert configuration["before"] == ""
    assert json.loads(configuration["after"])["spares"] == ["/dev/spare0", "/dev/spare1"]
    assert table["before"] == ""
    assert table["after"] == f"0 {MAIN_SECTORS} linear main 0\n"
    assert configuration["before_header"] == "/dev/mapper/data configuration"


def test_a_remap_shows_its_segments() -> None:
    configuration, table = diff_of(plan_remap(active(), [(0, 1)]))
    assert json.loads(configuration["before"])["generation"] == 1
    assert json.loads(configuration["after"])["generation"] == 2
    assert table["after"].splitlines()[0] == "0 128 linear spare0 0"


def test_nothing_to_do_shows_no_difference() -> None:
    for part in diff_of(plan_present(REQUEST, seen_active(active()))):
        assert part["before"] == part["after"] != ""


def test_names_can_be_printed_and_told_apart() -> None:
    assert printable("/srv/a b é") == "/srv/a b é"
    assert printable("new\nline\x7f") == "new\\x0aline\\x7f"
    assert printable(os.fsdecode(b"no text \xff")) == "no text \\xff"
    assert printable("back\\x0aslash") == "back\\\\x0aslash"


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_different_names_look_different(one: bytes, other: bytes) -> None:
    shown = [printable(os.fsdecode(name)) for name in (one, other)]
    assert (shown[0] == shown[1]) == (one == other)
    assert all(text.isprintable() for text in shown)
    assert shown[0].encode().decode() == shown[0], "it is text without surrogates"


def test_owners_are_told() -> None:
    owners = [
        Owner(8, 2, "file", ("/srv/a", "/srv/b\n"), 12, "ext4", 1),
        Owner(10, 1, "unknown", reason="because"),
        Owner(20, 2, "unknown", reason="because"),
    ]
    assert describe_owner(owners[0]) == {
        "start": 8,
        "count": 2,
        "kind": "file",
        "paths": ["/srv/a", "/srv/b\\x0a"],
        "inode": 12,
        "filesystem": "ext4",
        "partition": 1,
        "reason": "",
    }
    assert event_files(owners[:2]) == [
        {"start": 8, "count": 2, "kind": "file", "path": "/srv/a"},
        {"start": 8, "count": 2, "kind": "file", "path": "/srv/b\\x0a"},
        {"start": 10, "count": 1, "kind": "unknown", "path": ""},
    ]
    (long,) = event_files([Owner(8, 2, "file", ("a/" * 600 + "end",))])
    assert (len(long["path"]), long["path"][0], long["path"][-5:]) == (1000, "…", "a/end")
    assert unknown_owners(owners) == ["whom 3 lost sectors belonged to is unknown: because"]
    report = RemapReport(Plan("data", after={"generation": 4}), files=owners[:1])
    assert describe_remap(report)["lost_files"] == [describe_owner(owners[0])]


def test_a_replacement_is_told_with_its_percentage() -> None:
    told = describe_target(under_way())["replacing"]
    total = MAIN_SECTORS * 512
    assert told == {
        "path": "/dev/new",
        "devno": "8:64",
        "copied": 8 * 65536,
        "total": total,
        "percent": round(100 * 8 * 65536 / total, 1),
    }
    assert describe_target(active())["replacing"] is None
