"""A psycopg connection with bounded waits. Only this module imports psycopg.

libpq waits indefinitely for a reply, because it cannot distinguish a stopped server, or a network that drops
packets, from a slow statement. Another thread can also end the wait, so that the caller can continue.
"""

from collections.abc import Generator
from time import monotonic
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen

T = TypeVar("T")


class NoReplyError(psycopg.OperationalError):
    """The wait for the server's reply was ended."""


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that waits at most ``max_wait`` seconds for the server; None means without limit."""

    max_wait: float | None = None
    begin_sql = "BEGIN"
    settings_sql = ""
    is_interrupted = False

    def client_cursor(self) -> psycopg.ClientCursor[Any]:
        """Return a cursor that can send several statements at once."""
        return psycopg.ClientCursor(self)

    def interrupt(self) -> None:
        """End the wait of the thread that is using this connection, which then closes it."""
        self.is_interrupted = True

    def wait(self, gen: PQGen[T], *arguments: Any, **options: Any) -> T:
        """Wait for the server like psycopg, which checks for an interruption ten times a second."""
        return super().wait(self._bounded(gen), *arguments, **options)

    def _bounded(self, gen: PQGen[T]) -> Generator[Any, Any, T]:
        deadline = None if self.max_wait is None else monotonic() + self.max_wait
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and (self.is_interrupted or (deadline is not None and monotonic() > deadline)):
                    raise self._no_reply()
                wanted = gen.send(ready)
        except StopIteration as stop:
            value: T = stop.value
            return value

    def _no_reply(self) -> NoReplyError:
        self.pgconn.finish()
        if self.is_interrupted:
            return NoReplyError("the wait for the server was interrupted")
        return NoReplyError(f"the server has not responded for {self.max_wait:g} s")
