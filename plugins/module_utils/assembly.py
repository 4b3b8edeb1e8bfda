# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Activates targets that were found, by the plan that a task of the module `target` would have.

`discovery` decides what a target is to be activated from; nothing is decided anew here. Between the
look at the host and the plan nothing is locked, so the plan must be for just what was decided on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from . import copies
from .blockdev import DeviceInfo
from .discovery import Discovery, Host, Overrides, State, TargetFound
from .errors import DmRemapError, Refused
from .order import Order, choose
from .plan import Plan
from .planner import plan_present
from .request import Request, Seen
from .target import ActiveTarget

# What became of a target.
ACTIVE, ASSEMBLED = "active", "assembled"
REFUSED, FAILED, REMOVED = "refused", "failed", "removed"
# Problems that the plan's own warnings tell of, or that it puts right.
_TOLD = frozenset(
    "stale damaged_copies missing_data missing_spare future retired shrunk unproved".split()
)


def request_of(target: TargetFound, order: Order, overrides: Overrides) -> Request:
    """The request that activates a target as it was decided.

    A target whose main is being replaced is activated with both mains, and copied no further.

    Raises:
        Refused: it is not to be activated, or not without the spares that are missing.
    """
    main = target.new_main or target.main
    if target.state not in (State.COMPLETE, State.DEGRADED) or main is None:
        first = next((problem for problem in target.problems if problem.refuses), None)
        raise Refused(
            f"target {target.name or target.uuid} {target.decision}",
            remedy=first.remedy if first else None,
        )
    if target.missing and not order.degraded:
        named = ", ".join(f"{spare.index} ({spare.identity})" for spare in target.missing)
        raise Refused(
            f"target {target.name} {target.decision}, which was not allowed: missing is {named}",
            remedy="attach what is missing; or, if none of it was in use after the other spares, "
            "allow degraded, and what is on it gives errors until it is back",
        )
    trusted = set()
    if target.uuid in overrides.main:
        trusted.add(main.devno)
    use = overrides.use.get(target.uuid)
    trusted.update(info.devno for info in target.spares.values() if info.path == use)
    return Request(
        name=target.name,
        main=main.path,
        spares=tuple(info.path for _index, info in sorted(target.spares.items())),
        degraded=bool(target.missing),
        trusted=frozenset(trusted),
        carry_on=False,
    )


def plan_of(target: TargetFound, request: Request, seen: Seen) -> Plan:
    """The plan for a target that was found; empty if it has become active meanwhile.

    Raises:
        Refused: it cannot be activated safely, or is not any more what was decided on.
    """
    if seen.target is not None:
        # What others have made of it meanwhile is not to be undone.
        if seen.target.metadata.target_uuid == target.uuid:
            return Plan(target.name, metadata=seen.target.metadata)
        raise _changed(target)
    plan = plan_present(request, seen)
    surveys = {c.info.path: c.survey for c in seen.candidates}
    metadata = target.metadata
    if (
        metadata is None
        or copies.choose(surveys).metadata.digest != metadata.digest
        or _who(plan.spares) != _who(target.spares)
        or _who({0: plan.main, 1: plan.replacement}) != _who({0: target.main, 1: target.new_main})
    ):
        raise _changed(target)
    if plan.replacement:
        text = (
            f"the main of {target.name} is being replaced by {plan.replacement.path}; the copy "
            "goes on with the next task of the module target that gives this main"
        )
        plan = replace(plan, warnings=(*plan.warnings, text))
    return plan


def _who(devices: Mapping[int, DeviceInfo | None]) -> dict[int, tuple[str, ...]]:
    """What devices were decided on by. A number alone may be another disk's by now.

    The plan lets a device through of which udev knows nothing yet, because nothing contradicts.
    """
    return {
        index: (info.devno, info.serial, info.wwn, info.volume, info.partuuid)
        for index, info in devices.items()
        if info
    }


def _changed(target: TargetFound) -> Refused:
    return Refused(
        "is not any more what was found, because its disks have changed meanwhile, or a spare "
        "without near copies has another size than when it was laid out",
        device=target.name,
        remedy="run this again; if it stays, give the spare its old size back",
    )


@dataclass(frozen=True)
class Repair:
    """Copies of the metadata on a spare that are written anew.

    Args:
        path: the spare.
        stale: it has an older generation.
        copies: number and diagnosis of each damaged copy.
        whole: all of its copies are right now.
    """

    path: str
    stale: bool
    copies: tuple[tuple[int, str], ...]
    whole: bool

    def to_dict(self) -> dict[str, Any]:
        """As it is returned to the user."""
        copies = [{"copy": index, "diagnosis": diagnosis} for index, diagnosis in self.copies]
        return {"path": self.path, "stale": self.stale, "copies": copies, "whole": self.whole}


