# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Turns failed requests into events: what is bad, what was only a passing fault, what is gone."""

from __future__ import annotations

import collections
import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Callable

from . import events
from .errors import DmRemapError
from .events import Draft, counted, intersect_ranges, split_draft, subtract_ranges
from .extents import merge_sectors
from .inventory import Guarded
from .journal import Observation
from .probing import MEDIUM_ERRORS, DeviceState, Probe, Readable, answers, probe
from .tracing import FLUSH, READ, WRITE, BlockError

# A read that timed out may well have hit a bad sector; reading again tells.
PROBE_ERRORS = (*MEDIUM_ERRORS, errno.ETIMEDOUT)


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


class _OldNews:
    """Ranges that were spoken of, each for some time."""

    def __init__(self) -> None:
        # In the order of their ends, because the clock only rises.
        self._items: collections.deque[tuple[float, Sequence[tuple[int, int]]]]
        self._items = collections.deque()

    def add(self, ranges: Iterable[tuple[int, int]], until: float, now: float) -> None:
        """Keep ranges until a time."""
        self._forget(now)
        self._items.append((until, tuple(ranges)))

    def current(self, now: float) -> Sequence[tuple[int, int]]:
        """Return what is still old news, sorted and merged."""
        self._forget(now)
        return merge_sectors(item for _unused, ranges in self._items for item in ranges)

    def _forget(self, now: float) -> None:
        while self._items and self._items[0][0] <= now:
            self._items.popleft()


