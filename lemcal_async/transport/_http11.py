"""HTTP/1.1 connections on h11, for ``PooledTransport`` and ``HTTPX2Transport`` unless a proxy is configured.

httpcore's connections, which remain in use behind proxies, take twice the CPU. Their locks protect against
concurrent requests on a connection, which the pool prevents anyway, and each lock yields to the event loop.
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

_READ_SIZE = 2**16  # bytes
_MAX_HEAD_SIZE = 100 * 1024  # bytes
# Do not reuse a connection that the server is about to close: the server may or may not process a request
# sent then, and a POST cannot be retried.
_KEEP_ALIVE_MARGIN = 1.0  # seconds
_KEEP_ALIVE = re.compile(rb"\btimeout\s*=\s*\"?(\d{1,9})\b", re.IGNORECASE)
MAX_INTERIM_RESPONSES = 100  # 1xx responses before a final response
TOO_MANY_INTERIM_RESPONSES = f"the server sent over {MAX_INTERIM_RESPONSES} interim responses (1xx)"
_END = h11.EndOfMessage()


class HTTP11Connection:
    """A connection to one origin, for one request at a time. The first request opens it."""

    def __init__(self, target: "Target", core: ModuleType, backend: "NetworkBackend") -> None:
        self._target = target
        self._core = core  # httpcore or its fork, for the streams' exceptions
        self._backend = backend
        self._stream: Any = None  # until it is open
        self._is_closed = False
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_SIZE)
        self._write_failed = False
        self._idle_timeout = math.inf  # the server's, in seconds
        self._usable_until = math.inf

    def is_closed(self) -> bool:
        """Whether the connection was closed."""
        return self._is_closed

    def has_expired(self) -> bool:
        """Whether unsolicited data has arrived, or the server has closed the connection or soon will."""
        return time.monotonic() >= self._usable_until or bool(self._stream.get_extra_info("is_readable"))

    async def aclose(self) -> None:
        """Close the connection without waiting for the server."""
        self._is_closed = True
        if self._stream is not None:
            await self._stream.aclose()

    def as_httpcore(self) -> Any:
        """Return an httpcore connection to the same target, for tests that mock httpcore."""
        core: Any = self._core
        target = self._target
        origin = core.URL(scheme=target.scheme, host=target.host, port=target.port, target="/").origin
        return core.AsyncHTTPConnection(origin, ssl_context=target.tls, network_backend=self._backend)

    def make_ready(self) -> bool:
        """Prepare for another request; False if the connection cannot be reused or has unread data."""
        both_done = self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE
        if self._write_failed or not both_done or self._h11.trailing_data != (b"", False):
            return False
        self._h11.start_next_cycle()
        self._usable_until = time.monotonic() + self._idle_timeout - _KEEP_ALIVE_MARGIN
        return True

    async def send(self, request: httpx.Request) -> "HTTP11Response":
        """Send a request, and return the response once its head has arrived.

        Raises errors of httpcore, h11 or httpx, and reports httpcore's events to the ``trace`` extension.
        """
        timeouts = request.extensions.get("timeout", {})
        if self._stream is None:
            await self._connect(request, timeouts.get("connect"))
        try:
            await self._write(request, timeouts.get("write"))
        except self._core.WriteError:
            self._write_failed = True  # the server may have sent a response before closing: it says why
        await _trace(request, "http11.receive_response_headers.started")
        response = await self._receive_head(request, timeouts.get("read"))
        await _trace(request, "http11.receive_response_headers.complete")
        return response

    async def _connect(self, request: httpx.Request, timeout: float | None) -> None:  # noqa: ASYNC109 - per operation
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

    async def _write(self, request: httpx.Request, timeout: float | None) -> None:  # noqa: ASYNC109 - per operation
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
            # An unfinished async generator would be left to the garbage collector.
            if close := getattr(parts, "aclose", None):
                await close()
        await self._stream.write(self._h11.send(_END), timeout)

    async def _receive_head(self, request: httpx.Request, timeout: float | None) -> "HTTP11Response":  # noqa: ASYNC109
        self._feed(await self._stream.read(_READ_SIZE, timeout))  # h11 has no data yet
        for _ in range(MAX_INTERIM_RESPONSES + 1):
            event = await self.event(timeout)
            if not isinstance(event, h11.InformationalResponse) or event.status_code == 101:
                response = HTTP11Response(self, request, event, self._stream)
                self._idle_timeout = _idle_timeout(response.headers)
                return response
        raise httpx.RemoteProtocolError(TOO_MANY_INTERIM_RESPONSES)

    async def event(self, timeout: float | None) -> Any:  # noqa: ASYNC109 - per read
        """Return h11's next event, reading from the stream as needed."""
        event = self._h11.next_event()
        while event is h11.NEED_DATA:
            self._feed(await self._stream.read(_READ_SIZE, timeout))
            event = self._h11.next_event()
        return event

    def _feed(self, data: bytes) -> None:
        if not data and self._h11.their_state is h11.SEND_RESPONSE:
            raise httpx.RemoteProtocolError("the server closed the connection without sending a response")
        self._h11.receive_data(data)


class HTTP11Response:
    """A response whose body has not been read. An iterator, because it needs no cleanup if abandoned."""

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
        self._has_started = False

    @property
    def stream(self) -> "HTTP11Response":
        """The iterator over the body: the response itself."""
        return self

    def __aiter__(self) -> "HTTP11Response":
        return self

    async def __anext__(self) -> bytes:
        if not self._has_started:
            self._has_started = True
            await _trace(self._request, "http11.receive_response_body.started")
        event = await self._connection.event(self._timeout)
        if isinstance(event, h11.Data):
            return bytes(event.data)
        await _trace(self._request, "http11.receive_response_body.complete")
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Report the end of the response; the pool takes care of the connection."""
        await _trace(self._request, "http11.response_closed.complete")


def _idle_timeout(headers: list[tuple[bytes, bytes]]) -> float:
    """Return the idle timeout in the ``Keep-Alive`` header, in seconds; infinity if there is none."""
    for name, value in headers:
        # Comparing the lengths first is faster.
        is_keep_alive = len(name) == len("keep-alive") and name.lower() == b"keep-alive"
        if is_keep_alive and (match := _KEEP_ALIVE.search(value)):
            return int(match[1])
    return math.inf


async def _trace(request: httpx.Request, event: str) -> None:
    """Call a request's ``trace`` extension, if it has one."""
    callback = request.extensions.get("trace")
    if callback is not None:
        await callback(event, {"request": request})
