# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The choice of spare chunks: never a wrong one, and in runs that extents can merge."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dm_remap import events, pool
from dm_remap.errors import Refused
from dm_remap.extents import merge, runs
from dm_remap.format import Extent, Geometry, plan_geometry
from dm_remap.pool import (
    POLICIES,
    Capacity,
    State,
    Thresholds,
    allocate,
    capacities,
    capacity,
    event_of_change,
    state_of,
    warning_of,
    whole,
)
from tests.unit.test_planner import created

policies = st.sampled_from(POLICIES)


def geometry(chunks: int, reserved: range) -> Geometry:
    """A spare with few chunks of 1 MiB, of which the far middle copy touches ``reserved``.

    Only what the allocation looks at is right, or enumerating whole spares would take long.
    """
    chunk = 2048
    assert reserved.stop - reserved.start == 1
    return Geometry(
        spare_sectors=1 << 20,
        tag_start=16384,
        tag_sectors=4096,
        journal_sectors=2048,
        data_start=20480,
        data_sectors=chunks * chunk,
        far_middle=20480 + reserved.start * chunk,
        far_end=(1 << 20) - 1024,
        chunk_sectors=chunk,
        block_sectors=1,
    )


@dataclass(frozen=True)
class Case:
    geometries: dict[int, Geometry]
    used: dict[int, set[int]]
    avoid: set[tuple[int, int]]
    extents: tuple[Extent, ...]
    scores: dict[int, float]
    # Logical chunks that can be asked for, apart from each other and from what is remapped.
    apart: range = range(5000, 9000, 2)

    def allowed(self) -> set[tuple[int, int]]:
        return {
            (index, chunk)
            for index, spare in self.geometries.items()
            for chunk in range(spare.chunks)
            if chunk not in spare.reserved_chunks
            and chunk not in self.used[index]
            and (index, chunk) not in self.avoid
        }

    def is_fresh(self, place: tuple[int, int]) -> bool:
        return place[1] > max(self.used[place[0]], default=-1)

    def score(self, index: int, policy: str) -> float:
        return self.scores.get(index, 100) if policy == pool.HEALTH else 100

    def place(self, wanted: Sequence[int], policy: str) -> list[tuple[int, int]]:
        placed = allocate(
            wanted, self.geometries, self.extents, self.avoid, policy, dict(self.scores)
        )
        assert [extent.logical for extent in placed] == list(wanted)
        assert all(extent.length == 1 and extent.flags == 0 for extent in placed)
        return [(extent.spare, extent.physical) for extent in placed]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    geometries = {}
    used: dict[int, set[int]] = {}
    for index in draw(st.sets(st.integers(0, 7), min_size=1, max_size=3)):
        chunks = draw(st.integers(2, 12))
        middle = draw(st.integers(0, chunks - 1))
        geometries[index] = geometry(chunks, range(middle, middle + 1))
        usable = [chunk for chunk in range(chunks) if chunk != middle]
        used[index] = draw(st.sets(st.sampled_from(usable)))
    places = [(index, chunk) for index, spare in used.items() for chunk in sorted(spare)]
    logical = draw(st.permutations(range(0, 3 * len(places), 3)))
    remaps = [Extent(number, 1, *place) for number, place in zip(logical, places)]
    # An extent on a spare that is away takes nothing from the others.
    remaps.append(Extent(999, 1, 9, 0))
    avoid = draw(st.sets(st.tuples(st.integers(0, 7), st.integers(0, 12)), max_size=5))
    scores = draw(st.dictionaries(st.integers(0, 7), st.sampled_from([0, 40, 99.5, 100])))
    return Case(geometries, used, avoid, merge(remaps), scores)


def wanted_of(case: Case, data: st.DataObject) -> list[int]:
    """Logical chunks to remap, beside remapped ones, in runs and alone, as there is room."""
    mapped = {extent.logical for extent in case.extents}
    free = [chunk for chunk in range(130) if chunk not in mapped]
    room = len(case.allowed())
    return sorted(data.draw(st.sets(st.sampled_from(free), max_size=room)))


