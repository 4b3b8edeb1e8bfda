# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The activation of a target from the metadata on its spares (pure)."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from . import copies, migration, replacement
from .blockdev import OWN_SIGNATURE, DeviceInfo
from .checks import (
    agrees_with,
    check_main_identity,
    check_not_reused,
    check_spare_identity,
    check_unused,
)
from .errors import Refused, count_of
from .format import Metadata, geometry_of
from .plan import (
    REPLACE,
    UNDO,
    Action,
    Plan,
    activations,
    creation,
    no_state,
    pool_warnings,
    state_of,
    warnings_of,
    with_config,
)
from .plan_replacement import replacement_step
from .plan_upkeep import repairs
from .request import Request, Seen, check_unchangeable, wanted_policies
from .target import Candidate, is_noted, named_spare, with_notes


def existing_metadata(request: Request, candidates: Sequence[Candidate]) -> copies.Choice | None:
    """The metadata to go on with, or None where the target begins anew."""
    marked = {c.info.path: c.survey for c in candidates if not c.survey.empty}
    if not marked:
        return None
    try:
        choice = copies.choose(marked)
    except copies.NoMetadata as error:
        if request.wipe:
            return None
        raise Refused(
            error.message,
            device=error.device,
            remedy="give an empty device, or wipe: true to erase it",
        ) from error
    except Refused:
        # Two histories, or a newer format: nobody can say what would be lost.
        if request.wipe and request.discard_remaps:
            return None
        raise
    name = choice.metadata.config.get("name")
    if request.wipe and (request.discard_remaps or not choice.metadata.extents):
        return None
    if name != request.name:
        raise Refused(
            f"is a spare of target {name!r}{_only_there(choice.metadata)}",
            device=", ".join(marked),
            remedy=f"give that name, or {_to_erase(choice.metadata)}",
        )
    if migration.unfinished(choice.metadata):
        for candidate in candidates:
            if not candidate.survey.empty:
                check_not_reused(candidate)
        if len(_unreached(choice, candidates)) < len(choice.missing):
            # Another spare might say that the migration has ended, and what is here is in use.
            raise Refused(
                "is one of several spares of a target whose migration has not ended as far as is "
                "known here, and not all of them are given",
                device=", ".join(marked),
                remedy=f"give all of them, or {_to_erase(choice.metadata)}",
            )
        return choice
    unreached = [c.info.path for _uuid, c in _unreached(choice, candidates)]
    unmarked = [c.info.path for c in candidates if c.survey.empty]
    if set(unmarked) - set(unreached):
        raise Refused(
            f"carries no metadata of target {name!r}, but {', '.join(marked)} does",
            device=", ".join(unmarked),
            remedy=f"give the target's own spares, or {_to_erase(choice.metadata)}",
        )
    for candidate in candidates:
        check_not_reused(candidate)
    return choice


def _only_there(metadata: Metadata) -> str:
    count = sum(extent.length for extent in metadata.extents)
    return f", and {count_of(count, 'remapped chunk')} of it can be on it only" if count else ""


def _to_erase(metadata: Metadata) -> str:
    if metadata.extents:
        return "wipe: true with discard_remaps: true to lose those chunks and begin anew"
    return "wipe: true to begin anew on all of the spares"


def _unreached(
    choice: copies.Choice, candidates: Sequence[Candidate]
) -> list[tuple[uuid.UUID, Candidate]]:
    """Candidates that the target's first commit names and did not reach, with the UUID.

    At the first generation no data is on any spare, so an interrupted creation can go on.
    """
    if choice.metadata.generation != 1:
        return []
    found = []
    # A cut can also leave copies of which none is whole.
    blank = [
        c
        for c in candidates
        if c.survey.spare_uuid is None and set(c.signatures) <= {OWN_SIGNATURE}
    ]
    for index in choice.missing:
        entry = choice.metadata.config["spares"][index]
        for candidate in blank:
            same_size = entry["geometry"]["spare_sectors"] == candidate.info.sectors
            if same_size and replacement.identity_of(candidate.info).items() <= entry.items():
                found.append((uuid.UUID(entry["uuid"]), candidate))
                blank.remove(candidate)
                break
    return found


