"""The package's own wires: a fair semaphore, and behind it connections used one at a time.

The pools of httpcore can be left with dead slots by cancellation, and scan every queued request and every
idle connection on each call. Here a connection belongs to one request at a time, the one used last is
used next, and one that saw an exception, or bytes that nobody asked for, is closed and thrown away. How
a connection is opened and spoken to is left to each wire; the default one speaks HTTP/1.1 by itself, and has
httpcore for proxies and the certificates of httpx.
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
from lemcal_async._concurrency import FairSemaphore, is_in_event_loop, preload
from lemcal_async.errors import ConfigurationError
from lemcal_async.ratelimit import Key
from lemcal_async.transport._call import account_of, answer_httpx2, drop_frames
from lemcal_async.transport._environment import MakeContext, Proxies, tls_context
from lemcal_async.transport._http11 import HTTP11Connection
from lemcal_async.transport._network import NetworkBackend

if TYPE_CHECKING:
    import ssl

preload()  # with the import, which programs expect to take its time

Origin: TypeAlias = tuple[str, bytes, int | None]  # scheme, host as it is sent, port


class Connection(Protocol):
    """What a pool asks of a connection; those of httpcore fit."""

    def is_closed(self) -> bool: ...
    def has_expired(self) -> bool: ...
    async def aclose(self) -> None: ...


class Answer(Protocol):
    """What comes back over a connection; the responses of httpcore fit."""

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
    """The idle connections of one event loop, kept for ``keepalive`` seconds, and the slots for all.

    Nothing is closed in here: what is to be closed is handed back.
    """

    def __init__(self, max_connections: int, keepalive: float) -> None:
        self.slots = FairSemaphore(max_connections)
        self.closed = False
        self._keepalive = keepalive
        self._idle: dict[Origin, deque[tuple[float, C]]] = {}

    def take(self, origin: Origin) -> tuple[C | None, list[C]]:
        """Return the idle connection that was used last, and those that turned out to be dead.

        A stale one is left for ``put`` to sweep.
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
        """Keep a connection for the next request; return those that are to be closed instead."""
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
        """Take out all idle connections."""
        drained = [connection for idle in self._idle.values() for _, connection in idle]
        self._idle.clear()
        return drained


@attrs.frozen
class Target:
    """Where a new connection leads, and how: what there is to know to open it."""

    scheme: str
    host: str
    port: int | None
    proxy: Secret[str] | None
    tls: "ssl.SSLContext | None"  # to the target
    proxy_tls: "ssl.SSLContext | None"


