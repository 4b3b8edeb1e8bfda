# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""By what our devices are told from others: the copies of the metadata on a spare, which
docs/format.md describes, and the UUIDs of mapped devices. Pure.

Apart from `format` and `stack`, because udev's rule asks this of every device and must not pay for
the rest.
"""

from __future__ import annotations

SECTOR_BYTES = 512
SLOT_SECTORS = 1024
NEAR_SECTORS = (0, 1024, 2048, 4096, 8192)
FIRST_FREE_SECTOR = 16384
MAGIC = b"DMREMAP4"
# Below this, the far middle copy would lie among the near ones.
SMALLEST_FAR_SECTORS = 2 * FIRST_FREE_SECTOR

UUID_PREFIX = "DMREMAP-"


def far_sectors(sectors: int) -> tuple[int, int]:
    """First sectors of the two far slots on a device of this size in sectors."""
    middle = sectors // 2 // SLOT_SECTORS * SLOT_SECTORS
    return middle, (sectors // SLOT_SECTORS - 1) * SLOT_SECTORS
