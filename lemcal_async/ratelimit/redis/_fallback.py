"""What holds while Redis is away, and when to try it again. Pure."""

import math
from typing import Literal

WhenDown = Literal["share", "raise", "open"]

FALLBACK_POLICIES: dict[WhenDown, str] = {
    "share": "this process keeps to its share of the limit",
    "raise": "calls fail",
    "open": "nothing is limited",
}
FIRST_DELAY = 0.25  # seconds until the first new attempt
LAST_DELAY = 1.0  # all processes notice within so many seconds that Redis is back
UNKNOWN_SHARE = 0.25  # of the limit, for a process that does not know how many there are
REMEMBERED = 60.0  # seconds for which another process counts as running


class CircuitBreaker:
    """Closed while Redis answers. Open ``since`` then, only one task tries again, every ``delay`` seconds."""

    def __init__(self) -> None:
        self.is_open = False
        self.delay = FIRST_DELAY
        self.since = -math.inf
        self.reason = ""

    def failed(self, reason: str, now: float) -> bool:
        """Note a failure; return whether it is the first."""
        if self.is_open:
            self.delay = min(2 * self.delay, LAST_DELAY)
            return False
        self.is_open, self.delay, self.since, self.reason = True, FIRST_DELAY, now, reason
        return True


class FallbackPolicy:
    """What to do without Redis. A ``share`` of None divides the limit by the processes seen lately."""

    def __init__(self, when_down: WhenDown, limit: int, share: float | None) -> None:
        self.when_down: WhenDown = when_down
        self._limit = limit
        self._share = share
        self._processes = 0
        self._seen_at = -math.inf

    def see(self, processes: int, now: float) -> None:
        """Note how many processes there are."""
        if processes >= self._processes or now - self._seen_at > REMEMBERED:
            self._processes, self._seen_at = processes, now

    @property
    def own_limit(self) -> int:
        """How many requests of a period this process may send alone."""
        share = self._share or (1 / self._processes if self._processes else UNKNOWN_SHARE)
        return max(1, int(self._limit * share + 1e-9))
