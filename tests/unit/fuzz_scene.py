# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What must hold for any bytes on a device, and valid images for a fuzzer to start from.

An input is a list of pieces, each a place, flags, a length and a copy: the used part of its header,
then its body. That leaves out the zeros of a header, where no change can do anything.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from dm_remap import copies, discovery
from dm_remap import format as fmt
from dm_remap.blockdev import Listed
from dm_remap.discovery import Found, State
from dm_remap.errors import Refused
from dm_remap.format import Copy, Extent, Invalid, LostRange, Metadata
from tests.unit.copy_scene import SECTOR, SIZE, SLOTS, Disk
from tests.unit.test_discovery import (
    BASE,
    LEFT,
    NOW,
    OLD,
    OTHER,
    REPLACING,
    RIGHT,
    Host,
    M,
    disk_info,
    spare,
)

_PIECE = struct.Struct("<BBH")
OFFSETS = fmt.header_offsets()
CODES = dict(fmt.HEADER_FIELDS)
USED = OFFSETS["body_crc"] + 4
# Give the bytes checksums and a digest that match, or else nothing but chance gets past them.
SEALED = 1
UNREADABLE_HEADER = 2
UNREADABLE_BODY = 4
# The slots, and those of a spare of another size.
PLACES = (*SLOTS, *fmt.slot_sectors_of(SIZE // 2)[fmt.FAR_MIDDLE :])
SECOND = spare(BASE, 1)
# What names a generation, apart from the body (docs/format.md).
NAMED = ("major", "features", "target_uuid", "host_id", "generation", "timestamp_ns")


@dataclass(frozen=True)
class Piece:
    """Bytes at a place.

    Args:
        place: index into PLACES; larger numbers start again from its beginning.
        flags: SEALED and the others.
        data: used part of the header, then the body.
    """

    place: int
    flags: int
    data: bytes

    @property
    def sector(self) -> int:
        return PLACES[self.place % len(PLACES)]

    @property
    def raw(self) -> bytes:
        """Header and body as they stand on the device, whole sectors."""
        header, body = self.data[:USED].ljust(fmt.HEADER_BYTES, b"\0"), self.data[USED:]
        if self.flags & SEALED:
            header = sealed(header, body)
        return (header + body).ljust(-(-(len(header) + len(body)) // SECTOR) * SECTOR, b"\0")


def field(header: bytes, name: str) -> bytes:
    size = struct.calcsize("<" + CODES[name])
    return header[OFFSETS[name] : OFFSETS[name] + size]


def digest_of(header: bytes, body: bytes) -> bytes:
    named = b"".join(field(header, name) for name in NAMED)
    return hashlib.sha256(fmt.MAGIC + named + field(header, "parent_digest") + body).digest()


def header_crc(header: bytes) -> int:
    before, after = header[: OFFSETS["header_crc"]], header[OFFSETS["header_crc"] + 4 :]
    return zlib.crc32(before + bytes(4) + after)


def sealed(header: bytes, body: bytes) -> bytes:
    changed = bytearray(header)
    values = {"body_length": len(body), "body_crc": zlib.crc32(body)}
    for name, value in {**values, "digest": digest_of(header, body)}.items():
        struct.pack_into("<" + CODES[name], changed, OFFSETS[name], value)
    struct.pack_into("<I", changed, OFFSETS["header_crc"], header_crc(bytes(changed)))
    return bytes(changed)


# Inputs


def packed(pieces: Iterable[Piece]) -> bytes:
    """An input with these pieces."""
    return b"".join(_PIECE.pack(p.place, p.flags, len(p.data)) + p.data for p in pieces)


def pieces_of(given: bytes) -> Iterator[Piece]:
    """The pieces of an input, whatever it is; the last one may be cut short."""
    offset = 0
    while len(given) - offset > _PIECE.size:
        place, flags, length = _PIECE.unpack_from(given, offset)
        offset += _PIECE.size
        yield Piece(place, flags, given[offset : offset + length])
        offset += length


def copy_of(metadata: Metadata, index: int, spare_index: int = 0, flags: int = SEALED) -> Piece:
    uuid = fmt.spare_uuid_of(metadata, spare_index)
    raw = fmt.pack_slot(metadata, uuid, SIZE, index)
    end = fmt.HEADER_BYTES + len(metadata.body)
    return Piece(index, flags, raw[:USED] + raw[fmt.HEADER_BYTES : end])


def generations() -> dict[str, Metadata]:
    """Valid metadata that has everything once."""
    full = replace(
        BASE.successor(NOW),
        health={"score": 97.5, "text": "\u00e4\\ud", "list": [1, None, True]},
        extents=(Extent(3, 5, 0, 9, 129), Extent(8, 1, 1, 0), Extent(40, 2, 0, 0)),
        lost=(LostRange(7, 1), LostRange(100, 70000)),
        unknown_sections=((77, b"from a newer minor version"),),
    )
    return {
        "first": OLD,
        "base": BASE,
        "full": full,
        "left": LEFT,
        "right": RIGHT,
        "replacing": REPLACING,
        "other": OTHER,
    }


def seeds() -> dict[str, bytes]:
    """Valid images by name: single copies, whole spares, and histories side by side."""
    known = generations()
    found = {}
    for name, metadata in known.items():
        for flags in (0, SEALED):
            found[f"{name}-{flags}"] = packed([copy_of(metadata, 1, flags=flags)])
        found[f"{name}-spare"] = packed(copy_of(metadata, index) for index in range(fmt.COPIES))
    for one, two in (("first", "base"), ("left", "right"), ("base", "other"), ("full", "base")):
        mixed = [copy_of(known[one if index % 2 else two], index) for index in range(fmt.COPIES)]
        found[f"{one}-{two}"] = packed(mixed)
    return found


# What must hold


def judged(raw: bytes, sector: int) -> Copy | Invalid:
    try:
        return fmt.unpack_slot(raw, sector)
    except Invalid as error:
        return error


def check_slot(raw: bytes, sector: int) -> Metadata | None:
    """What is accepted is exactly what would be written; anything else has a diagnosis."""
    copy = judged(raw, sector)
    if isinstance(copy, Invalid):
        assert isinstance(copy.diagnosis, fmt.Diagnosis)
        assert copy.message
        return None
    header = raw[: fmt.HEADER_BYTES]
    body = raw[fmt.HEADER_BYTES : fmt.HEADER_BYTES + copy.header.body_length]
    assert field(header, "header_crc") == struct.pack("<I", header_crc(header))
    assert field(header, "body_crc") == struct.pack("<I", zlib.crc32(body))
    assert field(header, "digest") == digest_of(header, body)
    place = copy.header
    again = fmt.pack_slot(copy.metadata, place.spare_uuid, place.spare_sectors, place.copy_index)
    assert again[fmt.HEADER_BYTES : fmt.HEADER_BYTES + len(body)] == body
    # A newer minor version may have written other fields, which the header's checksum covers.
    for name in CODES.keys() - {"minor", "header_crc"}:
        assert field(again, name) == field(header, name), name
    return copy.metadata


def device_of(pieces: Iterable[Piece]) -> Disk:
    disk = Disk("/dev/sdb")
    for piece in pieces:
        disk.put(piece.sector, piece.raw)
        disk.unreadable.difference_update(range(piece.sector, piece.sector + fmt.SLOT_SECTORS))
        if piece.flags & UNREADABLE_HEADER:
            disk.unreadable.add(piece.sector)
        if piece.flags & UNREADABLE_BODY:
            disk.unreadable.add(piece.sector + fmt.HEADER_SECTORS)
    return disk


def check_device(disk: Disk) -> Found:
    """Each slot is a copy that is valid by itself, or has its diagnosis."""
    listed = Listed(disk_info(1))
    found = discovery.look(listed, Host((listed.info, disk)), known={BASE.digest: BASE})
    seen = found.survey
    assert seen is not None, found.error
    for copy in seen.copies:
        place = copy.header
        assert not disk.unreadable.intersection(range(place.sector, place.sector + 9))
        raw = disk.read(place.sector, place.slot_bytes // SECTOR)
        assert check_slot(raw, place.sector) == copy.metadata
        assert (place.target_uuid, place.spare_uuid) in seen.claims
    places = {copy.header.sector for copy in seen.copies} | {copy.sector for copy in seen.failed}
    if not seen.copies:
        assert places >= set(SLOTS)
    assert all(copy.message and copy.index < fmt.COPIES for copy in seen.failed)
    return found


def check_decision(found: Found) -> None:
    """Only what a copy says is decided on, no older one of a target, and nothing goes untold."""
    others = [M, found, SECOND]
    result = discovery.decide(others, now_ns=NOW)
    said = [copy.metadata for device in others if device.survey for copy in device.survey.copies]
    for target in result.targets:
        assert target.decision
        assert target.to_dict()
        if target.metadata is not None:
            assert target.metadata in said
        if target.state is State.REFUSED:
            assert any(problem.refuses for problem in target.problems)
            continue
        assert target.metadata is not None
        assert not any(problem.refuses for problem in target.problems)
        mine = [metadata for metadata in said if metadata.target_uuid == target.uuid]
        assert target.metadata.generation == max(metadata.generation for metadata in mine)
    seen = found.survey
    assert seen is not None
    told = {problem.device for problem in result.others}
    if seen.claims:
        assert seen.claims[0][0] in {target.uuid for target in result.targets}
    elif not seen.empty:
        assert found.path in told


def check_choice(found: Found) -> None:
    """A device by itself is chosen from, or refused in the declared way."""
    seen = found.survey
    assert seen is not None
    try:
        chosen = copies.choose({found.path: seen}, NOW)
    except Refused:
        return
    assert chosen.metadata in [copy.metadata for copy in seen.copies]


def examine(given: bytes) -> None:
    """Look at one input. Whatever is raised is a fault of the core."""
    pieces = list(pieces_of(given))
    for piece in pieces:
        check_slot(piece.raw, piece.sector)
    found = check_device(device_of(pieces))
    check_decision(found)
    check_choice(found)
