"""The database: its contents for analysts, and errors when it cannot be used."""

import pickle
import random
import socket
import sqlite3
import subprocess
import sys
import threading
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import psycopg
import pytest

from lemcal_async.errors import ConfigurationError
from lemcal_async.sync import SQLStore, StoreError, _database as database, _lists, _statements, _transactions
from lemcal_async.sync._database import _set_up_sqlite
from lemcal_async.sync._store import Forgotten
from lemcal_async.sync._tables import metadata
from lemcal_async.sync._transactions import Transactions

from .conftest import Database, kinds, outbox
from .test_store import apply_list, rows

USER = "usr_1"
PUBLIC = {
    "_id": "mee_1",
    "meetingTypeId": "met_1",
    "meetingTypeName": "Discovery",
    "start": "2026-01-05T09:00:00.000+01:00",
    "end": "2026-01-05T08:30:00.000Z",
    "createdAt": "2026-01-01T08:30:00.000Z",
    "attendees": [
        {"email": "host@example.com", "name": "Host", "owner": True},
        {"email": "guest@example.com", "name": "A Guest", "primary": True},
    ],
}
CAMPAIGN = {
    "_id": "mee_2",
    "canceledAt": "2026-01-02T00:00:00.000Z",
    "lead": {"email": "lead@example.com", "firstName": "Lea", "lastName": "D"},
}
COLUMNS = (
    "meeting_id, meeting_type_id, meeting_type_name, guest_email, guest_name, host_email, status, problem"
)


@pytest.mark.anyio
async def test_columns(database: Database, sql_store: SQLStore) -> None:
    """Columns contain guest, host, type, status and the wire row; an odd value only empties its column."""
    odd = {
        "_id": "mee_3",
        "start": "never",
        "meetingTypeName": "Discovery",
        "lead": {"email": "l@example.com"},
    }
    await apply_list(sql_store, [PUBLIC, CAMPAIGN, odd])
    public, campaign, unreadable = database.query(f"SELECT {COLUMNS} FROM meetings ORDER BY meeting_id")
    assert (
        "mee_1", "met_1", "Discovery", "guest@example.com", "A Guest", "host@example.com", "booked", None,
    ) == public  # fmt: skip
    assert ("mee_2", None, None, "lead@example.com", "Lea D", None, "canceled", None) == campaign
    assert ("mee_3", None, "Discovery", "l@example.com", None, None, "booked") == unreadable[:-1]
    assert "start: expected an ISO 8601 time with an offset, got text that is not one" == unreadable[-1]
    assert [PUBLIC, CAMPAIGN, odd] == [change.wire for change in await outbox(sql_store)]


@pytest.mark.anyio
async def test_times_are_in_utc(database: Database, sql_store: SQLStore) -> None:
    """Times are stored in UTC, whatever their original time zone."""
    await apply_list(sql_store, [PUBLIC])
    ((start,),) = database.query("SELECT start_at FROM meetings")
    if isinstance(start, str):  # SQLite
        assert "2026-01-05 08:00:00.000000" == start
    else:
        assert datetime(2026, 1, 5, 8, tzinfo=UTC) == start


@pytest.mark.anyio
async def test_first_and_last_seen(database: Database, sql_store: SQLStore) -> None:
    """While a meeting is listed, its account's time counts as last seen; later it has its own time."""
    query = "SELECT first_seen_at, last_seen_at FROM meetings WHERE meeting_id = 'mee_2'"
    synced = "SELECT synced_at FROM accounts"
    await apply_list(sql_store, rows(3))
    ((first, last),) = database.query(query)
    assert last is None
    await apply_list(sql_store, rows(3))
    ((last_in_step,),) = database.query(synced)
    assert first < last_in_step
    await apply_list(sql_store, rows(2))
    await apply_list(sql_store, rows(2))
    assert [(first, last_in_step)] == database.query(query)
    await apply_list(sql_store, rows(3))
    assert [(first, None)] == database.query(query)


