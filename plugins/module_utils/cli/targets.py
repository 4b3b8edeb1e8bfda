# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The commands for daily use of targets: status, remap, return, history."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .. import backups
from ..devmapper import check_name
from ..errors import DmRemapError, count_of
from ..format import Invalid, Metadata
from ..journal import newest_of_target
from ..report import describe_each, describe_remap, describe_target, warnings_of_remap
from ..salvage import Patience
from ..sizes import size_text
from .framework import TARGET, Command, Exit, Host, Result, add, add_dry_run
from .text import action_lines, listed, pairs, ranges_text, table, time_text

_RANGE = re.compile(r"([0-9]{1,18})(?:\+([0-9]{1,18}))?")


# Status


def status(host: Host, options: argparse.Namespace) -> Result:
    """What the module info returns, of one target or of all."""
    engine = host.engine()
    if options.name is not None:
        targets = [describe_target(engine.require(options.name))]
        lines = _details(targets[0])
    else:
        targets = describe_each(engine.target_names(), engine.require)
        lines = _overview(targets)
    warnings = [text for target in targets for text in _troubles(target)]
    sound = all(_states(target) == ["ok"] for target in targets)
    return Result({"targets": targets}, lines, Exit.OK if sound else Exit.FOUND, warnings)


def _states(target: Mapping[str, Any]) -> list[str]:
    """What is not in order with a target, or ``ok``."""
    if "error" in target:
        return ["error"]
    spares = target["spares"]
    found = {
        "degraded": target["degraded"],
        "interrupted": target["interrupted"],
        "stale spare": any(spare["stale"] for spare in spares),
        "damaged copies": any(spare["copies_damaged"] for spare in spares),
        "not holding": target["on_error"] == "hold" and not target["holding"],
    }
    return [name for name, there in found.items() if there] or ["ok"]


def _troubles(target: Mapping[str, Any]) -> list[str]:
    if "error" in target:
        return [target["error"]]
    return [str(warning) for warning in target["warnings"]]


def _overview(targets: Sequence[Mapping[str, Any]]) -> list[str]:
    if not targets:
        return ["no active targets"]
    rows = []
    for target in targets:
        if "error" in target:
            rows.append([target["name"], "error", *[None] * 7])
            continue
        pool = target["pool"]
        rows.append(
            [
                target["name"],
                listed(_states(target)),
                target["main"]["path"],
                _size(target["sectors"]),
                f"{pool['state']} {pool['filled_percent']}%",
                len(target["spares"]),
                target["remapped_chunks"],
                _lost(target),
                target["generation"],
            ]
        )
    heads = "NAME STATE MAIN SIZE POOL SPARES REMAPPED LOST GENERATION".split()
    return table(heads, rows)


def _size(sectors: int) -> str:
    return size_text(sectors * 512)


def _lost(target: Mapping[str, Any]) -> int:
    return sum(item["count"] for item in target["lost"])


def _details(target: Mapping[str, Any]) -> list[str]:
    pool, main, replacing = target["pool"], target["main"], target["replacing"]
    limits = target["thresholds"]
    lines = pairs(
        {
            "name": target["name"],
            "state": listed(_states(target)),
            "device": f"{target['device']} ({target['devno']})",
            "uuid": target["uuid"],
            "size": f"{_size(target['sectors'])} ({target['sectors']} sectors)",
            "generation": target["generation"],
            "chunk": size_text(target["chunk_size"]),
            "on error": target["on_error"],
            "shim": target["shim"],
            "allocation": target["allocation"],
            "thresholds": f"warn {limits['warn']}%, critical {limits['critical']}%",
            "main": _device(main),
            "replaced by": replacing and f"{replacing['path']}, {replacing['percent']}% copied",
            "pool": f"{pool['state']}, {pool['filled_percent']}% of {pool['chunks']} chunks, "
            f"{pool['free_chunks']} free",
            "remapped": f"{count_of(target['remapped_chunks'], 'chunk')} in "
            f"{count_of(len(target['extents']), 'run')}",
            "lost": ranges_text(target["lost"]),
        }
    )
    rows = [
        [
            spare["index"],
            spare["path"],
            spare["serial"],
            spare["chunks"],
            spare["used_chunks"],
            spare["free_chunks"],
            spare["bad_chunks"],
            spare["score"],
            "stale" if spare["stale"] else "damaged" if spare["copies_damaged"] else "ok",
        ]
        for spare in target["spares"]
    ]
    rows += [
        [lost["index"], lost["path"], lost["serial"], None, lost["chunks"], *[None] * 3, "lost"]
        for lost in target["lost_spares"]
    ]
    rows.sort(key=lambda row: row[0])
    heads = "SPARE DEVICE SERIAL CHUNKS USED FREE BAD SCORE METADATA".split()
    return [*lines, "", *table(heads, rows)]


def _device(main: Mapping[str, Any]) -> str:
    known = [main[key] for key in ("model", "serial", "wwn") if main.get(key)]
    return f"{main['path'] or 'not there'}" + (f" ({listed(known)})" if known else "")


