"""The default limiter of the process, and ``Unlimited``."""

import anyio
import pytest

from lemcal_async._headers import Quota
from lemcal_async.ratelimit import (
    Key,
    LocalRateLimiter,
    RateLimit,
    RateLimiter,
    Unlimited,
    default_limiter,
    fresh_default,
)

KEY = Key("https://api.example.com", "0f" * 16)
REFUSED = Quota(limit=20, remaining=0, retry_after=86_400.0, resets_in=86_400.0)


def test_default_limiter_is_shared() -> None:
    """All clients of a process share one limiter, so that together they keep the limit."""
    assert default_limiter() is default_limiter()


def test_default_limiter_has_the_documented_limit() -> None:
    """The default is 20 requests per 2 seconds, as the service documents."""
    limiter = default_limiter()
    assert isinstance(limiter, LocalRateLimiter)
    assert (20, 2.0) == (limiter.limit, limiter.period)


def test_fresh_default_replaces_the_default_temporarily() -> None:
    """Inside ``fresh_default`` a new limiter is the default; afterward the previous one is restored."""
    before = default_limiter()
    with fresh_default() as outer:
        assert outer is default_limiter()
        assert outer is not before
        with fresh_default() as inner:
            assert inner is default_limiter()
            assert inner is not outer
        assert outer is default_limiter()
    assert before is default_limiter()


def test_fresh_default_is_undone_after_an_error() -> None:
    """A failing test does not leak its limiter."""
    before = default_limiter()

    def failing_test() -> None:
        with fresh_default():
            raise LookupError

    with pytest.raises(LookupError):
        failing_test()
    assert before is default_limiter()


@pytest.mark.anyio
async def test_fresh_default_starts_with_a_full_budget() -> None:
    """The budget that one test used is available to the next."""
    with fresh_default() as used:
        permit = await used.acquire(KEY)
        permit.answered(429, REFUSED)
        assert 0 == used.snapshot(KEY).remaining
        with fresh_default() as fresh:
            assert 20 == fresh.snapshot(KEY).remaining


@pytest.mark.anyio
async def test_unlimited_never_waits() -> None:
    """No call waits, however many there are and whatever is reported, even after a 429."""
    limiter = Unlimited()
    with anyio.fail_after(5):
        refused = await limiter.acquire(KEY)
        assert 0.0 == refused.answered(429, REFUSED)
        for number in range(100):
            permit = await limiter.acquire(KEY, priority="bulk", timeout=0.0, again=refused)
            permit.sent()
            [permit.unsent, permit.unknown][number % 2]()


def test_unlimited_snapshot() -> None:
    """The snapshot has no limit, and nothing is queued or paused."""
    expected = RateLimit(limit=None, remaining=None, resets_in=0.0, queued=0, paused_for=0.0)
    assert expected == Unlimited().snapshot(KEY)


@pytest.mark.parametrize("limiter", [Unlimited(), LocalRateLimiter()])
def test_limiters_satisfy_the_protocol(limiter: object) -> None:
    """Both limiters can be passed to a client."""
    assert isinstance(limiter, RateLimiter)
