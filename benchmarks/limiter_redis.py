"""The cost of sharing a key through Redis: four processes, 50 calls each, against the sandbox.

The ideal is 18 s: 200 calls in ten windows of 2 s, the last of which need not end. The server counts the
calls and the 429s. A result out of bounds fails the command.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from lemcal_async.sandbox import Sandbox

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from redis_server import RedisServer  # noqa: E402 - from the tests

WORKER = TESTS / "ratelimit" / "redis_worker.py"
PROCESSES = 4
CALLS = 50
IDEAL = 18.0
BOUND = 1.08


def measure(backend: str, latency: tuple[float, float]) -> tuple[tuple[str, ...], bool]:
    """Run the processes once; return a table row, and whether the results are within the bounds."""
    with RedisServer() as redis, Sandbox(latency=latency).serve() as sandbox:
        job = {
            "base_url": sandbox.base_url,
            "user_id": sandbox.user_id,
            "api_key": sandbox.api_key,
            "redis": redis.url,
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
        reports = [json.loads(worker.communicate(timeout=120)[0]) for worker in workers]
        last = max(max(one["waited"]) for one in reports)
        assert time.monotonic() - started >= last
        arrivals = sorted(request.at for request in sandbox.requests)
        refused = sum(request.status_code == 429 for request in sandbox.requests)
        closest = min(late - early for early, late in zip(arrivals, arrivals[20:], strict=False))
        means = [statistics.mean(one["waited"]) for one in reports]
        within = not refused and closest >= 2.0 and (latency[1] > 0 or last <= BOUND * IDEAL)
        row = (
            backend,
            f"{latency[0] * 1000:.0f}-{latency[1] * 1000:.0f} ms",
            f"{last / IDEAL:.3f}",
            str(refused),
            f"{closest:.3f} s",
            f"{max(means) / min(means):.2f}",
            f"{redis.script_calls() / (PROCESSES * CALLS):.2f}",
            "" if within else "OUT OF BOUNDS",
        )
    return row, within


def main() -> None:
    """Print the table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    print(f"Python {sys.version.split()[0]}; {PROCESSES} processes x {CALLS} calls, ideal {IDEAL:.0f} s")
    print(f"bounds: no 429, no 21 calls within 2 s, time/ideal at most {BOUND} without added latency\n")
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
    missed = False
    for _ in range(rounds):
        for backend in ("asyncio", "trio"):
            for latency in ((0.0, 0.0), (0.04, 0.2)):
                row, within = measure(backend, latency)
                missed = missed or not within
                print("  ".join(f"{value:<13}" for value in row), flush=True)
    sys.exit(missed)


if __name__ == "__main__":
    main()
