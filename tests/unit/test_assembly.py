# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Assembly of found targets: the disaster drill in small, overrides, and what must stay refused.

What the mains have under remapped chunks is old, and is what must never be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dm_remap import engine as engine_module
from dm_remap.assembly import Order
from tests.unit.drill_scene import NEAR, TARGETS, Drill, make_drill, overwrite, zero
from tests.unit.fake_kernel import Process

SPARES = [spare for spares, _count in TARGETS.values() for spare in spares]
ALL = dict.fromkeys(TARGETS, "assembled")


@pytest.fixture(autouse=True, scope="module")
def memory_stays_unlocked() -> Iterator[None]:
    """Do not lock the memory of the process that runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "lock_memory", lambda: None)
        yield


@pytest.fixture(scope="module")
def host_a(tmp_path_factory: pytest.TempPathFactory, memory_stays_unlocked: None) -> Drill:
    return make_drill(tmp_path_factory.mktemp("host_a"))


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
