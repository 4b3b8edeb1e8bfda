# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Starts and ends processes by id, never mistaking a reused id for ours."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .paths import LabError

# Children that this process must reap, by id.
_children: dict[int, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True)
class Process:
    """A process: its id, and its start time in clock ticks since boot, which tells reuse apart."""

    pid: int
    started: int

    def alive(self) -> bool:
        """Say whether this very process still runs (a zombie does not)."""
        child = _children.get(self.pid)
        if child is not None and child.poll() is not None:
            return False
        return start_time(self.pid) == self.started

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send the process a signal, if it still is the same one."""
        with contextlib.suppress(ProcessLookupError):
            handle = os.pidfd_open(self.pid)
            try:
                if self.alive():
                    signal.pidfd_send_signal(handle, number)
            finally:
                os.close(handle)

    def wait(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds for the end of the process; say whether it has ended."""
        child = _children.get(self.pid)
        if child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout)
            return child.returncode is not None
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            return not self.alive() or bool(select.select([handle], [], [], timeout)[0])
        finally:
            os.close(handle)


def start_time(pid: int) -> int | None:
    """Return the start time of a live process in clock ticks, or None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("ascii", errors="replace")
    except OSError:
        return None
    # The name in parentheses may hold anything: fields are counted after its end (proc(5)).
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def spawn(command: list[str], cwd: Path, log: Path, detached: bool) -> Process:
    """Start ``command`` in ``cwd`` with its output in ``log``.

    A detached process outlives us. Any other is killed by the kernel when the thread that
    started it ends, so start it from a thread that lives as long as it should.
    """
    if not detached:
        command = ["setpriv", "--pdeathsig", "KILL", *command]
    with open(log, "ab") as output:
        child = subprocess.Popen(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    _children[child.pid] = child
    started = start_time(child.pid)
    if started is None:
        raise LabError(f"{command[0]} ended at once: {tail(log)}")
    return Process(child.pid, started)


def tail(path: Path, lines: int = 30) -> str:
    """Return the last lines of a log, or a word that there is none."""
    try:
        return "\n".join(path.read_text("utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return "(no log)"
