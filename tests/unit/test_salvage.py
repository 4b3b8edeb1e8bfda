# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reading what can still be read, on disks whose sectors are good, weak or bad."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain, combinations
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dm_remap.errors import DmRemapError, Refused
from dm_remap.freezing import FREEZE_SECONDS
from dm_remap.probing import MEDIUM_ERRORS
from dm_remap.reflex import PATIENCE
from dm_remap.salvage import Outcome, Patience, Salvage, Unfinished, salvage

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
    failed: list[tuple[int, int]] = field(default_factory=list)
    seconds: float = 0.0
    failing_seconds: float = 0.0
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
            self.failed.append((sector, count))
            self.time += self.failing_seconds
            raise OSError(self.code, "injected")
        return b"".join(content(number) for number in range(sector, sector + count))

    def clock(self) -> float:
        return self.time

    def pause(self, seconds: float) -> None:
        self.time += seconds


def run(
    disk: Disk, count: int, block: int, patience: Patience | None = None, **more: Any
) -> Salvage:
    return salvage(disk, BEGIN, count, block, patience, disk.clock, disk.pause, **more)


def covering(reads: Iterable[tuple[int, int]], sector: int) -> list[tuple[int, int]]:
    return [(start, count) for start, count in reads if start <= sector < start + count]


def subsets(count: int) -> Iterable[tuple[int, ...]]:
    return chain.from_iterable(combinations(range(count), size) for size in range(count + 1))


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


def check_first_pass(disk: Disk, result: Salvage, bad: set[int], touches: int) -> None:
    """What must hold of a first pass over blocks of one sector of which ``bad`` never read."""
    blocks = len(result.outcomes)
    assert {i for i, outcome in enumerate(result.outcomes) if outcome is Outcome.LOST} == bad
    assert result.count(Outcome.FIRST_READ) == blocks - len(bad)
    good = [entry for entry in disk.log if entry not in disk.failed]
    for index in range(blocks):
        sector = BEGIN + index
        if index in bad:
            assert len(covering(disk.failed, sector)) <= touches
            assert covering(disk.log, sector)[-1] == (sector, 1)
            assert covering(disk.log, sector).count((sector, 1)) == 1
        else:
            assert len(covering(good, sector)) == 1
            assert result.block(index) == content(sector)
    assert len(disk.failed) <= (2 * len(bad) + 1 if bad else 0)
    if not bad:
        assert disk.log == [(BEGIN, blocks)]


@pytest.mark.parametrize("blocks", range(1, 11))
def test_the_first_pass_over_every_set_of_bad_blocks(blocks: int) -> None:
    for chosen in subsets(blocks):
        disk = Disk(dict.fromkeys(BEGIN + index for index in chosen))
        check_first_pass(disk, run(disk, blocks, 1, Patience(0)), set(chosen), touches=3)
        slow = Disk(dict(disk.failures), failing_seconds=7.0)
        check_first_pass(slow, run(slow, blocks, 1, Patience(0)), set(chosen), touches=2)
        assert len(slow.failed) == len(chosen) + (len(chosen) > 0 and blocks > 1)


@given(st.integers(1, 2048), st.data())
def test_the_first_pass_over_long_ranges(blocks: int, data: st.DataObject) -> None:
    bad = data.draw(st.sets(st.integers(0, blocks - 1), max_size=12))
    disk = Disk(dict.fromkeys(BEGIN + index for index in bad))
    check_first_pass(disk, run(disk, blocks, 1, Patience(0)), bad, touches=3)


@given(damages(), st.integers(0, 4), st.booleans())
def test_failing_reads_of_a_block_are_bounded(
    damage: tuple[int, int, dict[int, int | None]], retries: int, slow: bool
) -> None:
    block, count, failures = damage
    disk = Disk(dict(failures), failing_seconds=7.0 if slow else 0.0)
    run(disk, count, block, Patience(retries=retries, backoff=0))
    for sector in failures:
        first = sector - (sector - BEGIN) % block
        touched = covering(disk.failed, sector)
        assert len(touched) <= (2 if slow else 3) + retries
        single = (first, block)
        if single in disk.failed:
            # Once it is known to be bad, no read of more blocks covers it.
            later = disk.log[disk.log.index(single) :]
            assert set(covering(later, sector)) == {single}


