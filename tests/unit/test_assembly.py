# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Assembly of found targets: the disaster drill in small, overrides, and what must stay refused.

What the mains have under remapped chunks is old, and is what must never be read.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import shutil
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args

from dm_remap.assembly import Report, assemble
from dm_remap.blockdev import DeviceInfo
from dm_remap.copies import survey
from dm_remap.discovery import Found, Host
from dm_remap.engine import Engine
from dm_remap.errors import DmRemapError, Refused
from dm_remap.fingerprint import of_info
from dm_remap.format import Metadata, geometry_of, pack_slot, slot_sectors_of, spare_uuid_of
from dm_remap.order import Order, choose
from dm_remap.plan_removal import plan_absent
from dm_remap.planner import plan_present
from dm_remap.replacing import Pace
from dm_remap.request import Request
from dm_remap.salvage import Patience
from plugins.modules import assemble as assemble_module
from plugins.modules import info as info_module
from tests.parameters import short_form
from tests.unit.copy_scene import Disk as MemoryDisk
from tests.unit.drill_scene import (
    CHUNK,
    CHUNKS,
    NEAR,
    SECTORS,
    SPARE_SECTORS,
    TARGETS,
    Drill,
    data_of,
    overwrite,
    zero,
)
from tests.unit.fake_kernel import SECTOR, Disk, Killed, Process

SPARES = [spare for spares, _count in TARGETS.values() for spare in spares]
ALL = dict.fromkeys(TARGETS, "assembled")


@pytest.fixture
def moved(host_a: Drill, tmp_path: Path) -> Drill:
    """The disks of host A at another host."""
    return host_a.elsewhere(tmp_path)


# The disaster drill


@pytest.mark.parametrize("seed", range(4))
def test_all_targets_come_back_from_moved_disks(host_a: Drill, tmp_path: Path, seed: int) -> None:
    moved = host_a.elsewhere(tmp_path, seed)
    mains = {name: dict(moved.disk(f"main-{name}").stable) for name in TARGETS}
    report = moved.assemble()
    assert {t.target.name: t.result for t in report.targets} == ALL
    assert not any(t.repaired for t in report.targets)
    moved.check()
    again = moved.assemble()
    assert {t.target.name: t.result for t in again.targets} == dict.fromkeys(TARGETS, "active")
    assert not again.changed
    assert mains == {name: moved.disk(f"main-{name}").stable for name in TARGETS}


@pytest.mark.parametrize("spare", SPARES)
def test_each_single_spare_missing(moved: Drill, spare: str) -> None:
    moved.without(spare)
    owner = next(name for name, (spares, _n) in TARGETS.items() if spare in spares)
    alone = TARGETS[owner][0] == (spare,)
    others = [name for name in TARGETS if name != owner]
    results = moved.results()
    if alone:
        # Nothing that is left tells of it.
        assert results == dict.fromkeys(others, "assembled")
        moved.check(names=others)
        return
    assert results == {**dict.fromkeys(others, "assembled"), owner: "refused"}
    assert owner not in moved.kernel.mapped
    moved.check(names=others)
    assert moved.results(Order(name=owner, degraded=True)) == {owner: "assembled"}
    moved.check(missing=[spare])


@pytest.mark.parametrize("left", range(5))
def test_four_of_five_near_copies_overwritten(moved: Drill, left: int) -> None:
    gone = [index for index in range(5) if index != left]
    for spare in SPARES:
        overwrite(moved.disk(spare), gone)
    report = moved.assemble()
    assert {t.target.name: t.result for t in report.targets} == ALL
    repaired = {r.path: r for t in report.targets for r in t.repaired}
    assert set(repaired) == {moved.disk(spare).path for spare in SPARES}
    for repair in repaired.values():
        assert [index for index, _why in repair.copies] == gone
        assert repair.whole
    moved.check()


@pytest.mark.parametrize("damage", ["near", "start"])
def test_the_far_copies_carry_it(moved: Drill, damage: str) -> None:
    for spare in SPARES:
        if damage == "near":
            overwrite(moved.disk(spare), range(5))
        else:
            zero(moved.disk(spare), 16384)
    report = moved.assemble()
    assert {t.target.name: t.result for t in report.targets} == ALL
    for target in report.targets:
        for repair in target.repaired:
            assert [index for index, _why in repair.copies] == [0, 1, 2, 3, 4]
            assert {why for _index, why in repair.copies} == {"magic"}
            assert repair.whole
    moved.check()
    # Repaired: another move, and the far copies are not needed.
    assert all(moved.disk(spare).stable[NEAR[0]].startswith(b"DMREMAP4") for spare in SPARES)


