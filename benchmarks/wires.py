"""CPU time of a call in this process: the whole client on each wire, compared with bare HTTP clients.

The conditions are realistic: 200 accounts, lemcal's limit, and a server that counts as lemcal does. Each
round has new accounts, and no account exceeds its limit, so that no call waits.

Clients are measured one after the other, in alternating order, each after a garbage collection. The ratio of
two clients is the median of the ratios of all rounds, because a temporary slowdown of the machine affects
both.
"""

import gc
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import anyio
import httpx
import httpx2

from benchmarks.servers import counting_server, fixed_server
from benchmarks.table import Measurement, main
from lemcal_async import AsyncLemcal
from lemcal_async.ratelimit import LocalRateLimiter
from lemcal_async.transport import PooledTransport
from lemcal_async.transport.aiohttp import AiohttpTransport
from lemcal_async.transport.httpx2 import HTTPX2Transport

CONCURRENT = 25
CALLS = 1_500
ACCOUNTS = 200
ROUNDS = 4
IDLE = (1, 25, 100, 400)
KEEPALIVE = 600.0  # seconds, so long that no connection expires during the benchmark
ROUTES = {"me()": "/me", "meetings.list()": "/meetings"}

Call = Callable[[], Awaitable[object]]
MakeCall = Callable[[str, str], Call]  # arguments: a user id, and a key of ROUTES
OpenClient = Callable[[AsyncExitStack, str], Awaitable[MakeCall]]

_rounds = itertools.count()


async def cpu_per_call(calls: list[Call], times: int = CALLS, concurrent: int = CONCURRENT) -> float:
    """Return the CPU seconds per call; ``concurrent`` workers make the calls in turn."""
    remaining = itertools.islice(itertools.cycle(calls), times)

    async def worker() -> None:
        for call in remaining:
            await call()

    gc.collect()
    before = time.process_time()
    async with anyio.create_task_group() as workers:
        for _ in range(concurrent):
            workers.start_soon(worker)
    return (time.process_time() - before) / times


async def with_httpx(stack: AsyncExitStack, base_url: str) -> MakeCall:
    """Open a bare httpx client."""
    client = await stack.enter_async_context(httpx.AsyncClient(trust_env=False))
    return plain(client, base_url)


async def with_httpx2(stack: AsyncExitStack, base_url: str) -> MakeCall:
    """Open a bare httpx2 client."""
    client = await stack.enter_async_context(httpx2.AsyncClient(trust_env=False))
    return plain(client, base_url)


def plain(client: Any, base_url: str) -> MakeCall:
    """Return calls through a client without limiter, retries and models."""

    def make(user_id: str, name: str) -> Call:
        url, auth = base_url + ROUTES[name], (user_id, "secret")

        async def call() -> object:
            return (await client.get(url, auth=auth)).json()

        return call

    return make


async def with_aiohttp(stack: AsyncExitStack, base_url: str) -> MakeCall:
    """Open a bare aiohttp client."""
    session = await stack.enter_async_context(aiohttp.ClientSession())

    def make(user_id: str, name: str) -> Call:
        headers = {"Authorization": aiohttp.encode_basic_auth(user_id, "secret")}

        async def call() -> object:
            async with session.get(base_url + ROUTES[name], headers=headers) as response:
                return await response.json()

        return call

    return make


def with_lemcal(wire: Callable[[], Any]) -> OpenClient:
    """Return a function that opens the whole client on a wire, with a sibling for each account."""

    async def open_client(stack: AsyncExitStack, base_url: str) -> MakeCall:
        transport = await stack.enter_async_context(wire())
        root = AsyncLemcal(
            "usr_root", "secret", base_url=base_url, transport=transport, limiter=LocalRateLimiter()
        )

        def make(user_id: str, name: str) -> Call:
            sibling = root.for_account(user_id, "secret")
            return sibling.me if name == "me()" else sibling.meetings.list

        return make

    return open_client


