# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A kernel in memory for the engine: disks, device-mapper, and crashes at any point.

It exists so that every crash point and every subset of lost writes can be tried in seconds. It is a
model, and only as true as its author's reading of the kernel: tests/vm/test_model.py runs the same
steps here and on a real kernel and compares what both show, other tests there run the engine on
real disks, and where the two differ, this one is wrong.

What is modelled:

- Disks with bad and weak sectors, write errors, and a volatile cache that a flush empties. A power
  cut keeps any subset of the writes since then.
- The targets linear, error and integrity. Integrity keeps its superblock and its tags on the meta
  device, and a block whose tag does not match reads as EILSEQ. It does not clear the tags when it
  formats. Its journal makes a block and its tag change together. What was written back stays in the
  journal on the disk and is replayed at each activation; a suspend empties it only if anything was
  written since the last resume (wrote_to_journal in drivers/md/dm-integrity.c). An error of the
  disk below comes at once, where the kernel's journal may hide it until later.
- The target multipath in bio mode with one path. An error from below that the block layer takes
  for one of the path fails the path; that I/O and all later ones then wait, or fail with EIO
  without queue_if_no_path. The message reinstate_path tries again all that waits. A suspend fails
  what waits, unless it is a noflush suspend: then it waits for the resume.
- The target delay: what waits goes on when the delay is over or the device is suspended; flushes
  do not wait unless they have a delay of their own. A suspend further up waits for the delay.
- The target raid as a raid1 of one device without metadata: its errors are EIO, and those of a
  flush are swallowed.
- Suspend: an application's I/O waits until resume. A swap or suspend that would wait for such
  I/O for ever raises Deadlock. What the engine itself reads or writes there raises Blocked.
- The tracepoint block_rq_error of disks: one line for each read, write or flush that fails, and a
  second, empty one for a durable write whose data could not be written. block_bio_complete of
  mapped devices: a line for each I/O that fails.
- Durable writes (REQ_FUA), which disks carry out as a write and a flush.
- Statistics (@stats_create, _print, _list, _delete) that count completed writes.
- Processes: a killed one can do nothing more, and what it made in the kernel stays.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Union

from dm_remap import kernel_v4
from dm_remap.blockdev import OWN_SIGNATURE, DeviceInfo, Listed, Use
from dm_remap.devmapper import MappedDevice, Segment
from dm_remap.errors import DmRemapError, Refused

SECTOR = 512
DM_MAJOR = 253
SUPERBLOCK_SECTORS = 8
SUPERBLOCK_MAGIC = b"integrt\0"
JOURNAL_ENTRIES = 500
# The errors of which the block layer says that another path would not help (blk_path_error):
# NOTSUPP, NOSPC, TARGET, NEXUS, MEDIUM and PROTECTION.
NOT_OF_THE_PATH = (
    errno.EOPNOTSUPP,
    errno.ENOSPC,
    errno.EREMOTEIO,
    errno.EBADE,
    errno.ENODATA,
    errno.EILSEQ,
)
FILESYSTEM_SECTOR = 2
FILESYSTEM_MAGIC = b"a filesystem"

Written = Union[bytes, int]


class Killed(BaseException):
    """The process is dead; not even its exception handlers can do anything."""


class Blocked(Exception):
    """Input or output that would wait: at a suspended device, for a path, or for a delay.

    Args:
        at: the device at which it waits.
        queue: where its request would have to be put.
        io: what would wait, as that device sees it.
        why: the reason, for messages.
    """

    def __init__(self, at: Mapped, queue: list[Request], io: Io, why: str) -> None:
        super().__init__(f"{io.verb} {io.sector}+{io.count} waits: {at.name} {why}")
        self.at = at
        self.queue = queue
        self.io = io
        self.above: list[tuple[str, int]] = []
        self.error: OSError | None = None


class Deadlock(AssertionError):
    """The kernel would wait for something that only its caller could bring about."""


def fail(code: int, text: str) -> OSError:
    return OSError(code, f"{os.strerror(code)}: {text}")


