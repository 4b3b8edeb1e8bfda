# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Builds guest images from Debian's packages and caches them by what they are made of."""

from __future__ import annotations

import hashlib
import io
import os
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .paths import LabError, cache_dir, locked, ssh_key

SUITES = {"debian-12": "bookworm", "debian-13": "trixie"}
ROOT_LABEL = "lab-root"
ROOT_SIZE = "3G"

PACKAGES = (
    "linux-image-amd64 systemd-sysv udev kmod util-linux iproute2 procps less sudo ca-certificates "
    "openssh-server openssl python3 python3-apt python3-pyudev python3-aiohttp "
    "python3-prometheus-client python3-yaml dmsetup libdevmapper1.02.1 lvm2 mdadm e2fsprogs "
    "xfsprogs fio nvme-cli smartmontools postgresql"
).split()

# Units that cost boot time, or that touch the disks behind a test's back.
MASKED_UNITS = (
    "apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer "
    "xfs_scrub_all.timer e2scrub_reap.service fstrim.timer systemd-tmpfiles-clean.timer "
    "getty@tty1.service "
    "smartmontools.service mdmonitor.service mdmonitor-oneshot.timer mdcheck_start.timer "
    "mdcheck_continue.timer lvm2-monitor.service blk-availability.service "
    "nvmf-autoconnect.service nvmefc-boot-connections.service "
    "getty-static.service systemd-pstore.service systemd-binfmt.service "
    "systemd-update-utmp.service systemd-update-utmp-runlevel.service "
    "systemd-random-seed.service systemd-timesyncd.service systemd-firstboot.service "
    "ldconfig.service systemd-hwdb-update.service systemd-update-done.service "
    "systemd-journal-catalog-update.service proc-sys-fs-binfmt_misc.automount "
    "postgresql.service "
    "dev-hugepages.mount sys-kernel-config.mount sys-fs-fuse-connections.mount"
).split()

INITRAMFS_HOOK = """\
#!/bin/sh
[ "$1" = prereqs ] && exit 0
. /usr/share/initramfs-tools/hook-functions
force_load virtio_pci
force_load virtio_blk
force_load ext4
copy_exec /sbin/blkid
"""

# Parts of the initial RAM disk that a root on virtio does without, named by their packages.
INITRAMFS_WITHOUT = ("udev", "lvm2", "mdadm", "dmsetup", "thermal", "fsck", "fixrtc")
# Those of them that a test can put back from ``INITRAMFS_KEPT``, to make one as hosts have it.
INITRAMFS_LATER = ("udev", "lvm2", "dmsetup")
INITRAMFS_KEPT = "/usr/share/lab"

KEEP_INITRAMFS_PARTS = f"""\
set -e
mkdir -p "$1{INITRAMFS_KEPT}"
for package in {" ".join(INITRAMFS_LATER)}; do
    dpkg-deb --fsys-tarfile "$1"/var/cache/apt/archives/"$package"_*.deb |
        tar -x -C "$1{INITRAMFS_KEPT}" --strip-components=3 ./usr/share/initramfs-tools
done
"""

SSHD_CONFIG = """\
HostKey /etc/ssh/ssh_host_ed25519_key
UsePAM no
UseDNS no
PermitRootLogin prohibit-password
PasswordAuthentication no
MaxSessions 100
MaxStartups 100
"""

# The addresses of QEMU's user-mode network. Nothing waits for it, and it waits for no DHCP.
NETWORK_UNIT = """\
[Unit]
Description=Address of the lab's network
BindsTo=sys-subsystem-net-devices-eth0.device
After=sys-subsystem-net-devices-eth0.device
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=ip address replace 10.0.2.15/24 dev eth0
ExecStart=ip link set eth0 up
ExecStart=ip route replace default via 10.0.2.2
[Install]
WantedBy=multi-user.target
"""

# Told on the console when SSH and the network are up, by the kernel, because the terminal is hung
# up when somebody is logged in on it. To ask for SSH itself again and again would keep a slow guest
# busy with answering.
READY = "lab: ready for ssh"
READY_UNIT = f"""\
[Unit]
Description=Word to the lab
After=ssh.service lab-network.service
Requires=ssh.service lab-network.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'echo "<2>{READY}" > /dev/kmsg'
[Install]
WantedBy=multi-user.target
"""

