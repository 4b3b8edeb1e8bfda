# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Turns failed requests into events: what is bad, what was only a passing fault, what is gone."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Callable

from . import events
from .errors import DmRemapError
from .events import Draft, intersect_ranges, split_draft, subtract_ranges
from .extents import merge_sectors
from .inventory import Guarded
from .journal import Observation
from .probing import MEDIUM_ERRORS, DeviceState, Probe, Readable, answers, probe
from .tracing import FLUSH, READ, WRITE

# A read that timed out may well have hit a bad sector; reading again tells.
_PROBE_ERRORS = (*MEDIUM_ERRORS, errno.ETIMEDOUT)


@dataclass(frozen=True)
class Patience:
    """Times in seconds.

    Args:
        probe: for one look at the failed range of one target.
        again: before a sector that is still bad is reported once more.
        settle: during which a range that was just probed, or a lost device, is not probed again.
    """

    probe: float = 10.0
    again: float = 300.0
    settle: float = 5.0


@dataclass
class _Memory:
    """What is known of one target: ranges with the time until which they are old news."""

    reported: dict[str, list[tuple[float, tuple[int, int]]]] = field(default_factory=dict)
    probed: list[tuple[float, tuple[int, int]]] = field(default_factory=list)
    conditions: dict[str, float] = field(default_factory=dict)
    lost_until: float = 0.0
    merged: int = 0


@dataclass(frozen=True)
class Question:
    """What a disk must be asked about one target.

    Args:
        target: the target.
        reads: ranges (start, count) in the target's sectors whose reads failed.
        beside: ranges whose reads failed together with a sector that is known to be bad.
        writes: the same for writes.
        others: what failed without telling of a sector, as (operation, errno).
        requests: number of failed requests in all.
        errno: error number of the first of them.
    """

    target: Guarded
    reads: Sequence[tuple[int, int]]
    beside: Sequence[tuple[int, int]]
    writes: Sequence[tuple[int, int]]
    others: Sequence[tuple[str, int]]
    requests: int
    errno: int


@dataclass(frozen=True)
class Answer:
    """What the disk showed: its state, whether it reads elsewhere, and the probe of the reads."""

    state: DeviceState
    alive: bool
    result: Probe


class Watcher:
    """Remembers what was said about each target, and says only what is new.

    Args:
        patience: the times.
        clock: seconds that only rise.
    """

    def __init__(self, patience: Patience, clock: Callable[[], float]) -> None:
        self._patience = patience
        self._clock = clock
        self._memories: dict[str, _Memory] = {}

    def remember(self, target: str, operation: str, sectors: Iterable[tuple[int, int]]) -> None:
        """Take note that bad sectors have been reported, for a start with an old journal."""
        until = self._clock() + self._patience.again
        known = self._memory(target).reported.setdefault(operation, [])
        known.extend((until, item) for item in sectors)

    def question(self, target: Guarded, observations: Iterable[Observation]) -> Question | None:
        """Return what to ask the disk, or None if the failures tell nothing new of this target."""
        memory = self._memory(target.name)
        now = self._clock()
        known = _current(memory.reported.get(READ, []), now)
        reads: list[tuple[int, int]] = []
        beside: list[tuple[int, int]] = []
        writes: list[tuple[int, int]] = []
        others: list[tuple[str, int]] = []
        requests, first_errno = 0, 0
        for item in observations:
            error = item.error
            if error.request != target.request_based:
                continue
            where = _on_target(target, error.sector, error.count)
            if error.operation != FLUSH and not where:
                continue
            requests += item.times
            first_errno = first_errno or error.errno
            if error.operation == READ and error.errno in _PROBE_ERRORS:
                familiar = subtract_ranges(where, known) != where
                (beside if familiar else reads).extend(where)
            elif error.operation == WRITE and error.errno in MEDIUM_ERRORS:
                writes += where
            else:
                others.append((error.operation, error.errno))
        probed = _current(memory.probed, now)
        reads = subtract_ranges(reads, [*known, *probed])
        beside = subtract_ranges(beside, [*known, *probed, *reads])
        writes = subtract_ranges(writes, _current(memory.reported.get(WRITE, []), now))
        # A device that is gone fails our own reads too; asking again at once would never end.
        if now < memory.lost_until or not (reads or beside or writes or others):
            memory.merged += requests
            return None
        return Question(target, reads, beside, writes, others, requests, first_errno)

    def drafts(self, question: Question, answer: Answer, device: str) -> list[Draft]:
        """Return the new events.

        Args:
            question: what was asked.
            answer: what the disk showed.
            device: the disk's kernel name.
        """
        target = question.target.name
        memory = self._memory(target)
        if answer.state is not DeviceState.LIVE or not answer.alive:
            return self._lost(question, answer, device)
        memory.conditions.pop(events.DEVICE_LOST, None)
        asked = merge_sectors([*question.reads, *question.beside])
        probed = subtract_ranges(asked, answer.result.unread)
        suspect_reads = subtract_ranges(question.reads, answer.result.unread)
        found: list[Draft] = []
        bad = _within(answer.result.bad, question.target)
        if bad:
            found.append(
                Draft(
                    events.SECTOR_ERROR,
                    f"{target}: {_sectors(bad)} of {device} cannot be read",
                    target,
                    device,
                    READ,
                    tuple(bad),
                    tuple(probed),
                    answer.result.errno or question.errno,
                )
            )
            self.remember(target, READ, bad)
        elif suspect_reads:
            found.append(
                Draft(
                    events.TRANSIENT_ERROR,
                    f"{target}: a read of {device} failed, but all of its sectors can be read now",
                    target,
                    device,
                    READ,
                    (),
                    tuple(suspect_reads),
                    question.errno,
                )
            )
        if question.writes:
            found.append(
                Draft(
                    events.SECTOR_ERROR,
                    f"{target}: {_sectors(question.writes)} of {device} could not be written",
                    target,
                    device,
                    WRITE,
                    tuple(question.writes),
                    tuple(question.writes),
                    question.errno,
                )
            )
            self.remember(target, WRITE, question.writes)
        found += self._others(question, device)
        until = self._clock() + self._patience.settle
        memory.probed = [item for item in memory.probed if item[0] > self._clock()] + [
            (until, item) for item in probed
        ]
        return self._counted(found, question)

    def slow(self, target: Guarded, device: str) -> list[Draft]:
        """Return the event for a disk that did not answer in time, once for a while."""
        message = f"{target.name}: {device} did not answer in {self._patience.probe:g} seconds"
        if not self._news(target.name, events.DEVICE_SLOW):
            return []
        return [
            Draft(events.DEVICE_SLOW, message, target.name, device, generation=target.generation)
        ]

    def _lost(self, question: Question, answer: Answer, device: str) -> list[Draft]:
        target = question.target.name
        self._memory(target).lost_until = self._clock() + self._patience.settle
        if not self._news(target, events.DEVICE_LOST):
            self._memory(target).merged += question.requests
            return []
        reason = {
            DeviceState.GONE: "is gone",
            DeviceState.OFFLINE: "is offline",
            DeviceState.LIVE: "answers no read at all",
        }[answer.state]
        draft = Draft(
            events.DEVICE_LOST,
            f"{target}: its main {device} {reason}, so its errors say nothing about sectors",
            target,
            device,
            suspect=tuple(merge_sectors([*question.reads, *question.writes])),
            errno=question.errno,
        )
        return self._counted([draft], question)

    def _others(self, question: Question, device: str) -> list[Draft]:
        found = []
        target = question.target.name
        for operation, number in dict.fromkeys(question.others):
            if self._news(target, f"{events.DEVICE_ERROR}/{operation}/{number}"):
                what = os.strerror(number)
                found.append(
                    Draft(
                        events.DEVICE_ERROR,
                        f"{target}: a {operation} of {device} failed: {what}",
                        target,
                        device,
                        operation,
                        errno=number,
                    )
                )
        return found

    def _counted(self, found: Sequence[Draft], question: Question) -> list[Draft]:
        memory = self._memory(question.target.name)
        if not found:
            memory.merged += question.requests
            return []
        whole: list[Draft] = []
        for index, draft in enumerate(found):
            counted = replace(
                draft,
                generation=question.target.generation,
                requests=question.requests if index == 0 else 0,
                merged=memory.merged if index == 0 else 0,
            )
            whole += split_draft(counted)
        memory.merged = 0
        return whole

    def _news(self, target: str, condition: str) -> bool:
        conditions = self._memory(target).conditions
        now = self._clock()
        if conditions.get(condition, now - 1) > now:
            return False
        conditions[condition] = now + self._patience.again
        return True

    def _memory(self, target: str) -> _Memory:
        return self._memories.setdefault(target, _Memory())


