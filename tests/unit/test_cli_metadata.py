# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Metadata dumped, checked, repaired and restored: nothing is changed on the way, or by mistake."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dm_remap import copies, dumps, mending
from dm_remap.blockdev import DeviceInfo, Use
from dm_remap.dumps import BadDump, from_text, to_text
from dm_remap.errors import Refused
from dm_remap.format import Extent, Metadata, geometry_of, slot_sectors_of, spare_uuid_of
from dm_remap.target import Candidate
from tests.unit.cli_scene import Desk
from tests.unit.fake_kernel import FILESYSTEM_MAGIC, FILESYSTEM_SECTOR, SECTOR, Process
from tests.unit.test_engine import NAME, Scene, make_scene
from tests.unit.test_format import SPARE_SECTORS, config, metadata, some_metadata

BLANK = bytes(4096)


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody is root."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """A target with a lost sector, two chunks on spare 0, and nothing on spare 1."""
    return make_desk(tmp_path)


def make_desk(folder: Path) -> Desk:
    scene = make_scene(folder, 2)
    for index, spare in enumerate(scene.spares):
        spare.serial = f"S{index}"
    scene.create()
    scene.spoil(41)
    scene.remap((40, 16))
    return Desk(scene)


def stop(scene: Scene) -> None:
    """Restart the host: the target is not active any more."""
    scene.app.flush(scene.kernel)
    scene.kernel.cut_power(scene.kernel.volatile())


@pytest.fixture
def stopped(desk: Desk) -> Desk:
    """The same after a restart of the host."""
    stop(desk.scene)
    return desk


def slots_of(desk: Desk, index: int = 0) -> tuple[int, ...]:
    return slot_sectors_of(desk.scene.spares[index].sectors)


def wipe(desk: Desk, which: Iterator[int] | range | tuple[int, ...], index: int = 0) -> None:
    for number in which:
        desk.scene.spares[index].fill(slots_of(desk, index)[number], BLANK)


def image(desk: Desk) -> list[dict[int, bytes]]:
    return [dict(disk.content) for disk in desk.scene.kernel.disks.values()]


def dumped(desk: Desk, source: str = "/dev/spare0") -> str:
    done = desk.run(f"dm-remap metadata dump {source}")
    assert (done.code, done.err) == (0, "")
    return done.out


def save(desk: Desk, text: str) -> str:
    path = desk.folder / "dump.json"
    path.write_text(text)
    return str(path)


# Dumps


@given(some_metadata())
def test_a_dump_is_the_generation(what: Metadata) -> None:
    text = to_text(what)
    back = from_text(text)
    assert back == what
    assert (back.body, back.digest) == (what.body, what.digest)
    assert to_text(back) == text
    assert text.isascii()


class Memory:
    """A device in memory."""

    name = "/dev/memory"
    sectors = SPARE_SECTORS

    def __init__(self) -> None:
        self.content: dict[int, bytes] = {}

    def read(self, sector: int, count: int) -> bytes:
        parts = (
            self.content.get(number, bytes(SECTOR)) for number in range(sector, sector + count)
        )
        return b"".join(parts)

    def write(self, sector: int, data: bytes) -> None:
        for number in range(len(data) // SECTOR):
            self.content[sector + number] = data[number * SECTOR : (number + 1) * SECTOR]

    def flush(self) -> None:
        return


@given(some_metadata())
def test_a_dump_that_was_restored_is_dumped_the_same(what: Metadata) -> None:
    text = to_text(what)
    device = Memory()
    restored = from_text(text)
    done = copies.repair(device, copies.only(restored), spare_uuid_of(restored, 0))
    assert done.written == (1, 3, 5, 6, 0, 2, 4)
    found = copies.choose({"x": copies.survey(device)}, now_ns=2**64).metadata
    assert to_text(found) == text
    assert found.digest == what.digest


def test_every_change_of_a_dump_is_noticed() -> None:
    """Each value, each missing key, each key more; none is taken for a generation."""
    what = metadata(
        history=((7, b"12345678"), (3, b"abcdefgh")),
        generation=8,
        parent_digest=b"12345678" + bytes(24),
        unknown_sections=((77, b"more"),),
    )
    document = json.loads(to_text(what))
    places = list(leaves(document))
    assert len(places) > 40
    for place in places:
        for change in (remove, add_more, *map(put, (None, "x", -1, 5, 5.5, True, [], {}, "é"))):
            changed = copy.deepcopy(document)
            holder = changed
            for step in place[:-1]:
                holder = holder[step]
            change(holder, place[-1])
            if json.dumps(changed, sort_keys=True) == json.dumps(document, sort_keys=True):
                continue
            with pytest.raises(BadDump):
                from_text(json.dumps(changed))


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if place:
        yield place
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield from leaves(inner, (*place, key))


def remove(holder: Any, key: Any) -> None:
    del holder[key]


def add_more(holder: Any, key: Any) -> None:
    if isinstance(holder, dict):
        holder["more"] = 1
    else:
        holder.append(holder[0])


def put(value: Any) -> Any:
    def change(holder: Any, key: Any) -> None:
        holder[key] = value

    return change


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: raw.decode("latin-1")))
def test_arbitrary_text_is_no_dump(text: str) -> None:
    with pytest.raises(BadDump):
        from_text(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not JSON"),
        ("[]", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "is no dump"),
        ('{"kind": "dm-remap metadata", "version": 2}', "is of version 2, not 1"),
        ('{"kind": "dm-remap metadata", "version": 1}', "lacks these keys"),
        (" " * (dumps.MAX_CHARACTERS + 1), "has more than"),
    ],
)
def test_what_is_no_dump(text: str, why: str) -> None:
    with pytest.raises(BadDump, match=why):
        from_text(text)


def test_the_sources_of_a_dump(desk: Desk) -> None:
    active = dumped(desk, NAME)
    target = desk.scene.engine().require(NAME)
    assert from_text(active) == target.metadata
    assert dumped(desk, str(target.metadata.target_uuid)) == active
    assert dumped(desk) == dumped(desk, "/dev/spare1") == active
    assert dumped(desk, f"{NAME} --generation 2 --json") == active
    first = from_text(dumped(desk, f"{NAME} --generation 1"))
    assert (first.generation, first.extents) == (1, ())
    stop(desk.scene)
    assert dumped(desk, NAME) == active
    for line, code, text in (
        ("other", 3, "no backup of that name"),
        (f"{NAME} --generation 9", 3, "no backup of generation 9 that can be read"),
        ("/dev/spare0 --generation 1", 3, "has no valid copy of generation 1"),
        ("/dev/main", 3, "no valid copy of a target's metadata"),
        ("/dev/none", 3, "no such device"),
    ):
        done = desk.run(f"dm-remap metadata dump {line}")
        assert (done.code, done.out) == (code, "")
        assert text in done.err


# Check


def test_a_sound_spare(desk: Desk) -> None:
    for _again in range(2):
        answer = desk.run("dm-remap metadata check /dev/spare0 --json")
        assert answer.code == 0
        assert [row["state"] for row in answer.json["copies"]] == ["ok"] * 7
        assert answer.json["target"] == NAME
        assert (answer.json["sound"], answer.json["generation"]) == (True, 2)
        if desk.scene.kernel.mapped:
            stop(desk.scene)


@pytest.mark.parametrize(
    "which", [w for n in (1, 3, 6) for w in itertools.combinations(range(7), n)]
)
def test_each_damaged_copy_is_named(desk: Desk, which: tuple[int, ...]) -> None:
    for number in which:
        raw = bytearray(desk.scene.spares[0].read(slots_of(desk)[number], 8))
        raw[100] ^= 1
        desk.scene.spares[0].fill(slots_of(desk)[number], bytes(raw))
    done = desk.run("dm-remap metadata check /dev/spare0 --json")
    assert done.code == 4
    assert [row["copy"] for row in done.json["copies"]] == list(range(7))
    bad = [row["copy"] for row in done.json["copies"] if row["state"] == "header checksum"]
    assert tuple(bad) == which


def test_what_check_says_of_other_devices(desk: Desk) -> None:
    desk.scene.spares[0].spoil([0])
    done = desk.run("dm-remap metadata check /dev/spare0")
    assert done.code == 4
    assert "   0  near             0  unreadable" in done.out
    nothing = desk.run("dm-remap metadata check /dev/main")
    assert nothing.code == 4
    assert nothing.out.startswith("/dev/main has no valid copy of a target's metadata\n")


# Repair


@pytest.mark.parametrize("by", [NAME, "/dev/spare0", "/dev/spare1 /dev/spare0"])
def test_a_repair_makes_whole_what_it_was(desk: Desk, by: str) -> None:
    if by != NAME:
        stop(desk.scene)
    before, text = image(desk), dumped(desk)
    wipe(desk, (0, 2, 4, 5))
    damaged = image(desk)
    planned = desk.run(f"dm-remap metadata repair {by} --dry-run --json")
    assert (planned.code, planned.json["changed"]) == (0, True)
    assert image(desk) == damaged
    done = desk.run(f"dm-remap metadata repair {by} --yes --json")
    assert (done.code, done.json["left"]) == (0, [])
    assert done.json["actions"] == planned.json["actions"]
    assert image(desk) == before
    assert dumped(desk) == text
    assert desk.logged == ["repair_metadata /dev/spare0"]
    again = desk.run(f"dm-remap metadata repair {by} --yes")
    assert (again.code, again.out) == (0, "nothing is to do\n")


def test_a_stale_spare_is_brought_up_to_the_newest(stopped: Desk) -> None:
    stale = stopped.scene.kernel.disks["/dev/spare1"]
    backups = stopped.host().backups
    (target,) = backups.targets()
    first = backups.read(target, 1)
    for number, sector in enumerate(slots_of(stopped, 1)):
        raw = copies.pack_slot(first, spare_uuid_of(first, 1), stale.sectors, number)
        stale.fill(sector, raw)
    # Alone it has nothing to be repaired from, and stays as it is.
    assert stopped.run("dm-remap metadata repair /dev/spare1 --yes").out == "nothing is to do\n"
    done = stopped.run("dm-remap metadata repair /dev/spare1 /dev/spare0 --yes")
    assert done.code == 0
    assert dumped(stopped, "/dev/spare1") == dumped(stopped, "/dev/spare0")


def test_what_cannot_be_written_is_told(stopped: Desk) -> None:
    wipe(stopped, (0, 1))
    stopped.scene.spares[0].unwritable = {slots_of(stopped)[0]}
    done = stopped.run("dm-remap metadata repair /dev/spare0 --yes --json")
    assert done.code == 4
    assert len(done.json["left"]) == 1
    assert "copy 0 is still damaged" in done.err


def test_what_changed_during_the_question_stops_it(stopped: Desk) -> None:
    wipe(stopped, (0,))

    class Slow(io.StringIO):
        def isatty(self) -> bool:
            return True

        def readline(self, size: int | None = -1) -> str:  # type: ignore[override]
            wipe(stopped, (1,))
            return "y\n"

    done = stopped.run("dm-remap metadata repair /dev/spare0", stdin=Slow())
    assert done.code == 3
    assert "something has changed since it was planned" in done.err
    assert not stopped.scene.spares[0].content.get(0, BLANK)[:8].strip(b"\0")


def test_nobody_waits_for_the_lock_during_the_question(desk: Desk) -> None:
    wipe(desk, (0,))
    free = []

    class Asked(io.StringIO):
        def isatty(self) -> bool:
            return True

        def readline(self, size: int | None = -1) -> str:  # type: ignore[override]
            with desk.scene.engine().try_locked(NAME) as locked:
                free.append(locked)
            return "n\n"

    desk.run(f"dm-remap metadata repair {NAME}", stdin=Asked())
    assert free == [True]


# Restore


@pytest.mark.parametrize("source", ["dump", "backup", "stdin"])
@pytest.mark.parametrize("kept", [(), (5,), (0, 1, 2), (0, 1, 2, 3, 4, 5)])
def test_a_restored_spare_is_what_it_was(stopped: Desk, source: str, kept: tuple[int, ...]) -> None:
    before, text = image(stopped), dumped(stopped)
    wipe(stopped, [n for n in range(7) if n not in kept])  # type: ignore[arg-type]
    damaged = image(stopped)
    stdin = None
    line = "dm-remap metadata restore /dev/spare0 --yes "
    if source == "dump":
        line += f"--from {save(stopped, text)}"
    elif source == "backup":
        line += f"--backup {NAME}"
    else:
        line += "--from -"
    if source == "stdin":
        stdin = io.StringIO(text)
    else:
        dry = stopped.run(f"{line} --dry-run")
        assert (dry.code, image(stopped)) == (0, damaged)
        assert "write_copies /dev/spare0 generation=2 spare=0" in dry.out
    done = stopped.run(line, stdin=stdin)
    assert (done.code, done.err) == (0, "")
    assert image(stopped) == before
    assert dumped(stopped) == text
    if source != "stdin":
        assert stopped.run(line).out == "nothing is to do\n"
    # And it can be used as before.
    stopped.scene.create()
    stopped.scene.check(power_cut=True)


def refused(desk: Desk, line: str, text: str, code: int = 3) -> None:
    """A restore is refused, and nothing is written."""
    before = image(desk)
    done = desk.run(f"dm-remap metadata restore {line} --yes")
    assert done.code == code, done
    assert text in done.err
    assert image(desk) == before


def test_an_active_target_is_not_touched(desk: Desk) -> None:
    refused(desk, f"/dev/spare0 --backup {NAME}", "is in use")
    desk.scene.kernel.add_disk("new", desk.scene.spares[0].sectors).serial = "S1"
    refused(desk, f"/dev/new --backup {NAME}", "is of target guarded, which is active without it")


def test_another_disk_is_not_taken_for_the_spare(stopped: Desk) -> None:
    kernel = stopped.scene.kernel
    new = kernel.add_disk("new", stopped.scene.spares[0].sectors)
    new.serial = ""
    backup = f"--backup {NAME}"
    refused(stopped, f"/dev/new {backup}", "nothing tells which spare of the target it is")
    refused(stopped, f"/dev/new {backup} --spare 7", "there is no spare 7")
    refused(stopped, f"/dev/new {backup} --spare 0", "so the 2 chunks that spare 0 holds cannot be")
    new.serial = "S0"
    refused(stopped, f"/dev/new {backup}", "so the 2 chunks that spare 0 holds cannot be")
    refused(
        stopped, f"/dev/new {backup} --spare 1", "has serial 'S0', but the target's spare 1 has"
    )
    new.sectors -= 8
    refused(stopped, f"/dev/new {backup}", "fewer than the")
    refused(stopped, f"/dev/spare1 {backup} --spare 0", "has copies of spare 1, not 0")
    wipe(stopped, range(7), 1)
    refused(stopped, f"/dev/spare1 {backup} --spare 0", "has serial 'S1'")
    kernel.disks["/dev/spare1"].mounted = "/mnt"
    refused(stopped, f"/dev/spare1 {backup}", "is in use")
    kernel.disks["/dev/spare1"].mounted = ""
    kernel.disks["/dev/spare1"].read_only = True
    refused(stopped, f"/dev/spare1 {backup}", "is read-only")


def test_a_fresh_disk_without_chunks_is_formatted_first(stopped: Desk) -> None:
    new = stopped.scene.kernel.add_disk("new", stopped.scene.spares[1].sectors)
    new.serial = ""
    geometry = geometry_of(from_text(dumped(stopped)), 1)
    old_tags = geometry.tag_start + 100
    new.fill(old_tags, b"x" * SECTOR)
    line = f"dm-remap metadata restore /dev/new --backup {NAME} --spare 1 --yes"
    done = stopped.run(line)
    assert done.code == 0
    assert done.out.splitlines()[1:] == [
        "  format_spare /dev/new",
        "  write_copies /dev/new generation=2 spare=1",
    ]
    assert new.read(old_tags, 1) == bytes(SECTOR)
    assert dumped(stopped, "/dev/new") == dumped(stopped, "/dev/spare0")


def test_a_filesystem_is_not_overwritten(stopped: Desk) -> None:
    wipe(stopped, range(5))
    spare = stopped.scene.spares[0]
    spare.fill(FILESYSTEM_SECTOR, FILESYSTEM_MAGIC.ljust(SECTOR, b"\0"))
    refused(stopped, f"/dev/spare0 --backup {NAME}", "was used for ext4 since")
    before = image(stopped)
    done = stopped.run("dm-remap metadata repair /dev/spare0 --yes")
    assert (done.code, image(stopped)) == (3, before)
    assert "was used for ext4 since" in done.err


def test_a_newer_generation_and_another_target_stay(stopped: Desk, tmp_path: Path) -> None:
    backup = f"--backup {NAME} --generation 1"
    refused(stopped, f"/dev/spare0 {backup}", "carries generation 2, newer than generation 1")
    refused(
        stopped,
        f"/dev/spare0 {backup} --allow-older",
        "carries generation 2, newer than generation 1",
    )
    other = make_desk(tmp_path / "other")
    stop(other.scene)
    foreign = save(stopped, dumped(other))
    refused(stopped, f"/dev/spare0 --from {foreign}", "is a spare of target 'guarded'")
    wipe(stopped, range(7))
    refused(
        stopped,
        f"/dev/spare0 {backup}",
        "generation 1 is older than generation 2, of which this host has a backup",
    )
    line = f"dm-remap metadata restore /dev/spare0 {backup} --allow-older --yes"
    assert stopped.run(line).code == 0
    assert from_text(dumped(stopped)).generation == 1


def test_another_history_stays(stopped: Desk) -> None:
    there = from_text(dumped(stopped))
    diverged = replace(there, health={"other": 1})
    assert diverged.generation == there.generation
    refused(
        stopped, f"/dev/spare0 --from {save(stopped, to_text(diverged))}", "histories that diverged"
    )
    older = replace(diverged, generation=3, parent_digest=b"z" * 32, history=())
    after = older.successor(1)
    refused(
        stopped, f"/dev/spare0 --from {save(stopped, to_text(after))}", "histories that diverged"
    )
    # A real successor is welcome.
    line = (
        f"dm-remap metadata restore /dev/spare0 --from {save(stopped, to_text(there.successor(1)))}"
    )
    assert stopped.run(f"{line} --yes").code == 0
    assert from_text(dumped(stopped)) == there.successor(1)


def test_a_dump_that_was_changed_or_is_none(stopped: Desk) -> None:
    wipe(stopped, range(7))
    document = json.loads(to_text(from_text(dumped(stopped, NAME))))
    document["extents"] = []
    refused(stopped, f"/dev/spare0 --from {save(stopped, json.dumps(document))}", "was changed")
    refused(stopped, f"/dev/spare0 --from {save(stopped, '5')}", "is not JSON")
    refused(stopped, "/dev/spare0 --from /nowhere/x", "cannot be read: No such file", 1)
    (stopped.folder / "raw").write_bytes(b"\xff\xfe")
    refused(stopped, f"/dev/spare0 --from {stopped.folder / 'raw'}", "is not UTF-8")
    refused(stopped, "/dev/spare0 --from x --generation 1", "chooses among backups")
    refused(stopped, "/dev/spare0 --backup other", "no backup of that name")
    refused(stopped, f"/dev/none --backup {NAME}", "no such device")


def test_usage_of_restore(stopped: Desk) -> None:
    for line in ("/dev/spare0", "/dev/spare0 --from a --backup b", "--backup b"):
        assert stopped.run(f"dm-remap metadata restore {line}").code == 2
    done = stopped.run(f"dm-remap metadata repair {NAME} /dev/spare0")
    assert done.code == 3
    assert "name one target, or spares of one target by their paths" in done.err


@pytest.mark.parametrize("step", range(9))
def test_a_restore_that_is_killed_can_be_repeated(stopped: Desk, step: int) -> None:
    """After any number of writes the next run ends with the same."""
    before = image(stopped)
    wipe(stopped, range(7))

    class Stopped(Exception):
        pass

    left = [step]

    class Failing(Process):
        def change(self, name: str) -> Any:
            if name.startswith("write"):
                if left[0] == 0:
                    raise Stopped
                left[0] -= 1
            return super().change(name)

    stopped.process = Failing(stopped.scene.kernel)
    line = f"dm-remap metadata restore /dev/spare0 --backup {NAME} --yes"
    try:
        first = stopped.run(line)
    except Stopped:
        first = None
    assert (first is None) == (step < 7)
    stopped.process = None
    assert stopped.run(line).code == 0
    assert image(stopped) == before


# Plans


def test_a_target_with_one_spare_of_many_gaps() -> None:
    """The position in the configuration counts, not the number of spares."""
    gaps = metadata(
        config={**config(3), "spares": [None, *config(3)["spares"][1:]]},  # type: ignore[index,misc]
        extents=(Extent(1, 1, 2, 0),),
        lost=(),
    )
    info = DeviceInfo(
        "/dev/x", "8:0", SPARE_SECTORS, 512, 512, "8:0", 0, "T", "", "", False, (), ""
    )
    blank = Candidate(info, (), copies.survey(Memory()))
    with pytest.raises(Refused, match="there is no spare 0; use one of 1 .*, 2 "):
        mending.spare_for(gaps, blank, 0)
    assert mending.spare_for(gaps, blank, 2) == 2
    plan = mending.plan_restore(gaps, blank, 2, True, mending.Known())
    assert [action.kind for action in plan.actions] == ["write_copies"]
    assert plan.spares == {2: info}
    used = dataclasses.replace(info, used_by=(Use("x", "mounted on", "/"),))
    with pytest.raises(Refused, match="in use"):
        mending.plan_restore(gaps, replace(blank, info=used), 2, True, mending.Known())
    assert uuid.UUID(gaps.config["spares"][2]["uuid"]) == spare_uuid_of(gaps, 2)


def test_a_whole_target_is_restored_to_a_new_spare(stopped: Desk) -> None:
    before = host_backup(stopped)
    fresh = stopped.scene.kernel.add_disk("fresh", stopped.scene.spares[0].sectors)
    for path in stopped.scene.request.spares:
        del stopped.scene.kernel.disks[path]
    line = f"dm-remap metadata restore /dev/fresh --backup {NAME} --main /dev/main --yes"
    refused = stopped.run(line)
    assert refused.code == 3
    assert "would be restored without spare 0" in refused.err
    assert fresh.content == {}
    done = stopped.run(f"{line} --degraded --dry-run --json")
    kinds = [action["action"] for action in done.json["actions"]]
    assert kinds == ["format_spare", "restore_metadata"]
    assert fresh.content == {}
    done = stopped.run(f"{line} --degraded --json")
    assert done.code == 0
    assert done.json["generation"] == before.generation + 1
    assert done.json["left"] == []
    assert "chunks that were remapped after it" in done.err
    assert stopped.run(f"dm-remap-reassemble {NAME} --degraded allowed --yes").code == 4
    assert stopped.scene.generation() > before.generation


def host_backup(desk: Desk) -> Metadata:
    return desk.host().backups.of(NAME)


@pytest.mark.parametrize(
    "line",
    [
        "/dev/spare0 --from x --main /dev/main",
        f"/dev/spare0 --backup {NAME} --main /dev/main --spare 1",
        f"/dev/spare0 --backup {NAME} --main /dev/main --allow-older",
        f"/dev/spare0 --backup {NAME} --degraded",
        f"/dev/spare0 --backup {NAME} --wipe",
        f"/dev/spare0 /dev/spare1 --backup {NAME}",
    ],
)
def test_options_of_the_two_restorations_do_not_mix(stopped: Desk, line: str) -> None:
    done = stopped.run(f"dm-remap metadata restore {line} --yes")
    assert done.code == 3
    assert "--main" in done.err
