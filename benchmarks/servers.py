"""Servers to measure against, each in a process of its own, so that only the client's CPU is counted.

``fixed_server`` costs next to nothing: every request is answered with the same user, after a moment
if its path ends in ``/slow``. ``sandbox_server`` is the sandbox, with its limiter.
"""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lemcal_async.sandbox import Sandbox

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
def sandbox_server(accounts: int) -> Iterator[str]:
    """Run a sandbox with so many accounts; yield the base URL. ``sandbox`` says which they are."""
    with _process("sandbox", str(accounts)) as url:
        yield url


def sandbox(accounts: int) -> Sandbox:
    """Return a sandbox with the accounts of the one that runs in the other process."""
    return Sandbox(accounts=accounts, meetings=0)


@contextmanager
def _process(*arguments: str) -> Iterator[str]:
    command = [sys.executable, __file__, *arguments]
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


async def serve_fixed() -> None:
    """Serve until standard input ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Fixed, "127.0.0.1", 0, backlog=1000)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/api/lemcal", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


def main(kind: str, accounts: str = "1") -> None:
    """Print the base URL, and serve until standard input ends."""
    if kind == "fixed":
        asyncio.run(serve_fixed())
        return
    with sandbox(int(accounts)).serve() as served:
        print(served.base_url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
