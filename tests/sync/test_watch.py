"""``watch``: regular runs, wake-ups, and back-off for accounts that fail."""

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
from lemcal_async.sync._watch import LONGEST_BACKOFF, backoff

pytestmark = pytest.mark.anyio

LONG = 3600.0
PATIENCE = 20.0


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
        await until(lambda: len(self.all) >= count)


async def pass_nothing() -> list[AsyncLemcal]:
    """Return no accounts, as an async function."""
    return []


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    with anyio.fail_after(PATIENCE):
        while not condition():  # noqa: ASYNC110  # nothing tells
            await anyio.sleep(0.005)


async def test_again_and_again(worlds: Any) -> None:
    """Each run finds what has happened since the last, until it is canceled."""
    world, reports = worlds(2, 3), Reports()

    async def on_report(report: SyncReport) -> None:
        reports.all.append(report)
        world.sandbox.book()

    async with anyio.create_task_group() as tasks:
        accounts = world.clients()
        tasks.start_soon(lambda: watch(accounts, MemoryStore(), interval=0.01, on_report=on_report))
        await reports.wait(3)
        tasks.cancel_scope.cancel()
    assert [6, 1, 1] == [report.created for report in reports.all[:3]]


async def test_the_accounts_of_the_moment(worlds: Any) -> None:
    """A function is called for the accounts in every run."""
    world, reports = worlds(3, 1), Reports()
    clients: list[AsyncLemcal] = []

    def accounts() -> Iterator[AsyncLemcal]:
        clients.append(world.clients()[len(clients)])
        yield from clients

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: watch(accounts, MemoryStore(), interval=0.01, on_report=reports.add))
        await reports.wait(2)
        tasks.cancel_scope.cancel()
    assert [1, 2] == [report.accounts for report in reports.all[:2]]


async def test_woken(worlds: Any) -> None:
    """A wake-up runs the named account, all accounts if none is named, and none if the name is unknown."""
    world, reports, wake = worlds(3, 1), Reports(), Wake()
    wake.wake()  # nobody listens: no harm
    async with anyio.create_task_group() as tasks:
        work: dict[str, Any] = {"interval": LONG, "wake": wake, "on_report": reports.add}
        tasks.start_soon(lambda: watch(world.clients(), MemoryStore(), **work))
        await reports.wait(1)
        world.sandbox.book(1)
        for number, user_id in enumerate([world.sandbox.accounts[1].user_id, None, "usr_unknown"], 2):
            wake.wake(user_id)
            await reports.wait(number)
        tasks.cancel_scope.cancel()
    assert [3, 1, 3, 0] == [report.accounts for report in reports.all]
    assert [3, 1, 0, 0] == [report.created for report in reports.all]


async def test_woken_from_threads(worlds: Any) -> None:
    """Many at once: every account is run, together or one by one."""
    world, reports, wake = worlds(4, 1), Reports(), Wake()
    async with anyio.create_task_group() as tasks:
        work: dict[str, Any] = {"interval": LONG, "wake": wake, "on_report": reports.add}
        tasks.start_soon(lambda: watch(world.clients(), MemoryStore(), **work))
        await reports.wait(1)
        for account in range(4):
            world.sandbox.book(account)
        threads = [threading.Thread(target=wake.wake, args=(a.user_id,)) for a in world.sandbox.accounts]
        for thread in threads:
            thread.start()
        await until(lambda: sum(report.created for report in reports.all) == 8)
        tasks.cancel_scope.cancel()
    for thread in threads:
        thread.join()
    assert [4] == [report.accounts for report in reports.all][:1]
    assert 0 == sum(len(report.failures) for report in reports.all)


