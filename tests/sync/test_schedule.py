"""When the accounts of a fleet are due, and who holds them: the same on SQLite and PostgreSQL."""

from typing import Any

import anyio
import pytest

from lemcal_async.sync import SQLStore
from lemcal_async.sync._schedule import Due, Schedule, ScheduleStatus
from lemcal_async.sync._store import Lease, LeaseLostError

from .conftest import Database, outbox
from .test_store import apply_list, rows

pytestmark = pytest.mark.anyio

USER = "usr_1"


@pytest.fixture
def schedule(sql_store: SQLStore) -> Schedule:
    """Provide the schedule of a store on each kind of database."""
    return sql_store.schedule()


def advance_clock(database: Database, seconds: float) -> None:
    """Move all times back, as if this many seconds had passed."""
    database.query(f"UPDATE accounts SET lease_until = lease_until - {seconds}")
    database.query(f"UPDATE accounts SET due_at = due_at - {seconds} WHERE due_at > 0")


async def acquire(schedule: Schedule, user_id: str = USER) -> Lease:
    """Acquire the lease on an account that must be free."""
    lease = await schedule.acquire(user_id, 30.0)
    assert lease is not None
    return lease


async def test_accounts_become_due(database: Database, schedule: Schedule) -> None:
    """New accounts are due immediately, claimed ones after their interval; the oldest come first."""
    assert 2 == await schedule.add(["usr_2", "usr_1"], interval=300)
    assert 1 == await schedule.add(["usr_3", "usr_1"], interval=60)
    assert {"usr_1", "usr_2", "usr_3"} == {due.user_id for due in await schedule.claim(10)}
    assert [] == await schedule.claim(10)
    advance_clock(database, 61)
    assert {Due("usr_1", wanted=False), Due("usr_3", wanted=False)} == set(await schedule.claim(10))
    advance_clock(database, 240)
    assert ["usr_1", "usr_3", "usr_2"][-1:] == [due.user_id for due in await schedule.claim(10)][-1:]


async def test_claim_limit(schedule: Schedule) -> None:
    """No more accounts are claimed than requested, and the rest stay due."""
    await schedule.add([f"usr_{number}" for number in range(700)], interval=60)
    assert [1, 600, 99] == [len(await schedule.claim(limit)) for limit in (1, 600, 600)]


async def test_concurrent_claimers(database: Database) -> None:
    """Concurrent claimers get each account once, and miss none."""
    claimed: list[str] = []

    async def claim(store: SQLStore) -> None:
        while some := await store.schedule().claim(7):
            claimed.extend(due.user_id for due in some)

    async with SQLStore(database.url) as first, SQLStore(database.url) as second:
        ids = [f"usr_{number}" for number in range(100)]
        await first.schedule().add(ids, interval=60)
        async with anyio.create_task_group() as tasks:
            for store in (first, second, first, second):
                tasks.start_soon(claim, store)
    assert sorted(ids) == sorted(claimed)


async def test_one_holder(database: Database, schedule: Schedule) -> None:
    """Nobody else gets the account until the lease ends; then anybody can, and the old holder has lost it."""
    await schedule.add([USER], interval=60)
    first = await acquire(schedule)
    assert await schedule.acquire(USER, 30.0) is None
    assert await schedule.renew(first, 50.0)
    advance_clock(database, 40)
    assert await schedule.acquire(USER, 30.0) is None
    advance_clock(database, 20)
    second = await acquire(schedule)
    assert [False, False] == [await schedule.renew(first, 30.0), await schedule.release(first)]
    assert await schedule.release(second)
    assert await schedule.acquire("usr_unknown", 30.0) is None


async def test_dead_holder(database: Database, schedule: Schedule) -> None:
    """The account of a dead holder is due when the lease ends, not before."""
    await schedule.add([USER], interval=3600)
    await schedule.claim(1)
    await acquire(schedule)
    advance_clock(database, 29)
    assert [] == await schedule.claim(1)
    advance_clock(database, 2)
    assert [Due(USER, wanted=False)] == await schedule.claim(1)


async def test_successful_turn(database: Database, schedule: Schedule) -> None:
    """The account is due after its interval, plus or minus 10 %."""
    await schedule.add([USER], interval=100)
    await schedule.release(await acquire(schedule))
    advance_clock(database, 89)
    assert [] == await schedule.claim(1)
    advance_clock(database, 22)
    assert [Due(USER, wanted=False)] == await schedule.claim(1)


@pytest.mark.parametrize(
    "case",  # interval, failures, Retry-After, and the resulting delay
    [
        (60, 0, None, 120),
        (60, 2, None, 480),
        (60, 20, None, 3600),
        (7200, 3, None, 7200),
        (60, 0, 5000, 5000),
    ],
)
async def test_failed_turn(
    database: Database, schedule: Schedule, case: tuple[float, int, float | None, float]
) -> None:
    """The delay doubles each time, up to an hour, and is at least what the service requests."""
    interval, failures, retry_after, rest = case
    await schedule.add([USER], interval=interval)
    database.query(f"UPDATE accounts SET failures = {failures}")
    lease = await acquire(schedule)
    assert failures == lease.failures
    assert await schedule.back_off(lease, retry_after)
    advance_clock(database, rest * 0.89)
    assert [] == await schedule.claim(1)
    advance_clock(database, rest * 0.22)
    assert [Due(USER, wanted=False)] == await schedule.claim(1)
    assert failures + 1 == (await acquire(schedule)).failures


