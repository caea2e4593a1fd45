"""Checks of the arguments that users pass."""

import math
import re
from numbers import Integral, Real
from typing import Any, TypeGuard

from lemcal_async.errors import ConfigurationError


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a number, other than a bool; it may be infinite or NaN."""
    return not isinstance(value, bool) and isinstance(value, Real)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an integer, other than a bool."""
    return not isinstance(value, bool) and isinstance(value, Integral)


def is_seconds(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number above 0."""
    return is_number(value) and 0 < value < math.inf


def is_email(value: str) -> bool:
    """Whether a text looks like an e-mail address without a name."""
    return re.fullmatch(r"[^@\s<>]+@[^@\s<>]+", value) is not None


def check_type(name: str, value: object, kind: type[Any]) -> None:
    """Raise ConfigurationError unless a value is None, or an instance of a class or protocol."""
    # A class itself passes isinstance() with a protocol, because it has the methods of its instances.
    if value is None or (isinstance(value, kind) and not isinstance(value, type)):
        return
    detail = ""
    if getattr(kind, "_is_protocol", False):
        methods = [name for name in vars(kind) if not name.startswith("_")]
        missing = [f"{name}()" for name in methods if not hasattr(value, name)]
        detail = f": it has no {' and no '.join(missing)}" if 0 < len(missing) < len(methods) else ""
    raise ConfigurationError(f"{name}= must be of type {kind.__name__}, not {type(value).__name__}{detail}")
