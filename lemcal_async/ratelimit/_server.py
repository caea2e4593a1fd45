"""How the server counts, as far as its answers tell: in which windows, and whose requests. Pure.

The service seems to count in windows that start with a key's first request (inferred); it could be a
sliding log. Nothing here relies on either until answers prove it: a server that has forgotten a request
before a period was over keeps no sliding log. From then on the end of a window is known far better than
the moment at which any single request was counted. An answer that contradicts windows revokes the proof.
"""

import math

import attrs

from lemcal_async._headers import Quota

ROUNDING = 0.001  # seconds by which a Retry-After may be off: the service sends whole milliseconds (inferred)
SKEW = 0.1  # seconds by which the clocks of one service's servers may differ
NEEDED = 2  # answers that must have refuted a sliding log before windows are relied on
BEHIND = 0.25  # of the least spread: how far to stay behind the best guess at a window's end
CAUTION = 0.005  # seconds to stay behind the moment at which a window should be over
PINNED = 5  # answers that pin a window's end well enough to learn from it
PROBED = 3  # one of this many windows has a request held back to see whether somebody else uses the key
PROBE_AT = 0.5  # of a period: how long that request is held back
HELD = 0.06  # seconds for which the last requests of a quick burst are held back to see how it is counted


@attrs.define(eq=False)
class Window:
    """One window of one key, which ends between ``earliest`` and ``latest`` on the client's clock.

    ``earliest`` is what a request that arrives as fast as the fastest one so far may aim at: it is
    before the end by the shortest way there, ``latest`` is after it by the shortest way back.
    """

    earliest: float
    latest: float
    number: int  # the first known one has 1
    pins: int = 0  # answers that came before its end and told of it
    heard: float = -math.inf  # when the last of these came
    own: int = 0  # our requests that were counted in it
    foreign: int = 0  # those of somebody else, as far as the answers tell
    elapsed: float = 0.0  # seconds of it that the answers tell of


class MinimumRoundTrip:
    """How long the fastest of the last few hundred round trips took, and so the fastest possible."""

    def __init__(self) -> None:
        self._last = -math.inf
        self._moments = 0
        self._before, self._recent = _Sample(), _Sample()
        self._seconds: float | None = 0.0  # None: to be computed anew

    def add(self, seconds: float, now: float) -> None:
        """Note a round trip that ended at ``now``."""
        if now - self._last > 0.5:
            self._last = now
            self._moments += 1
            if self._recent.count >= 200:
                self._before, self._recent = self._recent, _Sample()
        sample = self._recent
        sample.least = min(sample.least, seconds)
        sample.count += 1
        sample.total += seconds
        self._seconds = None

    @property
    def seconds(self) -> float:
        """Return the shortest time to count on, 0 while too little is known."""
        if self._seconds is None:
            self._seconds = self._computed() if self._moments >= 2 else 0.0  # a whole burst may be slow
        return self._seconds

    def _computed(self) -> float:
        before, recent = self._before, self._recent
        count = before.count + recent.count
        mean = (before.total + recent.total) / count
        least = min(before.least, recent.least)
        # The next one may be faster than any so far. A mean of floats may be less than the least of them.
        return min(least, max(0.0, least - 4 * (mean - least) / count))


class ServerClock:
    """How far the server's clock is ahead of the client's, at least.

    Answers tell the end of a window twice: as a duration, and as a time in whole seconds. Quick answers
    show how far the clocks differ. From then on a late answer tells when its request was counted, to
    within a second.
    """

    def __init__(self) -> None:
        self._ahead = [-math.inf, -math.inf]  # recently, and before that, because clocks drift
        self._since = -math.inf

    def add(self, earliest: float, latest: float, reset_at: float, now: float) -> None:
        """Note a window that ends at ``reset_at`` there, between ``earliest`` and ``latest`` here."""
        if now - self._since > 30:
            self._ahead = [-math.inf, self._ahead[0]]
            self._since = now
        ahead = reset_at - latest
        if reset_at + 1 + SKEW - earliest < max(self._ahead):  # the server's clock was set back
            self._ahead = [ahead, ahead]
        self._ahead[0] = max(self._ahead[0], ahead)

    def latest(self, reset_at: float) -> float:
        """Return the latest time here at which a window ends that ends at ``reset_at`` there."""
        return reset_at + 1 + SKEW - max(self._ahead)


