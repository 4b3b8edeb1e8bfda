# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which files did lost sectors belong to?

The answers come from the filesystems' own tools and from the kernel, never from a guess: what
cannot be found out for certain is `unknown`, with the reason. Nothing is written to the device.
All of it happens in a process of its own, which is killed when the time is over, because reading
a failing disk can wait for as long as the disk likes.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import re
import resource
import selectors
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from .devmapper import DeviceMapper
from .errors import DmRemapError
from .events import intersect_ranges, subtract_ranges
from .ext import Ext
from .extents import merge_sectors
from .lookup import METADATA, UNKNOWN, Answers, CannotTell, Found, run_tool
from .mounted import Mounted
from .xfs import MountedXfs, UnmountedXfs

SECTOR_BYTES = 512
EXT_TYPES = ("ext2", "ext3", "ext4")

# A look-up that would need more memory than this gives up; the host has other things to do.
_MEMORY_BYTES = 2 << 30
_PR_SET_PDEATHSIG = 1
_BLKSSZGET = 0x1268
# linux/loop.h
_LOOP_GET_FREE, _LOOP_CONFIGURE = 0x4C82, 0x4C0A
_LOOP_READ_ONLY, _LOOP_AUTOCLEAR = 1, 4
_LOOP_ATTEMPTS = 8
# Partition types of DOS that only hold other partitions.
_CONTAINERS = (["0x5"], ["0xf"], ["0x85"])


@dataclass(frozen=True)
class Owner:
    """Whom a range of lost sectors belonged to.

    A range has several owners where a filesystem shares blocks between files.

    Args:
        start: first sector on the target, in units of 512 bytes.
        count: number of sectors.
        kind: ``file``, ``metadata`` of the filesystem or of one file or directory, ``free`` space,
            or ``unknown``.
        paths: all names that are known, sorted. Where the filesystem is mounted they begin with
            the mount point, otherwise they are relative to the filesystem's root. Bytes that are
            no text are surrogates (PEP 383).
        inode: number of the inode, 0 where it belongs to none.
        filesystem: ``ext2``, ``ext3``, ``ext4``, ``xfs``, or "".
        partition: number of the partition of the target, 0 where there is none.
        reason: why it is unknown, or why there is no name; otherwise "".
    """

    start: int
    count: int
    kind: str
    paths: tuple[str, ...] = ()
    inode: int = 0
    filesystem: str = ""
    partition: int = 0
    reason: str = ""


def owners(path: str, ranges: Sequence[tuple[int, int]], timeout: float = 60) -> list[Owner]:
    """Find out whom sectors belong to; best effort, and never an error.

    Call it only while no I/O to the target is held, because it reads from it.

    Args:
        path: the target's node, such as ``/dev/mapper/data``.
        ranges: pairs of first sector and count, in units of 512 bytes.
        timeout: seconds after which it gives up; what it did not come to is `unknown`.

    Returns owners that together cover all of the ranges, sorted.
    """
    wanted = merge_sectors(ranges)
    if not wanted:
        return []
    try:
        lines = _in_a_process({"path": path, "ranges": wanted}, timeout)
    except OSError as error:
        return _unknown(wanted, f"the look-up cannot be started: {error.strerror}")
    reason = f"the look-up took longer than {timeout:g} seconds"
    found: list[Owner] = []
    for line in lines:
        told = json.loads(line)
        if "end" in told:
            reason = told["end"]
        else:
            found.append(Owner(**{**told, "paths": tuple(told["paths"])}))
    known = [(owner.start, owner.count) for owner in found]
    return sorted(found + _unknown(subtract_ranges(wanted, known), reason), key=_order)


def _unknown(ranges: Iterable[tuple[int, int]], reason: str) -> list[Owner]:
    return [Owner(start, count, UNKNOWN, reason=reason) for start, count in ranges]


def _order(owner: Owner) -> tuple[int, int]:
    return owner.start, owner.inode


