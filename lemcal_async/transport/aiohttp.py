"""The fastest transport: aiohttp's connector and parser. Needs the extra ``aiohttp``, and asyncio.

>>> from lemcal_async.transport.aiohttp import AiohttpTransport
>>> lemcal = AsyncLemcal(transport=AiohttpTransport())

The connector opens the connections and the parser reads the answers; there is no session above them, so
there are no cookies, redirects, retries or decompression of aiohttp's own.
"""

import asyncio
import functools
import re
from typing import Any

try:
    import aiohttp
    import aiohttp.http
    import yarl
except ModuleNotFoundError as error:
    if error.name not in {"aiohttp", "yarl"}:
        raise
    raise ImportError("AiohttpTransport needs its extra: pip install 'lemcal-async[aiohttp]'") from None

import attrs
import httpx
from anyio.lowlevel import current_token

from lemcal_async.errors import ConfigurationError
from lemcal_async.transport._environment import MakeContext
from lemcal_async.transport._http11 import MOST_INTERIM, TOO_MANY_INTERIM
from lemcal_async.transport._network import UNASKED, readable_check
from lemcal_async.transport._pooled import Answer, BasePooledTransport, Target, httpx_context

_NO_TIMEOUT = aiohttp.ClientTimeout(total=None)
_LONGEST_LINE = 2**16  # bytes of one header that a server may send
_BUFFER = 2**18  # bytes of a body that are received ahead of its reader
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_BROKEN = (aiohttp.http.HttpProcessingError, aiohttp.ClientPayloadError)
# In this order: the first that fits. What is left over is the network's.
_KINDS: list[tuple[type[BaseException] | tuple[type[BaseException], ...], type[httpx.RequestError]]] = [
    (aiohttp.ClientHttpProxyError, httpx.ProxyError),
    (aiohttp.ConnectionTimeoutError, httpx.ConnectTimeout),
    (aiohttp.ServerTimeoutError, httpx.ReadTimeout),
    (aiohttp.ClientConnectorError, httpx.ConnectError),
    ((aiohttp.ServerDisconnectedError, *_BROKEN), httpx.RemoteProtocolError),
    ((aiohttp.ClientError, OSError), httpx.ReadError),
]


class AiohttpTransport(BasePooledTransport):
    """Does what ``PooledTransport`` does, with the same options, on aiohttp; on asyncio only.

    Requests, responses and errors stay those of httpx. Proxies are ``http://`` or ``https://`` ones. Like
    every transport that is passed to a client, it is the caller's to close.

    Args:
        max_connections: How many connections there can be at once, per event loop.
        keepalive: Seconds after which an idle connection is closed, at the next use of the transport.
        ssl_context: What TLS is set up with; if left out, one for the whole process.
        trust_env: Whether the system's proxies (``HTTPS_PROXY``, ``NO_PROXY`` …) and certificates
            (``SSL_CERT_FILE``, ``SSL_CERT_DIR``) are used.

    Raises:
        ConfigurationError: For arguments that cannot work, and by its requests on trio.
    """

    _proxy_hint = "it must be an http:// or https:// URL"

    @property
    def _make_context(self) -> MakeContext:
        return httpx_context

    async def _open(self, target: Target) -> "_Connection":
        if not isinstance(current_token().native_token, asyncio.AbstractEventLoop):
            raise ConfigurationError(
                "AiohttpTransport runs on asyncio only; on trio use PooledTransport or HTTPX2Transport"
            )
        return _Connection(target)

    async def _send(self, connection: "_Connection", request: httpx.Request) -> Answer:
        timeouts = request.extensions.get("timeout", {})
        if connection.handle is None:
            await connection.open(timeouts.get("connect"))
        return await connection.send(request, timeouts)

    def _is_clean(self, connection: "_Connection") -> bool:
        return not connection.protocol.should_close

    def _translate(self, error: BaseException) -> httpx.RequestError | None:
        for theirs, ours in _KINDS:
            if isinstance(error, theirs):
                # aiohttp quotes what it could read or not, which may be personal data.
                if isinstance(error, aiohttp.ServerDisconnectedError):
                    return ours("the server closed the connection without sending an answer")
                return ours("the answer is not valid HTTP" if isinstance(error, _BROKEN) else str(error))
        return None


