# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Takes the healer's reports, as the daemon does."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from typing import Any

from dm_remap.service import HEALER_SOCKET


class Listener(threading.Thread):
    """Collects what the healer reports from now on, and what nobody has taken yet."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.reports: list[dict[str, Any]] = []
        self._news = threading.Condition()
        self._link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._link.connect(HEALER_SOCKET)

    def run(self) -> None:
        with self._link.makefile("r", encoding="utf-8") as lines:
            for line in lines:
                with self._news:
                    self.reports.append(json.loads(line))
                    self._news.notify_all()
                self._link.sendall(b"\n")

    def wait(self, condition: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        """The reports, as soon as they are as wanted."""
        with self._news:
            self._news.wait_for(lambda: condition(self.reports))
            return list(self.reports)
