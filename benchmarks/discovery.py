# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs in the guest: who finds its devices how fast; JSON in, JSON out.

The devices' caches are dropped before each look. Programs and the kernel's data on the root disk
stay in memory, because how long they take to load says nothing about the devices.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace

from dm_remap import blockdev, copies, discovery, fingerprint, replacement
from dm_remap.blockdev import BlockDevice
from dm_remap.committing import host_id
from dm_remap.format import MAX_SPARES, NO_DIGEST, Extent, Metadata, plan_geometry
from dm_remap.target import FAIL

BLKFLSBUF = 0x1261
CHUNK_SECTORS = 128
EXTENTS = 20
ARRAY = "/dev/md/bench"
GROUP = "bench"
# What the programs remember of earlier looks.
REMEMBERED = ("/run/lvm/hints", "/run/blkid/blkid.tab", "/run/dm-remap/fingerprints/*")
OTHERS = {
    "blkid": ["blkid"],
    "pvs": ["pvs", "--noheadings"],
    "mdadm --examine --scan": ["mdadm", "--examine", "--scan"],
}
OTHERS_ONE = {
    "blkid --probe DEVICE": ["blkid", "--probe"],
    "pvs DEVICE": ["pvs", "--noheadings"],
    "mdadm --examine DEVICE": ["mdadm", "--examine"],
}


def main() -> None:
    """Measure everything."""
    given = json.load(sys.stdin)
    spares, rounds = given["spares"], given["rounds"]
    everything = [*given["mains"], *spares]
    make_targets(given["mains"], spares)
    settle()
    found = {
        "kernel": os.uname().release,
        "spares": len(spares),
        "python": timed(everything, rounds, run(["python3", "-c", "pass"])),
        "inventory": inventory(everything, spares, rounds),
        "probe": probes(everything, spares[0], rounds),
    }
    make_volumes(spares)
    found["own volumes"] = timed(everything, rounds, run(OTHERS["pvs"], GROUP, len(spares)))
    found["own volume"] = timed(everything, rounds, run(["pvs", "--noheadings", spares[0]], GROUP))
    remove_volumes(spares)
    make_array(spares)
    found["own array"] = timed(
        everything, rounds, run(OTHERS["mdadm --examine --scan"], "ARRAY", 1)
    )
    found["own member"] = timed(everything, rounds, run(["mdadm", "--examine", spares[0]], "raid0"))
    subprocess.run(["mdadm", "--stop", ARRAY], check=True, capture_output=True)
    json.dump(found, sys.stdout)


