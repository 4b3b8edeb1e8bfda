# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which targets the devices of a host make up, and what each of them is refused for.

`decide` is pure: devices that were looked at go in, a decision with its reason for each target
comes out. `scan` looks at all devices of the host. docs/identity.md has the table of cases.
"""

from __future__ import annotations

import enum
import queue
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Protocol

from . import blockdev, copies, kernel_v4, replacement, stack
from .backups import Backups
from .blockdev import DeviceInfo, Listed
from .copies import Choice, FailedCopy, SplitBrain, Survey
from .devmapper import MappedDevice, check_name
from .errors import DmRemapError, Refused, count_of
from .fingerprint import (
    Fingerprint,
    Match,
    Verdict,
    compare,
    in_words,
    of_entry,
    of_info,
    unrelated,
    with_content,
)
from .format import Diagnosis, Metadata
from .marks import SMALLEST_FAR_SECTORS

# Devices that are read at once.
WORKERS = 16
# A healthy disk that has to spin up first takes about this long.
READ_SECONDS = 20.0


class State(enum.Enum):
    """What can be done with a target that was found."""

    COMPLETE = "complete"
    DEGRADED = "degraded"
    REFUSED = "refused"
    ACTIVE = "active"


@dataclass(frozen=True)
class Found:
    """A device that was looked at.

    Attributes:
        info: what the kernel and udev know of it.
        survey: what its slots hold; None where they were not read.
        fingerprint: who it is.
        kernel_spare: it looks like a spare of the kernel target dm-remap-v4.
        error: why it was not, or not wholly, read.
        holders: device numbers of what stands on it.
    """

    info: DeviceInfo
    survey: Survey | None
    fingerprint: Fingerprint
    kernel_spare: bool = False
    error: str = ""
    holders: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """The device's path, by which decisions name it."""
        return self.info.path

    @property
    def carries(self) -> uuid.UUID | None:
        """Target of a header that is on it, whole or of a newer format; None without one."""
        if self.survey is None:
            return None
        named = [header.target_uuid for header in self.survey.headers]
        return next(iter([*named, *(target for target, _spare in self.survey.claims)]), None)


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be.

    Attributes:
        code: what it is, for programs; docs/identity.md lists all.
        device: path of the device, the UUID of a spare, or "".
        message: what is wrong, a sentence without a full stop.
        remedy: what to do.
        refuses: the target is not to be activated because of it.
    """

    code: str
    device: str
    message: str
    remedy: str = ""
    refuses: bool = False

    def __str__(self) -> str:
        return str(DmRemapError(self.message, self.device or None, self.remedy or None))

    def to_dict(self) -> dict[str, Any]:
        """As it is returned to the user."""
        return {
            "code": self.code,
            "device": self.device,
            "message": self.message,
            "remedy": self.remedy,
            "refuses": self.refuses,
        }


@dataclass(frozen=True)
class Missing:
    """A configured spare that is not there.

    Attributes:
        index: its position in the configuration.
        uuid: its UUID.
        identity: what is recorded of it, for people.
        chunks: remapped chunks that are on it only.
    """

    index: int
    uuid: uuid.UUID
    identity: str
    chunks: int


@dataclass(frozen=True)
class Side:
    """One of the histories of a split brain: its newest generation, and the devices with it."""

    generation: int
    digest: str
    timestamp_ns: int
    host_id: uuid.UUID
    devices: tuple[str, ...]


@dataclass(frozen=True)
class TargetFound:
    """A target, and what it is to be activated from.

    Attributes:
        uuid: the target's own.
        name: its name in the metadata, or of the active target; "" where nobody knows.
        state: what can be done with it.
        decision: that and why, a sentence without a full stop.
        problems: all that is not as it should be, those that refuse first.
        choice: the generation that counts, and the spares by their paths; None where none could be
            chosen.
        main: the main, if it is there and certain.
        main_match: why it is taken for the main.
        new_main: while the main is being replaced, the device that replaces it.
        spares: the spares that are there, by their position.
        missing: those that are not.
        clones: devices that carry a copy of a member's content.
        sides: of a split brain.
    """

    uuid: uuid.UUID
    name: str
    state: State
    decision: str
    problems: tuple[Problem, ...] = ()
    choice: Choice | None = None
    main: DeviceInfo | None = None
    main_match: Match | None = None
    new_main: DeviceInfo | None = None
    spares: Mapping[int, DeviceInfo] = field(default_factory=dict)
    missing: tuple[Missing, ...] = ()
    clones: tuple[str, ...] = ()
    sides: tuple[Side, ...] = ()

    @property
    def metadata(self) -> Metadata | None:
        """The generation that counts."""
        return self.choice.metadata if self.choice else None

    @property
    def stale(self) -> tuple[str, ...]:
        """Paths of spares that carry an older generation and have to be brought up to date."""
        return tuple(sorted(self.choice.stale)) if self.choice else ()

    @property
    def retired(self) -> tuple[str, ...]:
        """Paths of devices that are no spares of it any more."""
        return tuple(sorted(self.choice.retired)) if self.choice else ()

    @property
    def damaged(self) -> Mapping[str, tuple[FailedCopy, ...]]:
        """Copies that have to be written anew, by the spare's path."""
        return self.choice.damaged if self.choice else {}

    @property
    def missing_chunks(self) -> int:
        """Remapped chunks that are on missing spares only, and would read as errors."""
        return sum(spare.chunks for spare in self.missing)

    def to_dict(self) -> dict[str, Any]:
        """As it is returned to the user."""
        metadata = self.metadata
        return {
            "uuid": str(self.uuid),
            "name": self.name,
            "state": self.state.value,
            "decision": self.decision,
            "generation": metadata.generation if metadata else None,
            "main": self.main.path if self.main else None,
            "confidence": self.main_match.confidence if self.main_match else None,
            "new_main": self.new_main.path if self.new_main else None,
            "spares": [
                {"index": index, "path": info.path} for index, info in sorted(self.spares.items())
            ],
            "missing": [
                {
                    "index": spare.index,
                    "uuid": str(spare.uuid),
                    "identity": spare.identity,
                    "chunks": spare.chunks,
                }
                for spare in self.missing
            ],
            "stale": list(self.stale),
            "retired": list(self.retired),
            "damaged": [
                {
                    "path": path,
                    "copies": [
                        {"copy": copy.index, "diagnosis": copy.diagnosis.value} for copy in failed
                    ],
                }
                for path, failed in sorted(self.damaged.items())
            ],
            "clones": list(self.clones),
            "sides": [
                {
                    "generation": side.generation,
                    "digest": side.digest,
                    "timestamp_ns": side.timestamp_ns,
                    "host_id": str(side.host_id),
                    "devices": list(side.devices),
                }
                for side in self.sides
            ],
            "problems": [problem.to_dict() for problem in self.problems],
        }


