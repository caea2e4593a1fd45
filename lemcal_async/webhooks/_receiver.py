"""What can be wrong with the arguments of a ``WebhookReceiver``, in words.

The functions hold tokens, or what was mistaken for one, so they raise nothing: a traceback may show local
variables.

``WebhookReceiver``: the ASGI app that takes a delivery from its first byte to its answer.

What a delivery must look like is ``decision.py``'s business, whose it is ``tenants.py``'s, whether it is
true ``lookup.py``'s, and what happens then ``handling.py``'s. Here they are put in order, under one
deadline.
"""

import contextlib
import logging
import math
from collections.abc import Callable
from typing import Final, Protocol, TypeAlias, overload, runtime_checkable

import anyio
import attrs

from lemcal_async import events
from lemcal_async._auth import Secret
from lemcal_async._client import AsyncLemcal
from lemcal_async.errors import ConfigurationError
from lemcal_async.models import Meeting
from lemcal_async.webhooks._dispatch import BoundedMemory, Handling, Memory, place_of
from lemcal_async.webhooks._http import (
    UNAUTHORIZED,
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
    live,
    read_body,
    receive_body,
    rejected,
    token_in,
)
from lemcal_async.webhooks._lookup import Finding, Lookup, Lookups, Missing, Unavailable
from lemcal_async.webhooks._tenants import (
    Accounts,
    Directory,
    Token,
    directory_of,
)


@runtime_checkable
class Wakes(Protocol):
    """What a delivery wakes: ``lemcal_async.sync.Wake``."""

    def wake(self, user_id: str | None = None) -> object:
        """Have this account synchronised now. Called in the event loop: it returns at once."""
        ...


def problem_of_source(lemcal: object, token: object, accounts: object) -> str | None:
    """Return what is wrong with whose deliveries are to be received."""
    if (lemcal is None) != (token is None) or (lemcal is None) != (accounts is not None):
        return "a WebhookReceiver takes either a client and token=, or accounts="
    if lemcal is not None and not isinstance(lemcal, AsyncLemcal):
        return f"lemcal must be an AsyncLemcal, not {type(lemcal).__name__}"
    return None


def problem_of_options(
    *,
    on_meeting: object,
    wake: object,
    memory: object,
    deadline: object,
    handler_time_limit: object,
    list_lag: object,
) -> str | None:
    """Return what is wrong with the other arguments."""
    if on_meeting is None and wake is None:
        return "a WebhookReceiver needs on_meeting=, wake= or both"
    for good, what in (
        (on_meeting is None or callable(on_meeting), "on_meeting= must be a function"),
        (wake is None or isinstance(wake, Wakes), "wake= must be an object with a method wake(user_id)"),
        (memory is None or isinstance(memory, Memory), "memory= must have claim, done and release"),
        (_is_seconds(deadline) and deadline != 0, "deadline= must be seconds above 0"),
        (
            _is_seconds(handler_time_limit) and handler_time_limit != 0,
            "handler_time_limit= must be above 0 s",
        ),
        (_is_seconds(list_lag), "list_lag= must be seconds, 0 or more"),
    ):
        if not good:
            return what
    return None


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < math.inf


logger = logging.getLogger("lemcal_async.webhooks")

Handler: TypeAlias = Callable[[Meeting], object]
"""Called with each new meeting; async, or a plain function that is run in a thread."""

TenantHandler: TypeAlias = Callable[[Meeting, AsyncLemcal], object]
"""The same, with the client of the account that the meeting belongs to."""

# Access logs show the query, and tracebacks the scope.
_HIDDEN: Final = b"token=hidden"


@attrs.frozen
class _Account:
    """Who a delivery is for."""

    lemcal: AsyncLemcal
    user_id: str
    lookup: Lookup


