"""The engine on streaQ: batches of turns as tasks in the streams of a Redis (7 or later) or Valkey.

streaQ's own schedule is not used: its delayed queue is emptied by one script, however long. Task data is
JSON. A worker that a Redis error has ended is started again by the fleet.
"""

import json
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import anyio

try:
    from coredis.exceptions import RedisError
    from streaq import Worker
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] not in {"coredis", "streaq", "crontab"}:
        raise
    raise ImportError("a fleet's queue needs the extra fleet: pip install 'lemcal-async[fleet]'") from None

from lemcal_async._auth import Secret
from lemcal_async.fleet._engine import Batch, EngineError, Queue, TakeTurns, Turn

_TASK: Final = "turns"
_WOKEN, _SWEPT = "woken", "swept"
_UNRESPONSIVE: Final = 60.0  # seconds until the batch of a worker that died is handed to another
_TRIES: Final = 3  # of a batch whose workers die; the schedule goes on with its accounts


class StreaqEngine:
    """A queue in the Redis at ``url``; ``name`` tells the queues of several fleets apart."""

    def __init__(self, url: Secret[str], name: str) -> None:
        self._url = url
        self._name = name

    @asynccontextmanager
    async def connect(self) -> AsyncGenerator[Queue]:
        """Connect, by a worker that never works."""
        worker = self._make(1)
        raised: Exception | None = None
        with _translated():
            async with worker:
                try:
                    yield _StreaqQueue(worker)
                except Exception as error:  # noqa: BLE001  # raised below, or a group would come of it
                    raised = error
        if raised is not None:
            raise raised

    def _make(self, concurrency: int) -> "_Worker":
        return _Worker(
            redis_url=self._url.reveal(),
            queue_name=self._name,
            concurrency=concurrency,
            prefetch=1,  # what is fetched ahead of time cannot be passed by a wake-up
            priorities=[_SWEPT, _WOKEN],
            serializer=_dumps,
            deserializer=json.loads,
            idle_timeout=_UNRESPONSIVE,
        )

    async def run(self, take: TakeTurns, *, concurrency: int, stop: anyio.Event) -> None:
        """Take batches."""
        worker = self._make(concurrency)
        worker.stop = stop

        async def turns(batch: list[tuple[str, float | None]]) -> None:
            await take([Turn(user_id, claimed) for user_id, claimed in batch])

        # Results are for nobody; what cannot be taken, the database brings up again.
        worker.task(name=_TASK, max_tries=_TRIES, silent=True, ttl=0)(turns)
        with _translated():
            await worker.run_async()


class _StreaqQueue:
    def __init__(self, worker: "_Worker") -> None:
        self._worker = worker

    async def put(self, batches: Sequence[Batch]) -> None:
        """Queue batches."""
        worker = self._worker
        tasks = [
            worker.enqueue_unsafe(_TASK, [(turn.user_id, turn.claimed) for turn in batch]).start(
                priority=_WOKEN if batch[0].claimed is None else _SWEPT
            )
            for batch in batches
        ]
        with _translated():
            await worker.enqueue_many(tasks)

    async def depth(self) -> int:
        """Return how many batches are queued and not begun."""
        worker = self._worker
        with _translated():
            queued = await worker.queue_size(include_scheduled=False)
            running = await worker.redis.scard(f"{worker.prefix}:index:running")
        return max(0, queued - running)

    async def workers(self) -> int:
        """Return how many workers have lately said that they are there."""
        worker = self._worker
        found = 0
        with _translated():
            async for _ in worker.redis.scan_iter(match=f"{worker.prefix}:health:*"):
                found += 1
        return found


class _Worker(Worker[Any]):
    """A worker that ends when it is told to, and leaves signals and turns under way to the fleet."""

    stop: anyio.Event

    async def signal_handler(self, scope: anyio.CancelScope) -> None:
        await self.stop.wait()
        scope.cancel()

    async def run_consumers(self, receive: Any, *arguments: Any, **options: Any) -> None:
        streams = _Clones(receive)
        try:
            await super().run_consumers(streams, *arguments, **options)  # type: ignore[arg-type]
        finally:
            streams.close()

    async def producer(self, queue: Any, *arguments: Any, **options: Any) -> None:
        with queue:
            await super().producer(queue, *arguments, **options)


class _Clones:
    """A stream whose clones are closed with it: streaQ leaves them open when its tasks are cut short."""

    def __init__(self, stream: Any) -> None:
        self._streams = [stream]

    def clone(self) -> Any:
        self._streams.append(self._streams[0].clone())
        return self._streams[-1]

    def close(self) -> None:
        for stream in self._streams:
            stream.close()


def _dumps(value: Any) -> str:
    return json.dumps(value, default=repr)


@contextmanager
def _translated() -> Generator[None]:
    """Have what Redis and streaQ raise, also in groups, become an EngineError; without the URL."""
    try:
        yield
    except (RedisError, OSError, TimeoutError) as error:
        text = f"{type(error).__name__}: {error}"
    except BaseExceptionGroup as group:
        others = group.split((RedisError, OSError, TimeoutError))[1]
        if others is not None:
            raise
        text = _first(group)
    else:
        return
    raise EngineError(f"the queue failed: {text}")


def _first(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        inner: tuple[BaseException, ...] = error.exceptions  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        error = inner[0]
    return f"{type(error).__name__}: {error}"
