# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs on this machine, as root: what an inventory and a healing cost, nothing emulated.

Device-mapper is not needed. Of `dm-remap-discover` its start and the scan of loop devices are
measured, which is all but the look at the mapped devices; of a healing the processor's time, with
the tests' kernel in memory, whose own time is in it, and without what the disks take.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.discovery import OTHERS, make_targets, run, scan, taken_in_turns
from dm_remap import memory
from tests.unit.test_engine import NAME
from tests.unit.test_reflex import Healer, held_scene

_START = "import sys; from dm_remap.cli.programs import main; sys.argv = {}; sys.exit(main())"


def main() -> None:
    """Measure everything; arguments: number of mains, spares for each, rounds."""
    targets, each, rounds = map(int, sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as devices:
        mains = [devices.enter_context(loop(folder, 8)) for _main in range(targets)]
        spares = [devices.enter_context(loop(folder, 32)) for _spare in range(targets * each)]
        make_targets(mains, spares)
        arguments = repr(["dm-remap-discover", "--help"])
        looks = {
            "scan": scan(len(spares)),
            "start": run([sys.executable, "-c", _START.format(arguments)], "usage"),
            "python": run([sys.executable, "-c", "pass"]),
            **{name: run(line) for name, line in OTHERS.items() if shutil.which(line[0])},
        }
        times = taken_in_turns([*mains, *spares], rounds, looks)
    times["healing"] = healings(10 * rounds)
    json.dump({"kernel": os.uname().release, "spares": len(spares), "times": times}, sys.stdout)


def healings(count: int) -> list[float]:
    """Seconds of the processor from a failed read to the data, each of another chunk."""
    memory.lock_memory = lambda: None
    times = []
    with tempfile.TemporaryDirectory() as folder:
        scene = held_scene(Path(folder), spares=2)
        healer = Healer(scene)
        metadata = scene.engine().require(NAME).metadata
        chunk_sectors = metadata.config["chunk_sectors"]
        for chunk in range(min(count, metadata.config["main"]["sectors"] // chunk_sectors)):
            sector = chunk * chunk_sectors
            scene.spoil(sector, failures=3)
            number = scene.kernel.submit_read(NAME, sector, 1)
            begun = time.process_time()
            healer.turn()
            times.append(time.process_time() - begun)
            if number not in scene.kernel.completed:
                raise RuntimeError(f"sector {sector} was not healed")
    return times


@contextlib.contextmanager
def loop(folder: str, mebibytes: int) -> Iterator[str]:
    """A loop device on a new sparse file; its path."""
    handle, path = tempfile.mkstemp(dir=folder)
    os.truncate(handle, mebibytes << 20)
    os.close(handle)
    command = ["losetup", "--find", "--show", path]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


if __name__ == "__main__":
    main()
