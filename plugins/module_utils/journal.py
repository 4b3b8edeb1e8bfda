# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The durable journal of a host: failed requests first, then the events made of them.

A failed request is on disk before anything is done about it; a crash in the middle leaves it
pending, and the next start takes it up. An event's number is its cursor: it only rises, and no
number is used twice, not even after old events were removed.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Callable

from .errors import DmRemapError
from .events import Draft, Origin, complete
from .tracing import BlockError

_FORMAT = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS note (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS observation (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    time_ns INTEGER NOT NULL,
    request INTEGER NOT NULL,
    devno TEXT NOT NULL,
    operation TEXT NOT NULL,
    sector INTEGER NOT NULL,
    count INTEGER NOT NULL,
    errno INTEGER NOT NULL,
    times INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS event (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    body TEXT NOT NULL
);
"""


@dataclass(frozen=True)
class Observation:
    """A failed request that waits for its explanation.

    Args:
        id: its number in the journal.
        time_ns: when it was first read from the trace, nanoseconds since 1970.
        error: the request.
        times: how often it failed in the same way.
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
        DmRemapError: the file is not a journal of this version, or it is damaged.
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
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self._prepare()
        except sqlite3.DatabaseError as error:
            self._database.close()
            raise DmRemapError(
                f"the journal cannot be used: {error}",
                device=path,
                remedy="move the file away and start the daemon again",
            ) from error

    def _prepare(self) -> None:
        run = self._database.execute
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        version = run("PRAGMA user_version").fetchone()[0]
        if version not in (0, _FORMAT):
            raise sqlite3.DatabaseError(f"its format is {version}, not {_FORMAT}")
        self._database.executescript(_SCHEMA)
        run(f"PRAGMA user_version = {_FORMAT}")
        run("INSERT OR IGNORE INTO note VALUES ('id', ?)", (str(uuid.uuid4()),))
        self.id = uuid.UUID(self.note("id"))

    def note(self, name: str, default: str = "") -> str:
        """Return a remembered value."""
        row = self._database.execute("SELECT value FROM note WHERE name = ?", (name,)).fetchone()
        return str(row[0]) if row else default

    def remember(self, name: str, value: str) -> None:
        """Remember a value durably."""
        self._database.execute("INSERT OR REPLACE INTO note VALUES (?, ?)", (name, value))

    def observe(self, errors: Iterable[BlockError]) -> list[Observation]:
        """Write failed requests down; identical ones become one. Returns what was written."""
        counts: dict[BlockError, int] = {}
        for error in errors:
            counts[error] = counts.get(error, 0) + 1
        now = self._clock()
        with self._transaction():
            return [self._insert(error, times, now) for error, times in counts.items()]

    def _insert(self, error: BlockError, times: int, now: int) -> Observation:
        row = self._database.execute(
            "INSERT INTO observation (time_ns, request, devno, operation, sector, count, errno,"
            " times) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
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
        return Observation(int(row.lastrowid or 0), now, error, times)

    def pending(self) -> list[Observation]:
        """Return the failed requests that no event explains yet, oldest first."""
        rows = self._database.execute(
            "SELECT id, time_ns, times, request, devno, operation, sector, count, errno"
            " FROM observation ORDER BY id"
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

    def append(
        self,
        drafts: Iterable[Draft],
        explained: Iterable[int] = (),
        time_ns: int | None = None,
        unexplained: Iterable[BlockError] = (),
    ) -> tuple[list[dict[str, Any]], list[Observation]]:
        """Write events and drop the observations that they explain, in one transaction.

        Args:
            drafts: what happened; may be empty when the observations mean nothing.
            explained: numbers of observations.
            time_ns: when it happened, now by default.
            unexplained: the parts of those observations that must be looked at again.

        Returns:
            the complete events, and the new observations.
        """
        moment = self._clock() if time_ns is None else time_ns
        written = []
        left = []
        with self._transaction():
            for draft in drafts:
                row = self._database.execute("INSERT INTO event (body) VALUES ('')")
                number = int(row.lastrowid or 0)
                event = complete(draft, self._origin, number, moment)
                self._database.execute(
                    "UPDATE event SET body = ? WHERE id = ?", (_json(event), number)
                )
                written.append(event)
            self._database.executemany(
                "DELETE FROM observation WHERE id = ?", [(number,) for number in explained]
            )
            left = [self._insert(error, 1, moment) for error in unexplained]
            if written:
                self._database.execute(
                    "DELETE FROM event WHERE id <= ?", (written[-1]["sequence"] - self._keep,)
                )
        return written, left

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


class _Transaction:
    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def __enter__(self) -> None:
        self._database.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *rest: object) -> None:
        self._database.execute("ROLLBACK" if kind else "COMMIT")


def _json(event: dict[str, Any]) -> str:
    return json.dumps(event, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
