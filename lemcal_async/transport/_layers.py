"""The layers above a wire: retries by ``RetryPolicy`` and tenacity, and below them the rate limit.

The retry layer reads each response to its end, because a truncated body is a failure to retry, too; streaming
is out of scope. It knows nothing about the rate limit, and does not turn responses into errors. The
rate-limit layer acquires a permit before each request, and reports the outcome to the limiter. Each request
carries its account's key, so one transport stack serves all accounts.

A wire is the transport that sends requests: httpx's, or that of its maintained fork httpx2, which has classes
of the same names. ``transport/httpx2.py`` handles the difference; it is only loaded if httpx2 is in use.
"""

import datetime as dt
import io
import logging
import re
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeAlias, cast

import anyio
import attrs
import httpx
import tenacity

from lemcal_async import events
from lemcal_async._checks import check_type, is_whole
from lemcal_async._compression import SUPPORTED, CompressionError, decompress
from lemcal_async._headers import parse_raw_quota
from lemcal_async._responses import is_missing_hook
from lemcal_async._retry import (
    FailedAttempt,
    RetryPolicy,
    is_refusal,
    wait_after_failure,
    wait_after_response,
)
from lemcal_async.errors import ConfigurationError, LemcalError, RateLimitError, ResponseDecodeError
from lemcal_async.ratelimit import Key, Permit, RateLimiter, WouldWait, default_limiter
from lemcal_async.ratelimit._base import key_of
from lemcal_async.transport._call import (
    CallState,
    SendTracer,
    begin_call,
    call_of,
    deadline_error,
    guard,
    handle_httpx2_request,
)

if TYPE_CHECKING:
    import httpx2

    Wire: TypeAlias = httpx.AsyncBaseTransport | httpx2.AsyncBaseTransport
    """The transport that sends requests, of httpx or httpx2."""
else:
    Wire = httpx.AsyncBaseTransport  # shown in annotations at run time

_logger = logging.getLogger("lemcal_async.retry")

MAX_RESPONSE_BYTES = 64 * 2**20

_ENCODING_HEADERS = {b"content-encoding", b"content-length"}  # wrong for the decompressed body
_DRAIN_LIMIT = 2**20  # bytes that a body may still yield after it was closed
_FATAL = (httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.DecodingError)


def as_httpx(wire: Wire) -> httpx.AsyncBaseTransport:
    """Adapt a transport of either library to httpx; raise ConfigurationError for anything else."""
    if isinstance(wire, httpx.AsyncBaseTransport):
        return wire
    fork = sys.modules.get("httpx2")
    if fork is not None and isinstance(wire, fork.AsyncBaseTransport):
        from lemcal_async.transport.httpx2 import HTTPX2Bridge  # noqa: PLC0415 - already loaded

        return HTTPX2Bridge(wire)
    raise ConfigurationError(
        f"transport= must be an httpx or httpx2 AsyncBaseTransport, not {type(wire).__name__}"
    )


class Layer(httpx.AsyncBaseTransport):
    """A transport that wraps another transport of either library, and enters and closes it."""

    def __init__(self, wire: Wire) -> None:
        self._wire = as_httpx(wire)

    async def __aenter__(self) -> Self:
        await self._wire.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self._wire.__aexit__(exc_type, exc_value, traceback)

    async def aclose(self) -> None:
        """Close the wrapped transport."""
        await self._wire.aclose()


@attrs.frozen
class _Attempt:
    """An attempt's outcome, and the seconds to wait before the next attempt; None if the outcome is final."""

    outcome: httpx.Response | httpx.RequestError
    wait: float | None


