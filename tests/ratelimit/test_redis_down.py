"""Redis is slow, down or back: the configured policy applies, is logged once, and causes no burst."""

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

from .test_redis import GRANT_TTL, Calls, limiter_of, most_in, refusal

KEY = Key("https://api.example.com", "0f" * 16)
SILENT = Quota()


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Run on both event loops, in real time."""
    return str(request.param)


@pytest.fixture
def killable(lease_ttl: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    """Return a server that tests may kill; leases are short, and reconnecting is frequent."""
    lease_ttl(GRANT_TTL)
    monkeypatch.setattr(_connection, "FIRST_DELAY", 0.1)
    monkeypatch.setattr(_connection, "LAST_DELAY", 0.1)
    with RedisServer() as server:
        yield server


async def until_recovered(limiter: RedisRateLimiter, *, whole: bool = False) -> None:
    """Wait until the limiter has reconnected, or until it has the ``whole`` limit again."""
    with anyio.fail_after(20):
        while limiter._breaker.is_open or (whole and limiter.snapshot(KEY).paused_for):  # noqa: ASYNC110
            await anyio.sleep(0.01)


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Return the level and text of each log record of the limiter, without the reason."""
    return [
        (record.levelname, record.getMessage().partition(" (")[0])
        for record in caplog.records
        if record.name == "lemcal_async.ratelimit"
    ]


def served_since(calls: Calls, moment: float) -> int:
    """Return how many calls were granted after ``moment``."""
    return sum(served > moment for served in calls.times)


DOWN = ("WARNING", "the rate limiter cannot use Redis")
UP = ("INFO", "the rate limiter can use Redis again")


def test_circuit_breaker() -> None:
    """Reports only the first failure, and backs off up to a bound."""
    breaker = CircuitBreaker()
    assert breaker.failed("why", 100.0)
    delays = [breaker.delay]
    for _ in range(4):
        assert not breaker.failed("why", 100.0)
        delays.append(breaker.delay)
    assert [FIRST_DELAY, 0.5, LAST_DELAY, LAST_DELAY, LAST_DELAY] == delays
    breaker.is_open = False
    assert breaker.failed("why", 100.0)
    assert FIRST_DELAY == breaker.delay


