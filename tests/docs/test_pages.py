"""Every Python block in the README and the documentation runs and does what its page says.

Each test is named after its page, and calls the functions that the page defines.
"""

import base64
import gc
import logging
import sqlite3
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, tzinfo
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.to_thread
import httpx
import pytest
from redis_server import RedisServer
from starlette.applications import Starlette
from starlette.routing import Route

from lemcal_async import AsyncLemcal, Hook, errors, events, ratelimit
from lemcal_async.ratelimit import RedisRateLimiter
from lemcal_async.sandbox import Sandbox, faults
from lemcal_async.sync import Change, MemoryStore, SQLStore, Wake, sync_meetings, watch
from lemcal_async.webhooks import Tenant

from .conftest import PAGES, ROOT, Names, Read, blocks

pytestmark = pytest.mark.anyio

Output = pytest.CaptureFixture[str]

TOKEN = "wh-token-8Lp3-quiet"


@pytest.fixture(autouse=True)
def webhooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the environment variables that the services on the pages read."""
    monkeypatch.setenv("WEBHOOK_TOKEN", TOKEN)
    monkeypatch.setenv("PUBLIC_URL", "https://service.example")


def app_client(app: Any) -> httpx.AsyncClient:
    """Return an HTTP client for an ASGI app in this process."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service")


def test_every_page_has_a_test() -> None:
    """Every page with a Python block has a test in this module."""
    names = [page.stem.lower().replace("-", "_") for page in PAGES if blocks(page, "python")]
    assert [] == [name for name in names if f"test_{name}" not in globals()]
    assert "how_it_works" in names


def booked(sandbox: Sandbox) -> list[dict[str, Any]]:
    """Return the meetings that are not canceled."""
    return [meeting for meeting in sandbox.meetings() if not meeting.get("canceledAt")]


async def test_index(read: Read, service: Sandbox, capsys: Output) -> None:
    """The first program lists the booked meetings, the sandbox program works, and all calls succeed."""
    names = await read("docs/index.md")
    assert len(booked(service)) == len(capsys.readouterr().out.splitlines())
    await names["try_it"]()
    assert f"{names['user'].email} 12\n" == capsys.readouterr().out
    assert (12, 4) == (len(names["meetings"]), len(names["types"]))
    assert names["meetings"] == names["response"].data
    assert isinstance(names["hook"], Hook)
    assert [] == service.hooks()


async def test_how_it_works(read: Read, service: Sandbox) -> None:
    """The layers work in a plain httpx client, and retry a rejected request."""
    names = await read("docs/how-it-works.md")
    service.inject(faults.too_many_requests(retry_after="0.05"))
    async with names["client"] as client:
        response = await client.get(f"{service.base_url}/me", auth=(service.user_id, service.api_key))
    assert 200 == response.status_code


async def test_transports(read: Read, service: Sandbox, anyio_backend: str) -> None:
    """Each transport can replace the default one, and the layers work in an httpx2 client."""
    names = await read("docs/transports.md")
    assert service.user_id == (await names["with_its_transport"]()).id
    if anyio_backend == "asyncio":  # aiohttp requires asyncio
        assert service.user_id == (await names["who_am_i"]()).id
    async with names["client"] as client:
        response = await client.get(f"{service.base_url}/me", auth=(service.user_id, service.api_key))
    assert (200, "httpx2") == (response.status_code, type(response).__module__.partition(".")[0])


async def test_rate_limiter(read: Read, capsys: Output) -> None:
    """The limits can be configured as shown, and the listener reports only long waits."""
    names = await read("docs/rate-limiter.md")
    assert "queued=0" in capsys.readouterr().out
    for waited in (1.0, 7.25):
        names["listen"](events.Granted("a key", "bulk", waited))
    assert "a bulk call waited 7.2 s for its slot\n" == capsys.readouterr().out


