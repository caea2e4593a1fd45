"""The guarantees of the limiter of one process.

``test_invariants.py`` has the state machine, ``test_simulator.py`` jitter, ``tests/test_headers.py`` the
table of headers. Guarantees that need Redis are tested with the Redis limiter.
"""

import datetime as dt
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest

from lemcal_async._headers import Quota, parse_quota
from lemcal_async.ratelimit import Key, LocalRateLimiter, Permit, WouldWait
from lemcal_async.ratelimit._slots import LOST_AFTER, MARGIN

if TYPE_CHECKING:
    from _typeshed import TraceFunction

KEY = Key("https://api.example.com", "0f" * 16)
OTHER = Key("https://api.example.com", "f0" * 16)
NO_HEADERS = Quota()
MOST_LINES = 1000  # of the package per call with 10,000 calls; visiting all calls for each would take 5,000
how_many = pytest.mark.parametrize("many", [2_000, pytest.param(10_000, marks=pytest.mark.storm)])
real_time = pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])


@pytest.fixture
def no_blocking_calls() -> None:
    """Disable the check for blocking calls: it costs more than what is measured here."""


async def use(limiter: LocalRateLimiter, moments: list[float]) -> None:
    """Complete one request immediately, and record when it was sent."""
    permit = await limiter.acquire(KEY)
    moments.append(limiter.clock())
    permit.sent()
    permit.answered(200, NO_HEADERS)


@contextmanager
def lines_run() -> Iterator[list[int]]:
    """Count the executed lines of the package: a measure of work independent of the machine's speed."""
    count = [0]

    def line(_: FrameType, event: str, __: object) -> "TraceFunction":
        count[0] += event == "line"
        return line

    def call(frame: FrameType, _: str, __: object) -> "TraceFunction | None":
        return line if "lemcal_async" in frame.f_code.co_filename else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield count
    finally:
        sys.settrace(before)


def in_one_period(moments: list[float], limit: int, period: float) -> bool:
    """Whether more than ``limit`` requests were sent within less than a period."""
    moments = sorted(moments)
    return any(late - early < period for early, late in zip(moments, moments[limit:], strict=False))


async def settle() -> None:
    """Let every runnable task run, without advancing the clock."""
    for _ in range(5):
        await anyio.lowlevel.checkpoint()


@pytest.mark.anyio
async def test_idle_key_grants_twenty_at_once() -> None:
    """Twenty requests are granted without a wait; the 21st waits."""
    limiter = LocalRateLimiter(clock=lambda: 7.0)
    for _ in range(20):
        await limiter.acquire(KEY)
    with anyio.move_on_after(0.01) as scope:
        await limiter.acquire(KEY)
    assert scope.cancelled_caught


@pytest.mark.anyio
async def test_sixty_tasks_take_two_periods() -> None:
    """20, 40 and 60 tasks are done after 0, 2 and 4 s, plus a few milliseconds."""
    limiter = LocalRateLimiter(clock=anyio.current_time)
    moments: list[float] = []
    started = anyio.current_time()
    async with anyio.create_task_group() as group:
        for _ in range(60):
            group.start_soon(use, limiter, moments)
    since = [moment - started for moment in moments]
    for number, burst in enumerate((since[:20], since[20:40], since[40:])):
        assert 2.0 * number <= burst[0] <= burst[-1] <= 2.0 * number + 0.01
    assert not in_one_period(moments, 20, 2.0)


@pytest.mark.anyio
async def test_window_partly_used_by_another_client() -> None:
    """The first response reports 6 remaining for 0.7 s: at most 6 more requests are sent until then."""
    limiter = LocalRateLimiter(clock=anyio.current_time)
    moments: list[float] = []

    async def one() -> None:
        permit = await limiter.acquire(KEY)
        moments.append(anyio.current_time())
        permit.sent()
        await anyio.sleep(0.001)
        permit.answered(200, NO_HEADERS)

    first = await limiter.acquire(KEY)
    first.sent()
    answered_at = anyio.current_time()
    first.answered(200, Quota(limit=20, remaining=6, retry_after=0.7))
    async with anyio.create_task_group() as group:
        for _ in range(30):
            group.start_soon(one)
    before = [moment for moment in moments if moment < answered_at + 0.7]
    assert 1 <= len(before) <= 6
    assert 30 == len(moments)


