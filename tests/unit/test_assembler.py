# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The service that assembles targets, on the kernel in memory: disks come in any order and late."""

from __future__ import annotations

import itertools
import random
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from dm_remap import discovery
from dm_remap.assembler import MOUNT, Assembler, serve
from dm_remap.backups import Backups
from dm_remap.blockdev import Listed
from dm_remap.engine import Engine
from dm_remap.errors import Refused
from dm_remap.fingerprint import of_info
from dm_remap.hiding import Known, Mains, role_of
from dm_remap.plan_removal import plan_absent
from dm_remap.salvage import Patience
from dm_remap.udev import Event
from tests.unit.drill_scene import CHUNK, CHUNKS, STALE, TARGETS, Drill, make_drill
from tests.unit.fake_kernel import Blocks, Disk, Kernel, Process

ADD = Event("add", "8:999", "")
SPARES = {name: spares for name, (spares, _count) in TARGETS.items()}


class HidingBlocks(Blocks):
    """Block devices of which udev hides some."""

    def __init__(self, process: Process, hidden: dict[str, str]) -> None:
        super().__init__(process)
        self._hidden = hidden

    def list_devices(self, without: str) -> Iterator[Listed]:
        for listed in super().list_devices(without):
            mapped = self._process.look().mapped
            used = tuple(replace(use, uuid=mapped[use.by].uuid) for use in listed.info.used_by)
            hidden = self._hidden.get(listed.info.devno, "")
            yield replace(listed, info=replace(listed.info, hidden=hidden, used_by=used))


@dataclass
class Scene:
    """A host that has just started, with what it knows, and none of its disks yet.

    Args:
        drill: the host; its kernel has the disks that are attached.
        folder: for what the service keeps.
        away: the disks that are not attached.
        now: the clock.
        hidden: what udev hides, by device number.
        obeys: whether udev's rule is there.
        doubts: by device number.
        unmounted: the mount point that the backups wait for.
    """

    drill: Drill
    folder: Path
    away: dict[str, Disk]
    now: float = 0.0
    hidden: dict[str, str] = field(default_factory=dict)
    obeys: bool = True
    doubts: dict[str, str] = field(default_factory=dict)
    unmounted: str = ""
    log: list[tuple[int, str]] = field(default_factory=list)
    mounted: list[str] = field(default_factory=list)
    announced: list[str] = field(default_factory=list)
    attachments: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.blocks = HidingBlocks(Process(self.drill.kernel), self.hidden)
        self.assembler = self.restart()

    # World

    def list_devices(self) -> Iterator[Listed]:
        return self.blocks.list_devices("")

    def attachment_of(self, devno: str) -> str:
        return f"{devno} {self.attachments.get(devno, 0)}"

    def doubt_about(self, devno: str) -> str:
        return self.doubts.get(devno, "")

    def devno_of(self, path: str) -> str:
        disk = self.drill.kernel.disks.get(path)
        return disk.devno if disk else ""

    def announce(self, devno: str) -> None:
        self.announced.append(devno)
        if self.obeys:
            self.rule(devno)

    def is_held(self, devno: str) -> bool:
        return bool(self.drill.kernel.users(devno))

    def backups_wait_for(self) -> str:
        return self.unmounted

    def mount(self, device: str) -> None:
        self.mounted.append(device)

    # What happens

    def rule(self, devno: str) -> None:
        """What udev's rule does with a device."""
        listed = next(one for one in self.list_devices() if one.info.devno == devno)
        survey = discovery.look(listed, self.blocks).survey
        carries = survey.headers[0].target_uuid if survey and survey.headers else None
        self.hidden[devno] = role_of(listed.info, carries, self.mains()).kind

    def mains(self) -> list[Known]:
        return [known for name in ("lasting", "passing") for known in self.kept(name).all()]

    def kept(self, name: str) -> Mains:
        return Mains(str(self.folder / name))

    def engine(self) -> Engine:
        process = Process(self.drill.kernel)
        return Engine(
            mapper=process.mapper,
            blocks=HidingBlocks(process, self.hidden),
            lock_dir=str(self.folder / "locks"),
            backup_dir=self.backups().folder if not self.unmounted else str(self.folder / "none"),
        )

    def backups(self) -> Backups:
        return self.drill.backups()

    def restart(self) -> Assembler:
        self.assembler = Assembler(
            self.engine(),
            self,
            lambda level, text: self.log.append((level, text)),
            lambda: self.now,
            str(self.folder / "config.yaml"),
            self.backups().folder,
            str(self.folder / "lasting"),
            str(self.folder / "passing"),
        )
        return self.assembler

    def configure(self, text: str) -> None:
        (self.folder / "config.yaml").write_text(text)

    def attach(self, *names: str) -> None:
        for name in names:
            disk = self.away.pop(name)
            self.drill.kernel.disks[disk.path] = disk
            self.attachments[disk.devno] = self.attachments.get(disk.devno, 0) + 1
            if self.obeys:
                self.rule(disk.devno)

    def detach(self, *names: str) -> None:
        for name in names:
            disk = self.drill.disk(name)
            self.away[name] = self.drill.kernel.disks.pop(disk.path)
            self.hidden.pop(disk.devno, None)

    def stop(self, name: str) -> None:
        """Take a target out of the kernel, as somebody does by hand."""
        mapped = self.drill.kernel.mapped
        for part in [part for part in mapped if part == name or part.startswith(f"{name}-")]:
            del mapped[part]

    def look(self, seconds: float = 0.0) -> float | None:
        """Let time pass, and look."""
        self.now += seconds
        return self.assembler.look()

    @property
    def active(self) -> set[str]:
        return {name for name in TARGETS if name in self.drill.kernel.mapped}

    def errors(self) -> list[str]:
        return [text for level, text in self.log if level == 3]


