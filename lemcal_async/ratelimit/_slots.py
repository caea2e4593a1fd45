"""What keeps one key from sending: a pause, requests in flight, and those that still count. Pure.

The client never sees the moment at which the server counts a request. It is bounded by when the request
left, by when its answer came, and by what this and other answers said; never by how long requests usually
take. A slot is occupied until the server is known to have counted its request, and a period longer. Times
are seconds on the caller's clock.
"""

import math
from collections.abc import Iterable

import attrs

from lemcal_async._headers import Quota
from lemcal_async.ratelimit._server import PINNED, ServerModel, Window

MARGIN = 0.003  # seconds between a computed moment and what happens then: scheduling, clock steps
PAUSE_CAP = 60.0  # seconds; a longer Retry-After is an error for the caller, not a sleep
# A request that was cut off gets no answer, so it must be given up at some point. Seconds after it left:
LOST_AFTER = 5.0  # it no longer occupies a slot, even if no answer to another request shows it was counted,
LOOKED_FOR = 60.0  # and it no longer explains requests that the server has counted
MOST_LOST = 100  # requests that are remembered as cut off
BOUNDS = 8  # bounds that are kept per key; each costs time whenever slots are counted


class Cooldown:
    """The pause of one key; ``until`` lies in the past while there is none.

    A Retry-After above ``PAUSE_CAP`` pauses the key for that long only. After that, a request may find
    out whether the refusal still stands, and its answer replaces what was known. Until then, callers
    are refused.
    """

    __slots__ = ("refused_until", "until")

    def __init__(self) -> None:
        self.until = -math.inf
        self.refused_until = -math.inf

    def extend(self, now: float, seconds: float) -> None:
        """Take in a 429. One with a shorter wait never shortens the pause."""
        if self.until <= now:
            self.refused_until = -math.inf
        self.until = max(self.until, now + min(seconds, PAUSE_CAP) + MARGIN)
        if seconds > PAUSE_CAP:
            self.refused_until = max(self.refused_until, now + seconds)

    def left(self, now: float) -> float:
        """Return how many seconds of the pause are left."""
        return max(0.0, self.until - now)

    def refused_for(self, now: float) -> float:
        """Return how long the server refuses the key if that is too long to wait for, else 0."""
        return max(0.0, self.refused_until - now) if self.until > now else 0.0


def pause_after_429(quota: Quota, period: float) -> float:
    """Return the seconds to pause a key after a 429: a whole period if no header tells."""
    return period if quota.retry_after is None else quota.retry_after


class Slot:
    """One request's share of the budget, from the grant until the request has ended."""

    __slots__ = ("ended", "number", "sent_at", "taken_at")

    def __init__(self, taken_at: float) -> None:
        self.taken_at = taken_at
        self.number = 0  # in the order of the grants
        self.sent_at: float | None = None
        self.ended = False

    @property
    def left_at(self) -> float:
        """Return the earliest moment at which it can have left."""
        return self.taken_at if self.sent_at is None else self.sent_at


@attrs.frozen(eq=False, kw_only=True)
class RequestRecord:
    """One request that has ended, and what is known about when the server counted it."""

    number: int
    left_at: float
    counted_by: float  # when its answer came, or when it is given up if none will come
    surely: bool  # whether it was counted at all
    window: Window | None
    # If the answer came before its window ended: how long before that end the request was counted. All the
    # answers of a window together pin its end.
    before_end: float | None = None
    used: int | None = None  # how many requests counted at that moment, this one included, if the answer says
    rest: float = 0.0  # for how many seconds at least the server goes on counting all of them

    def counted_at_least(self) -> float:
        """Return the earliest time at which it can have been counted, as if its way there took no time."""
        if self.window is None or self.before_end is None:
            return self.left_at
        return max(self.left_at, self.window.earliest - self.before_end)

    def counted_at_most(self) -> float:
        """Return the latest time at which it can have been counted, as if its way back took no time."""
        if self.window is None or self.before_end is None:
            return self.counted_by
        return min(self.counted_by, self.window.latest - self.before_end)


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


