# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The command-line tools in a guest, installed by the role, on real block devices."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab import Machine
from tests.lab.machine import Result
from tests.vm.conftest import DISKS
from tests.vm.deployment import ensure_deployed
from tests.vm.images import digests
from tests.vm.playing import ModuleRunner, Step

pytestmark = pytest.mark.installs

NAME = "data"
TIMEOUT = 300.0

COMPLETE = """\
source /usr/share/bash-completion/completions/dm-remap
COMP_WORDS=(dm-remap status ''); COMP_CWORD=2; _dm_remap; echo "${COMPREPLY[@]}"
COMP_WORDS=(dm-remap metadata re); COMP_CWORD=2; _dm_remap; echo "${COMPREPLY[@]}"
"""


class Desk:
    """Runs command lines in the guest, and keeps what they printed."""

    def __init__(self, lab: Machine) -> None:
        self.lab = lab
        self.runner = ModuleRunner(lab)

    def run(self, line: str, code: int = 0) -> Result:
        """Run a command that must end with this code."""
        done = self.lab.run(line.split(), check=False, timeout=TIMEOUT)
        assert done.rc == code, (line, done)
        return done

    def json(self, line: str, code: int = 0) -> Any:
        """Run a command and return the document that it printed."""
        return json.loads(self.run(f"{line} --json", code).stdout)

    def stop(self) -> None:
        """Take the target out of the kernel, as a shutdown does."""
        names = self.lab.run("dmsetup ls | cut -f 1").stdout.split()
        for name in sorted(names, key=lambda name: (name != NAME, name.count("-"), name)):
            self.lab.run(["dmsetup", "remove", "--retry", name])


@pytest.fixture(scope="module")
def desk(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A guest with the tools."""
    ensure_deployed(machine, tmp_path_factory.mktemp("deploy"))
    yield Desk(machine)
    machine.reset(zero=[disk.name for disk in DISKS])


def test_only_root_may_and_everybody_gets_help(desk: Desk) -> None:
    done = desk.run("runuser -u nobody -- dm-remap status", code=3)
    assert done.stderr == "dm-remap status: only root can do this; become root\n"
    assert desk.run("runuser -u nobody -- dm-remap --help").stdout.startswith("usage: dm-remap")
    desk.run("dm-remap nonsense", code=2)


def test_the_manual_pages_are_there(desk: Desk) -> None:
    pages = desk.run("ls /usr/share/man/man8").stdout.split()
    assert {"dm-remap.8", "dm-remap-validate.8"} <= set(pages)


def test_the_life_of_a_target(desk: Desk, tmp_path: Path) -> None:
    lab = desk.lab
    main, spare = lab.disk("main"), lab.disk("spare")
    wanted = {"name": NAME, "main": main.path, "spares": [spare.path], "on_error": "fail"}
    configuration = {"targets": [wanted]}
    # JSON is YAML.
    lab.write_file("/etc/dm-remap/config.yaml", json.dumps(configuration))

    blank = digests(lab)
    planned = desk.json("dm-remap-validate")["targets"]
    assert [target["state"] for target in planned] == ["to do"]
    assert digests(lab) == blank
    created = desk.runner.run(Step("create", "target", wanted))["create"]
    assert created["actions"] == planned[0]["actions"]
    assert desk.json("dm-remap-validate")["targets"][0]["state"] == "in place"
    completed = lab.run(["bash", "-c", COMPLETE]).stdout
    assert completed == f"{NAME}\nrepair restore\n"

    main.fail([(5000, 3)], op="read")
    scanned = desk.json(f"dm-remap scan {NAME}", code=4)
    assert [(one["start"], one["count"], one["now"]) for one in scanned["bad"]] == [(5000, 3, None)]
    dry = desk.json(f"dm-remap remap {NAME} 5000+3 --dry-run")
    remapped = desk.json(f"dm-remap remap {NAME} 5000+3 --files-seconds 0", code=4)
    assert remapped["actions"] == dry["actions"]
    assert remapped["lost"] == [{"start": 5000, "count": 3}]
    desk.run(f"dm-remap remap {NAME} 5000+3 --expected-generation 1", code=3)
    # What is lost is on a spare, and known.
    assert desk.json(f"dm-remap scan {NAME}")["bad"] == []
    desk.run(f"dm-remap remap {NAME} 9000+8")
    shown = desk.run("dm-remap status").stdout
    assert re.search(rf"{NAME} +ok +\S+ .* 2 +3 +3\n", shown), shown
    info = desk.runner.run(Step("info", "info", {}))["info"]
    assert desk.json("dm-remap status")["targets"] == info["targets"]
    assert desk.json(f"dm-remap status {NAME}")["targets"] == info["targets"]
    assert desk.json(f"dm-remap return {NAME} 9000+8")["chunks"][0]["moved"]

    known = desk.json(f"dm-remap history {NAME}")
    assert [item["generation"] for item in known["generations"]] == [4, 3, 2, 1]
    assert {item["backup"] for item in known["generations"]} == {"yes"}
    # No event need be there: what the daemon has seen is another test's business.
    assert all(event["target"] == NAME for event in known["events"])

    dump = desk.run(f"dm-remap metadata dump {NAME}").stdout
    assert desk.run(f"dm-remap metadata dump {spare.path}").stdout == dump
    assert desk.json(f"dm-remap metadata check {spare.path}")["sound"]
    whole = digests(lab)["spare"]
    overwrite(desk, spare.path, [0, 2048])
    checked = desk.json(f"dm-remap metadata check {spare.path}", code=4)
    assert [row["copy"] for row in checked["copies"] if row["state"] != "ok"] == [0, 2]
    desk.run("dm-remap status", code=4)
    desk.run(f"dm-remap metadata repair {NAME}", code=3)
    desk.run(f"dm-remap metadata repair {NAME} --yes")
    assert desk.json(f"dm-remap metadata check {spare.path}")["sound"]
    assert digests(lab)["spare"] == whole

    desk.run(f"dm-remap metadata restore {spare.path} --backup {NAME} --yes", code=3)
    desk.stop()
    whole = digests(lab)["spare"]
    slots = [row["sector"] for row in checked["copies"]]
    assert len(slots) == 7
    overwrite(desk, spare.path, slots[:5])
    desk.run(f"dm-remap metadata repair {spare.path} --yes")
    assert digests(lab)["spare"] == whole
    overwrite(desk, spare.path, slots)
    desk.run(f"dm-remap metadata dump {spare.path}", code=3)
    lab.write_file("/root/dump.json", dump)
    restore = f"dm-remap metadata restore {spare.path} --from /root/dump.json --spare 0"
    assert desk.json(f"{restore} --dry-run")["changed"]
    desk.run(f"{restore} --yes")
    assert digests(lab)["spare"] == whole
    assert desk.run(f"dm-remap metadata dump {spare.path}").stdout == dump

    assert desk.json("dm-remap-validate")["targets"][0]["state"] == "to do"
    again = desk.runner.run(Step("again", "target", wanted))["again"]
    assert [action["action"] for action in again["actions"]] == ["activate_spare", "create_target"]
    assert desk.json(f"dm-remap status {NAME}")["targets"][0]["generation"] == 4


def overwrite(desk: Desk, path: str, sectors: list[int]) -> None:
    """Zero the header of the copies that begin at these sectors."""
    for sector in sectors:
        place = f"of={path} bs=4096 seek={sector // 8} count=1"
        desk.lab.run(f"dd if=/dev/zero {place} oflag=direct conv=notrunc")