@dataclass(frozen=True)
class Discovery:
    """What the devices of a host make up.

    Attributes:
        targets: by name and UUID.
        others: problems with devices that belong to no target that could be named.
    """

    targets: tuple[TargetFound, ...]
    others: tuple[Problem, ...]

    def to_dict(self) -> dict[str, Any]:
        """As it is returned to the user."""
        return {
            "targets": [target.to_dict() for target in self.targets],
            "others": [problem.to_dict() for problem in self.others],
        }


@dataclass(frozen=True)
class Overrides:
    """What the operator has decided. Devices are named by path or by `major:minor`.

    Attributes:
        use: for a target, a spare whose side of a split brain counts; a clone that is named is the
            spare, and the other devices that claim to be it are left out.
        main: for a target, the device that is its main, whatever its fingerprint says. Size and
            block size must fit all the same.
    """

    use: Mapping[uuid.UUID, str] = field(default_factory=dict)
    main: Mapping[uuid.UUID, str] = field(default_factory=dict)


def decide(
    found: Sequence[Found],
    active: Mapping[uuid.UUID, str] | None = None,
    kept: Mapping[uuid.UUID, Metadata] | None = None,
    overrides: Overrides | None = None,
    now_ns: int | None = None,
    removed: Mapping[uuid.UUID, str] | None = None,
) -> Discovery:
    """Decide for each target that a device tells of. Never raises for what is on the devices.

    Args:
        found: all devices that were looked at.
        active: names of the active targets by UUID.
        kept: the newest generation of targets that the host has a backup of.
        overrides: what the operator has decided.
        now_ns: wall clock in nanoseconds since 1970; None reads it.
        removed: paths of the host's notes of targets that were removed on purpose.
    """
    running = active or {}
    said = overrides or Overrides()
    now = time.time_ns() if now_ns is None else now_ns
    groups: dict[uuid.UUID, list[Found]] = {target: [] for target in running}
    for device in found:
        for target in _targets_of(device):
            groups.setdefault(target, []).append(device)
    targets = [
        _Judge(target, members, found, said, running.get(target), (kept or {}).get(target)).judge(
            now
        )
        for target, members in groups.items()
    ]
    targets = _check_names(_check_mains(_check_removed(targets, removed or {})), running)
    targets.sort(key=lambda item: (item.name, item.uuid))
    return Discovery(tuple(targets), tuple(_others(found)))


def _targets_of(found: Found) -> list[uuid.UUID]:
    """Targets that a device matters to: its own, or all that it may be of."""
    seen = found.survey
    if seen is None or not seen.claims:
        return []
    several = seen.contested or seen.newer
    claims = seen.claims if several else seen.claims[:1]
    return list(dict.fromkeys(target for target, _spare in claims))


def _others(found: Iterable[Found]) -> Iterator[Problem]:
    for device in found:
        seen = device.survey
        if device.kernel_spare:
            yield Problem(
                "kernel_spare",
                device.path,
                "is a spare of the kernel target dm-remap-v4",
                "migrate it; until then leave it as it is",
            )
        if device.error:
            yield Problem("unreadable", device.path, device.error, "check the device and its cable")
        elif seen is not None and not seen.empty and not seen.claims:
            kinds = {copy.diagnosis for copy in seen.failed} - {Diagnosis.MAGIC}
            text = ", ".join(sorted(kind.value for kind in kinds))
            if kinds == {Diagnosis.UNREADABLE}:
                yield Problem(
                    "unreadable",
                    device.path,
                    "cannot be read everywhere where copies of metadata can be",
                    "if it is a spare, it has failed; else this is of no importance here",
                )
            else:
                yield Problem(
                    "damaged",
                    device.path,
                    f"has been a spare, and none of its copies of the metadata is whole ({text})",
                    "restore the metadata from the target's other spares or the host's backup",
                )


