# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whose are the blocks of an xfs: by xfs_db of xfsprogs, or by the kernel where it is mounted.

xfs_db reads the device, which a mounted xfs is ahead of: so a mounted one is asked itself, by
GETFSMAP, BULKSTAT and GETBMAPX.
"""

from __future__ import annotations

import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .lookup import (
    FILE,
    FREE,
    METADATA,
    UNKNOWN,
    Answers,
    CannotTell,
    Extents,
    Found,
    Names,
    Output,
    Ranges,
    fields_of,
    inside,
    run_tool,
    runs,
)
from .mounted import Inode, Mounted, xfs_extents

_PACKAGE = "xfsprogs"
_FIELDS = (
    "blocksize dblocks agblocks agcount agblklog sectsize logstart logblocks rootino rbmino "
    "rsumino uquotino gquotino pquotino icount ifree rblocks"
)
# A super block, and the headers of free space, inodes and free list: a sector each.
_HEADER_SECTORS = 4

# Owners of GETFSMAP: of every filesystem, and of xfs (xfs_fs.h).
_SPECIAL, _ATTRIBUTES, _MAP = 0x10, 0x2, 0x4
_OWN_FREE, _OWN_UNKNOWN = 1, 2
_OWN_COPYING = ord("X") << 32 | 7

_RMAP = re.compile(
    rb"^\d+: (\d+)/(\d+) len (\d+) owner (-?\d+) offset \d+ bmbt ([01]) attrfork ([01]) ",
    re.MULTILINE,
)
_RMAP_LINE = re.compile(rb"^\d+: \d+/\d+ len \d+ owner .*$", re.MULTILINE)
_COPYING = -9
_BMAP = re.compile(rb"^(data|attr) offset \d+ startblock (\d+) .*?count (\d+) flag", re.MULTILINE)
_BMAP_LINE = re.compile(rb"current inode|(data|attr) offset \d+ startblock|core\.realtime = ")
_FREE_SPACE = re.compile(rb"^ *(\d+) +(\d+) +(\d+)$", re.MULTILINE)
_CURRENT = b"current inode number is %d\n"
_ENTRY = re.compile(rb"\d+ +(\d+) +([\w?]+) +0x[0-9a-f]+ +(\d+) ")


@dataclass
class _Tree:
    """All inodes that have a name, their types, and why some may be missing."""

    names: Names = field(default_factory=Names)
    folders: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class _Part:
    """What a block is of an inode: its data, or metadata of it."""

    inode: int
    is_data: bool


class UnmountedXfs:
    """An xfs that nothing writes to.

    Args:
        device: the node or file that it begins at the start of.

    Raises:
        CannotTell: it is not in a state that answers can be relied on.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        names = _FIELDS.split()
        output = self._db(["sb 0", *(f"p {name}" for name in names), "version"])
        fields = fields_of(output.text, "=")
        numbers = {name: int(fields[name]) for name in names if fields.get(name, "").isdigit()}
        if not numbers.get("blocksize"):
            raise CannotTell(f"its superblock cannot be read: {output.complaint}")
        self._sb: Mapping[str, int] = numbers
        self.block_bytes = numbers["blocksize"]
        self.blocks = numbers["dblocks"]
        self._features = re.findall(r"[A-Z0-9_]+", output.text.decode(errors="replace"))
        self._problem = ""
        self._check_clean()

    def _check_clean(self) -> None:
        # An external log is not where xfs_logprint would look.
        if not self._sb.get("logstart"):
            raise CannotTell("its log is on another device, which is not looked at; mount it")
        output = run_tool(_PACKAGE, ["xfs_logprint", "-t", self._device])
        if b"state: <DIRTY>" in output.text:
            raise CannotTell("its log was not replayed; mount it once")
        if b"state: <CLEAN>" not in output.text:
            raise CannotTell(f"its log cannot be read: {output.complaint}")
        if "FTYPE" not in self._features:
            raise CannotTell("it was made without types in its directories (ftype); mount it")

    def owners(self, wanted: Iterable[int]) -> Answers:
        """Who owns each of the blocks, which are counted from the start of the device.

        Raises:
            CannotTell: none of it can be found out.
        """
        blocks = sorted(set(wanted))
        answers: Answers = {block: [Found(METADATA)] for block in blocks if self._is_fixed(block)}
        rest = [block for block in blocks if block not in answers]
        free = self._free_space() if rest else Ranges(())
        complete = not self._problem
        parts: dict[int, list[_Part]] = {}
        reverse = self._reverse(rest) if rest and "RMAPBT" in self._features else None
        if reverse is not None:
            parts, special = reverse
            answers.update({block: [Found(kind)] for block, kind in special.items()})
        answers.update(
            {
                block: [Found(FREE)]
                for block in rest
                if block in free and block not in parts and block not in answers
            }
        )
        rest = [block for block in rest if block not in answers]
        tree = self._tree() if rest else _Tree()
        if any(block not in parts for block in rest):
            places = self._places(tree, [block for block in rest if block not in parts])
            parts = {**places, **parts}
        complete = complete and not self._problem and self._has_all_inodes(tree)
        for block in rest:
            if block in parts:
                answers[block] = self._trusted(parts[block], tree)
            elif complete:
                # In use, and in no file nor directory.
                answers[block] = [Found(METADATA)]
            else:
                problem = self._problem or "not all of its inodes have a name"
                answers[block] = [Found(UNKNOWN, reason=problem)]
        return answers

    def _db(self, commands: Sequence[str]) -> Output:
        output = run_tool(_PACKAGE, ["xfs_db", "-r", self._device], commands)
        if b"command ls not found" in output.text or any(
            "command ls not found" in line for line in output.complaints
        ):
            raise CannotTell("xfs_db cannot list directories; install xfsprogs 5.12 or newer")
        return output

    def _ask(self, commands: Sequence[str]) -> Output:
        """Ask what all answers depend on: a complaint makes what was not found uncertain."""
        output = self._db(commands)
        if output.failed:
            self._problem = f"not all of its metadata can be read: {output.complaint}"
        return output

    def _note(self, lines: Iterable[bytes]) -> None:
        """Take lines that have no place in an output for complaints; some are printed there."""
        for line in lines:
            if line.strip():
                self._problem = "not all of its metadata can be read: " + line.strip().decode(
                    errors="replace"
                )

    def _is_fixed(self, block: int) -> bool:
        group, number = divmod(block, self._sb["agblocks"])
        headers = -(-_HEADER_SECTORS * self._sb["sectsize"] // self.block_bytes)
        log = self._linear(self._sb["logstart"])
        in_log = log <= block < log + self._sb["logblocks"]
        return number < headers or in_log or group >= self._sb["agcount"]

    def _linear(self, packed: int) -> int:
        """A block number of xfs, allocation group above and block below, as one from the start."""
        bits = self._sb["agblklog"]
        return (packed >> bits) * self._sb["agblocks"] + (packed & ((1 << bits) - 1))

    def _packed(self, block: int) -> int:
        group, number = divmod(block, self._sb["agblocks"])
        return group << self._sb["agblklog"] | number

    def _free_space(self) -> Ranges:
        # A histogram follows the list.
        text = re.split(rb"^ +from +to ", self._ask(["freesp -d"]).text, flags=re.MULTILINE)[0]
        self._note(line for line in text.splitlines() if not re.match(rb"[\d ]+$|\s*agno\s", line))
        return Ranges(
            {
                (int(group) * self._sb["agblocks"] + int(start), int(count))
                for group, start, count in _FREE_SPACE.findall(text)
            }
        )

    def _reverse(
        self, blocks: Sequence[int]
    ) -> tuple[dict[int, list[_Part]], dict[int, str]] | None:
        """Owners by the reverse mapping, or None where it cannot be read."""
        size = self._sb["agblocks"]
        commands = [
            f"fsmap {self._packed(start)} {self._packed(start + count - 1)}"
            for group in sorted({block // size for block in blocks})
            for start, count in runs(inside(blocks, group * size, size))
        ]
        output = self._db(commands)
        if output.failed or _RMAP_LINE.sub(b"", output.text).strip():
            return None
        parts: defaultdict[int, list[_Part]] = defaultdict(list)
        special: dict[int, str] = {}
        for record in _RMAP.findall(output.text):
            group, start, count, owner, tree, attributes = map(int, record)
            for block in inside(blocks, group * size + start, count):
                if owner > 0:
                    parts[block].append(_Part(owner, not (tree or attributes)))
                else:
                    special[block] = FREE if owner == _COPYING else METADATA
        return dict(parts), special

    def _tree(self) -> _Tree:
        root = self._sb["rootino"]
        tree = _Tree(Names({root: ["."]}), {root})
        level = {root: ""}
        while level:
            commands = [
                line
                for inode in level
                for line in (f"inode {inode}", f"echo @@ {inode}", "inode", "ls")
            ]
            output = self._ask([*commands, "echo @@ 0"])
            following: dict[int, str] = {}
            entries, strange = _entries(output.text, list(level))
            self._note(strange)
            for folder, inode, kind, name in entries:
                if name in (".", ".."):
                    continue
                path = f"{level[folder]}/{name}" if level[folder] else name
                tree.names.paths.setdefault(inode, []).append(path)
                if kind == "directory" and inode not in tree.folders:
                    tree.folders.add(inode)
                    following[inode] = path
            level = following
        if self._problem:
            tree.names.missing = self._problem
        return tree

    def _places(self, tree: _Tree, blocks: Sequence[int]) -> dict[int, list[_Part]]:
        """Which of the blocks are in the extents of the files and directories."""
        found: defaultdict[int, list[_Part]] = defaultdict(list)
        commands = []
        realtime = bool(self._sb.get("rblocks"))
        for inode in tree.names.paths:
            commands += [f"inode {inode}", f"echo @@ {inode}", "inode", "bmap"]
            if realtime:
                commands.append("p core.realtime")
        sections = re.split(rb"^@@ (\d+) *\n", self._ask(commands).text, flags=re.MULTILINE)
        for inode_text, text in zip(sections[1::2], sections[2::2]):
            inode = int(inode_text)
            # After one that cannot be read xfs_db is still at the inode before it.
            if not text.startswith(_CURRENT % inode):
                self._note([b"inode %d cannot be read" % inode])
                continue
            self._note(line for line in text.splitlines() if not _BMAP_LINE.match(line))
            elsewhere = b"core.realtime = 1" in text
            for fork, start, count in _BMAP.findall(text):
                if fork == b"data" and elsewhere:
                    continue
                for block in inside(blocks, self._linear(int(start)), int(count)):
                    found[block].append(_Part(inode, fork == b"data"))
        return dict(found)

    def _trusted(self, parts: Sequence[_Part], tree: _Tree) -> list[Found]:
        found = _described(parts, tree.names, tree.folders)
        if not self._problem:
            return found
        # Some inode drew a complaint; it must not be one of these.
        return [
            answer
            if not self._db([f"inode {answer.inode}", "bmap"]).failed
            else Found(UNKNOWN, answer.inode, reason=self._problem)
            for answer in found
        ]

    def _has_all_inodes(self, tree: _Tree) -> bool:
        hidden = {
            self._sb[name]
            for name in ("rbmino", "rsumino", "uquotino", "gquotino", "pquotino")
            if self._sb.get(name)
        }
        used = self._sb.get("icount", -1) - self._sb.get("ifree", 0)
        return len(set(tree.names.paths) | hidden) == used


def _entries(
    text: bytes, folders: Sequence[int]
) -> tuple[list[tuple[int, int, str, str]], list[bytes]]:
    """The entries of ``ls`` as (directory, inode, type, name), and lines that are none.

    A name may hold anything, but its length stands before it.

    Raises:
        CannotTell: the output has another form.
    """
    found: list[tuple[int, int, str, str]] = []
    strange: list[bytes] = []
    position = 0
    for folder in folders:
        echo = b"@@ %d \n" % folder
        position = text.find(echo, position)
        if position < 0:
            raise CannotTell(f"xfs_db lists directories in an unknown form: inode {folder}")
        position += len(echo)
        if not text.startswith(_CURRENT % folder, position):
            strange.append(b"inode %d cannot be read" % folder)
            continue
        position += len(_CURRENT % folder)
        while not text.startswith(b"@@ ", position):
            match = _ENTRY.match(text, position)
            if match is None:
                line, _newline, _rest = text[position:].partition(b"\n")
                strange.append(line)
                position += len(line) + 1
                if position >= len(text):
                    break
                continue
            begin, size = match.end(), int(match.group(3))
            if text[begin + size : begin + size + 2] != b" (":
                raise CannotTell(f"xfs_db lists directories in an unknown form: inode {folder}")
            name = os.fsdecode(text[begin : begin + size])
            found.append((folder, int(match.group(1)), match.group(2).decode(), name))
            position = text.find(b"\n", begin + size) + 1
    return found, strange


def _described(
    parts: Sequence[_Part], names: Names, folders: set[int], deleted: Iterable[int] = ()
) -> list[Found]:
    answers = []
    for inode in sorted({part.inode for part in parts}):
        is_data = any(part.is_data for part in parts if part.inode == inode)
        kind = FILE if is_data and inode not in folders else METADATA
        reason = names.reason(inode, 1 if inode in folders else None)
        if inode in deleted:
            reason = "it was deleted, and a process has it open"
        answers.append(Found(kind, inode, names.of(inode), reason))
    return answers


class MountedXfs:
    """An xfs that is mounted.

    Args:
        mounted: where.
    """

    def __init__(self, mounted: Mounted) -> None:
        self._mounted = mounted
        mounted.sync()
        figures = os.statvfs(mounted.point)
        self.block_bytes = figures.f_frsize
        # Less than the device has, when the log is on it: GETFSMAP knows where it ends.
        self.blocks = 1 << 62
        self._problem = ""

    def owners(self, wanted: Iterable[int]) -> Answers:
        """Who owns each of the blocks, which are counted from the start of the device.

        Raises:
            CannotTell: none of it can be found out.
        """
        blocks = sorted(set(wanted))
        answers: Answers = {}
        parts: defaultdict[int, list[_Part]] = defaultdict(list)
        hidden = self._ask_map(blocks, answers, parts)
        if hidden:
            self._search(hidden, parts)
            # What was given up or taken meanwhile is not what it was.
            still = self._ask_map(hidden, {}, defaultdict(list))
            for block in hidden:
                if block not in still:
                    answers[block] = [Found(UNKNOWN, reason="its owner changes; try again")]
                elif block not in parts:
                    answers[block] = [
                        Found(UNKNOWN, reason=self._problem) if self._problem else Found(METADATA)
                    ]
        parts_left = {block: found for block, found in parts.items() if block not in answers}
        owners = self._inodes({part.inode for found in parts_left.values() for part in found})
        names = self._mounted.names({i.number: i.links for i in owners.values() if i.links})
        folders = {inode.number for inode in owners.values() if stat.S_ISDIR(inode.mode)}
        deleted = {inode.number for inode in owners.values() if not inode.links}
        for block, found in parts_left.items():
            answers[block] = _described(found, names, folders, deleted)
        for block in blocks:
            answers.setdefault(block, [Found(UNKNOWN, reason="it is behind the filesystem's end")])
        return answers

    def _ask_map(
        self, blocks: Sequence[int], answers: Answers, parts: defaultdict[int, list[_Part]]
    ) -> list[int]:
        """Answer what GETFSMAP knows; the blocks in use of which it knows no owner."""
        hidden = set()
        for start, count in runs(blocks):
            try:
                records = self._mounted.owners(start * self.block_bytes, count * self.block_bytes)
            except OSError as error:
                raise CannotTell(f"the kernel does not tell owners: {error.strerror}") from error
            for record in records:
                first = record.physical // self.block_bytes
                for block in inside(blocks, first, record.length // self.block_bytes):
                    if not record.flags & _SPECIAL:
                        is_data = not record.flags & (_ATTRIBUTES | _MAP)
                        parts[block].append(_Part(record.owner, is_data))
                    elif record.owner == _OWN_UNKNOWN:
                        hidden.add(block)
                    else:
                        is_free = record.owner in (_OWN_FREE, _OWN_COPYING)
                        answers[block] = [Found(FREE if is_free else METADATA)]
        return sorted(hidden)

    def _search(self, blocks: Sequence[int], parts: defaultdict[int, list[_Part]]) -> None:
        """Look through the extents of all inodes, where there is no reverse mapping."""
        unreadable: list[str] = []
        try:
            for inode in self._mounted.inodes(unreadable):
                if stat.S_ISLNK(inode.mode) and inode.blocks:
                    self._problem = self._problem or (
                        "it is in use by metadata or by a symbolic link, which cannot be told "
                        "apart while it is mounted"
                    )
                if stat.S_ISREG(inode.mode) or stat.S_ISDIR(inode.mode):
                    self._search_inode(inode, blocks, parts)
        except OSError as error:
            unreadable.append(f"not all of its inodes can be read: {error.strerror}")
        self._problem = (unreadable or [self._problem])[0]

    def _search_inode(
        self, inode: Inode, blocks: Sequence[int], parts: defaultdict[int, list[_Part]]
    ) -> None:
        try:
            fd = self._mounted.open(inode.number, inode.generation)
            if fd is None:
                return
            try:
                places: list[tuple[bool, Extents]] = [(False, xfs_extents(fd, attributes=True))]
                if not inode.realtime:
                    places.append((True, xfs_extents(fd, attributes=False)))
            finally:
                os.close(fd)
        except OSError as error:
            self._problem = f"inode {inode.number} cannot be read: {error.strerror}"
            return
        for is_data, ranges in places:
            for start, length in ranges:
                first, count = start // self.block_bytes, -(-length // self.block_bytes)
                for block in inside(blocks, first, count):
                    parts[block].append(_Part(inode.number, is_data))

    def _inodes(self, numbers: Iterable[int]) -> dict[int, Inode]:
        try:
            found = {number: self._mounted.inode(number) for number in numbers}
        except OSError as error:
            raise CannotTell(f"the kernel does not tell inodes: {error.strerror}") from error
        return {number: inode for number, inode in found.items() if inode}
