# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""dm-remap: the commands for daily use."""

from __future__ import annotations

from ..backups import FOLDER
from . import hidden, metadata, scan, targets
from .framework import JOURNAL, Program

PROGRAM = Program(
    name="dm-remap",
    help="Look at targets, remap sectors, and look after their metadata",
    commands=(*targets.COMMANDS, scan.COMMAND, *hidden.COMMANDS, *metadata.COMMANDS),
    groups={"metadata": "Dump, check, repair and restore the copies of the metadata on spares"},
    files={
        FOLDER: "this host's backups of its targets' metadata",
        JOURNAL: "the daemon's journal of events",
    },
)
