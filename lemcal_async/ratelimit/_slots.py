"""The occupied slots of one key: requests that are in flight, and those that the server still counts. Pure.

When the server counted a request is never seen. It is bounded by when the request left, by when its
answer came and by what that and other answers said. Times are seconds on the caller's clock.
"""

import math
from collections import deque
from collections.abc import Iterable

import attrs

from lemcal_async.ratelimit._cooldown import MARGIN
from lemcal_async.ratelimit._server import ServerModel, Window

COUNTED_WITHIN = 0.5  # seconds after a request left in which the server must have counted it


class Slot:
    """One request's share of the budget, from the grant until the request has ended."""

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


@attrs.frozen(eq=False)
class RequestRecord:
    """One request that has ended, and what is known of when the server counted it."""

    counted_by: float
    heard_at: float  # inf: no answer came
    left_at: float
    surely: bool  # whether it was counted at all
    window: Window | None
    # What its answer said, if the window was not over when that came: then it was counted this long
    # before the window's end, which all the answers of the window pin together.
    before_end: float | None = None
    used: int | None = None  # how many requests the server counted then, this one included, if it told

    def counted_at_least(self) -> float:
        """Return the earliest time at which it can have been counted, as if its way there took no time."""
        if self.window is None or self.before_end is None:
            return self.left_at
        return max(self.left_at, self.window.earliest - self.before_end)

    def counted_at_most(self) -> float:
        """Return the latest time at which it can have been counted, as if its way back took no time."""
        return min(self.counted_by, self.answered_at_most())

    def answered_at_most(self) -> float:
        """Return the same as far as its own answer tells, which is off by the way back."""
        if self.window is None or self.before_end is None:
            return self.heard_at
        return min(self.heard_at, self.window.latest - self.before_end)


def refutes_sliding(evidence: RequestRecord, others: Iterable[RequestRecord], period: float) -> bool:
    """Whether an answer speaks of fewer requests than a sliding log would have counted."""
    if not evidence.used:
        return False
    since, until = evidence.counted_at_most() - period, evidence.counted_at_least()
    counted = 1 + sum(
        other.surely and other.counted_at_least() > since and other.counted_at_most() < until
        for other in others
    )
    # By two, so that a count which leaves this request out proves nothing.
    return counted - evidence.used >= 2


class OccupiedSlots:
    """The slots that the server may still be counting."""

    __slots__ = ("_period", "_server", "counted", "in_flight", "records")

    def __init__(self, server: ServerModel, period: float, limit: int) -> None:
        self._server = server
        self._period = period
        self.in_flight: set[Slot] = set()
        self.counted: deque[RequestRecord] = deque()  # those in front may be over
        self.records: deque[RequestRecord] = deque(maxlen=2 * limit)  # also what is no longer counted

    def ends(self, now: float) -> list[float]:
        """Return when each occupied slot comes free, as far as is known."""
        ends = [self.end_of(record) for record in list(self.counted)]
        ends += [self._bound(slot) for slot in list(self.in_flight)]
        return [end for end in ends if end > now]

    def soonest_ends(self, now: float) -> list[float]:
        """Return in how many seconds each occupied slot comes free, if that is a period after it left."""
        soonest = [(self.end_of(record), record.left_at) for record in self.counted]
        soonest += [(self._bound(slot), slot.left_at) for slot in self.in_flight]
        return [max(0.0, min(end, left_at + self._period) - now) for end, left_at in soonest if end > now]

    def _bound(self, slot: Slot) -> float:
        """Return when the slot of a request in flight comes free even if no answer comes."""
        if slot.sent_at is None:
            return math.inf
        return min(slot.counted_by, slot.sent_at + COUNTED_WITHIN) + self._period + MARGIN

    def end_of(self, record: RequestRecord) -> float:
        """Return when the slot of a request that has ended comes free."""
        # The way back is part of the credit, so that is only given where the answer tells.
        counted_by = min(record.counted_by, record.answered_at_most() - self._server.round_trip_credit)
        end = counted_by + self._period + MARGIN
        if record.window is not None and self._server.is_fixed:
            return min(end, self._server.over_at(record.window))
        return end

    def end(self, slot: Slot, record: RequestRecord) -> None:
        """Turn a request in flight into one that has ended."""
        if slot.ended:
            return
        slot.ended = True
        self.records.append(record)
        self.counted.append(record)
        self.in_flight.discard(slot)

    def forget(self, now: float) -> None:
        """Drop the slots that have come free by ``now``."""
        counted = self.counted
        while counted and self.end_of(counted[0]) <= now:
            counted.popleft()

    def note_counted(self, evidence: RequestRecord) -> None:
        """Note that all requests have been counted, if an answer speaks of as many as there can be.

        So one whose own answer is late does not occupy a slot for longer than the others do.
        """
        in_flight = self.in_flight
        if (
            not len(in_flight)
            < (evidence.used or 0)
            <= len(in_flight) + len(self.counted) + len(self.records)
        ):
            return
        if all(slot.left_at > evidence.left_at for slot in in_flight):
            return  # none is late
        possible = [r for r in {*self.counted, *self.records} if self.end_of(r) > evidence.left_at]
        if evidence.used != len(possible) + len(in_flight):
            return
        told_at = evidence.counted_at_most()
        if any(slot.sent_at is None or slot.sent_at > told_at for slot in in_flight):
            return  # then it speaks of a foreign request instead
        counted_by = evidence.answered_at_most() - self._server.round_trip_credit
        for slot in in_flight:
            slot.counted_by = min(slot.counted_by, counted_by)
