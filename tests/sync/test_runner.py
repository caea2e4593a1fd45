"""A run: concurrency, failures, cancellation, and invalid arguments."""

import logging
from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from lemcal_async import AsyncLemcal, events
from lemcal_async.errors import (
    APIConnectionError,
    AuthenticationError,
    ConfigurationError,
    ResponseDecodeError,
    ServerError,
)
from lemcal_async.sandbox import faults
from lemcal_async.sync import EmptyListError, MemoryStore, SQLStore, StoreError, sync_meetings

from .conftest import Database, kinds

pytestmark = pytest.mark.anyio


async def test_no_accounts() -> None:
    """A run without accounts succeeds."""
    report = await sync_meetings([], MemoryStore())
    assert (0, 0) == (report.accounts, report.failed)


async def test_accounts_are_consumed_lazily(serve_sandbox: Any) -> None:
    """A generator is only advanced as far as the concurrency requires."""
    served = serve_sandbox(30, 1)
    made = done = ahead = 0

    def accounts() -> Iterator[AsyncLemcal]:
        nonlocal made, ahead
        for client in served.clients():
            made += 1
            ahead = max(ahead, made - done)
            yield client

    def count(event: events.Event) -> None:
        nonlocal done
        done += isinstance(event, events.AccountSynced)

    unsubscribe = events.subscribe(count)
    try:
        report = await sync_meetings(accounts(), MemoryStore(), max_concurrency=4)
    finally:
        unsubscribe()
    assert (30, 30, 30) == (made, done, report.accounts)
    assert 4 == ahead


async def test_event_per_account(serve_sandbox: Any) -> None:
    """The event reports the account's outcome, for metrics."""
    served = serve_sandbox(2, 3)
    received: list[Any] = []
    unsubscribe = events.subscribe(received.append)
    try:
        good, bad = served.clients()
        await sync_meetings([good, served.lemcal.for_account(bad.user_id, "wrong")], MemoryStore())
    finally:
        unsubscribe()
    synced = {event.user_id: event for event in received if isinstance(event, events.AccountSynced)}
    assert (False, 3, 0) == (
        synced[good.user_id].failed,
        synced[good.user_id].created,
        synced[good.user_id].changed,
    )
    assert (True, 0) == (synced[bad.user_id].failed, synced[bad.user_id].created)
    assert synced[good.user_id].seconds > 0


async def test_error_from_generator(serve_sandbox: Any) -> None:
    """The error propagates unchanged, after the accounts before it have finished."""
    served = serve_sandbox(3, 2)
    store = MemoryStore()

    def accounts() -> Iterator[AsyncLemcal]:
        yield from served.clients()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await sync_meetings(accounts(), store, max_concurrency=2)
    assert ["created"] * 6 == await kinds(store)


async def test_failing_key_function(serve_sandbox: Any) -> None:
    """If the function that returns the key raises, its account fails; a given user id is reported."""
    served = serve_sandbox(1, 2)
    for given in ("usr_x", None):
        failing = served.lemcal.for_account(given, closed_vault)
        report = await sync_meetings([failing, *served.clients()], MemoryStore())
        assert (2, 1, 2) == (report.accounts, report.failed, report.created)
        (failure,) = report.failures
        assert (given, "fetch", "the vault is closed") == (failure.user_id, failure.stage, str(failure.error))


async def test_duplicate_account(serve_sandbox: Any) -> None:
    """One run of the account comes first, and the others find no changes."""
    served = serve_sandbox(1, 5)
    report = await sync_meetings(served.clients() * 3, MemoryStore())
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
async def test_failures_are_not_empty_lists(serve_sandbox: Any, fault: Any, error: Any) -> None:
    """Whatever the service sends instead of a list, nothing disappears; the next run finds no changes."""
    served, store = serve_sandbox(2, 6), MemoryStore()
    await sync_meetings(served.clients(), store)
    served.sandbox.inject(fault)
    report = await sync_meetings(served.clients(), store, max_concurrency=1)
    assert (1, 0, 6) == (report.failed, report.disappeared, report.unchanged)
    assert error is type(report.failures[0].error)
    assert 12 == (await sync_meetings(served.clients(), store)).unchanged


