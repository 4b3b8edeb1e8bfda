# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which chunks move to spares or back to main, and to which places (pure)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from . import extents, pool
from .checks import check_certain, check_not_replacing
from .errors import Refused, StaleGeneration
from .events import subtract_ranges
from .format import Extent, Geometry, LostRange, Metadata
from .marks import SECTOR_BYTES
from .plan import Action, Plan, pool_warnings, state_of, warnings_of
from .plan_upkeep import plan_upkeep
from .target import ActiveTarget, degradation, usable_geometries, where


def plan_remap(
    target: ActiveTarget,
    ranges: Sequence[tuple[int, int]],
    expected_generation: int | None = None,
    avoid: Sequence[tuple[int, int]] = (),
) -> Plan:
    """Plan the remap of every chunk that ``ranges`` touch and that is still on main.

    Args:
        target: the active target.
        ranges: pairs of first sector and count on the target.
        expected_generation: refuse unless the metadata is at this generation.
        avoid: pairs of spare index and chunk that must not be used.

    Raises:
        StaleGeneration: the metadata is at another generation.
        Refused: a range is not on the target or cuts a block, or the spares are full.
    """
    metadata = target.metadata
    chunks = [
        chunk
        for chunk in _chunks_asked(target, ranges, expected_generation)
        if extents.find(metadata.extents, chunk) is None
    ]
    try:
        placed = allocate(metadata, chunks, usable_geometries(target), metadata.extents, avoid)
    except Refused as error:
        raise Refused(error.message, device=target.name, remedy=error.remedy) from error
    upkeep = plan_upkeep(target)
    plan = remap_actions(target, placed, ())
    return replace(
        plan,
        actions=upkeep.actions + plan.actions,
        warnings=warnings_of(target.choice) + degradation(target) + plan.warnings,
    )


