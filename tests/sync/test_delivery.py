"""Delivery to handlers: in order, at least once, and what happens when they fail."""

import logging
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import anyio
import anyio.from_thread
import pytest

from lemcal_async.sync import Change, MemoryStore, Store, StoreError, sync_meetings
from lemcal_async.sync._delivery import BATCH

from .conftest import kinds, outbox

pytestmark = pytest.mark.anyio


async def test_each_change_once(store: Store, worlds: Any) -> None:
    """Changes come in order per account, and are not repeated after they were taken."""
    world = worlds(3, 4)
    taken: list[Change] = []

    async def on_change(change: Change) -> None:
        await anyio.lowlevel.checkpoint()
        taken.append(change)

    report = await sync_meetings(world.clients(), store, on_change=on_change)
    assert (12, 12) == (report.delivered, len(taken))
    for index, account in enumerate(world.sandbox.accounts):
        own = [change.meeting_id for change in taken if change.user_id == account.user_id]
        assert [row["_id"] for row in world.sandbox.meetings(index)] == own
    assert 0 == (await sync_meetings(world.clients(), store, on_change=on_change)).delivered
    assert [] == await kinds(store, pending=True)


async def test_a_plain_function(worlds: Any) -> None:
    """It runs in a worker thread, so it may block."""
    taken: list[tuple[str, bool]] = []
    world = worlds(1, 2)
    here = threading.get_ident()

    def on_change(change: Change) -> None:
        taken.append((change.kind, threading.get_ident() == here))

    await sync_meetings(world.clients(), MemoryStore(), on_change=on_change)
    assert [("created", False)] * 2 == taken


async def test_a_plain_function_that_returns_an_awaitable(worlds: Any) -> None:
    """Such as a lambda around an async function: what it returns is awaited each time."""
    world, taken = worlds(1, 3), list[str]()

    async def on_change(change: Change) -> None:
        await anyio.lowlevel.checkpoint()
        taken.append(change.meeting_id)

    report = await sync_meetings(world.clients(), MemoryStore(), on_change=lambda change: on_change(change))  # noqa: PLW0108  # not known to be async
    assert 3 == report.delivered
    assert [row["_id"] for row in world.sandbox.meetings()] == taken


async def test_an_object_that_is_called(worlds: Any) -> None:
    """An object with an async ``__call__`` is awaited, also inside a partial."""

    class Handler:
        def __init__(self) -> None:
            self.taken: list[str] = []

        async def __call__(self, change: Change, *, crm: str = "") -> None:
            await anyio.lowlevel.checkpoint()
            self.taken.append(f"{crm}{change.kind}")

    handler = Handler()
    await sync_meetings(worlds(1, 1).clients(), MemoryStore(), on_change=handler)
    await sync_meetings(worlds(1, 1).clients(), MemoryStore(), on_change=partial(handler, crm="x-"))
    assert ["created", "x-created"] == handler.taken


async def test_without_a_handler_they_wait(worlds: Any) -> None:
    """A later run delivers them first."""
    world, store = worlds(1, 2), MemoryStore()
    await sync_meetings(world.clients(), store)
    world.sandbox.cancel(world.sandbox.meetings()[0]["_id"])
    taken: list[str] = []
    await sync_meetings(world.clients(), store, on_change=lambda change: taken.append(change.kind))
    assert ["created", "created", "canceled"] == taken


