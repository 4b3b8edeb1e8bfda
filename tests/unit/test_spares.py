# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Spares that come, go, fail and return, on a kernel in memory: every crash and every fault."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from dm_remap import copies, plan_spares
from dm_remap.engine import Engine
from dm_remap.errors import DmRemapError, Refused
from dm_remap.format import geometry_of, minimum_spare_sectors
from dm_remap.moved import RemappedChunk
from dm_remap.moving import at_once
from dm_remap.plan import Plan
from dm_remap.plan_remap import choose_places, with_moves
from dm_remap.plan_spares import SpareRequest, plan_spare_absent, plan_spare_present
from dm_remap.plan_upkeep import plan_upkeep
from dm_remap.report import describe_target
from dm_remap.salvage import Patience
from dm_remap.target import ActiveTarget, chunks_on, usable_geometries
from tests.parameters import short_form
from tests.unit.fake_kernel import FILESYSTEM_MAGIC, SECTOR, Disk, Process
from tests.unit.test_engine import (
    CHUNK,
    NAME,
    SECTORS,
    Scene,
    create_held,
    make_scene,
    numbered,
    place,
    record,
    survivals,
)

NEW = "/dev/new"


@pytest.fixture(autouse=True)
def drain_in_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_spares, "DRAIN_CHUNKS", 2)


def with_chunks(folder: Path, spares: int = 2, on_error: str = "fail", new: bool = True) -> Scene:
    """A target with three chunks on spare 0, the first with a lost sector, and a free device."""
    scene = make_scene(folder, spares, on_error=on_error)
    if new:
        scene.kernel.add_disk("new", minimum_spare_sectors(CHUNK, 1) + 8192)
    create_held(scene)
    scene.spoil(41)
    scene.remap((40, 2 * CHUNK), (SECTORS - 1, 1))
    scene.main.bad.clear()
    scene.main.stable_bad.clear()
    for sector in (44, 50, SECTORS - 2):
        scene.app.write(scene.kernel, sector)
    scene.app.flush(scene.kernel)
    # Only the application's data counts from here on.
    scene.main.fill(40, bytes(2 * CHUNK * SECTOR))
    return scene


def target_of(scene: Scene) -> ActiveTarget:
    return scene.engine().require(NAME)


def plan(
    scene: Scene, device: str, present: bool = True, replaces: str | None = None, **more: bool
) -> Plan:
    request = SpareRequest(NAME, device, replaces, **more)
    seen = scene.engine().see_spare(NAME, device, replaces, add=present)
    return plan_spare_present(request, seen) if present else plan_spare_absent(request, seen)


def add(scene: Scene, device: str = NEW, engine: Engine | None = None, **more: bool) -> None:
    (engine or scene.engine()).apply(plan(scene, device, **more))


def remove(
    scene: Scene, device: str, engine: Engine | None = None, **more: bool
) -> list[RemappedChunk]:
    return (engine or scene.engine()).apply(plan(scene, device, False, **more))


def exchange(
    scene: Scene, old: str, engine: Engine | None = None, **more: bool
) -> list[RemappedChunk]:
    return (engine or scene.engine()).apply(plan(scene, NEW, True, old, **more))


def spares_now(scene: Scene) -> tuple[str, ...]:
    return tuple(spare.candidate.info.path for spare in target_of(scene).spares)


def check(scene: Scene, power_cut: bool = False, why: str = "") -> None:
    """Everything is right with the spares that the target has now."""
    replace(scene, request=replace(scene.request, spares=spares_now(scene))).check(power_cut, why)


def kinds(made: Plan) -> list[str]:
    return [action.kind for action in made.actions]


# Adding


