# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Event source plugin: follows the journals of hosts that run dm-remapd."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import re
import ssl
import time
import urllib.parse
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable

DOCUMENTATION = r"""
---
short_description: Receive disk errors from hosts that run dm-remapd
description:
  - Follows the journal of each host over HTTPS, with a long poll and a bearer token.
  - Remembers a cursor for each host in a file, and goes on there after a restart.
  - With O(feedback=true) and the rule engine's persistence the cursor moves when the engine has an
    event in its database. Then a crash of the controller loses no event.
  - An event may act a second time if the crash came while its action ran, or between the engine's
    acknowledgement and the write of the cursor. So use actions that do no harm when repeated;
    M(dm_remap.storage.sectors) changes nothing where the work was done.
  - Without O(feedback=true) the cursor moves when the event is in the engine's queue. A crash may
    then lose the event that is being worked on.
  - A host that cannot be reached is tried again for ever, at growing intervals. When an outage
    lasts longer than O(outage), an event of the type C(host_silent) says so.
  - Sets C(meta.uuid), by which the engine tells repeated events, and C(meta.hosts), which limits
    playbooks to the host that the event came from.
options:
  hosts:
    description: The hosts to follow. Give this or O(hosts_directory) or both.
    type: list
    elements: dict
    suboptions:
      name:
        description: The host's name in the inventory.
        type: str
        required: true
      url:
        description:
          - Where the host's daemon listens, such as C(https://db1.example.org:9741).
          - An IPv6 address stands in brackets, C(https://[2001:db8::5]:9741).
        type: str
        required: true
      ca_file:
        description: File with the certificate that the daemon's own must be signed with.
        type: str
        required: true
      token_file:
        description: File with the bearer token.
        type: str
        required: true
  hosts_directory:
    description:
      - Directory with a JSON file for each host, which has the keys of O(hosts). Here and in all
        other paths a C(~) at the beginning is the home directory of the user who runs
        ansible-rulebook.
      - The role P(dm_remap.storage.host#role) writes these files. Hosts that come and go are
        noticed while the source runs.
    type: str
  cursor_directory:
    description: Directory for the cursors. Only one rulebook may use it.
    type: str
    required: true
  start:
    description: Where to begin with a host that has no cursor yet.
    type: str
    choices: [oldest, newest]
    default: oldest
  wait:
    description: Seconds, 1 to 60, that the host may hold a request open while there is no event.
    type: int
    default: 25
  limit:
    description: Number of events, 1 to 1000, in one answer.
    type: int
    default: 100
  outage:
    description: Seconds without an answer from a host before C(host_silent) says so.
    type: int
    default: 60
  feedback:
    description:
      - Wait for the rule engine to take each event before the cursor moves.
      - Needs C(ansible-rulebook --persistence-id) and the variable C(drools_db_file_path), and a
        C(name) for the source.
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: disks
  dm_remap.storage.health:
    hosts_directory: ~/.config/dm-remap/hosts
    cursor_directory: ~/.local/state/dm-remap/cursors
    feedback: true

- dm_remap.storage.health:
    hosts:
      - name: db1
        url: https://db1.example.org:9741
        ca_file: ~/.config/dm-remap/hosts/db1.ca
        token_file: ~/.config/dm-remap/hosts/db1.token
    cursor_directory: ~/.local/state/dm-remap/cursors
"""

LOG = logging.getLogger(__name__)

SCHEMA = 1
# The longest event that a daemon writes has less than half of it.
_MAX_EVENT_BYTES = 64 << 10
_MAX_REASON = 500
_RESCAN_SECONDS = 10.0
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 30.0
_CONNECT_SECONDS = 10.0
_ACKNOWLEDGE_SECONDS = 300.0
_ATTEMPTS = 3
_PERSISTENCE_CHECKS, _PERSISTENCE_SECONDS = 50, 0.2


class BadConfiguration(ValueError):
    """The rulebook's arguments for this source are wrong; the only thing that ends the source."""


class BadAnswer(ValueError):
    """A host answered what no dm-remapd answers."""


@dataclass(frozen=True)
class Host:
    """A host to follow; paths are on the controller."""

    name: str
    url: str
    ca_file: str
    token_file: str


