# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""dm-remap hidden: which disks are hidden from being mounted or claimed, and why."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from ..errors import count_of
from ..hiding import Mains, roles_of
from .framework import Command, Exit, Host, Result
from .text import table


def hidden(host: Host, _options: argparse.Namespace) -> Result:
    """What is hidden or should be, and whether udev does so."""
    found = list(_devices(host))
    wrong = [device for device in found if device["role"] != device["hidden"]]
    rows = [
        [device["path"], device["role"], device["hidden"], device["target"], device["reason"]]
        for device in found
    ]
    lines = table("DEVICE ROLE HIDDEN TARGET REASON".split(), rows) if rows else ["nothing"]
    warnings = []
    if wrong:
        text = count_of(len(wrong), "disk")
        warnings.append(f"udev does not treat {text} so yet; run udevadm trigger, see docs/boot.md")
    return Result({"devices": found}, lines, Exit.FOUND if wrong else Exit.OK, warnings)


def _devices(host: Host) -> Iterator[dict[str, Any]]:
    known = [known for folder in host.mains for known in Mains(folder).all()]
    names = {str(one.target): one.name for one in known}
    scanned = host.look()
    for info, role in roles_of([(device.info, device.carries) for device in scanned.found], known):
        if role.kind or info.hidden:
            yield {
                "path": info.path,
                "devno": info.devno,
                "role": role.kind,
                "hidden": info.hidden,
                "target": names.get(role.target) or role.target,
                "reason": role.reason,
            }


COMMANDS = (
    Command(
        "hidden",
        "Show which disks are hidden from being mounted or claimed, and why",
        hidden,
        description=[
            "Mains and spares of targets have no links by UUID and by label, and LVM, md, btrfs, "
            "udisks and systemd leave them alone. ROLE is what a disk is to be hidden as, HIDDEN "
            "what udev hides it as; if they differ, the exit code is 4.",
        ],
        examples=[("dm-remap hidden", "All hidden disks.")],
    ),
)
