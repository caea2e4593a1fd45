"""Transactions in worker threads: connecting, running them, and abandoning them on cancellation.

A transaction runs entirely in one worker thread, so that it works on asyncio and trio and no cancellation can
interrupt it halfway. A canceled caller waits for it briefly. If the server has not responded by then, the
connection is interrupted and discarded, and its thread ends on its own.
"""

import os
import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any, Final, Literal, TypeAlias, TypeVar

import anyio
from anyio.lowlevel import RunVar
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from lemcal_async._gc import promote
from lemcal_async.sync._database import BUSY_SECONDS, Address, Problem, enable_log, engine_of, problem_of
from lemcal_async.sync._tables import is_current, prepare

T = TypeVar("T")
Mode: TypeAlias = Literal["read", "write"]

# SQLite allows one writer at a time. For PostgreSQL, more threads would bring nothing, since most of the time
# goes into preparing and reading rows, and would compete with the event loop for the interpreter lock.
_THREADS: Final = {"sqlite": 1, "postgresql": 2}

_GRACE: Final = 1.0  # seconds that a canceled transaction gets to end
_INTERRUPT_GRACE: Final = 0.5  # seconds that its thread then gets to notice the interruption
_POLL: Final = 0.01


class Transactions:
    """Runs functions on a connection, each as one transaction in a worker thread.

    Connects and prepares the tables on first use. A forked process opens new connections: it can neither
    share the parent's connections nor close them without affecting the parent.
    """

    def __init__(self, address: Address, *, create: bool) -> None:
        self.address = address
        self._create = create
        self._limiter: RunVar[anyio.CapacityLimiter] = RunVar("lemcal_async.sync.Transactions")
        self._reset()
        _all.add(self)

    def _reset(self) -> None:
        self._engine: Engine | None = None
        self._connecting = threading.Lock()
        self._idle = threading.Condition()
        self._busy = 0

    async def run(self, work: Callable[[Connection], T], mode: Mode = "write") -> T:
        """Run a function in a transaction. Raises StoreError or ConfigurationError."""
        return await self.run_prepared(lambda: work, mode)

    async def run_prepared(
        self, prepare_work: Callable[[], Callable[[Connection], T]], mode: Mode = "write"
    ) -> T:
        """Call ``prepare_work`` in the thread, and then run the function that it returns in a transaction."""

        def transaction(call: _Call) -> T:
            return self._transaction(prepare_work(), mode, call)

        return await self._in_thread(transaction)

    async def run_outside(self, work: Callable[[Connection], T]) -> T:
        """Run a function on a connection, without a transaction."""

        def outside(call: _Call) -> T:
            with self._get_engine().connect() as connection, call.using(*_handles(connection)):
                return work(connection)

        return await self._in_thread(outside)

    async def run_raw(self, prepare_work: Callable[[], Callable[[Any], T]]) -> T:
        """Run a function on a driver's connection. The function manages its own transaction.

        It runs again if the connection turns out to be broken, so it must be repeatable.
        """

        def raw(call: _Call) -> T:
            work = prepare_work()
            engine = self._get_engine()
            # A server restart may have broken every pooled connection.
            for _ in range(_THREADS[self.address.backend]):
                with suppress(_StaleError):
                    return _with_raw(engine, work, call, may_be_stale=True)
            return _with_raw(engine, work, call, may_be_stale=False)

        return await self._in_thread(raw)

    async def aclose(self) -> None:
        """Close the connections once running transactions have ended."""
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._dispose, limiter=self._threads())

    async def _in_thread(self, function: "Callable[[_Call], T]") -> T:
        call = _Call()

        def in_thread() -> T | Problem | None:
            with call.running() as may_run, self._counted():
                return self._attempt(function, call) if may_run else None

        try:
            outcome = await anyio.to_thread.run_sync(
                in_thread, abandon_on_cancel=True, limiter=self._threads()
            )
        except anyio.get_cancelled_exc_class():
            await call.abandon()
            raise
        if isinstance(outcome, Problem):
            raise outcome.kind(f"{self.address}: {outcome.text}")
        return outcome  # type: ignore[return-value]  # None only after a cancellation, raised above

    def _threads(self) -> anyio.CapacityLimiter:
        limiter = self._limiter.get(None)
        if limiter is None:
            limiter = anyio.CapacityLimiter(_THREADS[self.address.backend])
            self._limiter.set(limiter)
        return limiter

    # The methods below run in worker threads.

    def _attempt(self, function: "Callable[[_Call], T]", call: "_Call") -> T | Problem:
        try:
            return function(call)
        except Exception as error:
            problem = problem_of(error)
            if problem is None:
                raise
            return problem

    def _transaction(self, work: Callable[[Connection], T], mode: Mode, call: "_Call") -> T:
        connection = self._open_transaction(mode, call)
        with connection, call.using(*_handles(connection)):
            try:
                outcome = work(connection)
                connection.commit()
            except DBAPIError as error:
                if _is_read_only(error.orig):
                    connection.invalidate()
                raise
            return outcome

    def _open_transaction(self, mode: Mode, call: "_Call") -> Connection:
        """Return a connection in a transaction; a pooled connection that has died is replaced."""
        engine = self._get_engine()
        try:
            return _begin(engine, mode, call)
        except DBAPIError as error:
            if not error.connection_invalidated or _is_no_reply(error.orig):
                raise
        return _begin(engine, mode, call)

    def _get_engine(self) -> Engine:
        with self._connecting:
            if self._engine is None:
                # About now, the garbage collector would traverse everything imported, mostly SQLAlchemy:
                # 50 ms during which the event loop is blocked as well.
                promote()
                engine = engine_of(self.address.url, create=self._create)
                try:
                    with engine.connect() as connection:
                        self._prepare_tables(connection)
                except BaseException:
                    engine.dispose()
                    raise
                self._engine = engine
            return self._engine

    def _prepare_tables(self, connection: Connection) -> None:
        if not self._create:
            # Readers need not wait for another program that holds the write lock.
            connection.execution_options(lemcal_opens=True, lemcal_writes=False)
            with connection.begin():
                if is_current(connection):
                    return
        connection.execution_options(lemcal_opens=True, lemcal_writes=True)
        with connection.begin():
            prepare(connection, create=self._create)
        enable_log(connection)

    def _dispose(self) -> None:
        with self._idle:
            # An abandoned transaction may still be running in its thread.
            self._idle.wait_for(lambda: not self._busy, timeout=2 * BUSY_SECONDS)
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.dispose()

    @contextmanager
    def _counted(self) -> Generator[None]:
        with self._idle:
            self._busy += 1
        try:
            yield
        finally:
            with self._idle:
                self._busy -= 1
                self._idle.notify_all()

    def after_fork(self) -> None:
        """Abandon the parent's connections. Called in the child, where no other thread runs."""
        if self._engine is not None:
            _inherited.append(self._engine)
        self._reset()


