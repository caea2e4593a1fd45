"""The async Python SDK for lemcal, the booking calendar.

``AsyncLemcal`` is the client; it returns the models and raises the errors. Names are imported on first use,
because the pytest plugin and ``lemcal --version`` need none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lemcal_async._version import __version__

if TYPE_CHECKING:
    from lemcal_async import (
        errors,
        events,
        models,
        ratelimit,
        sandbox as sandbox,
        sync,
        transport,
        webhooks,
    )
    from lemcal_async._client import APIResponse, AsyncLemcal
    from lemcal_async._codec import from_wire, to_wire
    from lemcal_async._retry import RetryPolicy
    from lemcal_async.errors import (
        APIConnectionError,
        APIStatusError,
        APITimeoutError,
        AuthenticationError,
        BadRequestError,
        ConfigurationError,
        ConflictError,
        DeadlineExceededError,
        DuplicateHookError,
        EmptyListError,
        HookNotFoundError,
        LemcalError,
        MeetingNotFoundError,
        MeetingTypeNotFoundError,
        MethodNotAllowedError,
        NotFoundError,
        PermissionDeniedError,
        PlanRequiredError,
        RateLimitError,
        ResponseDecodeError,
        ServerError,
        StoreError,
    )
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
    "APIConnectionError",
    "APIResponse",
    "APIStatusError",
    "APITimeoutError",
    "Answer",
    "AsyncLemcal",
    "Attendee",
    "AuthenticationError",
    "BadRequestError",
    "ConfigurationError",
    "ConflictError",
    "DeadlineExceededError",
    "DuplicateHookError",
    "EmptyListError",
    "Hook",
    "HookNotFoundError",
    "Lead",
    "LemcalError",
    "Meeting",
    "MeetingLocation",
    "MeetingNotFoundError",
    "MeetingType",
    "MeetingTypeNotFoundError",
    "MethodNotAllowedError",
    "NotFoundError",
    "PermissionDeniedError",
    "PlanRequiredError",
    "Question",
    "RateLimitError",
    "ResponseDecodeError",
    "RetryPolicy",
    "RoundRobin",
    "RoundRobinUser",
    "ServerError",
    "StoreError",
    "User",
    "__version__",
    "errors",
    "events",
    "from_wire",
    "models",
    "ratelimit",
    "sync",
    "to_wire",
    "transport",
    "webhooks",
]

_MODULES = {"errors", "events", "models", "ratelimit", "sandbox", "sync", "transport", "webhooks"}
_HOMES = {
    "APIResponse": "_client",
    "AsyncLemcal": "_client",
    "RetryPolicy": "_retry",
    "from_wire": "_codec",
    "to_wire": "_codec",
}  # names ending in "Error" are in errors, all other names are models


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name) or ("errors" if name.endswith("Error") else "models")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value  # so that __getattr__ runs once per name
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
