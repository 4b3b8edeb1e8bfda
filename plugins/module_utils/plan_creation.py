# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A new target, and what it takes from the spare of a dm-remap-v4 target (pure)."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import asdict, replace

from . import kernel_v4, migration, pool, replacement
from .blockdev import DeviceInfo
from .checks import check_distinct, check_free, check_same_blocks, check_spare
from .errors import Refused, count_of
from .format import NO_DIGEST, Extent, Metadata, geometry_of
from .marks import SECTOR_BYTES
from .plan import Action, Plan, activations, creation, no_state, pool_warnings, state_of
from .plan_remap import choose_places, with_moves
from .request import DEFAULT_CHUNK_BYTES, Request, Seen, wanted_errors, wanted_policies, wanted_shim
from .target import member_index


def plan_creation(
    request: Request,
    main: DeviceInfo,
    seen: Seen,
    new_uuid: Callable[[], uuid.UUID],
    begun: frozenset[str] = frozenset(),
) -> Plan:
    """Plan a new target.

    ``begun`` are the paths of spares with metadata of an earlier try, which may be erased.
    """
    chunk_bytes = request.chunk_bytes or DEFAULT_CHUNK_BYTES
    if main.sectors < chunk_bytes // SECTOR_BYTES:
        raise Refused(
            "is smaller than a chunk",
            device=main.path,
            remedy="give a larger main or a smaller chunk_size",
        )
    _check_unknown(request, seen, main)
    spares = {index: c.info for index, c in enumerate(seen.candidates)}
    entries = []
    limits = asdict(pool.Thresholds())
    actions = [Action("remove_remains", name) for name in seen.remains]
    for index, candidate in enumerate(seen.candidates):
        info = candidate.info
        wipe = request.wipe or info.path in begun
        geometry = check_spare(candidate, main, chunk_bytes, wipe)
        content = list(candidate.signatures)
        if content or not candidate.survey.empty:
            actions.append(Action("wipe_spare", info.path, {"content": content}))
        capacity = pool.capacity(geometry, index, ())
        actions.append(Action("format_spare", info.path, {"chunks": capacity.total}))
        entries.append(
            {
                "uuid": str(new_uuid()),
                "geometry": geometry.to_dict(),
                **replacement.recorded(info, hardware_only=True),
            }
        )
    metadata = Metadata(
        target_uuid=new_uuid(),
        generation=1,
        timestamp_ns=0,
        host_id=uuid.UUID(int=0),
        parent_digest=NO_DIGEST,
        config={
            "name": request.name,
            "chunk_sectors": chunk_bytes // SECTOR_BYTES,
            "block_sectors": main.block_sectors,
            "on_error": wanted_errors(request, seen),
            "shim": wanted_shim(request, main),
            "allocation": pool.FIRST_FIT,
            "thresholds": limits,
            **wanted_policies(request, {}),
            "main": replacement.main_entry(main, main.sectors),
            "spares": entries,
        },
        health={},
        extents=(),
        lost=(),
    )
    actions += activations(request.name, spares)
    plan = Plan(
        name=request.name,
        actions=tuple(actions),
        before=no_state(),
        metadata=metadata,
        main=main,
        spares=spares,
    )
    if request.migrate_from is not None:
        plan = _with_migration(request, plan, main, seen)
    else:
        commit = Action("commit_metadata", request.name, {"generation": 1})
        plan = replace(plan, actions=(*actions, commit), after=state_of(metadata, spares))
    shared = [i.path for i in spares.values() if i.disk == main.disk]
    warnings = [f"{path} is on the same disk as the main and fails with it" for path in shared]
    return replace(
        plan,
        actions=(*plan.actions, creation(request.name, main)),
        warnings=(*warnings, *plan.warnings),
    )