@pytest.mark.anyio
async def test_429_pauses_the_key_and_keeps_the_order() -> None:
    """Sending pauses for 1.283 s, then the refused request goes first; a 429 with 0.2 s shortens nothing."""
    limiter = LocalRateLimiter(2, 0.05, clock=anyio.current_time)
    order: list[object] = []
    moments: list[float] = []

    async def one(name: object, again: Permit | None = None) -> None:
        permit = await limiter.acquire(KEY, again=again)
        order.append(name)
        moments.append(limiter.clock())
        permit.sent()
        permit.answered(200, NO_HEADERS)

    first, second = await limiter.acquire(KEY), await limiter.acquire(KEY)
    async with anyio.create_task_group() as group:
        for number in range(50):
            group.start_soon(one, number)
            await settle()
        refused_at = limiter.clock()
        assert 1.283 == first.answered(429, Quota(remaining=0, retry_after=1.283))
        assert 0.2 == second.answered(429, Quota(remaining=0, retry_after=0.2))
        group.start_soon(one, "again", first)
        await settle()
        assert 1.0 < limiter.snapshot(KEY).paused_for <= 1.283 + MARGIN
    assert min(moments) - refused_at >= 1.283
    # Two are granted at once, and trio runs them in any order.
    pairs = [*zip(order[::2], order[1::2], strict=False)]
    assert {"again", 0} == {*pairs[0]}
    assert [{number, number + 1} for number in range(1, 49, 2)] == [{*pair} for pair in pairs[1:]]


@pytest.mark.parametrize(
    ("value", "pause"),
    [
        ("2", 2.0),
        ("1.283", 1.283),
        ("0.039", 0.039),
        ("2, Tue Feb 16 2021 09:02:42 GMT+0100 (Central European Standard Time)", 2.0),
        ("Tue Feb 16 2021 09:02:42 GMT+0100 (Central European Standard Time)", 2.0),
        ("Tue Feb 16 2021 13:32:42 GMT+0530", 2.0),
        ("Tue, 16 Feb 2021 08:02:42 GMT", 2.0),
        ("Tue, 16 Feb 2021 08:02:00 GMT", 0.0),
        ("-5", 0.0),
        ("nan", 2.0),  # ignored: pause for a whole window
        ("inf", 2.0),
        ("1e9999", 2.0),
        ("soon", 2.0),
    ],
)
@pytest.mark.anyio
async def test_retry_after_of_a_429(value: str, pause: float) -> None:
    """Every form of the header pauses the key accordingly; an invalid value pauses it for a whole window."""
    limiter = LocalRateLimiter(clock=lambda: 7.0)
    permit = await limiter.acquire(KEY)
    quota = parse_quota({"retry-after": value, "date": "Tue, 16 Feb 2021 08:02:40 GMT"})
    assert pause == permit.answered(429, quota)
    assert pytest.approx(pause + MARGIN) == limiter.snapshot(KEY).paused_for


@pytest.mark.anyio
async def test_retry_after_of_a_day_raises_immediately() -> None:
    """A call does not sleep through a refusal that lasts a day."""
    limiter = LocalRateLimiter()
    permit = await limiter.acquire(KEY)
    permit.answered(429, parse_quota({"retry-after": "86400"}))
    with anyio.fail_after(5), pytest.raises(WouldWait) as raised:
        await limiter.acquire(KEY, again=permit)
    assert raised.value.refused
    assert 86_399 < raised.value.seconds <= 86_400


