"""Many questions share a list call, and each is answered by one that began after it was asked."""

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


class Gated(httpx.AsyncBaseTransport):
    """Answers a list call when it is let, with the meetings that exist at its beginning."""

    def __init__(self) -> None:
        self.meetings: list[dict[str, Any]] = []
        self.queries: list[str] = []
        self.open = False
        self.gates: list[anyio.Event] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answer as of now, later."""
        self.queries.append(request.url.query.decode())
        rows = [*self.meetings]
        if not self.open:
            self.gates.append(anyio.Event())
            await self.gates[-1].wait()
        return httpx.Response(200, json=rows)

    def client(self) -> AsyncLemcal:
        """Return a client on it."""
        return AsyncLemcal("usr_1", "k1", transport=self, limiter=Unlimited())


class Asker:
    """Asks in tasks of its own."""

    def __init__(self, wire: Gated, tasks: Any) -> None:
        self.lookups = Lookups()
        self.lemcal = wire.client()
        self.tasks = tasks
        self.findings: dict[str, LookupResult] = {}

    async def ask(self, meeting_id: str, meeting_type_id: str | None = None, *, seconds: float = 30) -> None:
        """Ask, and return when the question has been put."""
        await self.tasks.start(self._ask, meeting_id, meeting_type_id, seconds)
        await anyio.wait_all_tasks_blocked()

    async def _ask(self, meeting_id: str, type_id: str | None, seconds: float, *, task_status: Any) -> None:
        task_status.started()
        until = anyio.current_time() + seconds
        self.findings[meeting_id] = await self.lookups.find(
            self.lemcal, MeetingRef(meeting_id, type_id), until, None
        )


@pytest.fixture(autouse=True)
def no_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let list calls follow each other at once."""
    monkeypatch.setattr(_lookup, "GAP", 0.0)


async def released(wire: Gated) -> None:
    """Let the last list call answer, and what follows from it happen."""
    wire.gates[-1].set()
    await anyio.wait_all_tasks_blocked()


async def test_one_runs_and_one_waits() -> None:
    """Fifty who come while a list is under way share the next one, and are not answered by the first."""
    wire = Gated()
    async with anyio.create_task_group() as tasks:
        asker = Asker(wire, tasks)
        await asker.ask("mee_0")
        wire.meetings = [{"_id": f"mee_{number}"} for number in range(51)]
        for number in range(1, 51):
            await asker.ask(f"mee_{number}")
        assert (1, {}) == (len(wire.queries), asker.findings)
        await released(wire)
        assert {"mee_0": Missing()} == asker.findings  # it did not exist when the list began
        assert 2 == len(wire.queries)
        await released(wire)
    found = {finding.id for finding in asker.findings.values() if isinstance(finding, Meeting)}
    assert {f"mee_{number}" for number in range(1, 51)} == found
    assert 2 == len(wire.queries)


async def test_narrowed_when_that_answers_all() -> None:
    """One type wanted by all: its list alone. Several, or one who does not say: the whole list."""
    wire = Gated()
    async with anyio.create_task_group() as tasks:
        asker = Asker(wire, tasks)
        await asker.ask("mee_1", "met_1")
        await asker.ask("mee_2", "met_2")
        await asker.ask("mee_3", "met_2")
        await released(wire)
        await asker.ask("mee_4", "met_1")
        await asker.ask("mee_5", "met_2")
        await released(wire)
        await asker.ask("mee_6", "met_1")
        await asker.ask("mee_7")
        await released(wire)
        await released(wire)
    assert ["meetingTypeId=met_1", "meetingTypeId=met_2", "", ""] == wire.queries


async def test_the_caller_is_canceled() -> None:
    """Who made the call for all goes away: somebody else makes it, for the same questions."""
    wire = Gated()
    wire.meetings = [{"_id": "mee_2"}, {"_id": "mee_3"}]
    async with anyio.create_task_group() as tasks:
        first, others = Asker(wire, tasks), Asker(wire, tasks)
        others.lookups = first.lookups
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as doomed:
                first.tasks = doomed
                await first.ask("mee_1")
                await others.ask("mee_2")
                await others.ask("mee_3")
                scope.cancel()
        await anyio.wait_all_tasks_blocked()
        assert 2 == len(wire.queries)
        await released(wire)
    assert {} == first.findings
    assert {"mee_2", "mee_3"} == {
        finding.id for finding in others.findings.values() if isinstance(finding, Meeting)
    }


async def test_the_caller_is_canceled_with_others_aboard() -> None:
    """The call that is cut short was to answer them too: they are asked for once more."""
    wire = Gated()
    wire.meetings = [{"_id": "mee_2"}]
    async with anyio.create_task_group() as tasks:
        others, caller = Asker(wire, tasks), Asker(wire, tasks)
        caller.lookups = others.lookups
        await others.ask("mee_1")
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as doomed:
                caller.tasks = doomed
                await others.ask("mee_2", seconds=5)
                await caller.ask("mee_3")  # the last to come makes the call for both
                await released(wire)
                assert 2 == len(wire.queries)
                scope.cancel()
        await anyio.wait_all_tasks_blocked()
        assert 3 == len(wire.queries)
        await released(wire)
    assert ({}, Meeting("mee_2")) == (caller.findings, others.findings["mee_2"])


