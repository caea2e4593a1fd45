"""HTTP/1.1 over one byte stream, by h11: what the package's own wires speak to a server they reach directly.

httpcore's connections do the same for twice the CPU: their locks guard against requests that share a
connection, which the pool never lets happen, and each lets other tasks run. They remain in use behind
proxies.
"""

import math
import re
import time
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import h11
import httpx

from lemcal_async.transport._network import DEFAULT_PORTS

if TYPE_CHECKING:
    from lemcal_async.transport._network import NetworkBackend
    from lemcal_async.transport._pooled import Target

_AT_ONCE = 2**16  # bytes to read at once
_LONGEST_HEAD = 100 * 1024  # bytes
# A request that meets the server's close may have been carried out or not, and a POST is lost to its caller.
_BEFORE_IT_CLOSES = 1.0  # seconds
_KEEP_ALIVE = re.compile(rb"\btimeout\s*=\s*\"?(\d{1,9})\b", re.IGNORECASE)
MOST_INTERIM = 100  # answers of status 1xx before the one to a request
TOO_MANY_INTERIM = f"the server sent over {MOST_INTERIM} interim answers (1xx)"
_END = h11.EndOfMessage()


class HTTP11Connection:
    """A connection to one origin, for one request at a time. It opens with its first request."""

    def __init__(self, target: "Target", core: ModuleType, backend: "NetworkBackend") -> None:
        self._target = target
        self._core = core  # httpcore or its fork, whose errors the streams raise
        self._backend = backend
        self._stream: Any = None  # until it is open
        self._is_closed = False
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=_LONGEST_HEAD)
        self._has_failed = False  # to write a whole request
        self._idle_seconds = math.inf  # for which the server leaves it open
        self._usable_until = math.inf

    def is_closed(self) -> bool:
        """Whether it cannot be used any more."""
        return self._is_closed

    def has_expired(self) -> bool:
        """Whether something has arrived that answers no request, or the other side has gone, or soon will."""
        return time.monotonic() >= self._usable_until or bool(self._stream.get_extra_info("is_readable"))

    async def aclose(self) -> None:
        """Close, without waiting for the other side."""
        self._is_closed = True
        if self._stream is not None:
            await self._stream.aclose()

    def as_httpcore(self) -> Any:
        """Return httpcore's own connection to the same place, for a test that mocks those."""
        core: Any = self._core
        target = self._target
        origin = core.URL(scheme=target.scheme, host=target.host, port=target.port, target="/").origin
        return core.AsyncHTTPConnection(origin, ssl_context=target.tls, network_backend=self._backend)

    def make_ready(self) -> bool:
        """Whether there can be another request, and nothing is left of the answer to this one."""
        are_done = self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE
        if self._has_failed or not are_done or self._h11.trailing_data != (b"", False):
            return False
        self._h11.start_next_cycle()
        self._usable_until = time.monotonic() + self._idle_seconds - _BEFORE_IT_CLOSES
        return True

    async def send(self, request: httpx.Request) -> "HTTP11Answer":
        """Send a request, and return its answer when the head is there.

        Raises errors of httpcore, of h11 or of httpx.
        To the request's ``trace`` extension it reports what httpcore does.
        """
        timeouts = request.extensions.get("timeout", {})
        if self._stream is None:
            await self._connect(request, timeouts.get("connect"))
        try:
            await self._write(request, timeouts.get("write"))
        except self._core.WriteError:
            self._has_failed = True  # a server may have answered and hung up: the answer says why
        await _trace(request, "http11.receive_response_headers.started")
        answer = await self._receive_head(request, timeouts.get("read"))
        await _trace(request, "http11.receive_response_headers.complete")
        return answer

    async def _connect(self, request: httpx.Request, timeout: float | None) -> None:  # noqa: ASYNC109 - of each step
        target = self._target
        port = DEFAULT_PORTS[target.scheme] if target.port is None else target.port
        await _trace(request, "connection.connect_tcp.started")
        self._stream = await self._backend.connect_tcp(target.host, port, timeout)
        await _trace(request, "connection.connect_tcp.complete")
        if target.tls is None:
            return
        target.tls.set_alpn_protocols(["http/1.1"])
        name = request.extensions.get("sni_hostname") or target.host
        await _trace(request, "connection.start_tls.started")
        self._stream = await self._stream.start_tls(target.tls, name, timeout)
        await _trace(request, "connection.start_tls.complete")

    async def _write(self, request: httpx.Request, timeout: float | None) -> None:  # noqa: ASYNC109 - of each step
        stream = request.stream
        head = h11.Request(method=request.method, target=request.url.raw_path, headers=request.headers.raw)
        data = self._h11.send(head)
        in_one_piece = False
        if isinstance(stream, httpx.ByteStream):
            in_one_piece = True
            parts = [self._h11.send(h11.Data(part)) for part in stream if part]
            data = b"".join([data, *parts, self._h11.send(_END)])
        await _trace(request, "http11.send_request_headers.started")
        await self._stream.write(data, timeout)
        await _trace(request, "http11.send_request_headers.complete")
        await _trace(request, "http11.send_request_body.started")
        if not in_one_piece:
            await self._write_parts(cast("httpx.AsyncByteStream", stream), timeout)
        await _trace(request, "http11.send_request_body.complete")

    async def _write_parts(self, stream: httpx.AsyncByteStream, timeout: float | None) -> None:  # noqa: ASYNC109
        parts = aiter(stream)
        try:
            async for part in parts:
                if part:
                    await self._stream.write(self._h11.send(h11.Data(part)), timeout)
        finally:
            # A generator that was left half way would be garbage.
            if close := getattr(parts, "aclose", None):
                await close()
        await self._stream.write(self._h11.send(_END), timeout)

    async def _receive_head(self, request: httpx.Request, timeout: float | None) -> "HTTP11Answer":  # noqa: ASYNC109
        self._take_in(await self._stream.read(_AT_ONCE, timeout))  # h11 has nothing yet
        for _ in range(MOST_INTERIM + 1):
            event = await self.event(timeout)
            if not isinstance(event, h11.InformationalResponse) or event.status_code == 101:
                answer = HTTP11Answer(self, request, event, self._stream)
                self._idle_seconds = _idle_seconds(answer.headers)
                return answer
        raise httpx.RemoteProtocolError(TOO_MANY_INTERIM)

    async def event(self, timeout: float | None) -> Any:  # noqa: ASYNC109 - of each read
        """Return what h11 makes of what arrives next."""
        event = self._h11.next_event()
        while event is h11.NEED_DATA:
            self._take_in(await self._stream.read(_AT_ONCE, timeout))
            event = self._h11.next_event()
        return event

    def _take_in(self, data: bytes) -> None:
        if not data and self._h11.their_state is h11.SEND_RESPONSE:
            raise httpx.RemoteProtocolError("the server closed the connection without sending an answer")
        self._h11.receive_data(data)


