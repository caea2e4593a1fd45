"""The rate limiter of several processes and machines, whose budgets are in Redis.

``_limiter`` is what users see: the queue of the local limiter, with the slots of ``_budget`` behind it.
``_key`` is the task that gets them, ``_connection`` runs ``script.lua`` for it, and says what holds while
Redis is away.
"""

from lemcal_async.ratelimit.redis._limiter import RedisRateLimiter

__all__ = ["RedisRateLimiter"]
