"""``Wake``: what a webhook, a button or another thread holds to have an account synchronised now.

No locks: an event loop must not wait for a thread. What is shared changes by single steps of built-in types.
"""

from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from lemcal_async.ratelimit.wakeup import Wakeup

_FOREVER: Final = 3600.0


class Wake:
    """Made anywhere, before any event loop too; given to ``watch``, it lets others wake it.

    ``wake`` may be called from any thread and event loop, returns at once and never fails. A wake-up
    that comes while its account is being synchronised leads to another run of it. One that comes
    while nobody watches is not kept: ``watch`` begins with all accounts.
    """

    def __init__(self) -> None:
        self._listeners: dict[int, WakeListener] = {}

    def wake(self, user_id: str | None = None) -> None:
        """Have this account synchronised now, or all of them."""
        for listener in list(self._listeners.values()):
            listener.add(user_id)

    @contextmanager
    def listen(self) -> Generator["WakeListener"]:
        """Provide what receives the wake-ups of the block. In the event loop that waits for them."""
        listener = WakeListener()
        self._listeners[id(listener)] = listener
        try:
            yield listener
        finally:
            del self._listeners[id(listener)]


class WakeListener:
    """The wake-ups of one ``watch``."""

    def __init__(self) -> None:
        self._wanted: deque[str | None] = deque()
        self._wakeup = Wakeup()

    def add(self, user_id: str | None) -> None:
        """Note a wake-up, and wake."""
        self._wanted.append(user_id)
        self._wakeup.wake()

    async def wait(self) -> set[str | None]:
        """Wait for wake-ups, and return the accounts; None among them means all."""
        while True:
            self._wakeup.rearm()  # before the look: what comes after it wakes
            wanted: set[str | None] = set()
            while self._wanted:
                wanted.add(self._wanted.popleft())
            if wanted:
                return wanted
            await self._wakeup.wait(_FOREVER)
