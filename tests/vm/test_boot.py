# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Targets come back by themselves when a guest boots, and their disks are left alone meanwhile.

The guest's fstab mounts by UUID. What is on the main in place of a remapped chunk is old, so a main
that was mounted by mistake shows itself by its content, too.
"""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.lab import Disk, Machine
from tests.lab.image import INITRAMFS_KEPT
from tests.vm.deployment import deploy
from tests.vm.playing import ModuleRunner, Step

UUID = "3c5e4f70-8f0e-4cf5-9ec7-2f0d0b6c3a41"
PLACE = "/srv/data"
BUSES = ("virtio", "scsi", "nvme", "ide")
SIZES = {"main": "64M", "spare0": "64M", "spare1": "96M", "bystander": "64M"}
FSTAB_ROOT = "LABEL=lab-root / ext4 rw,noatime 0 0\n"
FSTAB = FSTAB_ROOT + f"UUID={UUID} {PLACE} ext4 nofail,x-systemd.device-timeout=600 0 0\n"
BYSTANDER = "7d1f1c1e-13f4-4a39-8f8e-0d2b8c0a5b11"
# More than an emulated guest needs to see all of its disks.
PATIENT = "assemble: {timeout: 300}\ntargets: []\n"
SHORT = "assemble: {degraded: %s, timeout: 5}\ntargets: []\n"

# Waits until a command succeeds; what the service says of this boot, if it never does.
WAIT_FOR = """
end=$(($(date +%s) + 500))
until sh -c "$1" sh "$2"; do
    if [ "$(date +%s)" -gt "$end" ]; then journalctl -b -o cat -u dm-remap-assemble >&2; exit 1; fi
    sleep 0.5
done
"""
IS_MOUNTED = 'findmnt "$1" >/dev/null'
IS_LOGGED = 'journalctl -b -o cat -u dm-remap-assemble | grep -qF -- "$1"'
IS_SHOWN = "! udevadm info --query=property --name=\"$1\" | grep -q '^DM_REMAP_ROLE='"


@dataclass
class Host:
    """A guest with a target, its disks on other buses in another order at each boot.

    Args:
        machine: the guest.
        images: the disks' images.
        buses: how each disk is attached now.
        marks: what was written to the file system, by file.
    """

    machine: Machine
    images: Mapping[str, Path]
    buses: dict[str, str]
    marks: dict[str, str] = field(default_factory=dict)

    def disk(self, name: str) -> Disk:
        # One serial number on all buses, as a disk has it.
        return Disk(
            name, size=SIZES[name], interface=self.buses[name], image=str(self.images[name])
        )

    def path(self, name: str) -> str:
        return self.disk(name).path

    def node(self, name: str) -> str:
        return self.sh(f"readlink -f {shlex.quote(self.path(name))}")

    def sh(self, script: str, *arguments: str, check: bool = True) -> str:
        command = ["sh", "-c", script, "sh", *arguments]
        return self.machine.run(command, check=check, timeout=900).stdout.strip()

    def boot(self, order: list[str], buses: Mapping[str, str]) -> None:
        """Boot with these disks, in this order on these buses."""
        if self.machine.running:
            self.machine.shutdown(timeout=600)
        self.buses.update(buses)
        self.machine.change_disks(self.disk(name) for name in order)
        self.machine.start()

    def configure(self, text: str) -> None:
        self.machine.write_file("/etc/dm-remap/config.yaml", text)

    def wait_for_mount(self) -> None:
        self.sh(WAIT_FOR, IS_MOUNTED, PLACE)

    def wait_for_log(self, text: str) -> None:
        self.sh(WAIT_FOR, IS_LOGGED, text)

    def properties(self, name: str) -> dict[str, str]:
        text = self.sh(f"udevadm info --query=property --name={shlex.quote(self.path(name))}")
        return dict(line.split("=", 1) for line in text.splitlines())

    def check_mounted(self) -> None:
        """The target is mounted, with all that was ever written, and the main is not."""
        assert self.sh(f"findmnt -n -o SOURCE {PLACE}") == "/dev/mapper/data"
        link = self.sh(f"readlink -f /dev/disk/by-uuid/{UUID}")
        assert link == self.sh("readlink -f /dev/mapper/data")
        for mark, text in self.marks.items():
            assert self.sh(f"cat {PLACE}/{mark}") == text
        self.check_hidden("main", *(name for name in self.machine.disks if "spare" in name))

    def mark(self, name: str) -> None:
        """Write something that must be there from now on."""
        self.marks[name] = f"{name} was here"
        self.sh(f'echo "$1" > {PLACE}/{name} && sync', self.marks[name])

    def check_hidden(self, *names: str) -> None:
        for name in names:
            kind = "main" if name == "main" else "spare"
            shown = self.properties(name)
            assert shown["ID_FS_TYPE"] == f"dm_remap_{kind}", name
            assert (shown["SYSTEMD_READY"], shown["UDISKS_IGNORE"]) == ("0", "1")
            assert "ID_FS_UUID" not in shown
            assert "by-uuid" not in shown["DEVLINKS"]
            assert self.path(name) in shown["DEVLINKS"]
            node = self.node(name)
            assert self.sh(f"findmnt -n --source {node}", check=False) == ""
            listed = json.loads(
                self.sh(f"lsblk --json --nodeps -o NAME,FSTYPE,UUID,MOUNTPOINT {node}")
            )
            (device,) = listed["blockdevices"]
            assert (device["fstype"], device["uuid"]) == (f"dm_remap_{kind}", None)
            assert device["mountpoint"] is None

    def check_not_claimed(self) -> None:
        """Nobody finds a use for the spares."""
        for name in (name for name in self.machine.disks if "spare" in name):
            node = self.node(name)
            assert self.sh(f"blkid -p {node}", check=False) == ""
            assert node not in self.sh("pvs --noheadings -o pv_name 2>/dev/null", check=False)


def shuffled(seed: int) -> tuple[list[str], dict[str, str]]:
    chance = random.Random(seed)
    names = list(SIZES)
    chance.shuffle(names)
    return names, {name: chance.choice(BUSES) for name in names}


@pytest.fixture(scope="module")
def host(lab_image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A guest with the role, and a target with remapped chunks in use."""
    folder = tmp_path_factory.mktemp("disks")
    images = {name: folder / f"{name}.img" for name in SIZES}
    for name, image in images.items():
        with image.open("wb") as file:
            file.truncate(Disk(name, size=SIZES[name]).bytes)
    # A virtio disk has a serial number only, which is the same on all buses.
    buses = dict.fromkeys(SIZES, "virtio")
    disks = [Disk(n, size=SIZES[n], image=str(images[n])) for n in SIZES]
    with Machine(image=lab_image, disks=disks) as machine:
        deploy(machine, tmp_path_factory.mktemp("deploy"))
        host = Host(machine, images, buses)
        make_target(host)
        yield host


