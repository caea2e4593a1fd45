"""Handlers get each change, in order and at least once; what they do not take comes again."""

import logging
from typing import Any

import anyio
import pytest

from lemcal_async.sync import Change, MemoryStore, Store, sync_meetings

from .conftest import kinds, outbox

pytestmark = pytest.mark.anyio


async def test_each_change_once(store: Store, worlds: Any) -> None:
    """In order per account; what was taken does not come again."""
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
    """A handler need not be async."""
    taken: list[str] = []
    world = worlds(1, 2)
    await sync_meetings(world.clients(), MemoryStore(), on_change=lambda change: taken.append(change.kind))
    assert ["created", "created"] == taken


async def test_without_a_handler_they_wait(worlds: Any) -> None:
    """A later run delivers them first."""
    world, store = worlds(1, 2), MemoryStore()
    await sync_meetings(world.clients(), store)
    world.sandbox.cancel(world.sandbox.meetings()[0]["_id"])
    taken: list[str] = []
    await sync_meetings(world.clients(), store, on_change=lambda change: taken.append(change.kind))
    assert ["created", "created", "canceled"] == taken


async def test_a_handler_that_fails(store: Store, worlds: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Its account stops there, is reported, and goes on from there in the next run; others go on now."""
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
    assert [RuntimeError] == [record.exc_info[0] for record in caplog.records if record.exc_info]
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
    """Run by run, all changes are delivered, in order."""
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
    """The outbox does not wait for the next list."""
    world, store = worlds(1, 2), MemoryStore()
    await sync_meetings(world.clients(), store)
    wrong = world.lemcal.for_account(world.sandbox.user_id, "wrong")
    report = await sync_meetings([wrong], store, on_change=lambda _: None)
    assert (1, 2) == (report.failed, report.delivered)


async def test_cancelled_in_the_handler(store: Store, worlds: Any) -> None:
    """The change that the handler was at comes again, those before it do not."""
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


async def test_cancelled_when_the_handler_has_returned(store: Store, worlds: Any) -> None:
    """What it took is marked in any case."""
    world = worlds(1, 3)

    def on_change(_: Change) -> None:
        scope.cancel()

    with anyio.CancelScope() as scope:
        await sync_meetings(world.clients(), store, on_change=on_change)
    assert 2 == len(await outbox(store, pending=True))


async def test_somebody_else_delivers_too(worlds: Any) -> None:
    """What another process has taken meanwhile is left out."""
    world, store = worlds(1, 4), MemoryStore()
    taken: list[str] = []

    async def on_change(change: Change) -> None:
        taken.append(change.meeting_id)
        if len(taken) == 1:
            await store.mark_delivered(await store.pending(change.user_id, 3))

    report = await sync_meetings(world.clients(), store, on_change=on_change)
    ids = [row["_id"] for row in world.sandbox.meetings()]
    assert ([ids[0], ids[3]], 2) == (taken, report.delivered)
