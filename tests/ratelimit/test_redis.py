"""The Redis limiter. Several limiters on the same Redis stand in for several processes."""

import asyncio
import random
import threading
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from redis_server import RedisServer

from lemcal_async import events
from lemcal_async._headers import Quota
from lemcal_async.errors import ConfigurationError
from lemcal_async.ratelimit import Key, LocalRateLimiter, RateLimit, RateLimiter, RedisRateLimiter, WouldWait
from lemcal_async.ratelimit._slots import MARGIN

KEY = Key("https://api.example.com", "0f" * 16)
SILENT = Quota()
PERIOD = 0.3
GRANT_TTL = 0.15  # seconds; a slot's lease is a little longer than a period
# Rewrites a value as if the clock had been ten seconds ahead. Moments are the only numbers above a million.
STEP_BACK = """
local function shift(value)
  for name, field in pairs(value) do
    if type(field) == 'table' then
      shift(field)
    elseif type(field) == 'number' and field > 1e6 then
      value[name] = field + 10
    end
  end
  return value
end
return redis.call('SET', KEYS[1], cmsgpack.pack(shift(cmsgpack.unpack(redis.call('GET', KEYS[1])))))
"""


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Run on both event loops, in real time: Redis has its own clock."""
    return str(request.param)


@pytest.fixture(autouse=True)
def quick(lease_ttl: Callable[[float], None]) -> None:
    """Shorten the leases, so that tests are fast."""
    lease_ttl(GRANT_TTL)


def refusal(retry_after: float) -> Quota:
    """Return the headers of a 429."""
    return Quota(limit=None, remaining=0, retry_after=retry_after, resets_in=retry_after)


class Calls:
    """Calls through one limiter, each answered at once; ``order`` and ``times`` record the grants."""

    def __init__(self, limiter: RateLimiter, group: anyio.abc.TaskGroup) -> None:
        self.limiter = limiter
        self.group = group
        self.order: list[object] = []
        self.times: list[float] = []
        self.permits: dict[object, Any] = {}
        self.refused: dict[object, WouldWait] = {}

    async def one(self, name: object, *, answer: bool = True, **options: Any) -> None:
        """Make one call."""
        try:
            permit = self.permits[name] = await self.limiter.acquire(KEY, **options)
        except WouldWait as reason:
            self.refused[name] = reason
            return
        self.order.append(name)
        self.times.append(time.monotonic())
        if answer:
            permit.sent()
            permit.answered(200, SILENT)

    async def queue(self, *names: object, **options: Any) -> None:
        """Start calls one after the other."""
        for name in names:
            self.group.start_soon(partial(self.one, name, **options))
            for _ in range(2):  # trio runs tasks in any order
                await anyio.lowlevel.checkpoint()

    async def served(self, count: int) -> None:
        """Wait until ``count`` calls were granted."""
        with anyio.fail_after(20):
            while len(self.order) < count:  # noqa: ASYNC110 - no event for it
                await anyio.sleep(0.005)


def limiter_of(
    redis: RedisServer, limit: int = 5, period: float = PERIOD, **options: Any
) -> RedisRateLimiter:
    """Return a limiter for fast tests, with a long timeout, as Redis may be slow on a busy machine."""
    return RedisRateLimiter(redis.url, limit=limit, period=period, **{"timeout": 5.0, **options})


def most_in(period: float, times: list[float]) -> int:
    """Return the greatest number of moments in any period."""
    ordered = sorted(times)
    return max(sum(start <= moment < start + period for moment in ordered) for start in ordered)


# ------------------------------------------------------------------------------------------ serving
@pytest.mark.anyio
async def test_an_idle_key_grants_its_limit_at_once(redis: RedisServer) -> None:
    """Later calls wait for a whole period, first in first out."""
    async with limiter_of(redis) as limiter, anyio.create_task_group() as group:
        calls = Calls(limiter, group)
        await calls.queue(*range(10))
        await calls.served(10)
    for burst in (0, 5):  # trio wakes those of a burst in any order
        assert set(range(burst, burst + 5)) == set(calls.order[burst : burst + 5])
    for early, late in zip(calls.times, calls.times[5:], strict=False):
        assert late - early >= PERIOD
    assert calls.times[4] - calls.times[0] < PERIOD


@pytest.mark.anyio
async def test_one_script_call_per_batch(redis: RedisServer) -> None:
    """Reports travel with it; reports that arrive in between cost at most one more call."""
    async with limiter_of(redis, 20, 0.3) as limiter, anyio.create_task_group() as group:
        calls = Calls(limiter, group)
        for number in range(60):
            group.start_soon(calls.one, number)
        await calls.served(60)
        assert redis.script_calls() <= 2 * 3 + 2  # two more on a slow machine


@pytest.mark.anyio
async def test_interactive_calls_pass_bulk_ones(redis: RedisServer) -> None:
    """While both wait, bulk calls get one turn in five, as with the local limiter."""
    async with limiter_of(redis, 1, 0.05) as limiter, anyio.create_task_group() as group:
        calls = Calls(limiter, group)
        await calls.one("first")
        await calls.queue("b0", "b1", priority="bulk")
        await calls.queue(*range(6))
        await calls.served(9)
    assert ["first", 0, 1, 2, 3, "b0", 4, 5, "b1"] == calls.order


@pytest.mark.anyio
async def test_two_processes_are_served_round_robin(redis: RedisServer) -> None:
    """Together they stay within the limit, and the longer queue does not starve the shorter one."""
    async with limiter_of(redis, 4) as one, limiter_of(redis, 4) as two, anyio.create_task_group() as group:
        first, second = Calls(one, group), Calls(two, group)
        await first.queue(*range(30))
        await first.served(4)
        await second.queue(*range(4))
        await second.served(4)
        # Two of four slots were theirs in each period, so the other has had about as many.
        assert 4 + 2 <= len(first.order) <= 4 + 8
        assert most_in(PERIOD, first.times + second.times) == 4
        group.cancel_scope.cancel()


@pytest.mark.anyio
async def test_four_processes_get_equal_shares(redis: RedisServer) -> None:
    """Despite unequal queues, the number of grants differs by at most one period."""
    async with AsyncExitStack() as stack:
        limiters = [await stack.enter_async_context(limiter_of(redis, 8, 0.4)) for _ in range(4)]
        group = await stack.enter_async_context(anyio.create_task_group())
        processes = [Calls(limiter, group) for limiter in limiters]
        await processes[0].one("first")
        for number, calls in enumerate(processes):
            await calls.queue(*range(40 * (number + 1)))
        with anyio.fail_after(30):
            while not all(calls.order for calls in processes):  # noqa: ASYNC110
                await anyio.sleep(0.01)
            # Redis knows all of them from here on.
            before = [len(calls.order) for calls in processes]
            while sum(len(calls.order) for calls in processes) < sum(before) + 32:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        served = [len(calls.order) - one for calls, one in zip(processes, before, strict=True)]
        group.cancel_scope.cancel()
    assert max(served) - min(served) <= 8


@pytest.mark.anyio
async def test_an_unused_slot_goes_to_the_next_call(
    redis: RedisServer, lease_ttl: Callable[[float], None]
) -> None:
    """In the same process at once, or in another process if no call waits here."""
    lease_ttl(3.0)
    async with (
        limiter_of(redis, 1, 0.2) as limiter,
        limiter_of(redis, 1, 0.2) as other,
        anyio.create_task_group() as group,
    ):
        calls, others = Calls(limiter, group), Calls(other, group)
        await calls.one(0, answer=False)
        await calls.queue(1, answer=False)
        calls.permits[0].unsent()
        await calls.served(2)
        await others.queue(0)
        await anyio.sleep(0.05)
        calls.permits[1].unsent()
        calls.permits[1].answered(429, refusal(90.0))  # the permit has ended: later reports are ignored
        await others.served(1)
        assert others.times[0] - calls.times[0] < 0.2 + 3.0  # without waiting for the lease to end


@pytest.mark.anyio
async def test_an_unsent_request_keeps_its_slot(redis: RedisServer) -> None:
    """However long connecting takes. If the process dies, the slot is free after its lease."""
    async with limiter_of(redis, 1, 0.1) as limiter:
        async with limiter_of(redis, 1, 0.1) as other:
            permit = await other.acquire(KEY)
            with anyio.move_on_after(1.5 * (GRANT_TTL + 0.1)) as patience:
                await limiter.acquire(KEY)
            assert patience.cancelled_caught
            permit.sent()
        asked = time.monotonic()
        with anyio.fail_after(5):
            await limiter.acquire(KEY)
        assert time.monotonic() - asked >= 0.05


@pytest.mark.anyio
async def test_a_request_without_a_response(redis: RedisServer) -> None:
    """Its slot is free a period after the server must have counted it."""
    async with limiter_of(redis, 1, 0.2) as limiter:
        permit = await limiter.acquire(KEY)
        permit.sent()
        permit.unknown()
        asked = time.monotonic()
        await limiter.acquire(KEY)
        assert GRANT_TTL + 0.2 <= time.monotonic() - asked < 3.0


@pytest.mark.anyio
async def test_a_slot_is_occupied_until_its_request_is_known_to_be_counted(
    redis: RedisServer, lease_ttl: Callable[[float], None]
) -> None:
    """However late that is: from its own response, or from the count in another response."""
    lease_ttl(0.3)
    async with limiter_of(redis, 3, 0.1) as limiter, anyio.create_task_group() as group:
        calls = Calls(limiter, group)
        await calls.queue(*range(8), answer=False)
        await calls.served(3)
        for number in range(3):
            calls.permits[number].sent()
        await anyio.sleep(2 * (0.3 + 0.1))
        assert 3 == len(calls.order)
        calls.permits[0].answered(200, Quota(limit=3, remaining=2, retry_after=0.05))  # the first of them
        await calls.served(4)
        calls.permits[3].sent()
        calls.permits[3].answered(200, Quota(limit=3, remaining=0, retry_after=0.05))  # all of them
        answered = time.monotonic()
        await calls.served(7)
        assert calls.times[4] - answered >= 0.1
        assert 7 == len(calls.order)
        group.cancel_scope.cancel()


# ------------------------------------------------------------------------------------------ refusals
@pytest.mark.anyio
async def test_a_429_pauses_the_key_in_all_processes(redis: RedisServer) -> None:
    """No process sends until it is over; the refused request goes first, and the order is kept.

    A second 429 with a shorter wait does not shorten the pause.
    """
    async with (
        limiter_of(redis, 2, 0.1) as limiter,
        limiter_of(redis, 2, 0.1) as other,
        anyio.create_task_group() as group,
    ):
        calls, others = Calls(limiter, group), Calls(other, group)
        await calls.one("a", answer=False)
        await calls.one("b", answer=False)
        await calls.queue(*range(4))
        await others.queue(*range(2))
        refused = time.monotonic()
        assert 0.383 == calls.permits["a"].answered(429, refusal(0.383))
        assert 0.1 == calls.permits["b"].answered(429, refusal(0.1))
        assert 0.383 == pytest.approx(limiter.snapshot(KEY).paused_for, abs=0.1)
        await calls.queue("again", again=calls.permits["a"])
        await calls.served(2 + 1 + 4)
        await others.served(2)
    for served, expected in (calls.order[2:], ["again", *range(4)]), (others.order, [*range(2)]):
        assert set(expected) == set(served)
        for place, name in enumerate(served):  # trio wakes the two of a burst in any order
            assert abs(place - expected.index(name)) <= 1
    assert min(calls.times[2:] + others.times) - refused >= 0.383


@pytest.mark.anyio
@pytest.mark.parametrize("passes", [False, True])
async def test_a_trial_request_after_a_429(redis: RedisServer, *, passes: bool) -> None:
    """One of all processes; the others follow if the server lets it pass, and wait again if not."""
    async with (
        limiter_of(redis, 3, 0.5) as limiter,
        limiter_of(redis, 3, 0.5) as other,
        anyio.create_task_group() as group,
    ):
        calls, others = Calls(limiter, group), Calls(other, group)
        await calls.one("a", answer=False)
        calls.permits["a"].answered(429, refusal(0.6))
        await calls.queue(*range(3), answer=False)
        await others.queue(*range(3), answer=False)
        with anyio.fail_after(20):
            while not calls.order[1:] + others.order:  # noqa: ASYNC110 - no event for it
                await anyio.sleep(0.005)
        await anyio.sleep(0.1)  # time for a second one to show
        (trial,) = [*list(calls.permits.values())[1:], *others.permits.values()]
        trial.sent()
        again = time.monotonic()
        trial.answered(*((200, SILENT) if passes else (429, refusal(0.6))))
        with anyio.fail_after(20):
            while len(calls.order) + len(others.order) < (4 if passes else 3):  # noqa: ASYNC110
                await anyio.sleep(0.005)
        assert passes or min(sorted(calls.times[1:] + others.times)[1:]) - again >= 0.6
        group.cancel_scope.cancel()


@pytest.mark.anyio
async def test_a_retry_after_of_a_day(redis: RedisServer) -> None:
    """Waiting and new calls fail at once in every process, instead of sleeping."""
    async with limiter_of(redis) as limiter, limiter_of(redis) as other:
        async with anyio.create_task_group() as group:
            calls, others = Calls(limiter, group), Calls(other, group)
            await calls.one("first", answer=False)
            await calls.queue(*range(8))
            await calls.served(5)
            calls.permits["first"].answered(429, refusal(86_400.0))
            await calls.queue("new")
            await anyio.sleep(0.05)
            await others.queue("other")
        assert {4, 5, 6, 7, "new"} <= set(calls.refused)
        assert {"other"} == set(others.refused)
        for reason in [*calls.refused.values(), *others.refused.values()]:
            assert reason.refused
            assert 86_400 == pytest.approx(reason.seconds, abs=5)


@pytest.mark.anyio
async def test_foreign_use_reaches_all_processes(redis: RedisServer) -> None:
    """What one process learns from its headers holds for the others."""
    heard: list[events.Event] = []
    leave = events.subscribe(heard.append)
    try:
        async with limiter_of(redis, 10, 0.5) as limiter, limiter_of(redis, 10, 0.5) as other:
            permit = await limiter.acquire(KEY)
            permit.sent()
            permit.answered(200, Quota(limit=10, remaining=3, retry_after=0.4, resets_in=0.4))
            answered = time.monotonic()
            with anyio.fail_after(20):
                while events.ForeignUse("0f0f0f0f", 6) not in heard:  # noqa: ASYNC110 - until Redis knows
                    await anyio.sleep(0.005)
            async with anyio.create_task_group() as group:
                others = Calls(other, group)
                await others.queue(*range(9))
                await others.served(9)
    finally:
        leave()
    assert 3 >= sum(moment < answered + 0.4 for moment in others.times)


@pytest.mark.anyio
async def test_a_header_lowers_the_limit_in_all_processes(redis: RedisServer) -> None:
    """A header never raises it."""
    async with limiter_of(redis, 4) as limiter, limiter_of(redis, 4) as other:
        (await limiter.acquire(KEY)).answered(200, Quota(limit=2))
        with anyio.fail_after(20):
            while other.snapshot(KEY).limit != 2:
                (await other.acquire(KEY)).answered(200, SILENT)
        assert 2 == limiter.snapshot(KEY).limit
        (await other.acquire(KEY)).answered(200, Quota(limit=90))
        with anyio.fail_after(20):
            while other.snapshot(KEY).limit == 2:  # noqa: ASYNC110 - no event for it
                await anyio.sleep(0.01)
        assert 4 == other.snapshot(KEY).limit


# --------------------------------------------------------------------------------------- long queues
@pytest.mark.anyio
async def test_deadlines(redis: RedisServer) -> None:
    """Calls that cannot be served in time fail at once, even while the first reply is pending."""
    async with limiter_of(redis, 5, 0.5) as limiter, anyio.create_task_group() as group:
        calls = Calls(limiter, group)
        await calls.queue(*range(300), timeout=1.25)
        await calls.served(5)
        assert 300 - 20 <= len(calls.refused) <= 300 - 15
        await calls.queue("late", timeout=0.25)
        assert "late" in calls.refused
        assert not any(reason.refused for reason in calls.refused.values())
        await calls.served(10)
        group.cancel_scope.cancel()


@pytest.mark.anyio
async def test_deadlines_include_the_queues_of_other_processes(redis: RedisServer) -> None:
    """Processes are served round-robin, so calls of other processes go first as well."""
    async with (
        limiter_of(redis, 2, 1.0) as limiter,
        limiter_of(redis, 2, 1.0) as other,
        anyio.create_task_group() as group,
    ):
        calls, others = Calls(limiter, group), Calls(other, group)
        await others.queue(*range(20))
        await others.served(2)
        await calls.queue("first")
        worker: Any = limiter._keys[KEY]
        with anyio.fail_after(20):
            while not worker.budget.reply.other_demands:  # noqa: ASYNC110 - no event for it
                await anyio.sleep(0.01)
        await calls.queue(0, 1, 2, 3, timeout=2.5)
        with anyio.fail_after(2):
            while 3 not in calls.refused:  # noqa: ASYNC110 - no event for it
                await anyio.sleep(0.01)
        assert set(calls.refused) <= {1, 2, 3}
        group.cancel_scope.cancel()


@pytest.mark.anyio
async def test_one_warning_about_a_long_wait(redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """Per key, with the message of the local limiter."""
    async with limiter_of(redis, 1, 10.0) as limiter, anyio.create_task_group() as group:
        calls = Calls(limiter, group)
        await calls.queue(*range(10))
        await anyio.sleep(0.2)
        await calls.queue(*range(10, 20))
        group.cancel_scope.cancel()
    assert 1 == len(caplog.messages)
    assert "a call without a deadline will wait 30 s for the rate limit" in caplog.messages[0]


@pytest.mark.anyio
async def test_canceling_almost_all_calls(redis: RedisServer) -> None:
    """Including the head, granted calls and some in flight: the remaining calls are next."""
    async with limiter_of(redis, 20, 0.4) as limiter, anyio.create_task_group() as group:
        served: list[int] = []
        scopes: dict[int, anyio.CancelScope] = {}

        async def call(number: int) -> None:
            with anyio.CancelScope() as scope:
                scopes[number] = scope
                permit = await limiter.acquire(KEY)
                try:
                    permit.sent()
                    await anyio.sleep(0.02)
                except BaseException:
                    permit.unknown()
                    raise
                permit.answered(200, SILENT)
                served.append(number)

        for number in range(1_000):
            group.start_soon(call, number)
        await anyio.sleep(0.01)
        while limiter.snapshot(KEY).remaining:  # until the first are granted
            await anyio.lowlevel.checkpoint()
        for number in range(990):
            scopes[number].cancel()
        canceled = time.monotonic()
        with anyio.fail_after(20):
            while not {*range(990, 1_000)} <= set(served):  # noqa: ASYNC110
                await anyio.sleep(0.01)
        assert time.monotonic() - canceled < GRANT_TTL + 0.4 + 3.0
        assert 0 == limiter.snapshot(KEY).queued


@pytest.mark.anyio
async def test_canceled_at_any_moment(redis: RedisServer) -> None:
    """Nothing is lost or stuck: afterward the whole limit is available."""
    dice = random.Random(7)
    async with limiter_of(redis, 5, 0.05) as limiter:

        async def call() -> None:
            with anyio.move_on_after(dice.random() * 0.05):
                permit = await limiter.acquire(KEY)
                permit.unsent()

        async with anyio.create_task_group() as group:
            for _ in range(500):
                group.start_soon(call)
                if dice.random() < 0.1:
                    await anyio.sleep(0.002)
        await anyio.sleep(0.1)
        with anyio.fail_after(5):
            started = time.monotonic()
            for _ in range(5):
                (await limiter.acquire(KEY)).unsent()
        assert time.monotonic() - started < 2.0
        assert 0 == limiter.snapshot(KEY).queued


def test_canceled_natively(redis: RedisServer) -> None:
    """With asyncio's own cancellation: the head, a call that was just granted, and all others."""

    async def main() -> None:
        async with limiter_of(redis, 2, 0.3) as limiter:
            for cycles in range(12):
                tasks = [asyncio.create_task(limiter.acquire(KEY)) for _ in range(6)]
                for _ in range(cycles):
                    await asyncio.sleep(0)
                for task in tasks:
                    task.cancel()
                for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                    if not isinstance(outcome, asyncio.CancelledError):
                        assert not isinstance(outcome, BaseException)
                        outcome.unsent()
            await asyncio.sleep(0.1)
            async with asyncio.timeout(10):
                for _ in range(2):
                    (await limiter.acquire(KEY)).answered(200, SILENT)

    asyncio.run(main())


