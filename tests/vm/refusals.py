# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Devices in every state that must be refused, and what must be refused about them.

`Scene` brings the states about, `cases` lists the calls of modules that must fail on them.
"""

from __future__ import annotations

import lzma
import struct
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dm_remap import format as layout
from tests.lab import Disk, Machine
from tests.vm import partitions
from tests.vm.playing import ROOT, ModuleRunner, Step

# A true one, which is not part of the project: where it is not there, its magics stand in for it.
KERNEL_SPARE = ROOT.parent / "shared" / "data" / "kernel_dm_remap_v4_spare.first_1MiB.xz"

MIB_SECTORS = 2048
# Name and size in MiB of the partitions of the disk "parts". Their content is named as they are.
PARTITIONS = {
    "mounted": 24,
    "swapon": 24,
    "lvm_used": 24,
    "md_used": 24,
    "readonly": 24,
    "small": 16,
    "blank": 24,
    "held": 24,
    "sleep1": 24,
    "sleep2": 24,
    "ext4": 24,
    "xfs": 320,
    "lvm": 24,
    "md": 24,
    "md_at_end": 24,
    "swap": 24,
    "luks": 24,
    "btrfs_bytes": 24,
    "kernel": 24,
    "far_only": 24,
    "newer": 24,
    "newer_far_only": 24,
    "corrupt": 24,
    "foreign": 24,
}
# Targets of the scene: active and mounted, active, active with blocks of 4096 bytes, inactive.
# The second one has a name that looks like a spare of a target called "edge".
HELD, EDGE, WIDE, SLEEPING = "held", "edge-spare0", "wide", "sleeping"
ALIEN = "alien"


@dataclass(frozen=True)
class Case:
    """A call that must fail.

    Args:
        id: what is wrong.
        module: the module that is called.
        args: its arguments.
        words: what its message must say, besides the ``device``.
        device: what the message must name.
        host: ``guest`` for root, or ``unprivileged``.
    """

    id: str
    module: str
    args: dict[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    device: str = ""
    host: str = "guest"

    @property
    def step(self) -> Step:
        """The call."""
        return Step(self.id, self.module, self.args, host=self.host)


EXTRA_DISKS = (
    Disk("clone", interface="nvme"),
    Disk("coarse", interface="scsi", physical=16384),
    Disk("dead", interface="scsi"),
    Disk("blank4k", interface="scsi", block=4096),
)
# Known before a guest runs, so that pytest can name the cases.
ALL_DISKS = {
    disk.name: disk
    for disk in (
        *(Disk(name) for name in ("main", "spare", "spare2")),
        *(Disk(name, block=4096) for name in ("main4k", "spare4k")),
        *(Disk(name, interface=name) for name in ("scsi", "nvme", "ide")),
        *(Disk(name, interface="scsi") for name in ("parts", "gpt", "dos")),
        *EXTRA_DISKS,
    )
}


def path(name: str) -> str:
    """The guest's path of a disk or of a partition of the disk "parts"."""
    if name in ALL_DISKS:
        return ALL_DISKS[name].path
    number = [*PARTITIONS].index(name) + 1
    return f"{ALL_DISKS['parts'].path}-part{number}"


def _start(name: str) -> int:
    """First sector of a partition."""
    names = [*PARTITIONS]
    return MIB_SECTORS * (1 + sum(PARTITIONS[before] for before in names[: names.index(name)]))


def partition_at(offset: int) -> str:
    """The partition that byte ``offset`` of the disk "parts" lies in."""
    return max((name for name in PARTITIONS if _start(name) * 512 <= offset), key=_start)


