# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Plans that bring the copies of the metadata on spares in order, by hand (pure).

`plan_upkeep` repairs what an active target or its activation needs. Here are the spares of a
target that is not active, and generations that come from a dump or a backup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import copies
from .blockdev import DeviceInfo
from .checks import check_identity, check_not_reused
from .errors import Refused, count_of
from .format import COPIES, Metadata, geometry_of, spare_uuid_of
from .plan import Action, Plan, warnings_of
from .plan_upkeep import plan_upkeep
from .target import ActiveTarget, Candidate, chunks_on


def plan_target_repair(target: ActiveTarget) -> Plan:
    """Plan the repair of the copies on an active target's spares, and nothing else."""
    plan = plan_upkeep(target)
    actions = tuple(action for action in plan.actions if action.kind == "repair_metadata")
    return Plan(
        name=plan.name,
        actions=actions,
        metadata=target.metadata,
        spares=target.spare_infos,
        warnings=warnings_of(target.choice),
    )


def _check_free(candidate: Candidate) -> None:
    info = candidate.info
    if info.used_by:
        raise Refused(
            "is in use: " + ", ".join(map(str, info.used_by)),
            device=info.path,
            remedy="release it first; the spares of an active target are repaired by its name",
        )
    if info.read_only:
        raise Refused("is read-only", device=info.path, remedy="make it writable")
    check_not_reused(candidate)


def _check_inactive(active: str, metadata: Metadata, path: str) -> None:
    if active:
        raise Refused(
            f"is of target {active}, which is active without it",
            device=path,
            remedy=f"repair the target by its name, or add the device with the module spare; "
            f"its metadata is at generation {metadata.generation}",
        )


def choice_among(candidates: Sequence[Candidate]) -> copies.Choice:
    """The generation that counts among devices; the errors are those of `copies.choose`."""
    return copies.choose({candidate.info.path: candidate.survey for candidate in candidates})


def plan_device_repair(candidates: Sequence[Candidate], active: str) -> Plan:
    """Plan the repair of the copies on spares of a target that is not active.

    Args:
        candidates: spares of one target. The newest generation on them counts.
        active: name of the active target that they belong to, "" if it is not active.

    Raises:
        Refused: a device is in use or read-only, is no spare, or was used for something else.
    """
    for candidate in candidates:
        _check_free(candidate)
    choice = choice_among(candidates)
    paths = ", ".join(candidate.info.path for candidate in candidates)
    _check_inactive(active, choice.metadata, paths)
    wrong = [c.info.path for c in candidates if c.info.path not in choice.spares.values()]
    if wrong:
        raise Refused(
            "is no spare of the target",
            device=", ".join(wrong),
            remedy="leave it out, or restore its metadata from a dump or a backup",
        )
    by_path = {candidate.info.path: candidate.info for candidate in candidates}
    spares = {index: by_path[path] for index, path in choice.spares.items()}
    for index, info in spares.items():
        check_identity(info, choice.metadata.config["spares"][index], f"spare {index}")
        _check_size(info, choice.metadata, index)
    return Plan(
        name=str(choice.metadata.config.get("name", "")),
        actions=tuple(
            Action(
                "repair_metadata",
                info.path,
                {
                    "generation": choice.metadata.generation,
                    "copies": [fault.index for fault in choice.damaged.get(info.path, ())]
                    or list(range(COPIES)),
                },
            )
            for info in spares.values()
            if info.path in choice.damaged or info.path in choice.stale
        ),
        metadata=choice.metadata,
        spares=spares,
        warnings=choice.warnings,
    )


@dataclass(frozen=True)
class Known:
    """What the host knows of a target whose metadata is to be restored.

    Args:
        active: name of the active target with that UUID, "" if there is none.
        generation: newest generation among the host's backups, 0 if there is none.
    """

    active: str = ""
    generation: int = 0


