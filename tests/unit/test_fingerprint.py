# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Who is taken for whom, what proves it, and that nothing which can be copied ever does."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dm_remap import blockdev, fingerprint, replacement
from dm_remap.fingerprint import (
    PROOFS,
    UNPROVED_LIMIT,
    WEIGHTS,
    Cache,
    Fingerprint,
    Match,
    Verdict,
    compare,
    more_layers,
    of_entry,
    of_info,
    sample,
    unrelated,
    with_content,
)
from tests.unit.copy_scene import Disk
from tests.unit.test_planner import info

CONTENT = (("boot", "b"), ("half", "h"), ("super", "s"))
DISK = Fingerprint(
    wwn="0x5000c500a1b2c3d4",
    serial="ZA1",
    model="ST4000",
    sectors=1 << 20,
    logical_block=512,
    physical_block=4096,
    partition=0,
    fs_type="ext4",
    fs_uuid="f-1",
    content=CONTENT,
)
ANONYMOUS = replace(DISK, wwn="", serial="", model="")
PART = replace(DISK, partition=2, partuuid="p-2", start=2048, table_type="gpt", table_uuid="t-1")
VOLUME = replace(ANONYMOUS, volume="LVM-abc")


CASES: Mapping[str, tuple[Fingerprint, Fingerprint, Verdict]] = {
    "the same": (DISK, DISK, Verdict.SAME),
    "nothing seen of the content": (
        DISK,
        replace(DISK, fs_type="", fs_uuid="", content=()),
        Verdict.SAME,
    ),
    "the file system was used": (DISK, replace(DISK, content=(("boot", "x"),)), Verdict.SAME),
    "another physical block": (DISK, replace(DISK, physical_block=512), Verdict.SAME),
    "another adapter tells another model": (DISK, replace(DISK, model="USB"), Verdict.SAME),
    "another adapter gives the WWN as serial": (
        DISK,
        replace(DISK, serial="5000c500a1b2c3d4"),
        Verdict.SAME,
    ),
    "another adapter hides the serial": (DISK, replace(DISK, serial=""), Verdict.SAME),
    "another adapter hides all": (DISK, ANONYMOUS, Verdict.PROBABLY),
    "no name at all": (ANONYMOUS, ANONYMOUS, Verdict.PROBABLY),
    "no name, other content": (ANONYMOUS, replace(ANONYMOUS, fs_uuid="f-2"), Verdict.UNKNOWN),
    "no name, larger, same content": (
        ANONYMOUS,
        replace(ANONYMOUS, sectors=1 << 21),
        Verdict.CLONE,
    ),
    "no name, larger": (
        ANONYMOUS,
        replace(ANONYMOUS, sectors=1 << 21, fs_uuid="", content=()),
        Verdict.DIFFERENT,
    ),
    "serials of one character are none": (
        replace(DISK, serial="0000", wwn=""),
        replace(DISK, serial="0000", wwn=""),
        Verdict.PROBABLY,
    ),
    "a clone": (DISK, replace(DISK, wwn="0x5000c500ffffffff", serial="ZA2"), Verdict.CLONE),
    "a clone with the same WWN": (DISK, replace(DISK, serial="ZA2"), Verdict.CLONE),
    "a clone of another model": (
        replace(DISK, wwn=""),
        replace(DISK, wwn="", model="other"),
        Verdict.CLONE,
    ),
    "a larger clone": (DISK, replace(DISK, wwn="", serial="ZA2", sectors=1 << 21), Verdict.CLONE),
    "a clone by its samples": (
        replace(DISK, fs_uuid=""),
        replace(DISK, wwn="", serial="ZA2", fs_uuid=""),
        Verdict.CLONE,
    ),
    "another disk": (
        DISK,
        Fingerprint(wwn="0x5000c500ffffffff", serial="ZA2", sectors=1 << 20),
        Verdict.DIFFERENT,
    ),
    "formatted anew": (DISK, replace(DISK, fs_type="xfs", fs_uuid="f-2"), Verdict.REFORMATTED),
    "partitioned anew": (PART, replace(PART, table_uuid="t-2"), Verdict.REFORMATTED),
    "formatted with other blocks": (DISK, replace(DISK, logical_block=4096), Verdict.DIFFERENT),
    "grown": (DISK, replace(DISK, sectors=1 << 21), Verdict.DIFFERENT),
    "the partition": (PART, PART, Verdict.SAME),
    "the partition with another number": (PART, replace(PART, partition=3), Verdict.SAME),
    "another partition": (
        PART,
        replace(PART, partition=3, partuuid="p-3", start=1 << 20),
        Verdict.OTHER_PART,
    ),
    "another partition without a UUID": (
        replace(PART, partuuid=""),
        replace(PART, partuuid="", start=4096),
        Verdict.OTHER_PART,
    ),
    "the whole disk for the partition": (
        PART,
        replace(PART, partition=0, partuuid="", start=0, sectors=1 << 21),
        Verdict.OTHER_PART,
    ),
    "the partition for the whole disk": (
        DISK,
        replace(DISK, partition=1, start=2048, sectors=1 << 19),
        Verdict.OTHER_PART,
    ),
    "a partition of what nobody knew to be whole": (
        replace(DISK, partition=None),
        replace(DISK, partition=1, start=2048, sectors=1 << 19),
        Verdict.OTHER_PART,
    ),
    "the partition of a cloned disk": (PART, replace(PART, wwn="", serial="ZA2"), Verdict.CLONE),
    "a logical volume": (VOLUME, VOLUME, Verdict.SAME),
    "a snapshot of the volume": (VOLUME, replace(VOLUME, volume="LVM-abd"), Verdict.CLONE),
    "nothing recorded": (Fingerprint(), DISK, Verdict.UNKNOWN),
    "nothing seen": (DISK, Fingerprint(), Verdict.UNKNOWN),
}


