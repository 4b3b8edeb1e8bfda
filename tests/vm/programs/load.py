# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Remaps chunks of a mounted filesystem, one after the other, under a verifying load.

fio runs again and again, each time to the end of its verification, until the remaps are done.
"""

from __future__ import annotations

import os
import subprocess
import threading
from typing import Any

from scene import answer, arguments, remap, state

MOUNT = "/mnt/load"
MAKE = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"]}
CHECK = {"ext4": ["e2fsck", "-f", "-n"], "xfs": ["xfs_repair", "-n"]}
# The rates leave some of an emulated processor to the remaps.
COMMON = "--verify=crc32c --verify_fatal=1 --verify_backlog=64 --rw=randrw --rwmixread=40".split()
LOADS = {
    "direct": "--rate_iops=150 --ioengine=libaio --iodepth=8 --direct=1 --bs=4k --size=6m",
    "buffered": "--rate_iops=100 --ioengine=psync --fsync=16 --bsrange=1k-16k --size=4m",
}


class Load(threading.Thread):
    """One fio job after the other until told to stop."""

    def __init__(self, kind: str, signal: str) -> None:
        super().__init__()
        self.kind = kind
        self.signal = signal
        self.stopping = threading.Event()
        self.runs = 0
        self.failure = ""

    def run(self) -> None:
        while not self.stopping.is_set() and not self.failure:
            command = ["fio", f"--name={self.kind}", f"--directory={MOUNT}", *COMMON]
            command += [*LOADS[self.kind].split(), f"--randseed={self.runs + 1}"]
            if not self.runs:
                command.append(f"--exec_prerun=echo started > {self.signal}")
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/tmp")
            self.runs += 1
            if done.returncode or "verify:" in done.stderr + done.stdout:
                self.failure = f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"


def run(command: list[str]) -> None:
    """Run a command that must work."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def begin(kind: str) -> Load:
    """Start a load and wait until its first job is at work."""
    signal = f"/run/load-{kind}"
    os.mkfifo(signal)
    try:
        load = Load(kind, signal)
        load.start()
        with open(signal, encoding="ascii") as file:
            file.read()
    finally:
        os.unlink(signal)
    return load


def walk(name: str, filesystem: str, chunks: list[int]) -> dict[str, Any]:
    """Do it all; what came of it."""
    path = f"/dev/mapper/{name}"
    run([*MAKE[filesystem], path])
    os.makedirs(MOUNT, exist_ok=True)
    run(["mount", path, MOUNT])
    chunk_sectors = state(name)["chunk_sectors"]
    loads, reports, working = [], [], []
    try:
        loads += [begin(kind) for kind in LOADS]
        for chunk in chunks:
            working.append(all(load.is_alive() for load in loads))
            reports.append(remap(name, [(chunk * chunk_sectors, 1)]))
    finally:
        for load in loads:
            load.stopping.set()
        for load in loads:
            load.join()
        run(["umount", MOUNT])
    check = subprocess.run([*CHECK[filesystem], path], capture_output=True, text=True, check=False)
    return {
        "lost": [item for report in reports for item in report["lost"]],
        "pauses": [report["pause_seconds"] for report in reports],
        "seconds": [report["seconds"] for report in reports],
        "always_loaded": all(working),
        "runs": {load.kind: load.runs for load in loads},
        "failures": {load.kind: load.failure for load in loads if load.failure},
        "check": [check.returncode, check.stdout + check.stderr],
        **state(name),
    }


if __name__ == "__main__":
    given = arguments()
    answer(walk(given["name"], given["filesystem"], given["chunks"]))
