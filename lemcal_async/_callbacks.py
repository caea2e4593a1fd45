"""Calls the user's callbacks: async functions on the event loop, plain functions in a worker thread.

Also detects cancellations that did not come from the caller's scope. Other modules decide when to call a
callback and how to treat its errors.
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
    """A task awaited something that was canceled, although the task itself was not canceled."""

    def __init__(self) -> None:
        super().__init__(
            "canceled from elsewhere: a future or task that it awaited was canceled, but this run was not"
        )


@contextmanager
def no_foreign_cancellation() -> Generator[None]:
    """Raise CanceledElsewhereError in place of a cancellation that was not requested for this task.

    Otherwise, the task would end silently, as if its scope had been canceled: its account, and all accounts
    after it, would be missing from the report.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or not _is_cancellation(error):
            raise
        if is_being_canceled():
            raise
        raise CanceledElsewhereError from error


async def was_canceled_natively(error: BaseException) -> bool:
    """Whether this internal task was canceled natively, rather than through its scope.

    Call this while handling the cancellation, in a task that outside code has no reference to: the user's
    callback must then have canceled it, for example with ``asyncio.current_task().cancel()``. The
    cancellation would end the whole scope silently, so this revokes it, and the caller reports the failure.
    """
    if not isinstance(error, asyncio.CancelledError) or anyio.current_effective_deadline() == -math.inf:
        return False  # on trio, only scopes cancel
    task = asyncio.current_task()
    assert task is not None  # noqa: S101  # the running task
    await asyncio.sleep(0)  # if all tasks are being canceled, this lets the scope be canceled as well
    while task.cancelling():
        task.uncancel()
    return True


def _is_cancellation(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):  # raised by a nursery
        inner: tuple[BaseException, ...] = error.exceptions  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
        return all(isinstance(each, Exception) or _is_cancellation(each) for each in inner)
    return isinstance(error, (asyncio.CancelledError, anyio.get_cancelled_exc_class()))


def is_async(function: Callable[..., Any]) -> bool:
    """Whether the function is known to be async, so that calling it returns an awaitable and cannot block."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def problem_with_callback(name: str, function: Callable[..., Any], parameters: tuple[str, ...]) -> str | None:
    """Return why the callback ``name=`` cannot be called with these parameters, or None if it can."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have no known signature
        return None
    try:
        signature.bind(*parameters)
    except TypeError:
        called = getattr(function, "__name__", type(function).__name__)
        return f"{name}= is called as {called}({', '.join(parameters)}), but does not accept that"
    return None


async def call(function: Callable[..., Any], argument: object, limiter: anyio.CapacityLimiter) -> None:
    """Call the user's function, async or plain, and wait for it to finish.

    If this is canceled, a plain function still runs to completion first.
    """
    with no_foreign_cancellation():
        if is_async(function):
            await function(argument)
            return
        awaitables = await anyio.to_thread.run_sync(_call_in_thread, function, argument, limiter=limiter)
        for awaitable in awaitables:  # from a lambda around an async function, for example
            await awaitable


async def finish(function: Callable[..., Awaitable[Any]], *arguments: object, grace: float) -> None:
    """Run an async function to completion. If this task is canceled, give it up to ``grace`` seconds more."""
    scope = anyio.CancelScope(shield=True)
    errors: list[Exception] = []

    async def limit_grace() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            scope.deadline = anyio.current_time() + grace

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(limit_grace)
        with scope:
            try:
                await function(*arguments)
            except Exception as error:  # noqa: BLE001  # raised below, outside the task group
                errors.append(error)
        tasks.cancel_scope.cancel()
    if errors:
        raise errors[0]


def _call_in_thread(function: Callable[..., Any], argument: object) -> list[Awaitable[Any]]:
    """Return the awaitable to await, if any, in a list: trio forbids returning a coroutine from a thread."""
    result = function(argument)
    return [result] if inspect.isawaitable(result) else []
