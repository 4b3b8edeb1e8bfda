# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Looks at targets after a power cut: metadata before anything is repaired, then all the data."""

from __future__ import annotations

from typing import Any

from scene import (
    LOST_OFFSET,
    BlockDevice,
    Engine,
    answer,
    arguments,
    present,
    problems,
    remap,
    state,
    written_by,
)

from dm_remap import copies


def survey(path: str) -> copies.Survey:
    """What one spare carries."""
    with BlockDevice(path) as device:
        return copies.survey(device)


def describe(choice: copies.Choice, chunk: int) -> dict[str, Any]:
    """A whole generation in short: its number, and whether chunk and lost sector are in it."""
    metadata = choice.metadata
    start = chunk * metadata.config["chunk_sectors"]
    return {
        "generation": metadata.generation,
        "remapped": any(e.logical <= chunk < e.logical + e.length for e in metadata.extents),
        "lost": any(
            item.sector <= start + LOST_OFFSET < item.sector + item.count for item in metadata.lost
        ),
        "extents": sum(extent.length for extent in metadata.extents),
    }


def recover(given: dict[str, Any]) -> dict[str, Any]:
    """Look, activate, look again, and remap the chunk if that had not happened."""
    name, chunk, length = given["name"], given["chunk"], given["chunk_sectors"]
    surveys = {path: survey(path) for path in given["spares"]}
    alone = [describe(copies.choose({path: seen}), chunk) for path, seen in surveys.items()]
    together = describe(copies.choose(surveys), chunk)
    actions = present(name, given["main"], given["spares"])
    again = present(name, given["main"], given["spares"])
    start = chunk * length
    changed = written_by(given["steps"], given["step"], start)
    lost = set(given["lost"]) - set(changed)
    known = {int(sector): bytes.fromhex(data) for sector, data in given["changed"].items()}
    path = f"/dev/mapper/{name}"
    everything = [(0, given["sectors"])]
    wrong = problems(path, given["seed"], everything, lost, {**known, **changed})
    active = state(name)
    if not together["remapped"]:
        remap(name, [(start, 1)])
        around = [(start - length, 3 * length)]
        wrong += problems(path, given["seed"], around, lost, {**known, **changed})
    return {
        "name": name,
        "step": given["step"],
        "alone": alone,
        "together": together,
        "active": active,
        "actions": actions,
        "again": again,
        "wrong": wrong,
        "changed": {str(sector): data.hex() for sector, data in changed.items()},
        "end": state(name),
        "frozen": Engine().require(name).frozen is not None,
    }


answer([recover(target) for target in arguments()["targets"]])
