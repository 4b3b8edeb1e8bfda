# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What must be done: desired and observed state to a list of actions (pure)."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from . import copies, extents, pool, replacement
from .blockdev import OWN_SIGNATURE, DeviceInfo
from .devmapper import MappedDevice, Segment, check_name
from .errors import DmRemapError, Refused, StaleGeneration, count_of
from .format import (
    NO_DIGEST,
    Diagnosis,
    Extent,
    Geometry,
    LostRange,
    Metadata,
    geometry_of,
    plan_geometry,
)
from .mapping import build_table, describe_table
from .stack import CARRIER_SECTORS, MAX_SPARES, PathState, part_names, spare_name

SECTOR_BYTES = 512
MIN_CHUNK_BYTES = 4096
MAX_CHUNK_BYTES = 1 << 20
DEFAULT_CHUNK_BYTES = 65536
LOGICAL_BLOCKS = (512, 4096)
HOLD, FAIL = "hold", "fail"
NO_SHIM, RAID_SHIM, AUTO_SHIM = "none", "raid", "auto"
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
class Candidate:
    """A device that is to be a spare, or is one: who it is and what is on it."""

    info: DeviceInfo
    signatures: tuple[str, ...]
    survey: copies.Survey


@dataclass(frozen=True)
class ActiveSpare:
    """A spare of an active target: its integrity device and the device below."""

    index: int
    devno: str
    candidate: Candidate


@dataclass(frozen=True)
class ActiveTarget:
    """A target that device-mapper shows.

    Args:
        device: its mapped device.
        map: the mapped device whose table is the map: NAME-map, or the target itself.
        table: the map's live table.
        main: the main, or None where every chunk is remapped.
        spares: the spares that are active.
        choice: the metadata that was chosen among the spares' copies.
        path: state of the path that holds failed I/O; None where errors are passed on.
        shim: the device between the map and main.
        frozen: the device that the map sends frozen chunks to, where a move was interrupted.
        tidy: whether an interruption left nothing else in the kernel.
        replacement: the device that is to replace main, while that is under way.
        new_main: the device over it, which the map uses for what was copied.
    """

    device: MappedDevice
    map: MappedDevice
    table: tuple[Segment, ...]
    main: DeviceInfo | None
    spares: tuple[ActiveSpare, ...]
    choice: copies.Choice
    path: PathState | None = None
    shim: MappedDevice | None = None
    frozen: MappedDevice | None = None
    tidy: bool = True
    replacement: DeviceInfo | None = None
    new_main: MappedDevice | None = None

    @property
    def name(self) -> str:
        """The target's name."""
        return self.device.name

    @property
    def metadata(self) -> Metadata:
        """The target's metadata."""
        return self.choice.metadata

    @property
    def spare_devnos(self) -> dict[int, str]:
        """Device numbers of the active spares' integrity devices, by index."""
        return {spare.index: spare.devno for spare in self.spares}

    @property
    def upper_main(self) -> str:
        """Device number that the map uses for main; empty where every chunk is remapped."""
        if self.shim:
            return self.shim.devno
        return self.main.devno if self.main else ""

    @property
    def carrier(self) -> str:
        """Device number of a device that flushes may go to: main, or a spare without one."""
        return self.main.devno if self.main else self.spares[0].devno

    @property
    def errors(self) -> str:
        """What becomes of failed I/O now: V(hold) or V(fail)."""
        return FAIL if self.path is None else HOLD

    def map_table(
        self,
        metadata: Metadata,
        frozen: Mapping[int, int] | None = None,
        frozen_device: str = "",
    ) -> list[Segment]:
        """The map for a generation, with chunks on the freezing device at their positions."""
        return map_table(
            metadata,
            self.upper_main,
            self.spare_devnos,
            self.main.devno if self.main and self.shim else "",
            frozen,
            frozen_device,
            self.new_main.devno if self.new_main else "",
        )


def map_table(
    metadata: Metadata,
    main: str,
    spares: Mapping[int, str],
    flushed: str = "",
    frozen: Mapping[int, int] | None = None,
    frozen_device: str = "",
    new_main: str = "",
) -> list[Segment]:
    """The map for a generation.

    Args:
        metadata: the generation.
        main: device number of main, or of the shim over it.
        spares: device numbers of the spares' integrity devices, by index.
        flushed: device number that flushes must reach beside the shim, which hides their errors;
            a segment beyond the target's end carries them.
        frozen: chunks on the freezing device, with their positions there.
        frozen_device: its device number.
        new_main: device number of what stands over the new main while main is being replaced.
    """
    sectors = metadata.config["main"]["sectors"]
    table = build_table(
        sectors,
        metadata.config["chunk_sectors"],
        main,
        metadata.extents,
        spares,
        frozen,
        frozen_device,
        replacement.copied_sectors(metadata),
        new_main,
    )
    if flushed:
        table.append(Segment(sectors, CARRIER_SECTORS, "linear", f"{flushed} 0"))
    return table


