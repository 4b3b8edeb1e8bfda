# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The event source against a host that answers what the test says, over real TLS."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import importlib.util
import json
import sys
import uuid
from pathlib import Path

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from dm_remap import credentials
from dm_remap.settings import Settings

PATH = Path(__file__).parents[2] / "extensions/eda/plugins/event_source/health.py"
SPEC = importlib.util.spec_from_file_location("health", PATH)
health = importlib.util.module_from_spec(SPEC)
sys.modules["health"] = health
SPEC.loader.exec_module(health)

JOURNAL = str(uuid.UUID(int=1))
OTHER_JOURNAL = str(uuid.UUID(int=2))


def event(sequence, **changes):
    return {
        "schema": 1,
        "uuid": str(uuid.UUID(int=1000 + sequence)),
        "sequence": sequence,
        "time": "2026-01-01T00:00:00.000000Z",
        "host": "what-it-calls-itself",
        "target": "data",
        "device": "sdb",
        "type": "sector_error",
        "severity": "error",
        "operation": "read",
        "sectors": [[8, 1], [16, 4]],
        "suspect": [[0, 32]],
        "errno": 5,
        "requests": 1,
        "merged": 0,
        "generation": 3,
        "message": "text",
        **changes,
    }


class Endless:
    """Answers that never run out."""

    def __init__(self, make):
        self.make = make

    def pop(self, _index):
        return self.make()


class FakeHost:
    """A host with a journal that the test writes."""

    def __init__(self, root):
        self.root = root
        self.journal = JOURNAL
        self.events = []
        self.first = 1
        self.requests = []
        self.answers = []
        self.settings = Settings(
            host="x",
            certificate=str(root / "tls/server.crt"),
            key=str(root / "tls/server.key"),
            token_file=str(root / "token"),
        )
        credentials.make(self.settings, ["localhost"])
        self.token = Path(self.settings.token_file).read_text().strip()
        self.more = asyncio.Event()

    def add(self, *events):
        self.events += events
        self.more.set()
        self.more = asyncio.Event()

    async def answer(self, request):
        self.requests.append(request)
        if self.answers:
            return self.answers.pop(0)
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.Response(status=401)
        after, wait = int(request.query["after"]), int(request.query["wait"])
        more = self.more
        if wait and after == self.newest:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(more.wait(), wait)
        found = [item for item in self.events if item["sequence"] > after]
        found = found[: int(request.query["limit"])]
        return web.json_response(
            {
                "journal": self.journal,
                "cursor": found[-1]["sequence"] if found else min(after, self.newest),
                "oldest": self.first,
                "newest": self.newest,
                "events": found,
            }
        )

    @property
    def newest(self):
        return max((item["sequence"] for item in self.events), default=self.first - 1)

    @contextlib.asynccontextmanager
    async def listening(self, port=0):
        application = web.Application()
        application.router.add_get("/v1/events", self.answer)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.settings.certificate, self.settings.key)
        site = web.TCPSite(runner, "127.0.0.1", port, ssl_context=context)
        await site.start()
        self.port = runner.addresses[0][1]
        try:
            yield self
        finally:
            await runner.cleanup()

    def entry(self, name="db1"):
        return {
            "name": name,
            "url": f"https://localhost:{self.port}",
            "ca_file": credentials.authority_path(self.settings),
            "token_file": self.settings.token_file,
        }

    def arguments(self, **changes):
        return {
            "hosts": [self.entry()],
            "cursor_directory": str(self.root / "cursors"),
            **changes,
        }

    def cursor(self, name="db1"):
        return health.CursorFile(self.root / "cursors", name).load()


