"""``SQLStore``: the store on SQLite and PostgreSQL. It needs the extra ``sql``.

Knows the worker threads, and when to connect; the transactions themselves are in ``statements.py``. Each
runs as a whole in one worker thread, so that it works on asyncio and trio, and so that no cancellation can
come in between.
"""

import threading
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from time import time
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar

import anyio
from anyio.lowlevel import RunVar

try:
    from sqlalchemy import Connection, Engine, select
    from sqlalchemy.exc import SQLAlchemyError
except ModuleNotFoundError as error:
    if error.name != "sqlalchemy":
        raise
    raise ImportError("SQLStore needs its extra: pip install 'lemcal-async[sql]'") from None
from lemcal_async.errors import ConfigurationError, EmptyListError
from lemcal_async.sync import _statements as statements
from lemcal_async.sync._database import BUSY_SECONDS, Problem, address_of, engine_of, keep_log, words_of
from lemcal_async.sync._diff import snapshot
from lemcal_async.sync._migrations import SchemaError, prepare
from lemcal_async.sync._store import Applied, Change, Forgotten, check_aware
from lemcal_async.sync._tables import changes

T = TypeVar("T")

# SQLite has one writer at a time. More threads for PostgreSQL would do no more, as most of the time goes into
# preparing and reading rows, and they would keep the event loop waiting for its turn.
_THREADS: Final = {"sqlite": 1, "postgresql": 2}
_PAGE: Final = 500  # changes that are read at once


