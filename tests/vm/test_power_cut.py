# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Power cuts at every step of a remap.

Several targets share a guest, each with disks of its own. Before a cut every one of them has a
remap that waits at a step, so that one boot serves as many steps as there are targets. The disks
have write caches that lose what was not flushed: all of it, or each block by chance.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.lab import Disk, Machine
from tests.vm.guest import Guest

pytestmark = pytest.mark.apart

TARGETS = 8
MAIN_SECTORS = 8192
CHUNK_SECTORS = 128
LOST_OFFSET = 40
# Parts of the unflushed blocks that outlive a cut: on a target's first spare, which gets the
# data, and on its second.
SURVIVAL = [(0.0, 0.5), (0.5, 0.0)]


@dataclass
class Guarded:
    """A target, and what the test knows of it."""

    index: int
    generation: int = 1
    chunks: set[int] = field(default_factory=set)
    changed: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"guarded{self.index}"

    @property
    def disks(self) -> list[Disk]:
        first, second = SURVIVAL[self.index % 2]
        main, spare = MAIN_SECTORS * 512, 22 << 20
        return [
            Disk(f"{role}{self.index}", size, "scsi", cache="volatile", survive=survive)
            for role, size, survive in (
                ("main", main, 0.0),
                ("first", spare, first),
                ("second", spare, second),
            )
        ]

    def places(self) -> dict[str, Any]:
        main, *spares = (disk.path for disk in self.disks)
        return {"name": self.name, "main": main, "spares": spares, "seed": self.index}


def chunk_of(turn: int) -> int:
    """The chunk that is remapped in a turn; every other one, so that neighbours stay on main."""
    return 3 + 2 * turn


def lost_sector(turn: int) -> int:
    return chunk_of(turn) * CHUNK_SECTORS + LOST_OFFSET


