# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Spares of an active target that come, return and go (pure)."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from . import copies, pool, replacement
from .blockdev import DeviceInfo
from .checks import (
    agrees_with,
    check_certain,
    check_distinct,
    check_identity,
    check_not_replacing,
    check_not_reused,
    check_spare,
    check_unused,
)
from .errors import Refused, count_of
from .events import subtract_ranges
from .format import MAX_SPARES, Extent, Geometry, Metadata, geometry_of
from .mapping import linear_target
from .marks import SECTOR_BYTES
from .plan import Action, Plan, activations, deactivation, pool_warnings, state_of, warnings_of
from .plan_remap import choose_places, with_moves
from .plan_upkeep import plan_upkeep
from .stack import spare_part_names
from .target import (
    ActiveSpare,
    ActiveTarget,
    Candidate,
    chunks_on,
    configured,
    degradation,
    is_noted,
    member_index,
    named_spare,
    sectors_of,
    spare_index,
    spare_indexes,
    usable_geometries,
    with_notes,
)

# So many chunks leave a spare in one freeze: what waits for them must not wait for all.
DRAIN_CHUNKS = 64


@dataclass(frozen=True)
class SpareRequest:
    """A change of an active target's spares that the user wants.

    Args:
        name: the target.
        device: path of the spare; for one that is lost, its UUID will do.
        replaces: path or UUID of the spare that it stands in for.
        wipe: the new spare may hold something, which is erased, but for remapped chunks.
        discard_remaps: with ``wipe``, remapped chunks too; and what is on a spare that cannot be
            read may be given up.
    """

    name: str
    device: str
    replaces: str | None = None
    wipe: bool = False
    discard_remaps: bool = False


@dataclass(frozen=True)
class SpareSeen:
    """What was observed for a change of spares.

    Args:
        target: the active target.
        candidate: the device that is to be a spare, also if it is a lost one; None where it does
            not exist, or is to go.
        devnos: device numbers of the paths that were named, where they exist.
        witness: the newest of the host's backups of the target.
    """

    target: ActiveTarget
    candidate: Candidate | None
    devnos: Mapping[str, str] = field(default_factory=dict)
    witness: Metadata | None = None


@dataclass(frozen=True)
class SpareChange:
    """Spares that come and go: devices, and indexes.

    ``wipe`` and ``discard_remaps`` are those of `SpareRequest`, ``witness`` is that of `Seen`.
    Devices of lost spares that are there again may be among those that come.
    """

    added: tuple[Candidate, ...] = ()
    removed: tuple[int, ...] = ()
    wipe: bool = False
    discard_remaps: bool = False
    witness: Metadata | None = None


def plan_spare_present(
    request: SpareRequest, seen: SpareSeen, new_uuid: Callable[[], uuid.UUID] = uuid.uuid4
) -> Plan:
    """Plan that a device is a spare of an active target, and that another one is none any more.

    Raises:
        Refused: it cannot be one, or the other's chunks have no room; nothing was written.
    """
    target = seen.target
    index = spare_index(target, request.device, seen.devnos.get(request.device, ""))
    added: tuple[Candidate, ...] = ()
    if seen.candidate:
        added = (seen.candidate,)
        index = index_by_device(target, seen.candidate)
    elif index is None:
        raise Refused(
            "no such device", device=request.device, remedy="name an existing block device"
        )
    removed: tuple[int, ...] = ()
    if request.replaces is not None:
        old = spare_index(target, request.replaces, seen.devnos.get(request.replaces, ""))
        if old is None and index is None:
            raise Refused(
                f"is no spare of target {request.name!r}, so nothing can replace it",
                device=request.replaces,
                remedy=f"give one of {_listed(target)}, or leave out replaces",
            )
        if old is not None and old == index:
            raise Refused("cannot replace itself", device=request.device, remedy="give another")
        removed = () if old is None else (old,)
    change = SpareChange(added, removed, request.wipe, request.discard_remaps, seen.witness)
    return change_spares(target, target.main, change, new_uuid)


