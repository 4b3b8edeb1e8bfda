# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Reads or writes failing sectors of a target until that works, past the page cache."""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Iterator
from typing import Any

from reports import Listener
from scene import SECTOR_BYTES, answer, arguments, pattern, state

CHUNK_SECTORS = 128
# A request that is not held may be repeated before the healer has seen the first one fail.
ATTEMPTS = 100
# A write that is durable when it ends is another request to the disk than one that is not.
FLAGS = {"read": 0, "write": 0, "durable write": os.O_DSYNC}


def attempt(handle: int, operation: str, sector: int, content: bytes) -> str:
    """Access a sector; `ok` or the error's name."""
    memory = mmap.mmap(-1, SECTOR_BYTES)
    try:
        if operation != "read":
            memory.write(content)
            os.pwritev(handle, [memory], sector * SECTOR_BYTES)
            return "ok"
        os.preadv(handle, [memory], sector * SECTOR_BYTES)
        return "ok" if memory[:] == content else "wrong data"
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def examine(name: str, seed: int, operation: str, sectors: list[int]) -> list[dict[str, Any]]:
    """All attempts at each sector, up to the first that works, and the seconds that they took."""
    handle = os.open(f"/dev/mapper/{name}", os.O_RDWR | os.O_DIRECT | FLAGS[operation])
    found = []
    for sector in sectors:
        content = pattern(seed, sector)
        attempts: list[str] = []
        begun = time.monotonic()
        while "ok" not in attempts and len(attempts) < ATTEMPTS:
            attempts.append(attempt(handle, operation, sector, content))
        found.append({"attempts": attempts, "seconds": time.monotonic() - begun})
    os.close(handle)
    return found


def starts(report: dict[str, Any]) -> Iterator[int]:
    """First sectors of the chunks that a report says were moved."""
    for piece in report.get("moved", ()):
        yield from range(piece["start"], piece["start"] + piece["count"], CHUNK_SECTORS)


def main() -> None:
    """Carry out all steps; what came of them, and what the healer said."""
    given = arguments()
    name = given["name"]
    listener = Listener()
    listener.start()
    steps = [examine(name, given["seed"], *step) for step in given["steps"]]
    moved = {chunk * CHUNK_SECTORS for chunk in state(name)["chunks"]}
    reports = listener.wait(lambda some: moved <= {start for r in some for start in starts(r)})
    answer({"steps": steps, "reports": reports})


main()