def names_of(drill: Drill) -> list[str]:
    return [disk.serial[len("serial-") :] for disk in drill.kernel.disks.values()]


def make_scene(drill: Drill, folder: Path, known: bool = True) -> Scene:
    """The host after a restart; without ``known`` it is another host."""
    away = {name: drill.disk(name).clone() for name in names_of(drill)}
    place = folder / "host"
    if known:
        shutil.copytree(drill.folder, place)
    return Scene(Drill(Kernel(), place, drill.on), folder, away)


@pytest.fixture
def scene(host_a: Drill, tmp_path: Path) -> Scene:
    return make_scene(host_a, tmp_path)


def everything(scene: Scene) -> list[str]:
    return [name for name in scene.away if name != "other"]


# Assembly


@pytest.mark.parametrize("seed", range(12))
def test_disks_in_any_order_become_all_targets(host_a: Drill, tmp_path: Path, seed: int) -> None:
    """Each target is there when its last disk is, and not before."""
    scene = make_scene(host_a, tmp_path)
    order = everything(scene)
    random.Random(seed).shuffle(order)
    seen: set[str] = set()
    for name in order:
        scene.attach(name)
        seen.add(name)
        scene.look(1.0)
        whole = {t for t in TARGETS if {f"main-{t}", *SPARES[t]} <= seen}
        assert scene.active == whole
    scene.drill.check()
    assert sorted(scene.mounted) == [f"/dev/mapper/{name}" for name in TARGETS]
    assert scene.errors() == []


@pytest.mark.parametrize("order", list(itertools.permutations(["main-alpha", "s0", "s1"])))
def test_every_order_of_one_target(host_a: Drill, tmp_path: Path, order: tuple[str, ...]) -> None:
    scene = make_scene(host_a, tmp_path)
    for name in order:
        assert scene.active == set()
        scene.attach(name)
        scene.look(20.0)
    assert scene.active == {"alpha"}
    scene.drill.check(names=["alpha"])


def test_a_missing_spare_is_waited_for_and_given_up(scene: Scene) -> None:
    scene.attach("main-alpha", "s0")
    assert scene.look(10.0) == 50.0
    assert scene.look(49.0) == 1.0
    assert scene.errors() == []
    assert scene.look(1.0) is None
    (error,) = scene.errors()
    assert "serial-s1" in error
    assert scene.active == set()
    # Nothing new is no news.
    scene.look(100.0)
    assert scene.errors() == [error]
    # A hot-plug long after is not too late.
    scene.attach("s1")
    scene.look(5000.0)
    assert scene.active == {"alpha"}
    scene.drill.check(names=["alpha"])
    assert scene.mounted == ["/dev/mapper/alpha"]


