"""The complete receiver: tokens and tenants, wake-ups, load, logs, ASGI, and use without ASGI."""

import base64
import json
import logging
import re
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
from lemcal_async.webhooks import Tenant, WebhookReceiver, _lookup, _receiver, _tenants, hook_url

from .conftest import ONCE, TOKEN, running_receiver
from .posting import post

pytestmark = pytest.mark.anyio

NEW_TOKEN = "wh-token-new-9Kq"


async def ignore(*_: object) -> None:
    """Accept any meeting."""


async def deliver_to(app: App, path: str, body: object, *, token: str = TOKEN) -> tuple[int, str]:
    """Deliver to an app without a socket; return status code and outcome."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as sender:
        response = await sender.post(path, params={"token": token}, json=body)
        return response.status_code, response.json()["status"]


# ------------------------------------------------------------------ tokens and tenants


async def test_several_tokens(sandbox: Sandbox, lemcal: AsyncLemcal) -> None:
    """During a rotation, both tokens are accepted."""
    receiver = WebhookReceiver(lemcal, token=[TOKEN, NEW_TOKEN], on_meeting=ignore)
    async with lemcal:
        assert (200, "handled") == await deliver_to(receiver, "/", sandbox.book())
        assert (200, "handled") == await deliver_to(receiver, "/", sandbox.book(), token=NEW_TOKEN)
        assert (401, "rejected") == await deliver_to(receiver, "/", sandbox.book(), token="other")


@pytest.mark.parametrize("query", ["", "?token={0}-mistyped", "?token={0}&token={0}"])
async def test_rejected_tokens_are_logged(
    sandbox: Sandbox, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, query: str
) -> None:
    """A warning, at most once a minute, counts the rejected deliveries and shows no token."""
    now = 0.0
    monkeypatch.setattr(_receiver, "monotonic", lambda: now)
    async with running_receiver(sandbox) as harness:
        for seconds in (0, 59, 59.9, 60, 61):
            now = float(seconds)
            reply = await harness.post(harness.book(), query=query.format(TOKEN))
            assert (401, "rejected") == reply.summary
        await harness.post(harness.book())
    assert ["warning: 1", "warning: 3"] == re.findall(
        r"rejected with 401 since the last (warning: \d)", caplog.text
    )
    assert "the hook's URL is hook_url(url, token)" in caplog.text
    assert TOKEN not in caplog.text


async def test_rejected_bodies_are_logged(sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """A body that cannot be used is logged, even after a wrong token; another method is not."""
    async with running_receiver(sandbox) as harness:
        for body, token in ((b"{}", "other"), (b"{}", TOKEN), (b"[]", TOKEN)):
            await harness.post(body, token=token)
        await harness.post(b"{}", method="PUT")
    assert ["401", "400"] == re.findall(r"rejected with (\d+) since the last warning: 1; ", caplog.text)
    assert "the body has no valid _id; if lemcal sent them, bookings are being lost" in caplog.text


async def test_accounts_by_token(sandbox: Sandbox) -> None:
    """The token identifies the account; the handler receives its client."""
    got: list[tuple[str, str]] = []

    async def keep(meeting: Meeting, lemcal: AsyncLemcal) -> None:
        got.append((meeting.id, lemcal.user_id))

    async with sandbox.client() as first:
        other = sandbox.accounts[1]
        second = first.for_account(other.user_id, other.api_key)
        accounts = {"token-1": first, "token-1b": first, "token-2": second}
        receiver = WebhookReceiver(accounts=accounts, on_meeting=keep, list_lag=0)
        one, two = sandbox.book(), sandbox.book(account=1)
        assert (200, "handled") == await deliver_to(receiver, "/", one, token="token-1b")
        assert (200, "handled") == await deliver_to(receiver, "/", two, token="token-2")
        assert (200, "ignored") == await deliver_to(receiver, "/", two, token="token-1")
        assert (401, "rejected") == await deliver_to(receiver, "/", one, token="token-3")
    assert [(one["_id"], sandbox.user_id), (two["_id"], other.user_id)] == got


@pytest.mark.parametrize("mounting", ["bare", "mount", "route"])
async def test_accounts_by_path(sandbox: Sandbox, mounting: str) -> None:
    """The path identifies the account, and the token must belong to it."""
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
        assert (200, "handled") == await deliver_to(app, f"{base}/acme{tail}", one, token="token-1")
        assert (200, "handled") == await deliver_to(app, f"{base}/beta{tail}", two, token="token-2b")
        assert (200, "ignored") == await deliver_to(app, f"{base}/acme{tail}", two, token="token-1")
        assert (401, "rejected") == await deliver_to(app, f"{base}/acme{tail}", two, token="token-2")
        assert (401, "rejected") == await deliver_to(app, f"{base}/gamma{tail}", two, token="token-2")
    assert ["acme", "beta", "acme", "acme", "gamma"] == asked
    assert [sandbox.user_id, other.user_id] == got


async def test_failing_account_lookup(caplog: pytest.LogCaptureFixture) -> None:
    """If the account cannot be looked up, the sender is asked to retry."""

    async def find(name: str) -> Tenant | None:
        raise OSError("postgresql://me:secret@host is down")

    receiver = WebhookReceiver(accounts=find, on_meeting=ignore)
    assert (503, "unavailable") == await deliver_to(receiver, "/acme", {"_id": "mee_1"})
    assert "finding the account of a delivery failed" in caplog.text
    assert "OSError: postgresql" not in caplog.text


async def test_wrong_key_shares_no_list_call(sandbox: Sandbox) -> None:
    """A tenant with a made-up key for another account cannot use the owner's list calls."""
    sandbox.inject(faults.slow(0.3), path="/meetings")
    async with sandbox.client(retry=ONCE) as owner:
        thief = owner.for_account(owner.user_id, "made-up")
        receiver = WebhookReceiver(accounts={"t-1": owner, "t-2": thief}, on_meeting=ignore)
        booked = sandbox.book()
        outcomes: dict[str, tuple[int, str]] = {}

        async def deliver(token: str) -> None:
            outcomes[token] = await deliver_to(receiver, "/", booked, token=token)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(deliver, "t-1")
            with anyio.fail_after(30):
                while not sandbox.requests:  # noqa: ASYNC110  # the owner's list call is under way
                    await anyio.sleep(0.005)
            tasks.start_soon(deliver, "t-2")
        assert {"t-1": (200, "handled"), "t-2": (503, "unavailable")} == outcomes
        assert (503, "unavailable") == await deliver_to(receiver, "/", booked, token="t-2")


