# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Copies a target to a new main while it is in use, and back; docs/replace-main.md says why so.

The chunks below a border are on the new main, the others on the old one. The border moves by
windows: a window is copied while it is in use and writes to it are counted; then it is frozen, what
was written meanwhile is copied again, the new main is flushed, the border is committed, and the
window is thawed where it is now. At every moment each sector has exactly one place that counts, and
a write goes nowhere else.
"""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from . import blockdev, extents, replacement, stack
from .checks import check_certain
from .devices import Disks, OpenDevice
from .devmapper import MappedDevice
from .errors import DmRemapError, Refused
from .format import Metadata
from .freezing import FREEZE_SECONDS, Freezer
from .moved import RemapReport
from .plan import Plan
from .plan_upkeep import plan_upkeep
from .probing import MEDIUM_ERRORS
from .salvage import Outcome, Patience, salvage
from .target import ActiveTarget

SECTOR_BYTES = 512

# Each window costs a commit and a short freeze, and what is written to it meanwhile is copied
# twice.
WINDOW_BYTES = 64 << 20
# One read and one write of the copy; `blockdev.BlockDevice` splits larger ones.
PIECE_BYTES = 1 << 20
# The kernel keeps a set of counters for each counted area.
_AREAS = 1024
_PROGRAM = "dm_remap-replace"
# The field of a line of @stats_print that counts completed writes, after the range
# (Documentation/admin-guide/device-mapper/statistics.rst).
_WRITES_FIELD = 5
# So often a window is copied again because of what was written, before it is frozen anyway.
_ROUNDS = 4
_FEW = 8
_HEALING_SECONDS = 0.02
_HEALING_TRIES = 250
_PROGRESS_SECONDS = 5.0
_LEAVE = "check it and run this again, or give the old main to go back"


@dataclass(frozen=True)
class Pace:
    """How fast to copy, and in which steps.

    Args:
        rate: bytes per second at most, 0 for no limit.
        window: bytes that move together; whole chunks are taken, at least one.
    """

    rate: int = 0
    window: int = WINDOW_BYTES

    def __post_init__(self) -> None:
        if self.rate < 0 or self.window < 1:
            raise Refused(
                f"a copy by {self.window} bytes at {self.rate} bytes per second is not possible",
                remedy="give a rate of 0 or more",
            )


@dataclass
class Result:
    """What a replacement did.

    Args:
        copied: bytes that were copied, those twice that were written meanwhile.
        windows: windows that moved.
        healed: chunks that went to a spare because some of them cannot be read, or written back.
        pauses: seconds that I/O to each window had to wait.
        seconds: all of it.
    """

    copied: int = 0
    windows: int = 0
    healed: list[int] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    seconds: float = 0.0


class Tables(Protocol):
    """What copying needs of `devmapper.DeviceMapper`."""

    def info(self, name: str) -> MappedDevice | None:
        """State of a mapped device."""

    def dependencies(self, name: str) -> list[str]:
        """Device numbers that the live table uses."""

    def message(self, name: str, text: str) -> str:
        """Send a message; the answer."""

    def events(self) -> AbstractContextManager[Any]:
        """Collect the events of swaps."""


class Engine(Protocol):
    """What copying needs of `engine.Engine`."""

    def locked(self, name: str) -> AbstractContextManager[None]:
        """Hold a target's lock."""

    def require(self, name: str) -> ActiveTarget:
        """The active target."""

    def apply(self, plan: Plan) -> Any:
        """Carry a plan out."""

    def opened(
        self, target: ActiveTarget, main_writable: bool = ...
    ) -> AbstractContextManager[Disks]:
        """Open the target's devices."""

    def successor(self, metadata: Metadata) -> Metadata:
        """The next generation."""

    def commit_next(self, target: ActiveTarget, disks: Disks, new: Metadata) -> None:
        """Commit it."""

    def backup(self, metadata: Metadata) -> None:
        """Keep it on the host."""

    def finish_replacement(self, target: ActiveTarget, config: dict[str, Any]) -> None:
        """Commit the configuration after a replacement."""

    def remap(
        self, name: str, ranges: Sequence[tuple[int, int]], *, patience: Patience | None = ...
    ) -> RemapReport:
        """Move chunks to spares."""

    def path_of(self, name: str) -> stack.PathState:
        """State of the path of a target whose errors are held."""

    def healer_runs(self) -> bool:
        """Whether somebody heals held I/O."""


