# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which targets stand on which disks, from device-mapper's tables alone.

No disk is read for it, so that a sick one cannot delay it.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Callable, Protocol

from .devmapper import MappedDevice, Segment
from .extents import merge_sectors
from .mapping import linear_target
from .probing import serves_requests, whole_disk


@dataclass(frozen=True)
class Guarded:
    """A target and the disk that its main is on.

    Args:
        name: the target's name.
        uuid: the target's own.
        main: device number `major:minor` of the main.
        disk: device number of the whole disk, the main's own unless that is a partition.
        start: the main's first sector on that disk.
        sectors: the target's size.
        live: ranges (start, count) of the target's sectors that main still serves.
        request_based: whether the disk's errors come as requests, else they come as bios.
        generation: of the newest metadata that this host committed, 0 if it keeps none.
    """

    name: str
    uuid: uuid.UUID
    main: str
    disk: str
    start: int
    sectors: int
    live: tuple[tuple[int, int], ...]
    request_based: bool = True
    generation: int = 0


class Tables(Protocol):
    """The part of `devmapper.DeviceMapper` that the inventory uses."""

    def names(self) -> list[str]:
        """Return the names of all mapped devices."""

    def info(self, name: str) -> MappedDevice | None:
        """Return the state of a mapped device."""

    def table(self, name: str) -> list[Segment]:
        """Return the live table of a mapped device."""


def guarded_targets(
    tables: Tables,
    prefix: str,
    disk_of: Callable[[str], tuple[str, int]] = whole_disk,
    requests: Callable[[str], bool] = serves_requests,
    generation_of: Callable[[uuid.UUID], int] = lambda target: 0,
) -> list[Guarded]:
    """Return the active targets.

    Args:
        tables: device-mapper.
        prefix: what the uuids of the product's mapped devices start with. A target's continues
            with the 32 hexadecimal digits of its own uuid and ends there.
        disk_of: the disk and the first sector on it for a device number.
        requests: whether a device number has request queues.
        generation_of: the generation of a target's metadata.
    """
    own = {}
    for name in tables.names():
        device = tables.info(name)
        if device is not None and device.uuid.startswith(prefix):
            own[device.devno] = device
    found = []
    for device in own.values():
        digits = device.uuid[len(prefix) :]
        if not device.live_table or not re.fullmatch("[0-9a-f]{32}", digits):
            continue
        segments = tables.table(device.name)
        main = _main_of(segments, set(own))
        if main is None:
            continue
        disk, start = disk_of(main)
        found.append(
            Guarded(
                name=device.name,
                uuid=uuid.UUID(digits),
                main=main,
                disk=disk,
                start=start,
                sectors=sum(segment.length for segment in segments),
                live=_live(segments, main),
                request_based=requests(disk),
                generation=generation_of(uuid.UUID(digits)),
            )
        )
    return found


def backed_up_generation(folder: str, target: uuid.UUID) -> int:
    """Return the newest generation among the engine's backups of a target, 0 without any."""
    try:
        names = os.listdir(os.path.join(folder, str(target)))
    except OSError:
        return 0
    numbers = [name.partition(".")[0] for name in names if name.endswith(".slot")]
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def _main_of(segments: Sequence[Segment], own: set[str]) -> str | None:
    """The device that serves its sectors at their own place and is not a part of a spare."""
    for segment in segments:
        if segment.target == "linear":
            device, offset = linear_target(segment)
            if device not in own and offset == segment.start:
                return device
    return None


def _live(segments: Sequence[Segment], main: str) -> tuple[tuple[int, int], ...]:
    served = []
    for segment in segments:
        if segment.target == "linear" and linear_target(segment)[0] == main:
            served.append((segment.start, segment.length))
    return tuple(merge_sectors(served))
