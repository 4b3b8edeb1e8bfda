# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""When a target is assembled by itself: docs/boot.md's table of cases, and all combinations."""

from __future__ import annotations

import re
import uuid
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import yaml

from dm_remap import fstab
from dm_remap.boot import Clocks, Decision, Situation, Step, decide
from dm_remap.configuration import Assembly, parse
from dm_remap.copies import only
from dm_remap.discovery import Missing, Problem, State, TargetFound
from dm_remap.fstab import Mount, mounts, not_mounted_above
from tests.unit.test_discovery import disk_info, first

DOC = Path(__file__).resolve().parents[2] / "docs" / "boot.md"
TARGET = uuid.UUID(int=7)
POLICY = Assembly(timeout=60)
ALLOWED = replace(POLICY, degraded="allowed")

COMPLETE = TargetFound(TARGET, "data", State.COMPLETE, "can be activated")
ACTIVE = replace(COMPLETE, state=State.ACTIVE, decision="is active as data")
DEGRADED = replace(
    COMPLETE,
    state=State.DEGRADED,
    decision="can be activated without spare 1",
    missing=(Missing(1, uuid.UUID(int=8), "EXAMPLE, serial S-7", 3),),
)
UNPROVED = replace(COMPLETE, problems=(Problem("unproved_spare", "/dev/sdb", "is doubtful"),))


def refused(code: str) -> TargetFound:
    problem = Problem(code, "", "the main is missing", "attach it", refuses=True)
    return replace(
        COMPLETE,
        state=State.REFUSED,
        decision="is not activated, because the main is missing",
        problems=(problem,),
    )


BEFORE, AFTER = 59.0, 60.0
OLD = replace(COMPLETE, choice=only(first()))
NEWEST = first().generation + 1
COPIED = replace(UNPROVED, choice=only(first()), spares={0: disk_info(1)})
CASES = {
    "all disks are there": Situation(COMPLETE, POLICY),
    "active": Situation(ACTIVE, POLICY),
    "removed on purpose": Situation(refused("removed"), POLICY),
    "`auto: false`": Situation(COMPLETE, replace(POLICY, auto=False)),
    "never used here": Situation(COMPLETE, POLICY, known=False),
    "was active with the same disks": Situation(COMPLETE, POLICY, spent=True),
    "the main is missing": Situation(refused("missing_main"), POLICY, waited=BEFORE),
    "the main is missing, time is over": Situation(refused("missing_main"), POLICY, waited=AFTER),
    "refused for another reason": Situation(refused("clone_main"), ALLOWED, waited=BEFORE),
    "refused for another reason, time is over": Situation(
        refused("split_brain"), ALLOWED, waited=AFTER
    ),
    "a spare is missing": Situation(DEGRADED, ALLOWED, waited=BEFORE),
    "a spare is missing, time is over, `degraded: never`": Situation(
        DEGRADED, POLICY, waited=AFTER
    ),
    "a spare is missing, time is over, `degraded: allowed`": Situation(
        DEGRADED, ALLOWED, waited=AFTER
    ),
    "a spare is missing, time is over, `degraded: allowed`, the backups cannot be read": Situation(
        DEGRADED, ALLOWED, witness=False, waited=AFTER
    ),
    "a spare is missing, time is over, `degraded: allowed`, this host has no backup of the target, "
    "or another one has used it last": Situation(DEGRADED, ALLOWED, backup=False, waited=AFTER),
    "the disks are older than what the host remembers of the target": Situation(
        OLD, POLICY, witness=False, newest=NEWEST, waited=BEFORE
    ),
    "the disks are older than what the host remembers of the target, time is over": Situation(
        OLD, ALLOWED, witness=False, newest=NEWEST, waited=AFTER
    ),
    "a disk that udev has not finished with": Situation(
        COMPLETE, POLICY, doubts=("/dev/sdb is not known to udev yet",)
    ),
    "a path of a multipath device": Situation(COMPLETE, POLICY, doubts=("/dev/sdb is a path",)),
    "a path of a multipath device, time is over": Situation(
        COMPLETE, POLICY, waited=AFTER, doubts=("/dev/sdb is a path",)
    ),
    "a spare without serial number": Situation(UNPROVED, POLICY, waited=BEFORE),
    "a spare without serial number, time is over": Situation(UNPROVED, POLICY, waited=AFTER),
    "a spare that shows no serial number, though one is recorded": Situation(
        COPIED, ALLOWED, waited=BEFORE
    ),
    "a spare that shows no serial number, though one is recorded, time is over": Situation(
        COPIED, ALLOWED, waited=AFTER
    ),
    "the backups cannot be read yet": Situation(COMPLETE, POLICY, witness=False, waited=BEFORE),
    "the backups cannot be read, time is over": Situation(
        COMPLETE, POLICY, witness=False, waited=AFTER
    ),
    "the backups cannot be read, time is over, never used here": Situation(
        COMPLETE, POLICY, known=False, witness=False, waited=AFTER
    ),
}


