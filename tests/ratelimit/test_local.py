"""The limiter of one process: who gets a permit when, and what nobody has to pay for."""

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
SILENT = Quota()
TURNOVER = 2.0 + MARGIN  # from one use of a slot to the next, when answers come at once


@pytest.fixture
def limiter() -> LocalRateLimiter:
    """Return a limiter on the clock of the event loop."""
    return LocalRateLimiter(clock=anyio.current_time)


@pytest.fixture
def narrow() -> LocalRateLimiter:
    """Return one that lets one request pass in a period, so that the order of grants shows."""
    return LocalRateLimiter(1, 2.0, clock=anyio.current_time)


async def settle() -> None:
    """Let every task run that can, at the same moment."""
    for _ in range(5):
        await anyio.lowlevel.checkpoint()


def refusal(retry_after: float, limit: int | None = None) -> Quota:
    """Return what the headers of a 429 say."""
    return Quota(limit=limit, remaining=0, retry_after=retry_after, resets_in=retry_after)


class Callers:
    """Tasks that each want one permit; ``served`` has who got theirs, and after how long."""

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
        """Return who was served, in order."""
        return [name for name, _ in self.served]

    def at(self, name: object) -> float:
        """Return when somebody was served."""
        return next(moment for served, moment in self.served if served == name)

    async def call(self, *names: object, **options: Any) -> None:
        """Have these ask for a permit, one after the other; each has its answer at once, or never."""
        for name in names:
            self.ask(name, **options)
            await settle()

    def ask(self, name: object, *, key: Key = KEY, answer: bool = True, **options: Any) -> None:
        """Have one ask as soon as it comes to it."""
        self.group.start_soon(partial(self._call, name, key, options, answer=answer))

    async def _call(self, name: object, key: Key, options: dict[str, Any], *, answer: bool) -> None:
        # Whoever is forgotten fails at once instead of hanging: the clock jumps there.
        with anyio.fail_after(1e6) as self.scopes[name]:
            try:
                permit = self.permits[name] = await self.limiter.acquire(key, **options)
            except WouldWait as reason:
                self.refused[name] = reason
                return
            self.served.append((name, anyio.current_time() - self.started))
            if answer:
                permit.sent()
                permit.answered(200, SILENT)


# ---------------------------------------------------------------------------------------- serving
@pytest.mark.anyio
async def test_an_idle_key_grants_its_limit_at_once(limiter: LocalRateLimiter) -> None:
    """Twenty go, and the next one waits until the server has forgotten the first."""
    async with anyio.create_task_group() as group:
        callers = Callers(limiter, group)
        await callers.call(*range(21))
        assert list(range(20)) == callers.order
    assert TURNOVER == pytest.approx(callers.at(20))


@pytest.mark.anyio
async def test_sixty_calls(limiter: LocalRateLimiter) -> None:
    """Twenty in each period, in the order in which they asked."""
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
    """Who asked first is served first."""
    async with anyio.create_task_group() as group:
        callers = Callers(narrow, group)
        await callers.call(*range(12), priority=priority)
    assert list(range(12)) == callers.order


@pytest.mark.anyio
async def test_interactive_calls_pass_bulk_ones(narrow: LocalRateLimiter) -> None:
    """While both wait, one turn in five is a bulk one."""
    async with anyio.create_task_group() as group:
        callers = Callers(narrow, group)
        await callers.call("first")
        await callers.call("b0", "b1", "b2", priority="bulk")
        await callers.call(*range(9))
    assert ["first", 0, 1, 2, 3, "b0", 4, 5, 6, 7, "b1", 8, "b2"] == callers.order


@pytest.mark.anyio
async def test_a_permit_given_back_goes_to_the_next(narrow: LocalRateLimiter) -> None:
    """A request that never reached the server costs no time."""
    async with anyio.create_task_group() as group:
        callers = Callers(narrow, group)
        await callers.call(0, answer=False)
        await callers.call(1, 2)
        assert [0] == callers.order
        callers.permits[0].unsent()
        await settle()
        assert [(0, 0.0), (1, 0.0)] == callers.served


