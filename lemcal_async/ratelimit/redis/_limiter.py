"""The rate limiter that several processes and machines share through Redis.

It is the local limiter with other slots: who waits, and how, is the same. Here is what all keys have in
common: the options, entering and leaving, who this process is, and whether Redis is away.
"""

import hashlib
import itertools
import json
import logging
import math
import secrets
from typing import Self

import anyio
import anyio.abc
import attrs

from lemcal_async import events
from lemcal_async._auth import Secret
from lemcal_async._concurrency import Wakeup
from lemcal_async.errors import ConfigurationError, LemcalError
from lemcal_async.ratelimit._base import Key, Permit, Priority, RateLimit
from lemcal_async.ratelimit._local import LocalRateLimiter
from lemcal_async.ratelimit._log import SlidingWindowLog
from lemcal_async.ratelimit._waiters import KeyState, Waiter, announce
from lemcal_async.ratelimit.redis._budget import Budget, ScriptReply, ScriptRequest
from lemcal_async.ratelimit.redis._connection import (
    FALLBACK_POLICIES,
    CircuitBreaker,
    FallbackPolicy,
    RedisConnection,
    Unreachable,
    WhenDown,
)
from lemcal_async.ratelimit.redis._key import KeyWorker

logger = logging.getLogger("lemcal_async.ratelimit")

UNLIMITED = 1_000_000_000  # the limit where nothing is limited
REMEMBERED = 80_000.0  # seconds without a word after which Redis may have dropped its marker


