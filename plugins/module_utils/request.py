# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The target that a user wants, what was seen for it, and what of a wish cannot be (pure)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from . import kernel_v4, pool
from .blockdev import DeviceInfo
from .devmapper import check_name
from .errors import DmRemapError, Refused, count_of
from .format import MAX_SPARES, Metadata
from .marks import SECTOR_BYTES
from .target import AUTO_SHIM, FAIL, HOLD, NO_SHIM, RAID_SHIM, ActiveTarget, Candidate

MIN_CHUNK_BYTES = 4096
MAX_CHUNK_BYTES = 1 << 20
DEFAULT_CHUNK_BYTES = 65536
# The values that a user may give.
ON_ERROR = (HOLD, FAIL)
SHIMS = (NO_SHIM, RAID_SHIM, AUTO_SHIM)


@dataclass(frozen=True)
class Request:
    """The target that the user wants.

    Args:
        name: its name.
        main: path of main.
        spares: paths of the spares.
        chunk_bytes: size of a chunk; None takes the default, or what the target has.
        on_error: ``hold`` or ``fail``; None takes ``hold``, or what the target has.
        shim: ``none``, ``raid`` or ``auto``; None takes ``none``, or what the target has.
        wipe: spares may hold something, which is erased, but for remapped chunks.
        discard_remaps: with ``wipe``, remapped chunks on the spares may be erased too.
        allocation: one of `pool.POLICIES`; None takes the default, or what the target has.
        warn: percent of used chunks from which on is warned; None likewise.
        critical: percent from which on the warning is critical; None likewise.
        migrate_from: path of a dm-remap-v4 spare whose remapped sectors a new target gets; None
            for none.
        migrate_pending: what to do with its remaps that may never have been used, one of
            `migration.PENDING_CHOICES`; None refuses them.
        migrate_unit: bytes that each of its remaps stands for; None takes a logical block.
        degraded: a target may be activated although spares of it are missing, and spares may be
            named that do not exist.
        trusted: device numbers of devices that the operator has named for their role in a target
            that exists. Serial number, WWN, model and volume that are recorded are no reason to
            refuse them; size and block size are. They are recorded anew. A spare among them also
            decides which history counts, against the host's own backup.
        carry_on: a replacement of the main that is under way goes on; else the target is only
            activated with both mains.
    """

    name: str
    main: str
    spares: tuple[str, ...]
    chunk_bytes: int | None = None
    on_error: str | None = None
    shim: str | None = None
    wipe: bool = False
    discard_remaps: bool = False
    allocation: str | None = None
    warn: int | None = None
    critical: int | None = None
    migrate_from: str | None = None
    migrate_pending: str | None = None
    migrate_unit: int | None = None
    degraded: bool = False
    trusted: frozenset[str] = frozenset()
    carry_on: bool = True


@dataclass(frozen=True)
class OldSpare:
    """The spare of a kernel target: who it is, and the metadata on it."""

    info: DeviceInfo
    survey: kernel_v4.Survey


@dataclass(frozen=True)
class Seen:
    """What was observed for a request.

    Args:
        target: the active target of that name.
        remains: mapped devices that an interrupted command of ours left under that name.
        taken: mapped devices of others that have a name which the target needs.
        main: the device that is to be main.
        candidates: the devices that are to be spares.
        healer: whether the daemon that heals held I/O runs on the host.
        new_main: what is on the device that is to be main where another one is it now.
        others: devices one of which may be the other main of a replacement under way.
        old_spare: the kernel target's spare that the target is to be migrated from, if it is there.
        absent: paths of named spares that do not exist or cannot be read.
        witness: the newest of the host's backups of the target; where no spare tells which one it
            is, of the target that had this name or one of these devices.
        removed: path of the host's note that the target was removed on purpose; else empty.
    """

    target: ActiveTarget | None
    remains: tuple[str, ...]
    main: DeviceInfo | None
    candidates: tuple[Candidate, ...]
    taken: tuple[str, ...] = ()
    healer: bool = True
    new_main: Candidate | None = None
    others: tuple[DeviceInfo, ...] = ()
    old_spare: OldSpare | None = None
    absent: tuple[str, ...] = ()
    witness: Metadata | None = None
    removed: str = ""