class BasePooledTransport(httpx.AsyncBaseTransport):
    """A transport on connections that a subclass opens; see ``PooledTransport`` for what it promises."""

    # The event ``send_request_headers.started`` of httpcore's trace extension comes before the first byte
    # of a request leaves: without it, nothing was sent.
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
        if max_connections < 1:
            raise ConfigurationError(f"max_connections={max_connections!r}: it must be at least 1")
        self._max_connections = max_connections
        self._keepalive = keepalive
        self._ssl_context = ssl_context
        self._trust_env = trust_env
        self._proxies = Proxies(trust_env=trust_env)
        self._pools: weakref.WeakKeyDictionary[Any, Pool[Any]] = weakref.WeakKeyDictionary()
        self._changing = threading.Lock()  # which pools there are
        self._closed = False
        self._prepare()

    def _prepare(self) -> None:
        """Load what connections are made of, if no event loop would stand still meanwhile."""

    @property
    @abstractmethod
    def _make_context(self) -> MakeContext:
        """What makes the TLS context that the library below would make for itself."""

    @abstractmethod
    async def _open(self, target: Target) -> Any:
        """Return a connection; it may open when it is first used. Raise ValueError for a bad proxy."""

    @abstractmethod
    async def _send(self, connection: Any, request: httpx.Request) -> Answer:
        """Send a request over a connection; return when the head of its answer is there."""

    @abstractmethod
    def _is_clean(self, connection: Any) -> bool:
        """Whether nothing is left of the answer that was read: no second one, no stray bytes."""

    @abstractmethod
    def _translate(self, error: BaseException) -> httpx.RequestError | None:
        """Return httpx's own error for one of the library below, None for any other."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request; the response holds its connection until it is closed."""
        if not isinstance(request, httpx.Request):  # pyright: ignore[reportUnnecessaryIsInstance]
            return await answer_httpx2(self, request)
        pool = self._pool()
        account = account_of(request)
        await self._acquire(pool, account, request)
        handled = sys.exception()  # what the caller is handling, if anything: its frames are not ours to cut
        connection = None
        try:
            url = request.url
            origin = (url.scheme, url.raw_host, url.port)
            connection, dead = pool.take(origin)
            if dead:
                await _close(dead)
            if connection is None:
                connection = await self._connect(origin)
            answer = await self._send(connection, request)
        except BaseException as error:
            drop_frames(error, handled)
            known = self._translate(error)
            pool.slots.release(account)
            if connection is not None:
                await _close([connection])
            if known is None:
                raise
            raise known from error
        return httpx.Response(
            answer.status,
            headers=answer.headers,
            stream=_Body(self, pool, origin, connection, account, answer.stream),
            extensions=answer.extensions,
        )

    async def aclose(self) -> None:
        """Close the idle connections of this event loop; those in use close when they come free."""
        with self._changing:
            self._closed = True
            for pool in self._pools.values():
                pool.closed = True
        here = self._pools.get(current_token().native_token)
        if here is not None:
            await _close(here.drain())

    def _pool(self) -> Pool[Any]:
        loop = current_token().native_token
        pool = self._pools.get(loop)
        if self._closed:
            raise ConfigurationError("this transport is closed; make a new one")
        if pool is None:
            pool = Pool[Any](self._max_connections, self._keepalive)
            with self._changing:
                # An idle connection keeps asyncio's loop alive, and so itself.
                for ended in [other for other in self._pools if _is_closed(other)]:
                    del self._pools[ended]
                self._pools[loop] = pool
        return pool

    async def _acquire(self, pool: Pool[Any], account: Key | None, request: httpx.Request) -> None:
        """Take a slot. A request that belongs to no account waits as long as its client's pool timeout."""
        began = anyio.current_time() if events.wanted() else None
        if not pool.slots.acquire_nowait(account):
            timeouts = request.extensions.get("timeout", {})
            timeout = timeouts.get("pool") if account is None else None
            acquired = False
            with anyio.move_on_after(timeout):
                await pool.slots.acquire(account)
                acquired = True
            if not acquired:
                raise httpx.PoolTimeout(f"no connection came free within {timeout:.3g} s")
        if began is not None:
            in_use = self._max_connections - pool.slots.free
            events.emit(events.PoolEntered(in_use, self._max_connections, anyio.current_time() - began))

    async def _connect(self, origin: Origin) -> Any:
        scheme, raw_host, port = origin
        if scheme not in ("http", "https"):
            raise httpx.UnsupportedProtocol(f"the URL must begin with http:// or https://, not {scheme!r}")
        host = raw_host.decode("ascii")
        proxy = self._proxies.get(scheme, host, port)
        tls = await self._context() if scheme == "https" else None
        # The proxy is trusted if those say so whom the service is trusted by.
        is_secure = proxy is not None and proxy.reveal().lower().startswith("https:")
        proxy_tls = await self._context() if is_secure else None
        target = Target(scheme, host, port, proxy, tls, proxy_tls)
        try:
            return await self._open(target)
        except (RuntimeError, ValueError, httpx.InvalidURL):
            if proxy is None:
                raise
        # Outside of the except block, because the cause could show the proxy's password.
        raise ConfigurationError(
            f"the proxy that the environment sets for {scheme} cannot be used: {self._proxy_hint}"
        )

    _proxy_hint = "it must be an http://, https:// or socks5:// URL, and the last needs the package socksio"

    async def _context(self) -> "ssl.SSLContext":
        if self._ssl_context is not None:
            return self._ssl_context
        return await tls_context(self._make_context, trust_env=self._trust_env)


@attrs.define(eq=False)
class _Body(httpx.AsyncByteStream):
    """The body of a response, which gives the connection back when it is closed."""

    _transport: BasePooledTransport
    _pool: Pool[Any]
    _origin: Origin
    _connection: Any  # None once it is given back
    _account: Key | None
    _stream: Any
    _parts: Any = None  # what is left of it
    _whole: bool = False  # whether it was read to its end

    def __aiter__(self) -> Self:
        self._parts = aiter(self._stream)
        return self

    async def __anext__(self) -> bytes:
        handled = sys.exception()
        try:
            return cast("bytes", await anext(self._parts))
        except StopAsyncIteration:
            self._whole = True
            raise
        except BaseException as error:
            drop_frames(error, handled)
            known = self._transport._translate(error)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
            if known is None:
                raise
            raise known from error

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        to_close = [connection]
        try:
            if self._whole:
                await self._stream.aclose()  # makes the connection ready for the next request
                # Its other half.
                if self._transport._is_clean(connection):  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
                    to_close = self._pool.put(self._origin, connection)
        finally:
            self._pool.slots.release(self._account)
            await _close(to_close)


async def _close(connections: list[Any]) -> None:
    # Shielded, but what makes them harmless (out of the pool, slot given back) has been done before:
    # a native cancellation gets through a shield.
    if connections:
        with anyio.CancelScope(shield=True):
            async with AsyncExitStack() as stack:  # one that is broken off does not keep the others open
                for connection in connections:
                    stack.push_async_callback(connection.aclose)


def _is_closed(loop: Any) -> bool:
    """Whether ``loop`` is one of asyncio that is closed; trio's are forgotten by themselves."""
    return hasattr(loop, "is_closed") and bool(loop.is_closed())


