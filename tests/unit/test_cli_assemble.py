# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""dm-remap-discover and dm-remap-reassemble on a kernel in memory."""

from __future__ import annotations

import io
import os
import re
import shutil
from pathlib import Path

import pytest

from dm_remap.cli.framework import run
from dm_remap.cli.programs import PROGRAMS
from dm_remap.planner import plan_present
from dm_remap.request import Request
from dm_remap.salvage import Patience
from tests.unit.cli_scene import Desk, Terminal, be_root_at_a_known_time, settled
from tests.unit.drill_scene import CHUNK as DRILL_CHUNK
from tests.unit.drill_scene import SECTORS, SPARE_SECTORS, Drill
from tests.unit.fake_kernel import SECTOR, Kernel, Process
from tests.unit.test_engine import CHUNK, NAME, make_scene


@pytest.fixture(autouse=True)
def root_at_a_known_time(monkeypatch: pytest.MonkeyPatch) -> None:
    be_root_at_a_known_time(monkeypatch)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """A target with two spares and two remapped chunks on the first, after a restart."""
    scene = make_scene(tmp_path, 2)
    scene.create()
    scene.remap((16, 1), (80, 1))
    scene.kernel.add_disk("blank", 40000)
    scene.app.flush(scene.kernel)
    scene.kernel.cut_power(scene.kernel.volatile())
    return Desk(scene)


def test_what_is_found_is_shown(desk: Desk) -> None:
    done = desk.run("dm-remap-discover")
    assert done.out == (
        "TARGET   STATE     GENERATION  MAIN       SPARES                        MISSING\n"
        "guarded  complete           2  /dev/main  0:/dev/spare0, 1:/dev/spare1  -\n"
        "\n"
        "guarded can be activated from generation 2 with its main and all spares\n"
    )
    assert (done.code, done.err) == (0, "")
    found = desk.run("dm-remap-discover --json").json
    assert found["targets"] == desk.scene.engine().discover().decide().to_dict()["targets"]
    assert found["others"] == []
    assert "devices" not in found


def test_every_device_is_shown_with_its_role(desk: Desk) -> None:
    done = desk.run("dm-remap-discover --scan-all")
    size = desk.scene.spares[0].sectors
    assert done.out.partition("\n\nDEVICE")[2] == (
        "       SECTORS  ROLE     TARGET   MODEL  SERIAL\n"
        "/dev/main        197  main     guarded  Fake   serial-main\n"
        f"/dev/spare0    {size}  spare 0  guarded  Fake   serial-spare0\n"
        f"/dev/spare1    {size}  spare 1  guarded  Fake   serial-spare1\n"
        "/dev/blank     40000  -        -        Fake   serial-blank\n"
    )
    roles = {
        d["path"]: d["role"]
        for d in desk.run("dm-remap-discover --scan-all --json").json["devices"]
    }
    assert roles == {
        "/dev/main": "main",
        "/dev/spare0": "spare 0",
        "/dev/spare1": "spare 1",
        "/dev/blank": "",
    }


def test_one_device_shows_its_targets_only(desk: Desk) -> None:
    found = desk.run("dm-remap-discover --device /dev/spare1 --json").json
    assert [target["name"] for target in found["targets"]] == [NAME]
    assert {d["path"] for d in found["devices"]} == {"/dev/main", "/dev/spare0", "/dev/spare1"}
    done = desk.run("dm-remap-discover --device /dev/blank")
    assert (done.code, done.out) == (3, "")
    assert "is no main and no spare of a target" in done.err


def test_a_missing_spare_ends_with_4_and_is_named(desk: Desk) -> None:
    del desk.scene.kernel.disks["/dev/spare0"]
    done = desk.run("dm-remap-discover")
    assert done.code == 4
    assert "without spare 0, with 2 remapped chunks unreadable" in done.out
    assert "missing_data: " in done.out


def test_validation_plans_and_takes_damage_for_a_fault(desk: Desk) -> None:
    done = desk.run("dm-remap-discover --validate")
    assert done.code == 0
    assert "would be done:\n    activate_spare /dev/spare0" in done.out
    desk.scene.spares[0].fill(0, b"x" * 4096)
    assert desk.run("dm-remap-discover").code == 0
    done = desk.run("dm-remap-discover --validate --json")
    assert done.code == 4
    (plan,) = [target["plan"] for target in done.json["targets"]]
    assert plan["result"] == "assembled"
    assert plan["actions"][0] == {"action": "repair_metadata", "device": "/dev/spare0"}
    assert desk.scene.kernel.mapped == {}
    # What only the plan refuses: a name that something else has.
    desk.scene.kernel.insert(f"{NAME}-spare0", "LVM-x")
    done = desk.run("dm-remap-discover --validate")
    assert done.code == 4
    assert "is a mapped device of something else" in done.out


def test_assembly_asks_and_then_does_what_it_said(desk: Desk) -> None:
    desk.scene.spares[1].fill(0, b"x" * 4096)
    calls: list[str] = []
    desk.process = Process(desk.scene.kernel, calls.append)
    dry = desk.run("dm-remap-reassemble --auto --dry-run")
    assert (dry.code, dry.err) == (0, "")
    assert "guarded  to do            2  /dev/main       2  -" in dry.out
    assert "  to repair /dev/spare1: copy 0 (magic)" in dry.out
    refused = desk.run("dm-remap-reassemble --auto")
    assert (refused.code, refused.out) == (3, "")
    assert desk.run("dm-remap-reassemble --auto", Terminal("n\n")).code == 3
    assert calls == []
    assert desk.logged == []
    done = desk.run("dm-remap-reassemble --auto", Terminal("y\n"))
    assert done.err == "Activate guarded? [y/N] "
    assert done.code == 0
    assert done.out == (
        "TARGET   RESULT     GENERATION  MAIN       SPARES  MISSING\n"
        "guarded  assembled           2  /dev/main       2  -\n"
        "\n"
        "guarded:\n"
        "  repaired /dev/spare1: copy 0 (magic)\n"
    )
    assert any(line.startswith("create_target") for line in desk.logged)
    desk.scene.check()
    again = desk.run("dm-remap-reassemble --auto --json")
    assert again.code == 0
    assert not again.json["changed"]
    assert [t["result"] for t in again.json["targets"]] == ["active"]


