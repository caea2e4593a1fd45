"""The wires: which connection a request gets, and what becomes of it afterward."""

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
from .loopback import Loopback, Seen


@pytest.fixture
def server() -> Iterator[Loopback]:
    """Serve plain HTTP."""
    with Loopback() as server:
        yield server


async def get(transport: httpx.AsyncBaseTransport, url: str, pool_timeout: float = 5.0) -> int:
    """Return the number of the connection that a GET is answered on."""
    timeout = httpx.Timeout(5.0, pool=pool_timeout).as_dict()
    response = await transport.handle_async_request(
        httpx.Request("GET", url, extensions={"timeout": timeout})
    )
    await response.aread()
    await response.aclose()
    return int(response.headers["x-connection"])


async def settled(server: Loopback, *, most: int) -> int:
    """Return how many connections the server has, once they are few enough."""
    return await anyio.to_thread.run_sync(lambda: server.settled(most=most))


async def together(*calls: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Await them all at once."""
    async with anyio.create_task_group() as group:
        for call in calls:
            group.start_soon(call)


@pytest.mark.anyio
async def test_one_after_another(make_wire: MakeWire, server: Loopback) -> None:
    """All over the same connection."""
    async with make_wire() as transport:
        assert [1] * 5 == [await get(transport, server.url) for _ in range(5)]


@pytest.mark.anyio
async def test_the_last_used_is_used_next(make_wire: MakeWire, server: Loopback) -> None:
    """So that those not needed age."""
    async with make_wire() as transport:
        used: list[int] = []

        async def slow(seconds: float) -> None:
            used.append(await get(transport, f"{server.url}/sleep/{seconds}"))

        await together(lambda: slow(0.15), lambda: slow(0.05), lambda: slow(0.1))
        assert 3 == len(set(used))
        assert [used[-1]] * 4 == [await get(transport, server.url) for _ in range(4)]


@pytest.mark.anyio
async def test_origins_do_not_share(make_wire: MakeWire) -> None:
    """A connection goes to one scheme, host and port."""
    with Loopback() as one, Loopback() as other:
        async with make_wire() as transport:
            for _ in range(2):
                await get(transport, one.url)
                await get(transport, other.url)
        assert ([1, 1], [1, 1]) == (one.connections, other.connections)


@pytest.mark.anyio
async def test_no_more_connections_than_allowed(make_wire: MakeWire, server: Loopback) -> None:
    """However many requests there are, at no moment."""
    async with make_wire(max_connections=3) as transport:
        await together(*[lambda: get(transport, f"{server.url}/sleep/0.01")] * 30)
        assert {1, 2, 3} == set(server.connections)
    assert 30 == len(server.seen)
    assert (3, 3) == (server.most_open, server.most_busy)


@pytest.mark.anyio
async def test_the_pool_timeout_of_a_plain_client(make_wire: MakeWire, server: Loopback) -> None:
    """It bounds the wait for a connection, and what waited takes none."""
    async with make_wire(max_connections=1) as transport, anyio.create_task_group() as group:
        group.start_soon(get, transport, f"{server.url}/hold")
        await anyio.to_thread.run_sync(server.arrived.acquire)
        with pytest.raises(httpx.PoolTimeout, match=r"no connection became available within 0\.01 s"):
            await get(transport, server.url, pool_timeout=0.01)
        server.release()
    assert [1] == server.connections


@pytest.mark.anyio
async def test_calls_of_an_account_wait_for_a_connection(make_wire: MakeWire, server: Loopback) -> None:
    """As long as their deadline allows: there may be thousands of them, and none has failed."""
    async with make_wire(max_connections=1) as transport:
        lemcal = AsyncLemcal(
            "usr_x", "secret", base_url=server.url, transport=transport, timeout=httpx.Timeout(5, pool=0.01)
        )
        await together(*[lambda: lemcal.request("GET", "/sleep/0.05")] * 3)
    assert [1, 1, 1] == server.connections


@pytest.mark.parametrize("anyio_backend", ["trio"])
@pytest.mark.anyio
async def test_aiohttp_on_trio(server: Loopback) -> None:
    """It says what to use instead, and sends nothing."""
    async with AiohttpTransport() as transport:
        with pytest.raises(ConfigurationError, match="asyncio only; on trio use PooledTransport"):
            await get(transport, server.url)
    assert [] == server.seen


@pytest.mark.parametrize("max_connections", [0, -1])
def test_a_pool_of_nothing_is_refused(make_wire: MakeWire, max_connections: int) -> None:
    """Where it is made."""
    with pytest.raises(ConfigurationError, match="max_connections"):
        make_wire(max_connections=max_connections)


@pytest.mark.parametrize("path", ["/cut", "/sleep/60"])
@pytest.mark.anyio
async def test_a_connection_that_broke_is_thrown_away(
    make_wire: MakeWire, server: Loopback, path: str
) -> None:
    """And its slot goes to the next request."""
    transport = make_wire(max_connections=1)
    async with httpx.AsyncClient(transport=transport, timeout=0.2) as client:
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadTimeout)):
            await client.get(server.url + path)
        assert 0 == await settled(server, most=0)
        assert "2" == (await client.get(server.url)).headers["x-connection"]


@pytest.mark.parametrize("fault", [faults.reset_before_processing(), faults.truncated()])
@pytest.mark.anyio
async def test_it_works_after_a_fault(make_wire: MakeWire, fault: faults.Fault) -> None:
    """Whatever the server did."""
    with Sandbox(limit=None).serve() as sandbox:
        async with httpx.AsyncClient(transport=make_wire(max_connections=1)) as client:
            for _ in range(2):
                sandbox.inject(fault)
                with pytest.raises(httpx.TransportError):
                    await client.get(f"{sandbox.base_url}/me")
                assert 401 == (await client.get(f"{sandbox.base_url}/me")).status_code


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/", "127.0.0.1/", "unix:/tmp/socket"])
@pytest.mark.anyio
async def test_other_protocols(make_wire: MakeWire, url: str) -> None:
    """They are refused, and cost no slot."""
    async with make_wire(max_connections=1) as transport:
        for _ in range(2):
            with anyio.fail_after(5), pytest.raises(httpx.UnsupportedProtocol, match="http://"):
                await get(transport, url)


@pytest.mark.anyio
async def test_nobody_listens(make_wire: MakeWire) -> None:
    """The slot is given back."""
    with Loopback() as server:
        pass
    async with make_wire(max_connections=1) as transport:
        for _ in range(2):
            with anyio.fail_after(5), pytest.raises(httpx.ConnectError):
                await get(transport, server.url)


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.anyio
async def test_the_server_closes_an_idle_connection(
    make_wire: MakeWire, server: Loopback, method: str
) -> None:
    """The next request takes a new one, whatever its method."""
    async with httpx.AsyncClient(transport=make_wire()) as client:
        for _ in range(3):
            assert 200 == (await client.request(method, f"{server.url}/drop")).status_code
            assert 0 == await settled(server, most=0)
        await client.get(server.url)
        server.drop_connections()
        assert 0 == await settled(server, most=0)
        assert 200 == (await client.request(method, server.url)).status_code
    assert [1, 2, 3, 4, 5] == server.connections


@pytest.mark.anyio
async def test_idle_connections_are_closed(
    make_wire: MakeWire, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After ``keepalive`` seconds, at the next use; younger ones stay."""
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
        assert 1 == await settled(server, most=1)


@pytest.mark.anyio
async def test_an_old_connection_is_not_used(
    make_wire: MakeWire, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something between may have forgotten it."""
    now = 1000.0
    monkeypatch.setattr(_pooled, "time", SimpleNamespace(monotonic=lambda: now))
    async with make_wire(keepalive=60) as transport:
        await get(transport, server.url)
        now += 61
        assert 2 == await get(transport, server.url)
        assert 1 == await settled(server, most=1)


class ClosesSoon(Loopback):
    """Says for how long it leaves an idle connection open: ``/5`` five seconds."""

    async def answer(self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Write the answer."""
        seconds = seen.target.strip("/").encode()
        writer.write(b"HTTP/1.1 200 OK\r\nKeep-Alive: max=100, timeout=%b\r\n" % seconds)
        writer.write(b"X-Connection: %d\r\nContent-Length: 0\r\n\r\n" % seen.connection)


@pytest.mark.parametrize("make_wire", [PooledTransport, HTTPX2Transport])
@pytest.mark.anyio
async def test_a_connection_that_the_server_is_about_to_close(
    make_wire: MakeWire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not used: of a POST that met the close, nobody could say whether it was carried out."""
    now = 1000.0
    monkeypatch.setattr(_http11, "time", SimpleNamespace(monotonic=lambda: now))
    with ClosesSoon() as server:
        async with make_wire() as transport:
            assert 1 == await get(transport, f"{server.url}/5")
            now += 3
            assert 1 == await get(transport, f"{server.url}/5")
            now += 4.5
            assert 2 == await get(transport, f"{server.url}/never")
            now += 50
            assert 2 == await get(transport, f"{server.url}/1")
            assert 3 == await get(transport, f"{server.url}/5")
            assert 1 == await settled(server, most=1)


@pytest.mark.anyio
async def test_old_connections_to_elsewhere_are_closed(
    make_wire: MakeWire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any use of the transport will do."""
    now = 1000.0
    monkeypatch.setattr(_pooled, "time", SimpleNamespace(monotonic=lambda: now))
    with Loopback() as one, Loopback() as other:
        async with make_wire(keepalive=60) as transport:
            await get(transport, one.url)
            now += 61
            await get(transport, other.url)
            assert 0 == await settled(one, most=0)


@pytest.mark.anyio
async def test_closing_closes_what_is_idle(make_wire: MakeWire, server: Loopback) -> None:
    """At once, as often as it is called."""
    transport = make_wire()
    await together(*[lambda: get(transport, f"{server.url}/sleep/0.02")] * 3)
    await transport.aclose()
    assert 0 == await settled(server, most=0)
    await transport.aclose()


@pytest.mark.anyio
async def test_closing_what_was_never_used(make_wire: MakeWire, server: Loopback) -> None:
    """Is for good, too."""
    transport = make_wire()
    await transport.aclose()
    await transport.aclose()
    with pytest.raises(ConfigurationError, match="this transport is closed"):
        await get(transport, f"{server.url}/")
    assert not server.connections


@pytest.mark.anyio
async def test_closing_lets_requests_finish(make_wire: MakeWire, server: Loopback) -> None:
    """Those that are under way or waiting; then their connections are closed too."""
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
    assert 0 == await settled(server, most=0)


@pytest.mark.anyio
async def test_use_after_closing(make_wire: MakeWire, server: Loopback) -> None:
    """It is refused, whether it was used before or not."""
    for used in (True, False):
        transport = make_wire()
        if used:
            await get(transport, server.url)
        await transport.aclose()
        with pytest.raises(ConfigurationError, match="this transport is closed; create a new one"):
            await get(transport, server.url)
    assert 1 == len(server.seen)


@pytest.mark.anyio
async def test_streaming_in_a_plain_client(make_wire: MakeWire, server: Loopback) -> None:
    """Read to its end, the connection is used again; the body comes in parts."""
    async with httpx.AsyncClient(transport=make_wire(max_connections=1)) as client:
        for _ in range(2):
            async with client.stream("GET", f"{server.url}/gzip/9000") as response:
                assert 9000 == sum([len(part) async for part in response.aiter_bytes()])
    assert [1, 1] == server.connections


@pytest.mark.anyio
async def test_a_stream_holds_its_connection(make_wire: MakeWire, server: Loopback) -> None:
    """Until it is closed; then the next request goes on."""
    async with httpx.AsyncClient(transport=make_wire(max_connections=1)) as client:
        async with client.stream("GET", server.url):
            with anyio.move_on_after(0.1) as scope:
                await client.get(server.url)
            assert scope.cancelled_caught
        with anyio.fail_after(5):
            await client.get(server.url)


@pytest.mark.anyio
async def test_a_stream_closed_early(make_wire: MakeWire, server: Loopback) -> None:
    """What was not read is not waited for: the connection is thrown away."""
    async with httpx.AsyncClient(transport=make_wire(max_connections=1)) as client:
        for path in ("/endless", "/gzip/9000"):
            async with client.stream("GET", server.url + path) as response:
                pass
            assert response.is_closed
            await response.aclose()
            assert 0 == await settled(server, most=0)
        assert "3" == (await client.get(server.url)).headers["x-connection"]


async def read_to_the_end(body: AsyncIterator[bytes]) -> None:
    """Read what there is."""
    async for _ in body:
        pass


@pytest.mark.anyio
async def test_a_stream_read_in_part(make_wire: MakeWire, server: Loopback) -> None:
    """Read on after it was closed, it ends by itself, and leaves no generator to the garbage collector."""
    async with make_wire(max_connections=1) as transport:
        response = await transport.handle_async_request(httpx.Request("GET", f"{server.url}/endless"))
        assert isinstance(response.stream, httpx.AsyncByteStream)
        body = aiter(response.stream)
        assert b"" != await anext(body)
        await response.aclose()
        await response.stream.aclose()  # again
        assert 0 == await settled(server, most=0)
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
async def test_a_stream_that_fails_while_it_is_closed(
    make_wire: MakeWire, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slot is given back all the same."""

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
    """Collect what an event loop that has ended leaves open.

    Nobody can close that any more, but the garbage collector, which says so.
    """
    yield
    gc.collect()


def backends_of(make_wire: MakeWire) -> list[str]:
    """Return the event loops that a wire runs on."""
    return ["asyncio"] if make_wire is AiohttpTransport else ["asyncio", "trio"]


@pytest.mark.usefixtures("garbage")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_event_loops_one_after_another(make_wire: MakeWire, server: Loopback) -> None:
    """A transport made before there was any serves them all, each with connections of its own."""
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
def test_event_loops_at_once(make_wire: MakeWire, server: Loopback) -> None:
    """In threads, asyncio and trio; each has slots and connections of its own."""
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
    assert 160 == len(server.seen)
    assert [2, 2, 2, 2] == [len(connections) for connections in used.values()]
    assert 8 == len(set().union(*used.values()))


@pytest.mark.usefixtures("garbage")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_event_loops_that_have_ended_are_forgotten(make_wire: MakeWire, server: Loopback) -> None:
    """With the connections that they had, so that a thousand of them leave nothing behind."""
    transport = make_wire()

    async def once() -> int:
        return await get(transport, server.url)

    backends = backends_of(make_wire)
    for number in range(1, 7):
        assert number == anyio.run(once, backend=backends[number % len(backends)])
        gc.collect()
        assert len(transport._pools) <= 1
        assert server.settled(most=1) <= 1


@pytest.fixture
def tls(authority: trustme.CA) -> Iterator[Loopback]:
    """Serve HTTPS, with a certificate that only those know who are told."""
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
    """Start without TLS contexts; return the names of the threads in which httpx and httpx2 make some."""
    made: list[str] = []
    monkeypatch.setattr(_environment, "_contexts", {})
    for library in (httpx, httpx2):

        def counting(
            create: Callable[..., ssl.SSLContext] = library.create_ssl_context, **options: bool
        ) -> ssl.SSLContext:
            made.append(threading.current_thread().name)
            return create(**options)

        monkeypatch.setattr(library, "create_ssl_context", counting)
    return made


@pytest.mark.anyio
async def test_tls(
    make_wire: MakeWire, tls: Loopback, authority: trustme.CA, fresh_contexts: list[str]
) -> None:
    """With the context that it was given, and no other."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with make_wire(ssl_context=context) as transport:
        assert [1, 1] == [await get(transport, tls.url) for _ in range(2)]
    assert [] == fresh_contexts


@pytest.mark.anyio
async def test_a_certificate_that_is_not_trusted(make_wire: MakeWire, tls: Loopback) -> None:
    """Nothing is sent; it counts as a failure to connect, and says why."""
    async with make_wire(max_connections=1) as transport:
        for _ in range(2):
            with anyio.fail_after(5), pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await get(transport, tls.url)
        assert 0 == await settled(tls, most=0)
    assert [] == tls.seen


class HangsUp(Loopback):
    """Reads what arrives first, and closes the connection."""

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()


@pytest.mark.parametrize("make_wire", [PooledTransport, HTTPX2Transport])
@pytest.mark.anyio
async def test_a_handshake_that_breaks_off(make_wire: MakeWire) -> None:
    """It says so."""
    with HangsUp() as server:
        async with make_wire() as transport:
            with anyio.fail_after(5), pytest.raises(httpx.ConnectError, match=r"\w"):
                await get(transport, server.url.replace("http:", "https:"))


@pytest.mark.anyio
async def test_one_context_for_the_process(
    make_wire: MakeWire, tls: Loopback, fresh_contexts: list[str]
) -> None:
    """Reading the certificates takes 20 ms: it is done once, and not on the event loop."""
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
    """Nor does httpx make a context for it with each connection."""
    async with make_wire() as transport:
        await together(*[lambda: get(transport, f"{server.url}/sleep/0.01")] * 3)
    assert [] == fresh_contexts


def test_a_context_that_two_threads_want() -> None:
    """The second finds that of the first."""
    made: list[ssl.SSLContext] = []

    def make(_: bool) -> ssl.SSLContext:  # noqa: FBT001 - as it is called
        made.append(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        return made[-1]

    for _ in range(2):
        assert "" == _environment._make_once(make, trust_env=True)
    assert made == [_environment._contexts.pop((make, True))]


async def read(transport: httpx.AsyncBaseTransport, request: httpx.Request) -> None:
    """Send a request and read its answer."""
    response = await transport.handle_async_request(request)
    try:
        await response.aread()
    finally:
        await response.aclose()


@pytest.mark.anyio
async def test_an_error_that_is_not_the_wires(make_wire: MakeWire, server: Loopback) -> None:
    """What a caller's own trace raises comes out as it is; the slot is given back."""
    # aiohttp's connections report the moment of sending only.
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
