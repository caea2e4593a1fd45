"""The default wire: a gate, and behind it a stack of transports of one connection each.

httpx's own pool can be left with dead slots by cancellation, and scans every queued request and
every idle connection on each call. Here a connection belongs to one request at a time, the last
one used is used next, and one that saw any exception is closed and thrown away.
"""

import threading
import time
import urllib.request
import weakref
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, cast

import anyio
import anyio.to_thread
import attrs
import httpx
from anyio.lowlevel import current_token

from lemcal_async import events
from lemcal_async.errors import ConfigurationError

if TYPE_CHECKING:
    import ssl  # a tenth of this package's import time, and every event loop brings it anyway

Origin = tuple[str, str, int | None]  # scheme, host, port

_ONE = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=None)


class PooledTransport(httpx.AsyncBaseTransport):
    """Sends requests over at most ``max_connections`` connections at once, per event loop.

    Time spent waiting at the gate is no pool timeout. Connections idle for ``keepalive`` seconds
    are closed, at the next use of the transport. ``ssl_context`` is one for the whole process
    unless given. The system's proxies are honoured (``HTTPS_PROXY``, ``NO_PROXY`` …) unless
    ``trust_env`` is False.

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
        if max_connections < 1:
            raise ConfigurationError(f"max_connections={max_connections!r}: at least 1 is needed")
        self._max_connections = max_connections
        self._keepalive = keepalive
        self._ssl_context = ssl_context
        self._proxies = urllib.request.getproxies() if trust_env else {}  # by scheme, or "all"
        self._pools: weakref.WeakKeyDictionary[Any, _Pool] = weakref.WeakKeyDictionary()
        self._changing = threading.Lock()  # which pools there are
        self._closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request; the response holds its connection until it is closed."""
        pool = self._pool()
        origin = (request.url.scheme, request.url.host, request.url.port)
        if events.wanted():
            await self._enter_and_tell(pool)
        else:
            await pool.gate.acquire()
        connection = None
        try:
            connection = pool.take(origin) or await self._connect(origin)
            response = await connection.handle_async_request(request)
        except BaseException:
            pool.gate.release()
            if connection is not None:
                await _close([connection])
            raise
        stream = cast("httpx.AsyncByteStream", response.stream)
        response.stream = _Body(stream, pool, origin, connection)
        return response

    async def _enter_and_tell(self, pool: "_Pool") -> None:
        began = time.monotonic()
        await pool.gate.acquire()
        in_use = self._max_connections - pool.gate.value
        events.emit(events.PoolEntered(in_use, self._max_connections, time.monotonic() - began))

    async def aclose(self) -> None:
        """Close the idle connections of this event loop; those in use close when they come free."""
        with self._changing:
            self._closed = True
            for pool in self._pools.values():
                pool.closed = True
        here = self._pools.get(current_token().native_token)
        if here is not None:
            await _close(here.drain())

    def _pool(self) -> "_Pool":
        loop = current_token().native_token
        pool = self._pools.get(loop)
        if self._closed:
            raise ConfigurationError("this transport is closed; make a new one")
        if pool is None:
            gate = anyio.Semaphore(self._max_connections, fast_acquire=True)
            pool = _Pool(gate, self._keepalive)
            with self._changing:
                # An idle connection keeps asyncio's loop alive, and so itself.
                for ended in [other for other in self._pools if _is_closed(other)]:
                    del self._pools[ended]
                self._pools[loop] = pool
        return pool

    async def _connect(self, origin: Origin) -> httpx.AsyncHTTPTransport:
        """Return a transport for one connection, which opens when it is first used."""
        scheme, host, port = origin
        proxy = self._proxies.get(scheme) or self._proxies.get("all")
        if proxy and any(map(urllib.request.proxy_bypass, (host, f"{host}:{port}"))):
            proxy = None
        if proxy and "://" not in proxy:  # HTTP_PROXY=host:port is common
            proxy = f"http://{proxy}"
        tls_to_proxy = (proxy or "").lower().startswith("https:")
        context = self._ssl_context or await _context(tls=tls_to_proxy or scheme == "https")
        try:
            # Without a context for the way to the proxy, httpcore would make one for each connection,
            # on the event loop, and not trust those whom ours trusts.
            via = httpx.Proxy(proxy, ssl_context=context if tls_to_proxy else None) if proxy else None
            return httpx.AsyncHTTPTransport(verify=context, limits=_ONE, proxy=via, trust_env=False)
        except (ImportError, ValueError, httpx.InvalidURL):
            via = None  # raised below, because the cause could show the proxy's password
        del proxy, via  # as could local variables
        raise ConfigurationError(
            f"the proxy that the environment sets for {scheme} cannot be used: it must be an http://, "
            "https:// or socks5:// URL, and the last needs the package socksio"
        )


