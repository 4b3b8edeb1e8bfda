# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The healer in a guest, installed by its role: what an application sees of real disk errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab import Disk, Machine
from tests.vm.conftest import DISKS
from tests.vm.deployment import ensure_deployed
from tests.vm.test_daemon import Guest as DaemonGuest

pytestmark = pytest.mark.installs

# Makes a target that holds its errors, as the module `target` does.
CREATE = """
import sys
sys.path.insert(0, "/usr/lib/dm-remap")
from dm_remap.engine import Engine
from dm_remap.planner import plan_present
from dm_remap.request import Request
name, main, shim, *spares = sys.argv[1:]
engine = Engine()
engine.check_host()
with engine.locked_host(), engine.locked(name):
    seen = engine.see(name, main, spares)
    request = Request(name, main, tuple(spares), on_error="hold", shim=shim)
    engine.apply(plan_present(request, seen))
"""

# Remaps the sectors, with what is in the spares' journals written to the disks.
REMAP = """
import subprocess, sys
sys.path.insert(0, "/usr/lib/dm-remap")
from dm_remap.engine import Engine
engine = Engine(guard=True)
with engine.locked(sys.argv[1]):
    engine.remap(sys.argv[1], [(int(sector), 1) for sector in sys.argv[2:]])
for verb in "suspend", "resume":
    subprocess.run(["dmsetup", "--noudevsync", verb, sys.argv[1] + "-spare0"], check=True)
"""

# Gives up a lost spare and what was on it, as the module `spare` does.
GIVE_UP = """
import sys
sys.path.insert(0, "/usr/lib/dm-remap")
from dm_remap.engine import Engine
from dm_remap.plan_spares import SpareRequest, plan_spare_absent
engine = Engine(guard=True)
with engine.locked_host(), engine.locked(sys.argv[1]):
    (lost,) = engine.require(sys.argv[1]).lost_spares
    uuid = engine.require(sys.argv[1]).metadata.config["spares"][lost.index]["uuid"]
    seen = engine.see_spare(sys.argv[1], uuid, None, False)
    request = SpareRequest(sys.argv[1], uuid, discard_remaps=True)
    print(len(engine.apply(plan_spare_absent(request, seen))))
"""

# An application: carries out operations, and prints `ok`, `wrong` or the error's name for each.
APPLICATION = """
import errno, json, mmap, os, sys

def content(sector, count, version):
    numbers = range(sector, sector + count)
    return b"".join((2 * n + version).to_bytes(8, "little") * 64 for n in numbers)

def act(do, sector, count, version):
    flags = os.O_DIRECT if do.startswith("direct") else 0
    # Such a write is sent to the disk as one that must not stay in its cache.
    flags |= os.O_DSYNC if "durable" in do else 0
    handle = os.open(sys.argv[1], os.O_RDWR | flags)
    try:
        if do == "flush":
            os.fsync(handle)
            return "ok"
        memory = mmap.mmap(-1, count * 512)
        wanted = content(sector, count, version)
        if do.endswith("write"):
            memory.write(wanted)
            done = os.pwritev(handle, [memory], sector * 512)
            os.fsync(handle)
            return "ok" if done == len(wanted) else "short"
        os.posix_fadvise(handle, sector * 512, count * 512, os.POSIX_FADV_DONTNEED)
        done = os.preadv(handle, [memory], sector * 512)
        return "ok" if memory[:] == wanted and done == len(wanted) else "wrong"
    except OSError as error:
        return errno.errorcode[error.errno]
    finally:
        os.close(handle)

print(json.dumps([act(*operation) for operation in json.load(sys.stdin)]))
"""

# Kills the healer up to five times, each time when a chunk is frozen, until the application ends.
KILLER = """
python3 /root/application.py "$1" > /root/result &
kills=0
while kill -0 $! 2>/dev/null; do
    if [ $kills -lt 5 ] && dmsetup table "$2-frozen" 2>/dev/null | grep -q delay; then
        systemctl kill --signal=KILL dm-remap-healer && kills=$((kills + 1))
    fi
done
echo $kills
"""

