# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Leaving the kernel target: where each sector comes from, and every crash on the way."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dm_remap import migration, plan_spares, pool
from dm_remap.blockdev import OWN_SIGNATURE
from dm_remap.engine import Engine
from dm_remap.errors import DmRemapError, Refused
from dm_remap.format import geometry_of, minimum_spare_sectors, plan_geometry
from dm_remap.kernel_v4 import KernelMetadata, Remap
from dm_remap.migration import Lost, Migration, Piece, resolve
from dm_remap.moved import RemappedChunk
from dm_remap.observing import request_seen
from dm_remap.plan import Plan, readable_table
from dm_remap.plan_remap import choose_places
from dm_remap.plan_upkeep import plan_upkeep
from dm_remap.planner import plan_present
from dm_remap.report import describe_migration
from dm_remap.request import Request
from tests import old_spare
from tests.old_spare import ACTIVE, PENDING, Entry, Old
from tests.parameters import short_form
from tests.unit.fake_kernel import FILESYSTEM_MAGIC, SECTOR, Disk, Kernel, Process
from tests.unit.test_engine import CHUNK, NAME, SECTORS, content, numbered, survivals

OLD_SECTORS = 3000


# Where sectors come from

WHOLE = Old(SECTORS, OLD_SECTORS)


def table(*entries: Entry, main: int = SECTORS, place: int = OLD_SECTORS) -> KernelMetadata:
    remaps = tuple(Remap(e.main, e.spare, e.errors, e.flags) for e in entries)
    return KernelMetadata(5, 1, main, place, remaps)


def decide(old: KernelMetadata, block: int = 1, **more: Any) -> Migration:
    return resolve(old, "/dev/old", block, **more)


def lost_sectors(taken: Migration) -> set[int]:
    return {s for item in taken.lost for s in range(item.sector, item.sector + item.count)}


def test_each_entry_is_a_sector() -> None:
    taken = decide(table(Entry(10, 2000), Entry(11, 2500), Entry(100, 1280), Entry(196, 2999)))
    assert taken.places == {10: 2000, 11: 2500, 100: 1280, 196: 2999}
    assert taken.lost == ()
    assert taken.chunks(CHUNK) == [1, 12, 24]
    (warning,) = taken.warnings
    assert "check the filesystem" in warning


def test_an_empty_table_takes_nothing() -> None:
    assert decide(table()) == Migration({}, (), SECTORS)


@pytest.mark.parametrize("place", [0, 164, 165, 255, 256, 1024, 1279])
def test_a_place_in_the_old_metadata_is_lost(place: int) -> None:
    taken = decide(table(Entry(10, place)))
    assert taken.places == {}
    (item,) = taken.lost
    assert (item.sector, item.count) == (10, 1)
    assert "into the old metadata" in item.reason
    assert taken.chunks(CHUNK) == [1], "its chunk must not stay on main, which has old data there"


@pytest.mark.parametrize("place", [OLD_SECTORS, OLD_SECTORS + 1, 2**64 - 1])
def test_a_place_beyond_the_end_of_the_old_spare_is_lost(place: int) -> None:
    (item,) = decide(table(Entry(10, place))).lost
    assert "beyond the end" in item.reason


@pytest.mark.parametrize("sector", [SECTORS, SECTORS + 1, 2**64 - 1])
def test_a_sector_that_main_does_not_have_is_told(sector: int) -> None:
    taken = decide(table(Entry(sector, 2000), Entry(10, 2000)))
    assert taken.places == {10: 2000}, "what was never used claims no place"
    assert f"remaps of sectors {sector}, which main does not have" in taken.warnings[0]


def test_sectors_that_share_a_place_are_lost() -> None:
    taken = decide(table(Entry(10, 2000), Entry(50, 2000), Entry(60, 2001)))
    assert taken.places == {60: 2001}
    assert lost_sectors(taken) == {10, 50}
    assert "shares its sector" in taken.lost[0].reason


