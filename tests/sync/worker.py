"""A synchronization as a process of its own, to be killed: see ``crash.py``.

Reads what to do as JSON from standard input, says "ready", waits for a line, runs once, and writes the
report. The handler appends the ``seq`` of what it is given to a file, with one write, before it returns.
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
    """Do the job."""
    log = os.open(job["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    calls = 0

    def take(changes: list[Change]) -> None:
        nonlocal calls
        calls += 1
        if job["fail_every"] and calls % job["fail_every"] == 0:
            raise RuntimeError("this handler fails now and then")
        os.write(log, "".join(f"{change.seq}\n" for change in changes).encode())

    async def on_change(change: Change) -> None:
        await anyio.lowlevel.checkpoint()
        take([change])

    async def on_changes(changes: list[Change]) -> None:
        await anyio.lowlevel.checkpoint()
        take(changes)

    handlers: dict[str, dict[str, Any]] = {
        "async": {"on_change": on_change},
        "plain": {"on_change": lambda change: take([change])},
        "lists": {"on_changes": on_changes},
        "none": {},
    }
    (first, key), *others = job["accounts"]
    lemcal = AsyncLemcal(
        first, key, base_url=job["base_url"], limiter=Unlimited(), retry=RetryPolicy(attempts=1)
    )
    async with lemcal, SQLStore(job["db"]) as store:
        clients = [lemcal, *(lemcal.for_account(user_id, api_key) for user_id, api_key in others)]
        say("ready")
        sys.stdin.readline()
        report = await sync_meetings(clients, store, max_concurrency=8, **handlers[job["handler"]])
    say(json.dumps({"failed": report.failed, "errors": [str(f.error) for f in report.failures]}))


def say(line: str) -> None:
    """Write a line, and out."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    todo = json.loads(sys.stdin.readline())
    anyio.run(run, todo, backend=todo["backend"])
