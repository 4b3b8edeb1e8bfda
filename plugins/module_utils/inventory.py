# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which targets stand on which disks, from device-mapper's tables alone.

No disk is read for it, so that a sick one cannot delay it.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Callable, Protocol

from .devmapper import MappedDevice, Segment
from .extents import merge_sectors
from .format import MAX_SPARES, Metadata, geometry_of
from .mapping import linear_target
from .pool import State, pool_of, state_of, thresholds_of, warning_of
from .probing import serves_requests, whole_disk
from .stack import spare_name
from .target import FAIL, HOLD


@dataclass(frozen=True)
class Kept:
    """What metadata that is kept on the host says of a target.

    Args:
        generation: its generation, 0 if none is kept.
        room: how full the active spares are, None if that is not known.
        warning: a sentence about it, "" if there is nothing to warn of.
    """

    generation: int = 0
    room: State | None = None
    warning: str = ""


def kept_of(metadata: Metadata, active: Collection[int]) -> Kept:
    """What metadata says of a target whose spares with the indices ``active`` are there."""
    geometries = {
        index: geometry_of(metadata, index)
        for index, spare in enumerate(metadata.config["spares"])
        if spare and index in active
    }
    known = pool_of(metadata, geometries)
    limits = thresholds_of(metadata.config)
    return Kept(metadata.generation, state_of(known, limits), warning_of(known, limits) or "")


@dataclass(frozen=True)
class Guarded:
    """A target and the disk that its main is on.

    While its main is being replaced there is one for each of the two.

    Args:
        name: the target's name.
        uuid: the target's own.
        main: device number `major:minor` of the main.
        disk: device number of the whole disk, the main's own unless that is a partition.
        start: the main's first sector on that disk.
        sectors: the target's size.
        live: ranges (start, count) of the target's sectors that main still serves; chunks that are
            on the move count, because main's errors there are no old news yet.
        request_based: whether the disk's errors come as requests, else they come as bios.
        kept: what is known from the newest metadata that this host committed.
        on_error: ``hold`` where failed I/O waits for a remap, else ``fail``.
    """

    name: str
    uuid: uuid.UUID
    main: str
    disk: str
    start: int
    sectors: int
    live: tuple[tuple[int, int], ...]
    request_based: bool = True
    kept: Kept = Kept()
    on_error: str = FAIL


class Tables(Protocol):
    """The part of `devmapper.DeviceMapper` that the inventory uses."""

    def names(self) -> list[str]:
        """Return the names of all mapped devices."""

    def info(self, name: str) -> MappedDevice | None:
        """Return the state of a mapped device."""

    def table(self, name: str) -> list[Segment]:
        """Return the live table of a mapped device."""

    def dependencies(self, name: str) -> list[str]:
        """Return the device numbers that the live table of a mapped device uses."""


def guarded_targets(
    tables: Tables,
    prefix: str,
    disk_of: Callable[[str], tuple[str, int]] = whole_disk,
    requests: Callable[[str], bool] = serves_requests,
    kept: Callable[[uuid.UUID, Collection[int]], Kept] = lambda target, active: Kept(),
) -> list[Guarded]:
    """Return the active targets.

    Args:
        tables: device-mapper.
        prefix: what the uuids of the product's mapped devices start with. A target's continues
            with the 32 hexadecimal digits of its own uuid and ends there.
        disk_of: the disk and the first sector on it for a device number.
        requests: whether a device number has request queues.
        kept: what is known of a target, by its uuid and the indices of its active spares.
    """
    own = {}
    for name in tables.names():
        device = tables.info(name)
        if device is not None and device.uuid.startswith(prefix):
            own[device.uuid[len(prefix) :]] = device
    found = []
    for digits, device in own.items():
        if not device.live_table or not re.fullmatch("[0-9a-f]{32}", digits):
            continue
        layers = _layers(tables, own, digits)
        known = kept(uuid.UUID(digits), layers[0].spares) if layers else Kept()
        for layer in layers:
            disk, start = disk_of(layer.main)
            found.append(
                Guarded(
                    name=device.name,
                    uuid=uuid.UUID(digits),
                    main=layer.main,
                    disk=disk,
                    start=start,
                    sectors=layer.sectors,
                    live=layer.live,
                    request_based=requests(disk),
                    kept=known,
                    on_error=layer.on_error,
                )
            )
    return found


@dataclass(frozen=True)
class _Layers:
    """What the tables under a target say; see `stack` for how they stand on each other."""

    main: str
    sectors: int
    live: tuple[tuple[int, int], ...]
    on_error: str
    spares: frozenset[int]


def _layers(tables: Tables, own: Mapping[str, MappedDevice], digits: str) -> list[_Layers]:
    """Look through a target's tables; what each of its mains serves, if that is anything.

    Args:
        tables: device-mapper.
        own: the product's mapped devices, by what follows the prefix in their uuids.
        digits: what the target's own uuid has there.
    """

    def part(role: str) -> MappedDevice | None:
        device = own.get(f"{digits}-{role}")
        return device if device is not None and device.live_table else None

    device, on_error = own[digits], FAIL
    hold, upper = part("hold"), part("map")
    if hold and upper and {hold.devno, upper.devno} & {*tables.dependencies(device.name)}:
        device, on_error = upper, HOLD
    ours = {other.devno for other in own.values()}

    def below(role: str) -> str:
        """The device of somebody else that a part leads to, or ""."""
        found = part(role)
        others = tables.dependencies(found.name) if found else []
        return next((devno for devno in others if devno not in ours), "")

    table = tables.table(device.name)
    pieces = [_Piece(s.start, s.length, *linear_target(s)) for s in table if s.target == "linear"]
    at_home = [piece for piece in pieces if piece.offset == piece.start]
    main = next((p.device for p in at_home if p.device not in ours), "")
    main = main or below("shim") or below("place")
    frozen = part("frozen")
    moving = [p for p in pieces if frozen and p.device == frozen.devno]
    # Beside a shim a segment beyond the target's end hands flushes to main.
    carried = sum(p.length for p in pieces if p.device == main and p not in at_home)
    sectors = sum(segment.length for segment in table) - carried
    spares = frozenset(index for index in range(MAX_SPARES) if part(spare_name("", index)[1:]))
    found = []
    for disk, over in ((main, part("shim")), (below("new"), part("new"))):
        served = [p for p in at_home if p.device == disk or (over and p.device == over.devno)]
        live = merge_sectors((p.start, p.length) for p in [*served, *moving])
        if disk and live:
            found.append(_Layers(disk, sectors, tuple(live), on_error, spares))
    return found


@dataclass(frozen=True)
class _Piece:
    """A linear segment of a map: its first sector and sectors, and where it leads."""

    start: int
    length: int
    device: str
    offset: int
