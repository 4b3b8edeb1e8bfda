# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The text of the block tracepoints, and the handling of a tracefs instance."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dm_remap.errors import MissingKernelFeature
from dm_remap.tracing import (
    BlockError,
    Lost,
    Parser,
    TraceInstance,
    check_format,
    parse_line,
)

PREFIX = "          <idle>-0       [001] ..s1.   123.456789: "


@pytest.mark.parametrize(
    "tail",
    [
        pytest.param("254,16 R () 2048 + 8 [-5]", id="6.1"),
        pytest.param("254,16 R () 2048 + 8 none,0,0 [-5]", id="6.12"),
        pytest.param("254,16 RS () 2048 + 8 be,0,4 [-5]", id="6.12 with a priority"),
        pytest.param("254,16 RSM (28 00 00 08 00) 2048 + 8 [-5]", id="with a command"),
    ],
)
def test_a_failed_read_is_understood_in_every_printed_form(tail):
    assert parse_line(PREFIX + "block_rq_error: " + tail) == BlockError(
        True, "254:16", "read", 2048, 8, 5, False
    )


@pytest.mark.parametrize(
    ("rwbs", "operation", "readahead"),
    [
        ("R", "read", False),
        ("RA", "read", True),
        ("RAM", "read", True),
        ("RSM", "read", False),
        ("W", "write", False),
        ("WS", "write", False),
        ("FWFS", "write", False),
        ("WFSM", "write", False),
        ("N", "write_zeroes", False),
        ("NS", "write_zeroes", False),
        ("WZS", "write_zeroes", False),
        ("D", "discard", False),
        ("DE", "discard", False),
    ],
)
def test_operation_and_readahead(rwbs, operation, readahead):
    error = parse_line(f"{PREFIX}block_rq_error: 8,0 {rwbs} () 0 + 1 [-61]")
    assert (error.operation, error.readahead) == (operation, readahead)


@pytest.mark.parametrize("rwbs", ["FF", "F", "FS", "FWS", "WS"])
def test_an_empty_request_is_a_flush(rwbs):
    error = parse_line(f"{PREFIX}block_rq_error: 8,0 {rwbs} () 0 + 0 [-5]")
    assert (error.operation, error.count) == ("flush", 0)


@pytest.mark.parametrize(
    "line",
    [
        "",
        PREFIX + "block_rq_error: 8,0 D () 0 + 8 [-95]",
        PREFIX + "block_rq_error: 8,0 NS () 0 + 8 [-95]",
        PREFIX + "block_rq_error: 8,0 N () 0 + 0 [-5]",
        PREFIX + "block_rq_error: 8,0 R () 0 + 0 [-5]",
        PREFIX + "block_rq_complete: 8,0 R () 0 + 8 [0]",
        PREFIX + "block_rq_error: 8,0 R () 0 + 8",
        PREFIX + "tracing_mark_write: a note",
    ],
)
def test_what_is_no_failure_of_a_known_operation_is_left_out(line):
    assert parse_line(line) is None


def test_a_bio_is_told_from_a_request():
    error = parse_line(PREFIX + "block_bio_complete: 253,0 WS 4096 + 16 [-121]")
    assert error == BlockError(False, "253:0", "write", 4096, 16, 121, False)


@pytest.mark.parametrize("rwbs", ["NS", "D", "DE"])
def test_operations_on_whole_ranges_are_no_bad_sectors_for_the_daemon(rwbs):
    """Whoever asked for one goes on with plain writes, or without it."""
    assert Parser().split([rq(f"8,0 {rwbs} () 0 + 65536 [-5]")]) == ([], 0)


def test_readahead_is_ignored_and_losses_are_counted():
    errors, lost = Parser().split(
        [
            PREFIX + "block_rq_error: 8,0 RA () 8 + 8 [-5]",
            "CPU:1 [LOST 17 EVENTS]",
            PREFIX + "block_rq_error: 8,0 R () 16 + 8 [-5]",
            "CPU:0 [LOST 3 EVENTS]",
        ]
    )
    assert [error.sector for error in errors] == [16]
    assert lost == 20


def rq(what, cpu=1, event="block_rq_error"):
    return f"  kworker/0:1H-37      [{cpu:03}] d.h1.    65.981627: {event}: {what}"


DATA = "8,0 WS () 80 + 8 [-5]"


