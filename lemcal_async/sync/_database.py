"""Database URLs, connections, and error messages.

Settings never apply to a whole session, because a pooler such as pgbouncer shares it with other programs.
"""

import logging
import os
import re
import sqlite3
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Final, cast

import attrs
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from lemcal_async._auth import Secret
from lemcal_async.errors import ConfigurationError, StoreError
from lemcal_async.sync._store import part_of

_SCHEMES: Final = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
_EXAMPLE: Final = "use sqlite:///lemcal.db or postgresql://user@host/database"


class SchemaError(Exception):
    """The database cannot be used; the message gives the reason."""


@attrs.frozen
class Problem:
    """An error to raise. A worker thread returns it instead of raising it.

    Raising it there would chain the driver's error, which contains rows and thus personal data.
    """

    text: str
    kind: type[StoreError | ConfigurationError] = StoreError


@attrs.frozen
class Address:
    """A database URL. Its string form omits the password and the query."""

    url: URL = attrs.field(repr=False)

    @property
    def backend(self) -> str:
        """The kind of database: sqlite or postgresql."""
        return self.url.get_backend_name()

    def __str__(self) -> str:
        url = self.url
        if self.backend == "sqlite":
            return f"sqlite:///{url.database}"
        return str(URL.create(self.backend, url.username, None, url.host, url.port, url.database))


def address_of(text: Secret[object]) -> Address:
    """Parse a URL with SQLAlchemy. The ConfigurationError for an invalid URL quotes no part of it."""
    url = Secret(_parse_url(text.reveal()))
    if problem := _url_problem(url.reveal(), str(text.reveal())):
        raise ConfigurationError(problem)
    return Address(cast("URL", url.reveal()))


def _parse_url(text: object) -> URL | None:
    try:
        url = make_url(text) if isinstance(text, str) else None
    except (ArgumentError, ValueError):
        return None
    return url and url.set(drivername=_SCHEMES.get(url.drivername, url.drivername))


def _url_problem(url: URL | None, text: str) -> str:
    if url is None:
        return f"the database URL is invalid: {_EXAMPLE}"
    if url.drivername not in ("sqlite", "postgresql+psycopg"):
        return f"the database URL has an unsupported scheme: {_EXAMPLE}"
    if url.drivername == "sqlite":
        in_memory = url.database in (None, "", ":memory:")
        return "an in-memory SQLite database is not supported: use MemoryStore()" if in_memory else ""
    if _is_ambiguous(url, text):
        return (
            "the database URL has an @ or a ? in an unexpected place: in the username and the password, "
            "write %40 for @, %3F for ?, %2F for / and %3A for :"
        )
    return ""


def _is_ambiguous(url: URL, text: str) -> bool:
    """Whether part of the password may have been parsed as the host, the database or the query."""
    query = text.partition("?")[2] if url.password is None or "?" not in url.password else ""
    settings = query.split("&") if query else []
    return "@" in (url.host or "") + (url.database or "") or not all("=" in setting for setting in settings)


_ADVICE: Final = (
    ("lock timeout", "another program holds the lock; try again later"),
    ("locked", "another program holds the lock; try again later"),
    ("statement timeout", "increase ?statement_timeout= in the URL if needed"),
    ("full", "free up space and run this again"),
    ("unable to open", "check that the folder exists and is writable"),
    ("readonly", "check the permissions of the file and its folder"),
)

# PostgreSQL error classes whose messages never quote a row: connections, resources, permissions, locks.
_NEVER_QUOTING_ROWS: Final = ("08", "25", "28", "3D", "3F", "40", "42", "53", "54", "55", "57", "58", "XX")


def problem_of(error: Exception) -> Problem | None:
    """Translate a database error; return None for any other exception."""
    if isinstance(error, SchemaError):
        return Problem(str(error), ConfigurationError)
    original: BaseException | None = error
    if isinstance(error, DBAPIError):
        original = error.orig
    if isinstance(original, sqlite3.Error):
        return Problem(_with_advice(_sqlite_text(original)))
    if hasattr(original, "diag"):  # psycopg's, which is not imported here
        return Problem(_with_advice(_postgresql_text(original)))
    if isinstance(error, UnicodeError):
        return Problem("a text cannot be encoded for this database; use a database whose encoding is UTF8")
    if isinstance(error, (SQLAlchemyError, OSError)):
        return Problem(_with_advice(str(error)))
    return None


