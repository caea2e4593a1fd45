"""What a call has in common over all of its attempts and layers: its state, and the error it ends in.

The state travels in ``request.extensions``. The client makes one for each call; a request from any other
HTTP client gets one when it enters the first layer. A wire may be any HTTP library: what it raises becomes an
error of httpx at once, and no traceback leads back into it, because frames of h11, httpcore or anyio hold the
headers, with the credentials in them.
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
    httpx.ReadTimeout: ("waiting for the answer", "read"),
    httpx.WriteTimeout: ("sending", "write"),
    httpx.PoolTimeout: ("waiting for a connection", "pool"),
}


@attrs.define(eq=False)
class CallState:
    """One call: whose it is, how much time it has, and how its attempts ended so far."""

    method: str
    route: str  # the path without its ids
    key: Key | None = None
    priority: Priority = "interactive"
    retry: RetryPolicy | None = None  # instead of the transport's own
    host: str = "the server"  # as an error names it
    timeout: Mapping[str, float | None] = attrs.field(factory=dict[str, float | None])
    redact: Callable[[str], str] | None = None  # without one, the server's words are not quoted
    deadline: float | None = None  # on the event loop's clock, anyio.current_time()

    attempts: int = 0
    waited: float = 0.0  # seconds, for the limiter and between attempts
    sent: bool = False  # whether the server may have carried out the current attempt
    maybe_processed: bool = False  # whether it may have carried out an earlier one
    last: httpx.Response | httpx.RequestError | None = attrs.field(default=None, repr=False)
    body: bytes | None = attrs.field(default=None, repr=False)  # of the last answer, if it could be read
    quota: Quota | None = None  # what the headers of the last answer say
    held: float = 0.0  # seconds for which the limiter pauses the key after the last answer
    refused: Permit | None = None  # of the last attempt, if a 429 refused it or it ran out unsent
    tracer: "SendTracer | None" = None  # of the current attempt

    def __str__(self) -> str:
        return f"{self.method} {self.route}"

    @property
    def is_ours(self) -> bool:
        """Whether it is a call of ``AsyncLemcal``, and not of another client with these layers."""
        return self.redact is not None

    def begin_attempt(self) -> None:
        """Note that another attempt begins."""
        self.attempts += 1
        self.maybe_processed, self.sent = self.maybe_processed or self.sent, False
        self.quota = None
        self.held = 0.0

    def time_left(self) -> float | None:
        """Return the seconds until the deadline, None without one."""
        return None if self.deadline is None else self.deadline - anyio.current_time()

    def info(self) -> CallInfo:
        """Return what an error tells about the call."""
        return CallInfo(self.method, self.route, self.attempts, round(self.waited, 3))


class SendTracer:
    """Learns from the wire whether one attempt was sent, by httpcore's ``trace`` extension.

    That an error names a failure to connect proves nothing: some wires report a connection that was
    reset after the request as one. Only a wire that reports what it does can be believed: by an event
    of this attempt, or by its attribute ``reports_sending``, which promises that the event
    ``send_request_headers.started`` always comes before the first byte leaves.
    """

    def __init__(self, request: httpx.Request) -> None:
        self._request = request
        self._passed_on = request.extensions.get("trace")  # the callback of whoever made the request
        self._reported = False
        self.permit: Permit | None = None
        self.entered = True  # whether the wire was asked to send
        self.sent = False
        self.lapsed = False  # whether the permit had run out when the request was about to leave
        request.extensions["trace"] = self

    def proves_unsent(self) -> bool:
        """Whether the request certainly did not leave."""
        return not self.entered or (self._reported and not self.sent)

    def enter(self, wire: httpx.AsyncBaseTransport) -> None:
        """Note that this wire, or the layer above it, is now asked to send."""
        self.entered = True
        self._reported = bool(getattr(wire, "reports_sending", False))

    def remove(self) -> None:
        """Leave the request as it was."""
        self._request.extensions.pop("trace", None)
        if self._passed_on is not None:
            self._request.extensions["trace"] = self._passed_on

    async def __call__(self, name: str, info: dict[str, Any]) -> None:
        """Take note of an event, such as ``http11.send_request_headers.started``."""
        self._reported = True
        # A CONNECT to a proxy is not yet the request.
        if name.endswith(".send_request_headers.started") and info["request"].method != b"CONNECT":
            if self.permit is not None and self.permit.sent() is False:
                self.lapsed = True
                raise httpx.TransportError("the request was not sent: its permit had run out")
            self.sent = True
            if self._passed_on is None:
                # There is no more to learn, and the other events cost as much as the rest of this layer.
                info["request"].extensions.pop("trace", None)
        if self._passed_on is not None:
            await self._passed_on(name, info)


def call_of(request: httpx.Request) -> CallState:
    """Return the call that ``request`` belongs to."""
    call = request.extensions.get(_EXTENSION)
    return call if isinstance(call, CallState) else _new_call(request)


def account_of(request: httpx.Request) -> Key | None:
    """Return whose budget ``request`` draws on, if that is known."""
    call = request.extensions.get(_EXTENSION)
    return call.key if isinstance(call, CallState) else None


def begin_call(request: httpx.Request) -> CallState:
    """Return the call that begins with ``request``. Sending a request once more begins another."""
    call = call_of(request)
    return call if call.attempts == 0 else _new_call(request)


def extension(call: CallState) -> dict[str, CallState]:
    """Return the extension that ties a request to ``call``."""
    return {_EXTENSION: call}


def _new_call(request: httpx.Request) -> CallState:
    call = CallState(request.method, request.url.path, host=request.url.netloc.decode("ascii"))
    request.extensions = {**request.extensions, **extension(call)}
    return call


async def guard(call: CallState, operation: Awaitable[T]) -> T:
    """Await what a wire does; raise errors of httpx, without the frames of the wire.

    Cancellation passes, its frames cut off too: ``asyncio.timeout`` makes it the cause of its TimeoutError.
    In another client than ``AsyncLemcal``, all passes unchanged: it has its own idea of what to show.
    """
    if not call.is_ours:
        return await operation
    handled = sys.exception()
    try:
        return await operation
    except BaseException as error:
        drop_frames(error, handled)
        known = _known(error)
        if known is error:
            raise
        raise known from error


def _known(error: BaseException) -> BaseException:
    """Return what a wire raised as an error of httpx, or as it is if it needs no translation.

    An assertion is a test's, made by a mock transport; an error of this package is addressed to the user.
    """
    if isinstance(error, asyncio.CancelledError) and not is_being_canceled():
        return httpx.TransportError("the transport canceled the request by itself")
    if not isinstance(error, Exception) or isinstance(
        error, httpx.RequestError | LemcalError | AssertionError
    ):
        return error
    text = f"{type(error).__name__}: {error}"
    return httpx.NetworkError(text) if isinstance(error, OSError) else httpx.TransportError(text)


def drop_frames(error: BaseException, handled: BaseException | None) -> None:
    """Cut off the frames below the caller's, of ``error`` and of all that it carries along.

    ``handled`` is what was being handled when the wire was called: it belongs to the user's program,
    and keeps its frames.
    """
    seen: set[int] = set()
    rest = [error]
    while rest:
        each = rest.pop()
        if each is handled or id(each) in seen:
            continue
        seen.add(id(each))
        each.__traceback__ = None
        rest += [linked for linked in (each.__cause__, each.__context__) if linked is not None]
        if isinstance(each, BaseExceptionGroup):
            rest += cast("BaseExceptionGroup[BaseException]", each).exceptions


def no_answer_error(error: httpx.RequestError, call: CallState) -> LemcalError:
    """Return the error in which a call ends whose last attempt ended in ``error``."""
    if isinstance(error, httpx.DecodingError):
        problem = f"the answer cannot be decompressed: {_error_text(error, call)}"
        return ResponseDecodeError(f"{call}: {problem}", call=call.info())
    kind = APITimeoutError if isinstance(error, httpx.TimeoutException) else APIConnectionError
    reason = _reason(error, call)
    where = "" if call.host in reason else f" from {call.host}"
    return kind(
        f"{call}: no answer{where}: {reason}{_attempts_suffix(call)}{_processed_suffix(call)}",
        call=call.info(),
        maybe_processed=call.sent or call.maybe_processed,
    )


def deadline_error(
    call: CallState, problem: str, advice: str = "", *, retry_after: float | None = None
) -> DeadlineExceededError:
    """Return the error for a deadline that has passed, or cannot be met; it tells the last outcome."""
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
    for kind, (operation, name) in _OPERATIONS.items():
        if isinstance(error, kind):
            seconds = call.timeout.get(name)
            return (
                f"{operation} took longer than {'it may' if seconds is None else f'{seconds:g} s'} (timeout=)"
            )
    return _error_text(error, call)


def _error_text(error: BaseException, call: CallState) -> str:
    """Return what an error says, or the first of those behind it that says something."""
    said: BaseException | None = error
    while call.redact is not None and said is not None:
        if text := " ".join(str(said).split()):
            return call.redact(text)
        said = said.__cause__
    return type(error).__name__


def _attempts_suffix(call: CallState) -> str:
    return f" ({call.attempts} attempts, {call.waited:.1f} s waited)" if call.attempts > 1 else ""


def _processed_suffix(call: CallState) -> str:
    if (call.sent or call.maybe_processed) and call.method not in REPEATABLE:
        return "; it may have been processed: look before you send it again"
    return ""


async def answer_httpx2(transport: httpx.AsyncBaseTransport, request: Any) -> Any:
    """Answer a request of httpx2's client as that client expects it."""
    from lemcal_async.transport.httpx2 import answer  # noqa: PLC0415 - it is there for sure

    return await answer(transport, request)