@attrs.define(eq=False)
class UncountedBound:
    """What an answer says about all requests together, without saying which is which.

    Of the requests up to ``number``, at most ``at_most`` are counted after ``evidence``.
    """

    evidence: RequestRecord
    number: int
    at_most: int


class OccupiedSlots:
    """The slots that the server may still be counting, or has not counted yet."""

    __slots__ = (
        "_bounds",
        "_dropped",
        "_granted",
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
        self._granted = 0
        self._bounds: list[UncountedBound] = []
        self._dropped = -math.inf  # the latest end of a record that has been dropped
        self.in_flight: dict[Slot, None] = {}  # in the order of the grants
        # Lists, because an empty deque takes 700 bytes more, and there may be many keys.
        self.counted: list[RequestRecord] = []  # still occupying slots, though some behind the first may not
        self.records: list[RequestRecord] = []  # everything of the last two periods
        self.lost: list[RequestRecord] = []  # cut off, and not found since

    def ends(self, now: float) -> list[float]:
        """Return when each occupied slot comes free, the first one first; inf if that is not known yet."""
        in_flight = [slot.number for slot in list(self.in_flight)]
        return self._ends(list(self.counted), in_flight, self._bounds, now)

    def last_end(self, now: float) -> float:
        """Return when all slots are free, if the answers that are still to come came now."""
        ends = [self.end_of(record) for record in list(self.counted)]
        return max([now, *ends, now + self._period + MARGIN if self.in_flight else now])

    def soonest_ends(self, now: float) -> list[float]:
        """Return in how many seconds each occupied slot comes free, if its request is counted at once."""
        soonest = [record.left_at for record in self.counted if self.end_of(record) > now]
        soonest += [slot.left_at for slot in self.in_flight]
        soonest.sort()
        # Bounds do not say which slots are free. At best they are the ones that would be last.
        return [
            max(0.0, min(end, left_at + self._period) - now)
            for end, left_at in zip(self.ends(now), soonest, strict=False)
        ]

    def end_of(self, record: RequestRecord) -> float:
        """Return when the slot of a request that has ended comes free."""
        # The credit contains the way back, so there is none without an answer.
        credit = self._server.round_trip_credit if record.surely else 0.0
        end = record.counted_at_most() - credit + self._period + MARGIN
        window = record.window
        if window is not None and self._server.is_fixed:
            over_at = self._server.over_at(window)
            return over_at if window.pins >= PINNED else min(end, over_at)
        return end

    def take(self, now: float) -> Slot:
        """Occupy a slot."""
        slot = Slot(now)
        self.adopt(slot)
        return slot

    def adopt(self, slot: Slot) -> None:
        """Note a request in flight that was granted elsewhere."""
        self._granted += 1
        slot.number = self._granted
        self.in_flight[slot] = None

    def end(self, slot: Slot, record: RequestRecord, now: float) -> None:
        """Turn a request in flight into one that has ended."""
        slot.ended = True
        self.add(record, now)
        self.in_flight.pop(slot, None)

    def lose(self, slot: Slot, record: RequestRecord, now: float) -> None:
        """Turn a request in flight into one that will not be answered."""
        self.end(slot, record, now)
        self.lost = [*self.lost[-MOST_LOST:], record]

    def add(self, record: RequestRecord, now: float) -> None:
        """Add a request that has ended."""
        while self.records and (end := self.end_of(self.records[0])) <= now - self._period:
            self._dropped = max(self._dropped, end)
            del self.records[0]
        self.records.append(record)
        self.counted.append(record)

    def give_back(self, slot: Slot) -> None:
        """Free the slot of a request that never left."""
        slot.ended = True
        if slot in self.in_flight:
            del self.in_flight[slot]
            for bound in self._bounds:  # it was among those that had not been counted
                bound.at_most -= bound.at_most > 0 and slot.number <= bound.number

    def forget(self, now: float) -> None:
        """Drop the slots that have come free by ``now``."""
        counted = self.counted
        while counted and self.end_of(counted[0]) <= now:
            del counted[0]
        while self.lost and self.lost[0].left_at <= now - LOOKED_FOR:
            del self.lost[0]
        if self._bounds:
            numbers = [record.number for record in counted] + [slot.number for slot in self.in_flight]
            self._bounds = [
                bound
                for bound in self._bounds
                if sum(number <= bound.number for number in numbers) > bound.at_most
            ]

    def learn(self, evidence: RequestRecord) -> None:
        """Learn from an answer how many requests without an answer of their own have been counted.

        Take all requests that can have been counted since the oldest one that the server still counts.
        It has counted ``used`` of them up to this answer's own, so it counts the rest after that. The
        answer does not say which ones, and that does not matter.
        """
        oldest = next(iter(self.in_flight), None)
        if not self.lost and (oldest is None or oldest.left_at > evidence.left_at):
            return  # none is late
        if not evidence.used:
            return
        ends = self._ends_before(evidence, self._granted, self._bounds)
        later = len(ends) - evidence.used
        if not later:
            self.lost.clear()
        counted_at = evidence.counted_at_most()
        if later < sum(slot.sent_at is None or slot.sent_at > counted_at for slot in self.in_flight):
            return  # it counts foreign requests: these had not left yet
        end = self.end_of(evidence)
        if later < sum(other > end for other in ends):
            # One per burst is enough: of those about the same moment, the one that says most.
            others = [
                bound
                for bound in self._bounds
                if bound.at_most < later or self.end_of(bound.evidence) < end - self._period / 20
            ]
            self._bounds = [*others[1 - BOUNDS :], UncountedBound(evidence, self._granted, later)]

    def refine(self) -> None:
        """Tighten the bounds, after a late answer has told when its own request was counted."""
        for number, bound in enumerate(self._bounds):
            evidence = bound.evidence
            if evidence.left_at + evidence.rest >= self._dropped:
                ends = self._ends_before(evidence, bound.number, self._bounds[:number])
                bound.at_most = max(0, min(bound.at_most, len(ends) - (evidence.used or 0)))

    def find(self, count: int, window: Window, counted_by: float, now: float) -> int:
        """Put up to ``count`` requests that had been given up into ``window``; return how many there were.

        Those that were cut off but not given up yet are among those in flight anyway.
        """
        since = now - LOOKED_FOR
        found = [record for record in self.lost if self.end_of(record) <= now and record.left_at > since]
        for record in found[:count]:
            self.lost.remove(record)
            self.add(attrs.evolve(record, counted_by=counted_by, surely=True, window=window), now)
            window.own += 1
        return len(found[:count])

    def unlearn(self) -> None:
        """Drop all bounds: the answers may have counted somebody else's requests."""
        self._bounds = []

    def _ends_before(self, evidence: RequestRecord, number: int, bounds: list[UncountedBound]) -> list[float]:
        """Return the ends of the slots up to ``number`` that an answer may have counted, or not yet."""
        window = evidence.window if self._server.is_fixed else None
        possible = [r for r in self.records if r.number <= number and not _in_earlier_window(r, window)]
        in_flight = [slot.number for slot in self.in_flight if slot.number <= number]
        # No later than the evidence itself is forgotten: on its way it may have been quicker than any before.
        since = min(evidence.left_at + evidence.rest, self.end_of(evidence) - MARGIN)
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
            # From then on, at most so many of the requests up to its number occupy slots, and all later ones.
            since = self.end_of(bound.evidence)
            most = [math.inf] * bound.at_most
            most += [end for end, number in found if number > bound.number]
            most += [-math.inf] * (len(ends) - len(most))
            ends = [min(end, max(since, other)) for end, other in zip(ends, most, strict=False)]
        return [end for end in reversed(ends) if end > now]


def _in_earlier_window(record: RequestRecord, window: Window | None) -> bool:
    return window is not None and record.window is not None and record.window.number < window.number
