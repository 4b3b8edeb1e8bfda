# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the services tell systemd and each other."""

from __future__ import annotations

import os
import socket

# Where the healer hands out its reports.
HEALER_SOCKET = "/run/dm-remap/healer.sock"


def notify(state: str) -> None:
    """Tell systemd about the service's state (sd_notify(3)); does nothing without systemd."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as link:
        link.sendto(state.encode("ascii"), address)
