"""What the client itself costs: CPU per call, siblings, import. Ratios against peers.

Every ratio is of two figures from the same run, the median of several rounds that alternate
between them, because machines are noisy. CPU is this process's; the server is another one.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import httpx

from lemcal_async import AsyncLemcal
from lemcal_async.ratelimit import LocalRateLimiter, Unlimited

HERE = Path(__file__).parent
CONCURRENT = 25
CALLS = 2_000
ROUNDS = 5
DEPENDENCIES = "import httpx, attrs, cattrs, anyio, tenacity"
OPTIONAL = (
    "coredis",
    "fastapi",
    "httpx2",
    "opentelemetry",
    "orjson",
    "rich",
    "sqlalchemy",
    "starlette",
    "trio",
    "typer",
)

Row = tuple[str, str, str]
Call = Callable[[], Awaitable[object]]


@contextmanager
def fixed_server() -> Iterator[str]:
    """Run the cheap server; yield the base URL."""
    command = [sys.executable, str(HERE / "fixed_server.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}/api/lemcal"
        finally:
            server.stdin.close()


async def cpu_per_call(call: Call) -> float:
    """Return the CPU seconds per call, with ``CONCURRENT`` workers."""

    async def worker() -> None:
        for _ in range(CALLS // CONCURRENT):
            await call()

    before = time.process_time()
    async with anyio.create_task_group() as workers:
        for _ in range(CONCURRENT):
            workers.start_soon(worker)
    return (time.process_time() - before) / CALLS


async def calls(base_url: str) -> dict[str, float]:
    """Return the CPU of one call, by kind, in seconds."""
    limiter = LocalRateLimiter(limit=1_000_000)
    async with (
        httpx.AsyncClient(auth=("usr_x", "secret"), trust_env=False) as bare,
        AsyncLemcal("usr_x", "secret", base_url=base_url, limiter=Unlimited()) as unlimited,
        AsyncLemcal("usr_x", "secret", base_url=base_url, limiter=limiter) as limited,
    ):

        async def plain() -> object:
            return (await bare.get(f"{base_url}/me")).json()

        async def escape_hatch() -> object:
            return await unlimited.request("GET", "/me")

        kinds: dict[str, Call] = {
            "httpx.AsyncClient.get + .json()": plain,
            "request(), no limiter": escape_hatch,
            "me(), no limiter": unlimited.me,
            "me(), local limiter": limited.me,
        }
        taken: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(ROUNDS):
            for kind, call in kinds.items():
                taken[kind].append(await cpu_per_call(call))
    return {kind: statistics.median(seconds) for kind, seconds in taken.items()}


def siblings(count: int) -> float:
    """Return the seconds to make ``count`` clients for other accounts."""
    lemcal = AsyncLemcal("usr_x", "secret")
    before = time.perf_counter()
    made = [lemcal.for_account(f"usr_{number}", "secret") for number in range(count)]
    taken = time.perf_counter() - before
    assert len(made) == count
    return taken


def import_seconds(statement: str) -> float:
    """Return the seconds that an import takes in a fresh interpreter, the best of many."""
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    run = [sys.executable, "-c", code]
    return min(float(subprocess.run(run, capture_output=True, check=True).stdout) for _ in range(15))


def optional_packages_loaded() -> list[str]:
    """Return which optional packages ``import lemcal_async`` brings along."""
    # httpx itself loads rich where it finds it, for its own command line.
    code = (
        f"{DEPENDENCIES}; import sys, json; before = set(sys.modules); from lemcal_async import AsyncLemcal; "
        f"print(json.dumps([name for name in {OPTIONAL!r} if name in set(sys.modules) - before]))"
    )
    found: list[str] = json.loads(
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    )
    return found


def measure() -> Iterator[Row]:
    """Yield what, how much, and the bound it is held to."""
    with fixed_server() as base_url:
        for backend in ("asyncio", "trio"):
            taken = anyio.run(calls, base_url, backend=backend)
            bare = taken.pop("httpx.AsyncClient.get + .json()")
            yield f"{backend}: CPU per call, bare httpx", f"{bare * 1e6:.0f} µs", ""
            for kind, seconds in taken.items():
                yield f"{backend}: CPU per call, {kind}", f"{seconds / bare:.2f} x bare", "0.75"
    yield "1,000 siblings by for_account", f"{siblings(1_000) * 1e3:.1f} ms", "50 ms"
    theirs = import_seconds(DEPENDENCIES)
    for statement, bound in (("import lemcal_async", "1.15"), ("from lemcal_async import AsyncLemcal", "")):
        ours = import_seconds(f"{DEPENDENCIES}; {statement}")
        yield statement, f"{ours / theirs:.2f} x its dependencies ({theirs * 1e3:.0f} ms)", bound
    yield "optional packages that it loads", ", ".join(optional_packages_loaded()) or "none", "none"


def main() -> None:
    """Print the table."""
    print(f"Python {sys.version.split()[0]}; {CONCURRENT} concurrent, median of {ROUNDS} rounds of {CALLS}\n")
    print(f"{'what':<52} {'measured':<28} bound")
    for what, measured, bound in measure():
        print(f"{what:<52} {measured:<28} {bound}", flush=True)


if __name__ == "__main__":
    main()
