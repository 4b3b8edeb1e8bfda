# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Many sectors fail while applications work on a target that holds its errors."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.lab import Disk, GuestDisk, Machine
from tests.vm.guest import PLACE, Guest

NAME = "storm"
SEED = 11
CHUNK_SECTORS = 128
MOUNT = "/mnt/storm"
VICTIMS = f"{MOUNT}/victims"
SOCKET_DIRECTORY = "/run/storm"
SIGNAL = f"{SOCKET_DIRECTORY}/signal"
HEALER = "dm-remap-healer.service"

# Of the sectors that fail: reads for a while, writes for good, reads (and writes) for good where
# nobody needs the data: in a file of their own, and where nothing is yet. The latter two are bad
# before the others, or a chunk could be saved for one sector before another one of it fails.
BEFORE = ("victims", "free")
SHARES = {"weak": 35, "write": 35, "victims": 20, "free": 10}
# Where the weak ones and those that cannot be written are.
PLACES = {
    "weak": {"fio": 3, "database": 7},
    "write": {"fio": 5, "database": 3, "log": 3, "journal": 2},
}


@dataclass(frozen=True)
class Kind:
    """A kind of main.

    Args:
        interface: how the guest reaches it.
        errno: what QEMU's device gets.
        tries: how many requests must fail so that one of the guest's does (docs/lab.md).
        shim: of the target.
    """

    interface: str
    errno: str
    tries: int
    shim: str = "none"

    def __str__(self) -> str:
        return f"{self.interface}-{self.errno}-{self.shim}"


VIRTIO = Kind("virtio", "EIO", 1)
SHIMMED = Kind("scsi", "ENODATA", 1, "raid")
# The stack holds every error of these.
HELD = [
    VIRTIO,
    Kind("scsi", "EIO", 6),
    SHIMMED,
    Kind("nvme", "EIO", 6, "raid"),
    Kind("ide", "EIO", 6),
]
# Of these an application sees each error once.
PASSED = [Kind("scsi", "ENODATA", 1), Kind("nvme", "EIO", 6)]
STORM_SECTORS = 100
# Bad sectors of each of four sorts for each of HELD and PASSED.
PROBES = 10


class Placer:
    """Chooses sectors, each one once.

    Args:
        places: first sectors and counts by what is there.
        seed: makes the choice repeatable.
    """

    def __init__(self, places: dict[str, list[list[int]]], seed: int) -> None:
        self._places = places
        self._chosen: set[int] = set()
        self.random = random.Random(seed)

    def take(self, where: str) -> int:
        """A sector that was not taken."""
        ranges = self._places[where]
        while True:
            start, count = self.random.choices(ranges, [count for _start, count in ranges])[0]
            sector = self.random.randrange(start, start + count)
            if sector not in self._chosen:
                self._chosen.add(sector)
                return sector


@dataclass(frozen=True)
class Bad:
    """A sector that is to fail, why, and how."""

    sector: int
    sort: str
    op: str
    times: int | None = None


