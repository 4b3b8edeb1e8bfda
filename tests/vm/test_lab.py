# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""The lab does what the other tests rely on."""

from __future__ import annotations

import errno
import itertools
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet

from tests.lab import CommandFailed, Disk, LabError, Machine
from tests.parameters import short_form

ROOT = Path(__file__).resolve().parents[2]

# What a guest's O_DIRECT request gets for the errno that QEMU's device gets.
GUEST_ERRNO = {
    ("main", "EIO"): errno.EIO,
    ("main", "ENODATA"): errno.EIO,
    ("main4k", "EIO"): errno.EIO,
    ("scsi", "EIO"): errno.EIO,
    ("scsi", "ENODATA"): errno.ENODATA,
    ("nvme", "EIO"): errno.ENODATA,
    ("nvme", "ENODATA"): errno.ENODATA,
    ("ide", "EIO"): errno.EIO,
}

PATTERN = bytes(range(256)) * 16
SECTORS = len(PATTERN) // 512


def failing_sectors() -> Iterator[ParameterSet]:
    """Every disk, error and operation."""
    for (name, injected), op in itertools.product(GUEST_ERRNO, ("read", "write", "both")):
        # Outside of the long runs those that differ most.
        mark = pytest.mark.soak
        if (name, injected) == ("main", "EIO"):
            mark = pytest.mark.core
        elif op == "both":
            mark = pytest.mark.second
        yield pytest.param(name, injected, op, marks=mark)


@pytest.mark.parametrize(("name", "injected", "op"), failing_sectors())
def test_a_failing_sector(lab: Machine, name: str, injected: str, op: str) -> None:
    disk = lab.disk(name)
    expected = GUEST_ERRNO[name, injected]
    disk.write(800, PATTERN)
    disk.fail([(800, SECTORS)], op=op, errno=injected)
    if op in ("read", "both"):
        with pytest.raises(OSError, match=os.strerror(expected)):
            disk.read(800, SECTORS)
    else:
        assert disk.read(800, SECTORS) == PATTERN
    if op in ("write", "both"):
        with pytest.raises(OSError, match=os.strerror(expected)):
            disk.write(800, bytes(len(PATTERN)))
    disk.heal()
    assert disk.read(800, SECTORS) == PATTERN, "a failed write must not change anything"


@pytest.mark.parametrize("name", short_form(["main", "main4k", "scsi", "nvme"], always=["main4k"]))
def test_neighbours_of_a_failing_block_answer(lab: Machine, name: str) -> None:
    disk = lab.disk(name)
    block = disk.spec.block_sectors
    disk.fail([(8000, 1)], op="both")
    disk.read(8000 - block, block)
    disk.read(8000 + block, block)
    with pytest.raises(OSError, match="error|No data"):
        disk.read(8000, block)


def test_healing_a_part(lab: Machine) -> None:
    disk = lab.disk("main")
    disk.fail([(100, 10)], op="read")
    disk.heal([(103, 2)])
    disk.read(103, 2)
    for sector in (102, 105):
        with pytest.raises(OSError, match="Input/output"):
            disk.read(sector, 1)


# How often the guest's kernel tries by itself before it tells the reader of an error.
KERNEL_TRIES = {("main", "EIO"): 1, ("scsi", "EIO"): 6, ("scsi", "ENODATA"): 1, ("nvme", "EIO"): 6}


@pytest.mark.parametrize(
    ("name", "injected"), short_form(KERNEL_TRIES, always=[("scsi", "EIO"), ("nvme", "EIO")])
)
def test_a_weak_sector_answers_after_its_failures(lab: Machine, name: str, injected: str) -> None:
    disk = lab.disk(name)
    tries = KERNEL_TRIES[name, injected]
    disk.fail([(30000, 1)], op="read", errno=injected, times=2 * tries)
    for _unused in range(2):
        with pytest.raises(OSError, match="error|No data"):
            disk.read(30000, 1)
    assert disk.read(30000, 1) == bytes(512)


@pytest.mark.parametrize("name", short_form(["scsi", "nvme", "ide"], always=["ide"]))
def test_the_kernel_hides_what_fails_once(lab: Machine, name: str) -> None:
    disk = lab.disk(name)
    disk.fail([(30000, 1)], op="read", once=True)
    assert disk.read(30000, 1) == bytes(512)


def test_a_whole_disk_and_thousands_of_sectors(lab: Machine) -> None:
    disk = lab.disk("main")
    disk.fail([(sector, 1) for sector in range(1000, 9000, 4)], op="read")
    with pytest.raises(OSError, match="Input/output"):
        disk.read(8996, 1)
    disk.read(8997, 3)
    disk.heal()
    disk.fail()
    with pytest.raises(OSError, match="Input/output"):
        disk.write(130000, bytes(512))


