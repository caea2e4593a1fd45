"""``WebhookReceiver``: from the first byte of a delivery to its answer, under one deadline.

What a delivery must look like is known to ``_http``, whose it is to ``_tenants``, whether it is true to
``_lookup``, and what happens then to ``_dispatch``. Here they are put in order.
"""

import contextlib
import inspect
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Protocol, TypeAlias, overload, runtime_checkable

import anyio
import attrs

from lemcal_async import events
from lemcal_async._auth import Secret
from lemcal_async._callbacks import no_foreign_cancellation, problem_with_callback
from lemcal_async._client import AsyncLemcal
from lemcal_async.errors import ConfigurationError
from lemcal_async.models import Meeting
from lemcal_async.webhooks._dispatch import Dedup, Dispatcher, InMemoryDedup, OnTimeout
from lemcal_async.webhooks._http import (
    UNAUTHORIZED,
    Headers,
    Receive,
    Reject,
    Reply,
    Responder,
    Scope,
    Send,
    Verify,
    check_headers,
    check_method,
    come_again,
    headers_of,
    hide_query,
    log_error,
    logger,
    read_body,
    receive_body,
    rejected,
    serve_lifespan,
    tokens_in,
)
from lemcal_async.webhooks._lookup import Batches, Lookups, Missing, Unavailable
from lemcal_async.webhooks._tenants import Accounts, Directory, Token, directory_of, name_in

Handler: TypeAlias = Callable[[Meeting], object]
"""Called with each new meeting; async, or a plain function that is run in a thread."""

TenantHandler: TypeAlias = Callable[[Meeting, AsyncLemcal], object]
"""The same, with the client of the account that the meeting belongs to."""


@runtime_checkable
class Wakes(Protocol):
    """What a delivery wakes: ``lemcal_async.sync.Wake``, or a fleet's waker."""

    def wake(self, user_id: str | None = None) -> object:
        """Have an account synchronized now. What it returns is awaited, if it can be.

        Called in the event loop: a plain function must return at once. What it raises counts as a failure:
        the delivery is to come again.

        Args:
            user_id: The account; None for all.
        """
        ...


_Body: TypeAlias = bytes | Reject | None


@attrs.frozen
class _Request:
    """A delivery as it came in; ``body`` reads it, until a moment on the event loop's clock."""

    method: str
    name: str
    tokens: tuple[bytes, ...] = attrs.field(repr=False)
    headers: Headers = attrs.field(repr=False)
    body: Callable[[float], Awaitable[_Body]] = attrs.field(repr=False)
    on_timeout: OnTimeout = None


