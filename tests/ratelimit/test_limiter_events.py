"""The limiter's events: correct values, at the right time, emitted without holding the lock."""

from collections.abc import Iterator

import anyio
import anyio.lowlevel
import pytest

from lemcal_async import events
from lemcal_async._headers import Quota
from lemcal_async.ratelimit import Key, LocalRateLimiter, RateLimit

KEY = Key("https://api.example.com", "0f" * 16)
SHORT = "0f0f0f0f"
NO_HEADERS = Quota()


@pytest.fixture
def limiter() -> LocalRateLimiter:
    """Return a limiter on the event loop's clock, with one request per period."""
    return LocalRateLimiter(1, 2.0, clock=anyio.current_time)


@pytest.fixture
def emitted(limiter: LocalRateLimiter) -> Iterator[list[events.Event]]:
    """Return the events received by a listener that takes a snapshot of the limiter each time."""
    received: list[events.Event] = []

    def listen(event: events.Event) -> None:
        assert not limiter._inbox._lock.locked()
        assert isinstance(limiter.snapshot(KEY), RateLimit)
        received.append(event)

    unsubscribe = events.subscribe(listen)
    yield received
    unsubscribe()


@pytest.mark.anyio
async def test_queued_and_granted(limiter: LocalRateLimiter, emitted: list[events.Event]) -> None:
    """``Queued`` has the number of calls ahead, ``Granted`` the seconds waited."""
    (await limiter.acquire(KEY, priority="bulk")).answered(200, NO_HEADERS)
    assert [events.Granted(SHORT, "bulk", 0.0)] == emitted
    emitted.clear()

    async def one() -> None:
        (await limiter.acquire(KEY)).answered(200, NO_HEADERS)

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(one)
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
        assert [events.Queued(SHORT, "interactive", ahead) for ahead in range(3)] == emitted
        emitted.clear()
    waits = [event.waited for event in emitted if isinstance(event, events.Granted)]
    assert pytest.approx([2.003, 4.006, 6.009]) == waits
    assert 3 == len(emitted)


@pytest.mark.anyio
async def test_paused(limiter: LocalRateLimiter, emitted: list[events.Event]) -> None:
    """``Paused`` has the seconds that the server requested."""
    permit = await limiter.acquire(KEY)
    emitted.clear()
    permit.answered(429, Quota(limit=1, remaining=0, retry_after=1.283))
    assert [events.Paused(SHORT, 1.283)] == emitted


@pytest.mark.anyio
async def test_foreign_use(emitted: list[events.Event], caplog: pytest.LogCaptureFixture) -> None:
    """Only the first response that reveals foreign requests publishes their number."""
    caplog.set_level("INFO", "lemcal_async.ratelimit")
    limiter = LocalRateLimiter(clock=anyio.current_time)
    permits = [await limiter.acquire(KEY) for _ in range(2)]
    emitted.clear()
    for permit in permits:
        permit.sent()
        permit.answered(200, Quota(limit=20, remaining=6, retry_after=0.7))
    assert [events.ForeignUse(SHORT, 12)] == emitted
    assert [message for message in caplog.messages if "another client uses it too" in message]


@pytest.mark.anyio
@pytest.mark.parametrize("seconds", [0.1, 10.0])
async def test_own_lost_requests_are_not_foreign_use(emitted: list[events.Event], seconds: float) -> None:
    """Requests sent and lost by this process are not taken for foreign, however late they are counted."""
    limiter = LocalRateLimiter(clock=anyio.current_time)
    for _ in range(10):
        permit = await limiter.acquire(KEY)
        permit.sent()
        permit.unknown()
    await anyio.sleep(seconds)
    for used in (11, 12):
        permit = await limiter.acquire(KEY)
        permit.sent()
        permit.answered(200, Quota(limit=20, remaining=20 - used, retry_after=1.9))
    assert {events.Granted} == {type(event) for event in emitted}
    assert limiter.snapshot(KEY).limit == 20


@pytest.mark.anyio
async def test_fell_back(emitted: list[events.Event], caplog: pytest.LogCaptureFixture) -> None:
    """A contradiction of fixed windows is published once, with the reason."""
    caplog.set_level("INFO", "lemcal_async.ratelimit")
    limiter = LocalRateLimiter(clock=anyio.current_time)
    for retry_after in (2.0, 2.0):
        permit = await limiter.acquire(KEY)
        limiter._servers[KEY.base_url].is_fixed = True
        permit.sent()
        permit.answered(200, Quota(limit=20, remaining=19, retry_after=retry_after))
        await anyio.sleep(1.0)
    reasons = [event.reason for event in emitted if isinstance(event, events.FellBack)]
    assert ["the responses contradict fixed windows; the server is treated as a sliding log"] == reasons
    assert [message for message in caplog.messages if "contradict fixed windows" in message]


@pytest.mark.anyio
async def test_number_of_server_models_is_bounded() -> None:
    """The models of the newest 100 servers are kept, even if their keys are idle."""
    limiter = LocalRateLimiter()
    for number in range(120):
        (await limiter.acquire(Key(f"https://{number}.example.com", "0f" * 16))).unsent()
    assert [f"https://{number}.example.com" for number in range(20, 120)] == [*limiter._servers]