@contextlib.asynccontextmanager
async def running(arguments):
    """Run the source; yields the queue that the rule engine would read."""
    queue = asyncio.Queue(1)
    task = asyncio.ensure_future(health.main(queue, arguments))

    async def take():
        getting = asyncio.ensure_future(queue.get())
        await asyncio.wait({getting, task}, timeout=30, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        assert getting.done(), "no event came in 30 seconds"
        return getting.result()

    try:
        yield take
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Let attempts follow each other at once."""
    monkeypatch.setattr(health, "_FIRST_DELAY", 0.01)
    monkeypatch.setattr(health, "_LONGEST_DELAY", 0.02)
    monkeypatch.setattr(health, "_RESCAN_SECONDS", 0.05)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


def test_events_come_in_order_and_the_cursor_follows(tmp_path):
    async def story():
        async with FakeHost(tmp_path).listening() as host:
            host.add(event(1), event(2))
            async with running(host.arguments(limit=1)) as take:
                first, second = await take(), await take()
                host.add(event(3))
                third = await take()
                await until(lambda: host.cursor().position == 3)
            return [first, second, third], host.cursor()

    events, cursor = run(story())
    assert [item["sequence"] for item in events] == [1, 2, 3]
    assert cursor == health.Cursor(JOURNAL, 3)


def test_an_event_names_the_host_that_the_controller_knows(tmp_path):
    async def story():
        async with FakeHost(tmp_path).listening() as host:
            host.add(event(1))
            async with running(host.arguments()) as take:
                return await take()

    found = run(story())
    assert found["host"] == "db1"
    assert found["meta"] == {"uuid": event(1)["uuid"], "hosts": ["db1"]}
    assert found["ranges"] == [{"start": 8, "count": 1}, {"start": 16, "count": 4}]
    assert found["sector_count"] == 5


def test_a_restart_goes_on_at_the_cursor(tmp_path):
    async def story():
        async with FakeHost(tmp_path).listening() as host:
            host.add(event(1), event(2))
            async with running(host.arguments()) as take:
                await take()
                await take()
                await until(lambda: host.cursor().position == 2)
            host.add(event(3))
            async with running(host.arguments()) as take:
                return await take()

    assert run(story())["sequence"] == 3


def test_the_cursor_stays_until_the_engine_has_the_event(tmp_path):
    async def story():
        async with FakeHost(tmp_path).listening() as host:
            host.add(event(1), event(2))
            feedback = asyncio.Queue(1)
            arguments = host.arguments(eda_feedback_queue=feedback, feedback=True)
            async with running(arguments) as take:
                first = await take()
                await until(lambda: len(host.requests) >= 2)
                before = host.cursor().position
                await feedback.put(first)
                await take()
            return before, host.cursor().position

    assert run(story()) == (0, 1)


def test_an_event_that_was_not_acknowledged_comes_again_after_a_restart(tmp_path):
    async def story():
        async with FakeHost(tmp_path).listening() as host:
            host.add(event(1))
            arguments = host.arguments(eda_feedback_queue=asyncio.Queue(1))
            async with running(arguments) as take:
                first = await take()
            async with running(arguments) as take:
                second = await take()
            return first, second

    first, second = run(story())
    assert first["meta"]["uuid"] == second["meta"]["uuid"]


def test_an_event_is_offered_again_when_the_engine_keeps_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(health, "_ACKNOWLEDGE_SECONDS", 0.05)

    async def story():
        async with FakeHost(tmp_path).listening() as host:
            host.add(event(1), event(2))
            arguments = host.arguments(eda_feedback_queue=asyncio.Queue(1))
            async with running(arguments) as take:
                return [(await take())["sequence"] for _unused in range(4)]

    assert run(story()) == [1, 1, 1, 2]


def test_feedback_without_persistence_is_refused(tmp_path, monkeypatch):
    conf = pytest.importorskip("ansible_rulebook.conf")
    monkeypatch.setattr(conf.settings, "persistence_enabled", False, raising=False)
    monkeypatch.setattr(health, "_PERSISTENCE_SECONDS", 0)

    async def story():
        async with FakeHost(tmp_path).listening() as host:
            arguments = host.arguments(eda_feedback_queue=asyncio.Queue(1))
            async with running(arguments) as take:
                await take()

    with pytest.raises(health.BadConfiguration, match="drools_db_file_path"):
        run(story())


@pytest.fixture(autouse=True)
def persistence(monkeypatch):
    """Let the rule engine's persistence look switched on."""
    with contextlib.suppress(ImportError):
        from ansible_rulebook.conf import settings

        monkeypatch.setattr(settings, "persistence_enabled", True, raising=False)


def test_a_host_that_comes_back_is_followed_again(tmp_path):
    async def story():
        host = FakeHost(tmp_path)
        async with host.listening():
            host.add(event(1))
            arguments = host.arguments()
            async with running(arguments) as take:
                await take()
                await until(lambda: len(host.requests) >= 2)
                host.answers = [web.Response(status=500) for _unused in range(3)]
                host.add(event(2))
                return await take()

    assert run(story())["sequence"] == 2


def test_a_restarted_daemon_is_reached_on_a_new_connection(tmp_path):
    async def story():
        host = FakeHost(tmp_path)
        async with contextlib.AsyncExitStack() as stack:
            first = await stack.enter_async_context(contextlib.AsyncExitStack())
            await first.enter_async_context(host.listening())
            host.add(event(1))
            async with running(host.arguments(outage=1)) as take:
                await take()
                await first.aclose()
                silent = await take()
                async with host.listening(host.port):
                    host.add(event(2))
                    return silent, await take()

    silent, found = run(story())
    assert (silent["type"], silent["host"], silent["sectors"]) == ("host_silent", "db1", [])
    assert found["sequence"] == 2


def test_a_long_outage_is_told_once(tmp_path):
    async def story():
        async with FakeHost(tmp_path).listening() as host:
            host.token = "another token, which the controller does not have"
            async with running(host.arguments(outage=1)) as take:
                silent = await take()
                count = len(host.requests)
                await until(lambda: len(host.requests) > count + 5)
                host.token = Path(host.settings.token_file).read_text().strip()
                host.add(event(1))
                return silent, await take()

    silent, found = run(story())
    assert "401" in silent["message"]
    assert found["sequence"] == 1


def test_a_new_journal_is_read_from_its_beginning_and_the_loss_is_told(tmp_path):
    async def story():
        async with FakeHost(tmp_path).listening() as host:
            host.add(event(1), event(2))
            async with running(host.arguments()) as take:
                await take()
                await take()
                await until(lambda: host.cursor().position == 2)
            host.journal, host.events = OTHER_JOURNAL, [event(1, message="new")]
            async with running(host.arguments()) as take:
                return await take(), await take()

    told, found = run(story())
    assert told["type"] == "events_lost"
    assert (found["sequence"], found["message"]) == (1, "new")


def test_events_that_were_removed_unread_are_told(tmp_path):
    async def story():
        async with FakeHost(tmp_path).listening() as host:
            host.add(event(1))
            async with running(host.arguments()) as take:
                await take()
                await until(lambda: host.cursor().position == 1)
            host.events, host.first = [event(9)], 9
            async with running(host.arguments()) as take:
                return await take(), await take()

    told, found = run(story())
    assert (told["type"], found["sequence"]) == ("events_lost", 9)
    assert "7 events" in told["message"]


def test_a_journal_that_went_back_is_read_again(tmp_path):
    async def story():
        async with FakeHost(tmp_path).listening() as host:
            host.add(event(1), event(2))
            async with running(host.arguments()) as take:
                await take()
                await take()
                await until(lambda: host.cursor().position == 2)
            host.events = [event(1)]
            async with running(host.arguments()) as take:
                return await take(), await take()

    told, found = run(story())
    assert (told["type"], found["sequence"]) == ("events_lost", 1)


def test_a_newcomer_may_begin_at_the_end(tmp_path):
    async def story():
        async with FakeHost(tmp_path).listening() as host:
            host.add(event(1), event(2))
            async with running(host.arguments(start="newest")) as take:
                await until(lambda: host.cursor().position == 2)
                host.add(event(3))
                return await take()

    assert run(story())["sequence"] == 3


def test_a_redirect_is_not_followed_with_the_token(tmp_path):
    async def story():
        async with FakeHost(tmp_path).listening() as host:
            host.answers = [web.Response(status=302, headers={"Location": "/v1/events?after=0"})]
            host.add(event(1))
            async with running(host.arguments()) as take:
                await take()
            return [request.query.get("limit") for request in host.requests[:2]]

    assert run(story()) == ["100", "100"]


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"journal": "x"}', b"\xff", b'{"journal": "%s"}' % b"x" * 99]
)
def test_a_strange_answer_is_an_outage_not_an_end(tmp_path, body):
    async def story():
        async with FakeHost(tmp_path).listening() as host:
            host.answers = [web.Response(body=body)]
            host.add(event(1))
            async with running(host.arguments()) as take:
                return await take()

    assert run(story())["sequence"] == 1


