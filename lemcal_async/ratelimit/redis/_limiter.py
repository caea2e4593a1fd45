"""The tasks of the keys in use: each asks Redis for as many slots as calls wait, and hands them out.

Then it sleeps for as long as Redis said. While Redis is away a key falls back to what is allowed
then, and one task tries again for all. Callers only wait, see ``account``, so a cancelled one breaks
off no conversation.

The rate limiter that several processes and machines share through Redis, as its users see it.

Its options, entering and leaving, one call's wait. The keys in use and all that talks to Redis are
in ``serving``.
"""

import itertools
import logging
import math
import secrets
import time
from functools import partial
from typing import Self

import anyio

from lemcal_async import events
from lemcal_async._auth import Secret
from lemcal_async._concurrency import Wakeup
from lemcal_async.errors import ConfigurationError, LemcalError
from lemcal_async.ratelimit._base import Key, Permit, Priority, RateLimit, WouldWait
from lemcal_async.ratelimit.redis._budget import Budget
from lemcal_async.ratelimit.redis._connection import RedisConnection, Unreachable
from lemcal_async.ratelimit.redis._fallback import (
    FALLBACK_POLICIES,
    CircuitBreaker,
    Fallback,
    FallbackPolicy,
    WhenDown,
)
from lemcal_async.ratelimit.redis._key import KeyState, Waiter
from lemcal_async.ratelimit.redis._script import ScriptReply, keys_of

logger = logging.getLogger("lemcal_async.ratelimit")

QUIET = 0.25  # seconds before all go back to Redis, in which each tells it what it did alone


class KeyWorker:
    """The keys in use inside one ``async with``, each with its task; Redis knows it by a random name."""

    def __init__(
        self, link: RedisConnection, plan: FallbackPolicy, *, limit: int, period: float, prefix: str
    ) -> None:
        self.accounts: dict[Key, KeyState] = {}
        self.breaker = CircuitBreaker()
        self.loop = Wakeup().loop
        self._link = link
        self._plan = plan
        self._limit = limit
        self._period = period
        self._prefix = prefix
        self._process = secrets.token_hex(6)
        self._group = anyio.create_task_group()
        self._closing = False

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def close(self, timeout: float) -> None:  # noqa: ASYNC109 - of what must be done in any case
        """End the tasks, refuse those who wait, and in ``timeout`` seconds tell Redis what it must know."""
        self._closing = True
        try:
            # What the body raised is not passed on to the task group: it would come back in a group.
            self._group.cancel_scope.cancel()
            await self._group.__aexit__(None, None, None)
        finally:
            for account in self.accounts.values():
                account.refuse_all(_closed)
            with anyio.CancelScope(shield=True), anyio.move_on_after(timeout):
                await self._say_goodbye()

    async def _say_goodbye(self) -> None:
        for account in list(self.accounts.values()):
            if self.breaker.is_open:
                return
            budget = account.budget
            if account.in_line or budget.urgent() or budget.leases.due(time.monotonic()) < math.inf:
                await self._exchange(account, waiting=0)

    def account_of(self, key: Key) -> KeyState:
        """Return the account of a key, whose task runs from now on if it did not."""
        account = self.accounts.get(key)
        if account is None:
            budget = Budget(self._process, self._limit, self._period)
            fallback = Fallback(key, self._period, self._plan, self.breaker)
            account = self.accounts[key] = KeyState(key, keys_of(self._prefix, key), budget, fallback)
            if self.breaker.is_open:
                account.fall_back(self.breaker.since, self.breaker.reason)
            self._group.start_soon(self._serve, account)
        return account

    # ---------------------------------------------------------------------------- the task of a key
    async def _serve(self, account: KeyState) -> None:
        """Serve one key until there is nothing left to do or to remember."""
        while True:
            account.wakeup.rearm()
            now = time.monotonic()
            account.wake_at = -math.inf
            if refused_for := account.budget.refused_for(now):
                account.refuse_all(partial(WouldWait, refused_for, refused=True))
            if account.budget.idle(now) and not len(account.queue):
                del self.accounts[account.key]
                return
            when = await self._step(account, now)
            if when > now:
                account.wake_at = when
                await account.wakeup.wait(when - now)

    async def _step(self, account: KeyState, now: float) -> float:
        """Do what is due, and return when to look again; not later than ``now``: at once."""
        budget, waits = account.budget, len(account.queue) > 0
        due = now if budget.urgent() else budget.leases.due(now)
        if self.breaker.is_open:
            return await self._step_alone(account, now, math.inf)
        if account.fallback.ends > now:
            if due <= now:
                return await self._exchange(account, waiting=0)
            return await self._step_alone(account, now, min(due, account.fallback.ends))
        waiting = min(len(account.queue), account.may_have)
        if waiting > 0:
            due = min(due, account.ask_at)
        elif not waits:
            due = min(due, now if account.in_line else budget.over_at(now))
        return due if due > now else await self._exchange(account, waiting)

    async def _step_alone(self, account: KeyState, now: float, until: float) -> float:
        """Do what can be done without Redis, and return when to look again, ``until`` at the latest."""
        budget, fallback = account.budget, account.fallback
        if not len(account.queue):
            return min(until, budget.over_at(now))
        if self._plan.when_down == "open":
            while len(account.queue):
                account.hand_out(budget.take_alone())
            return now
        if self._plan.when_down == "raise":
            if self.breaker.is_open:
                account.refuse_all(fallback.error)
            return until
        begins = max(fallback.begins, budget.paused_until)
        if not self.breaker.is_open:
            quiet_from = fallback.ends - QUIET
            if quiet_from <= now:
                return until
            until = min(until, quiet_from)
        return min(begins, until) if begins > now else await self._use_share(account, until)

    async def _use_share(self, account: KeyState, until: float) -> float:
        """Serve one call from this process's own share, unless there is something else to do before."""
        try:
            permit = await account.fallback.acquire(until)
        except WouldWait as reason:
            account.refuse_all(partial(WouldWait, reason.seconds, refused=True))
        else:
            if permit is not None:
                account.hand_out(account.budget.take_alone(), permit)
        return -math.inf

    # ------------------------------------------------------------------------------------- with Redis
    async def _exchange(self, account: KeyState, waiting: int) -> float:
        """Tell Redis what is new, and take ``waiting`` slots if there are; return when to look again."""
        budget, asked_at = account.budget, time.monotonic()
        head = account.queue.head()
        ask = budget.ask(asked_at, waiting, refused=int(waiting > 0 and head is not None and head.refused))
        try:
            answer = ScriptReply.decoded(await self._link.run(account.names, ask.encoded()))
        except Unreachable as error:
            budget.unheard(ask, time.monotonic())
            self._away(account, str(error))
            return -math.inf
        except BaseException:
            budget.unheard(ask, time.monotonic())
            raise
        now = time.monotonic()
        budget.hear(ask, answer, asked_at, now)
        self._back()
        self._plan.see(answer.processes, now)
        for number in range(ask.first, ask.first + answer.granted):
            account.hand_out(budget.leases.take(number, asked_at))
        account.in_line = waiting > answer.granted
        if waiting:
            account.ask_at = now + answer.wait
        _keep_to_share(account, now, answer.held)
        if answer.foreign and events.wanted():
            events.emit(events.ForeignUse(account.key.short, answer.foreign))
        if not answer.refused:  # all are told so at once
            account.tell_waits(now)
        return -math.inf

    def _away(self, account: KeyState, reason: str) -> None:
        """Note that Redis failed; if that is news, try again until it answers, about ``account``."""
        if not self.breaker.failed(reason, time.monotonic()):
            return
        logger.warning(
            "the rate limiter's Redis does not answer (%s): %s",
            reason,
            FALLBACK_POLICIES[self._plan.when_down],
        )
        for other in self.accounts.values():
            other.fall_back(self.breaker.since, reason)
            other.look()
        if not self._closing:
            self._group.start_soon(self._try_again, account)

    async def _try_again(self, account: KeyState) -> None:
        while self.breaker.is_open:
            await anyio.sleep(self.breaker.delay)
            await self._exchange(account, waiting=0)

    def _back(self) -> None:
        if not self.breaker.succeeded():
            return
        logger.info("the rate limiter's Redis answers again")
        for account in self.accounts.values():
            account.ask_at = -math.inf
            account.interrupt()