def test_one_bad_sector_of_a_slow_disk_costs_two_failing_reads_and_its_retries() -> None:
    disk = Disk({BEGIN + 77: None}, failing_seconds=7.0)
    result = run(disk, 128, 1, Patience(retries=2, backoff=0))
    assert result.lost == [(BEGIN + 77, 1)]
    assert len(disk.failed) == 2 + 2
    assert result.reads == 1 + 128 + 2


def test_one_bad_sector_of_a_quick_disk_costs_few_reads_and_its_retries() -> None:
    disk = Disk({BEGIN + 77: None})
    result = run(disk, 128, 1, Patience(retries=2, backoff=0))
    assert result.lost == [(BEGIN + 77, 1)]
    assert len(disk.failed) == 3 + 2
    # 63 blocks in 6 growing reads, one of 32 that fails and its blocks, then 33 in 6 reads.
    assert result.reads == 1 + 6 + 1 + 32 + 6 + 2


def test_a_failing_read_is_slow_from_the_given_time_on() -> None:
    for seconds, failing in ((0.5, 2), (0.49, 3)):
        disk = Disk({BEGIN + 77: None}, failing_seconds=seconds)
        run(disk, 128, 1, Patience(retries=0, slow=0.5))
        assert len(disk.failed) == failing


def test_after_a_slow_failure_no_growing_read_is_risked_any_more() -> None:
    disk = Disk({BEGIN: None, BEGIN + 60: None})
    seconds = iter([0.0, 9.0, 9.0])
    quick = disk.read

    def read(sector: int, count: int) -> bytes:
        try:
            return quick(sector, count)
        except OSError:
            disk.time += next(seconds)
            raise

    disk.read = read  # type: ignore[method-assign]
    run(disk, 128, 1, Patience(retries=0))
    assert {count for _start, count in disk.log[1:]} == {1}


def test_a_weak_sector_is_read_on_a_retry() -> None:
    # It fails as a part of 16, as one of 4 and alone, then once more.
    disk = Disk({BEGIN + 5: 4})
    result = run(disk, 16, 1, Patience(retries=2, backoff=0))
    assert result.outcomes[5] is Outcome.RETRY
    assert result.count(Outcome.RETRY) == 1
    assert result.block(5) == content(BEGIN + 5)


