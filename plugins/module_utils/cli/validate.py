# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""dm-remap-validate: is the configuration right, and what would it do on this host?"""

from __future__ import annotations

import argparse
from typing import Any

from ..configuration import PATH, Configuration, Entry, load
from ..engine import Engine
from ..errors import DmRemapError, Refused, count_of
from ..observing import request_seen
from ..planner import plan_present
from .framework import FILE, Command, Exit, Host, Program, Result, add
from .text import action_lines, table


def validate(host: Host, options: argparse.Namespace) -> Result:
    """Check the file, and plan each of its targets."""
    try:
        found = load(options.config)
    except DmRemapError as error:
        faults = getattr(error, "faults", None)
        if faults is None:
            raise
        lines = [f"{options.config}:{fault}" for fault in faults]
        lines.append(f"{options.config}: {count_of(len(faults), 'fault')}")
        data = {"config": options.config, "faults": [vars(fault) for fault in faults]}
        return Result({**data, "targets": []}, lines, Exit.FOUND)
    targets = _described(found) if options.schema_only else _planned(host, found)
    data = {"config": options.config, "faults": [], "targets": targets}
    refused = [target for target in targets if target["state"] == "refused"]
    return Result(data, _lines(options.config, targets), Exit.FOUND if refused else Exit.OK)


def _described(found: Configuration) -> list[dict[str, Any]]:
    return [_target(entry, "unchecked") for entry in found.entries]


def _target(entry: Entry, state: str, **more: Any) -> dict[str, Any]:
    return {
        "name": entry.request.name,
        "line": entry.line,
        "state": state,
        "actions": [],
        "warnings": [],
        "error": None,
        "assemble": vars(entry.assembly),
        **more,
    }


def _planned(host: Host, found: Configuration) -> list[dict[str, Any]]:
    engine = host.engine()
    devices: dict[str, str] = {}
    return [_plan(engine, entry, devices) for entry in found.entries]


def _plan(engine: Engine, entry: Entry, devices: dict[str, str]) -> dict[str, Any]:
    """What the module target would do for an entry.

    Args:
        engine: the engine.
        entry: the entry.
        devices: device numbers of earlier entries with their roles; added to.
    """
    request = entry.request
    try:
        with engine.locked_host(), engine.locked(request.name):
            seen = request_seen(engine, request)
            infos = [candidate.info for candidate in seen.candidates]
            for info in [*([seen.main] if seen.main else []), *infos]:
                if devices.setdefault(info.devno, request.name) != request.name:
                    raise Refused(
                        f"is a device of target {devices[info.devno]} in the same file",
                        device=info.path,
                        remedy="give each device once in the file",
                    )
            plan = plan_present(request, seen)
    except DmRemapError as error:
        return _target(entry, "refused", error=str(error))
    state = "to do" if plan.changes else "in place"
    return _target(entry, state, actions=plan.action_dicts(), warnings=list(plan.warnings))


def _lines(path: str, targets: list[dict[str, Any]]) -> list[str]:
    lines = [f"{path}: no faults, {count_of(len(targets), 'target')}"]
    if not targets:
        return lines
    rows = [
        [t["name"], t["line"], t["state"], "yes" if t["assemble"]["auto"] else "no"]
        + [t["assemble"]["degraded"], f"{t['assemble']['timeout']} s"]
        for t in targets
    ]
    lines += ["", *table("TARGET LINE STATE ASSEMBLE DEGRADED TIMEOUT".split(), rows)]
    for target in targets:
        more = action_lines(target["actions"])
        more += [f"  {text}" for text in [*target["warnings"], target["error"]] if text]
        if more:
            lines += ["", f"{target['name']}:", *more]
    return lines


def _arguments(parser: argparse.ArgumentParser) -> None:
    add(
        parser,
        "--config",
        metavar="FILE",
        default=PATH,
        help="the configuration (%(default)s)",
        completes=FILE,
    )
    parser.add_argument(
        "--schema-only",
        action="store_true",
        help="check the file only, without looking at devices",
    )


PROGRAM = Program(
    name="dm-remap-validate",
    help="Check the configuration, and say what it would do on this host",
    description=[
        "All faults of the file are reported, each with its line and column. If there are none, "
        "each target is planned as the module dm_remap.storage.target would plan it, and what "
        "would be done or refused is printed. Nothing is changed.",
    ],
    commands=[
        Command(
            "",
            "Check the configuration, and say what it would do on this host",
            validate,
            _arguments,
            examples=[
                ("dm-remap-validate", "Check the file of this host."),
                ("dm-remap-validate --config new.yaml --schema-only", "Check another one's form."),
            ],
        )
    ],
    files={PATH: "the configuration, see docs/configuration.md"},
)