def test_a_spare_is_added_and_used(tmp_path: Path) -> None:
    scene = with_chunks(tmp_path, spares=1)
    made = plan(scene, NEW)
    assert kinds(made) == ["format_spare", "activate_spare", "add_spare"]
    scene.engine().apply(made)
    assert made.after == plan_upkeep(target_of(scene)).after
    assert spares_now(scene) == ("/dev/spare0", NEW)
    assert not plan(scene, NEW).changes
    check(scene)
    scene.spares[0].unwritable = set(range(20000, scene.spares[0].sectors))
    scene.spoil(83)
    assert scene.remap((83, 1)).chunks[0].spare == 1
    scene.spares[0].unwritable = set()
    # It has missed its last copies.
    scene.engine().apply(plan_upkeep(target_of(scene)))
    check(scene)


def test_a_target_has_at_most_eight_spares(tmp_path: Path) -> None:
    scene = make_scene(tmp_path, spares=8)
    scene.kernel.add_disk("new", scene.spares[0].sectors)
    scene.create()
    with pytest.raises(Refused, match="would have 9 spares"):
        plan(scene, NEW)
    with pytest.raises(Refused, match="would have 9 spares"):
        plan(scene, NEW, replaces="/dev/spare3")
    remove(scene, "/dev/spare3")
    add(scene)
    assert [s.index for s in target_of(scene).spares] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert target_of(scene).spares[3].candidate.info.path == NEW


def test_what_is_on_a_device_is_not_overwritten(tmp_path: Path) -> None:
    scene = with_chunks(tmp_path, spares=1)
    new = scene.kernel.disks[NEW]
    new.fill(2, FILESYSTEM_MAGIC.ljust(SECTOR, b"\0"))
    with pytest.raises(Refused, match="is not empty: ext4"):
        plan(scene, NEW)
    assert kinds(plan(scene, NEW, wipe=True))[0] == "wipe_spare"
    new.mounted = "/srv"
    with pytest.raises(Refused, match="is in use"):
        plan(scene, NEW, wipe=True)


@pytest.mark.parametrize("device", ["/dev/main", "/dev/none"])
def test_devices_that_cannot_be_a_spare_are_refused(tmp_path: Path, device: str) -> None:
    scene = with_chunks(tmp_path)
    with pytest.raises(Refused, match="is the main itself|no such device"):
        plan(scene, device)


def test_a_small_device_is_refused(tmp_path: Path) -> None:
    scene = with_chunks(tmp_path)
    small = scene.kernel.add_disk("small", 4096).path
    with pytest.raises(Refused, match="too few") as caught:
        plan(scene, small)
    assert caught.value.device == small


@pytest.mark.parametrize("discard", [False, True])
def test_another_targets_chunks_are_not_erased_by_wipe_alone(tmp_path: Path, discard: bool) -> None:
    scene = with_chunks(tmp_path, spares=1)
    other = with_chunks(tmp_path, spares=1)
    theirs = other.spares[0].clone()
    theirs.path, theirs.devno = NEW, scene.kernel.disks[NEW].devno
    scene.kernel.disks[NEW] = theirs
    if discard:
        add(scene, wipe=True, discard_remaps=True)
        check(scene)
    else:
        with pytest.raises(Refused, match="3 remapped chunks of it can"):
            plan(scene, NEW, wipe=True)


def test_a_clone_of_a_spare_is_no_new_spare(tmp_path: Path) -> None:
    scene = with_chunks(tmp_path)
    clone = scene.spares[1].clone()
    clone.path, clone.devno = NEW, scene.kernel.disks[NEW].devno
    scene.kernel.disks[NEW] = clone
    with pytest.raises(Refused, match="or a clone of one"):
        plan(scene, NEW, wipe=True, discard_remaps=True)


# Removing and replacing


