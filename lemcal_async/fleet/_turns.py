"""A turn: one account, held by one worker, fetched, stored and delivered, and then released.

What makes it safe: the lease is taken, and asked for by every write, in the database; and nothing is handed
to the user's function once the lease may be over by this process's own clock, even if the process has stood
still in between.
"""

import functools
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from datetime import datetime
from time import monotonic
from typing import Any, Final, TypeAlias

import anyio
import attrs

from lemcal_async._callbacks import is_async, no_foreign_cancellation
from lemcal_async._client import AsyncLemcal
from lemcal_async.errors import ConfigurationError, LemcalError
from lemcal_async.fleet._engine import Batch, Turn
from lemcal_async.sync import Applied, Change, SQLStore
from lemcal_async.sync._report import ReportBuilder
from lemcal_async.sync._runner import Runner, SyncOptions
from lemcal_async.sync._schedule import Due
from lemcal_async.sync._store import Lease, LeaseLostError

logger = logging.getLogger("lemcal_async.fleet")

LEASE: Final = 60.0
"""Seconds for which a turn holds its account; renewed for as long as the turn lasts."""
_RENEW_AFTER: Final = LEASE / 3
_LOOK_AROUND: Final = LEASE / 12  # seconds between two looks for leases to renew
_MARGIN: Final = 5.0  # seconds before its end from which on a lease is taken for over
_ENDING: Final = 10.0  # seconds for giving a lease back
_WEIGHT: Final = 0.1  # of a turn in the mean of how long one takes

Credentials: TypeAlias = Callable[[str], Awaitable[str | None]]
"""From a user id to the account's API key, None if there is none. Asked at each turn; keys are never kept."""


@attrs.define(eq=False)
class _Held:
    """An account in the hands of this process."""

    lease: Lease
    store: SQLStore
    until: float  # by the monotonic clock, which goes on while a process stands still
    scope: anyio.CancelScope
    revision: int | None  # as the lease says it, until it was asked for
    has_pending: bool
    is_released: bool = False

    def check(self) -> None:
        """Raise LeaseLostError if the lease may be over. Called in a worker's thread, too."""
        if monotonic() > self.until - _MARGIN:
            raise LeaseLostError(f"the lease of {self.lease.user_id} has ended; its turn was given up")


class Turns:
    """Takes turns for a fleet. One of it serves one worker."""

    def __init__(
        self, store: SQLStore, lemcal: AsyncLemcal, credentials: Credentials, options: SyncOptions
    ) -> None:
        self._schedule = store.schedule()
        self._store = store
        self._lemcal = lemcal
        self._credentials = credentials
        self._held: dict[str, _Held] = {}
        self._is_stopping = self._is_cut_short = False
        self.seconds_each = 1.0  # that a turn takes, about; at first, so that batches are small
        self.on_ended: Callable[[], None] = _nothing
        if options.on_change is not None:
            checked = self._checked(options.on_change, lambda change: change.user_id)
            options = attrs.evolve(options, on_change=checked)
        if options.on_changes is not None:
            checked = self._checked(options.on_changes, lambda some: some[0].user_id)
            options = attrs.evolve(options, on_changes=checked)
        self._delivers = options.on_change is not None or options.on_changes is not None
        self._runner = Runner(_LeasedStores(store, self._held), options)

    def __len__(self) -> int:
        """Return how many turns are under way."""
        return len(self._held)

    def stop(self) -> None:
        """Begin no other turn; those under way end as usual."""
        self._is_stopping = True

    def cancel(self) -> None:
        """Cut the turns under way short; their accounts are due at once."""
        self._is_stopping = self._is_cut_short = True
        for held in list(self._held.values()):
            held.scope.cancel()

    async def take(self, batch: Batch) -> None:
        """Take the turns of a batch to their end, those that it is still time for. Logs what goes wrong."""
        left = list(reversed(batch))
        try:
            while left and not self._is_stopping:
                await self._take(left.pop())
        finally:
            if left:
                with anyio.move_on_after(_ENDING, shield=True):
                    await self._unclaim(left)
            self.on_ended()

    async def _unclaim(self, turns: Batch) -> None:
        """Let others have accounts at once that were to be next."""
        due = [
            Due(turn.user_id, wanted=False, due_at=turn.claimed) for turn in turns if turn.claimed is not None
        ]
        try:
            await self._schedule.unclaim(due)
        except LemcalError as error:
            logger.warning(
                "%d accounts rest for their interval, as they were not unclaimed: %s", len(due), error
            )

    async def _take(self, turn: Turn) -> None:
        if turn.user_id in self._held:
            return
        try:
            with no_foreign_cancellation():
                began = monotonic()
                lease = await self._schedule.acquire(turn.user_id, LEASE, claimed=turn.claimed or 0.0)
                if lease is not None:
                    await self._hold(lease, began)
                    self.seconds_each += _WEIGHT * (monotonic() - began - self.seconds_each)
        except Exception as error:  # the database: the account comes up again when its lease ends
            message = str(error) if isinstance(error, LemcalError) else None
            logger.error("account %s: the turn failed: %s", turn.user_id, message, exc_info=not message)  # noqa: TRY400

    async def _hold(self, lease: Lease, began: float) -> None:
        scope = anyio.CancelScope()
        held = _Held(
            lease,
            self._store.with_lease(lease),
            began + LEASE,
            scope,
            lease.revision,
            lease.has_pending and self._delivers,
        )
        self._held[lease.user_id] = held
        outcome: ReportBuilder | None = None
        try:
            if self._is_cut_short:
                scope.cancel()
            with scope:
                outcome = await self._synchronize(lease.user_id)
        finally:
            del self._held[lease.user_id]
            if not held.is_released:
                with anyio.move_on_after(_ENDING, shield=True):
                    await self._release(lease, outcome)

    async def _synchronize(self, user_id: str) -> ReportBuilder:
        try:
            with no_foreign_cancellation():
                found: object = self._credentials(user_id)
                if not inspect.isawaitable(found):
                    raise ConfigurationError("credentials= must be an async function")  # noqa: TRY301
                api_key = await found
            if api_key is None:
                raise ConfigurationError(f"credentials= has no API key for {user_id}")  # noqa: TRY301
            lemcal = self._lemcal.for_account(user_id, api_key)
        except Exception as error:  # noqa: BLE001  # a user's function may raise anything
            return await self._runner.failed(user_id, error)
        return await self._runner.synchronize(lemcal)

    async def _release(self, lease: Lease, outcome: ReportBuilder | None) -> None:
        try:
            if outcome is None:
                await self._schedule.give_back(lease)
            elif failed := [failure.error for failure in outcome.failures if failure.stage != "delivery"]:
                await self._schedule.back_off(lease, getattr(failed[0], "retry_after", None))
            elif outcome.failures:
                await self._schedule.back_off(lease)
            else:
                await self._schedule.release(lease)
        except LemcalError as error:
            logger.warning(
                "account %s: not released, so it rests until its lease ends: %s", lease.user_id, error
            )

    async def renew_leases(self) -> None:
        """Renew the leases of the turns under way, for ever; cancel a turn whose lease is lost."""
        while True:
            await anyio.sleep(_LOOK_AROUND)
            async with anyio.create_task_group() as tasks:
                for held in list(self._held.values()):
                    if monotonic() > held.until - LEASE + _RENEW_AFTER:
                        tasks.start_soon(self._renew, held)

    async def _renew(self, held: _Held) -> None:
        began = monotonic()
        try:
            renewed = await self._schedule.renew(held.lease, LEASE)
        except LemcalError as error:
            logger.warning("account %s: its lease was not renewed: %s", held.lease.user_id, error)
            renewed = monotonic() < held.until - _MARGIN
        else:
            held.until = began + LEASE if renewed else held.until
        if not renewed and self._held.get(held.lease.user_id) is held and not held.is_released:
            logger.warning("account %s: its lease was lost, so its turn ends", held.lease.user_id)
            held.scope.cancel()

    def _checked(self, handler: Callable[[Any], Any], user_of: Callable[[Any], str]) -> Callable[[Any], Any]:
        """Have a handler called only while the account is surely held."""
        if is_async(handler):

            @functools.wraps(handler)
            async def checked(handed: Any) -> None:
                self._check(user_of(handed))
                await handler(handed)

            return checked

        @functools.wraps(handler)
        def checked_plain(handed: Any) -> Any:
            self._check(user_of(handed))
            return handler(handed)

        return checked_plain

    def _check(self, user_id: str) -> None:
        held = self._held.get(user_id)
        if held is None:
            raise LeaseLostError(f"{user_id} is no longer held")
        held.check()


