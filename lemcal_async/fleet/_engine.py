"""What a fleet asks of the engine that carries its turns, and the engine of a single process.

An engine may lose what it was given, and may hand a turn out twice: the schedule in the database knows
better. So it only has to be quick.
"""

from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol, TypeAlias

import anyio
import attrs

from lemcal_async.errors import LemcalError


class EngineError(LemcalError):
    """The queue cannot be reached, or failed. The schedule is unharmed: its accounts come up again."""


@attrs.frozen
class Turn:
    """An account to be synchronized. ``claimed`` tells which claim this is for; None: somebody woke it."""

    user_id: str
    claimed: float | None = None


TakeTurn: TypeAlias = Callable[[Turn], Awaitable[None]]
"""Takes a turn to its end. It raises nothing but a cancellation."""


class Queue(Protocol):
    """A connection to the queue of turns. All methods raise EngineError."""

    async def put(self, turns: Sequence[Turn]) -> None:
        """Queue turns; those of woken accounts pass the others."""
        ...

    async def depth(self) -> int:
        """Return how many turns are queued and not begun."""
        ...

    async def workers(self) -> int:
        """Return how many workers take turns."""
        ...


class Engine(Protocol):
    """What carries turns from those who know what is due to the workers."""

    def connect(self) -> AbstractAsyncContextManager[Queue]:
        """Connect to the queue for as long as the block lasts. Raises EngineError."""
        ...

    async def run(self, take: TakeTurn, *, concurrency: int, stop: anyio.Event) -> None:
        """Take turns, so many at once, until ``stop`` is set and those under way have ended.

        Raises EngineError.
        """
        ...


class MemoryEngine:
    """A queue in this process, for tests and for a fleet of one process."""

    def __init__(self) -> None:
        self._woken: deque[Turn] = deque()
        self._swept: deque[Turn] = deque()
        self._news = anyio.Event()
        self._workers = 0

    @asynccontextmanager
    async def connect(self) -> AsyncGenerator[Queue]:
        """Nothing is to be connected."""
        yield self

    async def put(self, turns: Sequence[Turn]) -> None:
        """Queue turns."""
        for turn in turns:
            (self._swept if turn.claimed is not None else self._woken).append(turn)
        self._news.set()

    async def depth(self) -> int:
        """Return how many are queued."""
        return len(self._woken) + len(self._swept)

    async def workers(self) -> int:
        """Return how many workers there are in this process."""
        return self._workers

    async def run(self, take: TakeTurn, *, concurrency: int, stop: anyio.Event) -> None:
        """Take turns."""
        self._workers += 1
        try:
            async with anyio.create_task_group() as tasks:
                for _ in range(concurrency):
                    tasks.start_soon(self._take_turns, take, stop)
                await stop.wait()
                self._news.set()
        finally:
            self._workers -= 1

    async def _take_turns(self, take: TakeTurn, stop: anyio.Event) -> None:
        while not stop.is_set():
            queue = self._woken or self._swept
            if queue:
                await take(queue.popleft())
            else:
                if self._news.is_set():
                    self._news = anyio.Event()
                await self._news.wait()
