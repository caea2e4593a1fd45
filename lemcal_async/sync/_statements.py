"""Statements that record failures, erase old data, and deduplicate webhook deliveries.

Each function runs in the transaction of the given connection, on SQLite and on PostgreSQL.
"""

from datetime import datetime
from typing import Any, Final, Literal, cast

from sqlalchemy import (
    Connection,
    CursorResult,
    and_,
    delete,
    func,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from lemcal_async.sync._columns import storable
from lemcal_async.sync._store import Forgotten
from lemcal_async.sync._tables import accounts, changes, clock, deliveries, meetings

ACCOUNTS_IN_A_SLICE: Final = 50
CHANGES_IN_A_SLICE: Final = 5_000


def _insert_account(connection: Connection, user_id: str, at: datetime) -> None:
    """Insert an account unless it exists."""
    values = {"user_id": user_id, "revision": 0, "empty_lists": 0, "first_run_at": at, "last_run_at": at}
    insert_new(connection, accounts, values)


def insert_new(connection: Connection, table: Any, values: dict[str, Any]) -> bool:
    """Insert a row unless its key exists; return whether it was inserted."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    statement = insert(table).values(values).on_conflict_do_nothing()
    counted_rows = connection.execution_options(preserve_rowcount=True).execute(statement)
    return rowcount(counted_rows) == 1


def _set(connection: Connection, user_id: str, **values: Any) -> None:
    connection.execute(update(accounts).where(accounts.c.user_id == user_id).values(values))


def record_failure(connection: Connection, user_id: str, message: str, at: datetime) -> None:
    """Record the failure of a run."""
    _insert_account(connection, user_id, at)
    _set(connection, user_id, last_error=storable(message), last_run_at=at)


def forget(connection: Connection, user_id: str) -> Forgotten:
    """Erase an account."""
    # Lock the account's row first, so that no other writer can add to the account.
    _set(connection, user_id, revision=accounts.c.revision + 1)
    erased = [
        rowcount(connection.execute(delete(table).where(table.c.user_id == user_id)))
        for table in (meetings, changes, deliveries, accounts)
    ]
    return Forgotten(meetings=erased[0], changes=erased[1])


def prune_accounts(connection: Connection, before: datetime, after: str) -> tuple[int, str | None]:
    """Erase the old meetings of the next slice of accounts, in order, after the account ``after``.

    Returns how many meetings were erased, and the last account of the slice, or None if none are left.
    """
    # Lock the accounts' rows first and in order, as every writer of meetings does, to avoid deadlocks.
    some = select(accounts.c.user_id).where(accounts.c.user_id > after).order_by(accounts.c.user_id)
    locked = some.limit(ACCOUNTS_IN_A_SLICE).with_for_update()
    user_ids = list(connection.execute(locked).scalars())
    if not user_ids:
        return 0, None
    ended_at = func.coalesce(meetings.c.end_at, meetings.c.start_at, meetings.c.changed_at)
    is_old = and_(meetings.c.user_id.in_(user_ids), ended_at < before, meetings.c.status != "pruned")
    deleted = connection.execute(delete(meetings).where(is_old, meetings.c.status == "disappeared"))
    kept = {"user_id", "meeting_id", "digest", "status", "first_seen_at", "changed_at"}
    erased = {column.name: None for column in meetings.c if column.name not in kept}
    blanked = connection.execute(update(meetings).where(is_old).values(**erased, status="pruned"))
    return rowcount(deleted) + rowcount(blanked), user_ids[-1]


def prune_changes(connection: Connection, before: datetime, after: int) -> tuple[int, int | None]:
    """Erase old delivered changes in the slice after ``after``; return the same as ``prune_accounts``."""
    some = select(changes.c.seq).where(changes.c.seq > after).order_by(changes.c.seq)
    window = some.limit(CHANGES_IN_A_SLICE).subquery()
    last = connection.execute(select(func.max(window.c.seq))).scalar()
    if last is None:
        return 0, None
    erased = connection.execute(
        delete(changes).where(
            changes.c.seq > after,
            changes.c.seq <= last,
            changes.c.delivered_at.is_not(None),
            changes.c.found_at < before,
        )
    )
    return rowcount(erased), last


def prune_deliveries(connection: Connection, before: datetime) -> None:
    """Erase the records of webhook deliveries that were handled before a time."""
    connection.execute(delete(deliveries).where(deliveries.c.done_at < before))


def rowcount(result: Any) -> int:
    """Return how many rows a statement changed."""
    return cast("CursorResult[Any]", result).rowcount


def claim(
    connection: Connection, user_id: str, meeting_id: str, lease: float
) -> Literal["new", "busy", "done"]:
    """Claim a webhook delivery for ``lease`` seconds."""
    now = clock(connection)
    if insert_new(connection, deliveries, {**_key(user_id, meeting_id), "lease_until": now + lease}):
        return "new"
    expired = (
        update(deliveries)
        .where(*_key_is(user_id, meeting_id), deliveries.c.done_at.is_(None), deliveries.c.lease_until <= now)
        .values(lease_until=now + lease)
    )
    if connection.execute(expired).rowcount == 1:
        return "new"
    done_at = connection.execute(select(deliveries.c.done_at).where(*_key_is(user_id, meeting_id))).scalar()
    return "busy" if done_at is None else "done"


def done(connection: Connection, user_id: str, meeting_id: str, at: datetime) -> None:
    """Record that a delivery was handled."""
    # The claim may have been pruned or forgotten since.
    insert_new(connection, deliveries, {**_key(user_id, meeting_id), "lease_until": 0.0})
    connection.execute(update(deliveries).where(*_key_is(user_id, meeting_id)).values(done_at=at))


def release(connection: Connection, user_id: str, meeting_id: str) -> None:
    """Release a claim, unless its delivery was handled."""
    connection.execute(
        delete(deliveries).where(*_key_is(user_id, meeting_id), deliveries.c.done_at.is_(None))
    )


def _key(user_id: str, meeting_id: str) -> dict[str, Any]:
    return {"user_id": user_id, "meeting_id": meeting_id}


def _key_is(user_id: str, meeting_id: str) -> tuple[Any, Any]:
    return deliveries.c.user_id == user_id, deliveries.c.meeting_id == meeting_id
