"""Synchronizations in processes that are killed after random steps, and the invariants afterward."""

import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from lemcal_async.sandbox import Sandbox
from lemcal_async.sync import Change

WORKER = Path(__file__).parent / "worker.py"
HANDLERS = ("async", "plain", "lists")


class Crashes:
    """A sandbox whose meetings change, and workers that synchronize it into a database."""

    def __init__(self, sandbox: Sandbox, db: str, folder: Path, *, seed: int, fail_every: int = 0) -> None:
        self.sandbox = sandbox
        self.rng = random.Random(seed)
        self.log = folder / "delivered.log"
        self.log.touch()
        self.killed = 0  # number of workers killed before they finished
        self.job = {
            "db": db,
            "base_url": sandbox.base_url,
            "log": str(self.log),
            "accounts": [(account.user_id, account.api_key) for account in sandbox.accounts],
            "fail_every": fail_every,
        }

    def change_meetings(self) -> None:
        """Change meetings in every account."""
        for account in range(len(self.sandbox.accounts)):
            rows = self.sandbox.meetings(account)
            chosen = self.rng.sample(rows, 3)
            self.sandbox.edit(chosen[0]["_id"], start=f"2026-03-{self.rng.randrange(1, 28):02}T09:00:00.000Z")
            self.sandbox.cancel(chosen[1]["_id"])
            self.sandbox.remove(chosen[2]["_id"])
            self.sandbox.book(account)
            self.sandbox.book(account, public=False)

    @contextlib.contextmanager
    def worker(self, backend: str, **changes: Any) -> Generator["subprocess.Popen[str]"]:
        """Start a worker, which waits for ``go``; it is killed at the end of the block."""
        with subprocess.Popen(
            [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                handler = self.rng.choice(HANDLERS)
                job = {**self.job, "backend": backend, "handler": handler, **changes}
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()
                assert process.stdout.readline() == "ready\n"
                yield process
            finally:
                process.kill()

    def run(self, backend: str) -> None:
        """Run a worker to completion."""
        with self.worker(backend) as process:
            out, _ = process.communicate("go\n", timeout=60)
        report = json.loads(out)
        assert self.job["fail_every"] or report == {"failed": 0, "errors": []}

    def kill(self, backend: str) -> None:
        """Kill a worker after a random number of steps, from the first list to most of the deliveries."""
        with self.worker(backend) as process:
            assert process.stdin is not None
            last = self._steps() + self.rng.randrange(5 * len(self.sandbox.accounts))
            process.stdin.write("go\n")
            process.stdin.flush()
            while self._steps() < last and process.poll() is None:  # a failing handler may end it first
                time.sleep(0.001)
            process.kill()
            self.killed += process.wait() != 0

    def _steps(self) -> int:
        """Return how many lists were fetched and changes delivered in all runs so far."""
        return len(self.sandbox.requests) + len(self.delivered())

    def delivered(self) -> list[int]:
        """Return the ``seq`` of every delivered change, in order, including repeats."""
        return [int(line) for line in self.log.read_text().splitlines()]

    def check(self, outbox: list[Change], rows: list[tuple[str, str, str]]) -> None:
        """Check the final state: ``rows`` contains the user id, status and wire row of every meeting."""
        wanted = {
            account.user_id: {row["_id"]: row for row in self.sandbox.meetings(index)}
            for index, account in enumerate(self.sandbox.accounts)
        }
        stored: dict[str, dict[str, Any]] = {user_id: {} for user_id in wanted}
        for user_id, status, wire in rows:
            if status != "disappeared":
                row = json.loads(wire)
                stored[user_id][row["_id"]] = row
        assert wanted == stored  # the right rows
        assert wanted == replayed(outbox, wanted)  # no change lost or invented
        owner = {change.seq: change.user_id for change in outbox}
        delivered = self.delivered()
        assert owner.keys() == set(delivered)  # each change at least once
        assert all(change.delivered_at for change in outbox)
        newest: dict[str, int] = {}
        expected = {user_id: [seq for seq in owner if owner[seq] == user_id] for user_id in wanted}
        for seq in delivered:  # in order: a new change is the account's next, an old one a repeat
            user_id = owner[seq]
            if seq > newest.get(user_id, 0):
                assert expected[user_id].pop(0) == seq
                newest[user_id] = seq


def replayed(outbox: list[Change], accounts: Any) -> dict[str, dict[str, Any]]:
    """Return the lists that result from replaying the changes; check that each change is consistent."""
    lists: dict[str, dict[str, Any]] = {user_id: {} for user_id in accounts}
    disappeared: set[tuple[str, str]] = set()
    for change in outbox:
        listed, key = lists[change.user_id], (change.user_id, change.meeting_id)
        if change.kind == "disappeared":
            del listed[change.meeting_id]
            disappeared.add(key)
            continue
        assert (change.kind == "created") == (change.meeting_id not in listed and key not in disappeared)
        assert listed.get(change.meeting_id) != change.wire
        listed[change.meeting_id] = change.wire
    return lists
