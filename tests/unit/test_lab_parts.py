# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""The parts of the lab that need no virtual machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import Disk, Fault, LabError
from tests.lab.__main__ import main, parse_disk, parse_forward, parse_sectors
from tests.lab.disk import device, parse_size
from tests.lab.faults import rules, without
from tests.lab.image import recipe_hash
from tests.lab.machine import prune
from tests.lab.paths import machine_dir, machines_dir
from tests.lab.volatile import Store

EIO, ENODATA = 5, 61


@pytest.mark.parametrize(
    ("text", "expected"), [("64M", 64 << 20), ("1G", 1 << 30), (8192, 8192), ("4KiB", 4096)]
)
def test_sizes(text: str | int, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "M", "64X", "1000", "0", "-4096", "64 M"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(LabError, match="size"):
        parse_size(text)


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": ""},
        {"name": "a" * 21},
        {"name": "a,b"},
        {"name": "a", "interface": "floppy"},
        {"name": "a", "block": 1024},
        {"name": "a", "interface": "ide", "block": 4096},
        {"name": "a", "cache": "magic"},
        {"name": "a", "interface": "nvme", "wwn": 1},
    ],
)
def test_wrong_disks(arguments: dict[str, object]) -> None:
    with pytest.raises(LabError, match="disk"):
        Disk(**arguments)  # type: ignore[arg-type]


def test_a_disk_as_text() -> None:
    assert parse_disk("main") == Disk("main")
    assert parse_disk("a:1G:nvme:block=4096:cache=none") == Disk(
        "a", "1G", "nvme", 4096, cache="none"
    )
    assert parse_disk("a:64M:scsi:wwn=5000c500a1b2c3d4").wwn == 0x5000C500A1B2C3D4
    assert parse_disk("a:cache=volatile:survive=0.5:seed=3").survive == 0.5


@pytest.mark.parametrize("text", ["a:1M:scsi:4096", "a:block=big", "a:colour=red", "a:1M:tape"])
def test_a_wrong_disk_as_text(text: str) -> None:
    with pytest.raises(LabError, match="disk"):
        parse_disk(text)


def test_sectors_as_text() -> None:
    assert parse_sectors("7") == (7, 1)
    assert parse_sectors("100+8") == (100, 8)
    assert parse_sectors("100-107") == (100, 8)
    for text in ("", "a", "1+", "1..2"):
        with pytest.raises(LabError, match="sectors"):
            parse_sectors(text)


def test_forwards_as_text() -> None:
    assert parse_forward("9741") == (9741, None)
    assert parse_forward("9741:19741") == (9741, 19741)
    with pytest.raises(LabError, match="forward"):
        parse_forward("http")


def test_ide_disks_spread_over_controllers() -> None:
    disk = Disk("a", interface="ide")
    assert device(disk, 5)["bus"] == "ahci0.5"
    assert device(disk, 6)["bus"] == "ahci1.0"


def test_one_rule_for_each_block_and_kind_of_request() -> None:
    found = rules([Fault(100, 2, "write", "ENODATA")], 1)
    assert [(rule["sector"], rule["iotype"]) for rule in found] == [
        (100, "write"),
        (100, "write-zeroes"),
        (101, "write"),
        (101, "write-zeroes"),
    ]
    assert {(rule["errno"], rule["once"]) for rule in found} == {(ENODATA, False)}


def test_rules_of_large_blocks_name_each_block_once() -> None:
    assert [rule["sector"] for rule in rules([Fault(15, 2, "read")], 8)] == [8, 16]
    assert [rule["sector"] for rule in rules([Fault(16, 8, "read")], 8)] == [16]


def test_a_weak_sector_is_a_number_of_single_rules() -> None:
    found = rules([Fault(3, 1, "read", times=4)], 1)
    assert len(found) == 4
    assert all(rule["once"] and rule["errno"] == EIO for rule in found)


def test_a_fault_of_the_whole_disk_names_no_sector() -> None:
    assert [rule for rule in rules([Fault(None, op="read")], 1) if "sector" in rule] == []


@pytest.mark.parametrize(
    ("healed", "left"),
    [
        ((0, 100), [(100, 10)]),
        ((110, 5), [(100, 10)]),
        ((100, 10), []),
        ((90, 100), []),
        ((100, 1), [(101, 9)]),
        ((109, 1), [(100, 9)]),
        ((103, 4), [(100, 3), (107, 3)]),
        ((95, 10), [(105, 5)]),
        ((105, 10), [(100, 5)]),
    ],
)
def test_healing_takes_sectors_out(healed: tuple[int, int], left: list[tuple[int, int]]) -> None:
    result = without([Fault(100, 10, "read")], *healed)
    assert [(fault.start, fault.count) for fault in result] == left


def test_a_whole_disk_is_not_healed_in_part() -> None:
    with pytest.raises(LabError, match="whole disk"):
        without([Fault(None)], 0, 1)


@pytest.fixture
def image(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT)
    os.truncate(descriptor, 1 << 20)
    yield descriptor
    os.close(descriptor)


def blocks(image: int, count: int) -> list[int]:
    data = os.pread(image, 512 * count, 0)
    return [data[512 * number] for number in range(count)]


def test_a_volatile_store_reads_what_was_written_and_keeps_what_was_flushed(image: int) -> None:
    store = Store(image, block=512, survive=0.0, seed=0)
    store.write(0, b"\1" * 1024)
    assert store.read(0, 1536) == b"\1" * 1024 + bytes(512)
    assert blocks(image, 2) == [0, 0]
    store.flush()
    store.write(512, b"\2" * 512)
    store.write(1024, b"\3" * 512, durable=True)
    assert store.read(0, 1536)[::512] == b"\1\2\3"
    store.power_cut()
    assert store.read(0, 1536)[::512] == b"\1\1\3"
    assert blocks(image, 3) == [1, 1, 3]


def test_a_part_of_the_unflushed_blocks_survives_repeatably(image: int) -> None:
    results = []
    for _unused in range(2):
        os.pwrite(image, bytes(1 << 20), 0)
        store = Store(image, block=512, survive=0.5, seed=7)
        store.write(0, b"\1" * 512 * 1000)
        store.power_cut()
        results.append(blocks(image, 1000))
    assert results[0] == results[1]
    assert 300 < sum(results[0]) < 700


def test_images_are_cached_by_what_goes_into_them(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = recipe_hash("debian-12", "key")
    assert plain == recipe_hash("debian-12", "key")
    assert plain != recipe_hash("debian-13", "key")
    assert plain != recipe_hash("debian-12", "other key")
    monkeypatch.setattr("tests.lab.image.PACKAGES", ["less"])
    assert plain != recipe_hash("debian-12", "key")


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty directory of machines."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return machines_dir()


@pytest.mark.parametrize("name", ["", ".", "..", "../other", "/etc", "a b", "-x"])
def test_wrong_names_of_machines(machines: Path, name: str) -> None:
    with pytest.raises(LabError, match="use letters"):
        machine_dir(name)


def test_a_machine_that_was_never_finished_is_killed(
    machines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (machines / "half").mkdir()
    (machines / "half" / "root.qcow2").touch()
    monkeypatch.setattr("sys.argv", ["lab", "kill", "--name=half"])
    assert main() == 0
    assert [*machines.iterdir()] == []
    assert main() == 0


def test_pruning_leaves_a_machine_that_its_owner_removes_meanwhile(
    machines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.lab.machine.machine_names", lambda: ["gone", "going"])
    (machines / "going").mkdir()
    prune()
    assert [path.name for path in machines.iterdir()] == ["going"]
