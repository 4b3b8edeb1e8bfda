# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The events that a host reports: one flat, versioned JSON object each.

An event says what happened to one device of one target. `docs/events.md` describes every field.
"""

from __future__ import annotations

import uuid
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

from .extents import merge_sectors

SCHEMA = 1

SECTOR_ERROR = "sector_error"
TRANSIENT_ERROR = "transient_error"
DEVICE_ERROR = "device_error"
DEVICE_LOST = "device_lost"
DEVICE_SLOW = "device_slow"
BLIND = "blind"
OVERRUN = "overrun"
REMAPPED = "remapped"
SECTORS_LOST = "sectors_lost"
REMAP_FAILED = "remap_failed"
FLUSH_FAILED = "flush_failed"
SPARE_LOST = "spare_lost"
STARTED = "started"
POOL_WARN = "pool_warn"
POOL_CRITICAL = "pool_critical"
POOL_FULL = "pool_full"

SEVERITIES: Mapping[str, str] = {
    SECTOR_ERROR: "error",
    TRANSIENT_ERROR: "warning",
    DEVICE_ERROR: "error",
    DEVICE_LOST: "critical",
    DEVICE_SLOW: "warning",
    BLIND: "critical",
    OVERRUN: "error",
    REMAPPED: "warning",
    SECTORS_LOST: "critical",
    REMAP_FAILED: "error",
    FLUSH_FAILED: "critical",
    SPARE_LOST: "critical",
    STARTED: "info",
    POOL_WARN: "warning",
    POOL_CRITICAL: "error",
    POOL_FULL: "critical",
}

# An event must stay small for the rule engine; a longer list goes into several events.
MAX_RANGES = 512
# Of files the rest is only counted.
MAX_FILES = 64

_NAMESPACE = uuid.UUID("6f0c6d57-5d0b-5b0e-9d43-1c1f3a5be6a1")
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_MACHINE_ID = "/etc/machine-id"


@dataclass(frozen=True)
class Draft:
    """What happened, before the journal gave it a number.

    Args:
        type: one of the names in `SEVERITIES`.
        message: a sentence for a person.
        target: name of the target, or "" when the event is about the host.
        device: kernel name of the device (`sda`), or "".
        operation: `read`, `write`, `flush`, or "".
        sectors: ranges (start, count) in logical sectors of the target that need a remap, or that
            are lost.
        suspect: ranges (start, count) of the failed requests, or of what was moved, in the same
            unit.
        errno: positive error number, 0 when there is none.
        requests: number of failed requests that led to this event.
        merged: number of requests since the last event of this device that told nothing new.
        generation: generation of the target's metadata when it was seen, 0 if unknown.
        files: whom lost sectors belonged to: `start`, `count`, `kind` and `path` of each.
    """

    type: str
    message: str
    target: str = ""
    device: str = ""
    operation: str = ""
    sectors: Sequence[tuple[int, int]] = ()
    suspect: Sequence[tuple[int, int]] = ()
    errno: int = 0
    requests: int = 0
    merged: int = 0
    generation: int = 0
    files: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Origin:
    """Who reports: the host's name in the inventory, its id, and this boot's id."""

    host: str
    host_id: uuid.UUID
    boot_id: str


def hashed_machine_id(machine_id: str = _MACHINE_ID) -> uuid.UUID:
    """Return what names this host elsewhere.

    Args:
        machine_id: file with the machine id. The id itself is confidential (machine-id(5)), so only
            a hash of it leaves the host.

    Raises:
        OSError: there is no such file.
    """
    with open(machine_id, encoding="ascii") as stream:
        return uuid.uuid5(_NAMESPACE, stream.read().strip())


def local_origin(host: str, machine_id: str = _MACHINE_ID, boot_id: str = _BOOT_ID) -> Origin:
    """Return the origin of this host.

    Args:
        host: name that the controller knows this host by.
        machine_id: file with the machine id.
        boot_id: file with the kernel's boot id.
    """
    with open(boot_id, encoding="ascii") as stream:
        return Origin(host, hashed_machine_id(machine_id), stream.read().strip())


def complete(draft: Draft, origin: Origin, sequence: int, time_ns: int) -> dict[str, Any]:
    """Return the event that goes over the wire.

    Args:
        draft: what happened.
        origin: who reports it.
        sequence: the event's number in this host's journal.
        time_ns: when the first of its errors was seen, nanoseconds since 1970.
    """
    # A journal that was begun anew gives the same numbers again, at another time.
    identity = f"{origin.boot_id}/{draft.device}/{sequence}/{time_ns}"
    event = {
        "schema": SCHEMA,
        "uuid": str(uuid.uuid5(origin.host_id, identity)),
        "sequence": sequence,
        "time": rfc3339(time_ns),
        "host": origin.host,
        "target": draft.target,
        "device": draft.device,
        "type": draft.type,
        "severity": SEVERITIES[draft.type],
        "operation": draft.operation,
        "sectors": [list(item) for item in draft.sectors],
        "suspect": [list(item) for item in draft.suspect],
        "errno": draft.errno,
        "requests": draft.requests,
        "merged": draft.merged,
        "generation": draft.generation,
        "message": draft.message,
    }
    if draft.files:
        event["files"] = [dict(item) for item in draft.files[:MAX_FILES]]
        left_out = len(draft.files) - MAX_FILES
        if left_out > 0:
            event["message"] = f"{draft.message}; {counted(left_out, 'more file')} left out"
    return event


def rfc3339(time_ns: int) -> str:
    """Return a time (nanoseconds since 1970) as RFC 3339 in UTC with microseconds."""
    moment = datetime.fromtimestamp(time_ns // 1_000_000_000, tz=timezone.utc)
    moment = moment.replace(microsecond=time_ns // 1000 % 1_000_000)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def subtract_ranges(
    ranges: Iterable[tuple[int, int]], holes: Iterable[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return what is left of `ranges` without `holes`; both are ranges (start, count)."""
    cuts = merge_sectors(holes)
    left: list[tuple[int, int]] = []
    first = 0
    for start, count in merge_sectors(ranges):
        end = start + count
        while first < len(cuts) and sum(cuts[first]) <= start:
            first += 1
        index = first
        while index < len(cuts) and cuts[index][0] < end:
            cut, length = cuts[index]
            if cut > start:
                left.append((start, cut - start))
            start = cut + length
            index += 1
        if start < end:
            left.append((start, end - start))
    return left


