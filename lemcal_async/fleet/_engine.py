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


Batch: TypeAlias = Sequence[Turn]
"""Turns that go to one worker, which takes one after the other: a queue costs as much for many as for one."""

TakeTurns: TypeAlias = Callable[[Batch], Awaitable[None]]
"""Takes the turns of a batch to their end. It raises nothing but a cancellation."""


class Queue(Protocol):
    """A connection to the queue. All methods raise EngineError."""

    async def put(self, batches: Sequence[Batch]) -> None:
        """Queue batches; those that begin with a woken account pass the others."""
        ...

    async def depth(self) -> int:
        """Return how many batches are queued and not begun."""
        ...

    async def workers(self) -> int:
        """Return how many workers take turns."""
        ...


class Engine(Protocol):
    """What carries turns from those who know what is due to the workers."""

    def connect(self) -> AbstractAsyncContextManager[Queue]:
        """Connect to the queue for as long as the block lasts. Raises EngineError."""
        ...

    async def run(self, take: TakeTurns, *, concurrency: int, stop: anyio.Event) -> None:
        """Take batches, so many at once, until ``stop`` is set and those under way have ended.

        Raises EngineError.
        """
        ...


class MemoryEngine:
    """A queue in this process, for tests and for a fleet of one process."""

    def __init__(self) -> None:
        self._woken: deque[Batch] = deque()
        self._swept: deque[Batch] = deque()
        self._news = anyio.Event()
        self._workers = 0

    @asynccontextmanager
    async def connect(self) -> AsyncGenerator[Queue]:
        """Nothing is to be connected."""
        yield self

    async def put(self, batches: Sequence[Batch]) -> None:
        """Queue batches."""
        for batch in batches:
            (self._woken if batch[0].claimed is None else self._swept).append(batch)
        self._news.set()

    async def depth(self) -> int:
        """Return how many are queued."""
        return len(self._woken) + len(self._swept)

    async def workers(self) -> int:
        """Return how many workers there are in this process."""
        return self._workers

    async def run(self, take: TakeTurns, *, concurrency: int, stop: anyio.Event) -> None:
        """Take batches."""
        self._workers += 1
        try:
            async with anyio.create_task_group() as tasks:
                for _ in range(concurrency):
                    tasks.start_soon(self._take_batches, take, stop)
                await stop.wait()
                self._news.set()
        finally:
            self._workers -= 1

    async def _take_batches(self, take: TakeTurns, stop: anyio.Event) -> None:
        while not stop.is_set():
            queue = self._woken or self._swept
            if queue:
                await take(queue.popleft())
            else:
                if self._news.is_set():
                    self._news = anyio.Event()
                await self._news.wait()
