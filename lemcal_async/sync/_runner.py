"""``sync_meetings``: each account's list is fetched, applied to the store, and what changed is delivered.

Knows the order of the steps, and that a failure stops its own account and nothing else. What changed is
decided in ``_diff.py`` and kept in a store; ``_delivery.py`` hands it to the user's function.
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
from lemcal_async._client import AsyncLemcal
from lemcal_async._decoding import ResponseLike, is_long, parse_rows, read_rows
from lemcal_async.errors import ConfigurationError
from lemcal_async.sync._delivery import Delivery, OnChange, OnChanges
from lemcal_async.sync._diff import Counts
from lemcal_async.sync._report import Failure, FailureLog, ReportBuilder, Stage, SyncReport, UnreadableRow
from lemcal_async.sync._store import Store

logger = logging.getLogger("lemcal_async.sync")

_TRIES: Final = 3  # when another process is faster, each with a new list
_VERSION: Final = b"1"  # of what is made of a list: another one has every list compared anew


@attrs.frozen
class SyncOptions:
    """How accounts are synchronized; checked when made."""

    max_concurrency: int
    on_change: OnChange | None
    on_changes: OnChanges | None
    max_attempts: int
    baseline: bool
    confirm_empty_after: int

    def __attrs_post_init__(self) -> None:
        for name in ("max_concurrency", "max_attempts", "confirm_empty_after"):
            value: object = getattr(self, name)
            if not isinstance(value, int) or value < 1:
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
    """Bring the store up to date with the accounts' meetings, and deliver what changed.

    Where a handler raises, that account's changes wait for the next run. Without a handler, changes stay in
    the outbox.

    A failure ends its account's part only. It is logged as a warning, a handler's with its traceback, and it
    is in the report, whose ``raise_for_failures()`` raises. Canceled at any await, each account is updated
    completely or not at all. What iterating over ``accounts`` raises passes through, after the accounts under
    way are done.

    Args:
        accounts: Clients, such as ``for_account`` returns. They are taken one by one, so a generator need not
            make them all at once. Their calls have bulk priority.
        store: Where the meetings are kept.
        max_concurrency: How many accounts are synchronized at a time.
        on_change: Called with each change in the outbox, also from earlier runs: in order per account and at
            least once. Async, or a plain function, which runs in a worker thread.
        on_changes: Called with lists of an account's changes, in place of ``on_change``.
        max_attempts: How often the handler may raise for a change; then the change is parked, and the others
            go on.
        baseline: Whether the meetings that an account has in its first run are not reported as changes.
        confirm_empty_after: An account whose list is suddenly empty, or less than half of what it was, fails
            until so many such lists came in a row.

    Raises:
        ConfigurationError: For arguments that cannot work.
    """
    options = SyncOptions(max_concurrency, on_change, on_changes, max_attempts, baseline, confirm_empty_after)
    check_accounts(accounts)
    return await Runner(store, options).run(accounts)


class Runner:
    """Runs with one store and the same options. An account is synchronized by one run at a time."""

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
        """Fetch, store and deliver one account. Raises nothing but its cancellation."""
        own = ReportBuilder()
        try:
            with no_foreign_cancellation():
                user_id = lemcal.user_id
        except Exception as error:  # noqa: BLE001  # a function that returns the key may raise anything
            self._fail(None, "fetch", error, own)
            return own
        started = anyio.current_time()
        async with self._alone(user_id):
            try:
                await self._update(user_id, lemcal, own)
                await self._deliver(user_id, own)
                await anyio.lowlevel.checkpoint()  # a handler that has canceled this task is found out here
            except anyio.get_cancelled_exc_class() as error:
                if not await was_canceled_natively(error):
                    raise
                self._fail(user_id, "delivery", CanceledElsewhereError(), own)
        self._log.finished(user_id, own.failures)
        if events.wanted():
            seconds = anyio.current_time() - started
            events.emit(
                events.AccountSynced(user_id, seconds, bool(own.failures), **attrs.asdict(own.counts))
            )
        return own

    async def failed(self, user_id: str, error: Exception) -> ReportBuilder:
        """Report an account that could not even be fetched, as one that was tried."""
        own = ReportBuilder()
        self._fail(user_id, "fetch", error, own)
        await self._record(user_id, str(error))
        return own

    async def _update(self, user_id: str, lemcal: AsyncLemcal, own: ReportBuilder) -> None:
        step = _Step()
        try:
            with no_foreign_cancellation():
                await self._apply_list(user_id, lemcal, own, step)
        except Exception as error:  # noqa: BLE001  # reported; and the other accounts go on
            text = str(error)
            self._fail(user_id, step.stage, error, own)
            if step.stage == "fetch":
                await self._record(user_id, text)

    async def _apply_list(self, user_id: str, lemcal: AsyncLemcal, own: ReportBuilder, step: "_Step") -> None:
        """Fetch the account's list and store it; ``step`` says which of the two is under way."""
        meetings = lemcal.with_options(priority="bulk").meetings
        for _ in range(_TRIES):
            step.stage = "store"
            revision = await self._store.revision(user_id)
            step.stage = "fetch"
            fetched = await meetings._fetch_rows()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
            body_hash = hashlib.blake2b(fetched.body, digest_size=16, person=_VERSION).hexdigest()
            step.stage = "store"
            # A new account has no list yet.
            listed = await self._store.unchanged(user_id, body_hash) if revision else None
            if listed is not None:
                own.counts = Counts(unchanged=listed)
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
                own.counts = applied.counts
                own.unreadable_rows += [UnreadableRow(user_id, row) for row in applied.bad_rows]
                return
        # Others have applied newer lists again and again since this run began: it is up to date by them.
        logger.info("account %s: another process is synchronizing it", user_id)

    async def _record(self, user_id: str, text: str) -> None:
        try:
            with no_foreign_cancellation():
                await self._store.record_failure(user_id, text)
        except Exception as error:  # noqa: BLE001  # the report has the failure itself
            logger.warning("account %s: its failure could not be recorded: %s", user_id, error)

    async def _deliver(self, user_id: str, own: ReportBuilder) -> None:
        if self._delivery is None:
            return
        try:
            with no_foreign_cancellation():
                await self._delivery.deliver(user_id, own)
        except Exception as error:  # noqa: BLE001  # the store's; a handler's is in the report already
            self._fail(user_id, "store", error, own)

    def _fail(self, user_id: str | None, stage: Stage, error: Exception, own: ReportBuilder) -> None:
        failure = Failure(user_id, stage, error)
        own.failures.append(failure)
        self._log.failed(failure)

    @asynccontextmanager
    async def _alone(self, user_id: str) -> AsyncGenerator[None]:
        """Keep other runs of this account waiting."""
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
    """What is under way for an account, so that a failure can tell."""

    stage: Stage = "store"


