"""A database that version 1 wrote is migrated in place."""

import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from lemcal_async.sync import Counts, SQLStore
from lemcal_async.sync._store import Applied

from .conftest import Database, outbox
from .test_store import apply_list

DATA = Path(__file__).parent / "data"
ODD = {"_id": "mee_nul", "start": "never", "note": "a\0b"}

# Stops in the middle of the migration and prints a line.
MIGRATE = """
import sys, time, anyio
from lemcal_async.sync import SQLStore, _tables

def rewrite(connection, table, original=_tables._rewrite_wire):
    original(connection, table)
    print("half-way", flush=True)
    time.sleep(600)

_tables._rewrite_wire = rewrite
anyio.run(SQLStore(sys.argv[1]).open)
"""


@pytest.fixture
def version_1(database: Database) -> Database:
    """Provide a database that version 1 wrote."""
    kind = "sqlite" if database.url.startswith("sqlite") else "postgresql"
    database.script((DATA / f"version1.{kind}.sql").read_text(encoding="utf-8"))
    return database


async def open_and_close(url: str) -> None:
    """Open a database, which migrates it."""
    async with SQLStore(url):
        pass


async def check(database: Database) -> None:
    """Check that nothing was lost, and that the additions of version 2 work."""
    async with SQLStore(database.url) as store:
        assert [2, 1, 0] == [await store.revision(f"usr_{number}") for number in (1, 2, 3)]
        changes = await outbox(store)
        assert list(range(1, 8)) == [change.seq for change in changes]
        assert [1, 2] == [change.seq for change in changes if change.delivered_at]
        assert ODD == changes[2].wire
        assert [3, 4, 5, 6] == [change.seq for change in await store.pending("usr_1", 10)]
        plain = {"_id": "mee_plain", "end": "2026-02-05T08:30:00.000Z"}
        assert Applied(Counts(unchanged=1)) == await apply_list(store, [plain], user_id="usr_2")
        assert Applied(Counts(changed=1)) == await apply_list(
            store, [{**plain, "note": "x"}], user_id="usr_2"
        )
        assert 8 == (await outbox(store))[-1].seq
    assert [(2,)] == database.query("SELECT version FROM lemcal_schema")
    assert [(0, False, False, None)] == database.query(
        "SELECT failures, wanted, paused, due_at FROM accounts WHERE user_id = 'usr_1'"
    )


@pytest.mark.anyio
async def test_migration_in_place(version_1: Database) -> None:
    """The first store that opens it migrates it; the second has nothing to do."""
    await check(version_1)
    await open_and_close(version_1.url)


@pytest.mark.anyio
async def test_migrated_tables_equal_new_tables(version_1: Database, tmp_path: Path) -> None:
    """A migrated database has the same columns and indexes as a new one."""
    await open_and_close(version_1.url)
    new = Database(f"sqlite:///{tmp_path}/new.db", f"{tmp_path}/new.db")
    await open_and_close(new.url)
    if version_1.url.startswith("sqlite"):
        assert columns(new) == columns(version_1)
        indexes = "SELECT name FROM sqlite_master WHERE type = 'index' ORDER BY name"
        assert new.query(indexes) == version_1.query(indexes)
    else:
        assert {"accounts_due", "changes_outbox"} <= set(version_1.relations())
        assert "changes_pending" not in version_1.relations()


def columns(database: Database) -> list[tuple[str, ...]]:
    """Return the columns of each table, regardless of their order."""
    return database.query(
        "SELECT m.name, c.name, c.type, c.[notnull], c.dflt_value, c.pk "
        "FROM sqlite_master m, pragma_table_info(m.name) c WHERE m.type = 'table' ORDER BY m.name, c.name"
    )


@pytest.mark.anyio
async def test_jsonb_reads_every_stored_row(version_1: Database) -> None:
    """Jsonb rejected some rows of version 1: one guest's text made a query over all rows fail."""
    await open_and_close(version_1.url)
    if version_1.url.startswith("sqlite"):
        found = version_1.query("SELECT json_extract(wire, '$._id') FROM meetings")
    else:
        found = version_1.query("SELECT wire::jsonb ->> '_id' FROM meetings")
    assert {("mee_nul",), ("mee_plain",), ("mee_public",), ("mee_canceled",)} == set(found)


def test_killed_during_migration(version_1: Database) -> None:
    """The migration is atomic: a killed one leaves version 1, and the next store migrates it."""
    before = version_1.relations(), version_1.query("SELECT * FROM changes ORDER BY seq")
    command = [sys.executable, "-c", MIGRATE, version_1.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "half-way\n" == process.stdout.readline()
        process.kill()
    assert before == (version_1.relations(), version_1.query("SELECT * FROM changes ORDER BY seq"))
    assert [(1,)] == version_1.query("SELECT version FROM lemcal_schema")
    anyio.run(check, version_1)


@pytest.mark.anyio
async def test_concurrent_process_of_version_1(database: Database) -> None:
    """Version 1 applies a list without updating the last list's hash: the stale hash is not used."""
    async with SQLStore(database.url) as store:
        listed = [{"_id": "mee_1", "note": "a"}]
        await store.apply("usr_1", 0, listed, baseline=False, confirm_empty_after=2, body_hash="a")
        assert 1 == await store.unchanged("usr_1", "a")
        database.query("UPDATE accounts SET revision = revision + 1")  # as that version does
        assert await store.unchanged("usr_1", "a") is None