class RetryTransport(Layer):
    """Retries requests through any other transport, in any ``httpx.AsyncClient``.

    For every method, it retries a 429 after its ``Retry-After`` (left to the rate-limit layer below, if there
    is one), a 503 with the service's rate-limit headers after the longer of ``Retry-After`` and the backoff,
    and failures for which the wire proves that nothing was sent. It retries other failures and 5xx responses
    for GET and DELETE only. The last attempt's response is returned, or its error raised. If a DELETE may
    have been processed and its retry finds no such hook, it has succeeded: the response is a 204.

    Canceling a request closes the connection of the current attempt and ends any wait.

    Args:
        wire: The wrapped transport, of httpx or httpx2.
        policy: How failed requests are retried. Defaults to ``RetryPolicy()``.
        max_response_bytes: The maximum size of a response after decompression (64 MiB).

    Raises:
        ConfigurationError: If an argument is invalid.
        ResponseDecodeError: By requests, if a response exceeds ``max_response_bytes``.
    """

    def __init__(
        self,
        wire: Wire,
        policy: RetryPolicy | None = None,
        *,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
    ) -> None:
        super().__init__(wire)
        check_type("policy", policy, RetryPolicy)
        if not (is_whole(max_response_bytes) and max_response_bytes >= 1):
            raise ConfigurationError(
                f"max_response_bytes={max_response_bytes!r}: it must be a whole number, at least 1"
            )
        self._policy = policy or RetryPolicy()
        self._max_response_bytes = max_response_bytes

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request, with retries; raises the last attempt's error."""
        if not isinstance(request, httpx.Request):  # pyright: ignore[reportUnnecessaryIsInstance]
            return await handle_httpx2_request(self, request)
        began = time.perf_counter()
        call = begin_call(request)
        policy = call.retry or self._policy
        if policy.attempts > 1:
            await request.aread()  # so that the body can be sent again
        attempt = await self._attempt(request, call, policy)
        if attempt.wait is not None:
            attempt = await self._retry(request, call, policy, attempt)
        response = attempt.outcome
        if isinstance(response, httpx.RequestError):
            raise response
        if (
            response.status_code == 404
            and request.method == "DELETE"
            and call.maybe_processed
            and call.body is not None
            and is_missing_hook(call.body)
        ):
            response = call.last = httpx.Response(204, request=request)
            call.body = b""
        if not call.is_client_call:
            # The response is already buffered when an httpx client starts to measure the time.
            response.elapsed = dt.timedelta(seconds=time.perf_counter() - began)
        return response

    async def _retry(
        self, request: httpx.Request, call: CallState, policy: RetryPolicy, first: _Attempt
    ) -> _Attempt:
        """Retry after a failed first attempt; only now is the retry object created, which takes 25 µs."""
        completed = [first]

        async def attempt() -> _Attempt:
            return completed.pop() if completed else await self._attempt(request, call, policy)

        async def sleep(seconds: float) -> None:
            left = call.time_left()
            if left is not None and seconds > left:
                raise deadline_error(
                    call,
                    f"a retry would have to wait {seconds:.3g} s, but only {max(0.0, left):.3g} s "
                    "are left until the deadline",
                    "allow more time, or try again later",
                    retry_after=seconds,
                )
            call.waited += seconds
            await anyio.sleep(seconds)

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_result(_should_retry),
            # The policy has already counted the attempts.
            stop=tenacity.stop_never,
            wait=_wait,
            before_sleep=lambda state: _report_retry(call, policy, _attempt_of(state)),
            sleep=sleep,
        )
        return await retrying(attempt)

    async def _attempt(self, request: httpx.Request, call: CallState, policy: RetryPolicy) -> _Attempt:
        call.begin_attempt()
        call.tracer = SendTracer(request)
        call.tracer.enter(self._wire)
        try:
            sending = self._wire.handle_async_request(request)
            # The rate-limit layer already guards its wire; any other exception from it is a bug to be shown.
            response = await (sending if isinstance(self._wire, RateLimitTransport) else guard(call, sending))
            await self._receive(response, request, call)
        except httpx.RequestError as error:
            call.sent = not call.tracer.proves_unsent()
            call.last = error
            wait = wait_after_failure(policy, request.method, _failure(error, call), call.begun)
            return _Attempt(error, wait)
        except BaseException:
            call.sent = not call.tracer.proves_unsent()
            raise
        finally:
            call.tracer.remove()
            call.tracer = None
        call.last = response
        status = response.status_code
        if status < 400:
            call.sent = True
            return _Attempt(response, None)
        quota = call.quota = call.quota or parse_raw_quota(response.headers.raw)
        call.sent = not is_refusal(status, quota)
        wait = wait_after_response(policy, request.method, status, quota, call.begun)
        if wait is not None:
            wait = max(0.0, wait - call.paused_for)  # the limiter enforces the rest
        return _Attempt(response, wait)

    async def _receive(self, response: httpx.Response, request: httpx.Request, call: CallState) -> None:
        """Read the body of a response."""
        if response.is_closed:  # already read, by an in-memory transport
            call.body = response.content
            self._check_size(len(call.body), call)
        else:
            await guard(call, self._buffer(response, request, call))
        response.request = request

    async def _buffer(self, response: httpx.Response, request: httpx.Request, call: CallState) -> None:
        """Read the body, and decompress it."""
        content = await self._read(response, call)
        # Check the raw headers first: httpx decodes all headers before it looks one up.
        if b"content-encoding" in {name.lower() for name, _ in response.headers.raw}:
            encoding = response.headers["content-encoding"]
            accepted = re.split(r"[\s,;]+", request.headers.get("accept-encoding", ""))
            if encoding not in SUPPORTED and encoding in accepted:
                response.stream = httpx.ByteStream(content)  # the client accepts it, and can decode it
                call.body = None
                return
            try:
                content = await decompress(encoding, content, self._max_response_bytes)
            except CompressionError as error:
                content, problem = b"", str(error)
                if response.status_code < 400:  # an error status is more useful than this problem
                    raise ResponseDecodeError(
                        f"{call}: {problem}", call=call.info(), status_code=response.status_code
                    ) from None
            # The raw headers, because they may not be ASCII.
            headers = [pair for pair in response.headers.raw if pair[0].lower() not in _ENCODING_HEADERS]
            response.headers = httpx.Headers(headers)
        call.body = content
        # The client's session uses only call.body, and skipping this saves a fifth of the layer's work.
        if not call.is_client_call:
            response.stream = httpx.ByteStream(content)
            response.read()

    async def _read(self, response: httpx.Response, call: CallState) -> bytes:
        """Return the body as sent; its size is limited, so that no server can exhaust the memory."""
        size = 0
        # Not a list of chunks: joining 12 MB at the end would block the event loop for 8 ms.
        body = io.BytesIO()
        stream = cast("httpx.AsyncByteStream", response.stream)
        try:
            async for part in stream:
                size += len(part)
                if size <= self._max_response_bytes:
                    body.write(part)
                elif size <= self._max_response_bytes + _DRAIN_LIMIT:
                    # Closing the stream ends the iteration. Leaving the loop would abandon unfinished
                    # async generators, and trio warns about those.
                    await stream.aclose()
                else:
                    break
        except httpx.RequestError:
            if size <= self._max_response_bytes:
                raise
        finally:
            await stream.aclose()
        self._check_size(size, call)
        return body.getvalue()

    def _check_size(self, size: int, call: CallState) -> None:
        if size > self._max_response_bytes:
            raise ResponseDecodeError(
                f"{call}: the response is over {self._max_response_bytes} bytes; narrow the query, "
                "or raise max_response_bytes",
                call=call.info(),
            )


