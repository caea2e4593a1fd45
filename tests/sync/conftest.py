"""Stores of every kind, a real PostgreSQL server, and accounts of a served sandbox."""

import itertools
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import psycopg
import pytest
from postgres_server import HAS_POSTGRES, postgres_server

from lemcal_async import AsyncLemcal, RetryPolicy
from lemcal_async.ratelimit import Unlimited
from lemcal_async.sandbox import Sandbox
from lemcal_async.sync import Change, MemoryStore, SQLStore, Store

_schemas = itertools.count(1)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Run a PostgreSQL server for the session; the value is the URL of a database."""
    if not HAS_POSTGRES:
        pytest.skip("there is no wheel of a PostgreSQL server for this Python")
    with postgres_server() as url:
        yield url


@attrs.frozen
class Database:
    """An empty database: its URL, and access to it through its own driver."""

    url: str
    _dsn: str

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Return the rows of a query, or no rows for a statement."""
        if self.url.startswith("sqlite"):
            connection: Any = sqlite3.connect(self._dsn)
        else:
            connection = psycopg.connect(self._dsn)
        try:
            cursor = connection.execute(sql)
            rows = cursor.fetchall() if cursor.description else []
            connection.commit()
        finally:
            connection.close()
        return list(rows)

    def relations(self) -> list[str]:
        """Return the names of all tables and views."""
        if self.url.startswith("sqlite"):
            rows = self.query("SELECT name FROM sqlite_master")
        else:
            rows = self.query(
                "SELECT relname FROM pg_class WHERE relnamespace = current_schema()::regnamespace"
            )
        return sorted(name for (name,) in rows)

    def script(self, sql: str) -> None:
        """Run the statements of a dump."""
        connection: Any
        if self.url.startswith("sqlite"):
            connection = sqlite3.connect(self._dsn)
            connection.executescript(sql)
        else:
            connection = psycopg.connect(self._dsn)
            connection.execute(sql)
        connection.commit()
        connection.close()


def new_database(kind: str, folder: Path, request: pytest.FixtureRequest) -> Database:
    """Return an empty database: a new file or a new schema."""
    if kind == "sqlite":
        file = folder / "lemcal.db"
        return Database(f"sqlite:///{file}", str(file))
    dsn = request.getfixturevalue("postgres")
    schema = f"test{next(_schemas)}"
    with psycopg.connect(dsn) as connection:
        connection.execute(f"CREATE SCHEMA {schema}")
    separator = "&" if "?" in dsn else "?"
    dsn = f"{dsn}{separator}options=-csearch_path%3D{schema}"
    return Database(dsn, dsn)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    """Provide an empty database of each kind."""
    return new_database(request.param, tmp_path, request)


@pytest.fixture
def sqlite_database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    """Provide an empty SQLite file, for behavior that does not depend on the database."""
    return new_database("sqlite", tmp_path, request)


@pytest.fixture
def postgresql_database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    """Provide an empty schema, for behavior that is specific to PostgreSQL."""
    return new_database("postgresql", tmp_path, request)


@pytest.fixture
async def sql_store(database: Database) -> AsyncIterator[SQLStore]:
    """Provide a store on each kind of database."""
    async with SQLStore(database.url) as store:
        yield store


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    """Provide a store of every kind."""
    if request.param == "memory":
        yield MemoryStore()
        return
    async with SQLStore(new_database(request.param, tmp_path, request).url) as store:
        yield store


class ServedSandbox:
    """A served sandbox without a rate limit, and clients for its accounts on one transport."""

    def __init__(self, accounts: int, meetings: int) -> None:
        self.sandbox = Sandbox(accounts=accounts, meetings=meetings, limit=None)
        self._lemcal: AsyncLemcal | None = None

    @property
    def lemcal(self) -> AsyncLemcal:
        """The client of the first account, which owns the transport."""
        if self._lemcal is None:
            self._lemcal = self.sandbox.client(limiter=Unlimited(), retry=RetryPolicy(attempts=1))
        return self._lemcal

    def clients(self) -> list[AsyncLemcal]:
        """Return a client for each account."""
        return [self.lemcal.for_account(a.user_id, a.api_key) for a in self.sandbox.accounts]

    async def aclose(self) -> None:
        """Close the transport."""
        if self._lemcal is not None:
            await self._lemcal.aclose()


@pytest.fixture
async def serve_sandbox() -> AsyncIterator[Any]:
    """Provide a function that serves a sandbox with a number of accounts and meetings."""
    made: list[ServedSandbox] = []
    with ExitStack() as stack:

        def make(accounts: int = 1, meetings: int = 6) -> ServedSandbox:
            served = ServedSandbox(accounts, meetings)
            stack.enter_context(served.sandbox.serve())
            made.append(served)
            return served

        yield make
        for served in made:
            await served.aclose()


async def outbox(store: Store, *, pending: bool = False) -> list[Change]:
    """Return the changes in a store."""
    return [change async for change in store.changes(pending=pending)]


async def kinds(store: Store, *, pending: bool = False) -> list[str]:
    """Return the kinds of the changes in a store."""
    return [change.kind for change in await outbox(store, pending=pending)]
