# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Moves chunks from where they are to spares or to main, while the target is in use."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import extents
from .committing import Committer
from .devices import Disks, Mapper, OpenDevice
from .errors import DmRemapError
from .events import intersect_ranges, subtract_ranges
from .format import Metadata
from .freezing import FREEZE_SECONDS, Freezer
from .guarding import Guard
from .holding import Hold
from .moved import Moved, RemappedChunk
from .observing import TAG_ERRORS
from .placing import TO_SPARES, Placer, Route, Work
from .plan_remap import with_moves
from .probing import answers
from .salvage import Outcome, Patience, Salvage, Unfinished, begin, salvage
from .target import ActiveTarget, where

# Says of a chunk that was read whether it is to be moved after all.
Wanted = Callable[[int, Salvage], bool]

# A move that stops where it only reads, and gives what is to be called before it goes on.
Steps = Generator[Callable[[], None], None, Moved]


def all_of_them(chunk: int, salvage: Salvage) -> bool:
    """Every chunk is to be moved after all."""
    return True


def at_once(steps: Steps) -> Moved:
    """Carry out a move, with its reads where it stops for them."""
    try:
        read = next(steps)
        while True:
            try:
                read()
            except BaseException as error:
                read = steps.throw(error)
            else:
                read = next(steps)
    except StopIteration as end:
        moved: Moved = end.value
        return moved


