"""Sends the calls of one account: turns a method and path into the bytes of a 2xx response, or an error.

Adds credentials to requests, applies deadlines to calls, and translates transport failures into the errors
of this package. Decoding the bytes is left to the resources. The transport stack, which a client and its
siblings share, is defined below.
"""

import functools
import json
import logging
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeAlias, TypeVar

import anyio
import attrs
import httpx

from lemcal_async import events
from lemcal_async._auth import Credentials, CredentialSource, Secret
from lemcal_async._concurrency import preload
from lemcal_async._headers import Quota
from lemcal_async._responses import error_from_response
from lemcal_async._retry import RetryPolicy
from lemcal_async._version import __version__
from lemcal_async.errors import APIStatusError, CallInfo, ConfigurationError, LemcalError
from lemcal_async.ratelimit import Key, Priority, RateLimit, RateLimiter
from lemcal_async.transport import PooledTransport, RateLimitTransport, RetryTransport
from lemcal_async.transport._call import CallState, deadline_error, extension, no_response_error
from lemcal_async.transport._layers import Wire

_logger = logging.getLogger("lemcal_async")

USER_AGENT = f"lemcal-async/{__version__}"  # the CDN can block an HTTP library's default one (observed)

_DEFAULT_HEADERS = {
    "Accept": "application/json",
    "Accept-Encoding": "gzip, deflate",
}


