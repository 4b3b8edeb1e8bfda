# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""dm-remap-discover: what the devices make up."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from ..discovery import Discovery, Found, Problem, State
from ..discovery import Host as Scanned
from ..order import Order, choose, devices_of
from .framework import DEVICE, Command, Exit, Host, Program, Result, add
from .text import action_lines, listed, table


def discover(host: Host, options: argparse.Namespace) -> Result:
    """What the devices of the host make up."""
    scanned = host.look()
    order = Order(device=options.device or "")
    chosen = choose(scanned, order, host.devno_of)
    targets = [target.to_dict() for target in chosen.targets]
    others: Sequence[Problem] = () if options.device else chosen.discovery.others
    sound = all(target.state in (State.COMPLETE, State.ACTIVE) for target in chosen.targets)
    if options.validate:
        # What plans is imported only where it is needed, because that takes longer than the look.
        from ..assembly import REFUSED, assemble

        report = assemble(host.engine(), order, check=True, host=scanned)
        results = {str(item.target.uuid): item for item in report.targets}
        for target in targets:
            item = results.get(target["uuid"])
            target["plan"] = {
                "result": item.result if item else REFUSED,
                "actions": item.actions if item else [],
                "error": str(item.error) if item and item.error else None,
            }
        sound = sound and not report.missed and not any(t["damaged"] for t in targets)
    data: dict[str, Any] = {
        "targets": targets,
        "others": [problem.to_dict() for problem in others],
    }
    lines = _target_lines(targets, others)
    if options.scan_all or options.device:
        devices = _devices(scanned, chosen.discovery)
        if options.device:
            paths = {path for target in chosen.targets for path in devices_of(target)}
            devices = [device for device in devices if device["path"] in paths]
        data["devices"] = devices
        rows = [
            [d["path"], d["size"], d["role"], d["target"], d["model"], d["serial"]] for d in devices
        ]
        lines += ["", *table("DEVICE SECTORS ROLE TARGET MODEL SERIAL".split(), rows)]
    return Result(data, lines, Exit.OK if sound else Exit.FOUND)


def _devices(scanned: Scanned, found: Discovery) -> list[dict[str, Any]]:
    """All devices that were looked at, with what they are."""
    roles = _roles(found)
    return [_device(device, *roles.get(device.path, ("", ""))) for device in scanned.found]


def _device(found: Found, role: str, target: str) -> dict[str, Any]:
    if not role:
        role = "spare of dm-remap-v4" if found.kernel_spare else ""
    return {
        "path": found.path,
        "devno": found.info.devno,
        "size": found.info.sectors,
        "role": role,
        "target": target,
        "model": found.info.model,
        "serial": found.info.serial,
        "wwn": found.info.wwn,
        "error": found.error,
    }


def _roles(found: Discovery) -> dict[str, tuple[str, str]]:
    """What each device is, and of which target, by its path."""
    roles: dict[str, tuple[str, str]] = {}
    for target in found.targets:
        name = target.name or str(target.uuid)
        for path in devices_of(target):
            roles.setdefault(path, ("left out", name))
        roles.update((path, ("clone", name)) for path in target.clones)
        roles.update((path, ("retired spare", name)) for path in target.retired)
        roles.update((info.path, (f"spare {i}", name)) for i, info in target.spares.items())
        for role, info in (("main", target.main), ("new main", target.new_main)):
            if info:
                roles[info.path] = (role, name)
    return roles


def _target_lines(targets: Sequence[Mapping[str, Any]], others: Sequence[Problem]) -> list[str]:
    if not targets:
        lines = ["no targets found"]
    else:
        rows = [
            [
                target["name"] or target["uuid"],
                target["state"],
                target["generation"],
                target["main"],
                listed(f"{spare['index']}:{spare['path']}" for spare in target["spares"]),
                listed(spare["index"] for spare in target["missing"]),
            ]
            for target in targets
        ]
        lines = table("TARGET STATE GENERATION MAIN SPARES MISSING".split(), rows)
    for target in targets:
        lines += ["", f"{target['name'] or target['uuid']} {target['decision']}"]
        lines += [f"  {_text(problem)}" for problem in target["problems"]]
        plan = target.get("plan")
        if plan and plan["actions"]:
            lines += ["  would be done:", *(f"  {line}" for line in action_lines(plan["actions"]))]
        if plan and plan["error"] and not any(p["refuses"] for p in target["problems"]):
            lines.append(f"  {plan['error']}")
    if others:
        lines += ["", "other devices:", *(f"  {problem}" for problem in others)]
    return lines


def _text(problem: Mapping[str, Any]) -> str:
    where = f"{problem['device']}: " if problem["device"] else ""
    remedy = f"; {problem['remedy']}" if problem["remedy"] else ""
    return f"{problem['code']}: {where}{problem['message']}{remedy}"


def _discover_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--scan-all",
        action="store_true",
        help="list every device that was looked at, also those that are of no target",
    )
    add(
        which,
        "--device",
        metavar="DEVICE",
        help="only the targets that this device is of",
        completes=DEVICE,
    )
    parser.add_argument(
        "--validate",
        action="store_true",
        help="plan the activation of each target too, and take damaged copies for a fault",
    )


PROGRAM = Program(
    name="dm-remap-discover",
    help="Show which targets the devices of this host make up",
    description=[
        "All block devices are looked at, and nothing is changed. For each target that a spare "
        "tells of, it says what it can be activated from, or why it is not. The exit code is 4 if "
        "a target is neither active nor complete.",
    ],
    commands=[
        Command(
            "",
            "Show which targets the devices of this host make up",
            discover,
            _discover_arguments,
            examples=[
                ("dm-remap-discover", "What can be activated, and what not, and why."),
                ("dm-remap-discover --scan-all", "Every device with its role, too."),
                ("dm-remap-discover --device /dev/sdc --validate", "What a disk is of."),
            ],
        )
    ],
)