def _copies(name: str, sectors: int) -> dict[int, bytearray]:
    """All copies of the metadata of a target called ``name`` on a spare, by their sector."""
    geometry = layout.plan_geometry(sectors, chunk_sectors=128, block_sectors=1)
    who = {"serial": "", "wwn": "", "model": ""}
    spare_uuid = uuid.uuid4()
    metadata = layout.Metadata(
        target_uuid=uuid.uuid4(),
        generation=1,
        timestamp_ns=1,
        host_id=uuid.uuid4(),
        parent_digest=layout.NO_DIGEST,
        config={
            "name": name,
            "chunk_sectors": 128,
            "block_sectors": 1,
            "on_error": "fail",
            "main": {"sectors": 131072, "logical_block": 512, "physical_block": 512, **who},
            "spares": [{"uuid": str(spare_uuid), "geometry": geometry.to_dict(), **who}],
        },
        health={},
        extents=(),
        lost=(),
    )
    return {
        sector: bytearray(layout.pack_slot(metadata, spare_uuid, sectors, index))
        for index, sector in enumerate(layout.slot_sectors_of(geometry))
    }


def _make_newer(copy: bytearray) -> None:
    offsets = layout.header_offsets()
    copy[offsets["major"]] += 1
    crc = offsets["header_crc"]
    copy[crc : crc + 4] = bytes(4)
    copy[crc : crc + 4] = zlib.crc32(copy[: layout.HEADER_BYTES]).to_bytes(4, "little")


def _own_content(partition: str) -> dict[int, bytearray]:
    """What is written to a partition of the host's making, by sector."""
    copies = _copies("elsewhere", PARTITIONS[partition] * MIB_SECTORS)
    far = set(sorted(copies)[-2:])
    for sector in sorted(copies):
        if "newer" in partition:
            _make_newer(copies[sector])
        if "far_only" in partition and sector not in far:
            del copies[sector]
        if partition == "corrupt":
            copies[sector][layout.HEADER_BYTES + 20] ^= 1
    return copies


def kernel_spare() -> bytes:
    """The beginning of a spare of the kernel target dm-remap-v4."""
    if KERNEL_SPARE.exists():
        return lzma.decompress(KERNEL_SPARE.read_bytes())
    return b"4RMD".ljust(256 * 512, b"\0") * 5


def write_parts_image(image: Path) -> None:
    """Make the disk "parts", with the content that no program of the guest can make."""
    _make_empty(image, 2 + sum(PARTITIONS.values()))
    parts = [(_start(name), size * MIB_SECTORS) for name, size in PARTITIONS.items()]
    partitions.write_gpt(image, parts)
    with open(image, "r+b") as file:
        for partition in ("far_only", "newer", "newer_far_only", "corrupt", "foreign"):
            for sector, data in _own_content(partition).items():
                file.seek((_start(partition) + sector) * 512)
                file.write(data)
        file.seek(_start("kernel") * 512)
        file.write(kernel_spare())
        file.seek(_start("luks") * 512)
        # Magic, version 1, and the UUID at byte 168 (LUKS1 on-disk format, 2.1).
        file.write(b"LUKS\xba\xbe\x00\x01".ljust(168, b"\0") + str(uuid.uuid4()).encode())
        file.seek(_start("btrfs_bytes") * 512 + 65536)
        file.write(_btrfs_superblock())


def _btrfs_superblock() -> bytes:
    """As much of it as blkid looks at, with its checksum (CRC-32C).

    struct btrfs_super_block in include/uapi/linux/btrfs_tree.h.
    """
    block = bytearray(4096)
    struct.pack_into("<16sQQ8s", block, 32, uuid.uuid4().bytes, 65536, 0, b"_BHRfS_M")
    total_bytes, devices, sector_size, node_size = 64 << 20, 1, 4096, 16384
    struct.pack_into("<Q16xQII", block, 112, total_bytes, devices, sector_size, node_size)
    rest = bytes(block[32:])
    crc = 0xFFFFFFFF
    for byte in rest:
        crc ^= byte
        for _bit in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return (crc ^ 0xFFFFFFFF).to_bytes(4, "little").ljust(32, b"\0") + rest


def _make_empty(image: Path, mib: int) -> None:
    with open(image, "wb") as file:
        file.truncate(mib * MIB_SECTORS * 512)


