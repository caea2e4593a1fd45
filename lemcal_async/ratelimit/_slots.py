"""What keeps one key from sending: a cooldown, requests in flight, and requests still counted. Pure.

The client never observes the moment at which the server counts a request. That moment is bounded by when
the request was sent, by when its response arrived, and by what this and other responses reported; never by
how long requests usually take. A slot is occupied until the server is known to have counted its request,
and for one period after that. Times are seconds on the caller's clock.
"""

import math
from collections.abc import Iterable

import attrs

from lemcal_async._headers import Quota
from lemcal_async.ratelimit._server import PINS_NEEDED, ServerModel, Window

MARGIN = 0.003  # seconds added to a computed moment before acting on it: scheduling, clock steps
PAUSE_CAP = 60.0  # seconds; a longer Retry-After raises an error for the caller instead of sleeping
# A request that was cut off gets no response, so it must be given up eventually. Seconds after sending:
LOST_AFTER = 5.0  # it is assumed to have been counted, so its slot frees up one period later,
LOST_KEPT_FOR = 60.0  # and it stops explaining requests that the server has counted
MAX_LOST = 100  # cut-off requests remembered per key
MAX_BOUNDS = 8  # bounds kept per key; each one costs time whenever slots are counted


class Cooldown:
    """The pause of one key; ``until`` lies in the past if the key is not paused.

    A Retry-After above ``PAUSE_CAP`` pauses the key for ``PAUSE_CAP`` only. Until then, callers are refused.
    After that, a request may check whether the refusal still stands; its response replaces the old state.
    """

    __slots__ = ("refused_until", "until")

    def __init__(self) -> None:
        self.until = -math.inf
        self.refused_until = -math.inf

    def extend(self, now: float, seconds: float) -> None:
        """Apply a 429. A shorter wait never shortens the pause."""
        if self.until <= now:
            self.refused_until = -math.inf
        self.until = max(self.until, now + min(seconds, PAUSE_CAP) + MARGIN)
        if seconds > PAUSE_CAP:
            self.refused_until = max(self.refused_until, now + seconds)

    def left(self, now: float) -> float:
        """Return the remaining seconds of the pause."""
        return max(0.0, self.until - now)

    def refused_for(self, now: float) -> float:
        """Return how long the server refuses the key if that is too long to wait, else 0."""
        return max(0.0, self.refused_until - now) if self.until > now else 0.0


def pause_after_429(quota: Quota, period: float) -> float:
    """Return the seconds to pause a key after a 429: a whole period if the headers do not say."""
    return period if quota.retry_after is None else quota.retry_after


class Slot:
    """One request's share of the budget, from the grant until the request has ended."""

    __slots__ = ("ended", "number", "sent_at", "taken_at")

    def __init__(self, taken_at: float) -> None:
        self.taken_at = taken_at
        self.number = 0  # sequence number of the grant
        self.sent_at: float | None = None
        self.ended = False

    @property
    def left_at(self) -> float:
        """The earliest moment at which the request can have been sent."""
        return self.taken_at if self.sent_at is None else self.sent_at


@attrs.frozen(eq=False, kw_only=True)
class RequestRecord:
    """A request that has ended, and what is known about when the server counted it."""

    number: int
    left_at: float
    counted_by: float  # when the response arrived, or when the request is given up without one
    was_counted: bool  # whether it is known to have been counted
    window: Window | None
    # If the response arrived before its window ended: seconds between counting and that end. Together, the
    # responses of one window pin its end.
    before_end: float | None = None
    used: int | None = None  # requests counted at that moment, including this one, if the response says
    counted_for: float = 0.0  # minimum seconds for which the server keeps counting all of them

    def earliest_counted(self) -> float:
        """Return the earliest time at which it can have been counted, as if requests arrived instantly."""
        if self.window is None or self.before_end is None:
            return self.left_at
        return max(self.left_at, self.window.earliest - self.before_end)

    def latest_counted(self) -> float:
        """Return the latest time at which it can have been counted, as if responses arrived instantly."""
        if self.window is None or self.before_end is None:
            return self.counted_by
        return min(self.counted_by, self.window.latest - self.before_end)


def refutes_sliding(evidence: RequestRecord, others: Iterable[RequestRecord], period: float) -> bool:
    """Whether a response reports fewer requests than a sliding log would have counted."""
    if not evidence.used:
        return False
    since, until = evidence.latest_counted() - period, evidence.earliest_counted()
    counted = 1 + sum(
        other.was_counted and other.earliest_counted() > since and other.latest_counted() < until
        for other in others
    )
    # Require a difference of two, so that a count that excludes its own request proves nothing.
    return counted - evidence.used >= 2


