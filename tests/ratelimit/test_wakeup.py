"""Waking a waiting task from its own event loop, from another loop, or from a thread without one."""

import asyncio
import threading

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from lemcal_async._concurrency import Wakeup


async def settle() -> None:
    """Let every runnable task run."""
    for _ in range(5):
        await anyio.lowlevel.checkpoint()


@pytest.mark.anyio
async def test_wait_times_out() -> None:
    """Without a wake-up, the wait ends after the given seconds."""
    started = anyio.current_time()
    wakeup = Wakeup()
    await wakeup.wait(30.0)
    assert 30.0 == pytest.approx(anyio.current_time() - started)
    assert not wakeup.event.is_set()


@pytest.mark.anyio
async def test_wake_from_the_same_loop() -> None:
    """Another task of the same loop wakes the waiting one, and ``wake`` returns True."""
    started = anyio.current_time()
    wakeup = Wakeup()
    woken = []

    async def wake() -> None:
        await anyio.sleep(1.0)
        woken.append(wakeup.wake())

    async with anyio.create_task_group() as group:
        group.start_soon(wake)
        await wakeup.wait(30.0)
    assert [True] == woken
    assert 1.0 == pytest.approx(anyio.current_time() - started)


@pytest.mark.anyio
async def test_wake_before_wait() -> None:
    """A wake-up that arrives before the wait is not lost."""
    started = anyio.current_time()
    wakeup = Wakeup()
    assert wakeup.wake()
    await wakeup.wait(30.0)
    assert started == anyio.current_time()


@pytest.mark.anyio
async def test_rearm() -> None:
    """One wake-up ends one wait; rearming twice or unnecessarily does no harm."""
    started = anyio.current_time()
    wakeup = Wakeup()
    wakeup.rearm()
    assert wakeup.wake()
    await wakeup.wait(30.0)
    wakeup.rearm()
    wakeup.rearm()
    await wakeup.wait(30.0)
    assert 30.0 == pytest.approx(anyio.current_time() - started)


@pytest.mark.anyio
async def test_rearm_does_not_affect_a_running_wait() -> None:
    """Unless it has been set, the event being waited on stays the one that ``wake`` sets."""
    wakeup = Wakeup()
    with anyio.fail_after(30.0):
        async with anyio.create_task_group() as group:
            group.start_soon(wakeup.event.wait)
            await settle()
            wakeup.rearm()
            assert wakeup.wake()


@pytest.mark.anyio
async def test_wake_from_a_thread_without_a_loop() -> None:
    """Any thread may wake the task, even one without an event loop."""
    wakeup = Wakeup()
    assert await anyio.to_thread.run_sync(_from_a_plain_thread, wakeup)
    await wakeup.event.wait()


def _from_a_plain_thread(wakeup: Wakeup) -> bool:
    woken = []
    thread = threading.Thread(target=lambda: woken.append(wakeup.wake()))
    thread.start()
    thread.join()
    return woken == [True]


@pytest.mark.anyio
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
async def test_wake_from_another_loop(backend: str) -> None:
    """A task wakes a task of another loop, of either backend."""
    wakeup = Wakeup()

    async def wake() -> bool:
        return wakeup.wake()

    assert await anyio.to_thread.run_sync(lambda: anyio.run(wake, backend=backend))
    await wakeup.event.wait()


@pytest.mark.parametrize("here", ["asyncio", "trio", None])
@pytest.mark.parametrize("closed", ["asyncio", "trio"])
def test_wake_on_a_closed_loop(here: str | None, closed: str) -> None:
    """``wake`` returns False if the waiting task's loop has ended, wherever it is called."""

    async def make() -> Wakeup:
        return Wakeup()

    wakeup = anyio.run(make, backend=closed)

    async def wake() -> bool:
        return wakeup.wake()

    assert (wakeup.wake() if here is None else anyio.run(wake, backend=here)) is False
    assert not wakeup.event.is_set()


@pytest.mark.anyio
async def test_loop_identifies_the_event_loop() -> None:
    """``loop`` is the same for tasks of one event loop, and different for any other."""
    mine = Wakeup()

    async def other() -> tuple[object, object]:
        return Wakeup().loop, Wakeup().loop

    one, two = await other()
    assert mine.loop is one is two
    one, two = await anyio.to_thread.run_sync(anyio.run, other)
    assert one is two
    assert mine.loop is not one


@pytest.mark.anyio
async def test_running_loop_does_not_stand_still() -> None:
    """A running loop does not stand still, whether checked from within or from another thread."""
    wakeup = Wakeup()
    assert not wakeup.is_loop_stopped()
    assert not await anyio.to_thread.run_sync(wakeup.is_loop_stopped)


def test_stopped_loop() -> None:
    """An asyncio loop may be stopped and run again; a wake-up sent in between takes effect then."""

    async def make() -> Wakeup:
        return Wakeup()

    async def wait(wakeup: Wakeup) -> None:
        with anyio.fail_after(5):
            await wakeup.event.wait()

    with asyncio.Runner() as runner:
        wakeup = runner.run(make())
        assert wakeup.is_loop_stopped()
        assert wakeup.wake()
        runner.run(wait(wakeup))
    assert wakeup.is_loop_stopped()
    assert not wakeup.wake()
