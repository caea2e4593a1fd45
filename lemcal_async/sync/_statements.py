"""The statements that store a list of meetings, and erase what is old.

Each function runs in the transaction of an open connection, on SQLite and PostgreSQL alike. An account's row
is its lock: the first process that raises its revision stores its list. Others wait for that transaction,
or find out that they are late.
"""

import json
from datetime import datetime
from typing import Any, Final, cast

import attrs
from sqlalchemy import (
    Connection,
    CursorResult,
    String,
    and_,
    bindparam,
    cast as sql_cast,
    delete,
    func,
    literal,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from lemcal_async.errors import EmptyListError
from lemcal_async.sync._columns import columns_of, storable
from lemcal_async.sync._diff import (
    Difference,
    Plan,
    Snapshot,
    StoredMeeting,
    doubt,
    needed_rows,
    plan,
    status_of,
)
from lemcal_async.sync._outbox import announce_writer, slices
from lemcal_async.sync._store import Applied, Forgotten
from lemcal_async.sync._tables import accounts, changes, deliveries, meetings
from lemcal_async.sync._wire_text import dump, load

ACCOUNTS_IN_A_SLICE: Final = 50
CHANGES_IN_A_SLICE: Final = 5_000


@attrs.frozen
class _Previous:
    """What is known of an account's runs before this one."""

    empty_lists: int
    synced_at: datetime | None


def revision(connection: Connection, user_id: str) -> int:
    """Return the account's revision, 0 if it is new."""
    found = connection.execute(select(accounts.c.revision).where(accounts.c.user_id == user_id)).scalar()
    return found or 0


def apply(
    connection: Connection,
    user_id: str,
    expected: int,
    now: Snapshot,
    at: datetime,
    *,
    baseline: bool,
    confirm_empty_after: int,
    body_hash: str | None,
) -> Applied | EmptyListError | None:
    """Store a snapshot; None if the revision is another one by now."""
    previous = _lock(connection, user_id, expected, at)
    if previous is None:
        return None
    known = _known(connection, user_id)
    if error := doubt(known, now, previous.empty_lists, confirm_empty_after):
        _set(connection, user_id, empty_lists=previous.empty_lists + 1, last_error=str(error))
        return error
    _load(connection, user_id, known, needed_rows(known, now))
    todo = plan(known, now, announce=not (baseline and expected == 0))
    texts = {found.meeting_id: dump(found.wire) for found in (*todo.listed, *todo.outbox)}
    writer = _Apply(connection, user_id, now, at, known, texts)
    writer.write_listed(todo.listed)
    writer.write_missing(todo, previous.synced_at)
    _write_changes(connection, user_id, todo.outbox, texts, at)
    is_known_by_hash = body_hash is not None and not now.bad_rows
    _set(
        connection,
        user_id,
        empty_lists=0,
        last_error=None,
        synced_at=at,
        body_hash=f"{expected + 1}:{body_hash}" if is_known_by_hash else None,
        listed=len(now.rows),
    )
    return Applied(todo.counts, now.bad_rows)


def unchanged(connection: Connection, user_id: str, body_hash: str, at: datetime) -> int | None:
    """Note that the last list still holds, and return how long it is; None if it was another one."""
    is_last = accounts.c.body_hash == sql_cast(accounts.c.revision, String) + literal(f":{body_hash}")
    raised = accounts.c.revision + 1
    noted = connection.execute(
        update(accounts)
        .where(accounts.c.user_id == user_id, is_last)
        .values(
            revision=raised,
            body_hash=sql_cast(raised, String) + literal(f":{body_hash}"),
            empty_lists=0,
            last_error=None,
            last_run_at=at,
            synced_at=at,
        )
    )
    if noted.rowcount != 1:
        return None
    return connection.execute(select(accounts.c.listed).where(accounts.c.user_id == user_id)).scalar()


def _lock(connection: Connection, user_id: str, expected: int, at: datetime) -> _Previous | None:
    """Raise the revision, and hold the account until the transaction ends; None if it is another one."""
    if expected == 0:
        _insert_account(connection, user_id, at)
    raised = connection.execute(
        update(accounts)
        .where(accounts.c.user_id == user_id, accounts.c.revision == expected)
        .values(revision=expected + 1, last_run_at=at)
    )
    if raised.rowcount != 1:
        return None
    columns = select(accounts.c.empty_lists, accounts.c.synced_at)
    empty_lists, synced_at = connection.execute(columns.where(accounts.c.user_id == user_id)).one()
    return _Previous(empty_lists, synced_at)


def _insert_account(connection: Connection, user_id: str, at: datetime) -> None:
    """Add the account unless it is there."""
    values = {"user_id": user_id, "revision": 0, "empty_lists": 0, "first_run_at": at, "last_run_at": at}
    insert_new(connection, accounts, values)


def insert_new(connection: Connection, table: Any, values: dict[str, Any]) -> bool:
    """Insert a row unless its key is there; return whether it was inserted."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    statement = insert(table).values(values).on_conflict_do_nothing()
    counted_rows = connection.execution_options(preserve_rowcount=True).execute(statement)
    return rowcount(counted_rows) == 1


def _set(connection: Connection, user_id: str, **values: Any) -> None:
    connection.execute(update(accounts).where(accounts.c.user_id == user_id).values(values))


def _known(connection: Connection, user_id: str) -> dict[str, StoredMeeting]:
    """Return what is known of the account's meetings."""
    columns = (meetings.c.meeting_id, meetings.c.digest, meetings.c.status)
    rows = connection.execute(select(*columns).where(meetings.c.user_id == user_id))
    return {meeting_id: StoredMeeting(digest, status) for meeting_id, digest, status in rows}


def _load(connection: Connection, user_id: str, known: dict[str, StoredMeeting], needed: list[str]) -> None:
    """Put the wire rows that are needed into what is known."""
    for ids in slices(needed):
        found = connection.execute(
            select(meetings.c.meeting_id, meetings.c.wire).where(
                meetings.c.user_id == user_id, meetings.c.meeting_id.in_(ids), meetings.c.wire.is_not(None)
            )
        )
        for meeting_id, wire in found:
            known[meeting_id] = attrs.evolve(known[meeting_id], wire=load(wire))


@attrs.frozen
class _Apply:
    """Writes what a snapshot has changed of an account's meetings; ``texts`` are the wire rows as JSON."""

    connection: Connection
    user_id: str
    now: Snapshot
    at: datetime
    known: dict[str, StoredMeeting]
    texts: dict[str, str]

    def write_listed(self, differences: list[Difference]) -> None:
        """Write those that are in the list, and new or different."""
        new: list[dict[str, Any]] = []
        old: list[dict[str, Any]] = []
        for difference in differences:
            row, meeting_id = self._row(difference), difference.meeting_id
            if meeting_id in self.known:
                old.append({**row, "its_user": self.user_id, "its_id": meeting_id})
            else:
                key = {"user_id": self.user_id, "meeting_id": meeting_id}
                new.append({**row, **key, "first_seen_at": self.at})
        if new:
            self.connection.execute(meetings.insert(), new)
        if old:
            self.connection.execute(
                update(meetings).where(
                    meetings.c.user_id == bindparam("its_user"), meetings.c.meeting_id == bindparam("its_id")
                ),
                old,
            )

    def _row(self, difference: Difference) -> dict[str, Any]:
        meeting_id, columns = difference.meeting_id, columns_of(difference.wire)
        return {
            **attrs.asdict(columns),
            "status": status_of(difference.wire),
            "changed_at": self.at,
            "last_seen_at": None,
            "digest": self.now.rows[meeting_id].digest,
            "wire": self.texts[meeting_id],
        }

    def write_missing(self, todo: Plan, synced_at: datetime | None) -> None:
        """Write those that are no longer in the list; ``synced_at`` is when they were last in it."""
        for ids in slices(todo.disappeared):
            self.connection.execute(
                update(meetings)
                .where(meetings.c.user_id == self.user_id, meetings.c.meeting_id.in_(ids))
                .values(status="disappeared", changed_at=self.at, last_seen_at=synced_at)
            )
        for ids in slices(todo.dropped):
            self.connection.execute(
                delete(meetings).where(meetings.c.user_id == self.user_id, meetings.c.meeting_id.in_(ids))
            )


def _write_changes(
    connection: Connection, user_id: str, differences: list[Difference], texts: dict[str, str], at: datetime
) -> None:
    if differences:
        announce_writer(connection)
        connection.execute(
            changes.insert(),
            [
                {
                    "user_id": user_id,
                    "meeting_id": difference.meeting_id,
                    "kind": difference.kind,
                    "fields": json.dumps(difference.fields),
                    "found_at": at,
                    "wire": texts[difference.meeting_id],
                }
                for difference in differences
            ],
        )


def record_failure(connection: Connection, user_id: str, message: str, at: datetime) -> None:
    """Note the failure of a run."""
    _insert_account(connection, user_id, at)
    _set(connection, user_id, last_error=storable(message), last_run_at=at)


def forget(connection: Connection, user_id: str) -> Forgotten:
    """Erase an account."""
    # Its row first: it is the lock, and nobody may add to the account meanwhile.
    _set(connection, user_id, revision=accounts.c.revision + 1)
    erased = [
        rowcount(connection.execute(delete(table).where(table.c.user_id == user_id)))
        for table in (meetings, changes, deliveries, accounts)
    ]
    return Forgotten(meetings=erased[0], changes=erased[1])


def prune_accounts(connection: Connection, before: datetime, after: str) -> tuple[int, str | None]:
    """Erase the old meetings of some accounts, those that come ``after`` one in order.

    Returns how many, and the last of these accounts, or None if there are no more.
    """
    # The accounts' rows first, and in order, as each writer of meetings does: so nobody waits in a ring.
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
    """Erase the old among some delivered changes, those ``after`` one; returns as ``prune_accounts`` does."""
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
    """Forget which webhook deliveries were handled before a time."""
    connection.execute(delete(deliveries).where(deliveries.c.done_at < before))


def rowcount(result: Any) -> int:
    """Return how many rows a statement has changed."""
    return cast("CursorResult[Any]", result).rowcount
