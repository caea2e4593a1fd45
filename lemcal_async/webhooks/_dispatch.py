"""Calls the handler once per verified meeting, with a timeout, and deduplicates repeated deliveries.

Deliveries of a meeting that this process is handling wait for its outcome; deliveries that reach another
process get a 503, so that the sender retries. If a handler fails or times out, the meeting does not count as
handled. Across a crash, a meeting is handled at least once.
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
"""Timeout of each call to the deduplication, in seconds."""
THREADS: Final = 20  # for plain handlers, apart from anyio's default limit, so that they block no other work

Claim: TypeAlias = Literal["new", "busy", "done"]
"""The result of a claim: claimed by the caller, claimed by another process, or already handled."""


@runtime_checkable
class Dedup(Protocol):
    """Records which meetings of each account were handled, and which are being handled.

    Each call may take 5 seconds. An exception or a timeout counts as a handler failure: the sender should
    retry the delivery.
    """

    async def claim(self, user_id: str, meeting_id: str, lease: float) -> Claim:
        """Claim a meeting in order to handle it.

        Returns ``"new"`` if the caller now holds the claim, ``"busy"`` if another caller holds an unexpired
        claim, and ``"done"`` if the meeting was handled.

        Args:
            user_id: The account.
            meeting_id: The meeting's id.
            lease: Seconds until the claim expires: ``handler_timeout`` and ten more.
        """
        ...

    async def done(self, user_id: str, meeting_id: str) -> None:
        """Record permanently that the meeting was handled.

        Args:
            user_id: The account.
            meeting_id: The meeting's id.
        """
        ...

    async def release(self, user_id: str, meeting_id: str) -> None:
        """Release the claim: the meeting was not handled.

        Args:
            user_id: The account.
            meeting_id: The meeting's id.
        """
        ...


class InMemoryDedup:
    """Deduplication within one process: recently handled meetings and current claims.

    A restart clears it, so a meeting that is delivered again afterward is handled again. An entry takes about
    300 bytes.

    Args:
        size: The number of handled meetings to remember.
        clock: Returns the current time in seconds.

    Raises:
        ConfigurationError: If ``size`` is below 1.
    """

    def __init__(self, size: int = 10_000, *, clock: Callable[[], float] = monotonic) -> None:
        if size < 1:
            raise ConfigurationError(f"InMemoryDedup(size={size!r}): it must be at least 1")
        self._size = size
        self._clock = clock
        self._done: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._claimed: dict[tuple[str, str], float] = {}  # when each claim expires

    async def claim(self, user_id: str, meeting_id: str, lease: float) -> Claim:
        """Claim a meeting; see ``Dedup.claim``."""
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
        """Record that the meeting was handled, and evict the least recently used record if full."""
        key = (user_id, meeting_id)
        self._claimed.pop(key, None)
        self._done[key] = None
        if len(self._done) > self._size:
            self._done.popitem(last=False)

    async def release(self, user_id: str, meeting_id: str) -> None:
        """Release the claim."""
        self._claimed.pop((user_id, meeting_id), None)


Outcome: TypeAlias = Literal["handled", "repeated", "failed", "busy"]
"""Handled now, handled before, not handled, or being handled by another process."""

OnTimeout: TypeAlias = Callable[[], Awaitable[None]] | None
"""Awaited when a handler in a thread times out, to respond to the sender. None: the thread is abandoned."""


@attrs.define(eq=False)
class _Running:
    """A meeting that is being handled; other deliveries of it wait for ``ended``."""

    handled: bool = False
    ended: anyio.Event = attrs.field(factory=anyio.Event)


class Dispatcher:
    """Calls ``handler``, an async or a plain function, with at most one call per meeting at a time."""

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
        """Handle a meeting, unless it was handled before.

        Returns when the handler has ended. A handler in a thread cannot be stopped: with ``on_timeout`` the
        sender is asked to retry and the thread is awaited; without it, the thread is abandoned. Canceling
        this call cancels an async handler; a thread keeps running, and its claim stays until it expires.
        """
        key = (user_id, meeting.id)
        if running := self._running.get(key):
            await running.ended.wait()
            return "repeated" if running.handled else "failed"
        running = self._running[key] = _Running()
        try:
            return await self._claim_and_run(user_id, meeting, arguments, running, on_timeout)
        except Exception as error:  # noqa: BLE001 - logged, and the sender retries
            log_error(error, "meeting %s: dedup= failed; the sender should retry", meeting.id)
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
        keep_claim = not self._is_async  # after a cancellation, a thread may still finish its work
        handled: bool | None
        try:
            if self._is_async:
                handled = await self._await(meeting, lambda: self._handler(*arguments))
            else:
                handled = await self._run_in_thread(meeting, arguments, running, on_timeout)
            keep_claim = handled is not False
            if handled:
                with anyio.fail_after(DEDUP_TIMEOUT, shield=True):
                    await self._dedup.done(user_id, meeting.id)
                running.handled = True
        finally:
            if not keep_claim:
                await self._release(user_id, meeting)
        return "handled" if handled else "failed"

    async def _release(self, user_id: str, meeting: Meeting) -> None:
        """Release the claim without raising, because a cancellation may be propagating."""
        with anyio.move_on_after(DEDUP_TIMEOUT, shield=True):
            try:
                await self._dedup.release(user_id, meeting.id)
            except Exception as error:  # noqa: BLE001 - logged; the claim expires on its own
                log_error(error, "meeting %s: dedup= failed to release the claim", meeting.id)

    async def _await(self, meeting: Meeting, call: Callable[[], Any]) -> bool:
        """Await an async handler with its timeout; return whether it succeeded."""
        with anyio.move_on_after(self._handler_timeout):
            try:
                with no_foreign_cancellation():
                    await call()
            except Exception as error:  # noqa: BLE001 - logged, and the sender retries
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
        """Return whether the handler succeeded, or None if it was abandoned and may still finish."""
        threads = self._threads.get(None)
        if threads is None:
            threads = anyio.CapacityLimiter(THREADS)
            self._threads.set(threads)
        returned: list[Any] = []
        ended = anyio.Event()

        def call() -> None:
            # The result goes into a list, because trio does not return a coroutine from a thread, and a
            # CancelledError that the handler raises must not be mistaken for a cancellation of this task.
            try:
                returned.append(self._handler(*arguments))
            except BaseException as error:  # noqa: BLE001 - logged, and the sender retries
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
        if returned and inspect.isawaitable(returned[0]):  # such as a lambda that calls an async function
            return await self._await(meeting, lambda: returned[0])
        return bool(returned)

    def _log_timeout(self, meeting: Meeting) -> None:
        logger.error(
            "meeting %s: on_meeting did not return within handler_timeout=%.3g s; the sender should retry",
            meeting.id,
            self._handler_timeout,
        )


def _log_failure(meeting: Meeting, error: BaseException) -> None:
    log_error(error, "meeting %s: on_meeting failed; the sender should retry", meeting.id)
