# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the metadata says of a main that is being replaced, and which disk can replace it (pure).

While a replacement is under way the configuration has the key ``replacement``::

    copied    chunks below this one are on the new main, the others on the old one
    main      the new main, in the form of the configuration's own ``main``, and its ``path``
    old_path  where the old main was

Chunks with an extent are on their spare, whichever side of ``copied`` they are on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from . import extents, fingerprint
from .blockdev import DeviceInfo
from .errors import Refused
from .events import subtract_ranges
from .format import LostRange, Metadata

SECTOR_BYTES = 512


def identity_of(info: DeviceInfo) -> dict[str, str]:
    """What tells a device from others, as the metadata keeps it."""
    return {"serial": info.serial, "wwn": info.wwn, "model": info.model}


def recorded(info: DeviceInfo, hardware_only: bool = False) -> dict[str, Any]:
    """What an entry of the configuration keeps of who a device is, beside its sizes.

    Args:
        info: the device.
        hardware_only: for a spare, whose content is about to be overwritten.
    """
    more = fingerprint.more_layers(fingerprint.of_info(info), hardware_only)
    return {**identity_of(info), **({"fingerprint": more} if more else {})}


def as_seen(
    entry: Mapping[str, Any], info: DeviceInfo, hardware_only: bool = False
) -> dict[str, Any]:
    """An entry of the configuration with another device recorded in it.

    Args:
        entry: the main's or a spare's.
        info: the device, which has the same content.
        hardware_only: it is a spare.
    """
    kept = {key: value for key, value in entry.items() if key != "fingerprint"}
    new = {**kept, **recorded(info, hardware_only)}
    samples = (entry.get("fingerprint") or {}).get("content")
    if samples and not hardware_only:
        new["fingerprint"] = {"content": samples, **new.get("fingerprint", {})}
    if "physical_block" in entry:
        new["physical_block"] = info.physical_block
    return new


def main_entry(info: DeviceInfo, sectors: int) -> dict[str, Any]:
    """The configuration's entry for a main.

    Args:
        info: the device.
        sectors: size of the target in sectors, the device's own or less.
    """
    entry = {
        "sectors": sectors,
        "logical_block": info.logical_block,
        "physical_block": info.physical_block,
        **recorded(info),
    }
    if info.sectors != sectors:
        entry["device_sectors"] = info.sectors
    return entry


def device_sectors(entry: Mapping[str, Any]) -> int:
    """Sectors that the device of a main's entry has; the target may have fewer."""
    return int(entry.get("device_sectors", entry["sectors"]))


def under_way(metadata: Metadata) -> bool:
    """Whether the target's main is being replaced."""
    return "replacement" in metadata.config


def copied_chunks(metadata: Metadata) -> int:
    """Chunks from the start that are on the new main; 0 where none is."""
    return int(metadata.config.get("replacement", {}).get("copied", 0))


def copied_sectors(metadata: Metadata) -> int:
    """Sectors from the start that are on the new main."""
    chunks = copied_chunks(metadata)
    config = metadata.config
    return int(min(chunks * config["chunk_sectors"], config["main"]["sectors"]))


