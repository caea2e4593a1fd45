"""The hot path's statements for each driver: which are sent together, and how rows are written in bulk.

Through SQLAlchemy, they took twice as long as all other work on an account (``benchmarks/sync.py``). SQL is
passed with a ``?`` for each parameter.
"""

import json
import sqlite3
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from time import time
from typing import Any, Final, Protocol

import attrs

from lemcal_async.sync._diff import Difference
from lemcal_async.sync._outbox import WRITERS

MEETING_COLUMNS: Final = [
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
_REPLACED: Final = [
    name for name in MEETING_COLUMNS if name not in ("user_id", "meeting_id", "first_seen_at")
]
# A change contains the meeting's row, which is the current one or, if it disappeared, its last one.
_CHANGES: Final = "INSERT INTO changes (user_id, meeting_id, kind, fields, found_at, wire)"


@attrs.frozen
class Announced:
    """The changes of an account that were found at the same time."""

    user_id: str
    at: str | None
    changes: list[Difference]


class Driver(Protocol):
    """The steps of a transaction, implemented for a driver."""

    clock: str
    """SQL expression for the seconds since 1970."""

    for_update: str
    """SQL suffix of a query that locks its rows until the transaction ends."""

    def begin_and_read(
        self, statements: Sequence[tuple[str, tuple[Any, ...]]]
    ) -> list[list[tuple[Any, ...]]]: ...

    def rows(self, sql: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]: ...

    def update_account(
        self, user_id: str, sql: str, values: tuple[Any, ...], columns: str
    ) -> tuple[Any, ...] | None:
        """Run an UPDATE of an account in its own transaction; return ``columns`` if it matched the account.

        A server crash may lose the update, so use it only for what the next run or a lease's end repairs.
        """
        ...

    def time(self, value: datetime | None, sent: Any = None) -> str | None:
        """Return a time in the database's text form; ``sent`` is the wire value that it was parsed from."""
        ...

    def wires(self, user_id: str, ids: list[str]) -> Iterable[tuple[str, str]]: ...

    def insert(self, rows: list[tuple[Any, ...]]) -> None: ...

    def replace(self, rows: list[dict[str, Any]]) -> None: ...

    def for_each_id(self, sql: str, values: tuple[Any, ...], ids: list[str]) -> None: ...

    def commit(self, sql: str, values: tuple[Any, ...], announced: Announced | None = None) -> None:
        """Add changes to the outbox in order, run an UPDATE of the account, and commit."""
        ...

    def rollback(self) -> None: ...


def driver_of(raw: Any) -> Driver:
    return _SQLite(raw) if isinstance(raw, sqlite3.Connection) else _PostgreSQL(raw)


class _SQLite:
    """For ``sqlite3``: calls are cheap, so each statement is a call."""

    for_update = ""  # SQLite has a single writer

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

    def update_account(
        self, user_id: str, sql: str, values: tuple[Any, ...], columns: str
    ) -> tuple[Any, ...] | None:
        self._raw.execute("BEGIN IMMEDIATE")
        query = f"SELECT {columns} FROM accounts WHERE user_id = ?"  # noqa: S608  # constant names
        found = self.rows(query, (user_id,)) if self._raw.execute(sql, values).rowcount else []
        self._raw.execute("COMMIT")
        return found[0] if found else None

    def time(self, value: datetime | None, sent: Any = None) -> str | None:
        return None if value is None else _in_utc(value, sent)[:26]  # without the zone

    def wires(self, user_id: str, ids: list[str]) -> Iterable[tuple[str, str]]:
        query = (
            "SELECT meeting_id, wire FROM meetings WHERE user_id = ? AND meeting_id = ? AND wire IS NOT NULL"
        )
        return [row for meeting_id in ids for row in self._raw.execute(query, (user_id, meeting_id))]

    def insert(self, rows: list[tuple[Any, ...]]) -> None:
        names, marks = ", ".join(MEETING_COLUMNS), ", ".join("?" * len(MEETING_COLUMNS))
        self._raw.executemany(f"INSERT INTO meetings ({names}) VALUES ({marks})", rows)  # noqa: S608  # constant names

    def replace(self, rows: list[dict[str, Any]]) -> None:
        settings = ", ".join(f"{name} = :{name}" for name in _REPLACED)
        where = "user_id = :user_id AND meeting_id = :meeting_id"
        self._raw.executemany(f"UPDATE meetings SET {settings} WHERE {where}", rows)  # noqa: S608  # constant names

    def for_each_id(self, sql: str, values: tuple[Any, ...], ids: list[str]) -> None:
        self._raw.executemany(f"{sql} AND meeting_id = ?", [(*values, meeting_id) for meeting_id in ids])

    def commit(self, sql: str, values: tuple[Any, ...], announced: Announced | None = None) -> None:
        if announced is not None:
            user_id, at = announced.user_id, announced.at
            change = (
                "SELECT user_id, meeting_id, ?, ?, ?, wire FROM meetings WHERE user_id = ? AND meeting_id = ?"
            )
            self._raw.executemany(
                f"{_CHANGES} {change}",
                [(each.kind, _fields(each), at, user_id, each.meeting_id) for each in announced.changes],
            )
        self._raw.execute(sql, values)
        self._raw.execute("COMMIT")

    def rollback(self) -> None:
        self._raw.execute("ROLLBACK")


class _PostgreSQL:
    """For psycopg: round trips cost most, so statements are combined, using the simple query protocol."""

    clock = "extract(epoch FROM statement_timestamp())"
    for_update = " FOR UPDATE"

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def begin_and_read(
        self, statements: Sequence[tuple[str, tuple[Any, ...]]]
    ) -> list[list[tuple[Any, ...]]]:
        return self._execute_together([(self._raw.begin_sql, ()), (_ANNOUNCE, ()), *statements])

    def rows(self, sql: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        return self._execute_together([(sql, values)])[0]

    def update_account(
        self,
        user_id: str,  # noqa: ARG002  # part of the statement
        sql: str,
        values: tuple[Any, ...],
        columns: str,
    ) -> tuple[Any, ...] | None:
        # Statements sent together are one transaction. It is not worth waiting for the disk.
        settings = f"{self._raw.settings_sql}; SET LOCAL synchronous_commit = off"
        found = self._execute_together([(settings, ()), (f"{sql} RETURNING {columns}", values)])[-1]
        return found[0] if found else None

    def _execute_together(
        self, statements: Sequence[tuple[str, tuple[Any, ...]]]
    ) -> list[list[tuple[Any, ...]]]:
        sql = "; ".join(sql for sql, _ in statements).replace("?", "%s")
        cursor = self._raw.client_cursor()
        cursor.execute(sql, [value for _, values in statements for value in values])
        results: list[list[tuple[Any, ...]]] = []
        while True:
            results.append(cursor.fetchall() if cursor.description else [])
            if not cursor.nextset():
                return results

    def time(self, value: datetime | None, sent: Any = None) -> str | None:
        return None if value is None else _in_utc(value, sent)

    def wires(self, user_id: str, ids: list[str]) -> Iterable[tuple[str, str]]:
        if not ids:
            return []
        query = "SELECT meeting_id, wire FROM meetings WHERE user_id = %s AND meeting_id = ANY(%s)"
        found: list[tuple[str, str]] = self._raw.execute(
            f"{query} AND wire IS NOT NULL", (user_id, ids)
        ).fetchall()
        return found

    def insert(self, rows: list[tuple[Any, ...]]) -> None:
        with self._raw.cursor().copy(f"COPY meetings ({', '.join(MEETING_COLUMNS)}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)

    def replace(self, rows: list[dict[str, Any]]) -> None:
        settings = ", ".join(f"{name} = new.{name}" for name in _REPLACED)
        self._raw.execute(
            f"UPDATE meetings SET {settings} FROM json_populate_recordset(NULL::meetings, %s) AS new "  # noqa: S608  # constant names
            "WHERE meetings.user_id = new.user_id AND meetings.meeting_id = new.meeting_id",
            (json.dumps(rows),),
        )

    def for_each_id(self, sql: str, values: tuple[Any, ...], ids: list[str]) -> None:
        if ids:
            self._raw.execute(f"{sql.replace('?', '%s')} AND meeting_id = ANY(%s)", (*values, ids))

    def commit(self, sql: str, values: tuple[Any, ...], announced: Announced | None = None) -> None:
        statements: list[tuple[str, tuple[Any, ...]]] = [(sql, values), ("COMMIT", ())]
        if announced is not None:
            # One JSON text is cheap for the driver; each change is an array of three strings.
            changes = json.dumps([(each.meeting_id, each.kind, _fields(each)) for each in announced.changes])
            found = (
                "SELECT user_id, meeting_id, change->>1, change->>2, ?, wire "
                "FROM json_array_elements(?) WITH ORDINALITY AS new (change, place) "
                "JOIN meetings ON user_id = ? AND meeting_id = change->>0 ORDER BY place"
            )
            statements.insert(0, (f"{_CHANGES} {found}", (announced.at, changes, announced.user_id)))
        self._execute_together(statements)

    def rollback(self) -> None:
        self._raw.execute("ROLLBACK")


def _fields(found: Difference) -> str:
    return json.dumps(found.fields) if found.fields else "[]"


def _in_utc(value: datetime, sent: Any) -> str:
    # Most are sent as 2021-02-16T08:02:42.000Z; this path takes a third of the time. 24:00 is the next day.
    is_usual = type(sent) is str and len(sent) == 24 and sent[4:20:3] == "--T::." and sent[23] == "Z"
    if is_usual and sent[11:13] != "24":
        return f"{sent[:10]} {sent[11:23]}000+00:00"
    return (value if value.tzinfo is UTC else value.astimezone(UTC)).isoformat(" ", "microseconds")


# Announces that changes with higher numbers may not be committed yet: see ``_outbox.follow``.
_ANNOUNCE: Final = (
    f"SELECT pg_advisory_xact_lock_shared({WRITERS}, least(2147483647, coalesce("
    "pg_sequence_last_value(pg_get_serial_sequence('changes', 'seq')::regclass), 0))::integer)"
)
