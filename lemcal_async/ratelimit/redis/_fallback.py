"""When to give up on a service that others share, and when to try it again. Pure.

Also what one process may do without Redis: its share of each key's limit, from when on, until when.

Whether Redis is away is for the ``breaker`` to say, who waits is for ``account``. Times are seconds on
this process's own clock.
"""

import math
import time
from typing import Literal

import anyio

from lemcal_async.errors import LemcalError
from lemcal_async.ratelimit._base import Key, Permit
from lemcal_async.ratelimit._local import LocalRateLimiter

FIRST_DELAY = 0.25  # seconds until the first new attempt
LAST_DELAY = 1.0  # all processes are to notice within so many seconds that it is back


class CircuitBreaker:
    """Closed while all is well. Open, nobody is to ask but one, every ``delay`` seconds.

    It is open since the moment ``since``, for ``reason``.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.delay = FIRST_DELAY
        self.since = -math.inf
        self.reason = ""

    def failed(self, reason: str, now: float) -> bool:
        """Note a failure; True if it is the first."""
        if self.is_open:
            self.delay = min(2 * self.delay, LAST_DELAY)
            return False
        self.is_open, self.delay, self.since, self.reason = True, FIRST_DELAY, now, reason
        return True

    def succeeded(self) -> bool:
        """Note a success; True if it is the first after failures."""
        news, self.is_open = self.is_open, False
        return news


WhenDown = Literal["share", "raise", "open"]

FALLBACK_POLICIES: dict[WhenDown, str] = {
    "share": "this process keeps to its share of the limit meanwhile",
    "raise": "calls fail meanwhile",
    "open": "nothing is limited meanwhile",
}

UNKNOWN_SHARE = 0.25  # of the limit, for a process that does not know how many there are
REMEMBERED = 60.0  # seconds for which another process counts as there


class FallbackPolicy:
    """What was chosen for the time without Redis; ``share`` None divides by the processes seen lately."""

    def __init__(self, when_down: WhenDown, limit: int, share: float | None) -> None:
        self.when_down: WhenDown = when_down
        self._limit = limit
        self._share = share
        self._processes = 0
        self._seen_at = -math.inf

    def see(self, processes: int, now: float) -> None:
        """Note how many processes there are."""
        if processes >= self._processes or now - self._seen_at > REMEMBERED:
            self._processes, self._seen_at = processes, now

    @property
    def own_limit(self) -> int:
        """Return how many requests of a period this process may send."""
        share = self._share
        if share is None:
            share = 1 / self._processes if self._processes else UNKNOWN_SHARE
        return max(1, int(self._limit * share + 1e-9))


class Fallback:
    """One key without Redis: ``begins`` is when its share may be used, ``ends`` when all go back.

    While Redis is away the end is open; ``ends`` counts when it is there again, but has not heard yet
    what others did meanwhile.
    """

    def __init__(self, key: Key, period: float, plan: FallbackPolicy, breaker: CircuitBreaker) -> None:
        self.plan = plan
        self.begins = math.inf
        self.ends = -math.inf
        self._key = key
        self._period = period
        self._breaker = breaker
        self._local: LocalRateLimiter | None = None
        self._waiting: anyio.CancelScope | None = None

    def begin(self, moment: float) -> None:
        """Go on without Redis, and use the share from ``moment`` on."""
        self.begins, self._local = moment, None

    def end(self) -> None:
        """Go by Redis alone."""
        self.begins, self.ends, self._local = math.inf, -math.inf, None

    def holds(self, now: float) -> bool:
        """Whether the key goes on without Redis now."""
        return self._breaker.is_open or self.ends > now

    def estimate(self, now: float, ahead: int) -> float:
        """Return the seconds that a request with ``ahead`` others before it waits at least."""
        if self.plan.when_down == "open":
            return 0.0
        return max(0.0, self.begins - now) + ahead // self.plan.own_limit * self._period

    async def acquire(self, until: float) -> Permit | None:
        """Wait for a slot of the share; None if there was none until then, or if interrupted.

        Raises WouldWait after a 429 that is too long to be slept through.
        """
        if self._local is None:
            self._local = LocalRateLimiter(self.plan.own_limit, self._period)
        scope = self._waiting = anyio.CancelScope()
        if until < math.inf:
            scope.deadline = anyio.current_time() + max(0.0, until - time.monotonic())
        try:
            with scope:
                return await self._local.acquire(self._key)
        finally:
            self._waiting = None
        return None

    def interrupt(self) -> None:
        """Let nobody wait for the share any more."""
        if self._waiting is not None:
            self._waiting.cancel()

    def error(self) -> LemcalError:
        """Return what a call gets that must not go on without Redis."""
        return LemcalError(
            f"nothing was sent: the rate limiter's Redis does not answer ({self._breaker.reason}); see that "
            "it runs, or choose when_down='share'"
        )
