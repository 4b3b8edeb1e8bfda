# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which spare chunk a failing chunk goes to, and how full the spares are (pure)."""

from __future__ import annotations

import enum
import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Callable

from . import events
from .errors import Refused, count_of
from .extents import runs
from .format import Extent, Geometry, Metadata, spare_uuid_of

FIRST_FIT = "first_fit"
BALANCED = "balanced"
HEALTH = "health"
POLICIES = (FIRST_FIT, BALANCED, HEALTH)

BEST_SCORE = 100.0


@dataclass(frozen=True)
class Capacity:
    """Chunks of one spare or of several.

    Args:
        total: chunks that can hold remapped data, the bad ones included.
        free: chunks that can be had now.
        used: chunks that hold remapped data.
        bad: chunks that are known to be bad, and not used.
        reserved: chunks that a copy of the metadata touches; they are not in the total.
    """

    total: int
    free: int
    used: int = 0
    bad: int = 0
    reserved: int = 0

    @property
    def filled_percent(self) -> float:
        """How much of the total is used or bad, 0 to 100; 100 where there is nothing."""
        return 100 * (self.total - self.free) / self.total if self.total else 100.0


def capacity(
    geometry: Geometry,
    index: int,
    extents: Iterable[Extent],
    bad: Collection[tuple[int, int]] = (),
) -> Capacity:
    """Count the chunks of spare ``index``.

    Args:
        geometry: the spare's layout.
        index: its position in the configuration.
        extents: remaps that exist.
        bad: pairs of spare index and chunk that are known to be bad.
    """
    places = [(extent.physical, extent.length) for extent in extents if extent.spare == index]
    used = sum(length for _first, length in places)
    known = {chunk for spare, chunk in bad if spare == index and geometry.holds(chunk)}
    # A bad chunk that is in use counts as used.
    unused = len(known) - _count_inside(known, places) if known else 0
    total = geometry.usable_chunks
    return Capacity(total, total - used - unused, used, unused, len(geometry.reserved_chunks))


def _count_inside(chunks: Iterable[int], places: Iterable[tuple[int, int]]) -> int:
    """How many of the chunks are in one of the places (first, length), which are apart."""
    ordered = sorted(places)
    firsts = [first for first, _length in ordered]
    below = ((chunk, bisect_right(firsts, chunk) - 1) for chunk in chunks)
    return sum(at >= 0 and chunk < sum(ordered[at]) for chunk, at in below)


def capacities(
    geometries: Mapping[int, Geometry],
    extents: Sequence[Extent],
    bad: Collection[tuple[int, int]] = (),
) -> dict[int, Capacity]:
    """Count the chunks of each spare, by index; the arguments are those of `capacity`."""
    return {index: capacity(geometries[index], index, extents, bad) for index in sorted(geometries)}


def whole(parts: Iterable[Capacity]) -> Capacity:
    """The capacity of several spares together."""
    rows = [asdict(part) for part in parts]
    return Capacity(**{key: sum(row[key] for row in rows) for key in asdict(Capacity(0, 0))})


def pool_of(metadata: Metadata, geometries: Mapping[int, Geometry]) -> Capacity:
    """The capacity of the spares with these layouts, by index, together."""
    return whole(capacities(geometries, metadata.extents, bad_places_of(metadata)).values())


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class State(enum.Enum):
    """How full a pool is, the least full first."""

    OK = "ok"
    WARN = "warn"
    CRITICAL = "critical"
    FULL = "full"


@dataclass(frozen=True)
class Thresholds:
    """From which share of its chunks on a pool is said to be filling, in percent.

    Args:
        warn: 1 to ``critical``.
        critical: ``warn`` to 100.

    Raises:
        Refused: they are other numbers, or none.
    """

    warn: int = 80
    critical: int = 95

    def __post_init__(self) -> None:
        whole_numbers = all(_is_int(value) for value in (self.warn, self.critical))
        if not whole_numbers or not 1 <= self.warn <= self.critical <= 100:
            raise Refused(
                f"thresholds warn {self.warn!r} and critical {self.critical!r} are not possible",
                remedy="give whole percents from 1 to 100, warn not above critical",
            )


