# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The durable journal of a host: failed requests first, then the events made of them.

A failed request is on disk before anything is done about it; a crash in the middle leaves it
pending, and the next start takes it up. An event's number is its cursor: it only rises, and no
number is used twice, not even after old events were removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
import urllib.parse
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Callable

from .errors import DmRemapError
from .events import Draft, Origin, complete
from .tracing import BlockError

_FORMAT = 2

_SCHEMA = (
    "CREATE TABLE note (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    """CREATE TABLE observation (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        boot TEXT NOT NULL,
        time_ns INTEGER NOT NULL,
        request INTEGER NOT NULL,
        devno TEXT NOT NULL,
        operation TEXT NOT NULL,
        sector INTEGER NOT NULL,
        count INTEGER NOT NULL,
        errno INTEGER NOT NULL,
        times INTEGER NOT NULL,
        UNIQUE (devno, operation, sector, count, errno, request, boot)
    )""",
    "CREATE TABLE event (id INTEGER PRIMARY KEY AUTOINCREMENT, body TEXT NOT NULL)",
)

# Above this number of a device's observations, those that touch each other become one.
_MANY = 500
# No target can have more remaps (docs/format.md); of what exceeds it only the number is kept.
MAX_PLACES = 16384


class DamagedJournal(DmRemapError):
    """The file is a database no longer; nothing but a new one helps."""


def failure(path: str, error: Exception) -> DmRemapError:
    """Return what the failure of a call of the journal means.

    Args:
        path: the journal.
        error: what was raised.
    """
    # The module sqlite3 has a class of its own for every failure but damage (SQLITE_CORRUPT and
    # SQLITE_NOTADB). ValueError: an event is not JSON.
    if error.__class__ is sqlite3.DatabaseError or isinstance(error, ValueError):
        return DamagedJournal(
            f"the journal is damaged: {error}",
            device=path,
            remedy="move the file away with those that end in -wal and -shm, and start the"
            " daemon again",
        )
    return DmRemapError(
        f"the journal cannot be used: {error}",
        device=path,
        remedy="see that its disk works and has room, and that no other program holds it",
    )


def move_aside(path: str, aside: str) -> None:
    """Rename a journal with what belongs to it; the file itself goes last."""
    for suffix in ("-wal", "-shm", ""):
        if os.path.exists(path + suffix):
            os.replace(path + suffix, aside + suffix)


@dataclass(frozen=True)
class Observation:
    """Failed requests that wait for their explanation.

    Args:
        id: its number in the journal.
        time_ns: when the first was read from the trace, nanoseconds since 1970.
        error: the request. When many waited it covers several that touched each other; a count
            of 0 stands for those whose places were not kept, and for flushes.
        times: number of requests.
    """

    id: int
    time_ns: int
    error: BlockError
    times: int


@dataclass(frozen=True)
class Page:
    """A part of the journal.

    Args:
        events: in the order of their cursors.
        cursor: read on after this one.
        oldest: smallest number that is still kept, or the next one if none is.
        newest: largest number given so far, 0 at first.
    """

    events: Sequence[dict[str, Any]]
    cursor: int
    oldest: int
    newest: int


class Journal:
    """The journal's file. Its methods block on the disk; use it from one thread at a time.

    Args:
        path: the SQLite database; created with mode 0600 if it is missing.
        origin: who reports.
        keep: number of events to keep; the oldest above it are removed.
        clock: nanoseconds since 1970.

    Raises:
        DamagedJournal: the file is damaged.
        DmRemapError: it cannot be used now, or is not a journal of this version.
    """

    def __init__(
        self,
        path: str,
        origin: Origin,
        keep: int = 100_000,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._path = path
        self._origin = origin
        self._keep = keep
        self._clock = clock
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise failure(path, error) from error
        try:
            self._prepare()
        except (sqlite3.Error, ValueError) as error:
            self._database.close()
            raise failure(path, error) from error
        except DmRemapError:
            self._database.close()
            raise

    def _prepare(self) -> None:
        run = self._database.execute
        found = run("PRAGMA user_version").fetchone()[0]
        empty = run("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if found != _FORMAT and not empty:
            raise DmRemapError(
                f"the journal has format {found}, not {_FORMAT}",
                device=self._path,
                remedy="install the version of dm_remap.storage that wrote it, or move the file"
                " away with those that end in -wal and -shm",
            )
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        if empty:
            with self._transaction():
                for statement in _SCHEMA:
                    run(statement)
                run("INSERT INTO note VALUES ('id', ?)", (str(uuid.uuid4()),))
                run(f"PRAGMA user_version = {_FORMAT}")
        self.id = uuid.UUID(self.note("id"))

    def note(self, name: str, default: str = "") -> str:
        """Return a remembered value."""
        row = self._database.execute("SELECT value FROM note WHERE name = ?", (name,)).fetchone()
        return str(row[0]) if row else default

    def observe(self, errors: Iterable[BlockError]) -> int:
        """Write failed requests down; identical ones become one. Returns how many wait."""
        counts: dict[BlockError, int] = {}
        for error in errors:
            counts[error] = counts.get(error, 0) + 1
        now = self._clock()
        with self._transaction():
            for error, times in counts.items():
                self._insert(error, times, now)
            for devno in {error.devno for error in counts}:
                self._bound(devno)
            return self._waiting()

    def _insert(self, error: BlockError, times: int, now: int) -> None:
        self._database.execute(
            "INSERT INTO observation (boot, time_ns, request, devno, operation, sector, count,"
            " errno, times) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT"
            " (devno, operation, sector, count, errno, request, boot)"
            " DO UPDATE SET times = times + excluded.times",
            (
                self._origin.boot_id,
                now,
                error.request,
                error.devno,
                error.operation,
                error.sector,
                error.count,
                error.errno,
                times,
            ),
        )

    def _bound(self, devno: str) -> None:
        """Keep few observations of a device that is not asked now, at the least loss."""
        rows = self.pending(devno)
        if len(rows) <= _MANY:
            return
        clusters = _touching(rows)
        for number, cluster in enumerate(clusters):
            first = cluster[0].error
            end = max(item.error.sector + item.error.count for item in cluster)
            whole = replace(first, count=end - first.sector)
            if number >= MAX_PLACES:
                whole = replace(first, sector=0, count=0)
            if len(cluster) == 1 and whole == first:
                continue
            self._remove(cluster)
            times = sum(item.times for item in cluster)
            self._insert(whole, times, min(item.time_ns for item in cluster))

    def pending(self, devno: str | None = None) -> list[Observation]:
        """Return the failed requests that no event explains yet, oldest first.

        Args:
            devno: of this device only.
        """
        if devno is None:
            return self._observations("boot = ?", self._origin.boot_id)
        return self._observations("boot = ? AND devno = ?", self._origin.boot_id, devno)

    def stale(self) -> list[Observation]:
        """Return those of other boots: their device numbers may belong to other disks now."""
        return self._observations("boot != ?", self._origin.boot_id)

    def _observations(self, condition: str, *values: str) -> list[Observation]:
        rows = self._database.execute(
            "SELECT id, time_ns, times, request, devno, operation, sector, count, errno"
            f" FROM observation WHERE {condition} ORDER BY id",
            values,
        )
        return [
            Observation(
                id=row[0],
                time_ns=row[1],
                error=BlockError(bool(row[3]), row[4], row[5], row[6], row[7], row[8], False),
                times=row[2],
            )
            for row in rows
        ]

    def _waiting(self) -> int:
        return int(self._database.execute("SELECT count(*) FROM observation").fetchone()[0])

    def _remove(self, observations: Iterable[Observation]) -> None:
        """Take observations out, but not the requests that failed again after they were read."""
        known = [(item.times, item.id) for item in observations]
        run = self._database.executemany
        run("UPDATE observation SET times = times - ? WHERE id = ?", known)
        run("DELETE FROM observation WHERE id = ? AND times <= 0", [(item[1],) for item in known])

    def append(
        self,
        drafts: Iterable[Draft] = (),
        explained: Iterable[Observation] = (),
        time_ns: int | None = None,
        unexplained: Iterable[BlockError] = (),
        notes: Mapping[str, str] | None = None,
    ) -> tuple[list[dict[str, Any]], int]:
        """Write events and drop the observations that they explain, in one transaction.

        Args:
            drafts: what happened; may be empty when the observations mean nothing.
            explained: the observations.
            time_ns: when it happened, now by default.
            unexplained: the parts of those observations that must be looked at again.
            notes: values to remember, by name.

        Returns:
            the complete events, and how many observations wait.
        """
        moment = self._clock() if time_ns is None else time_ns
        written = []
        run = self._database.execute
        with self._transaction():
            for draft in drafts:
                number = int(run("INSERT INTO event (body) VALUES ('')").lastrowid or 0)
                event = complete(draft, self._origin, number, moment)
                run("UPDATE event SET body = ? WHERE id = ?", (_json(event), number))
                written.append(event)
            self._remove(explained)
            for error in unexplained:
                self._insert(error, 1, moment)
            for item in (notes or {}).items():
                run("INSERT OR REPLACE INTO note VALUES (?, ?)", item)
            if written:
                run("DELETE FROM event WHERE id <= ?", (written[-1]["sequence"] - self._keep,))
            return written, self._waiting()

    def read(self, after: int, limit: int) -> Page:
        """Return at most `limit` events with a number above `after`."""
        rows = self._database.execute(
            "SELECT id, body FROM event WHERE id > ? ORDER BY id LIMIT ?", (after, limit)
        ).fetchall()
        newest = self.newest()
        oldest = self._database.execute("SELECT min(id) FROM event").fetchone()[0]
        return Page(
            events=[json.loads(body) for _unused, body in rows],
            cursor=rows[-1][0] if rows else min(after, newest),
            oldest=newest + 1 if oldest is None else oldest,
            newest=newest,
        )

    def newest(self) -> int:
        """Return the largest number given so far, 0 at first."""
        row = self._database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'event'")
        found = row.fetchone()
        return int(found[0]) if found else 0

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _transaction(self) -> _Transaction:
        return _Transaction(self._database)


def newest_of_target(path: str, target: str, limit: int) -> list[dict[str, Any]]:
    """The newest events of a target, the oldest first, from a journal that a daemon may be using.

    Args:
        path: the journal; nothing is written to it.
        target: the target's name.
        limit: number of events at most.

    Raises:
        DamagedJournal: the file is damaged.
        DmRemapError: it cannot be read.
    """
    found: list[dict[str, Any]] = []
    try:
        database = sqlite3.connect(f"file:{urllib.parse.quote(path)}?mode=ro", uri=True)
        with contextlib.closing(database):
            # Few of the events are parsed: this is how `_json` writes the name.
            rows = database.execute(
                "SELECT body FROM event WHERE instr(body, ?) ORDER BY id DESC",
                (f'"target":{json.dumps(target)}',),
            )
            for (body,) in rows:
                event = json.loads(body)
                if event["target"] == target:
                    found.append(event)
                if len(found) == limit:
                    break
    except (sqlite3.Error, ValueError) as error:
        raise failure(path, error) from error
    return found[::-1]


class _Transaction:
    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def __enter__(self) -> None:
        self._database.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            if kind is None:
                self._database.execute("COMMIT")
        finally:
            # After some failures, such as a full disk, SQLite has rolled back by itself.
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")


def _touching(rows: Iterable[Observation]) -> list[list[Observation]]:
    """Group observations that differ in their place only and touch; the oldest group first."""

    def place(item: Observation) -> tuple[bool, str, int, int]:
        error = item.error
        return error.request, error.operation, error.errno, error.sector

    groups: list[list[Observation]] = []
    end = 0
    for item in sorted(rows, key=place):
        error = item.error
        same = bool(groups) and place(groups[-1][0])[:3] == place(item)[:3]
        if same and error.count and groups[-1][0].error.count and error.sector <= end:
            groups[-1].append(item)
        else:
            groups.append([item])
            end = 0
        end = max(end, error.sector + error.count)
    return sorted(groups, key=lambda group: min(item.id for item in group))


def _json(event: dict[str, Any]) -> str:
    return json.dumps(event, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
