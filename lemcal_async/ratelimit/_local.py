"""The limiter of one process: the queue and the budget of each key, and the tasks that wait.

Nothing here belongs to an event loop, so one limiter serves several loops and threads at once. All that
happens is an event in an inbox, so no thread ever waits for another.
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
from lemcal_async.errors import ConfigurationError
from lemcal_async.ratelimit._base import Key, Permit, Priority, RateLimit, WouldWait
from lemcal_async.ratelimit._log import SlidingWindowLog
from lemcal_async.ratelimit._server import ServerModel
from lemcal_async.ratelimit._waiters import Inbox, KeyState, Queue, Waiter

LONG_WAIT = 30.0  # seconds; a call without a deadline that faces more is warned of, once per key
PATIENCE = 0.1  # seconds for a task to pick up its grant, before another event loop's task gets it


class LocalRateLimiter:
    """At most ``limit`` requests per ``period`` seconds for each key, in this process.

    Requests of one key leave in the order in which they asked; interactive calls pass bulk ones, which still
    get one turn in five. A 429 pauses the whole key for as long as the server says, and the refused request
    goes first. Canceling a wait costs nobody anything. Keys do not delay each other, and idle ones are
    forgotten.

    Args:
        limit: How many requests a key has in a period.
        period: The length of a period in seconds.
        clock: What tells the time, in seconds.

    Raises:
        ConfigurationError: For values that cannot work.
    """

    def __init__(
        self, limit: int = 20, period: float = 2.0, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if limit < 1 or not 0 < period < float("inf"):
            raise ConfigurationError("a rate limit needs a limit of at least 1 and a period above 0 seconds")
        self.limit = limit
        self.period = period
        self.clock = clock
        self._keys: OrderedDict[Key, KeyState] = OrderedDict()
        self._servers: OrderedDict[str, ServerModel] = OrderedDict()  # by base URL, the newest last
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
        timeout: float | None = None,  # noqa: ASYNC109 - a bound to refuse by, not a timer
        again: Permit | None = None,
    ) -> Permit:
        """Wait for this request's turn; see ``RateLimiter.acquire``.

        Canceled at any moment (by anyio or natively), it leaves no trace: a grant that was under way goes to
        the next in the queue.

        Raises:
            WouldWait: See ``RateLimiter.acquire``.
        """
        waiter = Waiter(self._inbox, self.clock, key, priority, timeout)
        asked = self.clock()
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
                    self._inbox.post(waiter.state, _look_again)
        except BaseException:  # canceled, or closed by the garbage collector
            self._inbox.post(None, self._withdraw, waiter)
            raise
        if isinstance(waiter.outcome, Exception):
            raise waiter.outcome
        if events.wanted():
            events.emit(events.Granted(key.short, priority, self.clock() - asked))
        return waiter

    def snapshot(self, key: Key) -> RateLimit:
        """Return what is known of a key now; one that was never used has its whole limit.

        Takes no lock, so it may be called anywhere, in a signal handler too.

        Args:
            key: The key, such as ``lemcal.rate_limit_key``.
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

    # Everything below is called by the inbox, one at a time.

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
        others_wait = len(state.queue) > 0
        waiter.ahead = 0 if waiter.refused else state.queue.ahead_of(waiter.priority)
        must_wait = others_wait or state.log.next_at(now) > now
        if must_wait and not (waiter.timeout is None and state.warned):
            wait = state.log.estimate(now, waiter.ahead)
            if waiter.timeout is not None and wait > waiter.timeout:
                waiter.decide(WouldWait(wait, refused=False))
                return None
            if waiter.timeout is None and wait > LONG_WAIT:
                state.warned = True
                waiter.long_wait = (wait, waiter.ahead)
        state.queue.add(waiter)
        # Behind others nothing changes for them, unless it goes first or its loop has no alarm yet.
        return None if others_wait and not state.queue.is_first(waiter) else state

    def _new_state(self, key: Key) -> KeyState:
        return KeyState(key, SlidingWindowLog(self.limit, self.period, self._server(key.base_url)))

    def _server(self, base_url: str) -> ServerModel:
        """Return what is known of a server; it outlasts the server's keys. A hundred are remembered."""
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
            return None  # it watched the clock for nobody
        return state

    def _serve(self, state: KeyState) -> None:
        """Grant what can be granted now, and see that somebody looks again when more can be."""
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
            if waiter.stands_still():
                # If its loop never runs again, a grant would be lost for good. If it does, the task
                # wakes up and asks for its old place.
                queue.discard(waiter)
                waiter.passed_over = True
                waiter.wake()
                continue
            queue.pop(waiter)
            waiter.slot = log.take(now)
            state.offers[waiter] = now
            if not waiter.decide("granted"):  # its event loop is gone, and its task with it
                del state.offers[waiter]
                log.unsent(waiter.slot)
        when = math.inf if waiter is None else when
        if len(queue) and (when := min([when, *(at + PATIENCE for _, at in _awaited(state))])) < math.inf:
            self._set_alarms(queue, when)

    def _revoke(self, state: KeyState, now: float) -> None:
        """Take back grants that a blocked event loop has not picked up while others wait."""
        for waiter, offered_at in _awaited(state):
            if now < offered_at + PATIENCE or waiter.runs_here() or state.offers.pop(waiter, None) is None:
                continue
            state.log.unsent(waiter.slot)
            waiter.slot = None
            waiter.passed_over = True
            state.queue.stalled[waiter.loop] = None

    def _set_alarms(self, queue: Queue, when: float) -> None:
        """Have one waiting task per event loop look again at ``when``; drop those of dead loops."""
        while dead := [waiter for waiter in queue.alarms() if not waiter.set_alarm(when)]:
            for waiter in dead:
                queue.discard(waiter)

    def _drop_idle(self, now: float) -> None:
        # Starting with the one not looked at for longest, so that however many keys come and go, each is
        # looked at again; at most a thousand at once, which takes a millisecond.
        for _ in range(min(1000, len(self._keys))):
            key, state = next(iter(self._keys.items()))
            if 0 <= now - state.looked_at < self.period:
                return
            if not len(state.queue) and state.log.idle(now):
                del self._keys[key]
                continue
            state.looked_at = now
            self._keys.move_to_end(key)
            return

    def _after_fork(self) -> None:
        """Start over in the child: the waiting tasks and the answers are the parent's."""
        self._inbox.reset()
        for state in self._keys.values():
            state.queue.clear()
            state.offers.clear()
            state.log.abandon(self.clock())


def _awaited(state: KeyState) -> list[tuple[Waiter, float]]:
    """Return the grants that nobody has picked up yet although a task of another event loop waits."""
    if not state.offers:
        return []
    loops = state.queue.loops()
    return [
        (waiter, offered_at)
        for waiter, offered_at in list(state.offers.items())
        if len(loops) > 1 or waiter.loop not in loops
    ]


def _look_again() -> None:
    """Nothing has happened, but time has passed."""


_limiters: "weakref.WeakSet[LocalRateLimiter]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for limiter in list(_limiters):
        limiter._after_fork()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # the hook is this module's


if hasattr(os, "register_at_fork"):  # pragma: no branch - not on Windows
    os.register_at_fork(after_in_child=_after_fork_in_child)


_default = LocalRateLimiter()


def default_limiter() -> LocalRateLimiter:
    """Return the limiter that all clients of this process share unless they are given one."""
    return _default


@contextmanager
def fresh_default() -> Generator[LocalRateLimiter]:
    """Replace the process-wide limiter with a new one for a while: for tests."""
    global _default  # noqa: PLW0603 - the point of it
    before, _default = _default, LocalRateLimiter()
    try:
        yield _default
    finally:
        _default = before
