"""Calls canceled at any moment: every later call works, and no connection is left behind."""

import asyncio
import contextlib
import functools
import gc
import random
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import httpx
import pytest

from lemcal_async.ratelimit import LocalRateLimiter
from lemcal_async.sandbox import Sandbox
from lemcal_async.transport._pooled import BasePooledTransport

from .conftest import MakeWire
from .loopback import Loopback

WORKERS = 60
CONNECTIONS = 10

Get = Callable[[], Coroutine[Any, Any, object]]
Disturb = Callable[[Get, random.Random], Awaitable[None]]
CancelAfter = Callable[[int, Get], Awaitable[bool]]


@pytest.fixture
def server() -> Iterator[Loopback]:
    """Serve plain HTTP."""
    with Loopback() as server:
        yield server


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """Serve a sandbox without a rate limit: nobody should have to wait here."""
    with Sandbox(limit=None, meetings=0).serve() as sandbox:
        yield sandbox


def patience(rng: random.Random) -> float:
    """Return the seconds after which to cancel: at once, on the way, or never."""
    return rng.uniform(0, rng.choice([0.005, 0.07])) if rng.random() < 0.8 else 30


async def by_scope(get: Get, rng: random.Random) -> None:
    """Cancel a call as anyio and trio do."""
    with anyio.move_on_after(patience(rng)):
        await get()


async def by_task(get: Get, rng: random.Random) -> None:
    """Cancel a call as asyncio does, some more than once: that gets through what shields a scope."""
    task = asyncio.ensure_future(get())
    await asyncio.wait([task], timeout=patience(rng))
    for _ in range(rng.randint(1, 3)):
        task.cancel()
        await asyncio.sleep(0)
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def storm(server: Loopback, transport: BasePooledTransport, disturb: Disturb, seconds: float) -> None:
    """Cancel calls at random for some seconds, and until enough happened; then look what is left."""
    rng = random.Random(0)
    until = time.monotonic() + seconds
    completed = 0
    async with httpx.AsyncClient(transport=transport, timeout=10) as client:

        async def get() -> None:
            nonlocal completed
            response = await client.get(f"{server.url}/sleep/{rng.uniform(0, 0.006):.4f}")
            assert 200 == response.status_code
            completed += 1

        def is_over() -> bool:
            # Some must have got through, and some have broken their connections, or this shows nothing. A
            # slow machine gets more time for it, not less to do.
            shows_something = completed > 20 and max(server.connections) > 2 * CONNECTIONS
            return shows_something and time.monotonic() > until

        async def worker() -> None:
            while not is_over():
                await disturb(get, rng)

        async with anyio.create_task_group() as group:
            for _ in range(WORKERS):
                group.start_soon(worker)
        (pool,) = transport._pools.values()
        assert (CONNECTIONS, 0) == (pool.slots.free, pool.slots.waiting)

        completed = 0
        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                for _ in range(200):
                    group.start_soon(get)
        assert 200 == completed
        assert CONNECTIONS == pool.slots.free
        idle = sum(map(len, pool._idle.values()))
        assert idle == await anyio.to_thread.run_sync(lambda: server.settled(most=idle))
        assert idle <= CONNECTIONS
    assert 0 == await anyio.to_thread.run_sync(lambda: server.settled(most=0))
    gc.collect()  # a socket that nobody closed would be found here


FOR = pytest.mark.parametrize("seconds", [0.5, pytest.param(30.0, marks=pytest.mark.storm)])


@FOR
@pytest.mark.anyio
async def test_random_moments(make_wire: MakeWire, server: Loopback, seconds: float) -> None:
    """By cancel scopes, on both event loops."""
    await storm(server, make_wire(max_connections=CONNECTIONS), by_scope, seconds)


@FOR
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.anyio
async def test_random_moments_by_task(make_wire: MakeWire, server: Loopback, seconds: float) -> None:
    """By ``Task.cancel()``, which knows of no scopes."""
    await storm(server, make_wire(max_connections=CONNECTIONS), by_task, seconds)


async def scope_after(steps: int, get: Get) -> bool:
    """Cancel a call after so many steps of the event loop; whether it completed before."""
    completed = False

    async def call() -> None:
        nonlocal completed
        await get()
        completed = True

    async with anyio.create_task_group() as group:
        group.start_soon(call)
        for _ in range(steps):
            await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()
    return completed


