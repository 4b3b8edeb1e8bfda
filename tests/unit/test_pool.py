# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The choice of spare chunks: never a wrong one, and in runs that extents can merge."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dm_remap.errors import Refused
from dm_remap.extents import merge
from dm_remap.format import Extent, Geometry, plan_geometry
from dm_remap.pool import allocate, capacity


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

    def allowed(self) -> set[tuple[int, int]]:
        return {
            (index, chunk)
            for index, spare in self.geometries.items()
            for chunk in range(spare.chunks)
            if chunk not in spare.reserved_chunks
            and chunk not in self.used[index]
            and (index, chunk) not in self.avoid
        }


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
    remaps = [Extent(1000 + 2 * number, 1, *place) for number, place in enumerate(places)]
    # An extent on a spare that is away takes nothing from the others.
    remaps.append(Extent(999, 1, 9, 0))
    avoid = draw(st.sets(st.tuples(st.integers(0, 7), st.integers(0, 12)), max_size=5))
    return Case(geometries, used, avoid, merge(remaps))


@given(cases(), st.data())
def test_chunks_are_free_usable_and_used_once(case: Case, data: st.DataObject) -> None:
    allowed = case.allowed()
    wanted = list(range(data.draw(st.integers(0, len(allowed)))))
    placed = allocate(wanted, case.geometries, case.extents, case.avoid)
    assert [extent.logical for extent in placed] == wanted
    assert all(extent.length == 1 for extent in placed)
    chosen = [(extent.spare, extent.physical) for extent in placed]
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= allowed


@given(cases())
def test_all_free_chunks_can_be_had_and_not_one_more(case: Case) -> None:
    allowed = case.allowed()
    everything = allocate(range(len(allowed)), case.geometries, case.extents, case.avoid)
    assert {(extent.spare, extent.physical) for extent in everything} == allowed
    with pytest.raises(Refused, match=rf"{len(allowed)} free chunks?, and {len(allowed) + 1} are"):
        allocate(range(len(allowed) + 1), case.geometries, case.extents, case.avoid)


@given(cases())
def test_chunks_that_were_never_used_come_first(case: Case) -> None:
    """Above the highest chunk in use, lost sectors read as errors without further effort."""
    everything = allocate(range(len(case.allowed())), case.geometries, case.extents, case.avoid)
    fresh = [extent.physical > max(case.used[extent.spare], default=-1) for extent in everything]
    assert fresh == sorted(fresh, reverse=True)


@given(cases())
def test_runs_of_chunks_stay_runs(case: Case) -> None:
    """Going on from chunk to chunk is interrupted only where the next chunk is not allowed."""
    allowed = case.allowed()
    everything = allocate(range(len(allowed)), case.geometries, case.extents, case.avoid)
    for before, after in zip(everything, everything[1:]):
        following = (before.spare, before.physical + 1)
        if following in allowed and following != (after.spare, after.physical):
            # Chunks below the highest one in use wait until the fresh ones of all are gone.
            assert before.physical < max(case.used[before.spare]) < following[1]


@given(cases())
def test_capacity_counts_what_can_be_allocated(case: Case) -> None:
    for index, spare in case.geometries.items():
        counted = capacity(spare, index, case.extents)
        assert counted.total == spare.chunks - 1
        assert counted.free == len(allocate_all(spare, index, case))


def allocate_all(spare: Geometry, index: int, case: Case) -> list[Extent]:
    free = spare.chunks - 1 - len(case.used[index])
    return allocate(range(free), {index: spare}, case.extents)


def test_a_real_layout_keeps_clear_of_the_far_middle_copy() -> None:
    spare = plan_geometry(1 << 16, 128, 8)
    reserved = spare.reserved_chunks
    before = reserved.start - 1
    placed = allocate([5, 6], {0: spare}, [Extent(0, before, 0, 0)])
    assert [extent.physical for extent in placed] == [before, reserved.stop]
    assert spare.chunk_sector(reserved.stop) >= spare.far_middle + 1024
    assert spare.chunk_sector(before + 1) <= spare.far_middle


def test_without_a_spare_nothing_can_be_placed() -> None:
    assert allocate([], {}, ()) == []
    with pytest.raises(Refused, match="0 free chunks, and 1 are needed"):
        allocate([3], {}, ())