async def test_list_in_envelope(serve_sandbox: Any) -> None:
    """Other integrations have seen the list in an envelope."""
    served, store = serve_sandbox(1, 3), MemoryStore()
    served.sandbox.inject(faults.json({"data": served.sandbox.meetings()}))
    assert 3 == (await sync_meetings(served.clients(), store)).created


async def test_emptied_account(serve_sandbox: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The second empty list in a row is accepted; the failure does not blame the store for the first."""
    served, store = serve_sandbox(1, 5), MemoryStore()
    await sync_meetings(served.clients(), store)
    for row in served.sandbox.meetings():
        served.sandbox.remove(row["_id"])
    report = await sync_meetings(served.clients(), store)
    (failure,) = report.failures
    assert ("fetch", EmptyListError) == (failure.stage, type(failure.error))
    text = f"account {served.sandbox.user_id}: its list was not accepted"
    assert str(failure).startswith(f"{text}: GET /meetings: an empty list, while 5 meetings are stored")
    assert str(failure) in caplog.text
    with pytest.raises(ExceptionGroup, match="its list was not accepted"):
        report.raise_for_failures()
    assert [text] == failure.error.__notes__
    assert 5 == (await sync_meetings(served.clients(), store)).disappeared


async def test_unreadable_rows_are_reported(serve_sandbox: Any) -> None:
    """The report lists them with their account, and no account fails because of them."""
    served = serve_sandbox(1, 0)
    served.sandbox.inject(faults.json([{"start": 5}, {"_id": "mee_1", "start": 5}, {"_id": "mee_2"}]))
    report = await sync_meetings(served.clients(), MemoryStore())
    assert (0, 2) == (report.failed, report.created)
    assert [(served.sandbox.user_id, 0)] == [(bad.user_id, bad.row.index) for bad in report.unreadable_rows]


async def test_failures_keep_no_frames(serve_sandbox: Any) -> None:
    """Errors in the report keep no frames alive."""
    served = serve_sandbox(1, 2)
    report = await sync_meetings([served.lemcal.for_account("usr_x", "wrong")], MemoryStore())
    error = report.failures[0].error
    assert (None, None, None) == (error.__traceback__, error.__cause__, error.__context__)


async def test_failing_store(serve_sandbox: Any) -> None:
    """Every account reports it, even if the failure itself cannot be recorded."""

    class Broken(MemoryStore):
        async def apply(self, *_: Any, **__: Any) -> Any:
            raise StoreError("the disk is full")

        async def record_failure(self, *_: Any) -> None:
            raise StoreError("the disk is full")

    served = serve_sandbox(2, 2)
    clients = [*served.clients(), served.lemcal.for_account("usr_x", "wrong")]
    report = await sync_meetings(clients, Broken())
    assert ["fetch", "store", "store"] == sorted(failure.stage for failure in report.failures)


async def test_another_process_is_always_faster(serve_sandbox: Any) -> None:
    """The other process keeps the account up to date; the list is fetched a few times, not forever."""

    class Contended(MemoryStore):
        async def apply(self, *_: Any, **__: Any) -> None:
            return None

    served = serve_sandbox(1, 2)
    report = await sync_meetings(served.clients(), Contended())
    assert (1, 0, 0) == (report.accounts, report.failed, report.created)
    assert 3 == len(served.sandbox.requests)


async def test_failures_are_logged(serve_sandbox: Any, caplog: pytest.LogCaptureFixture) -> None:
    """One warning per failed account, even if the report is ignored."""
    served = serve_sandbox(3, 1)
    good, bad, odd = served.clients()
    clients = [good, served.lemcal.for_account(bad.user_id, "wrong")]
    clients.append(served.lemcal.for_account(odd.user_id, closed_vault))
    await sync_meetings(clients, MemoryStore())
    first, second = sorted((record for record in caplog.records), key=lambda record: record.getMessage())
    assert ("lemcal_async.sync", logging.WARNING, None) == (first.name, first.levelno, first.exc_info)
    start = f"account {bad.user_id}: its meetings could not be fetched: GET /meetings: 401"
    assert first.getMessage().startswith(start)
    assert second.getMessage().endswith("could not be fetched: LookupError: the vault is closed")
    assert second.exc_info  # an unexpected error: its traceback may help


def closed_vault() -> str:
    """Raise instead of returning the API key."""
    raise LookupError("the vault is closed")


async def test_raise_for_failures(serve_sandbox: Any) -> None:
    """``raise_for_failures`` raises a group with all errors, or nothing if no account failed."""
    served = serve_sandbox(3, 1)
    clients = served.clients()
    (await sync_meetings(clients, MemoryStore())).raise_for_failures()
    wrong = [served.lemcal.for_account(client.user_id, "wrong") for client in clients[1:]]
    report = await sync_meetings([clients[0], *wrong], MemoryStore())
    with pytest.raises(
        ExceptionGroup, match=r"2 of 3 accounts failed: account usr_.*401.*and 1 more"
    ) as raised:
        report.raise_for_failures()
    assert (AuthenticationError, AuthenticationError) == tuple(map(type, raised.value.exceptions))
    with pytest.raises(ExceptionGroup):
        report.raise_for_failures()
    notes = [note for error in raised.value.exceptions for note in error.__notes__]
    assert {f"account {client.user_id}: its meetings could not be fetched" for client in wrong} == set(notes)
    assert 2 == len(notes)  # one each, however often it is raised


async def test_canceled_key_function(serve_sandbox: Any) -> None:
    """A canceled token refresh fails its account, and the run continues."""
    import asyncio

    served = serve_sandbox(2, 1)

    def canceled() -> str:
        raise asyncio.CancelledError

    accounts = [served.lemcal.for_account("usr_x", canceled), *served.clients()]
    report = await sync_meetings(accounts, MemoryStore())
    assert (3, 1, 2) == (report.accounts, report.failed, report.created)


@pytest.mark.parametrize("step", ["revision", "apply", "unchanged", "pending", "mark_delivered"])
async def test_canceled_store(serve_sandbox: Any, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the store's work is canceled elsewhere, such as by its thread pool, each account fails there."""
    import asyncio

    async def canceled(*_: Any, **__: Any) -> Any:
        raise asyncio.CancelledError

    served, store = serve_sandbox(3, 1), MemoryStore()
    await sync_meetings(served.clients(), store)
    if step == "apply":
        for account in range(3):
            served.sandbox.book(account)
    monkeypatch.setattr(store, step, canceled)
    report = await sync_meetings(served.clients(), store, on_change=str)
    assert (3, 3) == (report.accounts, report.failed)
    assert {"store"} == {failure.stage for failure in report.failures}


async def test_unchanged_list(serve_sandbox: Any) -> None:
    """An unchanged list is recognized by its hash, not compared, and resets the count of empty lists."""
    lists: list[int] = []

    class Counting(MemoryStore):
        async def apply(self, *arguments: Any, **options: Any) -> Any:
            user_id, revision, rows = arguments
            rows = list(rows)
            lists.append(len(rows))
            return await super().apply(user_id, revision, rows, **options)

    served, store = serve_sandbox(1, 5), Counting()
    user_id = served.sandbox.user_id
    await sync_meetings(served.clients(), store)
    await sync_meetings(served.clients(), store)
    report = await sync_meetings(served.clients(), store)
    assert ([5], 5, 3) == (lists, report.unchanged, await store.revision(user_id))
    for _ in range(2):  # an empty list is rejected, and the next list is the old one
        served.sandbox.inject(faults.json([]))
        assert 1 == (await sync_meetings(served.clients(), store)).failed
        assert 5 == (await sync_meetings(served.clients(), store)).unchanged
    served.sandbox.book()
    report = await sync_meetings(served.clients(), store)
    assert ([5, 0, 0, 6], 1, 5) == (lists, report.created, report.unchanged)


async def test_bad_rows_are_reported_each_time(serve_sandbox: Any) -> None:
    """A list with bad rows is compared again, even if it is unchanged."""
    served, store = serve_sandbox(1, 0), MemoryStore()
    for _ in range(2):
        served.sandbox.inject(faults.json([{"_id": "mee_1"}, {"no": "id"}]))
        report = await sync_meetings(served.clients(), store)
        assert [1] == [bad.row.index for bad in report.unreadable_rows]


@pytest.mark.parametrize(
    ("accounts", "problem"),
    [
        ({"usr_1": "key"}, "must not be of type dict: pass clients, such as"),
        ("usr_1", "must not be of type str"),
        (5, "must not be of type int"),
        (["usr_1"], "contains a str; it must contain clients"),
        ([("usr_1", "key")], "contains a tuple; it must contain clients"),
    ],
)
async def test_invalid_accounts(accounts: Any, problem: str) -> None:
    """The error says in one line what to pass."""
    with pytest.raises(ConfigurationError, match=problem) as raised:
        await sync_meetings(accounts, MemoryStore())
    assert "\n" not in str(raised.value)


async def test_single_client(serve_sandbox: Any) -> None:
    """A single client is rejected: it is not a list of clients."""
    with pytest.raises(
        ConfigurationError, match=r"accounts= is a single client: pass clients, such as \[lemcal\]"
    ):
        await sync_meetings(serve_sandbox(1, 1).lemcal, MemoryStore())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_concurrency": 0}, "max_concurrency=0"),
        ({"max_attempts": 0}, "max_attempts=0"),
        ({"on_changes": 5}, "on_changes= must be a function, not int"),
        ({"on_change": lambda: None}, r"on_change= is called as <lambda>\(change\), but does not accept"),
        ({"on_changes": lambda a, b: None}, r"on_changes= is called as <lambda>\(changes\)"),
        ({"on_change": print, "on_changes": print}, "not both"),
        ({"confirm_empty_after": 0.5}, "confirm_empty_after=0.5"),
        ({"on_change": "print"}, "on_change= must be a function"),
        ({"store": "sqlite:///x.db"}, "store= must be a store"),
        ({"store": MemoryStore}, "store= must be a store"),
    ],
)
async def test_invalid_arguments(options: dict[str, Any], problem: str) -> None:
    """Invalid arguments are rejected before anything is sent."""
    options = {"store": MemoryStore(), **options}
    with pytest.raises(ConfigurationError, match=problem):
        await sync_meetings([], **options)