async def test_one_who_waits_is_canceled() -> None:
    """It costs nobody anything, even if it was the one to make the next call."""
    wire = Gated()
    async with anyio.create_task_group() as tasks:
        asker, other = Asker(wire, tasks), Asker(wire, tasks)
        other.lookups = asker.lookups
        await asker.ask("mee_1")
        await asker.ask("mee_2")
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as doomed:
                other.tasks = doomed
                await other.ask("mee_3")
                wire.gates[0].set()
                scope.cancel()
        await anyio.wait_all_tasks_blocked()
        await released(wire)
    assert {"mee_1": Missing(), "mee_2": Missing()} == asker.findings
    assert asker.lookups._batchers.get(asker.lemcal.rate_limit_key).is_idle()


async def test_time_runs_out() -> None:
    """For the caller and for one who waits; nothing is left of them."""
    wire = Gated()
    async with anyio.create_task_group() as tasks:
        asker = Asker(wire, tasks)
        await asker.ask("mee_1", seconds=0.1)
        await asker.ask("mee_2", seconds=0.05)
        await asker.ask("mee_3", seconds=-1)
    assert (
        Unavailable("the list did not arrive in time") == asker.findings["mee_2"] == asker.findings["mee_3"]
    )
    late = asker.findings["mee_1"]
    assert isinstance(late, Unavailable)
    assert "no answer within the deadline" in late.reason
    assert asker.lookups._batchers.get(asker.lemcal.rate_limit_key).is_idle()


async def test_the_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast lemcal answers, the next list call waits; who comes meanwhile shares it."""
    monkeypatch.setattr(_lookup, "GAP", 0.2)
    wire = Gated()
    wire.open = True
    began = anyio.current_time()
    async with anyio.create_task_group() as tasks:
        asker = Asker(wire, tasks)
        for number in range(20):
            await asker.ask(f"mee_{number}")
        assert 1 == len(wire.queries)
    assert (2, 20) == (len(wire.queries), len(asker.findings))
    assert anyio.current_time() - began >= 0.2


async def test_the_gap_is_longer_than_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nobody can say; the list is not asked for in vain."""
    monkeypatch.setattr(_lookup, "GAP", 30)
    wire = Gated()
    wire.open = True
    async with anyio.create_task_group() as tasks:
        asker = Asker(wire, tasks)
        await asker.ask("mee_1")
        await asker.ask("mee_2", seconds=0.05)
    assert Unavailable("the list did not arrive in time") == asker.findings["mee_2"]
    assert 1 == len(wire.queries)


@pytest.mark.parametrize("failure", [RuntimeError("vault"), KeyError("x")])
async def test_a_key_function_that_fails(failure: Exception) -> None:
    """Its words are the user's, and may be secret."""
    keys = iter(["k1"])

    def key() -> str:
        try:
            return next(keys)
        except StopIteration:
            raise failure from None

    lemcal = AsyncLemcal("usr_1", key, transport=Gated())
    assert lemcal.user_id
    finding = await Lookups().find(lemcal, MeetingRef("mee_1"), anyio.current_time() + 5, None)
    assert Unavailable(type(failure).__name__) == finding


async def test_many_accounts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are idle are forgotten, those in use are kept."""
    monkeypatch.setattr(_lookup, "GAP", 0.0)
    batchers = _lookup.Batchers[int, int]()
    first = batchers.get("usr_1")
    assert batchers.get("usr_1") is first

    def others_come() -> None:
        for number in range(50):
            batchers.get(f"other_{number}")
        assert 3 >= len(batchers._batchers)

    with first.in_use():
        others_come()
        assert batchers.get("usr_1") is first
    others_come()
    assert batchers.get("usr_1") is not first


async def test_an_empty_list_is_doubted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there were meetings, an empty list says nothing until it has been empty for long."""
    wire = Gated()
    wire.open = True
    lemcal, lookups = wire.client(), Lookups()

    async def find() -> LookupResult:
        return await lookups.find(lemcal, MeetingRef("mee_1"), anyio.current_time() + 5, None)

    assert Missing() == await find()  # a new account has no meetings
    wire.meetings = [{"_id": "mee_2"}]
    assert Missing() == await find()
    wire.meetings = []
    doubt = Unavailable("the list is empty, but was not before")
    assert [doubt, doubt] == [await find(), await find()]
    monkeypatch.setattr(_lookup, "EMPTY_LIST_GRACE", 0.0)
    assert [Missing(), Missing()] == [await find(), await find()]
