# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Remaps chunks of a mounted filesystem, one after the other, under a verifying load.

fio runs again and again, each time to the end of its verification, until the remaps are done.
"""

from __future__ import annotations

import os
import subprocess
from typing import Any

from fio import loaded
from scene import answer, arguments, remap, state

MOUNT = "/mnt/load"
MAKE = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"]}
CHECK = {"ext4": ["e2fsck", "-f", "-n"], "xfs": ["xfs_repair", "-n"]}


def run(command: list[str]) -> None:
    """Run a command that must work."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def walk(name: str, filesystem: str, chunks: list[int]) -> dict[str, Any]:
    """Do it all; what came of it."""
    path = f"/dev/mapper/{name}"
    run([*MAKE[filesystem], path])
    os.makedirs(MOUNT, exist_ok=True)
    run(["mount", path, MOUNT])
    chunk_sectors = state(name)["chunk_sectors"]
    reports, working = [], []
    try:
        with loaded(MOUNT) as loads:
            for chunk in chunks:
                working.append(all(load.is_alive() for load in loads))
                reports.append(remap(name, [(chunk * chunk_sectors, 1)]))
    finally:
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