# sshd checks its configuration when it starts; once is enough.
SSH_UNIT = """\
[Service]
ExecStartPre=
"""

# Whoever opens a terminal for a login drops what waits to be printed there.
SERIAL_GETTY = """\
[Unit]
After=lab-ready.service
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --noclear --keep-baud 115200 - $TERM
"""


@dataclass(frozen=True)
class Image:
    """A cached guest image; its files are never written after the build."""

    name: str
    path: Path

    @property
    def root(self) -> Path:
        """The root filesystem: raw ext4, labelled ``ROOT_LABEL``."""
        return self.path / "root.raw"

    @property
    def kernel(self) -> Path:
        """The guest's kernel, to boot directly."""
        return self.path / "vmlinuz"

    @property
    def initrd(self) -> Path:
        """The guest's initial RAM disk."""
        return self.path / "initrd.img"

    @property
    def host_key(self) -> str:
        """The guest's public SSH host key, as ``type base64``."""
        return " ".join((self.path / "host_key.pub").read_text("ascii").split()[:2])


def overlay_files(public_key: str) -> dict[str, tuple[int, str]]:
    """Return the files that we add to the guest: path to (mode, text)."""
    return {
        "etc/initramfs-tools/conf.d/lab": (0o644, "MODULES=list\nCOMPRESS=gzip\n"),
        "etc/initramfs-tools/hooks/lab": (0o755, INITRAMFS_HOOK),
        "etc/ssh/sshd_config.d/lab.conf": (0o600, SSHD_CONFIG),
        "etc/systemd/system/lab-network.service": (0o644, NETWORK_UNIT),
        "etc/systemd/system/lab-ready.service": (0o644, READY_UNIT),
        "etc/systemd/system/ssh.service.d/lab.conf": (0o644, SSH_UNIT),
        "etc/systemd/system/serial-getty@ttyS0.service.d/lab.conf": (0o644, SERIAL_GETTY),
        "etc/systemd/journald.conf.d/lab.conf": (0o644, "[Journal]\nStorage=volatile\n"),
        # A test makes its own cluster, on a target.
        "etc/postgresql-common/createcluster.conf": (0o644, "create_main_cluster = false\n"),
        "etc/fstab": (0o644, f"LABEL={ROOT_LABEL} / ext4 rw,noatime 0 0\n"),
        "etc/hostname": (0o644, "lab\n"),
        "etc/hosts": (0o644, "127.0.0.1 localhost lab\n"),
        "root/.ssh/authorized_keys": (0o600, public_key),
    }


