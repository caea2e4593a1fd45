"""A meeting is handled once, by one task in one process, and again only after a failure."""

import asyncio
import functools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from lemcal_async import AsyncLemcal, Meeting
from lemcal_async.errors import ConfigurationError
from lemcal_async.webhooks import Claim, Dedup, InMemoryDedup, WebhookReceiver, _dispatch
from lemcal_async.webhooks._dispatch import Dispatcher

pytestmark = pytest.mark.anyio

MEETING = Meeting("mee_1")


class RecordingDedup(InMemoryDedup):
    """A deduplication that records its calls, and fails in the given method."""

    def __init__(self, *, fails_at: str = "") -> None:
        super().__init__()
        self.calls: list[str] = []
        self._fails_at = fails_at

    def _record(self, method: str) -> None:
        self.calls.append(method)
        if method == self._fails_at:
            raise OSError("the database at postgresql://me:secret@host is down")

    async def claim(self, user_id: str, meeting_id: str, lease: float) -> Claim:
        """Record the call."""
        self._record("claim")
        return await super().claim(user_id, meeting_id, lease)

    async def done(self, user_id: str, meeting_id: str) -> None:
        """Record the call."""
        self._record("done")
        await super().done(user_id, meeting_id)

    async def release(self, user_id: str, meeting_id: str) -> None:
        """Record the call."""
        self._record("release")
        await super().release(user_id, meeting_id)


class Harness:
    """A dispatcher, its deduplication, and whether a sender was asked to retry after a timeout."""

    def __init__(self, handler: Callable[..., Any], dedup: Dedup | None = None, limit: float = 30) -> None:
        self.dedup = dedup or RecordingDedup()
        self.dispatcher = Dispatcher(handler, self.dedup, limit)
        self.timed_out = anyio.Event()

    async def handle(self, meeting: Meeting = MEETING, *more: Any) -> str:
        """Return the outcome."""

        async def on_timeout() -> None:
            self.timed_out.set()

        return await self.dispatcher.dispatch("usr_1", meeting, (meeting, *more), on_timeout)

    async def claim(self) -> Claim:
        """Claim the meeting as another process would."""
        return await self.dedup.claim("usr_1", "mee_1", 1)


async def async_function(meeting: Meeting, threads: list[Any]) -> None:
    """Handle."""
    threads.append(threading.current_thread())


def plain_function(meeting: Meeting, threads: list[Any]) -> None:
    """Handle; may block."""
    threads.append(threading.current_thread())


class AsyncObject:
    """An object with an async ``__call__``."""

    async def __call__(self, meeting: Meeting, threads: list[Any]) -> None:
        """Handle."""
        threads.append(threading.current_thread())


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function in a plain one that returns its result, like a lambda."""

    def plain(*arguments: Any) -> Any:
        return function(*arguments)

    return plain


@pytest.mark.parametrize(
    ("handler", "in_thread"),
    [
        (async_function, False),
        (functools.partial(async_function), False),
        (AsyncObject(), False),
        (AsyncObject().__call__, False),
        (plain_function, True),
        (functools.partial(plain_function), True),
        (wrapped(async_function), False),
        (wrapped(plain_function), True),
    ],
)
async def test_kinds_of_handlers(handler: Callable[..., Any], *, in_thread: bool) -> None:
    """Async handlers run on the event loop, plain ones in a thread, where they may block."""
    threads: list[threading.Thread] = []
    harness = Harness(handler)
    assert "handled" == await harness.handle(MEETING, threads)
    assert "repeated" == await harness.handle(MEETING, threads)
    assert [in_thread] == [thread is not threading.current_thread() for thread in threads]


@pytest.mark.parametrize("kind", ["async", "plain", "wrapped"])
async def test_failed_handler_is_called_again(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """The log contains the meeting and the traceback, but not the error's message."""

    async def fail(meeting: Meeting) -> None:
        raise ValueError("guest" + "@example.com")

    def fail_in_thread(meeting: Meeting) -> None:
        raise ValueError("guest" + "@example.com")

    harness = Harness({"async": fail, "plain": fail_in_thread, "wrapped": wrapped(fail)}[kind])
    with caplog.at_level(logging.DEBUG):
        assert ("failed", "failed") == (await harness.handle(), await harness.handle())
    assert "new" == await harness.claim()
    records = [record for record in caplog.records if record.name == "lemcal_async.webhooks"]
    assert 2 == len(records)
    for record in records:
        assert "meeting mee_1: on_meeting failed; the sender should retry" == record.getMessage()
    assert 'raise ValueError("' in caplog.text  # the line of the source
    assert "test_dispatch.py" in caplog.text
    assert "guest@" not in caplog.text


