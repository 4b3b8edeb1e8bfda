# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The parts of the role `host` that need no host of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.loop.controller import ROOT, Controller

pytestmark = pytest.mark.loop

ROLE = ROOT / "roles" / "host"
PLAY = [
    {
        "hosts": "all",
        "gather_facts": False,
        "tasks": [
            {
                "ansible.builtin.include_role": {
                    "name": "dm_remap.storage.host",
                    "tasks_from": "controller.yml",
                    "rolespec_validate": False,
                }
            }
        ],
    }
]


@pytest.fixture
def controller(tmp_path: Path) -> Controller:
    made = Controller(tmp_path)
    made.environment["HOME"] = str(tmp_path / "home")
    (tmp_path / "home").mkdir()
    (tmp_path / "play.json").write_text(json.dumps(PLAY))
    return made


def tell(controller: Controller, *arguments: str, **variables: str) -> Path:
    """Let the role write what a host that has credentials is followed by; returns the home."""
    for name in ("ca.crt", "token"):
        (controller.root / name).write_text(f"its {name}")
    return tell_again(controller, *arguments, **variables)


def tell_again(controller: Controller, *arguments: str, **variables: str) -> Path:
    places = {
        "__host_authority": str(controller.root / "ca.crt"),
        "__host_token": str(controller.root / "token"),
    }
    done = controller.play(
        "play.json", "--extra-vars", json.dumps({**places, **variables}), *arguments
    )
    assert done.returncode == 0, done.stdout
    return controller.root / "home"


def test_the_files_of_a_host_are_written_for_the_user(controller: Controller) -> None:
    urls = {
        "db1.example.org": "https://db1.example.org:9741",
        "192.0.2.5": "https://192.0.2.5:9741",
        "2001:db8::5": "https://[2001:db8::5]:9741",
    }
    controller.add_hosts(*urls, ansible_host="{{ inventory_hostname }}")
    hosts = tell(controller) / ".config" / "dm-remap" / "hosts"
    for name, url in urls.items():
        assert json.loads((hosts / f"{name}.json").read_text()) == {
            "name": name,
            "url": url,
            "ca_file": str(hosts / f"{name}.ca"),
            "token_file": str(hosts / f"{name}.token"),
        }
        assert (hosts / f"{name}.ca").read_text() == "its ca.crt"
        assert (hosts / f"{name}.token").read_text() == "its token"
    assert {path.stat().st_mode & 0o777 for path in hosts.iterdir()} == {0o600}


def test_a_directory_may_begin_with_the_home_directory(controller: Controller) -> None:
    controller.add_hosts("db1")
    home = tell(controller, host_controller_directory="~/somewhere")
    entry = json.loads((home / "somewhere" / "db1.json").read_text())
    assert entry["ca_file"] == str(home / "somewhere" / "db1.ca")
    assert entry["token_file"] == str(home / "somewhere" / "db1.token")


def test_check_mode_bears_a_token_that_was_removed_to_be_replaced(controller: Controller) -> None:
    controller.add_hosts("db1")
    hosts = tell(controller) / ".config" / "dm-remap" / "hosts"
    (controller.root / "token").unlink()
    tell_again(controller, "--check")
    assert (hosts / "db1.token").read_text() == "its token"


def test_the_core_is_never_run_in_an_older_form(tmp_path: Path) -> None:
    handlers = yaml.safe_load((ROLE / "handlers" / "main.yml").read_text())
    command = handlers[0]["ansible.builtin.command"]["argv"]
    place = str(tmp_path / "package")
    compile_core = [place if "__host_package" in word else word for word in command]
    module = tmp_path / "package" / "module.py"
    module.parent.mkdir()

    def write_and_run(text: str, compiled: bool) -> str:
        module.write_text(f"print('{text}')\n")
        # As the archive has it: another file of the same size and time.
        os.utime(module, (0, 0))
        if compiled:
            subprocess.run(compile_core, check=True)
        run = [command[0], "-B", "-c", f"import sys; sys.path.insert(0, {place!r}); import module"]
        return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()

    assert write_and_run("one", True) == "one"
    assert list(module.parent.glob("__pycache__/*.pyc"))
    assert write_and_run("two", True) == "two"
    # Where the play broke off before its handlers.
    assert write_and_run("six", False) == "six"


def test_the_command_finds_the_core_where_the_role_puts_it() -> None:
    variables = yaml.safe_load((ROLE / "vars" / "main.yml").read_text())
    place, name = os.path.split(variables["__host_package"])
    command = (ROLE / "files" / "dm-remapd").read_text()
    assert re.search(r"sys\.path\.insert\(0, \"(.*)\"\)", command)[1] == place
    assert f"from {name}.daemon import main" in command
    assert "dist-packages" not in place
    handlers = yaml.safe_load((ROLE / "handlers" / "main.yml").read_text())
    assert command.startswith("#!" + handlers[0]["ansible.builtin.command"]["argv"][0] + "\n")


@pytest.mark.parametrize("service", ["dm-remapd", "dm-remap-healer"])
def test_the_service_starts_where_the_kernel_lacks_a_path(service: str) -> None:
    unit = (ROLE / "files" / f"{service}.service").read_text()
    paths = re.findall(r"^Read(?:Write|Only)Paths=(.*)$", unit, re.MULTILINE)
    words = [word for line in paths for word in line.split()]
    assert "-/sys/kernel/tracing" in words
    assert [word for word in words if not word.startswith("-")] == ["/sys"]