class _Content(httpx.ByteStream):
    """A request body that iterates without a generator; trio would warn about one left by a cancellation."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _Once(iter(self))


class _Once(AsyncIterator[bytes]):
    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts = parts

    async def __anext__(self) -> bytes:
        for part in self._parts:
            return part
        raise StopAsyncIteration


_EMPTY = _Content(b"")  # shared, because there may be many queued requests


@attrs.frozen
class Options:
    """The options that can differ between views of one account. Times are in seconds."""

    timeout: dict[str, float | None]
    deadline: float | None
    retry: RetryPolicy
    priority: Priority
    skip_bad_rows: bool
    user_agent: str


@attrs.frozen
class JSONBody:
    """Data to send as a JSON request body. Secret, because it may contain a webhook token."""

    data: Secret[Any]

    def encoded(self) -> bytes:
        """Return the JSON. Raises ConfigurationError if the data is not JSON-serializable."""
        try:
            return json.dumps(self.data.reveal(), allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            problem = str(error)
        raise ConfigurationError(f"json= cannot be written as JSON: {problem}")


@attrs.frozen
class RawResponse:
    """A 2xx response with an unparsed body, and its call."""

    status_code: int
    headers: httpx.Headers
    body: bytes = attrs.field(repr=False)  # may contain a webhook token
    call: CallInfo


T = TypeVar("T")

Decode: TypeAlias = Callable[[RawResponse], Awaitable[T]]
"""Decodes a 2xx response."""


@attrs.frozen
class _Authorization:
    """The values shared by all requests with the same credentials."""

    credentials: Credentials
    headers: httpx.Headers
    key: Key
    redact: Callable[[str], str]


class AccountSession:
    """Sends the calls of one account with one set of options."""

    __slots__ = ("_authorization", "_base_url", "_host", "_source", "options", "stack")

    def __init__(
        self, stack: "TransportStack", base_url: str, source: CredentialSource, options: Options
    ) -> None:
        self.stack = stack
        self.options = options
        self._host = _url(base_url).netloc.decode("ascii")  # fails here on an invalid URL
        self._base_url = base_url
        self._source = source
        self._authorization: _Authorization | None = None

    def __repr__(self) -> str:
        return f"{self._source} at {self._base_url}"

    def for_account(self, source: CredentialSource) -> "AccountSession":
        """Return a session for another account."""
        return AccountSession(self.stack, self._base_url, source, self.options)

    def with_options(self, options: Options) -> "AccountSession":
        """Return a session for the same account with other options."""
        return AccountSession(self.stack, self._base_url, self._source, options)

    @property
    def account(self) -> tuple[str, str] | None:
        """The account's user id and e-mail address, known once any of its sessions has called ``me()``."""
        return self._source.account

    @account.setter
    def account(self, account: tuple[str, str]) -> None:
        self._source.account = account

    def rate_limit(self) -> RateLimit:
        """Return a snapshot of the account's rate limit."""
        return self.stack.limiter.snapshot(self._authorize().key)

    def user_id(self) -> str:
        """Return the account's user id."""
        return self._source.user_id

    def key(self) -> Key:
        """Return the account's rate-limit key."""
        return self._authorize().key

    def send(
        self, method: str, route: str, target: str, decode: Decode[T], body: JSONBody | None = None
    ) -> Coroutine[Any, Any, T]:
        """Send one call, including retries, and decode its response; await the result.

        ``target`` is the path and query below the base URL, ``route`` the path without ids. ``decode``
        receives only 2xx responses, and its time counts toward the deadline. Any other outcome raises an
        error of ``lemcal_async.errors``.
        """
        self.stack.check_open()
        options = self.options
        call = CallState(
            method,
            route,
            priority=options.priority,
            retry=options.retry,
            host=self._host,
            timeout=options.timeout,
        )
        result = self._send(call, target, decode, body)
        if options.deadline is not None:
            result = _with_deadline(options.deadline, call, result)
        if events.wanted() or _logger.isEnabledFor(logging.DEBUG):
            return _report_end(call, _url(self._base_url), result)
        return result

    async def _send(self, call: CallState, target: str, decode: Decode[T], body: JSONBody | None) -> T:
        authorization = self._authorize()
        try:
            response = await self._request(authorization, call, target, body)
            if response.status_code == 401 and (renewed := self._authorize()) is not authorization:
                # The key was rotated while the call was queued: start over, once.
                authorization, call.begun = renewed, 0
                response = await self._request(authorization, call, target, body)
        except httpx.RequestError as error:
            failure = no_response_error(error, call)
        else:
            return await decode(self._success(authorization, call, response))
        # Raised outside the except block, or else its __context__ would be the httpx error, which holds
        # the request with its credentials.
        raise failure

    def _success(
        self, authorization: _Authorization, call: CallState, response: httpx.Response
    ) -> RawResponse:
        """Return a 2xx response; raise the matching error for any other status."""
        if response.is_success:
            return RawResponse(response.status_code, response.headers, call.body or b"", call.info())
        raise error_from_response(
            response.status_code,
            response.headers,
            call.body or b"",
            call.info(),
            redact=authorization.redact,
            quota=call.quota or Quota(),
        )

    def _request(
        self, authorization: _Authorization, call: CallState, target: str, body: JSONBody | None
    ) -> Coroutine[Any, Any, httpx.Response]:
        # Not async itself: every garbage collection traverses a suspended coroutine and all it references.
        call.key = authorization.key
        call.redact = authorization.redact
        url = _url(self._base_url + target)
        content = Secret(b"" if body is None else body.encoded())
        request = httpx.Request(
            call.method,
            url,
            headers=authorization.headers,
            # Passed as a stream: with content=, httpx would look for headers to add, which takes longer than
            # all the rest.
            stream=_Content(content.reveal()) if content.reveal() else _EMPTY,
            extensions={"timeout": self.options.timeout, **extension(call)},
        )
        if body is not None:
            request.headers["Content-Type"] = "application/json"
        if body is not None or call.method in ("POST", "PUT", "PATCH"):
            request.headers["Content-Length"] = str(len(content.reveal()))
        request.read()  # so that every wire can use request.content
        return self.stack.entry.handle_async_request(request)

    def _authorize(self) -> _Authorization:
        credentials = self._source.current()
        if self._authorization is None or self._authorization.credentials is not credentials:
            headers = httpx.Headers(
                {
                    "Host": self._host,
                    "User-Agent": self.options.user_agent,
                    **_DEFAULT_HEADERS,
                    "Authorization": credentials.authorization.reveal(),
                }
            )
            key = Key(self._base_url, credentials.digest)
            self._authorization = _Authorization(credentials, headers, key, credentials.redact)
        return self._authorization