_ERRORS = frozenset(
    {"ConnectError", "ConnectTimeout", "LocalProtocolError", "NetworkError", "PoolTimeout", "ProtocolError"}
    | {"ProxyError", "ReadError", "ReadTimeout", "RemoteProtocolError", "TimeoutException"}
    | {"UnsupportedProtocol", "WriteError", "WriteTimeout"}
)
_loading = threading.Lock()


class HTTPCoreTransport(BasePooledTransport):
    """A pooled transport on the connections of httpcore, or of its fork: the same classes and names."""

    # Loaded with the first instance, or in a thread if that is made in an event loop: httpcore looks for
    # trio and h2, and loads them if they are there.
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
        with _loading:
            core = cls._core
            if core is None:
                core = cls._import_core()
                cls._backend, cls._core = NetworkBackend(core), core
        return core

    async def _open(self, target: Target) -> Any:
        core: Any = self._core or await anyio.to_thread.run_sync(self._load)
        if target.proxy is None:
            return HTTP11Connection(target, core, self._backend)
        where = core.URL(scheme=target.scheme, host=target.host, port=target.port, target="/").origin
        return self._proxy(core, target).create_connection(where)

    def _proxy(self, core: ModuleType, target: Target) -> Any:
        """Return what makes connections through a proxy. Raises if it cannot be used."""
        assert target.proxy is not None  # noqa: S101 - for the type checker
        proxy = httpx.Proxy(target.proxy.reveal())  # which knows how credentials stand in a URL
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

    async def _send(self, connection: Any, request: httpx.Request) -> Answer:
        core: Any = self._core
        if isinstance(connection, HTTP11Connection):
            if not _is_mocked(core):
                return await connection.send(request)
            connection = connection.as_httpcore()
        url = request.url
        answer: Answer = await connection.handle_async_request(
            core.Request(
                method=request.method,
                url=core.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                headers=request.headers.raw,
                content=_content_of(request),
                extensions=request.extensions,
            )
        )
        return answer

    def _is_clean(self, connection: Any) -> bool:
        if isinstance(connection, HTTP11Connection):
            return connection.make_ready()
        # httpcore does not look at what h11 holds beyond the end of an answer. If a version of it keeps
        # that elsewhere, its connections are used once.
        while hasattr(connection, "_connection"):
            connection = connection._connection  # noqa: SLF001 - no public way
        state = getattr(connection, "_h11_state", None)
        return state is not None and state.trailing_data == (b"", False)

    def _translate(self, error: BaseException) -> httpx.RequestError | None:
        """Return httpx's own error for one of h11's, httpcore's or its fork's, which have the same names."""
        for kind in type(error).__mro__:
            if kind.__name__ in _ERRORS and kind.__module__.startswith(("httpcore", "h11")):
                # h11 quotes what it cannot read, which may be personal data.
                text = str(error).partition(": bytearray(")[0]
                known: httpx.RequestError = getattr(httpx, kind.__name__)(text)
                return known
        return None


def _is_mocked(core: Any) -> bool:
    """Whether a test has put itself in the place of httpcore's connections, as respx does."""
    return not core.AsyncHTTPConnection.handle_async_request.__module__.startswith(core.__name__)


def _content_of(request: httpx.Request) -> Any:
    stream = request.stream
    return _OnePiece(b"".join(stream)) if isinstance(stream, httpx.ByteStream) else stream


class _OnePiece:
    """A body in one piece. httpx has a generator for it, which is garbage if its sending breaks off."""

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
    """The default wire: a bounded number of connections per event loop, shared fairly.

    An account that is busy or hangs does not keep the others waiting. It may be made before any event loop
    runs, and serves several of them. Calls of an ``AsyncLemcal`` wait for a connection as long as their
    deadline allows; in a plain ``httpx.AsyncClient`` its pool timeout holds. ``aclose`` lets requests under
    way finish. Canceled at any moment, a request closes its connection and gives its slot to the next. A
    connection that carries anything but the answers to its requests is closed before its next request, so
    that an answer too many is not paired with that. One that arrives only after the next request has been
    sent cannot be told from its answer in HTTP/1.1.

    Args:
        max_connections: How many connections there can be at once, per event loop.
        keepalive: Seconds after which an idle connection is closed, at the next use of the transport.
        ssl_context: What TLS is set up with; if left out, one for the whole process.
        trust_env: Whether the system's proxies (``HTTPS_PROXY``, ``NO_PROXY`` …) and certificates
            (``SSL_CERT_FILE``, ``SSL_CERT_DIR``) are used.

    Raises:
        ConfigurationError: For arguments that cannot work.
    """

    @staticmethod
    def _import_core() -> ModuleType:
        import httpcore  # noqa: PLC0415 - see above

        return httpcore

    @property
    def _make_context(self) -> MakeContext:
        return httpx_context


def httpx_context(trust_env: bool) -> "ssl.SSLContext":  # noqa: FBT001 - called by position
    return httpx.create_ssl_context(trust_env=trust_env)
