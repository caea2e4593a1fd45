"""Delivers an account's changes from the outbox: in order, at least once.

A change counts as delivered once its handler has returned. Changes are marked in batches, so a crash can
repeat those accepted since the last mark; a change that the handler did not accept is never marked.
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
"""Called with a list of an account's changes, oldest first; async or plain, like ``OnChange``."""

BATCH: Final = 50
"""The maximum number of changes delivered between two marks, or in one list."""

MARK_AFTER: Final = 0.5
"""Seconds after which the accepted changes are marked, once the handler returns."""

MARK_GRACE: Final = 5.0
"""Seconds that a canceled run may still spend on marking changes, if the store hangs."""


class Delivery:
    """Passes changes to a handler, one by one or in lists, and marks those that it accepts."""

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

    async def deliver(self, user_id: str, report: ReportBuilder) -> None:
        """Deliver the account's pending changes, until there are none left or the handler raises.

        An exception from the handler is added to the report and stops the account: that change and later ones
        stay pending. A change that has failed too often is parked instead, and delivery continues. After a
        cancellation, the change in progress is delivered again; accepted changes are marked in any case.
        """
        while batch := await self._store.pending(user_id, BATCH):
            offered = batch if self._on_changes is None else _next_list(batch)
            accepted: list[Change] = []
            failed: list[Change] = []
            park, text = False, ""
            try:
                await self._call(offered, accepted)
            except LeaseLostError:  # a fleet lost the account; not the handler's fault
                raise
            except Exception as error:  # noqa: BLE001  # reported, and logged with its traceback
                failed = offered[len(accepted) :] if self._on_changes else [offered[len(accepted)]]
                park, text = self._should_park(failed), error_text(error)
                self._report(user_id, failed, error, report, park=park)
            finally:
                await self._mark(accepted, report)
            if failed:
                await self._store.record_attempt(failed, text, park=park)
                if not park:
                    return
            elif len(accepted) == len(batch) < BATCH:
                return
            await anyio.lowlevel.checkpoint_if_cancelled()

    def _should_park(self, failed: Sequence[Change]) -> bool:
        """Whether to park the changes for which the handler raised.

        In a list, the failing change is unknown: next time, each change is delivered alone.
        """
        return len(failed) == 1 and failed[0].attempts + 1 >= self._max_attempts

    def _report(
        self, user_id: str, failed: Sequence[Change], error: Exception, report: ReportBuilder, *, park: bool
    ) -> None:
        first = failed[0]
        failure = Failure(user_id, "delivery", error)
        report.failures.append(failure)
        self._log.failed(failure, about=(first.seq, park))
        if park:
            report.parked += 1
            logger.error(
                "account %s: change %s (%s %s) is parked after %s attempts; retry_parked() delivers it again",
                user_id, first.seq, first.kind, first.meeting_id, first.attempts + 1,
            )  # fmt: skip

    async def _mark(self, accepted: Sequence[Change], report: ReportBuilder) -> None:
        report.delivered += len(accepted)
        if accepted:
            await finish(self._store.mark_delivered, accepted, grace=MARK_GRACE)

    async def _call(self, changes: list[Change], accepted: list[Change]) -> None:
        """Pass changes to the handler; raise CanceledElsewhereError if it canceled its own task."""
        try:
            await self._call_handler(changes, accepted)
        except anyio.get_cancelled_exc_class() as error:
            if await was_canceled_natively(error):
                raise CanceledElsewhereError from error
            raise

    async def _call_handler(self, changes: list[Change], accepted: list[Change]) -> None:
        """Call the handler with each change or with the whole list; add accepted changes to ``accepted``."""
        if self._on_changes is not None:
            await call(self._on_changes, changes, self._limiter)
            accepted += changes
            return
        assert self._on_change is not None  # noqa: S101  # one of the two is set
        until = time.monotonic() + MARK_AFTER
        with no_foreign_cancellation():
            while len(accepted) < len(changes) and (not accepted or time.monotonic() < until):
                if self._is_async:
                    change = changes[len(accepted)]
                    await self._on_change(change)
                    accepted.append(change)
                    await anyio.lowlevel.checkpoint_if_cancelled()
                else:
                    await self._in_thread(self._on_change, changes, accepted, until)

    async def _in_thread(
        self, on_change: OnChange, changes: list[Change], accepted: list[Change], until: float
    ) -> None:
        """Call a plain handler for several changes in one trip to a thread."""

        def call_each() -> list[Awaitable[Any]]:
            while len(accepted) < len(changes):
                outcome = on_change(changes[len(accepted)])
                if inspect.isawaitable(outcome):
                    return [outcome]  # in a list, because trio rejects a coroutine returned by a thread
                accepted.append(changes[len(accepted)])
                if time.monotonic() >= until:
                    break
                anyio.from_thread.check_cancelled()
            return []

        for outcome in await anyio.to_thread.run_sync(call_each, limiter=self._limiter):
            self._is_async = True  # a plain function that returns awaitables, such as a lambda
            await outcome
            accepted.append(changes[len(accepted)])


def _next_list(batch: list[Change]) -> list[Change]:
    """Return the list to deliver next: a change that failed before is delivered alone."""
    failed = [index for index, change in enumerate(batch) if change.attempts]
    return batch[: max(failed[0], 1)] if failed else batch
