# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Gives chunks that were read new places, and writes them there."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from . import stack
from .devices import Disks, Mapper, OpenDevice
from .errors import DmRemapError, Refused
from .format import Extent, Geometry, Metadata
from .marks import SECTOR_BYTES
from .moved import ranges_shown
from .plan_remap import choose_places
from .probing import MEDIUM_ERRORS, reads
from .salvage import Outcome, Salvage
from .target import Holder, usable_geometries

# A spare on which so many chosen places are bad is not used for the remap.
_BAD_PLACES = 3


@dataclass(frozen=True)
class Route:
    """Where a move may take chunks, and what it may read.

    Args:
        to_main: back to main, where the chunk's own data is the test.
        avoid: indexes of spares that take none of them.
        prefer: indexes of spares that take as many as they can.
        discard: indexes of spares that are not read: what is there is lost.
    """

    to_main: bool = False
    avoid: frozenset[int] = frozenset()
    prefer: frozenset[int] = frozenset()
    discard: frozenset[int] = frozenset()


TO_SPARES = Route()


@dataclass(eq=False)
class Work:
    """A chunk on its way, whose extent is known when it has a place.

    Args:
        chunk: its number on the target.
        start: its first sector on the target.
        length: its sectors.
        salvage: what was read of it; its sectors are the source's.
        source: where it is; None on main.
        known: its sectors on the target that were lost before.
        place: where it goes; None on main, or not known yet.
    """

    chunk: int
    start: int
    length: int
    salvage: Salvage
    source: Extent | None = None
    known: list[tuple[int, int]] = field(default_factory=list)
    place: Extent | None = None

    @property
    def extent(self) -> Extent:
        """The place on a spare that the chunk goes to."""
        if self.place is None:
            raise AssertionError("the chunk has no place yet")
        return self.place

    @property
    def lost(self) -> list[tuple[int, int]]:
        """All its lost sectors on the target."""
        shift = self.start - self.salvage.sector
        return [(sector + shift, count) for sector, count in self.salvage.lost]


class Placer:
    """Writes chunks to their new places.

    Args:
        mapper: device-mapper.
        step: called with a name after each step that a crash could follow.
    """

    def __init__(self, mapper: Mapper, step: Callable[[str], None]) -> None:
        self._mapper = mapper
        self._step = step

    def write_to_main(self, works: Sequence[Work], main: OpenDevice) -> dict[int, str]:
        """Write chunks to their places on main and read them back, twice; why some failed there.

        Nothing but the chunk's own data is ever written to main, so this is the test of the place
        too.
        """
        failed = {}
        for work in works:
            if work.salvage.lost:
                failed[work.chunk] = f"{ranges_shown(work.lost)} cannot be read; write them first"
        for _turn in range(2):
            fit = [work for work in works if work.chunk not in failed]
            for work in fit:
                try:
                    main.write(work.start, bytes(work.salvage.data))
                except OSError as error:
                    failed[work.chunk] = f"its place on main cannot be written: {error}"
            try:
                main.flush()
            except OSError as error:
                failed.update({work.chunk: f"main cannot be flushed: {error}" for work in fit})
            for work in fit:
                if work.chunk in failed:
                    continue
                try:
                    if main.read(work.start, work.length) != work.salvage.data:
                        failed[work.chunk] = "its place on main gives back other data"
                except OSError as error:
                    failed[work.chunk] = f"its place on main cannot be read: {error}"
            self._step("main_written")
        return failed

    def write_chunks(
        self,
        works: Sequence[Work],
        target: Holder,
        metadata: Metadata,
        disks: Disks,
        route: Route,
    ) -> None:
        """Give the chunks places, write what was read of them, and flush.

        A place that is bad itself, or that has old data where a lost sector must read as an error
        and cannot be made to, is passed over, and a spare that fails is not used.

        Raises:
            Refused: the spares have too few free chunks.
            DmRemapError: no spare can be written.
        """
        usable = {
            index: geometry
            for index, geometry in usable_geometries(target).items()
            if index not in route.avoid
        }
        shunned: list[tuple[int, int]] = []
        faults: dict[int, OSError] = {}
        bad_places: Counter[int] = Counter()
        pending = list(works)
        while pending:
            unsettled = {work.chunk for work in pending}
            settled = [work.extent for work in works if work.chunk not in unsettled]
            taken = [*metadata.extents, *settled]
            self._place_chunks(pending, taken, target, usable, shunned, faults, route.prefer)
            dirty: set[int] = set()
            for work in pending:
                index = work.extent.spare
                if index not in usable:
                    continue
                try:
                    _try_place(work, disks.members[index], usable[index])
                except OSError as error:
                    faults[index] = error
                    dirty.add(work.chunk)
                    shunned.append((index, work.extent.physical))
                    bad_places[index] += 1
                    if bad_places[index] == _BAD_PLACES or error.errno not in MEDIUM_ERRORS:
                        usable.pop(index)
                    continue
                try:
                    if not self._write_chunk(work, target, disks, usable[index]):
                        dirty.add(work.chunk)
                        shunned.append((index, work.extent.physical))
                except OSError as error:
                    faults[index] = error
                    usable.pop(index)
            for index in {work.extent.spare for work in pending} & set(usable):
                try:
                    disks.spares[index].flush()
                    for work in pending:
                        if work.extent.spare == index and work.chunk not in dirty:
                            _check_chunk(work, disks.spares[index], metadata)
                except OSError as error:
                    faults[index] = error
                    usable.pop(index)
            # A spare that fails takes the chunks with it that it had taken before.
            pending = [w for w in works if w.chunk in dirty or w.extent.spare not in usable]

    def _place_chunks(
        self,
        works: Sequence[Work],
        taken: Sequence[Extent],
        target: Holder,
        usable: Mapping[int, Geometry],
        shunned: Sequence[tuple[int, int]],
        faults: Mapping[int, OSError],
        prefer: Collection[int],
    ) -> None:
        try:
            chunks = [work.chunk for work in works]
            placed = choose_places(target.metadata, chunks, usable, taken, shunned, prefer)
        except Refused as error:
            for index, info in target.spare_infos.items():
                if index in faults:
                    raise DmRemapError(
                        f"cannot be written: {faults[index]}",
                        device=info.path,
                        remedy="nothing was changed; copy the data to another disk",
                    ) from error
            raise
        for work, extent in zip(works, placed):
            work.place = extent

    def _write_chunk(self, work: Work, target: Holder, disks: Disks, geometry: Geometry) -> bool:
        """Write what was read of a chunk; whether its lost blocks read as errors then."""
        index, metadata = work.extent.spare, target.metadata
        _write_readable(work, disks.spares[index], metadata)
        if _lost_fail(work, disks.spares[index], metadata):
            return True
        self._poison(target, work, disks, geometry)
        return _lost_fail(work, disks.spares[index], metadata)

    def _poison(self, target: Holder, work: Work, disks: Disks, geometry: Geometry) -> None:
        """Make the chunk's lost blocks read as errors where the place has old data.

        A suspend writes back what dm-integrity's journal holds of them, and empties the journal on
        the disk, which would bring old data back when the spare is next activated. It does the
        latter only if anything was written since the spare was resumed (`wrote_to_journal` in
        drivers/md/dm-integrity.c). Then other bytes below match no tag any more.
        """
        index, block = work.extent.spare, work.salvage.block_sectors
        lost, member = work.salvage.runs(Outcome.LOST), disks.members[index]
        first_lost = _spare_sector(work, target.metadata) + lost[0][0] * block
        disks.spares[index].write(first_lost, bytes(block * SECTOR_BYTES))
        part = stack.spare_name(target.name, index)
        self._mapper.suspend(part)
        self._mapper.swap(part)
        place = geometry.chunk_sector(work.extent.physical)
        for first, count in lost:
            old = member.read(place + first * block, count * block)
            member.write(place + first * block, bytes(byte ^ 0xFF for byte in old))
        member.flush()
        self._step("poisoned")


