"""``Fleet``: the accounts, their schedule, and the way to become a worker."""

import logging
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from hashlib import blake2b
from urllib.parse import urlsplit

import anyio
import attrs

from lemcal_async import events
from lemcal_async._auth import Secret
from lemcal_async._callbacks import problem_with_callback
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
    """What a fleet has to do, and how far behind it is.

    Attributes:
        accounts: All accounts.
        due: Accounts whose time has come.
        oldest_due: For how many seconds the first of them has been due; None if none is.
        queued: Batches in the queue, of up to 8 turns each; None while the queue cannot be reached.
        running: Turns under way.
        failing: Accounts whose last turn failed.
        paused: Accounts that rest.
        undelivered: Changes that wait for their handler.
        oldest_undelivered: For how many seconds the first of them has been waiting; None if none is.
        parked: Changes that wait for ``retry_parked()``.
        workers: The workers; None while the queue cannot be reached.
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
    """Has accounts synchronized now. ``WebhookReceiver(…, wake=…)`` takes one."""

    def __init__(self, schedule: Schedule, queue: Queue | None) -> None:
        self._schedule = schedule
        self._queue = queue

    async def wake(self, user_id: str | None = None) -> None:
        """Return when the wake-up is stored in the database: from then on it is not lost.

        Args:
            user_id: The account.

        Raises:
            ConfigurationError: If the account is not in the fleet, or None.
            StoreError: If the database fails.
        """
        if user_id is None:
            raise ConfigurationError("a fleet is woken account by account: wake(user_id)")
        if not await self.wake_many([user_id]):
            raise ConfigurationError(f"{user_id} is not in the fleet; fleet.add([{user_id!r}]) adds it")

    async def wake_many(self, user_ids: Sequence[str]) -> int:
        """Wake several accounts; return how many are in the fleet.

        Args:
            user_ids: The accounts.

        Raises:
            StoreError: If the database fails.
        """
        known = await self._schedule.wake(user_ids)
        if known and self._queue is not None:
            try:
                await self._queue.put([[Turn(user_id)] for user_id in user_ids])
            except EngineError as error:
                # It is in the database, and a worker that looks there finds it.
                logger.warning("wake-ups reach the workers half a second later: %s", error)
        return known


class Fleet:
    """Accounts that are synchronized by any number of workers, on any number of machines.

    Made before any event loop runs; everything but ``waker()`` connects for itself.

    Args:
        store: The URL of the database, PostgreSQL for several machines.
        queue: The URL of a Redis (7 or later) or Valkey; ``memory://`` is for a fleet of one process, as in
            tests.
        credentials: An async function from a user id to the account's API key: keys are neither stored nor
            queued.
        interval: Seconds between two synchronizations of an account, unless it was added with another
            interval.
        on_change: Called with each change: in order per account, at least once, and without doubles unless a
            worker dies. What it raises backs the account off.
        on_changes: Called with lists of an account's changes, in place of ``on_change``.
        max_attempts: How often the handler may raise for a change; then the change is parked.
        lemcal: The client whose transport, limiter and options the accounts share (closed by the caller),
            else one of the fleet's own.
        grace: Seconds that the turns under way have to end when a worker is stopped by a signal.

    Raises:
        ConfigurationError: For arguments that cannot work, also by its methods.
        StoreError: By its methods, if the database fails.
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
            if not _is_seconds(value):
                raise ConfigurationError(f"{name}={value!r}: it must be seconds above 0")
        if not callable(credentials):
            raise ConfigurationError("credentials= must be an async function from a user id to its API key")
        if problem := problem_with_callback("credentials", credentials, ("user_id",)):
            raise ConfigurationError(problem)
        self._interval = float(interval)
        self._grace = grace
        self._credentials = credentials
        self._options = SyncOptions(
            max_concurrency=1,  # a worker says how many
            on_change=on_change,
            on_changes=on_changes,
            max_attempts=max_attempts,
            baseline=False,
            confirm_empty_after=2,
        )
        self._lemcal = lemcal
        self._store = SQLStore(self._store_url.reveal())
        self._schedule = self._store.schedule()
        self._users = 0  # of the store, in this process
        self._engine = _engine_at(queue_url, _name_of(self._store_url))

    def __repr__(self) -> str:
        return f"<Fleet on {self._store!r}>"

    async def add(self, user_ids: Iterable[str], *, interval: float | None = None) -> int:
        """Add accounts, due at once, or give those that are there another interval.

        Idempotent. Returns how many are new.

        Args:
            user_ids: The accounts.
            interval: Seconds between two synchronizations; None for the fleet's.
        """
        if interval is not None and not _is_seconds(interval):
            raise ConfigurationError(f"interval={interval!r}: it must be seconds above 0")
        async with self._opened():
            return await self._schedule.add(_ids(user_ids), interval or self._interval)

    async def remove(self, user_ids: Iterable[str]) -> int:
        """Take accounts out of the fleet; their data stays. Returns how many were in it.

        Args:
            user_ids: The accounts.
        """
        async with self._opened():
            return await self._schedule.remove(_ids(user_ids))

    async def pause(self, user_ids: Iterable[str]) -> int:
        """Let accounts rest. A turn under way ends as usual. Returns how many are in the fleet.

        Args:
            user_ids: The accounts.
        """
        async with self._opened():
            return await self._schedule.pause(_ids(user_ids))

    async def resume(self, user_ids: Iterable[str]) -> int:
        """Let paused accounts go on, due at once. Returns how many were paused.

        Args:
            user_ids: The accounts.
        """
        async with self._opened():
            return await self._schedule.resume(_ids(user_ids))

    async def wake(self, user_ids: Iterable[str]) -> int:
        """Have accounts synchronized now, before all that are only due. Returns how many are in the fleet.

        Args:
            user_ids: The accounts.
        """
        async with self.waker() as waker:
            return await waker.wake_many(_ids(user_ids))

    @asynccontextmanager
    async def waker(self) -> AsyncGenerator[FleetWaker]:
        """Provide what wakes accounts for as long as the block lasts, as for a ``WebhookReceiver``."""
        async with self._opened(), self._connected() as queue:
            yield FleetWaker(self._schedule, queue)

    async def status(self) -> FleetStatus:
        """Return what there is to do."""
        async with self._opened(), self._connected() as queue:
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
    async def _opened(self) -> AsyncGenerator[None]:
        """Have the store open for as long as anybody here uses it."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                with anyio.CancelScope(shield=True):
                    await self._store.aclose()

    @asynccontextmanager
    async def _connected(self) -> AsyncGenerator[Queue | None]:
        """Connect to the queue; None if it is away, as the database knows all."""
        async with AsyncExitStack() as stack:
            queue: Queue | None = None
            try:
                queue = await stack.enter_async_context(self._engine.connect())
            except EngineError as error:
                logger.warning("%s", error)
            yield queue

    # ----------------------------------------------------------------------- a worker

    async def run(self, concurrency: int = 16) -> None:
        """Be a worker, until SIGTERM, SIGINT or a cancellation.

        At a signal the turns under way have ``grace`` seconds to end; then their accounts are given back, due
        at once. Canceled, that happens immediately. A queue or a database that is away is tried again, with a
        growing pause, and logged. Signals are seen in the main thread only.

        Args:
            concurrency: How many turns at once.
        """
        if not _is_count(concurrency):
            raise ConfigurationError(f"concurrency={concurrency!r}: it must be a whole number, at least 1")
        lemcal = self._lemcal or AsyncLemcal.for_accounts()
        try:
            async with self._opened():
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
                await worker.live()
        finally:
            if self._lemcal is None:
                with anyio.CancelScope(shield=True):
                    await lemcal.aclose()


def _ids(user_ids: Iterable[str]) -> list[str]:
    if _is_text(user_ids):
        raise ConfigurationError(f"pass a list of user ids, such as [{user_ids!r}]")
    ids = list(dict.fromkeys(user_ids))
    for user_id in ids:
        if not _is_text(user_id):
            raise ConfigurationError(f"{user_id!r} is not a user id: it must be a string such as 'usr_…'")
    return ids


def _engine_at(url: Secret[str], name: str) -> Engine:
    scheme = urlsplit(url.reveal()).scheme if _is_text(url.reveal()) else ""
    if scheme == "memory":
        return MemoryEngine()
    if scheme not in {"redis", "rediss", "unix"}:
        raise ConfigurationError("queue= must be a URL such as redis://host:6379, or memory://")
    from lemcal_async.fleet._streaq import StreaqEngine  # noqa: PLC0415  # it needs streaQ

    return StreaqEngine(url, name)


def _name_of(store_url: Secret[str]) -> str:
    """Return a name for the queue that is the same for all workers of one database, and holds no secret."""
    parts = urlsplit(store_url.reveal())
    place = f"{parts.hostname}:{parts.port}{parts.path}"
    return f"lemcal-{blake2b(place.encode(), digest_size=6).hexdigest()}"


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < float("inf")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 1


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)
