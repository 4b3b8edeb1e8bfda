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
import tempfile
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dm_remap import events
from dm_remap import journal as journal_module
from dm_remap.errors import DmRemapError
from dm_remap.events import Draft, Origin
from dm_remap.journal import DamagedJournal, Journal, move_aside
from dm_remap.journal import failure as failed
from dm_remap.tracing import BlockError, parse_line

ORIGIN = Origin("db1", uuid.UUID(int=7), "boot-a")
ROOT = Path(__file__).resolve().parents[2]


def failure(sector, operation="read"):
    return BlockError(True, "8:16", operation, sector, 8, 5, False)


def places(journal):
    return [(item.error.sector, item.times) for item in journal.pending()]


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
    assert journal.observe([failure(8), failure(16), failure(8)]) == 2
    assert places(journal) == [(8, 2), (16, 1)]
    # Also when they come later.
    assert journal.observe([failure(8)]) == 2
    assert places(journal) == [(8, 3), (16, 1)]


def test_an_event_takes_its_failures_out_in_the_same_step(journal):
    journal.observe([failure(8), failure(16)])
    first, second = journal.pending()
    written, waiting = journal.append([draft()], [first], unexplained=[failure(12)])
    assert [event["sequence"] for event in written] == [1]
    assert waiting == 2
    assert places(journal) == [(16, 1), (12, 1)]
    assert second in journal.pending()


def test_a_request_that_failed_again_meanwhile_still_waits(journal):
    journal.observe([failure(8)])
    explained = journal.pending()
    journal.observe([failure(8), failure(8)])
    journal.append([draft()], explained)
    assert places(journal) == [(8, 2)]


def test_a_failed_append_changes_nothing(journal):
    journal.observe([failure(8)])
    (observation,) = journal.pending()
    broken = Draft("no such type", "text")
    with pytest.raises(KeyError):
        journal.append([draft(), broken], [observation], notes={"overruns": "1"})
    assert journal.pending() == [observation]
    assert journal.read(0, 10).events == []
    assert journal.note("overruns") == ""
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
    journal.append([draft()], notes={"overruns": "12"})
    journal.observe([failure(8, "write")])
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
from dm_remap.tracing import BlockError, parse_line
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
    with pytest.raises(DamagedJournal, match="move the file away"):
        Journal(path, ORIGIN)


def test_a_file_whose_pages_are_garbage_is_damaged(path):
    journal = Journal(path, ORIGIN)
    journal.append([draft()])
    journal.close()
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[:100] + bytes(255 for _unused in content[100:]))
    with pytest.raises(DamagedJournal, match="malformed"):
        Journal(path, ORIGIN)


@pytest.mark.parametrize("suffixes", [("",), ("", "-wal"), ("", "-wal", "-shm")])
def test_a_journal_is_moved_with_all_that_belongs_to_it(tmp_path, suffixes):
    for suffix in suffixes:
        (tmp_path / f"journal.db{suffix}").write_text(suffix)
    move_aside(str(tmp_path / "journal.db"), str(tmp_path / "aside"))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        f"aside{suffix}": suffix for suffix in suffixes
    }


def test_a_journal_of_another_format_is_refused_but_not_damaged(path):
    Journal(path, ORIGIN).close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 9")
    database.close()
    before = Path(path).read_bytes()
    with pytest.raises(DmRemapError, match="has format 9, not 2") as caught:
        Journal(path, ORIGIN)
    assert not isinstance(caught.value, DamagedJournal)
    assert Path(path).read_bytes() == before


def test_another_programs_database_is_not_taken_over(path):
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE other (x)")
    database.close()
    before = Path(path).read_bytes()
    with pytest.raises(DmRemapError, match="has format 0"):
        Journal(path, ORIGIN)
    assert Path(path).read_bytes() == before


def fill(journal):
    """Let SQLite find no room for another page, as on a full disk."""
    pages = journal._database.execute("PRAGMA page_count").fetchone()[0]
    journal._database.execute(f"PRAGMA max_page_count = {pages}")


