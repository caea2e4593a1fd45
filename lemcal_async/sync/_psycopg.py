"""psycopg's connection with a bound on its waits. Only this file imports psycopg.

libpq waits for an answer for ever; a server that is stopped, or a network that swallows packets, cannot be
told from a slow statement there. Another thread can also end the wait, so that its caller can go on.
"""

from collections.abc import Generator
from time import monotonic
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen

T = TypeVar("T")


class SilenceError(psycopg.OperationalError):
    """The wait for the server's answer was ended."""


class BoundedConnection(psycopg.Connection[Any]):
    """A connection on which no wait is longer than ``patience`` seconds; None is without bound."""

    patience: float | None = None
    begin_sql = "BEGIN"
    settings_sql = ""
    is_severed = False

    def client_cursor(self) -> psycopg.ClientCursor[Any]:
        """Return a cursor that sends several statements at once."""
        return psycopg.ClientCursor(self)

    def sever(self) -> None:
        """End the wait of the thread that is using this connection; it closes the connection."""
        self.is_severed = True

    def wait(self, gen: PQGen[T], *arguments: Any, **options: Any) -> T:
        """Wait for the server as psycopg does, which looks around ten times a second."""
        return super().wait(self._bounded(gen), *arguments, **options)

    def _bounded(self, gen: PQGen[T]) -> Generator[Any, Any, T]:
        ends = None if self.patience is None else monotonic() + self.patience
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and (self.is_severed or (ends is not None and monotonic() > ends)):
                    raise self._given_up()
                wanted = gen.send(ready)
        except StopIteration as stop:
            value: T = stop.value
            return value

    def _given_up(self) -> SilenceError:
        self.pgconn.finish()
        if self.is_severed:
            return SilenceError("the wait for the server was cut off")
        return SilenceError(f"the server has not answered for {self.patience:g} s")
