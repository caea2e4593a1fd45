"""Randomly mutated responses: each becomes a model or a documented error."""

import asyncio
import gzip
import random
import zlib
from collections.abc import Awaitable, Callable, Iterator

import anyio
import pytest

from lemcal_async import AsyncLemcal, RetryPolicy
from lemcal_async.errors import LemcalError
from lemcal_async.ratelimit import Unlimited

from .conftest import MakeWire
from .loopback import Loopback, ReceivedRequest

Call = Callable[[AsyncLemcal], Awaitable[object]]
MEETINGS = (
    b'[{"_id":"mee_1","start":"2026-01-05T08:00:00.000Z","attendees":[{"email":"g@example.com"}]},'
    b'{"_id":"mee_2","canceledAt":null,"questions":[{"question":"?","answer":["a",1]}]}]'
)
CALLS: dict[str, tuple[Call, bytes]] = {
    "me": (
        lambda lemcal: lemcal.me(),
        b'{"_id":"usr_x","email":"h@example.com","createdAt":"2026-01-05T08:00:00Z"}',
    ),
    "meetings": (lambda lemcal: lemcal.meetings.list(), MEETINGS),
    "meeting type": (lambda lemcal: lemcal.meeting_types.get("met_x"), b'{"_id":"met_x","duration":30}'),
    "create hook": (
        lambda lemcal: lemcal.hooks.create("https://example.com/", any_meeting_type=True),
        b'{"_id":"hoo_x","targetUrl":"https://example.com/"}',
    ),
    "delete hook": (lambda lemcal: lemcal.hooks.delete("hoo_x"), b""),
    "request": (lambda lemcal: lemcal.request("GET", "/anything"), b'{"a":[1,2.5,null,true,"\\u00fc"]}'),
}
HOSTILE_HEADERS = b"""X-City: Z\xfcrich
X-\xff: 1
Content-Encoding: gzip
Content-Encoding: br
content-encoding:
Content-Encoding: gzip, gzip
Content-Encoding: identity
Content-Encoding: \xfc
Content-Length: 3
Content-Length: -1
Content-Length: 99999999999999999999
Transfer-Encoding: chunked
Connection: close
X-RateLimit-Limit: 50000000
X-RateLimit-Remaining: 0
X-RateLimit-Limit: 9999999999
Retry-After: 1e400
Retry-After: -5
Retry-After: 0.3, Tue Feb 16 2021 25:61:61 GMT+9999
Date: Tue, 31 Feb 2026 99:99:99 GMT
X-RateLimit-Reset: \x80\x81
Set-Cookie: a=b
Location: http://\xff/
Upgrade: h2c
 folded
Content-Type: application/json; charset=\xff
Content-Type: text/html; charset=utf-7""".split(b"\n")
HOSTILE_HEADERS.append(b"X" * 70_000 + b": 1")
ENCODINGS: list[tuple[Callable[[bytes], bytes], bytes]] = [
    (gzip.compress, b"gzip"),
    (zlib.compress, b"deflate"),
    (gzip.compress, b"deflate"),
    (bytes, b"gzip"),
    (bytes, b"zstd"),
]
STATUSES = [
    b"200",
    b"204",
    b"206",
    b"301",
    b"400",
    b"401",
    b"404",
    b"409",
    b"429",
    b"500",
    b"503",
    b"599",
    b"999",
    b"99",
    b"000",
]


def mutated(body: bytes, draw: random.Random) -> bytes:
    """Return the bytes of a response, with random faults."""
    headers = [b"Content-Type: application/json", b"X-RateLimit-Limit: 20", b"X-RateLimit-Remaining: 19"]
    status = b"200 OK"
    if draw.random() < 0.3:
        status = draw.choice(STATUSES) + draw.choice([b" ", b" OK", b" Z\xfcrich", b""])
    if draw.random() < 0.3:
        body = draw.choice(
            [_flipped(body, draw), body[: draw.randrange(len(body) + 1)], body * 2, b"[" * 5_000, b"\xff\xfe"]
        )
    if draw.random() < 0.3:
        encode, name = draw.choice(ENCODINGS)
        body = encode(body)
        if draw.random() < 0.3:
            body = _flipped(body, draw)
        headers.append(b"Content-Encoding: " + name)
    if draw.random() < 0.2:
        headers.append(b"Transfer-Encoding: chunked")
        size = b"%x" % draw.choice([len(body), len(body) + 1, 0])
        body = (
            size
            + draw.choice([b"\r\n", b";\xff\r\n", b"\n"])
            + body
            + draw.choice([b"\r\n0\r\n\r\n", b"", b"\r\nz\r\n"])
        )
    elif draw.random() < 0.9:
        headers.append(b"Content-Length: %d" % (len(body) + draw.choice([0, 0, 0, 0, 1, -1])))
    headers += draw.sample(HOSTILE_HEADERS, draw.choice([0, 0, 1, 2, 4]))
    draw.shuffle(headers)
    response = b"HTTP/1.1 " + status + b"\r\n" + b"\r\n".join(headers) + b"\r\n\r\n" + body
    if draw.random() < 0.2:
        response = draw.choice(
            [_flipped(response, draw), response[: draw.randrange(len(response))], b"", b"\x00" + response]
        )
    return response


def _flipped(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 3, 20])):
        if changed:
            changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


class MutatingServer(Loopback):
    """Responds with the given bytes, and closes the connection."""

    def __init__(self) -> None:
        super().__init__()
        self.next = b""

    async def respond(
        self, request: ReceivedRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Write the bytes."""
        writer.write(self.next)
        await writer.drain()
        raise ConnectionAbortedError


@pytest.fixture
def server() -> Iterator[MutatingServer]:
    """Start the server."""
    with MutatingServer() as server:
        yield server


@pytest.mark.parametrize("count", [150, pytest.param(3000, marks=pytest.mark.storm)])
@pytest.mark.anyio
async def test_mutated_responses(make_wire: MakeWire, server: MutatingServer, count: int) -> None:
    """Each call soon returns a model or raises one of this package's errors."""
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    outcomes: dict[str, int] = {}
    async with make_wire() as transport:
        lemcal = AsyncLemcal(
            "usr_x",
            "secret",
            base_url=server.url,
            transport=transport,
            limiter=Unlimited(),
            retry=RetryPolicy(attempts=1),
            timeout=5,
            max_response_bytes=2**20,
        )
        for number in range(count):
            call, body = CALLS[draw.choice(list(CALLS))]
            server.next = mutated(body, draw)
            outcome = "a model"
            try:
                with anyio.fail_after(10):
                    await call(lemcal)
            except LemcalError as error:
                outcome = type(error).__name__
            except BaseException as error:
                error.add_note(f"seed {seed}, response {number}: {server.next[:2000]!r}")
                raise
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    # The test is only meaningful if each of these occurred.
    assert {"a model", "APIConnectionError", "ResponseDecodeError"} <= set(outcomes), outcomes
