# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The daemon in a guest, installed by its role: real kernel errors become the right events."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab import Disk, Machine
from tests.parameters import short_form
from tests.vm.conftest import DISKS
from tests.vm.deployment import ensure_deployed

pytestmark = pytest.mark.installs

DM_UUID = "DMREMAP-0123456789abcdef0123456789abcdef"


class Guest:
    """A guest with a running daemon."""

    def __init__(self, lab: Machine) -> None:
        self.lab = lab
        self.seen = 0
        # A name for each test: the daemon remembers what it said of a target.
        self.name = "data0"

    def ask(self, path: str, *options: str) -> tuple[int, str]:
        """Ask the daemon over HTTPS; returns the status and the text."""
        command = ["python3", "/root/client.py", path, *options]
        done = self.lab.run(command, check=False, timeout=180)
        if done.rc:
            said = self.lab.run("journalctl -u dm-remapd -n 60 -o short-monotonic --no-pager")
            raise AssertionError(f"{path}: {done.stderr}\n{said.stdout}")
        answer = json.loads(done.stdout)
        return answer["status"], answer["body"]

    def next_events(self) -> list[dict[str, Any]]:
        """Wait for events after those that were seen."""
        status, text = self.ask(f"/v1/events?after={self.seen}&wait=60")
        assert status == 200, text
        answer = json.loads(text)
        self.seen = answer["cursor"]
        assert answer["events"], "no event in 60 seconds"
        return list(answer["events"])

    def next_event(self, kind: str) -> dict[str, Any]:
        """Wait for the next event, which must have this type."""
        events = self.next_events()
        assert [event["type"] for event in events] == [kind]
        return events[0]

    def health(self) -> dict[str, Any]:
        """Return what the daemon says of itself."""
        return dict(json.loads(self.ask("/v1/health")[1]))

    def quiet_health(self) -> dict[str, Any]:
        """Wait until the daemon is well and has nothing to do; what it says of itself then."""
        # It looks again after a while where a target went away under its eyes.
        for _turn in range(100):
            health = self.health()
            if (health["status"], health["waiting"]) == ("ok", 0):
                return health
        raise AssertionError(health)

    def start(self) -> None:
        """Start the daemon."""
        self.lab.run(["systemctl", "start", "dm-remapd"], timeout=180)

    def next_test(self) -> None:
        """Clean the guest for the next test; the daemon goes on."""
        self.lab.reset(zero=[disk.name for disk in DISKS], stop=())
        self.name = f"data{int(self.name[4:]) + 1}"
        self.seen = self.quiet_health()["newest"]

    @property
    def path(self) -> str:
        """The target of this test."""
        return f"/dev/mapper/{self.name}"

    def target(self, path: str) -> None:
        """Make a target on a device, without spares: the daemon looks at the table only."""
        size = self.lab.run(["blockdev", "--getsz", path]).stdout.strip()
        table = f"0 {size} linear {path} 0"
        self.lab.run(["dmsetup", "create", self.name, "--uuid", DM_UUID, "--table", table])
        # Let udev's own reads of it come to an end before any of them can fail.
        self.lab.run(["udevadm", "settle"])

    def access(self, sector: int, count: int, action: str = "read", times: str = "1") -> str:
        """Read or write sectors of the target past the cache; returns `ok` or the error's name."""
        command = ["python3", "/root/access.py", self.path, str(sector), str(count)]
        return self.lab.run([*command, action, times], timeout=300).stdout.strip()

    def kernel_name(self, path: str) -> str:
        """Return the kernel's name of a device."""
        return os.path.basename(self.lab.run(["readlink", "-f", path]).stdout.strip())