def plan_spare_absent(request: SpareRequest, seen: SpareSeen) -> Plan:
    """Plan that a device is no spare of an active target.

    Raises:
        Refused: its chunks have no room on others, or cannot be read; nothing was written.
    """
    target = seen.target
    index = spare_index(target, request.device, seen.devnos.get(request.device, ""))
    removed = () if index is None else (index,)
    change = SpareChange((), removed, request.wipe, request.discard_remaps)
    return change_spares(target, target.main, change, uuid.uuid4)


def index_by_device(target: ActiveTarget, candidate: Candidate) -> int | None:
    """The index of the spare that a device is; also of a lost one by the metadata on it."""
    index = spare_index(target, candidate.info.path, candidate.info.devno)
    if index is None and candidate.survey.target_uuid == target.metadata.target_uuid:
        for lost in target.lost_spares:
            if _is_spare(candidate, target.metadata, lost.index):
                return lost.index
    return index


def _is_spare(candidate: Candidate, metadata: Metadata, index: int) -> bool:
    entry = metadata.config["spares"][index]
    return candidate.survey.spare_uuid == uuid.UUID(entry["uuid"])


def _listed(target: ActiveTarget) -> str:
    paths = [spare.candidate.info.path for spare in target.spares]
    uuids = [target.metadata.config["spares"][lost.index]["uuid"] for lost in target.lost_spares]
    return ", ".join([*paths, *uuids])


def change_spares(
    target: ActiveTarget,
    main: DeviceInfo | None,
    change: SpareChange,
    new_uuid: Callable[[], uuid.UUID],
) -> Plan:
    """Plan that spares come and go: first all that come, then each that goes is emptied.

    Lost spares that are there again come first. Chunks of spares that go move to those that come,
    as long as these have room.

    Raises:
        Refused: a device cannot be a spare, or the chunks have no room; nothing was written.
    """
    upkeep = plan_upkeep(target)
    returns, warnings, added = _returns(target, change)
    if returns:
        upkeep, target = _with_returns(upkeep, target, returns)
    change = replace(change, added=added)
    upkeep = replace(upkeep, warnings=(*upkeep.warnings, *warnings))
    if not change.added and not change.removed:
        return upkeep
    check_certain(target)
    if change.removed:
        check_not_replacing(target, "no spare can be removed")
    if change.discard_remaps:
        # What they may know of the chunks on the move is given up with them.
        lost = sorted({spare.index for spare in target.lost_spares}.intersection(change.removed))
        upkeep = replace(
            upkeep,
            actions=tuple(
                replace(action, details={"without": lost})
                if action.kind == "thaw" and lost
                else action
                for action in upkeep.actions
            ),
        )
    additions, metadata, spares = _additions(target, main, change, new_uuid)
    after = replace(metadata, generation=target.metadata.generation + len(change.added))
    fresh = frozenset(set(spares) - {spare.index for spare in target.spares})
    _check_room(target, change, metadata, spares)
    removals: list[Action] = []
    for index in change.removed:
        moved, after = _emptying(target, change, index, fresh, spares, after)
        removals += moved
        entries = list(after.config["spares"])
        entries[index] = None
        after = replace(
            after, generation=after.generation + 1, config={**after.config, "spares": entries}
        )
        path = _path_of(target, index)
        details = {"index": index, "generation": after.generation}
        removals.append(Action("remove_spare", path, details))
        if index in spares:
            removals.append(Action("wipe_metadata", path))
        removals.append(deactivation(target.name, index, path))
    left = {index: info for index, info in spares.items() if index not in change.removed}
    return replace(
        upkeep,
        actions=(*upkeep.actions, *additions, *removals),
        after=state_of(after, left),
        metadata=metadata,
        spares=spares,
        final=after,
    )