class _Judge:
    """Comes to the decision for one target."""

    def __init__(
        self,
        target: uuid.UUID,
        members: Sequence[Found],
        found: Sequence[Found],
        said: Overrides,
        running: str | None,
        kept: Metadata | None,
    ) -> None:
        self.target = target
        self.members = members
        self.found = found
        self.use = said.use.get(target)
        self.named_main = said.main.get(target)
        self.running = running
        self.kept = kept
        self.problems: list[Problem] = []
        self.clones: list[str] = []
        self.sides: tuple[Side, ...] = ()
        # Devices that are left out although they carry copies of the target.
        self.aside: list[Found] = []

    def note(
        self, code: str, device: str, message: str, remedy: str = "", refuses: bool = False
    ) -> None:
        self.problems.append(Problem(code, device, message, remedy, refuses))

    def refuse(self, code: str, device: str, message: str, remedy: str) -> None:
        self.note(code, device, message, remedy, refuses=True)

    def judge(self, now: int) -> TargetFound:
        choice = self._choose(now)
        if choice is None:
            return self._result(None)
        own = {index: self._by_path(path) for index, path in choice.spares.items()}
        self._check_members(choice, own)
        missing = self._missing(choice, own)
        main, match, new = self._mains(choice.metadata, own)
        return self._result(choice, main, match, new, own, missing)

    def _by_path(self, path: str) -> Found:
        return next(device for device in self.members if device.path == path)

    # Which generation counts

    def _choose(self, now: int) -> Choice | None:
        claimants = self._usable()
        if self.use is not None and not any(_is_named(c, self.use) for c in claimants):
            self.refuse(
                "no_such_device",
                self.use,
                "is no spare of the target that can be used",
                "name one of its spares",
            )
            return None
        own = self._without_clones(claimants)
        surveys = {device.path: _survey(device) for device in own}
        choice = self._chosen(surveys, now)
        if choice is not None:
            self._check_left_out(choice)
            self._check_backup(choice)
        return choice

    def _usable(self) -> list[Found]:
        """Devices whose copies may count: none of a newer format, and none of two spares."""
        usable = []
        for device in self.members:
            seen = _survey(device)
            if seen.newer:
                self.refuse(
                    "newer_format",
                    device.path,
                    "carries metadata of a newer format",
                    "use a version of the collection that knows it",
                )
            elif seen.contested:
                self.note(
                    "contested",
                    device.path,
                    "carries as many copies of one spare as of another one",
                    "wipe it, or leave it out",
                )
                self.aside.append(device)
            elif seen.copies:
                usable.append(device)
        return usable

    def _without_clones(self, claimants: Sequence[Found]) -> list[Found]:
        """One device for each spare's UUID, by what is recorded of its hardware."""
        entries = _entries(claimants)
        by_spare: dict[uuid.UUID | None, list[Found]] = {}
        for device in claimants:
            by_spare.setdefault(_survey(device).spare_uuid, []).append(device)
        own = []
        for spare, devices in by_spare.items():
            tops = self._tops(devices)
            chosen = self._one_of(tops, of_entry(entries.get(spare)), spare)
            own += chosen
            self.aside += [device for device in tops if device not in chosen]
        return own

    def _tops(self, devices: Sequence[Found]) -> list[Found]:
        """Without those that another of them stands on, such as the paths below a multipath."""
        numbers = {device.info.devno for device in devices}
        return [device for device in devices if not numbers.intersection(device.holders)]

    def _one_of(
        self, devices: Sequence[Found], recorded: Fingerprint, spare: uuid.UUID | None
    ) -> list[Found]:
        named = [device for device in devices if self.use and _is_named(device, self.use)]
        if named:
            for device in devices:
                if device not in named:
                    self.note(
                        "left_out",
                        device.path,
                        f"claims to be spare {spare} as well, but {named[0].path} was named",
                        "detach it, or wipe it",
                    )
            return named[:1]
        matches = {device.path: _spare_match(recorded, device) for device in devices}
        sure = [device for device in devices if matches[device.path].is_it]
        doubtful = [d for d in devices if matches[d.path].verdict is Verdict.PROBABLY]
        doubtful += [d for d in devices if matches[d.path].verdict is Verdict.UNKNOWN]
        others = [device for device in devices if device not in sure and device not in doubtful]
        if len(sure) > 1 or (not sure and len(doubtful) > 1):
            both = sure or doubtful
            paths = " and ".join(device.path for device in both)
            self.refuse(
                "duplicate_spare",
                both[0].path,
                f"{paths} are all spare {spare}, and what is recorded of it does not tell which: "
                "one is a clone, or they are paths to one disk",
                "detach the clone, use multipath, or name the one to use",
            )
            return []
        if doubtful and others and not sure:
            # Who is left may only lack what would show that it is a clone too.
            self.refuse(
                "duplicate_spare",
                doubtful[0].path,
                f"and {others[0].path} claim to be spare {spare}: the second is not it, the first "
                f"cannot be proved to be ({_because(matches[doubtful[0].path])})",
                "attach the spare itself, or name the one to use",
            )
            return []
        for device in others:
            self._clone(device, matches[device.path], f"spare {spare}", bool(sure))
        if doubtful and not sure:
            device = doubtful[0]
            self.note(
                "unproved_spare",
                device.path,
                f"is spare {spare} by its content only ({_because(matches[device.path])})",
                "be sure that it is no clone",
            )
            return [device]
        for device in [*doubtful, *sure] if sure else ():
            if device in doubtful:
                self._clone(device, matches[device.path], f"spare {spare}", True)
            elif "sectors" in matches[device.path].differs:
                self.note("resized", device.path, "has another size than when it became a spare")
        return sure

    def _clone(self, device: Found, match: Match, role: str, original: bool) -> None:
        self.clones.append(device.path)
        self.note(
            "clone_spare",
            device.path,
            f"carries the content of {role} and is another device ({_because(match)}), so it is "
            "left out",
            "detach it, or wipe it" if original else "attach the spare itself, or name this one",
        )

    def _chosen(self, surveys: Mapping[str, Survey], now: int) -> Choice | None:
        if not surveys:
            if not any(problem.refuses for problem in self.problems):
                self.refuse(
                    "no_copy",
                    "",
                    "no device that surely is one of its spares carries its metadata",
                    "attach one of its spares",
                )
            return None
        try:
            return copies.choose(surveys, now)
        except SplitBrain as error:
            self.sides = tuple(
                Side(
                    header.generation,
                    header.digest.hex(),
                    header.timestamp_ns,
                    header.host_id,
                    devices,
                )
                for header, devices in error.sides
            )
            if self.use is not None:
                return self._named_side(surveys, now)
            self.refuse(
                "split_brain",
                "",
                error.message,
                "name a spare of the side to keep; what only the other side has is lost then",
            )
        except Refused as error:
            self.refuse("conflict", error.device or "", error.message, error.remedy or "")
        return None

    def _named_side(self, surveys: Mapping[str, Survey], now: int) -> Choice | None:
        """The choice among the named spare and those that do not contradict it."""
        named = next(path for path in surveys if _is_named(self._by_path(path), self.use or ""))
        side = {named: surveys[named]}
        choice = copies.choose(side, now)
        first = choice.metadata.generation
        for path, seen in surveys.items():
            wider = _choose_or_none({**side, path: seen}, now)
            if wider is not None:
                side[path], choice = seen, wider
                continue
            alone = _choose_or_none({named: surveys[named], path: seen}, now)
            if alone is not None and alone.metadata.generation > first:
                self.refuse(
                    "split_brain",
                    named,
                    f"is older than the histories on {choice.source} and on {path}, and in both",
                    "name the one of these two to keep",
                )
                return None
            self.note(
                "left_out",
                path,
                f"is of the other history, and {named} was named",
                "wipe it before it becomes a spare again",
            )
        return choice

    def _check_left_out(self, choice: Choice) -> None:
        """Refuse what is older than, or besides, what a device that was left out carries."""
        metadata = choice.metadata
        if self.use is not None:
            return
        for device in self.aside:
            for copy in _survey(device).copies:
                header = copy.header
                newer = header.generation > metadata.generation
                other = header.generation == metadata.generation
                if header.target_uuid == self.target and (
                    newer or (other and header.digest != metadata.digest)
                ):
                    self.refuse(
                        "newer_elsewhere",
                        device.path,
                        f"is left out and carries generation {header.generation}, but the newest "
                        f"of the others is {metadata.generation}",
                        "find out which one was in use last, and name it",
                    )
                    break

    def _check_backup(self, choice: Choice) -> None:
        generation = choice.metadata.generation
        if self.use is not None or self.running is not None:
            return
        if self.kept is not None and self.kept.generation > generation:
            self.refuse(
                "older_than_backup",
                choice.source,
                f"carries generation {generation}, but this host has committed generation "
                f"{self.kept.generation}; its remaps would be lost",
                "attach the spare with the newer one, or restore it from the host's backup",
            )

    # Members

    def _check_members(self, choice: Choice, own: Mapping[int, Found]) -> None:
        ours = set(stack.part_names(_name_of(choice.metadata)))
        for device in own.values():
            self._check_free(device, ours, "spare")
            content = device.fingerprint.fs_type
            if not device.fingerprint.partition:
                content = content or device.fingerprint.table_type
            if device.kernel_spare:
                content = content or "a spare of dm-remap-v4"
            if content:
                self.refuse(
                    "reused",
                    device.path,
                    f"carries the target's metadata, but was used for {content} since",
                    "save what is on it, and leave it out",
                )
        for notice in choice.notices:
            self.note(notice.code, notice.key, notice.message)
        for path in sorted(choice.stale):
            self.note(
                "stale",
                path,
                f"carries an older generation than {choice.metadata.generation}",
                "it is brought up to date when the target is activated",
            )
        for path, failed in sorted(choice.damaged.items()):
            text = ", ".join(f"copy {copy.index}: {copy.diagnosis.value}" for copy in failed)
            self.note("damaged_copies", path, text, "they are repaired when it is activated")

    def _check_free(self, device: Found, ours: Collection[str], role: str) -> None:
        if self.running is not None:
            return
        uses = [str(use) for use in device.info.used_by if use.by not in ours]
        if uses:
            self.refuse(
                "in_use",
                device.path,
                f"is in use and cannot be a {role}: {', '.join(uses)}",
                "unmount or release it first",
            )
        if device.info.read_only:
            self.refuse("read_only", device.path, "is read-only", f"attach the {role} writable")

    def _missing(self, choice: Choice, own: Mapping[int, Found]) -> tuple[Missing, ...]:
        metadata = choice.metadata
        found = []
        for index in choice.missing:
            entry = metadata.config["spares"][index]
            recorded = of_entry(entry)
            spare = Missing(
                index,
                uuid.UUID(entry["uuid"]),
                _identity(recorded),
                sum(e.length for e in metadata.extents if e.spare == index),
            )
            found.append(spare)
            held = f"with {count_of(spare.chunks, 'remapped chunk')} on it only"
            self.note(
                "missing_data" if spare.chunks else "missing_spare",
                entry["uuid"],
                f"spare {index} ({spare.identity}) is missing, "
                + (held if spare.chunks else "and holds no remapped chunk that is known of"),
                "attach it; whether it carries a newer generation cannot be known without it",
            )
            for device in self.found:
                blank = device.survey is not None and not device.survey.claims
                if blank and _spare_match(recorded, device).is_it:
                    self.note(
                        "blank_spare",
                        device.path,
                        f"is spare {index} by its hardware, but carries no whole copy: it was "
                        "overwritten, or has another size than when it became a spare and no near "
                        "copy that tells it",
                        "give it its old size back, or restore its metadata",
                    )
        return tuple(found)

    # The main

    def _mains(
        self, metadata: Metadata, own: Mapping[int, Found]
    ) -> tuple[Found | None, Match | None, Found | None]:
        entry = metadata.config["main"]
        ours = set(stack.part_names(_name_of(metadata)))
        used = {device.info.devno for device in own.values()}
        free = [d for d in self.found if d.info.devno not in used]
        if not replacement.under_way(metadata):
            main, match = self._main(entry, free, "main", ours, self.named_main)
            return main, match, None
        if self.named_main is not None:
            self.refuse(
                "replacement",
                self.named_main,
                "cannot be named as the main while one disk replaces another, because the target "
                "is on both",
                "attach both disks, or give the target module one of them",
            )
        main, match = self._main(entry, free, "old main", ours, None)
        new, _match = self._main(
            metadata.config["replacement"]["main"], free, "new main", ours, None
        )
        return main, match, new

    def _main(
        self,
        entry: Mapping[str, Any],
        devices: Sequence[Found],
        role: str,
        ours: Collection[str],
        named: str | None,
    ) -> tuple[Found | None, Match | None]:
        recorded = of_entry(entry)
        # Naming one shows how it differs. Else most devices have nothing to do with this main.
        devices = [
            device
            for device in devices
            if named is not None or not unrelated(recorded, device.fingerprint)
        ]
        matches = {device.info.devno: compare(recorded, device.fingerprint) for device in devices}
        if named is not None:
            return self._named_main(recorded, devices, matches, ours, named)
        by_verdict: dict[Verdict, list[Found]] = {verdict: [] for verdict in Verdict}
        for device in devices:
            by_verdict[matches[device.info.devno].verdict].append(device)
        same = self._tops([*by_verdict[Verdict.SAME], *by_verdict[Verdict.REFORMATTED]])
        for device in by_verdict[Verdict.CLONE]:
            self._clone_of_main(device, matches[device.info.devno], role, len(same) == 1)
        if len(same) > 1:
            paths = " and ".join(device.path for device in same)
            self.refuse(
                "duplicate_main",
                same[0].path,
                f"{paths} all have what is recorded of the {role}: one is a clone, or they are "
                "paths to one disk",
                "detach the clone, use multipath, or name the main",
            )
            return None, None
        if same:
            self._check_main(same[0], matches[same[0].info.devno], role, ours)
            return same[0], matches[same[0].info.devno]
        self._no_main(recorded, by_verdict, matches, role)
        return None, None

    def _clone_of_main(self, device: Found, match: Match, role: str, original: bool) -> None:
        self.clones.append(device.path)
        self.note(
            "clone_main",
            device.path,
            f"carries the content of the {role} and is another device ({_because(match)})",
            "do not mount it while the target is in use"
            if original
            else f"attach the {role} itself, or name this one",
            refuses=not original,
        )

    def _check_main(self, device: Found, match: Match, role: str, ours: Collection[str]) -> None:
        if _has_copies(device):
            self.refuse(
                "main_is_spare",
                device.path,
                f"is the {role}, but carries a spare's metadata",
                "find out what it is; if it was made a spare, its old content is overwritten",
            )
        if match.verdict is Verdict.REFORMATTED:
            self.note("reformatted", device.path, f"is the {role}, but {_because(match)}")
        self._check_free(device, ours, role)

    def _no_main(
        self,
        recorded: Fingerprint,
        by_verdict: Mapping[Verdict, Sequence[Found]],
        matches: Mapping[str, Match],
        role: str,
    ) -> None:
        named = f"the {role} ({_identity(recorded)})"
        before = len(self.problems)
        for device in by_verdict[Verdict.DIFFERENT]:
            match = matches[device.info.devno]
            for key, code in (("logical_block", "wrong_block_size"), ("sectors", "wrong_size")):
                if match.proven and key in match.differs:
                    self.refuse(
                        code,
                        device.path,
                        f"is {named} by its hardware, but {_because(match)}",
                        "undo what changed it, or attach it as it was",
                    )
                    break
        for device in by_verdict[Verdict.OTHER_PART]:
            match = matches[device.info.devno]
            self.refuse(
                "other_part",
                device.path,
                f"is not {named}, but on its disk: {_because(match)}",
                "restore the partition table as it was, or name the main",
            )
        for device in by_verdict[Verdict.PROBABLY]:
            if not _has_copies(device):
                match = matches[device.info.devno]
                self.refuse(
                    "doubtful_main",
                    device.path,
                    f"may be {named} with a confidence of {match.confidence} of 100: "
                    f"{_because(match)}",
                    "name it as the main if you are sure",
                )
        if not by_verdict[Verdict.CLONE] and len(self.problems) == before:
            self.refuse("missing_main", "", f"{named} is missing", "attach it")

    def _named_main(
        self,
        recorded: Fingerprint,
        devices: Sequence[Found],
        matches: Mapping[str, Match],
        ours: Collection[str],
        named: str,
    ) -> tuple[Found | None, Match | None]:
        device = next((device for device in devices if _is_named(device, named)), None)
        if device is None:
            self.refuse(
                "no_such_device",
                named,
                "was named as the main and is not there, or is a spare",
                "attach it",
            )
            return None, None
        info = device.info
        for code, mine, was, what in (
            ("wrong_size", info.sectors, recorded.sectors, "sectors"),
            ("wrong_block_size", info.logical_block, recorded.logical_block, "bytes in a block"),
        ):
            if was and mine != was:
                self.refuse(
                    code,
                    device.path,
                    f"has {mine} {what}, but the target's main has {was}",
                    "name the target's own main; another disk takes its place by a replacement",
                )
        match = matches[info.devno]
        if not match.is_it:
            self.note("named_main", device.path, f"was named as the main: {_because(match)}")
        self._check_main(device, match, "main", ours)
        return device, match

    # The result

    def _result(
        self,
        choice: Choice | None,
        main: Found | None = None,
        match: Match | None = None,
        new: Found | None = None,
        own: Mapping[int, Found] | None = None,
        missing: tuple[Missing, ...] = (),
    ) -> TargetFound:
        name = self.running or (_name_of(choice.metadata) if choice else self._guessed_name())
        if choice and self.running is None:
            try:
                check_name(name)
            except DmRemapError as error:
                self.refuse(
                    "bad_name", "", f"its name is of no use: {error}", "assemble it by hand"
                )
        result = TargetFound(
            uuid=self.target,
            name=name,
            state=State.COMPLETE,
            decision="",
            problems=tuple(self.problems),
            choice=choice,
            main=main.info if main else None,
            main_match=match,
            new_main=new.info if new else None,
            spares={index: device.info for index, device in (own or {}).items()},
            missing=missing,
            clones=tuple(self.clones),
            sides=self.sides,
        )
        return _decided(result, self.running)

    def _guessed_name(self) -> str:
        found = [copy.metadata for d in self.members for copy in _survey(d).copies]
        mine = [metadata for metadata in found if metadata.target_uuid == self.target]
        newest = max(mine, key=lambda metadata: metadata.generation, default=None)
        return _name_of(newest) if newest else ""