def in_words(decision: Decision) -> str:
    return decision.step.value + (" degraded" if decision.degraded else "")


def documented() -> dict[str, str]:
    section = DOC.read_text().partition("## When a target is assembled")[2].partition("### ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \| .+ \|$", section, re.MULTILINE)
    return dict(rows[2:])


def test_the_documented_cases_are_those_that_are_tested() -> None:
    assert {name: in_words(decide(case)) for name, case in CASES.items()} == documented()


@pytest.mark.parametrize("name", CASES)
def test_a_decision_says_why_and_what_helps(name: str) -> None:
    decision = decide(CASES[name])
    assert decision.reason
    assert not decision.reason.endswith(".")
    if decision.step is Step.GIVE_UP:
        assert decision.remedy
    assert (decision.left is not None) == (decision.step is Step.WAIT)


FOUND = (
    COMPLETE,
    OLD,
    COPIED,
    ACTIVE,
    DEGRADED,
    UNPROVED,
    refused("removed"),
    refused("missing_main"),
)
SITUATIONS = [
    Situation(
        found, Assembly(auto, degraded, 60), known, witness, waited, doubts, spent, backup, newest
    )
    for found, auto, degraded, known, witness, waited, doubts, spent, backup, newest in product(
        FOUND,
        (False, True),
        ("never", "allowed"),
        (False, True),
        (False, True),
        (0.0, 59.9, 60.0, 1e6),
        ((), ("/dev/sdb is not known to udev yet",)),
        (False, True),
        (False, True),
        (0, NEWEST),
    )
]


def test_nothing_is_assembled_that_must_not_be() -> None:
    for now in SITUATIONS:
        decision = decide(now)
        if decision.step is not Step.ASSEMBLE:
            continue
        assert now.found.state in (State.COMPLETE, State.DEGRADED), now
        assert now.policy.auto, now
        assert now.known, now
        assert not now.spent, now
        assert not now.doubts, now
        late = now.waited >= now.policy.timeout
        assert decision.degraded == bool(now.found.missing), now
        if decision.degraded:
            assert now.policy.degraded == "allowed", now
            assert late, now
            assert now.witness, now
            assert now.backup, now
        assert now.found is not COPIED, now
        assert now.found is not OLD or not now.newest, now
        assert now.witness or late, now


def test_what_is_waited_for_comes_to_an_end() -> None:
    for now in SITUATIONS:
        decision = decide(now)
        if decision.step is Step.WAIT:
            assert decision.left is not None
            assert 0 < decision.left <= now.policy.timeout
            after = decide(replace(now, waited=now.waited + decision.left))
            assert after.step in (Step.ASSEMBLE, Step.GIVE_UP), now


def test_what_is_certain_is_not_delayed() -> None:
    assert decide(Situation(COMPLETE, ALLOWED, waited=0.0)).step is Step.ASSEMBLE


# Time


def test_the_time_of_an_expected_target_begins_with_the_service() -> None:
    clocks = Clocks(100.0)
    assert clocks.waited(TARGET, {"a"}, True, 60, 130.0) == 30.0
    # A disk that comes in time does not begin it anew.
    assert clocks.waited(TARGET, {"a", "b"}, True, 60, 140.0) == 40.0


def test_the_time_of_another_target_begins_with_its_first_disk() -> None:
    clocks = Clocks(100.0)
    assert clocks.waited(TARGET, {"a"}, False, 60, 130.0) == 0.0
    assert clocks.waited(TARGET, {"a"}, False, 60, 150.0) == 20.0