@pytest.mark.parametrize("name", CASES)
def test_who_is_taken_for_whom(name: str) -> None:
    recorded, seen, verdict = CASES[name]
    match = compare(recorded, seen)
    assert match.verdict is verdict, match
    assert match.is_it == (verdict in (Verdict.SAME, Verdict.REFORMATTED))
    if verdict is not Verdict.SAME:
        assert match.reasons
    assert not any(reason.endswith(".") for reason in match.reasons)


def test_proof_is_worth_more_than_all_else_together() -> None:
    rest = sum(weight for name, weight in WEIGHTS.items() if name not in PROOFS)
    assert rest == UNPROVED_LIMIT == min(WEIGHTS[name] for name in PROOFS)
    assert compare(DISK, DISK).confidence == 100
    assert compare(ANONYMOUS, ANONYMOUS).confidence < UNPROVED_LIMIT


def test_the_documented_weights_and_verdicts_are_these() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "identity.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", text, re.MULTILINE)
    assert {name: int(weight) for name, weight in rows} == WEIGHTS
    listed = text.split("| verdict | when |", 1)[1].split("\n\n", 1)[0]
    assert set(re.findall(r"^\| ([a-z ]+) \|", listed, re.MULTILINE)) == {v.value for v in Verdict}


def test_a_device_without_a_name_says_so() -> None:
    assert "nothing is recorded" in compare(ANONYMOUS, ANONYMOUS).reasons[-1]
    assert "shows no WWN and serial number" in compare(DISK, ANONYMOUS).reasons[-1]


words = st.sampled_from(["", "a1", "b2"])
samples = st.lists(st.tuples(st.sampled_from(["boot", "half", "end"]), words), max_size=3)
prints = st.builds(
    Fingerprint,
    wwn=words,
    serial=st.sampled_from(["", "s1", "s2"]),
    model=words,
    volume=words,
    sectors=st.sampled_from([0, 100, 200]),
    logical_block=st.sampled_from([0, 512, 4096]),
    physical_block=st.sampled_from([0, 512, 4096]),
    partition=st.sampled_from([None, 0, 1, 2]),
    partuuid=words,
    start=st.sampled_from([0, 8, 16]),
    fs_type=words,
    fs_uuid=words,
    table_type=words,
    table_uuid=words,
    content=samples.map(lambda items: tuple(sorted({k: v for k, v in items if v}.items()))),
)


