"""No limiting, for those behind a gateway that limits already."""

from lemcal_async.headers import Quota
from lemcal_async.ratelimit.key import Key
from lemcal_async.ratelimit.protocol import Permit, Priority, RateLimit


class _Free:
    """A permit that costs nothing; one serves all requests."""

    def sent(self) -> None:
        """Nothing is counted."""

    def answered(self, status_code: int, quota: Quota) -> float:  # noqa: ARG002
        """Hold nothing back: waiting after a 429 is left to the retries."""
        return 0.0

    def unsent(self) -> None:
        """Nothing is counted."""

    def unknown(self) -> None:
        """Nothing is counted."""


_FREE = _Free()
_SNAPSHOT = RateLimit(limit=None, remaining=None, resets_in=0.0, queued=0, paused_for=0.0)


class Unlimited:
    """A RateLimiter that lets everything pass at once. A 429 is then waited out by each call alone."""

    async def acquire(
        self,
        key: Key,  # noqa: ARG002
        *,
        priority: Priority = "interactive",  # noqa: ARG002
        timeout: float | None = None,  # noqa: ARG002, ASYNC109
        again: Permit | None = None,  # noqa: ARG002
    ) -> Permit:
        """Return at once."""
        return _FREE

    def snapshot(self, key: Key) -> RateLimit:  # noqa: ARG002
        """Return a snapshot that knows of no limit."""
        return _SNAPSHOT
