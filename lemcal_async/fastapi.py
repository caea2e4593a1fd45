"""FastAPI integration: a lifespan, the client as a dependency, a webhook route and exception handlers.

It requires the extra ``fastapi``. Starlette needs no integration: a ``WebhookReceiver`` is an ASGI app that
fits into a ``Route``. The client is stored on ``app.state``, where every task of the app can find it.
"""

import logging
import math
import re
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated, Any, TypeAlias
from urllib.parse import parse_qsl, quote, urlsplit

import anyio

try:
    from fastapi import APIRouter, Depends, FastAPI, Request, Response
    from fastapi.requests import HTTPConnection
    from fastapi.responses import JSONResponse
    from starlette.requests import ClientDisconnect
    from starlette.routing import Route, WebSocketRoute
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] not in {"fastapi", "starlette"}:
        raise
    raise ImportError(
        "lemcal_async.fastapi requires the extra fastapi: pip install 'lemcal-async[fastapi]'"
    ) from None

from lemcal_async import errors
from lemcal_async._auth import Secret
from lemcal_async._client import AsyncLemcal
from lemcal_async._urls import check_target_url
from lemcal_async.webhooks import WebhookReceiver
from lemcal_async.webhooks._http import Message, Receive, Scope, Send

__all__ = ["Lemcal", "add_exception_handlers", "get_lemcal", "lifespan", "webhook_router"]

logger = logging.getLogger("lemcal_async.fastapi")

Lifespan: TypeAlias = Callable[[FastAPI], AbstractAsyncContextManager[None]]
"""The type of ``FastAPI(lifespan=…)``."""


def lifespan(lemcal: AsyncLemcal, *, hook_url: str | None = None) -> Lifespan:
    """Return a lifespan that puts a client on ``app.state.lemcal`` and closes its connections at shutdown.

    The app can be started again, for example by another ``TestClient``: each start reopens the client.

    The service starts even if lemcal is unreachable: after 5 s, startup continues and the hook is registered
    in the background, with retries until it succeeds or lemcal rejects it permanently. An existing hook is
    fine. Each outcome is logged.

    In your own lifespan: ``async with lifespan(lemcal)(app): …``.

    Args:
        lemcal: The client.
        hook_url: The service's own address for webhooks, including the token (``webhooks.hook_url`` quotes
            it). It receives new bookings of any meeting type. None to register no hook.

    Raises:
        ConfigurationError: If lemcal would not accept the address.
    """
    url, hook_url = Secret(hook_url), None
    hook = None if url.reveal() is None else _Hook(lemcal, url)

    @asynccontextmanager
    async def live(app: FastAPI) -> AsyncGenerator[None]:
        lemcal._reopen()  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]  # not public
        async with lemcal:
            app.state.lemcal = lemcal
            if hook is None:
                yield
                return
            async with _running(hook.keep_registering) as attempted:
                with anyio.move_on_after(HOOK_TIMEOUT):
                    await attempted.wait()
                if not attempted.is_set():
                    logger.warning("lemcal is slow; the hook is being registered in the background")
                yield

    return live


@asynccontextmanager
async def _running(
    work: Callable[[anyio.Event], Coroutine[Any, Any, None]],
) -> AsyncGenerator[anyio.Event]:
    """Run ``work`` for as long as the block lasts, without wrapping the block's exception in a group."""
    raised: BaseException | None = None
    attempted = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(work, attempted)
        try:
            yield attempted
        except Exception as error:  # noqa: BLE001 - raised below
            raised = error
        tasks.cancel_scope.cancel()
    if raised is not None:
        raise raised


