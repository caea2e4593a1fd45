"""The sandbox as its users see it: an ASGI app, the controls over it, and the ways to serve it.

It puts the modules beside this one together, and checks what callers pass to the controls.
"""

import contextlib
import json
import random
import time
from collections.abc import Callable, Generator, Mapping
from datetime import datetime
from email.utils import parseaddr
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.routing import Mount, Router, request_response
from starlette.types import Receive, Scope, Send

from lemcal_async.sandbox._app import Api, is_web_url, seen_request, send_response
from lemcal_async.sandbox._control import Controls, Guard
from lemcal_async.sandbox._demo import Guest, SandboxAccount, wire_time
from lemcal_async.sandbox._hooks import Delivery, HookSender
from lemcal_async.sandbox._log import Follower, RequestLog, SeenRequest
from lemcal_async.sandbox._page import Page
from lemcal_async.sandbox._ratelimit import COUNTERS, WindowKind
from lemcal_async.sandbox._responses import dumps, html
from lemcal_async.sandbox._server import listening
from lemcal_async.sandbox._state import DuplicateHookError, SandboxState
from lemcal_async.sandbox.faults import Fault, FaultPlan

if TYPE_CHECKING:
    from lemcal_async._client import AsyncLemcal
    from lemcal_async.models import Meeting

PREFIX: Final = "/api/lemcal"
CONTROL_PREFIX: Final = "/_sandbox"

_POLL: Final = 0.1  # seconds between looks for what has finished


