# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tells of block devices that appear, change and go, when udev has finished with them."""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass
from typing import Any

from .errors import DmRemapError


@dataclass(frozen=True)
class Event:
    """What udev tells of a block device.

    Args:
        action: ``add``, ``change``, ``remove`` or another one.
        devno: its number ``major:minor``.
        volume: UUID of a mapped device, or "".
    """

    action: str
    devno: str
    volume: str


def _load_library() -> Any:
    try:
        library = ctypes.CDLL("libudev.so.1", use_errno=True)
    except OSError as error:
        raise DmRemapError(
            "libudev is not installed", remedy="install the package libudev1 (systemd-libs)"
        ) from error
    handle, text = ctypes.c_void_p, ctypes.c_char_p
    # libudev.h
    prototypes: dict[str, tuple[Any, list[Any]]] = {
        "udev_new": (handle, []),
        "udev_monitor_new_from_netlink": (handle, [handle, text]),
        "udev_monitor_filter_add_match_subsystem_devtype": (ctypes.c_int, [handle, text, text]),
        "udev_monitor_set_receive_buffer_size": (ctypes.c_int, [handle, ctypes.c_int]),
        "udev_monitor_enable_receiving": (ctypes.c_int, [handle]),
        "udev_monitor_get_fd": (ctypes.c_int, [handle]),
        "udev_monitor_receive_device": (handle, [handle]),
        "udev_device_get_action": (text, [handle]),
        "udev_device_get_devnum": (ctypes.c_uint64, [handle]),
        "udev_device_get_property_value": (text, [handle, text]),
        "udev_device_unref": (handle, [handle]),
    }
    for name, (result, arguments) in prototypes.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library


class Monitor:
    """Events of block devices; from its making on none is missed, or it says so.

    Raises:
        DmRemapError: libudev is missing, or the kernel refuses.
    """

    # Some thousand events; whoever needs more is told that some are lost.
    _BUFFER_BYTES = 8 << 20

    def __init__(self) -> None:
        self._library = _load_library()
        context = self._library.udev_new()
        self._monitor = self._library.udev_monitor_new_from_netlink(context, b"udev")
        if not self._monitor:
            raise DmRemapError(
                f"udev's events cannot be received: {os.strerror(ctypes.get_errno())}",
                remedy="check that systemd-udevd runs",
            )
        match = self._library.udev_monitor_filter_add_match_subsystem_devtype
        match(self._monitor, b"block", None)
        self._library.udev_monitor_set_receive_buffer_size(self._monitor, self._BUFFER_BYTES)
        if self._library.udev_monitor_enable_receiving(self._monitor) < 0:
            raise DmRemapError("udev's events cannot be received", remedy="run as root")

    def fileno(self) -> int:
        """A file descriptor that can be read when an event is there."""
        return int(self._library.udev_monitor_get_fd(self._monitor))

    def next(self) -> Event | None:
        """The next event that is there, or None. One without a device says that some were lost."""
        ctypes.set_errno(0)
        device = self._library.udev_monitor_receive_device(self._monitor)
        if not device:
            return Event("", "", "") if ctypes.get_errno() == errno.ENOBUFS else None
        try:
            number = self._library.udev_device_get_devnum(device)
            action = self._library.udev_device_get_action(device) or b""
            volume = self._library.udev_device_get_property_value(device, b"DM_UUID") or b""
            return Event(
                action.decode(errors="replace"),
                f"{os.major(number)}:{os.minor(number)}",
                volume.decode(errors="replace"),
            )
        finally:
            self._library.udev_device_unref(device)