@pytest.mark.parametrize("native", [False, True])
async def test_cancellation_at_any_moment(
    database: Database, serve_sandbox: Any, anyio_backend: str, *, native: bool
) -> None:
    """Each account is updated completely or not at all, and another run completes the work."""
    if native and anyio_backend != "asyncio":
        pytest.skip("trio has no other cancellation")
    served = serve_sandbox(6, 10)
    async with SQLStore(database.url) as store:
        for number in range(8):
            for account in range(6):
                served.sandbox.book(account)
            await run_and_cancel(
                sync_meetings(served.clients(), store, max_concurrency=3), 0.006 * number, native=native
            )
            assert [] == database.query(
                "SELECT meeting_id FROM meetings WHERE (user_id, meeting_id) NOT IN "
                "(SELECT user_id, meeting_id FROM changes)"
            )
        await sync_meetings(served.clients(), store)
        report = await sync_meetings(served.clients(), store)
        assert (0, 6 * 18) == (report.failed, report.unchanged)
        assert ["created"] * (6 * 18) == await kinds(store)


async def run_and_cancel(work: Any, seconds: float, *, native: bool) -> None:
    """Await something for a while, then cancel it."""
    if not native:
        with anyio.move_on_after(seconds):
            await work
        return
    import asyncio

    task = asyncio.ensure_future(work)
    await asyncio.sleep(seconds)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
