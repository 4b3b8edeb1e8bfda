# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What must be done: desired and observed state to a list of actions (pure)."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from . import copies, extents, fingerprint, kernel_v4, migration, pool, replacement
from .blockdev import OWN_SIGNATURE, DeviceInfo
from .devmapper import MappedDevice, Segment, check_name
from .errors import DmRemapError, Refused, StaleGeneration, count_of
from .events import subtract_ranges
from .format import (
    MAX_SPARES,
    NO_DIGEST,
    Diagnosis,
    Extent,
    Geometry,
    LostRange,
    Metadata,
    geometry_of,
    plan_geometry,
)
from .mapping import build_table, describe_table, linear_target
from .migration import Migration
from .stack import CARRIER_SECTORS, PathState, part_names, spare_name, spare_part_names

SECTOR_BYTES = 512
MIN_CHUNK_BYTES = 4096
MAX_CHUNK_BYTES = 1 << 20
DEFAULT_CHUNK_BYTES = 65536
LOGICAL_BLOCKS = (512, 4096)
HOLD, FAIL = "hold", "fail"
NO_SHIM, RAID_SHIM, AUTO_SHIM = "none", "raid", "auto"
# The values that a user may give.
ON_ERROR = (HOLD, FAIL)
SHIMS = (NO_SHIM, RAID_SHIM, AUTO_SHIM)
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
class LostSpare:
    """A configured spare of an active target that cannot be used now.

    Args:
        index: its position in the configuration.
        devno: its integrity device, which gives errors; empty where there is none.
        below: device number of the device that it stood on; empty where nobody knows.
        path: that device, empty where it is gone.
        reason: what is wrong with it.
        mapped: whether the map leads to it still, so that a flush of what it lost fails.
    """

    index: int
    devno: str
    below: str
    path: str
    reason: str
    mapped: bool = True


@dataclass(frozen=True)
class Stray:
    """Mapped devices of a spare that is not in the configuration: an interruption left them.

    Args:
        index: the position that they are named after.
        path: the device below, empty where it is gone.
        below: its device number.
        marked: whether there is metadata on it.
    """

    index: int
    path: str
    below: str
    marked: bool


@dataclass(frozen=True)
class ActiveTarget:
    """A target that device-mapper shows.

    Args:
        device: its mapped device.
        map: the mapped device whose table is the map: NAME-map, or the target itself.
        table: the map's live table.
        main: the main, or None where every chunk is remapped.
        spares: the spares that can be used.
        choice: the metadata that was chosen among the spares' copies.
        path: state of the path that holds failed I/O; None where errors are passed on.
        cut: ranges (start, count) of its sectors whose I/O fails above that, at once.
        past_hold: it stands on its map, past what holds failed I/O, where a cut was interrupted.
        shim: the device between the map and main.
        frozen: the device that the map sends frozen chunks to, where a move was interrupted.
        tidy: whether an interruption left nothing else in the kernel.
        lost_spares: the spares that cannot be used.
        strays: what is left of devices that are no spares yet, or any more.
        certain: whether the live table agrees with the metadata. Where it does not and a spare is
            lost, that one has a newer generation.
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
    cut: tuple[tuple[int, int], ...] = ()
    past_hold: bool = False
    shim: MappedDevice | None = None
    frozen: MappedDevice | None = None
    tidy: bool = True
    lost_spares: tuple[LostSpare, ...] = ()
    strays: tuple[Stray, ...] = ()
    certain: bool = True
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
    def spare_infos(self) -> dict[int, DeviceInfo]:
        """The devices of the spares that can be used, by index."""
        return {spare.index: spare.candidate.info for spare in self.spares}

    @property
    def spare_devnos(self) -> dict[int, str]:
        """Device numbers of the spares' integrity devices, by index.

        That of a lost spare is there too until a flush has failed there: what it had acknowledged
        may be lost.
        """
        lost = {s.index: s.devno for s in self.lost_spares if s.devno and s.mapped}
        return {**lost, **{spare.index: spare.devno for spare in self.spares}}

    @property
    def unavailable(self) -> tuple[tuple[int, int], ...]:
        """Ranges (start, count) of its sectors that are on spares which cannot be used."""
        return sectors_on(self.metadata, [lost.index for lost in self.lost_spares])

    @property
    def behind(self) -> set[int]:
        """Indexes of active spares that do not carry the chosen generation."""
        return {
            spare.index
            for spare in self.spares
            if spare.candidate.info.path in self.choice.stale or spare.index in self.choice.missing
        }

    @property
    def upper_main(self) -> str:
        """Device number that the map uses for main; empty where every chunk is remapped."""
        if self.shim:
            return self.shim.devno
        return self.main.devno if self.main else ""

    @property
    def carrier(self) -> str:
        """Device number of a device that flushes may go to: main, or a spare without one."""
        return self.main.devno if self.main else next(iter(self.spare_devnos.values()))

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


class Holder(Protocol):
    """What holds chunks: an active target, or one that is being made."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def metadata(self) -> Metadata:
        """Its metadata before the chunks are put there."""

    @property
    def spare_infos(self) -> Mapping[int, DeviceInfo]:
        """The spares that can be used, by index."""


@dataclass(frozen=True)
class NewTarget:
    """A target that is being made, with no device yet."""

    name: str
    metadata: Metadata
    spare_infos: Mapping[int, DeviceInfo]


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
        allocation: one of `pool.POLICIES`; None takes the default, or what the target has.
        warn: percent of used chunks from which on is warned; None likewise.
        critical: percent from which on the warning is critical; None likewise.
        migrate_from: path of a dm-remap-v4 spare whose remapped sectors a new target gets; None
            for none.
        migrate_pending: what to do with its remaps that may never have been used, one of
            `migration.PENDING_CHOICES`; None refuses them.
        migrate_unit: bytes that each of its remaps stands for; None takes a logical block.
        degraded: a target may be activated although spares of it are missing, and spares may be
            named that do not exist.
        trusted: device numbers of devices that the operator has named for their role in a target
            that exists. Serial number, WWN, model and volume that are recorded are no reason to
            refuse them; size and block size are. They are recorded anew. A spare among them also
            decides which history counts, against the host's own backup.
        carry_on: a replacement of the main that is under way goes on; else the target is only
            activated with both mains.
    """

    name: str
    main: str
    spares: tuple[str, ...]
    chunk_bytes: int | None = None
    on_error: str | None = None
    shim: str | None = None
    wipe: bool = False
    discard_remaps: bool = False
    allocation: str | None = None
    warn: int | None = None
    critical: int | None = None
    migrate_from: str | None = None
    migrate_pending: str | None = None
    migrate_unit: int | None = None
    degraded: bool = False
    trusted: frozenset[str] = frozenset()
    carry_on: bool = True


@dataclass(frozen=True)
class OldSpare:
    """The spare of a kernel target: who it is, and the metadata on it."""

    info: DeviceInfo
    survey: kernel_v4.Survey


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
        old_spare: the kernel target's spare that the target is to be migrated from, if it is there.
        absent: paths of named spares that do not exist or cannot be read.
        witness: the newest of the host's backups of the target; where no spare tells which one it
            is, of the target that had this name or one of these devices.
        removed: path of the host's note that the target was removed on purpose; else empty.
    """

    target: ActiveTarget | None
    remains: tuple[str, ...]
    main: DeviceInfo | None
    candidates: tuple[Candidate, ...]
    taken: tuple[str, ...] = ()
    healer: bool = True
    new_main: Candidate | None = None
    others: tuple[DeviceInfo, ...] = ()
    old_spare: OldSpare | None = None
    absent: tuple[str, ...] = ()
    witness: Metadata | None = None
    removed: str = ""


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


def plan_present(
    request: Request, seen: Seen, new_uuid: Callable[[], uuid.UUID] = uuid.uuid4
) -> Plan:
    """Plan the target's creation, its activation from its metadata, or nothing.

    Raises:
        Refused: what is wanted cannot be had safely; nothing was written.
    """
    _check_request(request)
    _check_old_spare(request, seen)
    if seen.target:
        _check_migrated(request, seen.target.metadata)
        return _plan_active(request, seen.target, seen, new_uuid)
    main = _present(seen.main, request.main)
    _check_names(seen)
    _check_distinct(main, [c.info for c in seen.candidates])
    _check_unused(main, seen.remains, "main")
    for candidate in seen.candidates:
        _check_unused(candidate.info, seen.remains, "spare")
    choice = _existing(request, seen.candidates)
    if choice:
        _check_migrated(request, choice.metadata)
        if not migration.unfinished(choice.metadata):
            return _plan_activation(request, main, seen, choice)
    if seen.absent:
        raise Refused(
            "cannot be read, and no other spare carries the target's metadata",
            device=", ".join(seen.absent),
            remedy="attach one of the target's spares, or name existing devices for a new target",
        )
    # What was never active is still where it came from, so all that is on its spares can go.
    begun = frozenset(c.info.path for c in seen.candidates if choice and not c.survey.empty)
    return _plan_creation(request, main, seen, new_uuid, begun)


def request_faults(request: Request) -> Iterator[tuple[str, DmRemapError]]:
    """What of a request cannot be, whatever is on the host: the field of `Request`, and why."""
    try:
        check_name(request.name)
    except DmRemapError as error:
        yield "name", error
    for field_name, value, known in (
        ("on_error", request.on_error, ON_ERROR),
        ("shim", request.shim, SHIMS),
        ("allocation", request.allocation, pool.POLICIES),
    ):
        if value not in (None, *known):
            listed = f"{', '.join(known[:-1])} or {known[-1]}"
            yield (
                field_name,
                Refused(
                    f"{field_name} {value!r} is not known",
                    device=request.name,
                    remedy=f"use {listed}",
                ),
            )
    if not 1 <= len(request.spares) <= MAX_SPARES:
        yield (
            "spares",
            Refused(
                f"has {count_of(len(request.spares), 'spare')}",
                device=request.name,
                remedy=f"give 1 to {MAX_SPARES} spares",
            ),
        )
    size = request.chunk_bytes
    if size is not None and not (
        MIN_CHUNK_BYTES <= size <= MAX_CHUNK_BYTES and size & (size - 1) == 0
    ):
        yield (
            "chunk_bytes",
            Refused(
                f"a chunk of {size} bytes is not possible",
                device=request.name,
                remedy="use a power of two from 4 KiB to 1 MiB",
            ),
        )


