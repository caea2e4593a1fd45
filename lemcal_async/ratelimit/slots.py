"""The arithmetic of one key's budget: which requests the server may still be counting. Pure.

A log of slots, driven by events that carry their time: taken, sent, answered, unsent, unknown. A slot
is given out again only a whole period after the server must have counted the request that used it,
which holds under a fixed window and under a strict sliding one; where ``windows.py`` knows when a
window is over, that frees its slots at once. No clock, lock or await in here: seconds on whatever
clock the caller reads.
"""

import math
from typing import Literal, TypeAlias

from lemcal_async.headers import Quota
from lemcal_async.ratelimit.busy import Busy, Slot
from lemcal_async.ratelimit.forecast import turn_in_log, turn_in_windows
from lemcal_async.ratelimit.past import COUNTED_WITHIN, MARGIN, Past, refutes_sliding
from lemcal_async.ratelimit.pause import Pause, hold_after_429
from lemcal_async.ratelimit.probe import Probe
from lemcal_async.ratelimit.sharing import Share
from lemcal_async.ratelimit.windows import Server, Window, Windows

SLACK = 2  # requests that are left to strangers who may come between an answer and our next request

News: TypeAlias = Literal["strangers", "contradiction"]
"""What an answer may tell beyond its own slot: somebody else uses the key, or windows were a mistake."""


class SlotLog:
    """The slots of one key; ``limit`` requests per ``period`` seconds.

    No more than twice the limit are in flight at once, so that an account whose requests hang
    cannot fill the connection pool that it shares with others. ``server`` is what all keys of one
    server learn from together.
    """

    def __init__(self, limit: int, period: float, server: Server | None = None) -> None:
        self._configured = limit
        self.limit = limit  # ours
        self._quota = limit  # the server's
        self.period = period
        self._server = server or Server(period)
        self._windows = Windows(self._server)
        self._share = Share(period)
        self._probe = Probe(self._server)
        self.pause = Pause()
        self._spaced_until = -math.inf
        self._busy = Busy(self._server, self._windows, period, limit)

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

    def answered(self, slot: Slot, now: float, status_code: int, quota: Quota) -> News | None:
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
        past = Past(
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
        self._busy.end(slot, Past(counted_by, math.inf, sent_at, surely=False, window=window))

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

    def _learn(self, past: Past) -> None:
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
    ) -> News | None:
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
