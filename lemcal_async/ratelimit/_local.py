"""The limiter of one process: the queue and the slots of each key, and the tasks that wait.

Nothing here belongs to an event loop, so one limiter serves several loops and threads at once.
All that happens is an event in an inbox; whoever finds nobody at work on the inbox works it off.
No thread ever waits for another, and reporting is safe anywhere, in a finalizer too: an event
that arrives while its own thread is at work is simply next.

The limiter that clients share unless they are given one: one for the whole process."""

import itertools
import logging
import os
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from lemcal_async import events
from lemcal_async._headers import Quota
from lemcal_async.errors import ConfigurationError
from lemcal_async.ratelimit._base import Key, Permit, Priority, RateLimit, WouldWait
from lemcal_async.ratelimit._server import ServerModel
from lemcal_async.ratelimit._slots import Observation, SlidingWindowLog, Slot
from lemcal_async.ratelimit._waiters import KeyState, Queue, Waiter

logger = logging.getLogger("lemcal_async.ratelimit")

LONG_WAIT = 30.0  # seconds; whoever faces more without a deadline is told once per key


class LocalRateLimiter:
    """At most ``limit`` requests in any ``period`` seconds for each key, in this process.

    Requests of one key leave in the order in which they asked; interactive calls pass bulk ones,
    which still get one turn in five. A 429 holds the whole key for the time the server names, and
    the refused request goes first. Cancelling a wait costs nobody anything. Keys do not delay
    each other, and those that are idle are forgotten. ``clock`` returns seconds.
    """

    def __init__(
        self, limit: int = 20, period: float = 2.0, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if limit < 1 or not 0 < period < float("inf"):
            raise ConfigurationError(
                "a rate limit needs a limit of at least 1 and a period of seconds above 0"
            )
        self.limit = limit
        self.period = period
        self.clock = clock
        self._accounts: OrderedDict[Key, KeyState] = OrderedDict()
        self._inbox: deque[tuple[KeyState | None, Callable[..., KeyState | None], tuple[Any, ...]]] = deque()
        self._at_work = threading.Lock()
        self._servers: OrderedDict[str, ServerModel] = OrderedDict()  # by base URL, the newest last
        self._news: deque[tuple[Key, Observation, int]] = deque()
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

        Raises WouldWait. Cancelled (by anyio or natively) at any moment, it leaves no trace: a
        grant that was under way goes to the next in the queue.
        """
        ticket = Waiter(self, key, priority, timeout)
        asked = self.clock()
        if isinstance(again, Waiter) and again.limiter is self:
            ticket.number = again.number
            ticket.refused = True
        else:
            ticket.number = next(self._numbers)
        try:
            self.post(None, self._ask, ticket)
            if ticket.outcome is None and events.wanted():
                events.emit(events.Queued(key.short, priority, ticket.ahead))
            while ticket.outcome is None:
                ticket.warn()
                alarm = ticket.alarm
                if alarm is None:
                    await ticket.event.wait()
                else:
                    await ticket.wait(max(0.0, alarm - self.clock()))
                ticket.rearm()
                if ticket.passed_over:
                    ticket.passed_over = False
                    self.post(None, self._ask, ticket)
                if alarm is not None and self.clock() >= alarm:
                    ticket.alarm = None
                    self.post(ticket.account, _look)
        except BaseException:  # cancelled, or closed by the garbage collector
            self.post(None, self._withdraw, ticket)
            raise
        if isinstance(ticket.outcome, WouldWait):
            raise ticket.outcome
        if events.wanted():
            events.emit(events.Granted(key.short, priority, self.clock() - asked))
        return ticket

    def snapshot(self, key: Key) -> RateLimit:
        """Return what is known of ``key`` now; a key never used has its whole limit."""
        now = self.clock()
        account = self._accounts.get(key)
        if account is None:
            return RateLimit(self.limit, self.limit, resets_in=0.0, queued=0, paused_for=0.0)
        with self._at_work:
            found = RateLimit(
                limit=account.slots.limit,
                remaining=account.slots.remaining(now),
                resets_in=account.slots.resets_in(now),
                queued=len(account.queue),
                paused_for=account.slots.pause.left(now),
            )
        self.post(account, _look)  # and what came in meanwhile
        return found

    # Everything below runs with _at_work held, so one at a time, except post.

    def post(self, account: KeyState | None, event: Callable[..., KeyState | None], *details: Any) -> None:
        """Leave an event for ``account``, and work off the inbox unless somebody does already.

        That somebody looks into the inbox once more after letting go, so nothing stays behind.
        ``event`` returns the account itself where it is not known before.
        """
        self._inbox.append((account, event, details))
        while self._inbox and self._at_work.acquire(blocking=False):
            try:
                while self._inbox:
                    account, event, details = self._inbox.popleft()
                    account = event(*details) or account
                    if account is not None:
                        self._serve(account)
                self._drop_idle()
            finally:
                self._at_work.release()
            self._tell()

    def take_in(
        self, slots: SlidingWindowLog, slot: Slot, key: Key, answer: tuple[float, int, Quota]
    ) -> None:
        """Take in an answer, an event for ``post``."""
        news = slots.answered(slot, *answer)
        if news is not None:
            self._news.append((key, news, slots.strangers))

    def _tell(self) -> None:
        """Tell what is new; with nothing held, because a log handler or a listener may do anything."""
        while self._news:
            try:
                key, news, strangers = self._news.popleft()
            except IndexError:  # another thread was quicker
                return
            if news == "strangers":
                logger.info(
                    "somebody else uses key %s (%d requests in this window): they are left their share",
                    key,
                    strangers,
                )
                event: events.Event = events.ForeignUse(key.short, strangers)
            else:
                reason = "the server's answers contradict fixed windows: it is taken for a sliding one"
                logger.info("key %s: %s", key, reason)
                event = events.FellBack(key.short, reason)
            events.emit(event)

    def _ask(self, ticket: Waiter) -> KeyState | None:
        account = self._accounts.get(ticket.key)
        if account is None:
            server = self._server(ticket.key.base_url)
            account = self._accounts[ticket.key] = KeyState(ticket.key, self.limit, self.period, server)
        ticket.account = account
        now = self.clock()
        if refused_for := account.slots.pause.refused_for(now):
            ticket.decide(WouldWait(refused_for, refused=True))
            return None
        waits = len(account.queue) > 0
        ticket.ahead = 0 if ticket.refused else account.queue.ahead_of(ticket.priority)
        if (waits or account.slots.next_at(now) > now) and not (ticket.timeout is None and account.warned):
            wait = account.slots.estimate(now, ticket.ahead)
            if ticket.timeout is not None and wait > ticket.timeout:
                ticket.decide(WouldWait(wait, refused=False))
                return None
            if ticket.timeout is None and wait > LONG_WAIT:
                account.warned = True
                ticket.long_wait = (wait, ticket.ahead)
        account.queue.add(ticket)
        # Behind others nothing changes for them, unless it goes first or its loop has no alarm yet.
        return None if waits and not account.queue.is_first(ticket) else account

    def _server(self, base_url: str) -> ServerModel:
        """Return what is known of a server, which outlasts its keys; of a hundred at most."""
        server = self._servers.get(base_url)
        if server is None:
            server = self._servers[base_url] = ServerModel(self.period)
            if len(self._servers) > 100:
                self._servers.popitem(last=False)
        return server

    def _withdraw(self, ticket: Waiter) -> KeyState | None:
        account = ticket.account
        if account is None:
            return None
        account.queue.discard(ticket)
        if ticket.slot is not None:
            account.slots.unsent(ticket.slot)
        elif ticket.alarm is None:
            return None  # it watched the clock for nobody
        return account

    def _serve(self, account: KeyState) -> None:
        """Grant what can be granted now, and see that somebody looks again when more can be."""
        queue, slots = account.queue, account.slots
        if not len(queue):
            return
        now = self.clock()
        if refused_for := slots.pause.refused_for(now):
            while (ticket := queue.head()) is not None:
                queue.pop(ticket)
                ticket.decide(WouldWait(refused_for, refused=True))
        when = now
        while (ticket := queue.head()) is not None and (when := slots.next_at(now, len(queue))) <= now:
            if ticket.stands_still():
                # A grant would be lost for good if it never runs again. If it does, the task is
                # woken, and asks for the place that it had.
                queue.discard(ticket)
                ticket.passed_over = True
                ticket.wake()
                continue
            queue.pop(ticket)
            ticket.slot = slots.take(now)
            if not ticket.decide("granted"):  # its event loop is gone, and its task with it
                slots.unsent(ticket.slot)
        if ticket is not None and when < float("inf"):
            self._set_alarms(queue, when)

    def _set_alarms(self, queue: Queue[Waiter], when: float) -> None:
        """Have one waiting task per event loop look again at ``when``; drop those of dead loops."""
        while dead := [ticket for ticket in queue.alarms() if not ticket.set_alarm(when)]:
            for ticket in dead:
                queue.discard(ticket)

    def _drop_idle(self) -> None:
        # Starting with the longest unlooked-at, so that however many keys come and go, each is
        # looked at again; at most a thousand at once, which is a millisecond.
        for _ in range(min(1000, len(self._accounts))):
            key, account = next(iter(self._accounts.items()))
            if not len(account.queue) and account.slots.idle(self.clock()):
                del self._accounts[key]
                continue
            self._accounts.move_to_end(key)
            return

    def after_fork(self) -> None:
        """Start over in the child: the waiting tasks and the answers are the parent's."""
        self._at_work = threading.Lock()
        self._inbox.clear()
        for account in self._accounts.values():
            account.queue.clear()
            account.slots.abandon(self.clock())


def _look() -> None:
    """Nothing has happened, but time has passed."""


_limiters: "weakref.WeakSet[LocalRateLimiter]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for limiter in list(_limiters):
        limiter.after_fork()


if hasattr(os, "register_at_fork"):  # pragma: no branch - not on Windows
    os.register_at_fork(after_in_child=_after_fork_in_child)


_default = LocalRateLimiter()


def default_limiter() -> LocalRateLimiter:
    """Return the process-wide limiter."""
    return _default


@contextmanager
def fresh_default() -> Generator[LocalRateLimiter]:
    """Replace the process-wide limiter by a new one for a while: for tests."""
    global _default  # noqa: PLW0603 - the point of it
    before, _default = _default, LocalRateLimiter()
    try:
        yield _default
    finally:
        _default = before