@pytest.mark.anyio
async def test_unchanged_run_writes_no_meeting(database: Database, sql_store: SQLStore) -> None:
    """Only the account's row is written: a database of old bookings does not grow with each run."""
    await apply_list(sql_store, rows(3))
    before = database.query("SELECT * FROM meetings ORDER BY meeting_id")
    await apply_list(sql_store, rows(3))
    assert before == database.query("SELECT * FROM meetings ORDER BY meeting_id")


@pytest.mark.anyio
async def test_text_that_databases_reject(sql_store: SQLStore) -> None:
    """Guests choose their names: neither NUL nor a lone surrogate stops an account."""
    odd = [
        {
            "_id": "mee_1",
            "meetingTypeName": "\ud800",
            "a\0": "\0",
            "attendees": [{"email": "a\0b", "name": "\udfff\n"}],
        }
    ]
    await apply_list(sql_store, odd)
    await apply_list(sql_store, odd)
    await sql_store.record_failure(USER, "\0\ud800")
    assert [odd[0]] == [change.wire for change in await outbox(sql_store)]


@pytest.mark.anyio
async def test_text_too_long_for_an_index(database: Database, sql_store: SQLStore) -> None:
    """A long address does not stop an account: the row keeps it, and says why its column is empty."""
    email = "".join(chr(97 + byte % 26) for byte in random.Random(0).randbytes(9000))  # incompressible
    odd = [{"_id": "mee_1", "lead": {"email": email, "firstName": "Guest"}}]
    await apply_list(sql_store, odd)
    assert [odd[0]] == [change.wire for change in await outbox(sql_store)]
    ((stored, name, problem),) = database.query("SELECT guest_email, guest_name, problem FROM meetings")
    assert (None, "Guest") == (stored, name)
    assert "320" in problem


@pytest.mark.anyio
async def test_webhook_deliveries(sql_store: SQLStore) -> None:
    """One process at a time holds a claim, until its release or expiry; a handled delivery stays handled."""
    key = (USER, "mee_1")
    assert ["new", "busy"] == [await sql_store.claim(*key, 60), await sql_store.claim(*key, 60)]
    assert "new" == await sql_store.claim(USER, "mee_2", 60)
    await sql_store.release(*key)
    assert "new" == await sql_store.claim(*key, -1)
    assert "new" == await sql_store.claim(*key, 60)
    await sql_store.done(*key)
    await sql_store.release(*key)
    assert "done" == await sql_store.claim(*key, 60)
    await sql_store.forget(USER)
    assert "new" == await sql_store.claim(*key, 60)
    await sql_store.done(*key)
    await sql_store.prune(before=datetime(2999, 1, 1, tzinfo=UTC))
    assert "new" == await sql_store.claim(*key, 60)
    await sql_store.forget(USER)
    await sql_store.done(*key)
    assert "done" == await sql_store.claim(*key, 60)


@pytest.mark.anyio
async def test_concurrent_claims(database: Database) -> None:
    """Only one of several concurrent claims succeeds."""
    answers: list[str] = []

    async def claim(store: SQLStore) -> None:
        answers.append(await store.claim(USER, "mee_1", 60))

    async with (
        SQLStore(database.url) as first,
        SQLStore(database.url) as second,
        anyio.create_task_group() as tasks,
    ):
        for number in range(20):
            tasks.start_soon(claim, (first, second)[number % 2])
    assert (["busy"] * 19, 1) == (sorted(answers)[:19], answers.count("new"))


@pytest.mark.anyio
async def test_forgotten_data_is_in_no_file(sqlite_database: Database, tmp_path: Path) -> None:
    """SQLite overwrites the data and empties its log."""
    async with SQLStore(sqlite_database.url) as store:
        await apply_list(store, [PUBLIC])
        assert any_file_contains(tmp_path, b"guest@example.com")
        await store.forget(USER)
        assert not any_file_contains(tmp_path, b"guest@example.com")


def any_file_contains(folder: Path, text: bytes) -> bool:
    """Return whether any file in a folder contains the text."""
    return any(text in file.read_bytes() for file in folder.iterdir())


