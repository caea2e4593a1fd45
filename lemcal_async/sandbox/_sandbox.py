"""The sandbox as its users hold it: an ASGI app, the controls over it, and the ways to serve it.

What the service does is in the modules beside this one; here they are put together.
"""

import contextlib
import json
import random
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Final

from starlette.requests import Request
from starlette.routing import Mount, Router
from starlette.types import Receive, Scope, Send

from lemcal_async.sandbox._answers import dumps, html
from lemcal_async.sandbox._app import Api, seen_request, send_answer
from lemcal_async.sandbox._control import control_routes
from lemcal_async.sandbox._demo import SandboxAccount
from lemcal_async.sandbox._hooks import Delivery, HookSender
from lemcal_async.sandbox._log import RequestLog, SeenRequest
from lemcal_async.sandbox._ratelimit import COUNTERS, WindowKind
from lemcal_async.sandbox._server import listening
from lemcal_async.sandbox._state import SandboxState
from lemcal_async.sandbox.faults import Fault, FaultPlan

if TYPE_CHECKING:
    from lemcal_async._client import AsyncLemcal

PREFIX: Final = "/api/lemcal"
CONTROL_PREFIX: Final = "/_sandbox"


class Sandbox:
    """A lemcal of your own, with invented accounts and meetings that are the same for the same ``seed``.

    ``limit`` requests per ``period`` seconds and credential are let through, as at the real service;
    None lifts the limit and leaves its headers out. ``window="sliding"`` counts in a strict sliding log
    instead of a window that starts at a key's first request. ``latency`` is the least and the greatest
    round trip in seconds, half of it before a request is counted, half after. ``clock`` is what the rate
    limit and the logs go by.

    An instance is an ASGI app, and ``serve()`` puts it on a real socket. All methods may be called from
    any thread; none needs an event loop.
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
            raise ValueError("a sandbox has at least one account, and no less than 0 meetings in each")
        if (limit is not None and limit < 1) or period <= 0:
            raise ValueError("limit must be at least 1 (None: no limit), and period above 0 seconds")
        if window not in COUNTERS:
            raise ValueError(f"window is one of {', '.join(COUNTERS)}")
        if not 0 <= latency[0] <= latency[1]:
            raise ValueError("latency is (least, greatest) in seconds")
        self._world = SandboxState(accounts=accounts, meetings=meetings, seed=seed)
        self._faults = FaultPlan()
        self._log = RequestLog()
        self._hooks = HookSender(clock)
        self._clock = clock
        self._base_url: str | None = None
        self._latency = latency
        self._rng = random.Random(f"lemcal sandbox latency {seed}")  # noqa: S311  # not a secret
        counter = None if limit is None else COUNTERS[window](limit, period, clock)
        api = Api(
            world=self._world,
            counter=counter,
            faults=self._faults,
            log=self._log,
            latency=self._round_trip,
            clock=clock,
        )
        routes = [
            Mount(PREFIX, api),
            Mount(CONTROL_PREFIX, Router(control_routes(self), redirect_slashes=False)),
        ]
        self._router = Router(routes, redirect_slashes=False, default=self._page)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, as an ASGI app."""
        # Without "app", or the router would leave its 404 and 405 to an app around this one.
        await self._router({key: value for key, value in scope.items() if key != "app"}, receive, send)

    def _round_trip(self) -> float:
        return self._rng.uniform(*self._latency)

    async def _page(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        user_id, _ = self._world.identify(request.headers.get("authorization", ""))
        number = self._log.add(seen_request(request, scope["path"], self._clock(), user_id))
        self._log.complete(number, status=200, processed=False)
        await send_answer(html(200), send, {})

    @contextlib.contextmanager
    def serve(self, host: str = "127.0.0.1", port: int = 0) -> Generator["Sandbox"]:
        """Serve on a real socket, in a thread, while the context is open; port 0 takes a free one.

        Ends at once, whatever is still open, and leaves no thread and no socket behind. Hooks that are
        being delivered are broken off. OSError if the address is taken. It may be entered in an event
        loop: it holds the loop up for some milliseconds.
        """
        if self._base_url is not None:
            raise RuntimeError(f"the sandbox is being served already, at {self._base_url}")
        try:
            with listening(self, host, port) as origin:
                self._base_url = origin + PREFIX
                yield self
        finally:  # after the server: it takes bookings until it is gone
            self._base_url = None
            self._hooks.close()

    @property
    def base_url(self) -> str:
        """The base URL for clients, with the prefix; RuntimeError when the sandbox is not being served."""
        if self._base_url is None:
            raise RuntimeError("the sandbox has no base_url until it is served: `with sandbox.serve(): …`")
        return self._base_url

    def client(self, account: int = 0, **options: Any) -> "AsyncLemcal":
        """Return a client for an account; ``options`` are those of ``AsyncLemcal``, and win."""
        from lemcal_async._client import AsyncLemcal  # noqa: PLC0415  # only this method needs the client

        known = self.accounts[account]
        if "base_url" not in options:
            options["base_url"] = self.base_url
        options = {"user_id": known.user_id, "api_key": known.api_key, **options}
        return AsyncLemcal(**options)

    @property
    def accounts(self) -> tuple[SandboxAccount, ...]:
        """The accounts. Elsewhere an account is named by its place in here."""
        return self._world.accounts

    @property
    def user_id(self) -> str:
        """The first account's user id."""
        return self.accounts[0].user_id

    @property
    def api_key(self) -> str:
        """The first account's API key."""
        return self.accounts[0].api_key

    def meetings(self, account: int = 0) -> list[dict[str, Any]]:
        """Return the account's meetings in the wire format."""
        meetings: list[dict[str, Any]] = json.loads(self._world.meetings(account))
        return meetings

    def meeting_types(self, account: int = 0) -> list[dict[str, Any]]:
        """Return the account's meeting types in the wire format."""
        return self._world.meeting_types(account)

    def hooks(self, account: int = 0) -> list[dict[str, Any]]:
        """Return the account's hooks in the wire format."""
        return self._world.hooks(account)

    def book(
        self, account: int = 0, *, meeting_type_id: str | None = None, public: bool = True, **changes: Any
    ) -> dict[str, Any]:
        """Book a meeting, fire the hooks it concerns, and return it in the wire format.

        It is of the account's first meeting type unless told otherwise; ``public=False`` gives it a
        lead. ``changes`` are fields of the wire format: ``book(start="2026-03-02T09:00:00.000Z")``.
        LookupError if there is no such account or meeting type; ValueError if the ``_id`` is taken.
        """
        meeting, fired = self._world.book(
            account, meeting_type_id=meeting_type_id, public=public, changes=changes
        )
        for hook in fired:
            self._hooks.send(hook, meeting["_id"], dumps(meeting))
        return meeting

    def cancel(self, meeting_id: str) -> dict[str, Any]:
        """Cancel a meeting: it stays in the list, with ``canceledAt``. LookupError if there is none."""
        return self._world.cancel(meeting_id)

    def remove(self, meeting_id: str) -> None:
        """Let a meeting disappear from the list. LookupError if there is none."""
        self._world.remove(meeting_id)

    def edit(self, meeting_id: str, **wire_changes: Any) -> dict[str, Any]:
        """Replace fields of a meeting and return it, in the wire format. LookupError if there is none.

        No hook fires: at the service they fire on new bookings only (observed).
        """
        return self._world.edit(meeting_id, wire_changes)

    def inject(
        self, fault: Fault, *, times: int = 1, method: str | None = None, path: str | None = None
    ) -> None:
        """Let the next ``times`` requests meet a fault, one of ``lemcal_async.sandbox.faults``.

        ``method`` and ``path`` choose the requests, None any; the path is below the prefix and may
        hold wildcards: ``/meetings``, ``/hooks/*``. Faults are met in the order of their injection.
        A request that meets one counts like any other, but for ``reset_before_processing``.
        """
        self._faults.add(fault, times, method, path)

    def clear_faults(self) -> None:
        """Forget the faults that no request has met yet."""
        self._faults.clear()

    @property
    def requests(self) -> list[SeenRequest]:
        """The newest 100,000 requests in the order of their counting, those for controls left out."""
        return self._log.snapshot()

    @property
    def deliveries(self) -> list[Delivery]:
        """The hook deliveries that have ended, in that order."""
        return self._hooks.snapshot()

    def wait_for_deliveries(self, count: int, timeout: float = 5.0) -> list[Delivery]:
        """Block until ``count`` deliveries in all have ended, and return them.

        TimeoutError after ``timeout`` seconds. Not for an event loop that runs the receiver itself.
        """
        return self._hooks.wait_for(count, timeout)


def run(sandbox: Sandbox, host: str, port: int, on_ready: Callable[[Sandbox], object]) -> None:
    """Serve in the foreground until Ctrl-C; ``on_ready`` is called once connections are accepted."""
    with contextlib.suppress(KeyboardInterrupt), sandbox.serve(host, port):
        on_ready(sandbox)
        while True:
            time.sleep(3600)  # unlike a lock's, this wait ends at Ctrl-C on every system
