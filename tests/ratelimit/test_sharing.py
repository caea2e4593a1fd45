"""How much of a budget is ours when somebody else uses the key: one table per question."""

import pytest
from hypothesis import given, strategies as st

from lemcal_async.ratelimit._server import SharedKeyEstimate

PERIOD = 2.0


def met(limit: int = 20) -> SharedKeyEstimate:
    """Return the estimate of a key on which foreign requests have just been detected."""
    share = SharedKeyEstimate(PERIOD)
    assert share.mark_shared(limit)
    return share


def test_alone_all_is_ours_and_at_once() -> None:
    """Nothing is spread where nobody needs the room."""
    share = SharedKeyEstimate(PERIOD)
    share.learn(15, 2.0)  # nothing to learn from before foreign requests were detected
    assert (False, 20, 0.0) == (share.shared, share.own(20), share.interval(20))


def test_half_is_thought_to_be_theirs_when_they_show() -> None:
    """Ours is the other half, spread over nine tenths of the period; met again, they are no news."""
    share = met()
    assert (True, 10) == (share.shared, share.own(20))
    assert pytest.approx(0.18) == share.interval(10)
    assert not share.mark_shared(20)


@pytest.mark.parametrize(
    ("windows", "ours"),
    [
        ([], 10),
        ([(12, 2.0)], 10),  # more than half is ours in any case
        ([(20, 2.0)], 10),
        ([(2, 2.0)], 13),  # 10 and 2: 6
        ([(2, 2.0), (2, 2.0)], 15),  # 6 and 2: 4
        ([(3, 1.0)], 11),  # 6 in a period
        ([(2, 0.99)], 10),  # too little of the window to say
        ([(0, 2.0)], 14),
        ([(0, 2.0)] * 3 + [(7, 2.0)], 12),  # more than before is believed at once
        ([(0, 2.0)] * 4, 18),
        ([(0, 2.0)] * 5, 20),  # they are gone
    ],
)
def test_what_the_windows_tell(windows: list[tuple[int, float]], ours: int) -> None:
    """Less is believed by halves, more at once; one request is left to them beyond what they used."""
    share = met()
    for foreign, elapsed in windows:
        share.learn(foreign, elapsed)
    assert ours == share.own(20)


def test_gone_and_met_again() -> None:
    """Whoever stays away for five windows is forgotten, and is news when back."""
    share = met()
    for _ in range(5):
        share.learn(0, 2.0)
    assert not share.shared
    assert share.mark_shared(20)


@given(
    st.integers(1, 50),
    st.lists(st.tuples(st.integers(0, 60), st.floats(0.1, 2.0)), max_size=8),
)
def test_at_least_half_is_ours(limit: int, windows: list[tuple[int, float]]) -> None:
    """Whatever they do: never less than half, and never more than the limit."""
    share = met(limit)
    for foreign, elapsed in windows:
        share.learn(foreign, elapsed)
    assert limit / 2 <= share.own(limit) <= limit
