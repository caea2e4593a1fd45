"""Abnormal responses: they cannot block the program or leak into errors."""

import asyncio
from collections.abc import Iterator

import anyio
import anyio.lowlevel
import httpx
import pytest

from lemcal_async.transport import PooledTransport
from lemcal_async.transport._http11 import MAX_INTERIM_RESPONSES
from lemcal_async.transport.httpx2 import HTTPX2Transport

from .conftest import MakeWire
from .loopback import Loopback, ReceivedRequest

PERSONAL = "guest@example.com"


class AbnormalServer(Loopback):
    """A server whose path selects the response: ``/interim/3`` sends three interim responses first.

    ``/waiting`` sends only an interim response, ``/broken`` half a head, ``/unchunked`` invalid chunks.
    """

    async def respond(
        self, request: ReceivedRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Write the response."""
        match request.target.split("/")[1:]:
            case ["interim", number]:
                writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </>\r\n\r\n" * int(number))
            case ["waiting"]:
                writer.write(b"HTTP/1.1 102 Processing\r\n\r\n")
                await reader.read(1)  # until the client disconnects
                return
            case ["broken"]:
                writer.write(b"HTTP/1.1 200 OK\r\nX-Guest: %s\r\n" % PERSONAL.encode())
                await writer.drain()
                raise ConnectionAbortedError
            case ["unchunked" | "unchunked-later" as when]:
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                if when == "unchunked-later":  # after the client started to read the body
                    await writer.drain()
                    await asyncio.sleep(0.05)
                writer.write(b'[{"email":"%s"}]\r\n' % PERSONAL.encode())
                return
            case ["large"]:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % 2**18 + bytes(2**18))
                return
        await super().respond(request, reader, writer)


@pytest.fixture
def server() -> Iterator[AbnormalServer]:
    """Serve plain HTTP."""
    with AbnormalServer() as server:
        yield server


@pytest.mark.anyio
async def test_interim_responses(make_wire: MakeWire, server: AbnormalServer) -> None:
    """They are skipped and the connection is kept, unless there are too many."""
    async with httpx.AsyncClient(transport=make_wire(), timeout=5) as client:
        for number in (1, MAX_INTERIM_RESPONSES):
            assert 200 == (await client.get(f"{server.url}/interim/{number}")).status_code
        for number in (MAX_INTERIM_RESPONSES + 1, 10_000):
            with pytest.raises(httpx.RemoteProtocolError, match="interim"):
                await client.get(f"{server.url}/interim/{number}")
    assert [1, 1, 1, 2] == server.connections


@pytest.mark.anyio
async def test_silence_after_an_interim_response(make_wire: MakeWire, server: AbnormalServer) -> None:
    """The read timeout applies."""
    async with httpx.AsyncClient(transport=make_wire(), timeout=0.2) as client:
        with anyio.fail_after(5), pytest.raises(httpx.ReadTimeout):
            await client.get(f"{server.url}/waiting")


@pytest.mark.parametrize("path", ["unchunked", "unchunked-later", "broken"])
@pytest.mark.anyio
async def test_no_error_quotes_the_response(make_wire: MakeWire, server: AbnormalServer, path: str) -> None:
    """The invalid data may be a list of meetings."""
    async with httpx.AsyncClient(transport=make_wire(), timeout=5) as client:
        with pytest.raises(httpx.RemoteProtocolError) as caught:
            await client.get(f"{server.url}/{path}")
    assert PERSONAL not in str(caught.value)
    assert str(caught.value)


@pytest.mark.parametrize("make_wire", [PooledTransport, HTTPX2Transport])
@pytest.mark.anyio
async def test_reading_a_buffered_body_yields_to_other_tasks(
    make_wire: MakeWire, server: AbnormalServer
) -> None:
    """Other tasks run although the whole body has arrived."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await anyio.lowlevel.checkpoint()
            turns += 1

    async with (
        httpx.AsyncClient(transport=make_wire(), timeout=5) as client,
        client.stream("GET", f"{server.url}/large") as response,
        anyio.create_task_group() as group,
    ):
        await anyio.sleep(0.1)  # until the body has arrived
        group.start_soon(other)
        await anyio.lowlevel.checkpoint()
        turns = 0
        assert 2**18 == sum([len(part) async for part in response.aiter_raw()])
        assert turns >= 3
        group.cancel_scope.cancel()
