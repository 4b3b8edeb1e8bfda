# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The order in which a range with bad blocks is read, so that few reads fail (pure).

A read that fails can take seconds, a good one takes milliseconds, and an error never tells which of
the blocks is bad. So a range is read at once, and only what failed is read in smaller pieces:

1. A large read. If it fails, its blocks go on to step 2, or straight to step 3 where it was slow.
2. Growing reads of 1, 2, 4 and so on blocks, and of 1 again after a failure; never of more than
   half of what holds a bad block for certain. What such a read covered goes on to step 3.
3. Single blocks.

Hence no block takes part in more than three failing reads (two where failing reads are slow), no
good block is read well twice, and b bad blocks in one large read fail at most 2b + 1 reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from .extents import runs


@dataclass(frozen=True)
class Span:
    """Blocks that are still to be read, and how.

    Args:
        first: first block.
        blocks: number of blocks, 1 or more.
        size: most blocks of the next read.
        grows: whether each good read doubles the size.
        guilty: whether one of the blocks is bad for certain.
    """

    first: int
    blocks: int
    size: int
    grows: bool = False
    guilty: bool = False

    def next_read(self) -> tuple[int, int]:
        """First block and number of blocks of the read that is due."""
        limit = max(1, self.blocks // 2) if self.guilty else self.blocks
        return self.first, min(self.size, limit)

    def without_first(self, blocks: int) -> list[Span]:
        """What is left behind the first ``blocks`` blocks: a span or none."""
        if blocks == self.blocks:
            return []
        return [replace(self, first=self.first + blocks, blocks=self.blocks - blocks)]


class Ladder:
    """What is still to be read, in order.

    Ask `next_read`, read, and tell `succeeded` or `failed`; then ask again.

    Args:
        spans: what is to be read, first things first.
    """

    def __init__(self, spans: Iterable[Span]) -> None:
        self._stack = list(spans)[::-1]

    @property
    def left(self) -> list[Span]:
        """What is still to be read; a ladder made of it goes on where this one is."""
        return self._stack[::-1]

    def next_read(self) -> tuple[int, int] | None:
        """First block and number of blocks of the read that is due, or None at the end."""
        return self._stack[-1].next_read() if self._stack else None

    def succeeded(self) -> None:
        """The read that was due gave its data."""
        span = self._stack.pop()
        _first, blocks = span.next_read()
        size = span.size * 2 if span.grows else span.size
        self._stack += replace(span, size=size).without_first(blocks)

    def failed(self, slow: bool) -> None:
        """The read that was due failed; if of one block, then that block is bad.

        Args:
            slow: it took so long that no failing read may be risked to save good ones.
        """
        span = self._stack.pop()
        first, blocks = span.next_read()
        rest = replace(
            span,
            size=1 if span.grows else span.size,
            grows=span.grows and not slow,
            guilty=False,
        )
        self._stack += rest.without_first(blocks)
        if blocks > 1:
            grows = not (span.grows or slow)
            self._stack.append(Span(first, blocks, size=1, grows=grows, guilty=True))


def spans_around(blocks: int, suspects: Iterable[int], largest: int) -> list[Span]:
    """Plan a range: what is between the suspects by large reads, then each suspect alone.

    Args:
        blocks: number of blocks in the range, 0 or more.
        suspects: blocks that are bad as far as is known; those outside the range are ignored.
        largest: most blocks of one read, 1 or more.
    """
    alone = set(suspects)
    trusted = runs(block for block in range(blocks) if block not in alone)
    suspected = runs(block for block in range(blocks) if block in alone)
    return [Span(*run, size=largest) for run in trusted] + [Span(*run, size=1) for run in suspected]


def keep_only(spans: Iterable[Span], wanted: Callable[[int], bool]) -> list[Span]:
    """Cut the blocks out of the spans that are not ``wanted`` any more."""
    kept = []
    for span in spans:
        left = [number for number in range(span.blocks) if wanted(span.first + number)]
        for first, count in runs(left):
            guilty = span.guilty and count == span.blocks
            kept.append(replace(span, first=span.first + first, blocks=count, guilty=guilty))
    return kept
