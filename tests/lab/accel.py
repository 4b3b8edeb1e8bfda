# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Finds out whether KVM works here, by booting: a /dev/kvm that is there may still hang a guest."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from pathlib import Path

from .image import Image
from .paths import LabError, cache_dir, locked

QEMU = "qemu-system-x86_64"
TCG = ("-accel", "tcg,thread=multi,tb-size=128", "-cpu", "max")
_SINGLE = ("-accel", "tcg,thread=single,tb-size=128", "-cpu", "max")
# The guest's clock counts instructions, one a nanosecond; idle time takes as long as it takes,
COUNTED = (*_SINGLE, "-icount", "shift=0")
# or is skipped until the next timer.
SKIPPING = (*_SINGLE, "-icount", "shift=0,sleep=off")
KVM = ("-accel", "kvm", "-cpu", "host")
PROBE_SECONDS = 15


def accelerator(image: Image) -> tuple[str, ...]:
    """Return QEMU's arguments for the fastest accelerator that boots ``image``'s kernel.

    ``$DM_REMAP_LAB_ACCEL`` (``kvm``, ``tcg`` or ``counted``) decides without a probe. The probe's
    result is kept in the cache for this machine, its kernel and its QEMU.
    """
    wanted = os.environ.get("DM_REMAP_LAB_ACCEL")
    if wanted:
        known = {"kvm": KVM, "tcg": TCG, "counted": COUNTED}
        if wanted not in known:
            raise LabError(f"DM_REMAP_LAB_ACCEL={wanted}: give one of {', '.join(known)}")
        return known[wanted]
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return TCG
    path = cache_dir() / f"accel-{host_key()}"
    with locked(cache_dir() / "accel.lock"):
        if not path.exists():
            path.write_text("kvm" if kvm_boots(image) else "tcg", "ascii")
        return KVM if path.read_text("ascii") == "kvm" else TCG


def host_key() -> str:
    """Return a short digest of what KVM's working depends on."""
    machine_id = Path("/etc/machine-id")
    version = subprocess.run([QEMU, "--version"], check=True, capture_output=True, text=True)
    parts = (
        machine_id.read_text("ascii") if machine_id.exists() else platform.node(),
        platform.release(),
        version.stdout,
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def kvm_boots(image: Image) -> bool:
    """Boot the kernel without a disk: it panics, and QEMU ends, only where KVM works."""
    command = [QEMU, "-nodefaults", "-display", "none", "-no-reboot", "-m", "256", *KVM]
    command += ["-kernel", str(image.kernel), "-append", "panic=-1 console=ttyS0"]
    command += ["-serial", "stdio"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 and b"Kernel panic" in done.stdout
