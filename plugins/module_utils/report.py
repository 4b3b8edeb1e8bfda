# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What users are told of a target: the return values of the modules (pure)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from . import pool, replacement
from .errors import DmRemapError, count_of
from .extents import merge_sectors
from .files import Owner
from .marks import SECTOR_BYTES
from .moved import RemappedChunk, RemapReport
from .plan import Plan, pool_warnings, readable_table, warnings_of
from .target import (
    ActiveTarget,
    LostSpare,
    chunks_on,
    degradation,
    sectors_of,
    shim_of,
    usable_geometries,
)

# The event source refuses longer ones, because a rule engine keeps every event in memory.
_EVENT_PATH = 1000


def describe_target(target: ActiveTarget) -> dict[str, Any]:
    """A target as plain data: sizes in bytes or 512-byte sectors, as the key says."""
    metadata = target.metadata
    config = metadata.config
    spares = target.spare_infos
    chunks = pool.capacities(
        usable_geometries(target), metadata.extents, pool.bad_places_of(metadata)
    )
    return {
        "name": target.device.name,
        "device": f"/dev/mapper/{target.device.name}",
        "devno": target.device.devno,
        "uuid": str(metadata.target_uuid),
        "generation": metadata.generation,
        "sectors": config["main"]["sectors"],
        "chunk_size": config["chunk_sectors"] * SECTOR_BYTES,
        "on_error": config["on_error"],
        "shim": shim_of(metadata),
        "holding": target.path is not None and target.path.queueing,
        "allocation": pool.policy_of(config),
        "thresholds": asdict(pool.thresholds_of(config)),
        "main": {
            "path": target.main.path if target.main else None,
            "devno": target.main.devno if target.main else None,
            **config["main"],
            "device_sectors": replacement.device_sectors(config["main"]),
        },
        "replacing": _describe_replacement(target),
        "spares": [_describe_spare(target, index, chunks[index]) for index in spares],
        "pool": _describe_pool(pool.whole(chunks.values()), pool.thresholds_of(config)),
        "degraded": bool(target.lost_spares),
        "lost_spares": [_describe_lost(target, lost) for lost in target.lost_spares],
        "remapped_chunks": sum(extent.length for extent in metadata.extents),
        "extents": [asdict(extent) for extent in metadata.extents],
        "lost": sector_ranges([(item.sector, item.count) for item in metadata.lost]),
        "interrupted": target.frozen is not None,
        "table": readable_table(metadata, spares),
        "warnings": [
            *warnings_of(target.choice),
            *degradation(target),
            *pool_warnings(metadata, usable_geometries(target)),
        ],
    }


def describe_each(
    names: Iterable[str], require: Callable[[str], ActiveTarget]
) -> list[dict[str, Any]]:
    """Targets as plain data; one that cannot be described does not hide the others.

    Args:
        names: their names.
        require: gives a target, or raises DmRemapError.
    """
    return [_describe_or_error(name, require) for name in names]


def _describe_or_error(name: str, require: Callable[[str], ActiveTarget]) -> dict[str, Any]:
    try:
        return describe_target(require(name))
    except DmRemapError as error:
        return {"name": name, "device": f"/dev/mapper/{name}", "error": str(error)}


def _describe_replacement(target: ActiveTarget) -> dict[str, Any] | None:
    if target.replacement is None:
        return None
    metadata = target.metadata
    total = metadata.config["main"]["sectors"]
    copied = replacement.copied_sectors(metadata)
    return {
        "path": target.replacement.path,
        "devno": target.replacement.devno,
        "copied": copied * SECTOR_BYTES,
        "total": total * SECTOR_BYTES,
        "percent": round(100 * copied / total, 1),
    }


def _describe_pool(chunks: pool.Capacity, thresholds: pool.Thresholds) -> dict[str, Any]:
    return {
        "state": pool.state_of(chunks, thresholds).value,
        "filled_percent": round(chunks.filled_percent, 1),
        "chunks": chunks.total,
        "free_chunks": chunks.free,
        "used_chunks": chunks.used,
        "bad_chunks": chunks.bad,
        "reserved_chunks": chunks.reserved,
    }


def _describe_spare(target: ActiveTarget, index: int, chunks: pool.Capacity) -> dict[str, Any]:
    spare = next(item for item in target.spares if item.index == index)
    info = spare.candidate.info
    entry = target.metadata.config["spares"][index]
    return {
        "index": index,
        "path": info.path,
        "devno": info.devno,
        "uuid": entry["uuid"],
        "serial": info.serial,
        "wwn": info.wwn,
        "model": info.model,
        "chunks": chunks.total,
        "free_chunks": chunks.free,
        "used_chunks": chunks.used,
        "bad_chunks": chunks.bad,
        "reserved_chunks": chunks.reserved,
        "score": pool.scores_of(target.metadata)[index],
        "copies_damaged": info.path in target.choice.damaged,
        "stale": info.path in target.choice.stale,
    }


def _describe_lost(target: ActiveTarget, lost: LostSpare) -> dict[str, Any]:
    metadata = target.metadata
    entry = metadata.config["spares"][lost.index]
    chunks = chunks_on(metadata, lost.index)
    return {
        "index": lost.index,
        "path": lost.path or None,
        "uuid": entry["uuid"],
        "serial": entry.get("serial", ""),
        "wwn": entry.get("wwn", ""),
        "model": entry.get("model", ""),
        "reason": lost.reason,
        "chunks": len(chunks),
        "unavailable": sector_ranges(sectors_of(metadata, chunks)),
    }


