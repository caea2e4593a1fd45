"""The request log: what the sandbox has seen, for tests and for the page. It never holds an API key."""

import itertools
import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import attrs

if TYPE_CHECKING:
    from lemcal_async.sandbox._hooks import Delivery

KEPT: Final = 100_000
"""How many requests are kept, the newest: a sandbox may run for weeks."""

BODIES_KEPT: Final = 1_000
"""How many of them keep their bodies."""

BODY_CHARACTERS: Final = 16_384
"""How much of a body is kept."""

_RECENT: Final = 5_000  # entries whose latest change is remembered, for those who follow a journal

_SECRET: Final = frozenset({"authorization", "proxy-authorization"})


@attrs.frozen
class SeenRequest:
    """A request as it arrived, and what became of it.

    Bodies are cut after 16,384 characters, and None for all but the newest 1,000 requests.

    Attributes:
        at: The sandbox's clock when the request was counted.
        method: The HTTP method.
        path: Relative to the API's prefix (``/meetings``) for API calls, the whole path for others.
        query: The query string.
        user_id: The presented one if the sandbox knows it, whether or not the key is right.
        headers: The headers, with names in lower case and without those that carry credentials.
        status_code: None until there is a response, and it stays None if there is none.
        processed: Whether the route did its work; it did not if the request was refused or a fault replaced
            the response.
        fault: The fault that it met, in words.
        seconds: The time until the request was finished, None before.
        limit: The rate limit, None if the request was not counted.
        remaining: How many requests were left then, None if the request was not counted.
        resets_in: Seconds until the window ended then, None if the request was not counted.
        time: The time of day when it was counted.
        number: Counts requests from 1.
        request_body: The request's body, without what may be a token in a hook's target.
        response_body: The response's body, without what may be a token in a hook's target.
    """

    at: float
    method: str
    path: str
    query: str
    user_id: str | None
    headers: Mapping[str, str]
    status_code: int | None = None
    processed: bool = False
    fault: str | None = None
    seconds: float | None = None
    limit: int | None = None
    remaining: int | None = None
    resets_in: float | None = None
    time: datetime | None = None
    number: int = 0
    request_body: str | None = attrs.field(default=None, repr=False)
    response_body: str | None = attrs.field(default=None, repr=False)


def public_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return ``headers`` without credentials."""
    return {name: value for name, value in headers.items() if name not in _SECRET}


T = TypeVar("T", bound=attrs.AttrsInstance)


class Journal(Generic[T]):
    """The newest ``kept`` entries of a kind, numbered from 1. Thread-safe.

    A follower passes the ``revision`` it knows to ``changed_since``, and gets what is new or different.
    """

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._entries: dict[int, T] = {}
        self._changes: dict[int, int] = {}  # number -> revision of its latest change, in that order
        self._revision = 0
        self._forgotten = 0  # the latest revision whose change is no longer in there

    def add(self, make: Callable[[int], T]) -> T:
        """Add the entry that ``make`` returns for its number."""
        with self._lock:
            number = next(self._numbers)
            self._entries[number] = entry = make(number)
            self._entries.pop(number - self._kept, None)
            self._note(number)
        return entry

    def update(self, number: int, **changes: Any) -> None:
        """Replace fields of an entry, unless the journal has dropped it meanwhile."""
        with self._lock:
            if number in self._entries:
                self._entries[number] = attrs.evolve(self._entries[number], **changes)  # type: ignore[misc]  # an attrs class, as bound
                self._note(number)

    def get(self, number: int) -> T | None:
        """Return the entry with that number, if it is still there."""
        with self._lock:
            return self._entries.get(number)

    def snapshot(self) -> list[T]:
        """Return the entries, oldest first."""
        with self._lock:
            return list(self._entries.values())

    def after(self, number: int, count: int) -> list[T]:
        """Return up to ``count`` entries that follow a number, oldest first."""
        with self._lock:
            first = max(number + 1, next(iter(self._entries), 1))
            last = min(first + count, next(reversed(self._entries), 0) + 1)
            return [self._entries[at] for at in range(first, last)]

    def before(self, number: int | None, count: int) -> list[T]:
        """Return up to ``count`` entries before a number (None: the newest), newest first."""
        with self._lock:
            last = next(reversed(self._entries), 0) + 1
            end = last if number is None else min(number, last)
            first = max(end - count, next(iter(self._entries), 1))
            return [self._entries[at] for at in range(end - 1, first - 1, -1)]

    @property
    def revision(self) -> int:
        """A number that grows with every change."""
        return self._revision

    def reaches(self, revision: int) -> bool:
        """Whether every change after that revision is still remembered, and the revision is one of ours."""
        with self._lock:
            return self._forgotten <= revision <= self._revision

    def changed_since(self, revision: int) -> tuple[int, list[T]]:
        """Return the present revision, and the entries that changed after that one, in order of change."""
        with self._lock:
            changed: list[T] = []
            for number in reversed(self._changes):
                if self._changes[number] <= revision:
                    break
                if number in self._entries:
                    changed.append(self._entries[number])
            return self._revision, changed[::-1]

    def _note(self, number: int) -> None:
        self._revision += 1
        self._changes.pop(number, None)
        self._changes[number] = self._revision
        if len(self._changes) > _RECENT:
            self._forgotten = self._changes.pop(next(iter(self._changes)))


class RequestLog(Journal[SeenRequest]):
    """Requests in the order in which they were counted."""

    def __init__(self, kept: int = KEPT) -> None:
        super().__init__(kept)

    def add_request(self, request: SeenRequest) -> int:
        """Add a request and return its number."""
        number = self.add(lambda number: attrs.evolve(request, number=number)).number
        with self._lock:  # without a note: followers need not hear of it
            old = self._entries.get(number - BODIES_KEPT)
            if old is not None:
                self._entries[old.number] = attrs.evolve(old, request_body=None, response_body=None)
        return number


class Follower:
    """Looks for requests and deliveries that have finished since it looked last."""

    def __init__(self, log: RequestLog, deliveries: "Journal[Delivery]") -> None:
        self._log, self._deliveries = log, deliveries
        self._log_revision, self._deliveries_revision = log.revision, deliveries.revision

    def finished(self) -> "list[SeenRequest | Delivery]":
        """Return them, requests first."""
        self._log_revision, requests = self._log.changed_since(self._log_revision)
        self._deliveries_revision, deliveries = self._deliveries.changed_since(self._deliveries_revision)
        return [*(entry for entry in requests if entry.seconds is not None), *deliveries]


def body_text(body: bytes) -> str:
    """Return the part of a body that is kept, as text."""
    return body[: BODY_CHARACTERS * 4].decode("utf-8", "replace")[:BODY_CHARACTERS]
