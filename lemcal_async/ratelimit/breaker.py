"""When to give up on a service that others share, and when to try it again. Pure."""

FIRST_DELAY = 0.25  # seconds until the first new attempt
LAST_DELAY = 1.0  # all processes are to notice within so many seconds that it is back


class Breaker:
    """Closed while all is well. Open, nobody is to ask but one, every ``delay`` seconds."""

    def __init__(self) -> None:
        self.is_open = False
        self.delay = FIRST_DELAY

    def failed(self) -> bool:
        """Note a failure; True if it is the first."""
        news = not self.is_open
        self.delay = FIRST_DELAY if news else min(2 * self.delay, LAST_DELAY)
        self.is_open = True
        return news

    def succeeded(self) -> bool:
        """Note a success; True if it is the first after failures."""
        news, self.is_open = self.is_open, False
        return news
