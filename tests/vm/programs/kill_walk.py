# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Kills a remap with SIGKILL after each of its steps and lets the next command tidy up.

While the remap is dead an application reads, writes and flushes, and must come to an end.
"""

from __future__ import annotations

import os
import select
import signal
import traceback
from typing import Any

from scene import (
    LOST_OFFSET,
    BlockDevice,
    Engine,
    answer,
    arguments,
    meddling,
    new_content,
    pattern,
    present,
    problems,
    remap,
    state,
    written_by,
)

APPLICATION_SECONDS = 120
READ_OFFSET, WRITE_OFFSET = 96, 104


def start_remap(name: str, start: int, last: str) -> int:
    """Fork a remap that stays at step ``last`` until it is killed; returns its process id."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:

            def reached(done: str) -> None:
                if done == last:
                    os.write(writable, b"r")
                    signal.pause()

            remap(name, [(start, 1)], step=meddling(name, start, reached))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writable)
    arrived = os.read(readable, 1)
    os.close(readable)
    if not arrived:
        os.waitpid(pid, 0)
        raise AssertionError(f"the remap ended before step {last}")
    return pid


def start_application(path: str, seed: int, start: int) -> int:
    """Fork a process that writes, flushes and reads in the chunk; returns its process id."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with BlockDevice(path, writable=True) as device:
                os.write(writable, b"b")
                sector = start + WRITE_OFFSET
                device.write(sector, new_content(sector, device.logical_block))
                device.flush()
                sector = start + READ_OFFSET
                block = device.logical_block // 512
                code = 0 if device.read(sector, block) == pattern(seed, sector, block) else 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writable)
    os.read(readable, 1)
    os.close(readable)
    return pid


def end_of(pid: int) -> str:
    """How the application ended, or that it has not."""
    handle = os.pidfd_open(pid)
    try:
        if not select.select([handle], [], [], APPLICATION_SECONDS)[0]:
            return "stuck"
    finally:
        os.close(handle)
    return str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def frozen(name: str) -> str:
    """Whether the freezing device delays I/O, or what else it is."""
    mapper = Engine()._mapper
    device = mapper.info(f"{name}-frozen")
    if device is None or not device.live_table:
        return "none"
    return mapper.table(device.name)[0].target


def kill_after(given: dict[str, Any], steps: list[str], last: str, chunk: int) -> dict[str, Any]:
    """Kill the remap of ``chunk`` after step ``last``, tidy up, and look at everything."""
    name, seed = given["name"], given["seed"]
    path = f"/dev/mapper/{name}"
    before = state(name)
    length = before["chunk_sectors"]
    start = chunk * length
    pid = start_remap(name, start, last)
    application = start_application(path, seed, start)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    left = frozen(name)
    actions = present(name, given["main"], given["spares"])
    again = present(name, given["main"], given["spares"])
    ended = end_of(application)
    after = state(name)
    with BlockDevice(path) as device:
        size = device.logical_block
    changed = written_by(steps, last, start, size)
    changed[start + WRITE_OFFSET] = new_content(start + WRITE_OFFSET, size)
    lost = set(range(start + LOST_OFFSET, start + LOST_OFFSET + size // 512)) - set(changed)
    around = [(start - length, 3 * length)]
    wrong = problems(path, seed, around, lost, changed)
    if chunk not in after["chunks"]:
        remap(name, [(start, 1)])
        wrong += problems(path, seed, around, lost, changed)
    return {
        "step": last,
        "left": left,
        "actions": actions,
        "again": again,
        "application": ended,
        "generations": after["generation"] - before["generation"],
        "remapped": chunk in after["chunks"],
        "lost": start + LOST_OFFSET in after["lost"],
        "interrupted": after["interrupted"],
        "damaged": after["damaged"],
        "wrong": wrong,
        "chunk_in_the_end": chunk in state(name)["chunks"],
    }


given = arguments()
names = given["steps"]
answer(
    [
        kill_after(given, names, last, given["first_chunk"] + 2 * number)
        for number, last in enumerate(names)
    ]
)
