# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Makes a filesystem of files on a target and tells the sectors that the victim's data is in.

The content of the device says where that is, not the filesystem.
"""

from __future__ import annotations

import os
import re
import subprocess

from scene import SECTOR_BYTES, BlockDevice, answer, arguments

MOUNT = "/mnt/files"
MARK = b"the victim is me"
MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-f", "-m", "rmapbt=0,reflink=1"],
    "xfs-rmapbt": ["mkfs.xfs", "-q", "-f", "-m", "rmapbt=1,reflink=1"],
}
SECTORS = 64
FILLERS = 200
PIECE_SECTORS = 2048


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def write_files(names: list[bytes], shared: bytes) -> None:
    """The victim with all its names, a file that shares its blocks, and many others."""
    os.makedirs(os.fsencode(MOUNT) + b"/sub/deep")
    for number in range(FILLERS):
        with open(f"{MOUNT}/filler{number}", "wb") as file:
            file.write(b"filler %d " % number * 500)
    paths = [os.fsencode(MOUNT) + b"/" + name for name in names]
    with open(paths[0], "wb") as file:
        for number in range(SECTORS):
            file.write((MARK + b"%8d" % number).ljust(SECTOR_BYTES, b"."))
    for path in paths[1:]:
        os.link(paths[0], path)
    if shared:
        run("cp", "--reflink=always", paths[0], os.fsencode(MOUNT) + b"/" + shared)  # type: ignore[arg-type]
    run("sync")


def places(path: str) -> dict[int, int]:
    """Sectors of the device with the victim's data: by number of the victim's sector."""
    found = {}
    with BlockDevice(path) as device:
        for start in range(0, device.sectors, PIECE_SECTORS):
            data = device.read(start, min(PIECE_SECTORS, device.sectors - start))
            for at in range(0, len(data), SECTOR_BYTES):
                if data[at : at + len(MARK)] == MARK:
                    number = int(data[at + len(MARK) : at + len(MARK) + 8])
                    found[number] = start + at // SECTOR_BYTES
            if len(found) == SECTORS:
                break
    return found


def inode_sector(filesystem: str, device: str, inode: int) -> int:
    """The first sector of an inode, as the filesystem's own tool knows it."""
    if filesystem == "ext4":
        text = run("debugfs", "-R", f"imap <{inode}>", device)
        match = re.search(r"block (\d+), offset 0x([0-9a-f]+)", text)
        size = int(re.search(r"Block size: +(\d+)", run("dumpe2fs", "-h", device))[1])  # type: ignore[index]
        assert match
        return (int(match[1]) * size + int(match[2], 16)) // SECTOR_BYTES
    text = run("xfs_db", "-r", "-c", f"inode {inode}", "-c", "daddr", device)
    return int(text.split()[-1])


given = arguments()
name, start, sectors = given["name"], given["start"], given["sectors"]
target = device = f"/dev/mapper/{name}"
if start:
    with BlockDevice(target, writable=True) as disk:
        disk.write(0, bytes.fromhex(given["table"]))
        disk.flush()
    table = f"0 {sectors} linear {target} {start}"
    run("dmsetup", "create", f"{name}p1", "--table", table)
    device = f"/dev/mapper/{name}p1"
run(*MAKE[given["filesystem"]], device)
os.makedirs(MOUNT, exist_ok=True)
run("mount", device, MOUNT)
write_files([bytes.fromhex(item) for item in given["names"]], bytes.fromhex(given["shared"]))
inodes = {path: os.stat(f"{MOUNT}/{path}").st_ino for path in ("filler100", "sub/deep")}
run("umount", MOUNT)
found = places(target)
kind = given["filesystem"]
known = {path: start + inode_sector(kind, device, inode) for path, inode in inodes.items()}
if given["mounted"]:
    run("mount", device, MOUNT)
elif start:
    run("dmsetup", "remove", f"{name}p1")
answer({"victim": [found[number] for number in sorted(found)], "inodes": known})