@pytest.mark.parametrize("again", ["8,0 WS () 80 + 0 [-5]", "8,0 WS () 88 + 0 [-5]"])
@pytest.mark.parametrize("read_at_once", [True, False])
def test_a_durable_write_whose_data_fails_is_no_flush(again, read_at_once):
    """What Linux 6.1 printed of writes with REQ_FUA on virtio, scsi and ide."""
    lines = [rq(DATA), rq(again), rq("253,0 WFS 80 + 8 [-5]", event="block_bio_complete")]
    parser = Parser()
    parts = [lines] if read_at_once else [[line] for line in lines]
    errors = [error for part in parts for error in parser.parse(part)]
    assert [(error.operation, error.request) for error in errors] == [
        ("write", True),
        ("write", False),
    ]


@pytest.mark.parametrize(
    ("before", "empty"),
    [
        pytest.param([], rq("8,0 WS () 80 + 0 [-5]"), id="nothing before"),
        pytest.param([rq(DATA)], rq("8,0 WS () 80 + 0 [-5]", cpu=0), id="other processor"),
        pytest.param([rq(DATA)], rq("8,16 WS () 80 + 0 [-5]"), id="other disk"),
        pytest.param([rq(DATA)], rq("8,0 WS () 0 + 0 [-5]"), id="other sector"),
        pytest.param([rq(DATA)], rq("8,0 WS () 80 + 0 [-61]"), id="other error"),
        pytest.param([rq("8,0 R () 80 + 8 [-5]")], rq("8,0 WS () 80 + 0 [-5]"), id="read"),
        pytest.param(
            [rq(DATA), rq("253,0 WS 80 + 8 [-5]", event="block_bio_complete")],
            rq("8,0 WS () 80 + 0 [-5]"),
            id="bio ended",
        ),
        pytest.param(
            [rq(DATA), rq("8,16 D () 0 + 8 [-5]")],
            rq("8,0 WS () 80 + 0 [-5]"),
            id="discard between",
        ),
        pytest.param(
            [rq(DATA), rq("8,0 WS () 80 + 0 [-5]")], rq("8,0 WS () 80 + 0 [-5]"), id="a second one"
        ),
        pytest.param(
            [rq("8,0 WS 80 + 8 [-5]", event="block_bio_complete")],
            rq("8,0 WS 80 + 0 [-5]", event="block_bio_complete"),
            id="bios",
        ),
        pytest.param(
            [rq(DATA), "CPU:1 [LOST 1 EVENTS]"], rq("8,0 WS () 80 + 0 [-5]"), id="lines lost"
        ),
        pytest.param(
            ["block_rq_error: " + DATA, ": block_rq_error: " + DATA],
            ": block_rq_error: 8,0 WS () 80 + 0 [-5]",
            id="no processor",
        ),
    ],
)
def test_any_other_empty_write_is_a_flush(before, empty):
    parser = Parser()
    parser.parse(before)
    (error,) = parser.parse([empty])
    assert error.operation == "flush"


# What each request that fails prints, and whether a flush has failed.
ENDS = {
    "write": (["8,0 WS () 0 + 8 [-5]", "bio"], False),
    "durable write": (["8,0 WS () 0 + 8 [-5]", "8,0 WS () 0 + 0 [-5]", "bio"], False),
    "flush": (["8,0 WS () 0 + 0 [-5]", "bio"], True),
    "read": (["8,0 R () 0 + 8 [-5]", "bio"], False),
}


@given(st.lists(st.tuples(st.sampled_from(sorted(ENDS)), st.integers(0, 1))), st.data())
def test_each_flush_that_fails_is_told_on_several_processors(requests, data):
    waiting = {
        cpu: [line for kind, on in requests if on == cpu for line in ENDS[kind][0]]
        for cpu in (0, 1)
    }
    lines = []
    while any(waiting.values()):
        cpu = data.draw(st.sampled_from([cpu for cpu in waiting if waiting[cpu]]))
        line = waiting[cpu].pop(0)
        bio = ("253,0 WS 0 + 8 [-5]", cpu, "block_bio_complete")
        lines.append(rq(*bio) if line == "bio" else rq(line, cpu))
    errors = Parser().parse(lines)
    flushes = [error for error in errors if error.operation == "flush"]
    assert len(flushes) == sum(ENDS[kind][1] for kind, _on in requests)
    writes = [error for error in errors if error.request and error.operation == "write"]
    assert len(writes) == sum("write" in kind for kind, _on in requests)


@given(st.text())
def test_any_text_is_survived(text):
    assert isinstance(parse_line(text), (BlockError, Lost, type(None)))


def format_file(form):
    return f"name: x\nID: 1\nformat:\n\tfield:int error;\n\nprint fmt: {form}, MAJOR(REC->dev)\n"


@pytest.mark.parametrize(
    "form", ['"%d,%d %s (%s) %llu + %u [%d]"', '"%d,%d %s (%s) %llu + %u %s,%u,%u [%d]"']
)
def test_known_forms_pass_the_self_test(form):
    check_format("block_rq_error", format_file(form))