def test_the_last_of_several_entries_counts() -> None:
    taken = decide(table(Entry(10, 2000), Entry(10, 2010), Entry(10, 2020)))
    assert taken.places == {10: 2020}
    assert "the last one counts" in taken.warnings[0]
    same = decide(table(Entry(10, 2000), Entry(10, 2000)))
    assert same.places == {10: 2000}


def test_an_earlier_place_may_have_been_used() -> None:
    taken = decide(table(Entry(10, 2000), Entry(10, 2010), Entry(20, 2000)))
    assert lost_sectors(taken) == {20}
    never = decide(
        table(Entry(10, 2000, PENDING), Entry(10, 2010, PENDING), Entry(20, 2000)), pending="spare"
    )
    assert never.places == {10: 2010, 20: 2000}


@pytest.mark.parametrize("pending", [None, "main", "spare", "lost"])
@pytest.mark.parametrize("flags", [(PENDING, ACTIVE), (ACTIVE, PENDING)])
def test_entries_that_contradict_each_other_are_lost(
    flags: tuple[int, int], pending: str | None
) -> None:
    old = table(Entry(10, 2000, flags[0]), Entry(10, 2010, flags[1]))
    taken = decide(old, pending=pending)
    assert taken.places == {}
    assert lost_sectors(taken) == {10}


@pytest.mark.parametrize("flags", [(PENDING, ACTIVE), (ACTIVE, PENDING)])
def test_an_entry_that_is_repeated_with_its_place_was_used(flags: tuple[int, int]) -> None:
    assert decide(table(*(Entry(10, 2000, flag) for flag in flags))).places == {10: 2000}


def test_entries_that_may_never_have_been_used_need_a_decision() -> None:
    old = table(Entry(10, 2000, PENDING), Entry(20, 2001))
    with pytest.raises(Refused, match="1 entry of its table may never have been used") as caught:
        decide(old)
    for choice in migration.PENDING_CHOICES:
        assert f"migrate_pending: {choice}" in str(caught.value) or choice in str(caught.value)
    assert decide(old, pending="spare").places == {10: 2000, 20: 2001}
    stays = decide(old, pending="main")
    assert (stays.places, stays.lost) == ({20: 2001}, ())
    assert stays.chunks(CHUNK) == [2]
    lost = decide(old, pending="lost")
    assert (lost.places, lost_sectors(lost)) == ({20: 2001}, {10})
    for taken in (stays, lost):
        assert any("may never have been used" in warning for warning in taken.warnings)
    with pytest.raises(Refused, match="not possible"):
        decide(old, pending="both")


def test_a_pending_entry_whose_sector_is_lost_claims_its_place() -> None:
    old = table(Entry(10, 2000, PENDING), Entry(20, 2000))
    assert lost_sectors(decide(old, pending="lost")) == {10, 20}
    assert decide(old, pending="main").places == {20: 2000}


def test_a_larger_unit_takes_what_follows_too() -> None:
    old = table(Entry(16, 2000), Entry(192, 2100))
    taken = decide(old, unit_sectors=8)
    first = {16 + i: 2000 + i for i in range(8)}
    assert taken.places == {**first, **{192 + i: 2100 + i for i in range(5)}}
    overlapping = decide(table(Entry(16, 2000), Entry(64, 2003)), unit_sectors=8)
    assert lost_sectors(overlapping) == {19, 20, 21, 22, 23, 64, 65, 66, 67, 68}
    assert overlapping.places == {16: 2000, 17: 2001, 18: 2002, 69: 2008, 70: 2009, 71: 2010}
    with pytest.raises(Refused, match="no unit of 4096 bytes begins"):
        decide(table(Entry(17, 2000)), unit_sectors=8)
    edge = decide(table(Entry(16, 1276)), unit_sectors=8)
    assert lost_sectors(edge) == {16, 17, 18, 19}
    assert lost_sectors(decide(table(Entry(16, 2993)), unit_sectors=8)) == set(range(16, 24))
    with pytest.raises(Refused, match="not possible"):
        decide(old, block=8, unit_sectors=12)


