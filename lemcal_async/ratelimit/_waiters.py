"""Waiting calls, the queue of each key and the inbox: shared by both limiters.

No decisions are made here. Whatever happens to a waiter, and whatever the waiter reports, is an event in
the limiter's inbox.
"""

import logging
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from itertools import takewhile
from typing import Any, Generic, Literal, Protocol, TypeVar

from anyio.lowlevel import current_token

from lemcal_async import events
from lemcal_async._concurrency import Wakeup
from lemcal_async._headers import Quota
from lemcal_async.ratelimit._base import Key, Priority
from lemcal_async.ratelimit._log import Observation
from lemcal_async.ratelimit._slots import Cooldown, pause_after_429

BULK_SHARE = 5  # while both lanes wait, one turn in this many goes to a bulk call

_logger = logging.getLogger("lemcal_async.ratelimit")

T = TypeVar("T")


class SlotLog(Protocol):
    """The slots of one key: ``SlidingWindowLog``, or its counterpart where processes share a budget."""

    period: float
    cooldown: Cooldown

    @property
    def limit(self) -> int:
        """The limit in force."""
        ...

    @property
    def foreign(self) -> int:
        """The number of foreign requests in the newest window."""
        ...

    def next_at(self, now: float, waiting: int = 1) -> float:
        """Return when the next request may be granted; inf means not before a report."""
        ...

    def take(self, now: float) -> Any:
        """Grant one request."""
        ...

    def is_valid(self, slot: Any, now: float) -> bool:
        """Whether a slot may still be used; an expired slot may have been granted to another process."""
        ...

    def sent(self, slot: Any, now: float) -> None:
        """Record that the request was sent."""

    def answered(self, slot: Any, now: float, status_code: int, quota: Quota) -> Observation | None:
        """Process a response; return what it newly reveals about the whole key."""

    def unsent(self, slot: Any) -> None:
        """Release the slot."""

    def unknown(self, slot: Any, now: float) -> None:
        """End the slot of a request that will get no response but that the server may have counted."""

    def abandon(self, now: float) -> None:
        """End all requests in flight."""

    def estimate(self, now: float, ahead: int) -> float:
        """Return the minimum wait in seconds of a request that has ``ahead`` others before it."""
        ...

    def remaining(self, now: float) -> int:
        """Return the number of requests that could be granted now."""
        ...

    def resets_in(self, now: float) -> float:
        """Return the seconds until the whole limit is available again."""
        ...

    def idle(self, now: float) -> bool:
        """Whether there is no state to keep."""
        ...


class KeyState:
    """The state of one key."""

    __slots__ = ("checked_at", "key", "log", "offers", "queue", "warned")

    def __init__(self, key: Key, log: SlotLog) -> None:
        self.key = key
        self.queue = Queue()
        self.log = log
        self.offers: dict[Waiter, float] = {}  # grants not picked up yet, and when they were made
        self.warned = False
        self.checked_at = -math.inf  # when this state was last checked for being idle


