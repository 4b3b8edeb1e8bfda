# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Copies what a dm-remap-v4 target has remapped to the spares of a new target."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from . import migration, plan_spares, stack
from .blockdev import DeviceInfo
from .committing import Committer, host_id
from .devices import Blocks, Disks, Mapper, OpenDevice, Opener
from .errors import DmRemapError
from .events import intersect_ranges
from .format import Metadata
from .moved import RemappedChunk
from .moving import Source, confirm_losses, outcome_of
from .placing import TO_SPARES, Placer, Work
from .plan import Plan, metadata_of
from .plan_remap import with_moves
from .probing import MEDIUM_ERRORS
from .salvage import Outcome, Patience, Salvage, begin, salvage
from .stacking import Stacker
from .target import NewTarget, map_table, where


class Migrator:
    """Fills a new target with what a kernel target has remapped.

    Args:
        mapper: device-mapper.
        blocks: block devices.
        opener: opens the spares.
        stack: creates and removes mapped devices.
        placer: writes chunks to their places.
        committer: commits generations.
        step: called with a name after each step that a crash could follow.
        progress: called with a sentence when something long begins.
    """

    def __init__(
        self,
        mapper: Mapper,
        blocks: Blocks,
        opener: Opener,
        stack: Stacker,
        placer: Placer,
        committer: Committer,
        step: Callable[[str], None],
        progress: Callable[[str], None],
    ) -> None:
        self._mapper = mapper
        self._blocks = blocks
        self._opener = opener
        self._stack = stack
        self._placer = placer
        self._committer = committer
        self._step = step
        self._progress = progress

    def copy(self, plan: Plan) -> list[RemappedChunk]:
        """Copy what the old spare stands in for to the new ones, then commit that as generation 1.

        Nothing uses the target yet. Each batch is on its spares for good before the commit.
        """
        taken, old, main = _migration_of(plan)
        draft = replace(metadata_of(plan), timestamp_ns=time.time_ns(), host_id=host_id())
        chunks = taken.chunks(draft.config["chunk_sectors"])
        done: list[RemappedChunk] = []
        with contextlib.ExitStack() as opened:
            source = opened.enter_context(self._blocks.BlockDevice(old.path))
            disks = Disks(
                main=opened.enter_context(self._blocks.BlockDevice(main.path)),
                spares={
                    index: opened.enter_context(
                        self._blocks.BlockDevice(self._blocks.node_of(devno), writable=True)
                    )
                    for index, devno in self._stack.spare_devnos(plan).items()
                },
                members=self._opener.members(opened, plan.spares),
            )
            for first in range(0, len(chunks), plan_spares.DRAIN_CHUNKS):
                batch = chunks[first : first + plan_spares.DRAIN_CHUNKS]
                works = self._gather(plan, batch, disks.old_main, source)
                holder = NewTarget(plan.name, draft, plan.spares)
                self._placer.write_chunks(works, holder, draft, disks, TO_SPARES)
                self._step("data_flushed")
                moves = {work.chunk: work.place for work in works}
                lost = [item for work in works for item in work.lost]
                draft = with_moves(draft, moves, lost)
                done += [outcome_of(work, "") for work in works]
                self._progress(f"{len(done)} of {len(chunks)} chunks are migrated")
        self._committer.commit_new(plan, None, draft)
        return done

    def _gather(
        self, plan: Plan, chunks: Sequence[int], main: OpenDevice, source: OpenDevice
    ) -> list[Work]:
        """Read chunks from main and from the old spare, each sector from where it is."""
        (taken, old, main_info), metadata = _migration_of(plan), metadata_of(plan)
        block, patience = metadata.config["block_sectors"], Patience()
        parts: list[tuple[int, migration.Piece, Salvage]] = []
        for chunk in chunks:
            for piece in _pieces_of(metadata, taken, chunk):
                if not piece.lost:
                    device, sector = main, piece.sector
                    if piece.source is not None:
                        device, sector = source, piece.source
                    part = salvage(device, sector, piece.count, block, patience)
                    parts.append((chunk, piece, part))
            self._step("salvaged")
        of_main = [part for _chunk, piece, part in parts if piece.source is None]
        of_spare = [part for _chunk, piece, part in parts if piece.source is not None]
        confirm_losses(
            [
                Source(main, main_info.path, (0,), of_main),
                Source(source, old.path, (0,), of_spare),
            ]
        )
        works = {chunk: _empty_work(metadata, taken, chunk) for chunk in chunks}
        for chunk, piece, part in parts:
            offset = (piece.sector - works[chunk].start) // block
            for outcome in (Outcome.FIRST_READ, Outcome.RETRY):
                for first, count in part.runs(outcome):
                    data = part.blocks(first, count)
                    works[chunk].salvage.keep(offset + first, data, outcome)
        return list(works.values())

    def verify(self, plan: Plan) -> None:
        """Read all that was migrated through the target's own map, before anybody can write to it.

        Raises:
            DmRemapError: a sector is not as where it came from; the target is not activated.
        """
        taken, old, main = _migration_of(plan)
        metadata = self._committer.chosen(plan).metadata
        part = stack.map_name(plan.name)
        table = map_table(metadata, main.devno, self._stack.spare_devnos(plan))
        devno = self._stack.create_part(metadata, plan.name, part, table)
        try:
            with contextlib.ExitStack() as opened:
                made, first, second = (
                    opened.enter_context(self._blocks.BlockDevice(path))
                    for path in (self._blocks.node_of(devno), main.path, old.path)
                )
                for chunk in taken.chunks(metadata.config["chunk_sectors"]):
                    for piece in _pieces_of(metadata, taken, chunk):
                        source = first if piece.source is None else second
                        _compare(piece, metadata, made, source)
        finally:
            self._mapper.remove(part)
        config = migration.verified(metadata.config)
        self._committer.commit_new(
            plan, metadata, replace(self._committer.successor(metadata), config=config)
        )


