# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What /etc/fstab says of mount points (fstab(5)). Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

# A tag, and the folder in which udev makes links by it.
_TAGS = {
    "UUID": "by-uuid",
    "LABEL": "by-label",
    "PARTUUID": "by-partuuid",
    "PARTLABEL": "by-partlabel",
    "ID": "by-id",
}
# Options with which systemd does not mount at boot by itself.
_BY_OTHERS = ("noauto", "x-systemd.automount")


@dataclass(frozen=True)
class Mount:
    """A line that mounts a device.

    Args:
        device: path of the device, or of a link to it.
        point: the mount point.
        auto: whether it is mounted at boot.
    """

    device: str
    point: str
    auto: bool


def mounts(text: str) -> Iterator[Mount]:
    """The lines of fstab that mount devices; what makes no sense is left out."""
    return (mount for mount in _all_mounts(text) if mount.device.startswith("/dev/"))


def _all_mounts(text: str) -> Iterator[Mount]:
    """Also those of network file systems, ZFS, and folders that are mounted once more."""
    for line in text.splitlines():
        fields = line.split()
        if len(fields) < 4 or fields[0].startswith("#") or not fields[1].startswith("/"):
            continue
        tag, equals, value = fields[0].partition("=")
        if equals and tag in _TAGS:
            device = f"/dev/disk/{_TAGS[tag]}/{_encoded(_unquoted(plain(value)))}"
        else:
            device = plain(fields[0])
        options = fields[3].split(",")
        auto = not any(option in _BY_OTHERS for option in options)
        yield Mount(device, plain(fields[1]), auto)


def not_mounted_above(path: str, text: str, mounted: Collection[str]) -> str:
    """The innermost mount point of fstab that a path is on, if nothing is mounted there, or "".

    Args:
        path: any absolute path.
        text: fstab.
        mounted: the mount points that are in use.
    """
    points = [m.point.rstrip("/") for m in _all_mounts(text) if m.auto]
    above = [point for point in points if point and f"{path}/".startswith(f"{point}/")]
    innermost = max(above, key=len, default="")
    return "" if innermost in mounted else innermost


def plain(field: str) -> str:
    """A field without its escapes: a backslash and three octal digits for a byte.

    The kernel escapes mount points in the same way (proc(5)).
    """
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _encoded(value: str) -> str:
    """A value as it is in udev's links (encode_devnode_name in systemd's device-util)."""
    safe = (
        c if ord(c) > 127 or c.isalnum() or c in "#+-.:=@_" else f"\\x{ord(c):02x}" for c in value
    )
    return "".join(safe)


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value
