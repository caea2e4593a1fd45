"""Which slots of one key are busy, and until when: those in flight, and those of requests of the past. Pure.

What an answer means is read in ``slots.py``, and put down here. Times are seconds on the caller's clock.
"""

import math
from collections import deque

from lemcal_async.ratelimit.past import COUNTED_WITHIN, MARGIN, Past
from lemcal_async.ratelimit.windows import Server, Window, Windows


class Slot:
    """One request's share of the budget, from the grant until the server has forgotten it."""

    __slots__ = ("counted_by", "ended", "sent_at", "taken_at")

    def __init__(self, taken_at: float) -> None:
        self.taken_at = taken_at
        self.sent_at: float | None = None
        self.counted_by = math.inf  # as far as the answers to others tell
        self.ended = False

    @property
    def left_at(self) -> float:
        """Return the earliest moment at which it can have left."""
        return self.taken_at if self.sent_at is None else self.sent_at


class Busy:
    """The slots that the server may still be counting."""

    __slots__ = ("_period", "_server", "_windows", "counted", "in_flight", "past")

    def __init__(self, server: Server, windows: Windows, period: float, limit: int) -> None:
        self._server = server
        self._windows = windows
        self._period = period
        self.in_flight: set[Slot] = set()
        self.counted: deque[Past] = deque()  # those in front may be over
        self.past: deque[Past] = deque(maxlen=2 * limit)  # also what is no longer counted

    def ends(self, now: float) -> list[float]:
        """Return when each busy slot comes free, as far as is known."""
        ends = [self.end_of(past) for past in self.counted]
        ends += [self._bound(slot) for slot in self.in_flight]
        return [end for end in ends if end > now]

    def soonest_ends(self, now: float) -> list[float]:
        """Return in how many seconds each busy slot comes free, if that is a period after it left."""
        soonest = [(self.end_of(past), past.left_at) for past in self.counted]
        soonest += [(self._bound(slot), slot.left_at) for slot in self.in_flight]
        return [max(0.0, min(end, left_at + self._period) - now) for end, left_at in soonest if end > now]

    def _bound(self, slot: Slot) -> float:
        """Return when the slot of a request in flight comes free even if no answer comes."""
        if slot.sent_at is None:
            return math.inf
        return self._over(min(slot.counted_by, slot.sent_at + COUNTED_WITHIN), self.surely_in(slot))

    def end_of(self, past: Past) -> float:
        """Return when the slot of a past request comes free."""
        # The way back is part of the head start, so only where an answer tells is it taken off.
        counted_by = min(past.counted_by, past.answered_at_most() - self._server.head_start)
        return self._over(counted_by, past.window)

    def _over(self, counted_by: float, window: Window | None) -> float:
        end = counted_by + self._period + MARGIN
        if window is not None and self._server.counts_windows:
            return min(end, self._server.over_at(window))
        return end

    def surely_in(self, slot: Slot) -> Window | None:
        """Return the window in which a request was counted that has left some time ago."""
        window = self._windows.newest
        if window is None or slot.sent_at is None or slot.sent_at + COUNTED_WITHIN >= window.earliest:
            return None
        return window

    def end(self, slot: Slot, past: Past) -> None:
        """Have a request in flight be one of the past."""
        if slot.ended:
            return
        slot.ended = True
        self.in_flight.discard(slot)
        self.past.append(past)
        self.counted.append(past)

    def forget(self, now: float) -> None:
        """Free the slots that have come free by ``now``."""
        counted = self.counted
        while counted and self.end_of(counted[0]) <= now:
            counted.popleft()

    def note_counted(self, told_by: Past) -> None:
        """Note that all requests have been counted, if an answer speaks of as many as there can be.

        So one whose own answer is late does not take a slot for longer than the others do.
        """
        in_flight = self.in_flight
        if not len(in_flight) < (told_by.used or 0) <= len(in_flight) + len(self.counted) + len(self.past):
            return
        if all(slot.left_at > told_by.left_at for slot in in_flight):
            return  # none is late
        possible = [past for past in {*self.counted, *self.past} if self.end_of(past) > told_by.left_at]
        if told_by.used != len(possible) + len(in_flight):
            return
        told_at = told_by.counted_at_most()
        if any(slot.sent_at is None or slot.sent_at > told_at for slot in in_flight):
            return  # then it speaks of a stranger's instead
        counted_by = told_by.answered_at_most() - self._server.head_start
        for slot in in_flight:
            slot.counted_by = min(slot.counted_by, counted_by)
