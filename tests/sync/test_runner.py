"""The run: how many at a time, what a failure stops, and what cancellation leaves."""

from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from lemcal_async import AsyncLemcal, events
from lemcal_async.errors import (
    APIConnectionError,
    ConfigurationError,
    ResponseDecodeError,
    ServerError,
)
from lemcal_async.sandbox import faults
from lemcal_async.sync import EmptyListError, MemoryStore, SQLStore, StoreError, sync_meetings

from .conftest import Database, kinds

pytestmark = pytest.mark.anyio


async def test_no_accounts() -> None:
    """Nothing to do is no failure."""
    report = await sync_meetings([], MemoryStore())
    assert (0, 0) == (report.accounts, report.failed)


async def test_accounts_are_taken_as_they_are_needed(worlds: Any) -> None:
    """A generator is ahead of the work by no more than what is in flight."""
    world = worlds(30, 1)
    made = done = ahead = 0

    def accounts() -> Iterator[AsyncLemcal]:
        nonlocal made, ahead
        for client in world.clients():
            made += 1
            ahead = max(ahead, made - done)
            yield client

    def count(event: events.Event) -> None:
        nonlocal done
        done += isinstance(event, events.AccountSynced)

    leave = events.subscribe(count)
    try:
        report = await sync_meetings(accounts(), MemoryStore(), max_concurrency=4)
    finally:
        leave()
    assert (30, 30, 30) == (made, done, report.accounts)
    assert 4 == ahead


async def test_an_event_per_account(worlds: Any) -> None:
    """It tells what became of it, for metrics."""
    world = worlds(2, 3)
    heard: list[Any] = []
    leave = events.subscribe(heard.append)
    try:
        good, bad = world.clients()
        await sync_meetings([good, world.lemcal.for_account(bad.user_id, "wrong")], MemoryStore())
    finally:
        leave()
    synced = {event.user_id: event for event in heard if isinstance(event, events.AccountSynced)}
    assert (False, 3, 0) == (
        synced[good.user_id].failed,
        synced[good.user_id].created,
        synced[good.user_id].changed,
    )
    assert (True, 0) == (synced[bad.user_id].failed, synced[bad.user_id].created)
    assert synced[good.user_id].seconds > 0


async def test_what_the_generator_raises(worlds: Any) -> None:
    """It comes out as it is, and the accounts before it are done."""
    world = worlds(3, 2)
    store = MemoryStore()

    def accounts() -> Iterator[AsyncLemcal]:
        yield from world.clients()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await sync_meetings(accounts(), store, max_concurrency=2)
    assert ["created"] * 6 == await kinds(store)


async def test_a_key_that_cannot_be_had(worlds: Any) -> None:
    """A function that returns the key may fail: that is its account's failure."""
    world = worlds(1, 2)

    def key() -> str:
        raise LookupError("the vault is closed")

    report = await sync_meetings([world.lemcal.for_account("usr_x", key), *world.clients()], MemoryStore())
    assert (2, 1, 2) == (report.accounts, report.failed, report.created)
    (failure,) = report.failures
    assert (None, "fetch", "the vault is closed") == (failure.user_id, failure.stage, str(failure.error))


async def test_an_account_twice(worlds: Any) -> None:
    """One of them is first, and the other finds nothing new."""
    world = worlds(1, 5)
    report = await sync_meetings(world.clients() * 3, MemoryStore())
    assert (0, 5, 10) == (report.failed, report.created, report.unchanged)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (faults.truncated(), APIConnectionError),
        (faults.reset_after_processing(), APIConnectionError),
        (faults.html_200(), ResponseDecodeError),
        (faults.empty_200(), ResponseDecodeError),
        (faults.empty_string_200(), ResponseDecodeError),
        (faults.json({"message": "[]"}), ResponseDecodeError),
        (faults.json(None), ResponseDecodeError),
        (faults.status(500), ServerError),
        (faults.json([]), EmptyListError),
        (faults.json({"meetings": []}), EmptyListError),
    ],
)
async def test_no_failure_is_taken_for_an_empty_account(worlds: Any, fault: Any, error: Any) -> None:
    """Whatever comes in place of the list, nothing disappears, and the next run finds all as it was."""
    world, store = worlds(2, 6), MemoryStore()
    await sync_meetings(world.clients(), store)
    world.sandbox.inject(fault)
    report = await sync_meetings(world.clients(), store, max_concurrency=1)
    assert (1, 0, 6) == (report.failed, report.disappeared, report.unchanged)
    assert error is type(report.failures[0].error)
    assert 12 == (await sync_meetings(world.clients(), store)).unchanged


