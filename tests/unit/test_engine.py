# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The engine on a kernel in memory: what it saves, what it never invents, and every crash point."""

from __future__ import annotations

import contextlib
import copy
import errno
import itertools
import os
import random
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from dm_remap import committing, copies, extents, files
from dm_remap.committing import host_id
from dm_remap.devmapper import Segment
from dm_remap.engine import Engine
from dm_remap.errors import DmRemapError, Refused, StaleGeneration
from dm_remap.format import geometry_of, minimum_spare_sectors
from dm_remap.moved import Moved, RemapReport
from dm_remap.moving import at_once
from dm_remap.placing import Route
from dm_remap.plan import Plan
from dm_remap.plan_remap import plan_remap
from dm_remap.plan_removal import plan_absent
from dm_remap.plan_upkeep import plan_upkeep
from dm_remap.planner import plan_present
from dm_remap.request import Request
from dm_remap.salvage import Patience
from dm_remap.target import ActiveTarget
from tests.parameters import short_form
from tests.unit.fake_kernel import (
    FILESYSTEM_MAGIC,
    SECTOR,
    Blocked,
    Disk,
    Kernel,
    Killed,
    Process,
    Volatile,
)

NAME = "guarded"
CHUNK = 8
# The last chunk has 5 sectors.
SECTORS = 24 * CHUNK + 5
QUICK = Patience(retries=2, backoff=0)


def content(sector: int, version: int = 0) -> bytes:
    return (sector + 1).to_bytes(4, "little") * 64 + version.to_bytes(4, "little") * 64


@dataclass
class App:
    """What an application wrote block by block, and so what it may find.

    Each block has its versions, of which None is a read error; ``acknowledged`` and ``durable``
    are the newest version that is surely there, and that survives a power cut.
    """

    block: int
    versions: dict[int, list[bytes | None]] = field(default_factory=dict)
    acknowledged: dict[int, int] = field(default_factory=dict)
    durable: dict[int, int] = field(default_factory=dict)
    waiting: dict[int, tuple[int, int]] = field(default_factory=dict)

    def clone(self) -> App:
        return copy.deepcopy(self)

    def write(self, kernel: Kernel, sector: int, durable: bool = False) -> None:
        """Write the block at ``sector`` unless an earlier write of it still waits."""
        self.settle(kernel)
        sector -= sector % self.block
        if any(sector == waits for waits, _version in self.waiting.values()):
            return
        known = self.versions[sector]
        data = b"".join(content(sector + i, len(known)) for i in range(self.block))
        known.append(data)
        number = kernel.submit(NAME, sector, data, durable)
        self.waiting[number] = (sector, len(known) - 1)
        self.settle(kernel)

    def settle(self, kernel: Kernel) -> None:
        for number in [number for number in self.waiting if number in kernel.completed]:
            sector, version = self.waiting.pop(number)
            self.acknowledged[sector] = version

    def flush(self, kernel: Kernel) -> None:
        self.settle(kernel)
        kernel.flush(kernel.mapped[NAME].devno)
        self.durable = dict(self.acknowledged)

    def allowed(self, sector: int, power_cut: bool) -> list[bytes | None]:
        versions = self.versions[sector]
        if power_cut:
            return versions[self.durable.get(sector, 0) :]
        return [versions[self.acknowledged.get(sector, 0)]]


