"""The slots of one key that this process has from Redis: until when it needs each. Pure.

Redis counts a slot as used until the end that it was told last, so a process that dies loses no more
than one window. What must be told, and when at the latest, is worked out here. Times are seconds on
this process's own clock.

One key in use: the calls that wait for it, in order, and the reports of those that were served.

Nothing here waits or talks to Redis: what is new is left for the key's task, which is in ``serving``.
So a caller may be cancelled at any moment, and a report made anywhere in the event loop.
"""

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Literal

import attrs

from lemcal_async import events
from lemcal_async._concurrency import Wakeup
from lemcal_async._headers import Quota
from lemcal_async.errors import LemcalError
from lemcal_async.ratelimit._base import Key, Permit, Priority, RateLimiter, WouldWait
from lemcal_async.ratelimit._cooldown import pause_after_429
from lemcal_async.ratelimit._local import LONG_WAIT
from lemcal_async.ratelimit._queue import Queue
from lemcal_async.ratelimit.redis._budget import Budget, Lease
from lemcal_async.ratelimit.redis._fallback import Fallback

logger = logging.getLogger("lemcal_async.ratelimit")

Outcome = Literal["granted"] | WouldWait | LemcalError


@attrs.define(eq=False, repr=False)
class Waiter:
    """One call's place in the queue, and then its permit; ``limiter`` issued it."""

    limiter: RateLimiter
    account: "KeyState"
    number: int
    priority: Priority
    refused: bool  # whether the server refused this call's last attempt
    timeout: float | None
    wakeup: Wakeup
    loop: Hashable
    asked_at: float = attrs.field(init=False, default=0.0)
    ahead: int = attrs.field(init=False, default=0)  # calls of this process before it when it asked
    served: int = attrs.field(init=False, default=0)  # those of its key served until then
    lease: Lease | None = attrs.field(init=False, default=None)
    local: Permit | None = attrs.field(init=False, default=None)  # if it was granted without Redis
    outcome: Outcome | None = attrs.field(init=False, default=None)

    def decide(self, outcome: Outcome) -> None:
        """Tell the waiting task what became of it."""
        self.outcome = outcome
        self.wakeup.wake()

    # The reports of a Permit. They only leave notes, which the key's task takes to Redis.

    def sent(self) -> None:
        """Note that the request is leaving now."""
        if (lease := self._held()) is not None:
            self.account.budget.leases.sent(lease, time.monotonic())
            if self.local is not None:
                self.local.sent()
            self.account.noted()

    def answered(self, status_code: int, quota: Quota) -> float:
        """Note the answer; return the seconds for which the key is held now."""
        account, budget = self.account, self.account.budget
        hold = pause_after_429(quota, budget.period) if status_code == 429 else 0.0
        if (lease := self._held()) is not None:
            now = time.monotonic()
            budget.leases.answered(lease, now)
            budget.read(quota, now)
            if status_code == 429:
                budget.pause(now, hold)
                logger.info("the server refused key %s (429): nobody sends for %.3f s", account.key, hold)
                if events.wanted():
                    events.emit(events.Paused(account.key.short, hold))
            if self.local is not None:
                self.local.answered(status_code, quota)
            account.noted()
        return hold

    def unsent(self) -> None:
        """Give the slot back: the request never reached the server."""
        if (lease := self._held()) is not None:
            self.account.give_back(self, lease)

    def unknown(self) -> None:
        """Note that no answer will come."""
        if (lease := self._held()) is not None:
            self.account.budget.leases.unknown(lease, time.monotonic())
            if self.local is not None:
                self.local.unknown()
            self.account.noted()

    def _held(self) -> Lease | None:
        return None if self.lease is None or self.lease.end is not None else self.lease


