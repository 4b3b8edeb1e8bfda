# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which devices are hidden: the table of cases in docs/boot.md, and what udev's rule is told."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import re
import subprocess
import sys
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from dm_remap import blockdev, discovery, first_look, hiding
from dm_remap.blockdev import DeviceInfo, Use, announce, doubt_about, info_in_event, is_held
from dm_remap.cli.framework import Host, run
from dm_remap.cli.programs import PROGRAMS
from dm_remap.discovery import Found
from dm_remap.discovery import Host as DiscoveryHost
from dm_remap.errors import Refused
from dm_remap.fingerprint import of_info
from dm_remap.format import Metadata, pack_slot, slot_sectors_of
from dm_remap.hiding import Known, Mains, Role, properties_of, role_of
from dm_remap.marks import UUID_PREFIX
from tests.unit.copy_scene import SIZE, SPARES, TARGET
from tests.unit.test_discovery import MAIN, MAIN_SECTORS, disk_info, first, seen

ROOT = Path(__file__).resolve().parents[2]
DOC = ROOT / "docs" / "boot.md"
RULES = ROOT / "roles" / "host" / "files" / "63-storage-dm-remap.rules"
KNOWN = (Known(TARGET, "data", (of_info(MAIN),)),)
MOUNTED = Use("sda", "mounted on", "/srv")
NAMELESS = replace(MAIN, serial="", model="")


@dataclass(frozen=True)
class Case:
    """What is seen of a device, and what is known of mains."""

    info: DeviceInfo
    carries: bool = False
    part_of: str = ""
    known: tuple[Known, ...] = KNOWN


def with_main(info: DeviceInfo) -> tuple[Known, ...]:
    return (Known(TARGET, "data", (of_info(info),)),)


BLANK = disk_info(1)
PART = replace(MAIN, path="/dev/sda2", devno="8:2", partition=2, start=2048, sectors=4096)
CASES = {
    "a whole header of a copy, and nothing else": Case(BLANK, carries=True),
    "a header, and a file system of somebody since": Case(
        replace(BLANK, fs_type="ext4"), carries=True
    ),
    "a header, and a partition table since": Case(replace(BLANK, table_type="gpt"), carries=True),
    "a damaged header": Case(BLANK),
    "the hardware of a known main": Case(MAIN),
    "a known main, formatted anew": Case(replace(MAIN, fs_type="xfs", fs_uuid="fs-2")),
    "a known main without serial number": Case(NAMELESS, known=with_main(NAMELESS)),
    "as large as a known main, with the same file system": Case(
        replace(disk_info(5, MAIN_SECTORS), fs_type="ext4", fs_uuid="fs-1")
    ),
    "the hardware of a known main, with another size": Case(
        replace(MAIN, sectors=MAIN_SECTORS * 2)
    ),
    "the disk of a known main that is a partition": Case(MAIN, known=with_main(PART)),
    "a partition of a hidden disk": Case(PART, part_of=hiding.MAIN),
    "a known main that is mounted": Case(replace(MAIN, used_by=(MOUNTED,))),
    "a known main that is mounted, and was hidden before": Case(
        replace(MAIN, used_by=(MOUNTED,), hidden="main")
    ),
    "a known main in use by its target": Case(
        replace(MAIN, used_by=(Use("sda", "held by", "data", f"{UUID_PREFIX}{TARGET.hex}"),))
    ),
    "a known main that became a spare": Case(replace(MAIN, fs_type="", fs_uuid=""), carries=True),
    "a disk that nobody knows": Case(disk_info(6)),
}


def decided(case: Case) -> Role:
    return role_of(case.info, TARGET if case.carries else None, case.known, case.part_of)


def documented() -> dict[str, str]:
    section = DOC.read_text().partition("## What is hidden")[2].partition("### ")[0]
    section = section[section.index("| case |") :]
    rows = re.findall(r"^\| (.+?) \| (.*?) ?\| .+ \|$", section, re.MULTILINE)
    return {name: kind.strip() for name, kind in rows[2:]}