@dataclass(frozen=True)
class Arguments:
    """The checked arguments of the source."""

    hosts: tuple[Host, ...]
    hosts_directory: Path | None
    cursor_directory: Path
    start: str = "oldest"
    wait: int = 25
    limit: int = 100
    outage: int = 60
    feedback: bool = False


@dataclass(frozen=True)
class Cursor:
    """Where reading goes on: after this number, in the journal with this id ("" at first)."""

    journal: str = ""
    position: int = 0


# Arguments


_HOST_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:\-]{0,252}\Z")
_NUMBERS = {"wait": (1, 60), "limit": (1, 1000), "outage": (1, 86400)}
_KNOWN = {"hosts", "hosts_directory", "cursor_directory", "start", "feedback", *_NUMBERS}


def check_arguments(args: Mapping[str, Any]) -> Arguments:
    """Return the arguments, checked; touches the disk.

    Raises:
        BadConfiguration: an argument is missing or wrong.
    """
    unknown = sorted(set(args) - _KNOWN - {"eda_feedback_queue"})
    if unknown:
        raise BadConfiguration(f"unknown argument: {', '.join(unknown)}")
    numbers = {name: _number(args, name) for name in _NUMBERS if name in args}
    start = args.get("start", "oldest")
    if start not in ("oldest", "newest"):
        raise BadConfiguration(f"start is {start!r}, not oldest or newest")
    hosts = args.get("hosts") or []
    if not isinstance(hosts, list):
        raise BadConfiguration("hosts is not a list")
    directory = args.get("hosts_directory")
    if not hosts and not directory:
        raise BadConfiguration("give hosts or hosts_directory")
    if not args.get("cursor_directory"):
        raise BadConfiguration("give cursor_directory")
    checked = Arguments(
        hosts=tuple(check_host(item) for item in hosts),
        hosts_directory=_path(str(directory)) if directory else None,
        cursor_directory=_path(str(args["cursor_directory"])),
        start=start,
        feedback=args.get("eda_feedback_queue") is not None,
        **numbers,
    )
    if checked.hosts_directory and not checked.hosts_directory.is_dir():
        raise BadConfiguration(f"hosts_directory {checked.hosts_directory} is not a directory")
    all_hosts(checked)
    try:
        checked.cursor_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BadConfiguration(f"cursor_directory cannot be made: {error}") from error
    return checked


def _number(args: Mapping[str, Any], name: str) -> int:
    low, high = _NUMBERS[name]
    value = args[name]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadConfiguration(f"{name} is {value!r}, not a whole number from {low} to {high}")
    return value


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def check_host(item: Any) -> Host:
    """Return a host from a rulebook or a file.

    Raises:
        BadConfiguration: a key is missing, unknown or wrong.
    """
    if not isinstance(item, Mapping):
        raise BadConfiguration(f"{item!r} is not a host with name, url, ca_file and token_file")
    names = ("name", "url", "ca_file", "token_file")
    if set(item) != set(names) or not all(isinstance(item[name], str) for name in names):
        raise BadConfiguration(
            f"host {item.get('name', '')!r} needs exactly name, url, ca_file and token_file"
        )
    host = Host(
        name=item["name"],
        url=item["url"],
        ca_file=str(_path(item["ca_file"])),
        token_file=str(_path(item["token_file"])),
    )
    if not _HOST_NAME.match(host.name):
        raise BadConfiguration(f"{host.name!r} is not a host name")
    if not _is_address(host.url):
        raise BadConfiguration(
            f"host {host.name}: url {host.url!r} is not https://NAME:PORT or https://[IPV6]:PORT"
        )
    return host


def _is_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        # Asking for the port parses it: that of https://2001:db8::5:9741 is db8::5:9741.
        return (
            parts.scheme == "https"
            and bool(parts.hostname)
            and parts.port != 0
            and parts.username is None
            and not parts.query
        )
    except ValueError:
        return False


