"""Delivery to handlers: in order, at least once, and when handlers fail."""

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


async def test_each_change_once(store: Store, serve_sandbox: Any) -> None:
    """Changes are delivered in order per account, and not again once accepted."""
    served = serve_sandbox(3, 4)
    accepted: list[Change] = []

    async def on_change(change: Change) -> None:
        await anyio.lowlevel.checkpoint()
        accepted.append(change)

    report = await sync_meetings(served.clients(), store, on_change=on_change)
    assert (12, 12) == (report.delivered, len(accepted))
    for index, account in enumerate(served.sandbox.accounts):
        own = [change.meeting_id for change in accepted if change.user_id == account.user_id]
        assert [row["_id"] for row in served.sandbox.meetings(index)] == own
    assert 0 == (await sync_meetings(served.clients(), store, on_change=on_change)).delivered
    assert [] == await kinds(store, pending=True)


async def test_plain_function(serve_sandbox: Any) -> None:
    """A plain function runs in a worker thread, so it may block."""
    accepted: list[tuple[str, bool]] = []
    served = serve_sandbox(1, 2)
    here = threading.get_ident()

    def on_change(change: Change) -> None:
        accepted.append((change.kind, threading.get_ident() == here))

    await sync_meetings(served.clients(), MemoryStore(), on_change=on_change)
    assert [("created", False)] * 2 == accepted


async def test_plain_function_returning_awaitable(serve_sandbox: Any) -> None:
    """The awaitable that a lambda around an async function returns is awaited."""
    served, accepted = serve_sandbox(1, 3), list[str]()

    async def on_change(change: Change) -> None:
        await anyio.lowlevel.checkpoint()
        accepted.append(change.meeting_id)

    report = await sync_meetings(served.clients(), MemoryStore(), on_change=lambda change: on_change(change))  # noqa: PLW0108  # not known to be async
    assert 3 == report.delivered
    assert [row["_id"] for row in served.sandbox.meetings()] == accepted


async def test_callable_object(serve_sandbox: Any) -> None:
    """An object with an async ``__call__`` is awaited, even inside a partial."""

    class Handler:
        def __init__(self) -> None:
            self.accepted: list[str] = []

        async def __call__(self, change: Change, *, crm: str = "") -> None:
            await anyio.lowlevel.checkpoint()
            self.accepted.append(f"{crm}{change.kind}")

    handler = Handler()
    await sync_meetings(serve_sandbox(1, 1).clients(), MemoryStore(), on_change=handler)
    await sync_meetings(serve_sandbox(1, 1).clients(), MemoryStore(), on_change=partial(handler, crm="x-"))
    assert ["created", "x-created"] == handler.accepted


async def test_changes_wait_without_handler(serve_sandbox: Any) -> None:
    """A later run with a handler delivers them first."""
    served, store = serve_sandbox(1, 2), MemoryStore()
    await sync_meetings(served.clients(), store)
    served.sandbox.cancel(served.sandbox.meetings()[0]["_id"])
    accepted: list[str] = []
    await sync_meetings(served.clients(), store, on_change=lambda change: accepted.append(change.kind))
    assert ["created", "created", "canceled"] == accepted


