"""The outbox's statements: reading changes, marking them as delivered, and parking them.

Each function runs in the transaction of the given connection.
"""

import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import islice
from typing import Any, Final, TypeVar

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Select,
    and_,
    any_,
    cast,
    func,
    literal,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, BIT, REGCLASS

from lemcal_async.sync._columns import load, storable
from lemcal_async.sync._store import Change
from lemcal_async.sync._tables import changes

T = TypeVar("T")

WRITERS: Final = 0x6C656D63
"""Key of the PostgreSQL advisory lock that writers hold: "lemc" in ASCII."""

MAX_PARAMETERS: Final = 500  # of a statement; every version of SQLite accepts this many

_is_undelivered: Final = changes.c.delivered_at.is_(None)
is_pending: Final = and_(_is_undelivered, changes.c.parked_at.is_(None))
is_parked: Final = and_(_is_undelivered, changes.c.parked_at.is_not(None))


def pending_of(user_id: str) -> Select[Any]:
    """Select the pending changes of an account."""
    return select(changes).where(changes.c.user_id == user_id, is_pending)


def selection(*, pending: bool, parked: bool) -> Select[Any]:
    """Select the whole outbox, or only its pending changes, its parked changes, or both."""
    kinds = [is_pending] * pending + [is_parked] * parked
    return select(changes).where(or_(*kinds)) if kinds else select(changes)


def read(connection: Connection, query: Select[Any], limit: int) -> list[Change]:
    """Return the first changes of a selection, in order."""
    found = connection.execute(query.order_by(changes.c.seq).limit(limit))
    rows: list[Any] = list(found.all())  # all at once and unpacked by position, which is faster
    return [
        Change(
            seq=seq,
            user_id=user_id,
            meeting_id=meeting_id,
            kind=kind,
            fields=tuple(json.loads(fields)) if fields != "[]" else (),
            found_at=found_at,
            wire=load(wire),
            delivered_at=delivered_at,
            attempts=attempts,
            error=error,
            parked_at=parked_at,
        )
        for (
            seq, user_id, meeting_id, kind, fields, found_at, wire, delivered_at, attempts, error, parked_at,
        ) in rows
    ]  # fmt: skip


def follow(
    connection: Connection, query: Select[Any], after: int, of: tuple[int, int] | None, *, limit: int
) -> list[Change]:
    """Return the next changes of a selection, up to the ``seq`` below which none can appear any more."""
    query = query.where(changes.c.seq > after)
    if of is not None:
        part, parts = of
        query = query.where(_part_of(connection, parts) == part)
    if connection.dialect.name == "postgresql":
        query = query.where(changes.c.seq <= _horizon(connection))
    return read(connection, query, limit)


def _part_of(connection: Connection, parts: int) -> ColumnElement[int]:
    """Return ``part_of`` as SQL; SQLite calls the Python function itself."""
    if connection.dialect.name == "sqlite":
        return func.lemcal_part_of(changes.c.user_id, parts)
    digest = func.encode(func.sha256(func.convert_to(changes.c.user_id, "UTF8")), "hex")
    first = "x" + func.left(digest, 8)
    return cast(cast(first, BIT(32)), BigInteger) % parts


def _horizon(connection: Connection) -> int:
    """Return the highest number up to which all changes are visible to the next statement.

    PostgreSQL numbers changes when they are written and shows them when their transaction commits, so a lower
    number can appear after a higher one. Each writer holds a shared advisory lock, which never blocks, whose
    key contains the last number before its own.

    The order of the statements matters: a writer that numbers its changes after the first statement uses
    higher numbers, and an earlier one either still holds its lock or its changes are visible.
    """
    last: int = connection.execute(select(_last_seq)).scalar_one()
    writers = text(
        "SELECT min(objid::bigint) FROM pg_locks WHERE locktype = 'advisory' AND classid = :class "
        "AND objsubid = 2 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    lowest: int | None = connection.execute(writers, {"class": WRITERS}).scalar()
    return last if lowest is None else min(last, lowest)


_last_seq: Final = func.coalesce(
    func.pg_sequence_last_value(cast(func.pg_get_serial_sequence("changes", "seq"), REGCLASS)), 0
)


def mark_delivered(connection: Connection, seqs: Sequence[int], at: datetime) -> int:
    """Mark changes as delivered and return how many were not marked before."""
    return _update(connection, seqs, delivered_at=at)


def record_attempt(
    connection: Connection, seqs: Sequence[int], error: str, parked_at: datetime | None
) -> None:
    """Record that a handler raised, and park the changes unless ``parked_at`` is None."""
    _update(connection, seqs, attempts=changes.c.attempts + 1, error=storable(error), parked_at=parked_at)


def _update(connection: Connection, seqs: Sequence[int], **values: Any) -> int:
    statement = update(changes).where(_is_one_of(connection, seqs), _is_undelivered).values(values)
    return connection.execute(statement).rowcount


def _is_one_of(connection: Connection, seqs: Sequence[int]) -> ColumnElement[bool]:
    """Compare with all numbers as one parameter, because SQLAlchemy is slow with many."""
    if connection.dialect.name == "postgresql":
        return changes.c.seq == any_(literal(list(seqs), ARRAY(BigInteger)))
    numbers = func.json_each(json.dumps(list(seqs))).table_valued("value")
    return changes.c.seq.in_(select(numbers.c.value))


def retry_parked(connection: Connection, user_id: str | None) -> int:
    """Make parked changes pending again."""
    statement = update(changes).where(is_parked).values(parked_at=None, attempts=0)
    if user_id is not None:
        statement = statement.where(changes.c.user_id == user_id)
    return connection.execute(statement).rowcount


def slices(ids: Sequence[T]) -> Iterator[list[T]]:
    """Split a sequence into lists short enough to be the parameters of one statement."""
    rest = iter(ids)
    while batch := list(islice(rest, MAX_PARAMETERS)):
        yield batch
