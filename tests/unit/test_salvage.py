# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The reading ladder on disks whose sectors are good, weak or bad."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dm_remap.errors import DmRemapError, Refused
from dm_remap.probing import MEDIUM_ERRORS
from dm_remap.salvage import Outcome, Patience, Salvage, salvage

SECTOR = 512
BEGIN = 16


def content(sector: int) -> bytes:
    return sector.to_bytes(8, "little") * 64


@dataclass
class Disk:
    """Sectors that fail: ``failures`` times, or for ever where that is None."""

    failures: dict[int, int | None] = field(default_factory=dict)
    code: int = errno.EIO
    name: str = "/dev/failing"
    log: list[tuple[int, int]] = field(default_factory=list)
    seconds: float = 0.0
    time: float = 0.0

    def read(self, sector: int, count: int) -> bytes:
        self.log.append((sector, count))
        self.time += self.seconds
        failed = False
        for number in range(sector, sector + count):
            left = self.failures.get(number, 0)
            failed = failed or left != 0
            if left:
                self.failures[number] = left - 1
        if failed:
            raise OSError(self.code, "injected")
        return b"".join(content(number) for number in range(sector, sector + count))

    def clock(self) -> float:
        return self.time

    def pause(self, seconds: float) -> None:
        self.time += seconds


def run(disk: Disk, count: int, block: int, patience: Patience | None = None) -> Salvage:
    return salvage(disk, BEGIN, count, block, patience, disk.clock, disk.pause)


def blocks_of(failures: dict[int, int | None], count: int, block: int) -> list[set[int]]:
    return [
        {s for s in range(BEGIN + i, BEGIN + i + block) if failures.get(s, 0) != 0}
        for i in range(0, count, block)
    ]


@st.composite
def damages(draw: st.DrawFn) -> tuple[int, int, dict[int, int | None]]:
    """Block sectors, sectors in the range, and which sectors fail how often."""
    block = draw(st.sampled_from([1, 8]))
    count = block * draw(st.integers(1, 20))
    sectors = st.integers(BEGIN, BEGIN + count - 1)
    return block, count, draw(st.dictionaries(sectors, st.one_of(st.none(), st.integers(1, 40))))


@given(damages())
@example((1, 16, dict.fromkeys(range(BEGIN, BEGIN + 16))))
@example((8, 128, {BEGIN + 3: 5}))
def test_each_block_has_its_own_outcome_and_its_data(
    damage: tuple[int, int, dict[int, int | None]],
) -> None:
    block, count, failures = damage
    disk = Disk(dict(failures))
    result = run(disk, count, block, Patience(retries=3, backoff=0))
    for index, marked in enumerate(blocks_of(failures, count, block)):
        begin = BEGIN + index * block
        singles = [entry for entry in disk.log if entry == (begin, block)]
        outcome = result.outcomes[index]
        if not marked:
            assert outcome is Outcome.FIRST_READ
        if any(failures[sector] is None for sector in marked):
            assert outcome is Outcome.LOST
        if outcome is Outcome.LOST:
            # Given up only after the first try as a single block and every retry of it.
            assert len(singles) == 4
            assert result.errors[index] == errno.EIO
        else:
            assert result.block(index) == b"".join(content(s) for s in range(begin, begin + block))
    assert result.reads == len(disk.log)


@given(damages())
def test_lost_and_readable_are_what_the_outcomes_say(
    damage: tuple[int, int, dict[int, int | None]],
) -> None:
    block, count, failures = damage
    result = run(Disk(dict(failures)), count, block, Patience(retries=1, backoff=0))
    lost = {s for start, length in result.lost for s in range(start, start + length)}
    readable = {i for first, blocks in result.readable for i in range(first, first + blocks)}
    for index, outcome in enumerate(result.outcomes):
        sectors = set(range(BEGIN + index * block, BEGIN + (index + 1) * block))
        assert (sectors <= lost) == (outcome is Outcome.LOST)
        assert bool(sectors & lost) == (outcome is Outcome.LOST)
        assert (index in readable) == (outcome is not Outcome.LOST)
    assert sum(result.count(outcome) for outcome in Outcome) == count


