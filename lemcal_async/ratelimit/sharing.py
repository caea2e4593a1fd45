"""How much of a key's budget is left to us when somebody else uses it too. Pure.

A limiter that fills every window to the brim starves the other integrations of its user, who then see
nothing but 429s. Strangers show in the answers: the server has counted more than we sent.
"""

import math


class Share:
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
