"""The clock that all processes share: the database server's, or for SQLite the machine's."""

from time import time
from typing import Any

from sqlalchemy import Connection, Float, cast, extract, func, literal


def clock(connection: Connection) -> Any:
    """Return the seconds since 1970 as an expression; constant within a statement, so an index serves it."""
    if connection.dialect.name == "postgresql":
        return cast(extract("epoch", func.statement_timestamp()), Float(53))
    return literal(time(), Float(53))
