# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reading what can still be read: the ladder for a failing chunk."""

from __future__ import annotations

import contextlib
import enum
import errno
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from .errors import DmRemapError, Refused
from .probing import MEDIUM_ERRORS

SECTOR_BYTES = 512


class Outcome(enum.Enum):
    """How a logical block was read."""

    FIRST_READ = "first_read"
    RETRY = "retry"
    LOST = "lost"


class Readable(Protocol):
    """What salvage needs of a device."""

    name: str

    def read(self, sector: int, count: int) -> bytes:
        """Read ``count`` sectors from ``sector`` on, raising OSError on failure."""


@dataclass(frozen=True)
class Patience:
    """How hard to try.

    Args:
        retries: further reads of a block that failed as a single block.
        backoff: seconds before the first retry; doubled before each further one.
        budget: seconds for the whole range. When they are spent no retry is begun, and a range
            with blocks that were never tried is given up: not tried is not lost.
    """

    retries: int = 4
    backoff: float = 0.05
    budget: float = 600.0

    def __post_init__(self) -> None:
        # The comparison is this way round because no number is at least 0 or below it when NaN.
        if self.retries < 0 or not self.budget >= 0:
            raise Refused(
                f"{self.retries} retries in {self.budget} seconds are not possible",
                remedy="give 0 or more",
            )


@dataclass
class Salvage:
    """What was read of a range.

    Args:
        sector: first sector of the range on the device.
        block_sectors: sectors in a logical block.
        data: the bytes; those of lost blocks mean nothing and must never be used.
        outcomes: one for each logical block.
    """

    sector: int
    block_sectors: int
    data: bytearray
    outcomes: list[Outcome]
    reads: int = 0
    seconds: float = 0.0
    errors: dict[int, int] = field(default_factory=dict)

    def block(self, index: int) -> bytes:
        """The bytes of logical block ``index`` of the range."""
        size = self.block_sectors * SECTOR_BYTES
        return bytes(self.data[index * size : (index + 1) * size])

    @property
    def lost(self) -> list[tuple[int, int]]:
        """Lost sectors as (first sector on the device, count), joined."""
        return [
            (self.sector + first * self.block_sectors, count * self.block_sectors)
            for first, count in self.runs(Outcome.LOST)
        ]

    @property
    def readable(self) -> list[tuple[int, int]]:
        """Runs of blocks that were read, as (first block of the range, blocks)."""
        return self.runs(Outcome.FIRST_READ, Outcome.RETRY)

    def count(self, outcome: Outcome) -> int:
        """Sectors with ``outcome``."""
        return self.outcomes.count(outcome) * self.block_sectors

    def keep(self, first: int, data: bytes, outcome: Outcome) -> None:
        """Take the data of the blocks from ``first`` on."""
        size = self.block_sectors * SECTOR_BYTES
        blocks = len(data) // size
        self.data[first * size : (first + blocks) * size] = data
        self.outcomes[first : first + blocks] = [outcome] * blocks

    def read_again(self, device: Readable) -> None:
        """Read each lost block once more."""
        for first, blocks in self.runs(Outcome.LOST):
            for index in range(first, first + blocks):
                self.reads += 1
                with contextlib.suppress(OSError):
                    sector = self.sector + index * self.block_sectors
                    self.keep(index, device.read(sector, self.block_sectors), Outcome.RETRY)

    def runs(self, *wanted: Outcome) -> list[tuple[int, int]]:
        """Runs of blocks whose outcome is one of ``wanted``, as (first block, blocks)."""
        found: list[tuple[int, int]] = []
        for index, outcome in enumerate(self.outcomes):
            if outcome not in wanted:
                continue
            if found and found[-1][0] + found[-1][1] == index:
                found[-1] = (found[-1][0], found[-1][1] + 1)
            else:
                found.append((index, 1))
        return found


def salvage(
    device: Readable,
    sector: int,
    count: int,
    block_sectors: int,
    patience: Patience | None = None,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> Salvage:
    """Read a range by halves down to single blocks, then retry the blocks that failed.

    A range that reads in one go costs one read. The second pass goes backwards, because a drive
    that fails ahead of a bad spot can often still reach it from behind.

    Args:
        device: where to read from, past any cache.
        sector: first sector, a multiple of ``block_sectors``.
        count: sectors, a multiple of ``block_sectors``.
        block_sectors: sectors in a logical block (1 or 8).
        patience: retries and time budget.
        clock: seconds that never go back.
        pause: waits the given seconds.

    Raises:
        DmRemapError: the device is gone, fails in another way than by a bad block, or is so slow
            that the budget was spent before every block was tried.
    """
    limits = patience or Patience()
    begun = clock()
    result = Salvage(
        sector=sector,
        block_sectors=block_sectors,
        data=bytearray(count * SECTOR_BYTES),
        outcomes=[Outcome.LOST] * (count // block_sectors),
    )

    def in_time() -> bool:
        return clock() - begun < limits.budget

    def attempt(first: int, blocks: int, outcome: Outcome) -> bool:
        result.reads += 1
        try:
            data = device.read(sector + first * block_sectors, blocks * block_sectors)
        except OSError as error:
            if error.errno not in MEDIUM_ERRORS:
                raise DmRemapError(
                    f"fails with {error.strerror}, which is not a bad block",
                    device=device.name,
                    remedy="check that it is attached and powered",
                ) from error
            if blocks == 1:
                result.errors[first] = error.errno or errno.EIO
            return False
        result.keep(first, data, outcome)
        return True

    pending = [(0, len(result.outcomes))]
    while pending:
        if not in_time():
            raise DmRemapError(
                f"sectors {sector}+{count} could not be read within {limits.budget:g} seconds",
                device=device.name,
                remedy="nothing was changed; allow more time for the salvage",
            )
        first, blocks = pending.pop()
        if not attempt(first, blocks, Outcome.FIRST_READ) and blocks > 1:
            half = blocks // 2
            pending += [(first + half, blocks - half), (first, half)]

    for turn in range(limits.retries):
        failed = [i for i, outcome in enumerate(result.outcomes) if outcome is Outcome.LOST]
        if not failed or not in_time():
            break
        pause(min(limits.backoff * 2**turn, max(0.0, limits.budget - (clock() - begun))))
        for index in reversed(failed):
            if not in_time():
                break
            attempt(index, 1, Outcome.RETRY)

    result.seconds = clock() - begun
    return result
