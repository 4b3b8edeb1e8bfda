# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the devices of a host make up: the table of cases in docs/identity.md, one by one."""

from __future__ import annotations

import json
import random
import re
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dm_remap import copies, discovery, replacement
from dm_remap import format as fmt
from dm_remap.blockdev import DeviceInfo, Listed, Use
from dm_remap.discovery import (
    Discovery,
    Found,
    Overrides,
    State,
    TargetFound,
    active_targets,
    decide,
    look,
    run_all,
    scan,
)
from dm_remap.errors import DmRemapError
from dm_remap.fingerprint import of_info, with_content
from dm_remap.format import Extent, Metadata
from tests.unit.copy_scene import (
    CHUNK,
    HOST,
    NOW,
    OTHER_TARGET,
    SIZE,
    SLOTS,
    SPARES,
    TARGET,
    Disk,
    fill,
)
from tests.unit.test_copies import reseal
from tests.unit.test_planner import mapped

DOC = Path(__file__).resolve().parents[2] / "docs" / "identity.md"
MAIN_SECTORS = 1 << 20
OTHER_HOST = uuid.UUID(int=5)


def disk_info(number: int, sectors: int = SIZE, **changes: Any) -> DeviceInfo:
    """A whole disk with a serial number."""
    letter = "abcdefghijklmnop"[number]
    devno = f"8:{number * 16}"
    info = DeviceInfo(
        path=f"/dev/sd{letter}",
        devno=devno,
        sectors=sectors,
        logical_block=512,
        physical_block=512,
        disk=devno,
        start=0,
        serial=f"serial-{letter}",
        wwn="",
        model="Model",
        read_only=False,
        used_by=(),
        partition=0,
    )
    return replace(info, **changes)


MAIN = disk_info(0, MAIN_SECTORS, fs_type="ext4", fs_uuid="fs-1")
NAMELESS_MAIN = replace(MAIN, serial="", model="")


def first(
    spares: int = 2,
    main: DeviceInfo = MAIN,
    target: uuid.UUID = TARGET,
    base: int = 0,
    nameless: bool = False,
    **config: Any,
) -> Metadata:
    """The first generation of a target whose spares are /dev/sdb and so on."""
    geometry = fmt.plan_geometry(SIZE, CHUNK, 1).to_dict()
    infos = [disk_info(1 + base + index) for index in range(spares)]
    if nameless:
        infos = [replace(info, serial="", model="") for info in infos]
    entries = [
        {
            "uuid": str(SPARES[base + index]),
            "geometry": geometry,
            **replacement.recorded(info, hardware_only=True),
        }
        for index, info in enumerate(infos)
    ]
    whole = {
        "name": "data",
        "chunk_sectors": CHUNK,
        "main": replacement.main_entry(main, main.sectors),
        "spares": entries,
        **config,
    }
    return Metadata(target, 1, NOW, HOST, fmt.NO_DIGEST, whole, {})


def after(metadata: Metadata, *spares: int, host: uuid.UUID = HOST) -> Metadata:
    """One generation later for each spare, with a chunk on it."""
    for spare in spares:
        place = metadata.generation
        metadata = metadata.successor(
            timestamp_ns=metadata.timestamp_ns + 1,
            host_id=host,
            extents=(*metadata.extents, Extent(place, 1, spare, place)),
        )
    return metadata


def without(metadata: Metadata, index: int) -> Metadata:
    entries = list(metadata.config["spares"])
    entries[index] = None
    return metadata.successor(timestamp_ns=NOW, config={**metadata.config, "spares": entries})


def seen(info: DeviceInfo, disk: Disk | None = None, **more: Any) -> Found:
    content = disk or Disk(sectors=info.sectors)
    content.name = info.path
    survey = copies.survey(content)
    return Found(info, survey, of_info(info), **more)


def spare(
    metadata: Metadata,
    index: int = 0,
    number: int | None = None,
    damage: Callable[[Disk], object] = lambda disk: None,
    indexes: Iterable[int] = range(7),
    **info: Any,
) -> Found:
    """A spare that carries a generation, on the disk of its number, or on another one."""
    entry = metadata.config["spares"][index]
    which = SPARES.index(uuid.UUID(entry["uuid"]))
    disk = fill(Disk(), metadata, indexes, which)
    damage(disk)
    described = disk_info(1 + which if number is None else number, **info)
    disk.sectors = max(described.sectors, disk.sectors)
    return seen(described, disk)


def contested(one: Metadata, other: Metadata) -> Found:
    disk = fill(Disk(), one, (0, 1, 2))
    return seen(disk_info(1), fill(disk, other, (3, 4, 5), 4))


