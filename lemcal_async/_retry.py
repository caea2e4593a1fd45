"""Whether and when to retry a request. Pure rules; the retry loop is in the transport layer.

The decision depends on whether the server may have processed the attempt. After a refusal, or if the
connection was never opened, a retry is safe; after an interrupted response to a POST, it is not.
"""

import random
from collections.abc import Callable
from typing import Literal

import attrs

from lemcal_async._checks import is_number, is_whole
from lemcal_async._headers import Quota
from lemcal_async.errors import ConfigurationError

FailedAttempt = Literal["unsent", "broken", "fatal"]
"""Why an attempt got no response: provably nothing was sent, it failed later, or a retry cannot succeed."""

REPEATABLE = frozenset({"GET", "DELETE"})


@attrs.frozen(kw_only=True)
class RetryPolicy:
    """How failed calls are retried. All times are in seconds.

    Attributes:
        attempts: The maximum number of attempts, including the first: 1 disables retries.
        max_wait: The longest ``Retry-After`` to wait for. If the server asks for more, the call raises
            immediately; the error has the value.
        backoff: The first wait if the server specifies none. Waits double from there, and half of each is
            random.
        backoff_max: The longest such wait; at least ``backoff``.

    Raises:
        ConfigurationError: If a value is invalid.
    """

    attempts: int = 5
    max_wait: float = 60.0
    backoff: float = 0.5
    backoff_max: float = 8.0

    def __attrs_post_init__(self) -> None:
        if not (is_whole(self.attempts) and self.attempts >= 1):
            raise ConfigurationError(
                f"RetryPolicy(attempts={self.attempts!r}): must be at least 1, including the first attempt"
            )
        for name in ("max_wait", "backoff", "backoff_max"):
            value: object = getattr(self, name)
            if not (is_number(value) and value >= 0):
                raise ConfigurationError(
                    f"RetryPolicy({name}={value!r}): must be a number of seconds, 0 or more"
                )
        if self.backoff > self.backoff_max:
            raise ConfigurationError(
                f"RetryPolicy(backoff={self.backoff!r}): must be at most backoff_max ({self.backoff_max!r})"
            )


def is_refusal(status_code: int, quota: Quota) -> bool:
    """Whether a response means that the request was not processed.

    For a 503, this is true only if it has the service's own headers. Any other 503 comes from a proxy, which
    may have given up on a request that the service then processed.
    """
    return status_code in (401, 429) or (status_code == 503 and quota.is_from_service)


def wait_after_response(
    policy: RetryPolicy, method: str, status_code: int, quota: Quota, attempt: int
) -> float | None:
    """Return the seconds to wait before a retry; None if the response is final."""
    if attempt >= policy.attempts:
        return None
    if status_code == 429:
        wait = backoff(policy, attempt) if quota.retry_after is None else quota.retry_after
    elif status_code == 503 and (method in REPEATABLE or is_refusal(status_code, quota)):
        # Every response of this service has Retry-After. It is the rest of the window, not a promise to be
        # available by then.
        wait = max(quota.retry_after or 0.0, backoff(policy, attempt))
    elif status_code >= 500 and method in REPEATABLE:
        wait = backoff(policy, attempt)
    else:
        return None
    return wait if wait <= policy.max_wait else None


def wait_after_failure(
    policy: RetryPolicy, method: str, failure: FailedAttempt, attempt: int
) -> float | None:
    """Return the seconds to wait before a retry; None if the failure is final."""
    if attempt >= policy.attempts or failure == "fatal":
        return None
    if failure == "broken" and method not in REPEATABLE:
        return None
    return backoff(policy, attempt)


def backoff(policy: RetryPolicy, attempt: int, draw: Callable[[], float] = random.random) -> float:
    """Return the seconds to wait after ``attempt`` attempts if the server does not specify a time."""
    full = min(policy.backoff_max, policy.backoff * 2.0 ** min(attempt - 1, 32), policy.max_wait)
    return full * (1 + draw()) / 2