def spare_for(metadata: Metadata, candidate: Candidate, wanted: int | None) -> int:
    """Which spare of the target a device is, as its position in the configuration.

    Args:
        metadata: the target's.
        candidate: the device.
        wanted: what the user says; None decides by the copies on the device, and then by its
            serial number and WWN.

    Raises:
        Refused: it is none, or nothing tells.
    """
    info = candidate.info
    entries = {i: entry for i, entry in enumerate(metadata.config["spares"]) if entry}
    listed = ", ".join(
        f"{i} ({entry.get('serial') or 'no serial'}, {entry['uuid']})"
        for i, entry in entries.items()
    )
    if wanted is not None and wanted not in entries:
        raise Refused(
            f"there is no spare {wanted}", device=info.path, remedy=f"use one of {listed}"
        )
    marked = [i for i in entries if spare_uuid_of(metadata, i) == candidate.survey.spare_uuid]
    if marked and wanted not in (None, marked[0]):
        raise Refused(
            f"has copies of spare {marked[0]}, not {wanted}",
            device=info.path,
            remedy="leave the number out",
        )
    if wanted is None and not marked:
        marked = [
            i
            for i, entry in entries.items()
            if any(getattr(info, key) and getattr(info, key) == entry.get(key) for key in _IDENTITY)
        ]
        if len(marked) != 1:
            raise Refused(
                "nothing tells which spare of the target it is",
                device=info.path,
                remedy=f"say so with --spare, if you are sure: {listed}",
            )
    index = marked[0] if wanted is None else wanted
    check_identity(info, entries[index], f"spare {index}")
    return index


_IDENTITY = ("serial", "wwn")


def _check_size(info: DeviceInfo, metadata: Metadata, index: int) -> None:
    needed = geometry_of(metadata, index).spare_sectors
    if info.sectors < needed:
        raise Refused(
            f"has {info.sectors} sectors, fewer than the {needed} that spare {index} was laid out "
            "for",
            device=info.path,
            remedy="restore its size, or give the right device",
        )


def plan_restore(
    metadata: Metadata,
    candidate: Candidate,
    index: int,
    formatted: bool,
    known: Known,
    allow_older: bool = False,
) -> Plan:
    """Plan to write a generation to one spare of its target.

    Args:
        metadata: the generation, from a dump or a backup.
        candidate: the device.
        index: which spare it is, see `spare_for`.
        formatted: whether dm-integrity has formatted its tag area.
        known: what the host knows of the target.
        allow_older: the generation may be older than the host's newest backup.

    Raises:
        Refused: the device is in use, somebody else's, too small, or holds something newer or
            something that contradicts; or remapped chunks would have to be on it and are not.
        SplitBrain: what is on the device is of another history.
    """
    info = candidate.info
    _check_free(candidate)
    _check_inactive(known.active, metadata, info.path)
    _check_size(info, metadata, index)
    warnings = _check_older(metadata, candidate)
    if known.generation > metadata.generation and not allow_older:
        raise Refused(
            f"generation {metadata.generation} is older than generation {known.generation}, of "
            "which this host has a backup: what was remapped since would be lost",
            device=info.path,
            remedy="restore the newest generation, or give --allow-older",
        )
    chunks = len(chunks_on(metadata, index))
    if chunks and not formatted:
        raise Refused(
            f"has no formatted tag area, so the {count_of(chunks, 'chunk')} that spare {index} "
            "holds cannot be on it",
            device=info.path,
            remedy="give the spare that holds them",
        )
    actions = [] if formatted else [Action("format_spare", info.path)]
    whole = [c for c in candidate.survey.copies if c.header.digest == metadata.digest]
    if len(whole) < COPIES or candidate.survey.failed or not formatted:
        details = {"generation": metadata.generation, "spare": index}
        actions.append(Action("write_copies", info.path, details))
    return Plan(
        name=str(metadata.config.get("name", "")),
        actions=tuple(actions),
        metadata=metadata,
        spares={index: info},
        warnings=warnings,
    )


def _check_older(metadata: Metadata, candidate: Candidate) -> tuple[str, ...]:
    """Refuse a device with anything but earlier copies of the target; warnings."""
    path, survey = candidate.info.path, candidate.survey
    try:
        there = copies.choose({path: survey}).metadata
    except copies.NoMetadata:
        return ()
    if there.target_uuid != metadata.target_uuid:
        raise Refused(
            f"is a spare of target {there.config.get('name')!r} ({there.target_uuid})",
            device=path,
            remedy="give another device",
        )
    if there.generation > metadata.generation:
        raise Refused(
            f"carries generation {there.generation}, newer than generation {metadata.generation}",
            device=path,
            remedy="repair what is on it instead",
        )
    found = [(path, copy) for copy in survey.copies]
    return tuple(map(str, copies.check_lineage(metadata, found)))
