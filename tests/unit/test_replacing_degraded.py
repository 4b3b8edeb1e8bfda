# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A main that is being replaced while a spare is missing: activation, end, return, and crashes.

Chunks of the missing spare give errors on either main; what the mains have there is never read.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dm_remap import replacement
from dm_remap.engine import Engine
from dm_remap.errors import Refused
from tests.unit.fake_kernel import Kernel
from tests.unit.test_degraded import (
    POLICIES,
    activate,
    check,
    chunks_of,
    copy_of,
    crashes_of,
    having,
    kinds,
    make_target,
    power_cuts,
    rest,
    target_of,
)
from tests.unit.test_engine import CHUNK, SECTORS, Scene
from tests.unit.test_replacing import NEW, OLD, change_main, interrupt, only_main, toward

# The copy has seven windows of four chunks.
WINDOWS = (0, 1, 3)
SPARES = 2
# All crashes are tried in so many parts, of which the short tests take one.
PARTS = 12


def stopped_on_the_way(folder: Path, on_error: str, windows: int) -> tuple[Scene, dict[int, int]]:
    """A host that ended after some windows of the copy, and the spare of each remapped chunk."""
    scene = make_target(folder, on_error, SPARES)
    scene.kernel.add_disk("new", SECTORS)
    interrupt(scene, NEW, "window_committed", windows)
    for sector in range(0, SECTORS, 7):
        scene.app.write(scene.kernel, sector)
    scene.app.flush(scene.kernel)
    on = chunks_of(scene)
    assert {*on.values()} == {0, 1}
    scene.kernel.cut_power(scene.kernel.volatile())
    return scene, on


def check_sectors(scene: Scene, on: dict[int, int], missing: int, why: str = "") -> None:
    for sector in range(SECTORS):
        value = scene.read(sector)
        if on.get(sector // CHUNK) == missing:
            assert value is None, (sector, why)
        else:
            assert value in scene.app.allowed(sector, power_cut=False), (sector, why)


def check_end(scene: Scene, on: dict[int, int], missing: int, why: str = "") -> None:
    """One main is left, and the chunks of the missing spare are still that spare's."""
    target = target_of(scene)
    assert not replacement.under_way(target.metadata), why
    assert target.main is not None, why
    assert target.main.path == scene.request.main, why
    now = chunks_of(scene)
    away = {chunk for chunk, spare in on.items() if spare == missing}
    assert {chunk for chunk, spare in now.items() if spare == missing} == away, why
    check(scene, now, (missing,), why)


def bring_back(scene: Scene, why: str = "") -> None:
    """The spare is there again, and everything can be read."""
    whole = having(scene, rest((), SPARES))
    plan = whole.plan()
    assert kinds(plan) == ["return_spare"], why
    whole.engine().apply(plan)
    check(whole, chunks_of(whole), (), why)


@pytest.mark.parametrize("on_error", POLICIES)
@pytest.mark.parametrize("missing", range(SPARES))
@pytest.mark.parametrize("main", [NEW, OLD])
@pytest.mark.parametrize("windows", WINDOWS)
def test_a_replacement_goes_on_or_back_without_a_spare(
    tmp_path: Path, windows: int, main: str, missing: int, on_error: str
) -> None:
    scene, on = stopped_on_the_way(tmp_path, on_error, windows)
    scene = having(toward(scene, main), rest((missing,), SPARES))
    with pytest.raises(Refused, match="degraded: true"):
        having(scene, rest((missing,), SPARES), degraded=False).plan()
    assert "note_missing" in activate(scene)
    assert replacement.under_way(target_of(scene).metadata)
    check_sectors(scene, on, missing)
    change_main(scene, main)
    check_end(scene, on, missing)
    bring_back(scene)


@pytest.mark.parametrize("path", [NEW, OLD])
def test_no_spare_may_be_missing_beside_a_main(tmp_path: Path, path: str) -> None:
    scene, _on = stopped_on_the_way(tmp_path, "fail", 3)
    other = OLD if path == NEW else NEW
    del scene.kernel.disks[path]
    before = written(scene.kernel)
    with pytest.raises(Refused, match=r"main"):
        having(toward(scene, other), [0]).plan()
    assert written(scene.kernel) == before


def written(kernel: Kernel) -> dict[str, dict[int, bytes]]:
    return {path: dict(disk.content) for path, disk in kernel.disks.items()}


@pytest.mark.parametrize("on_error", POLICIES)
@pytest.mark.parametrize("main", [NEW, OLD])
@pytest.mark.parametrize(
    "part", [0, *(pytest.param(part, marks=pytest.mark.soak) for part in range(1, PARTS))]
)
def test_a_crash_anywhere_until_the_replacement_has_ended(
    tmp_path: Path, part: int, main: str, on_error: str
) -> None:
    missing = 1
    scene, on = stopped_on_the_way(tmp_path, on_error, 3)
    degraded = having(toward(scene, main), rest((missing,), SPARES))

    def whole_way(engine: Engine) -> None:
        activate(degraded, engine)
        change_main(degraded, main, engine)

    found = crashes_of(degraded, whole_way)
    assert len(found) > 60
    for number, crash in list(enumerate(found))[part::PARTS]:
        killed = copy_of(crash.scene, crash.scene.folder / "killed")
        for left in (killed, *power_cuts(crash, 1)):
            ends = toward(left, only_main(left) or (NEW, OLD)[number // PARTS % 2])
            activate(ends)
            change_main(ends, ends.request.main)
            check_end(ends, on, missing, crash.label)
            if number // PARTS % 3 == 0:
                bring_back(ends, crash.label)
