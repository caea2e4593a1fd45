"""Calling the user's functions: async ones on the event loop, plain ones in a worker thread.

Knows what becomes of a cancellation that is not the caller's own. What is called when, and what an error
means, is decided elsewhere.
"""

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from typing import Any

import anyio
import anyio.to_thread

from lemcal_async._concurrency import is_being_canceled


class CanceledElsewhereError(RuntimeError):
    """Something that was awaited had been canceled, though nobody canceled the task that awaited it."""

    def __init__(self) -> None:
        super().__init__(
            "canceled from elsewhere: a future or task it waited for was canceled, this run was not"
        )


@contextmanager
def no_foreign_cancellation() -> Generator[None]:
    """Raise CanceledElsewhereError in place of a cancellation that nobody asked of this task.

    Else it would end the task quietly, as if its scope had been canceled: that account, and all after it,
    would just be missing in the report.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or not _is_cancellation(error):
            raise
        if is_being_canceled():
            raise
        raise CanceledElsewhereError from error


async def was_canceled_alone(error: BaseException) -> bool:
    """Whether a task of ours was canceled natively, and not the scope that it belongs to.

    Call it with the cancellation in hand, in a task that nobody outside knows: then a function of the user's
    has canceled it, such as by ``asyncio.current_task().cancel()``. That would end the whole scope without a
    trace; so the request is taken back, and the caller reports it.
    """
    if not isinstance(error, asyncio.CancelledError) or anyio.current_effective_deadline() == -math.inf:
        return False  # trio has no other cancellation than a scope's
    task = asyncio.current_task()
    assert task is not None  # noqa: S101  # this one
    await asyncio.sleep(0)  # if all tasks are being canceled, this is when the scope is
    while task.cancelling():
        task.uncancel()
    return True


def _is_cancellation(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):  # from a nursery
        inner: tuple[BaseException, ...] = error.exceptions  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
        return all(isinstance(each, Exception) or _is_cancellation(each) for each in inner)
    return isinstance(error, (asyncio.CancelledError, anyio.get_cancelled_exc_class()))


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling the function is known to return an awaitable, and takes no time by itself."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def problem_with_callback(name: str, function: Callable[..., Any], parameters: tuple[str, ...]) -> str | None:
    """Return why ``name=`` cannot be called with these arguments, or None."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some builtins, nobody knows it
        return None
    try:
        signature.bind(*parameters)
    except TypeError:
        called = getattr(function, "__name__", type(function).__name__)
        return f"{name}= is called as {called}({', '.join(parameters)}), and does not take that"
    return None


async def call(function: Callable[..., Any], argument: object, limiter: anyio.CapacityLimiter) -> None:
    """Call a function of the user's and wait for it, whether it is async or plain.

    Canceled, a plain function still comes to its end first.
    """
    with no_foreign_cancellation():
        if is_async(function):
            await function(argument)
            return
        returned = await anyio.to_thread.run_sync(_boxed, function, argument, limiter=limiter)
        for outcome in returned:  # a lambda around an async function
            await outcome


async def finish(function: Callable[..., Awaitable[Any]], *arguments: object, grace: float) -> None:
    """Await a function to its end, even if this task is canceled: then for at most ``grace`` seconds."""
    scope = anyio.CancelScope(shield=True)
    errors: list[Exception] = []

    async def bound() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            scope.deadline = anyio.current_time() + grace

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bound)
        with scope:
            try:
                await function(*arguments)
            except Exception as error:  # noqa: BLE001  # raised below, outside of the group
                errors.append(error)
        tasks.cancel_scope.cancel()
    if errors:
        raise errors[0]


def _boxed(function: Callable[..., Any], argument: object) -> list[Awaitable[Any]]:
    """Return what is to be awaited, in a list: trio lets no bare coroutine out of a thread."""
    outcome = function(argument)
    return [outcome] if inspect.isawaitable(outcome) else []