async def test_many_accounts(read: Read, service: Sandbox, capsys: Output) -> None:
    """Meetings are counted for all accounts, a failing account is reported, and keys are looked up again."""
    names = await read("docs/many-accounts.md", vault={"acme": service.api_key})
    keys = {service.user_id: service.api_key, "usr_unknown": "wrong"}
    assert {service.user_id: 12} == await names["count_all"](names["lemcal"], keys)
    assert capsys.readouterr().out.startswith("usr_unknown GET /meetings: 401")
    with pytest.raises(errors.AuthenticationError):  # the sandbox has no account usr_acme
        await names["account"].me()


async def test_testing(read: Read, lemcal_sandbox: Sandbox) -> None:
    """The tests shown on the page pass."""
    names = await read("docs/testing.md")
    await names["test_booking"](lemcal_sandbox)
    await names["test_bad_day"](lemcal_sandbox)
    await names["test_who_am_i"]()
    assert 13 == len(lemcal_sandbox.meetings())


async def test_deadlines(read: Read, service: Sandbox, capsys: Output) -> None:
    """Meetings arrive in time; a long queue and a rejection by the server are distinguished."""
    names = await read("docs/deadlines.md")
    assert capsys.readouterr().out.startswith("20 requests can go now; 0 are waiting")
    meetings_or_none, lemcal = names["meetings_or_none"], names["lemcal"]
    assert 12 == len(await meetings_or_none(lemcal))
    service.inject(faults.too_many_requests(retry_after="30"))
    assert None is await meetings_or_none(lemcal)
    assert capsys.readouterr().out.startswith("busy; retry in ")
    async with service.client(limiter=names["Unlimited"]()) as other:
        service.inject(faults.too_many_requests(retry_after="86400"))
        assert None is await meetings_or_none(other)
    assert "refused by lemcal; retry in 86400.0\n" == capsys.readouterr().out


async def test_migrating(read: Read, service: Sandbox, capsys: Output) -> None:
    """The replacements shown on the page work."""
    meeting, type_ = service.meetings()[0], service.meeting_types()[0]
    names = await read(
        "docs/migrating.md",
        url="https://you.example/hook",
        meeting=(await service_meetings(service))[0],
        meeting_id=meeting["_id"],
        user_id=service.user_id,
        api_key=service.api_key,
        type_id=type_["_id"],
    )
    assert "@example." in names["guest"]
    assert meeting["_id"] == names["meeting"].id
    assert ["https://you.example/hook"] == [hook["targetUrl"] for hook in service.hooks()]
    assert capsys.readouterr().out.startswith("200 ")


async def service_meetings(service: Sandbox) -> list[Any]:
    """Return the account's meetings as models."""
    async with service.client() as lemcal:
        return await lemcal.meetings.list()


