# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The reflex: heals failed I/O while the application waits for it.

It runs in a process of its own with its memory locked, and between an error and its cure it touches
nothing but device-mapper, the main and the spares: any file may be on the target that waits.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import logging
import os
import select
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from . import extents, replacement
from .engine import Disks, Engine, Moved
from .errors import DmRemapError
from .events import intersect_ranges
from .planner import ActiveTarget, plan_upkeep
from .probing import MEDIUM_ERRORS, DeviceState, device_state, whole_disk
from .report import sector_ranges
from .salvage import Outcome, Patience, Salvage
from .tracing import FLUSH, WRITE, BlockError, TraceInstance, parse_line

INSTANCE = "dm_remap_reflex"

# A path that was reinstated too early fails again without a new error (see `Reflex.look_after`).
_RESTLESS_SECONDS = 0.02
_TICK_SECONDS = 1.0
_REFRESH_SECONDS = 10.0
# For so long a target is looked at often after something failed on it.
_ALERT_SECONDS = 2.0
# So often in a row a path may fail without an error that explains it before its I/O fails.
_STRIKES = 50
# A chunk that could be read after it failed is moved if it fails again within this time.
_AGAIN_SECONDS = 300.0
_REPORTS_KEPT = 10_000

# What an error that may be a bad sector becomes; a read that timed out may have hit one too.
_SECTOR_ERRORS = MEDIUM_ERRORS | {errno.ETIMEDOUT}

# Everything but the chunk goes on, and the drive itself has tried before: quick retries suffice.
PATIENCE = Patience(retries=4, backoff=0.005, budget=60.0)

log = logging.getLogger("dm-remap-reflex")


@dataclass
class Ward:
    """A target that the reflex looks after, as it was last seen.

    Args:
        target: the target; its errors are held.
        disks: its open devices.
        closing: closes them.
        disk: device number of the disk that main is on.
        start: main's first sector there.
        errors: failed requests that were not dealt with.
        alert_until: until when it is looked at often.
        strikes: how often in a row its path failed without an error that explains it.
        suspects: chunks that failed and could be read, with the time until which that counts.
        new_disk: device number of the disk that is to replace main's; empty without one.
        new_start: the new main's first sector there.
    """

    target: ActiveTarget
    disks: Disks
    closing: contextlib.ExitStack
    disk: str
    start: int
    errors: list[BlockError] = field(default_factory=list)
    alert_until: float = 0.0
    strikes: int = 0
    suspects: dict[int, float] = field(default_factory=dict)
    new_disk: str = ""
    new_start: int = 0


@dataclass(frozen=True)
class Injury:
    """Where a target was hit.

    Args:
        reads: chunks on main, a read of which failed.
        writes: chunks on main, a write to which failed.
        flushes: whether a flush of main failed.
        others: error numbers that tell of no sector.
    """

    reads: frozenset[int]
    writes: frozenset[int]
    flushes: bool
    others: frozenset[int]


def on_one_main(ward: Ward, errors: Iterable[BlockError]) -> list[BlockError]:
    """The failed requests as if all had been on main's disk (pure).

    While main is being replaced, each of the two disks serves one side of the border. What is on
    the other side has moved since it failed, and is left out.
    """
    metadata = ward.target.metadata
    border, total = replacement.copied_sectors(metadata), metadata.config["main"]["sectors"]
    found = []
    for error in errors:
        new = bool(ward.new_disk) and error.devno == ward.new_disk
        start = ward.new_start if new else ward.start
        side = (0, border) if new else (border, total - border)
        if error.operation == FLUSH or error.errno not in _SECTOR_ERRORS:
            found.append(error)
            continue
        for first, count in intersect_ranges([(error.sector - start, error.count)], side):
            found.append(replace(error, sector=first + ward.start, count=count))
    return found