@pytest.mark.anyio
async def test_a_request_without_an_answer(narrow: LocalRateLimiter) -> None:
    """Cut off, it occupies its slot until it is given up, and a period longer."""
    async with anyio.create_task_group() as group:
        callers = Callers(narrow, group)
        await callers.call(0, answer=False)
        await callers.call(1)
        callers.permits[0].unknown()
    assert LOST_AFTER + TURNOVER == pytest.approx(callers.at(1))


@pytest.mark.anyio
async def test_a_late_departure_counts(narrow: LocalRateLimiter) -> None:
    """What counts is when the request left, which may be long after its grant."""
    async with anyio.create_task_group() as group:
        callers = Callers(narrow, group)
        await callers.call(0, answer=False)
        await callers.call(1)
        await anyio.sleep(30.0)
        callers.permits[0].sent()
        await anyio.sleep(0.1)
        callers.permits[0].answered(200, SILENT)
    assert 30.1 + TURNOVER == pytest.approx(callers.at(1))


@pytest.mark.anyio
async def test_keys_do_not_delay_each_other(limiter: LocalRateLimiter) -> None:
    """A key that is paused and has a queue is nothing to another."""
    async with anyio.create_task_group() as group:
        callers = Callers(limiter, group)
        await callers.call("refused", answer=False)
        callers.permits["refused"].answered(429, refusal(30.0))
        await callers.call(*range(30))
        await callers.call("another", key=OTHER)
        assert ["refused", "another"] == callers.order
        assert 0.0 == callers.at("another")


# ------------------------------------------------------------------------------------------- 429
@pytest.mark.anyio
async def test_a_429_holds_the_key_and_the_refused_goes_first(narrow: LocalRateLimiter) -> None:
    """Nobody sends for the time that the server names; then the refused one, then the others in order."""
    async with anyio.create_task_group() as group:
        callers = Callers(narrow, group)
        await callers.call("refused", answer=False)
        await callers.call(*range(5))
        assert 11.283 == callers.permits["refused"].answered(429, refusal(11.283))
        await callers.call("again", again=callers.permits["refused"])
    assert ["refused", "again", *range(5)] == callers.order
    assert 11.283 + MARGIN == pytest.approx(callers.at("again"))
    assert 11.283 + MARGIN + TURNOVER == pytest.approx(callers.at(0))


@pytest.mark.anyio
async def test_a_429_among_fifty(limiter: LocalRateLimiter) -> None:
    """The burst that was next waits, and leaves with the refused one among it."""
    async with anyio.create_task_group() as group:
        callers = Callers(limiter, group)
        await callers.call("refused", answer=False)
        await callers.call(*range(69))
        await anyio.sleep(1.0)
        callers.permits["refused"].answered(429, refusal(1.283))
        await callers.call("again", again=callers.permits["refused"])
    first = [name for name, moment in callers.served if moment == pytest.approx(2.283 + MARGIN)]
    assert {"again", *range(19, 37)} == set(first)
    assert not [moment for _, moment in callers.served if 0 < moment < 2.283 + MARGIN - 1e-9]


@pytest.mark.anyio
async def test_several_refused_keep_their_order(limiter: LocalRateLimiter) -> None:
    """They come back in any order, and go in the one in which they first asked; twice, if need be."""
    async with anyio.create_task_group() as group:
        callers = Callers(limiter, group)
        await callers.call("a", "b", "c", answer=False)
        await callers.call(*range(20))
        for name in ("c", "a", "b"):
            callers.permits[name].answered(429, refusal(9.0, limit=1))
            await callers.call(name + "'", again=callers.permits[name], answer=name == "b")
        await anyio.sleep(9.1)
        assert "a'" == callers.order[-1]
        callers.permits["a'"].answered(429, refusal(9.0, limit=1))
        await callers.call("a''", again=callers.permits["a'"])
        await anyio.sleep(15.0)
        callers.permits["c'"].answered(200, Quota(limit=20))
    assert ["a'", "a''", "b'", "c'"] == callers.order[20:24]


