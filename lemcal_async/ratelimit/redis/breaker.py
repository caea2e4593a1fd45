"""When to give up on a service that others share, and when to try it again. Pure."""

import math

FIRST_DELAY = 0.25  # seconds until the first new attempt
LAST_DELAY = 1.0  # all processes are to notice within so many seconds that it is back


class Breaker:
    """Closed while all is well. Open, nobody is to ask but one, every ``delay`` seconds.

    It is open since the moment ``since``, for ``reason``.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.delay = FIRST_DELAY
        self.since = -math.inf
        self.reason = ""

    def failed(self, reason: str, now: float) -> bool:
        """Note a failure; True if it is the first."""
        if self.is_open:
            self.delay = min(2 * self.delay, LAST_DELAY)
            return False
        self.is_open, self.delay, self.since, self.reason = True, FIRST_DELAY, now, reason
        return True

    def succeeded(self) -> bool:
        """Note a success; True if it is the first after failures."""
        news, self.is_open = self.is_open, False
        return news
