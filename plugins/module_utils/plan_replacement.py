# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Another main for a target: the plan that begins it, goes on with it, or goes back (pure)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from . import extents, replacement
from .blockdev import DeviceInfo
from .checks import check_certain, check_unused
from .errors import Refused
from .format import Metadata
from .marks import SECTOR_BYTES
from .plan import REPLACE, UNDO, Action, Plan, state_of
from .request import Request, Seen
from .stack import part_names
from .target import ActiveTarget, chunks_on


def with_replacement(
    request: Request, target: ActiveTarget, seen: Seen, main: DeviceInfo, plan: Plan
) -> Plan:
    """The plan that also brings the target to the main that is wanted."""
    old, new, metadata = target.main, target.replacement, plan.metadata
    if metadata is None or (new is None and (old is None or main.devno == old.devno)):
        return plan
    check_certain(target)
    kind: str = REPLACE
    wipes: tuple[Action, ...] = ()
    if new is None:
        new = main
        wipes = _check_new_main(request, target, seen, new)
    elif main.devno != new.devno:
        if old is None or main.devno != old.devno:
            old_path = metadata.config["replacement"]["old_path"]
            raise Refused(
                f"its main {old_path} is being replaced by {new.path}, not by {request.main}",
                device=request.name,
                remedy=f"give {new.path} to go on, or {old_path} to go back",
            )
        kind = UNDO
    lost = [spare.index for spare in target.lost_spares]
    action, after = replacement_step(kind, target.name, metadata, old, new, lost)
    spares = {spare.index: spare.candidate.info for spare in target.spares}
    return replace(
        plan,
        actions=(*plan.actions, *wipes, action),
        after=state_of(after, spares),
        replacement=new,
    )


def _check_new_main(
    request: Request, target: ActiveTarget, seen: Seen, new: DeviceInfo
) -> tuple[Action, ...]:
    """Refuse what cannot replace the main; what must be erased before it does."""
    # What an interruption has left over either main is removed before.
    check_unused(new, () if target.tidy else tuple(part_names(target.name)), "main")
    replacement.check_new_main(new, target.main, target.metadata.config)
    if seen.new_main is None:
        raise AssertionError("a device that is to replace the main was looked at")
    survey = seen.new_main.survey
    found = list(seen.new_main.signatures)
    if not survey.empty:
        found.append("copies of a target's metadata")
    spared = any(copy.metadata.extents for copy in survey.copies)
    if found and spared and not request.discard_remaps:
        raise Refused(
            "is a spare with remapped chunks of a target",
            device=new.path,
            remedy="give another disk, or wipe: true with discard_remaps: true to lose them",
        )
    if found and not request.wipe:
        raise Refused(
            f"is not empty: {', '.join(dict.fromkeys(found))}",
            device=new.path,
            remedy="give an empty disk, or wipe: true to erase it",
        )
    return (Action("wipe_main", new.path, {"content": found}),) if found else ()


def replacement_step(
    kind: str,
    name: str,
    metadata: Metadata,
    old: DeviceInfo | None,
    new: DeviceInfo,
    lost_spares: Collection[int] = (),
) -> tuple[Action, Metadata]:
    """The action that replaces main or undoes that, and the metadata when it is done.

    Chunks with lost sectors and those on lost spares stay where they are. Each copied piece is a
    generation of its own; their number depends on what is found on the way, so only one is counted.
    """
    details = {
        "from": old.path if old else "",
        "to": new.path,
        "copied": replacement.copied_sectors(metadata) * SECTOR_BYTES,
        "total": metadata.config["main"]["sectors"] * SECTOR_BYTES,
    }
    config = metadata.config
    if not replacement.under_way(metadata):
        config = replacement.begun(config, new, new.path, details["from"])
    after = replace(metadata, generation=metadata.generation + 1)
    if kind == UNDO:
        after = replace(after, config=replacement.undone(config))
    else:
        lossy = extents.chunks_of(
            [(item.sector, item.count) for item in metadata.lost],
            config["chunk_sectors"],
            config["main"]["sectors"],
        )
        staying = {c for index in lost_spares for c in chunks_on(metadata, index)}.union(lossy)
        chunks = [c for e in metadata.extents for c in range(e.logical, e.logical + e.length)]
        left = extents.merge(extents.without(metadata.extents, set(chunks) - staying))
        after = replace(after, config=replacement.finished(config), extents=left)
    return Action(kind, name, details), after