@given(cases(), policies, st.data())
def test_places_are_free_usable_and_used_once(case: Case, policy: str, data: st.DataObject) -> None:
    chosen = case.place(wanted_of(case, data), policy)
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= case.allowed()


@given(cases(), policies, st.booleans())
def test_all_free_chunks_can_be_had_and_not_one_more(case: Case, policy: str, dense: bool) -> None:
    allowed = case.allowed()
    wanted = range(5000, 9000) if dense else case.apart
    assert set(case.place(wanted[: len(allowed)], policy)) == allowed
    with pytest.raises(Refused, match=rf"{len(allowed)} free chunks?, and {len(allowed) + 1} are"):
        case.place(wanted[: len(allowed) + 1], policy)


@given(cases(), policies, st.data())
def test_the_same_question_has_the_same_answer(
    case: Case, policy: str, data: st.DataObject
) -> None:
    wanted = wanted_of(case, data)
    turned = replace(
        case,
        geometries=dict(reversed(case.geometries.items())),
        extents=tuple(data.draw(st.permutations(case.extents))),
        scores=dict(reversed(case.scores.items())),
    )
    assert case.place(wanted, policy) == turned.place(wanted, policy)


@given(cases(), policies, st.booleans())
def test_chunks_that_were_never_used_come_first(case: Case, policy: str, dense: bool) -> None:
    """Above the highest chunk in use, lost sectors read as errors without further effort."""
    wanted = (range(5000, 9000) if dense else case.apart)[: len(case.allowed())]
    chosen = case.place(wanted, policy)
    for score in {case.score(place[0], policy) for place in chosen}:
        fresh = [case.is_fresh(p) for p in chosen if case.score(p[0], policy) == score]
        assert fresh == sorted(fresh, reverse=True)


@given(cases(), policies, st.data())
def test_a_run_stays_whole_where_it_can(case: Case, policy: str, data: st.DataObject) -> None:
    allowed = case.allowed()
    if not allowed:
        return
    count = data.draw(st.integers(1, len(allowed)))
    chosen = case.place(range(5000, 5000 + count), policy)
    best = max(case.score(index, policy) for index, _chunk in allowed)
    eligible = [place for place in allowed if case.score(place[0], policy) == best]
    fresh, lower = (
        [
            (index, *run)
            for index in case.geometries
            for run in runs(
                sorted(c for i, c in eligible if (i, case.is_fresh((i, c))) == (index, new))
            )
        ]
        for new in (True, False)
    )
    split = sum(after != (before[0], before[1] + 1) for before, after in zip(chosen, chosen[1:]))
    long_enough = [gap for gap in fresh or lower if gap[2] >= count]
    if long_enough:
        assert split == 0
    if long_enough and not fresh:
        here = [gap for gap in long_enough if gap[0] == chosen[0][0]]
        used = next(length for _spare, first, length in here if first == chosen[0][1])
        assert used == min(length for _spare, _first, length in here)
    for before, after in zip(chosen, chosen[1:]):
        following = (before[0], before[1] + 1)
        if following != after and following in allowed:
            # Only where fresh chunks meet lower ones, a gap may be left before its end.
            assert case.is_fresh(following)
            assert not case.is_fresh(before)


@given(cases(), policies, st.booleans(), st.data())
def test_a_chunk_goes_next_to_its_remapped_neighbour(
    case: Case, policy: str, behind: bool, data: st.DataObject
) -> None:
    here = [extent for extent in case.extents if extent.spare in case.geometries]
    if not here:
        return
    neighbour = data.draw(st.sampled_from(here))
    step = 1 if behind else -1
    chunk, place = neighbour.logical + step, (neighbour.spare, neighbour.physical + step)
    # Where the neighbour on the other side has a place too, the one behind it comes first.
    others = [e for e in here if e.logical == chunk + step]
    allowed = case.allowed()
    best = max((case.score(index, policy) for index, _chunk in allowed), default=0)
    if chunk < 0 or others or place not in allowed or case.score(place[0], policy) < best:
        return
    assert case.place([chunk], policy) == [place]


def test_a_gap_between_two_neighbours_is_closed() -> None:
    spare = geometry(12, range(11, 12))
    remaps = [Extent(10, 2, 0, 3), Extent(15, 1, 0, 8)]
    placed = allocate([12, 13, 14], {0: spare}, remaps)
    assert merge([*remaps, *placed]) == (Extent(10, 6, 0, 3),)


