"""Delivery of an account's changes from the outbox: in order, at least once.

A change counts as delivered once its handler has returned. Marks are written in batches, so a crash can
repeat the changes since the last mark; nothing is ever marked that the handler did not take.
"""

import inspect
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeAlias

import anyio
import anyio.from_thread
import anyio.to_thread

from lemcal_async._callbacks import (
    CanceledElsewhereError,
    call,
    finish,
    is_async,
    no_foreign_cancellation,
    was_canceled_natively,
)
from lemcal_async.sync._report import Failure, FailureLog, ReportBuilder, error_text, logger
from lemcal_async.sync._store import Change, LeaseLostError, Store

OnChange: TypeAlias = Callable[[Change], Awaitable[Any] | Any]
"""Called with each change: an async function, or a plain one, which runs in a worker thread."""

OnChanges: TypeAlias = Callable[[list[Change]], Awaitable[Any] | Any]
"""Called with a list of an account's changes, oldest first; async or plain, as ``OnChange``."""

BATCH: Final = 50
"""At most this many changes are handed over between two marks, or in one list."""

MARK_AFTER: Final = 0.5
"""Seconds after which the changes taken so far are marked, once the handler returns."""

MARK_GRACE: Final = 5.0
"""Seconds that a canceled run may still take to write marks, if the store stands still."""


class Delivery:
    """Hands changes to a handler, one by one or in lists, and marks those it takes."""

    def __init__(
        self,
        store: Store,
        on_change: OnChange | None,
        on_changes: OnChanges | None,
        *,
        max_attempts: int,
        limiter: anyio.CapacityLimiter,
        log: FailureLog,
    ) -> None:
        self._store = store
        self._on_change = on_change
        self._on_changes = on_changes
        self._max_attempts = max_attempts
        self._limiter = limiter
        self._log = log
        self._is_async = on_change is not None and is_async(on_change)

    async def deliver(self, user_id: str, own: ReportBuilder) -> None:
        """Deliver the account's pending changes, until there are none or the handler raises.

        What the handler raises is in the report, and stops the account: that change and those after it stay
        pending. A change that has failed too often is parked instead, and the others go on. Canceled, what
        the handler was working on comes again; what it has taken is marked in any case.
        """
        while batch := await self._store.pending(user_id, BATCH):
            handed = batch if self._on_changes is None else _list_of(batch)
            taken: list[Change] = []
            failed: list[Change] = []
            park, text = False, ""
            try:
                await self._call(handed, taken)
            except LeaseLostError:  # of a fleet that has lost the account: the handler is not to blame
                raise
            except Exception as error:  # noqa: BLE001  # reported, and logged with its traceback
                failed = handed[len(taken) :] if self._on_changes else [handed[len(taken)]]
                park, text = self._is_over(failed), error_text(error)
                self._report(user_id, failed, error, own, park=park)
            finally:
                await self._mark(taken, own)
            if failed:
                await self._store.record_attempt(failed, text, park=park)
                if not park:
                    return
            elif len(taken) == len(batch) < BATCH:
                return
            await anyio.lowlevel.checkpoint_if_cancelled()

    def _is_over(self, failed: Sequence[Change]) -> bool:
        """Whether to park what the handler raised for.

        In a list, it is not known which change is to blame: each comes on its own next time.
        """
        return len(failed) == 1 and failed[0].attempts + 1 >= self._max_attempts

    def _report(
        self, user_id: str, failed: Sequence[Change], error: Exception, own: ReportBuilder, *, park: bool
    ) -> None:
        first = failed[0]
        failure = Failure(user_id, "delivery", error)
        own.failures.append(failure)
        self._log.failed(failure, about=(first.seq, park))
        if park:
            own.parked += 1
            logger.error(
                "account %s: change %s (%s %s) is parked after %s attempts; retry_parked() delivers it again",
                user_id, first.seq, first.kind, first.meeting_id, first.attempts + 1,
            )  # fmt: skip

    async def _mark(self, taken: Sequence[Change], own: ReportBuilder) -> None:
        own.delivered += len(taken)
        if taken:
            await finish(self._store.mark_delivered, taken, grace=MARK_GRACE)

    async def _call(self, changes: list[Change], taken: list[Change]) -> None:
        """Hand changes over; raise an error if the handler has canceled its own task."""
        try:
            await self._hand_over(changes, taken)
        except anyio.get_cancelled_exc_class() as error:
            if await was_canceled_natively(error):
                raise CanceledElsewhereError from error
            raise

    async def _hand_over(self, changes: list[Change], taken: list[Change]) -> None:
        """Call the handler with some changes, or with all; add to ``taken`` what it has taken."""
        if self._on_changes is not None:
            await call(self._on_changes, changes, self._limiter)
            taken += changes
            return
        assert self._on_change is not None  # noqa: S101  # one of the two
        until = time.monotonic() + MARK_AFTER
        with no_foreign_cancellation():
            while len(taken) < len(changes) and (not taken or time.monotonic() < until):
                if self._is_async:
                    change = changes[len(taken)]
                    await self._on_change(change)
                    taken.append(change)
                    await anyio.lowlevel.checkpoint_if_cancelled()
                else:
                    await self._in_thread(self._on_change, changes, taken, until)

    async def _in_thread(
        self, on_change: OnChange, changes: list[Change], taken: list[Change], until: float
    ) -> None:
        """Call a plain handler with many changes in one trip to a thread."""

        def call_each() -> list[Awaitable[Any]]:
            while len(taken) < len(changes):
                outcome = on_change(changes[len(taken)])
                if inspect.isawaitable(outcome):
                    return [outcome]  # in a list: trio lets no bare coroutine out of a thread
                taken.append(changes[len(taken)])
                if time.monotonic() >= until:
                    break
                anyio.from_thread.check_cancelled()
            return []

        for outcome in await anyio.to_thread.run_sync(call_each, limiter=self._limiter):
            self._is_async = True  # a lambda around an async function: from now on it is known
            await outcome
            taken.append(changes[len(taken)])


def _list_of(batch: list[Change]) -> list[Change]:
    """Return the list to hand over next: a change that failed before comes on its own."""
    failed = [index for index, change in enumerate(batch) if change.attempts]
    return batch[: max(failed[0], 1)] if failed else batch
