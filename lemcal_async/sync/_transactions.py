"""Transactions in worker threads: when to connect, and what becomes of one whose caller must go on.

A transaction runs as a whole in one worker thread, so that it works on asyncio and trio, and so that no
cancellation can come in between. A canceled caller waits for it a moment. A server that does not answer is
then left: the connection is cut off, its thread ends by itself, and nothing of it is used again.
"""

import os
import sqlite3
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
from lemcal_async.sync._database import BUSY_SECONDS, Address, Problem, engine_of, keep_log, problem_of
from lemcal_async.sync._tables import is_current, prepare

T = TypeVar("T")
Mode: TypeAlias = Literal["read", "write"]

# SQLite has one writer at a time. More threads for PostgreSQL would do no more, as most of the time goes into
# preparing and reading rows, and they would keep the event loop waiting for its turn.
_THREADS: Final = {"sqlite": 1, "postgresql": 2}

_GRACE: Final = 1.0  # seconds that a canceled transaction gets to end by itself
_CUT_OFF: Final = 0.5  # seconds that its thread then gets to notice
_POLL: Final = 0.01


class Transactions:
    """Runs functions of a connection, each as one transaction in a worker thread.

    Connects, and sees to the tables, when first used. In a forked process it connects anew: a connection
    cannot be shared with the parent, nor closed without its noticing.
    """

    def __init__(self, address: Address, *, create: bool) -> None:
        self.address = address
        self._create = create
        self._limiter: RunVar[anyio.CapacityLimiter] = RunVar("lemcal_async.sync.Transactions")
        self._start_over()
        _all.add(self)

    def _start_over(self) -> None:
        self._engine: Engine | None = None
        self._connecting = threading.Lock()
        self._idle = threading.Condition()
        self._busy = 0

    async def run(self, work: Callable[[Connection], T], mode: Mode = "write") -> T:
        """Run a function in a transaction; raises StoreError or ConfigurationError."""
        return await self.run_prepared(lambda: work, mode)

    async def run_prepared(
        self, prepare_work: Callable[[], Callable[[Connection], T]], mode: Mode = "write"
    ) -> T:
        """Run what a function returns, which is itself called in the thread, before the transaction."""

        def transaction(call: _Call) -> T:
            return self._transaction(prepare_work(), mode, call)

        return await self._in_thread(transaction)

    async def run_outside(self, work: Callable[[Connection], T]) -> T:
        """Run a function with a connection and no transaction."""

        def outside(call: _Call) -> T:
            with self._connected().connect() as connection, call.using(*_handles(connection)):
                return work(connection)

        return await self._in_thread(outside)

    async def run_raw(self, prepare_work: Callable[[], Callable[[Any], T]]) -> T:
        """Run a function of a driver's connection, which sees to its transaction itself.

        It runs once more if the connection turns out to be broken: it must bear that.
        """

        def raw(call: _Call) -> T:
            work = prepare_work()
            engine = self._connected()
            for _ in range(_THREADS[self.address.backend]):  # so many may be left of before a restart
                with suppress(_StaleError):
                    return _with_raw(engine, work, call, may_be_stale=True)
            return _with_raw(engine, work, call, may_be_stale=False)

        return await self._in_thread(raw)

    async def aclose(self) -> None:
        """Close the connections, once what is under way has ended."""
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
            await call.leave()
            raise
        if isinstance(outcome, Problem):
            raise outcome.kind(f"{self.address}: {outcome.text}")
        return outcome  # type: ignore[return-value]  # None only if it was not to run: canceled above

    def _threads(self) -> anyio.CapacityLimiter:
        limiter = self._limiter.get(None)
        if limiter is None:
            limiter = anyio.CapacityLimiter(_THREADS[self.address.backend])
            self._limiter.set(limiter)
        return limiter

    # What follows runs in worker threads.

    def _attempt(self, function: "Callable[[_Call], T]", call: "_Call") -> T | Problem:
        try:
            return function(call)
        except Exception as error:
            problem = problem_of(error)
            if problem is None:
                raise
            return problem

    def _transaction(self, work: Callable[[Connection], T], mode: Mode, call: "_Call") -> T:
        connection = self._begun(mode, call)
        with connection, call.using(*_handles(connection)):
            try:
                outcome = work(connection)
                connection.commit()
            except DBAPIError as error:
                if _is_read_only(error.orig):
                    connection.invalidate()
                raise
            return outcome

    def _begun(self, mode: Mode, call: "_Call") -> Connection:
        """Return a connection with a transaction; a pooled one that has died meanwhile is replaced."""
        engine = self._connected()
        try:
            return _begin(engine, mode, call)
        except DBAPIError as error:
            if not error.connection_invalidated or _is_silence(error.orig):
                raise
        return _begin(engine, mode, call)

    def _connected(self) -> Engine:
        with self._connecting:
            if self._engine is None:
                # What has been imported, SQLAlchemy above all, would be walked by the collector about now:
                # for 50 ms, in which the event loop stands still too.
                promote()
                engine = engine_of(self.address.url, create=self._create)
                try:
                    with engine.connect() as connection:
                        self._see_to_tables(connection)
                except BaseException:
                    engine.dispose()
                    raise
                self._engine = engine
            return self._engine

    def _see_to_tables(self, connection: Connection) -> None:
        if not self._create:
            # Who only reads goes on while another program holds the lock for writing.
            connection.execution_options(lemcal_opens=True, lemcal_writes=False)
            with connection.begin():
                if is_current(connection):
                    return
        connection.execution_options(lemcal_opens=True, lemcal_writes=True)
        with connection.begin():
            prepare(connection, create=self._create)
        keep_log(connection)

    def _dispose(self) -> None:
        with self._idle:
            # One that was left may still be at work in its thread.
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
        """Leave the parent's connections to it. Called in the child, where no other thread runs."""
        if self._engine is not None:
            _inherited.append(self._engine)
        self._start_over()


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
        if is_broken and may_be_stale and not _is_silence(error):
            raise _StaleError from None
        raise
    finally:
        pooled.close()


