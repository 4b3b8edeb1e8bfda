# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Refusals of devices and targets that are not as a plan needs them (pure)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from . import copies, fingerprint, replacement
from .blockdev import OWN_SIGNATURE, DeviceInfo
from .errors import DmRemapError, Refused
from .format import Geometry, Metadata, geometry_of, plan_geometry
from .marks import SECTOR_BYTES
from .target import ActiveTarget, Candidate

LOGICAL_BLOCKS = (512, 4096)


def check_distinct(main: DeviceInfo, spares: Iterable[DeviceInfo]) -> None:
    """Refuse devices that are one and the same disk, or parts of each other."""
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


def check_unused(info: DeviceInfo, remains: Sequence[str], role: str) -> None:
    """Refuse a device that is in use, or cannot be written."""
    check_free(info, remains, role)
    if info.read_only:
        raise Refused("is read-only", device=info.path, remedy=f"give a writable {role}")


def check_free(info: DeviceInfo, remains: Sequence[str], role: str) -> None:
    """Refuse a device that is in use."""
    # What our own interrupted command left is removed first, so it is no use of the device.
    uses = [use for use in info.used_by if use.by not in remains]
    if uses:
        raise Refused(
            f"is in use and cannot be a {role}: " + ", ".join(map(str, uses)),
            device=info.path,
            remedy="unmount or release it first",
        )


def check_not_reused(candidate: Candidate) -> None:
    """Refuse a spare that somebody has used for something else since."""
    others = [found for found in candidate.signatures if found != OWN_SIGNATURE]
    if others:
        raise Refused(
            f"carries a target's metadata, but was used for {', '.join(others)} since",
            device=candidate.info.path,
            remedy="save what is on it, and give another device",
        )


def check_spare(candidate: Candidate, main: DeviceInfo, chunk_bytes: int, wipe: bool) -> Geometry:
    """The geometry of a device as a new spare, unless it cannot be one."""
    info = candidate.info
    if main.logical_block not in LOGICAL_BLOCKS:
        raise Refused(
            f"has logical blocks of {main.logical_block} bytes",
            device=main.path,
            remedy=f"give a main with blocks of {' or '.join(map(str, LOGICAL_BLOCKS))} bytes",
        )
    check_same_blocks(info, main, "give a spare with the main's block size")
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


def check_same_blocks(info: DeviceInfo, main: DeviceInfo, remedy: str) -> None:
    """Refuse a device whose logical blocks are not as large as the main's."""
    if info.logical_block != main.logical_block:
        raise Refused(
            f"has logical blocks of {info.logical_block} bytes, but {main.path} of "
            f"{main.logical_block}",
            device=info.path,
            remedy=remedy,
        )


def check_main_identity(
    main: DeviceInfo, metadata: Metadata, trusted: Collection[str] = ()
) -> None:
    """Refuse a device that is not the target's main, or not as large."""
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


def check_spare_identity(
    info: DeviceInfo, metadata: Metadata, index: int, trusted: Collection[str]
) -> None:
    """Refuse a device that is not that spare of the target, or has no room for it."""
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


def check_not_replacing(target: ActiveTarget, consequence: str) -> None:
    """Refuse what cannot be done while the target's main is being replaced."""
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


def agrees_with(witness: Metadata | None, metadata: Metadata) -> bool:
    """Whether a generation that the host has committed is not later than, or beside, another."""
    if witness is None:
        return True
    found = copies.is_ancestor(metadata, witness.generation, witness.digest)
    return found is not False
