# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""What the programs share: a pattern that knows its place, targets, and reading by blocks."""

from __future__ import annotations

import errno
import json
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from dm_remap.blockdev import BlockDevice
from dm_remap.engine import Engine
from dm_remap.plan_removal import plan_absent
from dm_remap.planner import plan_present
from dm_remap.request import Request
from dm_remap.salvage import Patience

SECTOR_BYTES = 512
PIECE_SECTORS = 2048
RUN_SECTORS = 128
# One retry without a wait is enough where a sector fails for good.
HASTY = Patience(retries=1, backoff=0.0)


def arguments() -> dict[str, Any]:
    """What the test gave."""
    return dict(json.load(sys.stdin))


def answer(result: Any) -> None:
    """Tell the test; one line."""
    print(json.dumps(result), flush=True)


def peak_bytes() -> int:
    """The most memory that this process has had in use."""
    with open("/proc/self/status", encoding="ascii") as lines:
        words = next(line.split() for line in lines if line.startswith("VmHWM:"))
    return int(words[1]) * 1024


def pattern(seed: int, sector: int, count: int = 1) -> bytes:
    """Content of ``count`` sectors from ``sector`` on: each holds its number and the seed."""
    return b"".join(
        struct.pack("<QQ", seed + 1, number) * (SECTOR_BYTES // 16)
        for number in range(sector, sector + count)
    )


def fill(path: str, seed: int, sector: int, count: int) -> None:
    """Write the pattern, flushed."""
    with BlockDevice(path, writable=True) as device:
        for start in range(sector, sector + count, PIECE_SECTORS):
            device.write(start, pattern(seed, start, min(PIECE_SECTORS, sector + count - start)))
        device.flush()


def problems(
    path: str,
    seed: int,
    ranges: Iterable[tuple[int, int]],
    lost: Iterable[int] = (),
    changed: Mapping[int, bytes] | None = None,
) -> list[str]:
    """What reads otherwise than it should, block by block; empty when all is right.

    Args:
        path: the device.
        seed: the pattern's seed.
        ranges: first sectors and counts to read, whole logical blocks.
        lost: sectors that must not be readable; whole logical blocks.
        changed: content of the blocks that do not hold the pattern, by first sector.
    """
    missing, other = set(lost), dict(changed or {})
    found = []
    with BlockDevice(path) as device:
        block = device.logical_block // SECTOR_BYTES
        for start, count in ranges:
            for first in range(start, start + count, RUN_SECTORS):
                length = min(RUN_SECTORS, start + count - first)
                sectors = range(first, first + length, block)
                expected = {s: other.get(s) or pattern(seed, s, block) for s in sectors}
                whole = missing.isdisjoint(range(first, first + length))
                if not (whole and _reads_as(device, first, length, expected)):
                    for sector, content in expected.items():
                        found += _problem(device, sector, block, content, sector in missing)
    return found


def _reads_as(device: BlockDevice, first: int, length: int, expected: dict[int, bytes]) -> bool:
    try:
        return device.read(first, length) == b"".join(expected.values())
    except OSError:
        return False


def _problem(
    device: BlockDevice, sector: int, block: int, expected: bytes, missing: bool
) -> list[str]:
    try:
        data = device.read(sector, block)
    except OSError as error:
        if not missing:
            return [f"sector {sector}: {error}"]
        if error.errno not in (errno.EILSEQ, errno.EIO, errno.ENODATA):
            return [f"sector {sector} is lost, but fails with {error}"]
        return []
    if missing:
        return [f"sector {sector} is lost, but reads {data[:16].hex()}"]
    return [] if data == expected else [f"sector {sector} reads {data[:16].hex()}"]


def present(
    name: str,
    main: str,
    spares: Iterable[str],
    chunk_bytes: int | None = None,
    step: Callable[[str], None] | None = None,
    on_error: str = "fail",
    shim: str | None = None,
) -> list[str]:
    """Make the target present as the module does; the kinds of the actions that it took."""
    engine = Engine(step=step)
    engine.check_host()
    with engine.locked(name):
        request = Request(name, main, tuple(spares), chunk_bytes, on_error, shim)
        plan = plan_present(request, engine.see(name, main, request.spares))
        engine.apply(plan)
    return [action.kind for action in plan.actions]


def absent(name: str) -> None:
    """Remove an active target as the module does."""
    engine = Engine()
    with engine.locked(name):
        seen = engine.see(name, None, ())
        engine.apply(plan_absent(name, seen.target, seen))


def remap(
    name: str,
    ranges: Iterable[tuple[int, int]],
    patience: Patience | None = HASTY,
    step: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Remap as the module does; the report as plain data."""
    engine = Engine(step=step)
    with engine.locked(name):
        report = engine.remap(name, [tuple(item) for item in ranges], patience=patience)
    return {
        "generation": report.generation,
        "chunks": [asdict(chunk) for chunk in report.chunks],
        "lost": report.lost,
        "pause_seconds": report.pause_seconds,
        "seconds": report.seconds,
    }


def state(name: str) -> dict[str, Any]:
    """Generation, chunk size in sectors, remapped chunks and lost sectors of a target."""
    target = Engine().require(name)
    metadata = target.metadata
    return {
        "generation": metadata.generation,
        "chunk_sectors": metadata.config["chunk_sectors"],
        "chunks": sorted(
            extent.logical + number
            for extent in metadata.extents
            for number in range(extent.length)
        ),
        "lost": [item.sector + number for item in metadata.lost for number in range(item.count)],
        "interrupted": target.frozen is not None,
        "damaged": sum(map(len, target.choice.damaged.values())) + len(target.choice.stale),
    }


# What an application does in the middle of a remap: after a step it writes a block of the chunk,
# by its offset in sectors, and flushes. The first must be caught up with, the second goes to the
# new place, the third heals the sector that is lost.
LOST_OFFSET = 40
WRITES_AFTER = {"delay_set": 24, "thawed": 72, "swapped": LOST_OFFSET}


def new_content(sector: int, size: int) -> bytes:
    """What the application writes at ``sector``."""
    return struct.pack("<QQ", 1 << 63, sector) * (size // 16)


def meddling(name: str, start: int, reached: Callable[[str], None]) -> Callable[[str], None]:
    """A step hook: writes to the chunk at sector ``start`` as an application, then reports."""

    def step(done: str) -> None:
        if done in WRITES_AFTER:
            sector = start + WRITES_AFTER[done]
            with BlockDevice(f"/dev/mapper/{name}", writable=True) as device:
                device.write(sector, new_content(sector, device.logical_block))
                device.flush()
        reached(done)

    return step


def written_by(
    steps: list[str], last: str, start: int, size: int = SECTOR_BYTES
) -> dict[int, bytes]:
    """What the application of `meddling` had written when the remap came to step ``last``."""
    happened = steps[: steps.index(last) + 1]
    return {
        start + offset: new_content(start + offset, size)
        for step, offset in WRITES_AFTER.items()
        if step in happened
    }
