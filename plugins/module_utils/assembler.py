# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The service that assembles targets when their disks appear, at boot and later.

It also keeps who the host's mains are, for udev's rule, and lets udev look again at devices that
are to be hidden or shown. What is decided is in `boot` and `hiding`; docs/boot.md describes it.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from . import backups, blockdev, configuration, fstab, replacement, stack
from .assembly import ACTIVE, ASSEMBLED, Assembled, assemble
from .blockdev import DeviceInfo, Listed
from .boot import Clocks, Decision, Situation, Step, decide
from .cli.text import clean
from .committing import host_id
from .configuration import Configuration
from .discovery import Discovery, Host, State, TargetFound
from .engine import Engine
from .errors import DmRemapError
from .fingerprint import of_entry
from .first_look import LASTING, PASSING
from .format import Metadata
from .hiding import SPARE, Known, Mains, roles_of
from .marks import UUID_PREFIX
from .order import Order
from .reflex import wake_up
from .service import notify
from .udev import Event, Monitor

# What the log calls these (sd-daemon(3)).
ERROR, WARNING, INFO = 3, 4, 6

# What failed may have met a disk that was changing just then.
TRIES, RETRY_SECONDS = 3, 2.0
# A disk and its partitions appear one after the other, and one look does for all.
QUIET_SECONDS, QUIET_LIMIT = 0.2, 2.0
# udev needs a fraction of a second to look at a disk again, but at boot it looks at all of them.
# What waits for this is started then, whether mains are hidden or not. The unit's time is longer.
HIDING_SECONDS = 120.0
# The action of an event that tells of mounts, not of a device.
MOUNT = "mount"

Say = Callable[[int, str], None]


def known_of(metadata: Metadata) -> Known:
    """What metadata tells of the mains."""
    entries = [metadata.config["main"]]
    if replacement.under_way(metadata):
        entries.append(metadata.config["replacement"]["main"])
    name = metadata.config.get("name")
    return Known(
        metadata.target_uuid,
        name if isinstance(name, str) else "",
        tuple(of_entry(entry) for entry in entries),
        metadata.generation,
    )


def _was_elsewhere(target: TargetFound) -> bool:
    """Whether another host has committed what a target is found with."""
    return target.metadata is not None and target.metadata.host_id != host_id()


class World(Protocol):
    """What the service asks of the host, beside the engine."""

    def list_devices(self) -> Iterable[Listed]:
        """List all block devices but for our own mapped ones, without opening one."""

    def attachment_of(self, devno: str) -> str:
        """What is another one each time that a device gets this number."""

    def doubt_about(self, devno: str) -> str:
        """Why a device is not to be used yet, or ""."""

    def devno_of(self, path: str) -> str:
        """Device number of a path, or "" where there is none."""

    def announce(self, devno: str) -> None:
        """Let udev look at a device again."""

    def is_held(self, devno: str) -> bool:
        """Whether a mapped device of ours stands on a device."""

    def backups_wait_for(self) -> str:
        """The mount point that the backups are on and that is not mounted yet, or ""."""

    def mount(self, device: str) -> None:
        """Have mounted what fstab says of a device."""


class Computer:
    """This host, as the service sees it."""

    def list_devices(self) -> Iterable[Listed]:
        """See `World`."""
        return blockdev.list_devices(UUID_PREFIX)

    def attachment_of(self, devno: str) -> str:
        """See `World`."""
        return blockdev.attachment_of(devno)[0]

    def doubt_about(self, devno: str) -> str:
        """See `World`."""
        return blockdev.doubt_about(devno)

    def devno_of(self, path: str) -> str:
        """See `World`."""
        try:
            return blockdev.devno_of(path)
        except DmRemapError:
            return ""

    def announce(self, devno: str) -> None:
        """See `World`."""
        blockdev.announce(devno)

    def is_held(self, devno: str) -> bool:
        """See `World`."""
        return blockdev.is_held(devno, UUID_PREFIX)

    def backups_wait_for(self) -> str:
        """See `World`."""
        mounted = {fstab.plain(point) for point in blockdev.mount_points()}
        return fstab.not_mounted_above(backups.FOLDER, _fstab(), mounted)

    def mount(self, device: str) -> None:
        """Let systemd start the mounts; those that it is about to start anyway are merged."""
        wanted = self.devno_of(device)
        points = [
            mount.point
            for mount in fstab.mounts(_fstab())
            if mount.auto and self.devno_of(mount.device) == wanted
        ]
        if points:
            subprocess.run(["systemctl", "start", "--no-block", "--", *points], check=False)


