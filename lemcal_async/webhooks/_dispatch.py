"""Which meetings have been handled: what a memory is to the receiver, and the one it has by default.

MERGED [webhooks.handling] Handling a verified meeting once: who does it, for how long, and what becomes of the others.

Deliveries of a meeting that is being handled in this process wait for its outcome; those that reach
another process are sent away by the memory, to come again. A handler that fails, or takes too long,
has not handled the meeting. Across a crash the promise is at least once.
"""

import inspect
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import monotonic
from traceback import walk_tb
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import anyio
import anyio.to_thread
import attrs
from anyio.lowlevel import RunVar

from lemcal_async.errors import ConfigurationError
from lemcal_async.models import Meeting

Claim: TypeAlias = Literal["new", "busy", "done"]
"""Whether a meeting is ours to handle now, in somebody else's hands, or handled."""


@runtime_checkable
class Memory(Protocol):
    """Remembers which meetings of which account were handled, and which are being handled.

    What it raises counts as a failure of the handler: the delivery is to come again.
    """

    async def claim(self, user_id: str, meeting_id: str, lease: float) -> Claim:
        """Take a meeting to handle it, for ``lease`` seconds at most; or say who has it."""
        ...

    async def done(self, user_id: str, meeting_id: str) -> None:
        """Note that it was handled, for good."""
        ...

    async def release(self, user_id: str, meeting_id: str) -> None:
        """Give it back: it was not handled."""
        ...


class BoundedMemory:
    """A memory of one process: the last ``size`` meetings that were handled, and those that are being.

    A restart forgets them, so a delivery that comes again after it is handled again. About 300 bytes
    each. ``clock`` returns seconds.
    """

    def __init__(self, size: int = 10_000, *, clock: Callable[[], float] = monotonic) -> None:
        if size < 1:
            raise ConfigurationError(f"BoundedMemory(size={size!r}): it must be at least 1")
        self._size = size
        self._clock = clock
        self._done: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._claimed: dict[tuple[str, str], float] = {}  # until when; never more than are in work

    async def claim(self, user_id: str, meeting_id: str, lease: float) -> Claim:
        """Take a meeting; see ``Memory.claim``."""
        key = (user_id, meeting_id)
        now = self._clock()
        if key in self._done:
            self._done.move_to_end(key)
            return "done"
        if self._claimed.get(key, now) > now:
            return "busy"
        self._claimed[key] = now + lease
        return "new"

    async def done(self, user_id: str, meeting_id: str) -> None:
        """Note that it was handled; the one that was asked for longest ago is forgotten for it."""
        key = (user_id, meeting_id)
        self._claimed.pop(key, None)
        self._done[key] = None
        if len(self._done) > self._size:
            self._done.popitem(last=False)

    async def release(self, user_id: str, meeting_id: str) -> None:
        """Give it back."""
        self._claimed.pop((user_id, meeting_id), None)


logger = logging.getLogger("lemcal_async.webhooks")

MEMORY_TIME_LIMIT = 5.0  # seconds for each question to the memory
THREADS = 20  # for handlers that are plain functions; of their own, so that they hold up nobody else

Outcome: TypeAlias = Literal["handled", "repeated", "failed", "busy"]
"""What became of a delivery: handled now, or before, or not, or another process is at it."""


@attrs.define(eq=False)
class _Running:
    """A meeting that is being handled, for those who want to know how that ends."""

    handled: bool = False
    ended: anyio.Event = attrs.field(factory=anyio.Event)


