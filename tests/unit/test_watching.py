# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From failed requests to events, with a clock that the test moves."""

from __future__ import annotations

import errno
import uuid
from dataclasses import replace

import pytest

from dm_remap import events
from dm_remap.errors import DmRemapError
from dm_remap.inventory import Guarded, Kept
from dm_remap.journal import Observation
from dm_remap.probing import DeviceState
from dm_remap.tracing import BlockError
from dm_remap.watching import Finding, Patience, Watcher, ask

TARGET = Guarded("data", uuid.UUID(int=1), "8:17", "8:16", 256, 8192, ((0, 8192),), True, Kept(3))


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Disk:
    """A main whose bad sectors fail; counts its reads."""

    sectors = 8192

    def __init__(self, bad=()):
        self.bad = set(bad)
        self.reads = 0
        self.closed = False

    def read(self, sector, count):
        self.reads += 1
        if self.bad & set(range(sector, sector + count)):
            raise OSError(errno.EIO, "bad")
        return bytes(512 * count)

    def close(self):
        self.closed = True


class Scene:
    """A watcher with one target on one disk."""

    def __init__(self, bad=()):
        self.clock = Clock()
        self.watcher = Watcher(Patience(probe=10, again=300, settle=5), self.clock)
        self.disk = Disk(bad)
        self.state = DeviceState.LIVE
        self.target = TARGET

    def fail(self, *failures):
        """Let requests fail: (operation, sector of the target, count[, errno])."""
        observations = []
        for operation, sector, count, *rest in failures:
            number = rest[0] if rest else errno.EIO
            error = BlockError(True, "8:16", operation, 256 + sector, count, number, False)
            observations.append(Observation(1, 0, error, 1))
        finding = self.find(observations)
        self.watcher.confirm(finding)
        return finding.drafts

    def find(self, observations):
        """Do what the daemon does up to its write to the journal."""
        question = self.watcher.question(self.target, observations)
        if not question.news:
            return Finding(self.target.name, merged=question.requests)
        answer = ask(question, lambda: self.state, lambda: (self.disk, 1), self.clock, 10)
        return self.watcher.finding(question, answer, "sdb1")


def only(drafts):
    (draft,) = drafts
    return draft


def test_a_failed_read_is_narrowed_to_the_bad_sectors():
    draft = only(Scene({20, 21}).fail(("read", 0, 64)))
    assert draft.type == events.SECTOR_ERROR
    assert draft.operation == "read"
    assert draft.sectors == ((20, 2),)
    assert draft.suspect == ((0, 64),)
    assert (draft.target, draft.device, draft.generation) == ("data", "sdb1", 3)
    assert (draft.errno, draft.requests) == (errno.EIO, 1)


def test_a_read_that_works_again_is_a_passing_fault_without_sectors():
    draft = only(Scene().fail(("read", 0, 64)))
    assert (draft.type, draft.sectors, draft.suspect) == (
        events.TRANSIENT_ERROR,
        (),
        ((0, 64),),
    )


def test_a_failed_write_makes_its_whole_range_suspect_without_a_probe():
    scene = Scene()
    draft = only(scene.fail(("write", 100, 16)))
    assert (draft.type, draft.operation, draft.sectors) == (
        events.SECTOR_ERROR,
        "write",
        ((100, 16),),
    )


def test_the_same_bad_sector_is_told_once_in_a_while():
    scene = Scene({20})
    assert scene.fail(("read", 20, 1))
    assert scene.fail(("read", 20, 1)) == ()
    scene.clock.now += 301
    draft = only(scene.fail(("read", 20, 1)))
    assert draft.merged == 1


def test_our_own_reads_of_a_bad_range_end_in_silence():
    scene = Scene({20})
    scene.fail(("read", 0, 64))
    before = scene.disk.reads
    assert scene.fail(("read", 0, 64), ("read", 20, 1)) == ()
    assert scene.disk.reads == before


def test_a_second_bad_sector_beside_a_known_one_is_told_later():
    scene = Scene({20})
    scene.fail(("read", 0, 64))
    scene.disk.bad.add(30)
    scene.clock.now += 6
    assert only(scene.fail(("read", 0, 64))).sectors == ((30, 1),)


def test_good_sectors_that_failed_beside_a_known_bad_one_are_no_news():
    scene = Scene({20})
    scene.fail(("read", 20, 1))
    assert scene.fail(("read", 0, 64)) == ()
    assert only(scene.fail(("read", 200, 64))).type == events.TRANSIENT_ERROR


def test_a_remapped_place_tells_nothing():
    scene = Scene({20})
    scene.target = replace(TARGET, live=((0, 16), (32, 8160)))
    assert scene.fail(("read", 20, 1)) == ()
    assert scene.disk.reads == 0


def test_errors_beside_the_main_on_the_same_disk_are_not_ours():
    scene = Scene({0})
    assert scene.fail(("read", -256, 8)) == ()
    assert scene.fail(("read", 8192, 8)) == ()


def test_a_request_across_the_mains_edge_is_cut():
    draft = only(Scene({0}).fail(("read", -8, 16)))
    assert (draft.sectors, draft.suspect) == (((0, 1),), ((0, 8),))


