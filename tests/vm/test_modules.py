# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The modules as their users run them: ansible-playbook over SSH, on real block devices."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import pytest

from tests.lab import Machine
from tests.vm import refusals
from tests.vm.conftest import DISKS
from tests.vm.images import digests, mapped_devices, places_of
from tests.vm.playing import ModuleRunner, Player, Step, make_unprivileged_user

MAGIC = b"DMREMAP4"
KERNEL_MAGIC = b"4RMD"
NAME = "data"
CHUNK_SECTORS = 128
# Chunk 25, in its second half.
BAD_SECTOR = 25 * CHUNK_SECTORS + 77
NO_DEVICES = "No devices found\nNo devices found\n"

# What the module info returns of a target.
DOCUMENTED = set(
    """name device devno uuid generation sectors chunk_size on_error allocation thresholds main
    replacing spares pool remapped_chunks extents lost interrupted table warnings""".split()
)
DOCUMENTED_OF_SPARES = set(
    """index path devno uuid serial wwn model chunks free_chunks used_chunks bad_chunks
    reserved_chunks score copies_damaged stale""".split()
)

Result = dict[str, Any]
Runner = Union[Player, ModuleRunner]


@pytest.fixture
def runner(lab: Machine, tmp_path: Path, through_ansible: bool) -> Runner:
    """Runs steps in the clean guest."""
    return Player(lab, tmp_path) if through_ansible else ModuleRunner(lab)


def steps_of(actions: list[Result]) -> list[tuple[str, str]]:
    """What is done to which device, in this order."""
    return [(action["action"], action["device"]) for action in actions]


def assert_nothing_planned(result: Result) -> None:
    """Check a result that must not have changed anything."""
    assert not result.get("failed"), result
    assert result["changed"] is False
    assert result["actions"] == []
    for part in result["diff"]:
        assert part["before"] == part["after"]


def assert_as_planned(check: Result, real: Result) -> None:
    """Check that check mode foretold what was done, and the difference that it made.

    Which sectors are lost, nobody can know before.
    """
    for result in (check, real):
        assert not result.get("failed"), result
        assert result["changed"] is True
    assert check["actions"] == real["actions"]
    assert foreseeable(check) == foreseeable(real)


def foreseeable(result: Result) -> dict[str, Any]:
    """The difference, without the lost sectors."""
    found: dict[str, Any] = dict(difference(result))
    shown = [json.loads(text or "{}") for text in found["configuration"]]
    found["configuration"] = [{**text, "lost": None} for text in shown]
    return found


def difference(result: Result) -> dict[str, tuple[str, str]]:
    """Before and after by what the difference is of."""
    return {
        part["after_header"].split()[-1]: (part["before"], part["after"]) for part in result["diff"]
    }


