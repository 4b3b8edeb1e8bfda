# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A controller in a folder: the collection, with a stand-in for `sectors`, and an inventory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


class Controller:
    """Ansible as a user has it.

    Args:
        root: an empty folder for the collection, the inventory and the record.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.record = root / "record"
        self.record.mkdir()
        target = root / "ansible_collections" / "dm_remap" / "storage"
        for name in ("meta", "playbooks", "plugins", "roles", "extensions/eda"):
            shutil.copytree(ROOT / name, target / name)
        shutil.copy(ROOT / "galaxy.yml", target)
        shutil.copy(HERE / "sectors.py", target / "plugins" / "modules")
        self.environment = {
            **os.environ,
            "PATH": str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"],
            "ANSIBLE_COLLECTIONS_PATH": str(root),
            "DM_REMAP_LOOP_DIRECTORY": str(self.record),
        }
        self.inventory = root / "inventory"
        self.inventory.mkdir()

    def add_hosts(self, *names: str, **variables: object) -> None:
        """Write an inventory of hosts that are all this machine."""
        common = {
            "ansible_connection": "local",
            "ansible_python_interpreter": sys.executable,
            "ansible_become": False,
            **variables,
        }
        hosts = {"all": {"hosts": dict.fromkeys(names, common)}}
        (self.inventory / "hosts.json").write_text(json.dumps(hosts))

    def play(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run ansible-playbook on the inventory; what it printed is all in `stdout`."""
        return subprocess.run(
            ["ansible-playbook", "--inventory", str(self.inventory), *arguments],
            env=self.environment,
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def open_gate(self) -> None:
        """Let the playbooks' tasks pass."""
        (self.record / "gate").unlink(missing_ok=True)
        (self.record / "gate").touch()

    def close_gate(self) -> None:
        """Let the playbooks' tasks wait in their middle."""
        (self.record / "gate").unlink(missing_ok=True)
        os.mkfifo(self.record / "gate")

    def calls(self, what: str) -> list[dict]:
        """Return the calls of `sectors` that were `begun` or `done`, in their order."""
        path = self.record / what
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]