@pytest.mark.parametrize("number", [errno.EIO, errno.ENODATA, errno.EREMOTEIO, errno.EILSEQ])
def test_medium_errors_of_all_drivers_are_alike(number):
    assert only(Scene({20}).fail(("read", 20, 1, number))).type == events.SECTOR_ERROR
    assert only(Scene().fail(("write", 20, 1, number))).sectors == ((20, 1),)


def test_a_timeout_is_probed_for_a_read_and_told_for_a_write():
    assert only(Scene({20}).fail(("read", 20, 1, errno.ETIMEDOUT))).sectors == ((20, 1),)
    draft = only(Scene().fail(("write", 20, 1, errno.ETIMEDOUT)))
    assert (draft.type, draft.sectors) == (events.DEVICE_ERROR, ())


def test_a_failed_flush_is_told_once_without_sectors():
    scene = Scene()
    draft = only(scene.fail(("flush", 0, 0)))
    assert (draft.type, draft.operation, draft.sectors) == (events.DEVICE_ERROR, "flush", ())
    assert scene.fail(("flush", 0, 0)) == ()


@pytest.mark.parametrize("state", [DeviceState.GONE, DeviceState.OFFLINE])
def test_a_device_that_is_gone_has_no_bad_sectors(state):
    scene = Scene(range(8192))
    scene.state = state
    draft = only(scene.fail(("read", 20, 8), ("write", 40, 8)))
    assert (draft.type, draft.sectors) == (events.DEVICE_LOST, ())
    assert scene.disk.reads == 0


def test_a_disk_that_reads_nothing_at_all_is_lost_and_not_asked_again_at_once():
    scene = Scene(range(8192))
    assert only(scene.fail(("write", 40, 8))).type == events.DEVICE_LOST
    before = scene.disk.reads
    assert scene.fail(("read", 0, 1), ("read", 2730, 1), ("read", 8191, 1)) == ()
    assert scene.disk.reads == before


def test_a_disk_that_vanishes_during_the_probe_is_lost():
    scene = Scene(range(8192))
    states = iter([DeviceState.LIVE, DeviceState.GONE])
    question = scene.watcher.question(
        TARGET, [Observation(1, 0, BlockError(True, "8:16", "read", 256, 8, 5, False), 1)]
    )
    answer = ask(question, lambda: next(states), lambda: (scene.disk, 1), scene.clock, 10)
    finding = scene.watcher.finding(question, answer, "sdb")
    assert only(finding.drafts).type == events.DEVICE_LOST
    assert scene.disk.closed


def test_a_main_that_is_there_but_cannot_be_opened_is_no_answer():
    scene = Scene()
    question = scene.watcher.question(
        TARGET, [Observation(1, 0, BlockError(True, "8:16", "read", 256, 8, 5, False), 1)]
    )

    def refuse():
        raise DmRemapError("cannot be opened")

    with pytest.raises(DmRemapError):
        ask(question, lambda: DeviceState.LIVE, refuse, scene.clock, 10)


def test_a_slow_probe_stops_in_time_and_leaves_the_rest_unread():
    scene = Scene({0})

    class SlowDisk(Disk):
        def read(self, sector, count):
            scene.clock.now += 6
            return super().read(sector, count)

    scene.disk = SlowDisk({0})
    question = scene.watcher.question(
        TARGET, [Observation(1, 0, BlockError(True, "8:16", "read", 256, 256, 5, False), 1)]
    )
    answer = ask(question, lambda: DeviceState.LIVE, lambda: (scene.disk, 1), scene.clock, 10)
    # The range, its first block, and one place elsewhere to tell whether the disk reads at all.
    assert scene.disk.reads == 3
    assert answer.result.bad == ((0, 1),)
    assert answer.result.unread == ((1, 255),)
    # Failed reads of the part that is still to be probed are not old news.
    scene.watcher.confirm(scene.watcher.finding(question, answer, "sdb1"))
    again = scene.watcher.question(
        TARGET, [Observation(2, 0, BlockError(True, "8:16", "read", 257, 255, 5, False), 1)]
    )
    assert again.reads == [(1, 255)]


def test_whole_physical_blocks_are_told_but_none_beyond_what_main_serves():
    scene = Scene({20})
    scene.target = replace(TARGET, live=((0, 22),))
    question = scene.watcher.question(
        scene.target, [Observation(1, 0, BlockError(True, "8:16", "read", 276, 1, 5, False), 1)]
    )
    answer = ask(question, lambda: DeviceState.LIVE, lambda: (scene.disk, 8), scene.clock, 10)
    draft = only(scene.watcher.finding(question, answer, "sdb1").drafts)
    assert draft.sectors == ((16, 6),)


def test_bios_count_where_the_main_serves_bios_and_requests_where_it_serves_requests():
    scene = Scene({20})
    bio = BlockError(False, "8:16", "read", 276, 1, 5, False)
    assert not scene.watcher.question(TARGET, [Observation(1, 0, bio, 1)]).news
    stacked = replace(TARGET, request_based=False)
    assert scene.watcher.question(stacked, [Observation(1, 0, bio, 1)]).reads == [(20, 1)]


