# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Makes a target over a main that holds the pattern."""

from __future__ import annotations

from scene import answer, arguments, fill, present, state

given = arguments()
fill(given["main"], given["seed"], 0, given["sectors"])
actions = present(given["name"], given["main"], given["spares"], given.get("chunk_bytes"))
again = present(given["name"], given["main"], given["spares"], given.get("chunk_bytes"))
answer({"actions": actions, "again": again, **state(given["name"])})
