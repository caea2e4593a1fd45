"""``WebhookReceiver``: handles a delivery from its first byte to the response, under one deadline.

``_tenants`` finds the account by the token before the body is read, ``_http`` reads and parses the body,
``_lookup`` verifies the meeting and ``_dispatch`` calls the handler. This module runs them in order.
"""

import contextlib
import inspect
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from time import monotonic
from typing import Any, Final, Protocol, TypeAlias, overload, runtime_checkable

import anyio
import attrs

from lemcal_async import events
from lemcal_async._auth import Secret
from lemcal_async._callbacks import no_foreign_cancellation, problem_with_callback
from lemcal_async._checks import is_number
from lemcal_async._client import AsyncLemcal
from lemcal_async.errors import ConfigurationError
from lemcal_async.models import Meeting
from lemcal_async.webhooks._dispatch import Dedup, Dispatcher, InMemoryDedup, OnTimeout
from lemcal_async.webhooks._http import (
    UNAUTHORIZED,
    Headers,
    MeetingRef,
    Receive,
    Rejection,
    Reply,
    Responder,
    Scope,
    Send,
    check_headers,
    check_method,
    headers_of,
    hide_query,
    log_error,
    logger,
    parse_body,
    receive_body,
    rejected,
    retry_later,
    serve_lifespan,
    tokens_in,
)
from lemcal_async.webhooks._lookup import Batchers, Lookups, Missing, Unavailable
from lemcal_async.webhooks._tenants import Accounts, Directory, Token, directory_of, name_in

Handler: TypeAlias = Callable[[Meeting], object]
"""Called with each new meeting: an async function, or a plain one, which runs in a thread."""

TenantHandler: TypeAlias = Callable[[Meeting, AsyncLemcal], object]
"""Called with each new meeting and the client of its account."""


@runtime_checkable
class Wakes(Protocol):
    """An object that deliveries wake, such as ``lemcal_async.sync.Wake`` or a fleet's waker."""

    def wake(self, user_id: str | None = None) -> object:
        """Request synchronization of an account now. An awaitable result is awaited.

        Runs in the event loop, so a plain function must return immediately. If it raises, the sender is asked
        to retry the delivery.

        Args:
            user_id: The account, or None for all accounts.
        """
        ...


_Body: TypeAlias = bytes | Rejection | None

_WARNING_INTERVAL: Final = 60.0  # seconds between two warnings about rejected deliveries
_ADVICE: Final = (  # for a 401
    ": check that the hook's URL is hook_url(url, token), with the token of this receiver, and that its "
    "account is known"
)


@attrs.frozen
class _Request:
    """An incoming delivery. ``body`` reads the body, up to a deadline on the event loop's clock."""

    method: str
    name: str
    tokens: tuple[bytes, ...] = attrs.field(repr=False)
    headers: Headers = attrs.field(repr=False)
    body: Callable[[float], Awaitable[_Body]] = attrs.field(repr=False)
    on_timeout: OnTimeout = None


