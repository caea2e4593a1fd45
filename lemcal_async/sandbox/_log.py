"""The log of the requests that the sandbox has seen, for tests to look at. It never holds an API key."""

import itertools
import threading
from collections.abc import Mapping
from typing import Final

import attrs

KEPT: Final = 100_000
"""So many requests are remembered, the newest: a sandbox may be left running for weeks."""

_SECRET: Final = frozenset({"authorization", "proxy-authorization"})


@attrs.frozen
class SeenRequest:
    """A request, as it arrived.

    ``at`` is the sandbox's clock when the request was counted. ``path`` is below the API's prefix
    (``/meetings``) for calls of the API, and the whole path for others. ``user_id`` is the one that
    was presented, if the sandbox knows it, be its key right or wrong. ``status`` is None until there
    is an answer, and stays so if there is none. ``processed`` says whether the route did its work,
    which it does not for a request that was refused or met a fault in its place. Names of
    ``headers`` are in lower case; those that carry credentials are left out.
    """

    at: float
    method: str
    path: str
    query: str
    user_id: str | None
    headers: Mapping[str, str]
    status: int | None = None
    processed: bool = False


def public_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return ``headers`` without credentials."""
    return {name: value for name, value in headers.items() if name not in _SECRET}


class RequestLog:
    """Requests in the order in which they were counted. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._entries: dict[int, SeenRequest] = {}

    def add(self, request: SeenRequest) -> int:
        """Write a request down and return its number."""
        with self._lock:
            number = next(self._numbers)
            self._entries[number] = request
            self._entries.pop(number - KEPT, None)
        return number

    def complete(self, number: int, *, status: int | None, processed: bool) -> None:
        """Write down how a request ended; one that the log has dropped meanwhile is left at that."""
        with self._lock:
            if number in self._entries:
                self._entries[number] = attrs.evolve(
                    self._entries[number], status=status, processed=processed
                )

    def snapshot(self) -> list[SeenRequest]:
        """Return the requests seen so far."""
        with self._lock:
            return list(self._entries.values())