NESTED = b'{"journal": ' + b"[" * 200_000


@pytest.mark.parametrize(
    "body", [NESTED, b'{"events": [' + b'{"a":' * 100_000, b"\xff" * 1_000_000]
)
def test_one_hosts_strange_answers_do_not_keep_the_source_from_another(tmp_path, body, caplog):
    async def story():
        (tmp_path / "bad").mkdir()
        (tmp_path / "good").mkdir()
        bad, host = FakeHost(tmp_path / "bad"), FakeHost(tmp_path / "good")
        async with bad.listening(), host.listening():
            bad.answers = Endless(lambda: web.Response(body=body))
            hosts = [bad.entry("bad"), host.entry("good")]
            async with running(host.arguments(hosts=hosts)) as take:
                await until(lambda: len(bad.requests) > 2)
                host.add(event(1))
                found = await take()
                # The bad one too, when it is itself again.
                bad.answers = []
                bad.add(event(1))
                return found, await take()

    found, later = run(story())
    assert (found["host"], later["host"]) == ("good", "bad")
    assert len(caplog.text) < 100_000


def test_what_nobody_thought_of_is_an_outage_of_one_host(tmp_path, monkeypatch, caplog):
    real = health.check_answer
    raised = []

    def check(raw):
        if not raised:
            raised.append(1)
            raise RuntimeError("unheard of")
        return real(raw)

    monkeypatch.setattr(health, "check_answer", check)

    async def story():
        async with FakeHost(tmp_path).listening() as host:
            host.add(event(1))
            async with running(host.arguments()) as take:
                return await take()

    assert run(story())["sequence"] == 1
    assert "unheard of" in caplog.text


