"""A FastAPI service with a client, a webhook and exception handlers, with and without real sockets."""

import logging
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx
import pytest
import sentry_sdk
from fastapi import Depends, FastAPI, Request
from fastapi.testclient import TestClient
from serving import serving
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.websockets import WebSocketDisconnect

from lemcal_async import AsyncLemcal, Meeting, RetryPolicy, errors, to_wire
from lemcal_async.fastapi import Lemcal, add_exception_handlers, get_lemcal, lifespan, webhook_router
from lemcal_async.ratelimit import LocalRateLimiter
from lemcal_async.sandbox import Sandbox, faults
from lemcal_async.webhooks import MAX_BODY_BYTES, Tenant, WebhookReceiver

pytestmark = pytest.mark.anyio

ONCE = RetryPolicy(attempts=1)
TOKEN = "wh-token-8Lp3-quiet"


async def ignore(*_: object) -> None:
    """Accept any meeting."""


def service(lemcal: AsyncLemcal, **options: Any) -> FastAPI:
    """Return a small service."""
    app = FastAPI(lifespan=lifespan(lemcal, **options))
    add_exception_handlers(app)

    @app.get("/meetings/{meeting_id}")
    async def meeting(meeting_id: str, lemcal: Lemcal) -> dict[str, Any]:
        return to_wire(await lemcal.meetings.get(meeting_id))

    @app.get("/me")
    async def me(lemcal: Lemcal) -> str:
        return (await lemcal.me()).id

    return app


@asynccontextmanager
async def http_client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Run an app's lifespan, and provide an HTTP client without a socket."""
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://service") as http,
    ):
        yield http


# ------------------------------------------------------------------ lifespan and dependency


async def test_client_lives_as_long_as_the_app(lemcal_sandbox: Sandbox) -> None:
    """Routes get the client, and the lifespan closes it."""
    lemcal = lemcal_sandbox.client()
    async with http_client(service(lemcal)) as http:
        assert lemcal_sandbox.user_id == (await http.get("/me")).json()
        meeting_id = lemcal_sandbox.meetings()[0]["_id"]
        assert meeting_id == (await http.get(f"/meetings/{meeting_id}")).json()["_id"]
    with pytest.raises(errors.ConfigurationError, match="closed"):
        await lemcal.me()


async def test_on_a_real_server(lemcal_sandbox: Sandbox) -> None:
    """On a real server, the lifespan and the requests run in separate tasks."""
    async with serving(service(lemcal_sandbox.client())) as server, httpx.AsyncClient() as http:
        assert lemcal_sandbox.user_id == (await http.get(f"{server.url}/me")).json()


async def test_overridden_dependency(lemcal_sandbox: Sandbox) -> None:
    """Tests can replace the client of the routes."""
    app = service(AsyncLemcal("usr_1", "k1"))
    async with lemcal_sandbox.client() as other, http_client(app) as http:
        app.dependency_overrides[get_lemcal] = lambda: other
        assert lemcal_sandbox.user_id == (await http.get("/me")).json()


async def test_without_the_lifespan() -> None:
    """Without the lifespan, the error says what is missing."""
    app = FastAPI()

    @app.get("/me")
    async def me(lemcal: Lemcal) -> str:
        return lemcal.user_id

    async with http_client(app) as http:
        with pytest.raises(errors.ConfigurationError, match=r"FastAPI\(lifespan=lifespan\(lemcal\)\)"):
            await http.get("/me")


async def test_nested_in_own_lifespan(lemcal_sandbox: Sandbox) -> None:
    """The lifespan works within another one."""

    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncIterator[None]:
        async with lifespan(lemcal_sandbox.client())(app):
            yield

    app = FastAPI(lifespan=own)

    @app.get("/me")
    async def me(lemcal: Lemcal) -> str:
        return lemcal.user_id

    async with http_client(app) as http:
        assert lemcal_sandbox.user_id == (await http.get("/me")).json()


