# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The journal keeps what it was told, across restarts and crashes, and numbers it once."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from dm_remap import events
from dm_remap.errors import DmRemapError
from dm_remap.events import Draft, Origin
from dm_remap.journal import Journal
from dm_remap.tracing import BlockError

ORIGIN = Origin("db1", uuid.UUID(int=7), "boot-a")
ROOT = Path(__file__).resolve().parents[2]


def failure(sector, operation="read"):
    return BlockError(True, "8:16", operation, sector, 8, 5, False)


def draft(text="text"):
    return Draft(events.SECTOR_ERROR, text, "data", "sdb", "read", ((8, 2),))


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "journal.db")


@pytest.fixture
def journal(path):
    opened = Journal(path, ORIGIN, keep=5)
    yield opened
    opened.close()


def test_identical_failures_are_written_once_with_their_number(journal):
    found = journal.observe([failure(8), failure(16), failure(8)])
    assert [(item.error.sector, item.times) for item in found] == [(8, 2), (16, 1)]
    assert journal.pending() == found


def test_an_event_takes_its_failures_out_in_the_same_step(journal):
    first, second = journal.observe([failure(8), failure(16)])
    written, left = journal.append([draft()], [first.id], unexplained=[failure(12)])
    assert [event["sequence"] for event in written] == [1]
    assert [item.error.sector for item in left] == [12]
    assert [item.error.sector for item in journal.pending()] == [16, 12]
    assert second in journal.pending()


def test_a_failed_append_changes_nothing(journal):
    (observation,) = journal.observe([failure(8)])
    broken = Draft("no such type", "text")
    with pytest.raises(KeyError):
        journal.append([draft(), broken], [observation.id])
    assert journal.pending() == [observation]
    assert journal.read(0, 10).events == []
    assert journal.append([draft()])[0][0]["sequence"] == 1


def test_reading_goes_on_at_the_cursor(journal):
    journal.append([draft(str(number)) for number in range(4)])
    first = journal.read(0, 3)
    assert [event["message"] for event in first.events] == ["0", "1", "2"]
    rest = journal.read(first.cursor, 3)
    assert [event["message"] for event in rest.events] == ["3"]
    assert (rest.cursor, rest.oldest, rest.newest) == (4, 1, 4)


def test_a_cursor_from_the_future_comes_back_at_the_newest(journal):
    journal.append([draft()])
    page = journal.read(99, 10)
    assert (page.cursor, page.newest, page.events) == (1, 1, [])


def test_old_events_go_and_numbers_stay(journal):
    journal.append([draft() for _unused in range(8)])
    page = journal.read(0, 100)
    assert [event["sequence"] for event in page.events] == [4, 5, 6, 7, 8]
    assert (page.oldest, page.newest) == (4, 8)


def test_an_empty_journal_says_where_it_will_begin(journal):
    page = journal.read(0, 10)
    assert (page.cursor, page.oldest, page.newest) == (0, 1, 0)


def test_a_restart_keeps_events_numbers_failures_and_the_journals_id(path):
    journal = Journal(path, ORIGIN)
    journal.append([draft()])
    journal.observe([failure(8, "write")])
    journal.remember("overruns", "12")
    identity = journal.id
    journal.close()
    again = Journal(path, ORIGIN)
    assert again.id == identity
    assert again.note("overruns") == "12"
    assert again.note("other", "none") == "none"
    assert [item.error for item in again.pending()] == [failure(8, "write")]
    assert again.append([draft()])[0][0]["sequence"] == 2
    again.close()


def test_numbers_are_not_used_again_after_all_events_went(path):
    journal = Journal(path, ORIGIN)
    journal.append([draft(), draft()])
    journal.close()
    with sqlite3.connect(path) as database:
        database.execute("DELETE FROM event")
    database.close()
    again = Journal(path, ORIGIN)
    assert again.append([draft()])[0][0]["sequence"] == 3
    again.close()


def test_a_killed_process_has_written_what_it_said_it_had(path):
    program = """
import importlib.util, os, signal, sys, uuid
core, path = sys.argv[1:]
spec = importlib.util.spec_from_file_location(
    "dm_remap", core + "/__init__.py", submodule_search_locations=[core])
package = importlib.util.module_from_spec(spec)
sys.modules["dm_remap"] = package
spec.loader.exec_module(package)
from dm_remap.events import Draft, Origin
from dm_remap.journal import Journal
from dm_remap.tracing import BlockError
journal = Journal(path, Origin("db1", uuid.UUID(int=7), "boot-a"))
journal.observe([BlockError(True, "8:16", "read", 8, 8, 5, False)])
journal.append([Draft("sector_error", "text")])
os.kill(os.getpid(), signal.SIGKILL)
"""
    core = str(ROOT / "plugins" / "module_utils")
    done = subprocess.run([sys.executable, "-c", program, core, path], check=False)
    assert done.returncode == -9
    journal = Journal(path, ORIGIN)
    assert len(journal.pending()) == 1
    assert len(journal.read(0, 10).events) == 1
    journal.close()


def test_only_root_can_read_the_journal(journal, path):
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_a_damaged_file_is_refused_with_a_remedy(path):
    Path(path).write_bytes(b"this is not a database" * 100)
    with pytest.raises(DmRemapError, match="move the file away"):
        Journal(path, ORIGIN)


def test_a_newer_journal_is_refused(path):
    Journal(path, ORIGIN).close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 9")
    database.close()
    with pytest.raises(DmRemapError, match="format is 9"):
        Journal(path, ORIGIN)
