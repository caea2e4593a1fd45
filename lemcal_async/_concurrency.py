"""Concurrency primitives for asyncio and trio, and preloading of anyio's backends.

``Wakeup`` is an event that any thread can set; ``FairSemaphore`` is shared fairly between accounts, which
are any hashable values.
"""

import asyncio
import math
import sys
from collections import OrderedDict
from collections.abc import Hashable
from contextlib import suppress
from importlib import import_module
from typing import Any

import anyio
from anyio.lowlevel import current_token


class Wakeup:
    """An event that one task waits for and any thread can set. Created by the waiting task."""

    __slots__ = ("event", "loop")

    def __init__(self) -> None:
        self.loop: Any = current_token().native_token  # identifies the event loop
        self.event = self._new_event()

    def _new_event(self) -> Any:
        # Not anyio.Event: every garbage collection traverses all the objects of ten thousand waiting calls.
        return asyncio.Event() if _is_asyncio(self.loop) else _TrioEvent()

    def is_loop_stopped(self) -> bool:
        """Whether the event loop is not running: paused, stopped for good, or closed."""
        # A trio loop runs until it is closed.
        return hasattr(self.loop, "is_running") and not self.loop.is_running()

    def in_this_loop(self) -> bool:
        """Whether the event loop is the one running in this thread."""
        return self.loop is _running_loop()

    async def wait(self, seconds: float) -> None:
        """Wait up to ``seconds`` for a wake-up. Returns at once if there was one since the last ``rearm``."""
        with anyio.move_on_after(seconds):
            await self.event.wait()

    def rearm(self) -> None:
        """Prepare for the next wait."""
        if self.event.is_set():
            self.event = self._new_event()

    def wake(self) -> bool:
        """Wake the task. Returns False if its event loop is closed."""
        try:
            if self.loop is _running_loop():
                self.event.set()
            elif _is_asyncio(self.loop):
                self.loop.call_soon_threadsafe(self._fire)
            else:  # a trio token
                self.loop.run_sync_soon(self._fire)
        except RuntimeError:  # "Event loop is closed", trio.RunFinishedError
            return False
        return True

    def _fire(self) -> None:
        self.event.set()  # looked up here, because rearm() may have replaced it


class _TrioEvent:
    """Like ``trio.Event``, but for a single waiting task, and with a third of the objects."""

    __slots__ = ("_is_set", "_task", "_trio")

    def __init__(self) -> None:
        self._trio = sys.modules["trio"].lowlevel
        self._is_set = False
        self._task: Any = None  # the waiting task

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        task, self._task = self._task, None
        if task is not None:
            self._trio.reschedule(task)

    async def wait(self) -> None:
        if self._is_set:
            await self._trio.checkpoint()
        else:
            self._task = self._trio.current_task()
            await self._trio.wait_task_rescheduled(self._abort)

    def _abort(self, _: object) -> Any:
        self._task = None
        return self._trio.Abort.SUCCEEDED


def _is_asyncio(native_token: object) -> bool:
    return hasattr(native_token, "call_soon_threadsafe")


def _running_loop() -> object:
    try:
        return current_token().native_token
    except RuntimeError:  # no event loop in this thread
        return None


# An account may hold up to four times as many slots as are free (the "dynamic threshold" of shared switch
# buffers): of 100 slots, the first hanging account takes 80, the second 16, the third 3; some always remain.
_SHARE = 4


