# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host for the command-line tools: the kernel in memory, and streams that keep what is said."""

from __future__ import annotations

import io
import json
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest

from dm_remap.cli.framework import Host, run
from dm_remap.cli.programs import PROGRAMS
from dm_remap.engine import Engine
from tests.unit.fake_kernel import Process
from tests.unit.test_engine import Scene

MACHINE = "00000000-0000-4000-8000-000000000000"


def be_root_at_a_known_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody is root, and it is always the same moment."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000 * 10**9)


class Terminal(io.StringIO):
    """A standard input with somebody at it."""

    def isatty(self) -> bool:
        return True


@dataclass
class Done:
    """What a command left behind: its exit code and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The document on the standard output."""
        return json.loads(self.out)


@dataclass
class Desk:
    """Runs command lines on a scene.

    Args:
        scene: the host.
        process: the process of each command.
        logged: what went to the system's log.
    """

    scene: Scene
    process: Process | None = None
    logged: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The scene's folder."""
        return self.scene.folder

    def host(self, stdin: IO[str] | None = None, **streams: IO[str]) -> Host:
        """The host, with streams of its own."""

        used = self.process or Process(self.scene.kernel)

        def engine(progress: Any) -> Engine:
            return Engine(
                mapper=used.mapper,
                blocks=used.blocks,
                progress=progress,
                lock_dir=str(self.folder / "locks"),
                backup_dir=str(self.folder / "backup"),
            )

        return Host(
            engine=engine,
            mapper=lambda: used.mapper,
            blocks=used.blocks,
            backup_dir=str(self.folder / "backup"),
            journal=str(self.folder / "journal.db"),
            log=self.logged.append,
            stdin=stdin or io.StringIO(),
            **streams,
        )

    def run(self, line: str, stdin: IO[str] | None = None) -> Done:
        """Run a command line, as one text without quoting."""
        out, err = io.StringIO(), io.StringIO()
        program, *arguments = line.split()
        code = run(PROGRAMS[program], arguments, self.host(stdin, stdout=out, stderr=err))
        return Done(code, out.getvalue(), err.getvalue())


def settled(text: str) -> str:
    """Output without what differs from run to run: UUIDs, digests, durations."""
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID", text)
    text = re.sub(r"\b[0-9a-f]{16}\b", "DIGEST----------", text)
    return re.sub(r"[0-9.]+ ms", "N ms", text)
