"""What a run has to report, and how it is summed up while the run goes on.

MERGED [sync.delivery] Delivery of an account's changes out of the outbox: in order, at least once.

Knows when a change counts as delivered: when the handler has returned. What handlers do, and what becomes
of their errors, is left to others.

The run: every account fetched, taken over by the store, its changes delivered, a few at a time.

Knows the order of the steps and what a failure stops: its own account, and nothing else. What changed is
decided in ``diff.py``, and kept in a store.
"""

import inspect
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final, Literal, TypeAlias

import anyio
import attrs

from lemcal_async import events
from lemcal_async._client import AsyncLemcal
from lemcal_async.errors import BadRow, ConfigurationError
from lemcal_async.sync._diff import Counts
from lemcal_async.sync._store import Change, Store

Stage: TypeAlias = Literal["fetch", "store", "delivery"]


@attrs.frozen
class Failure:
    """An account that failed, where, and why. ``user_id`` is None if the client itself cannot tell.

    At "delivery" the account's meetings are up to date, and what the handler did not take stays pending.
    """

    user_id: str | None
    stage: Stage
    error: Exception


@attrs.frozen
class UnreadableRow:
    """A row of an account's list that could not be read. With an ``_id`` it is kept all the same."""

    user_id: str
    row: BadRow


@attrs.frozen
class SyncReport:
    """What a run came to: accounts, meetings by what became of them, changes delivered, seconds."""

    accounts: int
    failed: int
    created: int
    changed: int
    canceled: int
    disappeared: int
    restored: int
    unchanged: int
    delivered: int
    seconds: float
    failures: tuple[Failure, ...] = ()
    unreadable_rows: tuple[UnreadableRow, ...] = ()


class ReportBuilder:
    """The sums of a run, or of one account's part in it."""

    def __init__(self) -> None:
        self.accounts = 0
        self.failed = 0
        self.delivered = 0
        self.failures: list[Failure] = []
        self.unreadable_rows: list[UnreadableRow] = []
        self.counts = Counts()

    def fail(self, user_id: str | None, stage: Stage, error: Exception) -> None:
        """Note a failure."""
        # The frames hold whole lists, and a run may have thousands of failures.
        error.__traceback__ = error.__context__ = error.__cause__ = None
        self.failures.append(Failure(user_id, stage, error))

    def add(self, account: "ReportBuilder") -> None:
        """Add what became of one account."""
        self.accounts += 1
        self.failed += bool(account.failures)
        self.delivered += account.delivered
        self.failures += account.failures
        self.unreadable_rows += account.unreadable_rows
        ours, its = attrs.asdict(self.counts), attrs.asdict(account.counts)
        self.counts = Counts(**{name: ours[name] + its[name] for name in ours})

    def report(self, seconds: float) -> SyncReport:
        """Return the report."""
        return SyncReport(
            accounts=self.accounts,
            failed=self.failed,
            **attrs.asdict(self.counts),
            delivered=self.delivered,
            seconds=seconds,
            failures=tuple(self.failures),
            unreadable_rows=tuple(self.unreadable_rows),
        )


OnChange: TypeAlias = Callable[[Change], Awaitable[Any] | Any]
"""What is called with each change: an async function, or a plain one that returns at once."""

_BATCH: Final = 100


async def deliver(store: Store, user_id: str, on_change: OnChange, tally: ReportBuilder) -> None:
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
        return await store.mark_delivered([change]) == 1
    raise AssertionError("a shielded scope does not swallow")  # pragma: no cover


logger = logging.getLogger("lemcal_async.sync")

_ATTEMPTS: Final = 3  # when another process takes the account over meanwhile, each with a new list


@attrs.frozen
class Options:
    """How accounts are synchronised; checked when made."""

    max_concurrency: int
    on_change: OnChange | None
    baseline: bool
    confirm_empty_after: int

    def __attrs_post_init__(self) -> None:
        for name in ("max_concurrency", "confirm_empty_after"):
            value: object = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"{name}={value!r}: it must be a whole number, at least 1")
        if self.on_change is not None and not callable(self.on_change):
            raise ConfigurationError("on_change= must be a function that takes a change")


