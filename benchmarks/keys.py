"""Many keys in one limiter: what a key costs in CPU and memory, in use, in flight and idle.

The clock is virtual and the server answers at once, so that nothing but the work is measured. CPU is
that of whole calls through the client, memory that of the limiter alone.
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

MANY = 10_000
MOST = 50_000
CALLS = 5_000
ROUNDS = 5
EVERY = 1.0  # seconds between two calls of one account, so that all keys stay in use


class _Server:
    """Counts like the service, on a virtual clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self._counter = COUNTERS["fixed"](20, 2.0, lambda: self.now)

    def answer(self, request: httpx.Request) -> httpx.Response:
        """Answer one request."""
        count = self._counter.count(request.headers["authorization"])
        assert count.allowed
        return httpx.Response(200, headers=rate_limit_headers(count, self.now), json={"_id": "usr_x"})


class _Calls:
    """Calls of so many accounts in turn; each account calls every ``EVERY`` seconds."""

    def __init__(self, accounts: int) -> None:
        self._server = _Server()
        limiter = LocalRateLimiter(clock=lambda: self._server.now)
        wire = httpx.MockTransport(self._server.answer)
        root = AsyncLemcal("usr_x", "secret", transport=wire, limiter=limiter)
        self._accounts = [root.for_account(f"usr_{number}", "secret") for number in range(accounts)]
        self._turn = 0

    async def cpu(self, calls: int) -> float:
        """Return the seconds of CPU that a call takes."""
        before = time.process_time()
        for _ in range(calls):
            self._server.now += EVERY / len(self._accounts)
            await self._accounts[self._turn % len(self._accounts)].me()
            self._turn += 1
        return (time.process_time() - before) / calls


def growth() -> tuple[float, float]:
    """Return the microseconds of a call with many keys, and how many times those with one key that is."""
    few, many = _Calls(1), _Calls(MANY)
    anyio.run(many.cpu, MANY)  # all of them are in use from here on
    anyio.run(few.cpu, 100)
    gc.collect()
    ratios, taken = [], []
    for _ in range(ROUNDS):
        one = anyio.run(few.cpu, CALLS)
        all_of_them = anyio.run(many.cpu, CALLS)
        ratios.append(all_of_them / one)
        taken.append(all_of_them)
    return statistics.median(taken) * 1e6, statistics.median(ratios)


async def memory(keys: int, each: int) -> tuple[float, float, float]:
    """Return the bytes of a key with ``each`` requests in flight, after their answers, and once idle."""
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
        for _ in range(1 + keys // 1000):  # others go on calling, and each call forgets up to a thousand keys
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
    yield Measurement(f"keys: CPU of a call with {MANY:,} keys in use", taken, "us")
    yield Measurement(f"keys: that of a call with 1 key, {MANY:,} times as many", ratio, "x", 1.1)
    in_flight, used, idle = anyio.run(functools.partial(memory, MOST, 1))
    each = f"keys: memory of each of {MOST:,}"
    yield Measurement(f"{each} with a request in flight", in_flight / 1024, "KiB", 4)
    yield Measurement(f"{each} after its answer", used / 1024, "KiB", 3)
    yield Measurement(f"{each} once idle", idle, "B", 100)
    _, full, _ = anyio.run(functools.partial(memory, MOST // 10, 20))
    yield Measurement(f"keys: memory of each of {MOST // 10:,} with a full window", full / 1024, "KiB", 8)


if __name__ == "__main__":
    main(measure)