@pytest.mark.parametrize("spare", SPARES)
def test_every_copy_of_one_spare_gone_is_as_if_it_were_missing(moved: Drill, spare: str) -> None:
    disk = moved.disk(spare)
    for where in (disk.content, disk.stable):
        for sector in [s for s, data in where.items() if data.startswith(b"DMREMAP4")]:
            del where[sector]
    owner = next(name for name, (spares, _n) in TARGETS.items() if spare in spares)
    results = moved.results(Order(degraded=True))
    if TARGETS[owner][0] == (spare,):
        assert owner not in results
        assert owner not in moved.kernel.mapped
        return
    assert results == ALL
    moved.check(missing=[spare])


def test_a_dry_run_plans_the_same_and_changes_nothing(moved: Drill) -> None:
    overwrite(moved.disk("s0"), [0])
    calls: list[str] = []
    planned = moved.assemble(check=True, process=Process(moved.kernel, calls.append))
    assert calls == []
    assert moved.kernel.mapped == {}
    done = moved.assemble()
    assert planned.actions == done.actions
    assert planned.changed
    assert [t.result for t in planned.targets] == [t.result for t in done.targets]


def test_the_plan_is_that_of_the_module_target(moved: Drill) -> None:
    overwrite(moved.disk("s0"), [1])
    for item in moved.assemble(check=True).targets:
        name = item.target.name
        paths = tuple(moved.disk(spare).path for spare in TARGETS[name][0])
        request = Request(name, moved.disk(f"main-{name}").path, paths)
        engine = moved.engine()
        assert item.plan == plan_present(request, engine.see(name, request.main, paths))


# What is asked for


def test_a_target_is_named_by_name_uuid_or_device(moved: Drill) -> None:
    report = moved.assemble(check=True)
    beta = next(t.target for t in report.targets if t.target.name == "beta")
    for order in (
        Order(name="beta"),
        Order(name=str(beta.uuid)),
        Order(device=moved.disk("s3").path),
        Order(device=moved.disk("main-beta").path),
    ):
        assert moved.results(order, check=True) == {"beta": "assembled"}
    with pytest.raises(Refused, match="no device tells of a target of that name; attach"):
        moved.assemble(Order(name="delta"))
    with pytest.raises(Refused, match="is no main and no spare"):
        moved.assemble(Order(device=moved.disk("blank").path))
    with pytest.raises(Refused, match="for one target only"):
        moved.assemble(Order(use=moved.disk("s0").path))
    with pytest.raises(DmRemapError, match="no such device"):
        moved.assemble(Order(name="beta", use="/dev/none"))
    assert moved.kernel.mapped == {}


def test_the_backup_is_named_where_no_spare_is_left(host_a: Drill, tmp_path: Path) -> None:
    moved = host_a.elsewhere(tmp_path)
    shutil.copytree(host_a.folder / "backup", tmp_path / "backup")
    moved.without("s4")
    with pytest.raises(Refused, match="restore their metadata from this host's backup"):
        moved.assemble(Order(name="gamma"))


def test_two_targets_of_one_name_need_the_uuid(moved: Drill) -> None:
    entry = next(t.target for t in moved.assemble(check=True).targets if t.target.name == "beta")
    assert entry.metadata
    other = replace(
        entry.metadata, target_uuid=uuid.UUID(int=7), config={**entry.metadata.config, "name": "x"}
    )
    found = moved.engine().discover()
    twin = decide_with_name(found, other, "alpha")
    with pytest.raises(Refused, match="several targets; give the UUID") as caught:
        choose(twin, Order(name="alpha"), lambda path: path)
    assert str(uuid.UUID(int=7)) in str(caught.value)
    # The one that is active has the name.
    alpha = next(t.uuid for t in found.decide().targets if t.name == "alpha")
    chosen = choose(replace(twin, active={alpha: "alpha"}), Order(name="alpha"), lambda path: path)
    assert [target.uuid for target in chosen.targets] == [alpha]


