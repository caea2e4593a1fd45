"""How the server counts, as far as its answers tell: in fixed windows, and when each of them ends. Pure.

The service is believed to count in windows that start with a key's first request (inferred); it could
be a sliding log. Nothing here relies on either until answers prove it: a server that has forgotten a
request before a period was over keeps no sliding log. From then on a window's end is known far better
than the time at which any single request was counted. What contradicts windows takes the proof back.

How much of a key's budget is left to us when somebody else uses it too. Pure.

A limiter that fills every window to the brim starves the other integrations of its user, who then see
nothing but 429s. Strangers show in the answers: the server has counted more than we sent.

Which requests of a burst are held back for what their answers will tell. Pure.

Only such as have others behind them that wait for the next window in any case. One that goes late in its
window shows who else uses the key: whoever fills every window as it begins meets strangers only in *their*
429s. And two that go somewhat later than the others show whether the server counts in windows: when the
next one begins, a sliding log would still count them.
"""

import math

import attrs

ROUNDING = 0.001  # seconds by which a Retry-After may be off: the service sends whole milliseconds (inferred)
SURE = 2  # answers that must have refuted a sliding log before windows are relied on
BEHIND = 0.25  # of the least spread by which to stay behind the best guess at a window's end
CAUTION = 0.005  # seconds to stay behind the moment at which a window should be over
PINNED = 5  # answers that pin a window's end well enough to learn from it


@attrs.define(eq=False)
class Window:
    """One window of one key, which ends between ``earliest`` and ``latest`` on the client's clock.

    ``earliest`` is what a request that arrives as fast as the fastest one so far may aim at: it is
    before the end by the least way there, ``latest`` is after it by the least way back.
    """

    earliest: float
    latest: float
    number: int  # the first known one has 1
    pins: int = 0  # answers that told of its end before that came
    heard: float = -math.inf  # when the last of these came
    ours: int = 0  # requests that were counted in it
    strangers: int = 0  # those of somebody else, as far as the answers tell
    elapsed: float = 0.0  # seconds of it that the answers tell of


class MinimumRoundTrip:
    """How long the quickest of the last few hundred round trips took, and so the quickest possible."""

    def __init__(self) -> None:
        self._last = -math.inf
        self._moments = 0
        self._samples = [_Sample()]
        self._quickest: float | None = 0.0  # None: to be found anew

    def take(self, seconds: float, now: float) -> None:
        """Note one that ended at ``now``."""
        if now - self._last > 0.5:
            self._last = now
            self._moments += 1
            if self._samples[-1].count >= 200:
                self._samples = [self._samples[-1], _Sample()]
        sample = self._samples[-1]
        sample.least = min(sample.least, seconds)
        sample.count += 1
        sample.total += seconds
        self._quickest = None

    @property
    def quickest(self) -> float:
        """Return the least time to count on, 0 while too little is known."""
        if self._quickest is None:
            self._quickest = self._found() if self._moments >= 2 else 0.0  # all of one burst may be slow
        return self._quickest

    def _found(self) -> float:
        count = sum(sample.count for sample in self._samples)
        mean = sum(sample.total for sample in self._samples) / count
        least = min(sample.least for sample in self._samples)
        # The next may be quicker than any so far. A mean of floats may be less than the least of them.
        return min(least, max(0.0, least - 4 * (mean - least) / count))


@attrs.define
class _Sample:
    least: float = math.inf
    count: int = 0
    total: float = 0.0


class ServerModel:
    """What the answers have taught of one server and of the way to it, whatever key they were for."""

    def __init__(self, period: float) -> None:
        self.period = period
        self.counts_windows = False  # proven
        self.keeps_log = False  # windows were contradicted, and not proven since
        self._needed = SURE
        self._refuted = 0  # answers that a sliding log would not have given
        self._fractional = 0  # waits that were not whole seconds
        self._spread = math.inf  # the least by which the end of a window was uncertain
        self._round_trips = MinimumRoundTrip()

    def took(self, seconds: float, now: float) -> None:
        """Note a round trip."""
        self._round_trips.take(seconds, now)

    @property
    def head_start(self) -> float:
        """Return the seconds by which a request may leave before what it needs is free at the server.

        A request was counted the way back before its answer came, and the next one is counted the way
        there after it leaves. Both at their quickest are what the quickest round trip took, or less.
        """
        quickest = self._round_trips.quickest
        return min(quickest, self._spread) if self._spread < math.inf else quickest / 2

    def over_at(self, window: Window) -> float:
        """Return when a request may leave that is not to be counted in ``window`` any more."""
        latest = window.latest
        if self._spread < math.inf and window.pins >= PINNED:
            # Both bounds are off by a way, and the least spread is about the sum of both.
            spread = min(self._spread, latest - window.earliest)
            latest = max(window.earliest, latest - spread) + BEHIND * spread
        return latest + CAUTION

    @property
    def is_precise(self) -> bool:
        """Whether it sends fractions of seconds: whole ones would be off by up to one."""
        return self._fractional >= SURE

    def heard(self, retry_after: float) -> None:
        """Learn from what an answer said of the time left."""
        self._fractional += not retry_after.is_integer()

    def ended(self, before: Window) -> None:
        """Learn from a window that is over."""
        if before.pins >= PINNED:
            self._spread = min(self._spread, before.latest - before.earliest)

    def refuted_sliding(self) -> None:
        """Note an answer that a sliding log cannot have given."""
        self._refuted += 1
        if self._refuted >= self._needed and self.is_precise:
            self.counts_windows, self.keeps_log = True, False

    def contradicted_windows(self) -> None:
        """Note an answer that fixed windows cannot have given."""
        if self.counts_windows:
            self._needed *= 2
        self.counts_windows, self.keeps_log = False, True
        self._refuted = 0


