# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""The lab by hand and from scripts: ``python -m tests.lab COMMAND --help``."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from .disk import CACHE_MODES, INTERFACES, Disk
from .faults import REQUESTS
from .image import SUITES, ensure_image, prune_images
from .machine import Machine, machine_names, prune
from .paths import LabError, machine_dir

DISK_NUMBERS = ("block", "physical", "seed")


def parse_disk(text: str) -> Disk:
    """Return a Disk from ``name[:size[:interface]][:key=value]...``.

    Raises:
        LabError: the text is not of this form, or a value is wrong.
    """
    positional = [part for part in text.split(":") if "=" not in part]
    pairs = [part.split("=", 1) for part in text.split(":") if "=" in part]
    if len(positional) > 3:
        raise LabError(f"disk {text!r}: give name[:size[:interface]][:key=value]...")
    options: dict[str, Any] = dict(zip(("name", "size", "interface"), positional))
    for key, value in pairs:
        try:
            if key in DISK_NUMBERS:
                options[key] = int(value)
            elif key == "wwn":
                options[key] = int(value, 16)
            elif key == "survive":
                options[key] = float(value)
            elif key in ("cache", "image"):
                options[key] = value
            else:
                raise LabError(f"disk {text!r}: no option {key!r}")
        except ValueError as error:
            raise LabError(f"disk {text!r}: {key} must be a number") from error
    return Disk(**options)


def parse_sectors(text: str) -> tuple[int, int]:
    """Return (start, count) from ``START``, ``START+COUNT`` or ``FIRST-LAST``."""
    match = re.fullmatch(r"(\d+)(?:([+-])(\d+))?", text)
    if not match:
        raise LabError(f"sectors {text!r}: give START, START+COUNT or FIRST-LAST")
    start = int(match[1])
    if match[2] == "+":
        return start, int(match[3])
    return start, int(match[3]) - start + 1 if match[2] else 1


def parse_forward(text: str) -> tuple[int, int | None]:
    """Return (guest port, host port or None) from ``GUEST`` or ``GUEST:HOST``."""
    guest, _unused, host = text.partition(":")
    try:
        return int(guest), int(host) if host else None
    except ValueError as error:
        raise LabError(f"forward {text!r}: give GUEST_PORT or GUEST_PORT:HOST_PORT") from error


def say(text: str) -> None:
    """Tell the user what goes on; results alone go to standard output."""
    print(text, file=sys.stderr)


def build_command(options: argparse.Namespace) -> int:
    """Build images that are not cached, and say where they are."""
    for name in options.image or sorted(SUITES):
        print(ensure_image(name, say, force=options.force).path)
    return 0


def boot_command(options: argparse.Namespace) -> int:
    """Boot a machine that stays until it is killed."""
    machine = Machine(
        image=options.image,
        disks=[parse_disk(text) for text in options.disk],
        memory_mb=options.memory,
        cpus=options.cpus,
        forwards=dict(parse_forward(text) for text in options.forward),
        name=options.name,
        detached=True,
    )
    ensure_image(options.image, say)
    machine.start()
    if options.json:
        print(json.dumps(machine.describe(), indent=1))
        return 0
    print(f"{machine.name}: up after {machine.last_boot_seconds:.1f} s")
    print(f"  {shlex.join(machine.ssh_command())}")
    for disk in machine.disks.values():
        print(f"  {disk.name}: {disk.path}")
    return 0


def list_command(options: argparse.Namespace) -> int:
    """List the machines."""
    machines = [Machine.load(name) for name in machine_names()]
    if options.json:
        print(json.dumps([machine.describe() for machine in machines], indent=1))
        return 0
    for machine in machines:
        state = f"pid {machine.process.pid}" if machine.running and machine.process else "off"
        disks = ", ".join(machine.disks)
        print(f"{machine.name}  {state}  port {machine.forwards[22]}  disks {disks}")
    return 0


def info_command(options: argparse.Namespace) -> int:
    """Describe a machine as JSON."""
    print(json.dumps(Machine.load(options.name).describe(), indent=1))
    return 0


def ssh_command(options: argparse.Namespace) -> NoReturn:
    """Log in to a machine."""
    command = Machine.load(options.name).ssh_command()
    os.execvp(command[0], command)


def run_command(options: argparse.Namespace) -> NoReturn:
    """Run a command in a machine, with its output and exit code."""
    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    if not words:
        raise LabError("give the command to run after --")
    text = words[0] if len(words) == 1 else shlex.join(words)
    command = [*Machine.load(options.name).ssh_command("-T"), "--", text]
    os.execvp(command[0], command)


def copy_command(options: argparse.Namespace) -> int:
    """Copy files between the host and a machine."""
    machine = Machine.load(options.name)
    copy: Callable[[str, str], None] = machine.put if options.command == "put" else machine.get
    copy(options.source, options.destination)
    return 0


def fail_command(options: argparse.Namespace) -> int:
    """Make sectors fail."""
    disk = Machine.load(options.name).disk(options.disk)
    sectors = [parse_sectors(text) for text in options.sectors] or None
    disk.fail(sectors, op=options.op, errno=options.errno, once=options.once, times=options.times)
    return 0