@pytest.mark.anyio
@how_many
async def test_queueing_cost_is_linear(many: int) -> None:
    """Queueing all calls and serving two windows takes a bounded amount of work per call."""
    limiter = LocalRateLimiter(20, 0.2, clock=anyio.current_time)
    moments: list[float] = []
    with lines_run() as count:
        async with anyio.create_task_group() as group:
            for _ in range(many):
                group.start_soon(use, limiter, moments)
            while len(moments) < 40:  # noqa: ASYNC110
                await anyio.sleep(0.01)
            taken = count[0]
            group.cancel_scope.cancel()
    assert many < taken < many * MOST_LINES
    assert 0 == limiter.snapshot(KEY).queued


@pytest.mark.anyio
@how_many
async def test_calls_that_cannot_meet_their_deadline_fail_at_once(many: int) -> None:
    """Of many calls with 5 s each, 60 are served or queued; the others are refused immediately."""
    limiter = LocalRateLimiter(clock=lambda: 100.0)  # fixed, or a slow machine would serve more of them
    refused: list[float] = []

    async def one() -> None:
        try:
            await limiter.acquire(KEY, timeout=5.0)
        except WouldWait as reason:
            refused.append(reason.seconds)

    with lines_run() as count:
        async with anyio.create_task_group() as group:
            for _ in range(many):
                group.start_soon(one)
            while len(refused) < many - 100:  # noqa: ASYNC110
                await anyio.sleep(0.01)
            assert many < count[0] < many * MOST_LINES
            assert 40 == limiter.snapshot(KEY).queued
            group.cancel_scope.cancel()
    assert many - 60 == len(refused)
    assert min(refused) > 5.0