# What permission to erase allows, all of it spares of one target.
ERASABLE = ("ext4", "md_at_end", "luks", "kernel", "foreign", "newer", "newer_far_only", "corrupt")


PREPARE = r"""
set -e
for device in "$MOUNTED" "$EXT4"; do mkfs.ext4 -q -F "$device"; done
mkfs.xfs -q "$XFS"
mkswap "$SWAPON" >/dev/null
swapon "$SWAPON"
mkswap "$SWAP" >/dev/null
pvcreate -qq -y "$LVM" "$LVM_USED"
vgcreate -qq used "$LVM_USED"
lvcreate -qq -y -Wn -L 8M -n volume used
# Without this, udev assembles what was stopped again.
mkdir -p /etc/mdadm/mdadm.conf.d
echo 'AUTO -all' >/etc/mdadm/mdadm.conf.d/dm-remap-test.conf
for part in "$MD:1.2" "$MD_AT_END:1.0"; do
    mdadm --quiet --create /dev/md77 --run --force --level=1 --raid-devices=1 \
        --metadata="${part##*:}" "${part%:*}"
    mdadm --quiet --stop /dev/md77
done
mdadm --quiet --build /dev/md78 --force --level=1 --raid-devices=1 "$MD_USED"
blockdev --setro "$READONLY"
mkdir -p /mnt/scene /mnt/held
mount -o ro "$MOUNTED" /mnt/scene
dmsetup create alien --table '0 8 error'
dmsetup create occupied-spare0 --table '0 8 error'
udevadm settle
"""
FINISH = r"""
set -e
mkfs.ext4 -q -F /dev/mapper/held
mount -o ro /dev/mapper/held /mnt/held
for name in sleeping sleeping-spare0 sleeping-spare1 \
    sleeping-spare0-data sleeping-spare0-tags sleeping-spare1-data sleeping-spare1-tags
do
    dmsetup remove --retry "$name"
done
udevadm settle
"""
CLEAN_UP = r"""
umount /mnt/scene /mnt/held
swapoff "$SWAPON"
vgchange -qq -an used
mdadm --quiet --stop /dev/md78
blockdev --setrw "$READONLY"
rm /etc/mdadm/mdadm.conf.d/dm-remap-test.conf
udevadm settle
"""


class Scene:
    """The states, in a clean guest.

    Args:
        machine: the guest.
        runner: calls the modules.
        directory: for images.
    """

    def __init__(self, machine: Machine, runner: ModuleRunner, directory: Path) -> None:
        self._machine = machine
        images = {name: directory / f"{name}.raw" for name in ("parts", "gpt", "dos")}
        write_parts_image(images["parts"])
        for name in ("gpt", "dos"):
            _make_empty(images[name], 64)
        partitions.write_gpt(images["gpt"], [(2048, 65536), (67584, 32768)])
        partitions.write_dos(images["dos"], [(2048, 65536)])
        for name, image in images.items():
            machine.attach(Disk(name, interface="scsi", image=str(image)))
        for disk in EXTRA_DISKS:
            machine.attach(disk)
        self._shell(PREPARE)
        for name in ("nvme", "clone"):
            machine.disk(name).write(64, b"the same content" * 256)
        done = runner.run(
            *(
                Step(name, "target", _target(main, *on, name=name))
                for name, main, on in (
                    (HELD, "main", ["held"]),
                    (EDGE, "scsi", ["spare2"]),
                    (WIDE, "main4k", ["spare4k"]),
                    (SLEEPING, "nvme", ["sleep1", "sleep2"]),
                )
            ),
            Step("remap", "sectors", {"name": EDGE, "ranges": [{"start": 1000}]}),
        )
        for result in done.values():
            assert not result.get("failed"), result
        self._shell(FINISH)
        machine.disk("dead").fail([(0, 64)], op="read")

    def clean_up(self) -> None:
        """Release what Machine.reset knows nothing of."""
        self._shell(CLEAN_UP)

    def _shell(self, script: str) -> None:
        names = {name.upper(): path(name) for name in PARTITIONS}
        variables = [f"{name}={value}" for name, value in names.items()]
        self._machine.run(["env", *variables, "bash", "-c", script])


