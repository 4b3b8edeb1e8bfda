# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Remaps a chunk and tells the links that udev's events gave the target meanwhile."""

from __future__ import annotations

import subprocess

import pyudev
from scene import answer, arguments, remap

given = arguments()
monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source="udev")
monitor.filter_by("block")
monitor.start()
remap(given["name"], [(given["sector"], 1)])
subprocess.run(["udevadm", "settle"], check=True)
seen = []
while (device := monitor.poll(timeout=0)) is not None:
    if device.get("DM_NAME") == given["name"]:
        seen.append([device.action, sorted(device.device_links)])
answer(seen)
