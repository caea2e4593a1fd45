"""A meeting is handled once: by one task, in one process, and again only if that failed."""

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


class Journal(InMemoryDedup):
    """A deduplication that writes down what it is asked, and fails when it is told to."""

    def __init__(self, *, fails_at: str = "") -> None:
        super().__init__()
        self.asked: list[str] = []
        self._fails_at = fails_at

    def _note(self, what: str) -> None:
        self.asked.append(what)
        if what == self._fails_at:
            raise OSError("the database at postgresql://me:secret@host is gone")

    async def claim(self, user_id: str, meeting_id: str, lease: float) -> Claim:
        """Write it down."""
        self._note("claim")
        return await super().claim(user_id, meeting_id, lease)

    async def done(self, user_id: str, meeting_id: str) -> None:
        """Write it down."""
        self._note("done")
        await super().done(user_id, meeting_id)

    async def release(self, user_id: str, meeting_id: str) -> None:
        """Write it down."""
        self._note("release")
        await super().release(user_id, meeting_id)


class Desk:
    """Has meetings handled, and notes when the senders were told to come again."""

    def __init__(self, handler: Callable[..., Any], dedup: Dedup | None = None, limit: float = 30) -> None:
        self.dedup = dedup or Journal()
        self.dispatcher = Dispatcher(handler, self.dedup, limit)
        self.told_late = anyio.Event()

    async def handle(self, meeting: Meeting = MEETING, *more: Any) -> str:
        """Return the outcome."""

        async def late() -> None:
            self.told_late.set()

        return await self.dispatcher.dispatch("usr_1", meeting, (meeting, *more), late)

    async def claim(self) -> Claim:
        """Return what another process would hear."""
        return await self.dedup.claim("usr_1", "mee_1", 1)


async def async_function(meeting: Meeting, kept: list[Any]) -> None:
    """Handle."""
    kept.append(threading.current_thread())


def plain_function(meeting: Meeting, kept: list[Any]) -> None:
    """Handle, and be allowed to block."""
    kept.append(threading.current_thread())


class AsyncObject:
    """An object that is called like an async function."""

    async def __call__(self, meeting: Meeting, kept: list[Any]) -> None:
        """Handle."""
        kept.append(threading.current_thread())