def _check_request(request: Request) -> None:
    for _field_name, error in request_faults(request):
        raise error


def _policies(request: Request, config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a target's policies is to be stored, because the request wants it otherwise.

    Args:
        request: what is wanted; what it leaves open stays.
        config: the configuration that the target has.
    """
    changed: dict[str, Any] = {}
    if request.allocation not in (None, pool.policy_of(config)):
        changed["allocation"] = request.allocation
    before = pool.thresholds_of(config)
    try:
        after = pool.Thresholds(
            before.warn if request.warn is None else request.warn,
            before.critical if request.critical is None else request.critical,
        )
    except Refused as error:
        raise Refused(error.message, device=request.name, remedy=error.remedy) from error
    if after != before:
        stored = config.get("thresholds")
        changed["thresholds"] = {**(stored if isinstance(stored, dict) else {}), **asdict(after)}
    return changed


def _with_config(plan: Plan, changed: Mapping[str, Any]) -> Plan:
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
        after=_state(after, spares),
        metadata=plan.metadata if plan.final else after,
        final=after if plan.final else None,
        warnings=(
            *(warning for warning in plan.warnings if warning not in said),
            *pool_warnings(after, geometries),
        ),
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


def _check_distinct(main: DeviceInfo, spares: Iterable[DeviceInfo]) -> None:
    seen: dict[str, str] = {}
    spares = list(spares)
    for info in spares:
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
            if other is not info and other.disk == info.devno != other.devno:
                raise Refused(
                    f"contains the spare {other.path}",
                    device=info.path,
                    remedy="give either the disk or its partition",
                )
            if info.wwn and other.wwn == info.wwn and other.disk != info.disk:
                raise Refused(
                    f"has the WWN {info.wwn} of {other.path}, so both are paths to one disk",
                    device=info.path,
                    remedy="give each disk once, and use multipath for disks with several paths",
                )
        seen[info.devno] = info.path


def _check_unused(info: DeviceInfo, remains: Sequence[str], role: str) -> None:
    _check_free(info, remains, role)
    if info.read_only:
        raise Refused("is read-only", device=info.path, remedy=f"give a writable {role}")


def _check_free(info: DeviceInfo, remains: Sequence[str], role: str) -> None:
    # What our own interrupted command left is removed first, so it is no use of the device.
    uses = [use for use in info.used_by if use.by not in remains]
    if uses:
        raise Refused(
            f"is in use and cannot be a {role}: " + ", ".join(map(str, uses)),
            device=info.path,
            remedy="unmount or release it first",
        )


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
    if migration.unfinished(choice.metadata):
        for candidate in candidates:
            if not candidate.survey.empty:
                check_not_reused(candidate)
        if len(_unreached(choice, candidates)) < len(choice.missing):
            # Another spare might say that the migration has ended, and what is here is in use.
            raise Refused(
                "is one of several spares of a target whose migration has not ended as far as is "
                "known here, and not all of them are given",
                device=", ".join(marked),
                remedy=f"give all of them, or {_to_erase(choice.metadata)}",
            )
        return choice
    unreached = [c.info.path for _uuid, c in _unreached(choice, candidates)]
    unmarked = [c.info.path for c in candidates if c.survey.empty]
    if set(unmarked) - set(unreached):
        raise Refused(
            f"carries no metadata of target {name!r}, but {', '.join(marked)} does",
            device=", ".join(unmarked),
            remedy=f"give the target's own spares, or {_to_erase(choice.metadata)}",
        )
    for candidate in candidates:
        check_not_reused(candidate)
    return choice


def _check_old_spare(request: Request, seen: Seen) -> None:
    """Refuse what contradicts itself about the spare that the target is to be migrated from."""
    if request.migrate_from is None:
        if request.migrate_pending is not None or request.migrate_unit is not None:
            raise Refused(
                "says how to migrate, but not from where",
                device=request.name,
                remedy="give migrate_from, or leave out migrate_pending and migrate_unit",
            )
        return
    old = seen.old_spare
    if old and any(c.info.devno == old.info.devno for c in seen.candidates):
        raise Refused(
            "is the spare to be migrated from, which stays as it is, and a new spare at once",
            device=old.info.path,
            remedy="give other devices as spares; once the target is migrated, leave out "
            "migrate_from",
        )


def _check_migrated(request: Request, metadata: Metadata) -> None:
    """Refuse to leave out a migration that was asked for or begun."""
    if request.migrate_from is None and migration.unfinished(metadata):
        raise Refused(
            "was being migrated from a dm-remap-v4 spare, and that has not ended",
            device=request.name,
            remedy="give migrate_from again, or wipe: true with discard_remaps: true to begin "
            "without it",
        )
    if request.migrate_from is not None and "migration" not in metadata.config:
        raise Refused(
            "exists already and was not migrated, so nothing of the old spare can be put into it",
            device=request.name,
            remedy="leave out migrate_from, or remove the target and begin anew",
        )


def _only_there(metadata: Metadata) -> str:
    count = sum(extent.length for extent in metadata.extents)
    return f", and {count_of(count, 'remapped chunk')} of it can be on it only" if count else ""


def _to_erase(metadata: Metadata) -> str:
    if metadata.extents:
        return "wipe: true with discard_remaps: true to lose those chunks and begin anew"
    return "wipe: true to begin anew on all of the spares"


def check_not_reused(candidate: Candidate) -> None:
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
    mains = _mains_of(main, seen, metadata, request.trusted)
    _check_unchangeable(request, metadata)
    unreached = _unreached(choice, seen.candidates)
    by_uuid = {c.survey.spare_uuid: c for c in seen.candidates if c.survey.spare_uuid}
    by_uuid.update(unreached)
    spares: dict[int, DeviceInfo] = {}
    missing: list[int] = []
    for index, entry in enumerate(metadata.config["spares"]):
        if entry is None:
            continue
        candidate = by_uuid.pop(uuid.UUID(entry["uuid"]), None)
        if candidate is None:
            missing.append(index)
            continue
        _check_spare_identity(candidate.info, metadata, index, request.trusted)
        spares[index] = candidate.info
    if by_uuid:
        raise Refused(
            "is not a spare of this target any more",
            device=", ".join(c.info.path for c in by_uuid.values()),
            remedy="leave it out",
        )
    _check_not_removed(seen, [c.info.path for c in seen.candidates])
    _check_missing(request, seen, metadata, missing)
    actions = [Action("remove_remains", name) for name in seen.remains]
    actions += _repairs(choice, spares)
    actions += [Action("repair_metadata", c.info.path) for _uuid, c in unreached]
    actions += _activations(request.name, spares)
    noted = with_notes(metadata, missing)
    if noted.config != metadata.config:
        details = {"generation": metadata.generation + 1, "missing": missing}
        actions.append(Action("note_missing", request.name, details))
        noted = replace(noted, generation=metadata.generation + 1)
    after = noted
    actions.append(_creation(request.name, mains[0], mains[1]))
    if mains[1] and request.carry_on:
        kind = REPLACE if main is mains[1] else UNDO
        action, after = _replacing(kind, request.name, noted, mains[0], mains[1], missing)
        actions.append(action)
    geometries = {index: geometry_of(metadata, index) for index in spares}
    plan = Plan(
        name=request.name,
        actions=tuple(actions),
        before=_nothing(),
        after=_state(after, spares),
        metadata=metadata,
        main=mains[0],
        spares=spares,
        final=noted if noted.generation > metadata.generation else None,
        warnings=(
            *warnings_of(choice),
            *_doubts(metadata, missing, seen.witness),
            *pool_warnings(metadata, geometries),
        ),
        replacement=mains[1],
    )
    changed = _policies(request, metadata.config)
    changed.update(_identities(noted.config, mains[0], spares, request.trusted))
    return _with_config(plan, changed)


def _identities(
    config: Mapping[str, Any],
    main: DeviceInfo,
    spares: Mapping[int, DeviceInfo],
    trusted: Collection[str],
) -> dict[str, Any]:
    """What of the configuration changes where a trusted device is recorded as who it is now.

    From then on it is known by its hardware, and what it was copied from is the clone.
    """
    changed: dict[str, Any] = {}
    if main.devno in trusted:
        entry = replacement.as_seen(config["main"], main)
        if entry != config["main"]:
            changed["main"] = entry
    entries = [
        replacement.as_seen(entry, spares[index], hardware_only=True)
        if entry and index in spares and spares[index].devno in trusted
        else entry
        for index, entry in enumerate(config["spares"])
    ]
    if entries != config["spares"]:
        changed["spares"] = entries
    return changed


def is_noted(metadata: Metadata, index: int) -> bool:
    """Whether a generation was committed already in the knowledge that a spare is missing."""
    spare_uuid = uuid.UUID(metadata.config["spares"][index]["uuid"])
    return copies.last_common(metadata, spare_uuid) is not None


def with_notes(metadata: Metadata, missing: Collection[int]) -> Metadata:
    """The metadata with notes of which spares are missing, and until when they were there.

    They are committed before a target is used without a spare. If that spare carries a generation
    which nobody else has, the two histories then differ, whatever is done to the target.

    Args:
        metadata: the generation that counts.
        missing: indexes of the spares that are missing; there is no note of any other.
    """
    note = {"generation": metadata.generation, "digest": metadata.digest[:8].hex()}
    entries = []
    for index, entry in enumerate(metadata.config["spares"]):
        if entry and index in missing and not is_noted(metadata, index):
            entry = {**entry, copies.LAST_COMMON: note}
        elif entry and index not in missing:
            entry = {key: value for key, value in entry.items() if key != copies.LAST_COMMON}
        entries.append(entry)
    return replace(metadata, config={**metadata.config, "spares": entries})


def _check_not_removed(seen: Seen, paths: Sequence[str]) -> None:
    if seen.removed:
        raise Refused(
            "belongs to a target that was removed from this host while it was not there",
            device=", ".join(paths),
            remedy="wipe it with state: absent and this device among the spares, or remove the "
            f"file {seen.removed} if the target is to live again",
        )


def _check_missing(
    request: Request, seen: Seen, metadata: Metadata, missing: Sequence[int]
) -> None:
    """Refuse to go on without spares, unless the user allows it and nothing speaks against it.

    Each commit goes to all spares that can be reached, and one is enough for it. So whatever the
    spares carry that are there, a missing one can have been written last, also one that has no
    chunk by their generation. Nothing but the user's word and the host's own backup can tell.
    """
    if not missing:
        return
    named = ", ".join(_named_spare(metadata, index) for index in missing)
    if not request.degraded:
        raise Refused(
            f"would be activated without {named}",
            device=request.name,
            remedy="give all of the target's spares; or, if none of these was in use after the "
            "others, degraded: true, and the chunks on them give errors until they are back",
        )
    named_here = request.trusted.intersection(c.info.devno for c in seen.candidates)
    if not _agrees_with(seen.witness, metadata) and not named_here:
        newest = seen.witness.generation if seen.witness else 0
        raise Refused(
            f"carries generation {metadata.generation}, but this host committed generation "
            f"{newest} of the target, which does not precede it and must be on {named}",
            device=", ".join(c.info.path for c in seen.candidates),
            remedy="attach these spares, or restore the host's backup",
        )


def _agrees_with(witness: Metadata | None, metadata: Metadata) -> bool:
    """Whether a generation that the host has committed is not later than, or beside, another."""
    if witness is None:
        return True
    found = copies.is_ancestor(metadata, witness.generation, witness.digest)
    return found is not False


def _named_spare(metadata: Metadata, index: int) -> str:
    entry = metadata.config["spares"][index]
    chunks = count_of(len(chunks_on(metadata, index)), "remapped chunk")
    who = fingerprint.in_words(entry.get("model"), entry.get("serial"))
    return f"spare {index} ({who}, {entry['uuid']}) with {chunks}"


def _doubts(
    metadata: Metadata, missing: Sequence[int], witness: Metadata | None
) -> tuple[str, ...]:
    """What the user should know of spares that are missing, and of a backup that is newer."""
    found = []
    for index in missing:
        text = f"{_named_spare(metadata, index)} is missing; these chunks give errors"
        if not is_noted(metadata, index):
            text += (
                f", and if it was in use after the others, which are at generation "
                f"{metadata.generation}, chunks that were remapped then have older data now"
            )
        found.append(text)
    if witness and not missing and not _agrees_with(witness, metadata):
        found.append(
            f"generation {metadata.generation} is on all spares, but this host committed "
            f"generation {witness.generation}, which does not precede it; the disks were set back, "
            "or were used elsewhere"
        )
    return tuple(found)


def _mains_of(
    main: DeviceInfo, seen: Seen, metadata: Metadata, trusted: Collection[str]
) -> tuple[DeviceInfo, DeviceInfo | None]:
    """The target's main, and the one that is to replace it, of which ``main`` is one."""
    if not replacement.under_way(metadata):
        _check_main_identity(main, metadata, trusted)
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
    request: Request,
    main: DeviceInfo,
    seen: Seen,
    new_uuid: Callable[[], uuid.UUID],
    begun: frozenset[str] = frozenset(),
) -> Plan:
    """Plan a new target.

    ``begun`` are the paths of spares with metadata of an earlier try, which may be erased.
    """
    chunk_bytes = request.chunk_bytes or DEFAULT_CHUNK_BYTES
    if main.sectors < chunk_bytes // SECTOR_BYTES:
        raise Refused(
            "is smaller than a chunk",
            device=main.path,
            remedy="give a larger main or a smaller chunk_size",
        )
    _check_unknown(request, seen, main)
    spares = {index: c.info for index, c in enumerate(seen.candidates)}
    entries = []
    limits = asdict(pool.Thresholds())
    actions = [Action("remove_remains", name) for name in seen.remains]
    for index, candidate in enumerate(seen.candidates):
        info = candidate.info
        wipe = request.wipe or info.path in begun
        geometry = _check_spare(candidate, main, chunk_bytes, wipe)
        content = list(candidate.signatures)
        if content or not candidate.survey.empty:
            actions.append(Action("wipe_spare", info.path, {"content": content}))
        capacity = pool.capacity(geometry, index, ())
        actions.append(Action("format_spare", info.path, {"chunks": capacity.total}))
        entries.append(
            {
                "uuid": str(new_uuid()),
                "geometry": geometry.to_dict(),
                **replacement.recorded(info, hardware_only=True),
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
            "allocation": pool.FIRST_FIT,
            "thresholds": limits,
            **_policies(request, {}),
            "main": replacement.main_entry(main, main.sectors),
            "spares": entries,
        },
        health={},
        extents=(),
        lost=(),
    )
    actions += _activations(request.name, spares)
    plan = Plan(
        name=request.name,
        actions=tuple(actions),
        before=_nothing(),
        metadata=metadata,
        main=main,
        spares=spares,
    )
    if request.migrate_from is not None:
        plan = _with_migration(request, plan, main, seen)
    else:
        commit = Action("commit_metadata", request.name, {"generation": 1})
        plan = replace(plan, actions=(*actions, commit), after=_state(metadata, spares))
    shared = [i.path for i in spares.values() if i.disk == main.disk]
    warnings = [f"{path} is on the same disk as the main and fails with it" for path in shared]
    return replace(
        plan,
        actions=(*plan.actions, _creation(request.name, main)),
        warnings=(*warnings, *plan.warnings),
    )


