"""How the service counts requests: so many per period and key, in fixed windows. Pure.

Knows the arithmetic and the form of the headers, and takes the time from the clock it is given. The
real service's fixed window is inferred from its headers, so a strict sliding log is here too: a client
must be safe under both.
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

_T = TypeVar("_T")

# The documented example shows this zone, whatever the season.
_SERVER_ZONE: Final = timezone(timedelta(hours=1), "GMT+0100 (Central European Standard Time)")


@attrs.frozen
class Count:
    """What the counter says to one request that arrived ``at``; ``resets_in`` is in seconds."""

    at: float
    allowed: bool
    limit: int
    remaining: int
    resets_in: float


class Counter(abc.ABC):
    """Counts arrivals per key; thread-safe. Keys of which nothing is left to remember are dropped."""

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
        """Return whether the arrival is within the limit, how many count now, and until when."""


@attrs.define
class _Window:
    ends: float
    used: int = 0


class FixedWindow(Counter):
    """A window starts at a key's first request, and nothing but time ends or extends it."""

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
    """Never more than the limit in any period, wherever it starts; a refused request does not count."""

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
    """Return the headers that every answer carries, 200s too (documented).

    ``Retry-After`` is in milliseconds / 1000, hence fractional (inferred). They are rounded up: who
    waits for as long as the header says is never early.
    """
    milliseconds = math.ceil(round(count.resets_in * 1000, 4))  # without what floats add to 2000
    return {
        "Retry-After": str(milliseconds / 1000).removesuffix(".0"),
        "X-RateLimit-Limit": str(count.limit),
        "X-RateLimit-Remaining": str(count.remaining),
        "X-RateLimit-Reset": javascript_date(wall_clock + count.resets_in),
    }


def javascript_date(timestamp: float) -> str:
    """Return the moment as JavaScript's ``String(date)`` puts it, cut to whole seconds.

    >>> javascript_date(1613462562.9)
    'Tue Feb 16 2021 09:02:42 GMT+0100 (Central European Standard Time)'
    """
    moment = datetime.fromtimestamp(math.floor(timestamp), _SERVER_ZONE)
    weekday, month, *_ = moment.ctime().split()  # in English whatever the locale, which %a is not
    return f"{weekday} {month} {moment:%d %Y %H:%M:%S} {_SERVER_ZONE}"
