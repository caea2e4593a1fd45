"""``Fleet``: manages the accounts and their schedule, and runs workers."""

import logging
import re
from collections.abc import AsyncGenerator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from hashlib import blake2b
from urllib.parse import urlsplit

import anyio
import attrs

from lemcal_async import events
from lemcal_async._auth import Secret, is_user_id
from lemcal_async._callbacks import problem_with_callback
from lemcal_async._checks import is_seconds, is_whole
from lemcal_async._client import AsyncLemcal
from lemcal_async.errors import ConfigurationError
from lemcal_async.fleet._engine import Engine, EngineError, MemoryEngine, Queue, Turn
from lemcal_async.fleet._turns import Credentials, Turns
from lemcal_async.fleet._worker import FleetWorker
from lemcal_async.sync import SQLStore
from lemcal_async.sync._delivery import OnChange, OnChanges
from lemcal_async.sync._runner import SyncOptions
from lemcal_async.sync._schedule import Schedule

logger = logging.getLogger("lemcal_async.fleet")


@attrs.frozen
class FleetStatus:
    """A fleet's workload and backlog.

    Attributes:
        accounts: All accounts.
        due: Accounts that are due for a synchronization.
        oldest_due: Seconds for which the longest-due account has been due. None if no account is due.
        queued: Queued batches of up to 8 turns each. None while the queue is unreachable.
        running: Turns in progress.
        failing: Accounts whose last turn failed.
        paused: Paused accounts.
        undelivered: Changes that wait for their handler.
        oldest_undelivered: Seconds for which the oldest of these changes has waited. None if there are none.
        parked: Changes that wait for ``retry_parked()``.
        workers: The number of workers. None while the queue is unreachable.
    """

    accounts: int
    due: int
    oldest_due: float | None
    queued: int | None
    running: int
    failing: int
    paused: int
    undelivered: int
    oldest_undelivered: float | None
    parked: int
    workers: int | None


class FleetWaker:
    """Requests immediate synchronizations, for example as ``WebhookReceiver(…, wake=…)``."""

    def __init__(self, schedule: Schedule, queue: Queue | None) -> None:
        self._schedule = schedule
        self._queue = queue

    async def wake(self, user_id: str | None = None) -> None:
        """Wake an account. Once this returns, the wake-up is stored in the database and cannot be lost.

        Args:
            user_id: The account.

        Raises:
            ConfigurationError: If ``user_id`` is None or not a user id, or the account is not in the fleet.
            StoreError: If the database fails.
        """
        if user_id is None:
            raise ConfigurationError("a fleet cannot wake all accounts at once: pass wake(user_id)")
        if not await self.wake_many([user_id]):
            raise ConfigurationError(f"{user_id} is not in the fleet; add it with fleet.add([{user_id!r}])")

    async def wake_many(self, user_ids: Iterable[str]) -> int:
        """Wake several accounts; return how many of them are in the fleet.

        Args:
            user_ids: The accounts.

        Raises:
            ConfigurationError: If one of them is not a user id.
            StoreError: If the database fails.
        """
        ids = _ids(user_ids)
        known = await self._schedule.wake(ids)
        if known and self._queue is not None:
            try:
                await self._queue.put([[Turn(user_id)] for user_id in ids])
            except EngineError as error:
                # The wake-up is in the database, which the workers poll.
                logger.warning("wake-ups reach the workers up to half a second late: %s", error)
        return known