@pytest.mark.anyio
@how_many
async def test_survivors_of_a_mass_cancellation_get_the_next_slots(many: int) -> None:
    """All but ten calls are canceled, including the head, unsent calls and calls in flight."""
    limiter = LocalRateLimiter(20, 0.5, clock=anyio.current_time)
    scopes: dict[int, anyio.CancelScope] = {}
    granted: list[int] = []
    served: dict[int, float] = {}
    canceled = anyio.Event()

    async def one(number: int) -> None:
        with anyio.CancelScope() as scopes[number]:
            permit = await limiter.acquire(KEY)
            granted.append(number)
            if number % 2:
                permit.sent()
            try:
                await canceled.wait()
            except BaseException:
                (permit.unknown if number % 2 else permit.unsent)()
                raise
            served[number] = limiter.clock()
            permit.answered(200, NO_HEADERS)

    async with anyio.create_task_group() as group:
        for number in range(many):
            group.start_soon(one, number)
        while len(scopes) < many:  # noqa: ASYNC110
            await anyio.sleep(0.01)
        survivors = sorted({*scopes} - {*granted})[:: many // 11][:10]
        with lines_run() as count:
            for number, scope in scopes.items():
                if number not in survivors:
                    scope.cancel()
            await settle()
        canceled.set()
        canceled_at = limiter.clock()
    assert many < count[0] < many * MOST_LINES
    assert survivors == sorted(served)
    next_slot = canceled_at + 0.5 + LOST_AFTER
    assert max(served.values()) < next_slot + 0.1


def test_two_threads_with_two_loops_share_one_key() -> None:
    """80 grants on an asyncio and a trio loop: at most 20 in any period, so they take over three periods."""
    period = 0.6
    limiter = LocalRateLimiter(20, period)
    moments: list[float] = []

    async def forty() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(40):
                group.start_soon(use, limiter, moments)

    threads = [
        threading.Thread(target=partial(anyio.run, forty, backend=backend)) for backend in ("asyncio", "trio")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert 80 == len(moments)
    assert not in_one_period(moments, 20, period)
    assert 3 * period <= max(moments) - min(moments)


@pytest.mark.parametrize("killed", ["asyncio", "trio"])
def test_loop_that_holds_the_head_of_the_queue_dies(killed: str) -> None:
    """Calls of the other loop continue as if those of the dead loop had never been made."""
    limiter = LocalRateLimiter(1, 0.2)
    moments: list[float] = []
    waiting, over = threading.Event(), threading.Event()

    class KilledError(Exception):
        """Ends the loop."""

    async def dying() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(10):
                group.start_soon(use, limiter, moments)
            await anyio.sleep(0.05)
            waiting.set()
            await anyio.sleep(0.05)
            raise KilledError

    def die() -> None:
        try:
            anyio.run(dying, backend=killed)
        except* KilledError:
            over.set()

    async def live() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(use, limiter, moments)

    thread = threading.Thread(target=die)
    thread.start()
    assert waiting.wait(10)
    anyio.run(live, backend="trio" if killed == "asyncio" else "asyncio")
    thread.join(10)
    assert over.is_set()
    assert 4 == len(moments)


@pytest.mark.anyio
@real_time
async def test_wall_clock_changes_have_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """After jumps of an hour forward and two back, no grant is early or late, and dates still parse."""
    limiter = LocalRateLimiter(5, 0.2)
    moments: list[float] = []
    wall_clock, shift = time.time, 0.0
    monkeypatch.setattr(time, "time", lambda: wall_clock() + shift)
    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(use, limiter, moments)
        for shift in (3600.0, -3600.0):
            await anyio.sleep(0.25)
            now = dt.datetime(2026, 3, 1, 12, 0, 0, tzinfo=dt.UTC) + dt.timedelta(seconds=shift)
            later = now + dt.timedelta(seconds=2)
            form = "%a, %d %b %Y %H:%M:%S GMT"
            headers = {"date": now.strftime(form), "retry-after": later.strftime(form)}
            assert 2.0 == parse_quota(headers).retry_after
    assert 20 == len(moments)
    assert not in_one_period(moments, 5, 0.2)


FORK = """
import asyncio, os, signal, sys, threading
from lemcal_async._headers import Quota
from lemcal_async.ratelimit import Key, LocalRateLimiter

KEY = Key("https://api.example.com", "0f" * 16)
limiter = LocalRateLimiter()
held, over = threading.Event(), threading.Event()

def hold():
    with limiter._inbox._lock:
        held.set()
        over.wait(30)

async def use():
    (await limiter.acquire(KEY)).answered(200, Quota())

asyncio.run(use())
thread = threading.Thread(target=hold)
thread.start()
held.wait()
child = os.fork()
if not child:
    signal.alarm(20)  # instead of waiting forever
    asyncio.run(use())
    os._exit(0 if limiter.snapshot(KEY).remaining == 18 else 3)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
over.set()
thread.join()
sys.exit(status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_fork_while_another_thread_holds_the_lock() -> None:
    """The child works, and accounts for the parent's requests."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (0, "") == (done.returncode, done.stderr)
    assert signal.SIGALRM != -done.returncode


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # nothing waits here
@pytest.mark.parametrize("many", [10_000, pytest.param(100_000, marks=pytest.mark.storm)])
async def test_idle_keys_are_dropped(many: int) -> None:
    """After a single use each, many keys are dropped within a thousandth as many calls."""
    now = 0.0
    limiter = LocalRateLimiter(clock=lambda: now)
    for number in range(many):
        (await limiter.acquire(Key("https://api.example.com", f"{number:x}"))).answered(200, NO_HEADERS)
        now += 1e-6
    assert many == len(limiter._keys)
    now += 10.0
    for _ in range(1 + many // 1000):  # each call checks a thousand keys
        (await limiter.acquire(OTHER)).unsent()
    assert len(limiter._keys) <= 1  # the key of the last call


@pytest.mark.anyio
async def test_paused_key_does_not_delay_another_key() -> None:
    """While one key is paused and has a queue, calls of the other key are served immediately."""
    limiter = LocalRateLimiter(clock=anyio.current_time)
    (await limiter.acquire(KEY)).answered(429, Quota(remaining=0, retry_after=30.0))
    async with anyio.create_task_group() as group:
        for _ in range(50):
            group.start_soon(limiter.acquire, KEY)
        await settle()
        assert 50 == limiter.snapshot(KEY).queued
        asked_at = anyio.current_time()
        for _ in range(20):
            (await limiter.acquire(OTHER)).answered(200, NO_HEADERS)
        assert asked_at == anyio.current_time()
        group.cancel_scope.cancel()