class WebhookReceiver:
    """An ASGI app that receives the webhooks of an account: ``POST …?token=…``.

    Deliveries are unsigned, so nothing in one is believed: the meeting is looked up in the account's
    list by its id, and what is found there is handled. There are three outcomes. *Found*: 200, once
    ``on_meeting`` has returned (and ``wake`` was woken). *Not in the list*, although it was looked at
    again for ``list_lag`` seconds: 200 and ``{"status": "ignored"}``. *Nobody can say*, because lemcal
    cannot be reached, or the handler failed: 503 with ``Retry-After``, so that it comes again.

    ``token`` is the secret in the URL, or several while one is replaced. ``on_meeting`` is an async or a
    plain function; it has ``handler_time_limit`` seconds. A delivery has ``deadline`` seconds to come
    in and be verified. A meeting is handled once, however often it is delivered: ``memory`` remembers
    (in this process, unless it is one that lasts); across a crash, at least once.

    ``accounts`` in place of ``lemcal`` and ``token`` serves many accounts: a mapping from tokens to
    clients, or an async function from the name in the path to a ``Tenant``. The handler then gets the
    client, too: ``on_meeting(meeting, lemcal)``.

    It may be made before any event loop runs, and serves one at a time. The clients stay the caller's
    to close. Cancelled, as by a server that shuts down, it answers 503 and gives the meeting back.
    """

    @overload
    def __init__(
        self,
        lemcal: AsyncLemcal,
        *,
        token: Token,
        on_meeting: Handler | None = None,
        wake: Wakes | None = None,
        memory: Memory | None = None,
        deadline: float = 10.0,
        handler_time_limit: float = 30.0,
        list_lag: float = 2.0,
    ) -> None: ...
    @overload
    def __init__(
        self,
        *,
        accounts: Accounts,
        on_meeting: TenantHandler | None = None,
        wake: Wakes | None = None,
        memory: Memory | None = None,
        deadline: float = 10.0,
        handler_time_limit: float = 30.0,
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
        memory: Memory | None = None,
        deadline: float = 10.0,
        handler_time_limit: float = 30.0,
        list_lag: float = 2.0,
    ) -> None:
        self._many = accounts is not None
        source, lemcal, token, accounts = Secret((lemcal, token, accounts)), None, None, None
        handler, on_meeting = Secret(on_meeting), None  # a partial shows its arguments
        problem = problem_of_source(*source.reveal()) or problem_of_options(
            on_meeting=handler.reveal(),
            wake=wake,
            memory=memory,
            deadline=deadline,
            handler_time_limit=handler_time_limit,
            list_lag=list_lag,
        )
        if problem is not None:
            raise ConfigurationError(problem)
        self._directory: Directory = directory_of(source)
        self._wake = wake
        self._handling = None
        if (handle := handler.reveal()) is not None:
            self._handling = Handling(handle, memory or BoundedMemory(), handler_time_limit)
        self._lookups = Lookups()
        self._deadline = deadline
        self._list_lag = list_lag

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, as an ASGI app."""
        if scope["type"] == "lifespan":
            await live(receive, send)
        elif scope["type"] == "http":
            await self._receive(scope, receive, Responder(scope, send))
        else:  # a WebSocket
            await send({"type": f"{scope['type']}.close"})

    async def _receive(self, scope: Scope, receive: Receive, respond: Responder) -> None:
        token = token_in(scope["query_string"])
        scope["query_string"] = _HIDDEN
        began = anyio.current_time()
        try:
            reply = await self._reply(scope, receive, token, respond)
            if reply is not None:
                await respond(reply)
        except BaseException:  # cancelled, on trio perhaps in a group
            # Whatever became of it, the sender is told to come again. The server may be past listening.
            with anyio.move_on_after(1.0, shield=True), contextlib.suppress(Exception):
                await respond(come_again("unavailable"))
            raise
        finally:
            if events.wanted() and (sent := respond.sent) is not None:
                seconds = anyio.current_time() - began
                events.emit(events.WebhookHandled(sent.outcome, sent.status, seconds))

    async def _reply(self, scope: Scope, receive: Receive, token: bytes, respond: Responder) -> Reply | None:
        """Return the answer to a delivery; None if the client has left."""
        until = anyio.current_time() + self._deadline
        account = await self._admit(scope, token)
        if isinstance(account, Reply):
            return account
        body = check_headers(scope["headers"]) or await receive_body(receive, until)
        wanted = read_body(body) if isinstance(body, bytes) else body
        if wanted is None:
            return None
        if isinstance(wanted, Reject):
            return rejected(wanted)
        finding = await self._verify(account, wanted, until)
        if isinstance(finding, Missing):
            logger.info("meeting %s: not in the list, ignored", wanted.meeting_id)
            return Reply(200, "ignored")
        if isinstance(finding, Unavailable):
            logger.warning("meeting %s: cannot be verified: %s", wanted.meeting_id, finding.reason)
            return come_again("unavailable", finding.retry_after)
        return await self._act(account, finding, respond)

    async def _admit(self, scope: Scope, token: bytes) -> _Account | Reply:
        """Return the account that a request may speak of, or why it may not."""
        if refusal := check_method(scope["method"]):
            return rejected(refusal)
        try:
            lemcal = await self._directory.find(scope, token)
            if lemcal is None:
                return rejected(UNAUTHORIZED)
            return _Account(lemcal, lemcal.user_id, self._lookups.of(lemcal))
        except Exception as error:  # noqa: BLE001 - of the user's own functions
            logger.error("the account of a delivery cannot be had: %s", place_of(error))  # noqa: TRY400
            return come_again("unavailable")

    async def _verify(self, account: _Account, wanted: Verify, until: float) -> Finding:
        """Look for the meeting three times, as the list may lag behind a booking."""
        with account.lookup.in_use():
            finding = await account.lookup.find(account.lemcal, wanted, until)
            for pause in (self._list_lag / 3, self._list_lag * 2 / 3):
                if not isinstance(finding, Missing):
                    break
                await anyio.sleep(pause)
                # In the whole list from now on: the type may have been a lie.
                finding = await account.lookup.find(account.lemcal, Verify(wanted.meeting_id), until)
            return finding

    async def _act(self, account: _Account, meeting: Meeting, respond: Responder) -> Reply:
        """Wake, and have the meeting handled."""

        async def late() -> None:
            await respond(come_again("failed"))

        if self._wake is not None:
            try:
                self._wake.wake(account.user_id)
            except Exception as error:  # noqa: BLE001 - as of a handler
                logger.error("meeting %s: wake() raised %s", meeting.id, place_of(error))  # noqa: TRY400
                return come_again("failed")
        if self._handling is None:
            return Reply(200, "handled")
        arguments = (meeting, account.lemcal) if self._many else (meeting,)
        outcome = await self._handling.handle(account.user_id, meeting, arguments, late)
        return Reply(200, outcome) if outcome in {"handled", "repeated"} else come_again(outcome)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} for {'many accounts' if self._many else 'one account'}>"