def _with_migration(request: Request, plan: Plan, main: DeviceInfo, seen: Seen) -> Plan:
    """The plan of a new target that gets what a kernel target has remapped.

    Its first generation has all of that already. It becomes active only after another one, which
    says that all was compared.
    """
    old = seen.old_spare
    if old is None or plan.metadata is None:
        raise Refused(
            "no such device",
            device=request.migrate_from,
            remedy="give the spare of the kernel target",
        )
    _check_distinct(main, [*(c.info for c in seen.candidates), old.info])
    _check_free(old.info, seen.remains, "spare to be migrated from")
    choice = kernel_v4.choose(old.survey)
    _check_old_devices(main, old.info, choice.metadata)
    unit = request.migrate_unit
    if unit is not None and (unit < 1 or unit % SECTOR_BYTES):
        raise Refused(
            f"migrate_unit cannot be {unit} bytes",
            device=request.name,
            remedy="give a multiple of the main's logical block size",
        )
    taken = migration.resolve(
        choice.metadata,
        old.info.path,
        main.block_sectors,
        unit and unit // SECTOR_BYTES,
        request.migrate_pending,
    )
    metadata = replace(plan.metadata, config=migration.begun(plan.metadata.config, choice.metadata))
    chunks = taken.chunks(metadata.config["chunk_sectors"])
    geometries = {index: geometry_of(metadata, index) for index in plan.spares}
    placed = choose_places(metadata, chunks, geometries, ())
    lost = [(item.sector, item.count) for item in taken.lost]
    moves: dict[int, Extent | None] = {extent.logical: extent for extent in placed}
    after = with_moves(
        replace(metadata, generation=2, config=migration.verified(metadata.config)), moves, lost
    )
    details = {
        "remaps": len(choice.metadata.remaps),
        "sectors": len(taken.places),
        "chunks": len(chunks),
        "lost": [asdict(item) for item in taken.lost],
        "generation": 1,
    }
    return replace(
        plan,
        actions=(
            *plan.actions,
            Action("migrate_chunks", old.info.path, details),
            Action("verify_migration", old.info.path, {"generation": 2}),
        ),
        after=_state(after, plan.spares),
        metadata=metadata,
        warnings=choice.warnings + taken.warnings + pool_warnings(after, geometries),
        migration=taken,
        old_spare=old.info,
    )


def _check_old_devices(
    main: DeviceInfo, old: DeviceInfo, metadata: kernel_v4.KernelMetadata
) -> None:
    """Refuse devices that cannot be the kernel target's main and spare."""
    if main.sectors != metadata.main_sectors:
        raise Refused(
            f"has {main.sectors} sectors, but the main that {old.path} was a spare for had "
            f"{metadata.main_sectors}",
            device=main.path,
            remedy="give the kernel target's own main",
        )
    if old.sectors != metadata.spare_sectors:
        raise Refused(
            f"has {old.sectors} sectors, but its metadata is of a spare with "
            f"{metadata.spare_sectors}",
            device=old.path,
            remedy="give the kernel target's own spare, not a copy on another device",
        )
    if old.logical_block != main.logical_block:
        raise Refused(
            f"has logical blocks of {old.logical_block} bytes, but {main.path} of "
            f"{main.logical_block}",
            device=old.path,
            remedy="attach both as they were attached under the kernel target",
        )