# ------------------------------------------------------------------ hook registration


async def test_registers_hook(lemcal_sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """The first start registers the hook, the next one finds it; the log says which, without the token."""
    url = f"https://example.com/webhooks/lemcal?token={TOKEN}"
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            async with http_client(service(lemcal_sandbox.client(), hook_url=url)) as http:
                await http.get("/me")
    (hook,) = lemcal_sandbox.hooks()
    assert (url, True) == (hook["targetUrl"], hook["anyMeetingType"])
    messages = [record.getMessage() for record in caplog.records if record.name == "lemcal_async.fastapi"]
    assert [
        f"registered the hook {hook['_id']}; keep the id, because the service lists no hooks"
    ] == messages[:1]
    assert ["the hook already exists"] == messages[1:]
    assert TOKEN not in caplog.text


@pytest.mark.parametrize(
    "fault", [faults.status(401, f"no hook for {TOKEN}"), faults.reset_after_processing()]
)
async def test_starts_without_hook(
    lemcal_sandbox: Sandbox, caplog: pytest.LogCaptureFixture, fault: faults.Fault
) -> None:
    """The service starts even if lemcal is down."""
    lemcal_sandbox.inject(fault, method="POST")
    url = f"https://example.com/?token={TOKEN}"
    async with http_client(service(lemcal_sandbox.client(), hook_url=url)) as http:
        assert 200 == (await http.get("/me")).status_code
    assert "the hook was not registered" in caplog.text
    assert TOKEN not in caplog.text


async def test_invalid_hook_url(lemcal_sandbox: Sandbox) -> None:
    """An invalid URL raises when the lifespan is created, without showing the token."""
    with pytest.raises(errors.ConfigurationError, match="target_url") as caught:
        service(lemcal_sandbox.client(), hook_url=f"example.com/?token={TOKEN}")
    rendered = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    frames = [frame for frame in rendered.stack if "/lemcal_async/" in frame.filename]
    assert "fastapi.py" in repr([frame.filename for frame in frames])
    assert TOKEN not in str(caught.value) + repr([frame.locals for frame in frames])


async def test_slow_lemcal_does_not_delay_startup(
    lemcal_sandbox: Sandbox, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If lemcal is slow, the hook is registered in the background."""
    monkeypatch.setattr("lemcal_async.fastapi.HOOK_TIMEOUT", 0.05)
    caplog.set_level(logging.INFO)
    lemcal_sandbox.inject(faults.slow(1.5), method="POST")
    url = f"https://example.com/?token={TOKEN}"
    async with http_client(service(lemcal_sandbox.client(), hook_url=url)) as http:
        assert "registered the hook" not in caplog.text
        assert 200 == (await http.get("/me")).status_code
        with anyio.fail_after(20):
            while "registered the hook" not in caplog.text:  # noqa: ASYNC110
                await anyio.sleep(0.01)
    assert "in the background" in caplog.text
    assert 1 == len(lemcal_sandbox.hooks())


async def test_failed_registration_is_retried(
    lemcal_sandbox: Sandbox, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transient errors are retried; the log explains the cause and the consequence."""
    monkeypatch.setattr("lemcal_async.fastapi._INITIAL_DELAY", 0.01)
    caplog.set_level(logging.INFO)
    url = f"https://example.com/?token={TOKEN}"
    lemcal_sandbox.inject(faults.status(500, f"no hook for {url}"), method="POST")
    async with http_client(service(lemcal_sandbox.client(), hook_url=url)):
        with anyio.fail_after(20):
            while "registered the hook hoo_" not in caplog.text:  # noqa: ASYNC110
                await anyio.sleep(0.01)
    assert "the hook was not registered: POST /hooks: 500" in caplog.text
    assert "no hook for https://example.com/?***" in caplog.text
    assert "unless it already exists, no bookings are delivered; the next attempt" in caplog.text
    assert TOKEN not in caplog.text


async def test_app_exception_is_not_wrapped(lemcal_sandbox: Sandbox) -> None:
    """The background registration does not wrap the app's exception in a group."""
    begin = lifespan(lemcal_sandbox.client(), hook_url="https://example.com/?token=t")
    with pytest.raises(ZeroDivisionError):
        async with begin(FastAPI()):
            raise ZeroDivisionError


def test_app_can_be_restarted(lemcal_sandbox: Sandbox) -> None:
    """A second test client, or the next invocation of a cloud function, restarts the app."""
    lemcal = lemcal_sandbox.client()
    app = service(lemcal)
    app.include_router(webhook_router(WebhookReceiver(lemcal, token=TOKEN, on_meeting=ignore)))
    for _ in range(3):
        with TestClient(app) as http:
            assert lemcal_sandbox.user_id == http.get("/me").json()
            url = f"/webhooks/lemcal?token={TOKEN}"
            assert 200 == http.post(url, json=lemcal_sandbox.book()).status_code
    with pytest.raises(errors.ConfigurationError, match="closed"):
        anyio.run(lemcal.me)


# ------------------------------------------------------------------ webhook_router


@pytest.mark.parametrize("reader", ["dependency", "middleware"])
async def test_body_that_was_already_read(lemcal_sandbox: Sandbox, reader: str) -> None:
    """Error trackers and app-wide dependencies read the body before the route."""

    async def read(request: Request) -> None:
        await request.body()

    async def read_first(request: Request, call_next: Any) -> Any:
        await request.body()
        return await call_next(request)

    lemcal = lemcal_sandbox.client()
    app = FastAPI(lifespan=lifespan(lemcal), dependencies=[Depends(read)] if reader == "dependency" else [])
    if reader == "middleware":
        app.middleware("http")(read_first)
    app.include_router(webhook_router(WebhookReceiver(lemcal, token=TOKEN, on_meeting=ignore, deadline=5)))
    url = f"/webhooks/lemcal?token={TOKEN}"
    async with http_client(app) as sender:
        response = await sender.post(url, json=lemcal_sandbox.book())
        assert (200, {"status": "handled"}) == (response.status_code, response.json())
        assert 413 == (await sender.post(url, content=b" " * (MAX_BODY_BYTES + 1))).status_code


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "PROPFIND", "POST"])
@pytest.mark.parametrize("path", ["/webhooks/lemcal", "/webhooks/lemcal/"])
async def test_token_is_hidden_from_access_log(lemcal_sandbox: Sandbox, method: str, path: str) -> None:
    """Whatever the request, the scope that the access log uses no longer contains the token."""
    lemcal = lemcal_sandbox.client()
    app = service(lemcal)
    app.include_router(webhook_router(WebhookReceiver(lemcal, token=TOKEN, on_meeting=ignore)))
    seen: list[bytes] = []

    async def server(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)
        seen.append(scope["query_string"])

    transport = httpx.ASGITransport(server)
    async with lemcal, httpx.AsyncClient(transport=transport, base_url="http://x") as sender:
        response = await sender.request(method, path, params={"token": TOKEN}, json=lemcal_sandbox.book())
    assert (200 if method == "POST" else 405) == response.status_code
    assert "location" not in response.headers
    assert [b"token=hidden"] == seen


