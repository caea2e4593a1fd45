"""The tables, their version, and how they come to be. SQLAlchemy Core; no transaction begins here.

The tables belong to the analyst as well: ``docs/sync.md`` describes them column by column.
"""

from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
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
    inspect,
    select,
    text,
)

VERSION: Final = 1
_LOCK: Final = 0x6C656D63616C  # of PostgreSQL's advisory locks: "lemcal" in ASCII

metadata = MetaData()


class SchemaError(Exception):
    """The database holds tables that cannot be used; the message says which and why."""


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
    Column("revision", Integer, nullable=False),  # how often its list was taken over
    Column("empty_lists", Integer, nullable=False),  # in a row, and not believed
    _time("first_run_at"),
    _time("last_run_at"),
    _time("synced_at"),  # the last run that succeeded
    Column("last_error", Text),  # of the last run, null if it succeeded
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
    Column("wire", Text),  # JSON in ASCII; not jsonb, which refuses what a guest can write (\u0000)
    ForeignKeyConstraint(["user_id"], ["accounts.user_id"]),
    Index("meetings_start_at", "start_at"),
    Index("meetings_guest_email", "guest_email"),
)

changes = Table(
    "changes",
    metadata,
    # Never given twice; on SQLite only this type of key is counted by the database.
    Column("seq", BigInteger().with_variant(Integer(), "sqlite"), primary_key=True, autoincrement=True),
    Column("user_id", String, nullable=False),
    Column("meeting_id", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("fields", Text, nullable=False),  # JSON array of names
    Column("found_at", UTCDateTime(), nullable=False),
    Column("wire", Text, nullable=False),
    _time("delivered_at"),
    sqlite_autoincrement=True,
)
Index(
    "changes_pending",
    changes.c.user_id,
    changes.c.seq,
    sqlite_where=changes.c.delivered_at.is_(None),
    postgresql_where=changes.c.delivered_at.is_(None),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("user_id", String, primary_key=True),
    Column("meeting_id", String, primary_key=True),
    Column("lease_until", Float, nullable=False),  # seconds since 1970
    _time("done_at"),
)


def prepare(connection: Connection, *, create: bool) -> None:
    """Create the tables where there are none; raise SchemaError if those that are there do not fit.

    Within a transaction that no other process's can overlap: SQLite has only one writer, and PostgreSQL is
    asked for a lock.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    present = set(inspect(connection).get_table_names()) & set(metadata.tables)
    if schema_table.name not in present:
        if present:
            raise SchemaError(f"it holds a table {min(present)!r} of something else; use another database")
        if not create:
            raise SchemaError("nothing was ever synchronised into it; check its name")
        metadata.create_all(connection)
        connection.execute(schema_table.insert(), {"version": VERSION})
        return
    version = connection.execute(select(schema_table.c.version)).scalar()
    if version != VERSION:
        raise SchemaError(
            f"its tables are of version {version}, and this lemcal-async knows version {VERSION}; upgrade it"
        )
