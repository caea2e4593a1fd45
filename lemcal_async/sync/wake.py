"""``Wake``: what a webhook, a button or another thread holds to have an account synchronised now."""

import threading
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
        self._lock = threading.Lock()
        self._listeners: list[WakeListener] = []

    def wake(self, user_id: str | None = None) -> None:
        """Have this account synchronised now, or all of them."""
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener.add(user_id)

    @contextmanager
    def listen(self) -> Generator["WakeListener"]:
        """Provide what receives the wake-ups of the block. In the event loop that waits for them."""
        listener = WakeListener()
        with self._lock:
            self._listeners.append(listener)
        try:
            yield listener
        finally:
            with self._lock:
                self._listeners.remove(listener)


class WakeListener:
    """The wake-ups of one ``watch``."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted: set[str | None] = set()
        self._wakeup = Wakeup()

    def add(self, user_id: str | None) -> None:
        """Note a wake-up, and wake."""
        with self._lock:
            self._wanted.add(user_id)
        self._wakeup.wake()

    async def wait(self) -> set[str | None]:
        """Wait for wake-ups, and return the accounts; None among them means all."""
        while True:
            self._wakeup.rearm()  # before the look: what comes after it wakes
            with self._lock:
                wanted, self._wanted = self._wanted, set()
            if wanted:
                return wanted
            await self._wakeup.wait(_FOREVER)
