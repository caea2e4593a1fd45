"""The streaQ engine: batches of turns are tasks in the streams of a Redis (7 or later) or Valkey.

streaQ's own scheduling is not used, because a single script empties its delayed queue, however long. Task
data is JSON. If a Redis error ends a worker, the fleet restarts it.
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
    raise ImportError("a fleet requires the extra fleet: pip install 'lemcal-async[fleet]'") from None

from lemcal_async._auth import Secret
from lemcal_async.fleet._engine import Batch, EngineError, Queue, TakeTurns, Turn

_TASK: Final = "turns"
_WOKEN, _SCHEDULED = "woken", "scheduled"
_WORKER_TIMEOUT: Final = 60.0  # seconds until a dead worker's batch goes to another worker
_MAX_TRIES: Final = 3  # for a batch whose workers die; after that, its accounts come due again


class StreaqEngine:
    """A queue in the Redis at ``url``; ``name`` distinguishes the queues of several fleets."""

    def __init__(self, url: Secret[str], name: str) -> None:
        self._url = url
        self._name = name

    @asynccontextmanager
    async def connect(self) -> AsyncGenerator[Queue]:
        """Connect through a streaQ worker that runs no tasks."""
        worker = self._create_worker(1)
        raised: Exception | None = None
        with _engine_errors():
            async with worker:
                try:
                    yield _StreaqQueue(worker)
                except Exception as error:  # noqa: BLE001  # raised below, so that it is not wrapped in a group
                    raised = error
        if raised is not None:
            raise raised

    def _create_worker(self, concurrency: int) -> "_Worker":
        return _Worker(
            redis_url=self._url.reveal(),
            queue_name=self._name,
            concurrency=concurrency,
            prefetch=1,  # a wake-up cannot overtake prefetched batches
            priorities=[_SCHEDULED, _WOKEN],
            serializer=_dumps,
            deserializer=json.loads,
            idle_timeout=_WORKER_TIMEOUT,
        )

    async def run(self, take: TakeTurns, *, concurrency: int, stop: anyio.Event) -> None:
        """Take batches."""
        worker = self._create_worker(concurrency)
        worker.stop = stop

        async def turns(batch: list[tuple[str, float | None]]) -> None:
            await take([Turn(user_id, claimed) for user_id, claimed in batch])

        # Results are not needed; if a batch fails, its accounts come due again.
        worker.task(name=_TASK, max_tries=_MAX_TRIES, silent=True, ttl=0)(turns)
        with _engine_errors():
            await worker.run_async()


class _StreaqQueue:
    def __init__(self, worker: "_Worker") -> None:
        self._worker = worker

    async def put(self, batches: Sequence[Batch]) -> None:
        """Queue batches."""
        worker = self._worker
        tasks = [
            worker.enqueue_unsafe(_TASK, [(turn.user_id, turn.claimed) for turn in batch]).start(
                priority=_WOKEN if batch[0].claimed is None else _SCHEDULED
            )
            for batch in batches
        ]
        with _engine_errors():
            await worker.enqueue_many(tasks)

    async def depth(self) -> int:
        """Return the number of queued batches that no worker has started."""
        worker = self._worker
        with _engine_errors():
            queued = await worker.queue_size(include_scheduled=False)
            running = await worker.redis.scard(f"{worker.prefix}:index:running")
        return max(0, queued - running)

    async def workers(self) -> int:
        """Return the number of workers with a recent health entry."""
        worker = self._worker
        found = 0
        with _engine_errors():
            async for _ in worker.redis.scan_iter(match=f"{worker.prefix}:health:*"):
                found += 1
        return found


class _Worker(Worker[Any]):
    """A worker that ends when ``stop`` is set, and leaves signals and running turns to the fleet."""

    stop: anyio.Event

    async def signal_handler(self, scope: anyio.CancelScope) -> None:
        await self.stop.wait()
        scope.cancel()

    async def run_consumers(self, receive: Any, *arguments: Any, **options: Any) -> None:
        streams = _StreamClones(receive)
        try:
            await super().run_consumers(streams, *arguments, **options)  # type: ignore[arg-type]
        finally:
            streams.close()

    async def producer(self, queue: Any, *arguments: Any, **options: Any) -> None:
        with queue:
            await super().producer(queue, *arguments, **options)


class _StreamClones:
    """A stream that closes its clones, which streaQ leaves open when its tasks are canceled."""

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
def _engine_errors() -> Generator[None]:
    """Turn errors of Redis and streaQ, grouped or not, into an EngineError without the URL."""
    try:
        yield
    except (RedisError, OSError, TimeoutError) as error:
        text = f"{type(error).__name__}: {error}"
    except BaseExceptionGroup as group:
        unrelated = group.split((RedisError, OSError, TimeoutError))[1]
        if unrelated is not None:
            raise
        text = _first_error_text(group)
    else:
        return
    raise EngineError(f"the queue failed: {text}")


def _first_error_text(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        inner: tuple[BaseException, ...] = error.exceptions  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        error = inner[0]
    return f"{type(error).__name__}: {error}"