def test_a_new_disk_after_the_time_lets_it_begin_anew() -> None:
    clocks = Clocks(100.0)
    clocks.waited(TARGET, {"a"}, True, 60, 130.0)
    assert clocks.waited(TARGET, {"a"}, True, 60, 170.0) == 70.0
    assert clocks.waited(TARGET, {"a", "b"}, True, 60, 180.0) == 0.0
    assert clocks.waited(TARGET, {"a"}, True, 60, 190.0) == 10.0
    # One that was seen already is no news.
    assert clocks.waited(TARGET, {"a", "b"}, True, 60, 250.0) == 70.0


def test_the_first_disk_after_the_time_lets_it_begin_anew() -> None:
    """The others of an enclosure that is switched on late follow in a moment."""
    clocks = Clocks(100.0)
    assert clocks.waited(TARGET, {"a"}, True, 60, 5000.0) == 0.0
    assert clocks.waited(TARGET, {"a"}, True, 60, 5001.0) == 1.0


def test_disks_are_spent_until_one_is_attached_anew() -> None:
    clocks = Clocks(0.0)
    assert not clocks.spent(TARGET, {"a", "b"})
    clocks.spend(TARGET, {"a", "b"})
    assert clocks.spent(TARGET, {"a", "b"})
    assert clocks.spent(TARGET, {"a"})
    assert not clocks.spent(TARGET, {"a", "c"})
    assert not clocks.spent(TARGET, set())
    assert not clocks.spent(uuid.UUID(int=9), {"a"})


# fstab

FSTAB = r"""
# /dev/sda1 /commented ext4 defaults 0 0
UUID=12-ab        /          ext4  defaults            0 1
LABEL="a\040b"    /srv\0401  xfs   nofail              0 2
/dev/mapper/data  /var       ext4  defaults,nofail     0 2
/dev/mapper/x     /var/lib   ext4  noauto              0 2
PARTUUID=34       /mnt/      ext4  x-systemd.automount 0 2
PARTLABEL=c       /parted    ext4  defaults            0 2
UUID=56           none       swap  sw                  0 0
/srv/opt          /opt       none  bind                0 0
proc              /proc      proc  defaults            0 0
server:/export    /nfs       nfs   defaults            0 0
broken            /line
"""


def test_lines_of_fstab_that_mount_devices() -> None:
    assert list(mounts(FSTAB)) == [
        Mount("/dev/disk/by-uuid/12-ab", "/", True),
        Mount("/dev/disk/by-label/a\\x20b", "/srv 1", True),
        Mount("/dev/mapper/data", "/var", True),
        Mount("/dev/mapper/x", "/var/lib", False),
        Mount("/dev/disk/by-partuuid/34", "/mnt/", False),
        Mount("/dev/disk/by-partlabel/c", "/parted", True),
    ]


@pytest.mark.parametrize(
    ("path", "mounted", "missing"),
    [
        ("/var/lib/dm-remap", {"/"}, "/var"),
        ("/var/lib/dm-remap", {"/", "/var"}, ""),
        ("/variable", {"/"}, ""),
        ("/var", {"/"}, "/var"),
        ("/etc", {"/"}, ""),
        ("/srv 1/x", {"/"}, "/srv 1"),
        ("/parted", {"/"}, "/parted"),
        ("/opt/x", {"/"}, "/opt"),
        ("/nfs", {"/"}, "/nfs"),
    ],
)
def test_the_mount_that_a_path_waits_for(path: str, mounted: set[str], missing: str) -> None:
    assert not_mounted_above(path, FSTAB, mounted) == missing


def test_escapes_are_undone() -> None:
    assert fstab.plain(r"a\040b\134c\0401") == "a b\\c 1"


# The example


def test_the_example_is_a_configuration_that_says_what_the_page_says() -> None:
    text = DOC.read_text().partition("## Example")[2]
    example = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert example
    found = parse(example[1].encode(), "config.yaml")
    assert found.assembly_of("data") == Assembly(True, "allowed", 30)
    assert not found.assembly_of("shared").auto
    assert found.assembly_of("another") == Assembly(True, "never", 120)
    assert yaml.safe_load(example[1])["assemble"] == {"timeout": 120}


def test_the_line_of_fstab_mounts_by_uuid() -> None:
    line = re.search(r"^UUID=.*$", DOC.read_text(), re.MULTILINE)
    assert line
    (mount,) = mounts(line[0])
    assert mount.device.startswith("/dev/disk/by-uuid/")
    assert mount.auto
