"""``watch``: repeated synchronization with jitter, backoff for failing accounts, and wake-ups.

``Wake`` lets a webhook, a button or another thread request an immediate synchronization. It takes no lock,
because an event loop must not wait for a thread: all shared state consists of built-in types whose
operations are atomic.
"""

import inspect
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NoReturn, TypeAlias

import anyio

from lemcal_async._callbacks import call, no_foreign_cancellation
from lemcal_async._checks import is_seconds
from lemcal_async._client import AsyncLemcal
from lemcal_async._concurrency import Wakeup
from lemcal_async.errors import ConfigurationError
from lemcal_async.sync._delivery import OnChange, OnChanges
from lemcal_async.sync._report import SyncReport
from lemcal_async.sync._runner import Runner, SyncOptions, check_accounts, check_function
from lemcal_async.sync._store import Store

_FOREVER: Final = 3600.0


class Wake:
    """Wakes the ``watch`` that it was passed to. Can be created anywhere, before any event loop runs.

    ``wake`` may be called from any thread and event loop; it returns immediately and never fails. A wake-up
    that arrives while its account is being synchronized triggers another run of the account. A wake-up that
    arrives while no ``watch`` is running is discarded, because ``watch`` starts with all accounts.
    """

    def __init__(self) -> None:
        self._listeners: dict[int, WakeListener] = {}

    def wake(self, user_id: str | None = None) -> None:
        """Request an immediate synchronization.

        Args:
            user_id: The account's user id; None for all accounts.
        """
        for listener in list(self._listeners.values()):
            listener.add(user_id)

    @contextmanager
    def listen(self) -> Generator["WakeListener"]:
        """Register a listener for the block. Call this in the event loop that waits for wake-ups."""
        listener = WakeListener()
        self._listeners[id(listener)] = listener
        try:
            yield listener
        finally:
            del self._listeners[id(listener)]


class WakeListener:
    """The pending wake-ups of one ``watch``."""

    def __init__(self) -> None:
        self._pending: deque[str | None] = deque()
        self._wakeup = Wakeup()

    def add(self, user_id: str | None) -> None:
        """Queue a wake-up and wake the waiting task."""
        self._pending.append(user_id)
        self._wakeup.wake()

    async def wait(self) -> set[str | None]:
        """Wait for wake-ups and return their accounts; None in the set means all accounts."""
        while True:
            self._wakeup.rearm()  # first, so that later additions wake this task again
            woken: set[str | None] = set()
            while self._pending:
                woken.add(self._pending.popleft())
            if woken:
                return woken
            await self._wakeup.wait(_FOREVER)


Accounts: TypeAlias = Iterable[AsyncLemcal] | Callable[[], Iterable[AsyncLemcal]]
"""Clients, or a function that returns the current clients."""

OnReport: TypeAlias = Callable[[SyncReport], Awaitable[Any] | Any]
"""Called with the report of every run: an async function, or a plain one, which runs in a worker thread."""

JITTER: Final = 0.1
"""The fraction by which an interval varies, so that programs do not all run at the same moment."""

MAX_BACKOFF: Final = 3600.0  # seconds


async def watch(
    accounts: Accounts,
    store: Store,
    *,
    interval: float,
    on_change: OnChange | None = None,
    on_changes: OnChanges | None = None,
    wake: Wake | None = None,
    on_report: OnReport | None = None,
    max_concurrency: int = 16,
    max_attempts: int = 50,
    baseline: bool = False,
    confirm_empty_after: int = 2,
) -> NoReturn:
    """Run ``sync_meetings`` immediately and then every ``interval`` seconds, until canceled.

    A failing account is skipped for twice as long after each failure, up to an hour, and at least for as long
    as the service requests. If only a handler fails, the next run includes the account as usual. A failure is
    logged the first time, and whenever its cause changes.

    Exceptions from ``accounts`` and ``on_report`` propagate.

    Args:
        accounts: A list of clients, or a function that returns the current clients. Every run iterates over
            them again.
        store: As for ``sync_meetings``.
        interval: Seconds between two runs, plus or minus 10 %.
        on_change: As for ``sync_meetings``.
        on_changes: As for ``sync_meetings``.
        wake: Triggers an immediate synchronization of one account or of all, including failing ones, even
            while a run is in progress.
        on_report: Called with the report of every run. Async, or a plain function, which runs in a worker
            thread.
        max_concurrency: As for ``sync_meetings``.
        max_attempts: As for ``sync_meetings``.
        baseline: As for ``sync_meetings``.
        confirm_empty_after: As for ``sync_meetings``.

    Raises:
        ConfigurationError: If an argument is invalid.
    """
    options = SyncOptions(max_concurrency, on_change, on_changes, max_attempts, baseline, confirm_empty_after)
    _check(accounts, interval, wake, on_report)
    watching = _Watch(accounts, Runner(store, options), interval, on_report)
    with (Wake() if wake is None else wake).listen() as listener:
        failure: Exception | None = None
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watching.handle_wakes, listener)
                await watching.repeat()
        except* Exception as group:  # noqa: BLE001  # an exception of the caller's functions, raised unchanged
            failure = _first(group)
    assert failure is not None  # noqa: S101  # the task group only ends with an error
    raise failure


