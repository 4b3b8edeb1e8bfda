# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Runs fio and PostgreSQL on a target while the test makes its main's sectors fail.

Tells where the data is, waits for the test, starts the loads, tells that, waits again, ends the
loads, and tells what came of it. The victims are a file whose sectors the test makes unreadable;
nothing else may notice.
"""

from __future__ import annotations

import glob
import json
import os
import re
import subprocess
import threading
from typing import Any

from fio import LOADS, job, loaded
from reports import Listener
from scene import answer, arguments, pattern, present, problems, state

from dm_remap.files import owners

MOUNT = "/mnt/storm"
VICTIMS = f"{MOUNT}/victims"
VICTIMS_BYTES = 4 << 20
BLOCK_SECTORS = 8
CLUSTER = f"{MOUNT}/cluster"
RUN_DIRECTORY = "/run/storm"
SIGNAL = f"{RUN_DIRECTORY}/signal"
# Small, so that much is read from and written to the target.
SETTINGS = {
    "listen_addresses": "",
    "unix_socket_directories": RUN_DIRECTORY,
    "shared_buffers": "1MB",
    "max_wal_size": "4MB",
    "min_wal_size": "2MB",
    "checkpoint_timeout": "30s",
    "restart_after_crash": "off",
}
BENCH_SECONDS = 10
LOOK_UP_SECONDS = 300


def run(command: list[str]) -> str:
    """Run a command that must work; its output."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def postgres(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a program of PostgreSQL as its user."""
    (program,) = glob.glob(f"/usr/lib/postgresql/*/bin/{command[0]}")
    return subprocess.run(
        [program, *command[1:]],
        capture_output=True,
        text=True,
        check=False,
        user="postgres",
        group="postgres",
        extra_groups=[],
        cwd="/tmp",
    )


def must(done: subprocess.CompletedProcess[str]) -> None:
    """End with what a program said if it failed."""
    if done.returncode:
        raise SystemExit(f"{done.args}: {done.returncode}\n{done.stdout}\n{done.stderr}")