def _returns(
    target: ActiveTarget, change: SpareChange
) -> tuple[dict[int, Candidate], tuple[str, ...], tuple[Candidate, ...]]:
    """Lost spares that are there again by index, why others cannot return, and the new devices.

    What is on a spare that was away is current for all chunks that the chosen generation has on
    it: nothing else took their writes, and no chunk gets the place of another meanwhile.

    Raises:
        Refused: it carries what does not belong to the target's history, or is a clone.
    """
    returns: dict[int, Candidate] = {}
    warnings: list[str] = []
    added = []
    used = {linear_target(s)[0] for s in target.table if s.target == "linear"}
    lost_spares = {lost.index: lost for lost in target.lost_spares}
    for candidate in change.added:
        index = index_by_device(target, candidate)
        if index is None:
            added.append(candidate)
            continue
        lost = lost_spares[index]
        if not _is_spare(candidate, target.metadata, index):
            # Its copies cannot be read.
            continue
        if lost.devno and lost.devno in used:
            warnings.append(
                f"{candidate.info.path}: spare {index} can be read again, but a flush must fail "
                "first, because it may have lost writes that were not flushed; flush the target, "
                "for example by sync, or with on_error: fail stop what uses it and activate it "
                "again"
            )
            continue
        _check_return(target, candidate, index)
        if index in returns:
            raise Refused(
                f"and {returns[index].info.path} are both spare {index}: one is a clone",
                device=candidate.info.path,
                remedy="leave the clone out",
            )
        returns[index] = candidate
    if returns:
        check_certain(target)
        _check_history(target, change, returns)
    return returns, tuple(warnings), tuple(added)


def _check_return(target: ActiveTarget, candidate: Candidate, index: int) -> None:
    info = candidate.info
    check_identity(info, target.metadata.config["spares"][index], f"spare {index}")
    check_not_reused(candidate)
    check_unused(info, spare_part_names(target.name, index), "spare")
    sectors = geometry_of(target.metadata, index).spare_sectors
    if info.sectors < sectors:
        raise Refused(
            f"has {info.sectors} sectors, but was laid out as spare {index} for {sectors}",
            device=info.path,
            remedy="restore its size",
        )
    for one in filter(None, (target.main, target.replacement)):
        check_distinct(one, [*(s.candidate.info for s in target.spares), info])


def _check_history(
    target: ActiveTarget, change: SpareChange, returns: Mapping[int, Candidate]
) -> None:
    """Refuse spares that carry what the running target does not build on."""
    metadata = target.metadata
    surveys = {s.candidate.info.path: s.candidate.survey for s in target.spares}
    surveys.update((c.info.path, c.survey) for c in returns.values())
    choice = copies.choose(surveys)
    if choice.metadata.digest != metadata.digest:
        raise Refused(
            f"carries generation {choice.metadata.generation}, but the target runs with "
            f"{metadata.generation}, and what was written since belongs to that",
            device=choice.source,
            remedy="decide which to keep: leave this spare out, or copy the data off first",
        )
    others = len(target.lost_spares) > len(returns)
    if others and not agrees_with(change.witness, metadata):
        raise Refused(
            f"runs with generation {metadata.generation}, but this host has committed another one "
            "since, which must be on a spare that is still missing",
            device=target.name,
            remedy="attach all of its spares",
        )


def _with_returns(
    upkeep: Plan, target: ActiveTarget, returns: Mapping[int, Candidate]
) -> tuple[Plan, ActiveTarget]:
    """The plan in which lost spares return, and the target as it is then."""
    metadata = target.metadata
    actions: list[Action] = []
    lost = {spare.index for spare in target.lost_spares} - set(returns)
    for index, candidate in sorted(returns.items()):
        details = {
            "index": index,
            "chunks": len(chunks_on(metadata, index)),
            "generation": metadata.generation + len(actions) + 1,
        }
        actions.append(Action("return_spare", candidate.info.path, details))
    back = [ActiveSpare(index, "", candidate) for index, candidate in returns.items()]
    after = with_notes(metadata, [i for i in lost if is_noted(metadata, i)])
    after = replace(after, generation=metadata.generation + len(actions))
    target = replace(
        target,
        spares=tuple(sorted([*target.spares, *back], key=lambda spare: spare.index)),
        lost_spares=tuple(s for s in target.lost_spares if s.index in lost),
        choice=replace(target.choice, metadata=after),
    )
    plan = replace(
        upkeep,
        actions=(*upkeep.actions, *actions),
        after=state_of(after, target.spare_infos),
        metadata=after,
        spares=target.spare_infos,
        warnings=(
            *warnings_of(target.choice),
            *degradation(target),
            *pool_warnings(after, usable_geometries(target)),
        ),
    )
    return plan, target