def test_a_spare_is_emptied_and_removed(tmp_path: Path) -> None:
    scene = with_chunks(tmp_path)
    made = plan(scene, "/dev/spare0", False)
    assert kinds(made) == ["drain_spare", "remove_spare", "wipe_metadata", "deactivate_spare"]
    moved = scene.engine().apply(made)
    assert made.after == plan_upkeep(target_of(scene)).after
    assert [(chunk.chunk, chunk.origin, chunk.spare) for chunk in moved] == [
        (5, 0, 1),
        (6, 0, 1),
        (24, 0, 1),
    ]
    assert [chunk.lost_before for chunk in moved] == [[(41, 1)], [], []]
    assert target_of(scene).metadata.config["spares"][0] is None
    assert f"{NAME}-spare0" not in scene.kernel.mapped
    assert not plan(scene, "/dev/spare0", False).changes
    scene.spares[0].dead = True
    check(scene)
    scene.spares[0].dead = False
    # Nothing is left on it, so it may come again.
    add(scene, "/dev/spare0")
    assert target_of(scene).spares[0].index == 0
    check(scene)


def test_the_last_spare_stays(tmp_path: Path) -> None:
    scene = with_chunks(tmp_path, spares=1)
    with pytest.raises(Refused, match="without a spare that works"):
        plan(scene, "/dev/spare0", False)


def test_a_spare_without_room_elsewhere_stays_whole(tmp_path: Path) -> None:
    scene = make_scene(tmp_path, spares=2, sectors=2400 * CHUNK)
    scene.spares[1].sectors = minimum_spare_sectors(CHUNK, 1)
    scene.kernel.add_disk("new", minimum_spare_sectors(CHUNK, 1))
    scene.create()
    commit_places(scene, range(2400))
    room = geometry_of(target_of(scene).metadata, 1).usable_chunks
    assert room < 2400
    expected = f"has 2400 chunks, and the other spares have {room} free chunks"
    calls: list[str] = []
    with pytest.raises(Refused, match=expected) as caught:
        remove(scene, "/dev/spare0", scene.engine(Process(scene.kernel, calls.append)))
    assert caught.value.device == "/dev/spare0"
    assert calls == []
    # Together they have room.
    assert plan(scene, NEW, replaces="/dev/spare0").changes


def commit_places(scene: Scene, chunks: Sequence[int]) -> None:
    """Put chunks on spares in the metadata alone, for tests that count."""
    engine = scene.engine()
    target = engine.require(NAME)
    places = choose_places(target.metadata, chunks, usable_geometries(target), ())
    moves = {place.logical: place for place in places}
    metadata = with_moves(target.metadata.successor(1), moves, ())
    with engine.opened(target) as disks:
        copies.commit(disks.members, target.metadata, metadata)


def test_a_replacement_takes_the_chunks(tmp_path: Path) -> None:
    scene = with_chunks(tmp_path)
    made = plan(scene, NEW, replaces="/dev/spare0")
    assert kinds(made) == [
        "format_spare",
        "activate_spare",
        "add_spare",
        "drain_spare",
        "remove_spare",
        "wipe_metadata",
        "deactivate_spare",
    ]
    moved = scene.engine().apply(made)
    assert {chunk.spare for chunk in moved} == {2}, "not the other spare, though it has room"
    assert made.after == plan_upkeep(target_of(scene)).after
    assert not plan(scene, NEW, replaces="/dev/spare0").changes
    check(scene)


def test_nothing_is_replaced_that_is_no_spare(tmp_path: Path) -> None:
    scene = with_chunks(tmp_path)
    with pytest.raises(Refused, match="nothing can replace it") as caught:
        plan(scene, NEW, replaces="/dev/main")
    assert "/dev/spare0, /dev/spare1" in str(caught.value)
    with pytest.raises(Refused, match="cannot replace itself"):
        plan(scene, "/dev/spare0", replaces="/dev/spare0")


