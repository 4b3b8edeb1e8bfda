# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A target as it was observed, and what its metadata says of its chunks and spares (pure)."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from . import copies, extents, fingerprint, replacement
from .blockdev import DeviceInfo
from .devmapper import MappedDevice, Segment
from .errors import count_of
from .format import Geometry, Metadata, geometry_of
from .mapping import build_table
from .stack import CARRIER_SECTORS, PathState

HOLD, FAIL = "hold", "fail"
NO_SHIM, RAID_SHIM, AUTO_SHIM = "none", "raid", "auto"


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


def where(metadata: Metadata, chunk: int) -> dict[str, int]:
    """The chunk's number, first sector and sectors; the target's last one may be short."""
    start = chunk * metadata.config["chunk_sectors"]
    left = metadata.config["main"]["sectors"] - start
    return {"chunk": chunk, "start": start, "count": min(metadata.config["chunk_sectors"], left)}


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


def configured(metadata: Metadata) -> set[int]:
    """Positions of all spares in the configuration."""
    return {index for index, entry in enumerate(metadata.config["spares"]) if entry}


def spare_indexes(target: ActiveTarget) -> list[int]:
    """Indexes of all configured spares, lost ones too."""
    return sorted(configured(target.metadata))


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


def index_of_uuid(metadata: Metadata, spare_uuid: uuid.UUID) -> int | None:
    """The position of a spare in the configuration, by its UUID."""
    for index in configured(metadata):
        if uuid.UUID(metadata.config["spares"][index]["uuid"]) == spare_uuid:
            return index
    return None


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


def named_spare(metadata: Metadata, index: int) -> str:
    """A spare in a sentence: its index, what it is, and what is on it."""
    entry = metadata.config["spares"][index]
    chunks = count_of(len(chunks_on(metadata, index)), "remapped chunk")
    who = fingerprint.in_words(entry.get("model"), entry.get("serial"))
    return f"spare {index} ({who}, {entry['uuid']}) with {chunks}"


def usable_geometries(target: Holder) -> dict[int, Geometry]:
    """Geometries of the target's spares that can be used, by index."""
    return {index: geometry_of(target.metadata, index) for index in target.spare_infos}


def shim_of(metadata: Metadata) -> str:
    """The shim that a target is to have: ``none`` or ``raid``."""
    return str(metadata.config.get("shim", NO_SHIM))


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


def fails_in_map(target: ActiveTarget, index: int) -> bool:
    """Whether the live map has errors where chunks on spare ``index`` are."""
    chunk_sectors = target.metadata.config["chunk_sectors"]
    starts = [chunk * chunk_sectors for chunk in chunks_on(target.metadata, index)]
    return bool(starts) and any(
        segment.target == "error" and segment.start <= starts[0] < segment.start + segment.length
        for segment in target.table
    )