def test_an_unknown_form_is_refused_with_the_form_in_the_message():
    with pytest.raises(MissingKernelFeature, match="dev=%d"):
        check_format("block_rq_error", format_file('"dev=%d [%d]"'))


@pytest.fixture
def tracefs(tmp_path):
    """A folder that looks like tracefs with an instance; the pipe is a FIFO."""
    (tmp_path / "events" / "block").mkdir(parents=True)
    instance = tmp_path / "instances" / "dm_remap"
    for event, form in {
        "block_rq_error": '"%d,%d %s (%s) %llu + %u [%d]"',
        "block_bio_complete": '"%d,%d %s %llu + %u [%d]"',
    }.items():
        folder = instance / "events" / "block" / event
        folder.mkdir(parents=True)
        (folder / "format").write_text(format_file(form))
        (folder / "enable").write_text("0\n")
        (folder / "filter").write_text("none\n")
    (instance / "tracing_on").write_text("0\n")
    (instance / "buffer_size_kb").write_text("7\n")
    (instance / "buffer_percent").write_text("50\n")
    for processor in ("cpu0", "cpu1"):
        (instance / "per_cpu" / processor).mkdir(parents=True)
        (instance / "per_cpu" / processor / "stats").write_text(
            "entries: 4\noverrun: 3\ncommit overrun: 0\nbytes: 9\ndropped events: 2\n"
        )
    os.mkfifo(instance / "trace_pipe")
    return tmp_path


def read_instance(tracefs, name):
    return (tracefs / "instances" / "dm_remap" / name).read_text().strip()


def test_opening_switches_the_events_on(tracefs):
    trace = TraceInstance(str(tracefs))
    trace.open()
    assert read_instance(tracefs, "events/block/block_rq_error/enable") == "1"
    assert read_instance(tracefs, "events/block/block_bio_complete/enable") == "1"
    assert read_instance(tracefs, "events/block/block_bio_complete/filter") == "error != 0"
    assert read_instance(tracefs, "buffer_percent") == "0"
    assert read_instance(tracefs, "tracing_on") == "1"
    assert trace.active()
    trace.close()


def test_an_instance_that_collects_keeps_its_buffer_size(tracefs):
    (tracefs / "instances/dm_remap/events/block/block_bio_complete/enable").write_text("1\n")
    trace = TraceInstance(str(tracefs))
    trace.open()
    assert read_instance(tracefs, "buffer_size_kb") == "7"
    trace.close()


def test_lines_are_read_whole(tracefs):
    trace = TraceInstance(str(tracefs))
    trace.open()
    with open(tracefs / "instances/dm_remap/trace_pipe", "w") as pipe:
        pipe.write("one\ntw")
        pipe.flush()
        assert trace.read() == ["one"]
        pipe.write("o\n")
        pipe.flush()
        assert trace.read() == ["two"]
        assert trace.read() == []
    trace.close()


def test_lines_can_be_looked_at_without_taking_them_out(tracefs):
    instance = TraceInstance(str(tracefs))
    assert instance.peek() == []
    instance.open()
    (tracefs / "instances" / "dm_remap" / "trace").write_text("# tracer: nop\n#\n one\n two\n")
    assert instance.peek() == [" one", " two"]
    assert instance.peek() == [" one", " two"]


def test_overruns_of_all_processors_are_added_up(tracefs):
    assert TraceInstance(str(tracefs)).overruns() == 10


def test_someone_else_switching_tracing_off_is_noticed(tracefs):
    trace = TraceInstance(str(tracefs))
    trace.open()
    (tracefs / "instances/dm_remap/tracing_on").write_text("0\n")
    assert not trace.active()
    trace.close()


def test_a_machine_without_tracefs_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(MissingKernelFeature, match="mount tracefs"):
        TraceInstance(str(tmp_path / "nowhere")).open()


def test_an_unknown_form_keeps_the_instance_closed(tracefs):
    (tracefs / "instances/dm_remap/events/block/block_rq_error/format").write_text(
        format_file('"new"')
    )
    with pytest.raises(MissingKernelFeature, match="not known"):
        TraceInstance(str(tracefs)).open()


def test_kernels_before_5_18_use_completions_filtered_on_error(tracefs):
    events = tracefs / "instances/dm_remap/events/block"
    (events / "block_rq_error").rename(events / "block_rq_complete")
    trace = TraceInstance(str(tracefs))
    trace.open()
    assert (events / "block_rq_complete/filter").read_text() == "error != 0"
    assert trace.events == ["block_rq_complete", "block_bio_complete"]
    trace.close()