@given(damages(), st.data())
def test_suspects_are_read_last_and_alone(
    damage: tuple[int, int, dict[int, int | None]], data: st.DataObject
) -> None:
    block, count, failures = damage
    ranges = data.draw(
        st.lists(st.tuples(st.integers(0, BEGIN + count + 20), st.integers(1, 30)), max_size=4)
    )
    suspected = {
        index
        for index in range(count // block)
        for start, length in ranges
        if start < BEGIN + (index + 1) * block and start + length > BEGIN + index * block
    }
    disk = Disk(dict(failures))
    result = run(disk, count, block, Patience(retries=0), suspects=ranges)
    firsts = [BEGIN + index * block for index in sorted(suspected)]
    assert disk.log[len(disk.log) - len(firsts) :] == [(first, block) for first in firsts]
    for first in firsts:
        assert covering(disk.log, first) == [(first, block)]
    assert Outcome.NOT_TRIED not in result.outcomes


def test_what_is_between_suspects_costs_one_read_each() -> None:
    disk = Disk({BEGIN + 40: None})
    run(disk, 128, 1, Patience(retries=0), suspects=[(BEGIN + 40, 1), (BEGIN + 90, 2)])
    begins = [(BEGIN, 40), (BEGIN + 41, 49), (BEGIN + 92, 36)]
    assert disk.log == [*begins, (BEGIN + 40, 1), (BEGIN + 90, 1), (BEGIN + 91, 1)]


@given(damages(), st.integers(1, 5), st.integers(0, 3), st.booleans())
@example((1, 8, {BEGIN: None, BEGIN + 5: 9}), 1, 2, True)
def test_pieces_of_a_salvage_are_the_whole_of_it(
    damage: tuple[int, int, dict[int, int | None]], steps: int, retries: int, slow: bool
) -> None:
    """Interrupted and resumed at any read, it reads the same in the same order."""
    block, count, failures = damage
    threshold = 0.5 if slow else 2.0
    whole = Disk(dict(failures), seconds=1.0)
    expected = run(whole, count, block, Patience(retries, 0, slow=threshold))
    pieces = Disk(dict(failures), seconds=1.0)
    patience = Patience(retries, 0, budget=float(steps), slow=threshold)
    result = None
    before = -1
    while len(pieces.log) > before:
        before = len(pieces.log)
        try:
            result = run(pieces, count, block, patience, resume=result)
            assert Outcome.NOT_TRIED not in result.outcomes
        except Unfinished as unfinished:
            result = unfinished.partial
            tried = covered_alone_or_well(pieces, count, block)
            for index, outcome in enumerate(result.outcomes):
                assert (outcome is not Outcome.NOT_TRIED) == (index in tried)
        assert len(pieces.log) - before <= steps
    assert pieces.log == whole.log
    assert result == expected


def covered_alone_or_well(disk: Disk, count: int, block: int) -> set[int]:
    """Blocks of which it is known whether they can be read."""
    return {
        index
        for index in range(count // block)
        for start, length in covering(disk.log, BEGIN + index * block)
        if length == block or (start, length) not in disk.failed
    }


def test_blocks_that_the_caller_got_elsewhere_are_not_read_over() -> None:
    disk = Disk({BEGIN + 3: None}, seconds=1.0)
    with pytest.raises(Unfinished) as caught:
        run(disk, 64, 1, Patience(0, budget=1.0))
    partial = caught.value.partial
    partial.keep(20, b"n" * SECTOR * 2, Outcome.FIRST_READ)
    result = run(disk, 64, 1, Patience(0), resume=partial)
    assert result.block(20) + result.block(21) == b"n" * SECTOR * 2
    assert [outcome is Outcome.LOST for outcome in result.outcomes] == [i == 3 for i in range(64)]
    assert all(not covering(disk.log[1:], BEGIN + index) for index in (20, 21))


def test_a_disk_that_goes_away_can_be_resumed_when_it_is_back() -> None:
    disk = Disk({BEGIN + 1: None})
    quick = disk.read

    def gone(sector: int, count: int) -> bytes:
        raise OSError(errno.ENXIO, "gone")

    def read(sector: int, count: int) -> bytes:
        if len(disk.log) == 2:
            disk.read = gone  # type: ignore[method-assign]
        return disk.read(sector, count) if len(disk.log) == 2 else quick(sector, count)

    disk.read = read  # type: ignore[method-assign]
    with pytest.raises(Unfinished, match="not a bad block") as caught:
        run(disk, 4, 1, Patience(0))
    partial = caught.value.partial
    assert partial.outcomes == [Outcome.FIRST_READ] + [Outcome.NOT_TRIED] * 3
    assert partial.lost == []
    assert partial.readable == [(0, 1)]
    disk.read = quick  # type: ignore[method-assign]
    result = run(disk, 4, 1, Patience(0), resume=partial)
    assert result.lost == [(BEGIN + 1, 1)]


@pytest.mark.parametrize(("sector", "count", "block"), [(0, 8, 1), (BEGIN, 16, 1), (BEGIN, 8, 8)])
def test_a_result_of_another_range_is_not_resumed(sector: int, count: int, block: int) -> None:
    other = salvage(Disk(), sector, count, block)
    with pytest.raises(ValueError, match="another range"):
        run(Disk(), 8, 1, resume=other)


def test_a_short_answer_is_no_data() -> None:
    disk = Disk()
    disk.read = lambda sector, count: bytes(SECTOR)  # type: ignore[method-assign]
    with pytest.raises(Unfinished, match="gave 512 bytes instead of 2048"):
        run(disk, 4, 1)


@given(damages(), st.integers(0, 3))
def test_progress_rises_to_the_end(
    damage: tuple[int, int, dict[int, int | None]], retries: int
) -> None:
    block, count, failures = damage
    told: list[tuple[int, int]] = []
    disk = Disk(dict(failures))
    patience = Patience(retries, 0)
    run(disk, count, block, patience, progress=lambda done, of: told.append((done, of)))
    assert len(told) == len(disk.log)
    assert told == sorted(told)
    assert told[-1] == (count // block,) * 2
    assert {of for _done, of in told} == {count // block}


def test_progress_counts_what_is_read_or_lost_for_good() -> None:
    told: list[int] = []
    disk = Disk({BEGIN: None, BEGIN + 2: 3})
    run(disk, 4, 1, Patience(2, 0), progress=lambda done, of: told.append(done))
    reads = [(0, 4), (0, 1), (1, 1), (2, 2), (2, 1), (3, 1), (2, 1), (0, 1), (0, 1)]
    assert disk.log == [(BEGIN + first, count) for first, count in reads]
    assert told == [0, 0, 1, 1, 1, 2, 3, 3, 4]


def test_retries_go_backwards_and_wait_longer_each_time() -> None:
    disk = Disk({BEGIN: None, BEGIN + 3: None})
    pauses: list[float] = []
    salvage(disk, BEGIN, 4, 1, Patience(3, backoff=0.5), disk.clock, pauses.append)
    assert disk.log[-6:] == [(BEGIN + 3, 1), (BEGIN, 1)] * 3
    assert pauses == [0.5, 1.0, 2.0]


def test_a_block_that_was_never_tried_is_not_called_lost() -> None:
    disk = Disk({BEGIN: None}, seconds=1.0)
    with pytest.raises(Unfinished, match="could not be read within 3 seconds") as caught:
        run(disk, 64, 1, Patience(budget=3.0))
    assert caught.value.device == disk.name
    partial = caught.value.partial
    assert partial.lost == [(BEGIN, 1)]
    assert partial.count(Outcome.NOT_TRIED) == 62
    assert partial.seconds == 3.0


def test_when_the_time_is_spent_after_the_first_pass_no_retry_is_begun() -> None:
    disk = Disk({BEGIN: None}, seconds=1.0)
    result = run(disk, 2, 1, Patience(retries=4, backoff=0, budget=3.0))
    assert result.lost == [(BEGIN, 1)]
    assert len(disk.log) == 3


def test_thousands_of_retries_are_possible() -> None:
    disk = Disk({BEGIN: None})
    run(disk, 1, 1, Patience(retries=3000, backoff=0.0))
    assert len(disk.log) == 3001


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


def test_no_retry_is_begun_after_its_time_but_every_block_is_tried() -> None:
    disk = Disk({BEGIN + 3: None}, failing_seconds=7.0)
    result = run(disk, 8, 1, Patience(retries=9, backoff=0, budget=100.0, retry_until=30.0))
    assert result.lost == [(BEGIN + 3, 1)]
    # The whole, the block, and retries that begin at 14 and 21 seconds; 7 are for another read.
    assert disk.failed == [(BEGIN, 8)] + [(BEGIN + 3, 1)] * 3
    result = run(Disk({BEGIN: None}, failing_seconds=7.0), 8, 1, Patience(4, 0, retry_until=0.0))
    assert result.failures == {0: 1}


@pytest.mark.parametrize("bad", [1, 2, 4])
def test_the_reflex_retries_where_a_slow_disk_leaves_the_time(bad: int) -> None:
    disk = Disk({BEGIN + index: 1 + 2 for index in range(bad)}, failing_seconds=7.0)
    result = run(disk, 128, 1, replace(PATIENCE, backoff=0))
    assert not result.lost
    assert disk.time < FREEZE_SECONDS


@pytest.mark.parametrize("bad", [1, 8])
@pytest.mark.parametrize("first", range(0, 128, 8))
def test_the_reflex_has_the_time_for_a_slow_physical_block(first: int, bad: int) -> None:
    """Each of its sectors takes 7 s, whether it can be read or not."""
    slow = range(BEGIN + first, BEGIN + first + 8)
    disk = Disk(dict.fromkeys(slow[:bad]), seconds=0.001)
    quick = disk.read

    def read(sector: int, count: int) -> bytes:
        if sector < slow.stop and sector + count > slow.start:
            disk.time += 7.0
        return quick(sector, count)

    disk.read = read  # type: ignore[method-assign]
    result = run(disk, 128, 1, replace(PATIENCE, backoff=0))
    result.read_again(disk)
    assert result.lost == [(slow.start, bad)]
    assert disk.time < FREEZE_SECONDS, "what else fails meanwhile must not wait for longer"


@pytest.mark.parametrize(
    "wrong",
    [
        {"retries": -1},
        {"budget": -0.1},
        {"budget": float("nan")},
        {"slow": -0.1},
        {"slow": float("nan")},
        {"retry_until": -0.1},
        {"retry_until": float("nan")},
    ],
    ids=str,
)
def test_impossible_patience_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(Refused, match="are not possible"):
        Patience(**wrong)  # type: ignore[arg-type]
