# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the modules' documentation says they return is what they return."""

from __future__ import annotations

import ast
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

from dm_remap import kernel_v4
from dm_remap.assembly import Assembled, Repair, Report
from dm_remap.errors import DmRemapError
from dm_remap.files import Owner
from dm_remap.format import Extent, LostRange
from dm_remap.moved import RemappedChunk, RemapReport
from dm_remap.plan import Action, Plan
from dm_remap.planner import plan_present
from dm_remap.report import describe_emptied, describe_remap, describe_target
from dm_remap.request import OldSpare, Request
from dm_remap.target import LostSpare
from plugins.modules import assemble as assemble_module
from plugins.modules import target as target_module
from tests import old_spare
from tests.unit.copy_scene import Disk
from tests.unit.test_discovery import CASES, decided
from tests.unit.test_planner import MAIN_SECTORS, REQUEST, blank, created, info
from tests.unit.test_replacement import half, under_way

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(path.stem for path in (ROOT / "plugins" / "modules").glob("[!_]*.py"))
TYPES = {"str": str, "int": int, "float": float, "bool": bool, "dict": dict, "list": list}


def text(module: str, name: str) -> Any:
    """Return a documentation text of a module, parsed."""
    tree = ast.parse((ROOT / "plugins" / "modules" / f"{module}.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return yaml.safe_load(ast.literal_eval(node.value))
    raise LookupError(f"{module} has no {name}")


def check(documented: dict[str, Any], value: Any, where: str) -> None:
    """Compare a value with its documentation, and the values in it with theirs."""
    if value is not None:
        assert isinstance(value, TYPES[documented["type"]]), where
    items = value if documented["type"] == "list" else [value]
    if documented.get("elements") == "dict" or documented["type"] == "dict":
        assert items, f"{where}: nothing to compare"
        for item in items:
            check_keys(documented["contains"], item, where)


def check_keys(documented: dict[str, Any], values: dict[str, Any], where: str) -> None:
    assert set(documented) == set(values), where
    for name, value in values.items():
        check(documented[name], value, f"{where}.{name}")


def test_every_key_of_a_target_is_documented() -> None:
    documented = text("info", "RETURN")["targets"]["contains"]
    # It stands in place of the others.
    del documented["error"]
    metadata = created(Extent(3, 2, 0, 0), lost=(LostRange(390, 2),))
    target = under_way(half(metadata))
    lost = LostSpare(0, "253:0", "8:16", "/dev/spare0", "cannot be read")
    degraded = replace(target, spares=target.spares[1:], lost_spares=(lost,))
    check_keys(documented, describe_target(degraded), "targets")


def discovered() -> list[dict[str, Any]]:
    """What was found in some cases, which together have everything."""
    names = ("two spares diverged", "4 of 5 near copies gone", "spare missing, with data")
    return [decided(CASES[name]).targets[0].to_dict() for name in names]


def check_found(documented: dict[str, Any], targets: list[dict[str, Any]], where: str) -> None:
    """Compare targets with their documentation; a list need not be empty in all of them."""
    for target in targets:
        assert set(documented) == set(target), where
    for name, about in documented.items():
        values = [target[name] for target in targets if target[name] not in (None, [])]
        assert values or name in ("new_main", "stale", "retired", "clones", "error"), name
        for value in values:
            check(about, value, f"{where}.{name}")


def test_every_key_of_a_discovery_is_documented() -> None:
    documented = text("info", "RETURN")["discovery"]["contains"]
    assert set(documented) == set(decided(CASES["all is there"]).to_dict())
    check_found(documented["targets"]["contains"], discovered(), "discovery.targets")
    others = decided(CASES["spare of dm-remap-v4"]).to_dict()["others"]
    check(documented["others"], others, "discovery.others")


def test_every_key_of_an_assembly_is_documented() -> None:
    documented = text("assemble", "RETURN")
    found = decided(CASES["4 of 5 near copies gone"]).targets[0]
    repaired = (Repair("/dev/sdb", False, ((0, "magic"),), True),)
    plan = Plan("data", (Action("repair_metadata", "/dev/sdb"),))
    failed = Assembled(found, "failed", plan, DmRemapError("x"), repaired)
    report = Report(decided(CASES["all is there"]), (failed,))
    module = assemble_module.result_of(report)
    assert set(documented) | {"changed", "diff"} == set(module)
    keys = {**text("info", "RETURN")["discovery"]["contains"]["targets"]["contains"]}
    own = documented["targets"]["contains"]
    assert not set(keys) & set(own)
    (target,) = module["targets"]
    assert set(target) == {*keys, *own}
    for name, about in own.items():
        if about.get("elements") != "dict" or "contains" in about:
            check(about, target[name], name)


def test_every_key_of_a_change_of_spares_is_documented() -> None:
    documented = text("spare", "RETURN")["emptied"]["contains"]
    chunk = RemappedChunk(3, 384, 128, 0, 7, 120, 4, [(390, 2)], [(392, 2)])
    check_keys(documented, describe_emptied([chunk]), "emptied")


def test_every_key_of_a_remap_is_documented() -> None:
    documented = text("sectors", "RETURN")
    del documented["actions"]
    chunk = RemappedChunk(3, 384, 128, 0, 7, 120, 4, [(390, 2)], [(392, 2)])
    owner = Owner(390, 2, "file", ("/srv/a",), 12, "ext4")
    report = RemapReport(Plan("data", after={"generation": 4}), [chunk], files=[owner])
    check_keys(documented, describe_remap(report), "sectors")


class Module:
    """What a module's code needs of AnsibleModule."""

    def __init__(self, params: dict[str, Any]) -> None:
        self.params = params


def arguments_of(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of a task as the module `target` gets them from Ansible."""
    taken: list[dict[str, Any]] = []

    class Taken(Exception):
        pass

    def take(argument_spec: dict[str, Any], **_rules: Any) -> None:
        taken.append(argument_spec)
        raise Taken

    monkeypatch.setattr(target_module, "AnsibleModule", take)
    with pytest.raises(Taken):
        target_module.main()
    result = ArgumentSpecValidator(taken[0]).validate(given)
    assert not result.error_messages
    return dict(result.validated_parameters)


def test_the_examples_of_targets_can_be_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = {}
    for task in text("target", "EXAMPLES"):
        given = arguments_of(task["dm_remap.storage.target"], monkeypatch)
        if given["state"] == "present":
            request = asdict(target_module.request_from(Module(given)))
            here = {"name": REQUEST.name, "main": REQUEST.main, "spares": REQUEST.spares}
            seen = replace(blank(), old_spare=old_spare_of(MAIN_SECTORS))
            planned[task["name"]] = plan_present(Request(**{**request, **here}), seen)
    plan = planned.pop("Fill both spares evenly, and warn early")
    assert plan.metadata is not None
    assert plan.metadata.config["allocation"] == "balanced"
    assert plan.metadata.config["thresholds"] == {"warn": 60, "critical": 85}
    held = planned.pop("Hold the errors of an NVMe disk too, and see what that changes")
    assert held.metadata is not None
    assert held.metadata.config["on_error"] == "hold"
    migrated = planned.pop("Leave the kernel target dm-remap-v4, whose spare stays as it is")
    assert migrated.migration is not None
    assert migrated.migration.places == {64 + offset: 2000 + offset for offset in range(8)}
    assert len(planned) == 5
    for other in planned.values():
        assert other.after["config"]["allocation"] == "first_fit"


def old_spare_of(main_sectors: int) -> OldSpare:
    """A kernel target's spare with a remap that may never have been used."""
    disk = Disk("/dev/old", 4000)
    entry = old_spare.Entry(64, 2000, old_spare.PENDING)
    old_spare.write(disk.put, old_spare.Old(main_sectors, disk.sectors, [entry]).pack())
    device = replace(info("/dev/spare2"), path="/dev/old", sectors=disk.sectors)
    return OldSpare(device, kernel_v4.survey(disk))


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_the_common_attributes(module: str) -> None:
    documentation = text(module, "DOCUMENTATION")
    assert documentation["extends_documentation_fragment"] == ["dm_remap.storage.attributes"]
    groups = yaml.safe_load((ROOT / "meta" / "runtime.yml").read_text())["action_groups"]
    assert module in groups["storage"]