@pytest.mark.anyio
async def test_one_thread_per_write(sqlite_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite has one writer, so there is one thread; the event loop's thread does no work."""
    seen: set[int] = set()
    at_once = 0
    original = Transactions._transaction

    def spy(*args: Any, **options: Any) -> Any:
        nonlocal at_once
        at_once += 1
        assert 1 == at_once
        seen.add(threading.get_ident())
        try:
            return original(*args, **options)
        finally:
            at_once -= 1

    monkeypatch.setattr(Transactions, "_transaction", spy)
    async with SQLStore(sqlite_database.url) as store, anyio.create_task_group() as tasks:
        for number in range(10):
            tasks.start_soon(store.record_failure, f"usr_{number}", "no")
    assert threading.get_ident() not in seen


@pytest.mark.anyio
@pytest.mark.parametrize("end", ["answered", "canceled"])
async def test_concurrent_revision_requests(
    sql_store: SQLStore, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """One query reads all revisions once a thread is free, even if the first caller is canceled."""
    go, begun, found, read = threading.Event(), threading.Semaphore(0), dict[str, int](), _lists.revisions
    queried: list[list[str]] = []

    def revisions(raw: Any, user_ids: list[str]) -> dict[str, int]:
        queried.append(list(user_ids))
        begun.release()
        go.wait(10)
        return read(raw, user_ids)

    async def ask(user_id: str) -> None:
        found[user_id] = await sql_store.revision(user_id)

    user_ids = [f"usr_{number}" for number in range(6)]
    await apply_list(sql_store, rows(1), user_id="usr_4")
    monkeypatch.setattr(_lists, "revisions", revisions)
    threads = _transactions._THREADS[sql_store._transactions.address.backend]
    async with anyio.create_task_group() as tasks:
        for number in range(threads):
            tasks.start_soon(ask, f"busy_{number}")
            await anyio.to_thread.run_sync(begun.acquire)
        first = anyio.CancelScope()

        async def ask_first() -> None:
            with first:
                await ask("first")

        tasks.start_soon(ask_first)
        await anyio.wait_all_tasks_blocked()
        for user_id in user_ids:
            tasks.start_soon(ask, user_id)
        await anyio.wait_all_tasks_blocked()
        if end == "canceled":
            first.cancel()
            await anyio.wait_all_tasks_blocked()
        go.set()
    assert [0, 0, 0, 0, 1, 0] == [found[user_id] for user_id in user_ids]
    if end == "answered":
        assert ["first", *user_ids] == sorted(queried[threads])
        assert threads + 1 == len(queried)
    assert (end == "canceled") == ("first" not in found)


def test_one_store_in_several_loops(sqlite_database: Database) -> None:
    """A store works in successive event loops of either kind; after closing, it reopens."""
    store = SQLStore(sqlite_database.url)

    async def use() -> int:
        await apply_list(store, rows(1))
        await store.aclose()
        await store.aclose()
        return await store.revision(USER)

    assert [1, 2] == [anyio.run(use, backend=backend) for backend in ("asyncio", "trio")]
    anyio.run(store.aclose)


@pytest.mark.anyio
async def test_native_cancellation(sqlite_database: Database, anyio_backend: str) -> None:
    """A task that asyncio cancels natively leaves a complete transaction and no open connection."""
    if anyio_backend != "asyncio":
        pytest.skip("trio has no other cancellation")
    import asyncio

    async with SQLStore(sqlite_database.url) as store:
        for number in range(20):
            task = asyncio.create_task(apply_list(store, rows(300), user_id=f"usr_{number}"))
            await asyncio.sleep(0.001 * number)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    counts = sqlite_database.query("SELECT count(*) FROM meetings GROUP BY user_id")
    assert {(300,)} >= set(counts)
    assert counts == sqlite_database.query("SELECT count(*) FROM changes GROUP BY user_id")


# Databases that cannot be used.


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "the database URL is invalid"),
        ("lemcal.db", "the database URL is invalid"),
        (None, "the database URL is invalid"),
        ("postgresql://h:port/x", "the database URL is invalid"),
        ("mysql://user:hush@h/x", "the database URL has an unsupported scheme"),
        ("postgresql+asyncpg://user:hush@h/x", "the database URL has an unsupported scheme"),
        ("sqlite+aiosqlite:///hush", "the database URL has an unsupported scheme"),
        ("postgresql://bob:hush@ss/w0rd@host/db", "an @ or a [?] in an unexpected place: .* write %40 for @"),
        ("postgresql://bob:hush@s?s@host/db", "an @ or a [?] in an unexpected place"),
        ("postgresql://bob:a@hush@host/db", "an @ or a [?] in an unexpected place"),
        ("postgresql://bob:a@host/db?hush", "an @ or a [?] in an unexpected place"),
        ("sqlite://", r"an in-memory SQLite database is not supported: use MemoryStore\(\)"),
        ("sqlite:///:memory:", r"an in-memory SQLite database is not supported: use MemoryStore\(\)"),
    ],
)
def test_invalid_urls(url: Any, problem: str) -> None:
    """The message shows an example and quotes nothing of the URL, which may contain a password."""
    with pytest.raises(ConfigurationError, match=problem) as caught:
        SQLStore(url)
    shown = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    assert "hush" not in shown.replace(repr(url), "")  # this test's own variable


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://bob:p%40ss%2Fw%3Frd@host/db", "postgresql://bob@host/db"),
        ("postgresql://bob:p/w?rd@host/db?connect_timeout=1", "postgresql://bob@host/db"),
        ("postgresql:///db?host=/run/a@b", "postgresql:///db"),
        ("postgresql://bob@host", "postgresql://bob@host"),
        ("sqlite:////home/a@b/c@d.db", "sqlite:////home/a@b/c@d.db"),
    ],
)
def test_unambiguous_urls(url: str, shown: str) -> None:
    """An @ is accepted if only one reading is possible."""
    assert f"<SQLStore {shown}>" == repr(SQLStore(url))