class WebhookReceiver:
    """Receives an account's webhooks, as an ASGI app (``POST …?token=…``) or through ``handle``.

    Deliveries are unsigned, so nothing in them is trusted: the receiver looks up the meeting by its id in the
    account's list and handles what the list contains. There are three outcomes. *Verified*: 200, once
    ``on_meeting`` has returned (and ``wake`` was called). *Not found*, even after retries for ``list_lag``
    seconds: 200 with ``{"status": "ignored"}``. *Unavailable*, because lemcal could not be reached or the
    handler failed: 503 with ``Retry-After``, so that the sender retries. With ``wake`` alone nothing is
    looked up, because the synchronization finds what is new.

    A meeting is handled once, however often it is delivered; across a crash, at least once.

    A receiver can be created before any event loop runs, and serves one event loop at a time. The caller is
    responsible for closing the clients. If canceled, for example by a server that shuts down, the receiver
    responds with 503 and releases the meeting.

    Args:
        lemcal: The account's client.
        token: The secret in the URL, or several during a rotation. ``hook_url`` builds the URL.
        accounts: For many accounts, instead of ``lemcal`` and ``token``: a mapping from tokens to clients, or
            an async function from the name in the path to a ``Tenant``.
        on_meeting: Handles a meeting: an async function, or a plain one, which runs in a thread. With
            ``accounts`` it also receives the client: ``on_meeting(meeting, lemcal)``.
        wake: The object that each delivery wakes.
        dedup: The record of handled meetings. Defaults to the memory of this process.
        deadline: Seconds in which a delivery must arrive and be verified.
        handler_timeout: Seconds allowed for ``on_meeting``.
        list_lag: Seconds for which lookups are repeated while the list does not contain the meeting.

    Raises:
        ConfigurationError: If an argument is invalid.
    """

    @overload
    def __init__(
        self,
        lemcal: AsyncLemcal,
        *,
        token: Token,
        on_meeting: Handler | None = None,
        wake: Wakes | None = None,
        dedup: Dedup | None = None,
        deadline: float = 10.0,
        handler_timeout: float = 30.0,
        list_lag: float = 2.0,
    ) -> None: ...
    @overload
    def __init__(
        self,
        *,
        accounts: Accounts,
        on_meeting: TenantHandler | None = None,
        wake: Wakes | None = None,
        dedup: Dedup | None = None,
        deadline: float = 10.0,
        handler_timeout: float = 30.0,
        list_lag: float = 2.0,
    ) -> None: ...
    def __init__(
        self,
        lemcal: AsyncLemcal | None = None,
        *,
        token: Token | None = None,
        accounts: Accounts | None = None,
        on_meeting: Callable[..., object] | None = None,
        wake: Wakes | None = None,
        dedup: Dedup | None = None,
        deadline: float = 10.0,
        handler_timeout: float = 30.0,
        list_lag: float = 2.0,
    ) -> None:
        # Any of these arguments may contain a token, even if only by mistake.
        given, lemcal, token, accounts = Secret((lemcal, token, accounts)), None, None, None
        handler, on_meeting = Secret(on_meeting), None
        self._many = given.reveal()[2] is not None
        self._directory: Directory = directory_of(given)
        _check_options(
            handler,
            ("meeting", "lemcal") if self._many else ("meeting",),
            wake=wake,
            dedup=dedup,
            deadline=deadline,
            handler_timeout=handler_timeout,
            list_lag=list_lag,
        )
        self._waker = None if wake is None else _Waker(wake)
        self._dispatcher = (
            Dispatcher(function, dedup or InMemoryDedup(), handler_timeout)
            if (function := handler.reveal())
            else None
        )
        self._lookups = Lookups()
        self._rejections = _RejectionLog()
        self._deadline = deadline
        self._list_lag = list_lag

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle an ASGI request."""
        if scope["type"] == "lifespan":
            await serve_lifespan(receive, send)
            return
        query = Secret(hide_query(scope))
        if scope["type"] != "http":  # a WebSocket
            await send({"type": f"{scope['type']}.close"})
            return
        respond = Responder(scope, send)

        async def read(until: float) -> _Body:
            return await receive_body(receive, until)

        async def on_timeout() -> None:
            await respond(retry_later("failed"))

        tokens = tokens_in(query.reveal(), scope["headers"])
        request = _Request(scope["method"], name_in(scope), tokens, scope["headers"], read, on_timeout)
        began = anyio.current_time()
        try:
            reply = await self._reply(request)
            if reply is not None:
                await respond(reply)
        except BaseException:  # a cancellation, which on trio may be inside an exception group
            # Ask the sender to retry, whatever happened. The server may already have stopped sending.
            with anyio.move_on_after(1.0, shield=True), contextlib.suppress(Exception):
                await respond(retry_later("unavailable"))
            raise
        finally:
            _emit_handled(respond.sent, began)

    async def handle(
        self,
        method: str,
        query: str | bytes,
        headers: Mapping[str, str] | Iterable[tuple[str | bytes, str | bytes]],
        body: bytes,
        *,
        tenant: str = "",
    ) -> tuple[int, dict[str, str], bytes]:
        """Handle a delivery without ASGI (Lambda, aiohttp.web, Django); return status, headers and body.

        A plain handler that times out is abandoned in its thread.

        Args:
            method: The HTTP method.
            query: The raw query string, without the ``?``.
            headers: The headers, as a mapping or as pairs.
            body: The complete body.
            tenant: The name that ``accounts`` resolves to a tenant.

        Raises:
            ConfigurationError: If an argument has the wrong type. Only a cancellation is raised otherwise.
        """
        secret, query = Secret(query), ""
        given, headers = Secret(headers), ()  # both may contain a token
        if problem := _problem_with_arguments(secret, given, body):
            raise ConfigurationError(problem)
        pairs = headers_of(given.reveal())

        async def read(until: float) -> _Body:  # noqa: ARG001 - the body is already read
            return body

        raw = secret.reveal()
        tokens = tokens_in(raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogatepass"), pairs)
        began = anyio.current_time()
        reply = await self._reply(_Request(method.upper(), tenant, tokens, pairs, read))
        if reply is None:  # only a disconnected client has no reply, and here no client can disconnect
            raise RuntimeError("handle() has no response to return")
        _emit_handled(reply, began)
        return reply.status_code, reply.headers(), reply.content()

    async def _reply(self, request: _Request) -> Reply | None:
        """Return the response to a delivery, or None if the client has disconnected."""
        until = anyio.current_time() + self._deadline
        rejection = check_method(request.method)
        lemcal = rejected(rejection) if rejection else await self._authorize(request)
        if isinstance(lemcal, Reply):
            return lemcal
        body = check_headers(request.headers) or await request.body(until)
        wanted = parse_body(body) if isinstance(body, bytes) else body
        if not isinstance(wanted, MeetingRef):
            return None if wanted is None else self._reject(wanted)
        if self._dispatcher is None:
            return await self._wake(lemcal, until) or Reply(200, "handled")
        return await self._verify_and_dispatch(self._dispatcher, lemcal, wanted, request, until)

    async def _verify_and_dispatch(
        self, dispatcher: Dispatcher, lemcal: AsyncLemcal, wanted: MeetingRef, request: _Request, until: float
    ) -> Reply:
        result = await self._lookups.find(lemcal, wanted, until, self._list_lag)
        if isinstance(result, Missing):
            logger.info("meeting %s: not in the account's list; delivery ignored", wanted.meeting_id)
            return Reply(200, "ignored")
        if isinstance(result, Unavailable):
            logger.warning("meeting %s: cannot be verified: %s", wanted.meeting_id, result.reason)
            return retry_later("unavailable", result.retry_after)
        if failed := await self._wake(lemcal, until):
            return failed
        arguments = (result, lemcal) if self._many else (result,)
        outcome = await dispatcher.dispatch(lemcal.user_id, result, arguments, request.on_timeout)
        return Reply(200, outcome) if outcome in {"handled", "repeated"} else retry_later(outcome)

    async def _authorize(self, request: _Request) -> AsyncLemcal | Reply:
        """Return the client of the account that a request is authorized for, or an error response."""
        try:
            lemcal = await self._directory.find(request.name, request.tokens)
            if lemcal is None:
                return self._reject(UNAUTHORIZED)
            lemcal.user_id  # noqa: B018 - raises if the api_key function must tell it, and fails
        except Exception as error:  # noqa: BLE001 - the user's functions may raise anything
            log_error(error, "finding the account of a delivery failed; the sender should retry")
            return retry_later("unavailable")
        return lemcal

    def _reject(self, rejection: Rejection) -> Reply:
        self._rejections.add(rejection)
        return rejected(rejection)

    async def _wake(self, lemcal: AsyncLemcal, until: float) -> Reply | None:
        if self._waker is None or await self._waker.wake(lemcal.user_id, until):
            return None
        return retry_later("failed")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} for {'many accounts' if self._many else 'one account'}>"


class _RejectionLog:
    """Warns of rejected deliveries: a typo in the hook's URL, for example, loses every booking.

    Anyone can send a wrong token, so there is at most one warning a minute per status code.
    """

    def __init__(self) -> None:
        self._counts = Counter[int]()
        self._quiet_until: dict[int, float] = {}

    def add(self, rejection: Rejection) -> None:
        """Count a rejected delivery, and warn unless a warning is recent."""
        status = rejection.status_code
        self._counts[status] += 1
        now = monotonic()
        if now < self._quiet_until.get(status, now):
            return
        logger.warning(
            "deliveries rejected with %d since the last warning: %d; %s; if lemcal sent them, bookings are "
            "being lost%s",
            status,
            self._counts.pop(status),
            rejection.reason,
            _ADVICE if status == UNAUTHORIZED.status_code else "",
        )
        self._quiet_until[status] = now + _WARNING_INTERVAL


class _Waker:
    """Wakes each account at most once per 0.75 s, however many deliveries arrive."""

    def __init__(self, wakes: Wakes) -> None:
        self._wakes = wakes
        self._batchers = Batchers[None, bool]()

    async def wake(self, user_id: str, until: float) -> bool:
        """Whether a wake-up that began after this call succeeded before ``until``, on the loop's clock."""

        async def call(requests: list[None], seconds: float) -> list[bool]:
            return [await self._wake(user_id, seconds)] * len(requests)

        return await self._batchers.get(user_id).submit(None, until, call) or False

    async def _wake(self, user_id: str, seconds: float) -> bool:
        try:
            with anyio.fail_after(seconds), no_foreign_cancellation():
                outcome = self._wakes.wake(user_id)
                if inspect.isawaitable(outcome):
                    await outcome
        except Exception as error:  # noqa: BLE001 - logged, and the sender retries
            log_error(error, "account %s: wake= failed; the sender should retry", user_id)
            return False
        return True