@pytest.fixture(scope="module")
def installed(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A guest with a running daemon, for all tests: a start takes it seconds."""
    ensure_deployed(machine, tmp_path_factory.mktemp("deploy"))
    yield Guest(machine)
    machine.reset(zero=[disk.name for disk in DISKS])


@pytest.fixture
def guest(installed: Guest) -> Guest:
    """The guest, clean, with a daemon that has nothing left to do."""
    installed.next_test()
    return installed


@pytest.mark.parametrize(
    "name", short_form(["main", "main4k", "scsi", "nvme", "ide"], always=["main", "nvme"])
)
def test_a_failed_read_names_the_bad_sectors(guest: Guest, name: str) -> None:
    disk = guest.lab.disk(name)
    guest.target(disk.path)
    disk.fail([(5000, 8)], op="read")
    assert guest.access(4992, 64) != "ok"
    event = guest.next_event("sector_error")
    assert event["sectors"] == [[5000, 8]]
    assert (event["target"], event["operation"]) == (guest.name, "read")
    assert event["device"] == guest.kernel_name(disk.path)
    assert event["errno"] in (5, 61, 121)


@pytest.mark.parametrize("name", short_form(["main", "scsi", "nvme"], always=["main"]))
def test_a_failed_write_names_its_whole_range(guest: Guest, name: str) -> None:
    disk = guest.lab.disk(name)
    guest.target(disk.path)
    disk.fail([(5000, 8)], op="write")
    assert guest.access(4992, 64, "write") != "ok"
    event = guest.next_event("sector_error")
    assert event["operation"] == "write"
    ((start, count),) = event["sectors"]
    # A driver that knows which part of the request was written reports the rest only.
    assert 4992 <= start <= 5000
    assert start + count == 5056


@pytest.mark.soak
def test_readahead_is_ignored(guest: Guest) -> None:
    disk = guest.lab.disk("main")
    guest.target(disk.path)
    # Far from where udev looks for filesystems, which it does without readahead.
    disk.fail([(20800, 8), (9000, 1)], op="read")
    guest.lab.run(["blockdev", "--setra", "1024", guest.path])
    guest.lab.run(["dmesg", "--clear"])
    # The second read continues the first, so the kernel reads as much again ahead of it.
    read = ["dd", f"if={guest.path}", "of=/dev/null", "bs=64k", "skip=160", "count=2"]
    guest.lab.run(read)
    # The kernel's log shows that a readahead (flag 0x80000, linux/blk_types.h) failed.
    assert "(READ) flags 0x80" in guest.lab.run(["dmesg"]).stdout
    before = guest.health()["errors"]
    assert guest.access(9000, 1) == "EIO"
    event = guest.next_event("sector_error")
    assert event["sectors"] == [[9000, 1]]
    # The read that failed, and the daemon's own.
    assert guest.health()["errors"] - before <= 3


def test_a_weak_sector_is_told_without_sectors(guest: Guest) -> None:
    disk = guest.lab.disk("main")
    guest.target(disk.path)
    disk.fail([(5000, 1)], op="read", times=1)
    assert guest.access(5000, 1) == "EIO"
    event = guest.next_event("transient_error")
    assert (event["sectors"], event["suspect"]) == ([], [[5000, 1]])


@pytest.mark.soak
def test_a_partition_is_counted_from_its_own_start(guest: Guest) -> None:
    disk = guest.lab.disk("main")
    # One entry of a DOS partition table: type Linux, first sector, number of sectors.
    entry = struct.pack("<B3sB3sII", 0, b"", 0x83, b"", 2048, 65536)
    disk.write(0, bytes(446) + entry + bytes(48) + b"\x55\xaa")
    # udev reads partition tables too, and only one may at a time.
    lock = ["udevadm", "lock", f"--device={disk.path}"]
    guest.lab.run([*lock, "blockdev", "--rereadpt", disk.path])
    guest.lab.run(["udevadm", "settle"])
    guest.target(disk.path + "-part1")
    disk.fail([(2048 + 777, 2)], op="read")
    assert guest.access(776, 8) == "EIO"
    event = guest.next_event("sector_error")
    assert event["sectors"] == [[777, 2]]
    assert event["device"] == guest.kernel_name(disk.path + "-part1")


@pytest.mark.soak
def test_a_logical_volume_is_watched_too(guest: Guest) -> None:
    disk = guest.lab.disk("main")
    volume = f"0 65536 linear {disk.path} 4096"
    guest.lab.run(["dmsetup", "create", "volume", "--table", volume])
    guest.target("/dev/mapper/volume")
    disk.fail([(4096 + 777, 2)], op="read")
    assert guest.access(776, 8) == "EIO"
    event = guest.next_event("sector_error")
    assert event["sectors"] == [[777, 2]]
    assert event["device"] == guest.kernel_name("/dev/mapper/volume")


def test_a_failed_flush_is_told(guest: Guest) -> None:
    disk = guest.lab.disk("main")
    guest.target(disk.path)
    disk.fail(op="flush", times=1)
    write = ["dd", "if=/dev/zero", f"of={guest.path}", "bs=4k", "count=1", "conv=fsync"]
    assert guest.lab.run(write, check=False).rc != 0
    event = guest.next_event("device_error")
    assert (event["operation"], event["sectors"]) == ("flush", [])


@pytest.mark.soak
def test_a_thousand_errors_become_one_event(guest: Guest) -> None:
    disk = guest.lab.disk("main")
    guest.target(disk.path)
    disk.fail([(5000, 1)], op="read")
    before = guest.health()
    assert guest.access(5000, 1, "read", "1000") == "EIO"
    event = guest.next_event("sector_error")
    assert event["sectors"] == [[5000, 1]]
    disk.fail([(5000, 1), (6000, 1)], op="read")
    assert guest.access(6000, 1) == "EIO"
    assert guest.next_event("sector_error")["sectors"] == [[6000, 1]]
    health = guest.health()
    # The daemon's own reads fail too: at most two for each of the two bad sectors.
    assert 1001 <= health["errors"] - before["errors"] <= 1005
    assert health["overruns"] == before["overruns"]


def test_what_happens_while_the_daemon_is_away_is_read_later(guest: Guest) -> None:
    disk = guest.lab.disk("main")
    guest.target(disk.path)
    guest.lab.run(["systemctl", "stop", "dm-remapd"])
    disk.fail([(5000, 1)], op="read")
    assert guest.access(5000, 1) == "EIO"
    guest.start()
    events = guest.next_events()
    if len(events) == 1:
        events += guest.next_events()
    assert [event["type"] for event in events] == ["started", "sector_error"]
    assert events[1]["sectors"] == [[5000, 1]]


def test_a_killed_daemon_comes_back_and_keeps_its_journal(guest: Guest) -> None:
    disk = guest.lab.disk("main")
    guest.target(disk.path)
    disk.fail([(5000, 1), (6000, 1)], op="read")
    assert guest.access(5000, 1) == "EIO"
    first = guest.next_event("sector_error")
    guest.lab.run(["systemctl", "kill", "--signal=KILL", "dm-remapd"])
    assert guest.access(6000, 1) == "EIO"
    guest.start()
    events = guest.next_events()
    if len(events) == 1:
        events += guest.next_events()
    assert [event["type"] for event in events] == ["started", "sector_error"]
    assert events[1]["sectors"] == [[6000, 1]]
    assert events[1]["sequence"] > first["sequence"]


@pytest.mark.parametrize("interface", short_form(["virtio", "scsi", "nvme"], always=["scsi"]))
def test_a_disk_that_was_pulled_has_no_bad_sectors(guest: Guest, interface: str) -> None:
    disk = guest.lab.attach(Disk("pulled", size="8M", interface=interface))
    guest.target(disk.path)
    guest.lab.detach("pulled")
    assert guest.access(1000, 8) != "ok"
    events = guest.lab.run(
        ["python3", "/root/client.py", f"/v1/events?after={guest.seen}&wait=10"], timeout=180
    )
    body = json.loads(json.loads(events.stdout)["body"])
    assert {event["type"] for event in body["events"]} <= {"device_lost", "device_error"}
    assert all(event["sectors"] == [] for event in body["events"])


def test_nobody_reads_without_the_token(guest: Guest) -> None:
    assert guest.ask("/v1/events", "anonymous")[0] == 401
    assert guest.ask("/metrics")[0] == 200


def test_the_service_is_confined(guest: Guest) -> None:
    properties = guest.lab.run(
        "systemctl show dm-remapd -p CapabilityBoundingSet,ProtectSystem,NoNewPrivileges"
    ).stdout.splitlines()
    assert sorted(properties) == [
        "CapabilityBoundingSet=cap_sys_admin",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
    ]
    pid = guest.lab.run("systemctl show dm-remapd -p MainPID --value").stdout.strip()
    inside = ["nsenter", "--mount", "--target", pid, "touch", "/etc/dm-remap/token"]
    assert guest.lab.run(inside, check=False).rc != 0