async def test_a_handler_that_fails(store: Store, worlds: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Its account stops and is reported, and continues in the next run; the others go on."""
    world = worlds(2, 4)
    bad_account = world.sandbox.user_id
    third = world.sandbox.meetings(0)[2]["_id"]
    taken: list[tuple[str, str]] = []
    broken = True

    async def on_change(change: Change) -> None:
        if broken and change.meeting_id == third:
            raise RuntimeError("the CRM is down")
        taken.append((change.user_id, change.meeting_id))

    with caplog.at_level(logging.INFO, "lemcal_async.sync"):
        report = await sync_meetings(world.clients(), store, on_change=on_change)
    assert [(logging.ERROR, RuntimeError)] == [
        (record.levelno, record.exc_info[0]) for record in caplog.records if record.exc_info
    ]
    assert (2, 1, 6, 8) == (report.accounts, report.failed, report.delivered, report.created)
    (failure,) = report.failures
    assert (bad_account, "delivery", "the CRM is down") == (
        failure.user_id,
        failure.stage,
        str(failure.error),
    )
    assert 2 == sum(user_id == bad_account for user_id, _ in taken)
    broken = False
    report = await sync_meetings(world.clients(), store, on_change=on_change)
    assert (0, 2) == (report.failed, report.delivered)
    own = [meeting_id for user_id, meeting_id in taken if user_id == bad_account]
    assert [row["_id"] for row in world.sandbox.meetings(0)] == own


async def test_a_handler_that_fails_every_third_time(worlds: Any) -> None:
    """After enough runs, all changes are delivered, in order."""
    world, store = worlds(1, 9), MemoryStore()
    calls = 0
    taken: list[str] = []

    async def on_change(change: Change) -> None:
        nonlocal calls
        calls += 1
        if not calls % 3:
            raise RuntimeError
        taken.append(change.meeting_id)

    runs = [await sync_meetings(world.clients(), store, on_change=on_change) for _ in range(5)]
    assert [1, 1, 1, 1, 0] == [report.failed for report in runs]
    assert [row["_id"] for row in world.sandbox.meetings()] == taken


async def test_old_changes_are_delivered_though_the_service_is_down(worlds: Any) -> None:
    """Pending changes are delivered even if the list cannot be fetched."""
    world, store = worlds(1, 2), MemoryStore()
    await sync_meetings(world.clients(), store)
    wrong = world.lemcal.for_account(world.sandbox.user_id, "wrong")
    report = await sync_meetings([wrong], store, on_change=lambda _: None)
    assert (1, 2) == (report.failed, report.delivered)


async def test_canceled_in_the_handler(store: Store, worlds: Any) -> None:
    """The change that the handler was working on comes again, those before it do not."""
    world = worlds(1, 3)
    taken: list[str] = []

    async def on_change(change: Change) -> None:
        if len(taken) == 1:
            scope.cancel()
            await anyio.sleep_forever()
        taken.append(change.meeting_id)

    with anyio.CancelScope() as scope:
        await sync_meetings(world.clients(), store, on_change=on_change)
    assert 2 == len(await outbox(store, pending=True))


async def test_canceled_when_the_handler_has_returned(store: Store, worlds: Any) -> None:
    """What it took is marked in any case."""
    world = worlds(1, 3)

    async def on_change(_: Change) -> None:
        scope.cancel()

    with anyio.CancelScope() as scope:
        await sync_meetings(world.clients(), store, on_change=on_change)
    assert 2 == len(await outbox(store, pending=True))


async def test_canceled_in_a_plain_handler(store: Store, worlds: Any) -> None:
    """The call under way completes and is marked; there are no further calls."""
    world = worlds(1, 3)

    def on_change(_: Change) -> None:
        anyio.from_thread.run_sync(scope.cancel)

    with anyio.CancelScope() as scope:
        await sync_meetings(world.clients(), store, on_change=on_change)
    assert 2 == len(await outbox(store, pending=True))


@pytest.mark.parametrize("plain", [False, True])
async def test_canceled_natively(store: Store, worlds: Any, anyio_backend_name: str, *, plain: bool) -> None:
    """What the handler took is marked, the change under way comes again; a plain handler completes it."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no other cancellation")
    import asyncio

    world, started = worlds(1, 4), asyncio.Event()
    loop, ended = asyncio.get_running_loop(), list[str]()

    async def on_change(change: Change) -> None:
        if len(ended) == 1:
            started.set()
            await anyio.sleep_forever()
        ended.append(change.meeting_id)

    def plainly(change: Change) -> None:
        if len(ended) == 1:
            loop.call_soon_threadsafe(started.set)
            task_is_canceled.wait(20)
        ended.append(change.meeting_id)

    task_is_canceled = threading.Event()
    handler = plainly if plain else on_change
    task = asyncio.create_task(sync_meetings(world.clients(), store, on_change=handler))
    await started.wait()
    task.cancel()
    loop.call_later(0.05, task_is_canceled.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    waiting = await outbox(store, pending=True)
    assert (1 + plain, 3 - plain) == (len(ended), len(waiting))
    assert set(ended).isdisjoint(change.meeting_id for change in waiting)


async def test_an_executor_that_is_shut_down(worlds: Any, anyio_backend_name: str) -> None:
    """It cancels the future that a handler awaits: that account fails, and the run goes on."""
    if anyio_backend_name != "asyncio":
        pytest.skip("asyncio's executors")
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    release = threading.Event()
    executor = ThreadPoolExecutor(1)
    executor.submit(release.wait, 20)

    async def on_change(_: Change) -> None:
        future = asyncio.get_running_loop().run_in_executor(executor, str)
        executor.shutdown(wait=False, cancel_futures=True)
        await future

    report = await sync_meetings(worlds(2, 1).clients(), MemoryStore(), on_change=on_change)
    release.set()
    assert (2, 2) == (report.accounts, report.failed)
    kinds_of_errors = sorted(type(failure.error).__name__ for failure in report.failures)
    assert ["CanceledElsewhereError", "RuntimeError"] == kinds_of_errors  # the second found it shut down


class Marks(MemoryStore):
    """A store that records the size of each batch of marks."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[int] = []

    async def mark_delivered(self, changes: Sequence[Change]) -> int:
        """Record the size."""
        self.marks.append(len(changes))
        return await super().mark_delivered(changes)


async def pass_by(_: object) -> None:
    """Accept anything."""


@pytest.mark.parametrize("handler", [{"on_change": pass_by}, {"on_change": str}, {"on_changes": pass_by}])
async def test_marks_are_written_in_batches(worlds: Any, handler: Any) -> None:
    """Marks come in small batches, which is what a crash can repeat."""
    store = Marks()
    report = await sync_meetings(worlds(1, BATCH + 10).clients(), store, **handler)
    assert (0, BATCH + 10) == (report.failed, report.delivered)
    assert [BATCH, 10] == store.marks


async def test_a_store_that_takes_long_to_mark(worlds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run waits for the marks; a canceled one only for so long, and then their changes come again."""
    monkeypatch.setattr("lemcal_async.sync._delivery.MARK_GRACE", 0.01)
    stalled = anyio.Event()

    class Slow(MemoryStore):
        hangs = False

        async def mark_delivered(self, changes: Sequence[Change]) -> int:
            if self.hangs:
                stalled.set()
                await anyio.sleep_forever()
            await anyio.sleep(0.05)
            return await super().mark_delivered(changes)

    world, store = worlds(1, 2), Slow()
    assert 0 == (await sync_meetings(world.clients(), store, on_change=pass_by)).failed
    assert [] == await outbox(store, pending=True)
    world.sandbox.book()
    store.hangs = True
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: sync_meetings(world.clients(), store, on_change=pass_by))
            await stalled.wait()
            tasks.cancel_scope.cancel()
    assert ["created"] == await kinds(store, pending=True)


