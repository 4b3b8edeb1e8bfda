# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Carries out that spares of an active target come, return and go."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from . import copies, memory, plan_spares, stack
from .checks import check_certain
from .committing import Committer, host_id
from .devices import Mapper, Opener
from .errors import DmRemapError
from .format import Metadata
from .freezing import Freezer, existing
from .guarding import Guard
from .holding import Hold
from .moved import RemappedChunk
from .moving import Mover
from .observing import Look, Observer
from .placing import Route
from .plan import Action, Plan, metadata_of
from .salvage import Patience
from .stacking import Stacker
from .target import ActiveSpare, chunks_on, is_noted, with_notes


class Exchanger:
    """Lets spares of an active target come, return and go.

    Args:
        mapper: device-mapper.
        observer: observes targets.
        opener: opens the devices of targets.
        freezer: freezes and thaws chunks.
        stack: creates and removes mapped devices.
        committer: commits generations.
        guard: keeps a process that ends a freeze if this one dies.
        hold: lets fail what is on spares that are lost.
        mover: moves chunks.
        step: called with a name after each step that a crash could follow.
        progress: called with a sentence about how far it is.
    """

    def __init__(
        self,
        mapper: Mapper,
        observer: Observer,
        opener: Opener,
        freezer: Freezer,
        stack: Stacker,
        committer: Committer,
        guard: Guard,
        hold: Hold,
        mover: Mover,
        step: Callable[[str], None],
        progress: Callable[[str], None],
    ) -> None:
        self._mapper = mapper
        self._observer = observer
        self._opener = opener
        self._freezer = freezer
        self._stack = stack
        self._committer = committer
        self._guard = guard
        self._hold = hold
        self._mover = mover
        self._step = step
        self._progress = progress

    def add_spare(self, plan: Plan, index: int) -> None:
        """Commit that a prepared device is a spare of the target, by its index in the plan."""
        target = self._observer.require(plan.name)
        entry = metadata_of(plan).config["spares"][index]
        new = self._with_entry(target.metadata, index, entry)
        current = target.metadata
        devices = {**target.spare_infos, index: plan.spares[index]}
        with contextlib.ExitStack() as members:
            opened = self._opener.members(members, devices)
            # First the new one alone: a spare that others name is never without metadata.
            alone = {index: opened.pop(index)}
            prepared = copies.prepare_commit(alone, current, new, {index})
            copies.prepare_commit(opened, current, new, self._committer.stale(target))
            prepared.write(self._step)
            self._committer.commit(target, opened, current, new)
        self._committer.backup(new)

    def remove_spare(self, plan: Plan, index: int) -> None:
        """Commit that a spare without chunks is none any more."""
        target = self._observer.require(plan.name)
        self._committer.commit_alone(
            target, self._with_entry(target.metadata, index, None), without=index
        )
        left = tuple(spare for spare in target.spares if spare.index != index)
        if target.main is None:
            # The freezing devices may hand flushes to the spare that goes.
            self._freezer.park(replace(target, spares=left, lost_spares=()), anew=True)

    def return_spare(self, plan: Plan, index: int) -> None:
        """Let a spare that was lost serve its chunks again.

        The generation that is committed first shows whoever knows the target that it has changed.
        """
        target, name, info = self._observer.require(plan.name), plan.name, plan.spares[index]
        check_certain(target)
        if target.frozen or all(lost.index != index for lost in target.lost_spares):
            raise DmRemapError(
                f"spare {index} is not as it was when its return was planned",
                device=info.path,
                remedy="run this again",
            )
        upper = stack.spare_name(name, index)
        lost = tuple(lost for lost in target.lost_spares if lost.index != index)
        if target.main is None:
            # The freezing devices may hand flushes to its old device.
            self._freezer.park(replace(target, lost_spares=lost), anew=True)
        self._stack.deactivate_spare(name, target.metadata, upper)
        self._step("old_removed")
        self._stack.activate_spare(name, target.metadata, index, info)
        self._step("spare_activated")
        devno = existing(self._mapper, upper).devno
        trouble = self._observer.trouble_in_data(Look(index, devno), target.metadata)
        if trouble:
            self._stack.deactivate_spare(name, target.metadata, upper)
            raise DmRemapError(
                f"was to be used again as spare {index}, but {trouble}",
                device=info.path,
                remedy="replace it, or remove it with discard_remaps: true",
            )
        noted = with_notes(
            target.metadata,
            [s.index for s in lost if is_noted(target.metadata, s.index)],
        )
        new = replace(self._committer.successor(target.metadata), config=noted.config)
        devices = {**target.spare_infos, index: info}
        with contextlib.ExitStack() as members:
            opened = self._opener.members(members, devices)
            left_out = self._committer.commit(target, opened, target.metadata, new, {index})
        if index in left_out:
            self._stack.deactivate_spare(name, target.metadata, upper)
            raise DmRemapError(
                f"was to be used again as spare {index}, but takes no metadata: {left_out[index]}",
                device=info.path,
                remedy="replace it, or remove it with discard_remaps: true",
            )
        back = ActiveSpare(index, devno, self._observer.candidate(info.path, with_signatures=False))
        self._hold.serve(
            replace(
                target,
                spares=(*target.spares, back),
                lost_spares=lost,
                choice=replace(target.choice, metadata=new),
            )
        )
        self._committer.backup(new)

    def empty_spare(
        self, plan: Plan, action: Action, discard: frozenset[int]
    ) -> list[RemappedChunk]:
        """Move all chunks off a spare, some in each freeze.

        Args:
            plan: the plan.
            action: says which spare, and where its chunks may go.
            discard: indexes of spares that are not read: what is there is lost.
        """
        target, index = self._observer.require(plan.name), action.details["index"]
        self._freezer.check_names(target)
        memory.lock_memory()
        route = Route(
            avoid=frozenset(action.details["avoid"]),
            prefer=frozenset(action.details["prefer"]),
            discard=discard,
        )
        lost = {spare.index: spare.reason for spare in target.lost_spares}
        if (index in lost) != bool(discard):
            raise DmRemapError(
                lost.get(index, "can be read again, so nothing on it is given up"),
                device=action.device,
                remedy="look at the target again and decide anew",
            )
        chunks = chunks_on(target.metadata, index)
        done: list[RemappedChunk] = []
        with contextlib.ExitStack() as opened:
            disks = opened.enter_context(self._opener.opened(target))
            opened.enter_context(self._guard.guarded(target, disks))
            for first in range(0, len(chunks), plan_spares.DRAIN_CHUNKS):
                batch = chunks[first : first + plan_spares.DRAIN_CHUNKS]
                with self._mapper.events() as events:
                    moved = self._mover.move(target, disks, batch, Patience(), events, route=route)
                choice = replace(target.choice, metadata=moved.metadata)
                target = replace(target, choice=choice, table=())
                done += moved.chunks
                self._progress(f"{len(done)} of {len(chunks)} chunks have left {action.device}")
                self._committer.backup(moved.metadata)
        self._hold.cut_off(self._observer.require(plan.name))
        return done

    def _with_entry(self, metadata: Metadata, index: int, entry: Any) -> Metadata:
        """The next generation, with another entry in its list of spares."""
        entries = list(metadata.config["spares"])
        entries += [None] * (index + 1 - len(entries))
        entries[index] = entry
        config = {**metadata.config, "spares": entries}
        return metadata.successor(time.time_ns(), host_id=host_id(), config=config)
