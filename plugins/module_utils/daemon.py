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
import errno
import json
import logging
import os
import signal
import sqlite3
import sys
import time
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Callable

from . import api, credentials, events, settings
from .backups import Backups
from .blockdev import SECTOR_BYTES, BlockDevice, node_of
from .errors import DmRemapError, MissingKernelFeature
from .events import Draft, Origin, counted, local_origin
from .files import owners
from .healed import HealerLink, finding_of, known_number, note_of, number_of
from .inventory import Guarded, Kept, guarded_targets, kept_of
from .journal import DamagedJournal, Journal, Observation, Page, failure, move_aside
from .pool import State, event_of_change
from .probing import DeviceState, Readable, device_state, kernel_name, physical_block
from .report import event_files
from .service import HEALER_SOCKET, notify
from .stack import UUID_PREFIX
from .target import HOLD
from .threads import Worker
from .tracing import READ, BlockError, Parser, TraceInstance
from .watching import PROBE_ERRORS, Answer, Finding, Patience, Question, Watcher, ask, concerns

BACKUP_FOLDER = "backup"

_TICK_SECONDS = 1.0
_CHECK_SECONDS = 10.0
_RETRY_SECONDS = 5.0
_DEVICE_MAPPER_SECONDS = 10.0
_STUCK_SECONDS = 10.0
_FILES_SECONDS = 30.0
# Within it the healer has begun to heal what it can.
_HEALER_SECONDS = 1.0
# Room for a burst of old events when the daemon starts, to know what was reported.
_RECENT_EVENTS = 1000
# The journal keeps under it how full the pools were when that was told, by their targets' uuids.
_POOLS_NOTE = "pools"
_JOURNAL_ERRORS = (sqlite3.Error, OSError)

log = logging.getLogger("dm-remapd")