def answer(*events):
    body = {"journal": JOURNAL, "cursor": len(events), "oldest": 1, "newest": len(events)}
    return json.dumps({**body, "events": events}).encode()


@pytest.mark.parametrize(
    "strange",
    [
        {"body": answer(event(1), event(2), event(3))},
        {"body": gzip.compress(answer(event(1))), "headers": {"Content-Encoding": "gzip"}},
    ],
    ids=["more than was asked for", "packed although plain was asked for"],
)
def test_an_answer_that_was_not_asked_for_is_refused(tmp_path, strange):
    async def story():
        async with FakeHost(tmp_path).listening() as host:
            host.answers = [web.Response(body=answer()), web.Response(**strange)]
            host.add(event(7))
            async with running(host.arguments(limit=2)) as take:
                return await take()

    assert run(story())["sequence"] == 7


def test_an_answer_without_end_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(health, "_MAX_EVENT_BYTES", 100)

    async def story():
        async with FakeHost(tmp_path).listening() as host:
            host.answers = [web.Response(body=b" " * 1_000_000)]
            host.add(event(1))
            async with running(host.arguments()) as take:
                return await take()

    assert run(story())["sequence"] == 1


def test_an_event_of_a_strange_form_is_left_out_and_told(tmp_path):
    async def story():
        async with FakeHost(tmp_path).listening() as host:
            host.add(event(1, target="{{ lookup('pipe', 'id') }}"), event(2))
            async with running(host.arguments()) as take:
                return await take(), await take()

    told, found = run(story())
    assert (told["type"], found["sequence"]) == ("events_lost", 2)
    assert "lookup" not in json.dumps(told)


