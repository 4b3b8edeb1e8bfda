# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Locks that keep processes from changing the same target, or the same host, at once."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from typing import IO

from .devmapper import check_name
from .errors import Refused

LOCK_DIR = "/run/dm-remap"

# The daemon's reflex holds a lock on this file in the lock folder while it runs.
HEALER_LOCK = ".healer.lock"


class Locks:
    """The locks on this host's targets, and on what processes do with them.

    Args:
        folder: folder of the lock files.
    """

    def __init__(self, folder: str = LOCK_DIR) -> None:
        self._folder = folder

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold the lock of target ``name``, waiting for whoever has it."""
        with self._lock(check_name(name) + ".lock"):
            yield

    @contextlib.contextmanager
    def try_locked(self, name: str) -> Iterator[bool]:
        """Hold the lock of target ``name`` if nobody else has it; whether that is so."""
        with self._lock_file(check_name(name) + ".lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    @contextlib.contextmanager
    def locked_host(self) -> Iterator[None]:
        """Hold the lock under which devices get new owners; take it before a target's lock."""
        # No target can be called like this file.
        with self._lock(".host.lock"):
            yield

    @contextlib.contextmanager
    def healing(self) -> Iterator[None]:
        """Show that this process heals held I/O while the block runs.

        Raises:
            Refused: another process does.
        """
        with self._lock_file(HEALER_LOCK) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Refused(
                    "is held by another process that heals I/O on this host",
                    device=file.name,
                    remedy="stop the other dm-remapd",
                ) from error
            yield

    def healer_runs(self) -> bool:
        """Whether the daemon that heals held I/O runs on this host."""
        try:
            with open(os.path.join(self._folder, HEALER_LOCK), encoding="ascii") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    @contextlib.contextmanager
    def copying(self, name: str) -> Iterator[None]:
        """Show that this process copies target ``name`` to another main while the block runs.

        Two of them would overwrite what applications have written to the new main with what one of
        them had read before.

        Raises:
            Refused: another process does.
        """
        with self._lock_file(check_name(name) + ".copy.lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise Refused(
                    f"is being copied to another main by process {file.read() or '(unknown)'}",
                    device=name,
                    remedy="wait for it, or end it; a copy that was ended can go on or back",
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with self._lock_file(name) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _lock_file(self, name: str) -> IO[str]:
        os.makedirs(self._folder, mode=0o755, exist_ok=True)
        return open(os.path.join(self._folder, name), "a+", encoding="ascii")  # noqa: SIM115
