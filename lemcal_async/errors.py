"""The exceptions, all of them: what failed, in which call, and what the server said.

    LemcalError
    ├── ConfigurationError            wrong set-up or wrong use; nothing was sent
    ├── APIConnectionError            no answer
    │   └── APITimeoutError           also a TimeoutError
    ├── DeadlineExceededError         also a TimeoutError; the call's own deadline
    ├── APIStatusError                an answer that is not a success
    │   ├── BadRequestError           400
    │   ├── AuthenticationError       401, and the 400/403/404 that speak of the API key
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
    ├── StoreError                    the store of a synchronization failed
    │   └── EmptyListError            a list too short to be believed yet
    └── WebhookError

Every one is a plain value: it pickles, crosses processes, holds no object of an HTTP library
and no secret. Which error an answer becomes is decided in ``responses.py``.
"""

from typing import Any

import attrs


@attrs.frozen
class CallInfo:
    """Which call an error speaks of.

    ``route`` is the path with its ids left out (``/meetingTypes/{id}``), so that it can serve as a
    label. ``waited`` is the seconds spent waiting for the rate limit and between attempts.
    """

    method: str | None = None
    route: str | None = None
    attempts: int = 0
    waited: float = 0.0

    def __str__(self) -> str:
        return f"{self.method} {self.route}" if self.method else "the call"


NO_CALL = CallInfo()


@attrs.frozen
class BadRow:
    """A row of a list that could not be read: its place in the list, the row itself, and why."""

    index: int
    row: Any = attrs.field(repr=False)  # personal data, or a hook's token
    reason: str


class LemcalError(Exception):
    """The base of everything this package raises on purpose.

    ``status_code`` and ``server_message`` are None where there was no answer, or none of use.
    """

    status_code: int | None = None
    server_message: str | None = None

    def __init__(self, message: str = "", *, call: CallInfo = NO_CALL) -> None:
        super().__init__(message)
        self.call = call

    @property
    def method(self) -> str | None:
        """The HTTP method of the call."""
        return self.call.method

    @property
    def route(self) -> str | None:
        """The path of the call, ids left out: ``/meetingTypes/{id}``."""
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
    """No answer came: the connection failed, or broke before the answer was whole.

    ``maybe_processed`` is True when the server may have carried the request out all the same.
    """

    def __init__(
        self,
        message: str = "",
        *,
        call: CallInfo = NO_CALL,
        maybe_processed: bool = False,
    ) -> None:
        super().__init__(message, call=call)
        self.maybe_processed = maybe_processed


class APITimeoutError(APIConnectionError, TimeoutError):
    """A network operation (connect, write or read) took longer than ``timeout=``."""


class DeadlineExceededError(LemcalError, TimeoutError):
    """The call's ``deadline=`` has passed, or is known to pass before the call could be made.

    ``retry_after`` is the seconds after which a new try has a chance, None if unknown.
    """

    def __init__(
        self,
        message: str = "",
        *,
        call: CallInfo = NO_CALL,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, call=call)
        self.retry_after = retry_after


class APIStatusError(LemcalError):
    """The server answered, and not with a success; a redirect counts as that too.

    ``retry_after`` is the server's ``Retry-After`` in seconds, None if it sent none. This service
    sends it with every answer (documented): only a 429 or 503 makes it an order to wait.
    """

    def __init__(
        self,
        message: str = "",
        *,
        call: CallInfo = NO_CALL,
        status_code: int | None = None,
        server_message: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, call=call)
        self.status_code = status_code
        self.server_message = server_message
        self.retry_after = retry_after


class BadRequestError(APIStatusError):
    """400: the server found the request wrong."""


class AuthenticationError(APIStatusError):
    """401, or the 400, 403 and 404 with which this platform says that the API key is no good."""


class PlanRequiredError(APIStatusError):
    """402: the account's plan lacks the feature."""


class PermissionDeniedError(APIStatusError):
    """403: the credentials are good, the action is not allowed."""


class NotFoundError(APIStatusError):
    """404: there is no such thing."""


class MeetingTypeNotFoundError(NotFoundError):
    """There is no meeting type of that id."""


class HookNotFoundError(NotFoundError):
    """There is no hook of that id."""


class MeetingNotFoundError(NotFoundError):
    """The meeting is not in the account's list (the service has no call for a single meeting)."""


class MethodNotAllowedError(APIStatusError):
    """405: the path does not know the method."""


class ConflictError(APIStatusError):
    """409: it exists already."""


class DuplicateHookError(ConflictError):
    """409 on creating a hook: there is one for that target already.

    Its id cannot be recovered: the service has no list of hooks (documented by absence).
    """


class RateLimitError(APIStatusError):
    """429, and no further try was allowed; ``limit`` and ``remaining`` as the server gave them."""

    def __init__(
        self,
        message: str = "",
        *,
        call: CallInfo = NO_CALL,
        status_code: int | None = 429,
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


class ResponseDecodeError(LemcalError):
    """A success that is not the JSON asked for: an HTML page, nothing, another shape, bad rows.

    When only some rows of a list could not be read, ``rows`` holds the models of the others, in order.
    ``bad_rows`` says which rows are missing and why: the first 1,000 of ``bad_row_count``.
    """

    def __init__(
        self,
        message: str = "",
        *,
        call: CallInfo = NO_CALL,
        status_code: int | None = None,
        rows: list[Any] | None = None,
        bad_rows: list[BadRow] | None = None,
        bad_row_count: int | None = None,
    ) -> None:
        super().__init__(message, call=call)
        self.status_code = status_code
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


class WebhookError(LemcalError):
    """A webhook delivery could not be accepted or verified.

    For handlers and memories of your own: the receiver itself answers the sender instead of raising.
    """
