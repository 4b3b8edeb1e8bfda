# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Commits the metadata of targets, and brings spares to the generation that counts."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from . import copies
from .devices import Blocks, OpenDevice, Opener
from .errors import DmRemapError
from .events import hashed_machine_id
from .format import Metadata, spare_uuid_of
from .plan import Plan, index_of, metadata_of
from .target import ActiveTarget, with_notes


class Committer:
    """Commits generations, and remembers which spares did not take the last one.

    Args:
        blocks: block devices.
        opener: opens the spares.
        backup: keeps a generation on the host.
        step: called with a name after each step that a crash could follow.
        progress: called with a sentence about what the user may want to know.
    """

    def __init__(
        self,
        blocks: Blocks,
        opener: Opener,
        backup: Callable[[Metadata], None],
        step: Callable[[str], None],
        progress: Callable[[str], None],
    ) -> None:
        self._blocks = blocks
        self._opener = opener
        self.backup = backup
        self._step = step
        self._progress = progress
        # Spares that did not take the last generation, by target.
        self._left_out: dict[uuid.UUID, set[int]] = {}

    def successor(self, metadata: Metadata) -> Metadata:
        """The next generation, from this host and now, with nothing else changed."""
        return metadata.successor(time.time_ns(), host_id=host_id())

    def commit(
        self,
        target: ActiveTarget,
        members: Mapping[int, OpenDevice],
        current: Metadata,
        new: Metadata,
        returned: Collection[int] = (),
    ) -> dict[int, str]:
        """Commit to all spares; why some did not take it, by index.

        Args:
            target: the target.
            members: its spares.
            current: the generation that they carry.
            new: the next one.
            returned: indexes of spares that may carry an older one.

        Raises:
            DmRemapError: none took it, or what is on one contradicts what is known.
        """
        stale = self.stale(target).union(returned) & set(members)
        return self.commit_to(members, current, new, stale)

    def commit_to(
        self,
        members: Mapping[int, OpenDevice],
        current: Metadata | None,
        new: Metadata,
        stale: Collection[int],
    ) -> dict[int, str]:
        """Like `commit`, where ``stale`` are all spares that may carry an older generation."""
        done = copies.commit(members, current, new, self._step, stale)
        left_out = {index: rewrite.left_out for index, rewrite in done.items() if rewrite.left_out}
        self._left_out[new.target_uuid] = set(left_out)
        for reason in left_out.values():
            self._progress(f"a spare did not take generation {new.generation}: {reason}")
        return left_out

    def stale(self, target: ActiveTarget) -> set[int]:
        """Indexes of spares that are known to be behind."""
        return self._left_out.get(target.metadata.target_uuid, set()) | target.behind

    def commit_alone(self, target: ActiveTarget, new: Metadata, without: int | None = None) -> None:
        """Commit a generation that moves nothing to all spares, or to all but one."""
        devices = {i: info for i, info in target.spare_infos.items() if i != without}
        with contextlib.ExitStack() as members:
            self.commit(target, self._opener.members(members, devices), target.metadata, new)
        self.backup(new)

    def commit_config(self, target: ActiveTarget, config: dict[str, Any]) -> None:
        """Commit another configuration to all spares."""
        self.commit_alone(target, replace(self.successor(target.metadata), config=config))

    def commit_new(self, plan: Plan, current: Metadata | None, draft: Metadata) -> None:
        """Commit a generation of a target that is being made, to all spares or not at all."""
        with contextlib.ExitStack() as stack:
            done = copies.commit(
                self._opener.members(stack, plan.spares), current, draft, step=self._step
            )
        for index, rewrite in done.items():
            if rewrite.left_out:
                raise DmRemapError(
                    f"took no metadata of the new target: {rewrite.left_out}",
                    device=plan.spares[index].path,
                    remedy="give another spare, with wipe: true for the others",
                )
        self.backup(draft)

    def note_missing(self, plan: Plan, missing: Collection[int]) -> None:
        """Commit, before a target is used, which of its spares are missing."""
        metadata = metadata_of(plan)
        noted = with_notes(metadata, missing)
        new = replace(self.successor(metadata), config=noted.config)
        stale = self._left_out.get(metadata.target_uuid, set())
        with contextlib.ExitStack() as members:
            opened = self._opener.members(members, plan.spares)
            self.commit_to(opened, metadata, new, stale & set(opened))
        self.backup(new)

    def restore(self, plan: Plan, backup: Metadata) -> None:
        """Commit a backup as a new generation, with the entries of new spares."""
        wanted = metadata_of(plan)
        new = replace(self.successor(backup), generation=wanted.generation, config=wanted.config)
        with contextlib.ExitStack() as members:
            opened = self._opener.members(members, plan.spares)
            left_out = self.commit_to(opened, None, new, ())
        self.backup(new)
        for index, reason in left_out.items():
            raise DmRemapError(
                f"took no metadata: {reason}",
                device=plan.spares[index].path,
                remedy="activate the target without it, with degraded: true",
            )

    def chosen(self, plan: Plan) -> copies.Choice:
        """The metadata that the plan's spares have now."""
        surveys = {}
        for info in plan.spares.values():
            with self._blocks.BlockDevice(info.path) as device:
                surveys[info.path] = copies.survey(device)
        return copies.choose(surveys)

    def repair(self, plan: Plan, path: str) -> None:
        """Bring the copies on one of a plan's spares to the generation that counts.

        Raises:
            CommitFailed: they cannot be written, and no other spare has it.
        """
        index = index_of(plan, path)
        spare_uuid = spare_uuid_of(metadata_of(plan), index)
        choice = self.chosen(plan)
        others = [other for other in choice.spares.values() if other not in (*choice.stale, path)]
        try:
            with self._blocks.BlockDevice(path, writable=True) as device:
                copies.repair(device, choice, spare_uuid)
        except copies.CommitFailed as error:
            if not others:
                raise
            # It stays behind, as a spare that a commit left out.
            self._left_out.setdefault(choice.metadata.target_uuid, set()).add(index)
            self._progress(str(error))


def host_id() -> uuid.UUID:
    """What names this host in metadata and events, or zero where it has no machine id."""
    try:
        return hashed_machine_id()
    except (OSError, ValueError):
        return uuid.UUID(int=0)