def test_places_next_to_each_other_are_warned_of() -> None:
    close = decide(table(Entry(16, 2000), Entry(64, 2001)))
    assert "places of sectors 64 are so near" in close.warnings[-1]
    run = decide(table(Entry(16, 2000), Entry(17, 2001)))
    assert len(run.warnings) == 1, "what is a run on both is one I/O anyway"
    assert len(decide(table(Entry(16, 2000), Entry(64, 2008))).warnings) == 1


def test_large_blocks_are_taken_and_lost_as_a_whole() -> None:
    old = table(Entry(16, 2000), Entry(17, 2400), Entry(32, 2003), Entry(40, 1272), main=192)
    taken = decide(old, block=8)
    assert taken.places == {16 + i: 2000 + i for i in range(8)} or lost_sectors(taken) >= {16}
    assert lost_sectors(taken).issuperset(range(32, 48))
    assert any("no block of main begins" in warning for warning in taken.warnings)


def test_pieces_are_runs_of_one_source() -> None:
    taken = Migration({2: 50, 3: 51, 4: 60, 7: 70}, (Lost(5, 2, "gone"),), 100)
    assert taken.pieces(0, 10) == [
        Piece(0, 2),
        Piece(2, 2, 50),
        Piece(4, 1, 60),
        Piece(5, 2, None, True),
        Piece(7, 1, 70),
        Piece(8, 2),
    ]


class KernelTarget:
    """What the old target does with I/O of one sector once it was started on a table."""

    def __init__(self, old: KernelMetadata) -> None:
        self.metadata = old
        self.table = {entry.main_sector: entry.spare_sector for entry in old.remaps}
        self.spare: dict[int, tuple[int, int]] = {}
        self.main: dict[int, tuple[int, int]] = {}

    def write(self, sector: int, version: int) -> bool:
        place = self.table.get(sector)
        if place is None:
            self.main[sector] = (sector, version)
            return True
        if place >= self.metadata.spare_sectors:
            return False
        self.spare[place] = (sector, version)
        return True

    def write_metadata(self) -> None:
        for sector in range(1280):
            self.spare.pop(sector, None)


@given(
    st.lists(
        st.builds(
            Entry, st.integers(0, 12), st.sampled_from([0, 1279, 1280, 1281, 1300, 2999, 3000])
        ),
        max_size=12,
    ),
    st.lists(st.tuples(st.integers(0, 11), st.integers(1, 9)), max_size=30),
)
@example([Entry(1, 1300), Entry(2, 1300)], [(1, 1), (2, 2)])
@example([Entry(1, 1300), Entry(1, 1301)], [(1, 1)])
@settings(max_examples=300)
def test_what_the_old_target_wrote_is_found_or_lost(
    entries: list[Entry], writes: list[tuple[int, int]]
) -> None:
    """Whatever was written last to a sector is where it is looked for, or that is told as lost."""
    old = table(*entries, main=12)
    host = KernelTarget(old)
    last: dict[int, tuple[int, int]] = {}
    for sector, version in writes:
        if host.write(sector, version):
            last[sector] = (sector, version)
    host.write_metadata()
    taken = decide(old)
    lost = lost_sectors(taken)
    assert lost.isdisjoint(taken.places)
    assert set(taken.places) | lost == {e.main for e in entries if e.main < 12}
    for sector, written in last.items():
        if sector in taken.places:
            assert host.spare[taken.places[sector]] == written
        elif sector not in lost:
            assert host.main[sector] == written
    # Nothing is given up that surely has a place.
    counts = [*host.table.values()]
    for sector in lost:
        place = host.table[sector]
        shared = sum(entry.spare_sector == place for entry in old.remaps) > 1
        assert place < 1280 or place >= OLD_SECTORS or shared, counts


# On a kernel in memory

# 24: beyond the end; 40: in the metadata; 50 and 51: next to each other; 120 and 121: one place.
ENTRIES = (
    Entry(9, 1300),
    Entry(24, OLD_SECTORS + 5),
    Entry(40, 3),
    Entry(50, 2000),
    Entry(51, 1500),
    Entry(120, 1700),
    Entry(121, 1700),
    Entry(196, 2999),
)
LOST = {24, 40, 120, 121}


