# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Extents of remapped chunks and ranges of sectors: look up, add, merge (pure)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence

from .errors import Refused
from .format import Extent

# An extent's length has 16 bits on disk (docs/format.md).
MAX_RUN_CHUNKS = 65536


def chunks_of(
    ranges: Iterable[tuple[int, int]], chunk_sectors: int, total_sectors: int
) -> list[int]:
    """Chunks that ``ranges`` touch, ascending, each once.

    Args:
        ranges: pairs of first sector and count.
        chunk_sectors: sectors in a chunk.
        total_sectors: size of the target in sectors.

    Raises:
        Refused: a range is empty, negative or ends beyond the target.
    """
    found: set[int] = set()
    for start, count in ranges:
        if start < 0 or count < 1 or start + count > total_sectors:
            raise Refused(
                f"sectors {start}+{count} are not on the target, which has {total_sectors} sectors",
                remedy="give a first sector from 0 on and a count of at least 1 within the target",
            )
        found.update(range(start // chunk_sectors, (start + count - 1) // chunk_sectors + 1))
    return sorted(found)


def find(extents: Sequence[Extent], chunk: int) -> Extent | None:
    """The extent that holds logical ``chunk``, or None. ``extents`` are sorted."""
    # A probe that sorts after every extent starting at `chunk` and before any later one.
    position = bisect_left(extents, Extent(chunk + 1, 0, 0, 0))
    if position and chunk < extents[position - 1].logical + extents[position - 1].length:
        return extents[position - 1]
    return None


def place_of(extents: Sequence[Extent], chunk: int) -> Extent | None:
    """Where logical ``chunk`` is, as an extent of this one chunk, or None. They are sorted."""
    found = find(extents, chunk)
    return found and _part(found, chunk, chunk + 1)


def without(extents: Iterable[Extent], chunks: Collection[int]) -> list[Extent]:
    """The extents less some logical chunks."""
    if not chunks:
        return list(extents)
    cut = sorted(set(chunks))
    kept = []
    for extent in extents:
        first, end = extent.logical, extent.logical + extent.length
        for chunk in cut[bisect_left(cut, first) : bisect_left(cut, end)]:
            if first < chunk:
                kept.append(_part(extent, first, chunk))
            first = chunk + 1
        if first < end:
            kept.append(_part(extent, first, end))
    return kept


def _part(extent: Extent, first: int, end: int) -> Extent:
    physical = extent.physical + first - extent.logical
    return Extent(first, end - first, extent.spare, physical, extent.flags)


def merge(extents: Iterable[Extent]) -> tuple[Extent, ...]:
    """Sort extents and join those that continue each other on target and spare.

    Raises:
        ValueError: two extents claim one logical chunk.
    """
    joined: list[Extent] = []
    for extent in sorted(extents):
        last = joined[-1] if joined else None
        if last and last.logical + last.length > extent.logical:
            raise ValueError(f"chunk {extent.logical} is in two extents")
        if last and _continues(last, extent):
            joined[-1] = Extent(
                last.logical, last.length + extent.length, last.spare, last.physical, last.flags
            )
        else:
            joined.append(extent)
    return tuple(joined)


def _continues(last: Extent, extent: Extent) -> bool:
    return (
        last.logical + last.length == extent.logical
        and last.physical + last.length == extent.physical
        and last.spare == extent.spare
        and last.flags == extent.flags
        and last.length + extent.length <= MAX_RUN_CHUNKS
    )


def merge_sectors(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Sort ranges of sectors and join those that touch or overlap."""
    joined: list[tuple[int, int]] = []
    for start, count in sorted(ranges):
        if joined and start <= joined[-1][0] + joined[-1][1]:
            first, length = joined[-1]
            joined[-1] = (first, max(length, start + count - first))
        else:
            joined.append((start, count))
    return tuple(joined)


def runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of consecutive numbers among ascending ones, as (first, how many)."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and sum(found[-1]) == number:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((number, 1))
    return found
