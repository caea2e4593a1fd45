"""Fixtures for deliveries: a sandbox, a receiver on a real socket, and a sender."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import attrs
import pytest
from serving import Server, serving

from lemcal_async import AsyncLemcal, Meeting, RetryPolicy
from lemcal_async.sandbox import Sandbox
from lemcal_async.webhooks import WebhookReceiver, _lookup

from .posting import Response, post

TOKEN = "wh-token-8Lp3-quiet"
ONCE = RetryPolicy(attempts=1)


@attrs.define
class ReceiverHarness:
    """A sandbox, a receiver that serves one of its accounts, and the meetings that were handled."""

    sandbox: Sandbox
    receiver: WebhookReceiver
    server: Server
    handled: list[Meeting]
    handler_called: anyio.Event

    async def post(self, body: Any, *, token: str | None = TOKEN, **options: Any) -> Response:
        """Deliver ``body``; a dict is encoded as JSON."""
        query = options.pop("query", "" if token is None else f"?token={token}")
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        return await post(self.server.port, body, query=query, **options)

    async def post_concurrently(self, bodies: list[Any]) -> list[Response]:
        """Deliver several bodies concurrently."""
        responses: list[Response] = [None] * len(bodies)  # type: ignore[list-item]  # filled below

        async def deliver(index: int) -> None:
            responses[index] = await self.post(bodies[index])

        async with anyio.create_task_group() as tasks:
            for index in range(len(bodies)):
                tasks.start_soon(deliver, index)
        return responses

    def book(self, **changes: Any) -> dict[str, Any]:
        """Book a meeting and return its delivery."""
        return self.sandbox.book(**changes)

    def lists(self) -> list[str]:
        """Return the queries of the list calls that reached the sandbox."""
        return [seen.query for seen in list(self.sandbox.requests) if seen.path == "/meetings"]

    @property
    def handled_ids(self) -> list[str]:
        """The ids of the meetings that the handler received."""
        return [meeting.id for meeting in self.handled]


Handler = Callable[[Meeting], Awaitable[object]]


@asynccontextmanager
async def running_receiver(
    sandbox: Sandbox,
    *,
    handler: Any = None,
    grace: int = 30,
    client: dict[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[ReceiverHarness]:
    """Serve a receiver on the running event loop for the length of the block."""
    handled: list[Meeting] = []
    handler_called = anyio.Event()

    async def keep(meeting: Meeting) -> None:
        handled.append(meeting)
        handler_called.set()
        if handler is not None:
            await handler(meeting)

    lemcal = sandbox.client(**{"retry": ONCE, **(client or {})})
    options = {"token": TOKEN, "list_lag": 0.05, "on_meeting": keep, **options}
    receiver = WebhookReceiver(lemcal, **options)
    async with lemcal, serving(receiver, grace=grace) as server:
        yield ReceiverHarness(sandbox, receiver, server, handled, handler_called)


@pytest.fixture
def sandbox() -> Any:
    """Serve a sandbox with two accounts."""
    with Sandbox(accounts=2, meetings=5).serve() as sandbox:
        yield sandbox


@pytest.fixture
def lemcal(sandbox: Sandbox) -> AsyncLemcal:
    """Return a client of the sandbox's first account."""
    return sandbox.client(retry=ONCE)


@pytest.fixture(autouse=True)
def small_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the minimum time between list calls."""
    monkeypatch.setattr(_lookup, "GAP", 0.01)
