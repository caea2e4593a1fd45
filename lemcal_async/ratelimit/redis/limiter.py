"""The rate limiter that several processes and machines share through Redis, as its users see it.

Its options, entering and leaving, one call's wait. The keys in use and all that talks to Redis are
in ``serving``.
"""

import itertools
import math
import time
from typing import Self

from lemcal_async.errors import ConfigurationError
from lemcal_async.ratelimit.key import Key
from lemcal_async.ratelimit.protocol import Permit, Priority, RateLimit
from lemcal_async.ratelimit.redis.account import Ticket
from lemcal_async.ratelimit.redis.fallback import PLANS, Plan, WhenDown
from lemcal_async.ratelimit.redis.link import RedisLink
from lemcal_async.ratelimit.redis.serving import Serving
from lemcal_async.ratelimit.wakeup import Wakeup


class RedisRateLimiter:
    """At most ``limit`` requests in any ``period`` seconds for each key, over all that use one Redis.

    ``url`` is ``redis://``, ``rediss://`` or ``unix://``, with user, password and database as usual.
    It behaves as ``LocalRateLimiter`` does, and processes that wait are served in turn. Enter it
    once, at the top of a task, with ``async with``; it belongs to that event loop::

        async with RedisRateLimiter("redis://localhost") as limiter, AsyncLemcal(limiter=limiter) as lemcal:
            ...

    Redis has ``timeout`` seconds for each answer. ``when_down`` says what holds without it: each
    process keeps to a ``share`` of the limit (default: divided by the processes seen lately), or calls
    ``"raise"`` a LemcalError, or nothing is limited (``"open"``). It is tried again every second. Names
    in Redis begin with ``prefix``; they hold no secret, and expire by themselves.

    Raises ConfigurationError for a wrong URL or refused credentials, and when it is used elsewhere.
    """

    def __init__(
        self,
        url: str,
        *,
        limit: int = 20,
        period: float = 2.0,
        when_down: WhenDown = "share",
        share: float | None = None,
        timeout: float = 0.25,
        prefix: str = "lemcal:",
    ) -> None:
        if limit < 1 or not 0 < period < math.inf:
            raise ConfigurationError(
                "a rate limit needs a limit of at least 1 and a period of seconds above 0"
            )
        if when_down not in PLANS or not (share is None or 0 < share <= 1):
            raise ConfigurationError("when_down= is 'share', 'raise' or 'open'; share= is above 0, 1 at most")
        if not 0 < timeout < math.inf or "{" in prefix:
            raise ConfigurationError("timeout= is in seconds, above 0; prefix= must not contain '{'")
        self.limit = limit
        self.period = period
        self._plan = Plan(when_down, limit, share)
        self._link = RedisLink(url, timeout)
        url = ""  # it may hold a password, which a traceback with local variables must not show
        if self._link.problem is not None:
            raise ConfigurationError(self._link.problem)
        self._prefix = prefix
        self._timeout = timeout
        self._numbers = itertools.count()
        self._serving: Serving | None = None

    def __repr__(self) -> str:
        return (
            f"RedisRateLimiter(limit={self.limit}, period={self.period}, when_down={self._plan.when_down!r})"
        )

    async def __aenter__(self) -> Self:
        if self._serving is not None:
            raise ConfigurationError("this RedisRateLimiter is in use already: enter it once, and share it")
        await self._link.__aenter__()
        self._serving = await Serving(
            self._link, self._plan, limit=self.limit, period=self.period, prefix=self._prefix
        ).__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        serving, self._serving = self._serving, None
        if serving is None:
            return
        try:
            await serving.close(2 * self._timeout)
        finally:
            await self._link.__aexit__()

    async def acquire(
        self,
        key: Key,
        *,
        priority: Priority = "interactive",
        timeout: float | None = None,  # noqa: ASYNC109 - a bound to refuse by, not a timer
        again: Permit | None = None,
    ) -> Permit:
        """Wait for this request's turn; see ``RateLimiter.acquire``.

        Raises WouldWait, and LemcalError without Redis if so configured. Cancelled (by anyio or
        natively) at any moment, it leaves no trace: a slot that it had goes to the next in the queue,
        or back to the other processes.
        """
        serving, wakeup = self._serving, Wakeup()
        if serving is None or wakeup.loop is not serving.loop:
            raise ConfigurationError(
                "nothing was sent: a RedisRateLimiter works inside its `async with`, in that event loop only"
            )
        before = again if isinstance(again, Ticket) and again.limiter is self else None
        account = serving.account_of(key)
        ticket = Ticket(
            limiter=self,
            account=account,
            number=next(self._numbers) if before is None else before.number,
            priority=priority,
            refused=before is not None,
            timeout=timeout,
            wakeup=wakeup,
            loop=serving.loop,
        )
        try:
            account.ask(ticket)
            while ticket.outcome is None:
                await wakeup.event.wait()
        except BaseException:  # cancelled, or closed by the garbage collector
            account.withdraw(ticket)
            raise
        if ticket.outcome != "granted":
            raise ticket.outcome
        return ticket

    def snapshot(self, key: Key) -> RateLimit:
        """Return what this process has heard of ``key``; a key never used has its whole limit."""
        account = None if self._serving is None else self._serving.accounts.get(key)
        if account is None:
            return RateLimit(self.limit, self.limit, resets_in=0.0, queued=0, paused_for=0.0)
        return account.budget.snapshot(time.monotonic(), len(account.queue))
