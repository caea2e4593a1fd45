"""The names that users rely on."""

import importlib
import pickle
import subprocess
import sys

import attrs
import pytest

import lemcal_async
from lemcal_async import errors, models

MODULES = {"errors", "events", "models", "ratelimit", "sync", "transport", "webhooks"}
CONTRACT = {"AsyncLemcal", "RetryPolicy", "to_wire", "from_wire"} | MODULES
MODELS = {
    "Answer",
    "Attendee",
    "Hook",
    "Lead",
    "Meeting",
    "MeetingLocation",
    "MeetingType",
    "Question",
    "RoundRobin",
    "RoundRobinUser",
    "User",
}


def test_all_is_sorted_and_complete() -> None:
    """``__all__`` lists the client, its types and errors, and the public modules."""
    expected = CONTRACT | MODELS | {*ERRORS} | {"APIResponse", "__version__"}
    assert sorted(expected) == lemcal_async.__all__


@pytest.mark.parametrize("name", lemcal_async.__all__)
def test_names_resolve(name: str) -> None:
    """Each name is the same object every time; a module's name is the module."""
    value = getattr(lemcal_async, name)
    assert value is getattr(lemcal_async, name)
    if name in MODULES:
        assert importlib.import_module(f"lemcal_async.{name}") is value
        assert lemcal_async.__getattr__(name) is value  # as before any other import
    elif name in MODELS:
        assert getattr(models, name) is value
        assert attrs.has(value)
    elif name in ERRORS:
        assert getattr(errors, name) is value
    else:
        assert isinstance(value, str) or callable(value)


def test_sandbox_is_not_listed() -> None:
    """The sandbox requires an extra, so a star import must not load it."""
    assert importlib.import_module("lemcal_async.sandbox") is lemcal_async.sandbox
    assert "sandbox" not in lemcal_async.__all__


@pytest.mark.parametrize("name", sorted(MODULES | {"sandbox"}))
def test_modules_are_attributes(name: str) -> None:
    """In a new interpreter, `import lemcal_async` is enough to use a module."""
    program = f"import lemcal_async; print(lemcal_async.{name}.__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert f"lemcal_async.{name}" == done.stdout.strip()


def test_dir() -> None:
    """``dir()`` lists the names in ``__all__``."""
    assert lemcal_async.__all__ == dir(lemcal_async)


def test_star_import() -> None:
    """Everything in __all__, and no more."""
    names: dict[str, object] = {}
    exec("from lemcal_async import *", names)
    del names["__builtins__"]
    assert lemcal_async.__all__ == sorted(names)


@pytest.mark.parametrize("name", ["Client", "_models", "meetings", "httpx"])
def test_an_unknown_name(name: str) -> None:
    """An AttributeError as of any module, so that hasattr works."""
    with pytest.raises(AttributeError, match=f"module 'lemcal_async' has no attribute '{name}'"):
        getattr(lemcal_async, name)
    with pytest.raises(ImportError, match=name):
        exec(f"from lemcal_async import {name}")


def test_version() -> None:
    """That of the distribution."""
    version = importlib.import_module("importlib.metadata").version("lemcal-async")
    assert version == lemcal_async.__version__


@pytest.mark.parametrize(
    "name", ["errors", "ratelimit", "transport", "models", "sandbox", "sync", "webhooks"]
)
def test_public_modules_have_their_documented_names(name: str) -> None:
    """Each public module has its documented names."""
    expected = {
        "ratelimit": {"LocalRateLimiter", "RateLimiter", "RedisRateLimiter", "Unlimited"},
        "transport": {"PooledTransport", "RateLimitTransport", "RetryTransport"},
        "models": MODELS,
        "sandbox": {"Sandbox", "faults"},
        "webhooks": {"WebhookReceiver", "Tenant", "Dedup", "InMemoryDedup"},
        "sync": {"MemoryStore", "SQLStore", "Wake", "sync_meetings", "watch"},
        "errors": set(ERRORS),
    }
    module = importlib.import_module(f"lemcal_async.{name}")
    assert expected[name] <= set(dir(module))
    assert expected[name] <= set(getattr(module, "__all__", expected[name]))


ERRORS: dict[str, tuple[type[Exception], ...]] = {
    "LemcalError": (Exception,),
    "ConfigurationError": (errors.LemcalError,),
    "APIConnectionError": (errors.LemcalError,),
    "APITimeoutError": (errors.APIConnectionError, TimeoutError),
    "DeadlineExceededError": (errors.LemcalError, TimeoutError),
    "APIStatusError": (errors.LemcalError,),
    "BadRequestError": (errors.APIStatusError,),
    "AuthenticationError": (errors.APIStatusError,),
    "PlanRequiredError": (errors.APIStatusError,),
    "PermissionDeniedError": (errors.APIStatusError,),
    "NotFoundError": (errors.APIStatusError,),
    "MeetingTypeNotFoundError": (errors.NotFoundError,),
    "HookNotFoundError": (errors.NotFoundError,),
    "MeetingNotFoundError": (errors.NotFoundError,),
    "MethodNotAllowedError": (errors.APIStatusError,),
    "ConflictError": (errors.APIStatusError,),
    "DuplicateHookError": (errors.ConflictError,),
    "RateLimitError": (errors.APIStatusError,),
    "ServerError": (errors.APIStatusError,),
    "ResponseDecodeError": (errors.LemcalError,),
    "StoreError": (errors.LemcalError,),
    "EmptyListError": (errors.StoreError,),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_classes(name: str) -> None:
    """Each error has the documented base classes, and can be created from just a message."""
    kind = getattr(errors, name)
    assert ERRORS[name] == kind.__bases__
    error = kind("what happened")
    assert ("what happened", None, None, None, 0, 0.0) == (
        str(error),
        error.method,
        error.route,
        error.server_message,
        error.attempts,
        error.waited,
    )
    copy = pickle.loads(pickle.dumps(error))
    assert (kind, str(error), vars(error)) == (type(copy), str(copy), vars(copy))


def test_default_status_codes() -> None:
    """An error created from just a message has its class's status code."""
    assert (400, 404, 409, 429, 500) == (
        errors.BadRequestError("x").status_code,
        errors.MeetingNotFoundError("x").status_code,
        errors.DuplicateHookError("x").status_code,
        errors.RateLimitError("x").status_code,
        errors.ServerError("x").status_code,
    )
    assert (503, None) == (errors.ServerError(status_code=503).status_code, errors.LemcalError().status_code)


def test_all_error_classes_are_documented() -> None:
    """There are no undocumented error classes."""
    found = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert set(ERRORS) == found
    assert sorted({*ERRORS, "BadRow", "CallInfo"}) == errors.__all__


def test_names_in_sync() -> None:
    """All names resolve, including the one that requires a database; unknown names are an AttributeError."""
    sync = importlib.import_module("lemcal_async.sync")
    assert sorted(sync.__all__) == sync.__all__ == dir(sync)
    assert all(getattr(sync, name) is getattr(sync, name) for name in sync.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Sync'"):
        _ = sync.Sync
