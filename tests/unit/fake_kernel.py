# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A kernel in memory for the engine: disks, device-mapper, and crashes at any point.

It exists so that every crash point and every subset of lost writes can be tried in seconds. It is a
model, and only as true as its author's reading of the kernel: tests/vm runs the same programs on
real kernels and disks (test_remap.py, test_power_cut.py), and where the two differ, this one is
wrong.

What is modelled:

- Disks with bad and weak sectors, write errors, and a volatile cache that a flush empties. A power
  cut keeps any subset of the writes since then.
- The targets linear, error and integrity. Integrity keeps its superblock and its tags on the meta
  device, and a block whose tag does not match reads as EILSEQ. It does not clear the tags when it
  formats. Its journal makes a block and its tag change together. An error of the disk below comes
  at once, where the kernel's journal may hide it until later.
- Suspend: an application's write waits until resume. A swap or suspend that would wait for such a
  write for ever raises Deadlock. What the engine itself reads or writes there raises Blocked.
- Statistics (@stats_create, _print, _list, _delete) that count completed writes.
- Processes: a killed one can do nothing more, and what it made in the kernel stays.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Union

from dm_remap.blockdev import OWN_SIGNATURE, DeviceInfo, Use
from dm_remap.devmapper import MappedDevice, Segment
from dm_remap.errors import DmRemapError

SECTOR = 512
DM_MAJOR = 253
SUPERBLOCK_SECTORS = 8
SUPERBLOCK_MAGIC = b"integrt\0"
FILESYSTEM_SECTOR = 2
FILESYSTEM_MAGIC = b"a filesystem"

Written = Union[bytes, int]


class Killed(BaseException):
    """The process is dead; not even its exception handlers can do anything."""


class Blocked(Exception):
    """Input or output to a suspended device, which would wait until it is resumed."""

    def __init__(self, at: Mapped, sector: int, data: bytes) -> None:
        super().__init__(f"{at.name} is suspended")
        self.at = at
        self.sector = sector
        self.data = data
        self.above: list[tuple[str, int, int]] = []


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
    flush_fails: bool = False
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

    ``journal`` holds what was written since the last flush, a block and its tag as one.
    """

    data: str
    meta: str
    block: int
    tags: int
    journal: list[tuple[int, bytes]] = field(default_factory=list)


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
    """The segments of a table, and the state of its integrity target if it has one."""

    segments: list[Segment]
    integrity: Integrity | None = None


@dataclass
class Mapped:
    """A mapped device."""

    name: str
    uuid: str
    minor: int
    live: Table | None = None
    inactive: Table | None = None
    suspended: bool = False
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
class Request:
    """An application's write that waits at a suspended device."""

    number: int
    sector: int
    data: bytes
    above: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Volatile:
    """A write that a power cut may undo: on a disk, or a block of an integrity device."""

    where: str
    sector: int
    data: Written


def destination(segment: Segment) -> tuple[str, int]:
    device, _space, offset = segment.params.rpartition(" ")
    return device, int(offset)


