# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Remaps and returns many chunks, each in one task, on a target that has many already."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from scene import HASTY, answer, arguments, fill, peak_bytes, present, problems

from dm_remap import copies
from dm_remap.engine import Engine
from dm_remap.format import Extent, geometry_of
from dm_remap.moved import RemapReport

CHUNK_SECTORS = 8


def scatter(name: str, count: int) -> None:
    """Have the metadata say that every second of the first chunks is remapped."""
    engine = Engine()
    with engine.locked(name):
        target = engine.require(name)
        geometry = geometry_of(target.metadata, 0)
        places = [chunk for chunk in range(geometry.chunks) if geometry.holds(chunk)][:count]
        extents = tuple(Extent(2 * i, 1, 0, place) for i, place in enumerate(places))
        with engine.opened(target) as disks:
            new = replace(target.metadata.successor(time.time_ns()), extents=extents)
            copies.commit(disks.members, target.metadata, new)


def move(name: str, chunks: Sequence[int], back: bool) -> dict[str, Any]:
    """Remap chunks, or return them to main; how many moved, by how many commits and swaps."""
    steps: Counter[str] = Counter()
    engine = Engine(step=lambda done: steps.update([done]))
    ranges = [(chunk * CHUNK_SECTORS, 1) for chunk in chunks]
    with engine.locked(name):
        before = engine.require(name).metadata.generation
        act = engine.return_to_main if back else engine.remap
        report: RemapReport = act(name, ranges, patience=HASTY)
    return {
        "moved": sum(chunk.moved for chunk in report.chunks),
        "commits": report.generation - before,
        "freezes": steps["frozen"],
        "swaps": steps["swapped"],
        "lost": report.lost,
        "seconds": [report.seconds, report.salvage_seconds, report.pause_seconds],
    }


def main() -> None:
    """Do it, with a look at the data after each step."""
    given = arguments()
    name, present_count = given["name"], given["present"]
    first = 2 * present_count
    chunks = [first + 2 * i for i in range(given["moving"])]
    sectors = (first * CHUNK_SECTORS, 2 * given["moving"] * CHUNK_SECTORS)
    present(name, given["main"], [given["spare"]], CHUNK_SECTORS * 512)
    scatter(name, present_count)
    fill(f"/dev/mapper/{name}", 1, *sectors)
    done, wrong = [], []
    for back in (False, True, False):
        done.append(move(name, chunks, back))
        wrong += problems(f"/dev/mapper/{name}", 1, [sectors])
    answer({"done": done, "wrong": wrong, "peak_bytes": peak_bytes()})


main()
