# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Reads or writes failing sectors of a target until that works, past the page cache."""

from __future__ import annotations

import errno
import mmap
import os
from typing import Any

from scene import SECTOR_BYTES, answer, arguments, pattern

# A request that is not held may be repeated before the healer has seen the first one fail.
ATTEMPTS = 100


def attempt(handle: int, operation: str, sector: int, content: bytes) -> str:
    """Access a sector; `ok` or the error's name."""
    memory = mmap.mmap(-1, SECTOR_BYTES)
    try:
        if operation == "write":
            memory.write(content)
            os.pwritev(handle, [memory], sector * SECTOR_BYTES)
            return "ok"
        os.preadv(handle, [memory], sector * SECTOR_BYTES)
        return "ok" if memory[:] == content else "wrong data"
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def examine(given: dict[str, Any]) -> list[list[str]]:
    """All attempts at each sector, up to the first that works."""
    handle = os.open(f"/dev/mapper/{given['name']}", os.O_RDWR | os.O_DIRECT)
    found = []
    for sector in given["sectors"]:
        content = pattern(given["seed"], sector)
        attempts: list[str] = []
        while "ok" not in attempts and len(attempts) < ATTEMPTS:
            attempts.append(attempt(handle, given["operation"], sector, content))
        found.append(attempts)
    os.close(handle)
    return found


answer(examine(arguments()))
