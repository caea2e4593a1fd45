"""A service with one or more worker processes, for tests that repeat deliveries and kill processes.

It deduplicates in a database, and its rate limiter uses Redis if available. Each handled meeting is a line in
a file; each response names its process.
"""

import os
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lemcal_async import AsyncLemcal, Meeting
from lemcal_async.ratelimit import RedisRateLimiter
from lemcal_async.sync import SQLStore
from lemcal_async.webhooks import WebhookReceiver, _dispatch, _lookup

# Claims of a killed process must expire within the test,
_dispatch.DEDUP_TIMEOUT = 1.0
vars(_lookup)["GAP"] = 0.02  # and many repeated deliveries must be verified.

limiter = RedisRateLimiter(os.environ["REDIS"]) if "REDIS" in os.environ else None
lemcal = AsyncLemcal(base_url=os.environ["BASE_URL"], limiter=limiter)
store = SQLStore(os.environ["DATABASE"])


async def on_meeting(meeting: Meeting) -> None:
    """Record the meeting and the process."""
    await anyio.sleep(0.01)
    line = f"{os.getpid()} {meeting.id}\n".encode()
    handle = os.open(os.environ["HANDLED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, line)  # atomic, even across processes
    os.close(handle)


receiver = WebhookReceiver(
    lemcal, token=os.environ["TOKEN"], on_meeting=on_meeting, dedup=store, handler_timeout=0.5
)


class NamedReceiver:
    """The receiver, with its process id as a header of each response."""

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Call the receiver."""

        async def send_named(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"x-process", str(os.getpid()).encode()))
            await send(message)

        await receiver(scope, receive, send_named)


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    """Close the limiter, the client and the store at shutdown."""
    async with limiter or nullcontext(), lemcal, store:
        yield


async def me(_: Request) -> Response:
    """Make a call, and return the process id."""
    await lemcal.me()
    return Response(headers={"x-process": str(os.getpid())})


app = Starlette(routes=[Route("/hook", NamedReceiver()), Route("/me", me)], lifespan=lifespan)
