"""The transports in the matrix: the package's own, and third-party ones."""

import asyncio
import contextlib
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import hishel
import hishel.httpx
import httpx
import httpx2
import httpx_aiohttp
import httpx_curl_cffi
import httpx_retries
import httpx_socks
import pyreqwest.client
import pyreqwest.compatibility.httpx
import pytest_httpx
import respx
import vcr
from opentelemetry.instrumentation.httpx import AsyncOpenTelemetryTransport
from pytest_httpx._options import _HTTPXMockOptions

from lemcal_async.sandbox import Sandbox
from lemcal_async.transport import PooledTransport
from lemcal_async.transport.aiohttp import AiohttpTransport
from lemcal_async.transport.httpx2 import HTTPX2Transport

Wire: TypeAlias = httpx.AsyncBaseTransport | httpx2.AsyncBaseTransport
Open: TypeAlias = Callable[[Sandbox], AbstractAsyncContextManager[Any]]


@attrs.frozen
class Transport:
    """A row of the table; ``fails`` names its known failures, and ``note`` explains them."""

    name: str
    open: Open
    note: str = ""
    fails: frozenset[str] = frozenset()
    has_network: bool = True  # False: in-process, so there are no connections to break
    has_trio: bool = True


def opener(make: Callable[[], Wire]) -> Open:
    """Return a context manager that creates a transport and closes it on exit."""

    @contextlib.asynccontextmanager
    async def open_wire(_: Sandbox) -> AsyncIterator[Wire]:
        wire = make()
        try:
            yield wire
        finally:
            await wire.aclose()

    return open_wire


@contextlib.asynccontextmanager
async def cached(_: Sandbox) -> AsyncIterator[Wire]:
    """Hishel with its default settings."""
    with tempfile.TemporaryDirectory() as folder:
        storage = hishel.AsyncSqliteStorage(database_path=Path(folder) / "cache.db")
        wire = hishel.httpx.AsyncCacheTransport(httpx.AsyncHTTPTransport(), storage)
        try:
            yield wire
        finally:
            await wire.aclose()


@contextlib.asynccontextmanager
async def through_socks(_: Sandbox) -> AsyncIterator[Wire]:
    """httpx-socks, with a local proxy in front of the sandbox."""
    async with socks_proxy() as port:
        wire = httpx_socks.AsyncProxyTransport.from_url(f"socks5://127.0.0.1:{port}")
        try:
            yield wire
        finally:
            await wire.aclose()


@contextlib.asynccontextmanager
async def socks_proxy() -> AsyncIterator[int]:
    """Run a SOCKS5 proxy in a thread, so that it serves either backend; yield its port."""
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    ports: list[int] = []
    stopped = asyncio.Event()

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        if reader.exception() is None:
            writer.close()
        else:
            writer.transport.abort()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Before 3.12, asyncio logs a handler that ends canceled as an error.
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            methods = (await reader.readexactly(2))[1]
            await reader.readexactly(methods)
            writer.write(b"\x05\x00")
            request = await reader.readexactly(4 + 4 + 2)  # CONNECT to an IPv4 address
            host, port = ".".join(map(str, request[4:8])), int.from_bytes(request[8:])
            try:
                upstream = await asyncio.open_connection(host, port)
            except OSError:
                writer.write(b"\x05\x05\x00\x01" + bytes(6))
                writer.close()
                return
            writer.write(b"\x05\x00\x00\x01" + bytes(6))
            await asyncio.gather(pipe(reader, upstream[1]), pipe(upstream[0], writer))

    async def serve() -> None:
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        ready.set()
        await stopped.wait()
        server.close()
        tunnels = asyncio.all_tasks() - {asyncio.current_task()}
        for tunnel in tunnels:
            tunnel.cancel()
        await asyncio.gather(*tunnels, return_exceptions=True)

    thread = threading.Thread(target=lambda: asyncio.Runner(loop_factory=lambda: loop).run(serve()))
    thread.start()
    ready.wait()
    try:
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join()


@contextlib.asynccontextmanager
async def in_process(sandbox: Sandbox) -> AsyncIterator[Wire]:
    """Httpx's ASGITransport."""
    yield httpx.ASGITransport(app=sandbox)


def sandbox_handler(sandbox: Sandbox) -> Callable[[httpx.Request], Any]:
    """Return a handler for mocking libraries that forwards requests to the sandbox."""
    inner = httpx.ASGITransport(app=sandbox)

    async def handler(request: httpx.Request) -> httpx.Response:
        response = await inner.handle_async_request(request)
        body = httpx.ByteStream(b"".join([part async for part in response.stream]))  # type: ignore[union-attr]
        return httpx.Response(response.status_code, headers=response.headers.raw, stream=body)

    return handler


@contextlib.asynccontextmanager
async def mocked(sandbox: Sandbox) -> AsyncIterator[Wire]:
    """Httpx's MockTransport."""
    yield httpx.MockTransport(sandbox_handler(sandbox))


