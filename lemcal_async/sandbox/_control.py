"""The sandbox's controls over HTTP, under ``/_sandbox``, for tests in another process.

Each route corresponds to a method of ``Sandbox``::

    GET    /_sandbox/accounts               user ids and API keys
    GET    /_sandbox/requests?after=7       the requests after number 7
    GET    /_sandbox/requests/{number}
    GET    /_sandbox/deliveries?after=7     the finished hook deliveries after number 7
    POST   /_sandbox/deliveries/{number}/repeat
    POST   /_sandbox/bookings               {"account": 0, "meetingTypeId": "met_…", "public": true,
                                             "guest": "Ada <ada@example.org>", "start": "…", …}
    GET    /_sandbox/meetings?account=0
    PATCH  /_sandbox/meetings/{id}          {"start": "2026-03-02T09:00:00.000Z", …}
    POST   /_sandbox/meetings/{id}/cancel
    DELETE /_sandbox/meetings/{id}
    POST   /_sandbox/hooks                  {"account": 0, "targetUrl": "http://…"}, for any meeting type
    DELETE /_sandbox/hooks/{id}
    POST   /_sandbox/faults                 {"fault": "status", "options": {"code": 503}, "times": 2,
                                             "method": "GET", "path": "/meetings"}
    DELETE /_sandbox/faults

Every field but ``fault`` and ``targetUrl`` is optional, and unknown fields are refused. A booking can have
the wire-format fields of a meeting. PATCH accepts any field, so that a meeting can have one that is new.
Lists have up to 1,000 entries, oldest first. The controls require no credentials, because the sandbox and its
made-up accounts are for this machine only; ``Guard`` blocks requests from other websites.
"""

import inspect
import ipaddress
import json
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast
from urllib.parse import urlsplit

import attrs
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lemcal_async.sandbox import faults

if TYPE_CHECKING:
    from datetime import datetime

    from lemcal_async.sandbox._hooks import Delivery, HookSender
    from lemcal_async.sandbox._log import RequestLog, SeenRequest
    from lemcal_async.sandbox._sandbox import Sandbox

_Options: TypeAlias = dict[str, Any]

_BOOKING_FIELDS: Final = (
    "account", "meetingTypeId", "public", "guest", "start", "end", "_id", "userId", "meetingTypeName",
    "providedInfos", "eventId", "lead", "leadId", "attendees", "attendeeTimezone", "timezone", "questions",
    "surveyAnswers", "createdAt", "canceledAt",
)  # fmt: skip

_MAX_ROWS: Final = 1_000
_SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})


class Controls:
    """The controls' routes, to be mounted at ``/_sandbox``."""

    def __init__(self, sandbox: "Sandbox", log: "RequestLog", sender: "HookSender") -> None:
        self._sandbox = sandbox
        self._log = log
        self._sender = sender

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [
            Route("/bookings", _endpoint(self._book), methods=["POST"]),
            Route("/meetings", _endpoint(self._meetings), methods=["GET"]),
            Route("/meetings/{meeting_id}/cancel", _endpoint(self._cancel), methods=["POST"]),
            Route("/meetings/{meeting_id}", _endpoint(self._edit), methods=["PATCH"]),
            Route("/meetings/{meeting_id}", _endpoint(self._remove), methods=["DELETE"]),
            Route("/hooks", _endpoint(self._add_hook), methods=["POST"]),
            Route("/hooks/{hook_id}", _endpoint(self._delete_hook), methods=["DELETE"]),
            Route("/faults", _endpoint(self._inject), methods=["POST"]),
            Route("/faults", _endpoint(self._clear), methods=["DELETE"]),
            Route("/accounts", _endpoint(self._accounts), methods=["GET"]),
            Route("/requests", _endpoint(self._requests), methods=["GET"]),
            Route("/requests/{number}", _endpoint(self._request), methods=["GET"]),
            Route("/deliveries", _endpoint(self._deliveries), methods=["GET"]),
            Route("/deliveries/{number}/repeat", _endpoint(self._repeat), methods=["POST"]),
        ]

    def _book(self, _request: Request, options: _Options) -> Response:
        _check_fields("a booking", options, _BOOKING_FIELDS)
        meeting_type_id = options.pop("meetingTypeId", None)
        if meeting_type_id is not None and not isinstance(meeting_type_id, str):
            raise ValueError(f"meetingTypeId must be a string, not {meeting_type_id!r}")
        return JSONResponse(self._sandbox.book(meeting_type_id=meeting_type_id, **options), 201)

    def _meetings(self, request: Request, _options: _Options) -> Response:
        account = _number(request.query_params.get("account", "0"), "account")
        return JSONResponse(self._sandbox.meetings(account))

    def _edit(self, request: Request, options: _Options) -> Response:
        return JSONResponse(self._sandbox.edit(request.path_params["meeting_id"], **options))

    def _cancel(self, request: Request, _options: _Options) -> Response:
        return JSONResponse(self._sandbox.cancel(request.path_params["meeting_id"]))

    def _remove(self, request: Request, _options: _Options) -> Response:
        self._sandbox.remove(request.path_params["meeting_id"])
        return Response(status_code=204)

    def _add_hook(self, _request: Request, options: _Options) -> Response:
        _check_fields("a hook", options, ("targetUrl", "account"))
        if "targetUrl" not in options:
            raise ValueError("targetUrl is missing")
        return JSONResponse(self._sandbox.add_hook(options["targetUrl"], options.get("account", 0)), 201)

    def _delete_hook(self, request: Request, _options: _Options) -> Response:
        self._sandbox.delete_hook(request.path_params["hook_id"])
        return Response(status_code=204)

    def _inject(self, _request: Request, options: _Options) -> Response:
        _check_fields("a fault", options, ("fault", "options", "times", "method", "path"))
        name = options.pop("fault", None)
        if name not in faults.__all__:
            raise ValueError(f"fault must be one of {', '.join(faults.__all__)}")
        self._sandbox.inject(_make_fault(name, options.pop("options", {})), **options)
        return Response(status_code=204)

    def _clear(self, _request: Request, _options: _Options) -> Response:
        self._sandbox.clear_faults()
        return Response(status_code=204)

    def _accounts(self, _request: Request, _options: _Options) -> Response:
        rows = [
            {
                "userId": account.user_id,
                "apiKey": account.api_key,
                "email": account.email,
                "publicIdentifier": account.public_identifier,
            }
            for account in self._sandbox.accounts
        ]
        return JSONResponse(rows)

    def _requests(self, request: Request, _options: _Options) -> Response:
        return JSONResponse([as_json(entry) for entry in self._log.after(_after(request), _MAX_ROWS)])

    def _request(self, request: Request, _options: _Options) -> Response:
        number = _number(request.path_params["number"], "the request number")
        if (entry := self._log.get(number)) is None:
            raise LookupError(f"there is no request {number}")
        return JSONResponse(as_json(entry))

    def _deliveries(self, request: Request, _options: _Options) -> Response:
        found = self._sender.deliveries.after(_after(request), _MAX_ROWS)
        return JSONResponse([as_json(entry) for entry in found])

    def _repeat(self, request: Request, _options: _Options) -> Response:
        number = _number(request.path_params["number"], "the delivery number")
        self._sandbox.repeat_delivery(number)
        return Response(status_code=202)


