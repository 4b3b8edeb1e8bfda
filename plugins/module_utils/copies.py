# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The copies of the metadata on spares: find, choose, commit, repair and wipe them.

A commit never overwrites the last good copies of a device before the new ones are durable, so that
after any crash one whole generation, old or new, is left.
"""

from __future__ import annotations

import contextlib
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from .errors import DmRemapError, Refused
from .format import (
    COPIES,
    FAR_MIDDLE,
    HEADER_BYTES,
    HEADER_SECTORS,
    MAX_HISTORY,
    NO_DIGEST,
    Copy,
    Diagnosis,
    Header,
    Invalid,
    Metadata,
    geometry_of,
    pack_slot,
    slot_sectors_of,
    spare_uuid_of,
    unpack_header,
    unpack_slot,
)
from .marks import MAGIC, NEAR_SECTORS, SECTOR_BYTES

# Even near copies are overwritten last.
EVEN_COPIES = frozenset({0, 2, 4})
# What is read to see whether a spare has changed.
_QUICK_SECTORS = (NEAR_SECTORS[1], NEAR_SECTORS[3])
# Two hosts' clocks may differ by this much before a timestamp counts as in the future.
CLOCK_SLACK_NS = 300 * 10**9
# What is read of a slot at once; larger bodies take another read.
START_BYTES = 4 * HEADER_BYTES
# Header and the first block of the body.
WIPE_BYTES = 2 * HEADER_BYTES
# What an entry in the list of spares notes while the spare is missing (see `last_common`).
LAST_COMMON = "last_common"


class Device(Protocol):
    """A device that holds copies; sectors are of 512 bytes.

    Reads and writes raise OSError on an I/O error. A write is durable only after a flush.
    """

    name: str
    sectors: int

    def read(self, sector: int, count: int) -> bytes: ...

    def write(self, sector: int, data: bytes) -> None: ...

    def flush(self) -> None: ...


class NoMetadata(Refused):
    """No valid copy was found."""


class NewerFormat(Refused):
    """A copy was written by a newer version, which this one must not judge or overwrite."""


class Conflict(Refused):
    """The copies do not belong together: several targets, or one spare twice."""


class SplitBrain(Conflict):
    """Two spares carry histories that diverged.

    Attributes:
        sides: the newest header of each history, with the names of its devices.
    """

    def __init__(self, message: str, sides: tuple[tuple[Header, tuple[str, ...]], ...]) -> None:
        super().__init__(
            message,
            remedy="decide which to keep, and wipe the other's spares or leave them out",
        )
        self.sides = sides


class AnotherWriter(Refused):
    """A device carries what this host did not write."""


class LostWrite(Refused):
    """A device does not carry what was committed to it."""


class CommitFailed(DmRemapError):
    """No device took a generation; each holds a whole one, old or new.

    Survey and choose again before the next commit: what is on the devices decides.
    """


@dataclass(frozen=True)
class FailedCopy:
    """A copy that is not used.

    Attributes:
        index: copy index, 0 to 6.
        sector: where it is, or should be.
        diagnosis: why.
        message: the same for people.
    """

    index: int
    sector: int
    diagnosis: Diagnosis
    message: str


@dataclass(frozen=True)
class Survey:
    """What a look at all slots of one device found.

    Attributes:
        device: its name.
        sectors: its size now.
        copies: valid copies of the spare that the device is, by copy index.
        failed: the other slots, by copy index.
        claims: (target UUID, spare UUID) of every valid copy, the most frequent first. The device
            is the first one's spare, unless `contested`.
        contested: no claim has more copies than every other.
        sizes: sizes in sectors that valid headers, or the caller, say the spare was laid out for.
        newer: whether there is a copy of a newer format.
        headers: all valid headers, also those of other spares and in front of damaged bodies.
    """

    device: str
    sectors: int
    copies: tuple[Copy, ...]
    failed: tuple[FailedCopy, ...]
    claims: tuple[tuple[uuid.UUID, uuid.UUID], ...]
    contested: bool
    sizes: tuple[int, ...]
    newer: bool
    headers: tuple[Header, ...] = ()

    @property
    def empty(self) -> bool:
        """No slot holds anything of ours; a slot that cannot be read might."""
        return not self.copies and all(
            copy.diagnosis is Diagnosis.MAGIC or copy.sector + HEADER_SECTORS > self.sectors
            for copy in self.failed
        )

    @property
    def target_uuid(self) -> uuid.UUID | None:
        """The target that the device belongs to; None without copies or when contested."""
        return self.claims[0][0] if self.claims and not self.contested else None

    @property
    def spare_uuid(self) -> uuid.UUID | None:
        """The spare that the device is; None without copies or when contested."""
        return self.claims[0][1] if self.claims and not self.contested else None


@dataclass(frozen=True)
class Notice:
    """Something about a choice that people should know, and nothing is refused for.

    Attributes:
        code: what it is, in a word: future, retired, shrunk, unproved.
        key: key of the device.
        message: what about it, without the key.
    """

    code: str
    key: str
    message: str

    def __str__(self) -> str:
        return self.message if self.code == "future" else f"{self.key} {self.message}"


@dataclass(frozen=True)
class Choice:
    """Which generation counts, and what has to be done about the rest.

    Attributes:
        metadata: the generation that counts.
        source: key of the device it was read from.
        spares: position in the configuration to key, for the devices that are spares of it.
        stale: keys of spares whose newest copy is older.
        retired: keys of devices that carry older copies and are no spares of it any more.
        damaged: key to the copies that must be rewritten, for spares that are not stale.
        notices: what people should know.
    """

    metadata: Metadata
    source: str
    spares: dict[int, str]
    stale: frozenset[str]
    retired: frozenset[str]
    damaged: dict[str, tuple[FailedCopy, ...]]
    notices: tuple[Notice, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """The notices as sentences."""
        return tuple(map(str, self.notices))

    @property
    def missing(self) -> tuple[int, ...]:
        """Positions of configured spares that no device was found for."""
        entries = self.metadata.config["spares"]
        return tuple(
            index
            for index, entry in enumerate(entries)
            if entry is not None and index not in self.spares
        )


@dataclass(frozen=True)
class Rewrite:
    """What a commit or repair did on one device.

    Attributes:
        written: indexes of the copies that were written.
        failed: the copies that could not be, with the error.
        behind: indexes of copies that were found older than the device's others: after a crash or
            a failed write this is expected, otherwise the device dropped a write.
        left_out: why the device did not take the generation whole, while another one did; empty
            if it did. It may hold the generation or the one before.
    """

    written: tuple[int, ...]
    failed: tuple[FailedCopy, ...]
    behind: tuple[int, ...]
    left_out: str = ""


def _rank(copy: Copy) -> tuple[int, int, int]:
    header = copy.header
    return header.generation, header.timestamp_ns, -header.copy_index


# Survey


def _read(device: Device, sector: int, size: int) -> bytes:
    """Read whole sectors; a slot past the end is as unreadable as a bad one."""
    count = -(-size // SECTOR_BYTES)
    if sector + count > device.sectors:
        raise Invalid(Diagnosis.UNREADABLE, f"sector {sector} is past the end of the device")
    try:
        raw = device.read(sector, count)
    except OSError as error:
        raise Invalid(Diagnosis.UNREADABLE, f"sector {sector}: {error}") from error
    if len(raw) != count * SECTOR_BYTES:
        raise Invalid(Diagnosis.UNREADABLE, f"sector {sector}: {len(raw)} bytes were read")
    return raw


def _read_copy(
    device: Device, sector: int, known: dict[bytes, Metadata], headers: dict[int, Header]
) -> Copy:
    """Read one slot: its header, and its body only when the header is valid.

    Args:
        known: generations by digest, so that equal bodies are parsed once; added to.
        headers: valid headers by sector; added to.
    """
    raw = _read(device, sector, HEADER_BYTES)
    header = headers[sector] = unpack_header(raw, sector)
    body = _read(device, sector + HEADER_SECTORS, header.slot_bytes - HEADER_BYTES)
    twin = known.get(header.digest)
    if twin and _is_copy_of(header, body, twin):
        return Copy(header, twin)
    copy = unpack_slot(raw + body, sector)
    known[header.digest] = copy.metadata
    return copy


def _is_copy_of(header: Header, body: bytes, metadata: Metadata) -> bool:
    expected = metadata.body
    return (
        header.digest == metadata.digest
        and header.features == metadata.features
        and header.target_uuid == metadata.target_uuid
        and header.generation == metadata.generation
        and header.timestamp_ns == metadata.timestamp_ns
        and header.host_id == metadata.host_id
        and header.parent_digest == metadata.parent_digest
        and header.body_length == len(expected)
        and header.body_crc == zlib.crc32(expected)
        and body[: len(expected)] == expected
    )


def _far_sectors(size: int) -> tuple[int, ...]:
    try:
        return slot_sectors_of(size)[FAR_MIDDLE:]
    except ValueError:
        return ()


class _Look:
    """Collects the slots of one device while a survey goes on."""

    def __init__(self, device: Device, known: dict[bytes, Metadata]) -> None:
        self.device = device
        self.valid: dict[int, Copy] = {}
        self.failed: dict[int, FailedCopy] = {}
        self.newer: list[tuple[uuid.UUID, uuid.UUID]] = []
        self.headers: dict[int, Header] = {}
        self._known = known

    def at(self, index: int, sector: int) -> None:
        if sector in self.valid or sector in self.failed:
            return
        try:
            self.valid[sector] = _read_copy(self.device, sector, self._known, self.headers)
        except Invalid as error:
            self.failed[sector] = FailedCopy(index, sector, error.diagnosis, error.message)
            if error.target_uuid is not None and error.spare_uuid is not None:
                self.newer.append((error.target_uuid, error.spare_uuid))

    def far(self, size: int) -> None:
        for index, sector in enumerate(_far_sectors(size), FAR_MIDDLE):
            self.at(index, sector)

    @property
    def sizes(self) -> set[int]:
        return {header.spare_sectors for header in self.headers.values()}


def survey(
    device: Device, also: Collection[int] = (), known: dict[bytes, Metadata] | None = None
) -> Survey:
    """Look at every slot of `device`: near ones, and far ones by its size and by what headers say.

    Never raises for what is on the device. Bodies are read only behind valid headers.

    Args:
        device: any device.
        also: other sizes in sectors that it may have been laid out for.
        known: generations by digest that were read elsewhere, so that equal bodies are parsed once;
            added to.
    """
    look = _Look(device, {} if known is None else known)
    for index, sector in enumerate(NEAR_SECTORS):
        look.at(index, sector)
    wanted = {device.sectors, *also}
    done: set[int] = set()
    while wanted - done:
        for size in sorted(wanted - done):
            look.far(size)
        done |= wanted
        wanted |= look.sizes
    owners = Counter(
        [(copy.header.target_uuid, copy.header.spare_uuid) for copy in look.valid.values()]
        + look.newer
    ).most_common()
    contested = len(owners) > 1 and owners[0][1] == owners[1][1]
    own: list[Copy] = []
    failed: list[FailedCopy] = []
    for sector, copy in look.valid.items():
        header = copy.header
        if contested or (header.target_uuid, header.spare_uuid) == owners[0][0]:
            own.append(copy)
        else:
            message = f"belongs to spare {header.spare_uuid} of target {header.target_uuid}"
            failed.append(FailedCopy(header.copy_index, sector, Diagnosis.FOREIGN, message))
    own_sizes = {copy.header.spare_sectors for copy in own}
    places = {*NEAR_SECTORS, *(sector for size in own_sizes for sector in _far_sectors(size))}
    # Where the device's size has changed, slots by its size now are only of interest if used.
    failed += [
        copy
        for sector, copy in look.failed.items()
        if not own or sector in places or copy.diagnosis is Diagnosis.NEWER
    ]
    return Survey(
        device=device.name,
        sectors=device.sectors,
        copies=tuple(sorted(own, key=lambda copy: copy.header.copy_index)),
        failed=tuple(sorted(failed, key=lambda copy: copy.index)),
        claims=tuple(owner for owner, _count in owners),
        contested=contested,
        sizes=tuple(sorted(look.sizes.union(also))),
        newer=bool(look.newer),
        headers=tuple(look.headers.values()),
    )


def carries(devices: Mapping[int, Device], metadata: Metadata) -> bool:
    """Whether all of the target's spares are at this generation: a quick look.

    Copies 1 and 3 of each spare are read, of which a commit writes at least one before any spare's
    even copies. A spare may be behind because it takes no writes, and of another one a slot may, so
    one copy of one spare says nothing of the others.

    Args:
        devices: position in the list of spares to device.
        metadata: the generation.
    """
    return all(
        _is_at(device, spare_uuid_of(metadata, index), metadata.digest)
        for index, device in devices.items()
    )


def _is_at(device: Device, spare_uuid: uuid.UUID, digest: bytes) -> bool:
    found = []
    for sector in _QUICK_SECTORS:
        try:
            header = unpack_header(_read(device, sector, HEADER_BYTES), sector)
        except Invalid as error:
            if error.diagnosis is not Diagnosis.UNREADABLE:
                return False
        else:
            found.append((header.spare_uuid, header.digest) == (spare_uuid, digest))
    return bool(found) and all(found)


# Choice


def choose(surveys: Mapping[str, Survey], now_ns: int | None = None) -> Choice:
    """Choose the generation that counts among the copies of one target.

    Highest generation, then highest timestamp, then lowest copy index.

    Args:
        surveys: one survey for each device, by any key.
        now_ns: wall clock in nanoseconds, for the warning of timestamps in the future; None reads
            the clock.

    Raises:
        NewerFormat: a device carries a copy of a newer format.
        NoMetadata: there is no valid copy.
        Conflict: a device belongs to two spares alike, two devices are one spare, or the devices
            belong to several targets.
        SplitBrain: histories diverged.
    """
    _refuse_conflicts(surveys)
    found = [(key, copy) for key, seen in surveys.items() for copy in seen.copies]
    if not found:
        raise NoMetadata(_no_metadata(surveys), device=", ".join(surveys) or None)
    source, best = max(found, key=lambda item: _rank(item[1]))
    notices = check_lineage(best.metadata, found)
    metadata = best.metadata
    positions = {
        spare_uuid_of(metadata, index): index
        for index, entry in enumerate(metadata.config["spares"])
        if entry is not None
    }
    spares: dict[int, str] = {}
    stale = set()
    retired = set()
    damaged = {}
    for key, seen in surveys.items():
        if not seen.copies or seen.spare_uuid is None:
            continue
        if seen.spare_uuid not in positions:
            retired.add(key)
            notices.append(Notice("retired", key, "is no spare of the target any more"))
            continue
        index = positions[seen.spare_uuid]
        spares[index] = key
        laid_out = geometry_of(metadata, index).spare_sectors
        if seen.sectors < laid_out:
            message = f"has {seen.sectors} sectors, but was laid out for {laid_out}"
            notices.append(Notice("shrunk", key, message))
        if all(copy.header.generation < metadata.generation for copy in seen.copies):
            stale.add(key)
            continue
        faults = _faults(seen, metadata.generation)
        if faults:
            damaged[key] = faults
    now = time.time_ns() if now_ns is None else now_ns
    if metadata.timestamp_ns > now + CLOCK_SLACK_NS:
        ahead = (metadata.timestamp_ns - now) // 10**9
        message = (
            f"generation {metadata.generation} is from {ahead} s in the future; check the clocks"
        )
        notices.append(Notice("future", source, message))
    return Choice(
        metadata=metadata,
        source=source,
        spares=dict(sorted(spares.items())),
        stale=frozenset(stale),
        retired=frozenset(retired),
        damaged=damaged,
        notices=tuple(notices),
    )


def only(metadata: Metadata) -> Choice:
    """The choice of a generation that comes from elsewhere than a spare, such as from a backup."""
    nothing: frozenset[str] = frozenset()
    return Choice(metadata, "", {}, nothing, nothing, {}, ())


def _refuse_conflicts(surveys: Mapping[str, Survey]) -> None:
    newer = [key for key, seen in surveys.items() if seen.newer]
    if newer:
        raise NewerFormat(
            "carries metadata of a newer format",
            device=", ".join(newer),
            remedy="use a version of the collection that knows it",
        )
    for key, seen in surveys.items():
        if seen.contested:
            claims = " and ".join(
                f"spare {spare} of target {target}" for target, spare in seen.claims
            )
            raise Conflict(
                f"carries as many copies of {claims}",
                device=key,
                remedy="wipe it, or leave it out",
            )
    by_spare: dict[uuid.UUID, str] = {}
    by_target: dict[uuid.UUID, str] = {}
    for key, seen in surveys.items():
        if seen.target_uuid is None or seen.spare_uuid is None:
            continue
        if seen.spare_uuid in by_spare:
            raise Conflict(
                f"and {by_spare[seen.spare_uuid]} are both spare {seen.spare_uuid}: one is a clone",
                device=key,
                remedy="leave the clone out",
            )
        by_spare[seen.spare_uuid] = key
        by_target.setdefault(seen.target_uuid, key)
    if len(by_target) > 1:
        claims = ", ".join(f"{key} to {target}" for target, key in by_target.items())
        raise Conflict(
            f"the devices belong to different targets: {claims}",
            remedy="give the spares of one target",
        )


def _no_metadata(surveys: Mapping[str, Survey]) -> str:
    faults = Counter(
        copy.diagnosis.value
        for seen in surveys.values()
        for copy in seen.failed
        if copy.diagnosis is not Diagnosis.MAGIC
    )
    listed = ", ".join(f"{count} x {name}" for name, count in sorted(faults.items()))
    return "no valid copy of a target's metadata" + (f" ({listed})" if listed else "")


def is_ancestor(best: Metadata, generation: int, digest: bytes) -> bool | None:
    """Whether a generation is `best` or one that it descends from; None where nothing can tell.

    An ancestor's digest is in the history of `best`, which is complete until it is full.

    Args:
        best: the metadata that counts.
        generation: the other one's number.
        digest: its digest.
    """
    if digest in (best.digest, best.parent_digest):
        return True
    known = dict(best.history)
    if generation in known:
        return known[generation] == digest[:8]
    complete = len(best.history) < MAX_HISTORY and (
        bool(best.history) or best.parent_digest == NO_DIGEST
    )
    oldest = min(known, default=best.generation)
    if complete or not generation < min(oldest, best.generation - 1):
        return False
    return None


def _descent(best: Metadata, header: Header) -> bool | None:
    """What `is_ancestor` says of a copy, or else what was noted when its spare was missing."""
    found = is_ancestor(best, header.generation, header.digest)
    if found is None:
        last = last_common(best, header.spare_uuid)
        if last and header.generation >= last[0]:
            return (header.generation, header.digest[:8]) == last
    return found


def last_common(metadata: Metadata, spare_uuid: uuid.UUID) -> tuple[int, bytes] | None:
    """The newest generation that a missing spare can share: its number, 8 bytes of its digest.

    It is noted by the first commit of an activation without that spare, so that what comes back
    can be judged also when the history does not reach back so far. None where nothing is noted.
    """
    for entry in metadata.config["spares"]:
        if entry is not None and uuid.UUID(entry["uuid"]) == spare_uuid:
            noted = entry.get(LAST_COMMON)
            try:
                return int(noted["generation"]), bytes.fromhex(noted["digest"])
            except (KeyError, TypeError, ValueError):
                return None
    return None


def check_lineage(best: Metadata, found: Iterable[tuple[str, Copy]]) -> list[Notice]:
    """Refuse copies that are not ancestors of `best`; warn where nothing can tell.

    Args:
        best: the generation that counts.
        found: copies, each with the name of its device.

    Raises:
        SplitBrain: histories diverged.
    """
    unproved = set()
    for key, copy in found:
        descends = _descent(best, copy.header)
        if descends is False:
            raise _split_brain(best, found)
        if descends is None:
            unproved.add(key)
    message = f"is too old to prove that generation {best.generation} descends from it"
    return [Notice("unproved", key, message) for key in sorted(unproved)]


def _split_brain(best: Metadata, found: Iterable[tuple[str, Copy]]) -> SplitBrain:
    histories: dict[bytes, tuple[Header, set[str]]] = {}
    ancestors = {digest for _generation, digest in best.history}
    for key, copy in sorted(found, key=lambda item: _rank(item[1]), reverse=True):
        digest = copy.header.digest
        if digest != best.digest and digest[:8] in ancestors:
            continue
        histories.setdefault(digest, (copy.header, set()))[1].add(key)
    sides = tuple((header, tuple(sorted(keys))) for header, keys in histories.values())
    shown = " and ".join(
        f"generation {header.generation} ({header.digest.hex()[:16]}, timestamp"
        f" {header.timestamp_ns}, host {header.host_id}) on {', '.join(keys)}"
        for header, keys in sides
    )
    return SplitBrain(f"target {best.target_uuid} has histories that diverged: {shown}", sides)


def _faults(seen: Survey, generation: int) -> tuple[FailedCopy, ...]:
    behind = [
        FailedCopy(
            copy.header.copy_index,
            copy.header.sector,
            Diagnosis.SEQUENCE,
            f"sequence: generation {copy.header.generation}, but {generation} counts",
        )
        for copy in seen.copies
        if copy.header.generation < generation
    ]
    return tuple(sorted([*seen.failed, *behind], key=lambda copy: copy.index))


# Commit and repair


class _Slots:
    """The slots of one spare while they are read back and written."""

    def __init__(self, device: Device, spare_uuid: uuid.UUID, spare_sectors: int) -> None:
        self.device = device
        self.spare_uuid = spare_uuid
        self.spare_sectors = spare_sectors
        self.sectors = slot_sectors_of(spare_sectors)
        if device.sectors < spare_sectors:
            raise Refused(
                f"has {device.sectors} sectors, fewer than the {spare_sectors} it was laid out for",
                device=device.name,
                remedy="restore its size, or replace the spare",
            )
        self.written: list[int] = []
        self.failed: list[FailedCopy] = []
        self.behind: list[int] = []
        self.left_out: CommitFailed | None = None
        self.unreadable: set[int] = set()

    def headers(self) -> Iterator[tuple[int, Header, bytes]]:
        """Index, header and rounded-up body of each slot with a valid header.

        Raises:
            NewerFormat: a slot holds a copy of a newer format.
        """
        for index, sector in enumerate(self.sectors):
            raw = b""
            try:
                raw = self._read_start(sector)
                header = unpack_header(raw, sector)
            except Invalid as error:
                if error.diagnosis is Diagnosis.NEWER:
                    raise NewerFormat(
                        f"copy {index} is {error.message}",
                        device=self.device.name,
                        remedy="use a version of the collection that knows it",
                    ) from error
                if error.diagnosis is Diagnosis.UNREADABLE:
                    self.unreadable.add(index)
                continue
            try:
                rest = max(0, header.slot_bytes - len(raw))
                more = _read(self.device, sector + len(raw) // SECTOR_BYTES, rest) if rest else b""
                body = (raw + more)[HEADER_BYTES : header.slot_bytes]
            except Invalid:
                self.unreadable.add(index)
                body = b""
            yield index, header, body

    def _read_start(self, sector: int) -> bytes:
        """The header, and in the same read a body of the usual size, if both can be read."""
        try:
            return _read(self.device, sector, START_BYTES)
        except Invalid:
            return _read(self.device, sector, HEADER_BYTES)

    def holds(self, header: Header, body: bytes, metadata: Metadata | None) -> bool:
        """Whether a slot is exactly what would be written for `metadata`."""
        return (
            metadata is not None
            and header.spare_uuid == self.spare_uuid
            and header.spare_sectors == self.spare_sectors
            and _is_copy_of(header, body, metadata)
        )

    def write(self, indexes: Iterable[int], metadata: Metadata, step: Callable[[str], None]) -> int:
        """Write copies; one that fails is invalidated if possible and noted. Returns how many.

        Args:
            step: called with the copy's name after each write.
        """
        count = 0
        for index in indexes:
            raw = pack_slot(metadata, self.spare_uuid, self.spare_sectors, index)
            try:
                self.device.write(self.sectors[index], raw)
            except OSError as error:
                self._give_up(index, error)
            else:
                self.written.append(index)
                count += 1
                step(f"copy{index}/written")
        return count

    def _give_up(self, index: int, error: OSError) -> None:
        sector = self.sectors[index]
        message = f"sector {sector}: {error}"
        self.failed.append(FailedCopy(index, sector, Diagnosis.UNREADABLE, message))
        try:
            # An old copy that stays readable would be chosen if all others were lost.
            self.device.write(sector, bytes(HEADER_BYTES))
        except OSError:
            return

    def flush(self) -> None:
        try:
            self.device.flush()
        except OSError as error:
            raise CommitFailed(
                f"cannot be flushed: {error}", device=self.device.name, remedy="replace the spare"
            ) from error

    def result(self) -> Rewrite:
        reason = str(self.left_out) if self.left_out else ""
        return Rewrite(tuple(self.written), tuple(self.failed), tuple(self.behind), reason)


def _batches(good: Collection[int], write: Collection[int]) -> tuple[list[int], list[int]]:
    """Split the copies to write in two, so that the first leaves a good one alone, if any is.

    Odd and far copies come first. Only where no even copy is good, one good copy is kept alone; and
    where only even ones are, one of them comes first, because slots that cannot be read may take a
    write and still not read.
    """
    keep = set(EVEN_COPIES)
    if good and not keep & set(good):
        keep = {max(good)}
    elif len(good) > 1 and keep >= set(good):
        keep.remove(min(good))
    ordered = sorted(write)
    return (
        [index for index in ordered if index not in keep],
        [index for index in ordered if index in keep],
    )


def _ignore_step(_name: str) -> None:
    return


class PreparedCommit:
    """A commit that was checked and only has to be written; made by `prepare_commit`."""

    def __init__(
        self, new: Metadata, plans: list[tuple[int, _Slots, tuple[list[int], list[int]]]]
    ) -> None:
        self._new = new
        self._plans = plans

    def write(self, step: Callable[[str], None] = _ignore_step) -> dict[int, Rewrite]:
        """Write on every device the odd and far copies, flush, then the even ones, flush.

        A copy that cannot be written is reported, not fatal, while its device gets at least one. A
        device that takes none, or no flush, is left out from there on and reported, not fatal
        while another one takes the generation whole.

        Args:
            step: called after each single write and flush, as spare0/copy1/written,
                spare0/first/flushed, spare0/second/flushed.

        Returns:
            What was done, by position.

        Raises:
            CommitFailed: no device took the generation whole.
        """
        for number, phase in enumerate(("first", "second")):
            for index, slots, batches in self._taking():
                done = slots.write(batches[number], self._new, _prefixed(step, f"spare{index}"))
                if number == 0 and not done:
                    slots.left_out = CommitFailed(
                        f"took no copy of generation {self._new.generation}:"
                        f" {slots.failed[0].message}",
                        device=slots.device.name,
                        remedy="replace the spare",
                    )
            for index, slots, _batches_of_it in self._taking():
                try:
                    slots.flush()
                except CommitFailed as error:
                    slots.left_out = error
                else:
                    step(f"spare{index}/{phase}/flushed")
            if not self._taking():
                raise next(slots.left_out for _index, slots, _b in self._plans if slots.left_out)
        return {index: slots.result() for index, slots, _batches_of_it in self._plans}

    def _taking(self) -> list[tuple[int, _Slots, tuple[list[int], list[int]]]]:
        return [plan for plan in self._plans if plan[1].left_out is None]


def prepare_commit(
    devices: Mapping[int, Device],
    current: Metadata | None,
    new: Metadata,
    stale: Collection[int] = (),
) -> PreparedCommit:
    """Read back and check everything that must hold before `new` is written to all devices.

    A device of which no slot can be read has failed, and is left out while there is another one.
    One that can be read and does not hold what it should contradicts what this host knows, and
    stops the commit.

    Args:
        devices: position in new's list of spares to device; a spare that is gone is left out.
        current: the generation that the devices carry; None for a target's first.
        new: a successor of current.
        stale: positions of devices that do not have to carry current: new or returned spares.

    Raises:
        BadMetadata: new is wrong or too large. Nothing was written.
        AnotherWriter: a device carries a generation above current, or copies of something else.
            Nothing was written.
        LostWrite: a device does not carry current any more. Nothing was written.
        CommitFailed: no device can be read. Nothing was written.
        NewerFormat: a device carries a copy of a newer format. Nothing was written.
    """
    if not devices:
        raise Refused("no spare to commit to", remedy="attach a spare of the target")
    if current is not None and (
        new.target_uuid != current.target_uuid
        or new.generation <= current.generation
        or new.parent_digest != current.digest
    ):
        raise Refused(f"generation {new.generation} does not follow {current.generation}")
    # Packing checks it all before anything is written.
    new_digest = new.digest
    plans = []
    for index, device in sorted(devices.items()):
        slots = _Slots(device, spare_uuid_of(new, index), geometry_of(new, index).spare_sectors)
        expected = None if index in stale else current
        good = _read_back(slots, expected, new, new_digest)
        plans.append((index, slots, _batches(good, range(COPIES))))
    failed = [slots.left_out for _index, slots, _batches_of_it in plans if slots.left_out]
    if len(failed) == len(plans):
        raise failed[0]
    return PreparedCommit(new, plans)


def commit(
    devices: Mapping[int, Device],
    current: Metadata | None,
    new: Metadata,
    step: Callable[[str], None] = _ignore_step,
    stale: Collection[int] = (),
) -> dict[int, Rewrite]:
    """Make `new` the generation on all devices, in an order that no crash can break.

    The arguments and errors are those of `prepare_commit` and `PreparedCommit.write`.
    """
    return prepare_commit(devices, current, new, stale).write(step)


def _prefixed(step: Callable[[str], None], prefix: str) -> Callable[[str], None]:
    return lambda name: step(f"{prefix}/{name}")


def _read_back(
    slots: _Slots, current: Metadata | None, new: Metadata, new_digest: bytes
) -> set[int]:
    """Indexes of the copies that hold current or new; refuses what must not be overwritten."""
    good = set()
    lower: list[tuple[int, int]] = []
    name = slots.device.name
    for index, header, body in slots.headers():
        if (header.target_uuid, header.spare_uuid) != (new.target_uuid, slots.spare_uuid):
            raise AnotherWriter(
                f"copy {index} is of spare {header.spare_uuid} of target {header.target_uuid}",
                device=name,
                remedy="repair it, or wipe it before it becomes a spare",
            )
        if slots.holds(header, body, current) or slots.holds(header, body, new):
            good.add(index)
            continue
        limit = current.generation if current else new.generation - 1
        expected = {new_digest} | ({current.digest} if current else set())
        if header.digest not in expected and (
            header.generation > limit or (current and header.generation == limit)
        ):
            raise AnotherWriter(
                f"copy {index} is of generation {header.generation} ({header.digest.hex()[:16]}),"
                f" which this host did not write",
                device=name,
                remedy="read the metadata again and decide anew",
            )
        if header.generation < limit:
            lower.append((index, header.generation))
    if current is not None and len(slots.unreadable) == COPIES:
        slots.left_out = CommitFailed(
            "cannot be read where its copies of the metadata are",
            device=name,
            remedy="replace the spare",
        )
    elif current is not None and not good:
        found = (
            f"only generation {max(generation for _index, generation in lower)}" if lower else ""
        )
        raise LostWrite(
            f"does not carry generation {current.generation} that was committed to it,"
            f" but {found or 'no valid copy'}",
            device=name,
            remedy="it drops writes or was overwritten; replace the spare",
        )
    slots.behind = [index for index, _generation in lower] if current is not None else []
    return good


def repair(device: Device, choice: Choice, spare_uuid: uuid.UUID) -> Rewrite:
    """Bring every copy on `device` to the chosen generation; good copies are left alone.

    Args:
        device: a spare of the target, damaged, stale or even blank.
        choice: what counts.
        spare_uuid: which spare the device is.

    Returns:
        What was done. Copies that could not be written are listed, and the others are good.

    Raises:
        Refused: the device is not that spare, or is smaller than when it was laid out.
        AnotherWriter: the device carries a newer generation than chosen.
        NewerFormat: the device carries a copy of a newer format.
        CommitFailed: no copy could be written.
    """
    metadata = choice.metadata
    seen = survey(device)
    _refuse_conflicts({device.name: seen})
    index = next(
        (
            position
            for position, entry in enumerate(metadata.config["spares"])
            if entry is not None and spare_uuid_of(metadata, position) == spare_uuid
        ),
        None,
    )
    if index is None or (seen.copies and seen.spare_uuid != spare_uuid):
        raise Refused(
            f"is not spare {spare_uuid} of target {metadata.target_uuid}",
            device=device.name,
            remedy="leave it out, or wipe it first",
        )
    if seen.copies and seen.target_uuid != metadata.target_uuid:
        raise Refused("belongs to another target", device=device.name, remedy="leave it out")
    for copy in seen.copies:
        if copy.header.generation > metadata.generation or (
            copy.header.generation == metadata.generation and copy.header.digest != metadata.digest
        ):
            raise AnotherWriter(
                f"carries generation {copy.header.generation}, but not what was chosen",
                device=device.name,
                remedy="read the metadata again and decide anew",
            )
    slots = _Slots(device, spare_uuid, geometry_of(metadata, index).spare_sectors)
    good = _good_copies(slots, metadata)
    slots.behind = [
        copy.header.copy_index
        for copy in seen.copies
        if good and copy.header.generation < metadata.generation
    ]
    for batch in _batches(good, set(range(COPIES)) - good):
        if batch:
            slots.write(batch, metadata, _ignore_step)
            slots.flush()
    _note_unwritten(slots, _good_copies(slots, metadata))
    return slots.result()


def _good_copies(slots: _Slots, metadata: Metadata) -> set[int]:
    return {index for index, header, body in slots.headers() if slots.holds(header, body, metadata)}


def _note_unwritten(slots: _Slots, good: Collection[int]) -> None:
    """Move what was acknowledged but does not read back from written to failed."""
    for index in [index for index in slots.written if index not in good]:
        slots.written.remove(index)
        sector = slots.sectors[index]
        message = f"sector {sector}: was written and does not read back"
        slots.failed.append(FailedCopy(index, sector, Diagnosis.UNREADABLE, message))
    if not good:
        raise CommitFailed(
            "holds no good copy after its repair", device=slots.device.name, remedy="replace it"
        )


def wipe(device: Device, seen: Survey) -> tuple[int, ...]:
    """Overwrite every slot, so that no later survey finds a copy.

    Slots are the near ones, those of every size that a valid header gave, those of the sizes that
    the survey was told, and those that hold or may hold a copy. An empty device is not touched.

    A crash on the way leaves copies of the newest generation or none, never only older ones or
    another target's: these lose their bodies first. Far slots go next, while near headers tell
    where they are.

    Args:
        device: open for writing.
        seen: its survey.

    Returns:
        The first sectors of the slots that were overwritten.

    Raises:
        DmRemapError: a slot could not be overwritten, or still holds a copy.
    """
    if seen.empty:
        return ()
    far = {sector for size in seen.sizes for sector in _far_sectors(size)}
    far |= {copy.sector for copy in seen.failed if copy.diagnosis is not Diagnosis.MAGIC}
    far -= set(NEAR_SECTORS)
    sectors = (*sorted(far, reverse=True), *reversed(NEAR_SECTORS))
    _spoil_older(device, seen)
    wiped = []
    failed = []
    for sector in sectors:
        room = (device.sectors - sector) * SECTOR_BYTES
        if room < HEADER_BYTES:
            continue
        try:
            device.write(sector, bytes(min(WIPE_BYTES, room // HEADER_BYTES * HEADER_BYTES)))
            wiped.append(sector)
        except OSError as error:
            failed.append(f"sector {sector}: {error}")
    try:
        device.flush()
    except OSError as error:
        failed.append(f"flush: {error}")
    failed += [f"sector {sector} still holds a copy" for sector in _marked(device, wiped)]
    if failed:
        raise DmRemapError(
            "could not be wiped: " + ", ".join(failed),
            device=device.name,
            remedy="do not use it again as it is; erase the whole device",
        )
    return tuple(wiped)


def _spoil_older(device: Device, seen: Survey) -> None:
    """Make all copies invalid but those of the newest generation; their headers stay.

    Where nobody can say whose spare the device is, that is all of them.

    What fails here fails in the wipe itself too, and is reported there.
    """
    newest = max((copy.header.generation for copy in seen.copies), default=0)
    older = [
        copy.header.sector
        for copy in seen.copies
        if seen.contested or copy.header.generation < newest
    ]
    older += [copy.sector for copy in seen.failed if copy.diagnosis is Diagnosis.FOREIGN]
    with contextlib.suppress(OSError):
        for sector in older:
            with contextlib.suppress(OSError):
                device.write(sector + HEADER_SECTORS, bytes(HEADER_BYTES))
        if older:
            device.flush()


def _marked(device: Device, sectors: Iterable[int]) -> Iterator[int]:
    for sector in sectors:
        try:
            raw = _read(device, sector, HEADER_BYTES)
        except Invalid:
            continue
        if raw.startswith(MAGIC):
            yield sector