class Fleet:
    """Accounts that any number of workers, on any number of machines, keep synchronized.

    A fleet can be created before any event loop runs. Each method connects on its own; ``waker()`` stays
    connected for the length of its block.

    Args:
        store: The database URL. Several machines need PostgreSQL.
        queue: The URL of a Redis (7 or later) or Valkey, or ``memory://`` for a fleet on one machine, to try
            it out or in tests.
        credentials: An async function from a user id to the account's API key. Keys are neither stored nor
            queued.
        interval: Seconds between two synchronizations of an account, unless the account was added with its
            own interval.
        on_change: Called with each change: in order per account, at least once, and only once unless a worker
            dies. If it raises, the account backs off.
        on_changes: Called with lists of an account's changes, instead of ``on_change``.
        max_attempts: The number of times the handler may raise for a change before the change is parked.
        lemcal: The client whose transport, limiter and options the accounts share. The caller is responsible
            for closing it. Defaults to a client that the fleet creates and closes.
        grace: Seconds that running turns have to finish after a signal stops the worker.

    Raises:
        ConfigurationError: If an argument is invalid. Methods raise it, too.
        StoreError: If the database fails. Only methods raise it.
    """

    def __init__(
        self,
        store: str,
        queue: str,
        *,
        credentials: Credentials,
        interval: float = 300.0,
        on_change: OnChange | None = None,
        on_changes: OnChanges | None = None,
        max_attempts: int = 50,
        lemcal: AsyncLemcal | None = None,
        grace: float = 25.0,
    ) -> None:
        secrets, store, queue = Secret((store, queue)), "", ""
        self._store_url, queue_url = (Secret(url) for url in secrets.reveal())
        for name, value in (("interval", interval), ("grace", grace)):
            if not is_seconds(value):
                raise ConfigurationError(f"{name}={value!r}: it must be a number of seconds above 0")
        if not callable(credentials):
            raise ConfigurationError("credentials= must be an async function from a user id to an API key")
        if problem := problem_with_callback("credentials", credentials, ("user_id",)):
            raise ConfigurationError(problem)
        self._interval = float(interval)
        self._grace = grace
        self._credentials = credentials
        self._options = SyncOptions(
            max_concurrency=1,  # run() sets it
            on_change=on_change,
            on_changes=on_changes,
            max_attempts=max_attempts,
            baseline=False,
            confirm_empty_after=2,
        )
        self._lemcal = lemcal
        self._store = SQLStore(self._store_url.reveal())
        self._schedule = self._store.schedule()
        self._store_users = 0  # in this process; the last one closes the store
        self._engine = _create_engine(queue_url, _queue_name(self._store_url))

    def __repr__(self) -> str:
        return f"<Fleet on {self._store!r}>"

    async def add(self, user_ids: Iterable[str], *, interval: float | None = None) -> int:
        """Add accounts, due immediately, and set the interval of accounts already in the fleet.

        Idempotent. Returns the number of new accounts.

        Args:
            user_ids: The accounts.
            interval: Seconds between two synchronizations. None for the fleet's ``interval``.
        """
        if interval is not None and not is_seconds(interval):
            raise ConfigurationError(f"interval={interval!r}: it must be a number of seconds above 0")
        async with self._open_store():
            return await self._schedule.add(_ids(user_ids), interval or self._interval)

    async def remove(self, user_ids: Iterable[str]) -> int:
        """Remove accounts from the fleet but keep their data. Returns the number removed.

        Args:
            user_ids: The accounts.
        """
        async with self._open_store():
            return await self._schedule.remove(_ids(user_ids))

    async def pause(self, user_ids: Iterable[str]) -> int:
        """Pause accounts. A running turn ends as usual. Returns how many of them are in the fleet.

        Args:
            user_ids: The accounts.
        """
        async with self._open_store():
            return await self._schedule.pause(_ids(user_ids))

    async def resume(self, user_ids: Iterable[str]) -> int:
        """Resume paused accounts, due immediately. Returns how many of them were paused.

        Args:
            user_ids: The accounts.
        """
        async with self._open_store():
            return await self._schedule.resume(_ids(user_ids))

    async def wake(self, user_ids: Iterable[str]) -> int:
        """Synchronize accounts now, ahead of due ones. Returns how many of them are in the fleet.

        Args:
            user_ids: The accounts.
        """
        async with self.waker() as waker:
            return await waker.wake_many(user_ids)

    @asynccontextmanager
    async def waker(self) -> AsyncGenerator[FleetWaker]:
        """Provide a waker for the length of the block, for example for a ``WebhookReceiver``."""
        async with self._open_store(), self._connect_queue() as queue:
            yield FleetWaker(self._schedule, queue)

    async def status(self) -> FleetStatus:
        """Return the fleet's workload and backlog."""
        async with self._open_store(), self._connect_queue() as queue:
            return await self._status(queue)

    async def _status(self, queue: Queue | None) -> FleetStatus:
        queued = workers = None
        if queue is not None:
            try:
                queued, workers = await queue.depth(), await queue.workers()
            except EngineError as error:
                logger.warning("%s", error)
        known = await self._schedule.status()
        return FleetStatus(**attrs.asdict(known), queued=queued, workers=workers)

    async def _sample(self, queue: Queue) -> events.FleetSampled:
        return events.FleetSampled(await self._status(queue))

    @asynccontextmanager
    async def _open_store(self) -> AsyncGenerator[None]:
        """Keep the store open while anything in this process uses it."""
        self._store_users += 1
        try:
            yield
        finally:
            self._store_users -= 1
            if not self._store_users:
                with anyio.CancelScope(shield=True):
                    await self._store.aclose()

    @asynccontextmanager
    async def _connect_queue(self) -> AsyncGenerator[Queue | None]:
        """Connect to the queue; yield None if it is unreachable, because the database is authoritative."""
        async with AsyncExitStack() as stack:
            queue: Queue | None = None
            try:
                queue = await stack.enter_async_context(self._engine.connect())
            except EngineError as error:
                logger.warning("%s", error)
            yield queue

    # ----------------------------------------------------------------------- a worker

    async def run(self, concurrency: int = 16) -> None:
        """Run a worker until SIGTERM, SIGINT or cancellation.

        After a signal, running turns have ``grace`` seconds to finish; then their accounts are released and
        due immediately. A second signal or a cancellation does so without waiting. If the queue or the
        database is unreachable, the worker logs it and retries with increasing delays. Signals are
        handled in the main thread only.

        Args:
            concurrency: The maximum number of concurrent turns.
        """
        if not (is_whole(concurrency) and concurrency >= 1):
            raise ConfigurationError(f"concurrency={concurrency!r}: it must be a whole number, at least 1")
        lemcal = self._lemcal or AsyncLemcal.for_accounts()
        try:
            async with self._open_store():
                options = attrs.evolve(self._options, max_concurrency=concurrency)
                turns = Turns(self._store, lemcal, self._credentials, options)
                worker = FleetWorker(
                    self._engine,
                    self._schedule,
                    turns,
                    concurrency=concurrency,
                    grace=self._grace,
                    sample=self._sample,
                )
                await worker.run()
        finally:
            if self._lemcal is None:
                with anyio.CancelScope(shield=True):
                    await lemcal.aclose()


