# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Where the lab keeps its images, keys and running machines."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path


class LabError(Exception):
    """The lab could not do what was asked; the message says what is wrong and what to do."""


def cache_dir() -> Path:
    """Return the lab's cache under ``$XDG_CACHE_HOME`` or ``~/.cache``, made if needed."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "dm-remap-lab"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def machines_dir() -> Path:
    """Return the directory that holds one directory for each machine."""
    path = cache_dir() / "machines"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def machine_dir(name: str) -> Path:
    """Return the directory of the machine called ``name``; it need not be there.

    Raises:
        LabError: the name is not one of letters, digits, ``.``, ``_`` and ``-``.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise LabError(f"machine {name!r}: use letters, digits, '.', '_' and '-' for its name")
    return machines_dir() / name


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path``; the kernel drops it if this process dies."""
    with open(path, "w", encoding="ascii") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def ssh_key() -> Path:
    """Return the cache's private SSH key, generated on first use (``.pub`` is beside it)."""
    key = cache_dir() / "id_ed25519"
    with locked(cache_dir() / "key.lock"):
        if not key.with_suffix(".pub").exists():
            key.unlink(missing_ok=True)
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "dm-remap-lab", "-f", key],
                check=True,
            )
    return key