def test_a_failing_flush(lab: Machine) -> None:
    disk = lab.disk("main")
    disk.fail(op="flush", times=100)
    for _unused in range(2):
        disk.write(8, bytes(512))
        with pytest.raises(OSError, match="Input/output"):
            disk.flush()
    disk.heal()
    disk.write(8, bytes(512))
    disk.flush()


@pytest.mark.parametrize(
    "arguments", [{"op": "erase"}, {"errno": "EVERYTHING"}, {"times": 0}, {"op": "flush"}]
)
def test_wrong_faults_are_refused(lab: Machine, arguments: dict[str, object]) -> None:
    with pytest.raises(LabError):
        lab.disk("main").fail([(0, 1)], **arguments)  # type: ignore[arg-type]
    with pytest.raises(LabError, match="beyond"):
        lab.disk("main").fail([(131071, 2)])
    assert lab.disk("main").faults == []


@pytest.mark.core
@pytest.mark.parametrize(
    ("block", "interface"),
    short_form(
        itertools.product([512, 4096], ["virtio", "scsi", "nvme"]),
        always=[(512, "scsi"), (4096, "nvme")],
    ),
)
def test_plugging_in_and_out(lab: Machine, interface: str, block: int) -> None:
    disk = lab.attach(Disk("extra", size="8M", interface=interface, block=block))
    assert int(lab.run(["blockdev", "--getss", disk.path]).stdout) == block
    disk.write(16, PATTERN)
    disk.fail([(16, 8)], op="read")
    with pytest.raises(OSError, match="error|No data"):
        disk.read(16, 8)
    disk.heal()
    assert disk.read(16, 8) == PATTERN
    lab.detach("extra")
    assert lab.run(["udevadm", "wait", "--removed", "--timeout=60", disk.path]).rc == 0
    assert not disk.image.exists()


def test_an_ide_disk_cannot_be_plugged_in(lab: Machine) -> None:
    with pytest.raises(LabError, match="ide"):
        lab.attach(Disk("extra", interface="ide"))


@pytest.mark.core
def test_the_kernel_has_what_the_collection_needs(lab: Machine) -> None:
    for module in ("dm-integrity", "dm-multipath", "dm-raid", "dm-mirror"):
        lab.run(["modprobe", module])
    lab.run(["python3", "-c", "import aiohttp, apt, prometheus_client, pyudev, yaml"])


@pytest.mark.core
def test_reset_leaves_the_guest_clean(lab: Machine) -> None:
    main, spare = lab.disk("main"), lab.disk("spare")
    lab.run(f"dmsetup create below --table '0 131072 linear {main.path} 0'")
    lab.run("dmsetup create above --table '0 131072 linear /dev/mapper/below 0'")
    lab.run("mkfs.ext4 -q /dev/mapper/above && mkdir -p /mnt/a && mount /dev/mapper/above /mnt/a")
    lab.run(f"mkfs.ext4 -q {lab.disk('spare4k').path} && echo x > /mnt/a/file")
    spare.fail([(0, 8)])
    lab.attach(Disk("extra", size="8M"))
    lab.run("dmsetup suspend --noflush --nolockfs above")
    lab.reset(zero=["main", "spare4k"])
    assert spare.faults == []
    assert "extra" not in lab.disks
    assert lab.run("dmsetup ls").stdout.strip() == "No devices found"
    assert lab.run("grep /mnt /proc/mounts", check=False).rc == 1
    assert not any(main.read(0, 4096))
    assert lab.run(["blkid", lab.disk("spare4k").path], check=False).stdout == ""


def test_commands_are_quoted_and_their_failures_told(lab: Machine) -> None:
    assert lab.run(["printf", "%s|", "a b", "$HOME", "'"]).stdout == "a b|$HOME|'|"
    assert lab.run(["cat"], input="line\n").stdout == "line\n"
    with pytest.raises(CommandFailed, match="exit code 7: why"):
        lab.run("echo why >&2; exit 7")
    assert lab.run("exit 7", check=False).rc == 7


def test_files_go_in_and_out(lab: Machine, tmp_path: Path) -> None:
    lab.write_file("/tmp/deep/er/file", "text", mode="0600")
    assert lab.run("stat -c %a /tmp/deep/er/file").stdout == "600\n"
    lab.get("/tmp/deep", tmp_path / "copy")
    assert (tmp_path / "copy/er/file").read_text() == "text"
    lab.put(tmp_path / "copy", "/tmp/again")
    assert lab.run("cat /tmp/again/er/file").stdout == "text"


@pytest.fixture(scope="module")
def own(lab_image: str) -> Iterator[Machine]:
    """A machine of this module's own, to be killed and restarted."""
    disks = [
        Disk("kept"),
        Disk("direct", cache="none"),
        Disk("loses", cache="volatile"),
        Disk("keeps", cache="volatile", survive=1.0),
        Disk("named", interface="scsi", wwn=0x5000C500A1B2C3D4),
    ]
    with Machine(image=lab_image, disks=disks, forwards={9741: None}) as machine:
        yield machine


