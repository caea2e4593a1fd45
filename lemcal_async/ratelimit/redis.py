"""The limiter of several processes and machines: their shared budgets are in Redis.

All that talks to Redis is here: one task per key in use, which asks for as many slots as calls wait,
hands them out in order, and sleeps for as long as Redis said. Callers only wait in the queue, so a
cancelled one breaks off no conversation. What is asked and what follows is in the modules
``redis_script``, ``budget`` and ``leases``.
"""

import itertools
import logging
import math
import secrets
import time
from collections.abc import Callable, Hashable
from functools import partial
from typing import Literal, Self

import anyio
from anyio.abc import TaskGroup

from lemcal_async import events
from lemcal_async.errors import ConfigurationError, LemcalError
from lemcal_async.headers import Quota
from lemcal_async.ratelimit.breaker import Breaker
from lemcal_async.ratelimit.budget import Budget
from lemcal_async.ratelimit.key import Key
from lemcal_async.ratelimit.leases import Lease
from lemcal_async.ratelimit.local import LONG_WAIT, LocalRateLimiter
from lemcal_async.ratelimit.protocol import Permit, Priority, RateLimit, WouldWait
from lemcal_async.ratelimit.queue import Queue
from lemcal_async.ratelimit.redis_link import RedisLink, Unreachable
from lemcal_async.ratelimit.redis_script import Answer, keys_of
from lemcal_async.ratelimit.slots import hold_after_429
from lemcal_async.ratelimit.wakeup import Wakeup

logger = logging.getLogger("lemcal_async.ratelimit")

WhenDown = Literal["share", "raise", "open"]

UNKNOWN_SHARE = 0.25  # of the limit, for a process that does not know how many there are
QUIET = 0.25  # seconds before all go back to Redis, in which each tells it what it did alone
REMEMBERED = 60.0  # seconds for which another process counts as there


class _Account:
    """One key in use: who waits here, and where the task that serves them stands."""

    __slots__ = (
        "alone_from",
        "alone_until",
        "ask_at",
        "budget",
        "in_line",
        "key",
        "local",
        "names",
        "queue",
        "served",
        "undecided",
        "wait_alone",
        "wake_at",
        "wakeup",
        "warned",
    )

    def __init__(self, key: Key, names: list[str], budget: Budget) -> None:
        self.key = key
        self.names = names  # of its keys in Redis
        self.budget = budget
        self.queue: Queue[_Ticket] = Queue()
        self.undecided: list[_Ticket] = []  # those of which it is not known yet how long they wait
        self.served = 0
        self.warned = False
        self.wakeup = Wakeup()
        self.wake_at = -math.inf  # when its task looks again by itself
        self.ask_at = -math.inf  # when Redis said to ask again
        self.in_line = False  # whether Redis keeps slots for this process
        # Without Redis: from when on its share may be used, until when, and by what.
        self.alone_from = math.inf
        self.alone_until = -math.inf
        self.local: LocalRateLimiter | None = None
        self.wait_alone: anyio.CancelScope | None = None

    def look(self) -> None:
        """Have its task look at what is new; safe in any thread."""
        self.wake_at = -math.inf
        self.wakeup.wake()

    def interrupt(self) -> None:
        """Have it look even if it waits for the share of this process."""
        self.look()
        if self.wait_alone is not None:
            self.wait_alone.cancel()

    def look_by(self, moment: float) -> None:
        """Have its task look at ``moment`` at the latest."""
        if moment < self.wake_at:
            self.wake_at = moment
            self.wakeup.wake()


