"""Waking one waiting task, from its own event loop, another one or none, asyncio and trio alike.

Who may use a connection when there are not enough: places that accounts share fairly.

Belongs to one event loop. Knows nothing of connections; an account is whatever can be told from another.
"""

import asyncio
import math
from collections import OrderedDict
from collections.abc import Hashable
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


# One account may hold so many times the places that are free (the "dynamic threshold" of the buffers that
# switches share): 80 of 100, the next that hangs 16, then 3, and each leaves the others some.
_SHARE = 4


class FairSemaphore:
    """So many ``places``, each for one request at a time.

    A free place goes to an account that has none, in turn, else to one that may have more, in turn;
    within an account, to who waited longest. An account can hold four fifths of the places, and the
    last one only if it has no other: so one that is busy, or hangs, does not keep the rest waiting.
    The account None is nobody's, and is not held to that.

    Every operation takes the same time, however many wait. Cancelled at any moment, natively too, a
    wait leaves no trace: a place that was just given goes to the next.
    """

    def __init__(self, places: int) -> None:
        self.free = places
        self._held: dict[Hashable, int] = {}
        self._waits: dict[Hashable, OrderedDict[_Wait, None]] = {}
        # The accounts that wait, in the order of their turns: those without a place, and the others.
        self._without: OrderedDict[Hashable, None] = OrderedDict()
        self._with: OrderedDict[Hashable, None] = OrderedDict()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return sum(map(len, self._waits.values()))

    async def enter(self, account: Hashable) -> None:
        """Take a place, once there is one for this account."""
        if self._may_enter(account):  # nobody who may enter is ever left waiting
            self._take(account)
            return
        wait = _Wait()
        self._waits.setdefault(account, OrderedDict())[wait] = None
        self._queue(account)
        try:
            await wait.event.wait()
        except BaseException:  # cancelled, or closed by the garbage collector
            if wait.over:
                self.leave(account)
            else:
                self._give_up(account, wait)
            raise

    def leave(self, account: Hashable) -> None:
        """Give a place back."""
        self.free += 1
        if account is not None:
            self._held[account] -= 1
            if not self._held[account]:
                del self._held[account]
                if account in self._with:
                    del self._with[account]
                    self._queue(account)
        while (following := self._next()) is not None:
            self._admit(following[0])

    def _may_enter(self, account: Hashable) -> bool:
        held = self._held.get(account, 0)
        return self.free > 0 if held == 0 else self.free > 1 and held < _SHARE * self.free

    def _take(self, account: Hashable) -> None:
        self.free -= 1
        if account is not None:
            self._held[account] = self._held.get(account, 0) + 1

    def _queue(self, account: Hashable) -> None:
        """Have an account that waits wait for its turn."""
        turns = self._with if account in self._held else self._without
        turns.setdefault(account)

    def _next(self) -> "tuple[Hashable] | None":
        """Return whose turn it is; the account is wrapped, for it may be None itself."""
        if self.free and self._without:
            return (next(iter(self._without)),)
        # Those that may not enter hold four times the free places and more each: they are few.
        return next(((account,) for account in self._with if self._may_enter(account)), None)

    def _admit(self, account: Hashable) -> None:
        waits = self._waits[account]
        wait, _ = waits.popitem(last=False)
        self._forget(account)
        self._take(account)
        if waits:
            self._queue(account)  # behind the others
        else:
            del self._waits[account]
        wait.over = True
        wait.event.set()

    def _give_up(self, account: Hashable, wait: "_Wait") -> None:
        waits = self._waits[account]
        del waits[wait]
        if not waits:
            del self._waits[account]
            self._forget(account)

    def _forget(self, account: Hashable) -> None:
        self._without.pop(account, None)
        self._with.pop(account, None)


class _Wait:
    __slots__ = ("event", "over")

    def __init__(self) -> None:
        self.event = anyio.Event()
        self.over = False


def is_being_canceled() -> bool:
    """Whether the running task itself is being canceled, by an anyio scope or natively.

    A ``CancelledError`` can also come from awaiting what somebody else canceled, such as a future: that one
    is a failure like any other.
    """
    if anyio.current_effective_deadline() == -math.inf:
        return True
    if not hasattr(current_token().native_token, "call_soon_threadsafe"):
        return False  # trio, where nobody cancels but scopes
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