async def test_failing_handler(store: Store, serve_sandbox: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A failure stops and reports its account until the next run; other accounts continue."""
    served = serve_sandbox(2, 4)
    bad_account = served.sandbox.user_id
    third = served.sandbox.meetings(0)[2]["_id"]
    accepted: list[tuple[str, str]] = []
    broken = True

    async def on_change(change: Change) -> None:
        if broken and change.meeting_id == third:
            raise RuntimeError("the CRM is down")
        accepted.append((change.user_id, change.meeting_id))

    with caplog.at_level(logging.INFO, "lemcal_async.sync"):
        report = await sync_meetings(served.clients(), store, on_change=on_change)
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
    assert 2 == sum(user_id == bad_account for user_id, _ in accepted)
    broken = False
    report = await sync_meetings(served.clients(), store, on_change=on_change)
    assert (0, 2) == (report.failed, report.delivered)
    own = [meeting_id for user_id, meeting_id in accepted if user_id == bad_account]
    assert [row["_id"] for row in served.sandbox.meetings(0)] == own


async def test_handler_failing_every_third_time(serve_sandbox: Any) -> None:
    """After enough runs, all changes are delivered, in order."""
    served, store = serve_sandbox(1, 9), MemoryStore()
    calls = 0
    accepted: list[str] = []

    async def on_change(change: Change) -> None:
        nonlocal calls
        calls += 1
        if not calls % 3:
            raise RuntimeError
        accepted.append(change.meeting_id)

    runs = [await sync_meetings(served.clients(), store, on_change=on_change) for _ in range(5)]
    assert [1, 1, 1, 1, 0] == [report.failed for report in runs]
    assert [row["_id"] for row in served.sandbox.meetings()] == accepted


async def test_delivery_while_service_is_down(serve_sandbox: Any) -> None:
    """Pending changes are delivered even if the list cannot be fetched."""
    served, store = serve_sandbox(1, 2), MemoryStore()
    await sync_meetings(served.clients(), store)
    wrong = served.lemcal.for_account(served.sandbox.user_id, "wrong")
    report = await sync_meetings([wrong], store, on_change=lambda _: None)
    assert (1, 2) == (report.failed, report.delivered)


async def test_cancellation_in_handler(store: Store, serve_sandbox: Any) -> None:
    """The change in progress is delivered again, earlier ones are not."""
    served = serve_sandbox(1, 3)
    accepted: list[str] = []

    async def on_change(change: Change) -> None:
        if len(accepted) == 1:
            scope.cancel()
            await anyio.sleep_forever()
        accepted.append(change.meeting_id)

    with anyio.CancelScope() as scope:
        await sync_meetings(served.clients(), store, on_change=on_change)
    assert 2 == len(await outbox(store, pending=True))


async def test_cancellation_after_handler(store: Store, serve_sandbox: Any) -> None:
    """Accepted changes are marked in any case."""
    served = serve_sandbox(1, 3)

    async def on_change(_: Change) -> None:
        scope.cancel()

    with anyio.CancelScope() as scope:
        await sync_meetings(served.clients(), store, on_change=on_change)
    assert 2 == len(await outbox(store, pending=True))


async def test_cancellation_in_plain_handler(store: Store, serve_sandbox: Any) -> None:
    """The call in progress completes and its change is marked; there are no further calls."""
    served = serve_sandbox(1, 3)

    def on_change(_: Change) -> None:
        anyio.from_thread.run_sync(scope.cancel)

    with anyio.CancelScope() as scope:
        await sync_meetings(served.clients(), store, on_change=on_change)
    assert 2 == len(await outbox(store, pending=True))


@pytest.mark.parametrize("plain", [False, True])
async def test_native_cancellation(
    store: Store, serve_sandbox: Any, anyio_backend_name: str, *, plain: bool
) -> None:
    """Accepted changes are marked. The one in progress is delivered again, unless its handler is plain."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no other cancellation")
    import asyncio

    served, started = serve_sandbox(1, 4), asyncio.Event()
    loop, ended = asyncio.get_running_loop(), list[str]()

    async def on_change(change: Change) -> None:
        if len(ended) == 1:
            started.set()
            await anyio.sleep_forever()
        ended.append(change.meeting_id)

    def plain_handler(change: Change) -> None:
        if len(ended) == 1:
            loop.call_soon_threadsafe(started.set)
            task_is_canceled.wait(20)
        ended.append(change.meeting_id)

    task_is_canceled = threading.Event()
    handler = plain_handler if plain else on_change
    task = asyncio.create_task(sync_meetings(served.clients(), store, on_change=handler))
    await started.wait()
    task.cancel()
    loop.call_later(0.05, task_is_canceled.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    pending = await outbox(store, pending=True)
    assert (1 + plain, 3 - plain) == (len(ended), len(pending))
    assert set(ended).isdisjoint(change.meeting_id for change in pending)


async def test_executor_shut_down(serve_sandbox: Any, anyio_backend_name: str) -> None:
    """The executor cancels the future that a handler awaits: that account fails, the run continues."""
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

    report = await sync_meetings(serve_sandbox(2, 1).clients(), MemoryStore(), on_change=on_change)
    release.set()
    assert (2, 2) == (report.accounts, report.failed)
    kinds_of_errors = sorted(type(failure.error).__name__ for failure in report.failures)
    assert [
        "CanceledElsewhereError",
        "RuntimeError",
    ] == kinds_of_errors  # the second account finds it shut down


class Marks(MemoryStore):
    """A store that records the size of each batch of marks."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[int] = []

    async def mark_delivered(self, changes: Sequence[Change]) -> int:
        """Record the size."""
        self.marks.append(len(changes))
        return await super().mark_delivered(changes)


async def accept(_: object) -> None:
    """Accept any change."""


@pytest.mark.parametrize("handler", [{"on_change": accept}, {"on_change": str}, {"on_changes": accept}])
async def test_marks_are_written_in_batches(serve_sandbox: Any, handler: Any) -> None:
    """Changes are marked in small batches, which limits what a crash can repeat."""
    store = Marks()
    report = await sync_meetings(serve_sandbox(1, BATCH + 10).clients(), store, **handler)
    assert (0, BATCH + 10) == (report.failed, report.delivered)
    assert [BATCH, 10] == store.marks


async def test_slow_marking(serve_sandbox: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run waits for the marks. A canceled run waits briefly, and then their changes are delivered again."""
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

    served, store = serve_sandbox(1, 2), Slow()
    assert 0 == (await sync_meetings(served.clients(), store, on_change=accept)).failed
    assert [] == await outbox(store, pending=True)
    served.sandbox.book()
    store.hangs = True
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: sync_meetings(served.clients(), store, on_change=accept))
            await stalled.wait()
            tasks.cancel_scope.cancel()
    assert ["created"] == await kinds(store, pending=True)