async def _with_deadline(deadline: float, call: CallState, result: Coroutine[Any, Any, T]) -> T:
    """Await a call's result for at most ``deadline`` seconds, including waits, retries and decoding."""
    with anyio.move_on_after(deadline) as scope:
        call.deadline = scope.deadline
        value = await result
        # Decoding without a checkpoint can overrun the deadline. The result of a write is returned anyway.
        if call.method != "GET" or anyio.current_time() <= scope.deadline:
            return value
    is_answered = isinstance(call.last, httpx.Response) and call.last.is_success
    what = "the response arrived, but was not decoded" if is_answered else "no response"
    advice = "allow more time" if call.attempts else "allow more time, or send fewer calls at once"
    raise deadline_error(call, f"{what} within the deadline of {deadline:.3g} s", advice)


async def _report_end(call: CallState, server: httpx.URL, result: Coroutine[Any, Any, T]) -> T:
    """Await a call's result, then log its end and emit a CallEnded event."""
    began = anyio.current_time()
    status_code: int | None = None
    error: str | None = "Cancelled"
    is_status = False  # whether a status code ended the call
    try:
        value = await result
        status_code, error, is_status = _status_of(call), None, True
    except Exception as problem:
        status_code = problem.status_code if isinstance(problem, LemcalError) else _status_of(call)
        error, is_status = type(problem).__name__, isinstance(problem, APIStatusError)
        raise
    finally:
        seconds = anyio.current_time() - began
        if is_status and call.attempts:
            _logger.debug("%s: %s on attempt %d", call, status_code, call.attempts)
        else:
            _logger.debug("%s: %s; attempts: %d", call, error, call.attempts)
        events.emit(
            events.CallEnded(
                call.method,
                call.route,
                server.host,
                server.port or {"https": 443, "http": 80}[server.scheme],
                status_code,
                error,
                call.attempts,
                call.waited,
                seconds,
            )
        )
    return value


def _status_of(call: CallState) -> int | None:
    return call.last.status_code if isinstance(call.last, httpx.Response) else None


@functools.lru_cache(maxsize=1024)
def _url(text: str) -> httpx.URL:
    """Parse a URL, with a cache: calls use the same few URLs over and over."""
    try:
        return httpx.URL(text)
    except httpx.InvalidURL as error:
        problem = str(error)
    raise ConfigurationError(f"nothing was sent: invalid URL: {problem}")


class TransportStack:
    """The transport layers: retries, then the rate limit, then a wire. Closes only the default wire."""

    def __init__(
        self,
        wire: Wire | None,
        limiter: RateLimiter | None,
        max_response_bytes: int,
    ) -> None:
        preload()
        self._owned: PooledTransport | None = None
        self._limiter = limiter
        self._max_response_bytes = max_response_bytes
        self._used = False
        self._closed = False
        if wire is None:
            wire = self._owned = PooledTransport()
        self._build(wire)

    def _build(self, wire: Wire) -> None:
        self._limit = RateLimitTransport(wire, self._limiter)
        self.entry = RetryTransport(self._limit, max_response_bytes=self._max_response_bytes)

    @property
    def limiter(self) -> RateLimiter:
        """The rate limiter in use."""
        return self._limit.limiter

    def check_open(self) -> None:
        """Raise ConfigurationError if closed. Call this before each use of ``entry``."""
        if self._closed:
            raise ConfigurationError(
                "nothing was sent: this client or its parent is closed; create a new one"
            )
        self._used = True

    def reopen(self) -> None:
        """Make the stack usable again after ``aclose``, with a new default wire if it had one."""
        if self._closed and self._owned is not None:
            self._owned = PooledTransport()
            self._build(self._owned)
        self._closed = False

    async def aclose(self) -> None:
        """Close the default wire. Idempotent."""
        self._closed = True
        if self._owned is not None:
            await self._owned.aclose()

    def __del__(self) -> None:
        # No I/O here: the event loop may be gone.
        if self._owned is not None and self._used and not self._closed:
            warnings.warn(
                "an AsyncLemcal was not closed; use `async with` or await aclose()",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )
