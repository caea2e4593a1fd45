"""Many accounts on one transport: time to create a sibling, memory per account, and throughput."""

import functools
import gc
import time
import tracemalloc
from collections.abc import Iterator

import anyio
import httpx

from benchmarks.servers import counting_server
from benchmarks.table import Measurement, main
from lemcal_async import AsyncLemcal, RetryPolicy
from lemcal_async._auth import Credentials, Secret
from lemcal_async.errors import RateLimitError
from lemcal_async.ratelimit import LocalRateLimiter
from lemcal_async.transport import PooledTransport

ACCOUNTS = 5_000
CALLS_PER_ACCOUNT = 3
CONCURRENT = 200
ROUNDS = 3


def creation_time(count: int) -> float:
    """Return the seconds to create ``count`` clients for other accounts."""
    lemcal = AsyncLemcal("usr_x", "secret")
    before = time.perf_counter()
    siblings = [lemcal.for_account(f"usr_{number}", "secret") for number in range(count)]
    taken = time.perf_counter() - before
    assert len(siblings) == count
    return taken


async def memory(count: int) -> float:
    """Return the bytes that an account still uses after a call, once its whole limit is available again."""
    now = 0.0
    limiter = LocalRateLimiter(clock=lambda: now)
    wire = httpx.MockTransport(lambda _: httpx.Response(200, json={"_id": "usr_x"}))
    lemcal = AsyncLemcal("usr_x", "secret", transport=wire, limiter=limiter)
    await lemcal.me()  # initializes everything that is shared
    gc.collect()
    tracemalloc.start()
    siblings = [
        lemcal.for_account(f"usr_{number:017}", f"secret {number:025}".replace(" ", "_"))
        for number in range(count)
    ]
    for sibling in siblings:
        await sibling.me()
    for _ in range(20):  # during later calls, the limiter removes idle accounts
        now += 10
        await lemcal.me()
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(siblings) == count
    return kept / count


async def throughput(base_url: str, *, bare: bool) -> tuple[float, int]:
    """Return the calls per second over all accounts, and the number of 429s."""
    refused = 0
    async with (
        PooledTransport(trust_env=False) as wire,
        httpx.AsyncClient(transport=wire, timeout=60) as plain,
    ):
        lemcal = AsyncLemcal(
            "usr_x", "secret", base_url=base_url, transport=wire, limiter=LocalRateLimiter(),
            retry=RetryPolicy(attempts=1), timeout=60,
        )  # fmt: skip

        async def call_bare(number: int) -> None:
            nonlocal refused
            basic = Credentials(f"usr_{number}", Secret("secret"))
            for _ in range(CALLS_PER_ACCOUNT):
                response = await plain.get(
                    f"{base_url}/me", headers={"Authorization": basic.authorization.reveal()}
                )
                refused += response.status_code == 429

        async def call_client(number: int) -> None:
            nonlocal refused
            sibling = lemcal.for_account(f"usr_{number}", "secret")
            try:
                for _ in range(CALLS_PER_ACCOUNT):
                    await sibling.me()
            except RateLimitError:
                refused += 1

        accounts = iter(range(ACCOUNTS))

        async def worker() -> None:
            for number in accounts:
                await (call_bare if bare else call_client)(number)

        before = time.perf_counter()
        async with anyio.create_task_group() as workers:
            for _ in range(CONCURRENT):
                workers.start_soon(worker)
        return ACCOUNTS * CALLS_PER_ACCOUNT / (time.perf_counter() - before), refused


def measure() -> Iterator[Measurement]:
    """Yield the figures."""
    taken = sorted(creation_time(1_000) for _ in range(ROUNDS))[ROUNDS // 2]
    yield Measurement("accounts: 1,000 siblings by for_account()", taken * 1e3, "ms", 50)
    yield Measurement("accounts: memory of an idle account", anyio.run(memory, 1_000) / 1024, "KiB", 4)
    with counting_server() as base_url:
        rates: dict[bool, list[float]] = {True: [], False: []}
        refused = 0
        for _ in range(ROUNDS):
            for bare in (True, False):
                rate, refusals = anyio.run(functools.partial(throughput, base_url, bare=bare))
                rates[bare].append(rate)
                refused += 0 if bare else refusals
                time.sleep(2.1)  # so that every account starts with its whole limit
    what = f"accounts: {ACCOUNTS:,} x {CALLS_PER_ACCOUNT} calls"
    ours, theirs = sorted(rates[False])[ROUNDS // 2], sorted(rates[True])[ROUNDS // 2]
    yield Measurement(f"{what}: calls per second", ours, "/s")
    yield Measurement(f"{what}: throughput / bare transport's", ours / theirs, "x", 0.85, at_least=True)
    yield Measurement(f"{what}: 429s", refused, "", 0)


if __name__ == "__main__":
    main(measure)
