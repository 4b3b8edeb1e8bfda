# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A thread for calls that may block for long, such as reads of a sick disk.

The standard pools wait for their threads when the interpreter ends; these do not, so that a read
which the kernel does not finish cannot keep the daemon from stopping.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from typing import Any, Callable


class Worker:
    """One thread that carries out calls in their order.

    Args:
        name: the thread's name.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._begun = 0.0
        threading.Thread(target=self._run, name=name, daemon=True).start()

    async def call(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Carry out a call and return its result, or raise what it raised.

        A cancelled wait does not cancel the call.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._calls.put((loop, future, function, arguments, named))
        return await future

    def busy_seconds(self) -> float:
        """Return how long the call that is being carried out has taken so far, 0 if none is."""
        begun = self._begun
        return time.monotonic() - begun if begun else 0.0

    def stop(self) -> None:
        """End the thread after the calls that wait."""
        self._calls.put(None)

    def _run(self) -> None:
        while True:
            item = self._calls.get()
            if item is None:
                return
            loop, future, function, arguments, named = item
            self._begun = time.monotonic()
            try:
                result, error = function(*arguments, **named), None
            except BaseException as raised:
                result, error = None, raised
            self._begun = 0.0
            try:
                loop.call_soon_threadsafe(_settle, future, result, error)
            except RuntimeError:
                return  # the loop has ended


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