async def test_woken_during_a_run(worlds: Any) -> None:
    """A booking that came too late for the list under way is found by another run right away."""
    world, reports, wake = worlds(1, 1), Reports(), Wake()
    world.sandbox.inject(faults.slow(0.3))
    async with anyio.create_task_group() as tasks:
        work: dict[str, Any] = {"interval": LONG, "wake": wake, "on_report": reports.add}
        tasks.start_soon(lambda: watch(world.clients(), MemoryStore(), **work))
        await until(lambda: bool(world.sandbox.requests))
        world.sandbox.book()
        wake.wake(world.sandbox.user_id)
        await reports.wait(2)
        tasks.cancel_scope.cancel()
    assert [1, 1] == [report.created for report in reports.all]


async def test_woken_beside_a_long_run(worlds: Any) -> None:
    """One account that hangs does not hold up another that is woken."""
    world, reports, wake = worlds(2, 1), Reports(), Wake()
    first, second = world.clients()
    world.sandbox.inject(faults.slow(30))
    async with anyio.create_task_group() as tasks:
        work: dict[str, Any] = {"interval": LONG, "wake": wake, "on_report": reports.add}
        tasks.start_soon(lambda: watch([first, second], MemoryStore(), max_concurrency=1, **work))
        await until(lambda: bool(world.sandbox.requests))
        wake.wake(second.user_id)
        await reports.wait(1)
        tasks.cancel_scope.cancel()
    assert [(1, 1)] == [(report.accounts, report.created) for report in reports.all]


async def test_a_failing_account_is_left_alone_for_a_while(worlds: Any) -> None:
    """The others go on. A wake-up tries it at once; once it succeeds, it is like any other."""
    world, reports, wake = worlds(2, 1), Reports(), Wake()
    good, other = world.clients()
    keys = ["wrong"]
    bad = world.lemcal.for_account(other.user_id, lambda: keys[0])
    async with anyio.create_task_group() as tasks:
        work: dict[str, Any] = {"wake": wake, "on_report": reports.add}
        tasks.start_soon(lambda: watch([good, bad], MemoryStore(), interval=0.2, **work))
        await reports.wait(3)
        assert [(2, 1), (1, 0)] == [(report.accounts, report.failed) for report in reports.all[:2]]
        keys[0] = world.sandbox.accounts[1].api_key
        wake.wake(other.user_id)
        await until(lambda: sum(report.created for report in reports.all) == 2)
        seen = len(reports.all)
        await until(lambda: any(report.accounts == 2 for report in reports.all[seen:]))
        tasks.cancel_scope.cancel()


async def test_an_account_whose_key_cannot_be_had(worlds: Any) -> None:
    """It is reported in each run, and the watch goes on."""
    world, reports = worlds(1, 1), Reports()

    def key() -> str:
        raise LookupError("the vault is closed")

    async with anyio.create_task_group() as tasks:
        accounts = [world.lemcal.for_account("usr_x", key)]
        tasks.start_soon(lambda: watch(accounts, MemoryStore(), interval=0.01, on_report=reports.add))
        await reports.wait(2)
        tasks.cancel_scope.cancel()
    assert [1, 1] == [report.failed for report in reports.all[:2]]


@pytest.mark.parametrize("woken", [False, True])
async def test_what_the_caller_raises(worlds: Any, *, woken: bool) -> None:
    """Errors of the caller's functions pass through unchanged, from regular and woken runs."""
    world, wake = worlds(1, 1), Wake()
    count = 0

    def on_report(_: SyncReport) -> None:
        nonlocal count
        count += 1
        if count == 1 + woken:
            raise ZeroDivisionError
        wake.wake()

    with pytest.raises(ZeroDivisionError), anyio.fail_after(PATIENCE):
        await watch(world.clients(), MemoryStore(), interval=LONG, on_report=on_report, wake=wake)