class _LeasedStores:
    """The store as a turn sees it: each method needs the lease of the account that it is about.

    What the lease has told already is not asked for again, and a list that is still the same ends the turn.
    """

    def __init__(self, store: SQLStore, held: dict[str, _Held]) -> None:
        self._store = store
        self._held = held

    def _of(self, user_id: str) -> _Held:
        held = self._held.get(user_id)
        if held is None:
            raise LeaseLostError(f"{user_id} is no longer held; nothing was written")
        return held

    async def revision(self, user_id: str) -> int:
        held = self._of(user_id)
        revision, held.revision = held.revision, None
        return await held.store.revision(user_id) if revision is None else revision

    async def apply(self, user_id: str, revision: int, rows: Iterable[Any], **options: Any) -> Applied | None:
        held = self._of(user_id)
        held.has_pending = True
        return await held.store.apply(user_id, revision, rows, **options)

    async def unchanged(self, user_id: str, body_hash: str) -> int | None:
        held = self._of(user_id)
        if held.has_pending:
            return await held.store.unchanged(user_id, body_hash)
        listed = await held.store.unchanged_and_released(body_hash)
        held.is_released = listed is not None
        return listed

    async def record_failure(self, user_id: str, message: str) -> None:
        await self._of(user_id).store.record_failure(user_id, message)

    async def pending(self, user_id: str, limit: int) -> list[Change]:
        held = self._of(user_id)
        return await held.store.pending(user_id, limit) if held.has_pending else []

    async def mark_delivered(self, changes: Sequence[Change]) -> int:
        return await self._of(changes[0].user_id).store.mark_delivered(changes)

    async def record_attempt(self, changes: Sequence[Change], error: str, *, park: bool) -> None:
        await self._of(changes[0].user_id).store.record_attempt(changes, error, park=park)

    async def retry_parked(self, user_id: str | None = None) -> int:
        return await self._store.retry_parked(user_id)

    def changes(
        self,
        *,
        pending: bool = False,
        parked: bool = False,
        after: int = 0,
        of: tuple[int, int] | None = None,
    ) -> AsyncIterator[Change]:
        return self._store.changes(pending=pending, parked=parked, after=after, of=of)

    async def forget(self, user_id: str) -> Any:
        return await self._store.forget(user_id)

    async def prune(self, *, before: datetime) -> Any:
        return await self._store.prune(before=before)


def _nothing() -> None:
    pass