class Host:
    """What the daemon needs of the machine; tests replace it.

    Args:
        state_directory: where the engine keeps its backups.
    """

    def __init__(self, state_directory: str) -> None:
        self._backups = Backups(os.path.join(state_directory, BACKUP_FOLDER))
        self._known: dict[uuid.UUID, tuple[Kept, Collection[int]]] = {}
        self._tables: Any = None

    def targets(self) -> list[Guarded]:
        """Return the active targets."""
        if self._tables is None:
            from .devmapper import DeviceMapper

            self._tables = DeviceMapper()
        return guarded_targets(self._tables, UUID_PREFIX, kept=self._kept)

    def _kept(self, target: uuid.UUID, active: Collection[int]) -> Kept:
        newest = next(iter(self._backups.generations(target)), 0)
        known = self._known.get(target)
        # A target is asked for with each error, and neither of them changes often.
        if known is None or (known[0].generation, known[1]) != (newest, active):
            metadata = self._backups.newest(target)
            if metadata is None:
                return Kept()
            known = self._known[target] = kept_of(metadata, active), active
        return known[0]

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

    def files(self, target: str, lost: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        """Find out whom lost sectors of a target belonged to, as an event tells it."""
        return event_files(owners(f"/dev/mapper/{target}", lost, _FILES_SECONDS))


class Daemon:
    """The daemon without its command line.

    Args:
        configuration: what `daemon.json` says.
        origin: who reports.
        trace: the tracefs instance.
        host: the machine.
        clock: seconds that only rise.
        healer_socket: where the healer hands out its reports.
    """

    def __init__(
        self,
        configuration: settings.Settings,
        origin: Origin,
        trace: TraceInstance,
        host: Host,
        clock: Callable[[], float] = time.monotonic,
        healer_socket: str = HEALER_SOCKET,
    ) -> None:
        self._settings = configuration
        self._origin = origin
        self._trace = trace
        self._parser = Parser()
        self._host = host
        self._clock = clock
        self._patience = Patience(configuration.probe_seconds, configuration.again_seconds)
        self._watcher = Watcher(self._patience, clock)
        self._journal_thread = Worker("journal")
        self._table_thread = Worker("device-mapper")
        self._files_thread = Worker("files")
        self._disk_threads: dict[str, Worker] = {}
        self._dirty: set[str] = set()
        self._waiting = 0
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._troubles: dict[str, str] = {}
        self._counts: collections.Counter[str] = collections.Counter()
        self._written: collections.Counter[str] = collections.Counter()
        self._targets: list[Guarded] = []
        self._newest = 0
        self._blind_told = ""
        self._stopping = False
        self._server: api.Server | None = None
        self._healer_socket = healer_socket
        self._healer: HealerLink | None = None
        self._reported = (0, 0)
        self._pools: dict[str, State] = {}
        self._journal: Any = None
        self.journal_id = ""
        self.port = configuration.port

    # What the interface shows

    async def page(self, after: int, limit: int, wait: float) -> Page:
        """Return events after a cursor, waiting up to `wait` seconds for the first one.

        Raises:
            DmRemapError: the journal cannot be read.
        """
        deadline = self._clock() + wait
        while True:
            news = self._news
            if self._journal is None:
                raise DmRemapError(self._troubles.get("journal", "the journal is not open yet"))
            try:
                page: Page = await self._journal_thread.call(self._journal.read, after, limit)
            except (*_JOURNAL_ERRORS, ValueError) as error:
                raise failure(self._settings.journal, error) from error
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
        held = [target.name for target in self._targets if target.on_error == HOLD]
        if held and self._healer and not self._healer.connected:
            names = ", ".join(held)
            troubles["healer"] = f"nobody heals failed I/O of {names}: {self._healer.trouble}"
        blind = {"tracing", "journal"} & set(troubles)
        return {
            "status": "blind" if blind else "degraded" if troubles else "ok",
            "host": self._origin.host,
            "troubles": dict(sorted(troubles.items())),
            "targets": len(self._targets),
            "newest": self._newest,
            "waiting": self._waiting,
            "errors": self._counts["errors"],
            "bios": self._counts["bios"],
            "overruns": self._counts["overruns"],
            "merged": self._counts["merged"],
            "healed": self._counts["healed"],
            "lost_sectors": self._counts["lost_sectors"],
            "failed": self._counts["failed"],
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
        self._stop = stop
        self._stopped = asyncio.ensure_future(stop.wait())
        try:
            # From now on the kernel keeps errors, even if there is no journal for them yet.
            self._open_trace()
            await self._listen()
            while not await self._begin() and not stop.is_set():
                ready()
                await self._pause()
                await self._listen()
            if not stop.is_set():
                self._healer = HealerLink(self._healer_socket, self._take_report)
                self._tasks["healer"] = asyncio.ensure_future(self._healer.follow())
                await self._check()
                ready()
                await self._watch()
        finally:
            self._stopping = True
            self._tell()
            if self._server is not None:
                await self._server.stop()
            await self._close()

    async def _pause(self) -> None:
        """Wait before something is tried again, but not when the daemon is to stop."""
        await asyncio.wait({self._stopped}, timeout=_RETRY_SECONDS)

    async def _listen(self) -> None:
        """Offer the interface, unless it is; what is in the way is a trouble, and no end."""
        if self._server is not None:
            return
        try:
            token = settings.read_token(self._settings)
            server = api.Server(self, self._settings, token)
            await server.start()
        except (DmRemapError, OSError, ImportError) as error:
            if self._troubles.get("listening") != str(error):
                log.critical("nobody can read the events: %s", error)
            self._troubles["listening"] = str(error)
        else:
            self._server, self.port = server, server.port
            self._troubles.pop("listening", None)

    # Start of the journal

    async def _begin(self) -> bool:
        """Open the journal, take up what it holds and tell the start; False if that failed."""
        try:
            if self._journal is None:
                journal, page = await self._journal_thread.call(self._open_journal)
                self._recall(page)
                self._newest, self.journal_id = page.newest, str(journal.id)
                self._journal = journal
            stale = await self._journal_thread.call(self._journal.stale)
            pending = await self._journal_thread.call(self._journal.pending)
            note = await self._journal_thread.call(self._journal.note, "healer")
            self._reported = known_number(note)
            pools = await self._journal_thread.call(self._journal.note, _POOLS_NOTE)
            self._pools = _known_pools(pools)
            started = Draft(events.STARTED, f"dm-remapd watches {self._origin.host}")
            await self._write([*_forgotten(stale), started], stale)
        except (DmRemapError, *_JOURNAL_ERRORS) as error:
            self._journal_failed(error)
            return False
        self._dispatch(item.error.devno for item in pending)
        return True

    def _open_journal(self) -> tuple[Journal, Page]:
        os.makedirs(self._settings.state_directory, mode=0o700, exist_ok=True)
        try:
            return self._read_journal()
        except DamagedJournal as error:
            # Seeing errors matters more than the old events; the new journal has another id, so
            # that consumers know that their cursors mean nothing any more.
            aside = f"{self._settings.journal}.damaged-{time.time_ns()}"
            log.critical("%s; it is now %s and a new one was begun", error.message, aside)
            move_aside(self._settings.journal, aside)
            return self._read_journal()

    def _read_journal(self) -> tuple[Journal, Page]:
        """Open the journal and return it with its newest events."""
        path = self._settings.journal
        journal = Journal(path, self._origin, self._settings.keep_events)
        try:
            return journal, journal.read(max(0, journal.newest() - _RECENT_EVENTS), _RECENT_EVENTS)
        except (sqlite3.Error, ValueError) as error:
            journal.close()
            raise failure(path, error) from error

    def _recall(self, page: Page) -> None:
        """Remember what was reported a short while ago, so that a restart repeats nothing."""
        horizon = events.rfc3339(time.time_ns() - int(self._patience.again * 1e9))
        for event in page.events:
            if event["type"] == events.SECTOR_ERROR and event["time"] >= horizon:
                sectors = [tuple(item) for item in event["sectors"]]
                self._watcher.remember(event["target"], event["operation"], sectors)

    async def _close(self) -> None:
        self._stopped.cancel()
        self._trace.close()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        if self._journal is not None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._journal_thread.call(self._journal.close), 5)
        for worker in (
            self._journal_thread,
            self._table_thread,
            self._files_thread,
            *self._disk_threads.values(),
        ):
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

    async def _watch(self) -> None:
        due = self._clock() + _CHECK_SECONDS
        while not self._stop.is_set():
            if await self._drain():
                await asyncio.sleep(0)
            else:
                await self._wait_for_trace()
            if self._clock() >= due:
                await self._check()
                due = self._clock() + _CHECK_SECONDS

    async def _wait_for_trace(self) -> None:
        loop = asyncio.get_running_loop()
        self._wake.clear()
        woken = asyncio.ensure_future(self._wake.wait())
        # Only while it waits: a buffer that is not empty would wake the loop all the time.
        if self._reader >= 0:
            loop.add_reader(self._reader, self._wake.set)
        try:
            # The buffer is looked at on each tick too, should a wake-up get lost.
            await asyncio.wait(
                {woken, self._stopped},
                timeout=_TICK_SECONDS,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            woken.cancel()
            if self._reader >= 0:
                loop.remove_reader(self._reader)

    async def _drain(self) -> bool:
        """Put a part of the trace buffer into the journal; returns False when it was empty."""
        if self._reader < 0:
            return False
        try:
            lines = self._trace.read()
        except OSError as error:
            self._lose_trace(f"the trace cannot be read: {error.strerror}")
            return False
        errors, lost = self._parser.split(lines)
        for failed in errors:
            self._counts["errors" if failed.request else "bios"] += 1
        if errors:
            await self._record(errors)
        if lost:
            await self._check_overruns()
        return bool(lines)

    async def _record(self, errors: Sequence[BlockError]) -> None:
        while True:
            try:
                self._waiting = await self._journal_thread.call(self._journal.observe, errors)
            except _JOURNAL_ERRORS as error:
                # The kernel's buffer holds what comes next until the journal works again.
                self._journal_failed(error)
            else:
                self._troubles.pop("journal", None)
                self._dispatch(error.devno for error in errors)
                return
            if self._stop.is_set():
                # Nothing but the log is left to keep them.
                for failed in dict.fromkeys(errors):
                    log.critical("not in the journal: %s", failed)
                return
            await self._pause()

    async def _check_overruns(self) -> None:
        """Tell what the kernel overwrote before it was read, also while no daemon ran."""
        try:
            total = self._trace.overruns()
        except OSError:
            return  # the instance is gone, which the next check repairs
        try:
            note = await self._journal_thread.call(self._journal.note, "overruns")
            boot, _unused, told = note.partition(" ")
            known = int(told) if boot == self._origin.boot_id else 0
            if total == known:
                return
            # A smaller number means that the instance was made anew.
            lost = total - known if total >= known else total
            dropped = f"the kernel dropped {counted(lost, 'trace entry', 'trace entries')}"
            drafts = [Draft(events.OVERRUN, f"{dropped}; errors may have gone unseen")]
            await self._write(
                drafts if lost else [], notes={"overruns": f"{self._origin.boot_id} {total}"}
            )
        except _JOURNAL_ERRORS as error:
            self._journal_failed(error)
        else:
            self._counts["overruns"] += lost

    async def _check(self) -> None:
        """Look after the trace, the journal, the interface and the list of targets."""
        if self._reader >= 0 and not self._trace.active():
            self._lose_trace("tracing was switched off")
        if self._reader < 0:
            self._open_trace()
        if self._reader >= 0:
            await self._check_overruns()
        await self._check_blindness()
        if "journal" in self._troubles:
            # Nothing else may be there to write, and only a write shows that the trouble is over.
            await self._try_to_write(notes={"trouble": self._troubles["journal"]})
        await self._listen()
        await self._refresh()
        await self._check_pools()

    async def _check_pools(self) -> None:
        """Tell of each pool that has become fuller by a step since it was told of."""
        known = dict(self._pools)
        drafts = []
        for target in self._targets:
            room = target.kept.room
            if room is None:
                continue
            kind = event_of_change(known.get(str(target.uuid), State.OK), room)
            if kind:
                message = f"{target.name}: {target.kept.warning}"
                generation = target.kept.generation
                drafts.append(Draft(kind, message, target.name, generation=generation))
            known[str(target.uuid)] = room
        if known == self._pools:
            return
        note = json.dumps({name: state.value for name, state in known.items()})
        if await self._try_to_write(drafts, notes={_POOLS_NOTE: note}):
            self._pools = known

    async def _check_blindness(self) -> None:
        reason = self._troubles.get("tracing", "")
        if reason and reason != self._blind_told:
            log.critical("blind: %s", reason)
            draft = Draft(events.BLIND, f"block errors are not seen: {reason}")
            if not await self._try_to_write([draft]):
                return
        self._blind_told = reason

    def _lose_trace(self, reason: str) -> None:
        self._trace.close()
        self._reader = -1
        self._troubles["tracing"] = reason

    # Explaining

    def _dispatch(self, devices: Iterable[str]) -> None:
        """See that what waits of some devices is explained."""
        for devno in set(devices):
            self._dirty.add(devno)
            task = self._tasks.get(devno)
            if task is None or task.done():
                self._tasks[devno] = asyncio.ensure_future(self._explain_all(devno))

    async def _explain_all(self, devno: str) -> None:
        trouble = f"device {devno}"
        while devno in self._dirty and not self._stop.is_set():
            self._dirty.discard(devno)
            await asyncio.sleep(self._settings.burst_seconds)
            try:
                await self._wait_for_healer(devno)
                await self._explain(devno)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                if self._troubles.get(trouble) != text:
                    log.exception("explaining errors of %s", devno)
                self._troubles[trouble] = text
                self._dirty.add(devno)
                await self._pause()
            else:
                self._troubles.pop(trouble, None)

    async def _wait_for_healer(self, devno: str) -> None:
        """Let the healer have its chance: errors of chunks that are on a spare then are no news."""
        if self._healer and self._healer.connected:
            targets = await self._targets_on(devno)
            held = [target.name for target in targets if target.on_error == HOLD]
            if held:
                await self._healer.wait(held, _HEALER_SECONDS)

    async def _take_report(self, report: Mapping[str, Any]) -> None:
        """Write down what the healer did; returns when that is in the journal.

        Raises:
            OSError: the daemon stops, and the report must come again.
        """
        try:
            number = number_of(report)
            finding = finding_of(report, self._watcher.is_news)
        except (KeyError, TypeError, ValueError):
            log.exception("the healer reports what is not understood: %.200r", report)
            return
        begun, known = self._reported
        if number[0] == begun and number[1] <= known:
            return  # it came before, and only the answer was lost
        dropped = number[1] - 1 - (known if number[0] == begun else 0) if begun else 0
        drafts = [await self._with_files(draft) for draft in finding.drafts]
        if dropped:
            many = counted(dropped, "report")
            drafts.insert(0, Draft(events.OVERRUN, f"{many} of the healer came to nobody in time"))
        while not await self._try_to_write(
            drafts, notes={"healer": note_of(number)}, time_ns=int(report["time_ns"])
        ):
            if self._stop.is_set():
                raise OSError(errno.ECANCELED, "the daemon stops")
            await self._pause()
        self._reported = number
        self._watcher.confirm(finding)
        self._counts["merged"] += finding.merged
        self._counts["healed"] += report["type"] == "healed"
        self._counts["failed"] += report["type"] == "failed"
        self._counts["lost_sectors"] += sum(item["count"] for item in report["lost"])

    async def _with_files(self, draft: Draft) -> Draft:
        """The draft of a loss with whom its sectors belonged to, if that can be found out."""
        if draft.type != events.SECTORS_LOST:
            return draft
        try:
            found = await self._files_thread.call(self._host.files, draft.target, draft.sectors)
        except (DmRemapError, OSError) as error:
            log.warning("%s: whom lost sectors belonged to is unknown: %s", draft.target, error)
            return draft
        return replace(draft, files=found)

    async def _explain(self, devno: str) -> None:
        """Find out what failed requests of a device mean for each target, and write that down."""
        batch = await self._journal_thread.call(self._journal.pending, devno)
        if not batch:
            return
        explained: list[Observation] = batch
        findings: list[Finding] = []
        left: list[BlockError] = []
        failed: Exception | None = None
        for target in await self._targets_on(devno):
            question = self._watcher.question(target, batch)
            if not question.news:
                findings.append(Finding(target.name, merged=question.requests))
                continue
            try:
                answer = await self._ask(question)
            except (DmRemapError, OSError) as error:
                # That must not cost the other targets on the disk their events.
                failed = error
                explained = [item for item in explained if not concerns(target, item.error)]
                continue
            name = self._host.name(target.main)
            findings.append(self._watcher.finding(question, answer, name))
            left += _unread(question, answer)
        drafts = [draft for finding in findings for draft in finding.drafts]
        await self._write(drafts, explained, min(item.time_ns for item in batch), left)
        for finding in findings:
            self._watcher.confirm(finding)
            self._counts["merged"] += finding.merged
        self._dispatch(item.devno for item in left)
        if failed is not None:
            raise failed

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
            slow = self._watcher.slow(target, self._host.name(target.main))
            if await self._try_to_write(slow.drafts):
                self._watcher.confirm(slow)
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
        explained: Sequence[Observation] = (),
        time_ns: int | None = None,
        unexplained: Sequence[BlockError] = (),
        notes: Mapping[str, str] | None = None,
    ) -> None:
        """Write to the journal, as `Journal.append` does, and show it."""
        written, self._waiting = await self._journal_thread.call(
            self._journal.append, drafts, explained, time_ns, unexplained, notes
        )
        self._troubles.pop("journal", None)
        for event in written:
            self._written[event["type"]] += 1
            self._newest = event["sequence"]
            level = logging.INFO if event["severity"] == "info" else logging.WARNING
            log.log(level, "event %d: %s: %s", event["sequence"], event["type"], event["message"])
        if written:
            self._tell()

    async def _try_to_write(
        self,
        drafts: Sequence[Draft] = (),
        notes: Mapping[str, str] | None = None,
        time_ns: int | None = None,
    ) -> bool:
        """Write to the journal; a failure is a trouble, and False."""
        try:
            await self._write(drafts, time_ns=time_ns, notes=notes)
        except _JOURNAL_ERRORS as error:
            self._journal_failed(error)
            return False
        return True

    def _journal_failed(self, error: Exception) -> None:
        known = isinstance(error, DmRemapError)
        text = str(error if known else failure(self._settings.journal, error))
        if self._troubles.get("journal") != text:
            log.critical("%s", text)
        self._troubles["journal"] = text

    def _tell(self) -> None:
        """Wake everyone who waits for an event."""
        news, self._news = self._news, asyncio.get_running_loop().create_future()
        if not news.done():
            news.set_result(None)


def _unread(question: Question, answer: Answer) -> list[BlockError]:
    """The ranges that time did not suffice for, as failed requests of the target's disk."""
    target = question.target
    number = answer.result.errno
    return [
        BlockError(
            request=target.request_based,
            devno=target.disk,
            operation=READ,
            sector=target.start + start,
            count=count,
            errno=number if number in PROBE_ERRORS else errno.EIO,
            readahead=False,
        )
        for start, count in answer.result.unread
    ]


def _forgotten(stale: Sequence[Observation]) -> list[Draft]:
    """The event of what an earlier boot left: its device numbers may mean other disks now."""
    if not stale:
        return []
    requests = sum(item.times for item in stale)
    devices = sorted({item.error.devno for item in stale})
    more = ", ..." if len(devices) > 8 else ""
    message = (
        f"the host restarted before {counted(requests, 'failed request')} of"
        f" {', '.join(devices[:8])}{more} could be explained; errors may have gone unseen"
    )
    return [Draft(events.OVERRUN, message, requests=requests)]


def _known_pools(note: str) -> dict[str, State]:
    """How full the pools were, from the journal; empty if that is not understood."""
    try:
        return {str(name): State(value) for name, value in json.loads(note or "{}").items()}
    except (ValueError, AttributeError):
        return {}


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
    commands.add_parser("heal", help="heal I/O that targets hold, until told to stop")
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
    if options.command == "heal":
        # It has a log of its own, and no part of the daemon.
        from . import healer

        return healer.main()
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
