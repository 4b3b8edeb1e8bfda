# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The daemon as a whole, on a machine made of files, and its HTTP interface over real TLS."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import itertools
import json
import logging
import os
import shlex
import socket
import sqlite3
import stat
import threading
import uuid
from dataclasses import fields, replace
from pathlib import Path

import pytest

from dm_remap import api, credentials, daemon, settings
from dm_remap import journal as journal_module
from dm_remap.errors import DmRemapError
from dm_remap.events import Origin
from dm_remap.inventory import Kept
from dm_remap.journal import Journal, Observation
from dm_remap.pool import State
from dm_remap.probing import DeviceState, Probe
from dm_remap.tracing import BlockError, TraceInstance
from dm_remap.watching import PROBE_ERRORS, Answer, Patience, Watcher
from tests.unit.daemon_scene import TARGET, Scene


@pytest.fixture
def scene(tmp_path):
    made = Scene(tmp_path)
    yield made
    made.close()


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def kinds(page):
    return [event["type"] for event in page.events]


class Full:
    """Lets writes to the journal fail as on a full disk, those that `refused` says."""

    def __init__(self, monkeypatch):
        self.failed = 0
        self.refused = lambda drafts: False
        monkeypatch.setattr(daemon, "_RETRY_SECONDS", 0.0)
        for name in ("observe", "append"):
            monkeypatch.setattr(Journal, name, self.instead_of(getattr(Journal, name)))

    def instead_of(self, real):
        def write(journal, items, *rest, **named):
            if self.refused(items):
                self.failed += 1
                raise sqlite3.OperationalError("database or disk is full")
            return real(journal, items, *rest, **named)

        return write


@pytest.fixture
def full(monkeypatch):
    return Full(monkeypatch)


def test_a_failed_read_becomes_an_event_with_the_bad_sectors(scene):
    async def story():
        async with scene.running() as it:
            scene.host.disk.bad = {24}
            scene.fail_read(16, 32, bad=False)
            return await scene.next_event(it, "sector_error")

    event = run(story())
    assert event["sectors"] == [[24, 1]]
    assert event["suspect"] == [[16, 32]]
    assert (event["host"], event["target"], event["device"]) == ("db1", "data", "sdb")
    assert (event["operation"], event["errno"], event["generation"]) == ("read", 5, 3)


def test_a_failure_is_in_the_journal_before_the_disk_is_asked(scene):
    async def story():
        scene.host.disk.answering.clear()
        async with scene.running() as it:
            scene.fail_read(16)
            slow = await scene.next_event(it, "device_slow")
            database = sqlite3.connect(scene.settings.journal)
            pending = database.execute("SELECT sector FROM observation").fetchall()
            database.close()
            health = it.health()
            scene.host.disk.answering.set()
            error = await scene.next_event(it, "sector_error")
            return slow, pending, health, error

    slow, pending, health, error = run(story())
    assert slow["sectors"] == []
    assert pending == [(16,)]
    assert health["status"] == "degraded"
    assert error["sectors"] == [[16, 1]]


def test_a_hanging_disk_keeps_neither_others_nor_the_interface_from_working(scene):
    async def story():
        scene.host.disk.answering.clear()
        other = replace(TARGET, name="logs", main="8:32", disk="8:32")
        scene.host.guarded = [TARGET, other]
        async with scene.running() as it:
            scene.fail_read(16)
            await scene.next_event(it, "device_slow")
            free = type(scene.host.disk)()
            free.bad = {40}
            open_main = scene.host.open_main
            scene.host.open_main = lambda devno: (free, 1) if devno == "8:32" else open_main(devno)
            scene.fail_read(40, bad=False, devno="8,32")
            event = await scene.next_event(it, "sector_error")
            health = await scene.get_json(it, "/v1/health")
            scene.host.disk.answering.set()
            return event, health

    event, health = run(story())
    assert (event["target"], event["sectors"]) == ("logs", [[40, 1]])
    assert "probe data" in health["troubles"]


def test_the_daemon_stops_while_a_disk_hangs(scene):
    async def story():
        scene.host.disk.answering.clear()
        async with scene.running() as it:
            scene.fail_read(16)
            await scene.next_event(it, "device_slow")

    run(story())


