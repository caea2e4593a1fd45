"""The limiter of one process: who gets a permit when, including under cancellation."""

import asyncio
import gc
import logging
import random
from collections import Counter
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from lemcal_async._concurrency import Wakeup
from lemcal_async._headers import Quota
from lemcal_async.errors import ConfigurationError
from lemcal_async.ratelimit import Key, LocalRateLimiter, Permit, Priority, RateLimit, Unlimited, WouldWait
from lemcal_async.ratelimit._slots import LOST_AFTER, LOST_KEPT_FOR, MARGIN, PAUSE_CAP

from .conftest import JumpingLoop

KEY = Key("https://api.example.com", "0f" * 16)
OTHER = Key("https://api.example.com", "f0" * 16)
NO_HEADERS = Quota()
TURNOVER = 2.0 + MARGIN  # from one use of a slot to the next, if responses are immediate


@pytest.fixture
def limiter() -> LocalRateLimiter:
    """Return a limiter on the event loop's clock."""
    return LocalRateLimiter(clock=anyio.current_time)


@pytest.fixture
def narrow() -> LocalRateLimiter:
    """Return a limiter with one request per period, which makes the order of grants visible."""
    return LocalRateLimiter(1, 2.0, clock=anyio.current_time)


async def settle() -> None:
    """Let every runnable task run, without advancing the clock."""
    for _ in range(5):
        await anyio.lowlevel.checkpoint()


def refusal(retry_after: float, limit: int | None = None) -> Quota:
    """Return the headers of a 429."""
    return Quota(limit=limit, remaining=0, retry_after=retry_after, resets_in=retry_after)


class Callers:
    """Tasks that each acquire one permit; ``served`` lists the served ones and their waits."""

    def __init__(self, limiter: LocalRateLimiter, group: anyio.abc.TaskGroup) -> None:
        self.limiter = limiter
        self.group = group
        self.started = anyio.current_time()
        self.scopes: dict[object, anyio.CancelScope] = {}
        self.permits: dict[object, Permit] = {}
        self.served: list[tuple[object, float]] = []
        self.refused: dict[object, WouldWait] = {}

    @property
    def order(self) -> list[object]:
        """The names of the served callers, in order."""
        return [name for name, _ in self.served]

    def at(self, name: object) -> float:
        """Return when a caller was served."""
        return next(moment for served, moment in self.served if served == name)

    async def call(self, *names: object, **options: Any) -> None:
        """Have these callers acquire a permit, one after another; ``respond=False`` keeps them in flight."""
        for name in names:
            self.start(name, **options)
            await settle()

    def start(self, name: object, *, key: Key = KEY, respond: bool = True, **options: Any) -> None:
        """Start a caller that acquires a permit as soon as it runs."""
        self.group.start_soon(partial(self._call, name, key, options, respond=respond))

    async def _call(self, name: object, key: Key, options: dict[str, Any], *, respond: bool) -> None:
        # A forgotten caller fails immediately instead of hanging: the clock jumps to the timeout.
        with anyio.fail_after(1e6) as self.scopes[name]:
            try:
                permit = self.permits[name] = await self.limiter.acquire(key, **options)
            except WouldWait as reason:
                self.refused[name] = reason
                return
            self.served.append((name, anyio.current_time() - self.started))
            if respond:
                permit.sent()
                permit.answered(200, NO_HEADERS)


# ---------------------------------------------------------------------------------------- serving
@pytest.mark.anyio
async def test_an_idle_key_grants_its_limit_at_once(limiter: LocalRateLimiter) -> None:
    """Twenty requests are granted; the next waits until the server has forgotten the first."""
    async with anyio.create_task_group() as group:
        callers = Callers(limiter, group)
        await callers.call(*range(21))
        assert list(range(20)) == callers.order
    assert TURNOVER == pytest.approx(callers.at(20))


@pytest.mark.anyio
async def test_twenty_calls_are_served_per_period(limiter: LocalRateLimiter) -> None:
    """Sixty calls take three periods, in the order in which they were made."""
    async with anyio.create_task_group() as group:
        callers = Callers(limiter, group)
        await callers.call(*range(60))
    bursts = [callers.served[start : start + 20] for start in (0, 20, 40)]
    for number, burst in enumerate(bursts):
        assert [number * TURNOVER] * 20 == pytest.approx([moment for _, moment in burst])
        assert set(range(20 * number, 20 * number + 20)) == {name for name, _ in burst}


