# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Who a device is: fingerprints in three layers, and whether two are of the same device.

docs/identity.md has the rules and the weights with their reasons. All but `observe` is pure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Callable, Protocol

from . import blockdev
from .blockdev import DeviceInfo

SECTOR_BYTES = 512

# What each agreement adds to the confidence, which ends at 100. A WWN is given out once in the
# world, a serial number once by one maker. Everything else many devices have alike.
WEIGHTS: Mapping[str, int] = {
    "wwn": 60,
    "serial": 50,
    "volume": 50,
    "model": 5,
    "sectors": 10,
    "logical_block": 5,
    "physical_block": 5,
    "partition": 5,
    "fs_uuid": 10,
    "table_uuid": 5,
    "content": 5,
}
# Each of these names one device; without any of them there is no proof.
PROOFS = ("wwn", "serial", "volume")
# All that can be copied, and all that many devices share, is together worth no more than this.
UNPROVED_LIMIT = 50

# Sectors and weight of each sample of the content. What is at the start rarely changes.
_SAMPLE_WEIGHTS: Mapping[str, int] = {
    "boot": 4,
    "super": 4,
    "quarter": 1,
    "half": 1,
    "three_quarters": 1,
    "end": 1,
}
_SAMPLE_SECTORS = 8
# Fields that move while a file system is in use: XFS's counters, features, checksum and log
# position (struct xfs_dsb in fs/xfs/libxfs/xfs_format.h).
_XFS_MAGIC, _XFS_MOVING = b"XFSB", ((128, 160), (192, 196), (208, 248))
# Fields of an ext superblock that stay: UUID, label, hash seed, when it was made (struct
# ext4_super_block in fs/ext4/ext4.h). It lies 1024 bytes from the start.
_EXT_START, _EXT_MAGIC = 1024, (56, b"\x53\xef")
_EXT_STAYING = ((0x68, 0x88), (0xEC, 0xFC), (0x108, 0x10C))

_NAMES = {
    "wwn": "WWN",
    "serial": "serial number",
    "volume": "volume",
    "model": "model",
    "sectors": "size in sectors",
    "logical_block": "logical block size",
    "physical_block": "physical block size",
    "fs_uuid": "file system UUID",
    "table_uuid": "partition table id",
}

FOLDER = "/run/dm-remap/fingerprints"
KEPT_SECONDS = 3600


class Verdict(enum.Enum):
    """What a comparison came to."""

    SAME = "same"
    PROBABLY = "probably"
    CLONE = "clone"
    REFORMATTED = "reformatted"
    OTHER_PART = "other part"
    DIFFERENT = "different"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Fingerprint:
    """What tells a device from others. Empty, zero or None is what is not known.

    Attributes:
        wwn, serial, model: of the disk, also for a partition of it.
        volume: UUID of a mapped device or of an array, which the kernel has it by.
        sectors: size in sectors of 512 bytes.
        logical_block, physical_block: in bytes.
        partition: number of the partition; 0 for a whole disk.
        partuuid: the partition's entry in the table.
        start: the partition's first sector.
        fs_type, fs_uuid: what is on the device.
        table_type, table_uuid: the partition table, the disk's for a partition.
        content: SHA-256 in hexadecimal of what was sampled, by the sample's name.
    """

    wwn: str = ""
    serial: str = ""
    model: str = ""
    volume: str = ""
    sectors: int = 0
    logical_block: int = 0
    physical_block: int = 0
    partition: int | None = None
    partuuid: str = ""
    start: int = 0
    fs_type: str = ""
    fs_uuid: str = ""
    table_type: str = ""
    table_uuid: str = ""
    content: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """What is known, for JSON."""
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        known = {n: v for n, v in values if v or (n == "partition" and v is not None)}
        if self.content:
            known["content"] = dict(self.content)
        return known

    @classmethod
    def from_dict(cls, values: object) -> Fingerprint:
        """Read what `to_dict` gave; what is missing or makes no sense counts as not known."""
        if not isinstance(values, Mapping):
            return cls()
        known: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            value = values.get(field.name)
            if field.name == "content":
                if isinstance(value, Mapping):
                    pairs = [(k, v) for k, v in value.items() if isinstance(v, str) and v]
                    known["content"] = tuple(sorted(pairs))
            elif field.name in _NUMBERS or field.name == "partition":
                if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                    known[field.name] = value
            elif isinstance(value, str):
                known[field.name] = value
        return cls(**known)


