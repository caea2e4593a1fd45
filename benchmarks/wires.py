"""What a call costs in CPU of this process: the whole client on each wire, beside bare HTTP clients.

Under real conditions: 200 accounts, the limit that lemcal has, a server that counts as lemcal does. Every
round has new accounts, and none of them more calls than its limit allows, so that nobody waits.
"""

import itertools
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
CALLS = 2_000
ACCOUNTS = 200
ROUNDS = 7
IDLE = 400
ROUTES = {"me()": "/me", "meetings.list()": "/meetings"}

Call = Callable[[], Awaitable[object]]
MakeCall = Callable[[str, str], Call]  # from a user id and the name of a call
Bare = Callable[[AsyncExitStack, str], Awaitable[MakeCall]]

_rounds = itertools.count()


async def cpu_per_call(calls: list[Call], times: int = CALLS, concurrent: int = CONCURRENT) -> float:
    """Return the CPU seconds per call, with so many workers, the calls by turns."""
    remaining = itertools.islice(itertools.cycle(calls), times)

    async def worker() -> None:
        for call in remaining:
            await call()

    before = time.process_time()
    async with anyio.create_task_group() as workers:
        for _ in range(concurrent):
            workers.start_soon(worker)
    return (time.process_time() - before) / times


async def with_httpx(stack: AsyncExitStack, base_url: str) -> MakeCall:
    """Return what a program on httpx does."""
    client = await stack.enter_async_context(httpx.AsyncClient(trust_env=False))
    return plain(client, base_url)


async def with_httpx2(stack: AsyncExitStack, base_url: str) -> MakeCall:
    """Return what a program on httpx2 does."""
    client = await stack.enter_async_context(httpx2.AsyncClient(trust_env=False))
    return plain(client, base_url)


def plain(client: Any, base_url: str) -> MakeCall:
    """Return the calls of a client without limiter, retries and models."""

    def make(user_id: str, name: str) -> Call:
        url, auth = base_url + ROUTES[name], (user_id, "secret")

        async def call() -> object:
            return (await client.get(url, auth=auth)).json()

        return call

    return make


async def with_aiohttp(stack: AsyncExitStack, base_url: str) -> MakeCall:
    """Return what a program on aiohttp does."""
    session = await stack.enter_async_context(aiohttp.ClientSession())

    def make(user_id: str, name: str) -> Call:
        headers = {"Authorization": aiohttp.encode_basic_auth(user_id, "secret")}

        async def call() -> object:
            async with session.get(base_url + ROUTES[name], headers=headers) as response:
                return await response.json()

        return call

    return make


def with_lemcal(wire: Callable[[], Any]) -> Bare:
    """Return the whole client on a wire, with a sibling for each account."""

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


CLIENTS: dict[str, Bare] = {
    "bare httpx": with_httpx,
    "bare httpx2": with_httpx2,
    "bare aiohttp": with_aiohttp,
    "on httpx": with_lemcal(PooledTransport),
    "on httpx2": with_lemcal(HTTPX2Transport),
    "on aiohttp": with_lemcal(AiohttpTransport),
}
# Each wire, what it is beside, and how much of that it may cost.
RATIOS = [
    ("on httpx", "bare httpx", 0.45),
    ("on httpx2", "bare httpx2", 0.9),
    ("on aiohttp", "bare httpx", 0.25),
]


async def clients(base_url: str, backend: str) -> dict[tuple[str, str], float]:
    """Return the CPU of one call in seconds, by client and call: the median of rounds that take turns."""
    async with AsyncExitStack() as stack:
        makers = {
            name: await open_client(stack, base_url)
            for name, open_client in CLIENTS.items()
            if backend == "asyncio" or "aiohttp" not in name
        }
        taken: dict[tuple[str, str], list[float]] = {}
        for _ in range(ROUNDS):
            for (name, make), route in itertools.product(makers.items(), ROUTES):
                number = next(_rounds)
                calls = [make(f"usr_{number}_{account}", route) for account in range(ACCOUNTS)]
                taken.setdefault((name, route), []).append(await cpu_per_call(calls))
        return {kind: sorted(seconds)[ROUNDS // 2] for kind, seconds in taken.items()}


async def with_idle(base_url: str, kind: str, idle: int) -> float:
    """Return the CPU of one call after another, while so many connections are idle."""
    limits = httpx.Limits(max_connections=IDLE, max_keepalive_connections=IDLE)
    async with AsyncExitStack() as stack:
        wire: httpx.AsyncBaseTransport
        if kind == "httpx":
            wire = httpx.AsyncHTTPTransport(limits=limits)
        else:
            wire = PooledTransport(max_connections=IDLE, trust_env=False)
        client = await stack.enter_async_context(httpx.AsyncClient(transport=wire, timeout=60))
        async with anyio.create_task_group() as tasks:
            for _ in range(idle):
                tasks.start_soon(client.get, f"{base_url}/slow")
        call = plain(client, base_url)("usr_x", "me()")
        if kind != "httpx":
            limiter = LocalRateLimiter(limit=1_000_000)
            call = AsyncLemcal("usr_x", "secret", base_url=base_url, transport=wire, limiter=limiter).me
        calls = 50 if kind == "httpx" and idle > 100 else 500
        return sorted([await cpu_per_call([call], calls, 1) for _ in range(5)])[2]


def measure() -> Iterator[Measurement]:
    """Yield the figures."""
    with counting_server() as base_url:
        for backend in ("asyncio", "trio"):
            taken = anyio.run(clients, base_url, backend, backend=backend)
            for (name, route), seconds in taken.items():
                yield Measurement(f"call, {backend}: {route}, {name}", seconds * 1e6, "µs")
            for (ours, theirs, bound), route in itertools.product(RATIOS, ROUTES):
                if (ours, route) in taken:
                    ratio = taken[ours, route] / taken[theirs, route]
                    yield Measurement(f"call, {backend}: {route}, {ours} / {theirs}", ratio, "x", bound)
    with fixed_server() as base_url:
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
