# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The disaster drill: a host is destroyed, and its disks are attached to another one.

The short form makes fewer remaps and tries the kinds of damage once each; the long one tries all.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.lab import Disk, Machine
from tests.vm.guest import Guest
from tests.vm.images import pieces
from tests.vm.playing import ModuleRunner, Player, Step
from tests.vm.programs.drill import CHUNK, data_of, digest_of

pytestmark = pytest.mark.apart

SECTOR = 512
CHUNK_SECTORS = CHUNK // SECTOR
# Numbers that make the data of chunks before and after they were remapped.
OLDER, NEWER = 1, 2
SPARE_BYTES = 64 << 20
# The targets with their spares.
TARGETS = {"alpha": ("s0", "s1"), "beta": ("s2", "s3"), "gamma": ("s4",)}
MAINS = [f"main-{name}" for name in TARGETS]
SPARES = [spare for spares in TARGETS.values() for spare in spares]
# On the other host: other buses, and another order. Disks on ide cannot be unplugged.
BUSES = dict(zip(SPARES, ("scsi", "nvme", "scsi", "virtio", "nvme")))
NEAR = (0, 1024, 2048, 4096, 8192)
SLOT_SECTORS = 1024
ALL = dict.fromkeys(TARGETS, "assembled")
# Takes the targets whose names start so out of the kernel, level by level.
STOP = """
prefix=$1
for turn in 1 2 3 4 5; do
    left=$(ls /dev/mapper | grep -v '^control$' | grep "^$prefix") || break
    for name in $left; do dmsetup remove "$name" 2>/dev/null; done
    udevadm settle
done
! ls /dev/mapper | grep -v '^control$' | grep "^$prefix"
"""
# Forgets all that a host knows of its targets.
FORGET = """
rm -rf /var/lib/dm-remap /run/dm-remap
blockdev --flushbufs "$@"
"""
# Drops what was in memory of the disks, and lets udev look at them again.
LOOK_AGAIN = """
blockdev --flushbufs "$@"
udevadm trigger --settle --action=change "$@"
"""


@dataclass(frozen=True)
class Form:
    """How large a drill is.

    Args:
        name: the form's name.
        chunks: chunks of each target.
        remaps: how many of them are remapped, by target.
    """

    name: str
    chunks: int
    remaps: Mapping[str, int]


SHORT = Form("short", 64, {"alpha": 12, "beta": 8, "gamma": 6})
LONG = Form("long", 512, {"alpha": 80, "beta": 70, "gamma": 50})


def of_form(form: Form, *more: Any, case: str = "") -> Any:
    """Parameters of a test in a form of the drill; the long one is a long test."""
    marks = [pytest.mark.soak] if form is LONG else []
    return pytest.param(form, *more, marks=marks, id="-".join(filter(None, (form.name, case))))


@dataclass(frozen=True)
class Damage:
    """What is overwritten on every spare.

    Args:
        ranges: first sector and number of sectors.
        zero: with zeros, else with random bytes.
    """

    ranges: tuple[tuple[int, int], ...] = ()
    zero: bool = False

    def do(self, image: Path) -> None:
        """Overwrite it."""
        chance = random.Random(image.name)
        with image.open("r+b") as file:
            for start, count in self.ranges:
                size = count * SECTOR
                file.seek(start * SECTOR)
                file.write(bytes(size) if self.zero else chance.randbytes(size))


NO_DAMAGE = Damage()


def near_copies(first: int, end: int) -> Damage:
    return Damage(tuple((sector, SLOT_SECTORS) for sector in NEAR[first:end]))