@attrs.define
class _Sample:
    least: float = math.inf
    count: int = 0
    total: float = 0.0


class ServerModel:
    """What the answers have taught about one server and the way to it, whatever key they were for."""

    def __init__(self, period: float) -> None:
        self.period = period
        self.is_fixed = False  # fixed windows are proven
        self.is_sliding = False  # windows were contradicted, and not proven since
        self._needed = NEEDED
        self._refuted = 0  # answers that a sliding log would not have given
        self._fractional = 0  # waits that were not whole seconds
        self._spread = math.inf  # the least by which the end of a window was uncertain
        self._round_trip = MinimumRoundTrip()
        self.clock = ServerClock()

    def add_round_trip(self, seconds: float, now: float) -> None:
        """Note a round trip."""
        self._round_trip.add(seconds, now)

    @property
    def round_trip_credit(self) -> float:
        """Return how many seconds a request may leave before what it needs is free at the server.

        A request was counted the way back before its answer came, and the next one is counted the way
        there after it leaves. At their fastest, both take the minimum round trip, or less.
        """
        fastest = self._round_trip.seconds
        return min(fastest, self._spread) if self._spread < math.inf else fastest / 2

    def over_at(self, window: Window) -> float:
        """Return from when on a request that leaves is not counted in ``window`` any more."""
        latest = window.latest
        if self._spread < math.inf and window.pins >= PINNED:
            # Both bounds are off by one way, and the least spread is about the sum of both.
            spread = min(self._spread, latest - window.earliest)
            latest = max(window.earliest, latest - spread) + BEHIND * spread
        return latest + CAUTION

    @property
    def is_precise(self) -> bool:
        """Whether it sends fractions of seconds: whole ones would be off by up to one."""
        return self._fractional >= NEEDED

    def heard(self, retry_after: float) -> None:
        """Learn from what an answer said of the time left."""
        self._fractional += not retry_after.is_integer()

    def counted_by(self, left_at: float, now: float, quota: Quota, *, came_quickly: bool) -> float:
        """Return when it must have counted a request whose answer has come now."""
        rest, reset_at = quota.retry_after, quota.reset_at
        if rest is None or reset_at is None or not self.is_precise:
            return now
        if came_quickly:
            self.clock.add(left_at + rest - ROUNDING, now + rest, reset_at, now)
            return now
        return max(left_at, min(now, self.clock.latest(reset_at) - rest + ROUNDING))

    def ended(self, before: Window) -> None:
        """Learn from a window that is over."""
        if before.pins >= PINNED:
            self._spread = min(self._spread, before.latest - before.earliest)

    def refuted_sliding(self) -> None:
        """Note an answer that a sliding log cannot have given."""
        self._refuted += 1
        if self._refuted >= self._needed and self.is_precise:
            self.is_fixed, self.is_sliding = True, False

    def contradicted_windows(self) -> None:
        """Note an answer that fixed windows cannot have given."""
        if self.is_fixed:
            self._needed *= 2
        self.is_fixed, self.is_sliding = False, True
        self._refuted = 0