def test_the_documented_cases_are_those_that_are_tested() -> None:
    found = {name: decided(case).kind for name, case in CASES.items()}
    assert found["a partition of a hidden disk"] == "main"
    found["a partition of a hidden disk"] = "as the disk"
    assert found == documented()


@pytest.mark.parametrize("name", CASES)
def test_a_role_says_why(name: str) -> None:
    role = decided(CASES[name])
    assert role.reason
    assert bool(role.target) == bool(role.kind and not CASES[name].part_of)


def test_a_main_is_hidden_only_by_proof() -> None:
    """Whatever part of the main's identity a device has, only the hardware hides it."""
    fields = ("serial", "model", "fs_type", "fs_uuid", "sectors", "logical_block")
    other = replace(
        MAIN, serial="x-9", model="Y", fs_type="xfs", fs_uuid="z", sectors=99, logical_block=4096
    )
    for taken in itertools.product((False, True), repeat=len(fields)):
        own = {name: getattr(MAIN, name) for name, take in zip(fields, taken) if take}
        seen = replace(other, **own)
        hardware = {"serial", "model", "sectors", "logical_block"}
        assert bool(decided(Case(seen)).kind) == (hardware <= own.keys()), own


def test_each_main_of_a_replacement_is_hidden() -> None:
    new = disk_info(7, MAIN_SECTORS)
    known = (Known(TARGET, "data", (of_info(MAIN), of_info(new))),)
    assert decided(Case(MAIN, known=known)).kind == "main"
    assert decided(Case(new, known=known)).kind == "main"


def test_links_by_content_are_left_out() -> None:
    links = ["/dev/disk/by-uuid/1", "/dev/disk/by-id/a", "disk/by-label/b", "/dev/disk/by-path/c"]
    told = properties_of(Role("main", "t"), links)
    assert told == {
        "DM_REMAP_ROLE": "main",
        "DM_REMAP_TARGET": "t",
        "DM_REMAP_LINKS": "disk/by-id/a disk/by-path/c",
    }


# What is kept


def test_mains_are_kept_and_forgotten(tmp_path: Path) -> None:
    mains = Mains(str(tmp_path / "mains"))
    assert mains.all() == []
    other = Known(uuid.UUID(int=1), "logs", (of_info(disk_info(3)), of_info(disk_info(4))))
    mains.set([*KNOWN, other])
    assert mains.all() == sorted([*KNOWN, other], key=lambda known: known.target)
    before = {path.name: path.stat().st_ino for path in (tmp_path / "mains").iterdir()}
    mains.set([*KNOWN, other])
    assert before == {path.name: path.stat().st_ino for path in (tmp_path / "mains").iterdir()}
    mains.set(KNOWN)
    assert mains.all() == [*KNOWN]
    assert len(list((tmp_path / "mains").iterdir())) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"name": "x", "mains": 5}', "\x00"])
def test_what_cannot_be_read_hides_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / f"{TARGET}.json").write_text(text)
    (tmp_path / "readme.json").write_text("{}")
    (tmp_path / "other").write_text("{}")
    assert Mains(str(tmp_path)).all() == []
    assert not first_look.may_be_main(5, [str(tmp_path), "/nowhere"])


# What udev's rule asks


@dataclass
class Device:
    """A disk with a folder in sysfs, as an event of udev tells of it."""

    folder: Path
    sectors: int = SIZE
    devno: str = "8:16"

    def __post_init__(self) -> None:
        place = self.folder / "sys" / "dev" / "block" / self.devno
        (place / "queue").mkdir(parents=True)
        for name, value in {
            "size": self.sectors,
            "dev": self.devno,
            "ro": 0,
            "queue/logical_block_size": 512,
            "queue/physical_block_size": 512,
        }.items():
            (place / name).write_text(f"{value}\n")
        with self.image.open("wb") as file:
            file.truncate(self.sectors * 512)

    @property
    def image(self) -> Path:
        return self.folder / "disk"

    @property
    def sysfs(self) -> str:
        return str(self.folder / "sys")

    def event(self, **properties: str) -> dict[str, str]:
        major, _colon, minor = self.devno.partition(":")
        return {
            "DEVNAME": str(self.image),
            "MAJOR": major,
            "MINOR": minor,
            "DEVLINKS": "/dev/disk/by-id/x /dev/disk/by-uuid/u",
            **properties,
        }

    def put(self, metadata: Metadata, *indexes: int) -> None:
        """Write copies of the metadata."""
        places = slot_sectors_of(self.sectors)
        with self.image.open("r+b") as file:
            for index in indexes:
                file.seek(places[index] * 512)
                file.write(pack_slot(metadata, SPARES[0], self.sectors, copy_index=index))

    def look(self, known: tuple[Known, ...] = (), **properties: str) -> dict[str, str]:
        folder = self.folder / "mains"
        Mains(str(folder)).set(known)
        return dict(first_look.look(self.event(**properties), [str(folder)], self.sysfs))