class FairSemaphore:
    """A semaphore whose slots are shared fairly between accounts.

    Free slots go round-robin to accounts that hold none, then to accounts below their share; within an
    account, first in first out. One account can hold four fifths of the slots, and gets the last free slot
    only if it holds no other, so a busy or hanging account cannot starve the rest. The account None stands
    for requests that belong to no account, and is not limited.

    Belongs to one event loop. Every operation takes constant time, however many tasks wait. A waiter can be
    canceled at any moment, by a scope or natively: a slot it was just given goes to the next waiter.
    """

    def __init__(self, slots: int) -> None:
        self.free = slots
        self._held: dict[Hashable, int] = {}
        self._waiters: dict[Hashable, OrderedDict[_SlotWaiter, None]] = {}
        # Waiting accounts in round-robin order: those that hold no slot, and those that hold some.
        self._without_slots: OrderedDict[Hashable, None] = OrderedDict()
        self._with_slots: OrderedDict[Hashable, None] = OrderedDict()

    @property
    def waiting(self) -> int:
        """The number of waiting tasks."""
        return sum(map(len, self._waiters.values()))

    def acquire_nowait(self, account: Hashable) -> bool:
        """Take a slot if this account may have one now. No waiter that may have one is left waiting."""
        held = self._held.get(account, 0)
        if not (self.free > 0 if held == 0 else self._is_below_share(held)):
            return False
        self._take(account)
        return True

    async def acquire(self, account: Hashable) -> None:
        """Take a slot, waiting for one if necessary."""
        if self.acquire_nowait(account):
            return
        waiter = _SlotWaiter()
        self._waiters.setdefault(account, OrderedDict())[waiter] = None
        self._queue(account)
        try:
            await waiter.event.wait()
        except BaseException:  # canceled, or closed by the garbage collector
            if waiter.admitted:
                self.release(account)
            else:
                self._give_up(account, waiter)
            raise

    def release(self, account: Hashable) -> None:
        """Return a slot."""
        self.free += 1
        if account is not None:
            held = self._held.pop(account) - 1
            if held:
                self._held[account] = held
            elif account in self._with_slots:
                del self._with_slots[account]
                self._queue(account)
        while (following := self._next()) is not None:
            self._admit(following[0])

    def _is_below_share(self, held: int) -> bool:
        return self.free > 1 and held < _SHARE * self.free

    def _take(self, account: Hashable) -> None:
        self.free -= 1
        if account is not None:
            self._held[account] = self._held.get(account, 0) + 1

    def _queue(self, account: Hashable) -> None:
        """Append a waiting account to the round-robin."""
        turns = self._with_slots if account in self._held else self._without_slots
        turns.setdefault(account)

    def _next(self) -> "tuple[Hashable] | None":
        """Return the account whose turn it is, in a tuple, because None is a valid account."""
        if self.free and self._without_slots:
            return (next(iter(self._without_slots)),)
        # Each account skipped here holds at least four times the free slots, so there are few.
        return next(
            ((account,) for account in self._with_slots if self._is_below_share(self._held[account])), None
        )

    def _admit(self, account: Hashable) -> None:
        waiters = self._waiters[account]
        waiter, _ = waiters.popitem(last=False)
        self._leave_round(account)
        self._take(account)
        if waiters:
            self._queue(account)  # at the end
        else:
            del self._waiters[account]
        waiter.admitted = True
        waiter.event.set()

    def _give_up(self, account: Hashable, waiter: "_SlotWaiter") -> None:
        waiters = self._waiters[account]
        del waiters[waiter]
        if not waiters:
            del self._waiters[account]
            self._leave_round(account)

    def _leave_round(self, account: Hashable) -> None:
        self._without_slots.pop(account, None)
        self._with_slots.pop(account, None)


class _SlotWaiter:
    __slots__ = ("admitted", "event")

    def __init__(self) -> None:
        self.event = anyio.Event()
        self.admitted = False


def is_being_canceled() -> bool:
    """Whether the running task itself is being canceled, by an anyio scope or natively.

    A ``CancelledError`` can also come from awaiting a future that other code canceled; that is an ordinary
    failure.
    """
    if anyio.current_effective_deadline() == -math.inf:
        return True
    if not _is_asyncio(current_token().native_token):
        return False  # on trio, only scopes cancel
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def preload() -> None:
    """Import anyio's backends for asyncio and trio, if the program uses them.

    Importing them during the first call would block the event loop for 40 ms.
    """
    for library, backend in (("asyncio", "anyio._backends._asyncio"), ("trio", "anyio._backends._trio")):
        if library in sys.modules and backend not in sys.modules:
            with suppress(ModuleNotFoundError):  # another anyio version, which imports backends itself
                import_module(backend)


def is_in_event_loop() -> bool:
    """Whether an event loop is running in this thread, so that blocking calls would block it."""
    try:
        current_token()
    except RuntimeError:
        return False
    return True