class Sandbox:
    """A lemcal of your own, with made-up accounts and meetings.

    An instance is an ASGI app, and ``serve()`` puts it on a real socket. All methods may be called from any
    thread; none needs an event loop.

    Args:
        accounts: How many accounts there are.
        meetings: How many meetings each has.
        limit: How many requests are let through in a period, per credential, as at the real service; None
            removes the limit and its headers.
        period: The length of a period in seconds.
        window: ``"fixed"``, a window that starts at a key's first request, or ``"sliding"``, a strict sliding
            log.
        latency: The shortest and the longest round trip, in seconds; half of it passes before a request is
            counted, half after.
        seed: The same seed makes the same accounts and meetings.
        clock: What drives the rate limit and the logs, in seconds.

    Raises:
        ValueError: For arguments that cannot work.
    """

    def __init__(
        self,
        *,
        accounts: int = 1,
        meetings: int = 12,
        limit: int | None = 20,
        period: float = 2.0,
        window: WindowKind = "fixed",
        latency: tuple[float, float] = (0.0, 0.0),
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if accounts < 1 or meetings < 0:
            raise ValueError("accounts must be at least 1, and meetings at least 0")
        if (limit is not None and limit < 1) or period <= 0:
            raise ValueError("limit must be at least 1 (None: no limit), and period above 0 seconds")
        if window not in COUNTERS:
            raise ValueError(f"window must be one of {', '.join(COUNTERS)}")
        if not 0 <= latency[0] <= latency[1]:
            raise ValueError("latency must be (shortest, longest) in seconds")
        self._log = RequestLog()
        self._sender = HookSender(clock)
        self._state = SandboxState(accounts=accounts, meetings=meetings, seed=seed)
        self._faults = FaultPlan()
        self._clock = clock
        self._base_url: str | None = None
        self._latency = latency
        self._rng = random.Random(f"lemcal sandbox latency {seed}")  # noqa: S311  # not a secret
        counter = None if limit is None else COUNTERS[window](limit, period, clock)
        api = Api(
            state=self._state,
            counter=counter,
            faults=self._faults,
            log=self._log,
            latency=self._round_trip,
            clock=clock,
        )
        page = Page(
            self,
            self._state,
            self._log,
            self._sender,
            self._faults,
            clock=clock,
            limit={"limit": limit, "period": period, "window": window},
        )
        controls = Controls(self, self._log, self._sender)
        self._page = Guard(request_response(page.index), self._own_host)
        guarded = Router([*page.routes(), *controls.routes()], redirect_slashes=False)
        routes = [
            Mount(PREFIX, api),
            Mount(CONTROL_PREFIX, Guard(guarded, self._own_host)),
        ]
        self._router = Router(routes, redirect_slashes=False, default=self._root)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, as an ASGI app."""
        # Without "app", or the router would leave its 404 and 405 to an app around this one.
        await self._router({key: value for key, value in scope.items() if key != "app"}, receive, send)

    def _own_host(self) -> str | None:
        return None if self._base_url is None else urlsplit(self._base_url).hostname

    def _round_trip(self) -> float:
        return self._rng.uniform(*self._latency)

    async def _root(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        is_page = scope.get("method") == "GET" and path == "/"
        await (self._page if is_page else self._elsewhere)(scope, receive, send)

    async def _elsewhere(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a path outside of the API as the service does."""
        request = Request(scope, receive)
        user_id, _ = self._state.identify(request.headers.get("authorization", ""))
        number = self._log.add_request(seen_request(request, scope["path"], self._clock(), user_id))
        self._log.update(number, status_code=200, seconds=0.0)
        await send_response(html(200), send, {})

    @contextlib.contextmanager
    def serve(self, host: str = "127.0.0.1", port: int = 0) -> Generator["Sandbox"]:
        """Serve on a real socket, in a thread, while the context is open.

        It ends at once, whatever is still open, and leaves no thread and no socket behind; deliveries under
        way are aborted. It may be entered in an event loop, which it blocks for a few milliseconds.

        Args:
            host: The address to serve at.
            port: The port to serve at; 0 picks a free one.

        Raises:
            RuntimeError: If it is being served already.
            OSError: If the address is taken.
        """
        if self._base_url is not None:
            raise RuntimeError(f"the sandbox is already being served, at {self._base_url}")
        try:
            with listening(self, host, port) as origin:
                self._base_url = origin + PREFIX
                yield self
        finally:  # after the server, which takes bookings until it is gone
            self._base_url = None
            self._sender.close()

    @property
    def base_url(self) -> str:
        """The base URL for clients, with the prefix; RuntimeError if the sandbox is not being served."""
        if self._base_url is None:
            raise RuntimeError("the sandbox has no base_url until it is served: `with sandbox.serve(): …`")
        return self._base_url

    @property
    def url(self) -> str:
        """Where the sandbox is served: its page. RuntimeError if it is not being served."""
        return self.base_url.removesuffix(PREFIX)

    def client(self, account: int = 0, **options: Any) -> "AsyncLemcal":
        """Return a client for an account.

        Args:
            account: The account's index in ``accounts``.
            **options: Those of ``AsyncLemcal``. They win.

        Raises:
            RuntimeError: If the sandbox is not being served, and ``options`` have no ``base_url``.
        """
        from lemcal_async._client import AsyncLemcal  # noqa: PLC0415  # only this method needs the client

        known = self.accounts[account]
        if "base_url" not in options:
            options["base_url"] = self.base_url
        options = {"user_id": known.user_id, "api_key": known.api_key, **options}
        return AsyncLemcal(**options)

    @property
    def accounts(self) -> tuple[SandboxAccount, ...]:
        """The accounts. Elsewhere an account is identified by its index here."""
        return self._state.accounts

    @property
    def user_id(self) -> str:
        """The first account's user id."""
        return self.accounts[0].user_id

    @property
    def api_key(self) -> str:
        """The first account's API key."""
        return self.accounts[0].api_key

    def meetings(self, account: int = 0) -> list[dict[str, Any]]:
        """Return the account's meetings in the wire format.

        Args:
            account: The account's index in ``accounts``.
        """
        meetings: list[dict[str, Any]] = json.loads(self._state.meetings(account))
        return meetings

    def meeting_types(self, account: int = 0) -> list[dict[str, Any]]:
        """Return the account's meeting types in the wire format.

        Args:
            account: The account's index in ``accounts``.
        """
        return self._state.meeting_types(account)

    def hooks(self, account: int = 0) -> list[dict[str, Any]]:
        """Return the account's hooks in the wire format.

        Args:
            account: The account's index in ``accounts``.
        """
        return self._state.hooks(account)

    def add_hook(self, target_url: str, account: int = 0) -> dict[str, Any]:
        """Register a hook for any meeting type, without a request, and return it in the wire format.

        Args:
            target_url: Where new bookings are posted to.
            account: The account's index in ``accounts``.

        Raises:
            ValueError: If the service would not take the URL, or if there is such a hook already.
        """
        if not is_web_url(target_url):
            raise ValueError("a hook's target must be an absolute http:// or https:// URL")
        try:
            return self._state.add_hook(account, target_url, None)
        except DuplicateHookError:
            raise ValueError("there is already a hook for that target") from None

    def delete_hook(self, hook_id: str) -> None:
        """Delete a hook, without a request.

        Args:
            hook_id: The hook's id.

        Raises:
            LookupError: If there is none.
        """
        if not any(self._state.delete_hook(account, hook_id) for account in range(len(self.accounts))):
            raise LookupError(f"there is no hook {hook_id}")

    def book(
        self,
        account: int = 0,
        *,
        meeting_type_id: str | None = None,
        public: bool = True,
        guest: str | None = None,
        start: datetime | str | None = None,
        **changes: Any,
    ) -> dict[str, Any]:
        """Book a meeting, fire its hooks, and return it in the wire format.

        Args:
            account: The account's index in ``accounts``.
            meeting_type_id: The meeting type; if left out, the account's first.
            public: False adds a lead.
            guest: An e-mail address, with a name if you like (``"Ada <ada@example.org>"``); made up if left
                out.
            start: An aware datetime or ISO 8601; made up if left out.
            **changes: Fields of the wire format: ``book(attendeeTimezone="Europe/Paris")``.

        Raises:
            LookupError: If there is no such account or meeting type.
            ValueError: If the ``_id`` is taken, or for values that cannot be right.
            TypeError: For names or values that cannot be right.
        """
        meeting, fired = self._state.book(
            account,
            meeting_type_id=meeting_type_id,
            public=public,
            guest=_guest_of(guest),
            start=_start_of(start),
            changes=_wire_fields(changes),
        )
        for hook in fired:
            self._sender.send(hook, meeting["_id"], dumps(meeting))
        return meeting

    def cancel(self, meeting: "str | dict[str, Any] | Meeting") -> dict[str, Any]:
        """Cancel a meeting: it stays in the list, with ``canceledAt``.

        Args:
            meeting: An id, a row as ``book()`` returns it, or a ``Meeting``.

        Raises:
            LookupError: If there is none.
        """
        return self._state.cancel(_meeting_id_of(meeting))

    def remove(self, meeting: "str | dict[str, Any] | Meeting") -> None:
        """Remove a meeting from the list.

        Args:
            meeting: An id, a row as ``book()`` returns it, or a ``Meeting``.

        Raises:
            LookupError: If there is none.
        """
        self._state.remove(_meeting_id_of(meeting))

    def edit(self, meeting: "str | dict[str, Any] | Meeting", **wire_changes: Any) -> dict[str, Any]:
        """Replace wire fields of a meeting and return it.

        No hook fires: the service announces new bookings only (observed).

        Args:
            meeting: An id, a row as ``book()`` returns it, or a ``Meeting``.
            **wire_changes: The fields. Datetimes are written as the service writes them.

        Raises:
            LookupError: If there is none.
            TypeError: For names or values that cannot be right.
            ValueError: For another ``_id``.
        """
        return self._state.edit(_meeting_id_of(meeting), _wire_fields(wire_changes))

    def inject(
        self, fault: Fault, *, times: int = 1, method: str | None = None, path: str | None = None
    ) -> None:
        """Apply a fault to the next requests.

        Faults apply in the order of injection. A request that meets one counts like any other, except with
        ``reset_before_processing``.

        Args:
            fault: One of ``lemcal_async.sandbox.faults``.
            times: How many requests meet it.
            method: The only HTTP method that it is for; None for any.
            path: The only path that it is for, relative to the prefix and with wildcards if you like
                (``/meetings``, ``/hooks/*``); None for any.

        Raises:
            TypeError: If ``fault`` is none, such as a function that was not called.
            ValueError: If ``times`` is below 1.
        """
        self._faults.add(fault, times, method, path)

    def clear_faults(self) -> None:
        """Drop the faults that no request has met yet."""
        self._faults.clear()

    @property
    def requests(self) -> list[SeenRequest]:
        """The newest 100,000 requests in the order of counting, without those for controls."""
        return self._log.snapshot()

    @property
    def deliveries(self) -> list[Delivery]:
        """The newest 10,000 finished hook deliveries, in that order."""
        return self._sender.deliveries.snapshot()

    def follow(self) -> Follower:
        """Return what tells of the requests and deliveries that finish from now on."""
        return Follower(self._log, self._sender.deliveries)

    def wait_for_deliveries(self, count: int, timeout: float = 5.0) -> list[Delivery]:
        """Block until so many deliveries in all have finished, and return them.

        Do not call it in the event loop that runs the receiver.

        Args:
            count: How many deliveries.
            timeout: For how many seconds.

        Raises:
            TimeoutError: If fewer have finished by then.
        """
        return self._sender.wait_for(count, timeout)

    def repeat_delivery(self, number: int) -> None:
        """Deliver once more what a delivery has sent, to the same target.

        Args:
            number: The number of the delivery.

        Raises:
            LookupError: If there was none.
        """
        self._sender.send_again(number)


def _meeting_id_of(meeting: object) -> str:
    """Return the id of a meeting: of an id, a row as ``book`` returns it, or a model."""
    found, kind = meeting, type(meeting).__name__
    if isinstance(meeting, Mapping):
        found = cast("Mapping[str, object]", meeting).get("_id")
    elif not isinstance(meeting, str):
        found = getattr(meeting, "id", None)
    if not isinstance(found, str):
        raise TypeError(f"pass the id of a meeting, a row as book() returns it, or a Meeting, not {kind}")
    return found


def _guest_of(guest: object) -> Guest | None:
    """Return the guest of ``ada@example.org`` or ``Ada Lovelace <ada@example.org>``; None stays None."""
    if guest is None:
        return None
    name, email = parseaddr(guest) if isinstance(guest, str) else ("", "")
    if not all(email.partition("@")):
        raise ValueError(
            f"guest={guest!r}: pass an e-mail address, such as 'ada@example.org' or 'Ada <ada@example.org>'"
        )
    return Guest(name or email.partition("@")[0].replace(".", " ").title(), email)


def _start_of(start: object) -> datetime | None:
    """Return the moment: of an aware datetime, or of ISO 8601 with an offset; None stays None."""
    if start is None:
        return None
    moment = start
    if isinstance(start, str):
        try:
            moment = datetime.fromisoformat(start)
        except ValueError:
            moment = None
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise ValueError(f"start={start!r}: pass an aware datetime, or '2026-03-02T09:00:00.000Z'")
    return moment


def _wire_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields for a meeting in the wire format; datetimes become the service's text.

    TypeError for names of the models in place of the wire's, and for values that JSON does not have.
    """
    for name in fields:
        if "_" in name.strip("_"):
            first, *others = name.split("_")
            wire_name = first + "".join(map(str.capitalize, others))
            raise TypeError(f"{name}= is not a field of the wire format; did you mean {wire_name}=?")
        if name in ("id", "email"):
            raise TypeError(
                f"{name}= is not a field of a meeting; did you mean {'_id' if name == 'id' else 'guest'}=?"
            )
    try:
        converted: dict[str, Any] = json.loads(json.dumps(fields, default=_wire_time))
    except ValueError as error:  # a cycle
        raise TypeError(str(error)) from None
    return converted


def _wire_time(value: object) -> str:
    if not isinstance(value, datetime):
        raise TypeError(f"a field of a meeting must be JSON or a datetime, not {type(value).__name__}")
    if value.tzinfo is None:
        raise TypeError(f"{value!r} is not an aware datetime; add tzinfo=UTC, or another zone")
    return wire_time(value)


def run(
    sandbox: Sandbox,
    host: str,
    port: int,
    on_ready: Callable[[Sandbox], object],
    on_event: Callable[[SeenRequest | Delivery], object] | None = None,
) -> None:
    """Serve in the foreground until Ctrl-C.

    Args:
        sandbox: What to serve.
        host: The address to serve at.
        port: The port to serve at; 0 picks a free one.
        on_ready: Called once connections are accepted.
        on_event: Called with every request and every hook delivery that has finished.
    """
    with contextlib.suppress(KeyboardInterrupt), sandbox.serve(host, port):
        follower = sandbox.follow()
        on_ready(sandbox)
        while True:
            time.sleep(3600 if on_event is None else _POLL)  # unlike a lock's, this wait ends at Ctrl-C
            if on_event is not None:
                for entry in follower.finished():
                    on_event(entry)
