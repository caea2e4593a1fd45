"""Many keys in one limiter: CPU and memory per key, in use, in flight and idle.

The clock is virtual and the server responds immediately, so that only CPU work is measured. CPU figures are
for whole calls through the client, memory figures for the limiter alone.
"""

import functools
import gc
import statistics
import time
import tracemalloc
from collections.abc import Iterator

import anyio
import httpx

from benchmarks.table import Measurement, main
from lemcal_async import AsyncLemcal
from lemcal_async._headers import Quota
from lemcal_async.ratelimit import Key, LocalRateLimiter, Permit
from lemcal_async.sandbox._ratelimit import COUNTERS, rate_limit_headers

MANY_KEYS = 10_000
MOST_KEYS = 50_000
CALLS = 5_000
ROUNDS = 5
INTERVAL = 1.0  # seconds between two calls of an account, so that all keys stay in use


class _Server:
    """Counts requests like the service, on a virtual clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self._counter = COUNTERS["fixed"](20, 2.0, lambda: self.now)

    def respond(self, request: httpx.Request) -> httpx.Response:
        """Respond to a request."""
        count = self._counter.count(request.headers["authorization"])
        assert count.allowed
        return httpx.Response(200, headers=rate_limit_headers(count, self.now), json={"_id": "usr_x"})


class _Calls:
    """Calls of several accounts in turn; each account makes a call every ``INTERVAL`` seconds."""

    def __init__(self, accounts: int) -> None:
        self._server = _Server()
        limiter = LocalRateLimiter(clock=lambda: self._server.now)
        wire = httpx.MockTransport(self._server.respond)
        root = AsyncLemcal("usr_x", "secret", transport=wire, limiter=limiter)
        self._accounts = [root.for_account(f"usr_{number}", "secret") for number in range(accounts)]
        self._turn = 0

    async def cpu(self, calls: int) -> float:
        """Return the CPU seconds per call."""
        before = time.process_time()
        for _ in range(calls):
            self._server.now += INTERVAL / len(self._accounts)
            await self._accounts[self._turn % len(self._accounts)].me()
            self._turn += 1
        return (time.process_time() - before) / calls


def growth() -> tuple[float, float]:
    """Return the CPU microseconds of a call with many keys, and the ratio to a call with one key."""
    few, many = _Calls(1), _Calls(MANY_KEYS)
    anyio.run(many.cpu, MANY_KEYS)  # all keys are in use from here on
    anyio.run(few.cpu, 100)
    gc.collect()
    ratios, times = [], []
    for _ in range(ROUNDS):
        with_one = anyio.run(few.cpu, CALLS)
        with_many = anyio.run(many.cpu, CALLS)
        ratios.append(with_many / with_one)
        times.append(with_many)
    return statistics.median(times) * 1e6, statistics.median(ratios)


async def memory(keys: int, each: int) -> tuple[float, float, float]:
    """Return the bytes per key with ``each`` requests in flight, after their responses, and once idle."""
    server = _Server()
    limiter = LocalRateLimiter(clock=lambda: server.now)
    names = [Key("https://api.example.com", f"{number:032x}") for number in range(keys)]
    permits: list[Permit] = []
    gc.collect()
    tracemalloc.start()
    try:
        for name in names:
            for _ in range(each):
                permits.append(await limiter.acquire(name))
                permits[-1].sent()
        in_flight = _traced() / keys
        for number, permit in enumerate(permits):
            remaining = 19 - number % each
            permit.answered(200, Quota(limit=20, remaining=remaining, retry_after=1.999, resets_in=1.999))
        permits.clear()
        used = _traced() / keys
        server.now += 60.0
        for _ in range(1 + keys // 1000):  # each later call removes up to a thousand idle keys
            (await limiter.acquire(names[0])).unsent()
        return in_flight, used, _traced() / keys
    finally:
        tracemalloc.stop()


def _traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def measure() -> Iterator[Measurement]:
    """Yield the figures."""
    taken, ratio = growth()
    yield Measurement(f"keys: CPU of a call with {MANY_KEYS:,} keys in use", taken, "us")
    yield Measurement(f"keys: CPU of a call with {MANY_KEYS:,} keys / with 1", ratio, "x", 1.1)
    in_flight, used, idle = anyio.run(functools.partial(memory, MOST_KEYS, 1))
    each = f"keys: memory of each of {MOST_KEYS:,}"
    yield Measurement(f"{each} with a request in flight", in_flight / 1024, "KiB", 4)
    yield Measurement(f"{each} after its response", used / 1024, "KiB", 3)
    yield Measurement(f"{each} once idle", idle, "B", 100)
    _, full, _ = anyio.run(functools.partial(memory, MOST_KEYS // 10, 20))
    yield Measurement(
        f"keys: memory of each of {MOST_KEYS // 10:,} with a full window", full / 1024, "KiB", 8
    )


if __name__ == "__main__":
    main(measure)
