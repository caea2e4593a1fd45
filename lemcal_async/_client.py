"""``AsyncLemcal``, the client. It checks arguments; ``_session`` sends the calls."""

import functools
import logging
import os
import re
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Generic, Literal, NoReturn, Self, TypedDict, TypeVar, Unpack, overload

import attrs
import httpx

from lemcal_async import _resources
from lemcal_async._auth import ApiKey, CredentialSource, Secret, no_account
from lemcal_async._checks import check_type, is_number, is_seconds
from lemcal_async._codec import check_into
from lemcal_async._decoding import data_of, json_kind
from lemcal_async._retry import RetryPolicy
from lemcal_async._session import USER_AGENT, AccountSession, JSONBody, Options, RawResponse, TransportStack
from lemcal_async._urls import BASE_URL_VARIABLE, DEFAULT_BASE_URL, check_base_url, check_path, with_query
from lemcal_async.errors import ConfigurationError
from lemcal_async.models import User
from lemcal_async.ratelimit import Key, Priority, RateLimit, RateLimiter
from lemcal_async.transport._layers import MAX_RESPONSE_BYTES, Wire

OnBadRow = Literal["raise", "skip"]
"""How to treat unreadable rows of a list: raise an error, or skip them."""

Timeout = float | httpx.Timeout | None
"""Seconds for each network operation, or an ``httpx.Timeout`` with one limit per kind; None for no limit."""

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Unchanged:
    """Marks an option to leave unchanged; None does not, because it is a valid value of these options."""

    def __repr__(self) -> str:
        return "UNCHANGED"


UNCHANGED: Final = Unchanged()


@attrs.frozen
class APIResponse(Generic[T_co]):
    """The response that ``request`` returns.

    Attributes:
        status_code: The response's status code.
        headers: The response's headers, with lowercase names.
        data: The decoded JSON body, or the requested model.
    """

    status_code: int
    headers: dict[str, str]
    data: T_co


class ClientOptions(TypedDict, total=False):
    """The options of ``AsyncLemcal`` apart from the credentials, documented there."""

    base_url: str | None
    transport: Wire | None
    limiter: RateLimiter | None
    retry: RetryPolicy | None
    timeout: Timeout
    deadline: float | None
    on_bad_row: OnBadRow
    max_response_bytes: int
    allow_insecure_http: bool
    user_agent: str | None


