"""The rate limiter that processes and machines share through Redis.

It has the queues of the local limiter, with slots from Redis. This module contains what all keys share: the
options, entering and exiting, the identity of this process, and the fallback while Redis is unreachable.
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
from lemcal_async._checks import is_number, is_seconds
from lemcal_async._concurrency import Wakeup, preload
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
    RedisUnavailable,
    WhenDown,
)
from lemcal_async.ratelimit.redis._key import KeyWorker

logger = logging.getLogger("lemcal_async.ratelimit")

UNLIMITED = 1_000_000_000  # the limit with when_down="open"
MARKER_EXPECTED_FOR = 80_000.0  # seconds after the last reply; the script keeps its marker for 86,400 s


class RedisRateLimiter(LocalRateLimiter):
    """At most ``limit`` requests in any ``period`` seconds per key, across all processes that share a Redis.

    Behaves like ``LocalRateLimiter``. A free slot goes to the waiting process with the fewest requests in the
    last period. Enter it once with ``async with``, at the top of a task. It belongs to that event loop:

        async with (
            RedisRateLimiter("redis://localhost") as limiter,
            AsyncLemcal(limiter=limiter) as lemcal,
        ):
            ...

    While Redis is unreachable, the limiter retries the connection every second. Redis keys contain no secrets
    and expire on their own.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``, with the usual user, password and database.
        limit: The number of requests per key and period.
        period: The length of a period in seconds.
        when_down: The policy while Redis is unreachable. ``"share"``: each process uses a share of the limit;
            ``"raise"``: calls raise LemcalError; ``"open"``: requests are not limited.
        share: The share of the limit for ``"share"``, above 0 and at most 1. Defaults to the limit divided by
            the number of processes seen recently.
        timeout: Seconds for each network operation with Redis.
        prefix: The prefix of all Redis keys; it is put in braces.

    Raises:
        ConfigurationError: If an argument is invalid, this Redis cannot be used, or the limiter is used in
            another event loop or outside its ``async with``.
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
        address, url = Secret(url), ""  # the URL may contain a password
        super().__init__(limit, period)
        if when_down not in ("share", "raise", "open"):
            raise ConfigurationError(f"when_down={when_down!r}: it must be 'share', 'raise' or 'open'")
        if not (share is None or (is_number(share) and 0 < share <= 1)):
            raise ConfigurationError(f"share={share!r}: it must be above 0 and at most 1, or None")
        if not is_seconds(timeout):
            raise ConfigurationError(f"timeout={timeout!r}: it must be a finite number of seconds above 0")
        if not _is_prefix(prefix):
            raise ConfigurationError(f"prefix={prefix!r}: it must be text without braces, and not empty")
        preload()
        self._when_down: WhenDown = when_down
        self._policy = FallbackPolicy(limit, share)
        self._connection = RedisConnection(address, timeout, lambda: self._breaker.is_open)
        self._prefix = prefix
        self._timeout = timeout
        self._breaker = CircuitBreaker()
        self._group: anyio.abc.TaskGroup | None = None  # the tasks of the keys; None: not entered
        self._loop: object = None
        self._process = ""  # a random ID of this process in Redis
        self._sequence = itertools.count(1)
        self._script_runs, self._last_reply_at = 0, -math.inf  # runs as of the last reply
        self._hold_until = -math.inf  # when processes may send again after Redis lost data or was down

    def __repr__(self) -> str:
        return f"RedisRateLimiter(limit={self.limit}, period={self.period}, when_down={self._when_down!r})"

    async def __aenter__(self) -> Self:
        if self._group is not None:
            raise ConfigurationError(
                "this RedisRateLimiter has been entered already: enter it once and share it"
            )
        await self._connection.__aenter__()
        self._group, self._loop = anyio.create_task_group(), Wakeup().loop
        self._breaker, self._process = CircuitBreaker(), secrets.token_hex(6)
        problem = ""
        try:
            await self._group.__aenter__()
            await self._probe(recovering=False)
        except RedisUnavailable as error:
            if error.advice is None:  # it may recover
                self._redis_failed(str(error))
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
        """Cancel the tasks, fail the waiting calls, and send the last reports to Redis."""
        group, self._group = self._group, None
        if group is None:
            return
        try:
            # The body's exception is not passed to the task group, which would wrap it in an exception group.
            group.cancel_scope.cancel()
            await group.__aexit__(None, None, None)
        finally:
            workers = self._workers()
            for worker in workers:
                self._inbox.post(worker, lambda: None)
            self._keys.clear()
            with anyio.CancelScope(shield=True), anyio.move_on_after(2 * self._timeout):
                for worker in workers:
                    if not self._breaker.is_open and worker.schedule():
                        await self._exchange(worker)
            await self._connection.__aexit__()

    async def acquire(
        self,
        key: Key,
        *,
        priority: Priority = "interactive",
        timeout: float | None = None,  # noqa: ASYNC109 - decides whether to refuse; not a timer
        again: Permit | None = None,
    ) -> Permit:
        """Wait for this request's turn; see ``RateLimiter.acquire``.

        Canceling it (with anyio or natively) leaves no trace: its slot goes to the next call in the queue, or
        to another process.

        Raises:
            WouldWait: See ``RateLimiter.acquire``.
            LemcalError: If Redis is unreachable and ``when_down="raise"``.
        """
        if self._group is None or Wakeup().loop is not self._loop:
            raise ConfigurationError(
                "nothing was sent: a RedisRateLimiter works only inside its `async with`, in its event loop"
            )
        while True:
            permit = await super().acquire(key, priority=priority, timeout=timeout, again=again)
            if not isinstance(permit, Waiter) or permit.is_valid():
                return permit
            permit.unsent()  # this process was suspended; another one may have used the slot since
            again = permit

    def snapshot(self, key: Key) -> RateLimit:
        """Return what this process knows about a key, even while Redis is unreachable.

        Args:
            key: The key, such as ``lemcal.rate_limit_key``.
        """
        found, limit, until = super().snapshot(key), self.limit, self._hold_until
        if self._breaker.is_open:
            if self._when_down == "open":
                return attrs.evolve(found, limit=None, remaining=None)
            if self._when_down == "raise":
                return attrs.evolve(found, remaining=0)
            limit, until = self._policy.own_limit, self._fallback_starts
        if key in self._keys:
            return found
        paused_for = max(0.0, until - self.clock())
        return RateLimit(limit, 0 if paused_for else limit, paused_for, 0, paused_for)

    # ------------------------------------------------------------------------------------- the queue
    def _new_state(self, key: Key) -> KeyWorker:
        budget = Budget(self.limit, self.period, self._server(key.base_url))
        worker = KeyWorker(key, budget, self.clock, self._exchange)
        worker.budget.cooldown.until = self._hold_until
        if self._breaker.is_open:
            self._fall_back(worker)
        return worker

    def _serve(self, state: KeyState) -> None:
        while (waiter := state.queue.head()) is not None and (error := self._refusal()) is not None:
            state.queue.pop(waiter)
            waiter.decide(error)
        super()._serve(state)
        assert isinstance(state, KeyWorker)  # noqa: S101 - by _new_state
        if state.schedule() and not state.is_running and self._group is not None:
            state.is_running = True
            self._group.start_soon(self._run, state)

    async def _run(self, worker: KeyWorker) -> None:
        await worker.run()
        self._inbox.post(None, self._drop, worker)

    def _drop(self, worker: KeyWorker) -> None:
        if not worker.is_running and not worker.schedule() and self._keys.get(worker.key) is worker:
            del self._keys[worker.key]

    def _refusal(self) -> LemcalError | None:
        """Return the error for calls that must not wait any longer, if any."""
        if self._group is None:
            return ConfigurationError(
                "nothing was sent: the RedisRateLimiter was closed while the call waited"
            )
        if self._breaker.is_open and self._when_down == "raise":
            return LemcalError(
                f"nothing was sent: the rate limiter cannot use Redis ({self._breaker.reason}); "
                "check that it is running, or use when_down='share'"
            )
        return None

    def _workers(self) -> list[KeyWorker]:
        return [state for state in self._keys.values() if isinstance(state, KeyWorker)]

    # ----------------------------------------------------------------------------------------- Redis
    async def _exchange(self, worker: KeyWorker) -> None:
        """Report the state of a key, and get slots for its waiting calls."""
        asked_at, budget = self.clock(), worker.budget
        origin = hashlib.blake2b(worker.key.base_url.encode(), digest_size=4).hexdigest()
        request = budget.request(asked_at)
        try:
            reply = await self._run_script(f"{worker.key.digest}-{origin}", request)
        except RedisUnavailable as error:
            budget.request_failed(self.clock())
            self._redis_failed(str(error))
            return
        self._inbox.post(worker, budget.apply, request, reply, asked_at, self.clock())
        if reply.foreign:
            self._inbox.defer(announce, worker.key, "foreign use", reply.foreign)

    async def _probe(self, *, recovering: bool) -> None:
        """Check that Redis runs the script, and whether sending is on hold."""
        request = Budget(self.limit, self.period).request(self.clock())
        request["recovering"] = recovering
        reply = await self._run_script("probe", request)
        self._hold_until = self.clock() + reply.paused

    async def _run_script(self, name: str, request: ScriptRequest) -> ScriptReply:
        """Run the script for one budget. Raises RedisUnavailable."""
        marker_exists = self.clock() - self._last_reply_at < MARKER_EXPECTED_FOR
        request.update(
            process=self._process,
            sequence=next(self._sequence),
            runs=self._script_runs if marker_exists else 0,
        )
        # All keys have the same hash tag, so that a cluster with a single shard works.
        names = [f"{{{self._prefix}}}{part}" for part in (name, "marker")]
        reply = ScriptReply(**json.loads(await self._connection.run(names, json.dumps(request))))
        self._script_runs, self._last_reply_at = max(self._script_runs, reply.runs), self.clock()
        self._policy.record(reply.processes, self._last_reply_at)
        return reply

    # ------------------------------------------------------------------------------- while it is down
    @property
    def _fallback_starts(self) -> float:
        """When slots that other processes got from Redis before the outage no longer count."""
        return self._breaker.since + Budget(self.limit, self.period).slot_ttl

    def _redis_failed(self, reason: str) -> None:
        """Record a failure of Redis. The first one starts the fallback, and a task that reconnects."""
        if not self._breaker.failed(reason, self.clock()):
            return
        policy = FALLBACK_POLICIES[self._when_down]
        logger.warning("the rate limiter cannot use Redis (%s); %s until it recovers", reason, policy)
        for worker in self._workers():
            self._inbox.post(worker, self._fall_back, worker)
        if self._group is not None:
            self._group.start_soon(self._reconnect)

    def _fall_back(self, worker: KeyWorker) -> None:
        limits = {"share": self._policy.own_limit, "open": UNLIMITED, "raise": 0}
        limit = limits[self._when_down]
        log = SlidingWindowLog(limit, self.period) if limit else None
        worker.fall_back(log, self._fallback_starts if self._when_down == "share" else -math.inf)
        self._inbox.defer(events.emit, events.FellBack(worker.key.short, self._breaker.reason))

    async def _reconnect(self) -> None:
        while self._breaker.is_open:
            await anyio.sleep(self._breaker.delay)
            waited = self._when_down == "share" and self.clock() <= self._fallback_starts
            try:
                await self._probe(recovering=not waited and self._when_down != "raise")
            except RedisUnavailable as error:
                self._breaker.failed(str(error), self.clock())
            else:
                self._breaker.is_open = False
        logger.info("the rate limiter can use Redis again")
        for worker in self._workers():
            self._inbox.post(worker, worker.recover, self._fallback_starts)


def _is_prefix(value: object) -> bool:
    return isinstance(value, str) and value != "" and not {*value} & {*"{}"}