@attrs.define(eq=False)
class UncountedBound:
    """A limit on the number of uncounted requests, without knowing which requests those are.

    Of the requests up to ``number``, at most ``at_most`` were counted after ``evidence``.
    """

    evidence: RequestRecord
    number: int
    at_most: int


class OccupiedSlots:
    """The slots whose requests the server may still be counting, or has not counted yet."""

    __slots__ = (
        "_bounds",
        "_grant_count",
        "_last_dropped_end",
        "_period",
        "_server",
        "counted",
        "in_flight",
        "lost",
        "records",
    )

    def __init__(self, server: ServerModel, period: float) -> None:
        self._server = server
        self._period = period
        self._grant_count = 0
        self._bounds: list[UncountedBound] = []
        self._last_dropped_end = -math.inf  # the latest end of any dropped record
        self.in_flight: dict[Slot, None] = {}  # in the order of their grants
        # Lists, because an empty deque takes 700 bytes more and there may be many keys.
        self.counted: list[RequestRecord] = []  # still occupying slots (the first does, later ones may not)
        self.records: list[RequestRecord] = []  # all requests of the last two periods
        self.lost: list[RequestRecord] = []  # cut off, and not seen in a count since

    def ends(self, now: float) -> list[float]:
        """Return when each occupied slot frees up, earliest first; inf if not known yet."""
        in_flight = [slot.number for slot in list(self.in_flight)]
        return self._ends(list(self.counted), in_flight, self._bounds, now)

    def last_end(self, now: float) -> float:
        """Return when all slots are free, assuming that all pending responses arrive now."""
        ends = [self.end_of(record) for record in list(self.counted)]
        return max([now, *ends, now + self._period + MARGIN if self.in_flight else now])

    def optimistic_waits(self, now: float) -> list[float]:
        """Return the seconds until each occupied slot frees up, if its request is counted immediately."""
        soonest = [record.left_at for record in self.counted if self.end_of(record) > now]
        soonest += [slot.left_at for slot in self.in_flight]
        soonest.sort()
        # Bounds do not say which slots are free. In the best case, they are the ones that would free up last.
        return [
            max(0.0, min(end, left_at + self._period) - now)
            for end, left_at in zip(self.ends(now), soonest, strict=False)
        ]

    def end_of(self, record: RequestRecord) -> float:
        """Return when the slot of a request that has ended frees up."""
        # The credit includes the return latency, so it only applies if there was a response.
        credit = self._server.round_trip_credit if record.was_counted else 0.0
        end = record.latest_counted() - credit + self._period + MARGIN
        window = record.window
        if window is not None and self._server.is_fixed:
            over_at = self._server.over_at(window)
            return over_at if window.pins >= PINS_NEEDED else min(end, over_at)
        return end

    def take(self, now: float) -> Slot:
        """Occupy a slot."""
        slot = Slot(now)
        self.adopt(slot)
        return slot

    def adopt(self, slot: Slot) -> None:
        """Add a request in flight."""
        self._grant_count += 1
        slot.number = self._grant_count
        self.in_flight[slot] = None

    def end(self, slot: Slot, record: RequestRecord, now: float) -> None:
        """Move a request from in flight to ended."""
        slot.ended = True
        self.add(record, now)
        self.in_flight.pop(slot, None)

    def lose(self, slot: Slot, record: RequestRecord, now: float) -> None:
        """Move a request from in flight to lost: no response will arrive."""
        self.end(slot, record, now)
        self.lost = [*self.lost[-MAX_LOST:], record]

    def add(self, record: RequestRecord, now: float) -> None:
        """Add a request that has ended."""
        while self.records and (end := self.end_of(self.records[0])) <= now - self._period:
            self._last_dropped_end = max(self._last_dropped_end, end)
            del self.records[0]
        self.records.append(record)
        self.counted.append(record)

    def release(self, slot: Slot) -> None:
        """Release the slot of a request that was never sent."""
        slot.ended = True
        if slot in self.in_flight:
            del self.in_flight[slot]
            for bound in self._bounds:  # it was one of the uncounted requests
                bound.at_most -= bound.at_most > 0 and slot.number <= bound.number

    def prune(self, now: float) -> None:
        """Drop the slots that are free by ``now``."""
        counted = self.counted
        while counted and self.end_of(counted[0]) <= now:
            del counted[0]
        while self.lost and self.lost[0].left_at <= now - LOST_KEPT_FOR:
            del self.lost[0]
        if self._bounds:
            numbers = [record.number for record in counted] + [slot.number for slot in self.in_flight]
            self._bounds = [
                bound
                for bound in self._bounds
                if sum(number <= bound.number for number in numbers) > bound.at_most
            ]

    def learn(self, evidence: RequestRecord) -> None:
        """Learn from a response how many requests without a response of their own have been counted.

        Consider all requests that can have been counted since the oldest one that the server still counts. It
        has counted ``used`` of them up to this response's own request, so it counts the rest later. The
        response does not say which ones, and that does not matter.
        """
        oldest = next(iter(self.in_flight), None)
        if not self.lost and (oldest is None or oldest.left_at > evidence.left_at):
            return  # no response is late
        if not evidence.used:
            return
        ends = self._ends_before(evidence, self._grant_count, self._bounds)
        later = len(ends) - evidence.used
        if not later:
            self.lost.clear()
        counted_at = evidence.latest_counted()
        if later < sum(slot.sent_at is None or slot.sent_at > counted_at for slot in self.in_flight):
            return  # the count includes foreign requests: these had not been sent yet
        end = self.end_of(evidence)
        if later < sum(other > end for other in ends):
            # One bound per burst is enough: of several at about the same moment, keep the tightest.
            others = [
                bound
                for bound in self._bounds
                if bound.at_most < later or self.end_of(bound.evidence) < end - self._period / 20
            ]
            self._bounds = [*others[1 - MAX_BOUNDS :], UncountedBound(evidence, self._grant_count, later)]

    def refine(self) -> None:
        """Tighten the bounds after a late response has revealed when its own request was counted."""
        for number, bound in enumerate(self._bounds):
            evidence = bound.evidence
            if evidence.left_at + evidence.counted_for >= self._last_dropped_end:
                ends = self._ends_before(evidence, bound.number, self._bounds[:number])
                bound.at_most = max(0, min(bound.at_most, len(ends) - (evidence.used or 0)))

    def attribute_lost(self, count: int, window: Window, counted_by: float, now: float) -> int:
        """Attribute up to ``count`` given-up requests to ``window``; return their number.

        Requests that were cut off but not given up yet are still counted as in flight.
        """
        since = now - LOST_KEPT_FOR
        found = [record for record in self.lost if self.end_of(record) <= now and record.left_at > since]
        for record in found[:count]:
            self.lost.remove(record)
            self.add(attrs.evolve(record, counted_by=counted_by, was_counted=True, window=window), now)
            window.own += 1
        return len(found[:count])

    def clear_bounds(self) -> None:
        """Drop all bounds: the responses may have counted foreign requests."""
        self._bounds = []

    def _ends_before(self, evidence: RequestRecord, number: int, bounds: list[UncountedBound]) -> list[float]:
        """Return the ends of the slots up to ``number`` that a response may or may not have counted."""
        window = evidence.window if self._server.is_fixed else None
        possible = [r for r in self.records if r.number <= number and not _in_earlier_window(r, window)]
        in_flight = [slot.number for slot in self.in_flight if slot.number <= number]
        # No later than the slot of the evidence itself ends: it may have traveled faster than any before.
        since = min(evidence.left_at + evidence.counted_for, self.end_of(evidence) - MARGIN)
        return self._ends(possible, in_flight, bounds, since)

    def _ends(
        self,
        records: Iterable[RequestRecord],
        in_flight: Iterable[int],
        bounds: Iterable[UncountedBound],
        now: float,
    ) -> list[float]:
        found = [(self.end_of(record), record.number) for record in records]
        found += [(math.inf, number) for number in in_flight]
        found = sorted((each for each in found if each[0] > now), reverse=True)
        ends = [end for end, _ in found]
        for bound in bounds:
            # After that, at most ``at_most`` requests up to ``number`` occupy slots, and all later requests.
            since = self.end_of(bound.evidence)
            most = [math.inf] * bound.at_most
            most += [end for end, number in found if number > bound.number]
            most += [-math.inf] * (len(ends) - len(most))
            ends = [min(end, max(since, other)) for end, other in zip(ends, most, strict=False)]
        return [end for end in reversed(ends) if end > now]


def _in_earlier_window(record: RequestRecord, window: Window | None) -> bool:
    return window is not None and record.window is not None and record.window.number < window.number
