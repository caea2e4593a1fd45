"""The fair semaphore: its order, the slots per account, and that no slot is ever lost."""

import asyncio
import random
from collections import Counter

import anyio
import anyio.lowlevel
import httpx
import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lemcal_async import AsyncLemcal
from lemcal_async._concurrency import FairSemaphore
from lemcal_async.ratelimit import Unlimited
from lemcal_async.transport._call import account_of

from .conftest import MakeWire
from .loopback import Loopback


async def settle() -> None:
    """Let all tasks run until they block."""
    for _ in range(10):
        await anyio.lowlevel.checkpoint()


class Users:
    """Tasks that each acquire a slot, and hold it until released."""

    def __init__(self, slots: FairSemaphore, tasks: anyio.abc.TaskGroup) -> None:
        self.slots = slots
        self.entered: list[str | None] = []
        self._tasks = tasks

    async def start(self, *accounts: str | None) -> None:
        """Start a task for each account that acquires a slot."""
        for account in accounts:
            self._tasks.start_soon(self._enter, account)
            await settle()

    async def release(self, *accounts: str | None) -> list[str | None]:
        """Release slots one by one; return the accounts that acquire them."""
        before = len(self.entered)
        for account in accounts:
            self.slots.release(account)
            await settle()
        return self.entered[before:]

    async def _enter(self, account: str | None) -> None:
        await self.slots.acquire(account)
        self.entered.append(account)


@pytest.mark.anyio
async def test_accounts_take_turns() -> None:
    """An account with many waiting tasks has no advantage."""
    async with anyio.create_task_group() as tasks:
        users = Users(FairSemaphore(2), tasks)
        await users.start("held", "other", "a", "a", "a", "b", "c", "c")
        assert ["held", "other"] == users.entered
        assert 6 == users.slots.waiting
        assert ["a"] == await users.release("held")
        assert ["b"] == await users.release("other")
        assert ["c", "a", "c", "a"] == await users.release("a", "b", "c", "a")
        assert 0 == users.slots.waiting


@pytest.mark.anyio
async def test_first_come_first_served() -> None:
    """Requests without an account are served in order."""
    slots = FairSemaphore(1)
    served: list[int] = []

    async def enter(number: int) -> None:
        await slots.acquire(None)
        served.append(number)
        slots.release(None)

    await slots.acquire(None)
    async with anyio.create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(enter, number)
            await settle()
        slots.release(None)
    assert list(range(20)) == served
    assert 1 == slots.free


@pytest.mark.parametrize(("count", "most"), [(1, 1), (2, 1), (3, 2), (4, 3), (5, 4), (10, 8), (100, 80)])
@pytest.mark.anyio
async def test_maximum_slots_per_account(count: int, most: int) -> None:
    """Four fifths of the slots, and never the last free slot if it already has one."""
    async with anyio.create_task_group() as tasks:
        users = Users(FairSemaphore(count), tasks)
        await users.start(*["busy"] * (count + 5))
        assert ["busy"] * most == users.entered
        await users.start(*["new"] * (count > most))
        assert ["new"] * (count > most) == users.entered[most:]
        tasks.cancel_scope.cancel()


@pytest.mark.anyio
async def test_requests_without_an_account_may_use_all_slots() -> None:
    """In a plain client there are no accounts to share slots between."""
    async with anyio.create_task_group() as tasks:
        users = Users(FairSemaphore(10), tasks)
        await users.start(*[None] * 12)
        assert 10 == len(users.entered)
        await users.release(None, None)
        assert 12 == len(users.entered)


@pytest.mark.anyio
async def test_several_hanging_accounts() -> None:
    """Each gets fewer slots than the one before, and the next account gets a slot immediately."""
    async with anyio.create_task_group() as tasks:
        users = Users(FairSemaphore(100), tasks)
        await users.start(*["one"] * 100, *["two"] * 100, *["three"] * 100, "healthy")
        assert {"one": 80, "two": 16, "three": 3, "healthy": 1} == Counter(users.entered)
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("granted", [False, True])
@pytest.mark.anyio
async def test_canceled_by_scope(*, granted: bool) -> None:
    """A task is canceled while it waits, or when it was just granted a slot."""
    slots = FairSemaphore(1)
    await slots.acquire("held")

    async def visit(account: str) -> None:
        await slots.acquire(account)
        try:
            await anyio.lowlevel.checkpoint()
        finally:
            slots.release(account)

    async with anyio.create_task_group() as tasks:
        users = Users(slots, tasks)
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as inner:
                inner.start_soon(visit, "a")
                await settle()
                await users.start("b")
                if granted:
                    slots.release("held")
                scope.cancel()
        if not granted:
            slots.release("held")
        await settle()
        assert ["b"] == users.entered
        slots.release("b")
    assert (1, 0) == (slots.free, slots.waiting)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("granted", [False, True])
@pytest.mark.anyio
async def test_canceled_by_task(*, granted: bool) -> None:
    """The same with ``Task.cancel()``, also repeated."""
    slots = FairSemaphore(1)
    await slots.acquire("held")
    tasks = [asyncio.create_task(slots.acquire(account)) for account in "abc"]
    await settle()
    if granted:
        slots.release("held")
    tasks[0].cancel()
    tasks[0].cancel()
    tasks[1].cancel()
    if not granted:
        slots.release("held")
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [asyncio.CancelledError, asyncio.CancelledError, type(None)] == [type(each) for each in results]
    slots.release("c")
    assert (1, 0) == (slots.free, slots.waiting)


