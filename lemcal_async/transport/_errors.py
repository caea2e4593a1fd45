"""Why a call got no answer: exceptions of any wire, turned into one line that names the call.

A wire may be any HTTP library. What it raises becomes an error of httpx at once, and no traceback leads
back into it: frames of h11, httpcore or anyio hold the headers, with the credentials in them.
"""

import asyncio
import sys
from collections.abc import Awaitable
from typing import TypeVar, cast

import httpx

from lemcal_async._concurrency import is_being_canceled
from lemcal_async._responses import server_text
from lemcal_async._retry import REPEATABLE
from lemcal_async.errors import (
    APIConnectionError,
    APITimeoutError,
    DeadlineExceededError,
    LemcalError,
    ResponseDecodeError,
)
from lemcal_async.transport._call import CallState

T = TypeVar("T")

_OPERATIONS: dict[type[httpx.RequestError], tuple[str, str]] = {
    httpx.ConnectTimeout: ("connecting", "connect"),
    httpx.ReadTimeout: ("waiting for the answer", "read"),
    httpx.WriteTimeout: ("sending", "write"),
    httpx.PoolTimeout: ("waiting for a connection", "pool"),
}


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