def kept(sector: int) -> bytes:
    """What the old spare has for a sector of main."""
    return content(sector, 7)


@dataclass
class Host:
    """A main, the spare of the kernel target, new spares, and what the target must show."""

    kernel: Kernel
    request: Request
    folder: Path
    lost: frozenset[int]
    places: dict[int, int]
    block: int = 1

    @property
    def main(self) -> Disk:
        return self.kernel.disks["/dev/main"]

    @property
    def old(self) -> Disk:
        return self.kernel.disks["/dev/old"]

    def engine(self, process: Process | None = None, step: Any = None) -> Engine:
        used = process or Process(self.kernel)
        return Engine(
            used.mapper,
            used.blocks,
            step,
            lock_dir=str(self.folder / "locks"),
            backup_dir=str(self.folder / "backup"),
        )

    def plan(self, engine: Engine | None = None, **changes: Any) -> Plan:
        request = replace(self.request, **changes)
        used = engine or self.engine()
        return plan_present(request, request_seen(used, request))

    def create(self, engine: Engine | None = None, **changes: Any) -> list[RemappedChunk]:
        used = engine or self.engine()
        return used.apply(self.plan(used, **changes))

    def clone(self) -> Host:
        """The host as it is now, with the backups that it has."""
        folder = Path(tempfile.mkdtemp(dir=self.folder.parent))
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return replace(self, kernel=self.kernel.clone(), folder=folder)

    def expected(self, sector: int) -> bytes | None:
        if sector in self.lost:
            return None
        return kept(sector) if sector in self.places else content(sector)

    def check_reads(self, why: str = "") -> None:
        """Each sector is as it was under the kernel target, or fails where that is lost."""
        devno = self.kernel.mapped[NAME].devno
        for sector in range(0, self.main.sectors, self.block):
            wanted = [self.expected(sector + i) for i in range(self.block)]
            try:
                found: bytes | None = self.kernel.read(devno, sector, self.block)
            except OSError:
                found = None
            whole = None if None in wanted else b"".join(part or b"" for part in wanted)
            assert found == whole, (sector, why)

    def check(self, why: str = "") -> None:
        self.check_reads(why)
        assert not self.plan().actions, why
        target = self.engine().require(NAME)
        lost = {s for i in target.metadata.lost for s in range(i.sector, i.sector + i.count)}
        assert lost == self.lost, why
        assert migration.migrated(target.metadata)


def make_host(
    folder: Path,
    spares: int = 1,
    entries: tuple[Entry, ...] = ENTRIES,
    on_error: str = "fail",
    block: int = 1,
    **changes: Any,
) -> Host:
    kernel = Kernel()
    sectors = SECTORS // block * block
    main = kernel.add_disk("main", sectors, block)
    main.fill(0, b"".join(content(sector) for sector in range(sectors)))
    old = kernel.add_disk("old", OLD_SECTORS, block)
    taken = decide(table(*entries, main=sectors), block, pending=changes.get("migrate_pending"))
    for sector, place in taken.places.items():
        old.fill(place, kept(sector))
    copy = Old(sectors, OLD_SECTORS, entries).pack()
    old_spare.write(old.fill, copy)
    size = minimum_spare_sectors(CHUNK, block) + 8192
    paths = tuple(kernel.add_disk(f"spare{index}", size, block).path for index in range(spares))
    request = Request(
        NAME, main.path, paths, CHUNK * SECTOR, on_error, migrate_from=old.path, **changes
    )
    # Each host has backups of its own.
    own = Path(tempfile.mkdtemp(dir=folder))
    return Host(kernel, request, own, frozenset(lost_sectors(taken)), dict(taken.places), block)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return make_host(tmp_path)


def kinds(plan: Plan) -> list[str]:
    return [action.kind for action in plan.actions]


CREATION = [
    "format_spare",
    "activate_spare",
    "migrate_chunks",
    "verify_migration",
    "create_target",
]


