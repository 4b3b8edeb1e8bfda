# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The commands for the copies of the metadata: dump, check, repair, restore."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .. import copies, dumps, mending
from ..engine import Engine
from ..errors import DmRemapError, Refused
from ..format import Copy, Diagnosis, Metadata, geometry_of
from ..plan import Plan
from ..plan_restore import RestoreRequest, plan_restore
from ..target import Candidate
from .framework import (
    DEVICE,
    FILE,
    TARGET,
    TARGET_OR_DEVICE,
    Command,
    Exit,
    Host,
    Result,
    add,
    add_writing,
)
from .targets import newest_of
from .text import action_lines, listed, table, time_text

PLACES = ("near", "near", "near", "near", "near", "far middle", "far end")


def _is_path(text: str) -> bool:
    # No target's name has a slash.
    return "/" in text


# Dump


def dump(host: Host, options: argparse.Namespace) -> Result:
    """The generation that counts on a device, of a target, or of a backup, as JSON."""
    metadata = _metadata_of(host, options)
    text = dumps.to_text(metadata)
    return Result(dumps.to_document(metadata), text.splitlines(), raw=True)


def _metadata_of(host: Host, options: argparse.Namespace) -> Metadata:
    wanted, generation = options.source, options.generation
    if _is_path(wanted):
        (candidate,) = host.engine().see_devices([wanted], signatures=False)
        if generation is None:
            return mending.choice_among([candidate]).metadata
        found = [c for c in candidate.survey.copies if c.header.generation == generation]
        if not found:
            raise Refused(
                f"has no valid copy of generation {generation}",
                device=wanted,
                remedy="see what it has with dm-remap metadata check",
            )
        return found[0].metadata
    if generation is None:
        return newest_of(host, wanted)[0]
    host.check_root()
    return host.backups.of(wanted, generation)


def _dump_arguments(parser: argparse.ArgumentParser) -> None:
    add(
        parser,
        "source",
        metavar="TARGET|DEVICE",
        help="a target's name or UUID, or a spare's path",
        completes=TARGET_OR_DEVICE,
    )
    parser.add_argument(
        "--generation", metavar="N", type=int, help="this generation instead of the newest"
    )


# Check


def check(host: Host, options: argparse.Namespace) -> Result:
    """Each copy on a device with its diagnosis."""
    engine = host.engine()
    (candidate,) = engine.see_devices([options.device], signatures=False)
    seen = candidate.survey
    name = str(seen.copies[0].metadata.config.get("name", "")) if seen.copies else ""
    if name and not _sound(seen):
        # A commit that was going on looks like damage.
        with engine.locked(name):
            (candidate,) = engine.see_devices([options.device], signatures=False)
            seen = candidate.survey
    rows = [*map(_valid, seen.copies), *map(_failed, seen.failed)]
    rows.sort(key=lambda row: (row["copy"], row["sector"]))
    newest = max((copy.header.generation for copy in seen.copies), default=0)
    for row in rows:
        if row["state"] == "ok" and row["generation"] < newest:
            row["state"] = Diagnosis.SEQUENCE.value
            row["message"] = f"generation {row['generation']}, but the device has {newest}"
    sound = _sound(seen)
    data = {
        "device": options.device,
        "sectors": seen.sectors,
        "target": name,
        "target_uuid": str(seen.target_uuid) if seen.target_uuid else None,
        "spare_uuid": str(seen.spare_uuid) if seen.spare_uuid else None,
        "generation": newest or None,
        "contested": seen.contested,
        "newer_format": seen.newer,
        "sound": sound,
        "copies": rows,
    }
    heads = "COPY PLACE SECTOR STATE GENERATION WRITTEN MESSAGE".split()
    lines = table(
        heads,
        [
            [
                row["copy"],
                PLACES[row["copy"]] if row["copy"] < len(PLACES) else None,
                row["sector"],
                row["state"],
                row["generation"],
                row["timestamp_ns"] and time_text(row["timestamp_ns"]),
                row["message"],
            ]
            for row in rows
        ],
    )
    return Result(data, [*_whose(seen, name), "", *lines], Exit.OK if sound else Exit.FOUND)


