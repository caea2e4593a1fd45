"""The exceptions, all of them: what failed, in which call, and what the server said.

    LemcalError
    ├── ConfigurationError            wrong setup or wrong use; nothing was sent
    ├── APIConnectionError            no answer
    │   └── APITimeoutError           also a TimeoutError
    ├── DeadlineExceededError         also a TimeoutError; the call's own deadline
    ├── APIStatusError                an answer that is not a success
    │   ├── BadRequestError           400
    │   ├── AuthenticationError       401, and the 400/403/404 that are about the API key
    │   ├── PlanRequiredError         402
    │   ├── PermissionDeniedError     403
    │   ├── NotFoundError             404
    │   │   ├── MeetingTypeNotFoundError
    │   │   ├── HookNotFoundError
    │   │   └── MeetingNotFoundError
    │   ├── MethodNotAllowedError     405
    │   ├── ConflictError             409
    │   │   └── DuplicateHookError
    │   ├── RateLimitError            429
    │   └── ServerError               5xx
    ├── ResponseDecodeError           a 2xx that is not the JSON asked for
    └── StoreError                    the store of a synchronization failed
        └── EmptyListError            a list too short to be believed yet

Each is a plain value: it pickles, crosses processes, and holds neither an object of an HTTP library
nor a secret.
"""

# Which error an answer becomes is decided in _responses.py.

from typing import Any, ClassVar, cast

import attrs

__all__ = [
    "APIConnectionError",
    "APIStatusError",
    "APITimeoutError",
    "AuthenticationError",
    "BadRequestError",
    "BadRow",
    "CallInfo",
    "ConfigurationError",
    "ConflictError",
    "DeadlineExceededError",
    "DuplicateHookError",
    "EmptyListError",
    "HookNotFoundError",
    "LemcalError",
    "MeetingNotFoundError",
    "MeetingTypeNotFoundError",
    "MethodNotAllowedError",
    "NotFoundError",
    "PermissionDeniedError",
    "PlanRequiredError",
    "RateLimitError",
    "ResponseDecodeError",
    "ServerError",
    "StoreError",
]


@attrs.frozen
class CallInfo:
    """The call that an error is about.

    Attributes:
        method: The HTTP method.
        route: The path without its ids (``/meetingTypes/{id}``), so it can serve as a label.
        attempts: How many times the request was tried; 0 if it never was.
        waited: Seconds spent waiting for the rate limit and between attempts.
    """

    method: str | None = None
    route: str | None = None
    attempts: int = 0
    waited: float = 0.0

    def __str__(self) -> str:
        return f"{self.method} {self.route}" if self.method else "the call"


_NO_CALL = CallInfo()


@attrs.frozen
class BadRow:
    """A row of a list that could not be read.

    Attributes:
        index: Its index in the list.
        row: The row itself.
        reason: What is wrong with it.
    """

    index: int
    row: Any = attrs.field(repr=False)  # personal data, or a hook's token
    reason: str


class LemcalError(Exception):
    """The base of everything this package raises on purpose.

    Attributes:
        call: The call that it is about.
        server_message: The server's own words, None if it did not answer or said nothing of use.
    """

    def __init__(
        self,
        message: str = "",
        *,
        call: CallInfo = _NO_CALL,
        status_code: int | None = None,
        server_message: str | None = None,
    ) -> None:
        super().__init__(message)
        self.call = call
        self.server_message = server_message
        self._status_code = status_code

    @property
    def status_code(self) -> int | None:
        """The status of the last answer, None if there was none."""
        return self._status_code

    @property
    def method(self) -> str | None:
        """The HTTP method of the call."""
        return self.call.method

    @property
    def route(self) -> str | None:
        """The path of the call without its ids: ``/meetingTypes/{id}``."""
        return self.call.route

    @property
    def attempts(self) -> int:
        """How many times the request was tried; 0 if it never was."""
        return self.call.attempts

    @property
    def waited(self) -> float:
        """Seconds spent waiting for the rate limit and between attempts."""
        return self.call.waited


class ConfigurationError(LemcalError):
    """The SDK was set up or called in a way that cannot work. Nothing was sent."""


class APIConnectionError(LemcalError):
    """No answer came: the connection failed, or broke before the answer was complete.

    Attributes:
        maybe_processed: True if the server may have carried out the request anyway.
    """

    def __init__(
        self, message: str = "", *, call: CallInfo = _NO_CALL, maybe_processed: bool = False
    ) -> None:
        super().__init__(message, call=call)
        self.maybe_processed = maybe_processed