def _decided(target: TargetFound, running: str | None = None) -> TargetFound:
    """The target with its state and the sentence that tells it, by its problems."""
    problems = tuple(sorted(target.problems, key=lambda problem: not problem.refuses))
    reasons = [problem for problem in problems if problem.refuses]
    if running is not None:
        state, decision = State.ACTIVE, f"is active as {running}"
    elif reasons:
        first = reasons[0]
        where = f"{first.device} " if first.device else ""
        more = f" (and {count_of(len(reasons) - 1, 'other problem')})" if len(reasons) > 1 else ""
        state, decision = State.REFUSED, f"is not activated, because {where}{first.message}{more}"
    elif target.missing:
        numbers = " and ".join(str(spare.index) for spare in target.missing)
        chunks = count_of(target.missing_chunks, "remapped chunk")
        state = State.DEGRADED
        decision = f"can be activated without spare {numbers}, with {chunks} unreadable"
    else:
        generation = target.metadata.generation if target.metadata else 0
        state = State.COMPLETE
        decision = f"can be activated from generation {generation} with its main and all spares"
    return replace(target, problems=problems, state=state, decision=decision)


def _refused_too(target: TargetFound, problem: Problem) -> TargetFound:
    """The target with another problem; one that is active stays so."""
    running = target.name if target.state is State.ACTIVE else None
    return _decided(replace(target, problems=(*target.problems, problem)), running)


