"""Servers to measure against, each in a process of its own, so that only the client's CPU is counted.

``fixed_server`` costs next to nothing: every request is answered with the same user, after a moment
if its path ends in ``/slow``. ``counting_server`` counts as the sandbox does, per credential, and refuses.
"""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lemcal_async.sandbox._ratelimit import FixedWindow, rate_limit_headers

BODY = (
    b'{"_id":"usr_x","email":"host@example.com","publicIdentifier":"host",'
    b'"createdAt":"2026-01-05T08:00:00.000Z"}'
)
ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
    b"Retry-After: 1.283\r\nX-RateLimit-Limit: 1000000\r\nX-RateLimit-Remaining: 999999\r\n"
    b"X-RateLimit-Reset: Mon Jan 05 2026 09:00:02 GMT+0100 (Central European Standard Time)\r\n\r\n%b"
) % (len(BODY), BODY)
END_OF_HEAD = b"\r\n\r\n"
SLOW = 1.0  # seconds


@contextmanager
def fixed_server() -> Iterator[str]:
    """Run the cheap server; yield the base URL."""
    with _process("fixed") as url:
        yield url


@contextmanager
def counting_server() -> Iterator[str]:
    """Run the cheap server with the sandbox's rate limit; yield the base URL."""
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


class Fixed(asyncio.Protocol):
    """Answers requests without a body, one after the other."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start with nothing received."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.received = b""

    def data_received(self, data: bytes) -> None:
        """Answer each request whose head is whole."""
        *heads, self.received = (self.received + data).split(END_OF_HEAD)
        if heads and b"/slow " in heads[0]:
            asyncio.get_running_loop().call_later(SLOW, self.transport.write, ANSWER)
        else:
            self.transport.write(ANSWER * len(heads))


class Counting(Fixed):
    """Answers 429 to whoever asks too often."""

    counter = FixedWindow(20, 2.0, time.monotonic)

    def data_received(self, data: bytes) -> None:
        """Count and answer each request whose head is whole."""
        *heads, self.received = (self.received + data).split(END_OF_HEAD)
        for head in heads:
            credential = head.lower().partition(b"authorization: ")[2].partition(b"\r\n")[0]
            count = self.counter.count(credential.decode())
            headers = rate_limit_headers(count, time.time())
            status = "200 OK" if count.allowed else "429 Too Many Requests"
            lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(BODY)}"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            self.transport.write("\r\n".join(lines).encode() + END_OF_HEAD + BODY)


async def serve(protocol: type[Fixed]) -> None:
    """Serve until standard input ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(protocol, "127.0.0.1", 0, backlog=1000)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/api/lemcal", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve({"fixed": Fixed, "counting": Counting}[sys.argv[1]]))
