"""A pooler between a store and PostgreSQL: pgbouncer in transaction mode, where clients share connections."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import psycopg
import pytest
from sqlalchemy import make_url

from lemcal_async.errors import StoreError
from lemcal_async.sync import SQLStore, Store

from .conftest import Database, outbox
from .test_postgresql import with_query
from .test_store import apply_list, rows

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.storm,
    pytest.mark.skipif(not shutil.which("pgbouncer"), reason="no pgbouncer on the PATH"),
]

SETTINGS = """
[databases]
* = host={server} user=postgres
[pgbouncer]
listen_addr =
unix_socket_dir = {folder}
listen_port = 5432
auth_type = any
pool_mode = transaction
default_pool_size = 2
max_client_conn = 100
ignore_startup_parameters = extra_float_digits
"""


@contextmanager
def pooler(server: str, folder: Path) -> Iterator[None]:
    """Run pgbouncer."""
    settings = folder / "pgbouncer.ini"
    settings.write_text(SETTINGS.format(server=server, folder=folder))
    command = ["pgbouncer", str(settings)]
    if os.geteuid() == 0:  # pgbouncer refuses to run as root; PostgreSQL's user can reach the server
        owner = Path(server).owner()
        shutil.chown(folder, owner)
        command += ["-u", owner]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        for _ in range(600):
            if (folder / ".s.PGSQL.5432").exists():
                break
            time.sleep(0.05)
        try:
            yield
        finally:
            process.terminate()


@pytest.fixture
def pooled(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """Provide a database behind a pooler, which rejects ``options``."""
    name = "pooled"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        connection.execute(f"CREATE DATABASE {name}")
    folder = Path(
        f"/tmp/lemcal-pgbouncer-{os.getpid()}"
    )  # a socket's path must be short and accessible to every user
    folder.mkdir()
    with pooler(str(make_url(postgres).query["host"]), folder):
        url = f"postgresql://postgres@/{name}?host={folder}"
        yield Database(url, url)
    shutil.rmtree(folder)


async def test_transaction_mode(pooled: Database) -> None:
    """36 runs of four stores on two connections, with another client: none fails, and all rows are right."""
    applied: list[object] = []

    async def write(number: int) -> None:
        async with SQLStore(pooled.url) as store:
            for count in range(1, 10):
                applied.append(await apply_list(store, rows(count * 3), user_id=f"usr_{number}"))
                await store.mark_delivered(await store.pending(f"usr_{number}", 2))

    async with SQLStore(pooled.url) as store:
        await store.open()
        with psycopg.connect(pooled.url, autocommit=True, prepare_threshold=None) as neighbor:
            async with anyio.create_task_group() as tasks:
                for number in range(4):
                    tasks.start_soon(write, number)
            shown = {
                (
                    neighbor.execute("SHOW lock_timeout").fetchone(),
                    neighbor.execute("SHOW statement_timeout").fetchone(),
                )
                for _ in range(50)
            }
        assert {(("0",), ("0",))} == shown
        assert 36 == len([one for one in applied if one is not None])
        assert 4 * 27 == len(await outbox(store))
        assert 4 * 9 == len(await outbox(store, pending=True))


async def test_prepared_statements(pooled: Database) -> None:
    """Poolers break prepared statements: enabled in the URL, they fail with a StoreError, as documented."""
    stores = [SQLStore(with_query(pooled.url, prepare_threshold="0")) for _ in range(4)]
    errors: list[StoreError] = []

    async def use(store: Store) -> None:
        try:
            for number in range(20):
                await apply_list(store, rows(number), confirm_empty_after=1)
        except StoreError as error:
            errors.append(error)

    async with anyio.create_task_group() as tasks:
        for store in stores:
            tasks.start_soon(use, store)
    for store in stores:
        await store.aclose()
    assert any("prepared statement" in str(error) for error in errors)