def state_of(pool: Capacity, thresholds: Thresholds) -> State:
    """How full a pool is. Without a free chunk it is full, also where it has none at all."""
    filled = 100 * (pool.total - pool.free)
    if pool.free <= 0:
        return State.FULL
    if filled >= thresholds.critical * pool.total:
        return State.CRITICAL
    return State.WARN if filled >= thresholds.warn * pool.total else State.OK


def event_of_change(before: State, after: State) -> str | None:
    """The event type that a change of state deserves: one for each rise, none for a fall."""
    order = list(State)
    if order.index(after) <= order.index(before):
        return None
    return {
        State.WARN: events.POOL_WARN,
        State.CRITICAL: events.POOL_CRITICAL,
        State.FULL: events.POOL_FULL,
    }[after]


def warning_of(pool: Capacity, thresholds: Thresholds) -> str | None:
    """A sentence about a pool that is over a threshold."""
    state = state_of(pool, thresholds)
    if state is State.OK:
        return None
    if state is State.FULL:
        return (
            f"the spares are full, with {count_of(pool.used, 'remapped chunk')}; replace the main"
        )
    # Rounded down, or 99.9 % would be told as full.
    filled = math.floor(pool.filled_percent)
    return (
        f"the spares are filled to {filled} % ({state.value}), and "
        f"{count_of(pool.free, 'chunk')} of {pool.total} can still be remapped"
    )


def policy_of(config: Mapping[str, Any]) -> str:
    """The allocation policy of a target's configuration; `FIRST_FIT` where it has none."""
    policy = config.get("allocation")
    return policy if policy in POLICIES and isinstance(policy, str) else FIRST_FIT


def thresholds_of(config: Mapping[str, Any]) -> Thresholds:
    """The thresholds of a target's configuration; the defaults where it has none or wrong ones."""
    stored = config.get("thresholds")
    if not isinstance(stored, dict):
        return Thresholds()
    known = {key: stored[key] for key in ("warn", "critical") if key in stored}
    try:
        return Thresholds(**known)
    except Refused:
        return Thresholds()


def scores_of(metadata: Metadata) -> dict[int, float]:
    """The health scores of the spares, 0 to 100, by index; 100 where none is known."""
    scores: dict[int, float] = {}
    for index, entry in _health_of_spares(metadata):
        score: Any = entry.get("score")
        number = isinstance(score, (int, float)) and not isinstance(score, bool)
        scores[index] = float(score) if number and 0 <= score <= BEST_SCORE else BEST_SCORE
    return scores


def bad_places_of(metadata: Metadata) -> set[tuple[int, int]]:
    """Chunks that are known to be bad, as pairs of spare index and chunk."""
    found = set()
    for index, entry in _health_of_spares(metadata):
        chunks = entry.get("bad_chunks")
        if isinstance(chunks, list):
            found |= {(index, chunk) for chunk in chunks if _is_int(chunk) and chunk >= 0}
    return found


def _health_of_spares(metadata: Metadata) -> Iterable[tuple[int, Mapping[str, Any]]]:
    """What the metadata's health says of each spare, which may be nothing."""
    known = metadata.health.get("spares")
    for index, spare in enumerate(metadata.config["spares"]):
        if spare is not None:
            key = str(spare_uuid_of(metadata, index))
            entry = known.get(key) if isinstance(known, dict) else None
            yield index, entry if isinstance(entry, dict) else {}


