"""The state of a call, shared by its attempts and by all layers, and the error that a failed call raises.

The state is stored in ``request.extensions``. The client creates it for each call; a request from any other
HTTP client gets one in the first layer. A wire may use any HTTP library. Its exceptions are translated to
httpx's immediately, and their tracebacks are dropped, because the local variables of h11, httpcore and anyio
contain the headers, including the credentials.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar, cast

import anyio
import attrs
import httpx

from lemcal_async._concurrency import is_being_canceled
from lemcal_async._headers import Quota
from lemcal_async._responses import server_text
from lemcal_async._retry import REPEATABLE, RetryPolicy
from lemcal_async.errors import (
    APIConnectionError,
    APITimeoutError,
    CallInfo,
    DeadlineExceededError,
    LemcalError,
    ResponseDecodeError,
)
from lemcal_async.ratelimit import Key, Permit, Priority

T = TypeVar("T")

_EXTENSION = "lemcal_async"

_OPERATIONS: dict[type[httpx.RequestError], tuple[str, str]] = {
    httpx.ConnectTimeout: ("connecting", "connect"),
    httpx.ReadTimeout: ("waiting for the response", "read"),
    httpx.WriteTimeout: ("sending", "write"),
    httpx.PoolTimeout: ("waiting for a connection", "pool"),
}


@attrs.define(eq=False)
class CallState:
    """One call: its account's key, its options, and the outcome of its attempts so far."""

    method: str
    route: str  # the path with placeholders for ids
    key: Key | None = None
    priority: Priority = "interactive"
    retry: RetryPolicy | None = None  # overrides the transport's policy
    host: str = "the server"  # for error messages
    timeout: Mapping[str, float | None] = attrs.field(factory=dict[str, float | None])
    redact: Callable[[str], str] | None = None  # if None, errors do not quote the server
    deadline: float | None = None  # on the event loop's clock, anyio.current_time()

    begun: int = 0  # attempts, including one that still waits for the limiter
    is_waiting: bool = False  # whether the last of them has not been passed to the wire
    waited: float = 0.0  # seconds, for the limiter and between attempts
    sent: bool = False  # whether the server may have processed the current attempt
    maybe_processed: bool = False  # whether the server may have processed an earlier attempt
    last: httpx.Response | httpx.RequestError | None = attrs.field(default=None, repr=False)
    body: bytes | None = attrs.field(default=None, repr=False)  # of the last response, if readable
    quota: Quota | None = None  # from the headers of the last response
    paused_for: float = 0.0  # seconds for which the limiter pauses the key after the last response
    refused_permit: Permit | None = None  # the last attempt's, after a 429 or if it expired unsent
    tracer: "SendTracer | None" = None  # of the current attempt
    proxy: str = ""  # the host and port of the proxy through which the last attempt could not connect

    def __str__(self) -> str:
        return f"{self.method} {self.route}"

    @property
    def is_client_call(self) -> bool:
        """Whether ``AsyncLemcal`` made the call, rather than another HTTP client that uses these layers."""
        return self.redact is not None

    @property
    def attempts(self) -> int:
        """The number of requests passed to the wire."""
        return self.begun - self.is_waiting

    def begin_attempt(self) -> None:
        """Record the start of another attempt."""
        self.begun += 1
        self.maybe_processed, self.sent = self.maybe_processed or self.sent, False
        self.quota = None
        self.paused_for = 0.0
        self.proxy = ""

    def time_left(self) -> float | None:
        """Return the seconds until the deadline; None if there is no deadline."""
        return None if self.deadline is None else self.deadline - anyio.current_time()

    def info(self) -> CallInfo:
        """Return the description of the call for an error."""
        return CallInfo(self.method, self.route, self.attempts, round(self.waited, 3))


