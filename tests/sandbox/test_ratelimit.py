"""The rate limit, with an injected clock."""

import itertools
import locale

import pytest
from hypothesis import given, strategies as st

from lemcal_async.sandbox._ratelimit import (
    Count,
    Counter,
    FixedWindow,
    SlidingLog,
    javascript_date,
    rate_limit_headers,
)


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    """Return a clock."""
    return Clock()


def test_fixed_window_starts_with_the_first_request(clock: Clock) -> None:
    """20 requests pass within 2 s of the first, and 20 more after that."""
    counter = FixedWindow(20, 2.0, clock)
    first = [counter.count("key") for _ in range(21)]
    clock.now = 101.999
    late = counter.count("key")
    clock.now = 102.0
    after = counter.count("key")

    assert [True] * 20 + [False] == [count.allowed for count in first]
    assert [*range(19, -1, -1), 0] == [count.remaining for count in first]
    assert (False, 0) == (late.allowed, late.remaining)
    assert pytest.approx(0.001) == late.resets_in
    assert (True, 19, 2.0) == (after.allowed, after.remaining, after.resets_in)


def test_refused_requests_do_not_extend_the_window(clock: Clock) -> None:
    """A client that keeps sending is allowed again when its window ends."""
    counter = FixedWindow(1, 2.0, clock)
    counter.count("key")
    for tick in range(1, 20):
        clock.now = 100 + tick / 10
        assert not counter.count("key").allowed
    clock.now = 102.0
    assert counter.count("key").allowed


@pytest.mark.parametrize("counter_type", [FixedWindow, SlidingLog])
def test_keys_are_counted_separately_and_dropped_when_idle(counter_type: type[Counter], clock: Clock) -> None:
    """Keys do not affect each other, and idle keys use no memory."""
    counter = counter_type(1, 2.0, clock)
    for number in range(100):
        assert counter.count(f"key {number}").allowed
        assert not counter.count(f"key {number}").allowed
    clock.now += 2.0
    counter.count("key 99")
    (entries,) = [value for value in vars(counter).values() if isinstance(value, dict)]
    assert ["key 99"] == list(entries)


def test_sliding_log_frees_a_slot_after_one_period(clock: Clock) -> None:
    """A refused request takes no slot; the reset is that of the oldest request that counts."""
    counter = SlidingLog(2, 2.0, clock)
    counter.count("key")
    clock.now = 101.5
    counter.count("key")
    clock.now = 101.75
    refused = counter.count("key")
    clock.now = 102.0
    allowed = counter.count("key")
    full = counter.count("key")

    assert (False, 0, 0.25) == (refused.allowed, refused.remaining, refused.resets_in)
    assert (True, 0, 1.5) == (allowed.allowed, allowed.remaining, allowed.resets_in)
    assert not full.allowed


steps = st.lists(st.integers(min_value=0, max_value=700), max_size=80)


@given(steps=steps)
def test_sliding_log_never_exceeds_the_limit(steps: list[int]) -> None:
    """The limit holds in every period, and no request is refused needlessly."""
    clock = Clock()
    counter = SlidingLog(3, 2.0, clock)
    allowed_at: list[float] = []
    for step in steps:
        clock.now += step / 1000
        recent = [at for at in allowed_at if at > clock.now - 2.0]
        count = counter.count("key")
        assert (len(recent) < 3) == count.allowed
        if count.allowed:
            allowed_at.append(clock.now)


@given(steps=steps)
def test_fixed_windows_do_not_overlap(steps: list[int]) -> None:
    """Each window starts with an allowed request, at least a period after the previous window's start."""
    clock = Clock()
    counter = FixedWindow(3, 2.0, clock)
    starts: list[float] = []
    used = 0
    for step in steps:
        clock.now += step / 1000
        if not starts or clock.now >= starts[-1] + 2.0:
            starts.append(clock.now)
            used = 0
        used += 1
        count = counter.count("key")
        assert (used <= 3, max(3 - used, 0)) == (count.allowed, count.remaining)
        assert starts[-1] + 2.0 - clock.now == count.resets_in
    assert all(later - earlier >= 2.0 for earlier, later in itertools.pairwise(starts))


@given(steps=steps, counter_type=st.sampled_from([FixedWindow, SlidingLog]))
def test_request_after_retry_after_is_allowed(steps: list[int], counter_type: type[Counter]) -> None:
    """``Retry-After`` is rounded up to the millisecond, never down."""
    clock = Clock()
    counter = counter_type(2, 2.0, clock)
    for step in steps:
        clock.now += step / 7919
        count = counter.count("key")
        if not count.allowed:
            clock.now += float(rate_limit_headers(count, 0)["Retry-After"]) + 1e-6  # floating-point error
            assert counter.count("key").allowed


@pytest.mark.parametrize(
    ("resets_in", "header"),
    [
        (2.0, "2"),
        (1.2829, "1.283"),
        (0.0381, "0.039"),
        (1.283, "1.283"),
        (0.00001, "0.001"),
        (86400.5, "86400.5"),
    ],
)
def test_retry_after_has_millisecond_precision(resets_in: float, header: str) -> None:
    """Whole seconds have no decimal point, as in JavaScript."""
    count = Count(at=0, allowed=True, limit=20, remaining=7, resets_in=resets_in)
    assert header == rate_limit_headers(count, 0)["Retry-After"]


def test_headers_are_the_documented_ones() -> None:
    """The reset is a JavaScript date, truncated to whole seconds."""
    count = Count(at=0, allowed=True, limit=20, remaining=7, resets_in=1.5)
    expected = {
        "Retry-After": "1.5",
        "X-RateLimit-Limit": "20",
        "X-RateLimit-Remaining": "7",
        "X-RateLimit-Reset": "Tue Feb 16 2021 09:02:42 GMT+0100 (Central European Standard Time)",
    }
    assert expected == rate_limit_headers(count, 1613462561.4)


def test_date_is_english_in_any_locale() -> None:
    """A single-digit day is padded with a zero."""
    before = locale.setlocale(locale.LC_TIME)
    try:
        locale.setlocale(locale.LC_TIME, "")
        assert javascript_date(1612180800).startswith("Mon Feb 01 2021 13:00:00 GMT+0100")
    finally:
        locale.setlocale(locale.LC_TIME, before)