def _check_removed(
    targets: Sequence[TargetFound], removed: Mapping[uuid.UUID, str]
) -> list[TargetFound]:
    """Refuse targets that were removed from this host on purpose; no other reason counts more."""
    checked = []
    for target in targets:
        if target.uuid in removed and target.state is not State.ACTIVE:
            problem = Problem(
                "removed",
                "",
                "it was removed from this host on purpose, while a spare of it was not there",
                "wipe that spare with the target module's state: absent, or remove the file "
                f"{removed[target.uuid]} if the target is to live again",
                refuses=True,
            )
            target = _decided(replace(target, problems=(problem, *target.problems)))
        checked.append(target)
    return checked


def _counts(target: TargetFound) -> bool:
    """Whether a target can be in the way of others, which one that was removed is not."""
    return all(problem.code != "removed" for problem in target.problems)


def _check_mains(targets: Sequence[TargetFound]) -> list[TargetFound]:
    """Refuse targets that have a main in common."""
    users: dict[str, list[TargetFound]] = {}
    for target in filter(_counts, targets):
        for info in filter(None, (target.main, target.new_main)):
            users.setdefault(info.devno, []).append(target)
    checked = []
    for target in targets:
        for info in filter(None, (target.main, target.new_main)):
            others = [o for o in users.get(info.devno, ()) if o.uuid != target.uuid]
            if others:
                target = _refused_too(
                    target,
                    Problem(
                        "shared_main",
                        info.path,
                        f"is the main of target {others[0].name!r} ({others[0].uuid}) too",
                        "leave out the spares of the target that is not to be used",
                        refuses=True,
                    ),
                )
        checked.append(target)
    return checked


