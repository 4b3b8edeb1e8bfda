# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the modules' documentation says they return is what they return."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml

from dm_remap.engine import RemappedChunk, RemapReport
from dm_remap.format import Extent, LostRange
from dm_remap.planner import Plan
from dm_remap.report import describe_remap, describe_target
from tests.unit.test_planner import created
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
    check_keys(documented, describe_target(under_way(half(metadata))), "targets")


def test_every_key_of_a_remap_is_documented() -> None:
    documented = text("sectors", "RETURN")
    del documented["actions"]
    chunk = RemappedChunk(3, 384, 128, 0, 7, 120, 5, [(390, 2)])
    report = RemapReport(Plan("data", after={"generation": 4}), [chunk])
    check_keys(documented, describe_remap(report), "sectors")


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_the_common_attributes(module: str) -> None:
    documentation = text(module, "DOCUMENTATION")
    assert documentation["extends_documentation_fragment"] == ["dm_remap.storage.attributes"]
    groups = yaml.safe_load((ROOT / "meta" / "runtime.yml").read_text())["action_groups"]
    assert module in groups["storage"]
