"""``SQLStore``: the store for SQLite and PostgreSQL. Requires the extra ``sql``."""

import copy
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar

import anyio
from anyio.lowlevel import RunVar

try:
    from sqlalchemy import Connection, Select
except ModuleNotFoundError as error:
    if error.name != "sqlalchemy":
        raise
    raise ImportError("SQLStore requires the extra sql: pip install 'lemcal-async[sql]'") from None
from lemcal_async._auth import Secret
from lemcal_async._gc import paused
from lemcal_async.errors import EmptyListError, StoreError
from lemcal_async.sync import _lists, _outbox, _statements
from lemcal_async.sync._database import address_of, truncate_log
from lemcal_async.sync._diff import snapshot
from lemcal_async.sync._schedule import Schedule, lock_account, spread
from lemcal_async.sync._store import Applied, Change, Forgotten, Lease, check_aware, check_part
from lemcal_async.sync._transactions import Mode, Transactions

T = TypeVar("T")

_PAGE: Final = 500  # changes read per query


class SQLStore:
    """Keeps meetings, changes, accounts and handled webhook deliveries in a database.

    Every method is one transaction in a worker thread, except ``prune``, which uses several so that other
    writers get a turn in between. A canceled method still commits or rolls back its transaction. It waits one
    second for that, and half a second more after interrupting the connection, which is then abandoned.

    A transaction waits up to 10 s for another program's lock (``?timeout=`` in the URL for SQLite,
    ``?lock_timeout=`` for PostgreSQL). On PostgreSQL, a statement may take up to 30 s
    (``?statement_timeout=``).

    Args:
        url: ``sqlite:///file.db`` or ``postgresql://user:password@host/database`` (using psycopg).
        create: Whether to create the tables on first use; otherwise they must exist.

    Raises:
        ConfigurationError: If the URL or the tables cannot be used.
        StoreError: If the database fails, with its message. Any method can raise it.
    """

    def __init__(self, url: str, *, create: bool = True) -> None:
        secret, url = Secret[object](url), ""  # it may contain a password
        self._transactions = Transactions(address_of(secret), create=create)
        self._revisions = _Revisions(self._transactions)
        self._lease: Lease | None = None

    def __repr__(self) -> str:
        # A traceback that shows local variables calls this before __init__ has finished.
        return f"<SQLStore {self._transactions.address if hasattr(self, '_transactions') else 'not set up'}>"

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def open(self) -> None:
        """Connect, and create or check the tables. Otherwise the first method called does so."""
        await self._transactions.run_outside(lambda _: None)

    async def aclose(self) -> None:
        """Close the connections once running transactions have ended. The store can be used again."""
        await self._transactions.aclose()

    def schedule(self) -> Schedule:
        """Return the schedule of the fleet that uses this store."""
        return Schedule(self._transactions)

    def with_lease(self, lease: Lease) -> Self:
        """Return a copy of this store for a lease holder. Its methods fail once the lease has ended.

        That includes calls for other accounts. Closing the copy closes this store.
        """
        leased = copy.copy(self)
        leased._lease = lease  # noqa: SLF001  # same class
        return leased

    async def revision(self, user_id: str) -> int:
        """See ``Store``."""
        return await self._revisions.get(user_id)

    async def apply(
        self,
        user_id: str,
        revision: int,
        rows: Iterable[Any],
        *,
        baseline: bool,
        confirm_empty_after: int,
        body_hash: str | None = None,
    ) -> Applied | None:
        """See ``Store``."""

        def prepared() -> Callable[[Any], Applied | EmptyListError | None]:
            with paused():
                current = snapshot(rows)  # slow, so done before the transaction, which blocks writers
            return lambda raw: _lists.apply(
                raw,
                user_id,
                revision,
                current,
                _now(),
                baseline=baseline,
                confirm_empty_after=confirm_empty_after,
                body_hash=body_hash,
                lease=self._lease,
            )

        outcome = await self._transactions.run_raw(prepared)
        if isinstance(outcome, EmptyListError):
            raise outcome
        if outcome is None:
            await self._check_lease()
        return outcome

    async def unchanged(self, user_id: str, body_hash: str) -> int | None:
        """See ``Store``."""
        return await self._unchanged(user_id, body_hash)

    async def unchanged_and_released(self, body_hash: str) -> int | None:
        """Like ``unchanged``, for the lease holder; also releases the lease, in the same statement."""
        assert self._lease is not None  # noqa: S101  # see ``with_lease``
        return await self._unchanged(self._lease.user_id, body_hash, spread())

    async def _unchanged(self, user_id: str, body_hash: str, factor: float | None = None) -> int | None:
        listed = await self._transactions.run_raw(
            lambda: (
                lambda raw: _lists.unchanged(
                    raw, user_id, body_hash, _now(), lease=self._lease, spread=factor
                )
            )
        )
        if listed is None:
            await self._check_lease()
        return listed

    async def _check_lease(self) -> None:
        """Raise LeaseLostError if nothing was written because the lease has ended."""
        if self._lease is not None:
            await self._run(lambda _: None)

    async def record_failure(self, user_id: str, message: str) -> None:
        """See ``Store``."""
        await self._run(lambda connection: _statements.record_failure(connection, user_id, message, _now()))

    async def pending(self, user_id: str, limit: int) -> list[Change]:
        """See ``Store``."""
        query = _outbox.pending_of(user_id)
        return await self._run(lambda connection: _outbox.read(connection, query, limit), "read")

    async def mark_delivered(self, changes: Sequence[Change]) -> int:
        """See ``Store``."""
        seqs = [change.seq for change in changes]
        return await self._run(lambda connection: _outbox.mark_delivered(connection, seqs, _now()))

    async def record_attempt(self, changes: Sequence[Change], error: str, *, park: bool) -> None:
        """See ``Store``."""
        seqs = [change.seq for change in changes]
        parked_at = _now() if park else None
        await self._run(lambda connection: _outbox.record_attempt(connection, seqs, error, parked_at))

    async def retry_parked(self, user_id: str | None = None) -> int:
        """See ``Store``."""
        return await self._run(lambda connection: _outbox.retry_parked(connection, user_id))

    async def changes(
        self,
        *,
        pending: bool = False,
        parked: bool = False,
        after: int = 0,
        of: tuple[int, int] | None = None,
    ) -> AsyncIterator[Change]:
        """See ``Store``."""
        check_part(of)
        query = _outbox.selection(pending=pending, parked=parked)
        while page := await self._page(query, after, of):
            for change in page:
                yield change
            after = page[-1].seq

    async def _page(self, query: Any, after: int, of: tuple[int, int] | None) -> list[Change]:
        return await self._run(
            lambda connection: _outbox.follow(connection, query, after, of, limit=_PAGE), "read"
        )

    async def query(self, statement: "Select[*tuple[Any, ...]]") -> list[tuple[Any, ...]]:
        """Run a SELECT on the tables described in ``docs/sync.md``, in a read transaction.

        Args:
            statement: The SELECT, built with SQLAlchemy.
        """
        return await self._run(
            lambda connection: [tuple(row) for row in connection.execute(statement)], "read"
        )

    async def forget(self, user_id: str) -> Forgotten:
        """See ``Store``."""
        erased = await self._run(lambda connection: _statements.forget(connection, user_id))
        return await self._after_erasing(erased)

    async def prune(self, *, before: datetime) -> Forgotten:
        """See ``Store``. Erases in slices, so that other writers get a turn in between."""
        check_aware(before)
        counts = [0, 0]  # erased meetings and changes, even if a later slice fails
        try:
            await self._in_slices(_statements.prune_accounts, before, "", counts, 0)
            await self._in_slices(_statements.prune_changes, before, 0, counts, 1)
            await self._run(lambda connection: _statements.prune_deliveries(connection, before))
        except StoreError as error:
            if not any(counts):
                raise
            problem, kind = str(error), type(error)
        else:
            return await self._after_erasing(Forgotten(*counts))
        raise kind(f"{problem}; already erased: {counts[0]} meetings and {counts[1]} changes")

    async def _in_slices(
        self,
        erase: Callable[..., tuple[int, T | None]],
        before: datetime,
        start: T,
        counts: list[int],
        at: int,
    ) -> None:
        after: T | None = start
        while after is not None:
            count, after = await self._run(partial(erase, before=before, after=after))
            counts[at] += count

    async def _after_erasing(self, erased: Forgotten) -> Forgotten:
        """Return what was erased, once SQLite's log no longer contains it; otherwise raise StoreError."""
        problem = await self._transactions.run_outside(truncate_log)
        if problem is not None:
            raise StoreError(
                f"{self._transactions.address}: erased {erased.meetings} meetings and {erased.changes} "
                f"changes, but the write-ahead log still contains them: {problem}; run this again later"
            )
        return erased

    async def claim(self, user_id: str, meeting_id: str, lease: float) -> Literal["new", "busy", "done"]:
        """Claim a webhook delivery for ``lease`` seconds.

        "new": the caller may handle the delivery; "busy": another process holds a claim that has not
        expired; "done": it was handled.
        """
        return await self._run(lambda connection: _statements.claim(connection, user_id, meeting_id, lease))

    async def done(self, user_id: str, meeting_id: str) -> None:
        """Record that a claimed delivery was handled."""
        await self._run(lambda connection: _statements.done(connection, user_id, meeting_id, _now()))

    async def release(self, user_id: str, meeting_id: str) -> None:
        """Release a claim after its handler failed, so that the next delivery can try again."""
        await self._run(lambda connection: _statements.release(connection, user_id, meeting_id))

    async def _run(self, work: Callable[[Connection], T], mode: Mode = "write") -> T:
        return await self._transactions.run(self._guarded(work), mode)

    def _guarded(self, work: Callable[[Connection], T]) -> Callable[[Connection], T]:
        lease = self._lease
        if lease is None:
            return work

        def guarded(connection: Connection) -> T:
            lock_account(connection, lease)
            return work(connection)

        return guarded


