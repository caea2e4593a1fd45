"""Which limiter is used when none is given, and the one that does not limit."""

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


def test_one_limiter_for_the_whole_process() -> None:
    """All clients share one limiter, so that together they keep to the limit."""
    assert default_limiter() is default_limiter()


def test_the_default_keeps_to_the_documented_limit() -> None:
    """20 requests in any 2 seconds, as the service documents."""
    limiter = default_limiter()
    assert isinstance(limiter, LocalRateLimiter)
    assert (20, 2.0) == (limiter.limit, limiter.period)


def test_tests_get_a_limiter_of_their_own() -> None:
    """Inside fresh_default another limiter is the default; afterward it is the old one again."""
    before = default_limiter()
    with fresh_default() as outer:
        assert outer is default_limiter()
        assert outer is not before
        with fresh_default() as inner:
            assert inner is default_limiter()
            assert inner is not outer
        assert outer is default_limiter()
    assert before is default_limiter()


def test_the_old_limiter_is_back_after_a_failure() -> None:
    """A failing test does not leave its limiter behind."""
    before = default_limiter()

    def failing_test() -> None:
        with fresh_default():
            raise LookupError

    with pytest.raises(LookupError):
        failing_test()
    assert before is default_limiter()


@pytest.mark.anyio
async def test_a_fresh_limiter_knows_nothing_of_the_old_one() -> None:
    """What one test used up is there for the next."""
    with fresh_default() as used:
        permit = await used.acquire(KEY)
        permit.answered(429, REFUSED)
        assert 0 == used.snapshot(KEY).remaining
        with fresh_default() as fresh:
            assert 20 == fresh.snapshot(KEY).remaining


@pytest.mark.anyio
async def test_unlimited_lets_everything_pass_at_once() -> None:
    """However many, whatever the reports: nobody waits, and nothing is held back after a 429."""
    limiter = Unlimited()
    with anyio.fail_after(5):
        refused = await limiter.acquire(KEY)
        assert 0.0 == refused.answered(429, REFUSED)
        for number in range(100):
            permit = await limiter.acquire(KEY, priority="bulk", timeout=0.0, again=refused)
            permit.sent()
            [permit.unsent, permit.unknown][number % 2]()


def test_unlimited_knows_of_no_limit() -> None:
    """Its snapshot has no limit, and nothing is queued or paused."""
    expected = RateLimit(limit=None, remaining=None, resets_in=0.0, queued=0, paused_for=0.0)
    assert expected == Unlimited().snapshot(KEY)


@pytest.mark.parametrize("limiter", [Unlimited(), LocalRateLimiter()])
def test_both_are_rate_limiters(limiter: object) -> None:
    """Either can be given to a client."""
    assert isinstance(limiter, RateLimiter)