def test_a_slow_disk_is_told_once_in_a_while():
    scene = Scene()
    finding = scene.watcher.slow(TARGET, "sdb1")
    assert only(finding.drafts).type == events.DEVICE_SLOW
    scene.watcher.confirm(finding)
    assert scene.watcher.slow(TARGET, "sdb1").drafts == ()


def test_what_an_old_journal_reported_is_not_told_again():
    scene = Scene({20})
    scene.watcher.remember("data", "read", [(20, 1)])
    assert scene.fail(("read", 20, 1)) == ()


def test_read_and_write_errors_of_one_burst_share_the_counts():
    drafts = Scene({20}).fail(("read", 20, 1), ("write", 40, 8))
    assert [draft.operation for draft in drafts] == ["read", "write"]
    assert sum(draft.requests for draft in drafts) == 2


def test_what_did_not_reach_the_journal_is_said_again():
    scene = Scene({20})
    requests = [("read", 0, 64), ("write", 100, 8), ("flush", 0, 0)]
    observations = [
        Observation(1, 0, BlockError(True, "8:16", what, 256 + start, count, 5, False), 1)
        for what, start, count in requests
    ]
    first = scene.find(observations)
    assert len(first.drafts) == 3
    assert scene.find(observations) == first
    scene.watcher.confirm(first)
    assert scene.find(observations).drafts == ()


@pytest.mark.parametrize("state", [DeviceState.GONE, DeviceState.LIVE])
def test_a_lost_device_that_did_not_reach_the_journal_is_said_again(state):
    scene = Scene(range(8192))
    scene.state = state
    error = BlockError(True, "8:16", "read", 300, 8, 5, False)
    first = scene.find([Observation(1, 0, error, 1)])
    assert only(first.drafts).type == events.DEVICE_LOST
    assert scene.find([Observation(1, 0, error, 1)]) == first


def test_a_slow_disk_that_did_not_reach_the_journal_is_said_again():
    scene = Scene()
    assert scene.watcher.slow(TARGET, "sdb1") == scene.watcher.slow(TARGET, "sdb1")


def test_requests_count_as_merged_once_although_the_journal_failed_before():
    scene = Scene({20})
    assert scene.fail(("read", 20, 1))
    error = BlockError(True, "8:16", "read", 276, 1, 5, False)
    scene.find([Observation(1, 0, error, 1)])
    scene.watcher.confirm(scene.find([Observation(1, 0, error, 1)]))
    assert only(scene.fail(("write", 100, 8))).merged == 1
    assert only(scene.fail(("write", 200, 8))).merged == 0


def test_requests_without_a_place_are_told_with_their_number():
    scene = Scene()
    error = BlockError(True, "8:16", "write", 0, 0, 5, False)
    finding = scene.find([Observation(1, 0, error, 12)])
    draft = only(finding.drafts)
    assert (draft.type, draft.operation, draft.sectors) == (events.OVERRUN, "write", ())
    assert draft.requests == 12
    assert "12 more failed writes of sdb1" in draft.message


def test_each_event_has_the_errno_of_its_own_operation():
    drafts = Scene().fail(
        ("flush", 0, 0, errno.ENOSPC), ("write", 40, 8, errno.EREMOTEIO), ("read", 20, 1, 61)
    )
    assert [(draft.operation, draft.errno) for draft in drafts] == [
        ("read", 61),
        ("write", errno.EREMOTEIO),
        ("flush", errno.ENOSPC),
    ]


def test_messages_name_the_device_before_the_place():
    scene = Scene({20, 21, 30})
    assert only(scene.fail(("read", 20, 2))).message == (
        "data: 2 sectors of sdb1 from 20 on cannot be read"
    )
    assert only(scene.fail(("write", 40, 1), ("write", 50, 1))).message == (
        "data: 2 sectors of sdb1 from 40 on in 2 places could not be written"
    )


def test_old_news_is_forgotten_when_its_time_is_over():
    scene = Scene()
    for number in range(1000):
        scene.clock.now += 301
        scene.watcher.remember("data", "read", [(number * 10, 1)])
    assert len(scene.watcher._memories["data"].reported["read"]._items) == 1


def test_a_burst_beside_much_old_news_is_not_compared_pair_by_pair(monkeypatch):
    counting = []

    class Pair(tuple):
        """A range that counts how often it is looked at."""

        __slots__ = ()

        def __iter__(self):
            counting.append(1)
            return super().__iter__()

    known, burst = 5000, 500
    scene = Scene()
    live = tuple(Pair((number * 16, 15)) for number in range(known))
    scene.target = replace(TARGET, sectors=known * 16, live=live)
    scene.watcher.remember("data", "read", [Pair((number * 16, 1)) for number in range(known)])
    failed = [
        Observation(1, 0, BlockError(True, "8:16", "read", 256 + number * 16, 8, 5, False), 1)
        for number in range(burst)
    ]
    question = scene.watcher.question(scene.target, failed)
    assert len(question.beside) == burst
    assert len(counting) < 10 * (known + burst)