class Windows:
    """The windows of one key that answers may still speak of, the newest last."""

    __slots__ = ("_count", "_known", "_server")

    def __init__(self, server: ServerModel) -> None:
        self._server = server
        self._known: list[Window] = []
        self._count = 0  # of all windows so far

    @property
    def newest(self) -> Window | None:
        """Return the window that began last."""
        known = self._known  # read once: another thread may replace it
        return known[-1] if known else None

    @property
    def several(self) -> bool:
        """Whether there was a window before the newest one."""
        return len(self._known) > 1

    def place(self, left_at: float, now: float, retry_after: float) -> tuple[Window | None, bool]:
        """Return the window that an answer speaks of, and whether it pins the window's end.

        ``retry_after`` is what the answer said. The window is None if that says nothing useful. In a
        sliding log each request that is forgotten begins a window, so to speak: answers pin the same
        end only if none can have been forgotten between them.
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
                self._server.ended(newest)
                if latest - newest.earliest < period:  # it began before the last one was over
                    self._server.contradicted_windows()
                    self._known = []
            self._count += 1
            window = Window(earliest, latest, number=self._count)
            self._known = [*self._known[-1:], window]
        pins = now < earliest and (not window.pins or (now < window.earliest and window.heard < earliest))
        if pins:
            if not window.pins:
                window.earliest, window.latest = earliest, latest
            window.earliest, window.latest = max(earliest, window.earliest), min(latest, window.latest)
            window.heard = max(now, window.heard)
            window.pins += 1
        window.elapsed = max(window.elapsed, period - retry_after)
        self._server.heard(retry_after)
        return window, pins


class SharedKeyEstimate:
    """Foreign use of one key, and what that leaves us.

    A limiter that fills every window to the brim starves its user's other integrations, which then see
    nothing but 429s. Foreign requests show in the answers: the server has counted more than we sent. At
    least half of the limit stays ours. As soon as foreign requests show, half of the limit is assumed to be
    theirs; the answers of each period then correct that.
    """

    __slots__ = ("_foreign", "_period")

    def __init__(self, period: float) -> None:
        self._period = period
        self._foreign = 0.0  # requests in a period

    @property
    def shared(self) -> bool:
        """Whether somebody else uses the key."""
        return self._foreign > 0

    def own(self, limit: int) -> int:
        """Return how many requests of a period we may use."""
        if not self.shared:
            return limit
        return max(math.ceil(limit / 2), limit - math.ceil(self._foreign) - 1)

    def interval(self, own: int) -> float:
        """Return the seconds between two of ``own`` requests in a period.

        Spread over the period, they leave room for others at any time, and see what those use.
        """
        return 0.9 * self._period / own if self.shared else 0.0

    def detected(self, limit: int) -> bool:
        """Note that foreign requests have shown; return whether that is new."""
        if self.shared:
            return False
        self._foreign = limit / 2
        return True

    def learn(self, foreign: int, elapsed: float) -> None:
        """Take in a window that had ``foreign`` requests in its first ``elapsed`` seconds."""
        if not self.shared or elapsed < self._period / 2:
            return
        seen = foreign * self._period / elapsed
        self._foreign = seen if seen > self._foreign else (self._foreign + seen) / 2
        if self._foreign < 0.5:
            self._foreign = 0.0


class ProbeScheduler:
    """The current burst of one key: the requests since a window was over.

    Some of them are held back for what their answers will tell, but only if others behind them wait for the
    next window in any case. One that leaves late in its window shows who else uses the key: whoever fills
    each window as it begins meets foreign requests only in *their* 429s. And two that leave somewhat later
    than the others show whether the server counts in windows: when the next one begins, a sliding log would
    still count them.
    """

    __slots__ = ("_after", "_began", "_granted", "_server")

    def __init__(self, server: ServerModel) -> None:
        self._server = server
        self._after: Window | None = None  # the last window that was over when a request was granted
        self._began = -math.inf  # when the first one after it was
        self._granted = 0  # since then

    def granted(self, now: float, newest: Window | None) -> None:
        """Note a grant; ``newest`` is the newest window known."""
        if newest is not None and newest is not self._after and newest.latest < now:
            self._after, self._began, self._granted = newest, now, 0
        self._granted += 1

    def held_until(self, now: float, waiting: int, own: int) -> float:
        """Return until when the next request is held back; ``now`` if it is not.

        ``waiting`` calls want to send, of which ``own`` may in one window.
        """
        after = self._after
        left = own - self._granted
        if after is None or waiting <= left or self._server.is_sliding:
            return now
        near = after.latest - after.earliest < HELD / 2
        if left == 1 and after.number % PROBED == PROBED - 1 and (self._server.is_fixed or near):
            return self._began + PROBE_AT * self._server.period
        if left <= NEEDED and after.number <= PROBED and near and not self._server.is_fixed:
            return self._began + HELD
        return now
