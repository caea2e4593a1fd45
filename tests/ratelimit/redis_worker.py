"""One of several processes that share a key through Redis.

It prints a line when it is ready, makes its calls when it receives a line, and finally prints a report.
"""

import json
import sys
import time
from typing import Any

import anyio
import anyio.to_thread

from lemcal_async import AsyncLemcal, RetryPolicy
from lemcal_async.errors import LemcalError
from lemcal_async.ratelimit import RedisRateLimiter


def say(line: str) -> None:
    """Write a line for the parent process."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def work(job: dict[str, Any]) -> dict[str, object]:
    """Make ``job["calls"]`` calls at once, without retries."""
    errors: list[str] = []
    waited: list[float] = []
    options = {"base_url": job["base_url"], "retry": RetryPolicy(attempts=1)}
    async with (
        RedisRateLimiter(job["redis"], **job["limiter"]) as limiter,
        AsyncLemcal(job["user_id"], job["api_key"], limiter=limiter, **options) as lemcal,
    ):

        async def call() -> None:
            try:
                await lemcal.me()
            except LemcalError as error:
                errors.append(f"{type(error).__name__}: {error}")
            waited.append(time.monotonic() - started)

        say("ready")
        await anyio.to_thread.run_sync(sys.stdin.readline)
        started = time.monotonic()
        async with anyio.create_task_group() as calls:
            for _ in range(job["calls"]):
                calls.start_soon(call)
    return {"errors": errors, "waited": waited, "cpu": time.process_time()}


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    say(json.dumps(anyio.run(work, task, backend=task["backend"])))
