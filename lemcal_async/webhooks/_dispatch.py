"""Handling a verified meeting once: who does it, for how long, and what becomes of the other deliveries.

Deliveries of a meeting that is being handled in this process wait for its outcome; those that reach
another process are sent away by the deduplication, to come again. A handler that fails, or takes too
long, has not handled the meeting. Across a crash the promise is at least once.
"""

import inspect
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any, Final, Literal, Protocol, TypeAlias, runtime_checkable

import anyio
import anyio.to_thread
import attrs
from anyio.lowlevel import RunVar

from lemcal_async._callbacks import is_async, no_foreign_cancellation
from lemcal_async.errors import ConfigurationError
from lemcal_async.models import Meeting
from lemcal_async.webhooks._http import log_error, logger

DEDUP_TIMEOUT = 5.0
"""Seconds for each question to the deduplication."""
THREADS: Final = 20  # for handlers that are plain functions; of their own, so that they hold up nobody else

Claim: TypeAlias = Literal["new", "busy", "done"]
"""Whether a meeting is ours to handle now, in somebody else's hands, or handled."""


@runtime_checkable
class Dedup(Protocol):
    """Knows which meetings of which account were handled, and which are being handled.

    What it raises counts as a failure of the handler: the delivery is to come again.
    """

    async def claim(self, user_id: str, meeting_id: str, lease: float) -> Claim:
        """Take a meeting to handle it, or say who has it.

        Returns ``"new"`` if it is the caller's to handle, ``"busy"`` if it is another one's, whose lease has
        not ended, and ``"done"`` if it was handled.

        Args:
            user_id: The account.
            meeting_id: The meeting's id.
            lease: For how many seconds it is the caller's at most.
        """
        ...

    async def done(self, user_id: str, meeting_id: str) -> None:
        """Record that it was handled, for good.

        Args:
            user_id: The account.
            meeting_id: The meeting's id.
        """
        ...

    async def release(self, user_id: str, meeting_id: str) -> None:
        """Give it back: it was not handled.

        Args:
            user_id: The account.
            meeting_id: The meeting's id.
        """
        ...


class InMemoryDedup:
    """The deduplication of one process: the meetings that were handled last, and those under way.

    A restart forgets them, so a delivery that comes again after it is handled again. About 300 bytes each.

    Args:
        size: How many handled meetings are remembered.
        clock: What tells the time, in seconds.

    Raises:
        ConfigurationError: For a size below 1.
    """

    def __init__(self, size: int = 10_000, *, clock: Callable[[], float] = monotonic) -> None:
        if size < 1:
            raise ConfigurationError(f"InMemoryDedup(size={size!r}): it must be at least 1")
        self._size = size
        self._clock = clock
        self._done: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._claimed: dict[tuple[str, str], float] = {}  # until when; never more than are under way

    async def claim(self, user_id: str, meeting_id: str, lease: float) -> Claim:
        """Take a meeting; see ``Dedup.claim``."""
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
        """Record that it was handled; the one that was asked for longest ago is forgotten for it."""
        key = (user_id, meeting_id)
        self._claimed.pop(key, None)
        self._done[key] = None
        if len(self._done) > self._size:
            self._done.popitem(last=False)

    async def release(self, user_id: str, meeting_id: str) -> None:
        """Give it back."""
        self._claimed.pop((user_id, meeting_id), None)


Outcome: TypeAlias = Literal["handled", "repeated", "failed", "busy"]
"""What became of a delivery: handled now, or before, or not, or another process is at it."""

OnTimeout: TypeAlias = Callable[[], Awaitable[None]] | None
"""Awaited when a handler in a thread runs out of time, to answer the sender; None: nobody waits longer."""


@attrs.define(eq=False)
class _Running:
    """A meeting that is being handled, for those who want to know how that ends."""

    handled: bool = False
    ended: anyio.Event = attrs.field(factory=anyio.Event)


