"""Stops and restarts at any moment: nothing is lost, and nothing is handled again."""

import logging
import threading
from collections import Counter
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from serving import serving

from lemcal_async import AsyncLemcal, Meeting
from lemcal_async.sandbox import Sandbox, faults
from lemcal_async.webhooks import InMemoryDedup, WebhookReceiver
from lemcal_async.webhooks._http import Receive, Scope, Send

from .conftest import TOKEN, running_receiver
from .posting import Response, post

pytestmark = pytest.mark.anyio


async def deliver_until_handled(port: Any, body: bytes, responses: list[Response]) -> None:
    """Deliver repeatedly until there is a 200."""
    while True:
        try:
            responses.append(await post(port(), body, query=f"?token={TOKEN}"))
        except OSError:
            pass  # the service is restarting
        else:
            if responses[-1].status_code == 200:
                return
        await anyio.sleep(0.05)


@pytest.mark.parametrize("grace", [30, 0])
async def test_restart_during_burst(sandbox: Sandbox, lemcal: AsyncLemcal, grace: int) -> None:
    """Every meeting is handled, and none that got a 200 before the restart is handled after it."""
    sandbox.inject(faults.slow(0.2), times=1, path="/meetings")
    dedup = InMemoryDedup()  # stands in for a persistent one
    handled: Counter[str] = Counter()
    ten_handled, all_handled = anyio.Event(), anyio.Event()

    async def handler(meeting: Meeting) -> None:
        await anyio.sleep(0.01 * (len(handled) % 5))
        handled[meeting.id] += 1
        if len(handled) == 10:
            ten_handled.set()

    booked = [sandbox.book()["_id"] for _ in range(40)]
    responses: dict[str, list[Response]] = {meeting_id: [] for meeting_id in booked}
    ports: list[int] = []

    async def sender(meeting_id: str) -> None:
        body = f'{{"_id": "{meeting_id}"}}'.encode()
        await deliver_until_handled(lambda: ports[-1], body, responses[meeting_id])
        if all(each and each[-1].status_code == 200 for each in responses.values()):
            all_handled.set()

    async with lemcal, anyio.create_task_group() as tasks:
        for run in range(2):
            receiver = WebhookReceiver(lemcal, token=TOKEN, on_meeting=handler, dedup=dedup)
            async with serving(receiver, grace=grace) as server:
                ports.append(server.port)
                for place, meeting_id in enumerate(booked if run == 0 else []):
                    tasks.start_soon(sender, meeting_id)
                    await anyio.sleep(0.002 * (place % 3))
                with anyio.fail_after(20):
                    if run == 0:
                        await ten_handled.wait()
                    else:
                        await all_handled.wait()
    assert set(booked) == set(handled)
    assert {1} == set(handled.values())


async def test_graceful_stop(
    sandbox: Sandbox, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running deliveries end normally at any harness, without warnings."""
    sandbox.inject(faults.slow(0.2), times=1, path="/meetings")
    responses: list[Response] = []
    both = anyio.Event()
    original, arrived = WebhookReceiver.__call__, 0

    async def counted(self: WebhookReceiver, scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal arrived
        arrived += scope["type"] == "http"
        if arrived == 2:
            both.set()
        await original(self, scope, receive, send)

    monkeypatch.setattr(WebhookReceiver, "__call__", counted)
    with caplog.at_level(logging.WARNING):
        async with running_receiver(sandbox) as harness, anyio.create_task_group() as tasks:

            async def deliver(body: Any) -> None:
                responses.append(await harness.post(body))

            tasks.start_soon(deliver, harness.book())
            tasks.start_soon(deliver, {"_id": "mee_forged"})
            await both.wait()
            harness.server.stop()
        assert {(200, "handled"), (200, "ignored")} == {response.summary for response in responses}
    assert [] == [record for record in caplog.records if record.name != "lemcal_async.webhooks"]


async def test_timeout_of_plain_handler(sandbox: Sandbox) -> None:
    """The sender is asked to retry, and once the thread has ended, a retry is a repeated delivery."""
    proceed = threading.Event()
    calls: list[str] = []

    def slow(meeting: Meeting) -> None:
        calls.append(meeting.id)
        proceed.wait(20)

    async with running_receiver(sandbox, on_meeting=slow, handler_timeout=0.1) as harness:
        booked = harness.book()
        assert (503, "failed") == (await harness.post(booked)).summary
        assert (503, "failed") == (await harness.post(booked)).summary
        proceed.set()
        response = await harness.post(booked)
        while response.status_code == 503:
            response = await harness.post(booked)
        assert (200, "repeated") == response.summary
        assert [booked["_id"]] == calls


async def test_cancellation_at_any_moment(sandbox: Sandbox, lemcal: AsyncLemcal) -> None:
    """A canceled delivery gets a 503 and can be delivered again."""
    body = b'{"_id": "%b"}' % sandbox.book()["_id"].encode()
    handled: list[str] = []

    async def handler(meeting: Meeting) -> None:
        await anyio.sleep(0.005)
        handled.append(meeting.id)

    receiver = WebhookReceiver(lemcal, token=TOKEN, on_meeting=handler, dedup=InMemoryDedup())

    async def deliver(seconds: float) -> int | None:
        sent: list[Any] = []
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/",
            "query_string": f"token={TOKEN}".encode(),
            "headers": [],
        }

        async def receive() -> Any:
            await anyio.lowlevel.checkpoint()
            return messages.pop()

        async def send(message: Any) -> None:
            await anyio.lowlevel.checkpoint()
            sent.append(message)

        with anyio.move_on_after(seconds):
            await receiver(scope, receive, send)
        return sent[0]["status"] if sent else None

    async with lemcal:
        statuses = [await deliver(0.001 * step) for step in range(25)]
        while len(statuses) < 40 and statuses[-1] != 200:
            statuses.append(await deliver(10))
    assert {200, 503} >= set(statuses)
    assert 200 == statuses[-1]
    assert 1 == len(set(handled))
    # A meeting that got a 200 was handled, and is not handled again.
    assert len(handled) <= 1 + statuses.index(200)