def _fstab() -> str:
    try:
        with open("/etc/fstab", encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


class Assembler:
    """Looks at the host and does what is decided.

    Args:
        engine: the host's targets.
        world: the rest of the host.
        say: takes a line for the log, with its level.
        clock: seconds that only rise.
        config: path of the configuration, which need not exist.
        kept: folder of the backups.
        lasting: folder for the mains of the host's own targets.
        passing: folder for other mains that were found.
    """

    def __init__(
        self,
        engine: Engine,
        world: World,
        say: Say,
        clock: Callable[[], float] = time.monotonic,
        config: str = configuration.PATH,
        kept: str = backups.FOLDER,
        lasting: str = LASTING,
        passing: str = PASSING,
    ) -> None:
        self._engine = engine
        self._world = world
        self._say = say
        self._clock = clock
        self._config = config
        self._backups = backups.Backups(kept)
        self._lasting = Mains(lasting)
        self._passing = Mains(passing)
        self._clocks = Clocks(clock())
        self._start = clock()
        self._told: dict[str, tuple[Step, str]] = {}
        self._failures: dict[tuple[uuid.UUID, frozenset[str]], int] = {}
        self._announced: dict[str, tuple[str, str]] = {}
        self._active: frozenset[str] = frozenset()
        # Whether backups could not be read at the last look, perhaps because of a missing mount.
        self.needs_mounts = False
        self._unmounted = False

    # Hiding

    def hide_mains(self) -> set[str]:
        """Let udev hide the known mains that it shows; the numbers of these devices.

        That happens where udev has looked at a main before its rule was there, as in an initial
        RAM disk.
        """
        try:
            self._keep_own()
        except Exception as error:
            # Those that are kept already can be hidden all the same.
            self._say(ERROR, f"the backups cannot be understood: {error!r}")
        if not self._lasting.all():
            return set()
        return self._announce(
            (listed.info, None)
            for listed in self._world.list_devices()
            if listed.info.hidden != SPARE
        )

    def tell_of_shown(self, devnos: Iterable[str]) -> None:
        """Report devices that udev was to hide and has not looked at yet."""
        for devno in sorted(devnos):
            text = f"udev has not looked again at device {devno}, which is a target's main"
            self._say(ERROR, f"{text}, so it may be mounted in the target's place")

    def _announce(self, devices: Iterable[tuple[DeviceInfo, uuid.UUID | None]]) -> set[str]:
        """Let udev look again at devices that are not hidden as they should be; their numbers.

        Args:
            devices: each with the target whose metadata it carries.
        """
        known = [*self._lasting.all(), *self._passing.all()]
        found = set()
        for info, role in roles_of(devices, known):
            if role.kind == info.hidden:
                # Should it change later, that is something new to ask for.
                self._announced.pop(info.devno, None)
            asked = (self._world.attachment_of(info.devno), role.kind)
            # Where udev does not do as it is told, asking again and again would never end.
            if role.kind != info.hidden and self._announced.get(info.devno) != asked:
                self._announced[info.devno] = asked
                self._world.announce(info.devno)
                found.add(info.devno)
        return found

    def _keep_own(self) -> None:
        """Keep who the mains of the host's own targets are, as its backups tell.

        Only the note of a removal lets one be forgotten. Backups that are not there may be damaged,
        or on a file system that is mounted later by something else than fstab.
        """
        if self._world.backups_wait_for():
            return
        own = {known.target: known for known in self._lasting.all()}
        for target in self._backups.targets():
            metadata = self._backups.newest(target)
            if metadata and (target not in own or own[target].generation <= metadata.generation):
                own[target] = known_of(metadata)
        removed = {target for target in own if self._backups.removed(target)}
        self._keep(self._lasting, (own[target] for target in own.keys() - removed))

    def _keep_others(self, found: Discovery) -> None:
        """Keep who the mains of other targets are, as long as their spares are there."""
        lasting = {known.target for known in self._lasting.all()}
        self._keep(
            self._passing,
            (
                known_of(target.metadata)
                for target in found.targets
                if target.metadata and target.main and target.uuid not in lasting
                if not any(problem.code == "removed" for problem in target.problems)
            ),
        )

    def _keep(self, mains: Mains, wanted: Iterable[Known]) -> None:
        try:
            mains.set(wanted)
        except OSError as error:
            self._tell("", Step.WAIT, f"mains cannot be kept: {error}", WARNING)

    # Assembling

    def look(self) -> float | None:
        """Look at the host and do what is decided; seconds until that is to be done again.

        None means: not before something happens.
        """
        host = self._engine.discover()
        found = host.decide()
        self._keep_own()
        self._keep_others(found)
        self._announce(
            (device.info, device.carries)
            for device in host.found
            # What was not read may be the spare that it is hidden as.
            if device.survey or device.info.hidden != SPARE
        )
        config = self._configuration()
        if config is None:
            return None
        self.needs_mounts = self._unmounted = bool(self._world.backups_wait_for())
        due = [self._handle(host, target, config) for target in found.targets]
        due.append(self._tell_of_unseen(found, config))
        self._active = frozenset(self._engine.target_names())
        self._show_status()
        return min((seconds for seconds in due if seconds is not None), default=None)

    def _configuration(self) -> Configuration | None:
        """The configuration; None, with the reason in the log, where it cannot be used."""
        # A link that leads nowhere is one: what it leads to may not be mounted yet.
        if not os.path.lexists(self._config):
            return Configuration(self._config, ())
        try:
            return configuration.load(self._config)
        except DmRemapError as error:
            # What must not be assembled by itself is written there.
            self._tell("", Step.GIVE_UP, f"nothing is assembled, because {error}", ERROR)
            return None

    def _handle(self, host: Host, target: TargetFound, config: Configuration) -> float | None:
        """Decide about a target and do it; seconds until the next decision."""
        infos = [info for info in (target.main, target.new_main, *target.spares.values()) if info]
        attachments = frozenset(self._world.attachment_of(info.devno) for info in infos)
        if target.state is State.ACTIVE:
            self._clocks.spend(target.uuid, attachments)
        policy = config.assembly_of(target.name)
        expected = self._is_known(host, target, config)
        remembered = {known.target: known.generation for known in self._lasting.all()}
        backup = target.uuid in host.kept
        witness = not self._unmounted and (backup or target.uuid not in remembered)
        doubts = ((info.path, self._world.doubt_about(info.devno)) for info in infos)
        decision = decide(
            Situation(
                target,
                policy,
                expected,
                witness,
                self._clocks.waited(
                    target.uuid, attachments, expected, policy.timeout, self._clock()
                ),
                tuple(f"{path} {doubt}" for path, doubt in doubts if doubt),
                self._clocks.spent(target.uuid, attachments),
                backup and not _was_elsewhere(target),
                # A backup that is damaged says by its name how far the host has got.
                max(remembered.get(target.uuid, 0), *self._backups.generations(target.uuid), 0),
            )
        )
        self._tell_decision(target.name or str(target.uuid), decision)
        if decision.step is Step.WAIT and not witness:
            self.needs_mounts = True
        if decision.step is not Step.ASSEMBLE:
            return decision.left
        if self._assemble(host, target, decision):
            return None
        tried = self._failures.get((target.uuid, attachments), 0) + 1
        self._failures[target.uuid, attachments] = tried
        if tried < TRIES:
            return RETRY_SECONDS
        self._clocks.spend(target.uuid, attachments)
        return None

    def _is_known(self, host: Host, target: TargetFound, config: Configuration) -> bool:
        """Whether the host has used a target before, or its configuration names its main."""
        if target.uuid in host.kept or target.uuid in {k.target for k in self._lasting.all()}:
            return True
        entry = config.entry(target.name)
        if entry is None or target.main is None:
            return False
        return self._world.devno_of(entry.request.main) == target.main.devno

    def _assemble(self, host: Host, target: TargetFound, decision: Decision) -> bool:
        """Assemble a target; whether it is active then."""
        order = Order(name=str(target.uuid), degraded=decision.degraded)
        try:
            (done,) = assemble(self._engine, order, host=host).targets
        except Exception as error:
            # Whatever it is, it must not keep other targets from being assembled.
            self._say(ERROR, f"{target.name}: not assembled: {error or repr(error)}")
            return False
        return self._tell_result(done)

    def _tell_result(self, done: Assembled) -> bool:
        name = done.target.name
        for warning in done.warnings:
            self._say(WARNING, f"{name}: {warning}")
        if done.result not in (ACTIVE, ASSEMBLED):
            self._say(ERROR, f"{name}: not assembled: {done.error}")
            return False
        self._say(INFO, f"{name}: assembled, /dev/mapper/{name} is there")
        self._world.mount(f"/dev/mapper/{name}")
        return True

    def _tell_of_unseen(self, found: Discovery, config: Configuration) -> float | None:
        """Report targets of the configuration that no device tells of; seconds until that."""
        seen = {target.name for target in found.targets}
        left = []
        for entry in config.entries:
            name, policy = entry.request.name, entry.assembly
            if name in seen or not policy.auto:
                continue
            wait = policy.timeout - (self._clock() - self._start)
            reason = "no device tells of it"
            if wait > 0:
                left.append(wait)
                self._tell_decision(name, Decision(Step.WAIT, reason))
            else:
                remedy = "attach one of its spares, or make it with the module target"
                self._tell_decision(name, Decision(Step.GIVE_UP, reason, remedy))
        return min(left, default=None)

    # Telling

    def _tell_decision(self, name: str, decision: Decision) -> None:
        level = ERROR if decision.step is Step.GIVE_UP else INFO
        verb = {Step.GIVE_UP: "given up: ", Step.WAIT: "waiting: "}.get(decision.step, "")
        remedy = f"; {decision.remedy}" if decision.remedy else ""
        text = f"{verb}{decision.reason}{remedy}"
        self._tell(name, decision.step, text, level)

    def _tell(self, name: str, step: Step, text: str, level: int) -> None:
        """Log what is decided about a target, once until it changes."""
        if self._told.get(name) != (step, text):
            self._told[name] = (step, text)
            self._say(level, f"{name}: {text}" if name else text)

    def _show_status(self) -> None:
        open_ones = [
            f"{name} {text}"
            for name, (step, text) in sorted(self._told.items())
            if name and step in (Step.WAIT, Step.GIVE_UP) and name not in self._active
        ]
        status = clean("; ".join(open_ones)) or "nothing to wait for"
        # A model's name may be of any characters.
        notify("STATUS=" + status.encode("ascii", "backslashreplace").decode("ascii"))

    # Events

    def concerns(self, events: Sequence[Event]) -> bool:
        """Whether something has happened that may change what was decided."""
        if self.needs_mounts and any(event.action == MOUNT for event in events):
            return True
        # While a main is being replaced, there is one more.
        if any(event.volume.endswith(stack.new_main_name("")) for event in events):
            return True
        # A spare that was taken out must not be all that is remembered of the target.
        if any(e.action == "remove" and stack.SPARE_UUID.match(e.volume) for e in events):
            return True
        if any(self._is_of_a_disk(event) for event in events):
            return True
        if not any(stack.TARGET_UUID.match(event.volume) for event in events):
            return False
        now = frozenset(self._engine.target_names())
        if self._active - now:
            # Whoever removes a target notes that before letting go of this.
            with self._engine.locked_host():
                pass
        return now != self._active

    def _is_of_a_disk(self, event: Event) -> bool:
        if event.action == MOUNT or event.volume.startswith(UUID_PREFIX):
            return False
        # Each commit is followed by an event of each spare of an active target.
        return event.action != "change" or not self._world.is_held(event.devno)


class Ear:
    """Hears of what happens on the host.

    Args:
        monitor: tells of block devices.
        stop: a file descriptor that can be read when the service is to end.
    """

    def __init__(self, monitor: Monitor, stop: int) -> None:
        self._monitor = monitor
        self._stop = stop
        self._mounts = open("/proc/self/mountinfo", "rb")  # noqa: SIM115
        self._poll = select.poll()
        self._poll.register(stop, select.POLLIN)
        self._poll.register(monitor.fileno(), select.POLLIN)
        # The kernel reports each change of the mounts once (proc(5)).
        self._poll.register(self._mounts, select.POLLPRI)

    def hear(self, seconds: float | None) -> list[Event] | None:
        """What happens next, with what follows at once; None if the service is to end.

        Args:
            seconds: how long to wait for it, None for ever. Then the list is empty.
        """
        events: list[Event] = []
        end = time.monotonic() + QUIET_LIMIT
        ready = self._ready(seconds)
        while ready:
            if self._stop in ready:
                return None
            if self._mounts.fileno() in ready:
                events.append(Event(MOUNT, "", ""))
            events += iter(self._monitor.next, None)
            ready = self._ready(QUIET_SECONDS) if time.monotonic() < end else set()
        return events

    def _ready(self, seconds: float | None) -> set[int]:
        found = self._poll.poll(None if seconds is None else max(seconds, 0.0) * 1000)
        return {number for number, _what in found}


def serve(
    assembler: Assembler,
    hear: Callable[[float | None], Sequence[Event] | None],
    ready: Callable[[], None],
    check: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Look, and look again when something has happened, until the service is to end.

    Args:
        assembler: looks and acts.
        hear: see `Ear.hear`.
        ready: called once nothing known can be mounted by mistake any more.
        check: raises where nothing can be assembled. Mains are hidden all the same.
        clock: seconds that only rise.
    """
    asked, end = assembler.hide_mains(), clock() + HIDING_SECONDS
    while asked and clock() < end:
        events = hear(end - clock())
        if events is None:
            return
        asked -= {event.devno for event in events}
    assembler.tell_of_shown(asked)
    ready()
    check()
    while True:
        left = assembler.look()
        due = None if left is None else clock() + left
        while True:
            events = hear(None if due is None else due - clock())
            if events is None:
                return
            if not events or assembler.concerns(events):
                break


def _say(level: int, text: str) -> None:
    for line in text.splitlines():
        sys.stderr.write(f"<{level}>{clean(line)}\n")
    sys.stderr.flush()


def main() -> int:
    """Assemble until SIGTERM or SIGINT; returns the exit status."""
    with wake_up() as (stop, wake):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: wake())
        try:
            engine = Engine(progress=lambda text: _say(INFO, text))
            assembler = Assembler(engine, Computer(), _say)
            ear = Ear(Monitor(), stop)
            serve(assembler, ear.hear, lambda: notify("READY=1"), engine.check_host)
        except DmRemapError as error:
            _say(ERROR, str(error))
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