def _begin(engine: Engine, mode: Mode, call: "_Call") -> Connection:
    connection = engine.connect()
    try:
        connection.execution_options(lemcal_writes=mode == "write")
        with call.using(*_handles(connection)):
            connection.begin()
    except BaseException:
        connection.close()
        raise
    return connection


def _handles(connection: Connection) -> tuple[Any, Callable[[], None]]:
    return connection.connection.driver_connection, connection.invalidate


class _StaleError(Exception):
    """A pooled connection was broken."""


def _with_raw(engine: Engine, work: Callable[[Any], T], call: "_Call", *, may_be_stale: bool) -> T:
    pooled = engine.raw_connection()
    raw: Any = pooled.driver_connection
    try:
        with call.using(raw, pooled.invalidate):
            return work(raw)
    except Exception as error:
        is_broken = getattr(raw, "closed", False)
        if is_broken or _is_read_only(error):
            pooled.invalidate()
        if is_broken and may_be_stale and not _is_no_reply(error):
            raise _StaleError from None
        raise
    finally:
        pooled.close()


def _is_no_reply(error: BaseException | None) -> bool:
    return type(error).__name__ == "NoReplyError"  # by name, because psycopg is optional


def _is_read_only(error: BaseException | None) -> bool:
    """Whether PostgreSQL rejects writes here; after a failover, a new connection may accept them."""
    return getattr(error, "sqlstate", None) == "25006"


class _Call:
    """The state of one call into a worker thread, shared by the caller and the thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: Any = None
        self._has_started = self._has_ended = self.is_abandoned = False

    @contextmanager
    def running(self) -> Generator[bool]:
        """Record start and end; yield whether the caller still needs the result."""
        with self._lock:
            self._has_started = True
            is_wanted = not self.is_abandoned
        try:
            yield is_wanted
        finally:
            self._has_ended = True

    @contextmanager
    def using(self, connection: Any, invalidate: Callable[[], None]) -> Generator[None]:
        """Allow a driver's connection to be interrupted in the block; it is discarded if that happens."""
        with self._lock:
            self._connection = connection
            if self.is_abandoned:
                self._connection.interrupt()
        try:
            yield
        finally:
            with self._lock:
                self._connection = None
                if self.is_abandoned:
                    invalidate()

    async def abandon(self) -> None:
        """Wait briefly for the call to end; then interrupt its connection and abandon its thread."""
        with anyio.CancelScope(shield=True):
            await self._wait_for_end(_GRACE)
            with self._lock:
                self.is_abandoned = True
                if self._connection is not None:
                    self._connection.interrupt()
            await self._wait_for_end(_INTERRUPT_GRACE)

    async def _wait_for_end(self, seconds: float) -> None:
        with anyio.move_on_after(seconds):
            while self._has_started and not self._has_ended:  # noqa: ASYNC110  # a thread sets it
                await anyio.sleep(_POLL)


_all: "weakref.WeakSet[Transactions]" = weakref.WeakSet()
_inherited: list[Engine] = []  # kept, because garbage collection may close a connection


def _after_fork() -> None:
    for transactions in list(_all):
        transactions.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)
