"""The default wire: httpcore's connections in the package's own pool, and the certificates of httpx."""

import threading
from abc import abstractmethod
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self

import anyio.to_thread
import httpx

from lemcal_async._backends import is_in_event_loop
from lemcal_async.transport._environment import MakeContext
from lemcal_async.transport._http11 import HTTP11Connection
from lemcal_async.transport._pool import Answer, BasePooledTransport, Target

if TYPE_CHECKING:
    import ssl

    from lemcal_async.transport._network import NetworkBackend

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
    _backend: "NetworkBackend"

    def __init__(
        self,
        *,
        max_connections: int = 100,
        keepalive: float = 60.0,
        ssl_context: "ssl.SSLContext | None" = None,
        trust_env: bool = True,
    ) -> None:
        super().__init__(
            max_connections=max_connections,
            keepalive=keepalive,
            ssl_context=ssl_context,
            trust_env=trust_env,
        )
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
                from lemcal_async.transport._network import NetworkBackend  # noqa: PLC0415 - it brings asyncio

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
                known: httpx.RequestError = getattr(httpx, kind.__name__)(str(error))
                return known
        return None


def _is_mocked(core: Any) -> bool:
    """Whether a test has put itself in the place of httpcore's connections, as respx does."""
    return not core.AsyncHTTPConnection.handle_async_request.__module__.startswith(core.__name__)


def _content_of(request: httpx.Request) -> Any:
    stream = request.stream
    return _Body(b"".join(stream)) if isinstance(stream, httpx.ByteStream) else stream


class _Body:
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
    """The default wire: at most ``max_connections`` connections at once per event loop, shared fairly.

    An account that is busy or hangs does not keep the others waiting. Connections idle for ``keepalive``
    seconds are closed at the next use of the transport. ``ssl_context`` is one for the whole process
    unless given. With ``trust_env`` the system's proxies (``HTTPS_PROXY``, ``NO_PROXY`` …) and
    certificates (``SSL_CERT_FILE``, ``SSL_CERT_DIR``) are used.

    It may be made before any event loop runs, and serves several of them. Calls of an ``AsyncLemcal`` wait
    for a connection as long as their deadline allows; in a plain ``httpx.AsyncClient`` its pool timeout
    holds. ``aclose`` lets requests under way finish. Canceled at any moment, a request closes its
    connection and gives its slot to the next. A connection that carries anything but the answers to its
    requests is closed, so that no answer is paired with another request.
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
