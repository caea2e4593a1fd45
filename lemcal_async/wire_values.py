"""How single values travel: strings, booleans, numbers and times, as hooks for the converter of ``codec.py``.

Reading is strict, because a value of the wrong type that slips through is found much later and far
away: nothing is coerced, except a number that came as a string.
"""

import math
import re
from datetime import datetime
from typing import Any

from lemcal_async.models import in_utc


class MismatchError(Exception):
    """Data that is not what a hook reads. It says where and which type came, never the value."""

    def __init__(self, expected: str, value: Any, *, path: str = "") -> None:
        super().__init__(f"expected {expected}, got {'null' if value is None else type(value).__name__}")
        self.path = path

    def inside(self, step: str) -> None:
        """Put a step before the path: the mismatch lies inside of that field or list item."""
        joint = "." if self.path and not self.path.startswith("[") else ""
        self.path = f"{step}{joint}{self.path}"

    def __str__(self) -> str:
        problem = super().__str__()
        return f"{self.path}: {problem}" if self.path else problem


def read_str(value: Any, _: Any) -> str:
    """Read a string."""
    if not isinstance(value, str):
        raise MismatchError("a string", value)
    return value


def read_bool(value: Any, _: Any) -> bool:
    """Read a boolean."""
    if not isinstance(value, bool):
        raise MismatchError("a boolean", value)
    return value


_is_json_number = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?").fullmatch


def _parsed(text: str) -> float | None:
    match = _is_json_number(text)
    if match is None:
        return None
    number = float(text)
    is_integer = match.lastindex is None and math.isfinite(number)  # int() has a limit on digits
    return int(text) if is_integer else number


def read_number(value: Any, _: Any) -> float:
    """Read a number, or a string that is one; an integer stays an int."""
    number = _parsed(value) if isinstance(value, str) else value
    if isinstance(number, int | float) and not isinstance(number, bool) and abs(number) < math.inf:
        return number
    raise MismatchError("a finite number", value)


# datetime.fromisoformat alone lets junk through: 08:02.5Z, half a minute, becomes half a second.
_is_iso_time = re.compile(
    r"[0-9]{4}-?[0-9]{2}-?[0-9]{2}T[0-9]{2}:?[0-9]{2}(?::?[0-9]{2}(?:[.,][0-9]+)?)?"
    r"(?:Z|[+-][0-9]{2}(?::?[0-5][0-9]){0,2})"
).fullmatch


def read_time(value: Any, _: Any) -> datetime:
    """Read an instant; digits after the microseconds are dropped."""
    time: datetime | None = None
    if isinstance(value, str) and _is_iso_time(value):
        try:
            time = in_utc(datetime.fromisoformat(value))
        except (ValueError, OverflowError):  # no such day or hour, or out of range once in UTC
            time = None
    if time is None:
        raise MismatchError("an ISO 8601 time with an offset", value)
    return time


def write_time(time: datetime) -> str:
    """Write an instant in UTC: milliseconds as the service does, microseconds where there are some."""
    precision = "microseconds" if time.microsecond % 1000 else "milliseconds"
    return time.replace(tzinfo=None).isoformat(timespec=precision) + "Z"
