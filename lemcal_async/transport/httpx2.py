"""Another wire: the connections of httpx2, the maintained fork of httpx. Needs the extra ``httpx2``.

>>> from lemcal_async.transport.httpx2 import HTTPX2Transport
>>> lemcal = AsyncLemcal(transport=HTTPX2Transport())
"""

from types import ModuleType
from typing import TYPE_CHECKING

try:
    import httpcore2
    import httpx2
except ModuleNotFoundError as error:
    if error.name not in {"httpcore2", "httpx2"}:
        raise
    raise ImportError("this wire needs its extra: pip install 'lemcal-async[httpx2]'") from None

from lemcal_async.transport._pooled import Wire

if TYPE_CHECKING:
    import ssl


class HTTPX2Transport(Wire):
    """Does what ``PooledTransport`` does, with the same options, on httpx2.

    Requests, responses and errors stay those of httpx. Like every transport that is passed to a
    client, it is the caller's to close.
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
        return httpcore2

    @staticmethod
    def _make_context() -> "ssl.SSLContext":
        return httpx2.create_ssl_context()
