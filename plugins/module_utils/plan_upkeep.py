# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What an active target needs to be whole (pure)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from . import copies
from .blockdev import DeviceInfo
from .format import Diagnosis
from .plan import Action, Plan, deactivation, pool_warnings, state_of, warnings_of
from .target import ActiveTarget, degradation, fails_in_map, usable_geometries


def plan_upkeep(target: ActiveTarget) -> Plan:
    """Plan what an active target needs to be whole: end an interrupted remap, repair copies."""
    spares = target.spare_infos
    actions = repairs(target.choice, spares, target.choice.missing)
    if target.frozen or target.map.suspended:
        actions.append(Action("thaw", target.name))
    elif not target.tidy:
        actions.append(Action("tidy", target.name))
    if target.path and (target.past_hold or target.certain and target.cut != target.unavailable):
        details = {"sectors": [list(item) for item in target.unavailable]}
        actions.append(Action("cut_off", target.name, details))
    shut = [spare.index for spare in target.spares if fails_in_map(target, spare.index)]
    if target.path is None and target.certain and not target.frozen and shut:
        actions.append(Action("serve_spares", target.name, {"indexes": shut}))
    # A spare that cannot be read may have a newer generation, of which they are spares.
    for stray in target.strays if not target.lost_spares else ():
        if stray.marked:
            actions.append(Action("wipe_metadata", stray.path))
        actions.append(deactivation(target.name, stray.index, stray.path))
    state = state_of(target.metadata, spares)
    return Plan(
        name=target.device.name,
        actions=tuple(actions),
        before=state,
        after=state,
        metadata=target.metadata,
        main=target.main,
        spares=spares,
        warnings=warnings_of(target.choice)
        + degradation(target)
        + pool_warnings(target.metadata, usable_geometries(target)),
    )


def repairs(
    choice: copies.Choice, spares: Mapping[int, DeviceInfo], blank: Collection[int] = ()
) -> list[Action]:
    """The actions that repair copies of the metadata, and bring spares to the chosen generation.

    ``blank`` are indexes of further spares that need it.
    """
    # A copy that cannot be read may never be writable again, so it alone is no reason to write:
    # every commit tries it anyway.
    needing = {
        path
        for path, faults in choice.damaged.items()
        if any(fault.diagnosis is not Diagnosis.UNREADABLE for fault in faults)
    } | choice.stale
    return [
        Action("repair_metadata", info.path)
        for index, info in spares.items()
        if info.path in needing or index in blank
    ]
