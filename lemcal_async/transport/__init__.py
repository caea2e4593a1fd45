"""The layers between the client and the network, each an ``httpx.AsyncBaseTransport``.

A request passes through ``RetryTransport``, then ``RateLimitTransport``, then the transport that sends it, by
default a ``PooledTransport``. Each layer works in any ``httpx.AsyncClient``.
"""

from lemcal_async.transport._layers import RateLimitTransport, RetryTransport
from lemcal_async.transport._pooled import PooledTransport

__all__ = ["PooledTransport", "RateLimitTransport", "RetryTransport"]
