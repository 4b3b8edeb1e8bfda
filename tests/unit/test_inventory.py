# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From device-mapper's tables to the targets and their disks."""

from __future__ import annotations

import re
import uuid

from hypothesis import given
from hypothesis import strategies as st

from dm_remap import stack
from dm_remap.devmapper import MappedDevice, Segment
from dm_remap.format import Extent
from dm_remap.inventory import Kept, guarded_targets
from dm_remap.mapping import build_table

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

    def dependencies(self, name):
        words = [word for segment in self.table(name) for word in segment.params.split()]
        return list(dict.fromkeys(word for word in words if re.fullmatch(r"\d+:\d+", word)))


def guarded(*devices, disks=None, kept=lambda target, active: Kept()):
    return guarded_targets(
        FakeTables(*devices),
        "DMREMAP-",
        disk_of=lambda devno: (disks or {}).get(devno, (devno, 0)),
        requests=lambda devno: not devno.startswith("253"),
        kept=kept,
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


CHUNK, CHUNKS = 8, 12
SECTORS = CHUNKS * CHUNK - 3
NUMBERS = {
    "": 0,
    "-hold": 1,
    "-map": 2,
    "-shim": 3,
    "-frozen": 4,
    "-place": 5,
    "-spare0": 6,
    "-new": 7,
}
DEVNO = {role: f"253:{minor}" for role, minor in NUMBERS.items()}


def layered(where, hold, shim, copied=None):
    """The devices of a target whose chunks are where the list says, as the engine makes them.

    With `copied` its main is being replaced by 8:33, which has so many chunks.
    """
    extents = [
        Extent(logical=c, length=1, spare=0, physical=20 + c)
        for c, place in enumerate(where)
        if place == "spare"
    ]
    moving = [c for c, place in enumerate(where) if place == "moving"]
    upper_main = DEVNO["-shim"] if shim else "8:17"
    table = build_table(
        SECTORS,
        CHUNK,
        upper_main,
        extents,
        {0: DEVNO["-spare0"]},
        {chunk: position for position, chunk in enumerate(moving)},
        DEVNO["-frozen"],
        (copied or 0) * CHUNK,
        DEVNO["-new"],
    )
    if shim:
        table.append(Segment(SECTORS, stack.CARRIER_SECTORS, "linear", "8:17 0"))
    nowhere = [("", 0, CHUNK) for _chunk in moving]
    parts = {
        "-spare0": [Segment(0, 4096, "integrity", "253:9 0 - J 0")],
        "-frozen": stack.frozen_table(len(moving) * CHUNK or 8, DEVNO["-place"], 1000),
        "-place": stack.place_table(nowhere, "8:17"),
        "": table,
    }
    if copied is not None:
        parts["-new"] = stack.whole_table(SECTORS, "8:33")
    if shim:
        parts["-shim"] = stack.shim_table(SECTORS, "8:17")
    if hold:
        parts["-map"] = table
        parts["-hold"] = stack.hold_table(SECTORS, DEVNO["-map"])
        parts[""] = stack.whole_table(SECTORS, DEVNO["-hold"])
    return [
        (mapped("data" + role, f"DMREMAP-{TARGET_ID.hex}{role}", NUMBERS[role]), segments)
        for role, segments in parts.items()
    ]


@given(
    where=st.lists(st.sampled_from(["main", "spare", "moving"]), min_size=CHUNKS, max_size=CHUNKS),
    hold=st.booleans(),
    shim=st.booleans(),
    copied=st.none() | st.integers(0, CHUNKS),
)
def test_a_target_is_looked_through_whatever_stands_between_it_and_main(where, hold, shim, copied):
    disks = {"8:17": ("8:16", 2048), "8:33": ("8:32", 64)}
    found = guarded(*layered(where, hold, shim, copied), disks=disks)

    def live(main):
        """A moving chunk may be on either."""
        return {
            sector
            for chunk, place in enumerate(where)
            if place == "moving"
            or (place == "main" and (chunk < (copied or 0)) == (main == "8:33"))
            for sector in range(chunk * CHUNK, min((chunk + 1) * CHUNK, SECTORS))
        }

    mains = ["8:17"] if copied is None else ["8:17", "8:33"]
    assert [target.main for target in found] == [main for main in mains if live(main)]
    for target in found:
        assert (target.disk, target.start) == disks[target.main]
        assert (target.name, target.sectors) == ("data", SECTORS)
        assert target.on_error == ("hold" if hold else "fail")
        served = {s for start, count in target.live for s in range(start, start + count)}
        assert served == live(target.main)
        assert list(target.live) == sorted(target.live)


def test_parts_of_another_target_are_not_taken_for_its_own():
    """Names say nothing, the uuid does."""
    other = uuid.UUID(int=6)
    devices = layered(["main"] * CHUNKS, hold=True, shim=False)
    stray = (mapped("data2-map", f"DMREMAP-{other.hex}-map", 20), [])
    (found,) = guarded(*devices, stray)
    assert found.main == "8:17"


def test_what_is_kept_is_asked_for_with_the_spares_that_are_there():
    asked = []

    def kept(target, active):
        asked.append((target, set(active)))
        return Kept(12)

    devices = layered(["main"] * CHUNKS, hold=True, shim=True)
    (found,) = guarded(*devices, kept=kept)
    assert asked == [(TARGET_ID, {0})]
    assert found.kept == Kept(12)