def intersect_ranges(
    ranges: Sequence[tuple[int, int]], window: tuple[int, int]
) -> list[tuple[int, int]]:
    """Return the parts of `ranges`, which are sorted and apart, inside the one range `window`."""
    low, high = window[0], window[0] + window[1]
    kept = []
    for index in range(max(0, bisect_left(ranges, (low, 0)) - 1), len(ranges)):
        start, count = ranges[index]
        if start >= high:
            break
        first, last = max(start, low), min(start + count, high)
        if first < last:
            kept.append((first, last - first))
    return kept


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun, such as `1 sector` or `2 sectors`."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def split_draft(draft: Draft, limit: int = MAX_RANGES) -> list[Draft]:
    """Return the draft as one or more drafts of at most `limit` ranges each."""
    if len(draft.sectors) <= limit:
        return [replace(draft, suspect=tuple(draft.suspect[:limit]))]
    parts = []
    for index in range(0, len(draft.sectors), limit):
        piece = tuple(draft.sectors[index : index + limit])
        merged = 0 if index else draft.merged
        # Each file goes with the first range that it begins in or behind.
        end = draft.sectors[index + limit][0] if index + limit < len(draft.sectors) else None
        begin = piece[0][0] if index else 0
        files = [f for f in draft.files if begin <= f["start"] and (not end or f["start"] < end)]
        parts.append(replace(draft, sectors=piece, suspect=piece, merged=merged, files=files))
    return parts