def _status_arguments(parser: argparse.ArgumentParser) -> None:
    add(parser, "name", metavar="NAME", nargs="?", help="only this target", completes=TARGET)


# Remap and return


def sector_range(text: str) -> tuple[int, int]:
    """A range as a user writes it: ``START`` or ``START+COUNT``, in sectors of 512 bytes."""
    match = _RANGE.fullmatch(text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not START or START+COUNT in sectors")
    return int(match.group(1)), int(match.group(2) or 1)


def _change(host: Host, options: argparse.Namespace, returned: bool) -> Result:
    name = check_name(options.name)
    engine = host.engine()
    if not options.dry_run:
        word = "return" if returned else "remap"
        shown = listed(f"{start}+{count}" for start, count in options.ranges)
        host.log(f"{word} {name} sectors {shown}")
    report = engine.change_sectors(
        name,
        options.ranges,
        returned=returned,
        expected_generation=options.expected_generation,
        patience=Patience(retries=options.retries, budget=options.salvage_seconds),
        files_seconds=options.files_seconds,
        check=options.dry_run,
    )
    data = {
        "changed": report.plan.changes,
        "dry_run": options.dry_run,
        "actions": report.plan.action_dicts(),
        **describe_remap(report),
    }
    whole = not data["lost"] and not report.staying
    return Result(
        data,
        _planned(data) if options.dry_run else _changed(data),
        Exit.OK if whole else Exit.FOUND,
        warnings_of_remap(name, report),
    )


def _planned(data: Mapping[str, Any]) -> list[str]:
    if not data["actions"]:
        return ["nothing would be done"]
    return ["would be done:", *action_lines(data["actions"])]


def _changed(data: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            chunk["chunk"],
            f"{chunk['start']}+{chunk['count']}",
            place_text(chunk["origin"]),
            place_text(chunk["spare"]) if chunk["moved"] else "stays",
            chunk["recovered_first_read"] + chunk["recovered_on_retry"],
            ranges_text(chunk["lost"]),
        ]
        for chunk in data["chunks"]
    ]
    lines = table("CHUNK SECTORS FROM TO RECOVERED LOST".split(), rows) if rows else []
    for owner in data["lost_files"]:
        paths = listed(owner["paths"]) or owner["reason"] or owner["kind"]
        lines.append(f"lost {owner['start']}+{owner['count']}: {owner['kind']} {paths}")
    if not data["changed"]:
        return [*lines, f"nothing was to do; generation {data['generation']}"]
    pause = f"{1000 * data['pause_seconds']:.1f} ms"
    return [*lines, f"generation {data['generation']}; I/O to the chunks waited {pause}"]


def place_text(spare: int | None) -> str:
    """Where a chunk is: on main, or on a spare by its index."""
    return "main" if spare is None else f"spare {spare}"


def remap(host: Host, options: argparse.Namespace) -> Result:
    """Move chunks to spares."""
    return _change(host, options, returned=False)


def return_chunks(host: Host, options: argparse.Namespace) -> Result:
    """Move chunks back to main."""
    return _change(host, options, returned=True)


def _change_arguments(parser: argparse.ArgumentParser) -> None:
    add(parser, "name", metavar="NAME", help="the target", completes=TARGET)
    parser.add_argument(
        "ranges",
        metavar="RANGE",
        nargs="+",
        type=sector_range,
        help="START or START+COUNT, in sectors of 512 bytes on the target",
    )
    add_dry_run(parser)
    parser.add_argument(
        "--expected-generation",
        metavar="N",
        type=int,
        help="refuse unless the metadata is at this generation",
    )
    parser.add_argument(
        "--retries",
        metavar="N",
        type=whole_number,
        default=4,
        help="how often to read a block again that cannot be read (%(default)s)",
    )
    parser.add_argument(
        "--salvage-seconds",
        metavar="SECONDS",
        type=duration,
        default=600.0,
        help="time for reading what cannot be read at once (%(default)s)",
    )
    parser.add_argument(
        "--files-seconds",
        metavar="SECONDS",
        type=duration,
        default=60.0,
        help="time for finding the files of lost sectors; 0 does not look (%(default)s)",
    )


def whole_number(text: str) -> int:
    """A number of at least 0, as an argument."""
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


def duration(text: str) -> float:
    """Seconds, as an argument."""
    number = float(text)
    if not 0 <= number < float("inf"):
        raise ValueError(text)
    return number


whole_number.__name__, duration.__name__ = "number", "number of seconds"


# History


