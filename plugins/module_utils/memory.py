# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Memory that is never swapped out."""

from __future__ import annotations

import ctypes

_MCL_CURRENT, _MCL_FUTURE = 1, 2


def lock_memory() -> None:
    """Keep this process in memory: its pages may live on the disk whose flushes will wait."""
    ctypes.CDLL(None, use_errno=True).mlockall(_MCL_CURRENT | _MCL_FUTURE)
