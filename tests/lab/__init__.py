# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Virtual machines with disks that fail on demand: see docs/lab.md."""

from __future__ import annotations

from .disk import Disk
from .faults import Fault
from .image import ensure_image
from .machine import CommandFailed, GuestDisk, Machine, Result
from .paths import LabError

__all__ = [
    "CommandFailed",
    "Disk",
    "Fault",
    "GuestDisk",
    "LabError",
    "Machine",
    "Result",
    "ensure_image",
]
