"""What an answer proves of other requests: values only."""

import pytest
from hypothesis import given, strategies as st

from lemcal_async.ratelimit.past import Past, forgotten, refutes_sliding

PERIOD = 2.0


def past(left_at: float, used: int | None = None, *, heard_after: float = 0.1, surely: bool = True) -> Past:
    """Return a request that was counted within so many seconds after it left."""
    heard_at = left_at + heard_after
    return Past(heard_at, heard_at, left_at, surely=surely, window=None, used=used)


class TestForgotten:
    """How many requests a sliding log has forgotten, from what the answers say that it counts."""

    @pytest.mark.parametrize(("used", "count"), [(3, 0), (2, 1), (1, 2), (4, 0)])
    def test_one_answer(self, used: int, count: int) -> None:
        """What was surely counted before, and is not spoken of, is forgotten."""
        last = past(1.0, used)
        assert count == forgotten(last, [past(0.0), past(0.1), last])

    def test_what_may_have_come_later_proves_nothing(self) -> None:
        """One under way at the same time, of which no answer speaks, may have been counted after it."""
        last = past(1.0, 2)
        assert 0 == forgotten(last, [past(0.0), past(0.95), last])

    def test_several_answers_together(self) -> None:
        """In whatever order they were counted, the last of three saw all three, and no more than that."""
        three = [past(1.0, 1), past(1.01, 3), past(1.02, 2)]
        for told_by in three:
            assert 2 == forgotten(told_by, [past(0.0), past(0.1, 7), *three])

    def test_an_answer_that_saw_more_is_left_out(self) -> None:
        """A set without it may prove more."""
        last = past(1.0, 1)
        assert 1 == forgotten(last, [past(0.0), last, past(1.01, 9)])

    @given(st.data())
    def test_never_more_than_it_has(self, data: st.DataObject) -> None:
        """Whatever the ways there and back, a log that tells the truth has forgotten that many."""
        leaves = data.draw(st.lists(st.floats(0, 3), min_size=1, max_size=12))
        ways = st.sampled_from([0.0, 0.01, 0.2, 0.45])
        trips = sorted((left_at + data.draw(ways), left_at) for left_at in leaves)
        live: list[Past] = []
        for counted_at, left_at in trips:
            used = sum(counted_at - PERIOD < other <= counted_at for other, _ in trips)
            heard_at = counted_at + data.draw(ways)
            live.append(
                Past(min(heard_at, left_at + 0.5), heard_at, left_at, surely=True, window=None, used=used)
            )
        told_by = data.draw(st.sampled_from(live))
        last = max(counted_at for counted_at, _ in trips)
        gone = sum(counted_at <= last - PERIOD for counted_at, _ in trips)
        assert forgotten(told_by, live) <= gone


class TestRefutesSliding:
    """Whether an answer cannot be that of a sliding log."""

    @pytest.mark.parametrize(
        ("used", "proof"), [(1, True), (2, False), (3, False), (0, False), (None, False)]
    )
    def test_two_too_few(self, used: int | None, proof: bool) -> None:  # noqa: FBT001 - a column
        """It must count what it surely counted less than a period ago; by one, it proves nothing."""
        assert proof is refutes_sliding(past(2.05, used), [past(0.5), past(1.0)], PERIOD)

    @pytest.mark.parametrize(
        "others",
        [
            pytest.param([past(0.1), past(1.0)], id="one may be forgotten"),
            pytest.param([past(1.0), past(2.0)], id="one may have come later"),
            pytest.param([past(1.0), past(1.1, surely=False)], id="one may not have been counted"),
        ],
    )
    def test_what_is_not_sure_does_not_count(self, others: list[Past]) -> None:
        """Then there is one too few to prove anything."""
        assert not refutes_sliding(past(2.05, 1), others, PERIOD)
