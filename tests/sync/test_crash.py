"""Killed at any moment, the next run is right.

``LEMCAL_TEST_KILLS=20`` makes it twenty kills in a row, and tries every handler with every database.
"""

import contextlib
import os
from pathlib import Path

import anyio
import pytest

from lemcal_async.sandbox import Sandbox
from lemcal_async.sync import Change, SQLStore

from .conftest import Database, new_database, outbox
from .crash import Crashes, told

KILLS = int(os.environ.get("LEMCAL_TEST_KILLS", "0"))
KINDS = [("sqlite", 0), ("postgresql", 3)] + [("sqlite", 3), ("postgresql", 0)] * bool(KILLS)
ROWS = "SELECT user_id, status, wire FROM meetings"


def changes(database: Database) -> list[Change]:
    """Return all changes in a database."""

    async def read() -> list[Change]:
        async with SQLStore(database.url) as store:
            return await outbox(store)

    return anyio.run(read)


@pytest.mark.parametrize(("kind", "fail_every"), KINDS)
def test_killed_again_and_again(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, fail_every: int
) -> None:
    """Right rows, every change delivered, none lost, order kept; with a handler that often fails, too."""
    database = new_database(kind, tmp_path, request)
    with Sandbox(accounts=8, meetings=12, limit=None).serve() as sandbox:
        crashes = Crashes(sandbox, database.url, tmp_path, seed=len(database.url), fail_every=fail_every)
        longest = crashes.run("asyncio")
        killed = 0
        for number in range(KILLS or 4):
            crashes.live()
            killed += crashes.kill(("asyncio", "trio")[number % 2], longest)
        assert killed
        crashes.job["fail_every"] = 0
        crashes.run("trio")
        crashes.check(changes(database), database.query(ROWS))


def test_two_at_once(database: Database, tmp_path: Path) -> None:
    """Two processes on an empty database, and then on a full one: no deadlock, and each change once."""
    with Sandbox(accounts=12, meetings=12, limit=None).serve() as sandbox:
        crashes = Crashes(sandbox, database.url, tmp_path, seed=1)
        for _ in range(2):
            with contextlib.ExitStack() as stack:
                workers = [
                    stack.enter_context(crashes.worker(backend, deliver=False))
                    for backend in ("asyncio", "trio")
                ]
                for worker in workers:
                    assert worker.stdin is not None
                    worker.stdin.write("go\n")
                    worker.stdin.flush()
                for worker in workers:
                    out, _ = worker.communicate(timeout=60)
                    assert '{"failed": 0, "errors": []}' == out.strip()
            crashes.live()
        with crashes.worker("asyncio", deliver=False) as worker:
            worker.communicate("go\n", timeout=60)
        found = changes(database)
        wanted = {
            account.user_id: {row["_id"]: row for row in sandbox.meetings(index)}
            for index, account in enumerate(sandbox.accounts)
        }
        assert wanted == told(found, wanted)
        assert [] == database.query(
            "SELECT user_id, meeting_id FROM meetings GROUP BY user_id, meeting_id HAVING count(*) > 1"
        )
