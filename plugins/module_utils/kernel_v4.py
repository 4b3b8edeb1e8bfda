# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Spares of the out-of-tree kernel target dm-remap-v4: reads their metadata, never writes any.

The layout is that of ``struct dm_remap_metadata_v4`` in that target's ``src/dm-remap-v4.h``, as its
compiler lays it out on a little-endian machine with 64 bits, and as a spare was found to have it;
docs/kernel-v4.md has all of it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .copies import FailedCopy
from .errors import Refused
from .format import Diagnosis, Invalid

SECTOR_BYTES = 512
MAGIC = b"4RMD"
SIGNATURE = "kernel dm-remap-v4 spare"
VERSION = 4
COPY_SECTORS = (0, 256, 512, 768, 1024)
COPY_BYTES = 84288
# The target writes each copy as a buffer of 256 sectors, whatever it needs of it.
METADATA_SECTORS = 1280
MAX_REMAPS = 2048
# Whole blocks of 4 KiB, so that devices with such blocks can be read too.
_READ_SECTORS = 168

# magic, version, sequence, timestamp, checksum, copy index, size
_HEADER = struct.Struct("<4sIQQIII")
_CHECKSUM_OFFSET, _CHECKSUM_END = 24, 28
# sectors of main and of the spare, sector size
_DEVICES = struct.Struct("<QQI")
_DEVICES_OFFSET = 120
# remaps, and the most there can be
_COUNTS = struct.Struct("<II")
_COUNTS_OFFSET = 296
# sector of main, sector of the spare, time, accesses, errors, reason, flags
_ENTRY = struct.Struct("<QQQIIHH4x")
_TABLE_OFFSET = 312
_PENDING, _ACTIVE = 1, 2


class Readable(Protocol):
    """What a look needs of a device; sectors are of 512 bytes."""

    name: str
    sectors: int

    def read(self, sector: int, count: int) -> bytes:
        """Read sectors, raising OSError on failure."""


@dataclass(frozen=True)
class Remap:
    """One entry of the table.

    Args:
        main_sector: the sector of main that it is for.
        spare_sector: the sector of the spare that stands in for it.
        errors: what the target counted there.
        flags: bit 0 says pending, bit 1 active.
    """

    main_sector: int
    spare_sector: int
    errors: int
    flags: int

    @property
    def pending(self) -> bool:
        """Whether the target may never have used it.

        It uses no entry that has bit 0, and drops the bit only when it reads the table again at its
        next start. On disk the bit stays until the table is written once more.
        """
        return bool(self.flags & _PENDING) or not self.flags & _ACTIVE


@dataclass(frozen=True)
class KernelMetadata:
    """What one copy says.

    Args:
        sequence: rises with each write, and begins anew when the kernel's module is loaded.
        timestamp: seconds since 1970 at the write.
        main_sectors: size of main.
        spare_sectors: size of the spare.
        remaps: the table, in its order.
    """

    sequence: int
    timestamp: int
    main_sectors: int
    spare_sectors: int
    remaps: tuple[Remap, ...]


@dataclass(frozen=True)
class Survey:
    """What a look at one device found.

    Args:
        device: its name.
        copies: the valid copies, with their index.
        failed: the others.
    """

    device: str
    copies: tuple[tuple[int, KernelMetadata], ...]
    failed: tuple[FailedCopy, ...]


@dataclass(frozen=True)
class Choice:
    """The copy that counts, and what the user should know of the others."""

    metadata: KernelMetadata
    warnings: tuple[str, ...]


def checksum(data: bytes) -> int:
    """The checksum of a copy: all of its bytes but the four that hold it.

    It is the kernel's ``crc32(0, ...)``. crcmod describes it as the polynomial 0x104C11DB7 with
    initial value 0, reversed, and final value 0. zlib inverts before and after, which this undoes.

    Args:
        data: the `COPY_BYTES` of a copy.
    """
    begun = zlib.crc32(data[:_CHECKSUM_OFFSET], 0xFFFFFFFF)
    return zlib.crc32(data[_CHECKSUM_END:COPY_BYTES], begun) ^ 0xFFFFFFFF


