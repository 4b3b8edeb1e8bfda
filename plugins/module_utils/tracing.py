# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sees block errors: a tracefs instance of our own and the text that it prints.

The kernel log is rate-limited and loses most errors of a burst; the tracepoints lose none, and the
ring buffer of the instance keeps collecting while no daemon runs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .errors import MissingKernelFeature

TRACEFS = "/sys/kernel/tracing"
INSTANCE = "dm_remap"
# Each reader takes out what it reads, so the healer has one of its own.
REFLEX_INSTANCE = "dm_remap_reflex"
BUFFER_KIB_PER_CPU = 1408
_READ_BYTES = 1 << 16

READ, WRITE, FLUSH = "read", "write", "flush"
# Their ranges may be gigabytes long, and whoever asked for them goes on without them.
ZEROES, DISCARD = "write_zeroes", "discard"
WHOLESALE = (ZEROES, DISCARD)

# The operations that blk_fill_rwbs (kernel/trace/blktrace.c) prints. Write zeroes has no letter of
# its own, so it gets that of none, N; so have operations of zoned disks, which no target has.
_OPERATIONS = {"R": READ, "W": WRITE, "D": DISCARD, "N": ZEROES, "WZ": ZEROES}
_RWBS = re.compile(r"(?:F?(?P<data>R|WZ|W|D|N)|F)(?P<flags>[A-Z]*)\Z")

# A line begins with the task and the processor: `TASK-PID [CPU] FLAGS TIME: EVENT: ...`.
_CPU = re.compile(r".*-\d+ +\[(?P<cpu>\d+)\] ")
_LINE = re.compile(
    r": (?P<event>block_rq_error|block_rq_complete|block_bio_complete): "
    r"(?P<major>\d+),(?P<minor>\d+) (?P<rwbs>[A-Z]+) (?:\([^)]*\) )?"
    r"(?P<sector>\d+) \+ (?P<count>\d+) "
    r"(?:[^\s,]+,\d+,\d+ )?"  # the I/O priority that 6.12's request events add
    r"\[(?P<error>-?\d+)\]\s*$"
)
# From here on the kernel's unsigned number is below 0.
_NEGATIVE = 1 << 63
_LOST = re.compile(r"^CPU:\d+ \[LOST (?P<count>\d+) EVENTS\]")
_STATISTIC = re.compile(r"^(overrun|dropped events): (\d+)$", re.MULTILINE)

# `print fmt:` of the events, without blanks, up to the arguments; include/trace/events/block.h.
_KNOWN_FORMS = {
    "block_rq_error": (
        '"%d,%d %s (%s) %llu + %u [%d]"',
        '"%d,%d %s (%s) %llu + %u %s,%u,%u [%d]"',
    ),
    "block_bio_complete": ('"%d,%d %s %llu + %u [%d]"',),
}
_KNOWN_FORMS["block_rq_complete"] = _KNOWN_FORMS["block_rq_error"]


@dataclass(frozen=True)
class BlockError:
    """One failed request or bio, as a tracepoint shows it.

    Args:
        request: True for a request (disks), False for a bio (device-mapper, md).
        devno: `major:minor` of the whole disk for a request, of the bio's device for a bio.
        operation: `read`, `write`, `flush`, `write_zeroes` or `discard`.
        sector: first sector on the whole disk. The bad one may be any of the request's.
        count: sectors; 0 for a flush.
        errno: positive error number.
        readahead: nobody waits for this read, and some drivers fail innocent ones.
    """

    request: bool
    devno: str
    operation: str
    sector: int
    count: int
    errno: int
    readahead: bool


@dataclass(frozen=True)
class Lost:
    """The trace buffer overwrote this number of entries before they were read."""

    count: int


