"""Redis slow, gone and back: what is configured holds, it is said once, and no burst follows."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import anyio
import pytest
from redis_server import RedisServer

from lemcal_async import events
from lemcal_async._headers import Quota
from lemcal_async.errors import LemcalError
from lemcal_async.ratelimit import Key, Permit, RedisRateLimiter, WouldWait
from lemcal_async.ratelimit.redis import _connection
from lemcal_async.ratelimit.redis._budget import ScriptReply, ScriptRequest
from lemcal_async.ratelimit.redis._connection import FIRST_DELAY, LAST_DELAY, CircuitBreaker, WhenDown

from .test_redis import LAPSE, Calls, limiter_of, most_in, refusal

KEY = Key("https://api.example.com", "0f" * 16)
SILENT = Quota()


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Run on both event loops, in real time."""
    return str(request.param)


@pytest.fixture
def mortal(lapse: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    """Return a server that may be killed; leases are short, and whether it is back is asked often."""
    lapse(LAPSE)
    monkeypatch.setattr(_connection, "FIRST_DELAY", 0.1)
    monkeypatch.setattr(_connection, "LAST_DELAY", 0.1)
    with RedisServer() as server:
        yield server


async def until_back(limiter: RedisRateLimiter, *, whole: bool = False) -> None:
    """Wait until the limiter has found Redis again, or until it has the ``whole`` limit again."""
    with anyio.fail_after(20):
        while limiter._breaker.is_open or (whole and limiter.snapshot(KEY).paused_for):  # noqa: ASYNC110
            await anyio.sleep(0.01)


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Return what the limiter logged, without the reason."""
    return [
        (record.levelname, record.getMessage().partition(" (")[0])
        for record in caplog.records
        if record.name == "lemcal_async.ratelimit"
    ]


def served_since(calls: Calls, moment: float) -> int:
    """Return how many were."""
    return sum(served > moment for served in calls.times)


AWAY = ("WARNING", "the rate limiter's Redis does not answer")
BACK = ("INFO", "the rate limiter's Redis answers again")


def test_the_breaker() -> None:
    """It says once that it opens, and is patient up to a bound."""
    switch = CircuitBreaker()
    assert switch.failed("why", 100.0)
    delays = [switch.delay]
    for _ in range(4):
        assert not switch.failed("why", 100.0)
        delays.append(switch.delay)
    assert [FIRST_DELAY, 0.5, LAST_DELAY, LAST_DELAY, LAST_DELAY] == delays
    switch.is_open = False
    assert switch.failed("why", 100.0)
    assert FIRST_DELAY == switch.delay


@pytest.mark.anyio
async def test_share(mortal: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """Killed in mid-run and restarted: never more than the limit in a period, in all processes together."""
    caplog.set_level(logging.INFO)
    heard: list[events.Event] = []
    leave = events.subscribe(heard.append)
    limit, period = 6, 0.2
    try:
        async with (
            limiter_of(mortal, limit, period, timeout=0.5) as one,
            limiter_of(mortal, limit, period, timeout=0.5) as two,
            anyio.create_task_group() as group,
        ):
            first, second = Calls(one, group), Calls(two, group)
            await first.queue(*range(2000))
            await second.queue(*range(2000))
            await second.served(9)  # by now each knows of the other
            mortal.kill()
            killed = time.monotonic()
            with anyio.fail_after(20):
                while min(served_since(calls, killed) for calls in (first, second)) < 4:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
            mortal.start()
            await until_back(one, whole=True)
            await until_back(two, whole=True)
            back = time.monotonic()
            with anyio.fail_after(20):
                while served_since(first, back) + served_since(second, back) < limit:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
            group.cancel_scope.cancel()
    finally:
        leave()
    assert limit >= most_in(period, first.times + second.times)
    assert 2 == said(caplog).count(AWAY)  # once for each limiter
    assert 2 == said(caplog).count(BACK)
    fallen = [event for event in heard if isinstance(event, events.FellBack)]
    assert 2 == len(fallen)
    assert {"0f0f0f0f"} == {event.key for event in fallen}


@pytest.mark.anyio
async def test_a_share_of_ones_own(mortal: RedisServer) -> None:
    """A process that never reached Redis begins after a pause, with what it was given."""
    mortal.kill()
    async with (
        limiter_of(mortal, 10, 0.2, share=0.2, timeout=0.5) as limiter,
        anyio.create_task_group() as group,
    ):
        calls = Calls(limiter, group)
        started = time.monotonic()
        await calls.queue(*range(6))
        await calls.queue("hasty", timeout=0.1)
        await calls.served(6)
    assert ["hasty"] == list(calls.refused) or len(calls.order) == 7
    assert 2 == most_in(0.2, calls.times)
    assert calls.times[0] - started >= 0.2 + LAPSE


@pytest.mark.anyio
async def test_a_429_while_redis_is_away(mortal: RedisServer) -> None:
    """It holds the key here, and all others hear of it when Redis is back; too long a one is refused."""
    async with limiter_of(mortal, 4, 0.2, timeout=0.5) as limiter:
        (await limiter.acquire(KEY)).answered(200, SILENT)
        mortal.kill()
        async with anyio.create_task_group() as group:
            calls = Calls(limiter, group)
            await calls.one("refused", answer=False)
            calls.permits["refused"].sent()
            calls.permits["refused"].answered(429, refusal(0.5))
            refused = time.monotonic()
            await calls.queue("again", again=calls.permits["refused"], answer=False)
            await calls.queue(0, 1)
            await calls.served(4)
            assert calls.times[1] - refused >= 0.5
            await calls.queue(*range(10, 17))
            calls.permits["again"].answered(429, refusal(86_400.0))
            with pytest.raises(WouldWait) as caught:
                await limiter.acquire(KEY)
            assert caught.value.refused
            mortal.start()
            await until_back(limiter)
            await anyio.sleep(0.1)
            async with limiter_of(mortal, 4, 0.2) as other:
                with pytest.raises(WouldWait):
                    await other.acquire(KEY)


@pytest.mark.anyio
async def test_raise(mortal: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """Those who wait and those who come get an error that says what to do; later ones are served again."""
    caplog.set_level(logging.INFO)
    failures: list[LemcalError] = []
    permits: list[Permit] = []

    async def call(limiter: RedisRateLimiter) -> None:
        try:
            permits.append(await limiter.acquire(KEY))
        except LemcalError as error:
            failures.append(error)

    async with limiter_of(mortal, 2, 0.2, when_down="raise", timeout=0.5) as limiter:
        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(call, limiter)
            with anyio.fail_after(10):
                while len(permits) < 2:  # noqa: ASYNC110
                    await anyio.sleep(0.005)
            mortal.kill()
            for permit in permits:  # not before: as long as they are out nobody else is served
                permit.answered(200, SILENT)
        assert 3 == len(failures)
        assert 3 == len({id(error) for error in failures})
        await call(limiter)
        assert "choose when_down='share'" in str(failures[-1])
        assert "nothing was sent" in str(failures[-1])
        mortal.start()
        await until_back(limiter)
        with anyio.fail_after(10):
            await call(limiter)
        assert (3, 4) == (len(permits), len(failures))
    assert [AWAY, BACK] == said(caplog)


@pytest.mark.anyio
async def test_open(mortal: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is limited while it is away."""
    caplog.set_level(logging.INFO)
    async with limiter_of(mortal, 2, 5.0, when_down="open", timeout=0.5) as limiter:
        mortal.kill()
        with anyio.fail_after(5):
            async with anyio.create_task_group() as group:
                calls = Calls(limiter, group)
                await calls.queue(*range(30))
        assert 30 == len(calls.order)
        assert limiter.snapshot(KEY).limit is None
    assert [AWAY] == said(caplog)


@pytest.mark.anyio
async def test_a_server_that_hangs(mortal: RedisServer) -> None:
    """It gets its time, and no call stands behind one that waits; slots it grants late are not lost."""
    async with limiter_of(mortal, 2, 0.2, when_down="raise", timeout=0.2) as limiter:
        (await limiter.acquire(KEY)).answered(200, SILENT)
        mortal.freeze(frozen=True)
        try:
            asked = time.monotonic()
            with pytest.raises(LemcalError, match="does not answer"):
                await limiter.acquire(KEY)
            assert 0.15 <= time.monotonic() - asked < 3.0
            await anyio.sleep(0.5)
        finally:
            mortal.freeze(frozen=False)
        await until_back(limiter)
        with anyio.fail_after(10):
            for _ in range(4):
                (await limiter.acquire(KEY)).answered(200, SILENT)


@pytest.mark.anyio
async def test_canceled_while_redis_is_away(mortal: RedisServer) -> None:
    """A share that was waited for goes to the next, or back."""
    async with limiter_of(mortal, 1, 0.2, timeout=0.5) as limiter:
        mortal.kill()
        async with anyio.create_task_group() as group:
            calls = Calls(limiter, group)
            await calls.one("first", answer=False)  # after the pause
            for patience in (0.02, 0.05):
                with anyio.move_on_after(patience):
                    await limiter.acquire(KEY)
            calls.permits["first"].unsent()
            await calls.queue("next", answer=False)
            await calls.served(2)
            assert ["first", "next"] == calls.order
            calls.permits["next"].unknown()
        mortal.start()
        await until_back(limiter)


@pytest.mark.anyio
async def test_restarted_unnoticed(mortal: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """Between two calls: the connection is made anew, and what is gone is not taken for free."""
    caplog.set_level(logging.INFO)
    async with limiter_of(mortal, 2, 0.4, timeout=2.0) as limiter, anyio.create_task_group() as group:
        calls = Calls(limiter, group)
        await calls.queue(0, 1)
        await calls.served(2)
        mortal.kill()
        mortal.start()
        await calls.queue(2, 3)
        await calls.served(4)
    assert 2 >= most_in(0.4, calls.times)


@pytest.mark.anyio
async def test_an_error_from_redis(mortal: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """A server that answers, but not with an answer, counts as away."""
    async with limiter_of(mortal, 5, 2.0, when_down="raise") as limiter:
        (await limiter.acquire(KEY)).answered(200, SILENT)
        mortal.command("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(LemcalError, match="maxmemory"):
            await limiter.acquire(KEY)
        mortal.command("CONFIG", "SET", "maxmemory", "0")
        await until_back(limiter)
        with anyio.fail_after(10):
            (await limiter.acquire(KEY)).unsent()


@pytest.mark.anyio
async def test_leaving_while_redis_is_away(mortal: RedisServer) -> None:
    """Takes no longer than it must."""
    started = time.monotonic()
    with anyio.fail_after(10):
        async with limiter_of(mortal, timeout=0.5) as limiter, anyio.create_task_group() as group:
            (await limiter.acquire(KEY)).answered(429, refusal(5.0))
            mortal.kill()
            group.start_soon(partial(Calls(limiter, group).one, "waits"))
            await anyio.sleep(0.1)
            group.cancel_scope.cancel()
    assert time.monotonic() - started < 8.0


@pytest.mark.anyio
@pytest.mark.parametrize("when_down", ["share", "raise", "open"])
async def test_13_34_the_snapshot_while_redis_is_away(mortal: RedisServer, when_down: WhenDown) -> None:
    """It tells what can be sent now: nothing at first, then this process's share, or anything."""
    other = Key("https://api.example.com", "e0" * 16)
    heard: list[events.Event] = []
    leave = events.subscribe(heard.append)
    try:
        async with limiter_of(mortal, 8, 0.5, when_down=when_down, share=0.5, timeout=0.5) as limiter:
            (await limiter.acquire(KEY)).answered(200, SILENT)
            assert 8 == limiter.snapshot(other).remaining
            mortal.kill()
            with anyio.fail_after(10):  # it notices when it reports
                while not limiter._breaker.is_open:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
            for key in KEY, other:
                seen = limiter.snapshot(key)
                assert {"share": (4, 0), "raise": (8, 0), "open": (None, None)}[when_down] == (
                    seen.limit,
                    seen.remaining,
                )
                assert (when_down == "share") == (seen.paused_for > 0)
            if when_down == "share":
                await anyio.sleep(limiter.snapshot(KEY).paused_for)
                assert [4, 4] == [limiter.snapshot(key).remaining for key in (KEY, other)]
            mortal.start()
            await until_back(limiter)
            assert 0 == limiter.snapshot(other).remaining  # until all have told what they sent meanwhile
            assert 0 < limiter.snapshot(other).paused_for < 5
    finally:
        leave()
    assert ["0f0f0f0f"] == [event.key for event in heard if isinstance(event, events.FellBack)]


@pytest.mark.anyio
async def test_13_34_coredis_says_it_once(mortal: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """That Redis hangs, which it would say at each of our attempts; afterward it speaks again."""
    async with limiter_of(mortal, 5, 0.2, timeout=0.1) as limiter:
        (await limiter.acquire(KEY)).answered(200, SILENT)
        mortal.freeze(frozen=True)
        try:
            await anyio.sleep(1.5)  # for several attempts
        finally:
            mortal.freeze(frozen=False)
        await until_back(limiter)
        assert len([record for record in caplog.records if record.name == "coredis"]) <= 1
    assert [] == logging.getLogger("coredis").filters


@pytest.mark.anyio
async def test_14_13_a_loop_that_stood_still(mortal: RedisServer) -> None:
    """Others had the slot since: the request is not sent, and the call that asks again goes first."""
    async with (
        limiter_of(mortal, 1, 0.1) as limiter,
        limiter_of(mortal, 1, 0.1) as other,
        anyio.create_task_group() as group,
    ):
        permit = await limiter.acquire(KEY)
        assert permit.sent() is not False
        permit.answered(200, SILENT)
        permit = await limiter.acquire(KEY)
        time.sleep(2 * LAPSE)  # noqa: ASYNC251 - that is the point
        assert permit.sent() is False
        assert permit.answered(200, SILENT) == 0.0  # it has ended
        calls, others = Calls(limiter, group), Calls(other, group)
        await calls.queue(0)
        await calls.queue("again", again=permit)
        await others.served(0)
        await calls.served(2)
    assert ["again", 0] == calls.order


@pytest.mark.anyio
async def test_14_14_a_key_that_is_not_ours(mortal: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """It costs its own account a pause, and no other one anything; it is no outage."""
    other = Key("https://api.example.com", "e0" * 16)
    async with limiter_of(mortal, 2, 0.2) as limiter:
        for key in KEY, other:
            (await limiter.acquire(key)).answered(200, SILENT)
        name = next(name for name in mortal.names() if KEY.digest in name)
        mortal.command("DEL", name)
        mortal.command("HSET", name, "not", "ours")
        async with anyio.create_task_group() as group:
            calls = Calls(limiter, group)
            await calls.queue(0)
            (await limiter.acquire(other)).answered(200, SILENT)
            assert [] == calls.order
            with anyio.fail_after(10):
                await calls.served(1)
    assert [] == caplog.messages


@pytest.mark.anyio
async def test_14_14_flushed_under_an_idle_process(mortal: RedisServer) -> None:
    """A process that has never used the key knows that Redis had data: it sends nothing on top."""
    async with limiter_of(mortal, 3, 0.4) as limiter, limiter_of(mortal, 3, 0.4) as idle:
        for _ in range(3):
            (await limiter.acquire(KEY)).answered(200, SILENT)
        sent = time.monotonic()
        mortal.command("FLUSHALL")
        await idle.acquire(KEY)
        assert time.monotonic() - sent >= 0.4


@pytest.mark.anyio
async def test_16_the_first_call_loads_nothing(mortal: RedisServer) -> None:
    """All that a call needs has been imported and read when the limiter is entered."""
    async with limiter_of(mortal) as limiter:
        opened: list[object] = []
        modules = set(sys.modules)
        watching = True
        sys.addaudithook(lambda event, args: opened.append(args) if watching and event == "open" else None)
        permit = await limiter.acquire(KEY)
        permit.sent()
        permit.answered(200, SILENT)
        watching = False
    assert set() == set(sys.modules) - modules
    assert [] == opened


@pytest.mark.anyio
@pytest.mark.parametrize("when_down", ["share", "raise", "open"])
async def test_a_key_waits_for_redis_without_asking(
    mortal: RedisServer, when_down: WhenDown, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only one task tries again; an idle key is forgotten meanwhile, its task included."""
    asked: list[str] = []
    async with limiter_of(mortal, 5, 0.1, when_down=when_down, timeout=0.5) as limiter:
        ask = limiter._ask

        async def record(name: str, request: ScriptRequest) -> ScriptReply:
            asked.append(name)
            return await ask(name, request)

        monkeypatch.setattr(limiter, "_ask", record)
        (await limiter.acquire(KEY)).answered(200, SILENT)
        unanswered = await limiter.acquire(KEY)
        unanswered.sent()
        mortal.kill()
        with anyio.fail_after(10):  # it notices when it reports
            while not limiter._breaker.is_open:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        asked.clear()
        await anyio.sleep(0.5)
        unanswered.answered(200, SILENT)
        assert asked
        assert {"probe"} == set(asked)
        assert len(asked) <= 6
        mortal.start()
        await until_back(limiter)
        with anyio.fail_after(10):
            while limiter._keys:  # noqa: ASYNC110
                await anyio.sleep(0.05)
            (await limiter.acquire(KEY)).answered(200, SILENT)