def test_hosts_of_a_directory_come_and_go(tmp_path):
    async def story():
        directory = tmp_path / "hosts"
        directory.mkdir()
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        one, two = FakeHost(tmp_path / "a"), FakeHost(tmp_path / "b")
        async with one.listening(), two.listening():
            one.add(event(1))
            two.add(event(1))
            arguments = {
                "hosts_directory": str(directory),
                "cursor_directory": str(tmp_path / "cursors"),
            }
            async with running(arguments) as take:
                (directory / "one.json").write_text(json.dumps(one.entry("one")))
                first = await take()
                (directory / "broken.json").write_text("{")
                (directory / "broken.json").unlink()
                (directory / "two.json").write_text(json.dumps(two.entry("two")))
                second = await take()
                (directory / "one.json").unlink()
                # The source has seen the change when a third host of the directory is followed.
                (directory / "three.json").write_text(json.dumps(two.entry("three")))
                third = await take()
                count = len(one.requests)
                one.add(event(2))
                two.add(event(2))
                later = {(await take())["host"], (await take())["host"]}
            return first, second, third, later, len(one.requests) - count

    first, second, third, later, asked = run(story())
    assert [item["host"] for item in (first, second, third)] == ["one", "two", "three"]
    assert later == {"two", "three"}
    assert asked == 0


# Arguments


def good(tmp_path, **changes):
    for name in ("ca", "token"):
        (tmp_path / name).write_text("x")
    entry = {
        "name": "db1",
        "url": "https://db1:9741",
        "ca_file": str(tmp_path / "ca"),
        "token_file": str(tmp_path / "token"),
    }
    return {"hosts": [entry], "cursor_directory": str(tmp_path / "cursors"), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hosts": []}, "give hosts or hosts_directory"),
        ({"hosts": "db1"}, "not a list"),
        ({"hosts": ["db1"]}, "is not a host"),
        ({"hosts": [{"name": "db1"}]}, "needs exactly name, url"),
        ({"cursor_directory": ""}, "give cursor_directory"),
        ({"wait": 0}, "wait is 0"),
        ({"wait": True}, "wait is True"),
        ({"limit": "9"}, "limit is '9'"),
        ({"start": "now"}, "not oldest or newest"),
        ({"hosts_directory": "/nowhere/at/all"}, "not a directory"),
        ({"cursor_dir": "/x"}, "unknown argument: cursor_dir"),
    ],
)
def test_wrong_arguments_end_the_source(tmp_path, changes, message):
    with pytest.raises(health.BadConfiguration, match=message):
        run(health.main(asyncio.Queue(1), good(tmp_path, **changes)))


@pytest.mark.parametrize(
    "url",
    [
        "http://db1:9741",
        "https://",
        "https://u:p@db1",
        "db1:9741",
        "https://db1/?token=x",
        "https://db1:port",
        "https://db1:0",
        "https://db1:65536",
        "https://2001:db8::5:9741",
        "https://[2001:db8::5:9741",
    ],
)
def test_an_address_that_would_not_be_safe_is_refused(tmp_path, url):
    arguments = good(tmp_path)
    arguments["hosts"][0]["url"] = url
    with pytest.raises(health.BadConfiguration, match="is not https://NAME:PORT"):
        run(health.main(asyncio.Queue(1), arguments))


@pytest.mark.parametrize(
    "url", ["https://db1:9741", "https://db1", "https://192.0.2.5:1", "https://[2001:db8::5]:9741"]
)
def test_an_address_by_name_or_number_is_taken(tmp_path, url):
    entry = good(tmp_path)["hosts"][0]
    assert health.check_host({**entry, "url": url}).url == url


