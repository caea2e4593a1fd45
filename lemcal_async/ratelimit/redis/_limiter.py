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
import time
from typing import Self

import anyio
import attrs

from lemcal_async import events
from lemcal_async._auth import Secret
from lemcal_async._concurrency import Wakeup
from lemcal_async.errors import ConfigurationError, LemcalError
from lemcal_async.ratelimit._base import Key, Permit, Priority, RateLimit
from lemcal_async.ratelimit._local import LocalRateLimiter
from lemcal_async.ratelimit._log import SlidingWindowLog
from lemcal_async.ratelimit._waiters import KeyState, Waiter, announce
from lemcal_async.ratelimit.redis._budget import Budget
from lemcal_async.ratelimit.redis._connection import RedisConnection, Unreachable
from lemcal_async.ratelimit.redis._fallback import FALLBACK_POLICIES, CircuitBreaker, FallbackPolicy, WhenDown
from lemcal_async.ratelimit.redis._key import KeyWorker
from lemcal_async.ratelimit.redis._script import ScriptReply, ScriptRequest

logger = logging.getLogger("lemcal_async.ratelimit")

UNLIMITED = 1_000_000_000  # the limit where nothing is limited
REMEMBERED = 80_000.0  # seconds without a word after which Redis may have dropped its marker


