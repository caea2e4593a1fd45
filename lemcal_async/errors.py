"""All exceptions: what failed, in which call, and the server's message.

    LemcalError
    ├── ConfigurationError            wrong setup or wrong use; nothing was sent
    ├── APIConnectionError            no response
    │   └── APITimeoutError           also a TimeoutError
    ├── DeadlineExceededError         also a TimeoutError; the call's own deadline
    ├── APIStatusError                a response whose status is not a success
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
    └── StoreError                    the store used by a synchronization failed
        └── EmptyListError            a suspiciously short list, not accepted yet

Exceptions are plain values: they can be pickled and sent to other processes, and contain neither objects of
an HTTP library nor secrets.
"""

# _responses.py maps responses to errors, transport/_call.py missing responses and deadlines.

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
        route: The path with placeholders for ids (``/meetingTypes/{id}``), suitable as a metric label.
        attempts: The number of requests passed to the transport; 0 if the call was never tried.
        waited: Seconds spent waiting for the rate limiter and between attempts.
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
        index: The row's index in the list.
        row: The row itself.
        reason: Why the row could not be read.
    """

    index: int
    row: Any = attrs.field(repr=False)  # personal data, or a hook's token
    reason: str


class LemcalError(Exception):
    """The base class of the errors raised for failed calls, invalid configuration, and stores.

    Attributes:
        call: The call that failed.
        server_message: The server's error message; None if there was no response or no usable message.
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
        """The status code of the last response; None if there was none."""
        return self._status_code

    @property
    def method(self) -> str | None:
        """The HTTP method of the call."""
        return self.call.method

    @property
    def route(self) -> str | None:
        """The path of the call with placeholders for ids: ``/meetingTypes/{id}``."""
        return self.call.route

    @property
    def attempts(self) -> int:
        """The number of requests passed to the transport; 0 if the call was never tried."""
        return self.call.attempts

    @property
    def waited(self) -> float:
        """Seconds spent waiting for the rate limiter and between attempts."""
        return self.call.waited


class ConfigurationError(LemcalError):
    """The SDK was configured or called incorrectly. Nothing was sent."""


class APIConnectionError(LemcalError):
    """No response: connecting failed, or the connection was lost before the response was complete.

    Attributes:
        maybe_processed: True if the server may have processed the request anyway.
    """

    def __init__(
        self, message: str = "", *, call: CallInfo = _NO_CALL, maybe_processed: bool = False
    ) -> None:
        super().__init__(message, call=call)
        self.maybe_processed = maybe_processed


class APITimeoutError(APIConnectionError, TimeoutError):
    """A network operation (connect, write or read) took longer than ``timeout=``."""


class DeadlineExceededError(LemcalError, TimeoutError):
    """The call's ``deadline=`` has passed, or would certainly pass before the request could be sent.

    ``status_code`` and ``server_message`` come from the last attempt, if it received a response.

    Attributes:
        retry_after: Seconds after which another call has a chance; None if unknown.
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
    """The server responded with a status code other than a success, such as an error or a redirect.

    Attributes:
        retry_after: The server's ``Retry-After`` in seconds; None if it sent none. This service sends the
            header with every response (documented); it asks the client to wait only with a 429 or 503.
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
        """The response's status code."""
        return cast("int", self._status_code)


class BadRequestError(APIStatusError):
    """400: the server rejects the request as malformed."""

    _usual_status = 400


class AuthenticationError(APIStatusError):
    """401, or a 400, 403 or 404 with which this platform rejects an API key."""

    _usual_status = 401


class PlanRequiredError(APIStatusError):
    """402: the account's plan lacks the feature."""

    _usual_status = 402


class PermissionDeniedError(APIStatusError):
    """403: the credentials are valid, but the action is not allowed."""

    _usual_status = 403


class NotFoundError(APIStatusError):
    """404: the requested resource does not exist."""

    _usual_status = 404


class MeetingTypeNotFoundError(NotFoundError):
    """There is no meeting type with that id."""


class HookNotFoundError(NotFoundError):
    """There is no hook with that id."""


class MeetingNotFoundError(NotFoundError):
    """The meeting is not in the account's list (the service has no endpoint for a single meeting)."""


class MethodNotAllowedError(APIStatusError):
    """405: the path does not support the method."""

    _usual_status = 405


class ConflictError(APIStatusError):
    """409: the resource already exists."""

    _usual_status = 409


class DuplicateHookError(ConflictError):
    """409 on creating a hook: the target URL already has one.

    Its id cannot be looked up, because the service does not list hooks (documented by absence).
    """


class RateLimitError(APIStatusError):
    """429, and the retry policy allows no further attempt.

    Attributes:
        limit: The number of requests allowed per window, as reported by the server.
        remaining: The number of requests left in the window, as reported by the server.
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
    """A successful response whose body is not the expected JSON: HTML, empty, the wrong type, or bad rows.

    Attributes:
        rows: If only some rows of a list could not be read, the models of all other rows, in order.
        bad_rows: The rows that could not be read, and why; at most the first 1,000.
        bad_row_count: The number of rows that could not be read.
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
    """The store used by a synchronization failed, such as a full disk or a locked or unreachable database.

    The stored data is intact.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(message)


class EmptyListError(StoreError):
    """The service suddenly lists none, or less than half, of an account's meetings. Nothing was changed."""
