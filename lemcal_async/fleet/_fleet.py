"""``Fleet``: what users hold, and a worker's life: dispatching what is due, taking turns, ending well."""

import logging
import signal
from collections.abc import AsyncGenerator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from hashlib import blake2b
from threading import current_thread, main_thread
from typing import Any, Final
from urllib.parse import urlsplit

import anyio
import attrs

from lemcal_async import events
from lemcal_async._auth import Secret
from lemcal_async._client import AsyncLemcal
from lemcal_async.errors import ConfigurationError, StoreError
from lemcal_async.fleet._engine import Engine, EngineError, MemoryEngine, Queue, Turn
from lemcal_async.fleet._turns import Credentials, Turns
from lemcal_async.fleet._waker import FleetWaker
from lemcal_async.sync import SQLStore
from lemcal_async.sync._delivery import OnChange, OnChanges

logger = logging.getLogger("lemcal_async.fleet")

_LOOK_EVERY: Final = 0.5  # seconds between two looks for what is due, if no turn ends in between
_LOOK_AT_LEAST: Final = 0.02  # seconds between two looks in any case
_FIRST_PAUSE: Final = 0.5  # seconds before a queue that has failed is tried again, then twice as long
_LONGEST_PAUSE: Final = 30.0
_REPORT_EVERY: Final = 15.0  # seconds between two FleetSampled events of a worker


@attrs.frozen
class FleetStatus:
    """What a fleet has to do, and how far behind it is.

    ``accounts`` are all; ``due`` those whose time has come, for ``oldest_due`` seconds at most; ``queued``
    the turns in the queue and ``running`` those under way; ``failing`` the accounts whose last turn failed;
    ``paused`` those that rest. ``undelivered`` changes wait for their handler, for ``oldest_undelivered``
    seconds at most; ``parked`` ones wait for ``retry_parked()``. ``queued`` and ``workers`` are None while
    the queue cannot be reached.
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


class Fleet:
    """Accounts that are synchronized by any number of workers, on any number of machines.

    ``store`` is the URL of the database (PostgreSQL for several machines), ``queue`` that of a Redis (7 or
    later) or Valkey; ``memory://`` is for a fleet of one process, as in tests. Every account is synchronized
    each ``interval`` seconds, unless it was added with another one. ``credentials`` is an async function
    from a user id to the account's API key: keys are neither stored nor queued.

    ``on_change`` is called with each change, ``on_changes`` with lists of an account's changes: in order per
    account, at least once, and without doubles unless a worker dies. What it raises backs the account off,
    and after ``max_attempts`` the change is parked. ``lemcal`` is the client whose transport, limiter and
    options the accounts share (closed by the caller), else one of the fleet's own.

    Made before any event loop runs; everything but ``waker()`` connects for itself. Its methods raise
    StoreError if the database fails, ConfigurationError for arguments that cannot work.
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
        max_attempts: int = 20,
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
        self._interval = float(interval)
        self._grace = grace
        self._credentials = credentials
        self._handlers: dict[str, Any] = {
            "on_change": on_change,
            "on_changes": on_changes,
            "max_attempts": max_attempts,
        }
        self._lemcal = lemcal
        self._store = SQLStore(self._store_url.reveal())
        self._schedule = self._store.schedule()
        self._users = 0  # of the store, in this process
        self._engine = _engine_at(queue_url, _name_of(self._store_url))

    def __repr__(self) -> str:
        return f"<Fleet on {self._store!r}>"

    async def add(self, user_ids: Iterable[str], *, interval: float | None = None) -> int:
        """Add accounts, due at once, or give those that are there another interval (seconds).

        Idempotent. Returns how many are new.
        """
        async with self._opened():
            return await self._schedule.add(_ids(user_ids), self._interval if interval is None else interval)

    async def remove(self, user_ids: Iterable[str]) -> int:
        """Take accounts out of the fleet; their data stays. Returns how many were in it."""
        async with self._opened():
            return await self._schedule.remove(_ids(user_ids))

    async def pause(self, user_ids: Iterable[str]) -> int:
        """Let accounts rest. A turn under way ends as usual. Returns how many are in the fleet."""
        async with self._opened():
            return await self._schedule.pause(_ids(user_ids))

    async def resume(self, user_ids: Iterable[str]) -> int:
        """Let paused accounts go on, due at once. Returns how many were paused."""
        async with self._opened():
            return await self._schedule.resume(_ids(user_ids))

    async def wake(self, user_ids: Iterable[str]) -> int:
        """Have accounts synchronized now, before all that are only due. Returns how many are in the fleet."""
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
        """Be a worker, with so many turns at once, until SIGTERM, SIGINT or a cancellation.

        At a signal the turns under way have ``grace`` seconds to end; then their accounts are given back, due
        at once. Canceled, that happens immediately. A queue or a database that is away is tried again, with
        a growing pause, and logged. Signals are seen in the main thread only.
        """
        if not _is_count(concurrency):
            raise ConfigurationError(f"concurrency={concurrency!r}: it must be a whole number, at least 1")
        lemcal = self._lemcal or AsyncLemcal.for_accounts()
        try:
            async with self._opened():
                await _Worker(self, lemcal, concurrency).live()
        finally:
            if self._lemcal is None:
                with anyio.CancelScope(shield=True):
                    await lemcal.aclose()