def test_a_full_disk_loses_nothing_that_was_there_and_damages_nothing(journal, path):
    journal.observe([failure(8)])
    journal.append([draft()])
    fill(journal)
    many = [draft("x" * 1000) for _unused in range(20)]
    for _unused in range(2):
        with pytest.raises(sqlite3.OperationalError, match="full") as caught:
            journal.append(many, journal.pending())
    assert not isinstance(failed(path, caught.value), DamagedJournal)
    assert places(journal) == [(8, 1)]
    journal._database.execute("PRAGMA max_page_count = 100000")
    assert [event["sequence"] for event in journal.append(many)[0]][:2] == [2, 3]


def test_a_locked_journal_can_be_used_when_the_lock_is_gone(journal, path):
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    journal._database.execute("PRAGMA busy_timeout = 0")
    with pytest.raises(sqlite3.OperationalError, match="locked") as caught:
        journal.observe([failure(8)])
    assert not isinstance(failed(path, caught.value), DamagedJournal)
    holder.close()
    assert journal.observe([failure(8)]) == 1


def test_what_another_boot_left_is_kept_apart(path):
    old = Journal(path, Origin("db1", uuid.UUID(int=7), "boot-old"))
    old.observe([failure(8, "write")])
    old.close()
    journal = Journal(path, ORIGIN)
    journal.observe([failure(8, "write")])
    assert len(journal.pending()) == len(journal.pending("8:16")) == len(journal.stale()) == 1
    assert journal.pending("8:32") == []
    assert journal.append([draft()], journal.stale())[1] == 1
    assert (places(journal), journal.stale()) == ([(8, 1)], [])
    journal.close()


# A device that is not asked now


RUNS = st.lists(
    st.tuples(
        st.integers(0, 400), st.integers(1, 9), st.sampled_from(["read", "write"]), st.booleans()
    ),
    max_size=40,
)


@given(st.lists(RUNS, max_size=4), st.integers(1, 12), st.integers(1, 12))
def test_few_observations_stand_for_the_same_sectors_and_every_request(batches, many, places):
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(journal_module, "_MANY", many)
        patch.setattr(journal_module, "MAX_PLACES", places)
        journal = Journal(os.path.join(folder, "journal.db"), ORIGIN)
        journal._database.execute("PRAGMA synchronous = OFF")
        failed_requests = []
        for batch in batches:
            errors = [
                BlockError(request, "8:16", operation, sector, count, 5, False)
                for sector, count, operation, request in batch
            ]
            failed_requests += errors
            journal.observe(errors)
        kept = journal.pending()
        journal.close()

    def points(errors, operation, request):
        return {
            sector
            for error in errors
            if (error.operation, error.request) == (operation, request)
            for sector in range(error.sector, error.sector + error.count)
        }

    assert sum(item.times for item in kept) == len(failed_requests)
    unplaced = [item for item in kept if not item.error.count]
    assert len(kept) <= max(many, places) + len(unplaced)
    assert len(unplaced) <= 4
    for operation in ("read", "write"):
        for request in (False, True):
            known = points([item.error for item in kept], operation, request)
            seen = points(failed_requests, operation, request)
            assert known <= seen
            if not unplaced:
                assert known == seen


@pytest.mark.parametrize("sector", [0, 1, 131072, (1 << 63) - 1, (1 << 64) - 131072, (1 << 64) - 1])
def test_every_sector_of_a_flush_can_be_written_down(journal, sector):
    """A flush comes to before a disk whose table has a segment that does not begin at sector 0."""
    error = parse_line(f" x-1 [0] ..... 1.0: block_bio_complete: 254,16 FF {sector} + 0 [-5]")
    assert isinstance(error, BlockError)
    assert (error.operation, error.sector) == ("flush", sector if sector < 1 << 63 else 0)
    journal.observe([error])
    assert [item.error for item in journal.pending()] == [error]


def test_flushes_do_not_become_sectors(journal, monkeypatch):
    monkeypatch.setattr(journal_module, "_MANY", 1)
    flush = BlockError(True, "8:16", "flush", 0, 0, 5, False)
    journal.observe([flush, failure(0), failure(8), flush])
    assert sorted(
        (item.error.operation, item.error.sector, item.error.count, item.times)
        for item in journal.pending()
    ) == [("flush", 0, 0, 2), ("read", 0, 16, 2)]
