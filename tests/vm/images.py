# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is on a guest's disks, seen from the host."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from tests.lab import Machine

PIECE = 65536


def digests(machine: Machine) -> dict[str, str]:
    """SHA-256 of the content of every data disk, after the guest has written all it holds."""
    paths = [disk.path for disk in machine.disks.values()]
    machine.run(
        ["sh", "-c", 'sync; for disk in "$@"; do blockdev --flushbufs "$disk"; done', *paths]
    )
    return {name: digest(disk.image) for name, disk in machine.disks.items()}


def digest(image: Path) -> str:
    """SHA-256 of an image's pieces that are not all zero, each with its offset."""
    total = hashlib.sha256()
    for offset, data in pieces(image):
        total.update(offset.to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()


def pieces(image: Path) -> Iterator[tuple[int, bytes]]:
    """Offset and content of the pieces of ``image`` that are not all zero; holes are not read."""
    with open(image, "rb") as file:
        position = 0
        while True:
            try:
                begin = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            end = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            for offset in range(begin // PIECE * PIECE, end, PIECE):
                data = os.pread(file.fileno(), PIECE, offset)
                if data.strip(b"\0"):
                    yield offset, data
            position = -(-end // PIECE) * PIECE


def places_of(image: Path, word: bytes) -> list[int]:
    """Offsets at which ``word`` is in the image."""
    found = []
    tail, tail_end = b"", 0
    for offset, data in pieces(image):
        before = tail if tail_end == offset else b""
        text = before + data
        start = text.find(word)
        while start >= 0:
            found.append(offset - len(before) + start)
            start = text.find(word, start + 1)
        tail, tail_end = text[-(len(word) - 1) :], offset + len(data)
    return found


def mapped_devices(machine: Machine) -> str:
    """Every device-mapper device of the guest with its UUID and table."""
    return machine.run(
        "dmsetup info -c --noheadings -o name,uuid --sort name; dmsetup table | sort"
    ).stdout
