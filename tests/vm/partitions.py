# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Partition tables of disk images: DOS, and GPT (UEFI specification, chapter 5)."""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path

SECTOR_BYTES = 512
ENTRIES, ENTRY_BYTES = 128, 128
TABLE_SECTORS = ENTRIES * ENTRY_BYTES // SECTOR_BYTES
LINUX_DATA = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
LINUX_TYPE, PROTECTIVE_TYPE = 0x83, 0xEE


def write_dos(image: Path, parts: Sequence[tuple[int, int]]) -> None:
    """Write a DOS partition table for ``parts``, each a first sector and a count."""
    with open(image, "r+b") as file:
        file.write(_boot_sector([(LINUX_TYPE, *part) for part in parts]))


def write_gpt(image: Path, parts: Sequence[tuple[int, int]]) -> None:
    """Write both copies of a GPT for ``parts``, each a first sector and a count."""
    total = image.stat().st_size // SECTOR_BYTES
    entries = b"".join(
        struct.pack(
            "<16s16sQQQ72s",
            LINUX_DATA.bytes_le,
            uuid.uuid4().bytes_le,
            start,
            start + count - 1,
            0,
            b"",
        )
        for start, count in parts
    ).ljust(ENTRIES * ENTRY_BYTES, b"\0")
    disk = uuid.uuid4()
    backup_table = total - 1 - TABLE_SECTORS
    with open(image, "r+b") as file:
        file.write(_boot_sector([(PROTECTIVE_TYPE, 1, total - 1)]))
        for own, other, table in ((1, total - 1, 2), (total - 1, 1, backup_table)):
            file.seek(own * SECTOR_BYTES)
            file.write(_gpt_header(own, other, table, backup_table - 1, disk, entries))
            file.seek(table * SECTOR_BYTES)
            file.write(entries)


def _boot_sector(parts: Sequence[tuple[int, int, int]]) -> bytes:
    entries = b"".join(
        struct.pack("<B3sB3sII", 0, b"\0\2\0", kind, b"\xff\xff\xff", start, count)
        for kind, start, count in parts
    )
    return bytes(446) + entries.ljust(64, b"\0") + b"\x55\xaa"


def _gpt_header(
    own: int, other: int, table: int, last_usable: int, disk: uuid.UUID, entries: bytes
) -> bytes:
    fields = [b"EFI PART", 0x10000, 92, 0, 0, own, other, 2 + TABLE_SECTORS, last_usable]
    fields += [disk.bytes_le, table, ENTRIES, ENTRY_BYTES, zlib.crc32(entries)]
    layout = struct.Struct("<8sIIIIQQQQ16sQIII")
    fields[3] = zlib.crc32(layout.pack(*fields))
    return layout.pack(*fields).ljust(SECTOR_BYTES, b"\0")
