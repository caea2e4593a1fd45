"""Databases: their URLs, how to connect, and what their errors mean.

Nothing is set for a session: a pooler such as pgbouncer hands it to other programs afterward.
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
_EXAMPLE: Final = "it must be like sqlite:///lemcal.db or postgresql://user@host/database"


class SchemaError(Exception):
    """The database cannot be used; the message says why."""


@attrs.frozen
class Problem:
    """What went wrong, and which error says so. A worker thread returns it.

    Raised there, an error would drag the driver's along, which holds rows: personal data.
    """

    text: str
    kind: type[StoreError | ConfigurationError] = StoreError


@attrs.frozen
class Address:
    """A database's URL. Shown are neither its password nor its query."""

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
    """Return the URL as SQLAlchemy reads it; ConfigurationError quotes nothing of it."""
    url = Secret(_url_in(text.reveal()))
    if problem := _problem_of_url(url.reveal(), str(text.reveal())):
        raise ConfigurationError(problem)
    return Address(cast("URL", url.reveal()))


def _url_in(text: object) -> URL | None:
    try:
        url = make_url(text) if isinstance(text, str) else None
    except (ArgumentError, ValueError):
        return None
    return url and url.set(drivername=_SCHEMES.get(url.drivername, url.drivername))


def _problem_of_url(url: URL | None, text: str) -> str:
    if url is None:
        return f"the database URL cannot be read: {_EXAMPLE}"
    if url.drivername not in ("sqlite", "postgresql+psycopg"):
        return f"the database URL is of an unknown kind: {_EXAMPLE}"
    if url.drivername == "sqlite":
        lost = url.database in (None, "", ":memory:")
        return "a SQLite database in memory is lost at once: use MemoryStore()" if lost else ""
    if _is_ambiguous(url, text):
        return (
            "the database URL has an @ or a ? in an unexpected place: in the user name and the password, "
            "write %40 for @, %3F for ?, %2F for / and %3A for :"
        )
    return ""


def _is_ambiguous(url: URL, text: str) -> bool:
    """Whether a part of the password may have been taken for the host, the database or the query."""
    query = text.partition("?")[2] if url.password is None or "?" not in url.password else ""
    settings = query.split("&") if query else []
    return "@" in (url.host or "") + (url.database or "") or not all("=" in setting for setting in settings)


_ADVICE: Final = (
    ("lock timeout", "another program holds it; try again when it is done"),
    ("locked", "another program holds it; try again when it is done"),
    ("statement timeout", "raise ?statement_timeout= in the URL if it needs longer"),
    ("full", "make room, and run this again"),
    ("unable to open", "check the folder, and who may write there"),
    ("readonly", "check who may write to the file and its folder"),
)

# PostgreSQL's classes of errors whose messages never quote a row: connections, resources, rights, locks.
_QUOTING_NOTHING: Final = ("08", "25", "28", "3D", "3F", "40", "42", "53", "54", "55", "57", "58", "XX")


def problem_of(error: Exception) -> Problem | None:
    """Return what a driver's error means, or None if it is not one."""
    if isinstance(error, SchemaError):
        return Problem(str(error), ConfigurationError)
    original: BaseException | None = error
    if isinstance(error, DBAPIError):
        original = error.orig
    if isinstance(original, sqlite3.Error):
        return Problem(_advised(_sqlite_text(original)))
    if hasattr(original, "diag"):  # psycopg is imported by who needs it
        return Problem(_advised(_postgresql_text(original)))
    if isinstance(error, UnicodeError):
        return Problem("a text cannot be encoded for this database; use one whose encoding is UTF8")
    if isinstance(error, (SQLAlchemyError, OSError)):
        return Problem(_advised(str(error)))
    return None


def _sqlite_text(error: sqlite3.Error) -> str:
    name, text = getattr(error, "sqlite_errorname", ""), str(error)
    if name == "SQLITE_CONSTRAINT_TRIGGER":
        return "a trigger of the database refused the data"  # its message may quote the row
    if name == "SQLITE_ERROR" and not text.startswith("no such "):  # a function's, which may quote it, too
        return "a statement or a trigger of the database failed"
    if text.startswith("Could not decode to UTF-8"):
        return "a text in it is not UTF-8: another program has written it"
    return text


