# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reads that nobody waits for, or not for long: one read of a sick disk can take seconds."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from .salvage import Salvage, Unfinished


class Device(Protocol):
    """A device that is read; sectors are of 512 bytes."""

    name: str
    sectors: int

    def read(self, sector: int, count: int) -> bytes:
        """Read, or raise OSError."""

    def close(self) -> None:
        """Close it."""


class HastyReader:
    """Reads a device by a thread of its own, and does not wait for it for ever.

    Args:
        device: open for this reader alone, which closes it.
        clock: seconds that only rise.
    """

    def __init__(self, device: Device, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = device.name
        self.sectors = device.sectors
        self._device = device
        self._clock = clock
        self._ends = 0.0
        self._stuck = False
        self._asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=f"reads {device.name}", daemon=True).start()

    def begin(self, seconds: float) -> None:
        """Give all reads from now on so many seconds together."""
        self._ends = self._clock() + seconds

    def read(self, sector: int, count: int) -> bytes:
        """Read as the device does.

        Raises:
            OSError: the device's own error.
            Unfinished: the time is over; this reader is of no use any more.
        """
        left = self._ends - self._clock()
        if left > 0 and not self._stuck:
            self._asked.put((sector, count))
            try:
                data, error = self._answers.get(timeout=left)
            except queue.Empty:
                self._stuck = True
            else:
                if error is not None:
                    raise error
                return bytes(data)
        nothing = Salvage(sector, 1, bytearray(), [])
        raise Unfinished("takes too long to read", nothing, self.name, "give it more time")

    def close(self) -> None:
        """Close the device, as soon as its last read has ended."""
        self._asked.put(None)

    def _run(self) -> None:
        while True:
            asked = self._asked.get()
            if asked is None:
                self._device.close()
                return
            try:
                self._answers.put((self._device.read(*asked), None))
            except BaseException as error:
                self._answers.put((b"", error))


def in_line(work: Callable[[], None]) -> Future[None]:
    """Do work at once; its end."""
    end: Future[None] = Future()
    carry_out(work, end)
    return end


def aside(work: Callable[[], None]) -> Future[None]:
    """Have work done by a thread of its own, which does not outlive the process; its end."""
    end: Future[None] = Future()
    thread = threading.Thread(target=carry_out, args=(work, end), name="reads", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        # No memory is left for another thread.
        carry_out(work, end)
    return end


def carry_out(work: Callable[[], None], end: Future[None]) -> None:
    """Do work and note its end."""
    try:
        work()
    except BaseException as error:
        end.set_exception(error)
    else:
        end.set_result(None)