def _is_silence(error: BaseException | None) -> bool:
    return type(error).__name__ == "SilenceError"  # by name, because psycopg may be missing


def _is_read_only(error: BaseException | None) -> bool:
    """Whether PostgreSQL takes no writes on this connection; on a new one it may, as after a failover."""
    return getattr(error, "sqlstate", None) == "25006"


class _Call:
    """One call into a worker thread, as both sides see it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: Any = None
        self._has_started = self._has_ended = self.is_left = False

    @contextmanager
    def running(self) -> Generator[bool]:
        """Note start and end; yields whether anybody still wants it."""
        with self._lock:
            self._has_started = True
            is_wanted = not self.is_left
        try:
            yield is_wanted
        finally:
            self._has_ended = True

    @contextmanager
    def using(self, connection: Any, invalidate: Callable[[], None]) -> Generator[None]:
        """Let the wait on a driver's connection be cut off meanwhile; it is thrown away then."""
        with self._lock:
            self._connection = connection
            if self.is_left:
                _sever(self._connection)
        try:
            yield
        finally:
            with self._lock:
                self._connection = None
                if self.is_left:
                    invalidate()

    async def leave(self) -> None:
        """Wait a moment for the end; then cut off the connection, and leave the thread to itself."""
        with anyio.CancelScope(shield=True):
            await self._ended(_GRACE)
            with self._lock:
                self.is_left = True
                if self._connection is not None:
                    _sever(self._connection)
            await self._ended(_CUT_OFF)

    async def _ended(self, seconds: float) -> None:
        with anyio.move_on_after(seconds):
            while self._has_started and not self._has_ended:  # noqa: ASYNC110  # a thread says so
                await anyio.sleep(_POLL)


def _sever(connection: Any) -> None:
    """End what a connection is doing, from another thread."""
    (connection.interrupt if isinstance(connection, sqlite3.Connection) else connection.sever)()


_all: "weakref.WeakSet[Transactions]" = weakref.WeakSet()
_inherited: list[Engine] = []  # kept, because collecting a connection may close it


def _after_fork() -> None:
    for transactions in list(_all):
        transactions.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)
