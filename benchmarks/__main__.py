# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run the benchmarks: ``python -m benchmarks``; all but one part in a virtual machine."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.lab import Disk, Machine
from tests.vm.guest import PLACE, Guest

Row = tuple[str, list[float], float]
PARTS = ("measure", "stack", "discovery", "here")
LATENCIES = ("0", "100 us", "300 us", "5 ms")
REMAPS = 10_000
SPARES = 64
MDADM = "mdadm --examine --scan"
# A spare for each of the eight places of a target.
TARGETS = 8
CORE = Path(__file__).resolve().parents[1] / "plugins" / "module_utils"


def main() -> int:
    """Boot, measure, print."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--image", default="debian-12", help="the guest: debian-12 or debian-13")
    parser.add_argument("--rounds", type=int, default=20, help="remaps and commits to measure")
    parser.add_argument(
        "--only", choices=PARTS, action="append", help="measure this part only; may be repeated"
    )
    parser.add_argument("--seconds", type=int, default=1, help="length of each load of the stack")
    parser.add_argument(
        "--latency", choices=LATENCIES, action="append", help="of the stack's disk; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON")
    arguments = parser.parse_args()
    parts = set(arguments.only or PARTS)
    found: dict[str, Any] = {}
    if "measure" in parts:
        found["measure"] = measure_target(arguments)
    if "stack" in parts:
        found["stack"] = measure_stack(arguments)
    if "discovery" in parts:
        found["discovery"] = measure_discovery(arguments)
    if "here" in parts:
        if os.geteuid() == 0 and os.path.exists("/dev/loop-control"):
            found["here"] = measure_here(arguments)
        else:
            print("not measured: an inventory on this machine, which needs root and loop devices")
    if arguments.json:
        print(json.dumps(found))
        return 0
    reports = {
        "measure": report,
        "stack": report_stack,
        "discovery": report_discovery,
        "here": report_here,
    }
    for name, lines in reports.items():
        if name in found:
            print("\n".join(lines(found[name])))
    return 0


def measure_target(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a target costs on one main and one spare."""
    disks = [Disk("main", size="256M"), Disk("spare", size="256M")]
    with Machine(image=arguments.image, disks=disks, memory_mb=1536) as machine:
        guest = Guest(machine)
        put_program(machine, "measure")
        return dict(
            guest.call(
                "measure",
                main=guest.path("main"),
                spare=guest.path("spare"),
                rounds=arguments.rounds,
            )
        )


