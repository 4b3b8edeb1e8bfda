# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Remaps ranges of a target, then reads every block of their chunks and of the neighbours.

Afterwards it writes to the lost sectors and reads them again.
"""

from __future__ import annotations

import os

from scene import SECTOR_BYTES, BlockDevice, Patience, answer, arguments, problems, remap, state

given = arguments()
name, seed, ranges = given["name"], given["seed"], given["ranges"]
path = f"/dev/mapper/{name}"
before = state(name)
refused = []
for sector in given.get("write_first", []):
    # What an application meets before anybody has remapped.
    with BlockDevice(path, writable=True) as device:
        size = device.logical_block
        try:
            device.write(sector, os.urandom(size))
        except OSError as error:
            refused.append(error.errno)
report = remap(name, ranges, Patience(**given["patience"]))
again = remap(name, ranges)
lost = [start + i for start, count in report["lost"] for i in range(count)]
chunk = before["chunk_sectors"]
whole = [(max(0, item["start"] - chunk), 3 * chunk) for item in report["chunks"]]
wrong = problems(path, seed, whole, lost)

changed = {}
with BlockDevice(path, writable=True) as device:
    block = device.logical_block // SECTOR_BYTES
    heal = sorted({*(sector // block * block for sector in lost), *given.get("write", [])})
    for sector in heal:
        changed[sector] = os.urandom(device.logical_block)
        device.write(sector, changed[sector])
    device.flush()
wrong_after_writing = problems(path, seed, whole, (), changed)
answer(
    {
        "refused": refused,
        "report": report,
        "again": again,
        "wrong": wrong,
        "written": heal,
        "wrong_after_writing": wrong_after_writing,
        **state(name),
    }
)