@dataclass(frozen=True)
class Drill:
    """The other host, and what the targets held on the first one.

    Args:
        machine: the other host.
        runner: runs modules there.
        content: digest of each chunk by target.
        on: the spare that each remapped chunk is on, by target.
        specs: the disks.
        left: what the first host left on them, images by disk.
    """

    machine: Machine
    runner: ModuleRunner
    content: Mapping[str, list[str]]
    on: Mapping[str, Mapping[int, str]]
    specs: Mapping[str, Disk]
    left: Mapping[str, Path]

    def begin(self, damage: Damage = NO_DAMAGE) -> None:
        """Put back what the first host left on the disks, damaged, and forget what was done."""
        self.stop()
        paths = [disk.path for disk in self.machine.disks.values()]
        self.machine.run(["sh", "-c", FORGET, "forget", *paths])
        for name, spec in self.specs.items():
            image = Path(str(spec.image))
            put_back(self.left[name], image)
            if name in SPARES:
                damage.do(image)
        self.machine.run(["sh", "-c", LOOK_AGAIN, "look-again", *paths])

    def assemble(self, *options: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Run the module once for each of the options; its results."""
        steps = [
            Step(f"assemble {number}", "assemble", {"auto": True, **given})
            for number, given in enumerate(options)
        ]
        done = list(self.runner.run(*steps).values())
        assert all("targets" in one for one in done), done
        return done

    def stop(self, prefix: str = "") -> None:
        """Take targets out of the kernel."""
        self.machine.run(["sh", "-c", STOP, "stop", prefix])

    @contextmanager
    def without(self, spare: str) -> Iterator[None]:
        """Unplug a spare that no target stands on; its target is stopped before it comes back."""
        self.machine.detach(spare)
        try:
            yield
        finally:
            (owner,) = [name for name, spares in TARGETS.items() if spare in spares]
            self.stop(owner)
            self.machine.attach(self.specs[spare])

    def check(self, *names: str, missing: str = "") -> None:
        """Every chunk is right, or gives an error if its spare is missing."""
        found = Guest(self.machine).call("drill", read=list(names))
        for name in names:
            expected = [
                None if missing and self.on[name].get(chunk) == missing else digest
                for chunk, digest in enumerate(self.content[name])
            ]
            wrong = [c for c, both in enumerate(zip(found[name], expected)) if both[0] != both[1]]
            assert wrong == [], (name, missing)
            assert len(found[name]) == len(expected)


def results_of(done: Mapping[str, Any]) -> dict[str, str]:
    return {target["name"]: target["result"] for target in done["targets"]}


def put_back(left: Path, image: Path) -> None:
    """Give an image that a guest has open the content of another one."""
    length = f"--length={image.stat().st_size}"
    subprocess.run(["fallocate", "--punch-hole", length, str(image)], check=True)
    with image.open("r+b") as file:
        for offset, data in pieces(left):
            file.seek(offset)
            file.write(data)


def make_targets(machine: Machine, chosen: Mapping[str, list[int]]) -> dict[str, dict[int, str]]:
    """Host A: remap these chunks of each target, and write newer data to them.

    Returns:
        The spare of each remapped chunk by target.
    """
    make = [
        Step(
            f"make {name}",
            "target",
            {
                "name": name,
                "main": machine.disk(f"main-{name}").path,
                "spares": [machine.disk(spare).path for spare in spares],
                "on_error": "fail",
                "allocation": "balanced",
            },
        )
        for name, spares in TARGETS.items()
    ]
    remap = [
        Step(
            f"remap {name}",
            "sectors",
            {"name": name, "ranges": [{"start": c * CHUNK_SECTORS, "count": 1} for c in chunks]},
        )
        for name, chunks in chosen.items()
    ]
    done = ModuleRunner(machine).run(*make, *remap, Step("info", "info"))
    on = {}
    for target in done["info"]["targets"]:
        name = target["name"]
        on[name] = {
            extent["logical"] + step: TARGETS[name][extent["spare"]]
            for extent in target["extents"]
            for step in range(extent["length"])
        }
        assert sorted(on[name]) == chosen[name]
        assert {*on[name].values()} == {*TARGETS[name]}
    Guest(machine).call("drill", write=chosen, version=NEWER)
    return on


def make_disks(folder: Path, form: Form) -> dict[str, Disk]:
    """Empty spares, and mains with old data."""
    specs = {}
    for name in [*MAINS, *SPARES]:
        size = SPARE_BYTES if name in SPARES else form.chunks * CHUNK
        image = folder / f"{name}.img"
        with image.open("wb") as file:
            file.truncate(size)
            for chunk in range(form.chunks) if name in MAINS else ():
                file.write(data_of(name.removeprefix("main-"), chunk, OLDER))
        specs[name] = Disk(name, size=size, image=str(image))
    return specs


@pytest.fixture(scope="module")
def drill(
    lab_image: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Drill]:
    """The other host, with the disks of the one that was destroyed."""
    form: Form = request.param
    folder = tmp_path_factory.mktemp("disks")
    specs = make_disks(folder, form)
    chosen = {
        name: sorted(random.Random(name).sample(range(form.chunks), count))
        for name, count in form.remaps.items()
    }
    content = {
        name: [
            digest_of(data_of(name, chunk, NEWER if chunk in chunks else OLDER))
            for chunk in range(form.chunks)
        ]
        for name, chunks in chosen.items()
    }
    with Machine(image=lab_image, disks=list(specs.values())) as host_a:
        on = make_targets(host_a, chosen)
        host_a.power_cut()
    left = {name: folder / f"{name}.left" for name in specs}
    for name, image in left.items():
        subprocess.run(["cp", "--sparse=always", str(specs[name].image), image], check=True)
    moved = {name: elsewhere(specs[name]) for name in reversed(specs)}
    with Machine(image=lab_image, disks=list(moved.values())) as host_b:
        yield Drill(host_b, ModuleRunner(host_b), content, on, moved, left)


def elsewhere(spec: Disk) -> Disk:
    """The disk on the other host."""
    interface = BUSES.get(spec.name, "ide")
    return Disk(spec.name, size=spec.size, interface=interface, image=spec.image)


@pytest.mark.parametrize("drill", [of_form(SHORT), of_form(LONG)], indirect=True)
def test_one_play_brings_all_targets_back_at_another_host(drill: Drill, tmp_path: Path) -> None:
    drill.begin()
    play = Player(drill.machine, tmp_path).run(Step("assemble", "assemble", {"auto": True}))
    assert results_of(play["assemble"]) == ALL
    drill.check(*TARGETS)


@pytest.mark.parametrize("drill", [of_form(LONG)], indirect=True)
def test_check_mode_tells_what_is_done_once(drill: Drill) -> None:
    drill.begin()
    plan = drill.runner.run(Step("plan", "assemble", {"auto": True}, check=True))["plan"]
    assert plan["changed"]
    assert drill.machine.run("ls /dev/mapper").stdout.split() == ["control"]
    done, again = drill.assemble({}, {})
    assert results_of(done) == ALL
    assert done["actions"] == plan["actions"]
    assert not again["changed"]
    assert results_of(again) == dict.fromkeys(TARGETS, "active")


@pytest.mark.parametrize("drill", [of_form(SHORT)], indirect=True)
def test_a_target_without_a_spare(drill: Drill) -> None:
    drill.begin()
    with drill.without("s1"):
        (done,) = drill.assemble({"degraded": "allowed"})
        assert results_of(done) == ALL
        drill.check(*TARGETS, missing="s1")


@pytest.mark.parametrize(
    ("drill", "spare"), [of_form(LONG, spare, case=spare) for spare in SPARES], indirect=["drill"]
)
def test_each_single_spare_missing(drill: Drill, spare: str) -> None:
    name = next(name for name, spares in TARGETS.items() if spare in spares)
    others = [other for other in TARGETS if other != name]
    drill.begin()
    with drill.without(spare):
        refused, allowed = map(results_of, drill.assemble({}, {"degraded": "allowed"}))
        if len(TARGETS[name]) == 1:
            # Nothing tells of it any more.
            assert refused == dict.fromkeys(others, "assembled")
            assert allowed == dict.fromkeys(others, "active")
            drill.check(*others)
        else:
            assert refused == {**dict.fromkeys(others, "assembled"), name: "refused"}
            assert allowed == {**dict.fromkeys(others, "active"), name: "assembled"}
            drill.check(*TARGETS, missing=spare)
    (back,) = map(results_of, drill.assemble({}))
    assert back == {**dict.fromkeys(others, "active"), name: "assembled"}
    drill.check(name)


@pytest.mark.parametrize(
    ("drill", "damage"),
    [
        of_form(SHORT, near_copies(0, 5), case="all near copies"),
        of_form(LONG, near_copies(0, 4), case="all near copies but the last"),
        of_form(LONG, near_copies(1, 5), case="all near copies but the first"),
        of_form(LONG, near_copies(0, 5), case="all near copies"),
        of_form(LONG, Damage(((0, 16384),), zero=True), case="the first 8 MiB"),
    ],
    indirect=["drill"],
)
def test_every_spare_overwritten_at_its_start(drill: Drill, damage: Damage) -> None:
    drill.begin(damage)
    (done,) = drill.assemble({})
    assert results_of(done) == ALL
    repaired = [spare for target in done["targets"] for spare in target["repaired"]]
    assert len(repaired) == len(SPARES)
    assert all(spare["whole"] for spare in repaired)
    drill.check(*TARGETS)
