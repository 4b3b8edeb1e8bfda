# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which targets somebody means, and what the operator has decided about them (pure)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .discovery import Discovery, Host, Overrides, State, TargetFound
from .errors import Refused


@dataclass(frozen=True)
class Order:
    """What is to be assembled, and what the operator has decided.

    Args:
        name: name or UUID of a target; "" for all, or for those of ``device``.
        device: path of a device whose targets are meant; "" for none.
        safe_mode: refuse a main that nothing proves to be the main. Without it the only device
            that may be it is taken, if nothing else speaks against the target.
        degraded: spares may be missing.
        main: path of the device that is the target's main, whatever its fingerprint says.
        use: path of the spare whose history counts, or of the clone that is to be the spare.
    """

    name: str = ""
    device: str = ""
    safe_mode: bool = True
    degraded: bool = False
    main: str = ""
    use: str = ""


@dataclass(frozen=True)
class Chosen:
    """The targets that are meant.

    Args:
        discovery: what the devices make up, by what the operator has decided.
        targets: those that are meant.
        overrides: what the operator has decided. Devices are named by their paths there.
    """

    discovery: Discovery
    targets: tuple[TargetFound, ...]
    overrides: Overrides


def choose(
    host: Host, order: Order, devno_of: Callable[[str], str], now_ns: int | None = None
) -> Chosen:
    """The targets that an order is about, as they are by what the operator has decided.

    Args:
        host: what was found.
        order: what is wanted.
        devno_of: device number of a path.
        now_ns: wall clock in nanoseconds since 1970; None reads it.

    Raises:
        Refused: nothing tells of such a target, or several have that name.
        DmRemapError: a path that was named is no device.
    """
    plain = host.decide(now_ns=now_ns)
    wanted = _wanted(host, plain, order, devno_of)
    said = Overrides()
    if order.main or order.use:
        if len(wanted) != 1:
            raise Refused(
                "a main or a spare can be named for one target only",
                remedy="give the target's name or UUID too",
            )
        (target,) = wanted
        said = Overrides(
            use={target.uuid: _path_of(host, order.use, devno_of)} if order.use else {},
            main={target.uuid: _path_of(host, order.main, devno_of)} if order.main else {},
        )
    found = host.decide(said, now_ns)
    if not order.safe_mode:
        doubtful = {t.uuid: _doubtful_main(t) for t in found.targets}
        taken = {owner: path for owner, path in doubtful.items() if path}
        found = host.decide(replace(said, main={**taken, **said.main}), now_ns)
    uuids = {target.uuid for target in wanted}
    return Chosen(found, tuple(t for t in found.targets if t.uuid in uuids), said)


def _doubtful_main(target: TargetFound) -> str:
    """The only device that may be the main, where that is all that speaks against a target."""
    reasons = [problem for problem in target.problems if problem.refuses]
    if target.state is State.REFUSED and [p.code for p in reasons] == ["doubtful_main"]:
        return reasons[0].device
    return ""


def _path_of(host: Host, path: str, devno_of: Callable[[str], str]) -> str:
    """The path by which a device was found."""
    devno = devno_of(path)
    return next((found.path for found in host.found if found.info.devno == devno), path)


def _wanted(
    host: Host, found: Discovery, order: Order, devno_of: Callable[[str], str]
) -> tuple[TargetFound, ...]:
    if order.device:
        path = _path_of(host, order.device, devno_of)
        of_it = tuple(target for target in found.targets if path in devices_of(target))
        if not of_it:
            raise Refused(
                "is no main and no spare of a target that any device tells of",
                device=order.device,
                remedy="attach the target's spares, or restore their metadata",
            )
        return of_it
    if not order.name:
        return found.targets
    named = [t for t in found.targets if order.name in (t.name, str(t.uuid))]
    # An active target keeps its name; the other one is refused because of it.
    active = [target for target in named if target.state is State.ACTIVE]
    named = active if len(active) == 1 else named
    if len(named) > 1:
        raise Refused(
            "is the name of several targets",
            device=order.name,
            remedy="give the UUID of one: " + ", ".join(str(target.uuid) for target in named),
        )
    if not named:
        known = any(
            order.name in (str(owner), metadata.config.get("name"))
            for owner, metadata in host.kept.items()
        )
        raise Refused(
            "no device tells of a target of that name",
            device=order.name,
            remedy="attach its spares"
            + ("; or restore their metadata from this host's backup" if known else ""),
        )
    return tuple(named)


def devices_of(target: TargetFound) -> set[str]:
    """Paths of the devices that a target's decision is about."""
    infos = [info for info in (target.main, target.new_main, *target.spares.values()) if info]
    named = [problem.device for problem in target.problems if problem.device]
    sides = [path for side in target.sides for path in side.devices]
    return {*(info.path for info in infos), *named, *sides, *target.clones, *target.retired}
