"""What a rate limiter is to the transport: one question before each request, reports after it."""

from typing import Literal, Protocol, runtime_checkable

import attrs

from lemcal_async.headers import Quota
from lemcal_async.ratelimit.key import Key

Priority = Literal["interactive", "bulk"]


@attrs.frozen
class RateLimit:
    """A snapshot of one key's budget, as far as this process knows.

    ``remaining`` requests could leave now; the budget is whole again in ``resets_in`` seconds.
    ``queued`` calls are waiting; after a 429 nobody sends for another ``paused_for`` seconds.
    """

    limit: int | None
    remaining: int | None
    resets_in: float
    queued: int
    paused_for: float


class WouldWait(Exception):  # noqa: N818 - an answer to a question, turned into an error by the transport
    """Waiting is pointless: it would take ``seconds``, longer than the caller can or should wait.

    ``refused`` is True when the server itself refuses the key for that long (a 429).
    """

    def __init__(self, seconds: float, *, refused: bool) -> None:
        super().__init__(seconds, refused)
        self.seconds = seconds
        self.refused = refused


class Permit(Protocol):
    """Leave to send one request. Exactly one of the three last reports ends it.

    None of them waits or raises, so they can be made from a cancelled task.
    """

    def sent(self) -> None:
        """Note that the request is leaving now. Without this, only the answer bounds the moment."""

    def answered(self, status_code: int, quota: Quota) -> float:
        """Note the answer; return the seconds for which the limiter itself now holds the key."""
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
        """Wait for this request's turn.

        ``timeout`` is the seconds that the caller has: raises WouldWait at once when the wait is
        known to be longer. ``again`` is the permit of the same request's refused attempt, whose
        place in the queue it keeps. Cancelling the wait costs nobody anything.
        """
        ...

    def snapshot(self, key: Key) -> RateLimit:
        """Return what is known of ``key`` now."""
        ...
