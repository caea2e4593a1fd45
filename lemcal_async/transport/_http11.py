"""HTTP/1.1 over one byte stream: what the package's own wires speak to a server they reach directly.

httpcore's connections do the same for twice the CPU: their locks guard against requests that share a
connection, which the pool never lets happen, and each lets other tasks run. They remain in use behind
proxies. Plain exchanges (a body in one piece, an answer with a Content-Length and nothing unusual in its
head) are written and read here; h11 has all others, and is the judge of what is valid.
"""

import re
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import attrs
import h11
import httpx

if TYPE_CHECKING:
    from lemcal_async.transport._network import NetworkBackend
    from lemcal_async.transport._pooled import Target

_PORTS = {"http": 80, "https": 443}
_AT_ONCE = 2**16  # bytes to read at once
_LONGEST_HEAD = 100 * 1024  # bytes

# Both are narrower than what h11 lets pass.
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_FIELD = rb"(" + _TOKEN + rb"): ([!-~](?:[ -~]*[!-~])?)\r\n"
_REQUEST = re.compile(rb"[A-Z]+ [!-~]+ HTTP/1\.1\r\n(?:" + _FIELD + rb")+")
_STATUS = re.compile(rb"HTTP/1\.1 ([2-5][0-9]{2}) ([ -~]*)\r\n")
_FIELDS = re.compile(_FIELD)
_UNUSUAL = frozenset({b"connection", b"transfer-encoding", b"upgrade", b"expect", b"trailer", b"te"})
_NO_BODY = {204, 304}

_Headers = list[tuple[bytes, bytes]]


class HTTP11Connection:
    """A connection to one origin, for one request at a time. It opens with its first request."""

    def __init__(self, target: "Target", core: ModuleType, backend: "NetworkBackend") -> None:
        self._target = target
        self._core = core  # httpcore or its fork, whose errors the streams raise
        self._backend = backend
        self._stream: Any = None  # until it is open
        self._is_closed = False
        # Of the exchange under way: h11, unless it is a plain one; then what has arrived of the body, and how
        # many bytes are still to come.
        self._h11: h11.Connection | None = None
        self._arrived = b""
        self._missing = 0
        self._is_sent = False  # whether all of the request could be written

    def is_closed(self) -> bool:
        """Whether it cannot be used any more."""
        return self._is_closed

    def has_expired(self) -> bool:
        """Whether something has arrived that answers no request, or the other side has gone."""
        return bool(self._stream.get_extra_info("is_readable"))

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
        if self._h11 is None:
            return self._is_sent and not self._arrived and not self._missing
        are_done = self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE
        return are_done and self._h11.trailing_data == (b"", False)

    async def send(self, request: httpx.Request) -> "HTTP11Answer":
        """Send a request, and return its answer when the head is there.

        Raises errors of httpcore, of h11 or of httpx.
        To the request's ``trace`` extension it reports what httpcore does.
        """
        timeouts = request.extensions.get("timeout", {})
        if self._stream is None:
            await self._connect(request, timeouts.get("connect"))
        self._h11, self._is_sent = None, False
        try:
            await self._write(request, timeouts.get("write"))
            self._is_sent = True
        except self._core.WriteError:
            pass  # a server may have answered and hung up: the answer says why
        await _trace(request, "http11.receive_response_headers.started")
        answer = await self._receive_head(request, timeouts.get("read"))
        await _trace(request, "http11.receive_response_headers.complete")
        return answer

    async def _connect(self, request: httpx.Request, timeout: float | None) -> None:  # noqa: ASYNC109 - of each step
        target = self._target
        port = _PORTS[target.scheme] if target.port is None else target.port
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
        in_one_piece = isinstance(stream, httpx.ByteStream)
        data = (_plain_request(request) or self._with_h11(request)) if in_one_piece else self._begin(request)
        await _trace(request, "http11.send_request_headers.started")
        await self._stream.write(data, timeout)
        await _trace(request, "http11.send_request_headers.complete")
        await _trace(request, "http11.send_request_body.started")
        if not in_one_piece:
            assert self._h11 is not None  # noqa: S101 - for the type checker
            parts = aiter(cast("httpx.AsyncByteStream", stream))
            try:
                async for part in parts:
                    if part:
                        await self._stream.write(self._h11.send(h11.Data(part)), timeout)
            finally:
                # A generator that was left half way would be garbage.
                if close := getattr(parts, "aclose", None):
                    await close()
            await self._stream.write(self._h11.send(h11.EndOfMessage()), timeout)
        await _trace(request, "http11.send_request_body.complete")

    def _with_h11(self, request: httpx.Request) -> bytes:
        """Leave the exchange to h11; return the request, whose body is in one piece."""
        data = [self._begin(request)]
        assert self._h11 is not None  # noqa: S101 - for the type checker
        data += [self._h11.send(h11.Data(part)) for part in cast("httpx.ByteStream", request.stream) if part]
        return b"".join([*data, self._h11.send(h11.EndOfMessage())])

    def _begin(self, request: httpx.Request) -> bytes:
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=_LONGEST_HEAD)
        return self._h11.send(
            h11.Request(method=request.method, target=request.url.raw_path, headers=request.headers.raw)
        )

    async def _receive_head(self, request: httpx.Request, timeout: float | None) -> "HTTP11Answer":  # noqa: ASYNC109
        if self._h11 is None:
            data = await self._stream.read(_AT_ONCE, timeout)
            plain = _plain_head(data) if request.method not in ("HEAD", "CONNECT") else None
            if plain is not None:
                self._arrived, self._missing = data[plain.size :], plain.length
                return HTTP11Answer(self, request, plain, self._stream)
            self._with_h11(request)
            self._take_in(data)
        event = await self._event(timeout)
        while isinstance(event, h11.InformationalResponse) and event.status_code != 101:
            event = await self._event(timeout)
        head = _Head(event.status_code, event.reason, event.headers.raw_items(), event.http_version)
        return HTTP11Answer(self, request, head, self._stream)

    async def receive_body(self, timeout: float | None) -> bytes:  # noqa: ASYNC109 - of each read
        """Return what arrives next of the body, nothing at its end."""
        if self._h11 is not None:
            event = await self._event(timeout)
            return bytes(event.data) if isinstance(event, h11.Data) else b""
        if not self._missing:
            return b""
        data = self._arrived or await self._stream.read(_AT_ONCE, timeout)
        if not data:
            raise httpx.RemoteProtocolError(
                f"the server closed the connection when {self._missing} bytes of the body were missing"
            )
        part, self._arrived = data[: self._missing], data[self._missing :]
        self._missing -= len(part)
        return part

    async def _event(self, timeout: float | None) -> Any:  # noqa: ASYNC109 - of each read
        """Return what h11 makes of what arrives next."""
        assert self._h11 is not None  # noqa: S101 - for the type checker
        event = self._h11.next_event()
        while event is h11.NEED_DATA:
            self._take_in(await self._stream.read(_AT_ONCE, timeout))
            event = self._h11.next_event()
        return event

    def _take_in(self, data: bytes) -> None:
        assert self._h11 is not None  # noqa: S101 - for the type checker
        if not data and self._h11.their_state is h11.SEND_RESPONSE:
            raise httpx.RemoteProtocolError("the server closed the connection without sending an answer")
        self._h11.receive_data(data)


