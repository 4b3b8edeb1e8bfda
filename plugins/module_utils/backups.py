# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The host's own backups of its targets' metadata: ``FOLDER/TARGET-UUID/GENERATION.slot``.

Each file is copy 0 of the generation, as it stands on the target's first spare. Nothing is ever
assembled from a backup by itself; it is a witness of what was committed, and can be restored.

``FOLDER/TARGET-UUID/removed`` is there when the target was removed from this host.
"""

from __future__ import annotations

import contextlib
import os
import uuid

from .errors import Refused
from .format import Invalid, Metadata, geometry_of, pack_slot, spare_uuid_of, unpack_slot

FOLDER = "/var/lib/dm-remap/backup"
KEPT = 16

_REMOVED = "removed"
_COPY = 0
_SECTOR = 0


class Backups:
    """The backups in a folder.

    Args:
        folder: its path; it need not exist.
    """

    def __init__(self, folder: str = FOLDER) -> None:
        self.folder = folder

    def keep(self, metadata: Metadata) -> None:
        """Write a generation down, and remove all but the newest 16 of its target.

        Raises:
            OSError: it could not be written.
        """
        folder = self._of(metadata.target_uuid)
        index = next(i for i, spare in enumerate(metadata.config["spares"]) if spare)
        raw = pack_slot(
            metadata,
            spare_uuid_of(metadata, index),
            geometry_of(metadata, index).spare_sectors,
            copy_index=_COPY,
        )
        os.makedirs(folder, mode=0o700, exist_ok=True)
        path = _path(folder, metadata.generation)
        with open(path + ".new", "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".new", path)
        names = sorted(name for name in os.listdir(folder) if name != _REMOVED)
        for old in names[:-KEPT]:
            os.unlink(os.path.join(folder, old))

    def targets(self) -> list[uuid.UUID]:
        """The targets that have a folder here, in the order of their UUIDs."""
        found = []
        try:
            names = os.listdir(self.folder)
        except OSError:
            return []
        for name in names:
            with contextlib.suppress(ValueError):
                found.append(uuid.UUID(name))
        return sorted(found)

    def named(self, name: str) -> list[Metadata]:
        """The newest readable generation of each target that was called ``name`` in it."""
        newest = [self.newest(target) for target in self.targets()]
        return [found for found in newest if found and found.config.get("name") == name]

    def of(self, wanted: str, generation: int | None = None) -> Metadata:
        """A generation of a target, the newest that can be read by default.

        Args:
            wanted: name or UUID of the target.
            generation: which one.

        Raises:
            Refused: there is none, or several targets had that name.
        """
        target = uuid_of(wanted)
        named = self.named(wanted) if target is None else [self.newest(target)]
        found = [metadata for metadata in named if metadata]
        if not found:
            raise Refused(
                f"there is no backup of that name in {self.folder}",
                device=wanted,
                remedy="name a target that was used on this host, or give the UUID of one",
            )
        if len(found) > 1:
            uuids = ", ".join(str(metadata.target_uuid) for metadata in found)
            raise Refused(
                "several targets had this name", device=wanted, remedy=f"use one of {uuids}"
            )
        target = found[0].target_uuid
        try:
            return found[0] if generation is None else self.read(target, generation)
        except (OSError, Invalid) as error:
            there = ", ".join(map(str, self.generations(target)))
            raise Refused(
                f"has no backup of generation {generation} that can be read: {error}",
                device=wanted,
                remedy=f"use one of {there}",
            ) from error

    def generations(self, target: uuid.UUID) -> list[int]:
        """The generations of a target that are here, the newest first."""
        try:
            names = os.listdir(self._of(target))
        except OSError:
            return []
        numbers = [name.partition(".")[0] for name in names if name.endswith(".slot")]
        return sorted((int(number) for number in numbers if number.isdigit()), reverse=True)

    def read(self, target: uuid.UUID, generation: int) -> Metadata:
        """Read a generation of a target.

        Raises:
            OSError: it cannot be read.
            Invalid: it is damaged, with the diagnosis.
        """
        with open(_path(self._of(target), generation), "rb") as file:
            return unpack_slot(file.read(), _SECTOR).metadata

    def note_removal(self, target: uuid.UUID) -> None:
        """Note that a target was removed on purpose, so that nothing of it is to live again.

        Raises:
            OSError: it could not be noted.
        """
        os.makedirs(self._of(target), mode=0o700, exist_ok=True)
        with open(self.removal(target), "wb") as file:
            os.fsync(file.fileno())

    def removal(self, target: uuid.UUID) -> str:
        """Path of the file that notes a target's removal."""
        return os.path.join(self._of(target), _REMOVED)

    def removed(self, target: uuid.UUID) -> str:
        """Path of the note that a target was removed on purpose; empty if it was not."""
        path = self.removal(target)
        return path if os.path.exists(path) else ""

    def newest(self, target: uuid.UUID) -> Metadata | None:
        """The newest generation of a target that can be read, or None."""
        for generation in self.generations(target):
            try:
                return self.read(target, generation)
            except (OSError, Invalid):
                continue
        return None

    def _of(self, target: uuid.UUID) -> str:
        return os.path.join(self.folder, str(target))


def uuid_of(text: str) -> uuid.UUID | None:
    """The UUID that a user means, or None.

    A target can have a name of 32 hexadecimal digits, so only the usual form is a UUID.
    """
    try:
        found = uuid.UUID(text)
    except ValueError:
        return None
    return found if str(found) == text.lower() else None


def _path(folder: str, generation: int) -> str:
    return os.path.join(folder, f"{generation:020d}.slot")
