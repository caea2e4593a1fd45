"""When the server counted one request of the past: bounds, from when it left and what its answer said.

Pure. The moment itself is never seen. What follows from it for the next request is the business of
``slots.py``; here is also what an answer proves of the other requests.

Which slots of one key are busy, and until when: those in flight, and those of requests of the past. Pure.

What an answer means is read in ``slots.py``, and put down here. Times are seconds on the caller's clock.

How long nobody sends with a key that the server has refused. Pure; seconds on the caller's clock.

MERGED [ratelimit.forecast] In how many seconds a call's turn comes, from when the slots before it may come free. Pure.

A call is refused for its deadline only if that surely cannot be met. So this is how fast it can go, for
either way in which the server may count: what the answers will teach can only be guessed. All times are
seconds from now; ``ends`` has one for each slot in use.

The arithmetic of one key's budget: which requests the server may still be counting. Pure.

A log of slots, driven by events that carry their time: taken, sent, answered, unsent, unknown. A slot
is given out again only a whole period after the server must have counted the request that used it,
which holds under a fixed window and under a strict sliding one; where ``windows.py`` knows when a
window is over, that frees its slots at once. No clock, lock or await in here: seconds on whatever
clock the caller reads.
"""

import math
from collections import deque
from collections.abc import Iterable
from typing import Literal, TypeAlias

import attrs

from lemcal_async._headers import Quota
from lemcal_async.ratelimit._server import ProbeScheduler, ServerModel, SharedKeyEstimate, Window, Windows

COUNTED_WITHIN = 0.5  # seconds after a request left in which the server must have counted it
MARGIN = 0.003  # seconds between a moment as computed and what is done then: scheduling, clock steps


@attrs.frozen(eq=False)
class RequestRecord:
    """One request of the past, as far as is known of when the server counted it."""

    counted_by: float
    heard_at: float  # inf: no answer came
    left_at: float
    surely: bool  # whether it was counted at all
    window: Window | None
    # What its answer said, if the window was not over when that came: then it was counted so long
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
        """Return the same as far as its answer tells, which is off by the way back."""
        if self.window is None or self.before_end is None:
            return self.heard_at
        return min(self.heard_at, self.window.latest - self.before_end)


def refutes_sliding(told_by: RequestRecord, others: Iterable[RequestRecord], period: float) -> bool:
    """Whether an answer speaks of fewer requests than a sliding log would have counted."""
    if not told_by.used:
        return False
    since, until = told_by.counted_at_most() - period, told_by.counted_at_least()
    counted = 1 + sum(
        past.surely and past.counted_at_least() > since and past.counted_at_most() < until for past in others
    )
    # By two, so that a count which leaves this request out proves nothing.
    return counted - told_by.used >= 2


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


class OccupiedSlots:
    """The slots that the server may still be counting."""

    __slots__ = ("_period", "_server", "_windows", "counted", "in_flight", "past")

    def __init__(self, server: ServerModel, windows: Windows, period: float, limit: int) -> None:
        self._server = server
        self._windows = windows
        self._period = period
        self.in_flight: set[Slot] = set()
        self.counted: deque[RequestRecord] = deque()  # those in front may be over
        self.past: deque[RequestRecord] = deque(maxlen=2 * limit)  # also what is no longer counted

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

    def end_of(self, past: RequestRecord) -> float:
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

    def end(self, slot: Slot, past: RequestRecord) -> None:
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

    def note_counted(self, told_by: RequestRecord) -> None:
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


PAUSE_CAP = 60.0  # seconds; a longer order to wait is an error for the caller, not a sleep


class Cooldown:
    """The pause of one key, ``until`` a moment of the past while there is none.

    An order to wait for longer than ``PAUSE_CAP`` holds the key for that only: then requests may find out
    whether it still stands, and what they are told replaces it. Until then callers are refused.
    """

    def __init__(self) -> None:
        self.until = -math.inf
        self.refused_until = -math.inf

    def order(self, now: float, seconds: float) -> None:
        """Take in a 429. A second one with a shorter wait never shortens the pause."""
        if self.until <= now:
            self.refused_until = -math.inf
        self.until = max(self.until, now + min(seconds, PAUSE_CAP) + MARGIN)
        if seconds > PAUSE_CAP:
            self.refused_until = max(self.refused_until, now + seconds)

    def left(self, now: float) -> float:
        """Return the seconds for which nobody sends."""
        return max(0.0, self.until - now)

    def refused_for(self, now: float) -> float:
        """Return the seconds of an order to wait that is too long to be slept through, else 0."""
        return max(0.0, self.refused_until - now) if self.until > now else 0.0


def hold_after_429(quota: Quota, period: float) -> float:
    """Return the seconds to hold a key after a 429; without a usable header, a whole window."""
    return period if quota.retry_after is None else quota.retry_after