class Handling:
    """Calls ``handler``, an async or a plain function, at most once at a time for each meeting."""

    def __init__(self, handler: Callable[..., object], memory: Memory, time_limit: float) -> None:
        self._handler = handler
        self._is_async = _is_async(handler)
        self._memory = memory
        self._time_limit = time_limit
        self._running: dict[tuple[str, str], _Running] = {}
        self._threads: RunVar[anyio.CapacityLimiter] = RunVar("lemcal_async.webhooks")  # per event loop

    async def handle(
        self, user_id: str, meeting: Meeting, arguments: tuple[Any, ...], late: Callable[[], Awaitable[None]]
    ) -> Outcome:
        """Have a meeting handled, unless it is already; ``late`` is awaited when the time is up.

        It returns when the handler has ended. One that runs in a thread cannot be stopped: ``late``
        tells the sender to come again, and its end is waited for all the same. Cancelled, an async
        handler is cancelled too; a thread is left alone, and the meeting is its own until its claim
        lapses.
        """
        key = (user_id, meeting.id)
        if running := self._running.get(key):
            await running.ended.wait()
            return "repeated" if running.handled else "failed"
        running = self._running[key] = _Running()
        try:
            return await self._claim_and_run(user_id, meeting, arguments, running, late)
        except Exception as error:  # noqa: BLE001 - of the memory
            logger.error("meeting %s: the memory failed: %s", meeting.id, place_of(error))  # noqa: TRY400
            return "failed"
        finally:
            del self._running[key]
            running.ended.set()

    async def _claim_and_run(
        self,
        user_id: str,
        meeting: Meeting,
        arguments: tuple[Any, ...],
        running: _Running,
        late: Callable[[], Awaitable[None]],
    ) -> Outcome:
        lease = self._time_limit + 2 * MEMORY_TIME_LIMIT
        with anyio.fail_after(MEMORY_TIME_LIMIT):
            claim: Claim = await self._memory.claim(user_id, meeting.id, lease)
        if claim != "new":
            running.handled = claim == "done"
            return "repeated" if claim == "done" else "busy"
        keep = not self._is_async  # a thread may finish its work, whatever becomes of us
        try:
            if self._is_async:
                handled = await self._await(meeting, lambda: self._handler(*arguments))
            else:
                handled = await self._run_in_thread(meeting, arguments, running, late)
            keep = handled
            if handled:
                with anyio.fail_after(MEMORY_TIME_LIMIT, shield=True):
                    await self._memory.done(user_id, meeting.id)
                running.handled = True
        finally:
            if not keep:
                await self._release(user_id, meeting)
        return "handled" if handled else "failed"

    async def _release(self, user_id: str, meeting: Meeting) -> None:
        """Give the meeting back; raises nothing, for there may be a cancellation under way."""
        with anyio.move_on_after(MEMORY_TIME_LIMIT, shield=True):
            try:
                await self._memory.release(user_id, meeting.id)
            except Exception as error:  # noqa: BLE001 - the claim lapses by itself
                logger.error("meeting %s: the memory failed: %s", meeting.id, place_of(error))  # noqa: TRY400

    async def _await(self, meeting: Meeting, call: Callable[[], Any]) -> bool:
        """Await what the handler returns, for so long at most; whether it succeeded."""
        with anyio.move_on_after(self._time_limit):
            try:
                await call()
            except Exception as error:  # noqa: BLE001 - whatever it is, the delivery is to come again
                _log_failure(meeting, error)
                return False
            return True
        self._log_late(meeting)
        return False

    async def _run_in_thread(
        self,
        meeting: Meeting,
        arguments: tuple[Any, ...],
        running: _Running,
        late: Callable[[], Awaitable[None]],
    ) -> bool:
        threads = self._threads.get(None)
        if threads is None:
            threads = anyio.CapacityLimiter(THREADS)
            self._threads.set(threads)
        returned: list[Any] = []
        ended = anyio.Event()

        def call() -> None:
            returned.append(self._handler(*arguments))  # trio lets no coroutine out of a thread by itself

        async def work() -> None:
            try:
                await anyio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=threads)
            except Exception as error:  # noqa: BLE001 - as above
                _log_failure(meeting, error)
            finally:
                ended.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work)
            with anyio.move_on_after(self._time_limit):
                await ended.wait()
            if not ended.is_set():
                self._log_late(meeting)
                running.ended.set()
                await late()
        if returned and inspect.isawaitable(returned[0]):  # a lambda around an async function, say
            return await self._await(meeting, lambda: returned[0])
        return bool(returned)

    def _log_late(self, meeting: Meeting) -> None:
        logger.error(
            "meeting %s: the handler takes longer than its limit of %.3g s", meeting.id, self._time_limit
        )


def _is_async(function: Callable[..., object]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _log_failure(meeting: Meeting, error: Exception) -> None:
    logger.error("meeting %s: the handler raised %s", meeting.id, place_of(error))


def place_of(error: BaseException) -> str:
    """Return what was raised and where, without its words: they may hold personal data."""
    where = ""
    for frame, line in walk_tb(error.__traceback__):
        where = f" at {Path(frame.f_code.co_filename).name}:{line}"
    return f"{type(error).__name__}{where}"
