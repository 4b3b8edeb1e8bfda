# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The disaster drill: a host is destroyed, and its disks are attached to another one."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.lab import Disk, Machine
from tests.vm.guest import Guest
from tests.vm.playing import ModuleRunner, Step

# Two hosts of its own take their time.
pytestmark = pytest.mark.soak

CHUNK_SECTORS = 128
CHUNKS = 512
# The targets with their spares, and how many chunks are remapped.
TARGETS = {"alpha": (("s0", "s1"), 80), "beta": (("s2", "s3"), 70), "gamma": (("s4",), 50)}
MAINS = [f"main-{name}" for name in TARGETS]
SPARES = [spare for spares, _count in TARGETS.values() for spare in spares]
# On the other host: other buses, and another order. Disks on ide cannot be unplugged.
BUSES = dict(zip(SPARES, ("scsi", "nvme", "scsi", "virtio", "nvme")))
NEAR = (0, 1024, 2048, 4096, 8192)
ALL = dict.fromkeys(TARGETS, "assembled")
STOP = """
for turn in 1 2 3 4 5; do
    for path in /dev/mapper/"$1"*; do
        test "$path" = /dev/mapper/control || dmsetup remove "$path" 2>/dev/null
    done
    udevadm settle
done
! ls /dev/mapper | grep -v '^control$' | grep "^$1"
"""

Content = Mapping[str, list[Any]]


@dataclass(frozen=True)
class Drill:
    """The other host, and what the targets held on the first one.

    Args:
        machine: the other host.
        runner: runs modules there.
        content: digest of each chunk by target.
        on: the spare that each remapped chunk is on, by target.
        images: the disks' images.
    """

    machine: Machine
    runner: ModuleRunner
    content: Content
    on: Mapping[str, Mapping[int, str]]
    images: Mapping[str, Path]

    def assemble(self, **options: Any) -> dict[str, Any]:
        """Run the module; its result."""
        done = self.runner.run(Step("assemble", "assemble", {"auto": True, **options}))["assemble"]
        assert "targets" in done, done
        return done

    def results(self, **options: Any) -> dict[str, str]:
        """What became of each target."""
        return {t["name"]: t["result"] for t in self.assemble(**options)["targets"]}

    def stop(self, prefix: str = "") -> None:
        """Take targets out of the kernel."""
        self.machine.run(["sh", "-c", STOP, "stop", prefix])

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


def make_targets(machine: Machine) -> tuple[Content, dict[str, dict[int, str]]]:
    """Host A: 200 remapped chunks, with old data on the mains in their places."""
    runner, guest = ModuleRunner(machine), Guest(machine)
    steps, chosen = [], {}
    for name, (spares, count) in TARGETS.items():
        chosen[name] = sorted(random.Random(name).sample(range(CHUNKS), count))
        steps.append(
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
        )
    runner.run(*steps)
    guest.call("drill", write=dict.fromkeys(TARGETS), version=1)
    done = runner.run(
        *(
            Step(
                f"remap {name}",
                "sectors",
                {
                    "name": name,
                    "ranges": [{"start": c * CHUNK_SECTORS, "count": 1} for c in chunks],
                },
            )
            for name, chunks in chosen.items()
        ),
        Step("info", "info"),
    )
    guest.call("drill", write=chosen, version=2)
    on = {}
    for target in done["info"]["targets"]:
        on[target["name"]] = {
            extent["logical"] + step: TARGETS[target["name"]][0][extent["spare"]]
            for extent in target["extents"]
            for step in range(extent["length"])
        }
        assert sorted(on[target["name"]]) == chosen[target["name"]]
    return guest.call("drill", read=list(TARGETS)), on


@pytest.fixture(scope="module")
def drill(lab_image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    """The other host, with the disks of the one that was destroyed."""
    folder = tmp_path_factory.mktemp("disks")
    images = {name: folder / f"{name}.img" for name in [*MAINS, *SPARES]}
    for name, image in images.items():
        with image.open("wb") as file:
            file.truncate((64 if name in SPARES else 32) << 20)
    with Machine(image=lab_image, disks=[disk(name, images) for name in images]) as host_a:
        content, on = make_targets(host_a)
        host_a.power_cut()
    moved = [disk(name, images, bus(name)) for name in reversed(images)]
    with Machine(image=lab_image, disks=moved) as host_b:
        yield Drill(host_b, ModuleRunner(host_b), content, on, images)


def disk(name: str, images: Mapping[str, Path], interface: str = "virtio") -> Disk:
    size = "64M" if name in SPARES else "32M"
    return Disk(name, size=size, interface=interface, image=str(images[name]))


def bus(name: str) -> str:
    return BUSES.get(name, "ide")


def test_all_targets_come_back_at_another_host(drill: Drill) -> None:
    planned = drill.runner.run(Step("plan", "assemble", {"auto": True}, check=True))["plan"]
    assert planned["changed"]
    assert drill.machine.run("ls /dev/mapper").stdout.split() == ["control"]
    done = drill.assemble()
    assert {t["name"]: t["result"] for t in done["targets"]} == ALL
    assert done["actions"] == planned["actions"]
    drill.check(*TARGETS)
    again = drill.assemble()
    assert not again["changed"]
    assert {t["result"] for t in again["targets"]} == {"active"}


@pytest.mark.parametrize("spare", SPARES)
def test_each_single_spare_missing(drill: Drill, spare: str) -> None:
    name = next(name for name, (spares, _n) in TARGETS.items() if spare in spares)
    drill.results()
    drill.stop(name)
    drill.machine.detach(spare)
    try:
        if len(TARGETS[name][0]) == 1:
            # Nothing tells of it any more.
            assert name not in drill.results(degraded="allowed")
        else:
            assert drill.results()[name] == "refused"
            assert drill.results(degraded="allowed")[name] == "assembled"
            drill.check(name, missing=spare)
    finally:
        drill.stop(name)
        drill.machine.attach(disk(spare, drill.images, bus(spare)))
    assert drill.results()[name] == "assembled"
    drill.check(name)


@pytest.mark.parametrize(
    ("first", "count"),
    [(0, 4), (1, 4), (0, 5)],
    ids=["only the last near copy", "only the first", "only far copies"],
)
def test_near_copies_overwritten(drill: Drill, first: int, count: int) -> None:
    damage(drill, [(sector, 1016) for sector in NEAR[first : first + count]])


def test_the_first_8_mib_zeroed(drill: Drill) -> None:
    damage(drill, [(0, 16384)], "/dev/zero")


def damage(drill: Drill, ranges: list[tuple[int, int]], source: str = "/dev/urandom") -> None:
    """Overwrite these sectors of all spares, and assemble."""
    drill.results()
    drill.stop()
    for spare in SPARES:
        path = drill.machine.disk(spare).path
        for start, count in ranges:
            blocks = f"bs=4096 seek={start // 8} count={count // 8}"
            drill.machine.run(f"dd if={source} of={path} {blocks} conv=fsync,notrunc status=none")
    done = drill.assemble()
    assert {t["name"]: t["result"] for t in done["targets"]} == ALL
    repaired = [spare for target in done["targets"] for spare in target["repaired"]]
    assert len(repaired) == len(SPARES)
    assert all(spare["whole"] for spare in repaired)
    drill.check(*TARGETS)
