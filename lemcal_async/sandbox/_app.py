"""The API as an ASGI app: latency, rate limit, fault, credentials, route, response.

The steps run in the order that the service must use: a request is counted on arrival, whatever its outcome
(documented: on all routes). ``respond`` implements the documented routes, checks and error texts. Other
modules decide on limits and faults; ``Api`` applies their decisions, including broken connections.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, Protocol

import anyio
import attrs
import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from lemcal_async._urls import without_secrets
from lemcal_async.sandbox._log import RequestLog, SeenRequest, body_text, public_headers
from lemcal_async.sandbox._ratelimit import Count, Counter, rate_limit_headers
from lemcal_async.sandbox._responses import (
    BODYLESS,
    SandboxResponse,
    json_data,
    json_text,
    text,
    wire_headers,
)
from lemcal_async.sandbox._state import DuplicateHookError, SandboxState, UnknownMeetingTypeError
from lemcal_async.sandbox.faults import Fault, FaultPlan, Reset, Slow, Truncated, describe


@attrs.frozen
class ApiRequest:
    """An authenticated request from ``account``; ``path`` is relative to the API prefix."""

    account: int
    method: str
    path: str
    query: Mapping[str, str] = attrs.field(factory=dict[str, str])
    body: bytes = b""


def respond(state: SandboxState, request: ApiRequest) -> SandboxResponse:
    """Process a request and return the response."""
    account = request.account
    routes: dict[str, Callable[[], SandboxResponse]] = {}
    match request.path.split("/")[1:]:
        case ["me"]:
            routes["GET"] = lambda: json_data(200, state.user(account))
        case ["meetings"]:
            meeting_type_id = request.query.get("meetingTypeId")
            routes["GET"] = lambda: json_text(200, state.meetings(account, meeting_type_id))
        case ["meetingTypes"]:
            routes["GET"] = lambda: json_data(200, state.meeting_types(account))
        case ["meetingTypes", item] if item:
            routes["GET"] = lambda: _meeting_type(state, account, item)
        case ["hooks"]:
            routes["POST"] = lambda: _create_hook(state, account, _json_object(request.body))
        case ["hooks", item] if item:
            routes["DELETE"] = lambda: _delete_hook(state, account, item)
        case _:
            return text(404, "Not Found")
    if request.method not in routes:
        return text(405, "Method Not Allowed", {"Allow": ", ".join(routes)})
    return routes[request.method]()


def _meeting_type(state: SandboxState, account: int, meeting_type_id: str) -> SandboxResponse:
    for meeting_type in state.meeting_types(account):
        if meeting_type["_id"] == meeting_type_id:
            return json_data(200, meeting_type)
    return text(404, "meeting type not found")


def _create_hook(state: SandboxState, account: int, fields: dict[str, Any]) -> SandboxResponse:
    target_url, meeting_type_id = fields.get("targetUrl"), fields.get("meetingTypeId")
    any_type = fields.get("anyMeetingType") is True  # takes precedence over an id (documented)
    if not target_url:
        return text(400, "You must provide a targetUrl")
    if not is_web_url(target_url):
        return text(400, "Invalid targetUrl")
    if not any_type and not meeting_type_id:
        return text(400, "You must provide either a meetingTypeId or anyMeetingType")
    try:
        hook = state.add_hook(account, target_url, None if any_type else str(meeting_type_id))
    except UnknownMeetingTypeError:
        return text(404, "meeting type not found")
    except DuplicateHookError:
        return text(409, "Duplicate hook")
    return json_data(200, hook)


def _delete_hook(state: SandboxState, account: int, hook_id: str) -> SandboxResponse:
    return SandboxResponse(204) if state.delete_hook(account, hook_id) else text(404, "hook not found")


def _json_object(body: bytes) -> dict[str, Any]:
    """Parse a JSON object. Any other body is treated as empty, so its first field counts as missing."""
    try:
        data: object = json.loads(body)
    except ValueError:
        return {}
    return dict[str, Any](data) if isinstance(data, dict) else {}  # pyright: ignore[reportUnknownArgumentType]  # a JSON object has str keys


def is_web_url(target: object) -> bool:
    """Whether the service accepts this value as a hook's target."""
    if not isinstance(target, str):
        return False
    try:
        url = httpx.URL(target)
    except (httpx.InvalidURL, ValueError):  # ValueError: a lone surrogate
        return False
    return url.scheme in {"http", "https"} and bool(url.host)


CONNECTION: Final = "lemcal_async.sandbox.connection"
"""The name of the ASGI extension through which the app can break the connection."""


class Connection(Protocol):
    """The connection of a request."""

    def reset(self) -> None:
        """Send a TCP RST."""

    def close(self) -> None:
        """Send the data already written, then close."""


@attrs.frozen
class _Arrival:
    account: int | None
    fault: Fault | None
    count: Count | None
    common_headers: dict[str, str]
    number: int


_RESET_ON_ARRIVAL: Final = Reset(processed=False)