@pytest.mark.anyio
@pytest.mark.parametrize("priority", ["interactive", "bulk"])
async def test_first_in_first_out(narrow: LocalRateLimiter, priority: Priority) -> None:
    """Calls of one priority are served in the order in which they were made."""
    async with anyio.create_task_group() as group:
        callers = Callers(narrow, group)
        await callers.call(*range(12), priority=priority)
    assert list(range(12)) == callers.order


@pytest.mark.anyio
async def test_interactive_calls_go_before_bulk_calls(narrow: LocalRateLimiter) -> None:
    """While both wait, one turn in five goes to a bulk call."""
    async with anyio.create_task_group() as group:
        callers = Callers(narrow, group)
        await callers.call("first")
        await callers.call("b0", "b1", "b2", priority="bulk")
        await callers.call(*range(9))
    assert ["first", 0, 1, 2, 3, "b0", 4, 5, 6, 7, "b1", 8, "b2"] == callers.order


@pytest.mark.anyio
async def test_released_permit_goes_to_the_next_call(narrow: LocalRateLimiter) -> None:
    """A request that never reached the server uses none of the budget."""
    async with anyio.create_task_group() as group:
        callers = Callers(narrow, group)
        await callers.call(0, respond=False)
        await callers.call(1, 2)
        assert [0] == callers.order
        callers.permits[0].unsent()
        await settle()
        assert [(0, 0.0), (1, 0.0)] == callers.served


@pytest.mark.anyio
async def test_request_without_a_response(narrow: LocalRateLimiter) -> None:
    """A request that is cut off occupies its slot until it is given up, and for one period after that."""
    async with anyio.create_task_group() as group:
        callers = Callers(narrow, group)
        await callers.call(0, respond=False)
        await callers.call(1)
        callers.permits[0].unknown()
    assert LOST_AFTER + TURNOVER == pytest.approx(callers.at(1))


@pytest.mark.anyio
async def test_slot_counts_from_sending(narrow: LocalRateLimiter) -> None:
    """The slot counts from when the request was sent, which may be long after its grant."""
    async with anyio.create_task_group() as group:
        callers = Callers(narrow, group)
        await callers.call(0, respond=False)
        await callers.call(1)
        await anyio.sleep(30.0)
        callers.permits[0].sent()
        await anyio.sleep(0.1)
        callers.permits[0].answered(200, NO_HEADERS)
    assert 30.1 + TURNOVER == pytest.approx(callers.at(1))


@pytest.mark.anyio
async def test_keys_do_not_delay_each_other(limiter: LocalRateLimiter) -> None:
    """A paused key with a queue does not affect another key."""
    async with anyio.create_task_group() as group:
        callers = Callers(limiter, group)
        await callers.call("refused", respond=False)
        callers.permits["refused"].answered(429, refusal(30.0))
        await callers.call(*range(30))
        await callers.call("another", key=OTHER)
        assert ["refused", "another"] == callers.order
        assert 0.0 == callers.at("another")


# ------------------------------------------------------------------------------------------- 429
@pytest.mark.anyio
async def test_429_pauses_the_key_and_the_refused_request_goes_first(narrow: LocalRateLimiter) -> None:
    """Sending pauses as requested; then the refused request goes first, and the others follow in order."""
    async with anyio.create_task_group() as group:
        callers = Callers(narrow, group)
        await callers.call("refused", respond=False)
        await callers.call(*range(5))
        assert 11.283 == callers.permits["refused"].answered(429, refusal(11.283))
        await callers.call("again", again=callers.permits["refused"])
    assert ["refused", "again", *range(5)] == callers.order
    assert 11.283 + MARGIN == pytest.approx(callers.at("again"))
    assert 11.283 + MARGIN + TURNOVER == pytest.approx(callers.at(0))


@pytest.mark.anyio
async def test_429_delays_the_next_burst(limiter: LocalRateLimiter) -> None:
    """The next burst waits for the end of the pause, and includes the refused request."""
    async with anyio.create_task_group() as group:
        callers = Callers(limiter, group)
        await callers.call("refused", respond=False)
        await callers.call(*range(69))
        await anyio.sleep(1.0)
        callers.permits["refused"].answered(429, refusal(1.283))
        await callers.call("again", again=callers.permits["refused"])
    first = [name for name, moment in callers.served if moment == pytest.approx(2.283 + MARGIN)]
    assert {"again", *range(19, 37)} == set(first)
    assert not [moment for _, moment in callers.served if 0 < moment < 2.283 + MARGIN - 1e-9]


