"""Calls canceled at any moment: every later call works, and no connection leaks."""

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
Cancel = Callable[[Get, random.Random], Awaitable[None]]
CancelAfter = Callable[[int, Get], Awaitable[bool]]


@pytest.fixture
def server() -> Iterator[Loopback]:
    """Serve plain HTTP."""
    with Loopback() as server:
        yield server


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """Serve a sandbox without a rate limit."""
    with Sandbox(limit=None, meetings=0).serve() as sandbox:
        yield sandbox


def draw_delay(rng: random.Random) -> float:
    """Return the seconds after which to cancel: immediately, during the call, or never."""
    return rng.uniform(0, rng.choice([0.005, 0.07])) if rng.random() < 0.8 else 30


async def by_scope(get: Get, rng: random.Random) -> None:
    """Cancel a call with a cancel scope."""
    with anyio.move_on_after(draw_delay(rng)):
        await get()


async def by_task(get: Get, rng: random.Random) -> None:
    """Cancel a call with ``Task.cancel()``, sometimes repeatedly, which ignores shields."""
    task = asyncio.ensure_future(get())
    await asyncio.wait([task], timeout=draw_delay(rng))
    for _ in range(rng.randint(1, 3)):
        task.cancel()
        await asyncio.sleep(0)
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def storm(server: Loopback, transport: BasePooledTransport, cancel: Cancel, seconds: float) -> None:
    """Cancel calls at random for some seconds, and until enough has happened; then check for leaks."""
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
            # The test is only meaningful if some calls completed, and some closed their connections. A
            # slow machine gets more time.
            is_meaningful = completed > 20 and max(server.connections) > 2 * CONNECTIONS
            return is_meaningful and time.monotonic() > until

        async def worker() -> None:
            while not is_over():
                await cancel(get, rng)

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
        assert idle == await anyio.to_thread.run_sync(lambda: server.settled(at_most=idle))
        assert idle <= CONNECTIONS
    assert 0 == await anyio.to_thread.run_sync(lambda: server.settled(at_most=0))
    gc.collect()  # reports unclosed sockets


FOR = pytest.mark.parametrize("seconds", [0.5, pytest.param(30.0, marks=pytest.mark.storm)])


@FOR
@pytest.mark.anyio
async def test_random_moments(make_wire: MakeWire, server: Loopback, seconds: float) -> None:
    """With cancel scopes, on both backends."""
    await storm(server, make_wire(max_connections=CONNECTIONS), by_scope, seconds)


@FOR
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.anyio
async def test_random_moments_by_task(make_wire: MakeWire, server: Loopback, seconds: float) -> None:
    """With ``Task.cancel()``, which ignores scopes."""
    await storm(server, make_wire(max_connections=CONNECTIONS), by_task, seconds)


async def scope_after(steps: int, get: Get) -> bool:
    """Cancel a call after a number of event loop steps; return whether it completed before."""
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
    """Do the same with ``Task.cancel()``, ``times`` times."""
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
    """Cancel ``me()`` after 0, 1, 2 … steps until it completes first; over a single connection."""
    limiter = LocalRateLimiter(limit=100_000)
    steps = completed = 0
    while completed < 4:  # the number of steps of a call also depends on the network
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
    gc.collect()  # reports unclosed sockets


@pytest.mark.parametrize("connected", [False, True])
@pytest.mark.anyio
async def test_every_moment(make_wire: MakeWire, sandbox: Sandbox, connected: bool) -> None:  # noqa: FBT001  # a parameter of the test
    """With cancel scopes, on a new connection and on an existing one."""
    await every_moment(make_wire, sandbox, scope_after, connected=connected)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("connected", [False, True])
@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.anyio
async def test_every_moment_by_task(
    *, make_wire: MakeWire, sandbox: Sandbox, connected: bool, times: int
) -> None:  # same
    """With ``Task.cancel()``, repeated during the call's cleanup."""
    await every_moment(make_wire, sandbox, functools.partial(task_after, times=times), connected=connected)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.anyio
async def test_closing_by_task(make_wire: MakeWire, server: Loopback, steps: int) -> None:
    """If closing is canceled, the other connections are closed, too."""
    transport = make_wire()
    client = httpx.AsyncClient(transport=transport, timeout=10)
    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(client.get, f"{server.url}/sleep/0.05")
    assert 4 == server.open
    assert not await task_after(steps, transport.aclose)
    assert 0 == await anyio.to_thread.run_sync(lambda: server.settled(at_most=0))


SECRET = "Basic dXNyX3g6c2VjcmV0"  # usr_x:secret


def frames_of(error: BaseException) -> str:
    """Return the local variables of all frames in an error's tracebacks, except the tests' own."""
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
async def test_no_traceback_contains_the_credentials(make_wire: MakeWire, server: Loopback) -> None:
    """For any exception from a wire in a plain client, no frame's variables contain the credentials."""
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
