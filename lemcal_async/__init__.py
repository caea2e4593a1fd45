"""The async Python SDK for lemcal, the booking calendar.

``AsyncLemcal`` is the client; the models are what it returns, ``errors`` what it raises. Names are
loaded when they are first used: the pytest plugin and ``lemcal --version`` need none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lemcal_async._version import __version__

if TYPE_CHECKING:
    from lemcal_async import errors, ratelimit, transport
    from lemcal_async._client import APIResponse, AsyncLemcal
    from lemcal_async._codec import from_wire, to_wire
    from lemcal_async._retry import RetryPolicy
    from lemcal_async.models import (
        Answer,
        Attendee,
        Hook,
        Lead,
        Meeting,
        MeetingLocation,
        MeetingType,
        Question,
        RoundRobin,
        RoundRobinUser,
        User,
    )

__all__ = [
    "APIResponse",
    "Answer",
    "AsyncLemcal",
    "Attendee",
    "Hook",
    "Lead",
    "Meeting",
    "MeetingLocation",
    "MeetingType",
    "Question",
    "RetryPolicy",
    "RoundRobin",
    "RoundRobinUser",
    "User",
    "__version__",
    "errors",
    "from_wire",
    "ratelimit",
    "to_wire",
    "transport",
]

_MODULES = ("errors", "ratelimit", "transport")
_HOMES = {
    "APIResponse": "_client",
    "AsyncLemcal": "_client",
    "RetryPolicy": "_retry",
    "from_wire": "_codec",
    "to_wire": "_codec",
}  # everything else is a model


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'models')}"), name)
    globals()[name] = value  # found there from now on
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