BASE = after(first(), 0, 1)
OLD = first()
ONE = after(first(1), 0)
OTHER = first(1, disk_info(8, MAIN_SECTORS), OTHER_TARGET, base=4, name="other")
M = seen(MAIN)
OTHER_MAIN = seen(disk_info(8, MAIN_SECTORS))
LEFT = after(BASE, 0)
RIGHT = after(BASE, 1, host=OTHER_HOST)
NEW_MAIN = disk_info(9, MAIN_SECTORS)
REPLACING = BASE.successor(
    timestamp_ns=NOW,
    config=replacement.begun(BASE.config, NEW_MAIN, "/dev/disk/by-id/new", "/dev/disk/by-id/old"),
)
PART = replace(MAIN, partition=1, partuuid="p-1", start=2048, path="/dev/sda1", devno="8:1")
WHOLE = replace(MAIN, sectors=MAIN_SECTORS + 4096)


def foreign(sectors: int) -> Disk:
    """A disk that starts like somebody else's."""
    disk = Disk(sectors=sectors)
    disk.put(0, b"\xeb\x63\x90" * 2048)
    return disk


def zeroed(disk: Disk) -> None:
    disk.put(0, bytes(16384 * 512))


def near_gone(disk: Disk) -> None:
    for sector in SLOTS[:5]:
        disk.put(sector, b"\xa5" * 8192)


def newer(disk: Disk) -> None:
    disk.put(SLOTS[1], reseal(fmt.pack_slot(BASE, SPARES[0], SIZE, 1), major=2))


def unreadable(disk: Disk) -> None:
    disk.unreadable.update(range(disk.sectors))


@dataclass(frozen=True)
class Case:
    """What is seen, and what is to be decided.

    Args:
        found: the devices.
        state: of the target; None if no target is found.
        codes: of the target's problems.
        main: path of the main that is taken.
        spares: paths of the spares that are taken, by position.
        others: codes of problems of no target.
        rest: other arguments of `decide`.
    """

    found: Sequence[Found]
    state: State | None
    codes: str = ""
    main: str | None = "/dev/sda"
    spares: Mapping[int, str] = field(default_factory=lambda: {0: "/dev/sdb", 1: "/dev/sdc"})
    others: str = ""
    rest: Mapping[str, Any] = field(default_factory=dict)


COMPLETE, DEGRADED, REFUSED = State.COMPLETE, State.DEGRADED, State.REFUSED
FIRST, NONE = {0: "/dev/sdb"}, dict[int, str]()

