"""The connections of one event loop that are open and idle, the last used on top."""

import time
from collections import deque
from typing import Generic, Protocol, TypeVar

from lemcal_async.transport.gate import Gate

Origin = tuple[str, str, int | None]  # scheme, host, port


class Connection(Protocol):
    """What a pool asks of a connection; those of httpcore and httpcore2 fit."""

    def is_closed(self) -> bool: ...  # noqa: D102 - as they are documented there
    def has_expired(self) -> bool: ...  # noqa: D102


C = TypeVar("C", bound=Connection)


class Pool(Generic[C]):
    """Idle connections, kept for ``keepalive`` seconds, and the gate before all of them.

    Nothing is closed in here: what is to be closed is handed back.
    """

    def __init__(self, max_connections: int, keepalive: float) -> None:
        self.gate = Gate(max_connections)
        self.closed = False
        self._keepalive = keepalive
        self._idle: dict[Origin, deque[tuple[float, C]]] = {}

    def take(self, origin: Origin) -> tuple[C | None, list[C]]:
        """Return the idle connection that was used last, and those that turned out to be dead.

        A stale one is left for ``put`` to sweep.
        """
        dead: list[C] = []
        idle = self._idle.get(origin)
        while idle and idle[-1][0] >= time.monotonic() - self._keepalive:
            connection = idle.pop()[1]
            if not (connection.is_closed() or connection.has_expired()):
                return connection, dead
            dead.append(connection)
        return None, dead

    def put(self, origin: Origin, connection: C) -> list[C]:
        """Keep a connection for the next request; return those that are to be closed instead."""
        if self.closed:
            return [connection]
        now = time.monotonic()
        self._idle.setdefault(origin, deque()).append((now, connection))
        stale: list[C] = []
        for idle in self._idle.values():
            while idle and idle[0][0] < now - self._keepalive:
                stale.append(idle.popleft()[1])
        return stale

    def drain(self) -> list[C]:
        """Take out all idle connections."""
        drained = [connection for idle in self._idle.values() for _, connection in idle]
        self._idle.clear()
        return drained