def test_websocket_is_rejected(lemcal_sandbox: Sandbox) -> None:
    """The token of a WebSocket request is hidden, too."""
    app = FastAPI()
    receiver = WebhookReceiver(lemcal_sandbox.client(), token=TOKEN, on_meeting=ignore)
    app.include_router(webhook_router(receiver))
    seen: list[bytes] = []

    async def server(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)
        seen.append(scope["query_string"])

    with (
        pytest.raises(WebSocketDisconnect),
        TestClient(server).websocket_connect(f"/webhooks/lemcal?token={TOKEN}"),
    ):
        raise AssertionError
    assert [b"token=hidden"] == seen


def test_with_error_tracker(lemcal_sandbox: Sandbox) -> None:
    """Sentry's integration reads the body before the route."""
    lemcal = lemcal_sandbox.client()
    envelopes: list[Any] = []

    class RecordingTransport(sentry_sdk.transport.Transport):
        def capture_envelope(self, envelope: Any) -> None:
            envelopes.append(envelope)

    with sentry_sdk.isolation_scope():
        sentry_sdk.init(
            dsn="http://key@127.0.0.1:9/1",
            transport=RecordingTransport,
            traces_sample_rate=1.0,
        )
        try:
            app = service(lemcal)
            app.include_router(webhook_router(WebhookReceiver(lemcal, token=TOKEN, on_meeting=ignore)))
            with TestClient(app) as sender:
                response = sender.post(f"/webhooks/lemcal?token={TOKEN}", json=lemcal_sandbox.book())
        finally:
            sentry_sdk.init(dsn=None)
    assert (200, {"status": "handled"}) == (response.status_code, response.json())
    assert envelopes
    assert TOKEN not in repr([envelope.serialize() for envelope in envelopes])