def plan_return(
    target: ActiveTarget,
    ranges: Sequence[tuple[int, int]],
    expected_generation: int | None = None,
    unreadable: Sequence[tuple[int, int]] = (),
) -> Plan:
    """Plan the return to main of every chunk that ``ranges`` touch and that is on a spare.

    Args:
        target: the active target.
        ranges: pairs of first sector and count on the target.
        expected_generation: refuse unless the metadata is at this generation.
        unreadable: sectors of the target that cannot be read now, sorted and apart; their chunks
            stay where they are.

    Raises:
        StaleGeneration: the metadata is at another generation.
        Refused: a range is not on the target or cuts a block, or main is not known.
    """
    chunk_sectors = target.metadata.config["chunk_sectors"]
    staying = {start // chunk_sectors for start, _count in unreadable}
    chunks = [
        chunk
        for chunk in _chunks_asked(target, ranges, expected_generation)
        if extents.find(target.metadata.extents, chunk) and chunk not in staying
    ]
    if chunks:
        check_not_replacing(target, "no chunk can return to it")
    if chunks and target.main is None:
        raise Refused(
            "has every chunk on spares, and its main is not known",
            device=target.name,
            remedy="remove the target from use and activate it again with the target module",
        )
    upkeep = plan_upkeep(target)
    plan = return_actions(target, chunks)
    return replace(plan, actions=upkeep.actions + plan.actions, warnings=upkeep.warnings)


def return_actions(target: ActiveTarget, chunks: Sequence[int]) -> Plan:
    """The plan that returns chunks from spares to main, without any upkeep."""
    metadata = target.metadata
    actions = []
    for chunk in chunks:
        place = extents.place_of(metadata.extents, chunk)
        if place is None:
            raise AssertionError("only chunks on spares return")
        details = {**where(metadata, chunk), "spare": place.spare, "spare_chunk": place.physical}
        actions.append(Action("return_chunk", target.name, details))
    return _moving(target, actions, dict.fromkeys(chunks), ())


def remap_actions(
    target: ActiveTarget, placed: Sequence[Extent], lost: Sequence[tuple[int, int]]
) -> Plan:
    """The plan that remaps chunks to given places, without any upkeep.

    Args:
        target: the active target.
        placed: the new extents, of one chunk each.
        lost: pairs of first sector and count that are lost by it.
    """
    actions = []
    for extent in placed:
        details = {
            **where(target.metadata, extent.logical),
            "spare": extent.spare,
            "spare_chunk": extent.physical,
        }
        actions.append(Action("remap_chunk", target.name, details))
    moves: dict[int, Extent | None] = {extent.logical: extent for extent in placed}
    return replace(_moving(target, actions, moves, lost), placed=tuple(placed))


def _chunks_asked(
    target: ActiveTarget, ranges: Sequence[tuple[int, int]], expected_generation: int | None
) -> list[int]:
    metadata, name = target.metadata, target.name
    check_certain(target)
    if expected_generation is not None and metadata.generation != expected_generation:
        raise StaleGeneration(
            f"is at generation {metadata.generation}, not {expected_generation}",
            device=name,
            remedy="look at the target again and decide anew",
        )
    _check_whole_blocks(name, ranges, metadata.config["block_sectors"])
    try:
        return extents.chunks_of(
            ranges, metadata.config["chunk_sectors"], metadata.config["main"]["sectors"]
        )
    except Refused as error:
        raise Refused(error.message, device=name, remedy=error.remedy) from error


def _check_whole_blocks(name: str, ranges: Sequence[tuple[int, int]], block_sectors: int) -> None:
    for start, count in ranges:
        if start % block_sectors or count % block_sectors:
            raise Refused(
                f"sectors {start}+{count} are not whole blocks of "
                f"{block_sectors * SECTOR_BYTES} bytes",
                device=name,
                remedy=f"give multiples of {block_sectors} as first sector and count",
            )


def _moving(
    target: ActiveTarget,
    actions: Sequence[Action],
    moves: Mapping[int, Extent | None],
    lost: Sequence[tuple[int, int]],
) -> Plan:
    """The plan with these actions, which move chunks, and one commit."""
    metadata = after = target.metadata
    spares = target.spare_infos
    if moves:
        after = with_moves(replace(metadata, generation=metadata.generation + 1), moves, lost)
        commit = Action("commit_metadata", target.name, {"generation": after.generation})
        actions = [*actions, commit]
    return Plan(
        name=target.name,
        actions=tuple(actions),
        before=state_of(metadata, spares),
        after=state_of(after, spares),
        metadata=metadata,
        main=target.main,
        spares=spares,
        warnings=pool_warnings(after, usable_geometries(target)),
    )


def with_moves(
    metadata: Metadata,
    moves: Mapping[int, Extent | None],
    lost: Sequence[tuple[int, int]],
) -> Metadata:
    """The metadata after chunks have moved.

    Args:
        metadata: before.
        moves: the new place of each chunk, an extent of this one chunk, or None on main.
        lost: all lost sectors of these chunks, as pairs of first sector and count.
    """
    chunk_sectors = metadata.config["chunk_sectors"]
    known = subtract_ranges(
        [(item.sector, item.count) for item in metadata.lost],
        [(chunk * chunk_sectors, chunk_sectors) for chunk in moves],
    )
    placed = [place for place in moves.values() if place]
    return replace(
        metadata,
        extents=extents.merge([*extents.without(metadata.extents, moves), *placed]),
        lost=tuple(LostRange(*item) for item in extents.merge_sectors([*known, *lost])),
    )


def allocate(
    metadata: Metadata,
    chunks: Sequence[int],
    geometries: Mapping[int, Geometry],
    taken: Sequence[Extent],
    avoid: Sequence[tuple[int, int]],
) -> list[Extent]:
    """Choose places for chunks as the target's policy and the health of its spares have it.

    Args:
        metadata: the target's metadata, for policy, scores and bad places.
        chunks: logical chunks, ascending.
        geometries: the usable spares, by index.
        taken: the extents whose places are in use.
        avoid: further pairs of spare index and chunk that must not be used.

    Raises:
        Refused: the spares are full.
    """
    return pool.allocate(
        chunks,
        geometries,
        taken,
        pool.bad_places_of(metadata).union(avoid),
        pool.policy_of(metadata.config),
        pool.scores_of(metadata),
    )


def choose_places(
    metadata: Metadata,
    chunks: Sequence[int],
    usable: Mapping[int, Geometry],
    taken: Sequence[Extent],
    avoid: Sequence[tuple[int, int]] = (),
    prefer: Collection[int] = (),
) -> list[Extent]:
    """Choose a place for each chunk, on the preferred spares as long as they have room.

    Args:
        metadata: the target's metadata, for policy, scores and bad places.
        chunks: logical chunks, ascending.
        usable: geometries of the spares that may be used, by index.
        taken: the places in use.
        avoid: pairs of spare index and chunk that must not be used.
        prefer: indexes of spares.

    Raises:
        Refused: the spares have too few free chunks.
    """
    first = {index: geometry for index, geometry in usable.items() if index in prefer}
    known = pool.capacities(first, taken, pool.bad_places_of(metadata))
    room = pool.whole(known.values()).free - sum(index in first for index, _chunk in avoid)
    split = max(0, min(room, len(chunks))) if first else 0
    placed = allocate(metadata, chunks[:split], first, taken, avoid) if split else []
    if split == len(chunks):
        return placed
    return placed + allocate(metadata, chunks[split:], usable, [*taken, *placed], avoid)
