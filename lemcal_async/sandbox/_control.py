"""Control of a sandbox that runs in another process, over HTTP below ``/_sandbox``.

The same controls as the methods of ``Sandbox``, and nothing of their own::

    POST   /_sandbox/bookings               {"account": 0, "meetingTypeId": "met_…", "public": true, …}
    POST   /_sandbox/meetings/{id}/cancel
    DELETE /_sandbox/meetings/{id}
    POST   /_sandbox/faults                 {"fault": "status", "options": {"code": 503}, "times": 2,
                                             "method": "GET", "path": "/meetings"}
    GET    /_sandbox/accounts               user ids and API keys

Every field is optional but ``fault``; further fields of a booking are put into the meeting. There are
no credentials to this: the sandbox and its invented accounts are for the own machine.
"""

import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from lemcal_async.sandbox import faults

if TYPE_CHECKING:
    from lemcal_async.sandbox._sandbox import Sandbox

_Options: TypeAlias = dict[str, Any]


def control_routes(sandbox: "Sandbox") -> list[BaseRoute]:
    """Return the routes, to be mounted at ``/_sandbox``."""

    def book(_request: Request, options: _Options) -> Response:
        meeting_type_id = options.pop("meetingTypeId", None)
        return JSONResponse(sandbox.book(meeting_type_id=meeting_type_id, **options), 201)

    def cancel(request: Request, _options: _Options) -> Response:
        return JSONResponse(sandbox.cancel(request.path_params["meeting_id"]))

    def remove(request: Request, _options: _Options) -> Response:
        sandbox.remove(request.path_params["meeting_id"])
        return Response(status_code=204)

    def inject(_request: Request, options: _Options) -> Response:
        name = options.pop("fault", None)
        if name not in faults.__all__:
            raise ValueError(f"fault must be one of {', '.join(faults.__all__)}")
        fault = getattr(faults, name)(**options.pop("options", {}))
        sandbox.inject(fault, **options)
        return Response(status_code=204)

    def accounts(_request: Request, _options: _Options) -> Response:
        rows = [
            {
                "userId": account.user_id,
                "apiKey": account.api_key,
                "email": account.email,
                "publicIdentifier": account.public_identifier,
            }
            for account in sandbox.accounts
        ]
        return JSONResponse(rows)

    return [
        Route("/bookings", _endpoint(book), methods=["POST"]),
        Route("/meetings/{meeting_id}/cancel", _endpoint(cancel), methods=["POST"]),
        Route("/meetings/{meeting_id}", _endpoint(remove), methods=["DELETE"]),
        Route("/faults", _endpoint(inject), methods=["POST"]),
        Route("/accounts", _endpoint(accounts), methods=["GET"]),
    ]


def _endpoint(handle: Callable[[Request, _Options], Response]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return handle(request, json.loads(await request.body() or b"{}"))
        except LookupError as error:
            return PlainTextResponse(str(error), 404)
        except (ValueError, TypeError, AttributeError) as error:  # not JSON, no object, wrong fields
            return PlainTextResponse(str(error), 400)

    return endpoint
