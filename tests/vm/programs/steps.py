# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Tells the steps of a remap, by doing one."""

from __future__ import annotations

from scene import answer, arguments, remap, state

given = arguments()
steps: list[str] = []
start = given["chunk"] * state(given["name"])["chunk_sectors"]
remap(given["name"], [(start, 1)], step=steps.append)
answer(steps)
