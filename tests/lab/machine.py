# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""A virtual machine with disks that can be made to fail."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .accel import KVM, QEMU, SKIPPING, accelerator
from .disk import AHCI_PORTS, SECTOR_BYTES, Disk, device, protocol_node, raw_node
from .faults import Fault, rules, without
from .image import READY, ROOT_LABEL, SUITES, Image, ensure_image
from .paths import LabError, machine_dir, machines_dir, ssh_key
from .process import Process, spawn, tail
from .qmp import Qmp

ADDRESS = "127.0.0.1"
SSH_PORT = 22
BOOT_SECONDS = 600.0
# What the console says when a boot has failed for good.
BOOT_FAILURES = ("Kernel panic - not syncing", "(initramfs) ", "You are in emergency mode")
COMMAND_SECONDS = 300.0

# What the role installs, and reset() stops unless told otherwise.
SERVICES = ("dm-remap-assemble.service", "dm-remap-healer.service", "dm-remapd.service")

# What the guest is left without by reset(): anything mounted under /mnt, and all of
# device-mapper. Suspended devices are resumed and multipath stops queueing first, because
# whoever waits for them cannot be ended.
RESET_SCRIPT = r"""
for unit in "$@"; do systemctl stop "$unit" 2>/dev/null; done
for name in $(dmsetup info -c --noheadings -o name 2>/dev/null); do
    [ "$name" = "No" ] && break
    dmsetup resume "$name"
done
for name in $(dmsetup table --target multipath 2>/dev/null | sed -n 's/: 0 .*//p'); do
    dmsetup message "$name" 0 fail_if_no_path
done
# A stack of devices goes level by level, while udev may still look at some of them.
before=
retry=
while :; do
    awk '$2 ~ "^/mnt(/|$)" { print $2 }' /proc/mounts | tac | while read -r point; do
        umount "$point"
    done
    dmsetup remove_all $retry 2>/dev/null
    udevadm settle
    left=$(ls /sys/block | grep -c ^dm-)
    [ "$left" -eq 0 ] && break
    if [ "$left" != "$before" ]; then
        retry=
    elif [ -z "$retry" ]; then
        retry=--retry
    else
        break
    fi
    before=$left
done
# The backups are of what the disks had.
rm -rf /var/lib/dm-remap/backup
left=$(dmsetup info -c --noheadings -o name,open 2>/dev/null | grep -v '^No devices')
[ -z "$left" ] || { echo "still there: $left" >&2; exit 1; }
! grep -E ' /mnt(/| )' /proc/mounts >&2
"""

# One O_DIRECT request in the guest: path, action, sector, count; data on standard input.
# A device that was open for writing is read again by udev, so reads open it for reading only.
DIRECT_IO = r"""
import mmap, os, sys
path, action, sector, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
try:
    mode = os.O_RDONLY if action == "read" else os.O_RDWR
    device = os.open(path, mode | os.O_DIRECT)
    if action == "flush":
        os.fsync(device)
        sys.exit(0)
    buffer = mmap.mmap(-1, count * 512)
    if action == "write":
        buffer.write(sys.stdin.buffer.read())
        done = os.pwritev(device, [buffer], sector * 512)
    else:
        done = os.preadv(device, [buffer], sector * 512)
        sys.stdout.buffer.write(buffer[:done])
    sys.exit("short" if done != count * 512 else 0)
except OSError as error:
    sys.exit("errno %d" % error.errno)
"""


class CommandFailed(LabError):
    """A command in the guest ended with an error; ``result`` has all of its output."""

    def __init__(self, command: str, result: Result) -> None:
        self.result = result
        output = (result.stderr or result.stdout).strip()
        super().__init__(f"{command}: exit code {result.rc}: {output}")


@dataclass(frozen=True)
class Result:
    """What a command in the guest returned."""

    rc: int
    stdout: str
    stderr: str


