"""A TCP proxy in front of a server that does to connections what bad networks and gateways do."""

import asyncio
import random
import threading
from collections import Counter
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Callable

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
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.05))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._exchange(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError, ValueError):
            pass
        finally:
            _reset(writer)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Pass one request on, and answer it; whether the connection can go on."""
        request = await _message(reader)
        fault = self._draw()
        if fault == "reset before the server sees it":
            return False
        upstream = await asyncio.open_connection("127.0.0.1", self._target)
        try:
            upstream[1].write(request)
            answer = await _message(upstream[0])
        finally:
            upstream[1].close()
        act: dict[str, Callable[[], bytes]] = {
            "cut in the middle": lambda: answer[: self._random.randrange(1, len(answer))],
            "sent twice": lambda: answer + answer,
            "garbage in front": lambda: b"\x00\xffgarbage\r\n" + answer,
            "a page in its place": lambda: _PAGE,
            "a 500 in its place": lambda: _ERROR % 500,
            "a 503 in its place": lambda: _ERROR % 503,
        }
        if fault == "reset after the server has seen it":
            return False
        if fault == "never":
            await asyncio.sleep(3)
            return False
        if fault == "late":
            await asyncio.sleep(self._random.uniform(0.05, 0.6))
        if fault == "trickling":
            for at in range(0, len(answer), max(1, len(answer) // 20)):
                writer.write(answer[at : at + max(1, len(answer) // 20)])
                await writer.drain()
                await asyncio.sleep(0.01)
            return True
        writer.write(act[fault]() if fault in act else answer)
        await writer.drain()
        return fault != "cut in the middle"

    def _draw(self) -> str:
        drawn = self._random.uniform(0, 100)
        for fault, share in FAULTS.items():
            drawn -= share
            if drawn < 0:
                self.faults[fault] += 1
                return fault
        return ""


async def _message(reader: asyncio.StreamReader) -> bytes:
    """Read one message with a Content-Length, or without a body."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = 0
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            length = int(line.partition(b":")[2])
    return head + await reader.readexactly(length)


def _reset(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