def test_a_target_shows_what_the_kernel_target_did(host: Host) -> None:
    assert host.lost == LOST
    before = [dict(disk.content) for disk in (host.main, host.old)]
    plan = host.plan()
    assert kinds(plan) == CREATION
    migrate = plan.actions[2].to_dict()
    assert migrate["device"] == "/dev/old"
    assert (migrate["remaps"], migrate["sectors"], migrate["chunks"]) == (8, 4, 6)
    assert {item["sector"] for item in migrate["lost"]} == {24, 40, 120}
    assert not host.kernel.mapped, "a plan changes nothing"
    chunks = host.engine().apply(plan)
    assert [chunk.lost for chunk in chunks] == [[]] * 6, "no more is lost than the plan says"
    host.check()
    target = host.engine().require(NAME)
    assert plan.after == plan_upkeep(target).after
    assert target.metadata.generation == 2
    assert [host.main.content, host.old.content] == before
    assert not host.main.cache
    assert not host.old.cache


def test_the_user_is_told_what_the_old_spare_is_good_for(tmp_path: Path) -> None:
    for entries, spoiled, lost in (
        ((Entry(9, 1300),), (), 0),
        ((Entry(9, 1300), Entry(10, 3)), (), 1),
        ((Entry(9, 1300), Entry(10, 3)), (1300,), 2),
    ):
        host = make_host(tmp_path, entries=entries)
        host.old.spoil(spoiled)
        plan = host.plan()
        text = describe_migration(plan, host.engine().apply(plan))
        assert "1 remapped sector of /dev/old" in text
        assert text.endswith("may be wiped.")
        assert (f" {lost} sector" in text) == bool(lost)


@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("spares", [1, 3])
@pytest.mark.parametrize("on_error", ["fail", "hold"])
def test_every_kind_of_target_can_be_migrated_to(
    tmp_path: Path, spares: int, block: int, on_error: str
) -> None:
    entries = (Entry(8, 1304), Entry(24, 8), Entry(48, 2000), Entry(56, 2008), Entry(184, 2992))
    host = make_host(tmp_path, spares, entries, on_error, block)
    with host.engine().healing():
        host.create()
        assert set(host.places) >= {8, 48, 56, 184}
        if on_error == "fail":
            host.check()
        assert not host.plan().actions


def test_a_target_without_remaps_can_be_migrated_to(tmp_path: Path) -> None:
    host = make_host(tmp_path, entries=())
    host.create()
    host.check()
    assert host.engine().require(NAME).metadata.extents == ()


def test_a_write_heals_what_was_lost(host: Host) -> None:
    host.create()
    devno = host.kernel.mapped[NAME].devno
    host.kernel.write(devno, 40, content(40, 9))
    assert host.kernel.read(devno, 40, 1) == content(40, 9)


def test_after_a_restart_the_old_spare_is_not_needed(host: Host) -> None:
    host.create()
    host.kernel.flush(host.kernel.mapped[NAME].devno)
    host.kernel.cut_power([])
    del host.kernel.disks["/dev/old"]
    assert kinds(host.plan()) == ["activate_spare", "create_target"]
    host.create()
    host.check()
    assert not host.plan(migrate_from=None).actions


def test_main_is_salvaged_and_its_losses_are_told(host: Host) -> None:
    host.main.spoil([10, 11])
    host.main.spoil([12], failures=2)
    # What main has at a remapped sector is not read, so that it is bad there costs nothing.
    host.main.spoil([9, 50, 196])
    chunks = host.create()
    assert [item for chunk in chunks for item in chunk.lost] == [(10, 2)]
    replace(host, lost=host.lost | {10, 11}).check()


def test_a_sector_that_the_old_spare_cannot_read_is_lost(host: Host) -> None:
    host.old.spoil([1300])
    chunks = host.create()
    assert [item for chunk in chunks for item in chunk.lost] == [(9, 1)]
    after = replace(host, lost=host.lost | {9})
    after.check()
    # Main's old data must not show through, not after another remap or a restart either.
    after.engine().remap(NAME, [(9, 1)])
    after.check()