class SendTracer:
    """Tracks whether an attempt was sent, using httpcore's ``trace`` extension.

    A connect error alone proves nothing: some wires raise one for a connection that was reset after the
    request. The absence of a send event counts only if the wire has reported another event of this attempt,
    or has the attribute ``reports_sending``, which promises that the event ``send_request_headers.started``
    always precedes the first byte.
    """

    def __init__(self, request: httpx.Request) -> None:
        self._request = request
        self._callback = request.extensions.get("trace")  # set by the caller
        self._reported = False
        self.permit: Permit | None = None
        self.entered = True  # whether the request was passed to the wire
        self.sent = False
        self.permit_expired = False  # whether the permit expired just before the request was sent
        request.extensions["trace"] = self

    def proves_unsent(self) -> bool:
        """Whether the request was certainly not sent."""
        return not self.entered or (self._reported and not self.sent)

    def enter(self, wire: httpx.AsyncBaseTransport) -> None:
        """Record that the request is being passed to this wire, or to the layer above it."""
        self.entered = True
        self._reported = bool(getattr(wire, "reports_sending", False))

    def remove(self) -> None:
        """Restore the request's ``trace`` extension."""
        self._request.extensions.pop("trace", None)
        if self._callback is not None:
            self._request.extensions["trace"] = self._callback

    async def __call__(self, name: str, info: dict[str, Any]) -> None:
        """Handle a trace event, such as ``http11.send_request_headers.started``."""
        self._reported = True
        # A CONNECT request to a proxy precedes the request itself.
        if name.endswith(".send_request_headers.started") and info["request"].method != b"CONNECT":
            if self.permit is not None and self.permit.sent() is False:
                self.permit_expired = True
                raise httpx.TransportError("the request was not sent: its permit had expired")
            self.sent = True
            if self._callback is None:
                # Later events are not needed, and cost as much as the rest of this layer.
                info["request"].extensions.pop("trace", None)
        if self._callback is not None:
            await self._callback(name, info)


def call_of(request: httpx.Request) -> CallState:
    """Return the state of the call that ``request`` belongs to."""
    call = request.extensions.get(_EXTENSION)
    return call if isinstance(call, CallState) else _new_call(request)


def account_of(request: httpx.Request) -> Key | None:
    """Return the account key of ``request``, if known."""
    call = request.extensions.get(_EXTENSION)
    return call.key if isinstance(call, CallState) else None


def note_proxy(request: httpx.Request, address: str) -> None:
    """Record the proxy through which ``request`` could not connect, if any, for the error."""
    call = request.extensions.get(_EXTENSION)
    if isinstance(call, CallState):
        call.proxy = address


def begin_call(request: httpx.Request) -> CallState:
    """Start a call with ``request``. Sending the same request again starts a new call."""
    call = call_of(request)
    return call if call.begun == 0 else _new_call(request)


def extension(call: CallState) -> dict[str, CallState]:
    """Return the request extension that attaches ``call`` to a request."""
    return {_EXTENSION: call}


def _new_call(request: httpx.Request) -> CallState:
    call = CallState(request.method, request.url.path, host=request.url.netloc.decode("ascii"))
    request.extensions = {**request.extensions, **extension(call)}
    return call


async def guard(call: CallState, operation: Awaitable[T]) -> T:
    """Await an operation of a wire, translating exceptions to httpx's and dropping the wire's frames.

    Cancellation propagates, also without frames, because ``asyncio.timeout`` makes it the cause of its
    TimeoutError. For clients other than ``AsyncLemcal``, exceptions pass through unchanged.
    """
    if not call.is_client_call:
        return await operation
    handled = sys.exception()
    try:
        return await operation
    except BaseException as error:
        drop_frames(error, handled)
        translated = _translate(error)
        if translated is error:
            raise
        raise translated from error


def _translate(error: BaseException) -> BaseException:
    """Translate an exception of a wire to httpx's, or return it unchanged if that is not needed.

    Assertion errors come from a mock transport in a test, and this package's own errors are for the user.
    """
    if isinstance(error, asyncio.CancelledError) and not is_being_canceled():
        return httpx.TransportError("the transport canceled the request on its own")
    if not isinstance(error, Exception) or isinstance(
        error, httpx.RequestError | LemcalError | AssertionError
    ):
        return error
    text = f"{type(error).__name__}: {error}"
    return httpx.NetworkError(text) if isinstance(error, OSError) else httpx.TransportError(text)