@dataclass(frozen=True)
class Tools:
    """What the engine lends.

    Args:
        mapper: device-mapper.
        freezer: freezes and thaws chunks.
        guarded: keeps a process that ends a freeze of the target if this one dies.
        end_freeze: ends an interrupted freeze of the named target; gets the indexes of the spares
            that a commit may have been begun on.
    """

    mapper: Tables
    freezer: Freezer
    guarded: Callable[[ActiveTarget, Disks], AbstractContextManager[None]]
    end_freeze: Callable[[str, Collection[int]], None]


def leftovers(mapper: Tables, target: ActiveTarget) -> list[str]:
    """Mapped devices that an ended replacement has left: an old main's shim, the new main's."""
    found = []
    shim, new = stack.shim_name(target.name), stack.new_main_name(target.name)
    for part in (shim, new):
        device = mapper.info(part)
        if device is None or device.uuid != stack.part_uuid(target.device.uuid, target.name, part):
            continue
        if part == new and target.replacement is None:
            found.append(part)
        below = [target.main.devno] if target.main and target.shim is None else None
        if part == shim and below and mapper.dependencies(part) != below:
            found.append(part)
    return found


def is_settled(mapper: Tables, target: ActiveTarget) -> bool:
    """Whether an ended replacement has left nothing."""
    return not leftovers(mapper, target)


