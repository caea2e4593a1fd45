"""The limiter of one process: the queue and the budget of each key, and the waiting tasks.

Holds no event-loop objects, so one limiter can serve several loops and threads at once. Every state
change is an event in an inbox, so no thread ever blocks on another.
"""

import itertools
import math
import os
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager

from lemcal_async import events
from lemcal_async._checks import is_seconds, is_whole
from lemcal_async.errors import ConfigurationError
from lemcal_async.ratelimit._base import Key, Permit, Priority, RateLimit, WouldWait
from lemcal_async.ratelimit._log import SlidingWindowLog
from lemcal_async.ratelimit._server import ServerModel
from lemcal_async.ratelimit._waiters import Inbox, KeyState, Queue, Waiter

LONG_WAIT = 30.0  # seconds; a call without a deadline that faces a longer wait logs a warning, once per key
PICKUP_TIMEOUT = 0.1  # seconds until a grant not picked up by its task goes to another event loop's task


class LocalRateLimiter:
    """Allows at most ``limit`` requests per ``period`` seconds for each key, in this process.

    Requests with the same key leave first come, first served. Interactive calls go before bulk calls, which
    still get one turn in five. A 429 pauses the whole key for as long as the server says, and the refused
    request goes first afterward. Canceling a wait consumes nothing. Keys do not delay each other; idle keys
    are dropped.

    Args:
        limit: Maximum number of requests per key and period.
        period: Length of the period in seconds.
        clock: Returns the current time in seconds.

    Raises:
        ConfigurationError: If ``limit`` or ``period`` is invalid.
    """

    def __init__(
        self, limit: int = 20, period: float = 2.0, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not (is_whole(limit) and limit >= 1):
            raise ConfigurationError(f"limit={limit!r}: it must be a whole number, at least 1")
        if not is_seconds(period):
            raise ConfigurationError(f"period={period!r}: it must be a finite number of seconds above 0")
        self.limit = limit
        self.period = period
        self.clock = clock
        self._keys: OrderedDict[Key, KeyState] = OrderedDict()
        self._servers: OrderedDict[str, ServerModel] = OrderedDict()  # by base URL, newest last
        self._inbox: Inbox[KeyState] = Inbox(self._serve)
        self._numbers = itertools.count()
        _limiters.add(self)

    def __repr__(self) -> str:
        return f"LocalRateLimiter(limit={self.limit}, period={self.period})"

    async def acquire(
        self,
        key: Key,
        *,
        priority: Priority = "interactive",
        timeout: float | None = None,  # noqa: ASYNC109 - decides whether to refuse, is not a timer
        again: Permit | None = None,
    ) -> Permit:
        """Wait for this request's turn; see ``RateLimiter.acquire``.

        Cancellation is safe at any moment, whether by anyio or native. A grant that was already on its way
        goes to the next waiter in the queue.

        Raises:
            WouldWait: See ``RateLimiter.acquire``.
        """
        waiter = Waiter(self._inbox, self.clock, key, priority, timeout)
        asked_at = self.clock()
        if isinstance(again, Waiter) and again.inbox is self._inbox:
            waiter.number = again.number
            waiter.refused = True
        else:
            waiter.number = next(self._numbers)
        try:
            self._inbox.post(None, self._enqueue, waiter)
            if waiter.outcome is None and events.wanted():
                events.emit(events.Queued(key.short, priority, waiter.ahead))
            while not waiter.is_decided():
                waiter.warn()
                alarm = waiter.alarm
                if waiter.passed_over:
                    waiter.passed_over = False
                    self._inbox.post(None, self._enqueue, waiter)
                    continue
                if alarm is None:
                    await waiter.event.wait()
                else:
                    await waiter.wait(max(0.0, alarm - self.clock()))
                waiter.rearm()
                if alarm is not None and self.clock() >= alarm:
                    waiter.alarm = None
                    self._inbox.post(waiter.state, _time_passed)
        except BaseException:  # canceled, or closed by the garbage collector
            self._inbox.post(None, self._withdraw, waiter)
            raise
        if isinstance(waiter.outcome, Exception):
            raise waiter.outcome
        if events.wanted():
            events.emit(events.Granted(key.short, priority, self.clock() - asked_at))
        return waiter

    def snapshot(self, key: Key) -> RateLimit:
        """Return the current state of a key's budget. An unused key has its whole limit.

        Takes no lock, so it can be called anywhere, even in a signal handler.

        Args:
            key: The key, for example ``lemcal.rate_limit_key``.
        """
        state = self._keys.get(key)
        if state is None:
            return RateLimit(self.limit, self.limit, resets_in=0.0, queued=0, paused_for=0.0)
        now = self.clock()
        return RateLimit(
            limit=state.log.limit,
            remaining=state.log.remaining(now),
            resets_in=state.log.resets_in(now),
            queued=len(state.queue),
            paused_for=state.log.cooldown.left(now),
        )

    # The inbox calls everything below, one call at a time.

    def _enqueue(self, waiter: Waiter) -> KeyState | None:
        now = self.clock()
        self._drop_idle(now)
        state = self._keys.get(waiter.key)
        if state is None:
            state = self._keys[waiter.key] = self._new_state(waiter.key)
        waiter.state = state
        state.queue.stalled.pop(waiter.loop, None)
        if refused_for := state.log.cooldown.refused_for(now):
            waiter.decide(WouldWait(refused_for, refused=True))
            return None
        has_waiters = len(state.queue) > 0
        waiter.ahead = 0 if waiter.refused else state.queue.ahead_of(waiter.priority)
        must_wait = has_waiters or state.log.next_at(now) > now
        if must_wait and not (waiter.timeout is None and state.warned):
            wait = state.log.estimate(now, waiter.ahead)
            if waiter.timeout is not None and wait > waiter.timeout:
                waiter.decide(WouldWait(wait, refused=False))
                return None
            if waiter.timeout is None and wait > LONG_WAIT:
                state.warned = True
                waiter.long_wait = (wait, waiter.ahead)
        state.queue.add(waiter)
        # Joining the back of a queue changes nothing, unless this waiter goes first or its loop has no alarm.
        return None if has_waiters and not state.queue.is_first(waiter) else state

    def _new_state(self, key: Key) -> KeyState:
        return KeyState(key, SlidingWindowLog(self.limit, self.period, self._server(key.base_url)))

    def _server(self, base_url: str) -> ServerModel:
        """Return the model of a server, which outlives the server's keys. The newest 100 are kept."""
        server = self._servers.get(base_url)
        if server is None:
            server = self._servers[base_url] = ServerModel(self.period)
            if len(self._servers) > 100:
                self._servers.popitem(last=False)
        return server

    def _withdraw(self, waiter: Waiter) -> KeyState | None:
        state = waiter.state
        if state is None:
            return None
        state.queue.discard(waiter)
        state.offers.pop(waiter, None)
        state.queue.stalled.pop(waiter.loop, None)
        if waiter.slot is not None:
            state.log.unsent(waiter.slot)
        elif waiter.alarm is None:
            return None  # no other waiter relied on its alarm
        return state

    def _serve(self, state: KeyState) -> None:
        """Grant what can be granted now, and set alarms for when more can be."""
        queue, log = state.queue, state.log
        if not len(queue):
            return
        now = self.clock()
        if refused_for := log.cooldown.refused_for(now):
            while (waiter := queue.head()) is not None:
                queue.pop(waiter)
                waiter.decide(WouldWait(refused_for, refused=True))
        self._revoke(state, now)
        when = now
        while (waiter := queue.head()) is not None and (when := log.next_at(now, len(queue))) <= now:
            if waiter.is_loop_stopped():
                # If its loop never runs again, the grant would be lost. If the loop does continue, the
                # task wakes up and asks for its old place.
                queue.discard(waiter)
                waiter.passed_over = True
                waiter.wake()
                continue
            queue.pop(waiter)
            waiter.slot = log.take(now)
            state.offers[waiter] = now
            if not waiter.decide("granted"):  # its event loop is closed
                del state.offers[waiter]
                log.unsent(waiter.slot)
        when = math.inf if waiter is None else when
        if len(queue):
            when = min([when, *(at + PICKUP_TIMEOUT for _, at in _unclaimed(state))])
            if when < math.inf:
                self._set_alarms(queue, when)

    def _revoke(self, state: KeyState, now: float) -> None:
        """Take back grants that a blocked event loop has not picked up while other loops' tasks wait."""
        for waiter, offered_at in _unclaimed(state):
            is_due = now >= offered_at + PICKUP_TIMEOUT and not waiter.in_this_loop()
            if not is_due or state.offers.pop(waiter, None) is None:
                continue
            state.log.unsent(waiter.slot)
            waiter.slot = None
            waiter.passed_over = True
            state.queue.stalled[waiter.loop] = None

    def _set_alarms(self, queue: Queue, when: float) -> None:
        """Have one waiting task per event loop check again at ``when``; drop the waiters of closed loops."""
        while dead := [waiter for waiter in queue.alarms() if not waiter.set_alarm(when)]:
            for waiter in dead:
                queue.discard(waiter)

    def _drop_idle(self, now: float) -> None:
        # Start with the key checked least recently, so that every key is checked again however many come and
        # go. Check at most a thousand at once, which takes about a millisecond.
        for _ in range(min(1000, len(self._keys))):
            key, state = next(iter(self._keys.items()))
            if 0 <= now - state.checked_at < self.period:
                return
            if not len(state.queue) and state.log.idle(now):
                del self._keys[key]
                continue
            state.checked_at = now
            self._keys.move_to_end(key)
            return

    def _after_fork(self) -> None:
        """Reset in the child process: the waiting tasks and the responses belong to the parent."""
        self._inbox.reset()
        for state in self._keys.values():
            state.queue.clear()
            state.offers.clear()
            state.log.abandon(self.clock())


def _unclaimed(state: KeyState) -> list[tuple[Waiter, float]]:
    """Return the grants not picked up yet while a task of another event loop waits."""
    if not state.offers:
        return []
    loops = state.queue.loops()
    return [
        (waiter, offered_at)
        for waiter, offered_at in list(state.offers.items())
        if len(loops) > 1 or waiter.loop not in loops
    ]


def _time_passed() -> None:
    """Change nothing: the inbox then serves the key, because time has passed."""


_limiters: "weakref.WeakSet[LocalRateLimiter]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for limiter in list(_limiters):
        limiter._after_fork()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # same module


if hasattr(os, "register_at_fork"):  # pragma: no branch - not on Windows
    os.register_at_fork(after_in_child=_after_fork_in_child)


_default = LocalRateLimiter()


def default_limiter() -> LocalRateLimiter:
    """Return the limiter that all clients in this process share by default."""
    return _default


@contextmanager
def fresh_default() -> Generator[LocalRateLimiter]:
    """Temporarily replace the process-wide limiter with a new one, for tests."""
    global _default  # noqa: PLW0603 - process-wide by design
    before, _default = _default, LocalRateLimiter()
    try:
        yield _default
    finally:
        _default = before
