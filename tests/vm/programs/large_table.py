# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Loads and reads a table of many lines; what that took of memory."""

from __future__ import annotations

import os

from scene import answer, arguments, peak_bytes

from dm_remap.devmapper import DeviceMapper, Segment

given = arguments()
number = os.stat(given["main"]).st_rdev
devno = f"{os.major(number)}:{os.minor(number)}"
lines = given["lines"]
# Each line leads to where the one of the other end would.
table = [Segment(8 * i, 8, "linear", f"{devno} {8 * (lines - 1 - i)}") for i in range(lines)]
mapper = DeviceMapper()
mapper.create("large", "DMREMAP-test", table, private=True)
try:
    before = peak_bytes()
    same = mapper.table("large") == table
    mapper.load("large", table)
    mapper.clear("large")
    answer({"same": same, "more_bytes": peak_bytes() - before})
finally:
    mapper.remove("large")