def chunks_in_all(metadata: Metadata) -> int:
    """Chunks of the target, the last of which may be short."""
    return -int(-metadata.config["main"]["sectors"] // metadata.config["chunk_sectors"])


def begun(
    config: Mapping[str, Any], new: DeviceInfo, new_path: str, old_path: str
) -> dict[str, Any]:
    """The configuration in which ``new`` is to replace the main, with nothing copied yet.

    Args:
        config: the target's configuration.
        new: the new main.
        new_path: a path that it has for long.
        old_path: such a path of the old main.
    """
    entry = {**main_entry(new, config["main"]["sectors"]), "path": new_path}
    return {**config, "replacement": {"copied": 0, "main": entry, "old_path": old_path}}


def finished(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in which the new main is the main."""
    entry = {key: value for key, value in config["replacement"]["main"].items() if key != "path"}
    return {**undone(config), "main": entry}


def undone(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without a replacement."""
    return {key: value for key, value in config.items() if key != "replacement"}


def advanced(metadata: Metadata, copied: int, returned: Collection[int]) -> Metadata:
    """The metadata when the new main has the chunks below ``copied``.

    Args:
        metadata: the metadata before.
        copied: chunks from the start that the new main has.
        returned: chunks that a main has now and a spare had before; none of their sectors is lost.
    """
    chunk_sectors, total = metadata.config["chunk_sectors"], metadata.config["main"]["sectors"]
    lost = [(item.sector, item.count) for item in metadata.lost]
    # Few of the chunks that return had lost sectors.
    healed = set(returned).intersection(extents.chunks_of(lost, chunk_sectors, total))
    left = subtract_ranges(lost, [(chunk * chunk_sectors, chunk_sectors) for chunk in healed])
    replacement = {**metadata.config["replacement"], "copied": copied}
    return dataclasses.replace(
        metadata,
        config={**metadata.config, "replacement": replacement},
        extents=extents.merge(extents.without(metadata.extents, returned)),
        lost=tuple(LostRange(*item) for item in left),
    )


def matches(info: DeviceInfo, entry: Mapping[str, Any]) -> bool:
    """Whether nothing about a device contradicts what the metadata has of it."""
    if (info.sectors, info.logical_block) != (device_sectors(entry), entry["logical_block"]):
        return False
    differs = fingerprint.compare(fingerprint.of_entry(entry), fingerprint.of_info(info)).differs
    return not set(differs).intersection(fingerprint.HARDWARE)


def is_surely(info: DeviceInfo, entry: Mapping[str, Any]) -> bool:
    """Whether a device that matches also has the serial number, the WWN or the volume's UUID."""
    match = fingerprint.compare(fingerprint.of_entry(entry), fingerprint.of_info(info))
    return matches(info, entry) and match.proven


def lasts(path: str) -> bool:
    """Whether a path can be expected to lead to the same device after a restart of the host.

    The kernel's own names, directly under /dev, are given in the order of discovery.
    """
    return path.count("/") > 2


def find_other(
    devices: Iterable[DeviceInfo], entry: Mapping[str, Any], path: str, role: str
) -> DeviceInfo:
    """The one device that is the main of an entry, which nobody has named.

    Args:
        devices: what is on the host.
        entry: the main's entry.
        path: where it was; enough if it has neither serial number nor WWN, and the path `lasts`.
        role: what to call it in a refusal.

    Raises:
        Refused: it is not there, or several could be it.
    """
    fitting = {info.devno: info for info in devices if matches(info, entry)}
    sure = [info for info in fitting.values() if is_surely(info, entry)]
    found = sure or [info for info in fitting.values() if info.path == path and lasts(path)]
    if len(found) == 1:
        return found[0]
    who = fingerprint.in_words(entry.get("model"), entry.get("serial"))
    if found:
        raise Refused(
            f"and {found[1].path} could both be the {role} ({who}) of a replacement under way",
            device=found[0].path,
            remedy="detach the one that is not it",
        )
    raise Refused(
        f"is not there: the {role} ({who}) of a replacement under way, last seen here",
        device=path or "(unknown)",
        remedy="attach it; the target's data is on both disks",
    )


def is_new_main(info: DeviceInfo, metadata: Metadata) -> bool:
    """Whether a device that was named as main is the new one, not the old one.

    Raises:
        Refused: it is neither, or nobody can tell.
    """
    replacement = metadata.config["replacement"]
    new, old = replacement["main"], metadata.config["main"]
    fits = (matches(info, new), matches(info, old))
    if fits == (True, True):
        fits = (is_surely(info, new), is_surely(info, old))
    if fits[0] == fits[1]:
        same = lasts(info.path)
        fits = (same and info.path == new["path"], same and info.path == replacement["old_path"])
    if fits[0] == fits[1]:
        raise Refused(
            "is neither surely the old main nor surely the new one of the replacement under way",
            device=info.path,
            remedy=f"give {new['path']} to go on, or {replacement['old_path']} to go back",
        )
    return fits[0]


def check_new_main(new: DeviceInfo, old: DeviceInfo | None, config: Mapping[str, Any]) -> None:
    """Refuse a device that cannot replace the main.

    Args:
        new: the device.
        old: the main that it is to replace.
        config: the target's configuration.

    Raises:
        Refused: what is wrong with it.
    """
    sectors = config["main"]["sectors"]
    block = config["block_sectors"] * SECTOR_BYTES
    chunk = config["chunk_sectors"] * SECTOR_BYTES
    if old and old.disk == new.disk:
        raise Refused(
            f"is on the same disk as the main {old.path}",
            device=new.path,
            remedy="give another disk",
        )
    if old and new.wwn and new.wwn == old.wwn:
        raise Refused(
            f"has the main's WWN {new.wwn}, so it is another path to the same disk",
            device=new.path,
            remedy="give another disk",
        )
    if new.sectors < sectors:
        raise Refused(
            f"has {new.sectors} sectors of 512 bytes, fewer than the target's {sectors}",
            device=new.path,
            remedy="give a disk that is at least as large",
        )
    if new.logical_block != block:
        raise Refused(
            f"has logical blocks of {new.logical_block} bytes, but the target of {block}",
            device=new.path,
            remedy="give a disk with the target's block size",
        )
    if chunk % new.physical_block:
        raise Refused(
            f"has physical blocks of {new.physical_block} bytes, of which the target's chunk of "
            f"{chunk} bytes is not a multiple",
            device=new.path,
            remedy="give a disk with smaller physical blocks",
        )