_NUMBERS = ("sectors", "logical_block", "physical_block", "start")
# What an entry of the configuration has of its own; the rest is under its key `fingerprint`.
_CONTENT_FIELDS = ("fs_type", "fs_uuid", "table_type", "table_uuid", "content")
_ENTRY_FIELDS = ("wwn", "serial", "model", "sectors", "logical_block", "physical_block")


@dataclass(frozen=True)
class Match:
    """Whether a device is the one that was recorded.

    Attributes:
        verdict: in a word.
        confidence: that it is the recorded device, 0 to 100.
        reasons: sentences for people, without a full stop.
        agrees: names of what agrees.
        differs: names of what contradicts.
    """

    verdict: Verdict
    confidence: int
    reasons: tuple[str, ...]
    agrees: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()

    @property
    def is_it(self) -> bool:
        """The hardware proves it to be the device, whatever is on it."""
        return self.verdict in (Verdict.SAME, Verdict.REFORMATTED)

    @property
    def proven(self) -> bool:
        """Something that names one device agrees, and nothing of that kind contradicts."""
        return _proven(self.agrees, self.differs)


def of_info(info: DeviceInfo) -> Fingerprint:
    """The fingerprint of a device that was described."""
    own_mark = _is_own_mark(info.fs_type)
    return Fingerprint(
        wwn=info.wwn,
        serial=info.serial,
        model=info.model,
        volume=info.volume,
        sectors=info.sectors,
        logical_block=info.logical_block,
        physical_block=info.physical_block,
        partition=info.partition,
        partuuid=info.partuuid,
        start=info.start,
        fs_type="" if own_mark else info.fs_type,
        fs_uuid="" if own_mark else info.fs_uuid,
        table_type=info.table_type,
        table_uuid=info.table_uuid,
        content=info.content,
    )


def _is_own_mark(fs_type: str) -> bool:
    # What hides mains and spares from others says nothing of their content.
    return fs_type.lower().replace("-", "_").startswith(("dm_remap", "dmremap"))


def in_words(model: str | None, serial: str | None) -> str:
    """Who a recorded device is, for people: its model and serial number."""
    return f"{model or 'no model'}, serial {serial or 'unknown'}"


def of_entry(entry: object) -> Fingerprint:
    """The fingerprint that a main's or a spare's entry of the configuration has recorded."""
    if not isinstance(entry, Mapping):
        return Fingerprint()
    more = entry.get("fingerprint")
    values = {**(more if isinstance(more, Mapping) else {})}
    geometry = entry.get("geometry")
    if isinstance(geometry, Mapping):
        values["sectors"] = geometry.get("spare_sectors")
        block = geometry.get("block_sectors")
        values["logical_block"] = block * SECTOR_BYTES if isinstance(block, int) else 0
    values.update({key: entry[key] for key in _ENTRY_FIELDS if key in entry})
    if "device_sectors" in entry:
        values["sectors"] = entry["device_sectors"]
    return Fingerprint.from_dict(values)


def more_layers(fingerprint: Fingerprint, hardware_only: bool = False) -> dict[str, Any]:
    """What an entry of the configuration keeps under `fingerprint`: all that is not beside it.

    Args:
        fingerprint: the device's.
        hardware_only: leave out what is on the device, because it is about to be overwritten.
    """
    left_out = (*_ENTRY_FIELDS, *(_CONTENT_FIELDS if hardware_only else ()))
    return {key: value for key, value in fingerprint.to_dict().items() if key not in left_out}


