"""The layers between the client and the network; each is an ``httpx.AsyncBaseTransport``.

A request passes ``RetryTransport``, then ``RateLimitTransport``, then the wire, which is a
``PooledTransport`` unless another was given. Each fits any ``httpx.AsyncClient``.
"""

from lemcal_async.transport._limit import RateLimitTransport
from lemcal_async.transport._pooled import PooledTransport
from lemcal_async.transport._retry import RetryTransport

__all__ = ["PooledTransport", "RateLimitTransport", "RetryTransport"]
