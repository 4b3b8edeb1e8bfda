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
import logging
import math
import os
import select
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from typing import Any

from . import extents, replacement
from .checks import check_certain
from .devices import Disks
from .engine import Engine
from .errors import DmRemapError
from .events import intersect_ranges
from .hasty import HastyReader, in_line
from .moved import Moved
from .moving import Steps
from .plan_upkeep import plan_upkeep
from .probing import SECTOR_ERRORS, DeviceState, device_state, serves_requests, whole_disk
from .report import sector_ranges
from .salvage import Patience, Salvage, Unfinished
from .target import ActiveTarget, degradation
from .tracing import FLUSH, READ, WHOLESALE, BlockError, Lost, Parser, TraceInstance

# A path that was reinstated too early fails again without a new error (see `Reflex.look_after`).
_RESTLESS_SECONDS = 0.02
_TICK_SECONDS = 1.0
_REFRESH_SECONDS = 10.0
# For so long a target is looked at often after something failed on it.
_ALERT_SECONDS = 2.0
# So often a path may fail without an error that a remap cures before its I/O fails, and after so
# many seconds without it is forgotten.
_STRIKES = 50
_CALM_SECONDS = 60.0
# So many times it may be innocent I/O that was on its way when the path was reinstated.
_DOUBTS = 2
# A chunk that could be read after it failed is moved if it fails again within this time.
_AGAIN_SECONDS = 300.0
_REPORTS_KEPT = 10_000
# So long a main that took too long to read is not read while all I/O waits.
_SLOW_SECONDS = 3600.0
# Errors of disks without a known target, until it is sure that none is new.
_UNKNOWN_KEPT = 1000
# More bytes than there can be ended reads.
_WAKINGS = 4096

# Everything but the chunk goes on, and the drive itself has tried before: quick retries suffice.
# A physical block of 4 KiB that takes 7 s for each of its sectors is known in 63 s.
PATIENCE = Patience(retries=4, backoff=0.005, budget=100.0, retry_until=110.0)
# For the time in which everything waits.
HASTE_SECONDS = 0.25

log = logging.getLogger("dm-remap-reflex")

