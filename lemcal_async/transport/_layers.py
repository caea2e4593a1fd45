"""The layers above a wire: retries where ``RetryPolicy`` says so, with tenacity, below them the rate limit.

The retry layer reads each answer to its end, because a body that breaks off is a failure to be retried too;
streaming is out of scope. It knows nothing of the rate limit, and makes no errors of answers. The rate-limit
layer asks the limiter before each request, and reports how the request ended. The request says whose budget
it draws on, so one stack serves every account.

A wire is a transport of httpx or of httpx2, its maintained fork, which has the same classes, and they are not
those of httpx. What knows that is in ``transport/httpx2.py``, which is only loaded for who uses it.
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
from lemcal_async._compression import KNOWN, CompressionError, decompress
from lemcal_async._headers import parse_raw_quota
from lemcal_async._responses import is_missing_hook
from lemcal_async._retry import Failure, RetryPolicy, is_refusal, wait_after_answer, wait_after_failure
from lemcal_async.errors import ConfigurationError, LemcalError, RateLimitError, ResponseDecodeError
from lemcal_async.ratelimit import Key, Permit, RateLimiter, WouldWait, default_limiter
from lemcal_async.ratelimit._base import key_of
from lemcal_async.transport._call import (
    CallState,
    SendTracer,
    answer_httpx2,
    begin_call,
    call_of,
    deadline_error,
    guard,
)

if TYPE_CHECKING:
    import httpx2

    Wire: TypeAlias = httpx.AsyncBaseTransport | httpx2.AsyncBaseTransport
    """What sends requests: a transport of httpx, or of its maintained fork."""
else:
    Wire = httpx.AsyncBaseTransport  # which annotations show while the program runs

_logger = logging.getLogger("lemcal_async.retry")

MAX_RESPONSE_BYTES = 64 * 2**20

_OF_THE_ENCODING = {b"content-encoding", b"content-length"}  # not true of the decompressed body
_RUN_OUT = 2**20  # bytes that may still come out of a body after it was closed
_FATAL = (httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.DecodingError)


def as_httpx(wire: Wire) -> httpx.AsyncBaseTransport:
    """Return a transport of either library as one of httpx; raise ConfigurationError for anything else."""
    if isinstance(wire, httpx.AsyncBaseTransport):
        return wire
    fork = sys.modules.get("httpx2")
    if fork is not None and isinstance(wire, fork.AsyncBaseTransport):
        from lemcal_async.transport.httpx2 import HTTPX2Bridge  # noqa: PLC0415 - it is there for sure

        return HTTPX2Bridge(wire)
    raise ConfigurationError(
        f"transport= must be of type AsyncBaseTransport, httpx's or httpx2's, not {type(wire).__name__}"
    )


class Layer(httpx.AsyncBaseTransport):
    """A transport above another one, of either library, which it enters and closes with itself."""

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
        """Close the transport below."""
        await self._wire.aclose()


@attrs.frozen
class _Attempt:
    """How one attempt ended, and the seconds to wait before the next; None if there is none."""

    outcome: httpx.Response | httpx.RequestError
    wait: float | None


class RetryTransport(Layer):
    """Retries around any other transport, in any ``httpx.AsyncClient``.

    Retried for every method are a 429, after its ``Retry-After`` (left to the rate-limit layer below, if
    there is one), a 503 with the service's rate-limit headers, after the longer of ``Retry-After`` and the
    backoff, and failures of which the wire proves that nothing was sent. Any other failure or 5xx is retried
    for GET and DELETE only. What the last attempt gave is returned or raised. A DELETE has succeeded, and
    returns a 204, if an earlier attempt may have been processed and a later one finds no such hook.

    Canceled at any moment, it leaves the connection of the attempt closed and no wait behind.

    Args:
        wire: The transport below, of httpx or of httpx2.
        policy: How often a request is tried; if left out, ``RetryPolicy()``.
        max_response_bytes: The most that an answer may hold, decompressed (64 MiB).

    Raises:
        ConfigurationError: If ``wire`` is no transport.
        ResponseDecodeError: By its requests, for an answer of more than ``max_response_bytes``.
    """

    def __init__(
        self,
        wire: Wire,
        policy: RetryPolicy | None = None,
        *,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
    ) -> None:
        super().__init__(wire)
        self._policy = policy or RetryPolicy()
        self._max_response_bytes = max_response_bytes

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request until an answer stands; raises what the last attempt raised."""
        if not isinstance(request, httpx.Request):  # pyright: ignore[reportUnnecessaryIsInstance]
            return await answer_httpx2(self, request)
        began = time.perf_counter()
        call = begin_call(request)
        policy = call.retry or self._policy
        if policy.attempts > 1:
            await request.aread()  # makes a body that can be sent again
        attempt = await self._attempt(request, call, policy)
        if attempt.wait is not None:
            attempt = await self._go_on(request, call, policy, attempt)
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
        if not call.is_ours:
            # Buffered, the answer is there before a client of httpx starts its own clock.
            response.elapsed = dt.timedelta(seconds=time.perf_counter() - began)
        return response

    async def _go_on(
        self, request: httpx.Request, call: CallState, policy: RetryPolicy, first: _Attempt
    ) -> _Attempt:
        """Try again after a failed first attempt; only now is a retry object worth its 25 µs."""
        ended = [first]

        async def attempt() -> _Attempt:
            return ended.pop() if ended else await self._attempt(request, call, policy)

        async def sleep(seconds: float) -> None:
            left = call.time_left()
            if left is not None and seconds > left:
                raise deadline_error(
                    call,
                    f"a retry would have to wait {seconds:.3g} s, and only {max(0.0, left):.3g} s "
                    "are left of the deadline",
                    "allow more, or try again later",
                    retry_after=seconds,
                )
            call.waited += seconds
            await anyio.sleep(seconds)

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_result(_is_to_be_repeated),
            # How many attempts are allowed is part of the policy's answer.
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
            # The layer below guards itself; what else it raises is a fault of ours, to be seen as it is.
            response = await (sending if isinstance(self._wire, RateLimitTransport) else guard(call, sending))
            await self._take_in(response, request, call)
        except httpx.RequestError as error:
            call.sent = not call.tracer.proves_unsent()
            call.last = error
            wait = wait_after_failure(policy, request.method, _failure(error, call), call.attempts)
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
        wait = wait_after_answer(policy, request.method, status, quota, call.attempts)
        if wait is not None:
            wait = max(0.0, wait - call.held)  # the limiter sees to the rest
        return _Attempt(response, wait)

    async def _take_in(self, response: httpx.Response, request: httpx.Request, call: CallState) -> None:
        """Read the body of a response."""
        if response.is_closed:  # read already: a transport that answers from memory
            call.body = response.content
            self._check_size(len(call.body), call)
        else:
            await guard(call, self._buffer(response, request, call))
        response.request = request

    async def _buffer(self, response: httpx.Response, request: httpx.Request, call: CallState) -> None:
        """Read the body, and decompress it."""
        content = await self._read(response, call)
        # Looked for in the raw headers first: httpx tries to decode them all before it looks for one.
        if b"content-encoding" in {name.lower() for name, _ in response.headers.raw}:
            encoding = response.headers["content-encoding"]
            asked_for = re.split(r"[\s,;]+", request.headers.get("accept-encoding", ""))
            if encoding not in KNOWN and encoding in asked_for:
                response.stream = httpx.ByteStream(content)  # the client asked for it, and can read it
                call.body = None
                return
            try:
                content = await decompress(encoding, content, self._max_response_bytes)
            except CompressionError as error:
                content, problem = b"", str(error)
                if response.status_code < 400:  # of a failure, the status says most
                    raise ResponseDecodeError(
                        f"{call}: {problem}", call=call.info(), status_code=response.status_code
                    ) from None
            # Raw, because headers need not be ASCII.
            headers = [pair for pair in response.headers.raw if pair[0].lower() not in _OF_THE_ENCODING]
            response.headers = httpx.Headers(headers)
        call.body = content
        if (
            not call.is_ours
        ):  # the session needs no more than the body, and this is a fifth of the layer's work
            response.stream = httpx.ByteStream(content)
            response.read()

    async def _read(self, response: httpx.Response, call: CallState) -> bytes:
        """Return the body as it was sent; bounded, so that no server can fill the memory."""
        size = 0
        # Not a list to be joined in the end: that would take 8 ms for 12 MB, all in one go.
        body = io.BytesIO()
        stream = cast("httpx.AsyncByteStream", response.stream)
        try:
            async for part in stream:
                size += len(part)
                if size <= self._max_response_bytes:
                    body.write(part)
                elif size <= self._max_response_bytes + _RUN_OUT:
                    # Closed under its reader, the body ends by itself. Generators that were left half
                    # way would be garbage, which trio warns of.
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
                f"{call}: the answer is over {self._max_response_bytes} bytes; narrow the question, "
                "or raise max_response_bytes",
                call=call.info(),
            )


