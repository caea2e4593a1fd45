"""How long a key pauses after the server has refused it (429). Pure; seconds on the caller's clock."""

import math

from lemcal_async._headers import Quota

MARGIN = 0.003  # seconds between a computed moment and what happens then: scheduling, clock steps
PAUSE_CAP = 60.0  # seconds; a longer Retry-After is an error for the caller, not a sleep


class Cooldown:
    """The pause of one key; ``until`` lies in the past while there is none.

    A Retry-After above ``PAUSE_CAP`` pauses the key for that long only. After that, a request may find
    out whether the refusal still stands, and its answer replaces what was known. Until then, callers
    are refused.
    """

    __slots__ = ("refused_until", "until")

    def __init__(self) -> None:
        self.until = -math.inf
        self.refused_until = -math.inf

    def extend(self, now: float, seconds: float) -> None:
        """Take in a 429. One with a shorter wait never shortens the pause."""
        if self.until <= now:
            self.refused_until = -math.inf
        self.until = max(self.until, now + min(seconds, PAUSE_CAP) + MARGIN)
        if seconds > PAUSE_CAP:
            self.refused_until = max(self.refused_until, now + seconds)

    def left(self, now: float) -> float:
        """Return how many seconds of the pause are left."""
        return max(0.0, self.until - now)

    def refused_for(self, now: float) -> float:
        """Return how long the server refuses the key if that is too long to wait for, else 0."""
        return max(0.0, self.refused_until - now) if self.until > now else 0.0


def pause_after_429(quota: Quota, period: float) -> float:
    """Return the seconds to pause a key after a 429: a whole period if no header tells."""
    return period if quota.retry_after is None else quota.retry_after
