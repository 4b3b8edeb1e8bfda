# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Meets a bad sector on a main that takes seconds for it, beside I/O far away from it, and beside
another target with a bad sector on a disk that is quick.

The main is a mapped device whose bad block is behind a delay: each read of it takes that long, and
then fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from scene import BlockDevice, Engine, answer, arguments

from dm_remap import stack
from dm_remap.devmapper import DeviceMapper, Segment
from dm_remap.plan_removal import plan_absent
from dm_remap.planner import plan_present
from dm_remap.request import Request

SLOW = "slowmain"
BLOCK = 8


def number_of(path: str) -> str:
    """The device number of a node."""
    status = os.stat(path)
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"


def slow_table(disk: str, sectors: int, bad: int, milliseconds: int) -> list[Segment]:
    """The disk, with a delay before each read of the bad block."""
    end = bad + BLOCK
    return [
        Segment(0, bad, "linear", f"{disk} 0"),
        Segment(bad, BLOCK, "delay", f"{disk} {bad} {milliseconds} {disk} {bad} 0"),
        Segment(end, sectors - end, "linear", f"{disk} {end}"),
    ]


def is_parked(mapper: DeviceMapper, name: str) -> bool:
    """Whether no chunk of a target is frozen."""
    return all(segment.target != "delay" for segment in mapper.table(stack.frozen_name(name)))


@contextmanager
def healer() -> Iterator[None]:
    """The process of the reflex."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dm_remap.healer"], stderr=subprocess.PIPE, text=True
    )
    try:
        engine = Engine()
        while not engine.healer_runs():
            if process.poll() is not None:
                raise SystemExit(f"the healer ended: {process.communicate()[1]}")
            os.sched_yield()
        yield
    finally:
        process.terminate()
        process.wait(30)


class Beside(threading.Thread):
    """Writes and flushes, and reads, far away from the bad sector, and notes how long each took."""

    def __init__(self, path: str, sector: int) -> None:
        super().__init__()
        self._path = path
        self._sector = sector
        self._over = threading.Event()
        self.noted: list[tuple[float, float]] = []

    def run(self) -> None:
        """Work until told to end."""
        with BlockDevice(self._path, writable=True) as device:
            turn = 0
            while not self._over.is_set():
                sector = self._sector + turn % 256 * BLOCK
                begun = time.monotonic()
                device.write(sector, bytes([turn % 256]) * 4096)
                device.flush()
                device.read(sector, BLOCK)
                self.noted.append((begun, time.monotonic() - begun))
                turn += 1

    def end(self) -> None:
        """Let it end."""
        self._over.set()
        self.join()


def read_error(path: str, sector: int) -> int:
    """The error of reading a block; 0 for none."""
    try:
        with BlockDevice(path) as device:
            device.read(sector, BLOCK)
    except OSError as failure:
        return failure.errno or 0
    return 0


def main() -> None:
    """Make the stack, meet the bad sector, and tell what happened beside it."""
    given = arguments()
    mapper, engine = DeviceMapper(), Engine()
    engine.check_host()
    with BlockDevice(given["disk"]) as device:
        sectors = device.sectors
    table = slow_table(number_of(given["disk"]), sectors, given["bad"], given["milliseconds"])
    mapper.create(SLOW, "TEST-slow", table, private=False)
    requests = [
        Request("guarded", f"/dev/mapper/{SLOW}", (given["spare"],), on_error="hold"),
        Request("quick", given["quick"], (given["quick_spare"],), on_error="hold"),
    ]
    with healer():
        for request in requests:
            with engine.locked_host(), engine.locked(request.name):
                seen = engine.see(request.name, request.main, request.spares)
                engine.apply(plan_present(request, seen))
        path = "/dev/mapper/guarded"
        beside = Beside(path, given["bad"] + 65536)
        beside.start()
        begun = time.monotonic()
        with ThreadPoolExecutor() as pool:
            slow = pool.submit(read_error, path, given["bad"])
            # The chunk is frozen as soon as it is known that its main is slow.
            while is_parked(mapper, "guarded"):
                os.sched_yield()
            asked = time.monotonic()
            quick_error = read_error("/dev/mapper/quick", given["bad"])
            answered = time.monotonic()
            first = not slow.done()
            error = slow.result()
        ended = time.monotonic()
        beside.end()
        with engine.locked("guarded"):
            target = engine.require("guarded")
            lost = [[item.sector, item.count] for item in target.metadata.lost]
            remapped = len(target.metadata.extents)
    during = sorted(took for start, took in beside.noted if start + took > begun and start < ended)
    for name in ("guarded", "quick"):
        with engine.locked(name):
            seen = engine.see(name, None, [])
            engine.apply(plan_absent(name, seen.target, seen, discard_remaps=True))
    mapper.remove(SLOW)
    answer(
        {
            "errno": error,
            "seconds": ended - begun,
            "lost": lost,
            "extents": remapped,
            "beside": during,
            "quick": [quick_error, first, answered - asked],
        }
    )


main()