@attrs.define(eq=False, repr=False)
class KeyState:
    """One key: its queue, what is known of its budget, and when its task looks at both again."""

    key: Key
    names: list[str]  # of its keys in Redis
    budget: Budget
    fallback: Fallback
    queue: Queue[Waiter] = attrs.field(init=False, factory=Queue[Waiter])
    wakeup: Wakeup = attrs.field(init=False, factory=Wakeup)
    wake_at: float = attrs.field(init=False, default=-math.inf)  # when its task looks again by itself
    ask_at: float = attrs.field(init=False, default=-math.inf)  # when Redis said to ask again
    in_line: bool = attrs.field(init=False, default=False)  # whether Redis keeps slots for this process
    # In order, those in the queue of which it is not known yet how long they wait.
    _undecided: OrderedDict[Waiter, None] = attrs.field(init=False, factory=OrderedDict[Waiter, None])
    _served: int = attrs.field(init=False, default=0)
    _warned: bool = attrs.field(init=False, default=False)

    # ------------------------------------------------------------------------- news for the key's task
    def look(self) -> None:
        """Have its task look at what is new."""
        self.wake_at = -math.inf
        self.wakeup.wake()

    def look_by(self, moment: float) -> None:
        """Have its task look at ``moment`` at the latest."""
        if moment < self.wake_at:
            self.wake_at = moment
            self.wakeup.wake()

    def interrupt(self) -> None:
        """Have it look even if it waits for the share of this process."""
        self.look()
        self.fallback.interrupt()

    def noted(self) -> None:
        """Have its task look in time for what a report has changed."""
        # At once if calls wait only because too many are in flight.
        capped = len(self.queue) > 0 and self.may_have <= 1
        if self.budget.urgent() or capped:
            self.look()
        else:
            self.look_by(self.budget.leases.due(time.monotonic()))

    @property
    def may_have(self) -> int:
        """How many slots more this process may have: twice the limit, less those in flight.

        So an account whose requests hang cannot fill the connection pool that it shares with others.
        """
        return 2 * self.budget.configured - self.budget.leases.in_flight

    # -------------------------------------------------------------------------------- coming and going
    def ask(self, ticket: Waiter) -> None:
        """Take a ticket into the queue, unless it is known to wait for too long."""
        now = time.monotonic()
        if refused_for := self.budget.refused_for(now):
            ticket.decide(WouldWait(refused_for, refused=True))
            return
        waits = len(self.queue) > 0
        ticket.asked_at = now
        ticket.ahead = 0 if ticket.refused else self.queue.ahead_of(ticket.priority)
        ticket.served = self._served
        if waits and self.budget.known:
            self._tell_wait(ticket, now)
            if ticket.outcome is not None:
                return
        else:
            self._undecided[ticket] = None
        self.queue.add(ticket)
        if not waits:
            self.ask_at = -math.inf
            self.look_by(-math.inf)

    def withdraw(self, ticket: Waiter) -> None:
        """Take a ticket back, whatever became of it."""
        if ticket.lease is not None:
            ticket.unsent()
            return
        self._undecided.pop(ticket, None)
        if self.queue.discard(ticket) and not len(self.queue):
            self.look()  # others may have what was to be this one's

    def tell_waits(self, now: float) -> None:
        """Tell those of which it was not known yet how long they wait."""
        while self._undecided:
            ticket, _ = self._undecided.popitem(last=False)
            self._tell_wait(ticket, now)

    def _tell_wait(self, ticket: Waiter, now: float) -> None:
        """Refuse a call that has less time than it will wait; warn of a long wait."""
        ahead = max(0, ticket.ahead - (self._served - ticket.served))
        wait = (self.fallback if self.fallback.holds(now) else self.budget).estimate(now, ahead)
        if ticket.timeout is not None and now + wait > ticket.asked_at + ticket.timeout:
            self.queue.discard(ticket)
            ticket.decide(WouldWait(wait, refused=False))
            return
        if ticket.timeout is None and wait > LONG_WAIT and not self._warned:
            self._warned = True
            logger.warning(
                "key %s: a call without a deadline will wait %.0f s for the rate limit (%d are queued); "
                "pass deadline= to be refused instead",
                self.key,
                wait,
                ahead,
            )
        if events.wanted():
            events.emit(events.Queued(self.key.short, ticket.priority, ahead))

    # ----------------------------------------------------------------------------------------- serving
    def hand_out(self, lease: Lease, local: Permit | None = None) -> None:
        """Give a slot to the next in the queue, or back."""
        now = time.monotonic()
        ticket = self.queue.head()
        if ticket is None:
            self.budget.leases.unsent(lease, now)
            if local is not None:
                local.unsent()
            return
        self._take_out(ticket)
        self._served += 1
        ticket.lease, ticket.local = lease, local
        ticket.decide("granted")
        if events.wanted():
            events.emit(events.Granted(self.key.short, ticket.priority, now - ticket.asked_at))

    def give_back(self, ticket: Waiter, lease: Lease) -> None:
        """Take a slot that was not used, for the next in the queue or else for other processes."""
        local, ticket.local, ticket.lease = ticket.local, None, None
        if local is not None:
            local.unsent()
            self.budget.leases.unsent(lease, time.monotonic())
        else:
            self.hand_out(lease)
        self.look_by(self.budget.leases.due(time.monotonic()))

    def refuse_all(self, reason: Callable[[], WouldWait | LemcalError]) -> None:
        """Tell all who wait that they do so in vain, each with an error of its own."""
        while (ticket := self.queue.head()) is not None:
            self._take_out(ticket)
            ticket.decide(reason())

    def _take_out(self, head: Waiter) -> None:
        self.queue.pop(head)
        self._undecided.pop(head, None)

    def fall_back(self, since: float, reason: str) -> None:
        """Go on without Redis, once nothing counts any more that others had from it."""
        self.budget.without = True
        self.fallback.begin(since + self.budget.leases.lifetime)
        if self.fallback.plan.when_down == "share" and events.wanted():
            events.emit(events.FellBack(self.key.short, reason))
