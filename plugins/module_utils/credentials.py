# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The token and the TLS certificate of a host's daemon, made on that host.

A certificate authority that exists for one signature only: its key is deleted right after it, so
whoever trusts its certificate trusts exactly one server key.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import secrets
import subprocess
import tempfile
from collections.abc import Sequence

from .errors import DmRemapError
from .settings import Settings

VALID_DAYS = 3650
RENEW_SECONDS = 90 * 86400

_NAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9])?\Z")


def subject_names(names: Sequence[str]) -> list[str]:
    """Return subject alternative names: `IP:` for addresses, `DNS:` for host names.

    Raises:
        DmRemapError: a name is neither.
    """
    found = []
    for name in names:
        try:
            found.append(f"IP:{ipaddress.ip_address(name).compressed}")
        except ValueError:
            if not _NAME.match(name):
                raise DmRemapError(
                    "is neither a host name nor an address",
                    device=repr(name),
                    remedy="give names that the controller connects to",
                ) from None
            found.append(f"DNS:{name}")
    return sorted(set(found))


def missing(settings: Settings, names: Sequence[str]) -> list[str]:
    """Return what must be made: `token`, `certificate`, or nothing.

    Args:
        settings: where the files belong.
        names: host names and addresses that the controller connects to.
    """
    wanted = []
    if not os.path.exists(settings.token_file):
        wanted.append("token")
    if not _certificate_serves(settings, subject_names(names)):
        wanted.append("certificate")
    return wanted


def make(settings: Settings, names: Sequence[str]) -> list[str]:
    """Make what is missing and return it, as `missing` names it.

    Raises:
        DmRemapError: openssl failed.
    """
    wanted = missing(settings, names)
    if "token" in wanted:
        _write(settings.token_file, secrets.token_urlsafe(32) + "\n", 0o600)
    if "certificate" in wanted:
        _make_certificate(settings, subject_names(names))
    return wanted


def authority_path(settings: Settings) -> str:
    """Return where the certificate is that the controller must trust."""
    return os.path.join(os.path.dirname(settings.certificate), "ca.crt")


def _certificate_serves(settings: Settings, names: Sequence[str]) -> bool:
    paths = (settings.certificate, settings.key, authority_path(settings))
    if not all(os.path.exists(path) for path in paths):
        return False
    try:
        _openssl("x509", "-in", settings.certificate, "-noout", "-checkend", str(RENEW_SECONDS))
        text = _openssl("x509", "-in", settings.certificate, "-noout", "-ext", "subjectAltName")
        _openssl("verify", "-CAfile", authority_path(settings), settings.certificate)
    except DmRemapError:
        return False
    # openssl prints addresses as "IP Address:".
    shown = set(re.findall(r"(?:DNS|IP):[^,\s]+", text.replace("IP Address:", "IP:")))
    return {_plain(name) for name in shown} == set(names)


def _plain(name: str) -> str:
    kind, _unused, value = name.partition(":")
    return f"IP:{ipaddress.ip_address(value).compressed}" if kind == "IP" else name


def _make_certificate(settings: Settings, names: Sequence[str]) -> None:
    directory = os.path.dirname(settings.certificate)
    os.makedirs(directory, mode=0o755, exist_ok=True)
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    with tempfile.TemporaryDirectory(prefix=".new-", dir=directory) as work:

        def place(name: str) -> str:
            return os.path.join(work, name)

        _write(place("extensions"), _EXTENSIONS.format(names=",".join(names)), 0o600)
        _write(place("config"), _CONFIGURATION, 0o600)
        common = ("-config", place("config"), "-sha256")
        _openssl(
            *("req", "-x509", *common, *curve, "-days", str(VALID_DAYS)),
            *("-extensions", "authority", "-subj", "/CN=dm-remap host authority"),
            *("-keyout", place("ca.key"), "-out", place("ca.crt")),
        )
        _openssl(
            *("req", "-new", *common, *curve, "-subj", "/CN=dm-remapd"),
            *("-keyout", place("server.key"), "-out", place("server.csr")),
        )
        _openssl(
            *("x509", "-req", "-sha256", "-in", place("server.csr"), "-days", str(VALID_DAYS)),
            *("-CA", place("ca.crt"), "-CAkey", place("ca.key"), "-set_serial", str(_serial())),
            *("-extfile", place("extensions"), "-out", place("server.crt")),
        )
        os.chmod(place("ca.crt"), 0o644)
        os.chmod(place("server.crt"), 0o644)
        # The certificate goes last: until then the set counts as missing and is made again.
        os.replace(place("server.key"), settings.key)
        os.replace(place("ca.crt"), authority_path(settings))
        os.replace(place("server.crt"), settings.certificate)


_CONFIGURATION = """[req]
distinguished_name = name
[name]
[authority]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign
subjectKeyIdentifier = hash
"""

_EXTENSIONS = """basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = {names}
"""


def _serial() -> int:
    return secrets.randbits(120) | 1 << 119


def _write(path: str, text: str, mode: int) -> None:
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    temporary = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(handle, "w", encoding="ascii") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _openssl(*arguments: str) -> str:
    try:
        result = subprocess.run(
            ["openssl", *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            umask=0o077,
        )
    except FileNotFoundError as error:
        raise DmRemapError(
            "is not installed", device="openssl", remedy="install the package openssl"
        ) from error
    if result.returncode:
        raise DmRemapError(
            f"{arguments[0]} failed: {result.stderr.strip()}",
            device="openssl",
            remedy="check its version, 1.1.1 or later is needed",
        )
    return result.stdout
