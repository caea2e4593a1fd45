"""Faults for ``Sandbox.inject``.

    sandbox.inject(faults.too_many_requests(retry_after="1.283"))
    sandbox.inject(faults.status(503), times=3, method="GET", path="/meetings")

The functions below create every kind of failure observed on lemcal or on its sibling product. Faults that
replace the response leave the sandbox's state unchanged; with ``slow``, ``truncated`` and
``reset_after_processing``, the sandbox processes the request first.

The functions raise TypeError for an argument of the wrong type, and ValueError for one that is out of range
or cannot be sent.
"""

import math
import threading
from collections.abc import Mapping
from fnmatch import fnmatchcase
from http import HTTPStatus
from typing import Any, Final, TypeAlias

import attrs

from lemcal_async._checks import is_number, is_whole
from lemcal_async.sandbox import _responses
from lemcal_async.sandbox._responses import SandboxResponse

__all__ = [
    "empty_200",
    "empty_string_200",
    "html_200",
    "html_error",
    "json",
    "json_error",
    "not_ok",
    "redirect",
    "reset_after_processing",
    "reset_before_processing",
    "slow",
    "status",
    "too_many_requests",
    "truncated",
    "unsuccessful",
]


@attrs.frozen
class Slow:
    """The response is delayed by ``seconds``."""

    seconds: float


@attrs.frozen
class Reset:
    """The connection is reset without a response, before or after the request is processed."""

    processed: bool


@attrs.frozen
class Truncated:
    """The response ends in the middle of its body."""


Fault: TypeAlias = SandboxResponse | Slow | Reset | Truncated
"""A fault for ``Sandbox.inject``, created by the functions of this module."""


def describe(fault: Fault) -> str:
    """Describe a fault in a few words."""
    match fault:
        case Slow(seconds):
            return f"slow by {seconds:g} s"
        case Reset(processed):
            return f"connection reset {'after' if processed else 'before'} processing"
        case Truncated():
            return "truncated body"
        case _:
            kind = (fault.content_type or "no content type").partition(";")[0] if fault.body else "empty"
            return f"{fault.status_code}, {kind}"


_RATE_LIMIT_HEADERS: Final = (
    "Retry-After",
    "X-RateLimit-Limit",
    "X-RateLimit-Remaining",
    "X-RateLimit-Reset",
)


def _check_seconds(name: str, seconds: object) -> float:
    if not is_number(seconds):
        raise TypeError(f"{name} must be a number of seconds, not {seconds!r}")
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{name} must be at least 0 seconds, not {seconds!r}")
    return seconds


def _check_text(name: str, text: object) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a string, not {text!r}")
    return text


def _check_code(code: object, first: int = 200, last: int = 599) -> int:
    if isinstance(code, float) and code.is_integer():  # a number in JSON
        code = int(code)
    if not is_whole(code):
        raise TypeError(f"code must be a whole number, not {code!r}")
    if not first <= code <= last:
        raise ValueError(f"code must be a status code from {first} to {last}, not {code}")
    return int(code)  # of an HTTPStatus


def _phrase(code: int) -> str:
    try:
        return HTTPStatus(code).phrase
    except ValueError:  # such as 520, which CDNs use
        return "Unknown Status"


def too_many_requests(retry_after: str | float | None = "0.2") -> Fault:
    """Respond with 429.

    Args:
        retry_after: The ``Retry-After`` header: a number of seconds, or a string that is sent verbatim; None
            omits it.
    """
    if retry_after is not None and not isinstance(retry_after, str):
        retry_after = str(_check_seconds("retry_after", retry_after))
    headers = {"Retry-After": retry_after, "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": None}
    return _responses.text(429, "Too Many Requests", headers)


def status(
    code: int,
    body: str | None = None,
    *,
    content_type: str | None = _responses.PLAIN,
    headers: Mapping[str, str | None] | None = None,
) -> Fault:
    """Respond with a status code.

    Args:
        code: The status code.
        body: The body. Defaults to the reason phrase of the status code.
        content_type: The ``Content-Type`` header; None omits it.
        headers: Headers that override those of every response; a value of None omits a header.
    """
    code = _check_code(code)
    if body is None:
        body = "" if code in _responses.BODYLESS else _phrase(code)
    return SandboxResponse(code, _check_text("body", body).encode(), content_type, headers or {})


def json_error(code: int, error: str, *, error_code: str | None = None) -> Fault:
    """Respond with ``{"error": …}``, or ``{"error": …, "code": …}`` if ``error_code`` is given.

    Args:
        code: The status code.
        error: The error message.
        error_code: The error code.
    """
    more = {} if error_code is None else {"code": _check_text("error_code", error_code)}
    return _responses.json_data(_check_code(code), {"error": _check_text("error", error)} | more)


