# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every block of real filesystem images belongs to whom its content says, or to nobody known.

Each sector of a file names the file, so the content of the image says whose a block is; which
blocks are free is what dumpe2fs and xfs_db count.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dm_remap import files, lookup, xfs
from dm_remap.files import Owner
from tests.parameters import short_form
from tests.vm.partitions import write_gpt

SECTOR = 512
MARK = b"whose\0\0\0"
TOOLS = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "LC_ALL": "C"}
CORE = Path(files.__file__).parent

# Names that look like what the tools print, or like nothing that is text.
NAMES = st.one_of(
    st.sampled_from(
        [
            b"plain",
            b"with space",
            b'quo"te',
            b"new\nline",
            b"x\n12\tforged",
            b"x\ndebugfs: ls -p <2>\n",
            b"x (good)\n26         137                regular        0x0e59736c   4 refl",
            b"no text \xff\xfe",
            b"@@ 128 ",
            b"\\x41",
            b"-dash",
        ]
    ),
    st.binary(min_size=1, max_size=60).map(
        lambda raw: b"r" + raw.replace(b"/", b"_").replace(b"\0", b"_")
    ),
)


@dataclass
class File:
    """A file: its names, its size in sectors, and whether half of it is a hole."""

    names: list[bytes]
    sectors: int
    sparse: bool = False


