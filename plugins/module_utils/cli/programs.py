# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The programs that the role `host` installs, and what their entry points call."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper

from ..backups import FOLDER
from . import assemble, hidden, metadata, scan, targets, validate
from .framework import JOURNAL, Program, run

DM_REMAP = Program(
    name="dm-remap",
    help="Look at targets, remap sectors, and look after their metadata",
    commands=(*targets.COMMANDS, scan.COMMAND, *hidden.COMMANDS, *metadata.COMMANDS),
    groups={"metadata": "Dump, check, repair and restore the copies of the metadata on spares"},
    files={
        FOLDER: "this host's backups of its targets' metadata",
        JOURNAL: "the daemon's journal of events",
    },
)

PROGRAMS = {
    program.name: program
    for program in (DM_REMAP, validate.PROGRAM, assemble.DISCOVER, assemble.REASSEMBLE)
}


def main() -> int:
    """Run the program that the process is called as; the exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding lacks must not end the program.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return run(PROGRAMS.get(os.path.basename(sys.argv[0]), DM_REMAP), sys.argv[1:])
