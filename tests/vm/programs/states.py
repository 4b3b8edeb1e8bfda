# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Tells what the metadata of targets says."""

from __future__ import annotations

from scene import answer, arguments, state

answer([state(name) for name in arguments()["names"]])