def measure_stack(arguments: argparse.Namespace) -> dict[str, Any]:
    """What each form of a target costs, told as it is found: it takes long."""
    latencies: dict[str, dict[str, Any]] = {}
    with Machine(image=arguments.image, memory_mb=1536, skip_idle=True) as machine:
        guest = Guest(machine)
        for name in ("measure", "stack"):
            put_program(machine, name)
        program = guest.begin(
            "stack",
            rounds=max(1, arguments.rounds // 20),
            seconds=arguments.seconds,
            remaps=REMAPS,
            latencies=arguments.latency or LATENCIES,
        )
        while isinstance(told := program.next(), list):
            latency, form, results = told
            print(f"measured: a disk with a latency of {latency}, {form}", file=sys.stderr)
            latencies.setdefault(latency, {})[form] = results
        program.forget()
    return {"kernel": told, "latencies": latencies}


def measure_discovery(arguments: argparse.Namespace) -> dict[str, Any]:
    """How long it takes to find what is on many devices."""
    mains = [Disk(f"main{number}", size="8M", interface="scsi") for number in range(TARGETS)]
    spares = [Disk(f"spare{number}", size="32M", interface="scsi") for number in range(SPARES)]
    with Machine(image=arguments.image, disks=[*mains, *spares], memory_mb=1024) as machine:
        guest = Guest(machine)
        put_program(machine, "discovery")
        # As the role installs it: compiled, because its entry point writes nothing.
        machine.run("mkdir -p /usr/lib/dm-remap")
        machine.put(CORE, "/usr/lib/dm-remap/dm_remap")
        machine.run("python3 -m compileall -q /usr/lib/dm-remap")
        install = ["python3", "-m", "dm_remap.cli.installation"]
        machine.run(["env", "PYTHONPATH=/usr/lib/dm-remap", *install])
        return dict(
            guest.call(
                "discovery",
                mains=[guest.path(disk.name) for disk in mains],
                spares=[guest.path(disk.name) for disk in spares],
                rounds=max(3, arguments.rounds // 4),
            )
        )


def measure_here(arguments: argparse.Namespace) -> dict[str, Any]:
    """What an inventory costs on this machine's own processor."""
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(CORE, f"{folder}/dm_remap")
        done = subprocess.run(
            [
                *(sys.executable, "-m", "benchmarks.here"),
                *map(str, (TARGETS, SPARES // TARGETS, max(3, arguments.rounds // 2))),
            ],
            check=True,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": f"{folder}:{CORE.parents[1]}"},
        )
    return dict(json.loads(done.stdout))


def put_program(machine: Machine, name: str) -> None:
    machine.put(Path(__file__).with_name(f"{name}.py"), f"{PLACE}/programs/{name}.py")


def report_stack(found: dict[str, Any]) -> list[str]:
    """The table of the stack's cost, as lines."""
    lines = [
        f"Linux {found['kernel']}: operations a second of 4 KiB, as a ratio to the bare disk, "
        "by a clock that counts the processor's instructions, one a nanosecond"
    ]
    for latency, forms in found["latencies"].items():
        loads = list(next(iter(forms.values())))
        lines += ["", f"A disk with a latency of {latency}; medians, {REMAPS} remaps where said"]
        lines.append(f"{'':<16}" + "".join(f"{load:>14}" for load in loads))
        for form, results in forms.items():
            cells = "".join(f"{statistics.median(results[load]):>14.3f}" for load in loads)
            lines.append(f"{form:<16}{cells}")
    return lines


def report(found: dict[str, Any]) -> list[str]:
    """The tables, as lines."""
    lines = [f"Linux {found['kernel']}, times in ms; ratio of the medians"]
    write = statistics.median(found["raw_write"])
    read = statistics.median(found["idle_reads"])
    lines += table(
        "Remap of one 64 KiB chunk, beside a reader of 4 KiB blocks (ratio to an idle read)",
        [
            ("a read of 4 KiB, idle", found["idle_reads"], read),
            ("the slowest read beside a remap", found["slowest_reads"], read),
            ("pause of the chunk", found["pauses"], read),
            ("the whole remap", found["remaps"], read),
        ],
    )
    lines += table(
        "Metadata commit to one spare, seven copies (ratio to one 4 KiB write and flush)",
        [("one 4 KiB write and flush", found["raw_write"], write)]
        + [(f"commit, {count} extents", times, write) for count, times in found["commits"]],
    )
    first = statistics.median(found["loads"][0][1])
    lines += table(
        "Table load (ratio to the smallest)",
        [(f"load, {count} extents", times, first) for count, times in found["loads"]],
    )
    swap = statistics.median(found["swaps"][0][1])
    lines += table(
        "Table swap: suspend, swap, resume (ratio to the smallest)",
        [(f"swap, {count} extents", times, swap) for count, times in found["swaps"]],
    )
    one = statistics.median(found["remaps"])
    lines += table(
        "1,000 ranges in one task, on 10,000 extents (ratio to the remap of one chunk)",
        [
            (name, [seconds], one)
            for name, seconds in zip(
                ("the whole task", "until the data is in place", "pause of the chunks"),
                found["bulk"],
            )
        ],
    )
    return lines


def report_discovery(found: dict[str, Any]) -> list[str]:
    """The tables of what finds its devices how fast, as lines."""
    inventory, probe = found["inventory"], found["probe"]
    whole = statistics.median(inventory["dm-remap-discover"])
    one = statistics.median(probe["probe for metadata"])
    lines = [f"Linux {found['kernel']}, times in ms; nothing of the devices is in memory"]
    lines += table(
        f"Inventory of {found['spares']} spares (ratio to dm-remap-discover)",
        [
            ("scan, in a Python that runs already", inventory["scan"], whole),
            ("dm-remap-discover", inventory["dm-remap-discover"], whole),
            *((name, inventory[name], whole) for name in ("blkid", "pvs", MDADM)),
            ("pvs, as many physical volumes", found["own volumes"], whole),
            ("mdadm, as many members of an array", found["own array"], whole),
            ("a Python that does nothing", found["python"], whole),
        ],
    )
    lines += table(
        "One spare (ratio to the probe)",
        [
            *((name, times, one) for name, times in probe.items()),
            ("pvs, a physical volume", found["own volume"], one),
            ("mdadm --examine, a member", found["own member"], one),
        ],
    )
    return lines


def report_here(found: dict[str, Any]) -> list[str]:
    """The tables of an inventory and of a healing on this machine, as lines."""
    times = dict(found["times"])
    scan, start = times.pop("scan"), times.pop("start")
    both = [sum(pair) for pair in zip(scan, start)]
    whole = statistics.median(both)
    healing = times.pop("healing")
    lines = table(
        f"This machine, Linux {found['kernel']}, {found['spares']} spares on loop devices, in ms "
        "(ratio to the first)",
        [
            ("dm-remap-discover, start and scan", both, whole),
            ("start", start, whole),
            ("scan", scan, whole),
            ("a Python that does nothing", times.pop("python"), whole),
            *((name, taken, whole) for name, taken in times.items()),
        ],
    )
    return lines + table(
        "A healing, the processor's time, in ms (ratio to the median)",
        [("from a failed read to its data", healing, statistics.median(healing))],
    )


def table(title: str, rows: list[Row]) -> list[str]:
    """One table: a row has its name, the times in seconds, and the seconds of ratio 1."""
    lines = ["", title, f"{'':<38}{'min':>10}{'median':>10}{'max':>10}{'ratio':>10}"]
    for name, times, one in rows:
        shown = [1000 * value for value in (min(times), statistics.median(times), max(times))]
        cells = "".join(f"{value:>10.2f}" for value in shown)
        lines.append(f"{name:<38}{cells}{statistics.median(times) / one:>10.2f}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