def decide_with_name(host: Host, metadata: Metadata, name: str) -> Host:
    """The host with another target's spare, which has this name."""
    named = replace(metadata, config={**metadata.config, "name": name})
    disk = MemoryDisk(sectors=SPARE_SECTORS)
    spare_uuid = spare_uuid_of(named, 0)
    for index, sector in enumerate(slot_sectors_of(SPARE_SECTORS)):
        disk.put(sector, pack_slot(named, spare_uuid, SPARE_SECTORS, index))
    info = replace(host.found[0].info, path="/dev/twin", devno="9:9", disk="9:9", serial="twin")
    info = replace(info, sectors=SPARE_SECTORS)
    return replace(host, found=(*host.found, Found(info, survey(disk), of_info(info))))


# Devices that the operator names


def cloned(drill: Drill, name: str, path: str = "/dev/clone") -> Disk:
    """A copy of a disk on another one."""
    disk = drill.disk(name).clone()
    disk.path, disk.devno, disk.serial = path, f"259:{100 + len(drill.kernel.disks)}", "another"
    drill.kernel.disks[path] = disk
    return disk


def test_a_clone_of_a_spare_is_the_spare_once_it_is_named(moved: Drill, tmp_path: Path) -> None:
    clone = cloned(moved, "s0")
    original = moved.disk("s0")
    moved.without("s0")
    for order in (Order(name="alpha"), Order(name="alpha", safe_mode=False)):
        assert moved.results(order) == {"alpha": "refused"}
    report = moved.assemble(Order(name="alpha", use=clone.path))
    assert [t.result for t in report.targets] == ["assembled"]
    assert [a["action"] for a in report.actions][-2:] == ["create_target", "update_config"]
    moved.check(names=["alpha"])
    assert not moved.assemble(Order(name="alpha", use=clone.path)).changed
    # From now on it needs no word, and what it was copied from is the clone.
    moved.kernel.disks[original.path] = original
    again = moved.elsewhere(tmp_path / "again", 5)
    report = again.assemble(Order(name="alpha"))
    assert [t.result for t in report.targets] == ["assembled"]
    assert report.targets[0].target.clones == (again.disk("s0").path,)
    assert clone.serial in {again.kernel.disks[i.path].serial for i in spares_of(report)}
    again.check(names=["alpha"])


def spares_of(report: Report) -> list[DeviceInfo]:
    return [info for item in report.targets for info in item.target.spares.values()]


def test_a_clone_of_the_main_is_the_main_once_it_is_named(moved: Drill, tmp_path: Path) -> None:
    clone = cloned(moved, "main-alpha")
    original = moved.disk("main-alpha")
    moved.without("main-alpha")
    for order in (Order(name="alpha"), Order(name="alpha", safe_mode=False, degraded=True)):
        assert moved.results(order) == {"alpha": "refused"}
    report = moved.assemble(Order(name="alpha", main=clone.path))
    assert [t.result for t in report.targets] == ["assembled"]
    moved.check(names=["alpha"])
    moved.kernel.disks[original.path] = original
    again = moved.elsewhere(tmp_path / "again", 5)
    report = again.assemble(Order(name="alpha"))
    assert [t.result for t in report.targets] == ["assembled"]
    main = report.targets[0].target.main
    assert main
    assert again.kernel.disks[main.path].serial == "another"
    again.check(names=["alpha"])


def dying(drill: Drill, crash: int) -> Process:
    """A process that is killed at its call of this number."""
    process = Process(drill.kernel)
    calls = itertools.count(1)

    def count(name: str) -> None:
        if next(calls) == crash:
            process.kill()

    process.on_call = count
    return process