def test_the_target_module_changes_spares_too(tmp_path: Path) -> None:
    scene = with_chunks(tmp_path)
    request = replace(scene.request, spares=("/dev/spare1", NEW), on_error="hold")
    changed = replace(scene, request=request)
    with changed.engine().healing():
        made = changed.plan()
        assert [kind for kind in kinds(made) if kind.endswith("_spare")] == [
            "format_spare",
            "activate_spare",
            "add_spare",
            "drain_spare",
            "remove_spare",
            "deactivate_spare",
        ]
        changed.engine().apply(made)
        assert made.after == changed.plan().after
    changed.check()
    assert {place(changed, chunk)[0] for chunk in (5, 6, 24)} == {2}


def test_every_chunk_on_spares_can_move(tmp_path: Path) -> None:
    scene = with_chunks(tmp_path)
    scene.remap((0, SECTORS))
    remove(scene, "/dev/spare0")
    assert f"{NAME}-spare0" not in scene.kernel.mapped
    check(scene)


# Crashes


def apply_crashes(
    scene: Scene, command: Callable[[Engine], object], power_cut: bool
) -> Iterator[tuple[str, Scene]]:
    """What crashes anywhere in a command leave, and what the target is then without more doing."""
    turn = itertools.count()
    writes = (40, 44, 48, 55, 80, SECTORS - 1)

    def on_step(name: str) -> None:
        number = next(turn)
        scene.app.write(scene.kernel, writes[number % len(writes)])
        # A flush passes a freeze, and must reach what was acknowledged before.
        if power_cut and number % 3 == 0:
            scene.app.flush(scene.kernel)

    crashes = record(scene, command, on_step)
    assert len(crashes) > 15
    for crash in crashes[:: 3 if power_cut else 1]:
        choices = survivals(crash.kernel.volatile(), crash.label) if power_cut else [None]
        for survivors in itertools.islice(choices, 3):
            left = scene.at(crash.kernel.clone(), crash.app.clone())
            if survivors is not None:
                left.kernel.cut_power(survivors)
                left.app.waiting.clear()
                activate(left)
            left.engine().apply(plan_upkeep(target_of(left)))
            check(left, power_cut, crash.label)
            yield crash.label, left


def activate(scene: Scene) -> None:
    """Activate with the spares of the newest generation, as whoever reads the refusals would."""
    surveys = {}
    for path in scene.kernel.disks:
        with Process(scene.kernel).blocks.BlockDevice(path) as device:
            surveys[path] = copies.survey(device)
    choice = copies.choose(surveys)
    assert not choice.missing
    paths = tuple(choice.spares.values())
    replace(scene, request=replace(scene.request, spares=paths)).create()


@pytest.mark.parametrize("power_cut", [False, True], ids=["killed", "power cut"])
def test_a_crash_anywhere_in_an_addition(tmp_path: Path, power_cut: bool) -> None:
    scene = with_chunks(tmp_path, spares=1)
    found = set()
    for label, left in apply_crashes(scene, lambda e: add(scene, engine=e), power_cut):
        found.add(spares_now(left))
        add(left, wipe=power_cut)
        assert spares_now(left) == ("/dev/spare0", NEW), label
        check(left, power_cut, label)
    assert found == {("/dev/spare0",), ("/dev/spare0", NEW)}


@pytest.mark.parametrize("power_cut", [False, True], ids=["killed", "power cut"])
def test_a_crash_anywhere_in_a_removal_of_a_spare(tmp_path: Path, power_cut: bool) -> None:
    scene = with_chunks(tmp_path, new=False)
    found = set()
    for label, left in apply_crashes(
        scene, lambda e: remove(scene, "/dev/spare0", engine=e), power_cut
    ):
        found.add(spares_now(left))
        remove(left, "/dev/spare0")
        assert spares_now(left) == ("/dev/spare1",), label
        check(left, power_cut, label)
    assert found == {("/dev/spare1",), ("/dev/spare0", "/dev/spare1")}


