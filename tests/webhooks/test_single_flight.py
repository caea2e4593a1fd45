"""The invariant of the lookup, under any order of questions, answers, bookings and cancellations."""

from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest
from hypothesis import given, strategies as st

from lemcal_async import AsyncLemcal, Meeting
from lemcal_async.ratelimit import Unlimited
from lemcal_async.webhooks import _lookup
from lemcal_async.webhooks._http import MeetingRef
from lemcal_async.webhooks._lookup import LookupResult, Lookups, Missing

# What can happen, with the number of the meeting (or of the question) that it happens to.
STEP = st.tuples(st.sampled_from(["ask", "ask", "book", "answer", "cancel"]), st.integers(0, 5))


class Stage:
    """A lemcal whose list calls begin and end when they are told to, and those who ask it."""

    def __init__(self) -> None:
        self.now = 0  # steps
        self.booked: dict[str, int] = {}
        self.calls: list[tuple[int, str]] = []  # when each began, and what it was narrowed to
        self.under_way: list[anyio.Event] = []
        self.asked: list[tuple[str, str | None, int]] = []
        self.scopes: list[anyio.CancelScope] = []
        self.findings: dict[int, tuple[LookupResult, int]] = {}  # with how many calls had begun by then
        self.asking = 0  # how many questions are open
        self.lookups = Lookups()
        transport = _Wire(self)
        self.lemcal = AsyncLemcal("usr_1", "k1", transport=transport, limiter=Unlimited())

    async def ask(self, number: int, *, task_status: Any) -> None:
        """Ask for a meeting, of a type that its number says, as a task."""
        place = len(self.asked)
        meeting_id, type_id = f"mee_{number}", (None, "met_0", "met_1")[number % 3]
        self.asked.append((meeting_id, type_id, self.now))
        self.asking += 1
        with anyio.CancelScope() as scope:
            self.scopes.append(scope)
            task_status.started()
            until = anyio.current_time() + 60
            finding = await self.lookups.find(self.lemcal, MeetingRef(meeting_id, type_id), until, None)
            self.findings[place] = finding, len(self.calls)
        self.asking -= 1

    async def play(self, steps: list[tuple[str, int]]) -> None:
        """Let it all happen, and then let every call end."""
        async with anyio.create_task_group() as tasks:
            for what, number in steps:
                self.now += 1
                if what == "ask":
                    await tasks.start(self.ask, number)
                elif what == "book":
                    self.booked.setdefault(f"mee_{number}", self.now)
                elif what == "cancel" and number < len(self.scopes):
                    self.scopes[number].cancel()
                elif what == "answer" and self.under_way:
                    self.under_way[-1].set()
                for _ in range(number * 5):  # the others get more or less far until the next step
                    await anyio.lowlevel.checkpoint()
                assert len(self.under_way) <= 1
            while self.asking:
                for call in self.under_way:
                    call.set()
                await anyio.lowlevel.checkpoint()


class _Wire(httpx.AsyncBaseTransport):
    def __init__(self, world: Stage) -> None:
        self._world = world

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answer later, with what is booked now."""
        world = self._world
        only = request.url.params.get("meetingTypeId")
        world.calls.append((world.now, only or ""))
        # A meeting's type is what its number says, so that a narrowed list has what it must.
        types = {f"mee_{number}": (None, "met_0", "met_1")[number % 3] for number in range(6)}
        rows = [{"_id": id_} for id_ in world.booked if only in {None, types[id_]}]
        ended = anyio.Event()
        world.under_way.append(ended)
        try:
            await ended.wait()
        finally:
            world.under_way.remove(ended)
        return httpx.Response(200, json=rows)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_invariant(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call at a time; each question is answered, truly, by a call that began after it was asked."""
    monkeypatch.setattr(_lookup, "GAP", 0.0)

    @given(st.lists(STEP, max_size=30))
    def play(steps: list[tuple[str, int]]) -> None:
        async def main() -> Stage:
            world = Stage()
            await world.play(steps)
            return world

        world = anyio.run(main, backend=backend)
        for place, (meeting_id, type_id, asked_at) in enumerate(world.asked):
            if place not in world.findings:
                assert world.scopes[place].cancel_called
                continue
            finding, calls = world.findings[place]
            fitting = [
                began for began, only in world.calls[:calls] if began >= asked_at and only in {"", type_id}
            ]
            assert fitting
            booked_at = world.booked.get(meeting_id)
            if isinstance(finding, Meeting):
                assert booked_at is not None
                assert meeting_id == finding.id
            else:
                assert Missing() == finding
                assert booked_at is None or booked_at >= min(fitting)
        assert len(world.calls) <= len(world.asked)
        assert not world.lookups._batchers.get(world.lemcal.rate_limit_key)._waiting

    play()