# ------------------------------------------------------------------ wake-ups


class RecordingWaker:
    """Records wake-ups."""

    def __init__(self, *, broken: bool = False) -> None:
        self.woken: list[str | None] = []
        self._broken = broken

    def wake(self, user_id: str | None = None) -> None:
        """Record the account."""
        if self._broken:
            raise OSError
        self.woken.append(user_id)


async def test_delivery_wakes(sandbox: Sandbox) -> None:
    """Without a handler, any delivery wakes and nothing is fetched; with one, only verified ones do."""
    waker = RecordingWaker()
    async with running_receiver(sandbox, wake=waker, on_meeting=None) as harness:
        assert (200, "handled") == (await harness.post({"_id": "mee_forged"})).summary
        assert ([sandbox.user_id], []) == (waker.woken, harness.lists())
    async with running_receiver(sandbox, wake=waker) as harness:
        assert (200, "ignored") == (await harness.post({"_id": "mee_forged"})).summary
        assert 1 == len(waker.woken)
        assert (200, "handled") == (await harness.post(harness.book())).summary
        assert (2, 1) == (len(waker.woken), len(harness.handled))


@pytest.mark.parametrize("handler", ["with a handler", "alone"])
async def test_wake_ups_are_shared(sandbox: Sandbox, handler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Concurrent deliveries share a wake-up that begins after they arrive."""
    monkeypatch.undo()
    waker = RecordingWaker()
    options: dict[str, Any] = {"on_meeting": None} if handler == "alone" else {}
    async with running_receiver(sandbox, wake=waker, **options) as harness:
        booked = harness.book()
        responses = await harness.post_concurrently([booked] * 100)
        assert {200} == {response.status_code for response in responses}
        assert 1 <= len(waker.woken) <= 3


async def test_async_wake(sandbox: Sandbox) -> None:
    """An async wake is awaited before the response, as a fleet stores the wake-up."""
    stored: list[str | None] = []

    class Waker:
        async def wake(self, user_id: str | None = None) -> None:
            await anyio.lowlevel.checkpoint()
            stored.append(user_id)

    async with running_receiver(sandbox, wake=Waker(), on_meeting=None) as harness:
        assert (200, "handled") == (await harness.post({"_id": "mee_1"})).summary
    assert [sandbox.user_id] == stored


async def test_failing_wake(sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """If the wake-up fails, the sender is asked to retry."""
    async with running_receiver(sandbox, wake=RecordingWaker(broken=True)) as harness:
        assert (503, "failed") == (await harness.post(harness.book())).summary
        assert [] == harness.handled
    assert f"account {sandbox.user_id}: wake= failed" in caplog.text
    assert "OSError" in caplog.text


async def test_hanging_wake(sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """The sender is asked to retry within the deadline, and the log says why."""

    class Waker:
        async def wake(self, user_id: str | None = None) -> None:
            await anyio.sleep_forever()

    async with running_receiver(sandbox, wake=Waker(), on_meeting=None, deadline=0.3) as harness:
        with anyio.fail_after(10):
            assert (503, "failed") == (await harness.post({"_id": "mee_1"})).summary
    assert f"account {sandbox.user_id}: wake= failed" in caplog.text
    assert "TimeoutError" in caplog.text


# ------------------------------------------------------------------ load


async def test_two_hundred_concurrent_deliveries(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost one list call per 0.75 s and a last one, whatever their number."""
    monkeypatch.undo()
    types = [entry["_id"] for entry in sandbox.meeting_types()]
    async with running_receiver(sandbox) as harness:
        booked = [harness.book(meeting_type_id=types[number % len(types)]) for number in range(200)]
        began = anyio.current_time()
        responses = await harness.post_concurrently(booked)
        gaps = (anyio.current_time() - began) / _lookup.GAP
        assert {(200, "handled")} == {response.summary for response in responses}
        assert {meeting["_id"] for meeting in booked} == set(harness.handled_ids)
        assert 200 == len(harness.handled)
        assert len(harness.lists()) <= gaps + 2


async def test_list_call_is_narrowed_to_type(sandbox: Sandbox) -> None:
    """Only the list of the meeting's type is fetched; a forged type costs one more list call."""
    async with running_receiver(sandbox) as harness:
        booked = harness.book()
        await harness.post(booked)
        await harness.post({**harness.book(), "meetingTypeId": "met_other"})
        assert [f"meetingTypeId={booked['meetingTypeId']}", "meetingTypeId=met_other", ""] == harness.lists()


async def test_restart_with_shared_dedup(sandbox: Sandbox) -> None:
    """A meeting that got a 200 is not handled again by the next receiver with the same deduplication."""
    from lemcal_async.webhooks import InMemoryDedup

    dedup = InMemoryDedup()
    async with running_receiver(sandbox, dedup=dedup) as before:
        booked = before.book()
        assert (200, "handled") == (await before.post(booked)).summary
    async with running_receiver(sandbox, dedup=dedup) as after:
        assert (200, "repeated") == (await after.post(booked)).summary
        assert [] == after.handled


# ------------------------------------------------------------------ secrets, errors and events


async def test_token_is_never_logged(
    sandbox: Sandbox, caplog: pytest.LogCaptureFixture, anyio_backend: str
) -> None:
    """The token is in neither the receiver's log nor the server's, which logs the whole URL."""
    import uvicorn.logging  # noqa: F401 - its loggers

    async def fail(meeting: Meeting) -> None:
        raise ValueError(TOKEN)

    with caplog.at_level(logging.DEBUG):
        async with running_receiver(sandbox, handler=fail) as harness:
            await harness.post(harness.book())
            await harness.post({"_id": "mee_1"})
            await harness.post({"_id": "mee_1"}, method="GET")
            await harness.post(b"", token=f"{TOKEN}-mistyped")
            assert TOKEN not in repr(harness.receiver)
            assert TOKEN not in repr(vars(harness.receiver))
            private = [meeting.guest.email for meeting in harness.handled if meeting.guest]
    shown = [record.getMessage() for record in caplog.records if record.name != "httpcore.http11"]
    if anyio_backend == "asyncio":  # hypercorn's access log is off by default
        assert 4 == len([line for line in shown if "/hook?token=hidden" in line])
    assert shown
    assert private
    for line in shown:
        assert TOKEN not in line
        assert not [email for email in private if email and email in line]


async def test_tracebacks(sandbox: Sandbox, lemcal: AsyncLemcal) -> None:
    """Tracebacks with local variables show no token."""

    class Stop(BaseException):
        """An exception that the receiver does not handle."""

    async def stop(meeting: Meeting) -> None:
        raise Stop

    receiver = WebhookReceiver(lemcal, token=TOKEN, on_meeting=stop)
    async with lemcal:
        with pytest.raises(BaseException) as caught:
            await deliver_to(receiver, "/", sandbox.book())
    rendered = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    shown = [
        frame.locals
        for frame in rendered.stack
        if "/webhooks/" in frame.filename and "/tests/" not in frame.filename
    ]
    assert len(shown) > 2
    assert TOKEN not in repr(shown)


def invalid_arguments(lemcal: AsyncLemcal) -> dict[str, Callable[[], object]]:
    """Return calls with invalid arguments, each with a token, by a part of the message."""
    create: Any = WebhookReceiver
    one = {"token": TOKEN, "on_meeting": ignore}
    return {
        "takes either": lambda: create(on_meeting=ignore),
        "takes either a client": lambda: create(lemcal, on_meeting=ignore),
        "either a client and": lambda: create(token=TOKEN, on_meeting=ignore),
        "a client and token=": lambda: create(lemcal, **one, accounts={TOKEN: lemcal}),
        "must be an AsyncLemcal, not str": lambda: create(TOKEN, **one),
        "must be one nonempty string": lambda: create(lemcal, token="", on_meeting=ignore),
        "or several": lambda: create(lemcal, token=[], on_meeting=ignore),
        "token= must": lambda: create(lemcal, token=[TOKEN, 5], on_meeting=ignore),
        "needs on_meeting=, wake= or both": lambda: create(lemcal, token=TOKEN),
        "on_meeting= must": lambda: create(lemcal, token=TOKEN, on_meeting=TOKEN),
        "wake= must": lambda: create(lemcal, **one, wake=object()),
        "dedup= must": lambda: create(lemcal, **one, dedup={}),
        "deadline=0: it must be a number of seconds": lambda: create(lemcal, **one, deadline=0),
        "deadline=inf: it must be a number of seconds": lambda: create(lemcal, **one, deadline=float("inf")),
        "handler_timeout=.*: it must be a number of seconds": lambda: create(
            lemcal, **one, handler_timeout=-1
        ),
        "list_lag=.*: it must be a number of seconds": lambda: create(lemcal, **one, list_lag=-1),
        "accounts= must map": lambda: create(accounts={TOKEN: lemcal, "": lemcal}, on_meeting=ignore),
        "map nonempty tokens": lambda: create(accounts={}, on_meeting=ignore),
        "to clients": lambda: create(accounts={TOKEN: TOKEN}, on_meeting=ignore),
        "accounts= must be a mapping": lambda: create(accounts=TOKEN, on_meeting=ignore),
        "to generate one": lambda: Tenant(lemcal, ""),
    }


async def test_invalid_arguments(lemcal: AsyncLemcal) -> None:
    """The error says what to do, and does not show the token."""
    for message, create in invalid_arguments(lemcal).items():
        with pytest.raises(ConfigurationError, match=message) as caught:
            create()
        rendered = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
        frames = [frame for frame in rendered.stack if "/lemcal_async/" in frame.filename]
        assert TOKEN not in str(caught.value)
        assert TOKEN not in repr([frame.locals for frame in frames]), message


async def test_events(sandbox: Sandbox) -> None:
    """Each delivery emits an event with its outcome."""
    received: list[events.Event] = []
    unsubscribe = events.subscribe(received.append)
    try:
        async with running_receiver(sandbox) as harness:
            booked = harness.book()
            for body in (booked, booked, {"_id": "mee_forged"}, b""):
                await harness.post(body)
    finally:
        unsubscribe()
    handled = [event for event in received if isinstance(event, events.WebhookHandled)]
    expected = [("handled", 200), ("repeated", 200), ("ignored", 200), ("rejected", 400)]
    assert expected == [(event.outcome, event.status_code) for event in handled]
    assert all(0 <= event.seconds < 10 for event in handled)


# ------------------------------------------------------------------ ASGI


async def test_websocket_is_closed(lemcal: AsyncLemcal) -> None:
    """The receiver closes WebSockets."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    receiver = WebhookReceiver(lemcal, token=TOKEN, on_meeting=ignore)
    await receiver({"type": "websocket", "path": "/"}, receive, send)
    assert [{"type": "websocket.close"}] == sent
    await lemcal.aclose()


async def test_disconnected_sender(lemcal: AsyncLemcal) -> None:
    """A server may report the disconnect as an OSError, which ends the response and raises nothing."""
    sent: list[str] = []

    async def send(message: Any) -> None:
        sent.append(message["type"])
        raise BrokenPipeError

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    receiver = WebhookReceiver(lemcal, token=TOKEN, on_meeting=ignore)
    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": []}
    await receiver(scope, receive, send)
    assert ["http.response.start"] == sent
    await lemcal.aclose()


async def test_http_2_has_no_connection_header(lemcal: AsyncLemcal) -> None:
    """HTTP/2 does not close a connection because of an unread body."""
    heads: list[dict[str, str]] = []

    async def send(message: Any) -> None:
        if "headers" in message:
            heads.append({name.decode(): value.decode() for name, value in message["headers"]})

    async def receive() -> Any:
        raise AssertionError("the body must not be read")

    receiver = WebhookReceiver(lemcal, token=TOKEN, on_meeting=ignore)
    for version in ("1.1", "2"):
        scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []}
        await receiver({**scope, "http_version": version}, receive, send)
    assert ["close", None] == [head.get("connection") for head in heads]
    await lemcal.aclose()


async def test_restarted_servers(sandbox: Sandbox) -> None:
    """A receiver works in one server after another."""
    async with sandbox.client() as lemcal:
        receiver = WebhookReceiver(lemcal, token=TOKEN, on_meeting=ignore)
        for _ in range(2):
            body = b'{"_id": "%b"}' % sandbox.book()["_id"].encode()
            async with serving(receiver) as server:
                assert (200, "handled") == (await post(server.port, body, query=f"?token={TOKEN}")).summary


@pytest.mark.parametrize("backends", [["asyncio", "trio", "asyncio"], ["trio", "asyncio", "trio"]])
@pytest.mark.parametrize("anyio_backend", ["none"])
def test_successive_event_loops(anyio_backend: str, backends: list[str]) -> None:
    """A receiver created outside of an event loop works in one loop after another."""
    rows = [{"_id": f"mee_{number}"} for number in range(3)]
    wire = httpx.MockTransport(lambda _: httpx.Response(200, json=rows))
    lemcal = AsyncLemcal("usr_1", "k1", transport=wire, limiter=Unlimited())
    handled: list[str] = []
    receiver = WebhookReceiver(lemcal, token=TOKEN, on_meeting=lambda meeting: handled.append(meeting.id))
    for row, backend in zip(rows, backends, strict=True):
        assert (200, "handled") == anyio.run(deliver_to, receiver, "/", row, backend=backend)
    assert [row["_id"] for row in rows] == handled


# ------------------------------------------------------------------ without ASGI


async def test_handle_without_asgi(sandbox: Sandbox, lemcal: AsyncLemcal) -> None:
    """``handle`` returns the same responses, for Lambda, aiohttp.web, Django and others."""
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
    """Wrong types, such as Lambda's text bodies, are rejected, and the error contains no token."""
    receiver = WebhookReceiver(lemcal, token=TOKEN, on_meeting=ignore)
    with pytest.raises(ConfigurationError, match=message) as caught:
        await receiver.handle("POST", query, headers, body)
    # The first frame is this test's own, which contains the token.
    rendered = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    shown = repr([frame.locals for frame in rendered.stack if "/lemcal_async/" in frame.filename])
    assert "Secret" in shown
    assert TOKEN not in shown
    assert "eDp5" not in shown


async def test_tenant_without_asgi(sandbox: Sandbox, lemcal: AsyncLemcal) -> None:
    """The caller passes the name from the path."""

    async def find(name: str) -> Tenant | None:
        return Tenant(lemcal, TOKEN) if name == "acme" else None

    receiver = WebhookReceiver(accounts=find, on_meeting=ignore)
    booked = json.dumps(sandbox.book()).encode()
    async with lemcal:
        assert 200 == (await receiver.handle("POST", f"token={TOKEN}", {}, booked, tenant="acme"))[0]
        assert 401 == (await receiver.handle("POST", f"token={TOKEN}", {}, booked))[0]


async def test_timeout_of_plain_handler_without_asgi(sandbox: Sandbox, lemcal: AsyncLemcal) -> None:
    """On a timeout, the thread is abandoned, and the caller gets a response."""
    finish = threading.Event()
    receiver = WebhookReceiver(
        lemcal, token=TOKEN, on_meeting=lambda _: finish.wait(20), handler_timeout=0.05
    )
    async with lemcal:
        booked = json.dumps(sandbox.book()).encode()
        status, _, body = await receiver.handle("POST", f"token={TOKEN}", {}, booked)
    finish.set()
    assert (503, {"status": "failed"}) == (status, json.loads(body))


@pytest.mark.parametrize(("token", "warned"), [("a&b", True), ("a b", True), ("ü", True), ("a+b/c=", False)])
async def test_token_that_needs_quoting(
    lemcal: AsyncLemcal, token: str, caplog: pytest.LogCaptureFixture, *, warned: bool
) -> None:
    """A warning, once per process, says how to quote the token, without showing it."""
    _tenants._warn_of_quoting.cache_clear()
    WebhookReceiver(lemcal, token=token, on_meeting=ignore)
    Tenant(lemcal, token)
    assert int(warned) == caplog.text.count("which lemcal_async.webhooks.hook_url(url, token) does")
    assert token not in caplog.text