@pytest.mark.parametrize("block", [1, 8])
def test_a_good_range_costs_one_read(block: int) -> None:
    disk = Disk()
    result = run(disk, 128, block)
    assert disk.log == [(BEGIN, 128)]
    assert result.reads == 1
    assert result.outcomes == [Outcome.FIRST_READ] * (128 // block)
    assert result.lost == []


def test_one_bad_sector_costs_few_reads_and_its_retries() -> None:
    disk = Disk({BEGIN + 77: None})
    result = run(disk, 128, 1, Patience(retries=2, backoff=0))
    assert result.lost == [(BEGIN + 77, 1)]
    # Two halves at each of 7 levels below the whole, and two retries.
    assert result.reads == 1 + 2 * 7 + 2


def test_a_weak_sector_is_read_on_a_retry() -> None:
    # It fails as a part of 16, 8, 4, 2 and 1 sectors, then once more.
    disk = Disk({BEGIN + 5: 6})
    result = run(disk, 16, 1, Patience(retries=2, backoff=0))
    assert result.outcomes[5] is Outcome.RETRY
    assert result.count(Outcome.RETRY) == 1
    assert result.block(5) == content(BEGIN + 5)


def test_retries_go_backwards_and_wait_longer_each_time() -> None:
    disk = Disk({BEGIN: None, BEGIN + 3: None})
    pauses: list[float] = []
    salvage(disk, BEGIN, 4, 1, Patience(3, backoff=0.5), disk.clock, pauses.append)
    assert disk.log[-6:] == [(BEGIN + 3, 1), (BEGIN, 1)] * 3
    assert pauses == [0.5, 1.0, 2.0]


def test_a_block_that_was_never_tried_is_not_called_lost() -> None:
    disk = Disk({BEGIN: None}, seconds=1.0)
    with pytest.raises(DmRemapError, match="could not be read within 3 seconds") as caught:
        run(disk, 64, 1, Patience(budget=3.0))
    assert caught.value.device == disk.name


def test_when_the_time_is_spent_after_the_first_pass_no_retry_is_begun() -> None:
    disk = Disk({BEGIN: None}, seconds=1.0)
    result = run(disk, 2, 1, Patience(retries=4, backoff=0, budget=3.0))
    assert result.lost == [(BEGIN, 1)]
    assert len(disk.log) == 3


def test_a_pause_is_not_longer_than_the_time_that_is_left() -> None:
    disk = Disk({BEGIN: None})
    run(disk, 1, 1, Patience(retries=9, backoff=2.0, budget=5.0))
    assert disk.time == 5.0


@pytest.mark.parametrize("code", sorted(MEDIUM_ERRORS))
def test_errors_of_the_medium_are_lost_blocks(code: int) -> None:
    result = run(Disk({BEGIN: None}, code=code), 2, 1, Patience(retries=0))
    assert result.lost == [(BEGIN, 1)]
    assert result.errors == {0: code}


@pytest.mark.parametrize(
    "code", [errno.ENXIO, errno.ENODEV, errno.EINVAL, errno.ENOMEM, errno.ETIMEDOUT, errno.ENOLINK]
)
def test_other_errors_are_not_about_a_block(code: int) -> None:
    with pytest.raises(DmRemapError, match="not a bad block") as caught:
        run(Disk({BEGIN + 1: None}, code=code), 4, 1)
    assert caught.value.device == "/dev/failing"


@pytest.mark.parametrize(
    "wrong", [{"retries": -1}, {"budget": -0.1}, {"budget": float("nan")}], ids=str
)
def test_impossible_patience_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(Refused, match="are not possible"):
        Patience(**wrong)  # type: ignore[arg-type]
