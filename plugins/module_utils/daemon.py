# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""dm-remapd: sees block errors, finds out what they mean, and tells whoever asks.

The event loop makes no call that could block: the journal, device-mapper and each disk have a
thread of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import logging
import os
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import Sequence
from typing import Any, Callable

from . import api, credentials, events, settings
from .blockdev import SECTOR_BYTES, BlockDevice, node_of
from .errors import DmRemapError, MissingKernelFeature
from .events import Draft, Origin, local_origin
from .inventory import Guarded, backed_up_generation, guarded_targets
from .journal import Journal, Observation, Page
from .probing import DeviceState, Readable, device_state, kernel_name, physical_block
from .threads import Worker
from .tracing import READ, BlockError, TraceInstance, parse_lines
from .watching import Answer, Patience, Question, Watcher, ask

TARGET_UUID_PREFIX = "DMREMAP-"
BACKUP_FOLDER = "backup"

_TICK_SECONDS = 1.0
_CHECK_EVERY_TICKS = 10
_RETRY_SECONDS = 5.0
_DEVICE_MAPPER_SECONDS = 10.0
_STUCK_SECONDS = 10.0
# Room for a burst of old events when the daemon starts, to know what was reported.
_RECENT_EVENTS = 1000

log = logging.getLogger("dm-remapd")


class Host:
    """What the daemon needs of the machine; tests replace it.

    Args:
        state_directory: where the engine keeps its backups.
    """

    def __init__(self, state_directory: str) -> None:
        self._backups = os.path.join(state_directory, BACKUP_FOLDER)
        self._tables: Any = None

    def targets(self) -> list[Guarded]:
        """Return the active targets."""
        if self._tables is None:
            from .devmapper import DeviceMapper

            self._tables = DeviceMapper()
        return guarded_targets(
            self._tables,
            TARGET_UUID_PREFIX,
            generation_of=lambda target: backed_up_generation(self._backups, target),
        )

    def state(self, devno: str) -> DeviceState:
        """Return whether a device can be asked."""
        return device_state(devno)

    def open_main(self, devno: str) -> tuple[Readable, int]:
        """Open a device past the page cache; also return its physical block in sectors."""
        device = BlockDevice(node_of(devno))
        return device, max(device.logical_block, physical_block(devno)) // SECTOR_BYTES

    def name(self, devno: str) -> str:
        """Return the kernel's name of a device."""
        return kernel_name(devno)


