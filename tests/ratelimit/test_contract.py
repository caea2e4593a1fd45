"""What must hold of the limiter of one process, by number.

Point 1 is the state machine in ``test_invariants.py``, point 3 is in ``test_simulator.py``; the headers of
point 6 have a table of their own in ``tests/test_headers.py``. What needs Redis is tested with that.
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
SILENT = Quota()
MOST_LINES = 1000  # of the package for each of ten thousand; to look at all of them for each would be 5,000
how_many = pytest.mark.parametrize("many", [2_000, pytest.param(10_000, marks=pytest.mark.storm)])
real_time = pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])


@pytest.fixture
def no_blocking_calls() -> None:
    """Lift the check of all other tests: it costs more than what is measured here."""


async def use(limiter: LocalRateLimiter, moments: list[float]) -> None:
    """Have one request answered at once, and note when it left."""
    permit = await limiter.acquire(KEY)
    moments.append(limiter.clock())
    permit.sent()
    permit.answered(200, SILENT)


@contextmanager
def lines_run() -> Iterator[list[int]]:
    """Count the lines of the package that are run: work that no slow machine changes."""
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
    """Whether more than the limit left in less than a period."""
    moments = sorted(moments)
    return any(late - early < period for early, late in zip(moments, moments[limit:], strict=False))


async def settle() -> None:
    """Let every task run that can, at the same moment."""
    for _ in range(5):
        await anyio.lowlevel.checkpoint()


# ---------------------------------------------------------------------------------------------- 1
@pytest.mark.anyio
async def test_01_an_idle_key_of_which_nothing_is_known_grants_20_at_once() -> None:
    """Twenty are granted without a wait, and the 21st is not."""
    limiter = LocalRateLimiter(clock=lambda: 7.0)
    for _ in range(20):
        await limiter.acquire(KEY)
    with anyio.move_on_after(0.01) as scope:
        await limiter.acquire(KEY)
    assert scope.cancelled_caught


# ---------------------------------------------------------------------------------------------- 2
@pytest.mark.anyio
async def test_02_sixty_tasks() -> None:
    """20, 40 and 60 are done by 0, 2 and 4 s, and milliseconds after."""
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


# ---------------------------------------------------------------------------------------------- 4
@pytest.mark.anyio
async def test_04_a_window_half_used_by_somebody_else() -> None:
    """The first answer says that 6 remain for 0.7 s: at most 6 more leave until then."""
    limiter = LocalRateLimiter(clock=anyio.current_time)
    moments: list[float] = []

    async def one() -> None:
        permit = await limiter.acquire(KEY)
        moments.append(anyio.current_time())
        permit.sent()
        await anyio.sleep(0.001)
        permit.answered(200, SILENT)

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


# ---------------------------------------------------------------------------------------------- 5
@pytest.mark.anyio
async def test_05_a_429_among_fifty_waiters() -> None:
    """Nobody sends for 1.283 s, the refused one goes first, the others in order; 0.2 s shortens nothing."""
    limiter = LocalRateLimiter(2, 0.05, clock=anyio.current_time)
    order: list[object] = []
    moments: list[float] = []

    async def one(name: object, again: Permit | None = None) -> None:
        permit = await limiter.acquire(KEY, again=again)
        order.append(name)
        moments.append(limiter.clock())
        permit.sent()
        permit.answered(200, SILENT)

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
    # Two are granted at once, and trio runs those in any order.
    pairs = [*zip(order[::2], order[1::2], strict=False)]
    assert {"again", 0} == {*pairs[0]}
    assert [{number, number + 1} for number in range(1, 49, 2)] == [{*pair} for pair in pairs[1:]]


# ---------------------------------------------------------------------------------------------- 6
@pytest.mark.parametrize(
    ("value", "hold"),
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
        ("nan", 2.0),  # ignored: a whole window
        ("inf", 2.0),
        ("1e9999", 2.0),
        ("soon", 2.0),
    ],
)
@pytest.mark.anyio
async def test_06_what_a_429_says(value: str, hold: float) -> None:
    """Every form of the header holds the key for what it means; nonsense holds it for a window."""
    limiter = LocalRateLimiter(clock=lambda: 7.0)
    permit = await limiter.acquire(KEY)
    quota = parse_quota({"retry-after": value, "date": "Tue, 16 Feb 2021 08:02:40 GMT"})
    assert hold == permit.answered(429, quota)
    assert pytest.approx(hold + MARGIN) == limiter.snapshot(KEY).paused_for


@pytest.mark.anyio
async def test_06_a_day_is_an_error_and_not_a_sleep() -> None:
    """Whoever asks then is told at once."""
    limiter = LocalRateLimiter()
    permit = await limiter.acquire(KEY)
    permit.answered(429, parse_quota({"retry-after": "86400"}))
    with anyio.fail_after(5), pytest.raises(WouldWait) as raised:
        await limiter.acquire(KEY, again=permit)
    assert raised.value.refused
    assert 86_399 < raised.value.seconds <= 86_400


# ------------------------------------------------------------------------------------------- 7, 8
@pytest.mark.anyio
@how_many
async def test_07_waiters_cost_little(many: int) -> None:
    """To queue each, and to serve two windows, takes the same work however many there are."""
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
async def test_07_many_with_a_deadline(many: int) -> None:
    """Of those with 5 s each 60 are queued or served; the others hear at once that it is too little."""
    limiter = LocalRateLimiter(clock=lambda: 100.0)  # else a slow machine has time for more of them
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
async def test_08_canceling_nearly_all(many: int) -> None:
    """Head, unsent and in-flight calls among all but ten: those are served with the next slots."""
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
            permit.answered(200, SILENT)

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


# ---------------------------------------------------------------------------------------------- 9
def test_09_two_threads_two_loops_one_key() -> None:
    """An asyncio loop and a trio loop: 80 grants, at most 20 in any period, in three periods and a bit."""
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
def test_09_the_loop_that_holds_the_head_is_killed(killed: str) -> None:
    """The calls of the other loop go on as if those of the dead one had never asked."""
    limiter = LocalRateLimiter(1, 0.2)
    moments: list[float] = []
    waiting, over = threading.Event(), threading.Event()

    class KilledError(Exception):
        """What ends the loop."""

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


# --------------------------------------------------------------------------------------------- 10
@pytest.mark.anyio
@real_time
async def test_10_the_wall_clock_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour forth and two back in mid-run: no grant is early or late, and dates are read as before."""
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
    signal.alarm(20)  # rather than wait for ever
    asyncio.run(use())
    os._exit(0 if limiter.snapshot(KEY).remaining == 18 else 3)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
