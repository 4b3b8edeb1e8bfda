# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Recovery from every state that a crash of a commit or repair can leave on the spares.

A state is legal when all that was flushed is there, and of what was written since its device's
last flush each write is absent, whole or torn at 512 bytes. Since any subset of the unflushed
writes is tried, only the moments before each flush and at the end need to be.

A slot is valid only if the checksums over all of its header and body are right, so a torn slot
reads as the old copy, the new one or none (`test_a_torn_slot_is_old_new_or_invalid`), and then all
that recovery can see of a state is which of these each slot is.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dm_remap import copies
from dm_remap.copies import (
    CommitFailed,
    NoMetadata,
    Survey,
    choose,
    commit,
    repair,
    survey,
    wipe,
)
from dm_remap.format import HEADER_SECTORS, Invalid, Metadata, pack_slot
from tests.parameters import short_form
from tests.unit.copy_scene import (
    NOW,
    ODD_AND_FAR,
    OTHER_TARGET,
    SECTOR,
    SIZE,
    SLOTS,
    SPARES,
    Disk,
    after,
    chosen,
    fill,
    first,
    pool,
)


class Remembered:
    """A pure function that remembers its results and errors, as most slots here are alike."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._known: dict[object, tuple[Any, Invalid | None]] = {}

    def __call__(self, *arguments: Any) -> Any:
        if arguments not in self._known:
            try:
                self._known[arguments] = self._function(*arguments), None
            except Invalid as error:
                self._known[arguments] = None, error
        result, error = self._known[arguments]
        if error:
            raise error.with_traceback(None)
        return result


@pytest.fixture(autouse=True)
def slots_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("unpack_header", "unpack_slot"):
        monkeypatch.setattr(copies, name, Remembered(getattr(copies, name)))


Devices = Mapping[int, Disk]
# The sectors of a write that are on the medium.
Fate = tuple[int, ...]


@dataclass(frozen=True)
class Event:
    """A write to a device, or its flush if there is no data."""

    device: int
    sector: int = 0
    data: bytes = b""

    @property
    def sectors(self) -> range:
        return range(len(self.data) // SECTOR)


@dataclass
class Moment:
    """What is on each device for good, and what was written since."""

    durable: dict[int, Disk]
    pending: dict[int, list[Event]]


class Recorder(Disk):
    """A disk that also writes down what happens, in one order for all devices."""

    def __init__(self, index: int, disk: Disk, events: list[Event]) -> None:
        super().__init__(disk.name, disk.sectors)
        self.blocks = dict(disk.blocks)
        self.unreadable, self.unwritable = set(disk.unreadable), set(disk.unwritable)
        self._index, self._events = index, events

    def write(self, sector: int, data: bytes) -> None:
        super().write(sector, data)
        self._events.append(Event(self._index, sector, data))

    def flush(self) -> None:
        super().flush()
        self._events.append(Event(self._index))


def moments(start: Devices, act: Callable[[Devices], object]) -> Iterator[Moment]:
    """The moments of ``act`` before each flush, and the one after it."""
    events: list[Event] = []
    act({index: Recorder(index, disk, events) for index, disk in start.items()})
    durable = {index: disk.clone() for index, disk in start.items()}
    pending: dict[int, list[Event]] = {index: [] for index in start}
    for event in events:
        if event.data:
            pending[event.device].append(event)
            continue
        yield Moment({i: d.clone() for i, d in durable.items()}, {**pending})
        for written in pending[event.device]:
            durable[event.device].put(written.sector, written.data)
        pending[event.device] = []
    assert not any(pending.values()), "what was written must be flushed in the end"
    yield Moment(durable, pending)


ABSENT: Fate = ()


def whole(event: Event) -> Fate:
    return tuple(event.sectors)


def tears(event: Event) -> list[Fate]:
    """All prefixes and suffixes of the write."""
    every = whole(event)
    return [every[:n] for n in every[1:]] + [every[n:] for n in every[1:]]


def torn(event: Event) -> Fate:
    """Without the end of its body, or of its header where the old body is as the new one."""
    return whole(event)[: HEADER_SECTORS - 1 + event.sector % 2 * 2]


def three(event: Event) -> list[Fate]:
    return [ABSENT, torn(event), whole(event)]


def five(event: Event) -> list[Fate]:
    """Absent, whole, only the header, only the body, and a header torn in itself."""
    every = whole(event)
    header, body = every[:HEADER_SECTORS], every[HEADER_SECTORS:]
    return [ABSENT, every, header, body, every[:1]]


def left(disk: Disk, pending: Sequence[Event], fates: Sequence[Fate]) -> Disk:
    """The disk after a crash."""
    after_crash = disk.clone()
    for event, fate in zip(pending, fates):
        for number in fate:
            data = event.data[number * SECTOR : (number + 1) * SECTOR]
            after_crash.put(event.sector + number, data)
    return after_crash


Variant = tuple[Disk, Survey]


def variants(moment: Moment, index: int, fates: Callable[[Event], list[Fate]]) -> list[Variant]:
    """Every state of one device with what a survey finds there."""
    pending = moment.pending[index]
    found = []
    for chosen_fates in itertools.product(*map(fates, pending)):
        disk = left(moment.durable[index], pending, chosen_fates)
        found.append((disk, survey(disk)))
    return found


@dataclass
class Judge:
    """Says what may be found after a crash, and tries whether work can go on from there.

    ``dead`` are the slots that cannot be read for good.
    """

    old: Metadata | None
    new: Metadata
    dead: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self.seen: set[object] = set()
        self.generations: set[int] = set()
        self.states = 0

    def check(self, state: Sequence[tuple[int, Variant]], must_be_new: bool = False) -> None:
        self.states += 1
        surveys = {disk.name: seen for _index, (disk, seen) in state}
        try:
            choice = choose(surveys, NOW)
        except NoMetadata:
            assert self.old is None
            assert not must_be_new
            self.generations.add(0)
            choice = None
        else:
            found = choice.metadata
            expected = self.old if self.old and found.digest == self.old.digest else self.new
            assert (found, found.body) == (expected, expected.body)
            assert found == self.new or not must_be_new
            self.generations.add(found.generation)
        if self.is_new(state, choice.metadata.generation if choice else 0):
            disks = {index: disk.clone() for index, (disk, _seen) in state}
            if choice:
                self.go_on({index: disk.clone() for index, disk in disks.items()}, repairing=False)
                self.go_on(disks)
            else:
                self.begin_again(disks)

    def is_new(self, state: Sequence[tuple[int, Variant]], generation: int) -> bool:
        """Whether work would go on in a way that was not tried.

        Repair and commit look at one device at a time, at the copies that survey finds there, and
        at the choice; besides, each set of devices' generations is tried once.
        """
        kinds = set()
        together: list[object] = [generation]
        for index, (_disk, seen) in state:
            copies = tuple((copy.header.copy_index, copy.header.digest) for copy in seen.copies)
            failed = tuple((copy.index, copy.diagnosis) for copy in seen.failed)
            kinds.add((generation, index, copies, failed))
            found = frozenset(copy.header.generation for copy in seen.copies)
            together.append((found, bool(failed)))
        kinds.add(tuple(together))
        new = not kinds <= self.seen
        self.seen |= kinds
        return new

    def go_on(self, disks: Devices, repairing: bool = True) -> None:
        """Repair what is damaged, and commit."""
        choice = chosen(*disks.values())
        behind = {
            index
            for index, disk in disks.items()
            if disk.name in choice.stale or index in choice.missing
        }
        if repairing:
            for index, disk in disks.items():
                if index in behind or disk.name in choice.damaged:
                    repair(disk, choice, SPARES[index])
            again = chosen(*disks.values())
            assert again.metadata == choice.metadata
            assert (again.stale, again.missing) == (frozenset(), ())
            assert {copy.index for found in again.damaged.values() for copy in found} <= self.dead
            behind = set()
        following = after(choice.metadata)
        commit(disks, choice.metadata, following, stale=behind)
        assert chosen(*disks.values()).metadata == following

    def begin_again(self, disks: Devices) -> None:
        """After a first commit that left nothing: the same again, or another target."""
        twins = {index: disk.clone() for index, disk in disks.items()}
        commit(disks, None, self.new)
        assert chosen(*disks.values()).metadata == self.new
        another = first(len(twins), target_uuid=OTHER_TARGET)
        for disk in twins.values():
            wipe(disk, survey(disk))
        commit(twins, None, another)
        assert chosen(*twins.values()).metadata == another

    def check_product(
        self, options: Mapping[int, Iterable[Variant]], must_be_new: bool = False
    ) -> None:
        for combination in itertools.product(*options.values()):
            self.check([*zip(options, combination)], must_be_new)


def flushed_once(moment: Moment, number: int) -> bool:
    """Whether each device has flushed its first half at the moment of this number."""
    return number >= len(moment.durable)


def check_all(
    judge: Judge,
    start: Devices,
    act: Callable[[Devices], object],
    fates: Callable[[Event], list[Fate]],
) -> None:
    """Every state of every moment, all combinations of devices. The last moment is the new one."""
    for number, moment in enumerate(moments(start, act)):
        options = {index: variants(moment, index, fates) for index in moment.durable}
        judge.check_product(options, must_be_new=flushed_once(moment, number))


def committing(old: Metadata | None, new: Metadata) -> Callable[[Devices], object]:
    return lambda devices: commit(devices, old, new)


# What a torn slot is

LONG = {"text": "x" * 9000}


@pytest.mark.parametrize(
    ("old_health", "new_health"), [({}, {}), (LONG, {}), ({}, LONG), (LONG, LONG)]
)
@given(data=st.data())
def test_a_torn_slot_is_old_new_or_invalid(
    old_health: dict[str, str], new_health: dict[str, str], data: st.DataObject
) -> None:
    old = first(health=old_health)
    new = old.successor(timestamp_ns=NOW + 1, host_id=old.host_id, health=new_health)
    index = data.draw(st.integers(0, 6))
    blank = data.draw(st.booleans())
    start = fill(Disk("d0"), old, () if blank else (index,))
    event = Event(0, SLOTS[index], pack_slot(new, SPARES[0], SIZE, index))
    drawn = data.draw(st.lists(st.sampled_from(event.sectors), unique=True))
    for fate in [*tears(event), tuple(drawn)]:
        seen = survey(left(start, [event], [fate]))
        assert len(seen.copies) <= 1
        assert all(copy.metadata in ((new,) if blank else (old, new)) for copy in seen.copies)


# Commits


def test_every_crash_of_a_commit() -> None:
    old = after(first(), 3)
    judge = Judge(old, after(old))
    check_all(judge, pool(old, 1), committing(old, judge.new), five)
    assert judge.generations == {4, 5}
    assert judge.states == 5**4 + 5**3 + 1


@pytest.mark.parametrize("health", [{}, LONG], ids=["short", "long"])
def test_every_tear_of_a_commit(health: dict[str, str]) -> None:
    """Each write torn in each way, while the others are absent, torn or whole."""
    old = after(first(health=health), 3)
    judge = Judge(old, after(old))
    for number, moment in enumerate(moments(pool(old, 1), committing(old, judge.new))):
        pending = moment.pending[0]
        for position, event in enumerate(pending):
            options = [three(other) for other in pending]
            options[position] = tears(event)
            for fates in itertools.product(*options):
                disk = left(moment.durable[0], pending, fates)
                judge.check([(0, (disk, survey(disk)))], flushed_once(moment, number))
    assert judge.generations == {4, 5}


def test_every_crash_of_a_commit_to_two_spares() -> None:
    old = after(first(2), 3)
    judge = Judge(old, after(old))
    check_all(judge, pool(old, 2), committing(old, judge.new), three)
    assert judge.generations == {4, 5}
    assert judge.states == 81**2 + 81 + 27**2 + 27 + 1


def extremes(moment: Moment, index: int) -> list[Variant]:
    """A device with all, none and half of what it wrote, once torn and once not.

    For the choice a device is the set of valid generations on it and whether it is damaged, and
    these are all such sets that the moment allows.
    """
    pending = moment.pending[index]
    halves = [whole(event) if n % 2 else ABSENT for n, event in enumerate(pending)]
    mixed = [whole(event) if n % 2 else torn(event) for n, event in enumerate(pending)]
    found = []
    for fates in (
        [ABSENT] * len(pending),
        halves,
        mixed,
        [*map(torn, pending)],
        [*map(whole, pending)],
    ):
        disk = left(moment.durable[index], pending, fates)
        found.append((disk, survey(disk)))
    return found


def test_every_crash_of_a_commit_to_three_spares() -> None:
    """Every state of each spare, with the others in their extreme states."""
    old = after(first(3), 3)
    judge = Judge(old, after(old))
    for number, moment in enumerate(moments(pool(old, 3), committing(old, judge.new))):
        outer = {index: extremes(moment, index) for index in moment.durable}
        for index in moment.durable:
            options = {**outer, index: variants(moment, index, three)}
            judge.check_product(options, flushed_once(moment, number))
    assert judge.generations == {4, 5}


def sample(judge: Judge, start: Devices, act: Callable[[Devices], object], count: int) -> None:
    """States by chance: any subset of the sectors of each write."""
    chance = random.Random(count)
    found = list(moments(start, act))
    for turn in range(count):
        number = turn % len(found)
        state = []
        for index, disk in found[number].durable.items():
            pending = found[number].pending[index]
            share = chance.choice((0.1, 0.5, 0.9, 0.99))
            fates = [
                chance.choice(
                    (ABSENT, whole(e), tuple(n for n in e.sectors if chance.random() < share))
                )
                for e in pending
            ]
            remains = left(disk, pending, fates)
            state.append((index, (remains, survey(remains))))
        judge.check(state, flushed_once(found[number], number))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_crashes_of_a_commit_by_chance(count: int) -> None:
    old = after(first(count, health=LONG), 3)
    sample(Judge(old, after(old)), pool(old, count), committing(old, after(old)), 500)


@pytest.mark.soak
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_many_crashes_of_a_commit_by_chance(count: int) -> None:
    old = after(first(count, health=LONG), 3)
    sample(Judge(old, after(old)), pool(old, count), committing(old, after(old)), 50_000)


def test_every_crash_of_a_first_commit() -> None:
    judge = Judge(None, first())
    check_all(judge, {0: Disk("d0")}, committing(None, judge.new), five)
    assert judge.generations == {0, 1}


@pytest.mark.parametrize("count", [2, 3])
def test_every_crash_of_a_first_commit_to_more_spares(count: int) -> None:
    judge = Judge(None, first(count))
    start = {index: Disk(f"d{index}") for index in range(count)}
    for number, moment in enumerate(moments(start, committing(None, judge.new))):
        outer = {index: extremes(moment, index) for index in moment.durable}
        for index in moment.durable:
            options = {**outer, index: variants(moment, index, three)}
            judge.check_product(options, flushed_once(moment, number))
    assert judge.generations == {0, 1}


# Slots that fail

SUBSETS = [subset for size in range(1, 8) for subset in itertools.combinations(range(7), size)]


@pytest.mark.parametrize("size", short_form(range(1, 7), always=[1, 3, 6]))
def test_every_crash_of_a_commit_over_copies_that_were_lost(size: int) -> None:
    """Damaged, or unreadable until they are written: the first write must spare one good copy."""
    old = after(first(), 3)
    judge = Judge(old, after(old))
    for lost in itertools.combinations(range(7), size):
        start = fill(Disk("d0"), old).damage(*lost, offset=4200)
        check_all(judge, {0: start}, committing(old, judge.new), three)
    assert judge.generations == {4, 5}


@pytest.mark.parametrize(
    ("size", "offset"),
    short_form(
        itertools.product(range(1, 6), [0, HEADER_SECTORS]),
        always=[(1, 0), (2, HEADER_SECTORS), (4, 0), (5, HEADER_SECTORS)],
    ),
)
def test_every_crash_of_a_commit_over_slots_that_stay_unreadable(size: int, offset: int) -> None:
    """They take writes and never read: as long as two others read, nothing is lost."""
    old = after(first(), 3)
    for lost in itertools.combinations(range(7), size):
        start = fill(Disk("d0"), old)
        start.unreadable = {SLOTS[index] + offset for index in lost}
        judge = Judge(old, after(old), frozenset(lost))
        check_all(judge, {0: start}, committing(old, judge.new), three)
        assert judge.generations == {4, 5}


@pytest.mark.parametrize("size", range(1, 8))
def test_every_crash_of_a_commit_over_slots_that_cannot_be_written(size: int) -> None:
    """A commit that fails for it leaves the old or the new generation as well."""
    old = after(first(), 3)
    for dead in itertools.combinations(range(7), size):
        start = fill(Disk("d0"), old)
        start.unwritable = {SLOTS[index] for index in dead}
        judge = Judge(old, after(old), frozenset(dead))
        fails = set(dead) >= set(ODD_AND_FAR)

        def act(devices: Devices, fails: bool = fails, judge: Judge = judge) -> None:
            if fails:
                with pytest.raises(CommitFailed):
                    commit(devices, judge.old, judge.new)
            else:
                commit(devices, judge.old, judge.new)

        for number, moment in enumerate(moments({0: start}, act)):
            for disk, seen in variants(moment, 0, three):
                disk.unwritable.clear()
                judge.check([(0, (disk, seen))], not fails and flushed_once(moment, number))


# Repairs, and crashes after crashes


@pytest.mark.parametrize(
    "others", short_form(["old", "damaged", "blank"], always=["old", "damaged"])
)
def test_every_crash_of_a_repair(others: str) -> None:
    old, new = first(), after(first())
    judge = Judge(new, new)
    for good in SUBSETS:
        rest = tuple(set(range(7)) - set(good))
        start = fill(Disk("d0"), new, range(7) if others == "damaged" else good)
        if others == "damaged":
            start.damage(*rest, offset=4200)
        elif others == "old":
            fill(start, old, rest)
        choice = chosen(start)
        check_all(judge, {0: start}, lambda d, c=choice: repair(d[0], c, SPARES[0]), three)


def test_every_crash_of_bringing_a_stale_spare_up_to_date() -> None:
    old, new = first(2), after(first(2), 3)
    start = {0: fill(Disk("d0"), new), 1: fill(Disk("d1"), old, spare=1)}
    choice = chosen(*start.values())
    judge = Judge(new, new)
    check_all(judge, start, lambda devices: repair(devices[1], choice, SPARES[1]), five)


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(n, marks=pytest.mark.soak) for n in range(1, 12))]
)
def test_every_crash_after_every_crash(part: int) -> None:
    """A commit or the repair that follows a crash of a commit is cut short as well.

    Of the states that the first crash leaves, each part takes every twelfth.
    """
    old = after(first(), 3)
    new = after(old)
    starts: dict[object, Disk] = {}
    for moment in moments(pool(old, 1), committing(old, new)):
        for disk, seen in variants(moment, 0, three):
            key = tuple((c.header.copy_index, c.header.generation) for c in seen.copies)
            starts.setdefault(key, disk)
    assert len(starts) == 3**4 + 3**3 - 1
    following = {m.generation: Judge(m, after(m)) for m in (old, new)}
    repaired = {m.generation: Judge(m, m) for m in (old, new)}
    for disk in [*starts.values()][part::12]:
        choice = chosen(disk)
        current = choice.metadata
        judge = following[current.generation]
        check_all(judge, {0: disk}, committing(current, judge.new), three)
        judge = repaired[current.generation]
        check_all(judge, {0: disk}, lambda d, c=choice: repair(d[0], c, SPARES[0]), three)
    assert [judge.generations for judge in following.values()] == [{4, 5}, {5, 6}]