@pytest.mark.parametrize("path", ["/dev/main", "/dev/old"])
def test_a_disk_that_fails_everywhere_is_not_a_list_of_lost_sectors(host: Host, path: str) -> None:
    disk = host.kernel.disks[path]
    plan = host.plan()
    disk.spoil(range(disk.sectors))
    with pytest.raises(DmRemapError, match="the disk or its path"):
        host.engine().apply(plan)
    assert NAME not in host.kernel.mapped
    disk.bad.clear()
    disk.stable_bad.clear()
    host.create()
    host.check()


def test_old_data_on_a_new_spare_does_not_appear_in_lost_sectors(host: Host) -> None:
    spare = host.kernel.disks["/dev/spare0"]
    for sector in range(16384, spare.sectors):
        spare.content[sector] = spare.stable[sector] = b"x" * SECTOR
    host.create()
    host.check()


def test_a_bad_place_on_a_new_spare_is_passed_over(tmp_path: Path) -> None:
    host = make_host(tmp_path, spares=2)
    predicted = host.plan().after["table"]
    first = host.kernel.disks["/dev/spare0"]
    geometry = plan_geometry(first.sectors, CHUNK, 1)
    first.unwritable = {geometry.data_start + 3}
    first.heals = False
    host.create()
    host.check()
    assert (
        readable_table(
            host.engine().require(NAME).metadata,
            {0: None, 1: None},  # type: ignore[dict-item]
        )
        != predicted
    )


def test_chunks_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    host = make_host(tmp_path)
    chunk, spare = 2048, host.kernel.disks["/dev/spare0"]
    spare.sectors = minimum_spare_sectors(chunk, 1)
    geometry = plan_geometry(spare.sectors, chunk, 1)
    free = pool.capacity(geometry, 0, ()).free
    host.main.sectors = (free + 2) * chunk
    for count in (free, free + 1):
        entries = [Entry(number * chunk, 1300 + number) for number in range(count)]
        old_spare.write(host.old.fill, Old(host.main.sectors, OLD_SECTORS, entries).pack())
        if count == free:
            assert host.plan(chunk_bytes=chunk * SECTOR).actions
    with pytest.raises(Refused, match="free chunk"):
        host.plan(chunk_bytes=chunk * SECTOR)
    assert not spare.content


# What is refused


def refused(host: Host, text: str, **changes: Any) -> None:
    before = {path: dict(disk.content) for path, disk in host.kernel.disks.items()}
    with pytest.raises(Refused, match=text):
        host.plan(**changes)
    assert {path: disk.content for path, disk in host.kernel.disks.items()} == before


def test_what_cannot_be_migrated_is_refused(tmp_path: Path) -> None:
    host = make_host(tmp_path)
    refused(host, "is the spare to be migrated from", spares=("/dev/spare0", "/dev/old"))
    refused(host, "no such device", migrate_from="/dev/none")
    refused(host, "is the main itself", migrate_from="/dev/main")
    refused(host, "no valid copy", migrate_from=host.kernel.add_disk("other", 4000).path)
    refused(host, "cannot be 100 bytes", migrate_unit=100)
    refused(host, "says how to migrate, but not from where", migrate_from=None, migrate_unit=512)
    refused(host, "no unit of 4096 bytes begins", migrate_unit=4096)
    refused(host, "is not empty: kernel dm-remap-v4 spare", migrate_from=None, spares=("/dev/old",))
    host.main.sectors += 1
    refused(host, "but the main that /dev/old was a spare for had 197")
    host.main.sectors -= 1
    host.old.sectors += 1
    refused(host, "its metadata is of a spare with 3000")
    host.old.sectors -= 1
    host.old.block = 8
    refused(host, "has logical blocks of 4096 bytes")
    host.old.block = 1
    for disk in (host.old, host.main):
        disk.mounted = "/somewhere"
        refused(host, "in use")
        disk.mounted = ""
    host.create()
    host.check()


def test_an_old_spare_that_is_read_only_will_do(host: Host) -> None:
    host.old.read_only = True
    host.create()
    host.check()


