"""The interface of the queue engines that carry a fleet's turns, and the in-memory engine.

An engine only has to be fast: it may lose turns or deliver them twice, because the schedule in the database
is authoritative.
"""

from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol, TypeAlias

import anyio
import attrs

from lemcal_async.errors import LemcalError


class EngineError(LemcalError):
    """The queue is unreachable or failed. The schedule is intact, and its accounts come due again."""


@attrs.frozen
class Turn:
    """One synchronization of an account. ``claimed`` identifies the claim, and is None after a wake-up."""

    user_id: str
    claimed: float | None = None


Batch: TypeAlias = Sequence[Turn]
"""Turns that one worker takes in sequence. Queueing a batch costs as much as queueing one turn."""

TakeTurns: TypeAlias = Callable[[Batch], Awaitable[None]]
"""Runs the turns of a batch to completion. Raises nothing except when canceled."""


class Queue(Protocol):
    """A connection to the queue. All methods raise EngineError."""

    async def put(self, batches: Sequence[Batch]) -> None:
        """Queue batches; a batch that begins with a woken account goes first."""
        ...

    async def depth(self) -> int:
        """Return the number of queued batches that no worker has started."""
        ...

    async def workers(self) -> int:
        """Return the number of workers."""
        ...


class Engine(Protocol):
    """Carries turns from the schedule to the workers."""

    def connect(self) -> AbstractAsyncContextManager[Queue]:
        """Connect to the queue for as long as the block lasts. Raises EngineError."""
        ...

    async def run(self, take: TakeTurns, *, concurrency: int, stop: anyio.Event) -> None:
        """Take up to ``concurrency`` batches at once, until ``stop`` is set and running batches have ended.

        Raises EngineError.
        """
        ...


class MemoryEngine:
    """An in-memory queue, for tests and for a fleet within one process."""

    def __init__(self) -> None:
        self._woken: deque[Batch] = deque()
        self._scheduled: deque[Batch] = deque()
        self._changed = anyio.Event()
        self._workers = 0

    @asynccontextmanager
    async def connect(self) -> AsyncGenerator[Queue]:
        """Return the queue itself; there is nothing to connect to."""
        yield self

    async def put(self, batches: Sequence[Batch]) -> None:
        """Queue batches."""
        for batch in batches:
            (self._woken if batch[0].claimed is None else self._scheduled).append(batch)
        self._changed.set()

    async def depth(self) -> int:
        """Return the number of queued batches."""
        return len(self._woken) + len(self._scheduled)

    async def workers(self) -> int:
        """Return the number of workers in this process."""
        return self._workers

    async def run(self, take: TakeTurns, *, concurrency: int, stop: anyio.Event) -> None:
        """Take batches."""
        self._workers += 1
        try:
            async with anyio.create_task_group() as tasks:
                for _ in range(concurrency):
                    tasks.start_soon(self._take_batches, take, stop)
                await stop.wait()
                self._changed.set()
        finally:
            self._workers -= 1

    async def _take_batches(self, take: TakeTurns, stop: anyio.Event) -> None:
        while not stop.is_set():
            queue = self._woken or self._scheduled
            if queue:
                await take(queue.popleft())
            else:
                if self._changed.is_set():
                    self._changed = anyio.Event()
                await self._changed.wait()
