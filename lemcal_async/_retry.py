"""When a request is tried again, and after how long. Pure rules; the loop is the transport's.

What decides is whether the server may have acted on the attempt. A refusal, and a connection that was
never made, are safe to repeat; a broken answer to a POST is not.
"""

import random
from collections.abc import Callable
from typing import Literal

import attrs

from lemcal_async._headers import Quota
from lemcal_async.errors import ConfigurationError

Failure = Literal["unsent", "broken", "fatal"]
"""How an attempt without an answer ended: provably before anything was sent, later, or for good."""

REPEATABLE = frozenset({"GET", "DELETE"})


@attrs.frozen(kw_only=True)
class RetryPolicy:
    """How often and how patiently a call is tried. All times are in seconds.

    Attributes:
        attempts: How often a request is sent at most, counting the first time: 1 means no retries.
        max_wait: The longest ``Retry-After`` that is waited for. For a longer one the call raises at once,
            with the value on the error.
        backoff: The first wait where the server names none; waits double from there, half of each at random.
        backoff_max: The longest of those waits.

    Raises:
        ConfigurationError: For values that cannot work.
    """

    attempts: int = 5
    max_wait: float = 60.0
    backoff: float = 0.5
    backoff_max: float = 8.0

    def __attrs_post_init__(self) -> None:
        if not self.attempts >= 1:
            raise ConfigurationError(
                f"RetryPolicy(attempts={self.attempts!r}): must be at least 1, for the first one counts"
            )
        for name in ("max_wait", "backoff", "backoff_max"):
            if not getattr(self, name) >= 0:
                raise ConfigurationError(
                    f"RetryPolicy({name}={getattr(self, name)!r}): must be seconds, 0 or more"
                )


def is_refusal(status_code: int, quota: Quota) -> bool:
    """Whether an answer says that the request was not carried out.

    A 503 says so only with the service's own headers. One without them comes from a proxy, which may
    have given up on a request that the service went on to carry out.
    """
    return status_code in (401, 429) or (status_code == 503 and quota.is_from_service)


def wait_after_answer(
    policy: RetryPolicy, method: str, status_code: int, quota: Quota, attempt: int
) -> float | None:
    """Return the seconds to wait before trying again, None if this answer is to stand."""
    if attempt >= policy.attempts:
        return None
    if status_code == 429:
        wait = backoff(policy, attempt) if quota.retry_after is None else quota.retry_after
    elif status_code == 503 and (method in REPEATABLE or is_refusal(status_code, quota)):
        # Every answer of this service carries Retry-After: it is the rest of the window, not a
        # promise to be back by then.
        wait = max(quota.retry_after or 0.0, backoff(policy, attempt))
    elif status_code >= 500 and method in REPEATABLE:
        wait = backoff(policy, attempt)
    else:
        return None
    return wait if wait <= policy.max_wait else None


def wait_after_failure(policy: RetryPolicy, method: str, failure: Failure, attempt: int) -> float | None:
    """Return the seconds to wait before trying again, None if the failure is to stand."""
    if attempt >= policy.attempts or failure == "fatal":
        return None
    if failure == "broken" and method not in REPEATABLE:
        return None
    return backoff(policy, attempt)


def backoff(policy: RetryPolicy, attempt: int, draw: Callable[[], float] = random.random) -> float:
    """Return the seconds to wait after so many attempts, if the server does not say how long."""
    full = min(policy.backoff_max, policy.backoff * 2.0 ** min(attempt - 1, 32), policy.max_wait)
    return full * (1 + draw()) / 2
