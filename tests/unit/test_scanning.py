# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A scan reads each sector of a target where it is, and names just those that cannot be read."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dm_remap.cli import scan as scan_command
from dm_remap.errors import DmRemapError
from dm_remap.extents import merge
from dm_remap.format import Extent, LostRange
from dm_remap.scanning import Finding, Stretch, scan, stretches
from tests.unit.cli_scene import Desk, be_root_at_a_known_time
from tests.unit.test_engine import NAME, lose_on_spare, make_scene

CHUNK = 8


@dataclass
class Device:
    """Sectors that can be read, but for some."""

    sectors: int
    bad: set[int] = field(default_factory=set)
    weak: set[int] = field(default_factory=set)
    code: int = errno.EIO
    name: str = "/dev/device"
    read_sectors: set[int] = field(default_factory=set)

    def read(self, sector: int, count: int) -> bytes:
        assert 0 <= sector < sector + count <= self.sectors
        touched = set(range(sector, sector + count))
        self.read_sectors |= touched
        if touched & self.weak:
            self.weak -= touched
            raise OSError(self.code, os.strerror(self.code))
        if touched & self.bad:
            raise OSError(self.code, os.strerror(self.code))
        return bytes(512 * count)


@st.composite
def targets(draw: st.DrawFn) -> Any:
    """A target's size, extents and lost ranges."""
    chunks = draw(st.integers(1, 12))
    total = chunks * CHUNK - draw(st.sampled_from([0, 1, 7]))
    free = {spare: list(range(30)) for spare in (0, 1)}
    moved = draw(st.sets(st.integers(0, chunks - 1)))
    extents = merge(
        Extent(chunk, 1, spare, free[spare].pop(draw(st.integers(0, 9))))
        for chunk in sorted(moved)
        for spare in [draw(st.sampled_from([0, 1]))]
    )
    lost = draw(st.sets(st.integers(0, total - 1)))
    config = {"chunk_sectors": CHUNK, "main": {"sectors": total}}
    return SimpleNamespace(
        config=config, extents=extents, lost=[LostRange(sector, 1) for sector in sorted(lost)]
    )


def place_by_hand(target: Any, sector: int) -> tuple[int | None, int]:
    """Where a sector is."""
    for extent in target.extents:
        first = sector // CHUNK - extent.logical
        if 0 <= first < extent.length:
            return extent.spare, (extent.physical + first) * CHUNK + sector % CHUNK
    return None, sector


@given(targets(), st.data())
def test_each_sector_is_read_once_where_it_is(target: Any, data: st.DataObject) -> None:
    total = target.config["main"]["sectors"]
    first = data.draw(st.integers(0, total - 1))
    lost = {one.sector for one in target.lost}
    found = [
        (place.start + number, place.spare, place.position + number)
        for place in stretches(target, first)
        for number in range(place.count)
    ]
    expected = []
    for sector in range(first, total):
        spare, position = place_by_hand(target, sector)
        # Main has no errors of its own making.
        if spare is None or sector not in lost:
            expected.append((sector, spare, position))
    assert found == expected


def unit_of(sector: int, unit: int) -> set[int]:
    """The sectors that fail together with one."""
    first = sector // unit * unit
    return set(range(first, first + unit))