@pytest.mark.anyio
async def test_refused_requests_keep_their_order(limiter: LocalRateLimiter) -> None:
    """Refused requests return in any order, and are served in their original order, even if refused twice."""
    async with anyio.create_task_group() as group:
        callers = Callers(limiter, group)
        await callers.call("a", "b", "c", respond=False)
        await callers.call(*range(20))
        for name in ("c", "a", "b"):
            callers.permits[name].answered(429, refusal(9.0, limit=1))
            await callers.call(name + "'", again=callers.permits[name], respond=name == "b")
        await anyio.sleep(9.1)
        assert "a'" == callers.order[-1]
        callers.permits["a'"].answered(429, refusal(9.0, limit=1))
        await callers.call("a''", again=callers.permits["a'"])
        await anyio.sleep(15.0)
        callers.permits["c'"].answered(200, Quota(limit=20))
    assert ["a'", "a''", "b'", "c'"] == callers.order[20:24]


@pytest.mark.anyio
async def test_server_that_keeps_refusing(limiter: LocalRateLimiter) -> None:
    """After the first burst, a single trial request goes out per window until the server accepts it."""
    refusals = 0
    until = anyio.current_time() + 24.0

    async def one() -> None:
        nonlocal refusals
        permit = None
        while True:
            permit = await limiter.acquire(KEY, again=permit)
            permit.sent()
            await anyio.sleep(0.05)
            if anyio.current_time() >= until:
                permit.answered(200, NO_HEADERS)
                return
            refusals += 1
            permit.answered(429, refusal(1.5))

    async with anyio.create_task_group() as group:
        for _ in range(60):
            group.start_soon(one)
    assert 20 + 24 / 1.5 >= refusals


@pytest.mark.anyio
async def test_second_429_does_not_shorten_the_pause(narrow: LocalRateLimiter) -> None:
    """The longer pause prevails; each 429 returns the pause that it requested."""
    limiter = LocalRateLimiter(2, 2.0, clock=anyio.current_time)
    async with anyio.create_task_group() as group:
        callers = Callers(limiter, group)
        await callers.call("a", "b", respond=False)
        await callers.call("next")
        assert 7.0 == callers.permits["a"].answered(429, refusal(7.0))
        await anyio.sleep(0.5)
        assert 0.2 == callers.permits["b"].answered(429, refusal(0.2))
    assert 7.0 + MARGIN == pytest.approx(callers.at("next"))


@pytest.mark.anyio
async def test_429_without_retry_after(limiter: LocalRateLimiter) -> None:
    """The key pauses for a whole window; responses other than a 429 do not pause it."""
    permit = await limiter.acquire(KEY)
    assert 2.0 == permit.answered(429, NO_HEADERS)
    assert TURNOVER == pytest.approx(limiter.snapshot(KEY).paused_for)
    permit = await limiter.acquire(OTHER)
    assert 0.0 == permit.answered(503, refusal(9.0))
    assert 0.0 == limiter.snapshot(OTHER).paused_for


@pytest.mark.anyio
async def test_429_is_logged_without_a_secret(
    limiter: LocalRateLimiter, caplog: pytest.LogCaptureFixture
) -> None:
    """The log explains why sending paused, with the short form of the key."""
    caplog.set_level(logging.INFO, "lemcal_async.ratelimit")
    permit = await limiter.acquire(KEY)
    permit.answered(429, refusal(1.283))
    message = "key 0f0f0f0f at https://api.example.com: refused (429); sending is paused for 1.283 s"
    assert [message] == caplog.messages


@pytest.mark.anyio
async def test_permit_of_another_limiter_is_ignored(narrow: LocalRateLimiter) -> None:
    """Such a permit has no place in this queue: the call is queued like any other."""
    for other in (LocalRateLimiter(), Unlimited()):
        foreign = await other.acquire(KEY)
        async with anyio.create_task_group() as group:
            callers = Callers(narrow, group)
            await callers.call(0, 1)
            await callers.call(2, again=foreign)
            await callers.call(3)
        assert [0, 1, 2, 3] == callers.order


