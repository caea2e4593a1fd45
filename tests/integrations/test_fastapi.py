"""A FastAPI service with a client, a webhook and honest errors, on real sockets and without."""

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
    """Be a handler that is content with everything."""


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
async def browsing(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Run an app's lifespan, and ask it without a socket."""
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://service") as browser,
    ):
        yield browser


# ------------------------------------------------------------------ lifespan and dependency


async def test_the_client_lives_as_long_as_the_app(lemcal_sandbox: Sandbox) -> None:
    """It is there in each route, and closed at the end."""
    lemcal = lemcal_sandbox.client()
    async with browsing(service(lemcal)) as browser:
        assert lemcal_sandbox.user_id == (await browser.get("/me")).json()
        meeting_id = lemcal_sandbox.meetings()[0]["_id"]
        assert meeting_id == (await browser.get(f"/meetings/{meeting_id}")).json()["_id"]
    with pytest.raises(errors.ConfigurationError, match="closed"):
        await lemcal.me()


async def test_on_a_real_server(lemcal_sandbox: Sandbox) -> None:
    """Where lifespan and requests are tasks of their own."""
    async with serving(service(lemcal_sandbox.client())) as server, httpx.AsyncClient() as browser:
        assert lemcal_sandbox.user_id == (await browser.get(f"{server.url}/me")).json()


async def test_overridden(lemcal_sandbox: Sandbox) -> None:
    """In tests, the routes get another client."""
    app = service(AsyncLemcal("usr_1", "k1"))
    async with lemcal_sandbox.client() as other, browsing(app) as browser:
        app.dependency_overrides[get_lemcal] = lambda: other
        assert lemcal_sandbox.user_id == (await browser.get("/me")).json()


async def test_without_the_lifespan() -> None:
    """It is said what is missing."""
    app = FastAPI()

    @app.get("/me")
    async def me(lemcal: Lemcal) -> str:
        return lemcal.user_id

    async with browsing(app) as browser:
        with pytest.raises(errors.ConfigurationError, match=r"FastAPI\(lifespan=lifespan\(lemcal\)\)"):
            await browser.get("/me")


async def test_within_a_lifespan_of_ones_own(lemcal_sandbox: Sandbox) -> None:
    """They nest."""

    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncIterator[None]:
        async with lifespan(lemcal_sandbox.client())(app):
            yield

    app = FastAPI(lifespan=own)

    @app.get("/me")
    async def me(lemcal: Lemcal) -> str:
        return lemcal.user_id

    async with browsing(app) as browser:
        assert lemcal_sandbox.user_id == (await browser.get("/me")).json()


# ------------------------------------------------------------------ the hook of one's own


