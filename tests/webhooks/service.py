"""A service as users run one, in processes of its own, for tests that repeat, stop and kill.

Its memory is a database, its limiter in Redis if there is one. Each handled meeting is a line in a file;
each answer says which process gave it.
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

# The claims of a process that was killed are to lapse within the test,
_dispatch.DEDUP_TIMEOUT = 1.0
vars(_lookup)["GAP"] = 0.02  # and many repeats to be verified

limiter = RedisRateLimiter(os.environ["REDIS"]) if "REDIS" in os.environ else None
lemcal = AsyncLemcal(base_url=os.environ["BASE_URL"], limiter=limiter)
memory = SQLStore(os.environ["DATABASE"])


async def on_meeting(meeting: Meeting) -> None:
    """Handle a meeting, for a moment."""
    await anyio.sleep(0.01)
    line = f"{os.getpid()} {meeting.id}\n".encode()
    handle = os.open(os.environ["HANDLED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, line)  # whole, however many processes do
    os.close(handle)


receiver = WebhookReceiver(
    lemcal, token=os.environ["TOKEN"], on_meeting=on_meeting, dedup=memory, handler_timeout=0.5
)


class Signed:
    """The receiver, which says in each answer what process it is in."""

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Answer."""

        async def send_signed(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"x-process", str(os.getpid()).encode()))
            await send(message)

        await receiver(scope, receive, send_signed)


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    """Close what was opened."""
    async with limiter or nullcontext(), lemcal, memory:
        yield


async def me(_: Request) -> Response:
    """Make a call, and say which process it was."""
    await lemcal.me()
    return Response(headers={"x-process": str(os.getpid())})


app = Starlette(routes=[Route("/hook", Signed()), Route("/me", me)], lifespan=lifespan)