def _check(accounts: object, interval: object, wake: object, on_report: object) -> None:
    if not is_seconds(interval):
        raise ConfigurationError(f"interval={interval!r}: it must be a number of seconds above 0")
    if isinstance(accounts, Iterator):
        raise ConfigurationError(
            "accounts= can be iterated over only once: pass a list, or a function that returns the accounts"
        )
    if not callable(accounts):
        check_accounts(accounts)
    if wake is not None and not isinstance(wake, Wake):
        raise ConfigurationError(f"wake= must be a Wake(), not {type(wake).__name__}")
    check_function("on_report", on_report, "report")


def backoff(interval: float, failures: int, retry_after: float = 0.0) -> float:
    """Return for how many seconds to skip an account after this many consecutive failures."""
    return max(min(interval * 2.0 ** min(failures, 30), max(MAX_BACKOFF, interval)), retry_after)


class _Watch:
    def __init__(
        self, accounts: Accounts, runner: Runner, interval: float, on_report: OnReport | None
    ) -> None:
        self._accounts = accounts
        self._runner = runner
        self._interval = interval
        self._on_report = on_report
        self._threads = anyio.CapacityLimiter(1)
        self._failing: dict[str, tuple[int, float]] = {}  # consecutive failures, and until when to skip it

    async def repeat(self) -> None:
        """Run all due accounts, repeatedly."""
        while True:
            await self._run(self._is_due)
            await anyio.sleep(self._interval * random.uniform(1 - JITTER, 1 + JITTER))  # noqa: S311  # no secret

    async def handle_wakes(self, listener: WakeListener) -> None:
        """Run the accounts that are woken."""
        while True:
            woken = await listener.wait()
            await self._run(lambda user_id, woken=woken: bool({None, user_id} & woken))  # type: ignore[misc]

    def _is_due(self, user_id: str | None) -> bool:
        # Slightly early counts as due, because the jitter shortens some intervals.
        _, until = self._failing.get(user_id or "", (0, -math.inf))
        return until - self._interval * JITTER * 2 <= anyio.current_time()

    async def _run(self, is_selected: Callable[[str | None], bool]) -> None:
        seen: set[str] = set()
        report = await self._runner.run(self._select(is_selected, seen))
        self._back_off(report, seen)
        if self._on_report is not None:
            await call(self._on_report, report, self._threads)

    def _back_off(self, report: SyncReport, seen: set[str]) -> None:
        # A failing handler is no reason to skip the account: the next run fetches it as usual.
        failed = {failure.user_id: failure for failure in report.failures if failure.stage != "delivery"}
        for succeeded in seen - failed.keys():
            self._failing.pop(succeeded, None)
        for user_id, failure in failed.items():
            if user_id is not None:
                failures = self._failing.get(user_id, (0, 0.0))[0] + 1
                retry_after = getattr(failure.error, "retry_after", None) or 0.0
                seconds = backoff(self._interval, failures, retry_after)
                self._failing[user_id] = (failures, anyio.current_time() + seconds)

    def _select(self, is_selected: Callable[[str | None], bool], seen: set[str]) -> Iterator[AsyncLemcal]:
        accounts = self._accounts
        if callable(accounts):
            accounts = accounts()
            if inspect.iscoroutine(accounts):
                accounts.close()
                raise ConfigurationError("accounts= must be a plain function, not an async one")
            check_accounts(accounts)
        for lemcal in accounts:
            try:
                with no_foreign_cancellation():
                    user_id = lemcal.user_id
            except Exception:  # noqa: BLE001  # the run raises it again and reports it
                yield lemcal
                continue
            if is_selected(user_id):
                seen.add(user_id)
                yield lemcal


def _first(group: BaseExceptionGroup[Exception]) -> Exception:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)  # noqa: S101  # the group contains nothing else
    return error
