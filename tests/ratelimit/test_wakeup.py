"""Waking a task that waits, from wherever that is: its own event loop, another one, or none."""

import asyncio
import threading

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from lemcal_async._concurrency import Wakeup


async def settle() -> None:
    """Let every task run that can."""
    for _ in range(5):
        await anyio.lowlevel.checkpoint()


@pytest.mark.anyio
async def test_nobody_wakes_it() -> None:
    """It waits for so many seconds, and no longer."""
    started = anyio.current_time()
    wakeup = Wakeup()
    await wakeup.wait(30.0)
    assert 30.0 == pytest.approx(anyio.current_time() - started)
    assert not wakeup.event.is_set()


@pytest.mark.anyio
async def test_woken_from_its_own_loop() -> None:
    """Another task of the same loop wakes it, and says that it could."""
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
async def test_woken_before_it_waits() -> None:
    """A wake-up is not lost for having come early."""
    started = anyio.current_time()
    wakeup = Wakeup()
    assert wakeup.wake()
    await wakeup.wait(30.0)
    assert started == anyio.current_time()


@pytest.mark.anyio
async def test_rearmed() -> None:
    """One wake-up ends one wait; making ready twice, or without need, does no harm."""
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
async def test_rearming_does_not_undo_a_wait() -> None:
    """While nobody has woken it, the event that is waited on stays the one that is set."""
    wakeup = Wakeup()
    with anyio.fail_after(30.0):
        async with anyio.create_task_group() as group:
            group.start_soon(wakeup.event.wait)
            await settle()
            wakeup.rearm()
            assert wakeup.wake()


@pytest.mark.anyio
async def test_woken_from_a_thread_without_a_loop() -> None:
    """Any thread may wake it, one that knows of no event loop too."""
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
async def test_woken_from_another_loop(backend: str) -> None:
    """A task of one loop wakes one of another, of either kind."""
    wakeup = Wakeup()

    async def wake() -> bool:
        return wakeup.wake()

    assert await anyio.to_thread.run_sync(lambda: anyio.run(wake, backend=backend))
    await wakeup.event.wait()


@pytest.mark.parametrize("here", ["asyncio", "trio", None])
@pytest.mark.parametrize("gone", ["asyncio", "trio"])
def test_a_loop_that_is_gone(here: str | None, gone: str) -> None:
    """Nobody can be woken on a loop that has ended: the answer says so, wherever the question is asked."""

    async def make() -> Wakeup:
        return Wakeup()

    wakeup = anyio.run(make, backend=gone)

    async def wake() -> bool:
        return wakeup.wake()

    assert (wakeup.wake() if here is None else anyio.run(wake, backend=here)) is False
    assert not wakeup.event.is_set()


@pytest.mark.anyio
async def test_tasks_of_one_loop_know_each_other() -> None:
    """The loop is equal for tasks of the same one, and different from any other's."""
    mine = Wakeup()

    async def other() -> tuple[object, object]:
        return Wakeup().loop, Wakeup().loop

    one, two = await other()
    assert mine.loop is one is two
    one, two = await anyio.to_thread.run_sync(anyio.run, other)
    assert one is two
    assert mine.loop is not one


@pytest.mark.anyio
async def test_a_loop_that_runs() -> None:
    """It does not stand still, asked from within or from another thread."""
    wakeup = Wakeup()
    assert not wakeup.stands_still()
    assert not await anyio.to_thread.run_sync(wakeup.stands_still)


def test_a_loop_that_stands_still() -> None:
    """One of asyncio may be stopped and run again; what was to be woken meanwhile is woken then."""

    async def make() -> Wakeup:
        return Wakeup()

    async def wait(wakeup: Wakeup) -> None:
        with anyio.fail_after(5):
            await wakeup.event.wait()

    with asyncio.Runner() as runner:
        wakeup = runner.run(make())
        assert wakeup.stands_still()
        assert wakeup.wake()
        runner.run(wait(wakeup))
    assert wakeup.stands_still()
    assert not wakeup.wake()
