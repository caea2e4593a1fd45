"""``watch``: regular runs, wake-ups, and backoff for failing accounts."""

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest

from lemcal_async import AsyncLemcal
from lemcal_async.errors import ConfigurationError
from lemcal_async.sandbox import faults
from lemcal_async.sync import Change, MemoryStore, SyncReport, Wake, watch
from lemcal_async.sync._watch import MAX_BACKOFF, backoff

pytestmark = pytest.mark.anyio

LONG = 3600.0
TIMEOUT = 20.0


class Reports:
    """The reports of a watch, and a way to wait for them."""

    def __init__(self) -> None:
        self.all: list[SyncReport] = []

    async def add(self, report: SyncReport) -> None:
        """Take a report, as an async handler."""
        await anyio.lowlevel.checkpoint()
        self.all.append(report)

    async def wait(self, count: int) -> None:
        """Wait for this many reports."""
        await wait_until(lambda: len(self.all) >= count)


async def no_accounts() -> list[AsyncLemcal]:
    """Return no accounts, as an async function."""
    return []


async def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    with anyio.fail_after(TIMEOUT):
        while not condition():  # noqa: ASYNC110  # there is no event to wait for
            await anyio.sleep(0.005)


async def test_regular_runs(serve_sandbox: Any) -> None:
    """Each run finds what happened since the last one, until the watch is canceled."""
    served, reports = serve_sandbox(2, 3), Reports()

    async def on_report(report: SyncReport) -> None:
        reports.all.append(report)
        served.sandbox.book()

    async with anyio.create_task_group() as tasks:
        accounts = served.clients()
        tasks.start_soon(lambda: watch(accounts, MemoryStore(), interval=0.01, on_report=on_report))
        await reports.wait(3)
        tasks.cancel_scope.cancel()
    assert [6, 1, 1] == [report.created for report in reports.all[:3]]


async def test_accounts_function(serve_sandbox: Any) -> None:
    """The function is called for the current accounts in every run."""
    served, reports = serve_sandbox(3, 1), Reports()
    clients: list[AsyncLemcal] = []

    def accounts() -> Iterator[AsyncLemcal]:
        clients.append(served.clients()[len(clients)])
        yield from clients

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: watch(accounts, MemoryStore(), interval=0.01, on_report=reports.add))
        await reports.wait(2)
        tasks.cancel_scope.cancel()
    assert [1, 2] == [report.accounts for report in reports.all[:2]]


async def test_wake(serve_sandbox: Any) -> None:
    """A wake-up runs the named account, all accounts if none is named, and none if the name is unknown."""
    served, reports, wake = serve_sandbox(3, 1), Reports(), Wake()
    wake.wake()  # no listener: no effect
    async with anyio.create_task_group() as tasks:
        work: dict[str, Any] = {"interval": LONG, "wake": wake, "on_report": reports.add}
        tasks.start_soon(lambda: watch(served.clients(), MemoryStore(), **work))
        await reports.wait(1)
        served.sandbox.book(1)
        for number, user_id in enumerate([served.sandbox.accounts[1].user_id, None, "usr_unknown"], 2):
            wake.wake(user_id)
            await reports.wait(number)
        tasks.cancel_scope.cancel()
    assert [3, 1, 3, 0] == [report.accounts for report in reports.all]
    assert [3, 1, 0, 0] == [report.created for report in reports.all]


async def test_wake_from_threads(serve_sandbox: Any) -> None:
    """After many concurrent wake-ups, every account has run, together or separately."""
    served, reports, wake = serve_sandbox(4, 1), Reports(), Wake()
    async with anyio.create_task_group() as tasks:
        work: dict[str, Any] = {"interval": LONG, "wake": wake, "on_report": reports.add}
        tasks.start_soon(lambda: watch(served.clients(), MemoryStore(), **work))
        await reports.wait(1)
        for account in range(4):
            served.sandbox.book(account)
        threads = [threading.Thread(target=wake.wake, args=(a.user_id,)) for a in served.sandbox.accounts]
        for thread in threads:
            thread.start()
        await wait_until(lambda: sum(report.created for report in reports.all) == 8)
        tasks.cancel_scope.cancel()
    for thread in threads:
        thread.join()
    assert [4] == [report.accounts for report in reports.all][:1]
    assert 0 == sum(len(report.failures) for report in reports.all)