def _target(main: str, *spares: str, name: str = "new", **others: Any) -> dict[str, Any]:
    # Nothing heals held errors in these guests.
    return {
        "name": name,
        "main": path(main),
        "spares": [path(spare) for spare in spares],
        "on_error": "fail",
        **others,
    }


def cases() -> Iterator[Case]:
    """Every call that must be refused."""
    yield from _cases_of_devices()
    yield from _cases_of_use()
    yield from _cases_of_content()
    yield from _cases_of_arguments()
    yield from _cases_of_existing_targets()
    yield from _cases_of_activation()
    yield from _cases_of_removal()
    yield from _cases_of_sectors()
    yield from _cases_of_users()


def _cases_of_devices() -> Iterator[Case]:
    nowhere = "/dev/disk/by-id/nowhere"
    new = _target("ide", "spare")
    for case, args, device, words in (
        ("main does not exist", {**new, "main": nowhere}, nowhere, ["no such device", "existing"]),
        ("spare does not exist", {**new, "spares": [nowhere]}, nowhere, ["no such device"]),
        ("main is empty", {**new, "main": ""}, "''", ["no such device"]),
        ("spare is empty", {**new, "spares": [""]}, "''", ["no such device"]),
        ("main is a file", {**new, "main": "/etc/passwd"}, "/etc/passwd", ["not a block device"]),
        ("main is a directory", {**new, "main": "/dev"}, "/dev", ["not a block device"]),
        ("spare is a character device", {**new, "spares": ["/dev/null"]}, "/dev/null", ["block"]),
        ("main is the spare", _target("ide", "ide"), path("ide"), ["is the main"]),
        ("spare is a part of main", _target("gpt"), path("gpt") + "-part1", ["partition"]),
        ("main is a part of spare", _target("ide", "gpt"), path("gpt"), ["partition"]),
        ("spare twice", _target("ide", "spare", "spare"), path("spare"), ["twice"]),
        ("spare twice by two paths", _target("ide", "spare"), path("spare"), ["twice"]),
        ("spare in a spare", _target("ide", "gpt"), path("gpt"), ["contains the spare", "-part1"]),
    ):
        if case == "spare is a part of main":
            args = {**args, "spares": [path("gpt") + "-part1"]}
        elif case == "main is a part of spare":
            args = {**args, "main": path("gpt") + "-part1"}
        elif case == "spare twice by two paths":
            args = {**args, "spares": [path("spare"), "/dev/../" + path("spare")[1:]]}
        elif case == "spare in a spare":
            args = {**args, "spares": [path("gpt"), path("gpt") + "-part1"]}
        yield Case(case, "target", args, tuple(words), device)
    yield Case(
        "spare is too small",
        "target",
        _target("ide", "small"),
        ("too few", "40960"),
        path("small"),
    )
    yield Case(
        "spare has larger blocks",
        "target",
        _target("ide", "blank4k"),
        ("4096", "512", path("ide"), "block size"),
        path("blank4k"),
    )
    yield Case(
        "spare has smaller blocks",
        "target",
        {**_target("blank4k", "spare")},
        ("4096", "512", path("blank4k"), "block size"),
        path("spare"),
    )
    yield Case(
        "spare is read-only", "target", _target("ide", "readonly"), ("read-only",), path("readonly")
    )
    yield Case(
        "spare cannot be read", "target", _target("ide", "dead"), ("cannot be read",), path("dead")
    )


