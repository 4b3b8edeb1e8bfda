# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The hook for initial RAM disks keeps the volume groups that the start needs.

The programs that tell what stands on what are stand-ins with the output of real ones; tests/vm/
test_boot.py boots with the hook.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

HOOK = Path(__file__).parents[2] / "roles" / "host" / "files" / "dm-remap-initramfs"
# The hook asks only whether they are block devices.
DEVICES = sorted(str(path) for path in Path("/dev").iterdir() if path.is_block_device())
WARNING = "activates all volume groups"


def run(folder: Path, root: str, programs: Mapping[str, str], lvm: bool = True) -> tuple[str, str]:
    """The rule that the hook writes, "" for none, and what it says."""
    rules = folder / "initramfs" / "lib" / "udev" / "rules.d"
    rules.mkdir(parents=True)
    if lvm:
        (rules / "69-lvm.rules").touch()
    (folder / "bin").mkdir()
    for name in ("findmnt", "blkid", "swapon", "lsblk", "dmsetup"):
        program = folder / "bin" / name
        program.write_text(f"#!/bin/sh\n{programs.get(name, '')}\n")
        program.chmod(0o755)
    (folder / "bin" / "findmnt").write_text(
        "#!/bin/sh\ncase $* in\n"
        f"*'SOURCE --target /'*) echo {root} ;;\n*'UUID --target /'*) echo 1234 ;;\n"
        f"*fstab*) {programs.get('fstab', 'exit 1')} ;;\nesac\n"
    )
    environment = {"PATH": f"{folder}/bin:/usr/bin:/bin", "DESTDIR": str(folder / "initramfs")}
    done = subprocess.run(
        ["sh", str(HOOK)], env=environment, capture_output=True, text=True, check=True
    )
    rule = rules / "68-dm-remap-lvm.rules"
    return rule.read_text() if rule.exists() else "", done.stderr


def needed(rule: str) -> str:
    """The volume groups that are left to LVM."""
    (line,) = [line for line in rule.splitlines() if '{LVM2_VG_NAME}=="' in line]
    return line.partition('=="')[2].partition('"')[0]


def test_it_comes_after_lvms_own() -> None:
    done = subprocess.run(["sh", str(HOOK), "prereqs"], capture_output=True, text=True, check=True)
    assert done.stdout == "lvm2\n"


def test_root_on_a_partition_needs_no_volume_group(tmp_path: Path) -> None:
    rule, said = run(tmp_path, DEVICES[0], {"lsblk": "printf 'sda2 part\\nsda disk\\n'"})
    assert (needed(rule), said) == ("", "")
    assert '!="", ENV{ID_FS_TYPE}="dm_remap_later"' in rule
    assert "$devnode" in rule


@pytest.mark.parametrize(
    ("programs", "groups"),
    [
        ({}, "my-vg"),
        ({"swapon": f"echo {DEVICES[-1]}"}, "my-vg|swap"),
        ({"fstab": f"echo {DEVICES[-1]}"}, "my-vg|swap"),
        ({"swapon": "echo /swapfile"}, "my-vg"),
        ({"blkid": f'[ "$4" = UUID=1234 ] && echo {DEVICES[-1]}'}, "my-vg|swap"),
    ],
    ids=["root", "swap", "swap of fstab", "a swap file", "a btrfs of two devices"],
)
def test_what_the_start_needs_is_kept(
    tmp_path: Path, programs: Mapping[str, str], groups: str
) -> None:
    listing = "printf 'my--vg-root lvm\\nluks crypt\\nmy--vg-pool_tdata lvm\\nsda2 part\\n'"
    rest = "printf 'swap-0 lvm\\nsdb disk\\n'"
    stack = f'case "$*" in *"{DEVICES[0]}") {listing} ;; *) {rest} ;; esac'
    split = 'case "$6" in my--vg-*) echo my-vg ;; *) echo swap ;; esac'
    found, said = run(tmp_path, DEVICES[0], {"lsblk": stack, "dmsetup": split, **programs})
    assert (needed(found), said) == (groups, "")


def test_a_root_that_nobody_can_tell_keeps_everything(tmp_path: Path) -> None:
    rule, said = run(tmp_path, "overlay", {})
    assert rule == ""
    assert WARNING in said


def test_without_lvm_there_is_nothing_to_do(tmp_path: Path) -> None:
    assert run(tmp_path, DEVICES[0], {}, lvm=False) == ("", "")
