# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The on-disk format: round trips, every kind of damage, limits, and docs/format.md."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import struct
import uuid
import zlib
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dm_remap import format as fmt
from dm_remap.errors import Refused
from dm_remap.format import (
    BadMetadata,
    Diagnosis,
    Extent,
    Geometry,
    Invalid,
    LostRange,
    Metadata,
    pack_slot,
    plan_geometry,
    slot_sectors_of,
    unpack_header,
    unpack_slot,
)

DOC = Path(__file__).resolve().parents[2] / "docs" / "format.md"
SPARE_SECTORS = 1 << 18
CHUNK = 8
GEOMETRY = plan_geometry(SPARE_SECTORS, CHUNK, 1)
MAIN_SECTORS = 1 << 30
TARGET = uuid.UUID("11111111-1111-4111-8111-111111111111")
HOST = uuid.UUID("22222222-2222-4222-8222-222222222222")
SPARES = [uuid.UUID(int=0x33333333333343338333333333333300 + index) for index in range(8)]
OFFSETS = fmt.header_offsets()


def config(spares: int = 1, **more: object) -> dict[str, object]:
    return {
        "name": "disk",
        "chunk_sectors": CHUNK,
        "on_error": "fail",
        "block_sectors": 1,
        "main": {"sectors": MAIN_SECTORS, "serial": "S-1"},
        "spares": [
            {"uuid": str(SPARES[index]), "geometry": GEOMETRY.to_dict()} for index in range(spares)
        ],
        **more,
    }


def metadata(**changes: object) -> Metadata:
    first = Metadata(
        target_uuid=TARGET,
        generation=1,
        timestamp_ns=1_700_000_000_000_000_000,
        host_id=HOST,
        parent_digest=fmt.NO_DIGEST,
        config=config(),
        health={"score": 97.5},
        extents=(Extent(10, 3, 0, 5), Extent(20, 1, 0, 0, flags=129)),
        lost=(LostRange(80, 1), LostRange(90, 100)),
    )
    return dataclasses.replace(first, **changes)


def pack(what: Metadata, copy_index: int = 0) -> bytes:
    return pack_slot(what, SPARES[0], SPARE_SECTORS, copy_index)


def sealed(raw: bytes, body: bytes | None = None, **fields: object) -> bytes:
    """A slot with other header fields or another body, under checksums and a digest that match."""
    codes = dict(fmt.HEADER_FIELDS)
    header = bytearray(raw[: fmt.HEADER_BYTES])
    if body is None:
        body = raw[fmt.HEADER_BYTES : fmt.HEADER_BYTES + unpack_header(raw, 0).body_length]
    else:
        fields = {"body_length": len(body), **fields}
    for name, value in {"body_crc": zlib.crc32(body), **fields}.items():
        struct.pack_into("<" + codes[name], header, OFFSETS[name], value)
    if "digest" not in fields:
        parts = [
            bytes(header[OFFSETS[name] : OFFSETS[name] + struct.calcsize("<" + codes[name])])
            for name in ("target_uuid", "host_id", "generation", "timestamp_ns", "parent_digest")
        ]
        head = fmt.MAGIC + struct.pack("<HQ", 1, 0) + b"".join(parts)
        digest = hashlib.sha256(head + body).digest()
        struct.pack_into("<32s", header, OFFSETS["digest"], digest)
    struct.pack_into("<I", header, OFFSETS["header_crc"], 0)
    struct.pack_into("<I", header, OFFSETS["header_crc"], zlib.crc32(bytes(header)))
    return bytes(header) + body


def section(number: int, payload: bytes, padding: bytes | None = None) -> bytes:
    if padding is None:
        padding = bytes(-len(payload) % 8)
    return struct.pack("<II", number, len(payload)) + payload + padding


def body_of(**payloads: bytes) -> bytes:
    """A body with some sections replaced by other bytes."""
    what = metadata(extents=(), lost=())
    parts = {
        "config": json.dumps(what.config, sort_keys=True, separators=(",", ":")).encode(),
        "health": b"{}",
        "extents": b"",
        "lost": b"",
        "history": b"",
        **payloads,
    }
    return b"".join(section(number, parts[name]) for number, name, _size in fmt.SECTIONS)


def diagnosis_of(raw: bytes, sector: int = 0) -> Diagnosis:
    with pytest.raises(Invalid) as caught:
        unpack_slot(raw, sector)
    return caught.value.diagnosis


def wrong_body(body: bytes) -> str:
    with pytest.raises(Invalid) as caught:
        unpack_slot(sealed(pack(metadata()), body), 0)
    assert caught.value.diagnosis is Diagnosis.STRUCTURE
    return str(caught.value)


# Strategies

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=8), inner, max_size=3
        )
    ),
    max_leaves=8,
)
json_objects = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8), json_values, max_size=4
)


