# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The remap playbook by hand, and what the rulebook hands to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from tests.loop.controller import ROOT, Controller

pytestmark = pytest.mark.loop

REMAP = {"remap_target": "1e5", "remap_ranges": [{"start": 8, "count": 1}]}


@pytest.fixture
def controller(tmp_path: Path) -> Controller:
    made = Controller(tmp_path)
    made.open_gate()
    return made


def remap(controller: Controller, host: str | None, *arguments: str):
    variables = REMAP if host is None else {**REMAP, "remap_host": host}
    return controller.play(
        "dm_remap.storage.remap", "--extra-vars", json.dumps(variables), *arguments
    )


@pytest.mark.parametrize("arguments", [[], ["--limit", "db1"]])
def test_a_remap_by_hand(controller: Controller, arguments: list[str]) -> None:
    controller.add_hosts("db1", "db2")
    done = remap(controller, "db1", *arguments)
    assert done.returncode == 0, done.stdout
    assert [call["name"] for call in controller.calls("done")] == ["1e5"]


@pytest.mark.parametrize(
    ("hosts", "host", "arguments"),
    [
        (["db1", "db2"], "bd1", []),
        (["db1", "db2"], "db1", ["--limit", "db2"]),
        (["db1", "db2"], "all", []),
        (["db1", "db2"], None, []),
        ([], "db1", []),
    ],
)
def test_a_host_that_nothing_would_be_done_for_is_refused(
    controller: Controller, hosts: list[str], host: str | None, arguments: list[str]
) -> None:
    controller.add_hosts(*hosts)
    done = remap(controller, host, *arguments)
    assert done.returncode != 0
    assert f"remap_host is {host or 'not set'}" in done.stdout
    assert controller.calls("begun") == []


RULEBOOK = yaml.safe_load((ROOT / "extensions/eda/rulebooks/heal.yml").read_text())
ACTION = RULEBOOK[0]["rules"][0]["action"]["run_playbook"]


@given(
    host=st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.:\-]{0,252}", fullmatch=True),
    target=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+\-]{0,95}", fullmatch=True),
)
@example(host="10", target="2024.10")
@example(host="1e5", target="1_000")
@example(host="None", target="True")
@example(host="0x10", target="1+1j")
def test_names_reach_the_playbook_as_they_are(host: str, target: str) -> None:
    from ansible_rulebook.util import substitute_variables

    ranges = [{"start": 8, "count": 1}]
    context = {"event": {"host": host, "target": target, "ranges": ranges}}
    found = substitute_variables({**ACTION["extra_vars"], "lock": ACTION["lock"]}, context)
    assert found == {
        "remap_host": host,
        "remap_target": target,
        "remap_ranges": ranges,
        "lock": host,
    }