@dataclass(frozen=True)
class Request:
    """The target that the user wants.

    Args:
        name: its name.
        main: path of main.
        spares: paths of the spares.
        chunk_bytes: size of a chunk; None takes the default, or what the target has.
        on_error: ``hold`` or ``fail``; None takes ``hold``, or what the target has.
        shim: ``none``, ``raid`` or ``auto``; None takes ``none``, or what the target has.
        wipe: spares may hold something, which is erased, but for remapped chunks.
        discard_remaps: with ``wipe``, remapped chunks on the spares may be erased too.
    """

    name: str
    main: str
    spares: tuple[str, ...]
    chunk_bytes: int | None = None
    on_error: str | None = None
    shim: str | None = None
    wipe: bool = False
    discard_remaps: bool = False


@dataclass(frozen=True)
class Seen:
    """What was observed for a request.

    Args:
        target: the active target of that name.
        remains: mapped devices that an interrupted command of ours left under that name.
        taken: mapped devices of others that have a name which the target needs.
        main: the device that is to be main.
        candidates: the devices that are to be spares.
        healer: whether the daemon that heals held I/O runs on the host.
        new_main: what is on the device that is to be main where another one is it now.
        others: devices one of which may be the other main of a replacement under way.
    """

    target: ActiveTarget | None
    remains: tuple[str, ...]
    main: DeviceInfo | None
    candidates: tuple[Candidate, ...]
    taken: tuple[str, ...] = ()
    healer: bool = True
    new_main: Candidate | None = None
    others: tuple[DeviceInfo, ...] = ()


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
        warnings: what the user should know, but nothing is refused for.
        replacement: the device that is to replace main.
    """

    name: str
    actions: tuple[Action, ...] = ()
    before: Mapping[str, Any] = field(default_factory=dict)
    after: Mapping[str, Any] = field(default_factory=dict)
    metadata: Metadata | None = None
    main: DeviceInfo | None = None
    spares: Mapping[int, DeviceInfo] = field(default_factory=dict)
    placed: tuple[Extent, ...] = ()
    warnings: tuple[str, ...] = ()
    replacement: DeviceInfo | None = None

    @property
    def changes(self) -> bool:
        """Whether anything is to be done."""
        return bool(self.actions)

    def action_dicts(self) -> list[dict[str, Any]]:
        """The actions as they are returned to the user."""
        return [action.to_dict() for action in self.actions]


def plan_present(
    request: Request, seen: Seen, new_uuid: Callable[[], uuid.UUID] = uuid.uuid4
) -> Plan:
    """Plan the target's creation, its activation from its metadata, or nothing.

    Raises:
        Refused: what is wanted cannot be had safely; nothing was written.
    """
    _check_request(request)
    if seen.target:
        return _plan_active(request, seen.target, seen)
    main = _present(seen.main, request.main)
    _check_names(seen)
    _check_distinct(request, main, seen.candidates)
    _check_unused(main, seen.remains, "main")
    for candidate in seen.candidates:
        _check_unused(candidate.info, seen.remains, "spare")
    choice = _existing(request, seen.candidates)
    if choice:
        return _plan_activation(request, main, seen, choice)
    return _plan_creation(request, main, seen, new_uuid)


def _check_request(request: Request) -> None:
    check_name(request.name)
    if request.on_error not in (None, HOLD, FAIL):
        raise Refused(
            f"on_error {request.on_error!r} is not known",
            device=request.name,
            remedy=f"use {HOLD} or {FAIL}",
        )
    if request.shim not in (None, NO_SHIM, RAID_SHIM, AUTO_SHIM):
        raise Refused(
            f"shim {request.shim!r} is not known",
            device=request.name,
            remedy=f"use {NO_SHIM}, {RAID_SHIM} or {AUTO_SHIM}",
        )
    if not 1 <= len(request.spares) <= MAX_SPARES:
        raise Refused(
            f"has {len(request.spares)} spares",
            device=request.name,
            remedy=f"give 1 to {MAX_SPARES} spares",
        )
    size = request.chunk_bytes
    if size is not None and not (
        MIN_CHUNK_BYTES <= size <= MAX_CHUNK_BYTES and size & (size - 1) == 0
    ):
        raise Refused(
            f"a chunk of {size} bytes is not possible",
            device=request.name,
            remedy="use a power of two from 4 KiB to 1 MiB",
        )


def _present(info: DeviceInfo | None, path: str) -> DeviceInfo:
    if info is None:
        raise Refused("no such device", device=path or "''", remedy="name an existing block device")
    return info


def _check_names(seen: Seen) -> None:
    if seen.taken:
        raise Refused(
            "is a mapped device of something else, whose name the target would need",
            device=f"/dev/mapper/{seen.taken[0]}",
            remedy="choose another name for the target, or remove that device",
        )


def _check_distinct(request: Request, main: DeviceInfo, spares: Sequence[Candidate]) -> None:
    seen: dict[str, str] = {}
    for candidate in spares:
        info = candidate.info
        if info.devno == main.devno:
            raise Refused("is the main itself", device=info.path, remedy="give another device")
        if info.disk == main.devno or main.disk == info.devno:
            raise Refused(
                "shares its sectors with the main, one being a partition of the other",
                device=info.path,
                remedy="give another device",
            )
        if info.wwn and info.wwn == main.wwn and info.disk != main.disk:
            raise Refused(
                f"has the main's WWN {info.wwn}, so it is another path to the same disk",
                device=info.path,
                remedy="give another disk, and use multipath for disks with several paths",
            )
        if info.devno in seen:
            raise Refused(
                f"is given twice, also as {seen[info.devno]}",
                device=info.path,
                remedy="give each spare once",
            )
        for other in spares:
            if other is not candidate and other.info.disk == info.devno != other.info.devno:
                raise Refused(
                    f"contains the spare {other.info.path}",
                    device=info.path,
                    remedy="give either the disk or its partition",
                )
            if info.wwn and other.info.wwn == info.wwn and other.info.disk != info.disk:
                raise Refused(
                    f"has the WWN {info.wwn} of {other.info.path}, so both are paths to one disk",
                    device=info.path,
                    remedy="give each disk once, and use multipath for disks with several paths",
                )
        seen[info.devno] = info.path


def _check_unused(info: DeviceInfo, remains: Sequence[str], role: str) -> None:
    # What our own interrupted command left is removed first, so it is no use of the device.
    uses = [use for use in info.used_by if use.by not in remains]
    if uses:
        raise Refused(
            f"is in use and cannot be a {role}: " + ", ".join(map(str, uses)),
            device=info.path,
            remedy="unmount or release it first",
        )
    if info.read_only:
        raise Refused("is read-only", device=info.path, remedy=f"give a writable {role}")


def _existing(request: Request, candidates: Sequence[Candidate]) -> copies.Choice | None:
    """The metadata to go on with, or None where the target begins anew."""
    marked = {c.info.path: c.survey for c in candidates if not c.survey.empty}
    if not marked:
        return None
    try:
        choice = copies.choose(marked)
    except copies.NoMetadata as error:
        if request.wipe:
            return None
        raise Refused(
            error.message,
            device=error.device,
            remedy="give an empty device, or wipe: true to erase it",
        ) from error
    except Refused:
        # Two histories, or a newer format: nobody can say what would be lost.
        if request.wipe and request.discard_remaps:
            return None
        raise
    name = choice.metadata.config.get("name")
    if request.wipe and (request.discard_remaps or not choice.metadata.extents):
        return None
    if name != request.name:
        raise Refused(
            f"is a spare of target {name!r}{_only_there(choice.metadata)}",
            device=", ".join(marked),
            remedy=f"give that name, or {_to_erase(choice.metadata)}",
        )
    unreached = [c.info.path for _uuid, c in _unreached(choice, candidates)]
    unmarked = [c.info.path for c in candidates if c.survey.empty]
    if set(unmarked) - set(unreached):
        raise Refused(
            f"carries no metadata of target {name!r}, but {', '.join(marked)} does",
            device=", ".join(unmarked),
            remedy=f"give the target's own spares, or {_to_erase(choice.metadata)}",
        )
    for candidate in candidates:
        _check_not_reused(candidate)
    return choice


def _only_there(metadata: Metadata) -> str:
    count = sum(extent.length for extent in metadata.extents)
    return f", and {count_of(count, 'remapped chunk')} of it can be on it only" if count else ""


def _to_erase(metadata: Metadata) -> str:
    if metadata.extents:
        return "wipe: true with discard_remaps: true to lose those chunks and begin anew"
    return "wipe: true to begin anew on all of the spares"


def _check_not_reused(candidate: Candidate) -> None:
    """Refuse a spare that somebody has used for something else since."""
    others = [found for found in candidate.signatures if found != OWN_SIGNATURE]
    if others:
        raise Refused(
            f"carries a target's metadata, but was used for {', '.join(others)} since",
            device=candidate.info.path,
            remedy="save what is on it, and give another device",
        )


def _unreached(
    choice: copies.Choice, candidates: Sequence[Candidate]
) -> list[tuple[uuid.UUID, Candidate]]:
    """Candidates that the target's first commit names and did not reach, with the UUID.

    At the first generation no data is on any spare, so an interrupted creation can go on.
    """
    if choice.metadata.generation != 1:
        return []
    found = []
    # A cut can also leave copies of which none is whole.
    blank = [
        c
        for c in candidates
        if c.survey.spare_uuid is None and set(c.signatures) <= {OWN_SIGNATURE}
    ]
    for index in choice.missing:
        entry = choice.metadata.config["spares"][index]
        for candidate in blank:
            same_size = entry["geometry"]["spare_sectors"] == candidate.info.sectors
            if same_size and replacement.identity_of(candidate.info).items() <= entry.items():
                found.append((uuid.UUID(entry["uuid"]), candidate))
                blank.remove(candidate)
                break
    return found


def _plan_activation(request: Request, main: DeviceInfo, seen: Seen, choice: copies.Choice) -> Plan:
    metadata = choice.metadata
    mains = _mains_of(main, seen, metadata)
    _check_unchangeable(request, metadata)
    unreached = _unreached(choice, seen.candidates)
    by_uuid = {c.survey.spare_uuid: c for c in seen.candidates if c.survey.spare_uuid}
    by_uuid.update(unreached)
    spares: dict[int, DeviceInfo] = {}
    for index, entry in enumerate(metadata.config["spares"]):
        if entry is None:
            continue
        candidate = by_uuid.pop(uuid.UUID(entry["uuid"]), None)
        if candidate is None:
            raise Refused(
                f"spare {index} ({entry.get('model') or 'no model'}, serial "
                f"{entry.get('serial') or 'unknown'}, {entry['uuid']}) is not among the spares",
                device=request.name,
                remedy="give all of the target's spares",
            )
        _check_identity(candidate.info, entry, f"spare {index}")
        spares[index] = candidate.info
    if by_uuid:
        raise Refused(
            "is not a spare of this target any more",
            device=", ".join(c.info.path for c in by_uuid.values()),
            remedy="leave it out",
        )
    actions = [Action("remove_remains", name) for name in seen.remains]
    actions += _repairs(choice, spares)
    actions += [Action("repair_metadata", c.info.path) for _uuid, c in unreached]
    actions += _activations(request.name, spares)
    actions.append(_creation(request.name, mains[0], mains[1]))
    after = metadata
    if mains[1]:
        kind = REPLACE if main is mains[1] else UNDO
        action, after = _replacing(kind, request.name, metadata, mains[0], mains[1])
        actions.append(action)
    return Plan(
        name=request.name,
        actions=tuple(actions),
        before=_nothing(),
        after=_state(after, spares),
        metadata=metadata,
        main=mains[0],
        spares=spares,
        warnings=warnings_of(choice),
        replacement=mains[1],
    )


def _mains_of(
    main: DeviceInfo, seen: Seen, metadata: Metadata
) -> tuple[DeviceInfo, DeviceInfo | None]:
    """The target's main, and the one that is to replace it, of which ``main`` is one."""
    if not replacement.under_way(metadata):
        _check_main_identity(main, metadata)
        return main, None
    entry, old = metadata.config["replacement"], metadata.config["main"]
    others = [info for info in seen.others if info.devno != main.devno]
    if replacement.is_new_main(main, metadata):
        other = replacement.find_other(others, old, entry["old_path"], "old main")
        mains = other, main
    else:
        other = replacement.find_other(others, entry["main"], entry["main"]["path"], "new main")
        mains = main, other
    _check_unused(other, seen.remains, "main")
    return mains