# -------------------------------------------------------------------------------------- Redis itself
@pytest.mark.anyio
async def test_the_clock_of_redis_steps_back(redis: RedisServer) -> None:
    """By ten seconds: no slot frees up early, and no call waits for the clock to catch up."""
    async with limiter_of(redis, 2, 0.3) as limiter, limiter_of(redis, 2, 0.3) as other:
        for _ in range(2):
            (await limiter.acquire(KEY)).answered(200, SILENT)
        sent = time.monotonic()
        budget = f"{{lemcal:}}{KEY.digest}-"
        for name in redis.names():
            if name.startswith(budget) or name.endswith("marker"):
                assert "OK" == redis.command("EVAL", STEP_BACK, "1", name)
        with anyio.fail_after(8):
            await other.acquire(KEY)
        assert time.monotonic() - sent >= 0.3


@pytest.mark.anyio
async def test_script_flush_goes_unnoticed(redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """The script is loaded again."""
    async with limiter_of(redis, 6, 0.2) as limiter:
        for _ in range(3):
            redis.command("SCRIPT", "FLUSH")
            (await limiter.acquire(KEY)).answered(200, SILENT)
    assert [] == caplog.messages


@pytest.mark.anyio
async def test_lost_data_causes_no_burst(redis: RedisServer) -> None:
    """Redis is flushed while requests are in flight: no process sends until they no longer count."""
    async with limiter_of(redis, 2, 0.1, share=1.0) as limiter, limiter_of(redis, 2, 0.1, share=0.5) as other:
        times = []
        for _ in range(2):
            (await limiter.acquire(KEY)).answered(200, SILENT)
            times.append(time.monotonic())
        redis.command("FLUSHALL")
        for _ in range(2):
            (await limiter.acquire(KEY)).answered(200, SILENT)
            times.append(time.monotonic())
        (await other.acquire(KEY)).answered(200, SILENT)
        times.append(time.monotonic())
    assert most_in(0.1, times) <= 2


@pytest.mark.anyio
async def test_redis_holds_no_secrets_and_everything_expires(redis: RedisServer) -> None:
    """Keys share a hash tag, and values are numbers and random IDs."""
    key = Key("https://api.example.com/secret-path", "ab" * 16)
    async with limiter_of(redis, 1, 0.1, prefix="mine:") as limiter, anyio.create_task_group() as group:
        (await limiter.acquire(key)).answered(200, Quota(limit=1, remaining=0, retry_after=0.05))
        group.start_soon(limiter.acquire, key)
        await anyio.sleep(0.03)
        held = redis.dump()
        assert "{mine:}" + "ab" * 16 + "-" in held
        assert "secret" not in held
        assert "example" not in held
        assert 1 == len({name.partition("}")[0] for name in redis.names()})
        for name in redis.names():
            # -1: never expires; -2: has just expired. Only the marker outlives its use.
            assert -1 != int(redis.command("PTTL", name)) <= (1_500 if "marker" not in name else 86_400_000)


@pytest.mark.anyio
async def test_idle_keys_are_dropped(redis: RedisServer) -> None:
    """And their tasks with them."""
    async with limiter_of(redis, 5, 0.1) as limiter:
        for number in range(50):
            permit = await limiter.acquire(Key("https://api.example.com", f"{number:032x}"))
            permit.answered(200, SILENT)
        assert limiter._keys
        with anyio.fail_after(10):
            while limiter._keys:  # noqa: ASYNC110
                await anyio.sleep(0.05)
        assert RateLimit(5, 5, resets_in=0.0, queued=0, paused_for=0.0) == limiter.snapshot(KEY)


# ------------------------------------------------------------------------------------- wrong use, use
@pytest.mark.anyio
async def test_use_outside_its_block_or_event_loop(redis: RedisServer) -> None:
    """Only inside its ``async with`` and in that event loop; it can be entered again after exiting."""
    limiter = limiter_of(redis)
    with pytest.raises(ConfigurationError, match="works only inside its `async with`"):
        await limiter.acquire(KEY)
    async with limiter:
        (await limiter.acquire(KEY)).unsent()
        with pytest.raises(ConfigurationError, match="entered already"):
            await limiter.__aenter__()

        refused: list[bool] = []

        async def elsewhere() -> None:
            with pytest.raises(ConfigurationError, match="in its event loop"):
                await limiter.acquire(KEY)
            refused.append(True)

        # Not one of trio's own threads, which outlive the test.
        thread = threading.Thread(target=anyio.run, args=[elsewhere])
        thread.start()
        thread.join()
        assert [True] == refused
    await limiter.__aexit__(None, None, None)  # not entered: does nothing
    async with limiter:
        (await limiter.acquire(KEY)).unsent()


@pytest.mark.anyio
async def test_exiting_while_calls_wait(redis: RedisServer) -> None:
    """The calls fail, and an exception of the body propagates unchanged."""
    failures: list[Exception] = []

    async def call(limiter: RedisRateLimiter) -> None:
        try:
            await limiter.acquire(KEY)
        except ConfigurationError as error:
            failures.append(error)

    async def fail(group: anyio.abc.TaskGroup) -> None:
        async with limiter_of(redis, 1, 30.0) as limiter:
            await limiter.acquire(KEY)
            group.start_soon(call, limiter)
            await anyio.sleep(0.05)
            raise ZeroDivisionError

    async with anyio.create_task_group() as group:
        with pytest.raises(ZeroDivisionError):
            await fail(group)
    assert ["nothing was sent: the RedisRateLimiter was closed while the call waited"] == [
        str(error) for error in failures
    ]


@pytest.mark.anyio
async def test_exiting_reports_unused_slots(redis: RedisServer) -> None:
    """A slot that was just returned is free for other processes at once."""
    async with limiter_of(redis, 1, 30.0) as limiter:
        permit = await limiter.acquire(KEY)
        permit.unsent()
    async with limiter_of(redis, 1, 30.0) as other:
        with anyio.fail_after(5):
            await other.acquire(KEY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit=0: it must be a whole number, at least 1"),
        ({"period": 0.0}, "period=0.0: it must be a finite number of seconds above 0"),
        ({"when_down": "panic"}, "when_down='panic': it must be 'share', 'raise' or 'open'"),
        ({"when_down": ["share"]}, r"when_down=\['share'\]: it must be"),
        ({"share": 0.0}, "share=0.0: it must be above 0 and at most 1"),
        ({"share": 1.5}, "share=1.5: it must be above 0 and at most 1"),
        ({"share": "half"}, "share='half': it must be above 0"),
        ({"timeout": 0.0}, "timeout=0.0: it must be a finite number of seconds above 0"),
        ({"timeout": "1s"}, "timeout='1s': it must be a finite number of seconds above 0"),
        ({"prefix": "a{b}"}, "prefix='a{b}': it must be text without braces"),
        ({"prefix": ""}, "prefix='': it must be text without braces, and not empty"),
        ({"prefix": b"lemcal:"}, "prefix=b'lemcal:': it must be text"),
    ],
)
def test_invalid_options(options: dict[str, Any], message: str) -> None:
    """Raise when the limiter is created."""
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        RedisRateLimiter("redis://localhost", **options)