def overlay_tar(public_key: str) -> bytes:
    """Return a tar archive of ``overlay_files`` and of the masks, all owned by root."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        folder = tarfile.TarInfo("root/.ssh")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o700
        archive.addfile(folder)
        for path, (mode, text) in overlay_files(public_key).items():
            member = tarfile.TarInfo(path)
            member.mode, member.size = mode, len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
        for unit in MASKED_UNITS:
            member = tarfile.TarInfo(f"etc/systemd/system/{unit}")
            member.type, member.linkname = tarfile.SYMTYPE, "/dev/null"
            archive.addfile(member)
    return buffer.getvalue()


def recipe_hash(name: str, public_key: str) -> str:
    """Return the cache key of an image: a digest of all that goes into it."""
    digest = hashlib.sha256(overlay_tar(public_key))
    for part in [ROOT_LABEL, ROOT_SIZE, *bootstrap_command(SUITES[name], Path("work"))]:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def image_path(name: str) -> Path:
    """Return where the image called ``name`` is, or would be, in the cache."""
    public_key = ssh_key().with_suffix(".pub").read_text("ascii")
    images = cache_dir() / "images"
    images.mkdir(exist_ok=True)
    return images / f"{name}-{recipe_hash(name, public_key)}"


def ensure_image(
    name: str, say: Callable[[str], None] = lambda text: None, force: bool = False
) -> Image:
    """Return the image called ``name`` (a key of ``SUITES``), built first if it is not cached.

    Two builders do not collide: the second waits for the first and finds its image.

    Args:
        name: the image.
        say: is told when a build starts.
        force: build it again, for newer packages; no machine may be using it.

    Raises:
        LabError: there is no such image, or the build fails; with its last output.
    """
    if name not in SUITES:
        raise LabError(f"no image called {name!r}: choose one of {', '.join(sorted(SUITES))}")
    path = image_path(name)
    with locked(path.parent / f"{name}.lock"):
        if force:
            shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            say(f"building {name} in {path}")
            build(name, path, ssh_key().with_suffix(".pub").read_text("ascii"))
    return Image(name, path)


def prune_images(used: Iterable[Path] = ()) -> list[Path]:
    """Remove cached images that are not ``used`` and that ensure_image() would not return.

    Returns what was removed.
    """
    current = {*used, *(image_path(name) for name in SUITES)}
    found = (cache_dir() / "images").glob("[!.]*/")
    old = [path for path in found if path.is_dir() and path not in current]
    for path in old:
        shutil.rmtree(path)
    return old


def build(name: str, path: Path, public_key: str) -> None:
    """Build the image ``name`` and put it at ``path`` in one rename."""
    for tool in ("mmdebstrap", "mke2fs", "tar"):
        if not shutil.which(tool):
            raise LabError(f"{tool} is needed to build a guest image: install its Debian package")
    work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=path.parent))
    try:
        bootstrap(SUITES[name], work, public_key)
        make_filesystem(work)
        work.rename(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def bootstrap(suite: str, work: Path, public_key: str) -> None:
    """Run mmdebstrap: leaves ``root.tar``, ``vmlinuz``, ``initrd.img``, ``host_key.pub``."""
    overlay = work / "overlay.tar"
    overlay.write_bytes(overlay_tar(public_key))
    run_logged(bootstrap_command(suite, work), work)
    overlay.unlink()


def bootstrap_command(suite: str, work: Path) -> list[str]:
    """Return mmdebstrap's command line; ``$DM_REMAP_LAB_MIRROR`` names a mirror to use."""
    quoted = shlex.quote(str(work))
    excluded = [f"/usr/share/{part}/*" for part in ("man", "doc", "locale")]
    excluded += [f"/usr/share/initramfs-tools/*/{part}" for part in INITRAMFS_WITHOUT]
    command = ["mmdebstrap", "--mode=auto", "--variant=minbase", "--components=main"]
    command += [f"--include={','.join(PACKAGES)}", "--aptopt=Acquire::Languages none"]
    command += ["--dpkgopt=force-confold", *(f"--dpkgopt=path-exclude={e}" for e in excluded)]
    command += [
        f"--essential-hook=tar-in {quoted}/overlay.tar /",
        '--customize-hook=chroot "$1" systemctl enable lab-network.service lab-ready.service',
        f"--customize-hook={KEEP_INITRAMFS_PARTS}",
        f"--customize-hook=download /vmlinuz {quoted}/vmlinuz",
        f"--customize-hook=download /initrd.img {quoted}/initrd.img",
        f"--customize-hook=download /etc/ssh/ssh_host_ed25519_key.pub {quoted}/host_key.pub",
        '--customize-hook=: > "$1/etc/machine-id"',
        suite,
        str(work / "root.tar"),
    ]
    mirror = os.environ.get("DM_REMAP_LAB_MIRROR")
    return command + ([mirror] if mirror else [])


def make_filesystem(work: Path) -> None:
    """Turn ``root.tar`` into ``root.raw``; without root, in a user namespace."""
    script = (
        "set -e; mkdir root; tar -xf root.tar -C root --numeric-owner --xattrs; rm root.tar; "
        f"mke2fs -q -t ext4 -L {ROOT_LABEL} -d root root.raw {ROOT_SIZE}; rm -rf root"
    )
    command = ["sh", "-c", script]
    if os.geteuid() != 0:
        command = ["unshare", "--map-root-user", "--map-auto", *command]
    run_logged(command, work)


def run_logged(command: list[str], work: Path) -> None:
    """Run a build command in ``work``; on failure raise LabError with the end of its output."""
    done = subprocess.run(
        command, cwd=work, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-20:])
        raise LabError(f"{command[0]} failed with {done.returncode} in the image build:\n{tail}")
