"""Waking one waiting task, from its own event loop, another one or none, asyncio and trio alike."""

from typing import Any

import anyio
from anyio.lowlevel import current_token


class Wakeup:
    """What one task waits on, and any thread may set. Made by the task that waits."""

    __slots__ = ("event", "loop")

    def __init__(self) -> None:
        self.event = anyio.Event()
        self.loop: Any = current_token().native_token  # the same for tasks of one event loop only

    def stands_still(self) -> bool:
        """Whether its event loop is not running: stopped for a while, or for good, or closed."""
        # That of trio runs until it is gone.
        return hasattr(self.loop, "is_running") and not self.loop.is_running()

    async def wait(self, seconds: float) -> None:
        """Wait until woken, for so many seconds at most. A wake-up before the wait counts too."""
        with anyio.move_on_after(seconds):
            await self.event.wait()

    def rearm(self) -> None:
        """Make ready for the next wait."""
        if self.event.is_set():
            self.event = anyio.Event()

    def wake(self) -> bool:
        """Wake the task; False if its event loop is gone."""
        try:
            if self.loop is _running_loop():
                self.event.set()
            elif hasattr(self.loop, "call_soon_threadsafe"):  # asyncio
                self.loop.call_soon_threadsafe(self._fire)
            else:  # a trio token
                self.loop.run_sync_soon(self._fire)
        except RuntimeError:  # "Event loop is closed", trio.RunFinishedError
            return False
        return True

    def _fire(self) -> None:
        self.event.set()  # the event of then, which may not be the one of now


def _running_loop() -> object:
    try:
        return current_token().native_token
    except RuntimeError:  # no event loop in this thread
        return None
