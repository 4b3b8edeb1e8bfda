# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Adds, drains and replaces spares and returns chunks, under a verifying load on a filesystem."""

from __future__ import annotations

import os
import subprocess
from typing import Any

from fio import loaded
from load import CHECK, MAKE, MOUNT, run
from scene import HASTY, Engine, answer, arguments, state

from dm_remap.plan_spares import SpareRequest, plan_spare_absent, plan_spare_present
from dm_remap.planner import plan_present
from dm_remap.request import Request


def create(name: str, main: str, spare: str) -> None:
    """Make a target that passes errors on, with one spare."""
    engine = Engine()
    engine.check_host()
    with engine.locked(name):
        request = Request(name, main, (spare,), on_error="fail")
        engine.apply(plan_present(request, engine.see(name, main, request.spares)))


def change(name: str, device: str, add: bool, replaces: str | None = None) -> dict[str, Any]:
    """Change the spares as the module does; what was done, and what a second run would do."""
    engine = Engine(guard=True)
    request = SpareRequest(name, device, replaces)
    plan_for = plan_spare_present if add else plan_spare_absent
    with engine.locked(name):
        plan = plan_for(request, engine.see_spare(name, device, replaces, add))
        chunks = engine.apply(plan)
        again = plan_for(request, engine.see_spare(name, device, replaces, add))
    return {
        "actions": [action.kind for action in plan.actions],
        "moved": len(chunks),
        "lost": [item for chunk in chunks for item in chunk.lost],
        "again": [action.kind for action in again.actions],
        "spares": sorted({chunk.spare for chunk in chunks}),
    }


def move(name: str, chunks: list[int], back: bool) -> dict[str, Any]:
    """Remap chunks, or return them to main, all in one task."""
    engine = Engine(guard=True)
    size = state(name)["chunk_sectors"]
    ranges = [(chunk * size, 1) for chunk in chunks]
    with engine.locked(name):
        act = engine.return_to_main if back else engine.remap
        report = act(name, ranges, patience=HASTY)
    return {
        "moved": sum(chunk.moved for chunk in report.chunks),
        "staying": [chunk.reason for chunk in report.staying],
        "lost": report.lost,
        "pause_seconds": report.pause_seconds,
    }


def walk(given: dict[str, Any]) -> dict[str, Any]:
    """Do it all; what came of it."""
    name, main, chunks = given["name"], given["main"], given["chunks"]
    first, second, third = given["spares"]
    create(name, main, first)
    path = f"/dev/mapper/{name}"
    run([*MAKE["ext4"], path])
    os.makedirs(MOUNT, exist_ok=True)
    run(["mount", path, MOUNT])
    done, working = {}, []
    half = len(chunks) // 2
    steps = {
        "remap": lambda: move(name, chunks, back=False),
        "add": lambda: change(name, second, add=True),
        "drain": lambda: change(name, first, add=False),
        "return": lambda: move(name, chunks[:half], back=True),
        "replace": lambda: change(name, third, add=True, replaces=second),
        "remap again": lambda: move(name, chunks[:half], back=False),
    }
    try:
        with loaded(MOUNT) as loads:
            for step, act in steps.items():
                working.append(all(load.is_alive() for load in loads))
                done[step] = act()
    finally:
        run(["umount", MOUNT])
    check = subprocess.run([*CHECK["ext4"], path], capture_output=True, text=True, check=False)
    return {
        "done": done,
        "always_loaded": all(working),
        "failures": {load.kind: load.failure for load in loads if load.failure},
        "check": [check.returncode, check.stdout + check.stderr],
        **state(name),
    }


if __name__ == "__main__":
    answer(walk(arguments()))