def _additions(
    target: ActiveTarget,
    main: DeviceInfo | None,
    change: SpareChange,
    new_uuid: Callable[[], uuid.UUID],
) -> tuple[list[Action], Metadata, dict[int, DeviceInfo]]:
    """Actions that add spares, and the metadata and the devices with all old and new ones."""
    metadata, name = target.metadata, target.name
    entries = list(metadata.config["spares"])
    spares = target.spare_infos
    _check_number(target, change)
    prepared: list[Action] = []
    activated: dict[int, DeviceInfo] = {}
    committed: list[Action] = []
    for candidate in change.added:
        info = candidate.info
        geometry = _check_addition(target, main, candidate, change)
        index = _free_index(target, entries)
        entry = {
            "uuid": str(new_uuid()),
            "geometry": geometry.to_dict(),
            **replacement.recorded(info, hardware_only=True),
        }
        entries[index : index + 1] = [entry]
        content = list(candidate.signatures)
        if content or not candidate.survey.empty:
            prepared.append(Action("wipe_spare", info.path, {"content": content}))
        chunks = pool.capacity(geometry, index, ()).total
        prepared.append(Action("format_spare", info.path, {"chunks": chunks}))
        activated[index] = info
        generation = metadata.generation + len(committed) + 1
        details = {"index": index, "generation": generation}
        committed.append(Action("add_spare", info.path, details))
    whole = replace(metadata, config={**metadata.config, "spares": entries})
    actions = [*prepared, *activations(name, activated), *committed]
    return actions, whole, {**spares, **activated}


def _free_index(target: ActiveTarget, entries: Sequence[Any]) -> int:
    # While a spare is lost, nobody knows that strays are none of the target's.
    taken = {stray.index for stray in target.strays} if target.lost_spares else set()
    for index, entry in enumerate(entries):
        if entry is None and index not in taken:
            return index
    if len(entries) == MAX_SPARES or len(entries) in taken:
        raise Refused(
            "has devices of a spare in the kernel that may be one, as a lost spare may know",
            device=target.name,
            remedy="attach the lost spare again, or remove it first",
        )
    return len(entries)


def _check_number(target: ActiveTarget, change: SpareChange) -> None:
    number = len(spare_indexes(target)) + len(change.added)
    if number > MAX_SPARES:
        raise Refused(
            f"would have {number} spares",
            device=target.name,
            remedy=f"remove one first; a target has 1 to {MAX_SPARES}, also while one is replaced",
        )


def _check_addition(
    target: ActiveTarget, main: DeviceInfo | None, candidate: Candidate, change: SpareChange
) -> Geometry:
    """The geometry of a new spare, after all checks that a new target's spares get too."""
    info, metadata = candidate.info, target.metadata
    if main is None:
        raise Refused(
            "has every chunk on spares and its main is not known, which a new spare must fit",
            device=target.name,
            remedy="activate it again with the target module first",
        )
    for one in filter(None, (main, target.replacement)):
        members = [*(spare.candidate for spare in target.spares), *change.added]
        check_distinct(one, [member.info for member in members])
    strays = {
        part
        for stray in target.strays
        for part in spare_part_names(target.name, stray.index)
        if stray.below == info.devno
    }
    check_unused(info, sorted(strays), "spare")
    seen = candidate.survey
    own = seen.target_uuid == metadata.target_uuid
    indexes = configured(metadata)
    if own and any(
        str(seen.spare_uuid) == metadata.config["spares"][index]["uuid"] for index in indexes
    ):
        raise Refused(
            "is a spare of this target, or a clone of one",
            device=info.path,
            remedy="give another device",
        )
    was = member_index(info, metadata)
    left = [lost.index for lost in target.lost_spares if lost.index == was]
    given_up = change.wipe and change.discard_remaps
    if left and chunks_on(metadata, left[0]) and not given_up:
        raise Refused(
            f"is {named_spare(metadata, left[0])}, and its metadata was overwritten",
            device=info.path,
            remedy="stop the target and restore the metadata from the host's backup; or give "
            "wipe: true with discard_remaps: true to lose those chunks",
        )
    count = max((sum(e.length for e in c.metadata.extents) for c in seen.copies), default=0)
    if change.wipe and not change.discard_remaps and count and not own:
        raise Refused(
            f"carries another target's metadata, and {count_of(count, 'remapped chunk')} of it can "
            "be on it only",
            device=info.path,
            remedy="give another device, or discard_remaps: true to lose those chunks",
        )
    return check_spare(
        candidate,
        main,
        metadata.config["chunk_sectors"] * SECTOR_BYTES,
        change.wipe or bool(strays),
    )