def _check_names(
    targets: Sequence[TargetFound], running: Mapping[uuid.UUID, str]
) -> list[TargetFound]:
    """Refuse targets that have a name in common; one that is active keeps it."""
    by_name: dict[str, set[uuid.UUID]] = {}
    for target in filter(_counts, targets):
        by_name.setdefault(target.name, set()).add(target.uuid)
    checked = []
    for target in targets:
        others = sorted(by_name.get(target.name, set()) - {target.uuid})
        if target.name and others and target.uuid not in running:
            target = _refused_too(
                target,
                Problem(
                    "same_name",
                    "",
                    f"target {others[0]} has the name {target.name!r} too",
                    "activate one of them by hand under another name, or leave out its spares",
                    refuses=True,
                ),
            )
        checked.append(target)
    return checked


def _survey(device: Found) -> Survey:
    if device.survey is None:
        raise ValueError(f"{device.path} was not read")
    return device.survey


def _has_copies(device: Found) -> bool:
    return device.survey is not None and bool(device.survey.copies)


def _is_named(device: Found, name: str) -> bool:
    return name in (device.path, device.info.devno)


def _choose_or_none(surveys: Mapping[str, Survey], now: int) -> Choice | None:
    try:
        return copies.choose(surveys, now)
    except SplitBrain:
        return None


