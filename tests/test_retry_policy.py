"""When a request is tried again: the rules as a table of method, outcome and attempt."""

import math
from typing import Any

import pytest
from hypothesis import given, strategies as st

from lemcal_async._headers import Quota
from lemcal_async._retry import (
    FailedAttempt,
    RetryPolicy,
    backoff,
    is_refusal,
    wait_after_failure,
    wait_after_response,
)
from lemcal_async.errors import ConfigurationError

METHODS = ["GET", "DELETE", "POST", "PUT", "PATCH"]
REPEATABLE = ["GET", "DELETE"]
BACKOFF = {
    1: (0.25, 0.5),
    2: (0.5, 1.0),
    3: (1.0, 2.0),
    4: (2.0, 4.0),
}  # the defaults: half of each is random


def is_backoff(wait: float | None, attempt: int) -> bool:
    """Whether ``wait`` is in the range of the default backoff after this attempt."""
    least, most = BACKOFF[attempt]
    return wait is not None and least <= wait <= most


def own(retry_after: float | None) -> Quota:
    """Return the quota of a response from the service itself."""
    return Quota(limit=20, remaining=0, retry_after=retry_after)


def of_proxy(retry_after: float | None) -> Quota:
    """Return the quota of a response from a proxy."""
    return Quota(retry_after=retry_after)


# ----------------------------------------------------------------------------------- responses
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("retry_after", [0.0, 0.039, 1.283, 60.0])
def test_429_by_retry_after(method: str, retry_after: float) -> None:
    """A refused request was not processed: every method is retried after exactly ``Retry-After``."""
    for attempt in BACKOFF:
        assert retry_after == wait_after_response(RetryPolicy(), method, 429, own(retry_after), attempt)


@pytest.mark.parametrize("method", METHODS)
def test_429_without_retry_after(method: str) -> None:
    """The policy backs off."""
    for attempt in BACKOFF:
        assert is_backoff(wait_after_response(RetryPolicy(), method, 429, own(None), attempt), attempt)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("retry_after", [None, 0.0, 0.039])
def test_503_backs_off(method: str, retry_after: float | None) -> None:
    """Retry-After is only the rest of the window, so the backoff applies if it is longer."""
    for attempt in BACKOFF:
        assert is_backoff(wait_after_response(RetryPolicy(), method, 503, own(retry_after), attempt), attempt)