class AsyncLemcal:
    """A client for the lemcal API, on asyncio and trio.

    Creating a client sends nothing, so it is safe at import time, before any event loop runs. Calls raise the
    errors of ``lemcal_async.errors``. Canceling a call leaks nothing, but the server may already have
    processed its request. ``aclose()`` lets calls in progress finish.

    Args:
        user_id: The account's user id. Defaults to the ``LEMCAL_USER_ID`` environment variable.
        api_key: The account's API key, or a function that returns the current key. Defaults to the
            ``LEMCAL_API_KEY`` environment variable. May include the user id: ``usr_x:secret``, or its base64.
        base_url: Base URL of the API. Defaults to the ``LEMCAL_BASE_URL`` environment variable, then to the
            service. Must be https, unless the host is loopback or ``allow_insecure_http`` is True.
        transport: An httpx or httpx2 transport to use instead of the default connection pool. The caller is
            responsible for closing it.
        limiter: A rate limiter to use instead of the process-wide one. The caller is responsible for
            closing it.
        retry: How failed calls are retried.
        timeout: Seconds for each network operation; None for no limit.
        deadline: Seconds for a whole call, including waits and retries; None for no limit.
        on_bad_row: ``"skip"`` logs unreadable rows of a list and omits them, instead of raising.
        max_response_bytes: Maximum size of a response body after decompression (64 MiB by default); a larger
            body raises ResponseDecodeError.
        allow_insecure_http: Whether ``base_url`` may be http on another host.
        user_agent: Text to append to the SDK's user agent, such as ``"myapp/2.1"``.

    Raises:
        ConfigurationError: If an argument is invalid, including the credentials.
    """

    __slots__ = ("__weakref__", "_owner", "_session")

    def __init__(
        self,
        user_id: str | None = None,
        api_key: ApiKey | None = None,
        *,
        base_url: str | None = None,
        transport: Wire | None = None,
        limiter: RateLimiter | None = None,
        retry: RetryPolicy | None = None,
        timeout: Timeout = 30.0,
        deadline: float | None = None,
        on_bad_row: OnBadRow = "raise",
        max_response_bytes: int = MAX_RESPONSE_BYTES,
        allow_insecure_http: bool = False,
        user_agent: str | None = None,
    ) -> None:
        given, user_id, api_key = Secret((user_id, api_key)), None, None
        origin, base_url = Secret(base_url), None  # may contain a password
        set_up_logging()
        source = CredentialSource(given, environment=True)
        if on_bad_row not in ("raise", "skip"):
            raise ConfigurationError(f"on_bad_row={on_bad_row!r}: it must be 'raise' or 'skip'")
        options = Options(
            timeout=_timeout(timeout),
            deadline=_deadline(deadline),
            retry=_retry(retry),
            priority="interactive",
            skip_bad_rows=on_bad_row == "skip",
            user_agent=_user_agent(user_agent),
        )
        checked = _base_url(origin, allow_insecure_http=allow_insecure_http)
        stack = TransportStack(transport, limiter, max_response_bytes)
        self._session = AccountSession(stack, checked, source, options)
        self._owner = True

    @classmethod
    def for_accounts(cls, **options: Unpack[ClientOptions]) -> Self:
        """Return a client without an account of its own, for programs that only hold other people's keys.

        The client cannot make calls itself: ``for_account`` returns clients that can, on its transport and
        limiter. Close it when done. Credentials in the environment are ignored.

        Args:
            **options: The options of ``AsyncLemcal``, without the credentials.

        Raises:
            ConfigurationError: If an option is invalid.
        """
        return cls(None, no_account, **options)

    def for_account(self, user_id: str | None, api_key: ApiKey) -> Self:
        """Return a client for another account on the same transport, limiter and options.

        The new client takes microseconds to create, needs no closing, and works as long as this client is
        open. Credentials in the environment are ignored.

        Args:
            user_id: The account's user id; None if ``api_key`` includes it.
            api_key: The account's API key, as for ``AsyncLemcal``.

        Raises:
            ConfigurationError: If the credentials are missing or malformed.
        """
        given, user_id, api_key = Secret((user_id, api_key)), None, ""
        return self._view(self._session.for_account(CredentialSource(given)))

    def with_options(
        self,
        *,
        timeout: Timeout | Unchanged = UNCHANGED,
        deadline: float | Unchanged | None = UNCHANGED,
        retry: RetryPolicy | Unchanged | None = UNCHANGED,
        priority: Priority | Unchanged = UNCHANGED,
    ) -> Self:
        """Return a view of this client with some options replaced.

        Args:
            timeout: Seconds for each network operation; None for no limit.
            deadline: Seconds for a whole call, including waits and retries; None for no limit.
            retry: How failed calls are retried; None for ``RetryPolicy()``.
            priority: ``"bulk"`` calls yield to interactive calls with the same key, but keep one turn in
                five.

        Raises:
            ConfigurationError: If an option is invalid.
        """
        options = self._session.options
        if not isinstance(timeout, Unchanged):
            options = attrs.evolve(options, timeout=_timeout(timeout))
        if not isinstance(deadline, Unchanged):
            options = attrs.evolve(options, deadline=_deadline(deadline))
        if not isinstance(retry, Unchanged):
            options = attrs.evolve(options, retry=_retry(retry))
        if not isinstance(priority, Unchanged):
            if priority not in ("interactive", "bulk"):
                raise ConfigurationError(f"priority={priority!r}: it must be 'interactive' or 'bulk'")
            options = attrs.evolve(options, priority=priority)
        return self._view(self._session.with_options(options))

    def _view(self, session: AccountSession) -> Self:
        view = object.__new__(type(self))
        view._session = session
        view._owner = False
        return view

    @property
    def meetings(self) -> _resources.Meetings:
        """The booked meetings: ``list``, ``get`` and ``rows``."""
        return _resources.Meetings(self._session)

    @property
    def meeting_types(self) -> _resources.MeetingTypes:
        """The meeting types on offer: ``list`` and ``get``."""
        return _resources.MeetingTypes(self._session)

    @property
    def hooks(self) -> _resources.Hooks:
        """The webhooks: ``create`` and ``delete``. The service cannot list them (documented by absence)."""
        return _resources.Hooks(self._session)

    @property
    def user_id(self) -> str:
        """The account's user id. If none was given, this calls the ``api_key`` function."""
        return self._session.user_id()

    @property
    def rate_limit(self) -> RateLimit:
        """A snapshot of the account's rate limit, as known to this process. Sends nothing."""
        return self._session.rate_limit()

    @property
    def rate_limit_key(self) -> Key:
        """The key that requests are counted by: equal for all clients that share a limit, and not secret."""
        return self._session.key()

    async def me(self) -> User:
        """Fetch the account that the credentials belong to: a cheap way to verify them."""
        return await _resources.me(self._session)

    @overload
    async def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        json: Any = None,
        into: None = None,
    ) -> APIResponse[Any]: ...
    @overload
    async def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        json: Any = None,
        into: type[T],
    ) -> APIResponse[T]: ...
    async def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        json: Any = None,
        into: type[Any] | None = None,
    ) -> APIResponse[Any]:
        """Call an endpoint that has no method of its own, through the same transport layers.

        Args:
            method: The HTTP method, such as ``"GET"``.
            path: The path below the base URL, without a query: ``/meetings``.
            params: The query parameters: text, numbers, bools or lists of these; None values are omitted.
            json: The request body, as JSON-serializable data.
            into: The type to decode the response into: a model (``Meeting``, ``list[Meeting]``), or ``dict``
                or ``list`` for plain JSON. By default, ``data`` is any JSON value, or None for a 204.

        Raises:
            ConfigurationError: If the method, path, query or body is invalid.
            TypeError: If ``into`` is any other type.
            ResponseDecodeError: If the body does not match ``into``, or is not JSON.
        """
        body, json = None if json is None else JSONBody(Secret(json)), None  # it may hold a token
        if not _is_method(method):
            raise ConfigurationError(f"method={str(method)[:20]!r}: it must be an HTTP method such as 'GET'")
        path = check_path(str(path))
        check_type("params", params, Mapping)
        if into is not None and json_kind(into) is None:
            check_into(into)  # before anything is sent

        async def decode(response: RawResponse) -> APIResponse[Any]:
            data = await data_of(response, into)
            return APIResponse(response.status_code, dict(response.headers.items()), data)

        return await self._session.send(method.upper(), path, with_query(path, params), decode, body)

    async def aclose(self) -> None:
        """Close the connections. Idempotent; does nothing on a sibling or a view."""
        if self._owner:
            await self._session.stack.aclose()

    def _reopen(self) -> None:
        """Make a closed client usable again, for apps that are started and stopped several times."""
        self._session.stack.reopen()

    async def __aenter__(self) -> Self:
        self._session.stack.check_open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        # A traceback that shows local variables may call this before __init__ has finished.
        return f"<{type(self).__name__} {getattr(self, '_session', 'not set up')!r}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an AsyncLemcal cannot be pickled: it holds an API key and connections; create it in each process"
        )