async def test_a_store_that_fails_to_mark(worlds: Any) -> None:
    """That is a failure of the store, and the changes come again."""

    class Broken(MemoryStore):
        async def mark_delivered(self, changes: Sequence[Change]) -> int:
            raise StoreError("the disk is full")

    world, store = worlds(1, 2), Broken()
    (failure,) = (await sync_meetings(world.clients(), store, on_change=pass_by)).failures
    assert ("store", "the disk is full") == (failure.stage, str(failure.error))
    assert 2 == len(await outbox(store, pending=True))


@pytest.mark.parametrize("handler", [pass_by, str])
async def test_slow_handlers_are_marked_more_often(
    worlds: Any, handler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Marks are written after a while at the latest: here, after each change."""
    monkeypatch.setattr("lemcal_async.sync._delivery.MARK_AFTER", 0.0)
    store = Marks()
    await sync_meetings(worlds(1, 3).clients(), store, on_change=handler)
    assert [1, 1, 1] == store.marks


async def test_somebody_else_delivers_too(worlds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next batch leaves out what another process has delivered meanwhile."""
    monkeypatch.setattr("lemcal_async.sync._delivery.BATCH", 2)
    world, store = worlds(1, 4), MemoryStore()
    taken: list[str] = []

    async def on_change(change: Change) -> None:
        taken.append(change.meeting_id)
        if len(taken) == 1:
            await store.mark_delivered(await store.pending(change.user_id, 3))

    report = await sync_meetings(world.clients(), store, on_change=on_change)
    ids = [row["_id"] for row in world.sandbox.meetings()]
    assert ([ids[0], ids[1], ids[3]], 3) == (taken, report.delivered)


async def test_lists_of_changes(store: Store, worlds: Any) -> None:
    """``on_changes`` gets each account's changes as a list, in order; a plain function works, too."""
    world = worlds(2, 4)
    taken: list[list[Change]] = []
    report = await sync_meetings(world.clients(), store, on_changes=taken.append)
    assert (0, 8) == (report.failed, report.delivered)
    listed = {world.clients()[index].user_id: world.sandbox.meetings(index) for index in range(2)}
    assert {user_id: [row["_id"] for row in rows] for user_id, rows in listed.items()} == {
        changes[0].user_id: [change.meeting_id for change in changes] for changes in taken
    }
    assert [] == await outbox(store, pending=True)


async def test_a_list_that_fails(worlds: Any) -> None:
    """None of it counts as delivered. Next time, each change comes alone, so that the culprit is found."""
    world, store = worlds(1, 4), MemoryStore()
    bad = world.sandbox.meetings()[1]["_id"]
    lists: list[list[str]] = []

    async def on_changes(changes: list[Change]) -> None:
        lists.append([change.meeting_id for change in changes])
        if bad in lists[-1]:
            raise ValueError("no such contact")

    clients, ids = world.clients(), [row["_id"] for row in world.sandbox.meetings()]
    reports = [await sync_meetings(clients, store, on_changes=on_changes, max_attempts=3) for _ in range(4)]
    assert [ids, ids[:1], ids[1:2], ids[1:2], ids[2:3], ids[3:]] == lists
    assert [(1, 0, 0), (1, 1, 0), (1, 2, 1), (0, 0, 0)] == [
        (report.failed, report.delivered, report.parked) for report in reports
    ]
    assert [bad] == [change.meeting_id async for change in store.changes(parked=True)]


async def test_a_change_that_can_never_be_taken(worlds: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It is parked with its error after ``max_attempts``, and the others go on, in order."""
    world, store = worlds(1, 4), MemoryStore()
    second = world.sandbox.meetings()[1]["_id"]
    taken: list[str] = []
    broken = True

    async def on_change(change: Change) -> None:
        if broken and change.meeting_id == second:
            raise ValueError("no such\ncontact")
        taken.append(change.meeting_id)

    async def run() -> Any:
        return await sync_meetings(world.clients(), store, on_change=on_change, max_attempts=3)

    reports = [await run() for _ in range(4)]
    assert [(1, 1, 0), (1, 0, 0), (1, 2, 1), (0, 0, 0)] == [
        (report.failed, report.delivered, report.parked) for report in reports
    ]
    ids = [row["_id"] for row in world.sandbox.meetings()]
    assert [ids[0], ids[2], ids[3]] == taken
    (parked,) = [change async for change in store.changes(parked=True)]
    assert (second, 3, "ValueError: no such contact") == (parked.meeting_id, parked.attempts, parked.error)
    assert [] == await outbox(store, pending=True)
    assert f"change {parked.seq} (created {second}) is parked after 3 attempts" in caplog.text

    world.sandbox.book()
    broken = False
    assert 1 == await store.retry_parked(world.sandbox.user_id)
    assert (0, 2, 0) == ((report := await run()).failed, report.delivered, report.parked)
    assert second == taken[3]


async def test_a_handler_that_awaits_what_others_canceled(worlds: Any, anyio_backend_name: str) -> None:
    """Its account fails, and the run goes on: the others are done and reported."""
    world, store = worlds(8, 1), MemoryStore()
    canceled_id = world.sandbox.meetings(3)[0]["_id"]

    async def on_change(change: Change) -> None:
        if change.meeting_id == canceled_id:
            await of_others(anyio_backend_name)

    report = await sync_meetings(world.clients(), store, on_change=on_change)
    assert (8, 1, 7) == (report.accounts, report.failed, report.delivered)
    (failure,) = report.failures
    assert (world.sandbox.accounts[3].user_id, "delivery") == (failure.user_id, failure.stage)
    assert "canceled from elsewhere" in str(failure.error)
    assert [canceled_id] == [change.meeting_id for change in await outbox(store, pending=True)]


@pytest.mark.parametrize("at_once", [False, True])
async def test_a_handler_that_cancels_its_own_task(
    worlds: Any, anyio_backend_name: str, *, at_once: bool
) -> None:
    """Its account fails, at the handler's next await or ours, and the run goes on."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no other cancellation than a scope's")
    import asyncio

    world, store = worlds(8, 2), MemoryStore()
    first = world.sandbox.meetings(3)[0]["_id"]

    async def on_change(change: Change) -> None:
        if change.meeting_id == first:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            if at_once:
                await anyio.sleep(20)

    for concurrency in (1, 4) if at_once else (1,):  # the worker of that account has others to do
        report = await sync_meetings(
            world.clients(), store, on_change=on_change, max_concurrency=concurrency, max_attempts=9
        )
        assert (8, 1) == (report.accounts, report.failed)
        assert [world.sandbox.accounts[3].user_id] == [failure.user_id for failure in report.failures]
    assert [2, 0] * at_once == [change.attempts for change in await outbox(store, pending=True)]


async def test_all_tasks_are_canceled(
    worlds: Any, anyio_backend_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As by a server that shuts down: the run ends, and takes it for no failure of an account."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no other cancellation than a scope's")
    import asyncio

    world, before = worlds(6, 2), asyncio.all_tasks()

    async def on_change(_: Change) -> None:
        for task in asyncio.all_tasks() - before:
            task.cancel()
        await anyio.sleep(20)

    task = asyncio.create_task(sync_meetings(world.clients(), MemoryStore(), on_change=on_change))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [] == caplog.records


async def test_a_plain_handler_that_is_canceled(worlds: Any) -> None:
    """A plain handler may raise CancelledError, too, say from an event loop of its own."""
    import asyncio

    def on_change(_: Change) -> None:
        raise asyncio.CancelledError

    report = await sync_meetings(worlds(2, 1).clients(), MemoryStore(), on_change=on_change)
    assert (2, 2, 0) == (report.accounts, report.failed, report.delivered)


async def of_others(backend: str) -> None:
    """Await what somebody else canceled: a future, or what a task of trio passes on."""
    if backend == "asyncio":
        import asyncio

        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future
    import outcome
    import trio

    with trio.CancelScope() as scope:
        scope.cancel()
        captured = await outcome.acapture(trio.sleep_forever)
    captured.unwrap()
