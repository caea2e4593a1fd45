"""How the tables are created, how older ones are migrated, and which databases are refused.

The caller owns the transaction: whatever happens here happens whole, or not at all.
"""

from typing import Any, Final

import attrs
from sqlalchemy import Column, Connection, Table, bindparam, select, text, tuple_, update
from sqlalchemy.schema import CreateColumn, CreateIndex

from lemcal_async.sync._database import SchemaError
from lemcal_async.sync._tables import VERSION, accounts, changes, meetings, metadata, schema_table
from lemcal_async.sync._wire_text import storable_json

_LOCK: Final = 0x6C656D63616C  # PostgreSQL's advisory lock for this: "lemcal" in ASCII
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
    """A table, a view or the like that has one of our names."""

    name: str
    kind: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}"


def is_current(connection: Connection) -> bool:
    """Whether the tables are there, in this version: then nothing is to be written."""
    if _Relation(schema_table.name, "table") not in _present(connection):
        return False
    return connection.execute(select(schema_table.c.version)).scalar() == VERSION


def prepare(connection: Connection, *, create: bool) -> None:
    """Create the tables where there are none, and migrate older ones; SchemaError if they do not fit.

    Two processes do not overlap here: SQLite has one writer, and PostgreSQL an advisory lock.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    present = _present(connection)
    if _Relation(schema_table.name, "table") in present:
        _bring_up_to_date(connection)
        return
    if present:
        raise SchemaError(f"it has a {present[0]} that is not lemcal-async's; use another database")
    if not create:
        raise SchemaError("nothing was ever synchronized into it; check its name")
    metadata.create_all(connection, checkfirst=False)
    connection.execute(schema_table.insert(), {"version": VERSION})


def _bring_up_to_date(connection: Connection) -> None:
    version = connection.execute(select(schema_table.c.version)).scalar()
    if version == 1:
        _migrate_from_1(connection)
    elif version != VERSION:
        raise SchemaError(
            f"its tables are of version {version}, and this lemcal-async knows version {VERSION}; upgrade it"
        )


def _present(connection: Connection) -> list[_Relation]:
    """Return what has one of our names where our tables would be. SQLite's names ignore case."""
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
    """Add what a fleet, parked changes and unchanged bodies need, and make stored rows readable by jsonb."""
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
    """Store anew the rows whose JSON has escapes that jsonb refuses."""
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