async def test_success_resets_failures(schedule: Schedule) -> None:
    """The next failure counts as the first."""
    await schedule.add([USER], interval=60)
    await schedule.back_off(await acquire(schedule))
    await schedule.release(await acquire(schedule))
    assert 0 == (await acquire(schedule)).failures


async def test_interrupted_turn(schedule: Schedule) -> None:
    """When its worker stops, another one may continue immediately."""
    await schedule.add([USER], interval=60)
    await schedule.claim(1)
    assert await schedule.give_back(await acquire(schedule))
    assert [Due(USER, wanted=False)] == await schedule.claim(1)


async def test_wake(schedule: Schedule) -> None:
    """The account is due immediately, before those that have been due for longer."""
    await schedule.add(["usr_1", "usr_2", "usr_3"], interval=60)
    assert 1 == await schedule.wake(["usr_3", "usr_unknown"])
    assert [Due("usr_3", wanted=True)] == await schedule.claim(1)
    lease = await acquire(schedule, "usr_3")
    await schedule.release(lease)
    assert {"usr_1", "usr_2"} == {due.user_id for due in await schedule.claim(10)}


async def test_duplicate_turn(database: Database, schedule: Schedule) -> None:
    """Only the first turn runs: one per claim until the account is held, one per wake until it is seen."""
    await schedule.add([USER], interval=60)
    (due,) = await schedule.claim(1)
    lease = await schedule.acquire(USER, 30.0, claimed=due.due_at)
    assert lease is not None
    await schedule.release(lease)
    assert await schedule.acquire(USER, 30.0, claimed=due.due_at) is None
    assert await schedule.acquire(USER, 30.0, claimed=0.0) is None
    await schedule.wake([USER])
    lease = await schedule.acquire(USER, 30.0, claimed=0.0)
    assert lease is not None
    await schedule.release(lease)
    assert await schedule.acquire(USER, 30.0, claimed=0.0) is None
    advance_clock(database, 70)
    (due,) = await schedule.claim(1)
    assert await schedule.acquire(USER, 30.0, claimed=due.due_at)


async def test_unclaim(schedule: Schedule) -> None:
    """The account is due immediately, unless it was acquired in the meantime."""
    await schedule.add(["usr_1", "usr_2"], interval=60)
    claimed = await schedule.claim(10)
    assert await schedule.acquire("usr_2", 30.0)
    assert 1 == await schedule.unclaim(claimed)
    assert ["usr_1"] == [due.user_id for due in await schedule.claim(10)]


async def test_wake_during_turn(schedule: Schedule) -> None:
    """A wake triggers another turn right after the current one, whose list may be too old."""
    await schedule.add([USER], interval=60)
    await schedule.claim(1)
    lease = await acquire(schedule)
    await schedule.wake([USER])
    assert await schedule.acquire(USER, 30.0, claimed=0.0) is None
    assert [] == await schedule.claim(1)
    await schedule.release(lease)
    assert [Due(USER, wanted=True)] == await schedule.claim(1)


async def test_claim_during_turn(schedule: Schedule) -> None:
    """A held account is not claimed."""
    await schedule.add([USER], interval=60)
    lease = await acquire(schedule)
    assert await schedule.acquire(USER, 30.0) is None
    await schedule.release(lease)
    assert [] == await schedule.claim(1)


async def test_pause_and_resume(schedule: Schedule) -> None:
    """A paused account gets no turn, but a turn in progress completes; a wake in the meantime is kept."""
    await schedule.add(["usr_1", "usr_2"], interval=60)
    lease = await acquire(schedule)
    assert 2 == await schedule.pause(["usr_1", "usr_2", "usr_unknown"])
    assert await schedule.release(lease)
    assert 1 == await schedule.wake(["usr_2"])
    assert [] == await schedule.claim(10)
    assert await schedule.acquire(USER, 30.0) is None
    await schedule.add(["usr_1"], interval=120)
    assert [] == await schedule.claim(10)
    assert 2 == await schedule.resume(["usr_1", "usr_2"])
    assert 0 == await schedule.resume(["usr_1", "usr_2"])
    assert [Due("usr_2", wanted=True), Due("usr_1", wanted=False)] == await schedule.claim(10)


async def test_pause_and_resume_during_turn(database: Database, schedule: Schedule) -> None:
    """The account stays with its holder, and is due if the holder dies."""
    await schedule.add([USER], interval=60)
    await acquire(schedule)
    await schedule.pause([USER])
    await schedule.resume([USER])
    assert [] == await schedule.claim(1)
    advance_clock(database, 31)
    assert [Due(USER, wanted=False)] == await schedule.claim(1)