class _Connection:
    """A connection to one origin, for one request at a time."""

    def __init__(self, target: Target) -> None:
        loop = asyncio.get_running_loop()
        self.handle: aiohttp.connector.Connection | None = None  # until it is open
        self._payload: Any = None  # of the answer under way
        # What the connector needs to know, and no more: each request is written below.
        self._origin = aiohttp.ClientRequest(
            "GET",
            yarl.URL.build(scheme=target.scheme, host=target.host, port=target.port),
            loop=loop,
            ssl=target.tls or target.proxy_tls or True,
        )
        self._through_proxy: bytes | None = None  # what each request begins with, if it goes to a proxy
        self._proxy_authorization = b""
        if target.proxy is not None:
            self._use_proxy(httpx.Proxy(target.proxy.reveal()), target)

    def _use_proxy(self, proxy: httpx.Proxy, target: Target) -> None:
        if proxy.url.scheme not in ("http", "https"):
            raise ValueError("not a proxy that aiohttp can use")
        credentials = ""
        if proxy.raw_auth is not None:
            user, password = (part.decode("latin-1") for part in proxy.raw_auth)
            basic: Any = httpx.BasicAuth(user, password)
            credentials = basic._auth_header  # noqa: SLF001 - where it is written
        headers = {"Proxy-Authorization": credentials} if credentials else {}
        url = yarl.URL.build(scheme=proxy.url.scheme, host=proxy.url.host, port=proxy.url.port)
        self._origin.update_proxy(url, None, headers)
        if target.scheme == "http":
            self._through_proxy = str(self._origin.url).rstrip("/").encode("ascii")
            self._proxy_authorization = credentials.encode("ascii")

    @property
    def protocol(self) -> Any:
        """What reads the answers."""
        assert self.handle is not None  # noqa: S101 - for the type checker
        return self.handle.protocol

    def is_closed(self) -> bool:
        """Whether it cannot be used any more."""
        protocol = None if self.handle is None else self.protocol
        return protocol is None or not protocol.is_connected()

    def has_expired(self) -> bool:
        """Whether something has arrived that answers no request, or the other side has gone."""
        return self.protocol.should_close or self._is_readable()

    async def aclose(self) -> None:
        """Close, without waiting for the other side."""
        handle, self.handle = self.handle, None
        if handle is None or handle.protocol is None:
            return
        if handle.transport is not None:
            handle.transport.abort()
        handle.close()
        if self._payload is not None and not self._payload.is_eof():
            self._payload.set_exception(aiohttp.ServerDisconnectedError("the connection was closed"))
        await asyncio.sleep(0)  # for the socket is closed with the next turn of the event loop

    async def open(self, timeout: float | None) -> None:  # noqa: ASYNC109 - of this one step
        """Connect. A connector of its own for each costs little, and belongs to no loop but this."""
        connector = aiohttp.TCPConnector(limit=0, use_dns_cache=False, resolver=aiohttp.ThreadedResolver())
        try:
            async with asyncio.timeout(timeout):
                self.handle = await connector.connect(self._origin, [], _NO_TIMEOUT)
        except TimeoutError as error:
            raise httpx.ConnectTimeout(str(error)) from error
        except UnicodeError as error:  # of a host name that cannot be
            raise httpx.ConnectError(str(error)) from error
        self._is_readable = readable_check(self.protocol.transport.get_extra_info("socket"))
        closed = self.protocol.closed
        if closed is not None:  # it is not gone already
            closed.add_done_callback(self._end_payload)

    def _end_payload(self, closed: "asyncio.Future[None]") -> None:
        """End a body that broke off: where aiohttp cannot read on, it leaves its reader waiting for ever."""
        closed.exception()  # or it would be logged
        if self._payload is not None and not self._payload.is_eof() and self._payload.exception() is None:
            self._payload.set_exception(aiohttp.ClientPayloadError())

    async def send(self, request: httpx.Request, timeouts: dict[str, float | None]) -> Answer:
        """Send a request, and return its answer when the head is there."""
        head, chunked = self._head_of(request)
        if isinstance(request.stream, httpx.ByteStream) and not chunked:
            body, parts = b"".join(request.stream), None
        else:
            body, parts = b"", request.stream
        await _trace(request, "send_request_headers.started")
        protocol = self.protocol
        if protocol is None or protocol.should_close:  # the trace may have taken its time
            raise httpx.RemoteProtocolError(UNASKED)
        protocol.set_response_params(
            skip_payload=request.method == "HEAD",
            read_until_eof=True,
            auto_decompress=False,
            read_timeout=timeouts.get("read"),
            read_bufsize=_BUFFER,
            max_line_size=_LONGEST_LINE,
            max_field_size=_LONGEST_LINE,
        )
        write_timeout = timeouts.get("write")
        await self._write(head + body, write_timeout)
        if parts is not None:
            pieces: Any = parts
            async for part in pieces:
                if part:
                    await self._write(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part, write_timeout)
            if chunked:
                await self._write(b"0\r\n\r\n", write_timeout)
        protocol.start_timeout()
        message, self._payload = await protocol.read()
        interim = 0
        while message.code < 200 and message.code != 101:
            interim += 1
            if interim > MOST_INTERIM:
                raise httpx.RemoteProtocolError(TOO_MANY_INTERIM)
            protocol.start_timeout()  # which ends with each answer
            message, self._payload = await protocol.read()
        extensions = {
            "http_version": b"HTTP/%d.%d" % message.version,
            "reason_phrase": message.reason.encode("latin-1", "replace"),
        }
        return _Answer(message.code, message.raw_headers, _Stream(self._payload), extensions)

    def _head_of(self, request: httpx.Request) -> tuple[bytes, bool]:
        """Return the head of a request, and whether its body is chunked; raise LocalProtocolError."""
        target = (self._through_proxy or b"") + request.url.raw_path
        lines = [b"%b %b HTTP/1.1" % (request.method.encode("ascii"), target)]
        chunked = False
        for name, value in request.headers.raw:
            _check_name(name)
            lines.append(name + b": " + value)
            chunked = chunked or (name.lower() == b"transfer-encoding" and value.lower() == b"chunked")
        if self._proxy_authorization:
            lines.append(b"Proxy-Authorization: " + self._proxy_authorization)
        head = b"\r\n".join(lines)
        breaks = len(lines) - 1
        if head.count(b"\n") != breaks or head.count(b"\r") != breaks or b"\0" in head or b" " in target:
            raise httpx.LocalProtocolError("the request has a line break in a header or in its target")
        _check_name(request.method.encode("ascii"))
        return head + b"\r\n\r\n", chunked

    async def _write(self, data: bytes, timeout: float | None) -> None:  # noqa: ASYNC109 - of this one step
        protocol = self.protocol
        transport = None if protocol is None else protocol.transport
        # A server may have answered and hung up: the answer says why.
        if not data or protocol is None or transport is None or transport.is_closing():
            return
        transport.write(data)
        if protocol.writing_paused:
            try:
                async with asyncio.timeout(timeout):
                    await aiohttp.http.StreamWriter(protocol, asyncio.get_running_loop()).drain()
            except TimeoutError as error:
                raise httpx.WriteTimeout(str(error)) from error


@functools.lru_cache(maxsize=256)
def _check_name(name: bytes) -> None:
    if re.fullmatch(_TOKEN, name) is None:
        raise httpx.LocalProtocolError(f"{name!r} cannot be the name of a header or of a method")


async def _trace(request: httpx.Request, event: str) -> None:
    """Report what happens as httpcore does."""
    trace = request.extensions.get("trace")
    if trace is not None:
        await trace(f"http11.{event}", {"request": request})


@attrs.frozen
class _Answer:
    status: int
    headers: Any
    stream: "_Stream"
    extensions: dict[str, Any]


@attrs.frozen
class _Stream:
    """The body, as it was sent: an iterator, of which nothing is left when it breaks off."""

    _payload: Any

    def __aiter__(self) -> "_Stream":
        return self

    async def __anext__(self) -> bytes:
        while not self._payload.at_eof():
            part: bytes = await self._payload.readany()
            if part:
                return part
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Do nothing: the connection knows by itself that the body has been read."""