def contradictions(recorded: Fingerprint, seen: Fingerprint) -> tuple[tuple[str, str, str], ...]:
    """What of the hardware's names is known of both and differs: name, recorded, seen."""
    pairs = {name: (getattr(recorded, name), getattr(seen, name)) for name in _HARDWARE_NAMES}
    pairs["serial"] = (_own_serial(recorded), _own_serial(seen))
    known = {name: both for name, both in pairs.items() if both[0] and both[1]}
    if "wwn" in known and known["wwn"][0] == known["wwn"][1]:
        # Another adapter may give the same disk another model.
        known.pop("model", None)
    return tuple((name, *both) for name, both in known.items() if both[0] != both[1])


_HARDWARE_NAMES = ("serial", "wwn", "model", "volume")
# What contradicts only where it is another device, or another part of one.
HARDWARE = (*_HARDWARE_NAMES, "partition")


def _own_serial(fingerprint: Fingerprint) -> str:
    """The serial number, unless it only repeats the WWN or is one character many times.

    udev's scsi_id gives the WWN as serial number where ata_id, behind another adapter, gives the
    disk's own.
    """
    serial, wwn = fingerprint.serial, fingerprint.wwn.lower()
    digits = wwn[2:] if wwn.startswith("0x") else wwn
    if len(set(serial)) < 2 or (digits and serial.lower().startswith(digits)):
        return ""
    return serial


def _proven(agrees: tuple[str, ...], differs: tuple[str, ...]) -> bool:
    return any(name in agrees for name in PROOFS) and not set(differs) & set(_HARDWARE_NAMES)


def unrelated(recorded: Fingerprint, seen: Fingerprint) -> bool:
    """Whether `compare` will find another device with another content, at a fraction of its cost.

    False says nothing.
    """
    if recorded.content and seen.content:
        return False
    for name in ("wwn", "serial", "volume", "fs_uuid", "table_uuid"):
        was = getattr(recorded, name)
        if was and was == getattr(seen, name):
            return False
    if recorded.wwn and seen.wwn:
        return True
    return bool(_own_serial(recorded) and _own_serial(seen))


def compare(recorded: Fingerprint, seen: Fingerprint) -> Match:
    """Judge whether the device that is seen is the one that was recorded.

    Names and places, such as /dev/sdX or a port, play no part.
    """
    hard = contradictions(recorded, seen)
    reasons = [f"has {_NAMES[name]} {mine!r}, recorded is {was!r}" for name, was, mine in hard]
    agrees, differs = [], [name for name, _was, _mine in hard]
    serials = (_own_serial(recorded), _own_serial(seen))
    for name in WEIGHTS:
        if name in ("partition", "content") or name in differs:
            continue
        was, mine = getattr(recorded, name), getattr(seen, name)
        if name == "serial":
            was, mine = serials
        if not was or not mine:
            continue
        if was == mine:
            agrees.append(name)
        elif name != "model":
            differs.append(name)
            reasons.append(f"has {_NAMES[name]} {mine!r}, recorded is {was!r}")
    part = _other_part(recorded, seen)
    if part:
        differs.append("partition")
        reasons.append(part)
    elif recorded.partition is not None and seen.partition is not None:
        agrees.append("partition")
    share = _content_agreement(recorded, seen)
    if share is not None and share >= 0.5:
        agrees.append("content")
    reasons[:0] = [
        f"has the recorded {_NAMES[n]} {getattr(seen, n)}" for n in PROOFS if n in agrees
    ]
    return _judged(recorded, seen, tuple(agrees), tuple(differs), reasons, share)


