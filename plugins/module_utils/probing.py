# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Finds out what a failed request means: a bad sector, a passing fault, a device that is gone."""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Callable, Protocol

from .extents import merge_sectors
from .ladder import Ladder, Span

SYSFS = "/sys"

# Sectors in one read while nothing is known to be bad: few enough that a bad one among them costs
# one more failing read only, which can take seconds on a real disk.
STRIDE = 64

# What a block status for a bad sector becomes (blk_errors in block/blk-core.c): I/O error, medium
# error, protection error, target error. Drivers disagree on which, so they are handled alike; any
# other error says that the device itself is in trouble.
MEDIUM_ERRORS = frozenset({errno.EIO, errno.ENODATA, errno.EILSEQ, errno.EREMOTEIO})
# What an error that may be a bad sector becomes; a read that timed out may have hit one too.
SECTOR_ERRORS = MEDIUM_ERRORS | {errno.ETIMEDOUT}

# States of SCSI devices (scsi_sysfs.c) and NVMe controllers (nvme/host/sysfs.c) that answer.
_LIVE_STATES = ("running", "live", "")


class Readable(Protocol):
    """What the probe needs of a device: uncached reads."""

    sectors: int

    def read(self, sector: int, count: int) -> bytes:
        """Return `count` sectors from `sector` on, or raise OSError."""


class DeviceState(enum.Enum):
    """Whether a device can be asked at all."""

    LIVE = "live"
    OFFLINE = "offline"
    GONE = "gone"


@dataclass(frozen=True)
class Probe:
    """What reading showed.

    Args:
        bad: ranges (start, count) in sectors that cannot be read.
        unread: ranges that time did not suffice for.
        readable: whether anything at all could be read.
        errno: error number of the first failed read, 0 if none failed.
    """

    bad: Sequence[tuple[int, int]]
    unread: Sequence[tuple[int, int]]
    readable: bool
    errno: int


def device_state(devno: str, sysfs: str = SYSFS) -> DeviceState:
    """Return what the kernel says about the device `major:minor`, without touching the device."""
    folder = os.path.realpath(os.path.join(sysfs, "dev/block", devno))
    if not os.path.isdir(folder):
        return DeviceState.GONE
    if os.path.exists(os.path.join(folder, "partition")):
        folder = os.path.dirname(folder)
    if _text(os.path.join(folder, "size")) in ("0", ""):
        return DeviceState.GONE
    if _text(os.path.join(folder, "device/state")) not in _LIVE_STATES:
        return DeviceState.OFFLINE
    return DeviceState.LIVE


def whole_disk(devno: str, sysfs: str = SYSFS) -> tuple[str, int]:
    """Return the disk that `major:minor` is a partition of and the partition's first sector.

    A device that is not a partition is its own disk and starts at 0.
    """
    folder = os.path.realpath(os.path.join(sysfs, "dev/block", devno))
    if not os.path.exists(os.path.join(folder, "partition")):
        return devno, 0
    start = int(_text(os.path.join(folder, "start")) or 0)
    return _text(os.path.join(os.path.dirname(folder), "dev")) or devno, start


def serves_requests(devno: str, sysfs: str = SYSFS) -> bool:
    """Return whether the device has request queues, so that its bios' errors are said twice."""
    folder = os.path.realpath(os.path.join(sysfs, "dev/block", devno))
    if os.path.exists(os.path.join(folder, "partition")):
        folder = os.path.dirname(folder)
    return os.path.isdir(os.path.join(folder, "mq"))


def physical_block(devno: str, sysfs: str = SYSFS) -> int:
    """Return the size in bytes of the blocks that the device's medium stores and loses as one."""
    disk, _unused = whole_disk(devno, sysfs)
    text = _text(os.path.join(sysfs, "dev/block", disk, "queue/physical_block_size"))
    return int(text or 512)


def kernel_name(devno: str, sysfs: str = SYSFS) -> str:
    """Return the kernel's name of `major:minor`, such as `sda1`, or the number if it is gone."""
    folder = os.path.realpath(os.path.join(sysfs, "dev/block", devno))
    return os.path.basename(folder).replace("!", "/") if os.path.isdir(folder) else devno


def _text(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as stream:
            return stream.read().strip()
    except OSError:
        return ""


def probe(
    device: Readable,
    ranges: Iterable[tuple[int, int]],
    unit: int,
    in_time: Callable[[], bool],
) -> Probe:
    """Read `ranges` and tell which blocks cannot be read.

    Args:
        device: read past the page cache, which may hold stale pages.
        ranges: (start, count) in sectors.
        unit: sectors that fail together: the device's physical block.
        in_time: asked before each read once something was learned; False ends the probe. One
            read may still take as long as the kernel lets it.
    """
    bad: list[tuple[int, int]] = []
    unread: list[tuple[int, int]] = []
    readable, first_errno = False, 0

    def late() -> bool:
        # Something must be learned each time, or a slow disk would be asked the same for ever.
        return (readable or bool(bad)) and not in_time()

    for start, count in merge_sectors(_widen(ranges, unit, device.sectors)):
        # The last unit of a device may be cut short.
        end = start + count
        ladder = Ladder([Span(0, -(-count // unit), size=max(1, STRIDE // unit))])
        due = ladder.next_read()
        while due and not late():
            position = start + due[0] * unit
            size = min(due[1] * unit, end - position)
            fault = _read(device, position, size)
            readable = readable or not fault
            first_errno = first_errno or fault
            if not fault:
                ladder.succeeded()
            else:
                if due[1] == 1:
                    bad.append((position, size))
                # There are seconds only, so no failing read is risked.
                ladder.failed(slow=True)
            due = ladder.next_read()
        for span in ladder.left:
            position = start + span.first * unit
            unread.append((position, min(span.blocks * unit, end - position)))
    return Probe(merge_sectors(bad), merge_sectors(unread), readable, first_errno)


def answers(
    device: Readable,
    avoid: Iterable[tuple[int, int]],
    unit: int,
    fine: Collection[int] = (0,),
) -> bool:
    """Return whether the device reads anything away from `avoid`: else all of it is in trouble.

    Args:
        device: read past the page cache.
        avoid: (start, count) in sectors.
        unit: sectors of one read.
        fine: error numbers that are an answer too, and 0 for none.
    """
    holes = list(avoid)
    last = device.sectors // unit - 1
    for block in sorted({0, last // 3, 2 * last // 3, last}):
        sector = block * unit
        if any(start < sector + unit and sector < start + count for start, count in holes):
            continue
        if answers_at(device, sector, unit, fine):
            return True
    return False


def answers_at(device: Readable, sector: int, count: int, fine: Collection[int] = (0,)) -> bool:
    """Return whether a read succeeds or fails with an error number that is fine."""
    return _read(device, sector, count) in fine


def reads(device: Readable, sector: int, count: int) -> bool:
    """Whether sectors of a device can be read.

    Raises:
        OSError: they cannot, for another reason than the medium.
    """
    try:
        device.read(sector, count)
    except OSError as error:
        if error.errno in MEDIUM_ERRORS:
            return False
        raise
    return True


def _read(device: Readable, sector: int, count: int) -> int:
    """Read and return 0 or the error number."""
    try:
        device.read(sector, count)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _widen(ranges: Iterable[tuple[int, int]], unit: int, total: int) -> Iterable[tuple[int, int]]:
    """Yield the ranges grown to whole units and cut at the device's end."""
    for start, count in ranges:
        first = start // unit * unit
        last = min(-(-(start + count) // unit) * unit, total)
        if first < last:
            yield first, last - first
