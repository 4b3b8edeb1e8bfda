# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Asks the kernel about a mounted filesystem: extents of files, owners of blocks, names.

The structures are those of linux/fiemap.h, linux/fsmap.h and xfs_fs.h of xfsprogs.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .lookup import CannotTell, Extents, Names

_FIEMAP = 0xC020660B
_FIEMAP_HEAD, _FIEMAP_EXTENT = struct.Struct("=QQIIII"), struct.Struct("=QQQ2QI3I")
_EXTENT_LAST = 1
# Not known, delayed, encoded, or inside of other data: no place of the extent's own.
_EXTENT_ELSEWHERE = 0x2 | 0x4 | 0x200
_FIEMAP_COUNT = 256

_GETBMAPX = 0xC0205838
_BMAP_RECORD = struct.Struct("=qqqiiIIII")
_BMAP_ATTRIBUTES, _BMAP_PREALLOCATED = 1, 4
_BMAP_COUNT = 256
_BMAP_BYTES = 512

_GETFSMAP = 0xC0C0583B
_FSMAP_HEAD, _FSMAP_RECORD = struct.Struct("=IIII6Q"), struct.Struct("=IIQQQQ3Q")
_FSMAP_COUNT = 256

_BULKSTAT = 0x8040587F
_BULK_HEAD, _BULK_STAT = struct.Struct("=QIII44x"), struct.Struct("=4Q32xI44xIII8xH58x")
_BULK_COUNT = 256
_INUMBERS = 0x80405880
_CHUNK = struct.Struct("=QQB7x")
_CHUNK_INODES = 64

_AT_FDCWD = -100
_OPEN_TREE = 428
_OPEN_TREE_CLONE = 1

# exportfs.h: an inode's number and generation as 32 bits each, or as xfs's 64 and 32.
_HANDLE_32, _HANDLE_XFS = 0x01, 0x81


@dataclass(frozen=True)
class Mapped:
    """A record of GETFSMAP: a range of bytes on the device and who owns it."""

    device: int
    flags: int
    physical: int
    owner: int
    length: int


@dataclass(frozen=True)
class Inode:
    """An inode of xfs, as BULKSTAT tells it."""

    number: int
    generation: int
    mode: int
    links: int
    blocks: int
    realtime: bool


class _Handle(ctypes.Structure):
    _fields_ = [
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("f_handle", ctypes.c_ubyte * 12),
    ]


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


