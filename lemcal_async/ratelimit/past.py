"""When the server counted one request of the past: bounds, from when it left and what its answer said.

Pure. The moment itself is never seen. What follows from it for the next request is the business of
``slots.py``; here is also what an answer proves of the other requests.
"""

from collections.abc import Iterable

import attrs

from lemcal_async.ratelimit.windows import Window

COUNTED_WITHIN = 0.5  # seconds after a request left in which the server must have counted it
MARGIN = 0.003  # seconds between a moment as computed and what is done then: scheduling, clock steps


@attrs.frozen(eq=False)
class Past:
    """One request of the past, as far as is known of when the server counted it."""

    counted_by: float
    heard_at: float  # inf: no answer came
    left_at: float
    surely: bool  # whether it was counted at all
    window: Window | None
    # What its answer said, if the window was not over when that came: then it was counted so long
    # before the window's end, which all the answers of the window pin together.
    before_end: float | None = None
    used: int | None = None  # how many requests the server counted then, this one included, if it told

    def counted_at_least(self) -> float:
        """Return the earliest time at which it can have been counted, as if its way there took no time."""
        if self.window is None or self.before_end is None:
            return self.left_at
        return max(self.left_at, self.window.earliest - self.before_end)

    def counted_at_most(self) -> float:
        """Return the latest time at which it can have been counted, as if its way back took no time."""
        return min(self.counted_by, self.answered_at_most())

    def answered_at_most(self) -> float:
        """Return the same as far as its answer tells, which is off by the way back."""
        if self.window is None or self.before_end is None:
            return self.heard_at
        return min(self.heard_at, self.window.latest - self.before_end)


def refutes_sliding(told_by: Past, others: Iterable[Past], period: float) -> bool:
    """Whether an answer speaks of fewer requests than a sliding log would have counted."""
    if not told_by.used:
        return False
    since, until = told_by.counted_at_most() - period, told_by.counted_at_least()
    counted = 1 + sum(
        past.surely and past.counted_at_least() > since and past.counted_at_most() < until for past in others
    )
    # By two, so that a count which leaves this request out proves nothing.
    return counted - told_by.used >= 2