TIMEOUT = "/sys/module/dm_multipath/parameters/queue_if_no_path_timeout_secs"
FILLED = 8192


class Guest(DaemonGuest):
    """A guest with a running daemon and healer."""

    before: dict[str, Any]

    def next_test(self) -> None:
        """Clean the guest for the next test."""
        self.lab.reset(zero=[disk.name for disk in DISKS], stop=("dm-remap-healer.service",))
        self.lab.run(["systemctl", "start", "dm-remap-healer"], timeout=180)
        self.name = f"data{int(self.name[4:]) + 1}"
        self.before = self.health()
        self.seen = self.before["newest"]

    def counted(self, what: str) -> int:
        """What the daemon has counted since the test's beginning."""
        return int(self.health()[what]) - int(self.before[what])

    def create(self, main: str, shim: str = "none", spares: tuple[str, ...] = ()) -> None:
        """Make this test's target and fill its beginning."""
        spares = spares or ("spare4k" if main == "main4k" else "spare",)
        first, *others = [self.lab.disk(name).path for name in (main, *spares)]
        self.script("create", first, shim, *others)
        pieces = range(0, FILLED, 2048)
        assert set(self.act(*[("direct write", at, 2048, 0) for at in pieces])) == {"ok"}

    def act(self, *operations: tuple[str, int, int, int]) -> list[str]:
        """Carry out operations (what, sector, sectors, version of the content) one by one."""
        done = self.lab.run(
            ["python3", "/root/application.py", self.path],
            input=json.dumps(operations),
            timeout=300,
        )
        return list(json.loads(done.stdout))

    def script(self, name: str, *words: str) -> str:
        """Run one of the programs above for this test's target; what it prints."""
        command = ["python3", f"/root/{name}.py", self.name, *words]
        return self.lab.run(command, timeout=300).stdout

    def do(self, what: str, sector: int, count: int, version: int = 0) -> str:
        """Carry out one operation."""
        return self.act((what, sector, count, version))[0]

    def event(self, kind: str) -> dict[str, Any]:
        """Wait for an event of this test's target."""
        while True:
            for event in self.next_events():
                if (event["target"], event["type"]) == (self.name, kind):
                    return event

    def lost(self, ranges: int) -> list[list[int]]:
        """Wait until so many ranges of this test's target are told to be lost; which."""
        found: list[list[int]] = []
        while len(found) < ranges:
            for event in self.next_events():
                if (event["target"], event["type"]) == (self.name, "sectors_lost"):
                    found += event["sectors"]
        return sorted(found)

    def kinds_since(self, cursor: int) -> set[str]:
        """The types of this test's target's events after a cursor."""
        status, text = self.ask(f"/v1/events?after={cursor}")
        assert status == 200, text
        events = json.loads(text)["events"]
        return {event["type"] for event in events if event["target"] == self.name}

    def scan(self, sector: int, count: int, version: int = 0) -> dict[int, str]:
        """Read blocks of 8 sectors; what is not right, by sector."""
        return self.scan_all((sector, count, version))

    def scan_all(self, *ranges: tuple[int, int, int]) -> dict[int, str]:
        """Like scan for ranges (sector, sectors, version), by one start of the application."""
        reads = [
            ("direct read", at, 8, version)
            for sector, count, version in ranges
            for at in range(sector, sector + count, 8)
        ]
        results = self.act(*reads)
        return {read[1]: result for read, result in zip(reads, results) if result != "ok"}

    def unit(self, name: str) -> str:
        """A property of the healer's unit."""
        command = ["systemctl", "show", "dm-remap-healer", "-p", name, "--value"]
        return self.lab.run(command).stdout.strip()


