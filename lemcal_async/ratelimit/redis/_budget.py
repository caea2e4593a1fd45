"""The budget of one key as one process knows it: what to ask Redis, and how to apply the reply. Pure.

It takes the place that ``SlidingWindowLog`` has in the local limiter. Times are seconds on the clock of this
process. Requests to ``script.lua`` and its replies contain durations, so the clocks of different machines are
never compared. The one exception is the moment of a grant, which is on the clock of Redis, and which only the
script interprets.
"""

import math
from collections.abc import Iterable
from typing import Any, TypeAlias

import attrs

from lemcal_async._headers import Quota
from lemcal_async.ratelimit._log import SlidingWindowLog
from lemcal_async.ratelimit._server import ROUNDING, ServerModel
from lemcal_async.ratelimit._slots import LOST_AFTER, MARGIN, Cooldown, Slot, pause_after_429

# Seconds after the last successful request to Redis was sent for which granted slots may be used; after that,
# they are returned.
GRANT_TTL = 0.5
COALESCE_WITHIN = 0.01  # seconds; slots that free up this soon after the first are granted together with it
GRACE = 0.25  # seconds that a process may be late to claim its slots before other processes get them

ScriptRequest: TypeAlias = dict[str, Any]
"""The JSON that is sent to the script: see ``Budget.request``."""


