# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Reads the storm's files from the disk, while they are in use; what failed.

Of the victims' file only a part is read, so that its sectors are met one after the other.
"""

from __future__ import annotations

import glob
import mmap
import os
import subprocess
from typing import Any

from scene import answer, arguments

PIECE_BYTES = 1 << 16
TOLD = ("Failing path", "Reinstating path", "EXT4-fs", "JBD2")


def read_file(path: str) -> list[str]:
    """Read a file to its end; what failed. It may vanish meanwhile."""
    try:
        with open(path, "rb", buffering=0) as file:
            while file.read(PIECE_BYTES):
                pass
    except FileNotFoundError:
        pass
    except OSError as error:
        return [f"{path}: {error}"]
    return []


def read_victims(path: str, part: int, parts: int) -> int:
    """Read a part of the victims past the page cache; how many pieces failed."""
    failed = 0
    handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
    memory = mmap.mmap(-1, PIECE_BYTES)
    pieces = range(0, os.fstat(handle).st_size, PIECE_BYTES)
    for offset in pieces[part::parts]:
        try:
            os.preadv(handle, [memory], offset)
        except OSError:
            failed += 1
    os.close(handle)
    return failed


def sweep(given: dict[str, Any]) -> dict[str, Any]:
    """Read everything."""
    errors: list[str] = []
    if given["database"]:
        # What was changed in memory is written now.
        (psql,) = glob.glob("/usr/lib/postgresql/*/bin/psql")
        command = [psql, "-h", given["socket"], "-U", "postgres", "-qc", "CHECKPOINT"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        errors += [done.stderr] if done.returncode else []
    with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
        file.write("1")
    victims = os.path.join(given["mount"], "victims")
    failed = read_victims(victims, given["part"], given["parts"])
    for folder, _folders, files in os.walk(given["mount"]):
        for name in files:
            path = os.path.join(folder, name)
            if path != victims:
                errors += read_file(path)
    log = subprocess.run(["dmesg", "-c"], check=True, capture_output=True, text=True).stdout
    kernel = [line for line in log.splitlines() if any(word in line for word in TOLD)]
    return {"errors": errors, "victims": failed, "kernel": kernel}


answer(sweep(arguments()))
