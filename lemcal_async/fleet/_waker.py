"""Waking an account of a fleet, as a webhook does."""

import logging
from collections.abc import Sequence

from lemcal_async.errors import ConfigurationError
from lemcal_async.fleet._engine import EngineError, Queue, Turn
from lemcal_async.sync._schedule import Schedule

logger = logging.getLogger("lemcal_async.fleet")


class FleetWaker:
    """Has accounts synchronized now. ``WebhookReceiver(…, wake=…)`` takes one."""

    def __init__(self, schedule: Schedule, queue: Queue | None) -> None:
        self._schedule = schedule
        self._queue = queue

    async def wake(self, user_id: str | None = None) -> None:
        """Return when the wake-up is stored in the database: from then on it is not lost.

        Raises ConfigurationError if the account is not in the fleet, StoreError if the database fails.
        """
        if user_id is None:
            raise ConfigurationError("a fleet is woken account by account: wake(user_id)")
        if not await self.wake_many([user_id]):
            raise ConfigurationError(f"{user_id} is not in the fleet; fleet.add([{user_id!r}]) adds it")

    async def wake_many(self, user_ids: Sequence[str]) -> int:
        """Wake several; return how many are in the fleet."""
        known = await self._schedule.wake(user_ids)
        if known and self._queue is not None:
            try:
                await self._queue.put([[Turn(user_id)] for user_id in user_ids])
            except EngineError as error:
                # It is in the database, and a worker that looks there finds it.
                logger.warning("wake-ups reach the workers half a second later: %s", error)
        return known