def test_paths_may_begin_with_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "hosts").mkdir()
    entry = {**good(tmp_path)["hosts"][0], "ca_file": "~/ca", "token_file": "~/token"}
    (tmp_path / "hosts" / "db1.json").write_text(json.dumps(entry))
    arguments = health.check_arguments(
        {"hosts_directory": "~/hosts", "cursor_directory": "~/state/cursors"}
    )
    assert arguments.cursor_directory == tmp_path / "state" / "cursors"
    assert (tmp_path / "state" / "cursors").is_dir()
    found = health.all_hosts(arguments)["db1"]
    assert (found.ca_file, found.token_file) == (str(tmp_path / "ca"), str(tmp_path / "token"))


def test_the_same_host_twice_is_refused(tmp_path):
    arguments = good(tmp_path)
    arguments["hosts"] *= 2
    with pytest.raises(health.BadConfiguration, match="given twice"):
        run(health.main(asyncio.Queue(1), arguments))


def test_missing_credentials_are_refused_at_the_start(tmp_path):
    with pytest.raises(health.BadConfiguration, match="credentials"):
        run(health.main(asyncio.Queue(1), good(tmp_path)))


# Events and cursors


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.dictionaries(st.sampled_from([*event(1), "files", "other"]), JSON))
def test_whatever_a_host_sends_is_cleaned_or_refused(changes):
    try:
        found = health.clean_event({**event(1), **changes}, "db1")
    except health.BadAnswer:
        return
    text = json.dumps(found)
    assert "{%" not in found["message"]
    assert "{{" not in found["message"]
    assert "{#" not in found["message"]
    assert len(text) < 200_000
    assert found["host"] == "db1"


def test_files_go_on_without_what_was_not_asked_for():
    told = {"start": 8, "count": 2, "kind": "file", "path": "/srv/{{ a }}"}
    cleaned = health.clean_event({**event(1), "files": [{**told, "other": 1}]}, "db1")
    assert cleaned["files"] == [{**told, "path": "/srv/{ { a }}"}]
    assert "files" not in health.clean_event(event(1), "db1")


@pytest.mark.parametrize(
    "change",
    [{"start": -1}, {"count": True}, {"kind": "{{"}, {"path": "p" * 1001}, {"path": None}],
    ids=str,
)
def test_files_of_a_strange_form_are_refused(change):
    told = {"start": 8, "count": 2, "kind": "file", "path": "p" * 1000}
    assert health.clean_event({**event(1), "files": [told] * 64}, "db1")["files"] == [told] * 64
    for files in ([{**told, **change}], [told] * 65, told):
        with pytest.raises(health.BadAnswer):
            health.clean_event({**event(1), "files": files}, "db1")


@given(st.text())
def test_no_text_keeps_the_marks_of_templates(text):
    plain = health.plain_text(text)
    assert not any(mark in plain for mark in ("{{", "{%", "{#"))
    assert plain.isprintable() or not plain


def test_a_damaged_cursor_begins_again(tmp_path):
    file = health.CursorFile(tmp_path, "db1")
    file.save(health.Cursor(JOURNAL, 7))
    assert file.load() == health.Cursor(JOURNAL, 7)
    for text in ('{"journal": ', "[" * 200_000):
        file.path.write_text(text)
        assert file.load() == health.Cursor()


def test_a_hosts_name_cannot_lead_out_of_the_cursor_directory(tmp_path):
    assert health.CursorFile(tmp_path, "../../x").path.parent == tmp_path


def test_only_the_whole_cursor_replaces_the_old_one(tmp_path, monkeypatch):
    file = health.CursorFile(tmp_path, "db1")
    file.save(health.Cursor(JOURNAL, 7))

    def fail(*names):
        raise OSError("no space left")

    monkeypatch.setattr(health.os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        file.save(health.Cursor(JOURNAL, 8))
    assert file.load().position == 7
