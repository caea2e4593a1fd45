"""The fastest transport: aiohttp's connector and parser. Requires the extra ``aiohttp``, and asyncio.

>>> from lemcal_async.transport.aiohttp import AiohttpTransport
>>> lemcal = AsyncLemcal(transport=AiohttpTransport())

aiohttp's connector opens the connections, and its parser reads the responses. No aiohttp session is used, so
aiohttp does not handle cookies, redirects, retries or decompression.
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
    raise ImportError(
        "AiohttpTransport requires the extra aiohttp: pip install 'lemcal-async[aiohttp]'"
    ) from None

import attrs
import httpx
from anyio.lowlevel import current_token

from lemcal_async.errors import ConfigurationError
from lemcal_async.transport._environment import MakeContext
from lemcal_async.transport._http11 import MAX_INTERIM_RESPONSES, TOO_MANY_INTERIM_RESPONSES
from lemcal_async.transport._network import UNSOLICITED_DATA, readable_check
from lemcal_async.transport._pooled import BasePooledTransport, Target, WireResponse, httpx_context

_NO_TIMEOUT = aiohttp.ClientTimeout(total=None)
_MAX_HEADER_SIZE = 2**16  # bytes of a single response header
_READ_BUFFER_SIZE = 2**18  # bytes of a body to receive ahead of its reader
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PROTOCOL_ERRORS = (aiohttp.http.HttpProcessingError, aiohttp.ClientPayloadError)
# The first match applies. The last entry covers any other network error.
_ERRORS: list[tuple[type[BaseException] | tuple[type[BaseException], ...], type[httpx.RequestError]]] = [
    (aiohttp.ClientHttpProxyError, httpx.ProxyError),
    (aiohttp.ConnectionTimeoutError, httpx.ConnectTimeout),
    (aiohttp.ServerTimeoutError, httpx.ReadTimeout),
    (aiohttp.ClientConnectorError, httpx.ConnectError),
    ((aiohttp.ServerDisconnectedError, *_PROTOCOL_ERRORS), httpx.RemoteProtocolError),
    ((aiohttp.ClientError, OSError), httpx.ReadError),
]


class AiohttpTransport(BasePooledTransport):
    """A transport like ``PooledTransport``, with the same options, built on aiohttp. Runs on asyncio only.

    Requests, responses and errors are still httpx's. Only ``http://`` and ``https://`` proxies are supported.
    Like any transport passed to a client, the caller is responsible for closing it.

    Args:
        max_connections: The maximum number of open connections per event loop.
        keepalive: Seconds after which an idle connection is closed, at the next use of the transport.
        ssl_context: The TLS context. Defaults to one shared by the whole process.
        trust_env: Whether to use the system's proxies (``HTTPS_PROXY``, ``NO_PROXY`` …) and certificates
            (``SSL_CERT_FILE``, ``SSL_CERT_DIR``).

    Raises:
        ConfigurationError: If an argument is invalid; by requests, if they run on trio.
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

    async def _send(self, connection: "_Connection", request: httpx.Request) -> WireResponse:
        timeouts = request.extensions.get("timeout", {})
        if connection.handle is None:
            await connection.open(timeouts.get("connect"))
        return await connection.send(request, timeouts)

    def _is_clean(self, connection: "_Connection") -> bool:
        return not connection.protocol.should_close

    def _translate(self, error: BaseException) -> httpx.RequestError | None:
        for aiohttp_error, httpx_error in _ERRORS:
            if isinstance(error, aiohttp_error):
                # aiohttp's messages quote received data, which may be personal.
                if isinstance(error, aiohttp.ServerDisconnectedError):
                    return httpx_error("the server closed the connection without sending a response")
                is_invalid = isinstance(error, _PROTOCOL_ERRORS)
                return httpx_error("the response is not valid HTTP" if is_invalid else str(error))
        return None