class WriteCounter:
    """Counts the writes to a range of a mapped device, by areas.

    The kernel counts a write when it completes, so one that is in flight when the counter starts is
    counted too, and after a freeze of the range none is missing.

    Args:
        mapper: device-mapper.
        name: the mapped device.
        first: first sector.
        count: sectors.
        unit: sectors of which an area has a multiple.
    """

    def __init__(self, mapper: Tables, name: str, first: int, count: int, unit: int) -> None:
        self._mapper = mapper
        self._name = name
        units = -(-count // unit)
        step = -(-units // _AREAS) * unit
        answer = mapper.message(name, f"@stats_create {first}+{count} {step} {_PROGRAM}")
        self._region = int(answer)

    def written(self) -> list[tuple[int, int]]:
        """Areas with writes so far, as first sector and count."""
        found = []
        for line in self._mapper.message(self._name, f"@stats_print {self._region}").splitlines():
            words = line.split()
            if int(words[_WRITES_FIELD]):
                start, _unused, count = words[0].partition("+")
                found.append((int(start), int(count)))
        return found

    def close(self) -> None:
        """Stop counting."""
        self._mapper.message(self._name, f"@stats_delete {self._region}")


def drop_counters(mapper: Tables, name: str) -> None:
    """Delete the counters that a killed copy has left on a mapped device."""
    for line in mapper.message(name, f"@stats_list {_PROGRAM}").splitlines():
        mapper.message(name, f"@stats_delete {line.partition(':')[0]}")


@dataclass(frozen=True)
class _Piece:
    """Chunks that follow each other on the target and where they come from, up to a read's size.

    ``sector`` is the first one at the source, ``start`` the first one on the target and on both
    mains.
    """

    chunks: range
    source: OpenDevice
    sector: int
    start: int
    count: int
    spared: bool


class _Window:
    """The chunks of a target that move together, and what of them is at their new place."""

    def __init__(self, target: ActiveTarget, disks: Disks, chunks: range, undo: bool) -> None:
        self.target = target
        self.disks = disks
        self.chunks = chunks
        self.undo = undo
        # Chunks whose data is at the destination, as far as nothing was written since, each with
        # its checksum.
        self.copied: dict[int, int] = {}
        # Chunks that must go to a spare before the window can move.
        self.bad: set[int] = set()
        metadata = target.metadata
        self._chunk_sectors = metadata.config["chunk_sectors"]
        self._total = metadata.config["main"]["sectors"]

    @property
    def destination(self) -> OpenDevice:
        """The main that the chunks go to."""
        if self.undo or self.disks.new_main is None:
            return self.disks.old_main
        return self.disks.new_main

    @property
    def origin(self) -> OpenDevice:
        """The main that the chunks come from, unless they are on a spare."""
        if self.undo and self.disks.new_main:
            return self.disks.new_main
        return self.disks.old_main

    def place(self, metadata: Metadata, chunk: int) -> tuple[int, int] | None:
        """Spare and chunk on it, or None for one on a main."""
        place = extents.place_of(metadata.extents, chunk)
        return (place.spare, place.physical) if place else None

    def sectors(self, chunk: int) -> tuple[int, int]:
        """First sector and count of a chunk; the target's last one may be short."""
        start = chunk * self._chunk_sectors
        return start, min(self._chunk_sectors, self._total - start)

    def chunks_in(self, ranges: Iterable[tuple[int, int]]) -> set[int]:
        """Chunks of the window that ranges of sectors touch."""
        return set(extents.chunks_of(ranges, self._chunk_sectors, self._total)) & set(self.chunks)

    def sums(self, chunks: range, data: bytes) -> list[tuple[int, int]]:
        """Checksums of chunks that follow each other; only the target's last one may be short."""
        size = self._chunk_sectors * SECTOR_BYTES
        parts = memoryview(data)
        return [
            (chunk, zlib.crc32(parts[index * size : (index + 1) * size]))
            for index, chunk in enumerate(chunks)
        ]

    def copied_runs(self) -> Iterator[range]:
        """What was copied, in runs of the size of a piece at most."""
        limit = max(1, PIECE_BYTES // (self._chunk_sectors * SECTOR_BYTES))
        for first, count in extents.runs(sorted(self.copied)):
            for start in range(first, first + count, limit):
                yield range(start, min(start + limit, first + count))

    def pieces(self, chunks: Iterable[int], largest: int) -> Iterator[_Piece]:
        """What is to be copied of some chunks, in pieces of at most ``largest`` bytes.

        What is on a spare stays there when a replacement is undone, and where the spare is not
        active.
        """
        limit = max(1, largest // (self._chunk_sectors * SECTOR_BYTES))
        piece: _Piece | None = None
        for chunk in sorted(chunks):
            start, count = self.sectors(chunk)
            place = self.place(self.target.metadata, chunk)
            if place and (self.undo or place[0] not in self.disks.spares):
                continue
            source = self.disks.spares[place[0]] if place else self.origin
            sector = place[1] * self._chunk_sectors if place else start
            if piece and len(piece.chunks) < limit and _follows(piece, source, sector, start):
                joined = range(piece.chunks.start, chunk + 1)
                whole = piece.count + count
                piece = _Piece(joined, source, piece.sector, piece.start, whole, bool(place))
                continue
            if piece:
                yield piece
            piece = _Piece(range(chunk, chunk + 1), source, sector, start, count, bool(place))
        if piece:
            yield piece


def _follows(piece: _Piece, source: OpenDevice, sector: int, start: int) -> bool:
    end = (piece.source, piece.sector + piece.count, piece.start + piece.count)
    return end == (source, sector, start)


class Replacing:
    """Carries a replacement on.

    Args:
        engine: observes, locks, heals and commits.
        tools: what else it lends.
        step: called with a name after each step that a crash could follow.
        progress: called with a sentence now and then.
        pace: how fast to copy, and in which steps.
        patience: how hard to try to read failing blocks.
        clock: seconds that only rise.
        pause: waits the given seconds.
    """

    def __init__(
        self,
        engine: Engine,
        tools: Tools,
        step: Callable[[str], None],
        progress: Callable[[str], None],
        pace: Pace | None = None,
        patience: Patience | None = None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._engine = engine
        self._tools = tools
        self._step = step
        self._progress = progress
        self._pace = pace or Pace()
        self._patience = patience or Patience()
        self._clock = clock
        self._pause = pause
        self._result = Result()
        self._begun = clock()
        self._told_at = clock()

    def run(self, name: str, undo: bool) -> Result:
        """Copy window after window until all is on one main, and make that the target's main.

        Args:
            name: the target; the caller does not hold its lock.
            undo: go back to the old main.

        Raises:
            DmRemapError: a step failed; the target is as its metadata says.
        """
        while self._advance(name, undo):
            self._let_heal(name)
        self._result.seconds = self._clock() - self._begun
        return self._result

    def _advance(self, name: str, undo: bool) -> bool:
        """Move one window, or end the replacement; whether it is still under way."""
        with contextlib.ExitStack() as opened:
            with self._engine.locked(name):
                target = self._whole(name)
                metadata = target.metadata
                if not replacement.under_way(metadata):
                    return False
                if target.main is None:
                    raise DmRemapError(
                        "its main is not known",
                        device=name,
                        remedy="remove the target from use and activate it again with the target "
                        "module",
                    )
                drop_counters(self._tools.mapper, target.map.name)
                chunks = self._next_window(metadata, undo)
                if not chunks:
                    config = (replacement.undone if undo else replacement.finished)(metadata.config)
                    self._engine.finish_replacement(target, config)
                    return False
                disks = opened.enter_context(self._engine.opened(target, main_writable=undo))
                window = _Window(target, disks, chunks, undo)
                # While nobody can move a chunk: what was written elsewhere would not be known.
                counted = self._count(window, opened)
            written = self._copy_in_use(window, counted, opened)
            taken = None
            if not window.bad:
                with self._engine.locked(name):
                    taken = self._take(window, written)
        if taken:
            # Without the lock, because the backup's file may wait for whoever heals the target.
            self._engine.backup(taken)
        if window.bad:
            with self._engine.locked(name):
                self._heal(window)
        return True

    def _whole(self, name: str) -> ActiveTarget:
        """The target, after what an interruption has left was put right."""
        target = self._engine.require(name)
        upkeep = plan_upkeep(target)
        if upkeep.changes:
            self._engine.apply(upkeep)
            target = self._engine.require(name)
        check_certain(target)
        return target

    def _next_window(self, metadata: Metadata, undo: bool) -> range:
        size = max(1, self._pace.window // (metadata.config["chunk_sectors"] * SECTOR_BYTES))
        copied = replacement.copied_chunks(metadata)
        if undo:
            return range(max(0, copied - size), copied)
        return range(copied, min(replacement.chunks_in_all(metadata), copied + size))

    # The copy while the window is in use

    def _copy_in_use(
        self, window: _Window, written: Callable[[], set[int]], counting: contextlib.ExitStack
    ) -> Callable[[], set[int]]:
        """Copy the window until little of it is written anew meanwhile.

        Args:
            window: none of its chunks has moved since ``written`` counts.
            written: what tells the chunks that were written.
            counting: ends further counting.

        Returns:
            What tells the chunks that were written since they were copied.
        """
        due = set(window.chunks)
        with blockdev.idle_priority():
            self._copy(window, due, in_use=True)
            self._step("window_copied")
            if not window.bad and not window.undo:
                self._verify(window)
            for _turn in range(_ROUNDS):
                if window.bad or len(due) <= len(window.chunks) // _FEW:
                    break
                # The last counter is read when the next one counts, so that no write is missed.
                following = self._count(window, counting)
                due, written = written(), following
                self._copy(window, due, in_use=True, check=True)
                self._step("window_copied_again")
        return written

    def _count(self, window: _Window, counting: contextlib.ExitStack) -> Callable[[], set[int]]:
        """Count writes to the window; what tells the chunks that were written."""
        first, _count = window.sectors(window.chunks[0])
        last, length = window.sectors(window.chunks[-1])
        counter = WriteCounter(
            self._tools.mapper,
            window.target.map.name,
            first,
            last + length - first,
            window.target.metadata.config["chunk_sectors"],
        )
        counting.callback(_close_counter, counter)
        return lambda: window.chunks_in(counter.written())

    def _copy(
        self, window: _Window, chunks: Iterable[int], in_use: bool, check: bool = False
    ) -> None:
        """Copy chunks to their new place; not durable yet.

        Args:
            window: gets the chunks that were copied, and those that must go to a spare first.
            chunks: which.
            in_use: whether there is time to try hard.
            check: read each piece back at once, as is always done on the way back.
        """
        for chunk in chunks:
            window.copied.pop(chunk, None)
        for piece in window.pieces(chunks, PIECE_BYTES):
            if window.bad and not in_use:
                return
            begun = self._clock()
            for part, data in self._read_piece(window, piece, in_use):
                self._write_part(window, part, data, check or window.undo)
                self._result.copied += len(data)
            if in_use:
                self._keep_pace(piece.count * SECTOR_BYTES, begun)
                self._tell(window)

    def _read_piece(
        self, window: _Window, piece: _Piece, in_use: bool
    ) -> Iterator[tuple[_Piece, bytes]]:
        """What can be read of a piece, at once or by chunks."""
        try:
            yield piece, _read(piece.source, piece.sector, piece.count)
            return
        except _BadRead:
            pass
        for part in window.pieces(piece.chunks, 1):
            try:
                data = _read(part.source, part.sector, part.count)
            except _BadRead:
                if part.spared:
                    # It stays on its spare, where its lost sectors read as errors until written.
                    continue
                salvaged = self._salvage(window, part) if in_use else None
                if salvaged is None:
                    window.bad |= set(part.chunks)
                    if not in_use:
                        # The window cannot move now, and reads that fail take long.
                        return
                    continue
                data = salvaged
            yield part, data

    def _salvage(self, window: _Window, part: _Piece) -> bytes | None:
        """All of a chunk that is hard to read, or None if some of it cannot be read."""
        block = window.target.metadata.config["block_sectors"]
        self._progress(f"salvage chunk {part.chunks[0]} of {window.target.name}")
        found = salvage(part.source, part.sector, part.count, block, self._patience)
        return None if found.count(Outcome.LOST) else bytes(found.data)

    def _write_part(self, window: _Window, part: _Piece, data: bytes, check: bool) -> None:
        device = window.destination
        try:
            device.write(part.start, data)
            good = not check or device.read(part.start, part.count) == data
        except OSError as error:
            if not window.undo or error.errno not in MEDIUM_ERRORS:
                raise _cannot_write(device, error) from error
            good = False
        if good:
            window.copied.update(window.sums(part.chunks, data))
        elif not window.undo:
            raise _forgets(device)
        elif len(part.chunks) == 1:
            window.bad |= set(part.chunks)
        else:
            size = window.sectors(part.chunks[0])[1] * SECTOR_BYTES
            for index, single in enumerate(window.pieces(part.chunks, 1)):
                self._write_part(window, single, data[index * size : (index + 1) * size], check)

    def _verify(self, window: _Window) -> None:
        """Read back what was copied to the new main, which is the only copy before long.

        The flush comes first, so that the disk reads what it has written, and so that the one in
        the freeze is short.
        """
        device = window.destination
        self._flush(device)
        self._step("copy_flushed")
        for chunks in window.copied_runs():
            start = window.sectors(chunks[0])[0]
            count = sum(window.sectors(chunks[-1])) - start
            try:
                data = device.read(start, count)
            except OSError as error:
                raise DmRemapError(
                    f"cannot be read where it was just written: {error.strerror or error}",
                    device=device.name,
                    remedy=_LEAVE,
                ) from error
            if any(window.copied[chunk] != found for chunk, found in window.sums(chunks, data)):
                raise _forgets(device)

    def _flush(self, device: OpenDevice) -> None:
        try:
            device.flush()
        except OSError as error:
            raise _cannot_write(device, error) from error

    def _keep_pace(self, size: int, begun: float) -> None:
        if self._pace.rate:
            left = size / self._pace.rate - (self._clock() - begun)
            if left > 0:
                self._pause(left)

    def _tell(self, window: _Window) -> None:
        now = self._clock()
        if now - self._told_at < _PROGRESS_SECONDS:
            return
        self._told_at = now
        metadata = window.target.metadata
        total = metadata.config["main"]["sectors"] * SECTOR_BYTES
        # On the way back, what is still on the new main is left to do.
        done = replacement.copied_sectors(metadata) * SECTOR_BYTES
        done = total - done if window.undo else done
        done += len(window.copied) * metadata.config["chunk_sectors"] * SECTOR_BYTES
        self._progress(
            progress_line(min(done, total), total, self._result.copied, now - self._begun)
        )

    # The short time in which the window is frozen

    def _take(self, window: _Window, written: Callable[[], set[int]]) -> Metadata | None:
        """Freeze the window, copy what was written since, and let its new place count.

        The caller holds the lock. Nothing is done if the target has changed in a way that the copy
        does not know of; then the window is copied again.

        Returns:
            The generation that was committed, if one was.
        """
        name = window.target.name
        target = self._whole(name)
        if not _same_devices(target, window.target):
            return None
        before, now = window.target.metadata, target.metadata
        if replacement.copied_chunks(now) != replacement.copied_chunks(before):
            return None
        # Whoever has moved a chunk meanwhile, it is copied from where it is now.
        moved = {c for c in window.chunks if window.place(before, c) != window.place(now, c)}
        window.target = target
        begun = self._clock()
        attempted: set[int] = set()
        with contextlib.ExitStack() as kept:
            events = kept.enter_context(self._tools.mapper.events())
            kept.enter_context(self._tools.guarded(target, window.disks))
            try:
                self._tools.freezer.freeze(target, window.chunks, FREEZE_SECONDS, events)
                self._copy(window, written() | moved, in_use=False, check=True)
                new = now if window.bad else self._commit(window, attempted)
                self._tools.freezer.thaw(target, new, window.chunks, events)
            except BaseException:
                # Only the metadata on the spares can say now where the chunks are.
                self._tools.end_freeze(name, attempted)
                raise
            self._result.pauses.append(self._clock() - begun)
            self._tools.freezer.park(target)
        if new is now:
            return None
        self._result.windows += 1
        return new

    def _commit(self, window: _Window, attempted: set[int]) -> Metadata:
        """Make the copies durable, and the generation in which they count.

        Args:
            window: all of it was copied.
            attempted: gets the indexes of spares that the commit was begun on.
        """
        self._flush(window.destination)
        self._step("window_flushed")
        metadata = window.target.metadata
        on_main = {c for c in window.chunks if window.place(metadata, c) is None}
        if not on_main <= window.copied.keys():
            missing = sorted(on_main.difference(window.copied))
            raise AssertionError(f"chunks {missing} were not copied")
        border = window.chunks.start if window.undo else window.chunks.stop
        new = replacement.advanced(
            self._engine.successor(metadata), border, set(window.copied) - on_main
        )
        attempted |= set(window.disks.members)
        self._engine.commit_next(window.target, window.disks, new)
        self._step("window_committed")
        return new

    # Chunks that cannot be copied

    def _heal(self, window: _Window) -> None:
        """Move the window's bad chunks to spares; the caller holds the lock."""
        ranges = [window.sectors(chunk) for chunk in sorted(window.bad)]
        report = self._engine.remap(window.target.name, ranges, patience=self._patience)
        self._result.healed += [chunk.chunk for chunk in report.chunks]

    def _let_heal(self, name: str) -> None:
        """Leave the lock to the reflex while I/O of the target is held."""
        for _turn in range(_HEALING_TRIES):
            hold = self._tools.mapper.info(stack.hold_name(name))
            used = self._tools.mapper.dependencies(name)
            if hold is None or used != [hold.devno] or not self._engine.healer_runs():
                return
            if self._engine.path_of(name).active:
                return
            self._pause(_HEALING_SECONDS)


def progress_line(done: int, total: int, copied: int, seconds: float) -> str:
    """How far a copy is.

    Args:
        done: bytes that need no more copying.
        total: bytes in all.
        copied: bytes that were copied in ``seconds``.
        seconds: since the copy began.
    """
    rate = copied / seconds if seconds > 0 else 0.0
    left = f"{(total - done) / rate:.0f} s left" if rate else "time left unknown"
    share = 100 * done / total
    return f"copied {done} of {total} bytes, {share:.1f} %, {rate / 1e6:.1f} MB/s, {left}"


class _BadRead(Exception):
    """A range has a block that cannot be read."""


def _read(device: OpenDevice, sector: int, count: int) -> bytes:
    try:
        return device.read(sector, count)
    except OSError as error:
        if error.errno in MEDIUM_ERRORS:
            raise _BadRead from error
        raise DmRemapError(
            f"cannot be read: {error.strerror or error}",
            device=device.name,
            remedy="check that it is attached and powered, and run this again",
        ) from error


def _cannot_write(device: OpenDevice, error: OSError) -> DmRemapError:
    return DmRemapError(
        f"cannot be written: {error.strerror or error}", device=device.name, remedy=_LEAVE
    )


def _forgets(device: OpenDevice) -> DmRemapError:
    return DmRemapError("gives back other data than was written", device=device.name, remedy=_LEAVE)


def _close_counter(counter: WriteCounter) -> None:
    # It goes with the device, if that is gone.
    with contextlib.suppress(DmRemapError):
        counter.close()


def _same_devices(now: ActiveTarget, before: ActiveTarget) -> bool:
    def devices(target: ActiveTarget) -> Sequence[object]:
        main, new = target.main, target.replacement
        members = {spare.index: spare.candidate.info.devno for spare in target.spares}
        return main and main.devno, new and new.devno, target.spare_devnos, members

    return devices(now) == devices(before)