def unsuccessful(code: int, error: str, *, error_code: str | None = None) -> Fault:
    """Respond with ``{"success": false, "error": …}``.

    Args:
        code: The status code.
        error: The error message.
        error_code: The error code. If given, ``"error"`` is ``{"code": …, "message": …}``.
    """
    _check_text("error", error)
    detail = (
        error if error_code is None else {"code": _check_text("error_code", error_code), "message": error}
    )
    return _responses.json_data(_check_code(code), {"success": False, "error": detail})


def not_ok(code: int, message: str) -> Fault:
    """Respond with ``{"ok": false, "message": …}``.

    Args:
        code: The status code.
        message: The error message.
    """
    return _responses.json_data(_check_code(code), {"ok": False, "message": _check_text("message", message)})


def html_error(code: int) -> Fault:
    """Respond with an HTML error page, as the CDN in front of the platform does.

    The request does not reach the service, so the response lacks the headers of the rate limit.

    Args:
        code: The status code.
    """
    code = _check_code(code)
    title = f"{code} {_phrase(code)}"
    page = f"<html><head><title>{title}</title></head><body><h1>{title}</h1></body></html>\n"
    return attrs.evolve(_responses.html(code, page), headers=dict.fromkeys(_RATE_LIMIT_HEADERS))


def html_200() -> Fault:
    """Respond with 200 and an HTML page, as for a wrong path or base URL."""
    return _responses.html(200)


def empty_200() -> Fault:
    """Respond with 200 and an empty body."""
    return SandboxResponse(200)


def empty_string_200() -> Fault:
    """Respond with 200 and the JSON string ``""``."""
    return _responses.json_data(200, "")


def json(data: Any) -> Fault:
    """Respond with 200 and JSON, such as invalid rows or a wrapped list (``{"meetings": []}``).

    Args:
        data: The data to send as JSON.
    """
    return _responses.json_data(200, data)


def redirect(location: str, code: int = 302) -> Fault:
    """Respond with a redirect.

    Args:
        location: The ``Location`` header, a path or a URL.
        code: The status code.
    """
    code, location = _check_code(code, 300, 399), _check_text("location", location)
    return _responses.text(code, f"{_phrase(code)}. Redirecting to {location}", {"Location": location})


def slow(seconds: float) -> Fault:
    """Process the request, then delay the response.

    Args:
        seconds: The delay in seconds. To make a call time out, exceed the client's timeout.
    """
    return Slow(_check_seconds("seconds", seconds))


def truncated() -> Fault:
    """Process the request, then close the connection in the middle of the response body."""
    return Truncated()


def reset_before_processing() -> Fault:
    """Reset the connection (TCP RST); the request is neither counted nor processed."""
    return Reset(processed=False)


def reset_after_processing() -> Fault:
    """Process the request, then reset the connection (TCP RST) without a response."""
    return Reset(processed=True)


@attrs.define(eq=False)
class _Planned:
    fault: Fault
    times: int
    method: str | None
    path: str | None

    def matches(self, method: str, path: str) -> bool:
        return self.method in {None, method} and (self.path is None or fnmatchcase(path, self.path))


class FaultPlan:
    """The pending faults. The first one that matches a request applies. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._planned: list[_Planned] = []
        self.revision = 0  # incremented with every change

    def add(self, fault: object, times: object, method: str | None, path: str | None) -> None:
        """Plan ``fault`` for the next ``times`` requests with that method and path (None: any).

        Raises TypeError if ``fault`` is not a fault, such as a function that was not called, or if another
        argument has the wrong type, and ValueError if the fault could never apply.
        """
        if not isinstance(fault, Fault):
            raise TypeError(f"not a fault: {fault!r}; call a function of lemcal_async.sandbox.faults")
        if not is_whole(times):
            raise TypeError(f"times must be a whole number, not {times!r}")
        if times < 1:
            raise ValueError(f"times must be at least 1, not {times}")
        for name, value in (("method", method), ("path", path)):
            if value is not None:
                _check_text(name, value)
        if path is not None and not path.startswith(("/", "*")):
            raise ValueError(f"path must start with a slash, such as /meetings or /hooks/*, not {path!r}")
        with self._lock:
            self._planned.append(_Planned(fault, times, method and method.upper(), path))
            self.revision += 1

    def take(self, method: str, path: str) -> Fault | None:
        """Return the fault that applies to this request, if any."""
        with self._lock:
            for planned in self._planned:
                if planned.matches(method, path):
                    planned.times -= 1
                    self.revision += 1
                    if not planned.times:
                        self._planned.remove(planned)
                    return planned.fault
        return None

    def snapshot(self) -> list[str]:
        """Return a line of text for each pending fault."""
        with self._lock:
            return [
                f"{describe(entry.fault)}: {entry.times} x {entry.method or 'any'} {entry.path or '*'}"
                for entry in self._planned
            ]

    def clear(self) -> None:
        """Discard all pending faults."""
        with self._lock:
            self._planned.clear()
            self.revision += 1
