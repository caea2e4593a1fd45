"""Which requests of a burst are held back for what their answers will tell. Pure.

Only such as have others behind them that wait for the next window in any case. One that goes late in its
window shows who else uses the key: whoever fills every window as it begins meets strangers only in *their*
429s. And two that go somewhat later than the others show whether the server counts in windows: when the
next one begins, a sliding log would still count them.
"""

import math

from lemcal_async.ratelimit.windows import SURE, Server, Window

PROBED = 3  # of so many windows, one has a request held back to see whether somebody else uses the key
LATER = 0.5  # of a period, by which that request is held back
HELD = 0.06  # seconds by which the last requests of a quick burst are held back to see how it is counted


class Probe:
    """The burst under way of one key: the requests since a window was over."""

    def __init__(self, server: Server) -> None:
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