@given(
    st.integers(1, 200),
    st.sets(st.integers(0, 199)),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([8, 16, 64]),
    st.integers(0, 3),
)
def test_just_the_units_with_bad_sectors_are_found(
    sectors: int, bad: set[int], unit: int, stride: int, shift: int
) -> None:
    sectors = max(unit, sectors // unit * unit)
    bad = {sector for sector in bad if sector < sectors}
    device = Device(sectors, bad)
    place = Stretch(start=shift * 1000, count=sectors, spare=None, position=0)
    steps = list(scan([place], lambda spare: device, lambda spare: unit, stride))
    found = {
        finding.start + number - shift * 1000
        for step in steps
        for finding in step.findings
        for number in range(finding.count)
    }
    assert found == {
        s for sector in bad for s in range(sector // unit * unit, sector // unit * unit + unit)
    }
    assert device.read_sectors == set(range(sectors))
    assert sum(step.count for step in steps) == sectors
    assert [step.end for step in steps] == sorted({step.end for step in steps})
    assert steps[-1].end == shift * 1000 + sectors


def test_a_sector_that_can_be_read_at_the_next_try_is_weak() -> None:
    device = Device(64, weak={20})
    (step,) = scan([Stretch(0, 64, 1, 0)], lambda spare: device, lambda spare: 1)
    assert step.findings == (Finding(0, 64, 1, errno.EIO, weak=True),)
    assert step.findings[0].error == "EIO"


def test_a_stretch_within_a_unit_is_not_left() -> None:
    device = Device(64, bad={16, 17, 23})
    (step,) = scan([Stretch(500, 4, None, 16)], lambda spare: device, lambda spare: 8)
    assert step.findings == (Finding(500, 4, None, errno.EIO),)


@pytest.mark.parametrize("code", [errno.ENXIO, errno.ENODEV])
def test_a_device_that_is_gone_ends_the_scan(code: int) -> None:
    device = Device(64, bad={20}, code=code)
    with pytest.raises(DmRemapError, match="/dev/device: cannot be read at sector 0"):
        list(scan([Stretch(0, 64, None, 0)], lambda spare: device, lambda spare: 1))


# The command


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A target with two spares, of 197 sectors."""
    be_root_at_a_known_time(monkeypatch)
    scene = make_scene(tmp_path, 2)
    scene.create()
    return Desk(scene)


def settle(text: str) -> str:
    """The output without durations."""
    lines = text.splitlines()
    return "\n".join(line if not line.startswith("read ") else "read" for line in lines)


def test_a_sound_target(desk: Desk) -> None:
    done = desk.run(f"dm-remap scan {NAME}")
    assert done.code == 0
    assert done.out.startswith("read 98.5 KiB in ")
    assert done.out.endswith("; 0 bad sectors\n")
    assert done.err == ""
    data = desk.run(f"dm-remap scan {NAME} --json").json
    assert (data["sectors"], data["from"], data["end"]) == (197, 0, 197)
    assert (data["complete"], data["bad"], data["remap"]) == (True, [], None)


def test_what_is_bad_is_told_and_stays(desk: Desk) -> None:
    desk.scene.spoil(41)
    done = desk.run(f"dm-remap scan {NAME}")
    assert done.code == 4
    assert settle(done.out) == (
        "SECTORS  FOUND-ON  ERROR  STATE  NOW-ON\n"
        "41+1     main      EIO    bad    main\n"
        "read\n"
        "move them with --remap, or dm-remap remap"
    )
    assert (desk.scene.generation(), desk.logged) == (1, [])


def test_what_is_bad_is_moved(desk: Desk) -> None:
    desk.scene.spoil(41)
    done = desk.run(f"dm-remap scan {NAME} --remap")
    # Its data is lost.
    assert done.code == 4
    assert "41+1     main      EIO    bad    spare 0\n" in done.out
    assert "1 chunk moved to spares, 1 sector lost; generation 2\n" in done.out
    assert desk.logged[0] == f"remap {NAME} sectors 41+1"
    again = desk.run(f"dm-remap scan {NAME} --json").json
    assert (again["exit_code"], again["bad"], again["sectors"]) == (0, [], 196)


def test_what_was_moved_meanwhile_is_in_order(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.scene.spoil(41)
    real: Callable[..., Any] = scan_command.scan

    def scan_and_heal(*arguments: Any) -> Any:
        yield from real(*arguments)
        desk.scene.remap((41, 1))

    monkeypatch.setattr(scan_command, "scan", scan_and_heal)
    done = desk.run(f"dm-remap scan {NAME} --remap")
    assert done.code == 0
    assert "41+1     main      EIO    bad    spare 0\n" in done.out
    assert (desk.scene.generation(), desk.logged) == (2, [])


def test_a_spare_with_a_bad_sector(desk: Desk) -> None:
    desk.scene.remap((40, 8))
    lose_on_spare(desk.scene, 0, 42)
    done = desk.run(f"dm-remap scan {NAME} --remap")
    assert done.code == 4
    assert "42+1     spare 0" in done.out
    assert "a spare has bad sectors" in done.out
    assert desk.scene.generation() == 2


@pytest.mark.parametrize(("first", "begun"), [(0, 0), (44, 40), (196, 192)])
def test_a_part(desk: Desk, first: int, begun: int) -> None:
    desk.scene.spoil(41)
    data = desk.run(f"dm-remap scan {NAME} --from {first} --json").json
    assert (data["from"], data["sectors"]) == (begun, 197 - begun)
    assert len(data["bad"]) == (begun <= 41)


def test_an_interruption_tells_how_to_go_on(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> Any:
        yield from list(scan(*arguments, stride=64))[:2]
        raise KeyboardInterrupt

    desk.scene.spoil(41)
    monkeypatch.setattr(scan_command, "scan", interrupted)
    done = desk.run(f"dm-remap scan {NAME} --remap")
    assert done.code == 130
    assert done.err == "dm-remap scan: interrupted; go on with --from 128\n"
    assert "41+1" in done.out
    assert desk.scene.generation() == 1


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ("nope", 3, "nope: there is no active target of that name"),
        (f"{NAME} --from 197", 3, "sector 197 is not on the target, which has 197 sectors"),
        (f"{NAME} --from -1", 2, "invalid number value: '-1'"),
        (f"{NAME} --rate x", 2, "invalid number value: 'x'"),
    ],
)
def test_refusals(desk: Desk, arguments: str, code: int, text: str) -> None:
    done = desk.run(f"dm-remap scan {arguments}")
    assert (done.code, desk.scene.generation()) == (code, 1)
    assert text in done.err
