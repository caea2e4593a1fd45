"""A transport on httpx2, the maintained fork of httpx, and adapters for both. Requires the extra ``httpx2``.

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
    raise ImportError(
        "HTTPX2Transport requires the extra httpx2: pip install 'lemcal-async[httpx2]'"
    ) from None

import httpx

from lemcal_async.transport._environment import MakeContext
from lemcal_async.transport._pooled import HTTPCoreTransport

if TYPE_CHECKING:
    import ssl


class HTTPX2Transport(HTTPCoreTransport):
    """A transport like ``PooledTransport``, with the same options, built on httpx2.

    Requests, responses and errors are still httpx's. Like any transport passed to a client, the caller is
    responsible for closing it.

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
        return httpcore2

    @property
    def _make_context(self) -> MakeContext:
        return _httpx2_context


def _httpx2_context(trust_env: bool) -> "ssl.SSLContext":  # noqa: FBT001 - called by position
    return httpx2.create_ssl_context(trust_env=trust_env)


class HTTPX2Bridge(httpx.AsyncBaseTransport):
    """Adapts an httpx2 transport to httpx's interface and errors."""

    def __init__(self, wire: httpx2.AsyncBaseTransport) -> None:
        self._wire = wire
        self.reports_sending = getattr(wire, "reports_sending", False)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request."""
        httpx2_request = httpx2.Request(
            request.method,
            str(request.url),
            headers=request.headers.raw,
            stream=_HTTPX2Body.of(request.stream),
            extensions=request.extensions,
        )
        try:
            response = await self._wire.handle_async_request(httpx2_request)
        except httpx2.RequestError as error:
            translated = _translate_error(error, httpx)
        else:
            return httpx.Response(
                response.status_code,
                headers=response.headers.raw,
                stream=_HTTPXBody.of(response.stream),
                extensions=response.extensions,
            )
        raise translated  # outside the except block, so that the original error is not its context

    async def aclose(self) -> None:
        """Close the transport below."""
        await self._wire.aclose()


async def handle_request(transport: httpx.AsyncBaseTransport, request: httpx2.Request) -> httpx2.Response:
    """Send an httpx2 request through an httpx transport, with httpx2's errors."""
    httpx_request = httpx.Request(
        request.method,
        str(request.url),
        headers=request.headers.raw,
        stream=_HTTPXBody.of(request.stream),
        extensions=request.extensions,
    )
    try:
        response = await transport.handle_async_request(httpx_request)
    except httpx.RequestError as error:
        translated = _translate_error(error, httpx2)
    else:
        return httpx2.Response(
            response.status_code,
            headers=response.headers.raw,
            stream=_HTTPX2Body.of(response.stream),
            extensions=response.extensions,
        )
    raise translated


class _Body:
    """Adapts the body of a request or response to the other library."""

    _library: ModuleType
    _errors: type[Exception]  # the other library's

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    @classmethod
    def of(cls, stream: Any) -> Any:
        """Adapt ``stream`` to this library."""
        if isinstance(stream, httpx.ByteStream | httpx2.ByteStream):
            return cls._library.ByteStream(b"".join(stream))
        return cls(stream)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        translated = None
        try:
            async for part in self._stream:
                yield part
        except self._errors as error:
            translated = _translate_error(error, self._library)
        if translated is not None:
            raise translated

    async def aclose(self) -> None:
        """Close the adapted stream."""
        await self._stream.aclose()


class _HTTPXBody(_Body, httpx.AsyncByteStream):
    _library, _errors = httpx, httpx2.RequestError


class _HTTPX2Body(_Body, httpx2.AsyncByteStream):
    _library, _errors = httpx2, httpx.RequestError


def _translate_error(error: Exception, library: Any) -> Exception:
    """Return the equivalent of ``error`` in ``library``, found by its class name."""
    for kind in type(error).__mro__:
        equivalent = getattr(library, kind.__name__, None)
        if equivalent is not None and issubclass(equivalent, library.RequestError):
            translated: Exception = equivalent(str(error))
            return translated
    raise error  # unreachable: both libraries have RequestError