@pytest.mark.parametrize("index", range(7))
def test_any_one_copy_makes_a_spare(tmp_path: Path, index: int) -> None:
    device = Device(tmp_path)
    device.put(first(), index)
    found = device.look()
    assert found["DM_REMAP_ROLE"] == "spare"
    assert found["DM_REMAP_TARGET"] == str(TARGET)
    assert found["DM_REMAP_LINKS"] == "disk/by-id/x"


@pytest.mark.parametrize(
    "properties",
    [{"ID_FS_TYPE": "ext4"}, {"ID_PART_TABLE_TYPE": "gpt"}],
    ids=lambda p: next(iter(p)),
)
def test_a_spare_that_was_used_for_something_else_is_shown(
    tmp_path: Path, properties: dict[str, str]
) -> None:
    device = Device(tmp_path)
    device.put(first(), *range(7))
    assert device.look(**properties) == {}


def test_a_damaged_header_is_no_spare(tmp_path: Path) -> None:
    device = Device(tmp_path)
    device.put(first(), 0)
    with device.image.open("r+b") as file:
        file.seek(100)
        file.write(b"?")
    assert device.look() == {}


def test_a_small_device_is_not_read(tmp_path: Path) -> None:
    device = Device(tmp_path, sectors=2048)
    device.image.unlink()
    assert device.look() == {}


def test_a_known_main_is_hidden(tmp_path: Path) -> None:
    device = Device(tmp_path, MAIN_SECTORS)
    own = {"ID_SERIAL_SHORT": MAIN.serial, "ID_MODEL": MAIN.model, "ID_FS_TYPE": "ext4"}
    found = device.look(KNOWN, **own)
    assert (found["DM_REMAP_ROLE"], found["DM_REMAP_TARGET"]) == ("main", str(TARGET))
    assert device.look((), **own) == {}
    assert device.look(KNOWN, **{**own, "ID_SERIAL_SHORT": "another"}) == {}


def test_a_known_main_that_cannot_be_opened_is_hidden(tmp_path: Path) -> None:
    """A disk that spins up, or fails, may be read by the time that it is mounted."""
    device = Device(tmp_path, MAIN_SECTORS)
    device.image.unlink()
    own = {"ID_SERIAL_SHORT": MAIN.serial, "ID_MODEL": MAIN.model}
    assert device.look(KNOWN, **own)["DM_REMAP_ROLE"] == "main"
    assert device.look(KNOWN, ID_SERIAL_SHORT="another") == {}


def test_partitions_are_hidden_with_their_disk(tmp_path: Path) -> None:
    device = Device(tmp_path, 2048)
    assert device.look(DM_REMAP_PART="main", ID_FS_TYPE="ext4")["DM_REMAP_ROLE"] == "main"


def test_an_unknown_disk_costs_no_more_than_the_start(tmp_path: Path) -> None:
    """What most disks are is found out without the rest of the core."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from dm_remap import first_look; "
        "assert first_look.look(eval(sys.argv[2]), [], sys.argv[3]) == {}; "
        "print(*sorted(name for name in sys.modules if name.startswith('dm_remap.')))"
    )
    device = Device(tmp_path)
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "dm_remap").symlink_to(ROOT / "plugins" / "module_utils")
    done = subprocess.run(
        [
            *(sys.executable, "-ISB", "-c", program, str(tmp_path / "path")),
            *(repr(device.event()), device.sysfs),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["dm_remap.first_look", "dm_remap.marks"]


def test_what_udev_forbids_its_programs_is_not_needed(tmp_path: Path) -> None:
    """udev's service may not make memory executable, which importing ctypes can need."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.modules['ctypes'] = None; "
        "from dm_remap import first_look, hiding, format"
    )
    (tmp_path / "dm_remap").symlink_to(ROOT / "plugins" / "module_utils")
    subprocess.run([sys.executable, "-ISB", "-c", program, str(tmp_path)], check=True)