async def test_webhooks(read: Read, service: Sandbox, capsys: Output) -> None:
    """The receiver prints the booking, wakes the synchronization, and serves several accounts."""
    acme = SimpleNamespace(user_id=service.user_id, api_key=service.api_key, token=TOKEN)
    started: list[tuple[Any, ...]] = []
    changes: list[str] = []
    reached = {13: anyio.Event(), 14: anyio.Event()}

    async def on_change(change: Change) -> None:
        changes.append(change.kind)
        if len(changes) in reached:
            reached[len(changes)].set()

    names = await read(
        "docs/webhooks.md",
        body=b"{}",
        headers={},
        method="POST",
        query="token=guessed",
        Tenant=Tenant,
        Wake=Wake,
        acme=service.client(),
        beta=service.client(),
        on_change=on_change,
        partial=partial,
        store=MemoryStore(),
        tasks=SimpleNamespace(start_soon=lambda *call: started.append(call)),
        tenants=Tenants(acme=acme),
        token=TOKEN,
        watch=watch,
    )
    assert [f"https://you.example/hooks/lemcal?token={TOKEN}"] == [
        hook["targetUrl"] for hook in service.hooks()
    ]
    assert (401, b'{"status": "rejected", "reason": "the token is missing, wrong or repeated"}') == (
        names["status"],
        names["content"],
    )
    event = {
        "body": base64.b64encode(b"{}").decode(),
        "headers": {"content-type": "application/json"},
        "isBase64Encoded": True,
        "rawQueryString": "token=guessed",
        "requestContext": {"http": {"method": "POST"}},
    }
    response = await anyio.to_thread.run_sync(names["handler"], event, None)  # Lambda runs its own event loop
    assert (401, names["content"].decode()) == (response["statusCode"], response["body"])
    assert 400 == await anyio.to_thread.run_sync(status_on_lambda, names, event, f"token={TOKEN}")
    await anyio.to_thread.run_sync(names["runner"].close)
    booked = service.book()
    async with app_client(names["receiver"]) as sender, anyio.create_task_group() as tasks:
        tasks.start_soon(*started[0])
        await reached[13].wait()
        service.cancel(booked["_id"])
        assert {"status": "handled"} == (await sender.post(f"/?token={TOKEN}", json=booked)).json()
        await reached[14].wait()  # woken by the delivery: the next poll is 5 minutes away
        tasks.cancel_scope.cancel()
    assert ["created"] * 13 + ["canceled"] == changes
    assert "" == capsys.readouterr().out
    by_path = Starlette(routes=[Route("/hooks/{tenant}", names["app"])])  # the last receiver on the page
    async with app_client(by_path) as sender:
        assert {"status": "handled"} == (await sender.post(f"/hooks/acme?token={TOKEN}", json=booked)).json()
        assert 401 == (await sender.post(f"/hooks/nobody?token={TOKEN}", json=booked)).status_code
    assert capsys.readouterr().out.startswith(f"{service.user_id} 20")


def status_on_lambda(names: Names, event: dict[str, Any], query: str) -> int:
    """Return the status of the Lambda handler's response to a text body."""
    text = {"rawQueryString": query, "isBase64Encoded": False, "body": "[]"}
    return int(names["handler"]({**event, **text}, None)["statusCode"])


class Tenants(dict[str, SimpleNamespace]):
    """The tenants of a service, in place of its database."""

    async def get(self, name: str) -> SimpleNamespace | None:  # type: ignore[override]
        """Return a tenant, or None."""
        return super().get(name)


async def test_fastapi(read: Read, service: Sandbox) -> None:
    """The service registers its hook, receives a booking, shows a meeting, and rejects an invalid id."""
    apps: list[AsyncLemcal] = []
    names = await read("docs/fastapi.md", create_app=apps.append)
    app, booked = names["app"], service.book()
    async with app.router.lifespan_context(app), app_client(app) as browser:
        (hook,) = service.hooks()
        response = await browser.post(hook["targetUrl"].removeprefix("https://service.example"), json=booked)
        assert {"status": "handled"} == response.json()
        assert booked == (await browser.get(f"/meetings/{booked['_id']}")).json()
        assert 404 == (await browser.get("/meetings/mee_1")).status_code
        for invalid in ("a%20b", "..%5C", "a%5Cb", "mee_1%0A", "%C3%A9"):
            assert 422 == (await browser.get(f"/meetings/{invalid}")).status_code
    await names["test_meetings"](service)
    assert [service.user_id] == [client.user_id for client in apps]


