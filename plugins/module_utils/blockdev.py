# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Block devices: who they are, who uses them, and uncached reads, writes and flushes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import stat
import struct
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from . import kernel_v4
from .errors import DmRemapError, Refused
from .marks import MAGIC

SECTOR_BYTES = 512

# linux/fs.h
_BLKSSZGET = 0x1268
_BLKPBSZGET = 0x127B
_BLKZEROOUT = 0x127F

# The number of the system call ioprio_set (asm/unistd.h), and what it takes (linux/ioprio.h).
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "ppc64le": 273, "s390x": 282}
_IOPRIO_WHO_PROCESS, _IOPRIO_CLASS_IDLE = 1, 3

_BUFFER_BYTES = 1 << 20

OWN_SIGNATURE = "dm_remap.storage spare"

_UDEV_DATABASE = "/run/udev/data"
# Kernel names of devices that forget all at a restart.
_MADE_OF_MEMORY = ("ram", "zram")


@dataclass(frozen=True)
class Use:
    """One use of a device: ``part`` (it or a partition or disk of it) is ``kind`` ``by``.

    ``uuid`` is that of the mapped device which holds it, or "".
    """

    part: str
    kind: str
    by: str
    uuid: str = ""

    def __str__(self) -> str:
        return f"{self.part} is {self.kind} {self.by}"


@dataclass(frozen=True)
class DeviceInfo:
    """What the kernel and udev know of one block device.

    Sizes are in sectors of 512 bytes, block sizes in bytes. ``disk`` is the device number of the
    whole disk, which is the device's own unless it is a partition; ``start`` is the partition's
    first sector on it. ``bus`` is how the disk is attached (``ata``, ``scsi``, ``nvme``,
    ``virtio``), or empty. ``volume`` is the UUID of a mapped device or an array. ``partition`` is
    the partition's number, 0 for a whole disk and None if nobody has looked, ``partuuid`` its
    entry in the table. ``fs_type``, ``fs_uuid``, ``table_type`` and ``table_uuid`` are what udev
    has found on the device or, for a partition's table, on its disk. ``content`` has samples by
    their names, where somebody took them.
    """

    path: str
    devno: str
    sectors: int
    logical_block: int
    physical_block: int
    disk: str
    start: int
    serial: str
    wwn: str
    model: str
    read_only: bool
    used_by: tuple[Use, ...]
    bus: str = ""
    volume: str = ""
    partition: int | None = None
    partuuid: str = ""
    fs_type: str = ""
    fs_uuid: str = ""
    table_type: str = ""
    table_uuid: str = ""
    content: tuple[tuple[str, str], ...] = ()
    hidden: str = ""

    @property
    def block_sectors(self) -> int:
        """Sectors in a logical block."""
        return self.logical_block // SECTOR_BYTES


