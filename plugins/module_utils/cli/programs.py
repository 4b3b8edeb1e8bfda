# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The programs that the role `host` installs, and what their entry points call."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from io import TextIOWrapper

from .framework import Program, run

_DAILY = "dm-remap"
_MODULES = {
    _DAILY: "daily",
    "dm-remap-validate": "validate",
    "dm-remap-discover": "discover",
    "dm-remap-reassemble": "reassemble",
}


class _Programs(Mapping[str, Program]):
    """The programs by their names; only one that is asked for is imported."""

    def __getitem__(self, name: str) -> Program:
        module = importlib.import_module(f".{_MODULES[name]}", __package__)
        program: Program = module.PROGRAM
        return program

    def __iter__(self) -> Iterator[str]:
        return iter(_MODULES)

    def __len__(self) -> int:
        return len(_MODULES)


PROGRAMS = _Programs()


def main() -> int:
    """Run the program that the process is called as; the exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding lacks must not end the program.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    name = os.path.basename(sys.argv[0])
    return run(PROGRAMS[name if name in PROGRAMS else _DAILY], sys.argv[1:])