async def test_receiver_route(lemcal_sandbox: Sandbox) -> None:
    """The receiver responds as it does without FastAPI."""
    handled: list[str] = []

    async def keep(meeting: Meeting) -> None:
        handled.append(meeting.id)

    lemcal = lemcal_sandbox.client()
    app = service(lemcal)
    receiver = WebhookReceiver(lemcal, token=TOKEN, on_meeting=keep, list_lag=0)
    app.include_router(webhook_router(receiver), prefix="/hooks")
    booked = lemcal_sandbox.book()
    async with serving(app) as server, httpx.AsyncClient(base_url=server.url) as sender:

        async def status(token: str = TOKEN, method: str = "POST", **body: Any) -> int:
            response = await sender.request(method, "/hooks/webhooks/lemcal", params={"token": token}, **body)
            return response.status_code

        assert 200 == await status(json=booked)
        assert 200 == await status(json=booked)
        assert 401 == await status(token="guessed", json=booked)
        assert 400 == await status(content=b"{")
        assert 405 == await status(method="GET")
    assert [booked["_id"]] == handled


async def test_tenant_in_path(lemcal_sandbox: Sandbox) -> None:
    """The route's path parameter is the tenant's name."""
    lemcal = lemcal_sandbox.client()

    async def find(name: str) -> Tenant | None:
        return Tenant(lemcal, TOKEN) if name == "acme" else None

    app = service(lemcal)
    app.include_router(webhook_router(WebhookReceiver(accounts=find, on_meeting=ignore), "/hooks/{tenant}"))
    async with http_client(app) as sender:
        for tenant, status in (("acme", 200), ("beta", 401)):
            url = f"/hooks/{tenant}?token={TOKEN}"
            assert status == (await sender.post(url, json=lemcal_sandbox.book())).status_code
    operation = app.openapi()["paths"]["/hooks/{tenant}"]["post"]
    assert [("query", "token"), ("path", "tenant")] == [(p["in"], p["name"]) for p in operation["parameters"]]


def test_openapi() -> None:
    """The schema describes the token, the body and each response."""
    app = FastAPI()
    receiver = WebhookReceiver(AsyncLemcal("usr_1", "k1"), token=TOKEN, on_meeting=ignore)
    app.include_router(webhook_router(receiver))
    schema = app.openapi()
    operation = schema["paths"]["/webhooks/lemcal"]["post"]
    assert ["200", "400", "401", "408", "413", "503"] == sorted(operation["responses"])
    assert ["token"] == [parameter["name"] for parameter in operation["parameters"]]
    assert ["_id"] == operation["requestBody"]["content"]["application/json"]["schema"]["required"]
    assert "Retry-After" in operation["responses"]["503"]["headers"]
    assert TOKEN not in repr(schema)


