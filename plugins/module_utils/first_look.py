# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What udev's rule asks of each block device: is it hidden, and as what?

It runs for every event of every disk, so what most of them are, none of ours, is found out with
little more than Python's start; the rest is imported only then.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence

from .marks import MAGIC, NEAR_SECTORS, SECTOR_BYTES, SMALLEST_FAR_SECTORS, far_sectors

# As the one of typing, which takes a while to import.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import uuid

# Mains of the host's own targets, and those that were found until the next restart.
LASTING, PASSING = "/etc/dm-remap/mains", "/run/dm-remap/mains"
FOLDERS = (LASTING, PASSING)
# What the rule is told of a device that is not hidden; nothing at all would tell of a failure.
SHOWN = {"DM_REMAP_ROLE": "none"}


def candidates(path: str, sectors: int) -> list[int]:
    """Sectors of a device at which something begins like a copy of the metadata.

    Args:
        path: the device's node.
        sectors: its size.
    """
    if sectors < SMALLEST_FAR_SECTORS:
        return []
    found: list[int] = []
    try:
        device = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        # It may be a known main all the same.
        return found
    try:
        for sector in (*NEAR_SECTORS, *far_sectors(sectors)):
            if os.pread(device, len(MAGIC), sector * SECTOR_BYTES) == MAGIC:
                found.append(sector)
    except OSError:
        # A device that fails is not asked more often than needed.
        pass
    finally:
        os.close(device)
    return found


def may_be_main(sectors: int, folders: Iterable[str]) -> bool:
    """Whether a main of this size in sectors, or of an unknown one, is known."""
    texts = [text for folder in folders for text in _texts(folder)]
    if not texts:
        return False
    import json

    for text in texts:
        try:
            sizes = [main.get("sectors") for main in json.loads(text)["mains"]]
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        if any(not size or size == sectors for size in sizes):
            return True
    return False


def _texts(folder: str) -> list[str]:
    """What is in the files of a folder that can be read."""
    texts = []
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    for name in names:
        try:
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                texts.append(file.read())
        except (OSError, ValueError):
            continue
    return texts


def _carries(path: str, sectors: Iterable[int]) -> uuid.UUID | None:
    """Target of the first whole header at these sectors, or None."""
    from .format import HEADER_BYTES, Invalid, unpack_header

    device = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        for sector in sectors:
            try:
                raw = os.pread(device, HEADER_BYTES, sector * SECTOR_BYTES)
                return unpack_header(raw, sector).target_uuid
            except OSError:
                continue
            except Invalid as error:
                # One of a newer format names its target too.
                if error.target_uuid:
                    return error.target_uuid
    finally:
        os.close(device)
    return None


def look(
    event: Mapping[str, str], folders: Sequence[str] = FOLDERS, sysfs: str = "/sys"
) -> Mapping[str, str]:
    """What the rule is told of the device; empty if it is not hidden.

    Args:
        event: the event's properties.
        folders: where mains are kept.
        sysfs: where sysfs is mounted.
    """
    path, part_of = event["DEVNAME"], event.get("DM_REMAP_PART", "")
    folder = f"{sysfs}/dev/block/{event['MAJOR']}:{event['MINOR']}"
    with open(f"{folder}/size", encoding="ascii") as file:
        sectors = int(file.read())
    # What udev has found a use for is no spare, whatever else is on it.
    used = event.get("ID_FS_TYPE") or event.get("ID_PART_TABLE_TYPE")
    places = [] if used or part_of else candidates(path, sectors)
    if not (part_of or places or may_be_main(sectors, folders)):
        return {}
    from . import blockdev, hiding

    target = _carries(path, places) if places else None
    known = [known for folder in folders for known in hiding.Mains(folder).all()]
    role = hiding.role_of(
        blockdev.info_in_event(event, sysfs),
        target,
        known,
        part_of,
    )
    if not role.kind:
        return {}
    return hiding.properties_of(role, event.get("DEVLINKS", "").split())


def main() -> int:
    """Print properties for udev. If that fails, the rule leaves the device hidden as it was."""
    try:
        found = look(os.environ) or SHOWN
    except Exception as error:
        # To show a main by mistake could cost its data.
        sys.stderr.write(f"dm-remap: cannot tell whether {os.environ.get('DEVNAME')} is ours: ")
        sys.stderr.write(f"{error!r}\n")
        return 1
    sys.stdout.write("".join(f"{key}={value}\n" for key, value in found.items()))
    return 0
