# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Observes targets and carries plans out, in an order that a crash cannot hurt."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import IO, Any, Protocol

from . import (
    backups,
    blockdev,
    copies,
    discovery,
    extents,
    files,
    fingerprint,
    kernel_v4,
    mapping,
    migration,
    planner,
    replacement,
    replacing,
    stack,
)
from .blockdev import SECTOR_BYTES, DeviceInfo, Listed
from .devmapper import DeviceMapper, MappedDevice, Segment, check_name
from .errors import DmRemapError, Refused, count_of
from .events import hashed_machine_id, intersect_ranges, subtract_ranges
from .format import (
    MAX_SPARES,
    Diagnosis,
    Extent,
    Geometry,
    Metadata,
    geometry_of,
    spare_uuid_of,
)
from .freezing import FREEZE_SECONDS, Freezer, existing, held_chunks, is_parked, own_part
from .planner import (
    ActiveSpare,
    ActiveTarget,
    Candidate,
    Holder,
    LostSpare,
    NewTarget,
    OldSpare,
    Plan,
    Request,
    RestoreRequest,
    RestoreSeen,
    Seen,
    SpareSeen,
    Stray,
)
from .probing import MEDIUM_ERRORS, answers, answers_at
from .salvage import Outcome, Patience, Salvage, Unfinished, begin, salvage

LOCK_DIR = "/run/dm-remap"
# How long the kernel holds failed I/O that nobody heals.
HOLD_SECONDS = 120

# How long the kernel is given to let held I/O fail.
FAILING_SECONDS = 1.0

# The daemon's reflex holds a lock on this file in the lock folder while it runs.
HEALER_LOCK = ".healer.lock"

# What dm-integrity's superblock starts with (SB_MAGIC in the kernel's drivers/md/dm-integrity.c).
INTEGRITY_MAGIC = b"integrt\0"

_KERNEL_TARGETS = ("integrity", "delay", "multipath")
# A spare on which so many chosen places are bad is not used for the remap.
_BAD_PLACES = 3
# What a spare answers where a block has no valid tag: it works, and the block is lost.
_TAG_ERRORS = (0, errno.EILSEQ)
_MCL_CURRENT, _MCL_FUTURE = 1, 2


class OpenDevice(copies.Device, Protocol):
    """An open block device, as `blockdev.BlockDevice` is; sectors are of 512 bytes."""

    def zero(self, sector: int, count: int) -> None:
        """Make sectors read as zeros."""

    def close(self) -> None:
        """Close it; a second call does nothing."""

    def __enter__(self) -> OpenDevice:
        """The device itself."""

    def __exit__(self, *exc_info: object) -> None:
        """Close it."""


class Blocks(Protocol):
    """What the engine needs of the module `blockdev`."""

    def BlockDevice(self, path: str, writable: bool = ...) -> OpenDevice:
        """Open a device past the page cache."""

    def list_devices(self, without: str) -> Iterable[Listed]:
        """All block devices, but for mapped ones whose UUIDs start with ``without``."""

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

    def swap_while(self, name: str, meanwhile: Callable[[], None], events: Any = ...) -> None:
        """Swap while something ends what is in flight."""

    def wait_idle(self, name: str, seconds: float) -> bool:
        """Wait until no I/O is in flight."""

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

    Sectors are counted in units of 512 bytes; ``lost`` and ``lost_before`` hold first sector and
    count on the target.

    Args:
        chunk: its number on the target.
        start: its first sector on the target.
        count: its sectors.
        spare: index of the spare that it is on now; None on main.
        spare_chunk: its place there.
        recovered_first_read: sectors that the first read saved.
        recovered_on_retry: sectors that a later read saved.
        lost: sectors that were lost now.
        lost_before: sectors that were known to be lost, and still cannot be read.
        origin: index of the spare that it came from; None from main.
        moved: whether it moved at all.
        reason: why it did not.
    """

    chunk: int
    start: int
    count: int
    spare: int | None
    spare_chunk: int | None
    recovered_first_read: int
    recovered_on_retry: int
    lost: list[tuple[int, int]]
    lost_before: list[tuple[int, int]] = field(default_factory=list)
    origin: int | None = None
    moved: bool = True
    reason: str = ""


@dataclass
class RemapReport:
    """Result of a remap: what was done, the chunks, and durations in seconds.

    Args:
        plan: the plan as it was carried out.
        chunks: what became of the chunks.
        lost_before: sectors of chunks that were on a spare already, which still cannot be read.
        files: whom the lost sectors belonged to, once `Engine.find_files` has looked.
        salvage_seconds: reading main and writing spares.
        pause_seconds: how long I/O to the chunks had to wait.
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
        return sum(c.recovered_first_read + c.recovered_on_retry for c in self.chunks if c.moved)

    @property
    def staying(self) -> list[RemappedChunk]:
        """Chunks that were to move and did not."""
        return [chunk for chunk in self.chunks if not chunk.moved]

    @property
    def lost(self) -> list[tuple[int, int]]:
        """Lost sectors of all chunks that were asked for, as (first, count) on the target."""
        return self.lost_before + [item for chunk in self.chunks for item in chunk.lost]


@dataclass(frozen=True)
class Disks:
    """Open devices of a target.

    Without main every chunk is on a spare, and none can be moved from or to main.

    Args:
        main: main.
        spares: its spares' integrity devices.
        members: the spares themselves.
        new_main: what is to replace main, while that is under way.
    """

    main: OpenDevice | None
    spares: Mapping[int, OpenDevice]
    members: Mapping[int, OpenDevice]
    new_main: OpenDevice | None = None

    @property
    def old_main(self) -> OpenDevice:
        """Main, of a target that is known to have one."""
        if self.main is None:
            raise AssertionError("a target with chunks on main, or to be moved there, has a main")
        return self.main

    def main_of(self, metadata: Metadata, chunk: int) -> OpenDevice:
        """The main that a chunk without an extent is on."""
        if self.new_main and chunk < replacement.copied_chunks(metadata):
            return self.new_main
        return self.old_main


@dataclass(frozen=True)
class _Look:
    """What a look at one spare of an active target found.

    Args:
        index: its position.
        devno: its integrity device, empty where there is none.
        below: device number of the device that it stands on.
        path: that device, empty where it is gone.
        candidate: who it is and what is on it, if that can be read.
        trouble: why it cannot be used.
        suspended: whether its integrity device is.
    """

    index: int
    devno: str = ""
    below: str = ""
    path: str = ""
    candidate: Candidate | None = None
    trouble: str = ""
    suspended: bool = False


@dataclass(frozen=True)
class Moved:
    """What a move did.

    Args:
        metadata: the generation afterwards.
        chunks: what became of the chunks that were to be moved.
        extents: where those are now that moved to a spare, one extent each.
        salvage_seconds: until all was read and is in its new place.
        pause_seconds: how long I/O to the chunks had to wait.
        left_out: why a spare did not take the last generation, by its index.
    """

    metadata: Metadata
    chunks: list[RemappedChunk]
    extents: list[Extent]
    salvage_seconds: float
    pause_seconds: float
    left_out: Mapping[int, str] = field(default_factory=dict)

    @property
    def lost(self) -> list[tuple[int, int]]:
        """Sectors that were lost, as (first, count) on the target."""
        return [item for chunk in self.chunks for item in chunk.lost]


@dataclass(frozen=True)
class Route:
    """Where a move may take chunks, and what it may read.

    Args:
        to_main: back to main, where the chunk's own data is the test.
        avoid: indexes of spares that take none of them.
        prefer: indexes of spares that take as many as they can.
        discard: indexes of spares that are not read: what is there is lost.
    """

    to_main: bool = False
    avoid: frozenset[int] = frozenset()
    prefer: frozenset[int] = frozenset()
    discard: frozenset[int] = frozenset()


TO_SPARES = Route()


