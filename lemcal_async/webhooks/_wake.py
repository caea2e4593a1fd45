"""Waking a synchronization: at most one wake-up per account at a time, shared by all who wait for it."""

import inspect
from typing import Protocol, runtime_checkable

import anyio

from lemcal_async._callbacks import no_foreign_cancellation
from lemcal_async.webhooks._batch import Batches
from lemcal_async.webhooks._http import log_error


@runtime_checkable
class Wakes(Protocol):
    """What a delivery wakes: ``lemcal_async.sync.Wake``, or a fleet's waker."""

    def wake(self, user_id: str | None = None) -> object:
        """Have this account synchronized now. What it returns is awaited, if it can be.

        Called in the event loop: a plain function must return at once. What it raises counts as a
        failure: the delivery is to come again.
        """
        ...


class Waker:
    """Wakes one account at most once in 0.75 s, however many deliveries ask for it."""

    def __init__(self, wakes: Wakes) -> None:
        self._wakes = wakes
        self._batches = Batches[None, bool]()

    async def wake(self, user_id: str, until: float) -> bool:
        """Whether a wake-up that began after the call succeeded before ``until``, by the loop's clock."""

        async def call(asked: list[None], seconds: float) -> list[bool]:
            return [await self._wake(user_id, seconds)] * len(asked)

        return await self._batches.of(user_id).ask(None, until, call) or False

    async def _wake(self, user_id: str, seconds: float) -> bool:
        try:
            with anyio.fail_after(seconds), no_foreign_cancellation():
                outcome = self._wakes.wake(user_id)
                if inspect.isawaitable(outcome):
                    await outcome
        except Exception as error:  # noqa: BLE001 - logged, and the delivery comes again
            log_error(error, "%s could not be woken; the delivery is to come again", user_id)
            return False
        return True