def plan_activation(request: Request, main: DeviceInfo, seen: Seen, choice: copies.Choice) -> Plan:
    """Plan that a target is active which the chosen metadata describes."""
    metadata = choice.metadata
    mains = _mains_of(main, seen, metadata, request.trusted)
    check_unchangeable(request, metadata)
    unreached = _unreached(choice, seen.candidates)
    by_uuid = {c.survey.spare_uuid: c for c in seen.candidates if c.survey.spare_uuid}
    by_uuid.update(unreached)
    spares: dict[int, DeviceInfo] = {}
    missing: list[int] = []
    for index, entry in enumerate(metadata.config["spares"]):
        if entry is None:
            continue
        candidate = by_uuid.pop(uuid.UUID(entry["uuid"]), None)
        if candidate is None:
            missing.append(index)
            continue
        check_spare_identity(candidate.info, metadata, index, request.trusted)
        spares[index] = candidate.info
    if by_uuid:
        raise Refused(
            "is not a spare of this target any more",
            device=", ".join(c.info.path for c in by_uuid.values()),
            remedy="leave it out",
        )
    _check_not_removed(seen, [c.info.path for c in seen.candidates])
    _check_missing(request, seen, metadata, missing)
    actions = [Action("remove_remains", name) for name in seen.remains]
    actions += repairs(choice, spares)
    actions += [Action("repair_metadata", c.info.path) for _uuid, c in unreached]
    actions += activations(request.name, spares)
    noted = with_notes(metadata, missing)
    if noted.config != metadata.config:
        details = {"generation": metadata.generation + 1, "missing": missing}
        actions.append(Action("note_missing", request.name, details))
        noted = replace(noted, generation=metadata.generation + 1)
    after = noted
    actions.append(creation(request.name, mains[0], mains[1]))
    if mains[1] and request.carry_on:
        kind = REPLACE if main is mains[1] else UNDO
        action, after = replacement_step(kind, request.name, noted, mains[0], mains[1], missing)
        actions.append(action)
    geometries = {index: geometry_of(metadata, index) for index in spares}
    plan = Plan(
        name=request.name,
        actions=tuple(actions),
        before=no_state(),
        after=state_of(after, spares),
        metadata=metadata,
        main=mains[0],
        spares=spares,
        final=noted if noted.generation > metadata.generation else None,
        warnings=(
            *warnings_of(choice),
            *_doubts(metadata, missing, seen.witness),
            *pool_warnings(metadata, geometries),
        ),
        replacement=mains[1],
    )
    changed = wanted_policies(request, metadata.config)
    changed.update(_identities(noted.config, mains[0], spares, request.trusted))
    return with_config(plan, changed)


def _identities(
    config: Mapping[str, Any],
    main: DeviceInfo,
    spares: Mapping[int, DeviceInfo],
    trusted: Collection[str],
) -> dict[str, Any]:
    """What of the configuration changes where a trusted device is recorded as who it is now.

    From then on it is known by its hardware, and what it was copied from is the clone.
    """
    changed: dict[str, Any] = {}
    if main.devno in trusted:
        entry = replacement.as_seen(config["main"], main)
        if entry != config["main"]:
            changed["main"] = entry
    entries = [
        replacement.as_seen(entry, spares[index], hardware_only=True)
        if entry and index in spares and spares[index].devno in trusted
        else entry
        for index, entry in enumerate(config["spares"])
    ]
    if entries != config["spares"]:
        changed["spares"] = entries
    return changed


def _mains_of(
    main: DeviceInfo, seen: Seen, metadata: Metadata, trusted: Collection[str]
) -> tuple[DeviceInfo, DeviceInfo | None]:
    """The target's main, and the one that is to replace it, of which ``main`` is one."""
    if not replacement.under_way(metadata):
        check_main_identity(main, metadata, trusted)
        return main, None
    entry, old = metadata.config["replacement"], metadata.config["main"]
    others = [info for info in seen.others if info.devno != main.devno]
    if replacement.is_new_main(main, metadata):
        other = replacement.find_other(others, old, entry["old_path"], "old main")
        mains = other, main
    else:
        other = replacement.find_other(others, entry["main"], entry["main"]["path"], "new main")
        mains = main, other
    check_unused(other, seen.remains, "main")
    return mains


def _check_not_removed(seen: Seen, paths: Sequence[str]) -> None:
    if seen.removed:
        raise Refused(
            "belongs to a target that was removed from this host while it was not there",
            device=", ".join(paths),
            remedy="wipe it with state: absent and this device among the spares, or remove the "
            f"file {seen.removed} if the target is to live again",
        )


def _check_missing(
    request: Request, seen: Seen, metadata: Metadata, missing: Sequence[int]
) -> None:
    """Refuse to go on without spares, unless the user allows it and nothing speaks against it.

    Each commit goes to all spares that can be reached, and one is enough for it. So whatever the
    spares carry that are there, a missing one can have been written last, also one that has no
    chunk by their generation. Nothing but the user's word and the host's own backup can tell.
    """
    if not missing:
        return
    named = ", ".join(named_spare(metadata, index) for index in missing)
    if not request.degraded:
        raise Refused(
            f"would be activated without {named}",
            device=request.name,
            remedy="give all of the target's spares; or, if none of these was in use after the "
            "others, degraded: true, and the chunks on them give errors until they are back",
        )
    named_here = request.trusted.intersection(c.info.devno for c in seen.candidates)
    if not agrees_with(seen.witness, metadata) and not named_here:
        newest = seen.witness.generation if seen.witness else 0
        raise Refused(
            f"carries generation {metadata.generation}, but this host committed generation "
            f"{newest} of the target, which does not precede it and must be on {named}",
            device=", ".join(c.info.path for c in seen.candidates),
            remedy="attach these spares, or restore the host's backup",
        )


def _doubts(
    metadata: Metadata, missing: Sequence[int], witness: Metadata | None
) -> tuple[str, ...]:
    """What the user should know of spares that are missing, and of a backup that is newer."""
    found = []
    for index in missing:
        text = f"{named_spare(metadata, index)} is missing; these chunks give errors"
        if not is_noted(metadata, index):
            text += (
                f", and if it was in use after the others, which are at generation "
                f"{metadata.generation}, chunks that were remapped then have older data now"
            )
        found.append(text)
    if witness and not missing and not agrees_with(witness, metadata):
        found.append(
            f"generation {metadata.generation} is on all spares, but this host committed "
            f"generation {witness.generation}, which does not precede it; the disks were set back, "
            "or were used elsewhere"
        )
    return tuple(found)