def test_pending_remaps_need_a_decision(tmp_path: Path) -> None:
    entries = (Entry(9, 1300, PENDING), Entry(50, 2000))
    undecided = make_host(tmp_path, entries=entries, migrate_pending="spare")
    refused(undecided, "may never have been used", migrate_pending=None)
    for pending, places, lost in (
        ("spare", {9, 50}, set()),
        ("main", {50}, set()),
        ("lost", {50}, {9}),
    ):
        host = make_host(tmp_path, entries=entries, migrate_pending=pending)
        assert (set(host.places), host.lost) == (places, lost)
        host.create()
        host.check()


def test_a_target_that_was_not_migrated_gets_nothing_later(host: Host) -> None:
    host.create(migrate_from=None)
    refused(host, "exists already and was not migrated")
    host.kernel.cut_power([])
    refused(host, "exists already and was not migrated")


# Verification


def spoil_after(host: Host, where: str, spoil: Callable[[Kernel], None]) -> None:
    def step(name: str) -> None:
        if name == where:
            spoil(host.kernel)

    with pytest.raises(DmRemapError, match="so it is not activated"):
        host.create(host.engine(step=step))
    assert NAME not in host.kernel.mapped
    host.create()
    host.check()


def test_a_spare_that_gives_back_other_data_is_found_before_the_target_is_active(
    host: Host,
) -> None:
    def spoil(kernel: Kernel) -> None:
        device = kernel.mapped[f"{NAME}-spare0"]
        kernel.write(device.devno, place_of(host, 9), b"y" * SECTOR)

    spoil_after(host, "migrate_chunks", spoil)


def test_a_lost_sector_that_reads_is_found_before_the_target_is_active(host: Host) -> None:
    def heal(kernel: Kernel) -> None:
        device = kernel.mapped[f"{NAME}-spare0"]
        kernel.write(device.devno, place_of(host, 40), bytes(SECTOR))

    spoil_after(host, "migrate_chunks", heal)


