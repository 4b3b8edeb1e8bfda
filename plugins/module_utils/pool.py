# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which spare chunk a failing chunk goes to (pure)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .errors import Refused, count_of
from .format import Extent, Geometry


@dataclass(frozen=True)
class Capacity:
    """Chunks of one spare: usable in all, and free."""

    total: int
    free: int


def capacity(geometry: Geometry, index: int, extents: Iterable[Extent]) -> Capacity:
    """Count the usable chunks of spare ``index`` and those without an extent."""
    total = geometry.usable_chunks
    used = sum(extent.length for extent in extents if extent.spare == index)
    return Capacity(total=total, free=total - used)


def allocate(
    chunks: Sequence[int],
    geometries: Mapping[int, Geometry],
    extents: Sequence[Extent],
    avoid: Collection[tuple[int, int]] = (),
) -> list[Extent]:
    """Choose a spare chunk for each logical chunk: first fit, after the highest chunk in use.

    Chunks above everything used so far are preferred, because they were never written since the
    spare was formatted: there a lost sector reads as an error by itself. Consecutive logical
    chunks get consecutive spare chunks where they are free, so extents merge.

    Args:
        chunks: logical chunks, ascending.
        geometries: the usable spares, by index.
        extents: remaps that exist.
        avoid: pairs of spare index and chunk that must not be used.

    Raises:
        Refused: the spares have too few free chunks.
    """
    free = _free_chunks(geometries, extents, avoid)
    placed = [Extent(chunk, 1, *place) for chunk, place in zip(chunks, free)]
    if len(placed) < len(chunks):
        raise Refused(
            f"the spares have {count_of(len(placed), 'free chunk')}, and {len(chunks)} are needed",
            remedy="copy the data to another disk",
        )
    return placed


def _free_chunks(
    geometries: Mapping[int, Geometry],
    extents: Sequence[Extent],
    avoid: Collection[tuple[int, int]],
) -> Iterable[tuple[int, int]]:
    shunned = set(avoid)
    used: dict[int, set[int]] = {index: set() for index in geometries}
    for extent in extents:
        if extent.spare in used:
            used[extent.spare].update(range(extent.physical, extent.physical + extent.length))
    for second_choice in (False, True):
        for index in sorted(geometries):
            geometry = geometries[index]
            fresh = max(used[index], default=-1) + 1
            for chunk in range(0, fresh) if second_choice else range(fresh, geometry.chunks):
                taken = chunk in used[index] or (index, chunk) in shunned
                if not taken and geometry.holds(chunk):
                    yield index, chunk
