# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sizes as people write them, to bytes and back (pure)."""

from __future__ import annotations

import re

_UNITS = "KMGTPE"
_SIZE = re.compile(rf"\s*([0-9]{{1,20}})(\.[0-9]{{1,20}})?\s*(?:([{_UNITS}])(?:i?B)?|B)?\s*", re.I)


def bytes_of(text: str) -> int:
    """Bytes of a size such as ``65536``, ``64K``, ``64 KiB`` or ``0.5M``; units are of 1024.

    Raises:
        ValueError: it is no size, or a fraction of a byte.
    """
    match = _SIZE.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is not a size")
    whole, fraction, unit = match.group(1), match.group(2) or ".", match.group(3)
    factor = 1 << 10 * (1 + _UNITS.index(unit.upper())) if unit else 1
    scale: int = 10 ** (len(fraction) - 1)
    total, rest = divmod(int(whole + fraction[1:]) * factor, scale)
    if rest:
        raise ValueError(f"{text!r} is a fraction of a byte")
    return total


def size_text(count: int) -> str:
    """A number of bytes in the largest unit of which there is at least one, such as ``1.5 GiB``."""
    value, unit = float(count), "B"
    for letter in _UNITS:
        if value < 1024:
            break
        value, unit = value / 1024, f"{letter}iB"
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
