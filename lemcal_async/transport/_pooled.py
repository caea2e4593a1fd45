"""The package's own wires: a connection pool with a fair semaphore.

In httpcore's pools, cancellation can leave dead slots, and each call scans all queued requests and all idle
connections. In this pool, a connection serves one request at a time, the most recently used one is reused
first, and after an exception or unsolicited data it is closed and discarded. Each wire decides how to open
and use its connections; the default wire implements HTTP/1.1 itself, and uses httpcore for proxies and
httpx's certificates.
"""

import sys
import threading
import time
import weakref
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping
from contextlib import AsyncExitStack
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeAlias, TypeVar, cast

import anyio
import anyio.to_thread
import attrs
import httpx
from anyio.lowlevel import current_token

from lemcal_async import events
from lemcal_async._auth import Secret
from lemcal_async._checks import is_number, is_whole
from lemcal_async._concurrency import FairSemaphore, is_in_event_loop, preload
from lemcal_async.errors import ConfigurationError
from lemcal_async.ratelimit import Key
from lemcal_async.transport._call import account_of, drop_frames, handle_httpx2_request, note_proxy
from lemcal_async.transport._environment import MakeContext, Proxies, tls_context
from lemcal_async.transport._http11 import HTTP11Connection
from lemcal_async.transport._network import NetworkBackend

if TYPE_CHECKING:
    import ssl

preload()  # at import time, when programs expect a delay

_CONNECTING = httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError

Origin: TypeAlias = tuple[str, bytes, int | None]  # scheme, ASCII host, port


class Connection(Protocol):
    """A connection in a pool; httpcore's connections implement it."""

    def is_closed(self) -> bool: ...
    def has_expired(self) -> bool: ...
    async def aclose(self) -> None: ...


class WireResponse(Protocol):
    """A response from a connection; httpcore's responses implement it."""

    @property
    def status(self) -> int: ...
    @property
    def headers(self) -> Any: ...
    @property
    def stream(self) -> Any: ...
    @property
    def extensions(self) -> Mapping[str, Any]: ...


C = TypeVar("C", bound=Connection)


class Pool(Generic[C]):
    """An event loop's idle connections, kept for ``keepalive`` seconds, and the slots for all connections.

    The pool itself closes nothing: it returns the connections that the caller must close.
    """

    def __init__(self, max_connections: int, keepalive: float) -> None:
        self.slots = FairSemaphore(max_connections)
        self.closed = False
        self._keepalive = keepalive
        self._idle: dict[Origin, deque[tuple[float, C]]] = {}

    def take(self, origin: Origin) -> tuple[C | None, list[C]]:
        """Return the most recently used idle connection, and any dead connections found on the way.

        Stale connections are left for ``put`` to remove.
        """
        dead: list[C] = []
        idle = self._idle.get(origin)
        while idle and idle[-1][0] >= time.monotonic() - self._keepalive:
            connection = idle.pop()[1]
            if not (connection.is_closed() or connection.has_expired()):
                return connection, dead
            dead.append(connection)
        return None, dead

    def put(self, origin: Origin, connection: C) -> list[C]:
        """Keep a connection for reuse; return the connections to close."""
        if self.closed or connection.is_closed():
            return [connection]
        now = time.monotonic()
        self._idle.setdefault(origin, deque()).append((now, connection))
        stale: list[C] = []
        for idle in self._idle.values():
            while idle and idle[0][0] < now - self._keepalive:
                stale.append(idle.popleft()[1])
        return stale

    def drain(self) -> list[C]:
        """Remove and return all idle connections."""
        drained = [connection for idle in self._idle.values() for _, connection in idle]
        self._idle.clear()
        return drained


@attrs.frozen
class Target:
    """The parameters of a new connection."""

    scheme: str
    host: str
    port: int | None
    proxy: Secret[str] | None
    tls: "ssl.SSLContext | None"  # to the target
    proxy_tls: "ssl.SSLContext | None"