def test_password_is_not_shown() -> None:
    """No repr contains the password."""
    store = SQLStore("postgresql://user:hush-hush@h.example/lemcal?sslpassword=hush")
    assert "<SQLStore postgresql://user@h.example/lemcal>" == repr(store)
    assert "hush" not in repr(vars(store))
    with pytest.raises(TypeError):
        pickle.dumps(store)


@pytest.mark.anyio
async def test_missing_server() -> None:
    """One line with the reason, without the password."""
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = occupied.getsockname()[1]
    store = SQLStore(f"postgresql://user:hush-hush@127.0.0.1:{port}/lemcal")
    with pytest.raises(
        StoreError, match=rf"postgresql://user@127.0.0.1:{port}/lemcal: .*[Cc]onnection"
    ) as caught:
        await store.open()
    assert_plain(caught.value)


@pytest.mark.anyio
async def test_unknown_database(postgres: str) -> None:
    """The error contains the server's message."""
    store = SQLStore(postgres.replace("/postgres?", "/nothere?"))
    with pytest.raises(StoreError, match='database "nothere" does not exist') as caught:
        await store.open()
    assert_plain(caught.value)


def assert_plain(error: BaseException) -> None:
    """Check that an error is one line and is not chained to another one."""
    assert str(error) == " ".join(str(error).split())
    assert "hush" not in str(error)
    assert (None, None) == (error.__cause__, error.__context__)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(error), str(error)) == (type(copy), str(copy))


@pytest.mark.anyio
async def test_tables_of_a_newer_version(database: Database) -> None:
    """Newer tables are left unchanged, and the error says what to do."""
    async with SQLStore(database.url) as store:
        await apply_list(store, rows(1))
    database.query("UPDATE lemcal_schema SET version = 99")
    with pytest.raises(
        ConfigurationError, match=r"version 99, but .* lemcal-async supports only .* upgrade lemcal-async"
    ):
        await apply_list(SQLStore(database.url), rows(2))
    assert [(1,)] == database.query("SELECT count(*) FROM meetings")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("CREATE TABLE meetings (room TEXT)", "table 'meetings'"),
        ("CREATE VIEW meetings AS SELECT 1 AS room", "view 'meetings'"),
        ("CREATE VIEW lemcal_schema AS SELECT 1 AS version", "view 'lemcal_schema'"),
    ],
)
async def test_database_of_another_program(database: Database, statement: str, found: str) -> None:
    """The database is rejected and left unchanged, whether a table or a view has one of our names."""
    database.query(statement)
    before = database.relations()
    with pytest.raises(ConfigurationError, match=f"the {found} was not created by lemcal-async"):
        await SQLStore(database.url).open()
    assert before == database.relations()


