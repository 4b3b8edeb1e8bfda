# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The daemon's HTTP interface: events by cursor, health, metrics. `docs/daemon.md` describes it."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import socket
import ssl
import weakref
from typing import Any, Protocol

from .errors import DmRemapError
from .journal import Page
from .settings import Settings, check_key

MAX_WAIT_SECONDS = 60
MAX_EVENTS = 1000
# Far below what the service may open (LimitNOFILE), which the daemon needs for disks and tracefs.
MAX_CONNECTIONS = 64

_HANDSHAKE_SECONDS = 5.0
# A connection that has not shown the token by then makes room for others.
_TOKEN_SECONDS = 10
_ACCEPT_RETRY_SECONDS = 1.0

log = logging.getLogger("dm-remapd")


class Source(Protocol):
    """What the interface shows."""

    journal_id: str

    async def page(self, after: int, limit: int, wait: float) -> Page:
        """Return events after a cursor, waiting up to `wait` seconds for the first one.

        Raises:
            DmRemapError: the journal cannot be read.
        """

    def health(self) -> dict[str, Any]:
        """Return the state; `status` is `ok` when errors are seen and explained."""


class Server:
    """Serves over TLS to whoever shows the token.

    Args:
        source: what is shown.
        settings: address, port and certificate.
        token: the bearer token.
    """

    def __init__(self, source: Source, settings: Settings, token: str) -> None:
        self._source = source
        self._settings = settings
        self._token = token.encode("ascii")
        self._runner: Any = None
        self._tls: Any = None
        self._listeners: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._handshakes = 0
        self._trusted: weakref.WeakSet[Any] = weakref.WeakSet()
        self.port = settings.port

    async def start(self) -> None:
        """Listen.

        Raises:
            DmRemapError: the certificate or the address cannot be used.
        """
        from aiohttp import web

        self._tls = self._context()
        application = web.Application(middlewares=[self._guard()], client_max_size=1024)
        application.router.add_get("/v1/events", self._events)
        application.router.add_get("/v1/health", self._health)
        application.router.add_get("/metrics", self._metrics)
        # Without an access log no request's details can reach a log.
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        try:
            await self._listen()
        except OSError as error:
            await self.stop()
            raise DmRemapError(
                f"cannot listen: {error.strerror}",
                device=f"{self._settings.address} port {self._settings.port}",
                remedy="choose another address or port in daemon.json",
            ) from error
        self.port = self._listeners[0].getsockname()[1]
        for listener in self._listeners:
            self._begin(self._accept(listener))

    async def stop(self) -> None:
        """Close all connections and stop listening."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _listen(self) -> None:
        found = await asyncio.get_running_loop().getaddrinfo(
            self._settings.address,
            self._settings.port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE,
        )
        for family, address in dict.fromkeys((item[0], item[4]) for item in found):
            listener = socket.socket(family, socket.SOCK_STREAM)
            self._listeners.append(listener)
            listener.setblocking(False)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
            listener.listen()

    # asyncio's own server knows no limit, and a client needs no token to hold a connection.
    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                link, _unused = await loop.sock_accept(listener)
            except OSError as error:
                log.error("a connection cannot be accepted: %s", error.strerror)
                await asyncio.sleep(_ACCEPT_RETRY_SECONDS)
                continue
            if self._handshakes + len(self._runner.server.connections) < MAX_CONNECTIONS:
                self._handshakes += 1
                self._begin(self._greet(link))
            else:
                link.close()

    async def _greet(self, link: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            transport, _unused = await loop.connect_accepted_socket(
                self._runner.server,
                link,
                ssl=self._tls,
                ssl_handshake_timeout=_HANDSHAKE_SECONDS,
            )
        except (OSError, asyncio.TimeoutError):
            return
        finally:
            self._handshakes -= 1
        for _unused in range(_TOKEN_SECONDS):
            await asyncio.sleep(1)
            if transport in self._trusted or transport.is_closing():
                return
        transport.abort()

    def _begin(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _context(self) -> ssl.SSLContext:
        check_key(self._settings)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self._settings.certificate, self._settings.key)
        except (OSError, ssl.SSLError) as error:
            raise DmRemapError(
                f"cannot be used as certificate: {error}",
                device=self._settings.certificate,
                remedy=self._settings.remedy,
            ) from error
        return context

    def _guard(self) -> Any:
        from aiohttp import web

        @web.middleware
        async def guard(request: Any, handler: Any) -> Any:
            scheme, _unused, shown = request.headers.get("Authorization", "").partition(" ")
            given = shown.strip().encode("utf-8", "surrogateescape")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given, self._token):
                return web.json_response(
                    {"error": "a valid bearer token is needed"},
                    status=401,
                    headers={"WWW-Authenticate": "Bearer"},
                )
            if request.transport is not None:
                self._trusted.add(request.transport)
            response = await handler(request)
            response.headers["Cache-Control"] = "no-store"
            return response

        return guard

    async def _events(self, request: Any) -> Any:
        from aiohttp import web

        try:
            after = _number(request, "after", 0, 0, 2**62)
            limit = _number(request, "limit", 100, 1, MAX_EVENTS)
            wait = _number(request, "wait", 0, 0, MAX_WAIT_SECONDS)
        except ValueError as error:
            return web.json_response({"error": str(error)}, status=400)
        try:
            page = await self._source.page(after, limit, wait)
        except DmRemapError as error:
            return web.json_response({"error": str(error)}, status=503)
        return web.json_response(
            {
                "journal": self._source.journal_id,
                "host": self._settings.host,
                "cursor": page.cursor,
                "oldest": page.oldest,
                "newest": page.newest,
                "events": list(page.events),
            },
            dumps=_dumps,
        )

    async def _health(self, request: Any) -> Any:
        from aiohttp import web

        health = self._source.health()
        status = 200 if health["status"] == "ok" else 503
        return web.json_response(health, status=status, dumps=_dumps)

    async def _metrics(self, request: Any) -> Any:
        from aiohttp import web

        text, content_type = metrics(self._source.health())
        return web.Response(body=text, headers={"Content-Type": content_type})


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _number(request: Any, name: str, default: int, low: int, high: int) -> int:
    text = request.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and low <= int(text[:20]) <= high):
        raise ValueError(f"{name} must be a number from {low} to {high}")
    return int(text)


_COUNTERS = {
    "errors": "Failed requests of disks seen, readahead left out",
    "bios": "Failed requests of stacked devices seen, those on top of disks included",
    "overruns": "Trace entries that the kernel dropped",
    "merged": "Failed requests that told nothing new",
    "healed": "Healings of held I/O that moved chunks to a spare",
    "lost_sectors": "Sectors that these could not read by any means",
    "failed": "Healings of held I/O that failed, so that the I/O failed too",
}
_GAUGES = {
    "waiting": "Failed requests, identical ones as one, that no event explains yet",
    "newest": "Number of the newest event",
    "targets": "Targets that are watched",
}


def metrics(health: dict[str, Any]) -> tuple[bytes, str]:
    """Return the health as Prometheus metrics, and their content type."""
    from prometheus_client import CollectorRegistry, Gauge
    from prometheus_client.core import CounterMetricFamily
    from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

    class Counts:
        def collect(self) -> Any:
            for name, text in _COUNTERS.items():
                family = CounterMetricFamily(f"dm_remapd_{name}", text)
                family.add_metric([], health[name])
                yield family
            family = CounterMetricFamily("dm_remapd_events", "Events written", labels=["type"])
            for kind, count in health["events"].items():
                family.add_metric([kind], count)
            yield family

    registry = CollectorRegistry()
    registry.register(Counts())  # type: ignore[arg-type,unused-ignore]
    up = Gauge("dm_remapd_ok", "1 when errors are seen and explained", registry=registry)
    up.set(1 if health["status"] == "ok" else 0)
    for name, text in _GAUGES.items():
        Gauge(f"dm_remapd_{name}", text, registry=registry).set(health[name])
    return generate_latest(registry), CONTENT_TYPE_LATEST