def make_target(host: Host) -> None:
    """A target with a file system, whose first chunks and some others are remapped."""
    runner = ModuleRunner(host.machine)
    spares = [host.path("spare0"), host.path("spare1")]
    target: dict[str, Any] = {"name": "data", "main": host.path("main"), "spares": spares}
    target.update(on_error="fail", allocation="balanced")
    done = runner.run(Step("make", "target", target))
    assert not done["make"].get("failed"), done
    host.sh(f"mkfs.ext4 -q -U {UUID} /dev/mapper/data")
    host.sh(f"mkfs.ext4 -q -U {BYSTANDER} {host.path('bystander')}")
    # With the superblock remapped, the main alone has an old one.
    ranges = [{"start": start, "count": 1} for start in (0, 128, 4096, 40000, 90000)]
    done = runner.run(Step("remap", "sectors", {"name": "data", "ranges": ranges}))
    assert not done["remap"].get("failed"), done
    host.machine.write_file("/etc/fstab", FSTAB)
    host.configure(PATIENT)
    host.sh(f"mkdir -p {PLACE} && systemctl daemon-reload && mount {PLACE}")
    host.mark("first")
    host.check_mounted()
    host.check_not_claimed()


def check_boots(host: Host, seeds: range) -> None:
    host.configure(PATIENT)
    for seed in seeds:
        host.boot(*shuffled(seed))
        host.wait_for_mount()
        host.check_mounted()
        host.check_not_claimed()
        # A disk that has nothing to do with it is as it always was.
        assert host.properties("bystander")["ID_FS_UUID"] == BYSTANDER
        host.mark(f"boot-{seed}")


@pytest.mark.soak
def test_the_target_is_mounted_by_uuid_at_each_of_20_boots(host: Host) -> None:
    check_boots(host, range(20))


@pytest.mark.soak
def test_a_missing_spare_is_waited_for_and_its_hot_plug_mounts(host: Host) -> None:
    host.configure(SHORT % "never")
    order, buses = shuffled(100)
    buses["spare1"] = "virtio"
    host.boot([name for name in order if name != "spare1"], buses)
    host.wait_for_log("data: given up: ")
    host.check_hidden("main", "spare0")
    assert host.sh(f"findmnt {PLACE}", check=False) == ""
    assert host.sh("ls /dev/mapper") == "control"
    assert host.sh(f"ls /dev/disk/by-uuid/{UUID}", check=False) == ""
    host.machine.attach(host.disk("spare1"))
    host.wait_for_mount()
    host.check_mounted()


