# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Starts remaps that stay at a step each, and waits for the power cut."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import Any

from scene import answer, arguments, meddling, remap


def start(job: dict[str, Any]) -> int:
    """Fork the remap; a pipe that has a byte when it is at its step."""
    readable, writable = os.pipe()
    if os.fork() == 0:
        try:

            def reached(done: str) -> None:
                if done == job["step"]:
                    os.write(writable, b"r")
                    signal.pause()

            sector = job["start"]
            remap(job["name"], [(sector, 1)], step=meddling(job["name"], sector, reached))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writable)
    return readable


jobs = arguments()["jobs"]
for job, pipe in [(job, start(job)) for job in jobs]:
    if not os.read(pipe, 1):
        sys.exit(f"{job['name']}: the remap ended before step {job['step']}")
answer("all are at their steps")
signal.pause()
