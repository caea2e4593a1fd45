"""The shared rate limiter: at most 20 requests per 2 s for each API key, as the server counts them.

``LocalRateLimiter`` covers one process (any number of clients, event loops and threads),
``RedisRateLimiter`` (extra ``redis``) several processes and machines. ``Unlimited`` disables limiting, for
example behind a gateway that already limits. To write a custom limiter, implement ``RateLimiter``, and
``Permit`` for the object that its ``acquire`` returns.
"""

from typing import TYPE_CHECKING, Any

from lemcal_async._headers import Quota
from lemcal_async.ratelimit._base import Key, Permit, Priority, RateLimit, RateLimiter, Unlimited, WouldWait
from lemcal_async.ratelimit._local import LocalRateLimiter, default_limiter, fresh_default

if TYPE_CHECKING:
    from lemcal_async.ratelimit.redis import RedisRateLimiter

__all__ = [
    "Key",
    "LocalRateLimiter",
    "Permit",
    "Priority",
    "Quota",
    "RateLimit",
    "RateLimiter",
    "RedisRateLimiter",
    "Unlimited",
    "WouldWait",
    "default_limiter",
    "fresh_default",
]


def __getattr__(name: str) -> Any:
    if name == "RedisRateLimiter":
        from lemcal_async.ratelimit.redis import RedisRateLimiter  # noqa: PLC0415 - needs an extra

        return RedisRateLimiter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