@pytest.mark.parametrize(
    ("power_cut", "on_error"),
    short_form(
        itertools.product([False, True], ["fail", "hold"]),
        always=[(False, "fail"), (True, "hold")],
    ),
)
def test_a_crash_anywhere_in_a_replacement(tmp_path: Path, power_cut: bool, on_error: str) -> None:
    scene = with_chunks(tmp_path, spares=1, on_error=on_error)
    found = set()
    for label, left in apply_crashes(
        scene, lambda e: exchange(scene, "/dev/spare0", engine=e), power_cut
    ):
        found.add(spares_now(left))
        if spares_now(left) != (NEW,):
            exchange(left, "/dev/spare0", wipe=power_cut)
        assert spares_now(left) == (NEW,), label
        check(left, power_cut, label)
    assert found == {("/dev/spare0",), ("/dev/spare0", NEW), (NEW,)}


@pytest.mark.parametrize("power_cut", [False, True], ids=["killed", "power cut"])
def test_a_crash_anywhere_while_a_dead_spare_is_given_up(tmp_path: Path, power_cut: bool) -> None:
    scene = with_chunks(tmp_path, new=False)
    dead = scene.spares[0]
    scene.app.flush(scene.kernel)
    dead.dead = True
    gone = [
        sector for chunk in (5, 6, 24) for sector in range(8 * chunk, min(8 * chunk + 8, SECTORS))
    ]
    for sector in gone:
        scene.app.versions[sector] = [None]
        scene.app.acknowledged.pop(sector, None)
        scene.app.durable.pop(sector, None)
    crashes = record(scene, lambda e: remove(scene, "/dev/spare0", engine=e, discard_remaps=True))
    for crash in crashes[:: 3 if power_cut else 1]:
        choices = survivals(crash.kernel.volatile(), crash.label) if power_cut else [None]
        for survivors in itertools.islice(choices, 3):
            left = scene.at(crash.kernel.clone(), crash.app.clone())
            if survivors is not None:
                left.kernel.cut_power(survivors)
                # It answers for as long as an activation takes, which needs all spares.
                left.spares[0].dead = False
                activate(left)
                left.spares[0].dead = True
                if not target_of(left).lost_spares:
                    check(left, power_cut, crash.label)
                    continue
                left.engine().apply(plan_upkeep(target_of(left)))
            remove(left, "/dev/spare0", discard_remaps=True)
            assert spares_now(left) == ("/dev/spare1",), crash.label
            assert target_of(left).lost_spares == (), crash.label
            check(left, power_cut, crash.label)


# Spares that fail


def test_a_lost_spare_takes_down_only_what_is_on_it(tmp_path: Path) -> None:
    scene = with_chunks(tmp_path)
    scene.spares[0].dead = True
    target = target_of(scene)
    assert [spare.index for spare in target.spares] == [1]
    (lost,) = describe_target(target)["lost_spares"]
    assert (lost["index"], lost["path"], lost["reason"]) == (0, "/dev/spare0", "cannot be read")
    assert lost["unavailable"] == [{"start": 40, "count": 16}, {"start": 192, "count": 5}]
    assert describe_target(target)["degraded"]
    assert any("/dev/spare0" in text for text in describe_target(target)["warnings"])
    for sector in range(SECTORS):
        if sector // CHUNK in (5, 6, 24):
            assert scene.read(sector) is None, "never main's old content"
        else:
            assert scene.read(sector) in scene.app.allowed(sector, power_cut=False)
    scene.spoil(83)
    assert scene.remap((80, 8)).chunks[0].spare == 1
    assert scene.read(80) is not None
    # What it has missed is written when it is back.
    scene.spares[0].dead = False
    assert kinds(scene.plan()) == ["repair_metadata"]
    scene.create()
    check(scene)