async def test_remove(sql_store: SQLStore, schedule: Schedule) -> None:
    """The account gets no more turns and keeps its data; added again, it is due."""
    await apply_list(sql_store, rows(2))
    assert [] == await schedule.claim(1)  # it was synchronized, but by no fleet
    assert 1 == await schedule.add([USER], interval=60)
    lease = await acquire(schedule)
    assert 1 == await schedule.remove([USER])
    assert 0 == await schedule.remove([USER])
    assert await schedule.release(lease)
    assert [] == await schedule.claim(1)
    assert 2 == len(await outbox(sql_store))
    await schedule.add([USER], interval=60)
    assert [Due(USER, wanted=False)] == await schedule.claim(1)


async def test_changed_interval(database: Database, schedule: Schedule) -> None:
    """A shorter interval applies immediately, a longer one after the next turn."""
    await schedule.add([USER], interval=3600)
    await schedule.claim(1)
    await schedule.add([USER], interval=60)
    advance_clock(database, 61)
    assert [Due(USER, wanted=False)] == await schedule.claim(1)
    await schedule.add([USER], interval=3600)
    advance_clock(database, 61)
    assert [Due(USER, wanted=False)] == await schedule.claim(1)


async def test_status(database: Database, sql_store: SQLStore, schedule: Schedule) -> None:
    """The status counts due accounts and undelivered changes; accounts outside the fleet do not count."""
    nothing = ScheduleStatus(0, 0, None, 0, 0, 0, 0, None, 0)
    assert nothing == await schedule.status()
    await schedule.add([f"usr_{number}" for number in range(5)], interval=60)
    await schedule.pause(["usr_0"])
    await acquire(schedule, "usr_2")
    await schedule.back_off(await acquire(schedule, "usr_3"))
    await schedule.wake(["usr_4"])
    advance_clock(database, 10)
    await apply_list(sql_store, rows(3), user_id="usr_none")
    changes = await sql_store.pending("usr_none", 3)
    await sql_store.mark_delivered(changes[:1])
    await sql_store.record_attempt(changes[1:2], "no", park=True)
    status = await schedule.status()
    assert (5, 2, 1, 1, 1) == (status.accounts, status.due, status.running, status.failing, status.paused)
    assert status.oldest_due is not None
    assert 10 <= status.oldest_due < 60
    assert (1, 1) == (status.undelivered, status.parked)
    assert status.oldest_undelivered is not None
    assert 0 <= status.oldest_undelivered < 60


async def test_store_with_lease(database: Database, sql_store: SQLStore, schedule: Schedule) -> None:
    """A store with a lease works like the store, as long as the lease lasts."""
    await schedule.add([USER], interval=60)
    lease = await acquire(schedule)
    leased = sql_store.with_lease(lease)
    await apply_list(leased, rows(3))
    changes = await leased.pending(USER, 10)
    assert 2 == await leased.mark_delivered(changes[:2])
    advance_clock(database, 31)
    with pytest.raises(LeaseLostError, match="the lease of usr_1 has ended; nothing was written"):
        await leased.mark_delivered(changes[2:])
    assert 1 == len(await sql_store.pending(USER, 10))


async def test_store_with_lost_lease(database: Database, sql_store: SQLStore, schedule: Schedule) -> None:
    """After losing its lease, a store can neither write, nor mark changes, nor read pending changes."""
    await schedule.add([USER], interval=60)
    leased = sql_store.with_lease(await acquire(schedule))
    await apply_list(leased, rows(3))
    changes = await leased.pending(USER, 10)
    advance_clock(database, 31)
    await acquire(schedule)
    calls: list[Any] = [
        leased.apply(USER, 1, rows(1), baseline=False, confirm_empty_after=1),
        leased.unchanged(USER, "x"),
        leased.record_failure(USER, "no"),
        leased.pending(USER, 10),
        leased.mark_delivered(changes),
        leased.record_attempt(changes, "no", park=True),
    ]
    for call in calls:
        with pytest.raises(LeaseLostError):
            await call
    assert changes == await sql_store.pending(USER, 10)
    assert 1 == await sql_store.revision(USER)


async def test_forgetting_ends_the_lease(sql_store: SQLStore, schedule: Schedule) -> None:
    """After that, nothing that its holder does is written."""
    await schedule.add([USER], interval=60)
    leased = sql_store.with_lease(await acquire(schedule))
    await sql_store.forget(USER)
    with pytest.raises(LeaseLostError):
        await apply_list(leased, rows(1))
    assert 0 == await schedule.add([], interval=60)


async def test_concurrent_wakes(database: Database) -> None:
    """Concurrent wakes do not deadlock, whatever the order of the accounts."""
    ids = [f"usr_{number}" for number in range(200)]
    async with SQLStore(database.url) as first, SQLStore(database.url) as second:
        await first.schedule().add(ids, interval=60)
        async with anyio.create_task_group() as tasks:
            for number in range(10):
                store = (first, second)[number % 2]
                tasks.start_soon(store.schedule().wake, ids[:: 1 if number % 3 else -1])
        assert 200 == len(await first.schedule().claim(500))
