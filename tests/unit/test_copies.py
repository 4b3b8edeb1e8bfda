# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Copies on spares: what is found, what is chosen, and that no crash of a commit mixes or loses."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dm_remap import copies
from dm_remap import format as fmt
from dm_remap.copies import (
    AnotherWriter,
    Choice,
    CommitFailed,
    Conflict,
    LostWrite,
    NewerFormat,
    NoMetadata,
    SplitBrain,
    choose,
    commit,
    repair,
    survey,
    wipe,
)
from dm_remap.errors import DmRemapError, Refused
from dm_remap.format import (
    HEADER_SECTORS,
    SLOT_SECTORS,
    BadMetadata,
    Diagnosis,
    Extent,
    Invalid,
    Metadata,
    pack_slot,
    slot_sectors_of,
    unpack_slot,
)
from tests.unit.copy_scene import (
    EMPTY,
    EVEN,
    NOW,
    ODD_AND_FAR,
    OTHER_TARGET,
    SECTOR,
    SIZE,
    SLOTS,
    SPARES,
    TARGET,
    Disk,
    after,
    chosen,
    config,
    fill,
    first,
    pool,
)


def faults(disk: Disk) -> dict[int, Diagnosis]:
    return {copy.index: copy.diagnosis for copy in survey(disk).failed}


def reseal(raw: bytes, **fields: int) -> bytes:
    """A copy with other header fields under a right checksum."""
    header = bytearray(raw)
    codes = dict(fmt.HEADER_FIELDS)
    offsets = fmt.header_offsets()
    for name, value in {**fields, "header_crc": 0}.items():
        struct.pack_into("<" + codes[name], header, offsets[name], value)
    crc = zlib.crc32(header[: fmt.HEADER_BYTES])
    struct.pack_into("<I", header, offsets["header_crc"], crc)
    return bytes(header)


# Survey


def test_all_seven_copies_are_found() -> None:
    seen = survey(fill(Disk(), after(first(), 3)))
    assert [copy.header.copy_index for copy in seen.copies] == list(range(7))
    assert seen.failed == ()
    assert (seen.target_uuid, seen.spare_uuid) == (TARGET, SPARES[0])
    assert (seen.sizes, seen.empty, seen.newer, seen.contested) == ((SIZE,), False, False, False)


def test_a_foreign_device_is_empty_and_costs_seven_header_reads() -> None:
    disk = Disk()
    disk.put(0, b"ext4" * 1024)
    seen = survey(disk)
    assert seen.empty
    assert seen.target_uuid is None
    assert {copy.diagnosis for copy in seen.failed} == {Diagnosis.MAGIC}
    assert sorted(disk.reads) == [(sector, 8) for sector in SLOTS]


@pytest.mark.parametrize("sectors", [0, 1, 7, 8, 2048, 16384, 32767, 32768])
def test_a_device_of_any_size_is_surveyed(sectors: int) -> None:
    assert survey(Disk(sectors=sectors)).empty


def test_each_copy_has_its_diagnosis() -> None:
    disk = fill(Disk(), first())
    disk.damage(0, offset=0).damage(1).damage(2, offset=4200)
    disk.put(SLOTS[3], pack_slot(first(), SPARES[0], SIZE, 1))
    disk.put(SLOTS[4], reseal(pack_slot(first(), SPARES[0], SIZE, 4), generation=0))
    disk.unreadable.add(SLOTS[5] + 3)
    assert faults(disk) == {
        0: Diagnosis.MAGIC,
        1: Diagnosis.HEADER_CHECKSUM,
        2: Diagnosis.DATA_CHECKSUM,
        3: Diagnosis.MISPLACED,
        4: Diagnosis.SEQUENCE,
        5: Diagnosis.UNREADABLE,
    }
    assert [copy.header.copy_index for copy in survey(disk).copies] == [6]
    assert chosen(disk).metadata == first()


def test_a_body_that_cannot_be_read_makes_its_copy_unreadable() -> None:
    disk = fill(Disk(), first())
    disk.unreadable.add(SLOTS[2] + 8)
    assert faults(disk) == {2: Diagnosis.UNREADABLE}


@pytest.mark.parametrize("survivor", range(7))
def test_any_single_copy_carries_everything(survivor: int) -> None:
    metadata = after(first(), 3)
    disk = fill(Disk(), metadata, (survivor,))
    choice = chosen(disk)
    assert choice.metadata == metadata
    assert len(choice.damaged["disk"]) == 6
    repair(disk, choice, SPARES[0])
    assert len(survey(disk).copies) == 7


def test_the_first_eight_mebibytes_may_be_zeroed() -> None:
    disk = fill(Disk(), first())
    disk.put(0, bytes(16384 * SECTOR))
    assert chosen(disk).metadata == first()


