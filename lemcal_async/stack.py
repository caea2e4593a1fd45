"""The layers that a client and its siblings share, and whether they are still open."""

import warnings

import httpx

from lemcal_async.errors import ConfigurationError
from lemcal_async.ratelimit import RateLimiter
from lemcal_async.transport import PooledTransport, RateLimitTransport, RetryTransport


class Stack:
    """Retries around the rate limit around the wire. The default wire is ours to close, others not."""

    def __init__(
        self,
        wire: httpx.AsyncBaseTransport | None,
        limiter: RateLimiter | None,
        max_response_bytes: int,
    ) -> None:
        self._owned: PooledTransport | None = None
        if wire is None:
            wire = self._owned = PooledTransport()
        self._limit = RateLimitTransport(wire, limiter)
        self.entry = RetryTransport(self._limit, max_response_bytes=max_response_bytes)
        self._used = False
        self._closed = False

    @property
    def limiter(self) -> RateLimiter:
        """The limiter in use."""
        return self._limit.limiter

    def check_open(self) -> None:
        """Raise ConfigurationError after ``aclose``; to be called before each use of ``entry``."""
        if self._closed:
            raise ConfigurationError(
                "nothing was sent: this client, or the one that it was made from, is closed; make a new one"
            )
        self._used = True

    async def aclose(self) -> None:
        """Close the wire, if it is ours. Idempotent."""
        self._closed = True
        if self._owned is not None:
            await self._owned.aclose()

    def __del__(self) -> None:
        # No I/O here: there may be no event loop any more.
        if self._owned is not None and self._used and not self._closed:
            warnings.warn(
                "an AsyncLemcal was not closed; use `async with`, or await its aclose()",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )
