# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A daemon on a machine made of files: tracefs is a folder, the trace pipe is a FIFO."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import ssl
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dm_remap import credentials
from dm_remap.daemon import Daemon
from dm_remap.events import Origin
from dm_remap.inventory import Guarded, Kept
from dm_remap.probing import DeviceState
from dm_remap.settings import Settings
from dm_remap.tracing import TraceInstance

ORIGIN = Origin("db1", uuid.UUID(int=7), "boot-a")
TARGET = Guarded("data", uuid.UUID(int=1), "8:16", "8:16", 0, 8192, ((0, 8192),), True, Kept(3))
FORMS = {
    "block_rq_error": '"%d,%d %s (%s) %llu + %u [%d]"',
    "block_bio_complete": '"%d,%d %s %llu + %u [%d]"',
}


def make_tracefs(root: Path) -> None:
    """Make a folder that looks like tracefs with the daemon's instance in it, once."""
    if root.exists():
        return
    (root / "events" / "block").mkdir(parents=True)
    instance = root / "instances" / "dm_remap"
    for event, form in FORMS.items():
        folder = instance / "events" / "block" / event
        folder.mkdir(parents=True)
        (folder / "format").write_text(f"\tfield:int error;\n\nprint fmt: {form}, REC->dev\n")
        (folder / "enable").write_text("0\n")
        (folder / "filter").write_text("none\n")
    (instance / "tracing_on").write_text("0\n")
    (instance / "buffer_size_kb").write_text("7\n")
    (instance / "buffer_percent").write_text("50\n")
    (instance / "per_cpu" / "cpu0").mkdir(parents=True)
    (instance / "per_cpu" / "cpu0" / "stats").write_text("overrun: 0\ndropped events: 0\n")
    os.mkfifo(instance / "trace_pipe")


class FakeDisk:
    """A disk whose bad sectors fail, and which can be made to hang."""

    sectors = 8192

    def __init__(self) -> None:
        self.bad: set[int] = set()
        self.answering = threading.Event()
        self.answering.set()

    def read(self, sector: int, count: int) -> bytes:
        self.answering.wait()
        if self.bad & set(range(sector, sector + count)):
            raise OSError(errno.EIO, "bad")
        return bytes(512 * count)


class FakeHost:
    """The machine, as the daemon sees it."""

    def __init__(self) -> None:
        self.disk = FakeDisk()
        self.guarded = [TARGET]
        self.trouble: Exception | None = None

    def targets(self) -> list[Guarded]:
        if self.trouble is not None:
            raise self.trouble
        return self.guarded

    def state(self, devno: str) -> DeviceState:
        return DeviceState.LIVE

    def open_main(self, devno: str) -> tuple[FakeDisk, int]:
        return self.disk, 1

    def name(self, devno: str) -> str:
        return "sdb"

    def files(self, target: str, lost: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        start, count = lost[0]
        return [{"start": start, "count": count, "kind": "file", "path": f"/{target}/letter"}]


class Scene:
    """Files, a host and, inside `running`, a daemon with its HTTP interface."""

    def __init__(self, root: Path) -> None:
        self.root = root
        make_tracefs(root / "tracing")
        self.pipe_path = root / "tracing" / "instances" / "dm_remap" / "trace_pipe"
        # An open write end keeps the FIFO from reporting its end, as tracefs never does.
        self._keep = os.open(self.pipe_path, os.O_RDWR)
        self.settings = Settings(
            host="db1",
            port=0,
            certificate=str(root / "tls" / "server.crt"),
            key=str(root / "tls" / "server.key"),
            token_file=str(root / "token"),
            state_directory=str(root / "state"),
            probe_seconds=0.05,
            burst_seconds=0.0,
        )
        credentials.make(self.settings, ["localhost", "127.0.0.1"])
        self.token = Path(self.settings.token_file).read_text().strip()
        self.ca_file = credentials.authority_path(self.settings)
        self.host = FakeHost()

    def close(self) -> None:
        self.host.disk.answering.set()
        os.close(self._keep)

    def trace(self, *lines: str) -> None:
        """Let the kernel print lines."""
        os.write(self._keep, "".join(line + "\n" for line in lines).encode())

    def overrun(self, total: int) -> None:
        """Let the kernel have overwritten entries."""
        stats = self.root / "tracing" / "instances" / "dm_remap" / "per_cpu" / "cpu0" / "stats"
        stats.write_text(f"overrun: {total}\ndropped events: 0\n")
        self.trace(f"CPU:0 [LOST {total} EVENTS]")

    def fail_read(self, sector: int, count: int = 1, *, bad: bool = True, devno: str = "8,16"):
        """Let a read fail, because of bad sectors or for no reason that lasts."""
        if bad:
            self.host.disk.bad |= set(range(sector, sector + count))
        self.trace(f"  x-1 [0] .. 1.2: block_rq_error: {devno} R () {sector} + {count} [-5]")

    @contextlib.asynccontextmanager
    async def running(self, settings: Settings | None = None):
        """Run a daemon and yield it."""
        daemon = Daemon(
            settings or self.settings,
            ORIGIN,
            TraceInstance(str(self.root / "tracing")),
            self.host,
            healer_socket=str(self.root / "healer.sock"),
        )
        stop, ready = asyncio.Event(), asyncio.Event()
        task = asyncio.ensure_future(daemon.run(stop, ready.set))
        waiting = asyncio.ensure_future(ready.wait())
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if task.done():
            task.result()
        try:
            yield daemon
        finally:
            stop.set()
            await task

    async def next_event(self, daemon: Daemon, kind: str, after: int = 0) -> dict:
        """Wait for the next event of a type."""
        while True:
            page = await daemon.page(after, 100, 30)
            for event in page.events:
                if event["type"] == kind:
                    return event
            assert page.events, f"no {kind} came in 30 seconds"
            after = page.cursor

    async def get(self, daemon: Daemon, path: str, token: str | None = "", tls=None):
        """Ask the daemon over HTTPS; returns the status and the text."""
        import aiohttp

        context = tls or ssl.create_default_context(cafile=self.ca_file)
        shown = self.token if token == "" else token
        headers = {} if shown is None else {"Authorization": f"Bearer {shown}"}
        async with aiohttp.ClientSession() as session:
            url = f"https://localhost:{daemon.port}{path}"
            async with session.get(url, ssl=context, headers=headers) as response:
                return response.status, await response.text()

    async def get_json(self, daemon: Daemon, path: str):
        """Ask and parse the answer."""
        return json.loads((await self.get(daemon, path))[1])
