"""What is particular to SQLite: its files, its log, and those who read beside us."""

import logging
import sqlite3
import stat
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import anyio
import pytest

from lemcal_async.errors import StoreError
from lemcal_async.sync import SQLStore

from .conftest import Database, kinds
from .test_sql import PUBLIC, USER, assert_plain, holds
from .test_store import rows, take

LONG_AFTER = datetime(2999, 1, 1, tzinfo=UTC)


@pytest.mark.anyio
async def test_only_the_owner_reads_the_files(sqlite_database: Database, tmp_path: Path) -> None:
    """They hold names and addresses; a file that is there keeps its mode."""
    async with SQLStore(sqlite_database.url) as store:
        await take(store, [PUBLIC])
        assert {"lemcal.db": 0o600, "lemcal.db-wal": 0o600, "lemcal.db-shm": 0o600} == modes(tmp_path)
    (tmp_path / "lemcal.db").chmod(0o640)
    async with SQLStore(sqlite_database.url) as store:
        await take(store, [PUBLIC])
    assert {"lemcal.db": 0o640} == modes(tmp_path)


def modes(folder: Path) -> dict[str, int]:
    """Return who may read the files of a folder."""
    return {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}


@pytest.mark.anyio
@pytest.mark.parametrize("action", ["forget", "prune"])
async def test_a_reader_that_holds_the_log(sqlite_database: Database, tmp_path: Path, action: str) -> None:
    """What was erased still stands in the log then: that is said, and done the next time."""

    async def erase(store: SQLStore) -> None:
        if action == "forget":
            await store.forget(USER)
        else:
            await store.prune(before=LONG_AFTER)

    async with SQLStore(f"{sqlite_database.url}?timeout=0.05") as store:
        await take(store, [PUBLIC])
        reader = sqlite3.connect(tmp_path / "lemcal.db", isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM meetings").fetchone()
        with pytest.raises(
            StoreError,
            match=r"erased 1 meetings and \d changes, but the write-ahead log .* is reading it; run this",
        ) as caught:
            await erase(store)
        assert_plain(caught.value)
        assert holds(tmp_path, b"guest@example.com")
        reader.close()
        await store.mark_delivered(await store.pending(USER, 10))
        await erase(store)
        assert not holds(tmp_path, b"guest@example.com")


LIMITED = """
import resource, sys, anyio
from lemcal_async.sync import SQLStore
from lemcal_async.errors import StoreError

async def main():
    async with SQLStore(sys.argv[1]) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
        try:
            await store.forget("usr_last")
        except StoreError as error:
            print(error)

anyio.run(main)
"""


def test_a_full_disk_after_erasing(sqlite_database: Database, tmp_path: Path) -> None:
    """The erasure is committed, the log cannot be emptied: one line says both; with room, it can."""

    async def fill() -> None:
        async with SQLStore(sqlite_database.url) as store:
            await take(store, rows(3000))
            await take(store, [{**PUBLIC, "_id": "mee_last"}], user_id="usr_last")

    async def again() -> None:
        async with SQLStore(sqlite_database.url) as store:
            assert [] == [change async for change in store.changes(after=3000)]
            await store.forget("usr_last")

    anyio.run(fill)
    limit = (tmp_path / "lemcal.db").stat().st_size // 2  # room for the log, not for the end of the file
    command = [sys.executable, "-c", LIMITED, sqlite_database.url, str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ("", 0) == (done.stderr, done.returncode)
    (line,) = done.stdout.splitlines()
    assert "erased 1 meetings and 1 changes, but the write-ahead log still contains them: disk I/O" in line
    anyio.run(again)
    assert not holds(tmp_path, b"guest@example.com")


@pytest.mark.parametrize(
    "body", ["RAISE(ABORT, 'guest@example.com is not welcome')", "json_extract(NEW.wire, NEW.guest_email)"]
)
@pytest.mark.anyio
async def test_a_trigger_that_quotes_a_row(sqlite_database: Database, body: str) -> None:
    """Its message does not reach the error, nor that of a function in it."""
    async with SQLStore(sqlite_database.url) as store:
        sqlite_database.query(f"CREATE TRIGGER refuse BEFORE INSERT ON meetings BEGIN SELECT {body}; END")
        with pytest.raises(
            StoreError, match=r"a database (trigger rejected the data|statement or trigger failed)"
        ) as caught:
            await take(store, [PUBLIC])
        assert "guest" not in str(caught.value)
        assert_plain(caught.value)


@pytest.mark.anyio
async def test_a_text_that_is_not_utf_8(sqlite_database: Database) -> None:
    """Another program has put it there; the error does not quote it."""
    async with SQLStore(sqlite_database.url) as store:
        await take(store, [PUBLIC])
        sqlite_database.query("UPDATE changes SET wire = CAST('guest@example.com' || x'fc' AS TEXT)")
        with pytest.raises(StoreError, match="a stored text is not UTF-8") as caught:
            await store.pending(USER, 10)
        assert "guest" not in str(caught.value)
        assert_plain(caught.value)


@pytest.mark.anyio
async def test_logs_hold_no_rows(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """Not even SQLAlchemy's, whoever has set it to DEBUG."""
    logging.getLogger("sqlalchemy").setLevel(logging.DEBUG)
    try:
        with caplog.at_level(logging.DEBUG):
            async with SQLStore(database.url) as store:
                await take(store, [PUBLIC])
                assert ["created"] == await kinds(store)
    finally:
        logging.getLogger("sqlalchemy").setLevel(logging.NOTSET)
    assert "FROM changes" in caplog.text
    assert "guest" not in caplog.text.replace("guest_email", "").replace("guest_name", "")