def turn_in_log(ends: list[float], limit: int, period: float, ahead: int) -> float:
    """Return when a call with ``ahead`` others before it may go, if each slot goes round by itself."""
    free = limit - len(ends)
    if ahead < free:
        return 0.0
    turn = ahead - free
    ends = sorted(ends)
    if turn < len(ends):
        return ends[turn]
    rounds, place = divmod(turn - len(ends), limit)
    last_round = ends[-limit:] if free <= 0 else ends
    again = last_round[place - max(free, 0)] if place >= free else 0.0
    return again + (rounds + 1) * period


def turn_in_windows(ends: list[float], limit: int, period: float, ahead: int) -> float:
    """Return when a call with ``ahead`` others before it may go, if all slots come free with the first.

    Should some come free by themselves before the window under way is over, of which nothing is known yet,
    it is one period less.
    """
    free = max(0, limit - len(ends))
    if ahead < free:
        return 0.0
    return min(ends, default=period) + (ahead - free) // limit * period


SLACK = 2  # requests that are left to strangers who may come between an answer and our next request

Observation: TypeAlias = Literal["strangers", "contradiction"]
"""What an answer may tell beyond its own slot: somebody else uses the key, or windows were a mistake."""


class SlidingWindowLog:
    """The slots of one key; ``limit`` requests per ``period`` seconds.

    No more than twice the limit are in flight at once, so that an account whose requests hang
    cannot fill the connection pool that it shares with others. ``server`` is what all keys of one
    server learn from together.
    """

    def __init__(self, limit: int, period: float, server: ServerModel | None = None) -> None:
        self._configured = limit
        self.limit = limit  # ours
        self._quota = limit  # the server's
        self.period = period
        self._server = server or ServerModel(period)
        self._windows = Windows(self._server)
        self._share = SharedKeyEstimate(period)
        self._probe = ProbeScheduler(self._server)
        self.pause = Cooldown()
        self._spaced_until = -math.inf
        self._busy = OccupiedSlots(self._server, self._windows, period, limit)

    # ----------------------------------------------------------------------------------- grants

    def next_at(self, now: float, waiting: int = 1) -> float:
        """Return when the next request may be granted: ``<= now`` is now, inf is after a report.

        ``waiting`` is how many calls want to, this one included.
        """
        self._busy.forget(now)
        if len(self._busy.in_flight) >= 2 * self._configured:
            return math.inf
        ours, strangers = self._ours, self._strangers(now)
        when = max(now, self.pause.until, self._spaced_until)
        if not self._share.shared:
            when = max(when, self._probe.held_until(now, waiting, ours))
        busy = len(self._busy.counted) + len(self._busy.in_flight)
        if busy < min(ours, self._quota - strangers - SLACK * bool(strangers)):
            return when
        ends = self._busy.ends(now)
        if len(ends) >= ours:
            when = max(when, sorted(ends)[len(ends) - ours])
        window = self._windows.newest
        if strangers and window is not None:
            ends += [self._gone_at(window)] * strangers
        quota = self._quota - SLACK if strangers else self._quota
        if len(ends) >= quota:
            when = max(when, sorted(ends)[len(ends) - quota])
        return when

    def take(self, now: float) -> Slot:
        """Grant one request. Only when ``next_at(now) <= now``."""
        slot = Slot(now)
        self._busy.in_flight.add(slot)
        self._spaced_until = now + self._share.interval(self._ours)
        self._probe.granted(now, self._windows.newest)
        return slot

    # ---------------------------------------------------------------------------------- reports

    def sent(self, slot: Slot, now: float) -> None:
        """Note that the request left the machine, after gate, DNS, TCP and TLS."""
        if not slot.ended:
            slot.sent_at = now

    def answered(self, slot: Slot, now: float, status_code: int, quota: Quota) -> Observation | None:
        """Take in an answer; return what is new of the whole key since, None if nothing is."""
        if slot.ended:
            return None
        if quota.limit:  # a header may lower the limit, never raise it
            self._quota = quota.limit
            self.limit = min(self._configured, quota.limit)
        refused = status_code == 429
        relied_on = self._server.counts_windows
        window, pins = self._place(slot, now, quota)
        if refused:
            self.pause.order(now, hold_after_429(quota, self.period))
        counted_by = min(slot.counted_by, now if slot.sent_at is None else slot.sent_at + COUNTED_WITHIN)
        left_at = slot.left_at
        before_end = quota.retry_after if pins and self._server.is_precise else None
        used = None if refused or quota.remaining is None else self._quota - quota.remaining
        past = RequestRecord(
            counted_by, now, left_at, surely=not refused, window=window, before_end=before_end, used=used
        )
        self._busy.end(slot, past)
        if window is not None and not refused:
            window.ours += 1
            self._learn(past)
        if relied_on and not self._server.counts_windows:
            return "contradiction"
        # Of a window in which nothing of ours was let through, a 429 only says that it is full: of the
        # requests of a process that has just ended, maybe.
        if window is None or (refused and not relied_on and not window.ours):
            return None
        return self._notice_strangers(slot, window, now, quota, refused=refused)

    def unsent(self, slot: Slot) -> None:
        """Give the slot back: the request never reached the server."""
        slot.ended = True
        self._busy.in_flight.discard(slot)

    def unknown(self, slot: Slot, now: float) -> None:
        """End the slot of a request that the server may have counted, and will not answer."""
        # One that was never reported as sent may have been sent at any time until now.
        sent_at = now if slot.sent_at is None else slot.sent_at
        counted_by = min(slot.counted_by, sent_at + COUNTED_WITHIN)
        window = self._busy.surely_in(slot)
        self._busy.end(slot, RequestRecord(counted_by, math.inf, sent_at, surely=False, window=window))

    def abandon(self, now: float) -> None:
        """End all that is in flight: after a fork, the answers come to the parent."""
        for slot in list(self._busy.in_flight):
            self.unknown(slot, now)

    # -------------------------------------------------------------------------------- forecasts

    def estimate(self, now: float, ahead: int) -> float:
        """Return the seconds that a request with ``ahead`` others before it will wait at least.

        Within a period: see ``turn_in_windows``.
        """
        self._busy.forget(now)
        period, limit = self.period, self._ours
        ends = self._busy.soonest_ends(now)
        wait = turn_in_log(ends, limit, period, ahead)
        if not self._server.keeps_log:
            window = self._windows.newest
            pinned = self._server.counts_windows or self._share.shared
            if pinned and window is not None and now < window.earliest:
                ends = [min(end, window.earliest - now) for end in ends]
            wait = min(wait, turn_in_windows(ends, limit, period, ahead))
        if pause := self.pause.left(now):
            wait = max(wait, pause + ahead // limit * period)
        return wait

    def remaining(self, now: float) -> int:
        """Return how many requests could be granted without waiting for earlier ones to be forgotten."""
        self._busy.forget(now)
        if self.pause.until > now:
            return 0
        busy = len(self._busy.ends(now))
        free = min(self._ours, self._quota - self._strangers(now)) - busy
        return max(0, min(free, 2 * self._configured - len(self._busy.in_flight)))

    def resets_in(self, now: float) -> float:
        """Return the seconds until the whole limit is free again, if nothing else is sent."""
        self._busy.forget(now)
        surely = now + COUNTED_WITHIN + self.period + MARGIN
        ends = [min(end, surely) for end in self._busy.ends(now)]
        window = self._windows.newest
        if self._strangers(now) and window is not None:
            ends.append(self._gone_at(window))
        return max(0.0, max([*ends, self.pause.until, now]) - now)

    def idle(self, now: float) -> bool:
        """Whether there is nothing to remember."""
        if self._busy.in_flight or self.pause.until > now or self._strangers(now):
            return False
        self._busy.forget(now)
        return not self._busy.counted

    @property
    def strangers(self) -> int:
        """Return how many requests of somebody else are known of in the newest window."""
        window = self._windows.newest
        return 0 if window is None else window.strangers

    @property
    def _ours(self) -> int:
        return min(self.limit, self._share.ours(self._quota))

    # ----------------------------------------------------------------------------- what answers say

    def _place(self, slot: Slot, now: float, quota: Quota) -> tuple[Window | None, bool]:
        """Return the window in which a request was counted, and whether its answer pins its end."""
        if slot.sent_at is not None:
            self._server.took(now - slot.sent_at, now)
        if quota.retry_after is None or quota.remaining is None:
            return None, False
        before = self._windows.newest
        left_at = slot.left_at
        placed = self._windows.place(left_at, now, quota.retry_after)
        if before is not None and self._windows.newest is not before:
            self._share.learned(before.strangers, before.elapsed)
        return placed

    def _learn(self, past: RequestRecord) -> None:
        """Compare what the server counted with what it would have by either way of counting."""
        if self._server.counts_windows:
            return
        if (
            not self._server.keeps_log
            and self._windows.several
            and refutes_sliding(past, self._busy.past, self.period)
        ):
            self._server.refuted_sliding()
        if not self._share.shared:
            self._busy.note_counted(past)

    def _notice_strangers(
        self, slot: Slot, window: Window, now: float, quota: Quota, *, refused: bool
    ) -> Observation | None:
        """Keep room for requests that somebody else made with the same key.

        The server has counted more in this window than we can have sent.
        """
        if quota.remaining is None or window.latest <= now:
            return None
        used = self._quota - quota.remaining
        if used <= window.strangers + window.ours:
            return None
        # All that may have been counted less than a period before this one, by either way of counting.
        left_at = slot.left_at
        if self._server.counts_windows:
            ours = window.ours + sum(past.window is None for past in self._busy.counted)
        else:
            ours = sum(past.counted_at_most() > left_at - self.period for past in self._busy.past)
            ours -= refused  # what was refused is not what filled it
        ours += len(self._busy.in_flight)
        window.strangers = max(window.strangers, used - ours)
        if window.strangers > 0 and self._share.met(self._quota):
            return "strangers"
        return None

    def _strangers(self, now: float) -> int:
        window = self._windows.newest
        return window.strangers if window is not None and self._gone_at(window) > now else 0

    def _gone_at(self, window: Window) -> float:
        """Return when the strangers' requests in a window are forgotten."""
        if self._server.counts_windows:
            return self._server.over_at(window)
        return window.latest + MARGIN
