"""Failures between a store and PostgreSQL, and differing configurations of PostgreSQL."""

import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import psycopg
import pytest
from sqlalchemy import make_url

from lemcal_async.errors import ConfigurationError, StoreError
from lemcal_async.sync import SQLStore, _database, _transactions
from lemcal_async.sync._psycopg import BoundedConnection

from .conftest import Database, kinds
from .proxy import Proxy
from .test_sql import assert_plain
from .test_store import apply_list, rows

pytestmark = pytest.mark.anyio

USER = "usr_1"


def with_query(url: str, **query: str) -> str:
    """Return a database URL with additional settings."""
    return make_url(url).update_query_dict(query).render_as_string(hide_password=False).replace("+", "%20")


@pytest.fixture
def proxy(postgres: str, tmp_path: Path) -> Iterator[Proxy]:
    """Provide a proxy in front of the server."""
    folder = Path(str(make_url(postgres).query["host"]))
    with Proxy(folder, tmp_path) as proxy:
        yield proxy


@pytest.fixture
def proxied(postgresql_database: Database, proxy: Proxy) -> str:
    """Provide the URL of an empty database behind the proxy."""
    return with_query(postgresql_database.url, host=str(proxy.folder))


# A server that does not respond.


async def test_canceled_caller_does_not_wait_for_server(
    proxied: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller waits briefly; the connection is not used again, and its thread ends."""
    monkeypatch.setattr(_transactions, "_GRACE", 0.05)
    async with SQLStore(proxied) as store:
        await apply_list(store, rows(1))
        proxy.freeze()
        with anyio.fail_after(60), anyio.move_on_after(0.05) as scope:
            await store.revision(USER)
        assert scope.cancelled_caught
        transactions = store._transactions
        with anyio.fail_after(60):
            while transactions._busy:  # noqa: ASYNC110  # a thread sets it
                await anyio.sleep(0.01)
        proxy.thaw()
        await apply_list(store, rows(2))
        assert ["created", "created"] == await kinds(store)


async def test_natively_canceled_caller_does_not_wait_for_server(
    proxied: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, anyio_backend: str
) -> None:
    """The same for a task that asyncio cancels natively."""
    if anyio_backend != "asyncio":
        pytest.skip("trio has no other cancellation")
    import asyncio

    monkeypatch.setattr(_transactions, "_GRACE", 0.05)
    async with SQLStore(proxied) as store:
        await apply_list(store, rows(1))
        proxy.freeze()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await store.revision(USER)
        proxy.thaw()
        await apply_list(store, rows(2))


async def test_canceled_transaction_commits(
    postgresql_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transaction that makes progress is committed within the grace period."""
    entered = threading.Semaphore(0)
    original = _transactions._with_raw

    def slow(*arguments: Any, **options: Any) -> Any:
        entered.release()
        return original(*arguments, **options)

    monkeypatch.setattr(_transactions, "_GRACE", 30.0)
    async with SQLStore(postgresql_database.url) as store:
        monkeypatch.setattr(_transactions, "_with_raw", slow)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(apply_list, store, rows(3))
            for _ in "read the revision", "store":
                await anyio.to_thread.run_sync(entered.acquire)
            tasks.cancel_scope.cancel()
        assert ["created"] * 3 == await kinds(store)


async def test_silent_server_times_out(proxied: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a cancellation: a server that is silent for longer than its own timeout is abandoned."""
    monkeypatch.setattr(_database, "_TIMEOUT_MARGIN", 0.1)
    async with SQLStore(with_query(proxied, statement_timeout="10s")) as store:
        await apply_list(store, rows(1))
        monkeypatch.setattr(BoundedConnection, "max_wait", property(lambda _: 0.2, lambda *_: None))
        proxy.freeze()
        with anyio.fail_after(60), pytest.raises(StoreError, match=r"not responded for 0\.2 s") as caught:
            await store.revision(USER)
        assert_plain(caught.value)
        monkeypatch.undo()
        proxy.thaw()
        await apply_list(store, rows(2))


async def test_connect_timeout(proxied: str, proxy: Proxy) -> None:
    """Connecting has a time limit as well."""
    proxy.freeze()
    with anyio.fail_after(60), pytest.raises(StoreError, match="timeout expired"):
        await SQLStore(with_query(proxied, connect_timeout="1")).open()


async def test_slow_statement(postgresql_database: Database) -> None:
    """The server cancels it, and the error names the setting."""
    async with SQLStore(with_query(postgresql_database.url, statement_timeout="50ms")) as store:
        with pytest.raises(StoreError, match=r"statement timeout; increase \?statement_timeout= in the URL"):
            await store._transactions.run(lambda connection: connection.exec_driver_sql("SELECT pg_sleep(9)"))
        await apply_list(store, rows(1))


async def test_default_timeouts(postgresql_database: Database) -> None:
    """Each timeout is set for one transaction only; the URL overrides it."""

    async def settings(url: str) -> dict[str, str]:
        async with SQLStore(url) as store:

            def read_settings(connection: Any) -> dict[str, str]:
                raw: BoundedConnection = connection.connection.driver_connection
                names = ("lock_timeout", "statement_timeout", "transaction_isolation")
                inside = {name: connection.exec_driver_sql(f"SHOW {name}").scalar_one() for name in names}
                return {**raw.info.get_parameters(), **inside, "prepared": str(raw.prepare_threshold)}

            return await store._transactions.run(read_settings)

    plain = await settings(postgresql_database.url)
    expected = {
        "lock_timeout": "10s",
        "statement_timeout": "30s",
        "transaction_isolation": "read committed",
        "connect_timeout": "10",
        "tcp_user_timeout": "15000",
        "keepalives_idle": "30",
        "prepared": "None",
    }
    assert expected.items() <= plain.items()
    changed = {
        "lock_timeout": "2s",
        "statement_timeout": "1min",
        "connect_timeout": "3",
        "keepalives_idle": "7",
    }
    other = await settings(with_query(postgresql_database.url, **changed, prepare_threshold="5"))
    assert {**changed, "prepared": "5"}.items() <= other.items()


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ({"prepare_threshold": "soon"}, r"\?prepare_threshold= must be a whole number, or none"),
        ({"statement_timeout": "soon"}, r"\?statement_timeout= must be a duration such as 30s"),
        ({"lock_timeout": "-1"}, r"\?lock_timeout= must be a duration"),
        ({"no_such_setting": "1"}, "invalid connection option"),
    ],
)
async def test_invalid_settings(postgresql_database: Database, query: dict[str, str], problem: str) -> None:
    """The error names the setting."""
    with pytest.raises((ConfigurationError, StoreError), match=problem) as caught:
        await SQLStore(with_query(postgresql_database.url, **query)).open()
    assert_plain(caught.value)


# Servers with other configurations.


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII", "EUC_JP"])
async def test_unsupported_encoding(postgres: str, encoding: str) -> None:
    """The database is rejected when the store is opened, because it cannot store every name."""
    name = f"encoded_{encoding.lower()}"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name}")
        connection.execute(
            f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
        )
    url = postgres.replace("/postgres?", f"/{name}?")
    with pytest.raises(
        ConfigurationError, match=f"its encoding is {encoding}; use a database whose"
    ) as caught:
        await SQLStore(url).open()
    assert_plain(caught.value)
    with psycopg.connect(url) as connection:
        assert [] == connection.execute("SELECT relname FROM pg_class WHERE relname = 'meetings'").fetchall()


@pytest.mark.parametrize(
    "write",
    [lambda store: apply_list(store, rows(1)), lambda store: store.record_failure(USER, "no")],
    ids=["raw", "transaction"],
)
async def test_temporarily_read_only_server(
    postgres: str, write: Callable[[SQLStore], Awaitable[object]]
) -> None:
    """As during a failover. A connection that stays read-only is not used again."""
    url = postgres.replace("/postgres?", "/failover?")
    with psycopg.connect(postgres, autocommit=True) as admin:
        admin.execute("DROP DATABASE IF EXISTS failover WITH (FORCE)")
        admin.execute("CREATE DATABASE failover")
        async with SQLStore(url) as store:
            await store.open()
            admin.execute("ALTER DATABASE failover SET default_transaction_read_only = on")
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'failover'")
            with pytest.raises(StoreError, match="read-only"):
                await write(store)
            admin.execute("ALTER DATABASE failover RESET default_transaction_read_only")
            await write(store)


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
async def test_stricter_default_isolation(postgresql_database: Database, level: str) -> None:
    """Concurrent writers still wait for each other, and none fails."""
    url = make_url(postgresql_database.url)
    options = f"{url.query['options']} -cdefault_transaction_isolation={level.replace(' ', chr(92) + ' ')}"
    strict = with_query(postgresql_database.url, options=options)
    async with SQLStore(strict) as first, SQLStore(strict) as second:
        await first.open()
        async with anyio.create_task_group() as tasks:
            for number in range(45):
                store = (first, second)[number % 2]
                tasks.start_soon(store.record_failure, f"usr_{number % 3}", "no")
                tasks.start_soon(store.claim, USER, f"mee_{number % 3}", 60)
    assert [(level,)] == Database(strict, strict).query("SHOW default_transaction_isolation")


async def test_jsonb_reads_null_characters(postgresql_database: Database) -> None:
    """U+0000 in an answer does not make a query over all rows fail."""
    odd = {"_id": "mee_odd", "answer": "a\0b \ud800 \U0001f600", "\0": 1}
    async with SQLStore(postgresql_database.url) as store:
        await apply_list(store, [odd, *rows(1)])
        assert odd == (await store.pending(USER, 1))[0].wire
    found = postgresql_database.query("SELECT wire::jsonb ->> 'answer' FROM meetings ORDER BY meeting_id")
    assert [(None,), ("a\ufffc0000b \ufffcd800 \U0001f600",)] == found


@pytest.mark.parametrize(
    "body",
    [
        "RAISE EXCEPTION 'bad row: %', NEW;",
        "RAISE EXCEPTION 'bad row: %', NEW USING ERRCODE = '57014';",
        "EXECUTE format('SELECT %L::int', NEW.guest_email);",
        "EXECUTE format('SELECT %s', NEW.guest_email);",
    ],
)
async def test_trigger_quoting_a_row(postgresql_database: Database, body: str) -> None:
    """The trigger's message contains personal data, so the error only says that a trigger failed."""
    guest = {"_id": "mee_1", "lead": {"email": "guest@example.com"}}
    async with SQLStore(postgresql_database.url) as store:
        postgresql_database.query(
            f"CREATE FUNCTION refuse() RETURNS trigger AS $$BEGIN {body} RETURN NEW; END$$ LANGUAGE plpgsql"
        )
        postgresql_database.query(
            "CREATE TRIGGER refuse BEFORE INSERT ON meetings FOR EACH ROW EXECUTE FUNCTION refuse()"
        )
        with pytest.raises(
            StoreError, match=r"the database rejected the data|a database trigger or function"
        ) as caught:
            await apply_list(store, [guest])
        assert "guest" not in str(caught.value)
        assert "example" not in str(caught.value)
        assert_plain(caught.value)


FOREVER = """
import signal, sys, anyio
from lemcal_async.sync import SQLStore

signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it

async def main():
    async with SQLStore(sys.argv[1]) as store:
        while True:
            await store.record_failure("usr_1", "no")
            print("noted", flush=True)

anyio.run(main, backend=sys.argv[2])
"""


def test_interrupting_a_program(proxied: str, proxy: Proxy, anyio_backend: str) -> None:
    """One Ctrl-C is enough, even while the server is silent."""
    command = [sys.executable, "-c", FOREVER, proxied, anyio_backend]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert "noted\n" == process.stdout.readline()
            proxy.freeze()
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert errors.splitlines()[-1].startswith("KeyboardInterrupt")
    assert process.returncode != -signal.SIGKILL