def _check_fields(what: str, options: _Options, known: Iterable[str]) -> None:
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"{what} has no field {unknown[0]!r}; the fields are: {', '.join(known)}")


def _make_fault(name: str, options: object) -> "faults.Fault":
    """Create a fault. The error names the fault and its option."""
    if not isinstance(options, dict):
        raise ValueError("options must be a JSON object")  # noqa: TRY004  # a 400
    given = cast("_Options", options)
    function = getattr(faults, name)
    parameters = inspect.signature(function).parameters
    if unknown := [option for option in given if option not in parameters]:
        known = f"its options are: {', '.join(parameters)}" if parameters else "it has none"
        raise ValueError(f"fault {name} has no option {unknown[0]!r}; {known}")
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and option not in given:
            raise ValueError(f"fault {name} requires the option {option}")
    try:
        fault: faults.Fault = function(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"fault {name}: {error}") from None
    return fault


def as_json(entry: "SeenRequest | Delivery") -> dict[str, Any]:
    """Return a log entry as JSON data: the same fields, with the time in ISO 8601."""
    row = attrs.asdict(entry)
    time: datetime | None = row["time"]
    return row | {"time": time and time.isoformat(timespec="milliseconds")}


def _after(request: Request) -> int:
    return _number(request.query_params.get("after", "0"), "after")


def _number(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} must be a whole number, not {text!r}") from None


def _parse_options(body: bytes) -> _Options:
    try:
        options: Any = json.loads(body or b"{}")
    except ValueError as error:
        raise ValueError(f"the body is not JSON: {error}") from None
    if not isinstance(options, dict):
        raise ValueError("the body must be a JSON object")  # noqa: TRY004  # a 400
    return cast("_Options", options)


def _endpoint(handle: Callable[[Request, _Options], Response]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return handle(request, _parse_options(await request.body()))
        except LookupError as error:
            return PlainTextResponse(str(error), 404)
        except (ValueError, TypeError, AttributeError, OverflowError) as error:  # invalid JSON or fields
            return PlainTextResponse(str(error), 400)

    return endpoint


class Guard:
    """ASGI middleware that blocks requests from other websites to the page and the controls.

    The sandbox requires no credentials, so a website in the same browser could control it: with a form or
    script that sends cross-site requests, or with a name that it points at this machine (DNS rebinding).
    Browsers identify the requesting site in Origin, Sec-Fetch-Site and Host; other clients send neither of
    the first two. ``own_host`` returns the host name that the sandbox is served under.
    """

    def __init__(self, app: ASGIApp, own_host: Callable[[], str | None]) -> None:
        self._app = app
        self._own_host = own_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse requests from other sites; pass on all others."""
        if scope["type"] == "http" and (reason := _refusal_reason(Request(scope), self._own_host())):
            await PlainTextResponse(reason, 403)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _refusal_reason(request: Request, own_host: str | None) -> str | None:
    """Return the reason to refuse a request, or None to allow it."""
    host = request.headers.get("host", "")
    name = _hostname(f"//{host}")
    if name != own_host and not _is_local_name(name):
        return f"the sandbox is not served at host {host[:100]!r}; use localhost or an IP address"
    if request.method in _SAFE_METHODS:  # browsers do not let other sites read the response
        return None
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
        return "the request comes from another website"
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return "the request comes from another website"
    return None


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_local_name(host: str) -> bool:
    """Whether nobody else can point this name at this machine: an IP address, localhost, or a bare name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host.endswith(".localhost") or (bool(host) and "." not in host)
    return True