def _plan_creation(
    request: Request, main: DeviceInfo, seen: Seen, new_uuid: Callable[[], uuid.UUID]
) -> Plan:
    chunk_bytes = request.chunk_bytes or DEFAULT_CHUNK_BYTES
    if main.sectors < chunk_bytes // SECTOR_BYTES:
        raise Refused(
            "is smaller than a chunk",
            device=main.path,
            remedy="give a larger main or a smaller chunk_size",
        )
    spares = {index: c.info for index, c in enumerate(seen.candidates)}
    entries = []
    actions = [Action("remove_remains", name) for name in seen.remains]
    for index, candidate in enumerate(seen.candidates):
        info = candidate.info
        geometry = _check_spare(candidate, main, chunk_bytes, request.wipe)
        content = list(candidate.signatures)
        if content or not candidate.survey.empty:
            actions.append(Action("wipe_spare", info.path, {"content": content}))
        capacity = pool.capacity(geometry, index, ())
        actions.append(Action("format_spare", info.path, {"chunks": capacity.total}))
        entries.append(
            {
                "uuid": str(new_uuid()),
                "geometry": geometry.to_dict(),
                **replacement.identity_of(info),
            }
        )
    metadata = Metadata(
        target_uuid=new_uuid(),
        generation=1,
        timestamp_ns=0,
        host_id=uuid.UUID(int=0),
        parent_digest=NO_DIGEST,
        config={
            "name": request.name,
            "chunk_sectors": chunk_bytes // SECTOR_BYTES,
            "block_sectors": main.block_sectors,
            "on_error": _wanted_errors(request, seen),
            "shim": _wanted_shim(request, main),
            "main": replacement.main_entry(main, main.sectors),
            "spares": entries,
        },
        health={},
        extents=(),
        lost=(),
    )
    actions += _activations(request.name, spares)
    actions.append(Action("commit_metadata", request.name, {"generation": 1}))
    actions.append(_creation(request.name, main))
    shared = [i.path for i in spares.values() if i.disk == main.disk]
    warnings = [f"{path} is on the same disk as the main and fails with it" for path in shared]
    return Plan(
        name=request.name,
        actions=tuple(actions),
        before=_nothing(),
        after=_state(metadata, spares),
        metadata=metadata,
        main=main,
        spares=spares,
        warnings=tuple(warnings),
    )


