# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Writes to the integrity device of a target's spare and looks at what it does."""

from __future__ import annotations

import errno
import hashlib
import subprocess
from typing import Any

from scene import (
    PIECE_SECTORS,
    SECTOR_BYTES,
    BlockDevice,
    Engine,
    absent,
    answer,
    arguments,
    pattern,
    present,
    problems,
)

from dm_remap import copies
from dm_remap.format import Geometry, geometry_of, slot_sectors_of

SLOT_SECTORS = 1024


def slots(path: str, geometry: Geometry) -> list[str]:
    """Digest of every slot of the raw spare."""
    with BlockDevice(path) as device:
        return [
            hashlib.sha256(device.read(sector, SLOT_SECTORS)).hexdigest()
            for sector in slot_sectors_of(geometry)
        ]


def unwritten(path: str, sectors: list[int]) -> list[str]:
    """Those of ``sectors`` that do not read as EILSEQ."""
    found = []
    with BlockDevice(path) as device:
        block = device.logical_block // SECTOR_BYTES
        for sector in sectors:
            try:
                device.read(sector // block * block, block)
            except OSError as error:
                if error.errno != errno.EILSEQ:
                    found.append(f"sector {sector}: {error}")
            else:
                found.append(f"sector {sector} reads")
    return found


def runs(chunks: list[int]) -> list[tuple[int, int]]:
    """Ascending chunks as runs of (first, count)."""
    found: list[tuple[int, int]] = []
    for chunk in chunks:
        if found and sum(found[-1]) == chunk:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((chunk, 1))
    return found


def examine(given: dict[str, Any]) -> dict[str, Any]:
    """Write the chunks asked for, look at the rest, and look again after a new activation."""
    name, main, path, seed = given["name"], given["main"], given["spare"], given["seed"]
    present(name, main, [path])
    target = Engine().require(name)
    geometry = geometry_of(target.metadata, 0)
    size = geometry.chunk_sectors
    usable = [chunk for chunk in range(geometry.chunks) if geometry.holds(chunk)]
    edge = geometry.reserved_chunks
    if given["every_chunk"]:
        chunks = usable
    else:
        near = {0, 1, geometry.chunks - 1, edge.start - 1, edge.stop, len(usable) // 3}
        chunks = sorted(near & set(usable))
    empty = sorted(set(range(geometry.chunks)) - set(chunks))
    probes = [chunk * size + offset for chunk in empty[:3] + empty[-3:] for offset in (0, size - 8)]
    device_path = f"/dev/mapper/{name}-spare0"
    before = slots(path, geometry)
    wrong = unwritten(device_path, [0, size, geometry.data_sectors - 8, *probes])
    ranges = [(first * size, count * size) for first, count in runs(chunks)]
    with BlockDevice(device_path, writable=True) as device:
        sectors = device.sectors
        for start, count in ranges:
            for first in range(start, start + count, PIECE_SECTORS):
                length = min(PIECE_SECTORS, start + count - first)
                device.write(first, pattern(seed, first, length))
        device.flush()
    wrong += problems(device_path, seed, ranges) + unwritten(device_path, probes)
    after = slots(path, geometry)
    for mapped in (name, f"{name}-spare0", f"{name}-spare0-data", f"{name}-spare0-tags"):
        subprocess.run(["dmsetup", "remove", "--retry", mapped], check=True)
    with BlockDevice(path) as device:
        survey = copies.survey(device)
    actions = present(name, main, [path])
    wrong += problems(device_path, seed, ranges) + unwritten(device_path, probes)
    absent(name)
    present(name, main, [path])
    # What the spare held for its former target must not come back.
    wrong += unwritten(device_path, [chunk * size for chunk in chunks])
    return {
        "data_sectors": geometry.data_sectors,
        "sectors": sectors,
        "written": len(chunks),
        "usable": geometry.usable_chunks,
        "slots_untouched": before == after,
        "good_copies": len(survey.copies),
        "actions": actions,
        "wrong": wrong,
    }


answer(examine(arguments()))