class WebhookReceiver:
    """Receives the webhooks of an account, as an ASGI app (``POST …?token=…``) or by ``handle``.

    Deliveries are unsigned, so nothing in one is believed: the meeting is looked up in the account's list by
    its id, and what is found there is handled. There are three outcomes. *Found*: 200, once ``on_meeting``
    has returned (and ``wake`` was woken). *Not in the list*, although it was looked at again for ``list_lag``
    seconds: 200 and ``{"status": "ignored"}``. *Nobody can say*, because lemcal cannot be reached, or the
    handler failed: 503 with ``Retry-After``, so that it comes again. With ``wake`` alone nothing is looked
    up: a synchronization sees for itself what is new.

    A meeting is handled once, however often it is delivered; across a crash, at least once.

    It may be made before any event loop runs, and serves one at a time. The clients stay the caller's to
    close. Canceled, as by a server that shuts down, it answers 503 and gives the meeting back.

    Args:
        lemcal: The account's client.
        token: The secret in the URL, or several while one is replaced; ``hook_url`` builds that URL.
        accounts: For many accounts, in place of ``lemcal`` and ``token``: a mapping from tokens to clients,
            or an async function from the name in the path to a ``Tenant``.
        on_meeting: Handles a meeting: an async or a plain function, which runs in a thread. With ``accounts``
            it gets the client, too: ``on_meeting(meeting, lemcal)``.
        wake: What is woken by each delivery.
        dedup: What remembers which meetings were handled; if left out, this process does.
        deadline: Seconds that a delivery has to come in and be verified.
        handler_timeout: Seconds that ``on_meeting`` has.
        list_lag: For how many seconds a meeting is looked for that is not in the list.

    Raises:
        ConfigurationError: For arguments that cannot work.
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
        # A token can be given in any of these places by mistake, too.
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
        self._deadline = deadline
        self._list_lag = list_lag

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, as an ASGI app."""
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
            await respond(come_again("failed"))

        tokens = tokens_in(query.reveal(), scope["headers"])
        request = _Request(scope["method"], name_in(scope), tokens, scope["headers"], read, on_timeout)
        began = anyio.current_time()
        try:
            reply = await self._reply(request)
            if reply is not None:
                await respond(reply)
        except BaseException:  # canceled, on trio perhaps in a group
            # Whatever became of it, the sender is told to come again. The server may be past listening.
            with anyio.move_on_after(1.0, shield=True), contextlib.suppress(Exception):
                await respond(come_again("unavailable"))
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
        """Answer a delivery without ASGI (on Lambda, aiohttp.web, Django): return status, headers, body.

        A plain handler that runs out of time is left behind in its thread.

        Args:
            method: The HTTP method.
            query: The query string as it came, without the ``?``.
            headers: The headers, as a mapping or as pairs.
            body: The whole body.
            tenant: The name that ``accounts`` finds a tenant by.

        Raises:
            ConfigurationError: An argument is of another type. Nothing else but a cancellation is raised.
        """
        secret, query = Secret(query), ""
        given, headers = Secret(headers), ()  # a token can be in either
        if problem := _problem_with_arguments(secret, given, body):
            raise ConfigurationError(problem)
        pairs = headers_of(given.reveal())

        async def read(until: float) -> _Body:  # noqa: ARG001 - it is here already
            return body

        raw = secret.reveal()
        tokens = tokens_in(raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogatepass"), pairs)
        began = anyio.current_time()
        reply = await self._reply(_Request(method.upper(), tenant, tokens, pairs, read))
        if reply is None:  # a client that has left, which nobody can here
            raise RuntimeError("a delivery was left without an answer")
        _emit_handled(reply, began)
        return reply.status_code, reply.headers(), reply.content()

    async def _reply(self, request: _Request) -> Reply | None:
        """Return the answer to a delivery; None if the client has left."""
        until = anyio.current_time() + self._deadline
        refusal = check_method(request.method)
        lemcal = rejected(refusal) if refusal else await self._find_account(request)
        if isinstance(lemcal, Reply):
            return lemcal
        body = check_headers(request.headers) or await request.body(until)
        wanted = read_body(body) if isinstance(body, bytes) else body
        if not isinstance(wanted, Verify):
            return None if wanted is None else rejected(wanted)
        if self._dispatcher is None:
            return await self._wake(lemcal, until) or Reply(200, "handled")
        return await self._verify_and_dispatch(self._dispatcher, lemcal, wanted, request, until)

    async def _verify_and_dispatch(
        self, dispatcher: Dispatcher, lemcal: AsyncLemcal, wanted: Verify, request: _Request, until: float
    ) -> Reply:
        finding = await self._lookups.find(lemcal, wanted, until, self._list_lag)
        if isinstance(finding, Missing):
            logger.info("meeting %s: not in the list, ignored", wanted.meeting_id)
            return Reply(200, "ignored")
        if isinstance(finding, Unavailable):
            logger.warning("meeting %s cannot be verified: %s", wanted.meeting_id, finding.reason)
            return come_again("unavailable", finding.retry_after)
        if refused := await self._wake(lemcal, until):
            return refused
        arguments = (finding, lemcal) if self._many else (finding,)
        outcome = await dispatcher.dispatch(lemcal.user_id, finding, arguments, request.on_timeout)
        return Reply(200, outcome) if outcome in {"handled", "repeated"} else come_again(outcome)

    async def _find_account(self, request: _Request) -> AsyncLemcal | Reply:
        """Return the client of the account that a request may speak of, or why it may not."""
        try:
            lemcal = await self._directory.find(request.name, request.tokens)
            if lemcal is None:
                return rejected(UNAUTHORIZED)
            lemcal.user_id  # noqa: B018 - raises if a function that returns the key fails
        except Exception as error:  # noqa: BLE001 - of the user's own functions
            log_error(error, "a delivery's account could not be found; the delivery is to come again")
            return come_again("unavailable")
        return lemcal

    async def _wake(self, lemcal: AsyncLemcal, until: float) -> Reply | None:
        if self._waker is None or await self._waker.wake(lemcal.user_id, until):
            return None
        return come_again("failed")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} for {'many accounts' if self._many else 'one account'}>"