@dataclass(eq=False)
class _Work:
    """A chunk on its way, whose extent is known when it has a place.

    Args:
        chunk: its number on the target.
        start: its first sector on the target.
        length: its sectors.
        salvage: what was read of it; its sectors are the source's.
        source: where it is; None on main.
        known: its sectors on the target that were lost before.
        place: where it goes; None on main, or not known yet.
    """

    chunk: int
    start: int
    length: int
    salvage: Salvage
    source: Extent | None = None
    known: list[tuple[int, int]] = field(default_factory=list)
    place: Extent | None = None

    @property
    def extent(self) -> Extent:
        """The place on a spare that the chunk goes to."""
        if self.place is None:
            raise AssertionError("the chunk has no place yet")
        return self.place

    @property
    def lost(self) -> list[tuple[int, int]]:
        """All its lost sectors on the target."""
        shift = self.start - self.salvage.sector
        return [(sector + shift, count) for sector, count in self.salvage.lost]


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
        backup_dir: str = backups.FOLDER,
        guard: bool = False,
    ) -> None:
        self._mapper: Mapper = mapper or DeviceMapper()
        self._blocks = blocks
        self._step = step or (lambda name: None)
        self._progress = progress or (lambda text: None)
        self._lock_dir = lock_dir
        self._backups = backups.Backups(backup_dir)
        self._guard = guard
        self._freezer = Freezer(self._mapper, self._step)
        # Spares that did not take the last generation, by target.
        self._left_out: dict[uuid.UUID, set[int]] = {}

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
                file.seek(0)
                raise Refused(
                    f"is being copied to another main by process {file.read() or '(unknown)'}",
                    device=name,
                    remedy="wait for it, or end it; a copy that was ended can go on or back",
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with self._lock_file(name) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _lock_file(self, name: str) -> IO[str]:
        os.makedirs(self._lock_dir, mode=0o755, exist_ok=True)
        return open(os.path.join(self._lock_dir, name), "a+", encoding="ascii")  # noqa: SIM115

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
        looks = self._look_at_spares(device)
        if not looks:
            raise DmRemapError(
                "is active without any spare",
                device=f"/dev/mapper/{name}",
                remedy="stop what uses it, remove it with dmsetup, and run the target module again",
            )
        surveys = [look.candidate for look in looks if look.candidate]
        choice = copies.choose({c.info.path: c.survey for c in surveys})
        upper, path = self._map_of(device)
        table = tuple(self._mapper.table(upper.name))
        shim = self._part(device, stack.shim_name(name))
        frozen = self._part(device, stack.frozen_name(name))
        new_main = self._part(device, stack.new_main_name(name))
        used = {mapping.linear_target(s)[0] for s in table if s.target == "linear"}
        own = {look.devno for look in looks if look.devno}
        own |= {part.devno for part in (shim, frozen, new_main) if part}
        new = None
        if new_main and new_main.live_table:
            new = self._blocks.describe(self._below(new_main.name))
        replaced = not replacement.under_way(choice.metadata)
        if new is None and not replaced:
            raise DmRemapError(
                "its main is being replaced, but the new one is not where it was put",
                device=f"/dev/mapper/{name}",
                remedy="stop what uses the target, remove it with dmsetup, and run the target "
                "module again",
            )
        mains = [devno for devno in used if devno not in own] or self._lower_mains(name, own)
        main = self._blocks.describe(self._blocks.node_of(mains[0])) if mains else None
        over_main = ""
        if new_main and new_main.devno in used and replaced:
            # All is on the new main, and the last commit has made it the main.
            main, over_main = new, new_main.devno
        # Where no chunk is on main, the segment beyond the end tells that the shim is in place.
        carried = table[-1].start >= choice.metadata.config["main"]["sectors"]
        serves = shim and main and carried and self._mapper.dependencies(shim.name) == [main.devno]
        found = self._with_spares(
            ActiveTarget(
                device=device,
                map=upper,
                table=table,
                main=main,
                spares=(),
                choice=choice,
                path=path,
                cut=self._cut_of(device) if path else (),
                past_hold=bool(path) and upper.devno in self._mapper.dependencies(name),
                shim=shim if shim and (shim.devno in used or serves) else None,
                frozen=frozen if frozen and frozen.devno in used else None,
                replacement=None if replaced else new,
                new_main=None if replaced else new_main,
            ),
            looks,
        )
        settled = replacing.is_settled(self._mapper, found) and is_parked(self._mapper, found)
        tidy = bool(found.frozen) or settled
        found = _judged(found, over_main)
        return replace(found, tidy=tidy and not any(look.suspended for look in looks))

    def _with_spares(self, target: ActiveTarget, looks: Sequence[_Look]) -> ActiveTarget:
        """The target with its spares, sorted by what can be done with them."""
        metadata = target.metadata
        wanted = {index for index, entry in enumerate(metadata.config["spares"]) if entry}
        spares: list[ActiveSpare] = []
        lost = {i: LostSpare(i, "", "", "", "has no device in the kernel") for i in wanted}
        strays = []
        for look in looks:
            path = look.candidate.info.path if look.candidate else look.path
            if look.index not in wanted:
                marked = bool(look.candidate and not look.candidate.survey.empty)
                strays.append(Stray(look.index, path, look.below, marked))
                continue
            trouble = look.trouble or self._trouble_in_data(look, metadata)
            if trouble or look.candidate is None:
                mapped = not planner.fails_in_map(target, look.index)
                lost[look.index] = LostSpare(
                    look.index, look.devno, look.below, path, trouble, mapped
                )
            else:
                spares.append(ActiveSpare(look.index, look.devno, look.candidate))
                del lost[look.index]
        return replace(
            target,
            spares=tuple(spares),
            lost_spares=tuple(lost[index] for index in sorted(lost)),
            strays=tuple(strays),
        )

    def look_at_spares(self, target: ActiveTarget) -> ActiveTarget:
        """The target with its spares and its map as they are now, and its metadata as it was known.

        It is `certain` only if these agree.
        """
        cut, table = self._cut_of(target.device), tuple(self._mapper.table(target.map.name))
        found = self._with_spares(
            replace(target, cut=cut, table=table), self._look_at_spares(target.device)
        )
        return replace(found, certain=_agrees(found))

    def _trouble_in_data(self, look: _Look, metadata: Metadata) -> str:
        """What is wrong with a spare's integrity device, which fails for good by one bad place."""
        chunks = planner.chunks_on(metadata, look.index)
        if not chunks or look.suspended:
            return ""
        chunk_sectors, block = metadata.config["chunk_sectors"], metadata.config["block_sectors"]
        places = [
            extents.place_of(metadata.extents, chunk)
            for chunk in sorted({chunks[0], chunks[len(chunks) // 2], chunks[-1]})
        ]
        try:
            with self._blocks.BlockDevice(self._blocks.node_of(look.devno)) as device:
                if any(
                    answers_at(device, place.physical * chunk_sectors, block, _TAG_ERRORS)
                    for place in places
                    if place
                ):
                    return ""
        except (DmRemapError, OSError) as error:
            return f"cannot be opened: {error}"
        return "gives errors for all of its chunks"

    def _map_of(self, device: MappedDevice) -> tuple[MappedDevice, stack.PathState | None]:
        """The device whose table is the map, and the state of the path that holds I/O above it."""
        hold = self._part(device, stack.hold_name(device.name))
        upper = self._part(device, stack.map_name(device.name))
        if hold is None or upper is None:
            return device, None
        if not {hold.devno, upper.devno}.intersection(self._mapper.dependencies(device.name)):
            return device, None
        return upper, self.path_of(device.name)

    def _cut_of(self, device: MappedDevice) -> tuple[tuple[int, int], ...]:
        """Ranges of a target that fail above the device that holds its errors."""
        table = self._mapper.table(device.name)
        return tuple((s.start, s.length) for s in table if s.target == "error")

    def _lower_mains(self, name: str, own: Collection[str]) -> list[str]:
        """Main's device number where only the shim or the freezing devices lead to it."""
        found = []
        shim, place = self._mapper.info(stack.shim_name(name)), stack.place_name(name)
        if shim and shim.live_table:
            found += self._mapper.dependencies(shim.name)
        if self._mapper.info(place):
            # The first of those that carry flushes is main.
            table = self._mapper.table(place)
            found += [mapping.linear_target(s)[0] for s in table if s.target == "linear"]
        return [devno for devno in found if devno not in own]

    def discover(self) -> discovery.Host:
        """Look at all devices of the host, without a lock, and at what it knows of its targets."""
        known = self._backups.targets()
        newest = {target: self._backups.newest(target) for target in known}
        return discovery.Host(
            found=discovery.scan(self._blocks),
            active=discovery.active_targets(self._mapper),
            kept={target: metadata for target, metadata in newest.items() if metadata},
            removed={
                target: note
                for target, note in ((one, self._backups.removed(one)) for one in known)
                if note
            },
        )

    def devno_of(self, path: str) -> str:
        """Device number of a path.

        Raises:
            Refused: there is no such device.
        """
        return self._blocks.describe(path).devno

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

    def see(
        self,
        name: str,
        main: str | None,
        spares: Sequence[str],
        degraded: bool = False,
        migrate_from: str | None = None,
    ) -> Seen:
        """Observe what a request is about.

        Args:
            name: the target.
            main: path of main; None for a removal.
            spares: paths of the spares.
            degraded: spares that do not exist or cannot be read are no reason to fail.
            migrate_from: path of a kernel target's spare. It need not exist, because it is not
                needed any more once the target is migrated.

        Raises:
            DmRemapError: a device does not exist or cannot be read.
        """
        target = self.observe(name)
        remains = () if target else tuple(self._remains(name))
        wanted = self._blocks.describe(main) if main else None
        new_main = None
        mains = [target.main, target.replacement] if target else []
        if main and wanted and target and wanted.devno not in [i.devno for i in mains if i]:
            new_main = self._candidate(main, with_signatures=True)
        candidates, absent = [], []
        for path in spares:
            try:
                candidates.append(self._candidate(path, self._is_new(target, path)))
            except (DmRemapError, OSError):
                if not degraded:
                    raise
                absent.append(path)
        if main is None:
            # An interrupted removal has left spares that nobody may have named.
            known = {candidate.info.devno for candidate in candidates}
            left = [self._candidate(path, True) for path in self._spares_of(name, remains)]
            candidates += [c for c in left if c.info.devno not in known]
        if main and wanted and not target and all(c.survey.empty for c in candidates):
            # A new target records what its main contains.
            with self._blocks.BlockDevice(main) as device:
                wanted = fingerprint.with_content(wanted, device)
        owners = [c.survey.target_uuid for c in candidates if c.survey.target_uuid]
        owner = target.metadata.target_uuid if target else next(iter(owners), None)
        if owner is None and wanted:
            infos = [candidate.info for candidate in candidates]
            owner = self._remembered(name, wanted, infos)
        return Seen(
            target=target,
            remains=remains,
            taken=() if target else tuple(self._taken(name)),
            main=wanted,
            candidates=tuple(candidates),
            healer=self.healer_runs(),
            new_main=new_main,
            others=() if target else tuple(self._other_mains(candidates)),
            old_spare=self._old_spare(migrate_from) if migrate_from is not None else None,
            absent=tuple(absent),
            witness=self._backups.newest(owner) if owner else None,
            removed=self._backups.removed(owner) if owner else "",
        )

    def _old_spare(self, path: str) -> OldSpare | None:
        with contextlib.suppress(DmRemapError):
            info = self._blocks.describe(path)
            with self._blocks.BlockDevice(path) as device:
                return OldSpare(info, kernel_v4.survey(device))
        return None

    def see_spare(self, name: str, device: str, replaces: str | None, add: bool) -> SpareSeen:
        """Observe what a change of an active target's spares is about.

        Args:
            name: the target.
            device: the spare's path, or the UUID of one that is lost.
            replaces: the same of the one that it stands in for.
            add: whether the device is to be a spare.

        Raises:
            Refused: there is no such target.
        """
        target = self.require(name)
        devnos = {}
        for path in (device, replaces):
            with contextlib.suppress(DmRemapError, OSError):
                devnos[path or ""] = self._blocks.describe(path or "").devno
        known = planner.spare_index(target, device, devnos.get(device, ""))
        candidate = None
        lost = {spare.index for spare in target.lost_spares}
        if add and known in (None, *lost) and device in devnos:
            candidate = self._candidate(device, with_signatures=known is None)
        witness = self._backups.newest(target.metadata.target_uuid)
        return SpareSeen(target, candidate, devnos, witness)

    def _remembered(
        self, name: str, main: DeviceInfo, spares: Sequence[DeviceInfo]
    ) -> uuid.UUID | None:
        """The target, by the host's backups, that had these devices; or else this name."""
        found = None
        for owner in self._backups.targets():
            metadata = None if self._backups.removed(owner) else self._backups.newest(owner)
            if metadata is None or not metadata.extents:
                continue
            members = [planner.member_index(info, metadata) for info in spares]
            if set(members) != {None} or replacement.is_surely(main, metadata.config["main"]):
                return owner
            if metadata.config.get("name") == name:
                found = owner
        return found

    def backup_of(self, name: str, generation: int | None = None) -> Metadata:
        """The host's backup of a target; see `backups.Backups.of`."""
        return self._backups.of(name, generation)

    def see_restore(self, request: RestoreRequest, backup: Metadata) -> RestoreSeen:
        """Observe what a restoration is about.

        Args:
            request: what is wanted.
            backup: the generation that is to be restored.

        Raises:
            DmRemapError: a device does not exist or cannot be read.
        """
        active = self.observe(request.name) is not None or bool(self.name_of(backup.target_uuid))
        candidates = tuple(self._candidate(path, True) for path in request.spares)
        owner = backup.target_uuid
        return RestoreSeen(
            backup=backup,
            active=active,
            remains=() if active else tuple(self._remains(request.name)),
            taken=() if active else tuple(self._taken(request.name)),
            main=self._blocks.describe(request.main),
            candidates=candidates,
            tagged=frozenset(c.info.path for c in candidates if self._has_tags(c, backup)),
            removed=self._backups.removed(owner),
        )

    def _has_tags(self, candidate: Candidate, metadata: Metadata) -> bool:
        """Whether dm-integrity's superblock is where a spare of the target has it."""
        index = planner.member_index(candidate.info, metadata)
        if candidate.survey.spare_uuid:
            index = planner.index_of_uuid(metadata, candidate.survey.spare_uuid)
        if index is None:
            return False
        try:
            return self.is_formatted(candidate.info.path, geometry_of(metadata, index))
        except DmRemapError:
            return False

    def _do_restore_metadata(self, plan: Plan, action: planner.Action) -> None:
        """Commit a backup as a new generation, with the entries of new spares."""
        wanted = _metadata_of(plan)
        backup = self._backups.read(wanted.target_uuid, action.details["from"])
        new = replace(self.successor(backup), generation=wanted.generation, config=wanted.config)
        with contextlib.ExitStack() as members:
            opened = self._open_members(members, plan.spares)
            left_out = self._commit_to(opened, None, new, ())
        self.backup(new)
        for index, reason in left_out.items():
            raise DmRemapError(
                f"took no metadata: {reason}",
                device=plan.spares[index].path,
                remedy="activate the target without it, with degraded: true",
            )

    def see_devices(self, paths: Sequence[str], signatures: bool = True) -> tuple[Candidate, ...]:
        """Observe devices: who each is and what is on it.

        Args:
            paths: the devices.
            signatures: look for what else is on them, as anything that writes to them must.

        Raises:
            DmRemapError: one does not exist, is no block device, or cannot be examined.
        """
        return tuple(self._candidate(path, with_signatures=signatures) for path in paths)

    def is_formatted(self, path: str, geometry: Geometry) -> bool:
        """Whether the tag area of a spare has been given to dm-integrity.

        Raises:
            DmRemapError: that cannot be read.
        """
        try:
            with self._blocks.BlockDevice(path) as device:
                start = device.read(geometry.tag_start, geometry.block_sectors)
        except OSError as error:
            raise DmRemapError(
                f"sector {geometry.tag_start}, where its tag area begins, cannot be read: "
                f"{os.strerror(error.errno or 0)}",
                device=path,
                remedy="replace the spare",
            ) from error
        return start.startswith(INTEGRITY_MAGIC)

    def name_of(self, target: uuid.UUID) -> str:
        """Name of the active target that has this UUID, or ""."""
        for name in self.target_names():
            info = self._mapper.info(name)
            if info and info.uuid == stack.UUID_PREFIX + target.hex:
                return name
        return ""

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

    def _is_new(self, target: ActiveTarget | None, path: str) -> bool:
        """Whether a device is no spare of the target yet."""
        if target is None:
            return True
        return planner.spare_index(target, path, self._blocks.describe(path).devno) is None

    def _spares_of(self, name: str, remains: Sequence[str]) -> Iterator[str]:
        """Nodes of the spares that remaining devices of target ``name`` use."""
        for index in range(MAX_SPARES):
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

    def _look_at_spares(self, target: MappedDevice) -> list[_Look]:
        found = []
        for index in range(MAX_SPARES):
            names = stack.spare_part_names(target.name, index)
            upper, data, tags = (self._part(target, name) for name in names)
            if upper or data or tags:
                found.append(self._look_at_spare(target.name, index, upper, data))
        return found

    def _look_at_spare(
        self, name: str, index: int, upper: MappedDevice | None, data: MappedDevice | None
    ) -> _Look:
        look = _Look(
            index=index,
            devno=upper.devno if upper and upper.live_table else "",
            suspended=bool(upper and upper.suspended),
        )
        if data is None or not data.live_table:
            return replace(look, trouble="has no device in the kernel")
        below = mapping.linear_target(self._mapper.table(data.name)[0])[0]
        look = replace(look, below=below)
        try:
            candidate = self._candidate(self._blocks.node_of(below), with_signatures=False)
        except (DmRemapError, OSError) as error:
            return replace(look, trouble=f"is gone: {error}")
        look = replace(look, path=candidate.info.path)
        failed = candidate.survey.failed
        if not candidate.survey.copies and all(
            copy.diagnosis is Diagnosis.UNREADABLE for copy in failed
        ):
            return replace(look, trouble="cannot be read")
        trouble = "" if look.devno else "has no device in the kernel"
        return replace(look, candidate=candidate, trouble=trouble)

    def _below(self, name: str) -> str:
        """Node of the device under a linear one of ours."""
        return self._blocks.node_of(mapping.linear_target(self._mapper.table(name)[0])[0])

    def _part(self, target: MappedDevice, name: str) -> MappedDevice | None:
        """The target's own mapped device ``name``; somebody else's of that name is left alone."""
        return own_part(self._mapper, target.uuid, target.name, name)

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
        return existing(self._mapper, name)

    # Targets

    def apply(self, plan: Plan) -> list[RemappedChunk]:
        """Carry out a plan for a target or its spares; the caller holds its lock.

        Returns:
            What became of the chunks that had to leave a spare.

        Raises:
            DmRemapError: a step failed; what was done so far stays, and a new plan continues.
        """
        chunks: list[RemappedChunk] = []
        for action in plan.actions:
            self._progress(f"{action.kind} {action.device}")
            chunks += getattr(self, f"_do_{action.kind}")(plan, action) or []
            self._step(action.kind)
        return chunks

    def _do_remove_remains(self, plan: Plan, action: planner.Action) -> None:
        if self._existing(action.device).suspended:
            self._mapper.swap(action.device)
        self._mapper.remove(action.device)

    def _do_wipe_spare(self, plan: Plan, action: planner.Action) -> None:
        self._blocks.erase_signatures(action.device)
        self._wipe_copies(action.device)

    def _do_wipe_metadata(self, plan: Plan, action: planner.Action) -> None:
        # A device whose near copies are damaged may have been resized since.
        entries = plan.metadata.config["spares"] if plan.metadata else []
        sizes = {entry["geometry"]["spare_sectors"] for entry in entries if entry}
        try:
            self._wipe_copies(action.device, sizes)
        except (DmRemapError, OSError) as error:
            if plan.after["generation"] is None and not action.details.get("lost"):
                raise
            # The target goes on without this spare, and its copies count for nothing any more; or
            # the user is warned that a lost one keeps them.
            self._progress(str(error))

    def _wipe_copies(self, path: str, sizes: Collection[int] = ()) -> None:
        with self._blocks.BlockDevice(path, writable=True) as device:
            copies.wipe(device, copies.survey(device, sizes))

    def _do_note_removal(self, plan: Plan, action: planner.Action) -> None:
        try:
            self._backups.note_removal(_metadata_of(plan).target_uuid)
        except OSError as error:
            self._progress(f"the removal is not noted in {self._backups.folder}: {error}")

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
        index = _index_of(plan, action.device)
        self._activate_spare(plan.name, _metadata_of(plan), index, plan.spares[index])

    def _activate_spare(self, name: str, metadata: Metadata, index: int, info: DeviceInfo) -> None:
        geometry = geometry_of(metadata, index)
        if planner.chunks_on(metadata, index) and not self.is_formatted(info.path, geometry):
            # The kernel would format zeros anew, without the journal and with the old tags.
            raise DmRemapError(
                f"has chunks as spare {index}, but the beginning of its tag area was overwritten",
                device=info.path,
                remedy="restore it, or leave this spare out with degraded: true, and these chunks "
                "give errors",
            )
        pieces = (
            (stack.tags_name(name, index), "tags", geometry.tag_start, geometry.tag_sectors),
            (stack.data_name(name, index), "data", geometry.data_start, geometry.data_sectors),
        )
        below = {}
        for device_name, role, start, length in pieces:
            segment = Segment(0, length, "linear", f"{info.devno} {start}")
            below[role] = self._create_part(metadata, name, device_name, [segment])
        block_bytes = metadata.config["block_sectors"] * SECTOR_BYTES
        options = [
            f"meta_device:{below['tags']}",
            "internal_hash:crc32c",
            f"journal_sectors:{geometry.journal_sectors}",
            f"block_size:{block_bytes}",
        ]
        params = f"{below['data']} 0 - J {len(options)} {' '.join(options)}"
        self._create_part(
            metadata,
            name,
            stack.spare_name(name, index),
            [Segment(0, geometry.data_sectors, "integrity", params)],
        )

    def _do_deactivate_spare(self, plan: Plan, action: planner.Action) -> None:
        self._deactivate_spare(plan.name, _metadata_of(plan), action.details["name"])

    def _deactivate_spare(self, name: str, metadata: Metadata, upper: str) -> None:
        for part in (upper, f"{upper}-data", f"{upper}-tags"):
            if own_part(self._mapper, _dm_uuid(metadata), name, part):
                self._mapper.remove(part)

    def _do_return_spare(self, plan: Plan, action: planner.Action) -> None:
        """Let a spare that was lost serve its chunks again.

        The generation that is committed first shows whoever knows the target that it has changed.
        """
        target, index = self.require(plan.name), action.details["index"]
        name, info = plan.name, plan.spares[index]
        planner.check_certain(target)
        if target.frozen or all(lost.index != index for lost in target.lost_spares):
            raise DmRemapError(
                f"spare {index} is not as it was when its return was planned",
                device=info.path,
                remedy="run this again",
            )
        upper = stack.spare_name(name, index)
        lost = tuple(lost for lost in target.lost_spares if lost.index != index)
        if target.main is None:
            # The freezing devices may hand flushes to its old device.
            self._freezer.park(replace(target, lost_spares=lost), anew=True)
        self._deactivate_spare(name, target.metadata, upper)
        self._step("old_removed")
        self._activate_spare(name, target.metadata, index, info)
        self._step("spare_activated")
        devno = self._existing(upper).devno
        trouble = self._trouble_in_data(_Look(index, devno), target.metadata)
        if trouble:
            self._deactivate_spare(name, target.metadata, upper)
            raise DmRemapError(
                f"was to be used again as spare {index}, but {trouble}",
                device=info.path,
                remedy="replace it, or remove it with discard_remaps: true",
            )
        noted = planner.with_notes(
            target.metadata,
            [s.index for s in lost if planner.is_noted(target.metadata, s.index)],
        )
        new = replace(self.successor(target.metadata), config=noted.config)
        devices = {**target.spare_infos, index: info}
        with contextlib.ExitStack() as members:
            opened = self._open_members(members, devices)
            left_out = self._commit(target, opened, target.metadata, new, {index})
        if index in left_out:
            self._deactivate_spare(name, target.metadata, upper)
            raise DmRemapError(
                f"was to be used again as spare {index}, but takes no metadata: {left_out[index]}",
                device=info.path,
                remedy="replace it, or remove it with discard_remaps: true",
            )
        back = ActiveSpare(index, devno, self._candidate(info.path, with_signatures=False))
        self._serve(
            replace(
                target,
                spares=(*target.spares, back),
                lost_spares=lost,
                choice=replace(target.choice, metadata=new),
            )
        )
        self.backup(new)

    def _serve(self, target: ActiveTarget) -> None:
        """Give the map, and the target above what holds errors, the tables for its spares."""
        name = target.name
        with self._mapper.events() as events:
            self._freezer.swap_map(target, target.map_table(target.metadata), events)
            self._step("map_swapped")
            if target.path:
                sectors = target.metadata.config["main"]["sectors"]
                hold = self._existing(stack.hold_name(name)).devno
                self._mapper.load(name, stack.top_table(sectors, hold, target.unavailable))
                self._mapper.swap(name, events)

    def _do_serve_spares(self, plan: Plan, action: planner.Action) -> None:
        self._serve(self.require(plan.name))

    def _do_note_missing(self, plan: Plan, action: planner.Action) -> None:
        """Commit, before a target is used, which of its spares are missing."""
        metadata = _metadata_of(plan)
        noted = planner.with_notes(metadata, action.details["missing"])
        new = replace(self.successor(metadata), config=noted.config)
        stale = self._left_out.get(metadata.target_uuid, set())
        with contextlib.ExitStack() as members:
            opened = self._open_members(members, plan.spares)
            self._commit_to(opened, metadata, new, stale & set(opened))
        self.backup(new)

    def _do_add_spare(self, plan: Plan, action: planner.Action) -> None:
        target, index = self.require(plan.name), action.details["index"]
        entry = _metadata_of(plan).config["spares"][index]
        new = self._with_entry(target.metadata, index, entry)
        current = target.metadata
        devices = {**target.spare_infos, index: plan.spares[index]}
        with contextlib.ExitStack() as members:
            opened = self._open_members(members, devices)
            # First the new one alone: a spare that others name is never without metadata.
            alone = {index: opened.pop(index)}
            prepared = copies.prepare_commit(alone, current, new, {index})
            copies.prepare_commit(opened, current, new, self._stale(target))
            prepared.write(self._step)
            self._commit(target, opened, current, new)
        self.backup(new)

    def _do_remove_spare(self, plan: Plan, action: planner.Action) -> None:
        target, index = self.require(plan.name), action.details["index"]
        self._commit_alone(target, self._with_entry(target.metadata, index, None), without=index)
        left = tuple(spare for spare in target.spares if spare.index != index)
        if target.main is None:
            # The freezing devices may hand flushes to the spare that goes.
            self._freezer.park(replace(target, spares=left, lost_spares=()), anew=True)

    def _with_entry(self, metadata: Metadata, index: int, entry: Any) -> Metadata:
        """The next generation, with another entry in its list of spares."""
        entries = list(metadata.config["spares"])
        entries += [None] * (index + 1 - len(entries))
        entries[index] = entry
        config = {**metadata.config, "spares": entries}
        return metadata.successor(time.time_ns(), host_id=host_id(), config=config)

    def _do_drain_spare(self, plan: Plan, action: planner.Action) -> list[RemappedChunk]:
        return self._empty_spare(plan, action, frozenset())

    def _do_discard_chunks(self, plan: Plan, action: planner.Action) -> list[RemappedChunk]:
        return self._empty_spare(plan, action, frozenset({action.details["index"]}))

    def _empty_spare(
        self, plan: Plan, action: planner.Action, discard: frozenset[int]
    ) -> list[RemappedChunk]:
        """Move all chunks off a spare, some in each freeze."""
        target, index = self.require(plan.name), action.details["index"]
        self._freezer.check_names(target)
        lock_memory()
        route = Route(
            avoid=frozenset(action.details["avoid"]),
            prefer=frozenset(action.details["prefer"]),
            discard=discard,
        )
        lost = {spare.index: spare.reason for spare in target.lost_spares}
        if (index in lost) != bool(discard):
            raise DmRemapError(
                lost.get(index, "can be read again, so nothing on it is given up"),
                device=action.device,
                remedy="look at the target again and decide anew",
            )
        chunks = planner.chunks_on(target.metadata, index)
        done: list[RemappedChunk] = []
        with contextlib.ExitStack() as opened:
            disks = opened.enter_context(self.opened(target))
            opened.enter_context(self._guarded(target, disks))
            for first in range(0, len(chunks), planner.DRAIN_CHUNKS):
                batch = chunks[first : first + planner.DRAIN_CHUNKS]
                with self._mapper.events() as events:
                    moved = self.move(target, disks, batch, Patience(), events, route=route)
                choice = replace(target.choice, metadata=moved.metadata)
                target = replace(target, choice=choice, table=())
                done += moved.chunks
                self._progress(f"{len(done)} of {len(chunks)} chunks have left {action.device}")
                self.backup(moved.metadata)
        self.cut_off(self.require(plan.name))
        return done

    def _do_commit_metadata(self, plan: Plan, action: planner.Action) -> None:
        draft = replace(_metadata_of(plan), timestamp_ns=time.time_ns(), host_id=host_id())
        self._commit_new(plan, None, draft)

    def _commit_new(self, plan: Plan, current: Metadata | None, draft: Metadata) -> None:
        """Commit a generation of a target that is being made, to all spares or not at all."""
        with contextlib.ExitStack() as stack:
            done = copies.commit(
                self._open_members(stack, plan.spares), current, draft, step=self._step
            )
        for index, rewrite in done.items():
            if rewrite.left_out:
                raise DmRemapError(
                    f"took no metadata of the new target: {rewrite.left_out}",
                    device=plan.spares[index].path,
                    remedy="give another spare, with wipe: true for the others",
                )
        self.backup(draft)

    def _do_migrate_chunks(self, plan: Plan, action: planner.Action) -> list[RemappedChunk]:
        """Copy what the old spare stands in for to the new ones, then commit that as generation 1.

        Nothing uses the target yet. Each batch is on its spares for good before the commit.
        """
        taken, old, main = _migration_of(plan)
        draft = replace(_metadata_of(plan), timestamp_ns=time.time_ns(), host_id=host_id())
        chunks = taken.chunks(draft.config["chunk_sectors"])
        done: list[RemappedChunk] = []
        with contextlib.ExitStack() as opened:
            source = opened.enter_context(self._blocks.BlockDevice(old.path))
            disks = Disks(
                main=opened.enter_context(self._blocks.BlockDevice(main.path)),
                spares={
                    index: opened.enter_context(
                        self._blocks.BlockDevice(self._blocks.node_of(devno), writable=True)
                    )
                    for index, devno in self._spare_devnos(plan).items()
                },
                members=self._open_members(opened, plan.spares),
            )
            for first in range(0, len(chunks), planner.DRAIN_CHUNKS):
                batch = chunks[first : first + planner.DRAIN_CHUNKS]
                works = self._gather(plan, batch, disks.old_main, source)
                holder = NewTarget(plan.name, draft, plan.spares)
                self._write_chunks(works, holder, draft, disks, TO_SPARES)
                self._step("data_flushed")
                moves = {work.chunk: work.place for work in works}
                lost = [item for work in works for item in work.lost]
                draft = planner.with_moves(draft, moves, lost)
                done += [_report(work, "") for work in works]
                self._progress(f"{len(done)} of {len(chunks)} chunks are migrated")
        self._commit_new(plan, None, draft)
        return done

    def _spare_devnos(self, plan: Plan) -> dict[int, str]:
        """Device numbers of the integrity devices of a plan's spares, by index."""
        return {
            index: self._existing(stack.spare_name(plan.name, index)).devno for index in plan.spares
        }

    def _gather(
        self, plan: Plan, chunks: Sequence[int], main: OpenDevice, source: OpenDevice
    ) -> list[_Work]:
        """Read chunks from main and from the old spare, each sector from where it is."""
        (taken, old, main_info), metadata = _migration_of(plan), _metadata_of(plan)
        block, patience = metadata.config["block_sectors"], Patience()
        parts: list[tuple[int, migration.Piece, Salvage]] = []
        for chunk in chunks:
            for piece in _pieces_of(metadata, taken, chunk):
                if not piece.lost:
                    device, sector = main, piece.sector
                    if piece.source is not None:
                        device, sector = source, piece.source
                    part = salvage(device, sector, piece.count, block, patience)
                    parts.append((chunk, piece, part))
            self._step("salvaged")
        of_main = [part for _chunk, piece, part in parts if piece.source is None]
        of_spare = [part for _chunk, piece, part in parts if piece.source is not None]
        _confirm_losses(
            [
                _Source(main, main_info.path, (0,), of_main),
                _Source(source, old.path, (0,), of_spare),
            ]
        )
        works = {chunk: _empty_work(metadata, taken, chunk) for chunk in chunks}
        for chunk, piece, part in parts:
            offset = (piece.sector - works[chunk].start) // block
            for outcome in (Outcome.FIRST_READ, Outcome.RETRY):
                for first, count in part.runs(outcome):
                    data = part.blocks(first, count)
                    works[chunk].salvage.keep(offset + first, data, outcome)
        return list(works.values())

    def _do_verify_migration(self, plan: Plan, action: planner.Action) -> None:
        """Read all that was migrated through the target's own map, before anybody can write to it.

        Raises:
            DmRemapError: a sector is not as where it came from; the target is not activated.
        """
        taken, old, main = _migration_of(plan)
        metadata = self._chosen(plan).metadata
        part = stack.map_name(plan.name)
        table = planner.map_table(metadata, main.devno, self._spare_devnos(plan))
        devno = self._create_part(metadata, plan.name, part, table)
        try:
            with contextlib.ExitStack() as opened:
                made, first, second = (
                    opened.enter_context(self._blocks.BlockDevice(path))
                    for path in (self._blocks.node_of(devno), main.path, old.path)
                )
                for chunk in taken.chunks(metadata.config["chunk_sectors"]):
                    for piece in _pieces_of(metadata, taken, chunk):
                        source = first if piece.source is None else second
                        _compare(piece, metadata, made, source)
        finally:
            self._mapper.remove(part)
        config = migration.verified(metadata.config)
        self._commit_new(plan, metadata, replace(self.successor(metadata), config=config))

    def _chosen(self, plan: Plan) -> copies.Choice:
        """The metadata that the plan's spares have now."""
        surveys = {}
        for info in plan.spares.values():
            with self._blocks.BlockDevice(info.path) as device:
                surveys[info.path] = copies.survey(device)
        return copies.choose(surveys)

    def _do_repair_metadata(self, plan: Plan, action: planner.Action) -> None:
        index = _index_of(plan, action.device)
        spare_uuid = spare_uuid_of(_metadata_of(plan), index)
        choice = self._chosen(plan)
        others = [
            path for path in choice.spares.values() if path not in (*choice.stale, action.device)
        ]
        try:
            with self._blocks.BlockDevice(action.device, writable=True) as device:
                copies.repair(device, choice, spare_uuid)
        except copies.CommitFailed as error:
            if not others:
                raise
            # It stays behind, as a spare that a commit left out.
            self._left_out.setdefault(choice.metadata.target_uuid, set()).add(index)
            self._progress(str(error))

    def _do_write_copies(self, plan: Plan, action: planner.Action) -> None:
        metadata = _metadata_of(plan)
        spare_uuid = spare_uuid_of(metadata, _index_of(plan, action.device))
        with self._blocks.BlockDevice(action.device, writable=True) as device:
            copies.repair(device, copies.only(metadata), spare_uuid)

    def _do_wipe_main(self, plan: Plan, action: planner.Action) -> None:
        self._blocks.erase_signatures(action.device)
        self._wipe_copies(action.device)

    def _do_create_target(self, plan: Plan, action: planner.Action) -> None:
        if plan.main is None:
            raise AssertionError("a plan that creates a target has a main")
        name, metadata, main = plan.name, _metadata_of(plan), plan.main
        if plan.migration:
            metadata = self._chosen(plan).metadata
        if migration.unfinished(metadata):
            raise AssertionError("a target is not activated before its migration is verified")
        spares = self._spare_devnos(plan)
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
            missing = [i for i in planner.configured(metadata) if i not in plan.spares]
            cut = planner.sectors_on(metadata, missing)
            table = self._create_hold(metadata, name, table, main.devno, cut)
        # Without it, the host would not know its target nor whose main it is after a restart.
        kept = self._backups.newest(metadata.target_uuid)
        if kept is None or kept.generation < metadata.generation:
            self.backup(metadata)
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
        """Create the freezing devices, which hold main even when the map does not use it."""
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
        self._freezer.check_names(target)
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
        lock_memory()
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
        self._commit(target, disks.members, target.metadata, new)

    def finish_replacement(self, target: ActiveTarget, config: dict[str, Any]) -> None:
        """Commit the configuration after a replacement, and leave nothing of it in the kernel."""
        self._commit_config(target, config)
        target = self.require(target.name)
        self._clear_leftovers(target)
        target = self.require(target.name)
        if planner.shim_of(target.metadata) == planner.RAID_SHIM and target.shim is None:
            self._insert_shim(target)

    def _clear_leftovers(self, target: ActiveTarget) -> None:
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
        self,
        metadata: Metadata,
        name: str,
        table: Sequence[Segment],
        carrier: str,
        cut: Sequence[tuple[int, int]] = (),
    ) -> list[Segment]:
        """Create the map, and above it what holds failed I/O; the table for the target."""
        self._mapper.arm_queue_timeout(HOLD_SECONDS)
        sectors = metadata.config["main"]["sectors"]
        upper = self._create_part(metadata, name, stack.map_name(name), table)
        hold = self._create_part(
            metadata, name, stack.hold_name(name), stack.hold_table(sectors, upper)
        )
        # Made now, because then udev knows that they are none of its business.
        parts = (stack.place_name(name), stack.frozen_name(name))
        if all(self._mapper.info(part) is None for part in parts):
            self._create_parked(metadata, name, carrier)
        return stack.top_table(sectors, hold, cut)

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
        given_up = action.details.get("without", ())
        self._end_freeze(plan.name, set(range(MAX_SPARES)).difference(given_up), parting=True)

    def _do_tidy(self, plan: Plan, action: planner.Action) -> None:
        target = self.require(plan.name)
        self._resume_spares(target)
        self._clear_leftovers(target)

    def _resume_spares(self, target: ActiveTarget) -> None:
        """Resume spares that an interruption left suspended."""
        for index in range(MAX_SPARES):
            device = self._part(target.device, stack.spare_name(target.name, index))
            if device and device.suspended:
                self._mapper.swap(device.name)

    def _do_update_config(self, plan: Plan, action: planner.Action) -> None:
        target = self.require(plan.name)
        settings = {key: value for key, value in action.details.items() if key != "generation"}
        self._commit_config(target, {**target.metadata.config, **settings})

    def _commit_config(self, target: ActiveTarget, config: dict[str, Any]) -> None:
        self._commit_alone(target, replace(self.successor(target.metadata), config=config))

    def _commit_alone(
        self, target: ActiveTarget, new: Metadata, without: int | None = None
    ) -> None:
        """Commit a generation that moves nothing to all spares, or to all but one."""
        devices = {i: info for i, info in target.spare_infos.items() if i != without}
        with contextlib.ExitStack() as members:
            self._commit(target, self._open_members(members, devices), target.metadata, new)
        self.backup(new)

    def _do_hold_errors(self, plan: Plan, action: planner.Action) -> None:
        target = self.require(plan.name)
        # What an interrupted switch left stands under nothing.
        self._remove_parts(target.device, stack.hold_name(plan.name), stack.map_name(plan.name))
        table = self._create_hold(
            target.metadata, plan.name, target.table, target.carrier, target.unavailable
        )
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

    def _do_cut_off(self, plan: Plan, action: planner.Action) -> None:
        self.cut_off(self.require(plan.name))

    def cut_off(
        self, target: ActiveTarget, release: Callable[[], None] | None = None
    ) -> ActiveTarget:
        """Let I/O to chunks on lost spares fail above the hold, where it makes nothing else wait.

        What a target without a hold maps to a lost spare fails anyway. The map still leads there,
        so that the next flush fails: the spare may have lost what it had acknowledged. Called
        again for that, it lets the flush fail, and the map does not lead there any more. The
        caller holds the lock.

        Args:
            target: the target as it is now.
            release: lets held I/O go on, in place of the method of that name.

        Returns:
            The target as it is then; itself if nothing has changed.
        """
        if not target.path or not (target.certain or target.past_hold):
            return target
        name, sectors = target.name, target.metadata.config["main"]["sectors"]
        top = stack.top_table(
            sectors, self._existing(stack.hold_name(name)).devno, target.unavailable
        )
        fresh = subtract_ranges(target.unavailable, target.cut)
        used = {mapping.linear_target(s)[0] for s in target.table if s.target == "linear"}
        owed = not fresh and any(lost.devno in used for lost in target.lost_spares)
        let_go = release or (lambda: self.release(target))
        after = target
        with self._mapper.events() as events:
            if target.past_hold:
                self.release(target)
            elif fresh or owed:
                past = stack.top_table(sectors, target.map.devno, target.unavailable)
                failed = self._fail_waiting(target, fresh, past, let_go, events)
                if failed and owed:
                    lost = tuple(replace(lost, mapped=False) for lost in target.lost_spares)
                    after = replace(target, lost_spares=lost)
                    self._freezer.swap_map(after, after.map_table(after.metadata), events)
                self.release(target)
            elif target.cut == target.unavailable:
                return target
            elif list(target.table) != target.map_table(target.metadata):
                # A spare that can be used again is not in the map any more.
                self._freezer.swap_map(target, target.map_table(target.metadata), events)
            self._mapper.load(name, top)
            self._mapper.swap(name, events)
        self._step("cut_off")
        if target.past_hold or target.cut != target.unavailable:
            after = replace(after, cut=target.unavailable, past_hold=False)
        return after

    def _fail_waiting(
        self,
        target: ActiveTarget,
        ranges: Sequence[tuple[int, int]],
        past: Sequence[Segment],
        release: Callable[[], None],
        events: Any,
    ) -> bool:
        """Let I/O fail that lost spares keep waiting; then the target is past its hold.

        Multipath can only let all that waits fail. So the chunks are frozen, the rest goes on, and
        what is left in flight when the target's table is swapped is theirs alone, and flushes that
        reach a lost spare.

        Args:
            target: the target, whose errors are held.
            ranges: sectors of whole chunks to be frozen.
            past: the target's table that leads to the map, and where these chunks fail.
            release: lets held I/O go on.
            events: what `DeviceMapper.events` gave.

        Returns:
            Whether anything was let fail.
        """
        name, hold = target.name, stack.hold_name(target.name)
        config = target.metadata.config
        chunks = extents.chunks_of(ranges, config["chunk_sectors"], config["main"]["sectors"])
        turns = itertools.count()
        failed: list[int] = []

        def let_fail() -> None:
            turn = next(turns)
            path = self.path_of(name)
            if turn % 2 == 0:
                # Others may wait because one of these has failed the path, and go on first.
                if not path.active:
                    self.release(target)
            elif chunks or not path.active:
                failed.append(turn)
                self._mapper.message(hold, "fail_if_no_path")
                if chunks:
                    self._freezer.fail(name)

        try:
            if chunks:
                self._freezer.freeze(target, chunks, FREEZE_SECONDS, events)
            release()
            self._mapper.load(name, past)
            self._mapper.swap_while(name, let_fail, events)
            self._step("past_hold")
            if chunks:
                self.release(target)
                self._freezer.thaw(target, target.metadata, chunks, events)
        except BaseException:
            self.release(target)
            self._end_freeze(name, ())
            raise
        if chunks:
            self._freezer.park(target)
        return bool(failed)

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
        with self._mapper.events() as events:
            self._freezer.swap_map(target, table, events)

    def path_of(self, name: str) -> stack.PathState:
        """State of the path of a target whose errors are held.

        Raises:
            DmRemapError: there is no such device.
        """
        hold = stack.hold_name(name)
        (status,), (table,) = self._mapper.status(hold), self._mapper.table(hold)
        return stack.path_state(status, table)

    def devices_below(self, target: ActiveTarget) -> frozenset[str]:
        """Device numbers that the target's map uses now, but for the freezing device."""
        frozen = self._part(target.device, stack.frozen_name(target.name))
        try:
            used = frozenset(self._mapper.dependencies(target.map.name))
        except DmRemapError:
            return frozenset()
        return used - {frozen.devno if frozen else ""}

    def is_current(self, target: ActiveTarget, disks: Disks) -> bool:
        """Whether a target that holds its errors is as it was observed.

        Whoever changes its chunks commits a generation, so a look at the metadata tells.
        """
        device = self._mapper.info(target.name)
        if device is None or target.path is None or not (target.tidy and target.certain):
            return False
        if (device.uuid, device.devno) != (target.device.uuid, target.device.devno):
            return False
        if not self.is_above_hold(target.name):
            return False
        shim = self._mapper.info(stack.shim_name(target.name))
        if (shim and shim.devno) != (target.shim and target.shim.devno):
            return False
        return copies.carries(disks.members, target.metadata)

    def is_above_hold(self, name: str) -> bool:
        """Whether the target of that name stands on what holds failed I/O, and on nothing else."""
        hold = self._mapper.info(stack.hold_name(name))
        return hold is not None and self._mapper.dependencies(name) == [hold.devno]

    def drain(self, target: ActiveTarget) -> None:
        """Wait until nothing is in flight below the map, none of whose chunks is frozen."""
        # A swap waits for that, even if the new table is the old one.
        self._mapper.load(target.map.name, self._mapper.table(target.map.name))
        self._mapper.swap(target.map.name)

    def fail_held(self, target: ActiveTarget) -> None:
        """Let all I/O that waits fail, and hold what fails from now on.

        What fails in between fails for good: if it were held, it would be tried again.
        """
        if target.path is None:
            return
        hold = stack.hold_name(target.name)
        self._mapper.message(hold, "fail_if_no_path")
        # The kernel lets it fail by and by, and what is not through by then would be tried again.
        self._mapper.wait_idle(hold, FAILING_SECONDS)
        self._mapper.message(hold, f"reinstate_path {target.path.devno}")
        self._mapper.message(hold, "queue_if_no_path")

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
        return self._by_plan(
            name,
            lambda target, generation: planner.plan_remap(target, ranges, generation),
            ranges,
            expected_generation,
            patience or Patience(),
        )

    def return_to_main(
        self,
        name: str,
        ranges: Sequence[tuple[int, int]],
        expected_generation: int | None = None,
        patience: Patience | None = None,
    ) -> RemapReport:
        """Move every chunk that ``ranges`` touch from its spare to main; the caller holds the lock.

        A chunk that has a sector which cannot be read, or whose place on main does not keep its
        data, stays where it is; the report says why. The arguments and errors are those of `remap`.
        """
        return self._by_plan(
            name,
            lambda target, generation: self.plan_return(target, ranges, generation),
            ranges,
            expected_generation,
            patience or Patience(),
            Route(to_main=True),
        )

    def plan_return(
        self,
        target: ActiveTarget,
        ranges: Sequence[tuple[int, int]],
        expected_generation: int | None = None,
    ) -> Plan:
        """Plan the return of chunks to main, but for those with sectors that cannot be read."""
        lost = extents.merge_sectors(self.lost_before(target, ranges))
        return planner.plan_return(target, ranges, expected_generation, lost)

    def change_sectors(
        self,
        name: str,
        ranges: Sequence[tuple[int, int]],
        *,
        returned: bool,
        expected_generation: int | None = None,
        patience: Patience | None = None,
        files_seconds: float = 60,
        check: bool = False,
    ) -> RemapReport:
        """Remap or return chunks under the target's lock, and find out whom lost sectors belong to.

        Args:
            name: the target.
            ranges: pairs of first sector and count on the target.
            returned: back to main, otherwise to a spare.
            expected_generation: refuse unless the metadata is at this generation.
            patience: how hard to try to read failing blocks.
            files_seconds: how long to look for the files of lost sectors; 0 does not look.
            check: change nothing; the report says what would be done.

        Raises:
            Refused: nothing was changed.
            DmRemapError: a step failed; the target is as its metadata says.
        """
        with self.locked(name):
            if check:
                target = self.require(name)
                plan_for = self.plan_return if returned else planner.plan_remap
                plan = plan_for(target, ranges, expected_generation)
                lost = self.lost_before(target, ranges)
                report = RemapReport(plan, staying(target, lost) if returned else [], lost)
            else:
                change = self.return_to_main if returned else self.remap
                report = change(name, ranges, expected_generation, patience)
        if files_seconds > 0:
            self.find_files(name, report, files_seconds)
        return report

    def _by_plan(
        self,
        name: str,
        plan_for: Callable[[ActiveTarget, int | None], Plan],
        ranges: Sequence[tuple[int, int]],
        expected_generation: int | None,
        patience: Patience,
        route: Route = TO_SPARES,
    ) -> RemapReport:
        begun = time.monotonic()
        target = self.require(name)
        first = plan_for(target, expected_generation)
        upkeep = planner.plan_upkeep(target)
        self.apply(upkeep)
        lock_memory()
        if upkeep.changes:
            target = self.require(name)
        plan = plan_for(target, None)
        lost_before = self.lost_before(target, ranges)
        report = self._carry_out(target, plan, patience, route)
        report.plan = replace(
            report.plan,
            before=first.before,
            actions=upkeep.actions + report.plan.actions,
            warnings=(*first.warnings, *report.plan.warnings),
        )
        report.lost_before = lost_before
        if route.to_main:
            report.chunks = sorted(
                [*report.chunks, *staying(target, lost_before)], key=lambda chunk: chunk.chunk
            )
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
        # I/O to frozen chunks would wait, and to a suspended map for ever.
        waits = target.frozen or target.map.suspended
        lost = [] if waits else [(item.sector, item.count) for item in metadata.lost]
        asked = [
            (chunk * chunk_sectors, chunk_sectors)
            for chunk in extents.chunks_of(ranges, chunk_sectors, total)
        ]
        known = [item for piece in asked for item in intersect_ranges(lost, piece)]
        if not known:
            return []
        # Reads of the target may be held until somebody heals it, who waits for the lock.
        with self._blocks.BlockDevice(target.map.node) as device:
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

    def _carry_out(
        self, target: ActiveTarget, plan: Plan, patience: Patience, route: Route
    ) -> RemapReport:
        chunks = [
            action.details["chunk"]
            for action in plan.actions
            if action.kind in ("remap_chunk", "return_chunk")
        ]
        if not chunks:
            return RemapReport(planner.remap_actions(target, (), ()))
        self._freezer.check_names(target)
        with contextlib.ExitStack() as opened:
            disks = opened.enter_context(self.opened(target, main_writable=route.to_main))
            events = opened.enter_context(self._mapper.events())
            opened.enter_context(self._guarded(target, disks))
            moved = self.move(target, disks, chunks, patience, events, route=route)
        if moved.metadata is not target.metadata:
            self.backup(moved.metadata)
        if route.to_main:
            done = planner.return_actions(target, [c.chunk for c in moved.chunks if c.moved])
        else:
            done = planner.remap_actions(target, moved.extents, moved.lost)
        return RemapReport(
            plan=replace(done, warnings=tuple(moved.left_out.values())),
            chunks=moved.chunks,
            salvage_seconds=moved.salvage_seconds,
            pause_seconds=moved.pause_seconds,
        )

    @contextlib.contextmanager
    def opened(self, target: ActiveTarget, main_writable: bool = False) -> Iterator[Disks]:
        """Open what a move reads and writes.

        Args:
            target: the target.
            main_writable: open main for a move to it, or because its replacement is undone.

        Raises:
            DmRemapError: a device cannot be opened.
        """
        with contextlib.ExitStack() as opened:
            new = target.replacement
            yield Disks(
                main=opened.enter_context(
                    self._blocks.BlockDevice(target.main.path, writable=main_writable)
                )
                if target.main
                else None,
                spares={
                    spare.index: opened.enter_context(
                        self._blocks.BlockDevice(self._blocks.node_of(spare.devno), writable=True)
                    )
                    for spare in target.spares
                },
                members=self._open_members(opened, target.spare_infos),
                new_main=opened.enter_context(self._blocks.BlockDevice(new.path, writable=True))
                if new
                else None,
            )

    def open_main(self, target: ActiveTarget) -> OpenDevice:
        """Open main once more, for reading.

        Raises:
            DmRemapError: it cannot be opened, or is not known.
        """
        if target.main is None:
            raise DmRemapError("its main is not known", device=target.name)
        return self._blocks.BlockDevice(target.main.path)

    def open_part(self, target: ActiveTarget, spare: int | None) -> OpenDevice:
        """Open main, or a spare's integrity device by its index, for reading.

        Raises:
            DmRemapError: it cannot be opened, or is not there.
        """
        if spare is None:
            return self.open_main(target)
        found = next((one for one in target.spares if one.index == spare), None)
        if found is None:
            raise DmRemapError(f"its spare {spare} is not there", device=target.name)
        return self._blocks.BlockDevice(self._blocks.node_of(found.devno))

    def move(
        self,
        target: ActiveTarget,
        disks: Disks,
        chunks: Sequence[int],
        patience: Patience,
        events: Any = None,
        wanted: Callable[[int, Salvage], bool] = lambda chunk, salvage: True,
        release: Callable[[], None] | None = None,
        route: Route = TO_SPARES,
    ) -> Moved:
        """Move chunks from where they are to spares or to main; the caller holds the lock.

        Held I/O goes on as soon as the chunks are frozen, that to the chunks when they are moved.

        Args:
            target: the target, of whose chunks none is frozen.
            disks: its open devices; main is writable for a move to it.
            chunks: logical chunks, ascending; for a move to main they are on spares.
            patience: how hard to try to read failing blocks.
            events: what `DeviceMapper.events` gave, for a target that udev must be told about.
            wanted: says of a chunk that was read whether it is to be moved after all.
            release: lets held I/O go on, in place of the method of that name.
            route: where the chunks may go.

        Raises:
            DmRemapError: a step failed; the chunks are where the metadata says.
        """
        begun = time.monotonic()
        attempted: set[int] = set()
        try:
            # A salvage may take its budget twice over before what waits fails.
            seconds = max(FREEZE_SECONDS, 2 * patience.budget)
            self._freezer.freeze(target, chunks, seconds, events)
            if release:
                release()
            else:
                self.release(target)
            carried = self._carry(target, disks, chunks, patience, wanted, route, attempted)
            self._freezer.thaw(target, carried.metadata, chunks, events)
        except BaseException:
            # Only the metadata on the spares can say now where the chunks are.
            self._end_freeze(target.name, attempted)
            raise
        pause_seconds = time.monotonic() - begun
        self._freezer.park(target)
        return replace(carried, pause_seconds=pause_seconds)

    def move_held(
        self,
        target: ActiveTarget,
        disks: Disks,
        chunks: Sequence[int],
        patience: Patience,
        wanted: Callable[[int, Salvage], bool] = lambda chunk, salvage: True,
        release: Callable[[], None] | None = None,
    ) -> Moved:
        """Move chunks of a target whose path has failed, so that all of its I/O waits anyway.

        Takes a single swap, but keeps everything waiting, so ``patience`` should be short. The
        arguments and errors are those of `move`; the caller has made sure that the path is failed.
        """
        begun = time.monotonic()
        attempted: set[int] = set()
        try:
            # Waits for what is in flight, and lets nothing through that was on its way.
            self._mapper.suspend(target.map.name)
            self._step("suspended")
            carried = self._carry(target, disks, chunks, patience, wanted, TO_SPARES, attempted)
            if carried.extents:
                self._mapper.load(target.map.name, target.map_table(carried.metadata))
            self._mapper.swap(target.map.name)
            self._step("swapped")
        except Unfinished:
            # Nothing was changed yet, and it need not be found out anew.
            self._mapper.swap(target.map.name)
            raise
        except BaseException:
            try:
                # Should nobody be able to tell where the chunks are, the rest must go on.
                if attempted:
                    self._freezer.freeze(target, chunks, FREEZE_SECONDS, None)
                else:
                    self._mapper.swap(target.map.name)
            finally:
                self._end_freeze(target.name, attempted)
            raise
        if release:
            release()
        else:
            self.release(target)
        return replace(carried, pause_seconds=time.monotonic() - begun)

    def _carry(
        self,
        target: ActiveTarget,
        disks: Disks,
        chunks: Sequence[int],
        patience: Patience,
        wanted: Callable[[int, Salvage], bool],
        route: Route,
        attempted: set[int],
    ) -> Moved:
        """Copy chunks that nobody can write to now, and commit where they are.

        Args:
            target: the target.
            disks: its open devices.
            chunks: logical chunks.
            patience: how hard to try to read failing blocks.
            wanted: says of a chunk that was read whether it is to be moved after all.
            route: where the chunks may go.
            attempted: gets the indexes of spares that a commit was begun on.
        """
        begun = time.monotonic()
        works = []
        lost = [(item.sector, item.count) for item in target.metadata.lost]
        for chunk in chunks:
            works.append(self._salvage_chunk(target, chunk, lost, disks, patience, route))
            self._step("salvaged")
        _confirm_losses(_sources(target, disks, works, route))
        works = [work for work in works if wanted(work.chunk, work.salvage)]
        stay: dict[int, str] = {}
        if route.to_main:
            stay = self._write_to_main(works, disks.old_main)
        moving = [work for work in works if work.chunk not in stay]
        new, left_out, written = self._settle(moving, target, disks, route, attempted)
        return Moved(
            metadata=new,
            chunks=[_report(work, stay.get(work.chunk, "")) for work in works],
            extents=[work.place for work in moving if work.place],
            salvage_seconds=(written or time.monotonic()) - begun,
            pause_seconds=0.0,
            left_out=left_out,
        )

    def _settle(
        self,
        works: Sequence[_Work],
        target: ActiveTarget,
        disks: Disks,
        route: Route,
        attempted: set[int],
    ) -> tuple[Metadata, dict[int, str], float]:
        """Write chunks to their places and commit these.

        A spare that took data but not the commit has failed, and its chunks are settled once more
        on others, if there is room: their data is still here.

        Args:
            works: the chunks.
            target: where they belong.
            disks: its open devices.
            route: where they may go.
            attempted: gets the indexes of spares that a commit was begun on.

        Returns:
            The generation, the spares that did not take it, and when the data was written.
        """
        new, left_out, written = target.metadata, dict[int, str](), 0.0
        pending = list(works)
        while pending:
            if not route.to_main:
                before = [work.place for work in pending]
                try:
                    self._write_chunks(pending, target, new, disks, route)
                except DmRemapError:
                    if new is target.metadata:
                        raise
                    for work, place in zip(pending, before):
                        work.place = place
                    break
            self._step("data_flushed")
            written = written or time.monotonic()
            successor = self._next(new, works)
            attempted |= set(disks.members)
            left_out = self._commit(target, disks.members, new, successor)
            new = successor
            self._step("committed")
            pending = [work for work in works if work.place and work.place.spare in left_out]
            route = replace(route, avoid=route.avoid | set(left_out))
        return new, left_out, written

    def _commit(
        self,
        target: ActiveTarget,
        members: Mapping[int, OpenDevice],
        current: Metadata,
        new: Metadata,
        returned: Collection[int] = (),
    ) -> dict[int, str]:
        """Commit to all spares; why some did not take it, by index.

        Args:
            target: the target.
            members: its spares.
            current: the generation that they carry.
            new: the next one.
            returned: indexes of spares that may carry an older one.

        Raises:
            DmRemapError: none took it, or what is on one contradicts what is known.
        """
        stale = self._stale(target).union(returned) & set(members)
        return self._commit_to(members, current, new, stale)

    def _commit_to(
        self,
        members: Mapping[int, OpenDevice],
        current: Metadata | None,
        new: Metadata,
        stale: Collection[int],
    ) -> dict[int, str]:
        done = copies.commit(members, current, new, self._step, stale)
        left_out = {index: rewrite.left_out for index, rewrite in done.items() if rewrite.left_out}
        self._left_out[new.target_uuid] = set(left_out)
        for reason in left_out.values():
            self._progress(f"a spare did not take generation {new.generation}: {reason}")
        return left_out

    def _stale(self, target: ActiveTarget) -> set[int]:
        """Indexes of spares that are known to be behind."""
        return self._left_out.get(target.metadata.target_uuid, set()) | target.behind

    def _write_to_main(self, works: Sequence[_Work], main: OpenDevice) -> dict[int, str]:
        """Write chunks to their places on main and read them back, twice; why some failed there.

        Nothing but the chunk's own data is ever written to main, so this is the test of the place
        too.
        """
        failed = {}
        for work in works:
            if work.salvage.lost:
                failed[work.chunk] = f"{_shown(work.lost)} cannot be read; write them first"
        for _turn in range(2):
            fit = [work for work in works if work.chunk not in failed]
            for work in fit:
                try:
                    main.write(work.start, bytes(work.salvage.data))
                except OSError as error:
                    failed[work.chunk] = f"its place on main cannot be written: {error}"
            try:
                main.flush()
            except OSError as error:
                failed.update({work.chunk: f"main cannot be flushed: {error}" for work in fit})
            for work in fit:
                if work.chunk in failed:
                    continue
                try:
                    if main.read(work.start, work.length) != work.salvage.data:
                        failed[work.chunk] = "its place on main gives back other data"
                except OSError as error:
                    failed[work.chunk] = f"its place on main cannot be read: {error}"
            self._step("main_written")
        return failed

    def _salvage_chunk(
        self,
        target: ActiveTarget,
        chunk: int,
        lost: Sequence[tuple[int, int]],
        disks: Disks,
        patience: Patience,
        route: Route,
    ) -> _Work:
        metadata = target.metadata
        chunk_sectors = metadata.config["chunk_sectors"]
        block_sectors = metadata.config["block_sectors"]
        place = planner.where(metadata, chunk)
        start, length = place["start"], place["count"]
        source = extents.place_of(metadata.extents, chunk)
        sector = source.physical * chunk_sectors if source else start
        self._progress(f"salvage chunk {chunk} of {target.name}")
        known = intersect_ranges(lost, (start, length)) if source else []
        work = _Work(
            chunk=chunk,
            start=start,
            length=length,
            salvage=begin(
                sector,
                length,
                block_sectors,
                [(first + sector - start, count) for first, count in known],
                patience,
            ),
            source=source,
            known=known,
        )
        if source and source.spare in route.discard:
            work.salvage.outcomes = [Outcome.LOST] * len(work.salvage.outcomes)
            return work
        if source and source.spare not in disks.spares:
            raise DmRemapError(
                f"chunk {chunk} is on spare {source.spare}, which cannot be used",
                device=target.name,
                remedy="attach that spare again, or remove it with discard_remaps: true",
            )
        device = disks.spares[source.spare] if source else disks.main_of(metadata, chunk)
        salvage(device, sector, length, block_sectors, patience, resume=work.salvage)
        return work

    def _write_chunks(
        self,
        works: Sequence[_Work],
        target: Holder,
        metadata: Metadata,
        disks: Disks,
        route: Route,
    ) -> None:
        """Give the chunks places, write what was read of them, and flush.

        A place that is bad itself, or that has old data where a lost sector must read as an error
        and cannot be made to, is passed over, and a spare that fails is not used.

        Raises:
            Refused: the spares have too few free chunks.
            DmRemapError: no spare can be written.
        """
        usable = {
            index: geometry
            for index, geometry in planner.usable_geometries(target).items()
            if index not in route.avoid
        }
        shunned: list[tuple[int, int]] = []
        faults: dict[int, OSError] = {}
        bad_places: Counter[int] = Counter()
        pending = list(works)
        while pending:
            unsettled = {work.chunk for work in pending}
            settled = [work.extent for work in works if work.chunk not in unsettled]
            taken = [*metadata.extents, *settled]
            self._place_chunks(pending, taken, target, usable, shunned, faults, route.prefer)
            dirty: set[int] = set()
            for work in pending:
                index = work.extent.spare
                if index not in usable:
                    continue
                try:
                    _try_place(work, disks.members[index], usable[index])
                except OSError as error:
                    faults[index] = error
                    dirty.add(work.chunk)
                    shunned.append((index, work.extent.physical))
                    bad_places[index] += 1
                    if bad_places[index] == _BAD_PLACES or error.errno not in MEDIUM_ERRORS:
                        usable.pop(index)
                    continue
                try:
                    if not self._write_chunk(work, target, disks, usable[index]):
                        dirty.add(work.chunk)
                        shunned.append((index, work.extent.physical))
                except OSError as error:
                    faults[index] = error
                    usable.pop(index)
            for index in {work.extent.spare for work in pending} & set(usable):
                try:
                    disks.spares[index].flush()
                    for work in pending:
                        if work.extent.spare == index and work.chunk not in dirty:
                            _check_chunk(work, disks.spares[index], metadata)
                except OSError as error:
                    faults[index] = error
                    usable.pop(index)
            # A spare that fails takes the chunks with it that it had taken before.
            pending = [w for w in works if w.chunk in dirty or w.extent.spare not in usable]

    def _place_chunks(
        self,
        works: Sequence[_Work],
        taken: Sequence[Extent],
        target: Holder,
        usable: Mapping[int, Geometry],
        shunned: Sequence[tuple[int, int]],
        faults: Mapping[int, OSError],
        prefer: Collection[int],
    ) -> None:
        try:
            chunks = [work.chunk for work in works]
            placed = planner.choose_places(target.metadata, chunks, usable, taken, shunned, prefer)
        except Refused as error:
            for index, info in target.spare_infos.items():
                if index in faults:
                    raise DmRemapError(
                        f"cannot be written: {faults[index]}",
                        device=info.path,
                        remedy="nothing was changed; copy the data to another disk",
                    ) from error
            raise
        for work, extent in zip(works, placed):
            work.place = extent

    def _write_chunk(self, work: _Work, target: Holder, disks: Disks, geometry: Geometry) -> bool:
        """Write what was read of a chunk; whether its lost blocks read as errors then."""
        index, metadata = work.extent.spare, target.metadata
        _write_readable(work, disks.spares[index], metadata)
        if _lost_fail(work, disks.spares[index], metadata):
            return True
        self._poison(target, work, disks, geometry)
        return _lost_fail(work, disks.spares[index], metadata)

    def _poison(self, target: Holder, work: _Work, disks: Disks, geometry: Geometry) -> None:
        """Make the chunk's lost blocks read as errors where the place has old data.

        A suspend writes back what dm-integrity's journal holds of them, and empties the journal on
        the disk, which would bring old data back when the spare is next activated. It does the
        latter only if anything was written since the spare was resumed (`wrote_to_journal` in
        drivers/md/dm-integrity.c). Then other bytes below match no tag any more.
        """
        index, block = work.extent.spare, work.salvage.block_sectors
        lost, member = work.salvage.runs(Outcome.LOST), disks.members[index]
        first_lost = _spare_sector(work, target.metadata) + lost[0][0] * block
        disks.spares[index].write(first_lost, bytes(block * SECTOR_BYTES))
        part = stack.spare_name(target.name, index)
        self._mapper.suspend(part)
        self._mapper.swap(part)
        place = geometry.chunk_sector(work.extent.physical)
        for first, count in lost:
            old = member.read(place + first * block, count * block)
            member.write(place + first * block, bytes(byte ^ 0xFF for byte in old))
        member.flush()
        self._step("poisoned")

    def _next(self, metadata: Metadata, works: Sequence[_Work]) -> Metadata:
        moves = {work.chunk: work.place for work in works}
        lost = [item for work in works for item in work.lost]
        return planner.with_moves(self.successor(metadata), moves, lost)

    def _open_members(
        self, stack: contextlib.ExitStack, spares: Mapping[int, DeviceInfo]
    ) -> dict[int, OpenDevice]:
        return {
            index: stack.enter_context(self._blocks.BlockDevice(info.path, writable=True))
            for index, info in spares.items()
        }

    @contextlib.contextmanager
    def _guarded(self, target: ActiveTarget, disks: Disks) -> Iterator[None]:
        """Keep a process that ends the freeze of the target if this one dies in the block.

        It has the target's lock too, so nobody else gets it before the freeze has ended.
        """
        name = target.name
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
                lock_memory()
                # The end of the pipe without a word is the end of the other process.
                if not os.read(ours, 1):
                    self._end_freeze(name, disks.members)
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

    def _end_freeze(
        self, name: str, members: Collection[int] | None = None, parting: bool = False
    ) -> None:
        """End a freeze that was interrupted, as the metadata on the spares has it.

        Args:
            name: the target.
            members: indexes of the spares that a commit may have been begun on; None for all.
            parting: spares that the metadata notes as missing, by the user's word, hinder nothing.
        """
        try:
            target = self.require(name)
            self._resume_spares(target)
            chunks = held_chunks(target)
            if not chunks and not target.map.suspended:
                self._freezer.park(target)
                return
            hiding = [i for i in target.choice.missing if members is None or i in members]
            lost = {
                chunk
                for s in target.lost_spares
                for chunk in planner.chunks_on(target.metadata, s.index)
            }
            # What is on a lost spare shows no old data.
            doubtful = bool(hiding) and not lost.issuperset(chunks)
            noted = all(planner.is_noted(target.metadata, i) for i in hiding)
            # A suspended map does not tell which chunks were on the move, so none can be spared.
            if (hiding and not chunks) or (doubtful and parting and noted):
                target = self._part_from_missing(target)
            elif doubtful:
                # A newer generation may be there, and would later show the chunks' old data.
                raise DmRemapError(
                    f"spares {hiding} cannot be read, and may have a newer generation that says "
                    f"where chunks {chunks} are",
                    device=name,
                    remedy="attach the spares again, or remove them with discard_remaps: true; "
                    "until then these chunks fail",
                )
            # A generation that was begun must be durable before its mapping is used.
            self._repair_all(target)
            with self._mapper.events() as events:
                if chunks:
                    self._freezer.thaw(target, target.metadata, chunks, events)
                else:
                    self._freezer.swap_map(target, target.map_table(target.metadata), events)
            self._freezer.park(target)
        except BaseException:
            self._fail_frozen(name)
            raise

    def _part_from_missing(self, target: ActiveTarget) -> ActiveTarget:
        """Commit a generation without the missing spares; the target with it.

        Should one of them carry a generation that nobody else has, it is another history from now
        on, and is refused when it comes back.
        """
        self._repair_all(target)
        target = self.require(target.name)
        self._commit_alone(target, self.successor(target.metadata))
        return self.require(target.name)

    def _repair_all(self, target: ActiveTarget) -> None:
        """Bring all spares to the chosen generation, or at least one.

        Raises:
            DmRemapError: no spare holds it whole.
        """
        upkeep = planner.plan_upkeep(target)
        for action in upkeep.actions:
            if action.kind == "repair_metadata":
                self._do_repair_metadata(upkeep, action)

    def _fail_frozen(self, name: str) -> None:
        device = self._existing(name)
        upper, _path = self._map_of(device)
        frozen = self._part(device, stack.frozen_name(name))
        if frozen and frozen.devno in self._mapper.dependencies(upper.name):
            self._freezer.fail(name)

    def backup(self, metadata: Metadata) -> None:
        """Keep the metadata on the host too; a backup that fails costs no remap."""
        try:
            self._backups.keep(metadata)
        except OSError as error:
            self._progress(f"no backup in {self._backups.folder}: {error}")


def host_id() -> uuid.UUID:
    """What names this host in metadata and events, or zero where it has no machine id."""
    try:
        return hashed_machine_id()
    except (OSError, ValueError):
        return uuid.UUID(int=0)


def request_seen(engine: Engine, request: Request) -> Seen:
    """Observe what ``request`` names."""
    return engine.see(
        request.name, request.main, request.spares, request.degraded, request.migrate_from
    )


def _dm_uuid(metadata: Metadata) -> str:
    return stack.UUID_PREFIX + metadata.target_uuid.hex


def _metadata_of(plan: Plan) -> Metadata:
    if plan.metadata is None:
        raise AssertionError("only plans with metadata have such actions")
    return plan.metadata


def _index_of(plan: Plan, path: str) -> int:
    return next(index for index, info in plan.spares.items() if info.path == path)


def _judged(target: ActiveTarget, over_main: str) -> ActiveTarget:
    """The target with its certainty.

    A spare that the map does not use, although chunks are on it, counts as lost for as long as
    another one is: an interruption left it so on its return, and `_do_return_spare` ends that.
    """
    if not target.lost_spares or _agrees(target, over_main):
        return replace(target, certain=True)
    used = {mapping.linear_target(s)[0] for s in target.table if s.target == "linear"}
    idle = {
        spare.index: spare
        for spare in target.spares
        if spare.devno not in used and planner.fails_in_map(target, spare.index)
    }
    lost = [*target.lost_spares]
    for index, spare in idle.items():
        info = spare.candidate.info
        reason = "is there again, and the target does not use it yet"
        lost.append(LostSpare(index, spare.devno, info.devno, info.path, reason, mapped=False))
    without = replace(
        target,
        spares=tuple(spare for spare in target.spares if spare.index not in idle),
        lost_spares=tuple(sorted(lost, key=lambda spare: spare.index)),
    )
    if idle and without.spares and _agrees(without, over_main):
        return replace(without, certain=True)
    return replace(target, certain=False)


def _agrees(target: ActiveTarget, over_main: str = "") -> bool:
    """Whether the live map is that of the chosen generation.

    Args:
        target: the target.
        over_main: device number of what an ended replacement has left over its main.
    """
    live = list(target.table)
    if over_main and target.main:
        live = [_onto(segment, over_main, target.main.devno) for segment in live]
    positions = {chunk: position for position, chunk in enumerate(held_chunks(target))}
    devno = target.frozen.devno if target.frozen else ""
    return live == target.map_table(target.metadata, positions, devno)


def _onto(segment: Segment, device: str, below: str) -> Segment:
    """A segment on what is below the device, which is as long."""
    if segment.target == "linear":
        used, offset = mapping.linear_target(segment)
        if used == device:
            return replace(segment, params=f"{below} {offset}")
    return segment


def _migration_of(plan: Plan) -> tuple[migration.Migration, DeviceInfo, DeviceInfo]:
    """What a new target takes from a kernel target, that one's spare, and main."""
    if plan.migration is None or plan.old_spare is None or plan.main is None:
        raise AssertionError("only plans with a migration have such actions")
    return plan.migration, plan.old_spare, plan.main


def _pieces_of(metadata: Metadata, taken: migration.Migration, chunk: int) -> list[migration.Piece]:
    """What a chunk of a new target is made of."""
    place = planner.where(metadata, chunk)
    return taken.pieces(place["start"], place["count"])


def _empty_work(metadata: Metadata, taken: migration.Migration, chunk: int) -> _Work:
    """A chunk of a new target before anything of it was read, all of it lost so far."""
    place = planner.where(metadata, chunk)
    start, length = place["start"], place["count"]
    everything = begin(
        start, length, metadata.config["block_sectors"], [(start, length)], Patience()
    )
    known = [(p.sector, p.count) for p in taken.pieces(start, length) if p.lost]
    return _Work(chunk, start, length, everything, known=known)


def _compare(
    piece: migration.Piece, metadata: Metadata, made: OpenDevice, source: OpenDevice
) -> None:
    """Check that a piece of a new target reads as where it came from, and fails where it is lost.

    What could be read at the first or a later try only, and cannot be now, was compared with what
    was read then when it was written.

    Raises:
        DmRemapError: it does not.
    """
    block = metadata.config["block_sectors"]
    lost = [(item.sector, item.count) for item in metadata.lost]
    for sector in range(piece.sector, piece.sector + piece.count, block):
        found = _read_or_none(made, sector, block)
        if intersect_ranges(lost, (sector, block)):
            fine = found is None
        else:
            begun = piece.sector if piece.source is None else piece.source
            expected = _read_or_none(source, begun + sector - piece.sector, block)
            fine = found is not None and expected in (None, found) and not piece.lost
        if not fine:
            raise DmRemapError(
                f"sectors {sector}+{block} of the new target are not as on {source.name}, so it is "
                "not activated",
                device=made.name,
                remedy="main and the old spare are as they were; check the new spares and run this "
                "again",
            )


def _read_or_none(device: OpenDevice, sector: int, count: int) -> bytes | None:
    try:
        return device.read(sector, count)
    except OSError as error:
        if error.errno in MEDIUM_ERRORS:
            return None
        raise


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
        data = work.salvage.blocks(first, count)
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
        data = work.salvage.blocks(first, count)
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
        data = work.salvage.blocks(first, count)
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


def _confirm_losses(sources: Sequence[_Source]) -> None:
    """Believe in losses only on a disk that answers before and after one more read of each.

    A disk or path that went away for a while fails reads like bad blocks do. What is known to be
    lost is read here once: it may have been written since.
    """
    for source in sources:
        _check_alive(source)
        for part in source.parts:
            part.read_again(source.device)
        _check_alive(source)


@dataclass(frozen=True)
class _Source:
    """A device that chunks come from: its path, and the errors that do not speak against it.

    ``parts`` are what was read of it.
    """

    device: OpenDevice
    path: str
    fine: tuple[int, ...]
    parts: list[Salvage]


def _sources(
    target: ActiveTarget, disks: Disks, works: Sequence[_Work], route: Route
) -> list[_Source]:
    """The devices that the chunks come from, but for those that are not read."""
    paths = {spare.index: spare.candidate.info.path for spare in target.spares}
    found: dict[str, _Source] = {}
    fine: tuple[int, ...]
    for work in works:
        if work.source and work.source.spare in route.discard:
            continue
        if work.source:
            # A spare's unwritten blocks read as EILSEQ.
            device, fine = disks.spares[work.source.spare], _TAG_ERRORS
            path = paths[work.source.spare]
        else:
            device, fine = disks.main_of(target.metadata, work.chunk), (0,)
            info = target.replacement if device is disks.new_main else target.main
            path = info.path if info else target.name
        found.setdefault(path, _Source(device, path, fine, [])).parts.append(work.salvage)
    return list(found.values())


def _check_alive(source: _Source) -> None:
    lost = [item for part in source.parts for item in part.lost]
    block = source.parts[0].block_sectors if source.parts else 1
    if lost and not answers(source.device, lost, block, source.fine):
        raise DmRemapError(
            "reads fail everywhere, so it is the disk or its path and not a bad sector",
            device=source.path,
            remedy="check its cable, power and controller; nothing was changed",
        )


def _report(work: _Work, reason: str) -> RemappedChunk:
    place = work.source if reason else work.place
    return RemappedChunk(
        chunk=work.chunk,
        start=work.start,
        count=work.length,
        spare=place.spare if place else None,
        spare_chunk=place.physical if place else None,
        recovered_first_read=work.salvage.count(Outcome.FIRST_READ),
        recovered_on_retry=work.salvage.count(Outcome.RETRY),
        lost=subtract_ranges(work.lost, work.known),
        lost_before=[item for piece in work.known for item in intersect_ranges(work.lost, piece)],
        origin=work.source.spare if work.source else None,
        moved=not reason,
        reason=reason,
    )


def staying(target: ActiveTarget, unreadable: Sequence[tuple[int, int]]) -> list[RemappedChunk]:
    """The chunks that cannot return to main because sectors of them cannot be read."""
    chunk_sectors = target.metadata.config["chunk_sectors"]
    by_chunk: dict[int, list[tuple[int, int]]] = {}
    for sector, count in unreadable:
        by_chunk.setdefault(sector // chunk_sectors, []).append((sector, count))
    found = []
    for chunk, some in by_chunk.items():
        lost = list(extents.merge_sectors(some))
        place = extents.place_of(target.metadata.extents, chunk)
        where = planner.where(target.metadata, chunk)
        found.append(
            RemappedChunk(
                chunk=chunk,
                start=where["start"],
                count=where["count"],
                spare=place.spare if place else None,
                spare_chunk=place.physical if place else None,
                recovered_first_read=0,
                recovered_on_retry=0,
                lost=[],
                lost_before=lost,
                origin=place.spare if place else None,
                moved=False,
                reason=f"{_shown(lost)} cannot be read; write them first",
            )
        )
    return found


def _shown(ranges: Sequence[tuple[int, int]]) -> str:
    """Ranges of sectors in a sentence."""
    first, more = ranges[0], len(ranges) - 1
    text = f"sectors {first[0]}+{first[1]}"
    return f"{text} and {count_of(more, 'more range')}" if more else text


def lock_memory() -> None:
    """Keep this process in memory: its pages may live on the disk whose flushes will wait."""
    ctypes.CDLL(None, use_errno=True).mlockall(_MCL_CURRENT | _MCL_FUTURE)