@pytest.mark.parametrize("survivors", short_form(["all", "none"], always=["all"]))
def test_every_crash_while_a_named_clone_becomes_the_spare(
    host_a: Drill, tmp_path: Path, survivors: str
) -> None:
    start = host_a.elsewhere(tmp_path)
    overwrite(start.disk("s1"), [1])
    clone = cloned(start, "s0").path
    start.without("s0")
    order = Order(name="alpha", use=clone)
    for crash in itertools.count(1):
        drill = replace(start, kernel=start.kernel.clone())
        shutil.rmtree(tmp_path / "backup", ignore_errors=True)
        try:
            drill.assemble(order, process=dying(drill, crash))
        except Killed:
            pass
        else:
            break
        volatile = drill.kernel.volatile()
        drill.kernel.cut_power(volatile if survivors == "all" else [])
        report = drill.assemble(order)
        assert [t.result for t in report.targets] == ["assembled"], crash
        drill.check(names=["alpha"])
        # Now it is recorded, and is the spare without a word.
        drill.kernel.cut_power(drill.kernel.volatile())
        assert drill.results(Order(name="alpha")) == {"alpha": "assembled"}, crash
    assert crash > 20


@pytest.mark.parametrize("change", ["larger", "smaller", "block"])
def test_no_name_overrules_size_and_block_size(moved: Drill, change: str) -> None:
    for name, option in (("main-alpha", "main"), ("s0", "use")):
        clone = cloned(moved, name, f"/dev/clone-{option}")
        original = moved.disk(name)
        moved.without(name)
        if change == "block":
            clone.block = 8
        else:
            clone.sectors += 8 if change == "larger" else -8
        calls: list[str] = []
        order = Order(name="alpha", degraded=True, safe_mode=False, **{option: clone.path})
        report = moved.assemble(order, process=Process(moved.kernel, calls.append), check=True)
        # A spare may be larger: its copies say where everything is.
        fits = option == "use" and change == "larger"
        assert [t.result for t in report.targets] == ["assembled" if fits else "refused"]
        if not fits:
            again = moved.assemble(order, process=Process(moved.kernel, calls.append))
            assert [t.result for t in again.targets] == ["refused"]
        assert calls == []
        del moved.kernel.disks[clone.path]
        moved.kernel.disks[original.path] = original


def test_without_safe_mode_the_only_main_that_can_be_it_is_taken(moved: Drill) -> None:
    moved.disk("other").serial = "something else"
    main = moved.disk("main-alpha")
    main.serial = ""
    assert moved.results(Order(name="alpha"), check=True) == {"alpha": "refused"}
    loose = Order(name="alpha", safe_mode=False)
    assert moved.results(loose, check=True) == {"alpha": "assembled"}
    # Two that may be it: the operator must name one.
    twin = cloned(moved, "blank", "/dev/twin")
    twin.serial, twin.sectors = "", main.sectors
    assert moved.results(loose, check=True) == {"alpha": "refused"}
    assert moved.results(replace(loose, main=main.path)) == {"alpha": "assembled"}
    moved.check(names=["alpha"])


@pytest.mark.parametrize("trouble", ["read-only", "mounted", "missing spare"])
def test_without_safe_mode_nothing_else_is_let_through(moved: Drill, trouble: str) -> None:
    main = moved.disk("main-alpha")
    main.serial = ""
    if trouble == "missing spare":
        moved.without("s0")
    else:
        main.read_only, main.mounted = trouble == "read-only", "/mnt" * (trouble == "mounted")
    assert moved.results(Order(name="alpha", safe_mode=False)) == {"alpha": "refused"}
    assert moved.kernel.mapped == {}


def diverged(host_a: Drill, folder: Path) -> tuple[Drill, Drill]:
    """Two hosts that each used alpha with one of its spares, and remapped a chunk."""
    hosts = []
    for spare, gone in (("s0", "s1"), ("s1", "s0")):
        host = host_a.elsewhere(folder / spare)
        away = host.disk(gone)
        host.without(gone)
        assert host.results(Order(name="alpha", degraded=True)) == {"alpha": "assembled"}
        chunk = next(c for c in range(CHUNKS) if c not in host.on["alpha"])
        host.engine().remap("alpha", [(chunk * CHUNK, 1)], patience=Patience(backoff=0))
        host.kernel.disks[away.path] = away
        hosts.append(host)
    return hosts[0], hosts[1]


