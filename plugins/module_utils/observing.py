# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Observes the targets and the devices of a host: what plans are made from."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from . import (
    copies,
    discovery,
    extents,
    fingerprint,
    kernel_v4,
    mapping,
    replacement,
    replacing,
    stack,
)
from .backups import Backups
from .blockdev import DeviceInfo
from .devices import Blocks, Disks, Mapper
from .devmapper import MappedDevice, Segment, check_name
from .errors import DmRemapError, Refused
from .events import intersect_ranges
from .format import MAX_SPARES, Diagnosis, Geometry, Metadata, geometry_of
from .freezing import existing, held_chunks, is_parked, own_part
from .locks import Locks
from .plan_restore import RestoreRequest, RestoreSeen
from .plan_spares import SpareSeen
from .probing import answers_at, reads
from .request import OldSpare, Request, Seen
from .target import (
    ActiveSpare,
    ActiveTarget,
    Candidate,
    LostSpare,
    Stray,
    chunks_on,
    fails_in_map,
    index_of_uuid,
    member_index,
    spare_index,
)

# What dm-integrity's superblock starts with (SB_MAGIC in the kernel's drivers/md/dm-integrity.c).
INTEGRITY_MAGIC = b"integrt\0"
# What a spare answers where a block has no valid tag: it works, and the block is lost.
TAG_ERRORS = (0, errno.EILSEQ)


@dataclass(frozen=True)
class Look:
    """What a look at one spare of an active target found.

    Args:
        index: its position.
        devno: its integrity device, empty where there is none.
        below: device number of the device that it stands on.
        path: that device, empty where it is gone.
        candidate: who it is and what is on it, if that can be read.
        trouble: why it cannot be used.
        suspended: whether its integrity device is.
    """

    index: int
    devno: str = ""
    below: str = ""
    path: str = ""
    candidate: Candidate | None = None
    trouble: str = ""
    suspended: bool = False