class Mover:
    """Moves chunks of active targets.

    Args:
        mapper: device-mapper.
        freezer: freezes and thaws chunks.
        placer: writes chunks to their places.
        committer: commits generations.
        guard: ends interrupted freezes.
        hold: lets held I/O go on.
        step: called with a name after each step that a crash could follow.
        progress: called with a sentence when something long begins.
    """

    def __init__(
        self,
        mapper: Mapper,
        freezer: Freezer,
        placer: Placer,
        committer: Committer,
        guard: Guard,
        hold: Hold,
        step: Callable[[str], None],
        progress: Callable[[str], None],
    ) -> None:
        self._mapper = mapper
        self._freezer = freezer
        self._placer = placer
        self._committer = committer
        self._guard = guard
        self._hold = hold
        self._step = step
        self._progress = progress

    def move(
        self,
        target: ActiveTarget,
        disks: Disks,
        chunks: Sequence[int],
        patience: Patience,
        events: Any = None,
        route: Route = TO_SPARES,
    ) -> Moved:
        """Move chunks as `moving` does, without a stop."""
        return at_once(self.moving(target, disks, chunks, patience, events, route=route))

    def moving(
        self,
        target: ActiveTarget,
        disks: Disks,
        chunks: Sequence[int],
        patience: Patience,
        events: Any = None,
        wanted: Wanted = all_of_them,
        release: Callable[[], None] | None = None,
        route: Route = TO_SPARES,
    ) -> Steps:
        """Move chunks from where they are to spares or to main; the caller holds the lock.

        Held I/O goes on as soon as the chunks are frozen, that to the chunks when they are moved.

        It stops while the chunks are frozen and are to be read. What it gives then may be called by
        any thread, and its error must be thrown in: reading can take minutes, and does nothing with
        device-mapper.

        Args:
            target: the target, of whose chunks none is frozen.
            disks: its open devices; main is writable for a move to it.
            chunks: logical chunks, ascending; for a move to main they are on spares.
            patience: how hard to try to read failing blocks.
            events: what `DeviceMapper.events` gave, for a target that udev must be told about.
            wanted: says of a chunk that was read whether it is to be moved after all.
            release: lets held I/O go on, in place of `Hold.release_unless_flushed`.
            route: where the chunks may go.

        Raises:
            DmRemapError: a step failed; the chunks are where the metadata says.
        """
        begun = time.monotonic()
        attempted: set[int] = set()
        works: list[Work] = []
        try:
            # A salvage and one more read of what is lost may each take the whole budget.
            seconds = FREEZE_SECONDS + 2 * patience.budget
            self._freezer.freeze(target, chunks, seconds, events)
            if release:
                release()
            else:
                self._hold.release_unless_flushed(target)
            reading = time.monotonic()
            yield lambda: self._read(works, target, disks, chunks, patience, route)
            carried = self._carry(works, target, disks, wanted, route, attempted, reading)
            self._freezer.thaw(target, carried.metadata, chunks, events)
        except BaseException:
            # Only the metadata on the spares can say now where the chunks are.
            self._guard.end_freeze(target.name, attempted)
            raise
        pause_seconds = time.monotonic() - begun
        self._freezer.park(target)
        return replace(carried, pause_seconds=pause_seconds)

    def move_held(
        self,
        target: ActiveTarget,
        disks: Disks,
        chunks: Sequence[int],
        patience: Patience,
        wanted: Wanted = all_of_them,
        release: Callable[[], None] | None = None,
    ) -> Moved:
        """Move chunks of a target whose path has failed, so that all of its I/O waits anyway.

        Takes a single swap, but keeps everything waiting, so ``patience`` should be short. The
        arguments and errors are those of `moving`; the caller has made sure that the path has
        failed.
        """
        begun = time.monotonic()
        attempted: set[int] = set()
        works: list[Work] = []
        try:
            # Waits for what is in flight, and lets nothing through that was on its way.
            self._mapper.suspend(target.map.name)
            self._step("suspended")
            reading = time.monotonic()
            self._read(works, target, disks, chunks, patience, TO_SPARES)
            carried = self._carry(works, target, disks, wanted, TO_SPARES, attempted, reading)
            if carried.extents:
                self._mapper.load(target.map.name, target.map_table(carried.metadata))
            self._mapper.swap(target.map.name)
            self._step("swapped")
        except Unfinished:
            # Nothing was changed yet, and it need not be found out anew.
            self._mapper.swap(target.map.name)
            raise
        except BaseException:
            try:
                # Should nobody be able to tell where the chunks are, the rest must go on.
                if attempted:
                    self._freezer.freeze(target, chunks, FREEZE_SECONDS, None)
                else:
                    self._mapper.swap(target.map.name)
            finally:
                self._guard.end_freeze(target.name, attempted)
            raise
        if release:
            release()
        else:
            self._hold.release_unless_flushed(target)
        return replace(carried, pause_seconds=time.monotonic() - begun)

    def _read(
        self,
        works: list[Work],
        target: ActiveTarget,
        disks: Disks,
        chunks: Sequence[int],
        patience: Patience,
        route: Route,
    ) -> None:
        """Read chunks that nobody can write to now.

        Args:
            works: gets what was read.
            target: the target.
            disks: its open devices.
            chunks: logical chunks.
            patience: how hard to try to read failing blocks.
            route: where the chunks may go.
        """
        lost = [(item.sector, item.count) for item in target.metadata.lost]
        for chunk in chunks:
            works.append(self._salvage_chunk(target, chunk, lost, disks, patience, route))
            self._step("salvaged")
        confirm_losses(_sources(target, disks, works, route))

    def _carry(
        self,
        works: Sequence[Work],
        target: ActiveTarget,
        disks: Disks,
        wanted: Wanted,
        route: Route,
        attempted: set[int],
        begun: float,
    ) -> Moved:
        """Copy chunks that nobody can write to now, and commit where they are.

        Args:
            works: what was read of them.
            target: the target.
            disks: its open devices.
            wanted: says of a chunk that was read whether it is to be moved after all.
            route: where the chunks may go.
            attempted: gets the indexes of spares that a commit was begun on.
            begun: when the reading did, in monotonic seconds.
        """
        works = [work for work in works if wanted(work.chunk, work.salvage)]
        stay: dict[int, str] = {}
        if route.to_main:
            stay = self._placer.write_to_main(works, disks.old_main)
        moving = [work for work in works if work.chunk not in stay]
        new, left_out, written = self._settle(moving, target, disks, route, attempted)
        return Moved(
            metadata=new,
            chunks=[outcome_of(work, stay.get(work.chunk, "")) for work in works],
            extents=[work.place for work in moving if work.place],
            salvage_seconds=(written or time.monotonic()) - begun,
            pause_seconds=0.0,
            left_out=left_out,
        )

    def _settle(
        self,
        works: Sequence[Work],
        target: ActiveTarget,
        disks: Disks,
        route: Route,
        attempted: set[int],
    ) -> tuple[Metadata, dict[int, str], float]:
        """Write chunks to their places and commit these.

        A spare that took data but not the commit has failed, and its chunks are settled once more
        on others, if there is room: their data is still here.

        Args:
            works: the chunks.
            target: where they belong.
            disks: its open devices.
            route: where they may go.
            attempted: gets the indexes of spares that a commit was begun on.

        Returns:
            The generation, the spares that did not take it, and when the data was written.
        """
        new, left_out, written = target.metadata, dict[int, str](), 0.0
        pending = list(works)
        while pending:
            if not route.to_main:
                before = [work.place for work in pending]
                try:
                    self._placer.write_chunks(pending, target, new, disks, route)
                except DmRemapError:
                    if new is target.metadata:
                        raise
                    for work, place in zip(pending, before):
                        work.place = place
                    break
            self._step("data_flushed")
            written = written or time.monotonic()
            successor = self._next(new, works)
            attempted |= set(disks.members)
            left_out = self._committer.commit(target, disks.members, new, successor)
            new = successor
            self._step("committed")
            pending = [work for work in works if work.place and work.place.spare in left_out]
            route = replace(route, avoid=route.avoid | set(left_out))
        return new, left_out, written

    def _salvage_chunk(
        self,
        target: ActiveTarget,
        chunk: int,
        lost: Sequence[tuple[int, int]],
        disks: Disks,
        patience: Patience,
        route: Route,
    ) -> Work:
        metadata = target.metadata
        chunk_sectors = metadata.config["chunk_sectors"]
        block_sectors = metadata.config["block_sectors"]
        place = where(metadata, chunk)
        start, length = place["start"], place["count"]
        source = extents.place_of(metadata.extents, chunk)
        sector = source.physical * chunk_sectors if source else start
        self._progress(f"salvage chunk {chunk} of {target.name}")
        known = intersect_ranges(lost, (start, length)) if source else []
        work = Work(
            chunk=chunk,
            start=start,
            length=length,
            salvage=begin(
                sector,
                length,
                block_sectors,
                [(first + sector - start, count) for first, count in known],
                patience,
            ),
            source=source,
            known=known,
        )
        if source and source.spare in route.discard:
            work.salvage.outcomes = [Outcome.LOST] * len(work.salvage.outcomes)
            return work
        if source and source.spare not in disks.spares:
            raise DmRemapError(
                f"chunk {chunk} is on spare {source.spare}, which cannot be used",
                device=target.name,
                remedy="attach that spare again, or remove it with discard_remaps: true",
            )
        device = disks.spares[source.spare] if source else disks.main_of(metadata, chunk)
        salvage(device, sector, length, block_sectors, patience, resume=work.salvage)
        return work

    def _next(self, metadata: Metadata, works: Sequence[Work]) -> Metadata:
        moves = {work.chunk: work.place for work in works}
        lost = [item for work in works for item in work.lost]
        return with_moves(self._committer.successor(metadata), moves, lost)


