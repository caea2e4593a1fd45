"""How much of a shared key's budget is ours: one table per question."""

import pytest
from hypothesis import given, strategies as st

from lemcal_async.ratelimit._server import SharedKeyEstimate

PERIOD = 2.0


def detected(limit: int = 20) -> SharedKeyEstimate:
    """Return the estimate for a key on which foreign requests have just been detected."""
    share = SharedKeyEstimate(PERIOD)
    assert share.mark_shared(limit)
    return share


def test_unshared_key_uses_the_whole_limit_at_once() -> None:
    """Requests are not spread out if no other client needs room."""
    share = SharedKeyEstimate(PERIOD)
    share.learn(15, 2.0)  # nothing to learn from before foreign requests were detected
    assert (False, 20, 0.0) == (share.shared, share.own(20), share.interval(20))


def test_foreign_use_is_assumed_to_be_half_at_first() -> None:
    """The other half is ours, spread over nine tenths of the period; a second detection is not new."""
    share = detected()
    assert (True, 10) == (share.shared, share.own(20))
    assert pytest.approx(0.18) == share.interval(10)
    assert not share.mark_shared(20)


@pytest.mark.parametrize(
    ("windows", "ours"),
    [
        ([], 10),
        ([(12, 2.0)], 10),  # at least half is ours in any case
        ([(20, 2.0)], 10),
        ([(2, 2.0)], 13),  # average of 10 and 2: 6
        ([(2, 2.0), (2, 2.0)], 15),  # average of 6 and 2: 4
        ([(3, 1.0)], 11),  # 6 per period
        ([(2, 0.99)], 10),  # too little of the window is known
        ([(0, 2.0)], 14),
        ([(0, 2.0)] * 3 + [(7, 2.0)], 12),  # an increase applies immediately
        ([(0, 2.0)] * 4, 18),
        ([(0, 2.0)] * 5, 20),  # no longer shared
    ],
)
def test_estimate_follows_the_windows(windows: list[tuple[int, float]], ours: int) -> None:
    """A decrease is averaged, an increase applies at once; one request is reserved beyond the estimate."""
    share = detected()
    for foreign, elapsed in windows:
        share.learn(foreign, elapsed)
    assert ours == share.own(20)


def test_foreign_use_is_forgotten_and_detected_again() -> None:
    """A client not seen for five windows is forgotten, and counts as new when it returns."""
    share = detected()
    for _ in range(5):
        share.learn(0, 2.0)
    assert not share.shared
    assert share.mark_shared(20)


@given(
    st.integers(1, 50),
    st.lists(st.tuples(st.integers(0, 60), st.floats(0.1, 2.0)), max_size=8),
)
def test_at_least_half_is_ours(limit: int, windows: list[tuple[int, float]]) -> None:
    """Our share is never less than half of the limit, and never more than the limit."""
    share = detected(limit)
    for foreign, elapsed in windows:
        share.learn(foreign, elapsed)
    assert limit / 2 <= share.own(limit) <= limit
