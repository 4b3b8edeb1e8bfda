# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the healer reports becomes events, and the daemon leaves to it what it heals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from dataclasses import replace
from typing import Any

import pytest

from dm_remap import daemon as daemon_module
from dm_remap import healed as healed_module
from dm_remap.healed import HealerLink, finding_of
from dm_remap.healer import ReportServer
from dm_remap.journal import Journal
from dm_remap.reflex import Reports
from tests.unit.daemon_scene import TARGET, Scene

HELD = replace(TARGET, on_error="hold")


def report(kind: str, **changes: Any) -> dict[str, Any]:
    """A report as `reflex.Reflex` makes it."""
    made = {
        "type": kind,
        "target": "data",
        "device": "/dev/sdb",
        "generation": 4,
        "operation": "read",
        "errno": 5,
        "requests": 2,
        "hit": [{"start": 40, "count": 16}],
        "moved": [{"start": 40, "count": 8}] if kind == "healed" else [],
        "lost": [],
        "pause_seconds": 0.01,
        "reason": "the pool is full" if kind == "failed" else "",
    }
    return {**made, **changes}


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@pytest.fixture
def scene(tmp_path, monkeypatch):
    monkeypatch.setattr(daemon_module, "_HEALER_SECONDS", 0.0)
    monkeypatch.setattr(daemon_module, "_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(healed_module, "_RETRY_SECONDS", 0.001)
    made = Scene(tmp_path)
    made.host.guarded = [HELD]
    yield made
    made.close()


@pytest.fixture
def reports(scene) -> Reports:
    """The reports of a healer that runs."""
    kept = Reports()
    ReportServer(kept, str(scene.root / "healer.sock"))
    return kept


LOST = [{"start": 41, "count": 1}]


@pytest.mark.parametrize(
    ("said", "kind", "severity", "sectors", "suspect"),
    [
        (report("healed"), "remapped", "warning", [], [[40, 8]]),
        (report("healed", lost=LOST), "sectors_lost", "critical", [[41, 1]], [[40, 8]]),
        (report("passed"), "transient_error", "warning", [], [[40, 16]]),
        (report("failed"), "remap_failed", "error", [], [[40, 16]]),
        (report("flush_failed", operation="flush", hit=[]), "flush_failed", "critical", [], []),
        (report("device_lost"), "device_lost", "critical", [], [[40, 16]]),
    ],
)
def test_a_report_becomes_an_event(scene, reports, said, kind, severity, sectors, suspect):
    async def main():
        async with scene.running() as daemon:
            reports.add(dict(said))
            event = await scene.next_event(daemon, kind)
            await until(lambda: reports.first() is None)
            return event, daemon.health(), await scene.get(daemon, "/metrics")

    event, health, (_status, metrics) = run(main())
    assert (event["severity"], event["sectors"], event["suspect"]) == (severity, sectors, suspect)
    assert (event["target"], event["device"], event["generation"]) == ("data", "sdb", 4)
    assert (event["errno"], event["requests"]) == (5, 2)
    assert event["operation"] == said["operation"]
    file = {"start": 41, "count": 1, "kind": "file", "path": "/data/letter"}
    assert event.get("files") == ([file] if kind == "sectors_lost" else None)
    assert event["message"].startswith("data: ")
    counts = {"healed": 0, "failed": 0, "lost_sectors": len(said["lost"])}
    counts.update({said["type"]: 1} if said["type"] in counts else {})
    assert {name: health[name] for name in counts} == counts
    for name, count in counts.items():
        assert f"dm_remapd_{name}_total {float(count)}" in metrics
    assert "healer" not in health["troubles"]


def test_an_event_has_the_time_of_its_report(scene, reports):
    async def main():
        reports.add(report("healed"))
        reports.first()["time_ns"] = 1_000_000_000
        async with scene.running() as daemon:
            return await scene.next_event(daemon, "remapped")

    assert run(main())["time"] == "1970-01-01T00:00:01.000000Z"


def test_the_same_trouble_is_told_once(scene, reports):
    """An application that tries again and again must not flood anyone."""

    async def main():
        async with scene.running() as daemon:
            for _time in range(5):
                reports.add(report("failed"))
                reports.add(report("flush_failed"))
            reports.add(report("healed"))
            await scene.next_event(daemon, "remapped")
            return daemon.health()

    health = run(main())
    assert (health["events"]["remap_failed"], health["events"]["flush_failed"]) == (1, 1)
    assert health["merged"] == 16
    assert health["failed"] == 5


def test_a_report_is_answered_when_it_is_in_the_journal(scene, reports, monkeypatch):
    real, refused = Journal.append, []

    def append(journal, drafts, *rest, **named):
        kinds = [draft.type for draft in drafts]
        if "remapped" in kinds and len(refused) < 3:
            refused.append(reports.first())
            raise sqlite3.OperationalError("disk is full")
        return real(journal, drafts, *rest, **named)

    async def main():
        monkeypatch.setattr(Journal, "append", append)
        async with scene.running() as daemon:
            reports.add(report("healed"))
            await scene.next_event(daemon, "remapped")
            await until(lambda: reports.first() is None)
            return daemon.health()

    assert run(main())["events"]["remapped"] == 1
    assert len(refused) == 3
    assert all(refused), "the healer still has it"


def test_a_daemon_that_stops_leaves_the_report_to_the_next(scene, reports, monkeypatch):
    real, refused = Journal.append, asyncio.Event()

    def append(journal, drafts, *rest, **named):
        if any(draft.type == "remapped" for draft in drafts):
            refused.set()
            raise sqlite3.OperationalError("disk is full")
        return real(journal, drafts, *rest, **named)

    async def main():
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "append", append)
            async with scene.running():
                reports.add(report("healed"))
                await until(refused.is_set)
        assert reports.first() is not None
        async with scene.running() as daemon:
            await scene.next_event(daemon, "remapped")

    run(main())