async def test_registers_its_hook(lemcal_sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """At the start, and at the next start there is one already; the log says which, without the token."""
    url = f"https://example.com/webhooks/lemcal?token={TOKEN}"
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            async with browsing(service(lemcal_sandbox.client(), hook_url=url)) as browser:
                await browser.get("/me")
    (hook,) = lemcal_sandbox.hooks()
    assert (url, True) == (hook["targetUrl"], hook["anyMeetingType"])
    said = [record.getMessage() for record in caplog.records if record.name == "lemcal_async.fastapi"]
    assert [f"registered the hook {hook['_id']}; keep the id, because the service lists no hooks"] == said[:1]
    assert ["the hook already exists"] == said[1:]
    assert TOKEN not in caplog.text


@pytest.mark.parametrize(
    "fault", [faults.status(401, f"no hook for {TOKEN}"), faults.reset_after_processing()]
)
async def test_starts_without_its_hook(
    lemcal_sandbox: Sandbox, caplog: pytest.LogCaptureFixture, fault: faults.Fault
) -> None:
    """A lemcal that is down takes nobody down with it."""
    lemcal_sandbox.inject(fault, method="POST")
    url = f"https://example.com/?token={TOKEN}"
    async with browsing(service(lemcal_sandbox.client(), hook_url=url)) as browser:
        assert 200 == (await browser.get("/me")).status_code
    assert "the hook was not registered" in caplog.text
    assert TOKEN not in caplog.text


async def test_a_hook_url_that_is_none(lemcal_sandbox: Sandbox) -> None:
    """That is a mistake of ours, and shows when the lifespan is made."""
    with pytest.raises(errors.ConfigurationError, match="target_url") as caught:
        service(lemcal_sandbox.client(), hook_url=f"example.com/?token={TOKEN}")
    rendered = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    frames = [frame for frame in rendered.stack if "/lemcal_async/" in frame.filename]
    assert "fastapi.py" in repr([frame.filename for frame in frames])
    assert TOKEN not in str(caught.value) + repr([frame.locals for frame in frames])


async def test_a_slow_lemcal_does_not_hold_up_the_start(
    lemcal_sandbox: Sandbox, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hook is registered in the background."""
    monkeypatch.setattr("lemcal_async.fastapi.HOOK_TIMEOUT", 0.05)
    caplog.set_level(logging.INFO)
    lemcal_sandbox.inject(faults.slow(1.5), method="POST")
    url = f"https://example.com/?token={TOKEN}"
    async with browsing(service(lemcal_sandbox.client(), hook_url=url)) as browser:
        assert "registered the hook" not in caplog.text
        assert 200 == (await browser.get("/me")).status_code
        with anyio.fail_after(20):
            while "registered the hook" not in caplog.text:  # noqa: ASYNC110
                await anyio.sleep(0.01)
    assert "in the background" in caplog.text
    assert 1 == len(lemcal_sandbox.hooks())


async def test_a_failed_registration_is_tried_again(
    lemcal_sandbox: Sandbox, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What passes is waited out; the log has the cause, and says what it means."""
    monkeypatch.setattr("lemcal_async.fastapi._INITIAL_DELAY", 0.01)
    caplog.set_level(logging.INFO)
    url = f"https://example.com/?token={TOKEN}"
    lemcal_sandbox.inject(faults.status(500, f"no hook for {url}"), method="POST")
    async with browsing(service(lemcal_sandbox.client(), hook_url=url)):
        with anyio.fail_after(20):
            while "registered the hook hoo_" not in caplog.text:  # noqa: ASYNC110
                await anyio.sleep(0.01)
    assert "the hook was not registered: POST /hooks: 500" in caplog.text
    assert "no hook for https://example.com/?***" in caplog.text
    assert "unless it already exists, no bookings are delivered; the next attempt" in caplog.text
    assert TOKEN not in caplog.text


async def test_what_the_app_raises_stays_what_it_is(lemcal_sandbox: Sandbox) -> None:
    """Also beside a registration in the background."""
    begin = lifespan(lemcal_sandbox.client(), hook_url="https://example.com/?token=t")
    with pytest.raises(ZeroDivisionError):
        async with begin(FastAPI()):
            raise ZeroDivisionError


def test_an_app_is_started_again(lemcal_sandbox: Sandbox) -> None:
    """By a second test client, or the second invocation of a function in the cloud."""
    lemcal = lemcal_sandbox.client()
    app = service(lemcal)
    app.include_router(webhook_router(WebhookReceiver(lemcal, token=TOKEN, on_meeting=ignore)))
    for _ in range(3):
        with TestClient(app) as browser:
            assert lemcal_sandbox.user_id == browser.get("/me").json()
            url = f"/webhooks/lemcal?token={TOKEN}"
            assert 200 == browser.post(url, json=lemcal_sandbox.book()).status_code
    with pytest.raises(errors.ConfigurationError, match="closed"):
        anyio.run(lemcal.me)


# ------------------------------------------------------------------ the receiver's router


@pytest.mark.parametrize("reader", ["dependency", "middleware"])
async def test_a_body_that_somebody_has_read(lemcal_sandbox: Sandbox, reader: str) -> None:
    """As error trackers do, and dependencies of the whole app."""

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
    async with browsing(app) as sender:
        answer = await sender.post(url, json=lemcal_sandbox.book())
        assert (200, {"status": "handled"}) == (answer.status_code, answer.json())
        assert 413 == (await sender.post(url, content=b" " * (MAX_BODY_BYTES + 1))).status_code


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "PROPFIND", "POST"])
@pytest.mark.parametrize("path", ["/webhooks/lemcal", "/webhooks/lemcal/"])
async def test_the_token_is_hidden_before_the_server_logs(
    lemcal_sandbox: Sandbox, method: str, path: str
) -> None:
    """Whatever the request is: an access log shows the query as it is in the scope in the end."""
    lemcal = lemcal_sandbox.client()
    app = service(lemcal)
    app.include_router(webhook_router(WebhookReceiver(lemcal, token=TOKEN, on_meeting=ignore)))
    seen: list[bytes] = []

    async def server(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)
        seen.append(scope["query_string"])

    transport = httpx.ASGITransport(server)
    async with lemcal, httpx.AsyncClient(transport=transport, base_url="http://x") as sender:
        answer = await sender.request(method, path, params={"token": TOKEN}, json=lemcal_sandbox.book())
    assert (200 if method == "POST" else 405) == answer.status_code
    assert "location" not in answer.headers
    assert [b"token=hidden"] == seen


def test_a_websocket_is_refused(lemcal_sandbox: Sandbox) -> None:
    """And its token hidden as well."""
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


