# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Writes targets, or reads them, chunk by chunk: digests, and null for what gives an error.

Arguments: ``write``, with the targets' names and the chunks of each that are written, and a number
that makes the data; ``read``, names of targets that are read whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys

CHUNK = 65536


def data_of(name: str, chunk: int, version: int) -> bytes:
    seed = f"{name} {chunk} {version}".encode()
    return hashlib.sha512(seed).digest() * (CHUNK // 64)


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def write(name: str, chunks: list[int], version: int) -> None:
    device = os.open(f"/dev/mapper/{name}", os.O_RDWR)
    for chunk in chunks:
        assert os.pwrite(device, data_of(name, chunk, version), chunk * CHUNK) == CHUNK
    os.fsync(device)
    os.close(device)


def read(name: str) -> list[str | None]:
    device = os.open(f"/dev/mapper/{name}", os.O_RDONLY)
    size = os.lseek(device, 0, os.SEEK_END)
    # Nothing may come from memory, and errors must not be those of reading ahead.
    os.posix_fadvise(device, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(device, 0, 0, os.POSIX_FADV_RANDOM)
    found: list[str | None] = []
    for start in range(0, size, CHUNK):
        try:
            found.append(digest_of(os.pread(device, CHUNK, start)))
        except OSError:
            found.append(None)
    os.close(device)
    return found


def main() -> None:
    request = json.load(sys.stdin)
    for name, chunks in request.get("write", {}).items():
        write(name, chunks, request["version"])
    print(json.dumps({name: read(name) for name in request.get("read", [])}))


if __name__ == "__main__":
    main()