class Daemon:
    """The daemon without its command line.

    Args:
        configuration: what `daemon.json` says.
        origin: who reports.
        trace: the tracefs instance.
        host: the machine.
        clock: seconds that only rise.
    """

    def __init__(
        self,
        configuration: settings.Settings,
        origin: Origin,
        trace: TraceInstance,
        host: Host,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = configuration
        self._origin = origin
        self._trace = trace
        self._host = host
        self._clock = clock
        self._patience = Patience(configuration.probe_seconds, configuration.again_seconds)
        self._watcher = Watcher(self._patience, clock)
        self._journal_thread = Worker("journal")
        self._table_thread = Worker("device-mapper")
        self._disk_threads: dict[str, Worker] = {}
        self._waiting: dict[str, list[Observation]] = collections.defaultdict(list)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._troubles: dict[str, str] = {}
        self._counts: collections.Counter[str] = collections.Counter()
        self._written: collections.Counter[str] = collections.Counter()
        self._targets: list[Guarded] = []
        self._newest = 0
        self._stopping = False
        self._journal: Any = None
        self.journal_id = ""

    # What the interface shows

    async def page(self, after: int, limit: int, wait: float) -> Page:
        """Return events after a cursor, waiting up to `wait` seconds for the first one."""
        deadline = self._clock() + wait
        while True:
            news = self._news
            page: Page = await self._journal_thread.call(self._journal.read, after, limit)
            left = deadline - self._clock()
            # A cursor from the future is of another journal; its owner must know at once.
            if page.events or after > page.newest or left <= 0 or self._stopping:
                return page
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(news), left)

    def health(self) -> dict[str, Any]:
        """Return the state; `status` is `ok` when errors are seen and explained."""
        troubles = dict(self._troubles)
        if self._journal_thread.busy_seconds() > _STUCK_SECONDS:
            troubles["journal"] = f"{self._settings.journal}: its disk does not answer"
        blind = {"tracing", "journal"} & set(troubles)
        return {
            "status": "blind" if blind else "degraded" if troubles else "ok",
            "host": self._origin.host,
            "troubles": dict(sorted(troubles.items())),
            "targets": len(self._targets),
            "newest": self._newest,
            "waiting": sum(len(items) for items in self._waiting.values()),
            "errors": self._counts["errors"],
            "bios": self._counts["bios"],
            "overruns": self._counts["overruns"],
            "merged": self._counts["merged"],
            "events": dict(sorted(self._written.items())),
        }

    # Start and end

    async def run(self, stop: asyncio.Event, ready: Callable[[], None] = lambda: None) -> None:
        """Watch until `stop` is set.

        Args:
            stop: ends the daemon.
            ready: called when errors are seen, or it is known why they are not.
        """
        self._news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._wake = asyncio.Event()
        self._journal = await self._journal_thread.call(self._open_journal)
        self.journal_id = str(self._journal.id)
        await self._recall()
        drafts = [Draft(events.STARTED, f"dm-remapd watches {self._origin.host}")]
        await self._write(drafts, [])
        for observation in await self._journal_thread.call(self._journal.pending):
            self._dispatch([observation])
        await self._check()
        server = None
        try:
            server = await self._serve()
            ready()
            await self._watch(stop)
        finally:
            self._stopping = True
            self._tell()
            if server is not None:
                await server.stop()
            await self._close()

    async def _serve(self) -> api.Server:
        token = settings.read_secret(self._settings.token_file)
        server = api.Server(self, self._settings, token)
        await server.start()
        self.port = server.port
        return server

    def _open_journal(self) -> Journal:
        os.makedirs(self._settings.state_directory, mode=0o700, exist_ok=True)
        path = self._settings.journal

        def open_it() -> Journal:
            return Journal(path, self._origin, self._settings.keep_events)

        try:
            return open_it()
        except DmRemapError as error:
            # Seeing errors matters more than the old events; the new journal has another id, so
            # that consumers know that their cursors mean nothing any more.
            aside = f"{path}.damaged-{time.time_ns()}"
            log.critical("%s; it is now %s and a new one was begun", error, aside)
            os.replace(path, aside)
            for suffix in ("-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path + suffix)
            return open_it()

    async def _recall(self) -> None:
        """Remember what was reported a short while ago, so that a restart repeats nothing."""
        self._newest = await self._journal_thread.call(self._journal.newest)
        first = max(0, self._newest - _RECENT_EVENTS)
        page = await self._journal_thread.call(self._journal.read, first, _RECENT_EVENTS)
        horizon = events.rfc3339(time.time_ns() - int(self._patience.again * 1e9))
        for event in page.events:
            if event["type"] == events.SECTOR_ERROR and event["time"] >= horizon:
                sectors = [tuple(item) for item in event["sectors"]]
                self._watcher.remember(event["target"], event["operation"], sectors)

    async def _close(self) -> None:
        with contextlib.suppress(RuntimeError, OSError, ValueError):
            asyncio.get_running_loop().remove_reader(self._reader)
        self._trace.close()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._journal_thread.call(self._journal.close), 5)
        for worker in (self._journal_thread, self._table_thread, *self._disk_threads.values()):
            worker.stop()

    # Seeing

    _reader = -1

    def _open_trace(self) -> None:
        try:
            self._reader = self._trace.open()
        except MissingKernelFeature as error:
            self._troubles["tracing"] = str(error)
            return
        self._troubles.pop("tracing", None)
        asyncio.get_running_loop().add_reader(self._reader, self._wake.set)

    async def _watch(self, stop: asyncio.Event) -> None:
        stopped = asyncio.ensure_future(stop.wait())
        ticks = 0
        try:
            while not stop.is_set():
                woken = asyncio.ensure_future(self._wake.wait())
                try:
                    done, _unused = await asyncio.wait(
                        {woken, stopped},
                        timeout=_TICK_SECONDS,
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                finally:
                    woken.cancel()
                # The buffer is looked at on each tick too, should a wake-up get lost.
                await self._drain()
                if not done:
                    ticks += 1
                    if ticks % _CHECK_EVERY_TICKS == 0:
                        await self._check()
        finally:
            stopped.cancel()

    async def _drain(self) -> None:
        """Empty the trace buffer. Each batch is in the journal before the next one is read."""
        while self._reader >= 0 and not self._stopping:
            self._wake.clear()
            try:
                lines = self._trace.read()
            except OSError as error:
                self._lose_trace(f"the trace cannot be read: {error.strerror}")
                return
            if not lines:
                return
            errors, lost = parse_lines(lines)
            for failed in errors:
                self._counts["errors" if failed.request else "bios"] += 1
            if errors:
                self._dispatch(await self._record(errors))
            if lost:
                await self._check_overruns()

    async def _record(self, errors: Sequence[BlockError]) -> list[Observation]:
        while True:
            try:
                found: list[Observation] = await self._journal_thread.call(
                    self._journal.observe, errors
                )
            except (sqlite3.Error, OSError) as error:
                # The kernel's buffer holds what comes next until the journal works again.
                self._troubles["journal"] = f"{self._settings.journal}: {error}"
                log.error("journal: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                self._troubles.pop("journal", None)
                return found

    async def _check_overruns(self) -> None:
        """Tell what the kernel overwrote before it was read, also while no daemon ran."""
        try:
            total = self._trace.overruns()
        except OSError:
            return  # the instance is gone, which the next check repairs
        boot, _unused, told = (await self._remembered("overruns")).partition(" ")
        known = int(told) if boot == self._origin.boot_id else 0
        # A smaller number means that the instance was made anew.
        lost = total - known if total >= known else total
        if total == known:
            return
        if lost:
            self._counts["overruns"] += lost
            message = f"the kernel dropped {lost} trace entries; errors may have gone unseen"
            await self._write([Draft(events.OVERRUN, message)], [])
        value = f"{self._origin.boot_id} {total}"
        await self._journal_thread.call(self._journal.remember, "overruns", value)

    async def _remembered(self, name: str) -> str:
        found: str = await self._journal_thread.call(self._journal.note, name)
        return found

    async def _check(self) -> None:
        """Look after the trace and the list of targets."""
        before = self._troubles.get("tracing")
        if self._reader >= 0 and not self._trace.active():
            self._lose_trace("tracing was switched off")
        if self._reader < 0:
            self._open_trace()
        if self._reader >= 0:
            await self._check_overruns()
        now = self._troubles.get("tracing")
        if now and now != before:
            log.critical("blind: %s", now)
            await self._write([Draft(events.BLIND, f"block errors are not seen: {now}")], [])
        await self._refresh()

    def _lose_trace(self, reason: str) -> None:
        asyncio.get_running_loop().remove_reader(self._reader)
        self._trace.close()
        self._reader = -1
        self._troubles["tracing"] = reason

    # Explaining

    def _dispatch(self, observations: Sequence[Observation]) -> None:
        for item in observations:
            self._waiting[item.error.devno].append(item)
        for devno in {item.error.devno for item in observations}:
            task = self._tasks.get(devno)
            if task is None or task.done():
                self._tasks[devno] = asyncio.ensure_future(self._explain_all(devno))

    async def _explain_all(self, devno: str) -> None:
        while self._waiting[devno] and not self._stopping:
            await asyncio.sleep(self._settings.burst_seconds)
            batch = self._waiting.pop(devno)
            try:
                await self._explain(devno, batch)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                log.exception("explaining errors of %s", devno)
                self._troubles[f"device {devno}"] = f"{type(error).__name__}: {error}"
                self._waiting[devno][:0] = batch
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                self._troubles.pop(f"device {devno}", None)
        del self._waiting[devno]

    async def _explain(self, devno: str, batch: Sequence[Observation]) -> None:
        """Find out what a batch of failed requests means for each target, and write that down."""
        drafts: list[Draft] = []
        left: list[BlockError] = []
        for target in await self._targets_on(devno):
            question = self._watcher.question(target, batch)
            if question is None:
                self._counts["merged"] += sum(item.times for item in batch)
                continue
            answer = await self._ask(question)
            drafts += self._watcher.drafts(question, answer, self._host.name(target.main))
            left += _unread(question, answer)
        explained = [item.id for item in batch]
        time_ns = min(item.time_ns for item in batch)
        self._dispatch(await self._write(drafts, explained, time_ns, left))

    async def _ask(self, question: Question) -> Answer:
        """Ask the disk in its own thread; report if that takes too long, but wait for it."""
        target = question.target
        worker = self._disk_threads.get(target.disk)
        if worker is None:
            worker = self._disk_threads[target.disk] = Worker(f"disk {target.disk}")
        call = asyncio.ensure_future(
            worker.call(
                ask,
                question,
                lambda: self._host.state(target.main),
                lambda: self._host.open_main(target.main),
                self._clock,
                self._patience.probe,
            )
        )
        done, _unused = await asyncio.wait({call}, timeout=2 * self._patience.probe)
        if not done:
            self._troubles[f"probe {target.name}"] = "the disk does not answer"
            await self._write(self._watcher.slow(target, self._host.name(target.main)), [])
        answer: Answer = await call
        self._troubles.pop(f"probe {target.name}", None)
        return answer

    async def _targets_on(self, devno: str) -> list[Guarded]:
        """Return the targets on a disk, or on the device itself where it has no requests."""
        await self._refresh(strict=True)
        return [target for target in self._targets if devno in (target.disk, target.main)]

    async def _refresh(self, strict: bool = False) -> None:
        # Not wait_for: up to Python 3.11 it can swallow a cancellation.
        call = asyncio.ensure_future(self._table_thread.call(self._host.targets))
        try:
            done, _unused = await asyncio.wait({call}, timeout=_DEVICE_MAPPER_SECONDS)
            if not done:
                call.cancel()
                raise DmRemapError("device-mapper does not answer", remedy="look at dmsetup info")
            self._targets = call.result()
        except (DmRemapError, OSError) as error:
            self._troubles["targets"] = str(error)
            if strict:
                raise
        else:
            self._troubles.pop("targets", None)

    # Telling

    async def _write(
        self,
        drafts: Sequence[Draft],
        explained: Sequence[int],
        time_ns: int | None = None,
        unexplained: Sequence[BlockError] = (),
    ) -> list[Observation]:
        written, left = await self._journal_thread.call(
            self._journal.append, drafts, explained, time_ns, unexplained
        )
        for event in written:
            self._written[event["type"]] += 1
            self._newest = event["sequence"]
            level = logging.INFO if event["severity"] == "info" else logging.WARNING
            log.log(level, "event %d: %s: %s", event["sequence"], event["type"], event["message"])
        if written:
            self._tell()
        return list(left)

    def _tell(self) -> None:
        """Wake everyone who waits for an event."""
        news, self._news = self._news, asyncio.get_running_loop().create_future()
        if not news.done():
            news.set_result(None)


def _unread(question: Question, answer: Answer) -> list[BlockError]:
    """The ranges that time did not suffice for, as failed requests of the target's disk."""
    target = question.target
    return [
        BlockError(
            request=target.request_based,
            devno=target.disk,
            operation=READ,
            sector=target.start + start,
            count=count,
            errno=question.errno,
            readahead=False,
        )
        for start, count in answer.result.unread
    ]


def notify(state: str) -> None:
    """Tell systemd about the service's state (sd_notify(3)); does nothing without systemd."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as link:
        link.sendto(state.encode("ascii"), address)


async def serve(configuration: settings.Settings) -> None:
    """Run the daemon until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    daemon = Daemon(
        configuration,
        local_origin(configuration.host),
        TraceInstance(),
        Host(configuration.state_directory),
    )
    beat = asyncio.ensure_future(_heartbeat())
    try:
        await daemon.run(stop, lambda: notify("READY=1"))
    finally:
        beat.cancel()
        notify("STOPPING=1")


async def _heartbeat() -> None:
    """Show systemd that the event loop turns, at half the interval it asks for."""
    interval = int(os.environ.get("WATCHDOG_USEC", "0")) / 2_000_000
    while interval:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="dm-remapd", description="Watch disks for bad sectors.")
    parser.add_argument("--config", default=settings.PATH, help="configuration file (%(default)s)")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("run", help="watch until told to stop (the default)")
    making = commands.add_parser("credentials", help="make the token and the certificate")
    making.add_argument(
        "--name",
        action="append",
        default=[],
        required=True,
        help="host name or address that the controller connects to; may be repeated",
    )
    making.add_argument("--check", action="store_true", help="only say what is missing")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        configuration = settings.load(options.config)
        if options.command == "credentials":
            action = credentials.missing if options.check else credentials.make
            names = [name for name in options.name if name]
            sys.stdout.write(json.dumps({"credentials": action(configuration, names)}) + "\n")
            return 0
        asyncio.run(serve(configuration))
    except DmRemapError as error:
        log.critical("%s", error)
        return 1
    # A thread may be stuck in a read that the kernel does not finish; do not wait for it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    raise SystemExit(main())
