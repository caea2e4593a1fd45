"""The page at ``/``, and the routes that its script requests, including the live stream.

The stream (server-sent events) polls the journals several times per second: polling is cheap, and works on
any event loop and with changes from any thread.
"""

import json
import time
from collections.abc import AsyncGenerator, Callable
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

import anyio
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from lemcal_async.sandbox import _html

if TYPE_CHECKING:
    from lemcal_async.sandbox._hooks import HookSender
    from lemcal_async.sandbox._log import RequestLog, SeenRequest
    from lemcal_async.sandbox._sandbox import Sandbox
    from lemcal_async.sandbox._state import SandboxState
    from lemcal_async.sandbox.faults import FaultPlan

_INITIAL_ROWS: Final = 300
_OLDER_ROWS: Final = 1_000
_ROWS_PER_EVENT: Final = 500

_POLL_INTERVAL: Final = 0.15  # seconds
_KEEPALIVE_INTERVAL: Final = 15.0  # seconds without an event after which a comment is sent

_MEDIA_TYPES: Final = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}

_SECURITY_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Page:
    """The page's routes. ``limit`` describes the rate limit to the page's script."""

    def __init__(
        self,
        sandbox: "Sandbox",
        state: "SandboxState",
        log: "RequestLog",
        sender: "HookSender",
        fault_plan: "FaultPlan",
        *,
        clock: Callable[[], float],
        limit: dict[str, Any],
    ) -> None:
        self._sandbox = sandbox
        self._state = state
        self._log = log
        self._deliveries = sender.deliveries
        self._faults = fault_plan
        self._clock = clock
        self._limit = limit
        self._emails = {account.user_id: account.email for account in sandbox.accounts}

    def routes(self) -> list[BaseRoute]:
        """Return the routes, to be mounted together with those of the controls."""
        return [
            Route("/static/{name}", self._static),
            Route("/events", self._events),
            Route("/page/state", self._lists),
            Route("/page/requests", self._older),
            Route("/page/requests/{number:int}", self._details),
        ]

    async def index(self, request: Request) -> Response:
        """Return the page."""
        return _respond(_html.page(self._view(request)))

    def _view(self, request: Request) -> _html.View:
        account = _number(request, "account", 0)
        account = account if 0 <= account < len(self._sandbox.accounts) else 0
        root = str(request.base_url).rstrip("/")
        return _html.View(
            base_url=f"{root}/api/lemcal",
            accounts=self._sandbox.accounts,
            account=account,
            meetings=self._sandbox.meetings(account),
            meeting_types=self._sandbox.meeting_types(account),
            hooks=self._sandbox.hooks(account),
            faults=self._faults.snapshot(),
            stream=self._position(),  # read before the rows, so that later changes are sent again, not missed
            requests=self._log.before(None, _INITIAL_ROWS),
            deliveries=self._deliveries.before(None, _INITIAL_ROWS),
        )

    def _position(self) -> str:
        return (
            f"{self._log.revision}-{self._deliveries.revision}-{self._state.revision}-{self._faults.revision}"
        )

    async def _static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _MEDIA_TYPES:
            return PlainTextResponse("Not Found", 404)
        content = files("lemcal_async.sandbox").joinpath("static", name).read_bytes()
        return Response(content, media_type=_MEDIA_TYPES[name], headers=_SECURITY_HEADERS)

    async def _lists(self, request: Request) -> Response:
        view = self._view(request)
        lists = {
            "meetings": _html.meetings(view),
            "hooks": _html.hooks(view),
            "faults": _html.faults(view.faults),
        }
        return JSONResponse(lists, headers=_SECURITY_HEADERS)

    async def _older(self, request: Request) -> Response:
        rows = self._log.before(_number(request, "before", 0), _OLDER_ROWS)
        return _respond("".join(_html.request_row(entry, self._emails) for entry in rows))

    async def _details(self, request: Request) -> Response:
        entry = self._log.get(request.path_params["number"])
        return _respond(_html.request_details(entry) if entry else "<p class=hint>no longer in the log</p>")

    async def _events(self, request: Request) -> Response:
        position = request.headers.get("last-event-id") or request.query_params.get("after", "")
        headers = {**_SECURITY_HEADERS, "X-Accel-Buffering": "no"}
        return StreamingResponse(self._stream(position), media_type="text/event-stream", headers=headers)

    async def _stream(self, position: str) -> AsyncGenerator[str]:
        yield _event("hello", {"now": self._clock(), **self._limit})
        try:
            revisions = [int(part) for part in position.split("-")]
            requests, deliveries, state, fault_plan = revisions
        except ValueError:
            requests, deliveries, state, fault_plan = (int(part) for part in self._position().split("-"))
        if not (self._log.covers(requests) and self._deliveries.covers(deliveries)):
            # The page belongs to an earlier sandbox at this address, or was suspended for too long.
            yield _event("reload", None)
            return
        last_sent_at = time.monotonic()
        while True:
            sent = False
            if requests != self._log.revision:
                requests, changed = self._log.changed_since(requests)
                for start in range(0, len(changed), _ROWS_PER_EVENT):
                    rows = [self._row(entry) for entry in changed[start : start + _ROWS_PER_EVENT]]
                    yield _event("requests", rows)
                sent = True
            if deliveries != self._deliveries.revision:
                deliveries, finished = self._deliveries.changed_since(deliveries)
                rows = [{"id": f"d{entry.number}", "html": _html.delivery_row(entry)} for entry in finished]
                yield _event("deliveries", rows)
                sent = True
            if (state, fault_plan) != (self._state.revision, self._faults.revision):
                state, fault_plan = self._state.revision, self._faults.revision
                yield _event("state", None)
                sent = True
            if sent:
                yield f"id: {requests}-{deliveries}-{state}-{fault_plan}\n\n"
                last_sent_at = time.monotonic()
            elif time.monotonic() - last_sent_at > _KEEPALIVE_INTERVAL:
                yield ": keep-alive\n\n"
                last_sent_at = time.monotonic()
            await anyio.sleep(_POLL_INTERVAL)

    def _row(self, entry: "SeenRequest") -> dict[str, Any]:
        return {
            "id": f"r{entry.number}",
            "html": _html.request_row(entry, self._emails),
            "at": entry.at,
            "key": self._emails.get(entry.user_id or "", "unknown key"),
            "refused": entry.status_code == 429,
            "limit": entry.limit,
            "remaining": entry.remaining,
            "resetsIn": entry.resets_in,
        }


def _event(name: str, data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _respond(text: str) -> Response:
    return HTMLResponse(text, headers=_SECURITY_HEADERS)


def _number(request: Request, name: str, default: int) -> int:
    try:
        return int(request.query_params[name])
    except (KeyError, ValueError):
        return default
