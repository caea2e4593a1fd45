"""Invariants of the lookup, under any order of lookups, responses, bookings and cancellations."""

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

# What happens, and the number of the meeting (or of the lookup) that it happens to.
STEP = st.tuples(st.sampled_from(["look up", "look up", "book", "respond", "cancel"]), st.integers(0, 5))


class Simulation:
    """A fake lemcal with controlled list calls, and the lookups that use it."""

    def __init__(self) -> None:
        self.now = 0  # steps
        self.booked: dict[str, int] = {}
        self.calls: list[tuple[int, str]] = []  # when each began, and its meeting type
        self.running_calls: list[anyio.Event] = []
        self.lookups_started: list[tuple[str, str | None, int]] = []
        self.scopes: list[anyio.CancelScope] = []
        self.results: dict[int, tuple[LookupResult, int]] = {}  # with the number of calls begun by then
        self.open_lookups = 0
        self.lookups = Lookups()
        transport = _Transport(self)
        self.lemcal = AsyncLemcal("usr_1", "k1", transport=transport, limiter=Unlimited())

    async def look_up(self, number: int, *, task_status: Any) -> None:
        """Look up a meeting, whose type follows from its number, as a task."""
        index = len(self.lookups_started)
        meeting_id, type_id = f"mee_{number}", (None, "met_0", "met_1")[number % 3]
        self.lookups_started.append((meeting_id, type_id, self.now))
        self.open_lookups += 1
        with anyio.CancelScope() as scope:
            self.scopes.append(scope)
            task_status.started()
            until = anyio.current_time() + 60
            result = await self.lookups.find(self.lemcal, MeetingRef(meeting_id, type_id), until, None)
            self.results[index] = result, len(self.calls)
        self.open_lookups -= 1

    async def play(self, steps: list[tuple[str, int]]) -> None:
        """Run the steps, and then let every call end."""
        async with anyio.create_task_group() as tasks:
            for action, number in steps:
                self.now += 1
                if action == "look up":
                    await tasks.start(self.look_up, number)
                elif action == "book":
                    self.booked.setdefault(f"mee_{number}", self.now)
                elif action == "cancel" and number < len(self.scopes):
                    self.scopes[number].cancel()
                elif action == "respond" and self.running_calls:
                    self.running_calls[-1].set()
                for _ in range(number * 5):  # let other tasks run for a varying number of steps
                    await anyio.lowlevel.checkpoint()
                assert len(self.running_calls) <= 1
            while self.open_lookups:
                for call in self.running_calls:
                    call.set()
                await anyio.lowlevel.checkpoint()


class _Transport(httpx.AsyncBaseTransport):
    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Respond later, with the meetings that are booked now."""
        simulation = self._simulation
        type_filter = request.url.params.get("meetingTypeId")
        simulation.calls.append((simulation.now, type_filter or ""))
        # A meeting's type follows from its number, so that a narrowed list contains the right meetings.
        types = {f"mee_{number}": (None, "met_0", "met_1")[number % 3] for number in range(6)}
        rows = [{"_id": id_} for id_ in simulation.booked if type_filter in {None, types[id_]}]
        ended = anyio.Event()
        simulation.running_calls.append(ended)
        try:
            await ended.wait()
        finally:
            simulation.running_calls.remove(ended)
        return httpx.Response(200, json=rows)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_invariants(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls run one at a time; each lookup gets the result of a call that began after it."""
    monkeypatch.setattr(_lookup, "GAP", 0.0)

    @given(st.lists(STEP, max_size=30))
    def play(steps: list[tuple[str, int]]) -> None:
        async def main() -> Simulation:
            simulation = Simulation()
            await simulation.play(steps)
            return simulation

        simulation = anyio.run(main, backend=backend)
        for index, (meeting_id, type_id, started_at) in enumerate(simulation.lookups_started):
            if index not in simulation.results:
                assert simulation.scopes[index].cancel_called
                continue
            result, calls = simulation.results[index]
            eligible = [
                began
                for began, type_filter in simulation.calls[:calls]
                if began >= started_at and type_filter in {"", type_id}
            ]
            assert eligible
            booked_at = simulation.booked.get(meeting_id)
            if isinstance(result, Meeting):
                assert booked_at is not None
                assert meeting_id == result.id
            else:
                assert Missing() == result
                assert booked_at is None or booked_at >= min(eligible)
        assert len(simulation.calls) <= len(simulation.lookups_started)
        assert not simulation.lookups._batchers.get(simulation.lemcal.rate_limit_key)._waiting

    play()
