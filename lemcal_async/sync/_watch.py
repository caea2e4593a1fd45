"""``watch``: synchronize again and again, with jitter, back-off for failing accounts, and wake-ups.

``Wake`` is what a webhook, a button or another thread holds to have an account synchronized now. It takes
no lock, because an event loop must not wait for a thread: all shared state is built-in types whose single
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

from lemcal_async._client import AsyncLemcal
from lemcal_async._concurrency import Wakeup
from lemcal_async.errors import ConfigurationError
from lemcal_async.sync._runner import OnChange, Options, Runner, SyncReport
from lemcal_async.sync._store import Store

_FOREVER: Final = 3600.0


class Wake:
    """Made anywhere, before any event loop too; given to ``watch``, it lets others wake it.

    ``wake`` may be called from any thread and event loop, returns at once and never fails. A wake-up
    that comes while its account is being synchronised leads to another run of it. One that comes
    while nobody watches is not kept: ``watch`` begins with all accounts.
    """

    def __init__(self) -> None:
        self._listeners: dict[int, WakeListener] = {}

    def wake(self, user_id: str | None = None) -> None:
        """Have this account synchronised now, or all of them."""
        for listener in list(self._listeners.values()):
            listener.add(user_id)

    @contextmanager
    def listen(self) -> Generator["WakeListener"]:
        """Provide what receives the wake-ups of the block. In the event loop that waits for them."""
        listener = WakeListener()
        self._listeners[id(listener)] = listener
        try:
            yield listener
        finally:
            del self._listeners[id(listener)]


class WakeListener:
    """The wake-ups of one ``watch``."""

    def __init__(self) -> None:
        self._wanted: deque[str | None] = deque()
        self._wakeup = Wakeup()

    def add(self, user_id: str | None) -> None:
        """Note a wake-up, and wake."""
        self._wanted.append(user_id)
        self._wakeup.wake()

    async def wait(self) -> set[str | None]:
        """Wait for wake-ups, and return the accounts; None among them means all."""
        while True:
            self._wakeup.rearm()  # before the look: what comes after it wakes
            wanted: set[str | None] = set()
            while self._wanted:
                wanted.add(self._wanted.popleft())
            if wanted:
                return wanted
            await self._wakeup.wait(_FOREVER)


Accounts: TypeAlias = Iterable[AsyncLemcal] | Callable[[], Iterable[AsyncLemcal]]
OnReport: TypeAlias = Callable[[SyncReport], Awaitable[Any] | Any]

JITTER: Final = 0.1
"""The share by which an interval may be shorter or longer, so that programs do not run in step."""

LONGEST_BACKOFF: Final = 3600.0  # seconds


async def watch(
    accounts: Accounts,
    store: Store,
    *,
    interval: float,
    on_change: OnChange | None = None,
    wake: Wake | None = None,
    on_report: OnReport | None = None,
    max_concurrency: int = 16,
    baseline: bool = False,
    confirm_empty_after: int = 2,
) -> NoReturn:
    """Run ``sync_meetings`` now and every ``interval`` seconds (10 % more or less), until cancelled.

    ``accounts`` is gone over again in every run: a list, or a function that returns the accounts of
    the moment. One that fails is left out of the next runs, for twice as long each time, up to an hour,
    and for as long as the service asks. ``wake`` has an account, or all, synchronised at once, beside a run
    that is under way, and failing ones as well. ``on_report`` is called with the report of every run.

    What ``accounts`` and ``on_report`` raise passes through. Cancellation is that of ``sync_meetings``.
    """
    options = Options(max_concurrency, on_change, baseline, confirm_empty_after)
    if not 0 < interval < math.inf:
        raise ConfigurationError(f"interval={interval!r}: it must be seconds above 0")
    if isinstance(accounts, Iterator):
        raise ConfigurationError(
            "accounts= can be gone over only once: pass a list, or a function that returns the accounts"
        )
    watching = _Watch(accounts, Runner(store, options), interval, on_report)
    with (Wake() if wake is None else wake).listen() as listener:
        failure: Exception | None = None
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watching.answer, listener)
                await watching.repeat()
        except* Exception as group:  # noqa: BLE001  # what the caller's functions have raised, as it was
            failure = _first(group)
    assert failure is not None  # noqa: S101  # there is no other way out
    raise failure


def backoff(interval: float, failures: int, asked: float = 0.0) -> float:
    """Return the seconds for which an account is left alone after so many failures in a row."""
    return max(min(interval * 2.0 ** min(failures, 30), max(LONGEST_BACKOFF, interval)), asked)


class _Watch:
    def __init__(
        self, accounts: Accounts, runner: Runner, interval: float, on_report: OnReport | None
    ) -> None:
        self._accounts = accounts
        self._runner = runner
        self._interval = interval
        self._on_report = on_report
        self._failing: dict[str, tuple[int, float]] = {}  # failures in a row, and until when it is left alone

    async def repeat(self) -> None:
        """Run all accounts that are due, again and again."""
        while True:
            await self._run(self._due)
            await anyio.sleep(self._interval * random.uniform(1 - JITTER, 1 + JITTER))  # noqa: S311  # no secret

    async def answer(self, listener: WakeListener) -> None:
        """Run the accounts that somebody wakes."""
        while True:
            wanted = await listener.wait()
            await self._run(lambda user_id, wanted=wanted: bool({None, user_id} & wanted))  # type: ignore[misc]

    def _due(self, user_id: str | None) -> bool:
        # A little early counts as due: the jitter shortens some intervals.
        _, until = self._failing.get(user_id or "", (0, -math.inf))
        return until - self._interval * JITTER * 2 <= anyio.current_time()

    async def _run(self, chosen: Callable[[str | None], bool]) -> None:
        seen: set[str] = set()
        report = await self._runner.run(self._choose(chosen, seen))
        failed = {failure.user_id: failure for failure in report.failures if failure.user_id is not None}
        for user_id in seen - failed.keys():
            self._failing.pop(user_id, None)
        for user_id, failure in failed.items():
            failures = self._failing.get(user_id, (0, 0.0))[0] + 1
            asked = getattr(failure.error, "retry_after", None) or 0.0
            pause = backoff(self._interval, failures, asked)
            self._failing[user_id] = (failures, anyio.current_time() + pause)
        if self._on_report is not None:
            outcome = self._on_report(report)
            if inspect.isawaitable(outcome):
                await outcome

    def _choose(self, chosen: Callable[[str | None], bool], seen: set[str]) -> Iterator[AsyncLemcal]:
        for lemcal in self._accounts() if callable(self._accounts) else self._accounts:
            try:
                user_id = lemcal.user_id
            except Exception:  # noqa: BLE001  # the run meets it again, and reports it
                yield lemcal
                continue
            if chosen(user_id):
                seen.add(user_id)
                yield lemcal


def _first(group: BaseExceptionGroup[Exception]) -> Exception:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)  # noqa: S101  # a group of nothing else
    return error
