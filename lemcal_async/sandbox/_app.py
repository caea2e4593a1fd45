"""The routes of the API: a call of a known account in, an answer out. Pure but for the world's state.

Knows the documented routes, checks and error texts. Rate limit, credentials and faults come before it,
in app.py.

What happens to a request, as an ASGI app: travel time, count, fault, credentials, route, answer.

The steps stand in the order in which the service must take them: a request counts when it arrives,
whatever becomes of it (documented: on all routes). The parts decide; here their decisions are carried
out, those to break the connection included.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import anyio
import attrs
import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from lemcal_async.sandbox._answers import BODYLESS, Answer, json_data, json_text, text, wire_headers
from lemcal_async.sandbox._log import RequestLog, SeenRequest, public_headers
from lemcal_async.sandbox._ratelimit import Count, Counter, rate_limit_headers
from lemcal_async.sandbox._state import DuplicateHookError, SandboxState, UnknownMeetingTypeError
from lemcal_async.sandbox.faults import Fault, FaultPlan, Reset, Slow, Truncated


@attrs.frozen
class Call:
    """A request of ``account``; ``path`` is below the prefix."""

    account: int
    method: str
    path: str
    query: Mapping[str, str] = attrs.field(factory=dict[str, str])
    body: bytes = b""


def answer_call(world: SandboxState, call: Call) -> Answer:
    """Carry the call out."""
    account = call.account
    routes: dict[str, Callable[[], Answer]] = {}
    match call.path.split("/")[1:]:
        case ["me"]:
            routes["GET"] = lambda: json_data(200, world.user(account))
        case ["meetings"]:
            meeting_type_id = call.query.get("meetingTypeId")
            routes["GET"] = lambda: json_text(200, world.meetings(account, meeting_type_id))
        case ["meetingTypes"]:
            routes["GET"] = lambda: json_data(200, world.meeting_types(account))
        case ["meetingTypes", item] if item:
            routes["GET"] = lambda: _meeting_type(world, account, item)
        case ["hooks"]:
            routes["POST"] = lambda: _create_hook(world, account, _json_object(call.body))
        case ["hooks", item] if item:
            routes["DELETE"] = lambda: _delete_hook(world, account, item)
        case _:
            return text(404, "Not Found")
    if call.method not in routes:
        return text(405, "Method Not Allowed", {"Allow": ", ".join(routes)})
    return routes[call.method]()


def _meeting_type(world: SandboxState, account: int, meeting_type_id: str) -> Answer:
    for meeting_type in world.meeting_types(account):
        if meeting_type["_id"] == meeting_type_id:
            return json_data(200, meeting_type)
    return text(404, "meeting type not found")


def _create_hook(world: SandboxState, account: int, wanted: dict[str, Any]) -> Answer:
    target_url, meeting_type_id = wanted.get("targetUrl"), wanted.get("meetingTypeId")
    any_type = wanted.get("anyMeetingType") is True  # wins over an id (documented)
    if not target_url:
        return text(400, "You must provide a targetUrl")
    if not _is_web_url(target_url):
        return text(400, "Invalid targetUrl")
    if not any_type and not meeting_type_id:
        return text(400, "You must provide either a meetingTypeId or anyMeetingType")
    try:
        hook = world.add_hook(account, target_url, None if any_type else str(meeting_type_id))
    except UnknownMeetingTypeError:
        return text(404, "meeting type not found")
    except DuplicateHookError:
        return text(409, "Duplicate hook")
    return json_data(200, hook)


def _delete_hook(world: SandboxState, account: int, hook_id: str) -> Answer:
    return Answer(204) if world.delete_hook(account, hook_id) else text(404, "hook not found")


def _json_object(body: bytes) -> dict[str, Any]:
    """Return the body's object; what is none counts as empty, so that its first field is missed."""
    try:
        data: object = json.loads(body)
    except ValueError:
        return {}
    return dict[str, Any](data) if isinstance(data, dict) else {}  # pyright: ignore[reportUnknownArgumentType]  # a JSON object has str keys


def _is_web_url(target: object) -> bool:
    if not isinstance(target, str):
        return False
    try:
        url = httpx.URL(target)
    except (httpx.InvalidURL, ValueError):  # ValueError: half a surrogate pair
        return False
    return url.scheme in {"http", "https"} and bool(url.host)


CONNECTION: Final = "lemcal_async.sandbox.connection"
"""The ASGI extension through which a server lets its app break the connection."""


class Connection(Protocol):
    """The connection under a request."""

    def reset(self) -> None:
        """Send a TCP RST."""

    def close(self) -> None:
        """Send what was written, and close."""