def test_a_device_that_grew_still_shows_its_far_copies() -> None:
    disk = fill(Disk(), first())
    disk.sectors = SIZE * 3
    seen = survey(disk)
    assert len(seen.copies) == 7
    assert seen.failed == ()


def test_a_device_that_shrank_is_named_and_not_written() -> None:
    disk = fill(Disk(), first())
    disk.sectors = SIZE // 2
    assert faults(disk) == {5: Diagnosis.UNREADABLE, 6: Diagnosis.UNREADABLE}
    choice = chosen(disk)
    assert choice.metadata == first()
    assert any("laid out for 131072" in warning for warning in choice.warnings)
    for action in (
        lambda: repair(disk, choice, SPARES[0]),
        lambda: commit({0: disk}, first(), after(first())),
    ):
        with pytest.raises(Refused, match="fewer than the 131072"):
            action()
    assert disk.log == []


def test_a_copy_of_another_spare_on_a_device_is_foreign_and_repaired() -> None:
    metadata = first(2)
    disk = fill(Disk(), metadata)
    fill(disk, metadata, (3,), spare=1)
    assert faults(disk) == {3: Diagnosis.FOREIGN}
    assert survey(disk).spare_uuid == SPARES[0]
    with pytest.raises(AnotherWriter):
        commit({0: disk}, metadata, after(metadata))
    assert repair(disk, chosen(disk), SPARES[0]).written == (3,)
    assert faults(disk) == {}


def test_a_copy_of_another_target_on_a_device_is_never_chosen() -> None:
    disk = fill(Disk(), first())
    fill(disk, after(first(target_uuid=OTHER_TARGET), 50), (0, 2, 4))
    seen = survey(disk)
    assert seen.target_uuid == TARGET
    assert faults(disk) == dict.fromkeys(EVEN, Diagnosis.FOREIGN)
    assert chosen(disk).metadata == first()
    with pytest.raises(AnotherWriter):
        commit({0: disk}, first(), after(first()))
    assert disk.log == []


def test_a_device_that_two_spares_claim_alike_is_refused() -> None:
    disk = fill(Disk(), first(), (0, 1, 2))
    fill(disk, first(target_uuid=OTHER_TARGET), (3, 4, 5))
    seen = survey(disk)
    assert seen.contested
    assert seen.target_uuid is None
    assert not seen.empty
    with pytest.raises(Conflict, match="as many copies of spare"):
        chosen(disk)
    with pytest.raises(Conflict):
        repair(disk, chosen(fill(Disk("good"), first())), SPARES[0])
    assert disk.log == []


