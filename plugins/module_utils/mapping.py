# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Remap extents to a device-mapper table and back (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .devmapper import Segment
from .extents import without
from .format import Extent


def build_table(
    sectors: int,
    chunk_sectors: int,
    main: str,
    extents: Sequence[Extent],
    spares: Mapping[int, str],
    frozen: Mapping[int, int] | None = None,
    frozen_device: str = "",
    copied: int = 0,
    new_main: str = "",
) -> list[Segment]:
    """The table of a target: main, with extents redirected to spares.

    Neighbouring pieces that continue each other on one device become one segment. Chunks of a
    spare that is missing become ``error`` segments: main's old content must not show through.

    Args:
        sectors: size of the target, which is main's.
        chunk_sectors: sectors in a chunk.
        main: device number (``major:minor``) of main.
        extents: sorted, disjoint remaps.
        spares: device number of each available spare's integrity device, by spare index.
        frozen: chunks held on ``frozen_device``, wherever they are, each with its chunk position
            there.
        frozen_device: device number of the device that holds frozen chunks.
        copied: sectors from the start that ``new_main`` has instead of ``main``.
        new_main: device number of the device that main is being replaced by.

    Returns:
        The segments, covering ``0..sectors`` without a gap.
    """
    held = frozen or {}
    pieces: list[tuple[int, int, str, int]] = []
    for logical, length, device, position in _chunk_runs(extents, held, spares, frozen_device):
        pieces.append(
            (logical * chunk_sectors, length * chunk_sectors, device, position * chunk_sectors)
        )
    segments: list[Segment] = []

    def append_main(start: int, end: int) -> None:
        border = min(max(start, copied), end)
        if start < border:
            _append(segments, start, border - start, new_main, start)
        if border < end:
            _append(segments, border, end - border, main, border)

    cursor = 0
    for start, length, device, offset in sorted(pieces):
        append_main(cursor, start)
        _append(segments, start, min(length, sectors - start), device, offset)
        cursor = start + length
    append_main(cursor, sectors)
    return segments


def _chunk_runs(
    extents: Iterable[Extent],
    held: Mapping[int, int],
    spares: Mapping[int, str],
    frozen_device: str,
) -> Iterable[tuple[int, int, str, int]]:
    for extent in without(extents, held):
        yield extent.logical, extent.length, spares.get(extent.spare, ""), extent.physical
    for chunk, position in held.items():
        yield chunk, 1, frozen_device, position


def _append(segments: list[Segment], start: int, length: int, device: str, offset: int) -> None:
    if not device:
        segments.append(Segment(start, length, "error", ""))
        return
    if segments and segments[-1].target == "linear":
        last = segments[-1]
        last_device, _unused, last_offset = last.params.rpartition(" ")
        if last_device == device and int(last_offset) + last.length == offset:
            segments[-1] = Segment(last.start, last.length + length, "linear", last.params)
            return
    segments.append(Segment(start, length, "linear", f"{device} {offset}"))


def linear_target(segment: Segment) -> tuple[str, int]:
    """Device number and first sector of a ``linear`` segment.

    Raises:
        ValueError: the segment is not linear.
    """
    if segment.target != "linear":
        raise ValueError(f"not a linear segment: {segment}")
    device, _unused, offset = segment.params.rpartition(" ")
    return device, int(offset)


def describe_table(segments: Iterable[Segment], names: Mapping[str, str]) -> list[str]:
    """The table as lines for people, with ``names`` in place of device numbers."""
    lines = []
    for segment in segments:
        if segment.target == "linear":
            device, offset = linear_target(segment)
            text = f"{segment.start} {segment.length} linear {names.get(device, device)} {offset}"
        else:
            text = str(segment)
        lines.append(text)
    return lines
