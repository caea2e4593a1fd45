"""How the server counts, as far as its responses reveal: in which windows, and whose requests. Pure.

The service seems to count in windows that start with a key's first request (inferred); it could keep a
sliding log. Nothing here relies on either until responses prove it: a server that forgets a request before
a period is over does not keep a sliding log. From then on, the end of a window is known far more precisely
than the moment at which any single request was counted. A response that contradicts windows revokes the
proof.
"""

import math

import attrs

from lemcal_async._headers import Quota

ROUNDING = 0.001  # maximum error of a Retry-After in seconds: the service sends whole milliseconds (inferred)
SKEW = 0.1  # maximum difference in seconds between the clocks of one service's servers
PROOFS_NEEDED = 2  # responses that must agree before anything is relied on; one may be an outlier
SPREAD_MARGIN = 0.25  # safety margin after the estimated end of a window, as a fraction of the minimum spread
END_MARGIN = 0.005  # seconds to wait after the moment at which a window should be over
PINS_NEEDED = 5  # responses needed to pin a window's end precisely enough to learn from it
PROBE_EVERY = 3  # in one of this many windows, a request is held back to detect foreign use of the key
PROBE_AT = 0.5  # how long that request is held back, as a fraction of the period
# Seconds to hold back the last requests of a quick burst in the first PROBE_EVERY windows, to see how they
# are counted.
HOLD_FOR = 0.06


@attrs.define(eq=False)
class Window:
    """One window of one key, which ends between ``earliest`` and ``latest`` on the client's clock.

    ``earliest`` is the moment to send a request that arrives just after the end, if it travels as fast as the
    fastest one so far: it precedes the end by the minimum forward latency. ``latest`` follows the end by the
    minimum return latency.
    """

    earliest: float
    latest: float
    number: int  # 1 for the first known window
    pins: int = 0  # responses that arrived before its end and reported it
    pinned_at: float = -math.inf  # when the last of these arrived
    own: int = 0  # our requests counted in it
    foreign: int = 0  # foreign requests, as far as the responses reveal
    elapsed: float = 0.0  # seconds of it covered by the responses


class MinimumRoundTrip:
    """The minimum of the last few hundred round trips, which estimates the fastest possible one."""

    def __init__(self) -> None:
        self._last = -math.inf
        self._bursts = 0
        self._previous, self._recent = _Sample(), _Sample()
        self._seconds: float | None = 0.0  # None: to be recomputed

    def add(self, seconds: float, now: float) -> None:
        """Record a round trip that ended at ``now``."""
        if now - self._last > 0.5:
            self._last = now
            self._bursts += 1
            if self._recent.count >= 200:
                self._previous, self._recent = self._recent, _Sample()
        sample = self._recent
        sample.minimum = min(sample.minimum, seconds)
        sample.count += 1
        sample.total += seconds
        self._seconds = None

    @property
    def seconds(self) -> float:
        """The minimum round-trip time to rely on, 0 while too little is known."""
        if self._seconds is None:
            self._seconds = self._compute() if self._bursts >= 2 else 0.0  # an entire burst may be slow
        return self._seconds

    def _compute(self) -> float:
        previous, recent = self._previous, self._recent
        count = previous.count + recent.count
        mean = (previous.total + recent.total) / count
        minimum = min(previous.minimum, recent.minimum)
        # The next one may be faster than all so far. A mean of floats may be less than their minimum.
        return min(minimum, max(0.0, minimum - 4 * (mean - minimum) / count))


class ServerClock:
    """The minimum by which the server's clock is ahead of the client's.

    Responses report the end of a window twice: as a duration, and as a time in whole seconds. Quick responses
    reveal the offset between the clocks. From then on, a late response reveals when its request was counted,
    to within a second.
    """

    def __init__(self) -> None:
        self._ahead = [-math.inf, -math.inf]  # in the current and the previous interval, because clocks drift
        self._since = -math.inf

    def add(self, earliest: float, latest: float, reset_at: float, now: float) -> None:
        """Record a window that ends at ``reset_at`` there, between ``earliest`` and ``latest`` here."""
        if now - self._since > 30:
            self._ahead = [-math.inf, self._ahead[0]]
            self._since = now
        ahead = reset_at - latest
        if reset_at + 1 + SKEW - earliest < max(self._ahead):  # the server's clock was set back
            self._ahead = [ahead, ahead]
        self._ahead[0] = max(self._ahead[0], ahead)

    def latest(self, reset_at: float) -> float:
        """Return the latest time here at which a window that ends at ``reset_at`` there can end."""
        return reset_at + 1 + SKEW - max(self._ahead)