@dataclass
class Disk:
    """A disk: what its medium holds for good, and what reads return now.

    Args:
        bad: sectors that cannot be read, with the failures that are left, None for ever.
        unwritable: sectors whose writes fail.
        heals: whether a write makes a bad sector good, as a drive that reallocates does.
        dead: all reads and writes fail.
        on_read: called with first sector and count before each read.
    """

    path: str
    devno: str
    sectors: int
    block: int = 1
    serial: str = ""
    bad: dict[int, int | None] = field(default_factory=dict)
    unwritable: set[int] = field(default_factory=set)
    heals: bool = True
    dead: bool = False
    code: int = errno.EIO
    flush_fails: bool | int = False
    mounted: str = ""
    read_only: bool = False
    on_read: Callable[[int, int], None] | None = None
    content: dict[int, bytes] = field(default_factory=dict)
    stable: dict[int, bytes] = field(default_factory=dict)
    stable_bad: dict[int, int | None] = field(default_factory=dict)
    cache: list[tuple[int, Written]] = field(default_factory=list)

    def clone(self) -> Disk:
        other = copy.copy(self)
        other.on_read = None
        for name in ("bad", "unwritable", "content", "stable", "stable_bad", "cache"):
            setattr(other, name, copy.copy(getattr(self, name)))
        return other

    def spoil(self, sectors: Iterable[int], failures: int | None = None) -> None:
        """Make sectors unreadable: for ever, or for so many reads."""
        for sector in sectors:
            self.bad[sector] = self.stable_bad[sector] = failures

    def fill(self, sector: int, data: bytes) -> None:
        """Put data on the medium, as if it had been there always."""
        for offset in range(0, len(data), SECTOR):
            piece = data[offset : offset + SECTOR]
            self.content[sector + offset // SECTOR] = piece
            self.stable[sector + offset // SECTOR] = piece

    def read(self, sector: int, count: int) -> bytes:
        self._check(sector, count)
        if self.on_read:
            self.on_read(sector, count)
        touched = range(sector, sector + count)
        failing = [number for number in touched if self.bad.get(number, 0) != 0]
        for number in failing:
            left = self.bad[number]
            if left is not None:
                self.bad[number] = left - 1
        if failing:
            raise fail(self.code, f"{self.path}: sector {failing[0]}")
        return b"".join(self.content.get(number, bytes(SECTOR)) for number in touched)

    def write(self, sector: int, data: Written) -> None:
        count = data if isinstance(data, int) else len(data) // SECTOR
        self._check(sector, count)
        if self.read_only or self.unwritable.intersection(range(sector, sector + count)):
            raise fail(self.code, f"{self.path}: write to {sector}+{count}")
        self.cache.append((sector, data))
        self._put(sector, data, self.content, self.bad)

    def flush(self) -> None:
        if self.dead or self.flush_fails:
            # True, or how many failures are left.
            if self.flush_fails and self.flush_fails is not True:
                self.flush_fails -= 1
            raise fail(self.code, f"{self.path}: flush")
        for sector, data in self.cache:
            self._put(sector, data, self.stable, self.stable_bad)
        self.cache.clear()

    def lose_power(self, survivors: Iterable[tuple[int, Written]]) -> None:
        """Keep only these of the writes in the cache, in their order."""
        for sector, data in survivors:
            self._put(sector, data, self.stable, self.stable_bad)
        self.cache.clear()
        self.content = dict(self.stable)
        self.bad = dict(self.stable_bad)

    def _check(self, sector: int, count: int) -> None:
        if sector < 0 or sector + count > self.sectors:
            raise fail(errno.ENXIO, f"{self.path}: {sector}+{count} is past the end")
        if self.dead:
            raise fail(self.code, f"{self.path} is dead")

    def _put(
        self, sector: int, data: Written, where: dict[int, bytes], bad: dict[int, int | None]
    ) -> None:
        count = data if isinstance(data, int) else len(data) // SECTOR
        if self.heals and bad:
            for number in range(sector, sector + count):
                bad.pop(number, None)
        if isinstance(data, int):
            for number in range(sector, sector + count):
                where.pop(number, None)
        else:
            for index in range(count):
                where[sector + index] = data[index * SECTOR : (index + 1) * SECTOR]


@dataclass
class Integrity:
    """An integrity target in journal mode: blocks with tags on the meta device.

    ``journal`` holds what was written since the last flush, a block and its tag as one, ``place``
    is where the meta device is, and ``wrote`` whether anything was written since the last resume.
    """

    data: str
    meta: str
    block: int
    tags: int
    place: str
    wrote: bool = False
    journal: list[tuple[int, bytes]] = field(default_factory=list)


@dataclass
class Multipath:
    """A multipath target with one path.

    ``queueing`` is queue_if_no_path, ``saved`` what it was before a suspend, ``unused`` whether
    there was no I/O yet, ``current`` whether the last I/O found a path, and ``queued`` what waits
    for one.
    """

    devno: str
    queueing: bool
    saved: bool = False
    active: bool = True
    failures: int = 0
    unused: bool = True
    current: bool = False
    queued: list[Request] = field(default_factory=list)

    @staticmethod
    def open(params: str) -> Multipath:
        """What the constructor does."""
        words = params.split()
        features, rest = words[1 : 1 + int(words[0])], words[1 + int(words[0]) :]
        assert features[-2:] == ["queue_mode", "bio"], "only bio mode is modelled"
        assert set(features[:-2]) <= {"queue_if_no_path", "retain_attached_hw_handler"}
        assert rest[:-2] == "0 1 1 round-robin 0 1 1".split(), "only one path is modelled"
        return Multipath(rest[-2], "queue_if_no_path" in features)

    def fail_path(self) -> None:
        if self.active:
            self.active = False
            self.failures += 1

    def table(self) -> str:
        """The shown form of the constructor's arguments; the kernel adds one of its own."""
        features = "4 queue_if_no_path" if self.queueing else "3"
        features += " retain_attached_hw_handler queue_mode bio"
        return f"{features} 0 1 1 round-robin 0 1 1 {self.devno} 1 "

    def status(self) -> str:
        group, state = "A" if self.current else "E", "A" if self.active else "F"
        return f"2 {int(self.unused)} 0 0 1 1 {group} 0 1 0 {self.devno} {state} {self.failures} "


@dataclass
class Region:
    """Statistics of a range, counted for each area of ``step`` sectors."""

    start: int
    length: int
    step: int
    program: str
    writes: dict[int, int] = field(default_factory=dict)


@dataclass
class Table:
    """The segments of a table, and the state of its targets.

    ``delayed`` is what waits in its delay targets.
    """

    segments: list[Segment]
    integrity: Integrity | None = None
    multipath: Multipath | None = None
    delayed: list[Request] = field(default_factory=list)

    def segment_at(self, sector: int) -> Segment:
        return next(s for s in self.segments if s.start <= sector < s.start + s.length)


@dataclass
class Mapped:
    """A mapped device."""

    name: str
    uuid: str
    minor: int
    live: Table | None = None
    inactive: Table | None = None
    suspended: bool = False
    loaded: bool = False
    handles: int = 0
    regions: dict[int, Region] = field(default_factory=dict)
    waiting: list[Request] = field(default_factory=list)

    @property
    def devno(self) -> str:
        return f"{DM_MAJOR}:{self.minor}"

    @property
    def sectors(self) -> int:
        return sum(segment.length for segment in self.live.segments) if self.live else 0


@dataclass(frozen=True)
class Io:
    """A read, a write or a flush; sectors as the device sees them that it is sent to.

    A ``durable`` write is on the medium when it ends.
    """

    verb: str
    sector: int = 0
    count: int = 0
    data: bytes = b""
    durable: bool = False


@dataclass(frozen=True)
class Request:
    """An application's I/O that waits somewhere in a stack of devices.

    ``above`` are the devices that it came through, the nearest first, with its sector there.
    ``error`` is what another part of it failed with.
    """

    number: int
    io: Io
    above: tuple[tuple[str, int], ...]
    error: OSError | None = None


@dataclass(frozen=True)
class Volatile:
    """A write that a power cut may undo: on a disk, or a block of an integrity device."""

    where: str
    sector: int
    data: Written


def destination(segment: Segment, verb: str = "read") -> tuple[str, int, int]:
    """Where I/O to a segment goes: device, offset, and delay in milliseconds."""
    words = segment.params.split()
    if segment.target == "linear":
        return words[0], int(words[1]), 0
    if segment.target == "raid":
        assert (segment.start, words[:-1]) == (0, "raid1 1 0 1 -".split()), segment
        return words[-1], 0, 0
    assert (segment.target, len(words)) == ("delay", 9), segment
    first = 3 * ("read", "write", "flush").index(verb)
    return words[first], int(words[first + 1]), int(words[first + 2])


class Kernel:
    """All devices of a host."""

    def __init__(self) -> None:
        self.disks: dict[str, Disk] = {}
        self.mapped: dict[str, Mapped] = {}
        self.completed: set[int] = set()
        self.failed: set[int] = set()
        self.answers: dict[int, bytes] = {}
        self.errors: dict[int, int] = {}
        # What the tracepoints printed that nobody has read yet.
        self.trace: list[str] = []
        # The devices for whose delay a suspend had to wait.
        self.waited_for: list[str] = []
        # What the journals on the disks hold, by the place of the meta device.
        self.journals: dict[str, tuple[tuple[int, bytes], ...]] = {}
        self._minors = 0
        self._requests = 0

    def clone(self) -> Kernel:
        """The same host a moment later, with all of its processes gone."""
        other = copy.copy(self)
        other.disks = {path: disk.clone() for path, disk in self.disks.items()}
        other.mapped = {}
        for name, device in self.mapped.items():
            twin = copy.deepcopy(device)
            twin.handles = 0
            other.mapped[name] = twin
        for name in ("completed", "failed", "answers", "errors", "trace", "waited_for", "journals"):
            setattr(other, name, copy.copy(getattr(self, name)))
        return other

    def add_disk(self, name: str, sectors: int, block: int = 1) -> Disk:
        path, devno = f"/dev/{name}", f"8:{16 * len(self.disks)}"
        disk = Disk(path, devno, sectors, block, serial=f"serial-{name}")
        self.disks[path] = disk
        return disk

    # Crashes

    def volatile(self) -> list[Volatile]:
        """The writes that a power cut may undo."""
        found = [
            Volatile(path, sector, data)
            for path, disk in self.disks.items()
            for sector, data in disk.cache
        ]
        for name, device in self.mapped.items():
            if device.live and device.live.integrity:
                found += [Volatile(name, *entry) for entry in device.live.integrity.journal]
        return found

    def cut_power(self, survivors: Sequence[Volatile]) -> None:
        """Lose all mapped devices, and all volatile writes but the survivors."""
        for path, disk in self.disks.items():
            disk.lose_power((item.sector, item.data) for item in survivors if item.where == path)
        for item in survivors:
            device = self.mapped.get(item.where)
            if device and device.live and device.live.integrity:
                assert isinstance(item.data, bytes)
                # What the journal holds is replayed when the device is next activated.
                self._store(device.live.integrity, item.sector, item.data)
                self._note(device.live.integrity, [(item.sector, item.data)])
        for disk in self.disks.values():
            disk.lose_power(disk.cache)
        self.mapped.clear()

    # Input and output

    def find(self, devno: str) -> Disk | Mapped:
        for device in (*self.disks.values(), *self.mapped.values()):
            if device.devno == devno:
                return device
        raise fail(errno.ENXIO, f"no device {devno}")

    def read(self, devno: str, sector: int, count: int) -> bytes:
        return self.perform(devno, Io("read", sector, count))

    def write(self, devno: str, sector: int, data: bytes) -> None:
        self.perform(devno, Io("write", sector, len(data) // SECTOR, data))

    def flush(self, devno: str) -> None:
        self.perform(devno, Io("flush"))

    def perform(self, devno: str, io: Io) -> bytes:
        """Do ``io`` on a device, and return what a read gave.

        Raises:
            OSError: it failed.
            Blocked: it would wait, or a part of it would.
        """
        device = self.find(devno)
        if isinstance(device, Disk):
            return self._perform_on_disk(device, io)
        try:
            if device.suspended:
                raise Blocked(device, device.waiting, io, "is suspended")
            if device.live is None or io.sector < 0 or io.sector + io.count > device.sectors:
                raise fail(errno.EIO, f"{device.name}: {io.sector}+{io.count} is past the end")
            if device.live.multipath:
                answer = self._take_path(device, device.live.multipath, io)
            elif io.verb == "flush":
                answer = self._flush_segments(device, device.live)
            else:
                answer = self._use_segments(device, device.live, io)
        except Blocked as blocked:
            if blocked.at is not device:
                blocked.above.append((device.name, io.sector))
            raise
        except OSError as error:
            self._account(device, io)
            self._print("block_bio_complete", device.devno, io, io.count, error)
            raise
        self._account(device, io)
        return answer

    def _perform_on_disk(self, disk: Disk, io: Io) -> bytes:
        try:
            answer = self._try_on_disk(disk, io)
        except OSError as error:
            self._print("block_rq_error", disk.devno, io, io.count, error)
            if io.durable:
                self._print("block_rq_error", disk.devno, io, 0, error)
            raise
        if io.durable:
            try:
                disk.flush()
            except OSError as error:
                self._print("block_rq_error", disk.devno, io, 0, error)
                raise
        return answer

    def _try_on_disk(self, disk: Disk, io: Io) -> bytes:
        if io.verb == "read":
            return disk.read(io.sector, io.count)
        if io.verb == "write":
            disk.write(io.sector, io.data)
        else:
            disk.flush()
        return b""

    def _print(self, event: str, devno: str, io: Io, count: int, error: OSError) -> None:
        """Print what a tracepoint does."""
        kind = {"read": "R", "write": "WS", "flush": "WS"}[io.verb]
        command = " ()" if event == "block_rq_error" else ""
        where = f"{devno.replace(':', ',')} {kind}{command} {io.sector} + {count}"
        self.trace.append(f" app-1 [0] .. 1.0: {event}: {where} [-{error.errno}]")

    def _take_path(self, device: Mapped, path: Multipath, io: Io) -> bytes:
        path.unused, path.current = False, path.active
        if path.active:
            try:
                return self.perform(path.devno, io)
            except OSError as error:
                if error.errno in NOT_OF_THE_PATH:
                    raise
                path.fail_path()
        if path.queueing:
            path.current = False
            raise Blocked(device, path.queued, io, "has no path")
        raise fail(errno.EIO, f"{device.name}: no path")

    def _use_segments(self, device: Mapped, table: Table, io: Io) -> bytes:
        parts = []
        for segment in table.segments:
            start = max(io.sector, segment.start)
            end = min(io.sector + io.count, segment.start + segment.length)
            if start < end:
                offset = (start - io.sector) * SECTOR
                data = io.data[offset : offset + (end - start) * SECTOR]
                piece = replace(io, sector=start, count=end - start, data=data)
                parts.append(self._use_segment(device, table, segment, piece))
        return b"".join(parts)

    def _use_segment(self, device: Mapped, table: Table, segment: Segment, io: Io) -> bytes:
        if segment.target == "error":
            raise fail(errno.EIO, f"{device.name}: error target")
        if segment.target == "integrity":
            try:
                if io.verb == "read":
                    return self._read_integrity(device, io.sector, io.count)
                self._write_integrity(device, io.sector, io.data)
                if io.durable:
                    self._flush_segments(device, table)
                return b""
            except Blocked as blocked:
                raise AssertionError("I/O below an integrity device waits") from blocked
        below, offset, delay = destination(segment, io.verb)
        if delay:
            raise Blocked(device, table.delayed, io, "has a delay")
        try:
            return self.perform(below, replace(io, sector=offset + io.sector - segment.start))
        except OSError as error:
            if segment.target == "raid":
                raise fail(errno.EIO, f"{device.name}: {error}") from error
            raise

    def _flush_segments(self, device: Mapped, table: Table) -> bytes:
        """Flush what is below all segments, at the same time."""
        if table.integrity:
            self._write_back(table.integrity)
            return b""
        blocks: list[Blocked] = []
        errors: list[OSError] = []
        parts = {destination(s, "flush")[0]: s for s in table.segments if s.target != "error"}
        for below, segment in parts.items():
            try:
                self.flush(below)
            except Blocked as blocked:
                blocks.append(blocked)
            except OSError as error:
                if segment.target != "raid":
                    errors.append(error)
        if blocks:
            assert len(blocks) == 1, "a flush waits at two devices"
            blocks[0].error = blocks[0].error or next(iter(errors), None)
            raise blocks[0]
        if errors:
            raise errors[0]
        return b""

    def submit(self, name: str, sector: int, data: bytes, durable: bool = False) -> int:
        """An application's write; whether it is done is in ``completed`` or ``failed``."""
        return self._submit(name, Io("write", sector, len(data) // SECTOR, data, durable))

    def submit_read(self, name: str, sector: int, count: int) -> int:
        """An application's read: ``completed`` with its data in ``answers``, or ``failed``."""
        return self._submit(name, Io("read", sector, count))

    def submit_flush(self, name: str) -> int:
        """An application's flush; whether it is done is in ``completed`` or ``failed``."""
        return self._submit(name, Io("flush"))

    def _submit(self, name: str, io: Io) -> int:
        self._requests += 1
        number = self._requests
        self._serve(Request(number, io, ()), self.mapped[name].devno)
        return number

    def _serve(self, request: Request, devno: str) -> None:
        try:
            answer = self.perform(devno, request.io)
        except Blocked as blocked:
            if (blocked.io.count, blocked.io.data) != (request.io.count, request.io.data):
                raise AssertionError("an application's I/O spans segments") from blocked
            above = (*blocked.above, *request.above)
            error = request.error or blocked.error
            blocked.queue.append(Request(request.number, blocked.io, above, error))
        except OSError as error:
            self._finish(request, b"", error)
        else:
            self._finish(request, answer, request.error)

    def _finish(self, request: Request, answer: bytes, error: OSError | None) -> None:
        """Complete a request, device by device upwards; a multipath device may queue it again."""
        for index, (name, sector) in enumerate(request.above):
            device = self.mapped[name]
            assert device.live is not None
            path = device.live.multipath
            io = replace(request.io, sector=sector)
            if error and path and error.errno not in NOT_OF_THE_PATH:
                path.fail_path()
                if path.queueing:
                    path.current = False
                    above = request.above[index + 1 :]
                    path.queued.append(Request(request.number, io, above))
                    return
                error = fail(errno.EIO, f"{name}: no path")
            self._account(device, io)
        if error:
            self.failed.add(request.number)
            assert error.errno is not None
            self.errors[request.number] = error.errno
        else:
            self.completed.add(request.number)
            if request.io.verb == "read":
                self.answers[request.number] = answer

    def expire(self, name: str) -> None:
        """Let the delay be over of all that waits in the delay targets of a device."""
        table = self.mapped[name].live
        assert table is not None
        delayed, table.delayed[:] = list(table.delayed), []
        for request in delayed:
            segment = table.segment_at(request.io.sector)
            below, offset, _delay = destination(segment, request.io.verb)
            io = replace(request.io, sector=offset + request.io.sector - segment.start)
            above = ((name, request.io.sector), *request.above)
            self._serve(replace(request, io=io, above=above), below)

    def waiting(self) -> list[tuple[str, Request]]:
        """The applications' I/O that waits, and the device at which it does."""
        found = []
        for name, device in self.mapped.items():
            queues = [device.waiting]
            if device.live:
                queues.append(device.live.delayed)
                if device.live.multipath:
                    queues.append(device.live.multipath.queued)
            found += [(name, request) for queue in queues for request in queue]
        return found

    def _account(self, device: Mapped, io: Io) -> None:
        for region in device.regions.values() if io.verb == "write" else ():
            low = max(io.sector, region.start)
            high = min(io.sector + io.count, region.start + region.length)
            if low < high:
                first = (low - region.start) // region.step
                for area in range(first, (high - 1 - region.start) // region.step + 1):
                    region.writes[area] = region.writes.get(area, 0) + 1

    # Integrity

    def _tag_place(self, target: Integrity, block: int) -> tuple[int, int]:
        sector, offset = divmod(block * 4, SECTOR)
        return target.tags + sector, offset

    def _tag(self, block: int, data: bytes) -> bytes:
        return zlib.crc32(block.to_bytes(8, "little") + data).to_bytes(4, "little")

    def _read_integrity(self, device: Mapped, sector: int, count: int) -> bytes:
        assert device.live is not None
        target = device.live.integrity
        assert target is not None
        parts = []
        latest = dict(target.journal)
        for block in self._blocks(target, sector, count):
            start = block * target.block
            data = latest.get(start)
            if data is None:
                data = self.read(target.data, start, target.block)
                place, offset = self._tag_place(target, block)
                if self.read(target.meta, place, 1)[offset : offset + 4] != self._tag(block, data):
                    raise fail(errno.EILSEQ, f"{device.name}: block {block}")
            parts.append(data)
        return b"".join(parts)

    def _write_integrity(self, device: Mapped, sector: int, data: bytes) -> None:
        assert device.live is not None
        target = device.live.integrity
        assert target is not None
        size = target.block * SECTOR
        for index, block in enumerate(self._blocks(target, sector, len(data) // SECTOR)):
            start = block * target.block
            self._probe_write(target.data, start, target.block)
            target.journal.append((start, data[index * size : (index + 1) * size]))

    def _probe_write(self, devno: str, sector: int, count: int) -> None:
        device = self.find(devno)
        while isinstance(device, Mapped):
            assert device.live is not None
            below, offset, _delay = destination(device.live.segments[0])
            sector += offset
            device = self.find(below)
        if device.dead or device.unwritable.intersection(range(sector, sector + count)):
            raise fail(device.code, f"{device.path}: write to {sector}")

    def _blocks(self, target: Integrity, sector: int, count: int) -> range:
        assert sector % target.block == 0 == count % target.block
        return range(sector // target.block, (sector + count) // target.block)

    def _store(self, target: Integrity, sector: int, data: bytes) -> None:
        block = sector // target.block
        place, offset = self._tag_place(target, block)
        tags = bytearray(self.read(target.meta, place, 1))
        tags[offset : offset + 4] = self._tag(block, data)
        self.write(target.data, sector, data)
        self.write(target.meta, place, bytes(tags))

    def _note(self, target: Integrity, entries: Iterable[tuple[int, bytes]]) -> None:
        """Put entries into the journal on the disk, where the oldest make room."""
        kept = (*self.journals.get(target.place, ()), *entries)
        self.journals[target.place] = kept[-JOURNAL_ENTRIES:]

    def _write_back(self, target: Integrity) -> None:
        for sector, data in target.journal:
            self._store(target, sector, data)
        self.flush(target.data)
        self.flush(target.meta)
        self._note(target, target.journal)
        target.wrote = target.wrote or bool(target.journal)
        target.journal.clear()

    def _empty(self, target: Integrity) -> None:
        """What a suspend does."""
        self._write_back(target)
        if target.wrote:
            self.journals[target.place] = ()
        target.wrote = False

    def open_integrity(self, segment: Segment) -> Integrity:
        """What the constructor does: read the superblock, or make one where there are zeros."""
        data, begin, tag_size, mode, _count, *options = segment.params.split()
        assert (begin, tag_size, mode) == ("0", "-", "J")
        chosen = dict(option.split(":", 1) for option in options)
        assert chosen.pop("internal_hash") == "crc32c"
        meta, block = chosen.pop("meta_device"), int(chosen.pop("block_size")) // SECTOR
        journal = int(chosen.pop("journal_sectors"))
        assert not chosen, f"unknown options {chosen}"
        tag_sectors = -(-segment.length // block * 4 // SECTOR)
        if SUPERBLOCK_SECTORS + journal + tag_sectors > self.size(meta):
            raise fail(errno.EINVAL, "the meta device is too small")
        if segment.length > self.size(data):
            raise fail(errno.EINVAL, "the data device is too small")
        wanted = SUPERBLOCK_MAGIC + b"%d %d %d" % (segment.length, block, journal)
        found = self.read(meta, 0, 1)
        target = Integrity(data, meta, block, SUPERBLOCK_SECTORS + journal, self._place(meta))
        if found == bytes(SECTOR):
            self.write(meta, 0, wanted.ljust(SECTOR, b"\0"))
            self.flush(meta)
            self.journals[target.place] = ()
        elif found.rstrip(b"\0") != wanted:
            raise fail(errno.EINVAL, "the superblock does not fit")
        for entry in self.journals.get(target.place, ()):
            self._store(target, *entry)
        return target

    def _place(self, devno: str) -> str:
        """The disk and the sector at which a linear device begins."""
        device, sector = self.find(devno), 0
        while isinstance(device, Mapped):
            assert device.live is not None
            below, offset, _delay = destination(device.live.segments[0])
            device, sector = self.find(below), sector + offset
        return f"{device.path} {sector}"

    # Device-mapper

    def size(self, devno: str) -> int:
        return self.find(devno).sectors

    def users(self, devno: str) -> list[str]:
        """Names of the mapped devices whose tables use a device, one for each table."""
        found = []
        for name, device in self.mapped.items():
            for table in (device.live, device.inactive):
                if table and devno in below(table.segments):
                    found.append(name)
        return found

    def opened(self, device: Mapped) -> int:
        return device.handles + len(self.users(device.devno))

    def insert(self, name: str, uuid: str) -> Mapped:
        if name in self.mapped or any(device.uuid == uuid for device in self.mapped.values()):
            raise fail(errno.EBUSY, f"{name} or its uuid exists")
        self._minors += 1
        self.mapped[name] = Mapped(name, uuid, self._minors)
        return self.mapped[name]

    def load(self, name: str, segments: Sequence[Segment]) -> None:
        device = self.mapped[name]
        table = Table(list(segments))
        end = 0
        for segment in segments:
            if segment.start != end or segment.length < 1:
                raise fail(errno.EINVAL, f"{name}: gap or overlap at {end}")
            end += segment.length
            if segment.target == "integrity":
                table.integrity = self.open_integrity(segment)
            elif segment.target == "multipath":
                table.multipath = Multipath.open(segment.params)
                if len(segments) > 1:
                    raise fail(errno.EINVAL, f"{name}: multipath stands alone in a table")
            for devno, _end in extents_below(segment):
                below = self.find(devno)
                if isinstance(below, Disk) and below.mounted:
                    raise fail(errno.EBUSY, f"{below.path} is mounted")
        if not segments:
            raise fail(errno.EINVAL, f"{name}: no segments")
        wildcard = [segment.target for segment in segments] == ["error"]
        if device.live and device.live.multipath and not table.multipath and not wildcard:
            raise fail(errno.EINVAL, f"{name}: only multipath can follow multipath")
        if not device.loaded:
            self._check_ends(table)
        device.loaded, device.inactive = True, table

    def _check_ends(self, table: Table) -> None:
        """What the kernel does at a device's first load, and later only at the swap."""
        for segment in table.segments:
            for devno, end in extents_below(segment):
                if end > self.size(devno):
                    raise fail(errno.EINVAL, f"{segment} is past the end of {devno}")

    def suspend(self, name: str, noflush: bool = False) -> None:
        device = self.mapped[name]
        if device.suspended:
            return
        if device.live and device.live.multipath:
            self._suspend_path(device, device.live.multipath, noflush)
        if device.live:
            self.expire(name)
        for other, _request in self._below(name):
            if self.mapped[other].live.delayed:
                self.waited_for.append(other)
                self.expire(other)
        for other, _request in self._below(name):
            raise Deadlock(f"{name} has I/O in flight that waits at {other}")
        if device.live and device.live.integrity:
            self._empty(device.live.integrity)
        device.suspended = True

    def _below(self, name: str) -> list[tuple[str, Request]]:
        """What waits further down that came through a device."""
        return [
            (other, request)
            for other, request in self.waiting()
            if any(name == above for above, _sector in request.above)
        ]

    def _suspend_path(self, device: Mapped, path: Multipath, noflush: bool) -> None:
        path.saved, path.queueing = path.queueing, False
        queued, path.queued[:] = list(path.queued), []
        if noflush:
            # Pushed back one by one to the head of what the device has deferred.
            device.waiting[:0] = reversed(queued)
            return
        for request in queued:
            self._account(device, request.io)
            self._finish(request, b"", fail(errno.EIO, f"{device.name}: no path"))

    def resume(self, name: str, noflush: bool = False) -> None:
        device = self.mapped[name]
        if device.inactive:
            self.suspend(name, noflush)
            table, device.inactive = device.inactive, None
            # A swap that fails here leaves the device suspended, with its old table.
            self._check_ends(table)
            device.live = table
        device.suspended = False
        path = device.live.multipath if device.live else None
        if path and path.saved:
            path.queueing, path.saved = True, False
        waiting, device.waiting[:] = list(device.waiting), []
        for request in waiting:
            self._serve(request, device.devno)

    def in_flight(self, name: str) -> bool:
        """Whether I/O that came through a device waits further down."""
        return bool(self._below(name))

    @contextlib.contextmanager
    def swap_begun(self, name: str) -> Iterator[None]:
        """New I/O waits, as in a swap that itself waits for what is in flight, if anything is.

        Whoever began it may be killed, or give it up by an error: then nothing was swapped.
        """
        device = self.mapped[name]
        device.suspended = self.in_flight(name)
        try:
            yield
        except BaseException:
            device.suspended = False
            waiting, device.waiting[:] = list(device.waiting), []
            for request in waiting:
                self._serve(request, device.devno)
            raise
        device.suspended = False

    def message(self, name: str, text: str) -> None:
        """A message to a multipath target."""
        device = self.mapped[name]
        path = device.live.multipath if device.live else None
        if device.suspended:
            raise fail(errno.EBUSY, f"{name} is suspended")
        command, *words = text.split()
        if not path or words not in ([], [path.devno]):
            raise fail(errno.EINVAL, f"{name}: {text}")
        if (command, len(words)) == ("fail_path", 1):
            path.fail_path()
        elif (command, len(words)) == ("reinstate_path", 1):
            if not path.active:
                path.active = True
                self._try_again(device, path)
        elif text == "queue_if_no_path":
            path.queueing = True
        elif text == "fail_if_no_path":
            path.queueing = False
            self._try_again(device, path)
        else:
            raise fail(errno.EINVAL, f"{name}: {text}")

    def _try_again(self, device: Mapped, path: Multipath) -> None:
        queued, path.queued[:] = list(path.queued), []
        # What a disk does to a flush is known when all others are on their way.
        for request in sorted(queued, key=lambda request: request.io.verb == "flush"):
            self._serve(request, device.devno)

    def shown(self, name: str) -> list[Segment]:
        """The live table as the kernel shows it."""
        live = self.mapped[name].live
        if live and live.multipath:
            return [replace(segment, params=live.multipath.table()) for segment in live.segments]
        return list(live.segments) if live else []

    def status(self, name: str) -> list[Segment]:
        """The live status: a path's state, how much I/O has a delay, else nothing."""
        live = self.mapped[name].live
        assert live is not None
        found = []
        for segment in live.segments:
            params = ""
            if live.multipath:
                params = live.multipath.status()
            elif segment.target == "delay":
                verbs = [r.io.verb for r in live.delayed if live.segment_at(r.io.sector) is segment]
                params = " ".join(str(verbs.count(verb)) for verb in ("read", "write", "flush"))
            assert segment.target != "integrity", f"the status of {name} is not modelled"
            found.append(replace(segment, params=params))
        return found

    def remove(self, name: str) -> None:
        device = self.mapped[name]
        if self.opened(device):
            raise fail(errno.EBUSY, f"{name} is open")
        assert name not in dict(self.waiting()), f"{name} is removed with I/O waiting"
        if device.live and device.live.integrity:
            # dm-integrity's destructor has nobody to tell of an error (dm_integrity_dtr).
            with contextlib.suppress(OSError):
                self._empty(device.live.integrity)
        del self.mapped[name]


def extents_below(segment: Segment) -> list[tuple[str, int]]:
    """The devices that a segment uses, but not those of integrity, and up to which sector."""
    if segment.target == "multipath":
        return [(Multipath.open(segment.params).devno, segment.length)]
    if segment.target in ("error", "integrity"):
        return []
    places = [destination(segment, verb) for verb in ("read", "write", "flush")]
    return [(devno, offset + segment.length) for devno, offset, _delay in places]


def below(segments: Iterable[Segment]) -> list[str]:
    """Device numbers that a table uses, each once."""
    found = []
    for segment in segments:
        if segment.target in ("linear", "delay", "raid"):
            found += [destination(segment, verb)[0] for verb in ("read", "write", "flush")]
        elif segment.target == "multipath":
            found.append(Multipath.open(segment.params).devno)
        elif segment.target == "integrity":
            words = segment.params.split()
            found.append(words[0])
            found += [w.partition(":")[2] for w in words if w.startswith("meta_device:")]
    return list(dict.fromkeys(found))


class Process:
    """A process that uses the kernel: `mapper` and `blocks` are what an Engine takes.

    Args:
        kernel: the kernel.
        on_call: called before each call that changes something, with its name; what it raises
            comes out of the call, which then does nothing.
    """

    def __init__(self, kernel: Kernel, on_call: Callable[[str], None] | None = None) -> None:
        self.kernel = kernel
        self.on_call = on_call
        self.alive = True
        self.mapper = Mapper(self)
        self.blocks = Blocks(self)

    def kill(self) -> None:
        """End the process: it holds nothing open and can do nothing any more."""
        self.alive = False
        for device in self.kernel.mapped.values():
            device.handles = 0

    def look(self) -> Kernel:
        if not self.alive:
            raise Killed
        return self.kernel

    def change(self, name: str) -> Kernel:
        kernel = self.look()
        if self.on_call:
            self.on_call(name)
            self.look()
        return kernel


class Mapper:
    """Stands in for devmapper.DeviceMapper."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def check_available(self, targets: Iterable[str] = ()) -> None:
        assert set(targets) <= set(self.kernel_targets())

    def kernel_targets(self) -> dict[str, tuple[int, int, int]]:
        return {
            "linear": (1, 4, 0),
            "error": (1, 5, 0),
            "integrity": (1, 10, 0),
            "multipath": (1, 14, 0),
            "delay": (1, 3, 0),
            "raid": (1, 15, 1),
        }

    def names(self) -> list[str]:
        return list(self._process.look().mapped)

    def arm_queue_timeout(self, seconds: int) -> int:
        self._process.look()
        return seconds

    def info(self, name: str) -> MappedDevice | None:
        kernel = self._process.look()
        device = kernel.mapped.get(name)
        if device is None:
            return None
        return MappedDevice(
            name=name,
            uuid=device.uuid,
            major=DM_MAJOR,
            minor=device.minor,
            suspended=device.suspended,
            open_count=kernel.opened(device),
            live_table=device.live is not None,
            inactive_table=device.inactive is not None,
        )

    def table(self, name: str) -> list[Segment]:
        self._device(name)
        return self._process.kernel.shown(name)

    def status(self, name: str) -> list[Segment]:
        self._device(name)
        return self._process.kernel.status(name)

    def create(self, name: str, uuid: str, segments: Iterable[Segment], private: bool) -> None:
        def insert() -> None:
            self._process.kernel.insert(name, uuid)

        self._run("create", name, insert)
        try:
            self.load(name, segments)
            self.swap(name)
        except BaseException:
            self.remove(name)
            raise

    def create_unannounced(self, name: str, uuid: str, segments: Iterable[Segment]) -> None:
        self.create(name, uuid, segments, private=True)

    def load(self, name: str, segments: Iterable[Segment]) -> None:
        self._device(name)
        self._run("load", name, lambda: self._process.kernel.load(name, list(segments)))

    @contextlib.contextmanager
    def events(self) -> Iterator[None]:
        yield None

    def swap(self, name: str, events: None = None) -> None:
        self._device(name)
        self._run("swap", name, lambda: self._process.kernel.resume(name))

    def swap_while(self, name: str, meanwhile: Callable[[], None], events: None = None) -> None:
        def swap() -> None:
            kernel = self._process.kernel
            with kernel.swap_begun(name):
                for _turn in range(10):
                    if kernel.in_flight(name):
                        meanwhile()
            kernel.resume(name)

        self._device(name)
        self._run("swap", name, swap)

    def wait_idle(self, name: str, seconds: float) -> bool:
        kernel = self._process.look()
        return not kernel.in_flight(name) and name not in dict(kernel.waiting())

    def clear(self, name: str) -> None:
        def drop() -> None:
            self._process.kernel.mapped[name].inactive = None

        self._device(name)
        self._run("clear", name, drop)

    def suspend(self, name: str) -> None:
        self._device(name)
        self._run("suspend", name, lambda: self._process.kernel.suspend(name))

    def remove(self, name: str) -> None:
        self._device(name)
        self._run("remove", name, lambda: self._process.kernel.remove(name))

    def remove_unannounced(self, name: str) -> None:
        self.remove(name)

    def dependencies(self, name: str) -> list[str]:
        return below(self.table(name))

    def message(self, name: str, text: str, sector: int = 0) -> str:
        device = self._device(name)
        command, *words = text.split()
        if not command.startswith("@"):
            self._run("message", name, lambda: self._process.kernel.message(name, text))
            return ""
        if command == "@stats_create":
            start, length = map(int, words[0].split("+"))
            self._process.change("stats_create")
            number = max(device.regions, default=-1) + 1
            device.regions[number] = Region(start, length, int(words[1]), words[2])
            return f"{number}\n"
        if command == "@stats_list":
            return "".join(
                f"{number}: {region.start}+{region.length} {region.step} {region.program} -\n"
                for number, region in device.regions.items()
                if region.program == words[0]
            )
        region = device.regions[int(words[0])]
        if command == "@stats_delete":
            self._process.change("stats_delete")
            del device.regions[int(words[0])]
            return ""
        assert command == "@stats_print"
        lines = []
        for area in range(-(-region.length // region.step)):
            start = region.start + area * region.step
            length = min(region.step, region.start + region.length - start)
            counters = [0, 0, 0, 0, region.writes.get(area, 0), 0, 0, 0, 0, 0, 0, 0, 0]
            lines.append(f"{start}+{length} {' '.join(map(str, counters))}\n")
        return "".join(lines)

    def _device(self, name: str) -> Mapped:
        kernel = self._process.look()
        if name not in kernel.mapped:
            raise DmRemapError("no such mapped device", device=name)
        return kernel.mapped[name]

    def _run(self, verb: str, name: str, command: Callable[[], None]) -> None:
        self._process.change(f"{verb} {name}")
        try:
            command()
        except OSError as error:
            raise DmRemapError(f"device-mapper could not {verb}: {error}", device=name) from error


class OpenDevice:
    """Stands in for blockdev.BlockDevice."""

    def __init__(self, process: Process, path: str, writable: bool) -> None:
        kernel = process.look()
        self.name = path
        self._process = process
        self._writable = writable
        self._devno = devno_of(kernel, path)
        device = kernel.find(self._devno)
        self.sectors = device.sectors
        self.block = block_of(kernel, self._devno)
        self.logical_block = self.block * SECTOR
        self._closed = False
        self._held = device if isinstance(device, Mapped) else None
        if self._held:
            self._held.handles += 1

    def read(self, sector: int, count: int) -> bytes:
        self._check(sector, count)
        return self._process.look().read(self._devno, sector, count)

    def write(self, sector: int, data: bytes) -> None:
        self._check(sector, len(data) // SECTOR)
        assert len(data) % SECTOR == 0
        assert self._writable, f"{self.name} was opened for reading only"
        self._process.change(f"write {self.name}").write(self._devno, sector, data)

    def zero(self, sector: int, count: int) -> None:
        self._check(sector, count)
        assert self._writable, f"{self.name} was opened for reading only"
        disk = self._process.change(f"zero {self.name}").find(self._devno)
        assert isinstance(disk, Disk)
        disk.write(sector, count)

    def flush(self) -> None:
        self._process.change(f"flush {self.name}").flush(self._devno)

    def close(self) -> None:
        if self._held and self._process.alive:
            self._held.handles -= 1
        self._held = None
        self._closed = True

    def __enter__(self) -> OpenDevice:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _check(self, sector: int, count: int) -> None:
        assert not self._closed, f"{self.name} was closed"
        if sector % self.block or count % self.block:
            raise ValueError(f"{self.name}: {sector}+{count} are not whole blocks")


class Blocks:
    """Stands in for the module blockdev."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def BlockDevice(self, path: str, writable: bool = False) -> OpenDevice:  # noqa: N802
        return OpenDevice(self._process, path, writable)

    def describe(self, path: str) -> DeviceInfo:
        kernel = self._process.look()
        devno = devno_of(kernel, path)
        disk = kernel.find(devno)
        assert isinstance(disk, Disk)
        name = path.rpartition("/")[2]
        uses = [Use(name, "held by", user) for user in dict.fromkeys(kernel.users(devno))]
        if disk.mounted:
            uses.append(Use(name, "mounted on", disk.mounted))
        return DeviceInfo(
            path=path,
            devno=devno,
            sectors=disk.sectors,
            logical_block=disk.block * SECTOR,
            physical_block=disk.block * SECTOR,
            disk=devno,
            start=0,
            serial=disk.serial,
            wwn="",
            model="Fake",
            read_only=disk.read_only,
            used_by=tuple(uses),
        )

    def list_devices(self, without: str) -> Iterator[Listed]:
        kernel = self._process.look()
        for disk in kernel.disks.values():
            users = dict.fromkeys(kernel.users(disk.devno))
            holders = tuple(kernel.mapped[name].devno for name in users)
            yield Listed(replace(self.describe(disk.path), partition=0), holders)

    def node_of(self, devno: str) -> str:
        device = self._process.look().find(devno)
        return device.path if isinstance(device, Disk) else f"/dev/dm-{device.minor}"

    def links_to(self, devno: str) -> list[str]:
        self._process.look()
        return []

    def nodes_of_size(self, sizes: Collection[int]) -> list[str]:
        disks = self._process.look().disks.values()
        return [disk.path for disk in disks if disk.sectors in sizes]

    def signatures(self, path: str) -> list[str]:
        kernel = self._process.look()
        start = kernel.read(devno_of(kernel, path), 0, 8)
        found = []
        if start.startswith(b"DMREMAP4"):
            found.append(OWN_SIGNATURE)
        if start.startswith(kernel_v4.MAGIC):
            found.append(kernel_v4.SIGNATURE)
        if start[FILESYSTEM_SECTOR * SECTOR :].startswith(FILESYSTEM_MAGIC):
            found.append("ext4")
        return found

    def erase_signatures(self, path: str) -> None:
        kernel = self._process.change(f"erase_signatures {path}")
        devno = devno_of(kernel, path)
        if "ext4" in self.signatures(path):
            start = bytearray(kernel.read(devno, 0, 8))
            start[FILESYSTEM_SECTOR * SECTOR : (FILESYSTEM_SECTOR + 1) * SECTOR] = bytes(SECTOR)
            kernel.write(devno, 0, bytes(start))
            kernel.flush(devno)


def devno_of(kernel: Kernel, path: str) -> str:
    if path in kernel.disks:
        return kernel.disks[path].devno
    for name, device in kernel.mapped.items():
        if path in (f"/dev/dm-{device.minor}", f"/dev/mapper/{name}"):
            return device.devno
    raise Refused("no such device", device=path, remedy="name an existing block device")


def block_of(kernel: Kernel, devno: str) -> int:
    """Sectors in a logical block: the largest of what is below."""
    device = kernel.find(devno)
    if isinstance(device, Disk):
        return device.block
    segments = device.live.segments if device.live else []
    return max((block_of(kernel, part) for part in below(segments)), default=1)
