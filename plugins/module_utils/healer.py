# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The process of the reflex: its reports, its log, its start and its end.

What could wait for a file system is done by other threads, because that file system may be on the
target that waits for the reflex.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from .engine import Engine
from .errors import DmRemapError
from .format import Metadata
from .hasty import aside
from .memory import lock_memory
from .reflex import Reflex, Reports, wake_up
from .service import HEALER_SOCKET, notify
from .tracing import REFLEX_INSTANCE, TraceInstance

# A thread may have to be made while applications wait, and all of its stack is locked memory.
_STACK_BYTES = 512 << 10
# Any real-time priority is above all that has none.
_PRIORITY = 10

log = logging.getLogger("dm-remap-healer")


class Background:
    """A thread that carries out calls whose results nobody waits for."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="background", daemon=True).start()

    def call(self, function: Callable[[], None]) -> None:
        """Have a function called some time."""
        self._calls.put(function)

    def _run(self) -> None:
        while True:
            function = self._calls.get()
            try:
                function()
            except Exception:
                log.exception("in the background")


class LaterBackups(Engine):
    """An engine that keeps the metadata's backups in the background."""

    def __init__(self, background: Background) -> None:
        super().__init__()
        self._background = background

    def backup(self, metadata: Metadata) -> None:
        """Have the metadata kept on the host some time."""
        keep = super().backup
        self._background.call(lambda: keep(metadata))


class ReportServer:
    """Hands reports to one listener at a time, over a socket in the file system.

    Each report is a line of JSON, and is forgotten when the listener has answered with a line.

    Args:
        reports: the reports.
        path: path of the socket.
    """

    def __init__(self, reports: Reports, path: str = HEALER_SOCKET) -> None:
        self._reports = reports
        self._news = threading.Event()
        reports.listener = self._news.set
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            self._socket.bind(path)
        finally:
            os.umask(before)
        self._socket.listen(1)
        threading.Thread(target=self._run, name="reports", daemon=True).start()

    def _run(self) -> None:
        while True:
            link, _unused = self._socket.accept()
            with contextlib.suppress(OSError), link, link.makefile("r", encoding="utf-8") as lines:
                self._serve(link, lines)

    def _serve(self, link: socket.socket, answers: Any) -> None:
        while True:
            self._news.clear()
            report = self._reports.first()
            if report is None:
                self._news.wait()
                continue
            link.sendall(json.dumps(report).encode() + b"\n")
            if not answers.readline():
                return
            self._reports.forget(report)


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Log to standard error by another thread."""
    lines: queue.SimpleQueue[Any] = queue.SimpleQueue()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    listener = logging.handlers.QueueListener(lines, handler)
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(logging.handlers.QueueHandler(lines))
    listener.start()
    try:
        yield
    finally:
        listener.stop()


def _come_first() -> None:
    """Stay in memory, and run before all that waits for this process, as multipathd does."""
    lock_memory()
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(_PRIORITY))
    except OSError as error:
        log.warning("runs without real-time priority: %s", error.strerror)


def main() -> int:
    """Heal until SIGTERM or SIGINT; returns the exit status."""
    threading.stack_size(_STACK_BYTES)
    with _logging(), wake_up() as (stop, wake):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: wake())
        try:
            engine = LaterBackups(Background())
            engine.check_host()
            reports = Reports()
            ReportServer(reports)
            _come_first()
            trace = TraceInstance(name=REFLEX_INSTANCE)
            reflex = Reflex(engine, trace, reports.add, aside=aside)
            reflex.run(stop, lambda: notify("READY=1"))
        except DmRemapError as error:
            log.critical("%s", error)
            return 1
        notify("STOPPING=1")
        return 0


if __name__ == "__main__":
    raise SystemExit(main())
