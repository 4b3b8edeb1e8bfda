# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whose are the blocks of an ext2, ext3 or ext4, by debugfs and dumpe2fs of e2fsprogs.

debugfs reads through the page cache, where a mounted ext4 keeps its own metadata: so it sees what
is not on the disk yet. What it says of a mounted filesystem's files is compared with FIEMAP.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

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
    Ranges,
    fields_of,
    inside,
    run_tool,
    runs,
)
from .mounted import Mounted, extents, unlinked_open_files

_PACKAGE = "e2fsprogs"
_ROOT_INODE = 2
_EA_INODE, _INLINE_DATA = 0x200000, 0x10000000
# debugfs compares each block of each file with each one that was asked for.
_ASKED_AT_ONCE = 64
# Fields of dumpe2fs that name an inode without a name.
_HIDDEN = (
    "Journal inode",
    "Orphan file inode",
    "User quota inode",
    "Group quota inode",
    "Project quota inode",
)
_GROUP = re.compile(r"(\d+):(\d+):(-?\d+):(-1|\d+(?:-\d+)?):(\d+):(\d+):(\d+)\Z")
_ECHO = re.compile(rb"^debugfs: stat <\d+>\n", re.MULTILINE)
_STATUS = re.compile(
    rb"Inode: (\d+) +Type: (.+?) +Mode: +\d+ +Flags: 0x([0-9a-f]+)\n.*?"
    rb"^File ACL: (\d+).*?^Links: (\d+) ",
    re.MULTILINE | re.DOTALL,
)
_PLACE = re.compile(rb"\(([^)]*)\):(\d+)(?:-(\d+))?")
# A name has no slash in it, so it cannot be taken for the next field.
_ENTRY = re.compile(rb"/(\d+)/(\d+)/-?\d+/-?\d+/([^/\0]*)/(\d*)/\n")
_DIRECTORY = 0o040000


@dataclass(frozen=True)
class _Status:
    """An inode: its type as debugfs calls it, and blocks of its data and of its own metadata."""

    kind: str
    flags: int
    links: int
    data: tuple[tuple[int, int], ...]
    own: tuple[tuple[int, int], ...]

    def has_data(self, block: int) -> bool:
        return any(start <= block < start + count for start, count in self.data)

    def has(self, block: int) -> bool:
        return self.has_data(block) or any(s <= block < s + count for s, count in self.own)