def history(host: Host, options: argparse.Namespace) -> Result:
    """The generations of a target that are known, and the events about it."""
    metadata, name, active = newest_of(host, options.name)
    generations = _generations(host, metadata, active)
    warnings = []
    events: list[dict[str, Any]] = []
    # A target of which only the UUID is known has no events of its own.
    if os.path.exists(host.journal) and options.events:
        try:
            events = newest_of_target(host.journal, name, options.events)
        except DmRemapError as error:
            warnings.append(str(error))
    data = {
        "name": name,
        "uuid": str(metadata.target_uuid),
        "active": active,
        "generations": generations,
        "events": events,
    }
    rows = [
        [
            item["generation"],
            item["time_ns"] and time_text(item["time_ns"]),
            item["remapped_chunks"],
            item["lost_sectors"],
            item["digest"],
            item["backup"],
        ]
        for item in generations
    ]
    lines = table("GENERATION TIME REMAPPED LOST DIGEST BACKUP".split(), rows)
    if events:
        rows = [
            [e["sequence"], f"{e['time'][:19]}Z", e["severity"], e["type"], e["message"]]
            for e in events
        ]
        lines += ["", *table("EVENT TIME SEVERITY TYPE MESSAGE".split(), rows)]
    return Result(data, lines, Exit.FOUND if warnings else Exit.OK, warnings)


def newest_of(host: Host, wanted: str) -> tuple[Metadata, str, bool]:
    """The newest metadata of a target, its name, and whether it is active.

    Raises:
        Refused: no target and no backup has that name or UUID.
        DmRemapError: the metadata cannot be read.
    """
    engine = host.engine()
    target_uuid = backups.uuid_of(wanted)
    name = engine.name_of(target_uuid) if target_uuid else check_name(wanted)
    target = engine.observe(name) if name else None
    if target:
        return target.metadata, target.name, True
    found = host.backups.of(wanted)
    return found, str(found.config.get("name", "")), False


def _generations(host: Host, metadata: Metadata, active: bool) -> list[dict[str, Any]]:
    """The generations of a target, the newest first."""
    known: dict[int, dict[str, Any]] = {
        generation: _generation(generation, digest) for generation, digest in metadata.history
    }
    shown = {**_generation(metadata.generation, metadata.digest[:8]), **_content(metadata)}
    known[metadata.generation] = shown
    for generation in host.backups.generations(metadata.target_uuid):
        entry = known.setdefault(generation, _generation(generation, b""))
        try:
            backup = host.backups.read(metadata.target_uuid, generation)
        except (OSError, Invalid):
            entry["backup"] = "damaged"
            continue
        same = entry["digest"] in ("", backup.digest[:8].hex())
        entry["backup"] = "yes" if same else "of another history"
        if same:
            entry.update(_content(backup), digest=backup.digest[:8].hex())
    return [known[generation] for generation in sorted(known, reverse=True)]


def _generation(generation: int, digest: bytes) -> dict[str, Any]:
    return {
        "generation": generation,
        "digest": digest.hex(),
        "time_ns": None,
        "host_id": None,
        "remapped_chunks": None,
        "lost_sectors": None,
        "backup": "no",
    }


def _content(metadata: Metadata) -> dict[str, Any]:
    return {
        "time_ns": metadata.timestamp_ns,
        "host_id": str(metadata.host_id),
        "remapped_chunks": sum(extent.length for extent in metadata.extents),
        "lost_sectors": sum(item.count for item in metadata.lost),
    }


def _history_arguments(parser: argparse.ArgumentParser) -> None:
    add(parser, "name", metavar="NAME", help="the target, or its UUID", completes=TARGET)
    parser.add_argument(
        "--events",
        metavar="N",
        type=whole_number,
        default=20,
        help="newest events to show (%(default)s)",
    )


COMMANDS = (
    Command(
        "status",
        "Show the active targets, or all about one",
        status,
        _status_arguments,
        [
            "Shows what the module dm_remap.storage.info returns. A target is not in order when it "
            "is degraded, when a remap of it is going on or was interrupted, when a spare is stale "
            "or has damaged copies of the metadata, or when I/O that fails does not wait although "
            "it should; then the exit code is 4. Full spares and lost sectors are shown and do not "
            "change it.",
        ],
        [
            ("dm-remap status", "A line for each active target."),
            ("dm-remap status data", "All about the target data."),
        ],
    ),
    Command(
        "remap",
        "Move the chunks that sectors are in from the main to a spare",
        remap,
        _change_arguments,
        [
            "Works while the target is in use. What can be read is saved; what cannot be read is "
            "reported as lost, and gives errors until it is written. Chunks that are on a spare "
            "already are left alone.",
        ],
        [("dm-remap remap data 5000+3 9000", "Move the chunks of four sectors.")],
    ),
    Command(
        "return",
        "Move chunks from the spares back to the main",
        return_chunks,
        _change_arguments,
        [
            "Works while the target is in use. A chunk with a sector that cannot be read, or whose "
            "place on the main does not keep what is written, stays where it is, with the reason.",
        ],
        [("dm-remap return data 5000+3 --dry-run", "See what would return.")],
    ),
    Command(
        "history",
        "Show the generations of a target and the events about it",
        history,
        _history_arguments,
        [
            "Generations are known from the target's metadata, and in more detail where this host "
            "has a backup of them. Events come from the daemon's journal. A target that is not "
            "active is found among the backups.",
        ],
        [("dm-remap history data --events 5", "Generations, and the last five events.")],
    ),
)