def _check_unknown(request: Request, seen: Seen, main: DeviceInfo) -> None:
    """Refuse to begin anew where the host knows of remapped chunks that would be lost by it.

    Spares whose copies of the metadata were all overwritten look empty.
    """
    backup = seen.witness
    if not backup or not backup.extents or seen.removed or migration.unfinished(backup):
        return
    if request.wipe and request.discard_remaps:
        return
    known = [c.info.path for c in seen.candidates if member_index(c.info, backup) is not None]
    if not known and not replacement.is_surely(main, backup.config["main"]):
        return
    count = sum(extent.length for extent in backup.extents)
    raise Refused(
        f"belongs to target {backup.config.get('name')!r} by this host's backup, with "
        f"{count_of(count, 'remapped chunk')}, but none of the spares carries its metadata",
        device=", ".join(known) or main.path,
        remedy="give the target's own spares, restore their metadata from the backup, or give "
        "wipe: true with discard_remaps: true to lose those chunks and begin anew",
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


def _check_main_identity(
    main: DeviceInfo, metadata: Metadata, trusted: Collection[str] = ()
) -> None:
    recorded = metadata.config["main"]
    sectors = replacement.device_sectors(recorded)
    if main.sectors != sectors or main.logical_block != recorded["logical_block"]:
        raise Refused(
            f"has {main.sectors} sectors in blocks of {main.logical_block} bytes, but the "
            f"target's main has {sectors} in blocks of {recorded['logical_block']}",
            device=main.path,
            remedy="give the target's own main",
        )
    if main.devno not in trusted:
        check_identity(main, recorded, "main")


def _check_spare_identity(
    info: DeviceInfo, metadata: Metadata, index: int, trusted: Collection[str]
) -> None:
    if info.devno not in trusted:
        check_identity(info, metadata.config["spares"][index], f"spare {index}")
        return
    geometry = geometry_of(metadata, index)
    if info.sectors < geometry.spare_sectors or info.block_sectors != geometry.block_sectors:
        raise Refused(
            f"has {info.sectors} sectors in blocks of {info.logical_block} bytes, but spare "
            f"{index} was laid out for {geometry.spare_sectors} in blocks of "
            f"{geometry.block_sectors * SECTOR_BYTES}",
            device=info.path,
            remedy="give the spare itself, or a copy of it on a device that fits",
        )


def check_identity(info: DeviceInfo, recorded: Mapping[str, Any], role: str) -> None:
    """Refuse a device that is not the one that the metadata describes in that role."""
    known, mine = fingerprint.of_entry(recorded), fingerprint.of_info(info)
    for key, theirs, own in fingerprint.contradictions(known, mine):
        raise Refused(
            f"has {key} {own!r}, but the target's {role} has {theirs!r}",
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


def _plan_active(
    request: Request, target: ActiveTarget, seen: Seen, new_uuid: Callable[[], uuid.UUID]
) -> Plan:
    main = _present(seen.main, request.main)
    _check_unchangeable(request, target.metadata)
    _check_distinct(main, [c.info for c in seen.candidates])
    lost = {spare.index for spare in target.lost_spares}
    known = {_index_by_device(target, candidate) for candidate in seen.candidates}
    if request.degraded or replacement.under_way(target.metadata):
        # A lost spare cannot be named nor removed then, and the replacement must be able to go on.
        known |= lost
    change = SpareChange(
        added=tuple(
            candidate
            for candidate in seen.candidates
            if spare_index(target, candidate.info.path, candidate.info.devno) in (None, *lost)
        ),
        removed=tuple(index for index in spare_indexes(target) if index not in known),
        wipe=request.wipe,
        discard_remaps=request.discard_remaps,
        witness=seen.witness,
    )
    begun = change_spares(target, main, change, new_uuid)
    plan = _with_settings(request, target, seen, main, begun)
    replaced = _with_replacement(request, target, seen, main, plan)
    kinds = {action.kind for action in begun.actions}
    if replaced is not plan and kinds & {"add_spare", "remove_spare", "return_spare"}:
        raise Refused(
            "would get another main and other spares at once",
            device=request.name,
            remedy="change the one and then the other",
        )
    return replaced


def _with_replacement(
    request: Request, target: ActiveTarget, seen: Seen, main: DeviceInfo, plan: Plan
) -> Plan:
    """The plan that also brings the target to the main that is wanted."""
    old, new, metadata = target.main, target.replacement, plan.metadata
    if metadata is None or (new is None and (old is None or main.devno == old.devno)):
        return plan
    check_certain(target)
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
    lost = [spare.index for spare in target.lost_spares]
    action, after = _replacing(kind, target.name, metadata, old, new, lost)
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
    kind: str,
    name: str,
    metadata: Metadata,
    old: DeviceInfo | None,
    new: DeviceInfo,
    lost_spares: Collection[int] = (),
) -> tuple[Action, Metadata]:
    """The action that replaces main or undoes that, and the metadata when it is done.

    Chunks with lost sectors and those on lost spares stay where they are. Each copied piece is a
    generation of its own; their number depends on what is found on the way, so only one is counted.
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
        staying = {c for index in lost_spares for c in chunks_on(metadata, index)}.union(lossy)
        chunks = [c for e in metadata.extents for c in range(e.logical, e.logical + e.length)]
        left = extents.merge(extents.without(metadata.extents, set(chunks) - staying))
        after = replace(after, config=replacement.finished(config), extents=left)
    return Action(kind, name, details), after


def _with_settings(
    request: Request, target: ActiveTarget, seen: Seen, main: DeviceInfo, begun: Plan
) -> Plan:
    """The plan that also brings configuration and kernel to what the request says."""
    config = target.metadata.config
    changed: dict[str, Any] = {}
    if request.on_error is not None and request.on_error != config["on_error"]:
        changed["on_error"] = _wanted_errors(request, seen)
    if request.shim is not None and _wanted_shim(request, main) != shim_of(target.metadata):
        changed["shim"] = _wanted_shim(request, main)
    changed.update(_policies(request, config))
    plan = _with_config(begun, changed)
    after = {**config, **changed}
    actions = []
    other_shim = after.get("shim", NO_SHIM) != (RAID_SHIM if target.shim else NO_SHIM)
    if changed or other_shim:
        check_certain(target)
    if other_shim:
        actions.append(Action("remove_shim" if target.shim else "insert_shim", target.name))
    if after["on_error"] != target.errors:
        kind = "hold_errors" if target.path is None else "pass_errors"
        actions.append(Action(kind, target.name))
    elif target.path and not target.path.queueing:
        actions.append(Action("restore_hold", target.name))
    return replace(plan, actions=(*plan.actions, *actions))


def shim_of(metadata: Metadata) -> str:
    """The shim that a target is to have: ``none`` or ``raid``."""
    return str(metadata.config.get("shim", NO_SHIM))


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
    spares = target.spare_infos
    actions = _repairs(target.choice, spares, target.choice.missing)
    if target.frozen or target.map.suspended:
        actions.append(Action("thaw", target.name))
    elif not target.tidy:
        actions.append(Action("tidy", target.name))
    if target.path and (target.past_hold or target.certain and target.cut != target.unavailable):
        details = {"sectors": [list(item) for item in target.unavailable]}
        actions.append(Action("cut_off", target.name, details))
    shut = [spare.index for spare in target.spares if fails_in_map(target, spare.index)]
    if target.path is None and target.certain and not target.frozen and shut:
        actions.append(Action("serve_spares", target.name, {"indexes": shut}))
    # A spare that cannot be read may have a newer generation, of which they are spares.
    for stray in target.strays if not target.lost_spares else ():
        if stray.marked:
            actions.append(Action("wipe_metadata", stray.path))
        actions.append(_deactivation(target.name, stray.index, stray.path))
    state = _state(target.metadata, spares)
    return Plan(
        name=target.device.name,
        actions=tuple(actions),
        before=state,
        after=state,
        metadata=target.metadata,
        main=target.main,
        spares=spares,
        warnings=warnings_of(target.choice)
        + degradation(target)
        + pool_warnings(target.metadata, usable_geometries(target)),
    )


def fails_in_map(target: ActiveTarget, index: int) -> bool:
    """Whether the live map has errors where chunks on spare ``index`` are."""
    chunk_sectors = target.metadata.config["chunk_sectors"]
    starts = [chunk * chunk_sectors for chunk in chunks_on(target.metadata, index)]
    return bool(starts) and any(
        segment.target == "error" and segment.start <= starts[0] < segment.start + segment.length
        for segment in target.table
    )


def degradation(target: ActiveTarget) -> tuple[str, ...]:
    """A sentence for each spare that cannot be used."""
    metadata = target.metadata
    found = []
    for spare in target.lost_spares:
        entry = metadata.config["spares"][spare.index]
        chunks = count_of(len(chunks_on(metadata, spare.index)), "chunk")
        found.append(
            f"spare {spare.index} ({spare.path or 'gone'}, serial "
            f"{entry.get('serial') or 'unknown'}, {entry['uuid']}) {spare.reason}; "
            f"{chunks} of the target are on it and give errors"
        )
    return tuple(found)


def chunks_on(metadata: Metadata, index: int) -> list[int]:
    """Logical chunks that are on spare ``index``, ascending."""
    return [
        extent.logical + number
        for extent in metadata.extents
        if extent.spare == index
        for number in range(extent.length)
    ]


def sectors_on(metadata: Metadata, indexes: Collection[int]) -> tuple[tuple[int, int], ...]:
    """Ranges (start, count) of the target's sectors that are on these spares."""
    chunks = [chunk for index in indexes for chunk in chunks_on(metadata, index)]
    return tuple(sectors_of(metadata, sorted(chunks)))


def sectors_of(metadata: Metadata, chunks: Sequence[int]) -> list[tuple[int, int]]:
    """The sectors of chunks on the target, as (first, count), joined."""
    places = [where(metadata, chunk) for chunk in chunks]
    return list(extents.merge_sectors([(place["start"], place["count"]) for place in places]))


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
    gone: list[Action] = []
    unsure: list[Action] = []
    if target:
        if target.device.open_count:
            raise Refused(
                f"is in use, opened {count_of(target.device.open_count, 'time')}",
                device=f"/dev/mapper/{name}",
                remedy="unmount it and close what uses it",
            )
        metadata = target.metadata
        choice = target.choice
        spares = target.spare_infos
        own = {info.devno for info in spares.values()}
        lost = [spare for spare in target.lost_spares if spare.path]
        own |= {spare.below for spare in lost}
        away = [
            candidate
            for candidate in seen.candidates
            if candidate.survey.target_uuid == metadata.target_uuid
            and candidate.info.devno not in own
        ]
        for candidate in away:
            _check_unused(candidate.info, (), "spare to be wiped")
            check_not_reused(candidate)
        unsure = [
            *(
                Action("wipe_metadata", c.info.path, {"spare": str(c.survey.spare_uuid)})
                for c in away
            ),
            *(Action("wipe_metadata", spare.path, {"lost": True}) for spare in lost),
        ]
        gone = [
            *(_deactivation(name, lost.index, lost.path) for lost in target.lost_spares),
            *(_deactivation(name, stray.index, stray.path) for stray in target.strays),
        ]
    else:
        marked = {c.info.path: c for c in seen.candidates if not c.survey.empty}
        if not marked:
            actions = tuple(Action("remove_remains", left) for left in seen.remains)
            return Plan(name=name, actions=actions, before=_nothing(), after=_nothing())
        choice = copies.choose({path: c.survey for path, c in marked.items()})
        metadata = choice.metadata
        if metadata.config.get("name") != name:
            raise Refused(
                f"is a spare of target {metadata.config.get('name')!r}",
                device=", ".join(marked),
                remedy="give that name",
            )
        for candidate in marked.values():
            _check_unused(candidate.info, seen.remains, "spare to be wiped")
            check_not_reused(candidate)
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
    # What is older goes first, so that what is left is the newest generation or nothing.
    older = choice.stale | choice.retired
    paths = sorted((info.path for info in spares.values()), key=lambda path: path not in older)
    wipes = [
        Action("note_removal", name),
        *unsure,
        *(Action("wipe_metadata", path) for path in paths),
    ]
    if target:
        actions = (
            Action("remove_target", f"/dev/mapper/{name}"),
            *wipes,
            *(_deactivation(name, index, info.path) for index, info in spares.items()),
            *gone,
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
        warnings=()
        if seen.removed
        else _left_behind(metadata, target, unsure, list(choice.spares)),
    )


def _left_behind(
    metadata: Metadata,
    target: ActiveTarget | None,
    wiped: Sequence[Action],
    reached: Sequence[int],
) -> tuple[str, ...]:
    """What the user should know of spares whose copies stay, because they are not there."""
    paths = {action.device for action in wiped}
    found = set(reached)
    if target:
        found |= {s.index for s in target.lost_spares if s.path in paths}
    return tuple(
        f"{_named_spare(metadata, index)} is not there and keeps its metadata; wipe it before it "
        "is used again, by state: absent with it among the spares"
        for index in sorted(configured(metadata) - found)
        if not any(
            action.details.get("spare") == metadata.config["spares"][index]["uuid"]
            for action in wiped
        )
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
    chunks = [
        chunk
        for chunk in _chunks_asked(target, ranges, expected_generation)
        if extents.find(metadata.extents, chunk) is None
    ]
    try:
        placed = allocate(metadata, chunks, usable_geometries(target), metadata.extents, avoid)
    except Refused as error:
        raise Refused(error.message, device=target.name, remedy=error.remedy) from error
    upkeep = plan_upkeep(target)
    plan = remap_actions(target, placed, ())
    return replace(
        plan,
        actions=upkeep.actions + plan.actions,
        warnings=warnings_of(target.choice) + degradation(target) + plan.warnings,
    )


def plan_return(
    target: ActiveTarget,
    ranges: Sequence[tuple[int, int]],
    expected_generation: int | None = None,
    unreadable: Sequence[tuple[int, int]] = (),
) -> Plan:
    """Plan the return to main of every chunk that ``ranges`` touch and that is on a spare.

    Args:
        target: the active target.
        ranges: pairs of first sector and count on the target.
        expected_generation: refuse unless the metadata is at this generation.
        unreadable: sectors of the target that cannot be read now, sorted and apart; their chunks
            stay where they are.

    Raises:
        StaleGeneration: the metadata is at another generation.
        Refused: a range is not on the target or cuts a block, or main is not known.
    """
    chunk_sectors = target.metadata.config["chunk_sectors"]
    staying = {start // chunk_sectors for start, _count in unreadable}
    chunks = [
        chunk
        for chunk in _chunks_asked(target, ranges, expected_generation)
        if extents.find(target.metadata.extents, chunk) and chunk not in staying
    ]
    if chunks:
        _check_not_replacing(target, "no chunk can return to it")
    if chunks and target.main is None:
        raise Refused(
            "has every chunk on spares, and its main is not known",
            device=target.name,
            remedy="remove the target from use and activate it again with the target module",
        )
    upkeep = plan_upkeep(target)
    plan = return_actions(target, chunks)
    return replace(plan, actions=upkeep.actions + plan.actions, warnings=upkeep.warnings)


def return_actions(target: ActiveTarget, chunks: Sequence[int]) -> Plan:
    """The plan that returns chunks from spares to main, without any upkeep."""
    metadata = target.metadata
    actions = []
    for chunk in chunks:
        place = extents.place_of(metadata.extents, chunk)
        if place is None:
            raise AssertionError("only chunks on spares return")
        details = {**where(metadata, chunk), "spare": place.spare, "spare_chunk": place.physical}
        actions.append(Action("return_chunk", target.name, details))
    return _moving(target, actions, dict.fromkeys(chunks), ())


def _chunks_asked(
    target: ActiveTarget, ranges: Sequence[tuple[int, int]], expected_generation: int | None
) -> list[int]:
    metadata, name = target.metadata, target.name
    check_certain(target)
    if expected_generation is not None and metadata.generation != expected_generation:
        raise StaleGeneration(
            f"is at generation {metadata.generation}, not {expected_generation}",
            device=name,
            remedy="look at the target again and decide anew",
        )
    _check_whole_blocks(name, ranges, metadata.config["block_sectors"])
    try:
        return extents.chunks_of(
            ranges, metadata.config["chunk_sectors"], metadata.config["main"]["sectors"]
        )
    except Refused as error:
        raise Refused(error.message, device=name, remedy=error.remedy) from error


def where(metadata: Metadata, chunk: int) -> dict[str, int]:
    """The chunk's number, first sector and sectors; the target's last one may be short."""
    start = chunk * metadata.config["chunk_sectors"]
    left = metadata.config["main"]["sectors"] - start
    return {"chunk": chunk, "start": start, "count": min(metadata.config["chunk_sectors"], left)}


def allocate(
    metadata: Metadata,
    chunks: Sequence[int],
    geometries: Mapping[int, Geometry],
    taken: Sequence[Extent],
    avoid: Sequence[tuple[int, int]],
) -> list[Extent]:
    """Choose places for chunks as the target's policy and the health of its spares have it.

    Args:
        metadata: the target's metadata, for policy, scores and bad places.
        chunks: logical chunks, ascending.
        geometries: the usable spares, by index.
        taken: the extents whose places are in use.
        avoid: further pairs of spare index and chunk that must not be used.

    Raises:
        Refused: the spares are full.
    """
    return pool.allocate(
        chunks,
        geometries,
        taken,
        pool.bad_places_of(metadata).union(avoid),
        pool.policy_of(metadata.config),
        pool.scores_of(metadata),
    )


def remap_actions(
    target: ActiveTarget, placed: Sequence[Extent], lost: Sequence[tuple[int, int]]
) -> Plan:
    """The plan that remaps chunks to given places, without any upkeep.

    Args:
        target: the active target.
        placed: the new extents, of one chunk each.
        lost: pairs of first sector and count that are lost by it.
    """
    actions = []
    for extent in placed:
        details = {
            **where(target.metadata, extent.logical),
            "spare": extent.spare,
            "spare_chunk": extent.physical,
        }
        actions.append(Action("remap_chunk", target.name, details))
    moves: dict[int, Extent | None] = {extent.logical: extent for extent in placed}
    return replace(_moving(target, actions, moves, lost), placed=tuple(placed))


def _moving(
    target: ActiveTarget,
    actions: Sequence[Action],
    moves: Mapping[int, Extent | None],
    lost: Sequence[tuple[int, int]],
) -> Plan:
    """The plan with these actions, which move chunks, and one commit."""
    metadata = after = target.metadata
    spares = target.spare_infos
    if moves:
        after = with_moves(replace(metadata, generation=metadata.generation + 1), moves, lost)
        commit = Action("commit_metadata", target.name, {"generation": after.generation})
        actions = [*actions, commit]
    return Plan(
        name=target.name,
        actions=tuple(actions),
        before=_state(metadata, spares),
        after=_state(after, spares),
        metadata=metadata,
        main=target.main,
        spares=spares,
        warnings=pool_warnings(after, usable_geometries(target)),
    )


def with_moves(
    metadata: Metadata,
    moves: Mapping[int, Extent | None],
    lost: Sequence[tuple[int, int]],
) -> Metadata:
    """The metadata after chunks have moved.

    Args:
        metadata: before.
        moves: the new place of each chunk, an extent of this one chunk, or None on main.
        lost: all lost sectors of these chunks, as pairs of first sector and count.
    """
    chunk_sectors = metadata.config["chunk_sectors"]
    known = subtract_ranges(
        [(item.sector, item.count) for item in metadata.lost],
        [(chunk * chunk_sectors, chunk_sectors) for chunk in moves],
    )
    placed = [place for place in moves.values() if place]
    return replace(
        metadata,
        extents=extents.merge([*extents.without(metadata.extents, moves), *placed]),
        lost=tuple(LostRange(*item) for item in extents.merge_sectors([*known, *lost])),
    )


def choose_places(
    metadata: Metadata,
    chunks: Sequence[int],
    usable: Mapping[int, Geometry],
    taken: Sequence[Extent],
    avoid: Sequence[tuple[int, int]] = (),
    prefer: Collection[int] = (),
) -> list[Extent]:
    """Choose a place for each chunk, on the preferred spares as long as they have room.

    Args:
        metadata: the target's metadata, for policy, scores and bad places.
        chunks: logical chunks, ascending.
        usable: geometries of the spares that may be used, by index.
        taken: the places in use.
        avoid: pairs of spare index and chunk that must not be used.
        prefer: indexes of spares.

    Raises:
        Refused: the spares have too few free chunks.
    """
    first = {index: geometry for index, geometry in usable.items() if index in prefer}
    known = pool.capacities(first, taken, pool.bad_places_of(metadata))
    room = pool.whole(known.values()).free - sum(index in first for index, _chunk in avoid)
    split = max(0, min(room, len(chunks))) if first else 0
    placed = allocate(metadata, chunks[:split], first, taken, avoid) if split else []
    if split == len(chunks):
        return placed
    return placed + allocate(metadata, chunks[split:], usable, [*taken, *placed], avoid)


def _check_whole_blocks(name: str, ranges: Sequence[tuple[int, int]], block_sectors: int) -> None:
    for start, count in ranges:
        if start % block_sectors or count % block_sectors:
            raise Refused(
                f"sectors {start}+{count} are not whole blocks of "
                f"{block_sectors * SECTOR_BYTES} bytes",
                device=name,
                remedy=f"give multiples of {block_sectors} as first sector and count",
            )


def usable_geometries(target: Holder) -> dict[int, Geometry]:
    """Geometries of the target's spares that can be used, by index."""
    return {index: geometry_of(target.metadata, index) for index in target.spare_infos}


def _check_not_replacing(target: ActiveTarget, consequence: str) -> None:
    if replacement.under_way(target.metadata):
        raise Refused(
            f"its main is being replaced, and until that has ended {consequence}",
            device=target.name,
            remedy="let the replacement go on to its end, or back, and run this again",
        )


def check_certain(target: ActiveTarget) -> None:
    """Refuse to build on metadata that is older than what the kernel has.

    Raises:
        Refused: a spare that cannot be read has a newer generation.
    """
    if not target.certain:
        lost = ", ".join(str(spare.index) for spare in target.lost_spares)
        raise Refused(
            f"has another table than generation {target.metadata.generation} says, so a newer one "
            f"is on spares that cannot be read ({lost})",
            device=target.name,
            remedy="attach these spares again, or copy the data off",
        )


def _repairs(
    choice: copies.Choice, spares: Mapping[int, DeviceInfo], blank: Collection[int] = ()
) -> list[Action]:
    # A copy that cannot be read may never be writable again, so it alone is no reason to write:
    # every commit tries it anyway.
    needing = {
        path
        for path, faults in choice.damaged.items()
        if any(fault.diagnosis is not Diagnosis.UNREADABLE for fault in faults)
    } | choice.stale
    return [
        Action("repair_metadata", info.path)
        for index, info in spares.items()
        if info.path in needing or index in blank
    ]


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


def _activations(name: str, spares: Mapping[int, DeviceInfo]) -> list[Action]:
    return [
        Action("activate_spare", info.path, {"name": spare_name(name, index)})
        for index, info in spares.items()
    ]


def _deactivation(name: str, index: int, path: str) -> Action:
    return Action("deactivate_spare", path, {"name": spare_name(name, index)})


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


# Spares of an active target

# So many chunks leave a spare in one freeze: what waits for them must not wait for all.
DRAIN_CHUNKS = 64


@dataclass(frozen=True)
class SpareRequest:
    """A change of an active target's spares that the user wants.

    Args:
        name: the target.
        device: path of the spare; for one that is lost, its UUID will do.
        replaces: path or UUID of the spare that it stands in for.
        wipe: the new spare may hold something, which is erased, but for remapped chunks.
        discard_remaps: with ``wipe``, remapped chunks too; and what is on a spare that cannot be
            read may be given up.
    """

    name: str
    device: str
    replaces: str | None = None
    wipe: bool = False
    discard_remaps: bool = False


@dataclass(frozen=True)
class SpareSeen:
    """What was observed for a change of spares.

    Args:
        target: the active target.
        candidate: the device that is to be a spare, also if it is a lost one; None where it does
            not exist, or is to go.
        devnos: device numbers of the paths that were named, where they exist.
        witness: the newest of the host's backups of the target.
    """

    target: ActiveTarget
    candidate: Candidate | None
    devnos: Mapping[str, str] = field(default_factory=dict)
    witness: Metadata | None = None


@dataclass(frozen=True)
class SpareChange:
    """Spares that come and go: devices, and indexes.

    ``wipe`` and ``discard_remaps`` are those of `SpareRequest`, ``witness`` is that of `Seen`.
    Devices of lost spares that are there again may be among those that come.
    """

    added: tuple[Candidate, ...] = ()
    removed: tuple[int, ...] = ()
    wipe: bool = False
    discard_remaps: bool = False
    witness: Metadata | None = None


def spare_indexes(target: ActiveTarget) -> list[int]:
    """Indexes of all configured spares, lost ones too."""
    return sorted(configured(target.metadata))


def configured(metadata: Metadata) -> set[int]:
    """Positions of all spares in the configuration."""
    return {index for index, entry in enumerate(metadata.config["spares"]) if entry}


def spare_index(target: ActiveTarget, text: str, devno: str) -> int | None:
    """The index of a spare by its UUID, or by the device number of its path."""
    for spare in target.spares:
        if devno and devno == spare.candidate.info.devno:
            return spare.index
    for lost in target.lost_spares:
        if devno and devno == lost.below:
            return lost.index
    for index in spare_indexes(target):
        if target.metadata.config["spares"][index]["uuid"] == text.lower():
            return index
    return None


def plan_spare_present(
    request: SpareRequest, seen: SpareSeen, new_uuid: Callable[[], uuid.UUID] = uuid.uuid4
) -> Plan:
    """Plan that a device is a spare of an active target, and that another one is none any more.

    Raises:
        Refused: it cannot be one, or the other's chunks have no room; nothing was written.
    """
    target = seen.target
    index = spare_index(target, request.device, seen.devnos.get(request.device, ""))
    added: tuple[Candidate, ...] = ()
    if seen.candidate:
        added = (seen.candidate,)
        index = _index_by_device(target, seen.candidate)
    elif index is None:
        raise Refused(
            "no such device", device=request.device, remedy="name an existing block device"
        )
    removed: tuple[int, ...] = ()
    if request.replaces is not None:
        old = spare_index(target, request.replaces, seen.devnos.get(request.replaces, ""))
        if old is None and index is None:
            raise Refused(
                f"is no spare of target {request.name!r}, so nothing can replace it",
                device=request.replaces,
                remedy=f"give one of {_listed(target)}, or leave out replaces",
            )
        if old is not None and old == index:
            raise Refused("cannot replace itself", device=request.device, remedy="give another")
        removed = () if old is None else (old,)
    change = SpareChange(added, removed, request.wipe, request.discard_remaps, seen.witness)
    return change_spares(target, target.main, change, new_uuid)


def plan_spare_absent(request: SpareRequest, seen: SpareSeen) -> Plan:
    """Plan that a device is no spare of an active target.

    Raises:
        Refused: its chunks have no room on others, or cannot be read; nothing was written.
    """
    target = seen.target
    index = spare_index(target, request.device, seen.devnos.get(request.device, ""))
    removed = () if index is None else (index,)
    change = SpareChange((), removed, request.wipe, request.discard_remaps)
    return change_spares(target, target.main, change, uuid.uuid4)


def _index_by_device(target: ActiveTarget, candidate: Candidate) -> int | None:
    """The index of the spare that a device is; also of a lost one by the metadata on it."""
    index = spare_index(target, candidate.info.path, candidate.info.devno)
    if index is None and candidate.survey.target_uuid == target.metadata.target_uuid:
        for lost in target.lost_spares:
            if _is_spare(candidate, target.metadata, lost.index):
                return lost.index
    return index


def _is_spare(candidate: Candidate, metadata: Metadata, index: int) -> bool:
    entry = metadata.config["spares"][index]
    return candidate.survey.spare_uuid == uuid.UUID(entry["uuid"])


def _listed(target: ActiveTarget) -> str:
    paths = [spare.candidate.info.path for spare in target.spares]
    uuids = [target.metadata.config["spares"][lost.index]["uuid"] for lost in target.lost_spares]
    return ", ".join([*paths, *uuids])


def change_spares(
    target: ActiveTarget,
    main: DeviceInfo | None,
    change: SpareChange,
    new_uuid: Callable[[], uuid.UUID],
) -> Plan:
    """Plan that spares come and go: first all that come, then each that goes is emptied.

    Lost spares that are there again come first. Chunks of spares that go move to those that come,
    as long as these have room.

    Raises:
        Refused: a device cannot be a spare, or the chunks have no room; nothing was written.
    """
    upkeep = plan_upkeep(target)
    returns, warnings, added = _returns(target, change)
    if returns:
        upkeep, target = _with_returns(upkeep, target, returns)
    change = replace(change, added=added)
    upkeep = replace(upkeep, warnings=(*upkeep.warnings, *warnings))
    if not change.added and not change.removed:
        return upkeep
    check_certain(target)
    if change.removed:
        _check_not_replacing(target, "no spare can be removed")
    if change.discard_remaps:
        # What they may know of the chunks on the move is given up with them.
        lost = sorted({spare.index for spare in target.lost_spares}.intersection(change.removed))
        upkeep = replace(
            upkeep,
            actions=tuple(
                replace(action, details={"without": lost})
                if action.kind == "thaw" and lost
                else action
                for action in upkeep.actions
            ),
        )
    additions, metadata, spares = _additions(target, main, change, new_uuid)
    after = replace(metadata, generation=target.metadata.generation + len(change.added))
    fresh = frozenset(set(spares) - {spare.index for spare in target.spares})
    _check_room(target, change, metadata, spares)
    removals: list[Action] = []
    for index in change.removed:
        moved, after = _emptying(target, change, index, fresh, spares, after)
        removals += moved
        entries = list(after.config["spares"])
        entries[index] = None
        after = replace(
            after, generation=after.generation + 1, config={**after.config, "spares": entries}
        )
        path = _path_of(target, index)
        details = {"index": index, "generation": after.generation}
        removals.append(Action("remove_spare", path, details))
        if index in spares:
            removals.append(Action("wipe_metadata", path))
        removals.append(_deactivation(target.name, index, path))
    left = {index: info for index, info in spares.items() if index not in change.removed}
    return replace(
        upkeep,
        actions=(*upkeep.actions, *additions, *removals),
        after=_state(after, left),
        metadata=metadata,
        spares=spares,
        final=after,
    )


def _returns(
    target: ActiveTarget, change: SpareChange
) -> tuple[dict[int, Candidate], tuple[str, ...], tuple[Candidate, ...]]:
    """Lost spares that are there again by index, why others cannot return, and the new devices.

    What is on a spare that was away is current for all chunks that the chosen generation has on
    it: nothing else took their writes, and no chunk gets the place of another meanwhile.

    Raises:
        Refused: it carries what does not belong to the target's history, or is a clone.
    """
    returns: dict[int, Candidate] = {}
    warnings: list[str] = []
    added = []
    used = {linear_target(s)[0] for s in target.table if s.target == "linear"}
    lost_spares = {lost.index: lost for lost in target.lost_spares}
    for candidate in change.added:
        index = _index_by_device(target, candidate)
        if index is None:
            added.append(candidate)
            continue
        lost = lost_spares[index]
        if not _is_spare(candidate, target.metadata, index):
            # Its copies cannot be read.
            continue
        if lost.devno and lost.devno in used:
            warnings.append(
                f"{candidate.info.path}: spare {index} can be read again, but a flush must fail "
                "first, because it may have lost writes that were not flushed; flush the target, "
                "for example by sync, or with on_error: fail stop what uses it and activate it "
                "again"
            )
            continue
        _check_return(target, candidate, index)
        if index in returns:
            raise Refused(
                f"and {returns[index].info.path} are both spare {index}: one is a clone",
                device=candidate.info.path,
                remedy="leave the clone out",
            )
        returns[index] = candidate
    if returns:
        check_certain(target)
        _check_history(target, change, returns)
    return returns, tuple(warnings), tuple(added)


def _check_return(target: ActiveTarget, candidate: Candidate, index: int) -> None:
    info = candidate.info
    check_identity(info, target.metadata.config["spares"][index], f"spare {index}")
    check_not_reused(candidate)
    _check_unused(info, spare_part_names(target.name, index), "spare")
    sectors = geometry_of(target.metadata, index).spare_sectors
    if info.sectors < sectors:
        raise Refused(
            f"has {info.sectors} sectors, but was laid out as spare {index} for {sectors}",
            device=info.path,
            remedy="restore its size",
        )
    for one in filter(None, (target.main, target.replacement)):
        _check_distinct(one, [*(s.candidate.info for s in target.spares), info])


def _check_history(
    target: ActiveTarget, change: SpareChange, returns: Mapping[int, Candidate]
) -> None:
    """Refuse spares that carry what the running target does not build on."""
    metadata = target.metadata
    surveys = {s.candidate.info.path: s.candidate.survey for s in target.spares}
    surveys.update((c.info.path, c.survey) for c in returns.values())
    choice = copies.choose(surveys)
    if choice.metadata.digest != metadata.digest:
        raise Refused(
            f"carries generation {choice.metadata.generation}, but the target runs with "
            f"{metadata.generation}, and what was written since belongs to that",
            device=choice.source,
            remedy="decide which to keep: leave this spare out, or copy the data off first",
        )
    others = len(target.lost_spares) > len(returns)
    if others and not _agrees_with(change.witness, metadata):
        raise Refused(
            f"runs with generation {metadata.generation}, but this host has committed another one "
            "since, which must be on a spare that is still missing",
            device=target.name,
            remedy="attach all of its spares",
        )


def _with_returns(
    upkeep: Plan, target: ActiveTarget, returns: Mapping[int, Candidate]
) -> tuple[Plan, ActiveTarget]:
    """The plan in which lost spares return, and the target as it is then."""
    metadata = target.metadata
    actions: list[Action] = []
    lost = {spare.index for spare in target.lost_spares} - set(returns)
    for index, candidate in sorted(returns.items()):
        details = {
            "index": index,
            "chunks": len(chunks_on(metadata, index)),
            "generation": metadata.generation + len(actions) + 1,
        }
        actions.append(Action("return_spare", candidate.info.path, details))
    back = [ActiveSpare(index, "", candidate) for index, candidate in returns.items()]
    after = with_notes(metadata, [i for i in lost if is_noted(metadata, i)])
    after = replace(after, generation=metadata.generation + len(actions))
    target = replace(
        target,
        spares=tuple(sorted([*target.spares, *back], key=lambda spare: spare.index)),
        lost_spares=tuple(s for s in target.lost_spares if s.index in lost),
        choice=replace(target.choice, metadata=after),
    )
    plan = replace(
        upkeep,
        actions=(*upkeep.actions, *actions),
        after=_state(after, target.spare_infos),
        metadata=after,
        spares=target.spare_infos,
        warnings=(
            *warnings_of(target.choice),
            *degradation(target),
            *pool_warnings(after, usable_geometries(target)),
        ),
    )
    return plan, target


def _additions(
    target: ActiveTarget,
    main: DeviceInfo | None,
    change: SpareChange,
    new_uuid: Callable[[], uuid.UUID],
) -> tuple[list[Action], Metadata, dict[int, DeviceInfo]]:
    """Actions that add spares, and the metadata and the devices with all old and new ones."""
    metadata, name = target.metadata, target.name
    entries = list(metadata.config["spares"])
    spares = target.spare_infos
    _check_number(target, change)
    prepared: list[Action] = []
    activated: dict[int, DeviceInfo] = {}
    committed: list[Action] = []
    for candidate in change.added:
        info = candidate.info
        geometry = _check_addition(target, main, candidate, change)
        index = _free_index(target, entries)
        entry = {
            "uuid": str(new_uuid()),
            "geometry": geometry.to_dict(),
            **replacement.recorded(info, hardware_only=True),
        }
        entries[index : index + 1] = [entry]
        content = list(candidate.signatures)
        if content or not candidate.survey.empty:
            prepared.append(Action("wipe_spare", info.path, {"content": content}))
        chunks = pool.capacity(geometry, index, ()).total
        prepared.append(Action("format_spare", info.path, {"chunks": chunks}))
        activated[index] = info
        generation = metadata.generation + len(committed) + 1
        details = {"index": index, "generation": generation}
        committed.append(Action("add_spare", info.path, details))
    whole = replace(metadata, config={**metadata.config, "spares": entries})
    actions = [*prepared, *_activations(name, activated), *committed]
    return actions, whole, {**spares, **activated}


def _free_index(target: ActiveTarget, entries: Sequence[Any]) -> int:
    # While a spare is lost, nobody knows that strays are none of the target's.
    taken = {stray.index for stray in target.strays} if target.lost_spares else set()
    for index, entry in enumerate(entries):
        if entry is None and index not in taken:
            return index
    if len(entries) == MAX_SPARES or len(entries) in taken:
        raise Refused(
            "has devices of a spare in the kernel that may be one, as a lost spare may know",
            device=target.name,
            remedy="attach the lost spare again, or remove it first",
        )
    return len(entries)


def _check_number(target: ActiveTarget, change: SpareChange) -> None:
    number = len(spare_indexes(target)) + len(change.added)
    if number > MAX_SPARES:
        raise Refused(
            f"would have {number} spares",
            device=target.name,
            remedy=f"remove one first; a target has 1 to {MAX_SPARES}, also while one is replaced",
        )


def _check_addition(
    target: ActiveTarget, main: DeviceInfo | None, candidate: Candidate, change: SpareChange
) -> Geometry:
    """The geometry of a new spare, after all checks that a new target's spares get too."""
    info, metadata = candidate.info, target.metadata
    if main is None:
        raise Refused(
            "has every chunk on spares and its main is not known, which a new spare must fit",
            device=target.name,
            remedy="activate it again with the target module first",
        )
    for one in filter(None, (main, target.replacement)):
        members = [*(spare.candidate for spare in target.spares), *change.added]
        _check_distinct(one, [member.info for member in members])
    strays = {
        part
        for stray in target.strays
        for part in spare_part_names(target.name, stray.index)
        if stray.below == info.devno
    }
    _check_unused(info, sorted(strays), "spare")
    seen = candidate.survey
    own = seen.target_uuid == metadata.target_uuid
    indexes = configured(metadata)
    if own and any(
        str(seen.spare_uuid) == metadata.config["spares"][index]["uuid"] for index in indexes
    ):
        raise Refused(
            "is a spare of this target, or a clone of one",
            device=info.path,
            remedy="give another device",
        )
    was = member_index(info, metadata)
    left = [lost.index for lost in target.lost_spares if lost.index == was]
    given_up = change.wipe and change.discard_remaps
    if left and chunks_on(metadata, left[0]) and not given_up:
        raise Refused(
            f"is {_named_spare(metadata, left[0])}, and its metadata was overwritten",
            device=info.path,
            remedy="stop the target and restore the metadata from the host's backup; or give "
            "wipe: true with discard_remaps: true to lose those chunks",
        )
    count = max((sum(e.length for e in c.metadata.extents) for c in seen.copies), default=0)
    if change.wipe and not change.discard_remaps and count and not own:
        raise Refused(
            f"carries another target's metadata, and {count_of(count, 'remapped chunk')} of it can "
            "be on it only",
            device=info.path,
            remedy="give another device, or discard_remaps: true to lose those chunks",
        )
    return _check_spare(
        candidate,
        main,
        metadata.config["chunk_sectors"] * SECTOR_BYTES,
        change.wipe or bool(strays),
    )


def _check_room(
    target: ActiveTarget,
    change: SpareChange,
    metadata: Metadata,
    spares: Mapping[int, DeviceInfo],
) -> None:
    """Refuse what cannot be done to its end, before anything is moved."""
    if not change.removed:
        return
    staying = [index for index in spares if index not in change.removed]
    going = ", ".join(_path_of(target, index) for index in change.removed)
    if not staying:
        raise Refused(
            f"would leave target {target.name!r} without a spare that works",
            device=going,
            remedy="add another spare first, or give one that replaces it; or remove the target",
        )
    free = sum(
        pool.capacity(geometry_of(metadata, index), index, metadata.extents).free
        for index in staying
    )
    needed = sum(len(chunks_on(metadata, index)) for index in change.removed)
    if needed > free:
        raise Refused(
            f"has {count_of(needed, 'chunk')}, and the other spares have "
            f"{count_of(free, 'free chunk')}",
            device=going,
            remedy="add a spare first, or give a larger one that replaces it",
        )


def _emptying(
    target: ActiveTarget,
    change: SpareChange,
    index: int,
    fresh: frozenset[int],
    spares: Mapping[int, DeviceInfo],
    metadata: Metadata,
) -> tuple[list[Action], Metadata]:
    """Actions that take all chunks off a spare, and the metadata then."""
    chunks = chunks_on(metadata, index)
    if not chunks:
        return [], metadata
    lost: list[tuple[int, int]] = []
    kind, path = "drain_spare", _path_of(target, index)
    if index not in spares:
        kind, lost = "discard_chunks", sectors_of(metadata, chunks)
        if not change.discard_remaps:
            raise Refused(
                f"cannot be used, and {count_of(len(chunks), 'chunk')} (sectors "
                f"{_ranges_text(lost)}) are on it only",
                device=path,
                remedy="attach it again, or give discard_remaps: true to lose these sectors",
            )
    usable = {
        number: geometry_of(metadata, number) for number in spares if number not in change.removed
    }
    places = choose_places(metadata, chunks, usable, metadata.extents, (), fresh)
    details = {
        "index": index,
        "chunks": len(chunks),
        "avoid": list(change.removed),
        "prefer": sorted(fresh),
        "lost": [{"start": start, "count": count} for start, count in lost],
    }
    generation = metadata.generation + -(-len(chunks) // DRAIN_CHUNKS)
    still = lost or [(item.sector, item.count) for item in metadata.lost]
    in_chunks = sectors_of(metadata, chunks)
    cut = still if lost else _inside(still, in_chunks)
    moves: dict[int, Extent | None] = {place.logical: place for place in places}
    after = with_moves(replace(metadata, generation=generation), moves, cut)
    return [Action(kind, path, details)], after


def _inside(
    ranges: Sequence[tuple[int, int]], windows: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    return subtract_ranges(ranges, subtract_ranges(ranges, windows))


def _ranges_text(ranges: Sequence[tuple[int, int]], shown: int = 8) -> str:
    text = ", ".join(f"{start}+{count}" for start, count in ranges[:shown])
    more = len(ranges) - shown
    return f"{text} and {count_of(more, 'more range')}" if more > 0 else text


def _path_of(target: ActiveTarget, index: int) -> str:
    """The path of a spare, or its UUID where it has none."""
    for spare in target.spares:
        if spare.index == index:
            return spare.candidate.info.path
    for lost in target.lost_spares:
        if lost.index == index and lost.path:
            return lost.path
    return str(target.metadata.config["spares"][index]["uuid"])


# Restoring metadata from the host's backup


@dataclass(frozen=True)
class RestoreRequest:
    """The host's backup of an inactive target is to be written to devices again.

    Args:
        name: the target.
        main: path of main.
        spares: its spares that are left, with or without metadata; and empty devices, which become
            new spares of it.
        degraded: spares of it may be missing.
        wipe: new spares may hold something, which is erased, but for copies of metadata.
    """

    name: str
    main: str
    spares: tuple[str, ...]
    degraded: bool = False
    wipe: bool = False


@dataclass(frozen=True)
class RestoreSeen:
    """What was observed for a restoration.

    Args:
        backup: the generation that is to be restored.
        active: whether a target of that name, or that target, is active.
        remains: mapped devices that an interrupted command of ours left under that name.
        taken: mapped devices of others that have a name which the target needs.
        main: the device that is main.
        candidates: the devices that were named as spares.
        tagged: paths of candidates that have dm-integrity's superblock where the backup says.
        removed: path of the host's note that the target was removed on purpose; else empty.
    """

    backup: Metadata
    active: bool
    remains: tuple[str, ...]
    taken: tuple[str, ...]
    main: DeviceInfo
    candidates: tuple[Candidate, ...]
    tagged: frozenset[str] = frozenset()
    removed: str = ""


def member_index(info: DeviceInfo, metadata: Metadata) -> int | None:
    """The spare that a device surely is by its hardware alone, whatever is on it.

    Size and every known one of serial number, WWN and model agree, and the first or the second is
    known, and no other spare fits as well.
    """
    fitting = []
    for index in sorted(configured(metadata)):
        entry = metadata.config["spares"][index]
        mine = replacement.identity_of(info)
        same = entry["geometry"]["spare_sectors"] == info.sectors and not any(
            mine[key] != entry[key] for key in mine if mine[key] and entry.get(key)
        )
        if same and any(mine[key] and mine[key] == entry.get(key) for key in ("serial", "wwn")):
            fitting.append(index)
    return fitting[0] if len(fitting) == 1 else None


def index_of_uuid(metadata: Metadata, spare_uuid: uuid.UUID) -> int | None:
    """The position of a spare in the configuration, by its UUID."""
    for index in configured(metadata):
        if uuid.UUID(metadata.config["spares"][index]["uuid"]) == spare_uuid:
            return index
    return None


def plan_restore(
    request: RestoreRequest, seen: RestoreSeen, new_uuid: Callable[[], uuid.UUID] = uuid.uuid4
) -> Plan:
    """Plan to write the metadata of a backup to the spares that are left, and to new ones.

    Data and tag areas of the target's own spares are not touched. Those that are missing stay in
    the configuration: their chunks give errors until they are back or are given up. The target is
    not activated by it; `plan_present` does that, with ``degraded`` where spares are missing.

    Raises:
        Refused: it cannot be done safely; nothing was written.
    """
    backup = seen.backup
    check_name(request.name)
    _check_restorable(request, seen)
    members, fresh = _members_and_fresh(request, seen)
    missing = sorted(configured(backup) - set(members))
    if missing and not request.degraded:
        raise Refused(
            "would be restored without "
            + ", ".join(_named_spare(backup, index) for index in missing),
            device=request.name,
            remedy="give these spares too, or degraded: true, and the chunks on them give errors",
        )
    noted = with_notes(backup, missing)
    entries = list(noted.config["spares"])
    actions = [Action("remove_remains", name) for name in seen.remains]
    spares = {index: candidate.info for index, candidate in members.items()}
    for index, info in spares.items():
        if info.path not in seen.tagged:
            # Nothing is on it, and old tags must not make old data valid.
            chunks = pool.capacity(geometry_of(backup, index), index, ()).total
            actions.append(Action("format_spare", info.path, {"chunks": chunks}))
    for candidate in fresh:
        index = next((i for i, entry in enumerate(entries) if entry is None), len(entries))
        if index == MAX_SPARES:
            raise Refused(
                f"would have more than {MAX_SPARES} spares, the missing ones included",
                device=request.name,
                remedy="give fewer new spares",
            )
        geometry = _check_spare(
            candidate, seen.main, backup.config["chunk_sectors"] * SECTOR_BYTES, request.wipe
        )
        entries[index : index + 1] = [
            {
                "uuid": str(new_uuid()),
                "geometry": geometry.to_dict(),
                **replacement.identity_of(candidate.info),
            }
        ]
        spares[index] = candidate.info
        content = list(candidate.signatures)
        if content or not candidate.survey.empty:
            actions.append(Action("wipe_spare", candidate.info.path, {"content": content}))
        chunks = pool.capacity(geometry, index, ()).total
        actions.append(Action("format_spare", candidate.info.path, {"chunks": chunks}))
    after = replace(noted, generation=_above_all(seen), config={**noted.config, "spares": entries})
    details = {"from": backup.generation, "generation": after.generation}
    actions.append(Action("restore_metadata", request.name, details))
    doubt = (
        f"the backup is of generation {backup.generation}; chunks that were remapped after it, if "
        "any, have main's older data now"
    )
    spares = dict(sorted(spares.items()))
    return Plan(
        name=request.name,
        actions=tuple(actions),
        before=_nothing(),
        after=_state(after, spares),
        metadata=after,
        main=seen.main,
        spares=spares,
        warnings=(
            doubt,
            *(f"{_named_spare(backup, i)} is missing; these chunks give errors" for i in missing),
        ),
    )


def _check_restorable(request: RestoreRequest, seen: RestoreSeen) -> None:
    name = seen.backup.config.get("name")
    if name != request.name:
        raise Refused(f"the backup is of target {name!r}", device=request.name, remedy="name it")
    if seen.active:
        raise Refused(
            "is active, so its metadata is on its spares",
            device=request.name,
            remedy="repair it with the target module",
        )
    if seen.taken:
        raise Refused(
            "is a mapped device of something else, whose name the target would need",
            device=f"/dev/mapper/{seen.taken[0]}",
            remedy="remove that device",
        )
    if seen.removed:
        raise Refused(
            "was removed from this host on purpose, so its main and spares may have other data now",
            device=request.name,
            remedy=f"remove the file {seen.removed} if it is to live again",
        )
    if not request.spares:
        raise Refused("has no spare to be restored to", device=request.name, remedy="give one")
    if not replacement.under_way(seen.backup):
        _check_main_identity(seen.main, seen.backup)
    _check_distinct(seen.main, [c.info for c in seen.candidates])
    _check_unused(seen.main, seen.remains, "main")
    for candidate in seen.candidates:
        _check_unused(candidate.info, seen.remains, "spare")


def _members_and_fresh(
    request: RestoreRequest, seen: RestoreSeen
) -> tuple[dict[int, Candidate], list[Candidate]]:
    """The target's own spares by index, and the devices that are new to it."""
    members: dict[int, Candidate] = {}
    fresh = []
    for candidate in seen.candidates:
        info, backup = candidate.info, seen.backup
        _check_older(candidate, backup)
        index = member_index(info, backup)
        if candidate.survey.spare_uuid:
            index = index_of_uuid(backup, candidate.survey.spare_uuid)
        if index is None:
            _check_no_member(info, backup)
            fresh.append(candidate)
            continue
        check_identity(info, backup.config["spares"][index], f"spare {index}")
        check_not_reused(candidate)
        if info.path not in seen.tagged and chunks_on(backup, index):
            raise Refused(
                f"is spare {index}, but its checksum tags were overwritten too, so nothing tells "
                "good data on it from other",
                device=info.path,
                remedy="leave it out",
            )
        if index in members:
            raise Refused(
                f"and {members[index].info.path} are both spare {index}: one is a clone",
                device=info.path,
                remedy="leave the clone out",
            )
        members[index] = candidate
    return members, fresh


def _check_older(candidate: Candidate, backup: Metadata) -> None:
    """Refuse a device with any sign of metadata that the backup does not continue."""
    info, survey = candidate.info, candidate.survey
    if survey.newer:
        raise Refused(
            "carries metadata of a newer format",
            device=info.path,
            remedy="use a version of the collection that knows it",
        )
    for header in survey.headers:
        spares = {uuid.UUID(backup.config["spares"][i]["uuid"]) for i in configured(backup)}
        if header.target_uuid != backup.target_uuid or header.spare_uuid not in spares:
            raise Refused(
                f"carries metadata of spare {header.spare_uuid} of target {header.target_uuid}, "
                "which is not in the backup",
                device=info.path,
                remedy="give the target's own spares, and new ones that are empty",
            )
        if header.generation > backup.generation:
            raise Refused(
                f"carries generation {header.generation}, newer than the backup's "
                f"{backup.generation}",
                device=info.path,
                remedy="activate the target from its spares, with degraded: true where some are "
                "missing",
            )
        if copies.is_ancestor(backup, header.generation, header.digest) is False:
            raise Refused(
                f"carries a generation {header.generation} that the backup's "
                f"{backup.generation} does not descend from",
                device=info.path,
                remedy="decide which to keep; leave this device out to restore the backup",
            )
    if survey.contested:
        raise Refused("is more than one spare", device=info.path, remedy="leave it out")


def _check_no_member(info: DeviceInfo, backup: Metadata) -> None:
    """Refuse to take for new what has the serial number or the WWN of one of the spares."""
    for index in sorted(configured(backup)):
        entry, mine = backup.config["spares"][index], replacement.identity_of(info)
        if any(mine[key] and mine[key] == entry.get(key) for key in ("serial", "wwn")):
            raise Refused(
                f"has the serial number or the WWN of spare {index}, but not its size and model",
                device=info.path,
                remedy="restore its size, or give another device",
            )


def _above_all(seen: RestoreSeen) -> int:
    """A generation above every one that is known of."""
    found = [header.generation for c in seen.candidates for header in c.survey.headers]
    return max([seen.backup.generation, *found]) + 1
