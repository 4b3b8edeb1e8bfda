# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""Replacing the main on real block devices: under a verifying load, and through power cuts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.lab import Disk, Machine
from tests.vm.guest import ROOT, Guest
from tests.vm.playing import ModuleRunner, Player, Step, lay_out_collection

pytestmark = pytest.mark.apart

NAME = "guarded"
CHUNK_SECTORS = 128


@pytest.mark.parametrize(
    ("on_error", "shim", "interface", "mebibytes"),
    [
        ("hold", "none", "virtio", 32),
        pytest.param("hold", "raid", "scsi", 96, marks=pytest.mark.soak),
        pytest.param("fail", "none", "virtio", 96, marks=pytest.mark.soak),
    ],
)
def test_a_main_is_replaced_under_a_verifying_load(
    lab: Machine, on_error: str, shim: str, interface: Any, mebibytes: int
) -> None:
    sectors = mebibytes * 2048
    for name in ("old", "new"):
        lab.attach(Disk(name, size=sectors * 512, interface=interface))
    guest = Guest(lab)
    places = {
        "name": NAME,
        "main": guest.path("old"),
        "spares": [guest.path("spare")],
        "sectors": sectors,
        "on_error": on_error,
        "shim": shim,
        "window": 8 << 20,
    }
    guest.call("replace_main", task="create", filesystem=True, **places)
    # Near the end, beyond what the filesystem's files use, so only the copy meets it.
    bad = sectors - 9 * CHUNK_SECTORS + 17
    old = lab.disk("old")
    old.fail([(bad, 1)], op="read", errno="ENODATA" if interface == "scsi" else "EIO")
    if on_error == "hold":
        # These the load meets; what it writes there is healed, and returns to the new main.
        old.fail([(sector, 1) for sector in range(2048, sectors - 8192, 6151)], op="write")
    done = guest.call(
        "replace_main", task="load", new=guest.path("new"), remap=[5, 200, 400], **places
    )
    assert done["failures"] == {}
    assert done["check"][0] == 0, done["check"][1]
    assert done["always_loaded"]
    assert done["actions"] == ["replace_main"]
    assert done["windows"] == mebibytes // 8
    assert done["again"] == []
    assert done["old_holders"] == []
    told = done["told"]
    assert told["replacing"] is None
    assert [extent["logical"] for extent in told["extents"]] == [bad // CHUNK_SECTORS]
    assert told["lost"] == [{"start": bad, "count": 1}]
    result = done["result"]
    if on_error == "hold":
        assert "dealt with" in done["healer"]
    else:
        assert result["healed"] == [bad // CHUNK_SECTORS]
    pauses = sorted(result["pauses"])
    print(
        f"{on_error}: {result['copied'] >> 20} MiB in {result['seconds']:.0f} s, pauses of "
        f"{pauses[len(pauses) // 2]:.3f} s median, {pauses[-1]:.3f} s at most; "
        f"{done.get('healer', '').count('dealt with')} healings"
    )


def documented_example() -> dict[str, Any]:
    """The arguments of the task in docs/replace-main.md."""
    text = (ROOT / "docs" / "replace-main.md").read_text()
    (task,) = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    return dict(task["dm_remap.storage.target"])


@pytest.mark.soak
def test_the_documented_example_and_the_playbook(lab: Machine, tmp_path: Path) -> None:
    old, new, third = (lab.disk(name) for name in ("main", "scsi", "spare2"))
    content = os.urandom(8 * CHUNK_SECTORS * 512)
    old.write(CHUNK_SECTORS, content)
    spares = [lab.disk("spare").path]
    name = documented_example()["name"]
    created = {"name": name, "main": old.path, "spares": spares, "on_error": "fail"}
    example = {**documented_example(), "main": new.path, "spares": spares}
    done = ModuleRunner(lab).run(
        Step("create", "target", created),
        Step("check", "target", example, check=True),
        Step("replace", "target", example),
        Step("again", "target", example),
        Step("info", "info", {"name": name}),
        Step("back", "target", created),
    )
    (action,) = done["check"]["actions"]
    assert done["replace"]["actions"] == [action]
    assert (action["action"], action["device"], action["to"]) == ("replace_main", name, new.path)
    assert (action["copied"], action["total"]) == (0, 64 << 20)
    assert done["check"]["target"]["main"]["devno"] != done["replace"]["target"]["main"]["devno"]
    assert done["replace"]["changed"]
    assert done["again"]["actions"] == []
    assert done["info"]["targets"][0]["replacing"] is None
    assert done["info"]["targets"][0]["main"] == done["replace"]["target"]["main"]
    assert [item["to"] for item in done["back"]["actions"]] == [old.path]
    lay_out_collection()
    told = Player(lab, tmp_path).play(
        "dm_remap.storage.replace_main",
        replace_host="guest",
        replace_target=name,
        replace_main=third.path,
        replace_poll=2,
    )
    assert "is not used any more" in told
    assert third.read(CHUNK_SECTORS, 8 * CHUNK_SECTORS) == content
    assert lab.run(f"ls /sys/class/block/$(basename $(realpath {old.path}))/holders").stdout == ""


# Power cuts


CUT_SECTORS = 32 * 2048
WINDOW = 4 << 20


@pytest.fixture
def cut(lab_image: str) -> Iterator[Machine]:
    """A machine whose disks lose what was not flushed, all of it or each block by chance."""
    disks = [
        Disk(role, size, "scsi", cache="volatile", survive=survive)
        for role, size, survive in (
            ("old", CUT_SECTORS * 512, 0.5),
            # A larger one than the old.
            ("new", CUT_SECTORS * 512 + (1 << 20), 0.0),
            ("spare", 22 << 20, 0.5),
        )
    ]
    with Machine(image=lab_image, disks=disks) as machine:
        yield machine


# Where the power is cut, after so many windows, and on the way to which disk.
CUTS = [
    ("window_copied", 1, "new"),
    ("frozen", 1, "new"),
    ("window_flushed", 0, "old"),
    ("window_committed", 2, "new"),
]


@pytest.mark.soak
def test_power_cuts_in_a_replacement(cut: Machine) -> None:
    guest = Guest(cut)
    paths = {name: guest.path(name) for name in ("old", "new", "spare")}
    places: dict[str, Any] = {
        "name": NAME,
        "main": paths["old"],
        "spares": [paths["spare"]],
        "sectors": CUT_SECTORS,
        "window": WINDOW,
    }
    assert guest.call("replace_main", task="create", **places)[-1] == "create_target"
    durable = first = 0
    gaps: list[tuple[int, int]] = []
    percents = []
    for number, (step, after, goal) in enumerate(CUTS):
        running = guest.begin(
            "replace_main",
            task="race",
            goal=paths[goal],
            first=first,
            stay_at=step,
            stay_after=after,
            **places,
        )
        try:
            line: dict[str, Any] = {}
            while "stays" not in line:
                line = running.next()
                durable = line.get("durable", durable)
            # Some more is written while the copy stays, unless that waits at a frozen window.
            for _turn in range(5 if step == "window_copied" else 0):
                durable = running.next().get("durable", durable)
            cut.power_cut()
        finally:
            running.forget()
        cut.restart()
        guest = Guest(cut)
        found = guest.call(
            "replace_main", task="verify", goal=paths[goal], durable=durable, gaps=gaps, **places
        )
        assert found["wrong"] == [], (number, step)
        # Numbers go on behind the highest one that was found, so that each is used once.
        first = found["highest"]
        gaps.append((durable, first))
        durable = first
        percents.append(found["told"]["replacing"]["percent"])
        print(
            f"cut after {step} on the way to the {goal} main: {percents[-1]} % are on the new one"
        )
    running = guest.begin("replace_main", task="race", goal=paths["new"], first=first, **places)
    try:
        line = {}
        while "end" not in line:
            line = running.next()
            durable = line.get("durable", durable)
    finally:
        running.forget()
    assert line["failure"] == ""
    assert (
        cut.run(f"ls /sys/class/block/$(basename $(realpath {paths['old']}))/holders").stdout == ""
    )
    cut.power_cut()
    cut.restart()
    guest = Guest(cut)
    found = guest.call(
        "replace_main", task="verify", goal=paths["new"], durable=durable, gaps=gaps, **places
    )
    assert found["wrong"] == []
    assert found["told"]["replacing"] is None
    assert found["told"]["sectors"] == CUT_SECTORS
    # The border was committed once, twice, not taken back, and committed twice more.
    assert percents == [12.5, 25.0, 25.0, 50.0]
