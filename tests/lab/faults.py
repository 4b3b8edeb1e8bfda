# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Which sectors of a disk fail, and how QEMU's blkdebug is told so (no I/O here)."""

from __future__ import annotations

import errno as errno_names
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .paths import LabError

# A real disk that cannot write a sector cannot write zeroes to it either.
REQUESTS = {
    "read": ("read",),
    "write": ("write", "write-zeroes"),
    "both": ("read", "write", "write-zeroes"),
    "flush": ("flush",),
}

# QEMU flushes a disk before it changes its faults, so flush faults must be used up by then.
MAX_FLUSH_TIMES = 1000


@dataclass(frozen=True)
class Fault:
    """A range of sectors that fails.

    Args:
        start: first sector of 512 bytes; None for every sector of the disk.
        count: number of sectors, at least 1.
        op: ``read``, ``write``, ``both``, or ``flush`` (which has no sectors).
        errno: the name of the error that QEMU's device gets, such as ``EIO``.
        times: how many requests fail at each sector before it answers again; None for all
            requests. A flush fault needs it.

    Raises:
        LabError: an argument is not one of these.
    """

    start: int | None
    count: int = 1
    op: str = "both"
    errno: str = "EIO"
    times: int | None = None

    def __post_init__(self) -> None:
        if self.op not in REQUESTS:
            raise LabError(f"op {self.op!r}: choose one of {', '.join(REQUESTS)}")
        if not isinstance(getattr(errno_names, self.errno, None), int):
            raise LabError(f"errno {self.errno!r}: give a name such as EIO or ENODATA")
        if self.start is not None and (self.start < 0 or self.count < 1):
            raise LabError(f"sectors {self.start}+{self.count}: start from 0, count from 1")
        if self.times is not None and self.times < 1:
            raise LabError(f"times {self.times}: give 1 or more")
        if self.op == "flush" and not 1 <= (self.times or 0) <= MAX_FLUSH_TIMES:
            raise LabError(f"a flush fault needs times, 1 to {MAX_FLUSH_TIMES}")


def rules(faults: Iterable[Fault], block_sectors: int) -> list[dict[str, Any]]:
    """Return blkdebug's ``inject-error`` rules for ``faults``.

    A rule names one sector, and a request meets it when it covers that sector, so one rule
    for each logical block is enough. ``times`` becomes that many rules that fire once.
    """
    result = []
    for fault in faults:
        for sector in fault_sectors(fault, block_sectors):
            for request in REQUESTS[fault.op]:
                rule: dict[str, Any] = {
                    "event": "none",
                    "iotype": request,
                    "errno": getattr(errno_names, fault.errno),
                    "once": fault.times is not None,
                }
                if sector is not None:
                    rule["sector"] = sector
                result += [rule] * (fault.times or 1)
    return result


def fault_sectors(fault: Fault, block_sectors: int) -> Sequence[int | None]:
    """Return the first sector of each logical block that ``fault`` touches; None means any."""
    if fault.start is None or fault.op == "flush":
        return (None,)
    first = fault.start // block_sectors * block_sectors
    return range(first, fault.start + fault.count, block_sectors)


def without(faults: Iterable[Fault], start: int, count: int) -> list[Fault]:
    """Return ``faults`` with the sectors ``[start, start + count)`` taken out.

    Raises:
        LabError: a fault of the whole disk is there, which cannot be healed in part.
    """
    end = start + count
    result = []
    for fault in faults:
        if fault.start is None:
            raise LabError("the whole disk fails: heal all of it, not some sectors")
        fault_end = fault.start + fault.count
        if fault.start < min(start, fault_end):
            result.append(replace(fault, count=min(start, fault_end) - fault.start))
        if max(end, fault.start) < fault_end:
            first = max(end, fault.start)
            result.append(replace(fault, start=first, count=fault_end - first))
    return result
