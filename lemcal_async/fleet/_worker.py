"""A worker's life: keeping the queue filled with what is due, taking turns, ending well."""

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

_LOOK_EVERY: Final = 0.5  # seconds between two looks for what is due, if no turn ends in between
_LOOK_AT_LEAST: Final = 0.02  # seconds between two looks in any case
_FIRST_PAUSE: Final = 0.5  # seconds before a queue that has failed is tried again, then twice as long
_LONGEST_PAUSE: Final = 30.0
_LARGEST_BATCH: Final = 8  # turns
_BATCH_SECONDS: Final = 1.0  # that the turns of a batch may take, about
_REPORT_EVERY: Final = 15.0  # seconds between two FleetSampled events of a worker


class FleetWorker:
    """One worker: it looks for what is due, takes turns, and ends."""

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
        self._take_sample = sample
        self._stop = anyio.Event()
        self._ended = anyio.Event()
        self._look = anyio.Event()
        self._sample_at = 0.0
        self._batches_ended = 0  # since the last look
        turns.on_ended = self._batch_ended

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
                logger.info("%s: %d turns have %.3g s to finish", number.name, len(self._turns), self._grace)
                self._stop.set()

    async def _serve(self) -> None:
        """Take turns until told to stop, whatever becomes of the queue meanwhile. Ends by itself."""
        try:
            with anyio.CancelScope(shield=True):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._dispatch)
                    tasks.start_soon(self._end_in_time)
                    tasks.start_soon(self._turns.renew_leases)
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
        self._turns.stop()
        await anyio.sleep(self._grace)
        self._turns.cancel()

    def _batch_ended(self) -> None:
        """Look for more when as many batches have ended as go at once: as many again are in the queue."""
        self._batches_ended += 1
        if self._batches_ended >= self._concurrency or not len(self._turns):
            self._batches_ended = 0
            self._look.set()

    async def _dispatch(self) -> None:
        """Keep the queue short and never empty: claim what is due whenever turns have ended."""
        pause = _FIRST_PAUSE
        while not self._stop.is_set():
            try:
                async with self._engine.connect() as queue:
                    while not self._stop.is_set():
                        await self._fill(queue)
                        await self._sample(queue)
                        pause = _FIRST_PAUSE
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
            # A queue costs more than a short turn: so long as turns are short, several go together.
            size = min(_LARGEST_BATCH, max(1, int(_BATCH_SECONDS / self._turns.seconds_each)))
            due = await self._schedule.claim(limit=room * size)
            if due:
                try:
                    await queue.put(_batches(due, room))
                except EngineError:
                    await self._schedule.unclaim(due)
                    raise
            if len(due) < room * size:
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
            events.emit(await self._take_sample(queue))


def _batches(due: list[Due], count: int) -> list[list[Turn]]:
    """Divide what is due into so many batches at most; who was woken waits for nobody."""
    woken = [[Turn(each.user_id)] for each in due if each.wanted]
    swept = [Turn(each.user_id, each.due_at) for each in due if not each.wanted]
    size = -(-len(swept) // count)
    return woken + [swept[start : start + size] for start in range(0, len(swept), size or 1)]