@contextlib.asynccontextmanager
async def with_respx(sandbox: Sandbox) -> AsyncIterator[Wire]:
    """A respx router."""
    router = respx.Router(assert_all_called=False)
    router.route().mock(side_effect=sandbox_handler(sandbox))
    yield httpx.MockTransport(router.async_handler)


@contextlib.asynccontextmanager
async def with_pytest_httpx(sandbox: Sandbox) -> AsyncIterator[Wire]:
    """Patch httpx's own transport as pytest-httpx's fixture does."""
    mock = pytest_httpx.HTTPXMock(_HTTPXMockOptions())
    mock.add_callback(sandbox_handler(sandbox), is_reusable=True)
    wire = httpx.AsyncHTTPTransport()
    wire.handle_async_request = lambda request: mock._handle_async_request(wire, request)  # type: ignore[method-assign]
    try:
        yield wire
    finally:
        await wire.aclose()


@contextlib.asynccontextmanager
async def recorded(_: Sandbox) -> AsyncIterator[Wire]:
    """Record with vcrpy, which patches httpcore's connection pool."""
    with (
        tempfile.TemporaryDirectory() as folder,
        vcr.use_cassette(str(Path(folder) / "cassette.yaml"), record_mode="all"),
    ):
        wire = httpx.AsyncHTTPTransport()
        try:
            yield wire
        finally:
            await wire.aclose()


def without_redirects() -> Wire:
    """Return pyreqwest's transport; its client follows redirects by default."""
    client = pyreqwest.client.ClientBuilder().follow_redirects(False).build()  # noqa: FBT003 - its API
    wire: Wire = pyreqwest.compatibility.httpx.HttpxTransport(client)
    return wire


NOT_INTERCEPTED = (
    "It does not intercept this package's transports: pass `transport=httpx.AsyncHTTPTransport()` "
    "to the client in such tests."
)

TRANSPORTS = [
    Transport("`PooledTransport` (the default)", opener(PooledTransport)),
    Transport("`HTTPX2Transport`", opener(HTTPX2Transport)),
    Transport("`AiohttpTransport`", opener(AiohttpTransport), "asyncio only", has_trio=False),
    Transport("`httpx.AsyncHTTPTransport`", opener(httpx.AsyncHTTPTransport)),
    Transport("`httpx2.AsyncHTTPTransport`", opener(httpx2.AsyncHTTPTransport)),
    Transport(
        "httpx-aiohttp",
        opener(httpx_aiohttp.AiohttpTransport),
        "asyncio only. It cannot prove that nothing was sent, so a POST that could not connect is not "
        "retried. `AiohttpTransport` can.",
        has_trio=False,
    ),
    Transport(
        "pyreqwest",
        opener(without_redirects),
        "asyncio only. Build its client with `follow_redirects(False)`. When canceled, it raises its own "
        "`CancelledError`, which ends the task instead of the scope: use `timeout=`, not "
        "`deadline=` or `move_on_after`.",
        frozenset({"`deadline=`", "no secrets in errors"}),
        has_trio=False,
    ),
    Transport(
        "httpx-curl-cffi",
        opener(httpx_curl_cffi.AsyncCurlTransport),
        "asyncio only. It always follows redirects, and this cannot be turned off: a response may come "
        "from another route.",
        frozenset({"redirects are errors"}),
        has_trio=False,
    ),
    Transport(
        "hishel",
        cached,
        "**Do not use it.** Its cache key ignores the credentials, so one account receives another "
        "account's data. Cached responses also differ from lemcal's current ones.",
        frozenset(
            {"accounts are isolated", "no 429, fixed window", "no 429, sliding window", "429 is retried"}
        ),
    ),
    Transport(
        "httpx-retries",
        opener(lambda: httpx_retries.RetryTransport(httpx.AsyncHTTPTransport())),
        "**Do not use it.** It retries below the limiter, which then counts too few requests. The "
        "client already retries.",
        frozenset({"429 is retried", "every request is counted", "`timeout=`"}),
    ),
    Transport(
        "OpenTelemetry's `AsyncOpenTelemetryTransport`",
        opener(lambda: AsyncOpenTelemetryTransport(httpx.AsyncHTTPTransport())),
        "Its instrumentor patches only httpx's own transport, and so does Sentry's. With this package's "
        "transports, use [`otel.instrument()`](observability.md).",
    ),
    Transport("httpx-socks", through_socks),
    Transport("`httpx.ASGITransport`", in_process, has_network=False),
    Transport("`httpx.MockTransport`", mocked, has_network=False),
    Transport("respx", with_respx, NOT_INTERCEPTED, has_network=False),
    Transport("pytest-httpx", with_pytest_httpx, NOT_INTERCEPTED, has_network=False),
    Transport("vcrpy", recorded, NOT_INTERCEPTED),
]
