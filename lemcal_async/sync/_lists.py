"""Storing an account's list of meetings: the hot path, in the drivers' own terms.

Through SQLAlchemy, this took twice as long as everything else about an account (``benchmarks/sync.py``). Each
function runs one transaction of its own on a driver's connection. An account's row is its lock: the first
process that raises its revision stores its list. Others wait for that transaction, or find out that they are
late.
"""

import json
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from time import time
from typing import Any, Final, Protocol

import attrs

from lemcal_async.errors import EmptyListError
from lemcal_async.sync._columns import columns_of
from lemcal_async.sync._diff import (
    Difference,
    ListedMeeting,
    Snapshot,
    StoredMeeting,
    doubt,
    needed_rows,
    plan,
    status_of,
)
from lemcal_async.sync._outbox import WRITERS
from lemcal_async.sync._schedule import Lease
from lemcal_async.sync._store import Applied
from lemcal_async.sync._wire_text import load, storable_json

_MEETING: Final = [
    "user_id",
    "meeting_id",
    "meeting_type_id",
    "meeting_type_name",
    "start_at",
    "end_at",
    "guest_email",
    "guest_name",
    "host_email",
    "status",
    "canceled_at",
    "created_at",
    "first_seen_at",
    "last_seen_at",
    "changed_at",
    "problem",
    "digest",
    "wire",
]
_REPLACED: Final = [name for name in _MEETING if name not in ("user_id", "meeting_id", "first_seen_at")]
# A change has the row as it has just been written, or as it last was.
_CHANGES: Final = "INSERT INTO changes (user_id, meeting_id, kind, fields, found_at, wire)"

_NEW_ACCOUNT: Final = (
    "INSERT INTO accounts (user_id, revision, empty_lists, first_run_at, last_run_at) VALUES (?, 0, 0, ?, ?) "
    "ON CONFLICT DO NOTHING"
)
_ACCOUNT: Final = "SELECT revision, empty_lists, synced_at FROM accounts WHERE user_id = ?"
_STORED: Final = "SELECT meeting_id, digest, status FROM meetings WHERE user_id = ?"
_UNCHANGED: Final = (
    "UPDATE accounts SET revision = revision + 1, body_hash = (revision + 1) || ?, empty_lists = 0, "
    "last_error = NULL, last_run_at = ?, synced_at = ? WHERE user_id = ? AND body_hash = revision || ?"
)
_DOUBTED: Final = (
    "UPDATE accounts SET revision = ?, last_run_at = ?, empty_lists = ?, last_error = ? WHERE user_id = ?"
)
_APPLIED: Final = (
    "UPDATE accounts SET revision = ?, last_run_at = ?, empty_lists = 0, last_error = NULL, synced_at = ?, "
    "body_hash = ?, listed = ? WHERE user_id = ?"
)


class _Driver(Protocol):
    """How a driver does what these transactions consist of. SQL is given with a ``?`` for each parameter."""

    clock: str
    """The seconds since 1970, as SQL."""

    def begin_and_read(
        self, statements: Sequence[tuple[str, tuple[Any, ...]]]
    ) -> list[list[tuple[Any, ...]]]: ...

    def rows(self, sql: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]: ...

    def unchanged(self, condition: str, values: tuple[Any, ...]) -> int | None: ...

    def time(self, value: datetime | None) -> str | None: ...

    def wires(self, user_id: str, ids: list[str]) -> Iterable[tuple[str, str]]: ...

    def insert(self, rows: list[tuple[Any, ...]]) -> None: ...

    def replace(self, rows: list[dict[str, Any]]) -> None: ...

    def of_each(self, sql: str, values: tuple[Any, ...], ids: list[str]) -> None: ...

    def announce(self, user_id: str, at: str | None, found: list[Difference]) -> None: ...

    def commit(self, sql: str, values: tuple[Any, ...]) -> None: ...

    def rollback(self) -> None: ...