@attrs.frozen
class _Arrival:
    account: int | None
    fault: Fault | None
    count: Count | None
    standing: dict[str, str]
    number: int


_RESET_AT_ARRIVAL: Final = Reset(processed=False)


class Api:
    """The API below its prefix. ``counter`` is None when there is no rate limit.

    ``latency`` returns the seconds of the next round trip.
    """

    def __init__(
        self,
        *,
        world: SandboxState,
        counter: Counter | None,
        faults: FaultPlan,
        log: RequestLog,
        latency: Callable[[], float],
        clock: Callable[[], float],
    ) -> None:
        self._world = world
        self._counter = counter
        self._faults = faults
        self._log = log
        self._latency = latency
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        with contextlib.suppress(ClientDisconnect):  # in the middle of its request: nobody waits for more
            await self._serve(Request(scope, receive), send)

    async def _serve(self, request: Request, send: Send) -> None:
        travel = self._latency() / 2
        await anyio.sleep(travel)
        arrival = self._arrive(request)
        fault = arrival.fault
        body = await request.body()  # whole in any case: a client still sending would notice other errors
        if fault == _RESET_AT_ARRIVAL:
            await _break_off(request, reset=True)
            return
        answer, processed = self._decide(request, body, arrival)
        self._log.complete(arrival.number, status=None, processed=processed)
        if isinstance(fault, Reset):
            await _break_off(request, reset=True)
            return
        await anyio.sleep(travel + (fault.seconds if isinstance(fault, Slow) else 0))
        self._log.complete(arrival.number, status=answer.status, processed=processed)
        if isinstance(fault, Truncated):
            await _send_part(answer, send, arrival.standing)
            await _break_off(request, reset=False)
            return
        await send_answer(answer, send, arrival.standing)

    def _arrive(self, request: Request) -> _Arrival:
        path = _path(request)
        fault = self._faults.take(request.method, path)
        authorization = request.headers.get("authorization", "")
        user_id, account = self._world.identify(authorization)
        count = None
        if self._counter and fault != _RESET_AT_ARRIVAL:
            # Per credential as presented, right or wrong. A digest, as the key itself is kept nowhere.
            count = self._counter.count(hashlib.sha256(authorization.encode()).hexdigest())
        at = count.at if count else self._clock()
        number = self._log.add(seen_request(request, path, at, user_id))
        standing = rate_limit_headers(count, time.time()) if count else {}
        return _Arrival(account, fault, count, standing, number)

    def _decide(self, request: Request, body: bytes, arrival: _Arrival) -> tuple[Answer, bool]:
        """Return the answer, and whether the route did its work for it."""
        if isinstance(arrival.fault, Answer):
            return arrival.fault, False
        if arrival.count and not arrival.count.allowed:
            return text(429, "Too Many Requests"), False
        if arrival.account is None:
            return text(401, "Unauthorized"), False
        call = Call(arrival.account, request.method, _path(request), request.query_params, body)
        return answer_call(self._world, call), True


def seen_request(request: Request, path: str, at: float, user_id: str | None) -> SeenRequest:
    """Return the log's entry for a request."""
    return SeenRequest(at, request.method, path, request.url.query, user_id, public_headers(request.headers))


async def send_answer(answer: Answer, send: Send, standing: Mapping[str, str]) -> None:
    """Send an answer; ``standing`` are the headers that every answer carries."""
    headers = wire_headers(answer, standing)
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


async def _send_part(answer: Answer, send: Send, standing: Mapping[str, str]) -> None:
    """Promise a body, and send half of it. A status that has no body is 200 for the purpose."""
    status = 200 if answer.status in BODYLESS else answer.status
    promised = {**standing, "Content-Length": str(max(len(answer.body), 1))}
    headers = wire_headers(attrs.evolve(answer, status=status), promised)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    body = answer.body[: len(answer.body) // 2]
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _break_off(request: Request, *, reset: bool) -> None:
    """Break the connection, and return when it is down: a server takes an earlier return for a bug."""
    connection: Connection | None = request.scope.get("extensions", {}).get(CONNECTION)
    if connection is None:
        raise ConnectionResetError("the sandbox breaks the connection here, as the injected fault says")
    if reset:
        connection.reset()
    else:
        connection.close()
    await request.receive()  # the body has been received, so this is the disconnection


def _path(request: Request) -> str:
    """Return the path below the prefix, which the router has put into ``root_path``."""
    path: str = request.scope["path"]
    return path.removeprefix(request.scope["root_path"])