def test_degraded_is_allowed_after_the_time(scene: Scene) -> None:
    scene.configure("assemble: {degraded: allowed, timeout: 30}\ntargets: []\n")
    scene.attach("main-alpha", "s0")
    assert scene.look(29.0) == 1.0
    assert scene.active == set()
    scene.look(1.0)
    assert scene.active == {"alpha"}
    scene.drill.check(missing=["s1"], names=["alpha"])


def test_disks_that_come_late_are_waited_for_too(scene: Scene) -> None:
    """The first disk of an enclosure is no reason to go on without the next one."""
    scene.configure("assemble: {degraded: allowed, timeout: 30}\ntargets: []\n")
    scene.look(5000.0)
    scene.attach("main-alpha", "s0")
    assert scene.look(1.0) == 30.0
    assert scene.active == set()
    scene.attach("s1")
    scene.look(1.0)
    assert scene.active == {"alpha"}
    scene.drill.check(names=["alpha"])


def test_a_target_can_be_left_out_by_its_name(scene: Scene) -> None:
    scene.configure(
        "targets:\n- {name: alpha, main: /dev/main-alpha, spares: [/dev/s0, /dev/s1], "
        "assemble: {auto: false}}\n"
    )
    scene.attach(*everything(scene))
    scene.look(100.0)
    assert scene.active == {"beta", "gamma"}


def test_nothing_is_assembled_with_a_faulty_configuration(scene: Scene) -> None:
    scene.configure("targets:\n- nonsense\n")
    scene.attach(*everything(scene))
    assert scene.look(100.0) is None
    assert scene.active == set()
    (error,) = scene.errors()
    assert "nothing is assembled" in error
    # A main is hidden all the same.
    assert sorted(kind for kind in scene.hidden.values() if kind) == ["main"] * 3 + ["spare"] * 5
    scene.configure("targets: []\n")
    scene.look(1.0)
    assert scene.active == set(TARGETS)


def test_nothing_is_assembled_with_a_link_to_a_configuration_that_is_not_there(
    scene: Scene,
) -> None:
    (scene.folder / "config.yaml").symlink_to(scene.folder / "not mounted" / "config.yaml")
    scene.attach(*everything(scene))
    scene.look(100.0)
    assert scene.active == set()
    assert "nothing is assembled" in scene.errors()[0]


def test_a_target_of_the_configuration_that_nothing_tells_of_is_reported(scene: Scene) -> None:
    scene.configure("targets:\n- {name: lost, main: /dev/x, spares: [/dev/y]}\n")
    assert scene.look(59.0) == 1.0
    assert scene.errors() == []
    scene.look(1.0)
    (error,) = scene.errors()
    assert error.startswith("lost: ")


@pytest.mark.parametrize("degraded", ["never", "allowed"])
def test_an_image_of_a_spare_is_not_taken_for_it(scene: Scene, degraded: str) -> None:
    """Data on the spare is newer than its image without any new generation."""
    scene.configure(f"assemble: {{degraded: {degraded}, timeout: 30}}\ntargets: []\n")
    image = scene.away["s0"].clone()
    image.serial, image.path, image.devno = "", "/dev/loop0", "7:0"
    scene.drill.kernel.disks[image.path] = image
    scene.attach("main-alpha", "s1")
    scene.look()
    assert scene.look(100.0) is None
    assert scene.active == set()
    assert any("--use /dev/loop0" in text for text in scene.errors())
    scene.attach("s0")
    scene.look(1.0)
    assert scene.active == {"alpha"}
    scene.drill.check(names=["alpha"])


# Targets of other hosts


def test_a_target_of_another_host_is_hidden_and_left_alone(host_a: Drill, tmp_path: Path) -> None:
    scene = make_scene(host_a, tmp_path, known=False)
    scene.attach("main-alpha")
    scene.look(1.0)
    assert not any(scene.hidden.values())
    scene.attach("s0", "s1")
    scene.look(100.0)
    assert scene.active == set()
    main = scene.drill.disk("main-alpha").devno
    assert scene.hidden[main] == "main"
    assert any("dm-remap-reassemble alpha" in text for _level, text in scene.log)
    # Without its spares nothing tells of it any more.
    scene.detach("s0", "s1")
    scene.look(1.0)
    assert scene.hidden[main] == ""


