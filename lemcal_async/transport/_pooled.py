"""The connections of one event loop that are open and idle, the last used on top.

MERGED [transport.wire] What the wires have in common: a gate, and behind it connections of one request at a time.

The pools of httpcore can be left with dead slots by cancellation, and scan every queued request and
every idle connection on each call. Here a connection belongs to one request at a time, the last one
used is used next, and one that saw any exception is closed and thrown away. The connections
themselves are httpcore's, or those of its fork: the same classes under the same names.

The default wire: httpcore's connections, with the certificates that httpx trusts."""

import threading
import time
import urllib.request
import weakref
from abc import abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import anyio
import anyio.to_thread
import httpx
from anyio.lowlevel import current_token

from lemcal_async import events
from lemcal_async._concurrency import FairSemaphore
from lemcal_async.errors import ConfigurationError
from lemcal_async.ratelimit import Key
from lemcal_async.transport._call import account_of

if TYPE_CHECKING:
    import ssl  # a tenth of this package's import time, and every event loop brings it anyway


Origin = tuple[str, str, int | None]  # scheme, host, port


class Connection(Protocol):
    """What a pool asks of a connection; those of httpcore and httpcore2 fit."""

    def is_closed(self) -> bool: ...  # noqa: D102 - as they are documented there
    def has_expired(self) -> bool: ...  # noqa: D102


C = TypeVar("C", bound=Connection)


class Pool(Generic[C]):
    """Idle connections, kept for ``keepalive`` seconds, and the gate before all of them.

    Nothing is closed in here: what is to be closed is handed back.
    """

    def __init__(self, max_connections: int, keepalive: float) -> None:
        self.gate = FairSemaphore(max_connections)
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
        if self.closed:
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


_ERRORS = frozenset(
    {"ConnectError", "ConnectTimeout", "LocalProtocolError", "NetworkError", "PoolTimeout", "ProtocolError"}
    | {"ProxyError", "ReadError", "ReadTimeout", "RemoteProtocolError", "TimeoutException"}
    | {"UnsupportedProtocol", "WriteError", "WriteTimeout"}
)


class Wire(httpx.AsyncBaseTransport):
    """A transport on the connections of ``core``, which is httpcore or a fork of it."""

    def __init__(
        self,
        max_connections: int,
        keepalive: float,
        ssl_context: "ssl.SSLContext | None",
        trust_env: bool,  # noqa: FBT001 - named by the wires
    ) -> None:
        if max_connections < 1:
            raise ConfigurationError(f"max_connections={max_connections!r}: at least 1 is needed")
        self._max_connections = max_connections
        self._keepalive = keepalive
        self._ssl_context = ssl_context
        self._proxies = urllib.request.getproxies() if trust_env else {}  # by scheme, or "all"
        self._pools: weakref.WeakKeyDictionary[Any, Pool[Any]] = weakref.WeakKeyDictionary()
        self._changing = threading.Lock()  # which pools there are
        self._closed = False

    @staticmethod
    @abstractmethod
    def _core() -> ModuleType:
        """Return httpcore or its fork; it is imported with the first request, as httpx does."""

    @staticmethod
    @abstractmethod
    def _make_context() -> "ssl.SSLContext":
        """Return the context that the library would make for itself."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request; the response holds its connection until it is closed."""
        pool = self._pool()
        account = account_of(request)
        await self._enter(pool, account)
        connection = None
        try:
            origin = (request.url.scheme, request.url.host, request.url.port)
            connection, dead = pool.take(origin)
            if dead:
                await _close(dead)
            if connection is None:
                connection = await self._connect(origin)
            response = await connection.handle_async_request(self._request(request))
        except BaseException as error:
            pool.gate.leave(account)
            if connection is not None:
                await _close([connection])
            known = _translated(error)
            if known is None:
                raise
            raise known from error
        return httpx.Response(
            response.status,
            headers=response.headers,
            stream=_Body(response.stream, pool, origin, connection, account),
            extensions=response.extensions,
        )

    async def _enter(self, pool: Pool[Any], account: Key | None) -> None:
        if not events.wanted():
            await pool.gate.enter(account)
            return
        began = anyio.current_time()
        await pool.gate.enter(account)
        in_use = self._max_connections - pool.gate.free
        events.emit(events.PoolEntered(in_use, self._max_connections, anyio.current_time() - began))

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

    def _request(self, request: httpx.Request) -> Any:
        core = self._core()
        url = request.url
        return core.Request(
            method=request.method,
            url=core.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )

    async def _connect(self, origin: Origin) -> Any:
        """Return a connection, which opens when it is first used."""
        scheme, host, port = origin
        if scheme not in ("http", "https"):
            raise httpx.UnsupportedProtocol(f"the URL must begin with http:// or https://, not {scheme!r}")
        proxy = self._proxies.get(scheme) or self._proxies.get("all")
        if proxy and any(map(urllib.request.proxy_bypass, (host, f"{host}:{port}"))):
            proxy = None
        core = self._core()
        where = core.URL(scheme=scheme, host=host, port=port, target="/").origin
        context = await self._context() if scheme == "https" else None
        if not proxy:
            return core.AsyncHTTPConnection(where, ssl_context=context)
        if "://" not in proxy:  # HTTP_PROXY=host:port is common
            proxy = f"http://{proxy}"
        # It is to trust those whom ours trusts.
        to_proxy = await self._context() if proxy.lower().startswith("https:") else None
        try:
            return _proxy(core, proxy, to_proxy, context).create_connection(where)
        except (RuntimeError, ValueError, httpx.InvalidURL):
            pass  # raised below, because the cause could show the proxy's password
        del proxy  # as could a local variable
        raise ConfigurationError(
            f"the proxy that the environment sets for {scheme} cannot be used: it must be an http://, "
            "https:// or socks5:// URL, and the last needs the package socksio"
        )

    async def _context(self) -> "ssl.SSLContext":
        if self._ssl_context is not None:
            return self._ssl_context
        if self._make_context not in _contexts:
            # In a thread, because reading the certificates takes 20 ms.
            await anyio.to_thread.run_sync(_make_once, self._make_context)
        return _contexts[self._make_context]


