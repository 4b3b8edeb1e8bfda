# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The restoration of a target's metadata from the host's backup (pure)."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace

from . import copies, pool, replacement
from .blockdev import DeviceInfo
from .checks import (
    check_distinct,
    check_identity,
    check_main_identity,
    check_not_reused,
    check_spare,
    check_unused,
)
from .devmapper import check_name
from .errors import Refused
from .format import MAX_SPARES, Metadata, geometry_of
from .marks import SECTOR_BYTES
from .plan import Action, Plan, no_state, state_of
from .target import (
    Candidate,
    chunks_on,
    configured,
    index_of_uuid,
    member_index,
    named_spare,
    with_notes,
)


@dataclass(frozen=True)
class RestoreRequest:
    """The host's backup of an inactive target is to be written to devices again.

    Args:
        name: the target.
        main: path of main.
        spares: its spares that are left, with or without metadata; and empty devices, which become
            new spares of it.
        degraded: spares of it may be missing.
        wipe: new spares may hold something, which is erased, but for copies of metadata.
    """

    name: str
    main: str
    spares: tuple[str, ...]
    degraded: bool = False
    wipe: bool = False


@dataclass(frozen=True)
class RestoreSeen:
    """What was observed for a restoration.

    Args:
        backup: the generation that is to be restored.
        active: whether a target of that name, or that target, is active.
        remains: mapped devices that an interrupted command of ours left under that name.
        taken: mapped devices of others that have a name which the target needs.
        main: the device that is main.
        candidates: the devices that were named as spares.
        tagged: paths of candidates that have dm-integrity's superblock where the backup says.
        removed: path of the host's note that the target was removed on purpose; else empty.
    """

    backup: Metadata
    active: bool
    remains: tuple[str, ...]
    taken: tuple[str, ...]
    main: DeviceInfo
    candidates: tuple[Candidate, ...]
    tagged: frozenset[str] = frozenset()
    removed: str = ""


def plan_restore(
    request: RestoreRequest, seen: RestoreSeen, new_uuid: Callable[[], uuid.UUID] = uuid.uuid4
) -> Plan:
    """Plan to write the metadata of a backup to the spares that are left, and to new ones.

    Data and tag areas of the target's own spares are not touched. Those that are missing stay in
    the configuration: their chunks give errors until they are back or are given up. The target is
    not activated by it; `plan_present` does that, with ``degraded`` where spares are missing.

    Raises:
        Refused: it cannot be done safely; nothing was written.
    """
    backup = seen.backup
    check_name(request.name)
    _check_restorable(request, seen)
    members, fresh = _members_and_fresh(request, seen)
    missing = sorted(configured(backup) - set(members))
    if missing and not request.degraded:
        raise Refused(
            "would be restored without "
            + ", ".join(named_spare(backup, index) for index in missing),
            device=request.name,
            remedy="give these spares too, or degraded: true, and the chunks on them give errors",
        )
    noted = with_notes(backup, missing)
    entries = list(noted.config["spares"])
    actions = [Action("remove_remains", name) for name in seen.remains]
    spares = {index: candidate.info for index, candidate in members.items()}
    for index, info in spares.items():
        if info.path not in seen.tagged:
            # Nothing is on it, and old tags must not make old data valid.
            chunks = pool.capacity(geometry_of(backup, index), index, ()).total
            actions.append(Action("format_spare", info.path, {"chunks": chunks}))
    for candidate in fresh:
        index = next((i for i, entry in enumerate(entries) if entry is None), len(entries))
        if index == MAX_SPARES:
            raise Refused(
                f"would have more than {MAX_SPARES} spares, the missing ones included",
                device=request.name,
                remedy="give fewer new spares",
            )
        geometry = check_spare(
            candidate, seen.main, backup.config["chunk_sectors"] * SECTOR_BYTES, request.wipe
        )
        entries[index : index + 1] = [
            {
                "uuid": str(new_uuid()),
                "geometry": geometry.to_dict(),
                **replacement.recorded(candidate.info, hardware_only=True),
            }
        ]
        spares[index] = candidate.info
        content = list(candidate.signatures)
        if content or not candidate.survey.empty:
            actions.append(Action("wipe_spare", candidate.info.path, {"content": content}))
        chunks = pool.capacity(geometry, index, ()).total
        actions.append(Action("format_spare", candidate.info.path, {"chunks": chunks}))
    after = replace(noted, generation=_above_all(seen), config={**noted.config, "spares": entries})
    details = {"from": backup.generation, "generation": after.generation}
    actions.append(Action("restore_metadata", request.name, details))
    doubt = (
        f"the backup is of generation {backup.generation}; chunks that were remapped after it, if "
        "any, have main's older data now"
    )
    spares = dict(sorted(spares.items()))
    return Plan(
        name=request.name,
        actions=tuple(actions),
        before=no_state(),
        after=state_of(after, spares),
        metadata=after,
        main=seen.main,
        spares=spares,
        warnings=(
            doubt,
            *(f"{named_spare(backup, i)} is missing; these chunks give errors" for i in missing),
        ),
    )


