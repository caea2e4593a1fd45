"""Each limiter, used before a request as its own documentation recommends.

A peer says when to send; httpx sends, and tenacity retries refused requests after ``Retry-After``. Our
client does all of that itself. Each is imported only when used: see virtual_time.py.
"""

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta

import anyio
import httpx
import tenacity

from benchmarks.limiter_scenarios import LIMIT, PERIOD
from benchmarks.limiter_server import Target
from lemcal_async import AsyncLemcal
from lemcal_async.ratelimit import LocalRateLimiter

OURS = "lemcal-async"
KEY = "one key"

Call = Callable[[int], Awaitable[object]]
Wait = Callable[[], Awaitable[object]]
Opened = AbstractAsyncContextManager[Wait]


@asynccontextmanager
async def _no_limiter() -> AsyncGenerator[Wait]:
    async def at_once() -> None:
        """Do not wait: leave it to the retries."""

    yield at_once


@asynccontextmanager
async def _aiolimiter() -> AsyncGenerator[Wait]:
    from aiolimiter import AsyncLimiter

    limiter = AsyncLimiter(LIMIT, PERIOD)
    yield limiter.acquire


@asynccontextmanager
async def _pyrate_limiter() -> AsyncGenerator[Wait]:
    from pyrate_limiter import Duration, Limiter, Rate

    limiter = Limiter(Rate(LIMIT, int(PERIOD) * Duration.SECOND))
    with contextlib.closing(limiter):

        async def wait() -> None:
            await limiter.try_acquire_async(KEY)

        yield wait


def _throttled(using: str) -> Callable[[], Opened]:
    @asynccontextmanager
    async def open_throttled() -> AsyncGenerator[Wait]:
        from throttled.asyncio import MemoryStore, Throttled, rate_limiter

        throttle = Throttled(
            key=KEY,
            using=using,
            quota=rate_limiter.per_duration(timedelta(seconds=PERIOD), limit=LIMIT),
            store=MemoryStore(),
            timeout=600,
        )

        async def wait() -> None:
            result = await throttle.limit()
            if result.limited:
                raise TimeoutError("no permit within ten minutes")

        yield wait

    return open_throttled


@asynccontextmanager
async def _limits() -> AsyncGenerator[Wait]:
    from limits import RateLimitItemPerSecond
    from limits.aio.storage import MemoryStorage
    from limits.aio.strategies import MovingWindowRateLimiter

    limiter = MovingWindowRateLimiter(MemoryStorage())
    item = RateLimitItemPerSecond(LIMIT, int(PERIOD))

    async def wait() -> None:
        while not await limiter.hit(item, KEY):
            window = await limiter.get_window_stats(item, KEY)
            await anyio.sleep(max(0.0, window.reset_time - time.time()))

    yield wait


PEERS: dict[str, Callable[[], Opened]] = {
    "pyrate-limiter": _pyrate_limiter,
    "limits, moving window": _limits,
    "throttled-py, token bucket": _throttled("token_bucket"),
    "throttled-py, GCRA": _throttled("gcra"),
    "throttled-py, sliding window": _throttled("sliding_window"),
    "aiolimiter": _aiolimiter,
    "tenacity alone": _no_limiter,
}


def open_caller(
    name: str, target: Target, transport: httpx.AsyncBaseTransport | None
) -> AbstractAsyncContextManager[Call]:
    """Return a context that makes the numbered calls of one account; without a transport, on the network."""
    return _ours(target, transport) if name == OURS else _peer(PEERS[name](), target, transport)


@asynccontextmanager
async def _ours(target: Target, transport: httpx.AsyncBaseTransport | None) -> AsyncIterator[Call]:
    clock = time.monotonic if transport is None else anyio.current_time
    limiter = LocalRateLimiter(LIMIT, PERIOD, clock=clock)
    async with AsyncLemcal(
        target.user_id, target.api_key, base_url=target.base_url, transport=transport, limiter=limiter
    ) as lemcal:

        async def call(number: int) -> object:
            return await lemcal.request("GET", "/me", params={"call": number})

        yield call


@asynccontextmanager
async def _peer(
    peer: Opened, target: Target, transport: httpx.AsyncBaseTransport | None
) -> AsyncIterator[Call]:
    auth = (target.user_id, target.api_key)
    async with (
        peer as wait,
        httpx.AsyncClient(
            auth=auth, base_url=target.base_url, transport=transport, timeout=60, trust_env=False
        ) as http,
    ):

        @tenacity.retry(retry=tenacity.retry_if_exception(_is_refusal), wait=_retry_after, reraise=True)
        async def call(number: int) -> object:
            await wait()
            response = await http.get("/me", params={"call": number})
            return response.raise_for_status()

        yield call


def _is_refusal(error: BaseException) -> bool:
    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code == 429


def _retry_after(state: tenacity.RetryCallState) -> float:
    error = state.outcome and state.outcome.exception()
    assert isinstance(error, httpx.HTTPStatusError)
    return float(error.response.headers["Retry-After"])