def describe_emptied(chunks: list[RemappedChunk]) -> dict[str, Any]:
    """What became of chunks that had to leave a spare; counts in sectors but for ``moved``."""
    return {
        "moved": len(chunks),
        "recovered": sum(c.recovered_first_read + c.recovered_on_retry for c in chunks),
        "lost": sector_ranges([item for chunk in chunks for item in chunk.lost]),
        "lost_before": sector_ranges([item for chunk in chunks for item in chunk.lost_before]),
    }


def describe_remap(report: RemapReport) -> dict[str, Any]:
    """What a remap saved and lost; counts in sectors, durations in seconds."""
    return {
        "generation": report.generation,
        "chunks": [describe_chunk(chunk) for chunk in report.chunks],
        "recovered": report.recovered,
        "lost": sector_ranges(report.lost),
        "lost_files": [describe_owner(owner) for owner in report.files],
        "salvage_seconds": round(report.salvage_seconds, 4),
        "pause_seconds": round(report.pause_seconds, 4),
        "seconds": round(report.seconds, 4),
    }


def describe_chunk(chunk: RemappedChunk) -> dict[str, Any]:
    """What became of one chunk."""
    return {
        **asdict(chunk),
        "lost": sector_ranges(chunk.lost),
        "lost_before": sector_ranges(chunk.lost_before),
    }


def describe_owner(owner: Owner) -> dict[str, Any]:
    """Whom lost sectors belonged to, as plain data with names that can be printed."""
    return {**asdict(owner), "paths": [printable(path) for path in owner.paths]}


def warnings_of_remap(name: str, report: RemapReport) -> list[str]:
    """What the user should know of a remap, or of a return, of target ``name``."""
    found = list(report.plan.warnings)
    for chunk in report.staying:
        found.append(f"{name}: chunk {chunk.chunk} stays on spare {chunk.spare}: {chunk.reason}")
    if report.lost:
        lost = count_of(sum(count for _start, count in report.lost), "sector")
        found.append(f"{name}: {lost} could not be read and must be taken for lost")
    return found + [f"{name}: {warning}" for warning in unknown_owners(report.files)]


def _short(path: str) -> str:
    """A path as an event may carry it: of one that is too long the end."""
    text = printable(path)
    return text if len(text) <= _EVENT_PATH else "…" + text[1 - _EVENT_PATH :]


def event_files(owners: Iterable[Owner]) -> list[dict[str, Any]]:
    """Owners as an event tells them: one entry for each name, or one without a path."""
    return [
        {"start": owner.start, "count": owner.count, "kind": owner.kind, "path": _short(path)}
        for owner in owners
        for path in owner.paths or ("",)
    ]


def printable(path: str) -> str:
    r"""A path in which backslashes are doubled, and what is no text to print is ``\xNN``.

    So two paths that differ look different, and no name can begin a new line of a log.
    """
    text = os.fsencode(path).decode("utf-8", "surrogateescape")
    return "".join(
        "\\\\"
        if character == "\\"
        else character
        if character.isprintable()
        else "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
        for character in text
    )


def unknown_owners(owners: Iterable[Owner]) -> list[str]:
    """Why it is not known whom some sectors belonged to: each reason with its sectors."""
    sectors: dict[str, int] = {}
    for owner in owners:
        if owner.kind == "unknown":
            sectors[owner.reason] = sectors.get(owner.reason, 0) + owner.count
    return [
        f"whom {count_of(count, 'lost sector')} belonged to is unknown: {printable(reason)}"
        for reason, count in sectors.items()
    ]


def sector_ranges(ranges: list[tuple[int, int]]) -> list[dict[str, int]]:
    """Ranges of sectors as plain data, sorted and joined."""
    return [{"start": start, "count": count} for start, count in merge_sectors(ranges)]


def diff_of(plan: Plan) -> list[dict[str, str]]:
    """Configuration and table before and after a plan, as Ansible shows differences."""
    device = f"/dev/mapper/{plan.name}"
    return [
        {
            "before_header": f"{device} configuration",
            "after_header": f"{device} configuration",
            "before": _configuration_text(plan.before),
            "after": _configuration_text(plan.after),
        },
        {
            "before_header": f"{device} table",
            "after_header": f"{device} table",
            "before": _lines(plan.before.get("table", [])),
            "after": _lines(plan.after.get("table", [])),
        },
    ]


def _configuration_text(state: Any) -> str:
    if not state.get("config"):
        return ""
    shown = {"generation": state["generation"], **state["config"], "lost": state.get("lost", [])}
    return json.dumps(shown, indent=2, sort_keys=True) + "\n"


def _lines(table: list[str]) -> str:
    return "".join(line + "\n" for line in table)


def describe_migration(plan: Plan, chunks: Iterable[RemappedChunk]) -> str:
    """What became of a kernel target's data, in a sentence or two.

    Args:
        plan: the plan that was carried out.
        chunks: what became of the chunks.
    """
    if plan.migration is None or plan.old_spare is None:
        raise AssertionError("only for plans with a migration")
    unread = sum(count for chunk in chunks for _start, count in chunk.lost)
    lost = unread + sum(item.count for item in plan.migration.lost)
    text = (
        f"{count_of(len(plan.migration.places), 'remapped sector')} of {plan.old_spare.path} were "
        "looked for there, and all that could be read was compared with the new target. Neither "
        "main nor the old spare was written to."
    )
    if lost:
        return (
            f"{text} {count_of(lost, 'sector')} are lost and give errors until they are written; "
            "keep the old spare if you want to look for them yourself, else it may be wiped."
        )
    return f"{text} The old spare may be wiped."
