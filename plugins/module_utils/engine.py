# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Observes targets and carries plans out, in an order that a crash cannot hurt."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from . import blockdev, copies, extents, files, mapping, planner, pool
from .blockdev import SECTOR_BYTES, DeviceInfo
from .devmapper import DeviceMapper, MappedDevice, Segment, check_name
from .errors import DmRemapError, Refused
from .events import hashed_machine_id, intersect_ranges
from .format import Extent, Geometry, Metadata, geometry_of, pack_slot, spare_uuid_of
from .planner import (
    UUID_PREFIX,
    ActiveSpare,
    ActiveTarget,
    Candidate,
    Plan,
    Request,
    Seen,
    spare_name,
)
from .probing import MEDIUM_ERRORS, answers
from .salvage import Outcome, Patience, Salvage, salvage

LOCK_DIR = "/run/dm-remap"
BACKUP_DIR = "/var/lib/dm-remap/backup"
BACKUPS_KEPT = 16

_TARGET_UUID = re.compile(re.escape(UUID_PREFIX) + r"([0-9a-f]{32})\Z")
_STATS_PROGRAM = "dm_remap"
_ATTEMPTS = 3
# A spare on which so many chosen places are bad is not used for the remap.
_BAD_PLACES = 3
_MCL_CURRENT, _MCL_FUTURE = 1, 2


class OpenDevice(copies.Device, Protocol):
    """An open block device, as `blockdev.BlockDevice` is; sectors are of 512 bytes."""

    def zero(self, sector: int, count: int) -> None:
        """Make sectors read as zeros."""

    def __enter__(self) -> OpenDevice:
        """The device itself."""

    def __exit__(self, *exc_info: object) -> None:
        """Close it."""


class Blocks(Protocol):
    """What the engine needs of the module `blockdev`."""

    def BlockDevice(self, path: str, writable: bool = ...) -> OpenDevice:
        """Open a device past the page cache."""

    def describe(self, path: str) -> DeviceInfo:
        """Who the device is and who uses it."""

    def node_of(self, devno: str) -> str:
        """The node of a device number."""

    def signatures(self, path: str) -> list[str]:
        """What is found on the device."""

    def erase_signatures(self, path: str) -> None:
        """Erase that."""


class Mapper(Protocol):
    """What the engine needs of `devmapper.DeviceMapper`."""

    def check_available(self, targets: Iterable[str] = ...) -> None:
        """Raise where the kernel lacks something."""

    def kernel_targets(self) -> Mapping[str, object]:
        """The loaded target types."""

    def names(self) -> list[str]:
        """Names of all mapped devices."""

    def info(self, name: str) -> MappedDevice | None:
        """State of a mapped device."""

    def table(self, name: str) -> list[Segment]:
        """Its live table."""

    def create(self, name: str, uuid: str, segments: Iterable[Segment], private: bool) -> None:
        """Create a mapped device and wait for udev."""

    def create_unannounced(self, name: str, uuid: str, segments: Iterable[Segment]) -> None:
        """Create one without waiting."""

    def load(self, name: str, segments: Iterable[Segment]) -> None:
        """Load an inactive table."""

    def swap(self, name: str, events: Any = ...) -> None:
        """Make it live, and resume."""

    def events(self) -> AbstractContextManager[Any]:
        """Collect the events of swaps."""

    def suspend(self, name: str) -> None:
        """Hold what comes in."""

    def remove(self, name: str) -> None:
        """Remove a device and wait for udev."""

    def remove_unannounced(self, name: str) -> None:
        """Remove one without waiting."""

    def message(self, name: str, text: str) -> str:
        """Send a message; the answer."""

    def dependencies(self, name: str) -> list[str]:
        """Device numbers that the live table uses."""


@dataclass
class RemappedChunk:
    """What became of one chunk.

    Sectors are counted in units of 512 bytes; ``lost`` holds first sector and count on the
    target.
    """

    chunk: int
    start: int
    count: int
    spare: int
    spare_chunk: int
    recovered_first_read: int
    recovered_on_retry: int
    lost: list[tuple[int, int]]


@dataclass
class RemapReport:
    """Result of a remap: what was done, the chunks, and durations in seconds.

    Args:
        plan: the plan as it was carried out.
        chunks: what became of the chunks.
        lost_before: sectors of chunks that were on a spare already, which still cannot be read.
        files: whom the lost sectors belonged to, once `Engine.find_files` has looked.
        salvage_seconds: reading main and writing spares.
        pause_seconds: how long I/O to the chunks and flushes had to wait.
        seconds: all of it.
    """

    plan: Plan
    chunks: list[RemappedChunk] = field(default_factory=list)
    lost_before: list[tuple[int, int]] = field(default_factory=list)
    files: list[files.Owner] = field(default_factory=list)
    salvage_seconds: float = 0.0
    pause_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def generation(self) -> int:
        """Generation of the target's metadata afterwards."""
        return int(self.plan.after["generation"])

    @property
    def recovered(self) -> int:
        """Sectors whose data was saved."""
        return sum(c.recovered_first_read + c.recovered_on_retry for c in self.chunks)

    @property
    def lost(self) -> list[tuple[int, int]]:
        """Lost sectors of all chunks that were asked for, as (first, count) on the target."""
        return self.lost_before + [item for chunk in self.chunks for item in chunk.lost]


@dataclass(eq=False)
class _Work:
    """A chunk on its way to a spare."""

    extent: Extent
    start: int
    length: int
    region: str
    salvage: Salvage