class BasePooledTransport(httpx.AsyncBaseTransport):
    """A pooled transport whose subclasses open the connections; ``PooledTransport`` lists its guarantees."""

    # The trace event ``send_request_headers.started`` always precedes the first byte of a request: without
    # the event, nothing was sent.
    reports_sending = True

    def __init__(
        self,
        *,
        max_connections: int = 100,
        keepalive: float = 60.0,
        ssl_context: "ssl.SSLContext | None" = None,
        trust_env: bool = True,
    ) -> None:
        preload()
        if not (is_whole(max_connections) and max_connections >= 1):
            raise ConfigurationError(
                f"max_connections={max_connections!r}: it must be a whole number, at least 1"
            )
        if not (is_number(keepalive) and keepalive >= 0):
            raise ConfigurationError(f"keepalive={keepalive!r}: it must be a number of seconds, 0 or more")
        if ssl_context is not None:
            _check_ssl_context(ssl_context)
        self._max_connections = max_connections
        self._keepalive = keepalive
        self._ssl_context = ssl_context
        self._trust_env = trust_env
        self._proxies = Proxies(trust_env=trust_env)
        self._pools: weakref.WeakKeyDictionary[Any, Pool[Any]] = weakref.WeakKeyDictionary()
        self._pools_lock = threading.Lock()
        self._closed = False
        self._prepare()

    def _prepare(self) -> None:
        """Import the library for connections, unless that would block an event loop."""

    @property
    @abstractmethod
    def _make_context(self) -> MakeContext:
        """A function that creates the underlying library's default TLS context."""

    @abstractmethod
    async def _open(self, target: Target) -> Any:
        """Return a connection, which may open on first use. Raise ValueError for an invalid proxy."""

    @abstractmethod
    async def _send(self, connection: Any, request: httpx.Request) -> WireResponse:
        """Send a request over a connection, and return once the head of the response has arrived."""

    @abstractmethod
    def _is_clean(self, connection: Any) -> bool:
        """Whether the connection has no unread data after a response: no second response, no stray bytes."""

    @abstractmethod
    def _translate(self, error: BaseException) -> httpx.RequestError | None:
        """Translate an error of the underlying library to httpx's; None for any other error."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request. The response occupies its connection until it is closed."""
        if not isinstance(request, httpx.Request):  # pyright: ignore[reportUnnecessaryIsInstance]
            return await handle_httpx2_request(self, request)
        pool = self._pool()
        account = account_of(request)
        await self._acquire(pool, account, request)
        handled = sys.exception()  # the caller's exception, if any, which keeps its traceback
        connection = None
        url = request.url
        try:
            origin = (url.scheme, url.raw_host, url.port)
            connection, dead = pool.take(origin)
            if dead:
                await _close(dead)
            if connection is None:
                connection = await self._connect(origin)
            response = await self._send(connection, request)
        except BaseException as error:
            drop_frames(error, handled)
            translated = self._translate(error)
            if isinstance(translated, _CONNECTING):
                note_proxy(request, self._proxies.address(url.scheme, url.raw_host.decode("ascii"), url.port))
            pool.slots.release(account)
            if connection is not None:
                await _close([connection])
            if translated is None:
                raise
            raise translated from error
        return httpx.Response(
            response.status,
            headers=response.headers,
            stream=_Body(self, pool, origin, connection, account, response.stream),
            extensions=response.extensions,
        )

    async def aclose(self) -> None:
        """Close the idle connections of this event loop; connections in use close after their request."""
        with self._pools_lock:
            self._closed = True
            for pool in self._pools.values():
                pool.closed = True
        own_pool = self._pools.get(current_token().native_token)
        if own_pool is not None:
            await _close(own_pool.drain())

    def _pool(self) -> Pool[Any]:
        loop = current_token().native_token
        pool = self._pools.get(loop)
        if self._closed:
            raise ConfigurationError("this transport is closed; create a new one")
        if pool is None:
            pool = Pool[Any](self._max_connections, self._keepalive)
            with self._pools_lock:
                # An idle connection references its asyncio event loop, so the pool would never be collected.
                for closed_loop in [other for other in self._pools if _is_closed(other)]:
                    del self._pools[closed_loop]
                self._pools[loop] = pool
        return pool

    async def _acquire(self, pool: Pool[Any], account: Key | None, request: httpx.Request) -> None:
        """Acquire a slot. For a request without an account, its client's pool timeout applies."""
        began = anyio.current_time() if events.wanted() else None
        if not pool.slots.acquire_nowait(account):
            timeouts = request.extensions.get("timeout", {})
            timeout = timeouts.get("pool") if account is None else None
            acquired = False
            with anyio.move_on_after(timeout):
                await pool.slots.acquire(account)
                acquired = True
            if not acquired:
                raise httpx.PoolTimeout(f"no connection became available within {timeout:.3g} s")
        if began is not None:
            in_use = self._max_connections - pool.slots.free
            events.emit(events.PoolEntered(in_use, self._max_connections, anyio.current_time() - began))

    async def _connect(self, origin: Origin) -> Any:
        scheme, raw_host, port = origin
        if scheme not in ("http", "https"):
            raise httpx.UnsupportedProtocol(f"the URL must start with http:// or https://, not {scheme!r}")
        host = raw_host.decode("ascii")
        proxy = self._proxies.get(scheme, host, port)
        tls = await self._context() if scheme == "https" else None
        # The same certificate authorities apply to the proxy as to the service.
        is_secure = proxy is not None and proxy.reveal().lower().startswith("https:")
        proxy_tls = await self._context() if is_secure else None
        target = Target(scheme, host, port, proxy, tls, proxy_tls)
        try:
            return await self._open(target)
        except (RuntimeError, ValueError, httpx.InvalidURL):
            if proxy is None:
                raise
        # Outside the except block, because the original error could contain the proxy's password.
        raise ConfigurationError(
            f"the proxy that the environment sets for {scheme} cannot be used: {self._proxy_hint}"
        )

    _proxy_hint = "it must be an http://, https:// or socks5:// URL, and socks5:// requires socksio"

    async def _context(self) -> "ssl.SSLContext":
        if self._ssl_context is not None:
            return self._ssl_context
        return await tls_context(self._make_context, trust_env=self._trust_env)