CASES: dict[str, Case] = {
    "all is there": Case([M, spare(BASE), spare(BASE, 1)], COMPLETE),
    "other names, same disks": Case(
        [
            seen(replace(MAIN, path="/dev/vdx", devno="252:0", disk="252:0")),
            spare(BASE, path="/dev/vdy", devno="252:16"),
            spare(BASE, 1, path="/dev/vdz", devno="252:32"),
        ],
        COMPLETE,
        main="/dev/vdx",
        spares={0: "/dev/vdy", 1: "/dev/vdz"},
    ),
    "clone of a spare present": Case(
        [M, spare(BASE, number=11), spare(BASE), spare(BASE, 1)], COMPLETE, "clone_spare"
    ),
    "clone of a spare with a newer generation": Case(
        [M, spare(after(BASE, 1), number=11), spare(BASE), spare(BASE, 1)],
        REFUSED,
        "clone_spare newer_elsewhere",
    ),
    "clone of a spare alone": Case(
        [M, spare(ONE, number=11)], REFUSED, "clone_spare no_copy", main=None, spares=NONE
    ),
    "clone of a spare, the spare missing": Case(
        [M, spare(BASE, number=11), spare(BASE, 1)],
        DEGRADED,
        "clone_spare missing_data",
        spares={1: "/dev/sdc"},
    ),
    "clone of a spare, named": Case(
        [M, spare(ONE, number=11), spare(ONE)],
        COMPLETE,
        "left_out",
        spares={0: "/dev/sdl"},
        rest={"overrides": Overrides(use={TARGET: "/dev/sdl"})},
    ),
    "two devices are one spare, and no serial tells which": Case(
        [
            M,
            spare(first(1, nameless=True), serial="", model=""),
            spare(first(1, nameless=True), number=11, serial="", model=""),
        ],
        REFUSED,
        "duplicate_spare",
        main=None,
        spares=NONE,
    ),
    "two paths to one spare": Case(
        [M, spare(ONE), spare(ONE, number=11, serial="serial-b")],
        REFUSED,
        "duplicate_spare",
        main=None,
        spares=NONE,
    ),
    "a multipath over two paths to one spare": Case(
        [
            M,
            replace(spare(ONE), holders=("254:3",)),
            replace(spare(ONE, number=11, serial="serial-b"), holders=("254:3",)),
            spare(ONE, path="/dev/dm-3", devno="254:3"),
        ],
        COMPLETE,
        spares={0: "/dev/dm-3"},
    ),
    "a device without serial claims a spare that is not there": Case(
        [M, spare(ONE, number=11, serial="", model="")],
        COMPLETE,
        "unproved_spare",
        spares={0: "/dev/sdl"},
    ),
    "a device without serial beside a clone": Case(
        [M, spare(ONE, number=11, serial=""), spare(ONE, number=12)],
        REFUSED,
        "duplicate_spare",
        main=None,
        spares=NONE,
    ),
    "stale spare returns": Case([M, spare(BASE), spare(OLD, 1)], COMPLETE, "stale"),
    "stale spare returns to an active target": Case(
        [M, spare(BASE), spare(OLD, 1)],
        State.ACTIVE,
        "stale",
        rest={"active": {TARGET: "data"}},
    ),
    "two spares diverged": Case(
        [M, spare(LEFT), spare(RIGHT, 1)], REFUSED, "split_brain", main=None, spares=NONE
    ),
    "two spares diverged, one is named": Case(
        [M, spare(LEFT), spare(RIGHT, 1)],
        DEGRADED,
        "left_out missing_data",
        spares={1: "/dev/sdc"},
        rest={"overrides": Overrides(use={TARGET: "8:32"})},
    ),
    "two spares diverged, their ancestor is named": Case(
        [
            M,
            spare(after(first(3), 0)),
            spare(after(first(3), 1, host=OTHER_HOST), 1),
            spare(first(3), 2),
        ],
        REFUSED,
        "split_brain",
        main=None,
        spares=NONE,
        rest={"overrides": Overrides(use={TARGET: "/dev/sdd"})},
    ),
    "timestamp in the future": Case(
        [M, spare(replace(ONE, timestamp_ns=NOW + 10**15))], COMPLETE, "future", spares=FIRST
    ),
    "timestamp in the past": Case([M, spare(replace(ONE, timestamp_ns=0))], COMPLETE, spares=FIRST),
    "main with another block size": Case(
        [seen(replace(MAIN, logical_block=4096)), spare(BASE), spare(BASE, 1)],
        REFUSED,
        "wrong_block_size",
        main=None,
    ),
    "main grown": Case(
        [seen(replace(MAIN, sectors=MAIN_SECTORS * 2)), spare(BASE), spare(BASE, 1)],
        REFUSED,
        "wrong_size",
        main=None,
    ),
    "main swapped for a bigger disk": Case(
        [seen(disk_info(11, MAIN_SECTORS * 2)), spare(BASE), spare(BASE, 1)],
        REFUSED,
        "missing_main",
        main=None,
    ),
    "bigger disk named as the main": Case(
        [seen(disk_info(11, MAIN_SECTORS * 2)), spare(BASE), spare(BASE, 1)],
        REFUSED,
        "wrong_size named_main",
        main="/dev/sdl",
        rest={"overrides": Overrides(main={TARGET: "/dev/sdl"})},
    ),
    "main missing": Case([spare(BASE), spare(BASE, 1)], REFUSED, "missing_main", main=None),
    "main is a clone with another serial": Case(
        [seen(replace(MAIN, serial="other")), spare(BASE), spare(BASE, 1)],
        REFUSED,
        "clone_main",
        main=None,
    ),
    "clone of the main, named": Case(
        [seen(replace(MAIN, serial="other")), spare(BASE), spare(BASE, 1)],
        COMPLETE,
        "named_main",
        rest={"overrides": Overrides(main={TARGET: "/dev/sda"})},
    ),
    "clone beside the main": Case(
        [
            M,
            seen(disk_info(11, MAIN_SECTORS, fs_type="ext4", fs_uuid="fs-1")),
            spare(BASE),
            spare(BASE, 1),
        ],
        COMPLETE,
        "clone_main",
    ),
    "two mains match": Case(
        [
            M,
            seen(replace(MAIN, path="/dev/sdl", devno="8:176", disk="8:176")),
            spare(BASE),
            spare(BASE, 1),
        ],
        REFUSED,
        "duplicate_main",
        main=None,
    ),
    "main without any serial": Case(
        [seen(NAMELESS_MAIN), spare(first(1, NAMELESS_MAIN))],
        REFUSED,
        "doubtful_main",
        main=None,
        spares=FIRST,
    ),
    "main without any serial, named": Case(
        [seen(NAMELESS_MAIN), spare(first(1, NAMELESS_MAIN))],
        COMPLETE,
        "named_main",
        spares=FIRST,
        rest={"overrides": Overrides(main={TARGET: "8:0"})},
    ),
    "whole disk instead of the partition": Case(
        [seen(WHOLE), spare(first(1, PART))], REFUSED, "other_part", main=None, spares=FIRST
    ),
    "partition instead of the whole disk": Case(
        [seen(PART), spare(first(1, WHOLE))], REFUSED, "other_part", main=None, spares=FIRST
    ),
    "partition beside its disk": Case(
        [seen(WHOLE), seen(PART), spare(first(1, PART))], COMPLETE, main="/dev/sda1", spares=FIRST
    ),
    "main formatted anew": Case(
        [seen(replace(MAIN, fs_uuid="fs-2")), spare(BASE), spare(BASE, 1)],
        COMPLETE,
        "reformatted",
    ),
    "main in use": Case(
        [seen(replace(MAIN, used_by=(Use("sda", "mounted on", "/srv"),))), spare(ONE)],
        REFUSED,
        "in_use",
        spares=FIRST,
    ),
    "main held by what is left of the target": Case(
        [seen(replace(MAIN, used_by=(Use("sda", "held by", "data-shim"),))), spare(ONE)],
        COMPLETE,
        spares=FIRST,
    ),
    "main read-only": Case(
        [seen(replace(MAIN, read_only=True)), spare(ONE)], REFUSED, "read_only", spares=FIRST
    ),
    "main became a spare of another target": Case(
        [
            seen(replace(MAIN, sectors=SIZE), fill(Disk(), OTHER, spare=4)),
            spare(first(1, replace(MAIN, sectors=SIZE))),
        ],
        REFUSED,
        "main_is_spare",
        spares=FIRST,
    ),
    "main of two targets": Case(
        [M, spare(ONE), spare(first(1, MAIN, OTHER_TARGET, base=4, name="other"))],
        REFUSED,
        "shared_main",
        spares=FIRST,
    ),
    "spare missing, with data": Case([M, spare(BASE)], DEGRADED, "missing_data", spares=FIRST),
    "spare missing, without data": Case(
        [M, spare(after(first(), 0))], DEGRADED, "missing_spare", spares=FIRST
    ),
    "spare overwritten": Case(
        [M, spare(BASE), seen(disk_info(2))], DEGRADED, "missing_data blank_spare", spares=FIRST
    ),
    "spare used for something else since": Case(
        [M, spare(ONE, fs_type="ext4")], REFUSED, "reused", spares=FIRST
    ),
    "spare grown": Case([M, spare(ONE, sectors=SIZE * 2)], COMPLETE, "resized", spares=FIRST),
    "retired spare returns": Case(
        [M, spare(without(after(first(), 0), 1)), spare(after(first(), 0), 1)],
        COMPLETE,
        "retired",
        spares=FIRST,
    ),
    "only an older generation than the host committed": Case(
        [M, spare(ONE)],
        REFUSED,
        "older_than_backup",
        spares=FIRST,
        rest={"kept": {TARGET: after(ONE, 0)}},
    ),
    "same name twice": Case(
        [M, OTHER_MAIN, spare(ONE), spare(replace(OTHER, config={**OTHER.config, "name": "data"}))],
        REFUSED,
        "same_name",
        spares=FIRST,
    ),
    "the name of an active target": Case(
        [M, spare(ONE)],
        REFUSED,
        "same_name",
        spares=FIRST,
        rest={"active": {OTHER_TARGET: "data"}},
    ),
    "no usable name": Case([M, spare(first(1, name="../a"))], REFUSED, "bad_name", spares=FIRST),
    "newer format": Case(
        [M, spare(BASE, damage=newer), spare(BASE, 1)],
        REFUSED,
        "newer_format missing_data",
        spares={1: "/dev/sdc"},
    ),
    "newer format of another target": Case(
        [
            M,
            spare(ONE),
            spare(
                OTHER,
                damage=lambda disk: disk.put(
                    SLOTS[0], reseal(fmt.pack_slot(OTHER, SPARES[4], SIZE, 0), features=128)
                ),
            ),
        ],
        COMPLETE,
        spares=FIRST,
    ),
    "contested device": Case(
        [M, contested(BASE, OTHER), spare(BASE, 1)],
        DEGRADED,
        "contested missing_data",
        spares={1: "/dev/sdc"},
    ),
    "contested device with a newer generation": Case(
        [M, contested(after(BASE, 1), OTHER), spare(BASE, 1)],
        REFUSED,
        "contested newer_elsewhere missing_data",
        spares={1: "/dev/sdc"},
    ),
    "4 of 5 near copies gone": Case(
        [M, spare(ONE, damage=lambda disk: disk.damage(0, 1, 3, 4))],
        COMPLETE,
        "damaged_copies",
        spares=FIRST,
    ),
    "all near copies gone": Case(
        [M, spare(ONE, damage=near_gone)], COMPLETE, "damaged_copies", spares=FIRST
    ),
    "first 8 MiB zeroed": Case(
        [M, spare(ONE, damage=zeroed)], COMPLETE, "damaged_copies", spares=FIRST
    ),
    "one far copy is all": Case(
        [M, spare(ONE, indexes=[6])], COMPLETE, "damaged_copies", spares=FIRST
    ),
    "no whole copy left": Case(
        [M, spare(ONE, damage=lambda disk: disk.damage(*range(7)))], None, others="damaged"
    ),
    "spare of dm-remap-v4": Case(
        [M, spare(ONE), seen(disk_info(11), kernel_spare=True)],
        COMPLETE,
        spares=FIRST,
        others="kernel_spare",
    ),
    "nothing of ours": Case(
        [seen(MAIN, foreign(MAIN_SECTORS))],
        None,
    ),
    "active": Case(
        [M, spare(BASE), spare(BASE, 1)], State.ACTIVE, rest={"active": {TARGET: "data"}}
    ),
    "active, main in use by it": Case(
        [seen(replace(MAIN, used_by=(Use("sda", "held by", "data"),))), spare(ONE)],
        State.ACTIVE,
        spares=FIRST,
        rest={"active": {TARGET: "data"}},
    ),
    "replacement under way, both there": Case(
        [M, seen(NEW_MAIN), spare(REPLACING), spare(REPLACING, 1)], COMPLETE
    ),
    "replacement under way, new main missing": Case(
        [M, spare(REPLACING), spare(REPLACING, 1)], REFUSED, "missing_main"
    ),
    "replacement under way, old main missing": Case(
        [seen(NEW_MAIN), spare(REPLACING), spare(REPLACING, 1)],
        REFUSED,
        "missing_main",
        main=None,
    ),
    "replacement under way, one named": Case(
        [M, seen(NEW_MAIN), spare(REPLACING), spare(REPLACING, 1)],
        REFUSED,
        "replacement",
        rest={"overrides": Overrides(main={TARGET: "/dev/sdj"})},
    ),
    "header bit flips": Case(
        [M, spare(ONE, damage=lambda disk: disk.damage(0, 5, offset=80))],
        COMPLETE,
        "damaged_copies",
        spares=FIRST,
    ),
    "device that cannot be read": Case(
        [M, spare(BASE), spare(BASE, 1, damage=unreadable)],
        DEGRADED,
        "missing_data blank_spare",
        spares=FIRST,
        others="unreadable",
    ),
    "device that does not answer": Case(
        [M, spare(ONE), Found(disk_info(11), None, of_info(disk_info(11)), error="hangs")],
        COMPLETE,
        spares=FIRST,
        others="unreadable",
    ),
    "removed on purpose": Case(
        [M, spare(ONE)],
        REFUSED,
        "removed",
        spares=FIRST,
        rest={"removed": {TARGET: "/backup/removed"}},
    ),
    "no such spare named": Case(
        [M, spare(ONE)],
        REFUSED,
        "no_such_device",
        main=None,
        spares=NONE,
        rest={"overrides": Overrides(use={TARGET: "/dev/sdz"})},
    ),
}


