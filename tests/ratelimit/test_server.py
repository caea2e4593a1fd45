"""What answers teach of a server: its windows, their ends, and how quick the way to it is."""

import math

import pytest
from hypothesis import given, strategies as st

from lemcal_async.ratelimit._server import (
    END_MARGIN,
    PINS_NEEDED,
    ROUNDING,
    SPREAD_MARGIN,
    MinimumRoundTrip,
    ServerModel,
    Window,
    Windows,
)

PERIOD = 2.0


def learned(*rounds: tuple[float, list[float]]) -> float:
    """Return the quickest round trip after these, each with the moment of its end."""
    trips = MinimumRoundTrip()
    for now, seconds in rounds:
        for one in seconds:
            trips.add(one, now)
    return trips.seconds


class TestRoundTrips:
    """How quick a way may be that is yet to be seen."""

    def test_nothing_is_known_at_first(self) -> None:
        """Without a round trip, or with those of one moment only, there is nothing to count on."""
        assert 0.0 == learned()
        assert 0.0 == learned((1.0, [0.1] * 100))
        assert 0.0 == learned((1.0, [0.1] * 100), (1.5, [0.1]))

    def test_two_moments_tell(self) -> None:
        """All alike, the least is the quickest."""
        assert pytest.approx(0.1) == learned((1.0, [0.1] * 10), (1.6, [0.1]))

    @pytest.mark.parametrize(("count", "quickest"), [(4, 0.0), (8, 0.05), (20, 0.08), (200, 0.098)])
    def test_what_varies_may_be_quicker_yet(self, count: int, quickest: float) -> None:
        """The more round trips there were, the less is taken off the least of them."""
        half = [0.1, 0.3] * (count // 4)
        assert pytest.approx(quickest) == learned((1.0, half), (2.0, half))

    def test_what_is_long_past_is_forgotten(self) -> None:
        """A way that has become longer counts as it is, after some hundred round trips."""
        trips = MinimumRoundTrip()
        for now, quickest in enumerate((0.0, 0.01, 0.1, 0.1)):
            for _ in range(200):
                trips.add(0.01 if now == 0 else 0.1, float(now))
            assert pytest.approx(quickest, abs=0.002) == trips.seconds

    @given(st.lists(st.tuples(st.floats(0, 2), st.floats(0, 10)), min_size=1, max_size=30))
    def test_never_more_than_the_least(self, rounds: list[tuple[float, float]]) -> None:
        """And never less than nothing."""
        trips = MinimumRoundTrip()
        now = 0.0
        for seconds, gap in rounds:
            trips.add(seconds, now := now + gap)
            assert trips.seconds >= 0.0
        assert trips.seconds <= min(seconds for seconds, _ in rounds)


class TestServer:
    """When windows are proven, and what takes the proof back."""

    def test_two_refutations_and_fractions_prove_windows(self) -> None:
        """One answer may be odd, and whole seconds may be off by up to one."""
        server = ServerModel(PERIOD)
        server.refuted_sliding()
        assert not server.is_fixed
        server.refuted_sliding()
        assert not server.is_fixed
        for retry_after in (2.0, 1.5, 1.999):
            server.add_retry_after(retry_after)
        assert server.is_precise
        server.refuted_sliding()
        assert (True, False) == (server.is_fixed, server.is_sliding)

    @pytest.mark.parametrize("waits", [[], [2.0] * 50, [1.5, 2.0, 1.0, 0.0]])
    def test_whole_seconds_never_prove_anything(self, waits: list[float]) -> None:
        """However many answers seem to refute a log; one fraction alone may be chance."""
        server = ServerModel(PERIOD)
        for wait in waits:
            server.add_retry_after(wait)
        for _ in range(100):
            server.refuted_sliding()
        assert not server.is_fixed

    def test_each_contradiction_makes_the_next_proof_harder(self) -> None:
        """Twice as many refutations every time; before a proof there is nothing to take back."""
        server = ServerModel(PERIOD)
        server.add_retry_after(1.5)
        server.add_retry_after(1.5)
        server.contradicted_windows()
        assert (False, True) == (server.is_fixed, server.is_sliding)
        for needed in (2, 4, 8):
            for _ in range(needed):
                assert not server.is_fixed
                server.refuted_sliding()
            assert server.is_fixed
            server.contradicted_windows()

    def test_the_head_start(self) -> None:
        """Half of the quickest round trip; all of it once a window was pinned as closely, and no more."""
        server = ServerModel(PERIOD)
        assert 0.0 == server.round_trip_credit
        for now in (1.0, 2.0):
            server.add_round_trip(0.1, now)
        assert pytest.approx(0.05) == server.round_trip_credit
        server.add_window(Window(10.0, 10.08, 1, pins=PINS_NEEDED))
        assert pytest.approx(0.08) == server.round_trip_credit
        server.add_window(Window(12.0, 12.15, 2, pins=PINS_NEEDED))
        assert pytest.approx(0.08) == server.round_trip_credit
        server.add_window(Window(14.0, 14.01, 3, pins=PINS_NEEDED - 1))
        assert pytest.approx(0.08) == server.round_trip_credit

    def test_when_a_window_is_over(self) -> None:
        """At its latest end, until one was pinned well; then a quarter of the spread behind the guess."""
        server = ServerModel(PERIOD)
        window = Window(10.0, 10.2, 1, pins=PINS_NEEDED)
        assert pytest.approx(10.2 + END_MARGIN) == server.over_at(window)
        server.add_window(Window(8.0, 8.1, 1, pins=PINS_NEEDED))
        assert pytest.approx(10.1 + SPREAD_MARGIN * 0.1 + END_MARGIN) == server.over_at(window)
        assert pytest.approx(10.2 + END_MARGIN) == server.over_at(Window(10.0, 10.2, 2, pins=PINS_NEEDED - 1))
        closer = Window(10.0, 10.04, 3, pins=PINS_NEEDED)
        assert pytest.approx(10.0 + SPREAD_MARGIN * 0.04 + END_MARGIN) == server.over_at(closer)


class TestWindows:
    """Which window an answer speaks of."""

    def test_the_answers_of_a_window_pin_its_end(self) -> None:
        """Each leaves it between what its request's departure and its own arrival say."""
        windows = Windows(ServerModel(PERIOD))
        window, pins = windows.place(0.0, 0.1, 2.0)
        assert window is windows.newest
        assert window is not None
        assert (True, 1, False) == (pins, window.number, windows.has_previous)
        assert pytest.approx((2.0 - ROUNDING, 2.1 + ROUNDING)) == (window.earliest, window.latest)
        assert (window, True) == windows.place(0.05, 0.2, 1.95)
        assert (window, True) == windows.place(0.5, 0.54, 1.52)
        assert pytest.approx((2.02 - ROUNDING, 2.06 + ROUNDING)) == (window.earliest, window.latest)
        assert 3 == window.pins
        assert pytest.approx(0.48) == window.elapsed

    @pytest.mark.parametrize(
        ("left_at", "now", "retry_after"), [(0.0, 1.01, 1.0), (0.0, 0.1, 2.002), (0.0, 0.1, 900.0)]
    )
    def test_what_says_nothing_of_use(self, left_at: float, now: float, retry_after: float) -> None:
        """A round trip of half a period leaves too much open; more than a period is no rest of a window."""
        windows = Windows(ServerModel(PERIOD))
        assert (None, False) == windows.place(left_at, now, retry_after)
        assert windows.newest is None

    def test_windows_follow_each_other(self) -> None:
        """The next one begins when the last is over, at the earliest; answers may still speak of both."""
        server = ServerModel(PERIOD)
        windows = Windows(server)
        first, _ = windows.place(0.0, 0.1, 2.0)
        second, pins = windows.place(2.01, 2.11, 2.0)
        assert second is not first
        assert (True, True, False) == (pins, windows.has_previous, server.is_sliding)
        late, pins = windows.place(1.9, 2.2, 0.15)  # its window was over when it came
        assert (first, False) == (late, pins)
        third, _ = windows.place(4.3, 4.4, 2.0)
        assert third is windows.newest
        assert third is not None
        assert 3 == third.number

    def test_a_window_that_begins_before_the_last_is_over(self) -> None:
        """There is no such thing where windows are counted: what was known is forgotten."""
        server = ServerModel(PERIOD)
        server.is_fixed = True
        windows = Windows(server)
        windows.place(0.0, 0.01, 2.0)
        window, _ = windows.place(1.0, 1.01, 2.0)
        assert (False, True) == (server.is_fixed, server.is_sliding)
        assert (window, False) == (windows.newest, windows.has_previous)

    def test_a_window_that_was_over_does_not_pin(self) -> None:
        """An answer that comes when its window has ended says too little of a log to be relied on."""
        windows = Windows(ServerModel(PERIOD))
        window, pins = windows.place(0.0, 0.5, 0.1)
        assert window is not None
        assert (False, 0, -math.inf) == (pins, window.pins, window.pinned_at)
        assert (window, True) == windows.place(0.05, 0.06, 0.45)
        assert pytest.approx((0.5 - ROUNDING, 0.51 + ROUNDING)) == (window.earliest, window.latest)

    def test_answers_out_of_order(self) -> None:
        """One that tells less of the end than is known changes nothing."""
        windows = Windows(ServerModel(PERIOD))
        window, _ = windows.place(0.5, 0.51, 1.5)
        assert window is not None
        before = window.earliest, window.latest
        assert (window, True) == windows.place(0.0, 0.9, 1.3)
        assert before == (window.earliest, window.latest)
        assert 0.9 == window.pinned_at
