# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""dm-remap scan: reads a target's disks to find bad sectors."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Sequence
from typing import Any, Callable

from ..devmapper import check_name
from ..engine import Engine
from ..errors import Refused, count_of
from ..extents import find
from ..format import geometry_of
from ..marks import SECTOR_BYTES
from ..report import describe_remap, warnings_of_remap
from ..scanning import Finding, scan, stretches
from ..sizes import size_text
from ..target import ActiveTarget
from .framework import TARGET, Command, Exit, Host, Result, add
from .targets import place_text, whole_number
from .text import listed, table

_TELL_SECONDS = 1.0


class _Progress:
    """A line on a terminal about how far a scan is; nothing elsewhere.

    Args:
        host: whose standard error it is written to.
        total: sectors to read.
        shown: whether to write.
        clock: seconds that only rise.
    """

    def __init__(
        self, host: Host, total: int, shown: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = host.stderr
        self._total = total
        self._shown = shown
        self._clock = clock
        self.begun = clock()
        self._told = self.begun
        self._width = 0

    def tell(self, done: int, bad: int) -> None:
        """Show that ``done`` sectors were read and ``bad`` of them could not be."""
        now = self._clock()
        if not self._shown or now < self._told + _TELL_SECONDS:
            return
        self._told = now
        rate = done * SECTOR_BYTES / max(now - self.begun, 0.001)
        left = (self._total - done) * SECTOR_BYTES / max(rate, 1.0)
        self._write(
            f"{100 * done // max(self._total, 1)} % of {size_text(self._total * SECTOR_BYTES)}, "
            f"{rate / (1 << 20):.1f} MiB/s, {count_of(bad, 'bad sector')}, "
            f"{left / 60:.0f} minutes left"
        )

    def end(self) -> None:
        """Take the line away."""
        if self._width:
            self._write("")
            self._stream.write("\r")

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write("\r" + text.ljust(self._width))
            self._stream.flush()
        self._width = len(text)


def scan_target(host: Host, options: argparse.Namespace) -> Result:
    """Read all that a target keeps on its disks."""
    name = check_name(options.name)
    engine = host.engine()
    target = engine.require(name)
    first = _first(target, options.first)
    places = stretches(target.metadata, first)
    total = sum(place.count for place in places)
    progress = _Progress(host, total, host.stderr.isatty() and not options.json)
    done, end, interrupted = 0, first, False
    findings: list[Finding] = []
    with contextlib.ExitStack() as opened:
        devices: dict[int | None, Any] = {}

        def device_of(spare: int | None) -> Any:
            if spare not in devices:
                devices[spare] = opened.enter_context(engine.open_part(target, spare))
            return devices[spare]

        def unit_of(spare: int | None) -> int:
            return _unit(target, spare)

        try:
            for step in scan(places, device_of, unit_of):
                done, end = done + step.count, step.end
                findings += step.findings
                progress.tell(done, _bad(findings))
                _slow_down(options.rate, done, progress.begun)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            progress.end()
    spent = time.monotonic() - progress.begun
    remapped: dict[str, Any] | None = None
    warnings: list[str] = []
    if options.remap and not interrupted:
        remapped, warnings = _remap(host, engine, name, findings)
    data = {
        "target": name,
        "from": first,
        "end": end,
        "complete": not interrupted,
        "sectors": done,
        "seconds": round(spent, 3),
        "bad": _described(engine, name, findings),
        "remap": remapped,
    }
    if interrupted:
        warnings.append(f"interrupted; go on with --from {end}")
    return Result(data, _lines(data, spent), _code(data, interrupted), warnings)


def _first(target: ActiveTarget, sector: int) -> int:
    """The sector to begin with: the chunk's that the wanted one is in."""
    name, total = target.name, target.metadata.config["main"]["sectors"]
    if target.replacement:
        raise Refused(
            "its main is being replaced, and all of it is read for that",
            device=name,
            remedy="scan it when that is done",
        )
    if sector >= total:
        raise Refused(
            f"sector {sector} is not on the target, which has {total} sectors",
            device=name,
            remedy="give --from a sector of the target",
        )
    chunk: int = target.metadata.config["chunk_sectors"]
    return sector - sector % chunk


def _unit(target: ActiveTarget, spare: int | None) -> int:
    """Sectors that fail together: of main a block of the medium, of a spare what one tag covers."""
    if spare is not None:
        return geometry_of(target.metadata, spare).block_sectors
    if target.main is None:
        raise AssertionError("a target with sectors on main has a main")
    return max(target.main.logical_block, target.main.physical_block) // SECTOR_BYTES


def _slow_down(rate: int, done: int, begun: float) -> None:
    """Wait until ``done`` sectors are no more than the rate in MiB a second allows."""
    if rate:
        due = begun + done * SECTOR_BYTES / (rate * (1 << 20))
        time.sleep(max(0.0, due - time.monotonic()))


def _bad(findings: Sequence[Finding]) -> int:
    return sum(finding.count for finding in findings if not finding.weak)


def _remap(
    host: Host, engine: Engine, name: str, findings: Sequence[Finding]
) -> tuple[dict[str, Any] | None, list[str]]:
    """Move what main could not give, unless the reflex or a playbook has done it meanwhile."""
    metadata = engine.require(name).metadata
    extents, chunk = metadata.extents, metadata.config["chunk_sectors"]
    ranges = [
        (finding.start, finding.count)
        for finding in findings
        if finding.spare is None and not finding.weak and not find(extents, finding.start // chunk)
    ]
    if not ranges:
        return None, []
    host.log(f"remap {name} sectors " + listed(f"{s}+{c}" for s, c in ranges))
    report = engine.change_sectors(name, ranges, returned=False)
    return describe_remap(report), warnings_of_remap(name, report)


def _described(engine: Engine, name: str, findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Findings as plain data, with where their sectors are by now."""
    metadata = engine.require(name).metadata
    chunk: int = metadata.config["chunk_sectors"]
    found = []
    for finding in findings:
        place = find(metadata.extents, finding.start // chunk)
        found.append(
            {
                "start": finding.start,
                "count": finding.count,
                "spare": finding.spare,
                "error": finding.error,
                "weak": finding.weak,
                "now": place.spare if place else None,
            }
        )
    return found


def _code(data: dict[str, Any], interrupted: bool) -> Exit:
    if interrupted:
        return Exit.INTERRUPTED
    left = any(one["now"] == one["spare"] for one in data["bad"])
    lost = data["remap"] and data["remap"]["lost"]
    return Exit.FOUND if left or lost else Exit.OK


def _lines(data: dict[str, Any], spent: float) -> list[str]:
    rows = [
        [
            f"{one['start']}+{one['count']}",
            place_text(one["spare"]),
            one["error"],
            "read at the next try" if one["weak"] else "bad",
            place_text(one["now"]),
        ]
        for one in data["bad"]
    ]
    lines = table("SECTORS FOUND-ON ERROR STATE NOW-ON".split(), rows) if rows else []
    size = size_text(data["sectors"] * SECTOR_BYTES)
    rate = data["sectors"] * SECTOR_BYTES / max(spent, 0.001) / (1 << 20)
    bad = sum(one["count"] for one in data["bad"] if not one["weak"])
    lines.append(f"read {size} in {spent:.1f} s, {rate:.1f} MiB/s; {count_of(bad, 'bad sector')}")
    if data["remap"]:
        remap = data["remap"]
        moved = sum(chunk["moved"] for chunk in remap["chunks"])
        lost = sum(one["count"] for one in remap["lost"])
        lines.append(
            f"{count_of(moved, 'chunk')} moved to spares, {count_of(lost, 'sector')} lost; "
            f"generation {remap['generation']}"
        )
    elif any(o["spare"] is None and o["now"] is None and not o["weak"] for o in data["bad"]):
        lines.append("move them with --remap, or dm-remap remap")
    if any(one["spare"] is not None and not one["weak"] for one in data["bad"]):
        lines.append(
            "a spare has bad sectors: return these chunks to the main or replace the spare"
        )
    return lines


def _arguments(parser: argparse.ArgumentParser) -> None:
    add(parser, "name", metavar="NAME", help="the target", completes=TARGET)
    parser.add_argument(
        "--from",
        dest="first",
        metavar="SECTOR",
        type=whole_number,
        default=0,
        help="begin at the chunk of this sector of 512 bytes on the target (%(default)s)",
    )
    parser.add_argument(
        "--rate",
        metavar="MIB",
        type=whole_number,
        default=0,
        help="MiB to read in a second at most; 0 for as fast as the disks are (%(default)s)",
    )
    parser.add_argument(
        "--remap", action="store_true", help="at the end move the chunks of main that are bad"
    )


COMMAND = Command(
    "scan",
    "Read all that a target keeps on its disks, to find bad sectors",
    scan_target,
    _arguments,
    [
        "Works while the target is in use. The main and the remapped chunks on the spares are read "
        "past the target, so no application sees an error. A target whose errors are held is "
        "healed at once where the scan finds something. What is lost already is not read. "
        "The exit code is 4 if something is left that is bad. On a busy host run it under "
        "ionice(1), or with --rate.",
    ],
    [
        ("dm-remap scan data", "Find bad sectors."),
        ("dm-remap scan data --remap --rate 50", "Slowly, and move what is bad."),
    ],
)