def all_hosts(arguments: Arguments) -> dict[str, Host]:
    """Return all hosts by name, those of the directory included; reads files.

    Raises:
        BadConfiguration: a file is wrong, or two hosts have the same name.
    """
    found = list(arguments.hosts)
    if arguments.hosts_directory:
        for path in sorted(arguments.hosts_directory.glob("*.json")):
            try:
                found.append(check_host(parse_json(path.read_text(encoding="utf-8"))))
            except (OSError, ValueError) as error:
                raise BadConfiguration(f"{path}: {error}") from error
    by_name: dict[str, Host] = {}
    for host in found:
        if host.name in by_name:
            raise BadConfiguration(f"host {host.name} is given twice")
        by_name[host.name] = host
    return by_name


def credentials_of(host: Host) -> tuple[ssl.SSLContext, str]:
    """Return the TLS context that trusts this host only, and its token; reads files.

    Raises:
        BadConfiguration: a file is missing or wrong.
    """
    try:
        context = ssl.create_default_context(cafile=host.ca_file)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        token = Path(host.token_file).read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise BadConfiguration(f"host {host.name}: credentials: {error}") from error
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise BadConfiguration(f"host {host.name}: {host.token_file} holds no token")
    return context, token


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is none, or it is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


# Cursors


class CursorFile:
    """A host's cursor on disk. Its methods block.

    Args:
        directory: where the cursors are.
        name: the host's name.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.path = directory / (urllib.parse.quote(name, safe="") + ".json")

    def load(self) -> Cursor:
        """Return the cursor; a missing or damaged file gives the beginning."""
        try:
            values = parse_json(self.path.read_text(encoding="utf-8"))
            return Cursor(str(values["journal"]), int(values["position"]))
        except FileNotFoundError:
            return Cursor()
        except (OSError, ValueError, KeyError, TypeError) as error:
            # What comes twice does no harm; what never comes does.
            LOG.error("%s: %s; reading from the beginning", self.path, error)
            return Cursor()

    def save(self, cursor: Cursor) -> None:
        """Write the cursor so that a crash leaves the old one or this one."""
        temporary = self.path.with_suffix(".new")
        with open(temporary, "w", encoding="utf-8") as stream:
            json.dump({"journal": cursor.journal, "position": cursor.position}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, self.path)
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


# Answers of hosts. A host may be broken or in foreign hands, so only what has the expected form
# goes on to the rules, and no text that a template engine would take for its own.


def _text(length: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and len(value) <= length


def _matching(pattern: str) -> Callable[[Any], bool]:
    compiled = re.compile(pattern)
    return lambda value: isinstance(value, str) and compiled.fullmatch(value) is not None


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _ranges(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 4096
        and all(
            isinstance(item, list) and len(item) == 2 and all(map(_count, item)) and item[1] > 0
            for item in value
        )
    )


def _files(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(
            isinstance(item, Mapping)
            and _count(item.get("start"))
            and _count(item.get("count"))
            and item.get("kind") in ("file", "metadata", "free", "unknown")
            and _text(1000)(item.get("path"))
            for item in value
        )
    )


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "uuid": _matching("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
    "sequence": _count,
    "time": _matching(r"[0-9T:.Z+\-]{1,40}"),
    "target": _matching(r"([A-Za-z0-9][A-Za-z0-9._+\-]{0,95})?"),
    "device": _matching(r"[A-Za-z0-9!/:._\-]{0,64}"),
    "type": _matching("[a-z_]{1,40}"),
    "severity": _matching("[a-z]{1,20}"),
    "operation": _matching("[a-z]{0,20}"),
    "sectors": _ranges,
    "suspect": _ranges,
    "errno": _count,
    "requests": _count,
    "merged": _count,
    "generation": _count,
    "message": _text(1000),
}


def clean_event(raw: Any, host: str) -> dict[str, Any]:
    """Return a host's event as it goes to the rules.

    Args:
        raw: what the host sent.
        host: the host's name here; what it calls itself does not count.

    Raises:
        BadAnswer: a field is missing or has another form.
    """
    if not isinstance(raw, Mapping) or raw.get("schema") != SCHEMA:
        raise BadAnswer("an event of another schema")
    event: dict[str, Any] = {"schema": SCHEMA, "host": host}
    for name, fits in _FIELDS.items():
        if not fits(raw.get(name)):
            raise BadAnswer(f"an event with a bad {name}")
        event[name] = raw[name]
    event["message"] = plain_text(event["message"])
    if "files" in raw:
        if not _files(raw["files"]):
            raise BadAnswer("an event with a bad files")
        event["files"] = [
            {**{name: item[name] for name in ("start", "count", "kind")}, "path": path}
            for item in raw["files"]
            for path in [plain_text(item["path"])]
        ]
    # The form that the module dm_remap.storage.sectors takes.
    event["ranges"] = [{"start": start, "count": count} for start, count in event["sectors"]]
    event["sector_count"] = sum(count for _unused, count in event["sectors"])
    event["meta"] = {"uuid": event["uuid"], "hosts": [host]}
    return event


def plain_text(text: str) -> str:
    """Return text without control characters and without the marks of Jinja templates."""
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return re.sub(r"\{(?=[{%#])", "{ ", printable)


def own_event(kind: str, host: str, message: str) -> dict[str, Any]:
    """Return an event that this source makes itself, with all fields of a host's."""
    identity = str(uuid.uuid4())
    return {
        "schema": SCHEMA,
        "host": host,
        "uuid": identity,
        "sequence": 0,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "target": "",
        "device": "",
        "type": kind,
        "severity": "error",
        "operation": "",
        "sectors": [],
        "suspect": [],
        "errno": 0,
        "requests": 0,
        "merged": 0,
        "generation": 0,
        "message": plain_text(message)[:1000],
        "ranges": [],
        "sector_count": 0,
        "meta": {"uuid": identity, "hosts": [host]},
    }