async def test_failed_marking(serve_sandbox: Any) -> None:
    """A failed mark is reported as a store failure, and the changes are delivered again."""

    class Broken(MemoryStore):
        async def mark_delivered(self, changes: Sequence[Change]) -> int:
            raise StoreError("the disk is full")

    served, store = serve_sandbox(1, 2), Broken()
    (failure,) = (await sync_meetings(served.clients(), store, on_change=accept)).failures
    assert ("store", "the disk is full") == (failure.stage, str(failure.error))
    assert 2 == len(await outbox(store, pending=True))


@pytest.mark.parametrize("handler", [accept, str])
async def test_slow_handlers_are_marked_more_often(
    serve_sandbox: Any, handler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes are marked after a time limit: here, after each change."""
    monkeypatch.setattr("lemcal_async.sync._delivery.MARK_AFTER", 0.0)
    store = Marks()
    await sync_meetings(serve_sandbox(1, 3).clients(), store, on_change=handler)
    assert [1, 1, 1] == store.marks


async def test_delivery_by_another_process(serve_sandbox: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next batch excludes changes that another process has delivered."""
    monkeypatch.setattr("lemcal_async.sync._delivery.BATCH", 2)
    served, store = serve_sandbox(1, 4), MemoryStore()
    accepted: list[str] = []

    async def on_change(change: Change) -> None:
        accepted.append(change.meeting_id)
        if len(accepted) == 1:
            await store.mark_delivered(await store.pending(change.user_id, 3))

    report = await sync_meetings(served.clients(), store, on_change=on_change)
    ids = [row["_id"] for row in served.sandbox.meetings()]
    assert ([ids[0], ids[1], ids[3]], 3) == (accepted, report.delivered)


async def test_lists_of_changes(store: Store, serve_sandbox: Any) -> None:
    """``on_changes`` gets each account's changes as a list, in order; a plain function works too."""
    served = serve_sandbox(2, 4)
    accepted: list[list[Change]] = []
    report = await sync_meetings(served.clients(), store, on_changes=accepted.append)
    assert (0, 8) == (report.failed, report.delivered)
    listed = {served.clients()[index].user_id: served.sandbox.meetings(index) for index in range(2)}
    assert {user_id: [row["_id"] for row in rows] for user_id, rows in listed.items()} == {
        changes[0].user_id: [change.meeting_id for change in changes] for changes in accepted
    }
    assert [] == await outbox(store, pending=True)


async def test_failing_list(serve_sandbox: Any) -> None:
    """No change of a failing list counts as delivered. Next time, each change is delivered alone."""
    served, store = serve_sandbox(1, 4), MemoryStore()
    bad = served.sandbox.meetings()[1]["_id"]
    lists: list[list[str]] = []

    async def on_changes(changes: list[Change]) -> None:
        lists.append([change.meeting_id for change in changes])
        if bad in lists[-1]:
            raise ValueError("no such contact")

    clients, ids = served.clients(), [row["_id"] for row in served.sandbox.meetings()]
    reports = [await sync_meetings(clients, store, on_changes=on_changes, max_attempts=3) for _ in range(4)]
    assert [ids, ids[:1], ids[1:2], ids[1:2], ids[2:3], ids[3:]] == lists
    assert [(1, 0, 0), (1, 1, 0), (1, 2, 1), (0, 0, 0)] == [
        (report.failed, report.delivered, report.parked) for report in reports
    ]
    assert [bad] == [change.meeting_id async for change in store.changes(parked=True)]


async def test_change_that_always_fails(serve_sandbox: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The change is parked with its error after ``max_attempts``, and later changes continue in order."""
    served, store = serve_sandbox(1, 4), MemoryStore()
    second = served.sandbox.meetings()[1]["_id"]
    accepted: list[str] = []
    broken = True

    async def on_change(change: Change) -> None:
        if broken and change.meeting_id == second:
            raise ValueError("no such\ncontact")
        accepted.append(change.meeting_id)

    async def run() -> Any:
        return await sync_meetings(served.clients(), store, on_change=on_change, max_attempts=3)

    reports = [await run() for _ in range(4)]
    assert [(1, 1, 0), (1, 0, 0), (1, 2, 1), (0, 0, 0)] == [
        (report.failed, report.delivered, report.parked) for report in reports
    ]
    ids = [row["_id"] for row in served.sandbox.meetings()]
    assert [ids[0], ids[2], ids[3]] == accepted
    (parked,) = [change async for change in store.changes(parked=True)]
    assert (second, 3, "ValueError: no such contact") == (parked.meeting_id, parked.attempts, parked.error)
    assert [] == await outbox(store, pending=True)
    assert f"change {parked.seq} (created {second}) is parked after 3 attempts" in caplog.text

    served.sandbox.book()
    broken = False
    assert 1 == await store.retry_parked(served.sandbox.user_id)
    assert (0, 2, 0) == ((report := await run()).failed, report.delivered, report.parked)
    assert second == accepted[3]


async def test_handler_awaiting_canceled_future(serve_sandbox: Any, anyio_backend_name: str) -> None:
    """The handler's account fails; the run continues and reports the other accounts."""
    served, store = serve_sandbox(8, 1), MemoryStore()
    canceled_id = served.sandbox.meetings(3)[0]["_id"]

    async def on_change(change: Change) -> None:
        if change.meeting_id == canceled_id:
            await await_canceled(anyio_backend_name)

    report = await sync_meetings(served.clients(), store, on_change=on_change)
    assert (8, 1, 7) == (report.accounts, report.failed, report.delivered)
    (failure,) = report.failures
    assert (served.sandbox.accounts[3].user_id, "delivery") == (failure.user_id, failure.stage)
    assert "canceled from elsewhere" in str(failure.error)
    assert [canceled_id] == [change.meeting_id for change in await outbox(store, pending=True)]


@pytest.mark.parametrize("at_once", [False, True])
async def test_handler_canceling_its_own_task(
    serve_sandbox: Any, anyio_backend_name: str, *, at_once: bool
) -> None:
    """The account fails at the next await of the handler or of the library, and the run continues."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no other cancellation than a scope's")
    import asyncio

    served, store = serve_sandbox(8, 2), MemoryStore()
    first = served.sandbox.meetings(3)[0]["_id"]

    async def on_change(change: Change) -> None:
        if change.meeting_id == first:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            if at_once:
                await anyio.sleep(20)

    for concurrency in (1, 4) if at_once else (1,):  # that worker has other accounts left
        report = await sync_meetings(
            served.clients(), store, on_change=on_change, max_concurrency=concurrency, max_attempts=9
        )
        assert (8, 1) == (report.accounts, report.failed)
        assert [served.sandbox.accounts[3].user_id] == [failure.user_id for failure in report.failures]
    assert [2, 0] * at_once == [change.attempts for change in await outbox(store, pending=True)]


async def test_cancellation_of_all_tasks(
    serve_sandbox: Any, anyio_backend_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """When a server shuts down, the run ends and reports no failed account."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no other cancellation than a scope's")
    import asyncio

    served, before = serve_sandbox(6, 2), asyncio.all_tasks()

    async def on_change(_: Change) -> None:
        for task in asyncio.all_tasks() - before:
            task.cancel()
        await anyio.sleep(20)

    task = asyncio.create_task(sync_meetings(served.clients(), MemoryStore(), on_change=on_change))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [] == caplog.records


async def test_plain_handler_raising_cancelled_error(serve_sandbox: Any) -> None:
    """A plain handler may raise CancelledError, for example from an event loop of its own."""
    import asyncio

    def on_change(_: Change) -> None:
        raise asyncio.CancelledError

    report = await sync_meetings(serve_sandbox(2, 1).clients(), MemoryStore(), on_change=on_change)
    assert (2, 2, 0) == (report.accounts, report.failed, report.delivered)


async def await_canceled(backend: str) -> None:
    """Await something that was canceled elsewhere: a future, or a trio task."""
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
