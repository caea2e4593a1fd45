"""``sync_meetings``: fetch each account's list, apply it to the store, and deliver the changes.

Defines the order of the steps, and limits a failure to its own account. ``_diff.py`` finds the changes, the
store keeps them, and ``_delivery.py`` passes them to the user's handler.
"""

import hashlib
import logging
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio
import attrs

from lemcal_async import events
from lemcal_async._callbacks import (
    CanceledElsewhereError,
    no_foreign_cancellation,
    problem_with_callback,
    was_canceled_natively,
)
from lemcal_async._checks import is_whole
from lemcal_async._client import AsyncLemcal
from lemcal_async._decoding import ResponseLike, is_long, parse_rows, read_rows
from lemcal_async.errors import ConfigurationError, EmptyListError
from lemcal_async.sync._delivery import Delivery, OnChange, OnChanges
from lemcal_async.sync._diff import Counts
from lemcal_async.sync._report import Failure, FailureLog, ReportBuilder, Stage, SyncReport, UnreadableRow
from lemcal_async.sync._store import Store

logger = logging.getLogger("lemcal_async.sync")

_TRIES: Final = 3  # if another process is faster; each try fetches a new list
_VERSION: Final = b"1"  # of how lists are processed: changing it makes the next run compare every list


@attrs.frozen
class SyncOptions:
    """How accounts are synchronized. Validated on creation."""

    max_concurrency: int
    on_change: OnChange | None
    on_changes: OnChanges | None
    max_attempts: int
    baseline: bool
    confirm_empty_after: int

    def __attrs_post_init__(self) -> None:
        for name in ("max_concurrency", "max_attempts", "confirm_empty_after"):
            value: object = getattr(self, name)
            if not (is_whole(value) and value >= 1):
                raise ConfigurationError(f"{name}={value!r}: it must be a whole number, at least 1")
        check_function("on_change", self.on_change, "change")
        check_function("on_changes", self.on_changes, "changes")
        if self.on_change is not None and self.on_changes is not None:
            raise ConfigurationError("pass on_change= or on_changes=, not both: each would get every change")


async def sync_meetings(
    accounts: Iterable[AsyncLemcal],
    store: Store,
    *,
    max_concurrency: int = 16,
    on_change: OnChange | None = None,
    on_changes: OnChanges | None = None,
    max_attempts: int = 50,
    baseline: bool = False,
    confirm_empty_after: int = 2,
) -> SyncReport:
    """Bring the store up to date with the accounts' meetings, and deliver the changes.

    If a handler raises, its account's remaining changes wait for the next run. Without a handler, changes
    stay in the outbox.

    A failure affects only its own account. It is logged as a warning, or as an error with a traceback if a
    handler raised, and included in the report, whose ``raise_for_failures()`` raises it. If the run is
    canceled, each account has been updated completely or not at all. An exception from iterating over
    ``accounts`` propagates once the accounts in progress have finished.

    Args:
        accounts: Clients, such as those that ``for_account`` returns. They are consumed one by one, so a
            generator can create them lazily. Their calls use bulk priority.
        store: The store that keeps the meetings.
        max_concurrency: The maximum number of accounts that are synchronized at the same time.
        on_change: Called with each change in the outbox, including those of earlier runs: in order per
            account, and at least once. An async function, or a plain one, which runs in a worker thread.
        on_changes: Called with lists of an account's changes, instead of ``on_change``.
        max_attempts: How many times the handler may raise for a change before the change is parked and the
            account's other changes continue.
        baseline: Whether an account's first run adds nothing to the outbox, so that no handler is called with
            the existing meetings. They are stored, and the report counts them as created, in any case.
        confirm_empty_after: An account whose list is suddenly empty, or less than half its previous length,
            fails until this many such lists arrived in a row.

    Raises:
        ConfigurationError: If an argument is invalid.
    """
    options = SyncOptions(max_concurrency, on_change, on_changes, max_attempts, baseline, confirm_empty_after)
    check_accounts(accounts)
    return await Runner(store, options).run(accounts)