@dataclass(frozen=True)
class Answer:
    """One answer of a host's daemon."""

    journal: str
    cursor: int
    oldest: int
    newest: int
    events: Sequence[Any]


def check_answer(raw: bytes) -> Answer:
    """Parse an answer.

    Raises:
        BadAnswer: it is not what dm-remapd answers.
    """
    try:
        values = parse_json(raw)
        answer = Answer(
            values["journal"],
            values["cursor"],
            values["oldest"],
            values["newest"],
            values["events"],
        )
    except (ValueError, KeyError, TypeError) as error:
        # Not its repr, which may hold all of the answer.
        raise BadAnswer(f"not an answer of dm-remapd: {type(error).__name__}: {error}") from error
    numbers = (answer.cursor, answer.oldest, answer.newest)
    if not all(map(_count, numbers)) or not isinstance(answer.events, list):
        raise BadAnswer("not an answer of dm-remapd")
    if not _FIELDS["uuid"](answer.journal):
        raise BadAnswer("a journal without an id")
    return answer


# Delivery


class Engine:
    """The rule engine's side: its queue and, with feedback, its acknowledgements.

    Args:
        queue: where events go; it has room for one, so that a slow engine slows the source down
            and events wait where they are safe, in the hosts' journals.
        feedback: queue of events that the engine has taken, or None.
    """

    def __init__(self, queue: Any, feedback: Any) -> None:
        self._queue = queue
        self._feedback = feedback
        self._awaited: dict[str, asyncio.Future[None]] = {}

    async def deliver(self, event: dict[str, Any]) -> None:
        """Return when the engine has the event, as far as it tells."""
        if self._feedback is None:
            await self._queue.put(event)
            return
        identity = event["meta"]["uuid"]
        taken = self._awaited[identity] = asyncio.get_running_loop().create_future()
        try:
            for _unused in range(_ATTEMPTS):
                await self._queue.put(event)
                done, _unused = await asyncio.wait({taken}, timeout=_ACKNOWLEDGE_SECONDS)
                if done:
                    return
                LOG.warning("the engine has not taken event %s; offering it again", identity)
            LOG.error("the engine does not take event %s; it is left out", identity)
        finally:
            del self._awaited[identity]

    async def listen(self) -> None:
        """Take acknowledgements, for ever."""
        while True:
            event = await self._feedback.get()
            taken = self._awaited.get(event.get("meta", {}).get("uuid", ""))
            if taken is not None and not taken.done():
                taken.set_result(None)