@st.composite
def some_extents(draw: st.DrawFn) -> tuple[Extent, ...]:
    reserved = GEOMETRY.reserved_chunks
    extents = []
    logical = physical = 0
    for gap, length, hole, flags in draw(
        st.lists(
            st.tuples(
                st.integers(0, 1 << 20), st.integers(1, 50), st.integers(0, 9), st.integers(0, 255)
            ),
            max_size=20,
        )
    ):
        logical += gap
        physical += hole
        if physical < reserved.stop and physical + length > reserved.start:
            physical = reserved.stop
        extents.append(Extent(logical, length, 0, physical, flags))
        logical += length
        physical += length
    return tuple(extents)


some_lost = st.lists(
    st.builds(LostRange, st.integers(0, MAIN_SECTORS - 200_000), st.integers(1, 200_000)),
    max_size=10,
).map(tuple)
uuids = st.uuids()


@st.composite
def some_metadata(draw: st.DrawFn) -> Metadata:
    generation = draw(st.integers(1, fmt.MAX_GENERATION))
    depth = draw(st.integers(0, min(4, generation - 1)))
    history = tuple(
        (generation - 1 - step, draw(st.binary(min_size=8, max_size=8))) for step in range(depth)
    )
    parent = (history[0][1] if history else b"") + draw(st.binary(min_size=32, max_size=32))
    return Metadata(
        target_uuid=draw(uuids),
        generation=generation,
        timestamp_ns=draw(st.integers(0, 2**64 - 1)),
        host_id=draw(uuids),
        parent_digest=parent[:32],
        config={**draw(json_objects), **config()},
        health=draw(json_objects),
        extents=draw(some_extents()),
        lost=draw(some_lost),
        unknown_sections=tuple(
            sorted(
                draw(
                    st.dictionaries(st.integers(6, 2**32 - 1), st.binary(max_size=20), max_size=3)
                ).items()
            )
        ),
        history=history,
    )


# Round trips


@given(some_metadata(), st.integers(0, 6), uuids)
def test_what_is_packed_is_unpacked(what: Metadata, index: int, spare: uuid.UUID) -> None:
    raw = pack_slot(what, spare, SPARE_SECTORS, index)
    sector = slot_sectors_of(SPARE_SECTORS)[index]
    copy = unpack_slot(raw, sector)
    assert copy.metadata == what
    assert copy.metadata.digest == what.digest == copy.header.digest
    assert (copy.header.spare_uuid, copy.header.copy_index) == (spare, index)
    assert (copy.header.sector, copy.header.spare_sectors) == (sector, SPARE_SECTORS)
    assert len(raw) % fmt.HEADER_BYTES == 0
    assert len(raw) == copy.header.slot_bytes
    assert pack_slot(copy.metadata, spare, SPARE_SECTORS, index) == raw


@given(st.lists(st.builds(LostRange, st.integers(0, 300), st.integers(1, 60))))
def test_lost_ranges_are_a_set_of_sectors(ranges: list[LostRange]) -> None:
    kept = metadata(lost=tuple(ranges)).lost
    sectors = [sector for lost in kept for sector in range(lost.sector, lost.sector + lost.count)]
    assert sectors == sorted(
        {sector for lost in ranges for sector in range(lost.sector, lost.sector + lost.count)}
    )
    assert all(a.sector + a.count < b.sector for a, b in zip(kept, kept[1:]))


@pytest.mark.parametrize("count", [1, 65535, 65536, 65537, 131072, 1_000_000])
def test_long_lost_ranges_are_split_on_disk_and_whole_in_memory(count: int) -> None:
    what = metadata(lost=(LostRange(7, count),))
    assert unpack_slot(pack(what), 0).metadata.lost == (LostRange(7, count),)


