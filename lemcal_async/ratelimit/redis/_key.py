"""One key in use: its queue, its budget, and the task that exchanges both with Redis."""

import math
from collections.abc import Awaitable, Callable

from lemcal_async._concurrency import Wakeup
from lemcal_async.ratelimit._base import Key
from lemcal_async.ratelimit._log import SlidingWindowLog
from lemcal_async.ratelimit._waiters import KeyState
from lemcal_async.ratelimit.redis._budget import Budget


class KeyWorker(KeyState):
    """The state of one key. ``log`` is the budget, or a log of this process alone while Redis is down."""

    __slots__ = ("_exchange", "_wake_at", "_wakeup", "budget", "clock", "is_running", "redis_is_down")

    def __init__(
        self,
        key: Key,
        budget: Budget,
        clock: Callable[[], float],
        exchange: Callable[["KeyWorker"], Awaitable[None]],
    ) -> None:
        super().__init__(key, budget)
        self.budget = budget
        self.clock = clock
        self.is_running = False  # whether a task executes ``run``
        self.redis_is_down = False
        self._exchange = exchange
        self._wakeup = Wakeup()
        self._wake_at = 0.0  # when the task wakes up on its own

    def schedule(self) -> bool:
        """Wake the task up in time for the next exchange; return whether a task is needed at all."""
        head = self.queue.head()
        self.budget.waiting, self.budget.refused = len(self.queue), head is not None and head.refused
        if (due := self.budget.due()) < self._wake_at:
            self._wake_at = due
            self._wakeup.wake()
        return head is not None or not self.log.idle(self.clock())

    async def run(self) -> None:
        """Exchange the state with Redis whenever that is due, until there is nothing left to remember."""
        while self.schedule():
            self._wakeup.rearm()
            now = self.clock()
            due = math.inf if self.redis_is_down else self.budget.due()
            if due <= now:
                await self._exchange(self)
            else:
                self._wake_at = min(due, now + self.budget.reuse_after)
                await self._wakeup.wait(self._wake_at - now)
        self.is_running = False

    def fall_back(self, log: SlidingWindowLog | None, starts: float) -> None:
        """Continue without Redis: with ``log``, from ``starts`` on, or without sending if it is None."""
        self.redis_is_down = True
        if log is not None:
            log.cooldown.until = max(starts, self.budget.cooldown.until)
            self.budget.hand_over(log)
            self.log = log

    def recover(self, started: float) -> None:
        """Return to Redis after a fallback that ``started`` then."""
        if isinstance(self.log, SlidingWindowLog):
            was_refused = self.log.cooldown.until > started
            self.budget.take_back(self.log, self.clock(), was_refused=was_refused)
        self.log, self.redis_is_down = self.budget, False