class BlockDevice:
    """An open block device, read and written past the page cache.

    Args:
        path: the device's node.
        writable: open for writing too.

    Raises:
        DmRemapError: the device cannot be opened.
    """

    def __init__(self, path: str, writable: bool = False) -> None:
        self.name = path
        mode = os.O_RDWR if writable else os.O_RDONLY
        try:
            self._fd = os.open(path, mode | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            raise DmRemapError(
                f"cannot be opened: {os.strerror(error.errno or 0)}",
                device=path,
                remedy="check the path and that you are root",
            ) from error
        self.sectors = os.lseek(self._fd, 0, os.SEEK_END) // SECTOR_BYTES
        self.logical_block = _ioctl_int(self._fd, _BLKSSZGET)
        # O_DIRECT wants memory aligned to the block size, which anonymous maps are.
        self._buffer = mmap.mmap(-1, _BUFFER_BYTES)

    def read(self, sector: int, count: int) -> bytes:
        """Read ``count`` sectors from ``sector`` on, both multiples of the logical block.

        Raises:
            OSError: the device's own error; ENXIO past the end or where the device is gone.
        """
        parts = []
        for offset, size in self._pieces(sector, count * SECTOR_BYTES):
            with memoryview(self._buffer) as view, view[:size] as window:
                got = os.preadv(self._fd, [window], offset)
            if got != size:
                # A removed disk reads as if it ended early: that is no bad sector.
                raise OSError(errno.ENXIO, f"ends early: {got} of {size} bytes", self.name)
            parts.append(self._buffer[:size])
        return b"".join(parts)

    def write(self, sector: int, data: bytes) -> None:
        """Write ``data`` at ``sector``; durable only after `flush`.

        Raises:
            OSError: the device's own error.
        """
        position = 0
        for offset, size in self._pieces(sector, len(data)):
            self._buffer[:size] = data[position : position + size]
            with memoryview(self._buffer) as view, view[:size] as window:
                put = os.pwritev(self._fd, [window], offset)
            if put != size:
                raise OSError(errno.EIO, f"short write: {put} of {size} bytes", self.name)
            position += size

    def zero(self, sector: int, count: int) -> None:
        """Make ``count`` sectors from ``sector`` on read as zeros; durable only after `flush`.

        The kernel lets the device do it where it can, and writes zeros where it cannot
        (BLKZEROOUT, linux/fs.h).

        Raises:
            OSError: the device's own error.
        """
        fcntl.ioctl(
            self._fd, _BLKZEROOUT, struct.pack("QQ", sector * SECTOR_BYTES, count * SECTOR_BYTES)
        )

    def flush(self) -> None:
        """Make all acknowledged writes durable.

        Raises:
            OSError: the device could not flush.
        """
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the device; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._buffer.close()

    def __enter__(self) -> BlockDevice:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _pieces(self, sector: int, size: int) -> list[tuple[int, int]]:
        if size % self.logical_block or sector * SECTOR_BYTES % self.logical_block:
            raise ValueError(
                f"{self.name}: {size} bytes at sector {sector} are not whole blocks of "
                f"{self.logical_block} bytes"
            )
        begin = sector * SECTOR_BYTES
        return [
            (begin + done, min(_BUFFER_BYTES, size - done))
            for done in range(0, size, _BUFFER_BYTES)
        ]


@contextlib.contextmanager
def idle_priority() -> Iterator[None]:
    """Let this thread's I/O wait for everybody else's, where the scheduler knows priorities.

    Source: linux/ioprio.h; the C library has no function for it.
    """
    number = _IOPRIO_SET.get(os.uname().machine)
    if number is None:
        yield
        return
    # Not above, because udev forbids its programs what this needs.
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    library.syscall(number, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_CLASS_IDLE << 13)
    try:
        yield
    finally:
        library.syscall(number, _IOPRIO_WHO_PROCESS, 0, 0)


def _ioctl_int(fd: int, request: int) -> int:
    buffer = bytearray(4)
    fcntl.ioctl(fd, request, buffer)
    return int(struct.unpack("=I", buffer)[0])


def devno_of(path: str) -> str:
    """Device number ``major:minor`` of the block device at ``path`` (a node or a link to one).

    Raises:
        Refused: there is no such device or it is not a block device.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise Refused(
            f"no such device: {os.strerror(error.errno or 0)}",
            device=path or "''",
            remedy="name an existing block device",
        ) from error
    if not stat.S_ISBLK(status.st_mode):
        raise Refused("is not a block device", device=path, remedy="name a block device")
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"


def describe(path: str) -> DeviceInfo:
    """Describe the block device at ``path`` (a node or a link to one).

    Raises:
        Refused: there is no such device or it is not a block device.
    """
    devno = devno_of(path)
    with BlockDevice(path) as device:
        sectors, logical_block = device.sectors, device.logical_block
        physical_block = _ioctl_int(device._fd, _BLKPBSZGET)
    folder = _sysfs(devno)
    used = _users(folder, _whole(folder), _mounts(), _swaps()) or _exclusive_user(path)
    return _info(
        path, folder, _udev_database(devno), (sectors, logical_block, physical_block), used
    )


def _info(
    path: str,
    folder: str,
    database: Mapping[str, str],
    sizes: tuple[int, int, int],
    used_by: Sequence[Use],
) -> DeviceInfo:
    """Put together what sysfs and udev know.

    Args:
        path: the device's node.
        folder: its folder in sysfs.
        database: udev's properties of it.
        sizes: sectors, bytes of a logical and of a physical block.
        used_by: who uses it.
    """
    whole = _whole(folder)
    devno = _read(folder, "dev")
    return DeviceInfo(
        path=path,
        devno=devno,
        sectors=sizes[0],
        logical_block=sizes[1],
        physical_block=sizes[2],
        disk=(_read(whole, "dev") or devno) if whole != folder else devno,
        start=int(_read(folder, "start") or 0) if whole != folder else 0,
        serial=database.get("ID_SERIAL_SHORT")
        or database.get("ID_SERIAL")
        or _read(whole, "serial"),
        wwn=database.get("ID_WWN", ""),
        model=database.get("ID_MODEL", ""),
        read_only=_read(folder, "ro") == "1",
        used_by=tuple(used_by),
        bus=database.get("ID_BUS") or _bus_of(os.path.basename(whole)),
        volume=_read(whole, "dm/uuid") or database.get("MD_UUID", ""),
        partition=int(_read(folder, "partition") or 0) if whole != folder else 0,
        partuuid=database.get("ID_PART_ENTRY_UUID", "") if whole != folder else "",
        # What hides a device takes these away, and keeps what they were.
        fs_type=database.get("DM_REMAP_FS_TYPE") or database.get("ID_FS_TYPE", ""),
        fs_uuid=database.get("DM_REMAP_FS_UUID") or database.get("ID_FS_UUID", ""),
        table_type=database.get("ID_PART_TABLE_TYPE", ""),
        table_uuid=database.get("ID_PART_TABLE_UUID", ""),
        hidden=database.get("DM_REMAP_ROLE", ""),
    )


def _linked(folder: str, name: str) -> str:
    """Where a link leads, which realpath finds out by a look at each part of the path."""
    return os.path.normpath(os.path.join(folder, os.readlink(os.path.join(folder, name))))


def _whole(folder: str) -> str:
    """Folder in sysfs of the whole disk."""
    return os.path.dirname(folder) if _is_partition(folder) else folder


@dataclass(frozen=True)
class Listed:
    """A block device in the list of all.

    Args:
        info: what is known of it, without having opened it.
        holders: device numbers of what stands on it.
        suspended: reads of it would wait.
    """

    info: DeviceInfo
    holders: tuple[str, ...] = ()
    suspended: bool = False


def list_devices(without: str, sysfs: str = "/sys", udev: str = _UDEV_DATABASE) -> Iterator[Listed]:
    """List all block devices that have a size, but for RAM disks. None is opened.

    Args:
        without: what the UUIDs of mapped devices start with that are to be left out.
        sysfs: where sysfs is mounted.
        udev: folder of udev's database.
    """
    mounted, swapped = _mounts(), _swaps()
    for name in _list(os.path.join(sysfs, "class/block")):
        if name.startswith(_MADE_OF_MEMORY):
            continue
        try:
            folder = _linked(os.path.join(sysfs, "class/block"), name)
        except OSError:
            continue  # it has gone meanwhile
        sectors = int(_read(folder, "size") or 0)
        mapped = _read(folder, "dm/uuid")
        # A path below a multipath of the NVMe driver has no node.
        if not sectors or mapped.startswith(without) or _read(folder, "hidden") == "1":
            continue
        node = "/dev/" + name.replace("!", "/")
        database = _udev_database(_read(folder, "dev"), udev)
        used = _users(folder, _whole(folder), mounted, swapped)
        yield Listed(
            _info(node, folder, database, _sizes(folder), used),
            tuple(
                _read(os.path.join(folder, "holders", holder), "dev")
                for holder in _list(os.path.join(folder, "holders"))
            ),
            suspended=_read(folder, "dm/suspended") == "1",
        )


def _sizes(folder: str) -> tuple[int, int, int]:
    """Sectors, and bytes of a logical and of a physical block, by a device's folder in sysfs."""
    queue = os.path.join(_whole(folder), "queue")
    return (
        int(_read(folder, "size") or 0),
        int(_read(queue, "logical_block_size") or SECTOR_BYTES),
        int(_read(queue, "physical_block_size") or SECTOR_BYTES),
    )


def info_in_event(properties: Mapping[str, str], sysfs: str = "/sys") -> DeviceInfo:
    """Describe the device that udev's rules are looking at, without opening it.

    Args:
        properties: the event's, with at least DEVNAME, MAJOR and MINOR.
        sysfs: where sysfs is mounted.
    """
    devno = f"{properties['MAJOR']}:{properties['MINOR']}"
    folder = os.path.realpath(os.path.join(sysfs, "dev/block", devno))
    used = _users(folder, _whole(folder), _mounts(), _swaps())
    return _info(properties["DEVNAME"], folder, properties, _sizes(folder), used)


def doubt_about(devno: str, udev: str = _UDEV_DATABASE) -> str:
    """Why a device is not to be used yet without being asked to; "" if nothing speaks against it.

    Args:
        devno: device number `major:minor`.
        udev: folder of udev's database.
    """
    database = _udev_database(devno, udev)
    if not database:
        return "is not known to udev yet"
    if database.get("DM_MULTIPATH_DEVICE_PATH") == "1":
        return "is a path of a multipath device"
    return ""


def is_held(devno: str, by: str, sysfs: str = "/sys") -> bool:
    """Whether a mapped device stands on a device.

    Args:
        devno: device number `major:minor`.
        by: what the mapped device's UUID starts with.
        sysfs: where sysfs is mounted.
    """
    holders = os.path.join(sysfs, "dev/block", devno, "holders")
    return any(
        _read(os.path.join(holders, one), "dm/uuid").startswith(by) for one in _list(holders)
    )


def announce(devno: str, sysfs: str = "/sys") -> None:
    """Let udev look at a device and its partitions again; one that is gone needs none.

    Args:
        devno: device number `major:minor`.
        sysfs: where sysfs is mounted.
    """
    folder = os.path.join(sysfs, "dev/block", devno)
    parts = [name for name in _list(folder) if _is_partition(os.path.join(folder, name))]
    for place in (folder, *(os.path.join(folder, name) for name in parts)):
        with contextlib.suppress(OSError), open(os.path.join(place, "uevent"), "w") as file:
            file.write("change")


def attachment_of(devno: str, sysfs: str = "/sys", udev: str = _UDEV_DATABASE) -> tuple[str, int]:
    """What is another one each time that a device gets this number, and when udev last told of it.

    The kernel numbers its disks' attachments from 5.15 on (diskseq); before, the boot has to do.

    Returns:
        The attachment, and nanoseconds since 1970; 0 where udev knows nothing.
    """
    folder = _whole(os.path.realpath(os.path.join(sysfs, "dev/block", devno)))
    boot = _read("/proc/sys/kernel/random", "boot_id")
    path = os.path.join(udev, f"b{devno}")
    initialized = ""
    try:
        changed = os.stat(path).st_mtime_ns
        with open(path, encoding="utf-8", errors="replace") as file:
            initialized = next((line.strip() for line in file if line.startswith("I:")), "")
    except OSError:
        changed = 0
    return " ".join((boot, _read(folder, "diskseq"), initialized)), changed


def _bus_of(name: str) -> str:
    """How a disk is attached, by its kernel name; SCSI and ATA disks share theirs."""
    buses = {"nvme": "nvme", "vd": "virtio", "sd": "scsi"}
    return next((bus for prefix, bus in buses.items() if name.startswith(prefix)), "")


def node_of(devno: str) -> str:
    """The kernel's node for a device number ``major:minor``.

    Raises:
        DmRemapError: no device has that number.
    """
    for line in _read(_sysfs(devno), "uevent").splitlines():
        if line.startswith("DEVNAME="):
            return "/dev/" + line.partition("=")[2]
    raise DmRemapError("no such device", device=devno, remedy="check that it is still attached")


def links_to(devno: str) -> list[str]:
    """Links that udev has made to a device and makes again after a restart, the best first."""
    found = []
    for folder in ("/dev/mapper", "/dev/disk/by-id", "/dev/disk/by-partuuid", "/dev/disk/by-path"):
        for name in _list(folder):
            path = os.path.join(folder, name)
            try:
                status = os.stat(path)
            except OSError:
                continue
            number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
            if stat.S_ISBLK(status.st_mode) and number == devno:
                found.append(path)
    return found


def nodes_of_size(sizes: Collection[int]) -> list[str]:
    """The kernel's nodes of all disks and partitions that have one of ``sizes`` in sectors.

    Devices of device-mapper are left out, because who names one must do so himself.
    """
    found = []
    for name in _list("/sys/class/block"):
        folder = f"/sys/class/block/{name}"
        size = int(_read(folder, "size") or -1)
        if size in sizes and not os.path.isdir(os.path.join(folder, "dm")):
            found.append(node_of(_read(folder, "dev")))
    return found


def signatures(path: str) -> list[str]:
    """Names of what is found on the device: filesystems, partition tables, LVM, md, spares.

    Raises:
        DmRemapError: the device could not be examined.
    """
    found = []
    with BlockDevice(path) as device:
        try:
            start = device.read(0, max(8, device.logical_block // SECTOR_BYTES))
        except OSError as error:
            raise DmRemapError(
                f"its first sectors cannot be read: {os.strerror(error.errno or 0)}",
                device=path,
                remedy="use another device",
            ) from error
        if start.startswith(MAGIC):
            found.append(OWN_SIGNATURE)
        elif _kernel_target_copies(device):
            found.append(kernel_v4.SIGNATURE)
    result = subprocess.run(
        ["wipefs", "--json", "--", path],
        capture_output=True,
        text=True,
        check=False,
        env={"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )
    if result.returncode != 0:
        raise DmRemapError(
            f"cannot be examined for signatures: {result.stderr.strip()}",
            device=path,
            remedy="check that wipefs (util-linux) works on it",
        )
    listing = json.loads(result.stdout or "{}")
    return found + [entry["type"] for entry in listing.get("signatures", [])]


def erase_signatures(path: str) -> None:
    """Erase the signatures that `signatures` finds, with wipefs.

    Raises:
        DmRemapError: wipefs failed.
    """
    result = subprocess.run(
        ["wipefs", "--all", "--", path],
        capture_output=True,
        text=True,
        check=False,
        env={"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )
    if result.returncode != 0:
        raise DmRemapError(
            f"its signatures cannot be erased: {result.stderr.strip()}",
            device=path,
            remedy="check that nothing uses it",
        )
    with BlockDevice(path, writable=True) as device:
        # wipefs does not know the kernel target's spares, so its own magic is cleared here.
        copies = _kernel_target_copies(device)
        for sector in copies:
            device.write(sector, bytes(8 * SECTOR_BYTES))
        if copies:
            device.flush()


def _kernel_target_copies(device: BlockDevice) -> list[int]:
    """Sectors where a dm-remap-v4 spare has a copy; that target writes data over the first ones."""
    found = []
    for sector in kernel_v4.COPY_SECTORS:
        with contextlib.suppress(OSError):
            if device.read(sector, 8).startswith(kernel_v4.MAGIC):
                found.append(sector)
    return found


def _sysfs(devno: str) -> str:
    return os.path.realpath(f"/sys/dev/block/{devno}")


def _is_partition(folder: str) -> bool:
    return os.path.exists(os.path.join(folder, "partition"))


def _read(folder: str, name: str) -> str:
    try:
        with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def _udev_database(devno: str, folder: str = _UDEV_DATABASE) -> dict[str, str]:
    # udev keeps its database as text; the properties are the lines that start with "E:".
    properties = {}
    try:
        with open(os.path.join(folder, f"b{devno}"), encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("E:"):
                    key, _unused, value = line[2:].rstrip("\n").partition("=")
                    properties[key] = value
    except OSError:
        pass
    return properties


def _users(
    folder: str, whole: str, mounted: Mapping[str, Sequence[str]], swapped: Collection[str]
) -> list[Use]:
    """Who uses the device, one of its partitions, or the disk that it is a partition of.

    Args:
        folder: its folder in sysfs.
        whole: that of its whole disk.
        mounted: mount points by device number.
        swapped: device numbers of swap.
    """
    parts = [folder] + [
        os.path.join(folder, name)
        for name in (_list(folder) if whole == folder else ())
        if name.startswith(os.path.basename(folder)) and _is_partition(os.path.join(folder, name))
    ]
    if whole != folder:
        parts.append(whole)
    used = []
    for part in parts:
        name, devno = os.path.basename(part), _read(part, "dev")
        for point in mounted.get(devno, []):
            used.append(Use(name, "mounted on", point))
        if devno in swapped:
            used.append(Use(name, "in use as", "swap"))
        for holder in _list(os.path.join(part, "holders")):
            mapped = os.path.join(part, "holders", holder, "dm")
            label = _read(mapped, "name") or holder
            used.append(Use(name, "held by", label, _read(mapped, "uuid")))
    return used


def _exclusive_user(path: str) -> list[Use]:
    # Btrfs members and some others show no holder, but the kernel knows that they are claimed.
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return [Use(os.path.basename(path), "claimed by", "the kernel")]
    return []


def _list(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _mounts(path: str = "/proc/self/mountinfo") -> dict[str, list[str]]:
    # Fields of /proc/self/mountinfo: id, parent, major:minor, root, mount point; after a hyphen
    # the type and the source (proc(5)).
    found: dict[str, list[str]] = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            fields = line.split()
            devno = fields[2]
            if devno.startswith("0:"):
                # Btrfs has a number of its own, and names one of its devices.
                with contextlib.suppress(Refused, ValueError, IndexError):
                    source = fields[fields.index("-", 6) + 2]
                    devno = devno_of(source) if source.startswith("/dev/") else devno
            found.setdefault(devno, []).append(fields[4])
    return found


def mount_points() -> set[str]:
    """The mount points of this process's file systems, escaped as in proc(5)."""
    return {point for points in _mounts().values() for point in points}


def _swaps() -> set[str]:
    found = set()
    with open("/proc/swaps", encoding="utf-8", errors="replace") as file:
        for line in file.readlines()[1:]:
            try:
                status = os.stat(line.split()[0])
            except (OSError, IndexError):
                continue
            if stat.S_ISBLK(status.st_mode):
                found.add(f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}")
    return found