class GuestDisk:
    """A disk of a machine: its place on both sides, and its faults.

    Attributes:
        spec: the Disk that it was made from.
        image: the raw file on the host.
        path: the stable name in the guest.
        faults: the sectors that fail now; the weak ones (``times``) as they were asked for.
    """

    def __init__(self, machine: Machine, spec: Disk, image: Path, extra: bool) -> None:
        self._machine = machine
        self._layer = 0
        self.server: Process | None = None
        self.spec = spec
        self.image = image
        self.extra = extra
        self.faults: list[Fault] = []

    @property
    def name(self) -> str:
        """The disk's name in the lab."""
        return self.spec.name

    @property
    def path(self) -> str:
        """The disk's stable name in the guest."""
        return self.spec.path

    def fail(
        self,
        sectors: Iterable[tuple[int, int]] | None = None,
        op: str = "both",
        errno: str = "EIO",
        once: bool = False,
        times: int | None = None,
    ) -> None:
        """Make sectors fail, in addition to those that already do; the guest need not run.

        Args:
            sectors: (start, count) pairs of 512-byte sectors; None for the whole disk.
            op: ``read``, ``write``, ``both`` or ``flush``.
            errno: ``EIO``, ``ENODATA`` or another name; what the guest sees differs by
                interface (docs/lab.md).
            once: the same as ``times=1``.
            times: fail that many requests for each sector, then answer again. Kernels retry
                by themselves: docs/lab.md says how often.
        """
        count = 1 if once and times is None else times
        ranges: list[tuple[int | None, int]] = [(None, 1)] if sectors is None else [*sectors]
        added = [Fault(start, length, op, errno, count) for start, length in ranges]
        for fault in added:
            if fault.start is not None and fault.start + fault.count > self.spec.sectors:
                raise LabError(
                    f"disk {self.name}: sectors {fault.start}+{fault.count} are beyond its "
                    f"{self.spec.sectors} sectors"
                )
        self._set(self.faults + added)

    def heal(self, sectors: Iterable[tuple[int, int]] | None = None) -> None:
        """Let sectors answer again: (start, count) pairs, or None for all of them.

        The sectors' contents are what they were: a failed write has changed nothing.
        """
        faults = [] if sectors is None else self.faults
        for start, count in sectors or ():
            faults = without(faults, start, count)
        self._set(faults)

    def read(self, sector: int, count: int) -> bytes:
        """Read sectors in the guest with O_DIRECT, whole logical blocks.

        Raises:
            OSError: with the errno that the guest's read got.
        """
        return self._direct("read", sector, count, b"")

    def write(self, sector: int, data: bytes) -> None:
        """Write sectors in the guest with O_DIRECT; not flushed. Raises OSError as read()."""
        self._direct("write", sector, len(data) // SECTOR_BYTES, data)

    def flush(self) -> None:
        """Flush the disk's write cache from the guest. Raises OSError as read()."""
        self._direct("flush", 0, 0, b"")

    def _direct(self, action: str, sector: int, count: int, data: bytes) -> bytes:
        command = ["python3", "-c", DIRECT_IO, self.path, action, str(sector), str(count)]
        done = self._machine.run_bytes(command, data)
        words = done.stderr.decode("utf-8", errors="replace").split()
        if words[:1] == ["errno"]:
            number = int(words[1])
            raise OSError(number, os.strerror(number), self.path)
        if done.returncode:
            raise LabError(f"disk {self.name}: {action} failed: {' '.join(words)}")
        return done.stdout

    def _set(self, faults: list[Fault]) -> None:
        if self._machine.running:
            self.load(faults)
        self.faults = faults
        self._machine.save()

    def load(self, faults: list[Fault]) -> None:
        """Tell QEMU which sectors fail, through a new blkdebug node under the raw one."""
        qmp = self._machine.qmp()
        old = f"debug-{self.name}-{self._layer}" if self._layer else None
        source = f"file-{self.name}"
        if faults:
            layer = self._layer + 1
            source = f"debug-{self.name}-{layer}"
            qmp.execute(
                "blockdev-add",
                **{
                    "driver": "blkdebug",
                    "node-name": source,
                    "image": f"file-{self.name}",
                    "inject-error": rules(faults, self.spec.block_sectors),
                    "discard": "unmap",
                },
            )
        flushes = sum(fault.times or 0 for fault in self.faults if fault.op == "flush")
        for attempt in range(flushes + 1):
            try:
                qmp.execute("blockdev-reopen", options=[raw_node(self.spec, source)])
                break
            except LabError:
                # Each attempt flushes the disk first, and so uses up one failure of a flush.
                if attempt == flushes:
                    raise
        if old:
            qmp.execute("blockdev-del", **{"node-name": old})
        self._layer = layer if faults else 0

    def nodes(self) -> list[str]:
        """Return QEMU's nodes of this disk, from the top down."""
        debug = [f"debug-{self.name}-{self._layer}"] if self._layer else []
        return [f"raw-{self.name}", *debug, f"file-{self.name}"]

    def to_dict(self) -> dict[str, Any]:
        """Return what load_disk() needs."""
        return {
            "spec": asdict(self.spec),
            "image": str(self.image),
            "extra": self.extra,
            "layer": self._layer,
            "server": asdict(self.server) if self.server else None,
            "faults": [asdict(fault) for fault in self.faults],
        }

    @classmethod
    def from_dict(cls, machine: Machine, data: Mapping[str, Any]) -> GuestDisk:
        """Return the disk that to_dict() described."""
        disk = cls(machine, Disk(**data["spec"]), Path(data["image"]), data["extra"])
        disk._layer = data["layer"]
        if data.get("server"):
            disk.server = Process(**data["server"])
        disk.faults = [Fault(**fault) for fault in data["faults"]]
        return disk

    def forget_layers(self) -> None:
        """Note that QEMU has ended, and its nodes with it."""
        self._layer = 0

    def end_server(self) -> None:
        """End the server of a volatile disk."""
        if self.server is not None:
            self.server.kill()
            self.server.wait(30)
            self.server = None


class Machine:
    """A virtual machine: a guest image, a private copy of its root disk, and data disks.

    Use it as a context manager, or call close(): both end QEMU and remove its directory.

    Args:
        image: ``debian-12`` or ``debian-13``; built first if it is not in the cache.
        disks: the data disks.
        memory_mb: the guest's memory in MiB.
        cpus: the guest's processors; None for 2 with KVM and 1 without: two emulated ones wait
            for each other's spinlocks for minutes when the host is busy.
        forwards: guest TCP port to host port on 127.0.0.1, None for a free one (read
            ``machine.forwards`` after start). Port 22 is always forwarded.
        name: the machine's name; None for a made-up one.
        detached: let the guest outlive this process, until close() or ``kill`` by hand.
        boot_seconds: how long a boot may take.
        skip_idle: let the guest's clock go on by a nanosecond with each instruction, and to the
            next timer when it has nothing to do. What it measures of its own processor and timers
            is then independent of how busy this machine is; what it measures of its disks means
            nothing.

    Attributes:
        initrd: the initial RAM disk of the next start; None for the image's.
    """

    def __init__(
        self,
        image: str = "debian-12",
        disks: Sequence[Disk] = (),
        memory_mb: int = 512,
        cpus: int | None = None,
        forwards: Mapping[int, int | None] | None = None,
        name: str | None = None,
        detached: bool = False,
        boot_seconds: float = BOOT_SECONDS,
        skip_idle: bool = False,
    ) -> None:
        if image not in SUITES:
            raise LabError(f"no image called {image!r}: choose one of {', '.join(sorted(SUITES))}")
        names = [disk.name for disk in disks]
        for disk_name in names:
            if names.count(disk_name) > 1:
                raise LabError(f"disk {disk_name}: two disks have this name")
        self._image_name = image
        self._image: Image | None = None
        self._specs = list(disks)
        self._qmp: Qmp | None = None
        self._started = False
        self._lock: Any = None
        self.name = name or f"m-{uuid.uuid4().hex[:8]}"
        self.directory = machine_dir(self.name)
        self.sockets: Path | None = None
        self.disks: dict[str, GuestDisk] = {}
        self.memory_mb = memory_mb
        self.cpus = cpus
        self.forwards: dict[int, int | None] = {SSH_PORT: None, **(forwards or {})}
        self.detached = detached
        self.boot_seconds = boot_seconds
        self.skip_idle = skip_idle
        self.initrd: Path | None = None
        self.machine_id = uuid.uuid4().hex
        self.process: Process | None = None
        self.last_boot_seconds: float | None = None

    # Starting and ending

    def __enter__(self) -> Machine:
        if not self.running:
            self.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    @property
    def running(self) -> bool:
        """Whether QEMU runs."""
        return self.process is not None and self.process.alive()

    def start(self) -> None:
        """Boot the machine and wait until it can be logged in to.

        Raises:
            LabError: it does not boot; with the end of its console. It is closed then.
        """
        if self.running:
            raise LabError(f"machine {self.name} runs already")
        first = self.sockets is None
        if first and self.directory.exists():
            raise LabError(f"a machine {self.name} is there: kill it or choose another name")
        try:
            if first:
                self._create()
            self._boot()
        except BaseException:
            if first:
                self.close()
            else:
                self._end_qemu()
            raise

    def restart(self) -> None:
        """Boot again with the same disks, ports and faults; shut down first if it runs."""
        if self.running:
            self.shutdown()
        self.start()

    def reboot(self) -> None:
        """Let the guest shut down, and boot again."""
        self.restart()

    def shutdown(self, timeout: float = 120.0) -> None:
        """Shut the guest down in order; raises LabError if it still runs after ``timeout``."""
        process = self._require_running()
        self.run("systemctl poweroff --no-block", check=False)
        if not process.wait(timeout):
            raise LabError(f"machine {self.name} did not shut down:\n{self.console_tail()}")
        self._end_qemu()

    def power_cut(self) -> None:
        """End QEMU by SIGKILL, as if the power had failed; restart() boots again.

        Disks with ``cache="volatile"`` lose unflushed writes; their images are settled when
        this returns. The others keep all that QEMU has acknowledged.
        """
        self._require_running()
        self._end_qemu()
        for disk in self.disks.values():
            if disk.server is not None:
                self._settle(disk)

    def _settle(self, disk: GuestDisk) -> None:
        """Wait until a volatile disk's server has dealt with the end of QEMU's connection."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(60)
            link.connect(self._nbd_socket(disk))
            link.recv(1)

    def _start_server(self, disk: GuestDisk, begin: float) -> None:
        """Start the server of a volatile disk, unless it runs."""
        if disk.spec.cache != "volatile" or (disk.server is not None and disk.server.alive()):
            return
        path = Path(self._nbd_socket(disk))
        path.unlink(missing_ok=True)
        log = self.directory / f"{disk.name}.log"
        command = [sys.executable, str(Path(__file__).with_name("volatile.py"))]
        command += ["--socket", str(path), "--image", str(disk.image)]
        command += ["--block", str(disk.spec.block)]
        command += ["--survive", str(disk.spec.survive), "--seed", str(disk.spec.seed)]
        server = disk.server = spawn(command, self.directory, log, self.detached)
        self._poll(begin, path.exists, server, log, f"disk {disk.name}'s server")

    def close(self) -> None:
        """End QEMU and remove everything that belongs to the machine, but not given images."""
        self._end_qemu()
        for disk in self.disks.values():
            disk.end_server()
        if self.sockets is not None:
            shutil.rmtree(self.sockets, ignore_errors=True)
        shutil.rmtree(self.directory, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        _open_machines.discard(self)

    def _end_qemu(self) -> None:
        """Kill QEMU and the SSH master, and wait for their end."""
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None
        if self.process is not None:
            self.process.kill()
            if not self.process.wait(30):
                raise LabError(f"QEMU, process {self.process.pid}, does not end")
            self.process = None
        self._end_ssh_master()
        for disk in self.disks.values():
            disk.forget_layers()
        if self.directory.exists():
            self.save()

    def _require_running(self) -> Process:
        if self.process is None or not self.process.alive():
            raise LabError(f"machine {self.name} does not run: start or restart it")
        return self.process

    def _create(self) -> None:
        """Make the machine's directory: root disk, data disks, SSH configuration."""
        prune()
        image = self.image
        self.directory.mkdir(mode=0o700)
        self._hold()
        self.sockets = Path(tempfile.mkdtemp(prefix="dmlab-"))
        backing = ["-F", "raw", "-b", str(image.root)]
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", *backing, "root.qcow2"],
            cwd=self.directory,
            check=True,
        )
        for spec in self._specs:
            self._add_disk(spec, extra=False)

    def _hold(self) -> None:
        """Lock the directory for as long as this process lives, so that prune() leaves it."""
        if not self.detached:
            self._lock = open(self.directory / "owner.lock", "w", encoding="ascii")  # noqa: SIM115
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _open_machines.add(self)

    @property
    def image(self) -> Image:
        """The guest image, built if it is not in the cache."""
        if self._image is None:
            self._image = ensure_image(self._image_name)
        return self._image

    def _add_disk(self, spec: Disk, extra: bool) -> GuestDisk:
        image = Path(spec.image) if spec.image else self.directory / f"{spec.name}.raw"
        if not spec.image:
            with open(image, "wb") as handle:
                handle.truncate(spec.bytes)
        elif not image.exists():
            raise LabError(f"disk {spec.name}: no file {image}")
        disk = GuestDisk(self, spec, image.resolve(), extra)
        self.disks[spec.name] = disk
        return disk

    def _boot(self) -> None:
        begin = time.monotonic()
        (self._sockets() / "qmp").unlink(missing_ok=True)
        console = self.directory / "console.log"
        if console.exists():
            console.rename(console.with_suffix(".log.old"))
        for disk in self.disks.values():
            self._start_server(disk, begin)
        self.process = spawn(
            self._command(), self.directory, self.directory / "qemu.log", self.detached
        )
        self.save()
        self._wait_for(begin, self._qemu_is_ready, "QEMU's control socket")
        qmp = self.qmp()
        for disk in self.disks.values():
            if disk.faults:
                disk.load(disk.faults)
        self._read_forwards(qmp)
        self._write_ssh_config()
        qmp.execute("cont")
        self._wait_for(begin, self._ssh_is_ready, "SSH")
        self._start_ssh_master()
        self.last_boot_seconds = time.monotonic() - begin
        self.save()

    def _qemu_is_ready(self) -> bool:
        # QEMU makes the socket a moment before it listens.
        try:
            self.qmp()
        except LabError:
            return False
        return True

    def _wait_for(self, begin: float, condition: Callable[[], bool], what: str) -> None:
        process = self._require_running()
        self._poll(begin, condition, process, self.directory / "qemu.log", what)

    def _poll(
        self, begin: float, condition: Callable[[], bool], process: Process, log: Path, what: str
    ) -> None:
        """Wait for ``condition``; raise LabError if ``process`` ends or the boot takes too long."""
        while not condition():
            if not process.alive():
                raise LabError(
                    f"machine {self.name}: a process ended before {what} was there:\n"
                    f"{tail(log)}\n{self.console_tail()}"
                )
            late = time.monotonic() - begin > self.boot_seconds
            if late or any(text in self.console_tail(3) for text in BOOT_FAILURES):
                raise LabError(
                    f"machine {self.name}: no {what} after {time.monotonic() - begin:.0f} s; "
                    f"the end of its console:\n{self.console_tail()}"
                )
            time.sleep(0.05)

    def console_tail(self, lines: int = 30) -> str:
        """Return the last lines of the guest's serial console."""
        return tail(self.directory / "console.log", lines)

    def _sockets(self) -> Path:
        if self.sockets is None:
            raise LabError(f"machine {self.name} was not started")
        return self.sockets

    def _command(self) -> list[str]:
        """Return QEMU's command line; faults are added before the guest's first instruction."""
        image = self.image
        kernel_arguments = (
            f"root=LABEL={ROOT_LABEL} rw console=ttyS0 loglevel=3 net.ifnames=0 mitigations=off "
            f"fsck.mode=skip systemd.machine_id={self.machine_id} systemd.hostname={self.name}"
        )
        command = [QEMU, "-nodefaults", "-display", "none", "-S", "-machine", "pc"]
        accel = SKIPPING if self.skip_idle else accelerator(image)
        cpus = self.cpus or (2 if accel == KVM else 1)
        command += [*accel, "-smp", str(cpus), "-m", str(self.memory_mb)]
        command += ["-kernel", str(image.kernel), "-initrd", str(self.initrd or image.initrd)]
        command += ["-append", kernel_arguments, "-name", self.name]
        command += ["-qmp", f"unix:{self._sockets()}/qmp,server=on,wait=off"]
        command += [
            "-chardev",
            f"socket,id=console,path={self._sockets()}/console,server=on,wait=off,"
            f"logfile=console.log",
            "-serial",
            "chardev:console",
        ]
        forwards = "".join(
            f",hostfwd=tcp:{ADDRESS}:{host or 0}-:{guest}" for guest, host in self.forwards.items()
        )
        command += ["-netdev", f"user,id=net,ipv6=off,restrict=on{forwards}"]
        command += ["-device", "virtio-net-pci,netdev=net", "-device", "virtio-rng-pci"]
        root = {
            "driver": "qcow2",
            "node-name": "root",
            "file": {"driver": "file", "filename": "root.qcow2", "cache": {"no-flush": True}},
            "discard": "unmap",
        }
        command += ["-blockdev", json.dumps(root)]
        command += ["-device", "virtio-blk-pci,drive=root,serial=lab-root"]
        return command + self._disk_arguments()

    def _disk_arguments(self) -> list[str]:
        arguments = ["-device", "virtio-scsi-pci,id=scsi"]
        ide = [disk for disk in self.disks.values() if disk.spec.interface == "ide"]
        for number in range((len(ide) + AHCI_PORTS - 1) // AHCI_PORTS):
            arguments += ["-device", f"ich9-ahci,id=ahci{number}"]
        for disk in self.disks.values():
            ide_index = ide.index(disk) if disk in ide else 0
            file_node = protocol_node(disk.spec, disk.image, self._nbd_socket(disk))
            arguments += ["-blockdev", json.dumps(file_node)]
            arguments += ["-blockdev", json.dumps(raw_node(disk.spec, file_node["node-name"]))]
            arguments += ["-device", json.dumps(device(disk.spec, ide_index))]
        return arguments

    def _nbd_socket(self, disk: GuestDisk) -> str:
        return str(self._sockets() / f"nbd-{disk.name}")

    def qmp(self) -> Qmp:
        """Return this process's connection to QEMU, opened on first use."""
        self._require_running()
        if self._qmp is None:
            self._qmp = Qmp(self._sockets() / "qmp")
        return self._qmp

    def _read_forwards(self, qmp: Qmp) -> None:
        """Learn which host ports QEMU has bound, and keep them for the next boot."""
        text = qmp.execute("human-monitor-command", **{"command-line": "info usernet"})
        for line in text.splitlines():
            fields = line.split()
            if fields and fields[0] == "TCP[HOST_FORWARD]":
                self.forwards[int(fields[5])] = int(fields[3])

    # Disks

    def disk(self, name: str) -> GuestDisk:
        """Return the disk called ``name``."""
        if name not in self.disks:
            known = ", ".join(self.disks) or "none"
            raise LabError(f"machine {self.name} has no disk {name!r}; it has: {known}")
        return self.disks[name]

    def change_disks(self, specs: Iterable[Disk]) -> None:
        """Give the machine, which must not run, these disks for its next boot in place of all."""
        if self.running:
            raise LabError(f"machine {self.name} runs: shut it down, or attach and detach disks")
        for disk in self.disks.values():
            disk.end_server()
        self.disks.clear()
        for spec in specs:
            self._add_disk(spec, extra=False)
        self.save()

    def attach(self, spec: Disk) -> GuestDisk:
        """Plug in a disk while the guest runs, and wait for the guest to see it (not ide)."""
        if spec.interface == "ide":
            raise LabError(f"disk {spec.name}: ide disks cannot be plugged in; give it at start")
        if spec.name in self.disks:
            raise LabError(f"disk {spec.name}: two disks have this name")
        qmp = self.qmp()
        disk = self._add_disk(spec, extra=True)
        self._start_server(disk, time.monotonic())
        file_node = protocol_node(spec, disk.image, self._nbd_socket(disk))
        qmp.execute("blockdev-add", **file_node)
        qmp.execute("blockdev-add", **raw_node(spec, file_node["node-name"]))
        qmp.execute("device_add", **device(spec))
        self.save()
        self.run(["udevadm", "wait", "--timeout=60", disk.path])
        return disk

    def detach(self, name: str, keep_image: bool = False) -> None:
        """Unplug a disk, in use or not, and remove its image unless it is to be kept."""
        disk = self.disk(name)
        if disk.spec.interface == "ide":
            raise LabError(f"disk {name}: ide disks cannot be unplugged")
        qmp = self.qmp()
        qmp.execute("device_del", id=f"disk-{name}")
        qmp.wait_event("DEVICE_DELETED", device=f"disk-{name}")
        for node in disk.nodes():
            qmp.execute("blockdev-del", **{"node-name": node})
        disk.end_server()
        del self.disks[name]
        if not keep_image and not disk.spec.image:
            disk.image.unlink()
        self.save()

    def zero(self, names: Iterable[str]) -> None:
        """Make the whole content of disks zero, in an instant; their faults must be healed."""
        disks = [self.disk(name) for name in names]
        if not disks:
            return
        paths = [disk.path for disk in disks]
        self.run(["blockdev", "--flushbufs", *paths])
        for disk in disks:
            if disk.server is not None:
                self.run(["blkdiscard", "--force", "--zeroout", disk.path])
                self.run(["blockdev", "--flushbufs", disk.path])
            else:
                length = f"--length={disk.spec.bytes}"
                subprocess.run(["fallocate", "--punch-hole", length, disk.image], check=True)
        self.run(["blockdev", "--flushbufs", *paths])
        self.run(["udevadm", "trigger", "--settle", "--action=change", *paths])

    def reset(self, zero: Iterable[str] = (), stop: Sequence[str] = SERVICES) -> None:
        """Leave the guest clean for the next test.

        Boots it if it does not run, heals every fault, stops the units ``stop``, unmounts what
        is under /mnt, removes all device-mapper devices, unplugs disks that were plugged in,
        and zeroes the disks called ``zero``.

        Raises:
            CommandFailed: something is still in use; the message names it.
        """
        if not self.running:
            self.start()
        for disk in self.disks.values():
            if disk.faults:
                disk.heal()
        self.run(["sh", "-c", RESET_SCRIPT, "reset", *stop])
        for name in [name for name, disk in self.disks.items() if disk.extra]:
            self.detach(name)
        self.zero(zero)

    # Talking to the guest

    @property
    def port(self) -> int:
        """The host's port on 127.0.0.1 that leads to the guest's SSH."""
        port = self.forwards[SSH_PORT]
        if port is None:
            raise LabError(f"machine {self.name} was not started")
        return port

    @property
    def ssh_config(self) -> Path:
        """An ssh_config file for ``ssh -F``, with the host's name ``self.name``."""
        return self.directory / "ssh_config"

    def inventory(self) -> dict[str, Any]:
        """Return Ansible's connection variables for this machine."""
        return {
            "ansible_host": self.name,
            "ansible_port": self.port,
            "ansible_user": "root",
            "ansible_python_interpreter": "/usr/bin/python3",
            "ansible_ssh_private_key_file": str(ssh_key()),
            "ansible_ssh_common_args": f"-F {shlex.quote(str(self.ssh_config))}",
            "ansible_ssh_pipelining": True,
        }

    def describe(self) -> dict[str, Any]:
        """Return what another program needs to use the machine."""
        return {
            "name": self.name,
            "image": self._image_name,
            "address": ADDRESS,
            "port": self.port,
            "user": "root",
            "key": str(ssh_key()),
            "ssh_config": str(self.ssh_config),
            "forwards": {str(guest): host for guest, host in self.forwards.items()},
            "inventory": self.inventory(),
            "disks": {
                name: {"path": disk.path, "image": str(disk.image), "sectors": disk.spec.sectors}
                for name, disk in self.disks.items()
            },
            "pid": self.process.pid if self.process else None,
            "directory": str(self.directory),
            "boot_seconds": self.last_boot_seconds,
        }

    def _write_ssh_config(self) -> None:
        image = self.image
        known_hosts = self.directory / "known_hosts"
        known_hosts.write_text(f"dm-remap-lab {image.host_key}\n", "ascii")
        self.ssh_config.write_text(
            f"Host {self.name}\n"
            f"  HostName {ADDRESS}\n"
            f"  Port {self.port}\n"
            "  User root\n"
            f'  IdentityFile "{ssh_key()}"\n'
            "  IdentitiesOnly yes\n"
            "  HostKeyAlias dm-remap-lab\n"
            f'  UserKnownHostsFile "{known_hosts}"\n'
            "  GlobalKnownHostsFile /dev/null\n"
            "  StrictHostKeyChecking yes\n"
            "  ServerAliveInterval 30\n"
            "  ServerAliveCountMax 10\n"
            "  LogLevel ERROR\n"
            f"  ControlPath {self._sockets()}/ssh\n",
            "utf-8",
        )

    def _ssh_is_ready(self) -> bool:
        """Say whether the guest has told on its console that it can be logged in to."""
        return READY in tail(self.directory / "console.log", 1000)

    def _start_ssh_master(self) -> None:
        """Open the connection that later commands share."""
        command = ["ssh", "-F", str(self.ssh_config), "-o", "ControlMaster=yes", "-f", "-N"]
        with open(self.directory / "ssh.log", "ab") as log:
            subprocess.run(
                [*command, self.name],
                check=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=self.boot_seconds,
            )

    def _end_ssh_master(self) -> None:
        if self.sockets is not None and (self.sockets / "ssh").exists():
            subprocess.run(
                ["ssh", "-F", self.ssh_config, "-O", "exit", self.name],
                check=False,
                capture_output=True,
                timeout=30,
            )

    def ssh_command(self, *options: str) -> list[str]:
        """Return the start of an ssh command line that ends with the host's name."""
        return ["ssh", "-F", str(self.ssh_config), *options, self.name]

    def run(
        self,
        command: Sequence[str] | str,
        check: bool = True,
        input: str | bytes | None = None,
        timeout: float = COMMAND_SECONDS,
    ) -> Result:
        """Run a command in the guest as root and return its result.

        Args:
            command: arguments (quoted for you), or a text for the guest's shell.
            check: raise CommandFailed unless the exit code is 0.
            input: what the command reads.
            timeout: seconds; then LabError, with the end of the console.
        """
        data = input.encode() if isinstance(input, str) else input
        done = self.run_bytes(command, data or b"", timeout)
        result = Result(
            done.returncode,
            done.stdout.decode("utf-8", errors="replace"),
            done.stderr.decode("utf-8", errors="replace"),
        )
        if check and result.rc:
            raise CommandFailed(shell_text(command), result)
        return result

    def run_bytes(
        self, command: Sequence[str] | str, data: bytes = b"", timeout: float = COMMAND_SECONDS
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command in the guest like run(), in bytes and whatever its exit code."""
        self._require_running()
        text = shell_text(command)
        try:
            return subprocess.run(
                [*self.ssh_command("-T"), "--", text],
                check=False,
                capture_output=True,
                timeout=timeout,
                input=data,
            )
        except subprocess.TimeoutExpired as error:
            raise LabError(
                f"machine {self.name}: {text!r} took more than {timeout:.0f} s; the end of its "
                f"console:\n{self.console_tail()}"
            ) from error

    def _scp(self, source: str, destination: str) -> None:
        done = subprocess.run(
            ["scp", "-F", str(self.ssh_config), "-q", "-r", "-p", source, destination],
            check=False,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
        )
        if done.returncode:
            raise LabError(f"copying {source} to {destination} failed: {done.stderr.strip()}")

    def put(self, source: Path | str, destination: str) -> None:
        """Copy a file or directory of the host into the guest."""
        self._scp(str(source), f"{self.name}:{destination}")

    def get(self, source: str, destination: Path | str) -> None:
        """Copy a file or directory of the guest to the host."""
        self._scp(f"{self.name}:{source}", str(destination))

    def write_file(self, path: str, text: str | bytes, mode: str = "0644") -> None:
        """Write a file in the guest, with its directories."""
        script = 'mkdir -p "$(dirname "$1")" && cat > "$1" && chmod "$2" "$1"'
        self.run(["sh", "-c", script, "write_file", path, mode], input=text)

    # State, for other processes

    def save(self) -> None:
        """Write the machine's state, whole or not at all."""
        state = {
            "image": self._image_name,
            "image_path": str(self.image.path),
            "memory_mb": self.memory_mb,
            "cpus": self.cpus,
            "detached": self.detached,
            "boot_seconds": self.boot_seconds,
            "skip_idle": self.skip_idle,
            "machine_id": self.machine_id,
            "sockets": str(self._sockets()),
            "forwards": self.forwards,
            "process": asdict(self.process) if self.process else None,
            "last_boot_seconds": self.last_boot_seconds,
            "disks": [disk.to_dict() for disk in self.disks.values()],
        }
        temporary = self.directory / "state.json.new"
        temporary.write_text(json.dumps(state, indent=1), "utf-8")
        temporary.rename(self.directory / "state.json")

    @classmethod
    def load(cls, name: str) -> Machine:
        """Return the machine that another process started under ``name``; it is not ours to end.

        Raises:
            LabError: there is none of this name.
        """
        directory = machine_dir(name)
        try:
            state = json.loads((directory / "state.json").read_text("utf-8"))
        except OSError as error:
            raise LabError(f"no machine called {name!r}: boot it first") from error
        machine = cls(
            image=state["image"],
            memory_mb=state["memory_mb"],
            cpus=state["cpus"],
            forwards={int(guest): host for guest, host in state["forwards"].items()},
            name=name,
            detached=state["detached"],
            boot_seconds=state["boot_seconds"],
            skip_idle=state.get("skip_idle", False),
        )
        machine._image = Image(state["image"], Path(state["image_path"]))
        machine.machine_id = state["machine_id"]
        machine.sockets = Path(state["sockets"])
        machine.last_boot_seconds = state["last_boot_seconds"]
        if state["process"]:
            machine.process = Process(**state["process"])
        for data in state["disks"]:
            machine.disks[data["spec"]["name"]] = GuestDisk.from_dict(machine, data)
        return machine


def shell_text(command: Sequence[str] | str) -> str:
    """Return ``command`` as a text for the guest's shell: a text as it is, arguments quoted."""
    return command if isinstance(command, str) else shlex.join(command)


_open_machines: weakref.WeakSet[Machine] = weakref.WeakSet()


@atexit.register
def close_all() -> None:
    """End every machine of this process that is not detached."""
    for machine in list(_open_machines):
        with contextlib.suppress(Exception):
            machine.close()


def machine_names() -> list[str]:
    """Return the names of all machines that have a state."""
    return sorted(path.parent.name for path in machines_dir().glob("*/state.json"))


def prune() -> None:
    """Remove machines whose owner has died without removing them; detached ones stay."""
    for name in machine_names():
        lock = machine_dir(name) / "owner.lock"
        # No lock: a detached machine, or one that its owner is removing at this moment.
        with contextlib.suppress(OSError, LabError), open(lock, "r+", encoding="ascii") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            Machine.load(name).close()
