# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The daemon's configuration file."""

from __future__ import annotations

import json
import os
import shlex
import stat
from dataclasses import dataclass, fields
from typing import Any

from .errors import DmRemapError

PATH = "/etc/dm-remap/daemon.json"


@dataclass(frozen=True)
class Settings:
    """What `daemon.json` may say; every key is optional but `host`.

    Args:
        host: the name that the controller's inventory has for this host.
        address: address to listen on.
        port: TCP port, 1 to 65535.
        certificate: the server's certificate in PEM.
        key: its private key, readable by root only.
        token_file: the bearer token, readable by root only.
        state_directory: where the journal is.
        keep_events: number of events that the journal keeps, at least 100.
        probe_seconds: time budget of one look at a failed range.
        again_seconds: how long a bad sector that was reported is not reported again.
        burst_seconds: how long to wait for the rest of a burst of errors.
    """

    host: str
    address: str = "127.0.0.1"
    port: int = 9741
    certificate: str = "/etc/dm-remap/tls/server.crt"
    key: str = "/etc/dm-remap/tls/server.key"
    token_file: str = "/etc/dm-remap/token"
    state_directory: str = "/var/lib/dm-remap"
    keep_events: int = 100_000
    probe_seconds: float = 10.0
    again_seconds: float = 300.0
    burst_seconds: float = 0.05

    @property
    def journal(self) -> str:
        """Path of the journal."""
        return os.path.join(self.state_directory, "journal.db")

    @property
    def remedy(self) -> str:
        """What makes credentials anew that are missing or unusable."""
        return (
            f"remove it, and run: dm-remapd credentials --name {shlex.quote(self.host)};"
            " then let the role dm_remap.storage.host tell the controller"
        )


_LIMITS: dict[str, tuple[float, float]] = {
    "port": (0, 65535),
    "keep_events": (100, 100_000_000),
    "probe_seconds": (0.01, 3600),
    "again_seconds": (0, 86400),
    "burst_seconds": (0, 10),
}


def load(path: str = PATH) -> Settings:
    """Read the configuration.

    Raises:
        DmRemapError: the file is missing or one of its keys is not as it should be.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            values = json.load(stream)
    except OSError as error:
        raise _wrong(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise _wrong(path, f"is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise _wrong(path, "is not a JSON object")
    known = {item.name: type(item.default) for item in fields(Settings)}
    known["host"] = str
    for name, value in values.items():
        _check(path, name, value, known)
    if not values.get("host"):
        raise _wrong(path, "has no host")
    return Settings(**values)


def _check(path: str, name: str, value: Any, known: dict[str, Any]) -> None:
    if name not in known:
        raise _wrong(path, f"has the unknown key {name!r}")
    allowed: Any = (int, float) if known[name] is float else (known[name],)
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise _wrong(path, f"{name} is {value!r}, not {known[name].__name__}")
    if name in _LIMITS and not _LIMITS[name][0] <= float(value) <= _LIMITS[name][1]:
        raise _wrong(path, f"{name} is {value}, not from {_LIMITS[name][0]} to {_LIMITS[name][1]}")


def read_token(settings: Settings) -> str:
    """Read the bearer token, one line in a file that nobody else may read.

    Raises:
        DmRemapError: it is missing, too short, or others may read it.
    """
    path = settings.token_file
    try:
        with open(path, encoding="ascii") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            secret = stream.read().strip()
    except (OSError, ValueError) as error:
        raise _wrong(path, "cannot be read", settings.remedy) from error
    _check_private(path, mode)
    if len(secret) < 32:
        raise _wrong(path, "has fewer than 32 characters", settings.remedy)
    return secret


def check_key(settings: Settings) -> None:
    """Refuse a private key that group or others may read.

    Raises:
        DmRemapError: its mode gives others access, or it is missing.
    """
    try:
        mode = os.stat(settings.key).st_mode
    except OSError as error:
        raise _wrong(settings.key, "is missing", settings.remedy) from error
    _check_private(settings.key, mode)


def _check_private(path: str, mode: int) -> None:
    if stat.S_IMODE(mode) & 0o077:
        raise _wrong(path, "can be read by others", f"chmod 600 {path}")


def _wrong(path: str, message: str, remedy: str = "correct it, see docs/daemon.md") -> DmRemapError:
    return DmRemapError(message, device=path, remedy=remedy)
