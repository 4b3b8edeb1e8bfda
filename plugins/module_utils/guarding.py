# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ends freezes of chunks that were interrupted, also when the process that froze them is gone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator

from . import memory, stack
from .committing import Committer
from .devices import Disks, Mapper
from .errors import DmRemapError
from .format import MAX_SPARES
from .freezing import Freezer, existing, held_chunks
from .observing import Observer
from .plan_upkeep import plan_upkeep
from .target import ActiveTarget, chunks_on, is_noted


class Guard:
    """Ends freezes that were interrupted, and sees to it that somebody does.

    Args:
        mapper: device-mapper.
        observer: observes targets.
        freezer: freezes and thaws chunks.
        committer: commits generations.
        fork: while I/O is frozen, keep a second process that ends the freeze if this one is
            killed. Only for processes with one thread.
    """

    def __init__(
        self,
        mapper: Mapper,
        observer: Observer,
        freezer: Freezer,
        committer: Committer,
        fork: bool,
    ) -> None:
        self._mapper = mapper
        self._observer = observer
        self._freezer = freezer
        self._committer = committer
        self._fork = fork

    @contextlib.contextmanager
    def guarded(self, target: ActiveTarget, disks: Disks) -> Iterator[None]:
        """Keep a process that ends the freeze of the target if this one dies in the block.

        It has the target's lock too, so nobody else gets it before the freeze has ended.
        """
        name = target.name
        if not self._fork:
            yield
            return
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setsid()
                os.close(theirs)
                memory.lock_memory()
                # The end of the pipe without a word is the end of the other process.
                if not os.read(ours, 1):
                    self.end_freeze(name, disks.members)
                code = 0
            finally:
                os._exit(code)
        os.close(ours)
        try:
            yield
        finally:
            if not self._still_frozen(name):
                # A guard that was killed itself does not matter any more.
                with contextlib.suppress(BrokenPipeError):
                    os.write(theirs, b".")
            os.close(theirs)
            os.waitpid(child, 0)

    def _still_frozen(self, name: str) -> bool:
        """Whether anything may wait at the freezing device."""
        try:
            device = existing(self._mapper, name)
            part = stack.frozen_name(name)
            return bool(self._observer.part(device, part)) and any(
                segment.target == "delay" for segment in self._mapper.table(part)
            )
        except DmRemapError:
            return True

    def end_freeze(
        self, name: str, members: Collection[int] | None = None, parting: bool = False
    ) -> None:
        """End a freeze that was interrupted, as the metadata on the spares has it.

        Args:
            name: the target.
            members: indexes of the spares that a commit may have been begun on; None for all.
            parting: spares that the metadata notes as missing, by the user's word, hinder nothing.
        """
        try:
            target = self._observer.require(name)
            self.resume_spares(target)
            chunks = held_chunks(target)
            if not chunks and not target.map.suspended:
                self._freezer.park(target)
                return
            hiding = [i for i in target.choice.missing if members is None or i in members]
            lost = {
                chunk for s in target.lost_spares for chunk in chunks_on(target.metadata, s.index)
            }
            # What is on a lost spare shows no old data.
            doubtful = bool(hiding) and not lost.issuperset(chunks)
            noted = all(is_noted(target.metadata, i) for i in hiding)
            # A suspended map does not tell which chunks were on the move, so none can be spared.
            if (hiding and not chunks) or (doubtful and parting and noted):
                target = self._part_from_missing(target)
            elif doubtful:
                # A newer generation may be there, and would later show the chunks' old data.
                raise DmRemapError(
                    f"spares {hiding} cannot be read, and may have a newer generation that says "
                    f"where chunks {chunks} are",
                    device=name,
                    remedy="attach the spares again, or remove them with discard_remaps: true; "
                    "until then these chunks fail",
                )
            # A generation that was begun must be durable before its mapping is used.
            self._repair_all(target)
            with self._mapper.events() as events:
                if chunks:
                    self._freezer.thaw(target, target.metadata, chunks, events)
                else:
                    self._freezer.swap_map(target, target.map_table(target.metadata), events)
            self._freezer.park(target)
        except BaseException:
            self._fail_frozen(name)
            raise

    def _part_from_missing(self, target: ActiveTarget) -> ActiveTarget:
        """Commit a generation without the missing spares; the target with it.

        Should one of them carry a generation that nobody else has, it is another history from now
        on, and is refused when it comes back.
        """
        self._repair_all(target)
        target = self._observer.require(target.name)
        self._committer.commit_alone(target, self._committer.successor(target.metadata))
        return self._observer.require(target.name)

    def _repair_all(self, target: ActiveTarget) -> None:
        """Bring all spares to the chosen generation, or at least one.

        Raises:
            DmRemapError: no spare holds it whole.
        """
        upkeep = plan_upkeep(target)
        for action in upkeep.actions:
            if action.kind == "repair_metadata":
                self._committer.repair(upkeep, action.device)

    def _fail_frozen(self, name: str) -> None:
        device = existing(self._mapper, name)
        upper, _path = self._observer.map_of(device)
        frozen = self._observer.part(device, stack.frozen_name(name))
        if frozen and frozen.devno in self._mapper.dependencies(upper.name):
            self._freezer.fail(name)

    def resume_spares(self, target: ActiveTarget) -> None:
        """Resume spares that an interruption left suspended."""
        for index in range(MAX_SPARES):
            device = self._observer.part(target.device, stack.spare_name(target.name, index))
            if device and device.suspended:
                self._mapper.swap(device.name)
