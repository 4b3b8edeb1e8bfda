# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Writes spares as the kernel target dm-remap-v4 does, with nothing of the code that reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

SIZE = 84288
PLACES = (0, 256, 512, 768, 1024)
BUFFER = 256 * 512
PENDING, ACTIVE = 1, 2


def _table() -> list[int]:
    found = []
    for number in range(256):
        for _bit in range(8):
            number = number >> 1 ^ (0xEDB88320 if number & 1 else 0)
        found.append(number)
    return found


_CRC = _table()


def crc(data: bytes) -> int:
    """CRC-32 as the kernel's crc32(0, ...) has it: nothing is inverted."""
    value = 0
    for byte in data:
        value = value >> 8 ^ _CRC[(value ^ byte) & 0xFF]
    return value


@dataclass
class Entry:
    """A remap of one sector."""

    main: int
    spare: int
    flags: int = ACTIVE
    errors: int = 1


@dataclass
class Old:
    """What a copy is to say; fields that are given in ``raw`` are written over it, by offset."""

    main_sectors: int
    spare_sectors: int
    entries: Sequence[Entry] = ()
    sequence: int = 5
    timestamp: int = 1_700_000_000
    version: int = 4
    size: int = SIZE
    sector_size: int = 512
    most: int = 2048
    count: int | None = None
    raw: dict[int, bytes] = field(default_factory=dict)

    def pack(self) -> bytes:
        """The bytes of a copy."""
        data = bytearray(SIZE)

        def put(offset: int, value: int, width: int) -> None:
            data[offset : offset + width] = value.to_bytes(width, "little")

        put(0, 0x444D5234, 4)
        put(4, self.version, 4)
        put(8, self.sequence, 8)
        put(16, self.timestamp, 8)
        put(32, self.size, 4)
        put(120, self.main_sectors, 8)
        put(128, self.spare_sectors, 8)
        put(136, self.sector_size, 4)
        put(256, 100, 4)
        put(272, 24, 4)
        put(296, len(self.entries) if self.count is None else self.count, 4)
        put(300, self.most, 4)
        for number, entry in enumerate(self.entries):
            place = 312 + 40 * number
            put(place, entry.main, 8)
            put(place + 8, entry.spare, 8)
            put(place + 16, 1_700_000_000_000_000_000 + number, 8)
            put(place + 28, entry.errors, 4)
            put(place + 34, entry.flags, 2)
        for offset, value in self.raw.items():
            data[offset : offset + len(value)] = value
        return sealed(bytes(data))


def sealed(data: bytes) -> bytes:
    """The copy with the checksum that fits the rest of it."""
    checksum = crc(data[:24] + data[28:SIZE])
    return data[:24] + checksum.to_bytes(4, "little") + data[28:]


def write(put: Callable[[int, bytes], object], *copies: bytes) -> None:
    """Write the copies, the last one also in place of those that are not given.

    Args:
        put: writes bytes at a sector.
        copies: what `Old.pack` gave, one to five.
    """
    for number, place in enumerate(PLACES):
        put(place, copies[min(number, len(copies) - 1)].ljust(BUFFER, b"\0"))