def test_the_tool_makes_it_one_of_this_host(host_a: Drill, tmp_path: Path) -> None:
    """From then on it comes back by itself, and its main is hidden before its spares are there."""
    scene = make_scene(host_a, tmp_path, known=False)
    scene.attach("main-alpha", "s0", "s1")
    assert scene.drill.results() == {"alpha": "assembled"}
    scene.look()
    assert [known.name for known in scene.kept("lasting").all()] == ["alpha"]
    scene.stop("alpha")
    scene.detach("main-alpha", "s0", "s1")
    scene.restart()
    scene.attach("main-alpha")
    assert scene.hidden[scene.drill.disk("main-alpha").devno] == "main"
    scene.attach("s0", "s1")
    scene.look(1.0)
    assert scene.active == {"alpha"}
    scene.drill.check(names=["alpha"])


def test_the_configuration_makes_it_one_of_this_host(host_a: Drill, tmp_path: Path) -> None:
    scene = make_scene(host_a, tmp_path, known=False)
    scene.attach("main-alpha", "s0", "s1")
    entry = "targets:\n- {name: alpha, main: %s, spares: [/dev/s0, /dev/s1]}\n"
    scene.configure(entry % "/dev/another")
    scene.look(1.0)
    assert scene.active == set()
    scene.configure(entry % "/dev/main-alpha")
    scene.look(1.0)
    assert scene.active == {"alpha"}


# What was stopped, removed, or failed


def test_what_somebody_stopped_is_left_alone(scene: Scene) -> None:
    scene.attach(*everything(scene))
    scene.look()
    assert scene.active == set(TARGETS)
    scene.look()
    scene.stop("alpha")
    scene.look(100.0)
    assert scene.active == {"beta", "gamma"}
    # Until one of its disks is attached anew.
    scene.detach("s1")
    scene.look(1.0)
    scene.attach("s1")
    scene.look(1.0)
    assert scene.active == set(TARGETS)
    scene.drill.check()


def test_a_restart_of_the_service_assembles_it(scene: Scene) -> None:
    scene.attach("main-alpha", "s0", "s1")
    scene.look()
    scene.look()
    scene.stop("alpha")
    scene.restart()
    scene.look()
    assert scene.active == {"alpha"}


def test_a_removed_target_shows_its_main(scene: Scene) -> None:
    scene.attach("main-alpha", "s0", "s1")
    scene.look()
    main = scene.drill.disk("main-alpha").devno
    assert scene.hidden[main] == "main"
    scene.look()
    engine = scene.engine()
    paths = tuple(scene.drill.disk(name).path for name in ("s0", "s1"))
    seen = engine.see("alpha", None, paths)
    engine.apply(plan_absent("alpha", seen.target, seen, True))
    assert scene.active == set()
    scene.look(1.0)
    assert scene.hidden[main] == ""
    assert "alpha" not in {known.name for known in scene.mains()}
    scene.look(100.0)
    assert scene.active == set()


