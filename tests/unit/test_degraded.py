# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Targets without some of their spares: activation, return and restoration, and every crash.

Each sector must read its right data or an error. What main has under remapped chunks is old, and
is what must never be read.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from dm_remap import copies
from dm_remap.backups import Backups
from dm_remap.copies import SplitBrain
from dm_remap.engine import Engine
from dm_remap.errors import DmRemapError, Refused
from dm_remap.fingerprint import of_entry
from dm_remap.format import MAX_HISTORY, Extent, geometry_of, minimum_spare_sectors, slot_sectors_of
from dm_remap.plan import Plan
from dm_remap.plan_removal import plan_absent
from dm_remap.plan_restore import RestoreRequest, plan_restore
from dm_remap.plan_spares import SpareRequest, plan_spare_present
from dm_remap.plan_upkeep import plan_upkeep
from dm_remap.planner import plan_present
from dm_remap.report import describe_target
from dm_remap.target import ActiveTarget, with_notes
from tests.parameters import short_form
from tests.unit.fake_kernel import SECTOR, Process
from tests.unit.test_engine import (
    CHUNK,
    NAME,
    SECTORS,
    Scene,
    create_held,
    make_scene,
    survivals,
)

# Two chunks on each of three spares; the last chunk of the target is short.
REMAPPED = (2, 5, 8, 11, 14, 24)
STALE = b"\xee" * SECTOR
MISSING = [c for size in (1, 2) for c in itertools.combinations(range(3), size)]
POLICIES = ["fail", "hold"]


def make_target(folder: Path, on_error: str = "fail", spares: int = 3) -> Scene:
    """An active target with chunks on each spare, a lost sector, and old data on main below."""
    scene = make_scene(folder, spares, on_error=on_error)
    scene.request = replace(scene.request, allocation="balanced")
    create_held(scene)
    scene.spoil(41)
    for chunk in REMAPPED:
        scene.remap((chunk * CHUNK, 1))
    scene.main.bad.clear()
    scene.main.stable_bad.clear()
    for chunk in REMAPPED:
        scene.app.write(scene.kernel, chunk * CHUNK + 2)
        sectors = range(chunk * CHUNK, min((chunk + 1) * CHUNK, SECTORS))
        scene.main.fill(chunk * CHUNK, STALE * len(sectors))
    scene.app.flush(scene.kernel)
    return scene


def stopped(folder: Path, on_error: str = "fail", spares: int = 3) -> Scene:
    """The same target after a restart of the host."""
    scene = make_target(folder, on_error, spares)
    scene.kernel.cut_power(scene.kernel.volatile())
    return scene


def having(scene: Scene, indexes: Collection[int], degraded: bool = True) -> Scene:
    """The scene with a request for only these spares."""
    paths = tuple(f"/dev/spare{index}" for index in sorted(indexes))
    return replace(scene, request=replace(scene.request, spares=paths, degraded=degraded))


def rest(missing: Collection[int], spares: int = 3) -> list[int]:
    return [index for index in range(spares) if index not in missing]


def activate(scene: Scene, engine: Engine | None = None) -> list[str]:
    used = engine or scene.engine()
    with used.healing():
        return scene.create(used)


def target_of(scene: Scene) -> ActiveTarget:
    return scene.engine().require(NAME)


def kinds(plan: Plan) -> list[str]:
    return [action.kind for action in plan.actions]


def chunks_of(scene: Scene) -> dict[int, int]:
    """Remapped chunks with the spare that each is on."""
    extents = target_of(scene).metadata.extents
    return {e.logical + n: e.spare for e in extents for n in range(e.length)}


