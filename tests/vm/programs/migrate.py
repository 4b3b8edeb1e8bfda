# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Migrates a kernel target's main and spare to a target, once interrupted by a kill if told so."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

from scene import BlockDevice, Engine, answer, arguments, fill, pattern, problems, state

from dm_remap.errors import Refused
from dm_remap.observing import request_seen
from dm_remap.planner import plan_present
from dm_remap.report import describe_migration
from dm_remap.request import Request

given = arguments()
NAME = given["name"]
# Other sectors of the target than these are main's.
PLACES = {int(sector): place for sector, place in given["places"].items()}
SEED, OLD_SEED = given["seed"], given["old_seed"]
REQUEST = Request(
    NAME,
    given["main"],
    (given["spare"],),
    on_error="fail",
    migrate_from=given["old"],
    migrate_unit=given["unit"],
)


def digest(path: str) -> str:
    """A checksum of the whole device."""
    found = hashlib.sha256()
    with BlockDevice(path) as device:
        for start in range(0, device.sectors, 2048):
            found.update(device.read(start, min(2048, device.sectors - start)))
    return found.hexdigest()


def migrate(step: Callable[[str], None] | None = None) -> dict[str, object]:
    """Do what the module does."""
    engine = Engine(step=step)
    engine.check_host()
    with engine.locked(NAME):
        plan = plan_present(REQUEST, request_seen(engine, REQUEST))
        chunks = engine.apply(plan)
    return {
        "actions": [action.kind for action in plan.actions],
        "warnings": plan.warnings,
        "unread": [item for chunk in chunks for item in chunk.lost],
        "message": describe_migration(plan, chunks) if plan.migration else "",
    }


def migrate_until(step: str) -> None:
    """Begin it in a process that dies after a step."""

    def die(name: str) -> None:
        if name == step:
            os._exit(7)

    child = os.fork()
    if child == 0:
        try:
            migrate(die)
        finally:
            os._exit(1)
    _pid, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) != 7:
        raise SystemExit(f"the migration did not come to {step}")


def refusal(request: Request) -> str:
    """Why a request is refused."""
    try:
        plan_present(request, request_seen(Engine(), request))
    except Refused as error:
        return str(error)
    return ""


fill(given["main"], SEED, 0, given["sectors"])
before = [digest(given["main"]), digest(given["old"])]
as_spare = refusal(
    Request(NAME, given["main"], (given["old"],), on_error="fail"),
)
killed_after = [name for name in given["kill_after"] if not migrate_until(name)]
done = migrate()
again = migrate()
with BlockDevice(f"/dev/mapper/{NAME}") as target:
    block = target.logical_block // 512
changed = {}
for sector in range(0, given["sectors"], block):
    parts = [pattern(OLD_SEED if s in PLACES else SEED, s) for s in range(sector, sector + block)]
    if any(s in PLACES for s in range(sector, sector + block)):
        changed[sector] = b"".join(parts)
wrong = problems(f"/dev/mapper/{NAME}", SEED, [(0, given["sectors"])], given["lost"], changed)
answer(
    {
        "as_spare": as_spare,
        "killed_after": killed_after,
        "done": done,
        "again": again["actions"],
        "wrong": wrong,
        "unchanged": before == [digest(given["main"]), digest(given["old"])],
        **state(NAME),
    }
)