def decided(case: Case) -> Discovery:
    return decide(case.found, now_ns=NOW, **case.rest)


def target_of(result: Discovery) -> TargetFound | None:
    return next((target for target in result.targets if target.uuid == TARGET), None)


@pytest.mark.parametrize("name", CASES)
def test_the_decision(name: str) -> None:
    case = CASES[name]
    result = decided(case)
    target = target_of(result)
    assert sorted(problem.code for problem in result.others) == sorted(case.others.split())
    assert json.loads(json.dumps(result.to_dict()))
    if target is None:
        assert case.state is None
        return
    text = "\n".join(map(str, target.problems))
    assert target.state is case.state, text
    assert sorted(problem.code for problem in target.problems) == sorted(case.codes.split()), text
    assert (target.main.path if target.main else None) == case.main
    assert {index: info.path for index, info in target.spares.items()} == case.spares
    assert target.decision
    for problem in target.problems:
        assert not problem.message.endswith(".")
        if problem.refuses:
            assert problem.remedy, problem


@pytest.mark.parametrize("name", CASES)
def test_the_order_of_the_devices_decides_nothing(name: str) -> None:
    case = CASES[name]
    turned = decide([*reversed(case.found)], now_ns=NOW, **case.rest)
    mine, other = target_of(decided(case)), target_of(turned)
    assert (mine is None) == (other is None)
    if mine and other:
        assert (mine.state, mine.main, mine.spares) == (other.state, other.main, other.spares)
        assert {p.code for p in mine.problems} == {p.code for p in other.problems}