def test_a_split_brain_needs_the_operator(host_a: Drill, tmp_path: Path) -> None:
    one, two = diverged(host_a, tmp_path)
    # The disks of both at host one: its main, and each spare as it was used.
    other = two.disk("s1").clone()
    one.kernel.disks[one.disk("s1").path] = other
    other.path = next(path for path, disk in one.kernel.disks.items() if disk is other)
    one.kernel.cut_power(one.kernel.volatile())
    for order in (Order(name="alpha", degraded=True), Order(name="alpha", safe_mode=False)):
        report = one.assemble(order)
        assert [t.result for t in report.targets] == ["refused"]
        assert [p.code for p in report.targets[0].target.problems] == ["split_brain"]
    # The other side counts, against the backup of this host; what the named one lacks is missing.
    use = Order(name="alpha", use=other.path)
    assert one.results(use) == {"alpha": "refused"}
    assert one.results(replace(use, degraded=True)) == {"alpha": "assembled"}
    one.check(missing=["s0"], names=["alpha"])
    # It is not forgotten: the next time both are there, they contradict each other again.
    one.kernel.cut_power(one.kernel.volatile())
    assert one.results(Order(name="alpha", degraded=True)) == {"alpha": "refused"}


def test_a_generation_older_than_the_backup_is_refused(host_a: Drill, tmp_path: Path) -> None:
    moved = host_a.elsewhere(tmp_path)
    shutil.copytree(host_a.folder / "backup", tmp_path / "backup")
    owner = next(t.target for t in moved.assemble(check=True).targets if t.target.name == "gamma")
    assert owner.metadata
    moved.backups().keep(owner.metadata.successor(timestamp_ns=1))
    for order in (Order(), Order(degraded=True, safe_mode=False)):
        report = moved.assemble(order, check=True)
        states = {
            t.target.name: (t.result, [p.code for p in t.target.problems]) for t in report.targets
        }
        assert states["gamma"] == ("refused", ["older_than_backup"])


def test_what_was_removed_on_purpose_stays_removed(host_a: Drill, tmp_path: Path) -> None:
    moved = host_a.elsewhere(tmp_path)
    assert moved.results() == ALL
    away = moved.disk("s1")
    moved.kernel.cut_power(moved.kernel.volatile())
    moved.without("s1")
    assert moved.results(Order(name="alpha", degraded=True)) == {"alpha": "assembled"}
    engine = moved.engine()
    seen = engine.see("alpha", None, ())
    engine.apply(plan_absent("alpha", seen.target, seen, True))
    moved.kernel.disks[away.path] = away
    report = moved.assemble(Order(degraded=True))
    assert {t.target.name: t.result for t in report.targets} == {**ALL, "alpha": "removed"}
    assert not report.missed
    assert any("removed from this host on purpose" in text for text in report.warnings)
    assert moved.results(Order(name="alpha", degraded=True)) == {"alpha": "refused"}
    (owner,) = [t.target.uuid for t in report.targets if t.target.name == "alpha"]
    Path(moved.backups().removal(owner)).unlink()
    assert moved.results(Order(name="alpha", degraded=True)) == {"alpha": "refused"}


# One target's trouble, and what changes meanwhile


def test_one_that_fails_keeps_no_other_from_being_assembled(moved: Drill) -> None:
    overwrite(moved.disk("s4"), [0])
    # dm-integrity does not know its superblock any more.
    gamma = next(t.target for t in moved.assemble(check=True).targets if t.target.name == "gamma")
    assert gamma.metadata
    moved.disk("s4").fill(geometry_of(gamma.metadata, 0).tag_start, b"x" * SECTOR)
    moved.disk("main-alpha").read_only = True
    report = moved.assemble()
    results = {t.target.name: t.result for t in report.targets}
    assert results == {"alpha": "refused", "beta": "assembled", "gamma": "failed"}
    assert report.changed
    assert [t.target.name for t in report.missed] == ["alpha", "gamma"]
    assert "/dev/" in report.message
    moved.check(names=["beta"])


def test_what_could_not_be_repaired_is_told(moved: Drill) -> None:
    overwrite(moved.disk("s4"), [0])
    moved.disk("s4").unwritable = set(range(NEAR[1]))
    report = moved.assemble()
    assert {t.target.name: t.result for t in report.targets} == ALL
    (repair,) = report.targets[-1].repaired
    assert not repair.whole
    assert [text for text in report.warnings if "could not all be repaired" in text]
    moved.check()