class Follower:
    """Follows one host's journal.

    Args:
        host: the host.
        arguments: the source's arguments.
        engine: where events go.
    """

    def __init__(self, host: Host, arguments: Arguments, engine: Engine) -> None:
        self._host = host
        self._arguments = arguments
        self._engine = engine
        self._file = CursorFile(arguments.cursor_directory, host.name)
        self._cursor = Cursor()
        self._silent_since: float | None = None
        self._silence_told = False
        self._delay = _FIRST_DELAY

    async def run(self) -> None:
        """Follow for ever; neither a lost connection nor what a host sends is a reason to end."""
        self._cursor = await asyncio.to_thread(self._file.load)
        while True:
            try:
                await self._connect()
            except _transport_errors() as error:
                await self._lost(error)
            except Exception as error:
                LOG.exception("%s: unexpected", self._host.name)
                await self._lost(error)

    async def _connect(self) -> None:
        import aiohttp

        context, token = await asyncio.to_thread(credentials_of, self._host)
        timeout = aiohttp.ClientTimeout(
            total=self._arguments.wait + _CONNECT_SECONDS + 20, connect=_CONNECT_SECONDS
        )
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=context, limit=1),
            headers={"Authorization": f"Bearer {token}", "Accept-Encoding": "identity"},
            timeout=timeout,
            # A small answer that unpacks to a huge one would pass the limit before it is seen.
            auto_decompress=False,
        ) as session:
            # The first answer comes at once, to tell whether the journal is still the same one.
            wait = 0
            while True:
                answer = await self._ask(session, wait)
                self._found()
                await self._take(answer)
                wait = self._arguments.wait

    async def _ask(self, session: Any, wait: int) -> Answer:
        query = {
            "after": str(self._cursor.position),
            "limit": str(self._arguments.limit),
            "wait": str(wait),
        }
        url = self._host.url.rstrip("/") + "/v1/events"
        # A redirect would carry the token to who knows where.
        async with session.get(url, params=query, allow_redirects=False) as response:
            if response.status != 200:
                raise BadAnswer(f"HTTP status {response.status}")
            raw = bytearray()
            async for piece in response.content.iter_any():
                raw += piece
                if len(raw) > _MAX_EVENT_BYTES * (self._arguments.limit + 1):
                    raise BadAnswer("an answer without end")
        # In a thread, because other hosts must not wait for a long one.
        answer = await asyncio.to_thread(check_answer, bytes(raw))
        if len(answer.events) > self._arguments.limit:
            raise BadAnswer("more events than were asked for")
        return answer

    async def _take(self, answer: Answer) -> None:
        if answer.journal != self._cursor.journal:
            await self._begin(answer)
            return
        if answer.oldest > self._cursor.position + 1:
            lost = answer.oldest - self._cursor.position - 1
            await self._tell_lost(f"{lost} events were removed before they were read")
            await self._move(answer.oldest - 1)
        elif answer.newest < self._cursor.position:
            await self._tell_lost("the host's journal is older than it was; it is read again")
            await self._move(answer.oldest - 1)
        for raw in answer.events:
            await self._hand_over(raw)
        if not answer.events and answer.cursor > self._cursor.position:
            raise BadAnswer("a cursor without events")

    async def _begin(self, answer: Answer) -> None:
        """Begin with a journal that was not seen before, at the place that was asked for."""
        known = self._cursor.journal
        if known:
            await self._tell_lost("the host has a new journal; what the old one held is unknown")
        at_end = self._arguments.start == "newest" and not known
        position = answer.newest if at_end else answer.oldest - 1
        self._cursor = Cursor(answer.journal, self._cursor.position)
        await self._move(position)

    async def _hand_over(self, raw: Any) -> None:
        position: Any = raw.get("sequence") if isinstance(raw, Mapping) else None
        if not _count(position) or position <= self._cursor.position:
            raise BadAnswer("events out of order")
        try:
            await self._engine.deliver(clean_event(raw, self._host.name))
        except BadAnswer as error:
            LOG.error("%s: event %d left out: %s", self._host.name, position, error)
            await self._tell_lost(f"event {position} was left out: {error}")
        await self._move(position)

    async def _move(self, position: int) -> None:
        self._cursor = replace(self._cursor, position=position)
        await asyncio.to_thread(self._file.save, self._cursor)

    async def _tell_lost(self, message: str) -> None:
        LOG.error("%s: %s", self._host.name, message)
        await self._engine.deliver(own_event("events_lost", self._host.name, message))

    def _found(self) -> None:
        if self._silent_since is not None:
            LOG.warning("%s: answers again", self._host.name)
        self._silent_since, self._silence_told, self._delay = None, False, _FIRST_DELAY

    async def _lost(self, error: BaseException) -> None:
        now = time.monotonic()
        reason = plain_text((str(error) or type(error).__name__)[:_MAX_REASON])
        if self._silent_since is None:
            self._silent_since = now
            LOG.warning("%s: %s", self._host.name, reason)
        if not self._silence_told and now - self._silent_since >= self._arguments.outage:
            self._silence_told = True
            message = f"no answer for {self._arguments.outage} seconds: {reason}"
            await self._engine.deliver(own_event("host_silent", self._host.name, message))
        # Spread the hosts' attempts, so that they do not all come at the same moment.
        await asyncio.sleep(self._delay * random.uniform(0.5, 1.0))
        self._delay = min(2 * self._delay, _LONGEST_DELAY)


