# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Replaces the main of a target under a load.

The tasks: ``create`` a target; replace its main under a verifying ``load`` on a filesystem;
``race`` a replacement against writes whose durability is told; ``verify`` what was told after a
power cut.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import load
from fio import loaded
from scene import (
    HASTY,
    PIECE_SECTORS,
    SECTOR_BYTES,
    BlockDevice,
    Engine,
    answer,
    arguments,
    fill,
    pattern,
    state,
)

from dm_remap.plan import REPLACE, UNDO
from dm_remap.planner import plan_present
from dm_remap.replacing import Pace
from dm_remap.report import describe_target
from dm_remap.request import Request

BLOCK_SECTORS = 8
FLUSH_EVERY = 16


def change(given: dict[str, Any], main: str, engine: Engine) -> tuple[list[str], Any]:
    """Bring the target to a main as the module does; the kinds of the actions, and the result."""
    name, spares = given["name"], tuple(given["spares"])
    on_error, shim = given.get("on_error", "fail"), given.get("shim", "none")
    request = Request(name, main, spares, on_error=on_error, shim=shim)
    engine.check_host()
    with engine.locked_host(), engine.locked(name):
        plan = plan_present(request, engine.see(name, main, spares))
        engine.apply(plan)
    kinds = [action.kind for action in plan.actions]
    if REPLACE in kinds or UNDO in kinds:
        pace = Pace(window=given["window"])
        return kinds, engine.replace_main(name, UNDO in kinds, pace, HASTY)
    return kinds, None


def create(given: dict[str, Any]) -> list[str]:
    """Make the target, on a main that is full of the pattern."""
    fill(given["main"], 0, 0, given["sectors"])
    # No error is held here, so a daemon that could heal it need not run.
    with Engine().healing():
        kinds = change(given, given["main"], Engine())[0]
    if given.get("filesystem"):
        # Else the kernel zeroes inode tables later, by requests whose errors nobody places yet.
        eager = ["-E", "lazy_itable_init=0,lazy_journal_init=0"]
        load.run([*load.MAKE["ext4"], *eager, f"/dev/mapper/{given['name']}"])
    return kinds


@contextlib.contextmanager
def healed(log: str) -> Iterator[None]:
    """Run the healer, as its service does, while the block runs."""
    address = "/run/replace-main-ready"
    with contextlib.ExitStack() as stack:
        ready = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        ready.bind(address)
        stack.callback(os.unlink, address)
        output = stack.enter_context(open(log, "w", encoding="utf-8"))
        healer = subprocess.Popen(
            [sys.executable, "-m", "dm_remap.healer"],
            stderr=output,
            env={**os.environ, "NOTIFY_SOCKET": address},
        )
        stack.callback(healer.wait)
        stack.callback(healer.terminate)
        ready.settimeout(120)
        ready.recv(100)
        yield


def holders(path: str) -> list[str]:
    """What the kernel has over a disk."""
    name = os.path.basename(os.path.realpath(path))
    return os.listdir(f"/sys/class/block/{name}/holders")


def told(name: str) -> dict[str, Any]:
    """What the module info tells."""
    engine = Engine()
    with engine.locked(name):
        return describe_target(engine.require(name))


def under_load(given: dict[str, Any]) -> dict[str, Any]:
    """Replace the main under a verifying load; what came of it, and what the healer said."""
    if given["on_error"] == "fail":
        return load_and_replace(given)
    log = "/run/replace-main-healer.log"
    with healed(log):
        done = load_and_replace(given)
    with open(log, encoding="utf-8") as file:
        return {**done, "healer": file.read()}


def load_and_replace(given: dict[str, Any]) -> dict[str, Any]:
    """Replace the main under a verifying load."""
    name, path = given["name"], f"/dev/mapper/{given['name']}"
    os.makedirs(load.MOUNT, exist_ok=True)
    load.run(["mount", path, load.MOUNT])
    percents = []

    def step(reached: str) -> None:
        if reached == "window_committed":
            percents.append(len(percents) + 1)

    try:
        with loaded(load.MOUNT) as loads:
            for chunk in given["remap"]:
                engine = Engine()
                with engine.locked(name):
                    engine.remap(name, [(chunk * state(name)["chunk_sectors"], 1)], patience=HASTY)
            kinds, result = change(given, given["new"], Engine(step=step))
            working = all(item.is_alive() for item in loads)
    finally:
        load.run(["umount", load.MOUNT])
    command = [*load.CHECK["ext4"], path]
    check = subprocess.run(command, capture_output=True, text=True, check=False)
    return {
        "actions": kinds,
        "result": asdict(result),
        "windows": len(percents),
        "again": change(given, given["new"], Engine())[0],
        "always_loaded": working,
        "failures": {item.kind: item.failure for item in loads if item.failure},
        "check": [check.returncode, check.stdout + check.stderr],
        "old_holders": holders(given["main"]),
        "told": told(name),
    }