class HTTP11Answer:
    """An answer whose body is still to be read: an iterator, of which nothing is left when it breaks off."""

    def __init__(
        self, connection: HTTP11Connection, request: httpx.Request, head: "_Head", network_stream: Any
    ) -> None:
        self.status = head.status
        self.headers = head.headers
        self.extensions = {
            "http_version": b"HTTP/" + head.version,
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
        if part := await self._connection.receive_body(self._timeout):
            return part
        await _trace(self._request, "http11.receive_response_body.complete")
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Report that the answer is done with; the connection is the pool's business."""
        await _trace(self._request, "http11.response_closed.complete")


@attrs.frozen
class _Head:
    status: int
    reason: bytes
    headers: _Headers
    version: bytes = b"1.1"
    size: int = 0  # bytes, of a plain one
    length: int = 0  # of its body, in bytes


def _plain_request(request: httpx.Request) -> bytes | None:
    """Return a request in bytes, None if h11 should look at it."""
    body = b"".join(cast("httpx.ByteStream", request.stream))
    length = None
    hosts = 0
    lines = [b"%b %b HTTP/1.1\r\n" % (request.method.encode(), request.url.raw_path)]
    for name, value in request.headers.raw:
        lowered = name.lower()
        if lowered == b"host":
            hosts += 1
        elif lowered == b"content-length" and length is None:
            length = value
        elif lowered in _UNUSUAL and value.lower() != b"keep-alive":
            return None
        lines += name, b": ", value, b"\r\n"
    head = b"".join(lines)
    # A line break in a value would make two fields of one.
    breaks = 1 + len(request.headers.raw)
    if hosts != 1 or (length or b"0") != b"%d" % len(body) or head.count(b"\n") != breaks:
        return None
    if _REQUEST.fullmatch(head) is None:
        return None
    return head + b"\r\n" + body


def _plain_head(data: bytes) -> _Head | None:
    """Return the head with which ``data`` begins, None if h11 should look at it."""
    end = data.find(b"\r\n\r\n") + 2
    first = _STATUS.match(data)
    if first is None or end < 2:
        return None
    headers: _Headers = _FIELDS.findall(data, first.end(), end)
    size, length = first.end(), None
    for name, value in headers:
        size += len(name) + len(value) + 4
        lowered = name.lower()
        if lowered == b"content-length":
            if length is not None or re.fullmatch(rb"[0-9]{1,15}", value) is None:
                return None
            length = int(value)
        elif lowered in _UNUSUAL and value.lower() != b"keep-alive":
            return None
    status = int(first[1])
    if size != end or length is None or status in _NO_BODY:
        return None
    return _Head(status, first[2], headers, size=end + 2, length=length)


async def _trace(request: httpx.Request, event: str) -> None:
    """Report to a request's ``trace`` extension, if it has one."""
    callback = request.extensions.get("trace")
    if callback is not None:
        await callback(event, {"request": request})