def request_faults(request: Request) -> Iterator[tuple[str, DmRemapError]]:
    """What of a request cannot be, whatever is on the host: the field of `Request`, and why."""
    try:
        check_name(request.name)
    except DmRemapError as error:
        yield "name", error
    for field_name, value, known in (
        ("on_error", request.on_error, ON_ERROR),
        ("shim", request.shim, SHIMS),
        ("allocation", request.allocation, pool.POLICIES),
    ):
        if value not in (None, *known):
            listed = f"{', '.join(known[:-1])} or {known[-1]}"
            yield (
                field_name,
                Refused(
                    f"{field_name} {value!r} is not known",
                    device=request.name,
                    remedy=f"use {listed}",
                ),
            )
    if not 1 <= len(request.spares) <= MAX_SPARES:
        yield (
            "spares",
            Refused(
                f"has {count_of(len(request.spares), 'spare')}",
                device=request.name,
                remedy=f"give 1 to {MAX_SPARES} spares",
            ),
        )
    size = request.chunk_bytes
    if size is not None and not (
        MIN_CHUNK_BYTES <= size <= MAX_CHUNK_BYTES and size & (size - 1) == 0
    ):
        yield (
            "chunk_bytes",
            Refused(
                f"a chunk of {size} bytes is not possible",
                device=request.name,
                remedy="use a power of two from 4 KiB to 1 MiB",
            ),
        )


def check_request(request: Request) -> None:
    """Refuse what cannot be, whatever is on the host."""
    for _field_name, error in request_faults(request):
        raise error


def check_unchangeable(request: Request, metadata: Metadata) -> None:
    """Refuse to change what a target keeps for as long as it lives."""
    chunk_bytes = metadata.config["chunk_sectors"] * SECTOR_BYTES
    if request.chunk_bytes not in (None, chunk_bytes):
        raise Refused(
            f"has chunks of {chunk_bytes} bytes, which cannot be changed",
            device=request.name,
            remedy=f"leave out chunk_size or give {chunk_bytes}",
        )


def wanted_policies(request: Request, config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a target's policies is to be stored, because the request wants it otherwise.

    Args:
        request: what is wanted; what it leaves open stays.
        config: the configuration that the target has.
    """
    changed: dict[str, Any] = {}
    if request.allocation not in (None, pool.policy_of(config)):
        changed["allocation"] = request.allocation
    before = pool.thresholds_of(config)
    try:
        after = pool.Thresholds(
            before.warn if request.warn is None else request.warn,
            before.critical if request.critical is None else request.critical,
        )
    except Refused as error:
        raise Refused(error.message, device=request.name, remedy=error.remedy) from error
    if after != before:
        stored = config.get("thresholds")
        changed["thresholds"] = {**(stored if isinstance(stored, dict) else {}), **asdict(after)}
    return changed


def wanted_errors(request: Request, seen: Seen) -> str:
    """What is to become of failed I/O; held only where a daemon heals it."""
    wanted = request.on_error or HOLD
    if wanted == HOLD and not seen.healer:
        raise Refused(
            "failed I/O would be held, but the daemon that heals it does not run on this host",
            device=request.name,
            remedy="apply the role dm_remap.storage.host first, or give on_error: fail",
        )
    return wanted


def wanted_shim(request: Request, main: DeviceInfo) -> str:
    """The shim that is to be between the map and main."""
    if request.shim == AUTO_SHIM:
        # Their medium errors pass multipath: ENODATA is no path error (blk_path_error).
        return RAID_SHIM if main.bus in ("scsi", "nvme") else NO_SHIM
    return request.shim or NO_SHIM