def ask(
    question: Question,
    state: Callable[[], DeviceState],
    open_main: Callable[[], tuple[Readable, int]],
    clock: Callable[[], float],
    seconds: float,
) -> Answer:
    """Ask the disk. Blocks, for about `seconds` or as long as the kernel lets one read take.

    Args:
        question: what to ask.
        state: tells whether the main can be asked.
        open_main: opens the main past the page cache; also returns its physical block in sectors.
        clock: seconds that only rise.
        seconds: the time budget.

    Raises:
        OSError: the main is there but cannot be opened.
        DmRemapError: likewise.
    """
    nothing = Probe((), (), False, 0)
    found = state()
    if found is not DeviceState.LIVE:
        return Answer(found, False, nothing)
    try:
        main, unit = open_main()
    except (OSError, DmRemapError):
        found = state()
        if found is DeviceState.LIVE:
            raise
        return Answer(found, False, nothing)
    end = clock() + seconds
    try:
        asked = [*question.reads, *question.beside]
        result = probe(main, asked, unit, lambda: clock() < end)
        avoid = [*asked, *question.writes]
        needs_control = bool(avoid) and not result.readable
        alive = not needs_control or answers(main, avoid, unit)
    finally:
        close = getattr(main, "close", None)
        if close:
            close()
    # The device may have vanished while it was read, which made the reads fail.
    return Answer(state(), alive, result)


def _on_target(target: Guarded, sector: int, count: int) -> list[tuple[int, int]]:
    """The part of a disk's sectors that the target still uses there, in the target's sectors."""
    inside = intersect_ranges([(sector - target.start, count)], (0, target.sectors))
    return [piece for item in inside for piece in intersect_ranges(target.live, item)]


def _within(ranges: Iterable[tuple[int, int]], target: Guarded) -> list[tuple[int, int]]:
    """Whole physical blocks may reach beyond the part that the target still uses."""
    return [piece for item in ranges for piece in intersect_ranges(target.live, item)]


def _current(items: Iterable[tuple[float, tuple[int, int]]], now: float) -> list[tuple[int, int]]:
    return [item for until, item in items if until > now]


def _sectors(ranges: Sequence[tuple[int, int]]) -> str:
    total = sum(count for _unused, count in ranges)
    text = f"{total} sector{'' if total == 1 else 's'} from {ranges[0][0]} on"
    return text if len(ranges) == 1 else f"{text} in {len(ranges)} places"
