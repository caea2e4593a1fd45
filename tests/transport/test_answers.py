"""Answers as no sane server sends them: none is given more of the program than it is worth."""

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
from .loopback import Loopback, Seen

PERSONAL = "guest@example.com"


class Odd(Loopback):
    """Sends what the path asks for: ``/interim/3`` three interim answers before the real one.

    ``/waiting`` sends one, and nothing more; ``/broken`` half of a head.
    """

    async def answer(self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Write the answer."""
        match seen.target.split("/")[1:]:
            case ["interim", number]:
                writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </>\r\n\r\n" * int(number))
            case ["waiting"]:
                writer.write(b"HTTP/1.1 102 Processing\r\n\r\n")
                await reader.read(1)  # until the client goes
                return
            case ["broken"]:
                writer.write(b"HTTP/1.1 200 OK\r\nX-Guest: %s\r\n" % PERSONAL.encode())
                await writer.drain()
                raise ConnectionAbortedError
            case ["unchunked" | "unchunked-later" as when]:
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                if when == "unchunked-later":  # when somebody waits for the body
                    await writer.drain()
                    await asyncio.sleep(0.05)
                writer.write(b'[{"email":"%s"}]\r\n' % PERSONAL.encode())
                return
            case ["large"]:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % 2**18 + bytes(2**18))
                return
        await super().answer(seen, reader, writer)


@pytest.fixture
def server() -> Iterator[Odd]:
    """Serve plain HTTP."""
    with Odd() as server:
        yield server


@pytest.mark.anyio
async def test_interim_answers(make_wire: MakeWire, server: Odd) -> None:
    """They are passed over, and the connection is kept; but not without end."""
    async with httpx.AsyncClient(transport=make_wire(), timeout=5) as client:
        for number in (1, MAX_INTERIM_RESPONSES):
            assert 200 == (await client.get(f"{server.url}/interim/{number}")).status_code
        for number in (MAX_INTERIM_RESPONSES + 1, 10_000):
            with pytest.raises(httpx.RemoteProtocolError, match="interim"):
                await client.get(f"{server.url}/interim/{number}")
    assert [1, 1, 1, 2] == server.connections


@pytest.mark.anyio
async def test_silence_after_an_interim_answer(make_wire: MakeWire, server: Odd) -> None:
    """It is not waited out for longer than any other."""
    async with httpx.AsyncClient(transport=make_wire(), timeout=0.2) as client:
        with anyio.fail_after(5), pytest.raises(httpx.ReadTimeout):
            await client.get(f"{server.url}/waiting")


@pytest.mark.parametrize("path", ["unchunked", "unchunked-later", "broken"])
@pytest.mark.anyio
async def test_no_error_quotes_an_answer(make_wire: MakeWire, server: Odd, path: str) -> None:
    """The list of meetings may be what could not be read."""
    async with httpx.AsyncClient(transport=make_wire(), timeout=5) as client:
        with pytest.raises(httpx.RemoteProtocolError) as caught:
            await client.get(f"{server.url}/{path}")
    assert PERSONAL not in str(caught.value)
    assert str(caught.value)


@pytest.mark.parametrize("make_wire", [PooledTransport, HTTPX2Transport])
@pytest.mark.anyio
async def test_a_body_that_is_there_already(make_wire: MakeWire, server: Odd) -> None:
    """Others run in between, though nothing is to be waited for."""
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
        await anyio.sleep(0.1)  # a moment for what the server has written
        group.start_soon(other)
        await anyio.lowlevel.checkpoint()
        turns = 0
        assert 2**18 == sum([len(part) async for part in response.aiter_raw()])
        assert turns >= 3
        group.cancel_scope.cancel()
