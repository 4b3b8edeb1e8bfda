# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Freezing chunks: their I/O waits while they are moved, and that of the rest flows.

The map sends frozen chunks to ``NAME-frozen``, which delays reads and writes but lets flushes pass.
Below it ``NAME-place`` leads nowhere until the chunks' new places are in the metadata, so that no
write can reach the old ones. Nothing stays suspended: if all who could thaw are gone, the delay
ends by itself, and what waited fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from . import extents, mapping, replacement, stack
from .devmapper import MappedDevice, Segment
from .errors import DmRemapError, Refused
from .format import Metadata
from .target import ActiveTarget, where

# How long I/O to a frozen chunk waits at most before it fails, if nobody gives another time.
FREEZE_SECONDS = 120.0


class Tables(Protocol):
    """What freezing needs of `devmapper.DeviceMapper`."""

    def info(self, name: str) -> MappedDevice | None:
        """State of a mapped device."""

    def table(self, name: str) -> list[Segment]:
        """Its live table."""

    def create_unannounced(self, name: str, uuid: str, segments: Sequence[Segment]) -> None:
        """Create a device without waiting for udev."""

    def load(self, name: str, segments: Sequence[Segment]) -> None:
        """Load an inactive table."""

    def swap(self, name: str, events: Any = ...) -> None:
        """Make it live, and resume."""

    def clear(self, name: str) -> None:
        """Drop the inactive table."""


class Freezer:
    """Freezes and thaws chunks of targets.

    Args:
        mapper: device-mapper.
        step: called with a name after each step that a crash could follow.
    """

    def __init__(self, mapper: Tables, step: Callable[[str], None]) -> None:
        self._mapper = mapper
        self._step = step

    def check_names(self, target: ActiveTarget) -> None:
        """Check, before anything is changed, that the freezing devices can have their names.

        Raises:
            Refused: a mapped device of something else has one.
        """
        for part in (stack.frozen_name(target.name), stack.place_name(target.name)):
            self._look_at(target, part)

    def _look_at(self, target: ActiveTarget, part: str) -> MappedDevice | None:
        """A part of the target, or None; a device of something else is refused."""
        device = self._mapper.info(part)
        if device and device.uuid != stack.part_uuid(target.device.uuid, target.name, part):
            raise Refused(
                "is a mapped device of something else, whose name the remap needs",
                device=f"/dev/mapper/{part}",
                remedy="rename or remove that device",
            )
        return device

    def freeze(
        self, target: ActiveTarget, chunks: Sequence[int], seconds: float, events: Any
    ) -> None:
        """Let all I/O to ``chunks`` wait; returns when none that came before is in flight.

        Args:
            target: the target, none of whose chunks is frozen.
            chunks: logical chunks.
            seconds: after which I/O that waits fails.
            events: what `DeviceMapper.events` gave.
        """
        frozen, place = stack.frozen_name(target.name), stack.place_name(target.name)
        nowhere = [("", 0, length) for length in _lengths(target.metadata, chunks)]
        self._put(target, place, stack.place_table(nowhere, *_carriers(target, chunks)))
        self._step("place_set")
        sectors = sum(length for _devno, _sector, length in nowhere)
        below = existing(self._mapper, place).devno
        self._put(target, frozen, stack.frozen_table(sectors, below, int(seconds * 1000)))
        self._step("delay_set")
        positions = {chunk: position for position, chunk in enumerate(chunks)}
        devno = existing(self._mapper, frozen).devno
        self.swap_map(target, target.map_table(target.metadata, positions, devno), events)
        self._step("frozen")

    def thaw(
        self, target: ActiveTarget, metadata: Metadata, chunks: Sequence[int], events: Any
    ) -> None:
        """Let I/O to the frozen ``chunks`` go to where ``metadata`` has them.

        Args:
            target: the target; its frozen chunks are exactly these.
            metadata: the generation that counts.
            chunks: logical chunks in the order of their positions.
            events: what `DeviceMapper.events` gave.
        """
        frozen, place = stack.frozen_name(target.name), stack.place_name(target.name)
        places = [
            (*place_of(target, metadata, chunk), length)
            for chunk, length in zip(chunks, _lengths(metadata, chunks))
        ]
        self._put(target, place, stack.place_table(places, target.carrier))
        self._step("place_final")
        self._release(frozen, place)
        self._step("thawed")
        self.swap_map(target, target.map_table(metadata), events)
        self._step("swapped")

    def park(self, target: ActiveTarget, anew: bool = False) -> None:
        """Leave no table unused, and let the freezing devices hold no spare any more.

        Args:
            target: the target, none of whose chunks is frozen.
            anew: also where they are parked already, if they exist.
        """
        for device in _own_parts(self._mapper, target):
            if device and device.inactive_table:
                self._mapper.clear(device.name)
        place, frozen = stack.place_name(target.name), stack.frozen_name(target.name)
        exists = self._mapper.info(place) is not None
        if not is_parked(self._mapper, target) or (anew and exists):
            self._put(target, place, stack.place_table([], target.carrier))
            below = existing(self._mapper, place).devno
            self._put(target, frozen, stack.whole_table(stack.CARRIER_SECTORS, below))
            self._step("parked")

    def fail(self, name: str) -> None:
        """Let I/O to frozen chunks fail, because nobody knows where they are and none may hang.

        The freezing devices stay in use, so the next plan tries again to end the freeze.
        """
        frozen, place = stack.frozen_name(name), stack.place_name(name)
        sectors = sum(segment.length for segment in self._mapper.table(frozen))
        table = [
            Segment(s.start, s.length, "error", "") if s.start < sectors else s
            for s in self._mapper.table(place)
        ]
        self._mapper.load(place, table)
        self._mapper.swap(place)
        self._release(frozen, place)

    def _release(self, frozen: str, place: str) -> None:
        # A suspended delay hands on what it delays, and the new table delays nothing.
        sectors = sum(segment.length for segment in self._mapper.table(frozen))
        self._mapper.load(frozen, stack.whole_table(sectors, existing(self._mapper, place).devno))
        self._mapper.swap(frozen)

    def swap_map(self, target: ActiveTarget, table: Sequence[Segment], events: Any) -> None:
        """Give the map a table.

        Args:
            target: the target.
            table: the new table.
            events: what `DeviceMapper.events` gave.
        """
        self._mapper.load(target.map.name, table)
        # Only the target itself is known to udev by its content.
        self._mapper.swap(target.map.name, events if target.path is None else None)

    def _put(self, target: ActiveTarget, part: str, table: Sequence[Segment]) -> None:
        """Give a part its table, and create it where it does not exist."""
        if self._look_at(target, part) is None:
            uuid = stack.part_uuid(target.device.uuid, target.name, part)
            self._mapper.create_unannounced(part, uuid, table)
            return
        self._mapper.load(part, table)
        self._mapper.swap(part)


