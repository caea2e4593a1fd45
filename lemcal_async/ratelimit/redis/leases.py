"""The slots of one key that this process has from Redis: until when it needs each. Pure.

Redis counts a slot as used until the end that it was told last, so a process that dies loses no more
than one window. What must be told, and when at the latest, is worked out here. Times are seconds on
this process's own clock.
"""

import math

from lemcal_async.ratelimit.past import COUNTED_WITHIN, MARGIN
from lemcal_async.ratelimit.redis.script import Reports

ENOUGH_TRIPS = 20  # round trips of all processes, before the shortest of them says something
NEAR = 0.05  # seconds; Redis need not hear of smaller changes of an end that is not final,
SAME = 0.001  # and of smaller ones of one that is
SOON = 0.02  # seconds until a slot that was given back is reported, along with others


class Lease:
    """One request's slot, from its grant until the server has forgotten it."""

    __slots__ = ("early", "end", "known_end", "name", "sent_at")

    def __init__(self, name: str, known_end: float | None) -> None:
        self.name = name
        self.known_end = known_end  # what Redis goes by, None if it does not know of the slot
        self.sent_at: float | None = None
        self.end: float | None = None  # when it comes free, None while that is open
        self.early = False  # whether it does so sooner by the shortest trip


class Leases:
    """The slots of one key in this process; ``process`` is the name it goes by in Redis."""

    def __init__(self, process: str, period: float) -> None:
        self._process = process
        self._lead = period / 2  # so long before it matters a change is reported
        self._turnover = period + MARGIN
        self.lifetime = COUNTED_WITHIN + self._turnover  # of a lease, until it is renewed
        self._leases: dict[str, Lease] = {}
        self._dropped: dict[str, float] = {}  # given back; until when Redis would keep them
        self._tell_dropped = math.inf
        self.trips = 0  # to the server and back, since Redis was last told
        self.trip = math.inf  # the shortest of them
        self._shortest = 0.0  # of those of all processes, once that says something
        self.in_flight = 0

    def take(self, number: int, asked_at: float | None) -> Lease:
        """Note a slot: granted by Redis when it was asked, or taken without it (None)."""
        name = f"{self._process}:{number}"
        lease = Lease(name, None if asked_at is None else asked_at + self.lifetime)
        self._leases[name] = lease
        self.in_flight += 1
        return lease

    def sent(self, lease: Lease, now: float) -> None:
        """Note that the request left the machine."""
        if lease.end is None and lease.sent_at is None:
            lease.sent_at = now

    def answered(self, lease: Lease, now: float) -> None:
        """Note the answer: the server counted the request before it, and after it had left."""
        counted_by = now
        if lease.sent_at is not None:
            trip = now - lease.sent_at
            self.trips += 1
            self.trip = min(self.trip, trip)
            self._shortest = min(self._shortest, trip)
            lease.early = trip < COUNTED_WITHIN
            counted_by = min(counted_by, lease.sent_at + COUNTED_WITHIN)
        self._end(lease, counted_by + self._turnover)

    def unsent(self, lease: Lease, now: float) -> None:
        """Give the slot back: nothing reached the server."""
        self._end(lease, now)
        del self._leases[lease.name]
        if lease.known_end is not None:
            self._drop(lease.name, lease.known_end, now)

    def unknown(self, lease: Lease, now: float) -> None:
        """End the slot of a request that the server may have counted, and will not answer."""
        sent_at = now if lease.sent_at is None else lease.sent_at
        self._end(lease, sent_at + self.lifetime)

    def perhaps(self, first: int, count: int, now: float) -> None:
        """Give back slots that Redis may have granted: its answer did not arrive."""
        for number in range(first, first + count):
            self._drop(f"{self._process}:{number}", now + self.lifetime, now)

    def lost(self) -> None:
        """Note that Redis has forgotten everything."""
        for lease in self._leases.values():
            lease.known_end = None
        self._dropped.clear()

    def forget(self, now: float) -> None:
        """Drop what is over for the server and in Redis alike."""
        for lease in list(self._leases.values()):
            if lease.end is not None and max(lease.end, lease.known_end or -math.inf) <= now:
                del self._leases[lease.name]
        for name in [name for name, known_end in self._dropped.items() if known_end <= now]:
            del self._dropped[name]
        if not self._dropped:
            self._tell_dropped = math.inf

    def __len__(self) -> int:
        return len(self._leases) + len(self._dropped)

    def due(self, now: float) -> float:
        """Return when Redis must have heard of a change at the latest; inf if there is none."""
        dues = [self._due(lease, now) for lease in list(self._leases.values())]
        return min([*dues, self._tell_dropped])

    def _due(self, lease: Lease, now: float) -> float:
        known, needed = lease.known_end, self._needed(lease)
        if known is None:
            return now if needed > now else math.inf
        if lease.end is None:
            # It ends with an answer that may be long in coming, so it has to be kept alive until then.
            return known - self._lead if needed > known + COUNTED_WITHIN / 2 else math.inf
        return math.inf if abs(needed - known) < SAME else min(needed, known) - self._lead

    def _needed(self, lease: Lease) -> float:
        if lease.end is not None:
            return lease.end - (self._shortest if lease.early else 0.0)
        return math.inf if lease.sent_at is None else lease.sent_at + self.lifetime

    def reports(self, now: float) -> Reports:
        """Return all that Redis does not know yet."""
        reports = Reports(dropped=list(self._dropped))
        for lease in list(self._leases.values()):
            known = lease.known_end or -math.inf
            needed = min(self._needed(lease), now + self.lifetime)
            if lease.end is None:
                if needed > max(now, known + NEAR):
                    reports.open[lease.name] = needed - now
            elif abs(needed - known) >= SAME and max(needed, known) > now:
                reports.ended[lease.name] = needed - now
        return reports

    def learn(self, trips: int, shortest: float) -> None:
        """Take in what all processes have found out together, now that Redis has heard our part.

        The way there and back takes at least ``shortest``, so an answered slot is free that much
        sooner: the server counted the request before its answer set out, and counts the next one only
        when it has arrived.
        """
        self.trips, self.trip = 0, math.inf
        self._shortest = shortest if trips >= ENOUGH_TRIPS else 0.0

    def told(self, reports: Reports, asked_at: float) -> None:
        """Note that Redis has heard ``reports``."""
        for name, left in (reports.open | reports.ended).items():
            if (lease := self._leases.get(name)) is not None:
                lease.known_end = asked_at + left
                if lease.end is not None:
                    lease.end, lease.early = lease.known_end, False
        for name in reports.dropped:
            self._dropped.pop(name, None)

    def _end(self, lease: Lease, end: float) -> None:
        lease.end = end
        self.in_flight -= 1

    def _drop(self, name: str, known_end: float, now: float) -> None:
        self._dropped[name] = known_end
        self._tell_dropped = min(self._tell_dropped, now + SOON)