@attrs.define(eq=False)
class _Body(httpx.AsyncByteStream):
    """The body of a response, which returns the connection to the pool when closed."""

    _transport: BasePooledTransport
    _pool: Pool[Any]
    _origin: Origin
    _connection: Any  # None after it was returned
    _account: Key | None
    _stream: Any
    _iterator: Any = None
    _is_complete: bool = False  # whether the body was read to its end

    def __aiter__(self) -> Self:
        self._iterator = aiter(self._stream)
        return self

    async def __anext__(self) -> bytes:
        handled = sys.exception()
        try:
            return cast("bytes", await anext(self._iterator))
        except StopAsyncIteration:
            self._is_complete = True
            raise
        except BaseException as error:
            drop_frames(error, handled)
            translated = self._transport._translate(error)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
            if translated is None:
                raise
            raise translated from error

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        to_close = [connection]
        try:
            if self._is_complete:
                await self._stream.aclose()  # makes the connection ready for the next request
                # The transport and its bodies are one unit.
                if self._transport._is_clean(connection):  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
                    to_close = self._pool.put(self._origin, connection)
        finally:
            self._pool.slots.release(self._account)
            await _close(to_close)


async def _close(connections: list[Any]) -> None:
    # asyncio's native cancellation ignores the shield, so callers first remove the connections from the pool
    # and release their slots.
    if connections:
        with anyio.CancelScope(shield=True):
            async with AsyncExitStack() as stack:  # closes all connections, even if one close is interrupted
                for connection in connections:
                    stack.push_async_callback(connection.aclose)


def _check_ssl_context(value: object) -> None:
    import ssl  # noqa: PLC0415 - already loaded, by whoever made the context

    if not isinstance(value, ssl.SSLContext):
        raise ConfigurationError(f"ssl_context={value!r}: it must be an ssl.SSLContext or None")


def _is_closed(loop: Any) -> bool:
    """Whether ``loop`` is a closed asyncio event loop; trio's are garbage-collected without help."""
    return hasattr(loop, "is_closed") and bool(loop.is_closed())


_ERRORS = frozenset(
    {"ConnectError", "ConnectTimeout", "LocalProtocolError", "NetworkError", "PoolTimeout", "ProtocolError"}
    | {"ProxyError", "ReadError", "ReadTimeout", "RemoteProtocolError", "TimeoutException"}
    | {"UnsupportedProtocol", "WriteError", "WriteTimeout"}
)
_load_lock = threading.Lock()


