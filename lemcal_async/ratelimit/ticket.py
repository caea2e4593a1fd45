"""One call of one key: its place in the queue, what its task waits on, and then its permit.

Nothing is decided in here. What happens to a ticket, and what is reported to it, is an event that the
limiter of ``local.py`` works off.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from lemcal_async import events
from lemcal_async.headers import Quota
from lemcal_async.ratelimit.key import Key
from lemcal_async.ratelimit.pause import hold_after_429
from lemcal_async.ratelimit.protocol import Priority, WouldWait
from lemcal_async.ratelimit.queue import Queue
from lemcal_async.ratelimit.slots import SlotLog
from lemcal_async.ratelimit.wakeup import Wakeup
from lemcal_async.ratelimit.windows import Server

if TYPE_CHECKING:
    from lemcal_async.ratelimit.busy import Slot
    from lemcal_async.ratelimit.local import LocalRateLimiter

logger = logging.getLogger("lemcal_async.ratelimit")


class Account:
    """What is known of one key."""

    __slots__ = ("key", "queue", "slots", "warned")

    def __init__(self, key: Key, limit: int, period: float, server: Server) -> None:
        self.key = key
        self.queue: Queue[Ticket] = Queue()
        self.slots = SlotLog(limit, period, server)
        self.warned = False


class Ticket(Wakeup):
    """One call's place in the queue, what its task waits on, and then its permit."""

    __slots__ = (
        "account",
        "ahead",
        "alarm",
        "key",
        "limiter",
        "long_wait",
        "number",
        "outcome",
        "passed_over",
        "priority",
        "refused",
        "slot",
        "timeout",
    )

    def __init__(
        self, limiter: "LocalRateLimiter", key: Key, priority: Priority, timeout: float | None
    ) -> None:
        super().__init__()
        self.limiter = limiter
        self.key = key
        self.priority: Priority = priority
        self.timeout = timeout
        self.number = 0
        self.ahead = 0  # how many are to go before it
        self.refused = False  # whether the server refused this call's last attempt
        self.alarm: float | None = None  # when to look at the clock for all who wait
        self.account: Account | None = None
        self.slot: Slot | None = None
        self.outcome: Literal["granted"] | WouldWait | None = None
        self.long_wait: tuple[float, int] | None = None  # seconds and calls ahead, if to be warned of
        self.passed_over = False  # whether it lost its place, because its event loop stood still

    def decide(self, outcome: Literal["granted"] | WouldWait) -> bool:
        """Tell the waiting task what became of it; False if its event loop is gone."""
        self.outcome = outcome
        return self.wake()

    def warn(self) -> None:
        """Log a long wait; in the task itself, because a log handler may do anything, and ask us too."""
        if self.long_wait is None:
            return
        wait, ahead = self.long_wait
        self.long_wait = None
        logger.warning(
            "key %s: a call without a deadline will wait %.0f s for the rate limit (%d are queued); "
            "pass deadline= to be refused instead",
            self.key,
            wait,
            ahead,
        )

    def set_alarm(self, when: float) -> bool:
        """Have the waiting task look at the clock at ``when``; False if its event loop is gone."""
        if self.alarm is not None and self.alarm <= when:
            return True
        self.alarm = when
        return self.wake()

    def sent(self) -> None:
        """Leave a note that the request is leaving now; see ``Permit``, as for those that follow."""
        self._report(SlotLog.sent, self.limiter.clock())

    def answered(self, status_code: int, quota: Quota) -> float:
        """Leave a note of the answer; return how long the key is held after it."""
        self._report(self.limiter.take_in, self.key, (self.limiter.clock(), status_code, quota))
        if status_code != 429:
            return 0.0
        hold = hold_after_429(quota, self.limiter.period)
        logger.info("the server refused key %s (429): nobody sends for %.3f s", self.key, hold)
        if events.wanted():
            events.emit(events.Paused(self.key.short, hold))
        return hold

    def unsent(self) -> None:
        """Leave a note that the request never left."""
        self._report(SlotLog.unsent)

    def unknown(self) -> None:
        """Leave a note that nobody knows whether the request was counted."""
        self._report(SlotLog.unknown, self.limiter.clock())

    def _report(self, event: Callable[..., None], *details: object) -> None:
        if self.account is not None and self.slot is not None:
            self.limiter.post(self.account, event, self.account.slots, self.slot, *details)
