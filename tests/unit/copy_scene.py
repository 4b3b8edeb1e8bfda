# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Disks in memory with copies of the metadata, for the tests of copies."""

from __future__ import annotations

import dataclasses
import errno
import uuid
from collections.abc import Iterable

from dm_remap import format as fmt
from dm_remap.copies import Choice, choose, survey
from dm_remap.format import Extent, Metadata, pack_slot, plan_geometry, slot_sectors_of

SECTOR = fmt.SECTOR_BYTES
EMPTY = bytes(SECTOR)
SIZE = 1 << 17
SLOTS = slot_sectors_of(SIZE)
CHUNK = 8
TARGET = uuid.UUID("11111111-1111-4111-8111-111111111111")
OTHER_TARGET = uuid.UUID("99999999-9999-4999-8999-999999999999")
HOST = uuid.UUID("22222222-2222-4222-8222-222222222222")
SPARES = [uuid.UUID(int=0x33333333333343338333333333333300 + index) for index in range(8)]
NOW = 1_700_000_000_000_000_000
ODD_AND_FAR = (1, 3, 5, 6)
EVEN = (0, 2, 4)


class Disk:
    """A device in memory: sparse, with chosen sectors that fail, and a record of all writes."""

    def __init__(self, name: str = "disk", sectors: int = SIZE) -> None:
        self.name = name
        self.sectors = sectors
        self.blocks: dict[int, bytes] = {}
        self.unreadable: set[int] = set()
        self.unwritable: set[int] = set()
        self.flush_fails = False
        self.log: list[tuple[int, bytes] | None] = []
        self.reads: list[tuple[int, int]] = []

    def read(self, sector: int, count: int) -> bytes:
        assert sector >= 0
        assert sector + count <= self.sectors
        self.reads.append((sector, count))
        numbers = range(sector, sector + count)
        if not self.unreadable.isdisjoint(numbers):
            raise OSError(errno.EIO, "injected")
        found = [*map(self.blocks.get, numbers)]
        return b"".join(found if None not in found else [data or EMPTY for data in found])

    def write(self, sector: int, data: bytes) -> None:
        assert len(data) % 4096 == 0
        assert sector + len(data) // SECTOR <= self.sectors
        if self.unwritable.intersection(range(sector, sector + len(data) // SECTOR)):
            raise OSError(errno.EIO, "injected")
        self.log.append((sector, data))
        self.put(sector, data)

    def put(self, sector: int, data: bytes) -> None:
        for offset in range(0, len(data), SECTOR):
            self.blocks[sector + offset // SECTOR] = data[offset : offset + SECTOR]

    def flush(self) -> None:
        if self.flush_fails:
            raise OSError(errno.EIO, "injected")
        self.log.append(None)

    def clone(self, name: str | None = None) -> Disk:
        other = Disk(name or self.name, self.sectors)
        other.blocks = dict(self.blocks)
        other.unreadable = set(self.unreadable)
        return other

    def damage(self, *indexes: int, offset: int = 100) -> Disk:
        """Flip a bit of these copies: in the header, or in the body from byte 4096 on."""
        for index in indexes:
            sector = SLOTS[index] + offset // SECTOR
            block = bytearray(self.blocks[sector])
            block[offset % SECTOR] ^= 1
            self.blocks[sector] = bytes(block)
        return self


def config(spares: int = 1, size: int = SIZE, **more: object) -> dict[str, object]:
    geometry = plan_geometry(size, CHUNK, 1).to_dict()
    return {
        "name": "disk",
        "chunk_sectors": CHUNK,
        "main": {"sectors": 1 << 20},
        "spares": [{"uuid": str(SPARES[i]), "geometry": geometry} for i in range(spares)],
        **more,
    }


def first(spares: int = 1, **changes: object) -> Metadata:
    metadata = Metadata(TARGET, 1, NOW, HOST, fmt.NO_DIGEST, config(spares), {})
    return dataclasses.replace(metadata, **changes)


def after(metadata: Metadata, steps: int = 1, host: uuid.UUID = HOST) -> Metadata:
    """A generation some commits later, each with one more extent."""
    for _unused in range(steps):
        place = metadata.generation
        metadata = metadata.successor(
            timestamp_ns=metadata.timestamp_ns + 1,
            host_id=host,
            extents=(*metadata.extents, Extent(place, 1, 0, place)),
        )
    return metadata


def fill(disk: Disk, metadata: Metadata, indexes: Iterable[int] = range(7), spare: int = 0) -> Disk:
    """Put copies on a disk without a commit."""
    for index in indexes:
        disk.put(SLOTS[index], pack_slot(metadata, SPARES[spare], SIZE, index))
    return disk


def pool(metadata: Metadata, count: int = 2) -> dict[int, Disk]:
    return {index: fill(Disk(f"d{index}"), metadata, spare=index) for index in range(count)}


def chosen(*disks: Disk, now_ns: int = NOW) -> Choice:
    return choose({disk.name: survey(disk) for disk in disks}, now_ns)