@attrs.define
class _Sample:
    minimum: float = math.inf
    count: int = 0
    total: float = 0.0


class ServerModel:
    """What the responses have revealed about one server and the network path to it, across all keys."""

    def __init__(self, period: float) -> None:
        self.period = period
        self.is_fixed = False  # fixed windows are proven
        self.is_sliding = False  # fixed windows were contradicted, and not proven since
        self._proofs_needed = PROOFS_NEEDED
        self._refutations = 0  # responses that a sliding log would not have sent
        self._fractional = 0  # Retry-After values that were not whole seconds
        self._min_spread = math.inf  # the minimum uncertainty of a window's end
        self._round_trip = MinimumRoundTrip()
        self.clock = ServerClock()

    def add_round_trip(self, seconds: float, now: float) -> None:
        """Record a round trip."""
        self._round_trip.add(seconds, now)

    @property
    def round_trip_credit(self) -> float:
        """How many seconds before its slot is free at the server a request may be sent.

        A request was counted one return latency before its response arrived; the next one is counted one
        forward latency after it is sent. At their fastest, both together take the minimum round trip or less.
        """
        fastest = self._round_trip.seconds
        return min(fastest, self._min_spread) if self._min_spread < math.inf else fastest / 2

    def over_at(self, window: Window) -> float:
        """Return the moment from which a request that is sent is no longer counted in ``window``."""
        latest = window.latest
        if self._min_spread < math.inf and window.pins >= PINS_NEEDED:
            # Each bound is off by a one-way latency, and the minimum spread is about the sum of both.
            spread = min(self._min_spread, latest - window.earliest)
            latest = max(window.earliest, latest - spread) + SPREAD_MARGIN * spread
        return latest + END_MARGIN

    @property
    def is_precise(self) -> bool:
        """Whether the server sends fractions of seconds: whole seconds would be off by up to one."""
        return self._fractional >= PROOFS_NEEDED

    def add_retry_after(self, retry_after: float) -> None:
        """Learn from the Retry-After of a response."""
        self._fractional += not retry_after.is_integer()

    def counted_by(self, left_at: float, now: float, quota: Quota, *, came_quickly: bool) -> float:
        """Return the latest time at which it can have counted a request whose response arrived now."""
        rest, reset_at = quota.retry_after, quota.reset_at
        if rest is None or reset_at is None or not self.is_precise:
            return now
        if came_quickly:
            self.clock.add(left_at + rest - ROUNDING, now + rest, reset_at, now)
            return now
        return max(left_at, min(now, self.clock.latest(reset_at) - rest + ROUNDING))

    def add_window(self, window: Window) -> None:
        """Learn from a window that has ended."""
        if window.pins >= PINS_NEEDED:
            self._min_spread = min(self._min_spread, window.latest - window.earliest)

    def refuted_sliding(self) -> None:
        """Record a response that a sliding log cannot have sent."""
        self._refutations += 1
        if self._refutations >= self._proofs_needed and self.is_precise:
            self.is_fixed, self.is_sliding = True, False

    def contradicted_windows(self) -> None:
        """Record a response that fixed windows cannot have produced."""
        if self.is_fixed:
            self._proofs_needed *= 2
        self.is_fixed, self.is_sliding = False, True
        self._refutations = 0


class Windows:
    """The windows of one key that responses may still refer to, newest last."""

    __slots__ = ("_count", "_known", "_server")

    def __init__(self, server: ServerModel) -> None:
        self._server = server
        self._known: list[Window] = []
        self._count = 0  # windows so far

    @property
    def newest(self) -> Window | None:
        """The window that began last."""
        known = self._known  # read once: another thread may replace it
        return known[-1] if known else None

    @property
    def has_previous(self) -> bool:
        """Whether there was a window before the newest one."""
        return len(self._known) > 1

    def place(self, left_at: float, now: float, retry_after: float) -> tuple[Window | None, bool]:
        """Return the window that a response refers to, and whether the response pins the window's end.

        ``retry_after`` is the response's value. The window is None if the value is unusable. In a sliding
        log, every request that is forgotten effectively begins a new window: responses pin the same end only
        if no request can have been forgotten between them.
        """
        period = self._server.period
        if now - left_at > period / 2 or retry_after > period + ROUNDING:
            return None, False
        earliest, latest = left_at + retry_after - ROUNDING, now + retry_after + ROUNDING
        newest, window = self.newest, None
        for known in self._known:
            if earliest <= known.latest and latest >= known.earliest:
                window = known
        if window is None:
            if newest is not None:
                self._server.add_window(newest)
                if latest - newest.earliest < period:  # it began before the previous one was over
                    self._server.contradicted_windows()
                    self._known = []
            self._count += 1
            window = Window(earliest, latest, number=self._count)
            self._known = [*self._known[-1:], window]
        pins = now < earliest and (not window.pins or (now < window.earliest and window.pinned_at < earliest))
        if pins:
            if not window.pins:
                window.earliest, window.latest = earliest, latest
            window.earliest, window.latest = max(earliest, window.earliest), min(latest, window.latest)
            window.pinned_at = max(now, window.pinned_at)
            window.pins += 1
        window.elapsed = max(window.elapsed, period - retry_after)
        self._server.add_retry_after(retry_after)
        return window, pins


