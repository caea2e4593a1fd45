"""What this process knows of one key's budget in Redis: what to ask, and what follows from the answer.

Pure: the clock, and what waits here, are for ``account`` and ``serving``; the slots are ``Leases``. Times
are seconds on this process's own clock.
"""

import math

from lemcal_async.headers import Quota
from lemcal_async.ratelimit.past import MARGIN
from lemcal_async.ratelimit.pause import Pause
from lemcal_async.ratelimit.protocol import RateLimit
from lemcal_async.ratelimit.redis.leases import Lease, Leases
from lemcal_async.ratelimit.redis.script import Answer, Ask, Used

SETTLING = 0.5  # seconds after an outage in which all processes find out that Redis is back

UNKNOWN = Answer(
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
        self._pause = Pause()
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

    def ask(self, now: float, waiting: int, refused: int) -> Ask:
        """Return what to ask Redis now, all reports included."""
        fresh = now - self.heard_at <= self.leases.lifetime
        used = Used(0, 0.0)
        if self._used is not None and (left := self._used.window - (now - self._used_at)) > 0:
            used = Used(self._used.requests, left)
        ask = Ask(
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

    def hear(self, ask: Ask, answer: Answer, asked_at: float, now: float) -> None:
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

    def unheard(self, ask: Ask, now: float) -> None:
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
        self._pause.order(now, seconds)
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
