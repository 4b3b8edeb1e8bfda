# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which devices are hidden from being mounted or claimed by mistake: mains and spares of targets.

A spare is known by its metadata. A main has nothing of ours on it, so the host keeps who its mains
are in a folder on the root file system: udev needs it before any other one is mounted. docs/boot.md
has the table of cases.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .blockdev import DeviceInfo
from .fingerprint import Fingerprint, compare, of_info
from .marks import UUID_PREFIX

MAIN, SPARE = "main", "spare"

_SUFFIX = ".json"


@dataclass(frozen=True)
class Known:
    """A target, and who its mains are; while one is being replaced, it has two.

    Args:
        target: the target's UUID.
        name: its name, for people.
        mains: their fingerprints.
        generation: the generation that tells so; 0 if that is not known.
    """

    target: uuid.UUID
    name: str
    mains: tuple[Fingerprint, ...]
    generation: int = 0


class Mains:
    """Mains that are kept in a folder, one file for each target.

    Args:
        folder: its path; it need not exist.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def all(self) -> list[Known]:
        """All that can be read, in the order of the targets' UUIDs."""
        try:
            names = sorted(os.listdir(self.folder))
        except OSError:
            return []
        read = (self._read(name) for name in names if name.endswith(_SUFFIX))
        return [known for known in read if known]

    def set(self, wanted: Iterable[Known]) -> None:
        """Keep these, and forget all others.

        Raises:
            OSError: the folder cannot be written.
        """
        there = {known.target: known for known in self.all()}
        told = {known.target: known for known in wanted}
        for target, known in told.items():
            if there.get(target) != known:
                self._write(known)
        for target in there.keys() - told.keys():
            os.unlink(self._path(target))

    def _read(self, name: str) -> Known | None:
        try:
            with open(os.path.join(self.folder, name), encoding="utf-8") as file:
                kept = json.load(file)
            return Known(
                uuid.UUID(name[: -len(_SUFFIX)]),
                str(kept["name"]),
                tuple(Fingerprint.from_dict(values) for values in kept["mains"]),
                int(kept.get("generation", 0)),
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def _write(self, known: Known) -> None:
        os.makedirs(self.folder, mode=0o755, exist_ok=True)
        path = self._path(known.target)
        mains = [main.to_dict() for main in known.mains]
        kept = {"name": known.name, "generation": known.generation, "mains": mains}
        with open(path + ".new", "w", encoding="utf-8") as file:
            json.dump(kept, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".new", path)

    def _path(self, target: uuid.UUID) -> str:
        return os.path.join(self.folder, str(target) + _SUFFIX)


@dataclass(frozen=True)
class Role:
    """What a device is hidden as.

    Args:
        kind: MAIN, SPARE, or "" where it is not hidden.
        target: UUID of the target, or "".
        reason: why, a sentence without a full stop.
    """

    kind: str
    target: str = ""
    reason: str = ""


def role_of(
    info: DeviceInfo,
    carries: uuid.UUID | None,
    mains: Iterable[Known],
    part_of: str = "",
) -> Role:
    """Decide whether a device is hidden.

    Args:
        info: the device.
        carries: target of a whole header of a copy that is on it, or None.
        mains: the mains that are known.
        part_of: what the disk is hidden as that it is a partition of, or "".
    """
    if part_of:
        return Role(part_of, reason=f"is a partition of a {part_of}")
    seen = of_info(info)
    content = seen.fs_type or ("" if seen.partition else seen.table_type)
    if carries and not content:
        return Role(SPARE, str(carries), "carries a copy of the metadata and nothing else")
    for known in mains:
        if not any(compare(main, seen).is_it for main in known.mains):
            continue
        used = [str(use) for use in info.used_by if not use.uuid.startswith(UUID_PREFIX)]
        if used and info.hidden != MAIN:
            # systemd would unmount what stands on a device that it is told to forget.
            return Role("", reason=f"is a main, but in use already: {', '.join(used)}")
        return Role(MAIN, str(known.target), f"is the main of target {known.name}")
    if carries:
        return Role("", reason=f"carries a copy of the metadata, but was used for {content} since")
    return Role("", reason="is neither a spare nor proved to be a main")


def roles_of(
    devices: Iterable[tuple[DeviceInfo, uuid.UUID | None]], mains: Sequence[Known]
) -> list[tuple[DeviceInfo, Role]]:
    """Decide for several devices, partitions by what udev hides their disks as.

    Args:
        devices: each with the target of a whole header that is on it.
        mains: the mains that are known.
    """
    there = list(devices)
    hidden = {info.devno: info.hidden for info, _carries in there}
    return [
        (info, role_of(info, carries, mains, hidden.get(info.disk, "") if info.partition else ""))
        for info, carries in there
    ]


def properties_of(role: Role, links: Iterable[str]) -> Mapping[str, str]:
    """What udev's rule is told about a hidden device.

    Args:
        role: what it is hidden as.
        links: its links so far, with or without the leading `/dev/`. Those by what is on the
            device are left out: they are the target's.
    """
    names = [link[5:] if link.startswith("/dev/") else link for link in links]
    kept = [name for name in names if not name.startswith(("disk/by-uuid/", "disk/by-label/"))]
    return {
        "DM_REMAP_ROLE": role.kind,
        "DM_REMAP_TARGET": role.target,
        "DM_REMAP_LINKS": " ".join(kept),
    }
