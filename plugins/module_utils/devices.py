# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Devices as the engine uses them: what it needs of the kernel, and a target's open devices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from . import copies, replacement
from .blockdev import DeviceInfo, Listed
from .devmapper import MappedDevice, Segment
from .errors import DmRemapError
from .format import Metadata
from .target import ActiveTarget


class OpenDevice(copies.Device, Protocol):
    """An open block device, as `blockdev.BlockDevice` is; sectors are of 512 bytes."""

    def zero(self, sector: int, count: int) -> None:
        """Make sectors read as zeros."""

    def close(self) -> None:
        """Close it; a second call does nothing."""

    def __enter__(self) -> OpenDevice:
        """The device itself."""

    def __exit__(self, *exc_info: object) -> None:
        """Close it."""


class Blocks(Protocol):
    """What the engine needs of the module `blockdev`."""

    def BlockDevice(self, path: str, writable: bool = ...) -> OpenDevice:
        """Open a device past the page cache."""

    def list_devices(self, without: str) -> Iterable[Listed]:
        """All block devices, but for mapped ones whose UUIDs start with ``without``."""

    def describe(self, path: str) -> DeviceInfo:
        """Who the device is and who uses it."""

    def node_of(self, devno: str) -> str:
        """The node of a device number."""

    def links_to(self, devno: str) -> list[str]:
        """Paths of the device that outlive a restart, the best first."""

    def nodes_of_size(self, sizes: Collection[int]) -> list[str]:
        """Nodes of the devices that have one of these sizes in sectors."""

    def signatures(self, path: str) -> list[str]:
        """What is found on the device."""

    def erase_signatures(self, path: str) -> None:
        """Erase that."""


class Mapper(Protocol):
    """What the engine needs of `devmapper.DeviceMapper`."""

    def check_available(self, targets: Iterable[str] = ...) -> None:
        """Raise where the kernel lacks something."""

    def kernel_targets(self) -> Mapping[str, object]:
        """The loaded target types."""

    def names(self) -> list[str]:
        """Names of all mapped devices."""

    def info(self, name: str) -> MappedDevice | None:
        """State of a mapped device."""

    def table(self, name: str) -> list[Segment]:
        """Its live table."""

    def status(self, name: str) -> list[Segment]:
        """Its live status."""

    def arm_queue_timeout(self, seconds: int) -> int:
        """Set the kernel's limit for held I/O, unless it has one."""

    def create(self, name: str, uuid: str, segments: Iterable[Segment], private: bool) -> None:
        """Create a mapped device and wait for udev."""

    def create_unannounced(self, name: str, uuid: str, segments: Iterable[Segment]) -> None:
        """Create one without waiting."""

    def load(self, name: str, segments: Iterable[Segment]) -> None:
        """Load an inactive table."""

    def swap(self, name: str, events: Any = ...) -> None:
        """Make it live, and resume."""

    def swap_while(self, name: str, meanwhile: Callable[[], None], events: Any = ...) -> None:
        """Swap while something ends what is in flight."""

    def wait_idle(self, name: str, seconds: float) -> bool:
        """Wait until no I/O is in flight."""

    def clear(self, name: str) -> None:
        """Drop the inactive table."""

    def events(self) -> AbstractContextManager[Any]:
        """Collect the events of swaps."""

    def suspend(self, name: str) -> None:
        """Hold what comes in."""

    def remove(self, name: str) -> None:
        """Remove a device and wait for udev."""

    def remove_unannounced(self, name: str) -> None:
        """Remove one without waiting."""

    def message(self, name: str, text: str) -> str:
        """Send a message; the answer."""

    def dependencies(self, name: str) -> list[str]:
        """Device numbers that the live table uses."""


@dataclass(frozen=True)
class Disks:
    """Open devices of a target.

    Without main every chunk is on a spare, and none can be moved from or to main.

    Args:
        main: main.
        spares: its spares' integrity devices.
        members: the spares themselves.
        new_main: what is to replace main, while that is under way.
    """

    main: OpenDevice | None
    spares: Mapping[int, OpenDevice]
    members: Mapping[int, OpenDevice]
    new_main: OpenDevice | None = None

    @property
    def old_main(self) -> OpenDevice:
        """Main, of a target that is known to have one."""
        if self.main is None:
            raise AssertionError("a target with chunks on main, or to be moved there, has a main")
        return self.main

    def main_of(self, metadata: Metadata, chunk: int) -> OpenDevice:
        """The main that a chunk without an extent is on."""
        if self.new_main and chunk < replacement.copied_chunks(metadata):
            return self.new_main
        return self.old_main


class Opener:
    """Opens the devices of targets.

    Args:
        blocks: block devices (the module `blockdev`, or a stand-in in tests).
    """

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks

    @contextlib.contextmanager
    def opened(self, target: ActiveTarget, main_writable: bool = False) -> Iterator[Disks]:
        """Open what a move reads and writes.

        Args:
            target: the target.
            main_writable: open main for a move to it, or because its replacement is undone.

        Raises:
            DmRemapError: a device cannot be opened.
        """
        with contextlib.ExitStack() as opened:
            new = target.replacement
            yield Disks(
                main=opened.enter_context(
                    self._blocks.BlockDevice(target.main.path, writable=main_writable)
                )
                if target.main
                else None,
                spares={
                    spare.index: opened.enter_context(
                        self._blocks.BlockDevice(self._blocks.node_of(spare.devno), writable=True)
                    )
                    for spare in target.spares
                },
                members=self.members(opened, target.spare_infos),
                new_main=opened.enter_context(self._blocks.BlockDevice(new.path, writable=True))
                if new
                else None,
            )

    def open_main(self, target: ActiveTarget) -> OpenDevice:
        """Open main once more, for reading.

        Raises:
            DmRemapError: it cannot be opened, or is not known.
        """
        if target.main is None:
            raise DmRemapError("its main is not known", device=target.name)
        return self._blocks.BlockDevice(target.main.path)

    def open_part(self, target: ActiveTarget, spare: int | None) -> OpenDevice:
        """Open main, or a spare's integrity device by its index, for reading.

        Raises:
            DmRemapError: it cannot be opened, or is not there.
        """
        if spare is None:
            return self.open_main(target)
        found = next((one for one in target.spares if one.index == spare), None)
        if found is None:
            raise DmRemapError(f"its spare {spare} is not there", device=target.name)
        return self._blocks.BlockDevice(self._blocks.node_of(found.devno))

    def members(
        self, opened: contextlib.ExitStack, spares: Mapping[int, DeviceInfo]
    ) -> dict[int, OpenDevice]:
        """Open spares themselves, by index, until the stack is closed."""
        return {
            index: opened.enter_context(self._blocks.BlockDevice(info.path, writable=True))
            for index, info in spares.items()
        }
