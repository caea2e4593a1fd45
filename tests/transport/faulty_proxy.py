"""A TCP proxy in front of a server that does to connections what bad networks and gateways do."""

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

# What is done to the answer to one request, and how often, in percent; the rest passes unharmed.
FAULTS: Final = {
    "reset before the server sees it": 3,
    "reset after the server has seen it": 3,
    "cut in the middle": 3,
    "sent twice": 2,
    "garbage in front": 2,
    "a page in its place": 2,
    "a 500 in its place": 3,
    "a 503 in its place": 3,
    "late": 4,
    "trickling": 2,
    "never": 1,
}
_PAGE: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 14\r\n\r\n<h1>Hello</h1>"
_ERROR: Final = b"HTTP/1.1 %d Oops\r\nContent-Length: 4\r\n\r\noops"


class FaultyProxy:
    """Serves on a port of its own, in a thread; ``faults`` counts what it has done."""

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
            while not self._stop.is_set():  # noqa: ASYNC110  # it is set in another thread
                await anyio.sleep(0.02)
            tasks.cancel_scope.cancel()

    async def _serve(self, client: ByteStream) -> None:
        buffered = BufferedByteReceiveStream(client)
        async with client:
            # Closed in the end as by a reset, whoever may still want to send.
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
        """Pass one request on, and answer it; whether the connection can go on."""
        request = await _message(requests)
        fault = self._draw()
        if fault == "reset before the server sees it":
            return False
        async with await anyio.connect_tcp("127.0.0.1", self._target) as upstream:
            await upstream.send(request)
            answer = await _message(BufferedByteReceiveStream(upstream))
        if fault == "reset after the server has seen it":
            return False
        if fault == "never":
            await anyio.sleep(3)
            return False
        if fault == "late":
            await anyio.sleep(self._random.uniform(0.05, 0.6))
        if fault == "trickling":
            piece = max(1, len(answer) // 20)
            for at in range(0, len(answer), piece):
                await client.send(answer[at : at + piece])
                await anyio.sleep(0.01)
            return True
        instead = {
            "cut in the middle": answer[: self._random.randrange(1, len(answer))],
            "sent twice": answer + answer,
            "garbage in front": b"\x00\xffgarbage\r\n" + answer,
            "a page in its place": _PAGE,
            "a 500 in its place": _ERROR % 500,
            "a 503 in its place": _ERROR % 503,
        }
        await client.send(instead.get(fault, answer))
        return fault != "cut in the middle"

    def _draw(self) -> str:
        drawn = self._random.uniform(0, 100)
        for fault, share in FAULTS.items():
            drawn -= share
            if drawn < 0:
                self.faults[fault] += 1
                return fault
        return ""


async def _message(stream: BufferedByteReceiveStream) -> bytes:
    """Read one message with a Content-Length, or without a body."""
    head = await stream.receive_until(b"\r\n\r\n", 65_536) + b"\r\n\r\n"
    length = 0
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            length = int(line.partition(b":")[2])
    return head + await stream.receive_exactly(length)