def _base_url(url: Secret[str | None], *, allow_insecure_http: bool) -> str:
    if url.reveal() is not None:
        return check_base_url(Secret(url.reveal() or ""), allow_insecure_http=allow_insecure_http)
    variable = Secret(os.environ.get(BASE_URL_VARIABLE, "").strip() or DEFAULT_BASE_URL)
    return check_base_url(variable, BASE_URL_VARIABLE, allow_insecure_http=allow_insecure_http)


def _user_agent(name: object) -> str:
    if name is None:
        return USER_AGENT
    if not (isinstance(name, str) and name.strip() and name.isascii() and name.isprintable()):
        raise ConfigurationError(f"user_agent={name!r}: it must be printable ASCII text, such as 'myapp/2.1'")
    return f"{USER_AGENT} {name.strip()}"


def _timeout(timeout: Timeout) -> dict[str, float | None]:
    if timeout is None or isinstance(timeout, httpx.Timeout) or _is_positive(timeout):
        seconds = httpx.Timeout(timeout).as_dict()
        if all(value is None or _is_positive(value) for value in seconds.values()):
            return seconds
    raise ConfigurationError(
        f"timeout={timeout!r}: it must be a number of seconds above 0, or None for no limit"
    )


def _deadline(deadline: float | None) -> float | None:
    if deadline is not None and not is_seconds(deadline):
        raise ConfigurationError(
            f"deadline={deadline!r}: it must be a number of seconds above 0, or None for no limit"
        )
    return deadline


def _retry(retry: RetryPolicy | None) -> RetryPolicy:
    check_type("retry", retry, RetryPolicy)
    return retry or RetryPolicy()


def _is_method(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z]{1,20}", value) is not None


def _is_positive(value: object) -> bool:
    return is_number(value) and value > 0


LOG_VARIABLE = "LEMCAL_LOG"

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@functools.cache
def set_up_logging() -> None:
    """Set the log level from the environment, once. Keeps existing handlers."""
    level = os.environ.get(LOG_VARIABLE, "").strip().upper()
    if not level:
        return
    if level not in _LEVELS:
        raise ConfigurationError(f"{LOG_VARIABLE} must be one of {', '.join(_LEVELS).lower()}")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("lemcal_async").setLevel(level)
