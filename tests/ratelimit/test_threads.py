"""One limiter in several threads, event loops and processes, in real time; and what the dead leave behind."""

import asyncio
import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Coroutine
from itertools import pairwise
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from lemcal_async._headers import Quota
from lemcal_async.ratelimit import Key, LocalRateLimiter, Permit, RateLimit
from lemcal_async.ratelimit._local import _after_fork_in_child
from lemcal_async.ratelimit._slots import LOST_AFTER, MARGIN

KEY = Key("https://api.example.com", "0f" * 16)
SILENT = Quota()


@pytest.fixture
def no_blocking_calls() -> None:
    """Lift the check of all other tests: coverage has a lock of its own, at which the threads here meet."""


async def call(limiter: LocalRateLimiter, moments: list[float]) -> None:
    """Have one request answered at once, and note when it was sent."""
    permit = await limiter.acquire(KEY)
    moments.append(time.monotonic())
    permit.sent()
    permit.answered(200, SILENT)


def test_two_threads_two_loops() -> None:
    """An asyncio loop and a trio loop share one key: all are served, and the limit is kept."""
    limiter = LocalRateLimiter(20, 0.25)
    moments: dict[str, list[float]] = {"asyncio": [], "trio": []}

    async def forty(backend: str) -> None:
        async with anyio.create_task_group() as group:
            for _ in range(40):
                group.start_soon(call, limiter, moments[backend])

    threads = [
        threading.Thread(target=lambda backend=backend: anyio.run(forty, backend, backend=backend))
        for backend in moments
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert {"asyncio": 40, "trio": 40} == {backend: len(sent) for backend, sent in moments.items()}
    ordered = sorted(moments["asyncio"] + moments["trio"])
    assert min(late - early for early, late in zip(ordered, ordered[20:], strict=False)) >= 0.25


def test_threads_that_hammer() -> None:
    """Many loops that take, give back and cancel at once lose no permit and no wake-up."""
    limiter = LocalRateLimiter(3, 0.05)

    async def one(patience: float) -> None:
        with anyio.move_on_after(patience):
            permit = await limiter.acquire(KEY)
            permit.unsent()

    async def many() -> None:
        async with anyio.create_task_group() as group:
            for number in range(300):
                group.start_soon(one, 0.0001 if number % 3 else 30.0)

    threads = [
        threading.Thread(target=anyio.run, args=[many], kwargs={"backend": backend})
        for backend in ("asyncio", "trio", "asyncio", "trio")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    seen = limiter.snapshot(KEY)
    assert (3, 0) == (seen.remaining, seen.queued)


def run_until_it_stops(main: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine on a loop that is then closed under the tasks that still wait on it."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()


async def leave_waiting(limiter: LocalRateLimiter, count: int) -> list[asyncio.Task[Permit]]:
    """Start tasks that wait for a permit, and end without them."""
    tasks = [asyncio.ensure_future(limiter.acquire(KEY)) for _ in range(count)]
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


def bury(tasks: list[asyncio.Task[Permit]]) -> None:
    """Let the tasks of a closed loop be collected without the complaints of asyncio about them."""
    while tasks:
        tasks.pop()._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio's own name for it
    gc.collect()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_loop_that_dies_at_the_head(backend: str) -> None:
    """Its waiting calls cannot be canceled any more; the calls of other loops pass them."""
    limiter = LocalRateLimiter(1, 0.1)
    moments: list[float] = []

    async def first() -> list[asyncio.Task[Permit]]:
        await call(limiter, moments)
        return await leave_waiting(limiter, 20)

    dead = run_until_it_stops(first())
    assert 20 == limiter.snapshot(KEY).queued

    async def others() -> None:
        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(call, limiter, moments)

    anyio.run(others, backend=backend)
    assert 4 == len(moments)
    assert min(late - early for early, late in pairwise(moments)) >= 0.1
    assert 0 == limiter.snapshot(KEY).queued
    bury(dead)


def test_a_loop_that_dies_with_its_alarm_to_be_set() -> None:
    """Whoever is found dead when the clock is to be watched is taken out of the queue."""
    limiter = LocalRateLimiter(1, 0.1)

    async def hold() -> tuple[Permit, list[asyncio.Task[Permit]]]:
        return await limiter.acquire(KEY), await leave_waiting(limiter, 5)

    permit, dead = run_until_it_stops(hold())
    assert 5 == limiter.snapshot(KEY).queued
    permit.answered(200, SILENT)  # only now is it known when the next one may go
    assert 0 == limiter.snapshot(KEY).queued
    bury(dead)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_loop_that_stands_still(backend: str) -> None:
    """Its waiting calls are passed over, and have their places again, before later ones, when it goes on."""
    limiter = LocalRateLimiter(1, 0.05)
    moments: list[float] = []
    order: list[int] = []

    async def numbered(number: int) -> None:
        await call(limiter, moments)
        order.append(number)

    async def first() -> list[asyncio.Task[None]]:
        await numbered(0)
        tasks = [asyncio.ensure_future(numbered(number)) for number in range(1, 6)]
        await asyncio.sleep(0.01)
        return tasks

    async def others() -> None:
        with anyio.fail_after(20):
            for number in (100, 101):
                await numbered(number)

    async def go_on(tasks: list[asyncio.Task[None]]) -> None:
        await asyncio.wait_for(asyncio.gather(numbered(200), *tasks), 20)

    loop = asyncio.new_event_loop()
    tasks = loop.run_until_complete(first())
    anyio.run(others, backend=backend)
    assert [0, 100, 101] == order
    assert 0 == limiter.snapshot(KEY).queued
    loop.run_until_complete(go_on(tasks))
    loop.close()
    assert [1, 2, 3, 4, 5, 200] == order[3:]
    assert 0 == limiter.snapshot(KEY).queued
    assert min(late - early for early, late in itertools.pairwise(moments)) >= 0.05


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("blocked", ["asyncio", "trio"])
def test_a_loop_that_is_blocked(blocked: str, backend: str) -> None:
    """What it was granted, and does not pick up, goes to the calls of other loops; it has its turn later."""
    limiter = LocalRateLimiter(2, 0.05)
    ready, go_on = threading.Event(), threading.Event()
    served: list[str] = []

    async def one(name: str) -> None:
        permit = await limiter.acquire(KEY)
        served.append(name)
        permit.unsent()

    async def block() -> None:
        permits = [await limiter.acquire(KEY) for _ in range(2)]
        async with anyio.create_task_group() as group:
            for number in range(5):
                group.start_soon(one, f"blocked {number}")
                await anyio.lowlevel.checkpoint()
            for permit in permits:
                permit.unsent()  # grants two of them
            ready.set()
            assert go_on.wait(30)

    async def others() -> None:
        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                for number in range(3):
                    group.start_soon(one, f"other {number}")
        go_on.set()

    thread = threading.Thread(target=lambda: anyio.run(block, backend=blocked))
    thread.start()
    assert ready.wait(30)
    anyio.run(others, backend=backend)
    thread.join(30)
    assert {f"other {number}" for number in range(3)} == set(served[:3])
    assert {f"blocked {number}" for number in range(5)} == set(served[3:])
    assert (2, 0) == (limiter.snapshot(KEY).remaining, limiter.snapshot(KEY).queued)


def test_a_blocked_loop_that_goes_away() -> None:
    """A call whose grant was taken back can still be canceled."""
    limiter = LocalRateLimiter(1, 0.05)
    ready, go_on = threading.Event(), threading.Event()

    async def one() -> None:
        (await limiter.acquire(KEY)).unsent()

    async def block() -> None:
        permit = await limiter.acquire(KEY)
        async with anyio.create_task_group() as group:
            group.start_soon(one)
            await anyio.lowlevel.checkpoint()
            permit.unsent()
            ready.set()
            assert go_on.wait(30)
            group.cancel_scope.cancel()

    thread = threading.Thread(target=lambda: anyio.run(block))
    thread.start()
    assert ready.wait(30)

    async def other() -> None:
        with anyio.fail_after(20):
            (await limiter.acquire(KEY)).unsent()
        go_on.set()

    anyio.run(other)
    thread.join(30)
    assert RateLimit(1, 1, resets_in=0.0, queued=0, paused_for=0.0) == limiter.snapshot(KEY)


def test_a_loop_that_stood_still_and_ends() -> None:
    """A call that was passed over can still be canceled."""
    limiter = LocalRateLimiter(1, 0.05)

    async def hold() -> tuple[Permit, list[asyncio.Task[Permit]]]:
        return await limiter.acquire(KEY), await leave_waiting(limiter, 2)

    async def end(tasks: list[asyncio.Task[Permit]]) -> list[Permit | BaseException]:
        tasks[0].cancel()
        tasks[1].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with asyncio.Runner() as runner:
        permit, tasks = runner.run(hold())
        permit.unsent()
        assert RateLimit(1, 1, resets_in=0.0, queued=0, paused_for=0.0) == limiter.snapshot(KEY)
        assert [asyncio.CancelledError] * 2 == [type(outcome) for outcome in runner.run(end(tasks))]
    assert RateLimit(1, 1, resets_in=0.0, queued=0, paused_for=0.0) == limiter.snapshot(KEY)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_wait_that_outlives_its_loop(backend: str) -> None:
    """What is left half-way, and kept, when its loop has ended, gets no grant: the next one has it."""
    limiter = LocalRateLimiter(1, 0.05)

    async def leave() -> tuple[Permit, Coroutine[Any, Any, Permit]]:
        permit = await limiter.acquire(KEY)
        left = limiter.acquire(KEY)
        left.send(None)
        return permit, left

    permit, left = anyio.run(leave, backend=backend)
    assert 1 == limiter.snapshot(KEY).queued
    permit.unsent()
    assert RateLimit(1, 1, resets_in=0.0, queued=0, paused_for=0.0) == limiter.snapshot(KEY)
    left.close()
    assert RateLimit(1, 1, resets_in=0.0, queued=0, paused_for=0.0) == limiter.snapshot(KEY)


@pytest.mark.parametrize("backends", [("asyncio", "asyncio"), ("trio", "trio"), ("asyncio", "trio")])
def test_one_loop_after_another(backends: tuple[str, str]) -> None:
    """A limiter made at import time serves them all, and what one has used the next has not."""
    limiter = LocalRateLimiter(2, 0.1)
    moments: list[float] = []

    async def three() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(call, limiter, moments)

    for backend in backends:
        anyio.run(three, backend=backend)
    assert 6 == len(moments)
    assert min(late - early for early, late in zip(moments, moments[2:], strict=False)) >= 0.1


def test_a_grant_that_nobody_took() -> None:
    """A call that was granted its turn and then collected with its loop gives it back."""
    limiter = LocalRateLimiter(1, 0.1)
    dead: list[asyncio.Task[Permit]] = []

    async def hold() -> None:
        permit = await limiter.acquire(KEY)
        dead.extend(await leave_waiting(limiter, 1))
        permit.unsent()  # grants the one that waits, which would hear of it in the loop's next round
        asyncio.get_running_loop().stop()

    loop = asyncio.new_event_loop()
    holder = loop.create_task(hold())
    loop.run_forever()
    loop.close()
    assert holder.done()
    seen = limiter.snapshot(KEY)
    assert (0, 0) == (seen.remaining, seen.queued)
    bury(dead)
    if sys.version_info < (3, 14):  # which does not collect the task of a closed loop at once any more
        assert 1 == limiter.snapshot(KEY).remaining


def test_a_limiter_can_be_collected() -> None:
    """A limiter that nobody uses any more is not kept by those that were."""
    limiter = weakref.ref(LocalRateLimiter())
    gc.collect()
    assert limiter() is None


# ---------------------------------------------------------------------------------------- signals
def test_a_snapshot_waits_for_no_lock() -> None:
    """A signal handler or a finalizer may run while its own thread is at work."""
    limiter = LocalRateLimiter()
    with limiter._inbox._lock:
        assert 20 == limiter.snapshot(KEY).remaining


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no timers")
def test_snapshots_in_a_signal_handler() -> None:
    """Whatever they interrupt, they come back, and have something to say."""
    limiter = LocalRateLimiter(5, 0.001)
    seen: list[RateLimit] = []

    async def hammer() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(300):
                group.start_soon(call, limiter, [])

    before = signal.signal(signal.SIGVTALRM, lambda *_: seen.append(limiter.snapshot(KEY)))
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.001, 0.001)
    try:
        while len(seen) < 20:
            anyio.run(hammer)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert all(snapshot.remaining is not None and 0 <= snapshot.remaining <= 5 for snapshot in seen)


# ------------------------------------------------------------------------------------------- fork
FORK = """
import asyncio, os, signal, threading, time
from lemcal_async._headers import Quota
from lemcal_async.ratelimit import Key, LocalRateLimiter

KEY = Key("https://api.example.com", "0f" * 16)
limiter = LocalRateLimiter(2, 0.2)

async def call():
    permit = await limiter.acquire(KEY)
    permit.answered(200, Quota())

async def calls(count):
    await asyncio.gather(*(call() for _ in range(count)))

held, over = threading.Event(), threading.Event()

def work():
    with limiter._inbox._lock:
        held.set()
        over.wait(30)

async def waiting():
    await limiter.acquire(KEY)  # never reported
    asyncio.ensure_future(calls(9))
    await asyncio.sleep(0.01)

loop = asyncio.new_event_loop()
loop.run_until_complete(waiting())
thread = threading.Thread(target=work)
thread.start()
held.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)  # rather than wait for ever for a lock that nobody holds
    seen = limiter.snapshot(KEY)
    assert seen.queued == 0, seen
    started = time.monotonic()
    asyncio.run(asyncio.wait_for(calls(5), 20))
    # two in each period, the parent's requests counted
    assert time.monotonic() - started > 0.4
    os._exit(0)
_, status = os.waitpid(child, 0)
over.set()
thread.join()
os._exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_fork_while_another_thread_is_at_work() -> None:
    """The child has the budget but neither the lock nor the queue of its parent."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (0, "") == (done.returncode, done.stderr)


@pytest.mark.anyio
async def test_a_question_that_was_lost_in_a_fork() -> None:
    """A task of the parent that was about to queue is canceled in the child without a trace."""
    limiter = LocalRateLimiter()
    async with anyio.create_task_group() as group:
        with limiter._inbox._lock:
            group.start_soon(limiter.acquire, KEY)
            await anyio.sleep(1.0)
            _after_fork_in_child()
        group.cancel_scope.cancel()
    assert len(limiter._keys) <= 1  # of the last call


@pytest.mark.anyio
async def test_after_a_fork() -> None:
    """In the child nobody waits, nobody is at work, and what is in flight will not be heard of."""
    limiter = LocalRateLimiter(2, 2.0, clock=anyio.current_time)
    sent, _ = await limiter.acquire(KEY), await limiter.acquire(KEY)
    sent.sent()
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(limiter.acquire, KEY)
            await anyio.sleep(1.0)
            assert 1 == limiter.snapshot(KEY).queued
            limiter._inbox._lock.acquire()  # as if by a thread that there is no more
            limiter._inbox.post(None, pytest.fail, "left by that thread")
            _after_fork_in_child()
            assert not limiter._inbox._lock.locked()
            seen = limiter.snapshot(KEY)
            assert (0, 0) == (seen.queued, seen.remaining)
            sent.answered(429, Quota(retry_after=30.0))  # the parent's affair
            assert 0.0 == limiter.snapshot(KEY).paused_for
            started = anyio.current_time()
            await limiter.acquire(KEY)
            assert LOST_AFTER + 2.0 + MARGIN - 1.0 == pytest.approx(anyio.current_time() - started)
            scope.cancel()
