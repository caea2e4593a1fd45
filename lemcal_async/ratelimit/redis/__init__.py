"""The rate limiter for several processes and machines, with budgets in Redis.

``_limiter`` has the public class: the queues of the local limiter, backed by the slots of ``_budget``. The
task in ``_key`` gets these slots from ``script.lua``, through ``_connection``, which also has the policies
while Redis is unreachable.
"""

from lemcal_async.ratelimit.redis._limiter import RedisRateLimiter

__all__ = ["RedisRateLimiter"]