def _in_a_process(request: dict[str, Any], timeout: float) -> list[bytes]:
    """The whole lines that `work` printed until it ended or the time was over."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"from {__package__} import files; files.work()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={
            "LC_ALL": "C",
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        # The tools that it starts are killed with it.
        start_new_session=True,
    )
    if process.stdin is None or process.stdout is None:
        raise AssertionError("both are pipes")
    text = b""
    try:
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(json.dumps({**request, "timeout": timeout}).encode())
        text = _read_until(process.stdout, time.monotonic() + timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        # One that waits for the disk cannot be killed until the disk answers.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
    return text.split(b"\n")[:-1]


def _read_until(stream: Any, deadline: float) -> bytes:
    parts = []
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            part = os.read(stream.fileno(), 1 << 16)
            if not part:
                break
            parts.append(part)
    return b"".join(parts)


def _say(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def work() -> None:
    """The process of its own: read the request from standard input, print owners, a line each."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    os.nice(10)
    request = json.load(sys.stdin)

    def tell(found: list[Owner]) -> None:
        for owner in found:
            _say(asdict(owner))

    end = "the look-up ended early"
    try:
        look_up(request["path"], [tuple(item) for item in request["ranges"]], tell)
    except CannotTell as error:
        end = str(error)
    except MemoryError:
        end = f"the look-up needs more than {_MEMORY_BYTES >> 30} GiB of memory"
    except (DmRemapError, OSError, ValueError, LookupError) as error:
        end = f"the look-up failed: {error}"
    _say({"end": end})


class _Piece(NamedTuple):
    """Sectors of a device: where they are on the target, how many, where on the device."""

    target: int
    length: int
    start: int


@dataclass(frozen=True)
class _View:
    """A device through which a part of the target is used.

    Args:
        node: its node or file.
        devno: its number as ``major:minor``, "" for a file.
        pieces: the sectors that are asked for.
        partition: number of the partition of the target that it is in.
        offset: where the filesystem would begin on it, in bytes.
    """

    node: str
    devno: str
    pieces: tuple[_Piece, ...]
    partition: int = 0
    offset: int = 0


def look_up(
    path: str, ranges: Sequence[tuple[int, int]], tell: Callable[[list[Owner]], None]
) -> None:
    """Do the work of `owners` in this process.

    Args:
        path: the target's node, or a file.
        ranges: pairs of first sector and count.
        tell: is called with owners as they are found.

    Raises:
        CannotTell: nothing more can be found out.
        OSError: the same.
    """
    status = os.stat(path)
    devno = ""
    if stat.S_ISBLK(status.st_mode):
        devno = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    pieces = tuple(_Piece(start, count, start) for start, count in merge_sectors(ranges))
    _look_at(_View(path, devno, pieces), tell)


def _look_at(view: _View, tell: Callable[[list[Owner]], None]) -> None:
    """Look through what stands on a device first, then at what is left of it."""
    users, strangers = _users(view) if view.devno else ([], [])
    table, problem = None, ""
    try:
        table = _partition_table(view) if not view.partition else None
    except CannotTell as error:
        problem = str(error)
    seen: list[tuple[int, int]] = []
    for user in users:
        if user.pieces:
            number = table.number_at(_start_on(view, user)) if table else view.partition
            _look_at(replace(user, partition=number or view.partition), tell)
            seen += [(piece.target, piece.length) for piece in user.pieces]
    rest = replace(view, pieces=tuple(_without(view.pieces, seen)))
    if not rest.pieces:
        return
    if strangers:
        reason = f"it is used by {', '.join(strangers)}, which cannot be looked through"
        tell(_all(rest, UNKNOWN, reason=reason))
    elif problem:
        tell(_all(rest, UNKNOWN, reason=problem))
    elif table and not _mounts_of(view.devno):
        for part, kind, reason in table.split(rest):
            if kind:
                tell(_all(part, kind, reason=reason))
            else:
                _look_inside(part, bool(users), tell)
    else:
        _look_inside(rest, bool(users), tell)


def _without(pieces: Sequence[_Piece], seen: Sequence[tuple[int, int]]) -> Iterator[_Piece]:
    for piece in pieces:
        for start, count in subtract_ranges([(piece.target, piece.length)], seen):
            yield _Piece(start, count, piece.start + start - piece.target)


def _all(view: _View, kind: str, filesystem: str = "", reason: str = "") -> list[Owner]:
    return [
        Owner(piece.target, piece.length, kind, (), 0, filesystem, view.partition, reason)
        for piece in view.pieces
    ]


# Who uses a device


def _sysfs(devno: str) -> str:
    return os.path.realpath(f"/sys/dev/block/{devno}")


def _read(*names: str) -> str:
    try:
        with open(os.path.join(*names), encoding="utf-8", errors="surrogateescape") as file:
            return file.read().strip()
    except OSError:
        return ""