@given(prints, prints)
def test_no_device_is_taken_for_another_without_proof(was: Fingerprint, now: Fingerprint) -> None:
    match = compare(was, now)
    named = [
        name for name in PROOFS if getattr(was, name) and getattr(was, name) == getattr(now, name)
    ]
    other = [
        name
        for name in PROOFS
        if getattr(was, name) and getattr(now, name) and getattr(was, name) != getattr(now, name)
    ]
    assert match.proven == (bool(named) and not other and "model" not in match.differs)
    if match.is_it:
        assert named
        assert not other
        assert not (was.sectors and now.sectors and was.sectors != now.sectors)
        assert not (
            was.logical_block and now.logical_block and was.logical_block != now.logical_block
        )
        assert match.confidence >= UNPROVED_LIMIT
    else:
        assert match.confidence <= UNPROVED_LIMIT
    if other:
        assert match.verdict in (Verdict.CLONE, Verdict.DIFFERENT)
        assert match.confidence == 0
    assert 0 <= match.confidence <= 100


@given(prints, prints)
def test_what_is_unrelated_is_different(was: Fingerprint, now: Fingerprint) -> None:
    if unrelated(was, now):
        match = compare(was, now)
        assert match.verdict is Verdict.DIFFERENT
        assert not match.proven


@given(prints)
def test_a_device_is_itself_or_at_worst_doubtful(seen: Fingerprint) -> None:
    match = compare(seen, seen)
    assert match.differs == ()
    assert match.verdict in (Verdict.SAME, Verdict.PROBABLY, Verdict.UNKNOWN)
    assert (match.verdict is Verdict.SAME) == bool(seen.wwn or seen.serial or seen.volume)


@given(prints)
def test_what_is_written_down_reads_back(seen: Fingerprint) -> None:
    assert Fingerprint.from_dict(seen.to_dict()) == seen


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)
FIELDS = [field.name for field in dataclasses.fields(Fingerprint)]
entries = st.dictionaries(st.sampled_from([*FIELDS, "geometry", "device_sectors"]), json)


@given(entries, entries, prints)
def test_an_entry_of_any_form_is_read(entry: Any, more: Any, seen: Fingerprint) -> None:
    recorded = of_entry({**entry, "fingerprint": more})
    assert isinstance(compare(recorded, seen), Match)
    assert isinstance(of_entry({**entry, "geometry": more}), Fingerprint)
    assert Fingerprint.from_dict(recorded.to_dict()) == recorded


@pytest.mark.parametrize("entry", [None, [], "disk", 7])
def test_what_is_no_entry_says_nothing(entry: object) -> None:
    assert of_entry(entry) == Fingerprint()
    assert of_entry({"fingerprint": entry, "serial": entry}).sectors == 0


def test_an_entry_of_an_older_version_has_the_hardware_layer() -> None:
    main = info("/dev/main", wwn="0x5", physical_block=4096)
    entry = replacement.main_entry(main, main.sectors)
    assert "fingerprint" not in entry
    assert compare(of_entry(entry), of_info(main)).verdict is Verdict.SAME
    larger = replacement.main_entry(replace(main, sectors=99999), main.sectors)
    assert of_entry(larger).sectors == 99999


def test_an_entry_keeps_all_layers_of_a_main_and_only_the_hardware_of_a_spare() -> None:
    part = info("/dev/main", partition=2, start=8, partuuid="p", fs_type="ext4", fs_uuid="f")
    entry = replacement.main_entry(part, part.sectors)
    assert of_entry(entry) == of_info(part)
    spare = replacement.recorded(part, hardware_only=True)
    assert spare["fingerprint"] == {"partition": 2, "start": 8, "partuuid": "p"}
    assert more_layers(Fingerprint()) == {}


def test_what_hides_a_main_is_not_its_content() -> None:
    hidden = of_info(info("/dev/main", fs_type="dm_remap_main", fs_uuid="u"))
    assert (hidden.fs_type, hidden.fs_uuid) == ("", "")


# Content


def filled(seed: int = 1, sectors: int = 1 << 14) -> Disk:
    disk = Disk(sectors=sectors)
    for sector in range(0, sectors, 8):
        disk.put(sector, bytes([seed, sector % 251]) * 2048)
    return disk


def ext(disk: Disk, uuid: bytes = b"u" * 16, free: int = 7) -> Disk:
    block = bytearray(1024)
    block[56:58] = b"\x53\xef"
    block[0x68:0x78] = uuid
    block[12:16] = free.to_bytes(4, "little")
    disk.put(2, bytes(block))
    return disk


