"""An HTTP server on a real socket that counts its connections; the path selects the response."""

import asyncio
import contextlib
import gzip
import itertools
import ssl
import threading
import time
from collections.abc import Coroutine
from typing import Any, Self

import attrs


@attrs.frozen
class ReceivedRequest:
    """A request as received; ``connection`` is the number of its connection, starting at 1."""

    connection: int
    method: str
    target: str
    headers: dict[str, str]
    body: bytes


class Loopback:
    """An HTTP/1.1 server on 127.0.0.1, in its own thread, while its context is open.

    ``/`` returns ``{}``; ``/sleep/0.01`` the same after a delay; ``/hold`` the same after ``release()``;
    ``/drop`` the same, and then closes the connection without notice; ``/cut`` returns half a body,
    ``/endless`` an endless body, ``/gzip/1000`` as many zeros, compressed, and
    ``/gzip/1000/2`` the same compressed twice. ``X-Connection`` is the number of the connection.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self._numbers = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stopped = asyncio.Event()
        self._released = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._run, name="loopback")
        self.port = 0
        self.requests: list[ReceivedRequest] = []
        self.arrived = threading.Semaphore(0)  # released once per request
        self.open = 0  # current connections
        self.max_open = 0
        self.busy = 0  # current requests
        self.max_busy = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    @property
    def url(self) -> str:
        """The base URL of the server."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def connections(self) -> list[int]:
        """The number of each request's connection."""
        return [request.connection for request in self.requests]

    def release(self) -> None:
        """Let the requests for ``/hold`` continue."""
        self._loop.call_soon_threadsafe(self._released.set)

    def drop_connections(self) -> None:
        """Close all open connections."""

        async def drop() -> None:
            for writer in self._writers:
                writer.close()

        asyncio.run_coroutine_threadsafe(drop(), self._loop).result(5)

    def settled(self, *, at_most: int) -> int:
        """Wait up to 5 s until at most this many connections are open; return their number."""
        until = time.monotonic() + 5
        while self.open > at_most and time.monotonic() < until:
            time.sleep(0.005)
        return self.open

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=self._tls, backlog=200)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stopped.wait()
        server.close()
        handlers = asyncio.all_tasks() - {asyncio.current_task()}
        while handlers:  # until all have ended, including held requests
            for handler in handlers:
                handler.cancel()
            for writer in self._writers:
                writer.transport.abort()
            await asyncio.wait(handlers, timeout=0.1)
            handlers = asyncio.all_tasks() - {asyncio.current_task()}

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = next(self._numbers)
        self._writers.add(writer)
        self.open += 1
        self.max_open = max(self.max_open, self.open)
        try:
            # Raised if the client disconnects, by the paths that hang up, and when the server stops. Before
            # Python 3.12, asyncio logs a handler that ends canceled as an error.
            with contextlib.suppress(asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
                while True:
                    await self._request(number, reader, writer)
        finally:
            self._writers.discard(writer)
            writer.close()
            try:
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
            finally:
                self.open -= 1  # only now has the client been notified

    async def _request(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        method, target, _ = first.split(" ")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        request = ReceivedRequest(number, method, target, headers, body)
        self.requests.append(request)
        self.arrived.release()
        self.busy += 1
        self.max_busy = max(self.max_busy, self.busy)
        try:
            await self.respond(request, reader, writer)
            await writer.drain()
        finally:
            self.busy -= 1

    async def respond(
        self, request: ReceivedRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Respond to a request; raising ConnectionError closes the connection."""
        body, encoding = b"{}", ""
        match request.target.split("/")[1:]:
            case ["sleep", seconds]:
                await _unless_disconnected(asyncio.sleep(float(seconds)), reader)
            case ["hold"]:
                await _unless_disconnected(self._released.wait(), reader)
            case ["endless"]:
                await _write_endless(writer)
            case ["gzip", size, *layers]:
                body = bytes(int(size))
                names = ["gzip"] * int(layers[0] if layers else 1)
                for _ in names:
                    body = gzip.compress(body)
                encoding = f"Content-Encoding: {', '.join(names)}\r\n"
        length = f"Content-Length: {len(body) * (2 if request.target == '/cut' else 1)}\r\n"
        head = f"HTTP/1.1 200 OK\r\nX-Connection: {request.connection}\r\n{encoding}{length}\r\n"
        writer.write(head.encode() + body)
        if request.target in {"/drop", "/cut"}:
            await writer.drain()
            raise ConnectionAbortedError


async def _unless_disconnected(wait: Coroutine[Any, Any, object], reader: asyncio.StreamReader) -> None:
    """Wait, but stop if the client disconnects; it sends nothing else meanwhile."""
    if await first_of(wait, reader.read(1)) == 1:
        raise ConnectionAbortedError


async def first_of(*waits: Coroutine[Any, Any, object]) -> int:
    """Return the index of the coroutine that ends first; cancel the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return [task.done() for task in tasks].index(True)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _write_endless(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"400\r\n" + bytes(1024) + b"\r\n")
        await writer.drain()
