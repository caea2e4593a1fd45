"""Decoding a long list, from the bytes of its body to models, and reading every field once.

This package is measured with ``meetings.list()`` through all layers, on an in-memory transport.
"""

import functools
import gc
import gzip
import json
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import anyio
import anyio.lowlevel
import httpx

from benchmarks.peers import read_all, with_msgspec, with_pydantic
from benchmarks.table import Measurement, alternate, main
from lemcal_async import AsyncLemcal
from lemcal_async.errors import ResponseDecodeError
from lemcal_async.ratelimit import Unlimited
from lemcal_async.sandbox._demo import make_account

MEETINGS = 20_000  # 14 MB from the sandbox
ROUNDS = 5


def body_of(count: int) -> bytes:
    """Return the body of a list of ``count`` meetings, as the service would send it."""
    rows = make_account(0, 0, count).meetings
    return json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()


def client(body: bytes, encoding: str = "identity") -> AsyncLemcal:
    """Return a client whose transport responds to every request with ``body``."""
    headers = {} if encoding == "identity" else {"Content-Encoding": encoding}
    parts = [body[at : at + 65_536] for at in range(0, len(body), 65_536)]  # as httpcore reads them

    class Body(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            for part in parts:
                await anyio.lowlevel.checkpoint()  # as reading from a socket does
                yield part

    wire = httpx.MockTransport(lambda _: httpx.Response(200, stream=Body(), headers=headers))
    return AsyncLemcal("usr_x", "secret", transport=wire, limiter=Unlimited())


def seconds(read: Callable[[], list[object]]) -> float:
    """Return the seconds to read the list and all its fields, with the default garbage collector settings."""
    gc.collect()
    before = time.perf_counter()
    read_all(read())
    return time.perf_counter() - before


async def longest_stall(call: Callable[[], Awaitable[object]]) -> float:
    """Return the longest time without a turn for other tasks, in seconds.

    The time is CPU time of the thread, which never waits here, so other programs do not count.
    """
    longest = 0.0
    gc.collect()  # garbage of earlier measurements

    async def heartbeat() -> None:
        nonlocal longest
        last = time.thread_time()
        while True:
            await anyio.lowlevel.checkpoint()
            now = time.thread_time()
            longest, last = max(longest, now - last), now

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(heartbeat)
        await anyio.lowlevel.checkpoint()
        await call()
        tasks.cancel_scope.cancel()
    return longest


def peak_memory(body: bytes) -> float:
    """Return the peak memory while reading the list, relative to the models plus the body."""
    lemcal = client(body)
    gc.collect()
    tracemalloc.start()
    found = anyio.run(lemcal.meetings.list)
    models, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found
    return (peak + len(body)) / (models + len(body))  # the body was allocated before


def measure() -> Iterator[Measurement]:
    """Yield the figures."""
    body = body_of(MEETINGS)
    lemcal = client(body)
    taken = alternate(
        ROUNDS,
        {
            "ours": lambda: seconds(lambda: list(anyio.run(lemcal.meetings.list))),
            "pydantic": lambda: seconds(lambda: list(with_pydantic(body))),
            "msgspec": lambda: seconds(lambda: list(with_msgspec(body))),
        },
    )
    what = f"decode {MEETINGS:,} meetings ({len(body) / 1e6:.0f} MB)"
    yield Measurement(f"{what}: pydantic, extra='allow'", taken["pydantic"] * 1e3, "ms")
    yield Measurement(f"{what}: msgspec, unknown fields dropped", taken["msgspec"] * 1e3, "ms")
    yield Measurement(f"{what}: meetings.list()", taken["ours"] * 1e3, "ms")
    yield Measurement("decode: meetings.list() / pydantic", taken["ours"] / taken["pydantic"], "x", 0.40)
    for backend in ("asyncio", "trio"):
        for encoding, sent in (("identity", body), ("gzip", gzip.compress(body, 6))):
            zipped = client(sent, encoding)
            stall = alternate(
                ROUNDS,
                {"": functools.partial(anyio.run, longest_stall, zipped.meetings.list, backend=backend)},
            )
            yield Measurement(f"decode, {backend}: longest stall, {encoding}", stall[""] * 1e3, "ms", 30)
    yield Measurement("decode: peak memory / (models + body)", peak_memory(body), "x", 1.5)
    for row in ("0", "{}"):
        yield flood(row)


def flood(row: str) -> Measurement:
    """Return the time to reject 10 MB of invalid rows, relative to parsing the JSON alone."""
    count = 10_000_000 // (len(row) + 1)
    body = f"[{','.join([row] * count)}]".encode()
    lemcal = client(body).with_options(deadline=60)

    async def count_bad_rows() -> int:
        try:
            await lemcal.meetings.list()
        except ResponseDecodeError as error:
            return error.bad_row_count
        return 0

    def reject() -> float:
        before = time.perf_counter()
        assert count == anyio.run(count_bad_rows)
        return time.perf_counter() - before

    def parse() -> float:
        before = time.perf_counter()
        assert count == len(json.loads(body))
        return time.perf_counter() - before

    taken = alternate(ROUNDS, {"ours": reject, "json": parse})
    what = f"decode: {count:,} rows of {row} rejected / json.loads"
    return Measurement(what, taken["ours"] / taken["json"], "x", 6)


if __name__ == "__main__":
    main(measure)