@given(st.data())
def test_random_damage_never_leads_to_a_wrong_choice(data: st.DataObject) -> None:
    old, new = first(), after(first())
    disk = fill(Disk(), old, EVEN)
    fill(disk, new, ODD_AND_FAR)
    allowed = {new.digest}
    for _unused in range(data.draw(st.integers(1, 12))):
        index = data.draw(st.integers(0, 6))
        kind = data.draw(st.sampled_from(["bytes", "swap", "unreadable", "zero"]))
        if kind == "bytes":
            offset = data.draw(st.integers(0, 10)) * SECTOR
            disk.put(SLOTS[index] + offset // SECTOR, data.draw(st.binary(min_size=1)) * SECTOR)
        elif kind == "swap":
            source = SLOTS[data.draw(st.integers(0, 6))]
            disk.put(SLOTS[index], b"".join(disk.blocks[source + n] for n in range(16)))
        elif kind == "unreadable":
            disk.unreadable.add(SLOTS[index])
        else:
            disk.put(SLOTS[index], bytes(8192))
    disk.blocks = {sector: block[:SECTOR] for sector, block in disk.blocks.items()}
    seen = survey(disk)
    if not any(copy.metadata == new for copy in seen.copies):
        allowed = {old.digest}
    try:
        assert chosen(disk).metadata.digest in allowed
    except NoMetadata:
        assert seen.copies == ()


def test_a_copy_is_judged_by_itself_and_not_by_its_twin() -> None:
    disk = fill(Disk(), first())
    disk.put(SLOTS[1], reseal(pack_slot(first(), SPARES[0], SIZE, 1), body_crc=7))
    disk.put(SLOTS[2], reseal(pack_slot(first(), SPARES[0], SIZE, 2), generation=9))
    disk.put(SLOTS[3], reseal(pack_slot(first(), SPARES[0], SIZE, 3), timestamp_ns=9))
    disk.put(SLOTS[4], reseal(pack_slot(first(), SPARES[0], SIZE, 4), body_length=8))
    assert faults(disk) == {
        1: Diagnosis.DATA_CHECKSUM,
        2: Diagnosis.DATA_CHECKSUM,
        3: Diagnosis.DATA_CHECKSUM,
        4: Diagnosis.DATA_CHECKSUM,
    }


def test_a_device_that_cannot_be_read_is_not_taken_for_empty() -> None:
    disk = Disk()
    disk.unreadable = {SLOTS[6]}
    seen = survey(disk)
    assert not seen.empty
    with pytest.raises(NoMetadata, match="1 x unreadable"):
        chosen(disk)
    assert SLOTS[6] in wipe(disk, seen)
    disk.unreadable.clear()
    assert survey(disk).empty


# Choice


def test_the_generation_decides_and_not_the_clock() -> None:
    old = first(2, timestamp_ns=NOW)
    new = old.successor(timestamp_ns=5)
    assert chosen(fill(Disk("a"), old), fill(Disk("b"), new, spare=1)).metadata == new


def test_the_highest_generation_is_chosen_and_the_rest_is_listed() -> None:
    old, new = first(2), after(first(2))
    behind = fill(Disk("a"), old, EVEN)
    fill(behind, new, ODD_AND_FAR)
    behind.damage(1)
    stale = fill(Disk("b"), old, spare=1)
    choice = chosen(stale, behind)
    assert choice.metadata == new
    assert choice.source == "a"
    assert choice.spares == {0: "a", 1: "b"}
    assert choice.stale == {"b"}
    assert {copy.index: copy.diagnosis for copy in choice.damaged["a"]} == {
        0: Diagnosis.SEQUENCE,
        1: Diagnosis.HEADER_CHECKSUM,
        2: Diagnosis.SEQUENCE,
        4: Diagnosis.SEQUENCE,
    }
    assert choice.warnings == ()
    assert choice.missing == ()


def test_a_spare_that_is_gone_is_missing() -> None:
    choice = chosen(fill(Disk(), first(3), spare=1))
    assert choice.spares == {1: "disk"}
    assert choice.missing == (0, 2)


def test_a_spare_that_was_taken_out_is_retired() -> None:
    old = first(2)
    new = old.successor(timestamp_ns=NOW, config=config(1))
    choice = chosen(fill(Disk("a"), new), fill(Disk("b"), old, spare=1))
    assert choice.metadata == new
    assert (choice.stale, choice.retired) == (frozenset(), frozenset({"b"}))
    with pytest.raises(Refused, match="is not spare"):
        repair(fill(Disk("b"), old, spare=1), choice, SPARES[1])


def test_a_timestamp_in_the_future_is_only_a_warning() -> None:
    for stamp in (NOW + 10**15, 2**64 - 1):
        choice = chosen(fill(Disk(), first(timestamp_ns=stamp)))
        assert choice.metadata.timestamp_ns == stamp
        assert "future" in choice.warnings[0]
    assert chosen(fill(Disk(), first(timestamp_ns=NOW + 10**9))).warnings == ()


def test_no_valid_copy_says_what_was_found() -> None:
    disk = fill(Disk(), first()).damage(*range(7))
    with pytest.raises(NoMetadata, match="7 x header checksum"):
        chosen(disk)
    with pytest.raises(NoMetadata):
        chosen(Disk())
    with pytest.raises(NoMetadata):
        choose({})


@pytest.mark.parametrize("fields", [{"major": 2}, {"features": 4}])
def test_a_newer_copy_stops_everything(fields: dict[str, int]) -> None:
    disk = fill(Disk(), first())
    disk.put(SLOTS[4], reseal(pack_slot(first(), SPARES[0], SIZE, 4), **fields))
    assert survey(disk).newer
    assert faults(disk) == {4: Diagnosis.NEWER}
    good = chosen(fill(Disk("good"), first()))
    for action in (
        lambda: chosen(disk),
        lambda: chosen(disk, fill(Disk("other"), first(2), spare=1)),
        lambda: commit({0: disk}, first(), after(first())),
        lambda: commit({0: disk}, first(), after(first()), stale=[0]),
        lambda: commit({0: disk}, None, first()),
        lambda: repair(disk, good, SPARES[0]),
    ):
        with pytest.raises(NewerFormat):
            action()
    assert disk.log == []


def test_only_newer_copies_are_not_an_empty_device() -> None:
    disk = Disk()
    for index, sector in enumerate(SLOTS):
        disk.put(sector, reseal(pack_slot(first(), SPARES[0], SIZE, index), major=7))
    seen = survey(disk)
    assert not seen.empty
    assert seen.newer
    assert (seen.target_uuid, seen.spare_uuid) == (TARGET, SPARES[0])
    assert len(wipe(disk, seen)) == 7
    assert survey(disk).empty


def test_a_clone_is_refused() -> None:
    disk = fill(Disk("a"), first())
    with pytest.raises(Conflict, match="one is a clone"):
        chosen(disk, disk.clone("b"))


def test_spares_of_two_targets_are_refused() -> None:
    with pytest.raises(Conflict, match="different targets"):
        chosen(
            fill(Disk("a"), first()),
            fill(Disk("b"), first(2, target_uuid=OTHER_TARGET), spare=1),
        )


def test_equal_generations_with_different_contents_are_a_split_brain() -> None:
    base = first(2)
    here, there = after(base), after(base, host=OTHER_TARGET)
    with pytest.raises(SplitBrain) as caught:
        chosen(fill(Disk("a"), here), fill(Disk("b"), there, spare=1))
    assert {header.digest for header, _keys in caught.value.sides} == {here.digest, there.digest}
    assert {keys for _header, keys in caught.value.sides} == {("a",), ("b",)}
    assert "generation 2" in str(caught.value)


@pytest.mark.parametrize("lead", [1, 2, 3, 50])
def test_histories_of_different_length_are_a_split_brain(lead: int) -> None:
    base = after(first(2), 4)
    long, short = after(base, 1 + lead), after(base, host=OTHER_TARGET)
    with pytest.raises(SplitBrain) as caught:
        chosen(fill(Disk("a"), long), fill(Disk("b"), short, spare=1))
    assert [(h.generation, keys) for h, keys in caught.value.sides] == [
        (6 + lead, ("a",)),
        (6, ("b",)),
    ]


def test_a_split_brain_is_seen_on_one_device_too() -> None:
    base = first()
    disk = fill(Disk(), after(base), EVEN)
    fill(disk, after(base, host=OTHER_TARGET), ODD_AND_FAR)
    with pytest.raises(SplitBrain):
        chosen(disk)


@pytest.mark.parametrize("age", [1, 2, 7, 255, 256])
def test_a_stale_spare_is_an_ancestor_and_no_split_brain(age: int) -> None:
    old = after(first(2), 3)
    new = after(old, age)
    choice = chosen(fill(Disk("a"), new), fill(Disk("b"), old, spare=1))
    assert choice.metadata == new
    assert choice.stale == {"b"}
    assert choice.warnings == ()


def test_a_spare_older_than_the_history_is_stale_with_a_warning() -> None:
    old = first(2)
    new = after(old, 300)
    choice = chosen(fill(Disk("a"), new), fill(Disk("b"), old, spare=1))
    assert choice.stale == {"b"}
    assert "b is too old to prove" in choice.warnings[0]


def test_without_a_history_the_parent_decides() -> None:
    old = first(2)
    new = dataclasses.replace(after(old), history=())
    assert chosen(fill(Disk("a"), new), fill(Disk("b"), old, spare=1)).stale == {"b"}
    stranger = dataclasses.replace(new, parent_digest=b"\7" * 32)
    with pytest.raises(SplitBrain):
        chosen(fill(Disk("a"), stranger), fill(Disk("b"), old, spare=1))


def test_a_first_generation_has_no_ancestors() -> None:
    with pytest.raises(SplitBrain):
        chosen(
            fill(Disk("a"), first(2, generation=5)),
            fill(Disk("b"), first(2, generation=3), spare=1),
        )


# Commit


def names_of(run: Callable[[Callable[[str], None]], object]) -> list[str]:
    names: list[str] = []
    run(names.append)
    return names


def test_a_commit_writes_every_copy_in_order() -> None:
    old, new = first(2), after(first(2))
    disks = pool(old)
    names = names_of(lambda step: commit(disks, old, new, step))
    assert names == [
        *(f"spare{spare}/copy{copy}/written" for spare in (0, 1) for copy in ODD_AND_FAR),
        "spare0/first/flushed",
        "spare1/first/flushed",
        *(f"spare{spare}/copy{copy}/written" for spare in (0, 1) for copy in EVEN),
        "spare0/second/flushed",
        "spare1/second/flushed",
    ]
    choice = chosen(*disks.values())
    assert choice.metadata == new
    assert (choice.stale, choice.damaged) == (frozenset(), {})
    assert [[sector for sector, _unused in filter(None, disk.log)] for disk in disks.values()] == [
        [SLOTS[index] for index in (*ODD_AND_FAR, *EVEN)]
    ] * 2


def test_the_first_commit_needs_no_copies() -> None:
    disks = {index: Disk(f"d{index}") for index in range(8)}
    done = commit(disks, None, first(8))
    assert set(done) == set(range(8))
    assert all(set(rewrite.written) == set(range(7)) for rewrite in done.values())
    assert chosen(*disks.values()).metadata == first(8)


def test_a_spare_that_is_added_or_returns_is_brought_up_to_date() -> None:
    old = first(1)
    new = old.successor(timestamp_ns=NOW, config=config(3))
    disks = {
        0: fill(Disk("a"), old),
        1: Disk("b"),
        2: fill(Disk("c"), dataclasses.replace(first(3), generation=1), spare=2),
    }
    with pytest.raises(LostWrite, match="no valid copy"):
        commit({0: disks[0], 1: disks[1]}, old, new)
    commit(disks, old, new, stale=[1, 2])
    assert chosen(*disks.values()).metadata == new


def test_a_gone_spare_is_left_out() -> None:
    old = first(2)
    disks = pool(old)
    new = after(old)
    commit({1: disks[1]}, old, new)
    choice = chosen(*disks.values())
    assert (choice.metadata, choice.stale) == (new, {"d0"})
    repair(disks[0], choice, SPARES[0])
    assert chosen(*disks.values()).stale == frozenset()


def refused(
    error: type[DmRemapError],
    disks: Mapping[int, Disk],
    current: Metadata | None,
    new: Metadata,
    **more: object,
) -> str:
    before = [dict(disk.blocks) for disk in disks.values()]
    with pytest.raises(error) as caught:
        commit(disks, current, new, **more)
    assert [disk.blocks for disk in disks.values()] == before
    assert all(disk.log == [] for disk in disks.values())
    return str(caught.value)


def test_a_dropped_write_stops_a_commit() -> None:
    old, new = first(2), after(first(2))
    disks = pool(new)
    fill(disks[1], old, spare=1)
    assert "only generation 1" in refused(LostWrite, disks, new, after(new))


def test_an_overwritten_device_stops_a_commit() -> None:
    old = first(2)
    disks = pool(old)
    disks[1] = Disk("d1")
    assert "no valid copy" in refused(LostWrite, disks, old, after(old))
    disks[1] = fill(Disk("d1"), old, spare=1).damage(*range(7), offset=4200)
    assert "no valid copy" in refused(LostWrite, disks, old, after(old))


def test_another_writer_stops_a_commit() -> None:
    old, new = first(2), after(first(2))
    disks = pool(old)
    fill(disks[1], new, (6,), spare=1)
    theirs = after(old, host=OTHER_TARGET)
    assert "generation 2" in refused(AnotherWriter, disks, old, theirs)
    twin = dataclasses.replace(old, timestamp_ns=NOW + 1)
    disks = pool(old)
    fill(disks[0], twin, (2,))
    assert "generation 1" in refused(AnotherWriter, disks, old, new)


def test_a_first_commit_never_overwrites_copies() -> None:
    refused(AnotherWriter, {0: fill(Disk(), after(first()))}, None, first())
    refused(AnotherWriter, {0: fill(Disk(), first(), (5,))}, None, first(host_id=TARGET))
    refused(AnotherWriter, {0: fill(Disk(), first(target_uuid=OTHER_TARGET))}, None, first())
    refused(AnotherWriter, {0: fill(Disk(), first(2), (0,), spare=1)}, None, first(2))


def test_a_stale_device_may_be_lower_but_never_higher() -> None:
    old, new = after(first(2), 5), after(first(2), 6)
    ahead = after(first(2), 9, host=OTHER_TARGET)
    refused(AnotherWriter, {0: fill(Disk(), ahead)}, old, new, stale=[0])


@pytest.mark.parametrize(
    ("current", "new"),
    [
        (first(), first()),
        (first(), after(first(), 2)),
        (after(first()), first()),
        (first(), after(first(target_uuid=OTHER_TARGET))),
        (first(), after(first(host_id=TARGET))),
    ],
)
def test_only_a_successor_is_committed(current: Metadata, new: Metadata) -> None:
    assert "does not follow" in refused(Refused, {0: fill(Disk(), current)}, current, new)


def test_bad_metadata_is_refused_before_the_first_write() -> None:
    old = first()
    bad = old.successor(timestamp_ns=1, extents=(Extent(0, 1, 7, 0),))
    refused(BadMetadata, {0: fill(Disk(), old)}, old, bad)


def test_a_commit_without_devices_is_refused() -> None:
    refused(Refused, {}, first(), after(first()))


def test_a_commit_can_be_repeated() -> None:
    old, new = first(2), after(first(2))
    disks = pool(old)
    for disk in disks.values():
        disk.flush_fails = True
    with pytest.raises(CommitFailed):
        commit(disks, old, new)
    for disk in disks.values():
        disk.flush_fails = False
    commit(disks, old, new)
    assert chosen(*disks.values()).metadata == new
    assert chosen(*disks.values()).damaged == {}


@pytest.mark.parametrize("bad", [*itertools.combinations(range(7), 1), (0, 2, 4), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("offset", [0, 8])
def test_slots_that_cannot_be_written_do_not_stop_commits(
    bad: tuple[int, ...], offset: int
) -> None:
    disk = fill(Disk(), first())
    disk.unwritable = {SLOTS[index] + offset for index in bad}
    metadata = first()
    for _unused in range(3):
        new = after(metadata)
        done = commit({0: disk}, metadata, new)[0]
        assert {copy.index for copy in done.failed} == set(bad)
        assert set(done.written) == set(range(7)) - set(bad)
        metadata = new
    choice = chosen(disk)
    assert choice.metadata == metadata
    assert {copy.index for copy in repair(disk, choice, SPARES[0]).failed} == set(bad)
    disk.unwritable.clear()
    assert set(repair(disk, chosen(disk), SPARES[0]).written) == set(bad)
    assert chosen(disk).damaged == {}


def test_a_slot_that_cannot_be_written_keeps_no_old_copy() -> None:
    disk = fill(Disk(), first())
    disk.unwritable = {SLOTS[3] + 8}
    commit({0: disk}, first(), after(first()))
    assert faults(disk) == {3: Diagnosis.MAGIC}


def test_unreadable_slots_do_not_stop_commits() -> None:
    disk = fill(Disk(), first())
    disk.unreadable = {SLOTS[index] for index in (0, 1, 2, 3, 4, 6)}
    new = after(first())
    commit({0: disk}, first(), new)
    assert chosen(disk).metadata == new


def test_devices_that_take_no_copy_fail_the_commit_before_the_second_half() -> None:
    old, new = first(2), after(first(2))
    disks = pool(old)
    for disk in disks.values():
        disk.unwritable = {SLOTS[index] for index in ODD_AND_FAR}
    with pytest.raises(CommitFailed, match="took no copy"):
        commit(disks, old, new)
    for disk in disks.values():
        assert {copy.header.generation for copy in survey(disk).copies} == {1}
    assert chosen(*disks.values()).metadata == old


@pytest.mark.parametrize("fault", ["no copy", "no flush", "no read"])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_device_that_fails_is_left_out(failing: int, fault: str) -> None:
    old, new = first(2), after(first(2))
    disks = pool(old)
    disk = disks[failing]
    if fault == "no copy":
        disk.unwritable = {SLOTS[index] for index in ODD_AND_FAR}
    elif fault == "no flush":
        disk.flush_fails = True
    else:
        disk.unreadable = set(SLOTS)
    done = commit(disks, old, new)
    assert done[failing].left_out
    assert not done[1 - failing].left_out
    assert {c.header.generation for c in survey(disks[1 - failing]).copies} == {2}
    disk.unwritable, disk.flush_fails, disk.unreadable = set(), False, set()
    left = {copy.header.generation for copy in survey(disk).copies}
    # The copies that are written last are not touched on a device that failed before.
    assert left == ({1, 2} if fault == "no flush" else {1})
    assert chosen(*disks.values()).metadata == new
    # It takes part again when it was brought up to date, or is known to be behind.
    commit(disks, new, after(new), stale=[failing])
    assert chosen(*disks.values()).stale == frozenset()


def test_a_device_that_contradicts_stops_the_commit_beside_one_that_fails() -> None:
    old, new = first(2), after(first(2))
    disks = pool(new)
    fill(disks[1], old, spare=1)
    disks[0].unreadable = set(SLOTS)
    refused(LostWrite, disks, new, after(new))


def test_without_a_device_that_can_be_read_nothing_is_written() -> None:
    old = first(2)
    disks = pool(old)
    for disk in disks.values():
        disk.unreadable = set(SLOTS)
    refused(CommitFailed, disks, old, after(old))


def test_a_flush_that_fails_fails_the_commit() -> None:
    old, new = first(), after(first())
    disk = fill(Disk(), old)
    disk.flush_fails = True
    with pytest.raises(CommitFailed, match="flushed"):
        commit({0: disk}, old, new)
    assert {survey(disk).copies[index].header.generation for index in EVEN} == {1}


def test_copies_that_a_crash_left_behind_are_reported() -> None:
    old, new = first(), after(first())
    disk = fill(Disk(), old, EVEN)
    fill(disk, new, ODD_AND_FAR)
    done = commit({0: disk}, new, after(new))[0]
    assert done.behind == EVEN
    assert chosen(disk).damaged == {}


# Crashes


def recover(state: Mapping[int, Disk], choice: Choice) -> None:
    """After a crash repair makes every copy right, and the next commit goes through."""
    for index, disk in state.items():
        if disk.name in choice.damaged or disk.name in choice.stale or index in choice.missing:
            repair(disk, choice, SPARES[index])
    again = chosen(*state.values())
    assert again.metadata.digest == choice.metadata.digest
    assert (again.stale, again.damaged, again.missing) == (frozenset(), {}, ())
    commit(state, choice.metadata, after(choice.metadata))
    assert chosen(*state.values()).metadata.generation == choice.metadata.generation + 1


class Stopped(Exception):
    """The process was killed here."""


@pytest.mark.parametrize("count", [1, 2])
def test_a_commit_killed_at_each_step_leaves_one_whole_generation(count: int) -> None:
    old, new = first(count), after(first(count))
    total = len(names_of(lambda step: commit(pool(old, count), old, new, step)))
    assert total == count * 9
    for stop in range(total):
        countdown = itertools.count()

        def step(_name: str, countdown: Iterator[int] = countdown, stop: int = stop) -> None:
            if next(countdown) == stop:
                raise Stopped

        disks = pool(old, count)
        with pytest.raises(Stopped):
            commit(disks, old, new, step)
        choice = chosen(*disks.values())
        assert choice.metadata == new
        recover(disks, choice)


# Repair


def test_repair_writes_only_what_is_damaged() -> None:
    disk = fill(Disk(), first()).damage(1, 4, offset=4200)
    done = repair(disk, chosen(disk), SPARES[0])
    assert (done.written, done.failed, done.behind) == ((1, 4), (), ())
    assert [entry and entry[0] for entry in disk.log] == [SLOTS[1], None, SLOTS[4], None]
    assert repair(disk, chosen(disk), SPARES[0]).written == ()


def test_repair_rewrites_a_copy_that_was_laid_out_for_another_size() -> None:
    disk = fill(Disk(), first())
    disk.put(0, pack_slot(first(), SPARES[0], SIZE * 2, 0))
    assert repair(disk, chosen(disk), SPARES[0]).written == (0,)


def test_repair_fills_a_blank_device_that_is_known_to_be_the_spare() -> None:
    metadata = first(2)
    good = fill(Disk("a"), metadata)
    blank = Disk("b")
    repair(blank, chosen(good, blank), SPARES[1])
    assert chosen(good, blank).spares == {0: "a", 1: "b"}


def test_repair_never_goes_back() -> None:
    old, new = first(), after(first())
    disk = fill(Disk(), old)
    choice = chosen(disk)
    fill(disk, new, (6,))
    with pytest.raises(AnotherWriter):
        repair(disk, choice, SPARES[0])
    fill(disk, dataclasses.replace(old, timestamp_ns=1), (6,))
    with pytest.raises(AnotherWriter):
        repair(disk, choice, SPARES[0])
    assert disk.log == []


def test_repair_refuses_another_spare_or_target() -> None:
    metadata = first(2)
    disk = fill(Disk(), metadata)
    choice = chosen(disk)
    with pytest.raises(Refused, match="is not spare"):
        repair(disk, choice, SPARES[1])
    with pytest.raises(Refused, match="is not spare"):
        repair(disk, choice, SPARES[7])
    with pytest.raises(Refused, match="another target"):
        repair(fill(Disk(), first(2, target_uuid=OTHER_TARGET)), choice, SPARES[0])


def test_a_write_that_does_not_read_back_is_reported() -> None:
    disk = fill(Disk(), first()).damage(3)
    dropped = disk.put
    disk.put = lambda sector, data: None if sector == SLOTS[3] else dropped(sector, data)  # type: ignore[method-assign]
    done = repair(disk, chosen(disk), SPARES[0])
    assert done.written == ()
    assert [copy.index for copy in done.failed] == [3]


def test_a_repair_without_one_good_copy_fails() -> None:
    disk = Disk("b")
    disk.unwritable = set(SLOTS)
    with pytest.raises(CommitFailed, match="no good copy"):
        repair(disk, chosen(fill(Disk("a"), first(2))), SPARES[1])


# Wipe


def test_nothing_is_left_after_a_wipe() -> None:
    disk = fill(Disk(), after(first(), 3))
    assert set(wipe(disk, survey(disk))) == set(SLOTS)
    assert survey(disk).empty
    assert disk.log[-1] is None
    assert all(block == bytes(SECTOR) for block in disk.blocks.values())


def test_a_wipe_finds_the_far_copies_of_a_device_that_grew_or_shrank() -> None:
    disk = fill(Disk(), first())
    disk.sectors = SIZE * 2
    wipe(disk, survey(disk))
    disk.sectors = SIZE
    assert survey(disk).empty
    disk = fill(Disk(), first())
    disk.sectors = SIZE // 2 + 4096
    wipe(disk, survey(disk))
    assert survey(disk).empty


def test_a_wipe_leaves_a_device_that_is_no_spare_alone() -> None:
    disk = Disk()
    disk.put(SLOTS[5], b"user data" * 4096)
    before = dict(disk.blocks)
    assert wipe(disk, survey(disk)) == ()
    assert disk.blocks == before


@pytest.mark.parametrize("left", range(7))
def test_a_wipe_reaches_all_slots_from_any_copy(left: int) -> None:
    disk = fill(Disk(), first()).damage(*(set(range(7)) - {left}), offset=0)
    wipe(disk, survey(disk))
    assert all(disk.blocks[sector] == bytes(SECTOR) for sector in SLOTS)


def test_a_wipe_removes_damaged_foreign_and_contested_copies() -> None:
    for disk in (
        fill(Disk(), first()).damage(*range(7)),
        fill(fill(Disk(), first()), first(target_uuid=OTHER_TARGET), (1, 5)),
        fill(fill(Disk(), first(), (0, 5)), first(target_uuid=OTHER_TARGET), (1, 6)),
    ):
        wipe(disk, survey(disk))
        assert survey(disk).empty


def test_a_wipe_that_leaves_a_copy_says_so() -> None:
    disk = fill(Disk(), first())
    disk.unwritable = {SLOTS[3]}
    with pytest.raises(DmRemapError, match=f"could not be wiped: sector {SLOTS[3]}: "):
        wipe(disk, survey(disk))
    assert [copy.header.copy_index for copy in survey(disk).copies] == [3]
    disk = fill(Disk(), first())
    kept = disk.put
    disk.put = lambda sector, data: None if sector == 0 else kept(sector, data)  # type: ignore[method-assign]
    with pytest.raises(DmRemapError, match="sector 0 still holds a copy"):
        wipe(disk, survey(disk))


def test_a_wipe_cut_short_can_be_repeated() -> None:
    for count in range(7):
        disk = fill(Disk(), first())
        disk.sectors = SIZE * 2
        order = wipe(disk.clone(), survey(disk))
        for sector in order[:count]:
            disk.put(sector, bytes(copies.WIPE_BYTES))
        assert set(wipe(disk, survey(disk))) == set(SLOTS)
        disk.sectors = SIZE
        assert survey(disk).empty


def valid_copies(disk: Disk, sizes: Iterable[int]) -> list[tuple[int, int]]:
    """Generation and sector of each copy that any scan could find, whatever size the device has."""
    sectors = {sector for size in sizes for sector in slot_sectors_of(size)}
    found = []
    for sector in sorted(sectors):
        with contextlib.suppress(Invalid):
            raw = b"".join(disk.blocks.get(sector + n, EMPTY) for n in range(SLOT_SECTORS))
            found.append((unpack_slot(raw, sector).header.generation, sector))
    return found


@given(data=st.data())
def test_no_slot_of_any_known_size_is_valid_after_a_wipe_and_none_is_older_on_the_way(
    data: st.DataObject,
) -> None:
    """Layouts of several sizes, generations and targets, damage, and a device of another size."""
    sizes = [SIZE, SIZE * 2, SIZE + 4096]
    disk = Disk(sectors=data.draw(st.sampled_from([SIZE, SIZE * 2, SIZE + 4096, SIZE * 3])))
    kept: list[int] = []
    for size in data.draw(st.lists(st.sampled_from(sizes), min_size=1, max_size=3)):
        owner = data.draw(st.sampled_from([TARGET, TARGET, OTHER_TARGET]))
        metadata = first(target_uuid=owner, config=config(size=size))
        metadata = after(metadata, data.draw(st.integers(0, 3)))
        for index in data.draw(st.sets(st.integers(0, 6), min_size=1)):
            sector = slot_sectors_of(size)[index]
            # What is past the end of a device that shrank is on no device.
            if sector + SLOT_SECTORS <= disk.sectors:
                disk.put(sector, pack_slot(metadata, SPARES[0], size, index))
        kept.append(size)
    for sector in data.draw(st.sets(st.sampled_from(sorted(slot_sectors_of(SIZE))), max_size=4)):
        if sector + HEADER_SECTORS in disk.blocks:
            disk.blocks[sector + HEADER_SECTORS] = b"\xff" * SECTOR
    # What no header tells of, the caller knows from the other spares.
    told = set(kept)
    seen = survey(disk, told)
    own = max((copy.header.generation for copy in seen.copies), default=0)
    before = disk.clone()
    disk.log.clear()
    wipe(disk, seen)
    sizes = sorted({*kept, disk.sectors})
    assert valid_copies(disk, sizes) == []
    assert survey(disk, told).empty
    # When the older ones have lost their bodies, what a kill leaves is of the newest generation.
    for event in filter(None, disk.log):
        before.put(*event)
        if event[0] % SLOT_SECTORS == 0:
            left = survey(before, told)
            assert {copy.header.generation for copy in left.copies} <= {own}
            assert left.target_uuid in (None, seen.target_uuid)


def test_the_far_copies_of_an_old_size_are_found_by_a_header_in_front_of_a_damaged_body() -> None:
    disk = fill(Disk(), first()).damage(*range(5), offset=4096 + 8)
    disk.sectors = SIZE * 2
    seen = survey(disk)
    assert [copy.header.copy_index for copy in seen.copies] == [5, 6]
    wipe(disk, seen)
    assert valid_copies(disk, [SIZE, SIZE * 2]) == []


def test_what_only_others_know_of_is_wiped_too() -> None:
    disk = fill(Disk(), first()).damage(*range(5), offset=0)
    disk.sectors = SIZE * 2
    assert not survey(disk).copies
    wipe(disk, survey(disk, {SIZE}))
    assert valid_copies(disk, [SIZE]) == []