def parse_line(line: str) -> BlockError | Lost | None:
    """Parse a line of `trace_pipe`; None when it is not of a failed operation that is known."""
    found = _LINE.search(line)
    if found is None:
        lost = _LOST.match(line)
        return Lost(int(lost["count"])) if lost else None
    error = -int(found["error"])
    count = int(found["count"])
    operation, readahead = _operation(found["rwbs"], count)
    if error <= 0 or not operation:
        return None
    if operation in WHOLESALE and error == errno.EOPNOTSUPP:
        return None  # an answer rather than a failure
    sector = int(found["sector"])
    return BlockError(
        request=found["event"] != "block_bio_complete",
        devno=f"{found['major']}:{found['minor']}",
        operation=operation,
        # dm-linear sends a flush to before its device if its segment does not begin at sector 0.
        sector=sector if sector < _NEGATIVE else 0,
        count=count,
        errno=error,
        readahead=readahead,
    )


def _operation(rwbs: str, count: int) -> tuple[str, bool]:
    # Form: preflush F, operation, then F for FUA, A for readahead, S for sync, M for metadata.
    found = _RWBS.match(rwbs)
    if found is None:
        return "", False
    if count == 0:
        # An empty write is a flush; the block layer has taken its preflush flag off by then.
        return (FLUSH if found["data"] in (None, "W") else ""), False
    return _OPERATIONS.get(found["data"], ""), "A" in found["flags"]


class Parser:
    """Parses the lines of a trace in their order, and leaves out what is told twice.

    A disk that cannot write through its cache gets a durable write (REQ_FUA) as a write and a
    flush. If already the write fails, blk_flush_complete_seq (block/blk-flush.c) ends the request
    once more, when all of its bytes are done, and that looks like a flush that failed. Nothing on
    the same processor can come between the two but an interrupt, and no bio ends before both.
    """

    def __init__(self) -> None:
        self._writes: dict[str, BlockError] = {}

    def parse(self, lines: Iterable[str]) -> list[BlockError | Lost]:
        """Parse lines that follow on those of the last call."""
        return [item for item in map(self._parse, lines) if item is not None]

    def split(self, lines: Iterable[str]) -> tuple[list[BlockError], int]:
        """Return the failed reads, writes and flushes in `lines`, and how many entries were lost.

        Readahead is left out, because nobody waits for it.
        """
        errors, lost = [], 0
        for item in self.parse(lines):
            if isinstance(item, Lost):
                lost += item.count
            elif not item.readahead and item.operation not in WHOLESALE:
                errors.append(item)
        return errors, lost

    def _parse(self, line: str) -> BlockError | Lost | None:
        item = parse_line(line)
        if isinstance(item, Lost):
            self._writes.clear()
            return item
        found = _CPU.match(line)
        cpu = found["cpu"] if found else ""
        before = self._writes.pop(cpu, None)
        if item is not None and before is not None and _ends_again(item, before):
            return None
        if item is not None and cpu and item.request and item.operation == WRITE:
            self._writes[cpu] = item
        return item


def _ends_again(error: BlockError, before: BlockError) -> bool:
    """Whether an error is that of a failed write which ends once more."""
    # Some kernels show the request's end by then.
    places = (before.sector, before.sector + before.count)
    return error.sector in places and error == replace(
        before, operation=FLUSH, sector=error.sector, count=0
    )


def check_format(event: str, text: str) -> None:
    """Check that `parse_line` understands what the kernel prints for an event.

    Args:
        event: name of the tracepoint.
        text: content of its `format` file.

    Raises:
        MissingKernelFeature: the form is not one that was tested.
    """
    found = re.search(r'^print fmt: ("[^"]*")', text, re.MULTILINE)
    form = found[1] if found else "nothing"
    if form not in _KNOWN_FORMS[event]:
        raise MissingKernelFeature(
            f"this kernel prints {event} as {form}, which is not known",
            remedy="update dm_remap.storage or report the kernel's version",
        )


