"""Concurrent lookups share a list call, and only use calls that began after them."""

from typing import Any

import anyio
import httpx
import pytest

from lemcal_async import AsyncLemcal, Meeting
from lemcal_async.ratelimit import Unlimited
from lemcal_async.webhooks import _lookup
from lemcal_async.webhooks._http import MeetingRef
from lemcal_async.webhooks._lookup import LookupResult, Lookups, Missing, Unavailable

pytestmark = pytest.mark.anyio


class GatedTransport(httpx.AsyncBaseTransport):
    """Responds to a list call when released, with the meetings that existed when the call began."""

    def __init__(self) -> None:
        self.meetings: list[dict[str, Any]] = []
        self.queries: list[str] = []
        self.open = False
        self.gates: list[anyio.Event] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Respond later, with the meetings of now."""
        self.queries.append(request.url.query.decode())
        rows = [*self.meetings]
        if not self.open:
            self.gates.append(anyio.Event())
            await self.gates[-1].wait()
        return httpx.Response(200, json=rows)

    def client(self) -> AsyncLemcal:
        """Return a client that uses this transport."""
        return AsyncLemcal("usr_1", "k1", transport=self, limiter=Unlimited())


class Client:
    """Starts lookups as tasks and collects their results."""

    def __init__(self, transport: GatedTransport, tasks: Any) -> None:
        self.lookups = Lookups()
        self.lemcal = transport.client()
        self.tasks = tasks
        self.results: dict[str, LookupResult] = {}

    async def look_up(
        self, meeting_id: str, meeting_type_id: str | None = None, *, seconds: float = 30
    ) -> None:
        """Start a lookup, and return once it waits."""
        await self.tasks.start(self._look_up, meeting_id, meeting_type_id, seconds)
        await anyio.wait_all_tasks_blocked()

    async def _look_up(
        self, meeting_id: str, type_id: str | None, seconds: float, *, task_status: Any
    ) -> None:
        task_status.started()
        until = anyio.current_time() + seconds
        self.results[meeting_id] = await self.lookups.find(
            self.lemcal, MeetingRef(meeting_id, type_id), until, None
        )


@pytest.fixture(autouse=True)
def no_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow list calls without a gap."""
    monkeypatch.setattr(_lookup, "GAP", 0.0)


async def release(transport: GatedTransport) -> None:
    """Release the last list call, and let all tasks react."""
    transport.gates[-1].set()
    await anyio.wait_all_tasks_blocked()


async def test_lookups_share_the_next_call() -> None:
    """Fifty lookups during a list call share the next call, and do not use the current one."""
    transport = GatedTransport()
    async with anyio.create_task_group() as tasks:
        client = Client(transport, tasks)
        await client.look_up("mee_0")
        transport.meetings = [{"_id": f"mee_{number}"} for number in range(51)]
        for number in range(1, 51):
            await client.look_up(f"mee_{number}")
        assert (1, {}) == (len(transport.queries), client.results)
        await release(transport)
        assert {"mee_0": Missing()} == client.results  # it did not exist when the list began
        assert 2 == len(transport.queries)
        await release(transport)
    found = {result.id for result in client.results.values() if isinstance(result, Meeting)}
    assert {f"mee_{number}" for number in range(1, 51)} == found
    assert 2 == len(transport.queries)


async def test_list_is_narrowed_to_common_type() -> None:
    """If all lookups name one type, only its list is fetched; otherwise, the whole list."""
    transport = GatedTransport()
    async with anyio.create_task_group() as tasks:
        client = Client(transport, tasks)
        await client.look_up("mee_1", "met_1")
        await client.look_up("mee_2", "met_2")
        await client.look_up("mee_3", "met_2")
        await release(transport)
        await client.look_up("mee_4", "met_1")
        await client.look_up("mee_5", "met_2")
        await release(transport)
        await client.look_up("mee_6", "met_1")
        await client.look_up("mee_7")
        await release(transport)
        await release(transport)
    assert ["meetingTypeId=met_1", "meetingTypeId=met_2", "", ""] == transport.queries


async def test_canceled_caller() -> None:
    """If the lookup that makes the call is canceled, another one makes it for the rest."""
    transport = GatedTransport()
    transport.meetings = [{"_id": "mee_2"}, {"_id": "mee_3"}]
    async with anyio.create_task_group() as tasks:
        first, others = Client(transport, tasks), Client(transport, tasks)
        others.lookups = first.lookups
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as doomed:
                first.tasks = doomed
                await first.look_up("mee_1")
                await others.look_up("mee_2")
                await others.look_up("mee_3")
                scope.cancel()
        await anyio.wait_all_tasks_blocked()
        assert 2 == len(transport.queries)
        await release(transport)
    assert {} == first.results
    assert {"mee_2", "mee_3"} == {
        result.id for result in others.results.values() if isinstance(result, Meeting)
    }