def _transport_errors() -> tuple[type[BaseException], ...]:
    import aiohttp

    # Credentials may be replaced at any time, and ValueError covers them and bad answers.
    return (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError)


# The source


async def require_persistence() -> None:
    """Wait until the engine's persistence is on.

    Raises:
        BadConfiguration: it stays off; acknowledgements would then mean nothing.
    """
    try:
        from ansible_rulebook.conf import settings
    except ImportError:
        return
    # The engine starts after its sources, so the answer is not there at once.
    for _unused in range(_PERSISTENCE_CHECKS):
        if getattr(settings, "persistence_enabled", True):
            return
        await asyncio.sleep(_PERSISTENCE_SECONDS)
    raise BadConfiguration(
        "feedback needs persistence: run ansible-rulebook with --persistence-id and a variables"
        " file (-e) that sets drools_db_file_path, or leave feedback out"
    )


async def follow_all(arguments: Arguments, engine: Engine) -> None:
    """Follow every host, those included that come later; ends only with an error."""
    tasks: dict[Host, asyncio.Task[None]] = {}
    trouble = ""
    try:
        while True:
            try:
                wanted = set((await asyncio.to_thread(all_hosts, arguments)).values())
            except BadConfiguration as error:
                # Someone may be about to write that file; those that are followed go on.
                if str(error) != trouble:
                    trouble = str(error)
                    LOG.error("%s", trouble)
            else:
                trouble = ""
                await _drop([tasks.pop(host) for host in set(tasks) - wanted])
                for host in sorted(wanted - set(tasks), key=lambda host: host.name):
                    tasks[host] = asyncio.ensure_future(Follower(host, arguments, engine).run())
            await _sleep_or_fail(tasks.values(), _RESCAN_SECONDS)
    finally:
        await _drop(list(tasks.values()))


async def _sleep_or_fail(tasks: Any, seconds: float) -> None:
    if not tasks:
        await asyncio.sleep(seconds)
        return
    done, _unused = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in done:
        task.result()


async def _drop(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def main(queue: Any, args: dict[str, Any]) -> None:
    """Run the source.

    Args:
        queue: the rule engine's queue.
        args: the arguments in the rulebook.

    Raises:
        BadConfiguration: the arguments are wrong.
    """
    arguments = await asyncio.to_thread(check_arguments, args)
    for host in (await asyncio.to_thread(all_hosts, arguments)).values():
        await asyncio.to_thread(credentials_of, host)
    feedback = args.get("eda_feedback_queue")
    engine = Engine(queue, feedback)
    if feedback is None:
        await follow_all(arguments, engine)
        return
    await require_persistence()
    listening = asyncio.ensure_future(engine.listen())
    try:
        await follow_all(arguments, engine)
    finally:
        listening.cancel()


if __name__ == "__main__":

    class PrintingQueue:
        """Shows events instead of a rule engine: python health.py ARGUMENTS.json"""

        async def put(self, event: dict[str, Any]) -> None:
            """Print one event."""
            print(json.dumps(event))

    import sys

    asyncio.run(main(PrintingQueue(), json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
