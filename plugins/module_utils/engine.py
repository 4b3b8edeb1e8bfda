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
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import IO, Any, Protocol

from . import blockdev, copies, extents, mapping, planner, pool, replacement, replacing, stack
from .blockdev import SECTOR_BYTES, DeviceInfo
from .devmapper import DeviceMapper, MappedDevice, Segment, check_name
from .errors import DmRemapError, Refused
from .events import hashed_machine_id, intersect_ranges
from .format import Extent, Geometry, Metadata, geometry_of, pack_slot, spare_uuid_of
from .freezing import FREEZE_SECONDS, Freezer, held_chunks, is_parked
from .planner import ActiveSpare, ActiveTarget, Candidate, Plan, Request, Seen
from .probing import MEDIUM_ERRORS, answers
from .salvage import Outcome, Patience, Salvage, salvage

LOCK_DIR = "/run/dm-remap"
BACKUP_DIR = "/var/lib/dm-remap/backup"
BACKUPS_KEPT = 16
# How long the kernel holds failed I/O that nobody heals.
HOLD_SECONDS = 120

# The daemon's reflex holds a lock on this file in the lock folder while it runs.
HEALER_LOCK = ".healer.lock"

_KERNEL_TARGETS = ("integrity", "delay", "multipath")
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

    def links_to(self, devno: str) -> list[str]:
        """Paths of the device that outlive a restart, the best first."""

    def nodes_of_size(self, sizes: Collection[int]) -> list[str]:
        """Nodes of the devices that have one of these sizes in sectors."""

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

    def status(self, name: str) -> list[Segment]:
        """Its live status."""

    def arm_queue_timeout(self, seconds: int) -> int:
        """Set the kernel's limit for held I/O, unless it has one."""

    def create(self, name: str, uuid: str, segments: Iterable[Segment], private: bool) -> None:
        """Create a mapped device and wait for udev."""

    def create_unannounced(self, name: str, uuid: str, segments: Iterable[Segment]) -> None:
        """Create one without waiting."""

    def load(self, name: str, segments: Iterable[Segment]) -> None:
        """Load an inactive table."""

    def swap(self, name: str, events: Any = ...) -> None:
        """Make it live, and resume."""

    def clear(self, name: str) -> None:
        """Drop the inactive table."""

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
        salvage_seconds: reading main and writing spares.
        pause_seconds: how long I/O to the chunks had to wait.
        seconds: all of it.
    """

    plan: Plan
    chunks: list[RemappedChunk] = field(default_factory=list)
    lost_before: list[tuple[int, int]] = field(default_factory=list)
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


@dataclass(frozen=True)
class Disks:
    """Open devices of a target.

    Args:
        main: main.
        spares: its spares' integrity devices.
        members: the spares themselves.
        new_main: what is to replace main, while that is under way.
    """

    main: OpenDevice
    spares: Mapping[int, OpenDevice]
    members: Mapping[int, OpenDevice]
    new_main: OpenDevice | None = None

    def main_of(self, metadata: Metadata, chunk: int) -> OpenDevice:
        """The main that a chunk without an extent is on."""
        if self.new_main and chunk < replacement.copied_chunks(metadata):
            return self.new_main
        return self.main


@dataclass(frozen=True)
class Moved:
    """What a move did.

    Args:
        metadata: the generation afterwards.
        chunks: what became of the chunks that were moved.
        extents: where they are now, one extent each.
        salvage_seconds: until all was read and is on the spares.
        pause_seconds: how long I/O to the chunks had to wait.
    """

    metadata: Metadata
    chunks: list[RemappedChunk]
    extents: list[Extent]
    salvage_seconds: float
    pause_seconds: float

    @property
    def lost(self) -> list[tuple[int, int]]:
        """Sectors that were lost, as (first, count) on the target."""
        return [item for chunk in self.chunks for item in chunk.lost]


@dataclass(eq=False)
class _Work:
    """A chunk on its way to a spare, whose extent is known when it has a place."""

    chunk: int
    start: int
    length: int
    salvage: Salvage
    place: Extent | None = None

    @property
    def extent(self) -> Extent:
        """Where the chunk goes."""
        if self.place is None:
            raise AssertionError("the chunk has no place yet")
        return self.place


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
        self._freezer = Freezer(self._mapper, self._step)

    # Observation

    def check_host(self) -> None:
        """Check that this process may use device-mapper and that the kernel has what is needed.

        Raises:
            Refused: not root.
            MissingKernelFeature: no device-mapper, or one of its targets is missing.
        """
        if os.geteuid() != 0:
            raise Refused("only root can do this", remedy="become root")
        known = self._mapper.kernel_targets()
        for target in _KERNEL_TARGETS:
            if target not in known:
                subprocess.run(["modprobe", f"dm-{target}"], capture_output=True, check=False)
        self._mapper.check_available(("linear", *_KERNEL_TARGETS))

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold the lock of target ``name``, waiting for whoever has it."""
        with self._lock(check_name(name) + ".lock"):
            yield

    @contextlib.contextmanager
    def try_locked(self, name: str) -> Iterator[bool]:
        """Hold the lock of target ``name`` if nobody else has it; whether that is so."""
        with self._lock_file(check_name(name) + ".lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    @contextlib.contextmanager
    def locked_host(self) -> Iterator[None]:
        """Hold the lock under which devices get new owners; take it before a target's lock."""
        # No target can be called like this file.
        with self._lock(".host.lock"):
            yield

    @contextlib.contextmanager
    def healing(self) -> Iterator[None]:
        """Show that this process heals held I/O while the block runs.

        Raises:
            Refused: another process does.
        """
        with self._lock_file(HEALER_LOCK) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Refused(
                    "is held by another process that heals I/O on this host",
                    device=file.name,
                    remedy="stop the other dm-remapd",
                ) from error
            yield

    @contextlib.contextmanager
    def copying(self, name: str) -> Iterator[None]:
        """Show that this process copies target ``name`` to another main while the block runs.

        Two of them would overwrite what applications have written to the new main with what one of
        them had read before.

        Raises:
            Refused: another process does.
        """
        with self._lock_file(check_name(name) + ".copy.lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Refused(
                    "is being copied to another main by another process",
                    device=name,
                    remedy="wait for it, or end it; a copy that was ended can go on or back",
                ) from error
            yield

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with self._lock_file(name) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _lock_file(self, name: str) -> IO[str]:
        os.makedirs(self._lock_dir, mode=0o755, exist_ok=True)
        return open(os.path.join(self._lock_dir, name), "w", encoding="ascii")  # noqa: SIM115

    def target_names(self) -> list[str]:
        """Names of the active targets."""
        found = []
        for name in sorted(self._mapper.names()):
            info = self._mapper.info(name)
            if info and info.live_table and stack.TARGET_UUID.match(info.uuid):
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
        if not stack.TARGET_UUID.match(device.uuid):
            raise Refused(
                "is a mapped device of something else",
                device=f"/dev/mapper/{name}",
                remedy="choose another name",
            )
        spares = self._active_spares(device)
        if not spares:
            raise DmRemapError(
                "is active without any spare",
                device=f"/dev/mapper/{name}",
                remedy="stop what uses it, remove it with dmsetup, and run the target module again",
            )
        choice = copies.choose({s.candidate.info.path: s.candidate.survey for s in spares})
        upper, path = self._map_of(device)
        table = tuple(self._mapper.table(upper.name))
        shim = self._part(device, stack.shim_name(name))
        frozen = self._part(device, stack.frozen_name(name))
        new_main = self._part(device, stack.new_main_name(name))
        used = {mapping.linear_target(s)[0] for s in table if s.target == "linear"}
        own = {spare.devno for spare in spares}
        own |= {part.devno for part in (shim, frozen, new_main) if part}
        new = None
        if new_main and new_main.live_table:
            new = self._blocks.describe(self._below(new_main.name))
        if replacement.under_way(choice.metadata) and new is None:
            raise DmRemapError(
                "its main is being replaced, but the new one is not where it was put",
                device=f"/dev/mapper/{name}",
                remedy="stop what uses the target, remove it with dmsetup, and run the target "
                "module again",
            )
        mains = [devno for devno in used if devno not in own] or self._lower_mains(name, own)
        main = self._blocks.describe(self._blocks.node_of(mains[0])) if mains else None
        replaced = not replacement.under_way(choice.metadata)
        if new_main and new_main.devno in used and replaced:
            # All is on the new main, and the last commit has made it the main.
            main = new
        found = ActiveTarget(
            device=device,
            map=upper,
            table=table,
            main=main,
            spares=spares,
            choice=choice,
            path=path,
            shim=shim if shim and shim.devno in used else None,
            frozen=frozen if frozen and frozen.devno in used else None,
            replacement=None if replaced else new,
            new_main=None if replaced else new_main,
        )
        tidy = replacing.is_settled(self._mapper, found) and is_parked(self._mapper, found)
        return replace(found, tidy=bool(found.frozen) or tidy)

    def _map_of(self, device: MappedDevice) -> tuple[MappedDevice, stack.PathState | None]:
        """The device whose table is the map, and the state of the path that holds I/O above it."""
        hold = self._part(device, stack.hold_name(device.name))
        upper = self._part(device, stack.map_name(device.name))
        if hold is None or upper is None:
            return device, None
        if hold.devno not in self._mapper.dependencies(device.name):
            return device, None
        return upper, self.path_of(device.name)

    def _lower_mains(self, name: str, own: Collection[str]) -> list[str]:
        """Main's device number where only the shim or the freezing devices lead to it."""
        found = []
        for part in (stack.shim_name(name), stack.place_name(name)):
            device = self._mapper.info(part)
            if device and device.live_table:
                found += [d for d in self._mapper.dependencies(part) if d not in own]
        return found

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
        wanted = self._blocks.describe(main) if main else None
        new_main = None
        mains = [target.main, target.replacement] if target else []
        if main and wanted and target and wanted.devno not in [i.devno for i in mains if i]:
            new_main = self._candidate(main, with_signatures=True)
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
            main=wanted,
            candidates=tuple(candidates),
            healer=self.healer_runs(),
            new_main=new_main,
            others=() if target else tuple(self._other_mains(candidates)),
        )

    def _other_mains(self, candidates: Sequence[Candidate]) -> Iterator[DeviceInfo]:
        """Devices that may be a main of the replacement that an inactive target is in."""
        found = [copy.metadata for c in candidates for copy in c.survey.copies]
        newest = max(found, key=lambda metadata: metadata.generation, default=None)
        if newest is None or not replacement.under_way(newest):
            return
        under_way = newest.config["replacement"]
        entries = (newest.config["main"], under_way["main"])
        paths = [under_way["old_path"], under_way["main"]["path"]]
        sizes = {replacement.device_sectors(entry) for entry in entries}
        for path in (*paths, *self._blocks.nodes_of_size(sizes)):
            with contextlib.suppress(DmRemapError):
                yield self._blocks.describe(path)

    def healer_runs(self) -> bool:
        """Whether the daemon that heals held I/O runs on this host."""
        try:
            with open(os.path.join(self._lock_dir, HEALER_LOCK), encoding="ascii") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def _spares_of(self, name: str, remains: Sequence[str]) -> Iterator[str]:
        """Nodes of the spares that remaining devices of target ``name`` use."""
        for index in range(stack.MAX_SPARES):
            device = stack.data_name(name, index)
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
        for index in range(stack.MAX_SPARES):
            device = self._part(target, stack.spare_name(target.name, index))
            if device is None or not device.live_table:
                continue
            path = self._below(stack.data_name(target.name, index))
            candidate = self._candidate(path, with_signatures=False)
            found.append(ActiveSpare(index, device.devno, candidate))
        return tuple(found)

    def _below(self, name: str) -> str:
        """Node of the device under a linear one of ours."""
        return self._blocks.node_of(mapping.linear_target(self._mapper.table(name)[0])[0])

    def _part(self, target: MappedDevice, name: str) -> MappedDevice | None:
        """The target's own mapped device ``name``; somebody else's of that name is left alone."""
        device = self._mapper.info(name)
        own = stack.part_uuid(target.uuid, target.name, name)
        return device if device and device.uuid == own else None

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
        for part in stack.part_names(name):
            device = self._mapper.info(part)
            if device:
                head, suffix = device.uuid[: len(stack.UUID_PREFIX) + 32], part[len(name) :]
                yield part, bool(stack.TARGET_UUID.match(head)) and device.uuid == head + suffix

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
            (stack.tags_name(name, index), "tags", geometry.tag_start, geometry.tag_sectors),
            (stack.data_name(name, index), "data", geometry.data_start, geometry.data_sectors),
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
            stack.spare_name(name, index),
            f"{prefix}-spare{index}",
            [Segment(0, geometry.data_sectors, "integrity", params)],
            private=True,
        )

    def _do_deactivate_spare(self, plan: Plan, action: planner.Action) -> None:
        index = _index_of(plan, action.device)
        for name in (
            stack.spare_name(plan.name, index),
            stack.data_name(plan.name, index),
            stack.tags_name(plan.name, index),
        ):
            self._mapper.remove(name)

    def _do_commit_metadata(self, plan: Plan, action: planner.Action) -> None:
        draft = replace(_metadata_of(plan), timestamp_ns=time.time_ns(), host_id=host_id())
        with contextlib.ExitStack() as stack:
            copies.commit(self._open_members(stack, plan.spares), None, draft, step=self._step)
        self.backup(draft)

    def _do_repair_metadata(self, plan: Plan, action: planner.Action) -> None:
        surveys = {}
        for info in plan.spares.values():
            with self._blocks.BlockDevice(info.path) as device:
                surveys[info.path] = copies.survey(device)
        index = _index_of(plan, action.device)
        spare_uuid = spare_uuid_of(_metadata_of(plan), index)
        with self._blocks.BlockDevice(action.device, writable=True) as device:
            copies.repair(device, copies.choose(surveys), spare_uuid)

    def _do_wipe_main(self, plan: Plan, action: planner.Action) -> None:
        self._blocks.erase_signatures(action.device)
        self._wipe_copies(action.device)

    def _do_create_target(self, plan: Plan, action: planner.Action) -> None:
        if plan.main is None:
            raise AssertionError("a plan that creates a target has a main")
        name, metadata, main = plan.name, _metadata_of(plan), plan.main
        spares = {
            index: self._existing(stack.spare_name(name, index)).devno for index in plan.spares
        }
        upper_main, flushed = main.devno, ""
        if planner.shim_of(metadata) == planner.RAID_SHIM:
            upper_main = self._create_part(
                metadata,
                name,
                stack.shim_name(name),
                stack.shim_table(metadata.config["main"]["sectors"], main.devno),
            )
            flushed = main.devno
        new_main = ""
        if plan.replacement:
            new_main = self._create_new_main(plan)
            self._create_parked(metadata, name, main.devno)
        table = planner.map_table(metadata, upper_main, spares, flushed, new_main=new_main)
        if metadata.config["on_error"] == planner.HOLD:
            table = self._create_hold(metadata, name, table)
        self._mapper.create(name, _dm_uuid(metadata), table, private=False)

    def _create_new_main(self, plan: Plan) -> str:
        """Create the device over the new main; its device number."""
        if plan.replacement is None:
            raise AssertionError("only for plans with a new main")
        metadata = _metadata_of(plan)
        return self._create_part(
            metadata,
            plan.name,
            stack.new_main_name(plan.name),
            stack.whole_table(metadata.config["main"]["sectors"], plan.replacement.devno),
        )

    def _create_parked(self, metadata: Metadata, name: str, carrier: str) -> None:
        """Create the freezing devices, which hold the old main when the map does not use it."""
        place = self._create_part(
            metadata, name, stack.place_name(name), stack.place_table([], carrier)
        )
        table = stack.whole_table(stack.CARRIER_SECTORS, place)
        self._create_part(metadata, name, stack.frozen_name(name), table)

    def _do_replace_main(self, plan: Plan, action: planner.Action) -> None:
        """Begin the replacement, unless it has begun; `replace_main` carries it on."""
        target = self.require(plan.name)
        if target.replacement or plan.replacement is None or target.main is None:
            return
        self._check_freezing_names(target)
        self._create_new_main(plan)
        self._step("new_main_created")
        paths = [self._lasting_path(info) for info in (plan.replacement, target.main) if info]
        config = replacement.begun(target.metadata.config, plan.replacement, *paths)
        self._commit_config(target, config)

    def _lasting_path(self, info: DeviceInfo) -> str:
        if replacement.lasts(info.path):
            return info.path
        return next(iter(self._blocks.links_to(info.devno)), info.path)

    def _do_undo_replacement(self, plan: Plan, action: planner.Action) -> None:
        """Nothing has to be begun; `replace_main` does it all."""

    def replace_main(
        self,
        name: str,
        undo: bool = False,
        pace: replacing.Pace | None = None,
        patience: Patience | None = None,
    ) -> replacing.Result:
        """Carry a replacement that was begun to its end, or back; holds the lock in steps only.

        Args:
            name: the target; the caller does not hold its lock.
            undo: go back to the old main.
            pace: how fast to copy, and in which steps.
            patience: how hard to try to read failing blocks.

        Raises:
            Refused: another process copies it.
            DmRemapError: a step failed; the target is as its metadata says, and another call goes
                on from there.
        """
        _lock_memory()
        tools = replacing.Tools(self._mapper, self._freezer, self._guarded, self._end_freeze)
        copy = replacing.Replacing(
            self, tools, self._step, self._progress, pace, patience or Patience()
        )
        with self.copying(name):
            return copy.run(name, undo)

    def successor(self, metadata: Metadata) -> Metadata:
        """The next generation, from this host and now, with nothing else changed."""
        return metadata.successor(time.time_ns(), host_id=host_id())

    def commit_next(self, target: ActiveTarget, disks: Disks, new: Metadata) -> None:
        """Commit the next generation of a target whose devices are open."""
        copies.commit(disks.members, target.metadata, new, self._step)

    def finish_replacement(self, target: ActiveTarget, config: dict[str, Any]) -> None:
        """Commit the configuration after a replacement, and leave nothing of it in the kernel."""
        self._commit_config(target, config)
        target = self.require(target.name)
        self._settle(target)
        target = self.require(target.name)
        if planner.shim_of(target.metadata) == planner.RAID_SHIM and target.shim is None:
            self._insert_shim(target)

    def _settle(self, target: ActiveTarget) -> None:
        """Remove from the kernel what an ended replacement or a freeze has left there."""
        part = stack.new_main_name(target.name)
        new_main = self._part(target.device, part)
        used = self._mapper.dependencies(target.map.name)
        if new_main and target.replacement is None and new_main.devno in used:
            self._swap_map(target, target.map_table(target.metadata))
            self._step("new_main_direct")
        self._freezer.park(target)
        for left in replacing.leftovers(self._mapper, target):
            self._mapper.remove(left)
            self._step("leftover_removed")

    def _create_part(
        self, metadata: Metadata, name: str, part: str, table: Sequence[Segment]
    ) -> str:
        """Create a device that only the target uses; its device number."""
        self._mapper.create(
            part, stack.part_uuid(_dm_uuid(metadata), name, part), table, private=True
        )
        return self._existing(part).devno

    def _create_hold(
        self, metadata: Metadata, name: str, table: Sequence[Segment]
    ) -> list[Segment]:
        """Create the map, and above it what holds failed I/O; the table for the target."""
        self._mapper.arm_queue_timeout(HOLD_SECONDS)
        sectors = metadata.config["main"]["sectors"]
        upper = self._create_part(metadata, name, stack.map_name(name), table)
        hold = self._create_part(
            metadata, name, stack.hold_name(name), stack.hold_table(sectors, upper)
        )
        return stack.whole_table(sectors, hold)

    def _do_remove_target(self, plan: Plan, action: planner.Action) -> None:
        target = self._existing(plan.name)
        # A copy that goes on would write to a disk that is not the target's any more.
        with self.copying(plan.name):
            self._mapper.remove(plan.name)
        self._remove_parts(
            target,
            stack.hold_name(plan.name),
            stack.map_name(plan.name),
            stack.frozen_name(plan.name),
            stack.place_name(plan.name),
            stack.shim_name(plan.name),
            stack.new_main_name(plan.name),
        )

    def _remove_parts(self, target: MappedDevice, *parts: str) -> None:
        for part in parts:
            if self._part(target, part):
                self._mapper.remove(part)

    def _do_thaw(self, plan: Plan, action: planner.Action) -> None:
        self._end_freeze(plan.name)

    def _do_tidy(self, plan: Plan, action: planner.Action) -> None:
        self._settle(self.require(plan.name))

    def _do_update_config(self, plan: Plan, action: planner.Action) -> None:
        self._commit_config(self.require(plan.name), _metadata_of(plan).config)

    def _commit_config(self, target: ActiveTarget, config: dict[str, Any]) -> None:
        new = replace(self.successor(target.metadata), config=config)
        infos = {spare.index: spare.candidate.info for spare in target.spares}
        with contextlib.ExitStack() as members:
            copies.commit(self._open_members(members, infos), target.metadata, new, step=self._step)
        self.backup(new)

    def _do_hold_errors(self, plan: Plan, action: planner.Action) -> None:
        target = self.require(plan.name)
        # What an interrupted switch left stands under nothing.
        self._remove_parts(target.device, stack.hold_name(plan.name), stack.map_name(plan.name))
        table = self._create_hold(target.metadata, plan.name, target.table)
        self._mapper.load(plan.name, table)
        with self._mapper.events() as events:
            self._mapper.swap(plan.name, events)

    def _do_pass_errors(self, plan: Plan, action: planner.Action) -> None:
        target = self.require(plan.name)
        if target.path:
            # Nothing may wait while the swap waits for what is in flight.
            self._mapper.message(stack.hold_name(plan.name), "fail_if_no_path")
            self._mapper.load(plan.name, target.table)
            with self._mapper.events() as events:
                self._mapper.swap(plan.name, events)
        self._remove_parts(target.device, stack.hold_name(plan.name), stack.map_name(plan.name))

    def _do_restore_hold(self, plan: Plan, action: planner.Action) -> None:
        self.release(self.require(plan.name))

    def _do_insert_shim(self, plan: Plan, action: planner.Action) -> None:
        self._insert_shim(self.require(plan.name))

    def _insert_shim(self, target: ActiveTarget) -> None:
        if target.main is None:
            raise Refused("has no chunk on its main that a shim could serve", device=target.name)
        part = stack.shim_name(target.name)
        device = self._part(target.device, part)
        table = stack.shim_table(target.metadata.config["main"]["sectors"], target.main.devno)
        if device is None:
            self._create_part(target.metadata, target.name, part, table)
        shimmed = replace(target, shim=self._existing(part))
        self._swap_map(shimmed, shimmed.map_table(target.metadata))

    def _do_remove_shim(self, plan: Plan, action: planner.Action) -> None:
        target = replace(self.require(plan.name), shim=None)
        self._swap_map(target, target.map_table(target.metadata))
        # It stands under a parked place too.
        self._freezer.park(target)
        self._remove_parts(target.device, stack.shim_name(plan.name))

    def _swap_map(self, target: ActiveTarget, table: Sequence[Segment]) -> None:
        self._mapper.load(target.map.name, table)
        with self._mapper.events() as events:
            self._mapper.swap(target.map.name, events if target.path is None else None)

    def path_of(self, name: str) -> stack.PathState:
        """State of the path of a target whose errors are held.

        Raises:
            DmRemapError: there is no such device.
        """
        hold = stack.hold_name(name)
        (status,), (table,) = self._mapper.status(hold), self._mapper.table(hold)
        return stack.path_state(status, table)

    def is_current(self, target: ActiveTarget, disks: Disks) -> bool:
        """Whether a target that holds its errors is as it was observed.

        Whoever changes its chunks commits a generation, so one copy of the metadata tells.
        """
        device = self._mapper.info(target.name)
        hold = self._mapper.info(stack.hold_name(target.name))
        if device is None or hold is None or target.path is None or not target.tidy:
            return False
        if (device.uuid, device.devno) != (target.device.uuid, target.device.devno):
            return False
        if self._mapper.dependencies(target.name) != [hold.devno]:
            return False
        shim = self._mapper.info(stack.shim_name(target.name))
        if (shim and shim.devno) != (target.shim and target.shim.devno):
            return False
        return copies.carries(disks.members, target.metadata)

    def fail_held(self, target: ActiveTarget) -> None:
        """Let all I/O that waits fail, and hold what fails from now on."""
        self._mapper.message(stack.hold_name(target.name), "fail_if_no_path")
        self.release(target)

    def release(self, target: ActiveTarget) -> None:
        """Let held I/O go on, and hold what fails from now on."""
        if target.path is None:
            return
        hold = stack.hold_name(target.name)
        # The kernel's fail-safe takes the first away, and only the second starts what waits.
        self._mapper.message(hold, "queue_if_no_path")
        self._mapper.message(hold, f"reinstate_path {target.path.devno}")

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
        if upkeep.changes:
            target = self.require(name)
        plan = planner.plan_remap(target, ranges)
        lost_before = self.lost_before(target, ranges)
        report = self._remap(target, plan, patience or Patience())
        report.plan = replace(
            report.plan, before=first.before, actions=upkeep.actions + report.plan.actions
        )
        report.lost_before = lost_before
        report.seconds = time.monotonic() - begun
        return report

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

    def _remap(self, target: ActiveTarget, plan: Plan, patience: Patience) -> RemapReport:
        if not plan.placed:
            return RemapReport(planner.remap_actions(target, (), ()))
        self._check_freezing_names(target)
        chunks = [extent.logical for extent in plan.placed]
        with contextlib.ExitStack() as opened:
            disks = opened.enter_context(self.opened(target))
            events = opened.enter_context(self._mapper.events())
            opened.enter_context(self._guarded(plan.name))
            moved = self.move(target, disks, chunks, patience, events)
        self.backup(moved.metadata)
        return RemapReport(
            plan=planner.remap_actions(target, moved.extents, moved.lost),
            chunks=moved.chunks,
            salvage_seconds=moved.salvage_seconds,
            pause_seconds=moved.pause_seconds,
        )

    @contextlib.contextmanager
    def opened(self, target: ActiveTarget, write_back: bool = False) -> Iterator[Disks]:
        """Open what a move reads and writes.

        Args:
            target: the target.
            write_back: open main for writing too, because a replacement of it is undone.

        Raises:
            DmRemapError: a device cannot be opened, or no chunk is on main.
        """
        if target.main is None:
            raise DmRemapError("its main is not known", device=target.name)
        with contextlib.ExitStack() as opened:
            new = target.replacement
            yield Disks(
                main=opened.enter_context(
                    self._blocks.BlockDevice(target.main.path, writable=write_back)
                ),
                spares={
                    spare.index: opened.enter_context(
                        self._blocks.BlockDevice(self._blocks.node_of(spare.devno), writable=True)
                    )
                    for spare in target.spares
                },
                members=self._open_members(
                    opened, {s.index: s.candidate.info for s in target.spares}
                ),
                new_main=opened.enter_context(self._blocks.BlockDevice(new.path, writable=True))
                if new
                else None,
            )

    def move(
        self,
        target: ActiveTarget,
        disks: Disks,
        chunks: Sequence[int],
        patience: Patience,
        events: Any = None,
        wanted: Callable[[int, Salvage], bool] = lambda chunk, salvage: True,
    ) -> Moved:
        """Move chunks from main to spares; the caller holds the lock.

        Held I/O goes on as soon as the chunks are frozen, that to the chunks when they are moved.

        Args:
            target: the target, of whose chunks none is frozen.
            disks: its open devices.
            chunks: logical chunks that are on main.
            patience: how hard to try to read failing blocks.
            events: what `DeviceMapper.events` gave, for a target that udev must be told about.
            wanted: says of a chunk that was read whether it is to be moved after all.

        Raises:
            DmRemapError: a step failed; the chunks are where the metadata says.
        """
        name, metadata = target.name, target.metadata
        begun = time.monotonic()
        try:
            # A salvage may take its budget twice over before what waits fails.
            seconds = max(FREEZE_SECONDS, 2 * patience.budget)
            self._freezer.freeze(target, chunks, seconds, events)
            self.release(target)
            works = []
            for chunk in chunks:
                source = disks.main_of(metadata, chunk)
                works.append(self._salvage_chunk(metadata, name, chunk, source, patience))
                self._step("salvaged")
            for main, info in ((disks.main, target.main), (disks.new_main, target.replacement)):
                if main and info:
                    there = [w for w in works if disks.main_of(metadata, w.chunk) is main]
                    _confirm_losses(main, there, info)
            works = [work for work in works if wanted(work.chunk, work.salvage)]
            salvage_seconds = time.monotonic() - begun
            if works:
                self._write_chunks(works, target, disks)
                self._step("data_flushed")
                salvage_seconds = time.monotonic() - begun
                new = self._next(metadata, works)
                copies.commit(disks.members, metadata, new, self._step)
                self._step("committed")
            else:
                new = metadata
            self._freezer.thaw(target, new, chunks, events)
        except BaseException:
            # Only the metadata on the spares can say now where the chunks are.
            self._end_freeze(name)
            raise
        pause_seconds = time.monotonic() - begun
        self._freezer.park(target)
        return Moved(
            metadata=new,
            chunks=[_report(work) for work in works],
            extents=[work.extent for work in works],
            salvage_seconds=salvage_seconds,
            pause_seconds=pause_seconds,
        )

    def _check_freezing_names(self, target: ActiveTarget) -> None:
        for name in (stack.frozen_name(target.name), stack.place_name(target.name)):
            if self._mapper.info(name) and not self._part(target.device, name):
                raise Refused(
                    "is a mapped device of something else, whose name the remap needs",
                    device=f"/dev/mapper/{name}",
                    remedy="rename or remove that device",
                )

    def _salvage_chunk(
        self,
        metadata: Metadata,
        name: str,
        chunk: int,
        main: OpenDevice,
        patience: Patience,
    ) -> _Work:
        chunk_sectors = metadata.config["chunk_sectors"]
        block_sectors = metadata.config["block_sectors"]
        start = chunk * chunk_sectors
        length = min(chunk_sectors, metadata.config["main"]["sectors"] - start)
        self._progress(f"salvage chunk {chunk} of {name}")
        return _Work(
            chunk=chunk,
            start=start,
            length=length,
            salvage=salvage(main, start, length, block_sectors, patience),
        )

    def _write_chunks(self, works: Sequence[_Work], target: ActiveTarget, disks: Disks) -> None:
        """Give the chunks places, write what was read of them, and flush.

        A place that is bad itself, or that has old data where a lost sector must read as an error
        and cannot be made to, is passed over, and a spare that fails is not used.

        Raises:
            Refused: the spares have too few free chunks.
            DmRemapError: no spare can be written.
        """
        metadata = target.metadata
        usable = planner.usable_geometries(target)
        shunned: list[tuple[int, int]] = []
        faults: dict[int, OSError] = {}
        bad_places: Counter[int] = Counter()
        pending = list(works)
        while pending:
            settled = [work.extent for work in works if work not in pending]
            self._place_chunks(
                pending, [*metadata.extents, *settled], target, usable, shunned, faults
            )
            dirty = []
            for work in pending:
                index = work.extent.spare
                if index not in usable:
                    continue
                try:
                    _try_place(work, disks.members[index], usable[index])
                except OSError as error:
                    faults[index] = error
                    dirty.append(work)
                    shunned.append((index, work.extent.physical))
                    bad_places[index] += 1
                    if bad_places[index] == _BAD_PLACES or error.errno not in MEDIUM_ERRORS:
                        usable.pop(index)
                    continue
                try:
                    if not self._write_chunk(work, target, disks, usable[index]):
                        dirty.append(work)
                        shunned.append((index, work.extent.physical))
                except OSError as error:
                    faults[index] = error
                    usable.pop(index)
            for index in {work.extent.spare for work in pending} & set(usable):
                try:
                    disks.spares[index].flush()
                    for work in pending:
                        if work.extent.spare == index and work not in dirty:
                            _check_chunk(work, disks.spares[index], metadata)
                except OSError as error:
                    faults[index] = error
                    usable.pop(index)
            # A spare that fails takes the chunks with it that it had taken before.
            pending = [w for w in works if w in dirty or w.extent.spare not in usable]

    def _place_chunks(
        self,
        works: Sequence[_Work],
        taken: Sequence[Extent],
        target: ActiveTarget,
        usable: Mapping[int, Geometry],
        shunned: Sequence[tuple[int, int]],
        faults: Mapping[int, OSError],
    ) -> None:
        try:
            placed = pool.allocate([work.chunk for work in works], usable, taken, shunned)
        except Refused as error:
            for spare in target.spares:
                if spare.index in faults:
                    raise DmRemapError(
                        f"cannot be written: {faults[spare.index]}",
                        device=spare.candidate.info.path,
                        remedy="nothing was changed; copy the data to another disk",
                    ) from error
            raise
        for work, extent in zip(works, placed):
            work.place = extent

    def _write_chunk(
        self, work: _Work, target: ActiveTarget, disks: Disks, geometry: Geometry
    ) -> bool:
        """Write what was read of a chunk; whether its lost blocks read as errors then."""
        index, metadata = work.extent.spare, target.metadata
        _write_readable(work, disks.spares[index], metadata)
        if _lost_fail(work, disks.spares[index], metadata):
            return True
        self._poison(target.name, work, disks.members[index], geometry)
        return _lost_fail(work, disks.spares[index], metadata)

    def _poison(self, name: str, work: _Work, member: OpenDevice, geometry: Geometry) -> None:
        """Make the chunk's lost blocks read as errors where the place has old data.

        A suspend writes back what dm-integrity's journal holds of them; then other bytes below
        match no tag any more.
        """
        part = stack.spare_name(name, work.extent.spare)
        self._mapper.suspend(part)
        self._mapper.swap(part)
        place, block = geometry.chunk_sector(work.extent.physical), work.salvage.block_sectors
        for first, count in work.salvage.runs(Outcome.LOST):
            old = member.read(place + first * block, count * block)
            member.write(place + first * block, bytes(byte ^ 0xFF for byte in old))
        member.flush()
        self._step("poisoned")

    def _next(self, metadata: Metadata, works: Sequence[_Work]) -> Metadata:
        return planner.with_remaps(self.successor(metadata), *_outcome(works))

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
        """Whether anything may wait at the freezing device."""
        try:
            device = self._existing(name)
            part = stack.frozen_name(name)
            return bool(self._part(device, part)) and any(
                segment.target == "delay" for segment in self._mapper.table(part)
            )
        except DmRemapError:
            return True

    def _end_freeze(self, name: str) -> None:
        """End a freeze that was interrupted, as the metadata on the spares has it."""
        try:
            target = self.require(name)
            chunks = held_chunks(target)
            if not chunks:
                self._freezer.park(target)
                return
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
            upkeep = planner.plan_upkeep(target)
            for action in upkeep.actions:
                if action.kind == "repair_metadata":
                    self._do_repair_metadata(upkeep, action)
            with self._mapper.events() as events:
                self._freezer.thaw(target, target.metadata, chunks, events)
            self._freezer.park(target)
        except BaseException:
            self._fail_frozen(name)
            raise

    def _fail_frozen(self, name: str) -> None:
        device = self._existing(name)
        upper, _path = self._map_of(device)
        frozen = self._part(device, stack.frozen_name(name))
        if frozen and frozen.devno in self._mapper.dependencies(upper.name):
            self._freezer.fail(name)

    def backup(self, metadata: Metadata) -> None:
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
    return stack.UUID_PREFIX + metadata.target_uuid.hex