@pytest.mark.anyio
async def test_materialized_view(postgresql_database: Database) -> None:
    """A materialized view can occupy the name of a table too."""
    postgresql_database.query("CREATE MATERIALIZED VIEW changes AS SELECT 1 AS price")
    with pytest.raises(ConfigurationError, match="the view 'changes' was not created by lemcal-async"):
        await SQLStore(postgresql_database.url).open()


@pytest.mark.anyio
async def test_capitalized_names(database: Database) -> None:
    """SQLite treats "Accounts" and "accounts" as the same table, PostgreSQL as two."""
    database.query('CREATE TABLE "Accounts" (balance INTEGER)')
    if database.url.startswith("sqlite"):
        with pytest.raises(ConfigurationError, match="the table 'Accounts' was not created by lemcal-async"):
            await SQLStore(database.url).open()
        assert [("delete",)] == database.query("PRAGMA journal_mode")  # the file is unchanged
    else:
        async with SQLStore(database.url):
            pass
    assert [] == database.query('SELECT balance FROM "Accounts"')


@pytest.mark.anyio
async def test_missing_database_without_create(database: Database, tmp_path: Path) -> None:
    """With ``create=False``, neither tables nor a file are created."""
    store = SQLStore(database.url, create=False)
    with pytest.raises(ConfigurationError, match="check its name, or run a synchronization first"):
        await store.open()
    assert not any_file_contains(tmp_path, b"")
    async with SQLStore(database.url) as made:
        await apply_list(made, rows(1))
    assert 1 == await store.revision(USER)
    await store.aclose()


@pytest.mark.anyio
async def test_empty_file_without_create(sqlite_database: Database, tmp_path: Path) -> None:
    """With ``create=False``, an empty file stays empty; an error names a file in another format."""
    file = tmp_path / "lemcal.db"
    file.touch()
    with pytest.raises(ConfigurationError, match="check its name, or run a synchronization first"):
        await SQLStore(sqlite_database.url, create=False).open()
    file.write_text("no database, but a text that is long enough to be read as its header" * 10)
    with pytest.raises(StoreError, match="file is not a database"):
        await SQLStore(sqlite_database.url).open()


@pytest.mark.anyio
async def test_missing_folder(tmp_path: Path) -> None:
    """The file cannot be created there."""
    with pytest.raises(StoreError, match="unable to open database file; check that the folder") as caught:
        await SQLStore(f"sqlite:///{tmp_path}/no/such/folder.db").open()
    assert_plain(caught.value)


@pytest.mark.anyio
async def test_locked_file(sqlite_database: Database) -> None:
    """The error names the cause; when the other program has finished, the store works again."""
    async with SQLStore(f"{sqlite_database.url}?timeout=0.05") as store:
        await apply_list(store, rows(1))
        path = sqlite_database.url.removeprefix("sqlite:///")
        other = sqlite3.connect(path)
        try:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreError, match="database is locked; another program holds") as caught:
                await apply_list(store, rows(2))
            assert_plain(caught.value)
            assert ["created"] == await kinds(store)  # reading still works
            async with SQLStore(sqlite_database.url, create=False) as reader:
                assert ["created"] == await kinds(reader)
        finally:
            other.close()
        await apply_list(store, rows(2))
        assert ["created"] * 2 == await kinds(store)