@pytest.fixture(scope="module")
def installed(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A guest with the role's services, for all tests."""
    ensure_deployed(machine, tmp_path_factory.mktemp("deploy"))
    machine.write_file("/root/create.py", CREATE)
    machine.write_file("/root/remap.py", REMAP)
    machine.write_file("/root/give_up.py", GIVE_UP)
    machine.write_file("/root/application.py", APPLICATION)
    machine.write_file("/root/killer.sh", KILLER)
    yield Guest(machine)
    machine.reset(zero=[disk.name for disk in DISKS])


@pytest.fixture
def guest(installed: Guest) -> Guest:
    """The guest, clean."""
    installed.next_test()
    return installed


# A medium error without a shim passes the multipath (docs/lab.md says which disk gives which).
@pytest.mark.parametrize(
    ("name", "code", "shim", "held"),
    [
        ("main", "EIO", "none", True),
        pytest.param("main4k", "EIO", "none", True, marks=pytest.mark.soak),
        pytest.param("scsi", "EIO", "none", True, marks=pytest.mark.soak),
        pytest.param("ide", "EIO", "none", True, marks=pytest.mark.soak),
        ("scsi", "ENODATA", "none", False),
        pytest.param("nvme", "EIO", "none", False, marks=pytest.mark.soak),
        pytest.param("scsi", "ENODATA", "raid", True, marks=pytest.mark.soak),
        pytest.param("nvme", "EIO", "raid", True, marks=pytest.mark.soak),
    ],
)
def test_an_application_sees_lost_sectors_only(
    guest: Guest, name: str, code: str, shim: str, held: bool
) -> None:
    disk = guest.lab.disk(name)
    begun = guest.seen
    guest.create(name, shim)
    disk.fail([(1288, 8), (5128, 8)], op="read", errno=code)
    disk.fail([(2568, 8), (3848, 8), (6408, 8)], op="write", errno=code)
    operations = [
        ("direct read", 1280, 64, 0),
        ("read", 5120, 8, 0),
        ("direct write", 2560, 64, 1),
        ("write", 3840, 64, 1),
        ("direct durable write", 6400, 64, 1),
    ]
    first = dict(zip((what for what, *_rest in operations), guest.act(*operations)))
    if held:
        assert first == {
            "direct read": "EILSEQ",
            "read": first["read"],
            "direct write": "ok",
            "write": "ok",
            "direct durable write": "ok",
        }
    else:
        assert {first["direct read"], first["direct write"]} == {"ENODATA"}
        # The application's second try comes after the healing, however long that takes.
        while set(guest.act(*operations[2:])) != {"ok"}:
            pass
    assert guest.do("read", 5128, 8) in ("EIO", "EILSEQ")
    assert guest.lost(2) == [[1288, 8], [5128, 8]]
    untouched = [(0, 1280, 0), (4096, 1024, 0)]
    written = [(sector, 64, 1) for sector in (2560, 3840, 6400)]
    wrong = guest.scan_all((1280, 128, 0), (5120, 128, 0), *written, *untouched)
    assert wrong == {1288: "EILSEQ", 5128: "EILSEQ"}
    assert guest.act(("direct write", 1288, 8, 1), ("direct read", 1288, 8, 1)) == ["ok", "ok"]
    assert "flush_failed" not in guest.kinds_since(begun)
    assert (guest.counted("lost_sectors"), guest.counted("failed")) == (16, 0)
    assert "healer" not in guest.health()["troubles"]


@pytest.mark.soak
def test_a_weak_sector_is_saved_before_the_application_knows(guest: Guest) -> None:
    disk = guest.lab.disk("main")
    guest.create("main")
    disk.fail([(1288, 1)], op="read", times=3)
    assert guest.do("direct read", 1280, 64) == "ok"
    assert guest.event("remapped")["suspect"] == [[1280, 128]]


@pytest.mark.soak
@pytest.mark.parametrize("shim", ["none", "raid"])
def test_a_flush_that_fails_reaches_the_application(guest: Guest, shim: str) -> None:
    guest.create("main", shim)
    guest.lab.disk("main").fail(op="flush", times=1)
    assert guest.act(("direct write", 0, 8, 1)) == ["EIO"]
    assert guest.event("flush_failed")["operation"] == "flush"
    assert guest.act(("direct write", 0, 8, 1), ("flush", 0, 0, 0)) == ["ok", "ok"]


@pytest.mark.soak
@pytest.mark.parametrize(("op", "result"), [("read", "ok"), ("flush", "EIO")])
def test_a_task_heals_what_waits_while_no_healer_runs(guest: Guest, op: str, result: str) -> None:
    """A flush that failed meanwhile is in the trace that the healer left, and is not repeated."""
    guest.create("main")
    guest.lab.run(["systemctl", "stop", "dm-remap-healer"])
    sectors = [(1288, 8)] if op == "read" else None
    guest.lab.disk("main").fail(sectors, op=op, times=1)
    operation = ("direct read", 1280, 64, 0) if op == "read" else ("direct write", 0, 8, 1)
    guest.lab.write_file("/root/operations", json.dumps([operation]))
    guest.lab.run(
        ["sh", "-c", "python3 /root/application.py $0 </root/operations >/root/result 2>&1 &"]
        + [guest.path]
    )
    guest.lab.run(
        ["sh", "-c", "until dmsetup status $0-hold | grep -q ' F '; do :; done"] + [guest.name]
    )
    guest.script("remap", "1288")
    guest.lab.run(["sh", "-c", "until grep -q . /root/result; do :; done"])
    assert json.loads(guest.lab.run(["cat", "/root/result"]).stdout) == [result]
    assert guest.do("direct read", 1280, 64) == "ok"


@pytest.mark.soak
def test_a_healer_killed_in_the_middle_goes_on(guest: Guest) -> None:
    disk = guest.lab.disk("main")
    guest.create("main")
    places = range(0, FILLED, 512)
    disk.fail([(at + 8, 8) for at in places], op="write")
    operations = json.dumps([("direct write", at, 64, 1) for at in places])
    kills = guest.lab.run(
        ["sh", "/root/killer.sh", guest.path, guest.name], input=operations, timeout=600
    ).stdout.strip()
    assert int(kills) > 0
    results = json.loads(guest.lab.run(["cat", "/root/result"]).stdout)
    assert set(results) == {"ok"}
    for at in places:
        assert guest.scan(at, 64, 1) == guest.scan(at + 64, 64) == {}
    assert int(guest.unit("NRestarts")) >= int(kills)


@pytest.mark.soak
def test_a_file_system_is_made_and_used_over_bad_sectors(guest: Guest) -> None:
    """mkfs and the mounted file system write zeroes by one operation for a whole range."""
    guest.create("main")
    total = int(guest.lab.run(["blockdev", "--getsz", guest.path]).stdout)
    bad = [(at, 8) for at in range(1024, total, 8192)]
    guest.lab.disk("main").fail(bad, op="write")
    zeroed = guest.lab.run(["blkdiscard", "-z", guest.path], timeout=300, check=False)
    assert zeroed.rc == 0, zeroed.stderr
    made = guest.lab.run(["mkfs.ext4", "-q", "-F", guest.path], timeout=300, check=False)
    assert made.rc == 0, made.stderr
    checked = guest.lab.run(["e2fsck", "-fn", guest.path], timeout=300, check=False)
    assert checked.rc == 0, checked.stdout
    assert guest.counted("failed") == 0


@pytest.mark.soak
def test_a_lost_spare_takes_down_only_what_was_on_it(guest: Guest) -> None:
    lost, others = range(384, 640, 8), [at for at in range(0, FILLED, 8) if not 384 <= at < 640]
    for name in ("pull0", "pull1"):
        guest.lab.attach(Disk(name, size="64M"))
    guest.create("main", spares=("pull0", "pull1"))
    guest.script("remap", "384", "512")
    guest.lab.detach("pull0")
    # Two applications at a time: while one asks for what is lost, the other must not see an error.
    both = " & ".join(
        f"python3 /root/application.py {guest.path} < /root/{n} > /root/{n}.done"
        for n in ("lost", "others")
    )
    asked = {
        "lost": [("direct read", at, 8, 0) for at in lost[::4]]
        + [("direct write", at, 8, 1) for at in lost[::8]],
        "others": [
            (f"direct {verb}", at, 8, 0) for at in others[::4] for verb in ("write", "read")
        ],
    }
    for name, operations in asked.items():
        guest.lab.write_file(f"/root/{name}", json.dumps(operations))
    guest.lab.run(["sh", "-c", f"{both} & wait"], timeout=600)
    seen = {name: json.loads(guest.lab.run(["cat", f"/root/{name}.done"]).stdout) for name in asked}
    assert set(seen["others"]) == {"ok"}
    assert set(seen["lost"]) == {"EIO"}
    told = guest.event("spare_lost")
    assert told["suspect"] == [[384, 256]]
    assert "2 chunks" in told["message"]
    # An error of main is healed as ever, on the other spare.
    guest.lab.disk("main").fail([(1288, 8)], op="write")
    assert guest.do("direct write", 1280, 64, 1) == "ok"
    assert guest.event("remapped")["suspect"] == [[1280, 128]]
    # The healer watches, and does not keep the spare from leaving.
    assert guest.script("give_up") == "2\n"
    assert guest.do("direct read", 384, 8) == "EILSEQ"
    assert guest.act(("direct write", 384, 8, 1), ("direct read", 384, 8, 1)) == ["ok", "ok"]
    assert guest.scan(640, 640) == guest.scan(1280, 64, 1) == {}


@pytest.mark.soak
def test_without_a_healer_io_ends_and_with_it_again_it_is_healed(guest: Guest) -> None:
    disk = guest.lab.disk("main")
    guest.create("main")
    limit = guest.lab.run(["cat", TIMEOUT]).stdout.strip()
    assert limit != "0", "the target's creation set the kernel's limit"
    guest.lab.run(["systemctl", "stop", "dm-remap-healer"])
    guest.lab.run(["sh", "-c", f"echo 3 > {TIMEOUT}"])
    disk.fail([(1288, 8)], op="write")
    assert guest.do("direct write", 1280, 64, 1) == "EIO"
    assert guest.do("direct read", 0, 8) == "EIO", "the kernel has taken the queue away"
    states = guest.lab.run(["ps", "-eo", "stat,comm"]).stdout.splitlines()
    assert not [line for line in states if line.startswith("D") and "python" in line]
    assert "healer" in guest.health()["troubles"]
    guest.lab.run(["systemctl", "start", "dm-remap-healer"], timeout=180)
    while guest.do("direct write", 1280, 64, 1) != "ok":
        pass
    assert guest.scan(0, 1280) == guest.scan(1280, 64, 1) == {}
    assert disk.faults, "the sector is as bad as before"
    guest.lab.run(["sh", "-c", f"echo {limit} > {TIMEOUT}"])


@pytest.mark.soak
def test_the_service_is_confined(guest: Guest) -> None:
    assert guest.unit("CapabilityBoundingSet") == "cap_ipc_lock cap_sys_admin"
    assert guest.unit("PrivateNetwork") == "yes"
    pid = guest.unit("MainPID")
    status = guest.lab.run(["cat", f"/proc/{pid}/status"]).stdout
    locked = next(line for line in status.splitlines() if line.startswith("VmLck"))
    assert int(locked.split()[1]) > 0
    inside = ["nsenter", "--mount", "--target", pid, "touch", "/etc/dm-remap/token"]
    assert guest.lab.run(inside, check=False).rc != 0
