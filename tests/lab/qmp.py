# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""A small client of QEMU's machine protocol (QMP)."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

from .paths import LabError


class Qmp:
    """One connection to a QEMU process.

    Args:
        path: the unix socket; reached through its directory, so its length is not limited.
        timeout: seconds to wait for any one answer.

    Raises:
        LabError: QEMU does not listen.
    """

    def __init__(self, path: Path, timeout: float = 60.0) -> None:
        self._events: list[dict[str, Any]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        directory = os.open(path.parent, os.O_PATH)
        try:
            self._socket.connect(f"/proc/self/fd/{directory}/{path.name}")
        except OSError as error:
            self._socket.close()
            raise LabError(f"{path}: QEMU does not answer ({error})") from error
        finally:
            os.close(directory)
        self._reader = self._socket.makefile("r", encoding="utf-8")
        self._receive()
        self.execute("qmp_capabilities")

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._reader.readline()
        except TimeoutError as error:
            raise LabError("QEMU did not answer in time") from error
        except OSError as error:
            raise LabError(f"QEMU has closed its connection ({error})") from error
        if not line:
            raise LabError("QEMU has closed its connection")
        message: dict[str, Any] = json.loads(line)
        return message

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command and return its result; raises LabError with QEMU's own words."""
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise LabError(f"QEMU has closed its connection ({error})") from error
        while True:
            message = self._receive()
            if "event" in message:
                self._events.append(message)
            elif "error" in message:
                raise LabError(f"QEMU refused {command}: {message['error']['desc']}")
            else:
                return message["return"]

    def wait_event(self, name: str, **data: Any) -> dict[str, Any]:
        """Return the next event ``name`` whose data contains all of ``data``."""
        while True:
            for event in self._events:
                content = event.get("data", {})
                if event["event"] == name and all(content.get(k) == v for k, v in data.items()):
                    self._events.remove(event)
                    return event
            message = self._receive()
            if "event" in message:
                self._events.append(message)

    def close(self) -> None:
        """Close the connection; QEMU runs on."""
        with contextlib.suppress(OSError):
            self._reader.close()
            self._socket.close()
