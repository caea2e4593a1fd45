"""The shared rate limiter: at most 20 requests in any 2 s per API key, as the server counts them.

``LocalRateLimiter`` serves one process (any number of clients, event loops and threads);
``Unlimited`` is for those behind a gateway that limits already.
"""

from lemcal_async.ratelimit.default import default_limiter, fresh_default
from lemcal_async.ratelimit.key import Key
from lemcal_async.ratelimit.local import LocalRateLimiter
from lemcal_async.ratelimit.protocol import Permit, Priority, RateLimit, RateLimiter, WouldWait
from lemcal_async.ratelimit.unlimited import Unlimited

__all__ = [
    "Key",
    "LocalRateLimiter",
    "Permit",
    "Priority",
    "RateLimit",
    "RateLimiter",
    "Unlimited",
    "WouldWait",
    "default_limiter",
    "fresh_default",
]