class APITimeoutError(APIConnectionError, TimeoutError):
    """A network operation (connect, write or read) took longer than ``timeout=``."""


class DeadlineExceededError(LemcalError, TimeoutError):
    """The call's ``deadline=`` has passed, or is known to pass before the call could be made.

    ``status_code`` and ``server_message`` are those of the last attempt, if it was answered.

    Attributes:
        retry_after: The seconds after which another call has a chance, None if unknown.
    """

    def __init__(
        self,
        message: str = "",
        *,
        call: CallInfo = _NO_CALL,
        status_code: int | None = None,
        server_message: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, call=call, status_code=status_code, server_message=server_message)
        self.retry_after = retry_after


class APIStatusError(LemcalError):
    """The server answered, but not with a success. A redirect counts as that too.

    Attributes:
        retry_after: The server's ``Retry-After`` in seconds, None if it sent none. This service sends it with
            every answer (documented); only with a 429 or 503 is it an order to wait.
    """

    _usual_status: ClassVar[int] = 0

    def __init__(
        self,
        message: str = "",
        *,
        call: CallInfo = _NO_CALL,
        status_code: int | None = None,
        server_message: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        status_code = self._usual_status if status_code is None else status_code
        super().__init__(message, call=call, status_code=status_code, server_message=server_message)
        self.retry_after = retry_after

    @property
    def status_code(self) -> int:
        """The status of the answer."""
        return cast("int", self._status_code)


class BadRequestError(APIStatusError):
    """400: the server rejects the request as malformed."""

    _usual_status = 400


class AuthenticationError(APIStatusError):
    """401, or one of the 400, 403 and 404 with which this platform rejects an API key."""

    _usual_status = 401


class PlanRequiredError(APIStatusError):
    """402: the account's plan lacks the feature."""

    _usual_status = 402


class PermissionDeniedError(APIStatusError):
    """403: the credentials are good, but the action is not allowed."""

    _usual_status = 403


class NotFoundError(APIStatusError):
    """404: what was asked for does not exist."""

    _usual_status = 404


class MeetingTypeNotFoundError(NotFoundError):
    """There is no meeting type with that id."""


class HookNotFoundError(NotFoundError):
    """There is no hook with that id."""


class MeetingNotFoundError(NotFoundError):
    """The meeting is not in the account's list (the service has no call for a single meeting)."""


class MethodNotAllowedError(APIStatusError):
    """405: the path does not support the method."""

    _usual_status = 405


class ConflictError(APIStatusError):
    """409: it exists already."""

    _usual_status = 409


class DuplicateHookError(ConflictError):
    """409 on creating a hook: that target has one already.

    Its id cannot be recovered, because the service has no list of hooks (documented by absence).
    """


class RateLimitError(APIStatusError):
    """429, and no further attempt was allowed.

    Attributes:
        limit: How many requests the window allows, as the server gave it.
        remaining: How many of them were left, as the server gave it.
    """

    _usual_status = 429

    def __init__(
        self,
        message: str = "",
        *,
        call: CallInfo = _NO_CALL,
        status_code: int | None = None,
        server_message: str | None = None,
        retry_after: float | None = None,
        limit: int | None = None,
        remaining: int | None = None,
    ) -> None:
        super().__init__(
            message,
            call=call,
            status_code=status_code,
            server_message=server_message,
            retry_after=retry_after,
        )
        self.limit = limit
        self.remaining = remaining


class ServerError(APIStatusError):
    """5xx: the server failed."""

    _usual_status = 500


class ResponseDecodeError(LemcalError):
    """A success that is not the JSON asked for: an HTML page, an empty body, another shape, bad rows.

    Attributes:
        rows: If only some rows of a list could not be read, the models of the others, in order.
        bad_rows: Which rows are missing and why; the first 1,000 of them.
        bad_row_count: How many rows are missing.
    """

    def __init__(
        self,
        message: str = "",
        *,
        call: CallInfo = _NO_CALL,
        status_code: int | None = None,
        rows: list[Any] | None = None,
        bad_rows: list[BadRow] | None = None,
        bad_row_count: int | None = None,
    ) -> None:
        super().__init__(message, call=call, status_code=status_code)
        self.rows = rows if rows is not None else []
        self.bad_rows = bad_rows if bad_rows is not None else []
        self.bad_row_count = len(self.bad_rows) if bad_row_count is None else bad_row_count


class StoreError(LemcalError):
    """The store of a synchronization failed: the disk is full, the database is locked or unreachable.

    What is stored is unharmed.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(message)


class EmptyListError(StoreError):
    """The service suddenly lists none, or less than half, of an account's meetings; nothing was changed."""
