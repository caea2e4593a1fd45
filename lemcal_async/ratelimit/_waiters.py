"""Who is next for one key: a first-in-first-out queue with two lanes. Pure.

Interactive calls pass bulk ones, which still get every fifth turn. A request that the server
refused comes back with the number it had, and so goes before all that came after it.

One call of one key: its place in the queue, what its task waits on, and then its permit.

Nothing is decided in here. What happens to a ticket, and what is reported to it, is an event that the
limiter of ``local.py`` works off.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Generic, Literal, Protocol, TypeVar

from lemcal_async import events
from lemcal_async._concurrency import Wakeup
from lemcal_async._headers import Quota
from lemcal_async.ratelimit._base import Key, Priority, WouldWait
from lemcal_async.ratelimit._server import ServerModel
from lemcal_async.ratelimit._slots import SlidingWindowLog, hold_after_429

if TYPE_CHECKING:
    from lemcal_async.ratelimit._local import LocalRateLimiter
    from lemcal_async.ratelimit._slots import Slot


BULK_SHARE = 5  # while both lanes wait, one turn in so many is a bulk one


class Queued(Protocol):
    """What the queue needs to know of a ticket: its number, its lane, its event loop."""

    number: int
    priority: Priority
    refused: bool
    loop: Hashable


T = TypeVar("T", bound=Queued)


class _Lane(Generic[T]):
    """Tickets by number, kept apart by event loop, because each loop needs an alarm clock of its own."""

    def __init__(self) -> None:
        self._by_loop: dict[Hashable, OrderedDict[T, None]] = {}
        self.size = 0

    def add(self, ticket: T) -> None:
        tickets = self._by_loop.setdefault(ticket.loop, OrderedDict())
        later = list(_backwards_while_later(tickets, ticket))
        tickets[ticket] = None
        self.size += 1
        for other in reversed(later):
            tickets.move_to_end(other)

    def discard(self, ticket: T) -> bool:
        tickets = self._by_loop.get(ticket.loop)
        if tickets is None or ticket not in tickets:
            return False
        del tickets[ticket]
        self.size -= 1
        if not tickets:
            del self._by_loop[ticket.loop]
        return True

    def is_first(self, ticket: T) -> bool:
        return next(iter(self._by_loop[ticket.loop])) is ticket

    def head(self) -> T | None:
        if not self.size:  # as two of three lanes are, most of the time
            return None
        return min(self.heads(), key=lambda ticket: ticket.number)

    def heads(self) -> Iterator[T]:
        return (next(iter(tickets)) for tickets in self._by_loop.values())


def _backwards_while_later(tickets: "OrderedDict[T, None]", ticket: T) -> Iterator[T]:
    for other in reversed(tickets):
        if other.number < ticket.number:
            return
        yield other


class Queue(Generic[T]):
    """The waiting tickets of one key."""

    def __init__(self) -> None:
        self._refused: _Lane[T] = _Lane()
        self._interactive: _Lane[T] = _Lane()
        self._bulk: _Lane[T] = _Lane()
        self._passed = 0  # interactive turns since the last bulk one, while bulk waited

    def __len__(self) -> int:
        return self._refused.size + self._interactive.size + self._bulk.size

    def add(self, ticket: T) -> None:
        """Put a ticket where it belongs: at the end of its lane, or before all if it was refused."""
        self._lane(ticket).add(ticket)

    def discard(self, ticket: T) -> bool:
        """Take a ticket out; False if it was not in."""
        return self._lane(ticket).discard(ticket)

    def ahead_of(self, priority: Priority) -> int:
        """Return how many tickets at least will be served before a new one of ``priority``."""
        if priority == "interactive":
            return self._refused.size + self._interactive.size
        between = (BULK_SHARE - 1) * (self._bulk.size + 1) - self._passed
        return self._refused.size + self._bulk.size + min(self._interactive.size, between)

    def head(self) -> T | None:
        """Return whose turn it is."""
        head = self._refused.head()
        if head is not None:
            return head
        interactive, bulk = self._interactive.head(), self._bulk.head()
        if interactive is None or (bulk is not None and self._passed >= BULK_SHARE - 1):
            return bulk
        return interactive

    def pop(self, head: T) -> None:
        """Serve the head."""
        self.discard(head)
        if not head.refused:
            bulk_waits = head.priority == "interactive" and self._bulk.size > 0
            self._passed = self._passed + 1 if bulk_waits else 0

    def alarms(self) -> "list[T]":
        """Return one ticket per event loop: those that are to watch the clock for the others."""
        found: dict[Hashable, T] = {}
        for lane in (self._refused, self._interactive, self._bulk):
            for ticket in lane.heads():
                found.setdefault(ticket.loop, ticket)
        return list(found.values())

    def is_first(self, ticket: T) -> bool:
        """Whether a ticket is the first of its lane and event loop."""
        return self._lane(ticket).is_first(ticket)

    def clear(self) -> None:
        """Forget all tickets."""
        self._refused, self._interactive, self._bulk = _Lane(), _Lane(), _Lane()

    def _lane(self, ticket: T) -> _Lane[T]:
        if ticket.refused:
            return self._refused
        return self._interactive if ticket.priority == "interactive" else self._bulk


logger = logging.getLogger("lemcal_async.ratelimit")


class KeyState:
    """What is known of one key."""

    __slots__ = ("key", "queue", "slots", "warned")

    def __init__(self, key: Key, limit: int, period: float, server: ServerModel) -> None:
        self.key = key
        self.queue: Queue[Waiter] = Queue()
        self.slots = SlidingWindowLog(limit, period, server)
        self.warned = False


class Waiter(Wakeup):
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
        self.account: KeyState | None = None
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
        self._report(SlidingWindowLog.sent, self.limiter.clock())

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
        self._report(SlidingWindowLog.unsent)

    def unknown(self) -> None:
        """Leave a note that nobody knows whether the request was counted."""
        self._report(SlidingWindowLog.unknown, self.limiter.clock())

    def _report(self, event: Callable[..., None], *details: object) -> None:
        if self.account is not None and self.slot is not None:
            self.limiter.post(self.account, event, self.account.slots, self.slot, *details)