def allocate(
    chunks: Sequence[int],
    geometries: Mapping[int, Geometry],
    extents: Sequence[Extent],
    avoid: Collection[tuple[int, int]] = (),
    policy: str = FIRST_FIT,
    scores: Mapping[int, float] | None = None,
) -> list[Extent]:
    """Choose a spare chunk for each logical chunk.

    Each run of consecutive logical chunks gets, in this order:

    1. The places next to those of the chunks before and behind it, where these are remapped and
       the places are free, so that the extents merge.
    2. One run of places above everything used so far, on the first spare by the policy that has
       one. They were not written since the spare was formatted, unless by a remap that was given
       up: a lost sector reads as an error there by itself. For places of steps 1 and 3 that is not
       so likely, and whoever writes a chunk must check it for every place.
    3. The shortest run of lower places that is long enough, on the first spare that has one.

    What no run of places is long enough for is split, the longest run first. The policies order the
    spares: ``first_fit`` by index, ``balanced`` by the free share of their chunks, ``health`` by
    score. The last uses no spare, and step 1 neither, while one with a higher score has room.

    Args:
        chunks: logical chunks, ascending.
        geometries: the usable spares, by index.
        extents: remaps that exist.
        avoid: pairs of spare index and chunk that must not be used.
        policy: one of `POLICIES`.
        scores: health of the spares by index, 0 to 100; 100 where absent.

    Returns:
        An extent of one chunk for each of ``chunks``, in their order.

    Raises:
        Refused: the spares have too few free chunks.
    """
    spares = _spares(geometries, extents, avoid)
    room = sum(spare.free for spare in spares)
    if room < len(chunks):
        raise Refused(
            f"the spares have {count_of(room, 'free chunk')}, and {len(chunks)} are needed",
            remedy="copy the data to another disk",
        )
    ranks = dict(scores or {}) if policy == HEALTH else {}
    allocation = _Allocation(spares, extents, _order(policy), ranks)
    for run in runs(chunks):
        allocation.place(*run)
    return [Extent(chunk, 1, *allocation.places[chunk]) for chunk in chunks]


class _Spare:
    """The free places of one spare, as gaps [start, end) between what must not be used."""

    def __init__(
        self,
        index: int,
        geometry: Geometry,
        used: Sequence[tuple[int, int]],
        avoid: Iterable[int],
    ) -> None:
        self.index = index
        self.total = geometry.usable_chunks
        # Above everything used so far; gaps from here on are fresh.
        self._fresh = max((first + length for first, length in used), default=0)
        reserved = geometry.reserved_chunks
        shunned = [(chunk, 1) for chunk in avoid if geometry.holds(chunk)]
        taken = [*used, (reserved.start, len(reserved)), *shunned]
        self._starts: list[int] = []
        self._ends: list[int] = []
        position = 0
        taken.sort()
        for first, length in taken:
            if position < first:
                self._starts.append(position)
                self._ends.append(first)
            if first + length > position:
                position = first + length
        if position < geometry.chunks:
            self._starts.append(position)
            self._ends.append(geometry.chunks)
        self.free = sum(self._ends) - sum(self._starts)
        # The lower gaps by length, to find one that is just long enough.
        lower = bisect_left(self._starts, self._fresh)
        self._lower = sorted(
            (end - start, start) for start, end in zip(self._starts[:lower], self._ends)
        )

    def free_from(self, place: int) -> int:
        """Number of free places from ``place`` on."""
        gap = bisect_right(self._starts, place) - 1
        return max(0, self._ends[gap] - place) if gap >= 0 else 0

    def free_below(self, place: int) -> int:
        """Number of free places directly below ``place``."""
        gap = bisect_left(self._starts, place) - 1
        return place - self._starts[gap] if gap >= 0 and self._ends[gap] >= place else 0

    def find(self, length: int, fresh: bool) -> tuple[int, int] | None:
        """First place and length of a gap that holds ``length``, or else of the longest.

        Args:
            length: number of places, 1 or more.
            fresh: look above everything that is in use, and take the lowest; else look below.
        """
        if not fresh:
            at = min(bisect_left(self._lower, (length, -1)), len(self._lower) - 1)
            return (self._lower[at][1], self._lower[at][0]) if self._lower else None
        longest: tuple[int, int] | None = None
        for gap in range(bisect_left(self._starts, self._fresh), len(self._starts)):
            size = self._ends[gap] - self._starts[gap]
            if longest is None or size > longest[1]:
                longest = (self._starts[gap], size)
            if size >= length:
                break
        return longest

    def take(self, place: int, length: int) -> None:
        """Use free places."""
        gap = bisect_right(self._starts, place) - 1
        start, end = self._starts[gap], self._ends[gap]
        left = [(start, place)] if start < place else []
        left += [(place + length, end)] if place + length < end else []
        self._starts[gap : gap + 1] = [first for first, _last in left]
        self._ends[gap : gap + 1] = [last for _first, last in left]
        self.free -= length
        if start < self._fresh:
            del self._lower[bisect_left(self._lower, (end - start, start))]
            for first, last in left:
                insort(self._lower, (last - first, first))