class HTTPCoreTransport(BasePooledTransport):
    """A pooled transport for httpcore or its fork, which has classes of the same names."""

    # Imported by the first instance, or in a thread if that is created in an event loop: httpcore also
    # imports trio and h2 if they are installed.
    _core: ModuleType | None = None
    _backend: NetworkBackend

    def _prepare(self) -> None:
        if self._core is None and not is_in_event_loop():
            self._load()

    @staticmethod
    @abstractmethod
    def _import_core() -> ModuleType:
        """Return httpcore or its fork."""

    @classmethod
    def _load(cls) -> ModuleType:
        with _load_lock:
            core = cls._core
            if core is None:
                core = cls._import_core()
                cls._backend, cls._core = NetworkBackend(core), core
        return core

    async def _open(self, target: Target) -> Any:
        core: Any = self._core or await anyio.to_thread.run_sync(self._load)
        if target.proxy is None:
            return HTTP11Connection(target, core, self._backend)
        origin = core.URL(scheme=target.scheme, host=target.host, port=target.port, target="/").origin
        return self._proxy(core, target).create_connection(origin)

    def _proxy(self, core: ModuleType, target: Target) -> Any:
        """Return httpcore's pool for the proxy. Raises if the proxy is unusable."""
        assert target.proxy is not None  # noqa: S101 - for the type checker
        proxy = httpx.Proxy(target.proxy.reveal())  # parses the credentials in the URL
        address = core.URL(
            scheme=proxy.url.raw_scheme,
            host=proxy.url.raw_host,
            port=proxy.url.port,
            target=proxy.url.raw_path,
        )
        options = {"proxy_auth": proxy.raw_auth, "ssl_context": target.tls, "network_backend": self._backend}
        if proxy.url.scheme.startswith("socks5"):
            return core.AsyncSOCKSProxy(address, **options)
        return core.AsyncHTTPProxy(address, proxy_ssl_context=target.proxy_tls, **options)

    async def _send(self, connection: Any, request: httpx.Request) -> WireResponse:
        core: Any = self._core
        if isinstance(connection, HTTP11Connection):
            if not _is_mocked(core):
                return await connection.send(request)
            connection = connection.as_httpcore()
        url = request.url
        response: WireResponse = await connection.handle_async_request(
            core.Request(
                method=request.method,
                url=core.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                headers=request.headers.raw,
                content=_content_of(request),
                extensions=request.extensions,
            )
        )
        return response

    def _is_clean(self, connection: Any) -> bool:
        if isinstance(connection, HTTP11Connection):
            return connection.make_ready()
        # httpcore ignores data that h11 received after the end of a response. If an httpcore version has no
        # such attributes, its connections are not reused.
        while hasattr(connection, "_connection"):
            connection = connection._connection  # noqa: SLF001 - no public API
        state = getattr(connection, "_h11_state", None)
        return state is not None and state.trailing_data == (b"", False)

    def _translate(self, error: BaseException) -> httpx.RequestError | None:
        """Translate an error of h11, httpcore or its fork to httpx's error of the same name."""
        for kind in type(error).__mro__:
            if kind.__name__ in _ERRORS and kind.__module__.startswith(("httpcore", "h11")):
                # h11 quotes data that it cannot parse, which may be personal.
                text = str(error).partition(": bytearray(")[0]
                translated: httpx.RequestError = getattr(httpx, kind.__name__)(text)
                return translated
        return None


def _is_mocked(core: Any) -> bool:
    """Whether a test has replaced httpcore's connections with a mock, as respx does."""
    return not core.AsyncHTTPConnection.handle_async_request.__module__.startswith(core.__name__)


def _content_of(request: httpx.Request) -> Any:
    stream = request.stream
    return _BytesBody(b"".join(stream)) if isinstance(stream, httpx.ByteStream) else stream


class _BytesBody:
    """A body of bytes; httpx's generator would be left to the garbage collector if sending fails."""

    def __init__(self, body: bytes) -> None:
        self._rest = body

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        rest, self._rest = self._rest, b""
        if not rest:
            raise StopAsyncIteration
        return rest


class PooledTransport(HTTPCoreTransport):
    """The default transport: a bounded number of connections per event loop, shared fairly.

    A busy or hanging account does not block the others. The transport can be created before an event loop is
    running, and serves several event loops. Calls of an ``AsyncLemcal`` wait for a connection until their
    deadline; in a plain ``httpx.AsyncClient``, the client's pool timeout applies. ``aclose`` lets requests in
    flight finish. A canceled request closes its connection and passes its slot to the next waiter. If a
    connection has received anything other than the responses to its requests, it is closed before its next
    request, so that an extra response is never matched to that request. An extra response that arrives after
    the next request was sent is indistinguishable from that request's response in HTTP/1.1.

    Args:
        max_connections: The maximum number of open connections per event loop.
        keepalive: Seconds after which an idle connection is closed, at the next use of the transport.
        ssl_context: The TLS context. Defaults to one shared by the whole process.
        trust_env: Whether to use the system's proxies (``HTTPS_PROXY``, ``NO_PROXY`` …) and certificates
            (``SSL_CERT_FILE``, ``SSL_CERT_DIR``).

    Raises:
        ConfigurationError: If an argument is invalid.
    """

    @staticmethod
    def _import_core() -> ModuleType:
        import httpcore  # noqa: PLC0415 - see _core

        return httpcore

    @property
    def _make_context(self) -> MakeContext:
        return httpx_context


def httpx_context(trust_env: bool) -> "ssl.SSLContext":  # noqa: FBT001 - called by position
    return httpx.create_ssl_context(trust_env=trust_env)