def unpack(data: bytes) -> KernelMetadata:
    """Read one copy.

    Args:
        data: the bytes from its first sector on, `COPY_BYTES` or more.

    Raises:
        Invalid: they are not a whole copy; it has the diagnosis.
    """
    if not data.startswith(MAGIC):
        raise Invalid(Diagnosis.MAGIC, "it does not start with the magic")
    if len(data) < COPY_BYTES:
        raise Invalid(Diagnosis.STRUCTURE, f"it has {len(data)} bytes, not {COPY_BYTES}")
    _magic, version, sequence, timestamp, stored, _index, size = _HEADER.unpack_from(data)
    found = checksum(data)
    if found != stored:
        raise Invalid(Diagnosis.DATA_CHECKSUM, f"its checksum is {found:#010x}, not {stored:#010x}")
    if version != VERSION:
        kind = Diagnosis.NEWER if version > VERSION else Diagnosis.STRUCTURE
        raise Invalid(kind, f"it has version {version}, not {VERSION}")
    if size != COPY_BYTES:
        raise Invalid(Diagnosis.STRUCTURE, f"it says that it has {size} bytes, not {COPY_BYTES}")
    main_sectors, spare_sectors, sector_size = _DEVICES.unpack_from(data, _DEVICES_OFFSET)
    # The target writes 512 whatever the devices have, and counts in sectors of that.
    if sector_size != SECTOR_BYTES:
        raise Invalid(Diagnosis.STRUCTURE, f"it has sectors of {sector_size} bytes")
    if not main_sectors or not spare_sectors:
        raise Invalid(Diagnosis.STRUCTURE, "it names a device without sectors")
    count, most = _COUNTS.unpack_from(data, _COUNTS_OFFSET)
    if most != MAX_REMAPS or count > most:
        raise Invalid(Diagnosis.STRUCTURE, f"it has {count} remaps of at most {most}")
    return KernelMetadata(
        sequence,
        timestamp,
        main_sectors,
        spare_sectors,
        tuple(_entry(data, number) for number in range(count)),
    )


def _entry(data: bytes, number: int) -> Remap:
    place = _TABLE_OFFSET + number * _ENTRY.size
    main, spare, _time, _accesses, errors, _reason, flags = _ENTRY.unpack_from(data, place)
    return Remap(main, spare, errors, flags)


def survey(device: Readable) -> Survey:
    """Read all copies of a device, and say of each that is not used why."""
    found: list[tuple[int, KernelMetadata]] = []
    failed: list[FailedCopy] = []
    for index, sector in enumerate(COPY_SECTORS):
        if sector + _READ_SECTORS > device.sectors:
            reason = f"{Diagnosis.UNREADABLE.value}: the device ends before"
            failed.append(FailedCopy(index, sector, Diagnosis.UNREADABLE, reason))
            continue
        try:
            data = device.read(sector, _READ_SECTORS)
            found.append((index, unpack(data)))
        except OSError as error:
            reason = f"{Diagnosis.UNREADABLE.value}: {error.strerror or error}"
            failed.append(FailedCopy(index, sector, Diagnosis.UNREADABLE, reason))
        except Invalid as error:
            failed.append(FailedCopy(index, sector, error.diagnosis, error.message))
    return Survey(device.name, tuple(found), tuple(failed))


def choose(seen: Survey) -> Choice:
    """The newest copy.

    The target itself takes the highest sequence, then the latest time. But it counts from the start
    again whenever its module is loaded, so an older table may have the higher sequence. Where the
    two do not agree nobody can say which table is in force.

    Raises:
        Refused: there is no valid copy, or the copies contradict each other.
    """
    if not seen.copies:
        found = ", ".join(f"copy {f.index}: {f.diagnosis.value}" for f in seen.failed)
        raise Refused(
            f"has no valid copy of a dm-remap-v4 target's metadata ({found})",
            device=seen.device,
            remedy="give the spare of the kernel target",
        )
    kinds = sorted({metadata for _index, metadata in seen.copies}, key=_rank, reverse=True)
    best = kinds[0]
    for other in kinds[1:]:
        ambiguous = other.timestamp > best.timestamp or _rank(other) == _rank(best)
        if ambiguous and _meaning(other) != _meaning(best):
            raise Refused(
                f"has copies of the metadata that contradict each other: {_named(seen, best)} and "
                f"{_named(seen, other)}",
                device=seen.device,
                remedy="let the kernel target write them anew, or copy the data off with it",
            )
    warnings = [
        f"{seen.device}: copy {fault.index} of the old metadata is not used, {fault.message}"
        for fault in seen.failed
    ]
    warnings += [
        f"{seen.device}: copy {index} of the old metadata is not used, "
        f"{Diagnosis.SEQUENCE.value}: it has {metadata.sequence}, and there is {best.sequence}"
        for index, metadata in seen.copies
        if metadata != best
    ]
    if len(best.remaps) == MAX_REMAPS:
        warnings.append(
            f"{seen.device}: the old table is full, and the kernel target kept no remap beyond "
            f"{MAX_REMAPS} entries"
        )
    return Choice(best, tuple(warnings))


def _rank(metadata: KernelMetadata) -> tuple[int, int]:
    return metadata.sequence, metadata.timestamp


def _meaning(metadata: KernelMetadata) -> tuple[int, int, Sequence[Remap]]:
    return metadata.main_sectors, metadata.spare_sectors, metadata.remaps


def _named(seen: Survey, wanted: KernelMetadata) -> str:
    index = next(index for index, metadata in seen.copies if metadata == wanted)
    return (
        f"copy {index} (sequence {wanted.sequence}, time {wanted.timestamp}, "
        f"{len(wanted.remaps)} remaps)"
    )