def revision(raw: Any, user_id: str) -> int:
    """Return the account's revision, 0 if it is new."""
    found = _driver(raw).rows("SELECT revision FROM accounts WHERE user_id = ?", (user_id,))
    return int(found[0][0]) if found else 0


def unchanged(raw: Any, user_id: str, body_hash: str, at: datetime, lease: Lease | None) -> int | None:
    """Note that the last list still holds, and return how long it is; None if it was another one."""
    driver = _driver(raw)
    suffix, now = f":{body_hash}", driver.time(at)
    condition, values = _is_held(driver, lease)
    return driver.unchanged(condition, (suffix, now, now, user_id, suffix, *values))


def apply(
    raw: Any,
    user_id: str,
    expected: int,
    now: Snapshot,
    at: datetime,
    *,
    baseline: bool,
    confirm_empty_after: int,
    body_hash: str | None,
    lease: Lease | None,
) -> Applied | EmptyListError | None:
    """Store a snapshot; None if the revision is another one by now, or the lease is lost."""
    driver = _driver(raw)
    at_text = driver.time(at)
    condition, values = _is_held(driver, lease)
    reads = [(_ACCOUNT + condition, (user_id, *values)), (_STORED, (user_id,))]
    if expected == 0 and lease is None:
        reads.insert(0, (_NEW_ACCOUNT, (user_id, at_text, at_text)))
    account, found = driver.begin_and_read(reads)[-2:]
    if not account or account[0][0] != expected:
        driver.rollback()
        return None
    _, empty_lists, synced_at = account[0]
    stored = {meeting_id: StoredMeeting(digest, status) for meeting_id, digest, status in found}
    if error := doubt(stored, now, empty_lists, confirm_empty_after):
        driver.commit(_DOUBTED, (expected + 1, at_text, empty_lists + 1, str(error), user_id))
        return error
    for meeting_id, wire in driver.wires(user_id, needed_rows(stored, now)):
        stored[meeting_id] = attrs.evolve(stored[meeting_id], wire=load(wire))
    todo = plan(stored, now, announce=not (baseline and expected == 0))
    rows = {
        found.meeting_id: _row(now.rows[found.meeting_id], user_id, driver.time, at_text)
        for found in todo.listed
    }
    new = [row for meeting_id, row in rows.items() if meeting_id not in stored]
    old = [dict(zip(_MEETING, row, strict=True)) for meeting_id, row in rows.items() if meeting_id in stored]
    if new:
        driver.insert(new)
    if old:
        driver.replace(old)
    driver.of_each(
        "UPDATE meetings SET status = 'disappeared', changed_at = ?, last_seen_at = ? WHERE user_id = ?",
        (at_text, synced_at, user_id),
        todo.disappeared,
    )
    driver.of_each("DELETE FROM meetings WHERE user_id = ?", (user_id,), todo.dropped)
    if todo.outbox:
        driver.announce(user_id, at_text, todo.outbox)
    known_by = f"{expected + 1}:{body_hash}" if body_hash is not None and not now.bad_rows else None
    driver.commit(_APPLIED, (expected + 1, at_text, at_text, known_by, len(now.rows), user_id))
    return Applied(todo.counts, now.bad_rows)


def _row(
    listed: ListedMeeting, user_id: str, time_of: Callable[[datetime | None], str | None], at: str | None
) -> tuple[Any, ...]:
    """Return a meeting's columns, in the order of ``_MEETING``."""
    columns = columns_of(listed.wire)
    return (
        user_id,
        listed.id,
        columns.meeting_type_id,
        columns.meeting_type_name,
        time_of(columns.start_at),
        time_of(columns.end_at),
        columns.guest_email,
        columns.guest_name,
        columns.host_email,
        status_of(listed.wire),
        time_of(columns.canceled_at),
        time_of(columns.created_at),
        at,
        None,
        at,
        columns.problem,
        listed.digest,
        storable_json(listed.text),
    )