class Budget:
    """The slots of one process, and the last reply from Redis.

    A slot is open until the response to its request arrives: only the response proves that the server has
    counted the request. Redis keeps an open slot for ``slot_ttl``, so the process reports its slots again
    before that is over.
    """

    def __init__(self, limit: int, period: float, server: ServerModel | None = None) -> None:
        self.configured = limit
        self.period = period
        self._server = server or ServerModel(period)
        self.reuse_after = period + MARGIN  # from when a request was counted until its slot is used again
        self.slot_ttl = GRANT_TTL + self.reuse_after
        self.cooldown = Cooldown()
        self.waiting = 0  # calls in the queue
        self.refused = False  # whether the server refused the previous attempt of the first of them
        self.reply = ScriptReply()
        self._last_reply_at = self._last_report_at = -math.inf
        self._report_by = math.inf  # when Redis must know what has changed since the last report
        self._next_request_at = -math.inf  # when the last reply said to ask for slots again
        self._queued = False  # whether Redis reserves slots for this process
        self._request_pending = False
        self._unused: list[float] = []  # granted slots that no call has taken yet: the moment of each grant
        # The moment of the grant of each slot in flight, and when the slots of counted requests free up.
        # The moment of a slot that was granted without Redis is 0.
        self._open: dict[Slot, float] = {}
        self._ended: list[tuple[float, float]] = []  # (granted, free at)
        # Not reported to Redis yet: a 429, a new limit, counts of the server. ``_observed_at`` is the latest.
        self._unreported_429, self._header_limit, self._observed_at = False, 0, -math.inf
        self._counts: list[ServerCount] = []
        self._last_passed = 0.0  # grant of the last request that the server let through after a 429

    # ----------------------------------------------------------------------------------------- grants
    def next_at(self, now: float, waiting: int = 1) -> float:  # noqa: ARG002 - reported by ``request``
        """Return ``now`` if a granted slot is left, else inf."""
        return now if self._unused and self._grants_are_valid(now) else math.inf

    def take(self, now: float) -> Slot:
        """Take a granted slot. Only when ``next_at(now) <= now``."""
        slot = Slot(now)
        self._open[slot] = self._unused.pop()
        return slot

    def is_valid(self, slot: Slot, now: float) -> bool:
        """Whether a slot may be used. If this process was suspended, another process may have it by now."""
        return not slot.ended and self._grants_are_valid(now)

    def _grants_are_valid(self, now: float) -> bool:
        return now < self._last_report_at + GRANT_TTL

    # ---------------------------------------------------------------------------------------- reports
    def sent(self, slot: Slot, now: float) -> None:
        """Record that the request left this machine."""
        slot.sent_at = now if slot.sent_at is None else slot.sent_at

    def answered(self, slot: Slot, now: float, status_code: int, quota: Quota) -> None:
        """Record a response: the server counted the request before sending it."""
        if quota.retry_after is not None:
            self._server.add_retry_after(quota.retry_after)
        came_quickly = now - slot.left_at <= self.period / 2
        counted_by = self._server.counted_by(slot.left_at, now, quota, came_quickly=came_quickly)
        granted = self._end(slot, counted_by + self.reuse_after)
        if granted is None:
            return
        if status_code == 429:
            self.cooldown.extend(now, pause_after_429(quota, self.period))
            self._unreported_429, self._report_by, self._observed_at = True, now, now
        elif self.reply.on_trial:  # the trial request passed: report it at once
            self._last_passed, self._report_by = max(self._last_passed, granted), now
        limit = min(quota.limit or self.configured, self.configured)
        if quota.limit and limit != self.limit:
            self._header_limit, self._report_by, self._observed_at = quota.limit, now, now
        if quota.remaining is None or quota.retry_after is None:
            return
        count, rest = limit - quota.remaining, min(quota.retry_after, self.period)
        # One count per burst is enough: the highest.
        others = [other for other in self._counts if abs(other.at - counted_by) > self.period / 20]
        if all(count > other.count for other in self._counts if other not in others):
            self._counts = [*others, ServerCount(count, counted_by, granted, rest)]
            self._observed_at = now
            if count > self.reply.expected:  # foreign use, which every process must know of
                self._report_by = now

    def unsent(self, slot: Slot) -> None:
        """Return the slot: the request never reached the server."""
        granted = self._end(slot, -math.inf)
        if granted:
            self._unused.append(granted)  # for the next call in the queue, or else for another process

    def unknown(self, slot: Slot, now: float) -> None:
        """Record that no response will arrive; the server may have counted the request anyway."""
        left_at = now if slot.sent_at is None else slot.sent_at
        self._end(slot, max(now, left_at + LOST_AFTER) + self.reuse_after)

    def abandon(self, now: float) -> None:
        """End every slot in flight."""
        for slot in list(self._open):
            self.unknown(slot, now)

    def _end(self, slot: Slot, free_at: float) -> float | None:
        """Record when a slot frees up; return the moment of its grant, or None if it was not open."""
        slot.ended = True
        granted = self._open.pop(slot, None)
        if granted is not None:
            self._report_by = min(self._report_by, free_at - self.period / 2)
            if free_at > -math.inf:
                self._ended.append((granted, free_at))
        return granted

    # ------------------------------------------------------------------------------------------ Redis
    def due(self) -> float:
        """Return when to send the next request to Redis; inf if there is no need."""
        due = self._report_by
        if self.waiting and self._max_grantable > 0:
            due = min(due, self._next_request_at)
        elif not self.waiting and (self._queued or self._unused):
            return -math.inf  # release what is reserved for this process
        if not self._open:
            return due
        unsent = any(slot.sent_at is None for slot in self._open)
        return min(due, self._last_report_at + (GRANT_TTL if unsent else self.slot_ttl) / 2)

    @property
    def _max_grantable(self) -> int:
        # At most twice the limit in flight: requests that hang must not fill the shared connection pool.
        return 2 * self.configured - len(self._open)

    def request(self, now: float) -> ScriptRequest:
        """Return the next request. It reports the whole state, so a lost or late one does no harm."""
        self._forget(now)
        self._unused, self._report_by, self._request_pending = [], math.inf, True
        waiting = max(0, min(self.waiting, self._max_grantable))
        return {
            "limit": self.configured,
            "reuse_after": self.reuse_after,
            "slot_ttl": self.slot_ttl,
            "hold": self.slot_ttl + GRANT_TTL,  # how long sending is on hold while every process reports
            "coalesce_within": COALESCE_WITHIN,
            "grace": GRACE,
            # Whether Redis must have this budget: it keeps a budget for longer than this.
            "known": now - self._last_reply_at < self.slot_ttl,
            # For each slot, the moment of its grant, and the seconds until it frees up, or False while open.
            "slots": [
                *([granted, False] for granted in self._open.values()),
                *([granted, free_at - now] for granted, free_at in self._ended),
            ],
            "waiting": waiting,
            "refused": int(self.refused and waiting > 0),
            "pause": self.cooldown.left(now) if self._unreported_429 else 0.0,
            "refuse": self.cooldown.refused_for(now) if self._unreported_429 else 0.0,
            "last_passed": self._last_passed,
            "header_limit": self._header_limit,
            "counts": [
                {
                    "count": report.count,
                    "age": now - report.at,
                    "granted": report.granted,
                    "rest": max(0.0, report.rest - ROUNDING) if self._server.is_precise else 0.0,
                    "valid_for": report.at + report.rest + MARGIN - now,  # the window that was counted
                }
                for report in self._counts
            ],
        }

    def apply(self, request: ScriptRequest, reply: "ScriptReply", asked_at: float, now: float) -> None:
        """Apply the reply to a request of ``asked_at``."""
        self.reply, self._last_reply_at, self._last_report_at = reply, now, asked_at
        self._request_pending = False
        self._unused = [reply.now] * reply.granted
        self._queued = request["waiting"] > reply.granted
        self._next_request_at = now + reply.wait if self._queued else -math.inf
        if self._observed_at <= asked_at:  # everything has been reported
            self._unreported_429, self._header_limit, self._counts = False, 0, []
        if not self._unreported_429:
            self.cooldown.until, self.cooldown.refused_until = now + reply.paused, now + reply.refused

    def request_failed(self, now: float) -> None:
        """Record that no reply came. Redis may have granted slots, so report again at once."""
        self._report_by, self._request_pending = now, False

    def hand_over(self, log: SlidingWindowLog) -> None:
        """Hand the requests in flight over to ``log`` while Redis is unreachable; return unsent slots."""
        for slot in list(self._open):
            if slot.sent_at is None:
                self.unsent(slot)
        log.adopt(self._open)
        self._unused = []

    def take_back(self, log: SlidingWindowLog, now: float, *, was_refused: bool) -> None:
        """Take over what ``log`` has recorded while Redis was unreachable."""
        slots, ends = log.occupied(now)
        self._open = {slot: self._open.get(slot, 0.0) for slot in slots}
        self._ended += [(0.0, end) for end in ends]
        self._report_by, self._next_request_at, self._unreported_429 = now, -math.inf, was_refused
        if was_refused:
            self.cooldown, self._observed_at = log.cooldown, now

    def _forget(self, now: float) -> None:
        """Drop slots that are long free. They are kept for a while, because a late header may count them."""
        self._ended = [slot for slot in self._ended if slot[1] + self.slot_ttl > now]

    # -------------------------------------------------------------------------------------- forecasts
    @property
    def limit(self) -> int:
        """The limit in force: a header may lower it, but not raise it."""
        return min(
            self._header_limit or self.configured, self.reply.limit or self.configured, self.configured
        )

    @property
    def foreign(self) -> int:
        """How many foreign requests the last reply reported."""
        return self.reply.foreign

    def estimate(self, now: float, ahead: int) -> float:
        """Return the least number of seconds that a call with ``ahead`` calls of this process ahead waits.

        Processes get equal shares: as many calls of each other process go first, if it has that many.
        """
        ahead += sum(min(demand, ahead) for demand in self.reply.other_demands)
        free_in = self._free_in(now)
        slots = [*[0.0] * (self.limit - len(free_in)), *free_in[-self.limit :]]
        rounds, place = divmod(ahead, self.limit)
        return max(slots[place], self.cooldown.left(now)) + rounds * self.reuse_after

    def remaining(self, now: float) -> int:
        """Return how many requests could be granted now, according to the last reply."""
        return 0 if self.cooldown.until > now else max(0, self.limit - len(self._free_in(now)))

    def resets_in(self, now: float) -> float:
        """Return the seconds until the whole limit is free again if nothing else is sent."""
        return max([*self._free_in(now), self.cooldown.left(now)])

    def _free_in(self, now: float) -> list[float]:
        passed = now - self._last_reply_at
        return sorted(left - passed for left in self.reply.free_in if left > passed)

    def idle(self, now: float) -> bool:
        """Whether there is nothing to remember or to report."""
        self._forget(now)
        held = self._open or self._ended or self._request_pending or self.cooldown.until > now
        return not held and self.due() == math.inf


