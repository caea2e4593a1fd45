"""All that knows httpx2, the maintained fork of httpx: a wire on it, and bridges. Needs the extra ``httpx2``.

>>> from lemcal_async.transport.httpx2 import HTTPX2Transport
>>> lemcal = AsyncLemcal(transport=HTTPX2Transport())
"""

from collections.abc import AsyncIterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

try:
    import httpcore2
    import httpx2
except ModuleNotFoundError as error:
    if error.name not in {"httpcore2", "httpx2"}:
        raise
    raise ImportError("HTTPX2Transport needs its extra: pip install 'lemcal-async[httpx2]'") from None

import httpx

from lemcal_async.transport._environment import MakeContext
from lemcal_async.transport._pooled import HTTPCoreTransport

if TYPE_CHECKING:
    import ssl


class HTTPX2Transport(HTTPCoreTransport):
    """Does what ``PooledTransport`` does, with the same options, on httpx2.

    Requests, responses and errors stay those of httpx. Like every transport that is passed to a client, it is
    the caller's to close.

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
        return httpcore2

    @property
    def _make_context(self) -> MakeContext:
        return _httpx2_context


def _httpx2_context(trust_env: bool) -> "ssl.SSLContext":  # noqa: FBT001 - called by position
    return httpx2.create_ssl_context(trust_env=trust_env)


class HTTPX2Bridge(httpx.AsyncBaseTransport):
    """Any transport of httpx2 as one of httpx, with httpx's errors."""

    def __init__(self, wire: httpx2.AsyncBaseTransport) -> None:
        self._wire = wire
        self.reports_sending = getattr(wire, "reports_sending", False)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request."""
        theirs = httpx2.Request(
            request.method,
            str(request.url),
            headers=request.headers.raw,
            stream=_HTTPX2Body.of(request.stream),
            extensions=request.extensions,
        )
        try:
            response = await self._wire.handle_async_request(theirs)
        except httpx2.RequestError as error:
            known = _same(error, httpx)
        else:
            return httpx.Response(
                response.status_code,
                headers=response.headers.raw,
                stream=_HTTPXBody.of(response.stream),
                extensions=response.extensions,
            )
        raise known  # outside of the except block, so that nothing shows what is below

    async def aclose(self) -> None:
        """Close the transport below."""
        await self._wire.aclose()


async def answer(transport: httpx.AsyncBaseTransport, request: httpx2.Request) -> httpx2.Response:
    """Answer a request of httpx2 by a transport of httpx, with httpx2's errors."""
    ours = httpx.Request(
        request.method,
        str(request.url),
        headers=request.headers.raw,
        stream=_HTTPXBody.of(request.stream),
        extensions=request.extensions,
    )
    try:
        response = await transport.handle_async_request(ours)
    except httpx.RequestError as error:
        known = _same(error, httpx2)
    else:
        return httpx2.Response(
            response.status_code,
            headers=response.headers.raw,
            stream=_HTTPX2Body.of(response.stream),
            extensions=response.extensions,
        )
    raise known


class _Body:
    """The body of a request or response of one library, for the other."""

    _library: ModuleType
    _errors: type[Exception]  # those of the other library

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    @classmethod
    def of(cls, stream: Any) -> Any:
        """Return ``stream`` for this library."""
        if isinstance(stream, httpx.ByteStream | httpx2.ByteStream):
            return cls._library.ByteStream(b"".join(stream))
        return cls(stream)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        known = None
        try:
            async for part in self._stream:
                yield part
        except self._errors as error:
            known = _same(error, self._library)
        if known is not None:
            raise known

    async def aclose(self) -> None:
        """Close the original."""
        await self._stream.aclose()


class _HTTPXBody(_Body, httpx.AsyncByteStream):
    _library, _errors = httpx, httpx2.RequestError


class _HTTPX2Body(_Body, httpx2.AsyncByteStream):
    _library, _errors = httpx2, httpx.RequestError


def _same(error: Exception, library: Any) -> Exception:
    """Return the error of the same name that ``library`` has."""
    for kind in type(error).__mro__:
        known = getattr(library, kind.__name__, None)
        if known is not None and issubclass(known, library.RequestError):
            same: Exception = known(str(error))
            return same
    raise error  # not reached: both have RequestError
