"""The layers between the client and the network, each an ``httpx.AsyncBaseTransport``.

A request goes through ``RetryTransport``, then ``RateLimitTransport``, then the transport that sends it: a
``PooledTransport``, unless another was passed in. Each layer fits any ``httpx.AsyncClient``.
"""

from lemcal_async.transport._layers import RateLimitTransport, RetryTransport
from lemcal_async.transport._pooled import PooledTransport

__all__ = ["PooledTransport", "RateLimitTransport", "RetryTransport"]