CLIENTS: dict[str, OpenClient] = {
    "on httpx": with_lemcal(PooledTransport),
    "bare httpx": with_httpx,
    "on aiohttp": with_lemcal(AiohttpTransport),
    "bare aiohttp": with_aiohttp,
    "on httpx2": with_lemcal(HTTPX2Transport),
    "bare httpx2": with_httpx2,
}
# Each client, its peer, and the bound of their ratio.
RATIOS = [
    ("on httpx", "bare httpx", 0.45),
    ("on httpx2", "bare httpx2", 0.9),
    ("on aiohttp", "bare httpx", 0.25),
]


Times = dict[tuple[str, str], list[float]]  # CPU seconds of a call in each round, by client and call


async def clients(base_url: str, backend: str) -> Times:
    """Measure each call of each client, in interleaved rounds."""
    async with AsyncExitStack() as stack:
        makers = [
            (name, await open_client(stack, base_url))
            for name, open_client in CLIENTS.items()
            if backend == "asyncio" or "aiohttp" not in name
        ]
        taken: Times = {}
        for _ in range(ROUNDS):
            makers.reverse()
            for route, (name, make) in itertools.product(ROUTES, makers):
                number = next(_rounds)
                calls = [make(f"usr_{number}_{account}", route) for account in range(ACCOUNTS)]
                taken.setdefault((name, route), []).append(await cpu_per_call(calls))
        return taken


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Return the median of the ratios of corresponding rounds."""
    return statistics.median(own / peer for own, peer in zip(ours, theirs, strict=True))


async def with_idle(base_url: str, kind: str) -> dict[int, list[float]]:
    """Return the CPU seconds of sequential calls by number of idle connections, in interleaved rounds."""
    async with AsyncExitStack() as stack:
        calls = {count: await call_with_idle(stack, base_url, kind, count) for count in IDLE}
        taken: dict[int, list[float]] = {count: [] for count in IDLE}
        for _ in range(ROUNDS):
            for count, call in calls.items():
                times = 50 if kind == "httpx" and count > 100 else 500
                taken[count].append(await cpu_per_call([call], times, 1))
        return taken


async def call_with_idle(stack: AsyncExitStack, base_url: str, kind: str, idle: int) -> Call:
    """Return a call of a client that has ``idle`` idle connections."""
    most = max(IDLE)
    wire: httpx.AsyncBaseTransport
    if kind == "httpx":
        limits = httpx.Limits(
            max_connections=most, max_keepalive_connections=most, keepalive_expiry=KEEPALIVE
        )
        wire = httpx.AsyncHTTPTransport(limits=limits)
    else:
        wire = PooledTransport(max_connections=most, keepalive=KEEPALIVE, trust_env=False)
    client = await stack.enter_async_context(httpx.AsyncClient(transport=wire, timeout=60))
    async with anyio.create_task_group() as tasks:
        for _ in range(idle):
            tasks.start_soon(client.get, f"{base_url}/slow")
    if kind == "httpx":
        return plain(client, base_url)("usr_x", "me()")
    limiter = LocalRateLimiter(limit=1_000_000)
    return AsyncLemcal("usr_x", "secret", base_url=base_url, transport=wire, limiter=limiter).me


def measure() -> Iterator[Measurement]:
    """Yield the figures."""
    with counting_server() as base_url:
        for backend in ("asyncio", "trio"):
            taken = anyio.run(clients, base_url, backend, backend=backend)
            for (name, route), seconds in taken.items():
                middle = statistics.median(seconds) * 1e6
                yield Measurement(f"call, {backend}: {route}, {name}", middle, "µs")
            for (ours, theirs, bound), route in itertools.product(RATIOS, ROUTES):
                if (ours, route) in taken:
                    ratio = median_ratio(taken[ours, route], taken[theirs, route])
                    yield Measurement(f"call, {backend}: {route}, {ours} / {theirs}", ratio, "x", bound)
    with fixed_server() as base_url:
        for kind, name in (("httpx", "bare httpx"), ("me()", "me()")):
            idle = anyio.run(with_idle, base_url, kind)
            for count, seconds in idle.items():
                middle = statistics.median(seconds) * 1e6
                yield Measurement(f"call, {count} idle connections: {name}", middle, "µs")
            if kind == "me()":
                most = max(IDLE)
                growth = median_ratio(idle[most], idle[1])
                yield Measurement(f"call: me() with {most} idle connections / with 1", growth, "x", 1.1)


if __name__ == "__main__":
    main(measure)