async def sync_meetings(
    accounts: Iterable[AsyncLemcal],
    store: Store,
    *,
    max_concurrency: int = 16,
    on_change: OnChange | None = None,
    baseline: bool = False,
    confirm_empty_after: int = 2,
) -> SyncReport:
    """Bring the store in step with the accounts' meetings, and deliver what changed.

    ``accounts`` are clients, as ``for_account`` makes them; they are taken one by one, up to
    ``max_concurrency`` at a time, so a generator need not make them all at once. Their calls are of
    bulk priority. ``on_change`` is called with each change of the outbox, also those of earlier runs,
    in order per account and at least once; where it raises, that account's changes wait for the next
    run. Without it, they stay in the outbox. With ``baseline``, the meetings that an account has in its
    first run are no changes. An account whose list is suddenly empty fails, until
    ``confirm_empty_after`` lists in a row were.

    A failure ends nothing but its account's part, and is in the report. Cancelled at any await, each
    account is taken over whole, or as it was before. What iterating over ``accounts`` raises passes
    through, after the accounts under way are done.
    """
    options = Options(max_concurrency, on_change, baseline, confirm_empty_after)
    return await Runner(store, options).run(accounts)


class Runner:
    """Runs with one store and the same options. Of one account there is one run at a time."""

    def __init__(self, store: Store, options: Options) -> None:
        _check_store(store)
        self._store = store
        self._options = options
        self._locks: dict[str, tuple[anyio.Lock, list[None]]] = {}

    async def run(self, accounts: Iterable[AsyncLemcal]) -> SyncReport:
        """See ``sync_meetings``."""
        started = anyio.current_time()
        tally = ReportBuilder()
        source = _Source(iter(accounts))
        async with anyio.create_task_group() as workers:
            for _ in range(self._options.max_concurrency):
                workers.start_soon(self._work, source, tally)
        if source.error is not None:
            raise source.error
        return tally.report(anyio.current_time() - started)

    async def _work(self, source: "_Source", tally: ReportBuilder) -> None:
        for lemcal in source:
            tally.add(await self._account(lemcal))

    async def _account(self, lemcal: AsyncLemcal) -> ReportBuilder:
        own = ReportBuilder()
        try:
            user_id = lemcal.user_id
        except Exception as error:  # noqa: BLE001  # a function that returns the key may raise anything
            own.fail(None, "fetch", error)
            return own
        started = anyio.current_time()
        async with self._alone(user_id):
            await self._take_over(user_id, lemcal, own)
            await self._deliver(user_id, own)
        if events.wanted():
            seconds = anyio.current_time() - started
            events.emit(
                events.AccountSynced(user_id, seconds, bool(own.failures), **attrs.asdict(own.counts))
            )
        return own

    async def _take_over(self, user_id: str, lemcal: AsyncLemcal, own: ReportBuilder) -> None:
        options = self._options
        stage: Stage = "store"
        try:
            for _ in range(_ATTEMPTS):
                stage = "store"
                revision = await self._store.revision(user_id)
                stage = "fetch"
                rows = await lemcal.with_options(priority="bulk").meetings.rows()
                stage = "store"
                applied = await self._store.apply(
                    user_id,
                    revision,
                    rows,
                    baseline=options.baseline,
                    confirm_empty_after=options.confirm_empty_after,
                )
                if applied is not None:
                    own.counts = applied.counts
                    own.unreadable_rows += [UnreadableRow(user_id, row) for row in applied.bad_rows]
                    return
        except Exception as error:  # noqa: BLE001  # reported; and the other accounts go on
            own.fail(user_id, stage, error)
            if stage == "fetch":
                await self._record(user_id, error)
            return
        # Others have taken it over, again and again, since this run began: it is in step all the same.
        logger.info("%s is being synchronised by another process", user_id)

    async def _record(self, user_id: str, error: Exception) -> None:
        try:
            await self._store.record_failure(user_id, str(error))
        except Exception as problem:  # noqa: BLE001  # the report has the failure itself
            logger.info("the failure of %s could not be noted: %s", user_id, problem)

    async def _deliver(self, user_id: str, own: ReportBuilder) -> None:
        if self._options.on_change is None:
            return
        try:
            await deliver(self._store, user_id, self._options.on_change, own)
        except Exception as error:  # reported
            logger.info("a change of %s could not be delivered", user_id, exc_info=True)
            own.fail(user_id, "delivery", error)

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


def _check_store(store: object) -> None:
    if isinstance(store, type) or not isinstance(store, Store):
        raise ConfigurationError(f"store= must be a store, such as SQLStore(url), not {type(store).__name__}")


class _Source:
    """The accounts that are left, shared by the workers; it ends at the first error, which it keeps."""

    def __init__(self, accounts: Iterator[AsyncLemcal]) -> None:
        self._accounts = accounts
        self.error: Exception | None = None

    def __iter__(self) -> "_Source":
        return self

    def __next__(self) -> AsyncLemcal:
        if self.error is not None:
            raise StopIteration
        try:
            return next(self._accounts)
        except StopIteration:
            raise
        except Exception as error:  # noqa: BLE001  # raised when those under way are done
            self.error = error
        raise StopIteration
