# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The mapped devices that a target is made of: names, UUIDs, tables and states (pure).

With ``on_error: fail`` the target is the map itself. With ``on_error: hold`` it is::

    NAME            linear, the whole of NAME-hold
    NAME-hold       multipath with one path, which keeps failed I/O until the path is reinstated
    NAME-map        the map: linear segments on main, on spares and, during a move, on NAME-frozen

``NAME-shim`` may stand between the map and main. ``NAME-new`` stands over the new main while main
is being replaced; the map sends it what has been copied. ``NAME-frozen`` delays all I/O to chunks
that are being moved, while flushes pass; below it ``NAME-place`` leads to where these chunks are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from . import marks
from .devmapper import Segment
from .format import MAX_SPARES

UUID_PREFIX = marks.UUID_PREFIX
TARGET_UUID = re.compile(re.escape(UUID_PREFIX) + r"([0-9a-f]{32})\Z")
SPARE_UUID = re.compile(re.escape(UUID_PREFIX) + r"[0-9a-f]{32}-spare[0-9]+\Z")

# Sectors of a segment that carries no data: it hands flushes to the device below.
CARRIER_SECTORS = 8


def hold_name(name: str) -> str:
    """Name of the device that holds failed I/O."""
    return name + "-hold"


def map_name(name: str) -> str:
    """Name of the map where it is not the target itself."""
    return name + "-map"


def shim_name(name: str) -> str:
    """Name of the device that turns main's medium errors into ones that are held."""
    return name + "-shim"


def new_main_name(name: str) -> str:
    """Name of the device over the new main while main is being replaced."""
    return name + "-new"


def frozen_name(name: str) -> str:
    """Name of the device that delays I/O to chunks on the move."""
    return name + "-frozen"


def place_name(name: str) -> str:
    """Name of the device that leads to where chunks on the move are."""
    return name + "-place"


def spare_name(name: str, index: int) -> str:
    """Name of the integrity device over spare ``index``."""
    return f"{name}-spare{index}"


def data_name(name: str, index: int) -> str:
    """Name of the device over the data area of spare ``index``."""
    return spare_name(name, index) + "-data"


def tags_name(name: str, index: int) -> str:
    """Name of the device over the tag area of spare ``index``."""
    return spare_name(name, index) + "-tags"


def spare_part_names(name: str, index: int) -> tuple[str, str, str]:
    """Names of all devices of spare ``index``, upper ones first."""
    return spare_name(name, index), data_name(name, index), tags_name(name, index)


def part_names(name: str) -> Iterator[str]:
    """All names that a target may use, upper devices before those that they stand on."""
    yield from (name, hold_name(name), map_name(name), frozen_name(name), place_name(name))
    yield shim_name(name)
    yield new_main_name(name)
    for index in range(MAX_SPARES):
        yield from spare_part_names(name, index)


def part_uuid(target_uuid: str, name: str, part: str) -> str:
    """Device-mapper UUID of a part: the target's with the same suffix as the name."""
    return target_uuid + part[len(name) :]


def whole_table(sectors: int, devno: str) -> list[Segment]:
    """One linear segment."""
    return [Segment(0, sectors, "linear", f"{devno} 0")]


def top_table(sectors: int, devno: str, cut: Sequence[tuple[int, int]]) -> list[Segment]:
    """The table of a target above the device that holds its errors, or above its map.

    Args:
        sectors: the target's size.
        devno: device number of that device.
        cut: ranges (start, count), sorted and apart, that fail at once.
    """
    segments: list[Segment] = []
    cursor = 0
    for start, count in [*cut, (sectors, 0)]:
        if start > cursor:
            segments.append(Segment(cursor, start - cursor, "linear", f"{devno} {cursor}"))
        if count:
            segments.append(Segment(start, count, "error", ""))
        cursor = start + count
    return segments


def hold_table(sectors: int, devno: str) -> list[Segment]:
    """A bio-based multipath with one path that queues while the path is failed.

    Source: drivers/md/dm-mpath.c (features, hardware handler, one priority group, one path with
    its repeat count).
    """
    params = f"3 queue_if_no_path queue_mode bio 0 1 1 round-robin 0 1 1 {devno} 1"
    return [Segment(0, sectors, "multipath", params)]


def shim_table(sectors: int, devno: str) -> list[Segment]:
    """A raid1 of one device without metadata; its errors are I/O errors, whatever main's were."""
    return [Segment(0, sectors, "raid", f"raid1 1 0 1 - {devno}")]


def frozen_table(sectors: int, devno: str, milliseconds: int) -> list[Segment]:
    """Delays reads and writes, and lets flushes pass (drivers/md/dm-delay.c)."""
    slow = f"{devno} 0 {milliseconds}"
    return [Segment(0, sectors, "delay", f"{slow} {slow} {devno} 0 0")]


def place_table(places: list[tuple[str, int, int]], *carriers: str) -> list[Segment]:
    """Segments for the chunks on the move, one after the other, and those that carry flushes.

    Args:
        places: device number, first sector and sectors of each chunk; without a device its I/O
            fails.
        carriers: device numbers that get the flushes, which a table of errors would swallow.
    """
    segments: list[Segment] = []
    position = 0
    last = ("", 0)
    for devno, sector, length in places:
        if segments and (devno, sector) == last:
            segments[-1] = replace(segments[-1], length=segments[-1].length + length)
        elif devno:
            segments.append(Segment(position, length, "linear", f"{devno} {sector}"))
        else:
            segments.append(Segment(position, length, "error", ""))
        position += length
        # Without a device there is no sector that goes on either.
        last = (devno, sector + length if devno else sector)
    return segments + [
        Segment(position + number * CARRIER_SECTORS, CARRIER_SECTORS, "linear", f"{carrier} 0")
        for number, carrier in enumerate(carriers)
    ]


@dataclass(frozen=True)
class PathState:
    """State of the one path of NAME-hold.

    Args:
        active: I/O goes through; else it waits, or fails where nothing is queued.
        queueing: I/O waits while the path is failed. The kernel's fail-safe ends that.
        devno: device number of the path.
    """

    active: bool
    queueing: bool
    devno: str


def path_state(status: Segment, table: Segment) -> PathState:
    """Read the state out of multipath's status and table lines (drivers/md/dm-mpath.c).

    Raises:
        ValueError: the lines are not of a multipath device with one path.
    """
    found = re.search(r"\b(\d+:\d+) ([AF]) \d+", status.params)
    if table.target != "multipath" or found is None:
        raise ValueError(f"not a multipath device with one path: {table} / {status}")
    words = table.params.split()
    features = words[1 : 1 + int(words[0])]
    return PathState(found[2] == "A", "queue_if_no_path" in features, found[1])
