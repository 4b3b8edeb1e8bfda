# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs in the guest: measures remaps, commits and table loads; JSON in, JSON out."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from dm_remap import copies
from dm_remap.blockdev import BlockDevice
from dm_remap.devmapper import DeviceMapper, Segment
from dm_remap.engine import Engine
from dm_remap.format import Extent
from dm_remap.mapping import build_table
from dm_remap.plan_removal import plan_absent
from dm_remap.planner import plan_present
from dm_remap.request import Request

NAME = "bench"
BLOCK_SECTORS = 8
SIZES = (10, 1000, 10000)


def main() -> None:
    """Measure everything."""
    given = json.load(sys.stdin)
    engine = Engine()
    engine.check_host()
    found: dict[str, Any] = {"kernel": os.uname().release}
    found.update(measure_remaps(engine, given["main"], given["spare"], given["rounds"]))
    found.update(measure_commits(engine, given["main"], given["spare"], given["rounds"]))
    found.update(measure_tables(given["main"], given["spare"]))
    found.update(measure_bulk(engine, given["main"], given["spare"]))
    json.dump(found, sys.stdout)


def present(engine: Engine, main_path: str, spare: str, chunk_bytes: int) -> None:
    """Make the target."""
    # Nothing heals held I/O here.
    request = Request(NAME, main_path, (spare,), chunk_bytes, on_error="fail")
    with engine.locked(NAME):
        engine.apply(plan_present(request, engine.see(NAME, main_path, [spare])))


def absent(engine: Engine) -> None:
    """Remove the target and its remaps."""
    with engine.locked(NAME):
        seen = engine.see(NAME, None, [])
        engine.apply(plan_absent(NAME, seen.target, seen, discard_remaps=True))


def read_blocks(path: str, pipe: Connection) -> None:
    """Read blocks at random places and note when each began and how long it took."""
    chooser = random.Random(1)
    noted = []
    with BlockDevice(path) as device:
        pipe.send("ready")
        while not pipe.poll():
            sector = chooser.randrange(device.sectors // BLOCK_SECTORS) * BLOCK_SECTORS
            begun = time.monotonic()
            device.read(sector, BLOCK_SECTORS)
            noted.append((begun, time.monotonic() - begun))
    pipe.send(noted)


def measure_remaps(engine: Engine, main_path: str, spare: str, rounds: int) -> dict[str, Any]:
    """Remap one chunk after the other beside a reader."""
    present(engine, main_path, spare, 65536)
    ours, theirs = multiprocessing.Pipe()
    reader = multiprocessing.Process(target=read_blocks, args=(f"/dev/mapper/{NAME}", theirs))
    reader.start()
    ours.recv()
    windows, remaps, pauses = [], [], []
    for turn in range(rounds):
        begun = time.monotonic()
        with engine.locked(NAME):
            report = engine.remap(NAME, [(turn * 1024, 1)])
        windows.append((begun, time.monotonic()))
        remaps.append(report.seconds)
        pauses.append(report.pause_seconds)
    ours.send("stop")
    noted = ours.recv()
    reader.join()
    absent(engine)
    slowest = [
        max((took for begun, took in noted if low <= begun + took and begun <= high), default=0.0)
        for low, high in windows
    ]
    return {
        "remaps": remaps,
        "pauses": pauses,
        "slowest_reads": slowest,
        "idle_reads": idle_reads(main_path),
    }


def idle_reads(path: str) -> list[float]:
    """How long reads take while nothing else goes on."""
    times = []
    with BlockDevice(path) as device:
        for turn in range(200):
            begun = time.monotonic()
            device.read(turn * 128, BLOCK_SECTORS)
            times.append(time.monotonic() - begun)
    return times


def measure_commits(engine: Engine, main_path: str, spare: str, rounds: int) -> dict[str, Any]:
    """Commit metadata of several sizes to one spare, and write one block for comparison."""
    present(engine, main_path, spare, 4096)
    current = engine.require(NAME).metadata
    commits = []
    with BlockDevice(spare, writable=True) as device:
        for count in SIZES:
            extents = scattered(count)
            times = []
            for _turn in range(rounds):
                new = replace(current.successor(time.time_ns()), extents=extents)
                begun = time.monotonic()
                copies.commit({0: device}, current, new)
                times.append(time.monotonic() - begun)
                current = new
            commits.append((count, times))
        # The gap between the near copies belongs to nobody.
        raw = []
        for _turn in range(rounds):
            begun = time.monotonic()
            device.write(12288, bytes(4096))
            device.flush()
            raw.append(time.monotonic() - begun)
    absent(engine)
    return {"commits": commits, "raw_write": raw}


def measure_bulk(engine: Engine, main_path: str, spare: str) -> dict[str, Any]:
    """Remap 1,000 ranges in one task, on a target with 10,000 extents."""
    present(engine, main_path, spare, 4096)
    target = engine.require(NAME)
    extents = scattered(10_000)
    with engine.opened(target) as disks:
        new = replace(target.metadata.successor(time.time_ns()), extents=extents)
        copies.commit(disks.members, target.metadata, new)
    taken = {extent.logical for extent in extents}
    total = target.metadata.config["main"]["sectors"] // BLOCK_SECTORS
    free = [chunk for chunk in range(total) if chunk not in taken]
    ranges = [(chunk * BLOCK_SECTORS, 1) for chunk in free[:: len(free) // 1000][:1000]]
    with engine.locked(NAME):
        report = engine.remap(NAME, ranges)
    absent(engine)
    if sum(chunk.moved for chunk in report.chunks) != 1000:
        raise RuntimeError("not all chunks have moved")
    return {"bulk": [report.seconds, report.salvage_seconds, report.pause_seconds]}


def measure_tables(main_path: str, spare: str) -> dict[str, Any]:
    """Load and swap tables of several sizes."""
    mapper = DeviceMapper()
    main_number, spare_number = number_of(main_path), number_of(spare)
    with BlockDevice(main_path) as device:
        sectors = device.sectors
    mapper.create(NAME, "DMREMAP-bench", [Segment(0, sectors, "linear", f"{main_number} 0")], True)
    loads, swaps = [], []
    for count in SIZES:
        table = build_table(sectors, 8, main_number, scattered(count), {0: spare_number})
        load_times, swap_times = [], []
        for _turn in range(10):
            begun = time.monotonic()
            mapper.load(NAME, table)
            loaded = time.monotonic()
            mapper.swap(NAME)
            swap_times.append(time.monotonic() - loaded)
            load_times.append(loaded - begun)
        loads.append((count, load_times))
        swaps.append((count, swap_times))
    mapper.remove(NAME)
    return {"loads": loads, "swaps": swaps}


def scattered(count: int) -> tuple[Extent, ...]:
    """Extents of one chunk each, that never continue each other."""
    return tuple(Extent(2 * i, 1, 0, i) for i in range(count))


def number_of(path: str) -> str:
    """The device number of a node."""
    number = os.stat(path).st_rdev
    return f"{os.major(number)}:{os.minor(number)}"


if __name__ == "__main__":
    main()
