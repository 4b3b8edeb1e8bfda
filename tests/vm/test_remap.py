# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Remaps on real block devices: bad sectors, load, racing writers, and commands that die."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest

from tests.lab import Disk, Machine
from tests.parameters import short_form
from tests.vm.guest import Guest

NAME = "guarded"
SEED = 7
CHUNK_SECTORS = 128
# The pattern covers this much of main, and with it all chunks that a test touches.
FILLED_SECTORS = 8192
BAD_SECTOR = 21 * CHUNK_SECTORS + 48
THOROUGH = {"retries": 4, "backoff": 0.01}


@dataclass(frozen=True)
class Pair:
    """A main with the spare for it.

    ``errno`` is what QEMU's device gets; ``weak`` is how many requests must fail so that all
    reads of the first pass do and a retry does not, the kernel's own retries counted.
    """

    main: str
    spare: str
    errno: str
    weak: int
    block: int = 512

    @property
    def block_sectors(self) -> int:
        return self.block // 512


# The bad block takes part in three failing reads of the first pass, or in two where these are slow;
# four retries follow. The kernel tries each request to an nvme disk 6 times.
PAIRS = [
    Pair("main", "spare", "EIO", 4),
    Pair("scsi", "spare", "ENODATA", 4),
    Pair("nvme", "spare", "EIO", 3 * 6 + 2),
    Pair("main4k", "spare4k", "EIO", 4, block=4096),
]


def pairs(*always: str) -> pytest.MarkDecorator:
    """Each kind of disk in turn; only those with the mains ``always`` outside of the long runs."""
    return pytest.mark.parametrize(
        "pair",
        short_form(PAIRS, always=[pair for pair in PAIRS if pair.main in always]),
        ids=lambda pair: pair.main,
    )


@pytest.fixture
def guest(lab: Machine) -> Guest:
    """The clean guest with the core in it."""
    return Guest(lab)


def prepare(guest: Guest, main: str, *spares: str, sectors: int = FILLED_SECTORS) -> None:
    target = {
        "name": NAME,
        "main": guest.path(main),
        "spares": [guest.path(spare) for spare in spares],
        "seed": SEED,
        "sectors": sectors,
    }
    (made,) = guest.call("prepare", targets=[target])
    assert made["actions"]
    assert made["again"] == [], "a second run must plan nothing"