def test_what_is_refused_is_told(desk: Desk) -> None:
    desk.scene.main.serial = ""
    done = desk.run(f"dm-remap-reassemble {NAME} --yes")
    assert (done.code, done.out) == (3, "")
    assert "may be the main" in done.err
    assert "name it as the main if you are sure" in done.err
    as_json = desk.run(f"dm-remap-reassemble {NAME} --yes --json").json
    assert as_json["error"]["message"].startswith(f"target {NAME} is not activated")
    assert desk.run("dm-remap-reassemble other --yes").code == 3
    assert desk.run("dm-remap-reassemble --auto --yes --main /dev/main").code == 3
    done = desk.run(f"dm-remap-reassemble {NAME} --no-safe-mode --yes --json")
    assert done.code == 0
    assert done.json["targets"][0]["result"] == "assembled"
    desk.scene.check()


def test_a_named_main_needs_no_safe_mode_off(desk: Desk) -> None:
    desk.scene.main.serial = ""
    assert desk.run(f"dm-remap-reassemble {NAME} --main /dev/main --yes").code == 0
    desk.scene.check()


def test_degraded_is_done_and_not_in_order(desk: Desk) -> None:
    del desk.scene.kernel.disks["/dev/spare0"]
    line = "dm-remap-reassemble --device /dev/spare1 --yes"
    assert desk.run(line).code == 3
    assert desk.scene.kernel.mapped == {}
    done = desk.run(f"{line} --degraded allowed --json")
    assert done.code == 4
    assert done.json["changed"]
    assert any("these chunks give errors" in text for text in done.json["warnings"])
    assert desk.scene.read(2 * CHUNK) is None
    assert desk.scene.read(CHUNK) == desk.scene.app.versions[CHUNK][-1]


@pytest.mark.parametrize(
    "arguments",
    ["", "a b", "--auto a", "--auto --device /dev/x", "a --safe-mode --no-safe-mode"]
    + ["a --degraded perhaps"],
)
def test_a_wrong_command_line_does_nothing(desk: Desk, arguments: str) -> None:
    assert desk.run(f"dm-remap-reassemble {arguments}").code == 2
    assert desk.scene.kernel.mapped == {}


@pytest.mark.parametrize("line", ["dm-remap-discover", "dm-remap-reassemble --auto --yes"])
def test_only_root_may(desk: Desk, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    done = desk.run(line)
    assert (done.code, done.out) == (3, "")
    assert done.err.endswith(": only root can do this; become root\n")


def test_nothing_found(tmp_path: Path) -> None:
    desk = Desk(make_scene(tmp_path))
    for line in ("dm-remap-discover", "dm-remap-reassemble --auto --yes"):
        done = desk.run(line)
        assert (settled(done.out), done.code) == ("no targets found\n", 0)


# The documentation

TOOLS = Path(__file__).resolve().parents[2] / "docs" / "tools.md"


def two_targets(folder: Path) -> Desk:
    """The disks of another host: a spare with damaged copies, and a target that lacks one."""
    drill = Drill(Kernel(), folder)
    for number, letter in enumerate("bcdefg", 2):
        disk = drill.kernel.add_disk(f"sd{letter}", SECTORS if letter in "be" else SPARE_SECTORS)
        disk.serial = f"S-{number}"
    for name, main, spares, count in (
        ("data", "/dev/sdb", ("/dev/sdc", "/dev/sdd"), 40),
        ("logs", "/dev/sde", ("/dev/sdf", "/dev/sdg"), 24),
    ):
        engine = drill.engine()
        request = Request(name, main, spares, DRILL_CHUNK * SECTOR, "fail", allocation="balanced")
        engine.apply(plan_present(request, engine.see(name, main, spares)))
        ranges = [(2 * chunk * DRILL_CHUNK, 1) for chunk in range(count)]
        engine.remap(name, ranges, patience=Patience(backoff=0))
        drill.kernel.flush(drill.kernel.mapped[name].devno)
    drill.kernel.cut_power(drill.kernel.volatile())
    shutil.rmtree(folder / "backup")
    del drill.kernel.disks["/dev/sdg"]
    damaged = drill.kernel.disks["/dev/sdc"]
    damaged.fill(0, b"x" * SECTOR)
    damaged.fill(1024 + 8, b"x" * SECTOR)
    return Desk(drill)


def test_the_documented_outputs_are_what_is_printed(tmp_path: Path) -> None:
    desk = two_targets(tmp_path)
    section = TOOLS.read_text().partition("\n## Discover and reassemble\n")[2]
    section = section.partition("\n## ")[0]
    shown = re.findall(r"```console\n# (.*)\n([^`]*)```", section)
    assert [line.partition(" ")[0] for line, _text in shown] == [
        "dm-remap-discover",
        "dm-remap-reassemble",
        "dm-remap-reassemble",
    ]
    for line, text in shown:
        screen = io.StringIO()
        program, *arguments = line.split()
        run(PROGRAMS[program], arguments, desk.host(stdout=screen, stderr=screen))
        printed = screen.getvalue().replace("(Fake,", "(EXAMPLE,")
        assert settled(text) == settled(printed), line