@pytest.mark.parametrize("method", METHODS)
def test_503_with_a_large_retry_after(method: str) -> None:
    """The longer of Retry-After and the backoff applies."""
    assert 9.5 == wait_after_response(RetryPolicy(), method, 503, own(9.5), 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("retry_after", [None, 0.0, 9.5])
def test_503_from_a_proxy(method: str, retry_after: float | None) -> None:
    """The service may still process a request that the proxy gave up on: only GET and DELETE are retried."""
    wait = wait_after_response(RetryPolicy(), method, 503, of_proxy(retry_after), 1)
    assert (method in REPEATABLE) == (wait is not None)


@pytest.mark.parametrize(
    ("status_code", "quota", "refused"),
    [
        (429, own(1.0), True),
        (429, of_proxy(None), True),
        (401, Quota(), True),
        (503, own(None), True),
        (503, of_proxy(2.0), False),
        (503, Quota(limit=20), False),
        (500, own(1.0), False),
        (404, own(1.0), False),
    ],
)
def test_refusals(status_code: int, quota: Quota, *, refused: bool) -> None:
    """A refusal means that the request was not processed."""
    assert refused == is_refusal(status_code, quota)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("status_code", [429, 503])
def test_retry_after_above_max_wait(method: str, status_code: int) -> None:
    """If Retry-After exceeds ``max_wait``, there is no retry."""
    assert wait_after_response(RetryPolicy(), method, status_code, own(60.001), 1) is None
    assert 60.001 == wait_after_response(RetryPolicy(max_wait=61), method, status_code, own(60.001), 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("status_code", [500, 501, 502, 504, 520, 599])
def test_5xx(method: str, status_code: int) -> None:
    """After a server error, only idempotent requests are retried."""
    for attempt in BACKOFF:
        wait = wait_after_response(RetryPolicy(), method, status_code, own(1.9), attempt)
        assert is_backoff(wait, attempt) if method in REPEATABLE else wait is None


@pytest.mark.parametrize("method", METHODS)
def test_final_responses(method: str) -> None:
    """Other responses are final, even though this service sends Retry-After with all of them."""
    for status_code in set(range(200, 500)) - {429}:
        assert wait_after_response(RetryPolicy(), method, status_code, own(0.5), 1) is None


# ------------------------------------------------------------------------------------ failures
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("failure", "repeatable"), [("unsent", METHODS), ("broken", REPEATABLE), ("fatal", [])]
)
def test_failures(method: str, failure: FailedAttempt, repeatable: list[str]) -> None:
    """Unsent requests are always retried, broken ones if idempotent, and fatal errors never."""
    for attempt in BACKOFF:
        wait = wait_after_failure(RetryPolicy(), method, failure, attempt)
        assert is_backoff(wait, attempt) if method in repeatable else wait is None


# ------------------------------------------------------------------------------------ attempts
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("attempts", [1, 2, 5])
def test_attempts_include_the_first(method: str, attempts: int) -> None:
    """``attempts=1`` means no retries."""
    policy = RetryPolicy(attempts=attempts)
    for attempt in range(1, 8):
        again = attempt < attempts
        assert again == (wait_after_response(policy, method, 429, own(1.0), attempt) is not None)
        assert again == (wait_after_response(policy, method, 503, own(1.0), attempt) is not None)
        assert again == (wait_after_failure(policy, method, "unsent", attempt) is not None)


def test_the_defaults() -> None:
    """Five attempts, and waits of up to a minute."""
    assert RetryPolicy(attempts=5, max_wait=60.0, backoff=0.5, backoff_max=8.0) == RetryPolicy()


# ------------------------------------------------------------------------------------- backoff
@given(st.integers(1, 33), st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1e6))
def test_backoff_bounds(attempt: int, first: float, second: float, max_wait: float) -> None:
    """The backoff doubles up to its maximum, is at least half of that, and never exceeds ``max_wait``."""
    base, backoff_max = sorted([first, second])
    policy = RetryPolicy(attempts=50, backoff=base, backoff_max=backoff_max, max_wait=max_wait)
    full = min(base * 2.0 ** (attempt - 1), backoff_max, max_wait)
    wait = wait_after_failure(policy, "POST", "unsent", attempt)
    assert wait is not None
    assert full / 2 <= wait <= full


def test_backoff_is_random() -> None:
    """Clients that failed at the same time do not retry at the same time."""
    policy = RetryPolicy()
    assert 0.25 == backoff(policy, 1, draw=lambda: 0.0)
    assert 0.375 == backoff(policy, 1, draw=lambda: 0.5)
    assert len({wait_after_failure(policy, "GET", "unsent", 1) for _ in range(50)}) > 1


def test_backoff_of_a_late_attempt_does_not_overflow() -> None:
    """The exponent is limited."""
    policy = RetryPolicy(attempts=1_000_000)
    wait = wait_after_failure(policy, "GET", "unsent", 999_999)
    assert wait is not None
    assert 4.0 <= wait <= 8.0


# ----------------------------------------------------------------------------- invalid arguments
@pytest.mark.parametrize("attempts", [0, -1, "3", 2.5, True, None])
def test_invalid_attempts(attempts: Any) -> None:
    """At least one attempt is required."""
    with pytest.raises(ConfigurationError, match=rf"attempts={attempts!r}\): must be at least 1"):
        RetryPolicy(attempts=attempts)


@pytest.mark.parametrize("name", ["max_wait", "backoff", "backoff_max"])
@pytest.mark.parametrize("value", [-0.001, math.nan, -math.inf, "x", True, None])
def test_invalid_seconds(name: str, value: object) -> None:
    """Waits are numbers of seconds; the message names the argument."""
    with pytest.raises(ConfigurationError, match=f"{name}={value!r}.*0 or more"):
        RetryPolicy(**{name: value})  # type: ignore[arg-type]  # one of the three


def test_backoff_above_its_maximum() -> None:
    """The first wait would silently be the maximum instead."""
    with pytest.raises(ConfigurationError, match=r"backoff=10\): must be at most backoff_max \(8\.0\)"):
        RetryPolicy(backoff=10)