def _list(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _users(view: _View) -> tuple[list[_View], list[str]]:
    """Devices that map parts of this one unchanged, and names of those that do otherwise."""
    folder = _sysfs(view.devno)
    users, strangers = [], []
    for name in _list(folder):
        if _read(folder, name, "partition"):
            start, size = int(_read(folder, name, "start")), int(_read(folder, name, "size"))
            devno = _read(folder, name, "dev")
            users.append(_mapped(view, f"/dev/{name}", devno, [(0, size, start)]))
    for holder in _list(os.path.join(folder, "holders")):
        devno = _read("/sys/class/block", holder, "dev")
        segments = _linear_segments(holder, view.devno)
        if segments is None:
            strangers.append(_read("/sys/class/block", holder, "dm", "name") or holder)
        else:
            users.append(_mapped(view, f"/dev/{holder}", devno, segments))
    for loop, start, size in _loops_on(view):
        devno = _read("/sys/class/block", loop, "dev")
        users.append(_mapped(view, f"/dev/{loop}", devno, [(0, size, start)]))
    return users, strangers


def _mapped(view: _View, node: str, devno: str, segments: Iterable[tuple[int, int, int]]) -> _View:
    """The part of a view that is seen through another device.

    Args:
        view: the view.
        node: the other device.
        devno: its number.
        segments: first sector on the other device, count, and first sector on this device.
    """
    pieces = []
    for there, count, here in segments:
        for piece in view.pieces:
            for start, length in intersect_ranges([(piece.start, piece.length)], (here, count)):
                pieces.append(
                    _Piece(piece.target + start - piece.start, length, there + start - here)
                )
    return _View(node, devno, tuple(pieces))


def _start_on(view: _View, user: _View) -> int:
    """The sector of the view at which the first piece of a user of it is."""
    first = user.pieces[0].target
    return next(
        piece.start + first - piece.target
        for piece in view.pieces
        if piece.target <= first < piece.target + piece.length
    )


def _linear_segments(holder: str, devno: str) -> list[tuple[int, int, int]] | None:
    """How a device-mapper device maps another, or None where that is not plain."""
    name = _read("/sys/class/block", holder, "dm", "name")
    if not name:
        return None
    found = []
    for segment in DeviceMapper().table(name):
        words = segment.params.split()
        if segment.target != "linear" or len(words) != 2:
            return None
        if words[0] == devno:
            found.append((segment.start, segment.length, int(words[1])))
    return found


def _loops_on(view: _View) -> Iterator[tuple[str, int, int]]:
    """Loop devices on a device, with the first sector and the sectors that they show."""
    for name in _list("/sys/class/block"):
        file = _read("/sys/class/block", name, "loop", "backing_file")
        if not file:
            continue
        try:
            number = os.stat(file).st_rdev
        except OSError:
            continue
        if f"{os.major(number)}:{os.minor(number)}" == view.devno:
            offset = int(_read("/sys/class/block", name, "loop", "offset") or 0)
            yield name, offset // SECTOR_BYTES, int(_read("/sys/class/block", name, "size") or 0)


class _Mount(NamedTuple):
    point: str
    root: str
    filesystem: str


def _mounts_of(devno: str) -> list[_Mount]:
    """Where a device is mounted, the whole filesystem first (proc(5), mountinfo)."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields, _dash, more = line.partition(" - ")
            words = fields.split()
            if words[2] == devno:
                found.append(_Mount(_plain(words[4]), _plain(words[3]), more.split()[0]))
    return sorted(found, key=lambda mount: mount.root != "/")


def _plain(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)


# Partitions


@dataclass(frozen=True)
class _Table:
    """A partition table: partitions as (number, first sector, sectors), and what it takes up."""

    partitions: tuple[tuple[int, int, int], ...]
    own: tuple[tuple[int, int], ...]

    def number_at(self, sector: int) -> int:
        """The partition that a sector is in, or 0."""
        for number, start, count in self.partitions:
            if start <= sector < start + count:
                return number
        return 0

    def split(self, view: _View) -> Iterator[tuple[_View, str, str]]:
        """A view by partitions; what is in none of them with its kind and the reason."""
        for number, start, count in self.partitions:
            inner = _mapped(view, view.node, view.devno, [(start, count, start)])
            if inner.pieces:
                offset = start * SECTOR_BYTES
                yield replace(inner, partition=number, offset=offset), "", ""
        inside = [(start, count) for _number, start, count in self.partitions]
        for start, count in self.own:
            for here, length in subtract_ranges([(start, count)], inside):
                part = _mapped(view, view.node, view.devno, [(here, length, here)])
                if part.pieces:
                    yield part, METADATA, ""
        taken = [*inside, *self.own]
        for piece in view.pieces:
            for start, count in subtract_ranges([(piece.start, piece.length)], taken):
                place = _Piece(piece.target + start - piece.start, count, start)
                reason = "it is in no partition; a boot loader may be there"
                yield replace(view, pieces=(place,)), UNKNOWN, reason


def _partition_table(view: _View) -> _Table | None:
    """The partition table that a device begins with, or None.

    Raises:
        CannotTell: it cannot be read.
    """
    kind = _probe(view)[1]
    if not kind:
        return None
    # Its numbers are of 512 bytes, whatever the device's logical blocks are (partx(8)).
    columns = "--output=NR,START,SECTORS,TYPE"
    output = run_tool("util-linux", ["partx", "--raw", "--noheadings", columns, "--", view.node])
    if output.code:
        raise CannotTell(f"its partition table cannot be read: {output.complaint}")
    parts = []
    for line in output.text.decode(errors="replace").splitlines():
        number, start, sectors, *more = line.split()
        if kind != "dos" or more not in _CONTAINERS:
            parts.append((int(number), int(start), int(sectors)))
    return _Table(tuple(parts), tuple(_taken_by_gpt(view.node) if kind == "gpt" else [(0, 1)]))


def _taken_by_gpt(node: str) -> list[tuple[int, int]]:
    """The sectors that a GPT takes up at both ends, as its header in block 1 says.

    The first usable block stands at byte 40 and the last at byte 48 (UEFI specification, 5.3.2).
    """
    with open(node, "rb", buffering=0) as file:
        block = _block_bytes(file.fileno())
        try:
            header = os.pread(file.fileno(), SECTOR_BYTES, block)
        except OSError:
            header = b""
    if not header.startswith(b"EFI PART"):
        return []
    first, last = (int.from_bytes(header[at : at + 8], "little") for at in (40, 48))
    per_block = block // SECTOR_BYTES
    end = (last + 1) * per_block
    return [(0, first * per_block), (end, (1 << 62) - end)]


def _block_bytes(fd: int) -> int:
    buffer = bytearray(4)
    try:
        fcntl.ioctl(fd, _BLKSSZGET, buffer)
    except OSError:
        return SECTOR_BYTES
    return int.from_bytes(buffer, sys.byteorder)


# Filesystems


def _probe(view: _View) -> tuple[str, str]:
    """Types of the filesystem and of the partition table at a place, "" where there is none."""
    output = run_tool(
        "util-linux",
        ["blkid", "-p", "-o", "export", "-O", str(view.offset), "--", view.node],
    )
    fields = dict(
        line.split("=", 1)
        for line in output.text.decode(errors="replace").splitlines()
        if "=" in line
    )
    # With a filesystem on the whole device, a table beside it is only its boot sector.
    kind = fields.get("TYPE", "")
    return kind, "" if kind else fields.get("PTTYPE", "")


def _look_inside(view: _View, has_users: bool, tell: Callable[[list[Owner]], None]) -> None:
    """Tell the owners on one filesystem, or why they cannot be told."""
    filesystem = ""
    try:
        mounts = _mounts_of(view.devno) if view.devno and not view.offset else []
        if mounts:
            filesystem = mounts[0].filesystem
            tell(_mounted_owners(view, mounts))
            return
        filesystem = _probe(view)[0]
        _check_unused(view, has_users)
        found = _unmounted_owners(view, filesystem)
        _check_unused(view, has_users)
        tell(found)
    except CannotTell as error:
        known = filesystem if filesystem in (*EXT_TYPES, "xfs") else ""
        tell(_all(view, UNKNOWN, known, str(error)))


def _check_unused(view: _View, has_users: bool) -> None:
    if not view.devno:
        return
    if not view.offset and _mounts_of(view.devno):
        raise CannotTell("it was mounted during the look-up; try again")
    if has_users:
        return
    try:
        os.close(os.open(view.node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        raise CannotTell(
            f"it is in use, but not mounted where this process sees it: {error.strerror}"
        ) from error


def _mounted_owners(view: _View, mounts: Sequence[_Mount]) -> list[Owner]:
    mount = mounts[0]
    mounted = Mounted(mount.point, view.devno)
    try:
        if mount.filesystem in EXT_TYPES:
            filesystem: Any = Ext(view.node, mounted=mounted)
        elif mount.filesystem == "xfs":
            filesystem = MountedXfs(mounted)
        else:
            raise CannotTell(f"it holds {mount.filesystem}; only ext2 to ext4 and xfs are known")
        return _owners_in(view, filesystem, mount.filesystem, mount.point)
    finally:
        mounted.close()


def _unmounted_owners(view: _View, kind: str) -> list[Owner]:
    if kind in EXT_TYPES:
        return _owners_in(view, Ext(view.node, view.offset), kind)
    if kind == "xfs":
        with _at_its_start(view) as node:
            return _owners_in(view, UnmountedXfs(node), kind)
    if kind:
        raise CannotTell(f"it holds {kind}; only ext2 to ext4 and xfs are known")
    raise CannotTell("no filesystem is recognised on it")


@contextlib.contextmanager
def _at_its_start(view: _View) -> Iterator[str]:
    """A node that begins where the view's filesystem does: a read-only loop device if need be.

    It goes away with the last process that has it open, and is locked against udev, so that
    nothing takes it for a disk that appeared (systemd's block device locking).

    Raises:
        CannotTell: no loop device can be made.
    """
    if not view.offset:
        yield view.node
        return
    with contextlib.ExitStack() as stack:
        backing = os.open(view.node, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, backing)
        try:
            node, loop = _configure_loop(backing, view.offset)
        except OSError as error:
            raise CannotTell(f"no loop device can be made for it: {error.strerror}") from error
        stack.callback(os.close, loop)
        yield node


def _configure_loop(backing: int, offset: int) -> tuple[str, int]:
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for attempt in range(_LOOP_ATTEMPTS):
            node = f"/dev/loop{fcntl.ioctl(control, _LOOP_GET_FREE)}"
            loop = os.open(node, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(loop, fcntl.LOCK_EX)
                fcntl.ioctl(loop, _LOOP_CONFIGURE, _loop_config(backing, offset))
                return node, loop
            except OSError:
                # Another process was faster.
                os.close(loop)
                if attempt == _LOOP_ATTEMPTS - 1:
                    raise
    finally:
        os.close(control)
    raise AssertionError("unreachable")


def _loop_config(backing: int, offset: int) -> bytes:
    """struct loop_config of linux/loop.h: fd, block size, struct loop_info64, reserved."""
    config = bytearray(304)
    config[0:4] = backing.to_bytes(4, sys.byteorder)
    # loop_info64 begins at 8: device, inode, rdevice, offset, sizelimit, number, two types, flags.
    config[32:40] = offset.to_bytes(8, sys.byteorder)
    flags = _LOOP_READ_ONLY | _LOOP_AUTOCLEAR
    config[60:64] = flags.to_bytes(4, sys.byteorder)
    return bytes(config)


def _owners_in(view: _View, filesystem: Any, kind: str, point: str = "") -> list[Owner]:
    """Owners of the view's sectors, from the owners of the filesystem's blocks."""
    per_block = filesystem.block_bytes // SECTOR_BYTES
    begin = view.offset // SECTOR_BYTES
    wanted = {
        (sector - begin) // per_block
        for piece in view.pieces
        for sector in range(piece.start, piece.start + piece.length)
    }
    inside = {block for block in wanted if block < filesystem.blocks}
    answers: Answers = filesystem.owners(inside)
    behind = [Found(UNKNOWN, reason="it is behind the filesystem's end")]
    found: list[Owner] = []
    for piece in view.pieces:
        position, end = piece.start, piece.start + piece.length
        while position < end:
            first, answer = position, answers.get((position - begin) // per_block, behind)
            while position < end:
                block = (position - begin) // per_block
                if answers.get(block, behind) != answer:
                    break
                position = min(end, begin + (block + 1) * per_block)
            start = piece.target + first - piece.start
            found += [_owner((start, position - first), one, view, kind, point) for one in answer]
    return sorted(found, key=_order)


def _owner(sectors: tuple[int, int], answer: Found, view: _View, kind: str, point: str) -> Owner:
    paths = answer.paths
    if point:
        paths = tuple(point if path == "." else os.path.join(point, path) for path in paths)
    return Owner(*sectors, answer.kind, paths, answer.inode, kind, view.partition, answer.reason)
