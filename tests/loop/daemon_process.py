# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A daemon in a process of its own: python daemon_process.py DIRECTORY PORT

The machine is the one of tests/unit/daemon_scene.py: DIRECTORY holds a folder that looks like
tracefs, and every sector that the trace names is bad.
"""

from __future__ import annotations

import asyncio
import importlib.util
import signal
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# A template engine would make a number of it, and drop its last digit.
NAME = "2024.10"


def load(name: str, path: Path) -> object:
    """Import a module from a file."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


async def run(directory: Path, port: int) -> None:
    """Run until SIGTERM; prints the port when it is ready."""
    scene_module = load("daemon_scene", ROOT / "tests" / "unit" / "daemon_scene.py")
    scene = scene_module.Scene(directory)
    scene.host.disk.bad = set(range(scene.host.disk.sectors))
    scene.host.guarded = [replace(target, name=NAME) for target in scene.host.guarded]
    scene.host.disk.bad -= {0, *range(2000, 6000)}
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with scene.running(replace(scene.settings, port=port)) as daemon:
        print(daemon.port, flush=True)
        await stop.wait()


if __name__ == "__main__":
    load("conftest", ROOT / "tests" / "conftest.py")
    asyncio.run(run(Path(sys.argv[1]), int(sys.argv[2])))