def test_the_documented_table_is_this_one() -> None:
    text = DOC.read_text()
    rows = re.findall(r"^\| ([^|]+) \| (\w+) \| ([^|]*) \| ([^|]+) \|$", text, re.MULTILINE)
    documented = {name.strip(): (state, codes.strip()) for name, state, codes, _why in rows[1:]}
    expected = {
        name: (
            case.state.value if case.state else "none",
            " ".join(f"`{code}`" for code in [*case.codes.split(), *case.others.split()]),
        )
        for name, case in CASES.items()
    }
    assert documented == expected


def test_every_code_is_documented_and_occurs_in_a_case() -> None:
    source = Path(discovery.__file__).read_text()
    direct = re.findall(r'(?:note|refuse|Problem)\(\s*"([a-z_]+)"', source)
    chosen = re.findall(r'"(missing_data|missing_spare|wrong_block_size|wrong_size)"', source)
    codes = {*direct, *chosen}
    shown = {c for case in CASES.values() for c in (case.codes + " " + case.others).split()}
    assert codes - shown == {"conflict"}
    assert shown - codes == {"future", "retired"}


def test_a_split_brain_shows_both_sides() -> None:
    target = target_of(decided(CASES["two spares diverged"]))
    assert target
    assert {(side.host_id, side.devices) for side in target.sides} == {
        (HOST, ("/dev/sdb",)),
        (OTHER_HOST, ("/dev/sdc",)),
    }
    assert {side.digest for side in target.sides} == {LEFT.digest.hex(), RIGHT.digest.hex()}
    assert LEFT.digest.hex()[:16] in target.decision


