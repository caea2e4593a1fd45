"""The layers that a client and its siblings share, and whether they are still open.

MERGED [exchange] One call of one account: from method and path to the bytes of a success, or to an error.

Here requests get their credentials, calls their deadline, and what httpx raises becomes an error
of this package. What the bytes mean is left to the resources.
"""

import functools
import json
import logging
import warnings
from collections.abc import Coroutine
from typing import Any

import anyio
import attrs
import httpx

from lemcal_async import events
from lemcal_async._auth import Credentials, CredentialSource, Secret
from lemcal_async._headers import parse_quota
from lemcal_async._responses import error_from_response
from lemcal_async._retry import REPEATABLE, RetryPolicy
from lemcal_async._version import __version__
from lemcal_async.errors import (
    APIConnectionError,
    APITimeoutError,
    CallInfo,
    ConfigurationError,
    DeadlineExceededError,
    LemcalError,
)
from lemcal_async.ratelimit import Key, Priority, RateLimit, RateLimiter
from lemcal_async.transport import PooledTransport, RateLimitTransport, RetryTransport
from lemcal_async.transport._call import CallState, extension


class TransportStack:
    """Retries around the rate limit around the wire. The default wire is ours to close, others not."""

    def __init__(
        self,
        wire: httpx.AsyncBaseTransport | None,
        limiter: RateLimiter | None,
        max_response_bytes: int,
    ) -> None:
        self._owned: PooledTransport | None = None
        self._max_response_bytes = max_response_bytes
        if wire is None:
            wire = self._owned = PooledTransport()
        self._limit = RateLimitTransport(wire, limiter)
        self.entry = RetryTransport(self._limit, max_response_bytes=max_response_bytes)
        self._used = False
        self._closed = False

    @property
    def limiter(self) -> RateLimiter:
        """The limiter in use."""
        return self._limit.limiter

    def check_open(self) -> None:
        """Raise ConfigurationError after ``aclose``; to be called before each use of ``entry``."""
        if self._closed:
            raise ConfigurationError(
                "nothing was sent: this client, or the one that it was made from, is closed; make a new one"
            )
        self._used = True

    def reopen(self) -> None:
        """Make it usable again after ``aclose``, on a new wire if the old one was ours."""
        if self._closed and self._owned is not None:
            wire = self._owned = PooledTransport()
            self._limit = RateLimitTransport(wire, self.limiter)
            self.entry = RetryTransport(self._limit, max_response_bytes=self._max_response_bytes)
        self._closed = False

    async def aclose(self) -> None:
        """Close the wire, if it is ours. Idempotent."""
        self._closed = True
        if self._owned is not None:
            await self._owned.aclose()

    def __del__(self) -> None:
        # No I/O here: there may be no event loop any more.
        if self._owned is not None and self._used and not self._closed:
            warnings.warn(
                "an AsyncLemcal was not closed; use `async with`, or await its aclose()",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )


logger = logging.getLogger("lemcal_async")

_DEFAULT_HEADERS = {
    "User-Agent": f"lemcal-async/{__version__}",  # a library's own can be blocked by the CDN (observed)
    "Accept": "application/json",
    "Accept-Encoding": "gzip, deflate",
}
_EMPTY = httpx.ByteStream(b"")  # for all who wait in the queue, because they are many


@attrs.frozen
class Options:
    """What one view of an account differs in. Times in seconds."""

    timeout: dict[str, float | None]
    deadline: float | None
    retry: RetryPolicy
    priority: Priority
    skip_bad_rows: bool


