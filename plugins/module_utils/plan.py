# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A plan: actions in their order, with the target's state before and after them (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from . import copies, pool, replacement
from .blockdev import DeviceInfo
from .format import Diagnosis, Extent, Geometry, Metadata, geometry_of
from .mapping import build_table, describe_table
from .marks import SECTOR_BYTES
from .migration import Migration
from .stack import spare_name
from .target import configured, shim_of

# Actions that are begun under the target's lock and carried on without it.
REPLACE, UNDO = "replace_main", "undo_replacement"


@dataclass(frozen=True)
class Action:
    """One step of a plan: what is done (``kind``), to which device, with which particulars."""

    kind: str
    device: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The action as it is returned to the user."""
        return {"action": self.kind, "device": self.device, **self.details}


@dataclass(frozen=True)
class Plan:
    """Actions in their order, with the state before and after.

    Args:
        name: name of the target.
        actions: what will be done; empty when all is as desired.
        before: generation, configuration and table now.
        after: the same when the actions are done.
        metadata: the metadata that the target will have, or has.
        main: the target's main.
        spares: devices of the spares by index.
        placed: for a remap, the new extents of one chunk each.
        final: where spares change, the metadata in the end; ``metadata`` has all spares, old and
            new.
        warnings: what the user should know, but nothing is refused for.
        replacement: the device that is to replace main.
        migration: what a new target takes from a kernel target's spare.
        old_spare: that spare.
    """

    name: str
    actions: tuple[Action, ...] = ()
    before: Mapping[str, Any] = field(default_factory=dict)
    after: Mapping[str, Any] = field(default_factory=dict)
    metadata: Metadata | None = None
    main: DeviceInfo | None = None
    spares: Mapping[int, DeviceInfo] = field(default_factory=dict)
    placed: tuple[Extent, ...] = ()
    final: Metadata | None = None
    warnings: tuple[str, ...] = ()
    replacement: DeviceInfo | None = None
    migration: Migration | None = None
    old_spare: DeviceInfo | None = None

    @property
    def changes(self) -> bool:
        """Whether anything is to be done."""
        return bool(self.actions)

    def action_dicts(self) -> list[dict[str, Any]]:
        """The actions as they are returned to the user."""
        return [action.to_dict() for action in self.actions]


def metadata_of(plan: Plan) -> Metadata:
    """The metadata of a plan whose actions need it."""
    if plan.metadata is None:
        raise AssertionError("only plans with metadata have such actions")
    return plan.metadata


def index_of(plan: Plan, path: str) -> int:
    """The index of a spare of a plan, by its path."""
    return next(index for index, info in plan.spares.items() if info.path == path)


def with_config(plan: Plan, changed: Mapping[str, Any]) -> Plan:
    """The plan for a target that exists, with a new generation where its configuration changes."""
    # Where spares change, the configuration is that of the last commit.
    metadata = plan.final or plan.metadata
    if not metadata or not changed:
        return plan
    after = replace(
        metadata, generation=metadata.generation + 1, config={**metadata.config, **changed}
    )
    action = Action("update_config", plan.name, {"generation": after.generation, **changed})
    spares = {i: info for i, info in plan.spares.items() if i in configured(after)}
    geometries = {index: geometry_of(after, index) for index in spares}
    said = set(pool_warnings(metadata, geometries))
    return replace(
        plan,
        actions=(*plan.actions, action),
        after=state_of(after, spares),
        metadata=plan.metadata if plan.final else after,
        final=after if plan.final else None,
        warnings=(
            *(warning for warning in plan.warnings if warning not in said),
            *pool_warnings(after, geometries),
        ),
    )


def activations(name: str, spares: Mapping[int, DeviceInfo]) -> list[Action]:
    """The actions that give spares their mapped devices."""
    return [
        Action("activate_spare", info.path, {"name": spare_name(name, index)})
        for index, info in spares.items()
    ]


def deactivation(name: str, index: int, path: str) -> Action:
    """The action that removes a spare's mapped devices."""
    return Action("deactivate_spare", path, {"name": spare_name(name, index)})


def creation(name: str, main: DeviceInfo, new: DeviceInfo | None = None) -> Action:
    """The action that creates a target's mapped device."""
    details = {"main": main.path, **({"new_main": new.path} if new else {})}
    return Action("create_target", f"/dev/mapper/{name}", details)


def no_state() -> dict[str, Any]:
    """The state, for a diff, where there is no target."""
    return {"generation": None, "config": None, "table": []}


def state_of(metadata: Metadata, spares: Mapping[int, DeviceInfo]) -> dict[str, Any]:
    """The state for a diff, in words that stay the same when nothing changes."""
    config = metadata.config
    return {
        "generation": metadata.generation,
        "config": {
            "name": config["name"],
            "chunk_size": config["chunk_sectors"] * SECTOR_BYTES,
            "on_error": config["on_error"],
            "shim": shim_of(metadata),
            "allocation": pool.policy_of(config),
            "thresholds": asdict(pool.thresholds_of(config)),
            "main": dict(config["main"]),
            "spares": [spares[index].path for index in sorted(spares)],
        },
        "table": readable_table(metadata, spares),
        "lost": [asdict(item) for item in metadata.lost],
    }


def readable_table(metadata: Metadata, spares: Mapping[int, DeviceInfo]) -> list[str]:
    """The target's table for people: main and spares by role instead of device number."""
    segments = build_table(
        metadata.config["main"]["sectors"],
        metadata.config["chunk_sectors"],
        "main",
        metadata.extents,
        {index: f"spare{index}" for index in spares},
        copied=replacement.copied_sectors(metadata),
        new_main="new_main",
    )
    return describe_table(segments, {})


def warnings_of(choice: copies.Choice) -> tuple[str, ...]:
    """What the user should know of a choice, copies that cannot be read included."""
    return choice.warnings + tuple(
        f"{path}: copy {fault.index} of the metadata is {fault.message}"
        for path, faults in choice.damaged.items()
        for fault in faults
        if fault.diagnosis is Diagnosis.UNREADABLE
    )


def pool_warnings(metadata: Metadata, geometries: Mapping[int, Geometry]) -> tuple[str, ...]:
    """What the user should know of the room on the spares."""
    there = pool.pool_of(metadata, geometries)
    warning = pool.warning_of(there, pool.thresholds_of(metadata.config))
    return (f"{metadata.config['name']}: {warning}",) if warning else ()
