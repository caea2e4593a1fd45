"""A synchronization killed at any moment is completed by the next run."""

import contextlib
from pathlib import Path

import anyio
import pytest

from lemcal_async.sandbox import Sandbox
from lemcal_async.sync import Change, SQLStore

from .conftest import Database, new_database, outbox
from .crash import Crashes, replayed

ROWS = "SELECT user_id, status, wire FROM meetings"


def changes(database: Database) -> list[Change]:
    """Return all changes in a database."""

    async def read() -> list[Change]:
        async with SQLStore(database.url) as store:
            return await outbox(store)

    return anyio.run(read)


@pytest.mark.parametrize(("kind", "fail_every"), [("sqlite", 0), ("postgresql", 3)])
def test_killed_repeatedly(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, fail_every: int
) -> None:
    """Rows are right and every change is delivered in order, even if the handler often fails."""
    kill_repeatedly(new_database(kind, tmp_path, request), tmp_path, kills=2, fail_every=fail_every)


@pytest.mark.storm
@pytest.mark.parametrize("fail_every", [0, 3])
def test_killed_twenty_times(database: Database, tmp_path: Path, fail_every: int) -> None:
    """The same for longer, with and without a failing handler on each database."""
    kill_repeatedly(database, tmp_path, kills=20, fail_every=fail_every)


def kill_repeatedly(database: Database, folder: Path, *, kills: int, fail_every: int) -> None:
    """Kill runs after random steps while meetings change, complete one, and check the final state."""
    with Sandbox(accounts=8, meetings=12, limit=None).serve() as sandbox:
        crashes = Crashes(sandbox, database.url, folder, seed=len(database.url), fail_every=fail_every)
        crashes.run("asyncio")
        for number in range(kills):
            crashes.change_meetings()
            crashes.kill(("asyncio", "trio")[number % 2])
        assert crashes.killed
        crashes.job["fail_every"] = 0
        crashes.run("trio")
        crashes.check(changes(database), database.query(ROWS))


@pytest.mark.storm
def test_two_processes(database: Database, tmp_path: Path) -> None:
    """Two processes on an empty and then on a filled database: no deadlock, and each change once."""
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
            crashes.change_meetings()
        with crashes.worker("asyncio", handler="none") as worker:
            worker.communicate("go\n", timeout=60)
        found = changes(database)
        wanted = {
            account.user_id: {row["_id"]: row for row in sandbox.meetings(index)}
            for index, account in enumerate(sandbox.accounts)
        }
        assert wanted == replayed(found, wanted)
        assert [] == database.query(
            "SELECT user_id, meeting_id FROM meetings GROUP BY user_id, meeting_id HAVING count(*) > 1"
        )