def place_of(host: Host, sector: int) -> int:
    """Where a sector was put on the first spare, once generation 1 is there."""
    plan = host.plan(migrate_from="/dev/old")
    assert plan.metadata is not None
    geometry = geometry_of(plan.metadata, 0)
    chunks = [1, 3, 5, 6, 15, 24]
    placed = choose_places(plan.metadata, chunks, {0: geometry}, ())
    return placed[chunks.index(sector // CHUNK)].physical * CHUNK + sector % CHUNK


# Crashes


def labels(crashes: list[tuple[str, Host]]) -> list[str]:
    return [label.partition(": ")[2] for label, _host in crashes]


@pytest.mark.parametrize(
    ("spares", "on_error", "power_cut"),
    short_form(
        [
            (spares, on_error, power_cut)
            for spares, on_error in ((1, "fail"), (2, "fail"), (1, "hold"))
            for power_cut in (False, True)
        ],
        always=[(1, "fail", True), (2, "fail", False), (1, "hold", True)],
    ),
)
def test_a_crash_anywhere_in_a_migration(
    tmp_path: Path,
    spares: int,
    on_error: str,
    power_cut: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever is left, the target shows old data of main at no time, and the task ends well."""
    monkeypatch.setattr(plan_spares, "DRAIN_CHUNKS", 4)
    host = make_host(tmp_path, spares, on_error=on_error)
    main, old = dict(host.main.content), dict(host.old.content)
    crashes: list[tuple[str, Host]] = []

    def remember(label: str) -> None:
        crashes.append((f"{len(crashes)}: {label}", host.clone()))

    process = Process(host.kernel, lambda call: remember(f"before {call}"))
    with host.engine().healing():
        host.create(host.engine(process, lambda name: remember(f"after {name}")))
        assert len(crashes) > 60
        assert not any("/dev/old" in label or "/dev/main" in label for label, _host in crashes)
        begun = set()
        # From here on a copy may say that all was compared.
        verifying = labels(crashes).index("after migrate_chunks")
        for number, (label, left) in enumerate(crashes):
            for survivors in survivals(left.kernel.volatile(), label) if power_cut else [[]]:
                again = left.clone()
                with again.engine().healing():
                    if power_cut:
                        again.kernel.cut_power(survivors)
                    device = again.kernel.mapped.get(NAME)
                    if device and device.live and on_error == "fail":
                        again.check_reads(label)
                    anew = "migrate_chunks" in kinds(again.plan())
                    begun.add(anew)
                    assert anew or number > verifying, label
                    again.create()
                    assert not again.plan().actions, label
                    if on_error == "fail":
                        again.check(label)
                    assert [again.main.content, again.old.content] == [main, old], label
        assert begun == {False, True}


def test_without_the_old_spare_an_unfinished_migration_is_not_activated(host: Host) -> None:
    def stop(name: str) -> None:
        if name == "migrate_chunks":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        host.create(host.engine(step=stop))
    host.kernel.cut_power([])
    refused(host, "was being migrated", migrate_from=None)
    refused(host, "no such device", migrate_from="/dev/none")
    refused(host, "was being migrated", migrate_from=None, wipe=True)
    assert kinds(host.plan()) == ["wipe_spare", *CREATION]
    spare = host.kernel.disks["/dev/spare0"]
    start = bytes(spare.content.get(2, bytes(SECTOR)))
    spare.fill(2, FILESYSTEM_MAGIC.ljust(SECTOR, b"\0"))
    refused(host, "was used for ext4 since")
    spare.fill(2, start)
    # What another device holds is not erased for it.
    other = host.kernel.add_disk("spare1", spare.sectors)
    other.fill(2, FILESYSTEM_MAGIC.ljust(SECTOR, b"\0"))
    refused(host, "is not empty: ext4", spares=("/dev/spare0", "/dev/spare1"))
    anew = host.plan(migrate_from=None, wipe=True, discard_remaps=True)
    assert "migrate_chunks" not in kinds(anew)
    host.create()
    host.check()
    assert OWN_SIGNATURE in Process(host.kernel).blocks.signatures("/dev/spare0")


def test_a_spare_alone_is_not_proof_that_a_migration_has_not_ended(tmp_path: Path) -> None:
    """A spare that missed the last generation would have its data in use erased."""
    host = make_host(tmp_path, spares=2)
    behind: list[Disk] = []

    def remember(name: str) -> None:
        if name == "migrate_chunks":
            behind.append(host.kernel.disks["/dev/spare1"].clone())

    host.create(host.engine(step=remember))
    host.kernel.cut_power([])
    host.kernel.disks["/dev/spare1"] = behind[0]
    other = host.kernel.add_disk("other", behind[0].sectors)
    for spares in (("/dev/spare1",), ("/dev/spare1", other.path)):
        refused(host, "not all of them are given", spares=spares)
    host.create()
    host.check()


def test_one_call_that_fails_anywhere_in_a_migration(tmp_path: Path) -> None:
    calls: list[str] = []
    counted = make_host(tmp_path, spares=2)
    counted.create(counted.engine(Process(counted.kernel, calls.append)))

    def fail(name: str) -> None:
        raise OSError(5, f"failed: {name}")

    for number in range(len(calls)):
        host = make_host(tmp_path, spares=2)
        process = Process(host.kernel, numbered(number, fail))
        failed = False
        try:
            host.create(host.engine(process))
        except (DmRemapError, OSError):
            failed = True
        device = host.kernel.mapped.get(NAME)
        if device and device.live:
            host.check_reads(calls[number])
        assert failed or device, calls[number]
        host.create()
        host.check_reads(calls[number])
        assert not host.plan().actions, calls[number]


@pytest.mark.parametrize("seed", range(25))
def test_random_tables(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    places = [*range(1270, 1290), *range(1400, 1600), *range(2990, 3005)]
    entries = tuple(
        Entry(chance.randrange(SECTORS + 3), chance.choice(places))
        for _number in range(chance.randrange(60))
    )
    host = make_host(tmp_path, spares=chance.choice((1, 2)), entries=entries)
    host.create()
    host.check()
