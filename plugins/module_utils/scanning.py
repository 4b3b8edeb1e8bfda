# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reads what a target keeps on its disks, to find bad sectors before an application does.

The disks themselves are read, past the target. So no application waits for what fails, and the
reflex and the daemon see it as any other error of the disk.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Callable, Protocol

from . import probing
from .errors import DmRemapError
from .events import intersect_ranges, subtract_ranges
from .format import Metadata
from .probing import SECTOR_ERRORS, probe

# Sectors in a read, as many as one request of a disk usually has.
STRIDE = 2048


class Readable(probing.Readable, Protocol):
    """What is needed of a device: uncached reads, and its name for errors."""

    name: str


@dataclass(frozen=True)
class Stretch:
    """Sectors of the target that lie side by side on one device.

    Args:
        start: the first one on the target.
        count: how many.
        spare: index of the spare that they are on, None for main.
        position: the first one on main, or on the spare's integrity device.
    """

    start: int
    count: int
    spare: int | None
    position: int


@dataclass(frozen=True)
class Finding:
    """Sectors of the target that could not be read.

    Args:
        start: the first one.
        count: how many.
        spare: index of the spare that they are on, None for main.
        errno: error number of the read.
        weak: one of them failed, and all could be read at the next try.
    """

    start: int
    count: int
    spare: int | None
    errno: int
    weak: bool = False

    @property
    def error(self) -> str:
        """Name of the error, such as ``EIO``."""
        return errno.errorcode.get(self.errno, str(self.errno))


@dataclass(frozen=True)
class Step:
    """What one read showed.

    Args:
        end: sectors of the target before this one are done.
        count: sectors that were read.
        findings: those that could not be read.
    """

    end: int
    count: int
    findings: tuple[Finding, ...] = ()


def stretches(metadata: Metadata, first: int = 0) -> list[Stretch]:
    """Where a target's sectors are, from ``first`` on, in their order (pure).

    What is lost is left out, because the spare answers with errors for it until it is written.

    Args:
        metadata: the target's, without a replacement of its main under way.
        first: sector of the target.
    """
    chunk, total = metadata.config["chunk_sectors"], metadata.config["main"]["sectors"]
    lost = [(one.sector, one.count) for one in metadata.lost]
    found = []
    cursor = 0

    def add(start: int, end: int, spare: int | None, position: int) -> None:
        skipped = max(0, first - start)
        start, position = start + skipped, position + skipped
        if start < end:
            found.append(Stretch(start, end - start, spare, position))

    for extent in metadata.extents:
        start = extent.logical * chunk
        end = min(start + extent.length * chunk, total)
        add(cursor, start, None, cursor)
        for piece, count in subtract_ranges([(start, end - start)], lost):
            add(piece, piece + count, extent.spare, extent.physical * chunk + piece - start)
        cursor = end
    add(cursor, total, None, cursor)
    return found


def scan(
    places: Iterable[Stretch],
    device_of: Callable[[int | None], Readable],
    unit_of: Callable[[int | None], int],
    stride: int = STRIDE,
) -> Iterator[Step]:
    """Read stretches, and where that fails find out which sectors it is.

    Args:
        places: from `stretches`.
        device_of: the open integrity device of a spare by its index, or main for None.
        unit_of: sectors of the device that fail together.
        stride: sectors in a read, at least one unit.

    Yields:
        What each read showed.

    Raises:
        DmRemapError: a device has other troubles than bad sectors.
    """
    for place in places:
        device, unit = device_of(place.spare), unit_of(place.spare)
        for offset in range(0, place.count, stride):
            count = min(stride, place.count - offset)
            findings = _read(device, place, offset, count, unit)
            yield Step(place.start + offset + count, count, findings)


def _read(
    device: Readable, place: Stretch, offset: int, count: int, unit: int
) -> tuple[Finding, ...]:
    position = place.position + offset
    try:
        device.read(position, count)
    except OSError as error:
        failed = error.errno or errno.EIO
    else:
        return ()
    if failed not in SECTOR_ERRORS:
        raise DmRemapError(
            f"cannot be read at sector {position}: {os.strerror(failed)}",
            device=device.name,
            remedy="see that the disk is still attached and answers",
        )
    bad = probe(device, [(position, count)], unit, lambda: True)
    # A unit may reach beyond what is looked at.
    ranges = intersect_ranges(bad.bad, (position, count))
    shift = place.start - place.position
    if not ranges:
        return (Finding(position + shift, count, place.spare, failed, weak=True),)
    return tuple(
        Finding(start + shift, length, place.spare, bad.errno or failed) for start, length in ranges
    )
