"""Servers for benchmarks, each in its own process, so that only the client's CPU time is measured.

The path selects the response: ``/me`` a user, ``/meetings`` five meetings, ``/many/meetings`` 5,000,
``/missing`` a 404. ``fixed_server`` uses very little CPU time, and delays the response if the path ends in
``/slow``. ``counting_server`` counts requests per credential as lemcal does, sends its rate-limit headers,
and responds with 429 above the limit.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lemcal_async.sandbox import Sandbox
from lemcal_async.sandbox._ratelimit import FixedWindow, rate_limit_headers

END_OF_HEAD = b"\r\n\r\n"
SLOW = 1.0  # seconds
UNLIMITED_HEADERS = [
    "Retry-After: 1.283",
    "X-RateLimit-Limit: 1000000",
    "X-RateLimit-Remaining: 999999",
    "X-RateLimit-Reset: Mon Jan 05 2026 09:00:02 GMT+0100 (Central European Standard Time)",
]


@contextmanager
def fixed_server() -> Iterator[str]:
    """Run the server without a rate limit; yield its base URL."""
    with _process("fixed") as url:
        yield url


@contextmanager
def counting_server() -> Iterator[str]:
    """Run the server with lemcal's rate limit; yield its base URL."""
    with _process("counting") as url:
        yield url


@contextmanager
def _process(kind: str) -> Iterator[str]:
    command = [sys.executable, __file__, kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.stdin.close()


def bodies() -> dict[bytes, tuple[str, bytes]]:
    """Return the status and body for each path suffix."""
    sandbox = Sandbox(meetings=5)
    meetings = sandbox.meetings()
    many = [{**meetings[number % 5], "_id": f"mee_{number}"} for number in range(5_000)]
    user = {
        "_id": "usr_x",
        "email": "host@example.com",
        "publicIdentifier": "host",
        "createdAt": "2026-01-05T08:00:00.000Z",
    }
    return {
        b"/missing": ("404 Not Found", b"Not Found"),
        b"/many/meetings": ("200 OK", json.dumps(many).encode()),
        b"/meetings": ("200 OK", json.dumps(meetings).encode()),
        b"": ("200 OK", json.dumps(user).encode()),
    }


class FixedProtocol(asyncio.Protocol):
    """Responds to requests without a body, in order."""

    bodies = bodies()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Initialize the connection."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.received = b""

    def data_received(self, data: bytes) -> None:
        """Respond to each complete request."""
        *heads, self.received = (self.received + data).split(END_OF_HEAD)
        for head in heads:
            response = self.respond(head)
            if b"/slow " in head:
                asyncio.get_running_loop().call_later(SLOW, self.transport.write, response)
            else:
                self.transport.write(response)

    def respond(self, head: bytes) -> bytes:
        """Return the response to a request."""
        return self.encode(head, UNLIMITED_HEADERS)

    def encode(self, head: bytes, headers: list[str], status: str | None = None) -> bytes:
        """Return a response as bytes."""
        path = head.split(b" ", 2)[1]
        usual, body = next(self.bodies[end] for end in self.bodies if path.endswith(end))
        lines = [
            f"HTTP/1.1 {status or usual}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        ]
        return "\r\n".join(lines + headers).encode() + END_OF_HEAD + body


class CountingProtocol(FixedProtocol):
    """Responds with 429 above the rate limit."""

    counter = FixedWindow(20, 2.0, time.monotonic)

    def respond(self, head: bytes) -> bytes:
        """Count the request."""
        credential = head.lower().partition(b"authorization: ")[2].partition(b"\r\n")[0]
        count = self.counter.count(credential.decode())
        headers = [f"{name}: {value}" for name, value in rate_limit_headers(count, time.time()).items()]
        return self.encode(head, headers, None if count.allowed else "429 Too Many Requests")


async def serve(protocol: type[FixedProtocol]) -> None:
    """Serve until standard input is closed."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(protocol, "127.0.0.1", 0, backlog=1000)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/api/lemcal", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve({"fixed": FixedProtocol, "counting": CountingProtocol}[sys.argv[1]]))
