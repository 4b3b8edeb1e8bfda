# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The metadata on a spare: bytes to `Metadata` and back, and the layout of a spare. Pure.

docs/format.md describes every offset; HEADER_FIELDS and SECTIONS below are the same tables in code.
A generation has exactly one body: unpacking refuses a body that packing would write differently.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import struct
import uuid
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import DmRemapError, Refused
from .marks import (
    FIRST_FREE_SECTOR,
    MAGIC,
    NEAR_SECTORS,
    SECTOR_BYTES,
    SLOT_SECTORS,
    SMALLEST_FAR_SECTORS,
    far_sectors,
)

if TYPE_CHECKING:
    from typing import TypeGuard

HEADER_BYTES = 4096
HEADER_SECTORS = HEADER_BYTES // SECTOR_BYTES
BODY_MAX = 508 * 1024
COPIES = 7
FAR_MIDDLE = 5
FAR_END = 6

MAJOR = 1
MINOR = 0
# Bits of the header's features: what a reader must know to find the data.
FEATURE_REPLACEMENT = 1
KNOWN_FEATURES = FEATURE_REPLACEMENT

MAX_SPARES = 8
MAX_HISTORY = 256
MIN_CHUNK_SECTORS = 8
MAX_CHUNK_SECTORS = 2048
MAX_GENERATION = 2**63 - 1
# 2^64 bytes: no block device has more sectors than this.
MAX_SECTORS = 2**55
NO_DIGEST = bytes(32)

# Name, struct code. Little-endian, packed in this order; the rest of HEADER_BYTES is zero.
HEADER_FIELDS = (
    ("magic", "8s"),
    ("major", "H"),
    ("minor", "H"),
    ("header_crc", "I"),
    ("target_uuid", "16s"),
    ("spare_uuid", "16s"),
    ("features", "Q"),
    ("copy_index", "I"),
    ("body_length", "I"),
    ("sector", "Q"),
    ("spare_sectors", "Q"),
    ("generation", "Q"),
    ("timestamp_ns", "Q"),
    ("host_id", "16s"),
    ("parent_digest", "32s"),
    ("digest", "32s"),
    ("body_crc", "I"),
)
_FIELDS_LAYOUT = "<" + "".join(code for _name, code in HEADER_FIELDS)
_HEADER = struct.Struct(f"{_FIELDS_LAYOUT}{HEADER_BYTES - struct.calcsize(_FIELDS_LAYOUT)}x")


def header_offsets() -> dict[str, int]:
    """Byte offset of each header field, by name, from HEADER_FIELDS."""
    offsets = {}
    layout = "<"
    for name, code in HEADER_FIELDS:
        offsets[name] = struct.calcsize(layout)
        layout += code
    return offsets


_CRC_OFFSET = header_offsets()["header_crc"]

SECTION_CONFIG = 1
SECTION_HEALTH = 2
SECTION_EXTENTS = 3
SECTION_LOST = 4
SECTION_HISTORY = 5
# Type, name, bytes of one entry (1: JSON text). All of them are always present.
SECTIONS = (
    (SECTION_CONFIG, "config", 1),
    (SECTION_HEALTH, "health", 1),
    (SECTION_EXTENTS, "extents", 16),
    (SECTION_LOST, "lost", 8),
    (SECTION_HISTORY, "history", 16),
)
_KNOWN_SECTIONS = frozenset(number for number, _name, _size in SECTIONS)
_SECTION = struct.Struct("<II")
_EXTENT = struct.Struct("<QQ")
_LOST = struct.Struct("<Q")
_HISTORY = struct.Struct("<Q8s")
_DIGEST_HEAD = struct.Struct("<8sHQ16s16sQQ32s")
_MASK_48 = 2**48 - 1
_MAX_RUN = 65536


class Diagnosis(enum.Enum):
    """Why a copy is not used."""

    MAGIC = "magic"
    HEADER_CHECKSUM = "header checksum"
    DATA_CHECKSUM = "data checksum"
    SEQUENCE = "sequence"
    MISPLACED = "misplaced"
    STRUCTURE = "structure"
    NEWER = "newer"
    FOREIGN = "foreign"
    UNREADABLE = "unreadable"


