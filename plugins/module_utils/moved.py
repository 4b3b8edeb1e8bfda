# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What became of chunks that were to move (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from . import extents, files
from .errors import count_of
from .format import Extent, Metadata
from .plan import Plan
from .target import ActiveTarget, where


@dataclass
class RemappedChunk:
    """What became of one chunk.

    Sectors are counted in units of 512 bytes; ``lost`` and ``lost_before`` hold first sector and
    count on the target.

    Args:
        chunk: its number on the target.
        start: its first sector on the target.
        count: its sectors.
        spare: index of the spare that it is on now; None on main.
        spare_chunk: its place there.
        recovered_first_read: sectors that the first read saved.
        recovered_on_retry: sectors that a later read saved.
        lost: sectors that were lost now.
        lost_before: sectors that were known to be lost, and still cannot be read.
        origin: index of the spare that it came from; None from main.
        moved: whether it moved at all.
        reason: why it did not.
    """

    chunk: int
    start: int
    count: int
    spare: int | None
    spare_chunk: int | None
    recovered_first_read: int
    recovered_on_retry: int
    lost: list[tuple[int, int]]
    lost_before: list[tuple[int, int]] = field(default_factory=list)
    origin: int | None = None
    moved: bool = True
    reason: str = ""


@dataclass
class RemapReport:
    """Result of a remap: what was done, the chunks, and durations in seconds.

    Args:
        plan: the plan as it was carried out.
        chunks: what became of the chunks.
        lost_before: sectors of chunks that were on a spare already, which still cannot be read.
        files: whom the lost sectors belonged to, once `Engine.find_files` has looked.
        salvage_seconds: reading main and writing spares.
        pause_seconds: how long I/O to the chunks had to wait.
        seconds: all of it.
    """

    plan: Plan
    chunks: list[RemappedChunk] = field(default_factory=list)
    lost_before: list[tuple[int, int]] = field(default_factory=list)
    files: list[files.Owner] = field(default_factory=list)
    salvage_seconds: float = 0.0
    pause_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def generation(self) -> int:
        """Generation of the target's metadata afterwards."""
        return int(self.plan.after["generation"])

    @property
    def recovered(self) -> int:
        """Sectors whose data was saved."""
        return sum(c.recovered_first_read + c.recovered_on_retry for c in self.chunks if c.moved)

    @property
    def staying(self) -> list[RemappedChunk]:
        """Chunks that were to move and did not."""
        return [chunk for chunk in self.chunks if not chunk.moved]

    @property
    def lost(self) -> list[tuple[int, int]]:
        """Lost sectors of all chunks that were asked for, as (first, count) on the target."""
        return self.lost_before + [item for chunk in self.chunks for item in chunk.lost]


@dataclass(frozen=True)
class Moved:
    """What a move did.

    Args:
        metadata: the generation afterwards.
        chunks: what became of the chunks that were to be moved.
        extents: where those are now that moved to a spare, one extent each.
        salvage_seconds: until all was read and is in its new place.
        pause_seconds: how long I/O to the chunks had to wait.
        left_out: why a spare did not take the last generation, by its index.
    """

    metadata: Metadata
    chunks: list[RemappedChunk]
    extents: list[Extent]
    salvage_seconds: float
    pause_seconds: float
    left_out: Mapping[int, str] = field(default_factory=dict)

    @property
    def lost(self) -> list[tuple[int, int]]:
        """Sectors that were lost, as (first, count) on the target."""
        return [item for chunk in self.chunks for item in chunk.lost]


def staying(target: ActiveTarget, unreadable: Sequence[tuple[int, int]]) -> list[RemappedChunk]:
    """The chunks that cannot return to main because sectors of them cannot be read."""
    chunk_sectors = target.metadata.config["chunk_sectors"]
    by_chunk: dict[int, list[tuple[int, int]]] = {}
    for sector, count in unreadable:
        by_chunk.setdefault(sector // chunk_sectors, []).append((sector, count))
    found = []
    for chunk, some in by_chunk.items():
        lost = list(extents.merge_sectors(some))
        place = extents.place_of(target.metadata.extents, chunk)
        position = where(target.metadata, chunk)
        found.append(
            RemappedChunk(
                chunk=chunk,
                start=position["start"],
                count=position["count"],
                spare=place.spare if place else None,
                spare_chunk=place.physical if place else None,
                recovered_first_read=0,
                recovered_on_retry=0,
                lost=[],
                lost_before=lost,
                origin=place.spare if place else None,
                moved=False,
                reason=f"{ranges_shown(lost)} cannot be read; write them first",
            )
        )
    return found


def ranges_shown(ranges: Sequence[tuple[int, int]]) -> str:
    """Ranges of sectors in a sentence."""
    first, more = ranges[0], len(ranges) - 1
    text = f"sectors {first[0]}+{first[1]}"
    return f"{text} and {count_of(more, 'more range')}" if more else text
