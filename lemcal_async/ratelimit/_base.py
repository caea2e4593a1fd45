"""What a rate limiter is to the transport: one question before each request, reports after it.

Here are also the key that a request draws on, and the limiter that does not limit.
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
    """The name of one budget.

    Attributes:
        base_url: The API that it is for.
        digest: A hash of the credential, which cannot be had from it.
    """

    base_url: str
    digest: str

    @property
    def short(self) -> str:
        """Return enough of the digest to tell keys apart in a log."""
        return self.digest[:8]

    def __str__(self) -> str:
        return f"{self.short} at {self.base_url}"


def key_of(url: str, authorization: str) -> Key:
    """Return the key of a request of which only URL and ``Authorization`` are known.

    At the default base URL it equals the one that ``AsyncLemcal`` uses for the same account; for any
    other address the origin stands in for the base URL.
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
        except ValueError:  # not what it claims to be: still somebody's key
            pair = authorization
    return Key(base_url, digest_of(pair))


Priority = Literal["interactive", "bulk"]
"""Which calls go first: interactive ones, but bulk ones keep one turn in five."""


@attrs.frozen
class RateLimit:
    """A snapshot of one key's budget, as far as this process knows.

    Attributes:
        limit: How many requests the window allows; None for no limit.
        remaining: How many requests could leave now; None for no limit.
        resets_in: Seconds until the budget is whole again.
        queued: How many calls are waiting.
        paused_for: For how many seconds the key still pauses after a 429.
    """

    limit: int | None
    remaining: int | None
    resets_in: float
    queued: int
    paused_for: float


class WouldWait(Exception):  # noqa: N818 - an answer to a question, which the transport turns into an error
    """Waiting is pointless: it would take longer than the caller can or should wait.

    Attributes:
        seconds: How long it would take.
        refused: True if the server itself refuses the key for that long (a 429).
    """

    def __init__(self, seconds: float, *, refused: bool) -> None:
        super().__init__(seconds, refused)
        self.seconds = seconds
        self.refused = refused


class Permit(Protocol):
    """Permission to send one request. Exactly one of the last three reports ends it.

    None of them waits or raises, so they can be made from a canceled task.
    """

    def sent(self) -> bool | None:
        """Note that the request is leaving now. Without this, only the answer bounds the moment.

        False ends the permit: it has run out, so nothing must be sent. Then ``acquire`` again.
        """

    def answered(self, status_code: int, quota: Quota) -> float:
        """Note the answer; return for how many seconds the limiter itself now pauses the key.

        Args:
            status_code: The status of the answer.
            quota: What its headers say.
        """
        ...

    def unsent(self) -> None:
        """Give the slot back: the request never reached the server."""

    def unknown(self) -> None:
        """Note that no answer will come, and that the server may have counted the request."""


@runtime_checkable
class RateLimiter(Protocol):
    """Hands out permits, per key; safe to share between tasks, event loops and threads."""

    async def acquire(
        self,
        key: Key,
        *,
        priority: Priority = "interactive",
        timeout: float | None = None,  # noqa: ASYNC109 - a bound to refuse by, not a timer
        again: Permit | None = None,
    ) -> Permit:
        """Wait for this request's turn. Canceling the wait costs nobody anything.

        Args:
            key: The budget that the request draws on.
            priority: ``"interactive"`` passes ``"bulk"``.
            timeout: How many seconds the caller has; None for any number.
            again: The permit of the same request's refused attempt, whose place in the queue it keeps.

        Raises:
            WouldWait: At once, if the wait is known to be longer than ``timeout``, or the server refuses the
                key for long.
        """
        ...

    def snapshot(self, key: Key) -> RateLimit:
        """Return what is known of a key now.

        Args:
            key: The key.
        """
        ...


class _FreePermit:
    """A permit that costs nothing; one serves all requests."""

    def sent(self) -> None:
        """Nothing is counted."""

    def answered(self, status_code: int, quota: Quota) -> float:  # noqa: ARG002
        """Pause nothing: waiting after a 429 is left to the retries."""
        return 0.0

    def unsent(self) -> None:
        """Nothing is counted."""

    def unknown(self) -> None:
        """Nothing is counted."""


_FREE_PERMIT = _FreePermit()
_NO_LIMIT = RateLimit(limit=None, remaining=None, resets_in=0.0, queued=0, paused_for=0.0)


class Unlimited:
    """A RateLimiter that lets everything pass at once. Each call then waits out a 429 on its own."""

    async def acquire(
        self,
        key: Key,  # noqa: ARG002
        *,
        priority: Priority = "interactive",  # noqa: ARG002
        timeout: float | None = None,  # noqa: ARG002, ASYNC109
        again: Permit | None = None,  # noqa: ARG002
    ) -> Permit:
        """Return at once."""
        return _FREE_PERMIT

    def snapshot(self, key: Key) -> RateLimit:  # noqa: ARG002
        """Return a snapshot without a limit."""
        return _NO_LIMIT
