"""The arithmetic of one key's budget: which requests the server may still be counting. Pure.

A log of slots, driven by events that carry their time: taken, sent, answered, unsent, unknown.
It holds under a fixed window and under a strict sliding one, because a slot is given out again
only a whole period after the server must have counted the request that used it. No clock, lock
or await in here: seconds on whatever clock the caller reads.
"""

import heapq
import math

from lemcal_async.headers import Quota

MARGIN = 0.02  # seconds between a slot's computed end and its next use: scheduling, clock steps
COUNTED_WITHIN = 0.5  # seconds after a request left in which the server must have counted it
PAUSE_CAP = 60.0  # seconds; a longer order to wait is an error for the caller, not a sleep


class Slot:
    """One request's share of the budget, from the grant until the server has forgotten it."""

    __slots__ = ("ended", "free_at", "sent_at")

    def __init__(self) -> None:
        self.sent_at: float | None = None
        self.free_at = math.inf
        self.ended = False


class SlotLog:
    """The slots of one key; ``limit`` requests per ``period`` seconds.

    No more than twice the limit are in flight at once, so that an account whose requests hang
    cannot fill the connection pool that it shares with others.
    """

    def __init__(self, limit: int, period: float) -> None:
        self._configured = limit
        self.limit = limit
        self.period = period
        self._turnover = period + MARGIN  # from when a request was counted to its slot's next use
        self.paused_until = -math.inf
        self._refused_until = -math.inf
        self._counted: list[float] = []  # heap: when each slot with a known end comes free
        self._in_flight: set[Slot] = set()

    def next_at(self, now: float) -> float:
        """Return when the next request may be granted: ``<= now`` is now, inf is after a report."""
        self._forget(now)
        if len(self._in_flight) >= 2 * self._configured:
            return math.inf
        busy = self._busy(now)
        when = now
        if busy >= self.limit:
            ends = self._counted + [slot.free_at for slot in self._in_flight if slot.free_at > now]
            when = sorted(ends)[busy - self.limit]
        return max(when, self.paused_until)

    def take(self) -> Slot:
        """Grant one request. Only when ``next_at(now) <= now``."""
        slot = Slot()
        self._in_flight.add(slot)
        return slot

    def sent(self, slot: Slot, now: float) -> None:
        """Note that the request left the machine, after gate, DNS, TCP and TLS."""
        if not slot.ended:
            slot.sent_at = now
            slot.free_at = now + COUNTED_WITHIN + self._turnover

    def answered(self, slot: Slot, now: float, status_code: int, quota: Quota) -> None:
        """Take in an answer: the slot's end is known now, and what the headers say."""
        if slot.ended:
            return
        self._notice_others(now, quota)
        counted_by = now
        if slot.sent_at is not None:
            counted_by = min(counted_by, slot.sent_at + COUNTED_WITHIN)
        self._end(slot, counted_by + self._turnover)
        if quota.limit:  # a header may lower the limit, never raise it
            self.limit = min(self._configured, quota.limit)
        if status_code == 429:
            self._pause(now, hold_after_429(quota, self.period))

    def unsent(self, slot: Slot) -> None:
        """Give the slot back: the request never reached the server."""
        self._end(slot, -math.inf)

    def unknown(self, slot: Slot, now: float) -> None:
        """End the slot of a request that the server may have counted, and will not answer."""
        # One that was never reported as sent may have been sent at any time until now.
        sent_at = now if slot.sent_at is None else slot.sent_at
        self._end(slot, sent_at + COUNTED_WITHIN + self._turnover)

    def abandon(self, now: float) -> None:
        """End all that is in flight: after a fork, the answers come to the parent."""
        for slot in list(self._in_flight):
            self.unknown(slot, now)

    def estimate(self, now: float, ahead: int) -> float:
        """Return the seconds that a request with ``ahead`` others before it will wait at least."""
        self._forget(now)
        turnover = self._turnover
        # One that is to end later is passed by those that are free now.
        ends = [min(end, now + turnover) for end in self._counted]
        ends += [
            max(now, (now if slot.sent_at is None else slot.sent_at) + turnover)  # counted as it left
            for slot in self._in_flight
            if slot.free_at > now
        ]
        free = self.limit - len(ends)
        if ahead < free:
            when = now
        else:
            # In the order in which the slots come round.
            turn = ahead - free
            ends.sort()
            if turn < len(ends):
                when = ends[turn]
            else:
                rounds, place = divmod(turn - len(ends), self.limit)
                last_round = ends[-self.limit :] if free <= 0 else ends
                again = last_round[place - max(free, 0)] if place >= free else now
                when = again + (rounds + 1) * turnover
        if self.paused_until > now:
            when = max(when, self.paused_until + ahead // self.limit * turnover)
        return max(0.0, when - now)

    def refused_for(self, now: float) -> float:
        """Return the seconds of an order to wait that is too long to be slept through, else 0."""
        return max(0.0, self._refused_until - now) if self.paused_until > now else 0.0

    def paused_for(self, now: float) -> float:
        """Return the seconds for which nobody sends."""
        return max(0.0, self.paused_until - now)

    def remaining(self, now: float) -> int:
        """Return how many requests could be granted at once."""
        self._forget(now)
        if self.paused_until > now:
            return 0
        free = self.limit - self._busy(now)
        return max(0, min(free, 2 * self._configured - len(self._in_flight)))

    def resets_in(self, now: float) -> float:
        """Return the seconds until the whole limit is free again, if nothing else is sent."""
        self._forget(now)
        ends = [min(slot.free_at, now + COUNTED_WITHIN + self._turnover) for slot in self._in_flight]
        return max(0.0, max([*self._counted, *ends, self.paused_until, now]) - now)

    def idle(self, now: float) -> bool:
        """Whether there is nothing to remember."""
        self._forget(now)
        return not self._counted and not self._in_flight and self.paused_until <= now

    def _busy(self, now: float) -> int:
        return len(self._counted) + sum(slot.free_at > now for slot in self._in_flight)

    def _end(self, slot: Slot, free_at: float) -> None:
        if not slot.ended:
            slot.ended = True
            self._in_flight.discard(slot)
            if free_at > -math.inf:
                heapq.heappush(self._counted, free_at)

    def _pause(self, now: float, seconds: float) -> None:
        # A second 429 with a shorter wait never shortens the pause. A wait over the cap holds the
        # key for the cap only: then requests may find out whether the order still stands, and
        # what they are told replaces it.
        if self.paused_until <= now:
            self._refused_until = -math.inf
        self.paused_until = max(self.paused_until, now + min(seconds, PAUSE_CAP) + MARGIN)
        if seconds > PAUSE_CAP:
            self._refused_until = max(self._refused_until, now + seconds)

    def _notice_others(self, now: float, quota: Quota) -> None:
        """Keep room for requests that somebody else made with the same key.

        The server has counted more in this window than we can have sent: the difference stays
        taken until the window ends, ``Retry-After`` from now at the latest.
        """
        if quota.remaining is None or quota.retry_after is None:
            return
        used = min(quota.limit or self._configured, self._configured) - quota.remaining
        ours = len(self._counted) + len(self._in_flight)
        window_end = now + min(quota.retry_after, self.period) + MARGIN
        for _ in range(used - ours):
            heapq.heappush(self._counted, window_end)

    def _forget(self, now: float) -> None:
        while self._counted and self._counted[0] <= now:
            heapq.heappop(self._counted)


def hold_after_429(quota: Quota, period: float) -> float:
    """Return the seconds to hold a key after a 429; without a usable header, a whole window."""
    return period if quota.retry_after is None else quota.retry_after
