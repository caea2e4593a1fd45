"""Hand-written code that stores lists in a database: the lower bound for the cost of a synchronization.

Uses ``http.client``, ``json.loads``, and the fastest way of each driver to write the same columns, with one
transaction per account. It handles no errors, retries and cancels nothing, and does not find the changed
fields. Two runs are measured: the first, which writes everything, and one without changes, which compares a
digest of each row.
"""

import base64
import hashlib
import http.client
import json
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

COLUMNS = (
    "user_id, meeting_id, meeting_type_id, meeting_type_name, start_at, end_at, guest_email, guest_name, "
    "host_email, status, canceled_at, created_at, first_seen_at, changed_at, digest, wire"
)
CHANGE = "user_id, meeting_id, kind, fields, found_at, wire"
TABLES = """
CREATE TABLE accounts (user_id TEXT PRIMARY KEY, revision INTEGER, synced_at {time});
CREATE TABLE meetings (user_id TEXT, meeting_id TEXT, meeting_type_id TEXT, meeting_type_name TEXT,
  start_at {time}, end_at {time}, guest_email TEXT, guest_name TEXT, host_email TEXT, status TEXT,
  canceled_at {time}, created_at {time}, first_seen_at {time}, changed_at {time}, digest TEXT, wire TEXT,
  PRIMARY KEY (user_id, meeting_id));
CREATE INDEX meetings_start_at ON meetings (start_at);
CREATE INDEX meetings_guest_email ON meetings (guest_email);
CREATE TABLE changes (seq {seq}, user_id TEXT, meeting_id TEXT, kind TEXT, fields TEXT, found_at {time},
  wire TEXT, delivered_at {time});
CREATE INDEX changes_outbox ON changes (user_id, seq) WHERE delivered_at IS NULL;
"""


def lists(base_url: str, accounts: list[tuple[str, str]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Fetch the list of each account, on one connection."""
    parts = urlsplit(base_url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port)
    for user_id, api_key in accounts:
        credentials = base64.b64encode(f"{user_id}:{api_key}".encode()).decode()
        connection.request("GET", f"{parts.path}/meetings", headers={"Authorization": f"Basic {credentials}"})
        yield user_id, json.loads(connection.getresponse().read())
    connection.close()


def digest(row: dict[str, Any]) -> str:
    """Return a digest of a row that does not depend on the order of its keys."""
    return hashlib.blake2b(json.dumps(row, sort_keys=True).encode(), digest_size=16).hexdigest()


def values(user_id: str, row: dict[str, Any], now: str) -> tuple[Any, ...]:
    """Return a row's columns."""
    guest: dict[str, Any] = next((each for each in row["attendees"] if each.get("primary")), {})
    host: dict[str, Any] = next((each for each in row["attendees"] if each.get("owner")), {})
    status = "canceled" if row.get("canceledAt") else "booked"
    return (
        user_id, row["_id"], row.get("meetingTypeId"), row.get("meetingTypeName"), row["start"], row["end"],
        guest.get("email"), guest.get("name"), host.get("email"), status, row.get("canceledAt"),
        row["createdAt"], now, now, digest(row), json.dumps(row),
    )  # fmt: skip


class SQLite:
    """The hand-written code for SQLite."""

    def __init__(self, target: str) -> None:
        self.connection = sqlite3.connect(target, isolation_level=None)
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute("PRAGMA synchronous = NORMAL")

    def create(self) -> None:
        """Create the tables."""
        self.connection.executescript(TABLES.format(time="TEXT", seq="INTEGER PRIMARY KEY AUTOINCREMENT"))

    def write(self, user_id: str, rows: list[tuple[Any, ...]], now: str) -> None:
        """Write an account's first list."""
        execute, many = self.connection.execute, self.connection.executemany
        execute("BEGIN IMMEDIATE")
        execute("INSERT INTO accounts VALUES (?, 1, ?)", (user_id, now))
        many(f"INSERT INTO meetings ({COLUMNS}) VALUES ({', '.join('?' * 16)})", rows)
        many(
            f"INSERT INTO changes ({CHANGE}) VALUES ({', '.join('?' * 6)})",
            [(user_id, row[1], "created", "[]", now, row[-1]) for row in rows],
        )
        execute("COMMIT")

    def compare(self, user_id: str, digests: dict[str, str], now: str) -> bool:
        """Return whether a list equals the stored one, and record the time."""
        execute = self.connection.execute
        execute("BEGIN IMMEDIATE")
        stored = dict(execute("SELECT meeting_id, digest FROM meetings WHERE user_id = ?", (user_id,)))
        execute(
            "UPDATE accounts SET revision = revision + 1, synced_at = ? WHERE user_id = ?", (now, user_id)
        )
        execute("COMMIT")
        return stored == digests


class PostgreSQL:
    """The hand-written code for PostgreSQL."""

    def __init__(self, target: str) -> None:
        import psycopg

        self.connection = psycopg.connect(target)

    def create(self) -> None:
        """Create the tables."""
        self.connection.execute(TABLES.format(time="TIMESTAMPTZ", seq="BIGSERIAL PRIMARY KEY"))
        self.connection.commit()

    def write(self, user_id: str, rows: list[tuple[Any, ...]], now: str) -> None:
        """Write an account's first list."""
        cursor = self.connection.cursor()
        cursor.execute("INSERT INTO accounts VALUES (%s, 1, %s)", (user_id, now))
        with cursor.copy(f"COPY meetings ({COLUMNS}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
        with cursor.copy(f"COPY changes ({CHANGE}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row((user_id, row[1], "created", "[]", now, row[-1]))
        self.connection.commit()

    def compare(self, user_id: str, digests: dict[str, str], now: str) -> bool:
        """Return whether a list equals the stored one, and record the time."""
        cursor = self.connection.cursor()
        cursor.execute("SELECT meeting_id, digest FROM meetings WHERE user_id = %s", (user_id,))
        stored: dict[str, str] = dict(cursor.fetchall())
        cursor.execute(
            "UPDATE accounts SET revision = revision + 1, synced_at = %s WHERE user_id = %s", (now, user_id)
        )
        self.connection.commit()
        return stored == digests


def first(database: SQLite | PostgreSQL, base_url: str, accounts: list[tuple[str, str]]) -> None:
    """Write everything."""
    for user_id, rows in lists(base_url, accounts):
        now = datetime.now(UTC).isoformat()
        database.write(user_id, [values(user_id, row, now) for row in rows], now)


def same(database: SQLite | PostgreSQL, base_url: str, accounts: list[tuple[str, str]]) -> None:
    """Check that nothing has changed."""
    for user_id, rows in lists(base_url, accounts):
        digests = {row["_id"]: digest(row) for row in rows}
        assert database.compare(user_id, digests, datetime.now(UTC).isoformat())