def _check_room(
    target: ActiveTarget,
    change: SpareChange,
    metadata: Metadata,
    spares: Mapping[int, DeviceInfo],
) -> None:
    """Refuse what cannot be done to its end, before anything is moved."""
    if not change.removed:
        return
    staying = [index for index in spares if index not in change.removed]
    going = ", ".join(_path_of(target, index) for index in change.removed)
    if not staying:
        raise Refused(
            f"would leave target {target.name!r} without a spare that works",
            device=going,
            remedy="add another spare first, or give one that replaces it; or remove the target",
        )
    free = sum(
        pool.capacity(geometry_of(metadata, index), index, metadata.extents).free
        for index in staying
    )
    needed = sum(len(chunks_on(metadata, index)) for index in change.removed)
    if needed > free:
        raise Refused(
            f"has {count_of(needed, 'chunk')}, and the other spares have "
            f"{count_of(free, 'free chunk')}",
            device=going,
            remedy="add a spare first, or give a larger one that replaces it",
        )


def _emptying(
    target: ActiveTarget,
    change: SpareChange,
    index: int,
    fresh: frozenset[int],
    spares: Mapping[int, DeviceInfo],
    metadata: Metadata,
) -> tuple[list[Action], Metadata]:
    """Actions that take all chunks off a spare, and the metadata then."""
    chunks = chunks_on(metadata, index)
    if not chunks:
        return [], metadata
    lost: list[tuple[int, int]] = []
    kind, path = "drain_spare", _path_of(target, index)
    if index not in spares:
        kind, lost = "discard_chunks", sectors_of(metadata, chunks)
        if not change.discard_remaps:
            raise Refused(
                f"cannot be used, and {count_of(len(chunks), 'chunk')} (sectors "
                f"{_ranges_text(lost)}) are on it only",
                device=path,
                remedy="attach it again, or give discard_remaps: true to lose these sectors",
            )
    usable = {
        number: geometry_of(metadata, number) for number in spares if number not in change.removed
    }
    places = choose_places(metadata, chunks, usable, metadata.extents, (), fresh)
    details = {
        "index": index,
        "chunks": len(chunks),
        "avoid": list(change.removed),
        "prefer": sorted(fresh),
        "lost": [{"start": start, "count": count} for start, count in lost],
    }
    generation = metadata.generation + -(-len(chunks) // DRAIN_CHUNKS)
    still = lost or [(item.sector, item.count) for item in metadata.lost]
    in_chunks = sectors_of(metadata, chunks)
    cut = still if lost else _inside(still, in_chunks)
    moves: dict[int, Extent | None] = {place.logical: place for place in places}
    after = with_moves(replace(metadata, generation=generation), moves, cut)
    return [Action(kind, path, details)], after


def _inside(
    ranges: Sequence[tuple[int, int]], windows: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    return subtract_ranges(ranges, subtract_ranges(ranges, windows))


def _ranges_text(ranges: Sequence[tuple[int, int]], shown: int = 8) -> str:
    text = ", ".join(f"{start}+{count}" for start, count in ranges[:shown])
    more = len(ranges) - shown
    return f"{text} and {count_of(more, 'more range')}" if more > 0 else text


def _path_of(target: ActiveTarget, index: int) -> str:
    """The path of a spare, or its UUID where it has none."""
    for spare in target.spares:
        if spare.index == index:
            return spare.candidate.info.path
    for lost in target.lost_spares:
        if lost.index == index and lost.path:
            return lost.path
    return str(target.metadata.config["spares"][index]["uuid"])