def _should_retry(attempt: _Attempt) -> bool:
    return attempt.wait is not None


def _wait(state: tenacity.RetryCallState) -> float:
    return _attempt_of(state).wait or 0.0


def _attempt_of(state: tenacity.RetryCallState) -> _Attempt:
    if state.outcome is None:  # tenacity calls this only after an attempt
        raise RuntimeError("no attempt has completed")
    attempt: _Attempt = state.outcome.result()
    return attempt


def _failure(error: httpx.RequestError, call: CallState) -> FailedAttempt:
    if isinstance(error, _FATAL):
        return "fatal"
    return "broken" if call.sent else "unsent"


def _report_retry(call: CallState, policy: RetryPolicy, failed: _Attempt) -> None:
    reason = type(failed.outcome).__name__
    if isinstance(failed.outcome, httpx.Response):
        reason = str(failed.outcome.status_code)
    wait = max(failed.wait or 0.0, call.paused_for)
    _logger.info(
        "%s: %s on attempt %d of %d; retrying in %.3g s", call, reason, call.attempts, policy.attempts, wait
    )
    if events.wanted():
        events.emit(events.Retried(call.method, call.route, call.attempts, reason, wait))


class RateLimitTransport(Layer):
    """Rate-limits requests through any other transport, in any ``httpx.AsyncClient``.

    The layer never retries: below a ``RetryTransport``, a request that receives a 429 keeps its place in the
    queue. A request canceled before it was sent returns its slot; canceled later, the slot counts as used.

    Args:
        wire: The wrapped transport, of httpx or httpx2.
        limiter: The rate limiter. Defaults to the process-wide one.

    Raises:
        ConfigurationError: If an argument is invalid.
        DeadlineExceededError: By requests, if the wait is known to exceed the call's deadline.
        RateLimitError: By requests, while the server refuses the key for longer than a minute.
    """

    def __init__(self, wire: Wire, limiter: RateLimiter | None = None) -> None:
        super().__init__(wire)
        check_type("limiter", limiter, RateLimiter)
        self._limiter = limiter

    @property
    def limiter(self) -> RateLimiter:
        """The rate limiter in use."""
        return self._limiter or default_limiter()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Wait for the request's turn, send it, and report the outcome to the limiter."""
        if not isinstance(request, httpx.Request):  # pyright: ignore[reportUnnecessaryIsInstance]
            return await handle_httpx2_request(self, request)
        call = call_of(request)
        while True:
            response = await self._attempt(call, request)
            if response is not None:
                return response

    async def _attempt(self, call: CallState, request: httpx.Request) -> httpx.Response | None:
        """Return None if the permit expired unsent, because the process was suspended."""
        tracer = call.tracer or SendTracer(request)
        tracer.entered = tracer.permit_expired = False
        call.is_waiting = call.begun > 0  # 0: there is no retry layer, and nothing counts attempts
        permit = await self._acquire(call, request)
        call.is_waiting = False
        tracer.permit = permit
        tracer.enter(self._wire)
        call.refused_permit = None
        try:
            response = await guard(call, self._wire.handle_async_request(request))
        except BaseException as error:
            # Nothing here awaits, so cancellation cannot interrupt it.
            if tracer.proves_unsent():
                permit.unsent()
            else:
                permit.unknown()
            if tracer.permit_expired and isinstance(error, Exception):
                call.refused_permit = permit  # puts the next attempt first in the queue
                return None
            raise
        finally:
            if call.tracer is None:
                tracer.remove()
        call.quota = parse_raw_quota(response.headers.raw)
        call.paused_for = permit.answered(response.status_code, call.quota)
        if response.status_code == 429:
            call.refused_permit = permit
        return response

    async def _acquire(self, call: CallState, request: httpx.Request) -> Permit:
        key = call.key or key_of(str(request.url), request.headers.get("authorization", ""))
        began = anyio.current_time()
        try:
            return await self.limiter.acquire(
                key, priority=call.priority, timeout=call.time_left(), again=call.refused_permit
            )
        except WouldWait as reason:
            wait = reason
        finally:
            call.waited += anyio.current_time() - began
        raise self._refusal(call, key, wait)

    def _refusal(self, call: CallState, key: Key, wait: WouldWait) -> LemcalError:
        if not wait.refused:
            left = max(0.0, call.time_left() or 0.0)
            return deadline_error(
                call,
                f"the rate limiter's queue is {wait.seconds:.3g} s long, but only {left:.3g} s are left "
                "until the deadline",
                "allow more time, or send fewer calls at once",
                retry_after=wait.seconds,
            )
        return RateLimitError(
            f"{call}: the server refuses this key for another {wait.seconds:.0f} s (429); "
            "wait until then, and find out who else uses the key",
            call=call.info(),
            retry_after=wait.seconds,
            limit=self.limiter.snapshot(key).limit,
            remaining=0,
        )