class Observer:
    """Observes targets and devices on this host, and changes nothing.

    Args:
        mapper: device-mapper.
        blocks: block devices (the module `blockdev`, or a stand-in in tests).
        locks: tell whether somebody heals held I/O.
        backups: the metadata that the host has committed.
    """

    def __init__(self, mapper: Mapper, blocks: Blocks, locks: Locks, backups: Backups) -> None:
        self._mapper = mapper
        self._blocks = blocks
        self._locks = locks
        self._backups = backups

    def target_names(self) -> list[str]:
        """Names of the active targets."""
        found = []
        for name in sorted(self._mapper.names()):
            info = self._mapper.info(name)
            if info and info.live_table and stack.TARGET_UUID.match(info.uuid):
                found.append(name)
        return found

    def observe(self, name: str) -> ActiveTarget | None:
        """The active target ``name`` with its metadata, or None.

        Raises:
            Refused: the name belongs to another mapped device.
            DmRemapError: its metadata cannot be read.
        """
        check_name(name)
        device = self._mapper.info(name)
        if device is None or not device.live_table:
            return None
        if not stack.TARGET_UUID.match(device.uuid):
            raise Refused(
                "is a mapped device of something else",
                device=f"/dev/mapper/{name}",
                remedy="choose another name",
            )
        looks = self._look_at_spares(device)
        if not looks:
            raise DmRemapError(
                "is active without any spare",
                device=f"/dev/mapper/{name}",
                remedy="stop what uses it, remove it with dmsetup, and run the target module again",
            )
        surveys = [look.candidate for look in looks if look.candidate]
        choice = copies.choose({c.info.path: c.survey for c in surveys})
        upper, path = self.map_of(device)
        table = tuple(self._mapper.table(upper.name))
        shim = self.part(device, stack.shim_name(name))
        frozen = self.part(device, stack.frozen_name(name))
        new_main = self.part(device, stack.new_main_name(name))
        used = {mapping.linear_target(s)[0] for s in table if s.target == "linear"}
        own = {look.devno for look in looks if look.devno}
        own |= {part.devno for part in (shim, frozen, new_main) if part}
        new = None
        if new_main and new_main.live_table:
            new = self._blocks.describe(self.below(new_main.name))
        replaced = not replacement.under_way(choice.metadata)
        if new is None and not replaced:
            raise DmRemapError(
                "its main is being replaced, but the new one is not where it was put",
                device=f"/dev/mapper/{name}",
                remedy="stop what uses the target, remove it with dmsetup, and run the target "
                "module again",
            )
        mains = [devno for devno in used if devno not in own] or self._lower_mains(name, own)
        main = self._blocks.describe(self._blocks.node_of(mains[0])) if mains else None
        over_main = ""
        if new_main and new_main.devno in used and replaced:
            # All is on the new main, and the last commit has made it the main.
            main, over_main = new, new_main.devno
        # Where no chunk is on main, the segment beyond the end tells that the shim is in place.
        carried = table[-1].start >= choice.metadata.config["main"]["sectors"]
        serves = shim and main and carried and self._mapper.dependencies(shim.name) == [main.devno]
        found = self._with_spares(
            ActiveTarget(
                device=device,
                map=upper,
                table=table,
                main=main,
                spares=(),
                choice=choice,
                path=path,
                cut=self._cut_of(device) if path else (),
                past_hold=bool(path) and upper.devno in self._mapper.dependencies(name),
                shim=shim if shim and (shim.devno in used or serves) else None,
                frozen=frozen if frozen and frozen.devno in used else None,
                replacement=None if replaced else new,
                new_main=None if replaced else new_main,
            ),
            looks,
        )
        settled = replacing.is_settled(self._mapper, found) and is_parked(self._mapper, found)
        tidy = bool(found.frozen) or settled
        found = _judged(found, over_main)
        return replace(found, tidy=tidy and not any(look.suspended for look in looks))

    def require(self, name: str) -> ActiveTarget:
        """Like `observe`, but a target that is not active is refused."""
        target = self.observe(name)
        if target is None:
            raise Refused(
                "there is no active target of that name",
                device=name,
                remedy="create or activate it with the target module",
            )
        return target

    def name_of(self, target: uuid.UUID) -> str:
        """Name of the active target that has this UUID, or ""."""
        for name in self.target_names():
            info = self._mapper.info(name)
            if info and info.uuid == stack.UUID_PREFIX + target.hex:
                return name
        return ""

    def _with_spares(self, target: ActiveTarget, looks: Sequence[Look]) -> ActiveTarget:
        """The target with its spares, sorted by what can be done with them."""
        metadata = target.metadata
        wanted = {index for index, entry in enumerate(metadata.config["spares"]) if entry}
        spares: list[ActiveSpare] = []
        lost = {i: LostSpare(i, "", "", "", "has no device in the kernel") for i in wanted}
        strays = []
        for look in looks:
            path = look.candidate.info.path if look.candidate else look.path
            if look.index not in wanted:
                marked = bool(look.candidate and not look.candidate.survey.empty)
                strays.append(Stray(look.index, path, look.below, marked))
                continue
            trouble = look.trouble or self.trouble_in_data(look, metadata)
            if trouble or look.candidate is None:
                mapped = not fails_in_map(target, look.index)
                lost[look.index] = LostSpare(
                    look.index, look.devno, look.below, path, trouble, mapped
                )
            else:
                spares.append(ActiveSpare(look.index, look.devno, look.candidate))
                del lost[look.index]
        return replace(
            target,
            spares=tuple(spares),
            lost_spares=tuple(lost[index] for index in sorted(lost)),
            strays=tuple(strays),
        )

    def look_at_spares(self, target: ActiveTarget) -> ActiveTarget:
        """The target with its spares and its map as they are now, and its metadata as it was known.

        It is `certain` only if these agree.
        """
        cut, table = self._cut_of(target.device), tuple(self._mapper.table(target.map.name))
        found = self._with_spares(
            replace(target, cut=cut, table=table), self._look_at_spares(target.device)
        )
        return replace(found, certain=_agrees(found))

    def _look_at_spares(self, target: MappedDevice) -> list[Look]:
        found = []
        for index in range(MAX_SPARES):
            names = stack.spare_part_names(target.name, index)
            upper, data, tags = (self.part(target, name) for name in names)
            if upper or data or tags:
                found.append(self._look_at_spare(target.name, index, upper, data))
        return found

    def _look_at_spare(
        self, name: str, index: int, upper: MappedDevice | None, data: MappedDevice | None
    ) -> Look:
        look = Look(
            index=index,
            devno=upper.devno if upper and upper.live_table else "",
            suspended=bool(upper and upper.suspended),
        )
        if data is None or not data.live_table:
            return replace(look, trouble="has no device in the kernel")
        below = mapping.linear_target(self._mapper.table(data.name)[0])[0]
        look = replace(look, below=below)
        try:
            candidate = self.candidate(self._blocks.node_of(below), with_signatures=False)
        except (DmRemapError, OSError) as error:
            return replace(look, trouble=f"is gone: {error}")
        look = replace(look, path=candidate.info.path)
        failed = candidate.survey.failed
        if not candidate.survey.copies and all(
            copy.diagnosis is Diagnosis.UNREADABLE for copy in failed
        ):
            return replace(look, trouble="cannot be read")
        trouble = "" if look.devno else "has no device in the kernel"
        return replace(look, candidate=candidate, trouble=trouble)

    def trouble_in_data(self, look: Look, metadata: Metadata) -> str:
        """What is wrong with a spare's integrity device, which fails for good by one bad place."""
        chunks = chunks_on(metadata, look.index)
        if not chunks or look.suspended:
            return ""
        chunk_sectors, block = metadata.config["chunk_sectors"], metadata.config["block_sectors"]
        places = [
            extents.place_of(metadata.extents, chunk)
            for chunk in sorted({chunks[0], chunks[len(chunks) // 2], chunks[-1]})
        ]
        try:
            with self._blocks.BlockDevice(self._blocks.node_of(look.devno)) as device:
                if any(
                    answers_at(device, place.physical * chunk_sectors, block, TAG_ERRORS)
                    for place in places
                    if place
                ):
                    return ""
        except (DmRemapError, OSError) as error:
            return f"cannot be opened: {error}"
        return "gives errors for all of its chunks"

    def map_of(self, device: MappedDevice) -> tuple[MappedDevice, stack.PathState | None]:
        """The device whose table is the map, and the state of the path that holds I/O above it."""
        hold = self.part(device, stack.hold_name(device.name))
        upper = self.part(device, stack.map_name(device.name))
        if hold is None or upper is None:
            return device, None
        if not {hold.devno, upper.devno}.intersection(self._mapper.dependencies(device.name)):
            return device, None
        return upper, self.path_of(device.name)

    def _cut_of(self, device: MappedDevice) -> tuple[tuple[int, int], ...]:
        """Ranges of a target that fail above the device that holds its errors."""
        table = self._mapper.table(device.name)
        return tuple((s.start, s.length) for s in table if s.target == "error")

    def _lower_mains(self, name: str, own: Collection[str]) -> list[str]:
        """Main's device number where only the shim or the freezing devices lead to it."""
        found = []
        shim, place = self._mapper.info(stack.shim_name(name)), stack.place_name(name)
        if shim and shim.live_table:
            found += self._mapper.dependencies(shim.name)
        if self._mapper.info(place):
            # The first of those that carry flushes is main.
            table = self._mapper.table(place)
            found += [mapping.linear_target(s)[0] for s in table if s.target == "linear"]
        return [devno for devno in found if devno not in own]

    def path_of(self, name: str) -> stack.PathState:
        """State of the path of a target whose errors are held.

        Raises:
            DmRemapError: there is no such device.
        """
        hold = stack.hold_name(name)
        (status,), (table,) = self._mapper.status(hold), self._mapper.table(hold)
        return stack.path_state(status, table)

    def devices_below(self, target: ActiveTarget) -> frozenset[str]:
        """Device numbers that the target's map uses now, but for the freezing device."""
        frozen = self.part(target.device, stack.frozen_name(target.name))
        try:
            used = frozenset(self._mapper.dependencies(target.map.name))
        except DmRemapError:
            return frozenset()
        return used - {frozen.devno if frozen else ""}

    def is_current(self, target: ActiveTarget, disks: Disks) -> bool:
        """Whether a target that holds its errors is as it was observed.

        Whoever changes its chunks commits a generation, so a look at the metadata tells.
        """
        device = self._mapper.info(target.name)
        if device is None or target.path is None or not (target.tidy and target.certain):
            return False
        if (device.uuid, device.devno) != (target.device.uuid, target.device.devno):
            return False
        if not self.is_above_hold(target.name):
            return False
        shim = self._mapper.info(stack.shim_name(target.name))
        if (shim and shim.devno) != (target.shim and target.shim.devno):
            return False
        return copies.carries(disks.members, target.metadata)

    def is_above_hold(self, name: str) -> bool:
        """Whether the target of that name stands on what holds failed I/O, and on nothing else."""
        hold = self._mapper.info(stack.hold_name(name))
        return hold is not None and self._mapper.dependencies(name) == [hold.devno]

    def lost_before(
        self, target: ActiveTarget, ranges: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Lost sectors in chunks that ``ranges`` touch and that are on a spare already.

        Those that were written since they were lost can be read again, and are left out.
        """
        metadata = target.metadata
        chunk_sectors, block = metadata.config["chunk_sectors"], metadata.config["block_sectors"]
        total = metadata.config["main"]["sectors"]
        # I/O to frozen chunks would wait, and to a suspended map for ever.
        waits = target.frozen or target.map.suspended
        lost = [] if waits else [(item.sector, item.count) for item in metadata.lost]
        asked = [
            (chunk * chunk_sectors, chunk_sectors)
            for chunk in extents.chunks_of(ranges, chunk_sectors, total)
        ]
        known = [item for piece in asked for item in intersect_ranges(lost, piece)]
        if not known:
            return []
        # Reads of the target may be held until somebody heals it, who waits for the lock.
        with self._blocks.BlockDevice(target.map.node) as device:
            return [
                (sector, block)
                for start, count in known
                for sector in range(start, start + count, block)
                if not reads(device, sector, block)
            ]

    def discover(self) -> discovery.Host:
        """Look at all devices of the host, without a lock, and at what it knows of its targets."""
        return discovery.observe(self._blocks, self._mapper, self._backups)

    def devno_of(self, path: str) -> str:
        """Device number of a path.

        Raises:
            Refused: there is no such device.
        """
        return self._blocks.describe(path).devno

    def see(
        self,
        name: str,
        main: str | None,
        spares: Sequence[str],
        degraded: bool = False,
        migrate_from: str | None = None,
    ) -> Seen:
        """Observe what a request is about.

        Args:
            name: the target.
            main: path of main; None for a removal.
            spares: paths of the spares.
            degraded: spares that do not exist or cannot be read are no reason to fail.
            migrate_from: path of a kernel target's spare. It need not exist, because it is not
                needed any more once the target is migrated.

        Raises:
            DmRemapError: a device does not exist or cannot be read.
        """
        target = self.observe(name)
        remains = () if target else tuple(self._remains(name))
        wanted = self._blocks.describe(main) if main else None
        new_main = None
        mains = [target.main, target.replacement] if target else []
        if main and wanted and target and wanted.devno not in [i.devno for i in mains if i]:
            new_main = self.candidate(main, with_signatures=True)
        candidates, absent = [], []
        for path in spares:
            try:
                candidates.append(self.candidate(path, self._is_new(target, path)))
            except (DmRemapError, OSError):
                if not degraded:
                    raise
                absent.append(path)
        if main is None:
            # An interrupted removal has left spares that nobody may have named.
            known = {candidate.info.devno for candidate in candidates}
            left = [self.candidate(path, True) for path in self._spares_of(name, remains)]
            candidates += [c for c in left if c.info.devno not in known]
        if main and wanted and not target and all(c.survey.empty for c in candidates):
            # A new target records what its main contains.
            with self._blocks.BlockDevice(main) as device:
                wanted = fingerprint.with_content(wanted, device)
        owners = [c.survey.target_uuid for c in candidates if c.survey.target_uuid]
        owner = target.metadata.target_uuid if target else next(iter(owners), None)
        if owner is None and wanted:
            infos = [candidate.info for candidate in candidates]
            owner = self._remembered(name, wanted, infos)
        return Seen(
            target=target,
            remains=remains,
            taken=() if target else tuple(self._taken(name)),
            main=wanted,
            candidates=tuple(candidates),
            healer=self._locks.healer_runs(),
            new_main=new_main,
            others=() if target else tuple(self._other_mains(candidates)),
            old_spare=self._old_spare(migrate_from) if migrate_from is not None else None,
            absent=tuple(absent),
            witness=self._backups.newest(owner) if owner else None,
            removed=self._backups.removed(owner) if owner else "",
        )

    def _old_spare(self, path: str) -> OldSpare | None:
        with contextlib.suppress(DmRemapError):
            info = self._blocks.describe(path)
            with self._blocks.BlockDevice(path) as device:
                return OldSpare(info, kernel_v4.survey(device))
        return None

    def _is_new(self, target: ActiveTarget | None, path: str) -> bool:
        """Whether a device is no spare of the target yet."""
        if target is None:
            return True
        return spare_index(target, path, self._blocks.describe(path).devno) is None

    def _remembered(
        self, name: str, main: DeviceInfo, spares: Sequence[DeviceInfo]
    ) -> uuid.UUID | None:
        """The target, by the host's backups, that had these devices; or else this name."""
        found = None
        for owner in self._backups.targets():
            metadata = None if self._backups.removed(owner) else self._backups.newest(owner)
            if metadata is None or not metadata.extents:
                continue
            members = [member_index(info, metadata) for info in spares]
            if set(members) != {None} or replacement.is_surely(main, metadata.config["main"]):
                return owner
            if metadata.config.get("name") == name:
                found = owner
        return found

    def _spares_of(self, name: str, remains: Sequence[str]) -> Iterator[str]:
        """Nodes of the spares that remaining devices of target ``name`` use."""
        for index in range(MAX_SPARES):
            device = stack.data_name(name, index)
            if device in remains and existing(self._mapper, device).live_table:
                yield self.below(device)

    def _other_mains(self, candidates: Sequence[Candidate]) -> Iterator[DeviceInfo]:
        """Devices that may be a main of the replacement that an inactive target is in."""
        found = [copy.metadata for c in candidates for copy in c.survey.copies]
        newest = max(found, key=lambda metadata: metadata.generation, default=None)
        if newest is None or not replacement.under_way(newest):
            return
        under_way = newest.config["replacement"]
        entries = (newest.config["main"], under_way["main"])
        paths = [under_way["old_path"], under_way["main"]["path"]]
        sizes = {replacement.device_sectors(entry) for entry in entries}
        for path in (*paths, *self._blocks.nodes_of_size(sizes)):
            with contextlib.suppress(DmRemapError):
                yield self._blocks.describe(path)

    def see_spare(self, name: str, device: str, replaces: str | None, add: bool) -> SpareSeen:
        """Observe what a change of an active target's spares is about.

        Args:
            name: the target.
            device: the spare's path, or the UUID of one that is lost.
            replaces: the same of the one that it stands in for.
            add: whether the device is to be a spare.

        Raises:
            Refused: there is no such target.
        """
        target = self.require(name)
        devnos = {}
        for path in (device, replaces):
            with contextlib.suppress(DmRemapError, OSError):
                devnos[path or ""] = self._blocks.describe(path or "").devno
        known = spare_index(target, device, devnos.get(device, ""))
        candidate = None
        lost = {spare.index for spare in target.lost_spares}
        if add and known in (None, *lost) and device in devnos:
            candidate = self.candidate(device, with_signatures=known is None)
        witness = self._backups.newest(target.metadata.target_uuid)
        return SpareSeen(target, candidate, devnos, witness)

    def backup_of(self, name: str, generation: int | None = None) -> Metadata:
        """The host's backup of a target; see `backups.Backups.of`."""
        return self._backups.of(name, generation)

    def see_restore(self, request: RestoreRequest, backup: Metadata) -> RestoreSeen:
        """Observe what a restoration is about.

        Args:
            request: what is wanted.
            backup: the generation that is to be restored.

        Raises:
            DmRemapError: a device does not exist or cannot be read.
        """
        active = self.observe(request.name) is not None or bool(self.name_of(backup.target_uuid))
        candidates = tuple(self.candidate(path, True) for path in request.spares)
        owner = backup.target_uuid
        return RestoreSeen(
            backup=backup,
            active=active,
            remains=() if active else tuple(self._remains(request.name)),
            taken=() if active else tuple(self._taken(request.name)),
            main=self._blocks.describe(request.main),
            candidates=candidates,
            tagged=frozenset(c.info.path for c in candidates if self._has_tags(c, backup)),
            removed=self._backups.removed(owner),
        )

    def _has_tags(self, candidate: Candidate, metadata: Metadata) -> bool:
        """Whether dm-integrity's superblock is where a spare of the target has it."""
        index = member_index(candidate.info, metadata)
        if candidate.survey.spare_uuid:
            index = index_of_uuid(metadata, candidate.survey.spare_uuid)
        if index is None:
            return False
        try:
            return self.is_formatted(candidate.info.path, geometry_of(metadata, index))
        except DmRemapError:
            return False

    def see_devices(self, paths: Sequence[str], signatures: bool = True) -> tuple[Candidate, ...]:
        """Observe devices: who each is and what is on it.

        Args:
            paths: the devices.
            signatures: look for what else is on them, as anything that writes to them must.

        Raises:
            DmRemapError: one does not exist, is no block device, or cannot be examined.
        """
        return tuple(self.candidate(path, with_signatures=signatures) for path in paths)

    def is_formatted(self, path: str, geometry: Geometry) -> bool:
        """Whether the tag area of a spare has been given to dm-integrity.

        Raises:
            DmRemapError: that cannot be read.
        """
        try:
            with self._blocks.BlockDevice(path) as device:
                start = device.read(geometry.tag_start, geometry.block_sectors)
        except OSError as error:
            raise DmRemapError(
                f"sector {geometry.tag_start}, where its tag area begins, cannot be read: "
                f"{os.strerror(error.errno or 0)}",
                device=path,
                remedy="replace the spare",
            ) from error
        return start.startswith(INTEGRITY_MAGIC)

    def candidate(self, path: str, with_signatures: bool) -> Candidate:
        """A device as a spare: who it is and what is on it."""
        info = self._blocks.describe(path)
        with self._blocks.BlockDevice(path) as device:
            survey = copies.survey(device)
        signatures: tuple[str, ...] = ()
        if with_signatures:
            try:
                signatures = tuple(self._blocks.signatures(path))
            except DmRemapError:
                # A spare whose first sectors went bad is still known by its other copies.
                if survey.spare_uuid is None:
                    raise
        return Candidate(info, signatures, survey)

    def below(self, name: str) -> str:
        """Node of the device under a linear one of ours."""
        return self._blocks.node_of(mapping.linear_target(self._mapper.table(name)[0])[0])

    def part(self, target: MappedDevice, name: str) -> MappedDevice | None:
        """The target's own mapped device ``name``; somebody else's of that name is left alone."""
        return own_part(self._mapper, target.uuid, target.name, name)

    def _remains(self, name: str) -> list[str]:
        """Our mapped devices under ``name`` that no live target uses, upper ones first."""
        return [mapped for mapped, ours in self._under(name) if ours]

    def _taken(self, name: str) -> list[str]:
        """Mapped devices of others, or of other targets, whose names target ``name`` needs."""
        return [mapped for mapped, ours in self._under(name) if not ours]

    def _under(self, name: str) -> Iterator[tuple[str, bool]]:
        """The mapped devices with names that target ``name`` uses, and whether they are its own.

        The UUID decides: another target may be called like one of this target's parts.
        """
        for part in stack.part_names(name):
            device = self._mapper.info(part)
            if device:
                head, suffix = device.uuid[: len(stack.UUID_PREFIX) + 32], part[len(name) :]
                yield part, bool(stack.TARGET_UUID.match(head)) and device.uuid == head + suffix


def request_seen(observer: Observer, request: Request) -> Seen:
    """Observe what ``request`` names."""
    return observer.see(
        request.name, request.main, request.spares, request.degraded, request.migrate_from
    )


def _judged(target: ActiveTarget, over_main: str) -> ActiveTarget:
    """The target with its certainty.

    A spare that the map does not use, although chunks are on it, counts as lost for as long as
    another one is: an interruption left it so on its return, and `Exchanger.return_spare` ends
    that.
    """
    if not target.lost_spares or _agrees(target, over_main):
        return replace(target, certain=True)
    used = {mapping.linear_target(s)[0] for s in target.table if s.target == "linear"}
    idle = {
        spare.index: spare
        for spare in target.spares
        if spare.devno not in used and fails_in_map(target, spare.index)
    }
    lost = [*target.lost_spares]
    for index, spare in idle.items():
        info = spare.candidate.info
        reason = "is there again, and the target does not use it yet"
        lost.append(LostSpare(index, spare.devno, info.devno, info.path, reason, mapped=False))
    without = replace(
        target,
        spares=tuple(spare for spare in target.spares if spare.index not in idle),
        lost_spares=tuple(sorted(lost, key=lambda spare: spare.index)),
    )
    if idle and without.spares and _agrees(without, over_main):
        return replace(without, certain=True)
    return replace(target, certain=False)


def _agrees(target: ActiveTarget, over_main: str = "") -> bool:
    """Whether the live map is that of the chosen generation.

    Args:
        target: the target.
        over_main: device number of what an ended replacement has left over its main.
    """
    live = list(target.table)
    if over_main and target.main:
        live = [_onto(segment, over_main, target.main.devno) for segment in live]
    positions = {chunk: position for position, chunk in enumerate(held_chunks(target))}
    devno = target.frozen.devno if target.frozen else ""
    return live == target.map_table(target.metadata, positions, devno)


def _onto(segment: Segment, device: str, below: str) -> Segment:
    """A segment on what is below the device, which is as long."""
    if segment.target == "linear":
        used, offset = mapping.linear_target(segment)
        if used == device:
            return replace(segment, params=f"{below} {offset}")
    return segment