def _check_restorable(request: RestoreRequest, seen: RestoreSeen) -> None:
    name = seen.backup.config.get("name")
    if name != request.name:
        raise Refused(f"the backup is of target {name!r}", device=request.name, remedy="name it")
    if seen.active:
        raise Refused(
            "is active, so its metadata is on its spares",
            device=request.name,
            remedy="repair it with the target module",
        )
    if seen.taken:
        raise Refused(
            "is a mapped device of something else, whose name the target would need",
            device=f"/dev/mapper/{seen.taken[0]}",
            remedy="remove that device",
        )
    if seen.removed:
        raise Refused(
            "was removed from this host on purpose, so its main and spares may have other data now",
            device=request.name,
            remedy=f"remove the file {seen.removed} if it is to live again",
        )
    if not request.spares:
        raise Refused("has no spare to be restored to", device=request.name, remedy="give one")
    if not replacement.under_way(seen.backup):
        check_main_identity(seen.main, seen.backup)
    check_distinct(seen.main, [c.info for c in seen.candidates])
    check_unused(seen.main, seen.remains, "main")
    for candidate in seen.candidates:
        check_unused(candidate.info, seen.remains, "spare")


def _members_and_fresh(
    request: RestoreRequest, seen: RestoreSeen
) -> tuple[dict[int, Candidate], list[Candidate]]:
    """The target's own spares by index, and the devices that are new to it."""
    members: dict[int, Candidate] = {}
    fresh = []
    for candidate in seen.candidates:
        info, backup = candidate.info, seen.backup
        _check_older(candidate, backup)
        index = member_index(info, backup)
        if candidate.survey.spare_uuid:
            index = index_of_uuid(backup, candidate.survey.spare_uuid)
        if index is None:
            _check_no_member(info, backup)
            fresh.append(candidate)
            continue
        check_identity(info, backup.config["spares"][index], f"spare {index}")
        check_not_reused(candidate)
        if info.path not in seen.tagged and chunks_on(backup, index):
            raise Refused(
                f"is spare {index}, but its checksum tags were overwritten too, so nothing tells "
                "good data on it from other",
                device=info.path,
                remedy="leave it out",
            )
        if index in members:
            raise Refused(
                f"and {members[index].info.path} are both spare {index}: one is a clone",
                device=info.path,
                remedy="leave the clone out",
            )
        members[index] = candidate
    return members, fresh


def _check_older(candidate: Candidate, backup: Metadata) -> None:
    """Refuse a device with any sign of metadata that the backup does not continue."""
    info, survey = candidate.info, candidate.survey
    if survey.newer:
        raise Refused(
            "carries metadata of a newer format",
            device=info.path,
            remedy="use a version of the collection that knows it",
        )
    for header in survey.headers:
        spares = {uuid.UUID(backup.config["spares"][i]["uuid"]) for i in configured(backup)}
        if header.target_uuid != backup.target_uuid or header.spare_uuid not in spares:
            raise Refused(
                f"carries metadata of spare {header.spare_uuid} of target {header.target_uuid}, "
                "which is not in the backup",
                device=info.path,
                remedy="give the target's own spares, and new ones that are empty",
            )
        if header.generation > backup.generation:
            raise Refused(
                f"carries generation {header.generation}, newer than the backup's "
                f"{backup.generation}",
                device=info.path,
                remedy="activate the target from its spares, with degraded: true where some are "
                "missing",
            )
        if copies.is_ancestor(backup, header.generation, header.digest) is False:
            raise Refused(
                f"carries a generation {header.generation} that the backup's "
                f"{backup.generation} does not descend from",
                device=info.path,
                remedy="decide which to keep; leave this device out to restore the backup",
            )
    if survey.contested:
        raise Refused("is more than one spare", device=info.path, remedy="leave it out")


def _check_no_member(info: DeviceInfo, backup: Metadata) -> None:
    """Refuse to take for new what has the serial number or the WWN of one of the spares."""
    for index in sorted(configured(backup)):
        entry, mine = backup.config["spares"][index], replacement.identity_of(info)
        if any(mine[key] and mine[key] == entry.get(key) for key in ("serial", "wwn")):
            raise Refused(
                f"has the serial number or the WWN of spare {index}, but not its size and model",
                device=info.path,
                remedy="restore its size, or give another device",
            )


def _above_all(seen: RestoreSeen) -> int:
    """A generation above every one that is known of."""
    found = [header.generation for c in seen.candidates for header in c.survey.headers]
    return max([seen.backup.generation, *found]) + 1