@pytest.mark.parametrize("how", ["dead", "gone"])
def test_a_lost_spare_is_given_up_honestly(tmp_path: Path, how: str) -> None:
    scene = with_chunks(tmp_path)
    entry = target_of(scene).metadata.config["spares"][0]
    scene.spares[0].dead = True
    name = "/dev/spare0"
    if how == "gone":
        unplug(scene, scene.spares[0])
        name = entry["uuid"]
    with pytest.raises(Refused, match=r"3 chunks \(sectors 40\+16, 192\+5\) are on it only"):
        plan(scene, name, False)
    made = plan(scene, name, False, discard_remaps=True)
    assert made.actions[0].details["lost"] == [
        {"start": 40, "count": 16},
        {"start": 192, "count": 5},
    ]
    moved = scene.engine().apply(made)
    assert sum(count for chunk in moved for _start, count in chunk.lost) == 20
    assert [chunk.lost_before for chunk in moved] == [[(41, 1)], [], []]
    target = target_of(scene)
    assert target.lost_spares == ()
    assert sum(item.count for item in target.metadata.lost) == 21
    assert {place(scene, chunk)[0] for chunk in (5, 6, 24)} == {1}
    for chunk in (5, 6, 24):
        for sector in range(8 * chunk, min(8 * chunk + 8, SECTORS)):
            scene.app.versions[sector] = [None]
            scene.app.acknowledged.pop(sector, None)
    scene = replace(scene, request=replace(scene.request, spares=("/dev/spare1",)))
    check(scene)
    scene.app.write(scene.kernel, 42)
    assert scene.read(42) == scene.app.versions[42][-1]


def unplug(scene: Scene, disk: Disk) -> None:
    """Take a disk out of the machine; what stands on it stays and gives errors."""
    disk.dead = True
    del scene.kernel.disks[disk.path]
    disk.path = ""
    scene.kernel.disks[""] = disk


def test_a_lost_spare_without_chunks_needs_no_permission(tmp_path: Path) -> None:
    scene = with_chunks(tmp_path)
    scene.spares[1].dead = True
    made = plan(scene, "/dev/spare1", False)
    assert kinds(made) == ["remove_spare", "deactivate_spare"]
    scene.engine().apply(made)
    check(scene)


def test_a_target_with_a_lost_spare_can_be_removed(tmp_path: Path) -> None:
    scene = with_chunks(tmp_path)
    scene.spares[1].dead = True
    scene.remove()
    assert scene.kernel.mapped == {}


def test_a_newer_generation_on_a_lost_spare_stops_changes(tmp_path: Path) -> None:
    scene = with_chunks(tmp_path)
    before = scene.spares[1].clone()
    scene.remap((80, 1))
    # It dropped the commit, and then the only one that has it goes.
    scene.spares[1].content, scene.spares[1].cache = before.content, []
    scene.spares[0].dead = True
    assert not target_of(scene).certain
    for change in (lambda: scene.remap((120, 1)), lambda: remove(scene, "/dev/spare0")):
        with pytest.raises(Refused, match="a newer one is on spares that cannot be read"):
            change()
    assert scene.read(80) is None


STEPS = ["frozen", "salvaged", "data_flushed", "committed", "thawed"]


