"""The public ``Sandbox``: an ASGI app, its controls, and the ways to serve it.

Connects the other modules of this package, and validates the arguments of the controls.
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

from lemcal_async._checks import is_whole
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

_POLL_INTERVAL: Final = 0.1  # seconds between checks for finished requests and deliveries


class Sandbox:
    """A local lemcal with made-up accounts and meetings.

    An instance is an ASGI app; ``serve()`` serves it on a real socket. All methods are thread-safe and work
    without an event loop.

    Args:
        accounts: The number of accounts.
        meetings: The number of meetings per account.
        limit: The number of requests allowed per period and credential, as on the real service; None removes
            the limit and its headers.
        period: The length of a period in seconds.
        window: ``"fixed"``, a window that starts with a key's first request, or ``"sliding"``, a strict
            sliding log.
        latency: The shortest and the longest round trip, in seconds. Half of the round trip passes before a
            request is counted, half after.
        seed: Determines the accounts and meetings: the same seed always produces the same ones.
        clock: Returns the time in seconds, for the rate limit and the logs.

    Raises:
        ValueError: If an argument is invalid.
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
        """Serve a request."""
        # With "app" in the scope, the router would leave its 404 and 405 to the enclosing app.
        await self._router({key: value for key, value in scope.items() if key != "app"}, receive, send)

    def _own_host(self) -> str | None:
        return None if self._base_url is None else urlsplit(self._base_url).hostname

    def _round_trip(self) -> float:
        return self._rng.uniform(*self._latency)

    async def _root(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        is_page = scope.get("method") == "GET" and path == "/"
        await (self._page if is_page else self._outside_api)(scope, receive, send)

    async def _outside_api(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to a path outside the API as the service does."""
        request = Request(scope, receive)
        user_id, _ = self._state.identify(request.headers.get("authorization", ""))
        number = self._log.add_request(seen_request(request, scope["path"], self._clock(), user_id))
        self._log.update(number, status_code=200, seconds=0.0)
        await send_response(html(200), send, {})

    @contextlib.contextmanager
    def serve(self, host: str = "127.0.0.1", port: int = 0) -> Generator["Sandbox"]:
        """Serve on a real socket, in a thread, while the context is open.

        On exit, the server stops immediately: it closes open connections, aborts running deliveries, and
        leaves no thread or socket behind. Entering the context in an event loop blocks the loop for a few
        milliseconds.

        Args:
            host: The address to listen on.
            port: The port to listen on; 0 picks a free one.

        Raises:
            RuntimeError: If the sandbox is already being served.
            OSError: If the address is in use.
        """
        if self._base_url is not None:
            raise RuntimeError(f"the sandbox is already being served, at {self._base_url}")
        try:
            with listening(self, host, port) as origin:
                self._base_url = origin + PREFIX
                yield self
        finally:  # only now: the server accepts bookings until it has stopped
            self._base_url = None
            self._sender.close()

    @property
    def base_url(self) -> str:
        """The base URL for clients. Raises RuntimeError if the sandbox is not being served."""
        if self._base_url is None:
            raise RuntimeError("the sandbox has no base_url until it is served: `with sandbox.serve(): …`")
        return self._base_url

    @property
    def url(self) -> str:
        """The URL of the sandbox's page. Raises RuntimeError if the sandbox is not being served."""
        return self.base_url.removesuffix(PREFIX)

    def client(self, account: int = 0, **options: Any) -> "AsyncLemcal":
        """Return a client for an account.

        Args:
            account: The account's index in ``accounts``.
            **options: Arguments of ``AsyncLemcal``. They override the account's credentials and the base URL.

        Raises:
            LookupError: If the account does not exist.
            RuntimeError: If the sandbox is not being served and ``base_url`` is not given.
        """
        from lemcal_async._client import AsyncLemcal  # noqa: PLC0415  # only this method needs the client

        credentials = self.accounts[self._checked(account)]
        if "base_url" not in options:
            options["base_url"] = self.base_url
        options = {"user_id": credentials.user_id, "api_key": credentials.api_key, **options}
        return AsyncLemcal(**options)

    @property
    def accounts(self) -> tuple[SandboxAccount, ...]:
        """The accounts. Other methods identify an account by its index in this tuple."""
        return self._state.accounts

    @property
    def user_id(self) -> str:
        """The first account's user id."""
        return self.accounts[0].user_id

    @property
    def api_key(self) -> str:
        """The first account's API key."""
        return self.accounts[0].api_key

    def _checked(self, account: object) -> int:
        """Return the account's index; LookupError if it does not exist."""
        if not is_whole(account):
            raise TypeError(f"account must be a whole number, not {account!r}")
        count = len(self.accounts)
        if account not in range(count):
            raise LookupError(f"there is no account {account}; accounts are numbered from 0 to {count - 1}")
        return account

    def meetings(self, account: int = 0) -> list[dict[str, Any]]:
        """Return the account's meetings in the wire format.

        Args:
            account: The account's index in ``accounts``.

        Raises:
            LookupError: If the account does not exist.
        """
        meetings: list[dict[str, Any]] = json.loads(self._state.meetings(self._checked(account)))
        return meetings

    def meeting_types(self, account: int = 0) -> list[dict[str, Any]]:
        """Return the account's meeting types in the wire format.

        Args:
            account: The account's index in ``accounts``.

        Raises:
            LookupError: If the account does not exist.
        """
        return self._state.meeting_types(self._checked(account))

    def hooks(self, account: int = 0) -> list[dict[str, Any]]:
        """Return the account's hooks in the wire format.

        Args:
            account: The account's index in ``accounts``.

        Raises:
            LookupError: If the account does not exist.
        """
        return self._state.hooks(self._checked(account))

    def add_hook(self, target_url: str, account: int = 0) -> dict[str, Any]:
        """Register a hook for any meeting type, without a request, and return it in the wire format.

        Args:
            target_url: The URL that new bookings are posted to.
            account: The account's index in ``accounts``.

        Raises:
            LookupError: If the account does not exist.
            ValueError: If the service would reject the URL, or if the hook already exists.
        """
        if not is_web_url(target_url):
            raise ValueError("a hook's target must be an absolute http:// or https:// URL")
        try:
            return self._state.add_hook(self._checked(account), target_url, None)
        except DuplicateHookError:
            raise ValueError("there is already a hook for that target") from None

    def delete_hook(self, hook_id: str) -> None:
        """Delete a hook, without a request.

        Args:
            hook_id: The hook's id.

        Raises:
            LookupError: If no hook has this id.
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
            meeting_type_id: The meeting type's id. Defaults to the account's first meeting type.
            public: Whether this is a public booking. Other bookings have a lead.
            guest: An e-mail address, optionally with a name (``"Ada <ada@example.org>"``); made up if None.
            start: An aware datetime or an ISO 8601 string; made up if None.
            **changes: Wire-format fields to override: ``book(attendeeTimezone="Europe/Paris")``.

        Raises:
            LookupError: If the account or the meeting type does not exist.
            ValueError: If the ``_id`` is already in use, or if ``guest`` or ``start`` is invalid.
            TypeError: If a name is that of a model's attribute (``canceled_at``), or if a value is neither
                JSON nor an aware datetime.
        """
        meeting, fired = self._state.book(
            self._checked(account),
            meeting_type_id=meeting_type_id,
            public=public,
            guest=_parse_guest(guest),
            start=_parse_start(start),
            changes=_wire_fields(changes),
        )
        for hook in fired:
            self._sender.send(hook, meeting["_id"], dumps(meeting))
        return meeting

    def cancel(self, meeting: "str | dict[str, Any] | Meeting") -> dict[str, Any]:
        """Cancel a meeting and return it: it stays in the list, with ``canceledAt``.

        Args:
            meeting: An id, a row as returned by ``book()``, or a ``Meeting``.

        Raises:
            LookupError: If the meeting does not exist.
        """
        return self._state.cancel(_meeting_id_of(meeting))

    def remove(self, meeting: "str | dict[str, Any] | Meeting") -> None:
        """Remove a meeting from the list.

        Args:
            meeting: An id, a row as returned by ``book()``, or a ``Meeting``.

        Raises:
            LookupError: If the meeting does not exist.
        """
        self._state.remove(_meeting_id_of(meeting))

    def edit(self, meeting: "str | dict[str, Any] | Meeting", **wire_changes: Any) -> dict[str, Any]:
        """Replace wire-format fields of a meeting and return it.

        No hook fires: the service announces only new bookings (observed).

        Args:
            meeting: An id, a row as returned by ``book()``, or a ``Meeting``.
            **wire_changes: The fields to replace. Datetimes are converted to the service's format.

        Raises:
            LookupError: If the meeting does not exist.
            TypeError: If a name is that of a model's attribute (``canceled_at``), or if a value is neither
                JSON nor an aware datetime.
            ValueError: If ``_id`` is one of the fields.
        """
        return self._state.edit(_meeting_id_of(meeting), _wire_fields(wire_changes))

    def inject(
        self, fault: Fault, *, times: int = 1, method: str | None = None, path: str | None = None
    ) -> None:
        """Apply a fault to the next requests.

        Faults apply in the order of injection. The request counts toward the rate limit, except with
        ``reset_before_processing``.

        Args:
            fault: A fault made by a function of ``lemcal_async.sandbox.faults``.
            times: The number of requests that the fault applies to.
            method: The HTTP method that the fault applies to; None for any.
            path: The path that the fault applies to, relative to the API prefix. Wildcards are allowed
                (``/meetings``, ``/hooks/*``). None for any.

        Raises:
            TypeError: If ``fault`` is not a fault, such as a function that was not called, or if another
                argument has the wrong type.
            ValueError: If ``times`` is below 1, or if ``path`` does not start with a slash or includes the
                API prefix.
        """
        if isinstance(path, str) and f"{path}/".startswith(f"{PREFIX}/"):
            raise ValueError(f"path is relative to the API prefix; omit {PREFIX} from {path!r}")
        self._faults.add(fault, times, method, path)

    def clear_faults(self) -> None:
        """Discard the pending faults."""
        self._faults.clear()

    @property
    def requests(self) -> list[SeenRequest]:
        """The latest 100,000 requests, in the order they were counted, without requests to the controls."""
        return self._log.snapshot()

    @property
    def deliveries(self) -> list[Delivery]:
        """The latest 10,000 finished hook deliveries, in the order they finished."""
        return self._sender.deliveries.snapshot()

    def follow(self) -> Follower:
        """Return a follower of the requests and deliveries that finish from now on."""
        return Follower(self._log, self._sender.deliveries)

    def wait_for_deliveries(self, count: int, timeout: float = 5.0) -> list[Delivery]:
        """Block until a total of ``count`` deliveries have finished, and return all finished deliveries.

        Do not call this in the event loop that runs the receiver: it would never respond.

        Args:
            count: The total number of finished deliveries to wait for.
            timeout: The maximum wait in seconds.

        Raises:
            TimeoutError: If fewer deliveries finish in time.
        """
        return self._sender.wait_for(count, timeout)

    def repeat_delivery(self, number: int) -> None:
        """Queue an earlier delivery again: the same body, to the same target.

        Args:
            number: The delivery's number.

        Raises:
            LookupError: If no delivery has this number.
        """
        self._sender.send_again(number)


def _meeting_id_of(meeting: object) -> str:
    """Return the meeting's id, given the id itself, a row as returned by ``book``, or a model."""
    found, kind = meeting, type(meeting).__name__
    if isinstance(meeting, Mapping):
        found = cast("Mapping[str, object]", meeting).get("_id")
    elif not isinstance(meeting, str):
        found = getattr(meeting, "id", None)
    if not isinstance(found, str):
        raise TypeError(f"pass a meeting's id, a row as returned by book(), or a Meeting, not {kind}")
    return found


def _parse_guest(guest: object) -> Guest | None:
    """Parse ``ada@example.org`` or ``Ada Lovelace <ada@example.org>``; None stays None."""
    if guest is None:
        return None
    name, email = parseaddr(guest) if isinstance(guest, str) else ("", "")
    if not all(email.partition("@")):
        raise ValueError(
            f"guest={guest!r}: pass an e-mail address, such as 'ada@example.org' or 'Ada <ada@example.org>'"
        )
    return Guest(name or email.partition("@")[0].replace(".", " ").title(), email)


def _parse_start(start: object) -> datetime | None:
    """Return an aware datetime, parsed from ISO 8601 with an offset if needed; None stays None."""
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
    """Return a meeting's fields in the wire format, with datetimes converted to text.

    Raises TypeError for a model's attribute name in place of a wire name, and for a value that JSON cannot
    represent.
    """
    for name in fields:
        if "_" in name.strip("_"):
            first, *others = name.split("_")
            wire_name = first + "".join(map(str.capitalize, others))
            raise TypeError(f"{name}= is not a wire-format field; did you mean {wire_name}=?")
        if name in ("id", "email"):
            raise TypeError(
                f"{name}= is not a meeting field; did you mean {'_id' if name == 'id' else 'guest'}=?"
            )
    try:
        converted: dict[str, Any] = json.loads(json.dumps(fields, default=_wire_time))
    except ValueError as error:  # a circular reference
        raise TypeError(str(error)) from None
    return converted


def _wire_time(value: object) -> str:
    if not isinstance(value, datetime):
        raise TypeError(f"a meeting field must be a JSON value or a datetime, not {type(value).__name__}")
    if value.tzinfo is None:
        raise TypeError(f"{value!r} is not an aware datetime; add tzinfo=UTC or another time zone")
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
        sandbox: The sandbox to serve.
        host: The address to listen on.
        port: The port to listen on; 0 picks a free one.
        on_ready: Called with the sandbox once it accepts connections.
        on_event: Called with every request and every hook delivery that finishes.
    """
    with contextlib.suppress(KeyboardInterrupt), sandbox.serve(host, port):
        follower = sandbox.follow()
        on_ready(sandbox)
        while True:
            # Ctrl-C interrupts a sleep, but not the wait for a lock.
            time.sleep(3600 if on_event is None else _POLL_INTERVAL)
            if on_event is not None:
                for entry in follower.finished():
                    on_event(entry)