def test_a_run_joins_both_neighbours_as_far_as_there_is_room() -> None:
    spares = {0: geometry(30, range(29, 30))}
    remaps = [Extent(9, 2, 0, 1), Extent(50, 1, 0, 4), Extent(15, 1, 0, 9), Extent(60, 1, 0, 7)]
    placed = allocate([11, 12, 13, 14], spares, remaps)
    assert [extent.physical for extent in placed] == [3, 10, 11, 8]


def test_the_shortest_lower_gap_that_is_long_enough_is_filled() -> None:
    spares = {0: geometry(12, range(11, 12))}
    remaps = [Extent(90, 1, 0, 4), Extent(93, 1, 0, 8), Extent(96, 1, 0, 10)]
    for count, first in ((1, 9), (2, 5), (3, 5), (4, 0)):
        placed = allocate(range(count), spares, remaps)
        assert [extent.physical for extent in placed] == [*range(first, first + count)]


def test_a_bad_place_within_an_extent_frees_nothing_of_it() -> None:
    spares = {0: geometry(8, range(7, 8))}
    placed = allocate([1], spares, [Extent(90, 6, 0, 0)], avoid=[(0, 2)])
    assert placed == [Extent(1, 1, 0, 6)]
    assert capacity(spares[0], 0, [Extent(90, 6, 0, 0)], [(0, 2), (0, 6)]) == Capacity(
        7, 0, 6, 1, 1
    )


@pytest.mark.parametrize("chunk", [9, 11])
def test_a_neighbour_on_a_sick_spare_does_not_count(chunk: int) -> None:
    spares = {0: geometry(12, range(11, 12)), 1: geometry(12, range(11, 12))}
    remaps = [Extent(10, 1, 0, 5)]
    for scores, spare in (({0: 0}, 1), ({1: 99}, 0)):
        (placed,) = allocate([chunk], spares, remaps, policy=pool.HEALTH, scores=scores)
        assert placed.spare == spare


@given(cases(), st.data())
def test_no_spare_is_used_while_a_healthier_one_has_room(case: Case, data: st.DataObject) -> None:
    chosen = case.place(wanted_of(case, data), pool.HEALTH)
    left = case.allowed() - set(chosen)
    for index, _chunk in chosen:
        better = {
            i for i in case.geometries if case.score(i, "health") > case.score(index, "health")
        }
        assert not [place for place in left if place[0] in better]


@given(cases())
def test_the_emptiest_spare_is_used_by_the_balanced_policy(case: Case) -> None:
    allowed = case.allowed()
    fresh = {place for place in allowed if case.is_fresh(place)} or allowed
    if not allowed:
        return
    ((chosen, _chunk),) = case.place([5000], pool.BALANCED)

    def share(index: int) -> float:
        return len([1 for i, _c in allowed if i == index]) / case.geometries[index].usable_chunks

    assert share(chosen) == max(share(index) for index, _chunk in fresh)


def test_scattered_chunks_are_spread_by_size() -> None:
    spares = {0: geometry(11, range(5, 6)), 1: geometry(31, range(15, 16))}
    placed = allocate(range(0, 40, 2), spares, (), policy=pool.BALANCED)
    assert [extent.spare for extent in placed].count(0) == 5


def test_the_first_spare_is_filled_first() -> None:
    spares = {3: geometry(5, range(4, 5)), 1: geometry(5, range(4, 5))}
    placed = allocate(range(0, 12, 2), spares, ())
    assert [extent.spare for extent in placed] == [1, 1, 1, 1, 3, 3]


def test_an_unknown_policy_is_no_policy() -> None:
    with pytest.raises(ValueError, match="'best' is none of first_fit, balanced, health"):
        allocate([1], {0: geometry(5, range(4, 5))}, (), policy="best")


class Counted(int):
    """A number that counts how often numbers of its kind are compared."""

    comparisons = 0

    def __lt__(self, other: int) -> bool:
        Counted.comparisons += 1
        return int(self) < int(other)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("fresh", [True, False])