def _sound(seen: copies.Survey) -> bool:
    newest = {copy.header.digest for copy in seen.copies}
    return bool(seen.copies) and not seen.failed and len(newest) == 1 and not seen.contested


def _whose(seen: copies.Survey, name: str) -> list[str]:
    if seen.contested:
        claims = listed(f"spare {spare} of target {target}" for target, spare in seen.claims)
        return [f"{seen.device} has as many copies of {claims}"]
    if seen.copies:
        return [f"{seen.device} is spare {seen.spare_uuid} of target {name} ({seen.target_uuid})"]
    return [f"{seen.device} has no valid copy of a target's metadata"]


def _valid(copy: Copy) -> dict[str, Any]:
    header = copy.header
    return {
        "copy": header.copy_index,
        "sector": header.sector,
        "state": "ok",
        "generation": header.generation,
        "timestamp_ns": header.timestamp_ns,
        "digest": header.digest.hex(),
        "message": "",
    }


def _failed(copy: copies.FailedCopy) -> dict[str, Any]:
    message = copy.message
    prefix = f"{copy.diagnosis.value}: "
    return {
        "copy": copy.index,
        "sector": copy.sector,
        "state": copy.diagnosis.value,
        "generation": None,
        "timestamp_ns": None,
        "digest": None,
        "message": message[len(prefix) :] if message.startswith(prefix) else message,
    }


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    add(parser, "device", metavar="DEVICE", help="a spare's path", completes=DEVICE)


# Repair and restore


@contextlib.contextmanager
def _owned(engine: Engine, name: str) -> Iterator[None]:
    """Hold the locks under which devices get another content."""
    with contextlib.ExitStack() as locks:
        locks.enter_context(engine.locked_host())
        if name:
            locks.enter_context(engine.locked(name))
        yield


def _carry_out(
    host: Host, engine: Engine, options: argparse.Namespace, name: str, make: Callable[[], Plan]
) -> Result:
    """Apply a plan after a confirmation, or say what it is.

    Args:
        host: the host.
        engine: the engine.
        options: the command line.
        name: the target, whose lock is held while something is planned or written.
        make: looks at the devices and plans.
    """
    with _owned(engine, name):
        plan = make()
    actions = plan.action_dicts()
    data = {
        "target": plan.name,
        "generation": plan.metadata.generation if plan.metadata else None,
        "changed": plan.changes,
        "dry_run": options.dry_run,
        "actions": actions,
        "left": [],
    }
    if not plan.changes:
        return Result(data, ["nothing is to do"], warnings=plan.warnings)
    if options.dry_run:
        lines = ["would be done:", *action_lines(actions)]
        return Result(data, lines, warnings=plan.warnings)
    devices = listed(info.path for info in plan.spares.values())
    # Without the lock: the healer may need it, and people take their time.
    host.confirm(
        options,
        f"Write generation {data['generation']} of target {plan.name}'s metadata to {devices}?",
    )
    with _owned(engine, name):
        again = make()
        if again.action_dicts() != actions:
            raise Refused(
                "something has changed since it was planned, so nothing was written",
                device=devices,
                remedy="look again and decide anew",
            )
        engine.apply(again)
        data["left"] = left = _left(engine, again)
    lines = ["done:", *action_lines(actions)]
    code = Exit.FOUND if left else Exit.OK
    return Result(data, lines, code, [*plan.warnings, *left])


def _left(engine: Engine, plan: Plan) -> list[str]:
    """What is not whole on the devices that a plan has written to."""
    written = sorted(info.path for info in plan.spares.values())
    return [
        f"{candidate.info.path}: copy {fault.index} is still damaged: {fault.message}"
        for candidate in engine.see_devices(written, signatures=False)
        for fault in candidate.survey.failed
    ]