class RedisRateLimiter(LocalRateLimiter):
    """At most ``limit`` requests in any ``period`` seconds for each key, over all that use one Redis.

    It behaves as ``LocalRateLimiter`` does, and processes that wait are served in turn. Enter it once, at the
    top of a task, with ``async with``; it belongs to that event loop:

        async with (
            RedisRateLimiter("redis://localhost") as limiter,
            AsyncLemcal(limiter=limiter) as lemcal,
        ):
            ...

    A Redis that is away is tried again every second. Names in Redis hold no secret, and expire by themselves.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``, with user, password and database as usual.
        limit: How many requests a key has in a period.
        period: The length of a period in seconds.
        when_down: What holds without Redis: ``"share"``, each process keeps to a share of the limit;
            ``"raise"``, calls raise LemcalError; ``"open"``, nothing is limited.
        share: That share, above 0 and 1 at most; if left out, the limit is divided by the processes seen
            lately.
        timeout: Seconds that Redis has for each answer.
        prefix: What names in Redis begin with, in braces.

    Raises:
        ConfigurationError: For arguments that cannot work, for a Redis that cannot be used, and when it is
            used elsewhere.
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
        super().__init__(limit, period)
        if when_down not in FALLBACK_POLICIES or not (share is None or 0 < share <= 1):
            raise ConfigurationError("when_down= is 'share', 'raise' or 'open'; share= is above 0, 1 at most")
        if not 0 < timeout < math.inf or not prefix or {*prefix} & {*"{}"}:
            raise ConfigurationError(
                "timeout= is in seconds, above 0; prefix= must not be empty or have braces"
            )
        self._when_down: WhenDown = when_down
        self._policy = FallbackPolicy(limit, share)
        self._connection = RedisConnection(address, timeout, lambda: self._breaker.is_open)
        self._prefix = prefix
        self._timeout = timeout
        self._breaker = CircuitBreaker()
        self._group: anyio.abc.TaskGroup | None = None  # of the keys' tasks; None: not entered
        self._loop: object = None
        self._process = ""  # a random name, by which Redis knows this process
        self._sequence = itertools.count(1)
        self._count, self._heard_at = 0, -math.inf  # how often the script had run then
        self._held_until = -math.inf  # until when Redis has all processes hold back

    def __repr__(self) -> str:
        return f"RedisRateLimiter(limit={self.limit}, period={self.period}, when_down={self._when_down!r})"

    async def __aenter__(self) -> Self:
        if self._group is not None:
            raise ConfigurationError("this RedisRateLimiter is in use already: enter it once, and share it")
        await self._connection.__aenter__()
        self._group, self._loop = anyio.create_task_group(), Wakeup().loop
        self._breaker, self._process = CircuitBreaker(), secrets.token_hex(6)
        problem = ""
        try:
            await self._group.__aenter__()
            await self._probe(back=False)
        except Unreachable as error:
            if error.advice is None:  # away, which is no error
                self._away(str(error))
            else:
                problem = f"the rate limiter cannot use this Redis ({error}); {error.advice}"
        except BaseException:
            await self.__aexit__()
            raise
        if problem:
            await self.__aexit__()
            raise ConfigurationError(problem)
        return self

    async def __aexit__(self, *_: object) -> None:
        """End the tasks, refuse those who wait, and tell Redis what it must know."""
        group, self._group = self._group, None
        if group is None:
            return
        try:
            # What the body raised is not passed on to the task group: it would come back in a group.
            group.cancel_scope.cancel()
            await group.__aexit__(None, None, None)
        finally:
            workers = self._workers()
            for worker in workers:
                self._inbox.post(worker, lambda: None)
            self._keys.clear()
            with anyio.CancelScope(shield=True), anyio.move_on_after(2 * self._timeout):
                for worker in workers:
                    if not self._breaker.is_open and worker.look():
                        await self._exchange(worker)
            await self._connection.__aexit__()

    async def acquire(
        self,
        key: Key,
        *,
        priority: Priority = "interactive",
        timeout: float | None = None,  # noqa: ASYNC109 - a bound to refuse by, not a timer
        again: Permit | None = None,
    ) -> Permit:
        """Wait for this request's turn; see ``RateLimiter.acquire``.

        Canceled (by anyio or natively) at any moment, it leaves no trace: a slot that it had goes to the next
        in the queue, or back to the other processes.

        Raises:
            WouldWait: See ``RateLimiter.acquire``.
            LemcalError: Without Redis, if so configured.
        """
        if self._group is None or Wakeup().loop is not self._loop:
            raise ConfigurationError(
                "nothing was sent: a RedisRateLimiter works inside its `async with`, in that event loop only"
            )
        while True:
            permit = await super().acquire(key, priority=priority, timeout=timeout, again=again)
            if not isinstance(permit, Waiter) or permit.is_valid():
                return permit
            permit.unsent()  # this process stood still, and others may have had the slot since
            again = permit

    def snapshot(self, key: Key) -> RateLimit:
        """Return what this process knows of a key, while Redis is away too.

        Args:
            key: The key, such as ``lemcal.rate_limit_key``.
        """
        found, limit, until = super().snapshot(key), self.limit, self._held_until
        if self._breaker.is_open:
            if self._when_down == "open":
                return attrs.evolve(found, limit=None, remaining=None)
            if self._when_down == "raise":
                return attrs.evolve(found, remaining=0)
            limit, until = self._policy.own_limit, self._alone_from
        if key in self._keys:
            return found
        paused_for = max(0.0, until - self.clock())
        return RateLimit(limit, 0 if paused_for else limit, paused_for, 0, paused_for)

    # ------------------------------------------------------------------------------------- the queue
    def _new_state(self, key: Key) -> KeyWorker:
        budget = Budget(self.limit, self.period, self._server(key.base_url))
        worker = KeyWorker(key, budget, self.clock, self._exchange)
        worker.budget.cooldown.until = self._held_until
        if self._breaker.is_open:
            self._fall_back(worker)
        return worker

    def _serve(self, state: KeyState) -> None:
        while (waiter := state.queue.head()) is not None and (error := self._refusal()) is not None:
            state.queue.pop(waiter)
            waiter.decide(error)
        super()._serve(state)
        assert isinstance(state, KeyWorker)  # noqa: S101 - by _new_state
        if state.look() and not state.runs and self._group is not None:
            state.runs = True
            self._group.start_soon(self._run, state)

    async def _run(self, worker: KeyWorker) -> None:
        await worker.run()
        self._inbox.post(None, self._forget, worker)

    def _forget(self, worker: KeyWorker) -> None:
        if not worker.runs and not worker.look() and self._keys.get(worker.key) is worker:
            del self._keys[worker.key]

    def _refusal(self) -> LemcalError | None:
        """Return what a call gets that must not go on."""
        if self._group is None:
            return ConfigurationError("nothing was sent: the RedisRateLimiter was closed meanwhile")
        if self._breaker.is_open and self._when_down == "raise":
            return LemcalError(
                f"nothing was sent: the rate limiter's Redis does not answer ({self._breaker.reason}); "
                "see that it runs, or choose when_down='share'"
            )
        return None

    def _workers(self) -> list[KeyWorker]:
        return [state for state in self._keys.values() if isinstance(state, KeyWorker)]

    # ----------------------------------------------------------------------------------------- Redis
    async def _exchange(self, worker: KeyWorker) -> None:
        """Restate what a key holds, and get slots for those who wait."""
        asked_at, budget = self.clock(), worker.budget
        where = hashlib.blake2b(worker.key.base_url.encode(), digest_size=4).hexdigest()
        request = budget.request(asked_at)
        try:
            reply = await self._ask(f"{worker.key.digest}-{where}", request)
        except Unreachable as error:
            budget.unheard(self.clock())
            self._away(str(error))
            return
        self._inbox.post(worker, budget.apply, request, reply, asked_at, self.clock())
        if reply.foreign:
            self._inbox.defer(announce, worker.key, "foreign use", reply.foreign)

    async def _probe(self, *, back: bool) -> None:
        """See whether Redis runs the script, and for how long it has all processes hold back."""
        request = Budget(self.limit, self.period).request(self.clock())
        request["back"] = back
        reply = await self._ask("probe", request)
        self._held_until = self.clock() + reply.paused

    async def _ask(self, name: str, request: ScriptRequest) -> ScriptReply:
        """Run the script. Raises Unreachable."""
        knows = self.clock() - self._heard_at < REMEMBERED
        request.update(
            process=self._process, sequence=next(self._sequence), count=self._count if knows else 0
        )
        # One hash tag for all, so that a cluster of one shard will do.
        names = [f"{{{self._prefix}}}{part}" for part in (name, "marker")]
        reply = ScriptReply(**json.loads(await self._connection.run(names, json.dumps(request))))
        self._count, self._heard_at = max(self._count, reply.count), self.clock()
        self._policy.see(reply.processes, self._heard_at)
        return reply

    # ------------------------------------------------------------------------------ while it is away
    @property
    def _alone_from(self) -> float:
        """When nothing counts any more that other processes had from Redis before."""
        return self._breaker.since + Budget(self.limit, self.period).lifetime

    def _away(self, reason: str) -> None:
        """Note that Redis failed; if that is news, go on without it, and try again until it answers."""
        if not self._breaker.failed(reason, self.clock()):
            return
        meanwhile = FALLBACK_POLICIES[self._when_down]
        logger.warning("the rate limiter's Redis does not answer (%s): %s meanwhile", reason, meanwhile)
        for worker in self._workers():
            self._inbox.post(worker, self._fall_back, worker)
        if self._group is not None:
            self._group.start_soon(self._try_again)

    def _fall_back(self, worker: KeyWorker) -> None:
        limits = {"share": self._policy.own_limit, "open": UNLIMITED, "raise": 0}
        limit = limits[self._when_down]
        log = SlidingWindowLog(limit, self.period) if limit else None
        worker.fall_back(log, self._alone_from if self._when_down == "share" else -math.inf)
        self._inbox.defer(events.emit, events.FellBack(worker.key.short, self._breaker.reason))

    async def _try_again(self) -> None:
        while self._breaker.is_open:
            await anyio.sleep(self._breaker.delay)
            waited = self._when_down == "share" and self.clock() <= self._alone_from
            try:
                await self._probe(back=not waited and self._when_down != "raise")
            except Unreachable as error:
                self._breaker.failed(str(error), self.clock())
            else:
                self._breaker.is_open = False
        logger.info("the rate limiter's Redis answers again")
        for worker in self._workers():
            self._inbox.post(worker, worker.come_back, self._alone_from)