def test_the_effort_does_not_grow_with_the_product_of_chunks_and_extents(
    policy: str, fresh: bool
) -> None:
    """16,384 extents and 1,000 chunks would be 16 million steps; they are far fewer."""
    spares, remaps, wanted = crowded(fresh)
    counted = [replace(e, physical=Counted(e.physical), logical=e.logical) for e in remaps]
    Counted.comparisons = 0
    placed = allocate(wanted, spares, counted, policy=policy)
    assert len(placed) == len(wanted)
    assert 0 < Counted.comparisons < 1_000_000


def crowded(fresh: bool) -> tuple[dict[int, Geometry], list[Extent], list[int]]:
    """Two spares with 16,384 extents of one chunk with gaps between, and 1,000 chunks to place."""
    spares = {index: plan_geometry(1 << 22, 128, 8) for index in range(2)}
    chosen = random.Random(7)
    places = [
        (index, chunk)
        for index, spare in spares.items()
        for chunk in range(0, spare.chunks, 2 if fresh else 3)
        if spare.holds(chunk)
    ]
    places = places[: 1 << 14] if fresh else chosen.sample(places, 1 << 14)
    logical = sorted(chosen.sample(range(0, 1 << 20, 2), 1 << 14))
    remaps = [Extent(number, 1, *place) for number, place in zip(logical, places)]
    wanted = sorted(chosen.sample(range(1 << 20, 1 << 21), 500))
    wanted += range(1 << 22, (1 << 22) + 500)
    return spares, remaps, wanted


# Capacity


@given(cases())
def test_capacity_counts_what_can_be_allocated(case: Case) -> None:
    counted = capacities(case.geometries, case.extents, case.avoid)
    assert list(counted) == sorted(case.geometries)
    allowed = case.allowed()
    for index, spare in case.geometries.items():
        one = counted[index]
        assert one == capacity(spare, index, case.extents, case.avoid)
        assert one.total == spare.chunks - 1
        assert one.reserved == 1
        assert one.used == len(case.used[index])
        assert one.free == len([1 for i, _chunk in allowed if i == index])
        assert one.free + one.used + one.bad == one.total
    together = whole(counted.values())
    assert together.free == len(allowed)
    assert together.total == sum(spare.chunks - 1 for spare in case.geometries.values())
    assert together.used == sum(map(len, case.used.values()))
    assert together.reserved == len(case.geometries)
    assert together.bad == together.total - together.free - together.used


def test_no_spares_have_no_capacity() -> None:
    assert whole([]) == Capacity(0, 0, 0, 0, 0)


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 100), st.integers(1, 100))
def test_the_state_is_what_the_share_says(free: int, used: int, one: int, other: int) -> None:
    limits = Thresholds(min(one, other), max(one, other))
    there = Capacity(free + used, free, used)
    state = state_of(there, limits)
    filled = there.filled_percent
    assert (state is State.FULL) == (free == 0)
    if free:
        # Exact: a double is nearer to the whole number than any other share.
        assert (state in (State.WARN, State.CRITICAL)) == (filled >= limits.warn)
        assert (state is State.CRITICAL) == (filled >= limits.critical)


def test_bad_places_fill_the_pool() -> None:
    assert state_of(Capacity(100, 20, used=1, bad=79), Thresholds()) is State.WARN
    assert state_of(Capacity(100, 21, used=0, bad=79), Thresholds()) is State.OK


def test_the_defaults_are_80_and_95_percent() -> None:
    states = [state_of(Capacity(100, free), Thresholds()) for free in (21, 20, 6, 5, 1, 0)]
    assert [state.value for state in states] == [
        "ok",
        "warn",
        "warn",
        "critical",
        "critical",
        "full",
    ]


@pytest.mark.parametrize(
    "wrong",
    [(0, 95), (96, 95), (80, 101), ("80", 95), (80.5, 95), (True, 95), (None, 95)],
    ids=str,
)
def test_impossible_thresholds_are_refused(wrong: tuple[Any, Any]) -> None:
    with pytest.raises(Refused, match="are not possible"):
        Thresholds(*wrong)


