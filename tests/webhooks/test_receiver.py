"""The receiver as a whole: whose a delivery is, what it wakes, what it logs, what it needs."""

import base64
import json
import logging
import threading
import traceback
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest
from serving import App, serving
from starlette.applications import Starlette
from starlette.routing import Mount, Route

from lemcal_async import AsyncLemcal, Meeting, events
from lemcal_async.errors import ConfigurationError
from lemcal_async.ratelimit import Unlimited
from lemcal_async.sandbox import Sandbox, faults
from lemcal_async.webhooks import Tenant, WebhookReceiver, _lookup, hook_url

from .conftest import ONCE, TOKEN, scene
from .posting import post

pytestmark = pytest.mark.anyio

NEW_TOKEN = "wh-token-new-9Kq"


async def ignore(*_: object) -> None:
    """Be a handler that is content with everything."""


async def ask(app: App, path: str, body: object, *, token: str = TOKEN) -> tuple[int, str]:
    """Deliver to an app without a socket; return status and outcome."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as sender:
        answer = await sender.post(path, params={"token": token}, json=body)
        return answer.status_code, answer.json()["status"]


# ------------------------------------------------------------------ tokens and tenants


async def test_several_tokens(sandbox: Sandbox, lemcal: AsyncLemcal) -> None:
    """Both are good while one replaces the other."""
    receiver = WebhookReceiver(lemcal, token=[TOKEN, NEW_TOKEN], on_meeting=ignore)
    async with lemcal:
        assert (200, "handled") == await ask(receiver, "/", sandbox.book())
        assert (200, "handled") == await ask(receiver, "/", sandbox.book(), token=NEW_TOKEN)
        assert (401, "rejected") == await ask(receiver, "/", sandbox.book(), token="other")


async def test_accounts_by_token(sandbox: Sandbox) -> None:
    """The token says whose the delivery is; the handler gets that account's client."""
    got: list[tuple[str, str]] = []

    async def keep(meeting: Meeting, lemcal: AsyncLemcal) -> None:
        got.append((meeting.id, lemcal.user_id))

    async with sandbox.client() as first:
        other = sandbox.accounts[1]
        second = first.for_account(other.user_id, other.api_key)
        accounts = {"token-1": first, "token-1b": first, "token-2": second}
        receiver = WebhookReceiver(accounts=accounts, on_meeting=keep, list_lag=0)
        one, two = sandbox.book(), sandbox.book(account=1)
        assert (200, "handled") == await ask(receiver, "/", one, token="token-1b")
        assert (200, "handled") == await ask(receiver, "/", two, token="token-2")
        assert (200, "ignored") == await ask(receiver, "/", two, token="token-1")
        assert (401, "rejected") == await ask(receiver, "/", one, token="token-3")
    assert [(one["_id"], sandbox.user_id), (two["_id"], other.user_id)] == got


@pytest.mark.parametrize("mounting", ["bare", "mount", "route"])
async def test_accounts_by_path(sandbox: Sandbox, mounting: str) -> None:
    """The path says whose it is, and the token must be that one's own."""
    got: list[str] = []
    asked: list[str] = []

    async def keep(meeting: Meeting, lemcal: AsyncLemcal) -> None:
        got.append(lemcal.user_id)

    async with sandbox.client() as first:
        other = sandbox.accounts[1]
        tenants = {
            "acme": Tenant(first, "token-1"),
            "beta": Tenant(first.for_account(other.user_id, other.api_key), ["token-2", "token-2b"]),
        }

        async def find(name: str) -> Tenant | None:
            asked.append(name)
            return tenants.get(name)

        receiver = WebhookReceiver(accounts=find, on_meeting=keep, list_lag=0)
        apps: dict[str, App] = {
            "bare": receiver,
            "mount": Starlette(routes=[Mount("/hooks", receiver)]),
            "route": Starlette(routes=[Route("/hooks/{tenant}/new", receiver)]),
        }
        base, tail = {"bare": ("", ""), "mount": ("/hooks", ""), "route": ("/hooks", "/new")}[mounting]
        app = apps[mounting]
        one, two = sandbox.book(), sandbox.book(account=1)
        assert (200, "handled") == await ask(app, f"{base}/acme{tail}", one, token="token-1")
        assert (200, "handled") == await ask(app, f"{base}/beta{tail}", two, token="token-2b")
        assert (200, "ignored") == await ask(app, f"{base}/acme{tail}", two, token="token-1")
        assert (401, "rejected") == await ask(app, f"{base}/acme{tail}", two, token="token-2")
        assert (401, "rejected") == await ask(app, f"{base}/gamma{tail}", two, token="token-2")
    assert ["acme", "beta", "acme", "acme", "gamma"] == asked
    assert [sandbox.user_id, other.user_id] == got