class KeyWorkers(LocalRateLimiter):
    """The keys in use inside one ``async with``; Redis knows this process by a random name."""

    def __init__(
        self, connection: RedisConnection, policy: FallbackPolicy, breaker: CircuitBreaker, prefix: str
    ) -> None:
        super().__init__(policy.limit, policy.period)
        self.loop = Wakeup().loop
        self._connection = connection
        self._policy = policy
        self._breaker = breaker
        self._prefix = prefix
        self._process = secrets.token_hex(6)
        self._sequence = itertools.count(1)
        self._count = 0  # how often the script had run when Redis was last heard,
        self._heard_at = -math.inf  # which was then
        self._held_until = -math.inf
        self._group = anyio.create_task_group()
        self._closed = False

    async def open(self) -> None:
        """Start. Raises ConfigurationError if Redis cannot be used; that it is away is no error."""
        await self._group.__aenter__()
        problem = ""
        try:
            await self._probe(back=False)
        except Unreachable as error:
            if error.advice is None:
                self._away(str(error))
            else:
                problem = f"the rate limiter cannot use this Redis ({error}); {error.advice}"
        except BaseException:
            await self.close(0)
            raise
        if problem:
            await self.close(0)
            raise ConfigurationError(problem)

    async def close(self, timeout: float) -> None:  # noqa: ASYNC109 - of what must be done in any case
        """End the tasks, refuse those who wait, and in ``timeout`` seconds tell Redis what it must know."""
        self._closed = True
        try:
            # What the body raised is not passed on to the task group: it would come back in a group.
            self._group.cancel_scope.cancel()
            await self._group.__aexit__(None, None, None)
        finally:
            for state in self._states():
                self._inbox.post(state, lambda: None)
            with anyio.CancelScope(shield=True), anyio.move_on_after(timeout):
                for worker in [_worker(state) for state in self._states()]:
                    if not self._breaker.is_open and not worker.idle(time.monotonic()):
                        await self._exchange(worker)

    async def acquire(
        self,
        key: Key,
        *,
        priority: Priority = "interactive",
        timeout: float | None = None,  # noqa: ASYNC109 - a bound to refuse by, not a timer
        again: Permit | None = None,
    ) -> Permit:
        """Wait for this request's turn; once more if the process stood still before it could send."""
        while True:
            permit = await super().acquire(key, priority=priority, timeout=timeout, again=again)
            if not isinstance(permit, Waiter) or permit.is_valid():
                return permit
            permit.unsent()
            again = permit

    def snapshot(self, key: Key) -> RateLimit:
        """Return what this process knows of ``key``, while Redis is away too."""
        away, when_down = self._breaker.is_open, self._policy.when_down
        found = super().snapshot(key)
        if away and when_down == "open":
            return RateLimit(None, None, resets_in=0.0, queued=found.queued, paused_for=found.paused_for)
        if key in self._keys or not (away or self._held_until > time.monotonic()):
            return found
        state = KeyState(key, self._new_log(key))
        log, now = state.log, time.monotonic()
        return RateLimit(log.limit, log.remaining(now), log.resets_in(now), 0, log.cooldown.left(now))

    # ------------------------------------------------------------------------------------- the queue
    def _new_log(self, key: Key) -> KeyWorker:
        worker = KeyWorker(key, self.limit, self.period, self._exchange)
        worker.cooldown.until = self._held_until
        if self._breaker.is_open:
            self._fall_back(worker)
        return worker

    def _serve(self, state: KeyState) -> None:
        while (waiter := state.queue.head()) is not None and (error := self._refusal()) is not None:
            state.queue.pop(waiter)
            waiter.decide(error)
        super()._serve(state)
        worker, head = _worker(state), state.queue.head()
        worker.waiting, worker.refused = len(state.queue), head is not None and head.refused
        worker.look()
        if not worker.runs and not self._closed and (head is not None or not worker.idle(self.clock())):
            worker.runs = True
            self._group.start_soon(self._run, worker)

    async def _run(self, worker: KeyWorker) -> None:
        await worker.run()
        self._inbox.post(None, lambda: None)  # which drops what is idle

    def _refusal(self) -> LemcalError | None:
        """Return what a call gets that must not go on."""
        if self._closed:
            return ConfigurationError("nothing was sent: the RedisRateLimiter was closed meanwhile")
        if self._breaker.is_open and self._policy.when_down == "raise":
            return LemcalError(
                f"nothing was sent: the rate limiter's Redis does not answer ({self._breaker.reason}); "
                "see that it runs, or choose when_down='share'"
            )
        return None

    def _states(self) -> list[KeyState]:
        return list(self._keys.values())

    # ----------------------------------------------------------------------------------------- Redis
    async def _exchange(self, worker: KeyWorker) -> None:
        """Restate what a key holds, and get slots for those who wait."""
        asked_at = time.monotonic()
        request = worker.request(asked_at)
        where = hashlib.blake2b(worker.key.base_url.encode(), digest_size=4).hexdigest()
        try:
            reply = await self._ask(f"{worker.key.digest}-{where}", request)
        except Unreachable as error:
            worker.unheard(time.monotonic())
            self._away(str(error))
            return
        self._inbox.post(self._keys.get(worker.key), worker.apply, request, reply, asked_at, time.monotonic())
        if reply.foreign:
            self._inbox.defer(announce, worker.key, "foreign use", reply.foreign)

    async def _probe(self, *, back: bool) -> None:
        """See whether Redis runs the script, and for how long it has all processes hold back."""
        now = time.monotonic()
        reply = await self._ask(
            "probe", attrs.evolve(Budget(self.limit, self.period).request(now), back=back)
        )
        self._held_until = time.monotonic() + reply.paused

    async def _ask(self, name: str, request: ScriptRequest) -> ScriptReply:
        # One hash tag for all, so that a cluster of one shard will do.
        keys = [f"{{{self._prefix}}}{part}" for part in (name, "marker")]
        knows = time.monotonic() - self._heard_at < REMEMBERED
        request = attrs.evolve(
            request,
            process=self._process,
            sequence=next(self._sequence),
            count=self._count if knows else 0,
        )
        reply = ScriptReply(**json.loads(await self._connection.run(keys, request.encoded())))
        self._count, self._heard_at = max(self._count, reply.count), time.monotonic()
        self._policy.see(reply.processes, self._heard_at)
        return reply

    # ------------------------------------------------------------------------------ while it is away
    def _away(self, reason: str) -> None:
        """Note that Redis failed; if that is news, go on without it, and try again until it answers."""
        if not self._breaker.failed(reason, time.monotonic()):
            return
        what = FALLBACK_POLICIES[self._policy.when_down]
        logger.warning("the rate limiter's Redis does not answer (%s): %s meanwhile", reason, what)
        for state in self._states():
            self._inbox.post(state, self._fall_back, _worker(state))
        if not self._closed:
            self._group.start_soon(self._try_again)

    def _fall_back(self, worker: KeyWorker) -> None:
        """Have a key go on by itself, once nothing counts any more that others had from Redis before."""
        log, since = None, self._breaker.since + worker.lifetime
        if self._policy.when_down == "open":
            log, since = SlidingWindowLog(UNLIMITED, self.period), -math.inf
        elif self._policy.when_down == "share":
            log = SlidingWindowLog(self._policy.own_limit, self.period)
        worker.fall_back(log, since)
        self._inbox.defer(events.emit, events.FellBack(worker.key.short, self._breaker.reason))

    async def _try_again(self) -> None:
        while self._breaker.is_open:
            await anyio.sleep(self._breaker.delay)
            try:
                await self._probe(back=self._policy.when_down != "raise")
            except Unreachable as error:
                self._breaker.failed(str(error), time.monotonic())
            else:
                self._breaker.succeeded()
        logger.info("the rate limiter's Redis answers again")
        for state in self._states():
            self._inbox.post(state, _worker(state).come_back)