@pytest.mark.parametrize("dying", [0, 1, 2])
def test_a_spare_that_dies_at_any_call_of_a_replacement(tmp_path: Path, dying: int) -> None:
    """The target never hangs or lies while it is away, and all is right when it is back."""
    scene = with_chunks(tmp_path)
    calls: list[str] = []
    process = Process(scene.kernel, calls.append)
    exchange(scene, "/dev/spare0", scene.engine(process))
    paths = ["/dev/spare0", "/dev/spare1", NEW]
    for number in range(0, len(calls), 2):
        scene = with_chunks(tmp_path)
        why = f"{number}: {calls[number]}, {paths[dying]}"
        disk = scene.kernel.disks[paths[dying]]

        def die(name: str, disk: Disk = disk) -> None:
            disk.dead = True

        process = Process(scene.kernel, numbered(number, die))
        with contextlib.suppress(DmRemapError):
            exchange(scene, "/dev/spare0", scene.engine(process))
        for device in scene.kernel.mapped.values():
            assert not device.suspended, why
        target = target_of(scene)
        lost = {
            chunk
            for spare in target.lost_spares
            for chunk in chunks_on(target.metadata, spare.index)
        }
        for sector in range(SECTORS):
            value = scene.read(sector)
            allowed = scene.app.allowed(sector, power_cut=False)
            assert value in allowed or (value is None and sector // CHUNK in (5, 6, 24)), why
            assert value in allowed or sector // CHUNK in lost or target.frozen, why
        disk.dead = False
        scene.engine().apply(plan_upkeep(target_of(scene)))
        check(scene, why=why)


@pytest.mark.parametrize("fault", ["dead", "unwritable", "unflushable"])
@pytest.mark.parametrize("dying", [0, 1])
def test_a_spare_that_fails_in_a_commit_does_not_stop_the_target(
    tmp_path: Path, dying: int, fault: str
) -> None:
    scene = make_scene(tmp_path, spares=2)
    scene.create()
    disk = scene.spares[dying]

    def step(name: str) -> None:
        if name == "data_flushed":
            disk.dead = fault == "dead"
            disk.unwritable = set(range(16384)) if fault == "unwritable" else set()
            disk.flush_fails = fault == "unflushable"
            if fault == "unwritable":
                disk.unwritable = set(range(disk.sectors))

    report = scene.remap((40, 1), engine=scene.engine(step=step))
    # The data goes where the commit went.
    assert report.chunks[0].spare == 1 - dying
    assert len(report.plan.warnings) == 1
    scene.check_blocks()
    assert scene.remap((80, 1)).chunks[0].spare == 1 - dying
    scene.check_blocks()
    disk.dead, disk.flush_fails, disk.unwritable = False, False, set()
    scene.create()
    scene.check()


def test_one_engine_goes_on_without_a_spare_that_was_left_out(tmp_path: Path) -> None:
    """As the reflex does, which does not look at the spares again for each move."""
    scene = make_scene(tmp_path, spares=2)
    scene.create()
    broken = scene.spares[1]
    engine = scene.engine()
    target = engine.require(NAME)
    with engine.opened(target) as disks:
        broken.unwritable = set(range(16384)) | set(range(20000, broken.sectors))
        for chunk in (5, 10, 12):
            moved = at_once(engine.moving(target, disks, [chunk], Patience()))
            assert list(moved.left_out) == ([1] if broken.unwritable else [])
            choice = replace(target.choice, metadata=moved.metadata)
            target = replace(target, choice=choice, table=())
            if chunk == 10:
                broken.unwritable = set()
    assert target_of(scene).choice.stale == frozenset()
    scene.check()


# Many at once


def test_a_thousand_ranges_are_one_freeze_one_commit_one_swap(tmp_path: Path) -> None:
    sectors = 24_000 * CHUNK
    scene = make_scene(tmp_path, sectors=sectors)
    scene.spares[0].sectors = minimum_spare_sectors(CHUNK, 1) + 40_000 * CHUNK
    scene.create()
    commit_places(scene, range(0, 20_000, 2))
    assert len(target_of(scene).metadata.extents) == 10_000
    ranges = [((2 * number + 1) * CHUNK, 1) for number in range(1000)]
    for verb in ("remap", "return_to_main"):
        calls: list[str] = []
        steps: list[str] = []
        engine = scene.engine(Process(scene.kernel, calls.append), steps.append)
        report = getattr(engine, verb)(NAME, ranges)
        assert sum(chunk.moved for chunk in report.chunks) == 1000
        assert calls.count(f"swap {NAME}") == 2, "one to freeze, one to thaw"
        once = [steps.count(name) for name in ("frozen", "committed", "swapped", "parked")]
        assert once == [1, 1, 1, 1]
        # Once the data, by turns where it is tested, and twice the copies of the metadata.
        assert sum(call.startswith("flush") for call in calls) <= 4
    assert len(target_of(scene).metadata.extents) == 10_000