class SharedKeyEstimate:
    """Foreign use of one key, and our share of the limit.

    A limiter that fills every window to the brim starves the user's other integrations, which then receive
    only 429s. Foreign requests show in the responses: the server has counted more than we sent. At least half
    of the limit stays ours. When foreign requests are first detected, they are assumed to need half of the
    limit; the responses of each period then correct that.
    """

    __slots__ = ("_foreign", "_period")

    def __init__(self, period: float) -> None:
        self._period = period
        self._foreign = 0.0  # requests per period

    @property
    def shared(self) -> bool:
        """Whether another client uses the key."""
        return self._foreign > 0

    def own(self, limit: int) -> int:
        """Return the number of requests that we may send per period."""
        if not self.shared:
            return limit
        return max(math.ceil(limit / 2), limit - math.ceil(self._foreign) - 1)

    def interval(self, own: int) -> float:
        """Return the seconds between two of our ``own`` requests per period.

        Spread over the period, they leave room for other clients at any time, and detect what those use.
        """
        return 0.9 * self._period / own if self.shared else 0.0

    def mark_shared(self, limit: int) -> bool:
        """Record that foreign requests were detected; return whether that is new."""
        if self.shared:
            return False
        self._foreign = limit / 2
        return True

    def learn(self, foreign: int, elapsed: float) -> None:
        """Learn from a window that had ``foreign`` requests in its first ``elapsed`` seconds."""
        if not self.shared or elapsed < self._period / 2:
            return
        seen = foreign * self._period / elapsed
        self._foreign = seen if seen > self._foreign else (self._foreign + seen) / 2
        if self._foreign < 0.5:
            self._foreign = 0.0


class ProbeScheduler:
    """The current burst of one key: the requests since a window was over.

    Some of them are held back for what their responses will reveal, but only if calls behind them wait for
    the next window anyway. A request sent late in its window reveals foreign use: a client that fills windows
    as they begin meets foreign requests only as *their* 429s. And two requests sent slightly later than the
    rest reveal whether the server counts in fixed windows: when the next window begins, a sliding log would
    still count them.
    """

    __slots__ = ("_burst_began", "_granted", "_previous", "_server")

    def __init__(self, server: ServerModel) -> None:
        self._server = server
        self._previous: Window | None = None  # the last window over when a request was granted
        self._burst_began = -math.inf  # when the first request after it was granted
        self._granted = 0  # requests granted since then

    def granted(self, now: float, newest: Window | None) -> None:
        """Record a grant; ``newest`` is the newest window known."""
        if newest is not None and newest is not self._previous and newest.latest < now:
            self._previous, self._burst_began, self._granted = newest, now, 0
        self._granted += 1

    def held_until(self, now: float, waiting: int, own: int) -> float:
        """Return the time until which the next request is held back; ``now`` if it is not held back.

        ``waiting`` calls want to send; ``own`` of them may be sent per window.
        """
        server, previous = self._server, self._previous
        remaining = own - self._granted
        if previous is None or waiting <= remaining or server.is_sliding:
            return now
        near = previous.latest - previous.earliest < HOLD_FOR / 2
        if remaining == 1 and previous.number % PROBE_EVERY == PROBE_EVERY - 1 and (server.is_fixed or near):
            return self._burst_began + PROBE_AT * server.period
        if remaining <= PROOFS_NEEDED and previous.number <= PROBE_EVERY and near and not server.is_fixed:
            return self._burst_began + HOLD_FOR
        return now
