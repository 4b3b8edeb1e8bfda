# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs in the guest: I/O through each form of a target against the bare disk.

JSON in; out a line of JSON for each form at each latency, and the kernel's release at the end.

Main and spare are null_blk devices with a completion time of their own, so that the cost of the
stack is seen at the latencies of real disks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from measure import number_of

from dm_remap import copies
from dm_remap.blockdev import BlockDevice
from dm_remap.devmapper import DeviceMapper, Segment
from dm_remap.engine import Engine
from dm_remap.format import Extent
from dm_remap.plan_removal import plan_absent
from dm_remap.planner import plan_present
from dm_remap.request import Request

NAME = "bench"
CHUNK_BYTES = 4096
CHUNK_SECTORS = CHUNK_BYTES // 512
NULLB = "/sys/kernel/config/nullb"
MEGABYTES = 256
LATENCIES = {"0": 0, "100 us": 100_000, "300 us": 300_000, "5 ms": 5_000_000}
LOADS = (("randread", 1), ("randwrite", 1), ("randread", 16), ("randwrite", 16))
Job = tuple[str, int]


def main() -> None:
    """Measure everything."""
    given = json.load(sys.stdin)
    subprocess.run(["modprobe", "null_blk", "nr_devices=0"], check=True)
    if not os.path.isdir(NULLB):
        configfs = "/sys/kernel/config"
        subprocess.run(["mount", "-t", "configfs", "configfs", configfs], check=True)
    engine = Engine()
    engine.check_host()
    for label in given["latencies"]:
        nanoseconds = LATENCIES[label]
        with disk("main", nanoseconds) as main_path, disk("spare", nanoseconds) as spare:
            for form, results in measure(engine, main_path, spare, given):
                print(json.dumps([label, form, results]), flush=True)
    print(json.dumps(os.uname().release))


@contextmanager
def disk(name: str, nanoseconds: int) -> Iterator[str]:
    """A disk in memory whose requests take a while; its path."""
    folder = f"{NULLB}/{name}"
    os.mkdir(folder)
    try:
        settings = {"size": MEGABYTES, "memory_backed": 1, "blocksize": 512}
        # Mode 2 completes by a timer, mode 0 at once (Documentation/block/null_blk.rst).
        settings |= {"irqmode": 2 if nanoseconds else 0, "completion_nsec": nanoseconds}
        for key, value in settings.items():
            with open(f"{folder}/{key}", "w", encoding="ascii") as file:
                file.write(str(value))
        with open(f"{folder}/power", "w", encoding="ascii") as file:
            file.write("1")
        with open(f"{folder}/index", encoding="ascii") as file:
            index = int(file.read())
        path = f"/dev/nullb{index}" if os.path.exists(f"/dev/nullb{index}") else f"/dev/{name}"
        subprocess.run(["udevadm", "settle"], check=True)
        yield path
    finally:
        os.rmdir(folder)


def measure(
    engine: Engine, main_path: str, spare: str, given: dict[str, Any]
) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Operations a second of each load on each form, as ratios to the bare disk."""
    for form, options, remaps in (
        ("linear", None, 0),
        ("fail", {"on_error": "fail"}, 0),
        ("fail, remaps", {"on_error": "fail"}, given["remaps"]),
        ("hold", {"on_error": "hold"}, 0),
        ("hold, remaps", {"on_error": "hold"}, given["remaps"]),
        ("hold, shim", {"on_error": "hold", "shim": "raid"}, 0),
    ):
        with standing(engine, main_path, spare, options, remaps) as path:
            results: dict[str, list[float]] = {}
            for _turn in range(given["rounds"]):
                for job in LOADS:
                    label = f"{job[0]} {job[1]}"
                    # The bare disk just before, because the machine's speed drifts.
                    raw = run(main_path, job, given["seconds"])
                    through = run(path, job, given["seconds"])
                    results.setdefault(label, []).append(through / raw)
            yield form, results


@contextmanager
def standing(
    engine: Engine, main_path: str, spare: str, options: dict[str, str] | None, remaps: int
) -> Iterator[str]:
    """A form of the stack over the disk; its path."""
    mapper = DeviceMapper()
    if options is None:
        number = number_of(main_path)
        with BlockDevice(main_path) as device:
            table = [Segment(0, device.sectors, "linear", f"{number} 0")]
        mapper.create(NAME, "BENCH-linear", table, private=True)
        try:
            yield f"/dev/mapper/{NAME}"
        finally:
            mapper.remove(NAME)
        return
    request = Request(NAME, main_path, (spare,), CHUNK_BYTES, **options)
    with engine.healing(), engine.locked(NAME):
        engine.apply(plan_present(request, engine.see(NAME, main_path, [spare])))
    try:
        if remaps:
            scatter(engine, spare, remaps)
        yield f"/dev/mapper/{NAME}"
    finally:
        # udev looks at what fio has written to.
        subprocess.run(["udevadm", "settle"], check=True)
        with engine.locked(NAME):
            seen = engine.see(NAME, None, [])
            engine.apply(plan_absent(NAME, seen.target, seen, discard_remaps=True))


def scatter(engine: Engine, spare: str, remaps: int) -> None:
    """Remap chunks all over the target; their places on the spare get zeros first."""
    target = engine.require(NAME)
    chunks = target.metadata.config["main"]["sectors"] // CHUNK_SECTORS
    geometry = target.metadata.config["spares"][0]["geometry"]
    reserved = (geometry["far_middle"] - geometry["data_start"]) // CHUNK_SECTORS
    if remaps > reserved:
        raise SystemExit(f"only {reserved} places are in one piece")
    step = chunks // remaps
    extents = tuple(Extent(step * i, 1, 0, i) for i in range(remaps))
    with BlockDevice(f"/dev/mapper/{NAME}-spare0", writable=True) as device:
        for sector in range(0, remaps * CHUNK_SECTORS, 2048):
            device.write(sector, bytes(512 * min(2048, remaps * CHUNK_SECTORS - sector)))
        device.flush()
    with BlockDevice(spare, writable=True) as member:
        new = replace(target.metadata.successor(time.time_ns()), extents=extents)
        copies.commit({0: member}, target.metadata, new)
    mapper = DeviceMapper()
    mapper.load(target.map.name, target.map_table(new))
    with mapper.events() as events:
        mapper.swap(target.map.name, events if target.path is None else None)


def run(path: str, job: Job, seconds: float) -> float:
    """Operations a second of a load of 4 KiB blocks."""
    pattern, depth = job
    command = [
        "fio",
        "--name=bench",
        f"--filename={path}",
        f"--rw={pattern}",
        f"--iodepth={depth}",
        "--bs=4k",
        "--direct=1",
        "--ioengine=libaio",
        "--time_based",
        f"--runtime={seconds}",
        "--randseed=7",
        "--output-format=json",
        "--allow_file_create=0",
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    (result,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    return float(result["read"]["iops"] + result["write"]["iops"])


if __name__ == "__main__":
    main()
