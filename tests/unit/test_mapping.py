# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tables against a model that maps every single sector."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dm_remap.devmapper import Segment
from dm_remap.extents import merge
from dm_remap.format import Extent
from dm_remap.mapping import build_table, describe_table, linear_target

MAIN = "8:0"
FROZEN = "253:9"
SPARES = {0: "253:0", 1: "253:1"}


@dataclass(frozen=True)
class Case:
    sectors: int
    chunk: int
    extents: tuple[Extent, ...]
    available: dict[int, str]
    frozen: dict[int, int]

    @property
    def chunks(self) -> int:
        return -(-self.sectors // self.chunk)

    def table(self) -> list[Segment]:
        return build_table(
            self.sectors, self.chunk, MAIN, self.extents, self.available, self.frozen, FROZEN
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    chunk = 8
    chunks = draw(st.integers(1, 14))
    # Up to a whole chunk is missing from the last one.
    sectors = chunks * chunk - draw(st.sampled_from([0, 0, 1, 7]))
    free = {index: list(range(40)) for index in SPARES}
    singles = []
    held = []
    for logical in range(chunks):
        kind = draw(st.sampled_from(["main", "next", "any"]))
        # Chunks are moved from main and from spares.
        if draw(st.integers(0, 3)) == 0:
            held.append(logical)
        if kind != "main":
            spare = draw(st.sampled_from(sorted(SPARES)))
            pick = 0 if kind == "next" else draw(st.integers(0, len(free[spare]) - 1))
            singles.append(Extent(logical, 1, spare, free[spare].pop(pick)))
    available = {i: SPARES[i] for i in draw(st.sets(st.sampled_from(sorted(SPARES))))}
    frozen = {logical: position for position, logical in enumerate(held)}
    return Case(sectors, chunk, merge(singles), available, frozen)


def naive(case: Case) -> list[tuple[str, int] | None]:
    """Device and sector there for each sector of the target; None where it must fail."""
    mapped: list[tuple[str, int] | None] = []
    for sector in range(case.sectors):
        chunk, within = divmod(sector, case.chunk)
        place: tuple[str, int] | None = (MAIN, sector)
        for extent in case.extents:
            if extent.logical <= chunk < extent.logical + extent.length:
                device = case.available.get(extent.spare)
                offset = (extent.physical + chunk - extent.logical) * case.chunk + within
                place = (device, offset) if device else None
        if chunk in case.frozen:
            place = (FROZEN, case.frozen[chunk] * case.chunk + within)
        mapped.append(place)
    return mapped


def expand(segments: Iterable[Segment]) -> list[tuple[str, int] | None]:
    """What the kernel makes of a table; it refuses gaps and overlaps."""
    mapped: list[tuple[str, int] | None] = []
    for segment in segments:
        assert segment.start == len(mapped)
        assert segment.length > 0
        if segment.target == "error":
            mapped += [None] * segment.length
            continue
        device, offset = linear_target(segment)
        mapped += [(device, offset + step) for step in range(segment.length)]
    return mapped


@given(cases())
def test_every_sector_is_mapped_once_and_to_its_place(case: Case) -> None:
    assert expand(case.table()) == naive(case)


@given(cases())
def test_no_two_segments_could_be_one(case: Case) -> None:
    linear = [
        (segment.start, segment.length, *linear_target(segment))
        for segment in case.table()
        if segment.target == "linear"
    ]
    for (start, length, device, offset), after in zip(linear, linear[1:]):
        assert after != (start + length, after[1], device, offset + length)


@given(cases())
def test_a_table_without_remaps_is_one_segment(case: Case) -> None:
    assert build_table(case.sectors, case.chunk, MAIN, (), case.available) == [
        Segment(0, case.sectors, "linear", f"{MAIN} 0")
    ]


def test_a_short_last_chunk_stays_short() -> None:
    table = build_table(20, 8, MAIN, [Extent(2, 1, 0, 5)], SPARES)
    assert table == [
        Segment(0, 16, "linear", "8:0 0"),
        Segment(16, 4, "linear", "253:0 40"),
    ]


def test_chunks_of_a_missing_spare_fail_instead_of_showing_old_content() -> None:
    table = build_table(32, 8, MAIN, [Extent(1, 2, 3, 0)], {})
    assert [str(segment) for segment in table] == [
        "0 8 linear 8:0 0",
        "8 16 error",
        "24 8 linear 8:0 24",
    ]


@given(cases())
def test_a_linear_segment_is_read_as_it_was_written(case: Case) -> None:
    for segment in case.table():
        if segment.target == "linear":
            device, offset = linear_target(segment)
            assert segment.params == f"{device} {offset}"
        else:
            with pytest.raises(ValueError, match="not a linear segment"):
                linear_target(segment)


def test_people_read_names_in_place_of_numbers() -> None:
    table = [
        Segment(0, 8, "linear", "8:0 0"),
        Segment(8, 8, "linear", "253:0 40"),
        Segment(16, 8, "error", ""),
    ]
    assert describe_table(table, {"8:0": "main"}) == [
        "0 8 linear main 0",
        "8 8 linear 253:0 40",
        "16 8 error",
    ]