@pytest.mark.soak
def test_the_main_alone_is_hidden_and_waits_for_its_spares(host: Host) -> None:
    host.configure(PATIENT)
    host.boot(["main", "bystander"], dict.fromkeys(SIZES, "virtio"))
    host.sh("udevadm settle")
    host.check_hidden("main")
    assert host.sh(f"findmnt {PLACE}", check=False) == ""
    for name in ("spare1", "spare0"):
        host.machine.attach(host.disk(name))
    host.wait_for_mount()
    host.check_mounted()


@pytest.mark.soak
def test_degraded_is_allowed_after_the_timeout(host: Host) -> None:
    host.configure(SHORT % "allowed")
    order, buses = shuffled(101)
    host.boot([name for name in order if name != "spare1"], buses)
    host.wait_for_log("data: assembled")
    status = json.loads(host.sh("dm-remap status data --json", check=False))
    assert status["targets"][0]["degraded"]
    host.check_hidden("main", "spare0")


@pytest.mark.soak
def test_a_removed_target_shows_its_main(host: Host) -> None:
    check_boots(host, range(200, 201))
    host.sh(f"umount {PLACE}")
    runner = ModuleRunner(host.machine)
    gone = {"name": "data", "state": "absent", "discard_remaps": True}
    done = runner.run(Step("remove", "target", gone))
    assert not done["remove"].get("failed"), done
    for name in ("main", "spare0", "spare1"):
        host.sh(WAIT_FOR, IS_SHOWN, host.path(name))


@pytest.mark.soak
def test_a_volume_group_on_a_target_is_activated_and_mounted(host: Host) -> None:
    """Runs after the removal, because it makes the target anew."""
    # A virtio disk has a serial number only, which is the same on all buses.
    host.machine.write_file("/etc/fstab", FSTAB_ROOT)
    host.boot(list(SIZES), dict.fromkeys(SIZES, "virtio"))
    runner = ModuleRunner(host.machine)
    host.sh(f"wipefs -q -a {host.path('main')}")
    spares = [host.path("spare0"), host.path("spare1")]
    target: dict[str, Any] = {"name": "data", "main": host.path("main"), "spares": spares}
    done = runner.run(Step("make", "target", target))
    assert not done["make"].get("failed"), done
    host.sh("pvcreate -q /dev/mapper/data && vgcreate -q group /dev/mapper/data")
    host.sh(f"lvcreate -q -y -L 32M -n volume group && mkfs.ext4 -q -U {UUID} /dev/group/volume")
    host.configure(PATIENT)
    host.marks.clear()
    host.machine.write_file("/etc/fstab", FSTAB)
    host.sh(f"systemctl daemon-reload && mount {PLACE}")
    # Where the group's own label and the volume's superblock are, so that the main's are old.
    ranges = [{"start": start, "count": 1} for start in (0, 2050, 4096)]
    done = runner.run(Step("remap", "sectors", {"name": "data", "ranges": ranges}))
    assert not done["remap"].get("failed"), done
    host.mark("volume")
    for seed in range(300, 302):
        host.boot(*shuffled(seed))
        host.wait_for_mount()
        assert host.sh(f"findmnt -n -o SOURCE {PLACE}") == "/dev/mapper/group-volume"
        assert host.sh(f"cat {PLACE}/volume") == host.marks["volume"]
        host.check_hidden("main", "spare0", "spare1")
        assert host.sh("pvs --noheadings -o pv_name 2>&1").split() == ["/dev/mapper/data"]
        host.sh("lvextend -q -L +4M group/volume")


@pytest.mark.soak
def test_an_initial_ram_disk_activates_no_volume_group_of_a_target(
    host: Host, tmp_path: Path
) -> None:
    """Runs after the volume group was made. Without what the role adds, it stands on the main."""
    host.sh(f"cp -a {INITRAMFS_KEPT}/. /usr/share")
    for name, mode in (("open", "-x"), ("closed", "+x")):
        host.sh(f"chmod {mode} /etc/initramfs-tools/hooks/dm-remap && mkinitramfs -o /root/{name}")
        host.machine.get(f"/root/{name}", tmp_path / name)
    # Nothing is to be written there.
    host.machine.write_file("/etc/fstab", FSTAB_ROOT)
    buses = dict.fromkeys(SIZES, "virtio")
    host.machine.initrd = tmp_path / "open"
    host.boot(list(SIZES), buses)
    below = host.sh("dmsetup deps -o devname group-volume")
    assert f"({host.node('main').removeprefix('/dev/')})" in below
    host.machine.write_file("/etc/fstab", FSTAB)
    host.machine.initrd = tmp_path / "closed"
    host.boot(list(SIZES), buses)
    host.wait_for_mount()
    assert host.sh(f"cat {PLACE}/volume") == host.marks["volume"]
    host.check_hidden("main", "spare0", "spare1")
    assert host.sh("pvs --noheadings -o pv_name 2>&1").split() == ["/dev/mapper/data"]