class SQLStore:
    """Meetings, changes and accounts in a database, with webhook deliveries beside them.

    ``url`` is ``sqlite:///file.db`` or ``postgresql://user:password@host/database`` (by psycopg). The
    tables are created at the first use; with ``create=False`` they must be there. Every method is one
    transaction in a worker thread. Cancelled, by anyio or natively, a transaction still comes to its
    end: committed or rolled back, never in between.

    ConfigurationError if the URL or the tables cannot be used; StoreError, with the database's words,
    if the database fails.
    """

    def __init__(self, url: str, *, create: bool = True) -> None:
        address = address_of(url)
        del url  # it may hold a password, and a traceback may show local variables
        if isinstance(address, Problem):
            raise address.kind(address.text)
        self._address = address
        self._create = create
        self._lock = threading.Condition()
        self._busy = 0
        self._engine: Engine | None = None
        self._limiter: RunVar[anyio.CapacityLimiter] = RunVar("lemcal_async.sync.SQLStore")

    def __repr__(self) -> str:
        # A traceback that shows local variables asks before __init__ has come to its end.
        return f"<SQLStore {self._address if hasattr(self, '_address') else 'not set up'}>"

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
        """Connect, and see to the tables. Any other method does so too when it comes first."""
        await self._read(lambda _: None)

    async def aclose(self) -> None:
        """Close the connections, once what is under way has come to its end. It may be used again."""
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._dispose, limiter=self._threads())

    async def revision(self, user_id: str) -> int:
        """See ``Store``."""
        return await self._read(lambda connection: statements.revision(connection, user_id))

    async def apply(
        self,
        user_id: str,
        revision: int,
        rows: list[Any],
        *,
        baseline: bool,
        confirm_empty_after: int,
        body_hash: str | None = None,  # noqa: ARG002  # no column holds it yet
    ) -> Applied | None:
        """See ``Store``."""

        def prepared() -> Callable[[Connection], Applied | EmptyListError | None]:
            now = snapshot(rows)  # takes longest, so before the transaction, which others wait for
            return lambda connection: statements.apply(
                connection,
                user_id,
                revision,
                now,
                _now(),
                baseline=baseline,
                confirm_empty_after=confirm_empty_after,
            )

        outcome = await self._run(prepared, writes=True)
        if isinstance(outcome, EmptyListError):
            raise outcome
        return outcome

    async def unchanged(self, user_id: str, body_hash: str) -> int | None:  # noqa: ARG002
        """See ``Store``. No list is known by its hash here: each is compared."""
        return None

    async def record_failure(self, user_id: str, message: str) -> None:
        """See ``Store``."""
        await self._write(lambda connection: statements.record_failure(connection, user_id, message, _now()))

    async def pending(self, user_id: str, limit: int) -> list[Change]:
        """See ``Store``."""
        wanted = select(changes).where(changes.c.user_id == user_id, changes.c.delivered_at.is_(None))
        return await self._read(lambda connection: statements.outbox(connection, wanted, limit))

    async def mark_delivered(self, changes: Sequence[Change]) -> int:
        """See ``Store``."""
        seqs = [change.seq for change in changes]
        return await self._write(lambda connection: statements.mark_delivered(connection, seqs, _now()))

    async def record_attempt(self, changes: Sequence[Change], error: str, *, park: bool) -> None:
        """See ``Store``. No column holds attempts here: nothing is counted, and nothing parked."""

    async def retry_parked(self, user_id: str | None = None) -> int:  # noqa: ARG002
        """See ``Store``. Nothing is ever parked here."""
        return 0

    async def changes(self, *, pending: bool = False, parked: bool = False) -> AsyncIterator[Change]:
        """See ``Store``."""
        wanted = select(changes)
        if pending:
            wanted = wanted.where(changes.c.delivered_at.is_(None))
        elif parked:
            return
        last = 0
        while page := await self._page(wanted.where(changes.c.seq > last)):
            for change in page:
                yield change
            last = page[-1].seq

    async def _page(self, wanted: Any) -> list[Change]:
        return await self._read(lambda connection: statements.outbox(connection, wanted, _PAGE))

    async def forget(self, user_id: str) -> Forgotten:
        """See ``Store``."""
        return await self._write(lambda connection: statements.forget(connection, user_id), erases=True)

    async def prune(self, *, before: datetime) -> Forgotten:
        """See ``Store``."""
        check_aware(before)
        return await self._write(lambda connection: statements.prune(connection, before), erases=True)

    async def claim(self, user_id: str, meeting_id: str, lease: float) -> Literal["new", "busy", "done"]:
        """Claim a webhook delivery for ``lease`` seconds, by this machine's clock.

        "new": it is the caller's to handle; "busy": somebody else's, whose lease has not ended; "done":
        it was handled.
        """
        return await self._write(
            lambda connection: statements.claim(connection, user_id, meeting_id, time(), lease)
        )

    async def done(self, user_id: str, meeting_id: str) -> None:
        """Remember that a claimed delivery was handled."""
        await self._write(lambda connection: statements.done(connection, user_id, meeting_id, _now()))

    async def release(self, user_id: str, meeting_id: str) -> None:
        """Give a claimed delivery back: its handler failed, and the next delivery may try."""
        await self._write(lambda connection: statements.release(connection, user_id, meeting_id))

    async def _read(self, work: Callable[[Connection], T]) -> T:
        return await self._run(lambda: work, writes=False)

    async def _write(self, work: Callable[[Connection], T], *, erases: bool = False) -> T:
        return await self._run(lambda: work, writes=True, erases=erases)

    async def _run(
        self, prepared: Callable[[], Callable[[Connection], T]], *, writes: bool, erases: bool = False
    ) -> T:
        """Run one transaction in a worker thread."""

        def in_thread() -> T | Problem:
            with self._lock:
                self._busy += 1
            try:
                return self._transaction(prepared(), writes=writes, erases=erases)
            except SchemaError as error:
                return Problem(str(error), ConfigurationError)
            except SQLAlchemyError as error:
                return Problem(words_of(error))
            finally:
                with self._lock:
                    self._busy -= 1
                    self._lock.notify_all()

        outcome = await anyio.to_thread.run_sync(in_thread, limiter=self._threads())
        if isinstance(outcome, Problem):
            # Out here, because the database's own error holds the parameters: personal data.
            raise outcome.kind(f"{self._address}: {outcome.text}")
        return outcome

    def _threads(self) -> anyio.CapacityLimiter:
        limiter = self._limiter.get(None)
        if limiter is None:
            limiter = anyio.CapacityLimiter(_THREADS[self._address.backend])
            self._limiter.set(limiter)
        return limiter

    # What follows runs in worker threads.

    def _transaction(self, work: Callable[[Connection], T], *, writes: bool, erases: bool) -> T:
        with self._connected().connect() as connection:
            connection.execution_options(lemcal_writes=writes)
            with connection.begin():
                outcome = work(connection)
            if erases and self._address.backend == "sqlite":
                # Else what was erased could still be read in the log beside the database.
                connection.connection.driver_connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # type: ignore[union-attr]
            return outcome

    def _connected(self) -> Engine:
        with self._lock:
            if self._engine is None:
                engine = engine_of(self._address.url, create=self._create)
                try:
                    with engine.connect() as connection:
                        with connection.begin():
                            prepare(connection, create=self._create)
                        if self._address.backend == "sqlite":
                            keep_log(connection)
                except BaseException:
                    engine.dispose()
                    raise
                self._engine = engine
            return self._engine

    def _dispose(self) -> None:
        with self._lock:
            # One that was cancelled natively may still be at work in its thread.
            self._lock.wait_for(lambda: not self._busy, timeout=2 * BUSY_SECONDS)
            if self._engine is not None:
                self._engine.dispose()
                self._engine = None


def _now() -> datetime:
    return datetime.now(UTC)
