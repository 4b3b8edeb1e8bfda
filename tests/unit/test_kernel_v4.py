# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is read from spares of the kernel target dm-remap-v4, and every way in which it is wrong."""

from __future__ import annotations

import contextlib
import itertools
import lzma
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dm_remap import kernel_v4
from dm_remap.errors import Refused
from dm_remap.format import Diagnosis, Invalid
from dm_remap.kernel_v4 import KernelMetadata, Remap, choose, survey, unpack
from tests import old_spare
from tests.old_spare import ACTIVE, PENDING, Entry, Old
from tests.unit.copy_scene import Disk

SAMPLE = (
    Path(__file__).resolve().parents[3]
    / "shared"
    / "data"
    / "kernel_dm_remap_v4_spare.first_1MiB.xz"
)
OLD = Old(524288, 131072, [Entry(1000, 4100), Entry(2000, 4101, PENDING), Entry(77777, 5000)])
PACKED = OLD.pack()
# The sectors of a spare that is a little longer than its metadata.
SECTORS = 2000

entries = st.builds(
    Entry,
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**16 - 1),
    st.integers(0, 2**32 - 1),
)


def spare(*copies: bytes) -> Disk:
    disk = Disk("/dev/old", SECTORS)
    old_spare.write(disk.put, *copies)
    return disk


def diagnosis(data: bytes) -> Diagnosis:
    with pytest.raises(Invalid) as caught:
        unpack(data)
    return caught.value.diagnosis


@pytest.fixture(scope="module")
def sample() -> bytes:
    """The beginning of a spare that the kernel target itself has written."""
    if not SAMPLE.exists():
        pytest.skip(f"{SAMPLE.name} is not there")
    return lzma.decompress(SAMPLE.read_bytes())