class _Waker:
    """Wakes one account at most once in 0.75 s, however many deliveries ask for it."""

    def __init__(self, wakes: Wakes) -> None:
        self._wakes = wakes
        self._batches = Batches[None, bool]()

    async def wake(self, user_id: str, until: float) -> bool:
        """Whether a wake-up that began after the call succeeded before ``until``, by the loop's clock."""

        async def call(asked: list[None], seconds: float) -> list[bool]:
            return [await self._wake(user_id, seconds)] * len(asked)

        return await self._batches.of(user_id).ask(None, until, call) or False

    async def _wake(self, user_id: str, seconds: float) -> bool:
        try:
            with anyio.fail_after(seconds), no_foreign_cancellation():
                outcome = self._wakes.wake(user_id)
                if inspect.isawaitable(outcome):
                    await outcome
        except Exception as error:  # noqa: BLE001 - logged, and the delivery comes again
            log_error(error, "%s could not be woken; the delivery is to come again", user_id)
            return False
        return True


def _emit_handled(reply: Reply | None, began: float) -> None:
    if events.wanted() and reply is not None:
        seconds = anyio.current_time() - began
        events.emit(events.WebhookHandled(reply.outcome, reply.status_code, seconds))


def _problem_with_arguments(query: Secret[Any], headers: Secret[Any], body: object) -> str | None:
    """Return what is wrong with what ``handle`` is given, None if nothing is."""
    if not isinstance(query.reveal(), str | bytes):
        return f"query= must be the query string as it came, not {type(query.reveal()).__name__}"
    if not isinstance(headers.reveal(), Iterable):
        return f"headers= must be a mapping or pairs, not {type(headers.reveal()).__name__}"
    if not isinstance(body, bytes):
        return f"body= must be bytes, not {type(body).__name__}"
    return None


def _check_options(
    handler: Secret[Any], parameters: tuple[str, ...], *, wake: object, dedup: object, **seconds: object
) -> None:
    """Raise ConfigurationError for arguments that cannot work, rather than at the first booking."""
    if handler.reveal() is None and wake is None:
        raise ConfigurationError("a WebhookReceiver needs on_meeting=, wake= or both")
    if handler.reveal() is not None:
        if not callable(handler.reveal()):
            raise ConfigurationError("on_meeting= must be a function")
        if problem := problem_with_callback("on_meeting", handler.reveal(), parameters):
            raise ConfigurationError(problem)
    if wake is not None and (isinstance(wake, type) or not isinstance(wake, Wakes)):
        raise ConfigurationError("wake= must be an object with a method wake(user_id), such as sync.Wake()")
    if dedup is not None and (isinstance(dedup, type) or not isinstance(dedup, Dedup)):
        raise ConfigurationError("dedup= must be an object with claim, done and release, such as SQLStore")
    for name, value in seconds.items():
        least = 0 if name == "list_lag" else math.ulp(0)
        if not isinstance(value, int | float) or not least <= value < math.inf:
            bound = "0 or more" if name == "list_lag" else "above 0"
            raise ConfigurationError(f"{name}={value!r}: it must be seconds, {bound}")