def _cases_of_use() -> Iterator[Case]:
    for case, args, device, words in (
        ("main is mounted", _target("mounted", "spare"), "mounted", ["mounted", "/mnt/scene"]),
        ("part of main is mounted", _target("parts", "spare"), "parts", ["mounted", "/mnt/scene"]),
        ("main is swap", _target("swapon", "spare"), "swapon", ["swap"]),
        ("main is held by LVM", _target("lvm_used", "spare"), "lvm_used", ["used-volume"]),
        ("main is held by a target", _target("main", "spare"), "main", [HELD]),
        ("main is a spare of a target", _target("held", "spare"), "held", [HELD]),
        ("spare is mounted", _target("ide", "mounted"), "mounted", ["mounted", "/mnt/scene"]),
        ("part of spare is mounted", _target("ide", "parts"), "parts", ["mounted", "/mnt/scene"]),
        ("spare is swap", _target("ide", "swapon"), "swapon", ["swap"]),
        ("spare is held by LVM", _target("ide", "lvm_used"), "lvm_used", ["used-volume"]),
        ("spare is held by md", _target("ide", "md_used"), "md_used", ["md78"]),
        ("spare is of an active target", _target("ide", "held"), "held", [HELD]),
        ("spare is a main", _target("ide", "main"), "main", [HELD]),
    ):
        yield Case(case, "target", args, (*words, "in use", "release"), path(device))
        # Permission to erase a device is none to take it from who uses it.
        if "spare is" in case:
            wipe = {**args, "wipe": True}
            yield Case(f"{case}, wipe", "target", wipe, (*words, "in use"), path(device))


def _cases_of_content() -> Iterator[Case]:
    for device, word in (
        ("ext4", "ext4"),
        ("xfs", "xfs"),
        ("gpt", "gpt"),
        ("dos", "dos"),
        ("lvm", "LVM2_member"),
        ("md", "linux_raid_member"),
        ("md_at_end", "linux_raid_member"),
        ("swap", "swap"),
        ("luks", "crypto_LUKS"),
        ("btrfs_bytes", "btrfs"),
        ("kernel", "dm-remap-v4"),
    ):
        words = (word, "not empty", "wipe: true")
        args = _target("ide", "spare", device)
        yield Case(f"spare holds {device}", "target", args, words, path(device))
    for device, words in (
        ("foreign", ("spare of target 'elsewhere'", "wipe: true")),
        ("far_only", ("spare of target 'elsewhere'", "wipe: true")),
        ("sleep1", (f"spare of target '{SLEEPING}'", "wipe: true")),
        ("newer", ("newer", "version")),
        ("newer_far_only", ("newer", "version")),
        ("corrupt", ("no valid copy", "data checksum", "wipe: true")),
    ):
        yield Case(f"spare is {device}", "target", _target("ide", device), words, path(device))
    yield Case(
        "spares of two targets",
        "target",
        _target("ide", "foreign", "sleep1"),
        ("different targets", path("sleep1")),
        path("foreign"),
    )


def _cases_of_arguments() -> Iterator[Case]:
    new = _target("ide", "spare")
    for size, words in (
        ("5000", ("5000", "power of two")),
        ("96K", ("98304", "power of two")),
        ("2K", ("2048", "4 KiB")),
        ("2M", ("2097152", "1 MiB")),
        ("0", ("0 bytes", "4 KiB")),
        ("", ("chunk_size",)),
        ("-64K", ("chunk_size", "-64K")),
        ("lots", ("chunk_size", "lots")),
        ("64 K; reboot", ("chunk_size",)),
        ("9" * 400, ("chunk_size",)),
    ):
        yield Case(f"chunk_size {size[:12]!r}", "target", {**new, "chunk_size": size}, words)
    yield Case(
        "chunk is smaller than a physical block",
        "target",
        _target("ide", "coarse", chunk_size="8K"),
        ("8192", "16384", "larger chunk_size"),
        path("coarse"),
    )
    for label, name in BAD_NAMES.items():
        for module, args in (
            ("target", {**new, "name": name}),
            ("target", {"name": name, "state": "absent"}),
            ("sectors", {"name": name, "ranges": [{"start": 0}]}),
            ("info", {"name": name}),
        ):
            what = f"{module} {args.get('state', '')}".strip()
            words = ("valid target name", "A-Z a-z 0-9")
            yield Case(f"name {label}: {what}", module, args, words, repr(name))
    yield Case("no spares", "target", {**new, "spares": []}, ("0 spares", "1 to 8"), "new")
    nine = {**new, "spares": [path("spare")] * 9}
    yield Case("nine spares", "target", nine, ("9 spares", "1 to 8"), "new")
    without_main = {"name": "new", "spares": [path("spare")]}
    yield Case("no main", "target", without_main, ("missing", "main"))
    hold = {**new, "on_error": "ignore"}
    yield Case("unknown on_error", "target", hold, ("on_error", "fail", "ignore"))