def _sqlite_text(error: sqlite3.Error) -> str:
    name, text = getattr(error, "sqlite_errorname", ""), str(error)
    if name == "SQLITE_CONSTRAINT_TRIGGER":
        return "a database trigger rejected the data"  # its message may quote the row
    # Other texts of this code come from functions, and may quote the row too.
    if name == "SQLITE_ERROR" and not text.startswith("no such "):
        return "a database statement or trigger failed"
    if text.startswith("Could not decode to UTF-8"):
        return "a stored text is not UTF-8: another program wrote it"
    return text


def _postgresql_text(error: Any) -> str:
    """Return the message, or a description if the message may quote a row."""
    diagnosis = error.diag
    if diagnosis.sqlstate is None:  # from libpq rather than the server, in several lines
        return re.sub(r"\s*\n\s*", "; ", str(error).strip())
    is_raised = diagnosis.source_function == "exec_stmt_raise" or (
        diagnosis.context is not None and diagnosis.sqlstate[:2] in ("XX", "42")
    )
    if is_raised or diagnosis.sqlstate[:2] == "P0":
        return f"a database trigger or function failed (SQLSTATE {diagnosis.sqlstate})"
    if diagnosis.sqlstate[:2] not in _NEVER_QUOTING_ROWS:
        name = diagnosis.constraint_name or diagnosis.table_name or ""
        return f"the database rejected the data: {type(error).__name__} {name}".rstrip()
    return str(diagnosis.message_primary)


