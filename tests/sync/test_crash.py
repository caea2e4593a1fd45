"""Killed at any moment, the next run is right."""

import contextlib
from pathlib import Path

import anyio
import pytest

from lemcal_async.sandbox import Sandbox
from lemcal_async.sync import Change, SQLStore

from .conftest import Database, new_database, outbox
from .crash import Crashes, told

ROWS = "SELECT user_id, status, wire FROM meetings"


def changes(database: Database) -> list[Change]:
    """Return all changes in a database."""

    async def read() -> list[Change]:
        async with SQLStore(database.url) as store:
            return await outbox(store)

    return anyio.run(read)


@pytest.mark.parametrize(("kind", "fail_every"), [("sqlite", 0), ("postgresql", 3)])
def test_killed_again_and_again(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, fail_every: int
) -> None:
    """Right rows, every change delivered, none lost, order kept; with a handler that often fails, too."""
    kill_again_and_again(new_database(kind, tmp_path, request), tmp_path, kills=3, fail_every=fail_every)


@pytest.mark.storm
@pytest.mark.parametrize("fail_every", [0, 3])
def test_killed_twenty_times(database: Database, tmp_path: Path, fail_every: int) -> None:
    """The same for longer, with every handler on every database."""
    kill_again_and_again(database, tmp_path, kills=20, fail_every=fail_every)


def kill_again_and_again(database: Database, folder: Path, *, kills: int, fail_every: int) -> None:
    """Kill runs after random steps while things happen, finish one, and check what must hold."""
    with Sandbox(accounts=8, meetings=12, limit=None).serve() as sandbox:
        crashes = Crashes(sandbox, database.url, folder, seed=len(database.url), fail_every=fail_every)
        crashes.run("asyncio")
        for number in range(kills):
            crashes.live()
            crashes.kill(("asyncio", "trio")[number % 2])
        assert crashes.killed
        crashes.job["fail_every"] = 0
        crashes.run("trio")
        crashes.check(changes(database), database.query(ROWS))


@pytest.mark.storm
def test_two_at_once(database: Database, tmp_path: Path) -> None:
    """Two processes on an empty database, and then on a full one: no deadlock, and each change once."""
    with Sandbox(accounts=12, meetings=12, limit=None).serve() as sandbox:
        crashes = Crashes(sandbox, database.url, tmp_path, seed=1)
        for _ in range(2):
            with contextlib.ExitStack() as stack:
                workers = [
                    stack.enter_context(crashes.worker(backend, handler="none"))
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
        with crashes.worker("asyncio", handler="none") as worker:
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
