# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Holds the failed I/O of a target, and lets fail what nobody can heal."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from . import extents, mapping, stack
from .devices import Mapper
from .devmapper import Segment
from .events import subtract_ranges
from .freezing import FREEZE_SECONDS, Freezer, existing
from .guarding import Guard
from .observing import Observer
from .stacking import Stacker
from .target import ActiveTarget
from .tracing import FLUSH, Parser

# How long the kernel is given to let held I/O fail.
FAILING_SECONDS = 1.0


class Hold:
    """Lets held I/O go on, wait or fail.

    Args:
        mapper: device-mapper.
        observer: observes targets.
        freezer: freezes and thaws chunks.
        stack: creates and removes mapped devices.
        guard: ends interrupted freezes.
        step: called with a name after each step that a crash could follow.
        errors: lines of the healer's trace that it has not taken out.
    """

    def __init__(
        self,
        mapper: Mapper,
        observer: Observer,
        freezer: Freezer,
        stack: Stacker,
        guard: Guard,
        step: Callable[[str], None],
        errors: Callable[[], Sequence[str]],
    ) -> None:
        self._mapper = mapper
        self._observer = observer
        self._freezer = freezer
        self._stack = stack
        self._guard = guard
        self._step = step
        self._errors = errors

    def release(self, target: ActiveTarget) -> None:
        """Let held I/O go on, and hold what fails from now on."""
        if target.path is None:
            return
        hold = stack.hold_name(target.name)
        # The kernel's fail-safe takes the first away, and only the second starts what waits.
        self._mapper.message(hold, "queue_if_no_path")
        self._mapper.message(hold, f"reinstate_path {target.path.devno}")

    def release_unless_flushed(self, target: ActiveTarget) -> None:
        """Let held I/O go on, but let it fail if a flush is among it that no healer has dealt with.

        The disk may have dropped what it had acknowledged, and a second flush would not tell.
        """
        waits = target.path and not self._observer.path_of(target.name).active
        if waits and self._flush_failed(target):
            self.fail_held(target)
        else:
            self.release(target)

    def _flush_failed(self, target: ActiveTarget) -> bool:
        mains = [info for info in (target.main, target.replacement) if info]
        disks = {devno for info in mains for devno in (info.disk, info.devno)}
        errors, _lost = Parser().split(self._errors())
        return any(error.operation == FLUSH and error.devno in disks for error in errors)

    def fail_held(self, target: ActiveTarget) -> None:
        """Let all I/O that waits fail, and hold what fails from now on.

        What fails in between fails for good: if it were held, it would be tried again.
        """
        if target.path is None:
            return
        hold = stack.hold_name(target.name)
        self._mapper.message(hold, "fail_if_no_path")
        # The kernel lets it fail by and by, and what is not through by then would be tried again.
        self._mapper.wait_idle(hold, FAILING_SECONDS)
        self._mapper.message(hold, f"reinstate_path {target.path.devno}")
        self._mapper.message(hold, "queue_if_no_path")

    def drain(self, target: ActiveTarget) -> None:
        """Wait until nothing is in flight below the map, none of whose chunks is frozen."""
        # A swap waits for that, even if the new table is the old one.
        self._mapper.load(target.map.name, self._mapper.table(target.map.name))
        self._mapper.swap(target.map.name)

    def hold_errors(self, target: ActiveTarget) -> None:
        """Put what holds failed I/O between the target and its map."""
        name = target.name
        # What an interrupted switch left stands under nothing.
        self._stack.remove_parts(target.device, stack.hold_name(name), stack.map_name(name))
        table = self._stack.create_hold(
            target.metadata, name, target.table, target.carrier, target.unavailable
        )
        self._mapper.load(name, table)
        with self._mapper.events() as events:
            self._mapper.swap(name, events)

    def pass_errors(self, target: ActiveTarget) -> None:
        """Give the target its map for a table, so that errors pass at once."""
        name = target.name
        if target.path:
            # Nothing may wait while the swap waits for what is in flight.
            self._mapper.message(stack.hold_name(name), "fail_if_no_path")
            self._mapper.load(name, target.table)
            with self._mapper.events() as events:
                self._mapper.swap(name, events)
        self._stack.remove_parts(target.device, stack.hold_name(name), stack.map_name(name))

    def cut_off(
        self, target: ActiveTarget, release: Callable[[], None] | None = None
    ) -> ActiveTarget:
        """Let I/O to chunks on lost spares fail above the hold, where it makes nothing else wait.

        What a target without a hold maps to a lost spare fails anyway. The map still leads there,
        so that the next flush fails: the spare may have lost what it had acknowledged. Called
        again for that, it lets the flush fail, and the map does not lead there any more. The
        caller holds the lock.

        Args:
            target: the target as it is now.
            release: lets held I/O go on, in place of the method of that name.

        Returns:
            The target as it is then; itself if nothing has changed.
        """
        if not target.path or not (target.certain or target.past_hold):
            return target
        name, sectors = target.name, target.metadata.config["main"]["sectors"]
        top = stack.top_table(
            sectors, existing(self._mapper, stack.hold_name(name)).devno, target.unavailable
        )
        fresh = subtract_ranges(target.unavailable, target.cut)
        used = {mapping.linear_target(s)[0] for s in target.table if s.target == "linear"}
        owed = not fresh and any(lost.devno in used for lost in target.lost_spares)
        let_go = release or (lambda: self.release(target))
        after = target
        with self._mapper.events() as events:
            if target.past_hold:
                self.release(target)
            elif fresh or owed:
                past = stack.top_table(sectors, target.map.devno, target.unavailable)
                failed = self._fail_waiting(target, fresh, past, let_go, events)
                if failed and owed:
                    lost = tuple(replace(lost, mapped=False) for lost in target.lost_spares)
                    after = replace(target, lost_spares=lost)
                    self._freezer.swap_map(after, after.map_table(after.metadata), events)
                self.release(target)
            elif target.cut == target.unavailable:
                return target
            elif list(target.table) != target.map_table(target.metadata):
                # A spare that can be used again is not in the map any more.
                self._freezer.swap_map(target, target.map_table(target.metadata), events)
            self._mapper.load(name, top)
            self._mapper.swap(name, events)
        self._step("cut_off")
        if target.past_hold or target.cut != target.unavailable:
            after = replace(after, cut=target.unavailable, past_hold=False)
        return after

    def _fail_waiting(
        self,
        target: ActiveTarget,
        ranges: Sequence[tuple[int, int]],
        past: Sequence[Segment],
        release: Callable[[], None],
        events: Any,
    ) -> bool:
        """Let I/O fail that lost spares keep waiting; then the target is past its hold.

        Multipath can only let all that waits fail. So the chunks are frozen, the rest goes on, and
        what is left in flight when the target's table is swapped is theirs alone, and flushes that
        reach a lost spare.

        Args:
            target: the target, whose errors are held.
            ranges: sectors of whole chunks to be frozen.
            past: the target's table that leads to the map, and where these chunks fail.
            release: lets held I/O go on.
            events: what `DeviceMapper.events` gave.

        Returns:
            Whether anything was let fail.
        """
        name, hold = target.name, stack.hold_name(target.name)
        config = target.metadata.config
        chunks = extents.chunks_of(ranges, config["chunk_sectors"], config["main"]["sectors"])
        turns = itertools.count()
        failed: list[int] = []

        def let_fail() -> None:
            turn = next(turns)
            path = self._observer.path_of(name)
            if turn % 2 == 0:
                # Others may wait because one of these has failed the path, and go on first.
                if not path.active:
                    self.release(target)
            elif chunks or not path.active:
                failed.append(turn)
                self._mapper.message(hold, "fail_if_no_path")
                if chunks:
                    self._freezer.fail(name)

        try:
            if chunks:
                self._freezer.freeze(target, chunks, FREEZE_SECONDS, events)
            release()
            self._mapper.load(name, past)
            self._mapper.swap_while(name, let_fail, events)
            self._step("past_hold")
            if chunks:
                self.release(target)
                self._freezer.thaw(target, target.metadata, chunks, events)
        except BaseException:
            self.release(target)
            self._guard.end_freeze(name, ())
            raise
        if chunks:
            self._freezer.park(target)
        return bool(failed)

    def serve(self, target: ActiveTarget) -> None:
        """Give the map, and the target above what holds errors, the tables for its spares."""
        name = target.name
        with self._mapper.events() as events:
            self._freezer.swap_map(target, target.map_table(target.metadata), events)
            self._step("map_swapped")
            if target.path:
                sectors = target.metadata.config["main"]["sectors"]
                hold = existing(self._mapper, stack.hold_name(name)).devno
                self._mapper.load(name, stack.top_table(sectors, hold, target.unavailable))
                self._mapper.swap(name, events)