def inventory(everything: list[str], spares: list[str], rounds: int) -> dict[str, list[float]]:
    """All devices, by each of the programs and by the scan itself."""
    looks = {
        "scan": scan(len(spares)),
        "dm-remap-discover": run(["dm-remap-discover"], "complete", len(spares) // MAX_SPARES),
        **{name: run(command) for name, command in OTHERS.items()},
    }
    return taken_in_turns(everything, rounds, looks)


def scan(spares: int) -> Callable[[], None]:
    """A look at all devices by the core itself, which must find so many spares."""

    def look() -> None:
        found = discovery.decide(discovery.scan())
        if sum(len(target.spares) for target in found.targets) != spares:
            raise RuntimeError("the scan has not found all spares")

    return look


def probes(everything: list[str], path: str, rounds: int) -> dict[str, list[float]]:
    """One device, by each of the programs and by the core itself."""

    def probe() -> None:
        with BlockDevice(path) as device:
            if len(copies.survey(device).copies) != 7:
                raise RuntimeError("the probe has not found all copies")

    def observe() -> None:
        fingerprint.observe(path)

    looks = {
        "probe for metadata": probe,
        "fingerprint": observe,
        "dm-remap metadata check DEVICE": run(["dm-remap", "metadata", "check", path], "near", 5),
        **{
            name: run([*command, path], allowed=(0, 1, 2, 5))
            for name, command in OTHERS_ONE.items()
        },
    }
    return taken_in_turns(everything, rounds, looks)


# Measuring


def taken_in_turns(
    everything: list[str], rounds: int, looks: dict[str, Callable[[], object]]
) -> dict[str, list[float]]:
    """Seconds of each look, in turns, so that all share the weather."""
    times: dict[str, list[float]] = {name: [] for name in looks}
    for _turn in range(rounds):
        for name, look in looks.items():
            times[name] += timed(everything, 1, look)
    return times


def timed(everything: list[str], rounds: int, look: Callable[[], object]) -> list[float]:
    """Seconds that a look takes on devices of which nothing is in memory."""
    times = []
    for _turn in range(rounds):
        forget(everything)
        begun = time.monotonic()
        look()
        times.append(time.monotonic() - begun)
    return times


def forget(paths: Iterable[str]) -> None:
    """Drop what is in memory of the devices, and what programs remember of them."""
    for pattern in REMEMBERED:
        for path in glob.glob(pattern):
            os.unlink(path)
    for path in paths:
        device = os.open(path, os.O_RDONLY)
        fcntl.ioctl(device, BLKFLSBUF)
        os.close(device)


def run(
    command: list[str], word: str = "", times: int = 1, allowed: tuple[int, ...] = (0, 2)
) -> Callable[[], None]:
    """A call of a program, which must print a word so many times."""

    def call() -> None:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode not in allowed or (word and done.stdout.count(word) < times):
            raise RuntimeError(f"{command}: {done.returncode}: {done.stdout}{done.stderr}")

    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{command[0]} is not there")
    return call


def settle() -> None:
    """Wait for what udev still does with the devices."""
    subprocess.run(["udevadm", "settle"], check=True)


# What is on the devices


def make_targets(mains: list[str], spares: list[str]) -> None:
    """Write the metadata of targets with eight spares each; their data areas are not needed."""
    for number, main_path in enumerate(mains):
        own = spares[number * MAX_SPARES : (number + 1) * MAX_SPARES]
        metadata = first(f"bench{number}", main_path, own)
        extents = tuple(Extent(2 * n, 1, n % len(own), n) for n in range(EXTENTS))
        devices = {index: BlockDevice(path, writable=True) for index, path in enumerate(own)}
        copies.commit(devices, None, metadata)
        copies.commit(
            devices, metadata, replace(metadata.successor(time.time_ns()), extents=extents)
        )
        for device in devices.values():
            device.close()


def first(name: str, main_path: str, spares: list[str]) -> Metadata:
    info = blockdev.describe(main_path)
    entries = []
    for path in spares:
        spare = blockdev.describe(path)
        geometry = plan_geometry(spare.sectors, CHUNK_SECTORS, spare.block_sectors)
        recorded = replacement.recorded(spare, hardware_only=True)
        entries.append({"uuid": str(uuid.uuid4()), "geometry": geometry.to_dict(), **recorded})
    config = {
        "name": name,
        "chunk_sectors": CHUNK_SECTORS,
        "block_sectors": 1,
        "on_error": FAIL,
        "main": replacement.main_entry(info, info.sectors),
        "spares": entries,
    }
    return Metadata(uuid.uuid4(), 1, time.time_ns(), host_id(), NO_DIGEST, config, {})


def make_volumes(paths: list[str]) -> None:
    """Make each device a physical volume, all of one group."""
    wipe(paths)
    for command in (["pvcreate", "--yes", "--force", "--force"], ["vgcreate", GROUP]):
        subprocess.run([*command, *paths], check=True, capture_output=True)
    settle()


def remove_volumes(paths: list[str]) -> None:
    subprocess.run(["vgremove", "--yes", GROUP], check=True, capture_output=True)
    wipe(paths)


def make_array(paths: list[str]) -> None:
    """Make each device a member of one array."""
    command = ["mdadm", "--create", ARRAY, "--run", "--level=0", f"--raid-devices={len(paths)}"]
    subprocess.run([*command, *paths], check=True, capture_output=True)
    settle()


def wipe(paths: list[str]) -> None:
    """Zero the first 8 MiB of devices, and tell udev."""
    for path in paths:
        with BlockDevice(path, writable=True) as device:
            device.zero(0, 16384)
            device.flush()
    subprocess.run(["udevadm", "trigger", "--settle", "--action=change", *paths], check=True)


if __name__ == "__main__":
    main()
