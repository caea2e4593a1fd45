"""A turn: a worker leases an account, fetches and stores its meetings, delivers changes, and releases it.

Two rules make turns safe. The lease is kept in the database, and every write checks it there. No handler is
called once the lease may have expired by this process's clock, even if the process was suspended.
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
"""Seconds until the lease of a turn expires; renewed while the turn runs."""
_RENEW_AFTER: Final = LEASE / 3
_RENEWAL_CHECK_INTERVAL: Final = LEASE / 12  # seconds
_EXPIRY_MARGIN: Final = 5.0  # seconds before its expiry from which a lease counts as expired
_RELEASE_TIMEOUT: Final = 10.0  # seconds
_SMOOTHING: Final = 0.1  # weight of the latest turn in the moving average of turn durations

Credentials: TypeAlias = Callable[[str], Awaitable[str | None]]
"""From a user id to its API key, or None if there is none. Called at each turn; keys are not kept."""


@attrs.define(eq=False)
class _HeldAccount:
    """An account that this process holds a lease for."""

    lease: Lease
    store: SQLStore
    until: float  # on the monotonic clock, which keeps running while the process is suspended
    scope: anyio.CancelScope
    revision: int | None  # from the lease, until it is first read
    has_pending: bool
    is_released: bool = False

    def check(self) -> None:
        """Raise LeaseLostError if the lease may have expired. Also called from handler threads."""
        if monotonic() > self.until - _EXPIRY_MARGIN:
            raise LeaseLostError(f"the lease of {self.lease.user_id} has expired; its turn was abandoned")


class Turns:
    """Runs the turns of one worker."""

    def __init__(
        self, store: SQLStore, lemcal: AsyncLemcal, credentials: Credentials, options: SyncOptions
    ) -> None:
        self._schedule = store.schedule()
        self._store = store
        self._lemcal = lemcal
        self._credentials = credentials
        self._held: dict[str, _HeldAccount] = {}
        self._is_stopping = self._is_canceled = False
        self.mean_seconds = 1.0  # moving average of turn durations; starts high, so that batches start small
        self.on_batch_ended: Callable[[], None] = _do_nothing
        if options.on_change is not None:
            checked = self._with_lease_check(options.on_change, lambda change: change.user_id)
            options = attrs.evolve(options, on_change=checked)
        if options.on_changes is not None:
            checked = self._with_lease_check(options.on_changes, lambda changes: changes[0].user_id)
            options = attrs.evolve(options, on_changes=checked)
        self._delivers = options.on_change is not None or options.on_changes is not None
        self._runner = Runner(_LeasedStore(store, self._held), options)

    def __len__(self) -> int:
        """Return the number of running turns."""
        return len(self._held)

    def stop(self) -> None:
        """Start no more turns; running turns end as usual."""
        self._is_stopping = True

    def cancel(self) -> None:
        """Cancel the running turns; their accounts are due at once."""
        self._is_stopping = self._is_canceled = True
        for held in list(self._held.values()):
            held.scope.cancel()

    async def take(self, batch: Batch) -> None:
        """Run the turns of a batch that are still valid, and log failures."""
        remaining = list(reversed(batch))
        try:
            while remaining and not self._is_stopping:
                await self._run_turn(remaining.pop())
        finally:
            if remaining:
                with anyio.move_on_after(_RELEASE_TIMEOUT, shield=True):
                    await self._unclaim(remaining)
            self.on_batch_ended()

    async def _unclaim(self, turns: Batch) -> None:
        """Give up claims, so that other workers can take these accounts at once."""
        due = [
            Due(turn.user_id, wanted=False, due_at=turn.claimed) for turn in turns if turn.claimed is not None
        ]
        try:
            await self._schedule.unclaim(due)
        except LemcalError as error:
            logger.warning(
                "%d accounts could not be unclaimed and wait for their interval: %s", len(due), error
            )

    async def _run_turn(self, turn: Turn) -> None:
        if turn.user_id in self._held:
            return
        try:
            with no_foreign_cancellation():
                began = monotonic()
                lease = await self._schedule.acquire(turn.user_id, LEASE, claimed=turn.claimed or 0.0)
                if lease is not None:
                    await self._run_with_lease(lease, began)
                    self.mean_seconds += _SMOOTHING * (monotonic() - began - self.mean_seconds)
        except Exception as error:  # the database failed: the account is due when its lease expires
            message = str(error) if isinstance(error, LemcalError) else None
            logger.error("account %s: the turn failed: %s", turn.user_id, message, exc_info=not message)  # noqa: TRY400

    async def _run_with_lease(self, lease: Lease, began: float) -> None:
        scope = anyio.CancelScope()
        held = _HeldAccount(
            lease,
            self._store.with_lease(lease),
            began + LEASE,
            scope,
            lease.revision,
            lease.has_pending and self._delivers,
        )
        self._held[lease.user_id] = held
        report: ReportBuilder | None = None
        try:
            if self._is_canceled:
                scope.cancel()
            with scope:
                report = await self._synchronize(lease.user_id)
        finally:
            del self._held[lease.user_id]
            if not held.is_released:
                with anyio.move_on_after(_RELEASE_TIMEOUT, shield=True):
                    await self._release(lease, report)

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
        except Exception as error:  # noqa: BLE001  # the user's function may raise anything
            return await self._runner.failed(user_id, error)
        return await self._runner.synchronize(lemcal)

    async def _release(self, lease: Lease, report: ReportBuilder | None) -> None:
        try:
            if report is None:
                await self._schedule.give_back(lease)
            elif failed := [failure.error for failure in report.failures if failure.stage != "delivery"]:
                await self._schedule.back_off(lease, getattr(failed[0], "retry_after", None))
            elif report.failures:
                await self._schedule.back_off(lease)
            else:
                await self._schedule.release(lease)
        except LemcalError as error:
            logger.warning(
                "account %s: could not be released and waits until its lease expires: %s",
                lease.user_id,
                error,
            )

    async def renew_leases(self) -> None:
        """Renew the leases of running turns, forever; cancel a turn whose lease is lost."""
        while True:
            await anyio.sleep(_RENEWAL_CHECK_INTERVAL)
            async with anyio.create_task_group() as tasks:
                for held in list(self._held.values()):
                    if monotonic() > held.until - LEASE + _RENEW_AFTER:
                        tasks.start_soon(self._renew, held)

    async def _renew(self, held: _HeldAccount) -> None:
        began = monotonic()
        try:
            renewed = await self._schedule.renew(held.lease, LEASE)
        except LemcalError as error:
            logger.warning("account %s: renewing the lease failed: %s", held.lease.user_id, error)
            renewed = monotonic() < held.until - _EXPIRY_MARGIN
        else:
            held.until = began + LEASE if renewed else held.until
        if not renewed and self._held.get(held.lease.user_id) is held and not held.is_released:
            logger.warning("account %s: the lease was lost; its turn is canceled", held.lease.user_id)
            held.scope.cancel()

    def _with_lease_check(
        self, handler: Callable[[Any], Any], user_id_of: Callable[[Any], str]
    ) -> Callable[[Any], Any]:
        """Wrap a handler so that it only runs while the lease of its account is valid."""
        if is_async(handler):

            @functools.wraps(handler)
            async def checked(argument: Any) -> None:
                self._check_lease(user_id_of(argument))
                await handler(argument)

            return checked

        @functools.wraps(handler)
        def checked_plain(argument: Any) -> Any:
            self._check_lease(user_id_of(argument))
            return handler(argument)

        return checked_plain

    def _check_lease(self, user_id: str) -> None:
        held = self._held.get(user_id)
        if held is None:
            raise LeaseLostError(f"{user_id} is no longer held")
        held.check()


class _LeasedStore:
    """The store as a turn uses it: each method requires the lease of its account.

    What acquiring the lease returned is not queried again, and an unchanged list releases the lease.
    """

    def __init__(self, store: SQLStore, held: dict[str, _HeldAccount]) -> None:
        self._store = store
        self._held = held

    def _get_held(self, user_id: str) -> _HeldAccount:
        held = self._held.get(user_id)
        if held is None:
            raise LeaseLostError(f"{user_id} is no longer held; nothing was written")
        return held

    async def revision(self, user_id: str) -> int:
        held = self._get_held(user_id)
        revision, held.revision = held.revision, None
        return await held.store.revision(user_id) if revision is None else revision

    async def apply(self, user_id: str, revision: int, rows: Iterable[Any], **options: Any) -> Applied | None:
        held = self._get_held(user_id)
        held.has_pending = True
        return await held.store.apply(user_id, revision, rows, **options)

    async def unchanged(self, user_id: str, body_hash: str) -> int | None:
        held = self._get_held(user_id)
        if held.has_pending:
            return await held.store.unchanged(user_id, body_hash)
        listed = await held.store.unchanged_and_released(body_hash)
        held.is_released = listed is not None
        return listed

    async def record_failure(self, user_id: str, message: str) -> None:
        await self._get_held(user_id).store.record_failure(user_id, message)

    async def pending(self, user_id: str, limit: int) -> list[Change]:
        held = self._get_held(user_id)
        return await held.store.pending(user_id, limit) if held.has_pending else []

    async def mark_delivered(self, changes: Sequence[Change]) -> int:
        return await self._get_held(changes[0].user_id).store.mark_delivered(changes)

    async def record_attempt(self, changes: Sequence[Change], error: str, *, park: bool) -> None:
        await self._get_held(changes[0].user_id).store.record_attempt(changes, error, park=park)

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


def _do_nothing() -> None:
    pass