@attrs.frozen
class ServerCount:
    """What the headers of a response reveal: the server had counted ``count`` requests by ``at``.

    It forgets the first of them ``rest`` seconds after it counted the request that was ``granted`` then.
    """

    count: int
    at: float
    granted: float
    rest: float


@attrs.frozen(kw_only=True)
class ScriptReply:
    """The reply of the script.

    Attributes:
        runs: How many times the script has run.
        now: The time on the clock of Redis.
        granted: Slots that this process may use.
        wait: Seconds until it should ask again.
        paused: Seconds for which no process sends.
        refused: Seconds for which the server refuses the key.
        on_trial: Whether one trial request must pass before anything else is sent.
        limit: The limit in force.
        free_in: Seconds until each occupied slot frees up, at the earliest. Lua's empty list is ``{}``.
        other_demands: How many requests each other process wants to send.
        processes: How many processes use the key.
        expected: How many requests the server can have counted.
        foreign: How many foreign requests have just shown beyond that.
    """

    runs: int = 0
    now: float = 0.0
    granted: int = 0
    wait: float = 0.0
    paused: float = 0.0
    refused: float = 0.0
    on_trial: bool = False
    limit: int = 0
    free_in: Iterable[float] = ()
    other_demands: Iterable[int] = ()
    processes: int = 0
    expected: int = 0
    foreign: int = 0