def _keep_to_share(account: KeyState, now: float, seconds: float) -> None:
    """Go on alone for so long: Redis is there again, but has not heard yet what others did meanwhile."""
    fallback = account.fallback
    if seconds <= 0:
        fallback.end()
        return
    if fallback.begins == math.inf:  # it was not missed here: its data was lost in between
        account.fall_back(now, "Redis lost its data")
    fallback.ends = account.ask_at = now + seconds


def _closed() -> LemcalError:
    return ConfigurationError("nothing was sent: the RedisRateLimiter was closed meanwhile")


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
        address, url = Secret(url), ""  # it may hold a password
        if limit < 1 or not 0 < period < math.inf:
            raise ConfigurationError(
                "a rate limit needs a limit of at least 1 and a period of seconds above 0"
            )
        if when_down not in FALLBACK_POLICIES or not (share is None or 0 < share <= 1):
            raise ConfigurationError("when_down= is 'share', 'raise' or 'open'; share= is above 0, 1 at most")
        if not 0 < timeout < math.inf or "{" in prefix:
            raise ConfigurationError("timeout= is in seconds, above 0; prefix= must not contain '{'")
        self.limit = limit
        self.period = period
        self._plan = FallbackPolicy(when_down, limit, share)
        self._link = RedisConnection(address, timeout)
        self._prefix = prefix
        self._timeout = timeout
        self._numbers = itertools.count()
        self._serving: KeyWorker | None = None

    def __repr__(self) -> str:
        return (
            f"RedisRateLimiter(limit={self.limit}, period={self.period}, when_down={self._plan.when_down!r})"
        )

    async def __aenter__(self) -> Self:
        if self._serving is not None:
            raise ConfigurationError("this RedisRateLimiter is in use already: enter it once, and share it")
        await self._link.__aenter__()
        self._serving = await KeyWorker(
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
        before = again if isinstance(again, Waiter) and again.limiter is self else None
        account = serving.account_of(key)
        ticket = Waiter(
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
