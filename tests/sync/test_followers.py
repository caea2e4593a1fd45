"""Who follows the outbox misses no change, however transactions of several writers overlap."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import anyio
import psycopg
import pytest

from lemcal_async.sync import SQLStore

from .conftest import Database, outbox
from .test_store import rows, take

pytestmark = pytest.mark.anyio


@contextmanager
def an_open_writer(database: Database, user_id: str) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """Hold an account's store in the moment before it ends its transaction, changes written."""
    with psycopg.connect(database.url) as connection:
        connection.execute(
            "SELECT pg_advisory_xact_lock_shared(%s, (SELECT last_value::int FROM changes_seq_seq))",
            (0x6C656D63,),
        )
        connection.execute(
            "INSERT INTO changes (user_id, meeting_id, kind, fields, found_at, wire) "
            "VALUES (%s, 'mee_late', 'created', '[]', now(), '{\"_id\": \"mee_late\"}')",
            (user_id,),
        )
        yield connection


async def test_a_lower_number_that_appears_later(postgresql_database: Database) -> None:
    """It is waited for: nothing behind it is read before it is there."""
    async with SQLStore(postgresql_database.url) as store:
        await take(store, rows(2))
        with an_open_writer(postgresql_database, "usr_2") as writer:
            await take(store, rows(2), user_id="usr_3")  # committed, with higher numbers
            assert [1, 2] == [change.seq for change in await outbox(store)]
            writer.commit()
            assert [1, 2, 3, 4, 5] == [change.seq for change in await outbox(store)]


async def test_a_writer_that_gives_up(postgresql_database: Database) -> None:
    """Its numbers stay unused, and do not hold anybody up."""
    async with SQLStore(postgresql_database.url) as store:
        await take(store, rows(2))
        with an_open_writer(postgresql_database, "usr_2") as writer:
            await take(store, rows(2), user_id="usr_3")
            writer.rollback()
        assert [1, 2, 4, 5] == [change.seq for change in await outbox(store)]


async def test_many_writers_and_a_follower(postgresql_database: Database) -> None:
    """The follower sees each change once, and in order, while four stores write."""
    seen: list[int] = []
    done = threading.Event()

    async def write(number: int) -> None:
        async with SQLStore(postgresql_database.url) as store:
            for account in range(15):
                await take(store, rows(5), user_id=f"usr_{number}_{account}")

    async def follow() -> None:
        async with SQLStore(postgresql_database.url) as store:
            is_last = False
            while not is_last:
                is_last = done.is_set()
                seen.extend([c.seq async for c in store.changes(after=seen[-1] if seen else 0)])

    async with SQLStore(postgresql_database.url), anyio.create_task_group() as follower:
        follower.start_soon(follow)
        async with anyio.create_task_group() as writers:
            for number in range(4):
                writers.start_soon(write, number)
        done.set()
    assert [(4 * 15 * 5,)] == postgresql_database.query("SELECT count(*) FROM changes")
    assert [(seq,) for seq in seen] == postgresql_database.query("SELECT seq FROM changes ORDER BY seq")
