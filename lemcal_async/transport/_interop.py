"""Lets transports of httpx2 stand below the layers, and clients of httpx2 above them.

httpx2, the maintained fork of httpx, has the same classes, and they are not those of httpx. What knows
it is in ``transport/httpx2.py``, which is only loaded for who uses it.
"""

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import httpx

from lemcal_async.errors import ConfigurationError

if TYPE_CHECKING:
    import httpx2

    Wire: TypeAlias = httpx.AsyncBaseTransport | httpx2.AsyncBaseTransport
else:
    Wire = httpx.AsyncBaseTransport  # which annotations show while the program runs


def as_httpx(wire: Wire) -> httpx.AsyncBaseTransport:
    """Return a transport of either library as one of httpx; raise ConfigurationError for anything else."""
    if isinstance(wire, httpx.AsyncBaseTransport):
        return wire
    fork = sys.modules.get("httpx2")
    if fork is not None and isinstance(wire, fork.AsyncBaseTransport):
        from lemcal_async.transport.httpx2 import HTTPX2Bridge  # noqa: PLC0415 - it is there for sure

        return HTTPX2Bridge(wire)
    raise ConfigurationError(
        f"transport= must be of type AsyncBaseTransport, httpx's or httpx2's, not {type(wire).__name__}"
    )


class Layer(httpx.AsyncBaseTransport):
    """A transport above another one, of either library, which it enters and closes with itself."""

    def __init__(self, wire: Wire) -> None:
        self._wire = as_httpx(wire)

    async def __aenter__(self) -> Self:
        await self._wire.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self._wire.__aexit__(exc_type, exc_value, traceback)

    async def aclose(self) -> None:
        """Close the transport below."""
        await self._wire.aclose()


async def answer_httpx2(transport: httpx.AsyncBaseTransport, request: Any) -> Any:
    """Answer a request of httpx2's client as that client expects it."""
    from lemcal_async.transport.httpx2 import answer  # noqa: PLC0415 - as above

    return await answer(transport, request)
