# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""A spare with chunks on it goes: what the target says, does, and is without it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from change_spares import create, move
from scene import Engine, answer, arguments, fill, problems, state

from dm_remap.plan_spares import SpareRequest, plan_spare_absent, plan_spare_present
from dm_remap.report import describe_target


def begin(given: dict[str, Any]) -> None:
    """Make the target, with chunks on a spare, and a second spare."""
    name, sectors = given["name"], given["sectors"]
    create(name, given["main"], given["spares"][0])
    fill(f"/dev/mapper/{name}", given["seed"], 0, sectors)
    move(name, given["chunks"], back=False)
    # What dm-integrity has in its journal it can read without the disk.
    for verb in ("suspend", "resume"):
        subprocess.run(["dmsetup", verb, f"{name}-spare0"], check=True)
    size = state(name)["chunk_sectors"]
    for chunk in given["chunks"]:
        # Other content on main, which must never show.
        fill(given["main"], given["seed"] + 1, chunk * size, size)
    engine = Engine()
    with engine.locked(name):
        request = SpareRequest(name, given["spares"][1])
        seen = engine.see_spare(name, request.device, None, True)
        engine.apply(plan_spare_present(request, seen))


def end(given: dict[str, Any]) -> dict[str, Any]:
    """Look at the target, use it, and give the lost spare up."""
    name, seed, sectors = given["name"], given["seed"], given["sectors"]
    path = f"/dev/mapper/{name}"
    size = state(name)["chunk_sectors"]
    gone = [s for chunk in given["chunks"] for s in range(chunk * size, chunk * size + size)]
    engine = Engine(guard=True)
    with engine.locked(name):
        target = engine.require(name)
        described = describe_target(target)
        wrong = problems(path, seed, [(0, sectors)], lost=gone)
        moved = engine.remap(name, [(given["fresh"] * size, 1)]).chunks[0].spare
        uuid = described["lost_spares"][0]["uuid"]
        request = SpareRequest(name, uuid, discard_remaps=True)
        plan = plan_spare_absent(request, engine.see_spare(name, uuid, None, False))
        engine.apply(plan)
        after = describe_target(engine.require(name))
    wrong += problems(path, seed, [(0, sectors)], lost=gone)
    fill(path, seed, gone[0], 1)
    wrong += problems(path, seed, [(gone[0], 1)])
    return {
        "degraded": described["degraded"],
        "lost_spares": described["lost_spares"],
        "spare_of_fresh": moved,
        "actions": [action.kind for action in plan.actions],
        "after": [after["degraded"], after["lost"], [s["index"] for s in after["spares"]]],
        "wrong": wrong,
    }


if __name__ == "__main__":
    asked = arguments()
    answer(begin(asked) if asked["phase"] == "begin" else end(asked))
    sys.exit(0)