class Api:
    """The API, mounted at its prefix. ``counter`` is None if there is no rate limit.

    ``latency`` returns the round-trip time of the next request, in seconds.
    """

    def __init__(
        self,
        *,
        state: SandboxState,
        counter: Counter | None,
        faults: FaultPlan,
        log: RequestLog,
        latency: Callable[[], float],
        clock: Callable[[], float],
    ) -> None:
        self._state = state
        self._counter = counter
        self._faults = faults
        self._log = log
        self._latency = latency
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        with contextlib.suppress(ClientDisconnect):  # during the request: no response is needed
            await self._serve(Request(scope, receive), send)

    async def _serve(self, request: Request, send: Send) -> None:
        started = self._clock()
        one_way = self._latency() / 2
        await anyio.sleep(one_way)
        arrival = self._arrive(request)
        try:
            await self._finish(request, send, arrival, one_way)
        finally:
            self._log.update(arrival.number, seconds=self._clock() - started)

    async def _finish(self, request: Request, send: Send, arrival: _Arrival, one_way: float) -> None:
        fault = arrival.fault
        body = await request.body()  # in full: a client that is still sending would see other errors
        log_text = _hook_text if _path(request).startswith("/hooks") else body_text
        self._log.update(arrival.number, request_body=log_text(body))
        if fault == _RESET_ON_ARRIVAL:
            await _break_connection(request, reset=True)
            return
        response, processed = self._decide(request, body, arrival)
        self._log.update(arrival.number, processed=processed)
        if isinstance(fault, Reset):
            await _break_connection(request, reset=True)
            return
        await anyio.sleep(one_way + (fault.seconds if isinstance(fault, Slow) else 0))
        self._log.update(
            arrival.number, status_code=response.status_code, response_body=log_text(response.body)
        )
        if isinstance(fault, Truncated):
            await _send_part(response, send, arrival.common_headers)
            await _break_connection(request, reset=False)
            return
        await send_response(response, send, arrival.common_headers)

    def _arrive(self, request: Request) -> _Arrival:
        path = _path(request)
        fault = self._faults.take(request.method, path)
        authorization = request.headers.get("authorization", "")
        user_id, account = self._state.identify(authorization)
        count = None
        if self._counter and fault != _RESET_ON_ARRIVAL:
            # Counted per credential as sent, valid or not, and by digest: the API key itself is never stored.
            count = self._counter.count(hashlib.sha256(authorization.encode()).hexdigest())
        seen = seen_request(request, path, count.at if count else self._clock(), user_id)
        if count:
            seen = attrs.evolve(seen, limit=count.limit, remaining=count.remaining, resets_in=count.resets_in)
        if fault is not None:
            seen = attrs.evolve(seen, fault=describe(fault))
        common_headers = rate_limit_headers(count, time.time()) if count else {}
        return _Arrival(account, fault, count, common_headers, self._log.add_request(seen))

    def _decide(self, request: Request, body: bytes, arrival: _Arrival) -> tuple[SandboxResponse, bool]:
        """Return the response and whether the route processed the request."""
        if isinstance(arrival.fault, SandboxResponse):
            return arrival.fault, False
        if arrival.count and not arrival.count.allowed:
            return text(429, "Too Many Requests"), False
        if arrival.account is None:
            return text(401, "Unauthorized"), False
        api_request = ApiRequest(arrival.account, request.method, _path(request), request.query_params, body)
        return respond(self._state, api_request), True


def seen_request(request: Request, path: str, at: float, user_id: str | None) -> SeenRequest:
    """Create the log entry for a request."""
    headers = public_headers(request.headers)
    now = datetime.now(UTC)
    return SeenRequest(at, request.method, path, request.url.query, user_id, headers, time=now)


def _hook_text(body: bytes) -> str:
    """Return the log text of a hook route's body, without the token that a target usually contains."""
    hook = _json_object(body)
    if isinstance(target := hook.get("targetUrl"), str):
        hook["targetUrl"] = without_secrets(target)
    return body_text(json.dumps(hook).encode()) if hook else without_secrets(body_text(body))


async def send_response(response: SandboxResponse, send: Send, common_headers: Mapping[str, str]) -> None:
    """Send a response with ``common_headers``, the headers of every response."""
    headers = wire_headers(response, common_headers)
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})


async def _send_part(response: SandboxResponse, send: Send, common_headers: Mapping[str, str]) -> None:
    """Announce the whole body but send half of it. A status code that forbids a body becomes 200."""
    status_code = 200 if response.status_code in BODYLESS else response.status_code
    announced = {**common_headers, "Content-Length": str(max(len(response.body), 1))}
    headers = wire_headers(attrs.evolve(response, status_code=status_code), announced)
    await send({"type": "http.response.start", "status": status_code, "headers": headers})
    body = response.body[: len(response.body) // 2]
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _break_connection(request: Request, *, reset: bool) -> None:
    """Break the connection and return once it is closed; the server treats an earlier return as an error."""
    connection: Connection | None = request.scope.get("extensions", {}).get(CONNECTION)
    if connection is None:
        raise ConnectionResetError("the injected fault breaks the connection here")
    if reset:
        connection.reset()
    else:
        connection.close()
    await request.receive()  # the body has already been received, so this returns on disconnect


def _path(request: Request) -> str:
    """Return the path relative to the API prefix, which the router stored in ``root_path``."""
    path: str = request.scope["path"]
    return path.removeprefix(request.scope["root_path"])