class _Worker:
    """One worker: it looks for what is due, takes turns, and ends."""

    def __init__(self, fleet: Fleet, lemcal: AsyncLemcal, concurrency: int) -> None:
        self._fleet = fleet
        self._concurrency = concurrency
        self._stop = anyio.Event()
        self._ended = anyio.Event()
        self._look = anyio.Event()
        self._sample_at = 0.0
        self._turns_ended = 0  # since the last look
        self._engine = fleet._engine  # noqa: SLF001  # one class in two parts
        self._schedule = fleet._schedule  # noqa: SLF001
        self._turns = Turns(fleet._store, lemcal, credentials=fleet._credentials, **fleet._handlers)  # noqa: SLF001
        self._turns.on_ended = self._turn_ended

    async def live(self) -> None:
        """Work until it is to end."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch_signals)
            tasks.start_soon(self._serve)
            try:
                await self._ended.wait()
            except anyio.get_cancelled_exc_class():
                self._stop.set()
                self._turns.cancel()
                with anyio.CancelScope(shield=True):
                    await self._ended.wait()
                raise
            tasks.cancel_scope.cancel()

    async def _watch_signals(self) -> None:
        if current_thread() is not main_thread():
            return
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                if self._stop.is_set():  # the second one: now
                    self._turns.cancel()
                    continue
                grace = self._fleet._grace  # noqa: SLF001
                logger.info("%s: %d turns have %.3g s to end", number.name, len(self._turns), grace)
                self._stop.set()

    async def _serve(self) -> None:
        """Take turns until told to stop, whatever becomes of the queue meanwhile. Ends by itself."""
        try:
            with anyio.CancelScope(shield=True):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._dispatch)
                    tasks.start_soon(self._end_in_time)
                    await self._take_turns()
                    tasks.cancel_scope.cancel()
        finally:
            self._ended.set()

    async def _take_turns(self) -> None:
        pause = _FIRST_PAUSE
        while not self._stop.is_set():
            began = anyio.current_time()
            try:
                await self._engine.run(self._turns.take, concurrency=self._concurrency, stop=self._stop)
            except EngineError as error:
                if anyio.current_time() - began > _LONGEST_PAUSE:
                    pause = _FIRST_PAUSE
                logger.warning("%s; the worker goes on in %.3g s", error, pause)
                with anyio.move_on_after(pause):
                    await self._stop.wait()
                pause = min(2 * pause, _LONGEST_PAUSE)

    async def _end_in_time(self) -> None:
        await self._stop.wait()
        await anyio.sleep(self._fleet._grace)  # noqa: SLF001
        self._turns.cancel()

    def _turn_ended(self) -> None:
        """Look for more when as many turns have ended as go at once: as many again are in the queue."""
        self._turns_ended += 1
        if self._turns_ended >= self._concurrency or not len(self._turns):
            self._turns_ended = 0
            self._look.set()

    async def _dispatch(self) -> None:
        """Keep the queue short and never empty: claim what is due whenever turns have ended."""
        pause = _FIRST_PAUSE
        while not self._stop.is_set():
            try:
                async with self._engine.connect() as queue:
                    pause = _FIRST_PAUSE
                    while not self._stop.is_set():
                        await self._fill(queue)
                        await self._sample(queue)
                        await self._wait_for_news()
            except (EngineError, StoreError) as error:
                logger.warning("looking for accounts that are due failed, again in %.3g s: %s", pause, error)
                with anyio.move_on_after(pause):
                    await self._stop.wait()
                pause = min(2 * pause, _LONGEST_PAUSE)

    async def _fill(self, queue: Queue) -> None:
        while not self._stop.is_set():
            # Twice as many, because what a worker had fetched when it died stays in the queue for a minute.
            room = 2 * self._concurrency - await queue.depth()
            if room <= 0:
                return
            due = await self._schedule.claim(limit=room)
            if due:
                try:
                    await queue.put(
                        [Turn(each.user_id, None if each.wanted else each.due_at) for each in due]
                    )
                except EngineError:
                    await self._schedule.unclaim(due)
                    raise
            if len(due) < room:
                return

    async def _wait_for_news(self) -> None:
        await anyio.sleep(_LOOK_AT_LEAST)
        with anyio.move_on_after(_LOOK_EVERY):
            await self._look.wait()
        if self._look.is_set():
            self._look = anyio.Event()

    async def _sample(self, queue: Queue) -> None:
        """Tell listeners how the fleet is, now and then."""
        if events.wanted() and anyio.current_time() >= self._sample_at:
            self._sample_at = anyio.current_time() + _REPORT_EVERY
            status = await self._fleet._status(queue)  # noqa: SLF001
            events.emit(events.FleetSampled(**attrs.asdict(status)))


def _ids(user_ids: Iterable[str]) -> list[str]:
    if isinstance(user_ids, str):
        raise ConfigurationError(f"pass a list of user ids, such as [{user_ids!r}]")
    ids = list(dict.fromkeys(user_ids))
    for user_id in ids:
        if not _is_text(user_id):
            raise ConfigurationError(f"{user_id!r} is not a user id: it must be a string such as 'usr_…'")
    return ids


def _engine_at(url: Secret[str], name: str) -> Engine:
    scheme = urlsplit(url.reveal()).scheme if isinstance(url.reveal(), str) else ""
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