def test_each_rise_deserves_the_event_of_where_it_ends() -> None:
    types = {
        State.WARN: events.POOL_WARN,
        State.CRITICAL: events.POOL_CRITICAL,
        State.FULL: events.POOL_FULL,
    }
    order = list(State)
    for before in State:
        for after in State:
            rises = order.index(after) > order.index(before)
            assert event_of_change(before, after) == (types[after] if rises else None)
    assert set(types.values()) <= set(events.SEVERITIES)


def test_a_pool_over_a_threshold_is_warned_of() -> None:
    assert warning_of(Capacity(1000, 201, 799), Thresholds()) is None
    assert warning_of(Capacity(1000, 1, 999), Thresholds()) == (
        "the spares are filled to 99 % (critical), and 1 chunk of 1000 can still be remapped"
    )
    assert warning_of(Capacity(3, 0, 2, 1), Thresholds()) == (
        "the spares are full, with 2 remapped chunks; replace the main"
    )


# What the metadata says

odd = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 200)
    | st.floats(allow_nan=False)
    | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["score", "bad_chunks", "warn", "critical"]), inner)
    ),
    max_leaves=6,
)


@given(odd, odd, odd)
def test_odd_content_is_taken_for_nothing(first: Any, second: Any, third: Any) -> None:
    metadata = created()
    uuids = [spare["uuid"] for spare in metadata.config["spares"]]
    for health in ({"spares": first}, {"spares": dict(zip(uuids, [second, third]))}):
        strange = replace(metadata, health=health)
        scores = pool.scores_of(strange)
        assert set(scores) == {0, 1}
        assert all(0 <= score <= 100 for score in scores.values())
        for index, chunk in pool.bad_places_of(strange):
            assert index in (0, 1)
            assert chunk >= 0
    config = {**metadata.config, "allocation": first, "thresholds": second}
    assert pool.policy_of(config) == pool.FIRST_FIT
    limits = pool.thresholds_of(config)
    assert 1 <= limits.warn <= limits.critical <= 100


def test_old_metadata_takes_the_defaults() -> None:
    metadata = replace(created(), health={})
    assert pool.policy_of({}) == pool.FIRST_FIT
    assert pool.thresholds_of({}) == Thresholds(80, 95)
    assert pool.scores_of(metadata) == {0: 100, 1: 100}
    assert pool.bad_places_of(metadata) == set()


def test_what_the_metadata_says_is_used() -> None:
    metadata = created()
    key = metadata.config["spares"][1]["uuid"]
    sick = replace(
        metadata, health={"spares": {key: {"score": 12.5, "bad_chunks": [3, -1, "4", True, 7]}}}
    )
    assert pool.scores_of(sick) == {0: 100, 1: 12.5}
    assert pool.bad_places_of(sick) == {(1, 3), (1, 7)}
    for policy in POLICIES:
        assert pool.policy_of({"allocation": policy}) == policy
    assert pool.thresholds_of({"thresholds": {"warn": 10, "more": 1}}) == Thresholds(10, 95)
    assert pool.thresholds_of({"thresholds": {"warn": 99}}) == Thresholds()


def test_a_spare_that_was_taken_out_has_no_score() -> None:
    metadata = created()
    config = {**metadata.config, "spares": [None, metadata.config["spares"][1]]}
    assert pool.scores_of(replace(metadata, config=config)) == {1: 100}


# Real layouts


@pytest.mark.parametrize("policy", POLICIES)
def test_a_real_layout_keeps_clear_of_the_far_middle_copy(policy: str) -> None:
    spare = plan_geometry(1 << 16, 128, 8)
    reserved = spare.reserved_chunks
    before = reserved.start - 1
    placed = allocate([5, 7], {0: spare}, [Extent(0, before, 0, 0)], policy=policy)
    assert [extent.physical for extent in placed] == [before, reserved.stop]
    assert spare.chunk_sector(reserved.stop) >= spare.far_middle + 1024
    assert spare.chunk_sector(before + 1) <= spare.far_middle


def test_without_a_spare_nothing_can_be_placed() -> None:
    assert allocate([], {}, ()) == []
    with pytest.raises(Refused, match="0 free chunks, and 1 are needed"):
        allocate([3], {}, ())