async def test_wake_during_run(serve_sandbox: Any) -> None:
    """A booking that was too late for the list in progress is found by another run right away."""
    served, reports, wake = serve_sandbox(1, 1), Reports(), Wake()
    served.sandbox.inject(faults.slow(0.3))
    async with anyio.create_task_group() as tasks:
        work: dict[str, Any] = {"interval": LONG, "wake": wake, "on_report": reports.add}
        tasks.start_soon(lambda: watch(served.clients(), MemoryStore(), **work))
        await wait_until(lambda: bool(served.sandbox.requests))
        served.sandbox.book()
        wake.wake(served.sandbox.user_id)
        await reports.wait(2)
        tasks.cancel_scope.cancel()
    assert [1, 1] == [report.created for report in reports.all]


async def test_wake_during_hanging_run(serve_sandbox: Any) -> None:
    """A hanging account does not delay another one that is woken."""
    served, reports, wake = serve_sandbox(2, 1), Reports(), Wake()
    first, second = served.clients()
    served.sandbox.inject(faults.slow(30))
    async with anyio.create_task_group() as tasks:
        work: dict[str, Any] = {"interval": LONG, "wake": wake, "on_report": reports.add}
        tasks.start_soon(lambda: watch([first, second], MemoryStore(), max_concurrency=1, **work))
        await wait_until(lambda: bool(served.sandbox.requests))
        wake.wake(second.user_id)
        await reports.wait(1)
        tasks.cancel_scope.cancel()
    assert [(1, 1)] == [(report.accounts, report.created) for report in reports.all]


async def test_failing_account_is_skipped(serve_sandbox: Any) -> None:
    """Others continue. A wake-up tries it immediately; after a success, it runs regularly again."""
    served, reports, wake = serve_sandbox(2, 1), Reports(), Wake()
    good, other = served.clients()
    keys = ["wrong"]
    bad = served.lemcal.for_account(other.user_id, lambda: keys[0])
    async with anyio.create_task_group() as tasks:
        work: dict[str, Any] = {"wake": wake, "on_report": reports.add}
        tasks.start_soon(lambda: watch([good, bad], MemoryStore(), interval=0.2, **work))
        await reports.wait(3)
        assert [(2, 1), (1, 0)] == [(report.accounts, report.failed) for report in reports.all[:2]]
        keys[0] = served.sandbox.accounts[1].api_key
        wake.wake(other.user_id)
        await wait_until(lambda: sum(report.created for report in reports.all) == 2)
        seen = len(reports.all)
        await wait_until(lambda: any(report.accounts == 2 for report in reports.all[seen:]))
        tasks.cancel_scope.cancel()


async def test_failing_key_function(serve_sandbox: Any) -> None:
    """The failure of an account without a known user id is reported in each run, and the watch continues."""
    served, reports = serve_sandbox(1, 1), Reports()

    def key() -> str:
        raise LookupError("the vault is closed")

    async with anyio.create_task_group() as tasks:
        accounts = [served.lemcal.for_account(None, key)]
        tasks.start_soon(lambda: watch(accounts, MemoryStore(), interval=0.01, on_report=reports.add))
        await reports.wait(2)
        tasks.cancel_scope.cancel()
    assert [1, 1] == [report.failed for report in reports.all[:2]]


@pytest.mark.parametrize("woken", [False, True])
async def test_errors_of_callers_functions(serve_sandbox: Any, *, woken: bool) -> None:
    """Errors of the caller's functions propagate unchanged, from regular runs and from wake-ups."""
    served, wake = serve_sandbox(1, 1), Wake()
    count = 0

    def on_report(_: SyncReport) -> None:
        nonlocal count
        count += 1
        if count == 1 + woken:
            raise ZeroDivisionError
        wake.wake()

    with pytest.raises(ZeroDivisionError), anyio.fail_after(TIMEOUT):
        await watch(served.clients(), MemoryStore(), interval=LONG, on_report=on_report, wake=wake)


