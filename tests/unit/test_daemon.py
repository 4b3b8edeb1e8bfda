# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The daemon as a whole, on a machine made of files, and its HTTP interface over real TLS."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sqlite3
import stat
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from dm_remap import credentials, daemon, settings
from dm_remap.errors import DmRemapError
from tests.unit.daemon_scene import TARGET, Scene


@pytest.fixture
def scene(tmp_path):
    made = Scene(tmp_path)
    yield made
    made.close()


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


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
    assert list(Path(scene.settings.state_directory).glob("journal.db.damaged-*"))


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
        async with scene.running() as it:
            waiting = asyncio.ensure_future(scene.get_json(it, "/v1/events?after=1&wait=60"))
            await scene.get(it, "/v1/health")
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


def test_a_port_in_use_is_refused_with_a_remedy(scene):
    async def story():
        async with scene.running() as it:
            taken = replace(scene.settings, port=it.port)
            async with scene.running(taken):
                pass

    with pytest.raises(DmRemapError, match="choose another address or port"):
        run(story())


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
def test_secrets_that_others_can_read_are_refused(scene, which):
    os.chmod(getattr(scene.settings, which), 0o640)

    async def story():
        async with scene.running():
            pass

    with pytest.raises(DmRemapError, match="can be read by others"):
        run(story())


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
