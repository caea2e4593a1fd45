"""No request receives another request's response, if the two are distinguishable."""

import asyncio
import ssl
import threading
import time
from collections.abc import Iterator

import anyio
import anyio.to_thread
import httpx
import pytest
import trustme

from lemcal_async.transport.aiohttp import AiohttpTransport

from .conftest import MakeWire
from .loopback import Loopback, ReceivedRequest

READ_SIZE = 2**16  # bytes that the wires read at a time


class Gateway(Loopback):
    """Returns the request's target, and sends some responses twice, or unsolicited.

    ``/twice/...`` sends the response twice at once, ``/later/...`` again after a while, ``/stray/...``
    followed by stray bytes; ``/exact/...`` sends it twice, and the first response ends at the end of a read.
    If ``greets`` is true, each connection starts with an unsolicited response.
    """

    def __init__(self, tls: ssl.SSLContext | None = None, *, greets: bool = False) -> None:
        super().__init__(tls)
        self.greets = greets
        self.greeted = threading.Semaphore(0)  # released once for each greeting
        self.again = asyncio.Event()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.greets:
            writer.write(_response(b"unsolicited"))
            await writer.drain()
            self.greeted.release()
        await super()._connected(reader, writer)

    async def respond(
        self, request: ReceivedRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Write the response, and any additional data."""
        response = _response(request.target.encode(), request.connection)
        match request.target.split("/")[1]:
            case "twice":
                writer.write(response * 2)
            case "stray":
                writer.write(response + b"?\r\n")
            case "exact":
                padding = READ_SIZE - len(response) - len("X-Padding: \r\n")
                writer.write(_response(request.target.encode(), request.connection, padding) * 2)
            case "later":
                writer.write(response)
                await writer.drain()
                await self.again.wait()
                writer.write(response)
            case _:
                writer.write(response)


def _response(body: bytes, connection: int = 0, padding: int | None = None) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nX-Connection: %d\r\n" % (len(body), connection)
    if padding is not None:
        head += b"X-Padding: " + b"x" * padding + b"\r\n"
    return head + b"\r\n" + body


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Make a certificate authority."""
    return trustme.CA()


@pytest.fixture(params=["http", "https"])
def gateway(request: pytest.FixtureRequest, authority: trustme.CA) -> Iterator[Gateway]:
    """Start a gateway, with and without TLS."""
    tls = None
    if request.param == "https":
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(tls)
    with Gateway(tls) as gateway:
        yield gateway


@pytest.fixture
def client_tls(authority: trustme.CA) -> ssl.SSLContext:
    """Return a TLS context that trusts the gateway."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.mark.parametrize("path", ["twice", "exact"])
@pytest.mark.anyio
async def test_duplicate_responses(
    make_wire: MakeWire, gateway: Gateway, client_tls: ssl.SSLContext, path: str
) -> None:
    """Each request receives its own response, over a new connection."""
    async with httpx.AsyncClient(transport=make_wire(ssl_context=client_tls), timeout=5) as client:
        for number in range(5):
            response = await client.get(f"{gateway.url}/{path}/{number}")
            assert f"/{path}/{number}" == response.text
    assert [1, 2, 3, 4, 5] == gateway.connections


@pytest.mark.anyio
async def test_stray_bytes_after_a_response(
    make_wire: MakeWire, gateway: Gateway, client_tls: ssl.SSLContext
) -> None:
    """The connection is closed; with some parsers, the response fails, too."""
    async with httpx.AsyncClient(transport=make_wire(ssl_context=client_tls), timeout=5) as client:
        for number in range(3):
            try:
                outcome = (await client.get(f"{gateway.url}/stray/{number}")).text
            except httpx.RemoteProtocolError as error:
                outcome = str(error)
            expected = (
                "the response is not valid HTTP" if make_wire is AiohttpTransport else f"/stray/{number}"
            )
            assert expected == outcome
    assert [1, 2, 3] == gateway.connections


@pytest.mark.anyio
async def test_duplicate_response_on_an_idle_connection(
    make_wire: MakeWire, gateway: Gateway, client_tls: ssl.SSLContext
) -> None:
    """The connection is not reused."""
    async with httpx.AsyncClient(transport=make_wire(ssl_context=client_tls), timeout=5) as client:
        first = await client.get(f"{gateway.url}/later/1")
        gateway._loop.call_soon_threadsafe(gateway.again.set)
        await anyio.to_thread.run_sync(_until_idle, gateway)
        second = await client.get(f"{gateway.url}/later/2")
    assert ["/later/1", "/later/2"] == [first.text, second.text]
    assert [1, 2] == gateway.connections


def _until_idle(gateway: Gateway) -> None:
    until = time.monotonic() + 5
    while gateway.busy and time.monotonic() < until:
        time.sleep(0.005)


@pytest.mark.anyio
async def test_connections_to_a_correct_server_are_kept(
    make_wire: MakeWire, gateway: Gateway, client_tls: ssl.SSLContext
) -> None:
    """The check does not close correct connections."""
    async with httpx.AsyncClient(transport=make_wire(ssl_context=client_tls), timeout=5) as client:
        for number in range(5):
            assert f"/{number}" == (await client.get(f"{gateway.url}/{number}")).text
    assert [1] * 5 == gateway.connections


@pytest.mark.anyio
async def test_response_before_the_request(make_wire: MakeWire) -> None:
    """A response that arrives before the request is an error."""
    with Gateway(greets=True) as server:

        async def wait(name: str, _: object) -> None:
            if name.endswith("send_request_headers.started"):
                assert await anyio.to_thread.run_sync(server.greeted.acquire, True, 20.0)  # noqa: FBT003

        async with make_wire(max_connections=1) as transport:
            for number in range(3):
                request = httpx.Request("GET", f"{server.url}/{number}", extensions={"trace": wait})
                with pytest.raises(httpx.RemoteProtocolError, match="sent data before the request"):
                    await transport.handle_async_request(request)
    assert [] == server.requests
