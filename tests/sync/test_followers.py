"""A follower of the outbox misses no change, however the transactions of several writers overlap."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import anyio
import psycopg
import pytest

from lemcal_async.sync import SQLStore

from .conftest import Database, outbox
from .test_store import apply_list, rows

pytestmark = pytest.mark.anyio


@contextmanager
def open_writer(database: Database, user_id: str) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """Hold a store's transaction open after it has written its changes, before it commits."""
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


async def test_lower_number_appearing_later(postgresql_database: Database) -> None:
    """The follower waits for the lower number, and reads no later change before it."""
    async with SQLStore(postgresql_database.url) as store:
        await apply_list(store, rows(2))
        with open_writer(postgresql_database, "usr_2") as writer:
            await apply_list(store, rows(2), user_id="usr_3")  # committed, with higher numbers
            assert [1, 2] == [change.seq for change in await outbox(store)]
            writer.commit()
            assert [1, 2, 3, 4, 5] == [change.seq for change in await outbox(store)]


async def test_writer_that_rolls_back(postgresql_database: Database) -> None:
    """The numbers of a rolled-back transaction stay unused, and do not block the follower."""
    async with SQLStore(postgresql_database.url) as store:
        await apply_list(store, rows(2))
        with open_writer(postgresql_database, "usr_2") as writer:
            await apply_list(store, rows(2), user_id="usr_3")
            writer.rollback()
        assert [1, 2, 4, 5] == [change.seq for change in await outbox(store)]


async def test_several_writers_and_a_follower(postgresql_database: Database) -> None:
    """The follower sees each change once, in order, while four stores write."""
    seen: list[int] = []
    done = threading.Event()

    async def write(number: int) -> None:
        async with SQLStore(postgresql_database.url) as store:
            for account in range(15):
                await apply_list(store, rows(5), user_id=f"usr_{number}_{account}")

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