class Runner:
    """Runs synchronizations with one store and fixed options. Runs of the same account do not overlap."""

    def __init__(self, store: Store, options: SyncOptions) -> None:
        _check_store(store)
        self._store = store
        self._options = options
        self._locks: dict[str, tuple[anyio.Lock, list[None]]] = {}
        self._log = FailureLog()
        self._delivery: Delivery | None = None
        if options.on_change is not None or options.on_changes is not None:
            self._delivery = Delivery(
                store,
                options.on_change,
                options.on_changes,
                max_attempts=options.max_attempts,
                limiter=anyio.CapacityLimiter(options.max_concurrency),
                log=self._log,
            )

    async def run(self, accounts: Iterable[AsyncLemcal]) -> SyncReport:
        """See ``sync_meetings``."""
        started = anyio.current_time()
        total = ReportBuilder()
        source = _Source(iter(accounts))
        async with anyio.create_task_group() as workers:
            for _ in range(self._options.max_concurrency):
                workers.start_soon(self._work, source, total)
        if source.error is not None:
            raise source.error
        return total.report(anyio.current_time() - started)

    async def _work(self, source: "_Source", total: ReportBuilder) -> None:
        for lemcal in source:
            total.add(await self.synchronize(lemcal))

    async def synchronize(self, lemcal: AsyncLemcal) -> ReportBuilder:
        """Fetch, store and deliver one account. Only a cancellation propagates."""
        report = ReportBuilder()
        try:
            with no_foreign_cancellation():
                user_id = lemcal.user_id
        except Exception as error:  # noqa: BLE001  # the user's api_key function may raise anything
            self._fail(None, "fetch", error, report)
            return report
        started = anyio.current_time()
        async with self._exclusive(user_id):
            try:
                await self._update(user_id, lemcal, report)
                await self._deliver(user_id, report)
                await anyio.lowlevel.checkpoint()  # detects that a handler canceled this task
            except anyio.get_cancelled_exc_class() as error:
                if not await was_canceled_natively(error):
                    raise
                self._fail(user_id, "delivery", CanceledElsewhereError(), report)
        self._log.finished(user_id, report.failures)
        if events.wanted():
            seconds = anyio.current_time() - started
            events.emit(
                events.AccountSynced(user_id, seconds, bool(report.failures), **attrs.asdict(report.counts))
            )
        return report

    async def failed(self, user_id: str, error: Exception) -> ReportBuilder:
        """Report an account that failed before its list could be fetched."""
        report = ReportBuilder()
        self._fail(user_id, "fetch", error, report)
        await self._record(user_id, str(error))
        return report

    async def _update(self, user_id: str, lemcal: AsyncLemcal, report: ReportBuilder) -> None:
        step = _Step()
        try:
            with no_foreign_cancellation():
                await self._apply_list(user_id, lemcal, report, step)
        except Exception as error:  # noqa: BLE001  # reported; the other accounts continue
            text = str(error)
            is_rejected = isinstance(error, EmptyListError)  # the store works, and has recorded the error
            self._fail(user_id, "fetch" if is_rejected else step.stage, error, report)
            if step.stage == "fetch":
                await self._record(user_id, text)

    async def _apply_list(
        self, user_id: str, lemcal: AsyncLemcal, report: ReportBuilder, step: "_Step"
    ) -> None:
        """Fetch the account's list and store it; ``step`` tracks which of the two is in progress."""
        meetings = lemcal.with_options(priority="bulk").meetings
        for _ in range(_TRIES):
            step.stage = "store"
            revision = await self._store.revision(user_id)
            step.stage = "fetch"
            fetched = await meetings._fetch_rows()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
            body_hash = hashlib.blake2b(fetched.body, digest_size=16, person=_VERSION).hexdigest()
            step.stage = "store"
            # A new account has no previous list.
            listed = await self._store.unchanged(user_id, body_hash) if revision else None
            if listed is not None:
                report.counts = Counts(unchanged=listed)
                return
            rows: Iterable[Any] = _rows(fetched, step)
            if is_long(fetched):
                step.stage = "fetch"
                rows = await read_rows(fetched, "meetings")
                step.stage = "store"
            applied = await self._store.apply(
                user_id,
                revision,
                rows,
                baseline=self._options.baseline,
                confirm_empty_after=self._options.confirm_empty_after,
                body_hash=body_hash,
            )
            if applied is not None:
                report.counts = applied.counts
                report.unreadable_rows += [UnreadableRow(user_id, row) for row in applied.bad_rows]
                return
        # Other processes applied newer lists after every fetch, so the account is up to date.
        logger.info("account %s: another process is synchronizing it", user_id)

    async def _record(self, user_id: str, text: str) -> None:
        try:
            with no_foreign_cancellation():
                await self._store.record_failure(user_id, text)
        except Exception as error:  # noqa: BLE001  # the report contains the failure itself
            logger.warning("account %s: its failure could not be recorded: %s", user_id, error)

    async def _deliver(self, user_id: str, report: ReportBuilder) -> None:
        if self._delivery is None:
            return
        try:
            with no_foreign_cancellation():
                await self._delivery.deliver(user_id, report)
        except Exception as error:  # noqa: BLE001  # from the store; a handler's is already reported
            self._fail(user_id, "store", error, report)

    def _fail(self, user_id: str | None, stage: Stage, error: Exception, report: ReportBuilder) -> None:
        failure = Failure(user_id, stage, error)
        report.failures.append(failure)
        self._log.failed(failure)

    @asynccontextmanager
    async def _exclusive(self, user_id: str) -> AsyncGenerator[None]:
        """Make other runs of this account wait."""
        lock, users = self._locks.setdefault(user_id, (anyio.Lock(), []))
        users.append(None)
        try:
            async with lock:
                yield
        finally:
            users.pop()
            if not users:
                del self._locks[user_id]


