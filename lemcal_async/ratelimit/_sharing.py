"""How much of a key's budget is ours when somebody else uses the key too, and how to find that out. Pure.

A limiter that fills every window to the brim starves its user's other integrations, which then see
nothing but 429s. Foreign requests show in the answers: the server has counted more than we sent.

Some requests of a burst are held back for what their answers will tell, but only if others behind them
wait for the next window in any case. One that leaves late in its window shows who else uses the key:
whoever fills each window as it begins meets foreign requests only in *their* 429s. And two that leave
somewhat later than the others show whether the server counts in windows: when the next one begins, a
sliding log would still count them.
"""

import math

from lemcal_async.ratelimit._server import NEEDED, ServerModel, Window

PROBED = 3  # one of this many windows has a request held back to see whether somebody else uses the key
PROBE_AT = 0.5  # of a period: how long that request is held back
HELD = 0.06  # seconds for which the last requests of a quick burst are held back to see how it is counted


class SharedKeyEstimate:
    """Foreign use of one key, and what that leaves us.

    At least half of the limit stays ours. As soon as foreign requests show, half of the limit is assumed
    to be theirs; the answers of each period then correct that.
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
    """The current burst of one key: the requests since a window was over."""

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