async def task_after(steps: int, get: Get, times: int = 1) -> bool:
    """Do the same by ``Task.cancel()``, more than once if need be."""
    task = asyncio.ensure_future(get())
    for _ in range(steps):
        await asyncio.sleep(0)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return not task.cancelled()


async def every_moment(
    make_wire: MakeWire, sandbox: Sandbox, cancel_after: CancelAfter, *, connected: bool
) -> None:
    """Cancel ``me()`` after 0, 1, 2 … steps, until that is late; all over one connection."""
    limiter = LocalRateLimiter(limit=100_000)
    steps = completed = 0
    while completed < 4:  # how many steps a call takes depends on the network too
        transport = make_wire(max_connections=1)
        lemcal = sandbox.client(transport=transport, limiter=limiter)
        with anyio.fail_after(10):
            if connected:
                await lemcal.me()
            completed += await cancel_after(steps, lemcal.me)
            assert sandbox.user_id == (await lemcal.me()).id
        (pool,) = transport._pools.values()
        assert (1, 0) == (pool.slots.free, lemcal.rate_limit.queued)
        await transport.aclose()
        steps += 1
    assert steps > 5
    gc.collect()  # a socket that nobody closed would be found here


@pytest.mark.parametrize("connected", [False, True])
@pytest.mark.anyio
async def test_every_moment(make_wire: MakeWire, sandbox: Sandbox, connected: bool) -> None:  # noqa: FBT001  # a parameter of the test
    """Of a whole call, on a new connection and on one that is there; by cancel scopes."""
    await every_moment(make_wire, sandbox, scope_after, connected=connected)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("connected", [False, True])
@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.anyio
async def test_every_moment_by_task(
    *, make_wire: MakeWire, sandbox: Sandbox, connected: bool, times: int
) -> None:  # same
    """By ``Task.cancel()``, and again while the call is being cleaned up."""
    await every_moment(make_wire, sandbox, functools.partial(task_after, times=times), connected=connected)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.anyio
async def test_closing_by_task(make_wire: MakeWire, server: Loopback, steps: int) -> None:
    """Canceled while it closes one connection, it closes the others too: nobody else could."""
    transport = make_wire()
    client = httpx.AsyncClient(transport=transport, timeout=10)
    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(client.get, f"{server.url}/sleep/0.05")
    assert 4 == server.open
    assert not await task_after(steps, transport.aclose)
    assert 0 == await anyio.to_thread.run_sync(lambda: server.settled(most=0))


SECRET = "Basic dXNyX3g6c2VjcmV0"  # usr_x:secret


def frames_of(error: BaseException) -> str:
    """Return the local variables of all frames that hang on an error; but for the tests' own."""
    texts: list[str] = []
    chain: list[BaseException | None] = [error]
    while chain:
        each = chain.pop()
        if each is not None:
            chain += [each.__cause__, each.__context__]
            stack = traceback.StackSummary.extract(traceback.walk_tb(each.__traceback__), capture_locals=True)
            texts += [str(frame.locals) for frame in stack if "/tests/" not in frame.filename]
    return "\n".join(texts)


@pytest.mark.anyio
async def test_no_frame_holds_what_was_sent(make_wire: MakeWire, server: Loopback) -> None:
    """Whatever passes a wire in a plain client, at whichever moment: no frame shows the credentials."""
    shown: list[str] = []

    async def call(transport: BasePooledTransport, path: str) -> None:
        timeout = {"timeout": {"read": 0.02}}
        headers = {"Authorization": SECRET}
        request = httpx.Request("POST", server.url + path, headers=headers, json={}, extensions=timeout)
        try:
            response = await transport.handle_async_request(request)
            try:
                await response.aread()
            finally:
                await response.aclose()
        except BaseException as error:
            shown.append(frames_of(error))
            raise

    for steps in range(40):
        async with make_wire() as transport, anyio.create_task_group() as group:
            group.start_soon(call, transport, "/")
            for _ in range(steps):
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
    async with make_wire() as transport:
        for path in ("/hold", "/cut", "/drop/unknown"):
            with contextlib.suppress(httpx.TransportError):
                await call(transport, path)
    assert len(shown) > 5
    assert not [text for text in shown if SECRET.removeprefix("Basic ") in text]