def test_either_side_can_be_named_and_only_its_own_content_counts() -> None:
    for number, (path, metadata) in enumerate([("/dev/sdb", LEFT), ("/dev/sdc", RIGHT)]):
        said = Overrides(use={TARGET: path})
        target = target_of(decide(CASES["two spares diverged"].found, overrides=said, now_ns=NOW))
        assert target
        assert target.metadata == metadata
        assert list(target.spares) == [number]


def test_a_side_that_goes_on_in_two_ways_is_not_guessed() -> None:
    base = first(4)
    left, right = after(base, 0), after(base, 1, host=OTHER_HOST)
    both = [spare(after(left, 0), 1), spare(after(left, 0, host=OTHER_HOST), 2)]
    for other in (right, after(right, 0, 0, 0)):
        found = [M, spare(left), *both, spare(other, 3)]
        for order in (found, found[::-1]):
            said = Overrides(use={TARGET: "/dev/sdb"})
            target = target_of(decide(order, overrides=said, now_ns=NOW))
            assert target
            assert target.state is REFUSED
            assert "/dev/sdc" in target.decision
            assert "/dev/sdd" in target.decision


def test_any_spare_of_a_side_names_its_newest_generation() -> None:
    base = first(3)
    left, right = after(base, 0), after(base, 1, host=OTHER_HOST)
    found = [M, spare(left), spare(after(left, 0), 1), spare(right, 2)]
    for path in ("/dev/sdb", "/dev/sdc"):
        target = target_of(decide(found, overrides=Overrides(use={TARGET: path}), now_ns=NOW))
        assert target
        assert target.metadata == after(left, 0)
        assert {info.path for info in target.spares.values()} == {"/dev/sdb", "/dev/sdc"}


def test_a_contested_device_matters_to_both_targets() -> None:
    targets = decided(CASES["contested device"]).targets
    assert {target.uuid: [p.code for p in target.problems][:1] for target in targets} == {
        TARGET: ["contested"],
        OTHER_TARGET: ["no_copy"],
    }


def test_what_is_missing_is_counted_and_named() -> None:
    target = target_of(decided(CASES["spare missing, with data"]))
    assert target
    (missing,) = target.missing
    assert (missing.index, missing.uuid, missing.chunks) == (1, SPARES[1], 1)
    assert "serial-c" in missing.identity
    assert target.missing_chunks == 1
    assert "without spare 1, with 1 remapped chunk unreadable" in target.decision


def test_the_new_main_of_a_replacement_is_told() -> None:
    target = target_of(decided(CASES["replacement under way, both there"]))
    assert target
    assert target.new_main == NEW_MAIN


def test_the_other_target_of_a_conflict_is_refused_too() -> None:
    for name in ("same name twice", "main of two targets"):
        states = {target.state for target in decided(CASES[name]).targets}
        assert states == {REFUSED}, name
    states = [t.state for t in decided(CASES["newer format of another target"]).targets]
    assert states == [COMPLETE, REFUSED]
    kept = {t.uuid: t.state for t in decided(CASES["the name of an active target"]).targets}
    assert kept == {TARGET: REFUSED, OTHER_TARGET: State.ACTIVE}


def test_a_target_that_was_removed_is_in_nobody_s_way() -> None:
    """Its main has another target by now, which even has its name."""
    again = first(1, MAIN, OTHER_TARGET, base=4)
    removed = {TARGET: "/backup/removed"}
    found = [M, spare(ONE), spare(again)]
    states = {t.uuid: t.state for t in decide(found, now_ns=NOW, removed=removed).targets}
    assert states == {TARGET: REFUSED, OTHER_TARGET: COMPLETE}
    assert {t.state for t in decide(found, now_ns=NOW).targets} == {REFUSED}
    active = {TARGET: "data"}
    states = {t.uuid: t.state for t in decide(found, active, now_ns=NOW, removed=removed).targets}
    assert states == {TARGET: State.ACTIVE, OTHER_TARGET: REFUSED}


@given(st.permutations(range(4)), st.data())
def test_no_clone_is_ever_taken_while_the_disk_is_there(
    order: list[int], data: st.DataObject
) -> None:
    generation = data.draw(st.integers(0, 3))
    clone = spare(after(BASE, *[0] * generation), data.draw(st.integers(0, 1)), number=11)
    everything = [M, spare(BASE), spare(BASE, 1), clone]
    target = target_of(decide([everything[i] for i in order], now_ns=NOW))
    assert target
    assert "/dev/sdl" not in {info.path for info in target.spares.values()}
    assert target.state is (REFUSED if generation else COMPLETE)