class Kernel:
    """All devices of a host."""

    def __init__(self) -> None:
        self.disks: dict[str, Disk] = {}
        self.mapped: dict[str, Mapped] = {}
        self.completed: set[int] = set()
        self.failed: set[int] = set()
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
        other.completed, other.failed = set(self.completed), set(self.failed)
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
        device = self.find(devno)
        if isinstance(device, Disk):
            return device.read(sector, count)
        parts = []
        for segment, start, length in self._route(device, sector, count, b""):
            if segment.target == "error":
                raise fail(errno.EIO, f"{device.name}: error target")
            if segment.target == "linear":
                below, offset = destination(segment)
                parts.append(self.read(below, offset + start - segment.start, length))
            else:
                parts.append(self._read_integrity(device, start, length))
        return b"".join(parts)

    def write(self, devno: str, sector: int, data: bytes) -> None:
        device = self.find(devno)
        if isinstance(device, Disk):
            device.write(sector, data)
            return
        count = len(data) // SECTOR
        try:
            for segment, start, length in self._route(device, sector, count, data):
                piece = data[(start - sector) * SECTOR : (start - sector + length) * SECTOR]
                if segment.target == "error":
                    raise fail(errno.EIO, f"{device.name}: error target")
                if segment.target == "linear":
                    below, offset = destination(segment)
                    self.write(below, offset + start - segment.start, piece)
                else:
                    self._write_integrity(device, start, piece)
        except Blocked as blocked:
            if blocked.at is not device:
                blocked.above.append((device.name, sector, count))
            raise
        except OSError:
            self._account(device, sector, count)
            raise
        self._account(device, sector, count)

    def flush(self, devno: str) -> None:
        device = self.find(devno)
        if isinstance(device, Disk):
            device.flush()
            return
        if device.suspended:
            raise Blocked(device, 0, b"")
        assert device.live is not None
        if device.live.integrity:
            self._write_back(device.live.integrity)
            return
        for below in {destination(s)[0] for s in device.live.segments if s.target == "linear"}:
            self.flush(below)

    def submit(self, name: str, sector: int, data: bytes) -> int:
        """An application's write; whether it is done is in ``completed`` or ``failed``."""
        self._requests += 1
        number = self._requests
        self._serve(Request(number, sector, data, ()), self.mapped[name])
        return number

    def _serve(self, request: Request, device: Mapped) -> None:
        try:
            self.write(device.devno, request.sector, request.data)
        except Blocked as blocked:
            if blocked.data != request.data:
                raise AssertionError("an application's write spans segments") from blocked
            above = (*blocked.above, *request.above)
            blocked.at.waiting.append(Request(request.number, blocked.sector, blocked.data, above))
            return
        except OSError:
            self.failed.add(request.number)
        else:
            self.completed.add(request.number)
        for name, sector, count in request.above:
            self._account(self.mapped[name], sector, count)

    def _route(
        self, device: Mapped, sector: int, count: int, data: bytes
    ) -> list[tuple[Segment, int, int]]:
        if device.suspended:
            raise Blocked(device, sector, data)
        if device.live is None or sector < 0 or sector + count > device.sectors:
            raise fail(errno.EIO, f"{device.name}: {sector}+{count} is past the end")
        parts = []
        for segment in device.live.segments:
            start = max(sector, segment.start)
            end = min(sector + count, segment.start + segment.length)
            if start < end:
                parts.append((segment, start, end - start))
        return parts

    def _account(self, device: Mapped, sector: int, count: int) -> None:
        for region in device.regions.values():
            low = max(sector, region.start)
            high = min(sector + count, region.start + region.length)
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
            below, offset = destination(device.live.segments[0])
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

    def _write_back(self, target: Integrity) -> None:
        for sector, data in target.journal:
            self._store(target, sector, data)
        self.flush(target.data)
        self.flush(target.meta)
        target.journal.clear()

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
        if found == bytes(SECTOR):
            self.write(meta, 0, wanted.ljust(SECTOR, b"\0"))
            self.flush(meta)
        elif found.rstrip(b"\0") != wanted:
            raise fail(errno.EINVAL, "the superblock does not fit")
        return Integrity(data, meta, block, SUPERBLOCK_SECTORS + journal)

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
        end = 0
        integrity = None
        for segment in segments:
            if segment.start != end or segment.length < 1:
                raise fail(errno.EINVAL, f"{name}: gap or overlap at {end}")
            end += segment.length
            if segment.target == "linear":
                devno, offset = destination(segment)
                if offset + segment.length > self.size(devno):
                    raise fail(errno.EINVAL, f"{name}: {segment} is past the end")
                device = self.find(devno)
                if isinstance(device, Disk) and device.mounted:
                    raise fail(errno.EBUSY, f"{device.path} is mounted")
            elif segment.target == "integrity":
                integrity = self.open_integrity(segment)
            else:
                assert segment.target == "error"
        if not segments:
            raise fail(errno.EINVAL, f"{name}: no segments")
        self.mapped[name].inactive = Table(list(segments), integrity)

    def suspend(self, name: str) -> None:
        device = self.mapped[name]
        for other in self.mapped.values():
            for request in other.waiting:
                if any(name == above for above, _sector, _count in request.above):
                    raise Deadlock(f"{name} has a write in flight that waits at {other.name}")
        if device.live and device.live.integrity and not device.suspended:
            self._write_back(device.live.integrity)
        device.suspended = True

    def resume(self, name: str) -> None:
        device = self.mapped[name]
        if device.inactive:
            if not device.suspended:
                self.suspend(name)
            device.live, device.inactive = device.inactive, None
        device.suspended = False
        waiting, device.waiting = device.waiting, []
        for request in waiting:
            self._serve(request, device)

    def remove(self, name: str) -> None:
        device = self.mapped[name]
        if self.opened(device):
            raise fail(errno.EBUSY, f"{name} is open")
        assert not device.waiting, f"{name} is removed with writes waiting"
        if device.live and device.live.integrity:
            self._write_back(device.live.integrity)
        del self.mapped[name]


def below(segments: Iterable[Segment]) -> list[str]:
    """Device numbers that a table uses, each once."""
    found = []
    for segment in segments:
        if segment.target == "linear":
            found.append(destination(segment)[0])
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
        return {"linear": (1, 4, 0), "error": (1, 5, 0), "integrity": (1, 10, 0)}

    def names(self) -> list[str]:
        return list(self._process.look().mapped)

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
        live = self._device(name).live
        return list(live.segments) if live else []

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

    def __enter__(self) -> OpenDevice:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _check(self, sector: int, count: int) -> None:
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

    def node_of(self, devno: str) -> str:
        device = self._process.look().find(devno)
        return device.path if isinstance(device, Disk) else f"/dev/dm-{device.minor}"

    def signatures(self, path: str) -> list[str]:
        kernel = self._process.look()
        start = kernel.read(devno_of(kernel, path), 0, 8)
        found = []
        if start.startswith(b"DMREMAP4"):
            found.append(OWN_SIGNATURE)
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
    raise DmRemapError("no such device", device=path, remedy="name an existing block device")


def block_of(kernel: Kernel, devno: str) -> int:
    """Sectors in a logical block: the largest of what is below."""
    device = kernel.find(devno)
    if isinstance(device, Disk):
        return device.block
    segments = device.live.segments if device.live else []
    return max((block_of(kernel, part) for part in below(segments)), default=1)
