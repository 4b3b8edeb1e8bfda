# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Runs small programs on the core inside a guest, arguments and results as JSON."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import weakref
from pathlib import Path
from typing import Any

from tests.lab import Machine
from tests.lab.machine import shell_text

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "plugins" / "module_utils"
PROGRAMS = Path(__file__).with_name("programs")
# In the guest: PLACE/dm_remap is the core, PLACE/programs are the programs.
PLACE = "/opt/dm-remap-tests"
PROGRAM_SECONDS = 900.0

_equipped: weakref.WeakSet[Machine] = weakref.WeakSet()


class ProgramFailed(AssertionError):
    """A program in the guest ended with an error; the text has its output."""


def _archive() -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for folder, name in ((CORE, "dm_remap"), (PROGRAMS, "programs")):
            for path in sorted(folder.glob("*.py")):
                archive.add(path, arcname=f"{name}/{path.name}")
    return packed.getvalue()


def equip(machine: Machine) -> None:
    """Put the core and the programs into the guest, once for each machine."""
    if machine in _equipped:
        return
    # Synced, because a power cut would take it away again.
    machine.run(
        f"mkdir -p {PLACE} && tar -x -f - -C {PLACE} && modprobe dm-integrity && sync",
        input=_archive(),
    )
    _equipped.add(machine)


def _command(program: str) -> list[str]:
    return ["env", f"PYTHONPATH={PLACE}", "python3", f"{PLACE}/programs/{program}.py"]


class Running:
    """A program that runs in the guest and tells how far it is, a JSON document a line."""

    def __init__(self, machine: Machine, program: str, arguments: dict[str, Any]) -> None:
        self._program = program
        self._process = subprocess.Popen(
            [*machine.ssh_command("-T"), "--", shell_text(_command(program))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(arguments))
        self._process.stdin.close()

    def next(self) -> Any:
        """The next document; waits for it."""
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            raise ProgramFailed(f"{self._program} ended early:\n{self._process.stderr.read()}")
        return json.loads(line)

    def forget(self) -> None:
        """Close the connection, also to a guest that is gone."""
        self._process.kill()
        self._process.wait(60)
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()


class Guest:
    """The core inside a machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        equip(machine)

    def call(self, program: str, **arguments: Any) -> Any:
        """Run ``programs/PROGRAM.py`` and return what it printed.

        Raises:
            ProgramFailed: it ended with an error.
        """
        done = self.machine.run(
            _command(program), check=False, input=json.dumps(arguments), timeout=PROGRAM_SECONDS
        )
        if done.rc:
            raise ProgramFailed(f"{program}: exit code {done.rc}\n{done.stdout}\n{done.stderr}")
        return json.loads(done.stdout)

    def begin(self, program: str, **arguments: Any) -> Running:
        """Start ``programs/PROGRAM.py`` and return a handle to what it tells."""
        return Running(self.machine, program, arguments)

    def path(self, disk: str) -> str:
        """A disk's stable name in the guest."""
        return self.machine.disk(disk).path