def test_what_would_refuse_an_active_target_is_a_warning(moved: Drill) -> None:
    assert moved.results() == ALL
    assert not moved.assemble().warnings
    clone = cloned(moved, "s0")
    clone.serial = moved.disk("s0").serial
    report = moved.assemble()
    assert not report.missed
    (warning,) = report.warnings
    assert clone.path in warning
    assert "one is a clone" in warning


class Late:
    """An engine that has looked at the host some time ago."""

    def __init__(self, drill: Drill, process: Process | None = None) -> None:
        self._engine = drill.engine(process)
        self._then = self._engine.discover()

    def discover(self) -> Host:
        return self._then

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def test_what_others_activated_meanwhile_is_left_as_it_is(moved: Drill) -> None:
    away = moved.disk("s1")
    moved.without("s1")
    late = Late(moved)
    moved.kernel.disks[away.path] = away
    assert moved.results() == ALL
    report = assemble(late, Order(degraded=True))
    assert {t.result for t in report.targets} == {"active"}
    assert not report.changed
    moved.check()


@pytest.mark.parametrize(
    "swapped", [("s0", "s2"), ("main-alpha", "main-beta"), ("main-alpha", "other"), ("s0", "blank")]
)
def test_names_that_changed_meanwhile_are_noticed(moved: Drill, swapped: tuple[str, str]) -> None:
    calls: list[str] = []
    late = Late(moved, Process(moved.kernel, calls.append))
    one, two = (moved.disk(name) for name in swapped)
    one.path, two.path = two.path, one.path
    moved.kernel.disks.update({one.path: one, two.path: two})
    option = "main" if "main" in swapped[0] else "use"
    # What was named is another device now.
    trusting = Order(name="alpha", **{option: two.path})
    for order in (Order(name="alpha"), trusting):
        report = assemble(late, order)
        assert [t.result for t in report.targets] == ["refused"]
    assert calls == []
    assert moved.results() == ALL
    moved.check()


@pytest.mark.parametrize("name", ["s0", "main-alpha"])
def test_a_disk_that_was_plugged_in_anew_is_not_what_was_decided_on(
    moved: Drill, name: str
) -> None:
    late = Late(moved)
    moved.disk(name).devno = "259:77"
    report = assemble(late, Order(name="alpha"))
    assert [t.result for t in report.targets] == ["refused"]
    assert "run this again" in report.message
    assert moved.kernel.mapped == {}
    assert moved.results() == ALL
    moved.check()


@pytest.mark.parametrize("name", ["s0", "main-alpha"])
def test_a_disk_in_the_place_of_one_that_was_pulled_is_not_it(moved: Drill, name: str) -> None:
    """It gets the number of the other one, and udev knows nothing of it yet."""
    late = Late(moved)
    old = moved.disk(name)
    new = old.clone()
    new.serial = ""
    new.fill(0, b"y" * 512)
    moved.kernel.disks[old.path] = new
    report = assemble(late, Order(name="alpha"))
    assert [t.result for t in report.targets] == ["refused"]
    assert moved.kernel.mapped == {}
    moved.kernel.disks[old.path] = old
    assert moved.results() == ALL
    moved.check()


def test_a_newer_generation_meanwhile_is_noticed(moved: Drill) -> None:
    late = Late(moved)
    assert moved.results() == ALL
    chunk = next(c for c in range(CHUNKS) if c not in moved.on["alpha"])
    moved.engine().remap("alpha", [(chunk * CHUNK, 1)], patience=Patience(backoff=0))
    moved.kernel.cut_power([])
    assert {t.target.name: t.result for t in assemble(late, Order()).targets} == {
        **ALL,
        "alpha": "refused",
    }


# A replacement of the main under way


