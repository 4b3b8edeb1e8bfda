# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What brings a target to what a request wants: desired and observed state to a plan (pure).

The plan of a target that is to be created, activated or given another main comes from the module
that is called after it. Here is what they have in common, and the plan of a target that is active.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from . import migration, replacement
from .blockdev import DeviceInfo
from .checks import check_certain, check_distinct, check_unused
from .errors import Refused
from .format import Metadata
from .plan import Action, Plan, with_config
from .plan_activation import existing_metadata, plan_activation
from .plan_creation import plan_creation
from .plan_replacement import with_replacement
from .plan_spares import SpareChange, change_spares, index_by_device
from .request import (
    Request,
    Seen,
    check_request,
    check_unchangeable,
    wanted_errors,
    wanted_policies,
    wanted_shim,
)
from .target import NO_SHIM, RAID_SHIM, ActiveTarget, shim_of, spare_index, spare_indexes


def plan_present(
    request: Request, seen: Seen, new_uuid: Callable[[], uuid.UUID] = uuid.uuid4
) -> Plan:
    """Plan the target's creation, its activation from its metadata, or nothing.

    Raises:
        Refused: what is wanted cannot be had safely; nothing was written.
    """
    check_request(request)
    _check_old_spare(request, seen)
    if seen.target:
        _check_migrated(request, seen.target.metadata)
        return _plan_active(request, seen.target, seen, new_uuid)
    main = _present(seen.main, request.main)
    _check_names(seen)
    check_distinct(main, [c.info for c in seen.candidates])
    check_unused(main, seen.remains, "main")
    for candidate in seen.candidates:
        check_unused(candidate.info, seen.remains, "spare")
    choice = existing_metadata(request, seen.candidates)
    if choice:
        _check_migrated(request, choice.metadata)
        if not migration.unfinished(choice.metadata):
            return plan_activation(request, main, seen, choice)
    if seen.absent:
        raise Refused(
            "cannot be read, and no other spare carries the target's metadata",
            device=", ".join(seen.absent),
            remedy="attach one of the target's spares, or name existing devices for a new target",
        )
    # What was never active is still where it came from, so all that is on its spares can go.
    begun = frozenset(c.info.path for c in seen.candidates if choice and not c.survey.empty)
    return plan_creation(request, main, seen, new_uuid, begun)


def _present(info: DeviceInfo | None, path: str) -> DeviceInfo:
    if info is None:
        raise Refused("no such device", device=path or "''", remedy="name an existing block device")
    return info


def _check_names(seen: Seen) -> None:
    if seen.taken:
        raise Refused(
            "is a mapped device of something else, whose name the target would need",
            device=f"/dev/mapper/{seen.taken[0]}",
            remedy="choose another name for the target, or remove that device",
        )


def _check_old_spare(request: Request, seen: Seen) -> None:
    """Refuse what contradicts itself about the spare that the target is to be migrated from."""
    if request.migrate_from is None:
        if request.migrate_pending is not None or request.migrate_unit is not None:
            raise Refused(
                "says how to migrate, but not from where",
                device=request.name,
                remedy="give migrate_from, or leave out migrate_pending and migrate_unit",
            )
        return
    old = seen.old_spare
    if old and any(c.info.devno == old.info.devno for c in seen.candidates):
        raise Refused(
            "is the spare to be migrated from, which stays as it is, and a new spare at once",
            device=old.info.path,
            remedy="give other devices as spares; once the target is migrated, leave out "
            "migrate_from",
        )


def _check_migrated(request: Request, metadata: Metadata) -> None:
    """Refuse to leave out a migration that was asked for or begun."""
    if request.migrate_from is None and migration.unfinished(metadata):
        raise Refused(
            "was being migrated from a dm-remap-v4 spare, and that has not ended",
            device=request.name,
            remedy="give migrate_from again, or wipe: true with discard_remaps: true to begin "
            "without it",
        )
    if request.migrate_from is not None and "migration" not in metadata.config:
        raise Refused(
            "exists already and was not migrated, so nothing of the old spare can be put into it",
            device=request.name,
            remedy="leave out migrate_from, or remove the target and begin anew",
        )


def _plan_active(
    request: Request, target: ActiveTarget, seen: Seen, new_uuid: Callable[[], uuid.UUID]
) -> Plan:
    main = _present(seen.main, request.main)
    check_unchangeable(request, target.metadata)
    check_distinct(main, [c.info for c in seen.candidates])
    lost = {spare.index for spare in target.lost_spares}
    known = {index_by_device(target, candidate) for candidate in seen.candidates}
    if request.degraded or replacement.under_way(target.metadata):
        # A lost spare cannot be named nor removed then, and the replacement must be able to go on.
        known |= lost
    change = SpareChange(
        added=tuple(
            candidate
            for candidate in seen.candidates
            if spare_index(target, candidate.info.path, candidate.info.devno) in (None, *lost)
        ),
        removed=tuple(index for index in spare_indexes(target) if index not in known),
        wipe=request.wipe,
        discard_remaps=request.discard_remaps,
        witness=seen.witness,
    )
    begun = change_spares(target, main, change, new_uuid)
    plan = _with_settings(request, target, seen, main, begun)
    replaced = with_replacement(request, target, seen, main, plan)
    kinds = {action.kind for action in begun.actions}
    if replaced is not plan and kinds & {"add_spare", "remove_spare", "return_spare"}:
        raise Refused(
            "would get another main and other spares at once",
            device=request.name,
            remedy="change the one and then the other",
        )
    return replaced


def _with_settings(
    request: Request, target: ActiveTarget, seen: Seen, main: DeviceInfo, begun: Plan
) -> Plan:
    """The plan that also brings configuration and kernel to what the request says."""
    config = target.metadata.config
    changed: dict[str, Any] = {}
    if request.on_error is not None and request.on_error != config["on_error"]:
        changed["on_error"] = wanted_errors(request, seen)
    if request.shim is not None and wanted_shim(request, main) != shim_of(target.metadata):
        changed["shim"] = wanted_shim(request, main)
    changed.update(wanted_policies(request, config))
    plan = with_config(begun, changed)
    after = {**config, **changed}
    actions = []
    other_shim = after.get("shim", NO_SHIM) != (RAID_SHIM if target.shim else NO_SHIM)
    if changed or other_shim:
        check_certain(target)
    if other_shim:
        actions.append(Action("remove_shim" if target.shim else "insert_shim", target.name))
    if after["on_error"] != target.errors:
        kind = "hold_errors" if target.path is None else "pass_errors"
        actions.append(Action(kind, target.name))
    elif target.path and not target.path.queueing:
        actions.append(Action("restore_hold", target.name))
    return replace(plan, actions=(*plan.actions, *actions))
