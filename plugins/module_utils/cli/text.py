# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Plain text for people: tables and lists (pure)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def clean(text: str) -> str:
    r"""Text in which what is not printable is ``\xNN``, so that it cannot steer a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a table: columns two spaces apart, numbers to the right.

    Args:
        heads: the columns' names, in capital letters.
        rows: as many cells each; None and "" are shown as a dash.
    """
    body = [["-" if cell in (None, "") else cell for cell in row] for row in rows]
    shown = [list(heads), *([clean(str(cell)) for cell in row] for row in body)]
    right = [
        any(_is_number(row[column]) for row in body)
        and all(_is_number(row[column]) or row[column] == "-" for row in body)
        for column in range(len(heads))
    ]
    widths = [max(len(row[column]) for row in shown) for column in range(len(heads))]
    return [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right)
        ).rstrip()
        for row in shown
    ]


def _is_number(cell: object) -> bool:
    return isinstance(cell, (int, float)) and not isinstance(cell, bool)


def pairs(items: Mapping[str, object]) -> list[str]:
    """Lines of names with their values; None and "" are shown as a dash."""
    width = max((len(name) for name in items), default=0)
    return [
        f"{name.ljust(width)}  {'-' if value in (None, '') else clean(str(value))}".rstrip()
        for name, value in items.items()
    ]


def listed(values: Iterable[object]) -> str:
    """Values with commas between them."""
    return ", ".join(str(value) for value in values)


def ranges_text(ranges: Iterable[Mapping[str, int]]) -> str:
    """Ranges of sectors as ``START+COUNT``, with commas."""
    return listed(f"{item['start']}+{item['count']}" for item in ranges)


def time_text(time_ns: int) -> str:
    """Nanoseconds since 1970 as a date and time in UTC."""
    try:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_ns // 10**9))
    except (OverflowError, OSError, ValueError):
        return f"{time_ns} ns"


def action_lines(actions: Iterable[Mapping[str, Any]]) -> list[str]:
    """Actions of a plan, a line each."""
    lines = []
    for action in actions:
        details = {k: v for k, v in action.items() if k not in ("action", "device")}
        words = [action["action"], action["device"]]
        words += [f"{key}={value}" for key, value in details.items()]
        lines.append("  " + clean(" ".join(map(str, words))))
    return lines