class TraceInstance:
    """The tracefs instance that collects block errors.

    The instance is left in place when the daemon ends: what happens meanwhile is read later.

    Args:
        tracefs: where tracefs is mounted.
        name: name of the instance.
    """

    def __init__(self, tracefs: str = TRACEFS, name: str = INSTANCE) -> None:
        self._tracefs = tracefs
        self._directory = os.path.join(tracefs, "instances", name)
        self._pipe = -1
        self._rest = b""
        self.events: list[str] = []

    def open(self) -> int:
        """Create or adopt the instance, switch its events on and return the pipe to wait on.

        Raises:
            MissingKernelFeature: tracefs is missing or its events cannot be understood.
        """
        try:
            return self._open()
        except OSError as error:
            self.close()
            raise MissingKernelFeature(
                f"block errors cannot be traced: {error.strerror}",
                device=str(error.filename or self._directory),
                remedy="be root and mount tracefs at /sys/kernel/tracing",
            ) from error
        except MissingKernelFeature:
            self.close()
            raise

    def _open(self) -> int:
        os.listdir(os.path.join(self._tracefs, "events", "block"))
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._directory)
        # Wake the reader for a single error; older kernels wait for a half-full buffer.
        self._write("0", "buffer_percent", optional=True)
        if self._read("events/block/block_bio_complete/enable").strip() != "1":
            self._write(str(BUFFER_KIB_PER_CPU), "buffer_size_kb")
        self.events = []
        if os.path.isdir(os.path.join(self._directory, "events/block/block_rq_error")):
            self._enable("block_rq_error", "")
        else:
            self._enable("block_rq_complete", self._error_filter("block_rq_complete"))
        self._enable("block_bio_complete", self._error_filter("block_bio_complete"))
        self._write("1", "tracing_on")
        self._pipe = os.open(
            os.path.join(self._directory, "trace_pipe"), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        )
        return self._pipe

    def read(self) -> list[str]:
        """Take up to 64 KiB of whole lines out of the buffer; empty when there are none."""
        try:
            data = os.read(self._pipe, _READ_BYTES)
        except BlockingIOError:
            return []
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        return [line.decode("ascii", "replace") for line in lines]

    def peek(self) -> list[str]:
        """Return all lines that no reader has taken out yet, and leave them; none without it."""
        try:
            lines = self._read("trace").splitlines()
        except OSError:
            return []
        return [line for line in lines if not line.startswith("#")]

    def overruns(self) -> int:
        """Return how many entries all buffers have overwritten or dropped since they exist."""
        total = 0
        processors = os.path.join(self._directory, "per_cpu")
        for processor in os.listdir(processors):
            text = self._read(f"per_cpu/{processor}/stats")
            total += sum(int(number) for _unused, number in _STATISTIC.findall(text))
        return total

    def active(self) -> bool:
        """Return whether the instance still records: someone may have switched it off."""
        try:
            if self._read("tracing_on").strip() != "1":
                return False
            switches = [self._read(f"events/block/{name}/enable").strip() for name in self.events]
        except OSError:
            return False
        return all(switch == "1" for switch in switches)

    def close(self) -> None:
        """Close the pipe; the instance goes on collecting."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        self._rest = b""

    def remove(self) -> None:
        """Close and remove the instance, for uninstalling."""
        self.close()
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(self._directory)

    def _enable(self, event: str, condition: str) -> None:
        check_format(event, self._read(f"events/block/{event}/format"))
        if condition:
            self._write(condition, f"events/block/{event}/filter")
        self._write("1", f"events/block/{event}/enable")
        self.events.append(event)

    def _error_filter(self, event: str) -> str:
        # The field was called `errors` in requests before Linux 5.13.
        text = self._read(f"events/block/{event}/format")
        return "errors != 0" if re.search(r"\berrors;", text) else "error != 0"

    def _read(self, name: str) -> str:
        with open(os.path.join(self._directory, name), encoding="ascii") as stream:
            return stream.read()

    def _write(self, value: str, name: str, optional: bool = False) -> None:
        path = os.path.join(self._directory, name)
        if optional and not os.path.exists(path):
            return
        with open(path, "w", encoding="ascii") as stream:
            stream.write(value)