def _rows(fetched: ResponseLike, step: _Step) -> Iterator[Any]:
    """Parse a short list when the store asks for it: in its thread, and not before its turn has come."""
    step.stage = "fetch"
    rows = parse_rows(fetched, "meetings")
    step.stage = "store"
    yield from rows


def check_function(name: str, function: object, parameter: str) -> None:
    """Refuse what cannot be called with one argument; raises ConfigurationError."""
    if function is None:
        return
    if not callable(function):
        raise ConfigurationError(f"{name}= must be a function, not {type(function).__name__}")
    if problem := problem_with_callback(name, function, (parameter,)):
        raise ConfigurationError(problem)


def check_accounts(accounts: object) -> None:
    """Refuse what is not a collection of clients; raises ConfigurationError."""
    advice = "pass clients, such as [lemcal] or [lemcal.for_account(user_id, api_key), ...]"
    if isinstance(accounts, AsyncLemcal):
        raise ConfigurationError(f"accounts= is a single client: {advice}")
    if not isinstance(accounts, Iterable) or isinstance(accounts, Mapping | str):
        kind = type(accounts).__name__  # pyright: ignore[reportUnknownArgumentType]  # whatever it holds
        raise ConfigurationError(f"accounts= must not be of type {kind}: {advice}")


def _check_store(store: object) -> None:
    if isinstance(store, type) or not isinstance(store, Store):
        raise ConfigurationError(f"store= must be a store, such as SQLStore(url), not {type(store).__name__}")


class _Source:
    """The accounts that are left, shared by the workers. It ends at the first error, which it keeps."""

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
                    raise ConfigurationError(  # noqa: TRY301  # one of the errors that are kept
                        f"accounts= holds a {type(lemcal).__name__}, and must hold clients, such as "
                        "lemcal.for_account(user_id, api_key)"
                    )
            except Exception as error:  # noqa: BLE001  # raised when the accounts under way are done
                self.error = error
                return
            yield lemcal
