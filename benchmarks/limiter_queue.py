"""The cost of a long queue: 10,000 calls waiting on one key, and the memory of calls and keys.

No HTTP: a simulated server responds immediately, in real time.
"""

import gc
import logging
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import attrs
import httpx

from benchmarks.limiter_scenarios import LIMIT, PERIOD, Backend, Figure, Scenario
from benchmarks.virtual_time import SimulatedTransport
from lemcal_async import AsyncLemcal
from lemcal_async._headers import parse_quota
from lemcal_async.ratelimit import Key, LocalRateLimiter

CALLS = 10_000
SURVIVORS = 10
SAMPLE = 2_000  # number of waiting calls, and of keys, whose memory is traced


@attrs.frozen
class Measure:
    """One measurement of our limiter; ``bound`` is None if there is no requirement."""

    what: str
    value: float
    unit: str
    bound: float | None = None

    @property
    def missed(self) -> bool:
        """Whether the value exceeds its bound."""
        return self.bound is not None and self.value > self.bound


def measure(backend: Backend) -> list[Measure]:
    """Return all measurements, on one event loop."""
    logging.getLogger("lemcal_async").setLevel(logging.ERROR)  # the long waits are intended
    found = anyio.run(_queue, backend=backend)
    if backend == "asyncio":
        found += _memory()
    return [attrs.evolve(one, what=f"{backend}: {one.what}") for one in found]


@asynccontextmanager
async def _client() -> AsyncIterator[AsyncLemcal]:
    transport = SimulatedTransport(Scenario("queue", "", Figure()), 0)
    async with AsyncLemcal("usr_x", "secret", transport=transport, limiter=LocalRateLimiter()) as lemcal:
        yield lemcal


async def _queue() -> list[Measure]:
    """Queue the calls, serve two windows, cancel all but a few calls, and let those finish."""
    served = ended = 0
    async with _client() as lemcal:
        scopes = [anyio.CancelScope() for _ in range(CALLS + 2 * LIMIT)]

        in_turn = iter(scopes)

        async def one() -> None:
            nonlocal served, ended
            with next(in_turn):  # numbered in the order they start: trio starts tasks in any order
                await lemcal.meetings.list()
                served += 1
            ended += 1

        async with anyio.create_task_group() as tasks:
            gc.collect()
            started = time.process_time()
            for _ in scopes:
                tasks.start_soon(one)
            await _until(lambda: served >= 2 * LIMIT)
            queued = time.process_time()
            # The surviving calls are spread over the queue, and include the last one.
            for number, scope in enumerate(scopes):
                if (number + 1) % (len(scopes) // SURVIVORS):
                    scope.cancel()
            canceled_at = time.monotonic()
            await _until(lambda: ended >= len(scopes) - SURVIVORS)
            canceled = time.process_time()
        waited = time.monotonic() - canceled_at
        assert 2 * LIMIT + SURVIVORS <= served <= 4 * LIMIT
    return [
        Measure(f"CPU to queue {CALLS:,} calls and serve two windows", queued - started, "s", 1.0),
        Measure(f"CPU to cancel all but {SURVIVORS} of the calls", canceled - queued, "s", 1.0),
        Measure("time until the rest are done", waited, "s", 2 * (PERIOD + 0.1)),
    ]


def _memory() -> list[Measure]:
    tracemalloc.start()
    try:
        calls, bare, acquires = (anyio.run(_per_task, kind) for kind in (_calls, _events, _acquires))
        used, idle = anyio.run(_per_key)
    finally:
        tracemalloc.stop()
    return [
        Measure("memory per waiting call, including its task", calls, "B"),
        Measure("of which the limiter uses", acquires - bare, "B"),
        Measure("memory per key in use", used, "B"),
        Measure("memory per key idle for a minute", idle, "B", 100),
    ]


Wait = Callable[[], Coroutine[Any, Any, object]]
Waiters = Callable[[], AsyncIterator[Wait]]


async def _per_task(waiters: Waiters) -> float:
    """Return the memory in bytes of one waiting task."""
    async with asynccontextmanager(waiters)() as wait, anyio.create_task_group() as tasks:
        await wait()  # including one-time costs of the first call
        before = _traced()
        for _ in range(SAMPLE):
            tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        taken = (_traced() - before) / SAMPLE
        tasks.cancel_scope.cancel()
    return taken


async def _calls() -> AsyncIterator[Wait]:
    async with _client() as lemcal:
        yield lemcal.meetings.list


async def _acquires() -> AsyncIterator[Wait]:
    limiter, key = LocalRateLimiter(), Key("http://127.0.0.1", "digest")
    for _ in range(LIMIT - 1):
        await limiter.acquire(key)

    async def wait() -> object:
        return await limiter.acquire(key)

    yield wait


async def _events() -> AsyncIterator[Wait]:
    event: anyio.Event | None = None  # the first call does not wait

    async def wait() -> None:
        nonlocal event
        if event is None:
            event = anyio.Event()
        else:
            await event.wait()

    yield wait


async def _per_key() -> tuple[float, float]:
    """Return the memory in bytes of a recently used key, and of an idle key."""
    now = 0.0
    limiter = LocalRateLimiter(clock=lambda: now)
    quota = parse_quota(httpx.Headers({"Retry-After": "2", "X-RateLimit-Remaining": "19"}))

    async def use(keys: Iterator[Key]) -> None:
        for key in keys:
            permit = await limiter.acquire(key)
            permit.sent()
            permit.answered(200, quota)

    def keys(prefix: str, count: int) -> Iterator[Key]:
        return (Key("http://127.0.0.1", f"{prefix} {number}") for number in range(count))

    await use(keys("warm up", 1))
    before = _traced()
    await use(keys("key", SAMPLE))
    used = (_traced() - before) / SAMPLE
    now += 60.0
    await use(keys("later", 10))
    return used, max(0.0, _traced() - before) / SAMPLE


def _traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


async def _until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(60):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await anyio.sleep(0.01)
