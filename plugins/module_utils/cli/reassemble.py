# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""dm-remap-reassemble: activates what the devices make up."""

from __future__ import annotations

import argparse

from ..assembly import ASSEMBLED, FAILED, Report, assemble
from ..configuration import DEGRADED, NEVER
from ..errors import Refused, count_of
from ..order import Order
from .framework import DEVICE, TARGET, Command, Exit, Host, Program, Result, add, add_writing
from .text import action_lines, listed, table


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


PROGRAM = Program(
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