def _judged(
    recorded: Fingerprint,
    seen: Fingerprint,
    agrees: tuple[str, ...],
    differs: tuple[str, ...],
    reasons: list[str],
    share: float | None,
) -> Match:
    points = sum(WEIGHTS[name] for name in agrees if name != "content")
    points += round(WEIGHTS["content"] * (share or 0))
    proven = _proven(agrees, differs)
    same_content = [name for name in ("fs_uuid", "table_uuid", "content") if name in agrees]
    other_content = [name for name in ("fs_uuid", "table_uuid") if name in differs]

    def match(verdict: Verdict, confidence: int, *more: str) -> Match:
        return Match(verdict, confidence, (*reasons, *more), agrees, differs)

    if set(differs) & set(_HARDWARE_NAMES):
        if same_content:
            return match(Verdict.CLONE, 0, "has the recorded content on other hardware")
        return match(Verdict.DIFFERENT, 0)
    if proven and (
        "partition" in differs or ("sectors" in differs and _may_be_part(recorded, seen))
    ):
        return match(Verdict.OTHER_PART, 0, "is on the recorded disk, but not the same part of it")
    if set(differs) & {"sectors", "logical_block", "partition"}:
        if same_content and not proven:
            return match(Verdict.CLONE, 0, "has the recorded content on a device of another form")
        return match(Verdict.DIFFERENT, 0)
    if proven:
        if other_content:
            return match(
                Verdict.REFORMATTED, min(points, 100), "was formatted or partitioned anew since"
            )
        return match(Verdict.SAME, min(points, 100))
    points = min(points, UNPROVED_LIMIT)
    known = [name for name in PROOFS if getattr(recorded, name)]
    if known:
        missing = " and ".join(_NAMES[name] for name in known)
        reasons.append(f"shows no {missing}, which is recorded")
    else:
        reasons.append("nothing is recorded that only one device has, such as a serial number")
    if other_content or "sectors" not in agrees:
        return match(Verdict.UNKNOWN, min(points, 20))
    return match(Verdict.PROBABLY, points)


def _other_part(recorded: Fingerprint, seen: Fingerprint) -> str:
    """Why a device is another part of a disk, or "" where nothing says so."""
    was, now = recorded.partition, seen.partition
    if was is None or now is None or (was == 0 and now == 0):
        return ""
    if was == 0:
        return f"is partition {now}, recorded is a whole disk"
    if now == 0:
        return f"is a whole disk, recorded is partition {was}"
    if recorded.partuuid and seen.partuuid:
        # A partition keeps its own UUID when another one gets a new number.
        if recorded.partuuid.lower() == seen.partuuid.lower():
            return ""
        return f"is partition {seen.partuuid}, recorded is {recorded.partuuid}"
    if (was, recorded.start) != (now, seen.start):
        return (
            f"is partition {now} from sector {seen.start}, recorded is {was} from {recorded.start}"
        )
    return ""


def _may_be_part(recorded: Fingerprint, seen: Fingerprint) -> bool:
    """Whether a size that differs says that one is a partition of the other."""
    return recorded.partition is None and bool(seen.partition) and seen.sectors < recorded.sectors


def _content_agreement(recorded: Fingerprint, seen: Fingerprint) -> float | None:
    """Weighted share of the samples in both that agree; None where there is none in both."""
    was, now = dict(recorded.content), dict(seen.content)
    both = [name for name in _SAMPLE_WEIGHTS if name in was and name in now]
    if not both:
        return None
    alike = sum(_SAMPLE_WEIGHTS[name] for name in both if was[name] == now[name])
    return alike / sum(_SAMPLE_WEIGHTS[name] for name in both)


class Readable(Protocol):
    """A device whose content is sampled."""

    sectors: int

    def read(self, sector: int, count: int) -> bytes:
        """Read sectors of 512 bytes, or raise OSError."""


