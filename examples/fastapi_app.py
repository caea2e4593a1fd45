"""A small service that lists meetings, receives bookings within a second, and misses no change.

Webhooks are for speed, synchronization is for correctness: each delivery wakes the synchronization, which
also runs every five minutes, because deliveries get lost and cancellations are never delivered.

To try it on the sandbox, without an account, run ``python examples/fastapi_app.py --sandbox``. To use
lemcal itself, set LEMCAL_USER_ID, LEMCAL_API_KEY, WEBHOOK_TOKEN (a long random string) and PUBLIC_URL
(where lemcal can reach this service), and omit ``--sandbox``.
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
    """Return the service, with any client (for lemcal or a sandbox) and any store."""
    bookings: deque[Meeting] = deque(maxlen=100)
    changes: deque[Change] = deque(maxlen=100)
    wake = Wake()

    async def on_meeting(meeting: Meeting) -> None:
        # Called once per booking, with lemcal's own data. If it raises, the sender is asked to retry.
        bookings.append(meeting)

    async def on_change(change: Change) -> None:
        # Called with each change, in order: created, changed, canceled, disappeared, restored.
        changes.append(change)

    @asynccontextmanager
    async def live(app: FastAPI) -> AsyncGenerator[None]:
        target = hook_url(f"{public_url}{HOOK}", token)
        async with lifespan(lemcal, hook_url=target)(app), anyio.create_task_group() as tasks:
            keep_in_sync = partial(watch, interval=300, on_change=on_change, wake=wake, baseline=True)
            tasks.start_soon(keep_in_sync, [lemcal], store)
            yield
            tasks.cancel_scope.cancel()

    receiver = WebhookReceiver(lemcal, token=token, on_meeting=on_meeting, wake=wake)
    app = FastAPI(title="Bookings", lifespan=live)
    app.include_router(webhook_router(receiver, HOOK))
    add_exception_handlers(app)

    @app.get("/meetings")
    async def meetings(lemcal: Lemcal) -> list[dict[str, Any]]:  # pyright: ignore[reportUnusedFunction]
        """List the meetings that are not canceled."""
        return [to_wire(meeting) for meeting in await lemcal.meetings.list() if not meeting.is_canceled]

    @app.get("/bookings")
    async def new() -> list[dict[str, Any]]:  # pyright: ignore[reportUnusedFunction]
        """List the bookings received since startup."""
        return [to_wire(meeting) for meeting in bookings]

    @app.get("/changes")
    async def changed() -> list[dict[str, Any]]:  # pyright: ignore[reportUnusedFunction]
        """List the changes since startup, including cancellations."""
        return [{"kind": change.kind, "meeting": change.wire} for change in changes]

    return app


def serve(lemcal: AsyncLemcal, port: int, *, token: str, public_url: str) -> None:
    """Serve until Ctrl-C, then give running requests half a minute to finish."""
    # To survive restarts, use SQLStore("postgresql://…"), and pass dedup=store to the receiver.
    app = create_app(lemcal, MemoryStore(), token=token, public_url=public_url)
    uvicorn.run(app, port=port, timeout_graceful_shutdown=30)


def main() -> None:
    """Serve with lemcal or a sandbox."""
    parser = argparse.ArgumentParser(description="A small service that receives each booking.")
    parser.add_argument("--sandbox", action="store_true", help="start a sandbox; no account needed")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    local_url = f"http://127.0.0.1:{arguments.port}"
    if not arguments.sandbox:
        token, public_url = os.environ.get("WEBHOOK_TOKEN"), os.environ.get("PUBLIC_URL")
        if not token or not public_url:
            parser.error("set WEBHOOK_TOKEN and PUBLIC_URL, or pass --sandbox")
        serve(AsyncLemcal(deadline=10), arguments.port, token=token, public_url=public_url)
        return
    with Sandbox().serve() as sandbox:
        origin = sandbox.base_url.partition("/api/")[0]
        print(f"Book a meeting: curl -X POST {origin}/_sandbox/bookings", flush=True)
        print(f"Then see {local_url}/bookings, or {local_url}/docs for all routes", flush=True)
        token = secrets.token_urlsafe(32)
        serve(sandbox.client(deadline=10), arguments.port, token=token, public_url=local_url)


if __name__ == "__main__":
    main()