def control(action: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Start or stop the server; what it inherits of ours must not keep a pipe open."""
    command = ["pg_ctl", "-D", CLUSTER, "-w", "-t", "300", "-l", f"{RUN_DIRECTORY}/log"]
    return postgres(*command, action, *more)


class Bench(threading.Thread):
    """One pgbench after the other until told to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.stopping = threading.Event()
        self.runs = 0
        self.transactions = 0
        self.failure = ""

    def run(self) -> None:
        while not self.stopping.is_set() and not self.failure:
            done = bench("-c", "2", "-n", "-T", str(BENCH_SECONDS))
            self.runs += 1
            count = re.search(r"actually processed: (\d+)", done.stdout)
            self.transactions += int(count[1]) if count else 0
            if done.returncode or "ERROR" in done.stderr:
                self.failure = f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"


def bench(*more: str) -> subprocess.CompletedProcess[str]:
    """Run pgbench."""
    return postgres("pgbench", "-h", RUN_DIRECTORY, *more, "postgres")


def pieces(paths: list[str]) -> list[tuple[int, int]]:
    """First sectors and counts, on the target, of what files occupy."""
    found = []
    for path in paths:
        for line in run(["filefrag", "-v", "-b512", path]).splitlines():
            extent = re.match(r"\s*\d+:\s*\d+\.\.\s*\d+:\s*(\d+)\.\.\s*\d+:\s*(\d+):", line)
            if extent:
                found.append((int(extent[1]), int(extent[2])))
    return found


def free_places(path: str) -> list[tuple[int, int]]:
    """First sectors and counts of what ext4 has not allocated."""
    found = []
    for line in run(["dumpe2fs", path]).splitlines():
        if line.startswith("  Free blocks:"):
            for first, last in re.findall(r"(\d+)(?:-(\d+))?", line):
                count = int(last or first) - int(first) + 1
                found.append((int(first) * BLOCK_SECTORS, count * BLOCK_SECTORS))
    return found


def journal_places(path: str) -> list[tuple[int, int]]:
    """First sectors and counts of ext4's journal."""
    blocks = subprocess.run(
        ["debugfs", "-R", "blocks <8>", path], check=True, capture_output=True, text=True
    ).stdout.split()
    return [(int(block) * BLOCK_SECTORS, BLOCK_SECTORS) for block in blocks]


def write_victims(seed: int) -> list[tuple[int, int]]:
    """Write the pattern of each sector of the target to the victims' file."""
    with open(VICTIMS, "wb") as file:
        file.write(bytes(VICTIMS_BYTES))
        os.fsync(file.fileno())
    places = pieces([VICTIMS])
    with open(VICTIMS, "r+b") as file:
        for first, count in places:
            file.write(pattern(seed, first, count))
        os.fsync(file.fileno())
    return places


def prepare(given: dict[str, Any]) -> dict[str, Any]:
    """Make the target and all that will be on it; where that is."""
    present(given["name"], given["main"], [given["spare"]], on_error="hold", shim=given["shim"])
    path = f"/dev/mapper/{given['name']}"
    run("mkfs.ext4 -q -F -b 4096 -J size=4".split() + ["-E", "lazy_itable_init=0", path])
    os.makedirs(MOUNT, exist_ok=True)
    run(["mount", path, MOUNT])
    victims = write_victims(given["seed"])
    for kind in LOADS:
        run([*job(kind, MOUNT), "--create_only=1"])
    places = {"victims": victims, "fio": pieces([f"{MOUNT}/{kind}.0.0" for kind in LOADS])}
    if given["database"]:
        os.mkdir(CLUSTER, mode=0o700)
        run(["chown", "postgres:", CLUSTER])
        run(["chown", "postgres:", RUN_DIRECTORY])
        options = "-N -k --wal-segsize=1 --locale=C -E UTF8 -A trust".split()
        must(postgres("initdb", "-D", CLUSTER, *options))
        settings = " ".join(f"-c {name}='{value}'" for name, value in SETTINGS.items())
        must(control("start", "-o", settings))
        must(bench("-i", "-q", "-s", "1"))
        places["database"] = pieces(
            [name for name in glob.glob(f"{CLUSTER}/base/*/*") if os.path.getsize(name)]
        )
        places["log"] = pieces(glob.glob(f"{CLUSTER}/pg_wal/0*"))
    run(["sync"])
    places["free"] = free_places(path)
    places["journal"] = journal_places(path)
    return places


def wait() -> None:
    """Wait for the test."""
    with open(SIGNAL, encoding="ascii") as file:
        file.read()


def load(given: dict[str, Any], listener: Listener) -> dict[str, Any]:
    """Start the loads, end them when told, and look at what they left."""
    path = f"/dev/mapper/{given['name']}"
    with loaded(MOUNT) as loads:
        if given["database"]:
            loads.append(Bench())
            loads[-1].start()
        answer("loaded")
        wait()
        working = all(load.is_alive() for load in loads)
    found: dict[str, Any] = {
        "always_loaded": working,
        "runs": [one.runs for one in loads],
        "failures": [one.failure for one in loads if one.failure],
    }
    if given["database"]:
        must(control("stop", "-m", "fast"))
        with open(f"{RUN_DIRECTORY}/log", encoding="utf-8") as file:
            words = ("ERROR", "PANIC", "WARNING", "could not")
            found["log"] = [line for line in file if any(word in line for word in words)]
        check = postgres("pg_checksums", "--check", "-D", CLUSTER)
        found["checksums"] = [check.returncode, check.stdout + check.stderr]
        found["transactions"] = loads[-1].transactions
    lost = [(sector, 1) for sector in state(given["name"])["lost"]]
    found["files"] = [
        [owner.start, owner.count, owner.kind, list(owner.paths)]
        for owner in owners(path, lost, LOOK_UP_SECONDS)
    ]
    run(["umount", MOUNT])
    check = subprocess.run(
        ["e2fsck", "-f", "-n", path], capture_output=True, text=True, check=False
    )
    found["check"] = [check.returncode, check.stdout + check.stderr]
    return {**found, "reports": listener.reports, **state(given["name"])}


def main() -> None:
    """Do it all."""
    given = arguments()
    os.makedirs(RUN_DIRECTORY, exist_ok=True)
    os.mkfifo(SIGNAL)
    try:
        listener = Listener()
        listener.start()
        places = prepare(given)
        answer(places)
        wait()
        found = load(given, listener)
        wait_for = f"/dev/mapper/{given['name']}"
        answer(found)
        # Told which sectors are lost, for each of the victims must read as it should.
        with open(SIGNAL, encoding="ascii") as file:
            lost = json.load(file)
        answer(problems(wait_for, given["seed"], places["victims"], lost))
    finally:
        os.unlink(SIGNAL)


main()