@pytest.mark.anyio
async def test_ten_thousand_accounts() -> None:
    """All are served, and no state is kept."""
    slots = FairSemaphore(10)
    served: list[int] = []

    async def visit(account: int) -> None:
        await slots.acquire(account)
        await anyio.lowlevel.checkpoint()
        served.append(account)
        slots.release(account)

    async with anyio.create_task_group() as tasks:
        for account in range(10_000):
            tasks.start_soon(visit, account)
    assert list(range(10_000)) == sorted(served)
    assert (10, 0) == (slots.free, slots.waiting)
    assert [{}, {}] == [slots._held, slots._waiters]
    assert [[], []] == [list(slots._with_slots), list(slots._without_slots)]


class SemaphoreMachine(RuleBasedStateMachine):
    """Any sequence of acquiring, releasing and canceling, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.count = 0
        self.slots = FairSemaphore(0)
        self.waiting: list[tuple[str | None, asyncio.Task[None]]] = []
        self.inside: list[str | None] = []

    @precondition(lambda self: not self.count)
    @rule(count=st.integers(1, 12))
    def build(self, count: int) -> None:
        """Create the semaphore."""
        self.count, self.slots = count, FairSemaphore(count)

    @precondition(lambda self: self.count)
    @rule(account=st.sampled_from([None, "a", "b", "c"]), times=st.integers(1, 5))
    def enter(self, account: str | None, times: int) -> None:
        """Start acquiring slots."""
        for _ in range(times):
            self.waiting.append((account, self.loop.create_task(self.slots.acquire(account))))

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """Release a slot."""
        self.slots.release(self.inside.pop(data.draw(st.integers(0, len(self.inside) - 1))))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """Cancel a task that waits, or was just granted a slot."""
        _, task = self.waiting[data.draw(st.integers(0, len(self.waiting) - 1))]
        task.cancel()

    @rule()
    def run(self) -> None:
        """Run the tasks."""
        self.loop.run_until_complete(settle())
        for account, task in list(self.waiting):
            if task.done():
                self.waiting.remove((account, task))
                if not task.cancelled():
                    task.result()
                    self.inside.append(account)

    @invariant()
    def no_slot_is_lost(self) -> None:
        """No slot is lost, and no task waits that could have a slot."""
        self.run()
        assert self.count == self.slots.free + len(self.inside)
        assert len(self.waiting) == self.slots.waiting
        held = Counter(self.inside)
        for account in {account for account, _ in self.waiting}:
            mine = held[account]
            if account is None or mine == 0:
                assert 0 == self.slots.free
            else:
                assert self.slots.free <= 1 or mine >= 4 * self.slots.free

    def teardown(self) -> None:
        """Cancel the waiting tasks."""
        for _, task in self.waiting:
            task.cancel()
        self.loop.run_until_complete(settle())
        self.loop.close()


TestMachine = SemaphoreMachine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@pytest.mark.anyio
async def test_hanging_account_does_not_block_others(make_wire: MakeWire) -> None:
    """All of its calls hang, and no limiter slows it down."""
    with Loopback() as server:
        transport = make_wire(max_connections=5)
        async with (
            transport,
            AsyncLemcal(
                "usr_hangs", "secret", base_url=server.url, transport=transport, limiter=Unlimited()
            ) as hanging,
            anyio.create_task_group() as tasks,
        ):
            for _ in range(50):
                tasks.start_soon(hanging.request, "GET", "/hold")
            for _ in range(4):
                await anyio.to_thread.run_sync(server.arrived.acquire)
            with anyio.fail_after(10):
                for number in range(5):
                    other = hanging.for_account(f"usr_{number}", "secret")
                    assert {} == (await other.request("GET", "/")).data
            tasks.cancel_scope.cancel()
        assert 4 == sum(request.target == "/hold" for request in server.requests)


@pytest.mark.anyio
async def test_busy_account_does_not_delay_others(make_wire: MakeWire) -> None:
    """Calls of other accounts are served in turn, however many calls of one account wait."""
    done: list[str] = []
    with Loopback() as server:
        async with (
            make_wire(max_connections=1) as transport,
            AsyncLemcal(
                "usr_busy", "secret", base_url=server.url, transport=transport, limiter=Unlimited()
            ) as busy,
            anyio.create_task_group() as tasks,
        ):

            async def call(lemcal: AsyncLemcal, name: str) -> None:
                await lemcal.request("GET", "/sleep/0.002")
                done.append(name)

            for _ in range(100):
                tasks.start_soon(call, busy, "busy")
            await anyio.to_thread.run_sync(server.arrived.acquire)
            for number in range(5):
                tasks.start_soon(call, busy.for_account(f"usr_{number}", "secret"), "other")
    assert 105 == len(done)
    assert max(place for place, name in enumerate(done) if name == "other") < 30


@pytest.mark.anyio
async def test_plain_request_has_no_account() -> None:
    """Looking up the account does not create a call state."""
    request = httpx.Request("GET", "https://example.com", extensions={"lemcal_async": random})
    assert None is account_of(request)
    assert {"lemcal_async": random} == request.extensions
