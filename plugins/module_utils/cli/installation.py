# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Puts the programs, their completions and manual pages on the host.

The role `host` runs this module after it has installed the core.
"""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
from collections.abc import Sequence
from typing import NamedTuple

from .documentation import SECTION, completion, manual
from .programs import PROGRAMS

COMMANDS = "/usr/sbin"
COMPLETIONS = "/usr/share/bash-completion/completions"
MANUALS = f"/usr/share/man/man{SECTION}"

# The distribution's Python has PyYAML. The role compiles the core where it puts it; what Python
# compiles by itself is checked by time and size only, so an old form could serve for a newer file.
_ENTRY_POINT = """\
#!/usr/bin/python3
# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
\"\"\"Entry point of the command-line tools; its name says which one.\"\"\"

import sys

sys.path.insert(0, "/usr/lib/dm-remap")
sys.dont_write_bytecode = True

from dm_remap.cli.programs import main

sys.exit(main())
"""


class File(NamedTuple):
    """Content and permissions of a file."""

    text: str
    mode: int = 0o644


def files() -> dict[str, File]:
    """Every file that belongs to the programs, by its path."""
    found = {}
    for name, program in PROGRAMS.items():
        found[f"{COMMANDS}/{name}"] = File(_ENTRY_POINT, 0o755)
        found[f"{COMPLETIONS}/{name}"] = File(completion(program))
        found[f"{MANUALS}/{name}.{SECTION}"] = File(manual(program))
    return found


def outdated(root: str = "") -> list[str]:
    """Paths of the files below ``root`` that are missing or differ in content or mode."""
    return [path for path, file in files().items() if not _is(root + path, file)]


def _is(place: str, file: File) -> bool:
    try:
        with open(place, encoding="utf-8", newline="") as stream:
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
            return (stream.read(), mode) == file
    except (OSError, ValueError):
        return False


def install(root: str = "") -> list[str]:
    """Write what is outdated below ``root``; the paths."""
    wanted = files()
    written = outdated(root)
    for path in written:
        place, file = root + path, wanted[path]
        os.makedirs(os.path.dirname(place), mode=0o755, exist_ok=True)
        with open(place + ".new", "w", encoding="utf-8", newline="") as stream:
            stream.write(file.text)
        os.chmod(place + ".new", file.mode)
        os.replace(place + ".new", place)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    """Install the files, or with ``--check`` only say which would be written."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--root", default="")
    options = parser.parse_args(arguments)
    paths = outdated(options.root) if options.check else install(options.root)
    sys.stdout.write(json.dumps({"files": paths}) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