def run_main(monkeypatch: pytest.MonkeyPatch, event: dict[str, str]) -> int:
    monkeypatch.setattr(first_look.os, "environ", event)
    return first_look.main()


def test_a_failure_keeps_what_was_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    event = {"DEVNAME": "/dev/x", "MAJOR": "8", "MINOR": "9999", "DEVLINKS": "/dev/disk/by-id/x"}
    assert run_main(monkeypatch, event) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "/dev/x" in shown.err
    hidden = {"DM_REMAP_ROLE": "main", "DM_REMAP_TARGET": "t", "DM_REMAP_LINKS": "disk/by-id/x"}
    assert rule(hidden, None) == ("dm_remap_hide", hidden)
    assert rule({}, None) == ("dm_remap_end", {})


def rule(db: dict[str, str], told: str | None) -> tuple[str, dict[str, str]]:
    """Where the rule's lines about the program lead, and the properties then.

    Args:
        db: udev's database.
        told: what the program prints; None if it fails.
    """
    text = RULES.read_text()
    lines = text[text.index('IMPORT{db}="DM_REMAP_ROLE"') :].splitlines()
    env: dict[str, str] = {}
    for line in (line for line in lines if line and not line.startswith("#")):
        for key, name, operator, value in re.findall(r'(\w+)(?:{(\w+)})?(==|=)"(.*?)"', line):
            if key == "GOTO":
                return value, {name: value for name, value in env.items() if value}
            if key == "IMPORT" and name == "db":
                env[value] = db.get(value, "")
            elif key == "IMPORT":
                env.update(pair.split("=", 1) for pair in (told or "").splitlines())
            elif operator == "=":
                env[name] = value
            elif env.get(name) not in value.split("|"):
                break
    raise AssertionError("the rule leads nowhere")


def test_what_is_not_hidden_any_more_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(first_look, "look", lambda _event: {})
    assert run_main(monkeypatch, {}) == 0
    hidden = {"DM_REMAP_ROLE": "main", "DM_REMAP_TARGET": "t", "DM_REMAP_LINKS": "disk/by-id/x"}
    assert rule(hidden, capsys.readouterr().out) == ("dm_remap_end", {})
    told = {**hidden, "DM_REMAP_ROLE": "spare"}
    monkeypatch.setattr(first_look, "look", lambda _event: told)
    assert run_main(monkeypatch, {}) == 0
    assert rule(hidden, capsys.readouterr().out) == ("dm_remap_hide", told)


# The rule


def test_the_rule_and_the_core_have_the_same_words() -> None:
    text = RULES.read_text()
    told = properties_of(Role("main", "t"), [])
    assert set(told) <= set(re.findall(r"DM_REMAP_[A-Z]+", text)) | {"DM_REMAP_TARGET"}
    assert f'"{UUID_PREFIX}{"?" * 32}"' in text
    assert f'"{UUID_PREFIX}*"' in text
    own = of_info(replace(MAIN, fs_type="dm_remap_main"))
    assert own.fs_type == ""


def test_what_is_hidden_is_still_known_by_its_content(tmp_path: Path) -> None:
    device = Device(tmp_path)
    shown = {"ID_FS_TYPE": "ext4", "ID_FS_UUID": "fs-1"}
    hidden = {
        "ID_FS_TYPE": "dm_remap_main",
        "DM_REMAP_FS_TYPE": "ext4",
        "DM_REMAP_FS_UUID": "fs-1",
        "DM_REMAP_ROLE": "main",
    }
    before = info_in_event(device.event(**shown), device.sysfs)
    after = info_in_event(device.event(**hidden), device.sysfs)
    assert (before.hidden, after.hidden) == ("", "main")
    assert of_info(before) == of_info(after)
    assert of_info(before).fs_uuid == "fs-1"
    assert dataclasses.replace(after, hidden="") == before