# ----------------------------------------------------------------------------- too long to wait for
@pytest.mark.anyio
async def test_retry_after_of_a_day_refuses_all_calls(limiter: LocalRateLimiter) -> None:
    """All waiting and new calls are refused immediately with the remaining time; none sleeps through it."""
    async with anyio.create_task_group() as group:
        callers = Callers(limiter, group)
        await callers.call("first", respond=False)
        await callers.call(*range(30))
        await callers.call("bulk", priority="bulk")
        callers.permits["first"].answered(429, refusal(86_400.0))
        await callers.call("again", again=callers.permits["first"])
        await callers.call("new")
        assert {*range(19, 30), "bulk", "again", "new"} == set(callers.refused)
        assert {(86_400.0, True)} == {(no.seconds, no.refused) for no in callers.refused.values()}
        assert 0 == limiter.snapshot(KEY).queued
        await anyio.sleep(50.0)
        await callers.call("later")
        assert 86_350.0 == pytest.approx(callers.refused["later"].seconds)


@pytest.mark.anyio
async def test_long_refusal_is_retried(limiter: LocalRateLimiter) -> None:
    """After a minute, a call may check whether the refusal still stands."""
    permit = await limiter.acquire(KEY)
    permit.answered(429, refusal(86_400.0))
    await anyio.sleep(PAUSE_CAP + MARGIN)
    permit = await limiter.acquire(KEY)
    permit.answered(429, refusal(1.0))
    started = anyio.current_time()
    await limiter.acquire(KEY)
    assert 1.0 + MARGIN == pytest.approx(anyio.current_time() - started)


@pytest.mark.anyio
async def test_calls_that_cannot_meet_their_deadline_are_refused(limiter: LocalRateLimiter) -> None:
    """Of 1,000 calls with 5 s each, only those that can be served in time are queued."""
    async with anyio.create_task_group() as group:
        callers = Callers(limiter, group)
        await callers.call(*range(60), timeout=5.0)
        for number in range(60, 1_000):
            callers.start(number, timeout=5.0)
        await settle()
        assert callers.started == anyio.current_time()
        assert 40 == limiter.snapshot(KEY).queued
        assert {*range(60, 1_000)} == {*callers.refused}
        waits = {(round(reason.seconds, 3), reason.refused) for reason in callers.refused.values()}
        assert {(6.0, False)} == waits
    assert {*range(60)} == {*callers.order}
    assert 2 * TURNOVER == pytest.approx(max(moment for _, moment in callers.served))


@pytest.mark.anyio
async def test_deadline_met_exactly(narrow: LocalRateLimiter) -> None:
    """A call served just in time is not refused, and a call that need not wait never is."""
    (await narrow.acquire(KEY, timeout=0.0)).answered(200, NO_HEADERS)
    with pytest.raises(WouldWait, check=lambda reason: reason.seconds == 2.0):
        await narrow.acquire(KEY, timeout=2.0 - 0.001)
    await narrow.acquire(KEY, timeout=2.0)


@pytest.mark.anyio
async def test_deadline_of_a_refused_request_ignores_the_queue(narrow: LocalRateLimiter) -> None:
    """The estimate for a call that goes first only includes the pause."""
    async with anyio.create_task_group() as group:
        callers = Callers(narrow, group)
        await callers.call("refused", respond=False)
        await callers.call(*range(9))
        callers.permits["refused"].answered(429, refusal(3.0))
        await callers.call("again", again=callers.permits["refused"], timeout=3.1)
        await callers.call("newcomer", timeout=20.0)
    assert {"newcomer"} == set(callers.refused)
    assert ["refused", "again"] == callers.order[:2]