class _Dirty(Exception):
    """A spare chunk holds an old version of a sector that was lost since."""

    def __init__(self, places: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.places = places


class Engine:
    """Observes and changes targets on this host.

    Args:
        mapper: device-mapper.
        blocks: block devices (the module `blockdev`, or a stand-in in tests).
        step: called with a name after each step that a crash could follow.
        progress: called with a sentence when something long begins.
        lock_dir: folder of the lock files.
        backup_dir: folder of the metadata backups.
        guard: while I/O is frozen, keep a second process that ends the freeze if this one is
            killed. Only for processes with one thread.
    """

    def __init__(
        self,
        mapper: Mapper | None = None,
        blocks: Blocks = blockdev,
        step: Callable[[str], None] | None = None,
        progress: Callable[[str], None] | None = None,
        lock_dir: str = LOCK_DIR,
        backup_dir: str = BACKUP_DIR,
        guard: bool = False,
    ) -> None:
        self._mapper: Mapper = mapper or DeviceMapper()
        self._blocks = blocks
        self._step = step or (lambda name: None)
        self._progress = progress or (lambda text: None)
        self._lock_dir = lock_dir
        self._backup_dir = backup_dir
        self._guard = guard

    # Observation

    def check_host(self) -> None:
        """Check that this process may use device-mapper and that the kernel has what is needed.

        Raises:
            Refused: not root.
            MissingKernelFeature: no device-mapper, or no integrity target.
        """
        if os.geteuid() != 0:
            raise Refused("only root can do this", remedy="become root")
        if "integrity" not in self._mapper.kernel_targets():
            subprocess.run(["modprobe", "dm-integrity"], capture_output=True, check=False)
        self._mapper.check_available(("linear", "integrity"))

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold the lock of target ``name``, waiting for whoever has it."""
        with self._lock(check_name(name) + ".lock"):
            yield

    @contextlib.contextmanager
    def locked_host(self) -> Iterator[None]:
        """Hold the lock under which devices get new owners; take it before a target's lock."""
        # No target can be called like this file.
        with self._lock(".host.lock"):
            yield

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        os.makedirs(self._lock_dir, mode=0o755, exist_ok=True)
        with open(os.path.join(self._lock_dir, name), "w", encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def target_names(self) -> list[str]:
        """Names of the active targets."""
        found = []
        for name in sorted(self._mapper.names()):
            info = self._mapper.info(name)
            if info and info.live_table and _TARGET_UUID.match(info.uuid):
                found.append(name)
        return found

    def observe(self, name: str) -> ActiveTarget | None:
        """The active target ``name`` with its metadata, or None.

        Raises:
            Refused: the name belongs to another mapped device.
            DmRemapError: its metadata cannot be read.
        """
        check_name(name)
        device = self._mapper.info(name)
        if device is None or not device.live_table:
            return None
        if not _TARGET_UUID.match(device.uuid):
            raise Refused(
                "is a mapped device of something else",
                device=f"/dev/mapper/{name}",
                remedy="choose another name",
            )
        table = tuple(self._mapper.table(name))
        spares = self._active_spares(device)
        frozen = self._frozen(device)
        if not spares:
            raise DmRemapError(
                "is active without any spare",
                device=f"/dev/mapper/{name}",
                remedy="stop what uses it, remove it with dmsetup, and run the target module again",
            )
        choice = copies.choose({s.candidate.info.path: s.candidate.survey for s in spares})
        own = {spare.devno for spare in spares} | ({frozen.devno} if frozen else set())
        mains = [
            mapping.linear_target(segment)[0]
            for segment in table
            if segment.target == "linear" and mapping.linear_target(segment)[0] not in own
        ]
        main = self._blocks.describe(self._blocks.node_of(mains[0])) if mains else None
        return ActiveTarget(device, table, main, spares, choice, frozen)

    def require(self, name: str) -> ActiveTarget:
        """Like `observe`, but a target that is not active is refused."""
        target = self.observe(name)
        if target is None:
            raise Refused(
                "there is no active target of that name",
                device=name,
                remedy="create or activate it with the target module",
            )
        return target

    def see(self, name: str, main: str | None, spares: Sequence[str]) -> Seen:
        """Observe what a request is about. Devices that do not exist are refused."""
        target = self.observe(name)
        remains = () if target else tuple(self._remains(name))
        candidates = [self._candidate(path, with_signatures=not target) for path in spares]
        if main is None:
            # An interrupted removal has left spares that nobody may have named.
            known = {candidate.info.devno for candidate in candidates}
            left = [self._candidate(path, True) for path in self._spares_of(name, remains)]
            candidates += [c for c in left if c.info.devno not in known]
        return Seen(
            target=target,
            remains=remains,
            taken=() if target else tuple(self._taken(name)),
            main=self._blocks.describe(main) if main else None,
            candidates=tuple(candidates),
        )

    def _spares_of(self, name: str, remains: Sequence[str]) -> Iterator[str]:
        """Nodes of the spares that remaining devices of target ``name`` use."""
        for index in range(planner.MAX_SPARES):
            device = _data_name(name, index)
            if device in remains and self._existing(device).live_table:
                yield self._below(device)

    def _candidate(self, path: str, with_signatures: bool) -> Candidate:
        info = self._blocks.describe(path)
        with self._blocks.BlockDevice(path) as device:
            survey = copies.survey(device)
        signatures: tuple[str, ...] = ()
        if with_signatures:
            try:
                signatures = tuple(self._blocks.signatures(path))
            except DmRemapError:
                # A spare whose first sectors went bad is still known by its other copies.
                if survey.spare_uuid is None:
                    raise
        return Candidate(info, signatures, survey)

    def _active_spares(self, target: MappedDevice) -> tuple[ActiveSpare, ...]:
        found = []
        for index in range(planner.MAX_SPARES):
            device = self._part(target, spare_name(target.name, index))
            if device is None or not device.live_table:
                continue
            path = self._below(_data_name(target.name, index))
            candidate = self._candidate(path, with_signatures=False)
            found.append(ActiveSpare(index, device.devno, candidate))
        return tuple(found)

    def _below(self, name: str) -> str:
        """Node of the device under a linear one of ours."""
        return self._blocks.node_of(mapping.linear_target(self._mapper.table(name)[0])[0])

    def _part(self, target: MappedDevice, name: str) -> MappedDevice | None:
        """The target's own mapped device ``name``; somebody else's of that name is left alone."""
        device = self._mapper.info(name)
        own = target.uuid + name[len(target.name) :]
        return device if device and device.uuid == own else None

    def _frozen(self, target: MappedDevice) -> MappedDevice | None:
        return self._part(target, _frozen_name(target.name))

    def _remains(self, name: str) -> list[str]:
        """Our mapped devices under ``name`` that no live target uses, upper ones first."""
        return [mapped for mapped, ours in self._under(name) if ours]

    def _taken(self, name: str) -> list[str]:
        """Mapped devices of others, or of other targets, whose names target ``name`` needs."""
        return [mapped for mapped, ours in self._under(name) if not ours]

    def _under(self, name: str) -> Iterator[tuple[str, bool]]:
        """The mapped devices with names that target ``name`` uses, and whether they are its own.

        The UUID decides: another target may be called like one of this target's parts.
        """
        parts = [name, _frozen_name(name)]
        for index in range(planner.MAX_SPARES):
            parts += [spare_name(name, index), _data_name(name, index), _tags_name(name, index)]
        for part in parts:
            device = self._mapper.info(part)
            if device:
                head, suffix = device.uuid[: len(UUID_PREFIX) + 32], part[len(name) :]
                yield part, bool(_TARGET_UUID.match(head)) and device.uuid == head + suffix

    def _existing(self, name: str) -> MappedDevice:
        device = self._mapper.info(name)
        if device is None:
            raise DmRemapError(
                "has vanished while it was worked on",
                device=f"/dev/mapper/{name}",
                remedy="look at what else manages device-mapper devices, and run this again",
            )
        return device

    # Targets

    def apply(self, plan: Plan) -> None:
        """Carry out a plan for a target's presence or absence; the caller holds its lock.

        Raises:
            DmRemapError: a step failed; what was done so far stays, and a new plan continues.
        """
        for action in plan.actions:
            self._progress(f"{action.kind} {action.device}")
            getattr(self, f"_do_{action.kind}")(plan, action)
            self._step(action.kind)

    def _do_remove_remains(self, plan: Plan, action: planner.Action) -> None:
        if self._existing(action.device).suspended:
            self._mapper.swap(action.device)
        self._mapper.remove(action.device)

    def _do_wipe_spare(self, plan: Plan, action: planner.Action) -> None:
        self._blocks.erase_signatures(action.device)
        self._wipe_copies(action.device)

    def _do_wipe_metadata(self, plan: Plan, action: planner.Action) -> None:
        self._wipe_copies(action.device)

    def _wipe_copies(self, path: str) -> None:
        with self._blocks.BlockDevice(path, writable=True) as device:
            copies.wipe(device, copies.survey(device))

    def _do_format_spare(self, plan: Plan, action: planner.Action) -> None:
        # With a zeroed superblock the kernel makes a new journal, and with zeroed tags no data
        # sector has a valid one: each reads as an error until it is written.
        geometry = geometry_of(_metadata_of(plan), _index_of(plan, action.device))
        with self._blocks.BlockDevice(action.device, writable=True) as device:
            try:
                device.zero(geometry.tag_start, geometry.tag_sectors)
                device.flush()
            except OSError as error:
                raise DmRemapError(
                    f"cannot be formatted: {error.strerror or error}",
                    device=action.device,
                    remedy="give another spare",
                ) from error

    def _do_activate_spare(self, plan: Plan, action: planner.Action) -> None:
        index, metadata = _index_of(plan, action.device), _metadata_of(plan)
        geometry = geometry_of(metadata, index)
        info = plan.spares[index]
        name, prefix = plan.name, _dm_uuid(metadata)
        pieces = (
            (_tags_name(name, index), "tags", geometry.tag_start, geometry.tag_sectors),
            (_data_name(name, index), "data", geometry.data_start, geometry.data_sectors),
        )
        below = {}
        for device_name, role, start, length in pieces:
            segment = Segment(0, length, "linear", f"{info.devno} {start}")
            self._mapper.create(
                device_name, f"{prefix}-spare{index}-{role}", [segment], private=True
            )
            below[role] = self._existing(device_name).devno
        block_bytes = metadata.config["block_sectors"] * SECTOR_BYTES
        options = [
            f"meta_device:{below['tags']}",
            "internal_hash:crc32c",
            f"journal_sectors:{geometry.journal_sectors}",
            f"block_size:{block_bytes}",
        ]
        params = f"{below['data']} 0 - J {len(options)} {' '.join(options)}"
        self._mapper.create(
            spare_name(name, index),
            f"{prefix}-spare{index}",
            [Segment(0, geometry.data_sectors, "integrity", params)],
            private=True,
        )

    def _do_deactivate_spare(self, plan: Plan, action: planner.Action) -> None:
        index = _index_of(plan, action.device)
        for name in (
            spare_name(plan.name, index),
            _data_name(plan.name, index),
            _tags_name(plan.name, index),
        ):
            self._mapper.remove(name)

    def _do_commit_metadata(self, plan: Plan, action: planner.Action) -> None:
        draft = replace(_metadata_of(plan), timestamp_ns=time.time_ns(), host_id=host_id())
        with contextlib.ExitStack() as stack:
            copies.commit(self._open_members(stack, plan.spares), None, draft, step=self._step)
        self._backup(draft)

    def _do_repair_metadata(self, plan: Plan, action: planner.Action) -> None:
        surveys = {}
        for info in plan.spares.values():
            with self._blocks.BlockDevice(info.path) as device:
                surveys[info.path] = copies.survey(device)
        index = _index_of(plan, action.device)
        spare_uuid = spare_uuid_of(_metadata_of(plan), index)
        with self._blocks.BlockDevice(action.device, writable=True) as device:
            copies.repair(device, copies.choose(surveys), spare_uuid)

    def _do_create_target(self, plan: Plan, action: planner.Action) -> None:
        if plan.main is None:
            raise AssertionError("a plan that creates a target has a main")
        spares = {
            index: self._existing(spare_name(plan.name, index)).devno for index in plan.spares
        }
        metadata = _metadata_of(plan)
        config = metadata.config
        table = mapping.build_table(
            config["main"]["sectors"],
            config["chunk_sectors"],
            plan.main.devno,
            metadata.extents,
            spares,
        )
        self._mapper.create(plan.name, _dm_uuid(metadata), table, private=False)

    def _do_remove_target(self, plan: Plan, action: planner.Action) -> None:
        self._mapper.remove(plan.name)

    def _do_thaw(self, plan: Plan, action: planner.Action) -> None:
        self._end_freeze(plan.name)

    # Remapping

    def remap(
        self,
        name: str,
        ranges: Sequence[tuple[int, int]],
        expected_generation: int | None = None,
        patience: Patience | None = None,
    ) -> RemapReport:
        """Move every chunk that ``ranges`` touch from main to a spare; the caller holds the lock.

        Chunks that are on a spare already are left alone.

        Args:
            name: the target.
            ranges: pairs of first sector and count on the target.
            expected_generation: refuse unless the metadata is at this generation.
            patience: how hard to try to read failing blocks.

        Raises:
            Refused: nothing was changed.
            DmRemapError: a step failed; the target is as its metadata says.
        """
        begun = time.monotonic()
        target = self.require(name)
        first = planner.plan_remap(target, ranges, expected_generation)
        upkeep = planner.plan_upkeep(target)
        self.apply(upkeep)
        _lock_memory()
        avoid: list[tuple[int, int]] = []
        for _attempt in range(_ATTEMPTS):
            target = self.require(name)
            plan = planner.plan_remap(target, ranges, avoid=avoid)
            lost_before = self.lost_before(target, ranges)
            try:
                report = self._remap(target, plan, patience, avoid)
            except _Dirty as dirty:
                avoid += dirty.places
                continue
            report.plan = replace(
                report.plan, before=first.before, actions=upkeep.actions + report.plan.actions
            )
            report.lost_before = lost_before
            report.seconds = time.monotonic() - begun
            return report
        raise DmRemapError(
            f"the chunks changed while they were read, {_ATTEMPTS} times over",
            device=name,
            remedy="nothing was changed; try again",
        )

    def lost_before(
        self, target: ActiveTarget, ranges: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Lost sectors in chunks that ``ranges`` touch and that are on a spare already.

        Those that were written since they were lost can be read again, and are left out.
        """
        metadata = target.metadata
        chunk_sectors, block = metadata.config["chunk_sectors"], metadata.config["block_sectors"]
        total = metadata.config["main"]["sectors"]
        # I/O to frozen chunks would wait.
        lost = [] if target.frozen else [(item.sector, item.count) for item in metadata.lost]
        asked = [
            (chunk * chunk_sectors, chunk_sectors)
            for chunk in extents.chunks_of(ranges, chunk_sectors, total)
        ]
        known = [item for piece in asked for item in intersect_ranges(lost, piece)]
        if not known:
            return []
        with self._blocks.BlockDevice(target.device.node) as device:
            return [
                (sector, block)
                for start, count in known
                for sector in range(start, start + count, block)
                if not _reads(device, sector, block)
            ]

    def find_files(self, name: str, report: RemapReport, timeout: float = 60) -> None:
        """Find out whom the lost sectors of a finished remap belonged to; never an error.

        Call it without the target's lock, because it may take long.

        Args:
            name: the target.
            report: its `files` are filled in.
            timeout: seconds after which it gives up.
        """
        report.files = files.owners(f"/dev/mapper/{check_name(name)}", report.lost, timeout)

    def _remap(
        self,
        target: ActiveTarget,
        plan: Plan,
        patience: Patience | None,
        avoid: Sequence[tuple[int, int]],
    ) -> RemapReport:
        name, metadata = plan.name, target.metadata
        if not plan.placed:
            return RemapReport(planner.remap_actions(target, (), ()))
        if target.main is None:
            raise AssertionError("a target with chunks to remap has a main")
        begun = time.monotonic()
        self._check_frozen_name(target)
        works: list[_Work] = []
        self._drop_statistics(name)
        with self._mapper.events() as events, contextlib.ExitStack() as stack:
            stack.callback(self._drop_statistics, name)
            main = stack.enter_context(self._blocks.BlockDevice(target.main.path))
            spares = {
                spare.index: stack.enter_context(
                    self._blocks.BlockDevice(self._blocks.node_of(spare.devno), writable=True)
                )
                for spare in target.spares
            }
            for extent in plan.placed:
                works.append(self._salvage_chunk(metadata, name, extent, main, patience))
                self._step("salvaged")
            _confirm_losses(main, works, target.main)
            members = self._open_members(stack, plan.spares)
            self._write_chunks(works, target, spares, members, avoid)
            self._step("data_flushed")
            salvage_seconds = time.monotonic() - begun

            # What can be checked and packed before the pause does not prolong it.
            new = self._next(metadata, works)
            commit = copies.prepare_commit(members, metadata, new)

            chunks = [work.extent.logical for work in works]
            stack.enter_context(self._guarded(name))
            paused = time.monotonic()
            try:
                self._freeze(target, chunks, events)
                if self._catch_up(works, metadata, name, main, spares):
                    new = self._next(metadata, works)
                    commit = copies.prepare_commit(members, metadata, new)
                commit.write(self._step)
                self._step("committed")
                self._thaw(target, new, chunks, events)
            except BaseException:
                # Only the metadata on the spares can say now where the chunks are.
                self._end_freeze(name)
                raise
            pause_seconds = time.monotonic() - paused
            self._verify(name, works, metadata)
        self._backup(new)
        return RemapReport(
            plan=planner.remap_actions(target, *_outcome(works)),
            chunks=[_report(work) for work in works],
            salvage_seconds=salvage_seconds,
            pause_seconds=pause_seconds,
        )

    def _check_frozen_name(self, target: ActiveTarget) -> None:
        name = _frozen_name(target.device.name)
        if self._mapper.info(name) and not self._frozen(target.device):
            raise Refused(
                "is a mapped device of something else, whose name the remap needs",
                device=f"/dev/mapper/{name}",
                remedy="rename or remove that device",
            )

    def _salvage_chunk(
        self,
        metadata: Metadata,
        name: str,
        extent: Extent,
        main: OpenDevice,
        patience: Patience | None,
    ) -> _Work:
        chunk_sectors = metadata.config["chunk_sectors"]
        block_sectors = metadata.config["block_sectors"]
        start = extent.logical * chunk_sectors
        length = min(chunk_sectors, metadata.config["main"]["sectors"] - start)
        self._progress(f"salvage chunk {extent.logical} of {name}")
        # Counting writes from before the first read tells which blocks have changed since.
        region = self._mapper.message(
            name, f"@stats_create {start}+{length} {block_sectors} {_STATS_PROGRAM}"
        ).strip()
        return _Work(
            extent=extent,
            start=start,
            length=length,
            region=region,
            salvage=salvage(main, start, length, block_sectors, patience),
        )

    def _write_chunks(
        self,
        works: Sequence[_Work],
        target: ActiveTarget,
        spares: Mapping[int, OpenDevice],
        members: Mapping[int, OpenDevice],
        avoid: Sequence[tuple[int, int]],
    ) -> None:
        """Write what was read, and flush; chunks get other places where theirs will not do.

        A place that is bad itself, or that has old data where a lost sector must read as an error,
        is passed over, and a spare that fails is not used.

        Args:
            works: the chunks with their first places.
            target: the target.
            spares: its open integrity devices by index of the spare.
            members: the spares themselves, open, by index.
            avoid: pairs of spare index and chunk that must not be used.
        """
        metadata = target.metadata
        usable = planner.usable_geometries(target)
        shunned = list(avoid)
        faults: dict[int, OSError] = {}
        bad_places: Counter[int] = Counter()
        pending = list(works)
        while pending:
            dirty = []
            for work in pending:
                index = work.extent.spare
                if index not in usable:
                    continue
                try:
                    _try_place(work, members[index], usable[index])
                except OSError as error:
                    faults[index] = error
                    dirty.append(work)
                    shunned.append((index, work.extent.physical))
                    bad_places[index] += 1
                    if bad_places[index] == _BAD_PLACES or error.errno not in MEDIUM_ERRORS:
                        usable.pop(index)
                    continue
                try:
                    if not _write_chunk(work, spares[index], metadata):
                        dirty.append(work)
                        shunned.append((index, work.extent.physical))
                except OSError as error:
                    faults[index] = error
                    usable.pop(index)
            for index in {work.extent.spare for work in works} & set(usable):
                try:
                    spares[index].flush()
                except OSError as error:
                    faults[index] = error
                    usable.pop(index)
            pending = [w for w in works if w in dirty or w.extent.spare not in usable]
            settled = [work.extent for work in works if work not in pending]
            try:
                placed = pool.allocate(
                    [work.extent.logical for work in pending],
                    usable,
                    [*metadata.extents, *settled],
                    shunned,
                )
            except Refused as error:
                for spare in target.spares:
                    if spare.index in faults:
                        raise DmRemapError(
                            f"cannot be written: {faults[spare.index]}",
                            device=spare.candidate.info.path,
                            remedy="nothing was changed; copy the data to another disk",
                        ) from error
                raise
            for work, extent in zip(pending, placed):
                work.extent = extent

    def _freeze(self, target: ActiveTarget, chunks: Sequence[int], events: Any) -> None:
        """Hold all I/O to ``chunks`` on a device of their own, and let the rest of it flow.

        A flush to the target waits too, because device-mapper sends it to every segment.
        """
        if target.main is None:
            raise AssertionError("a target with chunks to remap has a main")
        name, metadata, frozen = (
            target.device.name,
            target.metadata,
            _frozen_name(target.device.name),
        )
        chunk_sectors = metadata.config["chunk_sectors"]
        sectors = metadata.config["main"]["sectors"]
        on_main = {chunk: (target.main.devno, chunk * chunk_sectors) for chunk in chunks}
        self._mapper.create_unannounced(
            frozen,
            f"{_dm_uuid(metadata)}-frozen",
            mapping.frozen_table(chunks, sectors, chunk_sectors, on_main),
        )
        self._step("frozen_created")
        self._mapper.suspend(frozen)
        self._step("frozen_suspended")
        device = self._existing(frozen)
        table = mapping.build_table(
            sectors,
            chunk_sectors,
            target.main.devno,
            metadata.extents,
            {spare.index: spare.devno for spare in target.spares},
            {chunk: position for position, chunk in enumerate(chunks)},
            device.devno,
        )
        self._mapper.load(name, table)
        self._step("freeze_loaded")
        self._mapper.swap(name, events)
        self._step("frozen")

    def _catch_up(
        self,
        works: Sequence[_Work],
        metadata: Metadata,
        name: str,
        main: OpenDevice,
        spares: Mapping[int, OpenDevice],
    ) -> bool:
        """Copy the blocks that were written since they were read; nobody can write them now.

        Returns whether a block that was lost could be read after all.
        """
        touched, found = set(), False
        for work in works:
            place, block = _spare_sector(work, metadata), work.salvage.block_sectors
            for index in self._written_blocks(name, work.region):
                try:
                    data = main.read(work.start + index * block, block)
                except OSError as error:
                    if error.errno not in MEDIUM_ERRORS:
                        raise _failure(main, error) from error
                    # An acknowledged write is not lost by one failing read; and where the block
                    # was read before, the spare holds an older version that must never be seen.
                    raise _Dirty([(work.extent.spare, work.extent.physical)]) from error
                found = found or work.salvage.outcomes[index] is Outcome.LOST
                work.salvage.keep(index, data, Outcome.FIRST_READ)
                spare = spares[work.extent.spare]
                try:
                    spare.write(place + index * block, data)
                except OSError as error:
                    raise _failure(spare, error) from error
                touched.add(work.extent.spare)
        for index in touched:
            try:
                spares[index].flush()
            except OSError as error:
                raise _failure(spares[index], error) from error
        self._step("caught_up")
        return found

    def _written_blocks(self, name: str, region: str, begun: bool = False) -> list[int]:
        """Blocks of the region that were written, or with ``begun`` are perhaps being written."""
        # Each line is "start+length" and counters; the fifth counter is "writes completed", the
        # ninth "I/Os in progress" (Linux: Documentation/admin-guide/device-mapper/statistics.rst
        # and Documentation/admin-guide/iostats.rst).
        lines = self._mapper.message(name, f"@stats_print {region}").splitlines()
        counters = [list(map(int, line.split()[1:10])) for line in lines]
        return [i for i, row in enumerate(counters) if row[4] or (begun and row[8])]

    def _next(self, metadata: Metadata, works: Sequence[_Work]) -> Metadata:
        successor = metadata.successor(time.time_ns(), host_id=host_id())
        return planner.with_remaps(successor, *_outcome(works))

    def _open_members(
        self, stack: contextlib.ExitStack, spares: Mapping[int, DeviceInfo]
    ) -> dict[int, OpenDevice]:
        return {
            index: stack.enter_context(self._blocks.BlockDevice(info.path, writable=True))
            for index, info in spares.items()
        }

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Keep a process that ends the freeze of target ``name`` if this one dies in the block.

        It has the target's lock too, so nobody else gets it before the freeze has ended.
        """
        if not self._guard:
            yield
            return
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setsid()
                os.close(theirs)
                _lock_memory()
                # The end of the pipe without a word is the end of the other process.
                if not os.read(ours, 1):
                    self._end_freeze(name)
                code = 0
            finally:
                os._exit(code)
        os.close(ours)
        try:
            yield
        finally:
            if not self._still_frozen(name):
                # A guard that was killed itself does not matter any more.
                with contextlib.suppress(BrokenPipeError):
                    os.write(theirs, b".")
            os.close(theirs)
            os.waitpid(child, 0)

    def _still_frozen(self, name: str) -> bool:
        try:
            device = self._frozen(self._existing(name))
        except DmRemapError:
            return True
        return device is not None and device.suspended

    def _end_freeze(self, name: str) -> None:
        """End a freeze that was interrupted, as the metadata on the spares has it."""
        frozen = self._frozen(self._existing(name))
        if frozen is None:
            return
        try:
            target = self.require(name)
            chunk_sectors = target.metadata.config["chunk_sectors"]
            chunks = _held_chunks(target, frozen.devno, chunk_sectors)
            on_main = [c for c in chunks if extents.find(target.metadata.extents, c) is None]
            if on_main and target.choice.missing:
                # A newer generation may be there, and would later show the chunks' old data.
                raise DmRemapError(
                    f"spares {list(target.choice.missing)} cannot be read, and may have a newer "
                    f"generation that says where chunks {on_main} are",
                    device=name,
                    remedy="attach the spares again; until then these chunks fail",
                )
            # A generation that was begun must be on all copies before its mapping is used.
            for action in planner.plan_upkeep(target).actions:
                if action.kind == "repair_metadata":
                    self._do_repair_metadata(planner.plan_upkeep(target), action)
            with self._mapper.events() as events:
                self._thaw(target, target.metadata, chunks, events)
        except BaseException:
            self._fail_frozen(name)
            raise

    def _fail_frozen(self, name: str) -> None:
        """Let I/O to frozen chunks fail, because nobody knows where they are and none may hang.

        The frozen device stays, so the next plan tries again to end the freeze.
        """
        frozen = _frozen_name(name)
        device = self._frozen(self._existing(name))
        if device is None or not device.suspended:
            return
        held = self._mapper.table(frozen)
        table = [Segment(s.start, s.length, "error", "") for s in held]
        # Where no other sector of main is in use, this is how the next plan knows main.
        end = sum(segment.length for segment in held)
        known = [s for s in held if s.target == "linear"][:1]
        table += [replace(s, start=end) for s in known]
        self._mapper.load(frozen, table)
        self._mapper.swap(frozen)

    def _thaw(
        self, target: ActiveTarget, metadata: Metadata, chunks: Sequence[int], events: Any
    ) -> None:
        """Let I/O to the frozen ``chunks`` go to where ``metadata`` has them."""
        name, frozen = target.device.name, _frozen_name(target.device.name)
        chunk_sectors = metadata.config["chunk_sectors"]
        sectors = metadata.config["main"]["sectors"]
        spares = {spare.index: spare.devno for spare in target.spares}
        main = self._main_of(target, frozen)
        if chunks:
            places = {
                chunk: _place(metadata, chunk, main, spares, chunk_sectors) for chunk in chunks
            }
            self._mapper.load(frozen, mapping.frozen_table(chunks, sectors, chunk_sectors, places))
        self._step("thaw_loaded")
        self._mapper.swap(frozen)
        self._step("thawed")
        table = mapping.build_table(sectors, chunk_sectors, main, metadata.extents, spares)
        self._mapper.load(name, table)
        self._mapper.swap(name, events)
        self._step("swapped")
        self._mapper.remove_unannounced(frozen)
        self._step("frozen_removed")

    def _main_of(self, target: ActiveTarget, frozen: str) -> str:
        if target.main:
            return str(target.main.devno)
        own = {spare.devno for spare in target.spares}
        below = [d for d in self._mapper.dependencies(frozen) if d not in own]
        if not below:
            raise DmRemapError("its main is not known", device=target.device.name)
        return str(below[0])

    def _verify(self, name: str, works: Sequence[_Work], metadata: Metadata) -> None:
        """Read the chunks through the target: saved blocks as saved, lost ones as errors."""
        device_info = self._existing(name)
        wrong = []
        with self._blocks.BlockDevice(device_info.node) as device:
            for work in works:
                block = work.salvage.block_sectors
                for index, outcome in enumerate(work.salvage.outcomes):
                    try:
                        data: bytes | None = device.read(work.start + index * block, block)
                    except OSError:
                        data = None
                    expected = None if outcome is Outcome.LOST else work.salvage.block(index)
                    if data != expected:
                        wrong.append((work, index))
        written = {
            (work.region, index)
            for work in {id(w): w for w, _unused in wrong}.values()
            # dm-integrity shows a synchronous write before it completes it.
            for index in self._written_blocks(name, work.region, begun=True)
        }
        bad = [
            work.start + i * work.salvage.block_sectors
            for work, i in wrong
            if (work.region, i) not in written
        ]
        if bad:
            raise DmRemapError(
                f"sectors {bad} read differently after the remap than before",
                device=f"/dev/mapper/{name}",
                remedy="stop using the target and check the spare's health",
            )
        self._step("verified")

    def _drop_statistics(self, name: str) -> None:
        # Also those that an interrupted remap left behind.
        for line in self._mapper.message(name, f"@stats_list {_STATS_PROGRAM}").splitlines():
            region = line.partition(":")[0].strip()
            if region.isdigit():
                self._mapper.message(name, f"@stats_delete {region}")

    def _backup(self, metadata: Metadata) -> None:
        """Keep the metadata on the host too; a backup that fails costs no remap."""
        folder = os.path.join(self._backup_dir, str(metadata.target_uuid))
        index = next(i for i, spare in enumerate(metadata.config["spares"]) if spare)
        raw = pack_slot(
            metadata,
            spare_uuid_of(metadata, index),
            geometry_of(metadata, index).spare_sectors,
            copy_index=0,
        )
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            path = os.path.join(folder, f"{metadata.generation:020d}.slot")
            with open(path + ".new", "wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            os.replace(path + ".new", path)
            for old in sorted(os.listdir(folder))[:-BACKUPS_KEPT]:
                os.unlink(os.path.join(folder, old))
        except OSError as error:
            self._progress(f"no backup in {folder}: {error}")


def host_id() -> uuid.UUID:
    """What names this host in metadata and events, or zero where it has no machine id."""
    try:
        return hashed_machine_id()
    except (OSError, ValueError):
        return uuid.UUID(int=0)


def request_seen(engine: Engine, request: Request) -> Seen:
    """Observe what ``request`` names."""
    return engine.see(request.name, request.main, request.spares)


def _dm_uuid(metadata: Metadata) -> str:
    return UUID_PREFIX + metadata.target_uuid.hex


def _data_name(name: str, index: int) -> str:
    return spare_name(name, index) + "-data"


def _tags_name(name: str, index: int) -> str:
    return spare_name(name, index) + "-tags"


def _frozen_name(name: str) -> str:
    return name + "-frozen"


def _metadata_of(plan: Plan) -> Metadata:
    if plan.metadata is None:
        raise AssertionError("only plans with metadata have such actions")
    return plan.metadata


def _index_of(plan: Plan, path: str) -> int:
    return next(index for index, info in plan.spares.items() if info.path == path)


def _spare_sector(work: _Work, metadata: Metadata) -> int:
    return int(work.extent.physical * metadata.config["chunk_sectors"])


def _held_chunks(target: ActiveTarget, frozen: str, chunk_sectors: int) -> list[int]:
    """Chunks that the live table holds on the frozen device, in the order of their positions."""
    positions = {}
    for segment in target.table:
        if segment.target != "linear":
            continue
        device, offset = mapping.linear_target(segment)
        if device == frozen:
            for step in range(0, segment.length, chunk_sectors):
                positions[(offset + step) // chunk_sectors] = (
                    segment.start + step
                ) // chunk_sectors
    return [positions[position] for position in sorted(positions)]


def _place(
    metadata: Metadata, chunk: int, main: str, spares: Mapping[int, str], chunk_sectors: int
) -> tuple[str, int]:
    extent = extents.find(metadata.extents, chunk)
    if extent is None:
        return main, chunk * chunk_sectors
    offset = (extent.physical + chunk - extent.logical) * chunk_sectors
    return spares.get(extent.spare, ""), offset


def _try_place(work: _Work, member: OpenDevice, geometry: Geometry) -> None:
    """Check that the chunk's place on the spare itself takes its data and gives it back.

    dm-integrity acknowledges a write when it is in its journal. If the place below then turns out
    bad, it fails all I/O to the whole spare (`dm_integrity_io_error` in drivers/md/dm-integrity.c),
    so the place is tried first. Without its tag the data does not become readable by that.

    Raises:
        OSError: the place is bad.
    """
    place, block = geometry.chunk_sector(work.extent.physical), work.salvage.block_sectors
    for first, count in work.salvage.readable:
        data = b"".join(work.salvage.block(first + i) for i in range(count))
        member.write(place + first * block, data)
        if member.read(place + first * block, count * block) != data:
            raise OSError(errno.EIO, "gives back other data than was written", member.name)
    for first, count in work.salvage.runs(Outcome.LOST):
        # What is lost may be written later, so its place must work too.
        member.read(place + first * block, count * block)


def _write_chunk(work: _Work, device: OpenDevice, metadata: Metadata) -> bool:
    """Write what was read of a chunk; whether its lost blocks read as errors on the spare."""
    place, block = _spare_sector(work, metadata), work.salvage.block_sectors
    for first, count in work.salvage.readable:
        data = b"".join(work.salvage.block(first + i) for i in range(count))
        device.write(place + first * block, data)
    return not any(
        _reads(device, place + (first + i) * block, block)
        for first, count in work.salvage.runs(Outcome.LOST)
        for i in range(count)
    )


def _failure(device: OpenDevice, error: OSError) -> DmRemapError:
    return DmRemapError(
        f"fails with {error.strerror or error}",
        device=device.name,
        remedy="check that it is attached and powered; nothing was changed",
    )


def _reads(device: OpenDevice, sector: int, count: int) -> bool:
    try:
        device.read(sector, count)
    except OSError as error:
        if error.errno in MEDIUM_ERRORS:
            return False
        raise
    return True


def _confirm_losses(main: OpenDevice, works: Sequence[_Work], info: DeviceInfo) -> None:
    """Believe in losses only on a disk that answers before and after one more read of each.

    A disk or path that went away for a while fails reads like bad blocks do.
    """
    _check_alive(main, works, info)
    for work in works:
        work.salvage.read_again(main)
    _check_alive(main, works, info)


def _check_alive(main: OpenDevice, works: Sequence[_Work], info: DeviceInfo) -> None:
    lost = [item for work in works for item in work.salvage.lost]
    if lost and not answers(main, lost, info.block_sectors):
        raise DmRemapError(
            "reads fail everywhere, so it is the disk or its path and not a bad sector",
            device=info.path,
            remedy="check its cable, power and controller; nothing was changed",
        )


def _outcome(works: Sequence[_Work]) -> tuple[list[Extent], list[tuple[int, int]]]:
    """The new extents, and the sectors that are lost."""
    return [work.extent for work in works], [item for w in works for item in w.salvage.lost]


def _report(work: _Work) -> RemappedChunk:
    return RemappedChunk(
        chunk=work.extent.logical,
        start=work.start,
        count=work.length,
        spare=work.extent.spare,
        spare_chunk=work.extent.physical,
        recovered_first_read=work.salvage.count(Outcome.FIRST_READ),
        recovered_on_retry=work.salvage.count(Outcome.RETRY),
        lost=work.salvage.lost,
    )


def _lock_memory() -> None:
    """Keep this process in memory: its pages may live on the disk whose flushes will wait."""
    ctypes.CDLL(None, use_errno=True).mlockall(_MCL_CURRENT | _MCL_FUTURE)