def _with_migration(request: Request, plan: Plan, main: DeviceInfo, seen: Seen) -> Plan:
    """The plan of a new target that gets what a kernel target has remapped.

    Its first generation has all of that already. It becomes active only after another one, which
    says that all was compared.
    """
    old = seen.old_spare
    if old is None or plan.metadata is None:
        raise Refused(
            "no such device",
            device=request.migrate_from,
            remedy="give the spare of the kernel target",
        )
    check_distinct(main, [*(c.info for c in seen.candidates), old.info])
    check_free(old.info, seen.remains, "spare to be migrated from")
    choice = kernel_v4.choose(old.survey)
    _check_old_devices(main, old.info, choice.metadata)
    unit = request.migrate_unit
    if unit is not None and (unit < 1 or unit % SECTOR_BYTES):
        raise Refused(
            f"migrate_unit cannot be {unit} bytes",
            device=request.name,
            remedy="give a multiple of the main's logical block size",
        )
    taken = migration.resolve(
        choice.metadata,
        old.info.path,
        main.block_sectors,
        unit and unit // SECTOR_BYTES,
        request.migrate_pending,
    )
    metadata = replace(plan.metadata, config=migration.begun(plan.metadata.config, choice.metadata))
    chunks = taken.chunks(metadata.config["chunk_sectors"])
    geometries = {index: geometry_of(metadata, index) for index in plan.spares}
    placed = choose_places(metadata, chunks, geometries, ())
    lost = [(item.sector, item.count) for item in taken.lost]
    moves: dict[int, Extent | None] = {extent.logical: extent for extent in placed}
    after = with_moves(
        replace(metadata, generation=2, config=migration.verified(metadata.config)), moves, lost
    )
    details = {
        "remaps": len(choice.metadata.remaps),
        "sectors": len(taken.places),
        "chunks": len(chunks),
        "lost": [asdict(item) for item in taken.lost],
        "generation": 1,
    }
    return replace(
        plan,
        actions=(
            *plan.actions,
            Action("migrate_chunks", old.info.path, details),
            Action("verify_migration", old.info.path, {"generation": 2}),
        ),
        after=state_of(after, plan.spares),
        metadata=metadata,
        warnings=choice.warnings + taken.warnings + pool_warnings(after, geometries),
        migration=taken,
        old_spare=old.info,
    )


def _check_old_devices(
    main: DeviceInfo, old: DeviceInfo, metadata: kernel_v4.KernelMetadata
) -> None:
    """Refuse devices that cannot be the kernel target's main and spare."""
    if main.sectors != metadata.main_sectors:
        raise Refused(
            f"has {main.sectors} sectors, but the main that {old.path} was a spare for had "
            f"{metadata.main_sectors}",
            device=main.path,
            remedy="give the kernel target's own main",
        )
    if old.sectors != metadata.spare_sectors:
        raise Refused(
            f"has {old.sectors} sectors, but its metadata is of a spare with "
            f"{metadata.spare_sectors}",
            device=old.path,
            remedy="give the kernel target's own spare, not a copy on another device",
        )
    check_same_blocks(old, main, "attach both as they were attached under the kernel target")


def _check_unknown(request: Request, seen: Seen, main: DeviceInfo) -> None:
    """Refuse to begin anew where the host knows of remapped chunks that would be lost by it.

    Spares whose copies of the metadata were all overwritten look empty.
    """
    backup = seen.witness
    if not backup or not backup.extents or seen.removed or migration.unfinished(backup):
        return
    if request.wipe and request.discard_remaps:
        return
    known = [c.info.path for c in seen.candidates if member_index(c.info, backup) is not None]
    if not known and not replacement.is_surely(main, backup.config["main"]):
        return
    count = sum(extent.length for extent in backup.extents)
    raise Refused(
        f"belongs to target {backup.config.get('name')!r} by this host's backup, with "
        f"{count_of(count, 'remapped chunk')}, but none of the spares carries its metadata",
        device=", ".join(known) or main.path,
        remedy="give the target's own spares, restore their metadata from the backup, or give "
        "wipe: true with discard_remaps: true to lose those chunks and begin anew",
    )
