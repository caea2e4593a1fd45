"""The service's rate limit, per key, in fixed windows. Pure.

Implements the counting and the headers; the time comes from an injected clock. That the real service uses
fixed windows is inferred from its headers, so this module also has a strict sliding log: a client must be
correct with both.
"""

import abc
import math
import threading
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone
from typing import Final, Literal, TypeVar

import attrs

WindowKind = Literal["fixed", "sliding"]
"""How the sandbox counts requests."""

_T = TypeVar("_T")

# The zone of the documented example, used all year.
_SERVER_ZONE: Final = timezone(timedelta(hours=1), "GMT+0100 (Central European Standard Time)")


@attrs.frozen
class Count:
    """The result of counting a request that arrived ``at``; ``resets_in`` is in seconds."""

    at: float
    allowed: bool
    limit: int
    remaining: int
    resets_in: float


class Counter(abc.ABC):
    """Counts requests per key. Thread-safe; drops keys whose requests no longer count."""

    def __init__(self, limit: int, period: float, clock: Callable[[], float]) -> None:
        self._limit = limit
        self._period = period
        self._clock = clock
        self._lock = threading.Lock()

    def count(self, key: str) -> Count:
        """Count a request that arrives now."""
        with self._lock:
            now = self._clock()
            allowed, used, ends_at = self._count(key, now)
        return Count(
            at=now,
            allowed=allowed,
            limit=self._limit,
            remaining=max(self._limit - used, 0),
            resets_in=ends_at - now,
        )

    @abc.abstractmethod
    def _count(self, key: str, now: float) -> tuple[bool, int, float]:
        """Return whether the request is allowed, the number of requests that count, and when that resets."""


@attrs.define
class _Window:
    ends_at: float
    used: int = 0


class FixedWindow(Counter):
    """A window starts with a key's first request and always ends one period later."""

    def __init__(self, limit: int, period: float, clock: Callable[[], float]) -> None:
        super().__init__(limit, period, clock)
        self._windows: dict[str, _Window] = {}  # ordered by end

    def _count(self, key: str, now: float) -> tuple[bool, int, float]:
        for ended in _leading_keys(self._windows, lambda window: window.ends_at <= now):
            del self._windows[ended]
        window = self._windows.setdefault(key, _Window(ends_at=now + self._period))
        window.used += 1
        return window.used <= self._limit, window.used, window.ends_at


class SlidingLog(Counter):
    """Allows at most the limit in any period, wherever it starts. Refused requests do not count."""

    def __init__(self, limit: int, period: float, clock: Callable[[], float]) -> None:
        super().__init__(limit, period, clock)
        self._logs: dict[str, deque[float]] = {}  # ordered by latest request

    def _count(self, key: str, now: float) -> tuple[bool, int, float]:
        since = now - self._period
        log = self._logs.pop(key, None) or deque[float]()
        for idle in _leading_keys(self._logs, lambda other: other[-1] <= since):
            del self._logs[idle]
        while log and log[0] <= since:
            log.popleft()
        allowed = len(log) < self._limit
        if allowed:
            log.append(now)
        self._logs[key] = log
        return allowed, len(log), log[0] + self._period


def _leading_keys(entries: dict[str, _T], has_expired: Callable[[_T], bool]) -> list[str]:
    keys: list[str] = []
    for key, entry in entries.items():
        if not has_expired(entry):
            break
        keys.append(key)
    return keys


COUNTERS: Final[Mapping[WindowKind, type[Counter]]] = {"fixed": FixedWindow, "sliding": SlidingLog}


def rate_limit_headers(count: Count, wall_clock: float) -> dict[str, str]:
    """Return the rate limit headers of every response, including 200s (documented).

    ``Retry-After`` is milliseconds / 1000, hence fractional (inferred). It is rounded up, so that a client
    that waits this long is never early.
    """
    # Without rounding, floating-point errors would turn 2000 into 2001.
    milliseconds = math.ceil(round(count.resets_in * 1000, 4))
    return {
        "Retry-After": str(milliseconds / 1000).removesuffix(".0"),
        "X-RateLimit-Limit": str(count.limit),
        "X-RateLimit-Remaining": str(count.remaining),
        "X-RateLimit-Reset": javascript_date(wall_clock + count.resets_in),
    }


def javascript_date(timestamp: float) -> str:
    """Format a timestamp like JavaScript's ``String(date)``, truncated to whole seconds.

    >>> javascript_date(1613462562.9)
    'Tue Feb 16 2021 09:02:42 GMT+0100 (Central European Standard Time)'
    """
    moment = datetime.fromtimestamp(math.floor(timestamp), _SERVER_ZONE)
    weekday, month, *_ = moment.ctime().split()  # always in English; %a depends on the locale
    return f"{weekday} {month} {moment:%d %Y %H:%M:%S} {_SERVER_ZONE}"
