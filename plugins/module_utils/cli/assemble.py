# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""dm-remap-discover and dm-remap-reassemble: what the devices make up, and its activation."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from ..assembly import ASSEMBLED, FAILED, REFUSED, Order, Report, assemble, choose, devices_of
from ..configuration import DEGRADED, NEVER
from ..discovery import Discovery, Found, Problem, State
from ..discovery import Host as Scanned
from ..errors import Refused, count_of
from .framework import DEVICE, TARGET, Command, Exit, Host, Program, Result, add, add_writing
from .text import action_lines, listed, table

# Discover


def discover(host: Host, options: argparse.Namespace) -> Result:
    """What the devices of the host make up."""
    engine = host.engine()
    scanned = engine.discover()
    order = Order(device=options.device or "")
    chosen = choose(scanned, order, engine.devno_of)
    uuids = {target.uuid for target in chosen.targets}
    targets = [target.to_dict() for target in chosen.targets]
    others: Sequence[Problem] = () if options.device else chosen.discovery.others
    sound = all(target.state in (State.COMPLETE, State.ACTIVE) for target in chosen.targets)
    if options.validate:
        report = assemble(engine, order, check=True)
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
            paths = {p for t in chosen.targets if t.uuid in uuids for p in devices_of(t)}
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


# Reassemble


def reassemble(host: Host, options: argparse.Namespace) -> Result:
    """Activate what was found."""
    order = _order(options)
    engine = host.engine()
    if options.yes and not options.dry_run:
        report = assemble(engine, order)
    else:
        report = assemble(engine, order, check=True)
        names = listed(t.target.name for t in report.targets if t.result == ASSEMBLED)
        if names and not options.dry_run:
            host.confirm(options, f"Activate {names}?")
            report = assemble(engine, order)
    if len(report.targets) == 1 and report.missed and report.missed[0].error:
        # The only one that was asked for: the exit code tells whether anything was done.
        raise report.missed[0].error
    return Result(
        {"changed": report.changed, "dry_run": options.dry_run, **report.to_dict()},
        _report_lines(report, options.dry_run),
        _code(report),
        [*report.warnings, *(str(target.error) for target in report.missed)],
    )


def _code(report: Report) -> Exit:
    if any(target.result == FAILED for target in report.targets):
        return Exit.ERROR
    unrepaired = any(not r.whole for target in report.targets for r in target.repaired)
    degraded = any(target.plan and target.target.missing for target in report.targets)
    return Exit.FOUND if report.missed or unrepaired or degraded else Exit.OK


def _order(options: argparse.Namespace) -> Order:
    if (options.main or options.use) and not options.name:
        raise Refused(
            "--main and --use are about one target", remedy="give the target's name or UUID too"
        )
    return Order(
        name=options.name or "",
        device=options.device or "",
        safe_mode=options.safe_mode,
        degraded=options.degraded != NEVER,
        main=options.main or "",
        use=options.use or "",
    )


def _report_lines(report: Report, dry_run: bool) -> list[str]:
    if not report.targets:
        return ["no targets found"]
    rows = [
        [
            item.target.name or item.target.uuid,
            "to do" if dry_run and item.result == ASSEMBLED else item.result,
            item.plan.after.get("generation") if item.plan and item.plan.changes else None,
            item.target.main.path if item.target.main else None,
            len(item.target.spares),
            listed(spare.index for spare in item.target.missing),
        ]
        for item in report.targets
    ]
    lines = table("TARGET RESULT GENERATION MAIN SPARES MISSING".split(), rows)
    for item in report.targets:
        more = action_lines(item.actions) if dry_run else []
        for repair in item.repaired:
            what = [f"copy {index} ({why})" for index, why in repair.copies]
            what += ["an older generation"] if repair.stale else []
            verb = "to repair" if dry_run else "repaired" if repair.whole else "not repaired"
            more.append(f"  {verb} {repair.path}: {listed(what) or 'all copies'}")
        if more:
            lines += ["", f"{item.target.name}:", *more]
    missed = len(report.missed)
    if missed:
        lines += ["", f"{count_of(missed, 'target')} of {len(report.targets)} not assembled"]
    return lines


def _reassemble_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--auto", action="store_true", help="all targets that are found")
    add(
        which,
        "--device",
        metavar="DEVICE",
        help="the targets that this device is of",
        completes=DEVICE,
    )
    add(which, "name", metavar="NAME", nargs="?", help="a target, or its UUID", completes=TARGET)
    safe = parser.add_mutually_exclusive_group()
    safe.add_argument(
        "--safe-mode",
        action="store_true",
        default=True,
        help="refuse a main that nothing proves to be the main; this is the default",
    )
    safe.add_argument(
        "--no-safe-mode",
        dest="safe_mode",
        action="store_false",
        help="take a main without proof, if it is the only one that can be it",
    )
    parser.add_argument(
        "--degraded",
        choices=DEGRADED,
        default=NEVER,
        help="whether spares may be missing, whose chunks then give errors (%(default)s)",
    )
    add(
        parser,
        "--main",
        metavar="DEVICE",
        help="the main of the target, whatever its serial number is",
        completes=DEVICE,
    )
    add(
        parser,
        "--use",
        metavar="DEVICE",
        help="the spare whose history counts, or the clone that is to be the spare",
        completes=DEVICE,
    )
    add_writing(parser)


DISCOVER = Program(
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

REASSEMBLE = Program(
    name="dm-remap-reassemble",
    help="Activate targets from the devices that are there",
    description=[
        "Does what the module dm_remap.storage.assemble does: finds the spares and the main of "
        "each target whatever their names are, repairs damaged copies of the metadata, and "
        "activates the target. A target that is active is left as it is. One that is refused does "
        "not keep the others from being activated; then the exit code is 4, or 3 if it is the only "
        "one.",
    ],
    commands=[
        Command(
            "",
            "Activate targets from the devices that are there",
            reassemble,
            _reassemble_arguments,
            examples=[
                ("dm-remap-reassemble --auto --dry-run", "See what would be activated."),
                ("dm-remap-reassemble --auto --yes", "Activate everything that is certain."),
                ("dm-remap-reassemble data --degraded allowed", "One target, without a spare."),
                ("dm-remap-reassemble --device /dev/sdc", "What a disk is of."),
            ],
        )
    ],
)