def existing(mapper: Tables, name: str) -> MappedDevice:
    """The mapped device ``name``.

    Raises:
        DmRemapError: there is none any more.
    """
    device = mapper.info(name)
    if device is None:
        raise DmRemapError(
            "has vanished while it was worked on",
            device=f"/dev/mapper/{name}",
            remedy="look at what else manages device-mapper devices, and run this again",
        )
    return device


def own_part(mapper: Tables, target_uuid: str, name: str, part: str) -> MappedDevice | None:
    """A target's own mapped device; somebody else's of that name is left alone.

    Args:
        mapper: device-mapper.
        target_uuid: device-mapper UUID of the target.
        name: the target's name.
        part: the device's name.
    """
    device = mapper.info(part)
    own = stack.part_uuid(target_uuid, name, part)
    return device if device and device.uuid == own else None


def _own_parts(mapper: Tables, target: ActiveTarget) -> list[MappedDevice | None]:
    """The map and the freezing devices; None for one that does not exist or is somebody else's."""
    parts = (target.map.name, stack.frozen_name(target.name), stack.place_name(target.name))
    return [own_part(mapper, target.device.uuid, target.name, part) for part in parts]


def is_parked(mapper: Tables, target: ActiveTarget) -> bool:
    """Whether an interrupted freeze has left nothing that a new one would not find."""
    devices = _own_parts(mapper, target)
    if any(device and device.inactive_table for device in devices):
        return False
    _map, *freezing = devices
    if not any(freezing):
        return True
    place = stack.place_name(target.name)
    return (
        all(
            device is not None and device.live_table and len(mapper.table(device.name)) == 1
            for device in freezing
        )
        and mapper.table(stack.frozen_name(target.name))[0].target == "linear"
        and mapper.table(place) == stack.place_table([], target.carrier)
    )


def _lengths(metadata: Metadata, chunks: Sequence[int]) -> list[int]:
    """Sectors of the chunks; the target's last one may be short."""
    return [where(metadata, chunk)["count"] for chunk in chunks]


def place_of(target: ActiveTarget, metadata: Metadata, chunk: int) -> tuple[str, int]:
    """Device number and first sector of a chunk; no device where its spare is not active."""
    chunk_sectors = metadata.config["chunk_sectors"]
    place = extents.place_of(metadata.extents, chunk)
    if place is None:
        if target.new_main and chunk < replacement.copied_chunks(metadata):
            return target.new_main.devno, chunk * chunk_sectors
        return target.upper_main, chunk * chunk_sectors
    return target.spare_devnos.get(place.spare, ""), place.physical * chunk_sectors


def _carriers(target: ActiveTarget, chunks: Sequence[int]) -> list[str]:
    """Device numbers of main, and of where the chunks are: a flush must reach what they hold.

    The map may have no other segment there that would hand it on.
    """
    found = [place_of(target, target.metadata, chunk)[0] for chunk in chunks]
    return list(dict.fromkeys([target.carrier, *(d for d in found if d)]))


def held_chunks(target: ActiveTarget) -> list[int]:
    """Chunks that the live map sends to the freezing device, in the order of their positions."""
    if target.frozen is None:
        return []
    chunk_sectors = target.metadata.config["chunk_sectors"]
    positions = {}
    for segment in target.table:
        if segment.target != "linear":
            continue
        device, offset = mapping.linear_target(segment)
        if device == target.frozen.devno:
            for step in range(0, segment.length, chunk_sectors):
                positions[(offset + step) // chunk_sectors] = (
                    segment.start + step
                ) // chunk_sectors
    return [positions[position] for position in sorted(positions)]