class Windows:
    """The windows of one key that answers may still speak of, the newest last."""

    def __init__(self, server: ServerModel) -> None:
        self._server = server
        self._known: list[Window] = []
        self._count = 0  # of all windows so far

    @property
    def newest(self) -> Window | None:
        """Return the window that began last."""
        return self._known[-1] if self._known else None

    @property
    def several(self) -> bool:
        """Whether there was a window before the newest one."""
        return len(self._known) > 1

    def place(self, left_at: float, now: float, retry_after: float) -> tuple[Window | None, bool]:
        """Return the window that an answer speaks of, and whether it pins the window's end.

        ``retry_after`` is what the answer said. None if it says nothing of use. In a sliding log each
        request that is forgotten begins a window, so to speak: answers pin the same end only if none
        can have been forgotten between them.
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
    """The strangers' use of one key, and what that leaves us.

    At least half of the limit stays ours. As soon as strangers show, half of it is thought to be
    theirs; what the answers of each period then tell moves that.
    """

    def __init__(self, period: float) -> None:
        self._period = period
        self._theirs = 0.0  # their requests in a period

    @property
    def shared(self) -> bool:
        """Whether somebody else uses the key."""
        return self._theirs > 0

    def ours(self, limit: int) -> int:
        """Return how many requests of a period we may use."""
        if not self.shared:
            return limit
        return max(math.ceil(limit / 2), limit - math.ceil(self._theirs) - 1)

    def interval(self, ours: int) -> float:
        """Return the seconds from one request to the next, of so many in a period.

        Spread over the period, they leave room for others at any time, and see what those use.
        """
        return 0.9 * self._period / ours if self.shared else 0.0

    def met(self, limit: int) -> bool:
        """Take note that strangers have shown; return whether that is news."""
        if self.shared:
            return False
        self._theirs = limit / 2
        return True

    def learned(self, strangers: int, elapsed: float) -> None:
        """Take in what a window told: ``strangers`` requests in its first ``elapsed`` seconds."""
        if not self.shared or elapsed < self._period / 2:
            return
        seen = strangers * self._period / elapsed
        self._theirs = seen if seen > self._theirs else (self._theirs + seen) / 2
        if self._theirs < 0.5:
            self._theirs = 0.0


PROBED = 3  # of so many windows, one has a request held back to see whether somebody else uses the key
LATER = 0.5  # of a period, by which that request is held back
HELD = 0.06  # seconds by which the last requests of a quick burst are held back to see how it is counted


class ProbeScheduler:
    """The burst under way of one key: the requests since a window was over."""

    def __init__(self, server: ServerModel) -> None:
        self._server = server
        self._after: Window | None = None  # the last window that was over when a request was granted
        self._began = -math.inf  # when the first one after it was
        self._granted = 0  # since then

    def granted(self, now: float, newest: Window | None) -> None:
        """Note a grant; ``newest`` is the window known last."""
        if newest is not None and newest is not self._after and newest.latest < now:
            self._after, self._began, self._granted = newest, now, 0
        self._granted += 1

    def held_until(self, now: float, waiting: int, ours: int) -> float:
        """Return until when the next request is held back; ``now`` if it is not.

        ``waiting`` calls want to send, of which ``ours`` may in one window.
        """
        after = self._after
        left = ours - self._granted
        if after is None or waiting <= left or self._server.keeps_log:
            return now
        near = after.latest - after.earliest < HELD / 2
        if left == 1 and after.number % PROBED == PROBED - 1 and (self._server.counts_windows or near):
            return self._began + LATER * self._server.period
        if left <= SURE and after.number <= PROBED and near and not self._server.counts_windows:
            return self._began + HELD
        return now