@pytest.mark.anyio
async def test_locked_row(postgresql_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for PostgreSQL's locks has a time limit as well."""
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    async with SQLStore(postgresql_database.url) as store:
        await apply_list(store, rows(1))
        with psycopg.connect(postgresql_database.url) as other:
            other.execute("SELECT * FROM accounts FOR UPDATE")
            with pytest.raises(StoreError, match="due to lock timeout; another program holds") as caught:
                await apply_list(store, rows(2))
            assert_plain(caught.value)
        await apply_list(store, rows(2))
        assert ["created"] * 2 == await kinds(store)


@pytest.mark.anyio
async def test_full_disk(sqlite_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written in part; with free space, the store works again."""

    def small(connection: sqlite3.Connection, record: object) -> None:
        _set_up_sqlite(connection, record)
        connection.execute("PRAGMA max_page_count = 40").close()

    with monkeypatch.context() as patch:
        patch.setattr(database, "_set_up_sqlite", small)
        async with SQLStore(sqlite_database.url) as store:
            await apply_list(store, rows(3))
            with pytest.raises(StoreError, match="database or disk is full; free up space") as caught:
                await apply_list(store, rows(3000))
            assert_plain(caught.value)
    assert [(3, 3)] == sqlite_database.query(
        "SELECT (SELECT count(*) FROM meetings), (SELECT count(*) FROM changes)"
    )
    assert [("ok",)] == sqlite_database.query("PRAGMA integrity_check")
    async with SQLStore(sqlite_database.url) as store:
        await apply_list(store, rows(3000))


@pytest.mark.anyio
async def test_prune_failing_halfway(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is one line, and says what was erased before it."""
    monkeypatch.setattr(_statements, "ACCOUNTS_IN_A_SLICE", 1)
    sqlite = database.url.startswith("sqlite")
    refuse = "BEGIN SELECT RAISE(ABORT, ''); END" if sqlite else "EXECUTE FUNCTION refuse()"
    async with SQLStore(database.url) as store:
        for user_id in ("usr_1", "usr_2", "usr_3"):
            await apply_list(store, rows(3), user_id=user_id)
        if not sqlite:
            database.query(
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE ''; END$$"
            )
        for user_id, done in (("usr_1", ""), ("usr_3", "; already erased: 6 meetings and 0 changes")):
            database.query(
                "CREATE TRIGGER refuse BEFORE UPDATE ON meetings FOR EACH ROW "
                f"WHEN (NEW.user_id = '{user_id}') {refuse}"
            )
            with pytest.raises(StoreError, match=f"(rejected the data|P0001\\)){done}$") as caught:
                await store.prune(before=datetime(2999, 1, 1, tzinfo=UTC))
            assert_plain(caught.value)
            database.query("DROP TRIGGER refuse" + ("" if sqlite else " ON meetings"))
        assert Forgotten(3, 0) == await store.prune(before=datetime(2999, 1, 1, tzinfo=UTC))


@pytest.mark.anyio
async def test_restarted_postgresql(postgresql_database: Database) -> None:
    """Connections that have died are replaced."""
    async with SQLStore(postgresql_database.url) as store:
        await apply_list(store, rows(1))
        postgresql_database.query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE pid <> pg_backend_pid() AND datname = current_database()"
        )
        await apply_list(store, rows(2))
        assert 2 == await store.revision(USER)


@pytest.mark.anyio
async def test_bugs_propagate(sql_store: SQLStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is not the database's propagates, and the transaction is rolled back."""
    await apply_list(sql_store, rows(1))
    monkeypatch.setattr("lemcal_async.sync._lists.plan", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await apply_list(sql_store, rows(2))
    assert (1, ["created"]) == (await sql_store.revision(USER), await kinds(sql_store))


@pytest.mark.anyio
async def test_missing_psycopg(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the package, when a connection needs it."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigurationError, match="psycopg is missing: pip install 'lemcal-async") as caught:
        await SQLStore("postgresql://h.example/x").open()
    assert_plain(caught.value)


def test_table_names() -> None:
    """The names of the tables match the documentation."""
    assert {"accounts", "meetings", "changes", "deliveries", "lemcal_schema"} == set(metadata.tables)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("sqlalchemy", "ImportError: SQLStore requires the extra sql: pip install 'lemcal-async[sql]'"),
        ("typing_extensions", "ModuleNotFoundError: import of typing_extensions halted; None in sys.modules"),
    ],
)
def test_missing_module(module: str, expected: str) -> None:
    """One line names the extra to install; any other missing module is a bug and propagates."""
    code = f"import sys; sys.modules[{module!r}] = None; import lemcal_async.sync as s; s.SQLStore"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (1, expected) == (done.returncode, done.stderr.splitlines()[-1])