@pytest.mark.anyio
async def test_a_server_that_refuses_for_long(limiter: LocalRateLimiter) -> None:
    """After the first burst, each window is tried with one request; then all go on."""
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
                permit.answered(200, SILENT)
                return
            refusals += 1
            permit.answered(429, refusal(1.5))

    async with anyio.create_task_group() as group:
        for _ in range(60):
            group.start_soon(one)
    assert 20 + 24 / 1.5 >= refusals


@pytest.mark.anyio
async def test_a_second_429_does_not_shorten_the_pause(narrow: LocalRateLimiter) -> None:
    """The order that ends last stands, and both pauses are reported as they were named."""
    limiter = LocalRateLimiter(2, 2.0, clock=anyio.current_time)
    async with anyio.create_task_group() as group:
        callers = Callers(limiter, group)
        await callers.call("a", "b", answer=False)
        await callers.call("next")
        assert 7.0 == callers.permits["a"].answered(429, refusal(7.0))
        await anyio.sleep(0.5)
        assert 0.2 == callers.permits["b"].answered(429, refusal(0.2))
    assert 7.0 + MARGIN == pytest.approx(callers.at("next"))


@pytest.mark.anyio
async def test_a_429_that_does_not_say_how_long(limiter: LocalRateLimiter) -> None:
    """Then a whole window is held; what is no 429 holds nothing."""
    permit = await limiter.acquire(KEY)
    assert 2.0 == permit.answered(429, SILENT)
    assert TURNOVER == pytest.approx(limiter.snapshot(KEY).paused_for)
    permit = await limiter.acquire(OTHER)
    assert 0.0 == permit.answered(503, refusal(9.0))
    assert 0.0 == limiter.snapshot(OTHER).paused_for


@pytest.mark.anyio
async def test_a_429_is_logged_without_a_secret(
    limiter: LocalRateLimiter, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever wonders why nothing moves finds it in the log, with the short form of the key."""
    caplog.set_level(logging.INFO, "lemcal_async.ratelimit")
    permit = await limiter.acquire(KEY)
    permit.answered(429, refusal(1.283))
    message = "key 0f0f0f0f at https://api.example.com was refused (429): sending paused for 1.283 s"
    assert [message] == caplog.messages


@pytest.mark.anyio
async def test_the_permit_of_another_limiter(narrow: LocalRateLimiter) -> None:
    """It has no place in this queue: the call asks like any other."""
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
async def test_an_order_to_wait_for_a_day(limiter: LocalRateLimiter) -> None:
    """All who wait and all who come are told at once how long it is; nobody sleeps through it."""
    async with anyio.create_task_group() as group:
        callers = Callers(limiter, group)
        await callers.call("first", answer=False)
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
async def test_such_an_order_is_tried_again(limiter: LocalRateLimiter) -> None:
    """After a minute calls may find out whether it still stands."""
    permit = await limiter.acquire(KEY)
    permit.answered(429, refusal(86_400.0))
    await anyio.sleep(PAUSE_CAP + MARGIN)
    permit = await limiter.acquire(KEY)
    permit.answered(429, refusal(1.0))
    started = anyio.current_time()
    await limiter.acquire(KEY)
    assert 1.0 + MARGIN == pytest.approx(anyio.current_time() - started)


@pytest.mark.anyio
async def test_deadlines(limiter: LocalRateLimiter) -> None:
    """Of 1,000 with 5 s each, those are queued who can be served in time; the others hear it at once."""
    async with anyio.create_task_group() as group:
        callers = Callers(limiter, group)
        await callers.call(*range(60), timeout=5.0)
        for number in range(60, 1_000):
            callers.ask(number, timeout=5.0)
        await settle()
        assert callers.started == anyio.current_time()
        assert 40 == limiter.snapshot(KEY).queued
        assert {*range(60, 1_000)} == {*callers.refused}
        told = {(round(reason.seconds, 3), reason.refused) for reason in callers.refused.values()}
        assert {(6.0, False)} == told
    assert {*range(60)} == {*callers.order}
    assert 2 * TURNOVER == pytest.approx(max(moment for _, moment in callers.served))


@pytest.mark.anyio
async def test_a_deadline_that_can_be_met_to_the_second(narrow: LocalRateLimiter) -> None:
    """A call that is served just in time is not refused, and one that need not wait never is."""
    (await narrow.acquire(KEY, timeout=0.0)).answered(200, SILENT)
    with pytest.raises(WouldWait, check=lambda reason: reason.seconds == 2.0):
        await narrow.acquire(KEY, timeout=2.0 - 0.001)
    await narrow.acquire(KEY, timeout=2.0)


@pytest.mark.anyio
async def test_the_refused_need_not_wait_for_the_queue(narrow: LocalRateLimiter) -> None:
    """A call that goes first is measured by the pause alone."""
    async with anyio.create_task_group() as group:
        callers = Callers(narrow, group)
        await callers.call("refused", answer=False)
        await callers.call(*range(9))
        callers.permits["refused"].answered(429, refusal(3.0))
        await callers.call("again", again=callers.permits["refused"], timeout=3.1)
        await callers.call("newcomer", timeout=20.0)
    assert {"newcomer"} == set(callers.refused)
    assert ["refused", "again"] == callers.order[:2]


@pytest.mark.anyio
async def test_one_warning_for_each_key(narrow: LocalRateLimiter, caplog: pytest.LogCaptureFixture) -> None:
    """The first call without a deadline that faces more than half a minute is told, and no other."""
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
    """What is left, when it is whole again, who waits, and for how long nobody sends."""
    assert RateLimit(20, 20, resets_in=0.0, queued=0, paused_for=0.0) == limiter.snapshot(KEY)
    async with anyio.create_task_group() as group:
        callers = Callers(limiter, group)
        await callers.call("held", answer=False)
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
async def test_idle_keys_are_forgotten() -> None:
    """However many keys come, the registry is empty again once they are idle."""
    now = 0.0
    limiter = LocalRateLimiter(clock=lambda: now)
    for number in range(2_500):
        (await limiter.acquire(Key("https://api.example.com", f"{number:032x}"))).answered(200, SILENT)
    assert 2_500 == len(limiter._keys)
    now = 10.0
    for number in range(6):
        (await limiter.acquire(Key("https://api.example.com", f"new{number}"))).unsent()
    assert len(limiter._keys) <= 1  # of the last call


@pytest.mark.anyio
async def test_keys_that_are_not_idle_are_remembered(narrow: LocalRateLimiter) -> None:
    """Not while a request is out, not while the server counts one, and not while somebody waits."""
    async with anyio.create_task_group() as group:
        callers = Callers(narrow, group)
        await callers.call("hangs", answer=False)
        await callers.call("waits")
        await anyio.sleep(3600.0)
        (await narrow.acquire(OTHER)).unsent()
        assert KEY in narrow._keys
        callers.permits["hangs"].answered(200, SILENT)
        (await narrow.acquire(OTHER)).unsent()
        assert KEY in narrow._keys
    await anyio.sleep(TURNOVER)
    (await narrow.acquire(OTHER)).unsent()
    assert len(narrow._keys) <= 1


@pytest.mark.parametrize(
    ("limit", "period"), [(0, 2.0), (-1, 2.0), (20, 0.0), (20, -1.0), (20, float("inf")), (20, float("nan"))]
)
def test_no_limit(limit: int, period: float) -> None:
    """A limit that lets nothing pass, or no limit at all, is a mistake."""
    with pytest.raises(ConfigurationError, match="limit must be at least 1 and period a finite"):
        LocalRateLimiter(limit, period)


def test_repr() -> None:
    """It says what it allows."""
    assert "LocalRateLimiter(limit=20, period=2.0)" == repr(LocalRateLimiter())


# --------------------------------------------------------------------------------------- reports
def nothing() -> None:
    """Be an event that changes nothing."""


@pytest.mark.anyio
async def test_reports_after_the_last_one(narrow: LocalRateLimiter) -> None:
    """Repeated or late reports change nothing, even when the key is long forgotten."""
    permit = await narrow.acquire(KEY)
    permit.answered(200, SILENT)
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
    """Who still waits has nothing to report."""
    async with anyio.create_task_group() as group:
        callers = Callers(narrow, group)
        await callers.call(0, answer=False)
        await callers.call(1)
        waiting = narrow._keys[KEY].queue.head()
        assert waiting is not None
        waiting.answered(429, refusal(9.0))
        waiting.unsent()
        callers.permits[0].unsent()
    assert [(0, 0.0), (1, 0.0)] == callers.served


@pytest.mark.anyio
async def test_a_report_while_its_own_thread_is_at_work() -> None:
    """A finalizer may report at any moment, in the middle of a grant too: its report is simply next."""
    reports: list[Permit] = []

    def clock() -> float:
        while reports:
            reports.pop().unsent()
        return anyio.current_time()

    limiter = LocalRateLimiter(2, 2.0, clock=clock)
    async with anyio.create_task_group() as group:
        callers = Callers(limiter, group)
        await callers.call("a", "b", answer=False)
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
async def test_what_happens_while_another_is_at_work(narrow: LocalRateLimiter) -> None:
    """It is left in the inbox, and nobody waits; who comes next sees to it, canceled calls included."""
    async with anyio.create_task_group() as group:
        callers = Callers(narrow, group)
        await callers.call(0, answer=False)
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
async def test_canceled_in_the_queue(narrow: LocalRateLimiter, place: int) -> None:
    """Head, middle or tail: the others are served as if it had never asked."""
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
async def test_granted_while_it_is_canceled(narrow: LocalRateLimiter) -> None:
    """A grant that meets a call on its way out goes to the next one, at the same moment."""
    async with anyio.create_task_group() as group:
        callers = Callers(narrow, group)
        await callers.call(0, answer=False)
        await callers.call(1, 2, 3)
        callers.scopes[1].cancel()
        callers.scopes[2].cancel()
        callers.permits[0].unsent()  # grants 1, which has not yet withdrawn
        await settle()
    assert [(0, 0.0), (3, 0.0)] == callers.served


@pytest.mark.anyio
async def test_canceled_while_it_is_granted(narrow: LocalRateLimiter) -> None:
    """A grant that came before the cancellation is kept or passed on, and lost in neither case."""
    async with anyio.create_task_group() as group:
        callers = Callers(narrow, group)
        await callers.call(0, answer=False)
        await callers.call(1, 2)
        callers.permits[0].unsent()  # grants 1, which has not heard of it yet
        callers.scopes[1].cancel()
        await settle()
        assert 1 == len(callers.order[1:])
    assert callers.at(2) in (0.0, TURNOVER)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", [("asyncio", {"loop_factory": JumpingLoop})], ids=["asyncio"])
@pytest.mark.parametrize("granted_first", [True, False])
async def test_natively_canceled_around_the_grant(narrow: LocalRateLimiter, granted_first: bool) -> None:  # noqa: FBT001  # a column
    """``task.cancel()`` at the same moment as the grant, in either order: the next one has it."""
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
async def test_natively_canceled_in_the_queue(narrow: LocalRateLimiter, place: int) -> None:
    """The head, which watches the clock for all, or another: the others are served as if it had not asked."""
    (await narrow.acquire(KEY)).answered(200, SILENT)
    started = anyio.current_time()
    tasks = [asyncio.ensure_future(narrow.acquire(KEY)) for _ in range(5)]
    await anyio.sleep(1.0)
    tasks.pop(place).cancel()
    for number, task in enumerate(tasks, 1):
        (await task).answered(200, SILENT)
        assert number * TURNOVER == pytest.approx(anyio.current_time() - started)


@pytest.mark.anyio
async def test_canceled_just_when_it_is_due(narrow: LocalRateLimiter) -> None:
    """Canceled at the very moment at which it wakes up, in either order, it leaves no gap."""
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
async def test_canceled_before_it_asks(limiter: LocalRateLimiter) -> None:
    """A call in a canceled scope gets its permit if that takes no wait, and else leaves no trace."""
    with anyio.CancelScope() as scope:
        scope.cancel()
        for _ in range(20):
            await limiter.acquire(KEY)
        await limiter.acquire(KEY)
        pytest.fail("it waited")
    assert 0 == limiter.snapshot(KEY).queued


@pytest.mark.anyio
async def test_most_of_two_thousand_are_canceled(
    limiter: LocalRateLimiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The few that are left are served with the next slots, and it took a few steps for each that left."""
    wakes = []
    wake = Wakeup.wake

    def counting(wakeup: Wakeup) -> bool:
        wakes.append(wakeup)
        return wake(wakeup)

    monkeypatch.setattr(Wakeup, "wake", counting)
    async with anyio.create_task_group() as group:
        callers = Callers(limiter, group)
        for number in range(2_000):
            callers.ask(number, answer=False)
        await settle()
        assert 1_980 == limiter.snapshot(KEY).queued
        await anyio.sleep(1.0)
        granted = list(callers.order)
        for name in granted[:5]:
            callers.permits[name].unsent()  # grants five, which have not heard of it yet
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
async def test_a_wait_that_is_garbage(narrow: LocalRateLimiter) -> None:
    """A coroutine that is given up half-way gives its place back, or the grant that it did not hear of.

    Trio leaves none behind.
    """
    permit = await narrow.acquire(KEY)
    left = [narrow.acquire(KEY) for _ in range(3)]
    for coroutine in left:
        coroutine.send(None)
    assert 3 == narrow.snapshot(KEY).queued
    del coroutine, left[1]
    gc.collect()
    assert 2 == narrow.snapshot(KEY).queued
    permit.unsent()  # grants the first
    seen = narrow.snapshot(KEY)
    assert (0, 1) == (seen.remaining, seen.queued)
    left.clear()
    gc.collect()
    assert RateLimit(1, 1, resets_in=0.0, queued=0, paused_for=0.0) == narrow.snapshot(KEY)


# ------------------------------------------------------------------------------------- all at once
@pytest.mark.anyio
@pytest.mark.parametrize("seed", range(8))
async def test_whatever_happens_nobody_is_forgotten(seed: int) -> None:
    """300 calls over 3 keys, some canceled, refused or lost: all others go, and never too many at once."""
    dice = random.Random(seed)
    limiter = LocalRateLimiter(3, 2.0, clock=anyio.current_time)
    departures: dict[Key, list[float]] = {Key("https://api.example.com", name): [] for name in "abc"}
    ends: Counter[str] = Counter()

    async def one(number: int) -> None:
        key = dice.choice(list(departures))
        priority: Priority = dice.choice(["interactive", "bulk"])
        await anyio.sleep(dice.random() * 60)
        with anyio.move_on_after(dice.choice([dice.random() * 20, 10_000.0])) as scope:
            permit, end = None, "refused"
            while end == "refused":
                permit = await limiter.acquire(key, priority=priority, again=permit)
                end = dice.choice(["answered", "answered", "answered", "unsent", "unknown", "refused"])
                with anyio.CancelScope(shield=True):
                    await use(permit, end, departures[key])
            ends[end] += 1
        ends["canceled"] += scope.cancelled_caught

    async def use(permit: Permit, end: str, departures: list[float]) -> None:
        await anyio.sleep(dice.choice([0.0, dice.random(), dice.random() * 5]))
        if end == "unsent":
            permit.unsent()
            return
        departures.append(anyio.current_time())
        permit.sent()
        await anyio.sleep(dice.random() * 0.4)
        if end == "unknown":
            permit.unknown()
        elif end == "refused":
            permit.answered(429, refusal(dice.random() * 3))
        else:
            permit.answered(200, SILENT)

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
    assert len(limiter._keys) <= 1  # of the last call


@pytest.mark.anyio
async def test_a_log_handler_that_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that asks for a snapshot while it is told of a long wait is answered."""
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