BAD_NAMES = {
    "with a slash": "../data",
    "with a space": "da ta",
    "with a shell's command": "data;reboot",
    "with a shell's variable": "$(reboot)",
    "with a newline": "data\n",
    "with an inner newline": "da\nta 0 8 error",
    "with another letter": "dätä",
    "of 200 characters": "x" * 200,
    "of no characters": "",
    "with a dash first": "-f",
    "of dots": "..",
}


def _cases_of_existing_targets() -> Iterator[Case]:
    same = _target("main", "held", name=HELD)
    for case, change, words in (
        ("other main, in use", {"main": path("main4k")}, (path("main4k"), "is in use")),
        ("other main, smaller", {"main": path("blank")}, (path("blank"), "fewer")),
        ("other main, not empty", {"main": path("xfs")}, (path("xfs"), "is not empty: xfs")),
        ("further spare in use", {"spares": [path("held"), path("main4k")]}, (path("main4k"),)),
        ("other chunk_size", {"chunk_size": "128K"}, ("65536", "cannot be changed")),
        ("vanished main", {"main": "/dev/gone"}, ("/dev/gone", "no such device")),
    ):
        device = HELD if " main" not in case else ""
        yield Case(f"active target, {case}", "target", {**same, **change}, words, device)
    taken = f"/dev/mapper/{ALIEN}"
    new = _target("ide", "spare")
    yield Case("name is taken", "target", {**new, "name": ALIEN}, ("something else",), taken)
    for case, name, device in (
        ("name of a spare is taken", "occupied", "/dev/mapper/occupied-spare0"),
        ("name of a spare is a target", "edge", f"/dev/mapper/{EDGE}"),
    ):
        yield Case(case, "target", {**new, "name": name}, ("choose another name",), device)
    inner = f"{HELD}-spare0"
    yield Case("name is a spare's", "target", {**new, "name": inner}, ("something else",), inner)


def _cases_of_activation() -> Iterator[Case]:
    same = _target("nvme", "sleep1", "sleep2", name=SLEEPING)
    for case, change, words, device in (
        ("missing spare", {"spares": [path("sleep1")]}, ("spare 1", "all of"), SLEEPING),
        (
            "blank instead of a spare",
            {"spares": [path("sleep1"), path("spare")]},
            ("no metadata", path("sleep1")),
            path("spare"),
        ),
        (
            "blank besides the spares",
            {"spares": [path("sleep1"), path("sleep2"), path("spare")]},
            ("no metadata",),
            path("spare"),
        ),
        ("clone of main", {"main": path("clone")}, ("serial", "nvme", "clone"), path("clone")),
        ("smaller main", {"main": path("blank")}, ("131072", "49152"), path("blank")),
        ("other chunk_size", {"chunk_size": "128K"}, ("65536", "cannot be changed"), SLEEPING),
        ("other name", {"name": "new"}, (f"'{SLEEPING}'", "give that name"), path("sleep1")),
    ):
        yield Case(f"inactive target, {case}", "target", {**same, **change}, words, device)