@pytest.mark.anyio
async def test_long_wait_is_warned_about_once_per_key(
    narrow: LocalRateLimiter, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the first call without a deadline that faces more than 30 s logs a warning."""
    async with anyio.create_task_group() as group:
        callers = Callers(narrow, group)
        await callers.call(*range(15))
        await callers.call("patient", timeout=3600.0)
        assert [] == caplog.messages
        await callers.call("a", "b", "c")
        await callers.call(*range(100, 120), key=OTHER)
    of_one, of_other = caplog.messages
    assert of_one == (
        "key 0f0f0f0f at https://api.example.com: a call without a deadline will wait 32 s for the rate "
        "limit (15 calls queued); pass deadline= to fail fast instead"
    )
    assert of_other.startswith("key f0f0f0f0 at")


# ----------------------------------------------------------------------------------- the registry
@pytest.mark.anyio
async def test_snapshot(limiter: LocalRateLimiter) -> None:
    """A snapshot reports the remaining budget, its reset, the queue and the pause."""
    assert RateLimit(20, 20, resets_in=0.0, queued=0, paused_for=0.0) == limiter.snapshot(KEY)
    async with anyio.create_task_group() as group:
        callers = Callers(limiter, group)
        await callers.call("held", respond=False)
        assert (19, 0) == (limiter.snapshot(KEY).remaining, limiter.snapshot(KEY).queued)
        await callers.call(*range(24))
        seen = limiter.snapshot(KEY)
        assert (20, 0, 5, 0.0) == (seen.limit, seen.remaining, seen.queued, seen.paused_for)
        assert TURNOVER == pytest.approx(seen.resets_in)
        callers.permits["held"].answered(429, refusal(7.0, limit=10))
        seen = limiter.snapshot(KEY)
        assert (10, 0, 5) == (seen.limit, seen.remaining, seen.queued)
        assert (7.0 + MARGIN,) * 2 == pytest.approx((seen.resets_in, seen.paused_for))
    assert RateLimit(20, 20, resets_in=0.0, queued=0, paused_for=0.0) == limiter.snapshot(OTHER)


@pytest.mark.anyio
async def test_idle_keys_are_dropped() -> None:
    """The registry is empty again once all keys are idle, however many there were."""
    now = 0.0
    limiter = LocalRateLimiter(clock=lambda: now)
    for number in range(2_500):
        (await limiter.acquire(Key("https://api.example.com", f"{number:032x}"))).answered(200, NO_HEADERS)
    assert 2_500 == len(limiter._keys)
    now = 10.0
    for number in range(6):
        (await limiter.acquire(Key("https://api.example.com", f"new{number}"))).unsent()
    assert len(limiter._keys) <= 1  # the key of the last call


@pytest.mark.anyio
async def test_keys_in_use_are_kept(narrow: LocalRateLimiter) -> None:
    """A key is kept while a request is in flight, still counted, or waiting."""
    async with anyio.create_task_group() as group:
        callers = Callers(narrow, group)
        await callers.call("hangs", respond=False)
        await callers.call("waits")
        await anyio.sleep(3600.0)
        (await narrow.acquire(OTHER)).unsent()
        assert KEY in narrow._keys
        callers.permits["hangs"].answered(200, NO_HEADERS)
        (await narrow.acquire(OTHER)).unsent()
        assert KEY in narrow._keys
    await anyio.sleep(TURNOVER)
    (await narrow.acquire(OTHER)).unsent()
    assert len(narrow._keys) <= 1


@pytest.mark.parametrize("limit", [0, -1, 2.5, "20", True, None])
def test_invalid_limit(limit: Any) -> None:
    """A limit that allows nothing, or that is not a limit, raises ``ConfigurationError``."""
    with pytest.raises(ConfigurationError, match=rf"^limit={limit!r}: it must be a whole number"):
        LocalRateLimiter(limit)


@pytest.mark.parametrize("period", [0.0, -1.0, float("inf"), float("nan"), "x", True, None])
def test_invalid_period(period: Any) -> None:
    """A period that is not a finite number of seconds raises ``ConfigurationError``."""
    with pytest.raises(ConfigurationError, match=rf"^period={period!r}: it must be a finite number"):
        LocalRateLimiter(period=period)


def test_repr() -> None:
    """The repr shows the limit and the period."""
    assert "LocalRateLimiter(limit=20, period=2.0)" == repr(LocalRateLimiter())


# --------------------------------------------------------------------------------------- reports
def nothing() -> None:
    """Do nothing: an event without an effect."""


@pytest.mark.anyio
async def test_reports_after_the_permit_has_ended(narrow: LocalRateLimiter) -> None:
    """Repeated or late reports change nothing, even after the key has been dropped."""
    permit = await narrow.acquire(KEY)
    permit.answered(200, NO_HEADERS)
    before = narrow.snapshot(KEY)
    for _ in range(2):
        permit.sent()
        permit.unsent()
        permit.unknown()
        permit.answered(200, Quota(limit=1, remaining=0, retry_after=9.0))
        permit.answered(429, refusal(9.0))
    assert before == narrow.snapshot(KEY)
    await anyio.sleep(10.0)
    permit.answered(429, refusal(9.0))
    permit.unsent()
    assert len(narrow._keys) <= 1
    assert 1 == narrow.snapshot(KEY).remaining


@pytest.mark.anyio
async def test_reports_before_the_grant(narrow: LocalRateLimiter) -> None:
    """Reports of a call that is still waiting are ignored."""
    async with anyio.create_task_group() as group:
        callers = Callers(narrow, group)
        await callers.call(0, respond=False)
        await callers.call(1)
        waiting = narrow._keys[KEY].queue.head()
        assert waiting is not None
        waiting.answered(429, refusal(9.0))
        waiting.unsent()
        callers.permits[0].unsent()
    assert [(0, 0.0), (1, 0.0)] == callers.served


@pytest.mark.anyio
async def test_report_during_a_grant_on_the_same_thread() -> None:
    """A finalizer may report at any moment, even during a grant: its report is processed next."""
    reports: list[Permit] = []

    def clock() -> float:
        while reports:
            reports.pop().unsent()
        return anyio.current_time()

    limiter = LocalRateLimiter(2, 2.0, clock=clock)
    async with anyio.create_task_group() as group:
        callers = Callers(limiter, group)
        await callers.call("a", "b", respond=False)
        await callers.call("c")
        reports.append(callers.permits["a"])
        await callers.call("d")
        assert ["a", "b", "c"] == callers.order
        assert 1 == limiter.snapshot(KEY).queued
        reports.append(callers.permits["b"])
        limiter.snapshot(KEY)
        await settle()
        assert ["a", "b", "c", "d"] == callers.order


@pytest.mark.anyio
async def test_events_during_other_processing_are_queued(narrow: LocalRateLimiter) -> None:
    """Events stay in the inbox without blocking; the next event processes them, including cancellations."""
    async with anyio.create_task_group() as group:
        callers = Callers(narrow, group)
        await callers.call(0, respond=False)
        with narrow._inbox._lock:
            await callers.call(1, 2)
            callers.scopes[1].cancel()
            callers.permits[0].unsent()
            await settle()
            assert [0] == callers.order
        narrow._inbox.post(None, nothing)
        await settle()
        assert [0, 2] == callers.order


# ----------------------------------------------------------------------------------- cancellation
@pytest.mark.anyio
@pytest.mark.parametrize("place", [1, 3, 5])
async def test_cancellation_in_the_queue(narrow: LocalRateLimiter, place: int) -> None:
    """After a cancellation at the head, middle or tail, the others are served as if it had never queued."""
    async with anyio.create_task_group() as group:
        callers = Callers(narrow, group)
        await callers.call(*range(6))
        await anyio.sleep(1.0)
        callers.scopes[place].cancel()
        await settle()
        assert 4 == narrow.snapshot(KEY).queued
    assert [number for number in range(6) if number != place] == callers.order
    assert 4 * TURNOVER == pytest.approx(callers.served[-1][1])


@pytest.mark.anyio
async def test_grant_to_a_canceled_call_goes_to_the_next(narrow: LocalRateLimiter) -> None:
    """A grant to a call that is being canceled goes to the next call at the same moment."""
    async with anyio.create_task_group() as group:
        callers = Callers(narrow, group)
        await callers.call(0, respond=False)
        await callers.call(1, 2, 3)
        callers.scopes[1].cancel()
        callers.scopes[2].cancel()
        callers.permits[0].unsent()  # grants call 1, which has not withdrawn yet
        await settle()
    assert [(0, 0.0), (3, 0.0)] == callers.served


@pytest.mark.anyio
async def test_cancellation_right_after_a_grant(narrow: LocalRateLimiter) -> None:
    """A grant made before the cancellation is kept or passed on, but never lost."""
    async with anyio.create_task_group() as group:
        callers = Callers(narrow, group)
        await callers.call(0, respond=False)
        await callers.call(1, 2)
        callers.permits[0].unsent()  # grants call 1, which has not woken up yet
        callers.scopes[1].cancel()
        await settle()
        assert 1 == len(callers.order[1:])
    assert callers.at(2) in (0.0, TURNOVER)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", [("asyncio", {"loop_factory": JumpingLoop})], ids=["asyncio"])
@pytest.mark.parametrize("granted_first", [True, False])
async def test_native_cancellation_around_the_grant(narrow: LocalRateLimiter, granted_first: bool) -> None:  # noqa: FBT001  # a column
    """After ``task.cancel()`` at the moment of the grant, in either order, the next call gets the grant."""
    first = await narrow.acquire(KEY)
    tasks = [asyncio.ensure_future(narrow.acquire(KEY)) for _ in range(3)]
    await settle()
    if granted_first:
        first.unsent()
    tasks[0].cancel()
    if not granted_first:
        first.unsent()
    await settle()
    assert [True, True, False] == [task.done() for task in tasks]
    assert tasks[0].cancelled()
    tasks[1].result().unsent()
    assert 0 == narrow.snapshot(KEY).remaining
    (await tasks[2]).unsent()
    assert narrow.limit == narrow.snapshot(KEY).remaining


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", [("asyncio", {"loop_factory": JumpingLoop})], ids=["asyncio"])
@pytest.mark.parametrize("place", [0, 2, 4])
async def test_native_cancellation_in_the_queue(narrow: LocalRateLimiter, place: int) -> None:
    """The others are served as if the canceled call had never queued, even if it held the alarm."""
    (await narrow.acquire(KEY)).answered(200, NO_HEADERS)
    started = anyio.current_time()
    tasks = [asyncio.ensure_future(narrow.acquire(KEY)) for _ in range(5)]
    await anyio.sleep(1.0)
    tasks.pop(place).cancel()
    for number, task in enumerate(tasks, 1):
        (await task).answered(200, NO_HEADERS)
        assert number * TURNOVER == pytest.approx(anyio.current_time() - started)


@pytest.mark.anyio
async def test_cancellation_at_the_moment_of_waking(narrow: LocalRateLimiter) -> None:
    """A call canceled just before or as it wakes up leaves no gap."""
    for _ in range(10):
        async with anyio.create_task_group() as group:
            callers = Callers(narrow, group)
            await callers.call(0, 1, 2)
            due = narrow.snapshot(KEY).resets_in
            for early in (0.0, 1e-9):
                group.start_soon(_cancel_later, callers, 1, due - early)
        assert 2 in callers.order
        assert callers.at(2) <= (callers.at(1) if 1 in callers.order else 0.0) + TURNOVER + 1e-6
        await anyio.sleep(10.0)


async def _cancel_later(callers: Callers, name: object, seconds: float) -> None:
    await anyio.sleep(seconds)
    callers.scopes[name].cancel()


@pytest.mark.anyio
async def test_cancellation_before_acquire(limiter: LocalRateLimiter) -> None:
    """A call in a canceled scope gets a permit if no wait is needed, and otherwise leaves no trace."""
    with anyio.CancelScope() as scope:
        scope.cancel()
        for _ in range(20):
            await limiter.acquire(KEY)
        await limiter.acquire(KEY)
        pytest.fail("it waited")
    assert 0 == limiter.snapshot(KEY).queued


@pytest.mark.anyio
async def test_cancellation_of_most_of_two_thousand_calls(
    limiter: LocalRateLimiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The survivors are served with the next slots; each cancellation takes only a few steps."""
    wakes = []
    wake = Wakeup.wake

    def counting(wakeup: Wakeup) -> bool:
        wakes.append(wakeup)
        return wake(wakeup)

    monkeypatch.setattr(Wakeup, "wake", counting)
    async with anyio.create_task_group() as group:
        callers = Callers(limiter, group)
        for number in range(2_000):
            callers.start(number, respond=False)
        await settle()
        assert 1_980 == limiter.snapshot(KEY).queued
        await anyio.sleep(1.0)
        granted = list(callers.order)
        for name in granted[:5]:
            callers.permits[name].unsent()  # grants five calls, which have not woken up yet
        for name in granted[5:]:
            callers.permits[name].unknown()
        survivors = sorted({*range(2_000)} - {*granted})[::199]
        for name in callers.scopes.keys() - {*survivors}:
            callers.scopes[name].cancel()
        due = limiter.snapshot(KEY).resets_in
        await settle()
    assert 10 == len(survivors)
    assert {*survivors} <= {*callers.order}
    assert max(callers.at(name) for name in survivors) <= 1.0 + due + 1e-6
    assert len(wakes) < 4_000


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", [("asyncio", {"loop_factory": JumpingLoop})], ids=["asyncio"])
async def test_garbage_collected_wait(narrow: LocalRateLimiter) -> None:
    """A coroutine that is collected while it waits gives up its place, or a grant not picked up yet.

    Trio leaves no such coroutines behind.
    """
    permit = await narrow.acquire(KEY)
    left = [narrow.acquire(KEY) for _ in range(3)]
    for coroutine in left:
        coroutine.send(None)
    assert 3 == narrow.snapshot(KEY).queued
    del coroutine, left[1]
    gc.collect()
    assert 2 == narrow.snapshot(KEY).queued
    permit.unsent()  # grants the first call
    seen = narrow.snapshot(KEY)
    assert (0, 1) == (seen.remaining, seen.queued)
    left.clear()
    gc.collect()
    assert RateLimit(1, 1, resets_in=0.0, queued=0, paused_for=0.0) == narrow.snapshot(KEY)


# ------------------------------------------------------------------------------------- all at once
@pytest.mark.anyio
@pytest.mark.parametrize("seed", range(8))
async def test_random_outcomes_starve_no_call(seed: int) -> None:
    """300 calls on 3 keys, some canceled, refused or lost: all others are served within the limit."""
    rng = random.Random(seed)
    limiter = LocalRateLimiter(3, 2.0, clock=anyio.current_time)
    departures: dict[Key, list[float]] = {Key("https://api.example.com", name): [] for name in "abc"}
    ends: Counter[str] = Counter()

    async def one(number: int) -> None:
        key = rng.choice(list(departures))
        priority: Priority = rng.choice(["interactive", "bulk"])
        await anyio.sleep(rng.random() * 60)
        with anyio.move_on_after(rng.choice([rng.random() * 20, 10_000.0])) as scope:
            permit, end = None, "refused"
            while end == "refused":
                permit = await limiter.acquire(key, priority=priority, again=permit)
                end = rng.choice(["answered", "answered", "answered", "unsent", "unknown", "refused"])
                with anyio.CancelScope(shield=True):
                    await use(permit, end, departures[key])
            ends[end] += 1
        ends["canceled"] += scope.cancelled_caught

    async def use(permit: Permit, end: str, departures: list[float]) -> None:
        await anyio.sleep(rng.choice([0.0, rng.random(), rng.random() * 5]))
        if end == "unsent":
            permit.unsent()
            return
        departures.append(anyio.current_time())
        permit.sent()
        await anyio.sleep(rng.random() * 0.4)
        if end == "unknown":
            permit.unknown()
        elif end == "refused":
            permit.answered(429, refusal(rng.random() * 3))
        else:
            permit.answered(200, NO_HEADERS)

    with anyio.fail_after(20_000):
        async with anyio.create_task_group() as group:
            for number in range(300):
                group.start_soon(one, number)
    assert 300 == sum(ends.values())
    assert {"answered", "unsent", "unknown", "canceled"} == ends.keys()
    for moments in departures.values():
        moments.sort()
        assert all(late - early >= 2.0 for early, late in zip(moments, moments[3:], strict=False))
    assert {0} == {limiter.snapshot(key).queued for key in departures}
    await anyio.sleep(LOST_KEPT_FOR)
    for _ in range(10):
        (await limiter.acquire(KEY)).unsent()
    assert len(limiter._keys) <= 1  # the key of the last call


@pytest.mark.anyio
async def test_log_handler_that_takes_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log handler that takes a snapshot while it logs a long wait does not deadlock."""
    limiter = LocalRateLimiter(1, 40.0)
    seen: list[RateLimit] = []

    class Curious(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(limiter.snapshot(KEY))

    logger = logging.getLogger("lemcal_async.ratelimit")
    monkeypatch.setattr(logger, "handlers", [Curious()])
    await limiter.acquire(KEY)
    with anyio.move_on_after(0.05):
        await limiter.acquire(KEY)
    assert [1] == [snapshot.queued for snapshot in seen]
