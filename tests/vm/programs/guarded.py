# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Kills a guarded remap while I/O is frozen: an application continues without any command."""

from __future__ import annotations

import os
import signal

from scene import HASTY, BlockDevice, Engine, answer, arguments, new_content, problems, state

given = arguments()
name, seed, last, chunk = given["name"], given["seed"], given["last"], given["chunk"]
before = state(name)
start = chunk * before["chunk_sectors"]
readable, writable = os.pipe()
pid = os.fork()
if pid == 0:

    def step(done: str) -> None:
        """Stay at the last step until the signal comes."""
        if done == last:
            os.write(writable, b"r")
            os.close(writable)
            signal.pause()

    engine = Engine(step=step, guard=True)
    with engine.locked(name):
        engine.remap(name, [(start, 1)], patience=HASTY)
    os._exit(1)
os.close(writable)
os.read(readable, 1)
os.kill(pid, signal.SIGKILL)
os.waitpid(pid, 0)
with BlockDevice(f"/dev/mapper/{name}", writable=True) as device:
    # Both wait until the guard has ended the freeze; nothing else will.
    device.write(start, new_content(start, device.logical_block))
    device.flush()
    size = device.logical_block
with Engine().locked(name):
    after = state(name)
wrong = problems(
    f"/dev/mapper/{name}",
    seed,
    [(start, before["chunk_sectors"])],
    changed={start: new_content(start, size)},
)
answer(
    {
        "wrong": wrong,
        "remapped": chunk in after["chunks"],
        "interrupted": after["interrupted"],
        "damaged": after["damaged"],
    }
)