class HTTP11Answer:
    """An answer whose body is still to be read: an iterator, of which nothing is left when it breaks off."""

    def __init__(
        self,
        connection: HTTP11Connection,
        request: httpx.Request,
        head: h11.Response | h11.InformationalResponse,
        network_stream: Any,
    ) -> None:
        self.status = head.status_code
        self.headers = head.headers.raw_items()
        self.extensions = {
            "http_version": b"HTTP/" + head.http_version,
            "reason_phrase": head.reason,
            "network_stream": network_stream,
        }
        self._connection = connection
        self._request = request
        self._timeout = request.extensions.get("timeout", {}).get("read")
        self._has_begun = False

    @property
    def stream(self) -> "HTTP11Answer":
        """What to read the body from: itself."""
        return self

    def __aiter__(self) -> "HTTP11Answer":
        return self

    async def __anext__(self) -> bytes:
        if not self._has_begun:
            self._has_begun = True
            await _trace(self._request, "http11.receive_response_body.started")
        event = await self._connection.event(self._timeout)
        if isinstance(event, h11.Data):
            return bytes(event.data)
        await _trace(self._request, "http11.receive_response_body.complete")
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Report that the answer is done with; the connection is the pool's business."""
        await _trace(self._request, "http11.response_closed.complete")


def _idle_seconds(headers: list[tuple[bytes, bytes]]) -> float:
    """Return for how long the server leaves the connection open between two requests, if it says so."""
    for name, value in headers:
        is_it = len(name) == len("keep-alive") and name.lower() == b"keep-alive"  # of most, a look will do
        if is_it and (found := _KEEP_ALIVE.search(value)):
            return int(found[1])
    return math.inf


async def _trace(request: httpx.Request, event: str) -> None:
    """Report to a request's ``trace`` extension, if it has one."""
    callback = request.extensions.get("trace")
    if callback is not None:
        await callback(event, {"request": request})