def _metadata_of(plan: Plan) -> Metadata:
    if plan.metadata is None:
        raise AssertionError("only plans with metadata have such actions")
    return plan.metadata


def _index_of(plan: Plan, path: str) -> int:
    return next(index for index, info in plan.spares.items() if info.path == path)


def _spare_sector(work: _Work, metadata: Metadata) -> int:
    return int(work.extent.physical * metadata.config["chunk_sectors"])


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


def _write_readable(work: _Work, device: OpenDevice, metadata: Metadata) -> None:
    """Write what was read of a chunk."""
    place, block = _spare_sector(work, metadata), work.salvage.block_sectors
    for first, count in work.salvage.readable:
        data = b"".join(work.salvage.block(first + i) for i in range(count))
        device.write(place + first * block, data)


def _lost_fail(work: _Work, device: OpenDevice, metadata: Metadata) -> bool:
    """Whether the chunk's lost blocks read as errors on the spare."""
    place, block = _spare_sector(work, metadata), work.salvage.block_sectors
    return not any(
        _reads(device, place + (first + i) * block, block)
        for first, count in work.salvage.runs(Outcome.LOST)
        for i in range(count)
    )


def _check_chunk(work: _Work, device: OpenDevice, metadata: Metadata) -> None:
    """Read back what was written of a chunk.

    Raises:
        OSError: the spare gives back something else.
    """
    place, block = _spare_sector(work, metadata), work.salvage.block_sectors
    for first, count in work.salvage.readable:
        data = b"".join(work.salvage.block(first + i) for i in range(count))
        if device.read(place + first * block, count * block) != data:
            raise OSError(errno.EIO, "gives back other data than was written", device.name)


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
        chunk=work.chunk,
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