# Small questions about devices


def test_a_device_that_udev_does_not_know_is_doubtful(tmp_path: Path) -> None:
    assert doubt_about("8:0", str(tmp_path)) == "is not known to udev yet"
    (tmp_path / "b8:0").write_text("I:5\nE:ID_SERIAL=x\n")
    assert doubt_about("8:0", str(tmp_path)) == ""
    (tmp_path / "b8:0").write_text("I:5\nE:DM_MULTIPATH_DEVICE_PATH=1\n")
    assert "multipath" in doubt_about("8:0", str(tmp_path))


def sysfs_disk(folder: Path) -> Path:
    disk = folder / "dev" / "block" / "8:0"
    for place in (disk, disk / "sda1", disk / "queue"):
        place.mkdir(parents=True)
    for place in (disk, disk / "sda1"):
        (place / "uevent").write_text("")
    (disk / "sda1" / "partition").write_text("1")
    return disk


def test_a_device_is_announced_with_its_partitions(tmp_path: Path) -> None:
    disk = sysfs_disk(tmp_path)
    announce("8:0", str(tmp_path))
    assert (disk / "uevent").read_text() == "change"
    assert (disk / "sda1" / "uevent").read_text() == "change"
    announce("8:99", str(tmp_path))


def test_a_device_is_held_by_our_mapped_devices_only(tmp_path: Path) -> None:
    disk = sysfs_disk(tmp_path)
    assert not is_held("8:0", UUID_PREFIX, str(tmp_path))
    for name, volume in (("dm-0", "LVM-x"), ("dm-1", f"{UUID_PREFIX}{TARGET.hex}-spare0-data")):
        (disk / "holders" / name / "dm").mkdir(parents=True)
        (disk / "holders" / name / "dm" / "uuid").write_text(volume)
        assert is_held("8:0", UUID_PREFIX, str(tmp_path)) == (name == "dm-1")


def test_a_mounted_btrfs_uses_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number that mountinfo has of it is of no device."""
    (tmp_path / "mountinfo").write_text(
        "25 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        "26 25 0:45 /sub /srv rw shared:2 master:1 - btrfs /dev/sdb rw,subvol=/sub\n"
        "27 25 0:46 / /gone rw - btrfs /dev/sdx rw\n"
        "28 25 0:5 / /dev rw - devtmpfs udev rw\n"
    )

    def devno_of(path: str) -> str:
        if path != "/dev/sdb":
            raise Refused("no such device")
        return "8:16"

    monkeypatch.setattr(blockdev, "devno_of", devno_of)
    found = blockdev._mounts(str(tmp_path / "mountinfo"))
    assert found == {"8:1": ["/"], "8:16": ["/srv"], "0:46": ["/gone"], "0:5": ["/dev"]}


# The command


def run_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *found: Found) -> tuple[int, Any]:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    Mains(str(tmp_path / "mains")).set(KNOWN)
    monkeypatch.setattr(discovery, "observe", lambda *_sources: DiscoveryHost(found))
    out = io.StringIO()
    host = Host(
        mapper=Mock(),
        mains=[str(tmp_path / "mains")],
        stdout=out,
        stderr=io.StringIO(),
    )
    code = run(PROGRAMS["dm-remap"], ["hidden", "--json"], host)
    return code, json.loads(out.getvalue())["devices"]


def test_the_command_tells_what_is_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [
        seen(replace(MAIN, hidden="main")),
        seen(replace(PART, disk=MAIN.devno)),
        seen(disk_info(6)),
    ]
    code, told = run_hidden(tmp_path, monkeypatch, *devices)
    assert [(one["path"], one["role"], one["hidden"]) for one in told] == [
        (MAIN.path, "main", "main"),
        (PART.path, "main", ""),
    ]
    assert told[0]["target"] == "data"
    # The partition is still shown.
    assert code == 4
    assert run_hidden(tmp_path, monkeypatch, devices[0], devices[2])[0] == 0