@attrs.define
class _Step:
    """The step in progress for an account, for reporting failures."""

    stage: Stage = "store"


def _rows(fetched: ResponseLike, step: _Step) -> Iterator[Any]:
    """Parse a short list lazily: in the store's thread, and not before the store iterates over it."""
    step.stage = "fetch"
    rows = parse_rows(fetched, "meetings")
    step.stage = "store"
    yield from rows


def check_function(name: str, function: object, parameter: str) -> None:
    """Raise ConfigurationError unless a function accepts one argument."""
    if function is None:
        return
    if not callable(function):
        raise ConfigurationError(f"{name}= must be a function, not {type(function).__name__}")
    if problem := problem_with_callback(name, function, (parameter,)):
        raise ConfigurationError(problem)


def check_accounts(accounts: object) -> None:
    """Raise ConfigurationError unless ``accounts`` is a collection of clients."""
    advice = "pass clients, such as [lemcal] or [lemcal.for_account(user_id, api_key), ...]"
    if isinstance(accounts, AsyncLemcal):
        raise ConfigurationError(f"accounts= is a single client: {advice}")
    if not isinstance(accounts, Iterable) or isinstance(accounts, Mapping | str):
        kind = type(accounts).__name__  # pyright: ignore[reportUnknownArgumentType]  # any element type
        raise ConfigurationError(f"accounts= must not be of type {kind}: {advice}")


def _check_store(store: object) -> None:
    if isinstance(store, type) or not isinstance(store, Store):
        raise ConfigurationError(f"store= must be a store, such as SQLStore(url), not {type(store).__name__}")


class _Source:
    """The remaining accounts, shared by the workers. Iteration stops at the first error, which is kept."""

    def __init__(self, accounts: Iterator[AsyncLemcal]) -> None:
        self._accounts = accounts
        self.error: Exception | None = None

    def __iter__(self) -> Generator[AsyncLemcal]:
        while self.error is None:
            try:
                with no_foreign_cancellation():
                    lemcal: object = next(self._accounts, self)
                if lemcal is self:
                    return
                if not isinstance(lemcal, AsyncLemcal):
                    raise ConfigurationError(  # noqa: TRY301  # kept like any other error
                        f"accounts= contains a {type(lemcal).__name__}; it must contain clients, such as "
                        "lemcal.for_account(user_id, api_key)"
                    )
            except Exception as error:  # noqa: BLE001  # raised once the accounts in progress have finished
                self.error = error
                return
            yield lemcal