class Waiter(Wakeup):
    """A call waiting for its turn. Once granted, it is the call's permit."""

    __slots__ = (
        "ahead",
        "alarm",
        "clock",
        "inbox",
        "key",
        "long_wait",
        "number",
        "outcome",
        "passed_over",
        "priority",
        "refused",
        "slot",
        "state",
        "timeout",
    )

    def __init__(
        self,
        inbox: "Inbox[KeyState]",
        clock: Callable[[], float],
        key: Key,
        priority: Priority,
        timeout: float | None,
    ) -> None:
        self.loop = current_token().native_token
        self.event: Any = None  # created when it has to wait
        self.inbox = inbox
        self.clock = clock
        self.key = key
        self.priority: Priority = priority
        self.timeout = timeout
        self.number = 0
        self.ahead = 0  # calls that go first
        self.refused = False  # whether the server refused the call's previous attempt
        self.alarm: float | None = None  # when to check the clock on behalf of all waiters
        self.state: KeyState | None = None
        self.slot: Any = None
        self.outcome: Literal["granted"] | Exception | None = None
        self.long_wait: tuple[float, int] | None = None  # seconds and calls ahead, for a pending warning
        self.passed_over = False  # whether it lost its place while its event loop was blocked

    def wake(self) -> bool:
        """Wake the task if it is waiting; return False if its event loop is closed."""
        return self.event is None or super().wake()

    def is_decided(self) -> bool:
        """Whether the wait is over. Picks up the grant, unless it has been taken back."""
        if self.event is None and self.outcome is None:
            self.event = self._new_event()  # first, so that any later decision wakes the task
        if self.outcome is None:
            return False
        # The first to remove the offer has it: this task, or another thread that found it overdue.
        if self.outcome != "granted" or (self.state and self.state.offers.pop(self, None) is not None):
            return True
        self.outcome = None
        self.passed_over = True
        return False

    def decide(self, outcome: Literal["granted"] | Exception) -> bool:
        """Set the outcome and wake the task; return False if its event loop is closed."""
        self.outcome = outcome
        return self.wake()

    def warn(self) -> None:
        """Log a long wait. Called by the task itself: a log handler may do anything, including call us."""
        if self.long_wait is None:
            return
        wait, ahead = self.long_wait
        self.long_wait = None
        _logger.warning(
            "key %s: a call without a deadline will wait %.0f s for the rate limit (%d calls queued); "
            "pass deadline= to fail fast instead",
            self.key,
            wait,
            ahead,
        )

    def set_alarm(self, when: float) -> bool:
        """Have the waiting task check the clock at ``when``; return False if its event loop is closed."""
        if self.alarm is not None and self.alarm <= when:
            return True
        self.alarm = when
        return self.wake()

    # The methods of a Permit. Each posts an event and returns at once.

    def is_valid(self) -> bool:
        """Whether the slot may still be used."""
        return self.state is None or self.state.log.is_valid(self.slot, self.clock())

    def sent(self) -> bool:
        """Record that the request is being sent now, or release a slot that has expired."""
        if self.state is None:
            return True
        if not self.is_valid():
            self.unsent()
            return False
        self._report(self.state.log.sent, self.clock())
        return True

    def answered(self, status_code: int, quota: Quota) -> float:
        """Record the response; return the seconds for which the key pauses after it."""
        if self.state is None:
            return 0.0
        self._report(self._process_response, self.state.log, self.clock(), status_code, quota)
        if status_code != 429:
            return 0.0
        pause = pause_after_429(quota, self.state.log.period)
        _logger.info("key %s: refused (429); sending is paused for %.3f s", self.key, pause)
        if events.wanted():
            events.emit(events.Paused(self.key.short, pause))
        return pause

    def unsent(self) -> None:
        """Record that the request was never sent."""
        if self.state is not None:
            self._report(self.state.log.unsent)

    def unknown(self) -> None:
        """Record that the request may or may not have been counted."""
        if self.state is not None:
            self._report(self.state.log.unknown, self.clock())

    def _report(self, event: Callable[..., None], *details: object) -> None:
        if self.slot is not None:
            self.inbox.post(self.state, event, self.slot, *details)

    def _process_response(self, slot: Any, log: SlotLog, now: float, status_code: int, quota: Quota) -> None:
        observation = log.answered(slot, now, status_code, quota)
        if observation is not None:
            self.inbox.defer(announce, self.key, observation, log.foreign)


def announce(key: Key, observation: Observation, foreign: int) -> None:
    """Log and publish what a response has revealed about a key."""
    if observation == "foreign use":
        _logger.info("key %s: another client uses it too (foreign requests in this window: %d)", key, foreign)
        event: events.Event = events.ForeignUse(key.short, foreign)
    else:
        reason = "the responses contradict fixed windows; the server is treated as a sliding log"
        _logger.info("key %s: %s", key, reason)
        event = events.FellBack(key.short, reason)
    events.emit(event)


class Queue:
    """The waiters of one key: a first-in, first-out queue with two lanes.

    Interactive calls go before bulk calls, which still get every fifth turn. A request that the server
    refused keeps its original number and goes before all other waiters.
    """

    __slots__ = ("_bulk", "_interactive", "_passed", "_refused", "stalled")

    def __init__(self) -> None:
        self._refused: _Lane = _Lane()
        self._interactive: _Lane = _Lane()
        self._bulk: _Lane = _Lane()
        self._passed = 0  # interactive turns since the last bulk turn, while a bulk call waited
        self.stalled: dict[Hashable, None] = {}  # blocked event loops; their waiters are passed over

    def __len__(self) -> int:
        return self._refused.size + self._interactive.size + self._bulk.size

    def add(self, waiter: Waiter) -> None:
        """Add a waiter to the end of its lane; a refused one goes in front of both lanes, by number."""
        self._lane(waiter).add(waiter)

    def discard(self, waiter: Waiter) -> bool:
        """Remove a waiter; return False if it was not queued."""
        return self._lane(waiter).discard(waiter)

    def ahead_of(self, priority: Priority) -> int:
        """Return the minimum number of waiters served before a new one of ``priority``."""
        if priority == "interactive":
            return self._refused.size + self._interactive.size
        between = (BULK_SHARE - 1) * (self._bulk.size + 1) - self._passed
        return self._refused.size + self._bulk.size + min(self._interactive.size, between)

    def head(self) -> Waiter | None:
        """Return the next waiter to serve."""
        head = self._refused.head(self.stalled)
        if head is not None:
            return head
        interactive, bulk = self._interactive.head(self.stalled), self._bulk.head(self.stalled)
        if interactive is None or (bulk is not None and self._passed >= BULK_SHARE - 1):
            return bulk
        return interactive

    def pop(self, head: Waiter) -> None:
        """Remove the head and count its turn."""
        self.discard(head)
        if not head.refused:
            bulk_waits = head.priority == "interactive" and self._bulk.size > 0
            self._passed = self._passed + 1 if bulk_waits else 0

    def alarms(self) -> list[Waiter]:
        """Return one waiter per event loop, to check the clock on behalf of that loop's waiters."""
        found: dict[Hashable, Waiter] = {}
        for lane in (self._refused, self._interactive, self._bulk):
            for waiter in lane.heads():
                found.setdefault(waiter.loop, waiter)
        return list(found.values())

    def loops(self) -> set[Hashable]:
        """Return the event loops that have waiters, except blocked loops."""
        lanes = (self._refused, self._interactive, self._bulk)
        return {waiter.loop for lane in lanes for waiter in lane.heads()} - self.stalled.keys()

    def is_first(self, waiter: Waiter) -> bool:
        """Whether a waiter is the first of its lane and event loop."""
        return self._lane(waiter).is_first(waiter)

    def clear(self) -> None:
        """Remove all waiters."""
        self._refused, self._interactive, self._bulk = _Lane(), _Lane(), _Lane()
        self.stalled.clear()

    def _lane(self, waiter: Waiter) -> "_Lane":
        if waiter.refused:
            return self._refused
        return self._interactive if waiter.priority == "interactive" else self._bulk


