# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From device-mapper's tables to the targets and their disks."""

from __future__ import annotations

import uuid

from dm_remap.devmapper import MappedDevice, Segment
from dm_remap.inventory import backed_up_generation, guarded_targets

TARGET_ID = uuid.UUID(int=5)


def mapped(name, dm_uuid, minor, live=True):
    return MappedDevice(name, dm_uuid, 253, minor, False, 1, live, False)


class FakeTables:
    def __init__(self, *devices):
        self.devices = {device.name: (device, table) for device, table in devices}

    def names(self):
        return [*self.devices, "vanished"]

    def info(self, name):
        return self.devices[name][0] if name in self.devices else None

    def table(self, name):
        return self.devices[name][1]


def guarded(*devices, disks=None):
    return guarded_targets(
        FakeTables(*devices),
        "DMREMAP-",
        disk_of=lambda devno: (disks or {}).get(devno, (devno, 0)),
        requests=lambda devno: not devno.startswith("253"),
        generation_of=lambda target: 9 if target == TARGET_ID else 0,
    )


def target(*segments, name="data"):
    return mapped(name, f"DMREMAP-{TARGET_ID.hex}", 0), list(segments)


SPARE = (
    mapped("data-spare0", f"DMREMAP-{TARGET_ID.hex}-spare0", 1),
    [Segment(0, 4096, "integrity", "253:2 0 4 J 0")],
)


def test_a_target_is_found_with_its_disk_and_what_main_still_serves():
    (found,) = guarded(
        target(
            Segment(0, 128, "linear", "8:17 0"),
            Segment(128, 128, "linear", "253:1 0"),
            Segment(256, 768, "linear", "8:17 256"),
        ),
        SPARE,
        disks={"8:17": ("8:16", 2048)},
    )
    assert (found.name, found.uuid, found.main) == ("data", TARGET_ID, "8:17")
    assert (found.disk, found.start, found.sectors) == ("8:16", 2048, 1024)
    assert found.live == ((0, 128), (256, 768))
    assert found.request_based
    assert found.generation == 9


def test_a_spare_chunk_at_the_same_offset_is_not_taken_for_main():
    (found,) = guarded(
        target(Segment(0, 128, "linear", "253:1 0"), Segment(128, 128, "linear", "8:16 128")),
        SPARE,
    )
    assert found.main == "8:16"
    assert found.live == ((128, 128),)


def test_a_target_whose_main_serves_nothing_has_no_disk_to_watch():
    assert guarded(target(Segment(0, 128, "linear", "253:1 0")), SPARE) == []


def test_a_missing_spare_does_not_hide_the_target():
    (found,) = guarded(target(Segment(0, 128, "error", ""), Segment(128, 64, "linear", "8:16 128")))
    assert found.live == ((128, 64),)


def test_a_main_made_of_bios_is_known_as_such():
    (found,) = guarded(target(Segment(0, 128, "linear", "253:7 0")))
    assert not found.request_based


def test_other_peoples_devices_and_inactive_targets_are_left_out():
    assert (
        guarded(
            (mapped("root", "LVM-abc", 3), [Segment(0, 8, "linear", "8:0 0")]),
            (mapped("off", f"DMREMAP-{TARGET_ID.hex}", 4, live=False), []),
        )
        == []
    )


def test_the_generation_comes_from_the_newest_backup(tmp_path):
    folder = tmp_path / str(TARGET_ID)
    folder.mkdir()
    for name in ("00000000000000000007.slot", "00000000000000000012.slot", "13.slot.new", "x.slot"):
        (folder / name).touch()
    assert backed_up_generation(str(tmp_path), TARGET_ID) == 12
    assert backed_up_generation(str(tmp_path), uuid.UUID(int=6)) == 0