def _migration_of(plan: Plan) -> tuple[migration.Migration, DeviceInfo, DeviceInfo]:
    """What a new target takes from a kernel target, that one's spare, and main."""
    if plan.migration is None or plan.old_spare is None or plan.main is None:
        raise AssertionError("only plans with a migration have such actions")
    return plan.migration, plan.old_spare, plan.main


def _pieces_of(metadata: Metadata, taken: migration.Migration, chunk: int) -> list[migration.Piece]:
    """What a chunk of a new target is made of."""
    place = where(metadata, chunk)
    return taken.pieces(place["start"], place["count"])


def _empty_work(metadata: Metadata, taken: migration.Migration, chunk: int) -> Work:
    """A chunk of a new target before anything of it was read, all of it lost so far."""
    place = where(metadata, chunk)
    start, length = place["start"], place["count"]
    everything = begin(
        start, length, metadata.config["block_sectors"], [(start, length)], Patience()
    )
    known = [(p.sector, p.count) for p in taken.pieces(start, length) if p.lost]
    return Work(chunk, start, length, everything, known=known)


def _compare(
    piece: migration.Piece, metadata: Metadata, made: OpenDevice, source: OpenDevice
) -> None:
    """Check that a piece of a new target reads as where it came from, and fails where it is lost.

    What could be read at the first or a later try only, and cannot be now, was compared with what
    was read then when it was written.

    Raises:
        DmRemapError: it does not.
    """
    block = metadata.config["block_sectors"]
    lost = [(item.sector, item.count) for item in metadata.lost]
    for sector in range(piece.sector, piece.sector + piece.count, block):
        found = _read_or_none(made, sector, block)
        if intersect_ranges(lost, (sector, block)):
            fine = found is None
        else:
            begun = piece.sector if piece.source is None else piece.source
            expected = _read_or_none(source, begun + sector - piece.sector, block)
            fine = found is not None and expected in (None, found) and not piece.lost
        if not fine:
            raise DmRemapError(
                f"sectors {sector}+{block} of the new target are not as on {source.name}, so it is "
                "not activated",
                device=made.name,
                remedy="main and the old spare are as they were; check the new spares and run this "
                "again",
            )


def _read_or_none(device: OpenDevice, sector: int, count: int) -> bytes | None:
    try:
        return device.read(sector, count)
    except OSError as error:
        if error.errno in MEDIUM_ERRORS:
            return None
        raise