def remap_bad_sector(guest: Guest, pair: Pair, **more: Any) -> dict[str, Any]:
    done: dict[str, Any] = guest.call(
        "remap_ranges",
        name=NAME,
        seed=SEED,
        ranges=[(BAD_SECTOR, pair.block_sectors)],
        patience=THOROUGH,
        **more,
    )
    assert done["generation"] == 2
    assert done["again"]["chunks"] == [], "a chunk that was remapped is left alone"
    assert done["chunks"] == [BAD_SECTOR // CHUNK_SECTORS]
    return done


@pytest.mark.core
@pairs("scsi", "nvme", "main4k")
def test_a_sector_that_cannot_be_read(guest: Guest, pair: Pair) -> None:
    prepare(guest, pair.main, pair.spare)
    guest.machine.disk(pair.main).fail([(BAD_SECTOR, 1)], op="read", errno=pair.errno)
    done = remap_bad_sector(guest, pair)
    assert done["report"]["lost"] == [[BAD_SECTOR, pair.block_sectors]]
    assert done["lost"] == [*range(BAD_SECTOR, BAD_SECTOR + pair.block_sectors)]
    (chunk,) = done["report"]["chunks"]
    assert chunk["recovered_first_read"] == CHUNK_SECTORS - pair.block_sectors
    assert chunk["recovered_on_retry"] == 0
    assert done["wrong"] == []
    assert done["written"] == [BAD_SECTOR]
    assert done["wrong_after_writing"] == [], "a write must heal a lost sector"


@pairs("nvme")
def test_a_sector_that_reads_after_some_tries(guest: Guest, pair: Pair) -> None:
    prepare(guest, pair.main, pair.spare)
    disk = guest.machine.disk(pair.main)
    disk.fail([(BAD_SECTOR, 1)], op="read", errno=pair.errno, times=pair.weak)
    done = remap_bad_sector(guest, pair)
    (chunk,) = done["report"]["chunks"]
    assert chunk["recovered_on_retry"] == pair.block_sectors
    assert chunk["recovered_first_read"] == CHUNK_SECTORS - pair.block_sectors
    assert done["report"]["lost"] == []
    assert done["wrong"] == []


@pairs("main4k")
def test_a_sector_that_cannot_be_written(guest: Guest, pair: Pair) -> None:
    prepare(guest, pair.main, pair.spare)
    guest.machine.disk(pair.main).fail([(BAD_SECTOR, 1)], op="write", errno=pair.errno)
    done = remap_bad_sector(guest, pair, write_first=[BAD_SECTOR], write=[BAD_SECTOR])
    assert len(done["refused"]) == 1, "the fault must be seen before the remap"
    assert done["report"]["lost"] == []
    assert done["wrong"] == []
    assert done["written"] == [BAD_SECTOR]
    assert done["wrong_after_writing"] == []


@pytest.mark.parametrize(
    ("filesystem", "remaps"),
    [
        ("ext4", 15),
        pytest.param("xfs", 15, marks=pytest.mark.second),
        pytest.param("ext4", 50, marks=pytest.mark.soak),
        pytest.param("xfs", 50, marks=pytest.mark.soak),
    ],
)
def test_remaps_under_a_verifying_load(guest: Guest, filesystem: str, remaps: int) -> None:
    check_load(guest, filesystem, remaps, seed=len(filesystem))


@pytest.mark.soak
@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
@pytest.mark.parametrize("seed", range(5))
def test_hundreds_of_remaps_under_a_verifying_load(
    guest: Guest, filesystem: str, seed: int
) -> None:
    check_load(guest, filesystem, remaps=300, seed=seed)


def check_load(guest: Guest, filesystem: str, remaps: int, seed: int) -> None:
    # xfs wants 300 MiB and more.
    size = 320 << 20
    guest.machine.attach(Disk("large", size=size))
    prepare(guest, "large", "spare", sectors=0)
    total = size // 512 // CHUNK_SECTORS
    chosen = random.Random(seed)
    # The first chunk holds a superblock; the first tenth is where both filesystems begin to write.
    places = {0, 1, total - 1} | {*chosen.sample(range(2, total // 10), remaps // 2)}
    places |= {*chosen.sample([c for c in range(total) if c not in places], remaps - len(places))}
    chunks = chosen.sample(sorted(places), remaps)
    done = guest.call("load", name=NAME, filesystem=filesystem, chunks=chunks)
    assert done["failures"] == {}
    assert done["check"][0] == 0, done["check"][1]
    assert done["always_loaded"]
    assert min(done["runs"].values()) >= 1
    assert done["lost"] == []
    assert done["chunks"] == sorted(chunks)
    assert done["generation"] == 1 + remaps
    assert done["damaged"] == 0
    print(filesystem, "fio runs:", done["runs"], "median pause in s:", median(done["pauses"]))


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


@pytest.mark.parametrize(
    ("main", "spare"),
    short_form([("main", "spare"), ("main4k", "spare4k")], always=[("main", "spare")]),
)
def test_no_acknowledged_write_is_lost(guest: Guest, main: str, spare: str) -> None:
    check_race(guest, main, spare, races=4)


@pytest.mark.soak
@pytest.mark.parametrize(("main", "spare"), [("main", "spare"), ("main4k", "spare4k")])
def test_no_acknowledged_write_is_lost_in_long_races(guest: Guest, main: str, spare: str) -> None:
    check_race(guest, main, spare, races=200)


def check_race(guest: Guest, main: str, spare: str, races: int) -> None:
    prepare(guest, main, spare, sectors=0)
    results = guest.call("race", name=NAME, chunks=[3 + 2 * number for number in range(races)])
    assert results == [{"codes": [0, 0, 0], "lost": [], "remapped": 1}] * races


@pytest.mark.second
@pytest.mark.parametrize(("last", "remapped"), [("frozen", False), ("committed", True)])
def test_a_guard_ends_the_freeze_of_a_killed_remap(guest: Guest, last: str, remapped: bool) -> None:
    prepare(guest, "main", "spare", "spare2", sectors=16384)
    found = guest.call("guarded", name=NAME, seed=SEED, last=last, chunk=11)
    assert found == {"wrong": [], "remapped": remapped, "interrupted": False, "damaged": 0}


@pytest.mark.soak
def test_a_remap_that_is_killed_after_each_step(guest: Guest) -> None:
    prepare(guest, "main", "spare", "spare2", sectors=16384)
    steps = guest.call("steps", name=NAME, chunk=0)
    assert {"salvaged", "delay_set", "frozen", "committed", "thawed", "parked"} < {*steps}
    chunks = [3 + 2 * number for number in range(len(steps))]
    guest.machine.disk("main").fail([(chunk * CHUNK_SECTORS + 40, 1) for chunk in chunks], "read")
    walked = guest.call(
        "kill_walk",
        name=NAME,
        main=guest.path("main"),
        spares=[guest.path("spare"), guest.path("spare2")],
        seed=SEED,
        steps=steps,
        first_chunk=chunks[0],
    )
    assert [result["step"] for result in walked] == steps
    first_copy = next(step for step in steps if step.endswith("/written"))
    for position, result in enumerate(walked):
        step = result["step"]
        assert result["wrong"] == [], step
        assert result["application"] == "0", f"{step}: reader and writer must continue"
        assert result["again"] == [], step
        assert not result["interrupted"], step
        assert result["damaged"] == 0, step
        # A copy that is whole counts, because the data was there before it.
        begun = position >= steps.index(first_copy)
        assert result["remapped"] == begun, step
        assert result["lost"] == begun, step
        assert result["generations"] == int(begun), step
        assert result["chunk_in_the_end"], step
        held = steps.index("frozen") <= position < steps.index("swapped")
        assert ("thaw" in result["actions"]) == held, step
        delayed = steps.index("delay_set") <= position < steps.index("thawed")
        assert (result["left"] == "delay") == delayed, step


@pytest.mark.second
def test_a_remap_keeps_the_links_of_the_target(guest: Guest) -> None:
    prepare(guest, "main", "spare")
    path = f"/dev/mapper/{NAME}"
    guest.machine.run(["mkfs.ext4", "-q", path])
    guest.machine.run(["udevadm", "settle"])
    uuid = guest.machine.run(["blkid", "-o", "value", "-s", "UUID", path]).stdout.strip()
    events = guest.call("links", name=NAME, sector=BAD_SECTOR)
    assert events, "a swap makes an event"
    for action, links in events:
        assert action == "change"
        # systemd unmounts a filesystem when the link that it was mounted by goes away.
        assert {path, f"/dev/disk/by-uuid/{uuid}"} <= {*links}
    guest.machine.run(["test", "-L", path])
