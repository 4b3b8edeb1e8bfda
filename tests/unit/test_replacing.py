# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Replacing the main on a kernel in memory: every crash point, and what is found on the way."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from dm_remap import copies, replacement, stack
from dm_remap.engine import Engine
from dm_remap.errors import DmRemapError, Refused
from dm_remap.format import geometry_of
from dm_remap.freezing import Freezer
from dm_remap.plan import REPLACE, UNDO
from dm_remap.plan_spares import SpareRequest, plan_spare_absent, plan_spare_present
from dm_remap.planner import plan_present
from dm_remap.reflex import Ward, on_one_main
from dm_remap.replacing import Pace, Replacing, Result, Tools
from dm_remap.tracing import BlockError
from tests.parameters import short_form
from tests.unit.fake_kernel import (
    SECTOR,
    Blocked,
    Killed,
    Process,
    Volatile,
    below,
)
from tests.unit.test_engine import (
    CHUNK,
    NAME,
    QUICK,
    Crash,
    Scene,
    content,
    create_held,
    make_scene,
    record,
)
from tests.unit.test_replacement import half, under_way
from tests.unit.test_spares import unplug

# Windows of 4 chunks: two whole ones and one that ends in the short last chunk.
WINDOW = Pace(window=4 * CHUNK * SECTOR)
SECTORS = 10 * CHUNK + 5
NEW = "/dev/new"
OLD = "/dev/main"
# Remapped before: readable, with lost sectors, with a lost sector that was written since.
HEALTHY, LOSSY, REWRITTEN = 1, 2, 6
# Found on the way: a sector that cannot be read, and one that can be after some tries.
BAD, WEAK = 5, 9


def toward(scene: Scene, main: str) -> Scene:
    return replace(scene, request=replace(scene.request, main=main))


def change_main(
    scene: Scene, main: str, engine: Engine | None = None, pace: Pace = WINDOW, wipe: bool = False
) -> tuple[list[str], Result | None]:
    """What the module does: begin under the lock, and carry on without it."""
    used = engine or scene.engine()
    request = replace(scene.request, main=main, wipe=wipe)
    with used.locked(NAME):
        plan = plan_present(request, used.see(NAME, main, request.spares))
        used.apply(plan)
    kinds = [action.kind for action in plan.actions]
    result = None
    if REPLACE in kinds or UNDO in kinds:
        result = used.replace_main(NAME, UNDO in kinds, pace, QUICK)
    return kinds, result


