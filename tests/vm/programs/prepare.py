# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Makes targets over mains that hold the pattern."""

from __future__ import annotations

from typing import Any

from scene import answer, arguments, fill, present, state


def prepare(given: dict[str, Any]) -> dict[str, Any]:
    """Make one target, twice over; the actions of both runs, and its state."""
    fill(given["main"], given["seed"], 0, given["sectors"])
    places = given["name"], given["main"], given["spares"]
    return {"actions": present(*places), "again": present(*places), **state(given["name"])}


answer([prepare(target) for target in arguments()["targets"]])
