"""No answer that can be told from the right one is given to another request, whatever a gateway does."""

import asyncio
import ssl
import time
from collections.abc import Iterator

import anyio
import anyio.to_thread
import httpx
import pytest
import trustme

from lemcal_async.transport.aiohttp import AiohttpTransport

from .conftest import MakeWire
from .loopback import Loopback, Seen

READ_AT_ONCE = 2**16  # bytes that the wires ask for in one go


class Gateway(Loopback):
    """Names the target in each answer, and sends some twice, or unasked.

    ``/twice/...`` is answered twice in one go, ``/later/...`` once more a moment later, ``/stray/...`` with
    bytes behind the answer that are none; ``/exact/...`` is answered twice, where the first answer ends
    where a read does. With ``greets`` a connection begins with an answer to nothing.
    """

    def __init__(self, tls: ssl.SSLContext | None = None, *, greets: bool = False) -> None:
        super().__init__(tls)
        self.greets = greets
        self.again = asyncio.Event()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.greets:
            writer.write(_answer(b"nobody's"))
            await writer.drain()
        await super()._connected(reader, writer)

    async def answer(self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Write the answer, and what else the path asks for."""
        answer = _answer(seen.target.encode(), seen.connection)
        match seen.target.split("/")[1]:
            case "twice":
                writer.write(answer * 2)
            case "stray":
                writer.write(answer + b"?\r\n")
            case "exact":
                padding = READ_AT_ONCE - len(answer) - len("X-Padding: \r\n")
                writer.write(_answer(seen.target.encode(), seen.connection, padding) * 2)
            case "later":
                writer.write(answer)
                await writer.drain()
                await self.again.wait()
                writer.write(answer)
            case _:
                writer.write(answer)


def _answer(body: bytes, connection: int = 0, padding: int | None = None) -> bytes:
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
    """Serve, in clear and by TLS."""
    tls = None
    if request.param == "https":
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(tls)
    with Gateway(tls) as gateway:
        yield gateway


@pytest.fixture
def client_tls(authority: trustme.CA) -> ssl.SSLContext:
    """Trust those servers."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.mark.parametrize("path", ["twice", "exact"])
@pytest.mark.anyio
async def test_more_than_was_asked_for(
    make_wire: MakeWire, gateway: Gateway, client_tls: ssl.SSLContext, path: str
) -> None:
    """Each request has its own answer, and each a connection of its own."""
    async with httpx.AsyncClient(transport=make_wire(ssl_context=client_tls), timeout=5) as client:
        for number in range(5):
            answer = await client.get(f"{gateway.url}/{path}/{number}")
            assert f"/{path}/{number}" == answer.text
    assert [1, 2, 3, 4, 5] == gateway.connections


@pytest.mark.anyio
async def test_bytes_that_are_no_answer(
    make_wire: MakeWire, gateway: Gateway, client_tls: ssl.SSLContext
) -> None:
    """They cost the connection, and with some parsers the answer before them."""
    async with httpx.AsyncClient(transport=make_wire(ssl_context=client_tls), timeout=5) as client:
        for number in range(3):
            try:
                answer = (await client.get(f"{gateway.url}/stray/{number}")).text
            except httpx.RemoteProtocolError as error:
                answer = str(error)
            expected = (
                "the response is not valid HTTP" if make_wire is AiohttpTransport else f"/stray/{number}"
            )
            assert expected == answer
    assert [1, 2, 3] == gateway.connections


@pytest.mark.anyio
async def test_an_answer_that_comes_again_later(
    make_wire: MakeWire, gateway: Gateway, client_tls: ssl.SSLContext
) -> None:
    """While the connection is idle: it is not used again."""
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
async def test_connections_that_carry_nothing_else_are_kept(
    make_wire: MakeWire, gateway: Gateway, client_tls: ssl.SSLContext
) -> None:
    """The check costs an honest server nothing."""
    async with httpx.AsyncClient(transport=make_wire(ssl_context=client_tls), timeout=5) as client:
        for number in range(5):
            assert f"/{number}" == (await client.get(f"{gateway.url}/{number}")).text
    assert [1] * 5 == gateway.connections


@pytest.mark.anyio
async def test_an_answer_before_the_request(make_wire: MakeWire) -> None:
    """It answers nothing, so it is refused. Only what arrives behind the request passes for its answer."""

    async def slowly(name: str, _: object) -> None:
        if name.endswith("send_request_headers.started"):
            await anyio.sleep(0.05)

    with Gateway(greets=True) as gateway:
        async with make_wire(max_connections=1) as transport:
            for number in range(3):
                request = httpx.Request("GET", f"{gateway.url}/{number}", extensions={"trace": slowly})
                with pytest.raises(httpx.RemoteProtocolError, match="sent data before the request"):
                    await transport.handle_async_request(request)
    assert [] == gateway.seen