# Damage


def damaged(seed: int) -> None:
    """Corrupt two spares at random; only what was written may come out, and no older one."""
    chance = random.Random(seed)
    disks = [fill(Disk(), BASE, range(7), index) for index in range(2)]
    for index in chance.sample(range(7), chance.randrange(4)):
        fill(disks[chance.randrange(2)], OLD, [index], chance.randrange(2))
    for _unused in range(chance.randrange(1, 25)):
        disk = disks[chance.randrange(2)]
        slot = SLOTS[chance.randrange(7)]
        kind = chance.randrange(5)
        if kind == 0:
            disk.put(slot + chance.randrange(24), chance.randbytes(512))
        elif kind == 1:
            disk.put(slot, bytes(512 * chance.randrange(1, 17)))
        elif kind == 2:
            source = SLOTS[chance.randrange(7)]
            disk.put(slot, b"".join(disk.blocks.get(source + n, bytes(512)) for n in range(16)))
        elif kind == 3:
            disk.unreadable.add(slot + chance.randrange(16))
        else:
            sector = slot + chance.randrange(12)
            block = bytearray(disk.blocks.get(sector, bytes(512)))
            block[chance.randrange(512)] ^= 1 << chance.randrange(8)
            disk.put(sector, bytes(block))
    found = [M, *(seen(disk_info(1 + index), disk) for index, disk in enumerate(disks))]
    whole = {c.metadata.digest for f in found[1:] if f.survey for c in f.survey.copies}
    assert whole <= {BASE.digest, OLD.digest}
    result = decide(found, now_ns=NOW)
    for target in result.targets:
        assert target.uuid == TARGET
        if target.metadata is None:
            assert target.state is REFUSED
            continue
        assert target.metadata in (BASE, OLD)
        for device in found[1:]:
            if device.survey and not device.survey.contested and target.state is not REFUSED:
                for copy in device.survey.copies:
                    assert copy.header.generation <= target.metadata.generation
    if not result.targets:
        assert not whole
        assert result.others


@pytest.mark.parametrize("block", range(4))
def test_random_corruption_never_yields_what_was_not_written(block: int) -> None:
    for seed in range(block * 75, block * 75 + 75):
        damaged(seed)


@pytest.mark.soak
@pytest.mark.parametrize("block", range(100))
def test_ten_thousand_corruptions_never_yield_what_was_not_written(block: int) -> None:
    for seed in range(1000 + block * 100, 1100 + block * 100):
        damaged(seed)


@given(st.lists(st.tuples(st.integers(0, 6), st.binary(max_size=600)), max_size=8))
def test_arbitrary_bytes_are_no_target(pieces: list[tuple[int, bytes]]) -> None:
    disk = Disk()
    for index, data in pieces:
        disk.put(SLOTS[index], (fmt.MAGIC + data).ljust(1024, b"\0")[:1024])
    result = decide([M, seen(disk_info(1), disk)], now_ns=NOW)
    assert result.targets == ()
    assert [problem.code for problem in result.others] == (["damaged"] if pieces else [])


value = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["serial", "wwn", "fingerprint", "path", "content", "sectors"]), inner
        )
    ),
    max_leaves=4,
)


@given(
    st.dictionaries(st.sampled_from(["name", "block_sectors", "replacement"]), value),
    st.dictionaries(
        st.sampled_from(["serial", "wwn", "model", "fingerprint", "device_sectors"]), value
    ),
)
def test_any_configuration_that_can_be_read_is_decided(
    config: dict[str, Any], entry: dict[str, Any]
) -> None:
    metadata = first(1)
    main = {**metadata.config["main"], **entry}
    spares = [{**metadata.config["spares"][0], **entry}]
    if "replacement" in config:
        config = {**config, "replacement": {"copied": 0, "main": entry}}
    whole = {**metadata.config, **config, "main": main, "spares": spares}
    found = spare(replace(metadata, config=whole))
    assert len(decide([M, found], now_ns=NOW).targets) == 1


# The host


class Host:
    """Block devices that are listed and opened like a host's."""

    def __init__(self, *devices: tuple[DeviceInfo, Disk | None], **more: Any) -> None:
        self.devices = devices
        self.more = more
        self.opened: list[str] = []

    def list_devices(self, without: str) -> list[Listed]:
        assert without == "DMREMAP-"
        return [Listed(info, **self.more.get(info.path, {})) for info, _disk in self.devices]

    def BlockDevice(self, path: str) -> _Open:
        self.opened.append(path)
        disk = next(disk for info, disk in self.devices if info.path == path)
        if disk is None:
            raise DmRemapError("cannot be opened", device=path)
        return _Open(disk)


