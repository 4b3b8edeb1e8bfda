# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The removal of a target, active or not, with every copy of its metadata (pure)."""

from __future__ import annotations

from collections.abc import Sequence

from . import copies, replacement
from .checks import check_not_reused, check_unused
from .devmapper import check_name
from .errors import Refused, count_of
from .format import Metadata
from .plan import Action, Plan, deactivation, no_state, state_of
from .request import Seen
from .target import ActiveTarget, configured, named_spare


def plan_absent(
    name: str, target: ActiveTarget | None, seen: Seen, discard_remaps: bool = False
) -> Plan:
    """Plan the removal of a target, with every copy of its metadata.

    Args:
        name: the target's name.
        target: the active target, if there is one.
        seen: the candidates are devices that may carry an inactive target's metadata.
        discard_remaps: remove it although remapped chunks live on spares only.

    Raises:
        Refused: it is in use, or data would be lost.
    """
    check_name(name)
    gone: list[Action] = []
    unsure: list[Action] = []
    if target:
        if target.device.open_count:
            raise Refused(
                f"is in use, opened {count_of(target.device.open_count, 'time')}",
                device=f"/dev/mapper/{name}",
                remedy="unmount it and close what uses it",
            )
        metadata = target.metadata
        choice = target.choice
        spares = target.spare_infos
        own = {info.devno for info in spares.values()}
        lost = [spare for spare in target.lost_spares if spare.path]
        own |= {spare.below for spare in lost}
        away = [
            candidate
            for candidate in seen.candidates
            if candidate.survey.target_uuid == metadata.target_uuid
            and candidate.info.devno not in own
        ]
        for candidate in away:
            check_unused(candidate.info, (), "spare to be wiped")
            check_not_reused(candidate)
        unsure = [
            *(
                Action("wipe_metadata", c.info.path, {"spare": str(c.survey.spare_uuid)})
                for c in away
            ),
            *(Action("wipe_metadata", spare.path, {"lost": True}) for spare in lost),
        ]
        gone = [
            *(deactivation(name, lost.index, lost.path) for lost in target.lost_spares),
            *(deactivation(name, stray.index, stray.path) for stray in target.strays),
        ]
    else:
        marked = {c.info.path: c for c in seen.candidates if not c.survey.empty}
        if not marked:
            actions = tuple(Action("remove_remains", left) for left in seen.remains)
            return Plan(name=name, actions=actions, before=no_state(), after=no_state())
        choice = copies.choose({path: c.survey for path, c in marked.items()})
        metadata = choice.metadata
        if metadata.config.get("name") != name:
            raise Refused(
                f"is a spare of target {metadata.config.get('name')!r}",
                device=", ".join(marked),
                remedy="give that name",
            )
        for candidate in marked.values():
            check_unused(candidate.info, seen.remains, "spare to be wiped")
            check_not_reused(candidate)
        spares = {index: c.info for index, c in enumerate(marked.values())}
    if metadata.extents and not discard_remaps:
        count = sum(extent.length for extent in metadata.extents)
        raise Refused(
            f"has {count_of(count, 'chunk')} whose data is on its spares only",
            device=name,
            remedy="copy the data off first, or give discard_remaps: true to lose those chunks",
        )
    if replacement.under_way(metadata) and not discard_remaps:
        raise Refused(
            "has its data on two disks, because its main is being replaced",
            device=name,
            remedy="let the replacement go on to its end or back, or give discard_remaps: true to "
            "lose what was copied already",
        )
    # What an interruption leaves in the kernel shows the next run which spares are to be wiped.
    # What is older goes first, so that what is left is the newest generation or nothing.
    older = choice.stale | choice.retired
    paths = sorted((info.path for info in spares.values()), key=lambda path: path not in older)
    wipes = [
        Action("note_removal", name),
        *unsure,
        *(Action("wipe_metadata", path) for path in paths),
    ]
    if target:
        actions = (
            Action("remove_target", f"/dev/mapper/{name}"),
            *wipes,
            *(deactivation(name, index, info.path) for index, info in spares.items()),
            *gone,
        )
    else:
        actions = (*wipes, *(Action("remove_remains", left) for left in seen.remains))
    return Plan(
        name=name,
        actions=actions,
        before=state_of(metadata, spares),
        after=no_state(),
        metadata=metadata,
        spares=spares,
        warnings=()
        if seen.removed
        else _left_behind(metadata, target, unsure, list(choice.spares)),
    )


def _left_behind(
    metadata: Metadata,
    target: ActiveTarget | None,
    wiped: Sequence[Action],
    reached: Sequence[int],
) -> tuple[str, ...]:
    """What the user should know of spares whose copies stay, because they are not there."""
    paths = {action.device for action in wiped}
    found = set(reached)
    if target:
        found |= {s.index for s in target.lost_spares if s.path in paths}
    return tuple(
        f"{named_spare(metadata, index)} is not there and keeps its metadata; wipe it before it "
        "is used again, by state: absent with it among the spares"
        for index in sorted(configured(metadata) - found)
        if not any(
            action.details.get("spare") == metadata.config["spares"][index]["uuid"]
            for action in wiped
        )
    )