@attrs.define(eq=False)
class _Pool:
    """The connections of one event loop."""

    gate: anyio.Semaphore
    keepalive: float
    closed: bool = False
    _idle: "dict[Origin, deque[tuple[float, httpx.AsyncHTTPTransport]]]" = attrs.field(
        factory=dict[Origin, deque[tuple[float, httpx.AsyncHTTPTransport]]], init=False
    )

    def take(self, origin: Origin) -> httpx.AsyncHTTPTransport | None:
        """Return the idle connection that was used last; a stale one is left for ``put`` to sweep."""
        idle = self._idle.get(origin)
        if idle and idle[-1][0] >= time.monotonic() - self.keepalive:
            return idle.pop()[1]
        return None

    def put(self, origin: Origin, connection: httpx.AsyncHTTPTransport) -> list[httpx.AsyncHTTPTransport]:
        """Keep a connection for the next request; return those that are to be closed instead."""
        if self.closed:
            return [connection]
        now = time.monotonic()
        self._idle.setdefault(origin, deque()).append((now, connection))
        stale: list[httpx.AsyncHTTPTransport] = []
        for idle in self._idle.values():
            while idle and idle[0][0] < now - self.keepalive:
                stale.append(idle.popleft()[1])
        return stale

    def drain(self) -> list[httpx.AsyncHTTPTransport]:
        """Take out all idle connections."""
        drained = [connection for idle in self._idle.values() for _, connection in idle]
        self._idle.clear()
        return drained


class _Body(httpx.AsyncByteStream):
    """The body of a response, which gives the connection back when it is closed."""

    def __init__(
        self,
        stream: httpx.AsyncByteStream,
        pool: _Pool,
        origin: Origin,
        connection: httpx.AsyncHTTPTransport,
    ) -> None:
        self._stream = stream
        self._pool = pool
        self._origin = origin
        self._connection: httpx.AsyncHTTPTransport | None = connection
        self._whole = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            yield part
        self._whole = True

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        stale = [connection]
        try:
            if self._whole:
                # Tells httpcore that the connection is free again.
                await self._stream.aclose()
                stale = self._pool.put(self._origin, connection)
        finally:
            self._pool.gate.release()
            await _close(stale)


async def _close(connections: list[httpx.AsyncHTTPTransport]) -> None:
    # Shielded, but what makes them harmless (out of the pool, place at the gate given back) has
    # been done before: a second native cancellation gets through a shield.
    if connections:
        with anyio.CancelScope(shield=True):
            for connection in connections:
                await connection.aclose()


_contexts: "dict[bool, ssl.SSLContext]" = {}  # two for the process: one for TLS, one for plain http


_making = threading.Lock()


async def _context(*, tls: bool) -> "ssl.SSLContext":
    if tls not in _contexts:
        # In a thread, because reading the certificates takes 20 ms.
        await anyio.to_thread.run_sync(lambda: _make_context(tls=tls))
    return _contexts[tls]


def _make_context(*, tls: bool) -> None:
    with _making:  # of calls that begin at once, the first makes it for all
        if tls not in _contexts:
            # Where no TLS is used, httpx still wants a context, and makes one that costs as much:
            # give it one that trusts nobody.
            _contexts[tls] = httpx.create_ssl_context() if tls else _bare_context()


def _is_closed(loop: Any) -> bool:
    """Whether ``loop`` is one of asyncio that is closed; trio's are forgotten by themselves."""
    return hasattr(loop, "is_closed") and bool(loop.is_closed())


def _bare_context() -> "ssl.SSLContext":
    import ssl  # noqa: PLC0415 - see above

    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
