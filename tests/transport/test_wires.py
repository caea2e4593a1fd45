"""The wires: which connection a request uses, and when connections are reused or closed."""

import asyncio
import gc
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import httpx
import httpx2
import pytest
import trustme

from lemcal_async import AsyncLemcal
from lemcal_async.errors import ConfigurationError
from lemcal_async.sandbox import Sandbox, faults
from lemcal_async.transport import PooledTransport, _environment, _http11, _pooled
from lemcal_async.transport.aiohttp import AiohttpTransport
from lemcal_async.transport.httpx2 import HTTPX2Transport

from .conftest import MakeWire
from .loopback import Loopback, ReceivedRequest


@pytest.fixture
def server() -> Iterator[Loopback]:
    """Serve plain HTTP."""
    with Loopback() as server:
        yield server


async def get(transport: httpx.AsyncBaseTransport, url: str, pool_timeout: float = 5.0) -> int:
    """Send a GET, and return the number of its connection."""
    timeout = httpx.Timeout(5.0, pool=pool_timeout).as_dict()
    response = await transport.handle_async_request(
        httpx.Request("GET", url, extensions={"timeout": timeout})
    )
    await response.aread()
    await response.aclose()
    return int(response.headers["x-connection"])


async def settled(server: Loopback, *, at_most: int) -> int:
    """Wait until the server has at most this many connections; return their number."""
    return await anyio.to_thread.run_sync(lambda: server.settled(at_most=at_most))