def choose(placer: Placer, kind: Kind, total: int, database: bool) -> list[Bad]:
    """Choose all sectors of a storm."""
    found = []
    for sort, share in SHARES.items():
        for _sector in range(total * share // 100):
            weights = PLACES.get(sort, {sort: 1})
            known = [where for where in weights if database or where not in ("database", "log")]
            where = placer.random.choices(known, [weights[place] for place in known])[0]
            times = kind.tries * placer.random.randint(1, 3) if sort == "weak" else None
            op = {"weak": "read", "write": "write"}.get(sort) or placer.random.choice(
                ["read", "both"]
            )
            found.append(Bad(placer.take(where), sort, op, times))
    placer.random.shuffle(found)
    return found


def fail(disk: GuestDisk, bad: list[Bad], errno: str) -> None:
    """Make sectors fail; each change at QEMU starts the counts of the weak ones again."""
    alike: dict[tuple[str, int | None], list[tuple[int, int]]] = {}
    for one in bad:
        alike.setdefault((one.op, one.times), []).append((one.sector, 1))
    for (op, times), sectors in alike.items():
        disk.fail(sectors, op, errno, times=times)


def start_healer(machine: Machine) -> None:
    """Start the process that heals, as its service does."""
    command = f"systemd-run --unit={HEALER} --service-type=notify --collect".split()
    command += [f"--setenv=PYTHONPATH={PLACE}", "python3", "-m", "dm_remap.healer"]
    machine.run(command)


def stop_healer(machine: Machine) -> None:
    """Stop it, whether it runs or not."""
    machine.run(["systemctl", "stop", HEALER], check=False)


def latencies(kernel: list[str]) -> list[float]:
    """Seconds from each failure of the path to the next time that it is reinstated."""
    found, failed = [], None
    for line in kernel:
        told = re.match(r"\[ *(\d+\.\d+)\].*multipath: .*(Failing|Reinstating) path", line)
        if told and told[2] == "Failing":
            failed = float(told[1]) if failed is None else failed
        elif told and failed is not None:
            found.append(float(told[1]) - failed)
            failed = None
    return sorted(found)


def quantile(values: list[float], part: float) -> float:
    """The value below which ``part`` (0 to 1) of the sorted values are."""
    return values[min(len(values) - 1, int(part * len(values)))] if values else float("nan")


def sectors_of(ranges: list[dict[str, int]]) -> set[int]:
    """The sectors of reported ranges."""
    return {r["start"] + number for r in ranges for number in range(r["count"])}


def storm(
    guest: Guest, main: str, spare: str, kind: Kind, total: int, bursts: int, database: bool
) -> None:
    """Let ``total`` sectors fail in bursts under load, and look that only victims are lost."""
    machine, disk = guest.machine, guest.machine.disk(main)
    running = guest.begin(
        "storm",
        name=NAME,
        main=guest.path(main),
        spare=guest.path(spare),
        shim=kind.shim,
        seed=SEED,
        database=database,
    )
    try:
        placer = Placer(running.next(), SEED)
        bad = choose(placer, kind, total, database)
        fail(disk, [one for one in bad if one.sort in BEFORE], kind.errno)
        machine.run(["dmesg", "--clear"])
        go_on(machine, "go")
        assert running.next() == "loaded"
        rest = [one for one in bad if one.sort not in BEFORE]
        sweeps = []
        reading = {"mount": MOUNT, "database": database, "socket": SOCKET_DIRECTORY}
        for number in range(bursts):
            fail(disk, rest[number::bursts], kind.errno)
            sweeps.append(guest.call("sweep", **reading, part=number, parts=bursts))
        go_on(machine, "end")
        done = running.next()
        go_on(machine, str(sorted(one.sector for one in bad if one.sort == "victims")))
        wrong = running.next()
    finally:
        running.forget()
    kernel = [line for sweep in sweeps for line in sweep["kernel"]]
    show(kind, bad, done, kernel)
    assert wrong == [], "the victims read as they should, and no other sector of their file fails"
    check(bad, done)
    assert [sweep["errors"] for sweep in sweeps] == [[]] * bursts
    assert [line for line in kernel if "error" in line.lower() or "abort" in line.lower()] == []


def go_on(machine: Machine, word: str) -> None:
    """Let the program in the guest continue."""
    machine.run(["sh", "-c", f"cat > {SIGNAL}"], input=word)


def check(bad: list[Bad], done: dict[str, Any]) -> None:
    """Check what a storm left."""
    assert done["failures"] == []
    assert done["always_loaded"]
    assert done.get("log", []) == []
    assert done.get("checksums", [0])[0] == 0, done["checksums"][1]
    assert done["check"][0] == 0, done["check"][1]
    victims = {one.sector for one in bad if one.sort == "victims"}
    lost = {*done["lost"]}
    assert victims <= lost, "each of the victims was read"
    assert lost <= victims | {one.sector for one in bad if one.sort == "free"}
    reports = [report["lost"] for report in done["reports"] if report["type"] == "healed"]
    reported = {sector for ranges in reports for sector in sectors_of(ranges)}
    assert reported == lost
    owned = [
        sector
        for start, count, kind, paths in done["files"]
        for sector in range(start, start + count)
        if (kind, paths) == ("file", [VICTIMS])
    ]
    assert sorted(owned) == sorted(victims), done["files"]
    usual = ("healing", "healed", "passed")
    assert [report for report in done["reports"] if report["type"] not in usual] == []
    assert done["damaged"] == 0
    assert not done["interrupted"]


def show(kind: Kind, bad: list[Bad], done: dict[str, Any], kernel: list[str]) -> None:
    """Print what a storm was like."""
    remapped = {*done["chunks"]}
    counts = {}
    for sort in SHARES:
        chunks = [one.sector // CHUNK_SECTORS for one in bad if one.sort == sort]
        counts[sort] = f"{sum(chunk in remapped for chunk in chunks)}/{len(chunks)}"
    requests = sum(report.get("requests", 0) for report in done["reports"])
    print(
        f"{kind}: {len(bad)} bad sectors, in chunks that were moved: {counts}; "
        f"{requests} requests failed; "
        f"{len(remapped)} chunks moved, {len(done['lost'])} sectors lost; "
        f"loads {done['runs']}, {done.get('transactions', 0)} transactions; "
        f"error to healed (healer) {summary(healing_times(done['reports']))}, "
        f"path failed to reinstated (kernel log) {summary(latencies(kernel))}"
    )


def healing_times(reports: list[dict[str, Any]]) -> list[float]:
    """Seconds from each time that the healer saw an error to the end of the healing."""
    found, begun = [], 0
    for report in reports:
        if report["type"] == "healing":
            begun = report["time_ns"]
        elif report["type"] == "healed":
            found.append((report["time_ns"] - begun) / 1e9)
    return sorted(found)


def summary(seconds: list[float]) -> str:
    """Number, median and 99th percentile of sorted durations."""
    median, late = (quantile(seconds, part) * 1000 for part in (0.5, 0.99))
    return f"{len(seconds)} times, median {median:.0f} ms, p99 {late:.0f} ms"


@pytest.fixture
def guest(lab: Machine) -> Iterator[Guest]:
    """The clean guest with the core and the healer in it."""
    guest = Guest(lab)
    start_healer(lab)
    yield guest
    stop_healer(lab)


@pytest.mark.parametrize("kind", [VIRTIO, pytest.param(SHIMMED, marks=pytest.mark.soak)], ids=str)
def test_bad_sectors_under_applications(guest: Guest, kind: Kind) -> None:
    guest.machine.attach(Disk("large", size="160M", interface=kind.interface))
    storm(guest, "large", "spare", kind, total=24, bursts=2, database=True)


@pytest.fixture(scope="module")
def fleet(lab_image: str) -> Iterator[Machine]:
    """A guest with a large disk of each kind; ide disks cannot be plugged in."""
    disks = [Disk(f"large-{name}", "160M", name) for name in ("virtio", "scsi", "nvme", "ide")]
    with Machine(image=lab_image, disks=[*disks, Disk("spare")], memory_mb=640) as machine:
        yield machine


@pytest.fixture
def healed(fleet: Machine) -> Iterator[Guest]:
    """That guest, clean, with the healer."""
    if not fleet.running:
        fleet.start()
    fleet.reset(zero=[*fleet.disks], stop=[HEALER])
    guest = Guest(fleet)
    start_healer(fleet)
    yield guest
    stop_healer(fleet)
    try:
        fleet.reset(stop=[HEALER])
    except Exception:
        fleet.power_cut()
        raise


@pytest.mark.soak
@pytest.mark.parametrize("kind", HELD, ids=str)
def test_many_bad_sectors_under_applications(healed: Guest, kind: Kind) -> None:
    storm(
        healed,
        f"large-{kind.interface}",
        "spare",
        kind,
        total=STORM_SECTORS,
        bursts=5,
        database=True,
    )


@pytest.mark.soak
@pytest.mark.parametrize("kind", HELD + PASSED, ids=str)
def test_which_errors_are_held(healed: Guest, kind: Kind) -> None:
    disk = healed.machine.disk(f"large-{kind.interface}")
    healed.call(
        "hold",
        name=NAME,
        main=disk.path,
        spare=healed.path("spare"),
        shim=kind.shim,
        seed=SEED,
        sectors=1000 * CHUNK_SECTORS,
    )
    # A chunk for each sector.
    chunks = random.Random(SEED).sample(range(1, 999), 4 * PROBES)
    sectors = [chunk * CHUNK_SECTORS + chunk % CHUNK_SECTORS for chunk in chunks]
    weak, stuck, durable, dead = (sectors[number::4] for number in range(4))
    disk.fail([(s, 1) for s in weak], "read", kind.errno, times=2 * kind.tries)
    disk.fail([(s, 1) for s in stuck + durable], "write", kind.errno)
    disk.fail([(s, 1) for s in dead], "both", kind.errno)
    steps = {
        "read of weak": ("read", weak),
        "write of stuck": ("write", stuck),
        "durable write of stuck": ("durable write", durable),
        "write of dead": ("write", dead),
        "read of written": ("read", stuck + durable + dead),
    }
    done = healed.call("held", name=NAME, seed=SEED, steps=list(steps.values()))
    *failing, _written = done["steps"]
    for step, seen in [*zip(steps, done["steps"]), ("all but the last", sum(failing, []))]:
        errors = [len(each["attempts"]) - 1 for each in seen]
        print(
            f"{kind}: {step}: {sum(errors)} errors seen, {max(errors)} for one at most; "
            f"{summary(sorted(each['seconds'] for each in seen))}"
        )
    print(f"{kind}: error to healed (healer) {summary(healing_times(done['reports']))}")
    kinds = {report["type"] for report in done["reports"]}
    assert kinds <= {"healing", "healed", "passed"}, done["reports"]
    attempts = [[each["attempts"] for each in seen] for seen in done["steps"]]
    for one in attempts:
        assert {each[-1] for each in one} == {"ok"}
        assert all("wrong data" not in each for each in one)
        if kind in HELD:
            assert all(each == ["ok"] for each in one)
    if kind in PASSED:
        assert any(len(each) > 1 for each in attempts[0])