class _Revisions:
    """Reads revisions, combining requests that arrive while all threads are busy into one query.

    This saves most accounts a trip to a thread.
    """

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions
        self._batch: RunVar[_RevisionBatch] = RunVar("lemcal_async.sync.sql._Revisions")

    async def get(self, user_id: str) -> int:
        """Return an account's revision, 0 if it is new."""
        batch = self._batch.get(None)
        if batch is not None and batch.add(user_id):
            await batch.has_ended.wait()
            if batch.found is not None:
                return batch.found.get(user_id, 0)
        # There is no open batch, or it failed or was canceled: then each of its callers starts its own.
        batch = _RevisionBatch(user_id)
        self._batch.set(batch)
        try:
            batch.found = await self._transactions.run_raw(
                lambda: partial(_lists.revisions, user_ids=batch.close())
            )
        finally:
            batch.close()
            batch.has_ended.set()
        return batch.found.get(user_id, 0)


class _RevisionBatch:
    """Accounts whose revisions are read in one query. Open until a thread starts the query."""

    def __init__(self, user_id: str) -> None:
        self.has_ended = anyio.Event()
        self.found: dict[str, int] | None = None
        self._user_ids = [user_id]
        self._is_open = True
        self._lock = threading.Lock()

    def add(self, user_id: str) -> bool:
        """Add an account; return False if the batch is closed or full."""
        with self._lock:
            has_room = self._is_open and len(self._user_ids) < _outbox.MAX_PARAMETERS
            if has_room:
                self._user_ids.append(user_id)
            return has_room

    def close(self) -> list[str]:
        """Close the batch and return its accounts."""
        with self._lock:
            self._is_open = False
            return self._user_ids


def _now() -> datetime:
    return datetime.now(UTC)
