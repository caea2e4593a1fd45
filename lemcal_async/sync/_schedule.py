"""When each account of a fleet is due, and which worker holds it.

The state is in the table ``accounts`` and each step is one statement, so any number of workers on any number
of machines agree. Times are seconds on the database's clock.

How a fleet uses the schedule::

    schedule = store.schedule()
    await schedule.add(["usr_a"], interval=60)       # also pause, resume, remove, wake
    for due in await schedule.claim(limit=100):      # due now; each account goes to one claimer only
        ...                                          # enqueue it, woken accounts first
    lease = await schedule.acquire("usr_a", 30.0)    # at the start of a turn; None: skip the turn
    leased = store.with_lease(lease)                 # a Store whose methods require the lease
    await schedule.renew(lease, 30.0)                # if False, or if the store raises LeaseLostError: stop
    await schedule.release(lease)                    # back_off() if it failed, give_back() if interrupted

A claimed account whose turn never began is due again after its interval. An account whose worker died is due
when the lease expires. A wake makes an account due immediately, before all others; while the account is held,
it becomes due when its holder calls ``release``.
"""

import random
import secrets
from collections.abc import Callable, Iterable
from typing import Any, Final

import attrs
from sqlalchemy import (
    ColumnElement,
    Connection,
    Update,
    and_,
    case,
    false,
    func,
    null,
    select,
    true,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from lemcal_async.sync import _leases
from lemcal_async.sync._drivers import Driver, driver_of
from lemcal_async.sync._outbox import is_parked, is_pending, slices
from lemcal_async.sync._store import Lease, LeaseLostError
from lemcal_async.sync._tables import accounts, changes, clock
from lemcal_async.sync._transactions import Transactions

MAX_BACKOFF: Final = 3600.0
"""Maximum seconds of backoff for a failing account, unless its interval or the service asks for more."""

_SPREAD: Final = 0.1  # fraction of the interval, plus or minus
_AT_ONCE: Final = 0.0  # as a due time: before all others


@attrs.frozen
class Due:
    """An account that is due. ``wanted``: it was woken. ``due_at`` identifies the claim."""

    user_id: str
    wanted: bool
    due_at: float = attrs.field(default=0.0, eq=False)


@attrs.frozen
class ScheduleStatus:
    """The backlog of a fleet. ``oldest_due`` and ``oldest_undelivered`` are ages in seconds, or None."""

    accounts: int
    due: int
    oldest_due: float | None
    running: int
    failing: int
    paused: int
    undelivered: int
    oldest_undelivered: float | None
    parked: int


class Schedule:
    """The schedule in a store's database, from ``SQLStore.schedule``. Raises the same errors as the store."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    async def add(self, user_ids: Iterable[str], interval: float) -> int:
        """Schedule accounts every ``interval`` seconds; return how many are new to the fleet.

        New accounts are due immediately. Existing ones get the new interval, and stay paused if they were.
        """
        ids = sorted(set(user_ids))
        return await self._transactions.run(lambda connection: _add(connection, ids, interval))

    async def remove(self, user_ids: Iterable[str]) -> int:
        """Remove accounts from the fleet, and keep their data. Returns how many were in it."""
        values = {"interval": null(), "due_at": null(), "wanted": false(), "paused": false(), "failures": 0}
        return await self._change(user_ids, lambda _: values)

    async def pause(self, user_ids: Iterable[str]) -> int:
        """Pause accounts; a turn in progress ends as usual. Returns how many are in the fleet."""
        return await self._change(user_ids, lambda _: {"paused": true(), "due_at": null()})

    async def resume(self, user_ids: Iterable[str]) -> int:
        """Resume paused accounts, due immediately. Returns how many were paused."""

        def values(now: ColumnElement[float]) -> dict[str, Any]:
            due_at = _unless_held(case((accounts.c.wanted, _AT_ONCE), else_=now))
            return {"paused": false(), "due_at": due_at}

        return await self._change(user_ids, values, accounts.c.paused)

    async def wake(self, user_ids: Iterable[str]) -> int:
        """Make accounts due immediately, or when they are resumed. Returns how many are in the fleet."""
        due_at = case((accounts.c.paused, null()), else_=_unless_held(_AT_ONCE))
        return await self._change(user_ids, lambda _: {"wanted": true(), "due_at": due_at})

    async def claim(self, limit: int) -> list[Due]:
        """Return due accounts, the most urgent first, and make them due again after their interval.

        Concurrent claimers get different accounts and do not block each other.
        """
        return await self._transactions.run(lambda connection: _claim(connection, limit))

    async def unclaim(self, claimed: Iterable[Due]) -> int:
        """Make claimed accounts that could not be queued due now. Returns how many were still claimed."""
        due_times = {due.user_id: due.due_at for due in claimed}

        def unclaim(connection: Connection) -> int:
            now = clock(connection)
            return sum(
                _affected_rows(
                    connection,
                    update(accounts)
                    .where(accounts.c.user_id == user_id, accounts.c.due_at == due_at)
                    .values(due_at=case((accounts.c.wanted, _AT_ONCE), else_=now)),
                )
                for user_id, due_at in sorted(due_times.items())
            )

        return await self._transactions.run(unclaim)

    async def acquire(self, user_id: str, seconds: float, *, claimed: float | None = None) -> Lease | None:
        """Lease an account for some seconds; None if it is held, paused, or not in the fleet.

        ``claimed`` is the ``due_at`` of the claim behind this call, or 0 for a wake: if given, None is also
        returned if the account has had its turn since. Acquiring clears earlier wakes, as the turn will see
        their changes; a later wake makes the account due when it is released.
        """
        token = secrets.token_hex(16)
        return await self._transactions.run_raw(
            lambda: lambda raw: _leases.acquire(raw, user_id, token, seconds, claimed)
        )

    async def renew(self, lease: Lease, seconds: float) -> bool:
        """Extend a lease to some seconds from now; False if it has ended."""
        return await self._transactions.run_raw(lambda: lambda raw: _leases.renew(raw, lease, seconds))

    async def release(self, lease: Lease) -> bool:
        """End a turn that succeeded; False if the lease had ended.

        The account is due after its interval, or immediately if it was woken during the turn.
        """
        factor = spread()
        return await self._end(lease, lambda driver: _leases.next_time(driver, factor))

    async def back_off(self, lease: Lease, retry_after: float | None = None) -> bool:
        """End a turn that failed; False if the lease had ended.

        The delay until the account is due doubles with each consecutive failure, up to an hour, but is at
        least ``retry_after`` seconds.
        """
        doubled = lease.interval * 2.0 ** min(lease.failures + 1, 64)
        rest = max(min(doubled, MAX_BACKOFF), lease.interval)
        seconds = max(rest * spread(), retry_after or 0.0)
        return await self._end(lease, lambda driver: (f"{driver.clock} + ?", (seconds,)), "failures + 1")

    async def give_back(self, lease: Lease) -> bool:
        """End an unfinished turn; False if the lease had ended. The account is due immediately."""
        return await self._end(lease, lambda driver: (driver.clock, ()), "failures")

    async def status(self) -> ScheduleStatus:
        """Return the backlog of the fleet."""
        return await self._transactions.run(_status, "read")

    async def _change(
        self,
        user_ids: Iterable[str],
        values: Callable[[ColumnElement[float]], dict[str, Any]],
        *conditions: ColumnElement[bool],
    ) -> int:
        ids = sorted(set(user_ids))

        def change(connection: Connection) -> int:
            set_to = values(clock(connection))
            changed = 0
            for batch in slices(ids):
                # Lock rows in order, so that concurrent calls cannot deadlock.
                ours = select(accounts.c.user_id).where(
                    accounts.c.user_id.in_(batch), accounts.c.interval.is_not(None), *conditions
                )
                locked = ours.order_by(accounts.c.user_id).with_for_update()
                statement = update(accounts).where(accounts.c.user_id.in_(locked))
                changed += _affected_rows(connection, statement.values(set_to))
            return changed

        return await self._transactions.run(change)

    async def _end(self, lease: Lease, due_at: Callable[[Driver], _leases.SQL], failures: str = "0") -> bool:
        return await self._transactions.run_raw(
            lambda: lambda raw: _leases.end(raw, lease, due_at(driver_of(raw)), failures)
        )


def spread() -> float:
    """Return a random factor near 1 for an interval, so that accounts do not become due in bursts."""
    return random.uniform(1 - _SPREAD, 1 + _SPREAD)  # noqa: S311  # not a secret


def lock_account(connection: Connection, lease: Lease) -> None:
    """Lock the leased account until the transaction ends. Raises LeaseLostError if the lease has ended."""
    held = (
        select(accounts.c.user_id).where(_lease_is_valid(connection, lease)).with_for_update(key_share=True)
    )
    if connection.execute(held).first() is None:
        raise LeaseLostError(f"the lease of {lease.user_id} has ended; nothing was written")


def _lease_is_valid(connection: Connection, lease: Lease) -> ColumnElement[bool]:
    return and_(
        accounts.c.user_id == lease.user_id,
        accounts.c.lease_token == lease.token,
        accounts.c.lease_until > clock(connection),
    )


def _is_held(now: ColumnElement[float]) -> ColumnElement[bool]:
    return func.coalesce(accounts.c.lease_until, _AT_ONCE) > now


def _unless_held(due_at: Any) -> ColumnElement[Any]:
    """Return ``due_at``; for a held account, the end of its lease, since its holder may have died."""
    return case((accounts.c.lease_token.is_not(None), accounts.c.lease_until), else_=due_at)


def _add(connection: Connection, user_ids: list[str], interval: float) -> int:
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    existing = 0
    for batch in slices(user_ids):
        query = select(func.count()).where(accounts.c.user_id.in_(batch), accounts.c.interval.is_not(None))
        existing += connection.execute(query).scalar_one()
    now = clock(connection)
    new = {"revision": 0, "empty_lists": 0, "interval": interval, "due_at": now}
    is_new = accounts.c.interval.is_(None)
    earlier = case((accounts.c.due_at > now + interval, now + interval), else_=accounts.c.due_at)
    due_at = case(
        (is_new, _unless_held(now)), (accounts.c.lease_token.is_not(None), accounts.c.due_at), else_=earlier
    )
    for batch in slices(user_ids):
        statement = insert(accounts).values([{**new, "user_id": user_id} for user_id in batch])
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=[accounts.c.user_id], set_={"interval": interval, "due_at": due_at}
            )
        )
    return len(user_ids) - existing


def _claim(connection: Connection, limit: int) -> list[Due]:
    now = clock(connection)
    query = select(accounts.c.user_id, accounts.c.due_at).where(accounts.c.due_at <= now)
    query = query.order_by(accounts.c.due_at).limit(limit)
    later = update(accounts).values(due_at=now + accounts.c.interval)
    columns = (accounts.c.user_id, accounts.c.wanted, accounts.c.due_at)
    if connection.dialect.name == "sqlite":  # a single writer, so nothing changes in between
        order = [row.user_id for row in connection.execute(query)]
        found = {
            row.user_id: Due(*row)
            for batch in slices(order)
            for row in connection.execute(later.where(accounts.c.user_id.in_(batch)).returning(*columns))
        }
        return [found[user_id] for user_id in order]
    due = query.with_for_update(skip_locked=True).cte("due")
    statement = later.where(accounts.c.user_id == due.c.user_id)
    claimed = connection.execute(statement.returning(*columns, due.c.due_at.label("was_due_at")))
    return [Due(*row[:3]) for row in sorted(claimed, key=lambda row: row.was_due_at)]


def _status(connection: Connection) -> ScheduleStatus:
    now = clock(connection)

    def count(*conditions: ColumnElement[bool]) -> ColumnElement[int]:
        return func.count().filter(and_(*conditions))

    is_due = accounts.c.due_at <= now
    total, due, oldest_due, running, failing, paused = connection.execute(
        select(
            func.count(),
            count(is_due),
            # The due time of a woken account does not show how long it has been waiting.
            now - func.min(accounts.c.due_at).filter(and_(is_due, accounts.c.due_at > _AT_ONCE)),
            count(_is_held(now)),
            count(accounts.c.failures > 0),
            count(accounts.c.paused),
        ).where(accounts.c.interval.is_not(None))
    ).one()
    undelivered, oldest, parked = connection.execute(
        select(count(is_pending), func.min(changes.c.found_at).filter(is_pending), count(is_parked)).where(
            changes.c.delivered_at.is_(None)
        )
    ).one()
    (seconds,) = connection.execute(select(now)).one()
    return ScheduleStatus(
        accounts=total,
        due=due,
        oldest_due=oldest_due,
        running=running,
        failing=failing,
        paused=paused,
        undelivered=undelivered,
        oldest_undelivered=None if oldest is None else max(0.0, seconds - oldest.timestamp()),
        parked=parked,
    )


def _affected_rows(connection: Connection, statement: Update) -> int:
    return connection.execute(statement).rowcount
