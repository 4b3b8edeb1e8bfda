# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Remaps chunks while processes write numbered blocks into the very chunk.

A writer reads each block before it writes it again: a write that was acknowledged and is not
there has been lost.
"""

from __future__ import annotations

import mmap
import os
import struct
import traceback
from typing import Any

from scene import SECTOR_BYTES, BlockDevice, answer, arguments, remap, state

RUN, STOP = 0, 1


def content(sector: int, number: int, size: int) -> bytes:
    """A block's content after write ``number``."""
    return struct.pack("<QQ", sector, number) * (size // 16)


def write_until_told(path: str, sectors: list[int], stop: Any, ready: int, durable: bool) -> None:
    """Write ``sectors`` round and round, in one more whole round after ``stop`` was set."""
    with BlockDevice(path, writable=True) as device:
        block = device.logical_block // SECTOR_BYTES
        acknowledged = {}
        number = 0
        last = False
        while True:
            for sector in sectors:
                if sector in acknowledged:
                    seen = device.read(sector, block)
                    if seen != acknowledged[sector]:
                        raise AssertionError(
                            f"sector {sector}: {seen[:16].hex()} instead of "
                            f"{acknowledged[sector][:16].hex()}"
                        )
                number += 1
                data = content(sector, number, device.logical_block)
                device.write(sector, data)
                if durable:
                    device.flush()
                acknowledged[sector] = data
            if number == len(sectors):
                os.write(ready, b"r")
            if last:
                break
            last = stop[0] == STOP
        for sector, data in acknowledged.items():
            if device.read(sector, block) != data:
                raise AssertionError(f"sector {sector}: the last write is gone")


def start_writer(path: str, sectors: list[int], stop: Any, durable: bool) -> tuple[int, int]:
    """Fork a writer; its process id and a pipe that has a byte when it is at work."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writable)
        return pid, readable
    code = 1
    try:
        os.close(readable)
        write_until_told(path, sectors, stop, writable, durable)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def race(name: str, chunk: int) -> dict[str, Any]:
    """Remap ``chunk`` under three writers; their exit codes."""
    path = f"/dev/mapper/{name}"
    with BlockDevice(path) as device:
        block = device.logical_block // SECTOR_BYTES
    chunk_sectors = state(name)["chunk_sectors"]
    blocks = list(range(chunk * chunk_sectors, (chunk + 1) * chunk_sectors, block))
    stop = mmap.mmap(-1, 4096)
    writers = [
        start_writer(path, blocks[0::3], stop, durable=False),
        start_writer(path, blocks[1::3], stop, durable=False),
        start_writer(path, blocks[2::3][:4], stop, durable=True),
    ]
    try:
        for _unused, ready in writers:
            if not os.read(ready, 1):
                raise AssertionError("a writer ended before it was at work")
        report = remap(name, [(chunk * chunk_sectors, block)])
    finally:
        stop[0] = STOP
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid, _unused in writers]
        for _unused, ready in writers:
            os.close(ready)
    return {"codes": codes, "lost": report["lost"], "remapped": len(report["chunks"])}


given = arguments()
answer([race(given["name"], chunk) for chunk in given["chunks"]])