def check(scene: Scene, on: dict[int, int], missing: Collection[int], why: object = "") -> None:
    """Every sector reads its data, or an error if its spare is missing; and all is settled."""
    scene.app.settle(scene.kernel)
    for sector in range(SECTORS):
        value = scene.read(sector)
        if on.get(sector // CHUNK) in missing:
            assert value is None, (sector, why)
        else:
            assert value in scene.app.allowed(sector, power_cut=False), (sector, why)
    target = target_of(scene)
    assert {spare.index for spare in target.lost_spares} == set(missing), why
    assert target.certain, why
    assert target.path is None or target.cut == target.unavailable, why
    for device in scene.kernel.mapped.values():
        assert not device.suspended, why
        assert not device.inactive, why
    assert kinds(scene.plan()) == [], why


# Activation


@pytest.mark.parametrize("on_error", POLICIES)
@pytest.mark.parametrize("missing", MISSING)
def test_every_subset_of_missing_spares(
    tmp_path: Path, missing: tuple[int, ...], on_error: str
) -> None:
    scene = make_target(tmp_path, on_error)
    on, entries = chunks_of(scene), target_of(scene).metadata.config["spares"]
    assert sorted(on.values()) == [0, 0, 1, 1, 2, 2]
    scene.kernel.cut_power(scene.kernel.volatile())
    calls: list[str] = []
    with pytest.raises(Refused) as caught:
        having(scene, rest(missing), degraded=False).create(
            scene.engine(Process(scene.kernel, calls.append))
        )
    assert calls == []
    assert caught.value.device == NAME
    assert "degraded: true" in str(caught.value)
    for index in range(3):
        named = f"spare {index} (Fake, serial serial-spare{index}, {entries[index]['uuid']}) with 2"
        assert (named in str(caught.value)) == (index in missing)
    scene = having(scene, rest(missing))
    main = dict(scene.main.content)
    plan = scene.plan()
    assert kinds(plan) == ["activate_spare"] * (3 - len(missing)) + [
        "note_missing",
        "create_target",
    ]
    assert len([text for text in plan.warnings if "chunks that were remapped then" in text]) == len(
        missing
    )
    activate(scene)
    assert plan.after["generation"] == target_of(scene).metadata.generation
    check(scene, on, missing)
    found = describe_target(target_of(scene))
    assert [(s["index"], s["chunks"]) for s in found["lost_spares"]] == [(i, 2) for i in missing]
    assert found["degraded"]
    # The rest of the core goes on as with any lost spare.
    scene.spoil(120)
    assert scene.remap((120, 1)).chunks[0].spare in rest(missing)
    check(scene, {**on, 15: rest(missing)[0]}, missing)
    # What is written to a chunk of a missing spare fails, and nothing of it goes to main.
    for chunk in on:
        scene.app.write(scene.kernel, chunk * CHUNK + 3)
        if scene.engine().require(NAME).path:
            scene.engine().release(target_of(scene))
        if on[chunk] in missing:
            scene.app.versions[chunk * CHUNK + 3].pop()
            scene.app.waiting.clear()
    check(scene, on, missing)
    assert scene.main.content == main


@pytest.mark.parametrize("on_error", POLICIES)
def test_a_missing_spare_is_given_up_or_replaced_as_any_lost_one(
    tmp_path: Path, on_error: str
) -> None:
    scene = having(stopped(tmp_path, on_error), [0, 2])
    scene.kernel.add_disk("new", minimum_spare_sectors(CHUNK, 1) + 8192)
    activate(scene)
    on = chunks_of(scene)
    gone = target_of(scene).metadata.config["spares"][1]["uuid"]
    engine = scene.engine()
    seen = engine.see_spare(NAME, "/dev/new", gone, add=True)
    with pytest.raises(Refused, match="2 chunks .* are on it only"):
        plan_spare_present(SpareRequest(NAME, "/dev/new", gone), seen)
    request = SpareRequest(NAME, "/dev/new", gone, discard_remaps=True)
    moved = engine.apply(plan_spare_present(request, seen))
    assert {chunk.chunk for chunk in moved} == {chunk for chunk in on if on[chunk] == 1}
    for chunk in moved:
        for sector in range(chunk.start, chunk.start + chunk.count):
            scene.app.versions[sector] = [None]
            scene.app.acknowledged.pop(sector, None)
    paths = ("/dev/spare0", "/dev/new", "/dev/spare2")
    scene = replace(scene, request=replace(scene.request, spares=paths))
    check(scene, {}, ())
    # The one that was given up cannot come back as what it was.
    seen = engine.see_spare(NAME, "/dev/spare1", None, add=True)
    with pytest.raises(Refused, match="is not empty"):
        plan_spare_present(SpareRequest(NAME, "/dev/spare1"), seen)


def test_paths_that_do_not_exist_are_missing_spares(tmp_path: Path) -> None:
    scene = stopped(tmp_path)
    scene.request = replace(scene.request, degraded=True)
    scene.spares[1].dead = True
    gone = scene.kernel.disks.pop("/dev/spare2")
    seen = scene.engine().see(NAME, scene.request.main, scene.request.spares, degraded=True)
    assert seen.absent == ("/dev/spare1", "/dev/spare2")
    scene.engine().apply(plan_present(scene.request, seen))
    assert [lost.index for lost in target_of(scene).lost_spares] == [1, 2]
    seen = scene.engine().see(NAME, scene.request.main, scene.request.spares, degraded=True)
    assert kinds(plan_present(scene.request, seen)) == []
    scene.kernel.disks["/dev/spare2"] = gone
    # Without any spare that can be read, no target is made.
    fresh = make_scene(tmp_path / "fresh")
    request = replace(fresh.request, spares=("/dev/none",), degraded=True)
    seen = fresh.engine().see(NAME, request.main, request.spares, degraded=True)
    with pytest.raises(Refused, match="no other spare carries"):
        plan_present(request, seen)


# Whether a missing spare has a newer generation


def ahead(folder: Path, newest: int = 1) -> Scene:
    """A stopped target of two spares: only one took part in the last remap, of chunk 20."""
    scene = make_target(folder, spares=2)
    other = scene.spares[1 - newest]
    other.dead = True
    scene.remap((20 * CHUNK, 1))
    other.dead = False
    scene.app.write(scene.kernel, 20 * CHUNK)
    scene.app.flush(scene.kernel)
    scene.main.fill(20 * CHUNK, STALE * CHUNK)
    scene.kernel.cut_power(scene.kernel.volatile())
    return scene


@pytest.mark.parametrize("newest", [0, 1])
def test_the_hosts_backup_tells_that_a_missing_spare_was_written_last(
    tmp_path: Path, newest: int
) -> None:
    scene = ahead(tmp_path, newest)
    without = having(scene, [1 - newest])
    with pytest.raises(Refused, match="this host committed generation 8") as caught:
        without.plan()
    assert f"serial-spare{newest}" in str(caught.value)
    # With it, all is right.
    activate(having(scene, [newest]))
    assert scene.read(20 * CHUNK) == scene.app.versions[20 * CHUNK][-1]


def test_a_backup_of_another_history_stops_an_activation_without_all_spares(tmp_path: Path) -> None:
    scene = stopped(tmp_path)
    metadata = engine_metadata(scene, "/dev/spare0")
    Backups(str(tmp_path / "backup")).keep(replace(metadata, timestamp_ns=1))
    with pytest.raises(Refused, match="does not precede it"):
        having(scene, [0, 1]).plan()
    plan = having(scene, [0, 1, 2]).plan()
    assert any("were used elsewhere" in text for text in plan.warnings)


def engine_metadata(scene: Scene, path: str) -> copies.Metadata:
    with Process(scene.kernel).blocks.BlockDevice(path) as device:
        return copies.choose({path: copies.survey(device)}).metadata


@pytest.mark.parametrize("commits", [0, 1, MAX_HISTORY + 3])
def test_a_newer_generation_on_a_missing_spare_is_a_split_brain_when_it_is_back(
    tmp_path: Path, commits: int
) -> None:
    """On another host, which has no backup; also if nothing was committed since."""
    scene = replace(ahead(tmp_path), folder=tmp_path / "other host")
    activate(having(scene, [0]))
    # By its generation the chunk is on main; that is what the user was warned of.
    assert scene.read(20 * CHUNK) == STALE
    commit_often(scene, commits)
    with pytest.raises(SplitBrain, match="spare0.*spare1|spare1.*spare0"):
        having(scene, [0, 1]).plan()
    scene.kernel.cut_power(scene.kernel.volatile())
    with pytest.raises(SplitBrain):
        having(scene, [0, 1]).plan()


def commit_often(scene: Scene, commits: int) -> None:
    engine = scene.engine()
    target = engine.require(NAME)
    metadata = target.metadata
    with engine.opened(target) as disks:
        for number in range(commits):
            new = metadata.successor(number + 1)
            copies.commit(disks.members, metadata, new)
            metadata = new


@pytest.mark.parametrize("commits", [0, 1, MAX_HISTORY + 3])
def test_a_spare_that_was_away_for_long_is_known_again(tmp_path: Path, commits: int) -> None:
    scene = stopped(tmp_path)
    activate(having(scene, [0, 1]))
    on = chunks_of(scene)
    commit_often(scene, commits)
    back = having(scene, [0, 1, 2])
    plan = back.plan()
    assert kinds(plan) == ["return_spare"]
    assert not [text for text in plan.warnings if "too old" in text]
    back.engine().apply(plan)
    check(back, on, ())
    assert not any("last_common" in e for e in target_of(scene).metadata.config["spares"])


def test_a_second_activation_without_the_same_spare_commits_nothing(tmp_path: Path) -> None:
    scene = stopped(tmp_path)
    for expected in (["note_missing"], []):
        kinds_now = activate(having(scene, [0, 1]))
        assert [kind for kind in kinds_now if kind == "note_missing"] == expected
        scene.app.flush(scene.kernel)
        scene.kernel.cut_power(scene.kernel.volatile())
    # With all of them there is nothing to be noted any more.
    assert "note_missing" in activate(having(scene, [0, 1, 2], degraded=False))
    assert scene.plan().actions == ()
    scene.kernel.cut_power(scene.kernel.volatile())
    assert "note_missing" in activate(having(scene, [0, 1]))


# Return


@pytest.mark.parametrize("on_error", POLICIES)
@pytest.mark.parametrize("missing", MISSING)
def test_spares_return_one_by_one_to_an_active_target(
    tmp_path: Path, missing: tuple[int, ...], on_error: str
) -> None:
    for order in itertools.permutations(missing):
        folder = tmp_path / "-".join(map(str, order))
        scene = stopped(folder, on_error)
        activate(having(scene, rest(missing)))
        scene.spoil(121)
        scene.remap((120, 1))
        on = chunks_of(scene)
        away = list(missing)
        for index in order:
            away.remove(index)
            scene = having(scene, rest(away))
            plan = scene.plan()
            assert kinds(plan) == ["return_spare"]
            scene.engine().apply(plan)
            assert plan.after["generation"] == target_of(scene).metadata.generation
            check(scene, on, away, (order, index))
        scene.kernel.cut_power(scene.kernel.volatile())
        assert activate(having(scene, rest(()), degraded=False)).count("activate_spare") == 3
        check(scene, on, ())


def test_several_spares_return_at_once_and_by_the_spare_module(tmp_path: Path) -> None:
    scene = stopped(tmp_path, "hold")
    activate(having(scene, [1]))
    on = chunks_of(scene)
    engine = scene.engine()
    request = SpareRequest(NAME, "/dev/spare2")
    plan = plan_spare_present(request, engine.see_spare(NAME, "/dev/spare2", None, add=True))
    assert kinds(plan) == ["return_spare"]
    engine.apply(plan)
    check(having(scene, [1, 2]), on, [0])
    scene.kernel.cut_power(scene.kernel.volatile())
    activate(having(scene, [1]))
    back = having(scene, [0, 1, 2])
    plan = back.plan()
    assert kinds(plan) == ["return_spare"] * 2
    back.engine().apply(plan)
    assert plan.after["generation"] == target_of(scene).metadata.generation
    check(back, on, ())


def test_a_spare_returns_while_another_goes(tmp_path: Path) -> None:
    """The one that goes moves its chunks to the one that is back."""
    scene = stopped(tmp_path)
    activate(having(scene, [0, 1]))
    back = having(scene, [0, 2])
    plan = back.plan()
    assert kinds(plan)[:2] == ["return_spare", "drain_spare"]
    back.engine().apply(plan)
    assert plan.after["generation"] == target_of(scene).metadata.generation
    check(back, chunks_of(scene), ())


def test_what_cannot_return_is_refused(tmp_path: Path) -> None:
    scene = stopped(tmp_path)
    activate(having(scene, [0, 1]))
    back = having(scene, [0, 1, 2])
    disk = scene.kernel.disks["/dev/spare2"]
    disk.serial = "another"
    with pytest.raises(Refused, match="a clone of it will not do"):
        back.plan()
    disk.serial = "serial-spare2"
    disk.mounted = "/srv"
    with pytest.raises(Refused, match="is in use"):
        back.plan()
    disk.mounted = ""
    clone = disk.clone()
    clone.path, clone.devno = "/dev/clone", "8:240"
    scene.kernel.disks["/dev/clone"] = clone
    both = replace(
        scene, request=replace(back.request, spares=(*back.request.spares, "/dev/clone"))
    )
    with pytest.raises(Refused, match="one is a clone"):
        both.plan()
    del scene.kernel.disks["/dev/clone"]
    # A place that fails is found before anything uses the spare. The journal would heal it.
    scene.kernel.journals.clear()
    geometry = geometry_of(target_of(scene).metadata, 2)
    disk.spoil(range(geometry.data_start, geometry.data_start + 64))
    with pytest.raises(DmRemapError, match="gives errors for all of its chunks"):
        back.create()
    check(having(scene, [0, 1]), chunks_of(scene), [2])


@pytest.mark.parametrize("on_error", POLICIES)
def test_a_spare_that_was_pulled_returns_after_a_flush_has_failed(
    tmp_path: Path, on_error: str
) -> None:
    """It may have lost what it had acknowledged, and somebody must be told."""
    scene = make_target(tmp_path, on_error)
    on = chunks_of(scene)
    disk = scene.kernel.disks.pop("/dev/spare1")
    pulled = disk.clone()
    disk.dead, disk.path = True, ""
    scene.kernel.disks[""] = disk
    pulled.devno = "8:240"
    scene.kernel.disks["/dev/spare1"] = pulled
    engine = scene.engine()
    if on_error == "hold":
        engine.apply(plan_upkeep(target_of(scene)))
    plan = scene.plan()
    assert kinds(plan) == []
    assert any("a flush must fail first" in text for text in plan.warnings)
    if on_error == "fail":
        return
    number = scene.kernel.submit_flush(NAME)
    engine.cut_off(target_of(scene))
    assert number in scene.kernel.failed
    assert kinds(scene.plan()) == ["return_spare"]
    scene.create()
    check(scene, on, ())


def test_the_reflex_sees_that_a_spare_has_returned(tmp_path: Path) -> None:
    scene = stopped(tmp_path, "hold")
    activate(having(scene, [0, 1]))
    engine = scene.engine()
    target = engine.require(NAME)
    with engine.opened(target) as disks:
        assert engine.is_current(target, disks)
        having(scene, [0, 1, 2]).create()
        assert not engine.is_current(target, disks)


# Crashes


@dataclass
class Crash:
    """A host at a moment, with the backups that it had then."""

    label: str
    scene: Scene


def crashes_of(scene: Scene, command: Callable[[Engine], object]) -> list[Crash]:
    """The host before each change and after each step of a command."""
    found: list[Crash] = []

    def remember(label: str) -> None:
        name = f"crash {len(found)}"
        found.append(Crash(f"{name}: {label}", copy_of(scene, scene.folder / name)))

    process = Process(scene.kernel, lambda call: remember(f"before {call}"))
    command(scene.engine(process, lambda name: remember(f"after {name}")))
    remember("the end")
    return found


def copy_of(scene: Scene, folder: Path) -> Scene:
    """The same host a moment later, with its backups in another folder."""
    backup = scene.folder / "backup"
    if backup.exists():
        shutil.copytree(backup, folder / "backup")
    return replace(scene.at(scene.kernel.clone(), scene.app.clone()), folder=folder)


def power_cuts(crash: Crash, most: int = 3) -> Iterator[Scene]:
    """What a power cut at that moment may leave."""
    volatile = crash.scene.kernel.volatile()
    for survivors in itertools.islice(survivals(volatile, crash.label), most):
        left = copy_of(crash.scene, Path(tempfile.mkdtemp(dir=crash.scene.folder.parent)))
        left.kernel.cut_power(survivors)
        yield left


# Which spares are missing, and what an I/O error does.
CRASHES = short_form(
    itertools.product([(1,), (0, 2)], POLICIES), always=[((1,), "hold"), ((0, 2), "fail")]
)


@pytest.mark.parametrize(("missing", "on_error"), CRASHES)
def test_a_crash_anywhere_in_an_activation_without_spares(
    tmp_path: Path, missing: tuple[int, ...], on_error: str
) -> None:
    scene = make_target(tmp_path, on_error)
    on = chunks_of(scene)
    scene.kernel.cut_power(scene.kernel.volatile())
    degraded = having(scene, rest(missing))
    found = crashes_of(degraded, lambda engine: activate(degraded, engine))
    assert len(found) > 30
    for crash in found:
        killed = copy_of(crash.scene, crash.scene.folder / "killed")
        for left in (killed, *power_cuts(crash)):
            activate(left)
            check(left, on, missing, crash.label)
        # All of them are there after the crash.
        for left in power_cuts(crash, 1):
            whole = having(left, rest(()), degraded=False)
            activate(whole)
            check(whole, on, (), crash.label)


@pytest.mark.parametrize(("missing", "on_error"), CRASHES)
def test_a_crash_anywhere_in_a_return(
    tmp_path: Path, missing: tuple[int, ...], on_error: str
) -> None:
    scene = stopped(tmp_path, on_error)
    activate(having(scene, rest(missing)))
    on = chunks_of(scene)
    back, away = having(scene, rest(missing[1:])), missing[1:]
    found = crashes_of(back, back.create)
    assert len(found) > 15
    for crash in found:
        killed = crash.scene
        # What is there before anybody does anything about it.
        for sector in range(SECTORS):
            spare = on.get(sector // CHUNK)
            allowed = killed.app.allowed(sector, power_cut=False)
            value = killed.read(sector)
            assert value in allowed or (value is None and spare in missing), crash.label
        for left in power_cuts(crash):
            activate(left)
            check(left, on, away, crash.label)
        killed.engine().apply(plan_upkeep(target_of(killed)))
        assert target_of(killed).certain, crash.label
        killed.create()
        check(killed, on, away, crash.label)


@pytest.mark.parametrize("on_error", POLICIES)
def test_a_crash_anywhere_in_a_remap_beside_a_missing_spare(tmp_path: Path, on_error: str) -> None:
    scene = having(stopped(tmp_path, on_error), [0, 2])
    activate(scene)
    on = chunks_of(scene)
    scene.spoil(121)
    found = crashes_of(scene, lambda engine: scene.remap((120, 1), engine=engine))
    assert len(found) > 10
    for crash in found:
        killed = copy_of(crash.scene, crash.scene.folder / "killed")
        killed.remap((120, 1))
        now = chunks_of(killed)
        assert now.pop(120 // CHUNK) in (0, 2), crash.label
        assert now == on, crash.label
        check(killed, now, (1,), crash.label)


def test_what_a_missing_spare_may_know_of_an_interrupted_remap_never_counts_later(
    tmp_path: Path,
) -> None:
    """It took a commit that brought it back and the next one, and nobody else took either."""
    scene = having(stopped(tmp_path), [0, 2])
    activate(scene)
    known = target_of(scene).metadata
    frozen = next(
        crash.scene
        for crash in crashes_of(scene, lambda engine: scene.remap((120, 1), engine=engine))
        if target_of(crash.scene).frozen
    )
    config = with_notes(known, ()).config
    back = known.successor(known.timestamp_ns + 1, config=config)
    place = max(e.physical + e.length for e in known.extents if e.spare == 1)
    extents = (*back.extents, Extent(120 // CHUNK, 1, 1, place))
    ahead = back.successor(known.timestamp_ns + 2, extents=extents)
    with Process(frozen.kernel).blocks.BlockDevice("/dev/spare1", writable=True) as device:
        copies.commit({1: device}, None, back, stale={1})
        copies.commit({1: device}, back, ahead)
    frozen.engine().apply(plan_upkeep(target_of(frozen)))
    frozen.app.write(frozen.kernel, 121)
    frozen.app.flush(frozen.kernel)
    frozen.kernel.cut_power(frozen.kernel.volatile())
    with pytest.raises(SplitBrain):
        having(frozen, rest(()), degraded=False).plan()
    activate(frozen)
    check(frozen, chunks_of(scene), (1,))


# Restoration


def spoil_metadata(scene: Scene, indexes: Collection[int]) -> None:
    """Overwrite all seven slots, and nothing else."""
    for index in indexes:
        disk = scene.kernel.disks[f"/dev/spare{index}"]
        for sector in slot_sectors_of(disk.sectors):
            disk.fill(sector, b"\xaa" * 1024 * SECTOR)


def restore(
    scene: Scene, spares: Sequence[str], engine: Engine | None = None, degraded: bool = True
) -> Plan:
    used = engine or scene.engine()
    request = RestoreRequest(NAME, scene.request.main, tuple(spares), degraded)
    plan = plan_restore(request, used.see_restore(request, used.backup_of(NAME)))
    used.apply(plan)
    return plan


def paths_of(indexes: Collection[int]) -> list[str]:
    return [f"/dev/spare{index}" for index in indexes]


@pytest.mark.parametrize("on_error", POLICIES)
@pytest.mark.parametrize("missing", [(), *MISSING])
def test_metadata_is_restored_to_the_spares_that_had_it(
    tmp_path: Path, missing: tuple[int, ...], on_error: str
) -> None:
    scene = make_target(tmp_path, on_error)
    on = chunks_of(scene)
    scene.kernel.cut_power(scene.kernel.volatile())
    spoil_metadata(scene, range(3))
    left = having(scene, rest(missing))
    with pytest.raises(Refused, match="by this host's backup, with 6 remapped chunks"):
        left.plan()
    if missing:
        with pytest.raises(Refused, match=f"without spare {missing[0]}.*with 2 remapped chunks"):
            restore(scene, paths_of(rest(missing)), degraded=False)
    calls: list[str] = []
    plan = restore(
        scene, paths_of(rest(missing)), scene.engine(Process(scene.kernel, calls.append))
    )
    assert kinds(plan) == ["restore_metadata"]
    assert not [call for call in calls if call.startswith(("zero", "create"))]
    assert [text for text in plan.warnings if "have main's older data" in text]
    activate(left)
    check(left, on, missing)
    for index in missing:
        # It is not made a new spare, which would erase what is on it.
        with pytest.raises(Refused, match="its metadata was overwritten"):
            having(scene, [*rest(missing), index]).plan()
    scene.kernel.cut_power(scene.kernel.volatile())
    restore(scene, paths_of(range(3)))
    whole = having(scene, rest(()), degraded=False)
    activate(whole)
    check(whole, on, ())


@pytest.mark.parametrize("on_error", POLICIES)
def test_all_spares_are_lost_and_a_new_one_carries_the_metadata(
    tmp_path: Path, on_error: str
) -> None:
    """The chunks of the lost ones stay theirs, and are there when these come back."""
    scene = make_target(tmp_path, on_error)
    on = chunks_of(scene)
    scene.kernel.cut_power(scene.kernel.volatile())
    away = [scene.kernel.disks.pop(path) for path in paths_of(range(3))]
    scene.kernel.add_disk("new", minimum_spare_sectors(CHUNK, 1) + 8192).devno = "8:240"
    engine = scene.engine()
    request = RestoreRequest(NAME, "/dev/main", ("/dev/new",), True)
    seen = engine.see_restore(request, engine.backup_of(NAME))
    (one,) = seen.candidates
    volume = replace(seen, candidates=(replace(one, info=replace(one.info, volume="LVM-1")),))
    planned = plan_restore(request, volume).metadata
    assert planned
    assert of_entry(planned.config["spares"][3]).volume == "LVM-1"
    plan = restore(scene, ["/dev/new"])
    assert kinds(plan) == ["format_spare", "restore_metadata"]
    new = replace(scene, request=replace(scene.request, spares=("/dev/new",), degraded=True))
    activate(new)
    check(new, on, (0, 1, 2))
    assert target_of(new).spares[0].index == 3
    for disk in away:
        scene.kernel.disks[disk.path] = disk
    whole = replace(new, request=replace(new.request, spares=(*paths_of(range(3)), "/dev/new")))
    assert kinds(whole.plan()) == ["return_spare"] * 3
    whole.create()
    check(whole, on, ())


def test_what_must_not_be_overwritten_by_a_backup_is_refused(tmp_path: Path) -> None:
    scene = stopped(tmp_path)
    spoil_metadata(scene, [0, 1])

    def refused(match: str, *spares: str) -> None:
        calls: list[str] = []
        with pytest.raises(DmRemapError, match=match):
            restore(scene, spares, scene.engine(Process(scene.kernel, calls.append)))
        assert calls == []

    engine = scene.engine()
    newest = engine.backup_of(NAME)
    backups = Backups(str(tmp_path / "backup"))
    # The device has a newer generation than the backup.
    request = RestoreRequest(NAME, "/dev/main", ("/dev/spare2",), True)
    older = engine.backup_of(NAME, newest.generation - 1)
    with pytest.raises(Refused, match="carries generation 7, newer than the backup's 6"):
        plan_restore(request, engine.see_restore(request, older))
    # Even if only headers tell of it.
    disk = scene.kernel.disks["/dev/spare2"]
    before = disk.clone()
    for sector in slot_sectors_of(disk.sectors):
        disk.fill(sector + 8, bytes(4096))
    with pytest.raises(Refused, match="carries generation 7, newer than the backup's 6"):
        plan_restore(request, engine.see_restore(request, older))
    disk.content, disk.stable = dict(before.content), dict(before.stable)
    with pytest.raises(Refused, match="does not descend from"):
        plan_restore(request, engine.see_restore(request, replace(newest, timestamp_ns=1)))
    # The device is another one.
    scene.kernel.disks["/dev/spare0"].sectors += 8
    refused("but not its size and model", "/dev/spare0")
    scene.kernel.disks["/dev/spare0"].sectors -= 8
    # It is in use.
    scene.kernel.disks["/dev/spare0"].mounted = "/srv"
    refused("is in use", "/dev/spare0")
    scene.kernel.disks["/dev/spare0"].mounted = ""
    # Its tags are gone, so old data could be taken for good.
    tags = geometry_of(newest, 0).tag_start
    superblock = scene.kernel.disks["/dev/spare0"].content[tags]
    scene.kernel.disks["/dev/spare0"].fill(tags, bytes(SECTOR))
    refused("checksum tags were overwritten", "/dev/spare0")
    scene.kernel.disks["/dev/spare0"].fill(tags, superblock)
    # Another target's metadata is on it.
    theirs = stopped(tmp_path / "other").spares[0].clone()
    theirs.path, theirs.devno = "/dev/theirs", "8:240"
    scene.kernel.disks["/dev/theirs"] = theirs
    refused("which is not in the backup", "/dev/theirs")
    # The main is another one.
    scene.main.serial = "another"
    refused("target's main has", "/dev/spare0")
    scene.main.serial = "serial-main"
    # There is no backup, or it is of what was removed on purpose.
    with pytest.raises(Refused, match="no backup of that name"):
        engine.backup_of("other")
    with pytest.raises(Refused, match="no backup of generation 99"):
        engine.backup_of(NAME, 99)
    backups.note_removal(newest.target_uuid)
    refused("was removed from this host on purpose", "/dev/spare0")


def test_an_active_target_is_not_restored(tmp_path: Path) -> None:
    scene = make_target(tmp_path)
    with pytest.raises(Refused, match="is active"):
        restore(scene, ["/dev/spare0"])


@pytest.mark.parametrize("with_new", short_form([False, True], always=[False]))
def test_a_crash_anywhere_in_a_restoration(tmp_path: Path, with_new: bool) -> None:
    scene = make_target(tmp_path)
    on = chunks_of(scene)
    scene.kernel.cut_power(scene.kernel.volatile())
    scene.kernel.add_disk("new", minimum_spare_sectors(CHUNK, 1) + 8192)
    spoil_metadata(scene, [0, 1, 2])
    spares = [*paths_of([0, 1]), *(["/dev/new"] if with_new else [])]
    found = crashes_of(scene, lambda engine: restore(scene, spares, engine))
    assert len(found) > 10
    outcomes = set()
    for crash in found:
        for left in power_cuts(crash, 7):
            marked = [path for path in spares if has_metadata(left, path)]
            kept = left.engine().backup_of(NAME).generation
            if any(engine_metadata(left, path).generation > kept for path in marked):
                # It has been written to one of them, from which all can go on.
                with pytest.raises(Refused, match="newer than the backup"):
                    restore(left, spares)
                outcomes.add("written")
            else:
                restore(left, spares)
                outcomes.add("again")
            marked = [path for path in spares if has_metadata(left, path)]
            assert marked, crash.label
            ready = replace(
                left, request=replace(left.request, spares=tuple(marked), degraded=True)
            )
            activate(ready)
            missing = [i for i in range(3) if f"/dev/spare{i}" not in marked]
            for sector in range(SECTORS):
                value = ready.read(sector)
                gone = on.get(sector // CHUNK) in missing
                allowed = [None] if gone else ready.app.allowed(sector, power_cut=False)
                assert value in allowed, crash.label
    assert outcomes == {"again", "written"}


def has_metadata(scene: Scene, path: str) -> bool:
    with Process(scene.kernel).blocks.BlockDevice(path) as device:
        return bool(copies.survey(device).copies)


# Removal


def found_copies(scene: Scene, path: str) -> tuple[object, ...]:
    with Process(scene.kernel).blocks.BlockDevice(path) as device:
        return copies.survey(device).copies


def absent(scene: Scene, spares: Sequence[str] = (), engine: Engine | None = None) -> Plan:
    used = engine or scene.engine()
    seen = used.see(NAME, None, spares)
    plan = plan_absent(NAME, seen.target, seen, discard_remaps=True)
    used.apply(plan)
    return plan


def test_a_spare_that_was_missing_does_not_bring_a_removed_target_back(tmp_path: Path) -> None:
    scene = stopped(tmp_path)
    degraded = having(scene, [0, 1])
    activate(degraded)
    plan = absent(scene)
    assert any("spare 2" in text and "keeps its metadata" in text for text in plan.warnings)
    late = having(scene, [2])
    with pytest.raises(Refused, match="was removed from this host") as caught:
        late.plan()
    note = Backups(str(tmp_path / "backup")).removal(
        engine_metadata(scene, "/dev/spare2").target_uuid
    )
    assert note in str(caught.value)
    assert not absent(scene, ["/dev/spare2"]).warnings[1:]
    assert found_copies(scene, "/dev/spare2") == ()


def test_a_missing_spare_that_is_named_is_wiped_with_the_others(tmp_path: Path) -> None:
    scene = stopped(tmp_path)
    activate(having(scene, [0, 1]))
    assert absent(scene, ["/dev/spare2"]).warnings == ()
    assert not any(found_copies(scene, path) for path in paths_of(range(3)))


def test_a_removal_wipes_what_can_be_read_of_a_lost_spare(tmp_path: Path) -> None:
    """Its data area fails, its metadata does not."""
    scene = make_target(tmp_path)
    geometry = geometry_of(target_of(scene).metadata, 1)
    scene.spares[1].spoil(range(geometry.data_start, geometry.data_start + geometry.data_sectors))
    assert [lost.index for lost in target_of(scene).lost_spares] == [1]
    assert absent(scene).warnings == ()
    assert not any(found_copies(scene, path) for path in paths_of(range(3)))


def test_a_removal_reaches_far_copies_that_only_other_spares_tell_of(tmp_path: Path) -> None:
    """The near copies are overwritten, and the device has grown since."""
    scene = make_target(tmp_path)
    disk = scene.spares[1]
    size = disk.sectors
    for sector in slot_sectors_of(size)[:5]:
        disk.fill(sector, b"\xaa" * 1024 * SECTOR)
    disk.sectors *= 2
    absent(scene)
    disk.sectors = size
    assert found_copies(scene, "/dev/spare1") == ()


def test_a_crash_anywhere_in_a_removal_leaves_the_newest_generation_or_nothing(
    tmp_path: Path,
) -> None:
    """Also where a spare was left out of the last commits: what it has is never the last to go."""
    scene = make_target(tmp_path, spares=2)
    old = {sector: scene.app.allowed(sector, False) for sector in range(SECTORS)}
    scene.spares[0].dead = True
    scene.remap((20 * CHUNK, 1))
    scene.spares[0].dead = False
    scene.app.flush(scene.kernel)
    newest = target_of(scene).metadata.generation
    assert old
    found = crashes_of(scene, lambda engine: absent(scene, engine=engine))
    for crash in found:
        for left in power_cuts(crash, 5):
            surveys = {}
            for path in scene.request.spares:
                with Process(left.kernel).blocks.BlockDevice(path) as device:
                    surveys[path] = copies.survey(device)
            if any(seen.copies for seen in surveys.values()):
                assert copies.choose(surveys).metadata.generation == newest, crash.label
            absent(left, scene.request.spares)
            assert not any(found_copies(left, path) for path in scene.request.spares), crash.label