def test_a_sample_is_five_reads_of_4_kib() -> None:
    disk = filled()
    assert set(sample(disk)) == {"boot", "quarter", "half", "three_quarters", "end"}
    assert [count for _sector, count in disk.reads] == [8] * 5
    small = filled(sectors=24)
    assert set(sample(small)) == {"boot"}
    assert sample(Disk(sectors=4096)) == {}


def test_what_moves_in_a_file_system_is_not_sampled() -> None:
    assert sample(ext(filled()))["super"] == sample(ext(filled(), free=9))["super"]
    assert sample(ext(filled()))["super"] != sample(ext(filled(), b"v" * 16))["super"]

    def xfs(free: int, uuid: bytes = b"u") -> dict[str, str]:
        disk = filled()
        block = bytearray(512)
        block[:4] = b"XFSB"
        block[32:48] = uuid * 16
        block[144:152] = free.to_bytes(8, "big")
        block[224:228] = free.to_bytes(4, "big")
        disk.put(0, bytes(block))
        return sample(disk)

    assert xfs(1)["boot"] == xfs(2)["boot"]
    assert xfs(1)["boot"] != xfs(1, b"v")["boot"]


def test_an_error_ends_the_sampling_with_what_there_is() -> None:
    disk = filled()
    disk.unreadable = {1 << 12}
    assert set(sample(disk)) == {"boot"}
    assert len(disk.reads) == 2


def test_blank_disks_do_not_agree() -> None:
    blank = replace(ANONYMOUS, fs_uuid="", content=tuple(sample(Disk(sectors=4096)).items()))
    assert "content" not in compare(blank, blank).agrees


# What is kept


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(tmp_path: Path, clock: Clock) -> Cache:
    return Cache(str(tmp_path / "kept"), clock)


def test_a_fingerprint_is_kept_for_an_hour(cache: Cache, clock: Clock) -> None:
    assert cache.get("8:0", "a", 0) is None
    cache.put("8:0", "a", DISK, clock.now)
    clock.now += 3599
    assert cache.get("8:0", "a", 0) == DISK
    assert cache.get("8:1", "a", 0) is None
    clock.now += 1
    assert cache.get("8:0", "a", 0) is None
    clock.now -= 7200
    assert cache.get("8:0", "a", 0) is None


def test_another_attachment_or_news_of_udev_end_it(cache: Cache, clock: Clock) -> None:
    cache.put("8:0", "a", DISK, clock.now)
    assert cache.get("8:0", "b", 0) is None
    assert cache.get("8:0", "a", int(clock.now * 1e9) - 1) == DISK
    assert cache.get("8:0", "a", int(clock.now * 1e9)) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"time": "x", "attachment": "a"}'])
def test_a_damaged_file_is_none(cache: Cache, clock: Clock, tmp_path: Path, text: str) -> None:
    cache.put("8:0", "a", DISK, clock.now)
    (kept,) = (tmp_path / "kept").iterdir()
    kept.write_text(text)
    assert cache.get("8:0", "a", 0) is None


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(str(tmp_path / "file" / "kept"), clock)
    cache.put("8:0", "a", DISK, clock.now)
    assert cache.get("8:0", "a", 0) is None


def test_a_device_is_read_once_until_udev_tells_of_it(
    monkeypatch: pytest.MonkeyPatch, cache: Cache, clock: Clock
) -> None:
    main = info("/dev/main")
    disk = filled(sectors=main.sectors)
    news = [0]

    class Open(Disk):
        def __init__(self, _path: str) -> None:
            self.__dict__ = disk.__dict__

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_error: object) -> None:
            return

    monkeypatch.setattr(blockdev, "devno_of", lambda path: main.devno)
    monkeypatch.setattr(blockdev, "attachment_of", lambda devno: ("a", news[0]))
    monkeypatch.setattr(blockdev, "describe", lambda path: main)
    monkeypatch.setattr(blockdev, "BlockDevice", Open)
    first = fingerprint.observe("/dev/main", cache)
    assert first == of_info(with_content(main, filled(sectors=main.sectors)))
    assert first.content
    reads = len(disk.reads)
    assert fingerprint.observe("/dev/main", cache) == first
    assert len(disk.reads) == reads
    news[0] = int(clock.now * 1e9) + 1
    assert fingerprint.observe("/dev/main", cache) == first
    assert len(disk.reads) == 2 * reads


# sysfs and udev


