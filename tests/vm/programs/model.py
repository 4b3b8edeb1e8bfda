# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Does scenarios of steps on mapped devices and tells what the kernel shows after each step.

A step comes with what is expected after it, only to know when there is nothing more to wait for;
None where it is not looked at.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
import time
from typing import Any

from scene import BlockDevice, answer, arguments

from dm_remap import devmapper
from dm_remap.devmapper import DeviceMapper, Segment
from dm_remap.errors import DmRemapError

PATIENCE_SECONDS = 8.0
POLL_SECONDS = 0.02
# So many looks in a row must show what is expected: what waits has to stay so.
LOOKS = 10


class Host:
    """The mapped devices of a test, and an application's I/O to them."""

    def __init__(self, disks: dict[str, str]) -> None:
        self.mapper = DeviceMapper()
        self.devnos = {name: devno_of(path) for name, path in disks.items()}
        self.made: list[str] = []
        self.states: dict[str, str] = {}
        self.threads: list[threading.Thread] = []

    def do(self, verb: str, *words: Any) -> str:
        try:
            getattr(self, verb)(*words)
        except DmRemapError:
            return "refused"
        return "ok"

    def segments(self, table: list[list[Any]]) -> list[Segment]:
        return [
            Segment(start, length, target, params.format(**self.devnos))
            for start, length, target, params in table
        ]

    def create(self, name: str, table: list[list[Any]]) -> None:
        self.mapper.create_unannounced(name, f"DMREMAP-model-{name}", self.segments(table))
        self.made.append(name)
        info = self.mapper.info(name)
        assert info is not None
        self.devnos[name] = info.devno

    def load(self, name: str, table: list[list[Any]]) -> None:
        self.mapper.load(name, self.segments(table))

    def swap(self, name: str, noflush: bool = False) -> None:
        if noflush:
            self.without_flush(devmapper._RESUME, name)
        else:
            self.mapper.swap(name)

    def suspend(self, name: str, noflush: bool = False) -> None:
        if noflush:
            self.without_flush(devmapper._SUSPEND, name)
        else:
            self.mapper.suspend(name)

    def without_flush(self, kind: int, name: str) -> None:
        library = self.mapper._library
        library.dm_task_no_flush.argtypes = [ctypes.c_void_p]
        with self.mapper._task(kind, name) as task:
            library.dm_task_skip_lockfs(task)
            library.dm_task_no_flush(task)
            self.mapper._run(task, name, "suspend or resume")

    def message(self, name: str, text: str) -> None:
        self.mapper.message(name, text.format(**self.devnos))

    def expire(self, name: str) -> None:
        """Nothing to be done here: a delay ends by itself."""

    def read(self, key: str, name: str, sector: int, count: int) -> None:
        def call(device: BlockDevice) -> str:
            return f"read {device.read(sector, count)[::512].hex()}"

        self.start(key, name, call)

    def write(self, key: str, name: str, sector: int, count: int) -> None:
        def call(device: BlockDevice) -> str:
            device.write(sector, bytes([len(key)]) * 512 * count)
            return "done"

        self.start(key, name, call)

    def flush(self, key: str, name: str) -> None:
        def call(device: BlockDevice) -> str:
            device.flush()
            return "done"

        self.start(key, name, call)

    def start(self, key: str, name: str, call: Any) -> None:
        """Begin I/O that may wait for long, and come back when the kernel has it."""
        info = self.mapper.info(name)
        assert info is not None
        self.states[key] = "waiting"

        def work() -> None:
            # Writable, as a flush needs.
            with BlockDevice(info.node, writable=True) as device:
                try:
                    state = call(device)
                except OSError as error:
                    state = f"errno {error.errno}"
            self.states[key] = state

        thread = threading.Thread(target=work, daemon=True)
        self.threads.append(thread)
        thread.start()
        while self.states[key] == "waiting" and not in_kernel(thread):
            time.sleep(POLL_SECONDS)

    def look(self, watched: list[str]) -> dict[str, Any]:
        names = {devno: name for name, devno in self.devnos.items()}
        shown = {}
        for name in watched:
            lines = [*self.mapper.table(name), *self.mapper.status(name)]
            shown[name] = [
                [s.start, s.length, s.target, *(names.get(w, w) for w in s.params.split(" "))]
                for s in lines
            ]
        return {"io": dict(self.states), "shown": shown}

    def watch(self, result: str, expected: dict[str, Any]) -> dict[str, Any]:
        """Look until what is expected stays, or patience is at its end."""
        end = time.monotonic() + PATIENCE_SECONDS
        looks = 0
        while True:
            seen = {"result": result, **self.look(list(expected["shown"]))}
            looks = looks + 1 if seen == expected else 0
            if looks == LOOKS or time.monotonic() > end or result != expected["result"]:
                return seen
            time.sleep(POLL_SECONDS)

    def clean(self) -> None:
        """Let everything that waits go on, and remove all devices."""
        for name in self.made:
            if any(segment.target == "delay" for segment in self.mapper.table(name)):
                self.do("suspend", name)
        for name in self.made:
            self.mapper.clear(name)
            self.do("swap", name)
            self.do("message", name, "fail_if_no_path")
        for thread in self.threads:
            thread.join(PATIENCE_SECONDS)
        for name in reversed(self.made):
            self.mapper.remove_unannounced(name)


def devno_of(path: str) -> str:
    number = os.stat(path).st_rdev
    return f"{os.major(number)}:{os.minor(number)}"


def in_kernel(thread: threading.Thread) -> bool:
    """Whether a thread waits for I/O to complete: state D of /proc/PID/stat (proc(5))."""
    try:
        with open(f"/proc/self/task/{thread.native_id}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "D"
    except (FileNotFoundError, ProcessLookupError):
        return True


def zero(path: str, sectors: int) -> None:
    """Overwrite a disk's beginning with zeroes."""
    with BlockDevice(path, writable=True) as device:
        device.write(0, bytes(512 * sectors))


def observe(scenario: dict[str, Any]) -> list[dict[str, Any] | None]:
    """Do a scenario's steps up to the first one that shows something else than expected."""
    host = Host(scenario["disks"])
    observed: list[dict[str, Any] | None] = []
    try:
        for step, expected in zip(scenario["steps"], scenario["expected"]):
            result = host.do(*step)
            observed.append(expected and host.watch(result, expected))
            if observed[-1] != expected:
                break
    finally:
        host.clean()
    return observed


given = arguments()
for module in ("dm-multipath", "dm-round-robin", "dm-delay", "dm-integrity"):
    subprocess.run(["modprobe", module], check=True)
# After every change of a device udev would read it, and so fail paths and use up delays.
subprocess.run(["udevadm", "control", "--timeout=300", "--stop-exec-queue"], check=True)
found = []
try:
    for scenario in given["scenarios"]:
        for path in scenario["disks"].values():
            zero(path, given["sectors"])
        found.append(observe(scenario))
finally:
    subprocess.run(["udevadm", "control", "--timeout=300", "--start-exec-queue"], check=True)
answer(found)