@pytest.mark.parametrize("succeeds", [True, False])
async def test_concurrent_deliveries_share_the_outcome(*, succeeds: bool) -> None:
    """Ten concurrent deliveries cause one handler call."""
    calls: list[str] = []
    release = anyio.Event()

    async def handler(meeting: Meeting) -> None:
        calls.append(meeting.id)
        await release.wait()
        if not succeeds:
            raise ValueError

    harness = Harness(handler)
    outcomes: list[str] = []

    async def deliver() -> None:
        outcomes.append(await harness.handle())

    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(deliver)
        await anyio.wait_all_tasks_blocked()
        assert ["mee_1"] == calls
        release.set()
    assert (["handled"] + ["repeated"] * 9 if succeeds else ["failed"] * 10) == sorted(outcomes)


async def test_meetings_are_handled_concurrently() -> None:
    """A meeting does not delay another one."""
    both = anyio.Event()
    calls: list[str] = []

    async def handler(meeting: Meeting) -> None:
        calls.append(meeting.id)
        if len(calls) == 2:
            both.set()
        await both.wait()

    harness = Harness(handler)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(harness.handle)
            tasks.start_soon(harness.handle, Meeting("mee_2"))
    assert ["mee_1", "mee_2"] == sorted(calls)


@pytest.mark.parametrize("kind", ["async", "wrapped"])
async def test_timeout_cancels_async_handler(kind: str) -> None:
    """A handler that times out is canceled, and its claim released."""
    canceled: list[bool] = []

    async def hang(meeting: Meeting) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            canceled.append(True)

    harness = Harness(hang if kind == "async" else wrapped(hang), limit=0.1)
    assert ("failed", [True], "new") == (await harness.handle(), canceled, await harness.claim())


async def test_thread_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain handlers use a limited number of threads, however many meetings are booked."""
    monkeypatch.setattr(_dispatch, "THREADS", 2)
    running: list[str] = []
    seen: list[int] = []

    def handler(meeting: Meeting) -> None:
        running.append(meeting.id)
        time.sleep(0.02)
        seen.append(len(running))
        running.remove(meeting.id)

    harness = Harness(handler)
    async with anyio.create_task_group() as tasks:
        for number in range(8):
            tasks.start_soon(harness.handle, Meeting(f"mee_{number}"))
    assert (8, 2) == (len(seen), max(seen))


@pytest.mark.parametrize("succeeds", [True, False])
async def test_timeout_of_plain_handler(*, succeeds: bool) -> None:
    """All senders are asked to retry; when the thread ends, its result counts."""
    calls: list[str] = []
    finish = threading.Event()

    def slow(meeting: Meeting) -> None:
        calls.append(meeting.id)
        finish.wait(20)
        if not succeeds:
            raise ValueError

    harness = Harness(slow, limit=0.1)
    outcomes: list[str] = []

    async def first() -> None:
        outcomes.append(await harness.handle())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(first)
        with anyio.fail_after(10):
            await harness.timed_out.wait()
        assert ([], "failed", "busy") == (outcomes, await harness.handle(), await harness.claim())
        finish.set()
    assert (["handled"] if succeeds else ["failed"]) == outcomes
    assert (["mee_1"], "done" if succeeds else "new") == (calls, await harness.claim())


async def test_cancellation_of_async_handler() -> None:
    """The handler is canceled and its claim released; waiting deliveries fail."""
    dedup = RecordingDedup()

    async def hang(meeting: Meeting) -> None:
        await anyio.sleep_forever()

    harness = Harness(hang, dedup)
    outcomes: list[str] = []

    async def follow() -> None:
        outcomes.append(await harness.handle())

    async with anyio.create_task_group() as tasks:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as doomed:
                doomed.start_soon(harness.handle)
                await anyio.wait_all_tasks_blocked()
                tasks.start_soon(follow)
                await anyio.wait_all_tasks_blocked()
                scope.cancel()
    assert (["failed"], ["claim", "release"]) == (outcomes, dedup.calls)
    assert "new" == await harness.claim()


async def test_cancellation_of_plain_handler() -> None:
    """A thread cannot be stopped, so it keeps its claim until the claim expires."""
    finish, started = threading.Event(), threading.Event()

    def slow(meeting: Meeting) -> None:
        started.set()
        finish.wait(20)

    harness = Harness(slow)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(harness.handle)
        await anyio.to_thread.run_sync(started.wait, 10)
        tasks.cancel_scope.cancel()
    finish.set()
    assert ("busy", "busy") == (await harness.claim(), await harness.handle())


@pytest.mark.parametrize("method", ["claim", "done", "release"])
async def test_failing_dedup(method: str, caplog: pytest.LogCaptureFixture) -> None:
    """A meeting that cannot be recorded does not count as handled; the error's message is not logged."""
    calls: list[str] = []

    async def handler(meeting: Meeting) -> None:
        calls.append(meeting.id)
        if method == "release":
            raise ValueError

    harness = Harness(handler, RecordingDedup(fails_at=method))
    assert "failed" == await harness.handle()
    assert (0 if method == "claim" else 1) == len(calls)
    assert "meeting mee_1: dedup= " in caplog.text
    assert "OSError" in caplog.text
    assert "secret@host is" not in "".join(
        str(record.exc_info[1]) for record in caplog.records if record.exc_info
    )


