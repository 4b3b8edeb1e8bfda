# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What reading a failed range shows, on devices made of Python."""

from __future__ import annotations

import errno

from hypothesis import given
from hypothesis import strategies as st

from dm_remap.probing import (
    STRIDE,
    DeviceState,
    answers,
    device_state,
    kernel_name,
    physical_block,
    probe,
    serves_requests,
    whole_disk,
)

SECTORS = 4096


class FakeDisk:
    """A disk whose bad sectors fail every read that touches them."""

    def __init__(self, bad=(), number=errno.EIO, sectors=SECTORS):
        self.bad = set(bad)
        self.number = number
        self.sectors = sectors
        self.reads = []

    def read(self, sector, count):
        assert 0 <= sector < sector + count <= self.sectors
        self.reads.append((sector, count))
        if self.bad & set(range(sector, sector + count)):
            raise OSError(self.number, "bad")
        return bytes(512 * count)


def always():
    return True


def points(ranges):
    return {sector for start, count in ranges for sector in range(start, start + count)}


@given(
    st.sets(st.integers(0, SECTORS - 1), max_size=8),
    st.lists(st.tuples(st.integers(0, SECTORS - 1), st.integers(1, 300)), max_size=3),
    st.sampled_from([1, 8]),
)
def test_exactly_the_bad_blocks_of_the_range_are_found(bad, ranges, unit):
    result = probe(FakeDisk(bad), ranges, unit, always)
    asked = {sector // unit for sector in points(ranges) if sector < SECTORS}
    expected = {sector // unit for sector in bad} & asked
    assert {sector // unit for sector in points(result.bad)} == expected
    assert result.unread == ()


def test_a_single_bad_sector_costs_two_failing_reads_at_most():
    disk = FakeDisk({1000})
    probe(disk, [(0, 2048)], 1, always)
    failing = [item for item in disk.reads if item[0] <= 1000 < item[0] + item[1]]
    assert len(failing) == 2
    assert len(disk.reads) == 2048 // STRIDE + STRIDE


def test_large_reads_are_of_a_stride_whatever_the_unit_is():
    for unit in (1, 8, 2 * STRIDE):
        disk = FakeDisk()
        probe(disk, [(0, 2048)], unit, always)
        assert {count for _start, count in disk.reads} == {max(STRIDE, unit)}


def test_the_first_error_number_is_told():
    assert probe(FakeDisk({5}, errno.ENODATA), [(0, 8)], 1, always).errno == errno.ENODATA


@given(st.integers(0, 40), st.sets(st.integers(0, 511), max_size=5))
def test_what_time_did_not_suffice_for_is_named(budget, bad):
    answers_left = iter([True] * budget)
    result = probe(FakeDisk(bad), [(0, 256), (300, 212)], 1, lambda: next(answers_left, False))
    asked = set(range(256)) | set(range(300, 512))
    assert points(result.bad) == (bad & asked) - points(result.unread)


@given(st.sets(st.integers(0, 255), min_size=1, max_size=5))
def test_probing_what_was_left_comes_to_an_end_even_without_time(bad):
    disk, left, found = FakeDisk(bad), [(0, 256)], set()
    for _unused in range(256):
        result = probe(disk, left, 1, lambda: False)
        found |= points(result.bad)
        left = result.unread
    assert not left
    assert found == bad


def test_a_disk_that_reads_elsewhere_answers():
    assert answers(FakeDisk(range(0, 100)), [(0, 100)], 8)


def test_a_disk_that_reads_nowhere_does_not_answer():
    assert not answers(FakeDisk(range(SECTORS)), [(0, 8)], 8)


def make_sysfs(root, disk="sdb", devno="8:16", size="2048", state="running"):
    folder = root / "devices" / disk
    (folder / "device").mkdir(parents=True)
    (folder / "queue").mkdir()
    (folder / "queue" / "physical_block_size").write_text("4096\n")
    (folder / "dev").write_text(devno + "\n")
    (folder / "size").write_text(size + "\n")
    (folder / "device" / "state").write_text(state + "\n")
    part = folder / (disk + "1")
    part.mkdir()
    (part / "partition").write_text("1\n")
    (part / "start").write_text("256\n")
    (root / "dev" / "block").mkdir(parents=True, exist_ok=True)
    (root / "dev" / "block" / devno).symlink_to(folder)
    (root / "dev" / "block" / "8:17").symlink_to(part)
    return folder


def test_a_partition_is_traced_back_to_its_disk(tmp_path):
    make_sysfs(tmp_path)
    sysfs = str(tmp_path)
    assert whole_disk("8:17", sysfs) == ("8:16", 256)
    assert whole_disk("8:16", sysfs) == ("8:16", 0)
    assert device_state("8:17", sysfs) is DeviceState.LIVE
    assert kernel_name("8:17", sysfs) == "sdb1"
    assert physical_block("8:17", sysfs) == 4096


def test_a_device_without_an_entry_is_gone(tmp_path):
    assert device_state("8:16", str(tmp_path)) is DeviceState.GONE
    assert kernel_name("8:16", str(tmp_path)) == "8:16"


def test_a_device_of_no_size_is_gone(tmp_path):
    make_sysfs(tmp_path, size="0")
    assert device_state("8:16", str(tmp_path)) is DeviceState.GONE


def test_an_offline_device_is_offline_and_so_is_its_partition(tmp_path):
    make_sysfs(tmp_path, state="transport-offline")
    assert device_state("8:16", str(tmp_path)) is DeviceState.OFFLINE
    assert device_state("8:17", str(tmp_path)) is DeviceState.OFFLINE


def test_only_devices_with_queues_serve_requests(tmp_path):
    folder = make_sysfs(tmp_path)
    assert not serves_requests("8:16", str(tmp_path))
    (folder / "mq").mkdir()
    assert serves_requests("8:16", str(tmp_path))
    assert serves_requests("8:17", str(tmp_path))