def test_beside_an_error_tracker(lemcal_sandbox: Sandbox) -> None:
    """Sentry's integration reads the body before the route does."""
    lemcal = lemcal_sandbox.client()
    kept: list[Any] = []

    class Kept(sentry_sdk.transport.Transport):
        def capture_envelope(self, envelope: Any) -> None:
            kept.append(envelope)

    with sentry_sdk.isolation_scope():
        sentry_sdk.init(
            dsn="http://key@127.0.0.1:9/1",
            transport=Kept,
            traces_sample_rate=1.0,
        )
        try:
            app = service(lemcal)
            app.include_router(webhook_router(WebhookReceiver(lemcal, token=TOKEN, on_meeting=ignore)))
            with TestClient(app) as sender:
                answer = sender.post(f"/webhooks/lemcal?token={TOKEN}", json=lemcal_sandbox.book())
        finally:
            sentry_sdk.init(dsn=None)
    assert (200, {"status": "handled"}) == (answer.status_code, answer.json())
    assert kept
    assert TOKEN not in repr([envelope.serialize() for envelope in kept])


async def test_the_receiver_has_a_route(lemcal_sandbox: Sandbox) -> None:
    """It reads the request itself, and answers as it does anywhere."""
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
            answer = await sender.request(method, "/hooks/webhooks/lemcal", params={"token": token}, **body)
            return answer.status_code

        assert 200 == await status(json=booked)
        assert 200 == await status(json=booked)
        assert 401 == await status(token="guessed", json=booked)
        assert 400 == await status(content=b"{")
        assert 405 == await status(method="GET")
    assert [booked["_id"]] == handled


async def test_the_path_says_whose(lemcal_sandbox: Sandbox) -> None:
    """A parameter of the route is the tenant's name."""
    lemcal = lemcal_sandbox.client()

    async def find(name: str) -> Tenant | None:
        return Tenant(lemcal, TOKEN) if name == "acme" else None

    app = service(lemcal)
    app.include_router(webhook_router(WebhookReceiver(accounts=find, on_meeting=ignore), "/hooks/{tenant}"))
    async with browsing(app) as sender:
        for tenant, status in (("acme", 200), ("beta", 401)):
            url = f"/hooks/{tenant}?token={TOKEN}"
            assert status == (await sender.post(url, json=lemcal_sandbox.book())).status_code
    operation = app.openapi()["paths"]["/hooks/{tenant}"]["post"]
    assert [("query", "token"), ("path", "tenant")] == [(p["in"], p["name"]) for p in operation["parameters"]]


def test_openapi() -> None:
    """The route is described: token, body, and each answer."""
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


async def test_starlette_takes_it_as_it_is(lemcal_sandbox: Sandbox) -> None:
    """No integration is needed there."""
    async with lemcal_sandbox.client() as lemcal:
        receiver = WebhookReceiver(lemcal, token=TOKEN, on_meeting=ignore)
        app = Starlette(routes=[Route("/hooks/lemcal", receiver)])
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as sender:
            answer = await sender.post(f"/hooks/lemcal?token={TOKEN}", json=lemcal_sandbox.book())
        assert 200 == answer.status_code


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
async def test_errors_are_answered_for_what_they_are(
    lemcal_sandbox: Sandbox,
    fault: faults.Fault,
    status: int,
    retry_after: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Who asks learns whether to come again, and nothing of how we and lemcal stand."""
    lemcal_sandbox.inject(fault)
    async with browsing(service(lemcal_sandbox.client(retry=ONCE, deadline=0.5))) as browser:
        answer = await browser.get("/me")
    assert (status, retry_after) == (answer.status_code, answer.headers.get("retry-after"))
    assert ["detail"] == list(answer.json())
    logged = [record.getMessage() for record in caplog.records if record.name == "lemcal_async.fastapi"]
    assert (status >= 500) == bool(logged)
    for line in logged:
        assert line.startswith(f"GET /me: responded with {status}: GET /me: ")
        assert lemcal_sandbox.api_key not in line


async def test_other_errors(lemcal_sandbox: Sandbox) -> None:
    """No such meeting; a queue that is longer than the deadline; a timeout; nobody there; wrong use."""
    slow = Sandbox(limit=2, period=600)
    limiter = LocalRateLimiter(limit=2, period=600)
    with slow.serve():
        app = service(slow.client(retry=ONCE, deadline=30, limiter=limiter))
        async with browsing(app) as browser:
            assert 404 == (await browser.get("/meetings/mee_1")).status_code
            assert 500 == (await browser.get("/meetings/..%5C")).status_code  # nothing was sent
            assert 200 == (await browser.get("/me")).status_code
            late = await browser.get("/me")  # refused at once
            assert (504, True) == (late.status_code, int(late.headers["retry-after"]) >= 1)
    lemcal_sandbox.inject(faults.slow(5))
    other = lemcal_sandbox.client(retry=ONCE, timeout=0.1)
    async with browsing(service(other)) as browser:
        assert 504 == (await browser.get("/me")).status_code
    nobody = AsyncLemcal("usr_1", "k1", base_url="http://127.0.0.1:9", retry=ONCE)
    async with browsing(service(nobody)) as browser:
        assert 502 == (await browser.get("/me")).status_code


def test_it_names_its_extra() -> None:
    """Where it is not installed."""
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