@dataclass
class _Memory:
    """What is known of one target."""

    reported: dict[str, _OldNews] = field(default_factory=lambda: collections.defaultdict(_OldNews))
    probed: _OldNews = field(default_factory=_OldNews)
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
        unplaced: requests whose places were not kept, their number by (operation, errno).
        requests: number of failed requests in all.
        errnos: error number of the first of each operation.
    """

    target: Guarded
    reads: Sequence[tuple[int, int]] = ()
    beside: Sequence[tuple[int, int]] = ()
    writes: Sequence[tuple[int, int]] = ()
    others: Sequence[tuple[str, int]] = ()
    unplaced: Mapping[tuple[str, int], int] = field(default_factory=dict)
    requests: int = 0
    errnos: Mapping[str, int] = field(default_factory=dict)

    @property
    def news(self) -> bool:
        """Whether there is anything to ask or to tell."""
        return bool(self.reads or self.beside or self.writes or self.others or self.unplaced)

    @property
    def errno(self) -> int:
        """Error number of the first request."""
        return next(iter(self.errnos.values()), 0)


@dataclass(frozen=True)
class Finding:
    """Events of one target, and what is to be remembered once they are in the journal.

    Args:
        target: the target's name.
        drafts: the events.
        reported: ranges that the events tell, by operation.
        probed: ranges that were read just now.
        conditions: what is told of the device itself.
        alive: the main answered.
        lost: it did not.
        merged: number of failed requests that told nothing new.
        told: number of earlier ones that the events tell.
    """

    target: str
    drafts: Sequence[Draft] = ()
    reported: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    probed: Sequence[tuple[int, int]] = ()
    conditions: Sequence[str] = ()
    alive: bool = False
    lost: bool = False
    merged: int = 0
    told: int = 0


@dataclass(frozen=True)
class Answer:
    """What the disk showed: its state, whether it reads elsewhere, and the probe of the reads."""

    state: DeviceState
    alive: bool
    result: Probe


class Watcher:
    """Remembers what was said about each target, and says only what is new.

    Only `confirm` and `remember` change what it knows: what did not reach the journal was not said.

    Args:
        patience: the times.
        clock: seconds that only rise.
    """

    def __init__(self, patience: Patience, clock: Callable[[], float]) -> None:
        self._patience = patience
        self._clock = clock
        self._memories: dict[str, _Memory] = collections.defaultdict(_Memory)

    def remember(self, target: str, operation: str, sectors: Iterable[tuple[int, int]]) -> None:
        """Take note that bad sectors have been reported, for a start with an old journal."""
        now = self._clock()
        known = self._memories[target].reported[operation]
        known.add(sectors, now + self._patience.again, now)

    def confirm(self, finding: Finding) -> None:
        """Take note that the events of a finding are in the journal."""
        memory = self._memories[finding.target]
        now = self._clock()
        for operation, sectors in finding.reported.items():
            if sectors:
                self.remember(finding.target, operation, sectors)
        if finding.probed:
            memory.probed.add(finding.probed, now + self._patience.settle, now)
        if finding.alive:
            memory.conditions.pop(events.DEVICE_LOST, None)
        for condition in finding.conditions:
            memory.conditions[condition] = now + self._patience.again
        if finding.lost:
            memory.lost_until = now + self._patience.settle
        memory.merged += finding.merged - finding.told

    def question(self, target: Guarded, observations: Iterable[Observation]) -> Question:
        """Return what to ask the disk; it has no news if the failures tell nothing new."""
        memory = self._memories[target.name]
        now = self._clock()
        known = memory.reported[READ].current(now)
        reads: list[tuple[int, int]] = []
        beside: list[tuple[int, int]] = []
        writes: list[tuple[int, int]] = []
        others: list[tuple[str, int]] = []
        unplaced: dict[tuple[str, int], int] = {}
        errnos: dict[str, int] = {}
        requests = 0
        for item in observations:
            error = item.error
            if not concerns(target, error):
                continue
            where = _on_target(target, error.sector, error.count)
            kind = (error.operation, error.errno)
            requests += item.times
            errnos.setdefault(*kind)
            if error.operation != FLUSH and not error.count:
                unplaced[kind] = unplaced.get(kind, 0) + item.times
            elif error.operation == READ and error.errno in PROBE_ERRORS:
                familiar = any(intersect_ranges(known, piece) for piece in where)
                (beside if familiar else reads).extend(where)
            elif error.operation == WRITE and error.errno in MEDIUM_ERRORS:
                writes += where
            else:
                others.append(kind)
        # A device that is gone fails our own reads too; asking again at once would never end.
        if now < memory.lost_until:
            return Question(target, requests=requests)
        probed = memory.probed.current(now)
        reads = subtract_ranges(reads, [*known, *probed])
        beside = subtract_ranges(beside, [*known, *probed, *reads])
        writes = subtract_ranges(writes, memory.reported[WRITE].current(now))
        return Question(target, reads, beside, writes, others, unplaced, requests, errnos)

    def finding(self, question: Question, answer: Answer, device: str) -> Finding:
        """Return the new events.

        Args:
            question: what was asked.
            answer: what the disk showed.
            device: the disk's kernel name.
        """
        if answer.state is not DeviceState.LIVE or not answer.alive:
            return self._lost(question, answer, device)
        target = question.target.name
        asked = merge_sectors([*question.reads, *question.beside])
        probed = subtract_ranges(asked, answer.result.unread)
        suspect_reads = subtract_ranges(question.reads, answer.result.unread)
        found: list[Draft] = []
        bad = _within(answer.result.bad, question.target)
        if bad:
            found.append(
                Draft(
                    events.SECTOR_ERROR,
                    f"{target}: {_sectors(bad, device)} cannot be read",
                    target,
                    device,
                    READ,
                    tuple(bad),
                    tuple(probed),
                    answer.result.errno or question.errnos[READ],
                )
            )
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
                    question.errnos[READ],
                )
            )
        if question.writes:
            found.append(
                Draft(
                    events.SECTOR_ERROR,
                    f"{target}: {_sectors(question.writes, device)} could not be written",
                    target,
                    device,
                    WRITE,
                    tuple(question.writes),
                    tuple(question.writes),
                    question.errnos[WRITE],
                )
            )
        conditions = []
        for condition, draft in [*_others(question, device), *_unplaced(question, device)]:
            if self.is_news(target, condition):
                conditions.append(condition)
                found.append(draft)
        told = Finding(
            target,
            reported={READ: bad, WRITE: question.writes},
            probed=probed,
            conditions=conditions,
            alive=True,
        )
        return self._counted(told, found, question)

    def slow(self, target: Guarded, device: str) -> Finding:
        """Return the event for a disk that did not answer in time, once for a while."""
        message = f"{target.name}: {device} did not answer in {self._patience.probe:g} seconds"
        if not self.is_news(target.name, events.DEVICE_SLOW):
            return Finding(target.name)
        draft = Draft(
            events.DEVICE_SLOW, message, target.name, device, generation=target.kept.generation
        )
        return Finding(target.name, [draft], conditions=[events.DEVICE_SLOW])

    def _lost(self, question: Question, answer: Answer, device: str) -> Finding:
        target = question.target.name
        finding = Finding(target, conditions=[events.DEVICE_LOST], lost=True)
        if not self.is_news(target, events.DEVICE_LOST):
            return replace(finding, conditions=[], merged=question.requests)
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
        return self._counted(finding, [draft], question)

    def _counted(self, finding: Finding, found: Sequence[Draft], question: Question) -> Finding:
        """Put the numbers of requests into the first event."""
        if not found:
            return replace(finding, merged=question.requests)
        merged = self._memories[finding.target].merged
        whole: list[Draft] = []
        for index, draft in enumerate(found):
            numbered = replace(
                draft,
                generation=question.target.kept.generation,
                requests=question.requests if index == 0 else 0,
                merged=merged if index == 0 else 0,
            )
            whole += split_draft(numbered)
        return replace(finding, drafts=whole, told=merged)

    def is_news(self, target: str, condition: str) -> bool:
        """Return whether a condition of a target was not told for some time."""
        return self._memories[target].conditions.get(condition, 0.0) <= self._clock()


def concerns(target: Guarded, error: BlockError) -> bool:
    """Return whether a failed request may be about sectors that the target uses."""
    if error.request != target.request_based:
        return False
    return error.count == 0 or bool(_on_target(target, error.sector, error.count))


def _others(question: Question, device: str) -> list[tuple[str, Draft]]:
    """The events that tell of no sector, each with its condition."""
    target = question.target.name
    found = []
    for operation, number in dict.fromkeys(question.others):
        message = f"{target}: a {operation} of {device} failed: {os.strerror(number)}"
        draft = Draft(events.DEVICE_ERROR, message, target, device, operation, errno=number)
        found.append((f"{events.DEVICE_ERROR}/{operation}/{number}", draft))
    return found


def _unplaced(question: Question, device: str) -> list[tuple[str, Draft]]:
    """The events of requests whose places were not kept, each with its condition."""
    target = question.target.name
    found = []
    for (operation, number), times in question.unplaced.items():
        message = (
            f"{target}: {counted(times, f'more failed {operation}')} of {device} waited while it"
            f" could not be asked, too many to keep their sectors: {os.strerror(number)}"
        )
        draft = Draft(events.OVERRUN, message, target, device, operation, errno=number)
        found.append((f"{events.OVERRUN}/{operation}/{number}", draft))
    return found


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


def _sectors(ranges: Sequence[tuple[int, int]], device: str) -> str:
    total = counted(sum(count for _unused, count in ranges), "sector")
    text = f"{total} of {device} from {ranges[0][0]} on"
    return text if len(ranges) == 1 else f"{text} in {len(ranges)} places"
