# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs the collection's modules in a guest, as a user does by ansible-playbook over SSH."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import weakref
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.lab import Machine

ROOT = Path(__file__).resolve().parents[2]
PLAYBOOKS = Path(__file__).with_name("playbooks")
PROGRAMS = Path(__file__).with_name("programs")
# In the guest.
PLACE = "/opt/dm-remap-modules"
NOBODY = 65534
PLAY_SECONDS = 900
UNPRIVILEGED = "tester"

_equipped: weakref.WeakSet[Machine] = weakref.WeakSet()


@dataclass(frozen=True)
class Step:
    """One call of a module.

    Args:
        id: the name under which its result is returned.
        module: ``target``, ``sectors`` or ``info``.
        args: the module's arguments.
        check: run it in check mode.
        host: ``guest`` for root, or ``unprivileged``.
    """

    id: str
    module: str
    args: dict[str, Any] = field(default_factory=dict)
    check: bool = False
    host: str = "guest"


class Player:
    """Runs steps in one guest.

    Args:
        machine: the guest.
        directory: an empty directory for inventory, arguments and results.
    """

    def __init__(self, machine: Machine, directory: Path) -> None:
        self._machine = machine
        self._directory = directory
        self._inventory = directory / "inventory.json"
        self._configuration = directory / "ansible.cfg"
        self._configuration.write_text("", "ascii")
        lay_out_collection()

    def run(self, *steps: Step) -> dict[str, dict[str, Any]]:
        """Run ``steps`` in one play, those after a failed one too.

        Returns:
            Each step's result by its id; ``failed`` is there where the module failed.
        """
        self._write_inventory()
        arguments = self._directory / "steps.json"
        arguments.write_text(json.dumps({"steps": [asdict(step) for step in steps]}), "utf-8")
        results = self._directory / "results.jsonl"
        results.unlink(missing_ok=True)
        done = subprocess.run(
            [
                str(Path(sys.executable).with_name("ansible-playbook")),
                f"--inventory={self._inventory}",
                f"--extra-vars=@{arguments}",
                str(PLAYBOOKS / "steps.yml"),
            ],
            check=False,
            capture_output=True,
            text=True,
            timeout=PLAY_SECONDS,
            env=self._environment(results),
            cwd=self._directory,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        lines = results.read_text("utf-8").splitlines()
        found = {line["id"]: line["result"] for line in map(json.loads, lines)}
        assert [*found] == [step.id for step in steps], done.stdout + done.stderr
        return found

    def play(self, playbook: str, **variables: Any) -> str:
        """Run a playbook of the collection with variables; what it printed."""
        self._write_inventory()
        done = subprocess.run(
            [
                str(Path(sys.executable).with_name("ansible-playbook")),
                f"--inventory={self._inventory}",
                f"--extra-vars={json.dumps(variables)}",
                playbook,
            ],
            check=False,
            capture_output=True,
            text=True,
            timeout=PLAY_SECONDS,
            env=self._environment(self._directory / "results.jsonl"),
            cwd=self._directory,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _write_inventory(self) -> None:
        root = self._machine.inventory()
        # A connection of its own, because the shared one is root's.
        user = {
            **root,
            "ansible_user": UNPRIVILEGED,
            "ansible_ssh_common_args": root["ansible_ssh_common_args"] + " -o ControlPath=none",
        }
        hosts = {"guest": root, "unprivileged": user}
        self._inventory.write_text(json.dumps({"all": {"hosts": hosts}}), "utf-8")

    def _environment(self, results: Path) -> dict[str, str]:
        return {
            **os.environ,
            "ANSIBLE_CONFIG": str(self._configuration),
            "ANSIBLE_HOME": str(self._directory / "ansible"),
            "ANSIBLE_COLLECTIONS_PATH": str(ROOT / ".build"),
            "ANSIBLE_CALLBACK_PLUGINS": str(PLAYBOOKS / "callback_plugins"),
            "ANSIBLE_CALLBACKS_ENABLED": "step_results",
            # The lab's connection, which is open already, is used for root.
            "ANSIBLE_SSH_ARGS": "-C",
            "ANSIBLE_NOCOLOR": "1",
            "STEP_RESULTS": str(results),
        }


def lay_out_collection() -> None:
    """Put the collection where ansible-playbook looks for it."""
    subprocess.run([sys.executable, str(ROOT / "tools" / "lay_out_collection.py")], check=True)


def make_unprivileged_user(machine: Machine) -> None:
    """Let the host ``unprivileged`` be logged in to with root's key."""
    machine.run(
        f"id {UNPRIVILEGED} >/dev/null 2>&1 || useradd --create-home {UNPRIVILEGED}; "
        # sshd lets nobody in whose password is locked, but no password at all is fine.
        f"usermod --password '*' {UNPRIVILEGED}; "
        f"cp -r /root/.ssh /home/{UNPRIVILEGED}/ && "
        f"chown -R {UNPRIVILEGED}: /home/{UNPRIVILEGED}/.ssh"
    )


class ModuleRunner:
    """Runs steps like Player, but in one Python in the guest instead of by ansible-playbook.

    The modules, their argument handling and their results are the same; only Ansible's transport
    is left out, which in an emulated guest takes most of the time.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        if machine not in _equipped:
            # Synced, because a power cut would take it away again.
            machine.run(f"mkdir -p {PLACE} && tar -x -f - -C {PLACE} && sync", input=_archive())
            _equipped.add(machine)

    def run(self, *steps: Step) -> dict[str, dict[str, Any]]:
        """Run ``steps`` one after the other; see Player.run."""
        request = {"steps": [asdict(step) for step in steps], "user": NOBODY}
        done = self._machine.run(
            ["env", f"PYTHONPATH={PLACE}", "python3", f"{PLACE}/run_modules.py"],
            input=json.dumps(request),
            timeout=PLAY_SECONDS,
        )
        results: dict[str, dict[str, Any]] = json.loads(done.stdout)
        return results


def _archive() -> bytes:
    """The modules, the core, and what Ansible's modules need of Ansible."""
    ansible = Path(str(find_spec("ansible").origin)).parent
    plugins = ROOT / "plugins"
    place = "ansible_collections/dm_remap/storage/plugins"
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(PROGRAMS / "run_modules.py", "run_modules.py")
        archive.addfile(tarfile.TarInfo("ansible/__init__.py"))
        archive.add(ansible / "module_utils", "ansible/module_utils", filter=_only_sources)
        for name in ("modules", "module_utils"):
            archive.add(plugins / name, f"{place}/{name}", filter=_only_sources)
    return packed.getvalue()


def _only_sources(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return entry if entry.isdir() or entry.name.endswith(".py") else None