class _Body(httpx.AsyncByteStream):
    """The body of a response, which gives the connection back when it is closed."""

    def __init__(
        self, stream: Any, pool: Pool[Any], origin: Origin, connection: Any, account: Key | None
    ) -> None:
        self._stream = stream
        self._pool = pool
        self._origin = origin
        self._connection = connection
        self._account = account
        self._whole = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for part in self._stream:
                yield part
        except Exception as error:
            known = _translated(error)
            if known is None:
                raise
            raise known from error
        self._whole = True

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        to_close = [connection]
        try:
            if self._whole:
                await self._stream.aclose()  # makes the connection ready for the next request
                to_close = self._pool.put(self._origin, connection)
        finally:
            self._pool.gate.leave(self._account)
            await _close(to_close)


def _proxy(core: ModuleType, url: str, to_proxy: "ssl.SSLContext | None", context: Any) -> Any:
    """Return what makes connections through a proxy. Raises if it cannot be used."""
    proxy = httpx.Proxy(url)  # which knows how credentials stand in a URL
    address = core.URL(
        scheme=proxy.url.raw_scheme, host=proxy.url.raw_host, port=proxy.url.port, target=proxy.url.raw_path
    )
    if proxy.url.scheme.startswith("socks5"):
        return core.AsyncSOCKSProxy(address, proxy_auth=proxy.raw_auth, ssl_context=context)
    return core.AsyncHTTPProxy(
        address, proxy_auth=proxy.raw_auth, ssl_context=context, proxy_ssl_context=to_proxy
    )


async def _close(connections: list[Any]) -> None:
    # Shielded, but what makes them harmless (out of the pool, place at the gate given back) has
    # been done before: a second native cancellation gets through a shield.
    if connections:
        with anyio.CancelScope(shield=True):
            for connection in connections:
                await connection.aclose()


def _translated(error: BaseException) -> httpx.RequestError | None:
    """Return httpx's own error for one of httpcore's, or of its fork's, which have the same names."""
    for kind in type(error).__mro__:
        if kind.__name__ in _ERRORS and kind.__module__.startswith("httpcore"):
            known: httpx.RequestError = getattr(httpx, kind.__name__)(str(error))
            return known
    return None


_contexts: "dict[Callable[[], ssl.SSLContext], ssl.SSLContext]" = {}  # one for the process, by its maker
_making = threading.Lock()


def _make_once(make: "Callable[[], ssl.SSLContext]") -> None:
    with _making:  # of calls that begin at once, the first makes it for all
        if make not in _contexts:
            _contexts[make] = make()


def _is_closed(loop: Any) -> bool:
    """Whether ``loop`` is one of asyncio that is closed; trio's are forgotten by themselves."""
    return hasattr(loop, "is_closed") and bool(loop.is_closed())


class PooledTransport(Wire):
    """Sends requests over at most ``max_connections`` connections at once, per event loop.

    Time spent waiting at the gate is no pool timeout. Accounts share the connections fairly: a busy or
    hanging one does not keep the others waiting. Connections idle for ``keepalive`` seconds are
    closed, at the next use of the transport. ``ssl_context`` is one for the whole process unless
    given. The system's proxies are honoured (``HTTPS_PROXY``, ``NO_PROXY`` …) unless ``trust_env``
    is False.

    It may be made before any event loop runs, and serves several of them. ``aclose`` lets the
    requests that are under way finish. Cancelled at any moment, a request closes its connection
    and gives its place at the gate to the next.
    """

    def __init__(
        self,
        *,
        max_connections: int = 100,
        keepalive: float = 60.0,
        ssl_context: "ssl.SSLContext | None" = None,
        trust_env: bool = True,
    ) -> None:
        super().__init__(max_connections, keepalive, ssl_context, trust_env)

    @staticmethod
    def _core() -> ModuleType:
        import httpcore  # noqa: PLC0415 - httpx puts it off, too: it looks for trio

        return httpcore

    @staticmethod
    def _make_context() -> "ssl.SSLContext":
        return httpx.create_ssl_context()
