# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs on this machine, as root: what an inventory costs on loop devices, nothing emulated.

Device-mapper is not needed, so of `dm-remap-discover` its start and the scan are measured, which is
all but the look at the mapped devices.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from benchmarks.discovery import OTHERS, make_targets, run, taken_in_turns
from dm_remap import discovery

_START = "import sys; from dm_remap.cli.programs import main; sys.argv = {}; sys.exit(main())"


def main() -> None:
    """Measure everything; arguments: number of mains, spares for each, rounds."""
    targets, each, rounds = map(int, sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as devices:
        mains = [devices.enter_context(loop(folder, 8)) for _ in range(targets)]
        spares = [devices.enter_context(loop(folder, 32)) for _ in range(targets * each)]
        make_targets(mains, spares)

        def scan() -> None:
            found = discovery.decide(discovery.scan())
            if sum(len(target.spares) for target in found.targets) != len(spares):
                raise RuntimeError("the scan has not found all spares")

        arguments = repr(["dm-remap-discover", "--help"])
        looks = {
            "scan": scan,
            "start": run([sys.executable, "-c", _START.format(arguments)], "usage"),
            "python": run([sys.executable, "-c", "pass"]),
            **{name: run(line) for name, line in OTHERS.items() if shutil.which(line[0])},
        }
        times = taken_in_turns([*mains, *spares], rounds, looks)
    json.dump({"kernel": os.uname().release, "spares": len(spares), "times": times}, sys.stdout)


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
