"""Database URLs: which ones are accepted, what may be shown of them, and what a database's errors mean."""

import re
import sqlite3
from typing import Any, Final, cast

import attrs
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from lemcal_async._auth import Secret
from lemcal_async.errors import ConfigurationError, StoreError

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
    if getattr(error, "sqlite_errorname", "") == "SQLITE_CONSTRAINT_TRIGGER":
        return "a trigger of the database refused the data"  # its message may quote the row
    return str(error)


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