@pytest.mark.parametrize(
    ("through_ansible", "spare_names"),
    [
        pytest.param(True, ("spare",), id="one spare, through Ansible", marks=pytest.mark.soak),
        pytest.param(False, ("spare", "spare2", "scsi"), id="three spares"),
    ],
)
def test_life_of_a_target(lab: Machine, runner: Runner, spare_names: tuple[str, ...]) -> None:
    main, spares = lab.disk("main"), [lab.disk(name) for name in spare_names]
    paths = [disk.path for disk in spares]
    content = os.urandom(4 * CHUNK_SECTORS * 512)
    main.write(24 * CHUNK_SECTORS, content)
    wanted = {"name": NAME, "main": main.path, "spares": paths, "on_error": "fail"}
    target = f"/dev/mapper/{NAME}"

    blank = digests(lab)
    check = runner.run(Step("create", "target", wanted, check=True))["create"]
    assert check["target"] == {}
    assert digests(lab) == blank
    assert mapped_devices(lab) == NO_DEVICES

    done = runner.run(
        Step("create", "target", wanted),
        Step("again", "target", wanted),
        Step("again in check mode", "target", wanted, check=True),
        Step("info", "info", {"name": NAME}),
    )
    assert_as_planned(check, done["create"])
    assert steps_of(check["actions"]) == [
        *(("format_spare", path) for path in paths),
        *(("activate_spare", path) for path in paths),
        ("commit_metadata", NAME),
        ("create_target", target),
    ]
    assert_nothing_planned(done["again"])
    assert_nothing_planned(done["again in check mode"])
    shown = difference(check)
    assert shown["table"] == ("", f"0 {main.spec.sectors} linear main 0\n")
    before, after = shown["configuration"]
    assert before == ""
    for text in ('"generation": 1', '"chunk_size": 65536', *(f'"{path}"' for path in paths)):
        assert text in after
    created = digests(lab)
    assert created["main"] == blank["main"]
    for name in spare_names:
        assert created[name] != blank[name]
    (described,) = done["info"]["targets"]
    assert described == done["again"]["target"]
    assert described["device"] == target
    assert described.keys() >= DOCUMENTED
    assert all(spare.keys() >= DOCUMENTED_OF_SPARES for spare in described["spares"])
    nodes = lab.run(["readlink", "-f", *paths]).stdout.split()
    assert [spare["path"] for spare in described["spares"]] == nodes
    assert [spare["free_chunks"] for spare in described["spares"]] == [
        action["chunks"] for action in check["actions"] if action["action"] == "format_spare"
    ]

    main.fail([(BAD_SECTOR, 1)], op="read")
    ranges = {"name": NAME, "ranges": [{"start": BAD_SECTOR}, {"start": 0, "count": 2}]}
    check = runner.run(Step("remap", "sectors", ranges, check=True))["remap"]
    assert digests(lab) == created
    discard = {"name": NAME, "state": "absent", "discard_remaps": True}
    done = runner.run(
        Step("remap", "sectors", ranges),
        Step("again", "sectors", ranges),
        Step("info", "info", {}),
        Step("kept", "target", {"name": NAME, "state": "absent"}),
        Step("absent in check mode", "target", discard, check=True),
    )
    assert_as_planned(check, done["remap"])
    assert steps_of(check["actions"]) == [
        ("remap_chunk", NAME),
        ("remap_chunk", NAME),
        ("commit_metadata", NAME),
    ]
    assert [action.get("chunk") for action in check["actions"]] == [0, 25, None]
    assert_nothing_planned(done["again"])
    assert done["remap"]["generation"] == done["again"]["generation"] == 2
    assert done["remap"]["recovered"] == 2 * CHUNK_SECTORS - 1
    _unused, after = difference(done["remap"])["configuration"]
    assert json.loads(after)["lost"] == [{"sector": BAD_SECTOR, "count": 1}]
    for result in (done["remap"], done["again"]):
        assert result["lost"] == [{"start": BAD_SECTOR, "count": 1}]
        assert f"{NAME}: 1 sector could not be read" in str(result["warnings"])
    before, after = difference(check)["table"]
    assert before == f"0 {main.spec.sectors} linear main 0\n"
    rest = 26 * CHUNK_SECTORS
    assert after.splitlines() == [
        "0 128 linear spare0 0",
        f"128 {24 * CHUNK_SECTORS} linear main 128",
        f"{25 * CHUNK_SECTORS} 128 linear spare0 128",
        f"{rest} {main.spec.sectors - rest} linear main {rest}",
    ]
    (described,) = done["info"]["targets"]
    assert described["table"] == after.splitlines()
    assert described["generation"] == 2
    assert described["remapped_chunks"] == 2
    assert described["lost"] == [{"start": BAD_SECTOR, "count": 1}]
    assert "2 chunks" in done["kept"]["msg"]

    remapped = digests(lab)
    check = done["absent in check mode"]
    assert NAME in mapped_devices(lab), "check mode must not remove the target"
    for disk in spares:
        assert places_of(disk.image, MAGIC)
    absent = {"name": NAME, "state": "absent"}
    done = runner.run(
        Step("absent", "target", discard),
        Step("again", "target", discard),
        Step("again on its spares", "target", {**absent, "spares": paths}),
    )
    assert_as_planned(check, done["absent"])
    assert steps_of(check["actions"]) == [
        ("remove_target", target),
        ("note_removal", NAME),
        *(("wipe_metadata", node) for node in nodes),
        *(("deactivate_spare", node) for node in nodes),
    ]
    assert difference(check)["table"] == (after, "")
    assert difference(check)["configuration"][1] == ""
    assert_nothing_planned(done["again"])
    assert_nothing_planned(done["again on its spares"])
    assert mapped_devices(lab) == NO_DEVICES
    removed = digests(lab)
    assert removed["main"] == remapped["main"] == blank["main"]
    for disk in spares:
        assert places_of(disk.image, MAGIC) == []

    done = runner.run(Step("create", "target", wanted), Step("absent", "target", absent))
    assert done["create"]["target"]["generation"] == 1
    assert done["create"]["target"]["remapped_chunks"] == 0
    assert steps_of(done["create"]["actions"])[0] == ("format_spare", paths[0])
    assert done["absent"]["changed"] is True
    assert digests(lab)["main"] == blank["main"]


@pytest.mark.second
@pytest.mark.parametrize("through_ansible", [False])
def test_a_target_after_a_power_cut(lab: Machine, runner: Runner) -> None:
    main, spare = lab.disk("main"), lab.disk("spare")
    content = os.urandom(CHUNK_SECTORS * 512)
    main.write(0, content)
    wanted = {"name": NAME, "main": main.path, "spares": [spare.path], "on_error": "fail"}
    done = runner.run(
        Step("create", "target", wanted),
        Step("remap", "sectors", {"name": NAME, "ranges": [{"start": 0}]}),
    )
    assert done["remap"]["recovered"] == CHUNK_SECTORS
    lab.power_cut()
    lab.restart()
    main.write(0, bytes(CHUNK_SECTORS * 512))
    dark = digests(lab)
    check = runner.run(Step("activate", "target", wanted, check=True))["activate"]
    assert digests(lab) == dark
    done = runner.run(
        Step("activate", "target", wanted),
        Step("again", "target", wanted),
        Step("info", "info", {"name": NAME}),
    )
    assert_as_planned(check, done["activate"])
    assert steps_of(check["actions"]) == [
        ("activate_spare", spare.path),
        ("create_target", f"/dev/mapper/{NAME}"),
    ]
    assert_nothing_planned(done["again"])
    assert done["info"]["targets"][0]["generation"] == 2
    read = lab.run_bytes(
        ["dd", f"if=/dev/mapper/{NAME}", "bs=64K", "count=1", "iflag=direct", "status=none"]
    )
    assert read.stdout == content