class _Ticket:
    """One call's place in the queue, and then its permit."""

    __slots__ = (
        "account",
        "ahead",
        "asked_at",
        "lease",
        "limiter",
        "local",
        "loop",
        "number",
        "outcome",
        "priority",
        "refused",
        "served",
        "timeout",
        "wakeup",
    )

    def __init__(self, limiter: "RedisRateLimiter", priority: Priority, timeout: float | None) -> None:
        self.limiter = limiter
        self.priority: Priority = priority
        self.timeout = timeout
        self.number = 0
        self.refused = False  # whether the server refused this call's last attempt
        self.wakeup = Wakeup()
        self.loop: Hashable = self.wakeup.loop
        self.account: _Account | None = None
        self.asked_at = 0.0
        self.ahead = 0  # calls of this process before it when it asked
        self.served = 0  # those of its key served until then
        self.lease: Lease | None = None
        self.local: Permit | None = None  # if it was granted without Redis
        self.outcome: Literal["granted"] | WouldWait | LemcalError | None = None

    def decide(self, outcome: Literal["granted"] | WouldWait | LemcalError) -> None:
        """Tell the waiting task what became of it."""
        self.outcome = outcome
        self.wakeup.wake()

    # The reports of a Permit. They only leave notes, which the key's task takes to Redis.

    def sent(self) -> None:
        if (held := self._held()) is not None:
            account, lease = held
            account.budget.leases.sent(lease, time.monotonic())
            if self.local is not None:
                self.local.sent()
            self._told(account)

    def answered(self, status_code: int, quota: Quota) -> float:
        hold = hold_after_429(quota, self.limiter.period) if status_code == 429 else 0.0
        if (held := self._held()) is not None:
            account, lease = held
            now = time.monotonic()
            account.budget.leases.answered(lease, now)
            account.budget.read(quota, now)
            if status_code == 429:
                account.budget.pause(now, hold)
                logger.info("the server refused key %s (429): nobody sends for %.3f s", account.key, hold)
                if events.wanted():
                    events.emit(events.Paused(account.key.digest[:8], hold))
            if self.local is not None:
                self.local.answered(status_code, quota)
            self._told(account)
        return hold

    def unsent(self) -> None:
        if (held := self._held()) is not None:
            self.limiter.give_back(*held, self)

    def unknown(self) -> None:
        if (held := self._held()) is not None:
            account, lease = held
            account.budget.leases.unknown(lease, time.monotonic())
            if self.local is not None:
                self.local.unknown()
            self._told(account)

    def _held(self) -> tuple[_Account, Lease] | None:
        if self.account is None or self.lease is None or self.lease.end is not None:
            return None
        return self.account, self.lease

    def _told(self, account: _Account) -> None:
        now = time.monotonic()
        if account.budget.urgent() or self.limiter.capped(account):
            account.look()
        else:
            account.look_by(account.budget.leases.due(now))


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
        if when_down not in _PLANS or not (share is None or 0 < share <= 1):
            raise ConfigurationError("when_down= is 'share', 'raise' or 'open'; share= is above 0, 1 at most")
        if not 0 < timeout < math.inf or "{" in prefix:
            raise ConfigurationError("timeout= is in seconds, above 0; prefix= must not contain '{'")
        self.limit = limit
        self.period = period
        self._when_down: WhenDown = when_down
        self._link = RedisLink(url, timeout)
        url = ""  # it may hold a password, which a traceback with local variables must not show
        if self._link.problem is not None:
            raise ConfigurationError(self._link.problem)
        self._share = share
        self._prefix = prefix
        self._timeout = timeout
        self._process = ""
        self._loop: Hashable = None
        self._group: TaskGroup | None = None
        self._accounts: dict[Key, _Account] = {}
        self._numbers = itertools.count()
        self._breaker = Breaker()
        self._away_since = -math.inf
        self._reason = ""
        self._processes = (0, -math.inf)  # how many were seen, and when

    def __repr__(self) -> str:
        return f"RedisRateLimiter(limit={self.limit}, period={self.period}, when_down={self._when_down!r})"

    # ------------------------------------------------------------------------------ entering, leaving
    async def __aenter__(self) -> Self:
        if self._group is not None:
            raise ConfigurationError("this RedisRateLimiter is in use already: enter it once, and share it")
        await self._link.__aenter__()
        self._process = secrets.token_hex(6)
        self._loop = Wakeup().loop
        self._breaker = Breaker()
        self._group = anyio.create_task_group()
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        # What the body raised is not passed on to the task group: it would come back in a group.
        group, self._group = self._group, None
        if group is None:
            return
        try:
            group.cancel_scope.cancel()
            await group.__aexit__(None, None, None)
        finally:
            for account in self._accounts.values():
                self._refuse_all(account, _closed)
            try:
                with anyio.CancelScope(shield=True), anyio.move_on_after(2 * self._timeout):
                    await self._say_goodbye()
            finally:
                self._accounts.clear()
                await self._link.__aexit__()

    async def _say_goodbye(self) -> None:
        for account in list(self._accounts.values()):
            if self._breaker.is_open:
                return
            budget = account.budget
            if account.in_line or budget.urgent() or budget.leases.due(time.monotonic()) < math.inf:
                await self._exchange(account, waiting=0)

    # ---------------------------------------------------------------------------------- for callers
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
        ticket = _Ticket(self, priority, timeout)
        if self._group is None or ticket.loop is not self._loop:
            raise ConfigurationError(
                "nothing was sent: a RedisRateLimiter works inside its `async with`, in that event loop only"
            )
        if isinstance(again, _Ticket) and again.limiter is self:
            ticket.number = again.number
            ticket.refused = True
        else:
            ticket.number = next(self._numbers)
        account = self._accounts.get(key) or self._open(key, self._group)
        try:
            self._ask(account, ticket)
            while ticket.outcome is None:
                await ticket.wakeup.event.wait()
        except BaseException:  # cancelled, or closed by the garbage collector
            self._withdraw(account, ticket)
            raise
        if ticket.outcome != "granted":
            raise ticket.outcome
        return ticket

    def snapshot(self, key: Key) -> RateLimit:
        """Return what this process has heard of ``key``; a key never used has its whole limit."""
        account = self._accounts.get(key)
        if account is None:
            return RateLimit(self.limit, self.limit, resets_in=0.0, queued=0, paused_for=0.0)
        return account.budget.snapshot(time.monotonic(), len(account.queue))

    # -------------------------------------------------------------------------------- tickets, slots
    def _open(self, key: Key, group: TaskGroup) -> _Account:
        budget = Budget(self._process, self.limit, self.period)
        account = self._accounts[key] = _Account(key, keys_of(self._prefix, key), budget)
        if self._breaker.is_open:
            self._leave_alone(account, self._away_since)
        group.start_soon(self._serve, account)
        return account

    def _ask(self, account: _Account, ticket: _Ticket) -> None:
        now = time.monotonic()
        if refused_for := account.budget.refused_for(now):
            ticket.decide(WouldWait(refused_for, refused=True))
            return
        waits = len(account.queue) > 0
        ticket.account = account
        ticket.asked_at = now
        ticket.ahead = 0 if ticket.refused else account.queue.ahead_of(ticket.priority)
        ticket.served = account.served
        if waits and account.budget.known:
            self._tell_wait(account, ticket, now)
            if ticket.outcome is not None:
                return
        else:
            account.undecided.append(ticket)
        account.queue.add(ticket)
        if not waits:
            account.ask_at = -math.inf
            account.look_by(-math.inf)

    def _tell_wait(self, account: _Account, ticket: _Ticket, now: float) -> None:
        """Refuse a call that has less time than it will wait; warn of a long wait."""
        ahead = max(0, ticket.ahead - (account.served - ticket.served))
        wait = self._estimate(account, now, ahead)
        if ticket.timeout is not None and now + wait > ticket.asked_at + ticket.timeout:
            account.queue.discard(ticket)
            ticket.decide(WouldWait(wait, refused=False))
            return
        if ticket.timeout is None and wait > LONG_WAIT and not account.warned:
            account.warned = True
            logger.warning(
                "key %s: a call without a deadline will wait %.0f s for the rate limit (%d are queued); "
                "pass deadline= to be refused instead",
                account.key,
                wait,
                ahead,
            )
        if events.wanted():
            events.emit(events.Queued(account.key.digest[:8], ticket.priority, ahead))

    def _estimate(self, account: _Account, now: float, ahead: int) -> float:
        if not self._alone(account, now):
            return account.budget.estimate(now, ahead)
        if self._when_down == "open":
            return 0.0
        return max(0.0, account.alone_from - now) + ahead // self._own_limit() * self.period

    def _withdraw(self, account: _Account, ticket: _Ticket) -> None:
        if ticket.lease is not None:
            ticket.unsent()
            return
        ticket.account = None
        if account.queue.discard(ticket) and not len(account.queue):
            account.look()  # others may have what was to be this one's

    def give_back(self, account: _Account, lease: Lease, ticket: _Ticket) -> None:
        """Take a slot that was not used, for the next in the queue or else for other processes."""
        local, ticket.local, ticket.lease = ticket.local, None, None
        if local is not None:
            local.unsent()
            account.budget.leases.unsent(lease, time.monotonic())
        else:
            self._hand_out(account, lease)
        account.look_by(account.budget.leases.due(time.monotonic()))

    def _hand_out(self, account: _Account, lease: Lease, local: Permit | None = None) -> None:
        """Give a slot to the next in the queue, or back."""
        now = time.monotonic()
        ticket = account.queue.head()
        if ticket is None:
            account.budget.leases.unsent(lease, now)
            if local is not None:
                local.unsent()
            return
        account.queue.pop(ticket)
        account.served += 1
        ticket.lease, ticket.local = lease, local
        ticket.decide("granted")
        if events.wanted():
            events.emit(events.Granted(account.key.digest[:8], ticket.priority, now - ticket.asked_at))

    def _refuse_all(self, account: _Account, reason: Callable[[], WouldWait | LemcalError]) -> None:
        while (ticket := account.queue.head()) is not None:
            account.queue.pop(ticket)
            ticket.decide(reason())

    def capped(self, account: _Account) -> bool:
        """Whether calls wait only because too many are in flight, at most twice the limit.

        So an account whose requests hang cannot fill the connection pool that it shares with others.
        """
        return len(account.queue) > 0 and account.budget.leases.in_flight >= 2 * self.limit - 1

    # ---------------------------------------------------------------------------- the task of a key
    async def _serve(self, account: _Account) -> None:
        """Serve one key until there is nothing left to do or to remember."""
        while True:
            account.wakeup.rearm()
            now = time.monotonic()
            account.wake_at = -math.inf
            if refused_for := account.budget.refused_for(now):
                self._refuse_all(account, partial(WouldWait, refused_for, refused=True))
            if account.budget.idle(now) and not len(account.queue):
                del self._accounts[account.key]
                return
            when = await self._step(account, now)
            if when > now:
                account.wake_at = when
                await account.wakeup.wait(when - now)

    async def _step(self, account: _Account, now: float) -> float:
        """Do what is due, and return when to look again; not later than ``now``: at once."""
        budget, waits = account.budget, len(account.queue) > 0
        due = now if budget.urgent() else budget.leases.due(now)
        if self._breaker.is_open:
            return await self._step_alone(account, now, math.inf)
        if account.alone_until > now:
            if due <= now:
                return await self._exchange(account, waiting=0)
            return await self._step_alone(account, now, min(due, account.alone_until))
        waiting = self._may_ask(account)
        if waiting > 0:
            due = min(due, account.ask_at)
        elif not waits:
            due = min(due, now if account.in_line else budget.over_at(now))
        return due if due > now else await self._exchange(account, waiting)

    async def _step_alone(self, account: _Account, now: float, until: float) -> float:
        """Do what can be done without Redis, and return when to look again, ``until`` at the latest."""
        budget = account.budget
        if not len(account.queue):
            return min(until, budget.over_at(now))
        if self._when_down == "open":
            while len(account.queue):
                self._hand_out(account, budget.leases.take(budget.next_number(), None))
            return now
        if self._when_down == "raise":
            if self._breaker.is_open:
                self._refuse_all(account, self._down)
            return until
        begins = max(account.alone_from, budget.paused_until)
        if not self._breaker.is_open:
            quiet_from = account.alone_until - QUIET
            if quiet_from <= now:
                return until
            until = min(until, quiet_from)
        return min(begins, until) if begins > now else await self._use_share(account, until)

    def _may_ask(self, account: _Account) -> int:
        """Return how many slots may be asked for."""
        return min(len(account.queue), 2 * self.limit - account.budget.leases.in_flight)

    # ------------------------------------------------------------------------------------- with Redis
    async def _exchange(self, account: _Account, waiting: int) -> float:
        """Tell Redis what is new, and take ``waiting`` slots if there are; return when to look again."""
        budget, asked_at = account.budget, time.monotonic()
        head = account.queue.head()
        ask = budget.ask(asked_at, waiting, refused=int(waiting > 0 and head is not None and head.refused))
        reason = None
        try:
            answer = Answer.decoded(await self._link.run(account.names, ask.encoded()))
        except Unreachable as error:
            reason = str(error)
            budget.unheard(ask, time.monotonic())
        except BaseException:
            budget.unheard(ask, time.monotonic())
            raise
        else:
            now = time.monotonic()
            budget.hear(ask, answer, asked_at, now)
            self._back()
            self._see(answer.processes, now)
            for number in range(ask.first, ask.first + answer.granted):
                self._hand_out(account, budget.leases.take(number, asked_at))
            account.in_line = waiting > answer.granted
            if waiting:
                account.ask_at = now + answer.wait
            self._keep_to_share(account, now, answer.held)
            self._after(account, answer, now)
        if reason is not None:
            self._away(account, reason)
        return -math.inf

    def _after(self, account: _Account, answer: Answer, now: float) -> None:
        """Tell those who were not served how long it takes."""
        if answer.foreign and events.wanted():
            events.emit(events.ForeignUse(account.key.digest[:8], answer.foreign))
        undecided, account.undecided = account.undecided, []
        if answer.refused:
            return  # all are told so at once
        for ticket in undecided:
            if ticket.outcome is None and ticket.account is account:
                self._tell_wait(account, ticket, now)

    def _see(self, processes: int, now: float) -> None:
        count, seen_at = self._processes
        if processes >= count or now - seen_at > REMEMBERED:
            self._processes = (processes, now)

    # ---------------------------------------------------------------------------------- without Redis
    def _alone(self, account: _Account, now: float) -> bool:
        return self._breaker.is_open or account.alone_until > now

    def _own_limit(self) -> int:
        share = self._share
        if share is None:
            share = 1 / self._processes[0] if self._processes[0] else UNKNOWN_SHARE
        return max(1, int(self.limit * share + 1e-9))

    def _leave_alone(self, account: _Account, since: float) -> None:
        """Let a key go on without Redis, once nothing counts any more that others had from it."""
        account.budget.without = True
        account.alone_from = since + account.budget.leases.lifetime
        account.local = None
        if self._when_down == "share" and events.wanted():
            events.emit(events.FellBack(account.key.digest[:8], self._reason))

    def _keep_to_share(self, account: _Account, now: float, seconds: float) -> None:
        """Go on alone for so long: Redis is there again, but has not heard yet what others did meanwhile."""
        if seconds <= 0:
            account.alone_from, account.alone_until, account.local = math.inf, -math.inf, None
            return
        if account.alone_from == math.inf:  # it was not missed here: its data was lost in between
            self._reason = "Redis lost its data"
            self._leave_alone(account, now)
        account.alone_until = account.ask_at = now + seconds

    async def _use_share(self, account: _Account, until: float) -> float:
        """Serve one call from this process's own share, unless there is something else to do before."""
        if account.local is None:
            account.local = LocalRateLimiter(self._own_limit(), self.period)
        permit: Permit | None = None
        refused: WouldWait | None = None
        with anyio.CancelScope() as account.wait_alone:
            if until < math.inf:
                account.wait_alone.deadline = anyio.current_time() + max(0.0, until - time.monotonic())
            try:
                permit = await account.local.acquire(account.key)
            except WouldWait as reason:
                refused = reason
        account.wait_alone = None
        if refused is not None:
            seconds = refused.seconds
            self._refuse_all(account, lambda: WouldWait(seconds, refused=True))
        if permit is not None:
            budget = account.budget
            self._hand_out(account, budget.leases.take(budget.next_number(), None), permit)
        return -math.inf

    def _down(self) -> LemcalError:
        return LemcalError(
            f"nothing was sent: the rate limiter's Redis does not answer ({self._reason}); see that it runs, "
            "or choose when_down='share'"
        )

    def _away(self, account: _Account, reason: str) -> None:
        """Note that Redis failed."""
        if not self._breaker.failed():
            return
        self._reason = reason
        self._away_since = time.monotonic()
        logger.warning("the rate limiter's Redis does not answer (%s): %s", reason, _PLANS[self._when_down])
        for other in self._accounts.values():
            self._leave_alone(other, self._away_since)
            other.look()
        if self._group is not None:
            self._group.start_soon(self._try_again, account)

    async def _try_again(self, account: _Account) -> None:
        while self._breaker.is_open:
            await anyio.sleep(self._breaker.delay)
            await self._exchange(account, waiting=0)

    def _back(self) -> None:
        if not self._breaker.succeeded():
            return
        logger.info("the rate limiter's Redis answers again")
        for account in self._accounts.values():
            account.ask_at = -math.inf
            account.interrupt()


def _closed() -> LemcalError:
    return ConfigurationError("nothing was sent: the RedisRateLimiter was closed meanwhile")


_PLANS: dict[WhenDown, str] = {
    "share": "this process keeps to its share of the limit meanwhile",
    "raise": "calls fail meanwhile",
    "open": "nothing is limited meanwhile",
}