@pytest.mark.anyio
async def test_share_policy(killable: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """Redis is killed and restarted: all processes together stay within the limit."""
    caplog.set_level(logging.INFO)
    heard: list[events.Event] = []
    leave = events.subscribe(heard.append)
    limit, period = 6, 0.2
    try:
        async with (
            limiter_of(killable, limit, period, timeout=0.5) as one,
            limiter_of(killable, limit, period, timeout=0.5) as two,
            anyio.create_task_group() as group,
        ):
            first, second = Calls(one, group), Calls(two, group)
            await first.queue(*range(2000))
            await second.queue(*range(2000))
            await second.served(9)  # by now each process knows the other
            killable.kill()
            killed = time.monotonic()
            with anyio.fail_after(20):
                while min(served_since(calls, killed) for calls in (first, second)) < 4:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
            killable.start()
            await until_recovered(one, whole=True)
            await until_recovered(two, whole=True)
            back = time.monotonic()
            with anyio.fail_after(20):
                while served_since(first, back) + served_since(second, back) < limit:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
            group.cancel_scope.cancel()
    finally:
        leave()
    assert limit >= most_in(period, first.times + second.times)
    assert 2 == logged(caplog).count(DOWN)  # once for each limiter
    assert 2 == logged(caplog).count(UP)
    fallen = [event for event in heard if isinstance(event, events.FellBack)]
    assert 2 == len(fallen)
    assert {"0f0f0f0f"} == {event.key for event in fallen}


@pytest.mark.anyio
async def test_a_configured_share(killable: RedisServer) -> None:
    """A process that never reached Redis starts after a pause, with its configured share."""
    killable.kill()
    async with (
        limiter_of(killable, 10, 0.2, share=0.2, timeout=0.5) as limiter,
        anyio.create_task_group() as group,
    ):
        calls = Calls(limiter, group)
        started = time.monotonic()
        await calls.queue(*range(6))
        await calls.queue("impatient", timeout=0.1)
        await calls.served(6)
    assert ["impatient"] == list(calls.refused) or len(calls.order) == 7
    assert 2 == most_in(0.2, calls.times)
    assert calls.times[0] - started >= 0.2 + GRANT_TTL


@pytest.mark.anyio
async def test_a_429_while_redis_is_down(killable: RedisServer) -> None:
    """It pauses the key in this process, and in the others once Redis is back; a long one fails calls."""
    async with limiter_of(killable, 4, 0.2, timeout=0.5) as limiter:
        (await limiter.acquire(KEY)).answered(200, SILENT)
        killable.kill()
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
            killable.start()
            await until_recovered(limiter)
            await anyio.sleep(0.1)
            async with limiter_of(killable, 4, 0.2) as other:
                with pytest.raises(WouldWait):
                    await other.acquire(KEY)


@pytest.mark.anyio
async def test_raise_policy(killable: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """Waiting and new calls get an error that says what to do; calls after the recovery are served."""
    caplog.set_level(logging.INFO)
    failures: list[LemcalError] = []
    permits: list[Permit] = []

    async def call(limiter: RedisRateLimiter) -> None:
        try:
            permits.append(await limiter.acquire(KEY))
        except LemcalError as error:
            failures.append(error)

    async with limiter_of(killable, 2, 0.2, when_down="raise", timeout=0.5) as limiter:
        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(call, limiter)
            with anyio.fail_after(10):
                while len(permits) < 2:  # noqa: ASYNC110
                    await anyio.sleep(0.005)
            killable.kill()
            for permit in permits:  # only now: until then no other call is granted
                permit.answered(200, SILENT)
        assert 3 == len(failures)
        assert 3 == len({id(error) for error in failures})
        await call(limiter)
        assert "use when_down='share'" in str(failures[-1])
        assert "nothing was sent" in str(failures[-1])
        killable.start()
        await until_recovered(limiter)
        with anyio.fail_after(10):
            await call(limiter)
        assert (3, 4) == (len(permits), len(failures))
    assert [DOWN, UP] == logged(caplog)


@pytest.mark.anyio
async def test_open_policy(killable: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """Requests are not limited while Redis is down."""
    caplog.set_level(logging.INFO)
    async with limiter_of(killable, 2, 5.0, when_down="open", timeout=0.5) as limiter:
        killable.kill()
        with anyio.fail_after(5):
            async with anyio.create_task_group() as group:
                calls = Calls(limiter, group)
                await calls.queue(*range(30))
        assert 30 == len(calls.order)
        assert limiter.snapshot(KEY).limit is None
    assert [DOWN] == logged(caplog)


@pytest.mark.anyio
async def test_redis_hangs(killable: RedisServer) -> None:
    """Calls wait for the timeout and do not queue behind each other; late grants are not lost."""
    async with limiter_of(killable, 2, 0.2, when_down="raise", timeout=0.2) as limiter:
        (await limiter.acquire(KEY)).answered(200, SILENT)
        killable.freeze(frozen=True)
        try:
            asked = time.monotonic()
            with pytest.raises(LemcalError, match="cannot use Redis"):
                await limiter.acquire(KEY)
            assert 0.15 <= time.monotonic() - asked < 3.0
            await anyio.sleep(0.5)
        finally:
            killable.freeze(frozen=False)
        await until_recovered(limiter)
        with anyio.fail_after(10):
            for _ in range(4):
                (await limiter.acquire(KEY)).answered(200, SILENT)


@pytest.mark.anyio
async def test_canceling_while_redis_is_down(killable: RedisServer) -> None:
    """The slot of a canceled call goes to the next call."""
    async with limiter_of(killable, 1, 0.2, timeout=0.5) as limiter:
        killable.kill()
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
        killable.start()
        await until_recovered(limiter)


@pytest.mark.anyio
async def test_redis_restarts_between_calls(killable: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """The limiter reconnects, and does not take lost slots for free ones."""
    caplog.set_level(logging.INFO)
    async with limiter_of(killable, 2, 0.4, timeout=2.0) as limiter, anyio.create_task_group() as group:
        calls = Calls(limiter, group)
        await calls.queue(0, 1)
        await calls.served(2)
        killable.kill()
        killable.start()
        await calls.queue(2, 3)
        await calls.served(4)
    assert 2 >= most_in(0.4, calls.times)


@pytest.mark.anyio
async def test_redis_replies_with_errors(killable: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """A server that replies with errors counts as unreachable."""
    async with limiter_of(killable, 5, 2.0, when_down="raise") as limiter:
        (await limiter.acquire(KEY)).answered(200, SILENT)
        killable.command("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(LemcalError, match="maxmemory"):
            await limiter.acquire(KEY)
        killable.command("CONFIG", "SET", "maxmemory", "0")
        await until_recovered(limiter)
        with anyio.fail_after(10):
            (await limiter.acquire(KEY)).unsent()


@pytest.mark.anyio
async def test_exiting_while_redis_is_down(killable: RedisServer) -> None:
    """Exiting does not wait for Redis."""
    started = time.monotonic()
    with anyio.fail_after(10):
        async with limiter_of(killable, timeout=0.5) as limiter, anyio.create_task_group() as group:
            (await limiter.acquire(KEY)).answered(429, refusal(5.0))
            killable.kill()
            group.start_soon(partial(Calls(limiter, group).one, "waits"))
            await anyio.sleep(0.1)
            group.cancel_scope.cancel()
    assert time.monotonic() - started < 8.0


@pytest.mark.anyio
@pytest.mark.parametrize("when_down", ["share", "raise", "open"])
async def test_snapshot_while_redis_is_down(killable: RedisServer, when_down: WhenDown) -> None:
    """It shows what can be sent now: nothing at first, then the share of this process, or anything."""
    other = Key("https://api.example.com", "e0" * 16)
    heard: list[events.Event] = []
    leave = events.subscribe(heard.append)
    try:
        async with limiter_of(killable, 8, 0.5, when_down=when_down, share=0.5, timeout=0.5) as limiter:
            (await limiter.acquire(KEY)).answered(200, SILENT)
            assert 8 == limiter.snapshot(other).remaining
            killable.kill()
            with anyio.fail_after(10):  # its next report fails
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
            killable.start()
            await until_recovered(limiter)
            assert 0 == limiter.snapshot(other).remaining  # until every process has reported what it sent
            assert 0 < limiter.snapshot(other).paused_for < 5
    finally:
        leave()
    assert ["0f0f0f0f"] == [event.key for event in heard if isinstance(event, events.FellBack)]


@pytest.mark.anyio
async def test_coredis_logs_an_outage_once(killable: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """Not at each attempt to reconnect. After the outage, the filter is removed."""
    async with limiter_of(killable, 5, 0.2, timeout=0.1) as limiter:
        (await limiter.acquire(KEY)).answered(200, SILENT)
        killable.freeze(frozen=True)
        try:
            await anyio.sleep(1.5)  # several attempts to reconnect
        finally:
            killable.freeze(frozen=False)
        await until_recovered(limiter)
        assert len([record for record in caplog.records if record.name == "coredis"]) <= 1
    assert [] == logging.getLogger("coredis").filters


@pytest.mark.anyio
async def test_a_blocked_event_loop(killable: RedisServer) -> None:
    """Another process may have used the slot: the request is not sent, and its call goes first next time."""
    async with (
        limiter_of(killable, 1, 0.1) as limiter,
        limiter_of(killable, 1, 0.1) as other,
        anyio.create_task_group() as group,
    ):
        permit = await limiter.acquire(KEY)
        assert permit.sent() is not False
        permit.answered(200, SILENT)
        permit = await limiter.acquire(KEY)
        time.sleep(2 * GRANT_TTL)  # noqa: ASYNC251 - blocks on purpose
        assert permit.sent() is False
        assert permit.answered(200, SILENT) == 0.0  # the permit has ended
        calls, others = Calls(limiter, group), Calls(other, group)
        await calls.queue(0)
        await calls.queue("again", again=permit)
        await others.served(0)
        await calls.served(2)
    assert ["again", 0] == calls.order


@pytest.mark.anyio
async def test_foreign_data_under_a_key(killable: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """It pauses that key, does not affect other keys, and is not an outage."""
    other = Key("https://api.example.com", "e0" * 16)
    async with limiter_of(killable, 2, 0.2) as limiter:
        for key in KEY, other:
            (await limiter.acquire(key)).answered(200, SILENT)
        name = next(name for name in killable.names() if KEY.digest in name)
        killable.command("DEL", name)
        killable.command("HSET", name, "not", "ours")
        async with anyio.create_task_group() as group:
            calls = Calls(limiter, group)
            await calls.queue(0)
            (await limiter.acquire(other)).answered(200, SILENT)
            assert [] == calls.order
            with anyio.fail_after(10):
                await calls.served(1)
    assert [] == caplog.messages


@pytest.mark.anyio
async def test_an_idle_process_notices_lost_data(killable: RedisServer) -> None:
    """A process that never used the key knows that Redis had data, and sends nothing until it is safe."""
    async with limiter_of(killable, 3, 0.4) as limiter, limiter_of(killable, 3, 0.4) as idle:
        for _ in range(3):
            (await limiter.acquire(KEY)).answered(200, SILENT)
        sent = time.monotonic()
        killable.command("FLUSHALL")
        await idle.acquire(KEY)
        assert time.monotonic() - sent >= 0.4


@pytest.mark.anyio
async def test_the_first_call_imports_and_reads_nothing(killable: RedisServer) -> None:
    """Everything that a call needs is loaded when the limiter is entered."""
    async with limiter_of(killable) as limiter:
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
async def test_only_one_task_reconnects(
    killable: RedisServer, when_down: WhenDown, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tasks of keys send nothing until then; an idle key is dropped with its task."""
    names: list[str] = []
    async with limiter_of(killable, 5, 0.1, when_down=when_down, timeout=0.5) as limiter:
        run_script = limiter._run_script

        async def record(name: str, request: ScriptRequest) -> ScriptReply:
            names.append(name)
            return await run_script(name, request)

        monkeypatch.setattr(limiter, "_run_script", record)
        (await limiter.acquire(KEY)).answered(200, SILENT)
        pending = await limiter.acquire(KEY)
        pending.sent()
        killable.kill()
        with anyio.fail_after(10):  # its next report fails
            while not limiter._breaker.is_open:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        names.clear()
        await anyio.sleep(0.25)
        pending.answered(200, SILENT)
        assert names
        assert {"probe"} == set(names)
        assert len(names) <= 6
        killable.start()
        await until_recovered(limiter)
        with anyio.fail_after(10):
            while limiter._keys:  # noqa: ASYNC110
                await anyio.sleep(0.05)
            (await limiter.acquire(KEY)).answered(200, SILENT)
