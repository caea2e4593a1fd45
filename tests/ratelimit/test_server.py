"""What responses reveal about a server: its windows, their ends, and the minimum round trip."""

import math

import pytest
from hypothesis import given, strategies as st

from lemcal_async.ratelimit._server import (
    END_MARGIN,
    PINS_NEEDED,
    ROUNDING,
    SKEW,
    SPREAD_MARGIN,
    MinimumRoundTrip,
    ServerClock,
    ServerModel,
    Window,
    Windows,
)

PERIOD = 2.0


def learned(*rounds: tuple[float, list[float]]) -> float:
    """Return the minimum round trip after these rounds, each given with the moment of its end."""
    trips = MinimumRoundTrip()
    for now, seconds in rounds:
        for one in seconds:
            trips.add(one, now)
    return trips.seconds


class TestRoundTrips:
    """The estimate of the minimum round trip."""

    def test_no_estimate_from_a_single_moment(self) -> None:
        """Without round trips, or with those of one moment only, the estimate is 0."""
        assert 0.0 == learned()
        assert 0.0 == learned((1.0, [0.1] * 100))
        assert 0.0 == learned((1.0, [0.1] * 100), (1.5, [0.1]))

    def test_estimate_from_two_moments(self) -> None:
        """If all round trips are alike, the estimate is their minimum."""
        assert pytest.approx(0.1) == learned((1.0, [0.1] * 10), (1.6, [0.1]))

    @pytest.mark.parametrize(("count", "fastest"), [(4, 0.0), (8, 0.05), (20, 0.08), (200, 0.098)])
    def test_estimate_allows_for_variance(self, count: int, fastest: float) -> None:
        """The more round trips were recorded, the less is subtracted from their minimum."""
        half = [0.1, 0.3] * (count // 4)
        assert pytest.approx(fastest) == learned((1.0, half), (2.0, half))

    def test_old_round_trips_are_forgotten(self) -> None:
        """After a few hundred slower round trips, the estimate follows."""
        trips = MinimumRoundTrip()
        for now, fastest in enumerate((0.0, 0.01, 0.1, 0.1)):
            for _ in range(200):
                trips.add(0.01 if now == 0 else 0.1, float(now))
            assert pytest.approx(fastest, abs=0.002) == trips.seconds

    @given(st.lists(st.tuples(st.floats(0, 2), st.floats(0, 10)), min_size=1, max_size=30))
    def test_estimate_never_exceeds_the_minimum(self, rounds: list[tuple[float, float]]) -> None:
        """The estimate lies between 0 and the minimum."""
        trips = MinimumRoundTrip()
        now = 0.0
        for seconds, gap in rounds:
            trips.add(seconds, now := now + gap)
            assert trips.seconds >= 0.0
        assert trips.seconds <= min(seconds for seconds, _ in rounds)


class TestServerClock:
    """The offset of the server's clock, from windows whose end is known on both clocks."""

    UNCERTAINTY = 1.0 + SKEW  # seconds: the server's clock shows whole seconds

    def test_quick_responses_bound_the_offset(self) -> None:
        """The highest offset counts; without any, a window may end at any time."""
        clock = ServerClock()
        assert math.inf == clock.latest(1000.0)
        clock.add(9.9, 10.0, 1000.0, now=8.0)
        assert pytest.approx(10.0 + self.UNCERTAINTY) == clock.latest(1000.0)
        clock.add(13.1, 13.2, 1004.0, now=12.0)
        clock.add(17.2, 17.3, 1007.0, now=16.0)
        assert pytest.approx(9.2 + self.UNCERTAINTY) == clock.latest(1000.0)

    def test_offsets_are_forgotten(self) -> None:
        """Clocks drift: an offset counts for at least 30 seconds, and for at most 60 after the next one."""
        clock = ServerClock()
        clock.add(9.9, 10.0, 1000.0, now=8.0)
        clock.add(40.2, 40.3, 1030.0, now=39.0)
        assert pytest.approx(10.0 + self.UNCERTAINTY) == clock.latest(1000.0)
        clock.add(71.2, 71.3, 1061.0, now=70.0)
        assert pytest.approx(10.3 + self.UNCERTAINTY) == clock.latest(1000.0)

    def test_clock_of_the_server_is_set_back(self) -> None:
        """An offset that contradicts the known one replaces it."""
        clock = ServerClock()
        clock.add(9.9, 10.0, 1000.0, now=8.0)
        clock.add(13.9, 14.0, 904.0, now=12.0)
        assert pytest.approx(14.0 + self.UNCERTAINTY) == clock.latest(904.0)


class TestServer:
    """When fixed windows are proven, and what revokes the proof."""

    def test_two_refutations_and_fractions_prove_fixed_windows(self) -> None:
        """One response may be an outlier, and whole seconds may be off by up to one."""
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
        """However many responses seem to refute a sliding log; a single fraction may be a coincidence."""
        server = ServerModel(PERIOD)
        for wait in waits:
            server.add_retry_after(wait)
        for _ in range(100):
            server.refuted_sliding()
        assert not server.is_fixed

    def test_each_contradiction_makes_the_next_proof_harder(self) -> None:
        """Each contradiction doubles the refutations needed; before a proof there is nothing to revoke."""
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

    def test_round_trip_credit(self) -> None:
        """Half of the minimum round trip; after a window was pinned precisely, all of it up to the spread."""
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

    def test_end_of_a_window(self) -> None:
        """The latest end; after a window was pinned precisely, a quarter of the spread after the estimate."""
        server = ServerModel(PERIOD)
        window = Window(10.0, 10.2, 1, pins=PINS_NEEDED)
        assert pytest.approx(10.2 + END_MARGIN) == server.over_at(window)
        server.add_window(Window(8.0, 8.1, 1, pins=PINS_NEEDED))
        assert pytest.approx(10.1 + SPREAD_MARGIN * 0.1 + END_MARGIN) == server.over_at(window)
        assert pytest.approx(10.2 + END_MARGIN) == server.over_at(Window(10.0, 10.2, 2, pins=PINS_NEEDED - 1))
        closer = Window(10.0, 10.04, 3, pins=PINS_NEEDED)
        assert pytest.approx(10.0 + SPREAD_MARGIN * 0.04 + END_MARGIN) == server.over_at(closer)


class TestWindows:
    """The window that a response refers to."""

    def test_responses_of_a_window_pin_its_end(self) -> None:
        """Each response bounds the end by when its request was sent and when the response arrived."""
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
    def test_unusable_responses(self, left_at: float, now: float, retry_after: float) -> None:
        """A round trip over half a period is too imprecise; a window cannot last longer than a period."""
        windows = Windows(ServerModel(PERIOD))
        assert (None, False) == windows.place(left_at, now, retry_after)
        assert windows.newest is None

    def test_windows_follow_each_other(self) -> None:
        """The next window begins after the previous one is over; responses may still refer to either."""
        server = ServerModel(PERIOD)
        windows = Windows(server)
        first, _ = windows.place(0.0, 0.1, 2.0)
        second, pins = windows.place(2.01, 2.11, 2.0)
        assert second is not first
        assert (True, True, False) == (pins, windows.has_previous, server.is_sliding)
        late, pins = windows.place(1.9, 2.2, 0.15)  # arrived after its window was over
        assert (first, False) == (late, pins)
        third, _ = windows.place(4.3, 4.4, 2.0)
        assert third is windows.newest
        assert third is not None
        assert 3 == third.number

    def test_overlapping_window_contradicts_fixed_windows(self) -> None:
        """Fixed windows never overlap: the known windows are dropped."""
        server = ServerModel(PERIOD)
        server.is_fixed = True
        windows = Windows(server)
        windows.place(0.0, 0.01, 2.0)
        window, _ = windows.place(1.0, 1.01, 2.0)
        assert (False, True) == (server.is_fixed, server.is_sliding)
        assert (window, False) == (windows.newest, windows.has_previous)

    def test_response_after_the_end_does_not_pin(self) -> None:
        """A response that arrives after its window has ended is too imprecise to rely on."""
        windows = Windows(ServerModel(PERIOD))
        window, pins = windows.place(0.0, 0.5, 0.1)
        assert window is not None
        assert (False, 0, -math.inf) == (pins, window.pins, window.pinned_at)
        assert (window, True) == windows.place(0.05, 0.06, 0.45)
        assert pytest.approx((0.5 - ROUNDING, 0.51 + ROUNDING)) == (window.earliest, window.latest)

    def test_responses_out_of_order(self) -> None:
        """A response that is less precise than the known bounds changes nothing."""
        windows = Windows(ServerModel(PERIOD))
        window, _ = windows.place(0.5, 0.51, 1.5)
        assert window is not None
        before = window.earliest, window.latest
        assert (window, True) == windows.place(0.0, 0.9, 1.3)
        assert before == (window.earliest, window.latest)
        assert 0.9 == window.pinned_at