async def test_failures_are_logged_when_their_cause_changes(
    serve_sandbox: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The first failure, each new cause and the recovery are logged, not the same failure in every run."""
    served, reports, wake = serve_sandbox(1, 1), Reports(), Wake()
    store = MemoryStore()
    causes = [faults.status(500), faults.status(500), faults.html_200(), faults.status(500), None]
    with caplog.at_level(logging.INFO, "lemcal_async.sync"):
        async with anyio.create_task_group() as tasks:
            served.sandbox.inject(causes[0])
            work: dict[str, Any] = {"interval": LONG, "wake": wake, "on_report": reports.add}
            tasks.start_soon(lambda: watch(served.clients(), store, **work))
            for number, cause in enumerate(causes[1:], 1):
                await reports.wait(number)
                if cause is not None:
                    served.sandbox.inject(cause)
                wake.wake()
            await reports.wait(len(causes))
            tasks.cancel_scope.cancel()
    assert [1, 1, 1, 1, 0] == [report.failed for report in reports.all]
    messages = [record.getMessage() for record in caplog.records]
    assert 4 == len(messages), messages
    assert [True, False, True, False] == ["500" in line for line in messages]
    assert "synchronized again" in messages[3]


async def test_failing_handler_causes_no_back_off(
    serve_sandbox: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The account is fetched in every run until the change is parked; the error is logged once."""
    served, store, reports = serve_sandbox(1, 1), MemoryStore(), Reports()

    def on_change(_: Change) -> None:
        raise ValueError("no such contact")

    async with anyio.create_task_group() as tasks:
        work: dict[str, Any] = {"interval": 0.01, "on_change": on_change, "on_report": reports.add}
        tasks.start_soon(lambda: watch(served.clients(), store, max_attempts=5, **work))
        await reports.wait(6)
        tasks.cancel_scope.cancel()
    assert [1] * 6 == [report.accounts for report in reports.all[:6]]
    assert [0, 0, 0, 0, 1, 0] == [report.parked for report in reports.all[:6]]
    assert [1, 1, 1, 1, 1, 0] == [report.failed for report in reports.all[:6]]
    assert ["failed", "failed", "is parked"] == [
        next(word for word in ("failed", "is parked") if word in record.getMessage())
        for record in caplog.records
    ]


@pytest.mark.parametrize("plain", [False, True])
async def test_report_handler_canceled_elsewhere(serve_sandbox: Any, *, plain: bool) -> None:
    """The watch raises: it must not end silently without being canceled."""
    import asyncio

    def plain_handler(_: SyncReport) -> None:
        raise asyncio.CancelledError

    async def on_report(_: SyncReport) -> None:
        raise asyncio.CancelledError

    with pytest.raises(RuntimeError, match="canceled from elsewhere"), anyio.fail_after(TIMEOUT):
        await watch(
            serve_sandbox(1, 1).clients(),
            MemoryStore(),
            interval=LONG,
            on_report=plain_handler if plain else on_report,
        )


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"interval": "5"}, "interval='5': it must be a number of seconds above 0"),
        ({"accounts": {"usr_1": "key"}}, "must not be of type dict"),
        ({"accounts": lambda: {"usr_1": "key"}}, "must not be of type dict"),
        ({"accounts": no_accounts}, "accounts= must be a plain function"),
        ({"wake": True}, r"wake= must be a Wake\(\), not bool"),
        ({"on_report": "print"}, "on_report= must be a function, not str"),
        ({"on_report": lambda: None}, r"on_report= is called as <lambda>\(report\)"),
    ],
)
async def test_invalid_arguments(options: dict[str, Any], problem: str) -> None:
    """The error says in one line what to pass."""
    arguments: dict[str, Any] = {"accounts": [], "store": MemoryStore(), "interval": 1, **options}
    with pytest.raises(ConfigurationError, match=problem), anyio.fail_after(TIMEOUT):
        await watch(**arguments)


@pytest.mark.parametrize("interval", [0, -1, float("nan"), float("inf")])
async def test_invalid_intervals(interval: float) -> None:
    """The interval must be a finite number of seconds above 0."""
    with pytest.raises(ConfigurationError, match="interval="):
        await watch([], MemoryStore(), interval=interval)


async def test_iterator_of_accounts() -> None:
    """An iterator is rejected: the second run would have no accounts."""
    with pytest.raises(ConfigurationError, match="can be iterated over only once"):
        await watch(iter([]), MemoryStore(), interval=1)


@pytest.mark.parametrize(
    ("interval", "failures", "retry_after", "expected"),
    [
        (60, 1, 0, 120),
        (60, 3, 0, 480),
        (60, 10, 0, MAX_BACKOFF),
        (60, 10**6, 0, MAX_BACKOFF),
        (7200, 1, 0, 7200),
        (60, 1, 86400, 86400),
    ],
)
def test_backoff(interval: float, failures: int, retry_after: float, expected: float) -> None:
    """The backoff doubles each time, up to an hour, and is never less than the service requests."""
    assert expected == backoff(interval, failures, retry_after)
