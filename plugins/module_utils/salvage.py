# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reading what can still be read: the ladder for a failing chunk."""

from __future__ import annotations

import contextlib
import enum
import errno
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from .errors import DmRemapError, Refused
from .extents import runs
from .ladder import Ladder, Span, keep_only, spans_around
from .probing import MEDIUM_ERRORS

SECTOR_BYTES = 512


class Outcome(enum.Enum):
    """How a logical block was read; ``LOST`` only after it failed as a single block."""

    FIRST_READ = "first_read"
    RETRY = "retry"
    LOST = "lost"
    NOT_TRIED = "not_tried"


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
        slow: seconds from which on a failing read is slow. Its blocks are then read singly, because
            another failing read would take longer than many good ones.
        retry_until: seconds in which all should be read that can be done without. No retry is begun
            that does not leave the time to read each lost block once more, as `Salvage.read_again`
            does, at the pace of the slowest failing read.
    """

    retries: int = 4
    backoff: float = 0.05
    budget: float = 600.0
    slow: float = 0.2
    retry_until: float = math.inf

    def __post_init__(self) -> None:
        # The comparison is this way round because no number is at least 0 or below it when NaN.
        if not all(
            value >= 0 for value in (self.retries, self.budget, self.slow, self.retry_until)
        ):
            raise Refused(
                f"{self.retries} retries in {self.budget} seconds, of which {self.slow} are slow, "
                f"and all until {self.retry_until}, are not possible",
                remedy="give 0 or more",
            )


@dataclass
class Salvage:
    """What was read of a range.

    Args:
        sector: first sector of the range on the device.
        block_sectors: sectors in a logical block.
        data: the bytes; those of blocks that were not read mean nothing and must never be used.
        outcomes: one for each logical block.
        reads: reads in all.
        seconds: time that was spent.
        errors: error number of each block that failed as a single block.
        pending: how the blocks that were not tried are to be read.
        failures: how often each block failed as a single block.
    """

    sector: int
    block_sectors: int
    data: bytearray
    outcomes: list[Outcome]
    reads: int = 0
    seconds: float = 0.0
    errors: dict[int, int] = field(default_factory=dict)
    pending: list[Span] = field(default_factory=list)
    failures: dict[int, int] = field(default_factory=dict)

    def block(self, index: int) -> bytes:
        """The bytes of logical block ``index`` of the range."""
        return self.blocks(index, 1)

    def blocks(self, first: int, count: int) -> bytes:
        """The bytes of ``count`` logical blocks of the range from block ``first`` on."""
        size = self.block_sectors * SECTOR_BYTES
        return bytes(self.data[first * size : (first + count) * size])

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
        return runs(i for i, outcome in enumerate(self.outcomes) if outcome in wanted)


class Unfinished(DmRemapError):
    """A salvage that stopped early; ``partial`` is what was read, to resume with."""

    def __init__(self, message: str, partial: Salvage, device: str, remedy: str) -> None:
        super().__init__(message, device=device, remedy=remedy)
        self.partial = partial


def salvage(
    device: Readable,
    sector: int,
    count: int,
    block_sectors: int,
    patience: Patience | None = None,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
    resume: Salvage | None = None,
    suspects: Iterable[tuple[int, int]] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Salvage:
    """Read a range in the order of `ladder.Ladder`, then retry the blocks that failed.

    A range that reads in one go costs one read. In the first pass a bad block takes part in at most
    three failing reads, a suspect in one; later in one for each retry. The retries go backwards,
    because a drive that fails ahead of a bad spot can often still reach it from behind.

    Args:
        device: where to read from, past any cache.
        sector: first sector, a multiple of ``block_sectors``.
        count: sectors, a multiple of ``block_sectors``.
        block_sectors: sectors in a logical block (1 or 8).
        patience: retries and time budget, the latter for this call.
        clock: seconds that never go back.
        pause: waits the given seconds.
        resume: an earlier result for the same range, which is continued in place: blocks that were
            read are not read again, nor are lost ones that had all their retries.
        suspects: ranges (first sector, count) that are bad as far as is known. The blocks that they
            touch are read last, each alone. Not looked at when resuming.
        progress: called after each read with the number of blocks that are settled, read or lost
            for good, and of all blocks.

    Raises:
        Unfinished: the device is gone, fails in another way than by a bad block, or is so slow that
            the budget was spent before every block was tried.
        ValueError: ``resume`` is of another range.
    """
    if resume is None:
        resume = _nothing_read(sector, count, block_sectors, suspects)
    elif (resume.sector, len(resume.data), resume.block_sectors) != (
        sector,
        count * SECTOR_BYTES,
        block_sectors,
    ):
        raise ValueError(f"what was read from sector {resume.sector} on is of another range")
    reading = _Reading(device, resume, patience or Patience(), clock, pause, progress)
    try:
        reading.first_pass()
        reading.retry()
    finally:
        reading.stop()
    return resume


def begin(
    sector: int,
    count: int,
    block_sectors: int,
    lost: Iterable[tuple[int, int]],
    patience: Patience,
) -> Salvage:
    """A salvage to resume, in which some blocks are lost already and have had all their retries.

    Args:
        sector: first sector, a multiple of ``block_sectors``.
        count: sectors, a multiple of ``block_sectors``.
        block_sectors: sectors in a logical block (1 or 8).
        lost: ranges (first sector, count) inside it, of whole blocks.
        patience: what the salvage will be resumed with.
    """
    result = _nothing_read(sector, count, block_sectors, ())
    for start, length in lost:
        first = (start - sector) // block_sectors
        for block in range(first, first + length // block_sectors):
            result.outcomes[block] = Outcome.LOST
            result.failures[block] = patience.retries + 1
    return result


def _nothing_read(
    sector: int, count: int, block_sectors: int, suspects: Iterable[tuple[int, int]]
) -> Salvage:
    blocks = count // block_sectors
    alone = {
        block
        for start, length in suspects
        for block in range(
            max(0, (start - sector) // block_sectors),
            min(blocks, (start + length - sector - 1) // block_sectors + 1),
        )
    }
    return Salvage(
        sector=sector,
        block_sectors=block_sectors,
        data=bytearray(count * SECTOR_BYTES),
        outcomes=[Outcome.NOT_TRIED] * blocks,
        pending=spans_around(blocks, alone, largest=max(1, blocks)),
    )


class _Reading:
    """One call of `salvage`: carries its result on, within its time."""

    def __init__(
        self,
        device: Readable,
        result: Salvage,
        limits: Patience,
        clock: Callable[[], float],
        pause: Callable[[float], None],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._device = device
        self._result = result
        self._limits = limits
        self._clock = clock
        self._pause = pause
        self._progress = progress
        self._begun = clock()
        self._slowest = 0.0
        # The caller may have taken blocks from elsewhere since.
        self._ladder = Ladder(
            keep_only(result.pending, lambda b: result.outcomes[b] is Outcome.NOT_TRIED)
        )
        self._unsettled = sum(map(self._is_unsettled, range(len(result.outcomes))))

    def first_pass(self) -> None:
        """Try every block that was not tried."""
        while True:
            due = self._ladder.next_read()
            if due is None:
                return
            if self._left() <= 0:
                raise self._unfinished(
                    f"sectors {self._result.sector}+{self._sectors()} could not be read within "
                    f"{self._limits.budget:g} seconds",
                    "nothing was changed; allow more time for the salvage",
                )
            before = self._clock()
            if self._read(*due, Outcome.FIRST_READ):
                self._ladder.succeeded()
            else:
                self._ladder.failed(slow=self._clock() - before >= self._limits.slow)
            self._tell()

    def retry(self) -> None:
        """Read lost blocks again, turn by turn, until they have had their retries."""
        while True:
            turn, waiting = self._next_turn()
            if not waiting or self._left_for_retries() <= 0:
                return
            # Far beyond any budget, and a float.
            backoff = self._limits.backoff * 2.0 ** min(turn, 64)
            self._pause(min(backoff, self._left_for_retries()))
            for index in reversed(waiting):
                if self._left_for_retries() <= 0:
                    return
                self._read(index, 1, Outcome.RETRY)
                self._tell()

    def stop(self) -> None:
        """Note in the result how far this call came."""
        self._result.pending = self._ladder.left
        self._result.seconds += self._clock() - self._begun

    def _next_turn(self) -> tuple[int, list[int]]:
        """The number of retries that the least retried blocks have had, and these blocks."""
        failures = self._result.failures
        lost = [i for i, outcome in enumerate(self._result.outcomes) if outcome is Outcome.LOST]
        least = min((failures[index] for index in lost), default=0)
        if least > self._limits.retries:
            return 0, []
        return least - 1, [index for index in lost if failures[index] == least]

    def _read(self, first: int, blocks: int, outcome: Outcome) -> bool:
        result = self._result
        size = result.block_sectors
        result.reads += 1
        before = self._clock()
        try:
            data = self._device.read(result.sector + first * size, blocks * size)
        except OSError as error:
            self._slowest = max(self._slowest, self._clock() - before)
            if error.errno not in MEDIUM_ERRORS:
                raise self._unfinished(
                    f"fails with {error.strerror}, which is not a bad block",
                    "check that it is attached and powered",
                ) from error
            if blocks == 1:
                self._fail(first, error.errno or errno.EIO)
            return False
        if len(data) != blocks * size * SECTOR_BYTES:
            raise self._unfinished(
                f"gave {len(data)} bytes instead of {blocks * size * SECTOR_BYTES}",
                "check that it is attached and has its size",
            )
        result.keep(first, data, outcome)
        self._unsettled -= blocks
        return True

    def _fail(self, index: int, number: int) -> None:
        result = self._result
        result.errors[index] = number
        result.failures[index] = result.failures.get(index, 0) + 1
        result.outcomes[index] = Outcome.LOST
        self._unsettled -= not self._is_unsettled(index)

    def _is_unsettled(self, index: int) -> bool:
        outcome = self._result.outcomes[index]
        retried = self._result.failures.get(index, 0) > self._limits.retries
        return outcome is Outcome.NOT_TRIED or (outcome is Outcome.LOST and not retried)

    def _tell(self) -> None:
        if self._progress:
            blocks = len(self._result.outcomes)
            self._progress(blocks - self._unsettled, blocks)

    def _left(self) -> float:
        return self._limits.budget - (self._clock() - self._begun)

    def _left_for_retries(self) -> float:
        reserve = self._slowest * self._result.outcomes.count(Outcome.LOST)
        until = min(self._limits.budget, self._limits.retry_until - reserve)
        return until - (self._clock() - self._begun)

    def _sectors(self) -> int:
        return len(self._result.outcomes) * self._result.block_sectors

    def _unfinished(self, message: str, remedy: str) -> Unfinished:
        return Unfinished(message, self._result, self._device.name, remedy)