class _Open:
    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.name = disk.name
        self.sectors = disk.sectors
        self.read = disk.read

    def __enter__(self) -> _Open:
        return self

    def __exit__(self, *error: object) -> None:
        return


def test_a_host_is_scanned() -> None:
    old = Disk()
    old.put(0, b"\x34\x52\x4d\x44" + b"x" * 508)
    host = Host(
        (MAIN, Disk(sectors=MAIN_SECTORS)),
        (disk_info(1), fill(Disk(), BASE)),
        (disk_info(2), fill(Disk(), BASE, spare=1)),
        (disk_info(3), old),
        (disk_info(4), None),
        (disk_info(5, sectors=64), Disk(sectors=64)),
        (disk_info(6), Disk()),
        **{"/dev/sdg": {"suspended": True}, "/dev/sdb": {"holders": ("254:0",)}},
    )
    found = {device.path: device for device in scan(host)}
    assert len(found) == 7
    assert sorted(host.opened) == ["/dev/sda", "/dev/sdb", "/dev/sdc", "/dev/sdd", "/dev/sde"]
    assert found["/dev/sdb"].holders == ("254:0",)
    assert found["/dev/sdd"].kernel_spare
    assert "cannot be opened" in found["/dev/sde"].error
    assert "suspended" in found["/dev/sdg"].error
    result = decide(list(found.values()), now_ns=NOW)
    assert [target.state for target in result.targets] == [COMPLETE]
    assert sorted(p.code for p in result.others) == ["kernel_spare", "unreadable", "unreadable"]


def test_a_device_that_is_not_ours_costs_seven_reads_of_4_kib() -> None:
    disk = Disk()
    assert look(Listed(disk_info(1)), Host((disk_info(1), disk))).survey
    assert sorted(disk.reads) == [(sector, 8) for sector in SLOTS]


def test_far_copies_at_an_old_size_are_found_by_the_hardware() -> None:
    lost = fill(Disk(), BASE, spare=1)
    zeroed(lost)
    lost.sectors = 2 * SIZE
    host = Host(
        (MAIN, Disk(sectors=MAIN_SECTORS)),
        (disk_info(1), fill(Disk(), BASE)),
        (disk_info(2, 2 * SIZE), lost),
    )
    target = target_of(decide(scan(host), now_ns=NOW))
    assert target
    assert {index: info.path for index, info in target.spares.items()} == {
        0: "/dev/sdb",
        1: "/dev/sdc",
    }
    assert target.state is COMPLETE


def test_a_clone_of_the_main_without_a_file_system_is_known_by_its_samples() -> None:
    content = Disk(sectors=MAIN_SECTORS)
    content.put(0, bytes(range(256)) * 16)
    content.put(MAIN_SECTORS // 2, bytes(range(256)) * 16)
    main = with_content(disk_info(0, MAIN_SECTORS), content)
    host = Host(
        (disk_info(11, MAIN_SECTORS), content),
        (disk_info(12, MAIN_SECTORS), Disk(sectors=MAIN_SECTORS)),
        (disk_info(1), fill(Disk(), first(1, main))),
    )
    found = scan(host)
    assert [bool(device.fingerprint.content) for device in found] == [True, False, False]
    target = target_of(decide(found, now_ns=NOW))
    assert target
    assert [(p.code, p.device) for p in target.problems] == [("clone_main", "/dev/sdl")]


def test_a_device_that_hangs_holds_nobody_up() -> None:
    forever = threading.Event()
    host = Host(*((disk_info(n), fill(Disk(), ONE)) for n in range(1, 6)))
    listed = host.list_devices("DMREMAP-")

    def hang() -> Found:
        forever.wait()
        return look(listed[0], host)

    def finish(number: int) -> Callable[[], Found]:
        return lambda: look(listed[number], host)

    # More of them hang than there are workers.
    calls = [hang, hang, finish(0), hang, finish(1), finish(2)]
    try:
        results = run_all(calls, workers=2, seconds=0.2)
    finally:
        forever.set()
    assert [result is None for result in results] == [True, True, False, True, False, False]


def test_a_device_that_nobody_understands_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host((disk_info(1), fill(Disk(), ONE)), (disk_info(2), Disk()))
    host.devices[1][1].read = lambda sector, count: 1 // 0  # type: ignore[union-attr]
    good, bad = scan(host)
    assert good.survey
    assert "ZeroDivisionError" in bad.error


def test_active_targets_are_known_by_their_uuid() -> None:
    class Tables:
        devices = {
            "data": mapped("data", 2),
            "gone": replace(mapped("gone", 3), live_table=False),
            "other": replace(mapped("other", 4), uuid="LVM-1"),
        }

        def names(self) -> list[str]:
            return [*self.devices, "vanished"]

        def info(self, name: str) -> Any:
            return self.devices.get(name)

    tables = Tables()
    tables.devices["data"] = replace(tables.devices["data"], uuid=f"DMREMAP-{TARGET.hex}")
    assert active_targets(tables) == {TARGET: "data"}