def _emit_handled(reply: Reply | None, began: float) -> None:
    if events.wanted() and reply is not None:
        seconds = anyio.current_time() - began
        events.emit(events.WebhookHandled(reply.outcome, reply.status_code, seconds))


def _problem_with_arguments(query: Secret[Any], headers: Secret[Any], body: object) -> str | None:
    """Return what is wrong with the arguments of ``handle``, or None."""
    if not isinstance(query.reveal(), str | bytes):
        return f"query= must be the raw query string, not {type(query.reveal()).__name__}"
    if not isinstance(headers.reveal(), Iterable):
        return f"headers= must be a mapping or pairs, not {type(headers.reveal()).__name__}"
    if not isinstance(body, bytes):
        return f"body= must be bytes, not {type(body).__name__}"
    return None


def _check_options(
    handler: Secret[Any], parameters: tuple[str, ...], *, wake: object, dedup: object, **seconds: object
) -> None:
    """Raise ConfigurationError for invalid arguments now, rather than at the first booking."""
    if handler.reveal() is None and wake is None:
        raise ConfigurationError("WebhookReceiver needs on_meeting=, wake= or both")
    if handler.reveal() is not None:
        if not callable(handler.reveal()):
            raise ConfigurationError("on_meeting= must be a function")
        if problem := problem_with_callback("on_meeting", handler.reveal(), parameters):
            raise ConfigurationError(problem)
    if wake is not None and (isinstance(wake, type) or not isinstance(wake, Wakes)):
        raise ConfigurationError("wake= must be an object with a wake(user_id) method, such as sync.Wake()")
    if dedup is not None and (isinstance(dedup, type) or not isinstance(dedup, Dedup)):
        raise ConfigurationError("dedup= must be an object with claim, done and release, such as SQLStore")
    for name, value in seconds.items():
        least = 0 if name == "list_lag" else math.ulp(0)
        if not (is_number(value) and least <= value < math.inf):
            bound = "0 or more" if name == "list_lag" else "above 0"
            raise ConfigurationError(f"{name}={value!r}: it must be a number of seconds, {bound}")
