"""What one process knows of one key's budget: what to ask Redis, and what follows from the reply. Pure.

To the queue of the local limiter it is what ``SlidingWindowLog`` is there. Times are seconds on this
process's own clock. What goes to ``script.lua`` and comes back are durations, so no two machines' clocks are
compared; only the moment of a grant is one on the clock of Redis, which the script alone reads again.
"""

import math
from collections.abc import Iterable
from typing import Any, TypeAlias

import attrs

from lemcal_async._headers import Quota
from lemcal_async.ratelimit._log import SlidingWindowLog
from lemcal_async.ratelimit._server import ROUNDING, ServerModel
from lemcal_async.ratelimit._slots import LOST_AFTER, MARGIN, Cooldown, Slot, pause_after_429

LAPSE = 0.5  # seconds for which a slot may be used without news from Redis; after that it is given back
TOGETHER = 0.01  # seconds; slots that come free so soon after the first are fetched along with it
GRACE = 0.25  # seconds; a process that comes later than that for its slots leaves them to others

ScriptRequest: TypeAlias = dict[str, Any]
"""What one process holds, knows and wants of one budget, as JSON has it: see ``Budget.request``."""


class Budget:
    """The slots of one process, and what it last heard from Redis.

    A slot is open until its request is answered: only that proves that the server has counted it. Redis
    keeps an open slot for ``lifetime``, so the process restates what it holds before that is over.
    """

    def __init__(self, limit: int, period: float, server: ServerModel | None = None) -> None:
        self.configured = limit
        self.period = period
        self._server = server or ServerModel(period)
        self.turnover = period + MARGIN  # from when a request was counted until its slot is used again
        self.lifetime = LAPSE + self.turnover
        self.cooldown = Cooldown()
        self.waiting = 0  # calls in the queue,
        self.refused = False  # and whether the server refused the first of them before
        self.reply = ScriptReply()
        self._heard_at = self._restated_at = -math.inf  # restated: when Redis was last told of all slots
        self._report_by = math.inf  # when it must hear what has changed since
        self._ask_at = -math.inf  # when it said to ask for slots again
        self._in_line = self._asking = False  # whether it keeps slots for this process, and is being asked
        self._stock: list[float] = []  # the slots that it has granted, and nobody has taken yet
        # Slots in flight, and when those that are answered come free, by the moment of the grant on its clock
        # (0: without it).
        self._open: dict[Slot, float] = {}
        self._ended: list[tuple[float, float]] = []
        # What it has not heard yet: a 429, a new limit, how many requests the server had counted.
        self._was_refused, self._header_limit, self._read_at = False, 0, -math.inf
        self._told: list[Told] = []
        self._passed = 0.0  # when the last request was granted that was let through after a 429

    # ----------------------------------------------------------------------------------------- grants
    def next_at(self, now: float, waiting: int = 1) -> float:  # noqa: ARG002 - what ``request`` asks for
        """Return ``now`` if Redis has granted a slot, else inf."""
        return now if self._stock and self._is_fresh(now) else math.inf

    def take(self, now: float) -> Slot:
        """Grant one request. Only when ``next_at(now) <= now``."""
        slot = Slot(now)
        self._open[slot] = self._stock.pop()
        return slot

    def is_valid(self, slot: Slot, now: float) -> bool:
        """Whether a slot may be used: if the process stood still, others may have it by now."""
        return not slot.ended and self._is_fresh(now)

    def _is_fresh(self, now: float) -> bool:
        return now < self._restated_at + LAPSE

    # ---------------------------------------------------------------------------------------- reports
    def sent(self, slot: Slot, now: float) -> None:
        """Note that the request left the machine."""
        slot.sent_at = now if slot.sent_at is None else slot.sent_at

    def answered(self, slot: Slot, now: float, status_code: int, quota: Quota) -> None:
        """Take in an answer: the server counted the request before it."""
        if quota.retry_after is not None:
            self._server.heard(quota.retry_after)
        came_quickly = now - slot.left_at <= self.period / 2
        counted_by = self._server.counted_by(slot.left_at, now, quota, came_quickly=came_quickly)
        granted = self._end(slot, counted_by + self.turnover)
        if granted is None:
            return
        if status_code == 429:
            self.cooldown.extend(now, pause_after_429(quota, self.period))
            self._was_refused, self._report_by, self._read_at = True, now, now
        elif self.reply.looking:  # the others follow
            self._passed, self._report_by = max(self._passed, granted), now
        limit = min(quota.limit or self.configured, self.configured)
        if quota.limit and limit != self.limit:
            self._header_limit, self._report_by, self._read_at = quota.limit, now, now
        if quota.remaining is None or quota.retry_after is None:
            return
        count, rest = limit - quota.remaining, min(quota.retry_after, self.period)
        # One per burst is enough: the one that says most.
        others = [told for told in self._told if abs(told.at - counted_by) > self.period / 20]
        if all(count > told.count for told in self._told if told not in others):
            self._told, self._read_at = [*others, Told(count, counted_by, granted, rest)], now
            if count > self.reply.expected:  # somebody else's requests, of which all must hear
                self._report_by = now

    def unsent(self, slot: Slot) -> None:
        """Give the slot back: the request never reached the server."""
        granted = self._end(slot, -math.inf)
        if granted:
            self._stock.append(granted)  # for the next in the queue, or else for other processes

    def unknown(self, slot: Slot, now: float) -> None:
        """Note that no answer will come, and that the server may have counted the request."""
        left_at = now if slot.sent_at is None else slot.sent_at
        self._end(slot, max(now, left_at + LOST_AFTER) + self.turnover)

    def abandon(self, now: float) -> None:
        """End all that is in flight."""
        for slot in list(self._open):
            self.unknown(slot, now)

    def _end(self, slot: Slot, end: float) -> float | None:
        """Note when a slot comes free; return when it was granted, None if it was not open."""
        slot.ended = True
        granted = self._open.pop(slot, None)
        if granted is not None:
            self._report_by = min(self._report_by, end - self.period / 2)
            if end > -math.inf:
                self._ended.append((granted, end))
        return granted

    # ------------------------------------------------------------------------------------------ Redis
    def due(self) -> float:
        """Return when Redis is to be asked or told something; inf if there is no need."""
        due = self._report_by
        if self.waiting and self._may_have > 0:
            due = min(due, self._ask_at)
        elif not self.waiting and (self._in_line or self._stock):
            return -math.inf  # others may have what was kept for this process
        if not self._open:
            return due
        unsent = any(slot.sent_at is None for slot in self._open)
        return min(due, self._restated_at + (LAPSE if unsent else self.lifetime) / 2)

    @property
    def _may_have(self) -> int:
        # Twice the limit in flight at most: requests that hang must not fill the shared connection pool.
        return 2 * self.configured - len(self._open)

    def request(self, now: float) -> ScriptRequest:
        """Return what to ask Redis. All is restated, so a request that is lost or late does no harm."""
        self._forget(now)
        self._stock, self._report_by, self._asking = [], math.inf, True
        waiting = max(0, min(self.waiting, self._may_have))
        return {
            "limit": self.configured,
            "turnover": self.turnover,
            "lifetime": self.lifetime,
            "hold": self.lifetime + LAPSE,  # how long nobody sends after an outage, while all restate
            "together": TOGETHER,
            "grace": GRACE,
            # Whether the budget must exist: Redis keeps it for longer than this.
            "known": now - self._heard_at < self.lifetime,
            # Each slot, with the seconds until it comes free, or False while it is open.
            "slots": [
                *([granted, False] for granted in self._open.values()),
                *([granted, end - now] for granted, end in self._ended),
            ],
            "waiting": waiting,
            "refused": int(self.refused and waiting > 0),
            "pause": self.cooldown.left(now) if self._was_refused else 0.0,
            "refuse": self.cooldown.refused_for(now) if self._was_refused else 0.0,
            "passed": self._passed,
            "header_limit": self._header_limit,
            "told": [
                {
                    "count": told.count,
                    "age": now - told.at,
                    "granted": told.granted,
                    "rest": max(0.0, told.rest - ROUNDING) if self._server.is_precise else 0.0,
                    "window": told.at + told.rest + MARGIN - now,  # for which they still count
                }
                for told in self._told
            ],
        }

    def apply(self, request: ScriptRequest, reply: "ScriptReply", asked_at: float, now: float) -> None:
        """Take in the reply to a request of ``asked_at``."""
        self.reply, self._heard_at, self._restated_at, self._asking = reply, now, asked_at, False
        self._stock = [reply.now] * reply.granted
        self._in_line = request["waiting"] > reply.granted
        self._ask_at = now + reply.wait if self._in_line else -math.inf
        if self._read_at <= asked_at:  # nothing is news any more
            self._was_refused, self._header_limit, self._told = False, 0, []
        if not self._was_refused:
            self.cooldown.until, self.cooldown.refused_until = now + reply.paused, now + reply.refused

    def unheard(self, now: float) -> None:
        """Note that no reply came: Redis may have granted slots that nobody will use."""
        self._report_by, self._asking = now, False

    def hand_over(self, log: SlidingWindowLog) -> None:
        """Go on with ``log`` while Redis is away: only what has been sent stays in flight."""
        for slot in list(self._open):
            if slot.sent_at is None:
                self.unsent(slot)
        log.adopt(self._open)
        self._stock = []

    def take_back(self, log: SlidingWindowLog, now: float, *, was_refused: bool) -> None:
        """Go back to Redis with what ``log`` holds by now."""
        slots, ends = log.occupied(now)
        self._open = {slot: self._open.get(slot, 0.0) for slot in slots}
        self._ended += [(0.0, end) for end in ends]
        self._report_by, self._ask_at, self._was_refused = now, -math.inf, was_refused
        if was_refused:
            self.cooldown, self._read_at = log.cooldown, now

    def _forget(self, now: float) -> None:
        """Drop what is over; not at once, because a late header may still count it."""
        self._ended = [slot for slot in self._ended if slot[1] + self.lifetime > now]

    # -------------------------------------------------------------------------------------- forecasts
    @property
    def limit(self) -> int:
        """The limit in force: a header may lower it, never raise it."""
        return min(
            self._header_limit or self.configured, self.reply.limit or self.configured, self.configured
        )

    @property
    def foreign(self) -> int:
        """How many requests of somebody else Redis has just learned of."""
        return self.reply.foreign

    def estimate(self, now: float, ahead: int) -> float:
        """Return the seconds that a request with ``ahead`` others of this process before it waits at least.

        Processes are served in turn: as many requests of each other one go before it, if it has so many.
        """
        ahead += sum(min(want, ahead) for want in self.reply.others)
        frees = self._frees(now)
        slots = [*[0.0] * (self.limit - len(frees)), *frees[-self.limit :]]
        rounds, place = divmod(ahead, self.limit)
        return max(slots[place], self.cooldown.left(now)) + rounds * self.turnover

    def remaining(self, now: float) -> int:
        """Return how many requests could be granted now, as far as this process has heard."""
        return 0 if self.cooldown.until > now else max(0, self.limit - len(self._frees(now)))

    def resets_in(self, now: float) -> float:
        """Return the seconds until the whole limit is free again, if nothing else is sent."""
        return max([*self._frees(now), self.cooldown.left(now)])

    def _frees(self, now: float) -> list[float]:
        passed = now - self._heard_at
        return sorted(left - passed for left in self.reply.frees if left > passed)

    def idle(self, now: float) -> bool:
        """Whether there is nothing to remember or to report."""
        self._forget(now)
        held = self._open or self._ended or self._asking or self.cooldown.until > now
        return not held and self.due() == math.inf


@attrs.frozen
class Told:
    """What an answer said: the server had counted ``count`` requests by ``at``.

    It forgets the first of them ``rest`` seconds after it counted the one that was ``granted`` then.
    """

    count: int
    at: float
    granted: float
    rest: float


@attrs.frozen(kw_only=True)
class ScriptReply:
    """What the script said.

    ``granted`` slots are this process's; it is to ask again in ``wait``. Nobody sends for ``paused``, and
    the server refuses the key for ``refused``. While ``looking``, one request goes before the others.
    ``frees`` has when each slot in use comes free at the earliest, ``others`` how many requests each
    other process wants to send, ``processes`` how many there are. The server can know of ``expected``
    requests; ``foreign`` more were somebody else's. The script had run ``count`` times.
    """

    count: int = 0
    now: float = 0.0
    granted: int = 0
    wait: float = 0.0
    paused: float = 0.0
    refused: float = 0.0
    looking: bool = False
    limit: int = 0
    frees: Iterable[float] = ()  # Lua's empty list is {}
    others: Iterable[int] = ()
    processes: int = 0
    expected: int = 0
    foreign: int = 0
