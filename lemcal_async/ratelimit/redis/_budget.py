"""What this process knows of one key's budget in Redis: what to ask, and what follows from the answer.

Pure: the clock, and what waits here, are for ``account`` and ``serving``; the slots are ``Leases``. Times
are seconds on this process's own clock.
"""

import math

from lemcal_async._headers import Quota
from lemcal_async.ratelimit._base import RateLimit
from lemcal_async.ratelimit._cooldown import MARGIN, Cooldown
from lemcal_async.ratelimit._slots import COUNTED_WITHIN
from lemcal_async.ratelimit.redis._script import Reports, ScriptReply, ScriptRequest, Used

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


SETTLING = 0.5  # seconds after an outage in which all processes find out that Redis is back

UNKNOWN = ScriptReply(
    epoch="",
    granted=0,
    wait=0.0,
    held=0.0,
    paused=0.0,
    refused=0.0,
    limit=0,
    frees=[],
    others=[],
    processes=0,
    expected=0,
    foreign=0,
    trips=0,
    trip=0.0,
)


class Budget:
    """One key's budget, as one process sees it."""

    def __init__(self, process: str, limit: int, period: float) -> None:
        self.configured = limit
        self.period = period
        self.process = process
        self.leases = Leases(process, period)
        self.heard = UNKNOWN
        self.heard_at = -math.inf
        self._pause = Cooldown()
        self.without = False  # whether Redis was away since it was last heard
        self._next = 0  # number of the next slot
        self._header_limit = 0
        # What Redis is to be told at once.
        self._pause_untold = False
        self._limit_untold = False
        self._used: Used | None = None
        self._used_at = 0.0

    @property
    def limit(self) -> int:
        """The limit in force: a header may lower it, never raise it."""
        return min(
            self.configured, self._header_limit or self.configured, self.heard.limit or self.configured
        )

    @property
    def known(self) -> bool:
        """Whether Redis has been heard."""
        return self.heard is not UNKNOWN

    def urgent(self) -> bool:
        """Whether there is something that the other processes must hear at once."""
        return self._pause_untold or self._limit_untold or self._used is not None

    def take_alone(self) -> Lease:
        """Take a slot without Redis."""
        self._next += 1
        return self.leases.take(self._next - 1, None)

    def ask(self, now: float, waiting: int, refused: int) -> ScriptRequest:
        """Return what to ask Redis now, all reports included."""
        fresh = now - self.heard_at <= self.leases.lifetime
        used = Used(0, 0.0)
        if self._used is not None and (left := self._used.window - (now - self._used_at)) > 0:
            used = Used(self._used.requests, left)
        ask = ScriptRequest(
            process=self.process,
            limit=self.configured,
            period=self.period,
            hold=self.leases.lifetime + SETTLING,
            waiting=waiting,
            refused=refused,
            first=self._next,
            reports=self.leases.reports(now),
            epoch=self.heard.epoch if fresh else "",
            back=self.without and now - self.heard_at > self.period + MARGIN,
            pause=self._pause.left(now) if self._pause_untold else 0.0,
            refuse=max(0.0, self._pause.refused_until - now) if self._pause_untold else 0.0,
            header_limit=self._header_limit if self._limit_untold else 0,
            used=used,
            trips=self.leases.trips,
            trip=self.leases.trip if self.leases.trips else 0.0,
        )
        self._next += waiting
        self._pause_untold = self._limit_untold = False
        self._used = None
        return ask

    def hear(self, ask: ScriptRequest, answer: ScriptReply, asked_at: float, now: float) -> None:
        """Take in the answer to ``ask``."""
        if answer.epoch != self.heard.epoch and self.known:
            self.leases.lost()  # told once more: what came before belongs to other data
        else:
            self.leases.told(ask.reports, asked_at)
        self.leases.learn(answer.trips, answer.trip)
        self.heard, self.heard_at, self.without = answer, now, False
        if not self._limit_untold:
            self._header_limit = 0  # what all have heard last is what counts
        if not self._pause_untold:
            self._pause.until = now + answer.paused if answer.paused else -math.inf
            self._pause.refused_until = now + answer.refused if answer.refused else -math.inf

    def unheard(self, ask: ScriptRequest, now: float) -> None:
        """Note that no answer came to ``ask``, and that it may have been carried out all the same."""
        self.leases.perhaps(ask.first, min(ask.waiting, self.configured), now)
        self._pause_untold |= ask.pause > 0
        self._limit_untold |= ask.header_limit > 0
        if ask.used.requests and self._used is None:
            self._used, self._used_at = ask.used, now

    def read(self, quota: Quota, now: float) -> None:
        """Take in what the headers of an answer say of the limit and of what has been used of it."""
        if quota.limit and min(quota.limit, self.configured) != self.limit:
            self._header_limit = quota.limit
            self._limit_untold = True
        if quota.remaining is None or quota.retry_after is None:
            return
        used = min(quota.limit or self.configured, self.configured) - quota.remaining
        if used > self.heard.expected and used > (self._used.requests if self._used else 0):
            self._used = Used(used, min(quota.retry_after, self.period) + MARGIN)
            self._used_at = now

    def pause(self, now: float, seconds: float) -> None:
        """Note a 429."""
        self._pause.extend(now, seconds)
        self._pause_untold = True

    @property
    def paused_until(self) -> float:
        """The moment until which nobody sends."""
        return self._pause.until

    def refused_for(self, now: float) -> float:
        """Return the seconds of an order to wait that is too long to be slept through, else 0."""
        return self._pause.refused_for(now)

    def estimate(self, now: float, ahead: int) -> float:
        """Return the seconds that a request with ``ahead`` others of this process before it waits at least.

        Processes are served in turn, so of each other one as many go before it, if so many want to.
        """
        ahead += sum(min(want, ahead) for want in self.heard.others)
        passed = now - self.heard_at
        turnover = self.period + MARGIN
        frees = sorted(max(0.0, left - passed) for left in self.heard.frees)
        slots = [*[0.0] * (self.limit - len(frees)), *frees[-self.limit :]]
        rounds, place = divmod(ahead, self.limit)
        wait = slots[place] + rounds * turnover
        if self.paused_until > now:
            wait = max(wait, self.paused_until - now + rounds * turnover)
        return wait

    def snapshot(self, now: float, queued: int) -> RateLimit:
        """Return what this process has heard."""
        passed = now - self.heard_at
        frees = [left - passed for left in self.heard.frees if left > passed]
        paused_for = self._pause.left(now)
        return RateLimit(
            limit=self.limit,
            remaining=0 if paused_for else max(0, self.limit - len(frees)),
            resets_in=max([*frees, paused_for]),
            queued=queued,
            paused_for=paused_for,
        )

    def idle(self, now: float) -> bool:
        """Whether there is nothing to remember."""
        self.leases.forget(now)
        return not len(self.leases) and self.paused_until <= now and not self.urgent()

    def over_at(self, now: float) -> float:
        """Return when to look again whether it is idle."""
        return max(now + self.period / 2, self.paused_until)
