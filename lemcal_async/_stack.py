"""The transport layers that a client and its siblings share, and whether they are still open."""

import warnings

from lemcal_async._backends import preload
from lemcal_async.errors import ConfigurationError
from lemcal_async.ratelimit import RateLimiter
from lemcal_async.transport import PooledTransport, RateLimitTransport, RetryTransport
from lemcal_async.transport._interop import Wire


class TransportStack:
    """Retries around the rate limit around a wire. Closes the default wire, but not one passed in."""

    def __init__(
        self,
        wire: Wire | None,
        limiter: RateLimiter | None,
        max_response_bytes: int,
    ) -> None:
        preload()
        self._owned: PooledTransport | None = None
        self._limiter = limiter
        self._max_response_bytes = max_response_bytes
        self._used = False
        self._closed = False
        if wire is None:
            wire = self._owned = PooledTransport()
        self._build(wire)

    def _build(self, wire: Wire) -> None:
        self._limit = RateLimitTransport(wire, self._limiter)
        self.entry = RetryTransport(self._limit, max_response_bytes=self._max_response_bytes)

    @property
    def limiter(self) -> RateLimiter:
        """The limiter in use."""
        return self._limit.limiter

    def check_open(self) -> None:
        """Raise ConfigurationError after ``aclose``; call this before each use of ``entry``."""
        if self._closed:
            raise ConfigurationError(
                "nothing was sent: this client, or the one it was made from, is closed; make a new one"
            )
        self._used = True

    def reopen(self) -> None:
        """Make it usable again after ``aclose``, on a new default wire if it had one."""
        if self._closed and self._owned is not None:
            self._owned = PooledTransport()
            self._build(self._owned)
        self._closed = False

    async def aclose(self) -> None:
        """Close the default wire. Idempotent."""
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