@dataclass
class Scene:
    """A host with a main, spares and an application that uses the target."""

    kernel: Kernel
    app: App
    request: Request
    folder: Path

    @property
    def main(self) -> Disk:
        return self.kernel.disks[self.request.main]

    @property
    def spares(self) -> list[Disk]:
        return [self.kernel.disks[path] for path in self.request.spares]

    def engine(self, process: Process | None = None, step: Any = None) -> Engine:
        used = process or Process(self.kernel)
        return Engine(
            mapper=used.mapper,
            blocks=used.blocks,
            step=step,
            lock_dir=str(self.folder / "locks"),
            backup_dir=str(self.folder / "backup"),
            errors=lambda: self.kernel.trace,
        )

    def spoil(self, *sectors: int, failures: int | None = None) -> None:
        """Make sectors of main bad; for ever means that the application reads errors there."""
        self.main.spoil(sectors, failures)
        for sector in sectors if failures is None else ():
            self.app.versions[sector - sector % self.app.block] = [None]

    def plan(self, engine: Engine | None = None) -> Plan:
        used = engine or self.engine()
        seen = used.see(self.request.name, self.request.main, self.request.spares)
        return plan_present(self.request, seen)

    def create(self, engine: Engine | None = None) -> list[str]:
        used = engine or self.engine()
        plan = self.plan(used)
        used.apply(plan)
        return [action.kind for action in plan.actions]

    def remove(
        self, discard: bool = True, engine: Engine | None = None, spares: Sequence[str] = ()
    ) -> None:
        used = engine or self.engine()
        seen = used.see(NAME, None, spares)
        used.apply(plan_absent(NAME, seen.target, seen, discard))

    def remap(self, *ranges: tuple[int, int], engine: Engine | None = None) -> RemapReport:
        return (engine or self.engine()).remap(NAME, ranges, patience=QUICK)

    def return_to_main(self, *ranges: tuple[int, int], engine: Engine | None = None) -> RemapReport:
        return (engine or self.engine()).return_to_main(NAME, ranges, patience=QUICK)

    def move(self, index: int, engine: Engine | None = None) -> Moved:
        """Move all chunks of a spare to others."""
        used = engine or self.engine()
        target = used.require(NAME)
        chunks = [
            chunk
            for extent in target.metadata.extents
            if extent.spare == index
            for chunk in range(extent.logical, extent.logical + extent.length)
        ]
        with used.opened(target) as disks:
            route = Route(avoid=frozenset({index}))
            return at_once(used.moving(target, disks, chunks, QUICK, route=route))

    def read(self, sector: int) -> bytes | None:
        try:
            return self.kernel.read(self.kernel.mapped[NAME].devno, sector, self.app.block)
        except OSError:
            return None
        except Blocked as blocked:
            if blocked.at.name != f"{NAME}-hold":
                raise
            # The error is held; what comes after it must not be.
            engine = self.engine()
            engine.release(engine.require(NAME))
            return None

    def generation(self) -> int:
        return self.engine().require(NAME).metadata.generation

    def at(self, kernel: Kernel, app: App) -> Scene:
        return replace(self, kernel=kernel, app=app)

    def check_blocks(self, power_cut: bool = False, why: str = "") -> None:
        """All blocks read as they may."""
        for sector in range(0, self.main.sectors, self.app.block):
            assert self.read(sector) in self.app.allowed(sector, power_cut), (sector, why)

    def check(self, power_cut: bool = False, why: str = "") -> None:
        """All blocks read as they may, nothing waits, and nothing is left to be planned."""
        self.app.settle(self.kernel)
        assert not self.app.waiting, why
        assert self.engine().require(NAME).frozen is None, why
        for device in self.kernel.mapped.values():
            assert not device.suspended, (device.name, why)
            assert not device.inactive, (device.name, why)
        self.check_blocks(power_cut, why)
        assert not self.plan().actions, why
        target = self.engine().require(NAME)
        lost = [(item.sector, item.count) for item in target.metadata.lost]
        assert all(self.is_spared(target, sector) for sector, _count in lost), why

    def is_spared(self, target: ActiveTarget, sector: int) -> bool:
        return extents.find(target.metadata.extents, sector // CHUNK) is not None


def make_scene(
    folder: Path, spares: int = 1, block: int = 1, sectors: int = SECTORS, on_error: str = "fail"
) -> Scene:
    # It is another host, which has no backups.
    shutil.rmtree(folder / "backup", ignore_errors=True)
    kernel = Kernel()
    sectors = sectors // block * block
    main = kernel.add_disk("main", sectors, block)
    main.fill(0, b"".join(content(sector) for sector in range(sectors)))
    # Larger than the smallest, whose first chunks are under the far middle copy.
    size = minimum_spare_sectors(CHUNK, block) + 8192
    paths = tuple(kernel.add_disk(f"spare{index}", size, block).path for index in range(spares))
    app = App(block)
    for sector in range(0, sectors, block):
        app.versions[sector] = [b"".join(content(sector + i) for i in range(block))]
    request = Request(NAME, main.path, paths, chunk_bytes=CHUNK * SECTOR, on_error=on_error)
    return Scene(kernel, app, request, folder)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return make_scene(tmp_path)


@pytest.fixture
def target(scene: Scene) -> Scene:
    scene.create()
    return scene


def create_held(scene: Scene) -> list[str]:
    """Create the target on a host where the daemon runs."""
    with scene.engine().healing():
        return scene.create()


# Life of a target


@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("spares", [1, 3])
def test_creation_remap_and_removal(tmp_path: Path, spares: int, block: int) -> None:
    scene = make_scene(tmp_path, spares, block)
    kinds = scene.create()
    assert kinds == (
        ["format_spare"] * spares
        + ["activate_spare"] * spares
        + ["commit_metadata", "create_target"]
    )
    scene.check()
    before = dict(scene.main.content)
    scene.spoil(16)
    report = scene.remap((16, block))
    assert report.lost == [(16, block)]
    assert report.recovered == CHUNK - block
    scene.check()
    assert scene.generation() == 2
    assert scene.main.content == before, "nothing is ever written to main but by the application"
    with pytest.raises(Refused, match="data is on its spares only"):
        scene.remove(discard=False)
    scene.remove()
    assert scene.kernel.mapped == {}
    assert all(s.content.get(0, bytes(SECTOR)) == bytes(SECTOR) for s in scene.spares)


def test_activation_after_a_clean_restart(target: Scene) -> None:
    target.spoil(33)
    target.remap((32, 1))
    target.app.flush(target.kernel)
    target.kernel.cut_power(target.kernel.volatile())
    assert target.create() == ["activate_spare", "create_target"]
    target.check(power_cut=True)
    assert target.generation() == 2


def test_a_target_that_is_in_use_stays(target: Scene) -> None:
    process = Process(target.kernel)
    with process.blocks.BlockDevice(f"/dev/mapper/{NAME}"), pytest.raises(Refused, match="in use"):
        target.remove()
    target.check()


def test_a_device_of_something_else_keeps_its_name(scene: Scene) -> None:
    scene.kernel.insert(NAME, "LVM-something")
    scene.kernel.load(NAME, [Segment(0, 8, "error", "")])
    scene.kernel.resume(NAME)
    with pytest.raises(Refused, match="of something else"):
        scene.plan()
    assert scene.engine().target_names() == []


def test_an_unknown_target_is_refused(scene: Scene) -> None:
    with pytest.raises(Refused, match="no active target"):
        scene.remap((0, 1))


def test_a_missing_device_is_refused(scene: Scene) -> None:
    missing = replace(scene.request, spares=("/dev/none",))
    with pytest.raises(DmRemapError, match="no such device"):
        scene.engine().see(missing.name, missing.main, missing.spares)


# One remap


def test_a_readable_chunk_moves_with_its_data(target: Scene) -> None:
    report = target.remap((40, 1))
    assert (report.recovered, report.lost, report.generation) == (CHUNK, [], 2)
    chunk = report.chunks[0]
    assert (chunk.chunk, chunk.start, chunk.count) == (5, 40, CHUNK)
    assert (chunk.recovered_first_read, chunk.recovered_on_retry) == (CHUNK, 0)
    # From now on main may do what it likes there.
    target.main.fill(40, bytes(CHUNK * SECTOR))
    target.check()


def test_a_weak_sector_is_saved(target: Scene) -> None:
    # It fails as a part of 8 and of 2 sectors, alone, and on one retry.
    target.spoil(43, failures=4)
    report = target.remap((43, 1))
    chunk = report.chunks[0]
    assert (chunk.recovered_first_read, chunk.recovered_on_retry) == (CHUNK - 1, 1)
    assert report.lost == []
    target.check()


def test_lost_weak_and_good_sectors_of_one_chunk(target: Scene) -> None:
    target.spoil(40, 46, 47)
    target.spoil(43, failures=4)
    report = target.remap((40, 8))
    assert report.lost == [(40, 1), (46, 2)]
    assert report.recovered == 5
    target.check()
    lost = target.engine().require(NAME).metadata.lost
    assert [(item.sector, item.count) for item in lost] == [(40, 1), (46, 2)]


def test_a_chunk_without_a_readable_sector(target: Scene) -> None:
    target.spoil(*range(80, 88))
    assert target.remap((80, 8)).lost == [(80, 8)]
    target.check()


def test_writing_a_lost_sector_heals_it(target: Scene) -> None:
    target.spoil(41)
    target.remap((41, 1))
    assert target.read(41) is None
    target.app.write(target.kernel, 41)
    assert target.read(41) == content(41, 1)
    target.check()


def test_the_short_last_chunk(target: Scene) -> None:
    target.spoil(SECTORS - 1)
    report = target.remap((SECTORS - 1, 1))
    assert report.chunks[0].count == 5
    assert report.lost == [(SECTORS - 1, 1)]
    target.check()


def test_many_chunks_are_one_generation(target: Scene) -> None:
    target.spoil(8, 50, SECTORS - 2)
    report = target.remap((8, 24), (50, 1), (SECTORS - 2, 1))
    assert [chunk.chunk for chunk in report.chunks] == [1, 2, 3, 6, 24]
    assert report.generation == 2
    assert report.lost == [(8, 1), (50, 1), (SECTORS - 2, 1)]
    target.check()


def test_every_chunk_can_be_remapped(target: Scene) -> None:
    target.spoil(0, 100)
    target.remap((0, SECTORS))
    target.main.dead = True
    for sector in range(SECTORS):
        assert target.read(sector) in target.app.allowed(sector, power_cut=False)
    assert target.remap((5, 1)).chunks == []


def test_a_second_remap_of_the_same_chunk_does_nothing(target: Scene) -> None:
    target.remap((40, 1))
    writes: list[str] = []
    report = target.remap((40, 8), engine=target.engine(Process(target.kernel, writes.append)))
    assert (report.generation, report.chunks) == (2, [])
    assert writes == []


def test_remaps_of_neighbours_become_one_extent(target: Scene) -> None:
    for chunk in (3, 4, 5):
        target.remap((chunk * CHUNK, 1))
    (extent,) = target.engine().require(NAME).metadata.extents
    assert (extent.logical, extent.length) == (3, 3)
    target.check()


def test_an_expected_generation_that_is_past_changes_nothing(target: Scene) -> None:
    target.remap((40, 1))
    writes: list[str] = []
    engine = target.engine(Process(target.kernel, writes.append))
    with pytest.raises(StaleGeneration, match="at generation 2, not 1"):
        engine.remap(NAME, [(80, 1)], expected_generation=1)
    assert writes == []
    assert engine.remap(NAME, [(80, 1)], expected_generation=2).generation == 3


@pytest.mark.parametrize("wrong", [(-1, 1), (SECTORS, 1), (0, SECTORS + 1), (4, 0)])
def test_sectors_beside_the_target_change_nothing(target: Scene, wrong: tuple[int, int]) -> None:
    writes: list[str] = []
    with pytest.raises(Refused, match="not on the target"):
        target.remap(wrong, engine=target.engine(Process(target.kernel, writes.append)))
    assert writes == []


def test_policies_change_on_an_active_target_and_in_an_activation(tmp_path: Path) -> None:
    target = make_scene(tmp_path, spares=2)
    target.create()
    target.spoil(41)
    target.remap((40, 1))
    balanced = replace(target, request=replace(target.request, allocation="balanced"))
    assert balanced.create() == ["update_config"]
    assert balanced.create() == []
    balanced.check()
    report = balanced.remap((80, 1))
    assert [chunk.spare for chunk in report.chunks] == [1]
    assert report.generation == 4
    balanced.app.flush(balanced.kernel)
    balanced.kernel.cut_power([])
    early = replace(balanced, request=replace(balanced.request, critical=90, warn=1))
    assert early.create() == ["activate_spare"] * 2 + ["create_target", "update_config"]
    early.check(power_cut=True)
    config = early.engine().require(NAME).metadata.config
    assert config["allocation"] == "balanced"
    assert config["thresholds"] == {"warn": 1, "critical": 90}
    names = [path.name for path in (early.folder / "backup").glob("*/*")]
    assert f"{5:020d}.slot" in names


def test_a_place_that_will_not_do_is_replaced_as_the_policy_has_it(tmp_path: Path) -> None:
    """The sick spare is not used, though it is the first one."""
    target = make_scene(tmp_path, spares=2)
    target.request = replace(target.request, allocation="health")
    target.create()
    engine = target.engine()
    old = engine.require(NAME).metadata
    sick = old.successor(1, health={"spares": {old.config["spares"][0]["uuid"]: {"score": 0}}})
    with contextlib.ExitStack() as stack:
        blocks = Process(target.kernel).blocks
        members = {
            index: stack.enter_context(blocks.BlockDevice(path, writable=True))
            for index, path in enumerate(target.request.spares)
        }
        copies.commit(members, old, sick)
    geometry = geometry_of(sick, 1)
    target.spares[1].unwritable = set(range(geometry.chunk_sector(0), geometry.chunk_sector(1)))
    report = target.remap((40, 1))
    assert [(chunk.spare, chunk.spare_chunk) for chunk in report.chunks] == [(1, 1)]
    target.check()


def test_backups_are_kept_of_every_generation(target: Scene) -> None:
    for chunk in range(20):
        target.remap((chunk * CHUNK, 1))
    (folder,) = (target.folder / "backup").iterdir()
    kept = sorted(path.name for path in folder.iterdir())
    assert kept == [f"{generation:020d}.slot" for generation in range(6, 22)]


def test_metadata_names_the_host_by_a_hash(target: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    assert target.engine().require(NAME).metadata.host_id == host_id()

    def missing() -> uuid.UUID:
        raise FileNotFoundError

    monkeypatch.setattr(committing, "hashed_machine_id", missing)
    target.remap((40, 1))
    assert target.engine().require(NAME).metadata.host_id == uuid.UUID(int=0)


# Disks that fail


@pytest.mark.parametrize("code", [errno.EIO, errno.ENODATA])
def test_a_dead_disk_is_not_a_chunk_of_lost_sectors(target: Scene, code: int) -> None:
    target.main.dead, target.main.code = True, code
    with pytest.raises(DmRemapError, match="everywhere"):
        target.remap((40, 1))
    target.main.dead = False
    assert target.generation() == 1
    target.check()


def test_a_disk_that_is_gone_is_not_a_chunk_of_lost_sectors(target: Scene) -> None:
    target.main.dead, target.main.code = True, errno.ENXIO
    with pytest.raises(DmRemapError, match="not a bad block"):
        target.remap((40, 1))
    target.main.dead = False
    target.check()


def test_old_data_in_a_spares_journal_does_not_appear_in_lost_sectors(target: Scene) -> None:
    """A host that goes off without a suspend leaves it there; each activation replays it."""

    def restart() -> None:
        target.app.flush(target.kernel)
        target.kernel.cut_power(target.kernel.volatile())
        target.create()

    target.remap((40, CHUNK))
    restart()
    target.return_to_main((40, CHUNK))
    # With nothing to be written, nothing else would renew the journal.
    target.spoil(*range(80, 80 + CHUNK))
    report = target.remap((80, CHUNK))
    assert report.chunks[0].spare_chunk == 0, "the same place"
    assert report.lost == [(80, CHUNK)]
    target.check()
    restart()
    target.check(power_cut=True)


def test_old_data_on_a_spare_does_not_appear_in_lost_sectors(target: Scene) -> None:
    """A remap that was killed left valid blocks on spare chunks; lost sectors need empty ones."""
    process = Process(target.kernel)

    def step(name: str) -> None:
        if name == "data_flushed":
            process.kill()

    with pytest.raises(Killed):
        target.remap((0, 8 * CHUNK), engine=target.engine(process, step))
    target.spoil(83)
    report = target.remap((83, 1))
    assert report.lost == [(83, 1)]
    assert report.chunks[0].spare_chunk == 0, "its old data was made unreadable"
    target.check()


def test_a_lost_sector_reads_as_an_error_on_a_target_made_anew(target: Scene) -> None:
    """The tags of the first target's life would make its old data valid in the second."""
    assert target.remap((40, 1)).chunks[0].spare_chunk == 0
    target.remove()
    target.create()
    target.spoil(43)
    report = target.remap((43, 1))
    assert report.chunks[0].spare_chunk == 0
    assert report.lost == [(43, 1)]
    assert target.read(43) is None
    target.check()


def test_a_spare_that_cannot_be_written_leaves_the_work_to_another(tmp_path: Path) -> None:
    scene = make_scene(tmp_path, spares=2)
    scene.create()
    geometry = geometry_of(scene.engine().require(NAME).metadata, 0)
    scene.spares[0].unwritable = set(range(geometry.data_start, geometry.far_middle))
    scene.spoil(41)
    report = scene.remap((40, 1), (80, 1))
    assert [chunk.spare for chunk in report.chunks] == [1, 1]
    assert report.lost == [(41, 1)]
    scene.check()


@pytest.mark.parametrize("setting", [{"shim": "raid"}, {"allocation": "balanced"}])
def test_settings_wait_for_a_lost_spare_with_newer_metadata(
    tmp_path: Path, setting: dict[str, str]
) -> None:
    """A shim needs a table, and that of the older metadata would show main's old data."""
    scene = make_scene(tmp_path, spares=2)
    scene.create()
    first, second = scene.spares
    second.unwritable = set(range(second.sectors))
    scene.remap((41, 1))
    second.unwritable = set()
    first.dead = True
    request, engine = replace(scene.request, degraded=True, **setting), scene.engine()
    seen = engine.see(NAME, request.main, request.spares, degraded=True)
    with pytest.raises(Refused, match="another table than generation 1 says"):
        plan_present(request, seen)
    plan_present(replace(scene.request, degraded=True), seen)
    first.dead = False
    assert scene.create() == ["repair_metadata"]
    scene.check()


def test_a_spare_whose_tag_area_was_overwritten_is_not_formatted_anew(target: Scene) -> None:
    """The kernel does that where it finds zeros; what only the journal had would be old again."""
    target.remap((40, 1))
    geometry = geometry_of(target.engine().require(NAME).metadata, 0)
    target.kernel.cut_power(target.kernel.volatile())
    spare = target.spares[0]
    kept = spare.read(geometry.tag_start, 1)
    spare.fill(geometry.tag_start, bytes(SECTOR))
    with pytest.raises(DmRemapError, match="its tag area was overwritten"):
        target.create()
    assert spare.read(geometry.tag_start, 1) == bytes(SECTOR)
    spare.fill(geometry.tag_start, kept)
    target.create()
    target.check()


def test_a_bad_place_on_a_spare_is_passed_over(target: Scene) -> None:
    geometry = geometry_of(target.engine().require(NAME).metadata, 0)
    target.spares[0].unwritable = {geometry.chunk_sector(0) + 3}
    assert target.remap((40, 1)).chunks[0].spare_chunk == 1
    target.check()


def test_without_a_spare_that_can_be_written_nothing_changes(target: Scene) -> None:
    geometry = geometry_of(target.engine().require(NAME).metadata, 0)
    target.spares[0].unwritable = set(range(geometry.data_start, geometry.far_middle))
    with pytest.raises(DmRemapError, match="cannot be written") as caught:
        target.remap((40, 1))
    assert caught.value.device == target.spares[0].path
    assert target.generation() == 1
    target.check()


def test_a_spare_that_cannot_be_flushed_never_leaves_writes_waiting(target: Scene) -> None:
    """Neither mapping is safe then, so the chunk fails until its spare works again."""

    def step(name: str) -> None:
        if name == "data_flushed":
            target.app.write(target.kernel, 40)
            target.spares[0].flush_fails = True

    with pytest.raises(DmRemapError, match="cannot be flushed"):
        target.remap((40, 1), engine=target.engine(step=step))
    assert not any(device.suspended for device in target.kernel.mapped.values())
    assert target.app.waiting.keys() <= target.kernel.failed
    assert target.read(40) is None
    assert target.read(48) == content(48)
    target.app.waiting.clear()
    target.app.versions[40].pop()
    target.spares[0].flush_fails = False
    upkeep = plan_upkeep(target.engine().require(NAME))
    assert "thaw" in [action.kind for action in upkeep.actions]
    target.create()
    target.check()


def test_a_whole_target_that_fails_can_be_thawed(target: Scene) -> None:
    def step(name: str) -> None:
        if name == "data_flushed":
            target.spares[0].flush_fails = True

    with pytest.raises(DmRemapError, match="cannot be flushed"):
        target.remap((0, SECTORS), engine=target.engine(step=step))
    assert target.read(0) is None
    target.spares[0].flush_fails = False
    target.create()
    target.check()


@pytest.mark.parametrize("fault", ["flush", "main gone"])
def test_a_device_that_fails_in_the_freeze_is_named(target: Scene, fault: str) -> None:
    spare, main = target.spares[0], target.main

    def step(name: str) -> None:
        if name != "frozen":
            return
        target.app.write(target.kernel, 40)
        if fault == "flush":
            spare.flush_fails = True
        else:
            main.dead, main.code = True, errno.ENXIO

    with pytest.raises(DmRemapError, match="cannot be written|not a bad block") as caught:
        target.remap((40, 1), engine=target.engine(step=step))
    assert caught.value.device == (main.path if fault == "main gone" else spare.path)
    if fault == "main gone":
        assert target.app.waiting.keys() <= target.kernel.failed
        target.app.waiting.clear()
        target.app.versions[40].pop()
    main.dead = spare.flush_fails = False
    assert target.generation() == 1
    target.check()


# Writes that race


def test_writes_during_the_salvage_are_not_lost(target: Scene) -> None:
    target.spoil(42)
    turns = itertools.cycle([40, 41, 43, 47])

    def on_read(sector: int, count: int) -> None:
        target.app.write(target.kernel, next(turns))

    def step(name: str) -> None:
        if name == "data_flushed":
            target.main.on_read = None

    target.main.on_read = on_read
    report = target.remap((40, 1), engine=target.engine(step=step))
    assert report.lost == [(42, 1)]
    assert len(target.app.versions[40]) > 1
    target.check()


def test_a_write_makes_a_lost_sector_good_while_it_is_remapped(target: Scene) -> None:
    target.spoil(42)

    def step(name: str) -> None:
        if name == "data_flushed":
            target.app.write(target.kernel, 42)

    report = target.remap((42, 1), engine=target.engine(step=step))
    assert report.lost == [(42, 1)], "it was when the chunk was read"
    assert target.read(42) == content(42, 1)
    target.check()


def test_writes_at_every_step_are_not_lost(target: Scene) -> None:
    target.spoil(41)
    steps = []

    def step(name: str) -> None:
        steps.append(name)
        for sector in (40, 41 + len(steps) % 7, 80, 81 + len(steps) % 7, 120):
            target.app.write(target.kernel, sector)

    target.remap((40, 1), (80, 1), engine=target.engine(step=step))
    assert steps[-4:] == ["place_final", "thawed", "swapped", "parked"]
    target.check()


# Crashes


@dataclass
class Crash:
    """A host at a moment of a command, with the application's knowledge then."""

    label: str
    kernel: Kernel
    app: App


def record(
    scene: Scene, command: Callable[[Engine], object], on_step: Callable[[str], None] | None = None
) -> list[Crash]:
    """Run a command and remember the host before each change and after each step of it."""
    crashes: list[Crash] = []

    def remember(label: str) -> None:
        crashes.append(Crash(f"{len(crashes)}: {label}", scene.kernel.clone(), scene.app.clone()))

    def step(name: str) -> None:
        if on_step:
            on_step(name)
        remember(f"after {name}")

    process = Process(scene.kernel, lambda call: remember(f"before {call}"))
    command(scene.engine(process, step))
    return crashes


def survivals(writes: Sequence[Volatile], seed: str) -> Iterator[list[Volatile]]:
    """Subsets of the writes: all of them if they are few, else the likely and some at random."""
    if len(writes) <= 3:
        for size in range(len(writes) + 1):
            yield from map(list, itertools.combinations(writes, size))
        return
    chance = random.Random(seed)
    yield []
    yield list(writes)
    yield list(writes[: len(writes) // 2])
    yield list(writes[len(writes) // 2 :])
    for _turn in range(3):
        yield [item for item in writes if chance.random() < 0.5]


@pytest.mark.parametrize("on_error", ["fail", "hold"])
def test_a_process_killed_anywhere_in_a_remap(tmp_path: Path, on_error: str) -> None:
    """Of single chunks, neighbours, and the short last one."""
    target = make_scene(tmp_path, on_error=on_error)
    create_held(target)
    ranges = [(40, 1), (80, 9), (SECTORS - 1, 1)]
    target.spoil(41, 83, SECTORS - 2)
    turn = itertools.count()

    def on_step(name: str) -> None:
        number = next(turn)
        for sector in (40 + number % 8, 80 + number % 3, 88, 120, SECTORS - 1):
            target.app.write(target.kernel, sector)

    crashes = record(target, lambda e: target.remap(*ranges, engine=e), on_step)
    assert len(crashes) > 60
    generations: list[int] = []
    for crash in crashes:
        scene = target.at(crash.kernel, crash.app)
        scene.create()
        scene.check(why=crash.label)
        generations.append(scene.generation())
        scene.remap(*ranges)
        scene.check(why=f"{crash.label}, remapped again")
        assert scene.generation() == 2
    assert generations == sorted(generations)
    assert set(generations) == {1, 2}


@pytest.mark.parametrize(
    ("spares", "busy", "on_error"),
    short_form(
        [(1, False, "fail"), (1, True, "fail"), (2, True, "fail"), (1, True, "hold")],
        always=[(1, True, "fail"), (1, True, "hold")],
    ),
)
def test_a_power_cut_anywhere_in_a_remap(
    tmp_path: Path, spares: int, busy: bool, on_error: str
) -> None:
    target = make_scene(tmp_path, spares, on_error=on_error)
    create_held(target)
    target.spoil(41)
    turn = itertools.count()

    def on_step(name: str) -> None:
        number = next(turn)
        if busy:
            target.app.write(target.kernel, 40 + number % 8)
        if number % 3 == 0 and not target.kernel.mapped.get(f"{NAME}-frozen"):
            target.app.flush(target.kernel)

    crashes = record(target, lambda e: target.remap((40, 1), engine=e), on_step)
    generations: list[int] = []
    for crash in crashes:
        for survivors in survivals(crash.kernel.volatile(), crash.label):
            scene = target.at(crash.kernel.clone(), crash.app.clone())
            scene.kernel.cut_power(survivors)
            scene.app.waiting.clear()
            scene.create()
            scene.check(power_cut=True, why=crash.label)
            generations.append(scene.generation())
    assert set(generations) == {1, 2}


@pytest.mark.parametrize("spares", [1, 2])
@pytest.mark.parametrize("power_cut", [False, True], ids=["killed", "power cut"])
def test_a_crash_anywhere_in_a_creation(tmp_path: Path, spares: int, power_cut: bool) -> None:
    scene = make_scene(tmp_path, spares)
    crashes = record(scene, scene.create)
    assert len(crashes) > 15
    for crash in crashes:
        choices = survivals(crash.kernel.volatile(), crash.label) if power_cut else [[]]
        for survivors in choices:
            again = scene.at(crash.kernel.clone(), crash.app.clone())
            if power_cut:
                again.kernel.cut_power(survivors)
            again.create()
            again.check(power_cut, why=crash.label)
            assert again.generation() == 1


@pytest.mark.parametrize(
    ("power_cut", "spares"),
    short_form(itertools.product([False, True], [1, 2]), always=[(False, 2), (True, 1)]),
)
def test_a_crash_anywhere_in_a_change_of_policies(
    tmp_path: Path, power_cut: bool, spares: int
) -> None:
    target = make_scene(tmp_path, spares)
    target.create()
    target.spoil(41)
    target.remap((40, 1))
    target.app.flush(target.kernel)
    changing = replace(target, request=replace(target.request, allocation="balanced", warn=10))
    crashes = record(changing, changing.create)
    assert len(crashes) > 15
    found: list[int] = []
    for crash in crashes:
        choices = survivals(crash.kernel.volatile(), crash.label) if power_cut else [[]]
        for survivors in choices:
            again = changing.at(crash.kernel.clone(), crash.app.clone())
            if power_cut:
                again.kernel.cut_power(survivors)
            # Without the options, what was stored by then stays.
            unchanged = replace(again, request=target.request)
            unchanged.create()
            unchanged.check(power_cut, why=crash.label)
            found.append(unchanged.generation())
            metadata = unchanged.engine().require(NAME).metadata
            assert (metadata.config["allocation"] == "balanced") == (found[-1] == 3), crash.label
            again.create()
            again.check(power_cut, why=crash.label)
            metadata = again.engine().require(NAME).metadata
            assert metadata.generation == 3, crash.label
            assert metadata.config["allocation"] == "balanced", crash.label
            assert metadata.config["thresholds"] == {"warn": 10, "critical": 95}, crash.label
    assert set(found) == {2, 3}


@pytest.mark.parametrize("power_cut", [False, True], ids=["killed", "power cut"])
def test_a_crash_anywhere_in_a_creation_over_an_old_target(target: Scene, power_cut: bool) -> None:
    """Whatever was on the spare, a lost sector of the new target never shows it."""
    target.remap((40, 1), (80, 1))
    target.app.flush(target.kernel)
    target.kernel.cut_power([])
    wiping = replace(target, request=replace(target.request, wipe=True, discard_remaps=True))
    target.spares[0].fill(2, FILESYSTEM_MAGIC.ljust(SECTOR, b"\0"))
    crashes = record(wiping, wiping.create)
    for crash in crashes:
        choices = survivals(crash.kernel.volatile(), crash.label) if power_cut else [[]]
        for survivors in choices:
            again = wiping.at(crash.kernel.clone(), crash.app.clone())
            if power_cut:
                again.kernel.cut_power(survivors)
            again.create()
            again.check(power_cut, why=crash.label)
            again.spoil(10)
            assert again.remap((10, 1)).lost == [(10, 1)]
            again.check(power_cut, why=crash.label)


@pytest.mark.parametrize("power_cut", [False, True], ids=["killed", "power cut"])
def test_a_crash_anywhere_in_a_removal(target: Scene, power_cut: bool) -> None:
    """What a killed removal leaves in the kernel is enough to wipe the spares; else they are named.

    A copy of the metadata that is left would show old data when the target is made again.
    """
    target.remap((40, 1))
    crashes = record(target, lambda engine: target.remove(engine=engine))
    for crash in crashes:
        choices = survivals(crash.kernel.volatile(), crash.label) if power_cut else [[]]
        for survivors in choices:
            again = target.at(crash.kernel.clone(), crash.app.clone())
            if power_cut:
                again.kernel.cut_power(survivors)
            again.remove(spares=again.request.spares if power_cut else ())
            assert again.kernel.mapped == {}, crash.label
            assert again.create()[0] == "format_spare", crash.label
            assert again.generation() == 1, crash.label


@pytest.fixture
def calls(tmp_path: Path) -> list[str]:
    """The calls that a remap makes, for tests that let each of them fail."""
    scene = make_scene(tmp_path)
    scene.create()
    scene.spoil(41)
    calls: list[str] = []
    scene.remap((40, 1), engine=scene.engine(Process(scene.kernel, calls.append)))
    assert len(calls) > 20
    return calls


def numbered(number: int, action: Callable[[str], None]) -> Callable[[str], None]:
    """Something for ``on_call`` or ``step`` that acts at one of the calls."""
    count = itertools.count()

    def on_call(name: str) -> None:
        if next(count) == number:
            action(name)

    return on_call


def write_in_the_pause(scene: Scene) -> Callable[[str], None]:
    def step(name: str) -> None:
        if name in ("frozen", "committed"):
            scene.app.write(scene.kernel, 44)

    return step


def test_one_call_that_fails_anywhere_in_a_remap(tmp_path: Path, calls: list[str]) -> None:
    def fail(name: str) -> None:
        if name.startswith(("write", "flush")):
            raise OSError(errno.EIO, f"injected into {name}")
        raise DmRemapError(f"injected into {name}")

    generations = set()
    for number, label in enumerate(calls):
        scene = make_scene(tmp_path)
        scene.create()
        scene.spoil(41)
        process = Process(scene.kernel, numbered(number, fail))
        with contextlib.suppress(DmRemapError):
            scene.remap((40, 1), engine=scene.engine(process, write_in_the_pause(scene)))
        # What could not be written or undone at once is left to the next plan.
        scene.create()
        scene.check(why=f"{number}: {label}")
        generations.add(scene.generation())
    assert generations == {1, 2}


def test_an_interrupt_after_any_step_of_a_remap(tmp_path: Path) -> None:
    generations: list[int] = []
    interrupted = True
    while interrupted:
        scene = make_scene(tmp_path)
        scene.create()
        scene.spoil(41)
        number = len(generations)

        def interrupt(name: str) -> None:
            raise KeyboardInterrupt(name)

        interrupted = False
        try:
            scene.remap((40, 1), engine=scene.engine(step=numbered(number, interrupt)))
        except KeyboardInterrupt:
            interrupted = True
        scene.create()
        scene.check(why=str(number))
        generations.append(scene.generation())
    assert generations == sorted(generations)
    assert generations[0] == 1
    assert len(generations) >= 20


@pytest.mark.parametrize("spares", [1, 2])
def test_a_spare_that_dies_anywhere_in_a_remap(
    tmp_path: Path, calls: list[str], spares: int
) -> None:
    """Nothing hangs while it is away, and all is right once it is back."""
    for (number, label), dying in itertools.product(enumerate(calls), range(spares)):
        scene = make_scene(tmp_path, spares)
        scene.create()
        scene.spoil(41)
        why = f"{number}: {label}, spare {dying}"

        def die(name: str) -> None:
            scene.spares[dying].dead = True  # noqa: B023

        process = Process(scene.kernel, numbered(number, die))
        with contextlib.suppress(DmRemapError):
            scene.remap((40, 1), engine=scene.engine(process, write_in_the_pause(scene)))
        assert not any(device.suspended for device in scene.kernel.mapped.values()), why
        scene.app.settle(scene.kernel)
        for request, (sector, _version) in list(scene.app.waiting.items()):
            assert request in scene.kernel.failed, why
            # A write that failed may have been done or not.
            del scene.app.waiting[request]
            scene.spares[dying].dead = False
            scene.create()
            assert scene.read(sector) in scene.app.versions[sector], why
            scene.app.write(scene.kernel, sector)
        scene.spares[dying].dead = False
        scene.create()
        scene.check(why=why)


# From a spare to others, and back to main


def remapped(folder: Path, spares: int = 1, on_error: str = "fail", block: int = 1) -> Scene:
    """A target with remapped chunks, of which the first has a lost sector, and old data on main."""
    scene = make_scene(folder, spares, block, on_error=on_error)
    create_held(scene)
    scene.spoil(41)
    scene.remap((40, 2 * CHUNK), (SECTORS - 1, 1))
    scene.main.bad.clear()
    scene.main.stable_bad.clear()
    for sector in (44, 50, SECTORS - 2):
        scene.app.write(scene.kernel, sector)
    scene.app.flush(scene.kernel)
    return scene


def place(scene: Scene, chunk: int) -> tuple[int, int] | None:
    found = extents.place_of(scene.engine().require(NAME).metadata.extents, chunk)
    return (found.spare, found.physical) if found else None


def test_chunks_move_to_another_spare_with_their_lost_sectors(tmp_path: Path) -> None:
    scene = remapped(tmp_path, spares=2)
    reads: list[tuple[int, int]] = []
    geometry = geometry_of(scene.engine().require(NAME).metadata, 0)
    first = geometry.chunk_sector(0)
    scene.spares[0].on_read = lambda sector, count: reads.append((sector - first, count))
    moved = scene.move(0)
    scene.spares[0].on_read = None
    assert [place(scene, chunk) for chunk in (5, 6, 24)] == [(1, 0), (1, 1), (1, 2)]
    assert moved.chunks[0].lost_before == [(41, 1)]
    assert moved.chunks[0].lost == []
    assert moved.chunks[0].origin == 0
    single = [read for read in reads if read[0] <= 1 < sum(read)]
    assert single == [(1, 1)], "what is known to be lost is read once"
    scene.spares[0].dead = True
    scene.check_blocks()
    scene.spares[0].dead = False
    scene.check()


def test_a_sector_that_a_spare_cannot_read_is_lost(tmp_path: Path) -> None:
    scene = remapped(tmp_path, spares=2)
    scene.engine().apply(plan_upkeep(scene.engine().require(NAME)))
    geometry = geometry_of(scene.engine().require(NAME).metadata, 0)
    scene.spares[0].spoil([geometry.chunk_sector(1) + 3])
    scene.app.versions[51] = [None]
    moved = scene.move(0)
    assert [chunk.lost for chunk in moved.chunks] == [[], [(51, 1)], []]
    lost = scene.engine().require(NAME).metadata.lost
    assert [(item.sector, item.count) for item in lost] == [(41, 1), (51, 1)]
    scene.check()


def test_a_spare_with_little_on_it_is_not_taken_for_dead(tmp_path: Path) -> None:
    """Wherever it is asked, there was no write yet, so it answers with EILSEQ."""
    scene = make_scene(tmp_path, spares=2)
    scene.create()
    scene.spoil(40)
    scene.remap((40, 1))
    assert scene.move(0).chunks[0].lost_before == [(40, 1)]
    scene.check()


@pytest.mark.parametrize("back", [False, True])
def test_what_was_written_since_is_lost_no_more(tmp_path: Path, back: bool) -> None:
    scene = remapped(tmp_path, spares=2)
    scene.app.write(scene.kernel, 41)
    if back:
        assert scene.return_to_main((40, 1)).staying == []
    else:
        scene.move(0)
    assert scene.engine().require(NAME).metadata.lost == ()
    scene.check()


def test_a_dead_spare_loses_nothing_by_a_move(tmp_path: Path) -> None:
    scene = remapped(tmp_path, spares=2)

    def step(name: str) -> None:
        scene.spares[0].dead = scene.spares[0].dead or name == "frozen"

    with pytest.raises(DmRemapError, match="reads fail everywhere"):
        scene.move(0, scene.engine(step=step))
    scene.spares[0].dead = False
    scene.create()
    scene.check()
    assert place(scene, 5) == (0, 0)


@pytest.mark.parametrize("block", [1, 8])
def test_a_chunk_returns_to_main_and_goes_again(tmp_path: Path, block: int) -> None:
    scene = make_scene(tmp_path, block=block)
    scene.create()
    scene.remap((40, block))
    scene.app.write(scene.kernel, 40)
    report = scene.return_to_main((40, block))
    (chunk,) = report.chunks
    assert (chunk.spare, chunk.spare_chunk, chunk.origin, chunk.moved) == (None, None, 0, True)
    assert [action.kind for action in report.plan.actions] == ["return_chunk", "commit_metadata"]
    assert place(scene, 5) is None
    scene.check()
    again = scene.return_to_main((40, block))
    assert (again.chunks, again.plan.changes, again.generation) == ([], False, 3)
    scene.app.write(scene.kernel, 40)
    scene.remap((40, block))
    assert place(scene, 5) is not None
    scene.check()


def test_a_chunk_with_a_lost_sector_stays(tmp_path: Path) -> None:
    scene = remapped(tmp_path)
    before = dict(scene.main.content)
    report = scene.return_to_main((40, 1))
    (chunk,) = report.staying
    assert "sectors 41+1 cannot be read; write them first" in chunk.reason
    assert not report.plan.changes
    assert scene.main.content == before
    scene.check()


def test_a_sector_that_fails_while_its_chunk_returns_is_not_lost(tmp_path: Path) -> None:
    """The chunk stays whole; only a move to another spare may give a sector up."""
    scene = remapped(tmp_path)
    geometry = geometry_of(scene.engine().require(NAME).metadata, 0)
    scene.kernel.suspend(f"{NAME}-spare0")
    scene.kernel.resume(f"{NAME}-spare0")
    scene.spares[0].spoil([geometry.chunk_sector(1) + 3])
    report = scene.return_to_main((48, 1))
    assert "sectors 51+1 cannot be read" in report.staying[0].reason
    assert place(scene, 6) == (0, 1)
    scene.spares[0].bad.clear()
    scene.check()


@pytest.mark.parametrize("fault", ["write", "read", "drops", "dead", "flush"])
def test_a_bad_place_on_main_keeps_its_chunk_on_the_spare(tmp_path: Path, fault: str) -> None:
    scene = remapped(tmp_path)
    main = scene.main
    if fault == "write":
        main.unwritable = {50}
    elif fault == "read":
        main.heals = False
        main.spoil([50])
    elif fault == "dead":
        main.dead = True
    elif fault == "flush":
        main.flush_fails = True

    def step(name: str) -> None:
        # The second turn finds what the first one did not.
        if fault == "drops" and name == "main_written":
            main.on_read = lambda sector, count: main.content.update({50: bytes(SECTOR)})

    report = scene.return_to_main((48, 1), (SECTORS - 1, 1), engine=scene.engine(step=step))
    main.on_read, main.dead, main.flush_fails, main.unwritable = None, False, False, set()
    staying = [6, 24] if fault in ("dead", "flush") else [6]
    assert [chunk.chunk for chunk in report.staying] == staying
    assert (
        "its place on main" in report.staying[0].reason or "main cannot" in report.staying[0].reason
    )
    assert report.plan.changes == (len(staying) == 1)
    assert place(scene, 6) == (0, 1)
    scene.main.bad.clear()
    scene.check()


def test_nothing_but_the_chunks_own_data_is_written_to_main(tmp_path: Path) -> None:
    scene = remapped(tmp_path)
    before = dict(scene.main.content)
    scene.return_to_main((0, SECTORS))
    changed = {s for s in range(SECTORS) if scene.main.content[s] != before[s]}
    assert changed <= {*range(48, 56), *range(SECTORS - 5, SECTORS)}
    assert all(scene.main.content[s] == scene.app.versions[s][-1] for s in changed)


def crash_everywhere(
    scene: Scene,
    command: Callable[[Engine], object],
    power_cut: bool,
    writes: Sequence[int],
    labels: list[str] | None = None,
) -> set[int]:
    """Crash a command anywhere, look at what is left, do it again; the generations left."""
    turn = itertools.count()

    def on_step(name: str) -> None:
        number = next(turn)
        scene.app.write(scene.kernel, writes[number % len(writes)])
        # A flush passes a freeze, and must reach what was acknowledged before.
        if power_cut and number % 3 == 0:
            scene.app.flush(scene.kernel)

    crashes = record(scene, command, on_step)
    assert len(crashes) > 30
    if labels is not None:
        labels += [crash.label for crash in crashes]
    generations = set()
    for crash in crashes:
        some = survivals(crash.kernel.volatile(), crash.label) if power_cut else [None]
        for survivors in itertools.islice(some, 4):
            left = scene.at(crash.kernel.clone(), crash.app.clone())
            if survivors is not None:
                left.kernel.cut_power(survivors)
                left.app.waiting.clear()
            left.create()
            left.check(power_cut, why=crash.label)
            generations.add(left.generation())
    return generations


@pytest.mark.parametrize("on_error", ["fail", "hold"])
@pytest.mark.parametrize("to_main", [False, True])
def test_a_flush_during_a_move_keeps_what_was_acknowledged_before(
    tmp_path: Path, on_error: str, to_main: bool
) -> None:
    """At each step, with a power cut behind it; all chunks of the spare are frozen meanwhile."""
    for stop in itertools.count():
        scene = make_scene(tmp_path / str(stop), spares=2, on_error=on_error)
        create_held(scene)
        scene.remap((40, 1))
        scene.app.flush(scene.kernel)
        for sector in range(40, 48):
            scene.app.write(scene.kernel, sector)
        process = Process(scene.kernel)
        steps = itertools.count()

        def reached(
            name: str, scene: Scene = scene, process: Process = process, steps=steps, stop=stop
        ) -> None:
            if next(steps) == stop:
                scene.app.flush(scene.kernel)
                process.kill()

        engine = scene.engine(process, reached)
        with contextlib.suppress(Killed):
            if to_main:
                scene.return_to_main((40, 1), engine=engine)
            else:
                scene.move(0, engine)
        if process.alive:
            assert stop > 10
            return
        scene.kernel.cut_power([])
        scene.app.waiting.clear()
        scene.create()
        scene.check(power_cut=True, why=str(stop))


@pytest.mark.parametrize(
    ("power_cut", "on_error"),
    short_form(
        itertools.product([False, True], ["fail", "hold"]),
        always=[(False, "fail"), (True, "hold")],
    ),
)
def test_a_crash_anywhere_in_a_move_between_spares(
    tmp_path: Path, power_cut: bool, on_error: str
) -> None:
    scene = remapped(tmp_path, spares=2, on_error=on_error)
    found = crash_everywhere(
        scene, lambda engine: scene.move(0, engine), power_cut, (40, 44, 48, 55, 80)
    )
    assert found == {2, 3}


def test_a_crash_anywhere_in_a_move_to_places_with_old_data(tmp_path: Path) -> None:
    """A spare is suspended there for a moment, and must not stay so."""
    scene = remapped(tmp_path, spares=2)
    scene.move(0)
    lose_on_spare(scene, 1, 43)
    labels: list[str] = []

    def move_back(engine: Engine) -> None:
        scene.move(1, engine)

    found = crash_everywhere(scene, move_back, False, (40, 44, 48, 55, 80), labels=labels)
    assert any(label.endswith("after poisoned") for label in labels)
    assert place(scene, 5) == (0, 0)
    assert found == {3, 4}


@pytest.mark.parametrize("on_error", ["fail", "hold"])
@pytest.mark.parametrize("power_cut", [False, True], ids=["killed", "power cut"])
def test_a_crash_anywhere_in_a_return(tmp_path: Path, on_error: str, power_cut: bool) -> None:
    scene = remapped(tmp_path, on_error=on_error)
    ranges = [(48, 1), (SECTORS - 1, 1)]
    found = crash_everywhere(
        scene,
        lambda engine: scene.return_to_main(*ranges, engine=engine),
        power_cut,
        (48, 52, 55, 80, SECTORS - 1),
    )
    assert found == {2, 3}


def lose_on_spare(scene: Scene, index: int, sector: int) -> None:
    """Make a sector of the target unreadable on the spare that it is on."""
    # What is in the journal is read from there.
    scene.kernel.suspend(f"{NAME}-spare{index}")
    scene.kernel.resume(f"{NAME}-spare{index}")
    found = place(scene, sector // CHUNK)
    assert found is not None
    geometry = geometry_of(scene.engine().require(NAME).metadata, index)
    disk = scene.kernel.disks[scene.request.spares[index]]
    disk.spoil([geometry.chunk_sector(found[1]) + sector % CHUNK])
    scene.app.versions[sector] = [None]
    scene.app.acknowledged.pop(sector, None)
    scene.app.durable.pop(sector, None)


def test_a_place_that_was_left_shows_no_old_data(tmp_path: Path) -> None:
    """A sector that is lost later gets a place where it has been once, with its data."""
    scene = remapped(tmp_path, spares=2)
    scene.move(0)
    lose_on_spare(scene, 1, 43)
    assert [chunk.lost for chunk in scene.move(1).chunks] == [[(43, 1)], [], []]
    assert place(scene, 5) == (0, 0), "the same place again"
    assert scene.read(43) is None
    scene.spares[1].bad.clear()
    scene.check()


# What else may be on a host


def foreign(kernel: Kernel, name: str, suspended: bool) -> None:
    kernel.insert(name, "LVM-of-somebody-else")
    kernel.load(name, [Segment(0, 8, "error", "")])
    kernel.resume(name)
    kernel.mapped[name].suspended = suspended


@pytest.mark.parametrize("suspended", [False, True])
@pytest.mark.parametrize("part", ["-frozen", "-spare1"])
def test_devices_of_others_are_left_alone(target: Scene, part: str, suspended: bool) -> None:
    name = NAME + part
    foreign(target.kernel, name, suspended)
    before = copy.deepcopy(target.kernel.mapped[name])
    assert target.create() == []
    if part == "-frozen":
        with pytest.raises(Refused, match="whose name the remap needs"):
            target.remap((40, 1))
    else:
        target.remap((40, 1))
    assert target.kernel.mapped[name] == before
    target.remove()
    assert target.kernel.mapped == {name: before}


@pytest.mark.parametrize("where", ["place_set", "frozen", "data_flushed", "thawed", "swapped"])
def test_a_target_is_removed_in_the_middle_of_a_remap(target: Scene, where: str) -> None:
    kill_remap(target, where)
    target.remove()
    assert target.kernel.mapped == {}
    assert target.create()[0] == "format_spare"


def kill_remap(scene: Scene, where: str, *ranges: tuple[int, int]) -> None:
    process = Process(scene.kernel)

    def step(name: str) -> None:
        if name == where:
            process.kill()

    with pytest.raises(Killed):
        scene.remap(*(ranges or [(40, 1)]), engine=scene.engine(process, step))


def test_a_disk_that_goes_away_within_a_chunk_loses_no_sector(target: Scene) -> None:
    target.main.spoil([41])

    def on_read(sector: int, _count: int) -> None:
        target.main.dead = target.main.dead or sector == 42

    target.main.on_read = on_read
    with pytest.raises(DmRemapError, match="reads fail everywhere"):
        target.remap((41, 1))
    target.main.on_read, target.main.dead = None, False
    assert target.remap((41, 1)).lost == [(41, 1)]
    target.app.versions[41] = [None]
    target.check()


@pytest.mark.parametrize("comes_back", ["salvaged", "first answer", "never"])
def test_a_disk_that_was_away_for_a_while_loses_no_sector(target: Scene, comes_back: str) -> None:
    """Its reads failed one by one like those of bad sectors."""
    target.main.dead = True

    def step(name: str) -> None:
        if name == comes_back:
            target.main.dead = False

    def on_read(sector: int, _count: int) -> None:
        # Only the question whether the disk answers at all goes elsewhere.
        if comes_back == "first answer" and sector == 0:
            target.main.dead = False

    target.main.on_read = on_read
    with contextlib.suppress(DmRemapError):
        assert target.remap((40, 1), engine=target.engine(step=step)).lost == []
    target.main.on_read, target.main.dead = None, False
    target.check()


def test_a_generation_that_may_be_on_a_lost_spare_is_not_undone(tmp_path: Path) -> None:
    """Else the chunk would change on main, and the spare would bring its older data back."""
    scene = make_scene(tmp_path, spares=2)
    scene.create()
    first, second = scene.spares
    all_copies = set(range(second.sectors))

    def step(name: str) -> None:
        if name == "spare0/copy6/written":
            first.dead = True
            second.unwritable = all_copies

    with pytest.raises(DmRemapError):
        scene.remap((40, 1), engine=scene.engine(step=step))
    second.unwritable = set()
    assert scene.read(44) is None, "the chunk must not come back on main"
    assert scene.read(8) == content(8), "all others must"
    first.dead = False
    scene.create()
    scene.check()


def test_the_report_tells_of_losses_that_an_interrupted_remap_left(target: Scene) -> None:
    target.spoil(41)
    kill_remap(target, "committed", (41, 1))
    report = target.remap((40, 8))
    assert report.chunks == []
    assert report.lost == [(41, 1)]
    target.app.write(target.kernel, 41)
    assert target.remap((40, 8)).lost == [], "what was written since is lost no more"


def test_the_report_tells_which_places_were_used(target: Scene) -> None:
    target.spoil(41)
    metadata = target.engine().require(NAME).metadata
    geometry = geometry_of(metadata, 0)
    target.spares[0].unwritable = {geometry.chunk_sector(0) + 3}
    planned = plan_remap(target.engine().require(NAME), [(40, 1)])
    report = target.remap((40, 1))
    (chunk,) = report.chunks
    told = [a.details["spare_chunk"] for a in report.plan.actions if a.kind == "remap_chunk"]
    assert [extent.physical for extent in planned.placed] == [0]
    assert told == [chunk.spare_chunk] == [1]
    after = target.engine().require(NAME)
    assert report.plan.after == plan_upkeep(after).after


def test_a_spare_that_cannot_be_formatted_is_named(scene: Scene) -> None:
    scene.spares[0].unwritable = set(range(16384, scene.spares[0].sectors))
    with pytest.raises(DmRemapError, match="cannot be formatted") as caught:
        scene.create()
    assert caught.value.device == scene.spares[0].path


@pytest.mark.parametrize("helpless", [False, True])
def test_the_guard_stays_while_anything_is_frozen(
    target: Scene, monkeypatch: pytest.MonkeyPatch, helpless: bool
) -> None:
    told: list[bytes] = []
    monkeypatch.setattr(os, "fork", lambda: 1)
    monkeypatch.setattr(os, "waitpid", lambda *_arguments: (1, 0))
    monkeypatch.setattr(os, "write", lambda _pipe, data: told.append(data) or 1)
    frozen = []

    def on_call(name: str) -> None:
        if helpless and frozen and name.split()[0] in ("load", "swap"):
            raise DmRemapError("no memory", device=name)

    process = Process(target.kernel, on_call)
    engine = Engine(
        mapper=process.mapper,
        blocks=process.blocks,
        step=lambda name: frozen.append(name) if name == "frozen" else None,
        lock_dir=str(target.folder),
        backup_dir=str(target.folder),
        guard=True,
    )
    if helpless:
        with pytest.raises(DmRemapError):
            target.remap((40, 1), engine=engine)
        assert target.kernel.mapped[f"{NAME}-frozen"].live.segments[0].target == "delay"
        assert told == []
    else:
        target.remap((40, 1), engine=engine)
        assert told == [b"."]


def test_files_are_looked_for_on_the_target(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    owner = files.Owner(8, 2, "free")

    def owners(path: str, ranges: list[tuple[int, int]], timeout: float) -> list[files.Owner]:
        asked.append((path, ranges, timeout))
        return [owner]

    monkeypatch.setattr(files, "owners", owners)
    report = RemapReport(Plan("data"), lost_before=[(8, 2)])
    scene.engine().find_files("data", report, 5)
    assert asked == [("/dev/mapper/data", [(8, 2)], 5)]
    assert report.files == [owner]
