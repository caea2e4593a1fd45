"""Delivery of an account's changes out of the outbox: in order, at least once.

Knows when a change counts as delivered: when the handler has returned. What handlers do, and what becomes
of their errors, is left to others.
"""

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias

import anyio

from lemcal_async.sync.report import Tally
from lemcal_async.sync.store import Change, Store

OnChange: TypeAlias = Callable[[Change], Awaitable[Any] | Any]
"""What is called with each change: an async function, or a plain one that returns at once."""

_BATCH: Final = 100


async def deliver(store: Store, user_id: str, on_change: OnChange, tally: Tally) -> None:
    """Hand the account's pending changes to the handler, and count those that it takes.

    What the handler raises passes through: that change, and those after it, stay pending. Cancelled while
    the handler is at work, its change comes again; once it has returned, the change is marked in any case.
    """
    while batch := await store.pending(user_id, _BATCH):
        for change in batch:
            outcome = on_change(change)
            if inspect.isawaitable(outcome):
                await outcome
            tally.delivered += 1
            if not await _mark(store, change):
                break  # somebody else delivers the same ones: look again at what is left
            await anyio.lowlevel.checkpoint_if_cancelled()  # a plain handler awaits nothing


async def _mark(store: Store, change: Change) -> bool:
    with anyio.CancelScope(shield=True):
        return await store.mark_delivered(change)
    raise AssertionError("a shielded scope does not swallow")  # pragma: no cover
