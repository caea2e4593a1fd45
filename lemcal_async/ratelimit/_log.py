"""The arithmetic of one key's budget: which requests the server may still be counting. Pure.

A log of slots, driven by events that carry their time: taken, sent, answered, unsent, unknown. A slot is
granted again only one full period after the server must have counted the request that used it. This is
safe for fixed windows and for a strict sliding window; if the end of a window is known, all its slots free
up at that moment. No clock, lock or await: all times are seconds on whatever clock the caller reads.
"""

import math
from collections.abc import Iterable
from typing import Literal, TypeAlias

from lemcal_async._headers import Quota
from lemcal_async.ratelimit._server import (
    ROUNDING,
    ProbeScheduler,
    ServerModel,
    SharedKeyEstimate,
    Window,
    Windows,
)
from lemcal_async.ratelimit._slots import (
    LOST_AFTER,
    MARGIN,
    Cooldown,
    OccupiedSlots,
    RequestRecord,
    Slot,
    pause_after_429,
    refutes_sliding,
)

MAX_LIMIT_FACTOR = 10  # times the configured limit; larger numbers from a server are capped
SLACK = 2  # requests left for foreign use between a response and our next request

Observation: TypeAlias = Literal["foreign use", "contradiction"]
"""What a response may reveal beyond its own slot: foreign use of the key, or no fixed windows after all."""


