"""Telling one's own cancellation from one that merely passes by."""

import asyncio

import anyio
import pytest

from lemcal_async._concurrency import is_being_canceled

pytestmark = pytest.mark.anyio


async def test_nobody_canceled_this_task() -> None:
    """A task that runs is not being canceled."""
    assert is_being_canceled() is False


async def test_an_anyio_scope_cancels() -> None:
    """Seen in the except block of the await that was interrupted."""
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


async def test_asyncio_cancels(anyio_backend_name: str) -> None:
    """So is a native cancellation."""
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


async def test_somebody_canceled_what_is_awaited(anyio_backend_name: str) -> None:
    """The future was canceled, and this task was not."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no futures")
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    with anyio.fail_after(5):
        with pytest.raises(asyncio.CancelledError):
            await future
        assert is_being_canceled() is False
