# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The reflex on a kernel in memory: what waits goes on, with the right data, whatever happens."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dm_remap import copies, tracing
from dm_remap.engine import Engine
from dm_remap.errors import DmRemapError
from dm_remap.format import geometry_of
from dm_remap.hasty import aside, carry_out, in_line
from dm_remap.moving import at_once
from dm_remap.placing import Route
from dm_remap.plan_spares import SpareRequest, plan_spare_absent
from dm_remap.probing import DeviceState
from dm_remap.reflex import Reflex, Reports, injury_of, wake_up
from dm_remap.tracing import BlockError
from tests.unit.fake_kernel import SECTOR, Io, Kernel, Killed, Process, Request
from tests.unit.test_engine import (
    CHUNK,
    NAME,
    QUICK,
    SECTORS,
    Scene,
    content,
    create_held,
    make_scene,
    record,
)

HOLD = f"{NAME}-hold"


class Trace:
    """A tracefs instance that shows what the kernel in memory printed."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.pipe = -1

    def open(self) -> int:
        # Nothing is ever written to it, so that only what a test does wakes the reflex.
        self.pipe, self.end = os.pipe()
        return self.pipe

    def read(self) -> list[str]:
        lines, self.kernel.trace[:] = list(self.kernel.trace), []
        return lines

    def close(self) -> None:
        os.close(self.pipe)
        os.close(self.end)


@dataclass
class Healer:
    """A reflex on the host of a scene, with a clock that goes on with each turn."""

    scene: Scene
    engine: Engine | None = None
    haste: float = 60.0
    aside: Callable[[Callable[[], None]], Future[None]] = in_line
    now: float = 1000.0
    reports: list[dict[str, Any]] = field(default_factory=list)
    state: DeviceState = DeviceState.LIVE
    turns: int = 0

    def __post_init__(self) -> None:
        self.reflex = Reflex(
            self.engine or self.scene.engine(),
            Trace(self.scene.kernel),
            self.reports.append,
            state_of=lambda devno: self.state,
            disk_of=lambda devno: (devno, 0),
            requests=lambda devno: True,
            patience=QUICK,
            haste=self.haste,
            clock=lambda: self.now,
            aside=self.aside,
        )
        self.reflex.refresh()

    def turn(self, times: int = 1, seconds: float = 0.02) -> None:
        for _turn in range(times):
            self.now += seconds
            self.turns += 1
            self.reflex.turn()

    def settle(self, most: int = 100) -> None:
        """Turn until no I/O waits and nothing is left to be seen."""
        for _turn in range(most):
            self.turn()
            if not self.scene.kernel.waiting() and not self.scene.kernel.trace:
                return
        raise AssertionError(f"{self.scene.kernel.waiting()} waits for ever")

    def kinds(self) -> list[str]:
        return [report["type"] for report in self.reports]


def held_scene(folder: Path, **options: Any) -> Scene:
    scene = make_scene(folder, on_error="hold", **options)
    create_held(scene)
    return scene


@pytest.fixture
def target(tmp_path: Path) -> Scene:
    return held_scene(tmp_path)


@pytest.fixture
def healer(target: Scene) -> Healer:
    return Healer(target)


def beside(scene: Scene, healer: Healer) -> Process:
    """Another process, beside which a second of the reflex goes by before each of its calls."""
    return Process(scene.kernel, on_call=lambda name: healer.turn(seconds=1.0))


def data_of(sector: int, count: int) -> bytes:
    return b"".join(content(sector + i) for i in range(count))


# Healing


@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("code", [errno.EIO, errno.ETIMEDOUT])
def test_a_read_of_a_weak_sector_gets_its_data(tmp_path: Path, block: int, code: int) -> None:
    target = held_scene(tmp_path, block=block)
    healer = Healer(target)
    target.spoil(41 // block * block, failures=3)
    target.main.code = code if code != errno.ETIMEDOUT else errno.EIO
    number = target.kernel.submit_read(NAME, 40, 8)
    if code == errno.ETIMEDOUT:
        target.kernel.trace[:] = [line.replace("[-5]", "[-110]") for line in target.kernel.trace]
    assert target.kernel.waiting()[0][0] == HOLD, "the error is held"
    healer.settle()
    assert target.kernel.answers[number] == data_of(40, 8)
    assert healer.kinds() == ["healing", "healed"]
    report = healer.reports[1]
    assert (report["moved"], report["lost"]) == ([{"start": 40, "count": 8}], [])
    assert report["hit"] == [{"start": 40, "count": 8}]
    assert (report["operation"], report["target"], report["generation"]) == ("read", NAME, 2)
    target.check()


@pytest.mark.parametrize("block", [1, 8])
def test_a_read_of_a_lost_sector_fails_as_such_and_its_neighbours_do_not(
    tmp_path: Path, block: int
) -> None:
    target = held_scene(tmp_path, block=block)
    healer = Healer(target)
    target.spoil(40)
    number = target.kernel.submit_read(NAME, 40, block)
    innocent = target.kernel.submit_read(NAME, 48, block)
    healer.settle()
    assert target.kernel.errors[number] == errno.EILSEQ
    assert target.kernel.answers[innocent] == data_of(48, block)
    assert healer.reports[-1]["lost"] == [{"start": 40, "count": block}]
    target.check()


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("block", [1, 8])
def test_a_write_that_fails_is_done_on_the_spare(tmp_path: Path, block: int, durable: bool) -> None:
    target = held_scene(tmp_path, block=block)
    healer = Healer(target)
    target.main.unwritable = set(range(40, 48))
    target.app.write(target.kernel, 40, durable)
    assert target.app.waiting
    healer.settle()
    target.app.settle(target.kernel)
    assert not target.kernel.failed
    assert target.app.acknowledged == {40: 1}
    assert healer.kinds() == ["healing", "healed"], "reading well proves nothing about writing"
    assert healer.reports[-1]["operation"] == "write"
    target.check()


def test_one_request_that_touches_several_chunks(target: Scene, healer: Healer) -> None:
    """Only the chunks with bad sectors are moved."""
    target.spoil(50, failures=3)
    number = target.kernel.submit_read(NAME, 44, 16)
    healer.settle()
    assert target.kernel.answers[number] == data_of(44, 16)
    assert healer.reports[-1]["moved"] == [{"start": 48, "count": 8}]
    assert healer.reports[-1]["hit"] == [{"start": 44, "count": 16}]
    target.check()


def test_the_short_last_chunk(target: Scene, healer: Healer) -> None:
    target.spoil(SECTORS - 1, failures=3)
    number = target.kernel.submit_read(NAME, SECTORS - 5, 5)
    healer.settle()
    assert target.kernel.answers[number] == data_of(SECTORS - 5, 5)
    target.check()


def test_a_chunk_that_reads_well_is_moved_when_it_fails_again(
    target: Scene, healer: Healer
) -> None:
    target.spoil(41, failures=1)
    first = target.kernel.submit_read(NAME, 41, 1)
    healer.settle()
    assert healer.kinds() == ["healing", "passed"]
    assert target.kernel.answers[first] == data_of(41, 1)
    assert target.generation() == 1
    target.spoil(41, failures=1)
    target.kernel.submit_read(NAME, 41, 1)
    healer.settle()
    assert healer.kinds()[2:] == ["healing", "healed"]
    assert target.generation() == 2
    # After a long time it counts as the first time.
    target.spoil(81, failures=1)
    target.kernel.submit_read(NAME, 81, 1)
    healer.settle()
    healer.now += 1000
    target.spoil(81, failures=1)
    target.kernel.submit_read(NAME, 81, 1)
    healer.settle()
    assert healer.kinds()[4:] == ["healing", "passed"] * 2
    target.check()


def test_an_error_that_its_bio_tells_again_counts_once(target: Scene, healer: Healer) -> None:
    target.spoil(41, failures=1)
    target.kernel.submit_read(NAME, 41, 1)
    healer.turn()
    target.kernel.trace.append(" x-1 [0] .. 1.2: block_bio_complete: 8,0 R 41 + 1 [-5]")
    healer.settle()
    assert healer.kinds() == ["healing", "passed"]


SPOTS = st.dictionaries(
    st.integers(0, SECTORS - 1), st.sampled_from(["weak", "lost", "unwritable"]), max_size=8
)
ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(0, SECTORS - 1), st.integers(1, CHUNK)),
        st.tuples(
            st.sampled_from(["write", "durable write"]), st.integers(0, SECTORS - 1), st.just(1)
        ),
        st.tuples(st.just("flush"), st.just(0), st.just(0)),
        st.tuples(st.just("turn"), st.just(0), st.just(0)),
    ),
    max_size=14,
)


@settings(max_examples=60, deadline=None)
@given(spots=SPOTS, acts=ACTS)
def test_an_application_sees_its_data_and_lost_sectors_only(
    spots: dict[int, str], acts: list[tuple[str, int, int]]
) -> None:
    """Reads within chunks, writes of sectors, and flushes, in any order with the reflex's turns."""
    with tempfile.TemporaryDirectory() as folder:
        target = held_scene(Path(folder))
        healer = Healer(target)
        written: set[int] = set()
        lost = {sector for sector, kind in spots.items() if kind == "lost"}
        target.main.spoil(lost)
        target.main.spoil((s for s, kind in spots.items() if kind == "weak"), failures=3)
        target.main.unwritable = {s for s, kind in spots.items() if kind == "unwritable"}
        reads = {}
        for verb, sector, count in acts:
            if verb == "turn":
                healer.turn()
            elif verb == "flush":
                target.kernel.submit_flush(NAME)
            elif verb != "read":
                target.app.write(target.kernel, sector, durable=verb == "durable write")
                written.add(sector)
            else:
                count = min(count, CHUNK - sector % CHUNK, SECTORS - sector)
                number = target.kernel.submit_read(NAME, sector, count)
                reads[number] = (sector, count, set(written))
        healer.settle()
        target.app.settle(target.kernel)
        for number in target.kernel.failed:
            sector, count, before = reads[number]
            assert lost & set(range(sector, sector + count)) - before, "no lost sector, no error"
            assert target.kernel.errors[number] == errno.EILSEQ
        for number, (sector, _count, _before) in reads.items():
            answer = target.kernel.answers.get(number, b"")
            for index in range(len(answer) // SECTOR):
                block = answer[index * SECTOR : (index + 1) * SECTOR]
                known = target.app.versions[sector + index]
                assert block in known, "data of this sector, of this or an earlier time"
        target.app.waiting.clear()
        for sector in lost - written:
            target.app.versions[sector] = [None]
        for sector in set(target.main.bad) - lost:
            del target.main.bad[sector]
        target.check()
        assert {*healer.kinds()} <= {"healing", "healed", "passed"}


# Others on the host


def test_a_target_that_another_process_works_on_is_healed_when_it_is_free(
    target: Scene, healer: Healer
) -> None:
    target.spoil(41, failures=3)
    with target.engine().locked(NAME):
        number = target.kernel.submit_read(NAME, 41, 1)
        healer.turn(5)
        assert number not in target.kernel.completed | target.kernel.failed
    healer.settle()
    assert target.kernel.answers[number] == data_of(41, 1)
    target.check()


@pytest.mark.parametrize("at_once", [True, False])
def test_a_target_made_after_the_reflex_began(tmp_path: Path, at_once: bool) -> None:
    target = make_scene(tmp_path, on_error="hold")
    healer = Healer(target)
    if not at_once:
        healer.turn(seconds=20)
    create_held(target)
    target.spoil(41, failures=3)
    number = target.kernel.submit_read(NAME, 41, 1)
    begun = healer.now
    healer.settle()
    assert target.kernel.answers[number] == data_of(41, 1)
    assert healer.now - begun < 1.1, "an error is not forgotten until the next regular look"
    assert healer.kinds() == ["healing", "healed"]
    target.check()


def test_a_target_that_was_locked_when_the_reflex_began(target: Scene) -> None:
    with target.engine().locked(NAME):
        healer = Healer(target)
        target.spoil(41, failures=3)
        number = target.kernel.submit_read(NAME, 41, 1)
        healer.turn(3)
    begun = healer.now
    healer.settle()
    assert target.kernel.answers[number] == data_of(41, 1)
    assert healer.now - begun < 1.1
    target.check()


def test_a_chunk_that_somebody_else_remapped_meanwhile(target: Scene, healer: Healer) -> None:
    target.spoil(41, failures=3)
    number = target.kernel.submit_read(NAME, 41, 1)
    target.remap((41, 1))
    target.spoil(81, failures=3)
    second = target.kernel.submit_read(NAME, 81, 1)
    healer.settle()
    assert target.kernel.answers[number] == data_of(41, 1)
    assert target.kernel.answers[second] == data_of(81, 1)
    assert target.generation() == 3
    target.check()


@pytest.mark.parametrize("stuck", ["spare", "copy"])
def test_a_remap_by_somebody_else_that_the_first_copy_does_not_tell_of(
    tmp_path: Path, stuck: str
) -> None:
    """The first spare takes no writes, or its copy 1; the place of what was moved stays taken."""
    target = held_scene(tmp_path, spares=2 if stuck == "spare" else 1)
    kernel, healer = target.kernel, Healer(target)
    first = target.spares[0]
    first.unwritable = set(range(first.sectors) if stuck == "spare" else range(1024, 2048))
    target.remap((41, 1))
    target.app.write(kernel, 41)
    target.main.unwritable = {82}
    target.app.write(kernel, 82)
    healer.settle()
    assert healer.kinds() == ["healing", "healed"]
    assert target.generation() == 3
    first.unwritable = set()
    target.create()
    target.check()


def test_a_target_that_is_removed_and_made_again(target: Scene, healer: Healer) -> None:
    target.spoil(41, failures=3)
    target.kernel.submit_read(NAME, 41, 1)
    healer.settle()
    healer.turn(seconds=0)
    target.remove(engine=target.engine(beside(target, healer)))
    create_held(target)
    target.spoil(43, failures=3)
    number = target.kernel.submit_read(NAME, 43, 1)
    healer.settle()
    assert target.kernel.answers[number] == data_of(43, 1)
    assert target.generation() == 2
    target.check()


def test_a_remap_by_somebody_else_does_not_wait_for_the_reflex(
    target: Scene, healer: Healer
) -> None:
    """It has the lock that the reflex waits for, so it may read nothing that is held."""
    target.spoil(41)
    target.kernel.submit_read(NAME, 41, 1)
    healer.settle()
    target.main.unwritable = {80}
    target.app.write(target.kernel, 80)
    with target.engine().locked(NAME):
        assert target.remap((40, 8)).lost == [(41, 1)]
    healer.settle()
    target.check()


def test_errors_elsewhere_on_the_host_do_nothing(target: Scene, healer: Healer) -> None:
    writes: list[str] = []
    quiet = Healer(target, target.engine(Process(target.kernel, writes.append)))
    assert target.spares[0].devno == "8:16"
    target.kernel.trace += [
        " x-1 [0] .. 1.2: block_rq_error: 9,0 R () 41 + 1 [-5]",
        " x-1 [0] .. 1.2: block_rq_error: 8,16 R () 0 + 8 [-5]",
    ]
    quiet.turn(100)
    assert writes == []
    assert quiet.reports == []


# What no remap cures


def test_the_queue_that_the_fail_safe_took_away_comes_back(target: Scene, healer: Healer) -> None:
    path = target.kernel.mapped[HOLD].live.multipath
    path.fail_path()
    path.queueing = False
    failed = target.kernel.submit_read(NAME, 8, 1)
    assert failed in target.kernel.failed, "this is what the fail-safe is for"
    healer.turn(seconds=1)
    assert (path.active, path.queueing) == (True, True)
    number = target.kernel.submit_read(NAME, 8, 1)
    assert target.kernel.answers[number] == data_of(8, 1)


def test_without_room_on_the_spares_io_fails_and_never_waits(target: Scene, healer: Healer) -> None:
    geometry = geometry_of(target.engine().require(NAME).metadata, 0)
    target.spares[0].unwritable = set(range(geometry.data_start, geometry.far_middle))
    target.spoil(41)
    numbers = [target.kernel.submit_read(NAME, 41, 1), target.kernel.submit_read(NAME, 80, 1)]
    healer.settle()
    assert target.kernel.errors[numbers[0]] == errno.EIO
    assert set(numbers) == target.kernel.failed | target.kernel.completed
    assert healer.kinds() == ["healing", "failed"]
    assert "cannot be written" in healer.reports[1]["reason"]
    healer.turn(200)
    assert healer.kinds() == ["healing", "failed"], "its own failed reads are no news"
    target.app.versions[41] = [content(41)]
    assert target.kernel.submit_read(NAME, 80, 1) in target.kernel.completed
    # With room again it is healed.
    target.spares[0].unwritable = set()
    target.main.spoil([41], failures=3)
    number = target.kernel.submit_read(NAME, 41, 1)
    healer.settle()
    assert target.kernel.answers[number] == data_of(41, 1)
    target.check()


@pytest.mark.parametrize("state", [DeviceState.GONE, DeviceState.OFFLINE])
def test_io_to_a_main_that_is_gone_waits_quietly_until_it_is_back(
    target: Scene, healer: Healer, state: DeviceState
) -> None:
    target.main.dead = True
    healer.state = state
    number = target.kernel.submit_read(NAME, 41, 1)
    healer.turn(500)
    assert healer.kinds() == ["device_lost"]
    assert number not in target.kernel.completed | target.kernel.failed
    assert not target.kernel.trace, "nothing is tried while it is away"
    target.main.dead = False
    healer.state = DeviceState.LIVE
    healer.settle()
    assert target.kernel.answers[number] == data_of(41, 1)
    assert target.generation() == 1
    target.check()


def test_a_main_that_fails_everywhere_loses_no_sector_and_io_ends(
    target: Scene, healer: Healer
) -> None:
    target.main.dead = True
    number = target.kernel.submit_read(NAME, 41, 1)
    healer.settle()
    assert target.kernel.errors[number] == errno.EIO
    assert healer.kinds() == ["healing", "failed"]
    assert "everywhere" in healer.reports[1]["reason"]
    target.main.dead = False
    assert target.generation() == 1
    target.check()


def test_a_path_that_fails_again_and_again_ends_in_errors(target: Scene, healer: Healer) -> None:
    """A place on a spare that is bad fails I/O below the path, and no error of main explains it."""
    report = target.remap((40, 1), (80, 1))
    geometry = geometry_of(target.engine().require(NAME).metadata, 0)
    target.spares[0].spoil([geometry.chunk_sector(report.chunks[0].spare_chunk)])
    number = target.kernel.submit_read(NAME, 40, 1)
    healer.settle()
    assert target.kernel.errors[number] == errno.EIO
    assert healer.kinds() == ["failed"]
    assert healer.turns < 60


ON_SPARES = {5: 0, 6: 0, 12: 0, 9: 1, 20: 1}


def spared_scene(folder: Path, spares: int) -> Scene:
    """A target with chunks on each of its spares; on main are other data."""
    scene = held_scene(folder, spares=spares)
    engine = scene.engine()
    for spare in range(spares):
        chunks = [chunk for chunk, place in ON_SPARES.items() if place % spares == spare]
        target = engine.require(NAME)
        route = Route(avoid=frozenset({0, 1} - {spare}))
        with engine.opened(target) as disks:
            at_once(engine.moving(target, disks, chunks, QUICK, route=route))
    return scene


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["read", "write"]), st.integers(0, SECTORS // CHUNK - 1)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=200)
@given(
    spares=st.integers(1, 2),
    before=OPERATIONS,
    at=st.integers(0, 40),
    between=OPERATIONS,
    after=OPERATIONS,
)
def test_a_lost_spare_takes_down_only_what_was_on_it(spares, before, at, between, after) -> None:
    """Some I/O comes before the reflex knows, some at one of its calls, and some afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        scene = spared_scene(Path(folder), spares)
        kernel = scene.kernel
        lost = {chunk for chunk, place in ON_SPARES.items() if place % spares == 0}
        asked: dict[int, tuple[str, int]] = {}

        def submit(operations: list[tuple[str, int]]) -> None:
            for verb, chunk in operations:
                sector = chunk * CHUNK
                if verb == "read":
                    number = kernel.submit_read(NAME, sector, 1)
                else:
                    number = kernel.submit(NAME, sector, data_of(sector, 1))
                asked[number] = (verb, chunk)

        calls = itertools.count()

        def reached(name: str) -> None:
            if scene.spares[0].dead and next(calls) == at:
                submit(between)

        healer = Healer(scene, scene.engine(Process(kernel, on_call=reached)))
        scene.spares[0].dead = True
        submit(before)
        healer.settle()
        submit(after)
        if any(chunk in lost for _verb, chunk in before):
            assert not kernel.waiting(), "it is known what cannot be had"
            assert kernel.mapped[HOLD].live.multipath.active
        healer.settle()
        for number, (verb, chunk) in asked.items():
            if chunk in lost:
                assert kernel.errors[number] == errno.EIO, (verb, chunk)
            elif verb == "read":
                assert kernel.answers[number] == data_of(chunk * CHUNK, 1), chunk
            else:
                assert number in kernel.completed, chunk
        told = [report for report in healer.reports if report["type"] == "spare_lost"]
        assert healer.kinds() == ["spare_lost"] * len(told)
        assert len(told) == any(chunk in lost for _verb, chunk in asked.values())
        for report in told:
            ranges = [range(r["start"], r["start"] + r["count"]) for r in report["hit"]]
            assert {sector // CHUNK for r in ranges for sector in r} == lost


def test_a_reflex_killed_while_it_cuts_off_a_lost_spare_is_followed_by_one_that_ends_it(
    tmp_path: Path,
) -> None:
    """At each call; the rest of the target works afterwards, and nothing waits."""
    for stop in itertools.count():
        scene = spared_scene(tmp_path / str(stop), 2)
        kernel, calls = scene.kernel, itertools.count()
        process = Process(kernel)
        healer = Healer(scene, scene.engine(process))

        def reached(
            name: str, process: Process = process, calls: Iterator[int] = calls, stop: int = stop
        ) -> None:
            if next(calls) == stop:
                process.kill()

        process.on_call = reached
        scene.spares[0].dead = True
        numbers = [kernel.submit_read(NAME, chunk * CHUNK, 1) for chunk in (5, 12, 9, 1)]
        with contextlib.suppress(Killed):
            healer.settle()
        alive = process.alive
        process.kill()
        second = Healer(scene)
        second.settle()
        for number in numbers:
            assert number in kernel.failed | kernel.completed, stop
        lost = [kernel.submit_read(NAME, chunk * CHUNK, 1) for chunk in (5, 6, 12)]
        second.settle()
        assert kernel.failed.issuperset(lost), stop
        for chunk in (9, 1):
            number = kernel.submit_read(NAME, chunk * CHUNK, 1)
            assert kernel.answers.get(number) == data_of(chunk * CHUNK, 1), (stop, chunk)
        if alive:
            return


def test_the_first_flush_after_a_spare_was_lost_fails_and_no_other(tmp_path: Path) -> None:
    """The spare may have lost what it had acknowledged; with the flush, nothing else fails."""
    scene = spared_scene(tmp_path, 2)
    kernel, healer = scene.kernel, Healer(scene)
    scene.spares[0].dead = True
    flushes = []
    for _round in range(3):
        flushes.append(kernel.submit_flush(NAME))
        beside = [kernel.submit_read(NAME, chunk * CHUNK, 1) for chunk in (9, 1)]
        beside += [
            kernel.submit(NAME, chunk * CHUNK, data_of(chunk * CHUNK, 1)) for chunk in (2, 20)
        ]
        healer.settle()
        assert kernel.completed.issuperset(beside)
        # What is on it gives errors at once.
        number = kernel.submit_read(NAME, 5 * CHUNK, 1)
        healer.settle()
        assert kernel.errors[number] == errno.EIO
    outcomes = [number in kernel.completed for number in flushes]
    assert outcomes in ([False, True, True], [False, False, True])
    assert healer.kinds() == ["spare_lost"]


@pytest.mark.parametrize("spares", [1, 2])
def test_a_reflex_that_does_not_know_the_newest_generation_cuts_off_by_the_live_map(
    tmp_path: Path, spares: int
) -> None:
    """Somebody else moved chunks since; none may be read where it was before."""
    scene = spared_scene(tmp_path, spares)
    kernel, healer = scene.kernel, Healer(scene)
    other = scene.engine()
    with other.locked(NAME):
        scene.return_to_main((5 * CHUNK, 1), engine=other)
        scene.remap((15 * CHUNK, 1), engine=other)
    place = other.require(NAME).metadata.extents
    lost = {c for e in place if e.spare == 0 for c in range(e.logical, e.logical + e.length)}
    scene.spares[0].dead = True
    numbers = {chunk: kernel.submit_read(NAME, chunk * CHUNK, 1) for chunk in range(24)}
    healer.settle()
    for chunk, number in numbers.items():
        if chunk in lost:
            assert kernel.errors[number] == errno.EIO, chunk
        elif spares == 2 or number in kernel.answers:
            assert kernel.answers[number] == data_of(chunk * CHUNK, 1), chunk
    again = {chunk: kernel.submit_read(NAME, chunk * CHUNK, 1) for chunk in range(24)}
    healer.settle()
    for chunk, number in again.items():
        answer = kernel.answers.get(number)
        if chunk in lost:
            assert answer is None, chunk
        else:
            # Without any metadata errors are all that can be told.
            assert answer == data_of(chunk * CHUNK, 1) or (spares == 1 and answer is None), chunk


@pytest.mark.parametrize("knew", [False, True])
@pytest.mark.parametrize("haste", [60.0, 0.0], ids=["hasty", "frozen"])
def test_nothing_is_healed_by_older_metadata_than_a_lost_spare_has(
    tmp_path: Path, haste: float, knew: bool
) -> None:
    """The other spare did not take the last commit, and does not know what was moved by it."""
    scene = held_scene(tmp_path, spares=2)
    kernel, (first, second) = scene.kernel, scene.spares
    before = [Healer(scene, haste=haste)] if knew else []
    second.unwritable = set(range(second.sectors))
    scene.remap((41, 1))
    scene.app.write(kernel, 41)
    second.unwritable = set()
    first.dead = True
    healer = before[0] if before else Healer(scene, haste=haste)
    scene.main.unwritable = {82}
    write = kernel.submit(NAME, 82, data_of(82, 1))
    healer.settle()
    assert write in kernel.failed
    assert healer.kinds() == ["failed"]
    read = kernel.submit_read(NAME, 41, 1)
    healer.settle()
    newest = scene.app.versions[41][1]
    assert kernel.answers.get(read) in (None, newest), "main has its old data there"
    first.dead = False
    healer.turn(20, seconds=1)
    scene.app.write(kernel, 82)
    healer.settle()
    scene.main.unwritable = set()
    scene.create()
    scene.check()


@pytest.mark.parametrize("errors", [False, True])
def test_a_spare_can_leave_while_the_reflex_watches(tmp_path: Path, errors: bool) -> None:
    """Its devices are open in the reflex, also when errors of main wait for the lock."""
    scene = spared_scene(tmp_path, 2)
    healer = Healer(scene)
    engine = scene.engine(beside(scene, healer))
    request = SpareRequest(NAME, scene.request.spares[0])
    with engine.locked(NAME):
        if errors:
            scene.main.spoil([3], failures=2)
            number = scene.kernel.submit_read(NAME, 3, 1)
        engine.apply(
            plan_spare_absent(request, engine.see_spare(NAME, request.device, None, False))
        )
    assert list(engine.require(NAME).spare_infos) == [1]
    scene.spoil(180, failures=3)
    after = scene.kernel.submit_read(NAME, 180, 1)
    healer.settle()
    assert scene.kernel.answers[after] == data_of(180, 1)
    if errors:
        assert scene.kernel.answers[number] == data_of(3, 1)


def test_what_is_given_up_is_not_cut_off_any_more(tmp_path: Path) -> None:
    scene = spared_scene(tmp_path, 2)
    healer = Healer(scene)
    scene.spares[0].dead = True
    scene.kernel.submit_read(NAME, 5 * CHUNK, 1)
    healer.settle()
    engine = scene.engine(beside(scene, healer))
    target = engine.require(NAME)
    assert target.cut == target.unavailable == ((40, 16), (96, 8))
    uuid = target.metadata.config["spares"][0]["uuid"]
    request = SpareRequest(NAME, uuid, discard_remaps=True)
    with engine.locked(NAME):
        engine.apply(plan_spare_absent(request, engine.see_spare(NAME, uuid, None, False)))
    assert engine.require(NAME).cut == ()
    number = scene.kernel.submit_read(NAME, 5 * CHUNK, 1)
    assert scene.kernel.errors[number] == errno.EILSEQ
    assert scene.kernel.submit(NAME, 5 * CHUNK, content(40)) in scene.kernel.completed
    healer.settle()


@pytest.mark.parametrize(("seconds", "ends"), [(3.0, True), (70.0, False)])
def test_failures_of_the_path_are_counted_for_a_minute(
    target: Scene, healer: Healer, seconds: float, ends: bool
) -> None:
    """A device may take long for each failure, and look well meanwhile."""
    for _round in range(60):
        target.kernel.mapped[HOLD].live.multipath.fail_path()
        healer.turn(2, seconds=seconds / 2)
    assert ("failed" in healer.kinds()) == ends


@pytest.mark.parametrize("delay", [0.001, 0.02, 5.0])
def test_an_error_that_tells_of_no_sector_ends_in_errors(
    target: Scene, healer: Healer, delay: float
) -> None:
    """It may pass, so it is tried again, but neither without a pause nor for ever."""
    target.main.dead, target.main.code = True, errno.ENOLINK
    number = target.kernel.submit_read(NAME, 41, 1)
    tries, begun = 0, healer.now
    while number not in target.kernel.failed:
        tries += bool(target.kernel.trace)
        healer.turn(seconds=delay)
        assert healer.turns < 2000
    assert 10 < tries <= 51
    assert healer.now - begun > 0.9
    assert healer.kinds() == ["failed"]
    target.main.dead = False
    target.check()


def test_an_error_that_passes_is_tried_again(target: Scene, healer: Healer) -> None:
    target.main.dead, target.main.code = True, errno.ENOLINK
    number = target.kernel.submit_read(NAME, 41, 1)
    healer.turn(10)
    target.main.dead = False
    healer.settle()
    assert target.kernel.answers[number] == data_of(41, 1)
    target.check()


# Flushes


def test_a_flush_that_fails_reaches_the_application(target: Scene, healer: Healer) -> None:
    target.main.flush_fails = True
    number = target.kernel.submit_flush(NAME)
    target.main.flush_fails = False
    healer.settle()
    assert number in target.kernel.failed
    assert healer.kinds() == ["flush_failed"]
    assert target.kernel.submit_flush(NAME) in target.kernel.completed


def test_the_flush_of_a_durable_write_that_fails_reaches_the_application(
    target: Scene, healer: Healer
) -> None:
    target.main.flush_fails = True
    number = target.kernel.submit(NAME, 40, bytes(SECTOR), durable=True)
    target.main.flush_fails = False
    healer.settle()
    assert number in target.kernel.failed
    assert healer.kinds() == ["flush_failed"]


def test_a_flush_that_fails_right_after_a_write_reaches_the_application(
    target: Scene, healer: Healer
) -> None:
    """A flush comes to the disk as an empty write of its first sector."""
    target.main.unwritable = {0}
    write = target.kernel.submit(NAME, 0, data_of(0, 1))
    target.kernel.mapped[HOLD].live.multipath.active = True
    target.main.flush_fails = True
    flush = target.kernel.submit_flush(NAME)
    target.main.flush_fails = False
    healer.settle()
    assert {write, flush} == target.kernel.failed
    assert "flush_failed" in healer.kinds()


def test_a_flush_that_failed_before_the_reflex_began(target: Scene) -> None:
    target.main.flush_fails = True
    number = target.kernel.submit_flush(NAME)
    target.main.flush_fails = False
    healer = Healer(target)
    healer.settle()
    assert number in target.kernel.failed


@pytest.mark.parametrize("others", [[], ["8,160"]], ids=["", "beside another disk's"])
@pytest.mark.parametrize("seen", [False, True], ids=["nobody saw it", "a healer saw it"])
@pytest.mark.parametrize("failing", ["read", "flush", "both"])
def test_a_task_heals_while_no_healer_runs(
    target: Scene, failing: str, seen: bool, others: list[str]
) -> None:
    """A flush that failed is in the trace that the healer left, and is not tried again."""
    kernel, numbers = target.kernel, []
    target.spoil(41, failures=3)
    if failing != "flush":
        numbers.append(kernel.submit_read(NAME, 41, 1))
    if failing != "read":
        numbers.append(fail_flush(target, in_flight=True))
    if seen:
        kernel.trace.clear()
    kernel.trace += [f" x-1 [0] .. 1.0: block_rq_error: {disk} FF () 0 + 0 [-5]" for disk in others]
    assert not kernel.completed.union(kernel.failed).intersection(numbers)
    target.remap((41, 1))
    lost = failing != "read" and not seen
    assert kernel.failed.intersection(numbers) == (set(numbers) if lost else set())
    assert lost or kernel.completed.issuperset(numbers)
    path = target.engine().path_of(NAME)
    assert path.active
    assert path.queueing


def fail_flush(scene: Scene, in_flight: bool) -> int:
    """An application's flush that fails now; ``in_flight`` for one that had begun long before."""
    kernel, path = scene.kernel, scene.kernel.mapped[HOLD].live.multipath
    if path.active or not in_flight:
        scene.main.flush_fails = path.active
        number = kernel.submit_flush(NAME)
        scene.main.flush_fails = False
        return number
    kernel._requests += 1
    kernel.trace.append(" x-1 [0] .. 1.0: block_rq_error: 8,0 FF () 0 + 0 [-5]")
    path.queued.append(Request(kernel._requests, Io("flush"), ((NAME, 0),)))
    return kernel._requests


@dataclass
class FlushAt:
    """Lets a flush fail at one moment of what the reflex does.

    It may have begun before the path failed; a swap of the map waits until it has ended.
    """

    scene: Scene
    moment: int
    on_frozen: Callable[[], None]
    events: list[str] = field(default_factory=list)
    flush: int = 0
    begun_in_time: bool = True
    drained: bool = False

    def __call__(self, name: str) -> None:
        if name == "frozen" and "frozen" not in self.events:
            self.on_frozen()
        if self.scene.kernel.mapped[HOLD].live.multipath.active:
            self.drained = False
        if len(self.events) == self.moment:
            self.begun_in_time = not self.drained
            self.flush = fail_flush(self.scene, in_flight=not self.drained)
        self.drained = self.drained or name in (f"swap {NAME}-map", f"suspend {NAME}-map")
        self.events.append(name)


@pytest.mark.parametrize("haste", [60.0, 0.0], ids=["hasty", "frozen"])
@pytest.mark.parametrize("cause", ["held", "probed", "unexplained"])
def test_a_flush_that_fails_at_any_moment_reaches_the_application(
    tmp_path: Path, cause: str, haste: float
) -> None:
    moment = 0
    seen = True
    while seen:
        target = held_scene(tmp_path / str(moment))
        target.spoil(41, 81, failures=3)
        numbers: list[int] = []

        def read(sector: int) -> None:
            numbers.append(target.kernel.submit_read(NAME, sector, 1))  # noqa: B023

        on_event = FlushAt(target, moment, lambda: read(81) if cause == "probed" else None)
        healer = Healer(target, target.engine(Process(target.kernel, on_event), on_event), haste)
        if cause == "held":
            read(41)
        elif cause == "probed":
            with contextlib.suppress(OSError):
                target.kernel.read(target.main.devno, 41, 1)
        else:
            target.kernel.mapped[HOLD].live.multipath.fail_path()
            healer.turn(seconds=1)
        healer.settle()
        assert set(numbers) <= target.kernel.completed | target.kernel.failed
        seen = on_event.flush > 0
        if seen:
            reached = on_event.flush in target.kernel.failed
            assert reached == ("flush_failed" in healer.kinds()), on_event.events
            assert reached or not on_event.begun_in_time, on_event.events
        for sector in (41, 81):
            read(sector)
            healer.settle()
        target.check(why=str(moment))
        moment += 1
    assert moment > (2 if cause == "unexplained" else 25)


def test_a_flush_that_fails_when_the_path_is_looked_at_reaches_the_application(
    target: Scene, healer: Healer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Just after the trace was read and before the path's state is."""
    engine = healer.reflex._engine
    path_of = engine.path_of
    flushes: list[int] = []

    def path_fails(name: str) -> Any:
        if not flushes:
            flushes.append(fail_flush(target, False))
        return path_of(name)

    monkeypatch.setattr(engine, "path_of", path_fails)
    healer.turn(seconds=1)
    healer.settle()
    assert flushes[0] in target.kernel.failed


@pytest.mark.parametrize("is_held", [True, False])
def test_when_the_kernel_dropped_errors_nothing_is_tried_again_that_may_be_a_flush(
    target: Scene, healer: Healer, is_held: bool
) -> None:
    number = 0
    if is_held:
        target.main.flush_fails = True
        number = target.kernel.submit_flush(NAME)
        target.main.flush_fails = False
    target.kernel.trace[:] = ["CPU:0 [LOST 1 EVENTS]"]
    healer.settle()
    healer.turn(seconds=1)
    assert (number in target.kernel.failed) == is_held
    assert healer.kinds() == (["failed"] if is_held else [])


# Crashes


def heal_with(scene: Scene, engine: Engine, haste: float = 60.0) -> Healer:
    healer = Healer(scene, engine, haste)
    healer.settle()
    return healer


@pytest.mark.parametrize("haste", [60.0, 0.0], ids=["hasty", "frozen"])
@pytest.mark.parametrize("kind", ["weak", "lost", "unwritable", "flush"])
def test_a_reflex_killed_anywhere_is_followed_by_one_that_ends_all_waits(
    tmp_path: Path, kind: str, haste: float
) -> None:
    target = held_scene(tmp_path)
    if kind == "weak":
        target.spoil(41, failures=3)
    elif kind == "lost":
        target.spoil(41)
    number = target.kernel.submit_read(NAME, 41, 1) if kind in ("weak", "lost") else 0
    if kind == "unwritable":
        target.main.unwritable = {41}
        target.app.write(target.kernel, 41)
    if kind == "flush":
        target.spoil(41, failures=3)
        number = target.kernel.submit_read(NAME, 41, 1)
        target.kernel.mapped[HOLD].live.multipath.active = True
        target.main.flush_fails = True
        flush = target.kernel.submit_flush(NAME)
        target.main.flush_fails = False
    crashes = record(target, lambda engine: heal_with(target, engine, haste))
    assert len(crashes) > (25 if haste else 40)
    generations = []
    for crash in crashes:
        scene = target.at(crash.kernel, crash.app)
        failures = scene.main.bad.get(41)
        if failures is not None:
            # What was read in vain by the first reflex must not make the sector whole.
            scene.main.spoil([41], failures=3)
        healer = Healer(scene)
        healer.settle()
        scene.app.settle(scene.kernel)
        if kind in ("weak", "flush"):
            done = scene.kernel.answers.get(number)
            assert done == data_of(41, 1) or (kind == "flush" and done is None), crash.label
        if kind == "lost":
            assert scene.kernel.errors[number] == errno.EILSEQ, crash.label
        if kind == "unwritable":
            assert scene.app.acknowledged == {41: 1}, crash.label
        if kind == "flush" and crash is not crashes[0]:
            assert flush in scene.kernel.failed, crash.label
        again = scene.kernel.submit_read(NAME, 48, 1)
        assert again in scene.kernel.completed, crash.label
        # A flush that failed has taken the read with it, maybe before the chunk was moved.
        scene.kernel.submit_read(NAME, 41, 1)
        healer.settle()
        scene.check(why=crash.label)
        generations.append(scene.generation())
    assert set(generations) <= {1, 2}
    assert generations[-1] == 2


def test_writes_at_every_step_of_a_healing_are_kept(tmp_path: Path) -> None:
    target = held_scene(tmp_path)
    target.spoil(41, failures=4)
    steps: list[str] = []

    def step(name: str) -> None:
        steps.append(name)
        for sector in (40, 42 + len(steps) % 6, 80, 120):
            target.app.write(target.kernel, sector)

    target.kernel.submit_read(NAME, 41, 1)
    heal_with(target, target.engine(step=step))
    assert "committed" in steps
    assert not target.kernel.failed
    target.check()


def test_one_call_that_fails_anywhere_in_a_healing_leaves_nothing_waiting(tmp_path: Path) -> None:
    calls: list[str] = []
    target = held_scene(tmp_path / "whole")
    target.spoil(41, failures=3)
    target.kernel.submit_read(NAME, 41, 1)
    heal_with(target, target.engine(Process(target.kernel, calls.append)))
    for number, label in enumerate(calls):
        scene = held_scene(tmp_path / str(number))
        scene.spoil(41, failures=6)
        read = scene.kernel.submit_read(NAME, 41, 1)
        count = iter(range(len(calls) * 100))

        def fail(name: str) -> None:
            if next(count) == number:  # noqa: B023
                if name.startswith(("write", "flush")):
                    raise OSError(errno.EIO, f"injected into {name}")
                raise DmRemapError(f"injected into {name}")

        healer = heal_with(scene, scene.engine(Process(scene.kernel, fail)))
        assert read in scene.kernel.completed | scene.kernel.failed, label
        healer.turn(3, seconds=11)
        path = scene.kernel.mapped[HOLD].live.multipath
        assert (path.active, path.queueing) == (True, True), label
        scene.main.bad.clear()
        scene.create()
        scene.check(why=f"{number}: {label}")


@pytest.mark.parametrize("haste", [60.0, 0.0], ids=["hasty", "frozen"])
@pytest.mark.parametrize("spares", [1, 2])
def test_spares_that_all_die_in_a_healing_stop_only_the_chunk(
    tmp_path: Path, spares: int, haste: float
) -> None:
    """At each call; when they are back, the chunk is where the metadata says, with its data."""
    for stop in itertools.count():
        scene = held_scene(tmp_path / str(stop), spares=spares)
        kernel, calls = scene.kernel, itertools.count()

        def reached(
            name: str, scene: Scene = scene, calls: Iterator[int] = calls, stop: int = stop
        ) -> None:
            if next(calls) == stop:
                for spare in scene.spares:
                    spare.dead = True

        healer = Healer(scene, scene.engine(Process(kernel, reached)), haste)
        scene.main.unwritable = {41}
        write = kernel.submit(NAME, 41, data_of(41, 1))
        healer.turn(100)
        healer.turn(5, seconds=1)
        died = scene.spares[0].dead
        beside = [kernel.submit_read(NAME, 80, 1), kernel.submit(NAME, 82, data_of(82, 1))]
        healer.turn(5)
        assert kernel.completed.issuperset(beside), stop
        again = kernel.submit_read(NAME, 42, 1)
        healer.turn(100)
        healer.turn(5, seconds=1)
        assert {write, again} <= kernel.completed | kernel.failed, stop
        for spare in scene.spares:
            spare.dead = False
        healer.turn(20, seconds=1)
        scene.main.unwritable = set()
        scene.create()
        scene.check(why=str(stop))
        if not died:
            return


@pytest.mark.parametrize("check", [False, True])
def test_what_follows_a_healing_that_was_killed_does_not_read_a_suspended_map(
    tmp_path: Path, check: bool
) -> None:
    """It would wait for ever, with the lock that the next reflex needs."""
    target = held_scene(tmp_path)
    target.spoil(41)
    target.remap((41, 1))
    target.spoil(81, failures=3)
    target.kernel.submit_read(NAME, 81, 1)
    for crash in record(target, lambda engine: heal_with(target, engine)):
        scene = target.at(crash.kernel, crash.app)
        report = scene.engine().change_sectors(
            NAME, [(40, CHUNK)], returned=True, patience=QUICK, files_seconds=0, check=check
        )
        suspended = any(device.suspended for device in crash.kernel.mapped.values())
        assert report.lost == [(41, 1)] or (check and suspended), crash.label
        assert suspended <= check, crash.label


def test_what_a_spare_may_know_of_a_healing_that_was_killed_never_counts_later(
    tmp_path: Path,
) -> None:
    """It dies with the reflex, and comes back after the chunk was written where it was."""
    target = held_scene(tmp_path, spares=2)
    target.spoil(41, failures=3)
    target.kernel.submit_read(NAME, 41, 1)
    refused = 0
    for crash in record(target, lambda engine: heal_with(target, engine)):
        scene = target.at(crash.kernel, crash.app)
        scene.main.bad.clear()
        scene.spares[0].dead = True
        Healer(scene).turn(5, seconds=1)
        scene.app.write(scene.kernel, 41)
        scene.spares[0].dead = False
        scene.kernel.cut_power(scene.kernel.volatile())
        try:
            scene.create()
        except copies.SplitBrain:
            refused += 1
            continue
        scene.app.settle(scene.kernel)
        scene.check_blocks(why=crash.label)
    assert refused


# The parts


@pytest.mark.parametrize(
    ("error", "reads", "writes", "others"),
    [
        (("read", 139, 1, 5), {4}, set(), set()),
        (("read", 100, 40, 61), {0, 1, 3, 4}, set(), set()),
        (("write", 0, 4096, 5), set(), set(range(25)) - {2}, set()),
        (("read", 117, 6, 110), set(), set(), set()),
        (("read", 117, 8, 121), {3}, set(), set()),
        (("read", 139, 1, 67), set(), set(), {67}),
        (("read", 0, 99, 5), set(), set(), set()),
        (("read", 101 + SECTORS, 8, 5), set(), set(), set()),
    ],
)
def test_failed_requests_become_chunks_on_main(
    target: Scene,
    error: tuple[str, int, int, int],
    reads: set[int],
    writes: set[int],
    others: set[int],
) -> None:
    """Main begins at sector 100 of its disk, and chunk 2 is on a spare."""
    target.remap((16, 8))
    observed = target.engine().require(NAME)
    operation, sector, count, code = error
    injury = injury_of(
        observed, 100, [BlockError(True, "8:0", operation, sector, count, code, False)]
    )
    assert (injury.reads, injury.writes) == (reads, writes)
    assert injury.others == others


@pytest.mark.parametrize("operation", ["write_zeroes", "discard"])
@pytest.mark.parametrize("spared", [False, True])
def test_of_a_whole_range_that_failed_one_chunk_moves_if_none_has(
    target: Scene, operation: str, spared: bool
) -> None:
    """Then the map does not offer the operation any more, and it ends as not supported."""
    if spared:
        target.remap((16, 8))
    error = BlockError(True, "8:0", operation, 140, 100, errno.EIO, False)
    injury = injury_of(target.engine().require(NAME), 100, [error])
    assert (injury.reads, injury.writes, injury.others) == (set(), set() if spared else {5}, set())


def test_reports_wait_for_a_listener_and_the_oldest_go_first() -> None:
    reports = Reports(keep=2)
    told: list[int] = []
    reports.listener = lambda: told.append(1)
    reported: list[dict[str, Any]] = [{"type": t} for t in ("healed", "healing", "failed")]
    first, second, third = reported
    reports.add(first)
    assert reports.first() is first
    assert first["time_ns"] > 0
    reports.add(second)
    reports.add(third)
    assert len(told) == 3
    begun = first["id"][0]
    assert [report["id"] for report in (first, second, third)] == [[begun, n] for n in (1, 1, 2)]
    reports.forget(first)
    assert reports.first() is second, "what was dropped already is not forgotten twice"
    reports.forget(second)
    reports.forget(third)
    assert reports.first() is None


def test_the_reflex_runs_until_it_is_told_to_stop(target: Scene) -> None:
    healer = Healer(target)
    target.spoil(41, failures=3)
    number = target.kernel.submit_read(NAME, 41, 1)
    seen: list[bool] = []
    with wake_up() as (stop, wake):

        def pause() -> float:
            seen.append(target.engine().healer_runs())
            if number in target.kernel.completed:
                wake()
            return 0.0

        healer.reflex._pause = pause
        healer.reflex.run(stop, lambda: seen.append(True))
    assert len(seen) > 1
    assert all(seen)
    assert not target.engine().healer_runs()
    assert all(not device.handles for device in target.kernel.mapped.values())
    assert tracing.REFLEX_INSTANCE != tracing.INSTANCE, "each reader of a trace needs its own"


# Reads that take a while


SECOND = "second"


class Later:
    """Has reads done when a test says so, as a thread of its own might at any time."""

    def __init__(self) -> None:
        self.works: list[tuple[Callable[[], None], Future[None]]] = []

    def __call__(self, work: Callable[[], None]) -> Future[None]:
        end: Future[None] = Future()
        self.works.append((work, end))
        return end

    def do(self, index: int = 0) -> None:
        carry_out(*self.works.pop(index))


def hold_reads(scene: Scene, until: threading.Event) -> None:
    """Keep the thread that reads the main waiting."""

    def wait(_sector: int, _count: int) -> None:
        if threading.current_thread().name == "reads":
            assert until.wait(60), "it would wait for ever"

    scene.main.on_read = wait


def with_second(scene: Scene) -> Scene:
    """Another target on the same host."""
    main = scene.kernel.add_disk("main2", SECTORS)
    main.fill(0, data_of(0, SECTORS))
    spare = scene.kernel.add_disk("spare9", scene.spares[0].sectors)
    request = replace(scene.request, name=SECOND, main=main.path, spares=(spare.path,))
    second = replace(scene, request=request)
    create_held(second)
    return second


def test_a_slow_main_does_not_keep_another_target_waiting(target: Scene) -> None:
    second, later = with_second(target), Later()
    healer = Healer(target, haste=0.0, aside=later)
    target.spoil(41, failures=3)
    slow = target.kernel.submit_read(NAME, 41, 1)
    healer.turn(3)
    assert len(later.works) == 1
    apart = target.kernel.submit_read(NAME, 81, 1)
    assert target.kernel.answers[apart] == data_of(81, 1), "only the chunk is frozen"
    second.main.spoil([50], failures=3)
    quick = target.kernel.submit_read(SECOND, 50, 1)
    healer.turn()
    later.do(1)
    healer.turn(3)
    assert target.kernel.answers[quick] == data_of(50, 1)
    assert slow not in target.kernel.completed
    with target.engine().try_locked(NAME) as locked:
        assert not locked, "nobody else may work on a target whose chunks are being read"
    later.do()
    healer.settle()
    assert target.kernel.answers[slow] == data_of(41, 1)
    ends = [(report["target"], report["type"]) for report in healer.reports]
    assert ends[2:] == [(SECOND, "healed"), (NAME, "healed")]
    target.check()


def test_what_fails_while_a_target_is_read_is_healed_after_it(target: Scene) -> None:
    later = Later()
    healer = Healer(target, haste=0.0, aside=later)
    target.spoil(41, 81, failures=3)
    first = target.kernel.submit_read(NAME, 41, 1)
    healer.turn(3)
    second = target.kernel.submit_read(NAME, 81, 1)
    healer.turn(100, seconds=0.1)
    assert len(later.works) == 1
    later.do()
    healer.turn()
    assert target.kernel.answers[first] == data_of(41, 1)
    later.do()
    healer.settle()
    assert target.kernel.answers[second] == data_of(81, 1)
    target.check()


@pytest.mark.parametrize("seed", range(40))
def test_reads_beside_each_other_end_in_any_order(tmp_path: Path, seed: int) -> None:
    """Two targets with bad sectors everywhere: each request is answered, with its own data."""
    chance = random.Random(seed)
    first = held_scene(tmp_path)
    second, later = with_second(first), Later()
    kernel = first.kernel
    healer = Healer(first, haste=0.0, aside=later)
    asked: dict[int, int] = {}
    for scene in (first, second):
        scene.main.spoil(chance.sample(range(SECTORS), 12), failures=chance.randrange(1, 4))
    for _step in range(120):
        done = chance.randrange(4)
        if done == 0 and len(asked) < 40:
            sector = chance.randrange(SECTORS // CHUNK) * CHUNK
            asked[kernel.submit_read(chance.choice([NAME, SECOND]), sector, CHUNK)] = sector
        elif done == 1 and later.works:
            later.do(chance.randrange(len(later.works)))
        else:
            healer.turn(seconds=chance.choice([0.001, 0.02, 1.5]))
    for _step in range(1000):
        if later.works:
            later.do(chance.randrange(len(later.works)))
        healer.turn()
        if not (kernel.waiting() or kernel.trace or later.works):
            break
    assert asked
    for number, sector in asked.items():
        assert kernel.answers[number] == data_of(sector, CHUNK)
    first.main.bad.clear()
    first.check()
    assert second.engine().require(SECOND).frozen is None


def test_a_read_that_fails_aside_is_reported_and_the_chunk_stays(target: Scene) -> None:
    later = Later()
    healer = Healer(target, haste=0.0, aside=later)
    target.spoil(41)
    number = target.kernel.submit_read(NAME, 41, 1)
    healer.turn(3)
    (_work, end) = later.works.pop()
    end.set_exception(OSError(errno.ENODEV, "has gone"))
    healer.settle()
    assert healer.kinds() == ["healing", "failed"]
    assert target.kernel.errors[number] == errno.EIO
    assert target.generation() == 1
    assert target.engine().require(NAME).frozen is None


def test_the_reflex_ends_what_it_began_before_it_stops(target: Scene) -> None:
    """Reads that really are done by another thread."""
    healer = Healer(target, haste=0.0, aside=aside)
    target.spoil(41, failures=3)
    number = target.kernel.submit_read(NAME, 41, 1)
    stopped = threading.Event()
    hold_reads(target, stopped)
    with wake_up() as (stop, wake):

        def pause() -> float:
            if healer.reflex._reading:
                wake()
                stopped.set()
            return 0.0

        healer.reflex._pause = pause
        healer.reflex.run(stop)
    target.main.on_read = None
    assert target.kernel.answers[number] == data_of(41, 1)
    assert healer.kinds() == ["healing", "healed"]
    target.check()


def test_the_end_of_reads_wakes_the_reflex(target: Scene) -> None:
    second = with_second(target)
    healer = Healer(target, haste=0.0, aside=aside)
    target.spoil(41, failures=3)
    slow = target.kernel.submit_read(NAME, 41, 1)
    healed = threading.Event()
    hold_reads(target, healed)
    asked: list[int] = []
    rescued: list[bool] = []
    with wake_up() as (stop, wake):

        def rescue() -> None:
            rescued.append(True)
            wake()

        watchdog = threading.Timer(60, rescue)

        def pause() -> float:
            if not healer.reflex._reading and slow not in target.kernel.completed:
                return 0.0
            if not asked:
                second.main.spoil([50], failures=3)
                asked.append(target.kernel.submit_read(SECOND, 50, 1))
                return 0.0
            if slow in target.kernel.completed:
                wake()
                return 0.0
            if asked[0] in target.kernel.completed and not healed.is_set():
                watchdog.start()
                healed.set()
            # Only the end of the reads ends the wait.
            return 3600.0 if healed.is_set() else 0.0

        healer.reflex._pause = pause
        healer.reflex.run(stop)
    watchdog.cancel()
    assert not rescued
    target.main.on_read = None
    assert target.kernel.answers[asked[0]] == data_of(50, 1)
    assert target.kernel.answers[slow] == data_of(41, 1)
    target.check()


def test_nothing_touches_a_target_that_is_being_read(target: Scene) -> None:
    """For so long that each look at all targets has come by, with and without errors of it."""
    later = Later()
    healer = Healer(target, haste=0.0, aside=later)
    target.spoil(41, failures=3)
    number = target.kernel.submit_read(NAME, 41, 1)
    healer.turn(3)
    healer.turn(20, seconds=1.5)
    later.do()
    healer.settle()
    assert target.kernel.answers[number] == data_of(41, 1)
    assert healer.kinds() == ["healing", "healed"]
    target.check()


@pytest.mark.parametrize("end", ["killed", "stopped", "healed"])
def test_a_flush_that_fails_while_its_target_is_read_fails(target: Scene, end: str) -> None:
    """At once, because whoever comes after this process would not know of it."""
    later = Later()
    process = Process(target.kernel)
    healer = Healer(target, target.engine(process), haste=0.0, aside=later)
    target.spoil(41, failures=3)
    number = target.kernel.submit_read(NAME, 41, 1)
    healer.turn(3)
    assert len(later.works) == 1
    target.main.flush_fails = True
    flush = target.kernel.submit_flush(NAME)
    target.main.flush_fails = False
    healer.turn()
    assert flush in target.kernel.failed
    if end == "killed":
        process.kill()
        for healing, _read in healer.reflex._reading.values():
            with contextlib.suppress(Killed):
                healing.close()
        healer = Healer(target, haste=0.0)
    else:
        later.do()
        if end == "stopped":
            healer.reflex._finish()
            healer = Healer(target, haste=0.0)
    healer.settle()
    assert target.kernel.answers[number] == data_of(41, 1)
    target.check()


def test_a_thread_that_cannot_be_made_delays_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    done: list[bool] = []
    assert aside(lambda: done.append(True)).done()
    assert done == [True]
