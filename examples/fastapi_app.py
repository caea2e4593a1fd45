"""A small service: lists the meetings, knows of each booking as it is made, and misses no change.

The webhook is for speed, the synchronization for truth: a delivery wakes it, and it runs every five
minutes anyway, because deliveries get lost and cancellations are never delivered.

Try it on the sandbox, which needs no account: ``python examples/fastapi_app.py --sandbox``. Against
lemcal itself, set LEMCAL_USER_ID, LEMCAL_API_KEY, WEBHOOK_TOKEN (a long random string) and PUBLIC_URL
(where lemcal reaches this service), and leave out ``--sandbox``.
"""

import argparse
import os
import secrets
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import uvicorn
from fastapi import FastAPI

from lemcal_async import AsyncLemcal, Meeting, to_wire
from lemcal_async.fastapi import Lemcal, add_exception_handlers, lifespan, webhook_router
from lemcal_async.sandbox import Sandbox
from lemcal_async.sync import Change, MemoryStore, Store, Wake, watch
from lemcal_async.webhooks import WebhookReceiver, hook_url

HOOK = "/webhooks/lemcal"


def create_app(lemcal: AsyncLemcal, store: Store, *, token: str, public_url: str) -> FastAPI:
    """Return the service, on any client (the real one, or a sandbox's) and store."""
    bookings: deque[Meeting] = deque(maxlen=100)
    changes: deque[Change] = deque(maxlen=100)
    wake = Wake()

    async def on_meeting(meeting: Meeting) -> None:
        # Each booking comes here once, as lemcal has it. Raise, and it comes again.
        bookings.append(meeting)

    async def on_change(change: Change) -> None:
        # Each change comes here, in order: created, changed, canceled, disappeared, restored.
        changes.append(change)

    @asynccontextmanager
    async def live(app: FastAPI) -> AsyncGenerator[None]:
        target = hook_url(f"{public_url}{HOOK}", token)
        async with lifespan(lemcal, hook_url=target)(app), anyio.create_task_group() as tasks:
            keep = partial(watch, interval=300, on_change=on_change, wake=wake, baseline=True)
            tasks.start_soon(keep, [lemcal], store)
            yield
            tasks.cancel_scope.cancel()

    receiver = WebhookReceiver(lemcal, token=token, on_meeting=on_meeting, wake=wake)
    app = FastAPI(title="Bookings", lifespan=live)
    app.include_router(webhook_router(receiver, HOOK))
    add_exception_handlers(app)

    @app.get("/meetings")
    async def meetings(lemcal: Lemcal) -> list[dict[str, Any]]:  # pyright: ignore[reportUnusedFunction]
        """List the meetings that were not canceled."""
        return [to_wire(meeting) for meeting in await lemcal.meetings.list() if not meeting.is_canceled]

    @app.get("/bookings")
    async def new() -> list[dict[str, Any]]:  # pyright: ignore[reportUnusedFunction]
        """List the bookings that came in since the start."""
        return [to_wire(meeting) for meeting in bookings]

    @app.get("/changes")
    async def changed() -> list[dict[str, Any]]:  # pyright: ignore[reportUnusedFunction]
        """List what changed since the start, cancellations included."""
        return [{"kind": change.kind, "meeting": change.wire} for change in changes]

    return app


def serve(lemcal: AsyncLemcal, port: int, *, token: str, public_url: str) -> None:
    """Serve until Ctrl-C. What is under way then has half a minute to end."""
    # For a service that is restarted: SQLStore("postgresql://…"), and dedup=store for the receiver.
    app = create_app(lemcal, MemoryStore(), token=token, public_url=public_url)
    uvicorn.run(app, port=port, timeout_graceful_shutdown=30)


def main() -> None:
    """Serve, against lemcal or a sandbox."""
    parser = argparse.ArgumentParser(description="A small service that knows of each booking.")
    parser.add_argument("--sandbox", action="store_true", help="use a sandbox of its own: no account needed")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    here = f"http://127.0.0.1:{arguments.port}"
    if not arguments.sandbox:
        token, public_url = os.environ.get("WEBHOOK_TOKEN"), os.environ.get("PUBLIC_URL")
        if not token or not public_url:
            parser.error("set WEBHOOK_TOKEN and PUBLIC_URL, or pass --sandbox")
        serve(AsyncLemcal(deadline=10), arguments.port, token=token, public_url=public_url)
        return
    with Sandbox().serve() as sandbox:
        origin = sandbox.base_url.partition("/api/")[0]
        print(f"Book something: curl -X POST {origin}/_sandbox/bookings", flush=True)
        print(f"It shows at     {here}/bookings, and {here}/docs has the rest", flush=True)
        serve(sandbox.client(deadline=10), arguments.port, token=secrets.token_urlsafe(32), public_url=here)


if __name__ == "__main__":
    main()
