"""The default wire: httpcore's connections, with the certificates that httpx trusts."""

from types import ModuleType
from typing import TYPE_CHECKING

import httpx

from lemcal_async.transport.wire import Wire

if TYPE_CHECKING:
    import ssl


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