def device(root: Path, folder: str, devno: str, sectors: int, **files: str) -> Path:
    """A block device in a sysfs of its own."""
    path = root / "devices" / folder
    path.mkdir(parents=True)
    for link in (root / "class/block" / path.name, root / "dev/block" / devno):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    for name, text in {"dev": devno, "size": str(sectors), "ro": "0", **files}.items():
        file = path / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return path


def known_to_udev(root: Path, devno: str, **properties: str) -> str:
    folder = root / "udev"
    folder.mkdir(exist_ok=True)
    lines = [f"E:{key}={value}" for key, value in properties.items()]
    (folder / f"b{devno}").write_text("\n".join(["I:12345", *lines, ""]))
    return str(folder)


def test_all_devices_are_listed_without_opening_one(tmp_path: Path) -> None:
    sda = device(
        tmp_path,
        "sda",
        "8:0",
        1 << 20,
        queue__logical_block_size="4096",
        queue__physical_block_size="4096",
    )
    device(tmp_path, "sda/sda1", "8:1", 1 << 19, partition="1", start="2048")
    device(tmp_path, "loop0", "7:0", 0)
    device(tmp_path, "zram0", "253:9", 1 << 20)
    device(tmp_path, "nvme0c0n1", "259:9", 1 << 20, hidden="1")
    device(tmp_path, "dm-0", "254:0", 1 << 10, dm__uuid="DMREMAP-11", dm__name="ours")
    crypt = device(tmp_path, "dm-1", "254:1", 1 << 10, dm__uuid="LVM-x", dm__name="vg-a")
    (crypt / "dm/suspended").write_text("1\n")
    (sda / "sda1/holders").mkdir()
    (sda / "sda1/holders/dm-1").symlink_to(crypt)
    hardware = {"ID_SERIAL_SHORT": "S1", "ID_SERIAL": "M_S1", "ID_WWN": "0x5", "ID_MODEL": "M"}
    known_to_udev(tmp_path, "8:0", **hardware, ID_PART_TABLE_UUID="t", ID_PART_TABLE_TYPE="gpt")
    udev = known_to_udev(tmp_path, "8:1", **hardware, ID_PART_ENTRY_UUID="p", ID_FS_UUID="f")
    listed = {d.info.path: d for d in blockdev.list_devices("DMREMAP-", str(tmp_path), udev)}
    assert sorted(listed) == ["/dev/dm-1", "/dev/sda", "/dev/sda1"]
    whole, part = listed["/dev/sda"].info, listed["/dev/sda1"].info
    assert (whole.sectors, whole.logical_block, whole.serial) == (1 << 20, 4096, "S1")
    assert (whole.partition, whole.table_uuid, whole.disk) == (0, "t", "8:0")
    assert (part.partition, part.partuuid, part.start, part.disk) == (1, "p", 2048, "8:0")
    assert (part.logical_block, part.fs_uuid, part.serial, part.wwn) == (4096, "f", "S1", "0x5")
    assert [str(use) for use in whole.used_by] == ["sda1 is held by vg-a"]
    assert [str(use) for use in part.used_by] == ["sda1 is held by vg-a"]
    assert listed["/dev/sda1"].holders == ("254:1",)
    assert (listed["/dev/dm-1"].info.volume, listed["/dev/dm-1"].suspended) == ("LVM-x", True)
    assert compare(of_info(whole), of_info(part)).verdict is Verdict.OTHER_PART


def test_an_attachment_is_the_disks_and_udevs_news_have_a_time(tmp_path: Path) -> None:
    disk = device(tmp_path, "sda", "8:0", 1 << 20, diskseq="7")
    device(tmp_path, "sda/sda1", "8:1", 1 << 19, partition="1", diskseq="")
    udev = known_to_udev(tmp_path, "8:1")
    os.utime(tmp_path / "udev/b8:1", ns=(5, 5))
    first, changed = blockdev.attachment_of("8:1", str(tmp_path), udev)
    assert changed == 5
    assert "I:12345" in first
    assert blockdev.attachment_of("8:1", str(tmp_path), udev) == (first, 5)
    (disk / "diskseq").write_text("8\n")
    assert blockdev.attachment_of("8:1", str(tmp_path), udev)[0] != first
    assert blockdev.attachment_of("8:0", str(tmp_path), udev)[1] == 0