def test_a_spare_that_the_kernel_target_wrote(sample: bytes) -> None:
    disk = Disk("/dev/old", len(sample) // 512)
    disk.put(0, sample)
    seen = survey(disk)
    assert seen.failed == ()
    assert [index for index, _metadata in seen.copies] == [0, 1, 2, 3, 4]
    found = choose(seen)
    assert found.warnings == ()
    places = [(1000, 4100), (2000, 4101), (77777, 5000)]
    # It was made with the message test_remap, and the target not started again afterwards.
    remaps = tuple(Remap(main, place, 1, PENDING) for main, place in places)
    assert found.metadata == KernelMetadata(5, 0x6AFFD385, 524288, 131072, remaps)


def test_the_writer_of_these_tests_writes_as_the_kernel_target_does(sample: bytes) -> None:
    times = (0x18E9A812C57DE288, 0x18E9A812C78ED62B, 0x18E9A812C9D14DB0)
    old = Old(
        524288,
        131072,
        [Entry(1000, 4100, PENDING), Entry(2000, 4101, PENDING), Entry(77777, 5000, PENDING)],
        timestamp=0x6AFFD385,
        raw={312 + 40 * n + 16: time.to_bytes(8, "little") for n, time in enumerate(times)},
    )
    disk = Disk("/dev/old", len(sample) // 512)
    old_spare.write(disk.put, old.pack())
    assert disk.read(0, len(sample) // 512) == sample


@given(
    st.lists(entries, max_size=20),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(1, 2**64 - 1),
    st.integers(1, 2**64 - 1),
)
@settings(max_examples=40)
def test_what_is_written_is_read(
    table: list[Entry], sequence: int, timestamp: int, main: int, place: int
) -> None:
    old = Old(main, place, table, sequence, timestamp)
    remaps = tuple(Remap(e.main, e.spare, e.errors, e.flags) for e in table)
    assert unpack(old.pack()) == KernelMetadata(sequence, timestamp, main, place, remaps)


def test_a_full_table_is_read() -> None:
    table = [Entry(number, 2000 + number) for number in range(2048)]
    full = choose(survey(spare(replace(OLD, entries=table).pack())))
    assert [r.main_sector for r in full.metadata.remaps] == [*range(2048)]
    assert "is full" in full.warnings[0]


@pytest.mark.parametrize(
    ("flags", "pending"), [(0, True), (PENDING, True), (ACTIVE, False), (PENDING | ACTIVE, True)]
)
def test_only_what_is_surely_active_is_not_pending(flags: int, pending: bool) -> None:
    assert Remap(0, 0, 0, flags).pending is pending
    assert Remap(0, 0, 0, flags | 0x8000).pending is pending


def test_the_checksum_is_what_crcmod_describes() -> None:
    crcmod = pytest.importorskip("crcmod")
    described = crcmod.mkCrcFun(0x104C11DB7, initCrc=0, rev=True, xorOut=0)
    data = random.Random(1).randbytes(kernel_v4.COPY_BYTES)
    assert kernel_v4.checksum(data) == described(data[:24] + data[28:])


@pytest.mark.parametrize("seed", range(3))
def test_the_checksum_is_that_of_the_writer(seed: int) -> None:
    data = random.Random(seed).randbytes(kernel_v4.COPY_BYTES + 100)
    assert kernel_v4.checksum(data) == old_spare.crc(data[:24] + data[28 : old_spare.SIZE])


def test_every_flipped_bit_is_noticed() -> None:
    """All bits of header, counts and entries, and some of each sector after them.

    Which bit it is makes no difference to a CRC: the checksum changes by a power of x, which its
    polynomial never divides.
    """
    used = 312 + 40 * len(OLD.entries)
    rest = range(used * 8, old_spare.SIZE * 8, 97)
    for bit in itertools.chain(range(used * 8), rest, [old_spare.SIZE * 8 - 1]):
        data = bytearray(PACKED)
        data[bit // 8] ^= 1 << bit % 8
        expected = Diagnosis.MAGIC if bit < 32 else Diagnosis.DATA_CHECKSUM
        assert diagnosis(bytes(data)) is expected, bit


@given(st.binary(max_size=600), st.booleans())
def test_arbitrary_bytes_are_diagnosed(data: bytes, with_magic: bool) -> None:
    whole = (kernel_v4.MAGIC if with_magic else b"") + data
    expected = Diagnosis.STRUCTURE if whole.startswith(kernel_v4.MAGIC) else Diagnosis.MAGIC
    assert diagnosis(whole) is expected
    long = whole.ljust(old_spare.SIZE, b"\0")
    assert diagnosis(long) in (Diagnosis.MAGIC, Diagnosis.DATA_CHECKSUM)


@given(st.dictionaries(st.integers(4, 460), st.binary(min_size=1, max_size=8), max_size=6))
@settings(max_examples=60)
def test_arbitrary_fields_under_a_right_checksum_are_read_or_diagnosed(
    raw: dict[int, bytes],
) -> None:
    old = replace(OLD, raw=raw)
    data = old.pack()
    touched = {offset + i for offset, value in raw.items() for i in range(len(value))}
    # Version, sizes, block size and counts.
    if touched.isdisjoint([*range(4, 8), *range(32, 36), *range(120, 140), *range(296, 304)]):
        assert len(unpack(data).remaps) == len(OLD.entries)
    else:
        with contextlib.suppress(Invalid):
            assert len(unpack(data).remaps) <= 2048


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (replace(OLD, version=3), Diagnosis.STRUCTURE),
        (replace(OLD, version=5), Diagnosis.NEWER),
        (replace(OLD, size=old_spare.SIZE - 1), Diagnosis.STRUCTURE),
        (replace(OLD, sector_size=4096), Diagnosis.STRUCTURE),
        (replace(OLD, main_sectors=0), Diagnosis.STRUCTURE),
        (replace(OLD, spare_sectors=0), Diagnosis.STRUCTURE),
        (replace(OLD, count=2049), Diagnosis.STRUCTURE),
        (replace(OLD, most=4096), Diagnosis.STRUCTURE),
    ],
)
def test_what_contradicts_the_layout_is_diagnosed(wrong: Old, expected: Diagnosis) -> None:
    assert diagnosis(wrong.pack()) is expected


def test_a_copy_that_ends_early_is_diagnosed() -> None:
    assert diagnosis(PACKED[:-1]) is Diagnosis.STRUCTURE


@pytest.mark.parametrize("good", range(5))
def test_one_good_copy_is_enough_and_all_others_are_told(good: int) -> None:
    disk = spare(PACKED)
    faults = [Diagnosis.MAGIC, Diagnosis.DATA_CHECKSUM, Diagnosis.UNREADABLE, Diagnosis.STRUCTURE]
    bad = [index for index in range(5) if index != good]
    for index, fault in zip(bad, faults):
        place = old_spare.PLACES[index]
        if fault is Diagnosis.MAGIC:
            disk.put(place, bytes(512))
        elif fault is Diagnosis.DATA_CHECKSUM:
            disk.put(place + 100, b"x" * 512)
        elif fault is Diagnosis.UNREADABLE:
            disk.unreadable.add(place + 10)
        else:
            disk.put(place, replace(OLD, size=1).pack().ljust(165 * 512, b"\0"))
    seen = survey(disk)
    assert [(copy.index, copy.diagnosis) for copy in seen.failed] == [*zip(bad, faults)]
    found = choose(seen)
    assert found.metadata == unpack(PACKED)
    assert [warning.split(" of ")[0] for warning in found.warnings] == [
        f"/dev/old: copy {index}" for index in bad
    ]


def test_a_device_without_a_copy_is_refused() -> None:
    with pytest.raises(Refused, match="no valid copy"):
        choose(survey(Disk("/dev/old", SECTORS)))
    with pytest.raises(Refused, match="copy 4: unreadable"):
        choose(survey(Disk("/dev/old", 1100)))


def test_the_newest_copy_counts() -> None:
    newer = replace(OLD, sequence=6, timestamp=OLD.timestamp + 1, entries=[Entry(3, 2000)])
    for number in range(1, 5):
        copies = [newer.pack()] * number + [PACKED]
        found = choose(survey(spare(*copies)))
        assert found.metadata == unpack(newer.pack())
        assert len(found.warnings) == 5 - number
        assert "sequence" in found.warnings[0]


def test_a_sequence_that_began_anew_does_not_hide_the_newer_table() -> None:
    """The kernel's module counts from 1 again after each load."""
    newer = replace(OLD, sequence=2, timestamp=OLD.timestamp + 1, entries=[Entry(3, 2000)])
    for copies in ((PACKED, newer.pack()), (newer.pack(), PACKED)):
        with pytest.raises(Refused, match="contradict each other"):
            choose(survey(spare(*copies)))
    same = replace(newer, entries=OLD.entries)
    assert choose(survey(spare(PACKED, same.pack()))).metadata == unpack(PACKED)


def test_two_tables_of_one_moment_are_refused() -> None:
    other = replace(OLD, entries=[Entry(3, 2000)])
    with pytest.raises(Refused, match="contradict each other"):
        choose(survey(spare(PACKED, other.pack())))