# Refusals

CASES = {case.id: case for case in refusals.cases()}
# These also go through ansible-playbook, the others only through the modules themselves.
PLAYED = (
    "spare is mounted",
    "spare holds ext4",
    "sectors with a generation that was",
    "not root: target",
)


@dataclass(frozen=True)
class Outcome:
    """The results of all cases by id, and what the guest's devices were like."""

    results: dict[str, Result]
    played: dict[str, Result]
    before: dict[str, str]
    after: dict[str, str]
    mapped_before: str
    mapped_after: str
    erased: dict[str, Result]
    places: list[int]


def erasing() -> list[Step]:
    """Make a target of spares that may be erased, and remove it."""
    wanted = {
        "name": "new",
        "main": refusals.path("ide"),
        "spares": [refusals.path(name) for name in refusals.ERASABLE],
        "wipe": True,
        "discard_remaps": True,
        "on_error": "fail",
    }
    return [
        Step("wipe alone", "target", {**wanted, "discard_remaps": False}, check=True),
        Step("create in check mode", "target", wanted, check=True),
        Step("create", "target", wanted),
        Step("again", "target", wanted),
        Step("absent", "target", {"name": "new", "state": "absent"}),
        Step("create without wipe", "target", {**wanted, "wipe": False}, check=True),
    ]


@pytest.fixture(scope="class")
def refused(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    """Every call that must be refused, made in one guest, one after the other."""
    directory = tmp_path_factory.mktemp("refusals")
    try:
        scene = refusals.Scene(machine, ModuleRunner(machine), directory)
        yield make_all(machine, directory)
        scene.clean_up()
    except BaseException:
        # Half a scene is not worth taking apart.
        machine.power_cut()
        raise
    finally:
        machine.reset(zero=[disk.name for disk in DISKS])


def make_all(machine: Machine, directory: Path) -> Outcome:
    """Make all calls, and look at the devices before and after."""
    runner = ModuleRunner(machine)
    make_unprivileged_user(machine)
    before, mapped_before = digests(machine), mapped_devices(machine)
    results = runner.run(*(case.step for case in CASES.values()))
    played = Player(machine, directory).run(*(CASES[name].step for name in PLAYED))
    after, mapped_after = digests(machine), mapped_devices(machine)
    erased = runner.run(*erasing())
    digests(machine)
    image = machine.disk("parts").image
    places = places_of(image, MAGIC) + places_of(image, KERNEL_MAGIC)
    return Outcome(results, played, before, after, mapped_before, mapped_after, erased, places)


class TestRefusals:
    """What is not safe is refused, with a message that helps, and nothing is written."""

    @pytest.mark.parametrize("name", CASES)
    def test_says_what_is_wrong(self, refused: Outcome, name: str) -> None:
        case, result = CASES[name], refused.results[name]
        assert result.get("failed"), result
        assert "Traceback" not in result["msg"]
        for word in (*case.words, case.device):
            assert word in result["msg"]

    @pytest.mark.parametrize("name", PLAYED)
    def test_says_the_same_through_ansible(self, refused: Outcome, name: str) -> None:
        assert refused.played[name]["failed"]
        assert refused.played[name]["msg"] == refused.results[name]["msg"]

    @pytest.mark.parametrize("name", [*refusals.ALL_DISKS])
    def test_writes_nothing(self, refused: Outcome, name: str) -> None:
        assert refused.before[name] == refused.after[name]

    def test_erases_with_permission_only(self, refused: Outcome) -> None:
        done = refused.erased
        # One of them has the metadata of another target, which may be the way to its data.
        assert done["wipe alone"]["failed"]
        assert_as_planned(done["create in check mode"], done["create"])
        paths = [refusals.path(name) for name in refusals.ERASABLE]
        wiped = steps_of(done["create"]["actions"])[: 2 * len(paths)]
        assert wiped == [(kind, path) for path in paths for kind in ("wipe_spare", "format_spare")]
        assert_nothing_planned(done["again"])
        assert done["absent"]["changed"] is True
        kinds = {kind for kind, _device in steps_of(done["create without wipe"]["actions"])}
        assert "wipe_spare" not in kinds, "something was left on the spares"

    def test_erases_nothing_else(self, refused: Outcome) -> None:
        owners = {refusals.partition_at(place) for place in refused.places}
        assert owners == {"held", "sleep1", "sleep2", "far_only"}

    def test_maps_nothing(self, refused: Outcome) -> None:
        assert refusals.HELD in refused.mapped_before
        assert refused.mapped_before == refused.mapped_after
