# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Extents and ranges of sectors against a dictionary of chunks and a set of sectors."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dm_remap.errors import Refused
from dm_remap.events import subtract_ranges
from dm_remap.extents import (
    MAX_RUN_CHUNKS,
    chunks_of,
    find,
    merge,
    merge_sectors,
    place_of,
    runs,
    without,
)
from dm_remap.format import Extent

CHUNKS = 24

Places = dict[int, tuple[int, int, int]]


@st.composite
def places(draw: st.DrawFn) -> Places:
    """Logical chunk to spare, chunk there, and flags; dense, so that runs come about."""
    found: Places = {}
    for chunk in draw(st.sets(st.integers(0, CHUNKS))):
        run = found.get(chunk - 1)
        if run and draw(st.booleans()):
            found[chunk] = (run[0], run[1] + 1, run[2])
        else:
            found[chunk] = draw(st.tuples(st.integers(0, 1), st.integers(0, 30), st.integers(0, 1)))
    return found


def as_places(extents: Iterable[Extent]) -> Places:
    return {
        extent.logical + step: (extent.spare, extent.physical + step, extent.flags)
        for extent in extents
        for step in range(extent.length)
    }


def single(chunk: int, place: tuple[int, int, int]) -> Extent:
    return Extent(chunk, 1, *place)


@given(places(), st.randoms(use_true_random=False))
def test_merging_keeps_every_chunk_and_joins_all_that_continue(
    naive: Places, shuffler: random.Random
) -> None:
    given_extents = [single(chunk, place) for chunk, place in naive.items()]
    shuffler.shuffle(given_extents)
    merged = merge(given_extents)
    assert as_places(merged) == naive
    assert list(merged) == sorted(merged)
    assert merge(merged) == merged
    for chunk, (spare, physical, flags) in naive.items():
        begins = any(extent.logical == chunk for extent in merged)
        assert begins == (naive.get(chunk - 1) != (spare, physical - 1, flags))


@given(places(), st.integers(-2, CHUNKS + 2))
def test_finding_is_looking_up(naive: Places, chunk: int) -> None:
    merged = merge(single(*item) for item in naive.items())
    found = find(merged, chunk)
    assert (found is not None) == (chunk in naive)
    if found:
        assert as_places([found])[chunk] == naive[chunk]


def test_an_extent_is_not_joined_beyond_its_longest() -> None:
    halves = [Extent(0, MAX_RUN_CHUNKS, 0, 0), Extent(MAX_RUN_CHUNKS, 1, 0, MAX_RUN_CHUNKS)]
    assert merge(halves) == tuple(halves)
    assert merge(
        [Extent(0, MAX_RUN_CHUNKS - 1, 0, 0), Extent(MAX_RUN_CHUNKS - 1, 1, 0, 65535)]
    ) == (Extent(0, MAX_RUN_CHUNKS, 0, 0),)


@pytest.mark.parametrize(
    "second", [Extent(4, 1, 1, 9), Extent(5, 2, 0, 9), Extent(2, 3, 0, 9), Extent(3, 9, 0, 9)]
)
def test_a_chunk_in_two_extents_is_an_error(second: Extent) -> None:
    with pytest.raises(ValueError, match="two extents"):
        merge([Extent(4, 2, 0, 0), second])


ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=6)


def as_sectors(items: Iterable[tuple[int, int]]) -> set[int]:
    return {sector for start, count in items for sector in range(start, start + count)}


@given(ranges, st.sampled_from([8, 16]))
def test_chunks_are_those_that_a_sector_lies_in(items: list[tuple[int, int]], size: int) -> None:
    expected = sorted({sector // size for sector in as_sectors(items)})
    assert chunks_of(items, size, total_sectors=80) == expected


@pytest.mark.parametrize("wrong", [(-1, 2), (0, 0), (5, -1), (79, 2), (80, 1), (0, 81)])
def test_ranges_beside_the_target_are_refused(wrong: tuple[int, int]) -> None:
    with pytest.raises(Refused, match="which has 80 sectors"):
        chunks_of([(0, 1), wrong], 8, total_sectors=80)


def test_the_last_sector_is_on_the_target() -> None:
    assert chunks_of([(79, 1)], 16, total_sectors=80) == [4]
    assert chunks_of([(80, 1)], 16, total_sectors=81) == [5]


@given(ranges)
def test_merged_ranges_hold_the_same_sectors_and_never_touch(items: list[tuple[int, int]]) -> None:
    merged = merge_sectors(items)
    assert as_sectors(merged) == as_sectors(items)
    ends = [start + count for start, count in merged]
    assert all(end < start for end, (start, _count) in zip(ends, merged[1:]))


@given(st.sets(st.integers(0, 40)))
def test_runs_are_the_numbers_and_do_not_touch(numbers: set[int]) -> None:
    found = runs(sorted(numbers))
    assert [n for first, count in found for n in range(first, first + count)] == sorted(numbers)
    assert all(sum(before) < after[0] for before, after in zip(found, found[1:]))


@given(st.sets(st.integers(0, 60)), st.sets(st.integers(0, 60)), st.integers(0, 3))
def test_chunks_are_taken_out_and_the_rest_stays(
    chunks: set[int], cut: set[int], shift: int
) -> None:
    known = {chunk: 100 + shift + chunk for chunk in chunks}
    extents = merge(Extent(chunk, 1, 0, place) for chunk, place in known.items())
    left = without(extents, cut)
    assert left == sorted(left)
    found = {
        extent.logical + number: extent.physical + number
        for extent in left
        for number in range(extent.length)
    }
    assert found == {chunk: place for chunk, place in known.items() if chunk not in cut}
    assert all(extent.length > 0 for extent in left)
    for chunk in chunks:
        assert place_of(extents, chunk) == Extent(chunk, 1, 0, known[chunk])


RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=8)


@given(RANGES, RANGES)
def test_sectors_are_taken_out_of_ranges(
    ranges: list[tuple[int, int]], holes: list[tuple[int, int]]
) -> None:
    def numbers(pieces: list[tuple[int, int]]) -> set[int]:
        return {sector for start, count in pieces for sector in range(start, start + count)}

    left = subtract_ranges(ranges, holes)
    assert numbers(left) == numbers(ranges) - numbers(holes)
    assert sorted(left) == left
    assert sum(count for _start, count in left) == len(numbers(left))