@pytest.mark.core
def test_a_power_cut_keeps_what_was_flushed(own: Machine) -> None:
    for name in ("kept", "direct", "loses", "keeps"):
        own.disk(name).write(8, PATTERN)
        own.disk(name).flush()
        own.disk(name).write(8, PATTERN[::-1])
    own.run("echo mine > /root/file && sync /root/file")
    own.disk("kept").fail([(4096, 1)], op="read")
    ports = dict(own.forwards)
    own.power_cut()
    assert not own.running
    with pytest.raises(LabError, match="does not run"):
        own.run("true")
    own.restart()
    assert own.forwards == ports
    assert own.run("cat /root/file").stdout == "mine\n"
    assert own.disk("loses").read(8, SECTORS) == PATTERN, "unflushed writes must be lost"
    for name in ("kept", "direct", "keeps"):
        assert own.disk(name).read(8, SECTORS) == PATTERN[::-1]
    with pytest.raises(OSError, match="Input/output"):
        own.disk("kept").read(4096, 1)
    own.disk("kept").heal()
    own.disk("kept").read(4096, 1)


@pytest.mark.soak
def test_a_shutdown_loses_nothing(own: Machine) -> None:
    own.disk("loses").write(64, PATTERN)
    own.restart()
    assert own.disk("loses").read(64, SECTORS) == PATTERN


def test_a_wwn_gives_the_disk_its_name(own: Machine) -> None:
    assert own.disk("named").path == "/dev/disk/by-id/wwn-0x5000c500a1b2c3d4"
    own.run(["test", "-b", own.disk("named").path])


def test_ports_are_forwarded_from_this_host_alone(own: Machine) -> None:
    port = own.forwards[9741]
    assert port
    listening = subprocess.run(
        ["ss", "-Hltn", f"sport = :{port}"], capture_output=True, text=True, check=True
    )
    assert f"127.0.0.1:{port}" in listening.stdout
    assert own.run("timeout 5 bash -c '</dev/tcp/10.0.2.2/22'", check=False).rc != 0


OWNER = """
import signal, sys
from tests.lab import Disk, Machine
machine = Machine(sys.argv[1], disks=[Disk("main", cache="volatile")])
machine.start()
print(machine.process.pid, machine.disk("main").server.pid, machine.directory, flush=True)
if sys.argv[2] == "die":
    signal.pause()
"""


@pytest.mark.parametrize("how", short_form(["die", "exit"], always=["die"]))
def test_no_process_outlives_its_owner(lab_image: str, how: str) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, lab_image, how], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    handles = []
    try:
        *pids, directory = owner.stdout.readline().split()
        for pid in pids:
            try:
                handles.append(os.pidfd_open(int(pid)))
            except ProcessLookupError:
                assert how == "exit"
        if how == "die":
            owner.kill()
    finally:
        owner.wait(60)
    for handle in handles:
        assert select.select([handle], [], [], 60)[0], "a process of the lab is still there"
        os.close(handle)
    if how == "exit":
        assert not Path(directory).exists()


def lab_command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.lab", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


@pytest.mark.soak
def test_the_command_line(lab_image: str) -> None:
    name = f"cli-{os.getpid()}"
    named = ("--name", name)
    try:
        booted = lab_command(
            "boot", *named, "--image", lab_image, "--disk", "main:8M:virtio:block=4096", "--json"
        )
        assert booted.returncode == 0, booted.stderr
        facts = json.loads(booted.stdout)
        path = facts["disks"]["main"]["path"]
        read = ["run", *named, "--", "dd", f"if={path}", "of=/dev/null", "bs=4096", "count=1"]
        read += ["iflag=direct", "status=none"]
        assert lab_command(*read).returncode == 0
        assert lab_command("fail", *named, "--disk", "main", "--sectors", "0-7").returncode == 0
        assert "main 0+8 both EIO" in lab_command("faults", *named).stdout
        assert "Input/output error" in lab_command(*read).stderr
        assert lab_command("power-cut", *named).returncode == 0
        assert f"{name}  off" in lab_command("list").stdout
        assert lab_command("restart", *named).returncode == 0
        assert "Input/output error" in lab_command(*read).stderr
        assert lab_command("heal", *named, "--disk", "main").returncode == 0
        assert lab_command(*read).returncode == 0
        refused = lab_command("boot", *named, "--image", lab_image)
        assert refused.returncode == 1
        assert "kill it or choose another name" in refused.stderr
    finally:
        killed = lab_command("kill", *named)
    assert killed.returncode == 0
    assert name not in lab_command("list").stdout
    assert not Path(facts["directory"]).exists()
    assert not Path(f"/proc/{facts['pid']}").exists()
