"""Databases: their URLs, the engines that connect to them, and what their errors mean.

What is kept there is the business of ``statements.py``, when and in which thread that of ``sql.py``.
"""

import re
import sqlite3
from pathlib import Path
from typing import Any, Final

import attrs
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from lemcal_async.errors import ConfigurationError, StoreError
from lemcal_async.sync._migrations import SchemaError

BUSY_SECONDS: Final = 10.0
"""How long a transaction waits for another program's; for SQLite ``?timeout=`` in the URL says otherwise."""

_SCHEMES: Final = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}


@attrs.frozen
class Problem:
    """What is wrong, and which error says so."""

    text: str
    kind: type[StoreError | ConfigurationError] = StoreError


@attrs.frozen
class Address:
    """A database's URL, and what may be shown of it: neither its password nor its query."""

    url: URL = attrs.field(repr=False)

    @property
    def backend(self) -> str:
        """Which database it is of: sqlite or postgresql."""
        return self.url.get_backend_name()

    def __str__(self) -> str:
        url = self.url
        return str(URL.create(self.backend, url.username, None, url.host, url.port, url.database))


def address_of(text: object) -> Address | Problem:
    """Return the URL as SQLAlchemy knows it, or what is wrong with it; its text is not quoted."""
    example = "it must be like sqlite:///lemcal.db or postgresql://user@host/database"
    try:
        url = make_url(text) if isinstance(text, str) else None
    except (ArgumentError, ValueError):
        url = None
    if url is None:
        return Problem(f"the database URL cannot be read: {example}", ConfigurationError)
    url = url.set(drivername=_SCHEMES.get(url.drivername, url.drivername))
    if url.drivername not in ("sqlite", "postgresql+psycopg"):
        return Problem(f"the database URL is of an unknown kind: {example}", ConfigurationError)
    if url.drivername == "sqlite" and url.database in (None, "", ":memory:"):
        return Problem("a SQLite database in memory is lost at once: use MemoryStore()", ConfigurationError)
    return Address(url)


def engine_of(url: URL, *, create: bool) -> Engine:
    """Return what connects to a database, a file only if it is there or may be made; raises SchemaError."""
    if url.get_backend_name() == "postgresql":
        try:
            engine = create_engine(url, pool_pre_ping=True, hide_parameters=True)
        except ModuleNotFoundError:
            raise SchemaError("psycopg is missing: pip install 'lemcal-async[sql]'") from None
        event.listen(engine, "connect", _set_up_postgresql)
        return engine
    if not create and not Path(url.database or "").exists():
        raise SchemaError("there is no such file; nothing was ever synchronized into it")
    arguments = {} if "timeout" in url.query else {"timeout": BUSY_SECONDS}
    engine = create_engine(url, connect_args=arguments, hide_parameters=True)
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_postgresql(connection: Any, _: object) -> None:
    connection.execute(f"SET lock_timeout = '{BUSY_SECONDS:.3f}s'")
    connection.commit()


def _set_up_sqlite(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # transactions begin where SQLAlchemy says, not at the first write
    # NORMAL: after a power failure the last transactions may be missing, each as a whole.
    for pragma in ("synchronous = NORMAL", "secure_delete = ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def keep_log(connection: Connection) -> None:
    """Have SQLite write to a log beside the file, so that readers and the writer do not wait for each other.

    The file remembers this, so it is done once the tables are known to be ours.
    """
    connection.connection.driver_connection.execute("PRAGMA journal_mode = WAL").close()  # type: ignore[union-attr]


def _begin_sqlite(connection: Connection) -> None:
    # A writer says so at once: one that has read before cannot become it if another was faster.
    writes = connection.get_execution_options().get("lemcal_writes", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


_ADVICE: Final = (
    ("lock timeout", "another program holds it; try again when it is done"),
    ("locked", "another program holds it; try again when it is done"),
    ("full", "make room, and run this again"),
    ("unable to open", "check the folder, and who may write there"),
    ("readonly", "check who may write to the file and its folder"),
)


def words_of(error: SQLAlchemyError) -> str:
    """Return what the database says, in one line, with what to do if that is known."""
    said = str(error)
    if isinstance(error, DBAPIError):
        # Of PostgreSQL's message only the first part: its details may quote rows.
        diagnosis = getattr(error.orig, "diag", None)
        said = getattr(diagnosis, "message_primary", None) or str(error.orig)
    said = re.sub(r"\s+", " ", said).strip()
    advice = next((advice for word, advice in _ADVICE if word in said), "")
    return f"{said}; {advice}" if advice else said