@dataclass
class Scene:
    """An image, and who is in it."""

    image: Path
    block: int
    kept: dict[int, set[str]] = field(default_factory=dict)

    @cached_property
    def stamps(self) -> dict[int, int]:
        """The number of the file that each block names, by block."""
        found = {}
        with open(self.image, "rb") as file:
            end = position = 0
            with suppress(OSError):  # ENXIO: only a hole is left
                while True:
                    position = os.lseek(file.fileno(), end, os.SEEK_DATA)
                    position = position // self.block * self.block
                    end = os.lseek(file.fileno(), position, os.SEEK_HOLE)
                    for begin in range(position, end, self.block):
                        data = os.pread(file.fileno(), 16, begin)
                        if data.startswith(MARK):
                            found[begin // self.block] = int.from_bytes(data[8:], "little")
        return {block: number for block, number in found.items() if number in self.kept}


def tool(*arguments: str | bytes | Path, commands: str = "") -> str:
    done = subprocess.run(
        arguments, input=commands.encode(), capture_output=True, check=False, env=TOOLS
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.decode(errors="replace")


def content(number: int, sectors: int) -> bytes:
    return b"".join(
        (MARK + number.to_bytes(8, "little") + sector.to_bytes(8, "little")).ljust(SECTOR, b".")
        for sector in range(sectors)
    )


def put(path: bytes, number: int, what: File, block: int) -> None:
    with open(path, "wb") as file:
        if what.sparse:
            file.seek(16 * block)
        file.write(content(number, what.sectors))


def looked_up(image: Path, sectors: int | None = None) -> list[Owner]:
    """What `owners` says of the whole image, without a process of its own."""
    found: list[Owner] = []
    try:
        files.look_up(str(image), [(0, sectors or image.stat().st_size // SECTOR)], found.extend)
    except lookup.CannotTell as error:
        whole = sectors or image.stat().st_size // SECTOR
        found.append(Owner(0, whole, "unknown", reason=str(error)))
    return found


def by_block(scene: Scene, found: list[Owner], first: int = 0) -> dict[int, list[Owner]]:
    """Owners by block; an owner must not begin or end within one."""
    per_block = scene.block // SECTOR
    answers: dict[int, list[Owner]] = {}
    for owner in found:
        assert (owner.start - first) % per_block == 0
        for sector in range(owner.start - first, owner.start - first + owner.count, per_block):
            answers.setdefault(sector // per_block, []).append(owner)
    return answers


def check(
    scene: Scene, answers: dict[int, list[Owner]], free: set[int] | None, total: int = 0
) -> None:
    """Compare with the content: everything where the image is whole, else what is claimed."""
    stamps = scene.stamps
    total = total or scene.image.stat().st_size // scene.block
    assert set(answers) == set(range(total)), "every sector that was asked for is answered"
    for block, owners in answers.items():
        number = stamps.get(block)
        kinds = {owner.kind for owner in owners}
        if free is None and kinds == {"unknown"}:
            assert all(owner.reason for owner in owners)
            continue
        if number is None:
            assert kinds in ({"metadata"}, {"free"}), (block, owners)
            assert free is None or (kinds == {"free"}) == (block in free), (block, owners)
        else:
            assert kinds == {"file"}, (block, owners)
            (owner,) = owners
            if free is None and owner.reason:
                assert set(owner.paths) <= scene.kept[number]
            else:
                assert set(owner.paths) == scene.kept[number], (block, owners)
            assert sorted(owner.paths) == [*owner.paths]


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


# ext2 to ext4


@dataclass(frozen=True)
class Make:
    """How mke2fs makes a filesystem."""

    block: int
    arguments: tuple[str, ...]
    exact_free: bool = True


EXT = {
    "ext2-1k": Make(1024, ("-t", "ext2", "-b", "1024")),
    "ext3-4k": Make(4096, ("-t", "ext3", "-b", "4096")),
    "ext4-1k": Make(1024, ("-t", "ext4", "-b", "1024")),
    "ext4-4k": Make(4096, ("-t", "ext4", "-b", "4096")),
    "ext4-32bit": Make(1024, ("-t", "ext4", "-b", "1024", "-O", "^64bit,^flex_bg,^metadata_csum")),
    "ext4-meta_bg": Make(1024, ("-t", "ext4", "-b", "1024", "-O", "meta_bg,^resize_inode")),
    "ext4-bigalloc": Make(
        1024, ("-t", "ext4", "-b", "1024", "-O", "bigalloc", "-C", "16384"), exact_free=False
    ),
}

FILES = st.lists(
    st.builds(
        File,
        st.lists(NAMES, min_size=1, max_size=3, unique=True),
        st.integers(1, 300),
        st.booleans(),
    ),
    min_size=1,
    max_size=8,
)


def make_ext(place: Path, make: Make, wanted: list[File], removed: set[int]) -> Scene:
    """A filesystem of files, with the places of the removed ones used again, in pieces."""
    scene = Scene(place / "image", make.block)
    source = os.fsencode(place / "source")
    os.makedirs(source + b"/sub")
    taken: set[bytes] = set()
    for number, what in enumerate(wanted):
        names = [name for name in what.names if name not in taken]
        taken.update(names)
        paths = [b"sub/" + name if index % 2 else name for index, name in enumerate(names)]
        if not paths or b"sub" in paths:
            continue
        put(source + b"/" + paths[0], number, what, make.block)
        for path in paths[1:]:
            os.link(source + b"/" + paths[0], source + b"/" + path)
        scene.kept[number] = {os.fsdecode(path) for path in paths}
    os.symlink(b"t" * 200, source + b"/slow-link")
    os.symlink("x\ndebugfs: stat <12>\nInode: 12   Type: regular", source + b"/fast-link")
    for number in (1000, 1001, 1002):
        put(source + b"/temporary%d" % number, number, File([], 30), make.block)
    arguments = ["mke2fs", "-q", "-F", *make.arguments, "-d", os.fsdecode(source)]
    tool(*arguments, scene.image, "16M")
    later = place / "later"
    later.write_bytes(content(2000, 100))
    gone = sorted({1000, 1002} & {1000 + item for item in removed})
    commands = [f"rm /temporary{number}" for number in gone]
    commands += [f"write {later} later", "symlink another " + "y" * 300]
    tool("debugfs", "-w", "-f", "-", scene.image, commands="\n".join(commands) + "\n")
    scene.kept.update(
        {number: {f"temporary{number}"} for number in (1000, 1001, 1002) if number not in gone}
    )
    scene.kept[2000] = {"later"}
    return scene


def free_in_ext(image: Path) -> set[int]:
    """Free blocks as dumpe2fs lists them."""
    free = set()
    for line in re.findall(r"^  Free blocks: (.*)$", tool("dumpe2fs", image), re.MULTILINE):
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", line):
            free.update(range(int(first), int(last or first) + 1))
    return free


def links_are_files(scene: Scene, answers: dict[int, list[Owner]]) -> dict[int, list[Owner]]:
    """The answers with the targets of symbolic links, which hold no stamp, taken for metadata."""
    with open(scene.image, "rb") as file:
        for block, owners in answers.items():
            file.seek(block * scene.block)
            if file.read(200) in (b"t" * 200, b"y" * 200):
                (owner,) = owners
                assert owner.kind in ("file", "unknown")
                assert owner.paths in (("slow-link",), ("another",)) or owner.reason
                answers[block] = [Owner(owner.start, owner.count, "metadata")]
    return answers


@pytest.mark.parametrize("make", EXT.values(), ids=EXT.keys())
@settings(max_examples=3, phases=[Phase.generate])
@given(wanted=FILES, removed=st.sets(st.integers(0, 2)))
def test_every_block_of_ext(make: Make, wanted: list[File], removed: set[int]) -> None:
    with folder() as place:
        scene = make_ext(place, make, wanted, removed)
        answers = links_are_files(scene, by_block(scene, looked_up(scene.image)))
        free = free_in_ext(scene.image)
        if not make.exact_free:
            # A part of a cluster that holds nothing is free too.
            free |= {b for b, owners in answers.items() if owners[0].kind == "free"}
        check(scene, answers, free)


@pytest.mark.parametrize("make", [EXT["ext4-1k"], EXT["ext4-4k"]], ids=["1k", "4k"])
@settings(max_examples=6, phases=[Phase.generate])
@given(wanted=FILES, damage=st.lists(st.integers(0, 10**6), min_size=1, max_size=6), data=st.data())
def test_damaged_ext_is_never_answered_wrongly(
    make: Make, wanted: list[File], damage: list[int], data: st.DataObject
) -> None:
    with folder() as place:
        scene = make_ext(place, make, wanted, {0})
        free = free_in_ext(scene.image)
        harm(scene, free, damage, data)
        check_claims(scene, links_are_files(scene, by_block(scene, looked_up(scene.image))), free)


def harm(scene: Scene, free: set[int], damage: list[int], data: st.DataObject) -> None:
    """Overwrite blocks that are no file's and not free, but not the first superblock."""
    stamps, total = scene.stamps, scene.image.stat().st_size // scene.block
    own = [b for b in range(8192 // scene.block, total) if b not in stamps and b not in free]
    kind = data.draw(st.sampled_from([b"\0", b"\xff", b"\x5a\x01\x80"]))
    with open(scene.image, "r+b") as file:
        for item in damage:
            file.seek(own[item % len(own)] * scene.block)
            file.write((kind * scene.block)[: scene.block])


def overwrite(image: Path, block: int, size: int, data: bytes) -> None:
    with open(image, "r+b") as file:
        file.seek(block * size)
        file.write(data)


def check_claims(
    scene: Scene, answers: dict[int, list[Owner]], free: set[int], total: int = 0
) -> None:
    check(scene, answers, None, total)
    for block, owners in answers.items():
        assert owners[0].kind != "free" or block in free, (block, owners)


def table_block(image: Path, name: str) -> int:
    """The block of the inode table that a file's inode is in."""
    text = tool("debugfs", "-R", f'imap "/{name}"', image)
    return int(text.split("located at block ")[1].split(",")[0])


def test_each_damaged_block_of_ext_leaves_true_answers(tmp_path: Path) -> None:
    make = EXT["ext4-1k"]
    wanted = [File([b"f%d" % n, b"n%d" % n], 1 + 40 * (n % 3), n % 2 == 0) for n in range(12)]
    scene = make_ext(tmp_path, make, wanted, {0})
    free, stamps = free_in_ext(scene.image), scene.stamps
    groups = tool("dumpe2fs", "-g", scene.image)
    # Group descriptors, bitmaps, and the inode tables as far as they are in use.
    numbers = [[int(n) for n in re.findall(r"\d+", line)] for line in groups.splitlines()]
    fixed = {n for group in numbers for n in group[2:7]} | {
        min(group[-1] for group in numbers if group) + n for n in range(10)
    }
    folders = [int(tool("debugfs", "-R", f"bmap {name} 0", scene.image)) for name in ("/", "/sub")]
    inodes = {number: table_block(scene.image, min(names)) for number, names in scene.kept.items()}
    # Without their inodes, names are lost.
    vital = {table_block(scene.image, name) for name in ("", "sub")}
    before = scene.image.read_bytes()
    for block in sorted({*fixed, *folders, *inodes.values()} - {0, 1}):
        overwrite(scene.image, block, make.block, b"\x5a\x01\x80\x33" * (make.block // 4))
        answers = links_are_files(scene, by_block(scene, looked_up(scene.image)))
        check_claims(scene, answers, free)
        told = {stamps[b] for b, owners in answers.items() if owners[0].kind == "file"}
        if block in inodes.values() and block not in vital:
            # What the damage does not touch is still told.
            assert told == {number for number, table in inodes.items() if table != block}
        overwrite(scene.image, block, make.block, before[block * make.block :][: make.block])
    assert scene.image.read_bytes() == before, "nothing was written"


def test_ext_that_was_not_unmounted_is_not_believed(tmp_path: Path) -> None:
    scene = make_ext(tmp_path, EXT["ext4-1k"], [File([b"a"], 4)], set())
    tool("debugfs", "-w", "-R", "feature needs_recovery", scene.image)
    (owner,) = looked_up(scene.image)
    assert (owner.kind, owner.filesystem) == ("unknown", "ext4")
    assert "journal was not replayed" in owner.reason
    tool("debugfs", "-w", "-R", "feature -needs_recovery", scene.image)
    tool("debugfs", "-w", "-R", "set_super_value state 0", scene.image)
    (owner,) = looked_up(scene.image)
    assert "not unmounted cleanly" in owner.reason


def test_unlinked_blocks_of_ext_are_not_called_free(tmp_path: Path) -> None:
    scene = make_ext(tmp_path, EXT["ext4-1k"], [File([b"a"], 40)], set())
    tool("debugfs", "-w", "-R", "set_inode_field /a links_count 0", scene.image)
    answers = by_block(scene, looked_up(scene.image))
    (number,) = (number for number, names in scene.kept.items() if names == {"a"})
    for block in (block for block, stamp in scene.stamps.items() if stamp == number):
        assert answers[block][0].kind == "unknown"
        assert "no file that has a name" in answers[block][0].reason


# xfs


def make_xfs(place: Path, options: list[str], block: int, wanted: list[int]) -> Scene:
    """A filesystem of files in directories, made from a prototype file (mkfs.xfs(8))."""
    scene = Scene(place / "image", block)
    lines = ["/", "0 0", "d--755 0 0"]
    for number, sectors in enumerate(wanted):
        source = place / f"source{number}"
        source.write_bytes(content(number, sectors))
        if number % 3 == 2:
            lines += [f"d{number} d--755 0 0", f"f ---644 0 0 {source}", "$"]
            scene.kept[number] = {f"d{number}/f"}
        else:
            lines.append(f"f{number} ---644 0 0 {source}")
            scene.kept[number] = {f"f{number}"}
    (place / "prototype").write_text("\n".join([*lines, "$"]) + "\n")
    with open(scene.image, "wb") as file:
        file.truncate(320 << 20)
    size = f"size={block}"
    tool("mkfs.xfs", "-q", "-b", size, *options, "-p", place / "prototype", scene.image)
    return scene


def free_in_xfs(scene: Scene, answers: dict[int, list[Owner]], exact: bool = True) -> set[int]:
    """The blocks that are told as free, if they are as many as the group headers count.

    The reverse mapping may or may not have the blocks that a group keeps for its own trees.
    """
    groups = int(tool("xfs_db", "-r", "-c", "sb 0", "-c", "p agcount", scene.image).split()[-1])
    counted = kept = 0
    for group in range(groups):
        text = tool("xfs_db", "-r", "-c", f"agf {group}", "-c", "p freeblks flcount", scene.image)
        free, listed = (int(line.split()[-1]) for line in text.splitlines())
        counted, kept = counted + free, kept + listed
    told = {block for block, owners in answers.items() if owners[0].kind == "free"}
    assert counted + (kept if exact else 0) <= len(told) <= counted + kept
    return told


XFS = {
    "reflink": (["-m", "reflink=1,rmapbt=0"], 4096),
    "rmapbt": (["-m", "reflink=1,rmapbt=1"], 4096),
    "1k": (["-m", "reflink=0,rmapbt=0"], 1024),
}
SIZES = st.lists(st.integers(1, 200), min_size=1, max_size=40)


@pytest.mark.parametrize("kind", short_form(XFS, always=["reflink", "rmapbt"]))
@settings(max_examples=2, phases=[Phase.generate])
@given(wanted=SIZES)
def test_every_block_of_xfs(kind: str, wanted: list[int]) -> None:
    options, block = XFS[kind]
    with folder() as place:
        scene = make_xfs(place, options, block, wanted)
        answers = by_block(scene, looked_up(scene.image))
        check(scene, answers, free_in_xfs(scene, answers, exact=kind != "rmapbt"))


@pytest.mark.parametrize("kind", short_form(["reflink", "rmapbt"], always=["rmapbt"]))
def test_each_damaged_block_of_xfs_leaves_true_answers(kind: str, tmp_path: Path) -> None:
    options, block = XFS[kind]
    # More than one chunk of 64 inodes, so that not all are damaged at once.
    scene = make_xfs(tmp_path, options, block, [8 + number % 9 for number in range(90)])
    answers = by_block(scene, looked_up(scene.image))
    free, stamps = free_in_xfs(scene, answers, exact=kind != "rmapbt"), scene.stamps
    total = (320 << 20) // block // 4
    # Behind the headers: the trees of the first group, inodes, directories.
    own = [b for b in range(1, total) if b not in stamps and b not in free]
    for damaged in own[:24]:
        with open(scene.image, "rb") as file:
            file.seek(damaged * block)
            before = file.read(block)
        overwrite(scene.image, damaged, block, b"\x5a\x01\x80\x33" * (block // 4))
        # Of the first group, and the files that have their data there.
        found = looked_up(scene.image, total * block // SECTOR)
        check_claims(scene, by_block(scene, found), free, total)
        overwrite(scene.image, damaged, block, before)


def test_a_shared_block_of_xfs_has_several_owners() -> None:
    parts = [xfs._Part(137, True), xfs._Part(131, True)]
    names = lookup.Names({131: ["b", "a"], 137: ["c"]})
    found = xfs._described(parts, names, set())
    assert [(item.inode, item.paths) for item in found] == [(131, ("a", "b")), (137, ("c",))]


def test_xfs_with_changes_in_its_log_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make_xfs(tmp_path, *XFS["rmapbt"], [4])
    run_tool = xfs.run_tool

    def dirty(package: str, arguments: list[str], commands: Sequence[str] = ()) -> lookup.Output:
        output = run_tool(package, arguments, list(commands))
        if arguments[0] == "xfs_logprint":
            assert b"state: <CLEAN>" in output.text
            output = lookup.Output(0, output.text.replace(b"<CLEAN>", b"<DIRTY>"), ())
        return output

    monkeypatch.setattr(xfs, "run_tool", dirty)
    (owner,) = looked_up(scene.image)
    assert (owner.kind, owner.filesystem) == ("unknown", "xfs")
    assert "log was not replayed" in owner.reason


def crash_after(lines: int, command: str, patch: pytest.MonkeyPatch) -> list[int]:
    """Let xfs_db die of a signal, without a complaint, after some lines of a command's output.

    Returns a list that gets the number of lines of each output that was cut.
    """
    cut: list[int] = []
    run_tool = lookup.run_tool

    def run(package: str, arguments: list[str], commands: Sequence[str] = ()) -> lookup.Output:
        output = run_tool(package, arguments, commands)
        if any(line.split()[0] == command for line in commands):
            whole = output.text.splitlines(keepends=True)
            cut.append(len(whole))
            output = lookup.Output(-11, b"".join(whole[:lines]), ())
        return output

    patch.setattr(xfs, "run_tool", run)
    return cut


@pytest.mark.parametrize("command", short_form(["freesp", "bmap"], always=["bmap"]))
def test_an_xfs_db_that_crashes_leaves_true_answers(command: str, tmp_path: Path) -> None:
    options, block = XFS["reflink"]
    scene = make_xfs(tmp_path, options, block, [8 + number for number in range(4)])
    free = free_in_xfs(scene, by_block(scene, looked_up(scene.image)))
    total = (320 << 20) // block // 4
    lines, whole = 0, 1
    while lines < whole:
        with pytest.MonkeyPatch.context() as patch:
            cut = crash_after(lines, command, patch)
            found = looked_up(scene.image, total * block // SECTOR)
        check_claims(scene, by_block(scene, found), free, total)
        whole, lines = cut[0], lines + 1
    assert lines > 4


def test_a_reverse_mapping_that_was_not_read_to_its_end_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make_xfs(tmp_path, *XFS["rmapbt"], [8, 8])
    blocks = sorted(scene.stamps)
    assert xfs.UnmountedXfs(str(scene.image))._reverse(blocks)
    # A shared block would be told without some of its owners.
    assert crash_after(1, "fsmap", monkeypatch) == []
    assert xfs.UnmountedXfs(str(scene.image))._reverse(blocks) is None


# Partitions


def test_partitions_and_what_is_between_them(tmp_path: Path) -> None:
    inner = make_ext(tmp_path, EXT["ext4-1k"], [File([b"a"], 40)], set())
    disk = tmp_path / "disk"
    first, sectors = 4096, inner.image.stat().st_size // SECTOR
    with open(disk, "wb") as file:
        file.truncate(64 << 20)
    write_gpt(disk, [(first, sectors)])
    with open(disk, "r+b") as file:
        file.seek(first * SECTOR)
        file.write(inner.image.read_bytes())
    total = disk.stat().st_size // SECTOR
    found = looked_up(disk)
    assert {owner.partition for owner in found if owner.filesystem} == {1}
    inside = [owner for owner in found if owner.partition]
    answers = links_are_files(inner, by_block(inner, inside, first))
    check(inner, answers, free_in_ext(inner.image))
    outside = sorted(
        (owner.start, owner.count, owner.kind) for owner in found if not owner.partition
    )
    # A header and 32 sectors of entries at each end, and a boot sector.
    assert outside == [
        (0, 34, "metadata"),
        (34, first - 34, "unknown"),
        (first + sectors, total - 33 - first - sectors, "unknown"),
        (total - 33, 33, "metadata"),
    ]


def test_an_image_without_a_filesystem(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    (owner,) = looked_up(image)
    assert (owner.start, owner.count, owner.kind) == (0, 2048, "unknown")
    assert owner.reason == "no filesystem is recognised on it"


def test_other_filesystems_are_named(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    tool("mkswap", image)
    (owner,) = looked_up(image)
    assert owner.kind == "unknown"
    assert owner.reason == "it holds swap; only ext2 to ext4 and xfs are known"


def test_a_tool_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = make_ext(tmp_path, EXT["ext4-1k"], [File([b"a"], 4)], set())
    for name in ("blkid", "dumpe2fs"):
        program = shutil.which(name, path=lookup._PATH)
        assert program
        (tmp_path / name).symlink_to(program)
    monkeypatch.setattr(lookup, "_PATH", str(tmp_path))
    (owner,) = {owner.reason for owner in looked_up(scene.image) if owner.kind == "unknown"}
    assert owner == "debugfs is not there; install e2fsprogs"


# The process of its own


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The core under its name on Python's path, as it is on a host."""
    (tmp_path / "dm_remap").symlink_to(CORE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_owners_come_from_a_process_of_its_own(importable: Path) -> None:
    scene = make_ext(importable, EXT["ext4-1k"], [File([b"a\xff"], 40)], set())
    total = scene.image.stat().st_size // SECTOR
    expected = sorted(looked_up(scene.image), key=lambda o: (o.start, o.inode))
    assert files.owners(str(scene.image), [(0, total)]) == expected
    assert files.owners(str(scene.image), []) == []


def test_a_missing_target_is_told(importable: Path) -> None:
    (owner,) = files.owners(str(importable / "absent"), [(8, 2), (10, 1)])
    assert (owner.start, owner.count, owner.kind) == (8, 3, "unknown")
    assert "No such file" in owner.reason


def test_a_look_up_that_hangs_is_ended_with_its_tools(importable: Path) -> None:
    # Whoever opens the other end of the pipe waits until somebody writes to it.
    pipe = importable / "pipe"
    os.mkfifo(pipe)
    fake = importable / "bin"
    fake.mkdir()
    (fake / "blkid").write_text(f"#!/bin/sh\necho $$ > {importable}/pid\nread line < {pipe}\n")
    (fake / "blkid").chmod(0o755)
    program = importable / "program.py"
    program.write_text(
        "import dm_remap.lookup, dm_remap.files\n"
        f"dm_remap.lookup._PATH = {str(fake)!r} + ':/usr/bin:/bin'\n"
    )
    (importable / "sitecustomize.py").write_text(program.read_text())
    image = importable / "image"
    image.write_bytes(bytes(1 << 20))
    (owner,) = files.owners(str(image), [(0, 8)], timeout=3)
    assert (owner.start, owner.count, owner.kind) == (0, 8, "unknown")
    assert owner.reason == "the look-up took longer than 3 seconds"
    child = int((importable / "pid").read_text())
    while not is_dead(child):
        time.sleep(0.01)


def is_dead(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
