"""The tables and their version, in SQLAlchemy Core. ``_migrations.py`` creates them.

Analysts query these tables too: ``docs/sync.md`` describes them column by column.
"""

from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    and_,
    false,
)

VERSION: Final = 2

metadata = MetaData()


class UTCDateTime(TypeDecorator[datetime]):
    """An aware time in, an aware time in UTC out. SQLite keeps it as text without the zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return what the driver is given."""
        if value is None:
            return None
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002  # SQLAlchemy's signature
        """Return what the program gets."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _time(name: str) -> Column[Any]:
    return Column(name, UTCDateTime())


schema_table = Table("lemcal_schema", metadata, Column("version", Integer, nullable=False))

accounts = Table(
    "accounts",
    metadata,
    Column("user_id", String, primary_key=True),
    Column("revision", Integer, nullable=False),  # how many lists have been applied
    Column("empty_lists", Integer, nullable=False),  # doubted lists in a row
    _time("first_run_at"),
    _time("last_run_at"),
    _time("synced_at"),  # the last run that succeeded
    Column("last_error", Text),  # of the last run, null if it succeeded
    # "<revision>:<hash of the body>" of the last list. The revision makes it void as soon as a process that
    # does not know this column applies another list.
    Column("body_hash", Text),
    Column("listed", Integer),  # how many meetings that list had
    # The schedule of a fleet. Times are seconds since 1970, by the database's clock.
    Column("interval", Float),  # seconds between two runs; null: not in a fleet
    Column("due_at", Float),  # 0: at once, before all others; null: paused, or not in a fleet
    Column("failures", Integer, nullable=False, server_default="0"),  # in a row
    Column("wanted", Boolean, nullable=False, server_default=false()),  # woken since its last turn began
    Column("lease_until", Float),
    Column("lease_token", Text),
    Column("paused", Boolean, nullable=False, server_default=false()),
)
Index(
    "accounts_due",
    accounts.c.due_at,
    sqlite_where=accounts.c.due_at.is_not(None),
    postgresql_where=accounts.c.due_at.is_not(None),
)

meetings = Table(
    "meetings",
    metadata,
    Column("user_id", String, primary_key=True),
    Column("meeting_id", String, primary_key=True),
    Column("meeting_type_id", Text),
    Column("meeting_type_name", Text),
    _time("start_at"),
    _time("end_at"),
    Column("guest_email", Text),
    Column("guest_name", Text),
    Column("host_email", Text),
    Column("status", String, nullable=False),
    _time("canceled_at"),
    _time("created_at"),
    _time("first_seen_at"),
    _time("last_seen_at"),  # null while it is listed: then that is the account's synced_at
    _time("changed_at"),
    Column("problem", Text),
    Column("digest", String, nullable=False),
    Column("wire", Text),  # JSON that jsonb accepts: see _wire_text.py
    ForeignKeyConstraint(["user_id"], ["accounts.user_id"]),
    Index("meetings_start_at", "start_at"),
    Index("meetings_guest_email", "guest_email"),
)

changes = Table(
    "changes",
    metadata,
    # Never reused; on SQLite only a key of this type counts by itself.
    Column("seq", BigInteger().with_variant(Integer(), "sqlite"), primary_key=True, autoincrement=True),
    Column("user_id", String, nullable=False),
    Column("meeting_id", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("fields", Text, nullable=False),  # JSON array of names
    Column("found_at", UTCDateTime(), nullable=False),
    Column("wire", Text, nullable=False),
    _time("delivered_at"),
    Column("attempts", Integer, nullable=False, server_default="0"),  # how often the handler has failed
    Column("error", Text),  # of the last attempt
    _time("parked_at"),  # null unless the handler was given up on
    sqlite_autoincrement=True,
)
_is_pending = and_(changes.c.delivered_at.is_(None), changes.c.parked_at.is_(None))
Index(
    "changes_outbox", changes.c.user_id, changes.c.seq, sqlite_where=_is_pending, postgresql_where=_is_pending
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("user_id", String, primary_key=True),
    Column("meeting_id", String, primary_key=True),
    Column("lease_until", Float, nullable=False),  # seconds since 1970
    _time("done_at"),
)
