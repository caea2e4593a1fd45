"""When accounts of a fleet are due, and who holds them: the same on SQLite and on PostgreSQL."""

from typing import Any

import anyio
import pytest

from lemcal_async.sync import SQLStore
from lemcal_async.sync._schedule import Due, Schedule, ScheduleStatus
from lemcal_async.sync._store import Lease, LeaseLostError

from .conftest import Database, outbox
from .test_store import rows, take

pytestmark = pytest.mark.anyio

USER = "usr_1"


@pytest.fixture
def schedule(sql_store: SQLStore) -> Schedule:
    """Provide the schedule of a store on each kind of database."""
    return sql_store.schedule()


def let_pass(database: Database, seconds: float) -> None:
    """Set all times back, as if so many seconds had passed."""
    database.query(f"UPDATE accounts SET lease_until = lease_until - {seconds}")
    database.query(f"UPDATE accounts SET due_at = due_at - {seconds} WHERE due_at > 0")


async def acquired(schedule: Schedule, user_id: str = USER) -> Lease:
    """Acquire an account that must be free."""
    lease = await schedule.acquire(user_id, 30.0)
    assert lease is not None
    return lease


async def test_accounts_become_due(database: Database, schedule: Schedule) -> None:
    """At once when they are new; when claimed, again after their interval; the oldest first."""
    assert 2 == await schedule.add(["usr_2", "usr_1"], interval=300)
    assert 1 == await schedule.add(["usr_3", "usr_1"], interval=60)
    assert {"usr_1", "usr_2", "usr_3"} == {due.user_id for due in await schedule.claim(10)}
    assert [] == await schedule.claim(10)
    let_pass(database, 61)
    assert {Due("usr_1", wanted=False), Due("usr_3", wanted=False)} == set(await schedule.claim(10))
    let_pass(database, 240)
    assert ["usr_1", "usr_3", "usr_2"][-1:] == [due.user_id for due in await schedule.claim(10)][-1:]


async def test_a_limit(schedule: Schedule) -> None:
    """No more accounts are claimed than asked for, and the rest stays due."""
    await schedule.add([f"usr_{number}" for number in range(700)], interval=60)
    assert [1, 600, 99] == [len(await schedule.claim(limit)) for limit in (1, 600, 600)]


async def test_claimers_share(database: Database) -> None:
    """Several at once get each account once, and none is left out."""
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
    """Until the lease ends, nobody else gets the account; then anybody does, and the old one has lost it."""
    await schedule.add([USER], interval=60)
    first = await acquired(schedule)
    assert await schedule.acquire(USER, 30.0) is None
    assert await schedule.renew(first, 50.0)
    let_pass(database, 40)
    assert await schedule.acquire(USER, 30.0) is None
    let_pass(database, 20)
    second = await acquired(schedule)
    assert [False, False] == [await schedule.renew(first, 30.0), await schedule.release(first)]
    assert await schedule.release(second)
    assert await schedule.acquire("usr_unknown", 30.0) is None


async def test_a_holder_that_has_died(database: Database, schedule: Schedule) -> None:
    """Its account is due when the lease ends, not before."""
    await schedule.add([USER], interval=3600)
    await schedule.claim(1)
    await acquired(schedule)
    let_pass(database, 29)
    assert [] == await schedule.claim(1)
    let_pass(database, 2)
    assert [Due(USER, wanted=False)] == await schedule.claim(1)


async def test_a_turn_that_ends_well(database: Database, schedule: Schedule) -> None:
    """The account is due after its interval, give or take a tenth."""
    await schedule.add([USER], interval=100)
    await schedule.release(await acquired(schedule))
    let_pass(database, 89)
    assert [] == await schedule.claim(1)
    let_pass(database, 22)
    assert [Due(USER, wanted=False)] == await schedule.claim(1)