def _because(match: Match) -> str:
    return ", ".join(match.reasons)


def _name_of(metadata: Metadata) -> str:
    name = metadata.config.get("name")
    return name if isinstance(name, str) else ""


def _identity(recorded: Fingerprint) -> str:
    return in_words(recorded.model, recorded.serial)


def _entries(devices: Iterable[Found]) -> dict[uuid.UUID | None, Any]:
    """The newest entry for each spare's UUID in any copy on these devices."""
    known: dict[bytes, Metadata] = {}
    for device in devices:
        for copy in _survey(device).copies:
            known[copy.header.digest] = copy.metadata
    entries: dict[uuid.UUID | None, Any] = {}
    for metadata in sorted(known.values(), key=lambda item: item.generation):
        for entry in metadata.config["spares"]:
            if entry is not None:
                entries[uuid.UUID(entry["uuid"])] = entry
    return entries


def _spare_match(recorded: Fingerprint, device: Found) -> Match:
    """Compare a device with a spare's entry; a resized disk that is proved stays the spare.

    Its copies tell where everything is, whatever its size is now.
    """
    match = compare(recorded, device.fingerprint)
    if match.proven and match.differs == ("sectors",) and match.verdict is Verdict.DIFFERENT:
        resized = compare(replace(recorded, sectors=0), device.fingerprint)
        return replace(resized, differs=match.differs)
    return match


# Looking at the host


@dataclass(frozen=True)
class Host:
    """What a host's targets are decided by.

    Attributes:
        found: all of its devices.
        active: names of the active targets by UUID.
        kept: the newest generation of targets that the host has a backup of.
        removed: paths of the host's notes of targets that were removed on purpose.
    """

    found: tuple[Found, ...]
    active: Mapping[uuid.UUID, str] = field(default_factory=dict)
    kept: Mapping[uuid.UUID, Metadata] = field(default_factory=dict)
    removed: Mapping[uuid.UUID, str] = field(default_factory=dict)

    def decide(self, overrides: Overrides | None = None, now_ns: int | None = None) -> Discovery:
        """Decide for each target; see `decide`."""
        return decide(self.found, self.active, self.kept, overrides, now_ns, self.removed)


class Blocks(Protocol):
    """The part of `blockdev` that a scan uses."""

    def list_devices(self, without: str) -> Iterable[Listed]:
        """List all block devices, but for mapped ones whose UUIDs start with ``without``."""

    def BlockDevice(self, path: str) -> Any:
        """Open a device for reading."""


class Tables(Protocol):
    """The part of `devmapper.DeviceMapper` that tells of active targets."""

    def names(self) -> list[str]:
        """Return the names of all mapped devices."""

    def info(self, name: str) -> MappedDevice | None:
        """Return the state of a mapped device."""


def active_targets(tables: Tables) -> dict[uuid.UUID, str]:
    """Names of the active targets by UUID."""
    found = {}
    for name in tables.names():
        device = tables.info(name)
        known = stack.TARGET_UUID.match(device.uuid) if device and device.live_table else None
        if known:
            found[uuid.UUID(known[1])] = name
    return found


def look(
    listed: Listed,
    blocks: Blocks = blockdev,
    also: Collection[int] = (),
    content: bool = False,
    known: dict[bytes, Metadata] | None = None,
) -> Found:
    """Read the slots of one device: seven reads of 4 KiB where nothing of ours is on it.

    Args:
        listed: the device.
        blocks: opens it.
        also: other sizes in sectors that it may have been laid out for.
        content: sample its content too: five more reads of 4 KiB.
        known: generations by digest that were read from other devices; added to.
    """
    info = listed.info
    found = Found(info, None, of_info(info), holders=listed.holders)
    if listed.suspended:
        return replace(found, error="is suspended, and reads of it would wait")
    if max(info.sectors, *also, 0) < SMALLEST_FAR_SECTORS:
        return found
    try:
        with blocks.BlockDevice(info.path) as device:
            watched = _Watched(device)
            seen = copies.survey(watched, also, known)
            if content:
                info = with_content(info, watched)
    except (DmRemapError, OSError) as error:
        return replace(found, error=str(error))
    return replace(
        found,
        info=info,
        survey=seen,
        fingerprint=of_info(info),
        kernel_spare=watched.kernel_spare,
    )