async def test_canceled_shared_call_is_repeated() -> None:
    """If a shared call is canceled, the other lookups are repeated."""
    transport = GatedTransport()
    transport.meetings = [{"_id": "mee_2"}]
    async with anyio.create_task_group() as tasks:
        others, caller = Client(transport, tasks), Client(transport, tasks)
        caller.lookups = others.lookups
        await others.look_up("mee_1")
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as doomed:
                caller.tasks = doomed
                await others.look_up("mee_2", seconds=5)
                await caller.look_up("mee_3")  # the last lookup makes the call for both
                await release(transport)
                assert 2 == len(transport.queries)
                scope.cancel()
        await anyio.wait_all_tasks_blocked()
        assert 3 == len(transport.queries)
        await release(transport)
    assert ({}, Meeting("mee_2")) == (caller.results, others.results["mee_2"])


async def test_canceled_waiter() -> None:
    """Canceling a waiting lookup does not affect others, even if it would have made the next call."""
    transport = GatedTransport()
    async with anyio.create_task_group() as tasks:
        client, other = Client(transport, tasks), Client(transport, tasks)
        other.lookups = client.lookups
        await client.look_up("mee_1")
        await client.look_up("mee_2")
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as doomed:
                other.tasks = doomed
                await other.look_up("mee_3")
                transport.gates[0].set()
                scope.cancel()
        await anyio.wait_all_tasks_blocked()
        await release(transport)
    assert {"mee_1": Missing(), "mee_2": Missing()} == client.results
    assert client.lookups._batchers.get(client.lemcal.rate_limit_key).is_idle()


async def test_deadline_expires() -> None:
    """The deadline ends both a running and a waiting lookup, and leaves nothing behind."""
    transport = GatedTransport()
    async with anyio.create_task_group() as tasks:
        client = Client(transport, tasks)
        await client.look_up("mee_1", seconds=0.1)
        await client.look_up("mee_2", seconds=0.05)
        await client.look_up("mee_3", seconds=-1)
    assert (
        Unavailable("the list did not arrive in time") == client.results["mee_2"] == client.results["mee_3"]
    )
    late = client.results["mee_1"]
    assert isinstance(late, Unavailable)
    assert "no response within the deadline" in late.reason
    assert client.lookups._batchers.get(client.lemcal.rate_limit_key).is_idle()


async def test_gap_between_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast lemcal responds, the next list call waits, and later lookups share it."""
    monkeypatch.setattr(_lookup, "GAP", 0.2)
    transport = GatedTransport()
    transport.open = True
    began = anyio.current_time()
    async with anyio.create_task_group() as tasks:
        client = Client(transport, tasks)
        for number in range(20):
            await client.look_up(f"mee_{number}")
        assert 1 == len(transport.queries)
    assert (2, 20) == (len(transport.queries), len(client.results))
    assert anyio.current_time() - began >= 0.2


async def test_gap_exceeds_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lookup fails without a useless list call."""
    monkeypatch.setattr(_lookup, "GAP", 30)
    transport = GatedTransport()
    transport.open = True
    async with anyio.create_task_group() as tasks:
        client = Client(transport, tasks)
        await client.look_up("mee_1")
        await client.look_up("mee_2", seconds=0.05)
    assert Unavailable("the list did not arrive in time") == client.results["mee_2"]
    assert 1 == len(transport.queries)


@pytest.mark.parametrize("failure", [RuntimeError("vault"), KeyError("x")])
async def test_failing_api_key_function(failure: Exception) -> None:
    """The reason names the error's type only, because its message may contain secrets."""
    keys = iter(["k1"])

    def key() -> str:
        try:
            return next(keys)
        except StopIteration:
            raise failure from None

    lemcal = AsyncLemcal("usr_1", key, transport=GatedTransport())
    assert lemcal.user_id
    result = await Lookups().find(lemcal, MeetingRef("mee_1"), anyio.current_time() + 5, None)
    assert Unavailable(type(failure).__name__) == result


async def test_idle_batchers_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle batchers are dropped, those in use are kept."""
    monkeypatch.setattr(_lookup, "GAP", 0.0)
    batchers = _lookup.Batchers[int, int]()
    first = batchers.get("usr_1")
    assert batchers.get("usr_1") is first

    def add_accounts() -> None:
        for number in range(50):
            batchers.get(f"other_{number}")
        assert 3 >= len(batchers._batchers)

    with first.in_use():
        add_accounts()
        assert batchers.get("usr_1") is first
    add_accounts()
    assert batchers.get("usr_1") is not first


async def test_sudden_empty_list_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """If an account had meetings, an empty list is only trusted after the grace period."""
    transport = GatedTransport()
    transport.open = True
    lemcal, lookups = transport.client(), Lookups()

    async def find() -> LookupResult:
        return await lookups.find(lemcal, MeetingRef("mee_1"), anyio.current_time() + 5, None)

    assert Missing() == await find()  # a new account has no meetings
    transport.meetings = [{"_id": "mee_2"}]
    assert Missing() == await find()
    transport.meetings = []
    not_trusted = Unavailable("the list is empty, but was not before")
    assert [not_trusted, not_trusted] == [await find(), await find()]
    monkeypatch.setattr(_lookup, "EMPTY_LIST_TRUSTED_AFTER", 0.0)
    assert [Missing(), Missing()] == [await find(), await find()]