@contextlib.asynccontextmanager
async def healer_that_says(scene, *lines: bytes):
    """A healer that says the same at each connection; yields its answers."""
    answers: list[bytes] = []

    async def serve(reader, writer):
        for line in lines:
            writer.write(line)
            answers.append(await reader.readline())
        writer.close()

    server = await asyncio.start_unix_server(serve, str(scene.root / "healer.sock"))
    try:
        yield answers
    finally:
        server.close()


def line(kind: str, number: int, begun: int = 7, **changes: Any) -> bytes:
    return (
        json.dumps({**report(kind, **changes), "id": [begun, number], "time_ns": 9}).encode()
        + b"\n"
    )


def test_a_report_that_comes_again_is_told_once(scene):
    """Also after a restart of the daemon."""

    async def main():
        async with healer_that_says(scene, line("healed", 1), line("passed", 2)) as answers:
            for most in (6, 12):
                async with scene.running() as daemon:
                    await until(lambda: len(answers) >= most)  # noqa: B023
                    page = await daemon.page(0, 100, 0)
            return [event["type"] for event in page.events]

    kinds = run(main())
    assert (kinds.count("remapped"), kinds.count("transient_error")) == (1, 1)


def test_reports_that_the_healer_dropped_are_told(scene):
    said = [
        line("healed", 1),
        line("healed", 4),
        line("healed", 2, begun=8),
        line("healed", 3, begun=8),
    ]

    async def main():
        async with healer_that_says(scene, *said) as answers, scene.running() as daemon:
            await until(lambda: len(answers) >= len(said))
            page = await daemon.page(0, 100, 0)
            return [e["message"] for e in page.events if e["type"] == "overrun"]

    messages = run(main())
    assert [message.split()[0] for message in messages] == ["2", "1"]


@pytest.mark.parametrize(
    "bad",
    [b"{\n", b"[]\n", b'{"type": "healed"}\n', line("healed", 1, moved=3), line("unknown", 1)],
)
def test_a_report_that_is_not_understood_hides_no_other(scene, bad):
    async def main():
        async with healer_that_says(scene, bad, line("healed", 2)), scene.running() as daemon:
            await scene.next_event(daemon, "remapped")

    run(main())