@pytest.mark.parametrize("method", ["claim", "done", "release"])
async def test_hanging_dedup(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that takes too long fails the delivery."""
    monkeypatch.setattr("lemcal_async.webhooks._dispatch.DEDUP_TIMEOUT", 0.05)

    async def handler(meeting: Meeting) -> None:
        if method == "release":
            raise ValueError

    async def hang(*_: object) -> None:
        await anyio.sleep_forever()

    dedup = RecordingDedup()
    monkeypatch.setattr(dedup, method, hang)
    assert "failed" == await Harness(handler, dedup).handle()


async def test_claim_of_another_process() -> None:
    """A meeting that another process is handling is busy; one that it handled is repeated."""
    dedup = RecordingDedup()
    calls: list[str] = []

    async def handler(meeting: Meeting) -> None:
        calls.append(meeting.id)

    harness = Harness(handler, dedup)
    assert ("new", "busy") == (await harness.claim(), await harness.handle())
    await dedup.done("usr_1", "mee_1")
    assert ("repeated", []) == (await harness.handle(), calls)


@pytest.mark.parametrize("kind", ["async", "plain", "wrapped"])
async def test_foreign_cancellation(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """A handler that awaits a canceled task has failed, and its delivery is not lost."""

    async def fail(meeting: Meeting) -> None:
        raise anyio.get_cancelled_exc_class()._create() if _is_trio() else asyncio.CancelledError  # type: ignore[attr-defined]

    def fail_in_thread(meeting: Meeting) -> None:
        raise asyncio.CancelledError

    harness = Harness({"async": fail, "plain": fail_in_thread, "wrapped": wrapped(fail)}[kind])
    assert "failed" == await harness.handle()
    assert "new" == await harness.claim()
    assert "on_meeting failed" in caplog.text


def _is_trio() -> bool:
    return "trio" in anyio.get_cancelled_exc_class().__module__


async def test_abandoned_thread() -> None:
    """Without ``on_timeout``, the thread is abandoned and keeps its claim."""
    finish = threading.Event()
    dedup = RecordingDedup()
    dispatcher = Dispatcher(lambda _: finish.wait(20), dedup, 0.05)
    assert "failed" == await dispatcher.dispatch("usr_1", MEETING, (MEETING,), None)
    finish.set()
    assert "busy" == await dedup.claim("usr_1", "mee_1", 1)


@pytest.mark.parametrize("handler", [lambda: None, lambda a, b: None, lambda *, meeting: None, AsyncObject()])
@pytest.mark.parametrize("anyio_backend", ["none"])
def test_handler_with_wrong_parameters(anyio_backend: str, handler: Callable[..., Any]) -> None:
    """Such a handler is rejected when the receiver is created, not at the first booking."""
    client = AsyncLemcal("usr_1", "k1")
    with pytest.raises(
        ConfigurationError, match=r"on_meeting= is called as .*\(meeting\), but does not accept"
    ):
        WebhookReceiver(client, token="t", on_meeting=handler)
    WebhookReceiver(client, token="t", on_meeting=print)


# --------------------------------------------------------------------------- InMemoryDedup


async def test_claims_expire() -> None:
    """After the lease, another caller can claim the meeting."""
    now = 100.0
    dedup = InMemoryDedup(clock=lambda: now)
    assert ["new", "busy"] == [await dedup.claim("usr_1", "mee_1", 30) for _ in range(2)]
    assert "new" == await dedup.claim("usr_2", "mee_1", 30)
    now = 130.0
    assert "new" == await dedup.claim("usr_1", "mee_1", 30)
    await dedup.release("usr_1", "mee_1")
    await dedup.release("usr_1", "mee_1")
    assert "new" == await dedup.claim("usr_1", "mee_1", 30)


async def test_size_limit() -> None:
    """The least recently used records are evicted first."""
    dedup = InMemoryDedup(3)
    for number in range(1, 4):
        await dedup.done("usr_1", f"mee_{number}")
    assert "done" == await dedup.claim("usr_1", "mee_1", 30)
    await dedup.done("usr_1", "mee_4")
    claims = [await dedup.claim("usr_1", f"mee_{number}", 30) for number in range(1, 5)]
    assert ["done", "new", "done", "done"] == claims


def test_size_of_zero() -> None:
    """A size below 1 is rejected."""
    with pytest.raises(ConfigurationError, match="at least 1"):
        InMemoryDedup(0)
