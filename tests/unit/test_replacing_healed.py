# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Replacing the main while the reflex heals both disks, on a kernel in memory."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dm_remap import replacement, stack
from dm_remap.probing import DeviceState
from dm_remap.replacing import Replacing
from tests.unit.fake_kernel import Blocked, below
from tests.unit.test_engine import CHUNK, NAME, Scene, content, create_held, make_scene
from tests.unit.test_reflex import Healer
from tests.unit.test_replacing import (
    NEW,
    OLD,
    SECTORS,
    change_main,
    check_done,
    interrupt,
    toward,
)


@pytest.fixture(params=["none", "raid"])
def held(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Scene, Healer]]:
    """A target whose errors are held and healed, and a disk that is to be its main."""
    scene = make_scene(tmp_path, sectors=SECTORS, on_error="hold")
    scene.request = replace(scene.request, shim=request.param)
    scene.kernel.add_disk("new", SECTORS)
    create_held(scene)
    healer = Healer(scene)
    # Where the copy waits for the reflex it works, instead of time that passes.
    waiting = Replacing._let_heal
    monkeypatch.setattr("dm_remap.replacing._HEALING_SECONDS", 0)

    def let_heal(copying: Replacing, name: str) -> None:
        healer.turn(3)
        waiting(copying, name)

    monkeypatch.setattr(Replacing, "_let_heal", let_heal)
    with scene.engine().healing():
        yield scene, healer


def test_errors_of_a_new_main_are_healed_though_the_old_one_had_none(
    held: tuple[Scene, Healer],
) -> None:
    """Nothing but the table tells the reflex that the disk below the target is another."""
    scene, healer = held
    change_main(scene, NEW)
    new = scene.kernel.disks[NEW]
    new.spoil([41], failures=3)
    number = scene.kernel.submit_read(NAME, 40, 4)
    healer.settle()
    assert scene.kernel.answers[number] == b"".join(content(s) for s in range(40, 44))
    assert "failed" not in healer.kinds()
    assert healer.reports[-1]["type"] == "healed"
    assert healer.reports[-1]["device"] == NEW
    check_done(toward(scene, NEW))


@pytest.mark.parametrize("windows", [1, 2, 3])
def test_errors_of_both_disks_are_healed_while_the_copy_stands_still(
    held: tuple[Scene, Healer], windows: int
) -> None:
    scene, healer = held
    interrupt(scene, NEW, "window_committed", windows)
    new, old = scene.kernel.disks[NEW], scene.kernel.disks[OLD]
    border = min(4 * CHUNK * windows, SECTORS)
    new.spoil([1], failures=3)
    new.unwritable = {CHUNK + 2}
    numbers = {1: scene.kernel.submit_read(NAME, 0, 3)}
    scene.app.write(scene.kernel, CHUNK + 2)
    if border < SECTORS:
        old.spoil([border + 1], failures=3)
        old.unwritable = {border + CHUNK - 1}
        numbers[border + 1] = scene.kernel.submit_read(NAME, border, 3)
        scene.app.write(scene.kernel, border + CHUNK - 1)
    healer.settle()
    scene.app.settle(scene.kernel)
    assert not scene.app.waiting
    for sector, number in numbers.items():
        expected = b"".join(content(s) for s in range(sector - 1, sector + 2))
        assert scene.kernel.answers[number] == expected
    assert "failed" not in healer.kinds()
    new.unwritable = set()
    change_main(scene, NEW)
    check_done(toward(scene, NEW))


@pytest.mark.parametrize("lost", [NEW, OLD])
def test_the_main_that_is_gone_is_named(held: tuple[Scene, Healer], lost: str) -> None:
    scene, healer = held
    interrupt(scene, NEW, "window_copied", 2)
    disk = scene.kernel.disks[lost]
    disk.dead = True
    healer.reflex._state_of = lambda devno: (
        DeviceState.GONE if devno == disk.devno else DeviceState.LIVE
    )
    number = scene.kernel.submit_read(NAME, 0 if lost == NEW else 4 * CHUNK, 1)
    healer.turn(80)
    assert [(report["type"], report["device"]) for report in healer.reports] == [
        ("device_lost", lost)
    ]
    assert number not in scene.kernel.failed, "it may come back"
    disk.dead = False
    healer.reflex._state_of = lambda devno: DeviceState.LIVE
    healer.settle()
    change_main(scene, NEW)
    check_done(toward(scene, NEW))


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(3, 60))]
)
@pytest.mark.parametrize("back", [False, True])
def test_nothing_is_lost_while_disks_fail_and_are_healed(
    held: tuple[Scene, Healer], seed: int, back: bool
) -> None:
    """Sectors that fail some reads, or writes for ever, at any step, on either side."""
    scene, healer = held
    chance = random.Random(seed)
    new, old = scene.kernel.disks[NEW], scene.kernel.disks[OLD]
    old.heals = False
    reads: dict[int, tuple[int, bytes]] = {}

    def on_step(_name: str) -> None:
        act = chance.randrange(6)
        # The first chunk stays on a main, because a shim that serves nothing is not found.
        sector = chance.randrange(CHUNK if act < 2 else 0, SECTORS)
        if act == 0:
            border = replacement.copied_sectors(scene.engine().require(NAME).metadata)
            (new if sector < border else old).spoil([sector], failures=chance.randrange(1, 5))
        elif act == 1 and len(old.unwritable) < 6:
            old.unwritable.add(sector)
        elif act == 2 and not scene.app.waiting:
            waits = scene.kernel.submit_read(NAME, sector, 1)
            allowed = scene.app.allowed(sector, power_cut=False)[0]
            assert allowed is not None
            reads[waits] = (sector, allowed)
        elif act == 3:
            with contextlib.suppress(Blocked):
                scene.app.flush(scene.kernel)
        else:
            scene.app.write(scene.kernel, sector)
        healer.turn(2)
        scene.app.settle(scene.kernel)

    if back:
        interrupt(scene, NEW, "window_committed", 3)
    goal = OLD if back else NEW
    change_main(scene, goal, scene.engine(step=on_step))
    healer.settle()
    scene.app.settle(scene.kernel)
    assert not scene.kernel.failed
    for number, (sector, data) in reads.items():
        answer = scene.kernel.answers[number]
        known = scene.app.versions[sector]
        assert known.index(answer) >= known.index(data), "not older than when it was read"
    for disk in (new, old):
        disk.bad.clear()
    assert "failed" not in healer.kinds()
    check_done(toward(scene, goal))


def test_the_shim_is_back_as_soon_as_the_old_main_serves_again(tmp_path: Path) -> None:
    scene = make_scene(tmp_path, sectors=SECTORS, on_error="hold")
    scene.request = replace(scene.request, shim="raid")
    scene.kernel.add_disk("new", SECTORS)
    create_held(scene)
    interrupt(scene, NEW, "window_committed", 3)
    seen = []

    def on_step(name: str) -> None:
        if name == "swapped":
            shim = scene.kernel.mapped[stack.shim_name(NAME)].devno
            seen.append(shim in below(scene.kernel.mapped[stack.map_name(NAME)].live.segments))

    with scene.engine().healing():
        change_main(scene, OLD, scene.engine(step=on_step))
    assert seen == [False, True, True, True], "the interrupted step, then three windows"
    check_done(scene)
