"""The interface between rate limiters and the transport: ask before each request, report afterward.

Also defines ``Key``, which names a request's budget, and ``Unlimited``, the limiter that does not limit.
"""

import base64
from typing import Literal, Protocol, runtime_checkable
from urllib.parse import urlsplit

import attrs

from lemcal_async._auth import digest_of
from lemcal_async._headers import Quota
from lemcal_async._urls import DEFAULT_BASE_URL


@attrs.frozen
class Key:
    """Identifies one budget: one account at one API.

    Attributes:
        base_url: The base URL of the API.
        digest: A hash of the credential. The credential cannot be recovered from it.
    """

    base_url: str
    digest: str

    @property
    def short(self) -> str:
        """The start of the digest, enough to tell keys apart in a log."""
        return self.digest[:8]

    def __str__(self) -> str:
        return f"{self.short} at {self.base_url}"


def key_of(url: str, authorization: str) -> Key:
    """Return the key of a request, given only its URL and ``Authorization`` header.

    At the default base URL, the key equals the one that ``AsyncLemcal`` uses for the same account. For any
    other address, the origin stands in for the base URL.
    """
    if url.startswith(DEFAULT_BASE_URL):
        base_url = DEFAULT_BASE_URL
    else:
        parts = urlsplit(url)
        base_url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    scheme, _, value = authorization.partition(" ")
    pair = authorization
    if scheme.lower() == "basic":
        try:
            pair = base64.b64decode(value, validate=True).decode()
        except ValueError:  # not valid Base64, but the header still identifies a budget
            pair = authorization
    return Key(base_url, digest_of(pair))


Priority = Literal["interactive", "bulk"]
"""The priority of a call. Interactive calls go first; bulk calls keep one turn in five."""


@attrs.frozen
class RateLimit:
    """A snapshot of one key's budget, as far as this process knows.

    Attributes:
        limit: The number of requests that the window allows; None if unlimited.
        remaining: The number of requests that could be sent now; None if unlimited.
        resets_in: Seconds until the whole budget is available again.
        queued: The number of waiting calls.
        paused_for: Seconds until the pause after a 429 ends; 0 if the key is not paused.
    """

    limit: int | None
    remaining: int | None
    resets_in: float
    queued: int
    paused_for: float


class WouldWait(Exception):  # noqa: N818 - not an error by itself: the transport turns it into one
    """The wait would be longer than the caller can or should wait.

    Attributes:
        seconds: The expected wait in seconds.
        refused: True if the server itself refuses the key for that long (a 429).
    """

    def __init__(self, seconds: float, *, refused: bool) -> None:
        super().__init__(seconds, refused)
        self.seconds = seconds
        self.refused = refused


class Permit(Protocol):
    """Permission to send one request. Ends with exactly one ``answered``, ``unsent`` or ``unknown``.

    No method blocks or raises, so a canceled task can call them too.
    """

    def sent(self) -> bool | None:
        """Record that the request is being sent now. If not called, only the response bounds that moment.

        Returns False if the permit has expired. Then the request is not sent: the transport calls ``unsent``,
        and ``acquire`` again.
        """

    def answered(self, status_code: int, quota: Quota) -> float:
        """Record the response; return the seconds for which the limiter itself now pauses the key.

        Args:
            status_code: The response's status code.
            quota: The response's rate-limit headers.
        """
        ...

    def unsent(self) -> None:
        """Release the slot: the request never reached the server."""

    def unknown(self) -> None:
        """Record that no response will arrive; the server may have counted the request anyway."""


@runtime_checkable
class RateLimiter(Protocol):
    """Grants permits per key. Safe to share between tasks, event loops and threads."""

    async def acquire(
        self,
        key: Key,
        *,
        priority: Priority = "interactive",
        timeout: float | None = None,  # noqa: ASYNC109 - decides whether to refuse, is not a timer
        again: Permit | None = None,
    ) -> Permit:
        """Wait for this request's turn. Canceling the wait consumes nothing.

        Args:
            key: The budget that the request draws on.
            priority: ``"interactive"`` calls go before ``"bulk"`` calls.
            timeout: Seconds that the caller can wait; None for no limit.
            again: The permit of the same request's refused attempt; the request keeps its place in the queue.

        Raises:
            WouldWait: Immediately, if the wait is known to be longer than ``timeout``, or if the server
                refuses the key for too long.
        """
        ...

    def snapshot(self, key: Key) -> RateLimit:
        """Return the current state of a key's budget.

        Args:
            key: The key.
        """
        ...


class _FreePermit:
    """A permit that does nothing; one instance serves all requests."""

    def sent(self) -> None:
        """Do nothing."""

    def answered(self, status_code: int, quota: Quota) -> float:  # noqa: ARG002
        """Return 0: waiting after a 429 is left to the retries."""
        return 0.0

    def unsent(self) -> None:
        """Do nothing."""

    def unknown(self) -> None:
        """Do nothing."""


_FREE_PERMIT = _FreePermit()
_NO_LIMIT = RateLimit(limit=None, remaining=None, resets_in=0.0, queued=0, paused_for=0.0)


class Unlimited:
    """A rate limiter that never waits. After a 429, each call waits on its own before it retries."""

    async def acquire(
        self,
        key: Key,  # noqa: ARG002
        *,
        priority: Priority = "interactive",  # noqa: ARG002
        timeout: float | None = None,  # noqa: ARG002, ASYNC109
        again: Permit | None = None,  # noqa: ARG002
    ) -> Permit:
        """Return immediately."""
        return _FREE_PERMIT

    def snapshot(self, key: Key) -> RateLimit:  # noqa: ARG002
        """Return a snapshot without a limit."""
        return _NO_LIMIT