class _Watched:
    """A device that is read; whether a copy of the kernel target's was seen is kept."""

    def __init__(self, device: Any) -> None:
        self.name: str = device.name
        self.sectors: int = device.sectors
        self.kernel_spare = False
        self._device = device

    def read(self, sector: int, count: int) -> bytes:
        data = bytes(self._device.read(sector, count))
        if sector in kernel_v4.COPY_SECTORS and data.startswith(kernel_v4.MAGIC):
            self.kernel_spare = True
        return data

    def write(self, sector: int, data: bytes) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        raise NotImplementedError


def scan(
    blocks: Blocks = blockdev, workers: int = WORKERS, seconds: float = READ_SECONDS
) -> tuple[Found, ...]:
    """Look at all block devices of the host, several at once.

    Read-only devices and those in use are looked at too; our own mapped devices are not.

    Args:
        blocks: lists and opens devices.
        workers: devices that are read at once.
        seconds: after which a device that does not answer is given up.
    """
    listed = list(blocks.list_devices(stack.UUID_PREFIX))
    known: dict[bytes, Metadata] = {}
    looks = [_Look(device, blocks, known) for device in listed]
    found = _look_at_all(looks, workers, seconds)
    spares, mains = _recorded(found)
    again = []
    for device, seen in zip(listed, found):
        if seen.survey is None or seen.survey.claims:
            continue
        # Without a near copy, only the size that is recorded tells where the far ones are.
        also = [
            recorded.sectors
            for recorded in spares
            if recorded.sectors != seen.info.sectors and _spare_match(recorded, seen).is_it
        ]
        # Whether what is as large as a main, and not it, is a clone of it.
        content = any(
            recorded.sectors == seen.info.sectors and not compare(recorded, seen.fingerprint).is_it
            for recorded in mains
        )
        if also or content:
            again.append(_Look(device, blocks, known, tuple(also), content))
    if again:
        second = {one.info.devno: one for one in _look_at_all(again, workers, seconds)}
        better = (second.get(one.info.devno, one) for one in found)
        found = [new if not new.error else old for new, old in zip(better, found)]
    return tuple(found)


def observe(blocks: Blocks, tables: Tables, backups: Backups) -> Host:
    """Look at all devices of the host, without a lock, and at what it knows of its targets.

    Args:
        blocks: block devices.
        tables: device-mapper.
        backups: the host's backups of its targets' metadata.
    """
    known = backups.targets()
    newest = {target: backups.newest(target) for target in known}
    notes = {target: backups.removed(target) for target in known}
    return Host(
        found=scan(blocks),
        active=active_targets(tables),
        kept={target: metadata for target, metadata in newest.items() if metadata},
        removed={target: note for target, note in notes.items() if note},
    )


def _recorded(found: Iterable[Found]) -> tuple[list[Fingerprint], list[Fingerprint]]:
    """Fingerprints of all spares, and of all mains, that any copy tells of."""
    known: dict[bytes, Metadata] = {}
    for device in found:
        if device.survey is not None:
            known.update((copy.header.digest, copy.metadata) for copy in device.survey.copies)
    spares: dict[Fingerprint, None] = {}
    mains: dict[Fingerprint, None] = {}
    for metadata in known.values():
        for entry in metadata.config["spares"]:
            spares[of_entry(entry)] = None
        mains[of_entry(metadata.config["main"])] = None
        if replacement.under_way(metadata):
            mains[of_entry(metadata.config["replacement"]["main"])] = None
    return list(spares), list(mains)


def _look_at_all(looks: Sequence[_Look], workers: int, seconds: float) -> list[Found]:
    late = f"does not answer within {seconds:g} s"
    return [
        result or Found(one.listed.info, None, of_info(one.listed.info), error=late)
        for one, result in zip(looks, run_all(looks, workers, seconds))
    ]


@dataclass(frozen=True)
class _Look:
    """A call of `look` with these arguments."""

    listed: Listed
    blocks: Blocks
    known: dict[bytes, Metadata]
    also: Collection[int] = ()
    content: bool = False

    def __call__(self) -> Found:
        try:
            return look(self.listed, self.blocks, self.also, self.content, self.known)
        except Exception as error:
            # One device that nobody understands must not hide the others.
            info = self.listed.info
            return Found(info, None, of_info(info), error=f"cannot be examined: {error!r}")


def run_all(
    calls: Sequence[Callable[[], Found]],
    workers: int,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> list[Found | None]:
    """Carry out calls in several threads, and give each only so much time.

    A call that takes longer keeps its thread, which ends with the process, and another thread
    takes its place.

    Args:
        calls: none raises.
        workers: calls at once.
        seconds: for each call, from its beginning.
        clock: seconds that only rise.

    Returns:
        The results in the calls' order, None for those that took too long.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Found]] = queue.SimpleQueue()
    began: dict[int, float] = {}

    def work() -> None:
        while True:
            try:
                number = waiting.get_nowait()
            except queue.Empty:
                return
            began[number] = clock()
            done.put((number, calls[number]()))

    def start() -> None:
        threading.Thread(target=work, name="looks at a device", daemon=True).start()

    for number in range(len(calls)):
        waiting.put(number)
    for _unused in range(min(workers, len(calls))):
        start()
    results: list[Found | None] = [None] * len(calls)
    left = set(range(len(calls)))
    while left:
        now = clock()
        # What has not begun will not be late before what has.
        end = min((began[n] for n in left.intersection(began)), default=now) + seconds
        try:
            number, result = done.get(timeout=max(end - now, 0))
        except queue.Empty:
            now = clock()
            for number in [n for n in left.intersection(began) if began[n] + seconds <= now]:
                left.discard(number)
                start()
            continue
        if number in left:
            left.discard(number)
            results[number] = result
    return results
