# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Remaps sectors of a target and tells whom the lost ones belonged to, and what it left behind."""

from __future__ import annotations

import os

from scene import HASTY, answer, arguments

from dm_remap.engine import Engine
from dm_remap.report import describe_remap

given = arguments()
with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
    file.write("3")
engine = Engine()
with engine.locked(given["name"]):
    report = engine.remap(given["name"], [tuple(item) for item in given["ranges"]], patience=HASTY)
engine.find_files(given["name"], report, given["seconds"])
loops = [name for name in os.listdir("/sys/block") if os.path.exists(f"/sys/block/{name}/loop")]
answer({**describe_remap(report), "loops": loops})
