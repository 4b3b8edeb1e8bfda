# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""The kernel in memory and a real one do the same steps, and must show the same after each.

A step is a verb with its arguments; in a table, {name} stands for a device's number. What is
compared after each step: whether it was refused, every I/O's state, data or errno, and the table
and status of every device but those with an integrity target.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pytest

from tests.lab import Disk, Machine
from tests.unit.fake_kernel import SECTOR, Kernel, Process, Segment
from tests.vm.conftest import DISKS as DISKS_OF_THE_GUEST
from tests.vm.guest import Guest

pytestmark = pytest.mark.core

DISKS = ("main", "scsi", "spare", "spare2")
SIZE = 1024
# Read errors of the medium, on the scsi disk.
UNREADABLE = 800
LONG, SHORT = 3_600_000, 1_500

Step = list[Any]
Table = list[list[Any]]


class OnModel:
    """Does a scenario's steps on the kernel in memory; the verbs are those of programs/model.py."""

    def __init__(self) -> None:
        self.kernel = Kernel()
        self.mapper = Process(self.kernel).mapper
        self.devnos: dict[str, str] = {}
        self.io: dict[str, int] = {}
        for name in DISKS:
            self.devnos[name] = self.kernel.add_disk(name, 131072).devno
        scsi = self.kernel.disks["/dev/scsi"]
        scsi.code = errno.ENODATA
        scsi.spoil([UNREADABLE])
        self.watched: list[str] = []

    def do(self, verb: str, *words: Any) -> dict[str, Any]:
        result = "ok"
        try:
            getattr(self, verb)(*words)
        except OSError:
            result = "refused"
        return {"result": result, **self.look()}

    def segments(self, table: Table) -> list[Segment]:
        return [Segment(s, n, t, params.format(**self.devnos)) for s, n, t, params in table]

    def create(self, name: str, table: Table) -> None:
        self.devnos[name] = self.kernel.insert(name, name).devno
        self.kernel.load(name, self.segments(table))
        self.kernel.resume(name)
        if all(target != "integrity" for _start, _length, target, _params in table):
            self.watched.append(name)

    def load(self, name: str, table: Table) -> None:
        self.kernel.load(name, self.segments(table))

    def swap(self, name: str, noflush: bool = False) -> None:
        self.kernel.resume(name, noflush)

    def suspend(self, name: str, noflush: bool = False) -> None:
        self.kernel.suspend(name, noflush)

    def message(self, name: str, text: str) -> None:
        self.kernel.message(name, text.format(**self.devnos))

    def expire(self, name: str) -> None:
        self.kernel.expire(name)

    def read(self, key: str, name: str, sector: int, count: int) -> None:
        self.io[key] = self.kernel.submit_read(name, sector, count)

    def write(self, key: str, name: str, sector: int, count: int) -> None:
        data = bytes([len(key)]) * SECTOR * count
        self.io[key] = self.kernel.submit(name, sector, data)

    def flush(self, key: str, name: str) -> None:
        self.io[key] = self.kernel.submit_flush(name)

    def state(self, number: int) -> str:
        if number in self.kernel.failed:
            return f"errno {self.kernel.errors[number]}"
        if number in self.kernel.answers:
            return f"read {self.kernel.answers[number][::SECTOR].hex()}"
        return "done" if number in self.kernel.completed else "waiting"

    def look(self) -> dict[str, Any]:
        names = {devno: name for name, devno in self.devnos.items()}
        shown = {}
        for name in self.watched:
            lines = [*self.kernel.shown(name), *self.kernel.status(name)]
            shown[name] = [
                [s.start, s.length, s.target, *(names.get(w, w) for w in s.params.split(" "))]
                for s in lines
            ]
        return {"io": {key: self.state(number) for key, number in self.io.items()}, "shown": shown}


def linear(disk: str = "main") -> Table:
    return [[0, SIZE, "linear", f"{{{disk}}} 0"]]


def broken() -> Table:
    """Linear but for sectors 64 to 71."""
    return [
        [0, 64, "linear", "{main} 0"],
        [64, 8, "error", ""],
        [72, SIZE - 72, "linear", "{main} 72"],
    ]


def multipath(path: str = "map", queue: bool = True) -> Table:
    features = "3 queue_if_no_path" if queue else "2"
    params = f"{features} queue_mode bio 0 1 1 round-robin 0 1 1 {{{path}}} 1"
    return [[0, SIZE, "multipath", params]]


def delay(disk: str, milliseconds: int) -> Table:
    part = f"{{{disk}}} 0"
    return [[0, SIZE, "delay", f"{part} {milliseconds} {part} {milliseconds} {part} 0"]]


def through(disk: str) -> Table:
    """Linear, sectors 64 to 71 by another device."""
    return [
        [0, 64, "linear", "{main} 0"],
        [64, 8, "linear", f"{{{disk}}} 64"],
        [72, SIZE - 72, "linear", "{main} 72"],
    ]