class Invalid(DmRemapError):
    """Bytes that are not a usable copy.

    Attributes:
        diagnosis: what kind of fault it is.
        target_uuid: the target that a copy of a newer format names, else None.
        spare_uuid: the spare that a copy of a newer format names, else None.
    """

    def __init__(
        self,
        diagnosis: Diagnosis,
        message: str,
        target_uuid: uuid.UUID | None = None,
        spare_uuid: uuid.UUID | None = None,
    ) -> None:
        super().__init__(f"{diagnosis.value}: {message}")
        self.diagnosis = diagnosis
        self.target_uuid = target_uuid
        self.spare_uuid = spare_uuid


class BadMetadata(Refused):
    """Metadata that must not be written, because it could not be read back or makes no sense."""


def _is_int(value: object, low: int, high: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Geometry:
    """Where everything lies on a spare; see docs/format.md. All in sectors of 512 bytes.

    Attributes:
        spare_sectors: size of the device when it was laid out.
        tag_start, tag_sectors: the tag area, dm-integrity's meta device.
        journal_sectors: the journal inside the tag area, as dm-integrity is told.
        data_start, data_sectors: the data area; spare chunk k starts at data_start + k * chunk.
        far_middle, far_end: first sectors of the two far copies.
        chunk_sectors: the chunk, a power of two, 8 to 2048.
        block_sectors: the logical block that one tag covers, 1 or 8.
    """

    spare_sectors: int
    tag_start: int
    tag_sectors: int
    journal_sectors: int
    data_start: int
    data_sectors: int
    far_middle: int
    far_end: int
    chunk_sectors: int
    block_sectors: int

    @property
    def chunks(self) -> int:
        """Chunks in the data area, the reserved ones included."""
        return self.data_sectors // self.chunk_sectors

    @cached_property
    def reserved_chunks(self) -> range:
        """Chunks that the middle far copy touches; they never hold remapped data."""
        first = (self.far_middle - self.data_start) // self.chunk_sectors
        end = self.far_middle + SLOT_SECTORS - self.data_start
        return range(first, min(-(-end // self.chunk_sectors), self.chunks))

    @property
    def usable_chunks(self) -> int:
        """Chunks that can hold remapped data."""
        return self.chunks - len(self.reserved_chunks)

    def holds(self, chunk: int, length: int = 1) -> bool:
        """Whether chunks [chunk, chunk + length) are all usable."""
        reserved = self.reserved_chunks
        inside = chunk >= 0 and length >= 1 and chunk + length <= self.chunks
        return inside and (chunk + length <= reserved.start or chunk >= reserved.stop)

    def chunk_sector(self, chunk: int) -> int:
        """First sector on the spare of spare chunk `chunk`."""
        return self.data_start + chunk * self.chunk_sectors

    def to_dict(self) -> dict[str, int]:
        """All fields, for the configuration's JSON."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Geometry:
        """Read what `to_dict` gave; keys that are not known are ignored.

        Raises:
            ValueError: a field is missing, no integer, or the areas overlap or leave the spare.
        """
        known: dict[str, int] = {}
        for field in dataclasses.fields(cls):
            value = values.get(field.name)
            if not _is_int(value, 0, MAX_SECTORS):
                raise ValueError(f"geometry: {field.name} is {value!r}")
            known[field.name] = value
        geometry = cls(**known)
        geometry._check()
        return geometry

    def _check(self) -> None:
        _check_chunk(self.chunk_sectors, self.block_sectors)
        _near_and_far = slot_sectors_of(self.spare_sectors)
        for name, good in (
            ("far copies", (self.far_middle, self.far_end) == _near_and_far[FAR_MIDDLE:]),
            ("tag area", self.tag_start >= FIRST_FREE_SECTOR),
            ("tag area", self.tag_start + self.tag_sectors <= self.data_start),
            ("journal", self.journal_sectors <= self.tag_sectors),
            ("data area", self.data_start <= self.far_middle),
            ("data area", self.data_start + self.data_sectors <= self.far_end),
            ("data area", self.data_sectors % self.chunk_sectors == 0),
            ("data area", self.usable_chunks > 0),
        ):
            if not good:
                raise ValueError(f"geometry: the {name} is out of place: {self.to_dict()}")


def _check_chunk(chunk_sectors: int, block_sectors: int) -> None:
    if not MIN_CHUNK_SECTORS <= chunk_sectors <= MAX_CHUNK_SECTORS or chunk_sectors & (
        chunk_sectors - 1
    ):
        raise ValueError(
            f"a chunk of {chunk_sectors} sectors is no power of two"
            f" from {MIN_CHUNK_SECTORS} to {MAX_CHUNK_SECTORS}"
        )
    if block_sectors not in (1, 8):
        raise ValueError(f"a logical block of {block_sectors} sectors is neither 1 nor 8")


def slot_sectors_of(spare: Geometry | int) -> tuple[int, ...]:
    """First sectors of the seven slots, by copy index.

    Args:
        spare: the spare's geometry, or its size in sectors, 32768 to 2^55.

    Raises:
        ValueError: the size is outside that range, so there is no room for far copies.
    """
    sectors = spare.spare_sectors if isinstance(spare, Geometry) else spare
    if not SMALLEST_FAR_SECTORS <= sectors <= MAX_SECTORS:
        raise ValueError(f"a device of {sectors} sectors has no room for far copies")
    return (*NEAR_SECTORS, *far_sectors(sectors))


def _lay_out(spare_sectors: int, chunk_sectors: int, block_sectors: int) -> Geometry:
    """The geometry of a spare, before any check. Sizes in sectors.

    The tag area holds what dm-integrity puts on its meta device (calculate_device_limits and
    initialize_superblock in the kernel's drivers/md/dm-integrity.c): a superblock of 8 sectors, the
    journal, then 4 bytes of crc32c for each block in buffers of 128 sectors. 128 more are slack.
    """
    middle, end = slot_sectors_of(spare_sectors)[FAR_MIDDLE:]
    journal = min(max(spare_sectors // 512, 2048), 65536)
    # The data area cannot be larger than this; tags for it all avoid a circular definition.
    blocks = -(-(end - FIRST_FREE_SECTOR) // block_sectors)
    tags = -(-blocks * 4 // (128 * SECTOR_BYTES)) * 128
    data_start = _round_up(FIRST_FREE_SECTOR + 8 + journal + tags + 128, MAX_CHUNK_SECTORS)
    return Geometry(
        spare_sectors=spare_sectors,
        tag_start=FIRST_FREE_SECTOR,
        tag_sectors=data_start - FIRST_FREE_SECTOR,
        journal_sectors=journal,
        data_start=data_start,
        data_sectors=max(end - data_start, 0) // chunk_sectors * chunk_sectors,
        far_middle=middle,
        far_end=end,
        chunk_sectors=chunk_sectors,
        block_sectors=block_sectors,
    )


def _fits(geometry: Geometry) -> bool:
    return geometry.data_start <= geometry.far_middle and geometry.usable_chunks > 0


def minimum_spare_sectors(chunk_sectors: int, block_sectors: int) -> int:
    """The smallest size in sectors, in steps of 1 MiB, that `plan_geometry` accepts."""
    _check_chunk(chunk_sectors, block_sectors)
    sectors = SMALLEST_FAR_SECTORS
    while not _fits(_lay_out(sectors, chunk_sectors, block_sectors)):
        sectors += 2048
    return sectors


def plan_geometry(spare_sectors: int, chunk_sectors: int, block_sectors: int) -> Geometry:
    """Lay out a new spare.

    Args:
        spare_sectors: size of the device in sectors.
        chunk_sectors: the target's chunk in sectors, a power of two, 8 to 2048.
        block_sectors: the logical block in sectors, 1 or 8.

    Raises:
        Refused: the device is too small (the message says what is needed) or too large.
        ValueError: chunk_sectors or block_sectors is out of range.
    """
    needed = minimum_spare_sectors(chunk_sectors, block_sectors)
    if spare_sectors < needed:
        raise Refused(
            f"the spare has {spare_sectors} sectors of 512 bytes, too few",
            remedy=f"use one of at least {needed} sectors ({needed // 2048} MiB)",
        )
    if spare_sectors > MAX_SECTORS:
        raise Refused(f"the spare has {spare_sectors} sectors, more than {MAX_SECTORS}")
    return _lay_out(spare_sectors, chunk_sectors, block_sectors)


@dataclass(frozen=True, order=True)
class Extent:
    """A run of logical chunks that live on a spare. All but `spare` and `flags` in chunks.

    Attributes:
        logical: first chunk of the target, below 2^48.
        length: 1 to 65536 chunks.
        spare: position in the configuration's list of spares.
        physical: first chunk on that spare.
        flags: 0 to 255; none is defined yet, all are kept.
    """

    logical: int
    length: int
    spare: int
    physical: int
    flags: int = 0


@dataclass(frozen=True, order=True)
class LostRange:
    """Sectors of the target, [sector, sector + count), that no read could save."""

    sector: int
    count: int


def _merged(ranges: Iterable[LostRange]) -> tuple[LostRange, ...]:
    """The same sectors as sorted ranges that neither overlap nor touch."""
    merged: list[LostRange] = []
    for lost in sorted(ranges, key=lambda item: item.sector):
        if merged and lost.sector <= merged[-1].sector + merged[-1].count and lost.count > 0:
            start = merged[-1].sector
            end = max(start + merged[-1].count, lost.sector + lost.count)
            merged[-1] = LostRange(start, end - start)
        else:
            merged.append(lost)
    return tuple(merged)


@dataclass(frozen=True)
class Metadata:
    """One generation: everything that describes a target. Not to be changed in place.

    Extents are kept sorted; lost ranges sorted and merged.

    Attributes:
        target_uuid: the target.
        generation: 1 to 2^63 - 1, one more with each commit.
        timestamp_ns: wall clock at the commit, nanoseconds since 1970, unsigned 64 bits.
        host_id: the host that committed it.
        parent_digest: digest of the generation before, NO_DIGEST for the first.
        config: chunk_sectors, main and spares, which this module checks, and whatever else.
        health: any JSON object.
        extents: what is remapped.
        lost: what is lost.
        unknown_sections: (type, payload) of sections written by a newer minor version.
        history: (generation, first 8 bytes of its digest) of up to 256 ancestors, newest first.
    """

    target_uuid: uuid.UUID
    generation: int
    timestamp_ns: int
    host_id: uuid.UUID
    parent_digest: bytes
    config: dict[str, Any]
    health: dict[str, Any]
    extents: tuple[Extent, ...] = ()
    lost: tuple[LostRange, ...] = ()
    unknown_sections: tuple[tuple[int, bytes], ...] = ()
    history: tuple[tuple[int, bytes], ...] = ()

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.extents, key=lambda extent: extent.logical))
        object.__setattr__(self, "extents", ordered)
        object.__setattr__(self, "lost", _merged(self.lost))

    @property
    def features(self) -> int:
        """Bits of what a reader must know, as they stand in the header."""
        return FEATURE_REPLACEMENT if "replacement" in self.config else 0

    @cached_property
    def body(self) -> bytes:
        """The packed sections.

        Raises:
            BadMetadata: something is out of range, contradicts itself, or does not fit.
        """
        _check(self)
        sections = [
            (SECTION_CONFIG, _dump_json("config", self.config)),
            (SECTION_HEALTH, _dump_json("health", self.health)),
            (SECTION_EXTENTS, b"".join(_pack_extent(extent) for extent in self.extents)),
            (SECTION_LOST, b"".join(_pack_lost(lost) for lost in self.lost)),
            (SECTION_HISTORY, b"".join(_HISTORY.pack(*entry) for entry in self.history)),
            *self.unknown_sections,
        ]
        body = b"".join(_pack_section(*section) for section in sections)
        if len(body) > BODY_MAX:
            raise BadMetadata(
                f"the metadata needs {len(body)} bytes and a copy holds {BODY_MAX}"
                f" ({len(self.extents)} extents, {len(self.lost)} lost ranges)",
                remedy="replace the main device, or merge remaps into longer runs",
            )
        return body

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 that names this generation; equal on every copy and spare, chained by parent."""
        # First, because it checks what is packed here.
        body = self.body
        head = _DIGEST_HEAD.pack(
            MAGIC,
            MAJOR,
            self.features,
            self.target_uuid.bytes,
            self.host_id.bytes,
            self.generation,
            self.timestamp_ns,
            self.parent_digest,
        )
        return hashlib.sha256(head + body).digest()

    def successor(self, timestamp_ns: int, **changes: Any) -> Metadata:
        """The next generation, with `changes` to other fields.

        Args:
            timestamp_ns: wall clock now, nanoseconds since 1970.
            changes: fields of Metadata other than generation, parent_digest and history.
        """
        entry = (self.generation, self.digest[:8])
        return dataclasses.replace(
            self,
            generation=self.generation + 1,
            timestamp_ns=timestamp_ns,
            parent_digest=self.digest,
            history=(entry, *self.history)[:MAX_HISTORY],
            **changes,
        )


@dataclass(frozen=True)
class Header:
    """The checked header of one copy. Sectors are absolute on the spare; lengths are in bytes."""

    minor: int
    target_uuid: uuid.UUID
    spare_uuid: uuid.UUID
    copy_index: int
    body_length: int
    sector: int
    spare_sectors: int
    generation: int
    timestamp_ns: int
    host_id: uuid.UUID
    parent_digest: bytes
    digest: bytes
    body_crc: int
    features: int = 0

    @property
    def slot_bytes(self) -> int:
        """Bytes to read for the whole copy: header and body, up to a whole 4 KiB block."""
        return HEADER_BYTES + _round_up(self.body_length, HEADER_BYTES)


@dataclass(frozen=True)
class Copy:
    """One valid copy."""

    header: Header
    metadata: Metadata


def _bad(message: str) -> NoReturn:
    raise BadMetadata(message)


def _dump_json(name: str, value: dict[str, Any]) -> bytes:
    """Canonical JSON: sorted keys, no spaces, UTF-8, and nothing that would read back different."""
    try:
        text = json.dumps(
            value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")
        )
        raw = text.encode()
        if load_json(raw.decode()) != value:
            _bad(f"{name} holds something that JSON does not give back unchanged")
    except (TypeError, ValueError, RecursionError) as error:
        raise BadMetadata(f"{name} is not JSON: {error}") from error
    return raw


def _int_of_64_bits(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError("a number has more than 20 digits")
    return int(digits)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def load_json(text: str) -> dict[str, Any]:
    """The JSON object in a text that holds only what metadata may hold.

    Raises:
        ValueError: it is none.
    """
    value = json.loads(text, parse_int=_int_of_64_bits, parse_constant=_no_constant)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _pack_section(number: int, payload: bytes) -> bytes:
    return _SECTION.pack(number, len(payload)) + payload + bytes(-len(payload) % 8)


def _pack_extent(extent: Extent) -> bytes:
    return _EXTENT.pack(
        extent.logical | (extent.length - 1) << 48,
        extent.physical | extent.spare << 48 | extent.flags << 56,
    )


def _pack_lost(lost: LostRange) -> bytes:
    """Entries of at most 65536 sectors each."""
    end = lost.sector + lost.count
    return b"".join(
        _LOST.pack(sector | (min(end - sector, _MAX_RUN) - 1) << 48)
        for sector in range(lost.sector, end, _MAX_RUN)
    )


def _check(metadata: Metadata) -> None:
    """Refuse metadata that contradicts itself; the same rules hold for what is read."""
    if not _is_int(metadata.generation, 1, MAX_GENERATION):
        _bad(f"generation {metadata.generation} is not from 1 to {MAX_GENERATION}")
    if not _is_int(metadata.timestamp_ns, 0, 2**64 - 1):
        _bad(f"timestamp {metadata.timestamp_ns} is not an unsigned 64-bit number")
    if len(metadata.parent_digest) != len(NO_DIGEST):
        _bad("the parent's digest is not 32 bytes")
    if not isinstance(metadata.config, dict) or not isinstance(metadata.health, dict):
        _bad("config and health must be JSON objects")
    _check_history(metadata)
    numbers = [number for number, _payload in metadata.unknown_sections]
    if numbers != sorted(set(numbers)) or any(
        not SECTION_HISTORY < number < 2**32 for number in numbers
    ):
        _bad(f"unknown sections {numbers} are not rising above {SECTION_HISTORY}")
    main_sectors, chunk_sectors, spares = _check_config(metadata.config)
    _check_extents(metadata.extents, -(-main_sectors // chunk_sectors), spares)
    for lost in metadata.lost:
        if lost.count < 1 or not 0 <= lost.sector <= main_sectors - lost.count:
            _bad(f"{lost} is outside the target's {main_sectors} sectors")


def _check_history(metadata: Metadata) -> None:
    generations = [generation for generation, _digest in metadata.history]
    if len(generations) > MAX_HISTORY:
        _bad(f"the history has {len(generations)} entries, more than {MAX_HISTORY}")
    bounded = [metadata.generation, *generations, 0]
    if any(newer <= older for newer, older in zip(bounded, bounded[1:])):
        _bad("the history's generations do not fall from the current one")
    if any(len(digest) != 8 for _generation, digest in metadata.history):
        _bad("a digest in the history is not 8 bytes")
    if metadata.history and metadata.history[0][1] != metadata.parent_digest[:8]:
        _bad("the history does not start with the parent")


def _check_config(config: Mapping[str, Any]) -> tuple[int, int, list[Geometry | None]]:
    """The main's sectors, the chunk's sectors, and the geometry of each spare (None: a gap)."""
    main = config.get("main")
    main_sectors = main.get("sectors") if isinstance(main, dict) else None
    # Lost ranges and logical chunks have 48 bits for a sector.
    if not _is_int(main_sectors, 1, _MASK_48):
        _bad(f"config: main.sectors is {main_sectors!r}, not from 1 to 2^48 - 1")
    chunk_sectors = config.get("chunk_sectors")
    if not _is_int(chunk_sectors, MIN_CHUNK_SECTORS, MAX_CHUNK_SECTORS):
        _bad(f"config: chunk_sectors is {chunk_sectors!r}")
    spares = config.get("spares")
    if not isinstance(spares, list) or len(spares) > MAX_SPARES:
        _bad(f"config: spares is no list of at most {MAX_SPARES}")
    geometries: list[Geometry | None] = []
    uuids = []
    try:
        _check_chunk(chunk_sectors, 1)
        for spare in spares:
            if spare is None:
                geometries.append(None)
                continue
            uuids.append(uuid.UUID(spare["uuid"]))
            geometry = Geometry.from_dict(spare["geometry"])
            if geometry.chunk_sectors != chunk_sectors:
                _bad("config: a spare was laid out for another chunk size")
            geometries.append(geometry)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadMetadata(f"config: {error!r}") from error
    if len(set(uuids)) != len(uuids):
        _bad("config: two spares have one UUID")
    if "replacement" in config:
        _check_replacement(config["replacement"], -(-main_sectors // chunk_sectors))
    return main_sectors, chunk_sectors, geometries


def _check_replacement(replacement: object, chunks: int) -> None:
    if not isinstance(replacement, dict) or not isinstance(replacement.get("main"), dict):
        _bad("config: replacement does not describe a new main")
    if not _is_int(replacement.get("copied"), 0, chunks):
        _bad(f"config: replacement.copied is {replacement.get('copied')!r}, not 0 to {chunks}")


def _check_extents(
    extents: tuple[Extent, ...], main_chunks: int, spares: list[Geometry | None]
) -> None:
    logical_end = 0
    for extent in extents:
        if not 1 <= extent.length <= _MAX_RUN or not 0 <= extent.flags <= 255:
            _bad(f"{extent}: length or flags out of range")
        if extent.logical < logical_end:
            _bad(f"{extent} overlaps the one before it")
        logical_end = extent.logical + extent.length
        if logical_end > main_chunks:
            _bad(f"{extent} ends outside the target's {main_chunks} chunks")
        geometry = spares[extent.spare] if 0 <= extent.spare < len(spares) else None
        if geometry is None:
            _bad(f"{extent}: there is no spare {extent.spare}")
        if not geometry.holds(extent.physical, extent.length):
            _bad(f"{extent} is outside the spare's data area or on its reserved chunks")
    physical = sorted((extent.spare, extent.physical, extent.length) for extent in extents)
    for (spare, chunk, length), (next_spare, next_chunk, _length) in zip(physical, physical[1:]):
        if spare == next_spare and chunk + length > next_chunk:
            _bad(f"chunk {next_chunk} of spare {spare} is used twice")


def spare_uuid_of(metadata: Metadata, index: int) -> uuid.UUID:
    """UUID of the spare at position `index` of the configuration."""
    return uuid.UUID(metadata.config["spares"][index]["uuid"])


def geometry_of(metadata: Metadata, index: int) -> Geometry:
    """Geometry of the spare at position `index` of the configuration."""
    return Geometry.from_dict(metadata.config["spares"][index]["geometry"])


def _header_crc(raw: bytes) -> int:
    """CRC-32 (zlib.crc32) over the header with its own four bytes taken as zero."""
    view = memoryview(raw)
    crc = zlib.crc32(bytes(4), zlib.crc32(view[:_CRC_OFFSET]))
    return zlib.crc32(view[_CRC_OFFSET + 4 : HEADER_BYTES], crc)


def pack_slot(
    metadata: Metadata, spare_uuid: uuid.UUID, spare_sectors: int, copy_index: int
) -> bytes:
    """One copy as it stands on the spare: header, body, zeros up to a whole 4 KiB block.

    Args:
        metadata: the generation.
        spare_uuid: the spare that it is written to.
        spare_sectors: the size in sectors that the spare was laid out for.
        copy_index: 0 to 6, which decides the sector.

    Raises:
        BadMetadata: the metadata is wrong or too large.
    """
    body = metadata.body
    fields: dict[str, Any] = {
        "magic": MAGIC,
        "major": MAJOR,
        "minor": MINOR,
        "header_crc": 0,
        "target_uuid": metadata.target_uuid.bytes,
        "spare_uuid": spare_uuid.bytes,
        "features": metadata.features,
        "copy_index": copy_index,
        "body_length": len(body),
        "sector": slot_sectors_of(spare_sectors)[copy_index],
        "spare_sectors": spare_sectors,
        "generation": metadata.generation,
        "timestamp_ns": metadata.timestamp_ns,
        "host_id": metadata.host_id.bytes,
        "parent_digest": metadata.parent_digest,
        "digest": metadata.digest,
        "body_crc": zlib.crc32(body),
    }
    header = bytearray(_HEADER.pack(*(fields[name] for name, _code in HEADER_FIELDS)))
    struct.pack_into("<I", header, _CRC_OFFSET, _header_crc(bytes(header)))
    return bytes(header) + body + bytes(-len(body) % HEADER_BYTES)


def unpack_header(raw: bytes, sector: int) -> Header:
    """Read and check a header.

    Args:
        raw: at least 4096 bytes.
        sector: where they were read.

    Raises:
        Invalid: with the diagnosis.
    """
    if len(raw) < HEADER_BYTES:
        raise Invalid(Diagnosis.STRUCTURE, f"{len(raw)} bytes are no header")
    if raw[: len(MAGIC)] != MAGIC:
        raise Invalid(Diagnosis.MAGIC, "not dm_remap metadata")
    values: dict[str, Any] = dict(
        zip((name for name, _code in HEADER_FIELDS), _HEADER.unpack_from(raw))
    )
    if values["header_crc"] != _header_crc(raw):
        raise Invalid(Diagnosis.HEADER_CHECKSUM, "the header does not match its checksum")
    target_uuid = uuid.UUID(bytes=values["target_uuid"])
    spare_uuid = uuid.UUID(bytes=values["spare_uuid"])
    if values["major"] > MAJOR or values["features"] & ~KNOWN_FEATURES:
        raise Invalid(
            Diagnosis.NEWER,
            f"written in format {values['major']}.{values['minor']}"
            f" with features {values['features']:#x}, newer than {MAJOR}.{MINOR}",
            target_uuid,
            spare_uuid,
        )
    header = Header(
        minor=values["minor"],
        target_uuid=target_uuid,
        spare_uuid=spare_uuid,
        copy_index=values["copy_index"],
        body_length=values["body_length"],
        sector=values["sector"],
        spare_sectors=values["spare_sectors"],
        generation=values["generation"],
        timestamp_ns=values["timestamp_ns"],
        host_id=uuid.UUID(bytes=values["host_id"]),
        parent_digest=values["parent_digest"],
        digest=values["digest"],
        body_crc=values["body_crc"],
        features=values["features"],
    )
    _check_header(header, values["major"], sector)
    return header


def _check_header(header: Header, major: int, sector: int) -> None:
    if major < MAJOR:
        raise Invalid(Diagnosis.STRUCTURE, f"format {major} never existed")
    if header.sector != sector:
        raise Invalid(
            Diagnosis.MISPLACED, f"found at sector {sector}, written for sector {header.sector}"
        )
    if not SMALLEST_FAR_SECTORS <= header.spare_sectors <= MAX_SECTORS:
        raise Invalid(Diagnosis.STRUCTURE, f"a spare cannot have {header.spare_sectors} sectors")
    slots = slot_sectors_of(header.spare_sectors)
    if header.copy_index >= COPIES or slots[header.copy_index] != sector:
        raise Invalid(
            Diagnosis.MISPLACED, f"copy {header.copy_index} does not belong at sector {sector}"
        )
    if not 1 <= header.generation <= MAX_GENERATION:
        raise Invalid(Diagnosis.SEQUENCE, f"generation {header.generation} cannot be")
    if not 0 < header.body_length <= BODY_MAX or header.body_length % 8:
        raise Invalid(Diagnosis.STRUCTURE, f"a body of {header.body_length} bytes cannot be")


def _sections(body: bytes) -> dict[int, bytes]:
    sections: dict[int, bytes] = {}
    offset = 0
    while offset < len(body):
        if len(body) - offset < _SECTION.size:
            raise ValueError(f"a section starts at byte {offset}, too near the end")
        number, length = _SECTION.unpack_from(body, offset)
        offset += _SECTION.size
        if length > len(body) - offset:
            raise ValueError(f"section {number} has {length} bytes, more than are left")
        if number in sections:
            raise ValueError(f"section {number} is there twice")
        sections[number] = body[offset : offset + length]
        offset += _round_up(length, 8)
    for number, name, size in SECTIONS:
        if number not in sections:
            raise ValueError(f"the {name} section is missing")
        if len(sections[number]) % size:
            raise ValueError(f"the {name} section has half an entry")
    return sections


def _parse_body(header: Header, body: bytes) -> Metadata:
    sections = _sections(body)
    metadata = Metadata(
        target_uuid=header.target_uuid,
        generation=header.generation,
        timestamp_ns=header.timestamp_ns,
        host_id=header.host_id,
        parent_digest=header.parent_digest,
        config=load_json(sections[SECTION_CONFIG].decode()),
        health=load_json(sections[SECTION_HEALTH].decode()),
        extents=tuple(
            Extent(
                logical=first & _MASK_48,
                length=(first >> 48) + 1,
                spare=second >> 48 & 255,
                physical=second & _MASK_48,
                flags=second >> 56,
            )
            for first, second in _EXTENT.iter_unpack(sections[SECTION_EXTENTS])
        ),
        lost=tuple(
            LostRange(entry & _MASK_48, (entry >> 48) + 1)
            for (entry,) in _LOST.iter_unpack(sections[SECTION_LOST])
        ),
        unknown_sections=tuple(
            sorted(item for item in sections.items() if item[0] not in _KNOWN_SECTIONS)
        ),
        history=tuple(_HISTORY.iter_unpack(sections[SECTION_HISTORY])),
    )
    if metadata.body != body:
        raise ValueError("the body is not in the one form that is written")
    if metadata.features != header.features:
        raise ValueError(
            f"the content has features {metadata.features:#x}, the header {header.features:#x}"
        )
    return metadata


def unpack_slot(raw: bytes, sector: int) -> Copy:
    """Read and check a whole copy.

    Args:
        raw: header and body; what follows the body is ignored.
        sector: where they were read.

    Raises:
        Invalid: with the diagnosis.
    """
    header = unpack_header(raw, sector)
    body = bytes(raw[HEADER_BYTES : HEADER_BYTES + header.body_length])
    if len(body) < header.body_length:
        raise Invalid(Diagnosis.STRUCTURE, f"{len(body)} of {header.body_length} bytes of the body")
    if zlib.crc32(body) != header.body_crc:
        raise Invalid(Diagnosis.DATA_CHECKSUM, "the body does not match its checksum")
    try:
        metadata = _parse_body(header, body)
        digest = metadata.digest
    except (BadMetadata, ValueError, RecursionError) as error:
        raise Invalid(Diagnosis.STRUCTURE, str(error)) from error
    if digest != header.digest:
        raise Invalid(Diagnosis.DATA_CHECKSUM, "the generation does not match its digest")
    return Copy(header, metadata)
