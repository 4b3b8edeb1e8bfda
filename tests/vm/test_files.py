# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Lost sectors of real targets and the files that they belonged to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.lab import Disk, Machine
from tests.vm.guest import Guest
from tests.vm.partitions import write_dos

NAME = "filed"
SIZE = 384 << 20
PART = (2048, (SIZE - (2 << 20)) // 512)
MOUNT = "/mnt/files"
VICTIM = [b"the victim", b"sub/deep/new\nline \xff\\"]
SHOWN = ["sub/deep/new\\x0aline \\xff\\\\", "the victim"]
SHARED = b"shared"


@pytest.fixture
def guest(lab: Machine) -> Guest:
    """The clean guest with a disk that xfs finds large enough."""
    lab.attach(Disk("large", size=SIZE))
    return Guest(lab)


def make(
    guest: Guest, place: Path, filesystem: str, partitioned: bool, mounted: bool
) -> dict[str, Any]:
    target = {"name": NAME, "main": guest.path("large"), "spares": [guest.path("spare")]}
    guest.call("prepare", targets=[{**target, "seed": 1, "sectors": 0}])
    disk = place / "disk"
    disk.write_bytes(bytes(512))
    write_dos(disk, [PART])
    done: dict[str, Any] = guest.call(
        "file_scene",
        name=NAME,
        filesystem=filesystem,
        start=PART[0] if partitioned else 0,
        sectors=PART[1],
        table=disk.read_bytes().hex(),
        mounted=mounted,
        names=[name.hex() for name in VICTIM],
        shared=SHARED.hex() if filesystem != "ext4" else "",
    )
    assert len(done["victim"]) == 64
    return done


def lose(guest: Guest, sectors: list[int]) -> list[dict[str, Any]]:
    """Lose the sectors; what is told of the files."""
    guest.machine.disk("large").fail([(sector, 1) for sector in sectors], op="read")
    ranges = [(sector, 1) for sector in sectors]
    report = guest.call("find_files", name=NAME, ranges=ranges, seconds=240)
    assert sum(item["count"] for item in report["lost"]) == len(sectors)
    assert report["loops"] == [], "the look-up leaves nothing behind"
    told: list[dict[str, Any]] = report["lost_files"]
    return told


def expect_victim(told: list[dict[str, Any]], sector: int, filesystem: str, **more: Any) -> None:
    here = [item for item in told if item["start"] == sector]
    front = f"{MOUNT}/" if more.pop("mounted") else ""
    expected = [[front + name for name in SHOWN]]
    if filesystem != "ext4":
        expected.append([front + SHARED.decode()])
    assert [item["paths"] for item in here] == expected, str(told)
    for item in here:
        assert (item["count"], item["kind"], item["reason"]) == (1, "file", "")
        assert item["filesystem"] == filesystem.partition("-")[0]
        assert item["partition"] == more["partition"]


@pytest.mark.parametrize("mounted", [True, False], ids=["mounted", "unmounted"])
@pytest.mark.parametrize("partitioned", [False, True], ids=["whole", "partition"])
@pytest.mark.parametrize("filesystem", ["ext4", "xfs", "xfs-rmapbt"])
@pytest.mark.core
@pytest.mark.soak
def test_a_lost_sector_names_its_file(
    guest: Guest, tmp_path: Path, filesystem: str, partitioned: bool, mounted: bool
) -> None:
    scene = make(guest, tmp_path, filesystem, partitioned, mounted)
    victim, other = scene["victim"][20], scene["inodes"]["filler100"]
    told = lose(guest, [victim, other])
    expect_victim(told, victim, filesystem, mounted=mounted, partition=int(partitioned))
    # An inode between others: it is metadata, or it cannot be told because just it is lost.
    (item,) = [item for item in told if item["start"] == other]
    assert item["kind"] in ("metadata", "unknown"), str(told)
    assert item["kind"] == "metadata" or (item["reason"] and filesystem == "xfs"), str(told)