async def test_observability(read: Read, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    """The listener prints failed calls, and logging is enabled."""
    monkeypatch.setattr(logging, "basicConfig", lambda: None)  # keep pytest's handlers
    names = await read("docs/observability.md")
    logging.getLogger("lemcal_async").setLevel(logging.NOTSET)
    try:
        with pytest.raises(errors.NotFoundError):
            await names["lemcal"].hooks.delete("hoo_1")
    finally:
        names["unsubscribe"]()
        names["uninstrument"]()
    assert capsys.readouterr().out.startswith("/hooks/{id} HookNotFoundError ")


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    """Start a Redis server and return its URL."""
    with RedisServer() as server:
        yield server.url


async def test_redis(
    read: Read, service: Sandbox, redis_url: str, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call uses the Redis limiter, with a local Redis server."""
    monkeypatch.setattr(ratelimit, "RedisRateLimiter", lambda _: RedisRateLimiter(redis_url))
    await (await read("docs/redis.md"))["main"]()
    assert f"User(id='{service.user_id}'" in capsys.readouterr().out


async def test_sync(read: Read, service: Sandbox, capsys: Output) -> None:
    """The program synchronizes and raises for the failing account; the CRM receives the right stages."""
    crm, wake = Crm(), Wake()
    names = await read("docs/sync.md", Wake=lambda: wake, crm=crm, store=MemoryStore(), watch=watch)
    names["accounts"] = [names["lemcal"]]
    with pytest.raises(ExceptionGroup, match=r"1 of 2 accounts failed: account usr_unknown: .*401"):
        await names["run"]({service.user_id: service.api_key, "usr_unknown": "x"})
    *changes, numbers = capsys.readouterr().out.splitlines()
    assert (12, "12 0 0 0") == (len(changes), numbers)

    async def stop(change: Change) -> None:
        await names["apply"](change)
        if len(crm.stages) == 12:
            tasks.cancel_scope.cancel()

    names["on_change"] = stop
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(names["work"])
        names["webhook_arrived"](None)
    assert {"lost": 2, "meeting booked": 10} == Counter(crm.stages.values())


class Crm:
    """A CRM that stores the stage of each meeting."""

    def __init__(self) -> None:
        self.stages: dict[str, str] = {}

    async def upsert(self, email: str, meeting_id: str, *, stage: str) -> None:
        """Store a meeting's stage under its contact's e-mail address."""
        assert "@" in email
        self.stages[meeting_id] = stage


async def test_models(read: Read, service: Sandbox) -> None:
    """Unexpected values are kept, and the route accepts and returns meetings."""
    names = await read("docs/reference/models.md")
    async with app_client(names["app"]) as client:
        response = await client.post("/briefings", json=service.meetings()[0])
    assert {"meeting": service.meetings()[0], "notes": ""} == response.json()


class LateOnMonday(datetime):
    """A fixed clock at 23:30 UTC on a Monday, when it is already Tuesday in Paris."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "LateOnMonday":
        """Return the fixed time."""
        return cls(2026, 1, 5, 23, 30, tzinfo=UTC).astimezone(tz)


async def test_data_analysis(read: Read, service: Sandbox, tmp_path: Path) -> None:
    """The analyses have the expected results for the sandbox's data."""
    async with service.client() as lemcal, SQLStore(f"sqlite:///{tmp_path}/lemcal.db") as store:
        await sync_meetings([lemcal], store)
    names = await read("docs/data-analysis.md")
    assert 12 == names["per_week"].to_numpy().sum()
    assert {0.0, 1 / 3} == set(names["lost"])
    assert [1 / 3, 1 / 3, 0.0, 0.0] == names["lost_by_type"]["lost"].to_list()
    assert 12 == len(names["frame"])
    names["datetime"] = LateOnMonday
    assert [11, 13, 15, 17] == [start.hour for start in await names["today"](names["lemcal"])]
    assert {9: 3, 11: 3, 13: 2, 15: 2, 17: 2} == names["by_hour"].to_dict()
    asked = [meeting.get("surveyAnswers") or meeting.get("questions") or [] for meeting in service.meetings()]
    assert sum(map(len, asked)) == len(names["answers"]) > 0
    # pandas and polars leave connections to the garbage collector, which causes a warning on Python 3.13.
    # Collect them here, or the warning would fail another test.
    names.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_dlt_pipelines(service: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both pipelines merge their data: moved and canceled meetings exist once, in their current state."""
    pytest.importorskip("dlt", reason="dlt does not support this Python version yet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LEMCAL_BASE_URL", service.base_url)
    monkeypatch.setenv("DLT_DATA_DIR", str(tmp_path / "dlt"))
    monkeypatch.setenv("RUNTIME__DLTHUB_TELEMETRY", "false")
    programs = ("pipeline.py", "incremental.py")
    for name in programs:
        (block,) = blocks(ROOT / "docs" / "data-analysis.md", f'python title="{name}"')
        Path(name).write_text(block.parsed)

    async def synchronize() -> None:
        async with service.client() as lemcal, SQLStore("sqlite:///lemcal.db") as store:
            await sync_meetings([lemcal], store)

    def load() -> None:
        anyio.run(synchronize)
        both = "import runpy, sys; [runpy.run_path(name) for name in sys.argv[1:]]"
        # In a separate process, because dlt leaks threads and connections and causes warnings.
        command = [sys.executable, "-W", "ignore", "-c", both, *programs]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=100)

    load()
    canceled = service.cancel(service.meetings()[0])["_id"]
    service.book()
    load()
    with closing(sqlite3.connect("warehouse.db")) as warehouse:
        loaded = dict(warehouse.execute("SELECT _id, canceled_at FROM meetings").fetchall())
        statuses = dict(warehouse.execute("SELECT meeting_id, status FROM synced_meetings").fetchall())
        (attendees,) = warehouse.execute("SELECT count(*) FROM meetings__attendees").fetchone()
    expected = {meeting["_id"] for meeting in service.meetings()}
    assert 13 == len(expected)
    assert expected == set(loaded) == set(statuses)
    assert loaded[canceled] is not None
    assert "canceled" == statuses[canceled]
    assert sum(len(meeting["attendees"]) for meeting in service.meetings()) == attendees


async def test_fleet(
    read: Read, service: Sandbox, capsys: Output, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A worker prints the changes, and a delivery is acknowledged once it is stored."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'fleet.db'}")
    monkeypatch.setenv("REDIS_URL", "memory://")
    monkeypatch.setenv("LEMCAL_BASE_URL", service.base_url)
    keys = {service.user_id: service.api_key}
    statuses: list[int] = []

    class Vault:
        async def get(self, user_id: str) -> str | None:
            return keys.get(user_id)

    async def run_server(receiver: Any) -> None:
        async with app_client(receiver) as sender:
            statuses.append((await sender.post(f"/?token={TOKEN}", json=service.book())).status_code)

    names = await read("docs/fleet.md", vault=Vault(), run_server=run_server)
    fleet = names["fleet"]
    await fleet.add([service.user_id])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fleet.run)
        async with service.client() as lemcal:
            await names["serve"](lemcal, TOKEN)
        with anyio.fail_after(30):
            printed: list[str] = []
            while len(printed) < 13:
                await anyio.sleep(0.02)
                printed += capsys.readouterr().out.splitlines()
        tasks.cancel_scope.cancel()
    assert [200] == statuses
    assert {"created"} == {line.split()[0] for line in printed}


def test_faq(service: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """The synchronous program works, with credentials from the environment."""
    monkeypatch.setenv("LEMCAL_USER_ID", service.user_id)
    monkeypatch.setenv("LEMCAL_API_KEY", service.api_key)
    (block,) = blocks(ROOT / "docs" / "faq.md", "python")
    names: dict[str, Any] = {"AsyncLemcal": partial(AsyncLemcal, base_url=service.base_url)}
    program = str(block.parsed).replace("from lemcal_async import AsyncLemcal\n", "")
    exec(program, names)
    assert [row["_id"] for row in service.meetings()] == [meeting.id for meeting in names["meetings"]]


async def test_readme(read: Read, service: Sandbox, capsys: Output) -> None:
    """The first program lists the booked meetings, and the other blocks work as described."""
    names = await read("README.md", TOKEN=TOKEN)
    assert len(booked(service)) == len(capsys.readouterr().out.splitlines())
    async with service.client() as lemcal:
        await names["synchronize"](lemcal)
        assert 12 == await names["count"](lemcal, service.user_id, service.api_key)
    assert ["created"] * 12 == [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    app = names["app"]
    async with app.router.lifespan_context(app), app_client(app) as sender:
        response = await sender.post(f"/webhooks/lemcal?token={TOKEN}", json=service.book())
    assert {"status": "handled"} == response.json()
    assert capsys.readouterr().out.startswith("booked: 20")
    await names["test_booking"](service)