def test_what_was_not_explained_is_explained_after_a_restart(scene):
    async def story():
        scene.host.trouble = DmRemapError("device-mapper is away")
        async with scene.running() as it:
            scene.fail_read(16)
            while not it.health()["waiting"]:
                await asyncio.sleep(0)
        scene.host.trouble = None
        async with scene.running() as it:
            return await scene.next_event(it, "sector_error")

    assert run(story())["sectors"] == [[16, 1]]


def test_what_the_kernel_kept_meanwhile_is_read_at_the_start(scene):
    async def story():
        async with scene.running():
            pass
        scene.fail_read(16)
        async with scene.running() as it:
            return await scene.next_event(it, "sector_error")

    assert run(story())["sectors"] == [[16, 1]]


def test_a_restart_does_not_report_the_same_sector_again(scene):
    async def story():
        async with scene.running() as it:
            scene.fail_read(16)
            await scene.next_event(it, "sector_error")
        async with scene.running() as it:
            scene.fail_read(16)
            scene.fail_read(99)
            page = await scene.next_event(it, "sector_error", after=2)
            return page, (await it.page(0, 100, 0)).events

    event, everything = run(story())
    assert event["sectors"] == [[99, 1]]
    kinds = [item["type"] for item in everything]
    assert kinds == ["started", "sector_error", "started", "sector_error"]


def test_a_thousand_errors_of_one_sector_are_one_event(scene):
    async def story():
        async with scene.running() as it:
            for _unused in range(1000):
                scene.fail_read(16)
            await scene.next_event(it, "sector_error")
            scene.fail_read(99)
            await scene.next_event(it, "sector_error", after=2)
            return it.health(), (await it.page(0, 100, 0)).events

    health, everything = run(story())
    assert health["errors"] == 1001
    assert [item["type"] for item in everything].count("sector_error") == 2
    assert sum(item["requests"] + item["merged"] for item in everything) == 1001


def test_errors_of_other_disks_leave_nothing_behind(scene):
    async def story():
        async with scene.running() as it:
            scene.fail_read(16, devno="7,0")
            scene.fail_read(24)
            await scene.next_event(it, "sector_error")
            while it.health()["waiting"]:
                await asyncio.sleep(0)
            return (await it.page(0, 100, 0)).events

    assert [item["type"] for item in run(story())] == ["started", "sector_error"]


def test_lost_trace_entries_are_told_once_also_when_no_daemon_ran(scene):
    async def story():
        async with scene.running() as it:
            scene.overrun(17)
            first = await scene.next_event(it, "overrun")
        scene.overrun(20)
        async with scene.running() as it:
            second = await scene.next_event(it, "overrun", after=first["sequence"])
        async with scene.running() as it:
            scene.fail_read(16)
            await scene.next_event(it, "sector_error")
            return first, second, (await it.page(0, 100, 0)).events

    first, second, everything = run(story())
    assert "dropped 17 " in first["message"]
    assert "dropped 3 " in second["message"]
    assert [item["type"] for item in everything].count("overrun") == 2


def test_a_new_trace_instance_counts_from_zero(scene):
    async def story():
        async with scene.running() as it:
            scene.overrun(17)
            first = await scene.next_event(it, "overrun")
            scene.overrun(5)
            return await scene.next_event(it, "overrun", after=first["sequence"]), it.health()

    event, health = run(story())
    assert "dropped 5 " in event["message"]
    assert health["overruns"] == 22


def test_a_journal_whose_disk_hangs_makes_the_daemon_blind(scene, monkeypatch):
    monkeypatch.setattr(daemon, "_STUCK_SECONDS", 0.0)
    release = threading.Event()

    async def story():
        async with scene.running() as it:
            waiting = asyncio.ensure_future(it._journal_thread.call(release.wait))
            while it.health()["status"] == "ok":
                await asyncio.sleep(0)
            health = it.health()
            release.set()
            await waiting
            return health

    health = run(story())
    assert health["status"] == "blind"
    assert "does not answer" in health["troubles"]["journal"]


def test_an_unknown_tracepoint_makes_the_daemon_blind_and_it_says_so(scene):
    folder = scene.root / "tracing/instances/dm_remap/events/block/block_rq_error"
    (folder / "format").write_text('print fmt: "new", REC->dev\n')

    async def story():
        async with scene.running() as it:
            event = await scene.next_event(it, "blind")
            return event, await scene.get(it, "/v1/health")

    event, (status, text) = run(story())
    assert event["severity"] == "critical"
    assert status == 503
    assert json.loads(text)["status"] == "blind"


