"""The limiter of several processes and machines: their shared budgets are in Redis.

``limiter`` is what users see, ``serving`` the task of each key, ``account`` one key's calls. What is
asked and what follows is worked out by ``script``, ``budget`` and ``leases``; ``link`` is the connection.
"""

from lemcal_async.ratelimit.redis._limiter import RedisRateLimiter

__all__ = ["RedisRateLimiter"]
