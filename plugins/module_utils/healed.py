# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the healer reports: the connection to it, and reports as events.

The healer hands out one report a line and forgets it when a line comes back, so it answers to what
is in the journal only. `healer.ReportServer` is the other end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Callable

from . import events
from .events import Draft, counted
from .tracing import READ
from .watching import Finding

# What the healer reports; see `reflex.Reflex`.
HEALING = "healing"


_RETRY_SECONDS = 2.0
# Far above any report: its ranges are of one healing.
_MAX_LINE = 64 << 20

log = logging.getLogger("dm-remapd")

Ranges = Sequence[tuple[int, int]]


def finding_of(report: Mapping[str, Any], is_news: Callable[[str, str], bool]) -> Finding:
    """Translate a report into its event, and what need not be told again (pure).

    Args:
        report: what the healer says of the end of a healing.
        is_news: whether a condition of a target was not told for some time.

    Raises:
        KeyError: a part is missing, or the kind is not known.
        TypeError: a part has another form.
        ValueError: likewise.
    """
    kind, target, device = report["type"], str(report["target"]), _kernel_name(report["device"])
    hit, moved, lost = (_ranges(report[name]) for name in ("hit", "moved", "lost"))
    told = Finding(target, probed=hit, alive=True)
    conditions: tuple[str, ...] = ()
    drafted: tuple[str, str, Ranges, Ranges]
    if kind == "healed" and lost:
        message = f"{_sectors(lost, device)} could not be read by any means and are lost"
        drafted = (events.SECTORS_LOST, message, lost, moved)
    elif kind == "healed":
        message = f"{_sectors(moved, device)} were moved to a spare with all of their data"
        drafted = (events.REMAPPED, message, (), moved)
    elif kind == "passed":
        message = f"a {report['operation']} of {device} failed and succeeded when repeated"
        drafted = (events.TRANSIENT_ERROR, message, (), hit)
    elif kind == "failed":
        # The daemon's own look at the range tells which sectors need a remap.
        message = f"failed I/O could not be healed, and failed: {report['reason']}"
        drafted, told = (events.REMAP_FAILED, message, (), hit), Finding(target)
        conditions = (f"{events.REMAP_FAILED}/{report['reason']}",)
    elif kind == "flush_failed":
        message = f"a flush of {device} failed, so writes that it had acknowledged may be lost"
        drafted, told = (events.FLUSH_FAILED, message, (), ()), Finding(target)
        own = f"{events.DEVICE_ERROR}/flush/{int(report['errno'])}"
        conditions = (events.FLUSH_FAILED, own)
    elif kind == "device_lost":
        message = f"its main {device} is gone or offline, and its I/O waits for it"
        drafted, told = (events.DEVICE_LOST, message, (), hit), Finding(target, lost=True)
        conditions = (events.DEVICE_LOST,)
    elif kind == "spare_lost":
        drafted = (events.SPARE_LOST, str(report["reason"]), (), hit)
        told = Finding(target)
        conditions = (f"{events.SPARE_LOST}/{report['reason']}",)
    else:
        raise KeyError(kind)
    requests = int(report["requests"])
    if conditions and not is_news(target, conditions[0]):
        return Finding(target, lost=told.lost, merged=requests)
    draft = Draft(
        drafted[0],
        f"{target}: {drafted[1]}",
        target,
        device,
        str(report["operation"]),
        tuple(drafted[2]),
        tuple(drafted[3]),
        int(report["errno"]),
        requests,
        generation=int(report["generation"]),
    )
    return Finding(
        target,
        events.split_draft(draft),
        {READ: ()},
        told.probed,
        conditions,
        alive=told.alive,
        lost=told.lost,
    )


def _ranges(items: Sequence[Mapping[str, Any]]) -> Ranges:
    return tuple((int(item["start"]), int(item["count"])) for item in items)


def _kernel_name(path: str) -> str:
    return path[len("/dev/") :] if path.startswith("/dev/") else path


def _sectors(ranges: Ranges, device: str) -> str:
    total = counted(sum(count for _unused, count in ranges), "sector")
    return f"{total} of {device} from {ranges[0][0]} on"


class HealerLink:
    """Follows the healer's reports for ever.

    Args:
        path: its socket.
        take: takes over a report of an end; returns when it is in the journal.
    """

    def __init__(self, path: str, take: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        self._path = path
        self._take = take
        self._healing: set[str] = set()
        self._news = asyncio.Event()
        self.connected = False
        self.trouble = "not connected yet"

    async def follow(self) -> None:
        """Take over reports until cancelled."""
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(self._path, limit=_MAX_LINE)
            except OSError as error:
                self.trouble = f"{self._path}: {error.strerror or error}"
            else:
                with contextlib.closing(writer):
                    await self._follow(reader, writer)
                self.trouble = f"{self._path}: the connection ended"
            # Many daemons must not do this in step with each other.
            await asyncio.sleep(_RETRY_SECONDS * random.uniform(0.5, 1.0))

    async def _follow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connected = True
        try:
            while True:
                line = await reader.readline()
                if not line.endswith(b"\n"):
                    return
                await self._receive(line)
                writer.write(b"\n")
                await writer.drain()
        except (OSError, ValueError) as error:
            log.warning("the healer's reports: %s", error)
        finally:
            self.connected = False
            self._healing.clear()
            self._news.set()

    async def _receive(self, line: bytes) -> None:
        try:
            report = json.loads(line)
            kind, target = report["type"], report["target"]
        except (ValueError, KeyError, TypeError):
            # It would come again and again, and hide all others.
            log.error("the healer reports what is not understood: %.200r", line)
            return
        if kind == HEALING:
            self._healing.add(target)
        else:
            await self._take(report)
            self._healing.discard(target)
        self._news.set()

    async def wait(self, targets: Sequence[str], seconds: float) -> None:
        """Wait until the healer had its chance, which it has only while it is connected.

        Args:
            targets: names of those that it may heal.
            seconds: for which to wait at least; then as long as it works on one of them.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while self.connected:
            left = end - loop.time()
            busy = not self._healing.isdisjoint(targets)
            if left <= 0 and not busy:
                return
            self._news.clear()
            news = asyncio.ensure_future(self._news.wait())
            try:
                await asyncio.wait({news}, timeout=left if left > 0 else None)
            finally:
                news.cancel()


def number_of(report: Mapping[str, Any]) -> tuple[int, int]:
    """When the reports began, and the report's number since then."""
    begun, number = report["id"]
    return int(begun), int(number)


def known_number(note: str) -> tuple[int, int]:
    """The last report that is in the journal, as `note_of` wrote it."""
    begun, _unused, number = note.partition(" ")
    return (int(begun), int(number)) if number else (0, 0)


def note_of(number: tuple[int, int]) -> str:
    """What the journal keeps of the last report."""
    return f"{number[0]} {number[1]}"
