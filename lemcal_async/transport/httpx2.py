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

from lemcal_async.transport._environment import MakeContext
from lemcal_async.transport._pooled import HTTPCoreTransport

if TYPE_CHECKING:
    import ssl


class HTTPX2Transport(HTTPCoreTransport):
    """Does what ``PooledTransport`` does, with the same options, on httpx2.

    Requests, responses and errors stay those of httpx. Like every transport that is passed to a
    client, it is the caller's to close.
    """

    @staticmethod
    def _import_core() -> ModuleType:
        return httpcore2

    @property
    def _make_context(self) -> MakeContext:
        return _httpx2_context


def _httpx2_context(trust_env: bool) -> "ssl.SSLContext":  # noqa: FBT001 - called by position
    return httpx2.create_ssl_context(trust_env=trust_env)
