"""How long the first use of each part blocks the event loop in a fresh interpreter, compared with bare httpx.

All parts with deferred imports are measured: the first call on each wire, the first error, long list,
webhook delivery, store, and access to Redis. A heartbeat task measures the CPU time of the whole process
between two beats, so that other programs do not matter, and work in threads does not count unless it
blocks the event loop. What was imported is garbage-collected first: whether Python does that, for 20 ms,
within the measured second would otherwise depend on how many objects the imports happened to create.
"""

import functools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import attrs

from benchmarks.servers import fixed_server
from benchmarks.table import Measurement, alternate, main

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from redis_server import RedisServer

ROUNDS = 3
BOUND = 10.0  # ms more than bare httpx's first call

PROGRAM = """
import gc, sys, time
URL, FOLDER, REDIS = sys.argv[1:4]
if sys.argv[4] == "trio":
    import trio
{before}
gc.collect()

async def first(sleep):
    {action}

async def measured(spawn, sleep):
    longest, ended = 0.0, False
    async def beat():
        nonlocal longest
        last = time.process_time()
        while not ended:
            await sleep(0.0005)
            now = time.process_time()
            longest, last = max(longest, now - last), now
    async def run():
        nonlocal ended
        await sleep(0.02)
        await first(sleep)
        ended = True
    await spawn(beat, run)
    print(longest * 1e3)

if sys.argv[4] == "asyncio":
    import anyio, asyncio
    async def spawn(*functions):
        await asyncio.gather(*(function() for function in functions))
    anyio.run(measured, spawn, asyncio.sleep)
else:
    async def spawn(*functions):
        async with trio.open_nursery() as nursery:
            for function in functions:
                nursery.start_soon(function)
    trio.run(measured, spawn, trio.sleep)
"""


@attrs.frozen
class FirstUse:
    """A use of a part: the setup before the event loop runs, and the measured action."""

    name: str
    before: str
    action: str
    backends: tuple[str, ...] = ("asyncio", "trio")
    peer: str = "bare httpx"


CLIENT = "from lemcal_async import AsyncLemcal\nlemcal = AsyncLemcal('usr_x', 'secret', base_url=URL{})"
BARE = FirstUse(
    "bare httpx",
    "import httpx\nclient = httpx.AsyncClient()",
    "(await client.get(URL + '/me')).json(); await client.aclose()",
)
BARE_INSIDE = FirstUse(
    "bare httpx, created in the event loop",
    "import httpx",
    "client = httpx.AsyncClient(); " + BARE.action,
)
BARE_LIST = attrs.evolve(BARE, name="bare httpx, list", action=BARE.action.replace("/me", "/many/meetings"))
USES = [
    FirstUse("call", CLIENT.format(""), "await lemcal.me(); await lemcal.aclose()"),
    FirstUse(
        "call on HTTPX2Transport",
        "from lemcal_async.transport.httpx2 import HTTPX2Transport\nwire = HTTPX2Transport()\n"
        + CLIENT.format(", transport=wire"),
        "await lemcal.me(); await wire.aclose()",
    ),
    FirstUse(
        "call on AiohttpTransport",
        "from lemcal_async.transport.aiohttp import AiohttpTransport\nwire = AiohttpTransport()\n"
        + CLIENT.format(", transport=wire"),
        "await lemcal.me(); await wire.aclose()",
        ("asyncio",),
    ),
    FirstUse(
        "error",
        "from lemcal_async.errors import LemcalError\n" + CLIENT.format(""),
        "\n    try:\n        await lemcal.request('GET', '/missing')\n    except LemcalError: pass\n"
        "    await lemcal.aclose()",
    ),
    FirstUse(
        "list of 5,000",
        CLIENT.replace("URL", "URL + '/many'").format(""),
        "await lemcal.meetings.list(); await lemcal.aclose()",
        peer=BARE_LIST.name,
    ),
    FirstUse(
        "call of a client created in the event loop",
        "from lemcal_async import AsyncLemcal",
        "lemcal = AsyncLemcal('usr_x', 'secret', base_url=URL); await lemcal.me(); await lemcal.aclose()",
        peer="bare httpx, created in the event loop",
    ),
    FirstUse(
        "webhook delivery",
        "from lemcal_async.webhooks import WebhookReceiver\n" + CLIENT.format("") + "\n"
        "async def handle(meeting): pass\n"
        "receiver = WebhookReceiver(lemcal, token='t' * 32, on_meeting=handle)",
        "await receiver.handle('POST', 'token=' + 't' * 32, {}, b'{\"_id\": \"mee_1\"}')\n"
        "    await lemcal.aclose()",
    ),
    FirstUse(
        "synchronization into SQLite",
        "from lemcal_async.sync import SQLStore, sync_meetings\n" + CLIENT.format("") + "\n"
        "store = SQLStore('sqlite:///' + FOLDER + '/lemcal.db')",
        "\n    async with store:\n        await sync_meetings([lemcal], store)\n    await lemcal.aclose()",
    ),
    FirstUse(
        "request granted through Redis",
        "from lemcal_async.ratelimit import Key, RedisRateLimiter\n"
        "limiter, key = RedisRateLimiter(REDIS), Key(URL, '0' * 32)",
        "\n    async with limiter:\n        (await limiter.acquire(key)).unsent()",
    ),
]


def stall(use: FirstUse, backend: str, url: str, redis_url: str) -> float:
    """Return the longest stall in a fresh interpreter, in milliseconds."""
    program = PROGRAM.format(before=use.before, action=use.action)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", program, url, folder, redis_url, backend]
        done = subprocess.run(command, capture_output=True, check=False, text=True)
    if done.returncode:
        raise RuntimeError(f"{use.name} on {backend}:\n{done.stderr}")
    return float(done.stdout)


def measure() -> Iterator[Measurement]:
    """Yield the figures."""
    with fixed_server() as url, RedisServer() as redis:
        for backend in ("asyncio", "trio"):
            uses = {use.name: use for use in [BARE, BARE_LIST, BARE_INSIDE, *USES] if backend in use.backends}
            taken = alternate(
                ROUNDS,
                {name: functools.partial(stall, use, backend, url, redis.url) for name, use in uses.items()},
            )
            for bare in (BARE, BARE_LIST, BARE_INSIDE):
                stalled = taken[bare.name]
                yield Measurement(f"first use, {backend}: {bare.name}, longest stall", stalled, "ms")
            for use in USES:
                if use.name in taken:
                    beyond = taken[use.name] - taken[use.peer]
                    what = f"first use, {backend}: {use.name}, stall beyond"
                    yield Measurement(what, beyond, "ms", BOUND, note=f"compared with {use.peer}")


if __name__ == "__main__":
    main(measure)
