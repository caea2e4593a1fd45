"""One limiter in several threads, event loops and processes, in real time, including dead loops."""

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
NO_HEADERS = Quota()


@pytest.fixture
def no_blocking_calls() -> None:
    """Disable the check for blocking calls: coverage has its own lock, which the threads contend for."""


async def call(limiter: LocalRateLimiter, moments: list[float]) -> None:
    """Complete one request immediately, and record when it was sent."""
    permit = await limiter.acquire(KEY)
    moments.append(time.monotonic())
    permit.sent()
    permit.answered(200, NO_HEADERS)


def test_two_threads_two_loops() -> None:
    """An asyncio loop and a trio loop share one key: all calls are served within the limit."""
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


def test_concurrent_acquire_release_and_cancel() -> None:
    """Four loops that acquire, release and cancel at once lose no permit and no wake-up."""
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


def run_and_close_loop(main: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine on a loop, then close the loop while tasks are still waiting on it."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()


async def leave_waiting(limiter: LocalRateLimiter, count: int) -> list[asyncio.Task[Permit]]:
    """Start tasks that wait for a permit; return without waiting for them."""
    tasks = [asyncio.ensure_future(limiter.acquire(KEY)) for _ in range(count)]
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


def collect_tasks(tasks: list[asyncio.Task[Permit]]) -> None:
    """Collect the tasks of a closed loop without asyncio's warnings about them."""
    while tasks:
        tasks.pop()._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio's own name for it
    gc.collect()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_waiters_of_a_closed_loop_are_skipped(backend: str) -> None:
    """Calls waiting on a closed loop cannot be canceled anymore; the calls of other loops go first."""
    limiter = LocalRateLimiter(1, 0.1)
    moments: list[float] = []

    async def first() -> list[asyncio.Task[Permit]]:
        await call(limiter, moments)
        return await leave_waiting(limiter, 20)

    dead = run_and_close_loop(first())
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
    collect_tasks(dead)


def test_waiters_of_a_closed_loop_are_removed_when_setting_alarms() -> None:
    """Waiters whose loop turns out to be closed when an alarm is set are removed from the queue."""
    limiter = LocalRateLimiter(1, 0.1)

    async def hold() -> tuple[Permit, list[asyncio.Task[Permit]]]:
        return await limiter.acquire(KEY), await leave_waiting(limiter, 5)

    permit, dead = run_and_close_loop(hold())
    assert 5 == limiter.snapshot(KEY).queued
    permit.answered(200, NO_HEADERS)  # only now is the time of the next grant known
    assert 0 == limiter.snapshot(KEY).queued
    collect_tasks(dead)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_waiters_of_a_stopped_loop_keep_their_places(backend: str) -> None:
    """They are passed over, and get their places back, before later calls, when the loop continues."""
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

    async def resume(tasks: list[asyncio.Task[None]]) -> None:
        await asyncio.wait_for(asyncio.gather(numbered(200), *tasks), 20)

    loop = asyncio.new_event_loop()
    tasks = loop.run_until_complete(first())
    anyio.run(others, backend=backend)
    assert [0, 100, 101] == order
    assert 0 == limiter.snapshot(KEY).queued
    loop.run_until_complete(resume(tasks))
    loop.close()
    assert [1, 2, 3, 4, 5, 200] == order[3:]
    assert 0 == limiter.snapshot(KEY).queued
    assert min(late - early for early, late in itertools.pairwise(moments)) >= 0.05


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("blocked", ["asyncio", "trio"])
def test_grants_of_a_blocked_loop_go_to_other_loops(blocked: str, backend: str) -> None:
    """Grants that a blocked loop does not pick up go to other loops' calls; its calls are served later."""
    limiter = LocalRateLimiter(2, 0.05)
    ready, resume = threading.Event(), threading.Event()
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
                permit.unsent()  # grants two of the calls
            ready.set()
            assert resume.wait(30)

    async def others() -> None:
        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                for number in range(3):
                    group.start_soon(one, f"other {number}")
        resume.set()

    thread = threading.Thread(target=lambda: anyio.run(block, backend=blocked))
    thread.start()
    assert ready.wait(30)
    anyio.run(others, backend=backend)
    thread.join(30)
    assert {f"other {number}" for number in range(3)} == set(served[:3])
    assert {f"blocked {number}" for number in range(5)} == set(served[3:])
    assert (2, 0) == (limiter.snapshot(KEY).remaining, limiter.snapshot(KEY).queued)


def test_cancellation_after_a_revoked_grant() -> None:
    """A call whose grant was taken back can still be canceled."""
    limiter = LocalRateLimiter(1, 0.05)
    ready, resume = threading.Event(), threading.Event()

    async def one() -> None:
        (await limiter.acquire(KEY)).unsent()

    async def block() -> None:
        permit = await limiter.acquire(KEY)
        async with anyio.create_task_group() as group:
            group.start_soon(one)
            await anyio.lowlevel.checkpoint()
            permit.unsent()
            ready.set()
            assert resume.wait(30)
            group.cancel_scope.cancel()

    thread = threading.Thread(target=lambda: anyio.run(block))
    thread.start()
    assert ready.wait(30)

    async def other() -> None:
        with anyio.fail_after(20):
            (await limiter.acquire(KEY)).unsent()
        resume.set()

    anyio.run(other)
    thread.join(30)
    assert RateLimit(1, 1, resets_in=0.0, queued=0, paused_for=0.0) == limiter.snapshot(KEY)


def test_cancellation_after_being_passed_over() -> None:
    """A call that was passed over, because its loop was stopped, can still be canceled."""
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
def test_suspended_wait_on_a_closed_loop_gets_no_grant(backend: str) -> None:
    """A coroutine still suspended when its loop has ended gets no grant; the next call gets it."""
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
def test_consecutive_loops_share_one_limiter(backends: tuple[str, str]) -> None:
    """A limiter created at import time serves every loop, and carries over what earlier loops used."""
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


def test_unclaimed_grant_of_a_closed_loop_is_released() -> None:
    """A call that was granted and then collected with its loop releases its slot."""
    limiter = LocalRateLimiter(1, 0.1)
    dead: list[asyncio.Task[Permit]] = []

    async def hold() -> None:
        permit = await limiter.acquire(KEY)
        dead.extend(await leave_waiting(limiter, 1))
        permit.unsent()  # grants the waiting call, which would wake up in the loop's next iteration
        asyncio.get_running_loop().stop()

    loop = asyncio.new_event_loop()
    holder = loop.create_task(hold())
    loop.run_forever()
    loop.close()
    assert holder.done()
    seen = limiter.snapshot(KEY)
    assert (0, 0) == (seen.remaining, seen.queued)
    collect_tasks(dead)
    if sys.version_info < (3, 14):  # later versions do not collect the task of a closed loop at once
        assert 1 == limiter.snapshot(KEY).remaining


def test_limiter_can_be_garbage_collected() -> None:
    """An unused limiter is not kept alive by the fork hook."""
    limiter = weakref.ref(LocalRateLimiter())
    gc.collect()
    assert limiter() is None


# ---------------------------------------------------------------------------------------- signals
def test_snapshot_takes_no_lock() -> None:
    """A signal handler or a finalizer may run while its own thread holds the lock."""
    limiter = LocalRateLimiter()
    with limiter._inbox._lock:
        assert 20 == limiter.snapshot(KEY).remaining


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no timers")
def test_snapshot_in_a_signal_handler() -> None:
    """Snapshots return valid values, whatever they interrupt."""
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
    signal.alarm(20)  # instead of waiting forever for a lock that no thread holds
    seen = limiter.snapshot(KEY)
    assert seen.queued == 0, seen
    started = time.monotonic()
    asyncio.run(asyncio.wait_for(calls(5), 20))
    # two per period, including the parent's requests
    assert time.monotonic() - started > 0.4
    os._exit(0)
_, status = os.waitpid(child, 0)
over.set()
thread.join()
os._exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_fork_while_another_thread_holds_the_lock() -> None:
    """The child inherits the budget, but neither the lock nor the queue of its parent."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (0, "") == (done.returncode, done.stderr)


@pytest.mark.anyio
async def test_acquire_interrupted_by_a_fork() -> None:
    """A task of the parent that was about to queue is canceled in the child without a trace."""
    limiter = LocalRateLimiter()
    async with anyio.create_task_group() as group:
        with limiter._inbox._lock:
            group.start_soon(limiter.acquire, KEY)
            await anyio.sleep(1.0)
            _after_fork_in_child()
        group.cancel_scope.cancel()
    assert len(limiter._keys) <= 1  # the key of the last call


@pytest.mark.anyio
async def test_state_after_a_fork() -> None:
    """In the child, the queue is empty, the lock is free, and requests in flight are treated as lost."""
    limiter = LocalRateLimiter(2, 2.0, clock=anyio.current_time)
    sent, _ = await limiter.acquire(KEY), await limiter.acquire(KEY)
    sent.sent()
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(limiter.acquire, KEY)
            await anyio.sleep(1.0)
            assert 1 == limiter.snapshot(KEY).queued
            limiter._inbox._lock.acquire()  # as if held by a thread that no longer exists
            limiter._inbox.post(None, pytest.fail, "left by that thread")
            _after_fork_in_child()
            assert not limiter._inbox._lock.locked()
            seen = limiter.snapshot(KEY)
            assert (0, 0) == (seen.queued, seen.remaining)
            sent.answered(429, Quota(retry_after=30.0))  # ignored: it is the parent's
            assert 0.0 == limiter.snapshot(KEY).paused_for
            started = anyio.current_time()
            await limiter.acquire(KEY)
            assert LOST_AFTER + 2.0 + MARGIN - 1.0 == pytest.approx(anyio.current_time() - started)
            scope.cancel()
