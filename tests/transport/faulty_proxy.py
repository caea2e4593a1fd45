"""A TCP proxy that disturbs connections as bad networks and gateways do."""

import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from typing import Final, Self

import anyio
from anyio.abc import ByteStream, SocketAttribute
from anyio.streams.buffered import BufferedByteReceiveStream

# Faults and their probabilities in percent; all other responses pass unchanged.
FAULTS: Final = {
    "reset before processing": 3,
    "reset after processing": 3,
    "truncated": 3,
    "sent twice": 2,
    "garbage before the response": 2,
    "replaced with HTML": 2,
    "replaced with a 500": 3,
    "replaced with a 503": 3,
    "late": 4,
    "trickling": 2,
    "never": 1,
}
_PAGE: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 14\r\n\r\n<h1>Hello</h1>"
_ERROR: Final = b"HTTP/1.1 %d Oops\r\nContent-Length: 4\r\n\r\noops"


class FaultyProxy:
    """Serves on its own port, in a thread; ``faults`` counts the faults so far."""

    def __init__(self, port: int, seed: int = 1) -> None:
        self._target = port
        self._random = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.port = 0
        self._started = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=anyio.run, args=[self._run], daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)

    async def _run(self) -> None:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        self.port = listener.extra(SocketAttribute.local_port)
        async with listener, anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, self._serve)
            self._started.set()
            while not self._stop.is_set():  # noqa: ASYNC110  # set by another thread
                await anyio.sleep(0.02)
            tasks.cancel_scope.cancel()

    async def _serve(self, client: ByteStream) -> None:
        buffered = BufferedByteReceiveStream(client)
        async with client:
            # Close with a reset at the end, even with unsent data.
            raw = client.extra(SocketAttribute.raw_socket)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(
                anyio.BrokenResourceError,
                anyio.EndOfStream,
                anyio.IncompleteRead,
                anyio.DelimiterNotFound,
                anyio.ClosedResourceError,
                OSError,
            ):
                while await self._exchange(buffered, client):
                    pass

    async def _exchange(self, requests: BufferedByteReceiveStream, client: ByteStream) -> bool:
        """Forward a request and respond; return whether to keep the connection."""
        request = await _message(requests)
        fault = self._draw_fault()
        if fault == "reset before processing":
            return False
        async with await anyio.connect_tcp("127.0.0.1", self._target) as upstream:
            await upstream.send(request)
            response = await _message(BufferedByteReceiveStream(upstream))
        if fault == "reset after processing":
            return False
        if fault == "never":
            await anyio.sleep(3)
            return False
        if fault == "late":
            await anyio.sleep(self._random.uniform(0.05, 0.6))
        if fault == "trickling":
            size = max(1, len(response) // 20)
            for start in range(0, len(response), size):
                await client.send(response[start : start + size])
                await anyio.sleep(0.01)
            return True
        replacements = {
            "truncated": response[: self._random.randrange(1, len(response))],
            "sent twice": response + response,
            "garbage before the response": b"\x00\xffgarbage\r\n" + response,
            "replaced with HTML": _PAGE,
            "replaced with a 500": _ERROR % 500,
            "replaced with a 503": _ERROR % 503,
        }
        await client.send(replacements.get(fault, response))
        return fault != "truncated"

    def _draw_fault(self) -> str:
        drawn = self._random.uniform(0, 100)
        for fault, percent in FAULTS.items():
            drawn -= percent
            if drawn < 0:
                self.faults[fault] += 1
                return fault
        return ""


async def _message(stream: BufferedByteReceiveStream) -> bytes:
    """Read a message that has a Content-Length or no body."""
    head = await stream.receive_until(b"\r\n\r\n", 65_536) + b"\r\n\r\n"
    length = 0
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            length = int(line.partition(b":")[2])
    return head + await stream.receive_exactly(length)