def test_a_replacement_under_way_is_activated_with_both_mains(
    host_a: Drill, tmp_path: Path
) -> None:
    moved = host_a.elsewhere(tmp_path)
    assert moved.results() == ALL
    new = moved.kernel.add_disk("new", SECTORS)
    new.devno = "259:99"
    paths = tuple(moved.disk(spare).path for spare in TARGETS["alpha"][0])
    request = Request("alpha", new.path, paths)

    class Stopped(Exception):
        pass

    steps: list[str] = []

    def step(name: str) -> None:
        steps.append(name)
        if steps.count("window_committed") == 6:
            raise Stopped

    engine = Engine(
        mapper=Process(moved.kernel).mapper,
        blocks=Process(moved.kernel).blocks,
        step=step,
        lock_dir=str(tmp_path / "locks"),
        backup_dir=str(tmp_path / "backup"),
    )
    engine.apply(plan_present(request, engine.see("alpha", new.path, paths)))
    with pytest.raises(Stopped):
        engine.replace_main("alpha", pace=Pace(window=4 * CHUNK * SECTOR))
    copied = moved.engine().require("alpha").metadata.config["replacement"]["copied"]
    assert 0 < copied < CHUNKS
    moved.kernel.flush(moved.kernel.mapped["alpha"].devno)
    again = moved.elsewhere(tmp_path / "again", 3)
    report = again.assemble(Order(name="alpha"))
    assert [t.result for t in report.targets] == ["assembled"]
    assert report.actions[-1]["action"] == "create_target"
    assert any("is being replaced by" in text for text in report.warnings)
    for sector in range(SECTORS):
        assert again.read("alpha", sector) == data_of("alpha", sector), sector
    # With one of them missing it is refused.
    for name in ("new", "main-alpha"):
        alone = moved.elsewhere(tmp_path / name, 3).without(name)
        assert alone.results(Order(name="alpha", degraded=True)) == {"alpha": "refused"}


# The modules


@dataclass
class Modules:
    """Runs the modules on a host."""

    drill: Drill
    patch: pytest.MonkeyPatch
    output: pytest.CaptureFixture[str]

    def run(self, module: Any, **arguments: Any) -> dict[str, Any]:
        check = arguments.pop("check", False)
        controls = {"_ansible_check_mode": check, "_ansible_diff": True}
        # The tests have the core under another name, and its types must be the same.
        for name, value in list(vars(module).items()):
            package, _dot, rest = str(getattr(value, "__module__", "")).partition("module_utils.")
            if package == "plugins." and rest:
                core = importlib.import_module(f"dm_remap.{rest}")
                self.patch.setattr(module, name, getattr(core, name))
        self.patch.setattr(module, "Engine", self.drill.engine)
        with patch_module_args({**arguments, **controls}), pytest.raises(SystemExit):
            module.main()
        result: dict[str, Any] = json.loads(self.output.readouterr().out)
        return result

    def assemble(self, **arguments: Any) -> dict[str, Any]:
        return self.run(assemble_module, **arguments)


@pytest.fixture
def modules(
    moved: Drill, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Modules:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return Modules(moved, monkeypatch, capsys)


def test_the_module_assembles_all(modules: Modules) -> None:
    planned = modules.assemble(auto=True, check=True)
    assert planned["changed"]
    assert modules.drill.kernel.mapped == {}
    done = modules.assemble(auto=True)
    assert done["changed"]
    assert done["actions"] == planned["actions"]
    assert done["diff"] == planned["diff"]
    assert len(done["diff"]) == 2 * len(TARGETS)
    assert {t["name"]: t["result"] for t in done["targets"]} == ALL
    modules.drill.check()
    again = modules.assemble(auto=True)
    assert (again["changed"], again["actions"], again["diff"]) == (False, [], [])
    found = modules.run(info_module, discover=True)
    assert {t["state"] for t in found["discovery"]["targets"]} == {"active"}
    assert "discovery" not in modules.run(info_module)


def test_the_module_fails_for_one_and_assembles_the_others(modules: Modules) -> None:
    modules.drill.without("s0")
    failed = modules.assemble(auto=True)
    assert failed["failed"]
    assert failed["changed"]
    assert "target alpha can be activated without spare 0" in failed["msg"]
    assert {t["name"]: t["result"] for t in failed["targets"]} == {**ALL, "alpha": "refused"}
    done = modules.assemble(name="alpha", degraded="allowed")
    assert "failed" not in done
    modules.drill.check(missing=["s0"])


@pytest.mark.parametrize(
    "arguments",
    [{}, {"auto": True, "name": "alpha"}, {"name": ""}, {"auto": True, "use": "/dev/x"}]
    + [{"auto": True, "main": "/dev/x"}, {"name": "alpha", "degraded": "maybe"}],
)
def test_wrong_arguments_do_nothing(modules: Modules, arguments: dict[str, Any]) -> None:
    assert modules.assemble(**arguments)["failed"]
    assert modules.drill.kernel.mapped == {}
