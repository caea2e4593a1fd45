"""A client for a FastAPI service: opened and closed with it, at hand in each route, with honest errors.

It needs the extra ``fastapi``. Starlette needs nothing of this: a ``WebhookReceiver`` is an ASGI app,
and goes into a ``Route`` as it is. The client is held on ``app.state``, so every task of the app finds it.
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
    raise ImportError("this needs the extra fastapi: pip install 'lemcal-async[fastapi]'") from None

from lemcal_async import errors
from lemcal_async._auth import Secret
from lemcal_async._client import AsyncLemcal
from lemcal_async._urls import check_target_url
from lemcal_async.webhooks import WebhookReceiver
from lemcal_async.webhooks._http import Message, Receive, Scope, Send

__all__ = ["Lemcal", "add_exception_handlers", "get_lemcal", "lifespan", "webhook_router"]

logger = logging.getLogger("lemcal_async.fastapi")

Lifespan: TypeAlias = Callable[[FastAPI], AbstractAsyncContextManager[None]]
"""What ``FastAPI(lifespan=…)`` takes."""


def lifespan(lemcal: AsyncLemcal, *, hook_url: str | None = None) -> Lifespan:
    """Return a lifespan that puts a client on ``app.state.lemcal``, and closes its connections at the end.

    An app may be started again, as by a second ``TestClient`` or invocation: the client is opened anew.

    Whether lemcal can be reached does not decide whether the service starts: after 5 s the start goes on, and
    the hook is registered in the background, again and again until that succeeds or lemcal refuses it for
    good. That there is a hook already is fine. What happens is logged.

    Within a lifespan of one's own: ``async with lifespan(lemcal)(app): …``.

    Args:
        lemcal: The client.
        hook_url: The service's own address for webhooks, token and all (``webhooks.hook_url`` quotes it), to
            which new bookings of any meeting type are posted. None for no webhooks.

    Raises:
        ConfigurationError: For an address that lemcal would not take.
    """
    url, hook_url = Secret(hook_url), None
    hook = None if url.reveal() is None else _Hook(lemcal, url)

    @asynccontextmanager
    async def live(app: FastAPI) -> AsyncGenerator[None]:
        lemcal._reopen()  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]  # no business of users'
        async with lemcal:
            app.state.lemcal = lemcal
            if hook is None:
                yield
                return
            async with _in_background(hook.keep_registering) as tried:
                with anyio.move_on_after(HOOK_TIMEOUT):
                    await tried.wait()
                if not tried.is_set():
                    logger.warning("lemcal is slow: registering the hook in the background")
                yield

    return live


@asynccontextmanager
async def _in_background(
    work: Callable[[anyio.Event], Coroutine[Any, Any, None]],
) -> AsyncGenerator[anyio.Event]:
    """Have something done as long as the block lasts. What the block raises is not put into a group."""
    raised: BaseException | None = None
    tried = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(work, tried)
        try:
            yield tried
        except Exception as error:  # noqa: BLE001 - raised below
            raised = error
        tasks.cancel_scope.cancel()
    if raised is not None:
        raise raised


class _Hook:
    """The hook of this service, whose URL has a token in it."""

    def __init__(self, lemcal: AsyncLemcal, url: Secret[Any]) -> None:
        self._lemcal = lemcal
        self._url: Secret[str] = check_target_url(url)  # a wrong one raises now, and not at the start

    async def keep_registering(self, tried: anyio.Event) -> None:
        """Register it, unless it is registered; try again while that may help. Logs what happens."""
        pause = _FIRST_PAUSE
        while True:
            again = await self._register(pause)
            tried.set()
            if not again:
                return
            await anyio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def _register(self, pause: float) -> bool:
        """Whether to try again, after ``pause`` seconds."""
        try:
            hook = await self._lemcal.hooks.create(self._url.reveal(), any_meeting_type=True, exist_ok=True)
        except errors.LemcalError as error:
            again = isinstance(error, _PASSING)
            logger.error(  # noqa: TRY400 - the words say it all
                "the hook was not registered: %s; unless it was before, new bookings are not delivered until "
                "it is; %s",
                self._without_url(str(error)).rstrip("."),
                f"the next attempt is in {pause:.0f} s" if again else "this is not tried again",
            )
            return again
        if hook is None:
            logger.info("the hook was registered before")
        else:
            logger.info("registered the hook %s; keep the id, the service does not list it", hook.id)
        return False

    def _without_url(self, text: str) -> str:
        """Take the URL out of an error's words, which may quote the server, and the server the URL."""
        url = self._url.reveal()
        query = urlsplit(url).query
        values = [value for _, value in parse_qsl(query)]
        for part in sorted({url, query, *values, *map(quote, values)} - {""}, key=len, reverse=True):
            text = text.replace(part, "***")
        return text


HOOK_TIMEOUT = 5.0
"""Seconds for which the start of an app waits for its hook."""
_FIRST_PAUSE = 5.0
_LONGEST_PAUSE = 300.0
_PASSING = (
    errors.APIConnectionError,
    errors.DeadlineExceededError,
    errors.RateLimitError,
    errors.ResponseDecodeError,
    errors.ServerError,
)


