# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From a trace line to the playbook's task: daemon, event source, rulebook and playbook for real.

Only the kernel is missing: the trace is a FIFO, and the task's module is a stand-in.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dm_remap import credentials
from tests.lab.process import Process, start_time
from tests.loop.controller import Controller
from tests.loop.daemon_process import NAME
from tests.unit.daemon_scene import Scene

HERE = Path(__file__).resolve().parent
SECONDS = 120

pytestmark = pytest.mark.loop


class Loop:
    """A controller and a host on this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.host = root / "host"
        for folder in (self.host, root / "hosts"):
            folder.mkdir()
        self.controller = Controller(root)
        # The rulebook must limit its playbooks to one of them.
        self.controller.add_hosts("db1", "db2")
        self.scene = Scene(self.host)
        self.port = 0
        self.daemon: subprocess.Popen | None = None
        self.rulebook: subprocess.Popen | None = None
        self.variables = {
            "dm_remap_hosts_directory": str(root / "hosts"),
            "dm_remap_cursor_directory": str(root / "cursors"),
            "drools_db_file_path": str(root / "engine"),
        }

    # The host

    def start_daemon(self) -> None:
        """Start the daemon, at the port of the last time, and let the controller know it."""
        self.daemon = subprocess.Popen(
            [sys.executable, str(HERE / "daemon_process.py"), str(self.host), str(self.port)],
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port = int(self.daemon.stdout.readline())
        entry = {
            "name": "db1",
            "url": f"https://localhost:{self.port}",
            "ca_file": credentials.authority_path(self.scene.settings),
            "token_file": self.scene.settings.token_file,
        }
        (self.root / "hosts" / "db1.json").write_text(json.dumps(entry))

    def kill_daemon(self) -> None:
        """End the daemon as a power cut would."""
        self.daemon.kill()
        self.daemon.wait()
        self.daemon.stdout.close()

    def fail(self, sector: int) -> None:
        """Let the kernel report a failed read."""
        self.scene.fail_read(sector)

    # The controller

    def start_rulebook(self, *options: str) -> None:
        """Start the rulebook of the collection."""
        (self.root / "variables.json").write_text(json.dumps(self.variables))
        self.log = open(self.root / "rulebook.log", "ab")  # noqa: SIM115
        self.rulebook = subprocess.Popen(
            [
                *("ansible-rulebook", "--rulebook", "dm_remap.storage.heal"),
                *("--inventory", str(self.controller.inventory)),
                *("--vars", str(self.root / "variables.json")),
                *(options or ("--persistence-id", "1")),
            ],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=self.controller.environment,
            cwd=self.root,
        )

    def kill_rulebook(self) -> None:
        """End the rule engine and its playbooks as a power cut would."""
        # Playbooks run in sessions of their own, but all have this test's variable.
        while found := self._processes():
            for process in found:
                process.kill()
            self.rulebook.wait()
        self.log.close()

    def _processes(self) -> list[Process]:
        marker = f"DM_REMAP_LOOP_DIRECTORY={self.controller.record}\0".encode()
        found = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            pid = int(environment.parent.name)
            started = start_time(pid)
            with contextlib.suppress(OSError):
                if started is not None and marker in environment.read_bytes():
                    found.append(Process(pid, started))
        return found

    def log_text(self) -> str:
        """Return what the rulebook printed."""
        return (self.root / "rulebook.log").read_text(errors="replace")

    def sectors(self, what: str) -> list[int]:
        """Return the sectors of the calls that were `begun` or `done`, in their order."""
        return [item["start"] for call in self.controller.calls(what) for item in call["ranges"]]

    def cursor(self) -> int:
        """Return the event source's cursor, 0 if there is none."""
        path = self.root / "cursors" / "db1.json"
        return json.loads(path.read_text())["position"] if path.exists() else 0

    def wait_until(self, condition) -> None:
        """Poll until a condition holds."""
        end = time.monotonic() + SECONDS
        while not condition():
            if self.rulebook is not None and self.rulebook.poll() is not None:
                pytest.fail(f"the rulebook ended:\n{self.log_text()}")
            if time.monotonic() > end:
                pytest.fail(f"{SECONDS} seconds were not enough:\n{self.log_text()}")
            time.sleep(0.05)

    def close(self) -> None:
        """End what still runs."""
        if self.rulebook is not None:
            self.kill_rulebook()
        if self.daemon is not None:
            self.kill_daemon()
        self.scene.close()


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    made = Loop(tmp_path)
    yield made
    made.close()


def test_nothing_is_lost_and_nothing_is_done_twice(loop):
    loop.controller.close_gate()
    loop.start_daemon()
    for sector in (100, 200, 300):
        loop.fail(sector)
    loop.start_rulebook()
    # The first playbook is in the middle of its task; the others wait for the host's lock.
    loop.wait_until(lambda: loop.sectors("begun"))
    loop.kill_rulebook()
    assert loop.sectors("done") == []

    # While the controller is away, the host fails on, and its daemon dies too.
    loop.kill_daemon()
    loop.fail(400)
    loop.start_daemon()
    loop.controller.open_gate()
    loop.start_rulebook()
    loop.wait_until(lambda: set(loop.sectors("done")) == {100, 200, 300, 400})
    assert sorted(loop.sectors("done")) == [100, 200, 300, 400]

    # Another crash in the middle of a task: only that one is done again.
    loop.controller.close_gate()
    loop.fail(450)
    loop.wait_until(lambda: 450 in loop.sectors("begun"))
    loop.kill_rulebook()
    loop.fail(500)
    loop.controller.open_gate()
    loop.start_rulebook()
    loop.wait_until(lambda: {450, 500} <= set(loop.sectors("done")))
    assert sorted(loop.sectors("done")) == [100, 200, 300, 400, 450, 500]

    # The daemon comes back while the rulebook runs, and is followed again.
    loop.kill_daemon()
    loop.start_daemon()
    loop.fail(600)
    loop.wait_until(lambda: 600 in loop.sectors("done"))
    assert sorted(loop.sectors("done")) == [100, 200, 300, 400, 450, 500, 600]
    assert {call["name"] for call in loop.controller.calls("begun")} == {NAME}
    assert "[db2]" not in loop.log_text()
    assert "[localhost]" not in loop.log_text()


def test_acknowledgements_without_a_database_are_refused(loop):
    del loop.variables["drools_db_file_path"]
    loop.controller.open_gate()
    loop.start_daemon()
    loop.fail(100)
    loop.start_rulebook()
    assert loop.rulebook.wait(SECONDS) != 0
    assert "feedback needs persistence" in loop.log_text()
    assert loop.cursor() == 0
    assert loop.sectors("begun") == []
