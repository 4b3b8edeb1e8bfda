# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Creates the mapped devices that a target consists of, and removes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from . import replacing, stack
from .blockdev import DeviceInfo
from .devices import Mapper
from .devmapper import MappedDevice, Segment
from .errors import DmRemapError, Refused
from .format import Metadata, geometry_of
from .freezing import Freezer, existing, own_part
from .marks import SECTOR_BYTES
from .observing import Observer
from .plan import Plan, metadata_of
from .target import ActiveTarget, chunks_on

# How long the kernel holds failed I/O that nobody heals.
HOLD_SECONDS = 120


class Stacker:
    """Creates and removes mapped devices of targets.

    Args:
        mapper: device-mapper.
        observer: looks at spares before they are used.
        freezer: freezes and thaws chunks.
        step: called with a name after each step that a crash could follow.
    """

    def __init__(
        self, mapper: Mapper, observer: Observer, freezer: Freezer, step: Callable[[str], None]
    ) -> None:
        self._mapper = mapper
        self._observer = observer
        self._freezer = freezer
        self._step = step

    def create_part(
        self, metadata: Metadata, name: str, part: str, table: Sequence[Segment]
    ) -> str:
        """Create a device that only the target uses; its device number."""
        self._mapper.create(
            part, stack.part_uuid(dm_uuid(metadata), name, part), table, private=True
        )
        return existing(self._mapper, part).devno

    def create_hold(
        self,
        metadata: Metadata,
        name: str,
        table: Sequence[Segment],
        carrier: str,
        cut: Sequence[tuple[int, int]] = (),
    ) -> list[Segment]:
        """Create the map, and above it what holds failed I/O; the table for the target."""
        self._mapper.arm_queue_timeout(HOLD_SECONDS)
        sectors = metadata.config["main"]["sectors"]
        upper = self.create_part(metadata, name, stack.map_name(name), table)
        hold = self.create_part(
            metadata, name, stack.hold_name(name), stack.hold_table(sectors, upper)
        )
        # Made now, because then udev knows that they are none of its business.
        parts = (stack.place_name(name), stack.frozen_name(name))
        if all(self._mapper.info(part) is None for part in parts):
            self.create_parked(metadata, name, carrier)
        return stack.top_table(sectors, hold, cut)

    def create_parked(self, metadata: Metadata, name: str, carrier: str) -> None:
        """Create the freezing devices, which hold main even when the map does not use it."""
        place = self.create_part(
            metadata, name, stack.place_name(name), stack.place_table([], carrier)
        )
        table = stack.whole_table(stack.CARRIER_SECTORS, place)
        self.create_part(metadata, name, stack.frozen_name(name), table)

    def create_new_main(self, plan: Plan) -> str:
        """Create the device over the new main; its device number."""
        if plan.replacement is None:
            raise AssertionError("only for plans with a new main")
        metadata = metadata_of(plan)
        return self.create_part(
            metadata,
            plan.name,
            stack.new_main_name(plan.name),
            stack.whole_table(metadata.config["main"]["sectors"], plan.replacement.devno),
        )

    def activate_spare(self, name: str, metadata: Metadata, index: int, info: DeviceInfo) -> None:
        """Create the mapped devices of a spare.

        Raises:
            DmRemapError: it has chunks whose tags were overwritten, or the kernel refuses.
        """
        geometry = geometry_of(metadata, index)
        if chunks_on(metadata, index) and not self._observer.is_formatted(info.path, geometry):
            # The kernel would format zeros anew, without the journal and with the old tags.
            raise DmRemapError(
                f"has chunks as spare {index}, but the beginning of its tag area was overwritten",
                device=info.path,
                remedy="restore it, or leave this spare out with degraded: true, and these chunks "
                "give errors",
            )
        pieces = (
            (stack.tags_name(name, index), "tags", geometry.tag_start, geometry.tag_sectors),
            (stack.data_name(name, index), "data", geometry.data_start, geometry.data_sectors),
        )
        below = {}
        for device_name, role, start, length in pieces:
            segment = Segment(0, length, "linear", f"{info.devno} {start}")
            below[role] = self.create_part(metadata, name, device_name, [segment])
        block_bytes = metadata.config["block_sectors"] * SECTOR_BYTES
        options = [
            f"meta_device:{below['tags']}",
            "internal_hash:crc32c",
            f"journal_sectors:{geometry.journal_sectors}",
            f"block_size:{block_bytes}",
        ]
        params = f"{below['data']} 0 - J {len(options)} {' '.join(options)}"
        self.create_part(
            metadata,
            name,
            stack.spare_name(name, index),
            [Segment(0, geometry.data_sectors, "integrity", params)],
        )

    def deactivate_spare(self, name: str, metadata: Metadata, upper: str) -> None:
        """Remove the mapped devices of a spare, of which ``upper`` is the integrity device."""
        for part in (upper, f"{upper}-data", f"{upper}-tags"):
            if own_part(self._mapper, dm_uuid(metadata), name, part):
                self._mapper.remove(part)

    def spare_devnos(self, plan: Plan) -> dict[int, str]:
        """Device numbers of the integrity devices of a plan's spares, by index."""
        return {
            index: existing(self._mapper, stack.spare_name(plan.name, index)).devno
            for index in plan.spares
        }

    def insert_shim(self, target: ActiveTarget) -> None:
        """Put a shim between the map and main."""
        if target.main is None:
            raise Refused("has no chunk on its main that a shim could serve", device=target.name)
        part = stack.shim_name(target.name)
        device = own_part(self._mapper, target.device.uuid, target.device.name, part)
        table = stack.shim_table(target.metadata.config["main"]["sectors"], target.main.devno)
        if device is None:
            self.create_part(target.metadata, target.name, part, table)
        shimmed = replace(target, shim=existing(self._mapper, part))
        self.swap_map(shimmed, shimmed.map_table(target.metadata))

    def remove_shim(self, target: ActiveTarget) -> None:
        """Let the map use main itself, and remove the shim."""
        target = replace(target, shim=None)
        self.swap_map(target, target.map_table(target.metadata))
        # It stands under a parked place too.
        self._freezer.park(target)
        self.remove_parts(target.device, stack.shim_name(target.name))

    def swap_map(self, target: ActiveTarget, table: Sequence[Segment]) -> None:
        """Give the map a table, and tell udev."""
        with self._mapper.events() as events:
            self._freezer.swap_map(target, table, events)

    def clear_leftovers(self, target: ActiveTarget) -> None:
        """Remove from the kernel what an ended replacement or a freeze has left there."""
        part = stack.new_main_name(target.name)
        new_main = own_part(self._mapper, target.device.uuid, target.device.name, part)
        used = self._mapper.dependencies(target.map.name)
        if new_main and target.replacement is None and new_main.devno in used:
            self.swap_map(target, target.map_table(target.metadata))
            self._step("new_main_direct")
        self._freezer.park(target)
        for left in replacing.leftovers(self._mapper, target):
            self._mapper.remove(left)
            self._step("leftover_removed")

    def remove_parts(self, target: MappedDevice, *parts: str) -> None:
        """Remove these mapped devices of a target, where they exist and are its own."""
        for part in parts:
            if own_part(self._mapper, target.uuid, target.name, part):
                self._mapper.remove(part)


def dm_uuid(metadata: Metadata) -> str:
    """Device-mapper UUID of a target."""
    return stack.UUID_PREFIX + metadata.target_uuid.hex
