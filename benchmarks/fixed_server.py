"""A server that costs next to nothing: it answers every request with the same user.

A process of its own, so that only the client's CPU is measured. Prints its port, and ends with
its standard input.
"""

import asyncio
import sys

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
        self.transport.write(ANSWER * len(heads))


async def main() -> None:
    """Serve until standard input ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Fixed, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