def _cases_of_removal() -> Iterator[Case]:
    for case, args, words, device in (
        ("while mounted", {"name": HELD}, ("in use", "unmount"), f"/dev/mapper/{HELD}"),
        (
            "while mounted, discard_remaps",
            {"name": HELD, "discard_remaps": True},
            ("in use",),
            HELD,
        ),
        ("with remaps", {"name": EDGE}, ("1 chunk", "discard_remaps: true"), EDGE),
        ("of something else", {"name": ALIEN}, ("something else",), f"/dev/mapper/{ALIEN}"),
        (
            "with another target's spare",
            {"name": "new", "spares": [path("sleep1")]},
            (f"'{SLEEPING}'",),
            path("sleep1"),
        ),
        (
            "with a held spare",
            {"name": HELD + "2", "spares": [path("held")]},
            (HELD,),
            path("held"),
        ),
        (
            "with a corrupt spare",
            {"name": "elsewhere", "spares": [path("corrupt")]},
            ("no valid copy",),
            path("corrupt"),
        ),
        (
            "with a newer spare",
            {"name": "elsewhere", "spares": [path("newer")]},
            ("newer",),
            path("newer"),
        ),
        (
            "with a spare that does not exist",
            {"name": "elsewhere", "spares": ["/dev/gone"]},
            ("no such device",),
            "/dev/gone",
        ),
    ):
        yield Case(f"absent {case}", "target", {**args, "state": "absent"}, words, device)


def _cases_of_sectors() -> Iterator[Case]:
    size = 131072
    for start, count in (
        (-1, 1),
        (0, 0),
        (0, -5),
        (size, 1),
        (size - 1, 2),
        (2**63, 1),
        (0, 2**64),
    ):
        yield Case(
            f"sectors {start}+{count}",
            "sectors",
            {"name": EDGE, "ranges": [{"start": 0}, {"start": start, "count": count}]},
            (f"{start}+{count}", str(size), "within the target"),
            EDGE,
        )
    for start, count in ((3, 8), (8, 1), (0, 12)):
        yield Case(
            f"sectors {start}+{count} of a target with blocks of 8 sectors",
            "sectors",
            {"name": WIDE, "ranges": [{"start": start, "count": count}]},
            (f"{start}+{count}", "4096", "multiples of 8"),
            WIDE,
        )
    one = [{"start": 0}]
    for case, args, words, device in (
        ("of an unknown target", {"name": "new", "ranges": one}, ("no active target",), "new"),
        ("of an inactive target", {"name": SLEEPING, "ranges": one}, ("activate",), SLEEPING),
        ("of something else", {"name": ALIEN, "ranges": one}, ("something else",), ALIEN),
        (
            "with a generation that was",
            {"name": EDGE, "ranges": one, "expected_generation": 1},
            ("generation 2, not 1",),
            EDGE,
        ),
        (
            "with a generation to come",
            {"name": EDGE, "ranges": one, "expected_generation": 3},
            ("generation 2, not 3",),
            EDGE,
        ),
        (
            "more than the spare has room for",
            {"name": HELD, "ranges": [{"start": 0, "count": size}]},
            ("free chunks", "1024 are needed", "copy the data"),
            HELD,
        ),
        (
            "with negative retries",
            {"name": EDGE, "ranges": one, "retries": -1},
            ("not possible", "0 or more"),
            "",
        ),
        (
            "with negative time",
            {"name": EDGE, "ranges": one, "salvage_seconds": -1},
            ("not possible", "0 or more"),
            "",
        ),
        (
            "with time that is no number",
            {"name": EDGE, "ranges": one, "salvage_seconds": "nan"},
            ("not possible", "0 or more"),
            "",
        ),
    ):
        yield Case(f"sectors {case}", "sectors", args, words, device)
    yield Case("info of an unknown target", "info", {"name": "new"}, ("no active target",), "new")
    yield Case("info of something else", "info", {"name": ALIEN}, ("something else",), ALIEN)


def _cases_of_users() -> Iterator[Case]:
    words = ("root",)
    for case, module, args in (
        ("target", "target", _target("ide", "spare")),
        ("target absent", "target", {"name": EDGE, "state": "absent"}),
        ("sectors", "sectors", {"name": EDGE, "ranges": [{"start": 0}]}),
        ("info", "info", {}),
    ):
        yield Case(f"not root: {case}", module, args, words, host="unprivileged")