# The healing of a target, which stops for reads that take a while; see `moving.Steps`.
Healing = Generator[Callable[[], None], None, None]


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
        strikes: how often its path failed without an error that a remap cures.
        struck: when it did for the last time.
        suspects: chunks that failed and could be read, with the time until which that counts.
        hasty: reads main while all I/O waits.
        slow_until: until when that is not tried, because main is slow.
        requests: whether the disk's errors come as requests, else they come as bios.
        lost: a main of it did not answer when last asked.
        missed: the kernel dropped errors, and one may have been of this target.
        new_disk: device number of the disk that is to replace main's; empty without one.
        new_start: the new main's first sector there.
        new_requests: whether that disk's errors come as requests.
        below: device numbers that its map used or may use without having another main.
        let_go: its devices are closed, because somebody else works on the target.
    """

    target: ActiveTarget
    disks: Disks
    closing: contextlib.ExitStack
    disk: str
    start: int
    errors: list[BlockError] = field(default_factory=list)
    alert_until: float = 0.0
    strikes: int = 0
    struck: float = -math.inf
    suspects: dict[int, float] = field(default_factory=dict)
    hasty: HastyReader | None = None
    slow_until: float = 0.0
    requests: bool = True
    lost: bool = False
    missed: bool = False
    new_disk: str = ""
    new_start: int = 0
    new_requests: bool = True
    below: frozenset[str] = frozenset()
    let_go: bool = False

    def close(self) -> None:
        """Close its devices."""
        self.closing.close()
        if self.hasty:
            self.hasty.close()
            self.hasty = None
        self.let_go = True


@dataclass(frozen=True)
class Injury:
    """Where a target was hit.

    Args:
        reads: chunks on main, a read of which failed.
        writes: chunks on main, a write to which failed.
        others: error numbers that tell of no sector.
    """

    reads: frozenset[int]
    writes: frozenset[int]
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
        if error.operation == FLUSH or error.errno not in SECTOR_ERRORS:
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
        errors: the requests, reads and writes.
    """
    metadata = target.metadata
    chunk_sectors, total = metadata.config["chunk_sectors"], metadata.config["main"]["sectors"]
    hit: dict[bool, set[int]] = {True: set(), False: set()}
    others = set()
    for error in errors:
        if error.errno not in SECTOR_ERRORS:
            others.add(error.errno)
        else:
            for first, count in intersect_ranges([(error.sector - start, error.count)], (0, total)):
                touched = range(first // chunk_sectors, (first + count - 1) // chunk_sectors + 1)
                if error.operation in WHOLESALE:
                    # A map that leads to a spare does not offer it, so it ends as not supported,
                    # and whoever asked goes on with plain writes, of which the bad ones will tell.
                    touched = touched[: 0 if metadata.extents else 1]
                hit[error.operation != READ].update(touched)
    on_main = {
        write: frozenset(c for c in chunks if extents.find(metadata.extents, c) is None)
        for write, chunks in hit.items()
    }
    return Injury(on_main[False], on_main[True], frozenset(others))


class Reports:
    """Reports for whoever listens, the oldest dropped where nobody does.

    Args:
        keep: so many at most.
    """

    def __init__(self, keep: int = _REPORTS_KEPT) -> None:
        self._kept: collections.deque[dict[str, Any]] = collections.deque(maxlen=keep)
        self._begun = time.time_ns()
        self._count = 0
        self.listener: Callable[[], None] = lambda: None

    def add(self, report: dict[str, Any]) -> None:
        """Keep a report and tell the listener that there is one.

        It gets its time and an id: when the reports began, and its number among those of the ends
        of healings, or that of the last one if it is of a beginning.
        """
        self._count += report["type"] != "healing"
        report.update(id=[self._begun, self._count], time_ns=time.time_ns())
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
        requests: whether a device has request queues.
        patience: how hard to try to read failing blocks.
        haste: seconds for reading while all I/O waits; what takes longer is done again while only
            the chunks' I/O does.
        clock: seconds that only rise.
        aside: has such reads done; until their end the reflex is there for other targets.
    """

    def __init__(
        self,
        engine: Engine,
        trace: TraceInstance,
        tell: Callable[[dict[str, Any]], None],
        state_of: Callable[[str], DeviceState] = device_state,
        disk_of: Callable[[str], tuple[str, int]] = whole_disk,
        requests: Callable[[str], bool] = serves_requests,
        patience: Patience = PATIENCE,
        haste: float = HASTE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        aside: Callable[[Callable[[], None]], Future[None]] = in_line,
    ) -> None:
        self._engine = engine
        self._trace = trace
        self._parser = Parser()
        self._tell = tell
        self._state_of = state_of
        self._disk_of = disk_of
        self._requests = requests
        self._patience = patience
        self._haste = replace(patience, budget=min(haste, patience.budget))
        self._clock = clock
        self._aside = aside
        self._wake: Callable[[], None] = lambda: None
        self._wards: dict[str, Ward] = {}
        # Targets whose frozen chunks are being read, which stay locked meanwhile.
        self._reading: dict[str, tuple[Healing, Future[None]]] = {}
        self._unknown: collections.deque[BlockError] = collections.deque(maxlen=_UNKNOWN_KEPT)
        self._refreshed_at = 0.0
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
        with self._engine.healing(), wake_up() as (woken, self._wake):
            pipe = self._trace.open()
            try:
                self.refresh()
                ready()
                poll = select.poll()
                for descriptor in (pipe, stop, woken):
                    poll.register(descriptor, select.POLLIN)
                while True:
                    found = {descriptor for descriptor, _event in poll.poll(1000 * self._pause())}
                    if stop in found:
                        self._finish()
                        return
                    if woken in found:
                        os.read(woken, _WAKINGS)
                    self.turn()
            finally:
                self._trace.close()
                self._wake = lambda: None
                for healing, _end in self._reading.values():
                    # Its devices stay open, because they are being read.
                    with contextlib.suppress(DmRemapError, OSError):
                        healing.close()
                for name, ward in self._idle().items():
                    self._fail_known_flushes(ward)
                    self._dismiss(name)

    def turn(self) -> None:
        """Take in what failed, heal it, and see that no target stays without its path."""
        self.take(self._seen())
        for ward in self._wards.values():
            self._fail_known_flushes(ward)
        for name, (healing, end) in list(self._reading.items()):
            if end.done():
                self._go_on(name, healing, end)
        for name in [name for name, ward in self._idle().items() if ward.errors]:
            self._go_on(name, self._attending(name))
        self.look_after()

    def _idle(self) -> dict[str, Ward]:
        """The targets of which nothing is being read."""
        return {name: ward for name, ward in self._wards.items() if name not in self._reading}

    def _go_on(self, name: str, healing: Healing, end: Future[None] | None = None) -> None:
        """Carry a healing on until it ends, or reads that take a while.

        Args:
            name: the target.
            healing: its healing.
            end: that of the reads which it stopped for, if it did.
        """
        self._reading.pop(name, None)
        while end is None or end.done():
            error = end.exception() if end else None
            try:
                work = healing.throw(error) if error else next(healing)
            except StopIteration:
                return
            end = self._aside(work)
        self._reading[name] = healing, end
        end.add_done_callback(lambda _end: self._wake())

    def _finish(self) -> None:
        """End what was begun, and begin nothing."""
        while self._reading:
            for name, (healing, end) in list(self._reading.items()):
                wait([end])
                self._go_on(name, healing, end)

    def _pause(self) -> float:
        now = self._clock()
        wards = self._idle().values()
        if self._unknown or any(w.errors or w.alert_until > now for w in wards):
            return _RESTLESS_SECONDS
        return _TICK_SECONDS

    # Seeing

    def _seen(self) -> list[BlockError]:
        found: list[BlockError] = []
        while True:
            lines = self._trace.read()
            if not lines:
                return found
            for item in self._parser.parse(lines):
                # A readahead that fails is held like any read.
                if isinstance(item, BlockError):
                    found.append(item)
                elif isinstance(item, Lost):
                    for ward in self._wards.values():
                        ward.missed = True

    def take(self, errors: Sequence[BlockError]) -> None:
        """Note failed requests with the targets that they concern."""
        self._note(errors)
        if self._unknown and (
            self._clock() >= self._refreshed_at + _TICK_SECONDS
            or any(self._has_moved(ward) for ward in self._idle().values())
        ):
            # A target may be newer than the last look, or have another main since.
            complete = self.refresh()
            unknown = list(self._unknown)
            self._unknown.clear()
            self._note(unknown)
            if complete:
                self._unknown.clear()

    def _note(self, errors: Iterable[BlockError]) -> None:
        for error in errors:
            if not self._assign(error) and error not in self._unknown:
                self._unknown.append(error)

    def _assign(self, error: BlockError) -> bool:
        known = False
        for ward in self._wards.values():
            if error.devno not in (ward.disk, ward.new_disk):
                continue
            known = True
            requests = ward.requests if error.devno == ward.disk else ward.new_requests
            # Of a disk with requests each error comes a second time, as its bio's.
            if error.request == requests and error not in ward.errors:
                ward.errors.append(error)
                ward.alert_until = self._clock() + _ALERT_SECONDS
        return known

    # Targets

    def refresh(self) -> bool:
        """Look which targets hold their errors, and end what an interruption left there.

        Returns:
            Whether every target could be looked at.
        """
        now = self._refreshed_at = self._clock()
        complete = True
        names = self._engine.target_names()
        for name in [name for name in self._idle() if name not in names]:
            self._dismiss(name)
        for name in names:
            if name in self._reading:
                continue
            if name not in self._wards or self._has_moved(self._wards[name]):
                with self._engine.try_locked(name) as locked:
                    if locked:
                        self._admit(name)
                    complete = complete and locked
        self._refresh_at = now + (_REFRESH_SECONDS if complete else _TICK_SECONDS)
        return complete

    def _has_moved(self, ward: Ward) -> bool:
        """Whether a target stands on a device that it did not use, such as a new main."""
        return not self._engine.devices_below(ward.target) <= ward.below

    def _admit(self, name: str) -> Ward | None:
        """Observe a target anew and open its devices, if its errors are held.

        Returns:
            The target; None where it holds none, or cannot be looked at. Then its path is looked
            after as before.
        """
        before = self._wards.get(name)
        self._dismiss(name)
        try:
            target = self._engine.require(name)
            if target.path is None or target.main is None:
                return None
            upkeep = plan_upkeep(target)
            # Errors of main that wait must be healed first; see `_cut_off`.
            actions = tuple(
                action for action in upkeep.actions if action.kind != "cut_off" or target.past_hold
            )
            if actions:
                self._engine.apply(replace(upkeep, actions=actions))
                target = self._engine.require(name)
            closing = contextlib.ExitStack()
            disks = closing.enter_context(self._engine.opened(target))
        except (DmRemapError, OSError, ValueError) as error:
            log.error("%s", error)
            self._refresh_at = min(self._refresh_at, self._clock() + _TICK_SECONDS)
            if before:
                self._wards[name] = before
            return None
        if target.path is None or target.main is None:
            closing.close()
            return None
        disk, start = self._disk_of(target.main.devno)
        ward = Ward(target, disks, closing, disk, start)
        if before:
            ward.errors, ward.suspects = before.errors, before.suspects
            ward.slow_until = before.slow_until
            ward.strikes, ward.struck = before.strikes, before.struck
        ward.requests = self._requests(disk)
        if target.replacement:
            ward.new_disk, ward.new_start = self._disk_of(target.replacement.devno)
            ward.new_requests = self._requests(ward.new_disk)
        ward.below = self._engine.devices_below(target).union(target.spare_devnos.values())
        if not (target.path.active and target.path.queueing):
            # What the trace says of it comes first.
            ward.alert_until = self._clock() + _ALERT_SECONDS
        self._wards[name] = ward
        return ward

    def _dismiss(self, name: str) -> None:
        ward = self._wards.pop(name, None)
        if ward:
            ward.close()

    # Healing

    def _attending(self, name: str) -> Healing:
        """Heal a target, unless somebody else works on it: then the next turn does."""
        with self._engine.try_locked(name) as locked:
            if not locked:
                self._wards[name].close()
                return
            ward: Ward | None = self._wards[name]
            if ward and (ward.let_go or not self._engine.is_current(ward.target, ward.disks)):
                ward = self._admit(name)
            if ward is None:
                self._despair(name)
                return
            errors, ward.errors = on_one_main(ward, ward.errors), []
            begun = self._clock()
            try:
                yield from self._heal(ward, errors)
            except (DmRemapError, OSError) as error:
                # What cannot be healed must not keep the rest waiting.
                log.error("%s", error)
                self._give_up(ward, errors, str(error))
                self._admit(name)
            ward.alert_until = self._clock() + _ALERT_SECONDS
            log.info("%s: dealt with in %.3f s", name, self._clock() - begun)

    def _despair(self, name: str) -> None:
        """Let I/O fail at once that waits for a target which cannot be looked at any more."""
        ward = self._wards.get(name)
        if ward:
            errors, ward.errors = ward.errors, []
            self._give_up(ward, errors, "its metadata cannot be read, so nothing can be moved")

    def _heal(self, ward: Ward, errors: Sequence[BlockError]) -> Healing:
        target = ward.target
        if target.main is None:
            raise AssertionError("a target that is looked after has a main")
        injury = injury_of(target, ward.start, errors)
        chunks = sorted(injury.reads | injury.writes)
        if not self._answers(ward, errors):
            return
        if not chunks:
            # The path's own errors may come again at once: see `look_after`.
            if not injury.others:
                self._release(ward)
            return
        # A table from older metadata would show main's old data where a lost spare has newer.
        check_certain(target)
        self._tell({"type": "healing", "target": target.name})
        now = self._clock()
        ward.suspects = {c: until for c, until in ward.suspects.items() if until > now}

        def wanted(chunk: int, found: Salvage) -> bool:
            if chunk in injury.writes or chunk in ward.suspects:
                return True
            # A chunk without a failing read costs one.
            if found.reads > 1:
                return True
            # Other chunks of the request may have been innocent, and this one too.
            ward.suspects[chunk] = now + _AGAIN_SECONDS
            return False

        moved = yield from self._move(ward, chunks, wanted)
        ward.strikes = 0
        if moved.chunks:
            choice = replace(target.choice, metadata=moved.metadata)
            ward.target = replace(target, choice=choice, table=())
            self._engine.backup(moved.metadata)
        self._report(ward, "healed" if moved.chunks else "passed", errors, moved)

    def _move(
        self, ward: Ward, chunks: Sequence[int], wanted: Callable[[int, Salvage], bool]
    ) -> Steps:
        """Move chunks at once if that is quick, because all I/O waits; else let the rest go on."""
        target, disks = ward.target, ward.disks
        # The freeze waits for what is in flight, but not for what is sent meanwhile.
        waits = not self._engine.path_of(target.name).active

        def release() -> None:
            if waits:
                self._release(ward, drained=True)

        now = self._clock()
        # The hasty reader knows only the old main.
        on_new = bool(target.replacement) and (
            min(chunks) < replacement.copied_chunks(target.metadata)
        )
        if waits and now >= ward.slow_until and not on_new:
            if ward.hasty is None:
                ward.hasty = HastyReader(self._engine.open_main(target), self._clock)
            ward.hasty.begin(self._haste.budget)
            main: Any = ward.hasty
            hasty = replace(disks, main=main)
            try:
                return self._engine.move_held(target, hasty, chunks, self._haste, wanted, release)
            except Unfinished:
                ward.hasty.close()
                ward.hasty, ward.slow_until = None, now + _SLOW_SECONDS
        return (
            yield from self._engine.moving(target, disks, chunks, self._patience, wanted, release)
        )

    def _answers(self, ward: Ward, errors: Sequence[BlockError]) -> bool:
        """Whether main and what is to replace it can be asked; else I/O stays held until they can.

        If one does not come back, the kernel's fail-safe ends the wait.
        """
        if ward.target.main is None:
            raise AssertionError("a target that is looked after has a main")
        mains = [info for info in (ward.target.main, ward.target.replacement) if info]
        gone = [info for info in mains if self._state_of(info.devno) is not DeviceState.LIVE]
        if gone and not ward.lost:
            self._report(ward, "device_lost", errors, device=gone[0].path)
        ward.lost = bool(gone)
        return not gone

    def _release(self, ward: Ward, drained: bool = False) -> None:
        """Let held I/O go on, but let it fail if a flush is among it.

        Args:
            ward: the target; without ``drained`` none of its chunks is frozen.
            drained: nothing that was sent before the path failed is in flight any more.
        """
        name = ward.target.name
        path = self._engine.path_of(name)
        if path.active and path.queueing:
            return
        if not drained:
            self._engine.drain(ward.target)
        # An error is in the trace before its path fails, so all that waits is known now.
        self._note(self._seen())
        if not self._fail_flushes(ward):
            if ward.missed and not path.active:
                reason = "the kernel dropped errors, and one may have been of a flush"
                self._give_up(ward, [], reason)
            else:
                self._engine.release(ward.target)
        ward.missed = False

    def _fail_known_flushes(self, ward: Ward) -> None:
        """Fail flushes that failed, before anything else: nobody else may try them again.

        Should this process end, nobody would know of them.
        """
        with contextlib.suppress(DmRemapError):
            self._fail_flushes(ward)

    def _fail_flushes(self, ward: Ward) -> bool:
        """Let held I/O fail if a flush did; whether one did.

        The disk may have dropped what it had acknowledged, and a second flush would not tell.
        """
        flushes = [error for error in ward.errors if error.operation == FLUSH]
        if flushes:
            ward.errors = [error for error in ward.errors if error.operation != FLUSH]
            self._engine.fail_held(ward.target)
            self._report(ward, "flush_failed", flushes)
        return bool(flushes)

    def _give_up(self, ward: Ward, errors: Sequence[BlockError], reason: str) -> None:
        with contextlib.suppress(DmRemapError):
            self._engine.fail_held(ward.target)
        self._report(ward, "failed", errors, reason=reason)
        # The salvage's own reads failed too, and would lead to the next one.
        self._note(self._seen())
        ward.errors = [error for error in ward.errors if error.operation == FLUSH]

    def _report(
        self,
        ward: Ward,
        kind: str,
        errors: Sequence[BlockError],
        moved: Moved | None = None,
        reason: str = "",
        device: str = "",
        hit: Sequence[tuple[int, int]] = (),
    ) -> None:
        total = ward.target.metadata.config["main"]["sectors"]
        hit = [
            *hit,
            *(
                piece
                for error in errors
                for piece in intersect_ranges(
                    [(error.sector - ward.start, error.count)], (0, total)
                )
            ),
        ]
        new = bool(ward.new_disk and errors and errors[0].devno == ward.new_disk)
        main = ward.target.replacement if new else ward.target.main
        self._tell(
            {
                "type": kind,
                "target": ward.target.name,
                "device": device or (main.path if main else ""),
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
        for name, ward in self._idle().items():
            if ward.errors or not (due or ward.alert_until > now):
                continue
            try:
                if not due or self._has_devices(name, ward):
                    self._look_at_path(name, ward)
            except (DmRemapError, OSError, ValueError) as error:
                log.error("%s", error)
                self._dismiss(name)
                self._refresh_at = min(self._refresh_at, now + _TICK_SECONDS)

    def _has_devices(self, name: str, ward: Ward) -> bool:
        """Close a target's devices while somebody else works on it, who may want to remove one.

        Returns:
            Whether they have been open all the time.
        """
        with self._engine.try_locked(name) as locked:
            if not locked:
                ward.close()
            elif ward.let_go or not self._engine.is_above_hold(name):
                self._admit(name)
                # Where it was not admitted, its path is all that can be looked after.
                return self._wards.get(name) is ward
        return locked

    def _look_at_path(self, name: str, ward: Ward) -> None:
        now = self._clock()
        path = self._engine.path_of(name)
        if path.active and path.queueing:
            return
        ward.alert_until = now + _ALERT_SECONDS
        # What fails again at once must not keep this process busy.
        if now < ward.struck + _RESTLESS_SECONDS or not self._answers(ward, []):
            return
        self._note(self._seen())
        if ward.errors:
            return
        with self._engine.try_locked(name) as locked:
            if not locked:
                return
            if now >= ward.struck + _CALM_SECONDS:
                ward.strikes = 0
            ward.strikes, ward.struck = ward.strikes + 1, now
            if ward.strikes == _DOUBTS:
                self._cut_off(ward)
            if ward.strikes < _STRIKES:
                self._release(ward)
                return
            # It is no bad sector of main, or the trace would have told.
            ward.strikes = 0
            self._give_up(ward, [], "its path fails again and again, and main has no error")

    def _cut_off(self, ward: Ward) -> None:
        """Let what is on spares that are lost fail by itself, if that is what fails the path."""
        try:
            seen = self._engine.require(ward.target.name)
        except DmRemapError:
            # The only spare is the one; all that is needed is known, if nobody has changed it.
            seen = self._engine.look_at_spares(ward.target)
        if seen.lost_spares and seen.certain:
            known = seen.cut
            after = self._engine.cut_off(seen, lambda: self._release(ward, drained=True))
            if after is not seen:
                ward.strikes = 0
            ward.target = replace(ward.target, cut=after.cut, lost_spares=after.lost_spares)
            if after.cut != known:
                self._tell_lost_spares(ward)

    def _tell_lost_spares(self, ward: Ward) -> None:
        if ward.target.unavailable:
            reason = "; ".join(degradation(ward.target))
            self._report(ward, "spare_lost", [], reason=reason, hit=ward.target.unavailable)


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