def test_a_damaged_journal_is_moved_away_and_the_new_one_has_another_id(scene):
    async def identity():
        async with scene.running() as it:
            return it.journal_id

    first = run(identity())
    Path(scene.settings.journal).write_bytes(b"garbage" * 1000)
    second = run(identity())
    assert first != second
    (kept,) = Path(scene.settings.state_directory).glob("journal.db.damaged-*")
    assert kept.read_bytes() == b"garbage" * 1000


def test_a_journal_with_a_damaged_event_is_moved_away(scene):
    async def story():
        async with scene.running() as it:
            return it.journal_id, kinds(await it.page(0, 100, 0))

    first = run(story())
    with sqlite3.connect(scene.settings.journal) as database:
        database.execute("UPDATE event SET body = 'nonsense'")
    database.close()
    second = run(story())
    assert first[0] != second[0]
    assert second[1] == ["started"]


# A journal that cannot be written now


def test_a_journal_that_is_locked_or_full_at_the_start_is_used_when_it_can_be(scene, monkeypatch):
    monkeypatch.setattr(daemon, "_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, timeout=0))

    async def story(holder=None):
        async with scene.running() as it:
            health = None
            if holder:
                scene.fail_read(16)
                health = await scene.get_json(it, "/v1/health")
                holder.rollback()
                await scene.next_event(it, "sector_error")
            return it.journal_id, kinds(await it.page(0, 100, 0)), health

    first, _unused, _unused = run(story())
    holder = sqlite3.connect(scene.settings.journal, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    second, written, health = run(story(holder))
    holder.close()
    assert second == first
    assert written == ["started", "started", "sector_error"]
    assert health["status"] == "blind"
    assert "database is locked" in health["troubles"]["journal"]
    assert sorted(os.listdir(scene.settings.state_directory)) == ["journal.db"]


def test_a_journal_of_a_newer_version_is_left_alone_and_the_daemon_says_so(scene, monkeypatch):
    monkeypatch.setattr(daemon, "_RETRY_SECONDS", 0.0)

    async def story():
        async with scene.running() as it:
            return await scene.get(it, "/v1/events"), await scene.get_json(it, "/v1/health")

    run(story())
    with sqlite3.connect(scene.settings.journal) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    before = Path(scene.settings.journal).read_bytes()
    (status, text), health = run(story())
    assert status == 503
    assert "has format 99" in json.loads(text)["error"]
    assert health["status"] == "blind"
    assert "install the version" in health["troubles"]["journal"]
    assert os.listdir(scene.settings.state_directory) == ["journal.db"]
    assert Path(scene.settings.journal).read_bytes() == before


def test_an_event_whose_write_failed_is_written_later(scene, full):
    full.refused = lambda items: (
        not full.failed and any(getattr(item, "type", "") == "sector_error" for item in items)
    )

    async def story():
        async with scene.running() as it:
            scene.fail_read(16)
            event = await scene.next_event(it, "sector_error")
            await until(lambda: not it.health()["waiting"] and not it.health()["troubles"])
            return event, kinds(await it.page(0, 100, 0))

    event, written = run(story())
    assert full.failed == 1
    assert event["sectors"] == [[16, 1]]
    assert written == ["started", "sector_error"]


def test_a_slow_disk_whose_event_failed_is_still_explained(scene, full):
    full.refused = lambda items: any(getattr(item, "type", "") == "device_slow" for item in items)

    async def story():
        scene.host.disk.answering.clear()
        async with scene.running() as it:
            scene.fail_read(16)
            await until(lambda: full.failed)
            scene.host.disk.answering.set()
            return await scene.next_event(it, "sector_error")

    assert run(story())["sectors"] == [[16, 1]]


def test_a_target_that_cannot_be_asked_costs_the_other_one_nothing(scene, monkeypatch):
    monkeypatch.setattr(daemon, "_RETRY_SECONDS", 0.0)
    halves = {
        name: replace(TARGET, name=name, main=main, start=start, sectors=4096, live=((0, 4096),))
        for name, main, start in (("a", "8:17", 0), ("b", "8:18", 4096))
    }
    scene.host.guarded = list(halves.values())
    scene.host.disk.bad = {16, 20}
    refused = []
    open_main = scene.host.open_main

    def open_some(devno):
        if devno == "8:18" and not refused:
            raise DmRemapError("cannot be opened: Too many open files")
        return open_main(devno)

    scene.host.open_main = open_some

    async def story():
        async with scene.running() as it:
            scene.trace(
                "  x-1 [0] .. 1.2: block_rq_error: 8,16 R () 16 + 1 [-5]",
                "  x-1 [0] .. 1.2: block_rq_error: 8,16 R () 4116 + 1 [-5]",
            )
            first = await scene.next_event(it, "sector_error")
            waiting = it.health()
            refused.append("no more")
            second = await scene.next_event(it, "sector_error", after=first["sequence"])
            await until(lambda: not it.health()["waiting"])
            return first, waiting, second

    first, waiting, second = run(story())
    assert (first["target"], first["sectors"]) == ("a", [[16, 1]])
    assert waiting["waiting"] == 1
    assert (second["target"], second["sectors"]) == ("b", [[20, 1]])


@pytest.mark.parametrize("kind", ["overrun", "blind", "started"])
def test_what_could_not_be_written_by_a_check_is_written_by_a_later_one(
    scene, full, monkeypatch, kind
):
    monkeypatch.setattr(daemon, "_CHECK_SECONDS", 0.0)
    monkeypatch.setattr(daemon, "_TICK_SECONDS", 0.0)
    full.refused = lambda items: kind == "started"
    switch = scene.root / "tracing/instances/dm_remap/events/block/block_rq_error/format"

    async def story():
        async with scene.running() as it:
            full.refused = lambda items: True
            if kind == "overrun":
                scene.overrun(17)
            if kind == "blind":
                switch.write_text('print fmt: "new", REC->dev\n')
                it._lose_trace("someone closed it")
            await until(lambda: full.failed > 2)
            trouble = it.health()["troubles"]["journal"]
            full.refused = lambda items: False
            await scene.next_event(it, kind)
            await until(lambda: "journal" not in it.health()["troubles"])
            return trouble, it.health(), kinds(await it.page(0, 100, 0))

    trouble, health, written = run(story())
    assert "disk is full" in trouble
    assert written.count(kind) == 1
    assert health["overruns"] == (17 if kind == "overrun" else 0)


def test_the_journals_trouble_ends_although_nothing_is_left_to_write(scene, full, monkeypatch):
    monkeypatch.setattr(daemon, "_CHECK_SECONDS", 0.0)
    monkeypatch.setattr(daemon, "_TICK_SECONDS", 0.0)

    async def story():
        async with scene.running() as it:
            it._journal_failed(sqlite3.OperationalError("disk I/O error"))
            full.refused = lambda items: True
            await until(lambda: full.failed > 2)
            assert it.health()["status"] == "blind"
            full.refused = lambda items: False
            await until(lambda: it.health()["status"] == "ok")

    run(story())


STATES = ("ok", "warn", "critical", "full")


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("failing", [False, True])
def test_each_step_that_a_pool_fills_by_is_told_once(scene, full, monkeypatch, restart, failing):
    """All pairs of steps, also over a restart, and while the journal cannot be written."""
    monkeypatch.setattr(daemon, "_CHECK_SECONDS", 0.0)
    monkeypatch.setattr(daemon, "_TICK_SECONDS", 0.0)
    full.refused = lambda items: False
    walk = [state for pair in itertools.product(STATES, STATES) for state in pair]

    def fill(state):
        kept = Kept(7, State(state), f"filled: {state}")
        scene.host.guarded = [replace(TARGET, kept=kept)]

    async def seen(it, state):
        if failing:
            before = full.failed
            full.refused = lambda items: True
            fill(state)
            changes = it._pools.get(str(TARGET.uuid)) != State(state)
            await until(lambda: full.failed > before or not changes)
            full.refused = lambda items: False
        fill(state)
        await until(lambda: it._pools.get(str(TARGET.uuid)) == State(state))

    async def story():
        if not restart:
            async with scene.running() as it:
                for state in walk:
                    await seen(it, state)
                return await it.page(0, 100, 0)
        for state in walk:
            async with scene.running() as it:
                await seen(it, state)
                page = await it.page(0, 100, 0)
        return page

    page = run(story())
    told = [event for event in page.events if event["type"].startswith("pool_")]
    rises = [
        after
        for before, after in itertools.pairwise(["ok", *walk])
        if STATES.index(after) > STATES.index(before)
    ]
    assert [event["type"] for event in told] == [f"pool_{state}" for state in rises]
    assert [event["message"] for event in told] == [f"data: filled: {state}" for state in rises]
    assert {(event["target"], event["generation"]) for event in told} == {("data", 7)}


@pytest.mark.parametrize("note", ["[]", "{", '{"a": "unheard of"}'])
def test_a_note_of_pools_that_is_not_understood_is_no_end(scene, note):
    async def story():
        async with scene.running() as it:
            await it._write([], notes={"pools": note})
        async with scene.running() as it:
            assert it.health()["status"] == "ok"

    run(story())


def test_the_daemon_stops_while_the_journal_cannot_be_written(scene, full, caplog):
    async def story():
        async with scene.running() as it:
            full.refused = lambda items: True
            scene.fail_read(16)
            scene.fail_read(24)
            await until(lambda: full.failed)
            return it

    it = run(story())
    assert it.health()["troubles"]["journal"]
    # The log keeps what nothing else can.
    lost = [record.message for record in caplog.records if "not in the journal" in record.message]
    assert [f"sector={sector}" in text for sector, text in zip((16, 24), lost)] == [True, True]


def test_the_daemon_stops_while_the_journal_cannot_be_opened(scene, full):
    async def story():
        full.refused = lambda items: True
        async with scene.running():
            await until(lambda: full.failed > 2)

    run(story())


def test_checks_go_on_while_errors_never_end(scene, monkeypatch):
    monkeypatch.setattr(daemon, "_CHECK_SECONDS", 0.0)
    line = "  x-1 [0] .. 1.2: block_rq_error: 7,0 R () 16 + 1 [-5]"
    monkeypatch.setattr(TraceInstance, "read", lambda self: [line])

    async def story():
        async with scene.running() as it:
            stats = scene.root / "tracing/instances/dm_remap/per_cpu/cpu0/stats"
            stats.write_text("overrun: 3\ndropped events: 0\n")
            await scene.next_event(it, "overrun")

    run(story())


# What an earlier boot or a hanging disk leaves


def test_what_an_earlier_boot_left_is_told_but_blamed_on_no_disk(scene):
    os.makedirs(scene.settings.state_directory)
    old = Journal(scene.settings.journal, Origin("db1", uuid.UUID(int=7), "boot-old"))
    old.observe([BlockError(True, "8:16", "write", 64, 8, 5, False)] * 2)
    old.close()

    async def story():
        async with scene.running() as it:
            scene.fail_read(16)
            await scene.next_event(it, "sector_error")
            return (await it.page(0, 100, 0)).events, it.health()

    everything, health = run(story())
    told, started, error = everything
    assert [told["type"], started["type"]] == ["overrun", "started"]
    assert "2 failed requests of 8:16" in told["message"]
    assert told["requests"] == 2
    assert error["sectors"] == [[16, 1]]
    assert health["waiting"] == 0


def test_errors_of_a_disk_that_hangs_do_not_pile_up(scene, monkeypatch):
    monkeypatch.setattr(journal_module, "_MANY", 10)
    monkeypatch.setattr(journal_module, "MAX_PLACES", 20)

    async def story():
        scene.host.disk.answering.clear()
        async with scene.running() as it:
            scene.fail_read(16)
            await scene.next_event(it, "device_slow")
            for number in range(100):
                # A long run of single sectors, and single sectors far from each other.
                scene.fail_read(2000 + number)
                scene.fail_read(4000 + 8 * number)
            while it.health()["errors"] < 201:
                await asyncio.sleep(0)
            await until(lambda: it.health()["waiting"] <= 22)
            scene.host.disk.answering.set()
            await scene.next_event(it, "overrun")
            await until(lambda: not it.health()["waiting"])
            return (await it.page(0, 100, 0)).events

    everything = run(story())
    ranges = [item for event in everything for item in event["sectors"]]
    sectors = {sector for start, count in ranges for sector in range(start, start + count)}
    # On a busy machine the run may have been asked for in two parts.
    assert sectors >= {*range(2000, 2100)}
    assert sum(event["requests"] + event["merged"] for event in everything) == 201


def test_what_was_left_unread_keeps_the_errno_of_the_probe():
    def observation(number, operation, sector, count, code):
        return Observation(
            number, 0, BlockError(True, "8:16", operation, sector, count, code, False), 1
        )

    watcher = Watcher(Patience(), lambda: 0.0)
    foreign = [observation(1, "write", 8, 8, errno.ENOLINK), observation(2, "read", 100, 200, 5)]
    question = watcher.question(TARGET, foreign)
    for found in (errno.ENODATA, errno.ENOLINK, 0):
        result = Probe(((100, 1),), ((164, 136),), True, found)
        (left,) = daemon._unread(question, Answer(DeviceState.LIVE, True, result))
        assert left.errno == (found if found in PROBE_ERRORS else errno.EIO)
        again = watcher.question(TARGET, [Observation(3, 0, left, 1)])
        assert list(again.reads) == [(164, 136)]


# The HTTP interface


def test_events_are_read_by_cursor_over_tls(scene):
    async def story():
        async with scene.running() as it:
            scene.fail_read(16)
            await scene.next_event(it, "sector_error")
            first = await scene.get_json(it, "/v1/events?limit=1")
            rest = await scene.get_json(it, f"/v1/events?after={first['cursor']}")
            return it.journal_id, first, rest

    identity, first, rest = run(story())
    assert first["journal"] == identity
    assert [event["type"] for event in first["events"]] == ["started"]
    assert [event["type"] for event in rest["events"]] == ["sector_error"]
    assert (rest["cursor"], rest["oldest"], rest["newest"]) == (2, 1, 2)


def test_waiting_ends_with_the_next_event(scene):
    async def story():
        async with scene.running() as it:
            waiting = asyncio.ensure_future(scene.get_json(it, "/v1/events?after=1&wait=60"))
            await scene.get(it, "/v1/health")
            scene.fail_read(16)
            return await waiting

    assert [event["type"] for event in run(story())["events"]] == ["sector_error"]


def test_waiting_ends_when_the_daemon_stops(scene):
    async def story():
        asked = asyncio.Event()
        async with scene.running() as it:
            page = it.page

            def noted(*arguments):
                asked.set()
                return page(*arguments)

            it.page = noted
            waiting = asyncio.ensure_future(scene.get_json(it, "/v1/events?after=1&wait=60"))
            await asked.wait()
        return await waiting

    assert run(story())["events"] == []


def test_a_cursor_from_the_future_is_answered_at_once(scene):
    async def story():
        async with scene.running() as it:
            return await scene.get_json(it, "/v1/events?after=99&wait=60")

    assert run(story())["newest"] == 1


@pytest.mark.parametrize("path", ["/v1/events", "/v1/health", "/metrics", "/nothing"])
@pytest.mark.parametrize("token", [None, "wrong", "é"])
def test_nothing_is_shown_without_the_token(scene, path, token):
    async def story():
        async with scene.running() as it:
            return await scene.get(it, path, token)

    status, text = run(story())
    assert status == 401
    assert list(json.loads(text)) == ["error"]


def test_a_token_in_the_address_is_not_accepted(scene):
    async def story():
        async with scene.running() as it:
            return await scene.get(it, f"/v1/events?token={scene.token}", None)

    assert run(story())[0] == 401


def test_the_token_is_in_no_log(scene, caplog):
    caplog.set_level(logging.DEBUG)

    async def story():
        async with scene.running() as it:
            await scene.get(it, "/v1/events")
            await scene.get(it, "/v1/events", "wrong-" + scene.token)

    run(story())
    assert scene.token not in caplog.text


@pytest.mark.parametrize(
    "query",
    [
        "after=-1",
        "after=x",
        "after=9223372036854775808",
        "limit=0",
        "limit=1001",
        "wait=61",
        "wait=1.5",
        "after=%D9%A1",
    ],
)
def test_bad_parameters_are_refused(scene, query):
    async def story():
        async with scene.running() as it:
            return await scene.get(it, f"/v1/events?{query}")

    status, text = run(story())
    assert status == 400
    assert "must be a number" in json.loads(text)["error"]


def test_an_untrusted_authority_is_refused_by_the_client(scene):
    import ssl

    import aiohttp

    async def story():
        async with scene.running() as it:
            await scene.get(it, "/v1/health", tls=ssl.create_default_context())

    with pytest.raises(aiohttp.ClientConnectorCertificateError):
        run(story())


def test_metrics_are_in_the_prometheus_form(scene):
    async def story():
        async with scene.running() as it:
            scene.fail_read(16)
            await scene.next_event(it, "sector_error")
            return await scene.get(it, "/metrics")

    status, text = run(story())
    assert status == 200
    assert "dm_remapd_ok 1.0" in text
    assert 'dm_remapd_events_total{type="sector_error"} 1.0' in text
    assert "dm_remapd_errors_total 1.0" in text


def test_a_daemon_that_cannot_listen_watches_and_tries_again(scene, monkeypatch):
    monkeypatch.setattr(daemon, "_CHECK_SECONDS", 0.0)
    monkeypatch.setattr(daemon, "_TICK_SECONDS", 0.0)

    async def story():
        with socket.create_server(("127.0.0.1", 0)) as holder:
            taken = replace(scene.settings, port=holder.getsockname()[1])
            async with scene.running(taken) as it:
                scene.fail_read(16)
                await scene.next_event(it, "sector_error")
                health = it.health()
                holder.close()
                await until(lambda: not it.health()["troubles"])
                body = await scene.get_json(it, "/v1/events")
                return health, [event["type"] for event in body["events"]], it.port == taken.port

    health, written, same_port = run(story())
    assert health["status"] == "degraded"
    assert "choose another address or port" in health["troubles"]["listening"]
    assert written == ["started", "sector_error"]
    assert same_port


async def connect(it):
    link = socket.socket()
    link.setblocking(False)
    await asyncio.get_running_loop().sock_connect(link, ("127.0.0.1", it.port))
    return link


async def closed(link):
    """Wait until the other side has closed a connection."""
    try:
        return await asyncio.get_running_loop().sock_recv(link, 1) == b""
    except ConnectionResetError:
        return True


def test_connections_are_few_and_leave_room_for_others_when_they_end(scene, monkeypatch):
    monkeypatch.setattr(api, "MAX_CONNECTIONS", 5)
    monkeypatch.setattr(api, "_HANDSHAKE_SECONDS", 3600.0)

    async def story():
        async with scene.running() as it:
            before = len(os.listdir("/proc/self/fd"))
            links = [await connect(it) for _unused in range(50)]
            ended = [asyncio.ensure_future(closed(link)) for link in links]
            await until(lambda: sum(task.done() for task in ended) >= 45)
            held = len(os.listdir("/proc/self/fd")) - before - 50
            for task in ended:
                task.cancel()
            for link in links:
                link.close()
            await until(lambda: len(os.listdir("/proc/self/fd")) <= before)
            return held, await scene.get(it, "/v1/health")

    held, (status, _unused) = run(story())
    assert held <= 5
    assert status == 200


def test_a_handshake_that_does_not_end_makes_room_for_others(scene, monkeypatch):
    monkeypatch.setattr(api, "MAX_CONNECTIONS", 1)
    monkeypatch.setattr(api, "_HANDSHAKE_SECONDS", 0.01)

    async def story():
        async with scene.running() as it:
            link = await connect(it)
            assert await closed(link)
            link.close()
            monkeypatch.setattr(api, "_HANDSHAKE_SECONDS", 60.0)
            return await scene.get(it, "/v1/health")

    assert run(story())[0] == 200


def test_a_connection_is_closed_unless_it_shows_the_token_in_time(scene, monkeypatch):
    import ssl

    monkeypatch.setattr(api, "_TOKEN_SECONDS", 1)

    async def story():
        async with scene.running() as it:
            tls = ssl.create_default_context(cafile=scene.ca_file)
            first, asking = await asyncio.open_connection("localhost", it.port, ssl=tls)
            request = ("GET /v1/events?after=1&wait=60 HTTP/1.1", "Host: localhost")
            token = f"Authorization: Bearer {scene.token}"
            asking.write("\r\n".join([*request, token, "", ""]).encode())
            second, silent = await asyncio.open_connection("localhost", it.port, ssl=tls)
            with contextlib.suppress(ConnectionResetError):
                assert await second.read() == b""
            # The time of the one that came before is over too.
            scene.fail_read(16)
            answer = await first.readuntil(b"}]}")
            silent.close()
            asking.close()
            return answer

    assert b'"type":"sector_error"' in run(story())


# Credentials and settings


def test_credentials_are_made_once_and_are_private(scene):
    names = ["localhost", "127.0.0.1"]
    assert credentials.missing(scene.settings, names) == []
    before = Path(scene.settings.token_file).read_text()
    assert credentials.make(scene.settings, names) == []
    assert Path(scene.settings.token_file).read_text() == before
    for path in (scene.settings.token_file, scene.settings.key):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    left = sorted(os.listdir(scene.root / "tls"))
    assert left == ["ca.crt", "server.crt", "server.key"]


def test_another_name_needs_another_certificate_but_no_other_token(scene):
    assert credentials.make(scene.settings, ["db1.example.org", "::1"]) == ["certificate"]
    assert credentials.missing(scene.settings, ["::1", "db1.example.org"]) == []


@pytest.mark.parametrize("name", ["a b", "x,DNS:y", "-x", "", "a\nb"])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(DmRemapError, match="neither a host name nor an address"):
        credentials.subject_names([name])


@pytest.mark.parametrize("which", ["token_file", "key"])
def test_nobody_is_served_while_others_can_read_the_secrets(scene, which):
    os.chmod(getattr(scene.settings, which), 0o640)

    async def story():
        async with scene.running() as it:
            scene.fail_read(16)
            await scene.next_event(it, "sector_error")
            return it.health()

    health = run(story())
    assert health["status"] == "degraded"
    assert "can be read by others" in health["troubles"]["listening"]


@pytest.mark.parametrize(
    ("which", "content"),
    [
        ("token_file", None),
        ("token_file", "short"),
        ("key", None),
        ("certificate", None),
        ("certificate", "none"),
    ],
)
def test_the_remedy_for_bad_credentials_is_a_command_that_works(scene, which, content):
    path = Path(getattr(scene.settings, which))
    path.unlink()
    if content is not None:
        path.write_text(content)
        path.chmod(0o600)

    async def trouble():
        async with scene.running() as it:
            return it.health()["troubles"].get("listening", "")

    found = run(trouble())
    device, _unused, remedy = found.partition("; remove it, and run: ")
    words = shlex.split(remedy.partition(";")[0])
    assert words[0] == "dm-remapd"
    config = scene.root / "daemon.json"
    values = {
        name: getattr(scene.settings, name)
        for name in ("host", "port", "certificate", "key", "token_file", "state_directory")
    }
    config.write_text(json.dumps(values))
    Path(device.partition(": ")[0]).unlink(missing_ok=True)
    assert daemon.main(["--config", str(config), *words[1:]]) == 0
    assert run(trouble()) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "has no host"),
        ('{"host": "db1", "prot": 1}', "unknown key 'prot'"),
        ('{"host": "db1", "port": "9741"}', "port is '9741', not int"),
        ('{"host": "db1", "port": true}', "port is True"),
        ('{"host": "db1", "port": 65536}', "not from 0 to 65535"),
        ('{"host": "db1", "keep_events": 1}', "keep_events is 1"),
    ],
)
def test_a_wrong_configuration_is_refused(tmp_path, text, message):
    path = tmp_path / "daemon.json"
    path.write_text(text)
    with pytest.raises(DmRemapError, match=message):
        settings.load(str(path))


