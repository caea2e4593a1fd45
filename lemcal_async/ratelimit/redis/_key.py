"""One key in use: its queue, its budget, and the task that asks Redis for slots and restates what is held."""

import math
from collections.abc import Awaitable, Callable

from lemcal_async._concurrency import Wakeup
from lemcal_async.ratelimit._base import Key
from lemcal_async.ratelimit._log import SlidingWindowLog
from lemcal_async.ratelimit._waiters import KeyState
from lemcal_async.ratelimit.redis._budget import Budget


class KeyWorker(KeyState):
    """``log`` is the budget, and while Redis is away the log of what this process may do alone."""

    __slots__ = ("_exchange", "_wake_at", "_wakeup", "away", "budget", "clock", "runs")

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
        self.runs = False  # whether its task does
        self.away = False  # whether it goes on without Redis
        self._exchange = exchange
        self._wakeup = Wakeup()
        self._wake_at = 0.0  # when the task looks again by itself

    def look(self) -> bool:
        """Have the task look in time for what is due; return whether it is needed."""
        head = self.queue.head()
        self.budget.waiting, self.budget.refused = len(self.queue), head is not None and head.refused
        if (due := self.budget.due()) < self._wake_at:
            self._wake_at = due
            self._wakeup.wake()
        return head is not None or not self.log.idle(self.clock())

    async def run(self) -> None:
        """Talk to Redis whenever that is due, while there is something to do or to remember."""
        while self.look():
            self._wakeup.rearm()
            now = self.clock()
            due = math.inf if self.away else self.budget.due()
            if due <= now:
                await self._exchange(self)
            else:
                self._wake_at = min(due, now + self.budget.turnover)
                await self._wakeup.wait(self._wake_at - now)
        self.runs = False

    def fall_back(self, log: SlidingWindowLog | None, begins: float) -> None:
        """Go on without Redis; with a log alone from then on, without one not at all."""
        self.away = True
        if log is not None:
            log.cooldown.until = max(begins, self.budget.cooldown.until)
            self.budget.hand_over(log)
            self.log = log

    def come_back(self, begun: float) -> None:
        """Go back to Redis."""
        if isinstance(self.log, SlidingWindowLog):
            was_refused = self.log.cooldown.until > begun
            self.budget.take_back(self.log, self.clock(), was_refused=was_refused)
        self.log, self.away = self.budget, False