class SlidingWindowLog:
    """The slots of one key; ``limit`` requests per ``period`` seconds.

    At most twice the limit are in flight at once, so that an account with hanging requests cannot fill the
    connection pool that it shares with others. ``server`` is what all keys of one server have learned
    together.
    """

    __slots__ = (
        "_configured",
        "_probes",
        "_quota",
        "_server",
        "_shared_key",
        "_slots",
        "_spaced_until",
        "_trial",
        "_trial_until",
        "_windows",
        "cooldown",
        "limit",
        "period",
    )

    def __init__(self, limit: int, period: float, server: ServerModel | None = None) -> None:
        self._configured = limit
        self.limit = limit  # the configured limit, lowered by a header
        self._quota = limit  # what the server allows
        self.period = period
        self._server = server or ServerModel(period)
        self._windows = Windows(self._server)
        self._shared_key = SharedKeyEstimate(period)
        self._probes = ProbeScheduler(self._server)
        self.cooldown = Cooldown()
        self._spaced_until = -math.inf
        # After a 429, one trial request goes first; the others wait until the server lets it through.
        self._trial: Slot | None = None
        self._trial_until = -math.inf
        self._slots = OccupiedSlots(self._server, period)

    # ----------------------------------------------------------------------------------- grants

    def next_at(self, now: float, waiting: int = 1) -> float:
        """Return when the next request may be granted: ``<= now`` means now, inf means not before a report.

        ``waiting`` is the number of calls that want to send, including this one.
        """
        self._slots.prune(now)
        if len(self._slots.in_flight) >= 2 * self._configured:
            return math.inf
        own, foreign = self._own, self._foreign(now)
        when = max(now, self.cooldown.until, self._spaced_until)
        if self._trial is not None:
            when = max(when, self._trial_until)
        if not self._shared_key.shared:
            when = max(when, self._probes.held_until(now, waiting, own))
        occupied = len(self._slots.counted) + len(self._slots.in_flight)
        if occupied < min(own, self._quota - foreign - SLACK * bool(foreign)):
            return when
        ends = self._slots.ends(now)
        if len(ends) >= own:
            when = max(when, ends[len(ends) - own])
        window = self._windows.newest
        if foreign and window is not None:
            ends = sorted([*ends, *[self._over_at(window)] * foreign])
        quota = self._quota - SLACK if foreign else self._quota
        if len(ends) >= quota:
            when = max(when, ends[len(ends) - quota])
        return when

    def take(self, now: float) -> Slot:
        """Grant one request. Requires ``next_at(now) <= now``."""
        slot = self._slots.take(now)
        if now < self._trial_until:
            self._trial = slot
        self._spaced_until = now + self._shared_key.interval(self._own)
        self._probes.granted(now, self._windows.newest)
        return slot

    # ---------------------------------------------------------------------------------- reports

    def is_valid(self, slot: Slot, now: float) -> bool:  # noqa: ARG002 - slots here do not expire
        """Whether a slot may still be used."""
        return not slot.ended

    def sent(self, slot: Slot, now: float) -> None:
        """Record that the request was sent, after queueing, DNS, TCP and TLS."""
        if not slot.ended:
            slot.sent_at = now

    def answered(self, slot: Slot, now: float, status_code: int, quota: Quota) -> Observation | None:
        """Process a response; return what it newly reveals about the whole key, else None."""
        if slot.ended:
            return None
        if quota.limit:  # a header may lower the limit, never raise it
            self._quota = min(quota.limit, MAX_LIMIT_FACTOR * self._configured)
            self.limit = min(self._configured, quota.limit)
        refused = status_code == 429
        if slot is self._trial:
            self._trial, self._trial_until = None, -math.inf
        was_fixed = self._server.is_fixed
        window, pins = self._place(slot, now, quota)
        if refused:
            self.cooldown.extend(now, pause_after_429(quota, self.period))
            self._trial, self._trial_until = None, self.cooldown.until + self.period
        counted_by = self._server.counted_by(slot.left_at, now, quota, came_quickly=window is not None)
        record = RequestRecord(
            number=slot.number,
            left_at=slot.left_at,
            counted_by=counted_by,
            was_counted=not refused,
            window=window,
            before_end=quota.retry_after if pins and self._server.is_precise else None,
            used=None if refused else self._used(quota),
            counted_for=max(0.0, (quota.retry_after or 0.0) - ROUNDING) if self._server.is_precise else 0.0,
        )
        self._slots.end(slot, record, now)
        if record.counted_by < now and not self._shared_key.shared:
            self._slots.refine()
        if window is not None and not refused:
            window.own += 1
            self._learn(record)
        if was_fixed and not self._server.is_fixed:
            return "contradiction"
        # In a window that let none of our requests through, a 429 only says that the window is full: perhaps
        # with the requests of a process that has just ended.
        if window is None or (refused and not was_fixed and not window.own):
            return None
        return self._detect_foreign_use(slot, window, now, quota, refused=refused)

    def unsent(self, slot: Slot) -> None:
        """Release the slot: the request never reached the server."""
        self._slots.release(slot)
        if slot is self._trial:
            self._trial = None  # the next request is the trial

    def unknown(self, slot: Slot, now: float) -> None:
        """End the slot of a request that gets no response; the server may count it, now or later."""
        if slot.ended:
            return
        if slot is self._trial:
            self._trial = None
        # If it was never reported as sent, it may have been sent at any time until now.
        sent_at = now if slot.sent_at is None else slot.sent_at
        record = RequestRecord(
            number=slot.number,
            left_at=slot.left_at,
            counted_by=sent_at + LOST_AFTER,
            was_counted=False,
            window=None,
        )
        self._slots.lose(slot, record, now)

    def abandon(self, now: float) -> None:
        """End all requests in flight: after a fork, their responses go to the parent."""
        for slot in list(self._slots.in_flight):
            self.unknown(slot, now)

    def adopt(self, slots: Iterable[Slot]) -> None:
        """Add requests that were granted elsewhere and are in flight."""
        for slot in slots:
            self._slots.adopt(slot)

    def occupied(self, now: float) -> tuple[list[Slot], list[float]]:
        """Return the slots in flight, and when each other occupied slot frees up."""
        self._slots.prune(now)
        return list(self._slots.in_flight), [self._slots.end_of(record) for record in self._slots.counted]

    # -------------------------------------------------------------------------------- forecasts

    def estimate(self, now: float, ahead: int) -> float:
        """Return the minimum wait in seconds of a request that has ``ahead`` others before it.

        May be off by one period: see ``_turn_in_windows``.
        """
        self._slots.prune(now)
        period, limit = self.period, self._own
        ends = self._slots.optimistic_waits(now)
        wait = _turn_in_log(ends, limit, period, ahead)
        if not self._server.is_sliding:
            window = self._windows.newest
            pinned = self._server.is_fixed or self._shared_key.shared
            if pinned and window is not None and now < window.earliest:
                ends = [min(end, window.earliest - now) for end in ends]
            wait = min(wait, _turn_in_windows(ends, limit, period, ahead))
        if pause := self.cooldown.left(now):
            wait = max(wait, pause + ahead // limit * period)
        return wait

    # The following only read state, so any thread may call them at any moment, even in a signal handler.

    def remaining(self, now: float) -> int:
        """Return the number of requests that could be granted without waiting for a slot to free up."""
        if self.cooldown.until > now:
            return 0
        occupied = len(self._slots.ends(now))
        free = min(self._own, self._quota - self._foreign(now)) - occupied
        return max(0, min(free, 2 * self._configured - len(self._slots.in_flight)))

    def resets_in(self, now: float) -> float:
        """Return the seconds until the whole limit is available, if nothing else is sent.

        Assumes that all pending responses arrive now.
        """
        return max(now, self.cooldown.until, self._slots.last_end(now)) - now

    def idle(self, now: float) -> bool:
        """Whether there is no state to keep."""
        if self._slots.in_flight or self._trial_until > now or self._foreign(now):
            return False
        self._slots.prune(now)
        return not self._slots.counted and not self._slots.lost

    @property
    def foreign(self) -> int:
        """The number of known foreign requests in the newest window."""
        window = self._windows.newest
        return 0 if window is None else window.foreign

    @property
    def _own(self) -> int:
        return min(self.limit, self._shared_key.own(self._quota))

    # --------------------------------------------------------------------------- learning from responses

    def _place(self, slot: Slot, now: float, quota: Quota) -> tuple[Window | None, bool]:
        """Return the window that counted a request, and whether the response pins the window's end."""
        if slot.sent_at is not None:
            self._server.add_round_trip(now - slot.sent_at, now)
        if quota.retry_after is None or quota.remaining is None:
            return None, False
        before = self._windows.newest
        placed = self._windows.place(slot.left_at, now, quota.retry_after)
        if before is not None and self._windows.newest is not before:
            self._shared_key.learn(before.foreign, before.elapsed)
        return placed

    def _used(self, quota: Quota) -> int | None:
        """Return the number of requests counted, according to a response."""
        if quota.remaining is None:
            return None
        return max(0, self._quota - quota.remaining)

    def _learn(self, record: RequestRecord) -> None:
        """Compare the server's count with the counts expected of a sliding log and of fixed windows."""
        if (
            not self._server.is_fixed
            and not self._server.is_sliding
            and self._windows.has_previous
            and refutes_sliding(record, self._slots.records, self.period)
        ):
            self._server.refuted_sliding()
        if not self._shared_key.shared:
            self._slots.learn(record)

    def _detect_foreign_use(
        self, slot: Slot, window: Window, now: float, quota: Quota, *, refused: bool
    ) -> Observation | None:
        """Keep room for foreign requests with the same key.

        They exist if the server has counted more in this window than we can have sent.
        """
        used = self._used(quota)
        if used is None or window.latest <= now or used <= window.foreign + window.own:
            return None
        # All requests that may have been counted less than a period before this one, for either algorithm.
        if self._server.is_fixed:
            own = window.own + sum(record.window is None for record in self._slots.counted)
        else:
            since = slot.left_at - self.period
            own = sum(record.latest_counted() > since for record in self._slots.records)
            own -= refused  # a refused request did not fill the window
        own += len(self._slots.in_flight)
        if used > own:
            own += self._slots.attribute_lost(used - own, window, now, now)
        window.foreign = max(window.foreign, used - own)
        if window.foreign > 0:
            self._slots.clear_bounds()
            if self._shared_key.mark_shared(self._quota):
                return "foreign use"
        return None

    def _foreign(self, now: float) -> int:
        window = self._windows.newest
        return window.foreign if window is not None and self._over_at(window) > now else 0

    def _over_at(self, window: Window) -> float:
        """Return when the server forgets the foreign requests in a window."""
        return self._server.over_at(window) if self._server.is_fixed else window.latest + MARGIN


# A call is refused because of its deadline only if the deadline certainly cannot be met. So these return how
# fast the queue can possibly move under either algorithm: what future responses will reveal is unknown. All
# times are seconds from now; ``ends`` has one entry per occupied slot.


def _turn_in_log(ends: list[float], limit: int, period: float, ahead: int) -> float:
    """Return the wait of a call with ``ahead`` others before it, if each slot frees up on its own."""
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


def _turn_in_windows(ends: list[float], limit: int, period: float, ahead: int) -> float:
    """Return the wait of a call with ``ahead`` others before it, if all slots free up with the first.

    If some slots free up on their own before a current window that is not known yet is over, the actual wait
    is one period less.
    """
    free = max(0, limit - len(ends))
    if ahead < free:
        return 0.0
    return min(ends, default=period) + (ahead - free) // limit * period
