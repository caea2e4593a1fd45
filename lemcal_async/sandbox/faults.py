"""What can go wrong on this platform, as values for ``Sandbox.inject``.

::

    sandbox.inject(faults.too_many_requests(retry_after="1.283"))
    sandbox.inject(faults.status(503), times=3, method="GET", path="/meetings")

The constructors below build every form that was seen, on lemcal or on its sibling product. Those that
answer in place of the route leave the sandbox's state alone; ``slow``, ``truncated`` and
``reset_after_processing`` let the route do its work first. How a fault is carried out is app.py's part.
"""

import threading
from collections.abc import Mapping
from fnmatch import fnmatchcase
from http import HTTPStatus
from typing import Any, TypeAlias

import attrs

from lemcal_async.sandbox import _answers as answers
from lemcal_async.sandbox._answers import Answer

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
    """The answer is held back for so many seconds."""

    seconds: float


@attrs.frozen
class Reset:
    """The connection is reset without an answer, before or after the request was processed."""

    processed: bool


@attrs.frozen
class Truncated:
    """The answer breaks off in the middle of its body."""


Fault: TypeAlias = Answer | Slow | Reset | Truncated


def too_many_requests(retry_after: str | None = "0.2") -> Fault:
    """429. ``retry_after`` is sent to the letter, whatever its form; None leaves the header out."""
    headers = {"Retry-After": retry_after, "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": None}
    return answers.text(429, "Too Many Requests", headers)


def status(
    code: int,
    body: str | None = None,
    *,
    content_type: str | None = answers.PLAIN,
    headers: Mapping[str, str | None] | None = None,
) -> Fault:
    """Answer ``code``; the body is the code's own name unless given.

    ``headers`` win over those that every answer carries; None leaves one out.
    """
    if body is None:
        body = "" if code in answers.BODYLESS else HTTPStatus(code).phrase
    return Answer(code, body.encode(), content_type, headers or {})


def json_error(code: int, error: str, *, error_code: str | None = None) -> Fault:
    """``{"error": …}``, and with ``error_code`` ``{"error": …, "code": …}``."""
    more = {} if error_code is None else {"code": error_code}
    return answers.json_data(code, {"error": error} | more)


def unsuccessful(code: int, error: str, *, error_code: str | None = None) -> Fault:
    """``{"success": false, "error": …}``; with ``error_code`` the error is ``{"code", "message"}``."""
    detail = error if error_code is None else {"code": error_code, "message": error}
    return answers.json_data(code, {"success": False, "error": detail})


def not_ok(code: int, message: str) -> Fault:
    """``{"ok": false, "message": …}``."""
    return answers.json_data(code, {"ok": False, "message": message})


def html_error(code: int) -> Fault:
    """Answer with the HTML page of the CDN in front of the platform."""
    title = f"{code} {HTTPStatus(code).phrase}"
    page = f"<html><head><title>{title}</title></head><body><h1>{title}</h1></body></html>\n"
    return answers.html(code, page)


def html_200() -> Fault:
    """Answer as to a wrong path or base URL: 200, and an HTML page."""
    return answers.html(200)


def empty_200() -> Fault:
    """200, and nothing."""
    return Answer(200)


def empty_string_200() -> Fault:
    """200, and ``""`` as JSON."""
    return answers.json_data(200, "")


def json(data: Any) -> Fault:
    """200, and this JSON: bad rows, or an envelope such as ``{"meetings": []}``."""
    return answers.json_data(200, data)


def redirect(location: str, code: int = 302) -> Fault:
    """Redirect to ``location``, a path or a URL."""
    return answers.text(code, f"{HTTPStatus(code).phrase}. Redirecting to {location}", {"Location": location})


def slow(seconds: float) -> Fault:
    """Process the request, then hold the answer back for so many seconds."""
    return Slow(seconds)


def truncated() -> Fault:
    """Process the request, then close the connection in the middle of the answer's body."""
    return Truncated()


def reset_before_processing() -> Fault:
    """Reset the connection (TCP RST): the request is neither counted nor processed."""
    return Reset(processed=False)


def reset_after_processing() -> Fault:
    """Process the request, then reset the connection (TCP RST) without an answer."""
    return Reset(processed=True)


@attrs.define(eq=False)
class _Planned:
    fault: Fault
    times: int
    method: str | None
    path: str | None

    def meets(self, method: str, path: str) -> bool:
        return self.method in {None, method} and (self.path is None or fnmatchcase(path, self.path))


class FaultPlan:
    """The faults that wait for their requests; the first that fits is taken. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._planned: list[_Planned] = []

    def add(self, fault: object, times: int, method: str | None, path: str | None) -> None:
        """Plan ``fault`` for the next ``times`` requests of that method and path (None: any).

        TypeError for what is no fault, such as a constructor that was not called.
        """
        if not isinstance(fault, Fault):
            raise TypeError(f"not a fault: {fault!r}; call one of lemcal_async.sandbox.faults")
        if times < 1:
            raise ValueError(f"times must be at least 1, not {times}")
        with self._lock:
            self._planned.append(_Planned(fault, times, method and method.upper(), path))

    def take(self, method: str, path: str) -> Fault | None:
        """Return the fault that this request meets, if any."""
        with self._lock:
            for planned in self._planned:
                if planned.meets(method, path):
                    planned.times -= 1
                    if not planned.times:
                        self._planned.remove(planned)
                    return planned.fault
        return None

    def clear(self) -> None:
        """Forget them all."""
        with self._lock:
            self._planned.clear()
