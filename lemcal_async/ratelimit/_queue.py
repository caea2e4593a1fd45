"""Who is next for one key: a first-in-first-out queue with two lanes. Pure.

Interactive calls pass bulk ones, which still get every fifth turn. A request that the server refused
comes back with the number it had, and so goes before all that came after it.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, Protocol, TypeVar

from lemcal_async.ratelimit._base import Priority

BULK_SHARE = 5  # while both lanes wait, one turn in this many is a bulk one


class Queued(Protocol):
    """What the queue needs to know of a waiter."""

    number: int
    priority: Priority
    refused: bool
    loop: Hashable


T = TypeVar("T", bound=Queued)


class _Lane(Generic[T]):
    """Waiters by number, kept apart by event loop, because each loop needs an alarm clock of its own."""

    __slots__ = ("_by_loop", "size")

    def __init__(self) -> None:
        self._by_loop: dict[Hashable, OrderedDict[T, None]] = {}
        self.size = 0

    def add(self, waiter: T) -> None:
        waiters = self._by_loop.setdefault(waiter.loop, OrderedDict())
        later = list(_backwards_while_later(waiters, waiter))
        waiters[waiter] = None
        self.size += 1
        for other in reversed(later):
            waiters.move_to_end(other)

    def discard(self, waiter: T) -> bool:
        waiters = self._by_loop.get(waiter.loop)
        if waiters is None or waiter not in waiters:
            return False
        del waiters[waiter]
        self.size -= 1
        if not waiters:
            del self._by_loop[waiter.loop]
        return True

    def is_first(self, waiter: T) -> bool:
        return next(iter(self._by_loop[waiter.loop])) is waiter

    def head(self, stalled: "dict[Hashable, None]") -> T | None:
        if not self.size:  # as two of three lanes are, most of the time
            return None
        heads = self.heads()
        if stalled:
            heads = (waiter for waiter in heads if waiter.loop not in stalled)
        return min(heads, key=lambda waiter: waiter.number, default=None)

    def heads(self) -> Iterator[T]:
        return (next(iter(waiters)) for waiters in self._by_loop.values())


def _backwards_while_later(waiters: "OrderedDict[T, None]", waiter: T) -> Iterator[T]:
    for other in reversed(waiters):
        if other.number < waiter.number:
            return
        yield other


class Queue(Generic[T]):
    """The waiters of one key."""

    __slots__ = ("_bulk", "_interactive", "_passed", "_refused", "stalled")

    def __init__(self) -> None:
        self._refused: _Lane[T] = _Lane()
        self._interactive: _Lane[T] = _Lane()
        self._bulk: _Lane[T] = _Lane()
        self._passed = 0  # interactive turns since the last bulk one, while bulk waited
        self.stalled: dict[Hashable, None] = {}  # event loops that are blocked, whose waiters are passed over

    def __len__(self) -> int:
        return self._refused.size + self._interactive.size + self._bulk.size

    def add(self, waiter: T) -> None:
        """Put a waiter where it belongs: at the end of its lane, or before all if it was refused."""
        self._lane(waiter).add(waiter)

    def discard(self, waiter: T) -> bool:
        """Take a waiter out; return False if it was not in."""
        return self._lane(waiter).discard(waiter)

    def ahead_of(self, priority: Priority) -> int:
        """Return how many waiters at least will be served before a new one of ``priority``."""
        if priority == "interactive":
            return self._refused.size + self._interactive.size
        between = (BULK_SHARE - 1) * (self._bulk.size + 1) - self._passed
        return self._refused.size + self._bulk.size + min(self._interactive.size, between)

    def head(self) -> T | None:
        """Return whose turn it is."""
        head = self._refused.head(self.stalled)
        if head is not None:
            return head
        interactive, bulk = self._interactive.head(self.stalled), self._bulk.head(self.stalled)
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
        """Return one waiter per event loop: those that are to watch the clock for the others."""
        found: dict[Hashable, T] = {}
        for lane in (self._refused, self._interactive, self._bulk):
            for waiter in lane.heads():
                found.setdefault(waiter.loop, waiter)
        return list(found.values())

    def loops(self) -> "set[Hashable]":
        """Return the event loops that have waiters, but for the blocked ones."""
        lanes = (self._refused, self._interactive, self._bulk)
        return {waiter.loop for lane in lanes for waiter in lane.heads()} - self.stalled.keys()

    def is_first(self, waiter: T) -> bool:
        """Whether a waiter is the first of its lane and event loop."""
        return self._lane(waiter).is_first(waiter)

    def clear(self) -> None:
        """Drop all waiters."""
        self._refused, self._interactive, self._bulk = _Lane(), _Lane(), _Lane()
        self.stalled.clear()

    def _lane(self, waiter: T) -> _Lane[T]:
        if waiter.refused:
            return self._refused
        return self._interactive if waiter.priority == "interactive" else self._bulk
