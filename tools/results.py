# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Results of checks in the JUnit XML form that pytest writes too, so that they can be added up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

STOP_SECONDS = 60
LINE_LENGTH = 240


@dataclass(frozen=True)
class Outcome:
    """How one command ended: its exit status (None: stopped for time), output and duration."""

    status: int | None
    output: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.status == 0


@dataclass(frozen=True)
class Counts:
    """Numbers of checks in a results file."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped
        )

    def __str__(self) -> str:
        text = f"{self.passed} passed, {self.failed} failed"
        return f"{text}, {self.skipped} skipped" if self.skipped else text


def stop(process: subprocess.Popen[str]) -> None:
    """End a command and what it started: by requests that let it clean up, at last by force."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue


class Running:
    """The commands under way, so that all of them can be ended together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[str]] = set()
        self.stopping = False

    def start(self, command: list[str], **options: Any) -> subprocess.Popen[str]:
        """Start a command, unless everything is being stopped."""
        with self._lock:
            if self.stopping:
                raise InterruptedError("stopping")
            process = subprocess.Popen(command, text=True, start_new_session=True, **options)
            self._processes.add(process)
            return process

    def ended(self, process: subprocess.Popen[str]) -> None:
        """Forget a command."""
        with self._lock:
            self._processes.discard(process)

    def stop(self) -> None:
        """End all commands, and start no more."""
        with self._lock:
            self.stopping = True
            processes = list(self._processes)
        threads = [threading.Thread(target=stop, args=(process,)) for process in processes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


RUNNING = Running()


def stop_on_signals() -> None:
    """Turn SIGINT and SIGTERM into KeyboardInterrupt, also where a shell had SIGINT ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def run(
    command: list[str],
    seconds: float,
    cwd: Path,
    prefix: str | None = None,
    environment: dict[str, str] | None = None,
) -> Outcome:
    """Run a command in a process group of its own, for at most ``seconds``.

    Its output is returned; with a ``prefix`` each line is also printed as it comes.
    """
    started = time.monotonic()
    process = RUNNING.start(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        errors="replace",
    )
    late = threading.Event()

    def end() -> None:
        late.set()
        stop(process)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    lines = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if prefix is not None:
                sys.stdout.write(prefix + line)
                sys.stdout.flush()
        process.wait()
    except BaseException:
        stop(process)
        raise
    finally:
        timer.cancel()
        RUNNING.ended(process)
    duration = time.monotonic() - started
    if late.is_set():
        lines.append(f"stopped: it took longer than {seconds:.0f} s\n")
    return Outcome(None if late.is_set() else process.returncode, "".join(lines), duration)


def write(path: Path, suite: str, outcomes: dict[str, Outcome]) -> None:
    """Write the named outcomes as a JUnit file."""
    root = ElementTree.Element("testsuite", name=suite, tests=str(len(outcomes)))
    root.set("failures", str(sum(not outcome.passed for outcome in outcomes.values())))
    for name, outcome in outcomes.items():
        case = ElementTree.SubElement(
            root, "testcase", classname=suite, name=name, time=f"{outcome.seconds:.1f}"
        )
        if not outcome.passed:
            ElementTree.SubElement(case, "failure", message=f"status {outcome.status}")
    path.parent.mkdir(parents=True, exist_ok=True)
    ElementTree.ElementTree(root).write(path, encoding="unicode", xml_declaration=True)


def _cases(path: Path) -> list[ElementTree.Element]:
    """The checks in a JUnit file; none when there is no such file or it is cut short."""
    try:
        return list(ElementTree.parse(path).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return []


def _failure(case: ElementTree.Element) -> ElementTree.Element | None:
    """What a check says of its failure, whether in itself or in its preparation."""
    failure = case.find("failure")
    return case.find("error") if failure is None else failure


def read(path: Path) -> Counts:
    """Return the numbers in a JUnit file; none when there is no such file or it is cut short."""
    cases = _cases(path)
    failed = sum(_failure(case) is not None for case in cases)
    skipped = sum(case.find("skipped") is not None for case in cases)
    return Counts(len(cases) - failed - skipped, failed, skipped)


def failures(path: Path) -> list[str]:
    """Return a line for each failed check in a JUnit file: its name and why, shortened."""
    lines = []
    for case in _cases(path):
        failure = _failure(case)
        if failure is not None:
            reason = " ".join((failure.get("message") or "").split())
            lines.append(f"{case.get('classname')}::{case.get('name')}: {reason}"[:LINE_LENGTH])
    return lines