@attrs.frozen
class JSONBody:
    """What a request carries, to be written as JSON: a secret, for it may hold a webhook token."""

    data: Secret[Any]

    def encoded(self) -> bytes:
        """Return the JSON; ConfigurationError if it cannot be written as that."""
        try:
            return json.dumps(self.data.reveal(), allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            problem = str(error)
        raise ConfigurationError(f"json= cannot be written as JSON: {problem}")


@attrs.frozen
class Answer:
    """A success: its body, undecoded, and the call it belongs to."""

    status_code: int
    headers: httpx.Headers
    body: bytes = attrs.field(repr=False)  # it may hold the token of a webhook
    call: CallInfo


@attrs.frozen
class _Authorization:
    """What is the same for all requests with the same credentials."""

    credentials: Credentials
    headers: httpx.Headers
    key: Key


class AccountSession:
    """Sends the calls of one account with one set of options."""

    __slots__ = ("_base_url", "_signature", "_source", "options", "stack")

    def __init__(
        self, stack: TransportStack, base_url: str, source: CredentialSource, options: Options
    ) -> None:
        self.stack = stack
        self.options = options
        _url(base_url)  # refused now rather than by each call
        self._base_url = base_url
        self._source = source
        self._signature: _Authorization | None = None

    def __repr__(self) -> str:
        return f"{self._source} at {self._base_url}"

    def for_account(self, source: CredentialSource) -> "AccountSession":
        """Return the same for another account."""
        return AccountSession(self.stack, self._base_url, source, self.options)

    def with_options(self, options: Options) -> "AccountSession":
        """Return the same account with other options."""
        return AccountSession(self.stack, self._base_url, self._source, options)

    @property
    def account(self) -> tuple[str, str] | None:
        """The account's user id and e-mail address, once ``me()`` has told them to one of its sessions."""
        return self._source.account

    @account.setter
    def account(self, account: tuple[str, str]) -> None:
        self._source.account = account

    def rate_limit(self) -> RateLimit:
        """Return what is known of the account's budget."""
        return self.stack.limiter.snapshot(self._authorize().key)

    def user_id(self) -> str:
        """Return the user id of the credentials in use now."""
        return self._authorize().credentials.user_id

    def key(self) -> Key:
        """Return the name of the account's budget."""
        return self._authorize().key

    def send(
        self, method: str, route: str, target: str, body: JSONBody | None = None
    ) -> Coroutine[Any, Any, Answer]:
        """Send one call, through all its retries; to be awaited.

        ``target`` is path and query below the base URL, ``route`` the path without its ids.
        Raises the errors of ``lemcal_async.errors`` for everything but a 2xx.
        """
        self.stack.check_open()
        options = self.options
        call = CallState(method, route, priority=options.priority, retry=options.retry)
        answer = self._send(call, target, body)
        if options.deadline is not None:
            answer = _with_deadline(options.deadline, call, answer)
        return _emit_call_ended(call, _url(self._base_url), answer) if events.wanted() else answer

    async def _send(self, call: CallState, target: str, body: JSONBody | None) -> Answer:
        signature = self._authorize()
        response: httpx.Response | APIConnectionError
        try:
            response = await self.stack.entry.handle_async_request(
                self._request(signature, call, target, body)
            )
            if response.status_code == 401 and (renewed := self._authorize()) is not signature:
                # The key was rotated while the call was queued: it starts over, once.
                signature, call.attempts = renewed, 0
                response = await self.stack.entry.handle_async_request(
                    self._request(signature, call, target, body)
                )
        except httpx.RequestError as error:
            response = _failure(error, call, signature.credentials)
        if isinstance(response, APIConnectionError):
            # Out here, because what httpx raised holds the request with its credentials, and
            # inside the except block it would come along as the context.
            raise response
        logger.debug("%s: %d at attempt %d", call, response.status_code, call.attempts)
        if not response.is_success:
            quota = parse_quota(response.headers)
            raise error_from_response(
                response.status_code,
                response.headers,
                response.content,
                call.info(),
                redact=signature.credentials.redact,
                retry_after=quota.retry_after,
                limit=quota.limit,
                remaining=quota.remaining,
            )
        return Answer(response.status_code, response.headers, response.content, call.info())

    def _authorize(self) -> _Authorization:
        credentials = self._source.current()
        if self._signature is None or self._signature.credentials is not credentials:
            host = _url(self._base_url).netloc.decode("ascii")
            headers = httpx.Headers(
                {"Host": host, **_DEFAULT_HEADERS, "Authorization": credentials.authorization.reveal()}
            )
            self._signature = _Authorization(credentials, headers, Key(self._base_url, credentials.digest))
        return self._signature

    def _request(
        self, signature: _Authorization, call: CallState, target: str, body: JSONBody | None
    ) -> httpx.Request:
        call.key = signature.key
        content = b"" if body is None else body.encoded()
        request = httpx.Request(
            call.method,
            _url(self._base_url + target),
            headers=signature.headers,
            # Given as a stream, for httpx would look for headers to add, which takes longer than all else.
            stream=httpx.ByteStream(content) if content else _EMPTY,
            extensions={"timeout": self.options.timeout, **extension(call)},
        )
        if body is not None:
            request.headers["Content-Type"] = "application/json"
        if body is not None or call.method in ("POST", "PUT", "PATCH"):
            request.headers["Content-Length"] = str(len(content))
        request.read()  # so that every wire finds its content
        return request


async def _with_deadline(deadline: float, call: CallState, answer: Coroutine[Any, Any, Answer]) -> Answer:
    """Await an answer for so many seconds, waits and retries included."""
    with anyio.move_on_after(deadline) as scope:
        call.deadline = scope.deadline
        return await answer
    raise DeadlineExceededError(
        f"{call}: no answer within the deadline of {deadline:.3g} s{_so_far(call)}{_warning(call)}",
        call=call.info(),
    )


async def _emit_call_ended(call: CallState, server: httpx.URL, answer: Coroutine[Any, Any, Answer]) -> Answer:
    """Await an answer, and tell how the call ended to those who listen."""
    began = anyio.current_time()
    status: int | None = None
    error: str | None = "Cancelled"
    try:
        result = await answer
        status, error = result.status_code, None
    except Exception as problem:
        status = problem.status_code if isinstance(problem, LemcalError) else None
        error = type(problem).__name__
        raise
    finally:
        seconds = anyio.current_time() - began
        events.emit(
            events.CallEnded(
                call.method,
                call.route,
                server.host,
                server.port or {"https": 443, "http": 80}[server.scheme],
                status,
                error,
                call.attempts,
                call.waited,
                seconds,
            )
        )
    return result


def _failure(error: httpx.RequestError, call: CallState, credentials: Credentials) -> APIConnectionError:
    if isinstance(error, httpx.TimeoutException):
        kind: type[APIConnectionError] = APITimeoutError
        reason = f"{_OPERATIONS.get(type(error), 'the network')} took longer than timeout="
    else:
        kind = APIConnectionError
        reason = credentials.redact(_words(error))
    return kind(
        f"{call}: no answer: {reason}{_so_far(call)}{_warning(call)}",
        call=call.info(),
        maybe_processed=_maybe_processed(call),
    )


_OPERATIONS: dict[type[httpx.TimeoutException], str] = {
    httpx.ConnectTimeout: "connecting",
    httpx.ReadTimeout: "waiting for the answer",
    httpx.WriteTimeout: "sending",
    httpx.PoolTimeout: "waiting for a connection",
}


def _words(error: BaseException) -> str:
    """Return what an error says, or the first of those behind it that says something."""
    said: BaseException | None = error
    while said is not None:
        if words := " ".join(str(said).split()):
            return words
        said = said.__cause__
    return type(error).__name__


def _so_far(call: CallState) -> str:
    return f" ({call.attempts} attempts, {call.waited:.1f} s waited)" if call.attempts > 1 else ""


def _warning(call: CallState) -> str:
    if _maybe_processed(call) and call.method not in REPEATABLE:
        return "; it may have been processed: look before you send it again"
    return ""


def _maybe_processed(call: CallState) -> bool:
    return call.sent or call.maybe_processed


@functools.lru_cache(maxsize=1024)
def _url(text: str) -> httpx.URL:
    """Parse a URL once: the same few are called again and again."""
    try:
        return httpx.URL(text)
    except httpx.InvalidURL as error:
        problem = str(error)
    raise ConfigurationError(f"nothing was sent: the URL cannot be used: {problem}")