@pytest.mark.anyio
async def test_events(redis: RedisServer) -> None:
    """Report which calls wait, behind how many and for how long, and which key is paused."""
    heard: list[events.Event] = []
    leave = events.subscribe(heard.append)
    try:
        async with limiter_of(redis, 1, 0.2) as limiter, anyio.create_task_group() as group:
            calls = Calls(limiter, group)
            await calls.queue("a", "b")
            await calls.served(2)
            calls.permits["a"].answered(200, SILENT)
            await calls.queue("c", answer=False)
            await calls.served(3)
            calls.permits["c"].answered(429, refusal(0.5))
    finally:
        leave()
    kinds: dict[type, Any] = {
        events.Queued: lambda event: event.ahead,
        events.Granted: lambda event: event.waited > 0.1,
        events.Paused: lambda event: event.seconds,
    }
    assert {("Queued", 0), ("Granted", False), ("Granted", True), ("Paused", 0.5)} <= {
        (type(event).__name__, kinds[type(event)](event)) for event in heard if type(event) in kinds
    }
    assert {"0f0f0f0f"} == {getattr(event, "key", None) for event in heard if type(event) in kinds}


@pytest.mark.anyio
async def test_the_permit_of_another_limiter(redis: RedisServer) -> None:
    """A permit of another limiter is ignored; the limiter satisfies the protocol."""
    foreign = await LocalRateLimiter().acquire(KEY)
    async with limiter_of(redis) as limiter:
        assert isinstance(limiter, RateLimiter)
        (await limiter.acquire(KEY, again=foreign)).unsent()
        seen = limiter.snapshot(KEY)
        assert (5, 0, 0.0) == (seen.limit, seen.queued, seen.paused_for)
        assert 0.0 <= seen.resets_in <= PERIOD + 0.5 + MARGIN