HOLD = [["create", "map", broken()], ["create", "top", multipath()]]
FAILED = [*HOLD, ["write", "w", "top", 66, 2]]
HEAL = [["load", "map", linear()], ["swap", "map"]]
REINSTATE = ["message", "top", "reinstate_path {map}"]

FLUSH_FAILS, FLUSHED = "a flush that fails", "flushed"
SCENARIOS: dict[str, list[Step]] = {
    "a path that fails": [
        *HOLD,
        ["write", "w", "top", 0, 2],
        ["read", "r", "top", 0, 2],
        ["write", "bad", "top", 66, 2],
        ["write", "later", "top", 4, 2],
        ["read", "read", "top", 0, 1],
        ["flush", "flush", "top"],
        # All is tried again, the first fails the path again, and the rest waits on.
        REINSTATE,
        *HEAL,
        ["read", "below", "map", 66, 2],
        REINSTATE,
        ["read", "all", "top", 64, 8],
        REINSTATE,
    ],
    "a read that waits": [
        *HOLD,
        ["write", "www", "map", 0, 1],
        ["read", "r", "top", 70, 1],
        *HEAL,
        REINSTATE,
        ["read", "rr", "top", 0, 1],
    ],
    "without queue_if_no_path": [
        ["create", "map", broken()],
        ["create", "top", multipath(queue=False)],
        ["read", "r", "top", 64, 8],
        ["write", "later", "top", 0, 1],
        ["flush", "flush", "top"],
        REINSTATE,
        ["write", "w", "top", 0, 1],
    ],
    "messages": [
        *FAILED,
        ["write", "later", "top", 0, 1],
        ["message", "top", "fail_path {map}"],
        ["message", "top", "queue_if_no_path"],
        ["message", "top", "fail_if_no_path"],
        ["read", "r", "top", 0, 1],
        ["message", "top", "queue_if_no_path"],
        ["read", "rr", "top", 0, 1],
        REINSTATE,
        ["message", "top", "fail_path {map}"],
        ["flush", "flush", "top"],
        REINSTATE,
        ["message", "top", "fail_path {main}"],
        ["message", "top", "nonsense"],
        ["message", "map", "queue_if_no_path"],
        ["suspend", "top"],
        ["message", "top", "queue_if_no_path"],
        REINSTATE,
        ["swap", "top"],
    ],
    "a suspend fails what waits": [
        *FAILED,
        ["read", "r", "top", 0, 1],
        ["flush", "flush", "top"],
        ["suspend", "top"],
        ["read", "rr", "top", 0, 1],
        ["swap", "top"],
        *HEAL,
        REINSTATE,
    ],
    "a noflush suspend keeps what waits": [
        *FAILED,
        ["read", "r", "top", 0, 1],
        ["flush", "flush", "top"],
        ["suspend", "top", True],
        ["read", "rr", "top", 0, 1],
        ["swap", "top"],
        *HEAL,
        REINSTATE,
    ],
    "a swap fails what waits": [
        *FAILED,
        ["read", "r", "top", 0, 1],
        ["load", "top", multipath()],
        ["swap", "top"],
        ["read", "rr", "top", 64, 1],
        *HEAL,
        REINSTATE,
    ],
    "a noflush swap keeps what waits": [
        *FAILED,
        ["read", "r", "top", 0, 1],
        ["load", "top", multipath()],
        ["swap", "top", True],
        *HEAL,
        REINSTATE,
    ],
    "tables that can follow": [
        *HOLD,
        ["load", "top", linear("map")],
        ["load", "top", [*multipath(), [SIZE, 8, "error", ""]]],
        ["load", "top", [[0, SIZE, "error", ""]]],
        ["load", "top", [[0, SIZE, "multipath", multipath()[0][3].replace("{map}", "{main}")]]],
        ["swap", "top"],
        ["load", "top", [[0, 10**6, *multipath()[0][2:]]]],
        ["swap", "top"],
        ["read", "r", "top", 0, 1],
        ["swap", "top"],
        ["load", "map", [[0, 10**6, "linear", "{main} 0"]]],
        ["swap", "map"],
        ["create", "long", [[0, 10**6, "linear", "{main} 0"]]],
        ["load", "map", multipath("main")],
        ["load", "map", linear()],
    ],
    "errors that are not of the path": [
        ["create", "map", linear("scsi")],
        ["create", "top", multipath()],
        ["read", "r", "top", UNREADABLE, 1],
        ["read", "rr", "top", UNREADABLE + 1, 1],
    ],
    "a lost sector": [
        ["create", "data", linear("spare")],
        [
            "create",
            "tags",
            [
                [
                    0,
                    SIZE,
                    "integrity",
                    "{data} 0 - J 4 internal_hash:crc32c meta_device:{spare2} block_size:512"
                    " journal_sectors:128",
                ]
            ],
        ],
        ["create", "map", linear("tags")],
        ["create", "top", multipath()],
        ["read", "r", "top", 8, 1],
        ["write", "w", "top", 8, 1],
        ["read", "rr", "top", 8, 1],
        ["read", "rrr", "top", 8, 2],
    ],
    FLUSH_FAILS: [
        ["create", "map", linear()],
        ["create", "top", multipath()],
        # QEMU hands a flush on only if something was written before.
        ["write", "ww", "top", 4, 1],
        ["flush", "flush", "top"],
        ["write", "w", "top", 0, 1],
        REINSTATE,
    ],
    "a map that is suspended": [
        *HOLD,
        ["suspend", "map"],
        ["write", "w", "top", 0, 1],
        ["read", "r", "top", 64, 1],
        ["flush", "flush", "top"],
        ["swap", "map"],
        *HEAL,
        REINSTATE,
    ],
    "a delay": [
        ["create", "late", delay("main", LONG)],
        ["write", "w", "late", 0, 1],
        ["read", "r", "late", 0, 1],
        ["flush", "flush", "late"],
        ["suspend", "late"],
        ["write", "ww", "late", 0, 1],
        ["swap", "late"],
        ["load", "late", linear()],
        ["swap", "late"],
        ["read", "rr", "late", 0, 1],
    ],
    "a delay that ends": [
        ["create", "late", delay("main", SHORT)],
        ["write", "w", "late", 0, 1],
        ["expire", "late"],
    ],
    "a delay that a swap above waits for": [
        ["create", "late", delay("main", SHORT)],
        ["create", "map", through("late")],
        ["write", "w", "map", 66, 1],
        ["load", "map", linear()],
        ["swap", "map"],
    ],
    "an error below a delay": [
        ["create", "broken", broken()],
        ["create", "late", delay("broken", LONG)],
        ["create", "map", through("late")],
        ["create", "top", multipath()],
        ["write", "w", "top", 66, 1],
        ["read", "r", "top", 0, 1],
        ["flush", "flush", "top"],
        ["suspend", "late"],
        *HEAL,
        REINSTATE,
    ],
    "a part that is suspended": [
        ["create", "part", linear("spare")],
        ["create", "map", through("part")],
        ["create", "top", multipath()],
        ["suspend", "part"],
        ["write", "w", "top", 66, 1],
        ["write", "ww", "top", 0, 1],
        ["flush", "flush", "top"],
        ["load", "part", [[0, SIZE, "error", ""]]],
        ["swap", "part"],
        *HEAL,
        REINSTATE,
    ],
}