class Mounted:
    """A mounted filesystem.

    Args:
        point: where it is mounted.
        devno: its device's number as ``major:minor``.

    Raises:
        CannotTell: something else is found there.
    """

    def __init__(self, point: str, devno: str) -> None:
        self.point = point
        try:
            self._fd = os.open(point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise CannotTell(f"{point} cannot be opened: {error.strerror}") from error
        status = os.fstat(self._fd)
        self.device = status.st_dev
        if f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}" != devno:
            os.close(self._fd)
            raise CannotTell(f"another filesystem is mounted over {point}")

    def close(self) -> None:
        """Let go of it."""
        os.close(self._fd)

    def sync(self) -> None:
        """Give all written data its place on the disk; failures are the writers' own."""
        _libc().syncfs(self._fd)

    def open(self, inode: int, generation: int | None = None) -> int | None:
        """A file or directory by its inode, or None where there is none to open.

        Args:
            inode: its number.
            generation: its generation on xfs; on ext4, where any will do, None.

        Raises:
            OSError: it is there and cannot be read.
        """
        handle = _Handle()
        if generation is None:
            packed, handle.handle_type = struct.pack("=II", inode, 0), _HANDLE_32
        else:
            packed, handle.handle_type = struct.pack("=QI", inode, generation), _HANDLE_XFS
        handle.handle_bytes = len(packed)
        ctypes.memmove(handle.f_handle, packed, len(packed))
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = int(_libc().open_by_handle_at(self._fd, ctypes.byref(handle), flags))
        if fd >= 0:
            return fd
        number = ctypes.get_errno()
        if number in (errno.ESTALE, errno.ENOENT, errno.ELOOP, errno.ENXIO):
            return None
        raise OSError(number, os.strerror(number))

    def owners(self, physical: int, length: int) -> list[Mapped]:
        """The records of GETFSMAP on the filesystem's own device in a range of bytes.

        Raises:
            OSError: the kernel cannot tell.
        """
        found: list[Mapped] = []
        # The low key is the last record that was seen; all zeros stand for the beginning.
        low = _FSMAP_RECORD.pack(0, 0, physical, 0, 0, 0, 0, 0, 0)
        top = (1 << 64) - 1
        high = _FSMAP_RECORD.pack(
            0xFFFFFFFF, 0xFFFFFFFF, physical + length - 1, top, top, 0, 0, 0, 0
        )
        device = os.major(self.device) << 8 | os.minor(self.device) & 0xFF
        device |= (os.minor(self.device) & ~0xFF) << 12
        while True:
            head = _FSMAP_HEAD.pack(0, 0, _FSMAP_COUNT, 0, *[0] * 6)
            buffer = bytearray(head + low + high + bytes(_FSMAP_RECORD.size * _FSMAP_COUNT))
            fcntl.ioctl(self._fd, _GETFSMAP, buffer)
            entries = _FSMAP_HEAD.unpack_from(buffer)[3]
            begin = _FSMAP_HEAD.size + 2 * _FSMAP_RECORD.size
            for index in range(entries):
                low = bytes(buffer[begin + index * 64 : begin + index * 64 + 64])
                number, flags, start, owner, _offset, size = _FSMAP_RECORD.unpack(low)[:6]
                if number == device and start < physical + length and start + size > physical:
                    found.append(Mapped(number, flags, start, owner, size))
            if entries < _FSMAP_COUNT:
                return found

    def inodes(self, unreadable: list[str]) -> Iterator[Inode]:
        """Every inode of xfs that is in use, those without a name too (BULKSTAT, Linux 5.3).

        Args:
            unreadable: gets a sentence for each part that cannot be read, which is left out.

        Raises:
            OSError: the kernel cannot tell.
        """
        following = 0
        while True:
            try:
                found, following = self._bulk(following, _BULK_COUNT)
            except OSError as error:
                # One bad sector ends a request, so its chunk is asked inode by inode.
                first = self._next_chunk(following)
                if first is None:
                    return
                unreadable.append(f"inodes from {first} on cannot be read: {error.strerror}")
                yield from self._inodes_of_chunk(first, following)
                following = first + _CHUNK_INODES
                continue
            if not found:
                return
            yield from found

    def _next_chunk(self, inode: int) -> int | None:
        """The first inode of the chunk that an inode is in, or of the next one (INUMBERS)."""
        buffer = bytearray(_BULK_HEAD.size + _CHUNK.size)
        _BULK_HEAD.pack_into(buffer, 0, inode // _CHUNK_INODES * _CHUNK_INODES, 0, 1, 0)
        fcntl.ioctl(self._fd, _INUMBERS, buffer)
        if not _BULK_HEAD.unpack_from(buffer)[3]:
            return None
        first = int(_CHUNK.unpack_from(buffer, _BULK_HEAD.size)[0])
        return first if first + _CHUNK_INODES > inode else inode

    def _inodes_of_chunk(self, first: int, begin: int) -> Iterator[Inode]:
        for number in range(max(first, begin), first + _CHUNK_INODES):
            try:
                inode = self.inode(number)
            except OSError:
                continue
            if inode:
                yield inode

    def inode(self, number: int) -> Inode | None:
        """An inode of xfs by its number, or None where it is not in use.

        Raises:
            OSError: the kernel cannot tell.
        """
        found, _following = self._bulk(number, 1)
        return found[0] if found and found[0].number == number else None

    def _bulk(self, first: int, limit: int) -> tuple[list[Inode], int]:
        buffer = bytearray(_BULK_HEAD.size + _BULK_STAT.size * limit)
        _BULK_HEAD.pack_into(buffer, 0, first, 0, limit, 0)
        fcntl.ioctl(self._fd, _BULKSTAT, buffer)
        following, _flags, _asked, count = _BULK_HEAD.unpack_from(buffer)
        found = []
        for index in range(count):
            record = _BULK_STAT.unpack_from(buffer, _BULK_HEAD.size + index * _BULK_STAT.size)
            number, _size, blocks, flags, generation, links, _extents, _attributes, mode = record
            found.append(Inode(number, generation, mode, links, blocks, bool(flags & 1)))
        return found, following

    def names(self, wanted: Mapping[int, int]) -> Names:
        """Names of inodes, by a walk through the directories until all their links are found.

        Args:
            wanted: the number of links by inode; of a directory it does not matter.
        """
        root = self._whole_tree()
        try:
            return _walk(root, wanted, self.device)
        finally:
            os.close(root)

    def _whole_tree(self) -> int:
        # A clone of the mount shows the directories that other mounts cover.
        here = os.fsencode(f"/proc/self/fd/{self._fd}")
        clone = _libc().syscall(_OPEN_TREE, _AT_FDCWD, here, _OPEN_TREE_CLONE | os.O_CLOEXEC)
        if clone < 0:
            return os.open(self.point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=clone)
        finally:
            os.close(clone)


def _walk(root: int, wanted: Mapping[int, int], device: int) -> Names:
    names = Names()
    left = Counter(wanted)
    top = os.fstat(root).st_ino
    if top in left:
        names.paths[top] = ["."]
        del left[top]
    folders = [""]
    while folders and left:
        folder = folders.pop()
        try:
            fd = os.open(
                folder or ".",
                os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NOATIME | os.O_CLOEXEC,
                dir_fd=root,
            )
        except FileNotFoundError:
            continue
        except OSError as error:
            names.missing = f"the directory {folder or '.'} cannot be opened: {error.strerror}"
            continue
        try:
            if os.fstat(fd).st_dev != device:
                continue
            with os.scandir(fd) as entries:
                for entry in entries:
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    number, is_folder = entry.inode(), entry.is_dir(follow_symlinks=False)
                    if is_folder:
                        folders.append(name)
                    if number in left:
                        names.paths.setdefault(number, []).append(name)
                        left[number] -= 1
                        if is_folder or left[number] <= 0:
                            del left[number]
        except OSError as error:
            names.missing = f"the directory {folder or '.'} cannot be read: {error.strerror}"
        finally:
            os.close(fd)
    return names


def extents(fd: int) -> Extents:
    """The places of an open file's data on its device, as (first byte, bytes), by FIEMAP.

    Raises:
        OSError: the filesystem cannot tell.
    """
    found: Extents = []
    start = 0
    while True:
        buffer = bytearray(_FIEMAP_HEAD.size + _FIEMAP_EXTENT.size * _FIEMAP_COUNT)
        _FIEMAP_HEAD.pack_into(buffer, 0, start, (1 << 64) - 1 - start, 0, 0, _FIEMAP_COUNT, 0)
        fcntl.ioctl(fd, _FIEMAP, buffer)
        count = _FIEMAP_HEAD.unpack_from(buffer)[3]
        for index in range(count):
            record = _FIEMAP_EXTENT.unpack_from(
                buffer, _FIEMAP_HEAD.size + index * _FIEMAP_EXTENT.size
            )
            logical, physical, length, _reserved, _reserved2, flags = record[:6]
            if not flags & _EXTENT_ELSEWHERE:
                found.append((physical, length))
            start = logical + length
            if flags & _EXTENT_LAST:
                return found
        if not count:
            return found


def xfs_extents(fd: int, attributes: bool) -> Extents:
    """The places of an open file or directory of xfs, as (first byte, bytes), by GETBMAPX.

    Args:
        fd: the file; FIEMAP would refuse a directory.
        attributes: the places of its extended attributes instead of its data.

    Raises:
        OSError: the filesystem cannot tell.
    """
    found: Extents = []
    start = 0
    flags = _BMAP_PREALLOCATED | (_BMAP_ATTRIBUTES if attributes else 0)
    while True:
        buffer = bytearray(_BMAP_RECORD.size * (_BMAP_COUNT + 1))
        _BMAP_RECORD.pack_into(buffer, 0, start, 0, -1, _BMAP_COUNT + 1, 0, flags, 0, 0, 0)
        fcntl.ioctl(fd, _GETBMAPX, buffer)
        entries = _BMAP_RECORD.unpack_from(buffer)[4]
        for index in range(1, entries + 1):
            record = _BMAP_RECORD.unpack_from(buffer, index * _BMAP_RECORD.size)
            offset, block, length = record[:3]
            # A hole has -1, and what is not written yet -2.
            if block >= 0:
                found.append((block * _BMAP_BYTES, length * _BMAP_BYTES))
            start = offset + length
        if entries < _BMAP_COUNT:
            return found


def unlinked_open_files(device: int) -> Iterator[tuple[int, int, int]]:
    """Files of a filesystem that processes have open and that have no name any more.

    Args:
        device: the filesystem's device number, as ``st_dev`` is.

    Yields inode, process id, and an open descriptor that is closed afterwards.
    """
    for process in filter(str.isdigit, os.listdir("/proc")):
        for kind in ("fd", "map_files"):
            folder = f"/proc/{process}/{kind}"
            try:
                links = os.listdir(folder)
            except OSError:
                continue
            for link in links:
                path = f"{folder}/{link}"
                try:
                    status = os.stat(path)
                    if status.st_dev != device or status.st_nlink:
                        continue
                    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                except OSError:
                    continue
                try:
                    yield status.st_ino, int(process), fd
                finally:
                    os.close(fd)
