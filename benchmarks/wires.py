"""What a call costs in CPU of this process: the whole client on each wire, beside bare HTTP clients."""

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack

import aiohttp
import anyio
import httpx
import httpx2

from benchmarks.servers import fixed_server
from benchmarks.table import Measurement, main
from lemcal_async import AsyncLemcal
from lemcal_async.ratelimit import LocalRateLimiter
from lemcal_async.transport import PooledTransport
from lemcal_async.transport.httpx2 import HTTPX2Transport

CONCURRENT = 25
CALLS = 2_000
ROUNDS = 7
IDLE = 400

Call = Callable[[], Awaitable[object]]


async def cpu_per_call(call: Call, calls: int = CALLS, concurrent: int = CONCURRENT) -> float:
    """Return the CPU seconds per call, with so many workers."""

    async def worker() -> None:
        for _ in range(calls // concurrent):
            await call()

    before = time.process_time()
    async with anyio.create_task_group() as workers:
        for _ in range(concurrent):
            workers.start_soon(worker)
    return (time.process_time() - before) / calls


async def medians(kinds: dict[str, Call]) -> dict[str, float]:
    """Return the CPU of a call of each kind, the median of rounds in which they take turns."""
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        for kind, call in kinds.items():
            taken[kind].append(await cpu_per_call(call))
    return {kind: sorted(seconds)[ROUNDS // 2] for kind, seconds in taken.items()}


def lemcal_on(base_url: str, wire: httpx.AsyncBaseTransport) -> AsyncLemcal:
    """Return a client with a limiter that never makes it wait."""
    limiter = LocalRateLimiter(limit=1_000_000)
    return AsyncLemcal("usr_x", "secret", base_url=base_url, transport=wire, limiter=limiter)


async def clients(base_url: str, with_aiohttp: bool) -> dict[str, float]:  # noqa: FBT001 - anyio.run has no keywords
    """Return the CPU of one call, by client, in seconds."""
    async with AsyncExitStack() as stack:
        bare = await stack.enter_async_context(httpx.AsyncClient(auth=("usr_x", "secret"), trust_env=False))
        fork = await stack.enter_async_context(httpx2.AsyncClient(auth=("usr_x", "secret"), trust_env=False))
        kinds: dict[str, Call] = {}

        async def with_httpx() -> object:
            return (await bare.get(f"{base_url}/me")).json()

        async def with_httpx2() -> object:
            return (await fork.get(f"{base_url}/me")).json()

        kinds["httpx"], kinds["httpx2"] = with_httpx, with_httpx2
        for name, make in (("on httpx", PooledTransport), ("on httpx2", HTTPX2Transport)):
            wire = await stack.enter_async_context(make())
            kinds[name] = lemcal_on(base_url, wire).me
        if with_aiohttp:
            session = await stack.enter_async_context(
                aiohttp.ClientSession(headers={"Authorization": aiohttp.encode_basic_auth("usr_x", "secret")})
            )

            async def aiohttp_get() -> object:
                async with session.get(f"{base_url}/me") as response:
                    return await response.json()

            kinds["aiohttp"] = aiohttp_get
        return await medians(kinds)


async def with_idle(base_url: str, kind: str, idle: int) -> float:
    """Return the CPU of one call after another, while so many connections are idle."""
    limits = httpx.Limits(max_connections=IDLE, max_keepalive_connections=IDLE)
    async with AsyncExitStack() as stack:
        if kind == "httpx":
            wire: httpx.AsyncBaseTransport = httpx.AsyncHTTPTransport(limits=limits)
            get: Call
        else:
            wire = PooledTransport(max_connections=IDLE, trust_env=False)
        client = await stack.enter_async_context(httpx.AsyncClient(transport=wire, timeout=60))
        async with anyio.create_task_group() as tasks:
            for _ in range(idle):
                tasks.start_soon(client.get, f"{base_url}/slow")
        if isinstance(wire, PooledTransport):
            get = lemcal_on(base_url, wire).me
        else:

            async def plain() -> object:
                return (await client.get(f"{base_url}/me")).json()

            get = plain
        calls = 50 if kind == "httpx" and idle > 100 else 500
        return sorted([await cpu_per_call(get, calls, 1) for _ in range(5)])[2]


def measure() -> Iterator[Measurement]:
    """Yield the figures."""
    with fixed_server() as base_url:
        for backend in ("asyncio", "trio"):
            taken = anyio.run(clients, base_url, backend == "asyncio", backend=backend)
            for name in ("httpx", "httpx2", "aiohttp"):
                if name in taken:
                    yield Measurement(f"call, {backend}: bare {name}, no limiter", taken[name] * 1e6, "µs")
            yield Measurement(f"call, {backend}: me() on httpx", taken["on httpx"] * 1e6, "µs")
            yield Measurement(f"call, {backend}: me() on httpx2", taken["on httpx2"] * 1e6, "µs")
            yield Measurement(
                f"call, {backend}: me() / bare httpx", taken["on httpx"] / taken["httpx"], "x", 0.65
            )
            yield Measurement(
                f"call, {backend}: me() on httpx2 / bare httpx2",
                taken["on httpx2"] / taken["httpx2"],
                "x",
                0.9,
            )
        idle: dict[tuple[str, int], float] = {}
        for kind in ("httpx", "me()"):
            for count in (1, 25, 100, IDLE):
                idle[kind, count] = anyio.run(with_idle, base_url, kind, count)
                what = "bare httpx" if kind == "httpx" else kind
                yield Measurement(f"call, {count} idle connections: {what}", idle[kind, count] * 1e6, "µs")
        growth = idle["me()", IDLE] / idle["me()", 1]
        yield Measurement(f"call: me() with {IDLE} idle connections / with 1", growth, "x", 1.1)


if __name__ == "__main__":
    main(measure)