def test_what_fails_is_tried_three_times(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fail(*_arguments: object, **_options: object) -> None:
        tried.append(scene.now)
        raise Refused("busy")

    monkeypatch.setattr("dm_remap.assembler.assemble", fail)
    scene.attach("main-alpha", "s0", "s1")
    assert scene.look() == 2.0
    assert scene.look(2.0) == 2.0
    assert scene.look(2.0) is None
    scene.look(100.0)
    assert len(tried) == 3
    monkeypatch.undo()
    scene.detach("s0")
    scene.attach("s0")
    scene.look(1.0)
    assert scene.active == {"alpha"}


def test_one_that_fails_keeps_no_other_from_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.attach(*everything(scene))
    scene.drill.disk("s2").read_only = True
    scene.look()
    scene.look(100.0)
    assert scene.active == {"alpha", "gamma"}
    assert any("read-only" in text for text in scene.errors())


# Backups that cannot be read yet


def test_without_the_backups_the_whole_time_is_waited(scene: Scene) -> None:
    scene.attach("main-alpha", "s0", "s1")
    main = scene.drill.disk("main-alpha")
    info = next(one.info for one in scene.list_devices() if one.info.devno == main.devno)
    target = scene.backups().of("alpha").target_uuid
    scene.kept("lasting").set([Known(target, "alpha", (of_info(info),))])
    scene.unmounted = "/var"
    scene.restart()
    assert scene.look(59.0) == 1.0
    assert scene.assembler.needs_mounts
    assert scene.assembler.concerns([Event(MOUNT, "", "")])
    # Their folder seems empty, which must make the host forget nothing.
    assert [known.name for known in scene.kept("lasting").all()] == ["alpha"]
    scene.look(1.0)
    assert scene.active == {"alpha"}


def lose_backups(scene: Scene) -> Path:
    """The file system that they are on is not mounted, and fstab does not tell of it."""
    place = scene.folder / "not mounted"
    Path(scene.backups().folder).rename(place)
    return place


def test_a_mount_that_fstab_does_not_tell_of_is_waited_for(scene: Scene) -> None:
    scene.attach("main-alpha", "s0", "s1")
    scene.look()
    scene.stop("alpha")
    place = lose_backups(scene)
    scene.restart()
    assert scene.look(59.0) == 1.0
    assert scene.active == set()
    assert scene.assembler.concerns([Event(MOUNT, "", "")])
    place.rename(scene.backups().folder)
    scene.look(0.5)
    assert scene.active == {"alpha"}


@pytest.mark.parametrize("known", [True, False])
def test_without_a_backup_nothing_is_assembled_degraded(
    host_a: Drill, tmp_path: Path, known: bool
) -> None:
    """The spare that comes a second later may be the only one that was in use last."""
    scene = make_scene(host_a, tmp_path, known)
    scene.configure(
        "assemble: {degraded: allowed, timeout: 30}\ntargets:\n"
        "- {name: alpha, main: /dev/main-alpha, spares: [/dev/s0, /dev/s1]}\n"
    )
    if known:
        scene.look()
        lose_backups(scene)
        scene.restart()
    scene.attach("main-alpha", "s0")
    scene.look()
    scene.look(100.0)
    assert scene.active == set()
    assert any("no backup on this host" in text for text in scene.errors())


@pytest.mark.parametrize("backups", ["there", "not mounted", "damaged"])
def test_the_spare_that_was_in_use_last_is_waited_for(tmp_path: Path, backups: str) -> None:
    """By what the other one carries, a chunk of its is still on the main, with old data."""
    made = make_drill(tmp_path / "made")
    made.disk("s0").dead = True
    chunk = next(c for c in range(CHUNKS) if c not in made.on["alpha"])
    made.engine().remap("alpha", [(chunk * CHUNK, 1)], patience=Patience(backoff=0))
    made.disk("main-alpha").fill(chunk * CHUNK, STALE * CHUNK)
    made.disk("s0").dead = False
    scene = make_scene(made, tmp_path)
    scene.configure("assemble: {degraded: allowed, timeout: 30}\ntargets: []\n")
    scene.look()
    if backups == "not mounted":
        lose_backups(scene)
    if backups == "damaged":
        for path in Path(scene.backups().folder).glob("*/*.slot"):
            path.write_bytes(b"")
    scene.restart()
    scene.attach("main-alpha", "s0")
    scene.look()
    scene.look(100.0)
    assert scene.active == set()
    scene.attach("s1")
    scene.look(1.0)
    scene.look(100.0)
    assert scene.active == {"alpha"}
    scene.drill.check(names=["alpha"])


def test_what_another_host_used_last_is_not_assembled_degraded(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has committed since, this host's backups do not tell."""
    scene.configure("assemble: {degraded: allowed, timeout: 30}\ntargets: []\n")
    monkeypatch.setattr("dm_remap.assembler.host_id", lambda: uuid.UUID(int=5))
    scene.attach("main-alpha", "s0")
    scene.look()
    scene.look(100.0)
    assert scene.active == set()
    scene.attach("s1")
    scene.look(1.0)
    assert scene.active == {"alpha"}


def test_an_old_generation_is_not_assembled_without_the_backups(scene: Scene) -> None:
    """A spare that was replaced tells of a target that was complete then."""
    scene.attach("main-gamma", "s4")
    scene.look()
    target = scene.backups().of("gamma")
    (known,) = [one for one in scene.kept("lasting").all() if one.name == "gamma"]
    assert known.generation == target.generation
    scene.stop("gamma")
    lose_backups(scene)
    scene.kept("lasting").set([replace(known, generation=target.generation + 1)])
    scene.restart()
    scene.look()
    scene.look(100.0)
    assert scene.active == set()
    assert any(f"has used generation {target.generation + 1}" in text for text in scene.errors())
    # The target's spare of today.
    scene.kept("lasting").set([known])
    scene.restart()
    scene.look()
    scene.look(100.0)
    assert scene.active == {"gamma"}


def test_a_damaged_backup_still_tells_its_generation(scene: Scene) -> None:
    """Without it, the one before would be the witness."""
    scene.configure("assemble: {degraded: allowed, timeout: 30}\ntargets: []\n")
    target = scene.backups().of("alpha")
    folder = Path(scene.backups().folder) / str(target.target_uuid)
    (folder / f"{target.generation + 1:020d}.slot").write_bytes(b"")
    scene.attach("main-alpha", "s0")
    scene.look()
    scene.look(100.0)
    assert scene.active == set()
    assert any(f"has used generation {target.generation + 1}" in text for text in scene.errors())


def test_with_the_mount_it_goes_on_at_once(scene: Scene) -> None:
    scene.attach("main-alpha", "s0", "s1")
    scene.unmounted = "/var"
    scene.restart()
    scene.look(5.0)
    assert scene.active == set()
    scene.unmounted = ""
    scene.restart()
    scene.look(1.0)
    assert scene.active == {"alpha"}


# Hiding


@pytest.mark.parametrize("lost", ["all", "damaged"])
def test_a_main_is_not_shown_because_its_backups_cannot_be_read(scene: Scene, lost: str) -> None:
    """They may be on a file system that fstab does not tell of."""
    scene.attach("main-alpha", "s0", "s1")
    scene.look()
    folder = Path(scene.backups().folder)
    if lost == "all":
        folder.rename(scene.folder / "not mounted")
    else:
        for path in folder.glob("*/*.slot"):
            path.write_bytes(b"")
    scene.stop("alpha")
    scene.announced.clear()
    assert scene.restart().hide_mains() == set()
    assert {known.name for known in scene.kept("lasting").all()} == set(TARGETS)
    scene.detach("s1")
    scene.look()
    assert scene.hidden[scene.drill.disk("main-alpha").devno] == "main"
    assert scene.announced == []


def test_a_removal_shows_the_main_also_without_backups(scene: Scene) -> None:
    scene.attach("main-alpha", "s0", "s1")
    scene.look()
    shutil.rmtree(scene.backups().folder)
    engine = scene.engine()
    seen = engine.see("alpha", None, ("/dev/s0", "/dev/s1"))
    engine.apply(plan_absent("alpha", seen.target, seen, True))
    scene.look(1.0)
    assert scene.hidden[scene.drill.disk("main-alpha").devno] == ""


def test_the_mains_are_kept_when_all_is_assembled(scene: Scene) -> None:
    scene.attach(*everything(scene))
    scene.look()
    assert {known.name for known in scene.kept("lasting").all()} == set(TARGETS)
    assert scene.kept("passing").all() == []
    for name in TARGETS:
        assert scene.hidden[scene.drill.disk(f"main-{name}").devno] == "main"


def test_a_main_that_udev_shows_by_mistake_is_hidden_first(scene: Scene) -> None:
    """The backups are enough to know it."""
    scene.obeys = False
    scene.attach(*everything(scene))
    scene.obeys = True
    assert scene.restart().hide_mains() == set(scene.announced)
    assert len(scene.announced) == 3


def test_udev_is_not_asked_for_ever(scene: Scene) -> None:
    scene.obeys = False
    scene.attach("main-alpha", "s0", "s1")
    for _turn in range(5):
        scene.look(1.0)
    assert sorted(scene.announced) == sorted(
        disk.devno for disk in scene.drill.kernel.disks.values()
    )


def test_a_main_that_is_shown_again_is_hidden_again(scene: Scene) -> None:
    """An event whose rule failed must not be the last word."""
    scene.attach("main-alpha", "s0")
    main = scene.drill.disk("main-alpha")
    for _turn in range(2):
        scene.hidden[main.devno] = ""
        scene.look(1.0)
        assert scene.hidden[main.devno] == "main"
        scene.look(1.0)


# The loop


def test_the_service_is_ready_when_nothing_can_be_mounted_by_mistake(scene: Scene) -> None:
    scene.attach("main-alpha", "s0", "s1")
    scene.look()
    scene.hidden.clear()
    scene.obeys = False
    main = scene.drill.disk("main-alpha").devno
    happened: list[str] = []
    answers: Iterator[Sequence[Event] | None] = iter(
        [[ADD], [Event("change", main, "")], None],
    )

    def hear(_seconds: float | None) -> Sequence[Event] | None:
        happened.append("hear")
        return next(answers)

    serve(
        scene.restart(),
        hear,
        lambda: happened.append("ready"),
        lambda: happened.append("check"),
        lambda: scene.now,
    )
    assert happened == ["hear", "hear", "ready", "check", "hear"]


def test_the_service_looks_again_when_time_is_over(scene: Scene) -> None:
    scene.configure("assemble: {degraded: allowed, timeout: 30}\ntargets: []\n")
    scene.attach("main-alpha", "s0")
    waits: list[float | None] = []

    def hear(seconds: float | None) -> Sequence[Event] | None:
        waits.append(seconds)
        if seconds is None:
            return None
        scene.now += seconds
        return []

    serve(scene.assembler, hear, lambda: None, clock=lambda: scene.now)
    # First it waited for udev, which did not tell of the main.
    assert waits == [120.0, 30.0, None]
    assert scene.active == {"alpha"}
    (error,) = scene.errors()
    assert scene.drill.disk("main-alpha").devno in error


def test_mains_are_hidden_also_where_nothing_can_be_assembled(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel without dm-integrity, or backups that nobody understands."""
    scene.attach("main-alpha", "s0", "s1")
    scene.look()
    scene.hidden.clear()

    def fail(*_arguments: object) -> None:
        raise Refused("missing")

    monkeypatch.setattr(Backups, "newest", fail)
    happened: list[str] = []
    with pytest.raises(Refused):
        serve(
            scene.restart(),
            lambda _seconds: [Event("change", devno, "") for devno in scene.announced],
            lambda: happened.append("ready"),
            fail,
            lambda: scene.now,
        )
    assert happened == ["ready"]
    assert scene.hidden == {scene.drill.disk("main-alpha").devno: "main"}


def test_events_of_what_is_in_use_are_no_news(scene: Scene) -> None:
    scene.attach("main-alpha", "s0", "s1")
    concerns = scene.assembler.concerns
    scene.look()
    spare = scene.drill.disk("s0").devno
    metadata = scene.engine().require("alpha").metadata
    own = f"DMREMAP-{metadata.target_uuid.hex}"
    assert not concerns([Event("change", spare, "")])
    assert not concerns([Event("change", "253:9", f"{own}-map")])
    assert not concerns([Event("change", "253:9", own)])
    assert not concerns([Event(MOUNT, "", "")])
    assert concerns([Event("remove", "253:9", f"{own}-new")])
    assert not concerns([Event("remove", "253:9", f"{own}-frozen")])
    assert concerns([Event("remove", "253:9", f"{own}-spare0")])
    assert concerns([Event("remove", spare, "")])
    assert concerns([Event("change", "8:999", "")])
    # Some events were lost.
    assert concerns([Event("", "", "")])
    scene.stop("alpha")
    assert concerns([Event("remove", "253:9", own)])


def test_the_status_is_told_in_ascii(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("dm_remap.assembler.notify", told.append)
    scene.configure('targets:\n- {name: lost, main: "/dev/x", spares: [/dev/y]}\n')
    scene.drill.kernel.add_disk("blank", 8)
    scene.look(1.0)
    assert told == ["STATUS=lost waiting: no device tells of it"]