async def test_accounts_that_cannot_be_found(caplog: pytest.LogCaptureFixture) -> None:
    """The directory is down: nobody knows whose it is, so it is to come again."""

    async def find(name: str) -> Tenant | None:
        raise OSError("postgresql://me:secret@host is gone")

    receiver = WebhookReceiver(accounts=find, on_meeting=ignore)
    assert (503, "unavailable") == await ask(receiver, "/acme", {"_id": "mee_1"})
    assert "finding the account of a delivery failed" in caplog.text
    assert "OSError: postgresql" not in caplog.text


async def test_a_wrong_key_for_another_account_shares_nothing(sandbox: Sandbox) -> None:
    """A tenant that claims to be another cannot verify anything by the other's list calls."""
    sandbox.inject(faults.slow(0.3), path="/meetings")
    async with sandbox.client(retry=ONCE) as owner:
        thief = owner.for_account(owner.user_id, "made-up")
        receiver = WebhookReceiver(accounts={"t-1": owner, "t-2": thief}, on_meeting=ignore)
        booked = sandbox.book()
        outcomes: dict[str, tuple[int, str]] = {}

        async def one(token: str) -> None:
            outcomes[token] = await ask(receiver, "/", booked, token=token)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one, "t-1")
            with anyio.fail_after(30):
                while not sandbox.requests:  # noqa: ASYNC110  # the owner's list call is under way
                    await anyio.sleep(0.005)
            tasks.start_soon(one, "t-2")
        assert {"t-1": (200, "handled"), "t-2": (503, "unavailable")} == outcomes
        assert (503, "unavailable") == await ask(receiver, "/", booked, token="t-2")


# ------------------------------------------------------------------ signal mode


class Bell:
    """What a delivery wakes."""

    def __init__(self, *, broken: bool = False) -> None:
        self.rung: list[str | None] = []
        self._broken = broken

    def wake(self, user_id: str | None = None) -> None:
        """Note who rang."""
        if self._broken:
            raise OSError
        self.rung.append(user_id)


async def test_a_delivery_wakes(sandbox: Sandbox) -> None:
    """Alone, whatever it says, and nothing is fetched; beside a handler, when it is verified."""
    bell = Bell()
    async with scene(sandbox, wake=bell, on_meeting=None) as stage:
        assert (200, "handled") == (await stage.post({"_id": "mee_forged"})).brief
        assert ([sandbox.user_id], []) == (bell.rung, stage.lists())
    async with scene(sandbox, wake=bell) as stage:
        assert (200, "ignored") == (await stage.post({"_id": "mee_forged"})).brief
        assert 1 == len(bell.rung)
        assert (200, "handled") == (await stage.post(stage.book())).brief
        assert (2, 1) == (len(bell.rung), len(stage.handled))


