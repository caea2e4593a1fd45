"""SQLite in particular: its files, its write-ahead log, and concurrent readers."""

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
from .test_sql import PUBLIC, USER, any_file_contains, assert_plain
from .test_store import apply_list, rows

LONG_AFTER = datetime(2999, 1, 1, tzinfo=UTC)


@pytest.mark.anyio
async def test_file_permissions(sqlite_database: Database, tmp_path: Path) -> None:
    """The files contain names and addresses; an existing file keeps its mode."""
    async with SQLStore(sqlite_database.url) as store:
        await apply_list(store, [PUBLIC])
        assert {"lemcal.db": 0o600, "lemcal.db-wal": 0o600, "lemcal.db-shm": 0o600} == modes(tmp_path)
    (tmp_path / "lemcal.db").chmod(0o640)
    async with SQLStore(sqlite_database.url) as store:
        await apply_list(store, [PUBLIC])
    assert {"lemcal.db": 0o640} == modes(tmp_path)


def modes(folder: Path) -> dict[str, int]:
    """Return the permissions of the files in a folder."""
    return {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}


@pytest.mark.anyio
@pytest.mark.parametrize("action", ["forget", "prune"])
async def test_reader_holding_the_log(sqlite_database: Database, tmp_path: Path, action: str) -> None:
    """Erased rows are still in the log: the error says so, and the next call removes them."""

    async def erase(store: SQLStore) -> None:
        if action == "forget":
            await store.forget(USER)
        else:
            await store.prune(before=LONG_AFTER)

    async with SQLStore(f"{sqlite_database.url}?timeout=0.05") as store:
        await apply_list(store, [PUBLIC])
        reader = sqlite3.connect(tmp_path / "lemcal.db", isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM meetings").fetchone()
        with pytest.raises(
            StoreError,
            match=r"erased 1 meetings and \d changes, but the write-ahead log .* is reading it; run this",
        ) as caught:
            await erase(store)
        assert_plain(caught.value)
        assert any_file_contains(tmp_path, b"guest@example.com")
        reader.close()
        await store.mark_delivered(await store.pending(USER, 10))
        await erase(store)
        assert not any_file_contains(tmp_path, b"guest@example.com")


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


def test_full_disk_after_erasing(sqlite_database: Database, tmp_path: Path) -> None:
    """The erasure is committed but the log is not emptied: one line says both; with free space, it works."""

    async def fill() -> None:
        async with SQLStore(sqlite_database.url) as store:
            await apply_list(store, rows(3000))
            await apply_list(store, [{**PUBLIC, "_id": "mee_last"}], user_id="usr_last")

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
    assert not any_file_contains(tmp_path, b"guest@example.com")


@pytest.mark.parametrize(
    "body", ["RAISE(ABORT, 'guest@example.com is not welcome')", "json_extract(NEW.wire, NEW.guest_email)"]
)
@pytest.mark.anyio
async def test_trigger_quoting_a_row(sqlite_database: Database, body: str) -> None:
    """Neither the trigger's message nor that of a function it calls reaches the error."""
    async with SQLStore(sqlite_database.url) as store:
        sqlite_database.query(f"CREATE TRIGGER refuse BEFORE INSERT ON meetings BEGIN SELECT {body}; END")
        with pytest.raises(
            StoreError, match=r"a database (trigger rejected the data|statement or trigger failed)"
        ) as caught:
            await apply_list(store, [PUBLIC])
        assert "guest" not in str(caught.value)
        assert_plain(caught.value)


@pytest.mark.anyio
async def test_text_not_in_utf_8(sqlite_database: Database) -> None:
    """Another program wrote it; the error does not quote it."""
    async with SQLStore(sqlite_database.url) as store:
        await apply_list(store, [PUBLIC])
        sqlite_database.query("UPDATE changes SET wire = CAST('guest@example.com' || x'fc' AS TEXT)")
        with pytest.raises(StoreError, match="a stored text is not UTF-8") as caught:
            await store.pending(USER, 10)
        assert "guest" not in str(caught.value)
        assert_plain(caught.value)


@pytest.mark.anyio
async def test_logs_contain_no_rows(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """Not even SQLAlchemy's logs at level DEBUG."""
    logging.getLogger("sqlalchemy").setLevel(logging.DEBUG)
    try:
        with caplog.at_level(logging.DEBUG):
            async with SQLStore(database.url) as store:
                await apply_list(store, [PUBLIC])
                assert ["created"] == await kinds(store)
    finally:
        logging.getLogger("sqlalchemy").setLevel(logging.NOTSET)
    assert "FROM changes" in caplog.text
    assert "guest" not in caplog.text.replace("guest_email", "").replace("guest_name", "")