class Dispatcher:
    """Calls ``handler``, an async or a plain function, at most once at a time for each meeting."""

    def __init__(self, handler: Callable[..., object], dedup: Dedup, handler_timeout: float) -> None:
        self._handler = handler
        self._is_async = is_async(handler)
        self._dedup = dedup
        self._handler_timeout = handler_timeout
        self._running: dict[tuple[str, str], _Running] = {}
        self._threads: RunVar[anyio.CapacityLimiter] = RunVar("lemcal_async.webhooks")  # per event loop

    async def dispatch(
        self, user_id: str, meeting: Meeting, arguments: tuple[Any, ...], on_timeout: OnTimeout
    ) -> Outcome:
        """Have a meeting handled, unless it is already.

        It returns when the handler has ended. One that runs in a thread cannot be stopped: with
        ``on_timeout`` its end is waited for after the sender was told to come again, without it is
        abandoned. Canceled, an async handler is canceled too; a thread is left alone, and the meeting
        is its own until its claim lapses.
        """
        key = (user_id, meeting.id)
        if running := self._running.get(key):
            await running.ended.wait()
            return "repeated" if running.handled else "failed"
        running = self._running[key] = _Running()
        try:
            return await self._claim_and_run(user_id, meeting, arguments, running, on_timeout)
        except Exception as error:  # noqa: BLE001 - logged, and the delivery comes again
            log_error(error, "meeting %s: dedup= failed; the delivery is to come again", meeting.id)
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
        on_timeout: OnTimeout,
    ) -> Outcome:
        lease = self._handler_timeout + 2 * DEDUP_TIMEOUT
        with anyio.fail_after(DEDUP_TIMEOUT):
            claim: Claim = await self._dedup.claim(user_id, meeting.id, lease)
        if claim != "new":
            running.handled = claim == "done"
            return "repeated" if claim == "done" else "busy"
        keep = not self._is_async  # a thread may finish its work, whatever becomes of us
        handled: bool | None
        try:
            if self._is_async:
                handled = await self._await(meeting, lambda: self._handler(*arguments))
            else:
                handled = await self._run_in_thread(meeting, arguments, running, on_timeout)
            keep = handled is not False
            if handled:
                with anyio.fail_after(DEDUP_TIMEOUT, shield=True):
                    await self._dedup.done(user_id, meeting.id)
                running.handled = True
        finally:
            if not keep:
                await self._release(user_id, meeting)
        return "handled" if handled else "failed"

    async def _release(self, user_id: str, meeting: Meeting) -> None:
        """Give the meeting back; raises nothing, for there may be a cancellation under way."""
        with anyio.move_on_after(DEDUP_TIMEOUT, shield=True):
            try:
                await self._dedup.release(user_id, meeting.id)
            except Exception as error:  # noqa: BLE001 - logged; the claim lapses by itself
                log_error(error, "meeting %s: dedup= did not release it", meeting.id)

    async def _await(self, meeting: Meeting, call: Callable[[], Any]) -> bool:
        """Await what the handler returns, for so long at most; whether it succeeded."""
        with anyio.move_on_after(self._handler_timeout):
            try:
                with no_foreign_cancellation():
                    await call()
            except Exception as error:  # noqa: BLE001 - whatever it is, the delivery is to come again
                _log_failure(meeting, error)
                return False
            return True
        self._log_timeout(meeting)
        return False

    async def _run_in_thread(
        self,
        meeting: Meeting,
        arguments: tuple[Any, ...],
        running: _Running,
        on_timeout: OnTimeout,
    ) -> bool | None:
        """Whether the handler succeeded; None if it was left behind, and may still come to its end."""
        threads = self._threads.get(None)
        if threads is None:
            threads = anyio.CapacityLimiter(THREADS)
            self._threads.set(threads)
        returned: list[Any] = []
        ended = anyio.Event()

        def call() -> None:
            # The outcome is left in a list: trio lets no coroutine out of a thread, and a CancelledError
            # that the handler raises must not be taken for our own.
            try:
                returned.append(self._handler(*arguments))
            except BaseException as error:  # noqa: BLE001 - whatever it is, the delivery is to come again
                _log_failure(meeting, error)

        async def work() -> None:
            await anyio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=threads)
            ended.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work)
            with anyio.move_on_after(self._handler_timeout):
                await ended.wait()
            if not ended.is_set():
                self._log_timeout(meeting)
                running.ended.set()
                if on_timeout is None:
                    tasks.cancel_scope.cancel()
                else:
                    await on_timeout()
        if not ended.is_set():
            return None
        if returned and inspect.isawaitable(returned[0]):  # a lambda around an async function, say
            return await self._await(meeting, lambda: returned[0])
        return bool(returned)

    def _log_timeout(self, meeting: Meeting) -> None:
        logger.error(
            "meeting %s: on_meeting has not returned within handler_timeout=%.3g s; the delivery is to come "
            "again",
            meeting.id,
            self._handler_timeout,
        )


def _log_failure(meeting: Meeting, error: BaseException) -> None:
    log_error(error, "meeting %s: on_meeting failed; the delivery is to come again", meeting.id)