class _Hook:
    """The hook of this service. Its URL contains a token."""

    def __init__(self, lemcal: AsyncLemcal, url: Secret[Any]) -> None:
        self._lemcal = lemcal
        self._url: Secret[str] = check_target_url(url)  # raises now, rather than at startup

    async def keep_registering(self, attempted: anyio.Event) -> None:
        """Register the hook unless it exists, retry transient failures, and log each outcome."""
        delay = _INITIAL_DELAY
        while True:
            retry = await self._register(delay)
            attempted.set()
            if not retry:
                return
            await anyio.sleep(delay)
            delay = min(delay * 2, _MAX_DELAY)

    async def _register(self, delay: float) -> bool:
        """Return whether to retry, after ``delay`` seconds."""
        try:
            hook = await self._lemcal.hooks.create(self._url.reveal(), any_meeting_type=True, exist_ok=True)
        except errors.LemcalError as error:
            retry = isinstance(error, _TRANSIENT_ERRORS)
            logger.error(  # noqa: TRY400 - the message is enough
                "the hook was not registered: %s; unless it already exists, no bookings are delivered; %s",
                self._without_url(str(error)).rstrip("."),
                f"the next attempt is in {delay:.0f} s" if retry else "it will not be retried",
            )
            return retry
        if hook is None:
            logger.info("the hook already exists")
        else:
            logger.info("registered the hook %s; keep the id, because the service lists no hooks", hook.id)
        return False

    def _without_url(self, text: str) -> str:
        """Mask the URL in an error's message, which may quote a response that quotes the URL."""
        url = self._url.reveal()
        query = urlsplit(url).query
        values = [value for _, value in parse_qsl(query)]
        for part in sorted({url, query, *values, *map(quote, values)} - {""}, key=len, reverse=True):
            text = text.replace(part, "***")
        return text


HOOK_TIMEOUT = 5.0
"""Seconds for which startup waits for the registration of the hook."""
_INITIAL_DELAY = 5.0
_MAX_DELAY = 300.0
_TRANSIENT_ERRORS = (
    errors.APIConnectionError,
    errors.DeadlineExceededError,
    errors.RateLimitError,
    errors.ResponseDecodeError,
    errors.ServerError,
)


async def get_lemcal(connection: HTTPConnection) -> AsyncLemcal:
    """Return the app's client. In tests, override it through ``app.dependency_overrides``.

    Args:
        connection: The request, passed by FastAPI.

    Raises:
        ConfigurationError: If the app has no client because it was created without ``lifespan``.
    """
    lemcal: AsyncLemcal | None = getattr(connection.app.state, "lemcal", None)
    if lemcal is None:
        raise errors.ConfigurationError("this app has no client: use FastAPI(lifespan=lifespan(lemcal))")
    return lemcal


Lemcal: TypeAlias = Annotated[AsyncLemcal, Depends(get_lemcal)]
"""The client as a route parameter: ``async def route(lemcal: Lemcal)``."""


# --------------------------------------------------------------------------- webhooks


def webhook_router(receiver: WebhookReceiver, path: str = "/webhooks/lemcal") -> APIRouter:
    """Return a router that serves the receiver at one route and describes it in OpenAPI.

    The receiver also handles other methods, a trailing slash and WebSockets at this path, so that the token
    in the query is hidden before the server logs it, whatever the request.

    Args:
        receiver: The receiver of the deliveries.
        path: The route. It may contain a parameter that identifies the account: ``/webhooks/{tenant}``.
    """
    router = APIRouter()

    async def deliver(request: Request) -> Response:
        return _ReceiverResponse(receiver, request)

    router.add_api_route(
        path,
        deliver,
        methods=["POST"],
        name="lemcal_webhook",
        summary="Receive a booking from lemcal",
        description=(
            "Called by lemcal with each new booking. Only the booking's id is used: a meeting is fetched "
            "from lemcal before a handler gets it."
        ),
        tags=["webhooks"],
        response_class=JSONResponse,
        response_model=None,
        responses=_RESPONSES,
        openapi_extra={"parameters": _parameters(path), "requestBody": _BODY},
    )

    for variant in (path, path.rstrip("/") if path.endswith("/") else f"{path}/"):
        router.routes.append(Route(variant, receiver, include_in_schema=False))  # any method
        router.routes.append(WebSocketRoute(variant, receiver))
    return router


