"""Stops and restarts, in the middle of everything: nothing is lost, nothing is handled again."""

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

from .conftest import TOKEN, scene
from .posting import Answer, post

pytestmark = pytest.mark.anyio


async def deliver_until_answered(port: Any, body: bytes, answers: list[Answer]) -> None:
    """Deliver again and again, as a sender that does not give up, until there is a 200."""
    while True:
        try:
            answers.append(await post(port(), body, query=f"?token={TOKEN}"))
        except OSError:
            pass  # nobody listens: the service is being restarted
        else:
            if answers[-1].status_code == 200:
                return
        await anyio.sleep(0.05)


@pytest.mark.parametrize("grace", [30, 0])
async def test_restart_in_a_burst(sandbox: Sandbox, lemcal: AsyncLemcal, grace: int) -> None:
    """Everything is handled, and what was answered 200 before is not handled after."""
    sandbox.inject(faults.slow(0.2), times=1, path="/meetings")
    memory = InMemoryDedup()  # stands for one that lasts
    handled: Counter[str] = Counter()
    some, all_answered = anyio.Event(), anyio.Event()

    async def handler(meeting: Meeting) -> None:
        await anyio.sleep(0.01 * (len(handled) % 5))
        handled[meeting.id] += 1
        if len(handled) == 10:
            some.set()

    booked = [sandbox.book()["_id"] for _ in range(40)]
    answers: dict[str, list[Answer]] = {meeting_id: [] for meeting_id in booked}
    ports: list[int] = []

    async def sender(meeting_id: str) -> None:
        body = f'{{"_id": "{meeting_id}"}}'.encode()
        await deliver_until_answered(lambda: ports[-1], body, answers[meeting_id])
        if all(each and each[-1].status_code == 200 for each in answers.values()):
            all_answered.set()

    async with lemcal, anyio.create_task_group() as tasks:
        for run in range(2):
            receiver = WebhookReceiver(lemcal, token=TOKEN, on_meeting=handler, dedup=memory)
            async with serving(receiver, grace=grace) as server:
                ports.append(server.port)
                for place, meeting_id in enumerate(booked if run == 0 else []):
                    tasks.start_soon(sender, meeting_id)
                    await anyio.sleep(0.002 * (place % 3))
                with anyio.fail_after(20):
                    if run == 0:
                        await some.wait()
                    else:
                        await all_answered.wait()
    assert set(booked) == set(handled)
    assert {1} == set(handled.values())


async def test_a_graceful_stop(
    sandbox: Sandbox, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deliveries that are under way, at whatever stage, end as ever; nobody has anything to complain of."""
    sandbox.inject(faults.slow(0.2), times=1, path="/meetings")
    answers: list[Answer] = []
    both = anyio.Event()
    receive_one, arrived = WebhookReceiver.__call__, 0

    async def noted(self: WebhookReceiver, scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal arrived
        arrived += scope["type"] == "http"
        if arrived == 2:
            both.set()
        await receive_one(self, scope, receive, send)

    monkeypatch.setattr(WebhookReceiver, "__call__", noted)
    with caplog.at_level(logging.WARNING):
        async with scene(sandbox) as stage, anyio.create_task_group() as tasks:

            async def deliver(body: Any) -> None:
                answers.append(await stage.post(body))

            tasks.start_soon(deliver, stage.book())
            tasks.start_soon(deliver, {"_id": "mee_forged"})
            await both.wait()
            stage.server.stop()
        assert {(200, "handled"), (200, "ignored")} == {answer.brief for answer in answers}
    assert [] == [record for record in caplog.records if record.name != "lemcal_async.webhooks"]


async def test_a_plain_handler_that_takes_too_long(sandbox: Sandbox) -> None:
    """The sender is told to come again, and when it does, the thread has done its work."""
    proceed = threading.Event()
    calls: list[str] = []

    def slow(meeting: Meeting) -> None:
        calls.append(meeting.id)
        proceed.wait(20)

    async with scene(sandbox, on_meeting=slow, handler_timeout=0.1) as stage:
        booked = stage.book()
        assert (503, "failed") == (await stage.post(booked)).brief
        assert (503, "failed") == (await stage.post(booked)).brief
        proceed.set()
        answer = await stage.post(booked)
        while answer.status_code == 503:
            answer = await stage.post(booked)
        assert (200, "repeated") == answer.brief
        assert [booked["_id"]] == calls


async def test_canceled_at_any_moment(sandbox: Sandbox, lemcal: AsyncLemcal) -> None:
    """Wherever the server cuts it off, it is answered 503 and can come again."""
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
    # What was answered 200 was handled, and not again after that.
    assert len(handled) <= 1 + statuses.index(200)