async def together(*calls: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Await the calls concurrently."""
    async with anyio.create_task_group() as group:
        for call in calls:
            group.start_soon(call)


@pytest.mark.anyio
async def test_sequential_requests_share_a_connection(make_wire: MakeWire, server: Loopback) -> None:
    """Five requests use the same connection."""
    async with make_wire() as transport:
        assert [1] * 5 == [await get(transport, server.url) for _ in range(5)]


@pytest.mark.anyio
async def test_most_recently_used_connection_is_reused(make_wire: MakeWire, server: Loopback) -> None:
    """Surplus connections can then expire."""
    async with make_wire() as transport:
        used: list[int] = []

        async def slow(seconds: float) -> None:
            used.append(await get(transport, f"{server.url}/sleep/{seconds}"))

        await together(lambda: slow(0.15), lambda: slow(0.05), lambda: slow(0.1))
        assert 3 == len(set(used))
        assert [used[-1]] * 4 == [await get(transport, server.url) for _ in range(4)]


@pytest.mark.anyio
async def test_origins_do_not_share_connections(make_wire: MakeWire) -> None:
    """A connection serves one scheme, host and port."""
    with Loopback() as one, Loopback() as other:
        async with make_wire() as transport:
            for _ in range(2):
                await get(transport, one.url)
                await get(transport, other.url)
        assert ([1, 1], [1, 1]) == (one.connections, other.connections)


@pytest.mark.anyio
async def test_max_connections(make_wire: MakeWire, server: Loopback) -> None:
    """The limit holds with many concurrent requests."""
    async with make_wire(max_connections=3) as transport:
        await together(*[lambda: get(transport, f"{server.url}/sleep/0.01")] * 30)
        assert {1, 2, 3} == set(server.connections)
    assert 30 == len(server.requests)
    assert (3, 3) == (server.max_open, server.max_busy)


@pytest.mark.anyio
async def test_pool_timeout_of_a_plain_client(make_wire: MakeWire, server: Loopback) -> None:
    """It limits the wait for a connection, and leaks no slot."""
    async with make_wire(max_connections=1) as transport, anyio.create_task_group() as group:
        group.start_soon(get, transport, f"{server.url}/hold")
        await anyio.to_thread.run_sync(server.arrived.acquire)
        with pytest.raises(httpx.PoolTimeout, match=r"no connection became available within 0\.01 s"):
            await get(transport, server.url, pool_timeout=0.01)
        server.release()
    assert [1] == server.connections


@pytest.mark.anyio
async def test_calls_of_an_account_wait_for_a_connection(make_wire: MakeWire, server: Loopback) -> None:
    """The pool timeout does not apply to them, because thousands may wait."""
    async with make_wire(max_connections=1) as transport:
        lemcal = AsyncLemcal(
            "usr_x", "secret", base_url=server.url, transport=transport, timeout=httpx.Timeout(5, pool=0.01)
        )
        await together(*[lambda: lemcal.request("GET", "/sleep/0.05")] * 3)
    assert [1, 1, 1] == server.connections


@pytest.mark.parametrize("anyio_backend", ["trio"])
@pytest.mark.anyio
async def test_aiohttp_on_trio(server: Loopback) -> None:
    """The error says what to use instead, and nothing is sent."""
    async with AiohttpTransport() as transport:
        with pytest.raises(ConfigurationError, match="asyncio only; on trio use PooledTransport"):
            await get(transport, server.url)
    assert [] == server.requests


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_connections", 0),
        ("max_connections", -1),
        ("max_connections", 2.5),
        ("max_connections", "9"),
        ("keepalive", -1),
        ("keepalive", "x"),
        ("keepalive", None),
        ("ssl_context", 5),
        ("ssl_context", True),
    ],
)
def test_invalid_options(make_wire: MakeWire, name: str, value: Any) -> None:
    """The constructor raises an error that names the argument and its value."""
    with pytest.raises(ConfigurationError, match=f"^{name}={value!r}: it must be "):
        make_wire(**{name: value})


@pytest.mark.parametrize("path", ["/cut", "/sleep/60"])
@pytest.mark.anyio
async def test_failed_connection_is_closed(make_wire: MakeWire, server: Loopback, path: str) -> None:
    """Its slot is available to the next request."""
    transport = make_wire(max_connections=1)
    async with httpx.AsyncClient(transport=transport, timeout=0.2) as client:
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadTimeout)):
            await client.get(server.url + path)
        assert 0 == await settled(server, at_most=0)
        assert "2" == (await client.get(server.url)).headers["x-connection"]


@pytest.mark.parametrize("fault", [faults.reset_before_processing(), faults.truncated()])
@pytest.mark.anyio
async def test_requests_work_after_a_fault(make_wire: MakeWire, fault: faults.Fault) -> None:
    """The request after a fault succeeds."""
    with Sandbox(limit=None).serve() as sandbox:
        async with httpx.AsyncClient(transport=make_wire(max_connections=1)) as client:
            for _ in range(2):
                sandbox.inject(fault)
                with pytest.raises(httpx.TransportError):
                    await client.get(f"{sandbox.base_url}/me")
                assert 401 == (await client.get(f"{sandbox.base_url}/me")).status_code


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/", "127.0.0.1/", "unix:/tmp/socket"])
@pytest.mark.anyio
async def test_unsupported_protocols(make_wire: MakeWire, url: str) -> None:
    """They raise, and leak no slot."""
    async with make_wire(max_connections=1) as transport:
        for _ in range(2):
            with anyio.fail_after(5), pytest.raises(httpx.UnsupportedProtocol, match="http://"):
                await get(transport, url)


@pytest.mark.anyio
async def test_connection_refused(make_wire: MakeWire) -> None:
    """The slot is released."""
    with Loopback() as server:
        pass
    async with make_wire(max_connections=1) as transport:
        for _ in range(2):
            with anyio.fail_after(5), pytest.raises(httpx.ConnectError):
                await get(transport, server.url)


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.anyio
async def test_idle_connection_closed_by_the_server(
    make_wire: MakeWire, server: Loopback, method: str
) -> None:
    """The next request uses a new connection, whatever its method."""
    async with httpx.AsyncClient(transport=make_wire()) as client:
        for _ in range(3):
            assert 200 == (await client.request(method, f"{server.url}/drop")).status_code
            assert 0 == await settled(server, at_most=0)
        await client.get(server.url)
        server.drop_connections()
        assert 0 == await settled(server, at_most=0)
        assert 200 == (await client.request(method, server.url)).status_code
    assert [1, 2, 3, 4, 5] == server.connections


@pytest.mark.anyio
async def test_stale_connections_are_closed(
    make_wire: MakeWire, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are closed after ``keepalive`` seconds, at the next use; others stay open."""
    now = 1000.0
    monkeypatch.setattr(_pooled, "time", SimpleNamespace(monotonic=lambda: now))
    async with make_wire(keepalive=60) as transport:
        await together(*[lambda: get(transport, f"{server.url}/sleep/0.05")] * 3)
        assert 3 == server.open
        now += 40
        last = await get(transport, server.url)
        assert 3 == server.open
        now += 30
        assert last == await get(transport, server.url)
        assert 1 == await settled(server, at_most=1)


@pytest.mark.anyio
async def test_stale_connection_is_not_reused(
    make_wire: MakeWire, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device in between may have dropped it."""
    now = 1000.0
    monkeypatch.setattr(_pooled, "time", SimpleNamespace(monotonic=lambda: now))
    async with make_wire(keepalive=60) as transport:
        await get(transport, server.url)
        now += 61
        assert 2 == await get(transport, server.url)
        assert 1 == await settled(server, at_most=1)


class KeepAliveServer(Loopback):
    """Announces in ``Keep-Alive`` for how long it keeps idle connections open: ``/5`` for five seconds."""

    async def respond(
        self, request: ReceivedRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Write the response."""
        seconds = request.target.strip("/").encode()
        writer.write(b"HTTP/1.1 200 OK\r\nKeep-Alive: max=100, timeout=%b\r\n" % seconds)
        writer.write(b"X-Connection: %d\r\nContent-Length: 0\r\n\r\n" % request.connection)


@pytest.mark.parametrize("make_wire", [PooledTransport, HTTPX2Transport])
@pytest.mark.anyio
async def test_connection_that_the_server_is_about_to_close(
    make_wire: MakeWire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not reused: a POST sent during the close may or may not be processed."""
    now = 1000.0
    monkeypatch.setattr(_http11, "time", SimpleNamespace(monotonic=lambda: now))
    with KeepAliveServer() as server:
        async with make_wire() as transport:
            assert 1 == await get(transport, f"{server.url}/5")
            now += 3
            assert 1 == await get(transport, f"{server.url}/5")
            now += 4.5
            assert 2 == await get(transport, f"{server.url}/never")
            now += 50
            assert 2 == await get(transport, f"{server.url}/1")
            assert 3 == await get(transport, f"{server.url}/5")
            assert 1 == await settled(server, at_most=1)


@pytest.mark.anyio
async def test_stale_connections_to_other_origins_are_closed(
    make_wire: MakeWire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any request through the transport closes them."""
    now = 1000.0
    monkeypatch.setattr(_pooled, "time", SimpleNamespace(monotonic=lambda: now))
    with Loopback() as one, Loopback() as other:
        async with make_wire(keepalive=60) as transport:
            await get(transport, one.url)
            now += 61
            await get(transport, other.url)
            assert 0 == await settled(one, at_most=0)


@pytest.mark.anyio
async def test_closing_closes_idle_connections(make_wire: MakeWire, server: Loopback) -> None:
    """They are closed immediately; closing again does nothing."""
    transport = make_wire()
    await together(*[lambda: get(transport, f"{server.url}/sleep/0.02")] * 3)
    await transport.aclose()
    assert 0 == await settled(server, at_most=0)
    await transport.aclose()


@pytest.mark.anyio
async def test_closing_an_unused_transport(make_wire: MakeWire, server: Loopback) -> None:
    """The transport cannot be used afterward."""
    transport = make_wire()
    await transport.aclose()
    await transport.aclose()
    with pytest.raises(ConfigurationError, match="this transport is closed"):
        await get(transport, f"{server.url}/")
    assert not server.connections


@pytest.mark.anyio
async def test_closing_lets_requests_finish(make_wire: MakeWire, server: Loopback) -> None:
    """Requests in flight or waiting complete, and then their connections are closed."""
    transport = make_wire(max_connections=1)
    done: list[int] = []

    async def hold() -> None:
        done.append(await get(transport, f"{server.url}/hold"))

    async with anyio.create_task_group() as group:
        group.start_soon(hold)
        group.start_soon(hold)
        await anyio.to_thread.run_sync(server.arrived.acquire)
        await transport.aclose()
        assert (1, []) == (server.open, done)
        with pytest.raises(ConfigurationError, match="closed"):
            await get(transport, server.url)
        server.release()
    assert [1, 2] == done
    assert 0 == await settled(server, at_most=0)


@pytest.mark.anyio
async def test_use_after_closing(make_wire: MakeWire, server: Loopback) -> None:
    """Requests raise, whether or not the transport was used before."""
    for used in (True, False):
        transport = make_wire()
        if used:
            await get(transport, server.url)
        await transport.aclose()
        with pytest.raises(ConfigurationError, match="this transport is closed; create a new one"):
            await get(transport, server.url)
    assert 1 == len(server.requests)


@pytest.mark.anyio
async def test_streaming_in_a_plain_client(make_wire: MakeWire, server: Loopback) -> None:
    """The body arrives in parts, and after its end, the connection is reused."""
    async with httpx.AsyncClient(transport=make_wire(max_connections=1)) as client:
        for _ in range(2):
            async with client.stream("GET", f"{server.url}/gzip/9000") as response:
                assert 9000 == sum([len(part) async for part in response.aiter_bytes()])
    assert [1, 1] == server.connections


@pytest.mark.anyio
async def test_open_stream_occupies_its_connection(make_wire: MakeWire, server: Loopback) -> None:
    """Once it is closed, the next request is sent."""
    async with httpx.AsyncClient(transport=make_wire(max_connections=1)) as client:
        async with client.stream("GET", server.url):
            with anyio.move_on_after(0.1) as scope:
                await client.get(server.url)
            assert scope.cancelled_caught
        with anyio.fail_after(5):
            await client.get(server.url)


@pytest.mark.anyio
async def test_stream_closed_early(make_wire: MakeWire, server: Loopback) -> None:
    """The rest of the body is not read: the connection is closed."""
    async with httpx.AsyncClient(transport=make_wire(max_connections=1)) as client:
        for path in ("/endless", "/gzip/9000"):
            async with client.stream("GET", server.url + path) as response:
                pass
            assert response.is_closed
            await response.aclose()
            assert 0 == await settled(server, at_most=0)
        assert "3" == (await client.get(server.url)).headers["x-connection"]


async def read_to_the_end(body: AsyncIterator[bytes]) -> None:
    """Read the rest of the body."""
    async for _ in body:
        pass


@pytest.mark.anyio
async def test_partly_read_stream(make_wire: MakeWire, server: Loopback) -> None:
    """Reading after closing raises, and no generator is left to the garbage collector."""
    async with make_wire(max_connections=1) as transport:
        response = await transport.handle_async_request(httpx.Request("GET", f"{server.url}/endless"))
        assert isinstance(response.stream, httpx.AsyncByteStream)
        body = aiter(response.stream)
        assert b"" != await anext(body)
        await response.aclose()
        await response.stream.aclose()  # again
        assert 0 == await settled(server, at_most=0)
        with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
            await read_to_the_end(body)
        del response, body
        gc.collect()
        assert 2 == await get(transport, server.url)


STREAMS: dict[MakeWire, str] = {
    PooledTransport: "lemcal_async.transport._http11.HTTP11Response.aclose",
    HTTPX2Transport: "lemcal_async.transport._http11.HTTP11Response.aclose",
    AiohttpTransport: "lemcal_async.transport.aiohttp._Stream.aclose",
}


@pytest.mark.anyio
async def test_stream_that_fails_to_close(
    make_wire: MakeWire, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slot is released anyway."""

    async def aclose(_: object) -> None:
        await anyio.lowlevel.checkpoint()
        raise ZeroDivisionError

    async with make_wire(max_connections=1) as transport:
        response = await transport.handle_async_request(httpx.Request("GET", server.url))
        await response.aread()
        with monkeypatch.context() as patch:
            patch.setattr(STREAMS[make_wire], aclose)
            response = await transport.handle_async_request(httpx.Request("GET", server.url))
            assert isinstance(response.stream, httpx.AsyncByteStream)
            assert b"{}" == b"".join([part async for part in response.stream])
            with pytest.raises(ZeroDivisionError):
                await response.stream.aclose()
        with anyio.fail_after(5):
            assert 2 == await get(transport, server.url)


@pytest.fixture
def garbage() -> Iterator[None]:
    """Collect the connections that a closed event loop leaves open.

    Only the garbage collector can still close them, with a warning.
    """
    yield
    gc.collect()


def backends_of(make_wire: MakeWire) -> list[str]:
    """Return the backends that a wire supports."""
    return ["asyncio"] if make_wire is AiohttpTransport else ["asyncio", "trio"]


@pytest.mark.usefixtures("garbage")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_sequential_event_loops(make_wire: MakeWire, server: Loopback) -> None:
    """A transport created before any event loop serves all of them, each with its own connections."""
    transport = make_wire(max_connections=1)

    async def twice() -> list[int]:
        return [await get(transport, server.url) for _ in range(2)]

    backends = backends_of(make_wire)
    for number, backend in enumerate(["asyncio", *backends], 1):
        assert [number, number] == anyio.run(twice, backend=backend)
    anyio.run(transport.aclose, backend=backends[-1])
    with pytest.raises(ConfigurationError, match="closed"):
        asyncio.run(twice())


@pytest.mark.usefixtures("garbage")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_concurrent_event_loops(make_wire: MakeWire, server: Loopback) -> None:
    """Event loops in several threads each have their own slots and connections."""
    transport = make_wire(max_connections=2)
    used: dict[int, set[int]] = {}
    barrier = threading.Barrier(4)
    backends = backends_of(make_wire)

    def run(number: int) -> None:
        async def many() -> None:
            async def one() -> None:
                used.setdefault(number, set()).add(await get(transport, f"{server.url}/sleep/0.002"))

            await together(*[one] * 40)

        barrier.wait()
        anyio.run(many, backend=backends[number % len(backends)])

    threads = [threading.Thread(target=run, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 160 == len(server.requests)
    assert [2, 2, 2, 2] == [len(connections) for connections in used.values()]
    assert 8 == len(set().union(*used.values()))


@pytest.mark.usefixtures("garbage")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_pools_of_closed_event_loops_are_removed(make_wire: MakeWire, server: Loopback) -> None:
    """Their connections are closed, too, so that many event loops leak nothing."""
    transport = make_wire()

    async def once() -> int:
        return await get(transport, server.url)

    backends = backends_of(make_wire)
    for number in range(1, 5):
        assert number == anyio.run(once, backend=backends[number % len(backends)])
        gc.collect()
        assert len(transport._pools) <= 1
        assert server.settled(at_most=1) <= 1


@pytest.fixture
def tls(authority: trustme.CA) -> Iterator[Loopback]:
    """Serve HTTPS, with a certificate of the test's own authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with Loopback(context) as server:
        yield server


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Make a certificate authority."""
    return trustme.CA()


@pytest.fixture
def fresh_contexts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Start without TLS contexts; return the names of the threads in which httpx and httpx2 create them."""
    threads: list[str] = []
    monkeypatch.setattr(_environment, "_contexts", {})
    for library in (httpx, httpx2):

        def counting(
            create: Callable[..., ssl.SSLContext] = library.create_ssl_context, **options: bool
        ) -> ssl.SSLContext:
            threads.append(threading.current_thread().name)
            return create(**options)

        monkeypatch.setattr(library, "create_ssl_context", counting)
    return threads


@pytest.mark.anyio
async def test_tls(
    make_wire: MakeWire, tls: Loopback, authority: trustme.CA, fresh_contexts: list[str]
) -> None:
    """The given context is used, and no other is created."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with make_wire(ssl_context=context) as transport:
        assert [1, 1] == [await get(transport, tls.url) for _ in range(2)]
    assert [] == fresh_contexts


@pytest.mark.anyio
async def test_untrusted_certificate(make_wire: MakeWire, tls: Loopback) -> None:
    """Nothing is sent, and a ConnectError gives the reason."""
    async with make_wire(max_connections=1) as transport:
        for _ in range(2):
            with anyio.fail_after(5), pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await get(transport, tls.url)
        assert 0 == await settled(tls, at_most=0)
    assert [] == tls.requests


class HangsUp(Loopback):
    """Closes the connection after the first byte."""

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()


@pytest.mark.parametrize("make_wire", [PooledTransport, HTTPX2Transport])
@pytest.mark.anyio
async def test_interrupted_handshake(make_wire: MakeWire) -> None:
    """The error has a message."""
    with HangsUp() as server:
        async with make_wire() as transport:
            with anyio.fail_after(5), pytest.raises(httpx.ConnectError, match=r"\w"):
                await get(transport, server.url.replace("http:", "https:"))


@pytest.mark.anyio
async def test_one_context_for_the_process(
    make_wire: MakeWire, tls: Loopback, fresh_contexts: list[str]
) -> None:
    """Reading the certificates takes 20 ms, so it happens once, in a thread."""
    for _ in range(2):
        async with make_wire() as transport:
            for _ in range(2):
                with pytest.raises(httpx.ConnectError):
                    await get(transport, tls.url)
    (thread,) = fresh_contexts
    assert threading.current_thread().name != thread


@pytest.mark.anyio
async def test_plain_http_reads_no_certificates(
    make_wire: MakeWire, server: Loopback, fresh_contexts: list[str]
) -> None:
    """No TLS context is created, not even by httpx for each connection."""
    async with make_wire() as transport:
        await together(*[lambda: get(transport, f"{server.url}/sleep/0.01")] * 3)
    assert [] == fresh_contexts


def test_context_requested_by_two_threads() -> None:
    """The second thread finds the first one's context."""
    contexts: list[ssl.SSLContext] = []

    def make(_: bool) -> ssl.SSLContext:  # noqa: FBT001 - called by position
        contexts.append(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        return contexts[-1]

    for _ in range(2):
        assert "" == _environment._make_once(make, trust_env=True)
    assert contexts == [_environment._contexts.pop((make, True))]


async def read(transport: httpx.AsyncBaseTransport, request: httpx.Request) -> None:
    """Send a request, and read the response."""
    response = await transport.handle_async_request(request)
    try:
        await response.aread()
    finally:
        await response.aclose()


@pytest.mark.anyio
async def test_exception_of_a_trace_callback(make_wire: MakeWire, server: Loopback) -> None:
    """It propagates unchanged, and the slot is released."""
    # The aiohttp transport reports only sending.
    event = "send_request_headers" if make_wire is AiohttpTransport else "receive_response_body"

    async def trace(name: str, _: object) -> None:
        if name == f"http11.{event}.started":
            raise ZeroDivisionError

    async with make_wire(max_connections=1) as transport:
        request = httpx.Request("GET", server.url, extensions={"trace": trace})
        with pytest.raises(ZeroDivisionError):
            await read(transport, request)
        with anyio.fail_after(5):
            assert 2 == await get(transport, server.url)