def _worker(state: KeyState) -> KeyWorker:
    assert isinstance(state.log, KeyWorker)  # noqa: S101 - by _new_log
    return state.log


class RedisRateLimiter:
    """At most ``limit`` requests in any ``period`` seconds for each key, over all that use one Redis.

    ``url`` is ``redis://``, ``rediss://`` or ``unix://``, with user, password and database as usual.
    It behaves as ``LocalRateLimiter`` does, and processes that wait are served in turn. Enter it once,
    at the top of a task, with ``async with``; it belongs to that event loop::

        async with RedisRateLimiter("redis://localhost") as limiter, AsyncLemcal(limiter=limiter) as lemcal:
            ...

    Redis has ``timeout`` seconds for each answer. ``when_down`` says what holds without it: each process
    keeps to a ``share`` of the limit (default: divided by the processes seen lately), or calls ``"raise"``
    a LemcalError, or nothing is limited (``"open"``). It is tried again every second. Names in Redis begin
    with ``prefix`` in braces. They hold no secret, and expire by themselves.

    Raises ConfigurationError for a URL or a Redis that cannot be used, and when it is used elsewhere.
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
            raise ConfigurationError("a rate limit needs a limit of at least 1 and a period above 0 seconds")
        if when_down not in FALLBACK_POLICIES or not (share is None or 0 < share <= 1):
            raise ConfigurationError("when_down= is 'share', 'raise' or 'open'; share= is above 0, 1 at most")
        if not 0 < timeout < math.inf or not prefix or {*prefix} & {*"{}"}:
            raise ConfigurationError(
                "timeout= is in seconds, above 0; prefix= must not be empty or contain braces"
            )
        self.limit = limit
        self.period = period
        self._policy = FallbackPolicy(when_down, limit, period, share)
        self._breaker = CircuitBreaker()
        self._connection = RedisConnection(address, timeout, lambda: self._breaker.is_open)
        self._prefix = prefix
        self._timeout = timeout
        self._workers: KeyWorkers | None = None

    def __repr__(self) -> str:
        options = f"limit={self.limit}, period={self.period}, when_down={self._policy.when_down!r}"
        return f"RedisRateLimiter({options})"

    async def __aenter__(self) -> Self:
        if self._workers is not None:
            raise ConfigurationError("this RedisRateLimiter is in use already: enter it once, and share it")
        await self._connection.__aenter__()
        self._breaker = CircuitBreaker()
        workers = KeyWorkers(self._connection, self._policy, self._breaker, self._prefix)
        try:
            await workers.open()
        except BaseException:
            await self._connection.__aexit__()
            raise
        self._workers = workers
        return self

    async def __aexit__(self, *_: object) -> None:
        workers, self._workers = self._workers, None
        if workers is None:
            return
        try:
            await workers.close(2 * self._timeout)
        finally:
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

        Raises WouldWait, and LemcalError without Redis if so configured. Canceled (by anyio or natively)
        at any moment, it leaves no trace: a slot that it had goes to the next in the queue, or back to
        the other processes.
        """
        workers = self._workers
        if workers is None or Wakeup().loop is not workers.loop:
            raise ConfigurationError(
                "nothing was sent: a RedisRateLimiter works inside its `async with`, in that event loop only"
            )
        return await workers.acquire(key, priority=priority, timeout=timeout, again=again)

    def snapshot(self, key: Key) -> RateLimit:
        """Return what this process knows of ``key``; a key never used has its whole limit."""
        if self._workers is None:
            return RateLimit(self.limit, self.limit, resets_in=0.0, queued=0, paused_for=0.0)
        return self._workers.snapshot(key)
