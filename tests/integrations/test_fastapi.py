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
from fastapi import FastAPI
from serving import serving
from starlette.applications import Starlette
from starlette.routing import Route

from lemcal_async import AsyncLemcal, Meeting, RetryPolicy, errors, to_wire
from lemcal_async.fastapi import Lemcal, add_exception_handlers, get_lemcal, lifespan, webhook_router
from lemcal_async.sandbox import Sandbox, faults
from lemcal_async.webhooks import Tenant, WebhookReceiver

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
    assert [f"registered the hook {hook['_id']}; keep the id, the service does not list it"] == said[:1]
    assert ["the hook was registered before"] == said[1:]
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
    """That is a mistake of ours, and shows at the start."""
    with pytest.raises(errors.ConfigurationError, match="target_url") as caught:
        async with browsing(service(lemcal_sandbox.client(), hook_url=f"example.com/?token={TOKEN}")):
            pass
    rendered = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    frames = [frame for frame in rendered.stack if "/lemcal_async/" in frame.filename]
    assert "fastapi.py" in repr([frame.filename for frame in frames])
    assert TOKEN not in str(caught.value) + repr([frame.locals for frame in frames])


# ------------------------------------------------------------------ the receiver's router


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
        assert line.startswith(f"GET /me: {status}, because: GET /me: ")
        assert lemcal_sandbox.api_key not in line


async def test_other_errors(lemcal_sandbox: Sandbox) -> None:
    """No such meeting; a queue that is longer than the deadline; a timeout; nobody there; wrong use."""
    app = service(lemcal_sandbox.client(retry=ONCE, deadline=0.3))
    async with browsing(app) as browser:
        assert 404 == (await browser.get("/meetings/mee_1")).status_code
        assert 500 == (await browser.get("/meetings/..%5C")).status_code
        async with anyio.create_task_group() as tasks:
            for _ in range(19):
                tasks.start_soon(browser.get, "/me")
        late = await browser.get("/me")
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