def repair(host: Host, options: argparse.Namespace) -> Result:
    """Rewrite damaged and stale copies."""
    sources: Sequence[str] = options.sources
    engine = host.engine()
    paths = [source for source in sources if _is_path(source)]
    if paths and len(paths) != len(sources) or not paths and len(sources) > 1:
        raise Refused(
            "several things are named of which one is a target",
            device=listed(sources),
            remedy="name one target, or spares of one target by their paths",
        )
    if not paths:
        name = sources[0]
        return _carry_out(
            host, engine, options, name, lambda: mending.plan_target_repair(engine.require(name))
        )

    def plan() -> Plan:
        candidates = engine.see_devices(paths)
        metadata = mending.choice_among(candidates).metadata
        return mending.plan_device_repair(candidates, engine.name_of(metadata.target_uuid))

    found = mending.choice_among(engine.see_devices(paths)).metadata
    return _carry_out(host, engine, options, str(found.config.get("name", "")), plan)


def _repair_arguments(parser: argparse.ArgumentParser) -> None:
    add(
        parser,
        "sources",
        metavar="TARGET|DEVICE",
        nargs="+",
        help="an active target's name, or the paths of spares of one that is not active",
        completes=TARGET_OR_DEVICE,
    )
    add_writing(parser)


def restore(host: Host, options: argparse.Namespace) -> Result:
    """Write a generation from a dump or a backup to a spare, or a backup to what is left of all."""
    engine = host.engine()
    if options.main is not None:
        return _restore_target(host, engine, options)
    if options.degraded or options.wipe or len(options.devices) > 1:
        raise Refused(
            "--degraded, --wipe and several devices are for the restoration of a whole target",
            remedy="give its --main too, or one spare that gets back what it had",
        )
    metadata = _generation_to_restore(host, options)

    def plan() -> Plan:
        (candidate,) = engine.see_devices(options.devices)
        index = mending.spare_for(metadata, candidate, options.spare)
        known = mending.Known(
            active=engine.name_of(metadata.target_uuid),
            generation=max(host.backups.generations(metadata.target_uuid), default=0),
        )
        formatted = _formatted(engine, candidate, metadata, index)
        return mending.plan_restore(
            metadata, candidate, index, formatted, known, options.allow_older
        )

    return _carry_out(host, engine, options, str(metadata.config.get("name", "")), plan)


def _restore_target(host: Host, engine: Engine, options: argparse.Namespace) -> Result:
    """Write a backup, as a new generation, to the spares that are left and to new ones."""
    if options.backup is None or options.spare is not None or options.allow_older:
        raise Refused(
            "a whole target is restored from this host's --backup, without --spare and "
            "--allow-older",
            remedy="leave these out, or leave out --main to restore one spare",
        )
    backup = host.backups.of(options.backup, options.generation)
    name = str(backup.config.get("name", ""))
    request = RestoreRequest(
        name, options.main, tuple(options.devices), options.degraded, options.wipe
    )
    return _carry_out(
        host,
        engine,
        options,
        name,
        lambda: plan_restore(request, engine.see_restore(request, backup)),
    )


def _formatted(engine: Engine, candidate: Candidate, metadata: Metadata, index: int) -> bool:
    geometry = geometry_of(metadata, index)
    if candidate.info.sectors < geometry.spare_sectors:
        return False
    return engine.is_formatted(candidate.info.path, geometry)


def _generation_to_restore(host: Host, options: argparse.Namespace) -> Metadata:
    if options.backup is not None:
        return host.backups.of(options.backup, options.generation)
    if options.generation is not None:
        raise Refused("--generation chooses among backups", remedy="leave it out with --from")
    name = options.dump
    limit = dumps.MAX_CHARACTERS + 1
    try:
        if name == "-":
            return dumps.from_text(host.stdin.read(limit), "the standard input")
        with open(name, encoding="utf-8") as stream:
            return dumps.from_text(stream.read(limit), name)
    except OSError as error:
        raise DmRemapError(
            f"cannot be read: {error.strerror}", device=name, remedy="name a dump's file"
        ) from error
    except UnicodeDecodeError as error:
        raise dumps.BadDump("is not UTF-8", device=name, remedy="name a dump's file") from error


