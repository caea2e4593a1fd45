"""The service's rate limit: so many requests per period and key, in fixed windows. Pure.

Knows the arithmetic and the headers, and takes the time from an injected clock. That the real service uses
fixed windows is inferred from its headers, so there is a strict sliding log too: a client must be safe
under both.
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

# The documented example shows this zone, whatever the season.
_SERVER_ZONE: Final = timezone(timedelta(hours=1), "GMT+0100 (Central European Standard Time)")


@attrs.frozen
class Count:
    """The verdict on a request that arrived ``at``; ``resets_in`` is in seconds."""

    at: float
    allowed: bool
    limit: int
    remaining: int
    resets_in: float


class Counter(abc.ABC):
    """Counts arrivals per key. Thread-safe; forgets keys whose requests no longer count."""

    def __init__(self, limit: int, period: float, clock: Callable[[], float]) -> None:
        self._limit = limit
        self._period = period
        self._clock = clock
        self._lock = threading.Lock()

    def count(self, key: str) -> Count:
        """Count one arrival now."""
        with self._lock:
            now = self._clock()
            allowed, used, ends = self._arrive(key, now)
        return Count(
            at=now,
            allowed=allowed,
            limit=self._limit,
            remaining=max(self._limit - used, 0),
            resets_in=ends - now,
        )

    @abc.abstractmethod
    def _arrive(self, key: str, now: float) -> tuple[bool, int, float]:
        """Return whether the arrival is within the limit, how many requests count now, and until when."""


@attrs.define
class _Window:
    ends: float
    used: int = 0


class FixedWindow(Counter):
    """A window starts at a key's first request and ends one period later, whatever happens."""

    def __init__(self, limit: int, period: float, clock: Callable[[], float]) -> None:
        super().__init__(limit, period, clock)
        self._windows: dict[str, _Window] = {}  # in the order in which they end

    def _arrive(self, key: str, now: float) -> tuple[bool, int, float]:
        for ended in _leading(self._windows, lambda window: window.ends <= now):
            del self._windows[ended]
        window = self._windows.setdefault(key, _Window(ends=now + self._period))
        window.used += 1
        return window.used <= self._limit, window.used, window.ends


class SlidingLog(Counter):
    """Never more than the limit in any period, wherever it starts; refused requests do not count."""

    def __init__(self, limit: int, period: float, clock: Callable[[], float]) -> None:
        super().__init__(limit, period, clock)
        self._logs: dict[str, deque[float]] = {}  # in the order of the latest arrival

    def _arrive(self, key: str, now: float) -> tuple[bool, int, float]:
        since = now - self._period
        log = self._logs.pop(key, None) or deque[float]()
        for idle in _leading(self._logs, lambda other: other[-1] <= since):
            del self._logs[idle]
        while log and log[0] <= since:
            log.popleft()
        allowed = len(log) < self._limit
        if allowed:
            log.append(now)
        self._logs[key] = log
        return allowed, len(log), log[0] + self._period


def _leading(entries: dict[str, _T], is_over: Callable[[_T], bool]) -> list[str]:
    over: list[str] = []
    for key, entry in entries.items():
        if not is_over(entry):
            break
        over.append(key)
    return over


COUNTERS: Final[Mapping[WindowKind, type[Counter]]] = {"fixed": FixedWindow, "sliding": SlidingLog}


def rate_limit_headers(count: Count, wall_clock: float) -> dict[str, str]:
    """Return the headers that every response carries, including 200s (documented).

    ``Retry-After`` is milliseconds / 1000, hence fractional (inferred). It is rounded up, so that a client
    that waits that long is never early.
    """
    milliseconds = math.ceil(round(count.resets_in * 1000, 4))  # floats make 2000 a little more
    return {
        "Retry-After": str(milliseconds / 1000).removesuffix(".0"),
        "X-RateLimit-Limit": str(count.limit),
        "X-RateLimit-Remaining": str(count.remaining),
        "X-RateLimit-Reset": javascript_date(wall_clock + count.resets_in),
    }


def javascript_date(timestamp: float) -> str:
    """Return the moment in the form of JavaScript's ``String(date)``, truncated to whole seconds.

    >>> javascript_date(1613462562.9)
    'Tue Feb 16 2021 09:02:42 GMT+0100 (Central European Standard Time)'
    """
    moment = datetime.fromtimestamp(math.floor(timestamp), _SERVER_ZONE)
    weekday, month, *_ = moment.ctime().split()  # in English, unlike %a, in any locale
    return f"{weekday} {month} {moment:%d %Y %H:%M:%S} {_SERVER_ZONE}"
