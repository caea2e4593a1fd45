"""One call of one key: its place in the queue, what its task waits on, and then its permit.

Nothing is decided in here. Whatever happens to a waiter, and whatever it reports, is an event in the
limiter's inbox.
"""

import logging
from collections.abc import Callable
from typing import Any, Literal, Protocol

from lemcal_async import events
from lemcal_async._concurrency import Wakeup
from lemcal_async._headers import Quota
from lemcal_async.ratelimit._base import Key, Priority
from lemcal_async.ratelimit._cooldown import Cooldown, pause_after_429
from lemcal_async.ratelimit._inbox import Inbox
from lemcal_async.ratelimit._log import Observation
from lemcal_async.ratelimit._queue import Queue

_logger = logging.getLogger("lemcal_async.ratelimit")


class SlotLog(Protocol):
    """The slots of one key: ``SlidingWindowLog``, or what stands in for it where processes share a budget."""

    period: float
    cooldown: Cooldown

    @property
    def limit(self) -> int:
        """The limit in force."""
        ...

    @property
    def foreign(self) -> int:
        """How many requests of somebody else the newest window has."""
        ...

    def next_at(self, now: float, waiting: int = 1) -> float:
        """Return when the next request may be granted; inf is after a report."""
        ...

    def take(self, now: float) -> Any:
        """Grant one request."""
        ...

    def is_valid(self, slot: Any, now: float) -> bool:
        """Whether a slot may still be used; if not, others may have it by now."""
        ...

    def sent(self, slot: Any, now: float) -> None:
        """Note that the request left."""

    def answered(self, slot: Any, now: float, status_code: int, quota: Quota) -> Observation | None:
        """Take in an answer; return what it tells of the whole key that is new."""

    def unsent(self, slot: Any) -> None:
        """Give the slot back."""

    def unknown(self, slot: Any, now: float) -> None:
        """End the slot of a request that the server may have counted, and will not answer."""

    def abandon(self, now: float) -> None:
        """End all that is in flight."""

    def estimate(self, now: float, ahead: int) -> float:
        """Return the seconds that a request with ``ahead`` others before it will wait at least."""
        ...

    def remaining(self, now: float) -> int:
        """Return how many requests could be granted now."""
        ...

    def resets_in(self, now: float) -> float:
        """Return the seconds until the whole limit is free again."""
        ...

    def idle(self, now: float) -> bool:
        """Whether there is nothing to remember."""
        ...


class KeyState:
    """What is known of one key."""

    __slots__ = ("key", "log", "offers", "queue", "warned")

    def __init__(self, key: Key, log: SlotLog) -> None:
        self.key = key
        self.queue: Queue[Waiter] = Queue()
        self.log = log
        self.offers: dict[Waiter, float] = {}  # what was granted, and when, and not picked up yet
        self.warned = False


class Waiter(Wakeup):
    """One call that waits for its turn. Once granted, it is the call's permit."""

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
        inbox: Inbox[KeyState],
        clock: Callable[[], float],
        key: Key,
        priority: Priority,
        timeout: float | None,
    ) -> None:
        super().__init__()
        self.inbox = inbox
        self.clock = clock
        self.key = key
        self.priority: Priority = priority
        self.timeout = timeout
        self.number = 0
        self.ahead = 0  # how many go before it
        self.refused = False  # whether the server refused this call's last attempt
        self.alarm: float | None = None  # when to look at the clock for all who wait
        self.state: KeyState | None = None
        self.slot: Any = None
        self.outcome: Literal["granted"] | Exception | None = None
        self.long_wait: tuple[float, int] | None = None  # seconds and calls ahead, if worth a warning
        self.passed_over = False  # whether it lost its place, because its event loop stood still

    def is_decided(self) -> bool:
        """Whether the wait is over; picks up the grant, unless it has been taken back."""
        if self.outcome is None:
            return False
        # Whoever takes it out first has it: this task, or another thread that found it overdue.
        if self.outcome != "granted" or (self.state and self.state.offers.pop(self, None) is not None):
            return True
        self.outcome = None
        self.passed_over = True
        return False

    def decide(self, outcome: Literal["granted"] | Exception) -> bool:
        """Tell the waiting task what became of it; return False if its event loop is gone."""
        self.outcome = outcome
        return self.wake()

    def warn(self) -> None:
        """Log a long wait; in the task itself, because a log handler may do anything, and call us too."""
        if self.long_wait is None:
            return
        wait, ahead = self.long_wait
        self.long_wait = None
        _logger.warning(
            "key %s: a call without a deadline will wait %.0f s for the rate limit (%d calls queued); "
            "pass deadline= to have it refused instead",
            self.key,
            wait,
            ahead,
        )

    def set_alarm(self, when: float) -> bool:
        """Have the waiting task look at the clock at ``when``; return False if its event loop is gone."""
        if self.alarm is not None and self.alarm <= when:
            return True
        self.alarm = when
        return self.wake()

    # The reports of a Permit. Each leaves an event and returns at once.

    def is_valid(self) -> bool:
        """Whether its slot may still be used."""
        return self.state is None or self.state.log.is_valid(self.slot, self.clock())

    def sent(self) -> bool:
        """Note that the request is leaving now, or give a slot back that has run out."""
        if self.state is None:
            return True
        if not self.is_valid():
            self.unsent()
            return False
        self._report(self.state.log.sent, self.clock())
        return True

    def answered(self, status_code: int, quota: Quota) -> float:
        """Note the answer; return for how long the key pauses after it."""
        if self.state is None:
            return 0.0
        self._report(self._take_in_answer, self.state.log, self.clock(), status_code, quota)
        if status_code != 429:
            return 0.0
        pause = pause_after_429(quota, self.state.log.period)
        _logger.info("key %s was refused (429): sending paused for %.3f s", self.key, pause)
        if events.wanted():
            events.emit(events.Paused(self.key.short, pause))
        return pause

    def unsent(self) -> None:
        """Note that the request never left."""
        if self.state is not None:
            self._report(self.state.log.unsent)

    def unknown(self) -> None:
        """Note that nobody knows whether the request was counted."""
        if self.state is not None:
            self._report(self.state.log.unknown, self.clock())

    def _report(self, event: Callable[..., None], *details: object) -> None:
        if self.slot is not None:
            self.inbox.post(self.state, event, self.slot, *details)

    def _take_in_answer(self, slot: Any, log: SlotLog, now: float, status_code: int, quota: Quota) -> None:
        observation = log.answered(slot, now, status_code, quota)
        if observation is not None:
            self.inbox.defer(announce, self.key, observation, log.foreign)


def announce(key: Key, observation: Observation, foreign: int) -> None:
    """Log and publish what an answer has told of a key."""
    if observation == "foreign use":
        _logger.info(
            "key %s: somebody else uses it too (requests of theirs in this window: %d)", key, foreign
        )
        event: events.Event = events.ForeignUse(key.short, foreign)
    else:
        reason = "the answers contradict fixed windows; the server is treated as a sliding log"
        _logger.info("key %s: %s", key, reason)
        event = events.FellBack(key.short, reason)
    events.emit(event)
