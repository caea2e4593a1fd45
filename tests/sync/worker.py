"""A synchronization in a separate process, to be killed: see ``crash.py``.

Reads its job as JSON from standard input, prints "ready", waits for a line, runs once, and prints the report.
Before it returns, the handler appends the ``seq`` of its changes to a file, in one write.
"""

import json
import os
import sys
from typing import Any

import anyio

from lemcal_async import AsyncLemcal, RetryPolicy
from lemcal_async.ratelimit import Unlimited
from lemcal_async.sync import Change, SQLStore, sync_meetings


async def run(job: dict[str, Any]) -> None:
    """Run the job."""
    log = os.open(job["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    calls = 0

    def record(changes: list[Change]) -> None:
        nonlocal calls
        calls += 1
        if job["fail_every"] and calls % job["fail_every"] == 0:
            raise RuntimeError("this handler fails now and then")
        os.write(log, "".join(f"{change.seq}\n" for change in changes).encode())

    async def on_change(change: Change) -> None:
        await anyio.lowlevel.checkpoint()
        record([change])

    async def on_changes(changes: list[Change]) -> None:
        await anyio.lowlevel.checkpoint()
        record(changes)

    handlers: dict[str, dict[str, Any]] = {
        "async": {"on_change": on_change},
        "plain": {"on_change": lambda change: record([change])},
        "lists": {"on_changes": on_changes},
        "none": {},
    }
    (first, key), *others = job["accounts"]
    lemcal = AsyncLemcal(
        first, key, base_url=job["base_url"], limiter=Unlimited(), retry=RetryPolicy(attempts=1)
    )
    async with lemcal, SQLStore(job["db"]) as store:
        clients = [lemcal, *(lemcal.for_account(user_id, api_key) for user_id, api_key in others)]
        print_line("ready")
        sys.stdin.readline()
        report = await sync_meetings(clients, store, max_concurrency=8, **handlers[job["handler"]])
    print_line(json.dumps({"failed": report.failed, "errors": [str(f.error) for f in report.failures]}))


def print_line(line: str) -> None:
    """Print a line and flush it."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    job = json.loads(sys.stdin.readline())
    anyio.run(run, job, backend=job["backend"])