def _spare_sector(work: Work, metadata: Metadata) -> int:
    return int(work.extent.physical * metadata.config["chunk_sectors"])


def _try_place(work: Work, member: OpenDevice, geometry: Geometry) -> None:
    """Check that the chunk's place on the spare itself takes its data and gives it back.

    dm-integrity acknowledges a write when it is in its journal. If the place below then turns out
    bad, it fails all I/O to the whole spare (`dm_integrity_io_error` in drivers/md/dm-integrity.c),
    so the place is tried first. Without its tag the data does not become readable by that.

    Raises:
        OSError: the place is bad.
    """
    place, block = geometry.chunk_sector(work.extent.physical), work.salvage.block_sectors
    for first, count in work.salvage.readable:
        data = work.salvage.blocks(first, count)
        member.write(place + first * block, data)
        if member.read(place + first * block, count * block) != data:
            raise OSError(errno.EIO, "gives back other data than was written", member.name)
    for first, count in work.salvage.runs(Outcome.LOST):
        # What is lost may be written later, so its place must work too.
        member.read(place + first * block, count * block)


def _write_readable(work: Work, device: OpenDevice, metadata: Metadata) -> None:
    """Write what was read of a chunk."""
    place, block = _spare_sector(work, metadata), work.salvage.block_sectors
    for first, count in work.salvage.readable:
        data = work.salvage.blocks(first, count)
        device.write(place + first * block, data)


def _lost_fail(work: Work, device: OpenDevice, metadata: Metadata) -> bool:
    """Whether the chunk's lost blocks read as errors on the spare."""
    place, block = _spare_sector(work, metadata), work.salvage.block_sectors
    return not any(
        reads(device, place + (first + i) * block, block)
        for first, count in work.salvage.runs(Outcome.LOST)
        for i in range(count)
    )


def _check_chunk(work: Work, device: OpenDevice, metadata: Metadata) -> None:
    """Read back what was written of a chunk.

    Raises:
        OSError: the spare gives back something else.
    """
    place, block = _spare_sector(work, metadata), work.salvage.block_sectors
    for first, count in work.salvage.readable:
        data = work.salvage.blocks(first, count)
        if device.read(place + first * block, count * block) != data:
            raise OSError(errno.EIO, "gives back other data than was written", device.name)