def test_what_the_healer_heals_is_no_news(scene, reports, monkeypatch):
    waits = []
    real = HealerLink.wait

    async def wait(link, targets, seconds):
        waits.append(targets)
        await real(link, targets, seconds)

    async def main():
        monkeypatch.setattr(HealerLink, "wait", wait)
        async with scene.running() as daemon:
            reports.add({"type": "healing", "target": "data"})
            await until(lambda: reports.first() is None)
            scene.fail_read(41)
            await until(lambda: waits)
            scene.host.guarded = [replace(HELD, live=((0, 40), (48, 8144)))]
            reports.add(report("healed"))
            await until(lambda: daemon.health()["errors"] and not daemon.health()["waiting"])
            return daemon.health()["events"]

    assert run(main()) == {"remapped": 1, "started": 1}
    assert waits[0] == ["data"]


def test_what_the_healer_could_not_heal_is_explained_by_the_daemon(scene, reports):
    """Its event has the bad sectors, and so the rulebook acts once."""

    async def main():
        async with scene.running() as daemon:
            reports.add({"type": "healing", "target": "data"})
            await until(lambda: reports.first() is None)
            scene.fail_read(41)
            await until(lambda: daemon.health()["waiting"])
            reports.add(report("failed"))
            event = await scene.next_event(daemon, "sector_error")
            return event, await daemon.page(0, 100, 0)

    event, page = run(main())
    assert event["sectors"] == [[41, 1]]
    assert [e["type"] for e in page.events if e["sectors"]] == ["sector_error"]


def test_without_the_healer_nothing_waits_for_it_and_the_health_says_so(scene):
    async def main():
        async with scene.running() as daemon:
            scene.fail_read(41)
            await scene.next_event(daemon, "sector_error")
            alone = daemon.health()
            kept = Reports()
            ReportServer(kept, str(scene.root / "healer.sock"))
            kept.add(report("healed"))
            await scene.next_event(daemon, "remapped")
            return alone, daemon.health()

    alone, later = run(main())
    assert alone["status"] == "degraded"
    assert "nobody heals failed I/O of data" in alone["troubles"]["healer"]
    assert later["status"] == "ok"


def test_a_host_whose_targets_pass_errors_on_needs_no_healer(scene):
    async def main():
        scene.host.guarded = [TARGET]
        async with scene.running() as daemon:
            return daemon.health()

    assert run(main())["troubles"] == {}


def test_a_healer_that_dies_while_it_heals_keeps_nothing_waiting(scene):
    async def main():
        # The daemon may have found the healer before it is ready.
        ready = asyncio.get_running_loop().create_future()

        async def serve(reader, writer):
            writer.write(b'{"type": "healing", "target": "data"}\n')
            await reader.readline()
            daemon = await ready
            scene.fail_read(41)
            await until(lambda: daemon.health()["waiting"])
            writer.close()

        server = await asyncio.start_unix_server(serve, str(scene.root / "healer.sock"))
        async with scene.running() as daemon:
            ready.set_result(daemon)
            event = await scene.next_event(daemon, "sector_error")
        server.close()
        return event

    assert run(main())["sectors"] == [[41, 1]]


def test_the_healer_is_waited_for_while_it_is_there():
    async def main():
        link = HealerLink("/nowhere", lambda report: None)
        await link.wait(["data"], 1e9)
        link.connected = True
        await link.wait(["data"], 0)
        waiting = asyncio.ensure_future(link.wait(["data"], 1e9))
        await asyncio.sleep(0)
        assert not waiting.done()
        link.connected = False
        link._news.set()
        await waiting

    run(main())


def test_ranges_of_the_healer_are_remembered_as_looked_at():
    passed = finding_of(report("passed"), lambda target, condition: True)
    assert passed.probed == ((40, 16),)
    assert passed.alive
    failed = finding_of(report("failed"), lambda target, condition: True)
    assert failed.probed == ()
    flush = finding_of(report("flush_failed"), lambda target, condition: True)
    assert "device_error/flush/5" in flush.conditions