@pytest.mark.parametrize(
    "case",  # interval, failures, Retry-After, and how long it rests
    [
        (60, 0, None, 120),
        (60, 2, None, 480),
        (60, 20, None, 3600),
        (7200, 3, None, 7200),
        (60, 0, 5000, 5000),
    ],
)
async def test_a_turn_that_fails(
    database: Database, schedule: Schedule, case: tuple[float, int, float | None, float]
) -> None:
    """Its account rests for twice as long each time, up to an hour, and for as long as the service asks."""
    interval, failures, retry_after, rest = case
    await schedule.add([USER], interval=interval)
    database.query(f"UPDATE accounts SET failures = {failures}")
    lease = await acquired(schedule)
    assert failures == lease.failures
    assert await schedule.back_off(lease, retry_after)
    let_pass(database, rest * 0.89)
    assert [] == await schedule.claim(1)
    let_pass(database, rest * 0.22)
    assert [Due(USER, wanted=False)] == await schedule.claim(1)
    assert failures + 1 == (await acquired(schedule)).failures


async def test_success_ends_the_failures(schedule: Schedule) -> None:
    """The next failure is the first one again."""
    await schedule.add([USER], interval=60)
    await schedule.back_off(await acquired(schedule))
    await schedule.release(await acquired(schedule))
    assert 0 == (await acquired(schedule)).failures


async def test_a_turn_that_is_cut_short(schedule: Schedule) -> None:
    """When its worker stops, another one may go on at once."""
    await schedule.add([USER], interval=60)
    await schedule.claim(1)
    assert await schedule.give_back(await acquired(schedule))
    assert [Due(USER, wanted=False)] == await schedule.claim(1)


async def test_a_wake(schedule: Schedule) -> None:
    """The account is due at once, before those that have been due for longer."""
    await schedule.add(["usr_1", "usr_2", "usr_3"], interval=60)
    assert 1 == await schedule.wake(["usr_3", "usr_unknown"])
    assert [Due("usr_3", wanted=True)] == await schedule.claim(1)
    lease = await acquired(schedule, "usr_3")
    await schedule.release(lease)
    assert {"usr_1", "usr_2"} == {due.user_id for due in await schedule.claim(10)}


async def test_a_turn_that_came_twice(database: Database, schedule: Schedule) -> None:
    """Only the first is one: for a claim until the account was held, for a wake until somebody saw it."""
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
    let_pass(database, 70)
    (due,) = await schedule.claim(1)
    assert await schedule.acquire(USER, 30.0, claimed=due.due_at)


async def test_what_could_not_be_queued(schedule: Schedule) -> None:
    """It is due again at once, but for an account that somebody took in the meantime."""
    await schedule.add(["usr_1", "usr_2"], interval=60)
    claimed = await schedule.claim(10)
    assert await schedule.acquire("usr_2", 30.0)
    assert 1 == await schedule.unclaim(claimed)
    assert ["usr_1"] == [due.user_id for due in await schedule.claim(10)]


async def test_a_wake_during_a_turn(schedule: Schedule) -> None:
    """It leads to another turn right after this one; the one under way may have looked before."""
    await schedule.add([USER], interval=60)
    await schedule.claim(1)
    lease = await acquired(schedule)
    await schedule.wake([USER])
    assert await schedule.acquire(USER, 30.0, claimed=0.0) is None
    assert [] == await schedule.claim(1)
    await schedule.release(lease)
    assert [Due(USER, wanted=True)] == await schedule.claim(1)


async def test_a_sweep_during_a_turn(schedule: Schedule) -> None:
    """It leads to nothing: somebody is at it."""
    await schedule.add([USER], interval=60)
    lease = await acquired(schedule)
    assert await schedule.acquire(USER, 30.0) is None
    await schedule.release(lease)
    assert [] == await schedule.claim(1)


async def test_pause_and_resume(schedule: Schedule) -> None:
    """Paused, an account has no turn, but the one under way ends well; a wake meanwhile is remembered."""
    await schedule.add(["usr_1", "usr_2"], interval=60)
    lease = await acquired(schedule)
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


async def test_pause_and_resume_during_a_turn(database: Database, schedule: Schedule) -> None:
    """The account stays with its holder, and is due when that one has died."""
    await schedule.add([USER], interval=60)
    await acquired(schedule)
    await schedule.pause([USER])
    await schedule.resume([USER])
    assert [] == await schedule.claim(1)
    let_pass(database, 31)
    assert [Due(USER, wanted=False)] == await schedule.claim(1)


