"""The retry layer: tries a request again where ``RetryPolicy`` says so, with tenacity.

It reads each answer whole, because a body that breaks half-way is a failure to be retried too;
streaming is out of scope. It neither knows the rate limit nor makes errors of answers.
"""

import io
import logging
from typing import cast

import anyio
import attrs
import httpx
import tenacity
from anyio.lowlevel import checkpoint

from lemcal_async import events
from lemcal_async._headers import parse_quota
from lemcal_async._retry import Failure, RetryPolicy
from lemcal_async.errors import DeadlineExceededError, ResponseDecodeError
from lemcal_async.transport._call import CallState, begin_call

logger = logging.getLogger("lemcal_async.retry")

MAX_RESPONSE_BYTES = 64 * 2**20

# A proxy that fails has not passed the request on; the others never got to send it.
_UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)
_OF_THE_ENCODING = {"content-encoding", "content-length"}  # not true of the decoded body
_PIECE = 2**10  # bytes that are decoded at once: a bomb makes a million of them
_TURN = 2**21  # bytes that may come of it before others get their turn
_RUN_OUT = 2**20  # bytes that may still come out of a body after it was closed
_FATAL = (httpx.LocalProtocolError, httpx.UnsupportedProtocol)


@attrs.frozen
class _Attempt:
    """How one attempt ended, and the seconds to wait before the next; None if there is none."""

    outcome: httpx.Response | httpx.RequestError
    wait: float | None


class RetryTransport(httpx.AsyncBaseTransport):
    """Retries by ``policy`` around any other transport, in any ``httpx.AsyncClient``.

    Retried are: 429 by its ``Retry-After`` (left to the rate-limit layer below, if there is one),
    503 by the longer of that and the backoff, failures to connect: for every method; broken
    connections and answers and other 5xx: for GET and DELETE only. What the last attempt gave is
    returned or raised. A DELETE whose retry is answered 404 has succeeded, and returns a 204.

    An answer of more than ``max_response_bytes`` (decoded) raises ResponseDecodeError. Cancelled
    at any moment, it leaves the connection of the attempt closed and no wait behind.
    """

    def __init__(
        self,
        wire: httpx.AsyncBaseTransport,
        policy: RetryPolicy | None = None,
        *,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
    ) -> None:
        self._wire = wire
        self._policy = policy or RetryPolicy()
        self._max_response_bytes = max_response_bytes

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request until an answer stands; raises what the last attempt raised."""
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
        if response.status_code == 404 and request.method == "DELETE" and call.attempts > 1:
            return httpx.Response(204, request=request)
        return response

    async def aclose(self) -> None:
        """Close the transport below."""
        await self._wire.aclose()

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
                raise DeadlineExceededError(
                    f"{call}: a retry would have to wait {seconds:.3g} s, and only {max(0.0, left):.3g} s "
                    "are left of the deadline; allow more, or try again later",
                    call=call.info(),
                    retry_after=seconds,
                )
            call.waited += seconds
            await anyio.sleep(seconds)

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_result(_is_to_be_repeated),
            # How many attempts are allowed is part of the policy's answer.
            stop=tenacity.stop_never,
            wait=_wait,
            before_sleep=lambda state: _tell(call, policy, _attempt_of(state)),
            sleep=sleep,
        )
        return await retrying(attempt)

    async def _attempt(self, request: httpx.Request, call: CallState, policy: RetryPolicy) -> _Attempt:
        call.attempts += 1
        call.held = 0.0
        try:
            response = await self._read(await self._wire.handle_async_request(request), request, call)
        except httpx.RequestError as error:
            return _Attempt(error, policy.wait_after_failure(request.method, _failure(error), call.attempts))
        wait = None
        if response.status_code >= 429:
            retry_after = parse_quota(response.headers).retry_after
            wait = policy.wait_after_answer(request.method, response.status_code, retry_after, call.attempts)
            if wait is not None:
                wait = max(0.0, wait - call.held)  # that much is seen to by the limiter
        return _Attempt(response, wait)

    async def _read(
        self, response: httpx.Response, request: httpx.Request, call: CallState
    ) -> httpx.Response:
        """Return the response with its body read; bounded, so that no server can fill the memory."""
        if response.is_closed:  # read already: a transport that answers from memory
            self._check_size(len(response.content), call)
            return response
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
        content = body.getvalue()
        if "content-encoding" in response.headers:
            content = await self._decoded(content, response.headers, request, call)
            response.headers = httpx.Headers(
                [(k, v) for k, v in response.headers.multi_items() if k not in _OF_THE_ENCODING]
            )
        response.stream = httpx.ByteStream(content)
        response.request = request
        response.read()
        return response

    async def _decoded(
        self, encoded: bytes, headers: httpx.Headers, request: httpx.Request, call: CallState
    ) -> bytes:
        """Undo the content encoding, a piece at a time, and stop where the result is too large."""
        if "," in headers["content-encoding"]:
            # Each layer multiplies by up to a thousand what a single piece becomes.
            raise ResponseDecodeError(f"{call}: the answer is compressed more than once", call=call.info())
        pieces = (encoded[at : at + _PIECE] for at in range(0, len(encoded), _PIECE))
        response = httpx.Response(200, headers=headers, content=pieces, request=request)
        size = turns = 0
        decoded = io.BytesIO()
        for part in response.iter_bytes():
            size += len(part)
            self._check_size(size, call)
            decoded.write(part)
            if size // _TURN > turns:  # others get theirs: 12 MB take 30 ms
                turns = size // _TURN
                await checkpoint()
        return decoded.getvalue()

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


def _failure(error: httpx.RequestError) -> Failure:
    if isinstance(error, _UNSENT):
        return "unsent"
    return "fatal" if isinstance(error, _FATAL) else "broken"


def _tell(call: CallState, policy: RetryPolicy, ended: _Attempt) -> None:
    what = type(ended.outcome).__name__
    if isinstance(ended.outcome, httpx.Response):
        what = str(ended.outcome.status_code)
    wait = max(ended.wait or 0.0, call.held)
    logger.info(
        "%s: %s at attempt %d of %d; the next in %.3g s", call, what, call.attempts, policy.attempts, wait
    )
    if events.wanted():
        events.emit(events.Retried(call.method, call.route, call.attempts, what, wait))