def _check_spare(candidate: Candidate, main: DeviceInfo, chunk_bytes: int, wipe: bool) -> Geometry:
    info = candidate.info
    if main.logical_block not in LOGICAL_BLOCKS:
        raise Refused(
            f"has logical blocks of {main.logical_block} bytes",
            device=main.path,
            remedy=f"give a main with blocks of {' or '.join(map(str, LOGICAL_BLOCKS))} bytes",
        )
    if info.logical_block != main.logical_block:
        raise Refused(
            f"has logical blocks of {info.logical_block} bytes, but {main.path} of "
            f"{main.logical_block}",
            device=info.path,
            remedy="give a spare with the main's block size",
        )
    for device in (main, info):
        if chunk_bytes % device.physical_block:
            raise Refused(
                f"a chunk of {chunk_bytes} bytes is not a multiple of its physical block of "
                f"{device.physical_block} bytes",
                device=device.path,
                remedy="use a larger chunk_size",
            )
    content = list(candidate.signatures) + (
        [] if candidate.survey.empty else ["copies of a target's metadata"]
    )
    if content and not wipe:
        raise Refused(
            f"is not empty: {', '.join(dict.fromkeys(content))}",
            device=info.path,
            remedy="give an empty device, or wipe: true to erase it",
        )
    try:
        return plan_geometry(info.sectors, chunk_bytes // SECTOR_BYTES, info.block_sectors)
    except DmRemapError as error:
        raise Refused(error.message, device=info.path, remedy=error.remedy) from error


def _check_main_identity(main: DeviceInfo, metadata: Metadata) -> None:
    recorded = metadata.config["main"]
    sectors = replacement.device_sectors(recorded)
    if main.sectors != sectors or main.logical_block != recorded["logical_block"]:
        raise Refused(
            f"has {main.sectors} sectors in blocks of {main.logical_block} bytes, but the "
            f"target's main has {sectors} in blocks of {recorded['logical_block']}",
            device=main.path,
            remedy="give the target's own main",
        )
    _check_identity(main, recorded, "main")


def _check_identity(info: DeviceInfo, recorded: Mapping[str, Any], role: str) -> None:
    for key, mine in replacement.identity_of(info).items():
        if mine and recorded.get(key) and mine != recorded[key]:
            raise Refused(
                f"has {key} {mine!r}, but the target's {role} has {recorded[key]!r}",
                device=info.path,
                remedy=f"give the target's own {role}; a clone of it will not do",
            )


def _check_unchangeable(request: Request, metadata: Metadata) -> None:
    chunk_bytes = metadata.config["chunk_sectors"] * SECTOR_BYTES
    if request.chunk_bytes not in (None, chunk_bytes):
        raise Refused(
            f"has chunks of {chunk_bytes} bytes, which cannot be changed",
            device=request.name,
            remedy=f"leave out chunk_size or give {chunk_bytes}",
        )


def _plan_active(request: Request, target: ActiveTarget, seen: Seen) -> Plan:
    main = _present(seen.main, request.main)
    wanted = {c.info.devno: c.info.path for c in seen.candidates}
    active = {s.candidate.info.devno: s.candidate.info.path for s in target.spares}
    if set(wanted) != set(active) or len(wanted) != len(request.spares):
        raise Refused(
            f"is active with the spares {', '.join(sorted(active.values()))}, not "
            f"{', '.join(sorted(wanted.values()))}",
            device=request.name,
            remedy="give those spares; a target's spares cannot be changed yet",
        )
    _check_unchangeable(request, target.metadata)
    upkeep = plan_upkeep(target)
    plan = _with_settings(request, target, seen, main, upkeep)
    return _with_replacement(request, target, seen, main, plan)


def _with_replacement(
    request: Request, target: ActiveTarget, seen: Seen, main: DeviceInfo, plan: Plan
) -> Plan:
    """The plan that also brings the target to the main that is wanted."""
    old, new, metadata = target.main, target.replacement, plan.metadata
    if metadata is None or (new is None and (old is None or main.devno == old.devno)):
        return plan
    kind: str = REPLACE
    wipes: tuple[Action, ...] = ()
    if new is None:
        new = main
        wipes = _check_new_main(request, target, seen, new)
    elif main.devno != new.devno:
        if old is None or main.devno != old.devno:
            old_path = metadata.config["replacement"]["old_path"]
            raise Refused(
                f"its main {old_path} is being replaced by {new.path}, not by {request.main}",
                device=request.name,
                remedy=f"give {new.path} to go on, or {old_path} to go back",
            )
        kind = UNDO
    action, after = _replacing(kind, target.name, metadata, old, new)
    spares = {spare.index: spare.candidate.info for spare in target.spares}
    return replace(
        plan,
        actions=(*plan.actions, *wipes, action),
        after=_state(after, spares),
        replacement=new,
    )


def _check_new_main(
    request: Request, target: ActiveTarget, seen: Seen, new: DeviceInfo
) -> tuple[Action, ...]:
    """Refuse what cannot replace the main; what must be erased before it does."""
    _check_distinct(request, new, seen.candidates)
    # What an interruption has left over either main is removed before.
    _check_unused(new, () if target.tidy else tuple(part_names(target.name)), "main")
    replacement.check_new_main(new, target.main, target.metadata.config)
    if seen.new_main is None:
        raise AssertionError("a device that is to replace the main was looked at")
    survey = seen.new_main.survey
    found = list(seen.new_main.signatures)
    if not survey.empty:
        found.append("copies of a target's metadata")
    spared = any(copy.metadata.extents for copy in survey.copies)
    if found and spared and not request.discard_remaps:
        raise Refused(
            "is a spare with remapped chunks of a target",
            device=new.path,
            remedy="give another disk, or wipe: true with discard_remaps: true to lose them",
        )
    if found and not request.wipe:
        raise Refused(
            f"is not empty: {', '.join(dict.fromkeys(found))}",
            device=new.path,
            remedy="give an empty disk, or wipe: true to erase it",
        )
    return (Action("wipe_main", new.path, {"content": found}),) if found else ()


def _replacing(
    kind: str, name: str, metadata: Metadata, old: DeviceInfo | None, new: DeviceInfo
) -> tuple[Action, Metadata]:
    """The action that replaces main or undoes that, and the metadata when it is done.

    Chunks with lost sectors stay on their spares. Each copied piece is a generation of its own;
    their number depends on what is found on the way, so only one is counted.
    """
    details = {
        "from": old.path if old else "",
        "to": new.path,
        "copied": replacement.copied_sectors(metadata) * SECTOR_BYTES,
        "total": metadata.config["main"]["sectors"] * SECTOR_BYTES,
    }
    config = metadata.config
    if not replacement.under_way(metadata):
        config = replacement.begun(config, new, new.path, details["from"])
    after = replace(metadata, generation=metadata.generation + 1)
    if kind == UNDO:
        after = replace(after, config=replacement.undone(config))
    else:
        lossy = extents.chunks_of(
            [(item.sector, item.count) for item in metadata.lost],
            config["chunk_sectors"],
            config["main"]["sectors"],
        )
        chunks = [c for e in metadata.extents for c in range(e.logical, e.logical + e.length)]
        left = extents.remove(metadata.extents, set(chunks) - set(lossy))
        after = replace(after, config=replacement.finished(config), extents=left)
    return Action(kind, name, details), after


def _with_settings(
    request: Request, target: ActiveTarget, seen: Seen, main: DeviceInfo, upkeep: Plan
) -> Plan:
    """The plan that also brings configuration and kernel to what the request says of errors."""
    metadata, name = target.metadata, target.name
    config = dict(metadata.config)
    if request.on_error is not None and request.on_error != config["on_error"]:
        config["on_error"] = _wanted_errors(request, seen)
    if request.shim is not None:
        config["shim"] = _wanted_shim(request, main)
    actions = list(upkeep.actions)
    after = metadata
    changes = {
        key: value for key, value in config.items() if value != _setting(metadata.config, key)
    }
    if changes:
        after = replace(metadata, generation=metadata.generation + 1, config=config)
        actions.append(Action("update_config", name, {**changes, "generation": after.generation}))
    if shim_of(after) != (RAID_SHIM if target.shim else NO_SHIM):
        actions.append(Action("insert_shim" if not target.shim else "remove_shim", name))
    if config["on_error"] != target.errors:
        actions.append(Action("hold_errors" if target.path is None else "pass_errors", name))
    elif target.path and not target.path.queueing:
        actions.append(Action("restore_hold", name))
    spares = {spare.index: spare.candidate.info for spare in target.spares}
    return replace(upkeep, actions=tuple(actions), after=_state(after, spares), metadata=after)


def _setting(config: Mapping[str, Any], key: str) -> Any:
    return config.get(key, NO_SHIM if key == "shim" else None)


def shim_of(metadata: Metadata) -> str:
    """The shim that a target is to have: ``none`` or ``raid``."""
    return str(_setting(metadata.config, "shim"))


def _wanted_errors(request: Request, seen: Seen) -> str:
    wanted = request.on_error or HOLD
    if wanted == HOLD and not seen.healer:
        raise Refused(
            "failed I/O would be held, but the daemon that heals it does not run on this host",
            device=request.name,
            remedy="apply the role dm_remap.storage.host first, or give on_error: fail",
        )
    return wanted


def _wanted_shim(request: Request, main: DeviceInfo) -> str:
    if request.shim == AUTO_SHIM:
        # Their medium errors pass multipath: ENODATA is no path error (blk_path_error).
        return RAID_SHIM if main.bus in ("scsi", "nvme") else NO_SHIM
    return request.shim or NO_SHIM


def plan_upkeep(target: ActiveTarget) -> Plan:
    """Plan what an active target needs to be whole: end an interrupted remap, repair copies."""
    spares = {spare.index: spare.candidate.info for spare in target.spares}
    actions = _repairs(target.choice, spares)
    if target.frozen:
        actions.append(Action("thaw", target.name))
    elif not target.tidy:
        actions.append(Action("tidy", target.name))
    state = _state(target.metadata, spares)
    return Plan(
        name=target.device.name,
        actions=tuple(actions),
        before=state,
        after=state,
        metadata=target.metadata,
        main=target.main,
        spares=spares,
        warnings=warnings_of(target.choice),
    )


def plan_absent(
    name: str, target: ActiveTarget | None, seen: Seen, discard_remaps: bool = False
) -> Plan:
    """Plan the removal of a target, with every copy of its metadata.

    Args:
        name: the target's name.
        target: the active target, if there is one.
        seen: the candidates are devices that may carry an inactive target's metadata.
        discard_remaps: remove it although remapped chunks live on spares only.

    Raises:
        Refused: it is in use, or data would be lost.
    """
    check_name(name)
    if target:
        if target.device.open_count:
            raise Refused(
                f"is in use, opened {count_of(target.device.open_count, 'time')}",
                device=f"/dev/mapper/{name}",
                remedy="unmount it and close what uses it",
            )
        metadata = target.metadata
        spares = {spare.index: spare.candidate.info for spare in target.spares}
    else:
        marked = {c.info.path: c for c in seen.candidates if not c.survey.empty}
        if not marked:
            actions = tuple(Action("remove_remains", left) for left in seen.remains)
            return Plan(name=name, actions=actions, before=_nothing(), after=_nothing())
        metadata = copies.choose({path: c.survey for path, c in marked.items()}).metadata
        if metadata.config.get("name") != name:
            raise Refused(
                f"is a spare of target {metadata.config.get('name')!r}",
                device=", ".join(marked),
                remedy="give that name",
            )
        for candidate in marked.values():
            _check_unused(candidate.info, seen.remains, "spare to be wiped")
            _check_not_reused(candidate)
        spares = {index: c.info for index, c in enumerate(marked.values())}
    if metadata.extents and not discard_remaps:
        count = sum(extent.length for extent in metadata.extents)
        raise Refused(
            f"has {count_of(count, 'chunk')} whose data is on its spares only",
            device=name,
            remedy="copy the data off first, or give discard_remaps: true to lose those chunks",
        )
    if replacement.under_way(metadata) and not discard_remaps:
        raise Refused(
            "has its data on two disks, because its main is being replaced",
            device=name,
            remedy="let the replacement go on to its end or back, or give discard_remaps: true to "
            "lose what was copied already",
        )
    # What an interruption leaves in the kernel shows the next run which spares are to be wiped.
    wipes = [Action("wipe_metadata", info.path) for info in spares.values()]
    if target:
        actions = (
            Action("remove_target", f"/dev/mapper/{name}"),
            *wipes,
            *(
                Action("deactivate_spare", info.path, {"name": spare_name(name, index)})
                for index, info in spares.items()
            ),
        )
    else:
        actions = (*wipes, *(Action("remove_remains", left) for left in seen.remains))
    return Plan(
        name=name,
        actions=actions,
        before=_state(metadata, spares),
        after=_nothing(),
        metadata=metadata,
        spares=spares,
    )


def plan_remap(
    target: ActiveTarget,
    ranges: Sequence[tuple[int, int]],
    expected_generation: int | None = None,
    avoid: Sequence[tuple[int, int]] = (),
) -> Plan:
    """Plan the remap of every chunk that ``ranges`` touch and that is still on main.

    Args:
        target: the active target.
        ranges: pairs of first sector and count on the target.
        expected_generation: refuse unless the metadata is at this generation.
        avoid: pairs of spare index and chunk that must not be used.

    Raises:
        StaleGeneration: the metadata is at another generation.
        Refused: a range is not on the target or cuts a block, or the spares are full.
    """
    metadata = target.metadata
    name = target.device.name
    if expected_generation is not None and metadata.generation != expected_generation:
        raise StaleGeneration(
            f"is at generation {metadata.generation}, not {expected_generation}",
            device=name,
            remedy="look at the target again and decide anew",
        )
    chunk_sectors = metadata.config["chunk_sectors"]
    total = metadata.config["main"]["sectors"]
    _check_whole_blocks(name, ranges, metadata.config["block_sectors"])
    try:
        chunks = [
            chunk
            for chunk in extents.chunks_of(ranges, chunk_sectors, total)
            if extents.find(metadata.extents, chunk) is None
        ]
        placed = pool.allocate(chunks, usable_geometries(target), metadata.extents, avoid)
    except Refused as error:
        raise Refused(error.message, device=name, remedy=error.remedy) from error
    upkeep = plan_upkeep(target)
    plan = remap_actions(target, placed, ())
    return replace(plan, actions=upkeep.actions + plan.actions, warnings=upkeep.warnings)


def remap_actions(
    target: ActiveTarget, placed: Sequence[Extent], lost: Sequence[tuple[int, int]]
) -> Plan:
    """The plan that remaps chunks to given places, without any upkeep.

    Args:
        target: the active target.
        placed: the new extents, of one chunk each.
        lost: pairs of first sector and count that are lost by it.
    """
    metadata = target.metadata
    name = target.device.name
    chunk_sectors = metadata.config["chunk_sectors"]
    total = metadata.config["main"]["sectors"]
    spares = {spare.index: spare.candidate.info for spare in target.spares}
    actions = []
    for extent in placed:
        start = extent.logical * chunk_sectors
        actions.append(
            Action(
                "remap_chunk",
                name,
                {
                    "chunk": extent.logical,
                    "start": start,
                    "count": min(chunk_sectors, total - start),
                    "spare": extent.spare,
                    "spare_chunk": extent.physical,
                },
            )
        )
    after = metadata
    if placed:
        after = with_remaps(replace(metadata, generation=metadata.generation + 1), placed, lost)
        actions.append(Action("commit_metadata", name, {"generation": after.generation}))
    return Plan(
        name=name,
        actions=tuple(actions),
        before=_state(metadata, spares),
        after=_state(after, spares),
        metadata=metadata,
        main=target.main,
        spares=spares,
        placed=tuple(placed),
    )


def with_remaps(
    metadata: Metadata, placed: Sequence[Extent], lost: Sequence[tuple[int, int]]
) -> Metadata:
    """The metadata with new extents and lost sectors (pairs of first sector and count)."""
    known = [(item.sector, item.count) for item in metadata.lost]
    return replace(
        metadata,
        extents=extents.merge([*metadata.extents, *placed]),
        lost=tuple(LostRange(*item) for item in extents.merge_sectors([*known, *lost])),
    )


def _check_whole_blocks(name: str, ranges: Sequence[tuple[int, int]], block_sectors: int) -> None:
    for start, count in ranges:
        if start % block_sectors or count % block_sectors:
            raise Refused(
                f"sectors {start}+{count} are not whole blocks of "
                f"{block_sectors * SECTOR_BYTES} bytes",
                device=name,
                remedy=f"give multiples of {block_sectors} as first sector and count",
            )


def usable_geometries(target: ActiveTarget) -> dict[int, Geometry]:
    """Geometries of the target's active spares, by index."""
    return {spare.index: geometry_of(target.metadata, spare.index) for spare in target.spares}


def _repairs(choice: copies.Choice, spares: Mapping[int, DeviceInfo]) -> list[Action]:
    # A copy that cannot be read may never be writable again, so it alone is no reason to write:
    # every commit tries it anyway.
    needing = {
        path
        for path, faults in choice.damaged.items()
        if any(fault.diagnosis is not Diagnosis.UNREADABLE for fault in faults)
    } | choice.stale
    return [
        Action("repair_metadata", info.path) for info in spares.values() if info.path in needing
    ]


def warnings_of(choice: copies.Choice) -> tuple[str, ...]:
    """What the user should know of a choice, copies that cannot be read included."""
    return choice.warnings + tuple(
        f"{path}: copy {fault.index} of the metadata is {fault.message}"
        for path, faults in choice.damaged.items()
        for fault in faults
        if fault.diagnosis is Diagnosis.UNREADABLE
    )


def _activations(name: str, spares: Mapping[int, DeviceInfo]) -> list[Action]:
    return [
        Action("activate_spare", info.path, {"name": spare_name(name, index)})
        for index, info in spares.items()
    ]


def _creation(name: str, main: DeviceInfo, new: DeviceInfo | None = None) -> Action:
    details = {"main": main.path, **({"new_main": new.path} if new else {})}
    return Action("create_target", f"/dev/mapper/{name}", details)


def _nothing() -> dict[str, Any]:
    return {"generation": None, "config": None, "table": []}


def _state(metadata: Metadata, spares: Mapping[int, DeviceInfo]) -> dict[str, Any]:
    """The state for a diff, in words that stay the same when nothing changes."""
    config = metadata.config
    return {
        "generation": metadata.generation,
        "config": {
            "name": config["name"],
            "chunk_size": config["chunk_sectors"] * SECTOR_BYTES,
            "on_error": config["on_error"],
            "shim": shim_of(metadata),
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
