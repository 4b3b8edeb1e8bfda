# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""fio jobs that verify what they wrote, one after the other until told to stop."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

# The rates leave some of an emulated processor to the remaps.
COMMON = "--verify=crc32c --verify_fatal=1 --verify_backlog=64 --rw=randrw --rwmixread=40".split()
LOADS = {
    "direct": "--rate_iops=150 --ioengine=libaio --iodepth=8 --direct=1 --bs=4k --size=6m",
    "buffered": "--rate_iops=100 --ioengine=psync --fsync=16 --bsrange=1k-16k --size=4m",
}


class Load(threading.Thread):
    """One fio job after the other until told to stop.

    Args:
        kind: a key of LOADS.
        directory: where its file is.
        signal: a fifo that is told when the first job is at work.
    """

    def __init__(self, kind: str, directory: str, signal: str) -> None:
        super().__init__()
        self.kind = kind
        self.directory = directory
        self.signal = signal
        self.stopping = threading.Event()
        self.runs = 0
        self.failure = ""

    def run(self) -> None:
        while not self.stopping.is_set() and not self.failure:
            command = job(self.kind, self.directory) + [f"--randseed={self.runs + 1}"]
            if not self.runs:
                command.append(f"--exec_prerun=echo started > {self.signal}")
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/tmp")
            self.runs += 1
            if done.returncode or "verify:" in done.stderr + done.stdout:
                self.failure = f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"


def job(kind: str, directory: str) -> list[str]:
    """The command line of a job; its file is ``DIRECTORY/KIND.0.0``."""
    return ["fio", f"--name={kind}", f"--directory={directory}", *COMMON, *LOADS[kind].split()]


def begin(kind: str, directory: str) -> Load:
    """Start a load and wait until its first job is at work."""
    signal = f"/run/load-{kind}"
    os.mkfifo(signal)
    try:
        load = Load(kind, directory, signal)
        load.start()
        with open(signal, encoding="ascii") as file:
            file.read()
    finally:
        os.unlink(signal)
    return load


@contextlib.contextmanager
def loaded(directory: str) -> Iterator[list[Any]]:
    """Run a load of each kind while the block runs, and let all in the list end with it.

    The block may add others that have ``stopping`` and ``join``.
    """
    loads: list[Any] = []
    try:
        for kind in LOADS:
            loads.append(begin(kind, directory))
        yield loads
    finally:
        for load in loads:
            load.stopping.set()
        for load in loads:
            load.join()