def _postgresql_text(error: Any) -> str:
    """Return the message, or a description of it where it may quote a row."""
    diagnosis = error.diag
    if diagnosis.sqlstate is None:  # not from the server, but of several lines by libpq
        return re.sub(r"\s*\n\s*", "; ", str(error).strip())
    is_raised = diagnosis.source_function == "exec_stmt_raise" or (
        diagnosis.context is not None and diagnosis.sqlstate[:2] in ("XX", "42")
    )
    if is_raised or diagnosis.sqlstate[:2] == "P0":
        return f"a trigger or function of the database failed (SQLSTATE {diagnosis.sqlstate})"
    if diagnosis.sqlstate[:2] not in _QUOTING_NOTHING:
        name = diagnosis.constraint_name or diagnosis.table_name or ""
        return f"the database refused the data: {type(error).__name__} {name}".rstrip()
    return str(diagnosis.message_primary)


def _advised(said: str) -> str:
    said = re.sub(r"\s+", " ", said).strip()
    advice = next((advice for word, advice in _ADVICE if word in said), "")
    return f"{said}; {advice}" if advice else said


BUSY_SECONDS: Final = 10.0
"""How long a transaction waits for another program's lock (``?timeout=`` on SQLite, ``?lock_timeout=``)."""

# libpq's own settings; without them, a server that vanished is waited for until the system gives up.
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
_LONGER_THAN_ITS_TIMEOUT: Final = 5.0  # seconds that a living server gets to say that it has given up

_LOGGING_NAME: Final = "lemcal_async"


def engine_of(url: URL, *, create: bool) -> Engine:
    """Return what connects to a database; a SQLite file is only made with ``create``. Raises SchemaError."""
    # SQLAlchemy logs rows at DEBUG. A child logger with a filter keeps its other messages.
    logging.getLogger(f"sqlalchemy.engine.Engine.{_LOGGING_NAME}").addFilter(_above_debug)
    return _postgresql(url) if url.get_backend_name() == "postgresql" else _sqlite(url, create=create)


def _above_debug(record: logging.LogRecord) -> bool:
    return record.levelno > logging.DEBUG


# PostgreSQL


def _postgresql(url: URL) -> Engine:
    try:
        import_module("psycopg")  # SQLite needs none
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
    # One round trip. READ COMMITTED whatever the server's default is: a writer waits for the other's lock
    # and then sees its rows, where stricter levels fail.
    begin = f"BEGIN ISOLATION LEVEL READ COMMITTED; {settings}"
    defaults = {name: value for name, value in _POSTGRESQL_DEFAULTS.items() if _is_unset(name, query)}

    def connect(*arguments: Any, **options: Any) -> BoundedConnection:
        connection = BoundedConnection.connect(*arguments, **options, prepare_threshold=threshold)
        connection.patience = seconds and seconds + _LONGER_THAN_ITS_TIMEOUT
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
        raw.patience = None if opens else seconds and seconds + _LONGER_THAN_ITS_TIMEOUT
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
    number, unit = re.fullmatch(r"(\d+)(\D*)", duration).groups()  # type: ignore[union-attr]  # it was checked
    return int(number) * _UNITS[unit]


def _prepare_threshold(value: str | None) -> int | None:
    """Return after how many uses a statement is prepared: never by default, as poolers lose it."""
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
            raise SchemaError("there is no such file; nothing was ever synchronized into it")
        _create_privately(path)
    arguments = {} if "timeout" in url.query else {"timeout": BUSY_SECONDS}
    engine = create_engine(url, connect_args=arguments, hide_parameters=True, logging_name=_LOGGING_NAME)
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _create_privately(path: Path) -> None:
    """Create a file that only its owner can read; SQLite gives the files beside it the same mode."""
    with suppress(OSError):  # SQLite says what is wrong with the folder
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def _set_up_sqlite(connection: sqlite3.Connection, _: object) -> None:
    connection.create_function("lemcal_part_of", 2, part_of, deterministic=True)
    connection.isolation_level = None  # transactions begin where SQLAlchemy says, not at the first write
    # NORMAL: after a power failure the last transactions may be missing, each as a whole.
    for pragma in ("synchronous = NORMAL", "secure_delete = ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    # A writer says so at once: one that has read before cannot become it if another was faster.
    writes = connection.get_execution_options().get("lemcal_writes", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def keep_log(connection: Connection) -> None:
    """Have SQLite write to a log beside the file, so that readers and the writer do not wait for each other.

    The file remembers this, so it is done once its tables are known to be ours.
    """
    if connection.dialect.name == "sqlite":
        raw: Any = connection.connection.driver_connection
        raw.execute("PRAGMA journal_mode = WAL").close()


def log_problem(connection: Connection) -> str | None:
    """Empty SQLite's log, which still holds what was erased; return why that was not possible."""
    if connection.dialect.name != "sqlite":
        return None
    raw: Any = connection.connection.driver_connection
    try:
        ((busy, _, _),) = raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()  # waits for readers
    except sqlite3.Error as error:
        return str(error)
    return "another program is reading it" if busy else None