def _fields(found: Difference) -> str:
    return json.dumps(found.fields) if found.fields else "[]"


def _in_utc(value: datetime) -> str:
    return (value if value.tzinfo is UTC else value.astimezone(UTC)).isoformat(" ", "microseconds")


def _is_held(driver: _Driver, lease: Lease | None) -> tuple[str, tuple[Any, ...]]:
    if lease is None:
        return "", ()
    return f" AND lease_token = ? AND lease_until > {driver.clock}", (lease.token,)


def _driver(raw: Any) -> _Driver:
    return _SQLite(raw) if isinstance(raw, sqlite3.Connection) else _PostgreSQL(raw)


class _SQLite:
    """On ``sqlite3``: a call costs little, so each statement is one."""

    def __init__(self, raw: sqlite3.Connection) -> None:
        self._raw = raw
        self.clock = repr(time())

    def begin_and_read(
        self, statements: Sequence[tuple[str, tuple[Any, ...]]]
    ) -> list[list[tuple[Any, ...]]]:
        self._raw.execute("BEGIN IMMEDIATE")
        return [self.rows(*statement) for statement in statements]

    def rows(self, sql: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        return self._raw.execute(sql, values).fetchall()

    def unchanged(self, condition: str, values: tuple[Any, ...]) -> int | None:
        self._raw.execute("BEGIN IMMEDIATE")
        noted = self._raw.execute(_UNCHANGED + condition, values).rowcount
        found = self.rows("SELECT listed FROM accounts WHERE user_id = ?", (values[3],)) if noted else []
        self._raw.execute("COMMIT")
        return found[0][0] if found else None

    def time(self, value: datetime | None) -> str | None:
        if value is None:
            return None
        return _in_utc(value)[:26]  # without the zone

    def wires(self, user_id: str, ids: list[str]) -> Iterable[tuple[str, str]]:
        query = (
            "SELECT meeting_id, wire FROM meetings WHERE user_id = ? AND meeting_id = ? AND wire IS NOT NULL"
        )
        return [row for meeting_id in ids for row in self._raw.execute(query, (user_id, meeting_id))]

    def insert(self, rows: list[tuple[Any, ...]]) -> None:
        marks = ", ".join("?" * len(_MEETING))
        self._raw.executemany(f"INSERT INTO meetings ({', '.join(_MEETING)}) VALUES ({marks})", rows)  # noqa: S608  # our names

    def replace(self, rows: list[dict[str, Any]]) -> None:
        settings = ", ".join(f"{name} = :{name}" for name in _REPLACED)
        where = "user_id = :user_id AND meeting_id = :meeting_id"
        self._raw.executemany(f"UPDATE meetings SET {settings} WHERE {where}", rows)  # noqa: S608  # our names

    def of_each(self, sql: str, values: tuple[Any, ...], ids: list[str]) -> None:
        self._raw.executemany(f"{sql} AND meeting_id = ?", [(*values, meeting_id) for meeting_id in ids])

    def announce(self, user_id: str, at: str | None, found: list[Difference]) -> None:
        sql = "SELECT user_id, meeting_id, ?, ?, ?, wire FROM meetings WHERE user_id = ? AND meeting_id = ?"
        self._raw.executemany(
            f"{_CHANGES} {sql}",
            [(each.kind, _fields(each), at, user_id, each.meeting_id) for each in found],
        )

    def commit(self, sql: str, values: tuple[Any, ...]) -> None:
        self._raw.execute(sql, values)
        self._raw.execute("COMMIT")

    def rollback(self) -> None:
        self._raw.execute("ROLLBACK")


class _PostgreSQL:
    """On psycopg: a round trip costs most, so what can be sent together is, by the simple protocol."""

    clock = "extract(epoch FROM statement_timestamp())"

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def begin_and_read(
        self, statements: Sequence[tuple[str, tuple[Any, ...]]]
    ) -> list[list[tuple[Any, ...]]]:
        locked = [(f"{sql} FOR UPDATE" if sql.startswith(_ACCOUNT) else sql, v) for sql, v in statements]
        return self._together([(self._raw.begin_sql, ()), (_ANNOUNCE, ()), *locked])

    def rows(self, sql: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        return self._together([(sql, values)])[0]

    def unchanged(self, condition: str, values: tuple[Any, ...]) -> int | None:
        # What is sent at once is one transaction. A server that crashes may lose this note: the next run
        # writes it again, so it is not worth waiting for the disk.
        settings = f"{self._raw.settings_sql}; SET LOCAL synchronous_commit = off"
        statement = f"{_UNCHANGED}{condition} RETURNING listed"
        found = self._together([(settings, ()), (statement, values)])[-1]
        return found[0][0] if found else None

    def _together(self, statements: Sequence[tuple[str, tuple[Any, ...]]]) -> list[list[tuple[Any, ...]]]:
        sql = "; ".join(sql for sql, _ in statements).replace("?", "%s")
        cursor = self._raw.client_cursor()
        cursor.execute(sql, [value for _, values in statements for value in values])
        results: list[list[tuple[Any, ...]]] = []
        while True:
            results.append(cursor.fetchall() if cursor.description else [])
            if not cursor.nextset():
                return results

    def time(self, value: datetime | None) -> str | None:
        if value is None:
            return None
        return _in_utc(value)

    def wires(self, user_id: str, ids: list[str]) -> Iterable[tuple[str, str]]:
        if not ids:
            return []
        query = "SELECT meeting_id, wire FROM meetings WHERE user_id = %s AND meeting_id = ANY(%s)"
        found: list[tuple[str, str]] = self._raw.execute(
            f"{query} AND wire IS NOT NULL", (user_id, ids)
        ).fetchall()
        return found

    def insert(self, rows: list[tuple[Any, ...]]) -> None:
        with self._raw.cursor().copy(f"COPY meetings ({', '.join(_MEETING)}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)

    def replace(self, rows: list[dict[str, Any]]) -> None:
        settings = ", ".join(f"{name} = new.{name}" for name in _REPLACED)
        self._raw.execute(
            f"UPDATE meetings SET {settings} FROM json_populate_recordset(NULL::meetings, %s) AS new "  # noqa: S608  # our names
            "WHERE meetings.user_id = new.user_id AND meetings.meeting_id = new.meeting_id",
            (json.dumps(rows),),
        )

    def of_each(self, sql: str, values: tuple[Any, ...], ids: list[str]) -> None:
        if ids:
            self._raw.execute(f"{sql.replace('?', '%s')} AND meeting_id = ANY(%s)", (*values, ids))

    def announce(self, user_id: str, at: str | None, found: list[Difference]) -> None:
        columns = ([e.meeting_id for e in found], [e.kind for e in found], [_fields(e) for e in found])
        sql = (
            "SELECT user_id, meeting_id, new.kind, new.fields, %s, wire "
            "FROM unnest(%s::text[], %s::text[], %s::text[]) WITH ORDINALITY AS new (id, kind, fields, at) "
            "JOIN meetings ON user_id = %s AND meeting_id = new.id ORDER BY new.at"
        )
        self._raw.execute(f"{_CHANGES} {sql}", (at, *columns, user_id))

    def commit(self, sql: str, values: tuple[Any, ...]) -> None:
        self._together([(sql, values), ("COMMIT", ())])

    def rollback(self) -> None:
        self._raw.execute("ROLLBACK")


# The numbers of changes that are written from here on are not settled yet: see ``_outbox.follow``.
_ANNOUNCE: Final = (
    f"SELECT pg_advisory_xact_lock_shared({WRITERS}, least(2147483647, coalesce("
    "pg_sequence_last_value(pg_get_serial_sequence('changes', 'seq')::regclass), 0))::integer)"
)