over.set()
thread.join()
sys.exit(status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_10_fork_while_another_thread_holds_the_lock() -> None:
    """The child works, and knows what its parent has used."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (0, "") == (done.returncode, done.stderr)
    assert signal.SIGALRM != -done.returncode


# --------------------------------------------------------------------------------------------- 12
@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # nothing waits here
@pytest.mark.parametrize("many", [10_000, pytest.param(100_000, marks=pytest.mark.storm)])
async def test_12_many_keys_then_idle(many: int) -> None:
    """Used once each, they are all forgotten a thousandth as many calls later."""
    now = 0.0
    limiter = LocalRateLimiter(clock=lambda: now)
    for number in range(many):
        (await limiter.acquire(Key("https://api.example.com", f"{number:x}"))).answered(200, SILENT)
        now += 1e-6
    assert many == len(limiter._keys)
    now += 10.0
    for _ in range(1 + many // 1000):  # each looks at a thousand
        (await limiter.acquire(OTHER)).unsent()
    assert len(limiter._keys) <= 1  # of the last call


@pytest.mark.anyio
async def test_12_a_paused_key_does_not_delay_another() -> None:
    """While A is held, and has a queue, B is served at once."""
    limiter = LocalRateLimiter(clock=anyio.current_time)
    (await limiter.acquire(KEY)).answered(429, Quota(remaining=0, retry_after=30.0))
    async with anyio.create_task_group() as group:
        for _ in range(50):
            group.start_soon(limiter.acquire, KEY)
        await settle()
        assert 50 == limiter.snapshot(KEY).queued
        asked_at = anyio.current_time()
        for _ in range(20):
            (await limiter.acquire(OTHER)).answered(200, SILENT)
        assert asked_at == anyio.current_time()
        group.cancel_scope.cancel()