def sample(device: Readable) -> dict[str, str]:
    """SHA-256 of a few places, at most five reads of 4 KiB. Uniform ones are left out.

    The first error ends it: who a sick disk is, is not worth another slow read.
    """
    blocks = device.sectors // _SAMPLE_SECTORS
    places = {"start": 0}
    if blocks >= 8:
        places.update(quarter=blocks // 4, half=blocks // 2, three_quarters=blocks * 3 // 4)
        places["end"] = blocks - 1
    found: dict[str, bytes] = {}
    try:
        for name, block in places.items():
            raw = device.read(block * _SAMPLE_SECTORS, _SAMPLE_SECTORS)
            found.update(_of_start(raw) if name == "start" else {name: raw})
    except OSError:
        pass
    return {
        name: hashlib.sha256(raw).hexdigest() for name, raw in found.items() if len(set(raw)) > 1
    }


def with_content(info: DeviceInfo, device: Readable) -> DeviceInfo:
    """The description of a device with samples of its content."""
    return dataclasses.replace(info, content=tuple(sorted(sample(device).items())))


def _of_start(raw: bytes) -> dict[str, bytes]:
    """What stays in the first 4 KiB: the boot sector, and what names an ext file system."""
    boot = bytearray(raw[:SECTOR_BYTES])
    if boot.startswith(_XFS_MAGIC):
        for first, end in _XFS_MOVING:
            boot[first:end] = bytes(end - first)
    found = {"boot": bytes(boot)}
    block = raw[_EXT_START:]
    offset, magic = _EXT_MAGIC
    if block[offset : offset + len(magic)] == magic:
        found["super"] = b"".join(block[first:end] for first, end in _EXT_STAYING)
    return found


class Cache:
    """Fingerprints in a folder under /run, one file for each device number.

    One is good for an hour, while the device is the same attachment of the same device and udev
    has told nothing new of it.

    Args:
        folder: it need not exist.
        clock: seconds since 1970.
    """

    def __init__(self, folder: str = FOLDER, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._clock = clock

    def get(self, devno: str, attachment: str, changed_ns: int) -> Fingerprint | None:
        """The kept fingerprint, or None.

        Args:
            devno: device number `major:minor`.
            attachment: what is another one each time that a device gets this number.
            changed_ns: when udev last told of the device, nanoseconds since 1970.
        """
        try:
            with open(self._path(devno), encoding="utf-8") as file:
                kept = json.load(file)
            age = self._clock() - kept["time"]
            fresh = 0 <= age < KEPT_SECONDS and kept["time"] * 1e9 > changed_ns
            if fresh and kept["attachment"] == attachment:
                return Fingerprint.from_dict(kept["fingerprint"])
        except (OSError, ValueError, TypeError, KeyError):
            pass
        return None

    def put(self, devno: str, attachment: str, fingerprint: Fingerprint, began: float) -> None:
        """Keep a fingerprint; where that fails it is only slower the next time.

        Args:
            devno, attachment: as for `get`.
            fingerprint: what was seen.
            began: the clock before the device was looked at.
        """
        kept = {"time": began, "attachment": attachment, "fingerprint": fingerprint.to_dict()}
        path = self._path(devno)
        with contextlib.suppress(OSError):
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
            with open(f"{path}.{os.getpid()}", "w", encoding="utf-8") as file:
                json.dump(kept, file)
            os.replace(f"{path}.{os.getpid()}", path)

    def now(self) -> float:
        """The clock."""
        return self._clock()

    def _path(self, devno: str) -> str:
        return os.path.join(self._folder, devno.replace(":", "-") + ".json")


def observe(path: str, cache: Cache | None = None) -> Fingerprint:
    """The fingerprint of a device with all its layers.

    Args:
        path: the device's node, or a link to it.
        cache: where fingerprints are kept; None uses the one under /run.

    Raises:
        DmRemapError: there is no such device, or it cannot be opened.
    """
    known = cache or Cache()
    devno = blockdev.devno_of(path)
    attachment, changed = blockdev.attachment_of(devno)
    kept = known.get(devno, attachment, changed)
    if kept:
        return kept
    began = known.now()
    info = blockdev.describe(path)
    with blockdev.BlockDevice(path) as device:
        found = of_info(with_content(info, device))
    known.put(devno, attachment, found, began)
    return found
