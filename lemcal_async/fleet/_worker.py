"""A worker: fills the queue with due accounts, takes turns, and shuts down gracefully."""

import logging
import signal
from collections.abc import Awaitable, Callable
from threading import current_thread, main_thread
from typing import Final

import anyio

from lemcal_async import events
from lemcal_async.errors import StoreError
from lemcal_async.fleet._engine import Engine, EngineError, Queue, Turn
from lemcal_async.fleet._turns import Turns
from lemcal_async.sync._schedule import Due, Schedule

logger = logging.getLogger("lemcal_async.fleet")

_POLL_INTERVAL: Final = 0.5  # seconds between two polls for due accounts, if no batch ends in between
_MIN_POLL_INTERVAL: Final = 0.02  # seconds
_INITIAL_DELAY: Final = 0.5  # seconds until the first retry after a failure; doubles each time
_MAX_DELAY: Final = 30.0
_MAX_BATCH_SIZE: Final = 8  # turns
_BATCH_SECONDS: Final = 1.0  # target duration of a batch
_SAMPLE_INTERVAL: Final = 15.0  # seconds between two FleetSampled events of a worker


class FleetWorker:
    """One worker: polls for due accounts and takes turns until it is stopped."""

    def __init__(
        self,
        engine: Engine,
        schedule: Schedule,
        turns: Turns,
        *,
        concurrency: int,
        grace: float,
        sample: Callable[[Queue], Awaitable[events.FleetSampled]],
    ) -> None:
        self._engine = engine
        self._schedule = schedule
        self._turns = turns
        self._concurrency = concurrency
        self._grace = grace
        self._get_sample = sample
        self._stop = anyio.Event()
        self._ended = anyio.Event()
        self._poll_now = anyio.Event()
        self._next_sample_at = 0.0
        self._next_attempt_at = 0.0  # at the queue, after a logged failure
        self._batches_ended = 0  # since the last poll
        turns.on_batch_ended = self._batch_ended

    async def run(self) -> None:
        """Work until a signal or a cancellation."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch_signals)
            tasks.start_soon(self._work)
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
                if self._stop.is_set():  # a second signal: stop immediately
                    self._turns.cancel()
                    continue
                if running := len(self._turns):
                    logger.info(
                        "%s: stopping; running turns: %d, which have %.3g s to finish",
                        number.name,
                        running,
                        self._grace,
                    )
                else:
                    logger.info("%s: stopping; no turns are running", number.name)
                self._stop.set()

    async def _work(self) -> None:
        """Take turns until stopped, even while the queue fails. Shielded from cancellation."""
        try:
            with anyio.CancelScope(shield=True):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._dispatch)
                    tasks.start_soon(self._cancel_after_grace)
                    tasks.start_soon(self._turns.renew_leases)
                    await self._take_turns()
                    tasks.cancel_scope.cancel()
        finally:
            self._ended.set()

    async def _take_turns(self) -> None:
        delay = _INITIAL_DELAY
        while not self._stop.is_set():
            began = anyio.current_time()
            try:
                await self._engine.run(self._turns.take, concurrency=self._concurrency, stop=self._stop)
            except EngineError as error:
                if anyio.current_time() - began > _MAX_DELAY:
                    delay = _INITIAL_DELAY
                self._log_queue_failure(error, delay)
                with anyio.move_on_after(delay):
                    await self._stop.wait()
                delay = min(2 * delay, _MAX_DELAY)

    def _log_queue_failure(self, error: EngineError, delay: float) -> None:
        """Log a failure of the queue once, although it affects both the taking and the queueing of turns."""
        now = anyio.current_time()
        if now >= self._next_attempt_at:
            self._next_attempt_at = now + delay
            logger.warning("%s; the worker retries in %.3g s", error, delay)

    async def _cancel_after_grace(self) -> None:
        await self._stop.wait()
        self._turns.stop()
        await anyio.sleep(self._grace)
        self._turns.cancel()

    def _batch_ended(self) -> None:
        """Poll once ``concurrency`` batches have ended: the queue still holds as many."""
        self._batches_ended += 1
        if self._batches_ended >= self._concurrency or not len(self._turns):
            self._batches_ended = 0
            self._poll_now.set()

    async def _dispatch(self) -> None:
        """Keep the queue short but never empty: claim due accounts whenever batches have ended."""
        delay = _INITIAL_DELAY
        while not self._stop.is_set():
            try:
                async with self._engine.connect() as queue:
                    while not self._stop.is_set():
                        await self._fill_queue(queue)
                        await self._emit_sample(queue)
                        delay = _INITIAL_DELAY
                        await self._wait_for_poll()
            except (EngineError, StoreError) as error:
                if isinstance(error, EngineError):
                    self._log_queue_failure(error, delay)
                else:
                    logger.warning("queueing due accounts failed; retrying in %.3g s: %s", delay, error)
                with anyio.move_on_after(delay):
                    await self._stop.wait()
                delay = min(2 * delay, _MAX_DELAY)

    async def _fill_queue(self, queue: Queue) -> None:
        while not self._stop.is_set():
            # Twice the concurrency, because the batches of a dead worker stay in the queue for a minute.
            room = 2 * self._concurrency - await queue.depth()
            if room <= 0:
                return
            # Queueing costs more than a short turn, so short turns are queued in batches.
            size = min(_MAX_BATCH_SIZE, max(1, int(_BATCH_SECONDS / self._turns.mean_seconds)))
            due = await self._schedule.claim(limit=room * size)
            if due:
                try:
                    await queue.put(_batches(due, room))
                except EngineError:
                    await self._schedule.unclaim(due)
                    raise
            if len(due) < room * size:
                return

    async def _wait_for_poll(self) -> None:
        await anyio.sleep(_MIN_POLL_INTERVAL)
        with anyio.move_on_after(_POLL_INTERVAL):
            await self._poll_now.wait()
        if self._poll_now.is_set():
            self._poll_now = anyio.Event()

    async def _emit_sample(self, queue: Queue) -> None:
        """Emit the fleet's status to subscribers every ``_SAMPLE_INTERVAL`` seconds."""
        if events.wanted() and anyio.current_time() >= self._next_sample_at:
            self._next_sample_at = anyio.current_time() + _SAMPLE_INTERVAL
            events.emit(await self._get_sample(queue))


def _batches(due: list[Due], count: int) -> list[list[Turn]]:
    """Divide due accounts into batches: one per woken account, and up to ``count`` for the others."""
    woken = [[Turn(each.user_id)] for each in due if each.wanted]
    scheduled = [Turn(each.user_id, each.due_at) for each in due if not each.wanted]
    size = -(-len(scheduled) // count)
    return woken + [scheduled[start : start + size] for start in range(0, len(scheduled), size or 1)]