def _with_advice(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip()
    advice = next((advice for word, advice in _ADVICE if word in text), "")
    return f"{text}; {advice}" if advice else text


BUSY_SECONDS: Final = 10.0
"""Seconds that a transaction waits for another program's lock.

``?timeout=`` changes them on SQLite, ``?lock_timeout=`` on PostgreSQL.
"""

# libpq settings. Without them, a wait for a vanished server only ends when the operating system gives up.
_POSTGRESQL_DEFAULTS: Final = {
    "connect_timeout": "10",
    "tcp_user_timeout": "15000",  # milliseconds
    "keepalives_idle": "30",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "client_encoding": "UTF8",
}
_STATEMENT_TIMEOUT: Final = "30s"
_UNITS: Final = {"": 1e-3, "ms": 1e-3, "s": 1.0, "min": 60.0}
_TIMEOUT_MARGIN: Final = 5.0  # seconds for the server to report its own timeout first

_LOGGING_NAME: Final = "lemcal_async"


def engine_of(url: URL, *, create: bool) -> Engine:
    """Create a database engine. A missing SQLite file is only created with ``create``. Raises SchemaError."""
    # SQLAlchemy logs rows at DEBUG. Filtering a child logger keeps its other messages.
    logging.getLogger(f"sqlalchemy.engine.Engine.{_LOGGING_NAME}").addFilter(_above_debug)
    return _postgresql(url) if url.get_backend_name() == "postgresql" else _sqlite(url, create=create)


def _above_debug(record: logging.LogRecord) -> bool:
    return record.levelno > logging.DEBUG


# PostgreSQL


def _postgresql(url: URL) -> Engine:
    try:
        import_module("psycopg")  # SQLite does not need it
    except ModuleNotFoundError:
        raise SchemaError("psycopg is missing: pip install 'lemcal-async[sql]'") from None
    from lemcal_async.sync._psycopg import BoundedConnection  # noqa: PLC0415

    query = {name: value if isinstance(value, str) else value[-1] for name, value in url.query.items()}
    statement_timeout = _duration(query, "statement_timeout", _STATEMENT_TIMEOUT)
    lock_timeout = _duration(query, "lock_timeout", f"{BUSY_SECONDS * 1000:.0f}ms")
    threshold = _prepare_threshold(query.pop("prepare_threshold", None))
    seconds = _seconds(statement_timeout)
    settings = (
        f"SET LOCAL lock_timeout = '{lock_timeout}'; SET LOCAL statement_timeout = '{statement_timeout}'"
    )
    # One round trip. READ COMMITTED, whatever the server's default: a writer waits for another's lock and
    # then sees its rows, while stricter levels would fail.
    begin = f"BEGIN ISOLATION LEVEL READ COMMITTED; {settings}"
    defaults = {name: value for name, value in _POSTGRESQL_DEFAULTS.items() if _is_unset(name, query)}

    def connect(*arguments: Any, **options: Any) -> BoundedConnection:
        connection = BoundedConnection.connect(*arguments, **options, prepare_threshold=threshold)
        connection.max_wait = seconds and seconds + _TIMEOUT_MARGIN
        connection.begin_sql = begin
        connection.settings_sql = f"SET TRANSACTION ISOLATION LEVEL READ COMMITTED; {settings}"
        return connection

    def do_connect(_dialect: Any, _record: Any, arguments: Any, options: Any) -> BoundedConnection:
        connection = connect(*arguments, **{**defaults, **options})
        encoding = connection.info.parameter_status("server_encoding") or "UTF8"
        if encoding != "UTF8":
            connection.close()
            raise SchemaError(f"its encoding is {encoding}; use a database whose encoding is UTF8")
        return connection

    def do_begin(connection: Connection) -> None:
        opens = connection.get_execution_options().get("lemcal_opens", False)
        unbounded = "; SET LOCAL statement_timeout = 0" if opens else ""
        raw: Any = connection.connection.driver_connection
        raw.max_wait = None if opens else seconds and seconds + _TIMEOUT_MARGIN
        connection.exec_driver_sql(begin + unbounded)

    engine = create_engine(
        url.set(query=query),
        isolation_level="AUTOCOMMIT",  # transactions begin with the statement above
        hide_parameters=True,
        logging_name=_LOGGING_NAME,
    )
    event.listen(engine, "do_connect", do_connect)
    event.listen(engine, "begin", do_begin)
    return engine


def _is_unset(name: str, query: dict[str, str]) -> bool:
    variable = {"connect_timeout": "PGCONNECT_TIMEOUT"}.get(name)
    return name not in query and (variable is None or variable not in os.environ)


def _duration(query: dict[str, str], name: str, default: str) -> str:
    value = query.pop(name, default)
    if not re.fullmatch(r"\d{1,9}(ms|s|min)?", value):
        raise SchemaError(f"?{name}= must be a duration such as 30s or 500ms")
    return value


def _seconds(duration: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(\D*)", duration).groups()  # type: ignore[union-attr]  # validated by _duration
    return int(number) * _UNITS[unit]


def _prepare_threshold(value: str | None) -> int | None:
    """Return after how many uses to prepare a statement. None, the default, means never, for poolers."""
    if value is None or value.lower() == "none":
        return None
    if not value.isdecimal():
        raise SchemaError("?prepare_threshold= must be a whole number, or none")
    return int(value)


# SQLite


def _sqlite(url: URL, *, create: bool) -> Engine:
    path = Path(url.database or "")
    if "uri" not in url.query and not path.exists():
        if not create:
            raise SchemaError("the file does not exist; check its name, or run a synchronization first")
        _create_private_file(path)
    arguments = {} if "timeout" in url.query else {"timeout": BUSY_SECONDS}
    engine = create_engine(url, connect_args=arguments, hide_parameters=True, logging_name=_LOGGING_NAME)
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _create_private_file(path: Path) -> None:
    """Create a file that only its owner can read; SQLite gives its companion files the same mode."""
    with suppress(OSError):  # SQLite reports problems with the folder
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def _set_up_sqlite(connection: sqlite3.Connection, _: object) -> None:
    connection.create_function("lemcal_part_of", 2, part_of, deterministic=True)
    connection.isolation_level = None  # SQLAlchemy begins transactions, not the first write
    # NORMAL: a power failure may lose the last transactions, but only as a whole.
    for pragma in ("synchronous = NORMAL", "secure_delete = ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    # Writers lock immediately: a reader cannot become a writer if another writer was faster.
    writes = connection.get_execution_options().get("lemcal_writes", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def enable_log(connection: Connection) -> None:
    """Enable SQLite's write-ahead log, so that readers and the writer do not block each other.

    The setting is stored in the file, so it is only made once the tables are known to be ours.
    """
    if connection.dialect.name == "sqlite":
        raw: Any = connection.connection.driver_connection
        raw.execute("PRAGMA journal_mode = WAL").close()


def truncate_log(connection: Connection) -> str | None:
    """Empty SQLite's write-ahead log, which still contains erased rows; return the reason if that fails."""
    if connection.dialect.name != "sqlite":
        return None
    raw: Any = connection.connection.driver_connection
    try:
        ((busy, _, _),) = raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()  # waits for readers
    except sqlite3.Error as error:
        return str(error)
    return "another program is reading it" if busy else None