async def test_an_envelope_is_a_list(worlds: Any) -> None:
    """As other integrations have seen it."""
    world, store = worlds(1, 3), MemoryStore()
    world.sandbox.inject(faults.json({"data": world.sandbox.meetings()}))
    assert 3 == (await sync_meetings(world.clients(), store)).created


async def test_an_account_that_was_emptied(worlds: Any) -> None:
    """The second empty list in a row is believed."""
    world, store = worlds(1, 5), MemoryStore()
    await sync_meetings(world.clients(), store)
    for row in world.sandbox.meetings():
        world.sandbox.remove(row["_id"])
    (failure,) = (await sync_meetings(world.clients(), store)).failures
    assert ("store", EmptyListError) == (failure.stage, type(failure.error))
    assert 5 == (await sync_meetings(world.clients(), store)).disappeared


async def test_rows_that_cannot_be_read_are_reported(worlds: Any) -> None:
    """With their account; they fail nothing."""
    world = worlds(1, 0)
    world.sandbox.inject(faults.json([{"_id": "mee_1", "start": 5}, {"_id": "mee_2"}]))
    report = await sync_meetings(world.clients(), MemoryStore())
    assert (0, 2) == (report.failed, report.created)
    assert [(world.sandbox.user_id, 0)] == [(bad.user_id, bad.row.index) for bad in report.unreadable_rows]


async def test_a_failure_holds_on_to_nothing(worlds: Any) -> None:
    """A run of many accounts keeps no frames of those that failed."""
    world = worlds(1, 2)
    report = await sync_meetings([world.lemcal.for_account("usr_x", "wrong")], MemoryStore())
    error = report.failures[0].error
    assert (None, None, None) == (error.__traceback__, error.__cause__, error.__context__)


async def test_a_store_that_fails(worlds: Any) -> None:
    """Each account says so; and a failure that cannot be noted is still in the report."""

    class Broken(MemoryStore):
        async def apply(self, *_: Any, **__: Any) -> Any:
            raise StoreError("the disk is full")

        async def record_failure(self, *_: Any) -> None:
            raise StoreError("the disk is full")

    world = worlds(2, 2)
    clients = [*world.clients(), world.lemcal.for_account("usr_x", "wrong")]
    report = await sync_meetings(clients, Broken())
    assert ["fetch", "store", "store"] == sorted(failure.stage for failure in report.failures)


async def test_another_process_is_always_faster(worlds: Any) -> None:
    """Then the account is in step by its work; the list is fetched anew a few times, not for ever."""

    class Contended(MemoryStore):
        async def apply(self, *_: Any, **__: Any) -> None:
            return None

    world = worlds(1, 2)
    report = await sync_meetings(world.clients(), Contended())
    assert (1, 0, 0) == (report.accounts, report.failed, report.created)
    assert 3 == len(world.sandbox.requests)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_concurrency": 0}, "max_concurrency=0"),
        ({"confirm_empty_after": 0.5}, "confirm_empty_after=0.5"),
        ({"on_change": "print"}, "on_change= must be a function"),
        ({"store": "sqlite:///x.db"}, "store= must be a store"),
        ({"store": MemoryStore}, "store= must be a store"),
    ],
)
async def test_wrong_use(options: dict[str, Any], problem: str) -> None:
    """It is said before anything is sent."""
    options = {"store": MemoryStore(), **options}
    with pytest.raises(ConfigurationError, match=problem):
        await sync_meetings([], **options)


@pytest.mark.parametrize("native", [False, True])
async def test_cancelled_at_any_moment(
    database: Database, worlds: Any, anyio_backend: str, *, native: bool
) -> None:
    """Accounts are whole or untouched, and another run sets everything right."""
    if native and anyio_backend != "asyncio":
        pytest.skip("trio has no other cancellation")
    world = worlds(6, 10)
    async with SQLStore(database.url) as store:
        for number in range(8):
            for account in range(6):
                world.sandbox.book(account)
            await cancelled(
                sync_meetings(world.clients(), store, max_concurrency=3), 0.006 * number, native=native
            )
            assert [] == database.query(
                "SELECT meeting_id FROM meetings WHERE (user_id, meeting_id) NOT IN "
                "(SELECT user_id, meeting_id FROM changes)"
            )
        await sync_meetings(world.clients(), store)
        report = await sync_meetings(world.clients(), store)
        assert (0, 6 * 18) == (report.failed, report.unchanged)
        assert ["created"] * (6 * 18) == await kinds(store)


async def cancelled(work: Any, seconds: float, *, native: bool) -> None:
    """Await something for so long, and cancel it."""
    if not native:
        with anyio.move_on_after(seconds):
            await work
        return
    import asyncio

    task = asyncio.ensure_future(work)
    await asyncio.sleep(seconds)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