async def test_remove(sql_store: SQLStore, schedule: Schedule) -> None:
    """The account has no more turns, and keeps its data; added again, it is due."""
    await take(sql_store, rows(2))
    assert [] == await schedule.claim(1)  # it was synchronized, but by no fleet
    assert 1 == await schedule.add([USER], interval=60)
    lease = await acquired(schedule)
    assert 1 == await schedule.remove([USER])
    assert 0 == await schedule.remove([USER])
    assert await schedule.release(lease)
    assert [] == await schedule.claim(1)
    assert 2 == len(await outbox(sql_store))
    await schedule.add([USER], interval=60)
    assert [Due(USER, wanted=False)] == await schedule.claim(1)


async def test_another_interval(database: Database, schedule: Schedule) -> None:
    """A shorter one counts from now on; a longer one after the next turn."""
    await schedule.add([USER], interval=3600)
    await schedule.claim(1)
    await schedule.add([USER], interval=60)
    let_pass(database, 61)
    assert [Due(USER, wanted=False)] == await schedule.claim(1)
    await schedule.add([USER], interval=3600)
    let_pass(database, 61)
    assert [Due(USER, wanted=False)] == await schedule.claim(1)


async def test_status(database: Database, sql_store: SQLStore, schedule: Schedule) -> None:
    """What is due, for how long, and what waits to be delivered; other accounts do not count."""
    nothing = ScheduleStatus(0, 0, None, 0, 0, 0, 0, None, 0)
    assert nothing == await schedule.status()
    await schedule.add([f"usr_{number}" for number in range(5)], interval=60)
    await schedule.pause(["usr_0"])
    await acquired(schedule, "usr_2")
    await schedule.back_off(await acquired(schedule, "usr_3"))
    await schedule.wake(["usr_4"])
    let_pass(database, 10)
    await take(sql_store, rows(3), user_id="usr_none")
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


async def test_a_store_with_a_lease(database: Database, sql_store: SQLStore, schedule: Schedule) -> None:
    """It is the store, as long as the lease lasts."""
    await schedule.add([USER], interval=60)
    lease = await acquired(schedule)
    leased = sql_store.with_lease(lease)
    await take(leased, rows(3))
    changes = await leased.pending(USER, 10)
    assert 2 == await leased.mark_delivered(changes[:2])
    let_pass(database, 31)
    with pytest.raises(LeaseLostError, match="the lease of usr_1 has ended; nothing was written"):
        await leased.mark_delivered(changes[2:])
    assert 1 == len(await sql_store.pending(USER, 10))


async def test_who_has_lost_the_account(database: Database, sql_store: SQLStore, schedule: Schedule) -> None:
    """Can neither write, nor mark, nor fetch what to deliver next."""
    await schedule.add([USER], interval=60)
    leased = sql_store.with_lease(await acquired(schedule))
    await take(leased, rows(3))
    changes = await leased.pending(USER, 10)
    let_pass(database, 31)
    await acquired(schedule)
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


async def test_a_forgotten_account_is_held_by_nobody(sql_store: SQLStore, schedule: Schedule) -> None:
    """What its holder does then is not written."""
    await schedule.add([USER], interval=60)
    leased = sql_store.with_lease(await acquired(schedule))
    await sql_store.forget(USER)
    with pytest.raises(LeaseLostError):
        await take(leased, rows(1))
    assert 0 == await schedule.add([], interval=60)


async def test_wakes_of_many_at_once(database: Database) -> None:
    """In whatever order the accounts are named, they do not wait for each other in a ring."""
    ids = [f"usr_{number}" for number in range(200)]
    async with SQLStore(database.url) as first, SQLStore(database.url) as second:
        await first.schedule().add(ids, interval=60)
        async with anyio.create_task_group() as tasks:
            for number in range(10):
                store = (first, second)[number % 2]
                tasks.start_soon(store.schedule().wake, ids[:: 1 if number % 3 else -1])
        assert 200 == len(await first.schedule().claim(500))
