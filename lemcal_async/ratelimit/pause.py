"""How long nobody sends with a key that the server has refused. Pure; seconds on the caller's clock."""

import math

from lemcal_async.headers import Quota
from lemcal_async.ratelimit.past import MARGIN

PAUSE_CAP = 60.0  # seconds; a longer order to wait is an error for the caller, not a sleep


class Pause:
    """The pause of one key, ``until`` a moment of the past while there is none.

    An order to wait for longer than ``PAUSE_CAP`` holds the key for that only: then requests may find out
    whether it still stands, and what they are told replaces it. Until then callers are refused.
    """

    def __init__(self) -> None:
        self.until = -math.inf
        self.refused_until = -math.inf

    def order(self, now: float, seconds: float) -> None:
        """Take in a 429. A second one with a shorter wait never shortens the pause."""
        if self.until <= now:
            self.refused_until = -math.inf
        self.until = max(self.until, now + min(seconds, PAUSE_CAP) + MARGIN)
        if seconds > PAUSE_CAP:
            self.refused_until = max(self.refused_until, now + seconds)

    def left(self, now: float) -> float:
        """Return the seconds for which nobody sends."""
        return max(0.0, self.until - now)

    def refused_for(self, now: float) -> float:
        """Return the seconds of an order to wait that is too long to be slept through, else 0."""
        return max(0.0, self.refused_until - now) if self.until > now else 0.0


def hold_after_429(quota: Quota, period: float) -> float:
    """Return the seconds to hold a key after a 429; without a usable header, a whole window."""
    return period if quota.retry_after is None else quota.retry_after
