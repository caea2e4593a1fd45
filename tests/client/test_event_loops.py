"""Event loops other than asyncio's default: uvloop, and one with eager tasks."""

import asyncio
import importlib
import importlib.util
import json
import sys
import threading
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from lemcal_async import Meeting
from lemcal_async.sandbox import Sandbox
from lemcal_async.sync import Change, SQLStore, Wake, sync_meetings, watch
from lemcal_async.transport import PooledTransport
from lemcal_async.transport.aiohttp import AiohttpTransport
from lemcal_async.transport.httpx2 import HTTPX2Transport
from lemcal_async.webhooks import WebhookReceiver


def new_uvloop() -> asyncio.AbstractEventLoop:
    """Return a uvloop event loop."""
    loop: asyncio.AbstractEventLoop = importlib.import_module("uvloop").new_event_loop()
    return loop


def new_eager_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop that runs each new task up to its first wait before its creator continues."""
    loop = asyncio.new_event_loop()
    if sys.version_info >= (3, 12):
        loop.set_task_factory(asyncio.eager_task_factory)
    return loop


pytestmark = pytest.mark.anyio

LOOPS = [
    pytest.param(
        ("asyncio", {"loop_factory": new_uvloop}),
        id="uvloop",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("uvloop") is None, reason="uvloop is not installed"
        ),
    ),
    pytest.param(
        ("asyncio", {"loop_factory": new_eager_loop}),
        id="eager",
        marks=pytest.mark.skipif(sys.version_info < (3, 12), reason="new in Python 3.12"),
    ),
]


@pytest.fixture(params=LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Run every test on these loops instead of the usual backends."""
    return request.param


@pytest.mark.parametrize("wire", [PooledTransport, HTTPX2Transport, AiohttpTransport])
async def test_calls(lemcal_sandbox: Sandbox, wire: type[Any]) -> None:
    """With more calls than the limit, some canceled in the queue, none is refused and all others finish."""
    async with wire() as transport, lemcal_sandbox.client(transport=transport) as lemcal:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                for _ in range(30):
                    tasks.start_soon(lemcal.me)
                while len(lemcal_sandbox.requests) < 20:  # noqa: ASYNC110  # a thread fills it
                    await anyio.sleep(0.01)
                scope.cancel()
        assert 12 == len(await lemcal.meetings.list())
    assert {200} == {request.status_code for request in lemcal_sandbox.requests}
    assert 21 <= len(lemcal_sandbox.requests) < 30


async def test_synchronization(lemcal_sandbox: Sandbox, tmp_path: Path) -> None:
    """A run finds all meetings; a wake-up from another thread then finds a new booking."""
    wake, found = Wake(), list[Change]()
    async with lemcal_sandbox.client() as lemcal, SQLStore(f"sqlite:///{tmp_path}/loops.db") as store:
        assert 12 == (await sync_meetings([lemcal], store, on_change=found.append)).created
        booked = anyio.Event()

        async def on_change(_: object) -> None:
            booked.set()

        async with anyio.create_task_group() as tasks:

            async def run() -> None:
                await watch([lemcal], store, interval=300, on_change=on_change, wake=wake)

            tasks.start_soon(run)
            lemcal_sandbox.book()
            thread = threading.Thread(target=wake.wake)
            thread.start()
            await booked.wait()
            tasks.cancel_scope.cancel()
        thread.join()
    assert 12 == len(found)


async def test_deliveries(lemcal_sandbox: Sandbox) -> None:
    """Many concurrent deliveries are handled, by an async handler and by a plain one in a thread."""
    handled: list[str] = []

    async def on_meeting(meeting: Meeting) -> None:
        await anyio.lowlevel.checkpoint()
        handled.append(meeting.id)

    async with lemcal_sandbox.client() as lemcal:
        for handler in (on_meeting, lambda meeting: handled.append(meeting.id)):
            receiver = WebhookReceiver(lemcal, token="token", on_meeting=handler)
            booked = [lemcal_sandbox.book() for _ in range(3)]
            statuses: list[int] = []

            async def deliver(receiver: WebhookReceiver, row: Any, statuses: list[int]) -> None:
                status, _, _ = await receiver.handle("POST", "token=token", {}, json.dumps(row).encode())
                statuses.append(status)

            async with anyio.create_task_group() as tasks:
                for row in booked * 2:
                    tasks.start_soon(deliver, receiver, row, statuses)
            assert [200] * 6 == statuses
    assert 6 == len(set(handled)) == len(handled)


async def test_asyncio_timeout(lemcal_sandbox: Sandbox) -> None:
    """``asyncio.timeout`` ends a call, and the client remains usable."""
    async with lemcal_sandbox.client() as lemcal:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await lemcal.me()
        assert lemcal_sandbox.user_id == (await lemcal.me()).id