async def test_failures_are_logged_when_their_cause_changes(
    worlds: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The first failure and each new cause, not the same one in every run; and the recovery."""
    world, reports, wake = worlds(1, 1), Reports(), Wake()
    store = MemoryStore()
    causes = [faults.status(500), faults.status(500), faults.html_200(), faults.status(500), None]
    with caplog.at_level(logging.INFO, "lemcal_async.sync"):
        async with anyio.create_task_group() as tasks:
            world.sandbox.inject(causes[0])
            work: dict[str, Any] = {"interval": LONG, "wake": wake, "on_report": reports.add}
            tasks.start_soon(lambda: watch(world.clients(), store, **work))
            for number, cause in enumerate(causes[1:], 1):
                await reports.wait(number)
                if cause is not None:
                    world.sandbox.inject(cause)
                wake.wake()
            await reports.wait(len(causes))
            tasks.cancel_scope.cancel()
    assert [1, 1, 1, 1, 0] == [report.failed for report in reports.all]
    said = [record.getMessage() for record in caplog.records]
    assert 4 == len(said), said
    assert [True, False, True, False] == ["500" in line for line in said]
    assert "synchronized again" in said[3]


async def test_a_handler_that_fails_backs_nothing_off(worlds: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The account is fetched in every run until the change is parked; the error is logged once."""
    world, store, reports = worlds(1, 1), MemoryStore(), Reports()

    def on_change(_: Change) -> None:
        raise ValueError("no such contact")

    async with anyio.create_task_group() as tasks:
        work: dict[str, Any] = {"interval": 0.01, "on_change": on_change, "on_report": reports.add}
        tasks.start_soon(lambda: watch(world.clients(), store, max_attempts=5, **work))
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
async def test_a_report_that_is_canceled_elsewhere(worlds: Any, *, plain: bool) -> None:
    """The watch raises: it must not just end if nobody canceled it."""
    import asyncio

    def plainly(_: SyncReport) -> None:
        raise asyncio.CancelledError

    async def on_report(_: SyncReport) -> None:
        raise asyncio.CancelledError

    with pytest.raises(RuntimeError, match="canceled from elsewhere"), anyio.fail_after(PATIENCE):
        await watch(
            worlds(1, 1).clients(), MemoryStore(), interval=LONG, on_report=plainly if plain else on_report
        )


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"interval": "5"}, "interval='5': it must be a number of seconds above 0"),
        ({"accounts": {"usr_1": "key"}}, "must not be of type dict"),
        ({"accounts": lambda: {"usr_1": "key"}}, "must not be of type dict"),
        ({"accounts": pass_nothing}, "accounts= must be a plain function"),
        ({"wake": True}, r"wake= must be a Wake\(\), not bool"),
        ({"on_report": "print"}, "on_report= must be a function, not str"),
        ({"on_report": lambda: None}, r"on_report= is called as <lambda>\(report\)"),
    ],
)
async def test_wrong_use(options: dict[str, Any], problem: str) -> None:
    """The error says in one line what to pass."""
    arguments: dict[str, Any] = {"accounts": [], "store": MemoryStore(), "interval": 1, **options}
    with pytest.raises(ConfigurationError, match=problem), anyio.fail_after(PATIENCE):
        await watch(**arguments)


@pytest.mark.parametrize("interval", [0, -1, float("nan"), float("inf")])
async def test_intervals_that_are_none(interval: float) -> None:
    """The interval must be a finite number of seconds above 0."""
    with pytest.raises(ConfigurationError, match="interval="):
        await watch([], MemoryStore(), interval=interval)


async def test_accounts_that_can_be_iterated_over_once() -> None:
    """An iterator is refused: the second run would have no accounts."""
    with pytest.raises(ConfigurationError, match="can be iterated over only once"):
        await watch(iter([]), MemoryStore(), interval=1)


@pytest.mark.parametrize(
    ("interval", "failures", "asked", "expected"),
    [
        (60, 1, 0, 120),
        (60, 3, 0, 480),
        (60, 10, 0, LONGEST_BACKOFF),
        (60, 10**6, 0, LONGEST_BACKOFF),
        (7200, 1, 0, 7200),
        (60, 1, 86400, 86400),
    ],
)
def test_backoff(interval: float, failures: int, asked: float, expected: float) -> None:
    """Twice as long each time, up to an hour, and never less than the service asks for."""
    assert expected == backoff(interval, failures, asked)
