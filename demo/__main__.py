# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run the demo: ``python -m demo``; ends with 0 only if everything was as it should be."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab import Disk, Machine

from .story import Teller

HOST = "demo"
TARGET = "photos"
MOUNT = "/srv/photos"
DAEMON_PORT = 9741
BLOCK = 4096
SECTOR = 512
FILE_BLOCKS = 256
# The block of each file that goes bad; far enough from both ends to show that the rest is well.
BAD_BLOCK = 100
# Reads that fail before a weak sector answers: the application's, the daemon's two, the three that
# the salvage needs at most to find the block, and its first retry.
WEAK_READS = 7
PATIENCE_SECONDS = 300.0
HERE = Path(__file__).resolve().parent


class Failed(Exception):
    """Something in the story is not as it should be."""


@dataclass
class Fault:
    """One bad sector of the story.

    Args:
        title: what kind of fault it is.
        file: name of the file that it hits.
        operation: ``read`` or ``write``.
        times: how often the sector fails; None for ever.
        lost: sectors that are really lost.
    """

    title: str
    file: str
    operation: str
    times: int | None
    lost: int
    sector: int = 0
    content: bytes = b""
    seen: float = 0.0
    healed: float = 0.0
    saved: int = 0
    gone: int = 0


def main() -> int:
    """Tell the story; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--image", default="debian-12", help="the guest: debian-12 or debian-13")
    parser.add_argument("--keep", action="store_true", help="keep the working directory")
    arguments = parser.parse_args()
    teller = Teller()
    work = Path(tempfile.mkdtemp(prefix="dm-remap-demo-"))
    try:
        tell(teller, work, arguments.image)
    except (Failed, subprocess.CalledProcessError, OSError) as error:
        teller.bad(f"the demo failed: {error}")
        teller.show([f"logs are in {work}"])
        return 1
    if not arguments.keep:
        shutil.rmtree(work)
    return 0


def tell(teller: Teller, work: Path, image: str) -> None:
    """The whole story, in scenes."""
    teller.scene("1. A machine with one disk to protect and two spares")
    machine = Machine(
        image=image,
        disks=[Disk("main", size="256M"), Disk("spare1", size="64M"), Disk("spare2", size="64M")],
        forwards={DAEMON_PORT: None},
    )
    with teller.working(f"find or build the {image} guest image"):
        _unused = machine.image
    try:
        with teller.working("boot the virtual machine"):
            machine.start()
        stage = Stage(teller, work, machine)
        stage.deploy()
        faults = stage.write_files()
        before = stage.info()
        with stage.rulebook():
            for number, fault in enumerate(faults, 3):
                stage.heal(number, fault)
        stage.conclude(len(faults) + 3, before, faults)
    finally:
        machine.close()


class Stage:
    """The machine, the controller's files, and what happens between them."""

    def __init__(self, teller: Teller, work: Path, machine: Machine) -> None:
        self._teller = teller
        self._work = work
        self._machine = machine
        self._inventory = work / "inventory"
        self._inventory.mkdir()
        port = machine.forwards[DAEMON_PORT]
        self._url = f"https://127.0.0.1:{port}"
        variables = {
            **machine.inventory(),
            "host_daemon_url": self._url,
            "host_daemon_names": [HOST, "127.0.0.1"],
            "host_controller_directory": str(work / "hosts"),
            "demo_target": TARGET,
            "demo_mount": MOUNT,
            "demo_main": machine.disk("main").path,
            "demo_spares": [machine.disk(name).path for name in ("spare1", "spare2")],
        }
        inventory = {"all": {"hosts": {HOST: variables}}}
        (self._inventory / "hosts.json").write_text(json.dumps(inventory, indent=2))
        self._rulebook_log = work / "rulebook.log"

    def deploy(self) -> None:
        """Install the daemon and make the target, with the collection's role and module."""
        with self._teller.working(
            "ansible-playbook: install the daemon, make the target, mount it"
        ):
            self._ansible("deploy.log", "ansible-playbook", str(HERE / "deploy.yml"))
        self._teller.good(f"/dev/mapper/{TARGET} is mounted on {MOUNT}")

    def write_files(self) -> list[Fault]:
        """Write the files of the story and find out where they are on the disk."""
        faults = [
            Fault(
                "a weak sector, which answers after many tries", "weak.raw", "read", WEAK_READS, 0
            ),
            Fault("a sector that cannot be written any more", "worn.raw", "write", None, 0),
            Fault("a dead sector, which nothing can read", "dead.raw", "read", None, 1),
        ]
        for fault in faults:
            fault.content = os.urandom(FILE_BLOCKS * BLOCK)
            self._machine.write_file(f"{MOUNT}/{fault.file}", fault.content)
        self._guest("sync; echo 3 > /proc/sys/vm/drop_caches")
        for fault in faults:
            listing = self._guest(f"filefrag -v -b{SECTOR} {MOUNT}/{fault.file}")
            fault.sector = sector_at(listing, BAD_BLOCK * BLOCK // SECTOR) + 3
        self._teller.say(f"{len(faults)} files of 1 MiB are written")
        return faults

    @contextmanager
    def rulebook(self) -> Iterator[None]:
        """Run ansible-rulebook with the collection's rulebook beside the story."""
        self._teller.scene("2. The controller: ansible-rulebook listens to the machine")
        variables = self._work / "rulebook.json"
        settings = {
            "dm_remap_hosts_directory": str(self._work / "hosts"),
            "dm_remap_cursor_directory": str(self._work / "cursors"),
            "drools_db_file_path": str(self._work / "rules"),
        }
        variables.write_text(json.dumps(settings))
        command = ["ansible-rulebook", "--rulebook", "dm_remap.storage.heal"]
        command += ["--inventory", str(self._inventory), "--vars", str(variables)]
        command += ["--persistence-id", "demo", "--verbose"]
        with open(self._rulebook_log, "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._work)
        try:
            with self._teller.working("ansible-rulebook starts"):
                self._wait(lambda: self._connected(process), "ansible-rulebook did not connect")
            self._teller.good("it follows the machine's journal over HTTPS")
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def heal(self, number: int, fault: Fault) -> None:
        """Break one sector, let the application meet it, and wait for the rulebook."""
        teller = self._teller
        teller.scene(f"{number}. {fault.title[0].upper()}{fault.title[1:]}")
        disk = self._machine.disk("main")
        seen = len(self._events())
        plays = self._plays()
        disk.fail(sectors=[(fault.sector, 1)], op=fault.operation, times=fault.times)
        teller.say(f"sector {fault.sector} of the main disk now fails; it is in {fault.file}")

        failing = self._touch(fault)
        if failing.rc == 0:
            raise Failed(f"the {fault.operation} of {fault.file} should have failed")
        fault.seen = teller.seconds
        teller.bad(f"application: {fault.operation} of {fault.file}: {last_line(failing.stderr)}")

        events = self._wait(lambda: self._events()[seen:], "no event came from the machine")
        teller.say(f"event: {events[0]['severity']} {events[0]['type']}: {events[0]['message']}")
        with teller.working("the rulebook runs the playbook dm_remap.storage.remap"):
            self._wait(lambda: self._plays() > plays, "the playbook did not run")
        fault.healed = teller.seconds
        result = self._play_result()
        teller.show([result])
        found = re.search(r"saved sectors: (\d+), lost sectors: (\d+)", result)
        if not found:
            raise Failed(f"the playbook did not say what it saved: {result}")
        fault.saved, fault.gone = int(found[1]), int(found[2])

        self._check_healed(fault)

    def _check_healed(self, fault: Fault) -> None:
        teller = self._teller
        known = self.info()
        lost = sum(item["count"] for item in known["lost"])
        if fault.lost:
            if lost != fault.lost:
                raise Failed(f"{lost} sectors are lost, and {fault.lost} should be")
            if self._touch(fault).rc == 0:
                raise Failed(f"the lost sector of {fault.file} reads as if it were well")
            start = known["lost"][0]["start"]
            teller.say(f"sector {start} is lost, and reading it says so: no zeros, no old data")
            self._write_block(fault)
            teller.say("the application writes that block anew from its backup")
        elif lost:
            raise Failed(f"{lost} sectors are lost, and none should be")
        elif fault.operation == "write" and self._touch(fault).rc != 0:
            raise Failed(f"{fault.file} still cannot be written")
        self._guest("sync; echo 3 > /proc/sys/vm/drop_caches")
        content = self._machine.run_bytes(["cat", f"{MOUNT}/{fault.file}"]).stdout
        if content != fault.content:
            raise Failed(f"{fault.file} reads differently than it was written")
        took = fault.healed - fault.seen
        teller.good(f"{fault.file} reads again, every byte right, {took:.1f} s after the error")

    def conclude(self, number: int, before: dict[str, Any], faults: list[Fault]) -> None:
        """Show the table before and after, check the filesystem, and sum up."""
        teller = self._teller
        after = self.info()
        teller.scene(f"{number}. Before and after")
        teller.say("the device-mapper table before:")
        teller.show(before["table"])
        teller.say("and after:")
        teller.show(after["table"])
        if after["remapped_chunks"] != len(faults):
            raise Failed(f"{after['remapped_chunks']} chunks are remapped, not {len(faults)}")
        self._guest(f"umount {MOUNT}")
        check = self._machine.run(["e2fsck", "-fn", f"/dev/mapper/{TARGET}"], check=False)
        if check.rc != 0:
            raise Failed(f"the filesystem has errors: {check.stdout}")
        teller.good("the filesystem is clean")
        teller.say("fault              error to healed   sectors saved   sectors lost")
        for fault in faults:
            teller.say(
                f"{fault.file:<18} {fault.healed - fault.seen:>12.1f} s"
                f" {fault.saved:>15} {fault.gone:>14}"
            )
        teller.good(f"the story took {teller.seconds:.0f} s")

    def info(self) -> dict[str, Any]:
        """What the module info says of the target."""
        out = self._ansible(
            "info.log",
            "ansible",
            HOST,
            "--become",
            "--one-line",
            *("-m", "dm_remap.storage.info"),
            *("-a", f"name={TARGET}"),
        )
        found: dict[str, Any] = json.loads(out.partition("=>")[2])["targets"][0]
        return found

    def _touch(self, fault: Fault) -> Any:
        """Read or write the file's bad block past the page cache, as the application would."""
        if fault.operation == "write":
            return self._write_block(fault)
        command = f"dd if={MOUNT}/{fault.file} of=/dev/null iflag=direct"
        return self._machine.run(
            f"{command} bs={BLOCK} skip={BAD_BLOCK} count=1 status=none", check=False
        )

    def _write_block(self, fault: Fault) -> Any:
        block = fault.content[BAD_BLOCK * BLOCK : (BAD_BLOCK + 1) * BLOCK]
        self._machine.write_file("/run/demo-block", block)
        command = f"dd if=/run/demo-block of={MOUNT}/{fault.file} oflag=direct conv=notrunc"
        return self._machine.run(
            f"{command} bs={BLOCK} seek={BAD_BLOCK} count=1 status=none", check=False
        )

    def _connected(self, process: subprocess.Popen[bytes]) -> bool:
        if process.poll() is not None:
            raise Failed(f"ansible-rulebook ended: {last_line(self._log())}")
        return any((self._work / "cursors").glob("*")) or "Waiting for" in self._log()

    def _log(self) -> str:
        return self._rulebook_log.read_text("utf-8", "replace")

    def _plays(self) -> int:
        return self._log().count("PLAY RECAP")

    def _play_result(self) -> str:
        """The remap's own line of the last play."""
        found = re.findall(rf"{TARGET}: remapped chunks: [^\"]*", self._log())
        return found[-1] if found else last_line(self._log())

    def _events(self) -> list[dict[str, Any]]:
        folder = self._work / "hosts"
        description = json.loads(next(folder.glob("*.json")).read_text())
        context = ssl.create_default_context(cafile=description["ca_file"])
        token = Path(description["token_file"]).read_text().strip()
        request = urllib.request.Request(
            f"{self._url}/v1/events?after=0&wait=0&limit=1000",
            headers={"Authorization": f"Bearer {token}"},
        )
        with urllib.request.urlopen(request, timeout=30, context=context) as answer:
            events: list[dict[str, Any]] = json.load(answer)["events"]
        return [event for event in events if event["type"] == "sector_error"]

    def _guest(self, command: str) -> str:
        return str(self._machine.run(command).stdout)

    def _ansible(self, log: str, *command: str) -> str:
        result = subprocess.run(
            [*command, "-i", str(self._inventory)],
            capture_output=True,
            text=True,
            check=False,
            cwd=self._work,
        )
        (self._work / log).write_text(result.stdout + result.stderr)
        if result.returncode != 0:
            raise Failed(f"{command[0]} failed: {last_line(result.stdout + result.stderr)}")
        return result.stdout

    def _wait(self, condition: Callable[[], Any], otherwise: str) -> Any:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            found = condition()
            if found:
                return found
            time.sleep(0.1)
        raise Failed(f"{otherwise} within {PATIENCE_SECONDS:.0f} s")


def sector_at(listing: str, offset: int) -> int:
    """Sector of the filesystem at ``offset`` sectors of a file, from ``filefrag -v -b512``."""
    for line in listing.splitlines():
        match = re.match(r"\s*\d+:\s*(\d+)\.\.\s*(\d+):\s*(\d+)\.\.", line)
        if match and int(match[1]) <= offset <= int(match[2]):
            return int(match[3]) + offset - int(match[1])
    raise Failed(f"filefrag does not show sector {offset} of the file: {listing}")


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


if __name__ == "__main__":
    sys.exit(main())