def test_the_largest_numbers_fit() -> None:
    top = (2**48 - 1) // CHUNK * CHUNK
    big = config()
    big["main"] = {"sectors": 2**48 - 1}
    what = metadata(
        config=big,
        timestamp_ns=2**64 - 1,
        generation=fmt.MAX_GENERATION,
        parent_digest=b"\xff" * 32,
        extents=(Extent(0, 600, 0, 0), Extent(top // CHUNK, 1, 0, 700, 255)),
        lost=(LostRange(2**48 - 2, 1),),
    )
    assert unpack_slot(pack(what), 0).metadata == what
    with pytest.raises(BadMetadata):
        _unused = what.successor(timestamp_ns=1).body


def full_config() -> dict[str, object]:
    identity = {"serial": "s" * 20, "wwn": "w" * 18, "model": "m" * 40}
    eight = config(spares=8)
    eight["main"] = {"sectors": MAIN_SECTORS, **identity}
    eight["spares"] = [{**spare, **identity} for spare in eight["spares"]]  # type: ignore[attr-defined]
    return eight


def full(extents: int, lost: int) -> Metadata:
    history = tuple((generation, bytes(8)) for generation in range(999, 999 - fmt.MAX_HISTORY, -1))
    return metadata(
        generation=1000,
        config=full_config(),
        history=history,
        extents=tuple(Extent(i * 2, 1, i % 8, i // 8 * 2) for i in range(extents)),
        lost=tuple(LostRange(i * 3, 1) for i in range(lost)),
    )


def test_sixteen_thousand_extents_and_lost_ranges_fit_with_eight_spares() -> None:
    what = full(16384, 16384)
    copy = unpack_slot(pack(what), 0)
    assert copy.metadata == what
    assert len(what.body) < fmt.BODY_MAX - 100 * 1024


def test_too_much_is_refused_and_never_cut() -> None:
    with pytest.raises(BadMetadata, match=r"needs \d+ bytes and a copy holds 520192.*replace"):
        pack(full(16384, 40000))


def test_the_longest_body_fills_the_slot() -> None:
    spare_room = fmt.BODY_MAX - len(metadata().body) - 8
    what = metadata(unknown_sections=((77, b"x" * spare_room),))
    raw = pack(what)
    assert len(raw) == fmt.SLOT_SECTORS * fmt.SECTOR_BYTES
    assert unpack_slot(raw, 0).metadata == what
    with pytest.raises(BadMetadata, match="copy holds"):
        pack(metadata(unknown_sections=((77, b"x" * (spare_room + 1)),)))


# Damage


def judged(raw: bytes, sector: int) -> Diagnosis | None:
    try:
        unpack_slot(raw, sector)
    except Invalid as error:
        return error.diagnosis
    return None


def test_every_single_bit_flip_is_detected() -> None:
    raw = bytearray(pack(metadata(), 3))
    sector = slot_sectors_of(SPARE_SECTORS)[3]
    header_bits = fmt.HEADER_BYTES * 8
    body_bits = unpack_header(bytes(raw), sector).body_length * 8
    found = []
    for bit in range(header_bits + body_bits):
        raw[bit // 8] ^= 1 << bit % 8
        found.append(judged(bytes(raw), sector))
        raw[bit // 8] ^= 1 << bit % 8
    assert found == (
        [Diagnosis.MAGIC] * 64
        + [Diagnosis.HEADER_CHECKSUM] * (header_bits - 64)
        + [Diagnosis.DATA_CHECKSUM] * body_bits
    )
    assert judged(bytes(raw), sector) is None


@given(some_metadata(), st.data())
def test_a_bit_flip_in_any_metadata_is_detected(what: Metadata, data: st.DataObject) -> None:
    raw = bytearray(pack(what))
    used = fmt.HEADER_BYTES + len(what.body)
    bit = data.draw(st.integers(0, used * 8 - 1))
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Invalid):
        unpack_slot(bytes(raw), 0)


@given(st.binary(max_size=9000), st.integers(0, 1 << 40))
def test_arbitrary_bytes_are_only_ever_invalid(raw: bytes, sector: int) -> None:
    for candidate in (raw, fmt.MAGIC + raw, fmt.MAGIC + raw.ljust(fmt.HEADER_BYTES, b"\0")):
        with pytest.raises(Invalid):
            unpack_slot(candidate, sector)


def accepted_only_whole(raw: bytes) -> None:
    """Bytes under right checksums are refused, or are exactly what packing gives."""
    try:
        copy = unpack_slot(raw, 0)
    except Invalid:
        return
    assert (
        pack_slot(copy.metadata, copy.header.spare_uuid, copy.header.spare_sectors, 0)[
            fmt.HEADER_BYTES : len(raw)
        ]
        == (raw[fmt.HEADER_BYTES :])
    )


@given(st.lists(st.tuples(st.integers(0, 8), st.binary(max_size=40)), max_size=8))
def test_arbitrary_sections_never_crash_the_reader(parts: list[tuple[int, bytes]]) -> None:
    accepted_only_whole(sealed(pack(metadata()), b"".join(section(*part) for part in parts)))


@given(st.data())
def test_changed_bodies_under_right_checksums_never_crash_the_reader(data: st.DataObject) -> None:
    body = bytearray(metadata().body)
    for _unused in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at] = data.draw(st.integers(0, 255))
    accepted_only_whole(sealed(pack(metadata()), bytes(body)))


@given(
    name=st.sampled_from(["config", "health"]),
    text=st.text('{}[]":,0123456789.eE+-truefalsn \\u', max_size=30).map(str.encode)
    | st.binary(max_size=30),
)
def test_arbitrary_json_never_crashes_the_reader(name: str, text: bytes) -> None:
    accepted_only_whole(sealed(pack(metadata()), body_of(**{name: text})))


@given(
    st.dictionaries(
        st.sampled_from(
            ["body_length", "copy_index", "sector", "spare_sectors", "generation", "timestamp_ns"]
        ),
        st.sampled_from([0, 1, 7, 8, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1),
    )
)
def test_arbitrary_headers_under_right_checksums_never_crash(fields: dict[str, int]) -> None:
    raw = sealed(pack(metadata()), None, **fields)
    assume(raw[: fmt.HEADER_BYTES] != pack(metadata())[: fmt.HEADER_BYTES])
    accepted_only_whole(raw)


@pytest.mark.parametrize(
    ("fields", "diagnosis"),
    [
        ({"major": 0}, Diagnosis.STRUCTURE),
        ({"major": 2}, Diagnosis.NEWER),
        ({"major": 65535}, Diagnosis.NEWER),
        ({"features": 1}, Diagnosis.STRUCTURE),
        ({"features": 2}, Diagnosis.NEWER),
        ({"features": 3}, Diagnosis.NEWER),
        ({"features": 2**63}, Diagnosis.NEWER),
        ({"sector": 1024}, Diagnosis.MISPLACED),
        ({"copy_index": 1}, Diagnosis.MISPLACED),
        ({"copy_index": 7}, Diagnosis.MISPLACED),
        ({"copy_index": 2**32 - 1}, Diagnosis.MISPLACED),
        ({"generation": 0}, Diagnosis.SEQUENCE),
        ({"generation": 2**63}, Diagnosis.SEQUENCE),
        ({"generation": 2**64 - 1}, Diagnosis.SEQUENCE),
        ({"body_length": 0}, Diagnosis.STRUCTURE),
        ({"body_length": 12}, Diagnosis.STRUCTURE),
        ({"body_length": fmt.BODY_MAX + 8}, Diagnosis.STRUCTURE),
        ({"body_length": 2**32 - 8}, Diagnosis.STRUCTURE),
        ({"body_length": fmt.BODY_MAX}, Diagnosis.STRUCTURE),
        ({"spare_sectors": 0}, Diagnosis.STRUCTURE),
        ({"spare_sectors": 32767}, Diagnosis.STRUCTURE),
        ({"spare_sectors": 2**64 - 1}, Diagnosis.STRUCTURE),
        ({"digest": bytes(32)}, Diagnosis.DATA_CHECKSUM),
        ({"body_crc": 0}, Diagnosis.DATA_CHECKSUM),
    ],
)
def test_headers_that_cannot_be_are_told_apart(
    fields: dict[str, object], diagnosis: Diagnosis
) -> None:
    assert diagnosis_of(sealed(pack(metadata()), None, **fields)) is diagnosis


def test_a_copy_in_another_place_is_misplaced() -> None:
    raw = pack(metadata(), 1)
    assert unpack_slot(raw, 1024).metadata == metadata()
    assert diagnosis_of(raw, 0) is Diagnosis.MISPLACED
    assert diagnosis_of(pack(metadata(), 6), 1024) is Diagnosis.MISPLACED


def test_a_copy_of_a_newer_format_names_its_spare() -> None:
    with pytest.raises(Invalid, match=r"format 2\.0 .*newer than 1\.0") as caught:
        unpack_slot(sealed(pack(metadata()), None, major=2), 0)
    assert (caught.value.target_uuid, caught.value.spare_uuid) == (TARGET, SPARES[0])


def test_a_newer_minor_version_is_read_and_its_header_fields_are_ignored() -> None:
    raw = bytearray(sealed(pack(metadata()), None, minor=9))
    raw[4000:4008] = b"newer..."
    struct.pack_into("<I", raw, OFFSETS["header_crc"], 0)
    struct.pack_into("<I", raw, OFFSETS["header_crc"], zlib.crc32(raw[: fmt.HEADER_BYTES]))
    copy = unpack_slot(bytes(raw), 0)
    assert copy.metadata == metadata()
    assert copy.header.minor == 9


def test_short_reads_are_invalid() -> None:
    raw = pack(metadata())
    assert diagnosis_of(b"") is Diagnosis.STRUCTURE
    assert diagnosis_of(raw[:4095]) is Diagnosis.STRUCTURE
    assert diagnosis_of(raw[:4096]) is Diagnosis.STRUCTURE
    assert diagnosis_of(raw[:4200]) is Diagnosis.STRUCTURE


def test_zeros_are_no_metadata() -> None:
    assert diagnosis_of(bytes(8192)) is Diagnosis.MAGIC


# Bodies that are wrong under right checksums

JSON = metadata().config


def text_of(value: object, **options: object) -> bytes:
    return json.dumps(value, **options).encode()


def test_the_helper_makes_bodies_that_are_read() -> None:
    raw = sealed(pack(metadata()), body_of())
    assert unpack_slot(raw, 0).metadata == metadata(extents=(), lost=(), health={})


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"3",
        b"null",
        b'"{}"',
        b"{",
        b"{} ",
        b" {}",
        b'{"a": 1}',
        b'{"b":1,"a":1}',
        b'{"a":1,"a":1}',
        b'{"a":1,"a":2}',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":1e999}',
        b'{"a":1E2}',
        b'{"a":100000000000000000000000}',
        b'{"a":"\\ud800"}',
        b'{"a":"\\u0061"}',
        b'{"a":"\xff"}',
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"a":"' + b"[" * 60_000,
        b"[" * 100_000,
    ],
)
def test_json_that_is_not_canonical_or_no_object_is_refused(text: bytes) -> None:
    wrong_body(body_of(health=text))


def changed_config(**changes: object) -> bytes:
    return text_of({**config(), **changes}, sort_keys=True, separators=(",", ":"))


@pytest.mark.parametrize(
    "changes",
    [
        {"main": None},
        {"main": {}},
        {"main": {"sectors": 0}},
        {"main": {"sectors": 2**48}},
        {"main": {"sectors": 64.5}},
        {"main": {"sectors": True}},
        {"chunk_sectors": 0},
        {"chunk_sectors": 24},
        {"chunk_sectors": 4096},
        {"chunk_sectors": 16},
        {"chunk_sectors": "8"},
        {"chunk_sectors": None},
        {"spares": None},
        {"spares": {}},
        {"spares": [None] * 9},
        {"spares": [7]},
        {"spares": [{}]},
        {"spares": [{"uuid": "x", "geometry": GEOMETRY.to_dict()}]},
        {"spares": [{"uuid": 5, "geometry": GEOMETRY.to_dict()}]},
        {"spares": [{"uuid": str(TARGET), "geometry": {}}]},
        {"spares": [{"uuid": str(TARGET), "geometry": []}]},
        {"spares": [config()["spares"][0]] * 2},  # type: ignore[index]
        {
            "spares": [
                {"uuid": str(TARGET), "geometry": {**GEOMETRY.to_dict(), "data_start": 2**60}}
            ]
        },
        {"spares": [{"uuid": str(TARGET), "geometry": {**GEOMETRY.to_dict(), "far_end": 2**17}}]},
        {
            "spares": [
                {"uuid": str(TARGET), "geometry": {**GEOMETRY.to_dict(), "data_sectors": 2**18}}
            ]
        },
    ],
)
def test_a_configuration_that_places_nothing_is_refused(changes: dict[str, object]) -> None:
    wrong_body(body_of(config=changed_config(**changes)))


def packed(*extents: tuple[int, int, int, int, int]) -> bytes:
    """Extents as (logical, length, spare, physical, flags), without any check."""
    return b"".join(
        struct.pack("<QQ", logical | (length - 1) << 48, physical | spare << 48 | flags << 56)
        for logical, length, spare, physical, flags in extents
    )


RESERVED = GEOMETRY.reserved_chunks


@pytest.mark.parametrize(
    ("extents", "reason"),
    [
        ([(5, 1, 0, 0, 0), (4, 1, 0, 1, 0)], "one form"),
        ([(5, 2, 0, 0, 0), (6, 1, 0, 9, 0)], "overlaps"),
        ([(5, 1, 0, 0, 0), (5, 1, 0, 9, 0)], "overlaps"),
        ([(5, 1, 1, 0, 0)], "no spare 1"),
        ([(5, 1, 255, 0, 0)], "no spare 255"),
        ([(5, 1, 0, GEOMETRY.chunks, 0)], "data area"),
        ([(5, 2, 0, GEOMETRY.chunks - 1, 0)], "data area"),
        ([(5, 1, 0, 2**48 - 1, 0)], "data area"),
        ([(5, 1, 0, RESERVED.start, 0)], "reserved"),
        ([(5, 1, 0, RESERVED.stop - 1, 0)], "reserved"),
        ([(5, 2, 0, RESERVED.start - 1, 0)], "reserved"),
        ([(5, 65536, 0, 0, 0)], "reserved"),
        ([(5, 2, 0, 0, 0), (9, 1, 0, 1, 0)], "used twice"),
        ([(MAIN_SECTORS // CHUNK, 1, 0, 0, 0)], "outside the target"),
        ([(2**48 - 1, 65536, 0, 0, 0)], "outside the target"),
    ],
)
def test_extents_that_point_nowhere_are_refused(
    extents: list[tuple[int, int, int, int, int]], reason: str
) -> None:
    assert reason in wrong_body(body_of(extents=packed(*extents)))


@pytest.mark.parametrize(
    "extents",
    [
        [Extent(5, 0, 0, 0)],
        [Extent(5, 65537, 0, 0)],
        [Extent(-1, 1, 0, 0)],
        [Extent(5, 1, -1, 0)],
        [Extent(5, 1, 0, -1)],
        [Extent(5, 1, 0, 0, 256)],
        [Extent(5, 1, 0, 0, -1)],
        [Extent(5, 2, 0, 0), Extent(6, 1, 0, 5)],
        [Extent(5, 1, 0, 0), Extent(6, 1, 0, 0)],
    ],
)
def test_what_could_not_be_read_back_is_not_written(extents: list[Extent]) -> None:
    with pytest.raises(BadMetadata):
        pack(metadata(extents=tuple(extents)))


def test_the_chunks_beside_the_reserved_ones_are_used() -> None:
    what = metadata(
        extents=(
            Extent(0, 2, 0, RESERVED.start - 2),
            Extent(2, 1, 0, RESERVED.stop),
            Extent(MAIN_SECTORS // CHUNK - 1, 1, 0, GEOMETRY.chunks - 1),
        )
    )
    assert unpack_slot(pack(what), 0).metadata == what


def test_the_last_chunk_of_a_main_may_be_partial() -> None:
    odd = config()
    odd["main"] = {"sectors": 801}
    what = metadata(config=odd, extents=(Extent(100, 1, 0, 0),), lost=(LostRange(800, 1),))
    assert unpack_slot(pack(what), 0).metadata == what
    with pytest.raises(BadMetadata):
        pack(dataclasses.replace(what, extents=(Extent(101, 1, 0, 0),)))
    with pytest.raises(BadMetadata):
        pack(dataclasses.replace(what, lost=(LostRange(801, 1),)))


def test_a_gap_in_the_list_of_spares_keeps_positions() -> None:
    gap = config(spares=2)
    gap["spares"][0] = None  # type: ignore[index]
    what = metadata(config=gap, extents=(Extent(5, 1, 1, 0),))
    assert unpack_slot(pack(what), 0).metadata == what
    with pytest.raises(BadMetadata, match="no spare 0"):
        pack(metadata(config=gap, extents=(Extent(5, 1, 0, 0),)))


@pytest.mark.parametrize(
    "entries",
    [
        [(5, 1), (6, 1)],
        [(6, 1), (2, 1)],
        [(5, 3), (6, 1)],
        [(0, 65535), (65535, 1)],
        [(MAIN_SECTORS, 1)],
        [(2**48 - 1, 65536)],
    ],
)
def test_lost_ranges_in_another_form_or_outside_are_refused(
    entries: list[tuple[int, int]],
) -> None:
    raw = b"".join(struct.pack("<Q", sector | (count - 1) << 48) for sector, count in entries)
    wrong_body(body_of(lost=raw))


@pytest.mark.parametrize("lost", [LostRange(5, 0), LostRange(-1, 2), LostRange(5, -3)])
def test_impossible_lost_ranges_are_not_written(lost: LostRange) -> None:
    with pytest.raises(BadMetadata):
        pack(metadata(lost=(LostRange(1, 10), lost)))


def sections_but(**changes: bytes) -> list[bytes]:
    body = body_of()
    parts = []
    offset = 0
    while offset < len(body):
        _number, length = struct.unpack_from("<II", body, offset)
        size = 8 + length + -length % 8
        parts.append(body[offset : offset + size])
        offset += size
    return parts


def test_sections_out_of_order_twice_missing_or_running_out_are_refused() -> None:
    parts = sections_but()
    assert "one form" in wrong_body(b"".join(reversed(parts)))
    for number, part in enumerate(parts):
        assert "missing" in wrong_body(b"".join(parts[:number] + parts[number + 1 :]))
        assert "twice" in wrong_body(b"".join([*parts, part]))
    assert "twice" in wrong_body(b"".join([*parts, section(9, b"a"), section(9, b"a")]))
    assert "one form" in wrong_body(b"".join([section(9, b"a"), *parts]))
    assert "one form" in wrong_body(b"".join([*parts, section(9, b"a", b"\1" * 7)]))
    assert "more than are left" in wrong_body(b"".join(parts) + struct.pack("<II", 9, 1))
    assert "more than are left" in wrong_body(b"".join(parts) + struct.pack("<II", 9, 2**32 - 1))
    assert "rising" in wrong_body(b"".join([section(0, b""), *parts]))
    wrong_body(bytes(8))


@pytest.mark.parametrize(("name", "size"), [("extents", 8), ("lost", 4), ("history", 8)])
def test_half_an_entry_is_refused(name: str, size: int) -> None:
    assert "half an entry" in wrong_body(body_of(**{name: bytes(size)}))


def test_a_section_cannot_lean_on_padding_that_is_not_there() -> None:
    last = struct.pack("<II", 9, 3) + b"abc"
    body = body_of() + last
    assert diagnosis_of(sealed(pack(metadata()), body)) is Diagnosis.STRUCTURE


@pytest.mark.parametrize(
    "history",
    [
        ((5, bytes(8)),),
        ((4, bytes(8)), (4, bytes(8))),
        ((3, bytes(8)), (4, bytes(8))),
        ((4, bytes(8)), (0, bytes(8))),
        ((4, bytes(7)),),
        ((4, b"not this"),),
        tuple((generation, bytes(8)) for generation in range(900, 600, -1)),
    ],
)
def test_a_history_that_cannot_be_is_not_written(history: tuple[tuple[int, bytes], ...]) -> None:
    generation = 901 if len(history) > 200 else 5
    with pytest.raises(BadMetadata):
        pack(metadata(generation=generation, history=history))


@pytest.mark.parametrize(
    "health",
    [
        {"a": (1, 2)},
        {1: 2},
        {"a": float("nan")},
        {"a": {1}},
        {"a": b"x"},
        {"a": 10**30},
        {"a": "\ud800"},
        [],
        None,
    ],
)
def test_json_that_would_come_back_different_is_not_written(health: object) -> None:
    with pytest.raises(BadMetadata):
        pack(metadata(health=health))


@pytest.mark.parametrize(
    "changes",
    [
        {"generation": 0},
        {"generation": -1},
        {"generation": 2**63},
        {"timestamp_ns": -1},
        {"timestamp_ns": 2**64},
        {"parent_digest": b""},
        {"unknown_sections": ((3, b""),)},
        {"unknown_sections": ((0, b""),)},
        {"unknown_sections": ((9, b""), (8, b""))},
        {"unknown_sections": ((9, b""), (9, b""))},
        {"unknown_sections": ((2**32, b""),)},
    ],
)
def test_fields_out_of_range_are_not_written(changes: dict[str, object]) -> None:
    with pytest.raises(BadMetadata):
        pack(metadata(**changes))


# Generations


def test_a_successor_is_chained_to_its_parent_and_keeps_what_it_does_not_know() -> None:
    newer = unpack_slot(
        pack(
            metadata(
                config={**config(), "later": {"deep": [1]}},
                health={"also": None},
                unknown_sections=((9, b"later"),),
                extents=(Extent(1, 1, 0, 1, flags=0xA5),),
            )
        ),
        0,
    ).metadata
    child = newer.successor(timestamp_ns=5, extents=(*newer.extents, Extent(9, 1, 0, 9)))
    child = unpack_slot(pack(child), 0).metadata
    assert child.generation == 2
    assert child.timestamp_ns == 5
    assert child.parent_digest == newer.digest
    assert child.history == ((1, newer.digest[:8]),)
    assert child.config["later"] == {"deep": [1]}
    assert child.health == {"also": None}
    assert child.unknown_sections == ((9, b"later"),)
    assert child.extents[0].flags == 0xA5


def test_the_history_holds_the_last_256_generations() -> None:
    digests = []
    what = metadata()
    for _unused in range(fmt.MAX_HISTORY + 5):
        digests.append((what.generation, what.digest[:8]))
        what = what.successor(timestamp_ns=1)
    assert what.history == tuple(reversed(digests[5:]))
    assert unpack_slot(pack(what), 0).metadata == what


def test_the_digest_is_one_for_all_copies_and_spares_and_covers_every_field() -> None:
    what = metadata(generation=5, history=((4, bytes(8)),))
    seen = {
        unpack_header(pack_slot(what, spare, size, index), slot_sectors_of(size)[index]).digest
        for spare in SPARES
        for size in (SPARE_SECTORS, SPARE_SECTORS * 2 + 7)
        for index in range(7)
    }
    assert seen == {what.digest}
    others = [
        dataclasses.replace(what, **change)
        for change in (
            {"target_uuid": HOST},
            {"host_id": TARGET},
            {"generation": 6},
            {"timestamp_ns": 0},
            {"parent_digest": bytes(31) + b"\1"},
            {"config": {**config(), "name": "other"}},
            {"health": {}},
            {"extents": ()},
            {"lost": ()},
            {"unknown_sections": ((9, b""),)},
            {"history": ()},
        )
    ]
    assert len({what.digest, *(other.digest for other in others)}) == len(others) + 1


# Geometry

sizes = st.integers(32768, 1 << 36) | st.integers(32768, 200_000)
chunks = st.sampled_from([8, 16, 128, 1024, 2048])
blocks = st.sampled_from([1, 8])


def kernel_meta_sectors(data_sectors: int, journal_sectors: int, block_sectors: int) -> int:
    """What dm-integrity needs on its meta device (drivers/md/dm-integrity.c, crc32c, mode J)."""
    entry = -(-(8 + 8 * block_sectors + 4) // 8) * 8
    section_entries = (512 - 8) // entry * 8
    section_sectors = section_entries * block_sectors + 8
    journal = max(journal_sectors // section_sectors, 1) * section_sectors
    tag_bytes = data_sectors // block_sectors * 4
    return 8 + journal + -(-tag_bytes // 65536) * 128


@given(sizes, chunks, blocks)
def test_nothing_on_a_spare_overlaps(sectors: int, chunk: int, block: int) -> None:
    try:
        geometry = plan_geometry(sectors, chunk, block)
    except Refused:
        assert sectors < fmt.minimum_spare_sectors(chunk, block)
        return
    reserved = geometry.reserved_chunks
    areas = [
        *((sector, sector + fmt.SLOT_SECTORS) for sector in slot_sectors_of(geometry)),
        (geometry.tag_start, geometry.tag_start + geometry.tag_sectors),
        (geometry.chunk_sector(0), geometry.chunk_sector(reserved.start)),
        (geometry.chunk_sector(reserved.stop), geometry.chunk_sector(geometry.chunks)),
    ]
    areas = sorted(area for area in areas if area[0] != area[1])
    assert all(end <= start for (_s, end), (start, _e) in zip(areas, areas[1:]))
    assert areas[0][0] == 0
    assert areas[-1][1] <= sectors
    assert geometry.data_start % 2048 == 0
    assert geometry.usable_chunks == sum(geometry.holds(c) for c in _some(geometry.chunks))
    assert Geometry.from_dict(geometry.to_dict()) == geometry
    assert Geometry.from_dict({**geometry.to_dict(), "later": [1]}) == geometry
    needed = kernel_meta_sectors(geometry.data_sectors, geometry.journal_sectors, block)
    assert needed <= geometry.tag_sectors


def _some(count: int) -> range:
    """All chunk numbers, where counting them is quick."""
    assume(count <= 20_000)
    return range(-2, count + 2)


@given(st.integers(1 << 20, 1 << 40), chunks, blocks)
def test_a_large_spare_is_nearly_all_data(sectors: int, chunk: int, block: int) -> None:
    geometry = plan_geometry(sectors, chunk, block)
    reserved = len(geometry.reserved_chunks) * chunk
    assert reserved <= 1024 + 2 * max(chunk, 1024)
    assert geometry.usable_chunks * chunk > sectors * 0.95
    needed = kernel_meta_sectors(geometry.data_sectors, geometry.journal_sectors, block)
    assert needed <= geometry.tag_sectors <= needed + needed // 50 + 3000


@pytest.mark.parametrize("chunk", [8, 2048])
@pytest.mark.parametrize("block", [1, 8])
def test_the_smallest_spare(chunk: int, block: int) -> None:
    needed = fmt.minimum_spare_sectors(chunk, block)
    assert plan_geometry(needed, chunk, block).usable_chunks > 0
    with pytest.raises(Refused, match=f"too few; use one of at least {needed} sectors"):
        plan_geometry(needed - 1, chunk, block)


@pytest.mark.parametrize("sectors", [-1, 0, 1, 32767])
def test_a_tiny_spare_is_refused(sectors: int) -> None:
    with pytest.raises(Refused, match="too few"):
        plan_geometry(sectors, 128, 1)


def test_an_impossible_spare_is_refused() -> None:
    with pytest.raises(Refused, match="more than"):
        plan_geometry(2**55 + 1, 128, 1)
    assert plan_geometry(2**55, 2048, 8).usable_chunks < 2**48


@pytest.mark.parametrize(("chunk", "block"), [(4, 1), (100, 1), (4096, 1), (0, 1), (128, 2)])
def test_chunks_and_blocks_out_of_range_are_refused(chunk: int, block: int) -> None:
    with pytest.raises(ValueError, match="sectors is"):
        plan_geometry(1 << 20, chunk, block)


@pytest.mark.parametrize(
    "change",
    [
        {"tag_start": 0},
        {"tag_sectors": 1 << 19},
        {"journal_sectors": 1 << 19},
        {"data_start": GEOMETRY.far_middle + 8},
        {"data_sectors": GEOMETRY.data_sectors + 2048},
        {"data_sectors": GEOMETRY.data_sectors - 1},
        {"data_sectors": 0},
        {"far_middle": GEOMETRY.far_middle + 1024},
        {"far_end": GEOMETRY.far_end - 1024},
        {"spare_sectors": 100},
        {"chunk_sectors": 7},
        {"block_sectors": 3},
        {"block_sectors": True},
        {"far_end": None},
        {"far_end": "1"},
        {"far_end": -1},
        {"far_end": 1.0},
    ],
)
def test_a_geometry_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="."):
        Geometry.from_dict({**GEOMETRY.to_dict(), **change})


# The document


def rows_after(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading of docs/format.md, without markup."""
    text = DOC.read_text(encoding="utf-8").split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    table = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert table
    rows = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in table[0].splitlines()
    ]
    return rows[2:]


def number(cell: str) -> int:
    return int(cell.replace(",", ""))


def test_the_document_has_every_header_offset() -> None:
    documented = [(number(row[0]), number(row[1]), row[2]) for row in rows_after("Header")]
    assert documented[:-1] == [
        (OFFSETS[name], struct.calcsize("<" + code), name) for name, code in fmt.HEADER_FIELDS
    ]
    offset, size, name = documented[-1]
    assert (offset, name) == (documented[-2][0] + documented[-2][1], "reserved")
    assert offset + size == fmt.HEADER_BYTES


def test_the_document_has_every_section() -> None:
    documented = [(number(row[0]), row[1], number(row[2])) for row in rows_after("Body")]
    assert documented == list(fmt.SECTIONS)


def test_the_document_has_every_copy() -> None:
    documented = [number(row[1]) for row in rows_after("Copies")[:5]]
    assert tuple(documented) == fmt.NEAR_SECTORS


def test_the_document_has_every_diagnosis() -> None:
    assert [row[0] for row in rows_after("Diagnoses")] == [kind.value for kind in Diagnosis]


def test_the_document_shows_real_geometries() -> None:
    names = (
        "spare_sectors chunk_sectors block_sectors journal_sectors tag_start tag_sectors data_start"
        " data_sectors far_middle far_end"
    ).split()
    rows = rows_after("Layout of a spare")
    assert len(rows) >= 4
    for row in rows:
        cells = [number(cell) for cell in row]
        geometry = plan_geometry(*cells[:3])
        assert cells[:10] == [getattr(geometry, name) for name in names]
        assert cells[10] == geometry.usable_chunks