def flat(seen: dict[str, Any] | None) -> list[str]:
    """What was seen, line by line, for messages that can be read."""
    if seen is None:
        return []
    lines = [f"{key}: {state}" for key, state in seen["io"].items()]
    lines += [f"{name}: {words}" for name, shown in seen["shown"].items() for words in shown]
    return [seen["result"], *lines]


# Steps after which a delay may or may not be over, so that there is nothing to compare.
UNSEEN = {"a delay that ends": (1,), "a delay that a swap above waits for": (2, 3)}


@dataclass(frozen=True)
class Scenario:
    """What the model shows after each step, and the disks that the kernel does the same on."""

    disks: dict[str, str]
    expected: list[dict[str, Any] | None]


def on_model(title: str, disks: dict[str, str]) -> Scenario:
    """Do a scenario's steps on the model."""
    model = OnModel()
    if title == FLUSH_FAILS:
        model.kernel.disks["/dev/main"].flush_fails = 1
        disks = {**disks, "main": disks[FLUSHED]}
    expected: list[dict[str, Any] | None] = [model.do(*step) for step in SCENARIOS[title]]
    for number in UNSEEN.get(title, ()):
        expected[number] = None
    return Scenario({name: disks[name] for name in DISKS}, expected)


@pytest.fixture(scope="module")
def scenarios(machine: Machine) -> Iterator[dict[str, tuple[Scenario, list[Any]]]]:
    """Every scenario with what the kernel shows: one program does all, as its start takes long."""
    if not machine.running:
        machine.start()
    machine.disk("scsi").fail([(UNREADABLE, 1)], op="read", errno="ENODATA")
    # The others' cache is one that QEMU never flushes.
    machine.attach(Disk(FLUSHED, cache="writeback")).fail(op="flush", times=1)
    disks = {name: machine.disk(name).path for name in (*DISKS, FLUSHED)}
    models = {title: on_model(title, disks) for title in SCENARIOS}
    asked = [{**asdict(model), "steps": SCENARIOS[title]} for title, model in models.items()]
    observed = Guest(machine).call("model", scenarios=asked, sectors=SIZE)
    yield {title: (models[title], seen) for title, seen in zip(SCENARIOS, observed)}
    machine.reset(zero=[disk.name for disk in DISKS_OF_THE_GUEST])


@pytest.mark.parametrize("title", SCENARIOS)
def test_the_model_shows_what_the_kernel_shows(
    scenarios: dict[str, tuple[Scenario, list[Any]]], title: str
) -> None:
    steps = SCENARIOS[title]
    model, observed = scenarios[title]
    for step, told, seen in zip(steps, model.expected, observed):
        assert flat(seen) == flat(told), f"{title}: {step}"
    assert len(observed) == len(steps)