def _ids(user_ids: Iterable[str]) -> list[str]:
    if _is_text(user_ids):
        raise ConfigurationError(f"pass a list of user ids, such as [{user_ids!r}]")
    ids = list(dict.fromkeys(user_ids))
    for user_id in ids:
        if not is_user_id(user_id):
            shown = re.sub(":.*", ":***", repr(user_id))  # what follows a colon may be an API key
            raise ConfigurationError(
                f"{shown} is not a user id: it must be a string that starts with 'usr_' and has no spaces or "
                "colons"
            )
    return ids


def _create_engine(url: Secret[str], name: str) -> Engine:
    scheme = urlsplit(url.reveal()).scheme if _is_text(url.reveal()) else ""
    if scheme == "memory":
        return MemoryEngine()
    if scheme not in {"redis", "rediss", "unix"}:
        raise ConfigurationError("queue= must be a URL such as redis://host:6379, or memory://")
    from lemcal_async.fleet._streaq import StreaqEngine  # noqa: PLC0415  # needs streaQ

    return StreaqEngine(url, name)


def _queue_name(store_url: Secret[str]) -> str:
    """Return the queue's name: the same for all workers of a database, and without secrets."""
    parts = urlsplit(store_url.reveal())
    database = f"{parts.hostname}:{parts.port}{parts.path}"
    return f"lemcal-{blake2b(database.encode(), digest_size=6).hexdigest()}"


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)