class _Connection:
    """A connection to one origin, for one request at a time."""

    def __init__(self, target: Target) -> None:
        loop = asyncio.get_running_loop()
        self.handle: aiohttp.connector.Connection | None = None  # until it is open
        self._payload: Any = None  # the current response's body
        # Only for the connector; ``send`` writes the actual requests.
        self._origin = aiohttp.ClientRequest(
            "GET",
            yarl.URL.build(scheme=target.scheme, host=target.host, port=target.port),
            loop=loop,
            ssl=target.tls or target.proxy_tls or True,
        )
        self._target_prefix = b""  # precedes each request's target if a proxy forwards the requests
        self._proxy_authorization = b""
        if target.proxy is not None:
            self._use_proxy(httpx.Proxy(target.proxy.reveal()), target)

    def _use_proxy(self, proxy: httpx.Proxy, target: Target) -> None:
        if proxy.url.scheme not in ("http", "https"):
            raise ValueError("aiohttp does not support this kind of proxy")
        credentials = ""
        if proxy.raw_auth is not None:
            user, password = (part.decode("latin-1") for part in proxy.raw_auth)
            basic: Any = httpx.BasicAuth(user, password)
            credentials = basic._auth_header  # noqa: SLF001 - no public API
        headers = {"Proxy-Authorization": credentials} if credentials else {}
        url = yarl.URL.build(scheme=proxy.url.scheme, host=proxy.url.host, port=proxy.url.port)
        self._origin.update_proxy(url, None, headers)
        if target.scheme == "http":
            self._target_prefix = str(self._origin.url).rstrip("/").encode("ascii")
            self._proxy_authorization = credentials.encode("ascii")

    @property
    def protocol(self) -> Any:
        """The aiohttp protocol, which parses the responses."""
        assert self.handle is not None  # noqa: S101 - for the type checker
        return self.handle.protocol

    def is_closed(self) -> bool:
        """Whether the connection is closed, or was never opened."""
        protocol = None if self.handle is None else self.protocol
        return protocol is None or not protocol.is_connected()

    def has_expired(self) -> bool:
        """Whether unsolicited data has arrived, or the server has closed the connection."""
        return self.protocol.should_close or self._is_readable()

    async def aclose(self) -> None:
        """Close the connection without waiting for the server."""
        handle, self.handle = self.handle, None
        if handle is None or handle.protocol is None:
            return
        if handle.transport is not None:
            handle.transport.abort()
        handle.close()
        if self._payload is not None and not self._payload.is_eof():
            self._payload.set_exception(aiohttp.ServerDisconnectedError("the connection was closed"))
        await asyncio.sleep(0)  # the event loop closes the socket in its next iteration

    async def open(self, timeout: float | None) -> None:  # noqa: ASYNC109 - per operation
        """Connect. Each connection has its own connector, which is cheap and bound to this event loop."""
        connector = aiohttp.TCPConnector(limit=0, use_dns_cache=False, resolver=aiohttp.ThreadedResolver())
        try:
            async with asyncio.timeout(timeout):
                self.handle = await connector.connect(self._origin, [], _NO_TIMEOUT)
        except TimeoutError as error:
            raise httpx.ConnectTimeout(str(error)) from error
        except UnicodeError as error:  # invalid host name
            raise httpx.ConnectError(str(error)) from error
        self._is_readable = readable_check(self.protocol.transport.get_extra_info("socket"))
        closed = self.protocol.closed
        if closed is not None:  # the connection has not been lost yet
            closed.add_done_callback(self._end_payload)

    def _end_payload(self, closed: "asyncio.Future[None]") -> None:
        """End an interrupted body; aiohttp may otherwise leave its reader waiting forever."""
        closed.exception()  # retrieved, so that asyncio does not log it
        if self._payload is not None and not self._payload.is_eof() and self._payload.exception() is None:
            self._payload.set_exception(aiohttp.ClientPayloadError())

    async def send(self, request: httpx.Request, timeouts: dict[str, float | None]) -> WireResponse:
        """Send a request, and return the response once its head has arrived."""
        head, chunked = self._head_of(request)
        if isinstance(request.stream, httpx.ByteStream) and not chunked:
            body, parts = b"".join(request.stream), None
        else:
            body, parts = b"", request.stream
        await _trace(request, "send_request_headers.started")
        protocol = self.protocol
        if protocol is None or protocol.should_close:  # changed during the trace callback
            raise httpx.RemoteProtocolError(UNSOLICITED_DATA)
        protocol.set_response_params(
            skip_payload=request.method == "HEAD",
            read_until_eof=True,
            auto_decompress=False,
            read_timeout=timeouts.get("read"),
            read_bufsize=_READ_BUFFER_SIZE,
            max_line_size=_MAX_HEADER_SIZE,
            max_field_size=_MAX_HEADER_SIZE,
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
            if interim > MAX_INTERIM_RESPONSES:
                raise httpx.RemoteProtocolError(TOO_MANY_INTERIM_RESPONSES)
            protocol.start_timeout()  # each response stops the timer
            message, self._payload = await protocol.read()
        extensions = {
            "http_version": b"HTTP/%d.%d" % message.version,
            "reason_phrase": message.reason.encode("latin-1", "replace"),
        }
        return _Response(message.code, message.raw_headers, _Stream(self._payload), extensions)

    def _head_of(self, request: httpx.Request) -> tuple[bytes, bool]:
        """Return a request's head, and whether its body is chunked; raise LocalProtocolError if invalid."""
        target = self._target_prefix + request.url.raw_path
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
            raise httpx.LocalProtocolError("a header or the target of the request contains a line break")
        _check_name(request.method.encode("ascii"))
        return head + b"\r\n\r\n", chunked

    async def _write(self, data: bytes, timeout: float | None) -> None:  # noqa: ASYNC109 - per operation
        protocol = self.protocol
        transport = None if protocol is None else protocol.transport
        # The server may have sent a response before it closed the connection: it says why.
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
        raise httpx.LocalProtocolError(f"{name!r} is not a valid header name or method")


async def _trace(request: httpx.Request, event: str) -> None:
    """Report one of httpcore's events to a request's ``trace`` extension, if it has one."""
    trace = request.extensions.get("trace")
    if trace is not None:
        await trace(f"http11.{event}", {"request": request})


@attrs.frozen
class _Response:
    status: int
    headers: Any
    stream: "_Stream"
    extensions: dict[str, Any]


@attrs.frozen
class _Stream:
    """The undecoded body. An iterator, because it needs no cleanup if abandoned."""

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
        """Do nothing: the connection detects the end of the body."""
