"""What the limiter tells those who subscribe: the right values, at the right time, with nothing held."""

from collections.abc import Iterator

import anyio
import anyio.lowlevel
import pytest

from lemcal_async import events
from lemcal_async._headers import Quota
from lemcal_async.ratelimit import Key, LocalRateLimiter, RateLimit

KEY = Key("https://api.example.com", "0f" * 16)
SHORT = "0f0f0f0f"
SILENT = Quota()


@pytest.fixture
def limiter() -> LocalRateLimiter:
    """Return a limiter on the clock of the event loop, one request in a period."""
    return LocalRateLimiter(1, 2.0, clock=anyio.current_time)


@pytest.fixture
def told(limiter: LocalRateLimiter) -> Iterator[list[events.Event]]:
    """Return what a listener hears that asks the limiter for a snapshot each time."""
    heard: list[events.Event] = []

    def listen(event: events.Event) -> None:
        assert not limiter._inbox._lock.locked()
        assert isinstance(limiter.snapshot(KEY), RateLimit)
        heard.append(event)

    unsubscribe = events.subscribe(listen)
    yield heard
    unsubscribe()


@pytest.mark.anyio
async def test_queued_and_granted(limiter: LocalRateLimiter, told: list[events.Event]) -> None:
    """Who waits is told of with the number ahead, who is granted with the seconds that it took."""
    (await limiter.acquire(KEY, priority="bulk")).answered(200, SILENT)
    assert [events.Granted(SHORT, "bulk", 0.0)] == told
    told.clear()

    async def one() -> None:
        (await limiter.acquire(KEY)).answered(200, SILENT)

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(one)
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
        assert [events.Queued(SHORT, "interactive", ahead) for ahead in range(3)] == told
        told.clear()
    waits = [event.waited for event in told if isinstance(event, events.Granted)]
    assert pytest.approx([2.003, 4.006, 6.009]) == waits
    assert 3 == len(told)


@pytest.mark.anyio
async def test_paused(limiter: LocalRateLimiter, told: list[events.Event]) -> None:
    """A 429 is told of with the seconds that the server named."""
    permit = await limiter.acquire(KEY)
    told.clear()
    permit.answered(429, Quota(limit=1, remaining=0, retry_after=1.283))
    assert [events.Paused(SHORT, 1.283)] == told


@pytest.mark.anyio
async def test_foreign_use(told: list[events.Event], caplog: pytest.LogCaptureFixture) -> None:
    """The first answer that shows foreign requests publishes their number, and no other does."""
    caplog.set_level("INFO", "lemcal_async.ratelimit")
    limiter = LocalRateLimiter(clock=anyio.current_time)
    permits = [await limiter.acquire(KEY) for _ in range(2)]
    told.clear()
    for permit in permits:
        permit.sent()
        permit.answered(200, Quota(limit=20, remaining=6, retry_after=0.7))
    assert [events.ForeignUse(SHORT, 12)] == told
    assert [message for message in caplog.messages if "another client uses it too" in message]


@pytest.mark.anyio
@pytest.mark.parametrize("seconds", [0.1, 10.0])
async def test_own_calls_that_were_cut_off(told: list[events.Event], seconds: float) -> None:
    """What this process sent and lost is not taken for somebody else's, however late the server counts it."""
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
    assert {events.Granted} == {type(event) for event in told}
    assert limiter.snapshot(KEY).limit == 20


@pytest.mark.anyio
async def test_fell_back(told: list[events.Event], caplog: pytest.LogCaptureFixture) -> None:
    """Answers that contradict what was relied on are told of once, with the reason."""
    caplog.set_level("INFO", "lemcal_async.ratelimit")
    limiter = LocalRateLimiter(clock=anyio.current_time)
    for retry_after in (2.0, 2.0):
        permit = await limiter.acquire(KEY)
        limiter._servers[KEY.base_url].is_fixed = True
        permit.sent()
        permit.answered(200, Quota(limit=20, remaining=19, retry_after=retry_after))
        await anyio.sleep(1.0)
    reasons = [event.reason for event in told if isinstance(event, events.FellBack)]
    assert ["the responses contradict fixed windows; the server is treated as a sliding log"] == reasons
    assert [message for message in caplog.messages if "contradict fixed windows" in message]


@pytest.mark.anyio
async def test_what_is_known_of_servers_is_bounded() -> None:
    """A hundred servers are remembered, the newest, though their keys are idle."""
    limiter = LocalRateLimiter()
    for number in range(120):
        (await limiter.acquire(Key(f"https://{number}.example.com", "0f" * 16))).unsent()
    assert [f"https://{number}.example.com" for number in range(20, 120)] == [*limiter._servers]
