# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Meets a bad sector on a main that takes seconds for it, beside I/O far away from it.

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
from contextlib import contextmanager

from scene import BlockDevice, Engine, answer, arguments

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


def main() -> None:
    """Make the stack, meet the bad sector, and tell what happened beside it."""
    given = arguments()
    mapper, engine = DeviceMapper(), Engine()
    engine.check_host()
    with BlockDevice(given["disk"]) as device:
        sectors = device.sectors
    table = slow_table(number_of(given["disk"]), sectors, given["bad"], given["milliseconds"])
    mapper.create(SLOW, "TEST-slow", table, private=False)
    request = Request("guarded", f"/dev/mapper/{SLOW}", (given["spare"],), on_error="hold")
    with healer():
        with engine.locked_host(), engine.locked("guarded"):
            engine.apply(plan_present(request, engine.see("guarded", request.main, request.spares)))
        path = "/dev/mapper/guarded"
        beside = Beside(path, given["bad"] + 65536)
        beside.start()
        begun, error = time.monotonic(), 0
        try:
            with BlockDevice(path) as device:
                device.read(given["bad"], BLOCK)
        except OSError as failure:
            error = failure.errno or 0
        ended = time.monotonic()
        beside.end()
        with engine.locked("guarded"):
            target = engine.require("guarded")
            lost = [[item.sector, item.count] for item in target.metadata.lost]
            remapped = len(target.metadata.extents)
    during = sorted(took for start, took in beside.noted if start + took > begun and start < ended)
    with engine.locked("guarded"):
        seen = engine.see("guarded", None, [])
        engine.apply(plan_absent("guarded", seen.target, seen, discard_remaps=True))
    mapper.remove(SLOW)
    answer(
        {
            "errno": error,
            "seconds": ended - begun,
            "lost": lost,
            "extents": remapped,
            "beside": during,
        }
    )


main()
