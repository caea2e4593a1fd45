"""The tables in SQLAlchemy Core, their creation, and the migration of older versions.

Analysts query these tables too: ``docs/sync.md`` describes every column.
"""

from datetime import UTC, datetime
from time import time
from typing import Any, Final

import attrs
from sqlalchemy import (
    BigInteger,
    Boolean,
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
    and_,
    bindparam,
    cast,
    extract,
    false,
    func,
    literal,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.schema import CreateColumn, CreateIndex

from lemcal_async.sync._columns import storable_json
from lemcal_async.sync._database import SchemaError

VERSION: Final = 2

metadata = MetaData()


class UTCDateTime(TypeDecorator[datetime]):
    """Accepts aware times and returns them in UTC. SQLite stores them as text without the time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert a value for the driver."""
        if value is None:
            return None
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002  # SQLAlchemy's signature
        """Convert a value for the program."""
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
    Column("revision", Integer, nullable=False),  # number of lists applied
    Column("empty_lists", Integer, nullable=False),  # consecutive rejected lists
    _time("first_run_at"),
    _time("last_run_at"),
    _time("synced_at"),  # the last successful run
    Column("last_error", Text),  # of the last run, null if it succeeded
    # "<revision>:<hash of the body>" of the last list. The revision invalidates it once a process that does
    # not know this column applies another list.
    Column("body_hash", Text),
    Column("listed", Integer),  # number of meetings in that list
    # The schedule of a fleet. Times are seconds since 1970 on the database's clock.
    Column("interval", Float),  # seconds between two runs; null: not in a fleet
    Column("due_at", Float),  # 0: immediately, before all others; null: paused, or not in a fleet
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
    _time("last_seen_at"),  # null while listed; then use the account's synced_at
    _time("changed_at"),
    Column("problem", Text),
    Column("digest", String, nullable=False),
    Column("wire", Text),  # JSON that jsonb accepts: see _columns.py
    ForeignKeyConstraint(["user_id"], ["accounts.user_id"]),
    Index("meetings_start_at", "start_at"),
    Index("meetings_guest_email", "guest_email"),
)

changes = Table(
    "changes",
    metadata,
    # Never reused. SQLite only assigns numbers automatically to a key of this type.
    Column("seq", BigInteger().with_variant(Integer(), "sqlite"), primary_key=True, autoincrement=True),
    Column("user_id", String, nullable=False),
    Column("meeting_id", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("fields", Text, nullable=False),  # JSON array of names
    Column("found_at", UTCDateTime(), nullable=False),
    Column("wire", Text, nullable=False),
    _time("delivered_at"),
    Column("attempts", Integer, nullable=False, server_default="0"),  # failed attempts of the handler
    Column("error", Text),  # of the last attempt
    _time("parked_at"),  # null unless parked
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


# The clock that all processes share: the database server's, or the machine's for SQLite.


def clock(connection: Connection) -> Any:
    """Return the seconds since 1970 as an expression, constant within a statement so that indexes apply."""
    if connection.dialect.name == "postgresql":
        return cast(extract("epoch", func.statement_timestamp()), Float(53))
    return literal(time(), Float(53))


# Creation and migration. The caller's transaction makes them atomic.

_LOCK: Final = 0x6C656D63616C  # PostgreSQL advisory lock for migrations: "lemcal" in ASCII
_PAGE: Final = 500

_ADDED_BY_2: Final[dict[Table, tuple[str, ...]]] = {
    accounts: (
        "body_hash",
        "listed",
        "interval",
        "due_at",
        "failures",
        "wanted",
        "lease_until",
        "lease_token",
        "paused",
    ),
    changes: ("attempts", "error", "parked_at"),
}


@attrs.frozen
class _Relation:
    """A table, view or similar object with the name of one of our tables."""

    name: str
    kind: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}"


def is_current(connection: Connection) -> bool:
    """Whether the tables exist in the current version, so that nothing has to be written."""
    if _Relation(schema_table.name, "table") not in _present(connection):
        return False
    return connection.execute(select(schema_table.c.version)).scalar() == VERSION


def prepare(connection: Connection, *, create: bool) -> None:
    """Create missing tables, or migrate older ones. Raises SchemaError if the existing ones do not fit.

    Processes do not overlap here: SQLite has a single writer, and PostgreSQL an advisory lock.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    present = _present(connection)
    if _Relation(schema_table.name, "table") in present:
        _migrate(connection)
        return
    if present:
        raise SchemaError(f"the {present[0]} was not created by lemcal-async; use another database")
    if not create:
        raise SchemaError("it has no tables of lemcal-async; check its name, or run a synchronization first")
    metadata.create_all(connection, checkfirst=False)
    connection.execute(schema_table.insert(), {"version": VERSION})


def _migrate(connection: Connection) -> None:
    version = connection.execute(select(schema_table.c.version)).scalar()
    if version == 1:
        _migrate_from_1(connection)
    elif version != VERSION:
        raise SchemaError(
            f"its tables have version {version}, but this version of lemcal-async supports only version "
            f"{VERSION}; upgrade lemcal-async"
        )


def _present(connection: Connection) -> list[_Relation]:
    """Return the relations of the current schema with our names. SQLite's names are case-insensitive."""
    if connection.dialect.name == "sqlite":
        query = "SELECT name, type FROM sqlite_master WHERE type IN ('table', 'view') ORDER BY name"
    else:
        query = (
            "SELECT relname, CASE relkind WHEN 'r' THEN 'table' WHEN 'p' THEN 'table' ELSE 'view' END "
            "FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace "
            "WHERE nspname = current_schema() AND relkind IN ('r', 'p', 'v', 'm', 'f') ORDER BY relname"
        )
    fold = str.lower if connection.dialect.name == "sqlite" else str
    found = connection.execute(text(query))
    return [_Relation(name, kind) for name, kind in found if fold(name) in metadata.tables]


def _migrate_from_1(connection: Connection) -> None:
    """Add the columns of version 2, and make stored rows readable by jsonb."""
    preparer = connection.dialect.identifier_preparer
    for table, names in _ADDED_BY_2.items():
        for name in names:
            column: Column[Any] = table.c[name]
            definition = CreateColumn(column).compile(dialect=connection.dialect)
            connection.exec_driver_sql(f"ALTER TABLE {preparer.format_table(table)} ADD COLUMN {definition}")
    connection.exec_driver_sql("DROP INDEX changes_pending")
    for index in (*accounts.indexes, *changes.indexes):
        connection.execute(CreateIndex(index))
    for table in (meetings, changes):
        _rewrite_wire(connection, table)
    connection.execute(schema_table.update().values(version=2))


def _rewrite_wire(connection: Connection, table: Table) -> None:
    """Rewrite the rows whose JSON contains escapes that jsonb rejects."""
    key = tuple(table.primary_key)
    with_escapes = select(*key, table.c.wire).where(table.c.wire.contains("\\u", autoescape=True))
    by_key = [column == bindparam(f"old_{column.name}") for column in key]
    rewrite = update(table).where(*by_key).values(wire=bindparam("new_wire"))
    page = connection.execute(with_escapes.order_by(*key).limit(_PAGE)).all()
    while page:
        changed = [
            {
                **{f"old_{column.name}": value for column, value in zip(key, row, strict=False)},
                "new_wire": new,
            }
            for row in page
            if (new := storable_json(row.wire)) != row.wire
        ]
        if changed:
            connection.execute(rewrite, changed)
        after = with_escapes.where(tuple_(*key) > tuple_(*page[-1][: len(key)]))
        page = connection.execute(after.order_by(*key).limit(_PAGE)).all()
