# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Makes a target that holds errors over a main that holds the pattern."""

from __future__ import annotations

from scene import answer, arguments, fill, present, state

given = arguments()
fill(given["main"], given["seed"], 0, given["sectors"])
present(given["name"], given["main"], [given["spare"]], on_error="hold", shim=given["shim"])
answer(state(given["name"]))