def _restore_arguments(parser: argparse.ArgumentParser) -> None:
    add(
        parser,
        "devices",
        metavar="DEVICE",
        nargs="+",
        help="the spare's path; with --main all spares that are left, and new ones",
        completes=DEVICE,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    add(
        source,
        "--from",
        dest="dump",
        metavar="FILE",
        help="a dump; - reads the standard input, and needs --yes",
        completes=FILE,
    )
    add(
        source,
        "--backup",
        metavar="TARGET",
        help="this host's backup of the target with that name or UUID",
        completes=TARGET,
    )
    parser.add_argument(
        "--generation", metavar="N", type=int, help="this generation of the backups"
    )
    parser.add_argument(
        "--spare",
        metavar="N",
        type=int,
        help="which spare of the target the device is, where nothing on it tells",
    )
    parser.add_argument(
        "--allow-older",
        action="store_true",
        help="restore although this host has a backup of a newer generation",
    )
    add(
        parser,
        "--main",
        metavar="DEVICE",
        help="restore the whole target, whose main this is, as a new generation",
        completes=DEVICE,
    )
    parser.add_argument(
        "--degraded", action="store_true", help="with --main: spares of the target may be missing"
    )
    parser.add_argument(
        "--wipe", action="store_true", help="with --main: new spares may hold something, erased"
    )
    add_writing(parser)


COMMANDS = (
    Command(
        "metadata dump",
        "Print a target's metadata as JSON",
        dump,
        _dump_arguments,
        [
            "Prints the generation that counts: of an active target, of what is on a device, or of "
            "this host's newest backup. The document has everything, and metadata restore takes "
            "it back without a difference."
        ],
        [("dm-remap metadata dump data > data.json", "Keep the metadata of data.")],
    ),
    Command(
        "metadata check",
        "Examine the seven copies of the metadata on a device",
        check,
        _check_arguments,
        ["Only reads. Works on spares that are in use, too."],
        [("dm-remap metadata check /dev/sdc", "A line for each copy.")],
    ),
    Command(
        "metadata repair",
        "Rewrite damaged copies of the metadata from good ones",
        repair,
        _repair_arguments,
        [
            "For an active target all its spares are repaired. Otherwise name the spares: the "
            "newest generation on them counts, and those that are behind it are brought up to it. "
            "Good copies are left alone. Devices that are in use, or were used for something else "
            "since, are refused."
        ],
        [
            ("dm-remap metadata repair data --yes", "Repair the spares of an active target."),
            ("dm-remap metadata repair /dev/sdc /dev/sdd", "Repair those of an inactive one."),
        ],
    ),
    Command(
        "metadata restore",
        "Write metadata from a dump or a backup to a spare",
        restore,
        _restore_arguments,
        [
            "For a spare whose copies are all gone, and whose data is still there. It gets the "
            "same generation again, with the same digest. Refused are: a device that is in use or "
            "of an active target; another target's spare; a device that holds anything else; one "
            "that has another serial number or WWN than the metadata says; a newer generation or "
            "another history on the device; a dump that was changed; and a device without the "
            "tag area that the spare's remapped chunks would need.",
            "With --main the whole target is restored from this host's backup: as a new "
            "generation, to those of its spares that are left, whatever is left of their copies, "
            "and to empty devices, which become new spares. It is not activated by that; "
            "dm-remap-reassemble does it.",
        ],
        [
            ("dm-remap metadata restore /dev/sdc --backup data", "From this host's backup."),
            ("dm-remap metadata restore /dev/sdc --from data.json --dry-run", "From a dump."),
            (
                "dm-remap metadata restore /dev/sde --backup data --main /dev/sdb --degraded",
                "To a new spare, if all others are gone.",
            ),
        ],
    ),
)