def heal_command(options: argparse.Namespace) -> int:
    """Let sectors answer again."""
    disk = Machine.load(options.name).disk(options.disk)
    disk.heal([parse_sectors(text) for text in options.sectors] or None)
    return 0


def faults_command(options: argparse.Namespace) -> int:
    """List the sectors that fail."""
    for disk in Machine.load(options.name).disks.values():
        for fault in disk.faults:
            where = "all" if fault.start is None else f"{fault.start}+{fault.count}"
            times = "" if fault.times is None else f" times={fault.times}"
            print(f"{disk.name} {where} {fault.op} {fault.errno}{times}")
    return 0


def attach_command(options: argparse.Namespace) -> int:
    """Plug in a disk."""
    print(Machine.load(options.name).attach(parse_disk(options.disk)).path)
    return 0


def detach_command(options: argparse.Namespace) -> int:
    """Unplug a disk."""
    Machine.load(options.name).detach(options.disk)
    return 0


def reset_command(options: argparse.Namespace) -> int:
    """Leave a machine clean."""
    Machine.load(options.name).reset(zero=options.zero)
    return 0


def simple_command(options: argparse.Namespace) -> int:
    """Call the machine's method that the command is named after."""
    machine = Machine.load(options.name)
    actions: dict[str, Callable[[], None]] = {
        "power-cut": machine.power_cut,
        "restart": machine.restart,
        "shutdown": machine.shutdown,
    }
    actions[options.command]()
    return 0


def kill_command(options: argparse.Namespace) -> int:
    """End a machine and remove all of it; no error if there is none."""
    if options.name in machine_names():
        Machine.load(options.name).close()
    # Whoever was killed while making a machine has left a directory without a state.
    shutil.rmtree(machine_dir(options.name), ignore_errors=True)
    return 0


def console_command(options: argparse.Namespace) -> int:
    """Print the end of a machine's serial console."""
    print(Machine.load(options.name).console_tail(options.lines))
    return 0


def prune_command(options: argparse.Namespace) -> int:
    """Remove what dead processes have left, and images that nothing would use."""
    prune()
    used = [Machine.load(name).image.path for name in machine_names()]
    for path in prune_images(used):
        print(path)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, function: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.set_defaults(function=function)
        return command

    def add_named(
        name: str, function: Callable[[argparse.Namespace], int]
    ) -> argparse.ArgumentParser:
        command = add(name, function)
        command.add_argument("--name", default="lab", help="the machine (default: lab)")
        return command

    command = add("build", build_command)
    command.add_argument("--image", action="append", choices=sorted(SUITES))
    command.add_argument("--force", action="store_true", help="build even what is cached")
    command = add_named("boot", boot_command)
    command.add_argument("--image", default="debian-12", choices=sorted(SUITES))
    command.add_argument(
        "--disk",
        action="append",
        default=[],
        metavar="NAME[:SIZE[:INTERFACE]][:KEY=VALUE]...",
        help=f"interface: {', '.join(INTERFACES)}; keys: block, physical, wwn (hexadecimal), "
        f"image, cache ({', '.join(CACHE_MODES)}), survive, seed",
    )
    command.add_argument("--memory", type=int, default=512, help="MiB")
    command.add_argument("--cpus", type=int, help="default: 2 with KVM, else 1")
    command.add_argument("--forward", action="append", default=[], metavar="GUEST[:HOST]")
    command.add_argument("--json", action="store_true")
    add("list", list_command).add_argument("--json", action="store_true")
    add_named("info", info_command).add_argument("--json", action="store_true", help="as always")
    add_named("ssh", ssh_command)
    add_named("run", run_command).add_argument("words", nargs=argparse.REMAINDER)
    for name in ("put", "get"):
        command = add_named(name, copy_command)
        command.add_argument("source")
        command.add_argument("destination")
    command = add_named("fail", fail_command)
    command.add_argument("--disk", required=True)
    command.add_argument("--sectors", nargs="+", default=[], help="START, START+COUNT, FIRST-LAST")
    command.add_argument("--op", default="both", choices=sorted(REQUESTS))
    command.add_argument("--errno", default="EIO")
    command.add_argument("--once", action="store_true")
    command.add_argument("--times", type=int)
    command = add_named("heal", heal_command)
    command.add_argument("--disk", required=True)
    command.add_argument("--sectors", nargs="+", default=[], help="default: all that fail")
    add_named("faults", faults_command)
    add_named("attach", attach_command).add_argument("--disk", required=True, help="as for boot")
    add_named("detach", detach_command).add_argument("--disk", required=True)
    add_named("reset", reset_command).add_argument("--zero", nargs="+", default=[])
    for name in ("power-cut", "restart", "shutdown"):
        add_named(name, simple_command).description = f"{name} a machine"
    add_named("kill", kill_command)
    add_named("console", console_command).add_argument("--lines", type=int, default=30)
    add("prune", prune_command)
    return parser


def main() -> int:
    """Run one command; a refusal is told in one line."""
    options = make_parser().parse_args()
    try:
        result: int = options.function(options)
    except LabError as error:
        say(f"lab: {error}")
        return 1
    return result


if __name__ == "__main__":
    sys.exit(main())