class _Allocation:
    """Places runs of logical chunks.

    Args:
        spares: the spares with their free places, by index.
        extents: remaps that exist.
        order: sorts the spares, the best first.
        scores: by index; no spare is used while one with a higher score has room.
    """

    def __init__(
        self,
        spares: Sequence[_Spare],
        extents: Iterable[Extent],
        order: Callable[[_Spare], tuple[float, int]],
        scores: Mapping[int, float],
    ) -> None:
        self.places: dict[int, tuple[int, int]] = {}
        self._spares = spares
        self._by_index = {spare.index: spare for spare in spares}
        self._order = order
        self._scores = scores
        # Where the neighbours of the extents' first and last chunks would continue them.
        here = [extent for extent in extents if extent.spare in self._by_index]
        self._before = {extent.logical: extent for extent in here}
        self._behind = {extent.logical + extent.length: extent for extent in here}

    def place(self, first: int, count: int) -> None:
        """Place the logical chunks from ``first`` on, whose neighbours are not to be placed."""
        taken = self._behind_neighbour(first, count)
        first, count = first + taken, count - taken
        count -= self._before_neighbour(first, count)
        while count:
            spare, place, length = self._best(count)
            self._take(first, spare, place, length)
            first, count = first + length, count - length

    def _behind_neighbour(self, first: int, count: int) -> int:
        neighbour = self._behind.get(first)
        spare = self._usable().get(neighbour.spare) if neighbour else None
        if not neighbour or not spare:
            return 0
        place = neighbour.physical + neighbour.length
        length = min(count, spare.free_from(place))
        if length:
            self._take(first, spare, place, length)
        return length

    def _before_neighbour(self, first: int, count: int) -> int:
        neighbour = self._before.get(first + count)
        spare = self._usable().get(neighbour.spare) if neighbour else None
        if not neighbour or not spare:
            return 0
        length = min(count, spare.free_below(neighbour.physical))
        if length:
            self._take(first + count - length, spare, neighbour.physical - length, length)
        return length

    def _usable(self) -> dict[int, _Spare]:
        """The spares with room of which none has a higher score."""
        roomy = [spare for spare in self._spares if spare.free]
        best = max((self._score(spare) for spare in roomy), default=0)
        return {spare.index: spare for spare in roomy if self._score(spare) == best}

    def _score(self, spare: _Spare) -> float:
        return self._scores.get(spare.index, BEST_SCORE)

    def _best(self, count: int) -> tuple[_Spare, int, int]:
        """The gap for ``count`` chunks or as many of them as possible: spare, place, length."""
        candidates = sorted(self._usable().values(), key=self._order)
        for fresh in (True, False):
            found = [(s, gap) for s in candidates for gap in [s.find(count, fresh)] if gap]
            if found:
                # Of several that are long enough, or equally long, the first one.
                spare, (place, length) = max(found, key=lambda item: min(item[1][1], count))
                return spare, place, min(length, count)
        raise AssertionError("room was counted before")

    def _take(self, first: int, spare: _Spare, place: int, length: int) -> None:
        spare.take(place, length)
        for offset in range(length):
            self.places[first + offset] = (spare.index, place + offset)


def _spares(
    geometries: Mapping[int, Geometry],
    extents: Iterable[Extent],
    avoid: Iterable[tuple[int, int]],
) -> list[_Spare]:
    used: dict[int, list[tuple[int, int]]] = {index: [] for index in sorted(geometries)}
    shunned: dict[int, set[int]] = {index: set() for index in used}
    for extent in extents:
        if extent.spare in used:
            used[extent.spare].append((extent.physical, extent.length))
    for index, chunk in avoid:
        if index in shunned:
            shunned[index].add(chunk)
    return [_Spare(index, geometries[index], used[index], shunned[index]) for index in used]


def _order(policy: str) -> Callable[[_Spare], tuple[float, int]]:
    """How a policy sorts spares, the best first."""
    if policy == BALANCED:
        return lambda spare: (-spare.free / spare.total, spare.index)
    if policy in (FIRST_FIT, HEALTH):
        # Of the spares that `HEALTH` looks at, all have the same score.
        return lambda spare: (0, spare.index)
    raise ValueError(f"{policy!r} is none of {', '.join(POLICIES)}")
