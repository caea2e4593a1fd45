"""Distinguishing a task's own cancellation from one that it awaits."""

import asyncio

import anyio
import pytest

from lemcal_async._concurrency import is_being_canceled

pytestmark = pytest.mark.anyio


async def test_running_task() -> None:
    """A running task is not being canceled."""
    assert is_being_canceled() is False


async def test_canceled_by_an_anyio_scope() -> None:
    """A scope's cancellation is detected while it is handled."""
    seen = None
    with anyio.CancelScope() as scope:
        scope.cancel()
        try:
            await anyio.sleep(10)
        except anyio.get_cancelled_exc_class():
            seen = is_being_canceled()
            raise
    assert seen is True
    assert is_being_canceled() is False


async def test_canceled_natively(anyio_backend_name: str) -> None:
    """A native cancellation of the task is detected while it is handled."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no other cancellation")
    seen: list[bool] = []

    async def work() -> None:
        try:
            await asyncio.sleep(10)
        finally:
            seen.append(is_being_canceled())

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [True] == seen
    assert is_being_canceled() is False


async def test_awaited_future_is_canceled(anyio_backend_name: str) -> None:
    """A cancellation of an awaited future is not a cancellation of the task."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no futures")
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    with anyio.fail_after(5):
        with pytest.raises(asyncio.CancelledError):
            await future
        assert is_being_canceled() is False
