"""The limiter that clients share unless they are given one: one for the whole process."""

from collections.abc import Generator
from contextlib import contextmanager

from lemcal_async.ratelimit.local import LocalRateLimiter

_default = LocalRateLimiter()


def default_limiter() -> LocalRateLimiter:
    """Return the process-wide limiter."""
    return _default


@contextmanager
def fresh_default() -> Generator[LocalRateLimiter]:
    """Replace the process-wide limiter by a new one for a while: for tests."""
    global _default  # noqa: PLW0603 - the point of it
    before, _default = _default, LocalRateLimiter()
    try:
        yield _default
    finally:
        _default = before