@dataclass(frozen=True)
class Assembled:
    """What became of a target, or would.

    Args:
        target: as it was found.
        result: one of ACTIVE, ASSEMBLED, REFUSED, FAILED and REMOVED.
        plan: what was done; None where nothing was planned.
        error: why it was refused, or what failed.
        repaired: copies of the metadata that were written anew.
    """

    target: TargetFound
    result: str
    plan: Plan | None = None
    error: DmRemapError | None = None
    repaired: tuple[Repair, ...] = ()

    @property
    def actions(self) -> list[dict[str, Any]]:
        """What was done."""
        return self.plan.action_dicts() if self.plan else []

    @property
    def is_missed(self) -> bool:
        """It was asked for, and is not there."""
        return self.result in (REFUSED, FAILED)

    @property
    def warnings(self) -> list[str]:
        """What the user should know, though nothing is refused for it."""
        if self.result == REMOVED:
            return [f"target {self.target.name} {self.target.decision}"]
        # What would refuse a target is no error while it is active, but should be known.
        notes = [
            str(problem)
            for problem in self.target.problems
            if problem.code not in _TOLD and (self.result == ACTIVE or not problem.refuses)
        ]
        kept = [
            f"{repair.path}: its copies of the metadata could not all be repaired"
            for repair in self.repaired
            if not repair.whole
        ]
        return list(dict.fromkeys([*(self.plan.warnings if self.plan else ()), *notes, *kept]))

    def to_dict(self) -> dict[str, Any]:
        """As it is returned to the user."""
        return {
            **self.target.to_dict(),
            "result": self.result,
            "actions": self.actions,
            "repaired": [repair.to_dict() for repair in self.repaired],
            "error": str(self.error) if self.error else None,
        }


class Engine(Protocol):
    """What is needed of `engine.Engine`."""

    def discover(self) -> Host:
        """Look at the host."""

    def devno_of(self, path: str) -> str:
        """Device number of a path."""

    def see(self, name: str, main: str | None, spares: Sequence[str]) -> Seen:
        """Observe what a request is about."""

    def observe(self, name: str) -> ActiveTarget | None:
        """The active target."""

    def apply(self, plan: Plan) -> Any:
        """Carry a plan out."""

    def locked_host(self) -> Any:
        """Hold the lock under which devices get new owners."""

    def locked(self, name: str) -> Any:
        """Hold a target's lock."""


@dataclass(frozen=True)
class Report:
    """What became of an order.

    Args:
        discovery: what the devices make up.
        targets: those that were asked for, with what became of them.
    """

    discovery: Discovery
    targets: tuple[Assembled, ...] = field(default=())

    @property
    def changed(self) -> bool:
        """Whether anything was done, or would be."""
        return any(target.actions for target in self.targets if target.result != REFUSED)

    @property
    def missed(self) -> tuple[Assembled, ...]:
        """Those that are not there."""
        return tuple(target for target in self.targets if target.is_missed)

    @property
    def message(self) -> str:
        """Why some are not there; "" if all are."""
        return "; ".join(str(target.error) for target in self.missed)

    @property
    def actions(self) -> list[dict[str, Any]]:
        """What was done to all of them."""
        return [action for target in self.targets for action in target.actions]

    @property
    def warnings(self) -> list[str]:
        """What the user should know, of the targets and of what belongs to none."""
        return [text for target in self.targets for text in target.warnings]

    def to_dict(self) -> dict[str, Any]:
        """As it is returned to the user."""
        return {
            "targets": [target.to_dict() for target in self.targets],
            "others": [problem.to_dict() for problem in self.discovery.others],
        }


def assemble(engine: Engine, order: Order, check: bool = False, host: Host | None = None) -> Report:
    """Assemble what an order is about, each target for itself.

    A target that is refused or fails does not keep the others from being assembled.

    Args:
        engine: the host.
        order: what is wanted.
        check: plan only.
        host: what was found just now; None looks.

    Raises:
        Refused: nothing tells of what was asked for.
        DmRemapError: the host cannot be looked at.
    """
    chosen = choose(host or engine.discover(), order, engine.devno_of)
    results = tuple(
        _assemble_one(engine, target, order, chosen.overrides, check) for target in chosen.targets
    )
    return Report(chosen.discovery, results)


def _assemble_one(
    engine: Engine, target: TargetFound, order: Order, overrides: Overrides, check: bool
) -> Assembled:
    if target.state is State.ACTIVE:
        return Assembled(target, ACTIVE)
    if not (order.name or order.device) and _is_removed(target.problems):
        # Nobody has asked for this one.
        return Assembled(target, REMOVED)
    plan: Plan | None = None
    try:
        request = request_of(target, order, overrides)
        with engine.locked_host(), engine.locked(request.name):
            plan = plan_of(target, request, engine.see(request.name, request.main, request.spares))
            if check or not plan.changes:
                result = ASSEMBLED if plan.changes else ACTIVE
                return Assembled(target, result, plan, repaired=_repairs(target, plan, None))
            engine.apply(plan)
            now = engine.observe(request.name)
        return Assembled(target, ASSEMBLED, plan, repaired=_repairs(target, plan, now))
    except DmRemapError as error:
        if plan is None:
            return Assembled(target, REFUSED, error=error)
        failed = DmRemapError(error.message, error.device, error.remedy)
        return Assembled(target, FAILED, plan, failed)
    except OSError as error:
        return Assembled(target, FAILED, plan, DmRemapError(str(error), device=target.name))


def _is_removed(problems: Iterable[Any]) -> bool:
    return any(problem.code == "removed" for problem in problems)


def _repairs(target: TargetFound, plan: Plan, now: ActiveTarget | None) -> tuple[Repair, ...]:
    """The copies that a plan writes anew; those that ``now`` has are whole."""
    behind = {*now.choice.damaged, *now.choice.stale} if now else set()
    paths = [action.device for action in plan.actions if action.kind == "repair_metadata"]
    return tuple(
        Repair(
            path,
            path in target.stale,
            tuple((copy.index, copy.diagnosis.value) for copy in target.damaged.get(path, ())),
            path not in behind,
        )
        for path in dict.fromkeys(paths)
    )
