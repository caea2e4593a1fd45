"""Fleet benchmarks: the cost of claims and turns, scaling, wake-up latency, and a chaos run.

They use real PostgreSQL and Valkey, workers in their own processes, and the sandbox with its rate limit. The
default is a short run; for a long one, pass ``--accounts 2000 --meetings 50 --kills 28 --seconds 300``.
Usage: ``python -m benchmarks.fleet [claim|turn|scaling|wake|chaos ...] [options]``.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import psutil  # type: ignore[import-untyped]
import psycopg
from sqlalchemy import make_url

from benchmarks.table import Measurement, show
from lemcal_async import AsyncLemcal
from lemcal_async.fleet import Fleet
from lemcal_async.sandbox import Sandbox, faults
from lemcal_async.sync import Change, SQLStore, sync_meetings

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from postgres_server import crash_and_restart, postgres_server
from redis_server import RedisServer

PARTS = ("claim", "turn", "scaling", "wake", "chaos")


def fleet_of(environment: "Environment", **options: Any) -> Fleet:
    """Return a fleet; each process creates its own."""
    keys = json.loads((environment.folder / "keys.json").read_text())
    handled = os.open(environment.folder / "handled", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    async def key_of(user_id: str) -> str | None:
        key: str | None = keys.get(user_id)
        return key

    async def on_change(change: Change) -> None:
        line = f"{change.user_id} {change.seq} {change.meeting_id} {time.time()}\n"
        os.write(handled, line.encode())

    lemcal = AsyncLemcal.for_accounts(base_url=environment.base_url)
    options = {"interval": 3600, "grace": 10, **options}
    return Fleet(
        environment.store,
        environment.queue,
        credentials=key_of,
        on_change=on_change,
        lemcal=lemcal,
        **options,
    )


class Environment:
    """The environment of a benchmark: folder, database, queue and service."""

    def __init__(self, folder: Path, store: str, queue: str, base_url: str) -> None:
        self.folder, self.store, self.queue, self.base_url = folder, store, queue, base_url

    @contextlib.contextmanager
    def workers(self, count: int, concurrency: int) -> Iterator[list["subprocess.Popen[bytes]"]]:
        """Run worker processes, and stop them gracefully."""
        running = [self.worker(concurrency) for _ in range(count)]
        try:
            yield running
        finally:
            for process in running:
                process.send_signal(signal.SIGTERM)
            for process in running:
                process.wait(60)

    def worker(self, concurrency: int) -> "subprocess.Popen[bytes]":
        """Start a worker process."""
        arguments = [str(self.folder), self.store, self.queue, self.base_url, str(concurrency)]
        return subprocess.Popen([sys.executable, "-m", "benchmarks.fleet", "worker", *arguments])

    def handled(self) -> list[list[str]]:
        """Return the changes that the handlers received: account, seq, meeting and time."""
        file = self.folder / "handled"
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []

    def cpu(self) -> float:
        """Return the CPU seconds of all finished workers."""
        return sum(float(file.read_text()) for file in self.folder.glob("cpu-*"))


def work(folder: str, store: str, queue: str, base_url: str, concurrency: str) -> None:
    """Run a worker, then write its CPU seconds, without those of startup, to a file."""
    fleet = fleet_of(Environment(Path(folder), store, queue, base_url))  # imports the queue's dependencies
    began = resource.getrusage(resource.RUSAGE_SELF)
    anyio.run(fleet.run, int(concurrency))
    ended = resource.getrusage(resource.RUSAGE_SELF)
    cpu = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
    (Path(folder) / f"cpu-{os.getpid()}").write_text(str(cpu))


class Bench:
    """The servers, and a new environment for each benchmark."""

    def __init__(self, options: argparse.Namespace, postgres: str, redis: RedisServer) -> None:
        self.options, self.postgres, self.redis = options, postgres, redis
        self._count = 0

    @contextlib.contextmanager
    def environment(self, sandbox: Sandbox) -> Iterator[Environment]:
        """Provide an environment with an empty database and an empty queue."""
        self._count += 1
        name = f"fleet{self._count}"
        with psycopg.connect(self.postgres, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        self.redis.command("FLUSHALL")
        store = make_url(self.postgres).set(database=name).render_as_string(hide_password=False)
        with tempfile.TemporaryDirectory() as folder:
            keys = {account.user_id: account.api_key for account in sandbox.accounts}
            (Path(folder) / "keys.json").write_text(json.dumps(keys))
            yield Environment(Path(folder), store, self.redis.tcp_url, sandbox.base_url)

    def servers_cpu(self) -> dict[str, float]:
        """Return the CPU seconds that each server has used so far."""
        with psycopg.connect(self.postgres) as connection:
            ((file,),) = connection.execute("SHOW data_directory").fetchall()
        postgres = psutil.Process(int((Path(file) / "postmaster.pid").read_text().split()[0]))
        own, backends = postgres.cpu_times(), [child.cpu_times() for child in postgres.children()]
        ended = own.children_user + own.children_system
        info = dict(line.split(":") for line in self.redis.command("INFO", "cpu").split() if ":" in line)
        return {
            "PostgreSQL": ended + sum(times.user + times.system for times in [own, *backends]),
            "Valkey": float(info["used_cpu_user"]) + float(info["used_cpu_sys"]),
        }

    async def claim(self) -> list[Measurement]:
        """Measure the cost of claiming an account, with an increasing number of accounts."""
        found = []
        for count in (1_000, 100_000, *([1_000_000] if self.options.million else [])):
            with Sandbox(accounts=1).serve() as sandbox, self.environment(sandbox) as environment:
                async with SQLStore(environment.store) as store:
                    schedule = store.schedule()
                    await schedule.add(["usr_0"], interval=300)
                    with psycopg.connect(environment.store, autocommit=True) as connection:
                        connection.execute(
                            "INSERT INTO accounts (user_id, revision, empty_lists, interval, due_at,"
                            " failures, wanted, paused)"
                            " SELECT 'usr_' || n, 0, 0, 300, n / 1e6, 0, false, false"
                            f" FROM generate_series(1, {count - 1}) n"
                        )
                        connection.execute("ANALYZE accounts")
                    await schedule.claim(100)
                    began, claimed = time.perf_counter(), 0
                    while claimed < min(count // 2, 5_000):
                        claimed += len(await schedule.claim(100))
                    seconds = time.perf_counter() - began
            found.append(Measurement(f"claim, {count:,} accounts", seconds / claimed * 1e6, "µs", 100))
        return found

    async def turn(self) -> list[Measurement]:
        """Compare the CPU time of a turn with that of the same account in ``sync_meetings``."""
        count = self.options.accounts
        found = []
        sandbox = Sandbox(accounts=count, meetings=50, limit=None)
        with sandbox.serve(), self.environment(sandbox) as environment, self.environment(sandbox) as other:
            fleet, ids = fleet_of(environment), [account.user_id for account in sandbox.accounts]
            lemcal = AsyncLemcal.for_accounts(base_url=sandbox.base_url)
            async with SQLStore(other.store) as store, lemcal:
                clients = [lemcal.for_account(a.user_id, a.api_key) for a in sandbox.accounts]
                for what in ("first run", "nothing new", "nothing new, each woken"):
                    before, servers = environment.cpu(), self.servers_cpu()
                    if what == "first run":
                        await fleet.add(ids)
                    elif what == "nothing new":
                        with psycopg.connect(environment.store) as connection:
                            connection.execute("UPDATE accounts SET due_at = 1")
                    else:
                        await fleet.wake(ids)
                    with environment.workers(1, 16):
                        await until(fleet, is_idle, 300)
                    turns = environment.cpu() - before
                    for name, seconds in self.servers_cpu().items():
                        each = (seconds - servers[name]) / count * 1e3
                        found.append(Measurement(f"CPU of {name} per turn, {what}", each, "ms"))
                    began = time.process_time()
                    handled: list[int] = []

                    async def on_change(change: Change, handled: list[int] = handled) -> None:
                        handled.append(change.seq)

                    await sync_meetings(clients, store, on_change=on_change)
                    plain = time.process_time() - began
                    note = f"{turns / count * 1e3:.1f} / {plain / count * 1e3:.1f} ms"
                    found.append(
                        Measurement(f"CPU, turn / sync_meetings, {what}", turns / plain, "x", 1.5, note=note)
                    )
        return found

    async def scaling(self) -> list[Measurement]:
        """Compare one worker with four, with slow responses from lemcal."""
        seconds, cpu = {}, {}
        for count in (1, 4):
            accounts = 120 * count
            sandbox = Sandbox(accounts=accounts, meetings=5, limit=None)
            with sandbox.serve(), self.environment(sandbox) as environment:
                sandbox.inject(faults.slow(0.3), times=10**9)
                fleet = fleet_of(environment)
                with environment.workers(count, 4):
                    await until(fleet, lambda status, count=count: status.workers == count, 60)  # type: ignore[misc]
                    began = time.perf_counter()
                    await fleet.add([account.user_id for account in sandbox.accounts])
                    await until(fleet, is_idle, 300)
                    seconds[count] = (time.perf_counter() - began) / accounts
                cpu[count] = environment.cpu() / accounts
        return [
            Measurement(
                "accounts per second, 4 workers / 1", seconds[1] / seconds[4], "x", 3.6, at_least=True
            ),
            Measurement("CPU per account, 4 workers / 1", cpu[4] / cpu[1], "x", 1.3),
        ]

    async def wake(self) -> list[Measurement]:
        """Measure the time from a wake-up to the handler, in an idle fleet and in one with a backlog."""
        found = []
        for what, bound in (("idle", 0.1), ("under backlog", 0.5)):
            accounts = 40 if what == "idle" else self.options.accounts
            sandbox = Sandbox(accounts=accounts, meetings=5, limit=None)
            with sandbox.serve(), self.environment(sandbox) as environment:
                fleet = fleet_of(environment)
                ids = [account.user_id for account in sandbox.accounts]
                await fleet.add(ids[:40])
                with environment.workers(2, 8):
                    await until(fleet, is_idle, 120)
                    await fleet.add(ids)
                    booked: dict[str, float] = {}
                    async with fleet.waker() as waker:
                        for number in range(40):
                            booked[sandbox.book(number)["_id"]] = time.time()
                            await waker.wake(ids[number])
                            await anyio.sleep(0.05)
                        ids_done: set[str] = set()
                        with anyio.fail_after(120):
                            while not booked.keys() <= ids_done:
                                await anyio.sleep(0.1)
                                ids_done = {line[2] for line in environment.handled()}
                took = sorted(
                    float(line[3]) - booked[line[2]] for line in environment.handled() if line[2] in booked
                )
                found.append(
                    Measurement(
                        f"wake to handled, p95, {what}", statistics.quantiles(took, n=20)[-1], "s", bound
                    )
                )
        return found

    async def chaos(self) -> list[Measurement]:
        """Kill workers, queue and database during bookings; count lost, repeated and reordered changes."""
        options = self.options
        concurrency, rng = 4, random.Random(1)
        sandbox = Sandbox(accounts=options.accounts, meetings=options.meetings)
        with sandbox.serve(), self.environment(sandbox) as environment:
            fleet = fleet_of(environment)
            ids = [account.user_id for account in sandbox.accounts]
            await fleet.add(ids, interval=30)
            with psycopg.connect(
                self.postgres, autocommit=True
            ) as connection:  # the default of a real server
                connection.execute("ALTER SYSTEM RESET synchronous_commit")
                connection.execute("SELECT pg_reload_conf()")
            workers = [environment.worker(concurrency) for _ in range(4)]
            began, booked, kills = time.monotonic(), 0, 0
            done = {"wiped": False, "restarted": False, "postgres": False}
            while (passed := time.monotonic() - began) < options.seconds:
                account = rng.randrange(len(ids))
                sandbox.book(account)
                booked += 1
                with contextlib.suppress(Exception):  # the database may be restarting
                    await fleet.wake([ids[account]])
                if kills < options.kills * passed / options.seconds:
                    victim = rng.randrange(4)
                    workers[victim].kill()
                    workers[victim].wait()
                    workers[victim] = environment.worker(concurrency)
                    kills += 1
                share = passed / options.seconds
                if share > 0.3 and not done["wiped"]:
                    done["wiped"] = True
                    self.redis.command("FLUSHALL")
                if share > 0.5 and not done["restarted"]:
                    done["restarted"] = True
                    self.redis.restart()
                if share > 0.7 and not done["postgres"]:
                    done["postgres"] = True
                    await anyio.to_thread.run_sync(crash_and_restart, self.postgres)
                await anyio.sleep(0.05)
            expected = options.accounts * options.meetings + booked
            with anyio.move_on_after(600):
                while len({(line[0], line[2]) for line in environment.handled()}) < expected:  # noqa: ASYNC110
                    await anyio.sleep(1)
            for process in workers:
                process.send_signal(signal.SIGTERM)
            for process in workers:
                process.wait(60)
            lines = environment.handled()
        changes = Counter((line[0], line[1]) for line in lines)
        seqs = defaultdict(list)
        for user_id, seq in dict.fromkeys((line[0], int(line[1])) for line in lines):
            seqs[user_id].append(seq)
        lost = expected - len({(line[0], line[2]) for line in lines})
        repeated = sum(count - 1 for count in changes.values())
        reordered = sum(sorted(order) != order for order in seqs.values())
        return [
            Measurement(f"lost, {kills} kills, {expected:,} changes", lost, "changes", 0),
            Measurement("accounts out of order", reordered, "accounts", 0),
            Measurement("handled twice", repeated, "changes", kills * concurrency * 50),
            Measurement("handled twice / (kills x concurrency)", repeated / max(1, kills * concurrency), "x"),
        ]


def is_idle(status: Any) -> bool:
    """Whether no account is due, queued or running."""
    return not (status.due or status.running or status.queued)


async def until(fleet: Fleet, reached: Callable[[Any], bool], seconds: float) -> None:
    """Wait until the fleet's status satisfies ``reached``."""
    with anyio.fail_after(seconds):
        while not reached(await fleet.status()):  # noqa: ASYNC110
            await anyio.sleep(0.1)


def main() -> None:
    """Run the benchmarks, and exit with status 1 if a bound is exceeded."""
    if sys.argv[1:2] == ["worker"]:
        work(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--accounts", type=int, default=200)
    parser.add_argument("--meetings", type=int, default=10)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--million", action="store_true", help="also claim from a million accounts")
    options = parser.parse_args()
    found: list[Measurement] = []
    with postgres_server() as postgres, RedisServer(tcp=True) as redis:
        bench = Bench(options, postgres, redis)
        for part in options.parts or PARTS:
            found += anyio.run(getattr(bench, part))
    sys.exit(not all(each.holds for each in show(found)))


if __name__ == "__main__":
    main()