def drop_frames(error: BaseException, handled: BaseException | None) -> None:
    """Remove the tracebacks of ``error``, of its causes and contexts, and of the exceptions in its groups.

    ``handled`` is the exception that was being handled when the wire was called. It belongs to the user's
    program, and keeps its traceback.
    """
    seen: set[int] = set()
    pending = [error]
    while pending:
        each = pending.pop()
        if each is handled or id(each) in seen:
            continue
        seen.add(id(each))
        each.__traceback__ = None
        pending += [linked for linked in (each.__cause__, each.__context__) if linked is not None]
        if isinstance(each, BaseExceptionGroup):
            pending += cast("BaseExceptionGroup[BaseException]", each).exceptions


def no_response_error(error: httpx.RequestError, call: CallState) -> LemcalError:
    """Return the error for a call whose last attempt failed with ``error``."""
    if isinstance(error, httpx.DecodingError):
        problem = f"the response cannot be decompressed: {_error_text(error, call)}"
        return ResponseDecodeError(f"{call}: {problem}", call=call.info())
    kind = APITimeoutError if isinstance(error, httpx.TimeoutException) else APIConnectionError
    reason = _reason(error, call)
    where = "" if call.host in reason else f" from {call.host}"
    return kind(
        f"{call}: no response{where}: {reason}{_attempts_suffix(call)}"
        f"{_processed_suffix(call) or _advice_suffix(error)}",
        call=call.info(),
        maybe_processed=call.sent or call.maybe_processed,
    )


def deadline_error(
    call: CallState, problem: str, advice: str = "", *, retry_after: float | None = None
) -> DeadlineExceededError:
    """Return the error for a deadline that has passed or cannot be met, including the last outcome."""
    status_code = message = None
    last = ""
    if isinstance(call.last, httpx.Response):
        status_code = call.last.status_code
        if call.redact is not None and call.body is not None:
            message = server_text(call.body, call.redact) or None
        last = f"; last attempt: {status_code} {message or ''}".rstrip()
    elif call.last is not None:
        last = f"; last attempt: {_reason(call.last, call)}"
    return DeadlineExceededError(
        f"{call}: {problem}{_attempts_suffix(call)}{last}{advice and f'; {advice}'}{_processed_suffix(call)}",
        call=call.info(),
        status_code=status_code,
        server_message=message,
        retry_after=retry_after,
    )


def _reason(error: httpx.RequestError, call: CallState) -> str:
    via = f"via the proxy {call.proxy}: " if call.proxy else ""
    for kind, (operation, name) in _OPERATIONS.items():
        if isinstance(error, kind):
            seconds = call.timeout.get(name)
            limit = "allowed" if seconds is None else f"{seconds:g} s"
            return f"{via}{operation} took longer than {limit} (timeout=)"
    return f"{via}{_error_text(error, call)}"


def _error_text(error: BaseException, call: CallState) -> str:
    """Return the message of an error, or the first non-empty message in its chain of causes."""
    each: BaseException | None = error
    while call.redact is not None and each is not None:
        if text := " ".join(str(each).split()):
            return call.redact(text)
        each = each.__cause__
    return type(error).__name__


def _advice_suffix(error: httpx.RequestError) -> str:
    if isinstance(error, httpx.LocalProtocolError | httpx.UnsupportedProtocol):
        return ""
    if isinstance(error, httpx.TimeoutException):
        return "; try again later, or allow more time"
    if isinstance(error, httpx.ConnectError | httpx.ProxyError):
        return "; check the base URL, the network and any proxy, or try again later"
    return "; try again later"


def _attempts_suffix(call: CallState) -> str:
    return f" ({call.attempts} attempts, {call.waited:.1f} s waited)" if call.attempts > 1 else ""


def _processed_suffix(call: CallState) -> str:
    if (call.sent or call.maybe_processed) and call.method not in REPEATABLE:
        return "; it may have been processed: check before you send it again"
    return ""


async def handle_httpx2_request(transport: httpx.AsyncBaseTransport, request: Any) -> Any:
    """Handle a request from httpx2's client; return httpx2's response or raise httpx2's errors."""
    from lemcal_async.transport.httpx2 import handle_request  # noqa: PLC0415 - already loaded

    return await handle_request(transport, request)