def around(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a plain function that returns whatever another one does, as many a lambda is."""

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
        (around(async_function), False),
        (around(plain_function), True),
    ],
)
async def test_kinds_of_handlers(handler: Callable[..., Any], *, in_thread: bool) -> None:
    """Async ones run on the event loop, others in a thread, where they may block."""
    kept: list[threading.Thread] = []
    desk = Desk(handler)
    assert "handled" == await desk.handle(MEETING, kept)
    assert "repeated" == await desk.handle(MEETING, kept)
    assert [in_thread] == [thread is not threading.current_thread() for thread in kept]


@pytest.mark.parametrize("kind", ["async", "plain", "around"])
async def test_a_failure_is_no_handling(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """It comes again; the log has the meeting and the traceback, and not the error's words."""

    async def fail(meeting: Meeting) -> None:
        raise ValueError("guest" + "@example.com")

    def fail_in_thread(meeting: Meeting) -> None:
        raise ValueError("guest" + "@example.com")

    desk = Desk({"async": fail, "plain": fail_in_thread, "around": around(fail)}[kind])
    with caplog.at_level(logging.DEBUG):
        assert ("failed", "failed") == (await desk.handle(), await desk.handle())
    assert "new" == await desk.claim()
    ours = [record for record in caplog.records if record.name == "lemcal_async.webhooks"]
    assert 2 == len(ours)
    for record in ours:
        assert "meeting mee_1: on_meeting failed; the sender should retry" == record.getMessage()
    assert 'raise ValueError("' in caplog.text  # the line of the source
    assert "test_dispatch.py" in caplog.text
    assert "guest@" not in caplog.text


@pytest.mark.parametrize("succeeds", [True, False])
async def test_those_who_come_meanwhile_share_the_outcome(*, succeeds: bool) -> None:
    """Ten at once are one handling."""
    calls: list[str] = []
    release = anyio.Event()

    async def handler(meeting: Meeting) -> None:
        calls.append(meeting.id)
        await release.wait()
        if not succeeds:
            raise ValueError

    desk = Desk(handler)
    outcomes: list[str] = []

    async def one() -> None:
        outcomes.append(await desk.handle())

    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(one)
        await anyio.wait_all_tasks_blocked()
        assert ["mee_1"] == calls
        release.set()
    assert (["handled"] + ["repeated"] * 9 if succeeds else ["failed"] * 10) == sorted(outcomes)


async def test_others_go_on() -> None:
    """Meetings do not hold each other up, nor do accounts."""
    both = anyio.Event()
    calls: list[str] = []

    async def handler(meeting: Meeting) -> None:
        calls.append(meeting.id)
        if len(calls) == 2:
            both.set()
        await both.wait()

    desk = Desk(handler)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(desk.handle)
            tasks.start_soon(desk.handle, Meeting("mee_2"))
    assert ["mee_1", "mee_2"] == sorted(calls)


@pytest.mark.parametrize("kind", ["async", "around"])
async def test_too_late(kind: str) -> None:
    """It is canceled, and comes again."""
    canceled: list[bool] = []

    async def hang(meeting: Meeting) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            canceled.append(True)

    desk = Desk(hang if kind == "async" else around(hang), limit=0.1)
    assert ("failed", [True], "new") == (await desk.handle(), canceled, await desk.claim())


async def test_so_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain functions take no more threads than they have, however many meetings are booked."""
    monkeypatch.setattr(_dispatch, "THREADS", 2)
    running: list[str] = []
    seen: list[int] = []

    def handler(meeting: Meeting) -> None:
        running.append(meeting.id)
        time.sleep(0.02)
        seen.append(len(running))
        running.remove(meeting.id)

    desk = Desk(handler)
    async with anyio.create_task_group() as tasks:
        for number in range(8):
            tasks.start_soon(desk.handle, Meeting(f"mee_{number}"))
    assert (8, 2) == (len(seen), max(seen))


@pytest.mark.parametrize("succeeds", [True, False])
async def test_a_thread_that_takes_too_long(*, succeeds: bool) -> None:
    """The sender is told to come again, and so are others; when the thread ends, it counts."""
    calls: list[str] = []
    proceed = threading.Event()

    def slow(meeting: Meeting) -> None:
        calls.append(meeting.id)
        proceed.wait(20)
        if not succeeds:
            raise ValueError

    desk = Desk(slow, limit=0.1)
    outcomes: list[str] = []

    async def first() -> None:
        outcomes.append(await desk.handle())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(first)
        with anyio.fail_after(10):
            await desk.told_late.wait()
        assert ([], "failed", "busy") == (outcomes, await desk.handle(), await desk.claim())
        proceed.set()
    assert (["handled"] if succeeds else ["failed"]) == outcomes
    assert (["mee_1"], "done" if succeeds else "new") == (calls, await desk.claim())


async def test_canceled() -> None:
    """An async handler is canceled, and the meeting given back; those who waited are told."""
    dedup = Journal()

    async def hang(meeting: Meeting) -> None:
        await anyio.sleep_forever()

    desk = Desk(hang, dedup)
    outcomes: list[str] = []

    async def follow() -> None:
        outcomes.append(await desk.handle())

    async with anyio.create_task_group() as tasks:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as doomed:
                doomed.start_soon(desk.handle)
                await anyio.wait_all_tasks_blocked()
                tasks.start_soon(follow)
                await anyio.wait_all_tasks_blocked()
                scope.cancel()
    assert (["failed"], ["claim", "release"]) == (outcomes, dedup.asked)
    assert "new" == await desk.claim()


async def test_canceled_beside_a_thread() -> None:
    """It cannot be stopped, so the meeting stays its own until the claim lapses."""
    proceed, started = threading.Event(), threading.Event()

    def slow(meeting: Meeting) -> None:
        started.set()
        proceed.wait(20)

    desk = Desk(slow)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(desk.handle)
        await anyio.to_thread.run_sync(started.wait, 10)
        tasks.cancel_scope.cancel()
    proceed.set()
    assert ("busy", "busy") == (await desk.claim(), await desk.handle())


@pytest.mark.parametrize("what", ["claim", "done", "release"])
async def test_the_dedup_fails(what: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing counts as handled that is not remembered; its words stay out of the log."""
    calls: list[str] = []

    async def handler(meeting: Meeting) -> None:
        calls.append(meeting.id)
        if what == "release":
            raise ValueError

    desk = Desk(handler, Journal(fails_at=what))
    assert "failed" == await desk.handle()
    assert (0 if what == "claim" else 1) == len(calls)
    assert "meeting mee_1: dedup= " in caplog.text
    assert "OSError" in caplog.text
    assert "secret@host is" not in "".join(
        str(record.exc_info[1]) for record in caplog.records if record.exc_info
    )


@pytest.mark.parametrize("what", ["claim", "done", "release"])
async def test_the_dedup_hangs(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For so long at most, and then it comes again."""
    monkeypatch.setattr("lemcal_async.webhooks._dispatch.DEDUP_TIMEOUT", 0.05)

    async def handler(meeting: Meeting) -> None:
        if what == "release":
            raise ValueError

    async def hang(*_: object) -> None:
        await anyio.sleep_forever()

    dedup = Journal()
    monkeypatch.setattr(dedup, what, hang)
    assert "failed" == await Desk(handler, dedup).handle()


async def test_another_process() -> None:
    """Has it, and is waited for by the sender; or had it."""
    dedup = Journal()
    calls: list[str] = []

    async def handler(meeting: Meeting) -> None:
        calls.append(meeting.id)

    desk = Desk(handler, dedup)
    assert ("new", "busy") == (await desk.claim(), await desk.handle())
    await dedup.done("usr_1", "mee_1")
    assert ("repeated", []) == (await desk.handle(), calls)


@pytest.mark.parametrize("kind", ["async", "plain", "around"])
async def test_a_cancellation_that_nobody_asked_for(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """A handler that awaits what somebody else canceled has failed; its delivery is not lost."""

    async def fail(meeting: Meeting) -> None:
        raise anyio.get_cancelled_exc_class()._create() if _is_trio() else asyncio.CancelledError  # type: ignore[attr-defined]

    def fail_in_thread(meeting: Meeting) -> None:
        raise asyncio.CancelledError

    desk = Desk({"async": fail, "plain": fail_in_thread, "around": around(fail)}[kind])
    assert "failed" == await desk.handle()
    assert "new" == await desk.claim()
    assert "on_meeting failed" in caplog.text


def _is_trio() -> bool:
    return "trio" in anyio.get_cancelled_exc_class().__module__


async def test_a_thread_that_nobody_waits_for() -> None:
    """Without a sender to answer early, the thread is left behind, and the meeting stays its own."""
    proceed = threading.Event()
    dedup = Journal()
    dispatcher = Dispatcher(lambda _: proceed.wait(20), dedup, 0.05)
    assert "failed" == await dispatcher.dispatch("usr_1", MEETING, (MEETING,), None)
    proceed.set()
    assert "busy" == await dedup.claim("usr_1", "mee_1", 1)


@pytest.mark.parametrize("handler", [lambda: None, lambda a, b: None, lambda *, meeting: None, AsyncObject()])
@pytest.mark.parametrize("anyio_backend", ["none"])
def test_a_handler_that_cannot_be_called(anyio_backend: str, handler: Callable[..., Any]) -> None:
    """It is refused when the receiver is made, and not at the first booking."""
    client = AsyncLemcal("usr_1", "k1")
    with pytest.raises(
        ConfigurationError, match=r"on_meeting= is called as .*\(meeting\), and does not take"
    ):
        WebhookReceiver(client, token="t", on_meeting=handler)
    WebhookReceiver(client, token="t", on_meeting=print)


# --------------------------------------------------------------------------- the dedup of one process


async def test_claims_lapse() -> None:
    """After the lease, whoever had it must be gone."""
    now = 100.0
    dedup = InMemoryDedup(clock=lambda: now)
    assert ["new", "busy"] == [await dedup.claim("usr_1", "mee_1", 30) for _ in range(2)]
    assert "new" == await dedup.claim("usr_2", "mee_1", 30)
    now = 130.0
    assert "new" == await dedup.claim("usr_1", "mee_1", 30)
    await dedup.release("usr_1", "mee_1")
    await dedup.release("usr_1", "mee_1")
    assert "new" == await dedup.claim("usr_1", "mee_1", 30)


async def test_it_is_bounded() -> None:
    """Those that were not asked for longest go first."""
    dedup = InMemoryDedup(3)
    for number in range(1, 4):
        await dedup.done("usr_1", f"mee_{number}")
    assert "done" == await dedup.claim("usr_1", "mee_1", 30)
    await dedup.done("usr_1", "mee_4")
    claims = [await dedup.claim("usr_1", f"mee_{number}", 30) for number in range(1, 5)]
    assert ["done", "new", "done", "done"] == claims


def test_of_no_size() -> None:
    """It could not remember anything."""
    with pytest.raises(ConfigurationError, match="at least 1"):
        InMemoryDedup(0)