@dataclass(frozen=True)
class Source:
    """A device that chunks come from: its path, and the errors that do not speak against it.

    ``parts`` are what was read of it.
    """

    device: OpenDevice
    path: str
    fine: tuple[int, ...]
    parts: list[Salvage]


def _sources(
    target: ActiveTarget, disks: Disks, works: Sequence[Work], route: Route
) -> list[Source]:
    """The devices that the chunks come from, but for those that are not read."""
    paths = {spare.index: spare.candidate.info.path for spare in target.spares}
    found: dict[str, Source] = {}
    fine: tuple[int, ...]
    for work in works:
        if work.source and work.source.spare in route.discard:
            continue
        if work.source:
            # A spare's unwritten blocks read as EILSEQ.
            device, fine = disks.spares[work.source.spare], TAG_ERRORS
            path = paths[work.source.spare]
        else:
            device, fine = disks.main_of(target.metadata, work.chunk), (0,)
            info = target.replacement if device is disks.new_main else target.main
            path = info.path if info else target.name
        found.setdefault(path, Source(device, path, fine, [])).parts.append(work.salvage)
    return list(found.values())


def confirm_losses(sources: Sequence[Source]) -> None:
    """Believe in losses only on a disk that answers before and after one more read of each.

    A disk or path that went away for a while fails reads like bad blocks do. What is known to be
    lost is read here once: it may have been written since.
    """
    for source in sources:
        _check_alive(source)
        for part in source.parts:
            part.read_again(source.device)
        _check_alive(source)


def _check_alive(source: Source) -> None:
    lost = [item for part in source.parts for item in part.lost]
    block = source.parts[0].block_sectors if source.parts else 1
    if lost and not answers(source.device, lost, block, source.fine):
        raise DmRemapError(
            "reads fail everywhere, so it is the disk or its path and not a bad sector",
            device=source.path,
            remedy="check its cable, power and controller; nothing was changed",
        )


def outcome_of(work: Work, reason: str) -> RemappedChunk:
    """What became of a chunk; ``reason`` is why it stayed, if it did."""
    place = work.source if reason else work.place
    return RemappedChunk(
        chunk=work.chunk,
        start=work.start,
        count=work.length,
        spare=place.spare if place else None,
        spare_chunk=place.physical if place else None,
        recovered_first_read=work.salvage.count(Outcome.FIRST_READ),
        recovered_on_retry=work.salvage.count(Outcome.RETRY),
        lost=subtract_ranges(work.lost, work.known),
        lost_before=[item for piece in work.known for item in intersect_ranges(work.lost, piece)],
        origin=work.source.spare if work.source else None,
        moved=not reason,
        reason=reason,
    )