class _Lane:
    """Waiters ordered by number, grouped by event loop because each loop needs an alarm of its own."""

    __slots__ = ("_by_loop", "size")

    def __init__(self) -> None:
        self._by_loop: dict[Hashable, OrderedDict[Waiter, None]] = {}
        self.size = 0

    def add(self, waiter: Waiter) -> None:
        waiters = self._by_loop.setdefault(waiter.loop, OrderedDict())
        later = list(takewhile(lambda other: other.number > waiter.number, reversed(waiters)))
        waiters[waiter] = None
        self.size += 1
        for other in reversed(later):
            waiters.move_to_end(other)

    def discard(self, waiter: Waiter) -> bool:
        waiters = self._by_loop.get(waiter.loop)
        if waiters is None or waiter not in waiters:
            return False
        del waiters[waiter]
        self.size -= 1
        if not waiters:
            del self._by_loop[waiter.loop]
        return True

    def is_first(self, waiter: Waiter) -> bool:
        return next(iter(self._by_loop[waiter.loop])) is waiter

    def head(self, stalled: dict[Hashable, None]) -> Waiter | None:
        if not self.size:  # the common case: usually only one lane is in use
            return None
        heads = self.heads()
        if stalled:
            heads = (waiter for waiter in heads if waiter.loop not in stalled)
        return min(heads, key=lambda waiter: waiter.number, default=None)

    def heads(self) -> Iterator[Waiter]:
        return (next(iter(waiters)) for waiters in self._by_loop.values())


class Inbox(Generic[T]):
    """The events of a limiter, processed by one thread at a time.

    Any thread may post an event at any moment: in a finalizer, in a signal handler, or while the same thread
    is processing the inbox. Posting never blocks: the posting thread processes the inbox itself, unless
    another thread is already doing so. ``handle`` is called after each event with the event's subject.
    """

    def __init__(self, handle: Callable[[T], None]) -> None:
        self._handle = handle
        self._events: deque[tuple[T | None, Callable[..., T | None], tuple[Any, ...]]] = deque()
        self._deferred: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._lock = threading.Lock()

    @property
    def busy(self) -> bool:
        """Whether a thread is processing the inbox."""
        return self._lock.locked()

    def post(self, subject: T | None, event: Callable[..., T | None], *details: Any) -> None:
        """Have ``event(*details)`` called by the thread that processes the inbox.

        ``event`` may return its subject if the subject is not known beforehand.
        """
        self._events.append((subject, event, details))
        # Check again after releasing the lock: another thread may have posted an event in between.
        while self._events and self._lock.acquire(blocking=False):
            try:
                while self._events:
                    subject, event, details = self._events.popleft()
                    subject = event(*details) or subject
                    if subject is not None:
                        self._handle(subject)
            finally:
                self._lock.release()
            self._run_deferred()

    def defer(self, function: Callable[..., None], *details: Any) -> None:
        """Have ``function(*details)`` called while no lock is held: a log handler may do anything."""
        self._deferred.append((function, details))

    def reset(self) -> None:
        """Reset after a fork: no thread holds the lock, and all events belong to the parent."""
        self._lock = threading.Lock()
        self._events.clear()
        self._deferred.clear()

    def _run_deferred(self) -> None:
        while self._deferred:
            try:
                function, details = self._deferred.popleft()
            except IndexError:  # another thread took the last one
                return
            function(*details)