async def get_lemcal(connection: HTTPConnection) -> AsyncLemcal:
    """Return the client of the app; to be overridden in tests by ``app.dependency_overrides``.

    Args:
        connection: The request, which FastAPI passes.

    Raises:
        ConfigurationError: If the app has no client, because it was made without ``lifespan``.
    """
    lemcal: AsyncLemcal | None = getattr(connection.app.state, "lemcal", None)
    if lemcal is None:
        raise errors.ConfigurationError("this app has no client: make it FastAPI(lifespan=lifespan(lemcal))")
    return lemcal


Lemcal: TypeAlias = Annotated[AsyncLemcal, Depends(get_lemcal)]
"""The client, as the parameter of a route: ``async def route(lemcal: Lemcal)``."""


# --------------------------------------------------------------------------- webhooks


def webhook_router(receiver: WebhookReceiver, path: str = "/webhooks/lemcal") -> APIRouter:
    """Return a router with one route, the receiver's, described in OpenAPI.

    The receiver also answers other methods, a trailing slash and WebSockets there, so that a token in the
    query is hidden before the server logs it, whatever the request was.

    Args:
        receiver: What answers the deliveries.
        path: The route. It may hold a parameter that says which account a delivery is for:
            ``/webhooks/{tenant}``.
    """
    router = APIRouter()

    async def deliver(request: Request) -> Response:
        return _Handed(receiver, request)

    router.add_api_route(
        path,
        deliver,
        methods=["POST"],
        name="lemcal_webhook",
        summary="Receive a booking from lemcal",
        description=(
            "Called by lemcal with each new booking. Only its id is used: the meeting is fetched back "
            "before anything is done with it."
        ),
        tags=["webhooks"],
        response_class=JSONResponse,
        response_model=None,
        responses=_RESPONSES,
        openapi_extra={"parameters": _parameters(path), "requestBody": _BODY},
    )

    for place in (path, path.rstrip("/") if path.endswith("/") else f"{path}/"):
        router.routes.append(Route(place, receiver, include_in_schema=False))  # of any method
        router.routes.append(WebSocketRoute(place, receiver))
    return router


class _Handed(Response):
    """A response that the receiver gives in our place. It reads the request itself.

    The body may have been read before, by an error tracker or a dependency of the app: then it is the one
    that the request has kept.
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
    200: {"description": "Handled, now or before (`handled`, `repeated`), or not a meeting (`ignored`)"},
    400: {"description": "No JSON object with an `_id`"},
    401: {"description": "The token is missing or wrong"},
    408: {"description": "The body took too long"},
    413: {"description": "The body is over 1 MiB"},
    503: {
        "description": "It cannot be verified or was not handled; to be delivered again",
        "headers": {"Retry-After": {"description": "Seconds", "schema": {"type": "integer"}}},
    },
}
for _response in _RESPONSES.values():
    _response["content"] = _STATUS

_BODY: dict[str, Any] = {
    "required": True,
    "description": "The meeting as lemcal has it, at top level",
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
    places = [("query", "token"), *(("path", name) for name in re.findall(r"{(\w+)}", path))]
    return [
        {"in": place, "name": name, "required": True, "schema": {"type": "string"}} for place, name in places
    ]


# --------------------------------------------------------------------------- errors


def add_exception_handlers(app: FastAPI) -> None:
    """Have the errors of lemcal, raised in any route, answered for what they are.

    What is wrong between this service and lemcal is no fault of who asks: 502, 503 or 504, with
    ``Retry-After`` where a time is known. What is not there is a 404, what exists a 409. The answer says no
    more than that; the log does.

    Args:
        app: The app whose errors they are.
    """
    app.exception_handler(errors.LemcalError)(_answer)


async def _answer(request: Request, error: errors.LemcalError) -> Response:
    status, detail = _detail_of(error)
    if status >= 500:
        logger.warning("%s %s: %d, because: %s", request.method, _route(request), status, error)
    retry_after: float | None = getattr(error, "retry_after", None)
    headers: dict[str, str] = {}
    if status in {503, 504} and retry_after is not None:
        headers["Retry-After"] = str(math.ceil(retry_after))
    return JSONResponse({"detail": detail}, status, headers)


_DETAILS: dict[type[errors.LemcalError], tuple[int, str]] = {
    errors.RateLimitError: (503, "lemcal is busy, try again later"),
    errors.DeadlineExceededError: (504, "lemcal did not answer in time"),
    errors.APITimeoutError: (504, "lemcal did not answer in time"),
    errors.APIConnectionError: (502, "lemcal cannot be reached"),
    errors.NotFoundError: (404, "not found at lemcal"),
    errors.ConflictError: (409, "it already exists at lemcal"),
    errors.AuthenticationError: (502, "lemcal denied access to this service"),
    errors.PlanRequiredError: (502, "lemcal denied access to this service"),
    errors.PermissionDeniedError: (502, "lemcal denied access to this service"),
    errors.ConfigurationError: (500, "this service is misconfigured"),
    errors.LemcalError: (502, "unexpected answer from lemcal"),
}


def _detail_of(error: errors.LemcalError) -> tuple[int, str]:
    """Return the status and the detail for an error."""
    if error.status_code == 503:
        return _DETAILS[errors.RateLimitError]
    return next(_DETAILS[kind] for kind in type(error).__mro__ if kind in _DETAILS)


def _route(request: Request) -> str:
    """Return the route as it was declared: the path itself may hold anything."""
    return getattr(request.scope.get("route"), "path", "")
