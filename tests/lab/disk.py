# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""The disks that a machine is given: what QEMU is told, and what the guest calls them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .paths import LabError

SECTOR_BYTES = 512
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
INTERFACES = ("virtio", "scsi", "nvme", "ide")

# What QEMU's file node is told for each mode; "volatile" is our own server's node instead.
CACHE_MODES: dict[str, dict[str, bool]] = {
    "unsafe": {"direct": False, "no-flush": True},
    "writeback": {"direct": False, "no-flush": False},
    "none": {"direct": True, "no-flush": False},
    "volatile": {},
}
AHCI_PORTS = 6


def parse_size(text: str | int) -> int:
    """Return a size in bytes from ``64M`` (K, M, G, T: powers of 1024) or from a number.

    Raises:
        LabError: it is not a size, or not a multiple of 4096 bytes.
    """
    match = re.fullmatch(r"(\d+)([KMGT]?)(?:i?B)?", str(text))
    if not match:
        raise LabError(f"size {text!r}: give a number of bytes, or a number with K, M, G or T")
    size = int(match[1]) * UNITS[match[2]]
    if size == 0 or size % 4096:
        raise LabError(f"size {text!r}: give a multiple of 4096 bytes, above 0")
    return size


@dataclass(frozen=True)
class Disk:
    """A disk to give to a machine.

    Args:
        name: its name in the lab, and its serial number; letters, digits, ``-``, ``_``; at most 20.
        size: bytes, or text such as ``64M``.
        interface: ``virtio``, ``scsi``, ``nvme`` or ``ide``.
        block: logical block size in bytes, 512 or 4096 (ide: 512 only).
        physical: physical block size in bytes; None for the same as ``block``.
        cache: ``unsafe``, ``writeback``, ``none`` or ``volatile`` (see docs/lab.md).
        survive: for ``volatile``: the part (0.0 to 1.0) of unflushed writes that a power cut keeps.
        seed: for ``volatile``: makes the choice of these writes repeatable.
        wwn: World Wide Name for scsi and ide, a 64-bit number; None for no name.
        image: an existing raw file of the host to use; None for a new sparse one.

    Raises:
        LabError: an argument is not one of these.
    """

    name: str
    size: str | int = "64M"
    interface: str = "virtio"
    block: int = 512
    physical: int | None = None
    cache: str = "unsafe"
    survive: float = 0.0
    seed: int = 0
    wwn: int | None = None
    image: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,19}", self.name):
            raise LabError(f"disk {self.name!r}: use 1 to 20 letters, digits, '-' or '_'")
        if self.interface not in INTERFACES:
            raise LabError(f"disk {self.name}: interface must be one of {', '.join(INTERFACES)}")
        if self.block not in (512, 4096):
            raise LabError(f"disk {self.name}: block must be 512 or 4096 bytes")
        if self.interface == "ide" and self.block != 512:
            raise LabError(f"disk {self.name}: QEMU's ide disks have blocks of 512 bytes only")
        if self.cache not in CACHE_MODES:
            raise LabError(f"disk {self.name}: cache must be one of {', '.join(CACHE_MODES)}")
        if self.wwn is not None and self.interface not in ("scsi", "ide"):
            raise LabError(f"disk {self.name}: only scsi and ide disks have a wwn")
        parse_size(self.size)

    @property
    def bytes(self) -> int:
        """The size in bytes."""
        return parse_size(self.size)

    @property
    def sectors(self) -> int:
        """The size in sectors of 512 bytes."""
        return self.bytes // SECTOR_BYTES

    @property
    def block_sectors(self) -> int:
        """Sectors in a logical block: 1 or 8."""
        return self.block // SECTOR_BYTES

    @property
    def path(self) -> str:
        """The disk's stable name in the guest, made by udev from the serial number or the wwn."""
        if self.wwn is not None:
            return f"/dev/disk/by-id/wwn-0x{self.wwn:016x}"
        prefix = {
            "virtio": "virtio-",
            "scsi": "scsi-0QEMU_QEMU_HARDDISK_",
            "nvme": "nvme-QEMU_NVMe_Ctrl_",
            "ide": "ata-QEMU_HARDDISK_",
        }[self.interface]
        return f"/dev/disk/by-id/{prefix}{self.name}"


def protocol_node(disk: Disk, image: Path, socket: str) -> dict[str, Any]:
    """Return the node that reads and writes the disk's bytes."""
    node: dict[str, Any] = {"node-name": f"file-{disk.name}", "discard": "unmap"}
    if disk.cache == "volatile":
        node.update(driver="nbd", server={"type": "unix", "path": socket}, export=disk.name)
    else:
        node.update(driver="file", filename=str(image), cache=CACHE_MODES[disk.cache])
    return node


def raw_node(disk: Disk, source: str) -> dict[str, Any]:
    """Return the node that the guest's device is on, over the node called ``source``."""
    return {
        "driver": "raw",
        "node-name": f"raw-{disk.name}",
        "file": source,
        "discard": "unmap",
    }


def device(disk: Disk, ide_index: int = 0) -> dict[str, Any]:
    """Return the guest's device; ``ide_index`` counts the machine's ide disks from 0."""
    common: dict[str, Any] = {
        "id": f"disk-{disk.name}",
        "drive": f"raw-{disk.name}",
        "serial": disk.name,
        "logical_block_size": disk.block,
        "physical_block_size": disk.physical or disk.block,
    }
    report = {"rerror": "report", "werror": "report"}
    if disk.wwn is not None:
        common["wwn"] = disk.wwn
    if disk.interface == "virtio":
        return {"driver": "virtio-blk-pci", **common, **report}
    if disk.interface == "scsi":
        return {"driver": "scsi-hd", "bus": "scsi.0", **common, **report}
    if disk.interface == "nvme":
        return {"driver": "nvme", **common}
    bus = f"ahci{ide_index // AHCI_PORTS}.{ide_index % AHCI_PORTS}"
    return {"driver": "ide-hd", "bus": bus, **common, **report}