class Ext:
    """An ext2, ext3 or ext4.

    Args:
        device: the node or file it is on.
        offset: where it begins there, in bytes.
        mounted: where it is mounted, or None.

    Raises:
        CannotTell: it is not in a state that answers can be relied on.
    """

    def __init__(self, device: str, offset: int = 0, mounted: Mounted | None = None) -> None:
        # The option of e2fsprogs' I/O manager stands behind a question mark.
        if "?" in device:
            raise CannotTell("the tools of e2fsprogs take no path with a question mark in it")
        self._device = f"{device}?offset={offset}" if offset else device
        self._mounted = mounted
        if mounted is not None:
            mounted.sync()
        output = run_tool(_PACKAGE, ["dumpe2fs", "-h", self._device])
        header = fields_of(output.text, ":")
        if output.code or "Block size" not in header:
            raise CannotTell(f"its superblock cannot be read: {output.complaint}")
        self._header = header
        self._features = header.get("Filesystem features", "").split()
        self.block_bytes = int(header["Block size"])
        self.blocks = int(header["Block count"])
        self._first_block = int(header["First block"])
        self._cluster = int(header.get("Cluster size", self.block_bytes)) // self.block_bytes
        self._incomplete = ""
        if mounted is None:
            self._check_clean()

    def _check_clean(self) -> None:
        if "needs_recovery" in self._features:
            raise CannotTell("its journal was not replayed; mount it once, or run e2fsck")
        if not self._header.get("Filesystem state", "").startswith("clean"):
            raise CannotTell("it was not unmounted cleanly; run e2fsck")

    def owners(self, wanted: Iterable[int]) -> Answers:
        """Who owns each of the blocks.

        Raises:
            CannotTell: none of it can be found out.
        """
        fixed = self._fixed()
        blocks = sorted(set(wanted))
        answers: Answers = {
            block: [Found(METADATA)]
            for block in blocks
            # The first block holds a boot sector, the superblock or both.
            if block <= max(0, self._first_block - 1) or block in fixed
        }
        rest = [block for block in blocks if block not in answers]
        used = self._used(rest)
        answers.update({block: [Found(FREE)] for block in rest if used.get(block) is False})
        rest = [block for block in rest if block not in answers]
        owned, statuses = self._inodes_of(rest)
        answers.update(self._described(owned, statuses))
        rest = [block for block in rest if block not in answers]
        answers.update(self._without_inode(rest, fixed, used))
        return answers

    def _fixed(self) -> Ranges:
        """Superblocks, group descriptors, bitmaps and inode tables."""
        output = run_tool(_PACKAGE, ["dumpe2fs", "-g", self._device])
        per_group = int(self._header["Blocks per group"])
        inodes = int(self._header["Inode blocks per group"])
        found: Extents = []
        groups = 0
        for line in output.text.decode(errors="replace").splitlines():
            match = _GROUP.match(line.strip())
            if match:
                groups += 1
                found += _blocks_of_group(match, inodes)
        if groups != -(-(self.blocks - self._first_block) // per_group):
            raise CannotTell(f"its groups cannot be listed: {output.complaint}")
        multiple = self._header.get("MMP block number")
        if multiple:
            found.append((int(multiple), 1))
        return Ranges(set(found))

    def _inodes_of(self, blocks: Sequence[int]) -> tuple[dict[int, int], dict[int, _Status]]:
        """The inode of each block that has one, and these inodes."""
        owned: dict[int, int] = {}
        statuses: dict[int, _Status] = {}
        left = list(blocks)
        while left:
            # Spread, because the neighbours of a file's block are mostly of that file too.
            asked = left[:: -(-len(left) // _ASKED_AT_ONCE)]
            found, complaint = self._icheck(asked)
            if complaint:
                self._incomplete = complaint
                return self._inodes_one_by_one(blocks)
            new = set(found.values()) - set(statuses)
            statuses.update(self._statuses(sorted(new)))
            for inode in new:
                status = statuses.get(inode)
                if status:
                    for start, count in status.data + status.own:
                        owned.update((block, inode) for block in inside(blocks, start, count))
            owned.update(found)
            seen = set(asked)
            left = [block for block in left if block not in seen and block not in owned]
        return owned, statuses

    def _icheck(self, blocks: Sequence[int]) -> tuple[dict[int, int], str]:
        request = "icheck " + " ".join(map(str, blocks))
        output = run_tool(_PACKAGE, ["debugfs", "-c", "-R", request, self._device])
        found: dict[int, int] = {}
        answered = set()
        for line in output.text.decode(errors="replace").splitlines()[1:]:
            block, _tab, inode = line.partition("\t")
            if block.isdigit():
                answered.add(int(block))
                if inode.isdigit():
                    found[int(block)] = int(inode)
        if output.complaints or answered != set(blocks):
            return {}, f"not all inodes can be read: {output.complaint}"
        return found, ""

    def _inodes_one_by_one(
        self, blocks: Sequence[int]
    ) -> tuple[dict[int, int], dict[int, _Status]]:
        """The same where a part of the inode tables cannot be read: of files with a name."""
        hidden = [int(self._header[field]) for field in _HIDDEN if field in self._header]
        reserved = range(1, int(self._header.get("First inode", "11")))
        names = self._list_names(None)
        statuses = self._statuses(sorted({*reserved, *hidden, *names.paths}))
        owned = {
            block: inode
            for inode, status in statuses.items()
            for start, count in status.data + status.own
            for block in inside(blocks, start, count)
        }
        return owned, {inode: statuses[inode] for inode in set(owned.values())}

    def _statuses(self, inodes: Sequence[int]) -> dict[int, _Status]:
        if not inodes:
            return {}
        commands = [f"stat <{inode}>" for inode in inodes]
        output = run_tool(_PACKAGE, ["debugfs", "-c", "-f", "-", self._device], commands)
        parts = _ECHO.split(output.text)[1:]
        if len(parts) != len(inodes):
            # A link's target or an attribute's name looks like the echo of a command.
            parts = [
                run_tool(_PACKAGE, ["debugfs", "-c", "-R", command, self._device]).text
                for command in commands
            ]
        found = {inode: _status(inode, part) for inode, part in zip(inodes, parts)}
        return {inode: status for inode, status in found.items() if status}

    def _described(self, owned: Mapping[int, int], statuses: Mapping[int, _Status]) -> Answers:
        answers: Answers = {}
        shown = {}
        first = int(self._header.get("First inode", "11"))
        hidden = {int(self._header[field]) for field in _HIDDEN if field in self._header}
        for block, inode in owned.items():
            status = statuses.get(inode)
            if (inode < first and inode != _ROOT_INODE) or inode in hidden:
                answers[block] = [Found(METADATA, inode)]
            elif status is None or not status.has(block):
                reason = f"inode {inode}, which it is of, changes or cannot be read; try again"
                answers[block] = [Found(UNKNOWN, inode, reason=reason)]
            elif status.flags & _EA_INODE:
                answers[block] = [Found(METADATA, inode)]
            else:
                shown[block] = inode
        links = {inode: statuses[inode].links for inode in set(shown.values())}
        names = self._names(links)
        live = {inode: self._extents_now(inode, statuses[inode]) for inode in links}
        for block, inode in shown.items():
            status = statuses[inode]
            is_file = status.kind != "directory" and status.has_data(block)
            now = live[inode]
            if is_file and now is not None and not self._covers(now, block):
                reason = f"inode {inode}, which had it, changes; try again"
                answers[block] = [Found(UNKNOWN, inode, reason=reason)]
                continue
            paths = names.of(inode)
            # A directory has a single name, and more links from those in it.
            reason = names.reason(inode, 1 if status.kind == "directory" else status.links)
            kind = FILE if is_file else METADATA
            answers[block] = [Found(kind, inode, paths, reason)]
        return answers

    def _extents_now(self, inode: int, status: _Status) -> Extents | None:
        """What a mounted filesystem says of a file, or None where it cannot be asked."""
        if self._mounted is None or status.kind != "regular":
            return None
        try:
            fd = self._mounted.open(inode)
        except OSError:
            return None
        return [] if fd is None else _extents_and_close(fd)

    def _covers(self, places: Extents, block: int) -> bool:
        begin = block * self.block_bytes
        return any(start <= begin < start + length for start, length in places)

    def _names(self, links: Mapping[int, int]) -> Names:
        if not links:
            return Names()
        return self._mounted.names(links) if self._mounted else self._list_names(links)

    def _list_names(self, links: Mapping[int, int] | None) -> Names:
        """Names of the inodes, or of all; the walk ends when all links are found."""
        names = Names()
        left = dict(links or {})
        if links is None or _ROOT_INODE in left:
            names.paths[_ROOT_INODE] = ["."]
            left.pop(_ROOT_INODE, None)
        folders = {_ROOT_INODE: ""}
        known = set(folders)
        while folders and (links is None or left):
            commands = [f"ls -p <{inode}>" for inode in folders]
            output = run_tool(_PACKAGE, ["debugfs", "-c", "-f", "-", self._device], commands)
            if output.complaints:
                names.missing = f"not all directories can be read: {output.complaint}"
            following: dict[int, str] = {}
            for folder, inode, mode, name in _entries(output.text, list(folders)):
                if inode == 0 or name in (".", ".."):
                    continue
                path = f"{folders[folder]}/{name}" if folders[folder] else name
                is_folder = mode & 0o170000 == _DIRECTORY
                if is_folder and inode not in known:
                    following[inode] = path
                    known.add(inode)
                if links is None or inode in left:
                    names.paths.setdefault(inode, []).append(path)
                if inode in left:
                    left[inode] -= 1
                    if is_folder or left[inode] <= 0:
                        del left[inode]
            folders = following
        return names

    def _without_inode(
        self, blocks: Sequence[int], fixed: Ranges, used: Mapping[int, bool]
    ) -> Answers:
        answers: Answers = {}
        rest = list(blocks)
        if rest and self._cluster > 1:
            answers.update(self._in_clusters(rest, fixed))
            rest = [block for block in rest if block not in answers]
        if rest and self._mounted is not None:
            answers.update(self._unlinked(rest, self._mounted))
        for block in rest:
            if block not in answers:
                reason = self._incomplete or (
                    "it is in use by no file that has a name; run e2fsck -n for more"
                    if block in used
                    else "the bitmap that says whether it is in use cannot be read"
                )
                answers[block] = [Found(UNKNOWN, reason=reason)]
        return answers

    def _used(self, blocks: Sequence[int]) -> dict[int, bool]:
        """Whether blocks are in use, as the bitmaps have it."""
        commands = [f"testb {start} {count}" for start, count in runs(blocks)]
        output = run_tool(_PACKAGE, ["debugfs", "-f", "-", self._device], commands)
        if output.complaints:
            return {}
        found = re.findall(rb"^Block (\d+) (marked in use|not in use)$", output.text, re.MULTILINE)
        return {int(block): state == b"marked in use" for block, state in found}

    def _in_clusters(self, blocks: Sequence[int], fixed: Ranges) -> Answers:
        """Blocks that are in use because others of their cluster are: they hold nothing."""
        if self._incomplete:
            return {}
        others = {
            block: [
                other
                for other in range(
                    block // self._cluster * self._cluster,
                    min((block // self._cluster + 1) * self._cluster, self.blocks),
                )
                if other != block
            ]
            for block in blocks
        }
        owned, _statuses = self._inodes_of(sorted({o for group in others.values() for o in group}))
        return {
            block: [Found(FREE)]
            for block, group in others.items()
            if any(other in owned or other in fixed for other in group)
        }

    def _unlinked(self, blocks: Sequence[int], mounted: Mounted) -> Answers:
        answers: Answers = {}
        for inode, process, fd in unlinked_open_files(mounted.device):
            with contextlib.suppress(OSError):
                places = extents(fd)
                for block in blocks:
                    if self._covers(places, block):
                        reason = f"it was deleted, and process {process} has it open"
                        answers[block] = [Found(FILE, inode, reason=reason)]
        return answers


def _extents_and_close(fd: int) -> Extents | None:
    try:
        return extents(fd)
    except OSError:
        return None
    finally:
        os.close(fd)


def _blocks_of_group(match: re.Match[str], inode_blocks: int) -> Extents:
    _group, _first, super_block, descriptors, blocks, inodes, table = match.groups()
    found = [(int(blocks), 1), (int(inodes), 1), (int(table), inode_blocks)]
    if super_block != "-1":
        found.append((int(super_block), 1))
    if descriptors != "-1":
        start, _dash, end = descriptors.partition("-")
        found.append((int(start), int(end or start) - int(start) + 1))
    return found


def _status(inode: int, text: bytes) -> _Status | None:
    match = _STATUS.search(text)
    if match is None or int(match.group(1)) != inode:
        return None
    flags, acl = int(match.group(3), 16), int(match.group(4))
    data: Extents = []
    own: Extents = [(acl, 1)] if acl else []
    kind = match.group(2).decode(errors="replace")
    # The list comes last, whatever an attribute's name says.
    begin = max(text.rfind(b"\nEXTENTS:\n"), text.rfind(b"\nBLOCKS:\n"))
    if begin >= 0 and not flags & _INLINE_DATA:
        for label, first, last in _PLACE.findall(text, begin):
            place = (int(first), int(last or first) - int(first) + 1)
            (data if label[:1].isdigit() else own).append(place)
    return _Status(kind, flags, int(match.group(5)), tuple(data), tuple(own))


def _entries(text: bytes, folders: Sequence[int]) -> Iterable[tuple[int, int, int, str]]:
    """The entries of ``ls -p`` as (directory, inode, mode, name).

    Raises:
        CannotTell: the output has another form.
    """
    position = 0
    for folder in folders:
        echo = b"debugfs: ls -p <%d>\n" % folder
        if not text.startswith(echo, position):
            raise CannotTell(f"debugfs lists directories in an unknown form: inode {folder}")
        position += len(echo)
        while True:
            match = _ENTRY.match(text, position)
            if match is None:
                break
            yield folder, int(match.group(1)), int(match.group(2), 8), os.fsdecode(match.group(3))
            position = match.end()
        while text.startswith(b"\n", position):
            position += 1
