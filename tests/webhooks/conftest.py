"""A scene for deliveries: a lemcal, a service with a receiver on a real socket, and somebody who posts."""

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

from .posting import Answer, post

TOKEN = "wh-token-8Lp3-quiet"
ONCE = RetryPolicy(attempts=1)


@attrs.define
class Scene:
    """What a test of the receiver has in hand."""

    sandbox: Sandbox
    receiver: WebhookReceiver
    server: Server
    handled: list[Meeting]
    in_hand: anyio.Event  # once the handler has a meeting

    async def post(self, body: Any, *, token: str | None = TOKEN, **oddities: Any) -> Answer:
        """Deliver ``body``, which is written as JSON unless it is bytes already."""
        query = oddities.pop("query", "" if token is None else f"?token={token}")
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        return await post(self.server.port, body, query=query, **oddities)

    async def post_at_once(self, bodies: list[Any]) -> list[Answer]:
        """Deliver several at the same time."""
        answers: list[Answer] = [None] * len(bodies)  # type: ignore[list-item]  # filled below

        async def one(place: int) -> None:
            answers[place] = await self.post(bodies[place])

        async with anyio.create_task_group() as tasks:
            for place in range(len(bodies)):
                tasks.start_soon(one, place)
        return answers

    def book(self, **changes: Any) -> dict[str, Any]:
        """Book a meeting, and return what lemcal would deliver."""
        return self.sandbox.book(**changes)

    def lists(self) -> list[str]:
        """Return the queries of the list calls that reached lemcal."""
        return [seen.query for seen in list(self.sandbox.requests) if seen.path == "/meetings"]

    @property
    def handled_ids(self) -> list[str]:
        """The ids of what the handler got."""
        return [meeting.id for meeting in self.handled]


Handler = Callable[[Meeting], Awaitable[object]]


@asynccontextmanager
async def scene(
    sandbox: Sandbox,
    *,
    handler: Any = None,
    grace: int = 30,
    client: dict[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[Scene]:
    """Set everything up on the running event loop, and take it down."""
    handled: list[Meeting] = []
    in_hand = anyio.Event()

    async def keep(meeting: Meeting) -> None:
        handled.append(meeting)
        in_hand.set()
        if handler is not None:
            await handler(meeting)

    lemcal = sandbox.client(**{"retry": ONCE, **(client or {})})
    options = {"token": TOKEN, "list_lag": 0.05, "on_meeting": keep, **options}
    receiver = WebhookReceiver(lemcal, **options)
    async with lemcal, serving(receiver, grace=grace) as server:
        yield Scene(sandbox, receiver, server, handled, in_hand)


@pytest.fixture
def sandbox() -> Any:
    """Serve a lemcal with two accounts."""
    with Sandbox(accounts=2, meetings=5).serve() as sandbox:
        yield sandbox


@pytest.fixture
def lemcal(sandbox: Sandbox) -> AsyncLemcal:
    """Return a client of its first account."""
    return sandbox.client(retry=ONCE)


@pytest.fixture(autouse=True)
def small_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let list calls follow each other closely."""
    monkeypatch.setattr(_lookup, "GAP", 0.01)
