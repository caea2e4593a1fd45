"""When a request is tried again, and after how long. Pure rules; the loop is the transport's.

What makes the difference is whether the server may have acted on the attempt: a refusal and a
connection that never stood are safe to repeat, a broken answer to a POST is not.
"""

import random
from collections.abc import Callable
from typing import Literal

import attrs

from lemcal_async.errors import ConfigurationError

Failure = Literal["unsent", "broken", "fatal"]
"""How an attempt without an answer ended: before anything was sent, after that, or for good."""

REPEATABLE = frozenset({"GET", "DELETE"})


@attrs.frozen(kw_only=True)
class RetryPolicy:
    """How often and how patiently a call is tried; all times in seconds.

    ``attempts`` counts the first one too, so 1 means no retries. A ``Retry-After`` above
    ``max_wait`` is not waited for: it raises at once, with the value on the error. Without one,
    waits double from ``backoff`` up to ``backoff_max``, half of each at random.
    """

    attempts: int = 5
    max_wait: float = 60.0
    backoff: float = 0.5
    backoff_max: float = 8.0

    def __attrs_post_init__(self) -> None:
        if not self.attempts >= 1:
            raise ConfigurationError(
                f"RetryPolicy(attempts={self.attempts!r}): at least 1, the first one counts"
            )
        for name in ("max_wait", "backoff", "backoff_max"):
            if not getattr(self, name) >= 0:
                raise ConfigurationError(
                    f"RetryPolicy({name}={getattr(self, name)!r}): it must be seconds, 0 or more"
                )

    def wait_after_answer(
        self, method: str, status_code: int, retry_after: float | None, attempt: int
    ) -> float | None:
        """Return the seconds to wait before trying again, None if this answer is to stand."""
        if attempt >= self.attempts:
            return None
        if status_code == 429:
            wait = self._backoff(attempt) if retry_after is None else retry_after
        elif status_code == 503:
            # Every answer of this service carries Retry-After: it is the rest of the window, not
            # a promise to be back by then.
            wait = max(retry_after or 0.0, self._backoff(attempt))
        elif status_code >= 500 and method in REPEATABLE:
            wait = self._backoff(attempt)
        else:
            return None
        return wait if wait <= self.max_wait else None

    def wait_after_failure(self, method: str, failure: Failure, attempt: int) -> float | None:
        """Return the seconds to wait before trying again, None if the failure is to stand."""
        if attempt >= self.attempts or failure == "fatal":
            return None
        if failure == "broken" and method not in REPEATABLE:
            return None
        return self._backoff(attempt)

    def _backoff(self, attempt: int, draw: Callable[[], float] = random.random) -> float:
        full = min(self.backoff_max, self.backoff * 2.0 ** min(attempt - 1, 32), self.max_wait)
        return full * (1 + draw()) / 2