def _is_to_be_repeated(attempt: _Attempt) -> bool:
    return attempt.wait is not None


def _wait(state: tenacity.RetryCallState) -> float:
    return _attempt_of(state).wait or 0.0


def _attempt_of(state: tenacity.RetryCallState) -> _Attempt:
    if state.outcome is None:  # tenacity asks after an attempt only
        raise RuntimeError("there was no attempt")
    attempt: _Attempt = state.outcome.result()
    return attempt


def _failure(error: httpx.RequestError, call: CallState) -> Failure:
    if isinstance(error, _FATAL):
        return "fatal"
    return "broken" if call.sent else "unsent"


def _report_retry(call: CallState, policy: RetryPolicy, ended: _Attempt) -> None:
    what = type(ended.outcome).__name__
    if isinstance(ended.outcome, httpx.Response):
        what = str(ended.outcome.status_code)
    wait = max(ended.wait or 0.0, call.held)
    _logger.info(
        "%s: %s at attempt %d of %d; the next in %.3g s", call, what, call.attempts, policy.attempts, wait
    )
    if events.wanted():
        events.emit(events.Retried(call.method, call.route, call.attempts, what, wait))


class RateLimitTransport(Layer):
    """Limits the requests through any other transport, in any ``httpx.AsyncClient``.

    The layer never retries: below a ``RetryTransport``, a refused request keeps its place in the queue.
    Canceled before the request has left, it gives its slot back; canceled later, the slot counts as used.

    Args:
        wire: The transport below, of httpx or of httpx2.
        limiter: The rate limiter; if left out, the process-wide one.

    Raises:
        ConfigurationError: If ``wire`` is no transport.
        DeadlineExceededError: By its requests, if the wait is known to be longer than the call's deadline.
        RateLimitError: By its requests, while the server refuses the key for longer than a minute.
    """

    def __init__(self, wire: Wire, limiter: RateLimiter | None = None) -> None:
        super().__init__(wire)
        self._limiter = limiter

    @property
    def limiter(self) -> RateLimiter:
        """The limiter in use."""
        return self._limiter or default_limiter()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Wait for the request's turn, send it, and report how it ended."""
        if not isinstance(request, httpx.Request):  # pyright: ignore[reportUnnecessaryIsInstance]
            return await answer_httpx2(self, request)
        call = call_of(request)
        while True:
            response = await self._attempt(call, request)
            if response is not None:
                return response

    async def _attempt(self, call: CallState, request: httpx.Request) -> httpx.Response | None:
        """Return None if the permit ran out before the request left, because this process stood still."""
        tracer = call.tracer or SendTracer(request)
        tracer.entered = tracer.lapsed = False
        permit = await self._acquire(call, request)
        tracer.permit = permit
        tracer.enter(self._wire)
        call.refused = None
        try:
            response = await guard(call, self._wire.handle_async_request(request))
        except BaseException as error:
            # Nothing in here waits, so it holds under cancellation too.
            if tracer.proves_unsent():
                permit.unsent()
            else:
                permit.unknown()
            if tracer.lapsed and isinstance(error, Exception):
                call.refused = permit  # the next attempt goes first
                return None
            raise
        finally:
            if call.tracer is None:
                tracer.remove()
        call.quota = parse_raw_quota(response.headers.raw)
        call.held = permit.answered(response.status_code, call.quota)
        if response.status_code == 429:
            call.refused = permit
        return response

    async def _acquire(self, call: CallState, request: httpx.Request) -> Permit:
        key = call.key or key_of(str(request.url), request.headers.get("authorization", ""))
        asked = anyio.current_time()
        try:
            return await self.limiter.acquire(
                key, priority=call.priority, timeout=call.time_left(), again=call.refused
            )
        except WouldWait as reason:
            wait = reason
        finally:
            call.waited += anyio.current_time() - asked
        raise self._refusal(call, key, wait)

    def _refusal(self, call: CallState, key: Key, wait: WouldWait) -> LemcalError:
        if not wait.refused:
            left = max(0.0, call.time_left() or 0.0)
            return deadline_error(
                call,
                f"the rate limit's queue is {wait.seconds:.3g} s long, and only {left:.3g} s are left "
                "of the deadline",
                "allow more, or send fewer calls at once",
                retry_after=wait.seconds,
            )
        return RateLimitError(
            f"{call}: the server refuses this key for another {wait.seconds:.0f} s (429); "
            "do not call before that, and find out who else uses the key",
            call=call.info(),
            retry_after=wait.seconds,
            limit=self.limiter.snapshot(key).limit,
            remaining=0,
        )