def injury_of(target: ActiveTarget, start: int, errors: Iterable[BlockError]) -> Injury:
    """Translate failed requests of a disk into chunks that are still on main (pure).

    Args:
        target: the target.
        start: first sector of its main on the disk.
        errors: the requests.
    """
    metadata = target.metadata
    chunk_sectors, total = metadata.config["chunk_sectors"], metadata.config["main"]["sectors"]
    hit: dict[bool, set[int]] = {True: set(), False: set()}
    others = set()
    flushes = False
    for error in errors:
        if error.operation == FLUSH:
            flushes = True
        elif error.errno not in _SECTOR_ERRORS:
            others.add(error.errno)
        else:
            for first, count in intersect_ranges([(error.sector - start, error.count)], (0, total)):
                touched = range(first // chunk_sectors, (first + count - 1) // chunk_sectors + 1)
                hit[error.operation == WRITE].update(touched)
    on_main = {
        write: frozenset(c for c in chunks if extents.find(metadata.extents, c) is None)
        for write, chunks in hit.items()
    }
    return Injury(on_main[False], on_main[True], flushes, frozenset(others))


class Reports:
    """Reports for whoever listens, the oldest dropped where nobody does.

    Args:
        keep: so many at most.
    """

    def __init__(self, keep: int = _REPORTS_KEPT) -> None:
        self._kept: collections.deque[dict[str, Any]] = collections.deque(maxlen=keep)
        self.listener: Callable[[], None] = lambda: None

    def add(self, report: dict[str, Any]) -> None:
        """Keep a report and tell the listener that there is one."""
        self._kept.append(report)
        self.listener()

    def first(self) -> dict[str, Any] | None:
        """Return the oldest report, or None."""
        return self._kept[0] if self._kept else None

    def forget(self, report: dict[str, Any]) -> None:
        """Drop a report that somebody has taken over, if it is still there."""
        if self._kept and self._kept[0] is report:
            self._kept.popleft()


class Reflex:
    """Heals targets whose errors are held.

    Args:
        engine: carries out what is to be done; without a guard.
        trace: a tracefs instance of its own.
        tell: gets a report of what was done, plain data.
        state_of: whether a device can be asked.
        disk_of: the disk of a device, and its first sector there.
        patience: how hard to try to read failing blocks.
        clock: seconds that only rise.
    """

    def __init__(
        self,
        engine: Engine,
        trace: TraceInstance,
        tell: Callable[[dict[str, Any]], None],
        state_of: Callable[[str], DeviceState] = device_state,
        disk_of: Callable[[str], tuple[str, int]] = whole_disk,
        patience: Patience = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._trace = trace
        self._tell = tell
        self._state_of = state_of
        self._disk_of = disk_of
        self._patience = patience
        self._clock = clock
        self._wards: dict[str, Ward] = {}
        self._unknown: list[BlockError] = []
        self._refresh_at = 0.0
        self._tick_at = 0.0

    def run(self, stop: int, ready: Callable[[], None] = lambda: None) -> None:
        """Heal until the file descriptor ``stop`` can be read.

        Args:
            stop: ends the reflex.
            ready: called when errors are seen.

        Raises:
            MissingKernelFeature: errors cannot be seen.
            Refused: another process does this.
        """
        with self._engine.healing():
            pipe = self._trace.open()
            try:
                self.refresh()
                ready()
                poll = select.poll()
                poll.register(pipe, select.POLLIN)
                poll.register(stop, select.POLLIN)
                while True:
                    found = poll.poll(1000 * self._pause())
                    if any(descriptor == stop for descriptor, _event in found):
                        return
                    self.turn()
            finally:
                self._trace.close()
                for name in list(self._wards):
                    self._dismiss(name)

    def turn(self) -> None:
        """Take in what failed, heal it, and see that no target stays without its path."""
        self.take(self._seen())
        for name in [name for name, ward in self._wards.items() if ward.errors]:
            self._attend(name)
        self.look_after()

    def _pause(self) -> float:
        now = self._clock()
        if self._unknown or any(w.errors or w.alert_until > now for w in self._wards.values()):
            return _RESTLESS_SECONDS
        return _TICK_SECONDS

    # Seeing

    def _seen(self) -> list[BlockError]:
        found: list[BlockError] = []
        while True:
            lines = self._trace.read()
            if not lines:
                return found
            # A readahead that fails is held like any read.
            found += [e for e in map(parse_line, lines) if isinstance(e, BlockError)]

    def take(self, errors: Sequence[BlockError]) -> None:
        """Note failed requests with the targets that they concern."""
        errors = [*self._unknown, *errors]
        self._unknown = []
        if errors and not all(self._assign(error) for error in errors):
            # A target may be newer than the last look.
            if self._clock() >= self._refresh_at - _REFRESH_SECONDS + _TICK_SECONDS:
                self.refresh()
            for error in errors:
                self._assign(error)

    def _assign(self, error: BlockError) -> bool:
        known = False
        for ward in self._wards.values():
            if error.devno not in (ward.disk, ward.new_disk):
                continue
            known = True
            if error not in ward.errors:
                ward.errors.append(error)
                ward.alert_until = self._clock() + _ALERT_SECONDS
        return known

    # Targets

    def refresh(self) -> None:
        """Look which targets hold their errors, and end what an interruption left there."""
        self._refresh_at = self._clock() + _REFRESH_SECONDS
        names = self._engine.target_names()
        for name in [name for name in self._wards if name not in names]:
            self._dismiss(name)
        for name in names:
            if name not in self._wards:
                with self._engine.try_locked(name) as locked:
                    if locked:
                        self._admit(name)

    def _admit(self, name: str) -> Ward | None:
        """Observe a target anew and open its devices, if its errors are held."""
        errors = self._wards[name].errors if name in self._wards else []
        suspects = self._wards[name].suspects if name in self._wards else {}
        self._dismiss(name)
        try:
            target = self._engine.require(name)
            if target.path is None or target.main is None:
                return None
            upkeep = plan_upkeep(target)
            if upkeep.changes:
                self._engine.apply(upkeep)
                target = self._engine.require(name)
            closing = contextlib.ExitStack()
            disks = closing.enter_context(self._engine.opened(target))
        except (DmRemapError, OSError) as error:
            log.error("%s", error)
            return None
        if target.path is None or target.main is None:
            return None
        disk, start = self._disk_of(target.main.devno)
        ward = Ward(target, disks, closing, disk, start, errors, suspects=suspects)
        if target.replacement:
            ward.new_disk, ward.new_start = self._disk_of(target.replacement.devno)
        self._wards[name] = ward
        if not (target.path.active and target.path.queueing):
            self._engine.release(target)
        return ward

    def _dismiss(self, name: str) -> None:
        ward = self._wards.pop(name, None)
        if ward:
            ward.closing.close()

    # Healing

    def _attend(self, name: str) -> None:
        """Heal a target, unless somebody else works on it: then the next turn does."""
        with self._engine.try_locked(name) as locked:
            if not locked:
                return
            ward: Ward | None = self._wards[name]
            if ward and not self._engine.is_current(ward.target, ward.disks):
                ward = self._admit(name)
            if ward is None:
                return
            errors, ward.errors = ward.errors, []
            begun = self._clock()
            try:
                self._heal(ward, errors)
            except (DmRemapError, OSError) as error:
                # What cannot be healed must not keep the rest waiting.
                log.error("%s", error)
                self._give_up(ward, errors, str(error))
                self._admit(name)
            ward.alert_until = self._clock() + _ALERT_SECONDS
            log.info("%s: dealt with in %.3f s", name, self._clock() - begun)

    def _heal(self, ward: Ward, errors: Sequence[BlockError]) -> None:
        target = ward.target
        if target.main is None:
            raise AssertionError("a target that is looked after has a main")
        errors = on_one_main(ward, errors)
        injury = injury_of(target, ward.start, errors)
        chunks = sorted(injury.reads | injury.writes)
        if injury.flushes:
            # The disk may have dropped what it had acknowledged, and a second flush would not tell.
            self._engine.fail_held(target)
            self._report(ward, "flush_failed", errors)
        mains = [info for info in (target.main, target.replacement) if info]
        if any(self._state_of(info.devno) is not DeviceState.LIVE for info in mains):
            # It may come back, and else the kernel's fail-safe ends the wait.
            self._report(ward, "device_lost", errors)
            return
        if not chunks:
            self._engine.release(target)
            return
        self._tell({"type": "healing", "target": target.name})
        now = self._clock()
        ward.suspects = {c: until for c, until in ward.suspects.items() if until > now}

        def wanted(chunk: int, found: Salvage) -> bool:
            if chunk in injury.writes or chunk in ward.suspects:
                return True
            if any(outcome is not Outcome.FIRST_READ for outcome in found.outcomes):
                return True
            # Other chunks of the request may have been innocent, and this one too.
            ward.suspects[chunk] = now + _AGAIN_SECONDS
            return False

        moved = self._engine.move(target, ward.disks, chunks, self._patience, None, wanted)
        if moved.chunks:
            choice = replace(target.choice, metadata=moved.metadata)
            ward.target = replace(target, choice=choice, table=())
            self._engine.backup(moved.metadata)
        self._report(ward, "healed" if moved.chunks else "passed", errors, moved)

    def _give_up(self, ward: Ward, errors: Sequence[BlockError], reason: str) -> None:
        with contextlib.suppress(DmRemapError):
            self._engine.fail_held(ward.target)
        self._report(ward, "failed", errors, reason=reason)

    def _report(
        self,
        ward: Ward,
        kind: str,
        errors: Sequence[BlockError],
        moved: Moved | None = None,
        reason: str = "",
    ) -> None:
        total = ward.target.metadata.config["main"]["sectors"]
        hit = [
            piece
            for error in errors
            for piece in intersect_ranges([(error.sector - ward.start, error.count)], (0, total))
        ]
        self._tell(
            {
                "type": kind,
                "target": ward.target.name,
                "device": ward.target.main.path if ward.target.main else "",
                "generation": ward.target.metadata.generation,
                "operation": errors[0].operation if errors else "",
                "errno": errors[0].errno if errors else 0,
                "requests": len(errors),
                "hit": sector_ranges(hit),
                "moved": sector_ranges([(c.start, c.count) for c in moved.chunks] if moved else []),
                "lost": sector_ranges(moved.lost if moved else []),
                "pause_seconds": round(moved.pause_seconds, 4) if moved else 0.0,
                "reason": reason,
            }
        )

    # Paths

    def look_after(self) -> None:
        """Reinstate paths that failed again after they were reinstated, and find new targets.

        A request that was on its way when its path was reinstated can fail it once more, and the
        kernel's fail-safe takes the queue away.
        """
        now = self._clock()
        due = now >= self._tick_at
        if due:
            self._tick_at = now + _TICK_SECONDS
        if now >= self._refresh_at:
            self.refresh()
        for name, ward in list(self._wards.items()):
            if ward.errors or not (due or ward.alert_until > now):
                continue
            try:
                self._look_at_path(name, ward)
            except (DmRemapError, OSError, ValueError) as error:
                log.error("%s", error)
                self._dismiss(name)
                self._refresh_at = min(self._refresh_at, now + _TICK_SECONDS)

    def _look_at_path(self, name: str, ward: Ward) -> None:
        path = self._engine.path_of(name)
        if path.active and path.queueing:
            ward.strikes = 0
            return
        ward.alert_until = self._clock() + _ALERT_SECONDS
        with self._engine.try_locked(name) as locked:
            if not locked:
                return
            ward.strikes += 1
            if ward.strikes < _STRIKES:
                self._engine.release(ward.target)
                return
            # It is no bad sector of main, or the trace would have told.
            ward.strikes = 0
            self._give_up(ward, [], "its path fails again and again, and main has no error")


@contextlib.contextmanager
def wake_up() -> Iterator[tuple[int, Callable[[], None]]]:
    """A file descriptor that can be read once the function has been called."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def wake() -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(writer, b".")

    try:
        yield reader, wake
    finally:
        os.close(reader)
        os.close(writer)