class _ReceiverResponse(Response):
    """A response that lets the receiver read the request and respond to it.

    If an error tracker or an app-wide dependency has already read the body, the receiver gets the copy that
    the request keeps.
    """

    def __init__(self, app: WebhookReceiver, request: Request) -> None:
        super().__init__()
        self._app = app
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        stream = self._request.stream()

        async def replay() -> Message:
            try:
                return {"type": "http.request", "body": await anext(stream), "more_body": True}
            except StopAsyncIteration:
                return {"type": "http.request", "body": b"", "more_body": False}
            except ClientDisconnect:
                return {"type": "http.disconnect"}

        try:
            await self._app(scope, replay, send)
        finally:
            await stream.aclose()


_STATUS: dict[str, Any] = {
    "application/json": {"schema": {"type": "object", "properties": {"status": {"type": "string"}}}}
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "Handled now or before (`handled`, `repeated`), or no such meeting (`ignored`)"},
    400: {"description": "The body is not a JSON object with an `_id`"},
    401: {"description": "The token is missing, wrong or repeated"},
    408: {"description": "The body took too long"},
    413: {"description": "The body is over 1 MiB"},
    503: {
        "description": "The meeting cannot be verified or was not handled; retry the delivery",
        "headers": {"Retry-After": {"description": "Seconds", "schema": {"type": "integer"}}},
    },
}
for _response in _RESPONSES.values():
    _response["content"] = _STATUS

_BODY: dict[str, Any] = {
    "required": True,
    "description": "The meeting's fields at the top level",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["_id"],
                "properties": {"_id": {"type": "string"}, "meetingTypeId": {"type": "string"}},
            }
        }
    },
}


def _parameters(path: str) -> list[dict[str, Any]]:
    parameters = [("query", "token"), *(("path", name) for name in re.findall(r"{(\w+)}", path))]
    return [
        {"in": location, "name": name, "required": True, "schema": {"type": "string"}}
        for location, name in parameters
    ]


# --------------------------------------------------------------------------- errors


def add_exception_handlers(app: FastAPI) -> None:
    """Turn lemcal errors that any route raises into responses.

    Problems between this service and lemcal are not the caller's fault: they become 502, 503 or 504, with
    ``Retry-After`` if a time is known. A missing object becomes 404, a duplicate one 409. A
    ``ConfigurationError`` becomes 500, even if its cause is an invalid id from the caller: validate ids in
    the route. The response contains no further details; for a 5xx, the log does, as a warning.

    Args:
        app: The app to add the handlers to.
    """
    app.exception_handler(errors.LemcalError)(_error_response)


async def _error_response(request: Request, error: errors.LemcalError) -> Response:
    status, detail = _detail_of(error)
    if status >= 500:
        logger.warning("%s %s: responded with %d: %s", request.method, _route(request), status, error)
    retry_after: float | None = getattr(error, "retry_after", None)
    headers: dict[str, str] = {}
    if status in {503, 504} and retry_after is not None:
        headers["Retry-After"] = str(math.ceil(retry_after))
    return JSONResponse({"detail": detail}, status, headers)


_DETAILS: dict[type[errors.LemcalError], tuple[int, str]] = {
    errors.RateLimitError: (503, "lemcal is busy, try again later"),
    errors.DeadlineExceededError: (504, "lemcal did not respond in time"),
    errors.APITimeoutError: (504, "lemcal did not respond in time"),
    errors.APIConnectionError: (502, "lemcal cannot be reached"),
    errors.NotFoundError: (404, "not found in lemcal"),
    errors.ConflictError: (409, "already exists in lemcal"),
    errors.AuthenticationError: (502, "lemcal denied access to this service"),
    errors.PlanRequiredError: (502, "lemcal denied access to this service"),
    errors.PermissionDeniedError: (502, "lemcal denied access to this service"),
    errors.ConfigurationError: (500, "this service is misconfigured"),
    errors.LemcalError: (502, "unexpected response from lemcal"),
}


def _detail_of(error: errors.LemcalError) -> tuple[int, str]:
    """Return the response's status code and detail for an error."""
    if error.status_code == 503:
        return _DETAILS[errors.RateLimitError]
    return next(_DETAILS[kind] for kind in type(error).__mro__ if kind in _DETAILS)


def _route(request: Request) -> str:
    """Return the route's path template, because the request's path may contain anything."""
    return getattr(request.scope.get("route"), "path", "")
