"""What one process knows of one key's budget: what to ask Redis, and what follows from the reply. Pure.

To the queue of the local limiter it is what ``SlidingWindowLog`` is there. Times are seconds on this
process's own clock.
"""

import math

from lemcal_async._headers import Quota
from lemcal_async.ratelimit._cooldown import MARGIN, Cooldown, pause_after_429
from lemcal_async.ratelimit._log import SlidingWindowLog
from lemcal_async.ratelimit._slots import Slot
from lemcal_async.ratelimit.redis._script import ScriptReply, ScriptRequest, Told

LAPSE = 0.5  # seconds for which a slot may be used without news from Redis; after that it is given back
SOON = 0.02  # seconds until a slot that was given back is reported, along with others
ENOUGH_TRIPS = 20  # round trips before the shortest of them says something


class Lease(Slot):
    """A slot, until the server has forgotten its request."""

    __slots__ = ("alone", "end", "granted")

    def __init__(self, taken_at: float, granted: int) -> None:
        super().__init__(taken_at)
        self.granted = granted  # the moment at which Redis did it, 0 if it was taken without Redis
        self.end: float | None = None  # when it comes free, None while that is open
        self.alone: Slot | None = None  # its slot in the share of this process


class Budget:
    """The slots of one process, and what it last heard from Redis.

    A slot is open until its request is answered: only that proves that the server has counted it. Redis
    keeps an open slot for ``lifetime``, so the process restates what it holds before that is over.
    """

    def __init__(self, limit: int, period: float) -> None:
        self.configured = limit
        self.period = period
        self.turnover = period + MARGIN
        self.lifetime = LAPSE + self.turnover
        self.cooldown = Cooldown()
        self.waiting = 0  # calls in the queue,
        self.refused = False  # and whether the first of them was refused by the server before
        self._reply = ScriptReply()
        self._heard_at = -math.inf
        self._stock: list[int] = []  # slots that Redis has granted, and nobody has taken yet
        self._leases: list[Lease] = []
        self._in_flight = 0
        self._unsent = 0  # of those
        self._restated_at = -math.inf  # when Redis was last told of all slots,
        self._report_by = math.inf  # when it must hear what has changed since,
        self._ask_at = -math.inf  # and when it said to ask for slots again
        self._in_line = False  # whether it keeps slots for this process
        self._asking = False
        self._away = False
        self._alone: SlidingWindowLog | None = None  # this process's share meanwhile
        # What Redis has not heard yet: a 429, a new limit, the highest count of an answer.
        self._was_refused = False
        self._header_limit = 0
        self._told: tuple[Lease, int, float, float] | None = None
        self._read_at = -math.inf
        self._trips = 0
        self._shortest = math.inf

    # ----------------------------------------------------------------------------------------- grants
    def next_at(self, now: float, waiting: int = 1) -> float:
        """Return when the next request may be granted; inf is when Redis has granted it."""
        if self._alone is not None:
            return max(self.cooldown.until, self._alone.next_at(now, waiting))
        return now if self._stock and self._is_fresh(now) and not self._away else math.inf

    def take(self, now: float) -> Lease:
        """Grant one request. Only when ``next_at(now) <= now``."""
        if self._alone is not None:
            lease = Lease(now, 0)
            lease.alone = self._alone.take(now)
        else:
            lease = Lease(now, self._stock.pop())
        self._leases.append(lease)
        self._in_flight += 1
        self._unsent += 1
        return lease

    def is_valid(self, slot: Slot, now: float) -> bool:
        """Whether a slot may be used: if the process stood still, others may have it by now."""
        return self._is_fresh(now) or (self._away and isinstance(slot, Lease) and slot.alone is not None)

    def _is_fresh(self, now: float) -> bool:
        return now < self._restated_at + LAPSE

    # ---------------------------------------------------------------------------------------- reports
    def sent(self, slot: Lease, now: float) -> None:
        """Note that the request left the machine."""
        if not slot.ended and slot.sent_at is None:
            slot.sent_at = now
            self._unsent -= 1
            if self._alone is not None and slot.alone is not None:
                self._alone.sent(slot.alone, now)

    def answered(self, slot: Lease, now: float, status_code: int, quota: Quota) -> None:
        """Take in an answer: the server counted the request before it."""
        if slot.ended:
            return
        self._end(slot, now + self.turnover)
        if slot.sent_at is not None:
            self._trips += 1
            self._shortest = min(self._shortest, now - slot.sent_at)
        if self._alone is not None and slot.alone is not None:
            self._alone.answered(slot.alone, now, status_code, quota)
        if status_code == 429:
            self.cooldown.extend(now, pause_after_429(quota, self.period))
            self._was_refused, self._read_at = True, now
            self._report(now)
        self._read(slot, now, quota)

    def unsent(self, slot: Lease) -> None:
        """Give the slot back: the request never reached the server."""
        if slot.ended:
            return
        self._end(slot, -math.inf)
        self._leases.remove(slot)
        if self._alone is not None and slot.alone is not None:
            self._alone.unsent(slot.alone)
        elif slot.granted and not self._away:
            self._stock.append(slot.granted)  # for the next in the queue, or else for other processes

    def unknown(self, slot: Lease, now: float) -> None:
        """Note that no answer will come, and that the server may have counted the request."""
        if slot.ended:
            return
        self._end(slot, now + self.lifetime)
        if self._alone is not None and slot.alone is not None:
            self._alone.unknown(slot.alone, now)

    def abandon(self, now: float) -> None:
        """End all that is in flight."""
        for lease in self._leases:
            self.unknown(lease, now)

    def _end(self, lease: Lease, end: float) -> None:
        lease.ended, lease.end = True, end
        self._in_flight -= 1
        self._unsent -= lease.sent_at is None
        self._report(end - self.period / 2)

    def _report(self, by: float) -> None:
        self._report_by = min(self._report_by, by)

    def _read(self, lease: Lease, now: float, quota: Quota) -> None:
        """Take in what the headers say of the limit, and of what has been used of it."""
        limit = min(quota.limit or self.configured, self.configured)
        if quota.limit and limit != self.limit:
            self._header_limit, self._read_at = quota.limit, now
            self._report(now)
        if quota.remaining is None or quota.retry_after is None:
            return
        count = limit - quota.remaining
        if self._told is None or count > self._told[1] or self._told[2] + self.period < now:
            self._told = lease, count, now, now + min(quota.retry_after, self.period) + MARGIN
            self._read_at = now
            if count > self._reply.expected:  # somebody else's requests, of which all must hear
                self._report(now)

    # ------------------------------------------------------------------------------------------ Redis
    def due(self, now: float) -> float:
        """Return when Redis is to be asked or told something; inf if there is no need."""
        if self._away:
            return math.inf
        due = self._report_by
        if self.waiting and self._may_have > 0:
            due = min(due, self._ask_at)
        elif not self.waiting and (self._in_line or self._stock):
            due = now  # others may have what was kept for this process
        if self._unsent:
            return min(due, self._restated_at + LAPSE / 2)
        return min(due, self._restated_at + self.lifetime / 2) if self._in_flight else due

    @property
    def _may_have(self) -> int:
        # Twice the limit in flight at most: requests that hang must not fill the shared connection pool.
        return 2 * self.configured - self._in_flight

    def request(self, now: float) -> ScriptRequest:
        """Return what to ask Redis. All is restated, so a request that is lost or late does no harm."""
        self._forget(now)
        self._stock, self._report_by, self._asking = [], math.inf, True
        waiting = max(0, min(self.waiting, self._may_have))
        told = None
        if self._told is not None and now - self._told[0].taken_at < self.lifetime:
            lease, count, at, until = self._told
            told = Told(count=count, age=now - at, window=until - now, granted=lease.granted)
        slots: list[tuple[int, float | bool]] = []
        for lease in self._leases:
            # The server counted it before the answer set out, and counts the next one when that arrives.
            credit = 0.0 if lease.sent_at is None else self._reply.trip
            slots.append((lease.granted, False if lease.end is None else lease.end - credit - now))
        return ScriptRequest(
            limit=self.configured,
            turnover=self.turnover,
            lifetime=self.lifetime,
            hold=self.lifetime + LAPSE,
            slots=slots,
            known=now - self._heard_at < self.lifetime,
            waiting=waiting,
            refused=int(self.refused and waiting > 0),
            pause=self.cooldown.left(now) if self._was_refused else 0.0,
            refuse=self.cooldown.refused_for(now) if self._was_refused else 0.0,
            header_limit=self._header_limit,
            told=told,
            trip=self._shortest if self._trips >= ENOUGH_TRIPS else 0.0,
        )

    def apply(self, request: ScriptRequest, reply: ScriptReply, asked_at: float, now: float) -> None:
        """Take in the reply to a request of ``asked_at``."""
        self._reply, self._heard_at, self._restated_at, self._asking = reply, now, asked_at, False
        self._stock = [reply.now] * reply.granted
        self._in_line = request.waiting > reply.granted
        if request.waiting:
            self._ask_at = now + reply.wait
        if self._read_at <= asked_at:
            self._was_refused, self._header_limit, self._told = False, 0, None
        if not self._was_refused:
            self.cooldown.until = now + reply.paused
            self.cooldown.refused_until = now + reply.refused

    def unheard(self, now: float) -> None:
        """Note that no reply came: Redis may have granted slots that nobody will use."""
        self._asking = False
        self._report(now)

    def fall_back(self, log: SlidingWindowLog | None, since: float) -> None:
        """Go on without Redis, by ``log``, as soon as nothing counts any more that others had from Redis."""
        self._away, self._stock = True, []
        self._alone = log
        if log is not None:
            self.cooldown.until = max(self.cooldown.until, since)
            for lease in self._leases:
                if not lease.ended:
                    lease.alone = log.take(lease.taken_at)

    def come_back(self) -> None:
        """Go back to Redis."""
        self._away, self._alone, self._ask_at = False, None, -math.inf
        self._report_by = -math.inf

    def _forget(self, now: float) -> None:
        """Drop what is over; not at once, because a late header may still count it."""
        self._leases = [one for one in self._leases if one.end is None or one.end + self.lifetime > now]

    # -------------------------------------------------------------------------------------- forecasts
    @property
    def limit(self) -> int:
        """The limit in force: a header may lower it, never raise it."""
        if self._alone is not None:
            return self._alone.limit
        limits = self._header_limit or self.configured, self._reply.limit or self.configured
        return min(self.configured, *limits)

    @property
    def foreign(self) -> int:
        """How many requests of somebody else Redis has just learned of."""
        return self._reply.foreign

    def estimate(self, now: float, ahead: int) -> float:
        """Return the seconds that a request with ``ahead`` others of this process before it waits at least.

        Processes are served in turn: as many requests of each other one go before it, if it has so many.
        """
        if self._alone is not None:
            return self.cooldown.left(now) + self._alone.estimate(now, ahead)
        ahead += sum(min(want, ahead) for want in self._reply.others)
        frees = self._frees(now)
        slots = [*[0.0] * (self.limit - len(frees)), *frees[-self.limit :]]
        rounds, place = divmod(ahead, self.limit)
        return max(slots[place], self.cooldown.left(now)) + rounds * self.turnover

    def remaining(self, now: float) -> int:
        """Return how many requests could be granted now."""
        if self.cooldown.until > now or (self._away and self._alone is None):
            return 0
        return self._alone.remaining(now) if self._alone else max(0, self.limit - len(self._frees(now)))

    def resets_in(self, now: float) -> float:
        """Return the seconds until the whole limit is free again, if nothing else is sent."""
        if self._alone is not None:
            return max(self._alone.resets_in(now), self.cooldown.left(now))
        return max([*self._frees(now), self.cooldown.left(now)])

    def _frees(self, now: float) -> list[float]:
        passed = now - self._heard_at
        return sorted(left - passed for left in self._reply.frees if left > passed)

    def idle(self, now: float) -> bool:
        """Whether there is nothing to remember or to report."""
        self._forget(now)
        busy = self._leases or self._asking or self.cooldown.until > now
        return not busy and (self._away or self.due(now) == math.inf)
