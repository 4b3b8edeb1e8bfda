# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Applications that write and read targets whose errors are held, beside a real healer.

Looks first at what a power cut has left, then tells what is durable until the next one comes.
"""

from __future__ import annotations

import multiprocessing
import random
import struct
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection, wait
from typing import IO, Any

from scene import BlockDevice, answer, arguments

from dm_remap.engine import Engine
from dm_remap.planner import plan_present
from dm_remap.request import Request

BLOCK_SECTORS = 8
# A flush, and a word about what is durable now, after so many operations.
BATCH = 8
FORM = "<QQQ"
HEALER = "import sys; from dm_remap import healer; sys.exit(healer.main())"


def sector_of(seed: int, sector: int, version: int) -> bytes:
    """Content of one sector: whose it is, which, and the number of the write."""
    return (struct.pack(FORM, seed + 1, sector, version) * 22)[:512]


def block_of(seed: int, sector: int, version: int) -> bytes:
    """Content of a block."""
    return b"".join(sector_of(seed, sector + i, version) for i in range(BLOCK_SECTORS))


LOG: list[str] = []


def follow(stream: IO[str]) -> None:
    """Keep what the healer says."""
    for line in stream:
        LOG.append(f"{time.monotonic():.2f} {line.rstrip()}")


def start_healer() -> None:
    """Start the healer and wait until it heals."""
    healer = subprocess.Popen(
        [sys.executable, "-c", HEALER],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert healer.stderr is not None
    threading.Thread(target=follow, args=(healer.stderr,), daemon=True).start()
    while not Engine().healer_runs():
        if healer.poll() is not None:
            raise RuntimeError("the healer has ended")
        time.sleep(0.05)


def activate(given: dict[str, Any]) -> list[str]:
    """Make the target present; what was done."""
    engine = Engine(guard=True)
    engine.check_host()
    request = Request(given["name"], given["main"], tuple(given["spares"]), on_error="hold")
    with engine.locked(request.name):
        plan = plan_present(request, engine.see(request.name, request.main, request.spares))
        engine.apply(plan)
    return [action.kind for action in plan.actions]


def problems(given: dict[str, Any], durable: dict[str, int]) -> list[str]:
    """What reads otherwise than it may: each sector a version at least as new as the durable one.

    Args:
        given: the target; its ``lost`` are blocks that may fail.
        durable: versions of blocks that were written and flushed, by first sector.
    """
    seed, may_fail, found = given["seed"], set(given["lost"]), []
    with BlockDevice(f"/dev/mapper/{given['name']}") as device:
        for sector in range(0, given["sectors"], BLOCK_SECTORS):
            least = durable.get(str(sector), 0)
            try:
                data = device.read(sector, BLOCK_SECTORS)
            except OSError as error:
                # A disk that cannot read a block may have taken writes to it.
                if sector not in may_fail:
                    found.append(f"{given['name']}: block {sector}, version {least}: {error}")
                continue
            for number in range(BLOCK_SECTORS):
                own = data[number * 512 : number * 512 + 512]
                version = struct.unpack_from(FORM, own)[2]
                if version < least or own != sector_of(seed, sector + number, version):
                    head = own[:24].hex()
                    found.append(f"{given['name']}: {sector + number} < {least}: {head}")
    return found


def work(given: dict[str, Any], version: int, pipe: Connection) -> None:
    """Write and read blocks by chance until the power is cut."""
    chooser = random.Random(given["seed"] * 1000 + version)
    seed, written = given["seed"], dict[int, int]()
    with BlockDevice(f"/dev/mapper/{given['name']}", writable=True) as device:
        while True:
            for _turn in range(BATCH):
                version += 1
                sector = chooser.randrange(given["sectors"] // BLOCK_SECTORS) * BLOCK_SECTORS
                try:
                    if chooser.random() < 0.3:
                        device.read(sector, BLOCK_SECTORS)
                        continue
                    device.write(sector, block_of(seed, sector, version))
                except OSError as error:
                    if sector not in given["lost"]:
                        pipe.send({"error": f"{given['name']}: {sector}: {error}"})
                    continue
                written[sector] = version
            device.flush()
            pipe.send({"target": seed, "version": version, "durable": dict(written)})


def main() -> None:
    """Look, then work."""
    given = arguments()
    start_healer()
    wrong, actions, times = [], {}, []
    for target in given["targets"]:
        times.append(f"{time.monotonic():.2f} {target['name']}")
        actions[target["name"]] = activate(target)
        if given["fill"]:
            with BlockDevice(f"/dev/mapper/{target['name']}", writable=True) as device:
                for sector in range(0, target["sectors"], BLOCK_SECTORS):
                    device.write(sector, block_of(target["seed"], sector, 0))
                device.flush()
        else:
            wrong += problems(target, target["durable"])
            times.append(f"{time.monotonic():.2f} {target['name']} was looked at")
    kernel = subprocess.run(["dmesg"], capture_output=True, text=True, check=False).stdout
    told = [*times, *LOG[-400:], *kernel.splitlines()[-300:]] if wrong else []
    answer({"wrong": wrong, "actions": actions, "log": told})
    pipes = []
    for target in given["targets"] if given["work"] else ():
        ours, theirs = multiprocessing.Pipe(duplex=False)
        arguments_ = (target, target["version"], theirs)
        multiprocessing.Process(target=work, args=arguments_, daemon=True).start()
        pipes.append(ours)
    while pipes:
        for pipe in wait(pipes):
            answer(pipe.recv())  # type: ignore[union-attr]


main()