TURNS = (MAIN_SECTORS // CHUNK_SECTORS - 4) // 2


@pytest.fixture
def guarded() -> list[Guarded]:
    """The targets."""
    return [Guarded(index) for index in range(TARGETS)]


@pytest.fixture
def cut(lab_image: str, guarded: list[Guarded]) -> Iterator[Machine]:
    """A machine of the test's own, with the disks of all targets."""
    disks = [disk for target in guarded for disk in target.disks]
    with Machine(image=lab_image, disks=disks, memory_mb=768) as machine:
        yield machine


def turns(steps: list[str], walk: int) -> list[list[str]]:
    """The steps in groups, one for each turn.

    From one walk to the next every step moves on by one target, so that it meets the other
    survival of unflushed blocks.
    """
    padded = [*steps, *steps[: -len(steps) % TARGETS]]
    groups = [padded[start : start + TARGETS] for start in range(0, len(padded), TARGETS)]
    shift = walk % TARGETS
    return [group[-shift:] + group[:-shift] if shift else group for group in groups]


def cut_power(machine: Machine, targets: list[Guarded], steps: list[str], turn: int) -> None:
    """Let a remap of each target come to its step, cut the power, boot again."""
    jobs = [
        {"name": target.name, "start": chunk_of(turn) * CHUNK_SECTORS, "step": step}
        for target, step in zip(targets, steps)
    ]
    running = Guest(machine).begin("stay", jobs=jobs)
    try:
        running.next()
        machine.power_cut()
    finally:
        running.forget()
    machine.restart()


def check(target: Guarded, result: dict[str, Any], steps: list[str]) -> None:
    """One whole generation, old or new, and the data that belongs to it."""
    told = f"{target.name} after {result['step']}: {result}"
    old = {
        "generation": target.generation,
        "remapped": False,
        "lost": False,
        "extents": len(target.chunks),
    }
    new = {
        "generation": target.generation + 1,
        "remapped": True,
        "lost": True,
        "extents": len(target.chunks) + 1,
    }
    position = steps.index(result["step"])
    for found in (*result["alone"], result["together"]):
        assert found in (old, new), told
    if position >= steps.index("committed"):
        assert result["alone"] == [new, new], told
    first_copy = next(step for step in steps if step.endswith("/written"))
    if position < steps.index(first_copy):
        assert result["alone"] == [old, old], told
    assert result["active"]["generation"] == result["together"]["generation"], told
    assert result["active"]["damaged"] == 0, told
    assert result["again"] == [], told
    assert result["wrong"] == [], told
    assert not result["frozen"], told
    assert result["end"]["generation"] == target.generation + 1, told


def walk(
    machine: Machine, targets: list[Guarded], walks: int, most: int | None = None
) -> list[dict[str, Any]]:
    """Cut the power at every step, ``walks`` times over; what was found after each cut.

    Where ``most`` is given, at so many steps, spread evenly from the first to the last.
    """
    guest = Guest(machine)
    places = [{**target.places(), "sectors": MAIN_SECTORS} for target in targets]
    for made in guest.call("prepare", targets=places):
        assert made["again"] == []
    lost = [(lost_sector(turn), 1) for turn in range(TURNS)]
    for target in targets:
        machine.disk(f"main{target.index}").fail(lost, op="read", errno="ENODATA")
    steps = guest.call("steps", name=targets[0].name, chunk=0)
    targets[0].chunks.add(0)
    targets[0].generation += 1
    found = []
    last = len(steps) - 1
    chosen = steps if most is None else [steps[n * last // (most - 1)] for n in range(most)]
    groups = [group for number in range(walks) for group in turns(chosen, number)]
    for turn, group in enumerate(groups):
        cut_power(machine, targets, group, turn)
        asked = [
            {
                **target.places(),
                "chunk": chunk_of(turn),
                "chunk_sectors": CHUNK_SECTORS,
                "sectors": MAIN_SECTORS,
                "steps": steps,
                "step": step,
                "changed": target.changed,
                "lost": [
                    lost_sector(number)
                    for number in range(TURNS)
                    if str(lost_sector(number)) not in target.changed
                ],
            }
            for target, step in zip(targets, group)
        ]
        for target, result in zip(targets, guest.call("recover", targets=asked)):
            check(target, result, steps)
            target.generation += 1
            target.chunks.add(chunk_of(turn))
            target.changed.update(result["changed"])
            found.append(result)
    assert {result["step"] for result in found} == {*chosen}
    return found


@pytest.mark.parametrize(
    "most", [TARGETS, pytest.param(None, marks=pytest.mark.soak)], ids=["some", "all"]
)
def test_power_cuts_at_the_steps_of_a_remap(
    cut: Machine, guarded: list[Guarded], most: int | None
) -> None:
    found = walk(cut, guarded, walks=1, most=most)
    outcomes = {result["together"]["remapped"] for result in found}
    assert outcomes == {False, True}, "both the old and the new generation must have been met"


@pytest.mark.core
@pytest.mark.soak
def test_power_cuts_at_every_step_again_and_again(cut: Machine, guarded: list[Guarded]) -> None:
    walk(cut, guarded, walks=7)


def bad_blocks(target: Guarded) -> tuple[list[int], list[int]]:
    """First sectors of blocks of a main that cannot be written, and of such that cannot be read."""
    chooser = random.Random(target.index)
    blocks = [8 * block for block in chooser.sample(range(MAIN_SECTORS // 8), 14)]
    return blocks[:12], blocks[12:]


@pytest.mark.core
@pytest.mark.soak
def test_power_cuts_at_random_moments_while_errors_are_healed(
    cut: Machine, guarded: list[Guarded]
) -> None:
    """Twenty cuts of four targets each; what was flushed is there, and nothing is mixed."""
    used = guarded[:4]
    chooser = random.Random(3)
    known = [
        {
            **target.places(),
            "sectors": MAIN_SECTORS,
            "lost": bad_blocks(target)[1],
            "durable": {},
            "version": 0,
        }
        for target in used
    ]
    for number in range(21):
        guest = Guest(cut)
        running = guest.begin("hold_writes", targets=known, fill=number == 0, work=number < 20)
        try:
            looked = running.next()
            print(*looked["log"], sep="\n")
            assert looked["wrong"][:20] == [], f"after cut {number}"
            if number == 20:
                break
            if number == 0:
                for target in used:
                    unwritable, unreadable = bad_blocks(target)
                    disk = cut.disk(f"main{target.index}")
                    disk.fail([(sector, 8) for sector in unwritable], op="write")
                    disk.fail([(sector, 1) for sector in unreadable], op="read")
            for _word in range(chooser.randint(20, 200)):
                told = running.next()
                assert "error" not in told
                target = known[told["target"]]
                target["version"] = told["version"]
                target["durable"].update(told["durable"])
            cut.power_cut()
        finally:
            running.forget()
        for target in known:
            # Above all numbers that may have been written without a word.
            target["version"] += 100_000
        cut.restart()
        print(f"cut {number + 1}: {looked['actions']}")
    moved = sum(
        len(state["chunks"]) for state in guest.call("states", names=[t.name for t in used])
    )
    print(f"{moved} chunks are on spares")
    assert moved