# Writes whose order is known: number n goes to one place and says so.


def place_of(number: int, blocks: int) -> int:
    """The sector of a write."""
    return number * 7919 % blocks * BLOCK_SECTORS


def content_of(number: int, sector: int) -> bytes:
    """The sector that a write leaves."""
    return struct.pack("<QQ", 1 << 62 | number, sector) * (SECTOR_BYTES // 16)


class Writer(threading.Thread):
    """Writes and flushes until told to stop, and tells what is durable."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        self.path = f"/dev/mapper/{given['name']}"
        self.blocks = given["sectors"] // BLOCK_SECTORS
        self.number = given["first"]
        self.stopping = threading.Event()
        self.failure = ""

    def run(self) -> None:
        try:
            with BlockDevice(self.path, writable=True) as device:
                while not self.stopping.is_set():
                    for _turn in range(FLUSH_EVERY):
                        sector = place_of(self.number, self.blocks)
                        sectors = range(sector, sector + BLOCK_SECTORS)
                        device.write(sector, b"".join(content_of(self.number, s) for s in sectors))
                        self.number += 1
                    device.flush()
                    answer({"durable": self.number})
        except OSError as error:
            self.failure = str(error)


def race(given: dict[str, Any]) -> None:
    """Replace the main, or go back, while the writer works; one line for all that happens."""
    windows = 0

    def step(reached: str) -> None:
        nonlocal windows
        if reached == "window_committed":
            windows += 1
            answer({"window": windows})
        if reached == given.get("stay_at") and windows >= given.get("stay_after", 0):
            answer({"stays": reached})
            threading.Event().wait()

    writer = Writer(given)
    with contextlib.ExitStack() as stack:
        writer.start()
        stack.callback(writer.join)
        stack.callback(writer.stopping.set)
        change(given, given["goal"], Engine(step=step))
    answer({"end": writer.number, "failure": writer.failure})


def activate(given: dict[str, Any]) -> None:
    """Activate the target only."""
    name, spares = given["name"], tuple(given["spares"])
    request = Request(name, given["goal"], spares)
    engine = Engine()
    engine.check_host()
    plan = plan_present(request, engine.see(name, request.main, spares))
    kept = [action for action in plan.actions if action.kind not in (REPLACE, UNDO)]
    for action in kept:
        getattr(engine, f"_do_{action.kind}")(plan, action)


def verify(given: dict[str, Any]) -> dict[str, Any]:
    """After a power cut: no sector is older than what was told to be durable, or was never written.

    A block may be torn by a cut that came before its flush. ``gaps`` are ranges of numbers that
    were not told to be durable before an earlier cut.
    """
    activate(given)
    name, blocks = given["name"], given["sectors"] // BLOCK_SECTORS
    newest: dict[int, int] = {}
    piece = b""
    gone = {number for begin, end in given["gaps"] for number in range(begin, end)}
    for number in range(given["durable"]):
        if number in gone:
            continue
        newest[place_of(number, blocks)] = number
    wrong = []
    highest = given["durable"]
    with BlockDevice(f"/dev/mapper/{name}") as device:
        for sector in range(blocks * BLOCK_SECTORS):
            if sector % PIECE_SECTORS == 0:
                piece = device.read(sector, min(PIECE_SECTORS, given["sectors"] - sector))
            offset = sector % PIECE_SECTORS * SECTOR_BYTES
            data = piece[offset : offset + SECTOR_BYTES]
            block = sector - sector % BLOCK_SECTORS
            word = struct.unpack_from("<Q", data)[0]
            number = word & ~(1 << 62)
            if word >> 62 and place_of(number, blocks) == block:
                highest = max(highest, number + 1)
                if data == content_of(number, sector) and number >= newest.get(block, -1):
                    continue
            elif block not in newest and data == pattern(0, sector):
                continue
            wrong.append([sector, data[:16].hex(), newest.get(block)])
    return {"wrong": wrong[:10], "highest": highest, "told": told(name)}


given = arguments()
if given["task"] == "race":
    race(given)
else:
    tasks = {"create": create, "load": under_load, "verify": verify}
    answer(tasks[given["task"]](given))