def test_a_configuration_is_read(tmp_path):
    path = tmp_path / "daemon.json"
    path.write_text('{"host": "db1", "probe_seconds": 5, "address": "::"}')
    found = settings.load(str(path))
    assert (found.host, found.probe_seconds, found.address) == ("db1", 5, "::")


def test_every_key_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "daemon.md").read_text()
    table = page.partition("## daemon.json")[2].partition("\n## ")[0]
    listed = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    assert listed == [field.name for field in fields(settings.Settings)]


def test_a_missing_configuration_ends_the_program_with_status_1(tmp_path, caplog):
    assert daemon.main(["--config", str(tmp_path / "nothing.json")]) == 1
    assert "cannot be read" in caplog.text


def test_the_command_line_says_what_credentials_are_missing(tmp_path, capsys):
    config = tmp_path / "daemon.json"
    values = {
        "host": "db1",
        "certificate": str(tmp_path / "tls/server.crt"),
        "key": str(tmp_path / "tls/server.key"),
        "token_file": str(tmp_path / "token"),
    }
    config.write_text(json.dumps(values))
    command = ["--config", str(config), "credentials", "--name", "db1"]
    assert daemon.main([*command, "--check"]) == 0
    assert json.loads(capsys.readouterr().out) == {"credentials": ["token", "certificate"]}
    assert not (tmp_path / "token").exists()
    assert daemon.main(command) == 0
    capsys.readouterr()
    assert daemon.main([*command, "--check"]) == 0
    assert json.loads(capsys.readouterr().out) == {"credentials": []}
