"""One key in use: its budget, and the task that asks Redis for slots and restates what is held."""

import time
from collections.abc import Awaitable, Callable

from lemcal_async._concurrency import Wakeup
from lemcal_async.ratelimit._base import Key
from lemcal_async.ratelimit.redis._budget import Budget


class KeyWorker(Budget):
    """Its task ``run`` lasts while there is something to do or to remember; ``exchange`` talks to Redis."""

    def __init__(
        self, key: Key, limit: int, period: float, exchange: Callable[["KeyWorker"], Awaitable[None]]
    ) -> None:
        super().__init__(limit, period)
        self.key = key
        self.runs = False
        self._exchange = exchange
        self._wakeup = Wakeup()
        self._wake_at = 0.0  # when it looks again by itself

    def look(self) -> None:
        """Have the task look in time for what is due."""
        if (due := self.due(time.monotonic())) < self._wake_at:
            self._wake_at = due
            self._wakeup.wake()

    async def run(self) -> None:
        """Talk to Redis whenever that is due."""
        self.runs = True
        while True:
            self._wakeup.rearm()
            now = time.monotonic()
            if not self.waiting and self.idle(now):
                break
            if (due := self.due(now)) <= now:
                await self._exchange(self)
            else:
                self._wake_at = min(due, now + self.turnover)
                await self._wakeup.wait(self._wake_at - now)
        self.runs = False