@pytest.mark.parametrize("handler", ["with a handler", "alone"])
async def test_forged_deliveries_wake_seldom(
    sandbox: Sandbox, handler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many come in at once, they share a wake-up that begins after they came."""
    monkeypatch.undo()
    bell = Bell()
    options: dict[str, Any] = {"on_meeting": None} if handler == "alone" else {}
    async with scene(sandbox, wake=bell, **options) as stage:
        booked = stage.book()
        answers = await stage.post_at_once([booked] * 100)
        assert {200} == {answer.status_code for answer in answers}
        assert 1 <= len(bell.rung) <= 3


async def test_a_wake_that_is_awaited(sandbox: Sandbox) -> None:
    """A fleet stores the wake-up before the delivery is answered."""
    stored: list[str | None] = []

    class Waker:
        async def wake(self, user_id: str | None = None) -> None:
            await anyio.lowlevel.checkpoint()
            stored.append(user_id)

    async with scene(sandbox, wake=Waker(), on_meeting=None) as stage:
        assert (200, "handled") == (await stage.post({"_id": "mee_1"})).brief
    assert [sandbox.user_id] == stored


async def test_a_wake_that_fails(sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """It is to come again."""
    async with scene(sandbox, wake=Bell(broken=True)) as stage:
        assert (503, "failed") == (await stage.post(stage.book())).brief
        assert [] == stage.handled
    assert f"account {sandbox.user_id}: wake= failed" in caplog.text
    assert "OSError" in caplog.text


async def test_a_wake_that_hangs(sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """The sender hears within the deadline that it is to come again, and the log says why."""

    class Waker:
        async def wake(self, user_id: str | None = None) -> None:
            await anyio.sleep_forever()

    async with scene(sandbox, wake=Waker(), on_meeting=None, deadline=0.3) as stage:
        with anyio.fail_after(10):
            assert (503, "failed") == (await stage.post({"_id": "mee_1"})).brief
    assert f"account {sandbox.user_id}: wake= failed" in caplog.text
    assert "TimeoutError" in caplog.text


# ------------------------------------------------------------------ load


async def test_two_hundred_at_once(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost a list call per 0.75 s, and one for the last of them, however many meetings they are of."""
    monkeypatch.undo()
    types = [entry["_id"] for entry in sandbox.meeting_types()]
    async with scene(sandbox) as stage:
        booked = [stage.book(meeting_type_id=types[number % len(types)]) for number in range(200)]
        began = anyio.current_time()
        answers = await stage.post_at_once(booked)
        gaps = (anyio.current_time() - began) / _lookup.GAP
        assert {(200, "handled")} == {answer.brief for answer in answers}
        assert {meeting["_id"] for meeting in booked} == set(stage.handled_ids)
        assert 200 == len(stage.handled)
        assert len(stage.lists()) <= gaps + 2


async def test_lemcal_is_asked_for_the_type_alone(sandbox: Sandbox) -> None:
    """A long list is the dearest part of a delivery; a lie costs a look at all of it."""
    async with scene(sandbox) as stage:
        booked = stage.book()
        await stage.post(booked)
        await stage.post({**stage.book(), "meetingTypeId": "met_other"})
        assert [f"meetingTypeId={booked['meetingTypeId']}", "meetingTypeId=met_other", ""] == stage.lists()


async def test_restarts_with_a_memory(sandbox: Sandbox) -> None:
    """What was answered 200 is not handled again by the next receiver that is given the same memory."""
    from lemcal_async.webhooks import InMemoryDedup

    memory = InMemoryDedup()
    async with scene(sandbox, dedup=memory) as before:
        booked = before.book()
        assert (200, "handled") == (await before.post(booked)).brief
    async with scene(sandbox, dedup=memory) as after:
        assert (200, "repeated") == (await after.post(booked)).brief
        assert [] == after.handled


# ------------------------------------------------------------------ what shows


async def test_the_token_shows_nowhere(
    sandbox: Sandbox, caplog: pytest.LogCaptureFixture, anyio_backend: str
) -> None:
    """Not in the log of the receiver, nor in the server's, which knows the whole URL."""
    import uvicorn.logging  # noqa: F401 - its loggers

    async def fail(meeting: Meeting) -> None:
        raise ValueError(TOKEN)

    with caplog.at_level(logging.DEBUG):
        async with scene(sandbox, handler=fail) as stage:
            await stage.post(stage.book())
            await stage.post({"_id": "mee_1"})
            await stage.post({"_id": "mee_1"}, method="GET")
            await stage.post(b"", token=f"{TOKEN}-mistyped")
            assert TOKEN not in repr(stage.receiver)
            assert TOKEN not in repr(vars(stage.receiver))
            private = [meeting.guest.email for meeting in stage.handled if meeting.guest]
    ours = [record.getMessage() for record in caplog.records if record.name != "httpcore.http11"]
    if anyio_backend == "asyncio":  # hypercorn writes its access log as it is told to
        assert 4 == len([line for line in ours if "/hook?token=hidden" in line])
    assert ours
    assert private
    for line in ours:
        assert TOKEN not in line
        assert not [email for email in private if email and email in line]


async def test_tracebacks(sandbox: Sandbox, lemcal: AsyncLemcal) -> None:
    """With local variables they show neither the token nor the digest's key, whatever passes through."""

    class Stop(BaseException):
        """What nobody handles."""

    async def stop(meeting: Meeting) -> None:
        raise Stop

    receiver = WebhookReceiver(lemcal, token=TOKEN, on_meeting=stop)
    async with lemcal:
        with pytest.raises(BaseException) as caught:
            await ask(receiver, "/", sandbox.book())
    rendered = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    ours = [
        frame.locals
        for frame in rendered.stack
        if "/webhooks/" in frame.filename and "/tests/" not in frame.filename
    ]
    assert len(ours) > 2
    assert TOKEN not in repr(ours)


def wrong_set_ups(lemcal: AsyncLemcal) -> dict[str, Callable[[], object]]:
    """Return what cannot work, with a token in each."""
    make: Any = WebhookReceiver
    one = {"token": TOKEN, "on_meeting": ignore}
    return {
        "takes either": lambda: make(on_meeting=ignore),
        "takes either a client": lambda: make(lemcal, on_meeting=ignore),
        "either a client and": lambda: make(token=TOKEN, on_meeting=ignore),
        "a client and token=": lambda: make(lemcal, **one, accounts={TOKEN: lemcal}),
        "must be an AsyncLemcal, not str": lambda: make(TOKEN, **one),
        "must be one nonempty string": lambda: make(lemcal, token="", on_meeting=ignore),
        "or several": lambda: make(lemcal, token=[], on_meeting=ignore),
        "token= must": lambda: make(lemcal, token=[TOKEN, 5], on_meeting=ignore),
        "needs on_meeting=, wake= or both": lambda: make(lemcal, token=TOKEN),
        "on_meeting= must": lambda: make(lemcal, token=TOKEN, on_meeting=TOKEN),
        "wake= must": lambda: make(lemcal, **one, wake=object()),
        "dedup= must": lambda: make(lemcal, **one, dedup={}),
        "deadline=0: it must be a number of seconds": lambda: make(lemcal, **one, deadline=0),
        "deadline=inf: it must be a number of seconds": lambda: make(lemcal, **one, deadline=float("inf")),
        "handler_timeout=.*: it must be a number of seconds": lambda: make(lemcal, **one, handler_timeout=-1),
        "list_lag=.*: it must be a number of seconds": lambda: make(lemcal, **one, list_lag=-1),
        "accounts= must map": lambda: make(accounts={TOKEN: lemcal, "": lemcal}, on_meeting=ignore),
        "map nonempty tokens": lambda: make(accounts={}, on_meeting=ignore),
        "to clients": lambda: make(accounts={TOKEN: TOKEN}, on_meeting=ignore),
        "accounts= must be a mapping": lambda: make(accounts=TOKEN, on_meeting=ignore),
        "to generate one": lambda: Tenant(lemcal, ""),
    }


async def test_wrong_set_up(lemcal: AsyncLemcal) -> None:
    """It is said what to do, and the token is not shown."""
    for words, make in wrong_set_ups(lemcal).items():
        with pytest.raises(ConfigurationError, match=words) as caught:
            make()
        rendered = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
        ours = [frame for frame in rendered.stack if "/lemcal_async/" in frame.filename]
        assert TOKEN not in str(caught.value)
        assert TOKEN not in repr([frame.locals for frame in ours]), words


async def test_events(sandbox: Sandbox) -> None:
    """Each delivery is told with its outcome; one whose sender left is not."""
    heard: list[events.Event] = []
    leave = events.subscribe(heard.append)
    try:
        async with scene(sandbox) as stage:
            booked = stage.book()
            for body in (booked, booked, {"_id": "mee_forged"}, b""):
                await stage.post(body)
    finally:
        leave()
    handled = [event for event in heard if isinstance(event, events.WebhookHandled)]
    expected = [("handled", 200), ("repeated", 200), ("ignored", 200), ("rejected", 400)]
    assert expected == [(event.outcome, event.status_code) for event in handled]
    assert all(0 <= event.seconds < 10 for event in handled)


# ------------------------------------------------------------------ ASGI


async def test_a_websocket_is_closed(lemcal: AsyncLemcal) -> None:
    """There is none here."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    receiver = WebhookReceiver(lemcal, token=TOKEN, on_meeting=ignore)
    await receiver({"type": "websocket", "path": "/"}, receive, send)
    assert [{"type": "websocket.close"}] == sent
    await lemcal.aclose()


async def test_a_sender_that_is_gone(sandbox: Sandbox, lemcal: AsyncLemcal) -> None:
    """A server may say so by an OSError."""

    async def send(message: Any) -> None:
        raise BrokenPipeError

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    receiver = WebhookReceiver(lemcal, token=TOKEN, on_meeting=ignore)
    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": []}
    await receiver(scope, receive, send)
    await lemcal.aclose()


async def test_http_2_knows_no_connection_header(lemcal: AsyncLemcal) -> None:
    """There a connection is not closed for a body that was not read."""
    heads: list[dict[str, str]] = []

    async def send(message: Any) -> None:
        if "headers" in message:
            heads.append({name.decode(): value.decode() for name, value in message["headers"]})

    async def receive() -> Any:
        raise AssertionError("the body is not asked for")

    receiver = WebhookReceiver(lemcal, token=TOKEN, on_meeting=ignore)
    for version in ("1.1", "2"):
        scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []}
        await receiver({**scope, "http_version": version}, receive, send)
    assert ["close", None] == [head.get("connection") for head in heads]
    await lemcal.aclose()


async def test_restarted_servers(sandbox: Sandbox) -> None:
    """The same receiver goes on in the next server."""
    async with sandbox.client() as lemcal:
        receiver = WebhookReceiver(lemcal, token=TOKEN, on_meeting=ignore)
        for _ in range(2):
            body = b'{"_id": "%b"}' % sandbox.book()["_id"].encode()
            async with serving(receiver) as server:
                assert (200, "handled") == (await post(server.port, body, query=f"?token={TOKEN}")).brief


@pytest.mark.parametrize("backends", [["asyncio", "trio", "asyncio"], ["trio", "asyncio", "trio"]])
@pytest.mark.parametrize("anyio_backend", ["none"])
def test_one_event_loop_after_another(anyio_backend: str, backends: list[str]) -> None:
    """Made outside of any, and used in several, whose clocks and threads have nothing in common."""
    rows = [{"_id": f"mee_{number}"} for number in range(3)]
    wire = httpx.MockTransport(lambda _: httpx.Response(200, json=rows))
    lemcal = AsyncLemcal("usr_1", "k1", transport=wire, limiter=Unlimited())
    handled: list[str] = []
    receiver = WebhookReceiver(lemcal, token=TOKEN, on_meeting=lambda meeting: handled.append(meeting.id))
    for row, backend in zip(rows, backends, strict=True):
        assert (200, "handled") == anyio.run(ask, receiver, "/", row, backend=backend)
    assert [row["_id"] for row in rows] == handled


# ------------------------------------------------------------------ without ASGI


async def test_handled_without_asgi(sandbox: Sandbox, lemcal: AsyncLemcal) -> None:
    """The same answers, for Lambda, aiohttp.web, Django and whatever else."""
    receiver = WebhookReceiver(lemcal, token="a+b&c", on_meeting=ignore, list_lag=0)
    booked = json.dumps(sandbox.book()).encode()
    query = hook_url("https://you.example/", "a+b&c").partition("?")[2]
    basic = {"Authorization": "Basic " + base64.b64encode(b"lemcal:a+b&c").decode()}
    async with lemcal:
        status, headers, body = await receiver.handle("POST", query, {}, booked)
        assert (200, {"status": "handled"}) == (status, json.loads(body))
        assert {"content-type": "application/json"} == headers
        assert 200 == (await receiver.handle("post", query.encode(), [(b"Host", b"x")], booked))[0]
        assert 200 == (await receiver.handle("POST", "", basic, booked))[0]
        assert 401 == (await receiver.handle("POST", "token=no", {}, booked))[0]
        assert 400 == (await receiver.handle("POST", query, {}, b"{"))[0]
        assert 413 == (await receiver.handle("POST", query, {"Content-Length": "9999999"}, b""))[0]
        status, headers, _ = await receiver.handle("GET", query, {}, b"")
        assert (405, "POST") == (status, headers["allow"])
        sandbox.inject(faults.status(500), times=3, path="/meetings")
        status, headers, _ = await receiver.handle("POST", query, {}, json.dumps(sandbox.book()).encode())
        assert (503, True) == (status, int(headers["retry-after"]) >= 1)


@pytest.mark.parametrize(
    ("query", "headers", "body", "message"),
    [
        ({"token": TOKEN}, {}, b"{}", r"^query= must be the raw query string, not dict$"),
        (f"token={TOKEN}", None, b"{}", r"^headers= must be a mapping or pairs, not NoneType$"),
        (f"token={TOKEN}", {"Authorization": "Basic eDp5"}, "{}", r"^body= must be bytes, not str$"),
    ],
)
async def test_wrong_types_without_asgi(
    lemcal: AsyncLemcal, query: Any, headers: Any, body: Any, message: str
) -> None:
    """What Lambda and its like hand over as text or as a mapping is refused, and the error holds no token."""
    receiver = WebhookReceiver(lemcal, token=TOKEN, on_meeting=ignore)
    with pytest.raises(ConfigurationError, match=message) as caught:
        await receiver.handle("POST", query, headers, body)
    # The first frame is this test's own, which holds the token.
    rendered = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    shown = repr([frame.locals for frame in rendered.stack if "/lemcal_async/" in frame.filename])
    assert "Secret" in shown
    assert TOKEN not in shown
    assert "eDp5" not in shown


async def test_a_tenant_without_asgi(sandbox: Sandbox, lemcal: AsyncLemcal) -> None:
    """The caller says which name the path has."""

    async def find(name: str) -> Tenant | None:
        return Tenant(lemcal, TOKEN) if name == "acme" else None

    receiver = WebhookReceiver(accounts=find, on_meeting=ignore)
    booked = json.dumps(sandbox.book()).encode()
    async with lemcal:
        assert 200 == (await receiver.handle("POST", f"token={TOKEN}", {}, booked, tenant="acme"))[0]
        assert 401 == (await receiver.handle("POST", f"token={TOKEN}", {}, booked))[0]


async def test_a_slow_plain_handler_without_asgi(sandbox: Sandbox, lemcal: AsyncLemcal) -> None:
    """Its thread is left behind when the time is up, and the caller gets its answer."""
    proceed = threading.Event()
    receiver = WebhookReceiver(
        lemcal, token=TOKEN, on_meeting=lambda _: proceed.wait(20), handler_timeout=0.05
    )
    async with lemcal:
        booked = json.dumps(sandbox.book()).encode()
        status, _, body = await receiver.handle("POST", f"token={TOKEN}", {}, booked)
    proceed.set()
    assert (503, {"status": "failed"}) == (status, json.loads(body))


@pytest.mark.parametrize(("token", "warned"), [("a&b", True), ("a b", True), ("ü", True), ("a+b/c=", False)])
async def test_a_token_that_needs_quoting(
    lemcal: AsyncLemcal, token: str, caplog: pytest.LogCaptureFixture, *, warned: bool
) -> None:
    """It works, if the URL is built as it must be: the log says how, and not which token it is."""
    WebhookReceiver(lemcal, token=token, on_meeting=ignore)
    assert warned == ("hook_url(url, token)" in caplog.text)
    assert token not in caplog.text