def damaged(folder: Path, on_error: str = "fail", block: int = 1, shim: str = "none") -> Scene:
    """A target with remaps of every kind, whose main has more bad sectors."""
    scene = make_scene(folder, 1, block, sectors=SECTORS, on_error=on_error)
    scene.request = replace(scene.request, shim=shim)
    scene.kernel.add_disk("new", SECTORS // block * block, block)
    create_held(scene)
    scene.spoil(LOSSY * CHUNK, REWRITTEN * CHUNK)
    scene.remap((HEALTHY * CHUNK, CHUNK))
    scene.remap((LOSSY * CHUNK, CHUNK), (REWRITTEN * CHUNK, CHUNK))
    scene.app.write(scene.kernel, REWRITTEN * CHUNK)
    scene.app.flush(scene.kernel)
    scene.spoil(BAD * CHUNK + (1 if block == 1 else 0))
    scene.spoil(WEAK * CHUNK, failures=4)
    return scene


def check_done(scene: Scene, power_cut: bool = False, why: str = "") -> None:
    """All is on the main that is wanted and on spares, and nothing of the other is in use."""
    kernel = scene.kernel
    # A sector that answers after some tries may still be on the old main.
    bad = kernel.disks[OLD].bad
    for sector in [sector for sector, failures in bad.items() if failures is not None]:
        bad[sector] = 0
    scene.check(power_cut, why)
    for path in {OLD, NEW} - {scene.request.main}:
        assert kernel.users(kernel.disks[path].devno) == [], (path, why)
    assert kernel.mapped.get(stack.new_main_name(NAME)) is None, why
    target = scene.engine().require(NAME)
    assert not replacement.under_way(target.metadata), why
    assert target.main is not None, why
    assert target.main.path == scene.request.main, why
    assert target.metadata.config["main"]["serial"] == scene.main.serial, why
    assert not any(device.regions for device in kernel.mapped.values()), why


# Life of a replacement


@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("on_error", ["fail", "hold"])
def test_a_replacement_ends_with_a_healed_target(tmp_path: Path, on_error: str, block: int) -> None:
    scene = damaged(tmp_path, on_error, block=block)
    before = dict(scene.main.content)
    kinds, result = change_main(scene, NEW)
    assert kinds == [REPLACE]
    assert result is not None
    assert result.healed == [BAD]
    after = toward(scene, NEW)
    check_done(after)
    extents = after.engine().require(NAME).metadata.extents
    assert sorted(e.logical for e in extents) == [LOSSY, BAD], "only what is lost stays on spares"
    assert scene.kernel.disks[OLD].content == before, "nothing was written to the old main"
    assert change_main(scene, NEW) == ([], None)
    # The old disk is free: whatever becomes of it does not matter.
    scene.kernel.disks[OLD].dead = True
    after.check()


def test_a_written_lost_sector_is_no_reason_to_stay_on_a_spare(tmp_path: Path) -> None:
    scene = damaged(tmp_path)
    change_main(scene, NEW)
    lost = toward(scene, NEW).engine().require(NAME).metadata.lost
    assert [(item.sector, item.count) for item in lost] == [
        (LOSSY * CHUNK, 1),
        (BAD * CHUNK + 1, 1),
    ]


def test_a_larger_main_is_used_in_part(tmp_path: Path) -> None:
    scene = make_scene(tmp_path, sectors=SECTORS)
    scene.kernel.add_disk("new", SECTORS + 64)
    scene.create()
    change_main(scene, NEW)
    after = toward(scene, NEW)
    assert sum(s.length for s in after.engine().require(NAME).table) == SECTORS
    after.app.flush(after.kernel)
    after.kernel.cut_power([])
    assert after.create() == ["activate_spare", "create_target"]
    assert [after.read(sector) for sector in range(SECTORS)] == [content(s) for s in range(SECTORS)]
    assert not after.plan().actions


def test_nothing_moves_twice_without_writes(tmp_path: Path) -> None:
    scene = make_scene(tmp_path, sectors=SECTORS)
    scene.kernel.add_disk("new", SECTORS)
    scene.create()
    _kinds, result = change_main(scene, NEW)
    assert result is not None
    assert (result.copied, result.windows) == (SECTORS * SECTOR, 3)


@pytest.mark.parametrize("on_error", ["fail", "hold"])
@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_a_replacement_can_be_undone_at_any_window(
    tmp_path: Path, done: int, on_error: str
) -> None:
    scene = damaged(tmp_path, on_error)
    interrupt(scene, NEW, "window_committed", done)
    for sector in range(0, SECTORS, 3):
        scene.app.write(scene.kernel, sector)
    kinds, _result = change_main(scene, OLD)
    assert kinds[-1:] == [UNDO]
    check_done(scene)


def test_an_undone_replacement_does_not_trust_bad_sectors(tmp_path: Path) -> None:
    """A chunk that was healed by the copy goes to a spare where the old disk is still bad."""
    scene = damaged(tmp_path)
    interrupt(scene, NEW, "window_committed", 3)
    old = scene.kernel.disks[OLD]
    old.heals = False
    old.unwritable = {3 * CHUNK + 2}
    old.spoil([4 * CHUNK + 1])
    _kinds, result = change_main(scene, OLD)
    assert result is not None
    assert {3, 4} <= set(result.healed)
    check_done(scene)


def interrupt(scene: Scene, main: str, step: str, times: int) -> None:
    """Kill a replacement after the step was met so often; at its beginning for 0."""
    process = Process(scene.kernel)
    met = itertools.count(1)

    def on_step(name: str) -> None:
        if (times == 0 and name == REPLACE) or (name == step and next(met) == times):
            process.kill()

    with pytest.raises(Killed):
        change_main(scene, main, scene.engine(process, on_step))


# Crashes


def busy(scene: Scene) -> Callable[[str], None]:
    """An application that writes at every step, and flushes now and then."""
    turn = itertools.count()

    def on_step(name: str) -> None:
        number = next(turn)
        for sector in (number * 7 % SECTORS, number * 11 % SECTORS, LOSSY * CHUNK + 3):
            scene.app.write(scene.kernel, sector)
        # Flushes pass a freeze.
        if number % 5 == 0:
            with contextlib.suppress(Blocked):
                scene.app.flush(scene.kernel)

    return on_step


def few_survivals(writes: Sequence[Volatile], seed: str) -> Iterator[list[Volatile]]:
    """None, all, and some at random."""
    chance = random.Random(seed)
    yield []
    if writes:
        yield list(writes)
        yield [item for item in writes if chance.random() < 0.5]


def only_main(scene: Scene) -> str | None:
    """The main that the metadata on the spares names, or None where it names two."""
    blocks = Process(scene.kernel).blocks
    surveys = {}
    for path in scene.request.spares:
        with blocks.BlockDevice(path) as device:
            surveys[path] = copies.survey(device)
    metadata = copies.choose(surveys).metadata
    if replacement.under_way(metadata):
        return None
    return OLD if metadata.config["main"]["serial"] == scene.kernel.disks[OLD].serial else NEW


def check_crash(scene: Scene, crash: Crash, main: str, survivors: list[Volatile] | None) -> None:
    why = f"{crash.label}, then {main}"
    again = toward(scene.at(crash.kernel.clone(), crash.app.clone()), main)
    if survivors is not None:
        again.kernel.cut_power(survivors)
        again.app.waiting.clear()
        # Where no replacement is under way, only the target's own main can activate it.
        again = toward(again, only_main(again) or main)
        main = again.request.main
    with again.engine().healing():
        change_main(again, main)
    check_done(again, survivors is not None, why)


CRASHING = pytest.mark.parametrize(
    ("on_error", "shim", "undo"),
    short_form(
        [
            ("fail", "none", False),
            ("fail", "none", True),
            ("hold", "none", False),
            ("hold", "raid", False),
            ("hold", "raid", True),
        ],
        always=[("fail", "none", True), ("hold", "raid", False)],
    ),
)


@CRASHING
def test_a_process_killed_anywhere_in_a_replacement(
    tmp_path: Path, on_error: str, shim: str, undo: bool
) -> None:
    scene, crashes = crashes_of(tmp_path, on_error, shim, undo)
    for number, crash in enumerate(crashes):
        check_crash(scene, crash, (NEW, OLD)[number % 2], None)


@CRASHING
def test_a_power_cut_anywhere_in_a_replacement(
    tmp_path: Path, on_error: str, shim: str, undo: bool
) -> None:
    scene, crashes = crashes_of(tmp_path, on_error, shim, undo)
    # All else but the disks is gone after a power cut.
    cuts = [now for before, now in zip([None, *crashes], crashes) if not same_disks(before, now)]
    assert len(cuts) > 80
    for number, crash in enumerate(cuts):
        for turn, survivors in enumerate(few_survivals(crash.kernel.volatile(), crash.label)):
            check_crash(scene, crash, (NEW, OLD)[(number + turn) % 2], survivors)


def same_disks(before: Crash | None, now: Crash) -> bool:
    if before is None or before.app.durable != now.app.durable:
        return False
    was, now_is = before.kernel, now.kernel
    return was.disks == now_is.disks and was.volatile() == now_is.volatile()


def crashes_of(folder: Path, on_error: str, shim: str, undo: bool) -> tuple[Scene, list[Crash]]:
    """A busy replacement, or its undoing when all but the last commit was done."""
    scene = damaged(folder, on_error, shim=shim)
    if undo:
        interrupt(scene, NEW, "window_committed", 3)
    crashes = record(
        scene, lambda engine: change_main(scene, OLD if undo else NEW, engine), busy(scene)
    )
    assert len(crashes) > 150
    return scene, crashes


# Spares meanwhile


def with_two_spares(folder: Path, on_error: str = "fail") -> Scene:
    """A target with a chunk on its first spare, and disks for a new main and a new spare."""
    scene = make_scene(folder, 2, sectors=SECTORS, on_error=on_error)
    scene.kernel.add_disk("new", SECTORS)
    scene.kernel.add_disk("more", scene.spares[0].sectors)
    create_held(scene)
    scene.spoil(LOSSY * CHUNK)
    scene.remap((HEALTHY * CHUNK, CHUNK))
    return scene


def test_main_and_spares_are_not_changed_at_once(tmp_path: Path) -> None:
    scene = with_two_spares(tmp_path)
    generation = scene.engine().require(NAME).metadata.generation
    scene.request = replace(scene.request, spares=("/dev/spare0", "/dev/more"))
    with pytest.raises(Refused, match="another main and other spares at once"):
        change_main(scene, NEW)
    target = scene.engine().require(NAME)
    assert (target.metadata.generation, target.replacement) == (generation, None)


@pytest.mark.parametrize("main", [NEW, OLD])
def test_no_spare_is_removed_while_main_is_replaced(tmp_path: Path, main: str) -> None:
    scene = with_two_spares(tmp_path)
    interrupt(scene, NEW, "window_committed", 1)
    generation = scene.engine().require(NAME).metadata.generation
    changed = replace(scene, request=replace(scene.request, spares=("/dev/spare1",)))
    with pytest.raises(Refused, match="until that has ended no spare can be removed"):
        change_main(changed, main)
    engine = scene.engine()
    seen = engine.see_spare(NAME, "/dev/spare1", None, False)
    with pytest.raises(Refused, match="until that has ended no spare can be removed"):
        plan_spare_absent(SpareRequest(NAME, "/dev/spare1"), seen)
    seen = engine.see_spare(NAME, "/dev/more", "/dev/spare1", True)
    with pytest.raises(Refused, match="until that has ended no spare can be removed"):
        plan_spare_present(SpareRequest(NAME, "/dev/more", "/dev/spare1"), seen)
    assert engine.require(NAME).metadata.generation == generation
    change_main(scene, main)
    check_done(toward(scene, main))


def add_spare(scene: Scene, path: str) -> None:
    """What the module spare does."""
    engine = scene.engine()
    with engine.locked(NAME):
        plan = plan_spare_present(
            SpareRequest(NAME, path), engine.see_spare(NAME, path, None, True)
        )
        engine.apply(plan)
    scene.request = replace(scene.request, spares=(*scene.request.spares, path))


@pytest.mark.parametrize("main", [NEW, OLD])
@pytest.mark.parametrize("step", ["window_copied", "window_copied_again", "copy_flushed", ""])
def test_a_spare_may_come_while_main_is_replaced(tmp_path: Path, main: str, step: str) -> None:
    """The pool may be full of what the copy finds, and going back to add one takes hours."""
    scene = with_two_spares(tmp_path)
    interrupt(scene, NEW, "window_committed", 2)
    if not step:
        add_spare(scene, "/dev/more")
    before = scene.request
    met = itertools.count()

    def on_step(name: str) -> None:
        if name == step and next(met) == 0:
            add_spare(scene, "/dev/more")

    change_main(replace(scene, request=before), main, scene.engine(step=on_step))
    if main == OLD and step == "copy_flushed":
        # That is a step of the way to the new main.
        assert before == scene.request
    else:
        assert len(scene.engine().require(NAME).spares) == 3
    check_done(toward(scene, main))


def test_the_new_main_is_no_spare(tmp_path: Path) -> None:
    scene = with_two_spares(tmp_path)
    interrupt(scene, NEW, "window_committed", 0)
    seen = scene.engine().see_spare(NAME, NEW, None, True)
    with pytest.raises(Refused) as caught:
        plan_spare_present(SpareRequest(NAME, NEW, wipe=True), seen)
    assert caught.value.device == NEW


def test_no_chunk_returns_to_a_main_that_is_replaced(tmp_path: Path) -> None:
    scene = with_two_spares(tmp_path)
    interrupt(scene, NEW, "window_committed", 0)
    engine = scene.engine()
    with engine.locked(NAME):
        with pytest.raises(Refused, match="until that has ended no chunk can return to it"):
            engine.return_to_main(NAME, [(HEALTHY * CHUNK, CHUNK)])
        assert not engine.return_to_main(NAME, [(3 * CHUNK, CHUNK)]).plan.changes
    change_main(scene, NEW)
    check_done(toward(scene, NEW))


@pytest.mark.parametrize("on_error", ["fail", "hold"])
@pytest.mark.parametrize("main", [NEW, OLD])
def test_a_spare_that_is_lost_does_not_stop_a_replacement(
    tmp_path: Path, main: str, on_error: str
) -> None:
    """It cannot be named, because it is gone, nor be removed while main is being replaced."""
    scene = with_two_spares(tmp_path, on_error)
    interrupt(scene, NEW, "window_committed", 0)
    unplug(scene, scene.spares[0])
    scene.request = replace(scene.request, spares=("/dev/spare1",))
    kinds, result = change_main(scene, main)
    cut_off = ["cut_off"] if on_error == "hold" else []
    assert kinds == [*cut_off, REPLACE if main == NEW else UNDO]
    assert result is not None
    target = scene.engine().require(NAME)
    assert target.main is not None
    assert (target.main.path, target.replacement) == (main, None)
    on_lost = [e.logical for e in target.metadata.extents if e.spare == 0]
    assert on_lost == [HEALTHY], "where its data is"
    if main == NEW:
        assert [e.logical for e in target.metadata.extents if e.spare == 1] == [LOSSY]
    lost = range(HEALTHY * CHUNK, (HEALTHY + 1) * CHUNK)
    for sector in set(range(SECTORS)) - {*lost, LOSSY * CHUNK}:
        assert scene.read(sector) == content(sector), sector
    assert {scene.read(sector) for sector in lost} == {None}, "no other data in place of it"


# Others at work meanwhile


@pytest.mark.parametrize("sector", [3 * CHUNK + 1, LOSSY * CHUNK, WEAK * CHUNK + 2])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_chunk_may_be_healed_while_its_window_is_copied(
    tmp_path: Path, sector: int, times: int
) -> None:
    """As the daemon does, which gets the lock between two windows and while one is copied."""
    scene = damaged(tmp_path)
    met = itertools.count(1)

    def on_step(name: str) -> None:
        if name == "window_copied" and next(met) == times:
            scene.app.write(scene.kernel, sector)
            scene.remap((sector, 1))

    change_main(scene, NEW, scene.engine(step=on_step))
    check_done(toward(scene, NEW))


def test_a_sector_that_goes_bad_before_the_freeze_is_healed_after_it(tmp_path: Path) -> None:
    """I/O does not wait for it."""
    scene = damaged(tmp_path)
    met = itertools.count(1)
    reads = []

    def on_step(name: str) -> None:
        if name == "window_copied_again" and next(met) == 1:
            scene.app.write(scene.kernel, 3 * CHUNK + 4)
            scene.app.write(scene.kernel, 4)
            scene.spoil(3 * CHUNK, 1)
            scene.main.on_read = lambda sector, count: reads.append(sector)
        elif name == "thawed":
            scene.main.on_read = None
            reads.append(-1)

    _kinds, result = change_main(scene, NEW, scene.engine(step=on_step))
    assert result is not None
    assert result.healed[:2] == [0, 3]
    assert reads[: reads.index(-1)] == [0, 0], "one bad chunk is enough to give the window up"
    check_done(toward(scene, NEW))


def test_writes_behind_the_copy_are_not_lost(tmp_path: Path) -> None:
    """While later pieces of the same window are read."""
    scene = damaged(tmp_path)
    behind = [0, 3 * CHUNK + 1, 4 * CHUNK, 7 * CHUNK]

    def on_read(sector: int, _count: int) -> None:
        # Once each: a later write would make up for one that was lost.
        while behind and behind[0] + CHUNK <= sector:
            scene.app.write(scene.kernel, behind.pop(0))

    scene.main.on_read = on_read
    change_main(scene, NEW)
    assert behind == []
    check_done(toward(scene, NEW))


def test_no_chunk_moves_before_writes_are_counted(tmp_path: Path) -> None:
    """What is written where the copy does not look must be known to it."""
    scene = damaged(tmp_path)
    free = []

    def on_call(name: str) -> None:
        if name in ("stats_create", f"load {NAME}-place"):
            with scene.engine().try_locked(NAME) as locked:
                free.append((name, locked))

    change_main(scene, NEW, scene.engine(Process(scene.kernel, on_call)))
    first = [free[0]] + [now for before, now in zip(free, free[1:]) if "place" in before[0]]
    counted = [locked for name, locked in first if name == "stats_create"]
    assert len(counted) >= 3
    assert not any(counted), "the first counter of each window starts under the lock"


@pytest.mark.parametrize("lost", [False, True])
def test_a_chunk_on_the_new_main_goes_to_a_spare_from_there(tmp_path: Path, lost: bool) -> None:
    scene = damaged(tmp_path)
    interrupt(scene, NEW, "thawed", 1)
    scene.app.write(scene.kernel, 3 * CHUNK)
    sector = 3 * CHUNK + 2
    if lost:
        scene.kernel.disks[NEW].spoil([sector])
        scene.app.versions[sector] = [None]
    assert scene.remap((sector, 1)).lost == ([(sector, 1)] if lost else [])
    assert scene.read(3 * CHUNK) == content(3 * CHUNK, 1)
    change_main(scene, NEW)
    after = toward(scene, NEW)
    check_done(after)
    # Its window is past, so it stays where it is.
    assert 3 in [extent.logical for extent in after.engine().require(NAME).metadata.extents]


def test_the_copy_lets_the_lock_go_between_its_steps(tmp_path: Path) -> None:
    scene = damaged(tmp_path)
    free = set()

    def on_step(name: str) -> None:
        with scene.engine().try_locked(NAME) as locked:
            if locked:
                free.add(name)

    change_main(scene, NEW, scene.engine(step=on_step))
    assert {"window_copied", "window_copied_again", "copy_flushed"} == free


@pytest.mark.parametrize("other", [NEW, OLD, None])
def test_only_one_process_copies(tmp_path: Path, other: str | None) -> None:
    """A second one would overwrite what was written to a window that the first one has moved."""
    scene = damaged(tmp_path)
    refused = []

    def on_step(name: str) -> None:
        if name in ("window_copied", "thawed") and not refused:
            with pytest.raises(Refused, match=f"by process {os.getpid()}") as caught:
                change_main(scene, other) if other else scene.remove()
            refused.append(caught.value)

    process = Process(scene.kernel)
    change_main(scene, NEW, scene.engine(process, on_step))
    assert len(refused) == 1
    check_done(toward(scene, NEW))


def test_a_new_main_that_fails_is_named_and_can_be_left(tmp_path: Path) -> None:
    scene = damaged(tmp_path)
    new = scene.kernel.disks[NEW]
    new.unwritable = {4 * CHUNK}
    with pytest.raises(DmRemapError, match="cannot be written") as caught:
        change_main(scene, NEW)
    assert caught.value.device == NEW
    change_main(scene, OLD)
    check_done(scene)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("sector", [0, 3 * CHUNK + 1, SECTORS - 1])
def test_a_new_main_that_cannot_be_read_gets_no_commit(
    tmp_path: Path, sector: int, frozen: bool
) -> None:
    """Once the old main is gone, it is the only copy."""
    scene = damaged(tmp_path)
    new = scene.kernel.disks[NEW]
    new.heals = False
    spoiled = []

    def on_step(name: str) -> None:
        if frozen and name == "window_copied_again":
            scene.app.write(scene.kernel, sector)
        if name == ("frozen" if frozen else REPLACE):
            new.spoil([sector])
            spoiled.append(name)

    with pytest.raises(DmRemapError) as caught:
        change_main(scene, NEW, scene.engine(step=on_step))
    assert spoiled
    assert caught.value.device == NEW
    # A read error after it was read back is for the healing.
    border = replacement.copied_sectors(scene.engine().require(NAME).metadata)
    assert border <= sector
    change_main(scene, OLD)
    check_done(scene)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_new_main_that_drops_a_write_gets_no_commit(tmp_path: Path, frozen: bool) -> None:
    scene = damaged(tmp_path)
    sector, dropped = 3 * CHUNK + 1, []
    new = scene.kernel.disks[NEW]
    write = new.write

    def forgetful(start: int, data: bytes) -> None:
        count = len(data) // SECTOR
        if start <= sector < start + count and (not frozen or count == CHUNK):
            dropped.append(start)
        else:
            write(start, data)

    def on_step(name: str) -> None:
        if frozen and name == "window_copied_again":
            scene.app.write(scene.kernel, sector)

    new.write = forgetful  # type: ignore[method-assign, assignment]
    with pytest.raises(DmRemapError, match="other data than was written"):
        change_main(scene, NEW, scene.engine(step=on_step))
    assert len(dropped) == 1
    assert replacement.copied_chunks(scene.engine().require(NAME).metadata) == 0
    new.write = write  # type: ignore[method-assign]
    change_main(scene, OLD)
    check_done(scene)


def test_a_new_main_that_cannot_be_flushed_gets_no_commit(tmp_path: Path) -> None:
    scene = damaged(tmp_path)
    scene.kernel.disks[NEW].flush_fails = True
    with pytest.raises(DmRemapError, match="cannot be written"):
        change_main(scene, NEW)
    assert replacement.copied_chunks(scene.engine().require(NAME).metadata) == 0
    scene.kernel.disks[NEW].flush_fails = False
    change_main(scene, OLD)
    check_done(scene)


def test_a_full_spare_stops_the_copy_with_its_name(tmp_path: Path) -> None:
    scene = damaged(tmp_path)
    geometry = geometry_of(scene.engine().require(NAME).metadata, 0)
    scene.spares[0].unwritable = set(range(geometry.data_start, geometry.far_middle))
    with pytest.raises(DmRemapError) as caught:
        change_main(scene, NEW)
    assert caught.value.device == scene.spares[0].path
    scene.spares[0].unwritable = set()
    change_main(scene, NEW)
    check_done(toward(scene, NEW))


def test_the_shim_moves_to_the_new_main(tmp_path: Path) -> None:
    scene = damaged(tmp_path, "hold", shim="raid")
    change_main(scene, NEW)
    check_done(toward(scene, NEW))
    new = scene.kernel.disks[NEW].devno
    assert below(scene.kernel.mapped[stack.shim_name(NAME)].live.segments) == [new]


def test_a_shim_that_serves_no_chunk_is_in_place(tmp_path: Path) -> None:
    scene = make_scene(tmp_path, sectors=SECTORS, on_error="hold")
    scene.request = replace(scene.request, shim="raid")
    create_held(scene)
    scene.remap((0, SECTORS))
    scene.check()


def test_the_copy_keeps_to_its_rate(tmp_path: Path) -> None:
    scene = make_scene(tmp_path, sectors=SECTORS)
    scene.kernel.add_disk("new", SECTORS)
    scene.create()
    engine = scene.engine()
    with engine.locked(NAME):
        request = replace(scene.request, main=NEW)
        engine.apply(plan_present(request, engine.see(NAME, NEW, request.spares)))
    now = [0.0]

    def pause(seconds: float) -> None:
        now[0] += seconds

    told: list[str] = []
    mapper = Process(scene.kernel).mapper
    tools = Tools(
        mapper,
        Freezer(mapper, lambda name: None),
        lambda target, disks: contextlib.nullcontext(),
        lambda name, members: None,
    )
    pace = replace(WINDOW, rate=4 * SECTOR)
    copying = Replacing(
        engine, tools, lambda name: None, told.append, pace, QUICK, lambda: now[0], pause
    )
    result = copying.run(NAME, undo=False)
    assert result.seconds == pytest.approx(SECTORS / 4)
    assert told[0].startswith(f"copied {4 * CHUNK * SECTOR} of {SECTORS * SECTOR} bytes")
    assert told[0].endswith("13 s left")
    check_done(toward(scene, NEW))


@pytest.mark.parametrize("pace", [{"rate": -1}, {"window": 0}])
def test_an_impossible_pace_is_refused(pace: dict[str, int]) -> None:
    with pytest.raises(Refused):
        Pace(**pace)


def test_errors_count_on_the_disk_that_serves_the_sector_now() -> None:
    target = under_way(half(copied=8))
    ward = Ward(target, None, contextlib.ExitStack(), "8:0", 2048, new_disk="8:64", new_start=64)
    border = 8 * 128

    def error(devno: str, sector: int, count: int, operation: str = "read") -> BlockError:
        return BlockError(True, devno, operation, sector, count, errno.EIO, False)

    seen = [
        error("8:0", 2048 + border - 8, 16),
        error("8:64", 64 + border - 8, 16, "write"),
        error("8:0", 2048, 8),
        error("8:64", 64 + border, 8),
        error("8:64", 0, 0, "flush"),
    ]
    found = [(e.operation, e.sector - ward.start, e.count) for e in on_one_main(ward, seen[:4])]
    assert found == [("read", border, 8), ("write", border - 8, 8)]
    assert on_one_main(ward, seen[4:]) == seen[4:]