async def test_starlette_needs_no_integration(lemcal_sandbox: Sandbox) -> None:
    """A receiver is a Starlette endpoint."""
    async with lemcal_sandbox.client() as lemcal:
        receiver = WebhookReceiver(lemcal, token=TOKEN, on_meeting=ignore)
        app = Starlette(routes=[Route("/hooks/lemcal", receiver)])
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as sender:
            response = await sender.post(f"/hooks/lemcal?token={TOKEN}", json=lemcal_sandbox.book())
        assert 200 == response.status_code


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("fault", "status", "retry_after"),
    [
        (faults.too_many_requests("7"), 503, "7"),
        (faults.too_many_requests("0.2"), 503, "1"),
        (faults.too_many_requests("86400"), 503, "86400"),
        (faults.status(503, headers={"Retry-After": "3"}), 503, "3"),
        (faults.status(401), 502, None),
        (faults.status(402), 502, None),
        (faults.status(403), 502, None),
        (faults.html_error(403), 502, None),
        (faults.status(400), 502, None),
        (faults.status(405), 502, None),
        (faults.status(404), 404, None),
        (faults.status(409), 409, None),
        (faults.status(500), 502, None),
        (faults.html_200(), 502, None),
        (faults.redirect("/"), 502, None),
        (faults.reset_after_processing(), 502, None),
        (faults.slow(5), 504, None),
    ],
)
async def test_errors_become_responses(
    lemcal_sandbox: Sandbox,
    fault: faults.Fault,
    status: int,
    retry_after: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The response says whether to retry, and nothing about the service's relation to lemcal."""
    lemcal_sandbox.inject(fault)
    async with http_client(service(lemcal_sandbox.client(retry=ONCE, deadline=0.5))) as http:
        response = await http.get("/me")
    assert (status, retry_after) == (response.status_code, response.headers.get("retry-after"))
    assert ["detail"] == list(response.json())
    logged = [record.getMessage() for record in caplog.records if record.name == "lemcal_async.fastapi"]
    assert (status >= 500) == bool(logged)
    for line in logged:
        assert line.startswith(f"GET /me: responded with {status}: GET /me: ")
        assert lemcal_sandbox.api_key not in line


async def test_other_errors(lemcal_sandbox: Sandbox) -> None:
    """A missing meeting, a wait beyond the deadline, a timeout, an unreachable host and an invalid id."""
    slow = Sandbox(limit=2, period=600)
    limiter = LocalRateLimiter(limit=2, period=600)
    with slow.serve():
        app = service(slow.client(retry=ONCE, deadline=30, limiter=limiter))
        async with http_client(app) as http:
            assert 404 == (await http.get("/meetings/mee_1")).status_code
            assert 500 == (await http.get("/meetings/..%5C")).status_code  # an invalid id: nothing was sent
            assert 200 == (await http.get("/me")).status_code
            late = await http.get("/me")  # fails immediately
            assert (504, True) == (late.status_code, int(late.headers["retry-after"]) >= 1)
    lemcal_sandbox.inject(faults.slow(5))
    other = lemcal_sandbox.client(retry=ONCE, timeout=0.1)
    async with http_client(service(other)) as http:
        assert 504 == (await http.get("/me")).status_code
    unreachable = AsyncLemcal("usr_1", "k1", base_url="http://127.0.0.1:9", retry=ONCE)
    async with http_client(service(unreachable)) as http:
        assert 502 == (await http.get("/me")).status_code


def test_missing_extra() -> None:
    """Without FastAPI, the ImportError names the extra."""
    program = (
        "import sys; sys.modules['fastapi'] = None\n"
        "try:\n"
        "    import lemcal_async.fastapi\n"
        "except ImportError as error:\n"
        "    assert \"pip install 'lemcal-async[fastapi]'\" in str(error), error\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)
