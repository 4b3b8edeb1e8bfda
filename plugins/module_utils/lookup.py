# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the look-ups of files share: their answers, and how they run a filesystem's own tools."""

from __future__ import annotations

import shutil
import subprocess
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from . import extents

FILE, METADATA, FREE, UNKNOWN = "file", "metadata", "free", "unknown"

_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


class CannotTell(Exception):
    """A look-up is impossible; the text says why, and what would make it possible."""


@dataclass(frozen=True)
class Found:
    """Who owns a block of a filesystem.

    Args:
        kind: `file`, `metadata`, `free` or `unknown`.
        inode: number of the inode it belongs to, 0 for none.
        paths: its names, relative to the filesystem's root, which itself is ".".
        reason: why more is not known, or "".
    """

    kind: str
    inode: int = 0
    paths: tuple[str, ...] = ()
    reason: str = ""


Extents = list[tuple[int, int]]
# Owners by block of the filesystem; a shared block has several.
Answers = dict[int, list[Found]]


@dataclass
class Names:
    """Names of inodes, and why some may be missing ("" when none can)."""

    paths: dict[int, list[str]] = field(default_factory=dict)
    missing: str = ""

    def of(self, inode: int) -> tuple[str, ...]:
        """The sorted names of an inode."""
        return tuple(sorted(self.paths.get(inode, ())))

    def reason(self, inode: int, links: int | None = None) -> str:
        """Why not all names of an inode are known, or "".

        Args:
            inode: its number.
            links: how many names it has, or None where that is not known.
        """
        known = len(self.paths.get(inode, ()))
        if known and (not self.missing or links == known):
            return ""
        return self.missing or "it has no name in any directory"


class Ranges:
    """Ranges of numbers, sorted once and then asked often; they may not overlap."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        self._ranges = sorted(ranges)
        self._starts = [start for start, _count in self._ranges]

    def __contains__(self, number: int) -> bool:
        index = bisect_right(self._starts, number) - 1
        return index >= 0 and number < sum(self._ranges[index])


def runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Numbers as ranges (first, count), sorted and joined."""
    return extents.runs(sorted(set(numbers)))


def inside(wanted: Sequence[int], start: int, count: int) -> Sequence[int]:
    """The part of the sorted ``wanted`` numbers that is in a range."""
    return wanted[bisect_right(wanted, start - 1) : bisect_right(wanted, start + count - 1)]


@dataclass(frozen=True)
class Output:
    """What a tool printed: its output as bytes, and its complaints as lines."""

    code: int
    text: bytes
    complaints: tuple[str, ...]

    @property
    def failed(self) -> bool:
        """Whether it complained, or ended otherwise than well; xfs_db may crash on damage."""
        return bool(self.complaints or self.code)

    @property
    def complaint(self) -> str:
        """The first of them, or how the tool ended."""
        return self.complaints[0] if self.complaints else f"exit code {self.code}"


def run_tool(package: str, arguments: Sequence[str], commands: Iterable[str] = ()) -> Output:
    """Run a filesystem's tool, which reads ``commands`` from its standard input, a line each.

    Args:
        package: what to install when the tool is not there.
        arguments: the program and its arguments.
        commands: lines of its command language, without a newline.

    Raises:
        CannotTell: the program is not there.
    """
    program = shutil.which(arguments[0], path=_PATH)
    if program is None:
        raise CannotTell(f"{arguments[0]} is not there; install {package}")
    done = subprocess.run(
        [program, *arguments[1:]],
        input="".join(f"{command}\n" for command in commands).encode(),
        capture_output=True,
        check=False,
        env={"LC_ALL": "C", "PATH": _PATH, "DEBUGFS_PAGER": "cat", "PAGER": "cat"},
    )
    # The programs of e2fsprogs print their version first.
    complaints = [
        line
        for line in done.stderr.decode(errors="replace").splitlines()
        if line.strip() and not line.startswith(f"{arguments[0]} 1.")
    ]
    return Output(done.returncode, done.stdout, tuple(complaints))


def fields_of(text: bytes, separator: str) -> Mapping[str, str]:
    """Lines ``name SEPARATOR value`` as a mapping; the first of a name counts."""
    found: dict[str, str] = {}
    for line in text.decode(errors="replace").splitlines():
        name, there, value = line.partition(separator)
        if there:
            found.setdefault(name.strip(), value.strip())
    return found
