"""A meeting is handled once: by one task, in one process, and again only if that failed."""

import functools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from lemcal_async import Meeting
from lemcal_async.errors import ConfigurationError
from lemcal_async.webhooks import BoundedMemory, Memory, _dispatch as handling
from lemcal_async.webhooks._dispatch import Claim, Handling

pytestmark = pytest.mark.anyio

MEETING = Meeting("mee_1")


class Journal(BoundedMemory):
    """A memory that writes down what it is asked, and fails when it is told to."""

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

    def __init__(self, handler: Callable[..., Any], memory: Memory | None = None, limit: float = 30) -> None:
        self.memory = memory or Journal()
        self.handling = Handling(handler, self.memory, limit)
        self.told_late = anyio.Event()

    async def handle(self, meeting: Meeting = MEETING, *more: Any) -> str:
        """Return the outcome."""

        async def late() -> None:
            self.told_late.set()

        return await self.handling.handle("usr_1", meeting, (meeting, *more), late)

    async def claim(self) -> Claim:
        """Return what another process would hear."""
        return await self.memory.claim("usr_1", "mee_1", 1)


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
    """It comes again; the log says which meeting and where, and not what the words were."""

    async def fail(meeting: Meeting) -> None:
        raise ValueError("guest@example.com")

    def fail_in_thread(meeting: Meeting) -> None:
        raise ValueError("guest@example.com")

    desk = Desk({"async": fail, "plain": fail_in_thread, "around": around(fail)}[kind])
    with caplog.at_level(logging.DEBUG):
        assert ("failed", "failed") == (await desk.handle(), await desk.handle())
    assert "new" == await desk.claim()
    ours = [record for record in caplog.records if record.name == "lemcal_async.webhooks"]
    assert 2 == len(ours)
    for record in ours:
        assert "meeting mee_1: the handler raised ValueError at test_handling.py:" in record.getMessage()
        assert (None, None) == (record.exc_info, record.exc_text)
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
    """It is cancelled, and comes again."""
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
    monkeypatch.setattr(handling, "THREADS", 2)
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


async def test_cancelled() -> None:
    """An async handler is cancelled, and the meeting given back; those who waited are told."""
    memory = Journal()

    async def hang(meeting: Meeting) -> None:
        await anyio.sleep_forever()

    desk = Desk(hang, memory)
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
    assert (["failed"], ["claim", "release"]) == (outcomes, memory.asked)
    assert "new" == await desk.claim()


async def test_cancelled_beside_a_thread() -> None:
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
async def test_the_memory_fails(what: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing counts as handled that is not remembered; its words stay out of the log."""
    calls: list[str] = []

    async def handler(meeting: Meeting) -> None:
        calls.append(meeting.id)
        if what == "release":
            raise ValueError

    desk = Desk(handler, Journal(fails_at=what))
    assert "failed" == await desk.handle()
    assert (0 if what == "claim" else 1) == len(calls)
    assert "meeting mee_1: the memory failed: OSError at test_handling.py:" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("what", ["claim", "done", "release"])
async def test_the_memory_hangs(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For so long at most, and then it comes again."""
    monkeypatch.setattr("lemcal_async.webhooks._dispatch.MEMORY_TIME_LIMIT", 0.05)

    async def handler(meeting: Meeting) -> None:
        if what == "release":
            raise ValueError

    async def hang(*_: object) -> None:
        await anyio.sleep_forever()

    memory = Journal()
    monkeypatch.setattr(memory, what, hang)
    assert "failed" == await Desk(handler, memory).handle()


async def test_another_process() -> None:
    """Has it, and is waited for by the sender; or had it."""
    memory = Journal()
    calls: list[str] = []

    async def handler(meeting: Meeting) -> None:
        calls.append(meeting.id)

    desk = Desk(handler, memory)
    assert ("new", "busy") == (await desk.claim(), await desk.handle())
    await memory.done("usr_1", "mee_1")
    assert ("repeated", []) == (await desk.handle(), calls)


# --------------------------------------------------------------------------- the memory of one process


async def test_claims_lapse() -> None:
    """After the lease, whoever had it must be gone."""
    now = 100.0
    memory = BoundedMemory(clock=lambda: now)
    assert ["new", "busy"] == [await memory.claim("usr_1", "mee_1", 30) for _ in range(2)]
    assert "new" == await memory.claim("usr_2", "mee_1", 30)
    now = 130.0
    assert "new" == await memory.claim("usr_1", "mee_1", 30)
    await memory.release("usr_1", "mee_1")
    await memory.release("usr_1", "mee_1")
    assert "new" == await memory.claim("usr_1", "mee_1", 30)


async def test_it_is_bounded() -> None:
    """Those that were not asked for longest go first."""
    memory = BoundedMemory(3)
    for number in range(1, 4):
        await memory.done("usr_1", f"mee_{number}")
    assert "done" == await memory.claim("usr_1", "mee_1", 30)
    await memory.done("usr_1", "mee_4")
    claims = [await memory.claim("usr_1", f"mee_{number}", 30) for number in range(1, 5)]
    assert ["done", "new", "done", "done"] == claims


def test_of_no_size() -> None:
    """It could not remember anything."""
    with pytest.raises(ConfigurationError, match="at least 1"):
        BoundedMemory(0)
